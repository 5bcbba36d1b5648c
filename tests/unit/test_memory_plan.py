"""The plan takes the fastest treatments that fit the bytes, honours flags, and survives a resume."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Glm4Config,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Qwen3Config,
    Qwen3ForCausalLM,
    Starcoder2Config,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from anchor_context.memory import liger as liger_module
from anchor_context.memory import plan as plan_module
from anchor_context.memory.estimate import (
    ModelSizes,
    Peak,
    Setup,
    Sharding,
    bytes_of_states,
    bytes_on_host,
    expected_peak,
)
from anchor_context.memory.plan import (
    GRAIN,
    USABLE,
    MemoryPlan,
    apply_memory_plan,
    choose_memory_plan,
    free_memory,
    keep_recorded,
)
from anchor_context.memory.treatments import Treatment

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GIB = 2**30
ZERO3 = Path(__file__).parents[2] / "accelerate_configs/zero3.json"


def llama(*, layers: int, hidden: int, vocabulary: int, dtype: torch.dtype):
    """On the meta device: sizes without values."""
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256,
        vocab_size=vocabulary,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config).to(dtype)


ONE_BILLION = llama(layers=16, hidden=2048, vocabulary=128_256, dtype=torch.bfloat16)
SMALL = llama(layers=4, hidden=256, vocabulary=1_000, dtype=torch.float32)


@pytest.fixture(autouse=True)
def liger_if_asked_for(monkeypatch):
    """Whether it is installed here must not matter."""
    monkeypatch.setattr(plan_module, "why_no_liger", lambda model, device: None)


def choose(model=ONE_BILLION, device=CUDA, *, gib: float = 79.0, **asked) -> MemoryPlan:
    """By default an H100, and rows of 131,072 tokens whose longest document has 20,000."""
    settings = {"row_tokens": 131_072, "longest_unit": 20_000, "liger": "yes"} | asked
    return choose_memory_plan(model, device=device, free_bytes=int(gib * GIB), **settings)


def treatments_of(plan: MemoryPlan) -> list[Treatment]:
    return [rung.treatment for rung in plan.ladder]


# --- what auto takes ------------------------------------------------------------------------------


def test_short_units_run_with_nothing_recomputed_as_many_as_fit():
    plan = choose()
    assert treatments_of(plan) == [Treatment()]
    assert 32_768 <= plan.micro_batch_tokens == plan.ladder[0].capacity < 131_072
    assert plan.most_tokens == plan.micro_batch_tokens
    assert plan.peak.total == plan.ladder[0].peak.total <= plan.usable_bytes < 79 * GIB
    assert "nothing recomputed" in plan.micro_batch.reason


def test_rows_that_fit_are_one_forward():
    plan = choose(row_tokens=16_384, longest_unit=16_384)
    assert plan.micro_batch_tokens == 16_384 and treatments_of(plan) == [Treatment()]


@pytest.mark.parametrize(
    ("longest", "last"),
    [
        (60_000, Treatment(checkpoint_every=4)),
        (70_000, Treatment(checkpoint_every=2)),
        (131_072, Treatment(checkpoint_every=1)),
        (420_000, Treatment(checkpoint_every=1, offload=True)),
        (900_000, Treatment(checkpoint_every=1, offload=True, tiled_mlp=True)),
    ],
)
def test_a_long_unit_alone_is_treated_as_far_as_it_needs(longest, last):
    plan = choose(row_tokens=1_048_576, longest_unit=longest)
    assert plan.micro_batch_tokens == choose().micro_batch_tokens  # short ones as ever
    assert plan.treatment(longest) == last == plan.ladder[-1].treatment
    assert plan.treatment(plan.micro_batch_tokens) == Treatment()
    assert plan.most_tokens == longest


def test_every_rung_takes_more_tokens_and_as_many_as_fit():
    plan = choose(row_tokens=1_048_576, longest_unit=900_000)
    capacities = [rung.capacity for rung in plan.ladder]
    assert capacities == sorted(set(capacities)) and len(capacities) == 6
    setup = Setup(ModelSizes.of(ONE_BILLION), 2, "cuda", liger=True)
    for rung in plan.ladder:
        most = expected_peak(setup, rung.treatment, rung.capacity).total
        assert most <= plan.usable_bytes
        assert expected_peak(setup, rung.treatment, rung.capacity + GRAIN).total > plan.usable_bytes
        for tokens in (rung.capacity - GRAIN + 1, rung.capacity):
            assert plan.treatment(tokens) == rung.treatment
    assert plan.treatment(capacities[-1] + 1) == plan.ladder[-1].treatment


def test_where_little_fits_layers_are_recomputed_so_that_a_forward_has_work():
    roomy, narrow = choose(gib=30), choose(gib=18)
    assert roomy.treatment(roomy.micro_batch_tokens) == Treatment()
    assert narrow.treatment(8_192) != Treatment()
    assert narrow.micro_batch_tokens >= 8_192
    assert narrow.treatment(narrow.ladder[0].capacity) == Treatment()  # a smaller one needs none


def test_where_the_model_alone_takes_nearly_all_half_of_what_it_leaves_is_filled():
    narrow = choose(gib=15, longest_unit=256)
    assert 15 * GIB * USABLE < narrow.peak.total <= narrow.usable_bytes < 14.6 * GIB
    assert narrow.micro_batch_tokens >= GRAIN


def test_more_memory_never_makes_smaller_micro_batches():
    """From next to nothing on top of the model on."""
    plans = [choose(gib=gib / 8, longest_unit=256) for gib in range(112, 145)]
    micro_batches = [plan.micro_batch_tokens for plan in plans]
    assert micro_batches == sorted(micro_batches) and micro_batches[0] < micro_batches[-1] / 2


def test_where_the_host_has_no_room_mlps_are_tiled_instead():
    """A checkpoint of 500,000 tokens is 1.9 GiB, for which PyTorch pins 2, and there are sixteen."""
    asked = {"row_tokens": 1_048_576, "longest_unit": 500_000}
    assert choose(**asked, host_bytes=36 * GIB).ladder[-1].treatment.offload
    plan = choose(**asked, host_bytes=35 * GIB)
    assert plan.ladder[-1].treatment == Treatment(checkpoint_every=1, tiled_mlp=True)
    with pytest.raises(ValueError, match=r"offload cannot work here: .*32.00 GiB.*35.00 GiB"):
        choose(**asked, host_bytes=35 * GIB, gradient_checkpointing="offload")
    # An offloaded optimiser's 16 bytes per parameter are there as well, 22.3 GiB.
    sharding = Sharding(stage=3, offload_optimizer=True)
    assert not choose(**asked, host_bytes=59 * GIB, sharding=sharding).ladder[-1].treatment.offload
    assert choose(**asked, host_bytes=61 * GIB, sharding=sharding).ladder[-1].treatment.offload


def test_the_cpu_plans_too_but_never_offloads():
    plan = choose(SMALL, CPU, gib=1, liger="no", row_tokens=16_384, longest_unit=4_096)
    assert 4_096 < plan.micro_batch_tokens < 16_384
    tight = choose(SMALL, CPU, gib=0.4, liger="no", row_tokens=16_384, longest_unit=9_000)
    assert len(tight.ladder) > 1 and not any(t.offload for t in treatments_of(tight))


# --- flags ----------------------------------------------------------------------------------------


def test_a_number_of_tokens_and_whole_rows_are_taken_as_asked():
    plan = choose(micro_batch_tokens=1_000)
    assert plan.micro_batch_tokens == 1_000 and plan.most_tokens == 20_000
    assert plan.micro_batch.reason == "--micro_batch_tokens"
    rows = choose(micro_batch_tokens="row")
    assert rows.micro_batch_tokens == rows.most_tokens == 131_072
    assert rows.treatment(131_072) == Treatment(checkpoint_every=1)


@pytest.mark.parametrize("checkpointing", ["none", "full", "offload"])
@pytest.mark.parametrize("tiled", ["auto", "yes", "no"])
def test_what_a_flag_says_is_done(checkpointing, tiled):
    asked = {"gradient_checkpointing": checkpointing, "tiled_mlp": tiled}
    plan = choose(**asked, row_tokens=24_576, longest_unit=24_576)
    for treatment in treatments_of(plan):
        assert treatment.checkpoint_every == (checkpointing != "none")
        assert treatment.offload == (checkpointing == "offload")
        assert treatment.tiled_mlp == (tiled == "yes")  # auto: there is room
    assert plan.gradient_checkpointing.reason == "--gradient_checkpointing"
    assert plan.tiled_mlp.reason == ("where needed" if tiled == "auto" else "--tiled_mlp")
    without = choose(**asked, liger="no", row_tokens=24_576, longest_unit=24_576)
    assert (without.liger.value, without.liger.reason) == (False, "--liger")
    assert without.peak.total > plan.peak.total  # Liger's kernels keep less


def test_tiles_come_with_full_checkpointing_where_it_needs_them():
    plan = choose(gradient_checkpointing="full", longest_unit=420_000)
    assert treatments_of(plan) == [Treatment(1), Treatment(1, tiled_mlp=True)]
    with pytest.raises(ValueError, match="500,000 tokens per rank does not fit.*--tiled_mlp auto"):
        choose(gradient_checkpointing="full", tiled_mlp="no", longest_unit=500_000)


def test_offload_on_the_cpu_is_full_and_says_so():
    plan = choose(SMALL, CPU, gradient_checkpointing="offload", liger="no")
    assert treatments_of(plan) == [Treatment(checkpoint_every=1)]
    assert plan.gradient_checkpointing.value == "full"
    assert "offload asked for" in plan.gradient_checkpointing.reason


def test_a_model_that_transformers_cannot_checkpoint_is_not_checkpointed(monkeypatch):
    monkeypatch.setattr(type(ONE_BILLION), "supports_gradient_checkpointing", False)
    plan = choose(longest_unit=70_000)
    assert treatments_of(plan) == [Treatment(), Treatment(tiled_mlp=True)]
    assert plan.gradient_checkpointing.reason == "transformers cannot checkpoint llama"
    with pytest.raises(ValueError, match="--gradient_checkpointing full cannot work here"):
        choose(gradient_checkpointing="full")


@pytest.mark.parametrize("family", [Phi3Config, Starcoder2Config, Glm4Config])
def test_auto_tiles_no_other_mlps(family):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 40}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    model = AutoModelForCausalLM.from_config(family(**sizes, **heads, pad_token_id=0))
    plan = choose(model, CPU, liger="no")
    assert not any(t.tiled_mlp for t in treatments_of(plan))
    assert f"{family.model_type} has no MLP" in plan.tiled_mlp.reason
    apply_memory_plan(model, plan)(131_072)
    with pytest.raises(ValueError, match=f"--tiled_mlp yes.*{family.model_type}"):
        choose(model, CPU, liger="no", tiled_mlp="yes")


@pytest.fixture
def liger_installed(monkeypatch):
    """Whether Liger is there; call it to say so. Its list of families is LLaMA alone."""
    patches = ModuleType("liger_kernel.transformers.monkey_patch")
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, patches.__name__, patches)
    monkeypatch.setattr(plan_module, "why_no_liger", liger_module.why_no_liger)
    return lambda there: monkeypatch.setattr(liger_module, "liger_available", lambda device: there)


@pytest.mark.parametrize("installed", [False, True])
def test_liger_runs_where_it_can(installed, liger_installed):
    liger_installed(installed)
    on_gpu = choose(liger="auto")
    assert on_gpu.liger.value is installed
    assert ("installed" if installed else "pip install liger-kernel") in on_gpu.liger.reason
    on_cpu = choose(SMALL, CPU, liger="auto")
    assert not on_cpu.liger.value and "cpu" in on_cpu.liger.reason
    with pytest.raises(ValueError, match="--liger yes"):
        choose(SMALL, CPU, liger="yes")


def test_liger_for_a_gpu_elsewhere_is_taken_at_its_word(liger_installed, monkeypatch):
    liger_installed(False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose(liger="yes").liger.value and "elsewhere" in choose(liger="yes").liger.reason
    assert not choose(liger="auto").liger.value
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="--liger yes.*pip install liger-kernel"):
        choose(liger="yes")


def test_liger_without_kernels_for_the_model_is_refused(liger_installed):
    liger_installed(True)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 40}
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=2))
    plan = choose(model, liger="auto")
    assert not plan.liger.value and "no kernels for qwen3" in plan.liger.reason
    with pytest.raises(ValueError, match="--liger yes.*qwen3"):
        choose(model, liger="yes")


# --- what does not fit ----------------------------------------------------------------------------


def test_what_does_not_fit_says_by_how_much_and_what_would():
    with pytest.raises(ValueError) as raised:
        choose(longest_unit=4_194_304)
    message = str(raised.value)
    setup = Setup(ModelSizes.of(ONE_BILLION), 2, "cuda", liger=True)
    leanest = Treatment(checkpoint_every=1, offload=True, tiled_mlp=True)
    excess = expected_peak(setup, leanest, 4_194_304).total / GIB - 79
    assert f"{excess:.2f} GiB more than the 79.00 GiB that are free" in message
    for remedy in ("more ranks on the sequence", "zero3_offload.json", "--memory_gib"):
        assert remedy in message
    assert choose(longest_unit=4_194_304 // 8).ladder  # on eight ranks


def test_weights_that_do_not_fit_are_no_matter_of_tokens():
    with pytest.raises(ValueError) as raised:
        choose(gib=12, sharding=Sharding(stage=1, ranks=8), longest_unit=256)
    assert "ZeRO stage 3 in place of 1" in str(raised.value)
    assert "more ranks on the sequence" not in str(raised.value)
    config = json.loads(ZERO3.read_text())
    assert choose(gib=12, sharding=Sharding.of(config, ranks=8), longest_unit=256).ladder


def test_whole_rows_that_do_not_fit_need_not_be_whole():
    with pytest.raises(ValueError, match="--micro_batch_tokens auto instead of row"):
        choose(gib=40, row_tokens=1_048_576, micro_batch_tokens="row")
    assert choose(gib=40, row_tokens=1_048_576).micro_batch_tokens < 131_072
    with pytest.raises(ValueError, match="--micro_batch_tokens auto instead of 2000000;"):
        choose(row_tokens=4_096, longest_unit=4_096, micro_batch_tokens=2_000_000)


def test_where_no_flag_helps_the_error_offers_none():
    with pytest.raises(ValueError, match=r"What would help: --memory_gib, if .* was found$"):
        choose(SMALL, CPU, gib=0.05, liger="no", row_tokens=512, longest_unit=500)


# --- weights, optimiser, gradients ----------------------------------------------------------------


def states(sharding: Sharding, *, element_bytes: int = 2, device: str = "cuda") -> dict[str, float]:
    """In bytes per parameter, for a model whose head is small."""
    parameters = 10**9
    sizes = ModelSizes(24, 2048, 5632, 16, 8, 128, 1_000, parameters)
    held = bytes_of_states(Setup(sizes, element_bytes, device, sharding=sharding))
    parts = held.always | held.while_computing | held.while_reducing | held.in_update
    return {name: size / parameters for name, size in parts.items()}


def test_zero_shards_what_its_stage_says():
    plain = states(Sharding())
    assert plain["weights"] == 2 and plain["optimiser"] == 4
    one, two, three = (
        states(Sharding(stage=stage, ranks=8, bucket=10**8, most_gathered=10**8))
        for stage in (1, 2, 3)
    )
    for stage in (one, two, three):  # float32 weights and two moments
        assert stage["optimiser"] == pytest.approx(12 / 8)
    assert one["weights"] == two["weights"] == 2 and three["weights"] == 2 / 8
    assert one["gradients"] == pytest.approx(6, rel=0.01)  # all sums, and one backward's own
    assert two["gradients"] == pytest.approx(4 / 8, rel=0.02)
    assert three["gradients"] == pytest.approx(4 / 8, rel=0.02)
    assert three["gathered weights"] == pytest.approx(2 * 0.1, rel=0.03)
    offloaded = states(
        Sharding(
            3, 8, bucket=10**8, most_gathered=10**8, offload_optimizer=True, offload_weights=True
        )
    )
    assert offloaded["optimiser"] == offloaded["weights"] == 0
    assert offloaded["gathered weights"] == three["gathered weights"]


def test_deepspeed_s_configuration_is_read():
    config = json.loads(ZERO3.read_text())
    sharding = Sharding.of(config, ranks=4)
    assert (sharding.stage, sharding.ranks, sharding.bucket) == (3, 4, 100_000_000)
    assert not sharding.offload_optimizer and not sharding.offload_weights
    offloading = json.loads(ZERO3.with_name("zero3_offload.json").read_text())
    assert Sharding.of(offloading, ranks=4) == replace(
        sharding, offload_optimizer=True, offload_weights=True
    )
    config["zero_optimization"] |= {"stage": 2, "reduce_bucket_size": 10**6}
    assert Sharding.of(config, ranks=4).buckets == 2  # overlap_comm
    assert Sharding.of(config, ranks=4).bucket == 10**6


def test_the_free_memory_is_the_rank_s_part_or_what_the_flag_says(monkeypatch):
    assert free_memory(CPU, memory_gib=1.5) == 1.5 * GIB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    whole = free_memory(CPU)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_memory(CPU) == pytest.approx(whole / 4, rel=0.2)  # others use this machine, too
    assert free_memory(CPU, local_ranks=2) == pytest.approx(whole / 2, rel=0.2)


def test_what_is_offloaded_is_counted_on_the_host():
    assert choose().host_bytes == 0
    offloaded = choose(gradient_checkpointing="offload", sharding=Sharding(3, 8))
    setup = Setup(ModelSizes.of(ONE_BILLION), 2, "cuda", liger=True, sharding=Sharding(3, 8))
    treatment = Treatment(1, offload=True)
    assert offloaded.host_bytes == bytes_on_host(setup, treatment, offloaded.most_tokens) > 0
    recorded = MemoryPlan.from_record(json.loads(json.dumps(asdict(offloaded))))
    assert recorded.host_bytes == offloaded.host_bytes


# --- the record -----------------------------------------------------------------------------------


def recorded(plan: MemoryPlan) -> dict:
    return json.loads(json.dumps(asdict(plan)))


def test_a_plan_comes_back_from_its_record():
    plan = choose(longest_unit=420_000)
    assert MemoryPlan.from_record(recorded(plan)) == plan


def test_a_resumed_run_keeps_its_plan_unless_what_it_was_made_for_changes():
    plan = choose()
    more_memory = choose(gib=90)
    assert more_memory.micro_batch_tokens > plan.micro_batch_tokens
    assert keep_recorded(more_memory, recorded(plan)) == (plan, None)
    assert keep_recorded(plan, None) == (plan, None)

    other = choose(sharding=Sharding(stage=1, ranks=2))
    kept, why_anew = keep_recorded(other, recorded(plan))
    assert kept == other and "setup changed" in why_anew
    asked = choose(micro_batch_tokens=1_000)
    kept, why_anew = keep_recorded(asked, recorded(plan))
    assert kept == asked and "micro_batch_tokens changed" in why_anew
    a_little_less = choose(gib=78)
    assert a_little_less.usable_bytes < plan.peak.total
    assert keep_recorded(a_little_less, recorded(plan)) == (plan, None)
    less_memory = choose(gib=40)
    kept, why_anew = keep_recorded(less_memory, recorded(plan))
    assert kept == less_memory and "less free memory" in why_anew
    before_there_were_bytes = {"gradient_checkpointing": "none", "tiled_mlp": False}
    assert keep_recorded(plan, before_there_were_bytes)[0] == plan


def test_people_see_the_ladder_the_peak_and_the_reasons():
    text = str(choose(longest_unit=131_072))
    for told in ("nothing recomputed", "every 2nd layer recomputed", "131,072", "expected at most"):
        assert told in text
    assert f"of {79 * USABLE:.2f} GiB" in text and "weights 2.79 GiB" in text
    assert choose().beside(60 * GIB).endswith("60.00 GiB measured: 1.18 times")


# --- the model ------------------------------------------------------------------------------------


def test_the_tokens_handed_over_decide_what_is_recomputed_and_tiled():
    plan = replace(
        choose(),
        ladder=tuple(
            plan_module.Rung(treatment, capacity, Peak("", {}))
            for treatment, capacity in (
                (Treatment(), 10),
                (Treatment(checkpoint_every=2), 20),
                (Treatment(checkpoint_every=1, tiled_mlp=True), 10_000),
            )
        ),
        liger=plan_module.Choice(False, ""),
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=40,
    )
    model = LlamaForCausalLM(config).train()
    treat = apply_memory_plan(model, plan)
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    tiles = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: tiles.append(1))

    def forward_of_eight_tokens(tokens: int) -> tuple[list[bool], int]:
        treat(tokens)
        tiles.clear()
        out = model(torch.zeros(1, 8, dtype=torch.long), use_cache=False)
        found = [layer.gradient_checkpointing for layer in layers], len(tiles)
        out.logits.sum().backward()
        return found

    nothing, half, full = [False] * 4, [True, False] * 2, [True] * 4
    assert forward_of_eight_tokens(10) == (nothing, 1)
    assert forward_of_eight_tokens(11) == (half, 1)
    assert forward_of_eight_tokens(9_000) == (full, 3)
    assert forward_of_eight_tokens(4_096) == (full, 1)
    assert forward_of_eight_tokens(50_000) == (full, 13)
    assert forward_of_eight_tokens(8) == (nothing, 1)
