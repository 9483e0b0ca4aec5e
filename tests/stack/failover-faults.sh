# shellcheck shell=bash disable=SC2034,SC2154 # sourced by tests/stack/failover, whose variables these are
# --- What is done to the stack ----------------------------------------------------------------------------------------

replace() { docker compose up --detach --no-deps --no-build --force-recreate --wait "$1"; }
scale() {
  docker compose up --detach --no-deps --no-build --no-recreate --wait --scale web-extra=$(($1 - 3)) web-extra
}
start()   { docker compose start "$@"; }
kill_9()  { docker compose kill --signal KILL "$@"; }

# Waits inside the container, so that the moment is known to a few milliseconds.
postgres_is_back() { docker compose exec -T postgres bash -c 'until pg_isready -q -h 127.0.0.1; do sleep 0.02; done'; }
redis_is_back()    { docker compose exec -T redis bash -c 'until [ "$(redis-cli ping)" = PONG ]; do sleep 0.02; done'; }
psql()             { docker compose exec -T postgres psql -qAtX -c "$1"; }

any='200 201 502 503 504 refused cut time-out'        # while nginx itself is away

do_rolling()    { replace web1 && replace web2 && replace web3; }
do_stop_start() { docker compose stop web2 && start web2; }
do_restart()    { docker compose restart web3; }
do_recreate()   { replace web1; }

do_scale() {
  local tries=0
  scale 6 || return 1
  until ask seen && [ "$(value instances)" = 6 ]; do
    [ $((tries += 1)) -le 20 ] ||
      { say "expected answers from 6 instances within 5 s, saw $(value instances)"; return 1; }
    sleep 0.25
  done
  scale 3
}

do_kill_web()         { kill_9 web2 && sleep 2 && start web2; }
do_kill_two_webs()    { kill_9 web1 web3 && sleep 2 && start web1 web3; }
do_kill_five_of_six() { scale 6 && sleep 1 && kill_9 web1 web2 web-extra && sleep 2 && start web1 web2 && scale 3; }

# On a machine too slow for that many it is kill-web once more, and says so.
do_flood() {
  local killed=0
  ask flood 32; sleep 1
  do_kill_web || killed=1
  sleep 1; ask flood-stop
  more="; and $(value flood)/s of GET /healthz, failed $(value flood-failed)"
  [ "$(value flood-failed)" = 0 ] || { say "expected none of the flood to fail, saw:"; say "$answer"; return 1; }
  return $killed
}

do_pause_web()        { docker compose pause web2 && sleep 6 && docker compose unpause web2 && sleep 1; }

do_vanish_web() {
  local id left
  id=$(docker compose ps -q web2)
  docker network disconnect "$backend" "$id" && sleep 20 || return 1
  left=$(service_connections web2)
  # A new one takes its place: one that only gets its network back refuses for a tenth of a second, until it has seen
  # PostgreSQL.
  replace web2 && eventually answers web2 || return 1
  [ "$left" = 0 ] || { say "after 20 s: expected PostgreSQL to keep 0 connections for it, saw $left"; return 1; }
}

# answers INSTANCE: it is among those that do
answers() {
  curl -sS -m 5 "$URL/healthz?[1-6]" | grep "\"$1\"" >/dev/null || { say "expected $1 to answer again"; return 1; }
}

do_kill_redis()       { kill_9 redis && sleep 2 && ready 200 degraded && start redis && redis_is_back && ask mark; }
do_kill_nginx()       { tolerated=$any slowest_allowed=10000; kill_9 nginx && sleep 1 && start nginx && ask mark; }
do_kill_postgres() {
  kill_9 postgres && sleep 2 && ready 200 degraded && start postgres && postgres_is_back && ask mark
}
do_restart_postgres() {
  docker compose restart postgres && sleep 1 && docker compose restart postgres && postgres_is_back && ask mark
}
do_kill_all()         { tolerated=$any slowest_allowed=10000; kill_9 && sleep 1 && start && ask mark; }

