"""The Hugging Face Trainer and TRL's SFTTrainer with AnchorAttention, against train.py."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from itertools import chain, islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from anchor_context import AnchorDataCollator, patch_model
from anchor_context.data.loader import make_loader
from anchor_context.data.options import DataOptions
from anchor_context.data.prepare import prepare_rows

ROOT = Path(__file__).parents[2]
ROW = 64
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
# Lengths with BOS and EOS; best-fit packing makes eight full rows of them.
LENGTHS = [44, 20, 40, 24, 32, 32, 64, 50, 14, 60, 4, 54, 10, 30, 34, 36, 28]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """A tiny LLaMA and a tokenizer of 60 words, BOS in front of every text."""
    folder = tmp_path_factory.mktemp("model")
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i + 3 for i in range(60)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(["<s>", "</s>"])
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)
    set_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def texts() -> list[str]:
    random = np.random.default_rng(0)  # six words: soon learnt how often each comes
    return [" ".join(f"w{i}" for i in random.integers(0, 6, n - 2)) for n in LENGTHS]


class Losses(TrainerCallback):
    """The loss that the trainer logs at every step."""

    def __init__(self):
        self.values: list[float] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.values.append(logs["loss"])


SETTINGS = {
    "max_steps": 3,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "adam_beta2": 0.95,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "logging_steps": 1,
    "train_sampling_strategy": "sequential",
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "dataloader_drop_last": False,
}


def train_py(
    model_folder: Path, folder: Path, rows: list[list[str]], *, engine: str
) -> list[float]:
    """train.py on the documents in the order of the rows; the losses of its steps."""
    lines = (json.dumps({"text": text}) for row in rows for text in row)
    (folder / "texts.jsonl").write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", "accelerate_configs/cpu.yaml", "--num_processes", "1"]
    command += ["--main_process_port", "0", "train.py"]
    command += ["--model_name_or_path", model_folder, "--dataset", folder / "texts.jsonl"]
    command += ["--cache_dir", folder / "cache", "--output-dir", folder / "run"]
    command += ["--seq-length", ROW, "--mixed_precision", "no", "--attn_engine", engine]
    command += ["--batch-size", 1, "--gradient-accumulate-every", 2]
    command += ["--max-train-steps", SETTINGS["max_steps"], "--learning-rate", 1e-2, "--seed", 7]
    result = subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def batches_of_train_py(folder: Path, tokenizer, *, placement: str) -> list[dict]:
    """What train.py trained on, from its cache: a batch for each micro-batch."""
    prepared = prepare_rows(
        str(folder / "texts.jsonl"),
        DataOptions(seq_length=ROW),
        tokenizer=tokenizer,
        vocab_size=64,
        anchor_placement=placement,
        cache_dir=folder / "cache",
    )
    loader = make_loader(
        prepared,
        pattern="anchor",
        seed=7,
        batch_size=1,
        accumulation=2,
        data_rank=0,
        data_degree=1,
    )
    return list(islice(loader, 2 * SETTINGS["max_steps"]))


def patched(model_folder: Path, *, engine: str = "flash"):
    return patch_model(AutoModelForCausalLM.from_pretrained(model_folder), engine=engine)


def train_trainer(
    model, rows: Dataset, collator: AnchorDataCollator, folder: Path, **more
) -> list[float]:
    """The Hugging Face Trainer on the rows in this order; the losses of its steps."""
    losses = Losses()
    # Without `remove_unused_columns=False` it would drop `seq_lengths`.
    settings = {"output_dir": folder, "remove_unused_columns": False} | SETTINGS | more
    arguments = TrainingArguments(**settings)
    Trainer(
        model, arguments, data_collator=collator, train_dataset=rows, callbacks=[losses]
    ).train()
    return losses.values


def test_both_trainers_and_train_py_agree_at_every_step(model_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    collator = AnchorDataCollator(tokenizer, engine="flash")
    sft_losses = Losses()

    # TRL packs the texts into rows.
    sft = SFTTrainer(
        patched(model_folder),
        SFTConfig(output_dir=tmp_path / "sft", packing=True, max_length=ROW, **SETTINGS),
        train_dataset=Dataset.from_dict({"text": texts()}),
        processing_class=tokenizer,
        callbacks=[sft_losses],
    )
    sft.data_collator = collator
    packed = sft.train_dataset.with_format(None)
    assert all(len(row["input_ids"]) == ROW for row in packed)
    assert max(len(row["seq_lengths"]) for row in packed) >= 2

    # train.py gets the same rows: the documents one after the other fill them exactly.
    rows = []
    for row in packed:
        documents = np.split(row["input_ids"], np.cumsum(row["seq_lengths"])[:-1])
        rows.append([tokenizer.decode(ids, skip_special_tokens=True) for ids in documents])
    expected = train_py(model_folder, tmp_path, rows, engine="flash")
    order = []
    for batch in batches_of_train_py(tmp_path, tokenizer, placement="per_document"):
        order += batch["row_ids"]
        assert_same_batch(collator([packed[order[-1]]]), batch)

    sft.train_dataset = sft.train_dataset.select(order)
    sft.train()
    trainer_losses = train_trainer(
        patched(model_folder), packed.select(order), collator, tmp_path / "trainer"
    )
    assert len(set(expected)) == len(expected) == SETTINGS["max_steps"]
    np.testing.assert_allclose(trainer_losses, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(sft_losses.values, expected, rtol=0, atol=1e-5)


def assert_same_batch(ours: dict, batch: dict) -> None:
    assert torch.equal(ours["input_ids"], batch["input_ids"])
    assert torch.equal(ours["shift_labels"], batch["labels"])
    assert torch.equal(ours["position_ids"], batch["position_ids"])


def test_a_trainer_with_one_anchor_per_row_and_train_py_agree_at_every_step(model_folder, tmp_path):
    """The flex engine. Documents fill the rows exactly, one anchor standing for all their BOS."""
    lengths = [[44, 21], [30, 35], [64], [25, 20, 21], [10, 55], [40, 25], [33, 32], [17, 18, 31]]
    assert all(1 + sum(n - 1 for n in row) == ROW for row in lengths)
    random = np.random.default_rng(0)
    rows = [
        [" ".join(f"w{i}" for i in random.integers(0, 6, n - 2)) for n in row] for row in lengths
    ]
    expected = train_py(model_folder, tmp_path, rows, engine="flex")

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    collator = AnchorDataCollator(tokenizer, engine="flex")
    features = []
    for batch in batches_of_train_py(tmp_path, tokenizer, placement="shared"):
        (number,) = batch["row_ids"]
        documents = [[*tokenizer(text)["input_ids"], 1] for text in rows[number]]
        features.append(
            {"input_ids": [*chain(*documents)], "seq_lengths": [len(ids) for ids in documents]}
        )
        assert_same_batch(collator([features[-1]]), batch)
    model = patched(model_folder, engine="flex")
    losses = train_trainer(model, Dataset.from_list(features), collator, tmp_path / "trainer")
    assert len(set(expected)) == SETTINGS["max_steps"]
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("engine", ["flash", "flex", "reference"])
def test_a_trainer_that_compiles_trains_the_same(model_folder, tmp_path, engine):
    """aot_eager traces forward and backward as inductor does, and leaves out the C++."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    collator = AnchorDataCollator(tokenizer, engine=engine)
    rows = Dataset.from_list([{"input_ids": tokenizer(text)["input_ids"]} for text in texts()])
    settings = {"per_device_train_batch_size": 2}
    runs = [
        train_trainer(
            patched(model_folder, engine=engine), rows, collator, tmp_path, **settings, **compiled
        )
        for compiled in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"})
    ]
    assert len(set(runs[0])) == SETTINGS["max_steps"]
    np.testing.assert_allclose(runs[1], runs[0], rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("example", ["trainer.py", "sft_trainer.py"])
def test_an_example_trains_and_leaves_a_plain_model(model_folder, tmp_path, example):
    lines = (json.dumps({"text": text}) for text in texts())
    (tmp_path / "texts.jsonl").write_text("\n".join(lines) + "\n")
    command = [sys.executable, f"examples/{example}", model_folder, tmp_path / "texts.jsonl"]
    command += [
        tmp_path / "out",
        "--max_steps",
        "3",
        "--learning_rate",
        "1e-2",
        "--use_cpu",
        "true",
    ]
    command += ["--logging_steps", "1", "--report_to", "none", "--per_device_train_batch_size", "4"]
    command += ["--save_strategy", "steps", "--save_steps", "3"]
    command += ["--bf16", "false"] + ["--max_length", str(ROW)] * (example == "sft_trainer.py")
    result = subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    state = json.loads((tmp_path / "out/checkpoint-3/trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert len(losses) == 3 and losses[-1] < losses[0]

    program = "import sys, torch; from transformers import AutoModelForCausalLM as M\n"
    program += "model = M.from_pretrained(sys.argv[1]); assert 'anchor' not in str(model.config)\n"
    program += "model.generate(torch.tensor([[0, 5, 6]]), max_new_tokens=3)\n"
    subprocess.run([sys.executable, "-c", program, tmp_path / "out"], check=True, cwd=tmp_path)


def test_the_trainer_example_takes_text_for_text(model_folder, tmp_path, monkeypatch):
    record = {"text": "w1 w</s>2", "labels": "a column of the data"}
    (tmp_path / "texts.jsonl").write_text(json.dumps(record) + "\n")
    monkeypatch.setattr(Trainer, "train", lambda self: None)
    arguments = ["trainer.py", model_folder, tmp_path / "texts.jsonl", tmp_path / "out"]
    arguments += ["--use_cpu", "true", "--bf16", "false", "--report_to", "none"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in arguments])
    trainer = runpy.run_path(str(ROOT / "examples/trainer.py"))["trainer"]
    (batch,) = trainer.get_train_dataloader()
    assert batch["input_ids"].tolist() == [
        [0, 4, 2, 1]
    ]  # an unknown word, and no end of a document
    assert batch["shift_labels"].tolist() == [[4, 2, 1, -100]]


def test_the_sft_example_keeps_every_token_of_a_long_document(model_folder, tmp_path, monkeypatch):
    """TRL's own default would cut it at max_length; its pieces are documents with anchors."""
    lengths = [2 * ROW + 22, 20, 9]  # with BOS and EOS
    words = iter(range(10**6))
    documents = [" ".join(f"w{next(words) % 60}" for _ in range(n - 2)) for n in lengths]
    lines = (json.dumps({"text": text}) for text in documents)
    (tmp_path / "texts.jsonl").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(SFTTrainer, "train", lambda self: None)
    arguments = ["sft_trainer.py", model_folder, tmp_path / "texts.jsonl", tmp_path / "out"]
    arguments += ["--max_length", ROW, "--per_device_train_batch_size", 8, "--use_cpu", "true"]
    arguments += ["--bf16", "false", "--report_to", "none"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in arguments])
    trainer = runpy.run_path(str(ROOT / "examples/sft_trainer.py"))["trainer"]

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    expected = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in documents]
    assert [len(ids) for ids in expected] == lengths
    pieces = [ids[at : at + ROW] for ids in expected for at in range(0, len(ids), ROW)]

    (batch,) = trainer.get_train_dataloader()
    tokens, targets = batch["input_ids"].flatten(), batch["shift_labels"].flatten()
    edges = batch["layout"].cu_seqlens.tolist()
    found = []
    for start, end in pairwise(edges):
        ids = tokens[start:end].tolist()
        if (targets[start:end] == -100).all():  # padding at a row's end
            continue
        assert ids[0] == tokenizer.bos_token_id and batch["position_ids"].flatten()[start] == 0
        found.append(ids if ids in pieces else ids[1:])  # the first piece begins with BOS itself
        # Nothing is asked across the anchor or the end of a piece.
        assert targets[end - 1] == -100
        assert targets[start + 1 : end - 1].tolist() == ids[2:]
    assert sorted(found) == sorted(pieces)

    # A token of one piece changes nothing in another.
    model = trainer.model.eval()
    inputs = {"layout": batch["layout"], "position_ids": batch["position_ids"]}
    before = model(batch["input_ids"], **inputs).logits.flatten(0, 1)
    changed = batch["input_ids"].clone()
    changed[0, edges[1] - 1] = 5 + (changed[0, edges[1] - 1] == 5)
    difference = (model(changed, **inputs).logits.flatten(0, 1) - before).abs().amax(-1)
    assert difference[edges[1] - 1] > 1e-3
    difference[edges[1] - 1] = 0
    assert difference.max() < 1e-6


