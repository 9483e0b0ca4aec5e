# shellcheck shell=bash
# What the caller's shell exports changes no command's meaning; the settings in .env are known.
unset CDPATH GREP_OPTIONS POSIXLY_CORRECT
set +o posix +o noclobber
# Numbers have a decimal point, and i and I are one letter. macOS has no C.UTF-8.
for language in C.UTF-8 en_US.UTF-8 C; do
  # shellcheck disable=SC2030,SC2031 # tried in a subshell
  [ -n "$( (LC_ALL=$language) 2>&1)" ] || break
done
# shellcheck disable=SC2030,SC2031
export LC_ALL=$language
unset language

# Sets what .env sets and the environment does not. Compose reads the file. The variables are not exported, since a
# container gets them from Compose.
dot_env() {
  local line name settings top
  top=$(dirname "${BASH_SOURCE[0]}")/..
  [ -e "$top/.env" ] && docker compose version >/dev/null 2>&1 || return 0
  settings=$(cd "$top" && docker compose config --environment 2>&1) ||
    { echo "Docker Compose can't read .env (this needs 2.28 or newer): ${settings//$'\n'/ }" >&2; exit 1; }
  while IFS= read -r line; do
    name=${line%%=*}
    [[ $line == *=* && $name =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] && [ -z "${!name+set}" ] || continue
    printf -v "$name" %s "${line#*=}"
  done <<<"$settings"
}
[ "${SETTINGS:-}" = none ] || dot_env
