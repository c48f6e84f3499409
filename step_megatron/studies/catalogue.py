"""The studies that there are, and what each asks.

`joint-vs-sequential`: does training rubric and preference samples one kind after the other make the policy forget, and training
both in the same batches not? (Section 3.3 of the Step-Audio-R1.5 report says so.) Every arm has two legs of equally many prompts
and updates, each a run of PPO with a reference and an optimizer of its own; at its end it has seen as many samples of either kind
as the others.

`reward-trap`: does a policy that is rewarded for verifiable answers alone become right and lose its manner, and what does
preference change? (The report's "verifiable reward trap".) The judge of preference here hears nothing: it knows manner alone, as
the check knows right answers alone. One run of PPO an arm, measured on the way.
"""

from step_megatron.studies.arms import Leg, Study
from step_megatron.studies.prompts import KINDS

_QUARTERS = 4


def _trap(rewards: str) -> tuple[Leg, ...]:
    return (Leg("ppo", ("preference",), rewards),) * _QUARTERS


STUDIES = {
    "joint-vs-sequential": Study(
        title="Joint training, or one kind after the other",
        arms={
            "joint": (Leg("first", KINDS), Leg("second", KINDS)),
            "preference first": (Leg("first", ("preference",)), Leg("second", ("rubric",))),
            "rubric first": (Leg("first", ("rubric",)), Leg("second", ("preference",))),
        },
        kinds=KINDS,
        panels=tuple((f"{kind}: {measure}", f"{kind}/{measure}") for measure in ("reward", "right", "form") for kind in KINDS),
        forgetting=True,
    ),
    "reward-trap": Study(
        title="The verifiable reward trap",
        arms={
            "RLVR": _trap("[{kind: verifiable}]"),
            "RLHF": _trap("[{kind: preference}]"),
            "both": _trap("[{kind: verifiable}, {kind: preference}]"),
        },
        kinds=("preference",),
        hears=False,
        panels=(
            ("accuracy", "preference/right"),
            ("asked-for form", "preference/form"),
            ("preference over the start", "preference/preference"),
            ("words a reply", "preference/words"),
            ("words of reasoning", "preference/reasoning_words"),
            ("distinct words", "preference/distinct_1"),
            ("distinct pairs of words", "preference/distinct_2"),
            ("entropy", "training/entropy"),
            ("KL from the start", "training/kl"),
        ),
    ),
}
