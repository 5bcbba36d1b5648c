"""Preparation at scale: bounded memory, killed at random moments, one enormous document."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from data_samples import file_bytes
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from anchor_context.data.rows import open_rows

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
WORDS = [f"{i:03d}" * 17 for i in range(1000)]
"""Long words, so that the tokenizer is quick and the test is about everything around it."""


@pytest.fixture
def model(tmp_path) -> Path:
    vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", "?", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="?"
    )
    fast.save_pretrained(tmp_path / "model")
    LlamaConfig(vocab_size=len(vocabulary)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def write_lines(path: Path, *, megabytes: int) -> tuple[int, int]:
    """Synthetic JSON lines; returns how many documents and tokens (with EOS) they are."""
    rng = random.Random(0)
    lengths = [rng.randint(1, 1200) for _ in range(200)]
    texts = [" ".join(rng.choices(WORDS, k=length)) for length in lengths]
    size = documents = tokens = 0
    with path.open("w") as file:
        while size < megabytes << 20:
            which = rng.randrange(200)
            size += file.write('{"text": "' + texts[which] + '"}\n')
            documents += 1
            tokens += lengths[which] + 1
    return documents, tokens


def start(data: Path, model: Path, cache: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "anchor_context.data", "prepare", "--dataset", str(data)]
    command += ["--model_name_or_path", str(model), "--seq_length", "4096"]
    command += ["--cache_dir", str(cache), *more]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen) -> None:
    _, error = process.communicate()
    assert process.returncode == 0, error.decode()


def only_set(cache: Path):
    (directory,) = (path for path in cache.iterdir() if path.is_dir())
    return open_rows(directory)


def resident_bytes(process: psutil.Process) -> int:
    """Of the process and all that it started; what they share counts for each."""
    total = 0
    for member in [process, *process.children(recursive=True)]:
        try:
            total += member.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def peak_bytes(process: subprocess.Popen) -> int:
    watched, peak = psutil.Process(process.pid), 0
    while process.poll() is None:
        try:
            peak = max(peak, resident_bytes(watched))
        except psutil.NoSuchProcess:
            break
        time.sleep(0.1)
    finish(process)
    return peak


@pytest.mark.parametrize("num_proc", [1, 2])
def test_a_gigabyte_is_prepared_in_bounded_memory(tmp_path, model, num_proc):
    """Beyond what the processes take for themselves: with PyTorch for CUDA that is half a gigabyte each."""
    more = ("--num_proc", str(num_proc), "--packing", "best_fit")
    write_lines(tmp_path / "few.jsonl", megabytes=32)
    little = peak_bytes(start(tmp_path / "few.jsonl", model, tmp_path / "few", *more))
    documents, tokens = write_lines(tmp_path / "d.jsonl", megabytes=1024)
    peak = peak_bytes(start(tmp_path / "d.jsonl", model, tmp_path / "c", *more))
    report = only_set(tmp_path / "c").report
    assert (report["documents"], report["document_tokens"]) == (documents, tokens)
    assert little > 100e6 and peak - little < 0.3e9, f"{peak:,} bytes, {little:,} for 32 MB"


def test_killed_at_random_moments_it_gives_the_same_rows(tmp_path, model):
    """Each kill waits until two more units are done, or the rows are being laid, and then a random while."""
    data, cache = tmp_path / "d.jsonl", tmp_path / "killed"
    write_lines(data, megabytes=100)
    finish(start(data, model, tmp_path / "undisturbed"))
    rng = random.Random(time.time_ns())

    def progress() -> tuple[int, bool]:
        return len(list(cache.glob(".rows-*.work/*.npz"))), any(cache.glob(".rows-*.work/rows"))

    kills_at = []
    for attempt in range(5):
        before, _ = progress()
        process = start(data, model, cache, "--num_proc", str(1 + attempt % 2))
        watched = psutil.Process(process.pid)
        while process.poll() is None and progress() < (before + 2, False) and not progress()[1]:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.3))
        workers = watched.children(recursive=True) if watched.is_running() else []
        if process.poll() is None:
            kills_at.append(progress())
        process.kill()
        process.communicate()
        _, alive = psutil.wait_procs(workers, timeout=30)
        assert not alive, "workers outlive their parent"
    finish(start(data, model, cache))
    assert any(units for units, _ in kills_at), "no kill hit the preparation: the case says nothing"
    killed, undisturbed = only_set(cache), only_set(tmp_path / "undisturbed")
    assert file_bytes(killed) == file_bytes(undisturbed)
    assert not list(cache.glob(".*"))


def test_one_document_of_200_megabytes(tmp_path, model):
    count = 200_000_000 // (len(WORDS[0]) + 1)
    with (tmp_path / "d.jsonl").open("w") as file:
        file.write('{"text": "short"}\n{"text": "')
        for _ in range(count // 1000):
            file.write(" ".join(WORDS) + " ")
        file.write('"}\n{"text": "short"}\n')
    finish(start(tmp_path / "d.jsonl", model, tmp_path / "c"))
    prepared = only_set(tmp_path / "c")
    expected = count // 1000 * 1000 + 1 + 2 * 2  # and an EOS each
    assert prepared.report["documents"] == 3
    assert prepared.report["document_tokens"] == expected
    # Every word once per thousand, in order: nothing lost or doubled where windows meet.
    body = [t for i in range(len(prepared)) for t in prepared.row(i).tokens[:-1].tolist() if t > 2]
    assert body == [3 + i % 1000 for i in range(expected - 5)]
