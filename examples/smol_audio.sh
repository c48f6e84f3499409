#!/usr/bin/env bash
# Trains a real pre-trained pair on speech: whisper-base's encoder, an adaptor, SmolLM2-135M-Instruct.
#
#   bash examples/smol_audio.sh
#
# Fetches both models and recorded telephone prompts in four languages, imports the pair, aligns the adaptor with the decoder frozen,
# mid-trains both on transcription, evaluates on held-out prompts, has whisper-base itself write down the same clips, and writes
# runs/smol-audio/report.html. On a CPU by default, in one process. Safe to interrupt and run again: what is finished is kept.
#
# STEP_VENV  the environment to use (default .venv)      STEP_DATA  the folder of downloads (default data)
# STEP_RUN   the run's folder (default runs/smol-audio)
set -euo pipefail
cd "$(dirname "$0")/.."
export STEP_DATA="${STEP_DATA:-data}"
run="${STEP_RUN:-runs/smol-audio}"
prompts="$STEP_DATA/transcripts"
source examples/environment.sh dev
source examples/stages.sh

# English three times out of four, for SmolLM2 writes little else; the others keep the adaptor from learning the texts by heart.
data=("data.index=$prompts/index.jsonl" "audio.cache_dir=$prompts/encoded" "data.sources=[
    {name: en, path: $prompts/train_en.jsonl, weight: 0.7}, {name: es, path: $prompts/train_es.jsonl, weight: 0.1},
    {name: fr, path: $prompts/train_fr.jsonl, weight: 0.1}, {name: it, path: $prompts/train_it.jsonl, weight: 0.1}]"
    "data.validation=[{name: held-out, path: $prompts/validation.jsonl}]")
align=(--config examples/recipes/smol_audio_align.yaml "run.dir=$run/align" "model.weights=$run/import" "${data[@]}")
midtrain=(--config examples/recipes/smol_audio.yaml "run.dir=$run" "model.weights=$run/align" "${data[@]}")

import() {
    [ -e "$run/import" ] || step-megatron convert import "$STEP_DATA/smollm2" --encoder "$STEP_DATA/whisper-base" --to "$run/import"
}

# Whisper takes longer over the held-out clips than the model does: not again for the same checkpoint.
evaluate() {
    [ "$run/results.json" -nt "$run/checkpoints/latest" ] ||
        step-megatron eval --run "$run" --data "$prompts" --whisper "$STEP_DATA/whisper-base"
}

stage fetch step-megatron data fetch --group smol-audio
stage build step-megatron data build-transcripts --out "$prompts"
stage import import
stage encode step-megatron data encode "${align[@]}"
stage align step-megatron train midtrain "${align[@]}"
stage midtrain step-megatron train midtrain "${midtrain[@]}"
stage evaluate evaluate
