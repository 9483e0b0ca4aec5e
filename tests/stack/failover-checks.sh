# shellcheck shell=bash disable=SC2154 # sourced by failover
# --- Cases without the usual load -------------------------------------------------------------------------------------

check_durable_settings() {
  local before messages=20 syncs name
  check "PostgreSQL, as the service's user" "fsync on, full_page_writes on, synchronous_commit on" "$(
    docker compose exec -T postgres bash -c \
      'PGUSER="$DB_USER" PGPASSWORD="$DB_PASS" psql -qAtX -h 127.0.0.1 -c "$1"' -- \
      "SELECT string_agg(name || ' ' || setting, ', ' ORDER BY name) FROM pg_settings
       WHERE name IN ('fsync', 'synchronous_commit', 'full_page_writes')")"
  check "Redis" "appendonly yes appendfsync always" "$(for name in appendonly appendfsync; do
    docker compose exec -T redis redis-cli --raw config get $name; done | paste -sd' ' -)"
  # Each message is stored alone, so the connection that commits it syncs the log. Six more, a second later, since
  # PostgreSQL publishes these numbers once a second. The log's own writer sometimes syncs first.
  before=$(wal_syncs)
  store $messages && sleep 1.2 && store 6 || fail "the messages were not stored"
  syncs=$(($(wal_syncs) - before))
  bound "PostgreSQL's syncs for $messages messages in turn" "at least" $((messages * 9 / 10)) $syncs
  summary="fsync, synchronous_commit, full_page_writes on, appendfsync always; $syncs syncs for $messages messages"
}
store() {
  curl -fsS -m 10 -o "$WORK/stored" "$URL/api/messages?[1-$1]" -H 'Content-Type: application/json' \
    -d "{\"author\":\"test-failover\",\"body\":\"$RUN durable\"}"
}
wal_syncs() {
  psql "SELECT coalesce(sum(io.fsyncs), 0) FROM pg_stat_activity a, pg_stat_get_backend_io(a.pid) io
        WHERE a.application_name LIKE 'threefold %' AND io.object = 'wal'"
}

