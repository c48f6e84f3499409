"""Where a run goes on: from the newest checkpoint that is whole."""

from pathlib import Path

from step_megatron.checkpoint import directory, seal
from step_megatron.checkpoint.directory import CheckpointError
from step_megatron.checkpoint.distributed import damage
from step_megatron.runtime.agreement import Ranks
from step_megatron.runtime.progress import get_logger

logger = get_logger(__name__)


def newest_good(run_dir: str | Path, refuse_damaged: bool = False) -> Path | None:
    """The checkpoint to go on from, every file of it held against its sum; every rank calls this.

    That is the one that `latest` names. If it is damaged, it is set aside under another name, and the next older whole one takes
    its place; both are logged. Without a usable `latest` it is the newest whole one.

    Args:
        refuse_damaged: raise in place of setting anything aside.

    Returns:
        None where the run has no checkpoint yet.

    Raises:
        CheckpointError: there are checkpoints but none is whole (a run never starts anew over them), or one is damaged and that
            is to be refused; on every rank.
    """
    ranks, root = Ranks(), directory.checkpoint_root(run_dir)
    candidates, wrong = ranks.from_first(lambda: _candidates(root))
    if wrong and refuse_damaged:
        raise CheckpointError(f"{root / directory.LATEST}: {wrong}; write the name of the checkpoint to go on from into it")
    for candidate in candidates:
        problems = seal.verify(candidate, ranks)
        if not problems:
            failure = ranks.from_first(lambda good=candidate: _point_to(good))
        elif refuse_damaged:
            raise CheckpointError(damage(candidate, problems))
        else:
            failure = ranks.from_first(lambda bad=candidate, why=problems: _set_aside(bad, why))
        if failure:
            raise CheckpointError(failure)
        if not problems:
            return candidate
    if candidates or wrong:
        raise CheckpointError(
            f"{root}: none of the checkpoints here is whole ({wrong or 'all were damaged, see damaged_*/damaged.txt'}); copy a "
            "good one here again, or start a new run in another run.dir"
        )
    return None


def _candidates(root: Path) -> tuple[list[Path], str]:
    """Checkpoints to try, in order, and what is wrong with `latest` where there is something to go on from."""
    try:
        directory.tidy(root)
    except OSError as error:
        logger.warning("%s: what an interrupted save left cannot be cleaned up: %s", root, error)
    newest_first = list(reversed(directory.steps_in(root).values()))
    named, wrong = directory.read_latest(root)
    if named is not None:
        step = directory.step_of(named)
        return [named, *(path for path in newest_first if step is None or directory.step_of(path) < step)], ""
    missing = not newest_first and not (root / directory.LATEST).exists()
    return newest_first, "" if missing else wrong


def _point_to(good: Path) -> str:
    """Have `latest` name it if it does not; returns what went wrong, or nothing."""
    try:
        if directory.read_latest(good.parent)[0] != good:
            logger.warning("going on from %s, the newest checkpoint that is whole", good)
            directory.point_to(good)
    except OSError as error:
        return f"{good.parent / directory.LATEST}: cannot be written ({error.strerror}); write {good.name} into it"
    return ""


def _set_aside(damaged: Path, problems: list[str]) -> str:
    """Rename a damaged checkpoint; returns what went wrong, or nothing."""
    reason = "; ".join(problems)
    try:
        place = directory.set_aside(damaged, reason)
    except OSError as error:
        return f"{damaged} is damaged ({reason}) and cannot be set aside ({error.strerror}); rename it or move it away"
    logger.error("%s is damaged: %s. It was set aside as %s, an older checkpoint takes its place", damaged, reason, place.name)
    return ""
