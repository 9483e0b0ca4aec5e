# shellcheck shell=bash disable=SC2034
# What the scripts share. It goes to the top-level folder, stops on errors and cleans up. Needs bash, curl and Docker.
set -euo pipefail
unset CDPATH # with it, cd can go elsewhere and prints where
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/env.sh
. scripts/nginx.sh
. scripts/report.sh
exec 8>&1      # where the verdict goes, whatever output is redirected meanwhile
exec </dev/null # `docker compose exec` and `docker compose run` would read the caller's input

URL=${PORT:-9999} URL=http://localhost:${URL##*:} # PORT can hold an address: 127.0.0.1:9999
case ${TLS_CERT:+cert}${TLS_KEY:+key} in
  certkey) HTTPS=${HTTPS_PORT:-9443} HTTPS=https://localhost:${HTTPS##*:} ;;
  cert | key) echo "HTTPS needs both TLS_CERT and TLS_KEY" >&2; exit 1 ;;
esac
MONITOR=http://localhost:${MONITOR_PORT:-9090}
WORK=$(mktemp -d)
RUN="$(basename "$0")-$$-$RANDOM" # marks this run's requests in all logs

# Before its end, however it ends, a script runs its function `leave`, if it has one.
at_exit() {
  local code=$?
  trap '' INT TERM
  ! declare -F leave >/dev/null || leave || true
  rm -rf "$WORK"
  [ "${JSON:-}" != 1 ] || [ -z "${claim:-}" ] || verdict $code >&8
  exit $code
}
trap at_exit EXIT
trap 'exit 130' INT TERM

need_bash_4() { # what people type first runs on the bash 3.2 of macOS too
  [ "${BASH_VERSINFO[0]}" -lt 4 ] || return 0
  say "This needs bash 4 or newer (here: $BASH_VERSION): brew install bash"
  exit 1
}

# wait_for SECONDS COMMAND...: repeats it until it succeeds
wait_for() {
  local deadline=$((SECONDS + $1)); shift
  until "$@"; do [ $SECONDS -lt $deadline ] || return 1; sleep 0.25; done
}

# quietly COMMAND...: prints its output only if it fails
quietly() { "$@" >"$WORK/out" 2>&1 || { tail -n 20 "$WORK/out" >&2; return 1; }; }

curl() { command curl -q --noproxy '*' "$@"; } # all addresses are local; -q ignores ~/.curlrc

# post AUTHOR BODY [CURL-ARGUMENT...]: stores a message; prints the response, and the status on the next line
post() {
  curl -sS -m 10 "$URL/api/messages" -H 'Content-Type: application/json' -w '\n%{http_code}\n' \
    -d "{\"author\":\"$1\",\"body\":\"$2\"}" "${@:3}"
}

# field NAME: its value in the JSON on standard input
field() { sed -nE "s/.*\"$1\": ?\"?([^\",}]*).*/\1/p"; }

# run_instance PORT COMMAND...: starts an instance without Docker and waits until it is ready; $instance is its process
run_instance() {
  PORT=$1 "${@:2}" >"$WORK/instance" 2>&1 & instance=$!
  wait_for 60 instance_ready "$1" && kill -0 "$instance" 2>/dev/null ||
    { say "the instance is not ready:"; tail -n 20 "$WORK/instance"; return 1; }
}
instance_ready() { curl -fs -m 2 -o "$WORK/ready" "http://127.0.0.1:$1/readyz" || ! kill -0 "$instance" 2>/dev/null; }
stop_instance()  { kill "$instance"; wait "$instance" || true; }

project() { docker compose config | sed -n 's/^name: //p'; }

# instances: a line "service address" for each web container
instances() {
  local ids
  ids=$(docker compose ps --format '{{.ID}} {{.Service}}' | sed -n 's/ web.*//p')
  [ -z "$ids" ] || xargs docker inspect --format '{{index .Config.Labels "com.docker.compose.service"}} {{
    range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}' <<<"$ids" # macOS' xargs has no -r
}

