#!/usr/bin/env bash
# Trains an audio language model on real speech, end to end, and shows that it listens.
#
#   bash examples/quickstart.sh [CLIPS]
#
# Fetches open recordings and a pre-trained Whisper encoder, encodes the clips once, mid-trains a small decoder with tensor
# parallelism over two processes and evaluates it on held-out clips. Then fine-tunes it on dialogues (SFT), trains a reward model on
# constructed preferences, and lets it teach the fine-tuned model (PPO). Writes runs/quickstart/report.html. On a CPU by default.
# The later stages are runs in folders of it: sft, reward, ppo. Safe to interrupt and run again: what is finished is kept. CLIPS (for
# example 200) takes only so many clips, for a quick look, into a run of its own (runs/quickstart-200), and ends with the evaluation:
# so few clips are too few to make dialogues of.
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
source examples/stages.sh

stage fetch step-megatron data fetch --group quickstart
stage build step-megatron data build --out "$open" ${clips:+--clips "$clips"}
stage encode several data encode "${recipe[@]}"
stage midtrain several train midtrain "${recipe[@]}"
stage evaluate step-megatron eval --run "$run" --data "$open"
[ -z "$clips" ] || exit 0

dialogues="$open/dialogues" sft="$run/sft" reward="$run/reward" ppo="$run/ppo"
later=("tokenizer.path=$dialogues/tokenizer" "data.index=$open/index.jsonl" "audio.cache_dir=$open/encoded"
    "megatron.transformer.tensor_model_parallel_size=$ranks")
judge=examples/recipes/quickstart-reward.yaml

stage dialogues unless "$dialogues/SUMMARY.json" step-megatron data build-dialogues --open-speech "$open"
stage sft several train sft --config examples/recipes/quickstart-sft.yaml "run.dir=$sft" "model.weights=$run" "${later[@]}" \
    "data.sources=[{name: dialogues, path: $dialogues/train.jsonl, weight: 0.6}, {name: audio, path: $open/train.jsonl, weight: 0.4}]"
stage reward several train reward --config "$judge" "run.dir=$reward" "model.weights=$sft" "${later[@]}" \
    "data.sources=[{name: judge, path: $open/preferences/judge_train.jsonl, weight: 0.85}, {name: audio, path: $open/train.jsonl, weight: 0.15}]"
stage judge unless "$reward/judgments.jsonl" step-megatron judge ask --config "$judge" --run "$reward" \
    --preferences "$open/preferences/test.jsonl" --out "$reward/judgments.jsonl"
step-megatron judge calibrate "$open/preferences/test.jsonl" "$reward/judgments.jsonl" --out "$reward/calibration.json"
stage ppo several train ppo --config examples/recipes/quickstart-ppo.yaml "run.dir=$ppo" "model.weights=$sft" "${later[@]}" \
    "rl.judge.run=$reward" "rl.prompts=[{name: questions, path: $open/prompts/train.jsonl}]"
stage compare unless "$ppo/comparison.json" step-megatron judge compare --run "$ppo" --against "$sft" \
    --prompts "$open/prompts/test.jsonl" --out "$ppo/comparison.json"
step-megatron report --run "$run" --data "$open" --reward "$reward" --ppo "$ppo"