# 25 MB of heartbeats, and five subscribers that hang. They have no name; instances have one.
check_stalled_subscribers() {
  local seen
  seen=$(docker compose exec -T redis bash -c '
    for n in 1 2 3 4 5; do redis-cli subscribe threefold:instances:0 >/dev/null & stalled="$stalled $!"; done
    trap "kill -9 $stalled; rm /tmp/heartbeat" EXIT
    for try in $(seq 100); do
      [ "$(redis-cli client list type pubsub | grep -c " name= ")" -lt 5 ] || break; sleep 0.1
    done
    kill -STOP $stalled
    head -c 500000 /dev/zero | tr "\0" x >/tmp/heartbeat
    for n in $(seq 50); do redis-cli -x publish threefold:instances:0 </tmp/heartbeat; done | sed -n 1p
    redis-cli incr threefold:stalled; redis-cli del threefold:stalled' 2>&1) || true
  bound "subscribers that got the first heartbeat" "at least" 8 "$(sed -n 1p <<<"$seen")"
  check "Redis counts" 1 "$(sed -n 2p <<<"$seen")"
  summary="the first heartbeat went to $(sed -n 1p <<<"$seen"); after 25 MB of them Redis counts"
}

check_client_disconnects() {
  local what
  for what in descriptors Threads VmRSS nginx; do levels $what >"$WORK/before-$what"; done
  send disconnect 10000
  bound "clients that disconnected, of 10,000" "at least" 9900 "$(value disconnected)"
  summary="$(value disconnected) clients disconnected"
  wait_for 20 holds released || { fail "not released after 20 s"; cat "$WORK/holds"; }
  for what in descriptors Threads VmRSS nginx; do
    summary+="; $what $(cut -d' ' -f2 "$WORK/before-$what" | paste -sd/ -)"
    summary+=" -> $(cut -d' ' -f2 "$WORK/after-$what" | paste -sd/ -)"
  done
}
# nginx keeps connections for 2 s; a heap of 40 MB is normal before it is collected.
released() { grown descriptors 20; grown Threads 4; grown VmRSS 40960; grown nginx 20; }

check_nginx_errors() {
  local path host
  head -c 40960 /dev/zero | tr '\0' x >"$WORK/40k"
  { printf 'X-Long: '; head -c 65536 /dev/zero | tr '\0' x; } >"$WORK/64k"
  rejected 413 "$URL/api/messages" -H 'Content-Type: application/json' -H 'Expect:' --data-binary "@$WORK/40k"
  rejected 431 "$URL/api/messages" -H "@$WORK/64k"
  for path in /metrics /metrics/ /%6detrics //metrics /./metrics '/metrics?a' /nothing/..%2fmetrics; do
    rejected 404 "$URL$path" --path-as-is
  done
  for path in /api/messages/%00 '/..%2f..%2fetc/passwd' /%2e%2e/etc/passwd /% '/a%zz'; do
    rejected 400 "$URL$path" --path-as-is
  done
  rejected 400 -X "$(printf 'A%.0s' {1..40})" "$URL/"
  for path in Accept Content-Type Content-Encoding Idempotency-Key Last-Event-ID; do
    rejected 400 "$URL/" -H "$path: a"$'\x01'b
  done
  rejected 405 -X TRACE "$URL/"
  grep -qi '^allow: GET, HEAD, OPTIONS' "$WORK/head" || fail "Allow is not what an instance sends"
  check "a request that is no HTTP" 400 "$(raw <<<$'\x16\x03\x01\x02 no HTTP\r\n\r' | field status)"
  check "two Hosts" 400 "$(printf 'GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\nConnection: close\r\n\r\n' | raw |
    field status)"
  check "HTTP/1.0 without a Host" ok "$(printf 'GET /healthz HTTP/1.0\r\n\r\n' | raw | field status)"
  check "headers that no instance reads" ok "$(printf 'GET /healthz HTTP/1.1\r\nHost: a\r\nX: a\x01b\r\n%s%s' \
    "$(printf 'X%s: a\r\n' {1..900})"$'\r\n' $'Connection: close\r\n\r\n' | raw | field status)"
  for host in localhost: a:0 a%zz; do # valid for nginx; an instance would close the connection
    check "Host: $host" ok "$(printf 'GET /healthz HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n' "$host" | raw |
      field status)"
  done
  summary="400, 405, 413, 431; 404 for seven ways to write /metrics; HTTP/1.0 without a Host and odd Hosts are served"
}

# rejected STATUS CURL-ARGUMENT...: with a problem in JSON that names the status, and a request id
rejected() {
  local status=$1; shift
  curl -sS -m 10 -D "$WORK/head" -o "$WORK/body" "$@" || true
  check "$(cut -c1-120 <<<"$*")" "$status application/problem+json id $status" "$(tr -d '\r' <"$WORK/head" | awk '
    NR == 1 { status = $2 } tolower($1) == "content-type:" { type = $2 }
    tolower($1) == "x-request-id:" && $2 != "" { id = "id" }
    END { print status, type, id }') $(field status <"$WORK/body")"
}

# Alive, ready and healthy are three things: PostgreSQL serves all instances, so its end says nothing about one of them.
check_health() {
  local all="web1 web2 web3" codes used
  docker compose stop postgres
  wait_for 5 holds each /readyz "degraded 200" || true
  each /healthz "ok 200"
  each /readyz "degraded 200"
  codes=$(health_checks)
  check "exit codes of Docker's health checks, without PostgreSQL" "web1 0 web2 0 web3 0 nginx 0" "$codes"
  check "instances that nginx uses, without PostgreSQL" "$all" "$(in_use)"
  check "a message, without PostgreSQL" 503 "$(post test-failover "$RUN health" | tail -n 1)"
  check "a visit, without PostgreSQL" 200 "$(curl -sS -m 5 -o "$WORK/visit" -w '%{http_code}' "$URL/")"
  start postgres && postgres_is_back || fail "PostgreSQL starts"
  wait_for 5 holds each /readyz "ready 200" || fail "5 s after PostgreSQL is back: $(cat "$WORK/holds")"
  check "a message, with PostgreSQL" 201 "$(post test-failover "$RUN health" | tail -n 1)"

  say 'services: {web2: {healthcheck: {test: ["CMD", "false"], interval: 1s, start_period: 0s, retries: 1}}}' \
    >"$WORK/unhealthy.yml"
  docker compose -f docker-compose.yml -f "$WORK/unhealthy.yml" up --detach --no-deps --no-build web2
  wait_for 20 unhealthy web2 && wait_for 5 serves web2 || fail "web2 is unhealthy and serves"
  used=$(in_use)
  check "instances that nginx uses, while Docker calls web2 unhealthy" "$all" "$used"
  check "web2 in Docker" "unhealthy, 0 restarts" "$(docker compose ps -q web2 |
    xargs docker inspect --format '{{.State.Health.Status}}, {{.RestartCount}} restarts')"
  replace web2
  summary="without PostgreSQL, health checks: $codes; while web2 is unhealthy, nginx uses $used"
}

