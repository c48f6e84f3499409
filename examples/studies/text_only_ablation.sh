#!/usr/bin/env bash
# What the text-only source is for: the quickstart's run beside the same run without it (same audio, same steps, same seed, same
# parallel layout).
#
#   bash examples/studies/text_only_ablation.sh
#
# Needs the quickstart to have run; STEP_RUN names its folder (default runs/quickstart). Writes a run beside it
# (runs/quickstart-audio-only) and a report of the run with both side by side.
set -euo pipefail
cd "$(dirname "$0")/../.."
source examples/environment.sh
run="${STEP_RUN:-runs/quickstart}"
other="$run-audio-only"
[ -f "$run/run.json" ] || { echo "error: $run/run.json is missing; run examples/quickstart.sh first, or set STEP_RUN" >&2; exit 1; }
# What the run was made with: as many processes, the same data.
read -r ranks open < <(python - "$run" <<'END'
import json, math, pathlib, sys
from step_megatron.config import load_config
run = pathlib.Path(sys.argv[1])
layout = json.loads((run / "run.json").read_text())["layout"]
print(math.prod(layout.values()), pathlib.Path(load_config(run / "config.yaml").data.index).parent)
END
)
OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node "$ranks" --shutdown-timeout 600 -m step_megatron.cli train midtrain \
    --config "$run/config.yaml" "run.dir=$other" "data.sources=[{name: audio, path: $open/train.jsonl, weight: 1.0}]"
step-megatron eval --run "$other" --data "$open"
step-megatron report --run "$run" --data "$open" --ablation "$other/results.json"
