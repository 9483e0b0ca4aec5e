# shellcheck shell=bash disable=SC2030,SC2031,SC2034,SC2154 # sourced by failover, cluster, upgrade, environments
# The clients of tests/clients in containers, and how the cases of a table are run.

# A name that is gone is not looked up for long.
DNS="--dns-opt timeout:1 --dns-opt attempts:1"

# client NAME DOCKER-OPTIONS JAVA-ARGUMENT...
client() {
  # shellcheck disable=SC2086 # several options
  docker run --rm --interactive --name "$RUN-$1" $2 --volume "$PWD/tests/clients:/clients:ro" --entrypoint java \
    "${JBANG_IMAGE:-jbangdev/jbang:0.132.1-java-21}" "${@:3}"
}

# start_clients DOCKER-OPTIONS JAVA-ARGUMENT...: a dozen clients that read commands from one pipe and reply by another
start_clients() {
  mkfifo "$WORK/commands" "$WORK/replies"
  client load "$1" -Xmx256m "${@:2}" <"$WORK/commands" >"$WORK/replies" 2>"$WORK/clients" &
  exec 3>"$WORK/commands" 4<"$WORK/replies" 5>&1
  send hello
}

# send COMMAND: the clients' reply is in $WORK/reply
send() {
  local line
  printf '%s\n' "$*" >&3
  : >"$WORK/reply"
  while read -r -t 150 -u 4 line; do
    [ "$line" != . ] || return 0
    printf '%s\n' "$line" >>"$WORK/reply"
  done
  say "the clients have ended: $(tail -n 3 "$WORK/clients")" >&5
  exit 1
}

# value NAME [FILE]: of `name=value` in the clients' reply
value()   { grep -oE "(^| )$1=[^ ]*" "${2:-$WORK/reply}" | sed -n 1p | cut -d= -f2; }
seconds() { awk -v ms="${1:-0}" 'BEGIN { printf "%.1f", ms / 1000 }'; }

# all_zero NAME...: these values of the reply
all_zero() { local name; for name in "$@"; do check "$name" 0 "$(value "$name")"; done; }

# holds COMMAND...: its checks pass; a failure is not counted
holds() ( failures=0; "$@" >"$WORK/holds" 2>&1; [ $failures = 0 ] )

check_everything() {
  send everything
  summary="$(value messages) messages acknowledged, $(value unknown) unknown;"
  summary+=" lost $(value lost), doubled $(value doubled)"
  all_zero lost doubled unexpected ids
}

# start_subscribers DOCKER-OPTIONS HOSTS PORT RATE COUNT: they stay, while others write, until stop_subscribers
start_subscribers() {
  docker rm --force "$RUN-subscribers" >/dev/null 2>&1 || true # of a case that could not begin
  rm -f "$WORK/stop"
  mkfifo "$WORK/stop"
  client subscribers "$1 --cpu-shares 128 --ulimit nofile=16384" -Xmx512m /clients/SseClients.java "${@:2}" \
    <"$WORK/stop" >"$WORK/subscribers" 2>&1 & subscribers=$!
  exec 6>"$WORK/stop"
  wait_for 30 grep -q ^joined "$WORK/subscribers" || fail "not all subscribers have joined"
}

# stop_subscribers: each has to have every acknowledged message, once, in order
stop_subscribers() {
  say enough >&6 # a line ends them, also if another process has the pipe open
  exec 6>&-
  wait "$subscribers" || fail "the subscribers' exit code"
  check "wrong for the subscribers" 0 "$(subscribed wrong)"
  [ "$(subscribed wrong)" = 0 ] || cat "$WORK/subscribers"
}
subscribed() { value "$1" "$WORK/subscribers"; }

# raw: sends standard input to nginx unchanged and prints the response
raw() {
  local address=${URL#http://} line response=''
  exec 7<>"/dev/tcp/${address%%:*}/${address##*:}"
  cat >&7
  while IFS= read -r -t 5 -u 7 line || [ -n "$line" ]; do response+=$line$'\n'; done # macOS has no `timeout`
  say "$response"
  exec 7>&-
}

# choose_cases NAME...: sets $chosen to these cases of the table that `cases` prints, or to all
choose_cases() {
  local name
  case "${1:-}" in -h | --help) usage; exit 0 ;; esac
  chosen=${*:-$(cases | awk '{ print $1 }')}
  for name in $chosen; do
    cases | grep "^$name " >/dev/null || { say "There is no case \"$name\"; \`$0 --help\` lists all."; exit 2; }
  done
}

# run_cases: `run_case NAME MODE LIMIT` of the script runs a case; a failed check is a failed case
run_cases() {
  local name mode limit before began earlier
  for name in $chosen; do
    read -r name mode limit _ < <(cases | grep "^$name ")
    before=$failures earlier=$failed began=$SECONDS summary='' more=''
    run_case "$name" "$mode" "$limit" >"$WORK/case" 2>&1 || failures=$((failures + 1))
    if [ "$failures" = "$before" ]; then
      passes=$((passes + 1)); printf '  ok    %-20s %s\n' "$name" "$summary"; continue
    fi
    failures=$((before + 1)) failed="$earlier; $name: ${failed#"$earlier; "}"
    printf '  FAIL  %-20s %s\n' "$name" "$summary"
    sed 's/^/        /' "$WORK/case" | cut -c1-400
    after_failure "$began"
  done
  [ "$failures" = 0 ] || { say "FAILED: $failures cases, after $SECONDS s"; exit 1; }
  say "PASSED, after $SECONDS s"
}
