# shellcheck shell=bash disable=SC2016,SC2030,SC2031,SC2154,SC2164,SC2317 # sourced by environments
# --- The caller's shell: its language, start-up files, an input that ends ---------------------------------------------

# One service builds the image: in the containerd image store, four builds of one name fail.
env_one_image() {
  own_copy
  does "build" docker compose build
  docker image rm --force "$COMPOSE_PROJECT_NAME-web" >"$WORK/rm"
  check "services that build" 1 "$(docker compose config | grep -c '^    build:')"
  does "\`docker compose up\` without the image" docker compose up --detach --no-deps web1 web2
  does "\`docker compose up\` of a service that builds nothing" \
    docker compose up --detach --no-deps --scale web-extra=1 web-extra
  check "images that the three run" 1 \
    "$(docker compose ps -q | xargs docker inspect --format '{{.Image}}' | sort -u | grep -c .)"
}

env_no_answer() {
  own_copy
  local name
  does "PostgreSQL and Redis" docker compose up --detach --wait postgres redis
  printf '%s\n' a b | while read -r name; do make backup FILE="$WORK/$name"; done >"$WORK/said" 2>&1
  check "backups of a loop that reads two names" 2 "$(grep -c ': 0 messages' "$WORK/said")"
  check "make restore, when the input ends" "Nothing was changed." \
    "$(make restore FILE="$WORK/a" 2>&1 </dev/null | grep -o 'Nothing.*')"
  check "make clean, when the input ends" "Nothing was deleted." "$(make clean 2>&1 </dev/null | grep -o 'Nothing.*')"
}

env_languages() {
  own_copy
  local language
  mkdir "$copy/locales" "$copy/cd" "$copy/cd/scripts"
  for language in tr_TR de_DE; do # the first has an i without a dot, the second a comma in numbers
    localedef -i $language -f UTF-8 "$copy/locales/$language.UTF-8" >"$WORK/said" 2>&1 ||
      say "        skipped: there is no $language here (Debian: apt install locales)"
  done
  echo include >"$copy/.curlrc"
  echo 'set -o noclobber; ml() { :; }; export -f ml' >"$copy/bash-env"
  { export LOCPATH=$copy/locales LC_ALL=tr_TR.UTF-8; } 2>/dev/null # (this shell itself can't have it)
  export CURL_HOME=$copy BASH_ENV=$copy/bash-env CDPATH=$copy/cd GREP_OPTIONS=--color=always POSIXLY_CORRECT=1
  echo plain >"$WORK/plain"
  check "what curl prints" plain "$(bash -c ". scripts/lib.sh; curl -sS 'file://$WORK/plain'")"
  check "a header, however it is written" 1 \
    "$(bash -c ". scripts/lib.sh; say X-Instance-Id | grep -ci '^x-instance-id'" || true)"
  does "make up" make up
  does "make scale" make scale N=4
  { export LC_ALL=de_DE.UTF-8; } 2>/dev/null
  does "make test-lb" make test-lb
  does "make exercise" make exercise SECONDS_LONG=2
}
