# shellcheck shell=bash
# Three machines inside this one, to try the cluster on: each has a network and a Docker engine of its own, and hears of
# the others through a bridge alone. For Linux, as root. Sourced by up, down and tests/stack/cluster.
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."

MACHINES="1 2 3"
BRIDGE=threefold0
SUBNET=198.18.88                    # of the range for tests of networks, so that nobody has it: RFC 2544
RUN_DIR=/run/threefold-cluster      # sockets, process ids, logs
DATA_DIR=/var/lib/threefold-cluster # what a machine has on its disk
PORT=${PORT:-9999}
export SETTINGS=none                # cluster/.env is for real machines

say() { printf '%s\n' "$*"; }

need_root_on_linux() {
  [ "$(uname -s)" = Linux ] && [ "$(id -u)" = 0 ] && return 0
  say "This makes network namespaces: it needs Linux, as root. On three real machines it does not: docs/cluster.md." >&2
  exit 1
}

address()  { say "$SUBNET.1$1"; }
machine()  { say "threefold-$1"; }
socket()   { say "unix://$RUN_DIR/$1/docker.sock"; }
on()       { local n=$1; shift; docker --host "$(socket "$n")" "$@"; }           # docker, on machine N
inside()   { local n=$1; shift; nsenter --net="/run/netns/$(machine "$n")" "$@"; } # a program, in its network
is_on()    { [ -e "$RUN_DIR/$1/pid" ] && kill -0 "$(<"$RUN_DIR/$1/pid")" 2>/dev/null; }
answers()  { timeout 5 docker --host "$(socket "$1")" version >/dev/null 2>&1; }

# wait_for SECONDS COMMAND…: until it succeeds
wait_for() {
  local deadline=$((SECONDS + $1)); shift
  until "$@"; do [ $SECONDS -lt $deadline ] || return 1; sleep 0.3; done
}

