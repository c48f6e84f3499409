#!/usr/bin/env bash
# Trains an audio language model on real speech, end to end, and shows that it listens.
#
#   bash examples/quickstart.sh [CLIPS]
#
# Fetches open recordings and a pre-trained Whisper encoder, encodes the clips once, mid-trains a small decoder with tensor
# parallelism over two processes, evaluates on held-out clips and writes runs/quickstart/report.html. On a CPU by default.
# Safe to interrupt and run again: what is finished is kept. CLIPS (for example 200) takes only so many clips, for a quick look, into a
# run of its own (runs/quickstart-200).
#
# STEP_VENV  the environment to use (default .venv)      STEP_DATA  the folder of downloads (default data)
# STEP_RUN   the run's folder (default runs/quickstart)  STEP_RANKS processes to train with (default 2)
set -euo pipefail
cd "$(dirname "$0")/.."
clips="${1:-}"
export STEP_DATA="${STEP_DATA:-data}"
run="${STEP_RUN:-runs/quickstart${clips:+-$clips}}"
ranks="${STEP_RANKS:-2}"
open="$STEP_DATA/open-speech${clips:+-$clips}"
recipe=(--config examples/recipes/quickstart.yaml "run.dir=$run" "tokenizer.path=$open/tokenizer" "data.index=$open/index.jsonl"
    "audio.cache_dir=$open/encoded"
    "encoder.weights=$STEP_DATA/whisper-base" "megatron.transformer.tensor_model_parallel_size=$ranks"
    "data.sources=[{name: audio, path: $open/train.jsonl, weight: 0.85}, {name: text, path: $open/text_train.jsonl, weight: 0.15}]")

source examples/environment.sh
mkdir -p "$run"

# stage NAME COMMAND...: runs it, and keeps for the report the seconds that it took, all attempts together. Once it has been done
# (done.NAME) they stay: a later run finds the work done and says nothing about what it costs.
counted="" began=0
stage() {
    local name="$1"
    shift
    printf '\n== %s (the stages before it: %s s)\n' "$name" "$SECONDS"
    [ -e "$run/done.$name" ] || counted="$name"
    began=$SECONDS
    "$@"
    count
    touch "$run/done.$name"
}
count() {
    [ -n "$counted" ] || return 0
    echo $(($(cat "$run/seconds.$counted" 2> /dev/null || echo 0) + SECONDS - began)) > "$run/seconds.$counted.new"
    mv "$run/seconds.$counted.new" "$run/seconds.$counted"
    counted=""
}
# An attempt that fails or is interrupted counts as well.
trap count EXIT

# The runtime gives every process its share of the cores; torchrun only wants to be told something. After a signal the step is
# finished and saved: torchrun would wait for 30 s only.
several() { OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node "$ranks" --shutdown-timeout 600 -m step_megatron.cli "$@"; }

stage fetch step-megatron data fetch --group quickstart
stage build step-megatron data build --out "$open" ${clips:+--clips "$clips"}
stage encode several data encode "${recipe[@]}"
stage midtrain several train midtrain "${recipe[@]}"
stage evaluate step-megatron eval --run "$run" --data "$open"
