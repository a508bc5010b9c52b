#!/usr/bin/env bash
# Serve a model with SGLang on this machine, and start the server again when it dies.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/launch/common.sh"
source "$root/launch/sglang_environment.sh"

usage() {
  cat <<'END'
usage: launch/sglang_server.sh --model=DIR [--port=PORT] [--host=ADDRESS] [--cpu] [--venv=DIR] [--dry-run]
                               [-- SGLANG'S OWN FLAGS]

Serves the Hugging Face folder DIR with SGLang, and says so when it is ready.  When the server dies, it is started
again; the trainer then brings it up to date.  After 5 deaths without a quiet minute the launcher gives up and says
why.  SIGTERM or Ctrl-C ends the server with all its processes, and the launcher with status 0.

  --model=DIR    folder with config.json, weights and tokenizer
  --port=PORT    (default: 30000)
  --host=ADDRESS to listen on (default: 127.0.0.1, this machine alone; 0.0.0.0: all of its addresses)
  --cpu          without GPUs: slow, for small models and tests; needs Python 3.11
  --venv=DIR     virtual environment (default: .venv-sglang); made, and SGLang installed in it, if it is not there
  --dry-run      print the commands, one a line, and do nothing
One server takes all GPUs of CUDA_VISIBLE_DEVICES (default: all of the machine), by tensor parallelism.
SGLANG_API_KEY is the key that clients must send (default: none).  PYTHON names the interpreter that makes the
virtual environment.  What follows -- is given to SGLang as it is, after the launcher's own flags.

examples:
  launch/sglang_server.sh --model=/models/Qwen2.5-7B-Instruct --host=0.0.0.0
  CUDA_VISIBLE_DEVICES=0,1 launch/sglang_server.sh --model=/models/Qwen2.5-7B-Instruct -- --mem-fraction-static 0.6
  launch/sglang_server.sh --cpu --model=runs/quickstart/sft/model --port=31000
END
}

model=""
port=30000
host=127.0.0.1
cpu=""
venv="$root/.venv-sglang"
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case "$1" in
    --model=?*) model="${1#*=}" ;;
    --cpu) cpu=yes ;;
    *) server_flag "$1" ;;
  esac
  shift
done
[ $# -eq 0 ] || shift
[ -n "$model" ] || refuse "give the model's folder: --model=DIR"
[ -e "$model/config.json" ] || refuse "$model/config.json is not there; --model=DIR must be a Hugging Face folder"
check_count --port "$port"
[ "$host" = 0.0.0.0 ] && nearby=127.0.0.1 || nearby="$host"
url="http://$nearby:$port"

# --sleep-on-idle: an idle server leaves the processor to the trainer.
# --log-level-http: not a line for every request.
serve=(-m sglang.launch_server --model-path "$model" --host "$host" --port "$port" --sleep-on-idle
  --log-level-http warning)
if [ -n "$cpu" ]; then
  # Without TORCHDYNAMO_DISABLE the first request with penalties compiles for half a minute; one thread leaves the other
  # cores to the trainer; sglang_cpu holds what SGLang imports and a CPU does not have.
  environment=(SGLANG_USE_CPU_ENGINE=1 TORCHDYNAMO_DISABLE=1 OMP_NUM_THREADS=1 "PYTHONPATH=$root/launch/sglang_cpu")
  serve+=(--device cpu --dtype float32 --max-total-tokens 32768)
  alone='^(sglang|torchvision)='
  interpreters=python3.11
  steps=("$(requirements requirements-sglang-cpu.txt '^torch=')"
    "$(requirements requirements-sglang-cpu.txt -v "^torch=|$alone")"
    "--no-deps $(requirements requirements-sglang-cpu.txt "$alone")")
else
  gpus=0
  if command -v nvidia-smi >/dev/null; then gpus="$(nvidia-smi --list-gpus | grep -c '^GPU' || true)"; fi
  [ "$gpus" -gt 0 ] || refuse "no NVIDIA GPU is here; --cpu serves without one"
  visible="${CUDA_VISIBLE_DEVICES:-$(seq -s , 0 $((gpus - 1)))}"
  environment=("CUDA_VISIBLE_DEVICES=$visible")
  serve+=(--tp "$(tr ',' '\n' <<<"$visible" | wc -l)")
  interpreters="python3.12 python3.11 python3.10"
  steps=("$(requirements requirements-sglang.txt '^sglang=')")
fi
serve+=("$@")

say() { echo "$(basename "$0"): $1"; }

# Whether something listens there; the first line that it answers is in `reply`.
answers() {
  reply="$(
    exec 2>/dev/null 3<>"/dev/tcp/$nearby/$port" || exit 1
    printf 'GET /health HTTP/1.0\r\n\r\n' >&3
    read -r -t 5 line <&3
    echo "$line"
  )"
}

