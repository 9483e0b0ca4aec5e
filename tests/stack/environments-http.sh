# shellcheck shell=bash # sourced by environments
# --- Clients and reverse proxies unlike ours, on the stack that runs --------------------------------------------------

# Another nginx in front of ours that ends TLS: with its defaults, with HTTP/1.0 (the default before 1.29.7), with
# compression; and one that our nginx trusts.
env_reverse_proxy() {
  local nginx network kind port
  need_stack
  nginx=$(docker compose ps -q nginx)
  network=$(docker inspect --format '{{range $name, $_ := .NetworkSettings.Networks}}{{$name}} {{end}}' "$nginx" |
    xargs docker network inspect --format '{{if not .Internal}}{{.Name}}{{end}}' | grep .)
  mkdir -p "$WORK/proxy"
  quietly openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=localhost -days 1 \
    -keyout "$WORK/proxy/key" -out "$WORK/proxy/cert" || { fail "no certificate"; return; }
  proxy_conf >"$WORK/proxy/nginx.conf"
  trap 'docker rm --force "$RUN-proxy" "$RUN-trusting" >/dev/null 2>&1' EXIT
  # A second nginx of ours trusts the proxy. It starts first: the proxy resolves its name when it starts.
  TRUSTED_PROXY=$(docker network inspect --format '{{range .IPAM.Config}}{{.Subnet}} {{end}}' "$network") \
    docker compose run --detach --rm --no-deps --name "$RUN-trusting" nginx >/dev/null 2>&1
  docker run --rm --detach --name "$RUN-proxy" --user 0 --network "$network" --volume "$WORK/proxy:/etc/proxy:ro,z" \
    --publish 127.0.0.1::8441 --publish 127.0.0.1::8442 --publish 127.0.0.1::8443 --publish 127.0.0.1::8444 \
    "$(docker inspect --format '{{.Config.Image}}' "$nginx")" nginx -c /etc/proxy/nginx.conf -g 'daemon off;' >/dev/null
  for kind in '8441 with its defaults' '8442 with HTTP/1.0' '8443 with compression'; do
    port=$(docker port "$RUN-proxy" "${kind%% *}" | sed 's/.*://')
    check_stream "https://localhost:$port" "nginx ${kind#* }"
  done
  # Limits and log are about the client, here Docker's gateway, not about the proxy.
  port=$(docker port "$RUN-proxy" 8444 | sed 's/.*://')
  curl -ksf -m 5 -o /dev/null "https://localhost:$port/healthz" -H "X-Request-Id: $RUN-trusted" || true
  sleep 1.5
  check "a trusted nginx: the client of the request" \
    "$(docker network inspect --format '{{range .IPAM.Config}}{{.Gateway}}{{end}}' "$network")" \
    "$(docker logs "$RUN-trusting" 2>/dev/null | grep -F "$RUN-trusted" | field client)"
}

proxy_conf() {
  local port=8441 setting
  say 'events {} http { ssl_certificate /etc/proxy/cert; ssl_certificate_key /etc/proxy/key;'
  for setting in '' 'proxy_http_version 1.0;' 'gzip on; gzip_types *; gzip_proxied any;'; do
    say "server { listen $port ssl; location / { proxy_pass http://nginx:9999; $setting } }"
    port=$((port + 1))
  done
  say "server { listen $port ssl; location / { proxy_pass http://$RUN-trusting:9999;"
  say "proxy_set_header X-Forwarded-For \$remote_addr; } } }"
}

# check_stream URL WHAT: the stream begins at once, and passes on a message at once
check_stream() {
  local stream text="$RUN $2"
  does "$2: it responds" wait_for 5 curl -ksf -m 5 -o /dev/null "$1/healthz"
  curl -ksN --compressed -m 20 -D "$WORK/head" "$1/api/events" >"$WORK/stream" & stream=$!
  does "$2: the stream begins within 2 s" wait_for 2 grep -q '^event:' "$WORK/stream"
  URL=$1 post test "$text" -k >"$WORK/posted"
  does "$2: a message is in the stream within 2 s" wait_for 2 grep -q "^data:.*$text" "$WORK/stream"
  check "$2: caches and compression do not change the stream" 'no-store, no-transform' "$(head_of cache-control)"
  kill $stream 2>/dev/null; wait $stream 2>/dev/null || true
}