# wait_ready [SECONDS]: until all containers are healthy
wait_ready() {
  wait_for "${1:-60}" all_healthy && return
  say "not healthy after ${1:-60} s:"; grep -v ' healthy$' <<<"$states"
  return 1
}
all_healthy() { # a container without a health check is healthy if it runs
  states=$(docker compose ps -aq | xargs docker inspect --format '{{.Name}} {{with .State.Health}}{{.Status}}{{else}}{{
    if .State.Running}}healthy{{else}}stopped{{end}}{{end}}' 2>/dev/null) || states="starting"
  [ -n "$states" ] && ! grep -qv ' healthy$' <<<"$states"
}

FOLDER=com.docker.compose.project.working_dir # Compose's label of a container, and claim_data's of a volume

# data_volume: the name of the volume of messages; more lines if an override file has settings for it
data_volume() {
  docker compose config | awk '/^[^ ]/ { volumes = $1 == "volumes:" } /^  [^ ]/ { mine = $1 == "postgres-data:"; next }
    volumes && mine { sub(/^ *name: /, ""); print }'
}

# own_stack: stops if another folder has a stack of this name, since it would lose its containers or its data
own_stack() {
  local ids folder known
  ids=$(docker compose config --services) || return 1
  grep -qx web1 <<<"$ids" ||
    { say "Compose reads other files than ours (COMPOSE_FILE=\"${COMPOSE_FILE:-}\"): unset COMPOSE_FILE" >&2; exit 1; }
  ids=$(docker compose --profile monitor --profile grafana ps -aq) || return 0
  while IFS= read -r folder; do
    # A folder that does not exist any more has no claim; one that this user may not read has.
    known=$folder
    while [ ! -e "$known" ] && [ "$known" != . ]; do known=$(dirname "$known"); done
    [ ! . -ef "$folder" ] || continue
    [ -n "$(find "$folder" -maxdepth 1 -name '*compose*.y*ml' 2>/dev/null)" ] || [ ! -x "$known" ] || continue
    say "The stack of this name belongs to $folder. For a stack of this folder, set COMPOSE_PROJECT_NAME and PORT" \
      "(and MONITOR_PORT) in the environment or in .env: make up COMPOSE_PROJECT_NAME=threefold-2 PORT=9998" >&2
    exit 1
  done < <({
    if [ -n "$ids" ]; then xargs docker inspect --format "{{index .Config.Labels \"$FOLDER\"}}" <<<"$ids"
    else docker volume inspect --format "{{index .Labels \"$FOLDER\"}}" "$(data_volume | sed -n 1p)" 2>/dev/null; fi
  } | grep . | sort -u)
}

# claim_data: a new volume gets the label with this folder. Compose creates a volume with other settings itself.
claim_data() {
  local volume
  volume=$(data_volume) || return 1
  [ -n "$volume" ] && [[ "$volume" != *$'\n'* ]] && ! docker volume inspect "$volume" >/dev/null 2>&1 || return 0
  docker volume create --label "$FOLDER=$(pwd -P)" --label com.docker.compose.volume=postgres-data \
    --label "com.docker.compose.project=$(project)" "$volume" >/dev/null
}

stack_responds() { curl -fsS -m 5 -o "$WORK/ready" "$URL/readyz" 2>"$WORK/error"; }

# need_stack: stops if no stack runs
need_stack() {
  own_stack
  stack_responds && return 0
  failed="; the stack does not respond"
  say "The stack does not respond at $URL/readyz ($(cat "$WORK/error")). Start it with \`make up\`;" \
    "\`make doctor\` lists what may be missing."
  exit 1
}

# compose_up ARGUMENT...: starts containers and waits until they are healthy
compose_up() { quietly docker compose up --detach --no-deps --wait "$@"; }

# new_stack: an empty stack of this checkout (an image of this name may be an older one), removed at the script's end
new_stack() {
  leave() { docker compose down --volumes --remove-orphans --timeout 1 >/dev/null 2>&1; }
  leave || true
  quietly docker compose up --build --detach --wait
}

# prometheus QUERY: a line "value labels" for each result
prometheus() {
  curl -fsS -m 10 "$MONITOR/api/v1/query" --data-urlencode "query=$1" |
    { grep -oE '"metric":\{[^}]*\},"value":\[[0-9.]+,"[^"]*"' || true; } |
    sed -E 's/^"metric":(\{[^}]*\}),"value":\[[0-9.]+,"([^"]*)"/\2 \1/'
}
