# shellcheck shell=bash # sourced by tests/stack/environments, on scripts/lib.sh
# --- Clients and proxies unlike ours, on the stack that runs ----------------------------------------------------------

# A stranger's nginx in front of ours, where TLS ends: as it comes, with HTTP/1.0 (the default before 1.29.7), and one
# that compresses what it can.
env_outer_proxy() {
  local nginx network kind port
  need_stack
  nginx=$(docker compose ps -q nginx)
  network=$(docker inspect --format '{{range $name, $_ := .NetworkSettings.Networks}}{{$name}} {{end}}' "$nginx" |
    xargs docker network inspect --format '{{if not .Internal}}{{.Name}}{{end}}' | grep .)
  mkdir -p "$WORK/outer"
  openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=localhost -days 1 \
    -keyout "$WORK/outer/key" -out "$WORK/outer/cert" 2>"$WORK/error" ||
    { cat "$WORK/error"; fail "no certificate"; return; }
  outer_conf >"$WORK/outer/nginx.conf"
  trap 'docker rm --force "$RUN-outer" "$RUN-trusting" >"$WORK/removed" 2>&1; rm -rf "$WORK"' EXIT
  # One more of ours that believes it; its name has to be there when the other one starts.
  TRUSTED_PROXY=$(docker network inspect --format '{{range .IPAM.Config}}{{.Subnet}} {{end}}' "$network") \
    docker compose run --detach --rm --no-deps --name "$RUN-trusting" nginx >/dev/null 2>&1
  docker run --rm --detach --name "$RUN-outer" --user 0 --network "$network" --volume "$WORK/outer:/etc/outer:ro,z" \
    --publish 127.0.0.1::8441 --publish 127.0.0.1::8442 --publish 127.0.0.1::8443 --publish 127.0.0.1::8444 \
    "$(docker inspect --format '{{.Config.Image}}' "$nginx")" nginx -c /etc/outer/nginx.conf -g 'daemon off;' >/dev/null
  for kind in '8441 as it comes' '8442 with HTTP/1.0' '8443 that compresses'; do
    port=$(docker port "$RUN-outer" "${kind%% *}" | sed 's/.*://')
    outer_stream "https://localhost:$port" "another nginx, ${kind#* }"
  done
  # Limits and log are about the client, here the address at which Docker brings us in, not about the proxy.
  port=$(docker port "$RUN-outer" 8444 | sed 's/.*://')
  curl -ksf --noproxy '*' -m 5 -o /dev/null "https://localhost:$port/healthz" -H "X-Request-Id: $RUN-trusted" || true
  sleep 1.5
  check "another nginx, trusted: whose request it is" \
    "$(docker network inspect --format '{{range .IPAM.Config}}{{.Gateway}}{{end}}' "$network")" \
    "$(docker logs "$RUN-trusting" | sed -n "s/.*$RUN-trusted\",\"client\":\"\([^\"]*\).*/\1/p")"
  docker rm --force "$RUN-outer" "$RUN-trusting" >/dev/null
}

outer_conf() {
  local port=8441 setting
  say 'events {} http { ssl_certificate /etc/outer/cert; ssl_certificate_key /etc/outer/key;'
  for setting in '' 'proxy_http_version 1.0;' 'gzip on; gzip_types *; gzip_proxied any;'; do
    say "server { listen $port ssl; location / { proxy_pass http://nginx:9999; $setting } }"
    port=$((port + 1))
  done
  say "server { listen $port ssl; location / { proxy_pass http://$RUN-trusting:9999;"
  say "proxy_set_header X-Forwarded-For \$remote_addr; } } }"
}

# outer_stream URL WHAT: the stream begins, and a message is there at once
outer_stream() {
  local stream tries=0 text="$RUN $2"
  until curl -ksf --noproxy '*' -m 5 -o /dev/null "$1/healthz" || [ $((tries++)) -gt 20 ]; do sleep 0.25; done
  curl -ksN --compressed --noproxy '*' -m 20 -D "$WORK/head" "$1/api/events" >"$WORK/stream" & stream=$!
  check "$2: the stream begins within 2 s" yes "$(soon '^event:')"
  curl -ksf --noproxy '*' -m 5 -o /dev/null "$1/api/messages" -H 'Content-Type: application/json' \
    -d "{\"author\":\"test\",\"body\":\"$text\"}" || fail "$2: the message is not stored"
  check "$2: a message is there within 2 s" yes "$(soon "^data:.*$text")"
  check "$2: caches and compression leave it alone" 'no-store, no-transform' "$(head_of cache-control)"
  kill $stream 2>/dev/null; wait $stream 2>/dev/null || true
}

# soon PATTERN: yes if the stream has it within 2 s
soon() {
  local tries=0
  until grep -q "$1" "$WORK/stream"; do
    [ $((tries++)) -lt 20 ] || { say "no, only $(wc -c <"$WORK/stream") bytes"; return; }
    sleep 0.1
  done
  say yes
}

