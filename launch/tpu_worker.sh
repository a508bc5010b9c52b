#!/usr/bin/env bash
# What launch/tpu_vm.sh does on a worker: tpu_worker.sh install [NFS] | start DIR TRAINER-FLAGS… | logs | stop
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

running() { grep -qs etagent_jax.supervise "/proc/$(cat supervise.pid 2>/dev/null)/cmdline"; }

install() {
  export PATH="$HOME/.local/bin:$PATH"
  command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
  uv python install 3.12 # the images come with an older one
  PYTHON="$(uv python find 3.12)" REQUIREMENTS="requirements.txt requirements-tpu.txt" bash -eu launch/environment.sh
  if [ -n "${1:-}" ] && ! mountpoint -q /mnt/runs; then
    sudo apt-get install -y -q -o DPkg::Lock::Timeout=600 nfs-common
    sudo mkdir -p /mnt/runs
    sudo mount -t nfs "$1" /mnt/runs
    [ -w /mnt/runs ] || sudo chmod a+rwx /mnt/runs
  fi
}

start() {
  if running; then
    echo "$(hostname): a run is going on already; stop it first" >&2
    exit 1
  fi
  export TOKENIZERS_PARALLELISM=false
  setsid nohup .venv/bin/python -m etagent_jax.supervise "--run=$1" -- \
    .venv/bin/python -m etagent_jax.train "${@:2}" "--config.run=$1" >>supervise.log 2>&1 </dev/null &
  echo $! >supervise.pid
  echo "$(hostname): started"
}

stop() {
  running || echo "$(hostname): no run is going on"
  while running; do
    [ -n "${asked:-}" ] || kill -TERM "$(cat supervise.pid)"
    asked=yes
    sleep 1
  done
  [ -z "${asked:-}" ] || echo "$(hostname): stopped"
}

case "$1" in
  install) install "${@:2}" ;;
  start) start "${@:2}" ;;
  logs) exec tail -n 100 -F supervise.log ;;
  stop) stop ;;
esac