do_cut_postgres() {
  local terminate="SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE usename = '${DB_USER:-app}'"
  docker compose exec -T postgres psql -qAtX <<<"$terminate \\watch i=0.1 c=50" && ask mark
}

do_pause_postgres() {
  local before during after connections
  connections=$(service_connections); before=$(levels Threads | sort)
  docker compose pause postgres && sleep 5 || return 1
  during=$(levels Threads | sort)
  sleep 1
  docker compose unpause postgres && ask mark && sleep 3
  after=$(levels Threads | sort)
  within "threads while it hung" 3 "$before" "$during" && within "threads afterwards" 3 "$before" "$after" &&
    within "connections to PostgreSQL" 0 "all $connections" "all $(service_connections)"
}

# The instance is asked directly, the way nginx does it. nginx could mend a cut by asking the next instance; to need
# no mending is what the drain is for.
do_drain() {
  local complaints
  docker network connect "$backend" "$LOAD" || return 1
  ask direct web2; sleep 3
  docker compose stop web2; ask direct-stop
  docker network disconnect "$backend" "$LOAD"
  complaints=$(last_words web2 | grep '"level":"warn"' | grep -v '"path":"/readyz"' || true)
  start web2
  more="; at web2 itself: $(value asked-to-go) of 10 connections asked to go, $(value cut) cut"
  if [ "$(value asked-to-go)" != 10 ] || [ "$(value leaving)" -lt 2000 ] || [ "$(value cut)" != 0 ]; then
    say "expected every connection to be asked to go, answers for at least 2 s meanwhile, none cut; saw:"
    say "$answer"; return 1
  fi
  [ -z "$complaints" ] || { say "expected it to leave in peace, saw:"; say "$complaints"; return 1; }
}

# last_words SERVICE: what it said since it began to leave
last_words() {
  docker compose logs --no-log-prefix --tail 200 "$1" |
    awk '/"event":"draining"/ { n = 0 } { line[n++] = $0 } END { for (i = 0; i < n; i++) print line[i] }'
}

do_slow_clients() {
  slowest_allowed=2000
  ask slow 400 && sleep 12 && ask slow-stop || return 1
  [ "$(value open)" = 0 ] || { say "slow clients still connected after 12 s: expected 0, saw $(value open)"; return 1; }
}

# ready STATUS WORD: what an instance says of itself
ready() {
  local saw
  saw=$(curl -sS -m 5 -w ' %{http_code}' "$URL/readyz")
  [[ "$saw" == *'"status":"'$2'"'*" $1" ]] || { say "/readyz: expected $1 and $2, saw $saw"; return 1; }
}

# --- What is measured of the stack ------------------------------------------------------------------------------------

# service_connections [INSTANCE]: to PostgreSQL, of one instance or of all
service_connections() { psql "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'threefold ${1:-%}'"; }

# levels WHAT: a line "service number" for each instance; Threads or VmRSS (KB) or descriptors
levels() {
  local service id
  for service in web1 web2 web3; do
    id=$(docker compose ps -q "$service")
    case $1 in
      descriptors) printf '%s %s\n' "$service" "$(docker exec "$id" sh -c 'ls /proc/1/fd | wc -l')" ;;
      *)           printf '%s %s\n' "$service" "$(docker exec "$id" grep "^$1:" /proc/1/status | tr -dc 0-9)" ;;
    esac
  done
}

# All that nginx has open, in all of its processes.
nginx_descriptors() {
  printf 'nginx %s\n' "$(docker compose exec -T nginx sh -c 'ls /proc/[0-9]*/fd 2>/dev/null | grep -c "^[0-9]"')"
}

# within WHAT MORE BEFORE AFTER: lines "name number"; none is missing, and none has grown by more than MORE
within() {
  local grown
  grown=$(join -a 1 -a 2 <(sort <<<"$3") <(sort <<<"$4") |
    awk -v more="$2" 'NF < 3 { printf "%s without a number before or after ", $1 }
      NF > 2 && $3 > $2 + more { printf "%s from %s to %s ", $1, $2, $3 }')
  [ -z "$grown" ] || { say "$1: expected at most $2 more, saw $grown"; return 1; }
}
