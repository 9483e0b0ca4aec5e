# shellcheck shell=bash
# Sets what the file .env sets and the environment does not. Compose alone reads the file. What is set here stays in
# this shell, so that for a container Compose takes the value from the file, in whatever form it stands there.
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
dot_env
