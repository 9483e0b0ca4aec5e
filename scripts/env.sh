# shellcheck shell=bash
# Exports what the file .env sets and the environment does not, as Compose understands it. (A value with a $ or a \ is
# left to Compose alone, unless it stands in '…': there they mean nothing else.)
dot_env() {
  local line name value
  while read -r line; do
    line=${line#export } name=${line%%=*} value=${line#*=}
    [[ $line == *=* && $name =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] && [ -z "${!name+set}" ] || continue
    case $value in
      \'*)       value=${value#\'} value=${value%%\'*} ;;
      *[\$\\]*)  continue ;;
      \"*)       value=${value#\"} value=${value%%\"*} ;;
      *)         read -r value <<<"${value%%[[:space:]]#*}" ;;
    esac
    export "$name=$value"
  done < <(cat "$(dirname "${BASH_SOURCE[0]}")/../.env" 2>/dev/null; echo)
}
dot_env
