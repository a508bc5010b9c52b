#!/usr/bin/env bash
# Train on a Cloud TPU slice, on all its workers.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/launch/common.sh"

name="${TPU_NAME:-etagent}"
zone="${TPU_ZONE:-}"
project="${TPU_PROJECT:-}"
type="${TPU_TYPE:-v5litepod-16}"
version="${TPU_VERSION:-}"
nfs="${TPU_NFS:-}"
spot=""
queued=""

usage() {
  cat <<'END'
usage: launch/tpu_vm.sh create | install | run | logs | stop | delete [FLAGS]

  create   make the slice, or use the one of this name that is there
  install  copy this repository to all workers and make .venv there
  run      start training on all workers, each under its own supervisor; goes on when the connection is cut
  logs     show what worker 0 prints, until Ctrl-C
  stop     save a checkpoint and end, on all workers; `run` with the same flags goes on
  delete   delete the slice

flags, or the environment:                                             default
  --name=NAME       TPU_NAME     of the slice                          etagent
  --zone=ZONE       TPU_ZONE                                           that of gcloud's configuration
  --project=ID      TPU_PROJECT                                        that of gcloud's configuration
  --type=TYPE       TPU_TYPE     accelerator type                      v5litepod-16
  --version=V       TPU_VERSION  runtime version                       by the type
  --spot                         create: preemptible, cheaper
  --queued                       create, delete: as a queued resource; `create` waits until it is there
  --nfs=HOST:/PATH  TPU_NFS      install: mounted at /mnt/runs         nothing is mounted
  --run=DIR                      run: on storage that all share        /mnt/runs/NAME
  --dry-run                      print the commands, one a line, and do nothing
`run` hands --config=… and --config.FIELD=… on to the trainer.

examples:
  launch/tpu_vm.sh create --name=seven --type=v5p-32 --zone=us-east5-a --spot --queued
  launch/tpu_vm.sh install --name=seven --zone=us-east5-a --nfs=10.0.0.2:/share
  launch/tpu_vm.sh run --name=seven --zone=us-east5-a --config=configs/phase2.py:qwen2.5-7b \
    --config.model.path=/mnt/runs/Qwen2.5-7B-Instruct
  launch/tpu_vm.sh logs --name=seven --zone=us-east5-a
END
}

verb="${1:-}"
case "$verb" in
  create | install | run | logs | stop | delete) shift ;;
  --help | -h) ;;
  *) refuse "the first argument must be create, install, run, logs, stop or delete, got '$verb'" ;;
esac
for argument in "$@"; do
  value="${argument#*=}"
  case "$argument" in
    --name=?*) name="$value" ;;
    --zone=?*) zone="$value" ;;
    --project=?*) project="$value" ;;
    --type=?*) type="$value" ;;
    --version=?*) version="$value" ;;
    --nfs=?*) nfs="$value" ;;
    --spot) spot=yes ;;
    --queued) queued=yes ;;
    *) common_flag "$argument" ;;
  esac
done
run="${run:-/mnt/runs/$name}"
[ "$verb" = run ] || [ ${#trainer[@]} -eq 0 ] || refuse "${trainer[0]} is for run, not for $verb"

place=(${zone:+"--zone=$zone"} ${project:+"--project=$project"})

# A line for the shell of workers: all of them, or a number.
on_workers() {
  do_it gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" "--worker=$1" "--command=$2"
}

worker_script() { as_line bash etagent_jax/launch/tpu_worker.sh "$@"; }

runtime_version() {
  case "$type" in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) refuse "no runtime version is known for the type '$type'; give --version=…" ;;
  esac
}

create() {
  local describe make
  version="${version:-$(runtime_version)}"
  local common=("$name" "${place[@]}" "--accelerator-type=$type" ${spot:+--spot})
  if [ -n "$queued" ]; then
    describe=(gcloud compute tpus queued-resources describe "$name" "${place[@]}" "--format=value(state.state)")
    make=(gcloud compute tpus queued-resources create "${common[@]}" "--node-id=$name" "--runtime-version=$version")
  else
    describe=(gcloud compute tpus tpu-vm describe "$name" "${place[@]}" "--format=value(state)")
    make=(gcloud compute tpus tpu-vm create "${common[@]}" "--version=$version")
  fi
  if [ -n "$dry_run" ]; then
    echo "$(as_line "${describe[@]}") || $(as_line "${make[@]}")"
  elif "${describe[@]}" 2>/dev/null; then
    echo "$name is there already"
  else
    "${make[@]}"
  fi
  [ -z "$queued" ] || wait_for_queue "${describe[@]}"
}

wait_for_queue() {
  if [ -n "$dry_run" ]; then
    echo "until [ \"\$($(as_line "$@"))\" = ACTIVE ]; do sleep 30; done"
    return
  fi
  local state=""
  until [ "$state" = ACTIVE ]; do
    state="$("$@")"
    echo "$name: $state"
    case "$state" in
      ACTIVE) ;;
      FAILED | SUSPENDING | SUSPENDED)
        echo "$name will not come; delete it with --queued and create it anew" >&2
        exit 1
        ;;
      *) sleep 30 ;;
    esac
  done
}

install() {
  local archive="${TMPDIR:-/tmp}/etagent_jax-$name.tar.gz"
  do_it tar -czf "$archive" -C "$root" --exclude=./.git --exclude='./.venv*' --exclude=./runs .
  do_it gcloud compute tpus tpu-vm scp "$archive" "$name:etagent_jax.tar.gz" "${place[@]}" --worker=all
  on_workers all "mkdir -p etagent_jax && tar -xzf etagent_jax.tar.gz -C etagent_jax"
  on_workers all "$(worker_script install ${nfs:+"$nfs"})"
}

delete() {
  if [ -n "$queued" ]; then
    do_it gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
  else
    do_it gcloud compute tpus tpu-vm delete "$name" "${place[@]}" --quiet
  fi
}

case "$verb" in
  create) create ;;
  install) install ;;
  run)
    check_trainer
    on_workers all "$(worker_script start "$run" "${trainer[@]}")"
    ;;
  logs) on_workers 0 "$(worker_script logs)" ;;
  stop) on_workers all "$(worker_script stop)" ;;
  delete) delete ;;
esac
