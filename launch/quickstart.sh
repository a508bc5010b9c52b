#!/usr/bin/env bash
# From nothing to a calibrated tiny agent and the evidence of it, on a laptop:
#   bash launch/quickstart.sh [--config.seed=1 --config.run=runs/seed1 …]
# Whatever is finished is not done again.
set -euo pipefail
REQUIREMENTS="requirements.txt"
source "$(dirname "$0")/environment.sh"

export TOKENIZERS_PARALLELISM=false
trap 'exit 0' INT TERM  # a run that is stopped saves itself; what comes after it must not start
python -m etagent_jax.train --config=configs/phase2.py "$@"
python -m etagent_jax.evaluate --config=configs/evaluate.py "$@"
