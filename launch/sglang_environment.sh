# shellcheck shell=bash
# Sourced by the SGLang launchers: the virtual environment that they run in, apart from the trainer's.

# A flag that both launchers have.
server_flag() {
  case "$1" in
    --port=?*) port="${1#*=}" ;;
    --host=?*) host="${1#*=}" ;;
    --venv=?*) venv="${1#*=}" ;;
    --dry-run) dry_run=yes ;;
    --help | -h)
      usage
      exit 0
      ;;
    *) refuse "unknown argument '$1'; the server's own flags follow --" ;;
  esac
}

# The lines of a requirements file without comments: those that match the pattern, or with -v those that do not.
requirements() {
  grep -Ev '^(#|$)' "$root/$1" | grep -E "${@:2}" | tr '\n' ' '
}

# The first of the given interpreters that is there, or the one that PYTHON names.
find_python() {
  local candidate
  for candidate in ${PYTHON:-"$@"}; do
    if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "$(basename "$0"): no Python to make $venv with: looked for ${PYTHON:-$*}; name one: PYTHON=/path/to/python3.11 $0" >&2
  return 1
}

# Whether $venv holds the package: put there by these steps, or by someone else.
has_installed() {
  local stamp="$venv/.installed-$1"
  if [ -e "$stamp" ]; then
    [ "$(cat "$stamp")" = "${*:2}" ]
  else
    "$venv/bin/python" -c "import importlib.metadata as m; m.version('$1')" 2>/dev/null
  fi
}

# install PACKAGE "INTERPRETER…" STEP…: each step is the arguments of one `pip install`; the last brings the package.
# Launchers that are started together wait for the first of them.
install() {
  local package="$1" interpreters="$2" interpreter step words
  shift 2
  exec 9<"$root/launch"
  [ -n "$dry_run" ] || flock 9
  if ! has_installed "$package" "$@"; then
    if [ ! -x "$venv/bin/python" ]; then
      read -ra words <<<"$interpreters"
      interpreter="$(find_python "${words[@]}")"
      do_it "$interpreter" -m venv "$venv"
    fi
    [ -n "$dry_run" ] || echo "installing $package into $venv (once; some minutes)"
    for step in "$@"; do
      read -ra words <<<"$step"
      do_it "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${words[@]}"
    done
    [ -n "$dry_run" ] || echo "$*" >"$venv/.installed-$package"
  fi
  exec 9<&-
}
