# Sourced by the scripts beside it: a virtual environment in .venv with the requirements named in
# REQUIREMENTS, installed once.  PYTHON chooses the interpreter (3.11 or newer; default: the first found).
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"

python_is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if python_is_new_enough "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  echo "no Python 3.11 or newer found; install one, or name it: PYTHON=/path/to/python3.12 $0" >&2
  return 1
}

venv=.venv
if [ ! -x "$venv/bin/python" ]; then
  interpreter="$(find_python)"
  echo "making $venv with $("$interpreter" --version)"
  "$interpreter" -m venv "$venv" || { rm -rf "$venv"; exit 1; }
fi
for requirements in $REQUIREMENTS; do
  stamp="$venv/.installed-$requirements"
  if ! cmp -s "$requirements" "$stamp"; then
    echo "installing $requirements (once)"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements"
    cp "$requirements" "$stamp"
  fi
done
export PATH="$root/$venv/bin:$PATH"
