# shellcheck shell=bash disable=SC2016,SC2030,SC2031,SC2164,SC2317 # sourced by tests/stack/environments
# --- Who types the command: another clone, other line ends, proxies, settings and folders ----------------------------
# Most of them type it in a copy of this folder, with a stack of its own, in a folder whose name is awkward.

HOST_PORT=${ENVIRONMENTS_PORT:-9986}

# host_case FUNCTION: in a shell of its own, in a copy; hands its failures on and leaves nothing
host_case() {
  local code=0
  (
    failures=0
    unset COMPOSE_FILE WEB_IMAGE URL
    export COMPOSE_PROJECT_NAME=${COMPOSE_PROJECT_NAME:-threefold}-host PORT=$HOST_PORT MONITOR_PORT=$((HOST_PORT + 1))
    trap host_end EXIT; trap 'exit 130' INT TERM
    host_end
    copy="$WORK/it's grün here"
    # (Without the copy, a case would do to this folder what it does there.)
    if host_copy "$copy" && cd "$copy"; then "$1"; else fail "the copy in $copy"; fi
    exit $((failures > 99 ? 99 : failures))
  ) || code=$?
  failures=$((failures + code))
}
host_end() {
  docker compose --profile monitor down --volumes --remove-orphans --timeout 1 >"$WORK/down" 2>&1 || cat "$WORK/down"
  rm -rf "$WORK/it's grün here" "$WORK/other" "$WORK/moved"
}
host_copy() {
  mkdir -p "$1"
  git ls-files -z --cached --others --exclude-standard | tar -c --null -T - | tar -x -C "$1"
}
# does WHAT COMMAND...: it ends well; refuses WHAT WORDS COMMAND...: it ends badly, with these words in its last lines
does()    { local what=$1; shift; if "$@" >"$WORK/said" 2>&1 </dev/null; then pass "$what"
            else fail "$what:"; tail -n 5 "$WORK/said" | cut -c1-300; fi; }
refuses() { local what=$1 words=$2; shift 2
            if "$@" >"$WORK/said" 2>&1; then fail "$what: it did"
            elif grep -F -- "$words" "$WORK/said" >/dev/null; then pass "$what: $(grep -F -- "$words" "$WORK/said")"
            else fail "$what: expected \"$words\"; it said:"; tail -n 5 "$WORK/said"; fi; }
ids() { docker compose ps -aq | sort | paste -sd' ' -; }

