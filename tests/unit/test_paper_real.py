"""The paper's claims on a real model, at their tiniest: equal starts and rows, turns, calls that go on."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from anchor_context.demo import standard_library_texts, tiny_llama, train_tokenizer

SOME_VARIANTS = [("full", "bf16"), ("anchor", "bf16"), ("anchor", "bf16, rotated in float32")]
BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


@pytest.fixture(scope="module")
def real():
    sys.path.insert(0, BENCHMARKS)
    try:
        import paper  # noqa: F401  (for `call`)
        import paper_real
    finally:
        sys.path.remove(BENCHMARKS)
    return paper_real


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """model/ of random weights, and texts.jsonl."""
    folder = tmp_path_factory.mktemp("real")
    texts = standard_library_texts(at_most_characters=200_000)
    with (folder / "texts.jsonl").open("w") as stream:
        stream.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    tokenizer = train_tokenizer(texts, vocab_size=512)
    tokenizer.save_pretrained(folder / "model")
    tiny_llama(tokenizer, hidden=32, layers=2).save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def size(real):
    data = replace(
        real.SIZES["cpu"].data,
        short=128,
        long=256,
        lengths=(256,),
        depths=(0.0, 100.0),
        trials=1,
        long_documents=3,
        short_documents=2,
        short_tokens=128,
    )
    marks = {"step_marks": (1, 3), "second_marks": (2.0,), "turn_seconds": 2.0}
    return replace(real.SIZES["cpu"], data=data, rows_per_step=2, **marks)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the material is kept."""
    return tmp_path_factory.mktemp("material")


@pytest.fixture(scope="module")
def material(real, size, given, folder):
    return size.material(size.data, folder, model=given / "model", texts=given / "texts.jsonl")


