"""Which backends can run the ops on a device, and which one is used.

`STEP_KERNELS_BACKEND` forces one by name. A backend that cannot run is an error, never a silent fallback.
"""

import os

import torch

BACKENDS = ("cuda", "triton", "cpp", "torch")
_VARIABLE = "STEP_KERNELS_BACKEND"


def available_backends(device: torch.device | str) -> dict[str, str]:
    """Name every backend with the reason why it cannot run on `device`; an empty reason means that it can.

    The order is the order of preference.
    """
    kind = torch.device(device).type
    return {name: "" if name == "torch" else f"step_kernels has no {name} ops for {kind} yet" for name in BACKENDS}


def select_backend(device: torch.device | str) -> str:
    """Name the backend that runs the ops on `device`: the forced one, or the first that is available.

    Raises:
        RuntimeError: if `STEP_KERNELS_BACKEND` names an unknown or an unavailable backend.
    """
    reasons = available_backends(device)
    forced = os.environ.get(_VARIABLE, "")
    if not forced:
        return next(name for name, reason in reasons.items() if not reason)
    usable = ", ".join(name for name, reason in reasons.items() if not reason)
    if forced not in reasons:
        raise RuntimeError(f"{_VARIABLE}={forced} is not a backend; available on {device}: {usable}")
    if reasons[forced]:
        raise RuntimeError(f"{_VARIABLE}={forced} cannot be used: {reasons[forced]}; unset it or choose one of: {usable}")
    return forced
