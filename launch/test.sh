#!/usr/bin/env bash
# The whole test suite, linters first: bash launch/test.sh [pytest arguments, e.g. -m "not slow"]
set -euo pipefail
REQUIREMENTS="requirements.txt requirements-test.txt"
source "$(dirname "$0")/environment.sh"

export TOKENIZERS_PARALLELISM=false JAX_PLATFORMS=cpu
ruff check .
ruff format --check .
mypy
python -m pytest "$@"