@pytest.fixture
def call(real, size, given, monkeypatch, capsys):
    """call(out, turns=…) -> what `paper.py --size real` printed, in so many turns of steps of a second."""
    import paper
    import paper_train

    monkeypatch.setitem(real.SIZES, "cpu", size)
    monkeypatch.setattr(real, "VARIANTS", SOME_VARIANTS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def one_second(work, device) -> float:
        work()
        return 1.0

    monkeypatch.setattr(paper_train, "seconds", one_second)

    def call(out: Path, *flags: str, turns: float = math.inf) -> str:
        class Clock:
            left = turns

            def __init__(self, minutes: float):
                assert minutes == 3.0

            def has(self, seconds: float) -> bool:
                Clock.left -= 1
                return Clock.left >= 0

        monkeypatch.setattr(real, "Clock", Clock)
        given_flags = ["--model", given / "model", "--texts", given / "texts.jsonl", "--out", out]
        command = ["paper.py", "--size", "real", "--minutes", "3", *map(str, given_flags), *flags]
        monkeypatch.setattr(sys, "argv", command)
        paper.main()
        return capsys.readouterr().out

    return call


def contestants(real, size, material, folder: Path) -> list:
    return [
        real.Contestant(
            pattern,
            precision,
            material,
            size,
            torch.device("cpu"),
            seed=0,
            path=folder / f"{pattern}-{precision}.pt",
        )
        for pattern, precision in real.VARIANTS
    ]


def test_all_start_from_the_same_weights_with_the_raised_base_and_read_the_same_rows(
    real, size, material, tmp_path
):
    everyone = contestants(real, size, material, tmp_path)
    assert len(everyone) == 6
    start = material.weights()
    for contestant in everyone:
        model, masters = contestant.variant.model, contestant.variant.masters
        for (name, weight), master in zip(model.named_parameters(), masters, strict=True):
            assert torch.equal(master, start[name]) and master.dtype == torch.float32
            assert torch.equal(weight, start[name].bfloat16())
        assert model.config.rope_parameters["rope_theta"] == size.theta
        assert model.config.max_position_embeddings >= size.data.long
        assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    own = real.model_of(material, torch.device("cpu"), theta=None, long=size.data.long)
    assert own.config.rope_parameters["rope_theta"] == 500_000.0 != size.theta
    read = [[next(contestant.batches)["input_ids"] for _ in range(4)] for contestant in everyone]
    for tokens in read[1:]:
        assert all(torch.equal(a, b) for a, b in zip(tokens, read[0], strict=True))


def test_the_rotation_in_float32_is_the_only_difference_of_its_variants(
    real, size, material, tmp_path
):
    logits = {}
    for contestant in contestants(real, size, material, tmp_path):
        with contestant.variant.evaluated() as model, torch.no_grad():
            logits[contestant.name] = model(material.long_documents[0][None]).logits
    for pattern in ("full", "anchor"):
        bf16, rotated = logits[pattern, real.BF16], logits[pattern, real.ROTATED]
        assert not torch.equal(bf16, rotated)
        torch.testing.assert_close(bf16, rotated, atol=0.1, rtol=0)
    assert torch.equal(logits["full", real.BF16], logits["intra_doc", real.BF16])


def test_no_held_out_document_is_trained_on(material, size, given, folder):
    held_out = [*material.long_documents, *material.short_documents]
    assert [len(d) for d in held_out] == [size.data.long] * 3 + [size.data.short_tokens] * 2
    texts, trained = (
        [json.loads(line)["text"] for line in path.read_text().splitlines()]
        for path in (given / "texts.jsonl", folder / "documents.jsonl")
    )
    assert len(trained) == len(texts) - 5
    beginnings = [material.tokenizer.decode(document[1:100]) for document in held_out]
    assert len(set(beginnings)) == 5, "one is held out twice"
    assert not [b for b in beginnings for text in trained if text.startswith(b)]
    assert all(any(text.startswith(b) for text in texts) for b in beginnings)


def test_a_gradient_in_micro_batches_is_that_of_both_rows_at_once(real, size, material, tmp_path):
    (contestant, *_) = contestants(real, size, material, tmp_path)
    variant = contestant.variant
    inputs = [
        real.inputs_of(next(contestant.batches), "full", torch.device("cpu")) for _ in range(2)
    ]
    together = variant.gradients(inputs)
    both = [master.grad.clone() for master in variant.masters]
    parts, targets = [torch.zeros_like(g) for g in both], [(i["labels"] >= 0).sum() for i in inputs]
    mean = 0.0
    for given, own in zip(inputs, targets, strict=True):
        variant.optimizer.zero_grad(set_to_none=True)
        mean += variant.gradients([given]) * own / sum(targets)
        for part, master in zip(parts, variant.masters, strict=True):
            part += master.grad * own / sum(targets)
    torch.testing.assert_close(together, mean, rtol=1e-3, atol=0)
    for part, whole in zip(parts, both, strict=True):
        torch.testing.assert_close(part, whole, rtol=0.05, atol=2e-4)


def measured(out: Path) -> dict[tuple, dict]:
    """{(pattern, precision, mark): the result}, without what names the call."""
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    found = {(r["pattern"], r["precision"], r["mark"]): r for r in lines}
    assert len(found) == len(lines), "something was measured twice"
    for result in lines:
        assert result["versions"]["torch"] and result["benchmark"] == "paper_real"
    return found


def test_calls_that_are_cut_short_add_up_to_one_that_is_not(real, call, tmp_path, monkeypatch):
    said = call(tmp_path / "one")
    assert "not all is measured" not in said
    one = measured(tmp_path / "one")
    marks = ("1 steps", "3 steps", "2 seconds")
    assert set(one) == {
        ("start", real.BF16, "before"),
        ("raised", real.BF16, "before"),
        *((*name, mark) for name in SOME_VARIANTS for mark in marks),
    }
    for (_, _, mark), result in one.items():
        if mark != "before":
            number, unit = mark.split()
            assert result[unit] == int(number), "a step takes a second here"
            assert result["tokens"] == result["steps"] * 2 * 256
        assert {(c["task"], c["length"], c["depth"]) for c in result["retrieval"]} == {
            (task, 256, depth) for task in ("needle", "passkey") for depth in (0.0, 100.0)
        }
    line = json.loads(said.splitlines()[-1])
    assert len(line["results"]) == len(one) and len(line["claims"]) == 2 * (2 + 3)
    for name in ("paper_real.png", "paper_real_retrieval.png"):
        assert (tmp_path / "one" / name).read_bytes().startswith(b"\x89PNG")

    for name in ("picture", "retrieval_picture"):  # which take the longest
        monkeypatch.setattr(real, name, lambda *given, **more: Figure())
    # Before anybody trained; before an evaluation; between turns.
    for turns in (0, 3, 8):
        assert "the same command goes on" in call(tmp_path / "cut", turns=turns)
    results = tmp_path / "cut" / "results.jsonl"
    before = measured(tmp_path / "cut")
    assert 2 < len(before) < len(one)
    with results.open("a") as stream:
        stream.write('{"pattern": "full", "preci')  # what a killed call leaves
    assert "not all is measured" not in call(tmp_path / "cut")
    cut = measured(tmp_path / "cut")
    for key in ("steps", "seconds", "loss", "positions", "short", "retrieval"):
        assert {name: r[key] for name, r in cut.items()} == {
            name: r[key] for name, r in one.items()
        }

    with pytest.raises(ValueError, match="holds measurements with another --texts; give another"):
        call(tmp_path / "cut", "--texts", "other.jsonl")


def result(pattern: str, losses: list[float], short: list[float], mark: str = "4 steps") -> dict:
    """Of documents with one loss up to token 127, which is 1, and another beyond."""
    positions = [(1, 63, [1.0] * len(losses)), (64, 127, [1.0] * len(losses))]
    positions += [(128, 191, losses), (192, 255, losses)]
    return {
        "pattern": pattern,
        "precision": "bf16",
        "mark": mark,
        "positions": [{"first": f, "last": n, "losses": x} for f, n, x in positions],
        "short": short,
    }


def test_claims_are_paired_differences_and_say_when_the_paper_s_ordering_does_not_show(real):
    results = [
        result("start", [9.0] * 3, [2.0, 3.0, 4.0], mark="before"),
        result("full", [2.0, 4.0, 6.0], [2.1, 3.2, 4.3]),
        result("intra_doc", [2.1, 3.9, 6.1], [2.0, 3.0, 4.0]),
        result("anchor", [1.9, 3.8, 5.9], [1.9, 3.1, 3.9]),
    ]
    claims = {
        (c["one"][0], c["other"][0]): c for c in real.compare(results, short=128) if c["two_errors"]
    }
    anchor = claims["anchor", "full"]
    assert anchor["difference"] == pytest.approx(-0.4 / 3)
    assert anchor["two_errors"] == pytest.approx(2 * math.sqrt(0.01 / 3) / math.sqrt(3))
    assert (anchor["verdict"], anchor["holds"]) == ("lower", True)
    assert "anchor, bf16 against full, bf16, loss beyond 128 tokens: -0.1333 ± " in anchor["said"]
    unclear = claims["intra_doc", "full"]
    assert (unclear["verdict"], unclear["holds"]) == ("no difference shows", False)
    forgotten = claims["full", "start"]
    assert forgotten["quantity"] == "loss on short documents"
    assert (forgotten["verdict"], forgotten["holds"]) == ("higher", False)
    assert claims["anchor", "start"]["holds"], "no difference: nothing is forgotten"


def test_losses_within_and_beyond_are_weighted_by_their_tokens(real):
    from paper_real_report import mean_and_error, of_documents

    documents = {
        "positions": [
            {"first": 1, "last": 63, "losses": [1.0, 2.0]},
            {"first": 64, "last": 127, "losses": [3.0, 4.0]},
            {"first": 128, "last": 255, "losses": [5.0, 7.0]},
        ]
    }
    within = of_documents(documents, first=1, last=127)
    assert within == pytest.approx([(63 * 1 + 64 * 3) / 127, (63 * 2 + 64 * 4) / 127])
    assert of_documents(documents, first=128) == [5.0, 7.0]
    assert mean_and_error([5.0, 7.0]) == (6.0, pytest.approx(1.0))


def test_too_little_text_is_told(real, size, given, tmp_path):
    (tmp_path / "few.jsonl").write_text('{"text": "a few words"}\n')
    with pytest.raises(ValueError, match="--texts has 0 documents of 256 tokens to hold out and 0"):
        size.material(size.data, tmp_path, model=given / "model", texts=tmp_path / "few.jsonl")


def test_of_copies_one_is_held_out_or_trained_on(real, size, given, tmp_path):
    lines = (given / "texts.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "twice.jsonl").write_text("".join(line for line in lines for _ in range(2)))
    texts = tmp_path / "twice.jsonl"
    material = size.material(size.data, tmp_path, model=given / "model", texts=texts)
    trained = (tmp_path / "documents.jsonl").read_text().splitlines()
    assert len(trained) == len(set(trained)) == len(lines) - 5
    assert len({tuple(document.tolist()) for document in material.long_documents}) == 3


def test_on_a_gpu_the_model_is_smollm2_and_the_texts_are_the_machine_s(
    real, size, given, tmp_path, monkeypatch
):
    import paper_real_data

    (tmp_path / "smollm2").symlink_to(given / "model")
    asked = []

    def collect(folder: Path, *, characters_per_tree: int) -> None:
        asked.append(folder)
        folder.mkdir()
        texts = (given / "texts.jsonl").read_text().splitlines(keepends=True)
        (folder / "train.jsonl").write_text("".join(texts[2:]))
        (folder / "held_out.jsonl").write_text("".join(texts[:2]))

    monkeypatch.setattr(paper_real_data, "collect_texts", collect)
    for _ in range(2):
        found = real.SIZES["cuda"].material(size.data, tmp_path, model=None, texts=None)
        assert found.model == tmp_path / "smollm2" and len(found.long_documents) == 3
    assert asked == [tmp_path / "texts"], "collected once"
