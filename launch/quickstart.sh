#!/usr/bin/env bash
# From nothing to a calibrated tiny agent and the evidence of it, on a laptop:
#   bash launch/quickstart.sh [--config.seed=1 --config.run=runs/seed1 …]
# Whatever is finished is not done again.
set -euo pipefail
REQUIREMENTS="requirements.txt"
source "$(dirname "$0")/environment.sh"

# JAX's own threads are enough; without a GPU driver, do not look for one.
export TOKENIZERS_PARALLELISM=false
python -m etagent_jax.train --config=configs/phase2.py "$@"
python -m etagent_jax.evaluate --config=configs/evaluate.py "$@"
