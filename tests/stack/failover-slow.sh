# shellcheck shell=bash disable=SC2154,SC2034 # sourced by failover
# --- Subscribers that stay, clients that read nothing, bodies without end ---------------------------------------------

# subscribe RATE: every fault in turn, while twelve are subscribed and others write
subscribe() {
  start_subscribers "--network $frontend $DNS" nginx 9999 "$1" 12
  all_faults >"$WORK/out" 2>&1 || { fail "a fault itself"; cat "$WORK/out"; }
  sleep 2
  stop_subscribers
  summary="asked for $1/s: $(grep ^acknowledged= "$WORK/subscribers")"
  bound "acknowledged messages" "at least" 2000 "$(subscribed acknowledged)"
  bound "reconnects" "at least" 12 "$(subscribed reconnects)"
}
check_subscribers()      { subscribe 250; }
check_subscribers_busy() { subscribe 1000; }

all_faults() {
  do_rolling && kill_9 web2 && sleep 1 && start web2 && scale 6 && sleep 2 && kill_9 web-extra && scale 3 &&
    docker compose restart redis && kill_9 redis && sleep 2 && start redis && kill_9 web1 web3 && start web1 web3 &&
    docker compose restart postgres && postgres_is_back && kill_9 postgres && start postgres && postgres_is_back
}

# slow_clients NAME NETWORK HOST ARGUMENT...: in the background
slow_clients() {
  client "slow-$1" "--network $2 $DNS --cpu-shares 128 --ulimit nofile=16384" -Xmx256m \
    /clients/SlowClients.java "$3" 9999 "${@:4}" </dev/null >"$WORK/slow-$1" 2>&1 &
  pids+=($!)
}

# Readers from seven addresses: at each instance as many as it accepts, and through nginx more than it allows one
# address. The usual clients go on.
do_slow_readers() {
  local name pid most cursor pids=()
  processes >"$WORK/before-processes"
  levels_of_streams before
  cursor=$(curl -fsS -m 5 "$URL/api/messages?limit=1" | field cursor)
  printf '{"author":"test-failover","body":"%s"}' "$(printf '🙂%.0s' {1..2000})" >"$WORK/longest"
  curl -fsS -m 60 -o "$WORK/stored" "$URL/api/messages?[1-210]" -H 'Content-Type: application/json' -d "@$WORK/longest"
  for name in web1 web2 web3; do slow_clients $name "$backend" $name "$cursor" 1000 300 0 30; done
  for name in 1 2 3 4; do slow_clients nginx-$name "$frontend" nginx "$cursor" 300 150 0 30; done
  send others $((3 * 150 + 4 * 75)) # each second page is a visit
  for _ in $(seq 20); do
    sleep 1
    levels_of_streams now; cat "$WORK/now-bytes"
  done >"$WORK/bytes"
  for pid in "${pids[@]}"; do wait "$pid" || { cat "$WORK"/slow-*; return 1; }; done
  most=$(sort -nk2 "$WORK/bytes" | tail -n 1 | cut -d' ' -f2)
  more="; readers: $(total opened) connected, $(total 200) got 200, $(total 503) got 503, $(total 429) got 429;"
  more+=" at most $((most / 1024)) KB buffered; memory: $(memory | awk '{ print $1, $2 "/" $3 " MB" }' | paste -sd , -)"
  check "containers that died" "" "$(processes | diff "$WORK/before-processes" - || true)"
  check "containers at their memory limit" "" "$(memory | awk '$2 >= $3 || $4 != 0')"
  check "rejections without Retry-After" 0 "$(total without-retry-after)"
  bound "readers that got 200" "at least" 3000 "$(total 200)"
  bound "bytes buffered" "at least" 1000000 "$most"
  wait_for 20 holds released_by_readers || { fail "not released after 20 s"; cat "$WORK/holds"; }
}