if [ -z "$dry_run" ] && answers; then
  refuse "port $port of $nearby is in use; choose another --port, or end what listens there"
fi
install sglang "$interpreters" "${steps[@]}"
if [ -n "$dry_run" ]; then
  as_line env "${environment[@]}" "$venv/bin/python" "${serve[@]}"
  exit 0
fi

# A key on the command line could be read by every user of the machine.
if [ -n "${SGLANG_API_KEY:-}" ]; then
  secret="$(mktemp --suffix=.yaml)"
  echo "api-key: '${SGLANG_API_KEY//\'/\'\'}'" >"$secret"
  serve+=(--config "$secret")
fi

# The server and its processes are a group; none may outlive the others.
server=""
end_server() {
  local second
  [ -n "$server" ] || return 0
  kill -TERM "$server" 2>/dev/null || true
  for second in 1 2 3 4 5 6 7 8 9 10; do
    kill -0 "$server" 2>/dev/null || break
    sleep "0.$second"
  done
  kill -KILL -- "-$server" 2>/dev/null || true
}
at_end() {
  trap '' TERM INT
  end_server
  rm -f "${secret:-}"
}
trap at_end EXIT
trap 'exit 0' TERM INT

# Until the server is ready; false if it dies before.
wait_until_ready() {
  local began=$SECONDS shown=0
  until answers && [[ "$reply" == *" 200 "* ]]; do
    kill -0 "$server" 2>/dev/null || return 1
    if [ $((SECONDS - began)) -ge $((shown + 10)) ]; then
      shown=$((SECONDS - began))
      say "waiting for $url ($shown s): $(tail -n 1 "$log" | cut -c -100)"
    fi
    sleep 1
  done
  kill -0 "$server" 2>/dev/null || return 1
  say "serving $model at $url (process $server, ready after $((SECONDS - began)) s, log $log)"
}

log="$(mktemp -d -t sglang.XXXXXX)/sglang-$port.log"
deaths=0
was_ready=""
while true; do
  env "${environment[@]}" setsid "$venv/bin/python" "${serve[@]}" >"$log" 2>&1 &
  server=$!
  ready_at=""
  if wait_until_ready; then
    ready_at=$SECONDS
    was_ready=yes
  fi
  status=0
  wait "$server" 2>/dev/null || status=$?
  end_server
  reason="the server died with status $status"
  if [ -z "$was_ready" ]; then
    tail -n 30 "$log" >&2
    say "$reason before it was ready; the end of its log is above, all of it in $log" >&2
    exit 1
  fi
  if [ -n "$ready_at" ] && [ $((SECONDS - ready_at)) -ge 60 ]; then deaths=0; fi
  deaths=$((deaths + 1))
  tail -n 3 "$log"
  cp "$log" "$log.$deaths"
  if [ "$deaths" -ge 5 ]; then
    say "$reason, the fifth time without a quiet minute: giving up; the logs are $log.1 to $log.5" >&2
    exit 1
  fi
  say "$reason; starting it again"
done
