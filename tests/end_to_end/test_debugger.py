"""What the README promises: attach an editor to one rank of a run, stop in train.py, look, go on."""

from __future__ import annotations

from runs import ROOT, free_port, metrics, started

from tests.debug_client import DebugClient

TRAIN = ROOT / "train.py"
LINE = "            learning_rate = scheduler.get_last_lr()[0]"


def test_a_debugger_attaches_to_rank_1_and_the_run_finishes(tiny, row_cache, tmp_path):
    port, output = free_port(), tmp_path / "run"
    settings = {"DEBUGPY": "1", "DEBUGPY_RANK": "1", "DEBUGPY_PORT": str(port)}
    flags = ("--max-train-steps", "2", "--cache_dir", str(row_cache))
    with started(tiny, 2, output, *flags, **settings) as run:
        run.until(lambda: f"rank 1 waits for a debugger on localhost:{port}" in run.printed())
        client = DebugClient(port)
        thread = client.run_to(TRAIN, TRAIN.read_text().splitlines().index(LINE) + 1)
        assert client.evaluate("(rank, world_size, progress.step)", thread) == "(1, 2, 0)"
        assert client.evaluate("step_loss.item() > 0", thread) == "True"
        assert run.steps() == 0
        client.go_on_and_leave(TRAIN, thread)
        run.finish(0)
    assert [record["step"] for record in metrics(output)] == [1, 2]
