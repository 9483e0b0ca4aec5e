# shellcheck shell=bash
# The configuration of a running nginx: its check, its algorithm, its reload. Sourced by lib.sh.

nginx_runs() { [ -n "$(docker compose ps -q --status running nginx)" ]; }

# nginx_conf ALGORITHM: nginx.conf with this load-balancing algorithm
nginx_conf() { sed "s/#$1 //" nginx.conf; }

# balance: the load-balancing algorithm in force
balance() {
  # shellcheck disable=SC2016 # expanded in the container
  docker compose exec -T nginx sh -c 'cat "/balance/$(hostname)" 2>/dev/null || echo "${BALANCE:-round-robin}"'
}

# first_balance: the algorithm with which nginx was started, so that Compose keeps its container; reload_nginx follows
first_balance() { nginx_runs && docker compose exec -T nginx printenv BALANCE || say "${BALANCE:-round-robin}"; }

# check_nginx: stops if nginx does not know the algorithm, or runs and cannot use the nginx.conf of this folder
check_nginx() {
  case ${BALANCE:-round-robin} in round-robin | least_conn | random | ip_hash) ;; *)
    say "BALANCE=\"$BALANCE\" cannot be used, nothing was changed: it needs round-robin, least_conn, random" \
      "or ip_hash" >&2
    exit 1 ;;
  esac
  nginx_runs || return 0
  ! nginx_conf "$(balance)" | docker compose exec -T nginx cmp -s - /tmp/nginx.conf || return 0
  # In a new container: a new nginx.conf may need settings that the running one does not have.
  docker compose run --rm --no-deps -T nginx nginx -t -q </dev/null >"$WORK/nginx" 2>&1 ||
    { say "nginx.conf cannot be used, nothing was changed: $(sed -nE 's|/etc/nginx/nginx.conf|nginx.conf|
        s/.*\[emerg\] ([0-9]+#[0-9]+: )?//p' "$WORK/nginx" | grep . || tail -n 1 "$WORK/nginx")" >&2; exit 1; }
}

# reload_nginx ALGORITHM: puts the nginx.conf of this folder into force, with this load-balancing algorithm, without a
# failed request; check_nginx comes first
reload_nginx() {
  nginx_runs || return 0
  local before
  before=$(balance)
  # By standard input, since a mounted file stays the old one after an editor has replaced it.
  # shellcheck disable=SC2016 # expanded in the container
  nginx_conf "$1" | docker compose exec -T nginx sh -ec '
    cat >/tmp/new.conf
    ! cmp -s /tmp/new.conf /tmp/nginx.conf || exit 0
    nginx -t -q -c /tmp/new.conf
    workers=$(grep -l "^nginx: worker" /proc/[0-9]*/cmdline)
    mv /tmp/new.conf /tmp/nginx.conf
    nginx -c /tmp/nginx.conf -s reload
    for _ in $(seq 50); do # until no old worker accepts requests
      grep -L "shutting down" $workers 2>/dev/null | grep . >/dev/null || break; sleep 0.1
    done
    echo reloaded' >"$WORK/nginx" 2>&1 ||
    { say "nginx.conf could not be put into force: $(tail -n 1 "$WORK/nginx")" >&2; exit 1; }
  if [ "$1" != "$before" ]; then # the container keeps it when it is started again
    # shellcheck disable=SC2016 # expanded in the container
    docker compose exec -T --user root nginx sh -ec 'rm -f /balance/*; echo "$1" >"/balance/$(hostname)"' sh "$1"
    say "the load-balancing algorithm is now $1"
  elif [ -s "$WORK/nginx" ]; then say "nginx.conf has changed and is now in force"; fi
}
