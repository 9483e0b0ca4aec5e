# shellcheck shell=bash
# What the test scripts share. They need bash, curl and Docker, and work on a stack that has been used before.
# Source it from the top-level folder's scripts; it goes there, stops on errors, and cleans up.
set -euo pipefail
unset CDPATH # with it, cd may go elsewhere, and says where
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/env.sh
exec </dev/null # `docker compose exec` and `docker compose run` read all that a caller's loop or pipe has

URL=${PORT:-9999} URL=http://localhost:${URL##*:} # (PORT=127.0.0.1:9999 is for this machine alone)
MONITOR=http://localhost:${MONITOR_PORT:-9090}
WORK=$(mktemp -d)
# shellcheck disable=SC2034  # the scripts use it
RUN="$(basename "$0")-$$-$RANDOM"          # names this run's requests in every log
failures=0

# What is typed first runs on the bash 3.2 of macOS too; a script that can't says so by this.
need_bash_4() {
  [ "${BASH_VERSINFO[0]}" -lt 4 ] || return 0
  say "This needs bash 4 or newer (here: $BASH_VERSION): brew install bash"
  exit 1
}

say()  { printf '%s\n' "$*"; }
pass() { printf '  ok    %s\n' "$*"; }
fail() { printf '  FAIL  %s\n' "$*"; failures=$((failures + 1)); }

# What is asked is on this machine or in its containers: no proxy knows it.
curl() { command curl -q --noproxy '*' "$@"; } # (-q: without ~/.curlrc, which may change what is printed)

# check WHAT EXPECTED SEEN: one line, with both sides when they differ
check() { if [ "$2" = "$3" ]; then pass "$1: $3"; else fail "$1: expected $2, saw $3"; fi; }

# finish: the verdict; on failure with what the containers had to say last
finish() {
  if [ "$failures" -gt 0 ]; then
    say "--- the last of the logs ($failures checks failed) ---"
    docker compose logs --tail 15 2>&1 | cut -c1-300
    say "FAILED: $failures checks"
    exit 1
  fi
  say "PASSED"
}

trap 'rm -rf "$WORK"' EXIT

# instances: the containers that answer requests, as "service address" lines
instances() {
  local service='{{index .Config.Labels "com.docker.compose.service"}}'
  local address='{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}'
  local ids
  ids=$(docker compose ps -q web1 web2 web3 web-extra)
  [ -z "$ids" ] || xargs docker inspect --format "$service $address" <<<"$ids" # (macOS' xargs may have no -r)
}

# wait_ready [SECONDS]: until every container of the stack that is there is healthy, asked four times a second
wait_ready() {
  local state deadline=$((SECONDS + ${1:-60}))
  while :; do
    # (What has no health check is well when it runs.)
    state=$(docker compose ps -aq | xargs docker inspect --format '{{.Name}} {{with .State.Health}}{{.Status}}{{else}}{{
      if .State.Running}}healthy{{else}}stopped{{end}}{{end}}' 2>/dev/null) || state="starting"
    [ -n "$state" ] && ! grep -qv ' healthy$' <<<"$state" && return 0
    if [ $SECONDS -ge $deadline ]; then
      say "not healthy after ${1:-60} s:"; grep -v ' healthy$' <<<"$state"; return 1
    fi
    sleep 0.25
  done
}

# The label by which Compose notes the folder of each container. A volume has it from `make up`.
FOLDER=com.docker.compose.project.working_dir

# data_volume: the name of the volume that holds the messages, and after it whatever else an override file sets for it
data_volume() {
  docker compose config | awk '/^[^ ]/ { volumes = $1 == "volumes:" } /^  [^ ]/ { mine = $1 == "postgres-data:"; next }
    volumes && mine { sub(/^ *name: /, ""); print }'
}

# own_stack: stops when the stack of this name belongs to another folder, who would lose its containers or its data
own_stack() {
  local services ids folder known
  services=$(docker compose config --services) || return 1
  grep -qx web1 <<<"$services" ||
    { say "Compose reads other files than ours (COMPOSE_FILE=\"${COMPOSE_FILE:-}\"): unset COMPOSE_FILE" >&2; exit 1; }
  ids=$(docker compose --profile monitor --profile grafana ps -aq) || return 0
  while IFS= read -r folder; do
    # A folder that was moved or removed has no claim; but one that we may not look into is not gone.
    known=$folder
    while [ ! -e "$known" ] && [ "$known" != . ]; do known=$(dirname "$known"); done
    [ ! . -ef "$folder" ] || continue
    [ -n "$(find "$folder" -maxdepth 1 -name '*compose*.y*ml' 2>/dev/null)" ] || [ ! -x "$known" ] || continue
    say "The stack of this name belongs to $folder. For one of this folder's own, set COMPOSE_PROJECT_NAME and PORT" \
      "(and MONITOR_PORT), in the environment or in .env: make up COMPOSE_PROJECT_NAME=threefold-2 PORT=9998" >&2
    exit 1
  done < <({
    if [ -n "$ids" ]; then xargs docker inspect --format "{{index .Config.Labels \"$FOLDER\"}}" <<<"$ids"
    else docker volume inspect --format "{{index .Labels \"$FOLDER\"}}" "$(data_volume | sed -n 1p)" 2>/dev/null; fi
  } | grep . | sort -u)
}

