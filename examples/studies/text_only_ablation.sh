#!/usr/bin/env bash
# What the text-only source is for: the quickstart's run beside the same run without it (same audio, same steps, same seed).
#
#   bash examples/studies/text_only_ablation.sh
#
# Needs the quickstart to have run; writes runs/audio-only and a report of the quickstart with both side by side.
set -euo pipefail
cd "$(dirname "$0")/../.."
source examples/environment.sh
export STEP_DATA="${STEP_DATA:-data}"
run="${STEP_RUN:-runs/quickstart}"
open="$STEP_DATA/open-speech"
torchrun --standalone --nproc-per-node 2 -m step_megatron.cli train midtrain --config "$run/config.yaml" run.dir=runs/audio-only \
    "data.sources=[{name: audio, path: $open/train.jsonl, weight: 1.0}]"
step-megatron eval --run runs/audio-only --data "$open"
step-megatron report --run "$run" --data "$open" --ablation runs/audio-only/results.json
