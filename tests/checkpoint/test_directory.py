"""The folder of checkpoints: which is the newest, which stay, what a dead run left, and what set aside means."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from step_megatron.checkpoint import directory
from step_megatron.checkpoint.directory import CheckpointError, Retention, checkpoint_at, checkpoint_root, latest_checkpoint
from step_megatron.runtime import folders


def make(root, *steps):
    for step in steps:
        checkpoint_at(root, step).mkdir(parents=True)
        (checkpoint_at(root, step) / "file").write_text(str(step))


def names(root):
    return sorted(path.name for path in root.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("step_00000005\n", "names step_00000005, which does not exist"),
        ("../step_00000001", "is no name of a checkpoint"),
        ("", "is no name of a checkpoint"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_a_pointer_that_cannot_be_used_is_named_with_what_there_is(content, message, tmp_path):
    root = checkpoint_root(tmp_path)
    make(root, 1, 3)
    if content is not None:
        (root / "latest").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=rf"latest: .*{message}.*there are: step_00000001, step_00000003"):
        latest_checkpoint(tmp_path)


def test_a_run_without_checkpoints_has_no_newest(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    checkpoint_root(tmp_path).mkdir()
    assert latest_checkpoint(tmp_path) is None


@settings(max_examples=60, deadline=None)
@given(
    steps=st.sets(st.integers(0, 10**9), min_size=1, max_size=12),
    newest=st.integers(0, 4),
    every=st.integers(0, 5),
    best=st.booleans(),
    data=st.data(),
)
def test_what_stays_is_what_was_asked_for(steps, newest, every, best, data, tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    make(root, *steps)
    (root / "step_00000001_copy").mkdir()
    losses = {step: data.draw(st.none() | st.floats(0, 9)) for step in steps}
    now = data.draw(st.sampled_from(sorted(steps)))
    by_name = {checkpoint_at(root, step).name: loss for step, loss in losses.items()}
    directory.remove_others(checkpoint_at(root, now), Retention(newest, every, best), lambda path: by_name[path.name])
    left = set(directory.steps_in(root))
    assert (root / "step_00000001_copy").is_dir() and not list(root.glob(".*"))
    assert now in left and {step for step in steps if step > now} <= left
    if newest == 0:
        assert left == steps
        return
    past = sorted(step for step in steps if step <= now)
    known = [step for step in past if losses[step] is not None]
    for step in past:
        wanted = step in past[-newest:] or (every and step % every == 0)
        lowest = bool(known) and losses[step] is not None and losses[step] == min(losses[k] for k in known)
        if wanted:
            assert step in left
        elif step in left:
            assert best and lowest
    if best and known:
        assert any(losses[step] == min(losses[k] for k in known) for step in left & set(known))


def test_what_a_dead_run_left_is_cleaned_up_and_what_it_was_replacing_comes_back(tmp_path):
    make(tmp_path, 1)
    for name in (".step_00000002.partial", ".step_00000003.old", ".step_00000004.deleted", ".step_00000001.old", ".mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    directory.tidy(tmp_path)
    assert names(tmp_path) == [".mine", "step_00000001", "step_00000003"]
    assert (checkpoint_at(tmp_path, 1) / "file").read_text() == "1"
    assert (checkpoint_at(tmp_path, 3) / "file").read_text() == ".step_00000003.old"


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_replacing_a_folder_never_loses_both(renames, tmp_path, monkeypatch):
    final = tmp_path / "step_00000001"
    make(tmp_path, 1)
    (folders.start_partial(final) / "file").write_text("new")
    rename, done = type(final).rename, []

    def dying(path, target):
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(path)
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(type(final), "rename", dying)
        if renames < 2:
            with pytest.raises(KeyboardInterrupt):
                folders.finish_partial(final)
        else:
            folders.finish_partial(final)
    folders.remove_leftovers(final)
    assert names(tmp_path) == ["step_00000001"]
    assert (final / "file").read_text() == ("new" if renames == 2 else "1")


def test_a_damaged_checkpoint_is_kept_with_the_reason_under_a_name_of_its_own(tmp_path):
    for number, name in enumerate(["damaged_step_00000007", "damaged_step_00000007_2"]):
        make(tmp_path, 7)
        place = directory.set_aside(checkpoint_at(tmp_path, 7), f"reason {number}")
        assert place == tmp_path / name and not checkpoint_at(tmp_path, 7).exists()
        assert (place / "file").read_text() == "7" and (place / "damaged.txt").read_text() == f"reason {number}\n"
    assert directory.steps_in(tmp_path) == {}
