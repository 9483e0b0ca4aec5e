# shellcheck shell=bash disable=SC2154
# How a script reports its checks: a line each, the verdict, and one object for grading.
passes=0 failures=0 failed=''

say()  { printf '%s\n' "$*"; }
pass() { printf '  ok    %s\n' "$*"; passes=$((passes + 1)); }
fail() { printf '  FAIL  %s\n' "$*"; failures=$((failures + 1)) failed+="; $*"; }

# check WHAT EXPECTED SEEN
check() { if [ "$2" = "$3" ]; then pass "$1: $3"; else fail "$1: expected $2, saw $3"; fi; }

# bound WHAT "at most" | "at least" LIMIT SEEN
bound() {
  local low=$4 high=$3
  [ "$2" = "at most" ] || low=$3 high=$4
  if [ "$low" -le "$high" ]; then pass "$1: $4"; else fail "$1: expected $2 $3, saw $4"; fi
}

# finish: prints the verdict and, after a failure, the last lines of the logs
finish() {
  [ "$failures" -gt 0 ] || { say "PASSED"; return; }
  say "--- the last lines of the logs ---"
  docker compose logs --tail 15 2>&1 | cut -c1-300
  say "FAILED: $failures checks"; exit 1
}

# verdict EXIT-CODE: with JSON=1, the last line of a script that has a $claim is this object, for grading
verdict() {
  local passed=false
  [ "$1" != 0 ] || [ "$passes" = 0 ] || passed=true
  printf '{"claim":%s,"expected":%s,"seen":%s,"passed":%s}\n' "$(quoted "$claim")" \
    "$(quoted "all checks pass, exit code 0")" "$(quoted "$passes checks pass, exit code $1$failed")" $passed
}
quoted() { printf '"%s"' "$(printf %s "$1" | LC_ALL=C tr '\000-\037' ' ' | sed 's/["\\]/\\&/g')"; }