# claim_data: new data know their folder too, for when there are no containers. (Compose takes a volume that has these
# labels. It would have to delete one to label it later; and one with settings of an override file is for it to make.)
claim_data() {
  local volume
  volume=$(data_volume) && [ -n "$volume" ] || return 1
  [[ "$volume" != *$'\n'* ]] && ! docker volume inspect "$volume" >/dev/null 2>&1 || return 0
  docker volume create --label "$FOLDER=$(pwd -P)" --label com.docker.compose.volume=postgres-data \
    --label "com.docker.compose.project=$(docker compose config | sed -n 's/^name: //p')" "$volume" >/dev/null
}

# check_nginx: stops when nginx runs by another nginx.conf than ours, and could not run by ours
check_nginx() {
  [ -n "$(docker compose ps -q --status running nginx)" ] || return 0
  ! docker compose exec -T nginx cmp -s - /tmp/nginx.conf <nginx.conf || return 0
  # In a container of its own, since a new nginx.conf may need what Compose will give to the next one.
  docker compose run --rm --no-deps -T nginx nginx -t -q </dev/null >"$WORK/nginx" 2>&1 ||
    { say "nginx.conf cannot be used, nothing was changed: $(sed -nE 's|/etc/nginx/nginx.conf|nginx.conf|
        s/.*\[emerg\] ([0-9]+#[0-9]+: )?//p' "$WORK/nginx" | grep . || tail -n 1 "$WORK/nginx")" >&2; exit 1; }
}

# reload_nginx: from now on nginx.conf holds as it is, without a lost request (see check_nginx)
reload_nginx() {
  [ -n "$(docker compose ps -q --status running nginx)" ] || return 0
  # (The mounted file stays the old one when an editor writes it anew, until the container is started again.)
  # shellcheck disable=SC2016 # for the shell there
  docker compose exec -T nginx sh -ec '
    cat >/tmp/new.conf
    ! cmp -s /tmp/new.conf /tmp/nginx.conf || exit 0
    nginx -t -q -c /tmp/new.conf
    workers=$(grep -l "^nginx: worker" /proc/[0-9]*/cmdline)
    mv /tmp/new.conf /tmp/nginx.conf
    nginx -c /tmp/nginx.conf -s reload
    # Until nobody takes requests by the old one.
    for _ in $(seq 50); do
      grep -L "shutting down" $workers 2>/dev/null | grep . >/dev/null || break
      sleep 0.1
    done
    echo reloaded' <nginx.conf >"$WORK/nginx" 2>&1 ||
    { say "nginx.conf could not be put in force: $(tail -n 1 "$WORK/nginx")" >&2; exit 1; }
  [ ! -s "$WORK/nginx" ] || say "nginx.conf has changed, and is in force now"
}

# need_stack: says what to do when nothing is running
need_stack() {
  own_stack
  curl -fsS -m 5 -o "$WORK/ready" "$URL/readyz" 2>"$WORK/error" && return 0
  say "The stack does not answer at $URL/readyz ($(cat "$WORK/error"))."
  say "Start it with \`make up\`; \`make doctor\` says what may be missing."
  exit 1
}

# compose_up ARGUMENTS...: until what it starts is healthy; what Compose says is shown if it fails
compose_up() { docker compose up --detach --no-deps --wait "$@" >"$WORK/out" 2>&1 || { cat "$WORK/out"; exit 1; }; }

# prometheus QUERY: what it answers, a line each: the value, and of what
prometheus() {
  curl -fsS -m 10 "$MONITOR/api/v1/query" --data-urlencode "query=$1" |
    { grep -oE '"metric":\{[^}]*\},"value":\[[0-9.]+,"[^"]*"' || true; } |
    sed -E 's/^"metric":(\{[^}]*\}),"value":\[[0-9.]+,"([^"]*)"/\2 \1/'
}