# each PATH "WORD STATUS": the response of each instance itself
each() {
  check "GET $1 of each instance" "web1 $2 web2 $2 web3 $2" "$(docker compose exec -T nginx sh -c '
    for name in web1 web2 web3; do
      curl -sS --noproxy "*" -m 5 -w " %{http_code}\n" "http://$name:9999$1" | sed "s/^/$name /"
    done' sh "$1" | sed -E 's/\{.*"status":"([a-z]+)".*\}/\1/' | paste -sd' ' -)"
}
# health_checks: runs the health check of each container now, instead of within its 30 s
health_checks() {
  local service words
  for service in web1 web2 web3 nginx; do
    mapfile -t words < <(docker compose ps -q $service |
      xargs docker inspect --format '{{range slice .Config.Healthcheck.Test 1}}{{println .}}{{end}}' | grep .)
    docker compose exec -T $service "${words[@]}" >&2 && say "$service 0" || say "$service $?"
  done | paste -sd' ' -
}
in_use()    { curl -sS -m 5 "$URL/healthz?[1-30]" | grep -oE '"web[0-9a-z-]+"' | tr -d '"' | sort -u | paste -sd' ' -; }
unhealthy() { [ "$(docker compose ps --format '{{.Health}}' "$1")" = unhealthy ]; }

check_no_stores() {
  local printed code=0
  printed=$(docker run --rm "$(docker inspect --format '{{.Image}}' "$(docker compose ps -q web1)")" 2>&1) || code=$?
  check "exit code and lines" "2 1" "$code $(grep -c '' <<<"$printed")"
  [[ $printed == *DB_HOST*REDIS_HOST* ]] || fail "expected a line with DB_HOST and REDIS_HOST, saw $printed"
  summary="exit code 2: $printed"
}

# POSTGRES_IMAGE=postgres:18 on a volume of 17
check_other_version() {
  local printed
  mkdir -p "$WORK/volume/17/docker" && echo 17 >"$WORK/volume/17/docker/PG_VERSION" && chmod -R a+rwX "$WORK"
  printed=$(docker compose run --rm --no-deps -T --volume "$WORK/volume:/var/lib/postgresql" postgres 2>&1) || true
  grep -q 'POSTGRES_IMAGE.*holds data of 17' <<<"$printed" || fail "the refusal names no version: ${printed##*$'\n'}"
  check "folders of the volume" 17 "$(ls "$WORK/volume")"
  summary="refused and not changed"
}

# For a moment the clients' container is an instance, and sees nginx's headers.
check_spoofed_headers() {
  local headers own
  docker network connect --alias web-extra "$backend" "$RUN-load" || return 1
  send spoof
  docker network disconnect "$backend" "$RUN-load"
  headers=$(value headers | tr '|' '\n') own=$(value own)
  check "headers about the client" "x-forwarded-for:$own x-forwarded-proto:http x-real-ip:$own" \
    "$(grep -E '^(x-)?forwarded|^x-real-ip|203\.0\.113\.7' <<<"$headers" | sort | paste -sd' ' -)"
  summary="X-Forwarded-For and X-Real-IP are the client's own address"
}
