# shellcheck shell=bash
# Three machines inside this one, to run the cluster on: each has a network and a Docker engine of its own, and a bridge
# connects them. For Linux, as root. Sourced by up, down, bench/cluster and tests/stack/cluster.
export SETTINGS=none                # no .env: cluster/.env is for real machines
. "$(dirname "${BASH_SOURCE[0]}")/../scripts/lib.sh"

MACHINES="1 2 3"
BRIDGE=threefold0
SUBNET=198.18.88                    # reserved for tests of networks (RFC 2544)
RUN_DIR=/run/threefold-cluster      # sockets, process ids, logs
DATA_DIR=/var/lib/threefold-cluster # the machines' disks
PORT=${PORT:-9999}

need_root_on_linux() {
  [ "$(uname -s)" = Linux ] && [ "$(id -u)" = 0 ] && return 0
  say "This needs network namespaces: Linux, as root. On three real machines, see docs/cluster.md." >&2
  exit 1
}

address()  { say "$SUBNET.1$1"; }
machine()  { say "threefold-$1"; }
socket()   { say "unix://$RUN_DIR/$1/docker.sock"; }
on()       { local n=$1; shift; docker --host "$(socket "$n")" "$@"; }           # docker, on machine N
inside()   { local n=$1; shift; nsenter --net="/run/netns/$(machine "$n")" "$@"; } # a program, in its network
is_on()    { [ -e "$RUN_DIR/$1/pid" ] && kill -0 "$(<"$RUN_DIR/$1/pid")" 2>/dev/null; }
responds() { timeout 5 docker --host "$(socket "$1")" version >/dev/null 2>&1; }

make_network() {
  ip link show "$BRIDGE" >/dev/null 2>&1 || ip link add "$BRIDGE" type bridge
  ip address replace "$SUBNET.1/24" dev "$BRIDGE"
  ip link set "$BRIDGE" up
  # The host's own Docker drops what crosses a bridge.
  iptables -w -C FORWARD -i "$BRIDGE" -o "$BRIDGE" -j ACCEPT 2>/dev/null ||
    iptables -w -I FORWARD -i "$BRIDGE" -o "$BRIDGE" -j ACCEPT
}

remove_network() {
  while iptables -w -D FORWARD -i "$BRIDGE" -o "$BRIDGE" -j ACCEPT 2>/dev/null; do :; done
  ip link delete "$BRIDGE" 2>/dev/null || true
}

# plug NAME LAST-BYTE: gives a network namespace an address on the bridge
plug() {
  ip link add "tf-$2" type veth peer name eth0 netns "$1"
  ip link set "tf-$2" master "$BRIDGE" up
  ip -n "$1" address add "$SUBNET.$2/24" dev eth0
  ip -n "$1" link set eth0 up
  ip -n "$1" link set lo up
}

# plug_container NAME LAST-BYTE CONTAINER: a container of the host gets an address on the bridge
plug_container() {
  unplug "$1" "$2"
  ip netns attach "$1" "$(docker inspect --format '{{.State.Pid}}' "$3")"
  plug "$1" "$2"
}

unplug() { # NAME LAST-BYTE
  ip link delete "tf-$2" 2>/dev/null || true
  ip netns delete "$1" 2>/dev/null || true
}

cut_off()   { ip link set "tf-1$1" down; }
reconnect() { ip link set "tf-1$1" up; }

# power_on N: starts a machine with its disk. It has a process namespace: when the first process ends, the kernel kills
# all others at once, as a loss of power does.
power_on() {
  local name run=$RUN_DIR/$1 data=$DATA_DIR/$1
  name=$(machine "$1")
  mkdir -p "$run" "$data"
  echo '{}' >"$run/daemon.json" # instead of the host's, whose settings would be in conflict with these options
  ip netns add "$name"
  plug "$name" "1$1"
  setsid nsenter --net="/run/netns/$name" unshare --mount --uts --pid --fork --mount-proc --kill-child=KILL sh -c "
    hostname $name
    exec dockerd --config-file $run/daemon.json --host unix://$run/docker.sock \
      --data-root $data --exec-root $run/exec --pidfile $run/docker.pid \
      --cgroup-parent /$name --exec-opt native.cgroupdriver=cgroupfs --storage-driver overlay2 --ip6tables=false \
      --log-level warn" \
    >>"$run/log" 2>&1 </dev/null 3>&- 4>&- 5>&- 6>&- & # without the caller's pipes and locks
  echo $! >"$run/pid"
}

# power_off N: kills all processes of a machine without a signal that they could handle
power_off() {
  local name pid
  name=$(machine "$1")
  cut_off "$1" 2>/dev/null || true # first, so that the kernel closes no connection
  if pid=$(cat "$RUN_DIR/$1/pid" 2>/dev/null); then
    # The child is the first process of the machine.
    pkill -KILL --parent "$pid" 2>/dev/null || true
    wait_for 10 gone "$pid" || say "$name: process $pid does not end" >&2
  fi
  rm -rf "${RUN_DIR:?}/$1"
  unplug "$name" "1$1"
  find /sys/fs/cgroup -depth -type d -path "*/$name*" -exec rmdir {} + 2>/dev/null || true
}
gone() { ! kill -0 "$1" 2>/dev/null; }

# manager: the first machine that is up and knows a leader of the Swarm
manager() {
  local n
  for n in $MACHINES; do
    if timeout 5 docker --host "$(socket "$n")" node ls >/dev/null 2>&1; then say "$n"; return 0; fi
  done
  return 1
}

# serves N: an instance of that machine is ready and reaches both stores
serves() { curl -fsS -m 3 "http://$(address "$1"):$PORT/readyz" 2>/dev/null |
  grep '"status":"ready"' >/dev/null; }
all_serve() { local n; for n in $MACHINES; do serves "$n" || return 1; done; }

# join_swarm N MANAGER: machine N becomes a manager of that machine's Swarm, and a machine of the stores
join_swarm() {
  on "$1" swarm join --advertise-addr "$(address "$1")" --token "$(on "$2" swarm join-token --quiet manager)" \
    "$(address "$2"):2377" >/dev/null && holds_data "$1" "$2"
}
holds_data() { on "$2" node update --label-add threefold=store "$(machine "$1")" >/dev/null; }

# tasks: a line for each: name, machine, state, error
tasks() {
  on "$(manager)" stack ps threefold --filter desired-state=running \
    --format '{{.Name}} {{.Node}} {{.CurrentState}} {{.Error}}'
}

# --- Containers and stores -------------------------------------------------------------------------------------------

container() { on "$1" ps --quiet --filter "name=threefold_$2" | sed -n 1p; }
within()    { local n=$1 service=$2; shift 2; on "$n" exec "$(container "$n" "$service")" "$@"; }
patroni()   { curl -fsS -m 2 -o /dev/null "http://$(address "$1"):8008/$2" 2>/dev/null; }
# shellcheck disable=SC2016 # expanded in the container
redis() {
  local n=$1; shift
  within "$n" redis sh -c 'REDISCLI_AUTH=$(cat /run/secrets/redis_pass) redis-cli --raw "$@"' -- "$@"
}

postgres_primary() {
  local n
  for n in $MACHINES; do if patroni "$n" primary; then say "$n"; return; fi; done
  return 1
}
redis_primary() {
  local n
  for n in $MACHINES; do if redis "$n" role 2>/dev/null | grep -x master >/dev/null; then say "$n"; return; fi; done
  return 1
}
