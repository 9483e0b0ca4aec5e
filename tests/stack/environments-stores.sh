# shellcheck shell=bash disable=SC2016,SC2030,SC2031 # sourced by environments
# --- The stores: settings that change, starts that are interrupted, values in any script -----------------------------
# The instances are requested inside their container; nginx and its port are not needed.

stores_up() { docker compose up --detach --wait --build "$@" >"$WORK/up" 2>&1 || { tail -n 3 "$WORK/up"; return 1; }; }
up_says()   { if stores_up "$@" >&2; then echo up; else echo "not up"; fi; }
instance()  { docker compose exec -T web1 wget -qO- "$@"; }
store()     { instance --header 'Content-Type: application/json' --post-data "{\"author\":\"test\",\"body\":\"$1\"}" \
                http://127.0.0.1:9999/api/messages | grep -oE '"body":"[^"]*"'; }
stored()    { instance http://127.0.0.1:9999/api/messages | grep -oE '"body":"[^"]*"' | paste -sd' ' -; }
both_up()   { instance http://127.0.0.1:9999/readyz | grep -oE '"(postgres|redis)":"[a-z]*"' | sort | paste -sd' ' -; }
UP='"postgres":"up" "redis":"up"'

# log_in USER PASSWORD: by TCP, as the service
log_in() {
  docker compose exec -T -e PGUSER="$1" -e PGPASSWORD="$2" postgres sh -c \
    'psql -h "$(hostname -i)" -qAtXc "SELECT count(*) >= 0 FROM messages"' 2>&1 | sed 's/.*FATAL: *//'
}
# whole: the service's user can store and read a message
whole() {
  docker compose exec -T postgres sh -c 'PGUSER="$DB_USER" PGPASSWORD="$DB_PASS" psql -h "$(hostname -i)" -qAtX' \
    2>&1 <<<"INSERT INTO messages (author, body, instance, request_key) VALUES ('test', 'whole', 'web1', 'c:whole')
             ON CONFLICT DO NOTHING; SELECT body FROM messages WHERE request_key = 'c:whole'"
}
# health_check SERVICE: runs it now
health_check() {
  docker compose exec -T "$1" sh -c \
    "$(docker inspect --format '{{index .Config.Healthcheck.Test 1}}' "$(docker compose ps -q "$1")")"
}
# refusal: the last line of a container of PostgreSQL that cannot start
refusal() { timeout 30 docker compose run --rm --no-deps -T postgres 2>&1 </dev/null | sed -n 's/.*cannot start: //p'; }
# earlier SCRIPTS: PostgreSQL, started by the image's own entrypoint
earlier() {
  chmod 755 "$WORK" "$1"; chmod 644 "$1"/*
  docker compose run --detach --no-deps --name "$COMPOSE_PROJECT_NAME-earlier" --entrypoint docker-entrypoint.sh \
    --env POSTGRES_DB=app --volume "$1:/docker-entrypoint-initdb.d:ro" postgres postgres >"$WORK/earlier" 2>&1
}
no_earlier() { docker rm --force "$COMPOSE_PROJECT_NAME-earlier" >/dev/null; }

env_changed_passwords() {
  own_project
  local began
  check "with the first passwords" "up $UP" "$(up_says web1) $(both_up)"
  check "a message is stored" '"body":"before"' "$(store before)"
  instance http://127.0.0.1:9999/ >"$WORK/visit"
  began=$SECONDS
  export DB_PASS='an other' REDIS_PASS="it's \"other\"" POSTGRES_PASSWORD=another
  check "with other passwords on the same volumes" "up $UP" "$(up_says web1) $(both_up)"
  bound "seconds" "at most" 20 $((SECONDS - began))
  check "the message is there" '"body":"before"' "$(stored)"
  check "the count goes on" '"visits":2' "$(instance http://127.0.0.1:9999/ | grep -oE '"visits":[0-9]+')"
  check "the service's other password" t "$(log_in app 'an other')"
  check "its former one" 'password authentication failed for user "app"' "$(log_in app app)"
  check "the superuser's other password" t "$(log_in postgres another)"
  check "Redis with the former one" NOAUTH \
    "$(docker compose exec -T -e REDISCLI_AUTH=redis redis redis-cli get x 2>&1 | grep -o NOAUTH)"
  docker compose exec -T postgres psql -qc "ALTER ROLE app PASSWORD 'secretly'"
  check "PostgreSQL's health check, when the password is another" failed "$(
    health_check postgres >"$WORK/check" 2>&1 && echo passed || echo failed)"

  export DB_USER=other
  check "with another user on the same volume" "up $UP" "$(up_says web1) $(both_up)"
  check "the message is there, and the next one" '"body":"after" "body":"before"' "$(store after >/dev/null; stored)"
  check "the former user" 'role "app" is not permitted to log in' "$(log_in app secretly)"

  began=$SECONDS
  check "with another DB_NAME, \`make up\` names" 'the messages of this volume are in "app"' \
    "$(DB_NAME=other make up 2>&1 | grep '^postgres: DB_NAME="other"' | grep -o 'the messages of this volume [^.]*')"
  bound "seconds" "at most" 20 $((SECONDS - began))
  check "and with the right one again" 'up "body":"after" "body":"before"' "$(up_says web1) $(stored)"
  docker compose exec -T postgres psql -qc 'DELETE FROM messages'
  export DB_NAME=other
  check "with another one, when there is no message" "up $UP" "$(up_says web1) $(both_up)"
}

env_interrupted_start() {
  own_project
  local after
  for after in 0.2 0.5 0.9 1.4; do
    docker compose up --detach postgres redis >"$WORK/up" 2>&1
    sleep "$after"
    docker compose kill --signal KILL >"$WORK/kill" 2>&1
    docker compose up --detach postgres redis >"$WORK/up" 2>&1 # during the recovery
    sleep "$after"
    docker compose kill --signal KILL >"$WORK/kill" 2>&1
    check "killed $after s after its first start" "up whole" "$(up_says postgres redis) $(whole)"
    end_project
  done

  cp init.sql "$WORK/init.sql"; chmod 755 "$WORK"; chmod 600 "$WORK/init.sql"
  echo "services: {postgres: {volumes: ['$WORK/init.sql:/init.sql:ro']}}" >"$WORK/unreadable.yml"
  export COMPOSE_FILE=docker-compose.yml:$WORK/unreadable.yml
  after=$SECONDS
  check "where init.sql cannot be read, \`make up\` says" "chmod -R a+rX init.sql nginx.conf monitor" \
    "$(make up 2>&1 | grep -o 'chmod .*')"
  chmod 644 "$WORK/init.sql"
  check "after that" "up whole" "$(up_says postgres) $(whole)"
  bound "seconds for both" "at most" 30 $((SECONDS - after))
}

env_volumes_of_earlier_versions() {
  own_project
  local after line
  mkdir "$WORK/whole" "$WORK/half"
  cp init.sql "$WORK/whole/10-init.sql"
  cp init.sql "$WORK/half/10-init.sql"
  cat >"$WORK/whole/20-app-user.sql" <<'SQL'
CREATE ROLE app LOGIN PASSWORD 'earlier' NOSUPERUSER NOCREATEDB NOCREATEROLE;
ALTER TABLE messages OWNER TO app;
GRANT USAGE, CREATE ON SCHEMA public TO app;
INSERT INTO messages (author, body, instance, request_key) VALUES ('test', 'of an earlier version', 'web1', 'c:1');
\! touch /tmp/made
SQL
  echo 'SELECT nothing FROM nowhere;' >"$WORK/half/20-app-user.sql"

  earlier "$WORK/whole"
  wait_for 20 quietly docker exec "$COMPOSE_PROJECT_NAME-earlier" ls /tmp/made 2>/dev/null || fail "it did not start"
  no_earlier
  check "a volume with another password" "up $UP" "$(up_says web1) $(both_up)"
  check "its message" '"body":"of an earlier version"' "$(stored)"
  end_project

  earlier "$WORK/half"
  docker wait "$COMPOSE_PROJECT_NAME-earlier" >/dev/null; no_earlier
  check "one whose first start failed" "up whole" "$(up_says postgres) $(whole)"
  end_project

  for after in 0.2 0.5; do
    earlier "$WORK/whole"; sleep $after; no_earlier
    if stores_up postgres >"$WORK/not-up"; then check "one killed after $after s" whole "$(whole)"
    else
      line=$(scripts/why) || true
      check "one killed after $after s: what to do" \
        "nothing is stored in the volume: \`make clean\`, then \`make up\`" "${line##*interrupted; }"
    fi
    end_project
  done
}

env_values_in_any_script() {
  own_project
  local value
  export DB_PASS='Grüße' REDIS_PASS='пароль'
  check "passwords in other scripts" "up $UP \"body\":\"1\"" "$(up_says web1) $(both_up) $(store 1)"
  export DB_USER=$'-Jürgen\'s "用户" \\ $HOME\n%s' DB_PASS=$'-$x `id` \'"\\ 日本😀\t\n end '
  export REDIS_PASS=$'--save \'"\\ $x\n日本😀 '
  check "the worst that a user's name and passwords can be" "up $UP \"body\":\"2\"" \
    "$(up_says web1) $(both_up) $(store 2)"
  end_project
  export DB_NAME='-a=b&c?d/e#f%20 "日本" '\''\ $x'
  check "…and the database's name" "up $UP \"body\":\"3\"" "$(up_says web1) $(both_up) $(store 3)"
  check "\`make psql\` finds it" 3 "$(make psql <<<'SELECT body FROM messages' | grep -o 3)"
  end_project

  unset DB_NAME DB_USER DB_PASS REDIS_PASS
  echo 'a secret: Grüße' >"$WORK/secret"; chmod 755 "$WORK"; chmod 644 "$WORK/secret"
  value='{environment: {DB_PASS: "", DB_PASS_FILE: /run/secrets/db_pass}, secrets: [db_pass]}'
  printf '%s\n' "secrets: {db_pass: {file: $WORK/secret}}" "services: {postgres: $value, web1: $value}" \
    >"$WORK/secret.yml"
  export COMPOSE_FILE=docker-compose.yml:$WORK/secret.yml
  check "a password from a secret" "up $UP t" "$(up_says web1) $(both_up) $(log_in app 'a secret: Grüße')"
  end_project
  unset COMPOSE_FILE
  value="cannot be used: it needs a name of the service's own"
  check "what cannot be a name: postgres" "DB_USER=\"postgres\" $value" "$(DB_USER=postgres refusal)"
  check "…template1" "DB_NAME=\"template1\" $value" "$(DB_NAME=template1 refusal)"
  value=$(printf 'é%.0s' $(seq 32))
  check "…64 bytes" "DB_NAME=\"$value\" cannot be used: it needs at most 63 bytes" "$(DB_NAME=$value refusal)"
  check "…pg_x" 'DB_USER="pg_x": ERROR:  role name "pg_x" is reserved' "$(DB_USER=pg_x refusal)"
  check "and the volume is none the worse" "up whole" "$(up_says postgres) $(whole)"
}

# written: how far PostgreSQL and Redis have written
written() {
  docker compose exec -T postgres psql -U postgres -Atc 'SELECT pg_current_wal_lsn()'
  docker compose exec -T redis sh -c 'cat /data/appendonlydir/* | wc -c'
}
# writes_nothing: for 2 s, and with a health check of both
writes_nothing() {
  local before
  before=$(written)
  health_check postgres && health_check redis || return 1
  sleep 2
  [ "$(written)" = "$before" ]
}

env_idle() {
  own_project
  check "the stack is" "up $UP" "$(up_says web1) $(both_up)"
  # PostgreSQL writes for some seconds after its start.
  if wait_for 60 writes_nothing; then pass "an idle stack writes nothing to disk"
  else fail "an idle stack writes nothing to disk: $(written)"; fi
}
