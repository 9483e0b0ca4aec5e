# shellcheck shell=bash disable=SC2034,SC2154 # `run` and these parts share their variables
# The bench's stack, and what makes load for it. Sourced by `run`.

# --- The stack --------------------------------------------------------------------------------------------------------

remove_stack() { docker compose down --volumes --remove-orphans --timeout 0; }

cleanup() {
  local code=$?
  exec >&3 2>&3
  trap '' INT TERM
  [ -z "${stack:-}" ] || { progress "removing the stack"; remove_stack >"$WORK/down" 2>&1 || cat "$WORK/down" >&2; }
  docker image rm threefold-bench-web threefold-bench-load threefold-bench-blocking >"$WORK/down" 2>&1 || true
  rm -rf "$WORK"
  [ ! -t 2 ] || printf '\r\033[K' >&2
  [ $code = 0 ] || say "The bench broke (exit code $code)." >&2
}

start_stack() {
  progress "building"
  stack=1
  quiet docker compose build web1          # first: the next ones are built on it
  quiet docker compose build load-backend blocking
  quiet remove_stack                       # of a bench that was killed
  local n began
  for n in $(seq "$UPS"); do
    [ "$n" = 1 ] || quiet remove_stack
    progress "up, from nothing to six healthy: $n of $UPS"
    began=$(now)
    quiet docker compose up --detach --wait nginx
    calc "$(now) - $began" 2 >>"$WORK/ups"; echo >>"$WORK/ups"
  done
  quiet docker compose up --detach --no-deps load-backend load-frontend pgbench redis-benchmark
  URL=http://$(docker compose port nginx 9999 | sed 's/0.0.0.0/localhost/')
  find_meters
}

# fill N: the table holds N messages and nothing else, statistics and all. The checkpoint is for what ran before: it
# would come in the middle of some run, and until it came PostgreSQL would make new files for its log, 50 ms each.
fill() {
  sql <<<"TRUNCATE messages; INSERT INTO messages (author, body, instance, request_key)
    SELECT 'bench', '$TEXT', 'web' || 1 + n % 3, 'bench:' || n FROM generate_series(1, $1) AS n;
    VACUUM ANALYZE messages; CHECKPOINT"
}

# --- Processor time by container, where the cgroup files can be read (not on Docker Desktop) --------------------------

METERED="web1 web2 web3 nginx redis postgres"
find_meters() {
  local service id file
  METERS=()
  for service in $METERED; do
    id=$(docker inspect --format '{{.Id}}' "$COMPOSE_PROJECT_NAME-$service-1")
    for file in /sys/fs/cgroup/{cpuacct,cpu,cpu\,cpuacct}/docker/"$id"/cpuacct.usage \
                /sys/fs/cgroup/{system.slice/docker-"$id".scope,docker/"$id"}/cpu.stat; do
      [ ! -r "$file" ] || { METERS+=("$file"); break; }
    done
  done
  [ ${#METERS[@]} = "$(wc -w <<<"$METERED")" ] || METERS=()
}

# meters: microseconds of each container of METERED so far, on one line
meters() {
  [ ${#METERS[@]} = 0 ] || awk 'FNR == 1 { printf "%d ", $1 == "usage_usec" ? $2 : $1 / 1000 }' "${METERS[@]}"
}

# keep_processor_time WAY KIND REQUESTS BEFORE AFTER: for the instances together, and for each of the others
keep_processor_time() {
  [ -z "$4" ] || awk -v names="$METERED" -v way="$1" -v kind="$2" -v requests="$3" -v before="$4" -v after="$5" '
    BEGIN { OFS = "\t"; n = split(names, name, " "); split(before, b, " "); split(after, a, " ")
            for (i = 1; i <= n; i++) used[name[i] ~ /^web/ ? "service" : name[i]] += a[i] - b[i]
            for (container in used) print "cpu", way, kind, container, used[container], requests }' >>"$DATA"
}

# --- Load -------------------------------------------------------------------------------------------------------------

# load WAY KIND [CONNECTIONS [SECONDS [RATE]]]: prints requests a second, mean, p50 and p99 in ms
#   WAY   direct: to web1, past nginx; front: through nginx; else the name of an instance
#   KIND  visit, post, newest, healthz, or a path
load() {
  local way=$1 kind=$2 connections=${3:-64} seconds=${4:-$LONG} threads=2 from=load-backend host=$1 path method=get
  local before after good micros p50 p99 failed how
  case $way in direct) host=web1 ;; front) from=load-frontend host=nginx ;; esac
  [ "$connections" -gt 1 ] || threads=1
  case $kind in
    visit) path=/ ;; healthz) path=/healthz ;;
    post) path=/api/messages method=post; fill 1000 || return 1 ;;       # the same table for every run
    newest) path='/api/messages?limit=20'; fill 1000 || return 1 ;;
    mixed) path='/api/messages?limit=20' method=mixed; fill 1000 || return 1 ;;
    *) path=$kind ;;
  esac
  before='' after=''
  [ -n "${unmetered:-}" ] || before=$(meters)
  box $from wrk -t $threads -c "$connections" -d "${seconds}s" --timeout 5s -s /bench/load.lua \
    "http://$host:9999$path" -- $method "$TEXT" ${5:+"$(calc "$5 / $threads" 2)"} >"$WORK/wrk" 2>&1 ||
    { cat "$WORK/wrk" >&2; return 1; }
  [ -n "${unmetered:-}" ] || after=$(meters)
  read -r _ good micros p50 p99 failed how < <(grep '^wrk' "$WORK/wrk") || { cat "$WORK/wrk" >&2; return 1; }
  [ "$failed" = 0 ] || keep_failure "$way" "$kind, $connections connections: $how" "$failed"
  [ "$connections" != 64 ] || [ -n "${5:-}" ] || [ -n "${unmetered:-}" ] ||
    keep_processor_time "$way" "$kind" "$good" "$before" "$after"
  awk "BEGIN { printf \"%.1f %.4f %.4f %.4f\n\", $good / $micros * 1e6,
    $micros * $connections / ($good ? $good : 1) / 1e3, $p50 / 1e3, $p99 / 1e3 }"
}
rate() { load "$@" | cut -d' ' -f1; }       # requests a second
mean() { load "$@" | cut -d' ' -f2; }       # milliseconds

