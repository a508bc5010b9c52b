#!/usr/bin/env bash
# One address for several SGLang servers: requests of one trajectory go to one of them.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/launch/common.sh"
source "$root/launch/sglang_environment.sh"

usage() {
  cat <<'END'
usage: launch/sglang_router.sh --workers=URL,URL,… [--port=PORT] [--host=ADDRESS] [--venv=DIR] [--dry-run]
                               [-- THE ROUTER'S OWN FLAGS]

Starts sglang-router before servers that are there.  A trajectory (the header X-SMG-Routing-Key) stays on the server
that holds its prefix; a new one goes to the server with the fewest requests.

  --workers=URL,URL,…  the servers, as the router reaches them
  --port=PORT          (default: 30100); metrics are at the next one
  --host=ADDRESS       to listen on (default: 127.0.0.1, this machine alone)
  --venv=DIR           virtual environment (default: .venv-sglang-router); made and filled if it is not there
  --dry-run            print the commands, one a line, and do nothing
PYTHON names the interpreter that makes the virtual environment.

examples:
  launch/sglang_router.sh --workers=http://10.0.0.2:30000,http://10.0.0.3:30000 --host=0.0.0.0
  launch/sglang_router.sh --workers=http://127.0.0.1:30000,http://127.0.0.1:30001 -- --log-level debug
END
}

workers=""
port=30100
host=127.0.0.1
venv="$root/.venv-sglang-router"
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case "$1" in
    --workers=?*) workers="${1#*=}" ;;
    *) server_flag "$1" ;;
  esac
  shift
done
[ $# -eq 0 ] || shift
[ -n "$workers" ] || refuse "give the servers: --workers=URL,URL"
IFS=, read -ra urls <<<"$workers"
for worker in "${urls[@]}"; do
  [[ "$worker" =~ ^https?://.+ ]] || refuse "--workers: '$worker' is no URL; one begins with http:// or https://"
done
check_count --port "$port"

install sglang-router "python3 python3.13 python3.12 python3.11" \
  "$(requirements requirements-sglang.txt '^sglang-router=')"
[ -n "$dry_run" ] || echo "$(basename "$0"): routing at http://$host:$port to ${#urls[@]} servers"
# manual: the policy that reads the routing key.  Metrics have a default port that two routers of a machine would share.
end_as "$venv/bin/python" -m sglang_router.launch_router --worker-urls "${urls[@]}" --host "$host" --port "$port" \
  --policy manual --assignment-mode min_load --log-level warn \
  --prometheus-host "$host" --prometheus-port $((port + 1)) "$@"
