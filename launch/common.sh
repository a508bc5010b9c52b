# shellcheck shell=bash
# Sourced by the launchers: how they refuse, run or print a command, and read the flags that all of them have.
dry_run=""
run=""
trainer=()

# Wrong usage, as a sentence.
refuse() {
  echo "$(basename "$0"): $1 (--help shows the flags)" >&2
  exit 2
}

# A command as a line that can be pasted into a shell.
as_line() {
  local line="" word
  for word in "$@"; do
    [[ "$word" =~ ^[[:alnum:]_@%+=:,./-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    line+=" $word"
  done
  echo "${line# }"
}

# Run a command, or print it under --dry-run.
do_it() {
  if [ -n "$dry_run" ]; then as_line "$@"; else "$@"; fi
}

# The same for the last command of a script, which takes its place and so gets its signals.
end_as() {
  if [ -n "$dry_run" ]; then as_line "$@"; else exec "$@"; fi
}

# A flag that is not the launcher's own: one of those that all launchers of the trainer have, or the trainer's.
# shellcheck disable=SC2034  # the launchers of servers have no run
common_flag() {
  case "$1" in
    --help | -h)
      usage
      exit 0
      ;;
    --dry-run) dry_run=yes ;;
    --run=?*) run="${1#*=}" ;;
    --config.run=*) refuse "the run directory is given by --run=DIR, not by --config.run" ;;
    --config=?* | --config.?*=* | --initialization_timeout=?*) trainer+=("$1") ;;
    *) refuse "unknown argument '$1'; the trainer's are --config=FILE and --config.FIELD=VALUE" ;;
  esac
}

check_trainer() {
  [[ " ${trainer[*]-}" == *" --config="* ]] || refuse "give a configuration, such as --config=configs/phase2.py"
}

# The first argument is what is counted, the second how many.
check_count() {
  [[ "$2" =~ ^[1-9][0-9]*$ ]] || refuse "$1 must be a whole number above 0, got '$2'"
}

check_even() {
  [ $(($2 % $3)) -eq 0 ] || refuse "$2 $1 cannot be dealt out evenly to $3 processes"
}
