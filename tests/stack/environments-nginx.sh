# shellcheck shell=bash # sourced by environments
# --- A running nginx gets another configuration -----------------------------------------------------------------------

# A changed nginx.conf is put into force without a failed request.
env_nginx_conf() {
  own_copy
  local load
  does "make up" make up
  header() { curl -sS -m 5 -D - -o /dev/null "http://localhost:$PORT/healthz" | tr -d '\r' | sed -n 's/^X-Test: //p'; }
  while [ ! -e "$WORK/enough" ]; do
    curl -sS -m 9 -o /dev/null -w '%{http_code}\n' "http://localhost:$PORT/?[1-20]" 2>&1
  done >"$WORK/load" & load=$!
  sed -i 's/^    server_tokens off;/&\n    add_header X-Test one;/' nginx.conf    # as editors do it: a new file
  does "make up with a changed nginx.conf" make up
  check "in force" one "$(header)"
  sed -i 's/X-Test one/X-Test two/' nginx.conf
  does "make rolling with a changed nginx.conf" make rolling
  check "in force" two "$(header)"
  touch "$WORK/enough"; wait $load; rm "$WORK/enough"
  check "of $(wc -l <"$WORK/load") requests meanwhile, failed" 0 "$(grep -vc '^200$' "$WORK/load" || true)"
  docker compose restart nginx >"$WORK/out" 2>&1 && wait_ready
  check "after a restart of its container" two "$(header)"
  sed -i 's/X-Test two;/X-Test two/' nginx.conf
  refuses "make up with an error in it" "nginx.conf cannot be used" make up </dev/null
  check "still in force" two "$(header)"
}

# Another load-balancing algorithm is put into force without a failed request, and outlives its container's restart.
env_balance() {
  own_copy
  local load algorithm
  does "make up" make up
  while [ ! -e "$WORK/enough" ]; do
    curl -sS -m 9 -o /dev/null -w '%{http_code}\n' "http://localhost:$PORT/?[1-20]" 2>&1
  done >"$WORK/load" & load=$!
  for algorithm in least_conn random ip_hash; do
    does "make up BALANCE=$algorithm" make up BALANCE=$algorithm
    check "in force" $algorithm "$(balance)"
  done
  touch "$WORK/enough"; wait $load; rm "$WORK/enough"
  check "of $(wc -l <"$WORK/load") requests meanwhile, failed" 0 "$(grep -vc '^200$' "$WORK/load" || true)"
  docker compose restart nginx >"$WORK/out" 2>&1 && wait_ready
  check "upstreams that have it after a restart of nginx's container" 2 \
    "$(docker compose exec -T nginx grep -c '^ *ip_hash;' /tmp/nginx.conf)"
  refuses "make up BALANCE=fastest" 'BALANCE="fastest" cannot be used' make up BALANCE=fastest
  refuses "nginx with it" 'nginx cannot start: BALANCE="fastest" cannot be used' \
    env BALANCE=fastest docker compose run --rm --no-deps -T nginx </dev/null
  check "still in force" ip_hash "$(balance)"
}
