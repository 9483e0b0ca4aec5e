# shellcheck shell=bash disable=SC2154 # sourced by tests/stack/failover, whose variables these are
# --- Cases without the usual load -------------------------------------------------------------------------------------

check_durable_settings() {
  local expected saw bad=0 syncs messages=20
  expected="fsync on, full_page_writes on, synchronous_commit on"
  saw=$(as_service "SELECT string_agg(name || ' ' || setting, ', ' ORDER BY name) FROM pg_settings
    WHERE name IN ('fsync', 'synchronous_commit', 'full_page_writes')")
  [ "$saw" = "$expected" ] || { say "PostgreSQL, as the service's user: expected $expected, saw $saw"; bad=1; }
  expected="appendonly yes appendfsync always"
  saw=$(for name in appendonly appendfsync; do docker compose exec -T redis redis-cli --raw config get $name; done |
    paste -sd' ' -)
  [ "$saw" = "$expected" ] || { say "Redis: expected $expected, saw $saw"; bad=1; }
  syncs=$(syncs_of_instances $messages)
  # Not quite as many: now and then the log's own writer happens to be first.
  [ "$syncs" -ge $((messages * 9 / 10)) ] ||
    { say "PostgreSQL: $messages messages in turn: expected about as many waits for the disk, saw $syncs"; bad=1; }
  [ $bad = 0 ] || return 1
  summary="fsync, synchronous_commit, full_page_writes on, appendfsync always;"
  summary+=" $syncs waits for the disk for $messages messages"
}

as_service() {
  docker compose exec -T postgres bash -c \
    'PGUSER="$DB_USER" PGPASSWORD="$DB_PASS" psql -qAtX -F " " -h 127.0.0.1 -c "$1"' -- "$1"
}

# Each message is stored alone, so each needs a sync of the log of its own, by the connection that commits. With
# synchronous_commit off another process does that later; with fsync off nobody does.
syncs_of_instances() {
  local before
  before=$(wal_syncs)
  store_one_by_one "$1" && sleep 1.2 && store_one_by_one 6 >&2 || return 1   # six more: counts are told once a second
  say $(($(wal_syncs) - before))
}

store_one_by_one() {
  curl -fsS -m 10 -o "$WORK/stored" "$URL/api/messages?[1-$1]" -H 'Content-Type: application/json' \
    -d "{\"author\":\"test-failover\",\"body\":\"$RUN durable\"}"
}

wal_syncs() {
  psql "SELECT coalesce(sum(io.fsyncs), 0) FROM pg_stat_activity a, pg_stat_get_backend_io(a.pid) io
        WHERE a.application_name LIKE 'threefold %' AND io.object = 'wal'"
}

# 25 MB of events, and five that were stopped after they had subscribed. (They have no name; the instances have.)
check_deaf_listeners() {
  local said
  said=$(docker compose exec -T redis bash -c '
    for n in 1 2 3 4 5; do redis-cli subscribe threefold:events >/dev/null & deaf="$deaf $!"; done
    trap "kill -9 $deaf; rm /tmp/event" EXIT
    for try in $(seq 100); do
      [ "$(redis-cli client list type pubsub | grep -c " name= ")" -lt 5 ] || break; sleep 0.1
    done
    kill -STOP $deaf
    head -c 500000 /dev/zero | tr "\0" x >/tmp/event
    for n in $(seq 50); do redis-cli -x publish threefold:events </tmp/event; done | sed -n 1p
    redis-cli incr threefold:deaf; redis-cli del threefold:deaf' 2>&1) || true
  [ "$(sed -n 1p <<<"$said")" -ge 8 ] && [ "$(sed -n 2p <<<"$said")" = 1 ] ||
    { say "expected the event to be told to five and three instances, and a 1 from Redis; saw:"; say "$said"
      return 1; }
  summary="the first event went to $(head -n 1 <<<"$said"); after 25 MB of them Redis counts"
}

check_hang_ups() {
  local what
  for what in descriptors Threads VmRSS; do levels $what >"$WORK/before-$what"; done
  nginx_descriptors >"$WORK/before-nginx"
  ask hang-up 10000
  summary="$(value hung-up) clients hung up"
  [ "$(value hung-up)" -ge 9900 ] ||
    { say "expected 10000 clients to get as far as hanging up, saw $(value hung-up)"; return 1; }
  eventually back_to_before || return 1
  summary="$summary; $(tr '\n' ' ' <"$WORK/levels")"
}

back_to_before() {
  local what
  for what in descriptors Threads VmRSS; do levels $what >"$WORK/after-$what"; done
  nginx_descriptors >"$WORK/after-nginx"
  for what in descriptors Threads VmRSS nginx; do
    printf '%s %s -> %s\n' $what "$(awk '{ s = s sep $2; sep = "/" } END { print s }' "$WORK/before-$what")" \
      "$(awk '{ s = s sep $2; sep = "/" } END { print s }' "$WORK/after-$what")"
  done >"$WORK/levels"
  # 20 descriptors: connections of nginx that are kept for 2 s; 40 MB: what a heap grows to before it is collected.
  within descriptors 20 "$(cat "$WORK/before-descriptors")" "$(cat "$WORK/after-descriptors")" &&
    within threads 4 "$(cat "$WORK/before-Threads")" "$(cat "$WORK/after-Threads")" &&
    within "resident KB" 40960 "$(cat "$WORK/before-VmRSS")" "$(cat "$WORK/after-VmRSS")" &&
    within "nginx's descriptors" 20 "$(cat "$WORK/before-nginx")" "$(cat "$WORK/after-nginx")"
}

# eventually COMMAND: within 20 s
eventually() {
  local deadline=$((SECONDS + 20))
  until "$@" >"$WORK/eventually" 2>&1; do
    [ $SECONDS -lt $deadline ] || { cat "$WORK/eventually"; return 1; }
    sleep 1
  done
}

check_nginx_errors() {
  local bad=0 path host
  head -c 40960 /dev/zero | tr '\0' x >"$WORK/40k"
  { printf 'X-Long: '; head -c 65536 /dev/zero | tr '\0' x; } >"$WORK/64k"
  refused 413 "$URL/api/messages" -H 'Content-Type: application/json' -H 'Expect:' --data-binary "@$WORK/40k" || bad=1
  refused 431 "$URL/api/messages" -H "@$WORK/64k" || bad=1
  for path in /metrics /metrics/ /%6detrics //metrics /./metrics '/metrics?a' /nothing/..%2fmetrics; do
    refused 404 "$URL$path" --path-as-is || bad=1
  done
  for path in /api/messages/%00 '/..%2f..%2fetc/passwd' /%2e%2e/etc/passwd /% '/a%zz'; do
    refused 400 "$URL$path" --path-as-is || bad=1
  done
  refused 400 -X "$(printf 'A%.0s' {1..40})" "$URL/" || bad=1
  for path in Accept Content-Type Content-Encoding Idempotency-Key Last-Event-ID; do
    refused 400 "$URL/" -H "$path: a"$'\x01'b || bad=1
  done
  printf 'GET /healthz HTTP/1.1\r\nHost: a\r\nX: a\x01b\r\n%sConnection: close\r\n\r\n' \
    "$(printf 'X%s: a\r\n' {1..900})"$'\r\n' | exchange | grep '"status":"ok"' >/dev/null ||
    { say "headers that no instance reads are not passed over"; bad=1; }
  refused 405 -X TRACE "$URL/" || bad=1
  grep -qi '^allow: GET, HEAD, OPTIONS' "$WORK/head" || { say "Allow is not what an instance says"; bad=1; }
  printf '\x16\x03\x01\x02 no HTTP\r\n\r\n' | exchange | grep '"status":400' >/dev/null ||
    { say "what is no HTTP is not refused"; bad=1; }
  printf 'GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\nConnection: close\r\n\r\n' | exchange |
    grep '"status":400' >/dev/null ||
    { say "two Hosts are not refused"; bad=1; }
  printf 'GET /healthz HTTP/1.0\r\n\r\n' | exchange | grep '"status":"ok"' >/dev/null ||
    { say "HTTP/1.0 without a Host is not served"; bad=1; }
  for host in localhost: a:0 a%zz; do      # legal for nginx; an instance would close the connection
    printf 'GET /healthz HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n' "$host" | exchange |
      grep '"status":"ok"' >/dev/null || { say "Host: $host is not served"; bad=1; }
  done
  [ $bad = 0 ] || return 1
  summary="400, 405, 413, 431; 404 for seven ways to write /metrics; HTTP/1.0 without a Host and odd Hosts are served"
}

# The image brings no servers of its own, and says so.
check_no_stores() {
  local said code=0
  said=$(docker run --rm "$(docker inspect --format '{{.Image}}' "$(docker compose ps -q web1)")" 2>&1) || code=$?
  [ $code = 2 ] && [ "$(wc -l <<<"$said")" -eq 1 ] && [[ $said == *DB_HOST*REDIS_HOST* ]] ||
    { say "expected one line that names DB_HOST and REDIS_HOST, and exit code 2; saw $code:"; say "$said"; return 1; }
  summary="exit code 2: $said"
}

# As POSTGRES_IMAGE=postgres:18 finds what 17 has left.
check_other_version() {
  local said
  mkdir -p "$WORK/volume/17/docker" && echo 17 >"$WORK/volume/17/docker/PG_VERSION" && chmod -R a+rwX "$WORK"
  said=$(docker compose run --rm --no-deps -T --volume "$WORK/volume:/var/lib/postgresql" postgres 2>&1) || true
  grep -q 'POSTGRES_IMAGE.*holds data of 17' <<<"$said" && [ "$(ls "$WORK/volume")" = 17 ] ||
    { say "expected that it names the version of the volume and leaves it, saw:"; say "$said" | tail -n 5; return 1; }
  summary="refused, and left as it is"
}

# exchange: sends standard input to nginx as it is, and prints what comes back
exchange() {
  local address=${URL#http://} line said=''
  exec 7<>"/dev/tcp/${address%%:*}/${address##*:}"
  cat >&7
  while IFS= read -r -t 5 -u 7 line || [ -n "$line" ]; do said+=$line$'\n'; done # (macOS has no `timeout`)
  say "$said"
  exec 7>&-
}

# refused STATUS CURL-ARGUMENTS...: with a problem in JSON that names the status, and a request id
refused() {
  local status=$1; shift
  curl -sS -m 10 -D "$WORK/head" -o "$WORK/body" "$@" || true
  tr -d '\r' <"$WORK/head" | awk -v status="$status" '
    NR == 1 && $2 == status { found++ } tolower($1) == "content-type:" && $2 == "application/problem+json" { found++ }
    tolower($1) == "x-request-id:" && $2 != "" { found++ } END { exit found != 3 }' &&
    grep -qE "\"status\":${status}[,}]" "$WORK/body" ||
    { say "$*" | cut -c1-120; say "expected $status as application/problem+json with X-Request-Id, saw:"
      cat "$WORK/head" "$WORK/body"; return 1; }
}

# For a moment the clients' container is an instance itself, and sees what nginx tells one.
check_forwarded() {
  docker network connect --alias web-extra "$backend" "$LOAD" || return 1
  ask forwarded
  docker network disconnect "$backend" "$LOAD"
  local told own; told=$(value told | tr '|' '\n'); own=$(value own)
  grep -qx "x-forwarded-for:$own" <<<"$told" && grep -qx "x-real-ip:$own" <<<"$told" &&
    grep -qx "x-forwarded-proto:http" <<<"$told" && ! grep -q '^forwarded:\|203.0.113.7' <<<"$told" ||
    { say "expected X-Forwarded-For $own and nothing of 203.0.113.7, saw:"; say "$told"; return 1; }
  summary="X-Forwarded-For and X-Real-IP are the client's own address, whatever it says"
}

check_everything() {
  ask everything
  summary="$(value messages) messages acknowledged, $(value unknown) unknown;"
  summary+=" lost $(value lost), doubled $(value doubled)"
  nothing_wrong lost doubled unexpected ids || { say "$answer"; return 1; }
}