env_odd_clients() {
  local path header
  need_stack
  # All programs on localhost share their cookies, whatever their port.
  head -c 9000 /dev/zero | tr '\0' c >"$WORK/9k"
  check "a Cookie of 9 KB" 200 "$(status / -H "Cookie: a=$(<"$WORK/9k")")"
  check "three cookies of 4 KB" 200 "$(status / -H "Cookie: $(printf 'n=%04000d; ' 1 2 3)")"
  check "a Cookie of 9 KB with a message" 201 "$(post_status -H "Cookie: a=$(<"$WORK/9k")")"
  { printf 'X-Long: '; head -c 40000 /dev/zero | tr '\0' x; } >"$WORK/40k"
  check "a header of 40 KB" 431 "$(status / -H "@$WORK/40k")"

  # A path has one spelling, in nginx and in the instances.
  for path in '/api/events;x=1' '/api/events;' '/api;x/events' /api/%65vents //api/events /api/./events \
      /x/../api/events /api/events/ '/api/events%3Bx' '/;x' '/api/messages;x?limit=1' /metrics '/metrics;x' /%6detrics \
      //metrics /./metrics /x/../metrics '/x/..;/metrics' /metrics/ /METRICS /metrics%2f /%2fmetrics '/metrics?x'; do
    check "$path" 404 "$(status "$path" --path-as-is)"
  done
  check "/metrics as a whole address" 404 "$(status /metrics --request-target "$URL/metrics")"

  check "an empty Idempotency-Key" 400 "$(post_status -H 'Idempotency-Key;')"
  grep -q Idempotency-Key "$WORK/body" || fail "the response names no Idempotency-Key: $(<"$WORK/body")"
  check "one of white space" 400 "$(raw_status 'POST /api/messages' \
    $'Content-Type: application/json\r\nIdempotency-Key: \t ' '{"author":"test","body":"no key"}')"
  check "none, with 900 other headers" 201 "$(raw_status 'POST /api/messages' \
    "Content-Type: application/json$(printf '\r\nX%s: a' {1..900})" '{"author":"test","body":"many headers"}')"
  check "two of them" 400 "$(post_status -H "Idempotency-Key: $RUN" -H "Idempotency-Key: $RUN")"
  check "one with a control character" 400 "$(post_status -H "Idempotency-Key: a"$'\x01')"
  check "none" 201 "$(post_status)"
  check "one" 201 "$(post_status -H "Idempotency-Key: $RUN")"
  check "the same again" 200 "$(post_status -H "Idempotency-Key: $RUN")"
  check "a body that is no JSON, with a reason" '400 the body is not valid JSON' \
    "$(status /api/messages -H 'Content-Type: application/json' -d '{x') $(detail)"
  # An instance's parser rejects it with a bare 400.
  for header in X User-Agent; do
    check "a control character in $header" '400 this is not a valid HTTP request' \
      "$(post_status -H "$header: a"$'\x01')$(printf ' '; detail)"
  done
  grep -qi '^x-request-id: .' "$WORK/head" || fail "it has no X-Request-Id"
  check "a control character in Referer" 400 "$(status / -H $'Referer: http://x/\x1b[31m')"
  check "a Host that is not ASCII" 400 "$(status / -H $'Host: \xc2\x9b')"

  check "JSON preferred to HTML" application/json "$(type_of 'application/json, text/html;q=0.1')"
  check "HTML preferred to JSON" 'text/html; charset=utf-8' "$(type_of 'application/json;q=0.1, text/html')"
  check "in two Accept headers" 'text/html; charset=utf-8' "$(type_of application/json\;q=0.1 -H 'Accept: text/html')"

  odd_log
}

# The trace of a valid W3C traceparent is in the log; an invalid one is dropped.
env_traceparent() {
  local trace=4bf92f3577b34da6a3ce929d0e0e4736 value
  need_stack
  for value in "00-$trace-00f067aa0ba902b7-01" "00-$trace-0000000000000000-01" "00-${trace^^}-00f067aa0ba902b7-01" \
      "ff-$trace-00f067aa0ba902b7-01" "00-$trace-00f067aa0ba902b7-01-x" 'a"b'; do
    curl -sS -m 5 -o "$WORK/out" "$URL/" -H "X-Request-Id: $RUN-trace" -H "traceparent: $value"
  done
  sleep 1.5                        # nginx writes its log once a second
  check "traceparent in six lines of nginx's log" "00-$trace-00f067aa0ba902b7-01" "$(docker compose logs \
    --no-log-prefix nginx | grep -F "$RUN-trace" | field traceparent | grep . | paste -sd' ' -)"
}

# The log has no control characters that a terminal would obey.
odd_log() {
  local path
  for path in $'\x9b31m' $'\xc2\x9b31m' $'\xf0\x9f\x99\x82' '%1b%c2%9b'; do
    raw_status "GET /$path" "X-Request-Id: $RUN-log" >/dev/null
  done
  sleep 1.5 # nginx writes its log once a second
  docker compose logs --no-color --no-log-prefix >"$WORK/log" 2>&1
  check "log lines of four odd paths: four of nginx, one of an instance" 5 "$(grep -acF "$RUN-log" "$WORK/log")"
  check "characters that are not ASCII in them" 0 \
    "$(grep -aF "$RUN-log" "$WORK/log" | LC_ALL=C tr -d '\n\040-\176' | wc -c | tr -d ' ')"
}

# raw_status "METHOD PATH" HEADER [BODY]: sends a request that curl would not send; prints the status
raw_status() {
  local body=${3:-}
  printf '%s HTTP/1.1\r\nHost: a\r\n%s\r\nContent-Length: %s\r\nConnection: close\r\n\r\n%s' \
    "$1" "$2" "${#body}" "$body" | raw | sed -n '1s/^[^ ]* \([0-9]*\).*/\1/p'
}

# status PATH CURL-ARGUMENT...: prints the status; the response is in $WORK/head and $WORK/body
status() {
  local path=$1; shift
  curl -sS -m 5 -D "$WORK/head" -o "$WORK/body" -w '%{http_code}' "$@" "$URL$path" || true
}
post_status() {
  status /api/messages -H 'Content-Type: application/json' -d "{\"author\":\"test\",\"body\":\"$RUN\"}" "$@"
}
detail() { field detail <"$WORK/body"; }

# type_of ACCEPT CURL-ARGUMENT...: the media type of the page
type_of() {
  status / -H "Accept: $1" "${@:2}" >/dev/null
  head_of content-type
}

# head_of NAME: the value of a header
head_of() { tr -d '\r' <"$WORK/head" | awk -v name="$1:" 'tolower($1) == name { sub(/^[^ ]* /, ""); print }'; }
