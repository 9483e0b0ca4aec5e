# shellcheck shell=bash disable=SC2034,SC2154 # sourced by run, compare-lb and peers/run, whose variables these are
# Figures, containers, load and its measurement.

BEGAN=$SECONDS
TEXT="A message of the usual length: a reader was here, liked it, and says hello to all who read this."

pictures() { # DATA PICTURE...: draws each of them to $OUT; load-frontend has gnuplot
  local picture
  box_in load-frontend sh -c 'cat >/tmp/data.tsv' <"$1"
  for picture in "${@:2}"; do
    quietly box load-frontend gnuplot -e "picture='$picture'; data='/tmp/data.tsv'; set output '/tmp/picture.svg'" \
      /bench/draw.gp && box load-frontend cat /tmp/picture.svg >"$OUT/$picture.svg"
  done
}
image_mb() { # IMAGE: unpacked; some folders are root's
  docker run --rm --user 0 --entrypoint du "$1" -skx / 2>"$WORK/log" | awk '{ printf "%.1f", $1 / 1024 }'
}

remove_stack() { docker compose down --volumes --remove-orphans --timeout 0; }

quick()   { [ "${QUICK:-}" = 1 ]; }
now()     { printf '%s' "${EPOCHREALTIME:-$(date +%s)}"; }
calc()    { awk "BEGIN { printf \"%.${2:-4}f\", $1 }"; }
ratio()   { awk "BEGIN { printf \"%.4f\", $2 ? $1 / $2 : 0 }"; }
median()  { sort -g | awk '{ at[NR] = $1 } END { print (at[int((NR + 1) / 2)] + at[int(NR / 2) + 1]) / 2 }'; }
# ratios OURS THEIRS: files with a figure for each round; the median of the rounds' ratios. It depends less than a ratio
# of medians on a machine that gets slower or faster meanwhile.
ratios()  { paste "$1" "$2" | awk '{ print $2 ? $1 / $2 : 0 }' | median; }
keep()    { local IFS=$'\t'; printf '%s\n' "$*" >>"$DATA"; }
box()     { docker exec "$COMPOSE_PROJECT_NAME-$1-1" "${@:2}"; }
box_in()  { docker exec -i "$COMPOSE_PROJECT_NAME-$1-1" "${@:2}"; }
sql()     { box_in postgres psql -qAt -v ON_ERROR_STOP=1 -U postgres -d "$DB_NAME"; }

# progress TEXT: on a terminal a line that replaces itself, else a line for each step
progress() {
  if [ -t 2 ]; then printf '\r\033[K%4d s  %.110s' $((SECONDS - BEGAN)) "$*" >&2
  else printf '%4d s  %s\n' $((SECONDS - BEGAN)) "$*" >&2; fi
}
detail() { [ ! -t 2 ] || progress "$@"; }
clear_progress() { [ ! -t 2 ] || printf '\r\033[K' >&2; }

# fill N: the table has N messages and its statistics. Without the checkpoint one would come during a measurement.
fill() {
  sql <<<"TRUNCATE messages; INSERT INTO messages (author, body, instance, request_key)
    SELECT 'bench', '$TEXT', 'web' || 1 + n % 3, 'bench:' || n FROM generate_series(1, $1) AS n;
    VACUUM ANALYZE messages; CHECKPOINT"
}

# --- CPU time by container, where the cgroup files can be read (not on Docker Desktop) --------------------------------

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

