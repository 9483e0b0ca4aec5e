# shellcheck shell=bash disable=SC2034,SC2154 # who sources it has the variables
# Small things that `run` and peers/run share: figures, containers, progress.

BEGAN=$SECONDS
TEXT="A message of the usual length: somebody was here, liked it, and says hello to all who read this."

quick()   { [ "${QUICK:-}" = 1 ]; }
now()     { printf '%s' "${EPOCHREALTIME:-$(date +%s)}"; }
calc()    { awk "BEGIN { printf \"%.${2:-4}f\", $1 }"; }
ratio()   { awk "BEGIN { printf \"%.4f\", $2 ? $1 / $2 : 0 }"; }
median()  { sort -g | awk '{ at[NR] = $1 } END { print (at[int((NR + 1) / 2)] + at[int(NR / 2) + 1]) / 2 }'; }
# ratios OURS THEIRS: files with a figure for each round; the median of the rounds' ratios. What is measured in one
# round is seconds apart: a machine that grows slower or quicker moves this less than a ratio of two medians.
ratios()  { paste "$1" "$2" | awk '{ print $2 ? $1 / $2 : 0 }' | median; }
keep()    { local IFS=$'\t'; printf '%s\n' "$*" >>"$DATA"; }
box()     { docker exec "$COMPOSE_PROJECT_NAME-$1-1" "${@:2}"; }
box_in()  { docker exec -i "$COMPOSE_PROJECT_NAME-$1-1" "${@:2}"; }
sql()     { box_in postgres psql -qAt -v ON_ERROR_STOP=1 -U postgres -d "$DB_NAME"; }
quiet()   { "$@" >"$WORK/log" 2>&1 || { tail -n 20 "$WORK/log" >&2; say "failed: $*" >&2; return 1; }; }

# progress: what goes on now. On a terminal a line that replaces itself, else a line for each step.
progress() {
  if [ -t 2 ]; then printf '\r\033[K%4d s  %.110s' $((SECONDS - BEGAN)) "$*" >&2
  else printf '%4d s  %s\n' $((SECONDS - BEGAN)) "$*" >&2; fi
}
detail() { [ ! -t 2 ] || progress "$@"; }
