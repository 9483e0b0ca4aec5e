# shellcheck shell=bash disable=SC2034,SC2154 # sourced by run, whose variables these are
# Rows 1 to 10, 13, 16, 17, 19 and 20: one function each, in the order in which they run.

# Rows 16 and 17: each new instance has a load of its own, from its start on.
first_seconds() {
  progress "the first $COLD s after the start"
  local unmetered=1 n=0 kind second rest
  for kind in post visit newest; do
    n=$((n + 1))
    second=$(rate web$n $kind 64 1) rest=$(rate web$n $kind 64 $((COLD - 1)))
    first_second[n]=$second
    first_ten[n]=$(calc "($second + $rest * ($COLD - 1)) / $COLD" 1)
  done
}

# cold_rows NUMBER WHAT: compared to the speed of a warm instance, in $ours
cold_rows() {
  local second=${first_second[$1]} ten=${first_ten[$1]}
  row 16 "$2, the first $COLD s after the start" "$ten" /s "warmed up" "$ours" "$(ratio "$ten" "$ours")" least 0.8
  row 17 "$2, the first second after the start" "$second" /s "warmed up" "$ours" "$(ratio "$second" "$ours")" least 0.45
}

# warm_up SECONDS KIND...: these kinds of load in turn, through nginx, for this time. A file for each kind has a line
# "SECONDS RATE" for each of its loads: when it began, and its requests a second.
warm_up() {
  local began=$SECONDS seconds=$1 kind at; shift
  rm -f "$WORK"/warmed-*
  progress "warming up for $seconds s"
  while [ $((SECONDS - began)) -lt "$seconds" ]; do
    for kind; do
      at=$((SECONDS - began))
      detail "warming up: $at of $seconds s"
      printf '%s %s\n' $at "$(rate front "$kind" 64 "$WARM")" >>"$WORK/warmed-$kind"
    done
  done
}

# Row 20: new instances, since the ones before had the load of rows 16 and 17. The load straight to one is for rows 1-3.
warm_up_three() {
  local kind unmetered=1
  quietly docker compose up --detach --wait --no-deps --force-recreate web1 web2 web3
  await_instances 3 # nginx looks up their new addresses each second
  find_meters
  warm_up "$WARM_UP" visit post newest
  keep fact warmUpSeconds "$WARM_UP"
  for kind in visit post newest; do
    quick || warmed_row "$kind"
    load direct "$kind" 64 "$LONG" >"$WORK/warm"
  done
}

# warmed_row KIND: its loads that began from the 24th to the 36th second, and its last three
warmed_row() {
  local early late
  early=$(awk '$1 >= 24 && $1 < 36 { sum += $2; n++ } END { print sum / n }' "$WORK/warmed-$1")
  late=$(tail -n 3 "$WORK/warmed-$1" | awk '{ sum += $2 } END { print sum / NR }')
  row 20 "$(title "$1"), after 30 s of load" "$early" /s "after $WARM_UP s of load" "$late" \
    "$(ratio "$early" "$late")" least 0.95
}

# in_status SERVICE FIELD: of its process 1, in KB
in_status() { box "$1" sed -n "s/^$2:[^0-9]*\\([0-9]*\\).*/\\1/p" /proc/1/status; }

# Row 13, after the warm-up
memory() {
  local n most=0 kb
  for n in 1 2 3; do
    kb=$(in_status web$n VmRSS)
    [ "$kb" -lt "$most" ] || most=$kb
  done
  row 13 "memory at top speed, the largest of three" "$(calc "$most / 1024" 1)" MB "" "" "" most 100
}

durable_post() {
  compare "1  durable POST, one instance" "rate direct post" pgbench_inserts
  row 1 "POST, durable, one instance" "$ours" /s "pgbench, the same row" "$theirs" "$ratio" least 1.5
  cold_rows 1 POST
}

visit() {
  redis_incrs >"$WORK/first"
  compare "2  visit, one instance" "rate direct visit" redis_incrs
  row 2 "GET /, one instance" "$ours" /s "redis-benchmark INCR" "$theirs" "$ratio" least 0.4
  cold_rows 2 "GET /"
}

newest() {
  compare "3  newest 20, one instance" "rate direct newest" pgbench_selects
  row 3 "newest 20, one instance" "$ours" /s "pgbench, same select" "$theirs" "$ratio" least 3
  cold_rows 3 "newest 20"
  compare "3  newest 20, one request in ten a POST" "rate direct mixed" pgbench_mixed
  row 3 "  one request in ten a POST" "$ours" /s "pgbench, the same mix" "$theirs" "$ratio" least ""
}

through_nginx() {
  in_turn "4-6  through nginx, three instances" \
    "rate front healthz" "rate front visit" "rate front post" "rate front newest"
  local what="/healthz, the same way"
  row 4 "GET /, nginx and three instances" "${MEDIAN[1]}" /s "$what" "${MEDIAN[0]}" "$(turn_ratio 1 0)" least 0.82
  row 5 "POST, nginx and three instances" "${MEDIAN[2]}" /s "$what" "${MEDIAN[0]}" "$(turn_ratio 2 0)" least 0.45
  row 6 "newest 20, nginx and three instances" "${MEDIAN[3]}" /s "$what" "${MEDIAN[0]}" "$(turn_ratio 3 0)" \
    least 0.6
}

