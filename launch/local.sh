#!/usr/bin/env bash
# Train in several processes on this machine, supervised.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/launch/common.sh"

usage() {
  cat <<'END'
usage: launch/local.sh N --config=FILE[:PRESET] [--config.FIELD=VALUE …] [--run=DIR] [--devices=D] [--dry-run]

Trains in N processes on this machine, under the supervisor: when one dies or hangs, all start again from the
last checkpoint.  Ctrl-C stops at a checkpoint; the same command goes on.  Makes .venv if it is not there.

  N            processes.  Where there are NVIDIA GPUs, those of CUDA_VISIBLE_DEVICES (default: all) are dealt out
  --run=DIR    run directory (default: runs/local)
  --devices=D  without GPUs: virtual devices, dealt out to the processes (default: N)
  --dry-run    print the commands, one a line, and do nothing
JAX_PLATFORMS=cpu leaves GPUs alone.

examples:
  launch/local.sh 2 --config=configs/phase2.py
  launch/local.sh 2 --devices=4 --config=configs/sft.py --config.base.micro_batches=-1 --config.sft.micro_batches=-1
  launch/local.sh 8 --run=runs/seven --config=configs/phase2.py:qwen2.5-7b --config.mesh.data=1 --config.mesh.fsdp=8
END
}

processes=""
devices=""
for argument in "$@"; do
  case "$argument" in
    --devices=*) devices="${argument#*=}" ;;
    -*) common_flag "$argument" ;;
    *)
      [ -z "$processes" ] || refuse "unexpected argument '$argument'"
      processes="$argument"
      ;;
  esac
done
check_count "the number of processes, which comes first," "$processes"
check_trainer
run="${run:-runs/local}"

gpus=0
if [ "${JAX_PLATFORMS:-}" != cpu ] && command -v nvidia-smi >/dev/null; then
  gpus="$(nvidia-smi --list-gpus | grep -c '^GPU' || true)"
fi
if [ "$gpus" -gt 0 ]; then
  [ -z "$devices" ] || refuse "--devices is for machines without GPUs; CUDA_VISIBLE_DEVICES names GPUs"
  visible="${CUDA_VISIBLE_DEVICES:-$(seq -s , 0 $((gpus - 1)))}"
  check_even GPUs "$(tr ',' '\n' <<<"$visible" | wc -l)" "$processes"
  requirements="requirements.txt requirements-cuda.txt"
  environment=("CUDA_VISIBLE_DEVICES=$visible")
else
  devices="${devices:-$processes}"
  check_count --devices "$devices"
  check_even devices "$devices" "$processes"
  requirements="requirements.txt"
  environment=(JAX_PLATFORMS=cpu "JAX_NUM_CPU_DEVICES=$((devices / processes))")
fi

do_it cd "$root"
do_it env "REQUIREMENTS=$requirements" bash -eu launch/environment.sh
end_as env TOKENIZERS_PARALLELISM=false "${environment[@]}" \
  .venv/bin/python -m etagent_jax.supervise "--processes=$processes" "--run=$run" -- \
  .venv/bin/python -m etagent_jax.train "${trainer[@]}" "--config.run=$run"
