"""What the end-to-end tests share: a tiny model, real text, and a way to launch `train.py`. Functions are
in `runs.py`: a module named conftest is not one name (tests/gpu has another) to import from."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import ROOT, Tiny, free_port

from anchor_context.demo import standard_library_texts, tiny_llama, train_tokenizer


@pytest.fixture(scope="session", autouse=True)
def closed_terminals_are_noticed() -> Iterator[None]:
    """Runs inherit that SIGHUP is ignored where the tests themselves are started by nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Tiny:
    folder = tmp_path_factory.mktemp("tiny")
    texts = standard_library_texts(at_most_characters=400_000)
    documents = folder / "documents.jsonl"
    with documents.open("w") as stream:
        for text in texts:
            # Pieces of uneven length: documents shorter than a row, and longer than several.
            for start, end in ((0, 300), (300, 420), (420, 4000), (4000, 9000)):
                if piece := text[start:end]:
                    stream.write(json.dumps({"text": piece}) + "\n")
    tokenizer = train_tokenizer(texts, vocab_size=512)
    tokenizer.save_pretrained(folder / "model")
    tiny_llama(tokenizer, hidden=32, layers=2).save_pretrained(folder / "model")
    return Tiny(model=folder / "model", documents=documents)


@pytest.fixture(scope="session")
def row_cache(tmp_path_factory) -> Path:
    """Prepared rows, shared by the runs of a session."""
    return tmp_path_factory.mktemp("rows")


@pytest.fixture(scope="session")
def launch(tiny, row_cache):
    """launch(processes, output, *flags, **environment) -> the finished process, its output as text.

    Flags behind the defaults win; `expect` is the exit code (None: any), `launcher` more of the
    launcher's flags.
    """

    def run(
        processes: int,
        output: Path,
        *flags: str,
        expect: int | None = 0,
        launcher: tuple[str, ...] = (),
        **environment: str,
    ):
        command = [
            *(sys.executable, "-m", "accelerate.commands.launch"),
            *("--config_file", "accelerate_configs/cpu.yaml"),
            *("--num_processes", str(processes), "--main_process_port", str(free_port())),
            *launcher,
            "train.py",
            *("--model_name_or_path", str(tiny.model), "--dataset", str(tiny.documents)),
            *("--seq-length", "256", "--learning-rate", "1e-3", "--mixed_precision", "no"),
            *("--output-dir", str(output), "--cache_dir", str(row_cache), *flags),
        ]
        finished = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )
        if expect is not None:
            assert finished.returncode == expect, finished.stdout[-6000:]
        return finished

    return run
