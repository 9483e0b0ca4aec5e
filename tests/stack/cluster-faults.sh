# shellcheck shell=bash disable=SC2154 # sourced by `cluster`
# --- The faults -------------------------------------------------------------------------------------------------------

# copy_of_image NAME CHANGE: of the instances' image, on each machine, with that change
copy_of_image() {
  local n id
  for n in $MACHINES; do
    id=$(on "$n" create "${WEB_IMAGE:-threefold-web}") && on "$n" commit --change "$2" "$id" "$1" >/dev/null &&
      on "$n" rm "$id" >/dev/null || return 1
  done
}
web_image() { on "$(manager)" service inspect --format '{{.Spec.TaskTemplate.ContainerSpec.Image}}' threefold_web; }
deploy_web() { WEB_IMAGE=$1 DOCKER_HOST=$(socket "$(manager)") cluster/deploy; }

# As docs/cluster.md says. A rebuilt image with the name of the running one has to be refused.
do_update_web() {
  local name runs
  name=threefold-web:test-$RANDOM runs=$(web_image)
  copy_of_image "$runs" 'LABEL copy=1' && copy_of_image "$name" 'LABEL copy=2' || return 1
  ! deploy_web "${runs%:latest}" >"$WORK/deploy" 2>&1 || fail "a rebuilt $runs was deployed"
  grep -q 'built anew' "$WORK/deploy" && deploy_web "$name" >>"$WORK/deploy" 2>&1 || { cat "$WORK/deploy"; return 1; }
  wait_for 90 runs_as "$name" || { fail "there are not three instances of $name"; tasks; }
}
runs_as() {
  on "$(manager)" service ps --filter desired-state=running --format '{{.Image}} {{.CurrentState}}' threefold_web |
    grep -c "^$1 Running" | grep -x 3 >/dev/null
}

update() { on "$(manager)" service update --force --quiet "threefold_$1"; }
do_update_nginx()    { update nginx; }
do_update_redis()    { update redis && update sentinel; }
do_update_postgres() { update etcd && update postgres; }

# It starts and never responds.
do_broken_image() {
  local m
  copy_of_image threefold-web:broken 'ENTRYPOINT ["sleep", "600"]' || return 1
  m=$(manager)
  on "$m" service update --quiet --no-resolve-image --image threefold-web:broken threefold_web || true
  wait_for 60 rolled_back "$m" || fail "expected rollback_completed, saw $(on "$m" service inspect threefold_web)"
}
rolled_back() {
  on "$1" service inspect --format '{{.UpdateStatus.State}}' threefold_web | grep -x rollback_completed >/dev/null
}

do_drain() {
  within "$victim" postgres start switchover && sleep 3
  on "$(manager)" node update --availability drain "$(machine "$victim")" >/dev/null || return 1
  wait_for 90 empty "$victim" || { fail "containers are left on it:"; on "$victim" ps; }
  on "$(manager)" node update --availability active "$(machine "$victim")" >/dev/null
}

empty() { [ -z "$(on "$1" ps -q)" ]; }

do_node_dies()     { power_off "$victim" && sleep 15; power_on "$victim"; }
do_primaries_die() { power_off "$victim" && sleep 40; power_on "$victim"; }
do_cut_off()       { cut_off "$victim" && sleep 40; reconnect "$victim"; }

do_two_gone() {
  local before after n
  read -r -a gone <<<"$(others "$victim")"
  for n in "${gone[@]}"; do power_off "$n"; done
  sleep 25
  send count; before=$(value acknowledged); sleep 10
  send count; after=$(value acknowledged)
  check "acknowledged by one machine alone" 0 $((after - before))
  curl -sS -m 5 -D "$WORK/head" -o "$WORK/body" "http://$(address "$victim"):$PORT/api/messages" || true
  power_on "${gone[0]}" && sleep 45
  send count; after=$(value acknowledged)
  power_on "${gone[1]}"
  bound "acknowledged by two machines after 45 s" "at least" 1 $((after - before))
  grep -q '^HTTP/1.1 503' "$WORK/head" && grep -qi '^retry-after' "$WORK/head" ||
    { fail "one machine alone: expected 503 with Retry-After, saw:"; cat "$WORK/head" "$WORK/body"; }
}

