# shellcheck shell=bash disable=SC2034,SC2154 # sourced by failover
# --- The faults -------------------------------------------------------------------------------------------------------

replace() { docker compose up --detach --no-deps --no-build --force-recreate --wait "$1"; }
scale() {
  docker compose up --detach --no-deps --no-build --no-recreate --wait --scale web-extra=$(($1 - 3)) web-extra
}
start()   { docker compose start "$@"; }
kill_9()  { docker compose kill --signal KILL "$@"; }

# Waiting inside the container gives the moment to a few milliseconds.
postgres_is_back() { docker compose exec -T postgres bash -c 'until pg_isready -q -h 127.0.0.1; do sleep 0.02; done'; }
redis_is_back()    { docker compose exec -T redis bash -c 'until [ "$(redis-cli ping)" = PONG ]; do sleep 0.02; done'; }
psql()             { docker compose exec -T postgres psql -qAtX -c "$1"; }

without_nginx() { tolerated='200 201 502 503 504 refused cut time-out' slowest_allowed=10000; }

do_rolling()    { replace web1 && replace web2 && replace web3; }
do_stop_start() { docker compose stop web2 && start web2; }
do_restart()    { docker compose restart web3; }
do_recreate()   { replace web1; }

do_scale() {
  scale 6 || return 1
  wait_for 5 respond 6 || fail "instances that respond within 5 s: expected 6, saw $(value instances)"
  scale 3
}
respond() { send seen && [ "$(value instances)" = "$1" ]; }

do_kill_web()         { kill_9 web2 && sleep 2 && start web2; }
do_kill_two_webs()    { kill_9 web1 web3 && sleep 2 && start web1 web3; }
do_kill_five_of_six() { scale 6 && sleep 1 && kill_9 web1 web2 web-extra && sleep 2 && start web1 web2 && scale 3; }

do_flood() {
  send flood 32; sleep 1
  do_kill_web || fail "kill-web"
  sleep 1
}

do_pause_web() { docker compose pause web2 && sleep 6 && docker compose unpause web2 && sleep 1; }

do_partition_web() {
  docker network disconnect "$backend" "$(docker compose ps -q web2)" && sleep 20 || return 1
  check "web2's connections to PostgreSQL after 20 s" 0 "$(service_connections web2)"
  # A new container: one that gets its network back refuses requests until it has reached PostgreSQL.
  replace web2 && wait_for 20 serves web2
}
serves() { curl -sS -m 5 "$URL/healthz?[1-6]" | grep "\"$1\"" >/dev/null; }

do_kill_redis()       { kill_9 redis && sleep 2 && degraded && start redis && redis_is_back && send mark; }
do_kill_nginx()       { without_nginx; kill_9 nginx && sleep 1 && start nginx && send mark; }
do_kill_all()         { without_nginx; kill_9 && sleep 1 && start && send mark; }
do_kill_postgres()    { kill_9 postgres && sleep 2 && degraded && start postgres && postgres_is_back && send mark; }
do_restart_postgres() {
  docker compose restart postgres && sleep 1 && docker compose restart postgres && postgres_is_back && send mark
}
degraded() {
  local saw
  saw=$(curl -sS -m 5 -w ' %{http_code}' "$URL/readyz")
  [[ "$saw" == *'"status":"degraded"'*" 200" ]] || fail "/readyz: expected 200 and degraded, saw $saw"
}

do_cut_postgres() {
  local terminate="SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE usename = '${DB_USER:-app}'"
  docker compose exec -T postgres psql -qAtX <<<"$terminate \\watch i=0.1 c=50" && send mark
}

do_pause_postgres() {
  local connections
  connections=$(service_connections)
  levels Threads >"$WORK/before-Threads"
  docker compose pause postgres && sleep 5 || return 1
  grown Threads 3
  sleep 1
  docker compose unpause postgres && send mark && sleep 3
  grown Threads 3
  bound "connections to PostgreSQL" "at most" "$connections" "$(service_connections)"
}

# The clients connect to web2 itself, since nginx would hide a cut connection by a retry.
do_drain() {
  docker network connect "$backend" "$RUN-load" || return 1
  send direct web2; sleep 3
  docker compose stop web2; send direct-stop
  docker network disconnect "$backend" "$RUN-load"
  check "warnings of web2 while it drained" "" "$(docker compose logs --no-log-prefix --tail 200 web2 |
    awk '/"event":"draining"/ { found = "" } /"level":"warn"/ && !/"path":"\/readyz"/ { found = found $0 "\n" }
      END { printf "%s", found }')"
  start web2
  more="; at web2 itself: $(value asked-to-go) of 10 connections asked to go, $(value cut) cut"
  check "connections that were asked to close" 10 "$(value asked-to-go)"
  bound "ms of responses while it drained" "at least" 2000 "$(value leaving)"
  all_zero cut
}

do_slow_clients() {
  local pids=()
  slowest_allowed=2000
  slow_clients senders "$frontend" nginx 0 0 0 400 12
  wait "${pids[@]}" || { cat "$WORK/slow-senders"; return 1; }
  check "slow clients" 400 "$(value opened "$WORK/slow-senders")"
  check "slow clients still connected after 12 s" 0 "$(value sending "$WORK/slow-senders")"
}

# --- Measurements of the stack ----------------------------------------------------------------------------------------

# service_connections [INSTANCE]: to PostgreSQL
service_connections() { psql "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'threefold ${1:-%}'"; }

# levels WHAT: a line "service number" for each instance (Threads, VmRSS in KB, descriptors) or for nginx (nginx)
levels() {
  local service
  [ "$1" != nginx ] || { # the descriptors of all its processes
    say "nginx $(docker compose exec -T nginx sh -c 'ls /proc/[0-9]*/fd 2>/dev/null | grep -c "^[0-9]"')"; return; }
  for service in web1 web2 web3; do
    say "$service $(docker compose exec -T $service sh -c "case $1 in
      descriptors) ls /proc/1/fd | wc -l ;; *) grep '^$1:' /proc/1/status | tr -dc 0-9 ;; esac")"
  done
}

# grown WHAT MORE: since $WORK/before-WHAT, none has grown by more than MORE, and none is missing
grown() {
  levels "$1" >"$WORK/after-$1"
  not_above "$1" "$2" "$WORK/before-$1" "$WORK/after-$1"
}

# not_above WHAT MORE BEFORE AFTER: files of lines "name number"
not_above() {
  check "$1, more than $2 above the number before" "" "$(join -a 1 -a 2 <(sort "$3") <(sort "$4") |
    awk -v more="$2" 'NF < 3 { printf "%s without a number before or after ", $1 }
      NF > 2 && $3 > $2 + more { printf "%s from %s to %s ", $1, $2, $3 }')"
}
