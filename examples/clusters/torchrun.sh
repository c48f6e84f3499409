#!/bin/bash
# Train on several nodes of eight GPUs without a scheduler: start this on every node. Written, not run on a cluster.
#
#   NODES=8 HEAD=node0 bash examples/clusters/torchrun.sh sft examples/recipes/sft-32b-8k.yaml run.dir=/shared/runs/sft ...
#
# NODES is their number, HEAD the name of one that all others reach. The environment, the run's directory and the data have to be
# on a file system that all nodes see.
set -euo pipefail

if [ $# -lt 2 ] || [ -z "${NODES:-}" ] || [ -z "${HEAD:-}" ]; then
    echo "usage: NODES=N HEAD=HOST bash $0 STAGE RECIPE [key=value ...]" >&2
    exit 2
fi
stage=$1 recipe=$2
shift 2
export CUDA_DEVICE_MAX_CONNECTIONS=1 # Megatron's order of kernels under tensor and sequence parallelism

exec torchrun --nnodes "$NODES" --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint "$HEAD:29500" --rdzv-id step-megatron \
    --shutdown-timeout 600 -m step_megatron.cli train "$stage" --config "$recipe" "$@"
