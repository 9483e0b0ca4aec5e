# shellcheck shell=bash disable=SC2030,SC2031 # sourced by environments
# --- HTTPS, with a certificate of `make cert` -------------------------------------------------------------------------

export_tls() { export HTTPS_PORT=$((ENV_PORT + 2)) TLS_CERT=tls/localhost.crt TLS_KEY=tls/localhost.key; }
# over_https PATH CURL-ARGUMENT...: verified with the certificate
over_https() { curl -sS -m 9 --cacert tls/localhost.crt "${@:2}" "https://localhost:$HTTPS_PORT$1"; }
serial() { openssl x509 -noout -serial "$@"; }
served_serial() { openssl s_client -connect "localhost:$HTTPS_PORT" </dev/null 2>/dev/null | serial; }
ports() { docker compose ps nginx --format '{{.Ports}}' | grep -oE '[0-9]+->[0-9]+' | sort -u | paste -sd' ' -; }

env_https() {
  own_copy
  local answer='%{http_code} HTTP/%{http_version} %{redirect_url}' http=http://localhost:$PORT load browser
  browser=(-o "$WORK/page" -w "$answer" -H 'Accept: text/html' -H 'Upgrade-Insecure-Requests: 1')
  does "make up" make up
  check "published ports without TLS_CERT" "$PORT->9999" "$(ports)"
  check "a browser at the page" '200 HTTP/1.1 ' "$(curl -sS "${browser[@]}" "$http/")"

  does "make cert" make cert
  export_tls
  does "make up with a certificate" make up
  check "its last line" "Threefold answers at https://localhost:$HTTPS_PORT and $http" "$(tail -n 1 "$WORK/said")"
  check "published ports" "$PORT->9999 $HTTPS_PORT->9443" "$(ports)"
  check "the page" '200 HTTP/2 ' "$(over_https / --http2 "${browser[@]}")"
  check "the page, by HTTP/1.1" '200 HTTP/1.1 ' "$(over_https / --http1.1 "${browser[@]}")"
  check "TLS 1.1" refused "$(over_https / --tls-max 1.1 >"$WORK/page" 2>&1 && echo accepted || echo refused)"
  URL=https://localhost:$HTTPS_PORT check_stream "https://localhost:$HTTPS_PORT" "HTTPS"
  check "a URI that is none" '400 HTTP/2 ' "$(over_https '/%zz' -o "$WORK/page" -w "$answer")"

  check "a browser at the page by HTTP" "307 HTTP/1.1 https://localhost:$HTTPS_PORT/?a=b" \
    "$(curl -sS "${browser[@]}" "$http/?a=b")"
  check "a browser at the API by HTTP" '200 HTTP/1.1 ' "$(curl -sS "${browser[@]}" "$http/api/visits")"
  check "a client of the API by HTTP" '200 HTTP/1.1 ' "$(curl -sS -o "$WORK/page" -w "$answer" "$http/")"
  check "HTTP on the port of HTTPS" "307 HTTP/1.1 https://localhost:$HTTPS_PORT/api/visits" \
    "$(curl -sS -o "$WORK/page" -w "$answer" "http://localhost:$HTTPS_PORT/api/visits")"

  while [ ! -e "$WORK/enough" ]; do
    over_https '/?[1-20]' --insecure --http2 -o /dev/null -w '%{http_code}\n' 2>&1
  done >"$WORK/load" & load=$!
  does "make cert again" make cert
  check "the new certificate before make up" no "$(same_serial)"
  does "make up" make up
  check "the new certificate after it" yes "$(same_serial)"
  sleep 1
  touch "$WORK/enough"; wait $load
  check "of $(wc -l <"$WORK/load") requests meanwhile, failed" 0 "$(grep -vc '^200$' "$WORK/load" || true)"
  docker compose restart nginx >"$WORK/out" 2>&1 && wait_ready
  check "the new certificate after a restart of the container" yes "$(same_serial)"

  bad_certificates
  check "still in force" yes "$(TLS_CERT=tls/localhost.crt same_serial)"
  does "make down" make down
  bad_certificates # nothing runs
  check "containers after that" "" "$(docker compose ps -aq)"
}
same_serial() { [ "$(served_serial)" = "$(serial -in tls/localhost.crt)" ] && echo yes || echo no; }

bad_certificates() {
  quietly openssl genrsa -out tls/other.key; chmod 644 tls/other.key
  echo text >tls/text
  install -m 600 tls/localhost.key tls/unreadable.key
  TLS_KEY='' refuses "TLS_CERT alone" "HTTPS needs both" make up
  TLS_CERT='' refuses "TLS_KEY alone" "HTTPS needs both" make up
  TLS_CERT=tls/none refuses "no file" 'TLS_CERT="tls/none" cannot be used' make up
  TLS_CERT=tls refuses "a folder" 'TLS_CERT="tls" cannot be used' make up
  TLS_CERT=tls/text refuses "no certificate" 'cannot load certificate "TLS_CERT"' make up
  TLS_KEY=tls/text refuses "no key" 'cannot load certificate key "TLS_KEY"' make up
  TLS_KEY=tls/other.key refuses "the key of another certificate" 'key values mismatch' make up
  TLS_KEY=tls/unreadable.key refuses "a key that nginx cannot read" 'of its container cannot read TLS_KEY' make up
}
