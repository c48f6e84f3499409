"""Choose the backend of an op by measurement: `step-megatron bench audio-attention --choose`, `... causal-attention --choose`.

Every backend that runs here is timed on the cases of the bench, with the float types and head dimensions of use on this device,
and the file of choices (`step_kernels.choices`) gets the fastest: the least geometric mean over the cases. The first of the
registered order stays unless another is 5% faster, so that a choice does not change with the noise. One whose bits depend on a
segment's companions is shown but never chosen: encoded clips are cached by their content, whatever they were packed with.
"""

import datetime
import statistics
from dataclasses import asdict, replace

import torch

from step_kernels import choices, registry
from step_kernels.bench import attention, report
from step_kernels.bench.contestants import by
from step_kernels.bench.harness import Absent, Contestant, Measured, measure

_MARGIN = 1.05


def choose(op: str, repeats: int, device: torch.device) -> dict:
    """Measure, print tables, write the file; returns `{"name", "file", "choices"}`.

    Raises:
        ValueError: an op that has one backend on a device, a damaged file of choices, or none named.
        OSError: the file cannot be read or written.
    """
    if op not in attention.OPS:
        raise ValueError(f"bench {op} --choose: there is one backend a device; to choose between are {', '.join(attention.OPS)}")
    choices.to_write()  # a damaged file is known before the measurement, not after
    dtypes = (torch.float32,) if device.type == "cpu" else registry.HALF
    made = [choice for dtype in dtypes for dim in attention.DIMS if (choice := _choose(op, dtype, dim, repeats, device))]
    file = choices.write(made)
    for choice in made:
        print(f"{file}: {choice.op}, {choice.dtype}, {choice.width}: {choice.backend}, {choice.why()}")
    return {"name": op, "file": str(file), "choices": [asdict(choice) for choice in made]}


def _choose(op: str, dtype: torch.dtype, dim: int, repeats: int, device: torch.device) -> choices.Choice | None:
    registered = attention.OPS[op][0]
    backends = registry.backends_of(registered, device)
    names = [name for name, reason in backends.items() if not reason and registry.takes(registered, name, dtype)]
    results, excluded = [], {}
    for case, alone in attention.choice_cases(op, names, device, dtype, dim):
        failures = {each.name: why for each in case.contestants if (why := _fails(each))}
        excluded |= failures
        running = [each for each in case.contestants if each.name not in failures]
        results.append(measure(replace(case, contestants=running), repeats, device))
        print(report.table(results[-1]), flush=True)
        for each in running:
            if not by(each.name, alone)():
                excluded[each.name] = "a segment's bits depend on its companions"
    for name, why in excluded.items():
        print(f"  {name} is not to be chosen: {why}")
    able = [name for name in names if name not in excluded]
    if not able:
        return None
    first, *others = sorted(able, key=lambda name: _mean(results, name))
    if first != able[0] and _mean(results, able[0]) < _MARGIN * _mean(results, first):
        others = [first, *(name for name in others if name != able[0])]
        first = able[0]
    return choices.Choice(
        device=choices.device_name(device),
        op=registered,
        dtype=str(dtype).removeprefix("torch."),
        width=dim,
        backend=first,
        over=others[0] if others else "",
        ratio=round(_mean(results, others[0]) / _mean(results, first), 3) if others else 0.0,
        date=datetime.date.today().isoformat(),
        torch=torch.__version__,
        versions={name: registry.version(name) for name in names},
        cases=[measured.case.shape for measured in results],
        milliseconds={name: [round(1e3 * statistics.median(measured.seconds[name]), 4) for measured in results] for name in able},
        excluded=excluded,
        threads=torch.get_num_threads() if device.type == "cpu" else 0,
    )


def _fails(contestant: Contestant) -> str:
    try:
        with contestant.within():
            contestant.prepare()
    except Absent as reason:
        return str(reason)
    return ""


def _mean(results: list[Measured], name: str) -> float:
    return statistics.geometric_mean(statistics.median(measured.seconds[name]) for measured in results)
