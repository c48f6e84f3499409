"""`step-megatron bench`: a part or an op beside its peers, or every GPU kernel against its budget."""

import json
from pathlib import Path

from step_megatron.commands.common import command, default_data
from step_megatron.errors import UserError

# What is benched -> its module in `step_megatron.benchmarks`.
BENCHED_PARTS = {
    "front-end": "front_end",
    "encoder": "encoder",
    "train-step": "train_step",
    "train-tokens": "train_tokens",
    "rollout": "rollout",
    "ppo": "ppo",
    "shares": "shares",
    "checkpoint": "checkpoint",
    "import": "import_speed",
}
# Those that have no peer in transformers.
_WITHOUT_PEER = ("shares", "checkpoint", "import")
# The ops of `step_kernels.bench.OPS`, which is not imported for a list of commands: it brings torch.
BENCHED_OPS = (
    "pool-norm-downsample",
    "conv-downsample-gelu",
    "fused-downsample",
    "merge-audio",
    "gae",
    "audio-attention",
    "causal-attention",
    "paged-attention",
    "linear-cross-entropy",
    "skinny-linear",
    "draw-tokens",
)
# Options of `bench` that only some have.
_OPTIONS = {
    "choose": BENCHED_OPS,
    "device": BENCHED_OPS,
    "out": (*BENCHED_OPS, "import", "checkpoint"),
    "gigabytes": ("import",),
    "make_peer": ("ppo",),
    "preset": ("shares", "rollout", "train-tokens", "checkpoint"),
}


def add_bench(commands) -> None:
    """Declare `bench`."""
    parser = command(commands, "bench", _bench, "time a part or an op against its peers, side by side in one run")
    parser.add_argument("name", nargs="?", choices=(*BENCHED_PARTS, *BENCHED_OPS))
    parser.add_argument("--inspect", action="store_true", help="compile every GPU kernel and hold it against its budget")
    parser.add_argument("--arch", action="append", help="with --inspect: sm_90a (default), sm_80, sm_100; may be repeated")
    parser.add_argument("--data", type=Path, default=default_data())
    parser.add_argument("--repeats", type=int, help="rounds (default: 5; of an op 15, fewer where one takes long)")
    parser.add_argument("--clips", type=int, help="clips in the sample")
    parser.add_argument("--gigabytes", type=float, help="of import: size of the checkpoint (default: 1.2)")
    parser.add_argument("--preset", help="of shares, rollout, train-tokens, checkpoint: the model (default: tiny, and smol-135m)")
    parser.add_argument("--make-peer", action="store_true", help="of ppo: make TRL's environments where they are not there")
    parser.add_argument("--out", type=Path, help="folder of an op's CSV and plot, or to write into (default: runs/bench)")
    parser.add_argument("--device", help="of an op (default: cuda where there is one, else cpu)")
    parser.add_argument("--choose", action="store_true", help="of attention: use the fastest backend on this device from now on")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")


def _bench(options) -> int | None:
    import importlib
    import importlib.util

    if options.inspect:
        from step_kernels.inspect import ARCHITECTURES, run

        return run(options.arch or ARCHITECTURES[:1], options.json)
    if options.name is None:
        raise UserError("bench: say what to time (see --help), or --inspect")
    for option, names in _OPTIONS.items():
        if getattr(options, option) and options.name not in names:
            raise UserError(f"bench {options.name}: has no --{option.replace('_', '-')}; that is of {', '.join(names)}")
    if options.choose:
        from step_kernels.bench import choose

        if options.out is not None:
            raise UserError("bench --choose writes the file of choices, no folder; STEP_KERNELS_CHOICES names another, not --out")
        result = choose(options.name, options.repeats or 15, options.device)
    elif options.name in BENCHED_OPS:
        from step_kernels.bench import run

        result = run(options.name, options.repeats, options.out or Path("runs/bench"), options.device)
    elif options.name not in _WITHOUT_PEER and importlib.util.find_spec("transformers") is None:
        raise ImportError(
            f"bench {options.name} compares with transformers, which is not installed; run: pip install 'step-megatron[dev]' "
            "(in a checkout: pip install -e '.[dev]')"
        )
    else:
        options.repeats = options.repeats or 5
        result = importlib.import_module(f"step_megatron.benchmarks.{BENCHED_PARTS[options.name]}").run(options)
    if options.json:
        print(json.dumps(result))
