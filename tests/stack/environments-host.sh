# shellcheck shell=bash disable=SC2016,SC2030,SC2031,SC2154,SC2164,SC2317 # sourced by environments
# --- Another clone, other line ends, proxies, settings and folders ----------------------------------------------------

ids() { docker compose ps -aq | sort | paste -sd' ' -; }

# Files with CRLF, as git's default on Windows writes them.
env_line_ends() {
  local sum tag
  own_copy
  git -c init.defaultBranch=main -c core.safecrlf=false init -q
  git -c core.safecrlf=false add -A
  git -c user.name=x -c user.email=x@example.org commit -qm x
  git clone -q -c core.autocrlf=true . "$WORK/other" && cd "$WORK/other" || { fail "the clone"; return; }
  check "scripts with CRLF in a clone on Windows" "" \
    "$(grep -lI $'\r' jbang Makefile scripts/* nginx.conf init.sql page/* 2>/dev/null | paste -sd' ' -)"
  does "make" make
  does "jbang --version" ./jbang --version
  # The hashes of the page's Content-Security-Policy are those of the text that a browser reads.
  sed -i 's/$/\r/' page/* && cp "$copy"/page/*.png page/ 2>/dev/null || true
  DATA_DIR=$WORK/other/data run_instance "$PORT" ./jbang Service.java || fail "jbang Service.java"
  curl -fsS -m 5 -D "$WORK/head" -H 'Accept: text/html' "http://127.0.0.1:$PORT/" | tr -d '\r' >"$WORK/page" || true
  stop_instance
  for tag in style script; do
    sum=$(awk -v RS="</?${tag}[^>]*>" 'NR == 2 { printf "%s", $0 }' "$WORK/page" |
      openssl dgst -sha256 -binary | base64)
    check "hash of the $tag" "$sum" "$(grep -oF "$sum" "$WORK/head" || true)"
  done
}

# A proxy that does not exist, in the environment and for each container.
env_proxies() {
  own_copy
  local nowhere=http://127.0.0.1:1
  does "build" docker compose build
  mkdir "$copy/docker"
  cp -R "${DOCKER_CONFIG:-$HOME/.docker}/." "$copy/docker" 2>/dev/null || true
  printf '{"proxies": {"default": {"httpProxy": "%s", "httpsProxy": "%s"}}}\n' $nowhere $nowhere >docker/config.json
  export DOCKER_CONFIG=$copy/docker http_proxy=$nowhere https_proxy=$nowhere HTTP_PROXY=$nowhere HTTPS_PROXY=$nowhere \
    all_proxy=$nowhere ALL_PROXY=$nowhere
  does "make up" make up
  check "a container's proxy" $nowhere "$(docker compose exec -T web1 sh -c 'echo "$http_proxy"' </dev/null)"
  does "make test-lb" make test-lb
  does "make exercise" make exercise SECONDS_LONG=1
  does "make scale" make scale N=4
  does "make monitor" make monitor
}

# A network namespace whose only way out is a proxy.
env_compulsory_proxy() {
  own_copy
  local before proxy=198.18.87.1 central=${MAVEN_CENTRAL:-https://repo1.maven.org/maven2}
  [ "$(uname -s)" = Linux ] && [ "$(id -u)" = 0 ] || { say "        skipped: it needs Linux, as root"; return; }
  command -v tinyproxy >/dev/null || { apt-get -qq update && apt-get -qq install -y tinyproxy; } >"$WORK/apt" 2>&1
  end_proxy() {
    kill "$(cat "$WORK/proxy.pid")" 2>/dev/null || true
    ip netns delete threefold-env 2>/dev/null || true
    ip link delete threefold-env 2>/dev/null || true
    end_project
  }
  trap end_proxy EXIT
  ip netns add threefold-env
  ip link add threefold-env type veth peer name out netns threefold-env
  ip address add $proxy/30 dev threefold-env && ip link set threefold-env up
  ip -n threefold-env address add 198.18.87.2/30 dev out && ip -n threefold-env link set out up
  ip -n threefold-env link set lo up
  printf '%s\n' "Listen $proxy" 'Port 8888' 'Timeout 60' "PidFile \"$WORK/proxy.pid\"" \
    "LogFile \"$WORK/proxy.log\"" >"$WORK/proxy.conf"
  tinyproxy -c "$WORK/proxy.conf"
  printf '%s\n' '//DEPS org.slf4j:slf4j-api:2.0.17' 'class A { }' >A.java
  # JBang's folders are new, so that it downloads all.
  behind() { ip netns exec threefold-env env JBANG_DIR="$WORK/other/jbang" JBANG_REPO="$WORK/other/m2" "$@"; }
  refuses "jbang without the proxy" "could not fetch" behind ./jbang info classpath A.java
  does "jbang behind a compulsory proxy" behind https_proxy=http://$proxy:8888 http_proxy=http://$proxy:8888 \
    ./jbang info classpath A.java
  check "what it downloaded" slf4j-api-2.0.17.jar "$(find "$WORK/other/m2" -name 'slf4j-api*.jar' -exec basename {} \;)"
  central=${central#*://} central=${central%%/*}
  # The stage that downloads; later stages need no network.
  echo "services: {web1: {build: {target: build, extra_hosts: {$central: 192.0.2.1}}}}" >override.yml
  echo "# $RUN" >>jbang # no downloads from the builder's cache
  before=$(wc -l <"$WORK/proxy.log")
  does "the image behind a compulsory proxy" env https_proxy=http://$proxy:8888 \
    docker compose -f docker-compose.yml -f override.yml --progress plain build web1
  check "the host that its build reached by the proxy" "$central" \
    "$(sed "1,${before}d" "$WORK/proxy.log" | grep -o "CONNECT $central" | sed -n '1s/.* //p')"
}

# .env as editors write it: Compose and the scripts read the same values.
env_dot_env() {
  own_copy
  local names='$PORT, $DB_NAME, $DB_USER, $MONITOR_PORT, $MONITOR_PASS, $REDIS_PASS, $WEB_CPUS'
  printf '%s\r\n' '# ours' '' 'PORT=9321   # free' "DB_NAME='other # one'" 'export DB_USER="me" # I' \
    'MONITOR_PORT=9322' 'MONITOR_PASS=a#b==' "REDIS_PASS='\$a'" 'WEB_CPUS = 0.5' 'POSTGRES_PASSWORD="1\n2"' >.env
  printf 'services: {x: {image: x, environment: {ALL: "%s"}}}\n' "$names" >ask.yml
  clean() { env -i HOME="$HOME" PATH="$PATH" "$@"; }
  local compose
  compose=$(clean docker compose -f ask.yml config --format json | sed -nE 's/^ *"ALL": "(.*)",?$/\1/p' |
    sed 's/\$\$/$/g')
  check "the values in Compose" '9321, other # one, me, 9322, a#b==, $a, 0.5' "$compose"
  check "the values in scripts" "$compose" "$(clean bash -c ". scripts/lib.sh; say \"$names\"")"
  check "the URL in scripts" http://localhost:9321 "$(clean bash -c '. scripts/lib.sh; say "$URL"')"
  check "the environment comes first" http://localhost:9323 "$(clean PORT=9323 bash -c '. scripts/lib.sh; say "$URL"')"
  check "exported to other programs" "" "$(clean bash -c '. scripts/lib.sh; env' |
    grep -E '^(DB_|MONITOR_|POSTGRES_)' || true)"
}

# A second clone takes neither the containers nor the data of the first one.
env_second_clone() {
  own_copy
  local before
  does "the first one: make up" make up
  does "make up again" make up
  before=$(ids)
  cp -R "$copy" "$WORK/other" && cd "$WORK/other"
  for target in up down restart 'scale N=4' rolling test-lb; do
    # shellcheck disable=SC2086 # two words
    refuses "the second one: make $target" COMPOSE_PROJECT_NAME make $target </dev/null
  done
  refuses "the second one: make clean" COMPOSE_PROJECT_NAME make clean <<<yes
  check "the first one's containers" "$before" "$(ids)"
  cd "$copy" && does "the first one: make down" make down
  cd "$WORK/other"
  refuses "the second one, when only data are left: make up" COMPOSE_PROJECT_NAME make up </dev/null
  refuses "the second one, when only data are left: make clean" COMPOSE_PROJECT_NAME make clean <<<yes
  check "the first one's data" "$COMPOSE_PROJECT_NAME"_postgres-data \
    "$(docker volume ls -q --filter name="^${COMPOSE_PROJECT_NAME}_postgres-data")"
  cd "$copy" && does "the first one: make up" make up
  ln -s "$copy" "$WORK/link" && cd "$WORK/link"
  does "by a symbolic link: make restart" make restart
  rm "$WORK/link"
  mv "$copy" "$WORK/moved" && cd "$WORK/moved"
  does "a folder that was moved: make clean" bash -c 'make clean <<<yes'
  check "containers after that" "" "$(ids)"
}

# Answers to questions by a pipe.
env_answers() {
  own_copy
  does "make up" make up
  does "make backup" make backup FILE="$copy/a backup.tar.gz"
  refuses "make restore, answered with no" "Nothing was changed" make restore FILE="$copy/a backup.tar.gz" <<<no
  echo yes | make restore FILE="$copy/a backup.tar.gz" >"$WORK/said" 2>&1 || true
  check "make restore, answered with yes" Restored "$(grep -o '^Restored' "$WORK/said" || tail -n 3 "$WORK/said")"
}

# Variables that the caller's shell may export.
env_exported() {
  own_copy
  mkdir "$copy/tmp of mine"
  export CDPATH=$copy:/ POSIXLY_CORRECT=1 TMPDIR="$copy/tmp of mine" LC_ALL=de_DE.UTF-8 MAKEFLAGS=-j2
  umask 077
  does "make doctor" make doctor PORT=1
  does "make up" make up
  does "make test-lb" make test-lb
  does "make scale" make scale N=4
  does "make rolling" make rolling
  does "make exercise" make exercise SECONDS_LONG=2
  does "make test-lb again" make test-lb
  does "make test-persist" make test-persist
}

# WSL exports NAME, the computer's; it is no setting of make.
env_exported_names() {
  check "make test, with NAME exported" "" "$(NAME=desktop make -n test | grep -o desktop || true)"
  check "make test NAME=…" desktop "$(NAME=other make -n test NAME=desktop | grep -oE 'desktop|other' || true)"
}
