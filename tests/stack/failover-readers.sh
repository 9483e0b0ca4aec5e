# shellcheck shell=bash disable=SC2154,SC2034 # sourced by tests/stack/failover, whose variables these are
# --- Those who read: viewers who stay, readers who take nothing, and bodies without end -----------------------------

# run_java NAME NETWORK JAVA-ARGUMENTS...: in a container of its own, which yields to the stack
run_java() {
  docker run --rm --interactive --name "$LOAD-$1" --network "$2" --dns-opt timeout:1 --dns-opt attempts:1 \
    --cpu-shares 128 --ulimit nofile=16384 --volume "$PWD/tests/clients:/clients:ro" --entrypoint java \
    "${JBANG_IMAGE:-jbangdev/jbang:0.132.1-java-21}" "${@:3}"
}

# all_that_breaks: one after the other, with a little time between
all_that_breaks() {
  do_rolling && kill_9 web2 && sleep 1 && start web2 && scale 6 && sleep 2 && kill_9 web-extra && scale 3 &&
    docker compose restart redis && kill_9 redis && sleep 2 && start redis && kill_9 web1 web3 && start web1 web3 &&
    docker compose restart postgres && postgres_is_back && kill_9 postgres && start postgres && postgres_is_back
}

# watched RATE: what breaks while twelve view and others write; each viewer has to have every message, in order, once
watched() {
  local answer viewing broke=0
  mkfifo "$WORK/stop-viewers"
  run_java viewers "$frontend" -Xmx512m /clients/SseClients.java nginx 9999 "$1" 12 \
    <"$WORK/stop-viewers" >"$WORK/viewers" 2>&1 &
  viewing=$!
  exec 6>"$WORK/stop-viewers"
  rm "$WORK/stop-viewers"
  { sleep 3 && all_that_breaks && sleep 2; } >"$WORK/out" 2>&1 || broke=1
  exec 6>&-
  wait $viewing || broke=1
  [ $broke = 0 ] || { cat "$WORK/out" "$WORK/viewers"; return 1; }
  answer=$(grep ^acknowledged= "$WORK/viewers")
  summary="asked for $1/s: $answer"
  # (who saw little, or never had to come back, has shown nothing)
  if nothing_wrong wrong && [ "$(value acknowledged)" -ge 2000 ] &&
    [ "$(value returns)" -ge "$(value viewers)" ]; then return; fi
  say "expected 2,000 messages or more, returns of all viewers, and nothing wrong:"
  cat "$WORK/viewers"
  return 1
}
check_viewers()      { watched 250; }
check_viewers_busy() { watched 1000; }

# readers NAME NETWORK HOST VIEWERS PAGES: in the background, for 30 s
readers() {
  run_java "readers-$1" "$2" -Xmx256m /clients/SlowClients.java "$3" 9999 30 "$4" "$5" 30 \
    </dev/null >"$WORK/readers-$1" 2>&1 &
}

# From seven addresses: at each instance about as many as it has places for, and through nginx more than it gives one
# address. The usual clients go on meanwhile.
do_slow_readers() {
  local name address before most=0 pid pids=() told
  before=$(lives)
  viewing_and_held >"$WORK/before-held"
  for name in web1 web2 web3; do readers $name "$backend" $name 1000 300; pids+=($!); done
  for address in 1 2 3 4; do readers nginx-$address "$frontend" nginx 300 150; pids+=($!); done
  ask others $((3 * 150 + 4 * 75))   # each second page is a visit
  for _ in $(seq 20); do
    sleep 1
    viewing_and_held >"$WORK/held"
    most=$(awk -v most="$most" '{ if ($3 > most) most = $3 } END { print most }' "$WORK/held")
  done
  for pid in "${pids[@]}"; do wait "$pid" || { cat "$WORK"/readers-*; return 1; }; done
  told=$(cat "$WORK"/readers-*)
  more="; readers: $(total open) open, $(total 200) of them answered, $(total 503) told 503, $(total 429) told 429;"
  more+=" at most $((most / 1024)) KB waited; memory: $(memory | awk '{ print $1, $2 "/" $3 " MB" }' | paste -sd , -)"
  [ "$before" = "$(lives)" ] || { say "expected that nothing dies, saw:"; diff <(echo "$before") <(lives); return 1; }
  memory | awk '$2 >= $3 || $4 != 0 { print "expected less memory than is allowed, saw: " $0; bad = 1 }
    END { exit bad }' || return 1
  if [ "$(total unkind)" != 0 ] || [ "$(total 200)" -lt 3000 ] || [ "$most" -lt 1000000 ]; then
    say "expected 3,000 answered, over 1,000 KB that waited, and a Retry-After for the others; saw$more:"
    say "$told"
    return 1
  fi
  eventually nobody_is_left
}