env_odd_clients() {
  local path header
  need_stack
  # All programs on localhost, whatever their port, share their cookies.
  head -c 9000 /dev/zero | tr '\0' c >"$WORK/9k"
  check "a Cookie of 9 KB" 200 "$(status / -H "Cookie: a=$(<"$WORK/9k")")"
  check "three cookies of 4 KB" 200 "$(status / -H "Cookie: $(printf 'n=%04000d; ' 1 2 3)")"
  check "a Cookie of 9 KB with a message" 201 "$(post -H "Cookie: a=$(<"$WORK/9k")")"
  { printf 'X-Long: '; head -c 40000 /dev/zero | tr '\0' x; } >"$WORK/40k"
  check "a header of 40 KB" 431 "$(status / -H "@$WORK/40k")"

  # A path has one spelling: what nginx takes for one of its places, an instance takes for the same, or for none.
  for path in '/api/events;x=1' '/api/events;' '/api;x/events' /api/%65vents //api/events /api/./events \
      /x/../api/events /api/events/ '/api/events%3Bx' '/;x' '/api/messages;x?limit=1' /metrics '/metrics;x' /%6detrics \
      //metrics /./metrics /x/../metrics '/x/..;/metrics' /metrics/ /METRICS /metrics%2f /%2fmetrics '/metrics?x'; do
    check "$path" 404 "$(status "$path" --path-as-is)"
  done
  check "/metrics as a whole address" 404 "$(status /metrics --request-target "$URL/metrics")"

  check "an empty Idempotency-Key" 400 "$(post -H 'Idempotency-Key;')"
  grep -q Idempotency-Key "$WORK/body" || fail "its answer names no Idempotency-Key: $(<"$WORK/body")"
  check "one of white space" 400 "$(send 'POST /api/messages' \
    $'Content-Type: application/json\r\nIdempotency-Key: \t ' '{"author":"test","body":"no key"}')"
  check "none, with 900 other headers" 201 "$(send 'POST /api/messages' \
    "Content-Type: application/json$(printf '\r\nX%s: a' {1..900})" '{"author":"test","body":"many headers"}')"
  check "two of them" 400 "$(post -H "Idempotency-Key: $RUN" -H "Idempotency-Key: $RUN")"
  check "one with a control character" 400 "$(post -H "Idempotency-Key: a"$'\x01')"
  check "none" 201 "$(post)"
  check "one" 201 "$(post -H "Idempotency-Key: $RUN")"
  check "the same again" 200 "$(post -H "Idempotency-Key: $RUN")"
  check "what is no JSON, with a reason" '400 the body is not valid JSON' \
    "$(status /api/messages -H 'Content-Type: application/json' -d '{x') $(detail)"
  # An instance's parser refuses it with a 400 that is nothing but that.
  for header in X User-Agent; do
    check "a control character in $header" '400 this is not a valid HTTP request' \
      "$(post -H "$header: a"$'\x01')$(printf ' '; detail)"
  done
  grep -qi '^x-request-id: .' "$WORK/head" || fail "it has no X-Request-Id"
  check "a control character in Referer" 400 "$(status / -H $'Referer: http://x/\x1b[31m')"
  check "letters of no host" 400 "$(status / -H $'Host: \xc2\x9b')"

  check "JSON liked better than HTML" application/json "$(type_of 'application/json, text/html;q=0.1')"
  check "HTML liked better than JSON" 'text/html; charset=utf-8' "$(type_of 'application/json;q=0.1, text/html')"
  check "in two lines" 'text/html; charset=utf-8' "$(type_of application/json\;q=0.1 -H 'Accept: text/html')"

  odd_log
}

# A terminal that shows the log must find nothing to obey in it.
odd_log() {
  local path
  for path in $'\x9b31m' $'\xc2\x9b31m' $'\xf0\x9f\x99\x82' '%1b%c2%9b'; do
    send "GET /$path" "X-Request-Id: $RUN-log" >/dev/null
  done
  sleep 1.5                        # nginx writes its log once a second
  docker compose logs --no-color --no-log-prefix >"$WORK/log" 2>&1
  check "lines of four odd addresses, of nginx and one of an instance" 5 "$(grep -acF "$RUN-log" "$WORK/log")"
  check "characters that are not ASCII in them" 0 \
    "$(grep -aF "$RUN-log" "$WORK/log" | LC_ALL=C tr -d '\n\040-\176' | wc -c | tr -d ' ')"
}

# send "METHOD PATH" HEADER [BODY]: as it is, without curl's own ideas; prints the status
send() {
  local address=${URL#http://} body=${3:-} line
  exec 7<>"/dev/tcp/${address%%:*}/${address##*:}"
  printf '%s HTTP/1.1\r\nHost: a\r\n%s\r\nContent-Length: %s\r\nConnection: close\r\n\r\n%s' \
    "$1" "$2" "${#body}" "$body" >&7
  read -r -t 5 -u 7 line && line=${line#* } && say "${line%% *}"
  exec 7>&-
}

# status PATH CURL-ARGUMENTS...: the number; the rest lies in $WORK/head and $WORK/body
status() {
  local path=$1; shift
  curl -sS --noproxy '*' -m 5 -D "$WORK/head" -o "$WORK/body" -w '%{http_code}' "$@" "$URL$path" || true
}

post() { status /api/messages -H 'Content-Type: application/json' -d "{\"author\":\"test\",\"body\":\"$RUN\"}" "$@"; }

detail() { sed 's/.*"detail":"\([^"]*\)".*/\1/' "$WORK/body"; }

# type_of ACCEPT CURL-ARGUMENTS...: what the front page comes as
type_of() {
  status / -H "Accept: $1" "${@:2}" >/dev/null
  head_of content-type
}

# head_of NAME: the value of a header
head_of() { tr -d '\r' <"$WORK/head" | awk -v name="$1:" 'tolower($1) == name { sub(/^[^ ]* /, ""); print }'; }