# Files with CRLF, as git's default on Windows writes them.
env_line_ends() { host_case host_line_ends; }
host_line_ends() {
  git -c init.defaultBranch=main -c core.safecrlf=false init -q
  git -c core.safecrlf=false add -A
  git -c user.name=x -c user.email=x@example.org commit -qm x
  git clone -q -c core.autocrlf=true . "$WORK/other" && cd "$WORK/other" || { fail "the clone"; return; }
  check "scripts with CRLF in a clone of Windows" "" \
    "$(grep -lI $'\r' jbang Makefile scripts/* nginx.conf init.sql page/* 2>/dev/null | paste -sd' ' -)"
  does "make" make
  does "jbang --version" ./jbang --version
  # And where the files have it all the same, the sums are of what a browser reads.
  sed -i 's/$/\r/' page/* && cp "$copy"/page/*.png page/ 2>/dev/null || true
  local url=http://127.0.0.1:$PORT sum service
  DATA_DIR=$WORK/other/data INSTANCE_ID=crlf ./jbang Service.java >"$WORK/service" 2>&1 & service=$!
  for _ in $(seq 300); do
    if curl -fsS -m 2 "$url/readyz" >"$WORK/ready" 2>&1 || ! kill -0 $service 2>/dev/null; then break; fi
    sleep 0.2
  done
  curl -fsS -m 5 -D "$WORK/head" -H 'Accept: text/html' "$url/" | tr -d '\r' >"$WORK/page" || cat "$WORK/service"
  kill $service; wait $service || true
  for tag in style script; do
    sum=$(awk -v RS="</?${tag}[^>]*>" 'NR == 2 { printf "%s", $0 }' "$WORK/page" |
      openssl dgst -sha256 -binary | base64)
    check "the sum of the $tag" "$sum" "$(grep -oF "$sum" "$WORK/head" || true)"
  done
}

# A proxy that leads nowhere, in the environment and for each container.
env_proxies() { host_case host_proxies; }
host_proxies() {
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

# No way out but a proxy: nothing else can be reached from there, nor has a name.
env_compulsory_proxy() { host_case host_compulsory_proxy; }
host_compulsory_proxy() {
  local before proxy=198.18.87.1 central=${MAVEN_CENTRAL:-https://repo1.maven.org/maven2}
  [ "$(uname -s)" = Linux ] && [ "$(id -u)" = 0 ] || { say "        left out: it needs Linux, as root"; return; }
  command -v tinyproxy >/dev/null || { apt-get -qq update && apt-get -qq install -y tinyproxy; } >"$WORK/apt" 2>&1
  leave_proxy() {
    kill "$(cat "$WORK/proxy.pid")" 2>/dev/null || true
    ip netns delete threefold-env 2>/dev/null || true
    ip link delete threefold-env 2>/dev/null || true
    host_end
  }
  trap leave_proxy EXIT
  ip netns add threefold-env
  ip link add threefold-env type veth peer name out netns threefold-env
  ip address add $proxy/30 dev threefold-env && ip link set threefold-env up
  ip -n threefold-env address add 198.18.87.2/30 dev out && ip -n threefold-env link set out up
  ip -n threefold-env link set lo up
  printf '%s\n' "Listen $proxy" 'Port 8888' 'Timeout 60' "PidFile \"$WORK/proxy.pid\"" \
    "LogFile \"$WORK/proxy.log\"" >"$WORK/proxy.conf"
  tinyproxy -c "$WORK/proxy.conf"
  printf '%s\n' '//DEPS org.slf4j:slf4j-api:2.0.17' 'class A { }' >A.java
  # (With folders of its own, so that all is downloaded.)
  behind() { ip netns exec threefold-env env JBANG_DIR="$WORK/other/jbang" JBANG_REPO="$WORK/other/m2" "$@"; }
  refuses "jbang without the proxy" "could not fetch" behind ./jbang info classpath A.java
  does "jbang behind a compulsory proxy" behind https_proxy=http://$proxy:8888 http_proxy=http://$proxy:8888 \
    ./jbang info classpath A.java
  check "what it downloaded" slf4j-api-2.0.17.jar "$(find "$WORK/other/m2" -name 'slf4j-api*.jar' -exec basename {} \;)"
  central=${central#*://} central=${central%%/*}
  # (The stage that downloads; what follows it needs nothing from outside.)
  echo "services: {web1: {build: {target: build, extra_hosts: {$central: 192.0.2.1}}}}" >override.yml
  echo "# $RUN" >>jbang # so that the downloads do not come from the builder's cache
  before=$(wc -l <"$WORK/proxy.log")
  does "the image behind a compulsory proxy" env https_proxy=http://$proxy:8888 \
    docker compose -f docker-compose.yml -f override.yml --progress plain build web1
  check "what its build asked the proxy for" "$central" \
    "$(sed "1,${before}d" "$WORK/proxy.log" | grep -o "CONNECT $central" | sed -n '1s/.* //p')"
}

# .env as editors write it: Compose and the scripts know the same.
env_dot_env() { host_case host_dot_env; }
host_dot_env() {
  local names='$PORT, $DB_NAME, $DB_USER, $MONITOR_PORT, $MONITOR_PASS, $REDIS_PASS, $WEB_CPUS'
  printf '%s\r\n' '# ours' '' 'PORT=9321   # free' "DB_NAME='other # one'" 'export DB_USER="me" # I' \
    'MONITOR_PORT=9322' 'MONITOR_PASS=a#b==' "REDIS_PASS='\$a'" 'WEB_CPUS = 0.5' 'POSTGRES_PASSWORD="1\n2"' >.env
  printf 'services: {x: {image: x, environment: {ALL: "%s"}}}\n' "$names" >ask.yml
  clean() { env -i HOME="$HOME" PATH="$PATH" "$@"; }
  local compose
  compose=$(clean docker compose -f ask.yml config --format json | sed -nE 's/^ *"ALL": "(.*)",?$/\1/p' |
    sed 's/\$\$/$/g')
  check "what Compose knows" '9321, other # one, me, 9322, a#b==, $a, 0.5' "$compose"
  check "what scripts know" "$compose" "$(clean bash -c ". scripts/lib.sh; say \"$names\"")"
  check "where they ask" http://localhost:9321 "$(clean bash -c '. scripts/lib.sh; say "$URL"')"
  check "the environment comes first" http://localhost:9323 "$(clean PORT=9323 bash -c '. scripts/lib.sh; say "$URL"')"
  check "what stays in the file" "" "$(clean bash -c '. scripts/lib.sh; env' |
    grep -E '^(DB_|MONITOR_|POSTGRES_)' || true)"
}

# A second clone does not take the first one's containers, nor its data.
env_second_clone() { host_case host_second_clone; }
host_second_clone() {
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

# A changed nginx.conf is in force, and no request is lost over it.
env_nginx_conf() { host_case host_nginx_conf; }
host_nginx_conf() {
  local load
  does "make up" make up
  header() { curl -sS -m 5 -D - -o /dev/null "http://localhost:$PORT/healthz" | tr -d '\r' | sed -n 's/^X-Test: //p'; }
  while [ ! -e "$WORK/enough" ]; do
    curl -sS -m 9 -o /dev/null -w '%{http_code}\n' "http://localhost:$PORT/?[1-20]" 2>&1
  done >"$WORK/load" & load=$!
  sed -i 's/^    server_tokens off;/&\n    add_header X-Test one;/' nginx.conf    # as editors do it: a new file
  does "make up with a changed nginx.conf" make up
  check "it is in force" one "$(header)"
  sed -i 's/X-Test one/X-Test two/' nginx.conf
  does "make rolling with a changed nginx.conf" make rolling
  check "it is in force" two "$(header)"
  touch "$WORK/enough"; wait $load; rm "$WORK/enough"
  check "of $(wc -l <"$WORK/load") requests meanwhile, not answered" 0 "$(grep -vc '^200$' "$WORK/load" || true)"
  docker compose restart nginx >"$WORK/out" 2>&1 && wait_ready
  check "after a restart of its container" two "$(header)"
  sed -i 's/X-Test two;/X-Test two/' nginx.conf
  refuses "make up with a fault in it" "nginx.conf cannot be used" make up </dev/null
  check "what was, still is" two "$(header)"
}

# Answers by a pipe.
env_answers() { host_case host_answers; }
host_answers() {
  does "make up" make up
  does "make backup" make backup FILE="$copy/a backup.tar.gz"
  refuses "make restore, answered with no" "Nothing was changed" make restore FILE="$copy/a backup.tar.gz" <<<no
  echo yes | make restore FILE="$copy/a backup.tar.gz" >"$WORK/said" 2>&1 || true
  check "make restore, answered with yes" Restored "$(grep -o '^Restored' "$WORK/said" || tail -n 3 "$WORK/said")"
}

# What a caller may have exported.
env_exported() { host_case host_exported; }
host_exported() {
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

# Names that the caller's system exports are not settings of make: WSL has NAME, the computer's.
env_exported_names() {
  check "make test, with NAME exported" "" "$(NAME=desktop make -n test | grep -o desktop || true)"
  check "make test NAME=…" desktop "$(NAME=other make -n test NAME=desktop | grep -oE 'desktop|other' || true)"
}