# total WHAT: of `WHAT=number` or `WHAT:number` in all that the readers said
total() {
  grep -hoE "(^|[ ,=])$1[=:][0-9]+" <<<"$told" | awk -F '[=:]' '{ sum += $NF } END { print sum + 0 }'
}

# viewing_and_held: a line "instance viewers bytes" for each, as its metrics have it
viewing_and_held() {
  local name
  for name in web1 web2 web3; do
    docker compose exec -T nginx curl --noproxy "*" -sS -m 5 "http://$name:9999/metrics" | awk -v name=$name '
      $1 ~ /event_viewers$/ { viewers = int($2) } $1 ~ /held_bytes$/ { held = int($2) }
      END { print name, viewers, held }'
  done
}

nobody_is_left() {
  viewing_and_held >"$WORK/held"
  within "viewers" 0 "$(cut -d' ' -f1,2 "$WORK/before-held")" "$(cut -d' ' -f1,2 "$WORK/held")" &&
    within "bytes that wait" 0 "$(cut -d' ' -f1,3 "$WORK/before-held")" "$(cut -d' ' -f1,3 "$WORK/held")"
}

# memory: a line "service most limit killed" for each, in MB: the most since it was started, and how many of its
# processes the kernel ended for it. (Where the kernel does not know the most, before 5.19, it is what is used now: the
# last number shows all the same whether it was ever too much.)
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

# lives: what changes when a container dies or is started
lives() {
  docker compose ps -q |
    xargs docker inspect --format '{{.Name}} {{.RestartCount}} {{.State.OOMKilled}} {{.State.StartedAt}}'
}

# What says that it is 2 GB, and what never ends: refused at once, before there is room made for it.
check_huge_bodies() {
  local host before bad=0
  before=$(lives); levels VmRSS >"$WORK/before-VmRSS"
  for host in web1 web2 web3 nginx; do
    huge $host 'Content-Length: 2000000000' || bad=1
    huge $host 'Transfer-Encoding: chunked' || bad=1
  done
  [ "$before" = "$(lives)" ] || { say "expected that nothing dies, saw:"; diff <(echo "$before") <(lives); bad=1; }
  levels VmRSS >"$WORK/after-VmRSS"
  within "resident KB" 40960 "$(cat "$WORK/before-VmRSS")" "$(cat "$WORK/after-VmRSS")" || bad=1
  summary="eight at a time, to each instance and to nginx: 413 within $(sort -g "$WORK/huge" | tail -n 1) ms"
  return $bad
}

# huge HOST HEADER: eight at the same time, each sends chunks for as long as it can. They are in nginx's container,
# since nobody else reaches the instances. (curl gives up on an answer when it can't send; this reads it all the same.)
huge() {
  local said
  said=$(docker compose exec -T nginx bash -c '
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
  cut -d' ' -f2 <<<"$said" >>"$WORK/huge"
  [ "$(awk '$1 == 413 && $2 < 2000' <<<"$said" | wc -l)" -eq 8 ] ||
    { say "$1, $2: expected 413 within 2,000 ms for eight, saw:"; say "$said"; tail -n 3 "$WORK/out"; return 1; }
}