def test_trl_alone_with_a_patched_model_states_boundaries_enough(model_folder, tmp_path):
    """No collator of ours: TRL's own passes cu_seq_lens_q, and every text begins with BOS."""
    losses = Losses()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    trainer = SFTTrainer(
        patched(model_folder),
        SFTConfig(output_dir=tmp_path / "sft", packing=True, max_length=ROW, **SETTINGS),
        train_dataset=Dataset.from_dict({"text": texts()}),
        processing_class=tokenizer,
        callbacks=[losses],
    )
    own = AnchorDataCollator(tokenizer)
    batch = [trainer.train_dataset[0]]
    own_loss = trainer.model(**own(batch)).loss.item()
    theirs = trainer.data_collator(batch)
    assert "cu_seq_lens_q" in theirs and "layout" not in theirs
    assert trainer.model(**theirs).loss.item() == pytest.approx(own_loss, abs=1e-6)
    trainer.train()
    assert losses.values[-1] < losses.values[0]


STREAMED = """\
import json, sys
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from anchor_context import AnchorDataCollator, patch_model

folder, rows, settings, out = sys.argv[1:]
trainer = Trainer(
    patch_model(AutoModelForCausalLM.from_pretrained(folder)),
    TrainingArguments(output_dir=out, remove_unused_columns=False, **json.loads(settings)),
    data_collator=AnchorDataCollator(AutoTokenizer.from_pretrained(folder)),
    train_dataset=Dataset.from_list(json.loads(rows)).to_iterable_dataset(),
)
trainer.train()
if trainer.is_world_process_zero():
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    open(f"{out}/losses", "w").write(json.dumps(losses))
"""


@pytest.mark.slow  # two processes
def test_streamed_documents_train_on_several_processes_where_each_fetches_its_own(
    model_folder, tmp_path
):
    """Accelerate would have the first process make all batches, which a layout does not go through."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    rows = [{"input_ids": tokenizer(text)["input_ids"]} for text in texts()[:6]]
    whole = train_trainer(
        patched(model_folder),
        Dataset.from_list(rows),
        AnchorDataCollator(tokenizer),
        tmp_path / "whole",
    )
    (tmp_path / "program.py").write_text(STREAMED)
    settings = SETTINGS | {"gradient_accumulation_steps": 1}
    settings |= {"accelerator_config": {"dispatch_batches": False}}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--standalone",
    ]
    command += [tmp_path / "program.py", model_folder, json.dumps(rows), json.dumps(settings)]
    result = subprocess.run(
        [str(word) for word in [*command, tmp_path / "out"]],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    np.testing.assert_allclose(
        json.loads((tmp_path / "out/losses").read_text()), whole, rtol=0, atol=1e-5
    )