# Rows 7 and 19. Blocking.java is the plain blocking way. With one client there are no batches, and the two are close:
# so there are more runs, and shorter ones.
one_client() {
  quietly docker compose up --detach --wait --no-deps blocking
  local unmetered=1
  load blocking post 64 $((LONG * 3)) >"$WORK/warm"; load blocking post 1 "$LONG" >"$WORK/warm"
  RUNS=$PAIRS compare "7  one client" "mean direct post 1 $PAGE" "mean blocking post 1 $PAGE"
  row 7 "POST, one client, one at a time" "$ours" ms "the plain blocking way" "$theirs" "$ratio" most 1
  if ! quick; then
    compare "7  64 connections" "rate direct post" "rate blocking post"
    row 7 "  with 64 connections" "$ours" /s "the plain blocking way" "$theirs" "$ratio" least ""
  fi
  rate blocking healthz 64 $((LONG * 3)) >"$WORK/warm"
  compare "19 /healthz" "rate direct healthz" "rate blocking healthz"
  row 19 "GET /healthz, one instance" "$ours" /s "a bare handler" "$theirs" "$ratio" least 1
  quietly docker compose rm --force --stop blocking
}

# paced KIND SHARE TOP: SHARE percent of TOP; stores requests a second, p50 and p99 in ms
paced() {
  progress "8  $1 at $2 % of the top speed"
  load front "$1" 64 "$LONG" "$(calc "$3 * $2 / 100" 0)" | cut -d' ' -f1,3,4 >>"$WORK/paced-$1-$2"
}
paced_figures() { cut -d' ' -f"$3" "$WORK/paced-$1-$2"; }            # KIND SHARE COLUMN: 1 a second, 2 p50, 3 p99
paced_median() { paced_figures "$@" | median; }

# The top speed is measured before each run at half of it, since it changes within minutes.
half_speed() {
  local kind share top round p50 p99 others
  read -ra others <<<"$SHARES"
  for round in $(seq "$RUNS"); do
    for kind in visit post; do
      progress "8  $kind at top speed, round $round of $RUNS"
      top=$(rate front $kind)
      for share in 50 ${others[(round - 1) % 4]:-}; do paced $kind "$share" "$top"; done
    done
  done
  for kind in visit post; do
    for share in $(printf '%s\n' 50 "${others[@]}" | sort -n); do
      keep latency $kind "$share" "$(paced_median $kind "$share" 1)" "$(paced_median $kind "$share" 2)" \
        "$(paced_median $kind "$share" 3)"
    done
    p50=$(paced_median $kind 50 2) p99=$(paced_median $kind 50 3)
    row 8 "$(title $kind), p99 at half the top speed" "$p99" ms "p50" "$p50" \
      "$(ratios <(paced_figures $kind 50 3) <(paced_figures $kind 50 2))" most 10
  done
}

many_connections() {
  compare "9  GET /, 1,000 connections" "rate front visit 1000" "rate front visit"
  row 9 "GET /, 1,000 connections" "$ours" /s "64 connections" "$theirs" "$ratio" least 0.8
  compare "9  POST, 1,000 connections" "rate front post 1000" "rate front post"
  row 9 "POST, 1,000 connections" "$ours" /s "64 connections" "$theirs" "$ratio" least 0.8
}

# More than one instance can serve: it rejects requests with 503, and does not die.
overload() {
  progress "10  overload"
  local stored refused other broken peak state unmetered=1 seconds=$((LONG < 2 ? 2 : LONG))
  fill 1000
  # shellcheck disable=SC2016 # expanded in the container
  box load-backend bash -c 'ulimit -n "$(ulimit -Hn)"; exec wrk "$@"' -- -t 2 -c 4000 -d "${seconds}s" --timeout 5s \
    -s /bench/load.lua http://web1:9999/api/messages -- overload "$TEXT" >"$WORK/wrk"
  read -r _ stored refused other broken < <(grep '^wrk' "$WORK/wrk")
  keep fact overloadStored "$stored"; keep fact overloadRefused "$refused"
  keep fact overloadOther "$other"; keep fact overloadBroken "$broken"
  row 10 "POST, 4,000 on one instance: stored" "$(calc "$stored / $seconds" 0)" /s "503, Retry-After" \
    "$(calc "$refused / $seconds" 0)" "" least ""
  row 10 "  neither of these, and broken connections" $((other + broken)) "" "" "" "" most 0
  peak=$(in_status web1 VmHWM)
  row 10 "  the most memory it ever had, of 192 MB" "$(calc "$peak / 1024" 1)" MB "" "" "" most 192
  state=$(docker inspect --format '{{.State.OOMKilled}} {{.RestartCount}}' "$COMPOSE_PROJECT_NAME-web1-1")
  [ "$state" = "false 0" ] || say "overload: the instance was killed or restarted ($state)" >&2
  load direct newest 1 1 >"$WORK/warm" # until the overload is over
}