# meters: microseconds of CPU of each container of METERED so far, on one line
meters() {
  [ ${#METERS[@]} = 0 ] || awk 'FNR == 1 { printf "%d ", $1 == "usage_usec" ? $2 : $1 / 1000 }' "${METERS[@]}"
}

# keep_cpu_time WAY KIND REQUESTS BEFORE AFTER: for the instances together, and for each of the others
keep_cpu_time() {
  [ -z "$4" ] || awk -v names="$METERED" -v way="$1" -v kind="$2" -v requests="$3" -v before="$4" -v after="$5" '
    BEGIN { OFS = "\t"; n = split(names, name, " "); split(before, b, " "); split(after, a, " ")
            for (i = 1; i <= n; i++) used[name[i] ~ /^web/ ? "service" : name[i]] += a[i] - b[i]
            for (container in used) print "cpu", way, kind, container, used[container], requests }' >>"$DATA"
}

# --- Load -------------------------------------------------------------------------------------------------------------

# load WAY KIND [CONNECTIONS [SECONDS [RATE]]]: prints requests a second, mean, p50 and p99 in ms
#   WAY   direct: to web1, without nginx; front: through nginx; else the name of an instance
#   KIND  visit, addresses, post, newest, mixed, healthz, or a path
load() {
  local way=$1 kind=$2 connections=${3:-64} seconds=${4:-$LONG} threads=2 from=load-backend host=$1 path method=get
  local before after good micros p50 p99 failed how
  case $way in direct) host=web1 ;; front) from=load-frontend host=nginx ;; esac
  [ "$connections" -gt 1 ] || threads=1
  case $kind in
    visit) path=/ ;; healthz) path=/healthz ;;
    addresses) path=/ method=addresses ;;                                # visits, as if from 250 clients
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
    keep_cpu_time "$way" "$kind" "$good" "$before" "$after"
  awk "BEGIN { printf \"%.1f %.4f %.4f %.4f\n\", $good / $micros * 1e6,
    $micros * $connections / ($good ? $good : 1) / 1e3, $p50 / 1e3, $p99 / 1e3 }"
}
rate() { load "$@" | cut -d' ' -f1; }       # requests a second
mean() { load "$@" | cut -d' ' -f2; }       # milliseconds

# keep_failure WAY WHAT COUNT: and the log lines about it; nginx writes its log once a second
keep_failure() {
  keep failed "$@"
  sleep 1.5
  { say "     $(date -u +%H:%M:%S) $1 $2"
    docker compose logs --since 15s nginx web1 web2 web3 web-extra 2>&1 |
      grep -vE '"status":(20[01]|499)' | tail -n 10; } >>"$WORK/failures"
}

# What the service is compared to. The insert is the same row with the same kind of key.
INSERT="INSERT INTO messages (author, body, instance, request_key)
  VALUES ('bench', '$TEXT', 'web1', 's:' || gen_random_uuid());"
SELECT='SELECT id, author, body, instance, created_at FROM messages WHERE id < :before ORDER BY id DESC LIMIT 20;'

sql_file() { box_in pgbench sh -c "cat >/tmp/$1.sql" <<<"$2"; }
# pgbench_tps SQL [SQL WEIGHT WEIGHT]: transactions a second of 64 clients. Its time includes connecting, which can take
# all of it on a busy machine: then it gets more time.
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

# redis_incrs: redis-benchmark takes a number of requests, not of seconds; the last run gives the next number
redis_incrs() {
  local count=20000
  [ ! -s "$WORK/incrs" ] || count=$(calc "$(cat "$WORK/incrs") * $LONG" 0)
  box redis-benchmark redis-benchmark -h redis -a "$REDIS_PASS" -c 64 -n "$count" --csv INCR bench 2>/dev/null |
    awk -F'"' '/^"INCR/ { print $4 }' | tee "$WORK/incrs"
}

# start_seconds NAME=COMMAND...: the seconds from process start to the first 200, STARTS of each in turn; a line
# "NAME seconds" for each. Requests begin when the process logs that it listens, since earlier ones would slow it down.
start_seconds() {
  # shellcheck disable=SC2016 # expanded in the container
  docker compose run --rm -T --no-deps -e DRAIN_MILLIS=0 -e INSTANCE_ID=start --entrypoint sh web1 -c '
    uptime() { cut -d" " -f1 /proc/uptime; }
    rounds=$1; shift
    for round in $(seq 0 "$rounds"); do
      for command; do
        began=$(uptime)
        { eval "exec ${command#*=}" 2>&1 & echo "process $!"; wait; } | while read -r line; do
          case $line in
            "process "*) process=${line#process } ;;
            *[Ll]istening* | *"started on port"*)
              [ -z "$done" ] || continue
              until wget -q -O /dev/null http://127.0.0.1:9999/healthz 2>/dev/null; do :; done
              [ "$round" = 0 ] || echo "${command%%=*} $began $(uptime)" # the first round reads the files
              done=1
              kill "$process" ;;
          esac
        done
      done
    done' sh "$STARTS" "$@" 2>"$WORK/log" </dev/null | awk '{ print $1, $3 - $2 }' >"$WORK/starts"
  [ "$(wc -l <"$WORK/starts")" -eq $((STARTS * $#)) ] || { say "no start: $*" >&2; cat "$WORK/log" >&2; return 1; }
}

# end_bench COMMAND: `leave` of both benches; the output of an interrupted command can be elsewhere
end_bench() {
  exec >&3 2>&3
  progress "removing the stacks"
  "$1"
  clear_progress
  [ "$code" = 0 ] || say "The bench failed (exit code $code)." >&2
}
