#!/usr/bin/env bash
# Train on Kubernetes, as a JobSet of TPU or GPU hosts.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/launch/common.sh"

name=etagent
image=""
claim=""
tpu=""
topology=""
chips=4
gpus=""
gpu_type=""
nodes=1
restarts=10

usage() {
  cat <<'END'
usage: launch/jobset.sh --image=IMAGE --claim=CLAIM (--tpu=TYPE --topology=AxB | --gpus=N) [FLAGS] \
         --config=FILE[:PRESET] [--config.FIELD=VALUE …]

Fills in launch/jobset.yaml and applies it: one pod on each host, each under its own supervisor.

  --image=IMAGE    container image with this repository as its working directory and its requirements installed
  --claim=CLAIM    persistent volume claim (ReadWriteMany), mounted at /runs
  --name=NAME      of the JobSet (default: etagent)
  --run=DIR        run directory, below /runs (default: /runs/NAME)
  --restarts=N     how often Kubernetes may start all pods anew (default: 10)
  --dry-run        print the command with what it would apply, and do nothing
a TPU slice on GKE:
  --tpu=TYPE       such as tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice
  --topology=AxB   such as 4x8, or 2x2x4
  --chips=N        chips of a host (default: 4)
GPUs:
  --gpus=N         of each host
  --nodes=N        hosts (default: 1)
  --gpu-type=TYPE  on GKE, such as nvidia-h100-80gb

examples:
  launch/jobset.sh --image=REGISTRY/etagent --claim=runs --tpu=tpu-v5p-slice --topology=2x2x4 \
    --config=configs/phase2.py:qwen2.5-7b
  launch/jobset.sh --image=REGISTRY/etagent --claim=runs --gpus=8 --nodes=2 --name=seven \
    --config=configs/sft.py:qwen2.5-7b --config.mesh.data=2 --config.mesh.fsdp=8
END
}

for argument in "$@"; do
  value="${argument#*=}"
  case "$argument" in
    --name=?*) name="$value" ;;
    --image=?*) image="$value" ;;
    --claim=?*) claim="$value" ;;
    --tpu=?*) tpu="$value" ;;
    --topology=?*) topology="$value" ;;
    --chips=?*) chips="$value" ;;
    --gpus=?*) gpus="$value" ;;
    --gpu-type=?*) gpu_type="$value" ;;
    --nodes=?*) nodes="$value" ;;
    --restarts=?*) restarts="$value" ;;
    *) common_flag "$argument" ;;
  esac
done
check_trainer
[[ "$name" =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
  refuse "--name must be at most 40 lower-case letters, digits and '-', a letter first, got '$name'"
[ -n "$image" ] || refuse "give the container image: --image=…"
[ -n "$claim" ] || refuse "give the persistent volume claim for the runs: --claim=…"
run="${run:-/runs/$name}"
[[ "$run" == /runs/?* ]] || refuse "--run must be below /runs, where the claim is mounted, got '$run'"
[[ "$restarts" =~ ^[0-9]+$ ]] || refuse "--restarts must be a whole number, got '$restarts'"

if [ -n "$tpu" ] && [ -z "$gpus" ]; then
  [[ "$topology" =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] || refuse "--topology must be like 4x8 or 2x2x4, got '$topology'"
  check_count --chips "$chips"
  total=$((${topology//x/*}))
  [ $((total % chips)) -eq 0 ] || refuse "the $total chips of $topology are not whole hosts of $chips; see --chips"
  hosts=$((total / chips))
  device=google.com/tpu
  count="$chips"
elif [ -n "$gpus" ] && [ -z "$tpu" ]; then
  check_count --gpus "$gpus"
  check_count --nodes "$nodes"
  hosts="$nodes"
  device=nvidia.com/gpu
  count="$gpus"
else
  refuse "give either --tpu and --topology, or --gpus"
fi

fill_in() {
  python3 - "$root/launch/jobset.yaml" "$name" "$image" "$claim" "$run" "$restarts" "$hosts" "$device" "$count" \
    "$tpu" "$topology" "$gpu_type" "${trainer[@]}" <<'END'
import json
import string
import sys

template, name, image, claim, run, restarts, hosts, device, count, tpu, topology, gpu_type, *trainer = sys.argv[1:]
selector = {}
if tpu:
    selector = {"cloud.google.com/gke-tpu-accelerator": tpu, "cloud.google.com/gke-tpu-topology": topology}
elif gpu_type:
    selector = {"cloud.google.com/gke-accelerator": gpu_type}
command = [
    "python", "-m", "etagent_jax.supervise", f"--run={run}", "--",
    "python", "-m", "etagent_jax.train", *trainer, f"--config.run={run}",
]
command = [word.replace("$(", "$$(") for word in command]  # or Kubernetes would take it for a variable
if int(hosts) > 1:
    command += [f"--coordinator={name}-workers-0-0.{name}:8476", f"--processes={hosts}", "--process=$(JOB_COMPLETION_INDEX)"]
values = {
    "name": name,
    "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"} if tpu else {},
    "restarts": int(restarts),
    "hosts": int(hosts),
    "node_selector": selector,
    "image": image,
    "command": command,
    "limits": {device: int(count)},
    "claim": claim,
}
text = string.Template(open(template, encoding="utf-8").read().partition("\n")[2])
print(text.substitute({key: json.dumps(value, ensure_ascii=False) for key, value in values.items()}), end="")
END
}

if [ -n "$dry_run" ]; then
  echo "kubectl apply -f - <<'END'"
  fill_in
  echo END
else
  fill_in | kubectl apply -f -
fi
