"""What an iteration has done is read back whatever the kill left of it."""

import json

from step_megatron.rl.journal import Journal


def test_what_was_written_is_known_and_a_torn_line_is_not(runtime, tmp_path):
    import torch.distributed as dist

    folder = tmp_path / "iterations" / "000001"
    with Journal(folder, "rollouts", dist.group.WORLD, True) as journal:
        assert journal.known == {}
        journal.write("0-0", {"tokens": [1, 2], "logprobs": [-0.1, -1.0 / 3]})
    path = folder / "rollouts-0.jsonl"
    path.write_bytes(path.read_bytes() + b'{"key": "0-1", "value": {"tok')
    with Journal(folder, "rollouts", dist.group.WORLD, True) as journal:
        assert journal.known == {"0-0": {"tokens": [1, 2], "logprobs": [-0.1, -1.0 / 3]}}, "floats keep their bits"
        journal.write("0-1", 5)
        journal.write("0-2", 6)
    (folder / "rollouts-7.jsonl").write_text(json.dumps({"key": "0-0", "value": "other"}) + "\n" + '{"key": "1-0", "value": 7}\n')
    assert Journal(folder, "rollouts", dist.group.WORLD, True).known.keys() == {"0-0", "0-1", "0-2", "1-0"}
    assert Journal(folder, "rollouts", dist.group.WORLD, True).known["0-1"] == 5


def test_a_rank_that_does_not_write_knows_the_same(runtime, tmp_path):
    import torch.distributed as dist

    with Journal(tmp_path, "judgments", dist.group.WORLD, True) as journal:
        journal.write("a", 1)
    with Journal(tmp_path, "judgments", dist.group.WORLD, False) as journal:
        journal.write("b", 2)
        assert journal.known == {"a": 1}
    assert Journal(tmp_path, "judgments", dist.group.WORLD, True).known == {"a": 1}
