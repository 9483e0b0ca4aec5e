# shellcheck shell=bash disable=SC2034,SC2153,SC2154 # sourced by run, whose variables these are
# Rows 11, 12, 14, 15, 17 and 18: one function each, in the order in which they run.

# hold SIZE: `messages` is the table of that size. The other tables are in schemas of their own (n1000), so that all
# sizes are measured in turn.
hold() {
  local held; held=$(cat "$WORK/held")
  [ "$held" = "$1" ] || sql <<<"BEGIN; ALTER TABLE messages SET SCHEMA n$held;
    ALTER TABLE n$1.messages SET SCHEMA public; COMMIT"
  printf %s "$1" >"$WORK/held"
}

# page_millis PAGE SIZE: one client's median, of the newest page, one from the middle, or one message from there
page_millis() {
  local path middle
  hold "$2"
  middle=$(sql <<<'SELECT (min(id) + max(id)) / 2 FROM messages')
  case $1 in
    newest) path='/api/messages?limit=20' ;;
    middle) path="/api/messages?limit=20&before=$middle" ;;
    one)    path=/api/messages/$middle ;;
  esac
  load direct "$path" 1 "$PAGE" | cut -d' ' -f3
}

page_time() {
  local size page before="" i=0 name largest commands=()
  for size in $SIZES; do
    progress "11  filling: $size messages"
    [ -z "$before" ] || sql <<<"ALTER TABLE messages SET SCHEMA n$before;
      CREATE TABLE messages (LIKE n$before.messages INCLUDING ALL); ALTER TABLE messages OWNER TO \"$DB_USER\""
    sql <<<"CREATE SCHEMA n$size"
    fill "$size"
    before=$size
    for page in newest middle one; do commands+=("page_millis $page $size"); done
  done
  printf %s "$size" >"$WORK/held"
  in_turn "11  pages among $(tr ' ' / <<<"$SIZES") messages" "${commands[@]}"
  for size in $SIZES; do
    for page in newest middle one; do keep pages $page "$size" "${MEDIAN[i]}"; i=$((i + 1)); done
  done
  hold 1000
  for size in $SIZES; do sql <<<"DROP SCHEMA n$size CASCADE" 2>"$WORK/log"; done
  largest=$(awk -v n="$size" 'BEGIN { print n < 1e6 ? n / 1e3 ",000" : n / 1e6 ",000,000" }')
  for page in newest middle one; do
    case $page in newest) name="newest 20" ;; middle) name="from the middle" ;; one) name="one message by id" ;; esac
    read -r ours theirs < <(awk -F'\t' -v page=$page '$1 == "pages" && $2 == page {
      if (!low || $4 < low) low = $4; if ($4 > high) high = $4 } END { print high, low }' "$DATA")
    row 11 "$name, 1,000 to $largest: slowest" "$ours" ms "quickest" "$theirs" "$(ratio "$ours" "$theirs")" most 1.2
  done
}

# instances N: nginx uses the first N of six; the other instances stay warm and idle
instances() {
  local unknown=none
  case $1 in 1) unknown='web[23]|web-extra' ;; 3) unknown=web-extra ;; esac
  nginx_conf "${BALANCE:-least_conn}" | sed -E "/server ($unknown):/d" >"$NGINX_CONF" # the file that is mounted
  quietly box nginx sh -c 'cp /etc/nginx/nginx.conf /tmp/nginx.conf && nginx -c /tmp/nginx.conf -s reload'
  await_instances "$1"
}
await_instances() { wait_for 30 respond "$1" || { say "$seen instances respond, not $1" >&2; return 1; }; }
respond() {
  seen=$(curl -s -m 20 -D - -o /dev/null "$URL/healthz?[1-30]" | grep -i '^x-instance-id' | sort -u | wc -l)
  [ "$seen" -eq "$1" ]
}

