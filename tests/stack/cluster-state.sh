# shellcheck shell=bash disable=SC2034,SC2154 # sourced by `cluster`
# --- Where the primaries are, and whether all is whole ----------------------------------------------------------------

others() { local n; for n in $MACHINES; do [ "$n" = "$1" ] || printf '%s ' "$n"; done; }

# whole: three machines serve and each store has two replicas; else $missing is what is not so
# shellcheck disable=SC2034 # used by `cluster`
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

# state: of all machines and stores, without those that do not respond
state() (
  set +e
  p=$(manager) && on "$p" node ls && on "$p" service ls && tasks
  for n in $MACHINES; do
    curl -sS -m 2 "http://$(address "$n"):8008/patroni"
    redis "$n" info replication
    within "$n" sentinel redis-cli -p 26379 sentinel ckquorum threefold
    on "$n" ps --all --format '{{.Names}} {{.Status}}'
    for p in redis sentinel postgres; do on "$n" logs --tail 8 "$(container "$n" "$p")"; done
  done
  true
) 2>&1

# gather N: moves both primaries to this machine
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

# spread: an instance on each machine again. The Swarm does not move an instance back to a machine that has returned; of
# six it removes three where most are.
spread() {
  local n
  for n in $MACHINES; do
    [ -n "$(container "$n" web)" ] || { scale_web 6 && scale_web 3; return; }
  done
}
scale_web() { on "$(manager)" service scale "threefold_web=$1" >/dev/null; }
swarm_leader() {
  on "$(manager)" node ls --format '{{.ManagerStatus}} {{.Hostname}}' |
    awk '$1 == "Leader" { sub(/.*-/, "", $2); print $2 }'
}

# via N...: the addresses of these machines, joined by commas
via() { local n list=(); for n in "$@"; do list+=("$(address "$n")"); done; (IFS=,; say "${list[*]}"); }

# side_door N: a way from the clients to that machine past the network of the machines
SUBNET_BESIDE=198.18.89
side_door() {
  ip -n threefold-clients link delete beside 2>/dev/null || true
  ip link add beside netns threefold-clients type veth peer name beside netns "$(machine "$1")"
  ip -n threefold-clients address add "$SUBNET_BESIDE.100/24" dev beside && ip -n threefold-clients link set beside up
  ip -n "$(machine "$1")" address add "$SUBNET_BESIDE.$1/24" dev beside && ip -n "$(machine "$1")" link set beside up
}
