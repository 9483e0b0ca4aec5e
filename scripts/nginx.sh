# shellcheck shell=bash
# The configuration of a running nginx: its check, its algorithm, its certificate, its reload. Sourced by lib.sh.

# nginx_runs: as docker-compose.yml starts it; the nginx of another Compose file has its own configuration
nginx_runs() { docker compose exec -T nginx test -e /tmp/resolver.conf 2>/dev/null; }

# nginx_conf ALGORITHM: nginx.conf with this load-balancing algorithm
nginx_conf() { sed "s/#$1 //" nginx.conf; }

# balance: the load-balancing algorithm in force, or, if nginx does not run, the one that it will start with. The nginx
# of another Compose file has no setting: round-robin.
balance() {
  # shellcheck disable=SC2016 # expanded in the container
  docker compose exec -T nginx sh -c 'cat "/balance/$(hostname)" 2>/dev/null || echo "${BALANCE:-round-robin}"' \
    2>/dev/null || say "${BALANCE:-round-robin}"
}

# first_balance: the algorithm with which nginx was started, so that Compose keeps its container; reload_nginx follows
first_balance() { docker compose exec -T nginx printenv BALANCE 2>/dev/null || say "${BALANCE:-round-robin}"; }

# send_nginx ALGORITHM: copies nginx.conf with this algorithm and, for HTTPS, the certificate and its key into the
# container's /tmp/new; prints which of them nginx does not use yet
send_nginx() {
  local file
  mkdir -p "$WORK/new" && nginx_conf "$1" >"$WORK/new/nginx.conf"
  for file in ${TLS_CERT:+TLS_CERT TLS_KEY}; do
    (umask 077; cat "${!file}" >"$WORK/new/$file") 2>"$WORK/nginx" ||
      { say "$file=\"${!file}\" cannot be used, nothing was changed: $(sed 's/.*: //' "$WORK/nginx")" >&2; exit 1; }
  done
  nginx_runs || return 0
  # By standard input, since a mounted file stays the old one after an editor has replaced it.
  # shellcheck disable=SC2016 # expanded in the container
  tar -C "$WORK/new" -cf - . | docker compose exec -T nginx sh -ec '
    mkdir -p /tmp/new
    cd /tmp/new
    tar -xmf - --no-same-owner
    for file in *; do cmp -s "$file" "/tmp/$file" || echo "$file"; done'
}

# check_nginx: stops if nginx cannot use the algorithm, the nginx.conf of this folder, or the certificate
check_nginx() {
  local changed said
  case ${BALANCE:-round-robin} in round-robin | least_conn | random | ip_hash) ;; *)
    say "BALANCE=\"$BALANCE\" cannot be used, nothing was changed: it needs round-robin, least_conn, random" \
      "or ip_hash" >&2
    exit 1 ;;
  esac
  changed=$(send_nginx "$(balance)" | paste -sd' ' -) || exit 1
  changed=${changed:-${TLS_CERT:+TLS_CERT TLS_KEY}} # Compose replaces nginx if they have another path
  [ -n "$changed" ] || return 0
  # In a new container: a new nginx.conf may need settings that the running one does not have.
  docker compose run --rm --no-deps -T nginx -t -q </dev/null >"$WORK/nginx" 2>&1 && return
  said=$(sed -nE 's/.*(\[emerg\] ([0-9]+#[0-9]+: )?|cannot start: )//p' "$WORK/nginx" | sed 's|/tmp/||g')
  say "$changed cannot be used, nothing was changed: ${said:-$(tail -n 1 "$WORK/nginx")}" >&2
  exit 1
}

# reload_nginx ALGORITHM: puts what has changed into force, with this load-balancing algorithm, without a failed
# request; check_nginx comes first
reload_nginx() {
  local changed before
  before=$(balance)
  changed=$(send_nginx "$1") || exit 1
  [ -n "$changed" ] || return 0
  # shellcheck disable=SC2016,SC2086 # expanded in the container; one word for each file
  docker compose exec -T nginx sh -ec '
    nginx -t -q -c /tmp/new/nginx.conf
    for file; do [ ! -e "/tmp/$file" ] || { mv "/tmp/new/$file" /tmp; echo "$file has changed and is now in force"; }
    done
    workers=$(grep -l "^nginx: worker" /proc/[0-9]*/cmdline)
    nginx -c /tmp/nginx.conf -s reload
    for _ in $(seq 50); do # until no old worker accepts requests
      grep -L "shutting down" $workers 2>/dev/null | grep . >/dev/null || break
      sleep 0.1
    done' sh $changed 2>"$WORK/nginx" || { say "nginx could not be reloaded: $(tail -n 1 "$WORK/nginx")" >&2; exit 1; }
  [ "$1" != "$before" ] || return 0
  # shellcheck disable=SC2016 # expanded in the container, which keeps the algorithm when it is started again
  docker compose exec -T --user root nginx sh -ec 'rm -f /balance/*; echo "$1" >"/balance/$(hostname)"' sh "$1"
  say "the load-balancing algorithm is now $1"
}