# Each instance has so small a share of a CPU that the instances, and not the machine, are the limit. 64 connections for
# each. By least_conn: an instance that has used its share pauses, and under round-robin requests wait there.
by_instances() {
  local unmetered=1 round n kind
  progress "12  six instances"
  COMPOSE_FILE=$COMPOSE_FILE:bench/small.yml compose_up --scale web-extra=3 web1 web2 web3 web-extra
  instances 6
  warm_up "$WARM_UP" visit post
  share_of_each "$SHARE"
  rm -f "$WORK"/by-*
  for round in $(seq "$RUNS"); do
    for n in 6 3 1; do
      progress "12  throughput with $n instances, round $round of $RUNS"
      instances $n
      for kind in visit post; do rate front $kind $((64 * n)) >>"$WORK/by-$kind-$n"; done
    done
  done
  for kind in visit post; do
    for n in 1 3 6; do keep instances $kind $n "$(median <"$WORK/by-$kind-$n")"; done
    scaled $kind 3 1 "1 instance" 2.4
    scaled $kind 6 3 "3 instances" 1.7
  done
}

# share_of_each SHARE: of a CPU, for each running instance
share_of_each() {
  local ids
  mapfile -t ids < <(docker compose ps -q web1 web2 web3 web-extra)
  quietly docker update --cpu-quota "$(calc "$1 * 10000" 0)" "${ids[@]}"
}

# scaled KIND MORE FEWER FEWER_IN_WORDS WANTED
scaled() {
  local ours=$WORK/by-$1-$2 theirs=$WORK/by-$1-$3
  row 12 "$(title "$1"), $2 instances of $SHARE CPUs" "$(median <"$ours")" /s "$4" "$(median <"$theirs")" \
    "$(ratios "$ours" "$theirs")" least "$5"
}

start_time() {
  local how seconds
  progress "14  start with and without the trained cache"
  start_seconds "cache=java/bin/java @java.options -XX:AOTCache=/opt/threefold/service.aot Service" \
    "without=java/bin/java @java.options -Xshare:off Service"
  while read -r how seconds; do
    keep run "14  start" "$how" "$seconds"
    printf '%s\n' "$seconds" >>"$WORK/start-$how"
  done <"$WORK/starts"
  row 14 "process start to the first 200" "$(median <"$WORK/start-cache")" s "without the cache" \
    "$(median <"$WORK/start-without")" "$(ratios "$WORK/start-cache" "$WORK/start-without")" most 0.3
}

# The time of a rolling update, and the latency at half the top speed in the seconds after it.
roll() {
  local unmetered=1 began seconds=$((LONG * 2)) top warm after
  progress "18  visits at half the top speed, before and after all three are replaced"
  top=$(rate front visit)
  warm=$(load front visit 64 "$seconds" "$(calc "$top / 2" 0)" | cut -d' ' -f4)
  began=$(now)
  quietly scripts/rolling
  row 15 "three instances replaced, one at a time" "$(calc "$(now) - $began" 1)" s "" "" "" most 45
  after=$(load front visit 64 "$seconds" "$(calc "$top / 2" 0)" | cut -d' ' -f4)
  row 18 "GET /, p99 in the $seconds s after that" "$after" ms "before it" "$warm" \
    "$(ratio "$after" "$warm")" most 3
}

build_again() {
  local began copy=$WORK/copy step downloads
  progress "15  building again after a changed line"
  mkdir "$copy" "$copy/bench"
  cp -r init.sql openapi.json page scripts jbang Dockerfile .dockerignore docker-compose.yml https.yml image monitor \
    "$copy"
  cp bench/compose.yml "$copy/bench"
  sed "s/^public final class Service/\/** $RUN *\/ &/" Service.java >"$copy/Service.java"
  began=$(now)
  (cd "$copy" && docker compose --progress plain build web1) >"$WORK/build" 2>&1 ||
    { tail -n 20 "$WORK/build" >&2; return 1; }
  row 15 "image built again after one changed line" "$(calc "$(now) - $began" 1)" s "" "" "" most 30
  # The step that downloads the libraries has to come from the cache.
  step=$(sed -n 's/^\(#[0-9]*\) .*jbang info classpath.*/\1/p' "$WORK/build" | sed -n 1p)
  grep -q "^$step CACHED" "$WORK/build" && downloads=0 || downloads=1
  row 15 "  steps of it that download" $downloads "" "" "" "" most 0
}

from_up_to_rebuild() {
  row 15 "up, from empty volumes to six healthy" "$(median <"$WORK/ups")" s "" "" "" most 12
  row 15 "image of the service, unpacked" "$(image_mb threefold-bench-web)" MB "" "" "" most 120
  if quick; then roll & build_again; wait $!; else roll; build_again; fi
}