# total WHAT: the sum of `WHAT=number` and `WHAT:number` in the slow clients' output
total() {
  cat "$WORK"/slow-* | grep -oE "(^|[ ,=])$1[=:][0-9]+" | awk -F '[=:]' '{ sum += $NF } END { print sum + 0 }'
}

# levels_of_streams NAME: the metrics of each instance in $WORK/NAME-subscribers and $WORK/NAME-bytes
levels_of_streams() {
  local name
  for name in web1 web2 web3; do
    docker compose exec -T nginx curl --noproxy "*" -sS -m 5 "http://$name:9999/metrics" | sed "s/^/$name /"
  done >"$WORK/metrics"
  awk '$2 == "threefold_sse_subscribers" { print $1, int($3) }' "$WORK/metrics" >"$WORK/$1-subscribers"
  awk '$2 == "threefold_buffered_bytes" { print $1, int($3) }' "$WORK/metrics" >"$WORK/$1-bytes"
}
released_by_readers() {
  levels_of_streams now
  not_above subscribers 0 "$WORK/before-subscribers" "$WORK/now-subscribers"
  not_above "buffered bytes" 0 "$WORK/before-bytes" "$WORK/now-bytes"
}

# memory: a line "service peak limit killed" for each, in MB; killed: its processes that the kernel ended for want of
# memory. Before Linux 5.19 with cgroup 2 there is no peak, and it is the current use.
memory() {
  local service
  for service in web1 web2 web3 nginx; do
    printf '%s %s\n' $service "$(docker compose exec -T $service sh -c 'cd /sys/fs/cgroup
      if [ -e memory.max ]; then
        if [ -e memory.peak ]; then cat memory.peak; else cat memory.current; fi
        cat memory.max memory.events
      else cd memory
        cat memory.max_usage_in_bytes memory.limit_in_bytes memory.oom_control; fi' |
      awk 'NF == 1 { printf "%d ", $1 / 1048576 } $1 == "oom_kill" { killed = $2 } END { print killed + 0 }')"
  done
}

# processes: a line for each container that changes if it dies or starts
processes() {
  docker compose ps -q |
    xargs docker inspect --format '{{.Name}} {{.RestartCount}} {{.State.OOMKilled}} {{.State.StartedAt}}'
}

check_huge_bodies() {
  local host
  processes >"$WORK/before-processes"
  levels VmRSS >"$WORK/before-VmRSS"
  for host in web1 web2 web3 nginx; do
    send_bodies $host 'Content-Length: 2000000000'
    send_bodies $host 'Transfer-Encoding: chunked'
  done
  check "containers that died" "" "$(processes | diff "$WORK/before-processes" - || true)"
  grown VmRSS 40960
  summary="eight at a time, to each instance and to nginx: 413 within $(sort -g "$WORK/huge" | tail -n 1) ms"
}

# send_bodies HOST HEADER: eight clients send chunks without end. They run in nginx's container, since only nginx
# reaches the instances; in bash, since curl does not read the response if it cannot send.
send_bodies() {
  local responses
  responses=$(docker compose exec -T nginx bash -c '
    trap "" PIPE
    one() {
      local began=${EPOCHREALTIME/./} status sending
      exec 7<>"/dev/tcp/$1/9999"
      { printf "POST /api/messages HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n%s\r\n\r\n" "$2"
        while printf "1000\r\n%4096s\r\n" x; do :; done; } >&7 2>/dev/null & sending=$!
      read -r -t 10 -u 7 _ status _
      echo "${status:-none} $(((${EPOCHREALTIME/./} - began) / 1000))"
      kill $sending 2>/dev/null
    }
    for n in 1 2 3 4 5 6 7 8; do one "$@" & done
    wait' -- "$@" 2>"$WORK/out") || true
  cut -d' ' -f2 <<<"$responses" >>"$WORK/huge"
  check "$1, $2: 413 within 2,000 ms" 8 "$(awk '$1 == 413 && $2 < 2000' <<<"$responses" | grep -c .)"
}
