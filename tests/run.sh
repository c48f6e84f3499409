#!/usr/bin/env bash
# Runs every test, in an environment that it makes itself.
#
#   bash tests/run.sh [--full] [pytest arguments]
#
# --full adds the tests marked `slow`. STEP_VENV names the environment, STEP_DATA the folder of downloads (both are kept).
set -euo pipefail
cd "$(dirname "$0")/.."
selection=(-m "not slow")
if [ "${1:-}" = "--full" ]; then
    selection=()
    shift
fi
source examples/environment.sh dev
export STEP_DATA="${STEP_DATA:-$PWD/data}"
# Several processes share the cores in many tests: one compute thread each.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
ruff check .
ruff format --check .
python -m step_megatron.cli data fetch --data "$STEP_DATA" --group tests
python -m pytest "${selection[@]}" --durations=20 "$@"
