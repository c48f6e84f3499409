"""examples/stages.sh: what a stage took is kept, over all attempts, and no longer changed once it is done."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def script(run: Path, body: str) -> subprocess.CompletedProcess:
    # Bash's own clock, set by hand: no test waits.
    lines = ["set -euo pipefail", f"run={run}", "source examples/stages.sh", body]
    return subprocess.run(["bash", "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, text=True)


def test_attempts_add_up_and_a_done_stage_costs_nothing_more(tmp_path):
    run = tmp_path / "run"
    failed = script(run, "work() { SECONDS=7; false; }\nstage train work\necho never")
    assert failed.returncode == 1 and "never" not in failed.stdout
    assert (run / "seconds.train").read_text().strip() == "7" and not (run / "done.train").exists()
    assert script(run, "work() { SECONDS=5; }\nstage train work").returncode == 0
    assert (run / "seconds.train").read_text().strip() == "12" and (run / "done.train").exists()
    again = script(run, "work() { SECONDS=100; }\nstage train work\nstage next true")
    assert again.returncode == 0 and "== next (the stages before it: 100 s)" in again.stdout
    assert (run / "seconds.train").read_text().strip() == "12" and (run / "seconds.next").read_text().strip() == "0"
    assert not list(run.glob("*.new"))


def test_what_has_written_its_file_is_not_done_again(tmp_path):
    run, file = tmp_path / "run", tmp_path / "file"
    body = f"unless {file} touch {file}; unless {file} false; echo reached"
    done = script(run, body)
    assert done.returncode == 0 and "reached" in done.stdout and file.exists()
    assert script(run, f"unless {tmp_path / 'other'} false; echo never").returncode == 1