make_network() {
  ip link show "$BRIDGE" >/dev/null 2>&1 || ip link add "$BRIDGE" type bridge
  ip address replace "$SUBNET.1/24" dev "$BRIDGE"
  ip link set "$BRIDGE" up
  # Where another Docker runs, what crosses a bridge is dropped.
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

unplug() { # NAME LAST-BYTE
  ip link delete "tf-$2" 2>/dev/null || true
  ip netns delete "$1" 2>/dev/null || true
}

cut_off() { ip link set "tf-1$1" down; }  # off the network, and alive
mend()    { ip link set "tf-1$1" up; }

# power_on N: a machine that starts, with what is on its disk. All its processes are in a process namespace of its own:
# when the first one ends, the kernel kills all others in the same moment, as a loss of power does.
power_on() {
  local name run=$RUN_DIR/$1 data=$DATA_DIR/$1
  name=$(machine "$1")
  mkdir -p "$run" "$data"
  echo '{}' >"$run/daemon.json"       # (not this machine's own: what stands in both is an error)
  ip netns add "$name"
  plug "$name" "1$1"
  setsid nsenter --net="/run/netns/$name" unshare --mount --uts --pid --fork --mount-proc --kill-child=KILL sh -c "
    hostname $name
    exec dockerd --config-file $run/daemon.json --host unix://$run/docker.sock \
      --data-root $data --exec-root $run/exec --pidfile $run/docker.pid \
      --cgroup-parent /$name --exec-opt native.cgroupdriver=cgroupfs --storage-driver overlay2 --ip6tables=false \
      --log-level warn" \
    >>"$run/log" 2>&1 </dev/null 3>&- 4>&- 5>&- 6>&- & # (or it would keep the caller's pipes and locks)
  echo $! >"$run/pid"
}

# power_off N: no process of it is left, and none was told
power_off() {
  local name pid
  name=$(machine "$1")
  cut_off "$1" 2>/dev/null || true # first, so that the kernel says good-bye to nobody
  if pid=$(cat "$RUN_DIR/$1/pid" 2>/dev/null); then
    # (its child is the first process of the machine)
    pkill -KILL --parent "$pid" 2>/dev/null || true
    wait_for 10 gone "$pid" || say "$name: process $pid does not end" >&2
  fi
  rm -rf "${RUN_DIR:?}/$1"
  unplug "$name" "1$1"
  find /sys/fs/cgroup -depth -type d -path "*/$name*" -exec rmdir {} + 2>/dev/null || true
}
gone() { ! kill -0 "$1" 2>/dev/null; }

# The machine that answers for the Swarm: the first one that is up and knows a leader.
manager() {
  local n
  for n in $MACHINES; do
    if timeout 5 docker --host "$(socket "$n")" node ls >/dev/null 2>&1; then say "$n"; return 0; fi
  done
  return 1
}

# serves N: an instance is ready there and reaches both stores
serves() { curl --noproxy '*' -fsS -m 3 "http://$(address "$1"):$PORT/readyz" 2>/dev/null |
  grep '"status":"ready"' >/dev/null; }
all_serve() { local n; for n in $MACHINES; do serves "$n" || return 1; done; }

# join_swarm N MANAGER: machine N becomes a manager of that one's Swarm, and one of those that hold the data
join_swarm() {
  on "$1" swarm join --advertise-addr "$(address "$1")" --token "$(on "$2" swarm join-token --quiet manager)" \
    "$(address "$2"):2377" >/dev/null && holds_data "$1" "$2"
}
holds_data() { on "$2" node update --label-add threefold=store "$(machine "$1")" >/dev/null; }

# tasks: what the Swarm has of it, a line each: service, machine, state
tasks() {
  on "$(manager)" stack ps threefold --filter desired-state=running \
    --format '{{.Name}} {{.Node}} {{.CurrentState}} {{.Error}}'
}

# --- What is asked of the machines -----------------------------------------------------------------------------------

container() { on "$1" ps --quiet --filter "name=threefold_$2" | sed -n 1p; }
within()    { local n=$1 service=$2; shift 2; on "$n" exec "$(container "$n" "$service")" "$@"; }
patroni()   { curl --noproxy '*' -fsS -m 2 -o /dev/null "http://$(address "$1"):8008/$2" 2>/dev/null; }
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
swarm_leader() {
  on "$(manager)" node ls --format '{{.ManagerStatus}} {{.Hostname}}' |
    awk '$1 == "Leader" { sub(/.*-/, "", $2); print $2 }'
}
others()           { local n; for n in $MACHINES; do [ "$n" = "$1" ] || printf '%s ' "$n"; done; }

# whole: three machines that serve, two copies of everything. If not, $missing is what was asked last.
# shellcheck disable=SC2034 # (tests/stack/cluster says it)
whole() {
  local n p
  for n in $MACHINES; do
    missing="machine $n serves" && serves "$n" || return 1
    missing="PostgreSQL on machine $n is ready" && patroni "$n" readiness || return 1
  done
  missing="Redis has a primary" && p=$(redis_primary) || return 1
  missing="Redis on machine $p has two replicas" &&
    redis "$p" info replication | tr -d '\r' | grep -x connected_slaves:2 >/dev/null || return 1
  missing="machine $p knows three Sentinels" &&
    within "$p" sentinel redis-cli -p 26379 sentinel ckquorum threefold | grep '^OK 3' >/dev/null || return 1
  missing="PostgreSQL has a primary" && p=$(postgres_primary) || return 1
  missing="PostgreSQL on machine $p has two standbys" && within "$p" postgres psql -qAtX \
    -c "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'quorum'" | grep -x 2 >/dev/null || return 1
  missing="the Swarm has a leader" && p=$(manager) || return 1
  missing="three managers are ready" && on "$p" node ls --format '{{.Status}} {{.Availability}} {{.ManagerStatus}}' |
    grep -c '^Ready Active \(Leader\|Reachable\)$' | grep -x 3 >/dev/null || return 1
  missing="six services have three tasks each" &&
    on "$p" service ls --format '{{.Replicas}}' | grep -c '^3/3' | grep -x 6 >/dev/null
} 2>/dev/null

# state: of all that is asked for, as it is; what does not answer is left out
state() (
  set +e
  p=$(manager) && on "$p" node ls && on "$p" service ls && tasks
  for n in $MACHINES; do
    curl --noproxy '*' -sS -m 2 "http://$(address "$n"):8008/patroni"
    redis "$n" info replication
    within "$n" sentinel redis-cli -p 26379 sentinel ckquorum threefold
    on "$n" ps --all --format '{{.Names}} {{.Status}}'
    for p in redis sentinel postgres; do on "$n" logs --tail 8 "$(container "$n" "$p")"; done
  done
  true
) 2>&1

# gather N: both primaries on this machine
gather() {
  local from
  from=$(postgres_primary)
  [ "$from" = "$1" ] || within "$from" postgres start switchover "$(address "$1")" || return 1
  wait_for 30 patroni "$1" primary || return 1
  redis_primary_to "$1"
}
redis_leads() { [ "$(redis_primary)" = "$1" ]; }
redis_primary_to() {
  local n
  [ "$(redis_primary)" != "$1" ] || return 0
  for n in $MACHINES; do redis "$n" config set replica-priority 100 >/dev/null; done
  redis "$1" config set replica-priority 1 >/dev/null
  sleep 2
  within "$1" sentinel redis-cli -p 26379 sentinel failover threefold >/dev/null
  wait_for 30 redis_leads "$1" || return 1
  redis "$1" config set replica-priority 100 >/dev/null
}

# spread: an instance on each machine again. The Swarm moves none back by itself to a machine that has returned; when it
# replaces them, one may be left with none; of those that are too many, it takes away where most are.
spread() {
  local n
  for n in $MACHINES; do
    [ -n "$(container "$n" web)" ] || { scale_web 6 && scale_web 3; return; }
  done
}
scale_web() { on "$(manager)" service scale "threefold_web=$1" >/dev/null; }

update() { on "$(manager)" service update --force --quiet "threefold_$1"; }
