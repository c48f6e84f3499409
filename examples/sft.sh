#!/usr/bin/env bash
# Cold-start SFT on top of the quickstart: builds dialogues about the same clips, measures how well the mid-trained run holds them,
# fine-tunes it, and measures again.
#
#   bash examples/sft.sh
#
# Needs the quickstart to have run. Writes runs/quickstart-sft: results.json and report.html, and before/ with those of the run that
# it started from. Safe to interrupt and run again: training goes on from its last checkpoint.
#
# STEP_RUN  the run to start from (default runs/quickstart)      STEP_VENV, STEP_DATA, STEP_RANKS  as in quickstart.sh
set -euo pipefail
cd "$(dirname "$0")/.."
export STEP_DATA="${STEP_DATA:-data}"
start="${STEP_RUN:-runs/quickstart}"
run="$start-sft"
ranks="${STEP_RANKS:-2}"
open="$STEP_DATA/open-speech"
dialogues="$open/dialogues"
source examples/environment.sh
[ -f "$start/run.json" ] || { echo "error: $start/run.json is missing; run examples/quickstart.sh first, or set STEP_RUN" >&2; exit 1; }

[ -f "$dialogues/SUMMARY.json" ] || step-megatron data build-dialogues --open-speech "$open"
[ -f "$run/before/results.json" ] || step-megatron eval --run "$start" --data "$dialogues" --out "$run/before/results.json"
OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node "$ranks" --shutdown-timeout 600 -m step_megatron.cli train sft \
    --config examples/recipes/quickstart-sft.yaml training.epochs=1 "run.dir=$run" "model.weights=$start" "tokenizer.path=$dialogues/tokenizer" \
    "data.index=$open/index.jsonl" "audio.cache_dir=$open/encoded" "megatron.transformer.tensor_model_parallel_size=$ranks" \
    "data.sources=[{name: dialogues, path: $dialogues/train.jsonl}]" \
    "data.validation=[{name: dialogues, path: $dialogues/validation.jsonl}]"
step-megatron eval --run "$run" --data "$dialogues"

python - "$run" <<'END'
import json, pathlib, sys
run = pathlib.Path(sys.argv[1])
before, after = (json.loads((run / name).read_text())["aspects"] for name in ("before/results.json", "results.json"))
def share(value):
    return "-" if value is None else f"{value:.2f}"
print(f"\n{'held-out dialogues':<24}{'before':>8}{'after':>8}{'another clip':>14}{'n':>6}")
for aspect, r in after.items():
    figures = share(before[aspect]["quality"]), share(r["quality"]), share(r["other_clip"])
    print("{:<24}{:>8}{:>8}{:>14}{:>6}".format(aspect.replace("_", " "), *figures, r["n"]))
END