# keep_failure WAY WHAT COUNT: and what nginx and the instances wrote about it; nginx writes once a second
keep_failure() {
  keep failed "$@"
  sleep 1.5
  { say "     $(date -u +%H:%M:%S) $1 $2"
    docker compose logs --since 15s nginx web1 web2 web3 web-extra 2>&1 |
      grep -vE '"status":(20[01]|499)' | tail -n 10; } >>"$WORK/failures"
}

# What they are compared to. The insert is the same row with the same kind of key, and no more than the insert.
INSERT="INSERT INTO messages (author, body, instance, request_key)
  VALUES ('bench', '$TEXT', 'web1', 's:' || gen_random_uuid());"
SELECT='SELECT id, author, body, instance, created_at FROM messages WHERE id < :before ORDER BY id DESC LIMIT 20;'

sql_file() { box_in pgbench sh -c "cat >/tmp/$1.sql" <<<"$2"; }

# pgbench_tps SQL [SQL WEIGHT WEIGHT]: transactions a second of 64 clients. Its time begins with connecting,
# which it leaves out of the figure;
# on a busy machine connecting can take all of it, so then it gets more.
pgbench_tps() {
  local more scripts=()
  sql_file 1 "$1"; scripts+=(-f "/tmp/1.sql@${3:-1}")
  [ -z "${2:-}" ] || { sql_file 2 "$2"; scripts+=(-f "/tmp/2.sql@${4:-1}"); }
  for more in 1 5 15; do
    fill 1000 || return 1
    box_in pgbench pgbench -n -M prepared -c 64 -j 2 -T $((LONG + more)) -D before=9223372036854775807 \
      "${scripts[@]}" >"$WORK/pgbench" 2>&1 || { cat "$WORK/pgbench" >&2; return 1; }
    ! grep -q '^tps = ' "$WORK/pgbench" || break
  done
  sed -n 's/^tps = \([0-9.]*\).*/\1/p' "$WORK/pgbench"
}
pgbench_inserts() { pgbench_tps "$INSERT"; }
pgbench_selects() { pgbench_tps "$SELECT"; }
pgbench_mixed() { pgbench_tps "$SELECT" "$INSERT" 9 1; }

# redis_incrs: it wants a number of requests, not of seconds; what the last run reached gives the next one's
redis_incrs() {
  local count=20000
  [ ! -s "$WORK/incrs" ] || count=$(calc "$(cat "$WORK/incrs") * $LONG" 0)
  box redis-benchmark redis-benchmark -h redis -a "$REDIS_PASS" -c 64 -n "$count" --csv INCR bench 2>/dev/null |
    awk -F'"' '/^"INCR/ { print $4 }' | tee "$WORK/incrs"
}