# One replica lags; both replicas come back before the primary.
do_power_loss() {
  local n primary lags
  primary=$(redis_primary) && lags=$(others "$primary") && lags=${lags%% *} || return 1
  on "$lags" kill --signal STOP "$(container "$lags" redis)" >/dev/null && sleep 1
  for n in $MACHINES; do power_off "$n"; done
  sleep 2
  for n in $(others "$primary"); do power_on "$n"; sleep 3; done
  sleep 25
  power_on "$primary"
  wait_for 30 responds "$primary"
}

# As docs/cluster.md says.
do_replaced() {
  local m images
  power_off "$victim"
  rm -rf "${DATA_DIR:?}/$victim"
  wait_for 30 manager >/dev/null && m=$(manager) || return 1
  wait_for 30 is_missed "$m" || return 1
  on "$m" node demote "$(machine "$victim")" >/dev/null && on "$m" node rm --force "$(machine "$victim")" >/dev/null ||
    return 1
  power_on "$victim"
  wait_for 60 responds "$victim" || return 1
  # shellcheck disable=SC2046 # a list of services
  mapfile -t images < <(on "$m" service inspect --format '{{.Spec.TaskTemplate.ContainerSpec.Image}}' \
    $(on "$m" service ls --quiet) | sort -u)
  on "$m" save "${images[@]}" | on "$victim" load --quiet >/dev/null || return 1
  join_swarm "$victim" "$m" || return 1
  wait_for 90 within "$victim" etcd etcdctl endpoint health >/dev/null 2>&1 ||
    { fail "it is no member of etcd:"; on "$victim" ps -a; }
}

# Stopped as an operator stops it, so that Patroni does not start it. Swarm's health check kills a container sooner.
do_no_postgres() {
  local n web
  web=$(web_containers)
  within "$victim" postgres start ctl pause --wait threefold || return 1
  for n in $MACHINES; do
    within "$n" postgres pg_ctl stop --mode fast --pgdata /var/lib/postgresql/18/docker || fail "pg_ctl on machine $n"
  done
  sleep 75
  [ "$web" = "$(web_containers)" ] || { fail "instances were replaced:"; tasks; }
  for n in $MACHINES; do
    curl -fsS -m 3 -o /dev/null "http://$(address "$n"):$PORT/readyz" || fail "machine $n is not ready"
  done
  within "$victim" postgres start ctl resume --wait threefold
}
web_containers() { local n; for n in $MACHINES; do on "$n" ps --quiet --filter name=threefold_web; done; }

# An etcd, a Redis and a Sentinel with empty volumes wait until a majority responds.
do_slow_peers() {
  local n was
  read -r n _ <<<"$(others "$victim")"
  was=$(etcd_member "$n" "$victim")
  deafen "$victim" && lose_volumes "$victim" etcd sentinel redis postgres || return 1
  wait_for 20 starts_anew "$victim" || { fail "its stores are not started:"; on "$victim" ps -a; }
  sleep 10
  ! redis "$victim" role || fail "its Redis has started and did not wait"
  ! within "$victim" etcd pgrep -x etcd || fail "its etcd has started and did not wait"
  undeafen "$victim"
  wait_for 60 within "$victim" etcd etcdctl endpoint health >/dev/null 2>&1 || fail "it is no member of etcd"
  [ "$(etcd_member "$n" "$victim")" != "$was" ] || fail "expected another member of etcd, saw $was again"
}
# deafen N: drops the packets of that machine to the other etcds and Sentinels
deafen() {
  local other
  for other in 2379 2380 26379; do
    inside "$1" iptables -w -I OUTPUT -o eth0 -p tcp --dport $other -j DROP || return 1
  done
}
undeafen() { inside "$1" iptables -w -F OUTPUT; }
lose_volumes() { # MACHINE SERVICE...: the Swarm starts them again
  local n=$1 service; shift
  for service in "$@"; do
    lost[$service]=$(container "$n" "$service")
    find "$DATA_DIR/$n/volumes/threefold_$service/_data" -mindepth 1 -delete
    on "$n" kill "${lost[$service]}" >/dev/null || return 1
  done
}
declare -A lost
starts_anew() { # MACHINE
  local service
  for service in "${!lost[@]}"; do
    case $(container "$1" "$service") in '' | "${lost[$service]}") return 1 ;; esac
  done
}
etcd_member() { # MACHINE OF-MACHINE: its id in that machine's etcd
  within "$1" etcd etcdctl member list | grep -F "http://$(address "$2"):2380" | cut -d, -f1
}
is_missed() { on "$1" node ls --format '{{.Hostname}} {{.Status}}' | grep -x "$(machine "$victim") Down" >/dev/null; }
