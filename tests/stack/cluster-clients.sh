# shellcheck shell=bash disable=SC2034,SC2154 # sourced by tests/stack/cluster, whose variables these are
# --- The clients (tests/clients/LoadClients.java), outside of all machines, in a network of their own ---------------

RUN="test-cluster-$$-$RANDOM"
LOAD=$RUN

start_clients() {
  mkfifo "$WORK/commands" "$WORK/answers"
  docker run --rm --interactive --name "$LOAD" --network none --volume "$PWD/tests/clients:/clients:ro" \
    --entrypoint java "${JBANG_IMAGE:-jbangdev/jbang:0.132.1-java-21}" \
    -Xmx256m -Dpatience=120 /clients/LoadClients.java - "$PORT" "$RUN" \
    <"$WORK/commands" >"$WORK/answers" 2>"$WORK/clients" &
  exec 3>"$WORK/commands" 4<"$WORK/answers" 5>&1
  ask hello
  unplug threefold-clients 100
  ip netns attach threefold-clients "$(docker inspect --format '{{.State.Pid}}' "$LOAD")"
  plug threefold-clients 100
}

# ask COMMAND: what the clients answer, in $answer
ask() {
  local line
  answer=
  printf '%s\n' "$*" >&3
  while read -r -t 150 -u 4 line; do
    [ "$line" = . ] && return 0
    answer="$answer$line"$'\n'
  done
  say "the clients ended: $(tail -n 3 "$WORK/clients")" >&5
  exit 1
}
value() { grep -oE "(^| )$1=[^ ]*" <<<"$answer" | sed -n 1p | cut -d= -f2; }
via() { local n list=(); for n in "$@"; do list+=("$(address "$n")"); done; (IFS=,; say "${list[*]}"); }

# A way from the clients to that machine that does not lead over the network of the machines.
SUBNET_BESIDE=198.18.89
side_door() {
  inside_clients ip link delete beside 2>/dev/null || true
  ip link add beside netns threefold-clients type veth peer name beside netns "$(machine "$1")"
  ip -n threefold-clients address add "$SUBNET_BESIDE.100/24" dev beside && ip -n threefold-clients link set beside up
  ip -n "$(machine "$1")" address add "$SUBNET_BESIDE.$1/24" dev beside && ip -n "$(machine "$1")" link set beside up
}
inside_clients() { nsenter --net=/run/netns/threefold-clients "$@"; }

# --- The viewers (tests/clients/SseClients.java), in the same network --------------------------------------------

# viewers_come HOSTS: six, and their writers; back when all have joined
viewers_come() {
  docker rm --force "$LOAD-viewers" >/dev/null 2>&1 || true # of a case that could not begin
  rm -f "$WORK/stop-viewers"
  mkfifo "$WORK/stop-viewers"
  docker run --rm --interactive --name "$LOAD-viewers" --network "container:$LOAD" --cpu-shares 128 \
    --volume "$PWD/tests/clients:/clients:ro" --entrypoint java "${JBANG_IMAGE:-jbangdev/jbang:0.132.1-java-21}" \
    -Xmx256m /clients/SseClients.java "$1" "$PORT" 50 6 <"$WORK/stop-viewers" >"$WORK/viewers" 2>&1 &
  viewing=$!
  exec 6>"$WORK/stop-viewers"
  wait_for 30 grep -q ^joined "$WORK/viewers"
}

# viewers_go CASE: what they had to have, they have. (Who never had to come back has shown less than the case says.)
viewers_go() {
  say enough >&6 # a line ends them, also where something else keeps the pipe open
  exec 6>&-
  wait "$viewing" && [ "$(viewers wrong)" = 0 ] && [ "$(viewers acknowledged)" -ge 100 ] || return 1
  case $1 in update-web | update-nginx | *die* | two-gone | power-loss) [ "$(viewers returns)" -ge 1 ] ;;
    no-postgres) [ "$(viewers returns)" = 0 ] ;; # no stream has ended
  esac
}

# viewers NAME: of `name=value` in what they said; `viewers have`: all of it in words
viewers() {
  if [ "$1" != have ]; then grep -oE "(^| )$1=[0-9]+" "$WORK/viewers" | cut -d= -f2; return; fi
  say "$(viewers acknowledged) messages, came back $(viewers returns) times, wrong $(viewers wrong)"
}
