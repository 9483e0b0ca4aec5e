# shellcheck shell=bash # sourced by scripts/lib.sh
# --- nginx.conf and the certificate: checked, and put into force without a failed request -----------------------------

nginx_runs() { [ -n "$(docker compose ps -q --status running nginx)" ]; }

# send_nginx: copies nginx.conf and, for HTTPS, the certificate and its key into the container's /tmp/new; prints which
# of them nginx does not use yet
send_nginx() {
  local file
  mkdir -p "$WORK/new" && cp nginx.conf "$WORK/new"
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

# check_nginx: stops if nginx cannot use the nginx.conf of this folder, or the certificate
check_nginx() {
  local changed said
  changed=$(send_nginx | paste -sd' ' -) || exit 1
  changed=${changed:-${TLS_CERT:+TLS_CERT TLS_KEY}} # Compose replaces nginx if they have another path
  [ -n "$changed" ] || return 0
  # In a new container: a new nginx.conf may need settings that the running one does not have.
  docker compose run --rm --no-deps -T nginx -t -q </dev/null >"$WORK/nginx" 2>&1 && return
  said=$(sed -nE 's/.*(\[emerg\] ([0-9]+#[0-9]+: )?|cannot start: )//p' "$WORK/nginx" | sed 's|/tmp/||g')
  say "$changed cannot be used, nothing was changed: ${said:-$(tail -n 1 "$WORK/nginx")}" >&2
  exit 1
}

# reload_nginx: puts what has changed into force without a failed request; check_nginx comes first
reload_nginx() {
  local changed
  changed=$(send_nginx) || exit 1
  [ -n "$changed" ] || return 0
  # shellcheck disable=SC2016,SC2086 # expanded in the container; several files
  docker compose exec -T nginx sh -ec '
    [ -e /tmp/resolver.conf ] || exit 0 # an earlier version started this container: Compose replaces it
    nginx -t -q -c /tmp/new/nginx.conf
    for file; do [ ! -e "/tmp/$file" ] || { mv "/tmp/new/$file" /tmp; echo "$file is now in force"; }; done
    workers=$(grep -l "^nginx: worker" /proc/[0-9]*/cmdline)
    nginx -c /tmp/nginx.conf -s reload
    for _ in $(seq 50); do # until no old worker accepts requests
      grep -L "shutting down" $workers 2>/dev/null | grep . >/dev/null || break
      sleep 0.1
    done' sh $changed 2>"$WORK/nginx" ||
    { say "nginx could not be reloaded: $(tail -n 1 "$WORK/nginx")" >&2; exit 1; }
}
