"""Which Hugging Face decoder families train with AnchorAttention: run, not read.

    python tests/model_coverage.py            the table of integrations/README.md, in Markdown
    python tests/model_coverage.py mistral    one family, with the reason in full

Each family is a tiny random model in float64. Its document tokens' logits under each engine must equal
the unpatched model's own dense attention with the pattern's mask and positions given outright, and
those of a row of one document, with the pattern "full", the unpatched model's as it is; a changed token
must change nothing in other documents and nothing before it; a changed anchor must change every
document. Two ranks that share the row, by a ring or by Ulysses (threads in one process), must find the
same. Families that know a sliding window are run once more with one that hides something. "train.py" is
its own check of a model, and its loss beside that of the unpatched model's logits. Costs about half a
minute of one core for all of them.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from dataclasses import dataclass, field

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import train
from anchor_context.attention import flex
from anchor_context.attention.kernels import KERNELS
from anchor_context.attention.patterns import make_layout, mask_predicate
from anchor_context.integrations.calls import layer_windows, softcap_of
from anchor_context.integrations.models import set_attention
from anchor_context.integrations.rehearsal import random_settings
from anchor_context.integrations.trainers import patch_model
from anchor_context.layout import DocumentLayout
from anchor_context.loss import CausalLMWithLoss, tiled_loss
from anchor_context.parallel.groups import RankGrid, make_grid
from anchor_context.parallel.ring import ring
from anchor_context.parallel.shard import shard_batch
from anchor_context.parallel.traffic import Traffic
from anchor_context.parallel.ulysses import ulysses
from tests.ring_in_threads import Network

FAMILIES = {
    "llama": "LLaMA 2, 3; SmolLM, SmolLM2; Yi",
    "mistral": "Mistral",
    "ministral": "Ministral",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3 (text)",
    "gemma4_text": "Gemma 4 (text)",
    "vaultgemma": "VaultGemma",
    "phi": "Phi-1.5, Phi-2",
    "phi3": "Phi-3, Phi-4",
    "olmo": "OLMo",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3",
    "granite": "Granite 3",
    "smollm3": "SmolLM3",
    "cohere": "Command R",
    "cohere2": "Command R7B, Command A",
    "starcoder2": "StarCoder2",
    "stablelm": "StableLM",
    "nemotron": "Nemotron-4, Minitron",
    "glm": "GLM-4 9B",
    "glm4": "GLM-4-0414",
    "gpt_neox": "GPT-NeoX, Pythia",
    "gpt2": "GPT-2",
    "opt": "OPT",
    "falcon": "Falcon",
    "bloom": "BLOOM",
    "mpt": "MPT",
    "gptj": "GPT-J",
    "helium": "Helium",
    "exaone4": "EXAONE 4",
    "ernie4_5": "ERNIE 4.5",
    "hunyuan_v1_dense": "Hunyuan dense",
    "seed_oss": "Seed-OSS",
    "apertus": "Apertus",
    "arcee": "Arcee AFM",
    "bitnet": "BitNet",
    "diffllama": "DiffLlama",
    "mixtral": "Mixtral (mixture of experts)",
    "qwen2_moe": "Qwen2-MoE",
    "qwen3_moe": "Qwen3-MoE",
    "olmoe": "OLMoE",
    "granitemoe": "Granite MoE",
    "phimoe": "Phi-3.5-MoE",
    "glm4_moe": "GLM-4.5 MoE",
    "dots1": "dots.llm1",
    "deepseek_v2": "DeepSeek-V2",
    "deepseek_v3": "DeepSeek-V3, R1",
    "llama4_text": "LLaMA 4 (text)",
    "gpt_oss": "gpt-oss",
    "qwen3_next": "Qwen3-Next",
    "lfm2": "LFM2",
    "jamba": "Jamba",
    "bamba": "Bamba",
    "mamba": "Mamba",
    "doge": "Doge",
}

REFUSED = {
    "doge": "attention_mask",
    "llama4_text": "chunked_attention",
    "qwen3_next": "linear_attention",
    "lfm2": "conv",
    "jamba": "linear_attention",
    "bamba": "linear_attention",
    "mamba": "linear_attention",
    "stablelm": "computes this family's attention itself",
    "falcon": "computes this family's attention itself",
    "bloom": "computes this family's attention itself",
    "mpt": "computes this family's attention itself",
    "nemotron": "not handed on",
}
"""The families that do not pass, and what their error says; a test holds all others to passing."""
NOT_TRAINED = {"phimoe": "draw experts at random"}
"""The families that pass, but for `train.py`, and what it says."""

LENGTHS = (17, 9, 14)
"""Tokens of the documents, their anchors included."""
ANCHOR, VOCABULARY, WINDOW = 1, 64, 8
ENGINES = {"flash": "per_document", "flex": "shared"}
SHARED = {"ring": "per_document", "ulysses": "shared"}
"""Ways of two ranks to share a row. Ulysses goes around any engine, here flex."""
ON_CUDA = "CUDA"
"""In place of a yes: what no kernel of the CPU computes, and kernels of CUDA do (capped scores)."""

# Applied where a family's configuration has the name.
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # sharp attention: a wrong mask makes a large difference
    "pad_token_id": 0,
    "bos_token_id": ANCHOR,
    "eos_token_id": 2,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "intermediate_size_mlp": 48,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "rotary_dim": 4,
    "word_embed_proj_dim": 32,
    "ffn_dim": 48,
    "mamba_d_state": 4,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "attn_layer_indices": [1],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}

OF_FAMILY = {  # where a tiny model needs other sizes to be one
    "deepseek_v2": {"num_key_value_heads": 4, "head_dim": 8},
    "deepseek_v3": {"num_key_value_heads": 4},
    "dots1": {"n_shared_experts": 1},
    "gemma4_text": {  # whose layers differ in their heads
        "global_head_dim": 16,
        "num_global_key_value_heads": 1,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCABULARY,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}


@dataclass
class Result:
    """What came out for one family."""

    name: str
    passed: dict[str, bool | str] = field(default_factory=dict)
    """Engine, way to share a row, or "train.py" -> whether everything held, or `ON_CUDA`."""
    windows: dict[str, bool] | None = None
    """Engine, or way to share a row -> whether it honours a sliding window; None if the family knows none."""
    sinks: bool = False
    """Whether its attention has sinks."""
    reason: str = ""


def tiny_model(model_type: str, *, window: int) -> PreTrainedModel:
    """A random model of the family in float64, its sliding window (if it has one) set to `window`."""
    default = AutoConfig.for_model(model_type)
    default.allow_global_per_layer_attribute_access = True  # of Gemma 4, to name them alone
    settings = {k: v for k, v in TINY.items() if _is_setting(default, k)}
    settings |= dict.fromkeys(random_settings(default), 0.0)
    settings |= OF_FAMILY.get(model_type, {})
    kinds = list(dict.fromkeys(getattr(default, "layer_types", None) or []))
    if knows_windows(default):
        settings["sliding_window"] = window
        if hasattr(default, "use_sliding_window"):
            settings["use_sliding_window"] = True
            kinds = ["sliding_attention", "full_attention"]
    if len(kinds) == 2 and _is_setting(default, "layer_types"):  # one layer of each kind
        settings["layer_types"] = kinds
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **settings)
    # Experts one by one: PyTorch multiplies groups of them in no float64.
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    return model.double().eval()


def _is_setting(config, name: str) -> bool:
    """Whether the family's configuration has this name, and not as something derived."""
    return hasattr(config, name) and not isinstance(getattr(type(config), name, None), property)


def knows_windows(config) -> bool:
    """Whether the family has sliding windows, used by default or not."""
    return _is_setting(config, "sliding_window")


def row(placement: str, *, seed: int = 0) -> tuple[Tensor, DocumentLayout]:
    """One row of documents, tokens (1, S), with anchors placed, and its layout."""
    tokens = torch.randint(3, VOCABULARY, (sum(LENGTHS),), generator=_generator(seed))
    starts = [0]
    for length in LENGTHS[:-1]:
        starts.append(starts[-1] + length)
    if placement == "per_document":
        tokens[starts] = ANCHOR
    else:
        starts.insert(1, 1)  # the anchor is a document of its own
        tokens[0] = ANCHOR
    layout = make_layout(
        torch.tensor(starts).numpy(),
        batch_size=1,
        row_length=len(tokens),
        pattern="anchor",
        anchor_placement=placement,
    )
    return tokens[None], layout


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dense_logits(model: PreTrainedModel, tokens: Tensor, layout: DocumentLayout) -> Tensor:
    """The unpatched model, every score written out, masks given outright for each kind of layer."""

    def mask(window: int | None) -> Tensor:
        index = torch.arange(tokens.shape[1])
        zero = torch.tensor(0)
        visible = mask_predicate(layout, sliding_window=window)(
            zero, zero, index[:, None], index[None, :]
        )
        return torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)[None, None].double()

    window = getattr(model.config, "sliding_window", None)
    kinds = set(getattr(model.config, "layer_types", None) or [])
    if len(kinds) > 1:
        masks = {kind: mask(window if kind == "sliding_attention" else None) for kind in kinds}
    else:
        masks = mask(window if kinds != {"full_attention"} else None)
    return _logits(model, tokens, position_ids=layout.position_ids, attention_mask=masks)


def _logits(model: PreTrainedModel, tokens: Tensor, **more) -> Tensor:
    with torch.no_grad():
        return model(tokens, use_cache=False, **more).logits[0]


def check(model_type: str, engine: str, *, window: int) -> str:
    """Run one family with one engine: "" if everything held, else what did not."""
    placement = ENGINES[engine]
    tokens, layout = row(placement)
    model = patch_model(tiny_model(model_type, window=window), engine=engine, pattern="anchor")
    logits = _logits(model, tokens, layout=layout)

    documents = layout.document_ids[0]
    last = int(documents.max())
    for document in range(last - 2, last + 1):
        here = (documents == document).nonzero().flatten()
        for place in (int(here[len(here) // 2]), int(here[-1])):
            change = (_changed(model, tokens, layout, place) - logits).abs().amax(-1)
            own_later = (documents == document) & (torch.arange(len(documents)) >= place)
            if (~own_later).any() and not change[~own_later].max() < 1e-6:
                return f"leaks: token {place} changes others by {change[~own_later].max():.1e}"
            if not change[own_later].min() > 1e-6:
                return "a changed token does not reach its own document"
    if placement == "shared":
        change = (_changed(model, tokens, layout, 0) - logits).abs().amax(-1)
        if not change.min() > 1e-6:
            return "the anchor does not reach every token"

    expected = dense_logits(tiny_model(model_type, window=window), tokens, layout)
    if reason := _difference(logits, expected):
        return f"differs from the dense reference by {reason}"
    expected = _logits(tiny_model(model_type, window=window), tokens)
    model = patch_model(tiny_model(model_type, window=window), engine=engine, pattern="full")
    logits = _logits(model, tokens, position_ids=torch.arange(tokens.shape[1])[None])
    if reason := _difference(logits, expected):
        return f"differs from the unpatched model on one document by {reason}"
    return ""


def check_shared(model_type: str, way: str, *, window: int) -> str:
    """The same for two ranks that share the row."""
    tokens, layout = row(SHARED[way])
    expected = dense_logits(tiny_model(model_type, window=window), tokens, layout)
    model = tiny_model(model_type, window=window)
    batch = {"input_ids": tokens, "labels": torch.arange(tokens.shape[1])[None]}
    batch |= {"position_ids": layout.position_ids, "layout": layout}

    def attend(*inputs, **settings):
        if way == "ring":
            return ring(KERNELS["torch_cpu"], None, Traffic())(*inputs, **settings)
        return ulysses(flex.make_attend(), None, Traffic())(*inputs, **settings)

    def of_rank(rank: int) -> tuple[Tensor, Tensor]:
        degrees = {"ring_degree": 1, "ulysses_degree": 1} | {f"{way}_degree": 2}
        grid = make_grid(rank=rank, world_size=2, **degrees)
        mine = shard_batch(batch, grid=grid, windows=layer_windows(model.config))
        inputs = {key: mine[key] for key in ("position_ids", "layout")}
        return mine["labels"][0], _logits(model, mine["input_ids"], **inputs)

    set_attention(model, attend)
    logits = torch.empty_like(expected)
    for places, part in Network(ranks=2).run(of_rank):
        logits[places] = part
    if reason := _difference(logits, expected):
        return f"two ranks differ from the dense reference by {reason}"
    return ""


def check_training(model_type: str) -> str:
    """What `train.py` says of the model, and whether its loss is that of the model's own logits."""
    tokens, _ = row("shared")
    own = tiny_model(
        model_type, window=4096
    )  # as it evaluates; what trains must be the same function
    expected = torch.nn.functional.cross_entropy(_logits(own, tokens), tokens[0], reduction="sum")
    flags = train.Flags(model_name_or_path=model_type, seq_length=64, attn_engine="flex")
    train.check_model(own.config, flags, RankGrid())
    train.apply_rope_settings(own.config, row_length=flags.seq_length)
    set_attention(own, flex.make_attend())
    layout = make_layout(
        torch.tensor([0]).numpy(),
        batch_size=1,
        row_length=tokens.shape[1],
        pattern="full",
        anchor_placement="none",
    )
    with torch.no_grad():
        loss, _ = CausalLMWithLoss(own, tiled_loss).train()(
            input_ids=tokens, labels=tokens, position_ids=layout.position_ids, layout=layout
        )
    error = abs(loss.item() / expected.item() - 1)
    return (
        ""
        if error < 1e-5
        else f"the loss differs from that of the model's own logits by {error:.1e}"
    )


def _difference(logits: Tensor, expected: Tensor) -> str:
    """How far they are apart, if they are."""
    error = (logits - expected).abs().max().item()
    return "" if error < 1e-6 * expected.abs().max().item() else f"{error:.1e}"


def _changed(model: PreTrainedModel, tokens: Tensor, layout: DocumentLayout, place: int) -> Tensor:
    other = tokens.clone()
    other[0, place] = 3 + (tokens[0, place] - 3 + 7) % (VOCABULARY - 3)
    return _logits(model, other, layout=layout)


def cover(model_type: str) -> Result:
    """Run one family with every engine and way to share a row, and with its sliding window if it has one."""
    result = Result(FAMILIES[model_type])
    config = AutoConfig.for_model(model_type)

    def held(run, *arguments, **settings) -> tuple[bool | str, str]:
        try:
            reason = run(*arguments, **settings)
        except Exception as error:  # whatever a family raises is its reason in the table
            reason = f"{type(error).__name__}: {error}"
        if "does not cap scores" in reason and softcap_of(config) and _some_kernel_caps():
            return ON_CUDA, ""
        return not reason, reason

    runs = {engine: (check, engine) for engine in ENGINES}
    runs |= {way: (check_shared, way) for way in SHARED}
    for label, (run, way) in runs.items():
        result.passed[label], reason = held(run, model_type, way, window=4096)
        result.reason = result.reason or reason
    result.passed["train.py"], reason = held(check_training, model_type)
    result.reason = result.reason or reason
    if knows_windows(config):
        result.windows = {
            label: held(run, model_type, way, window=WINDOW)[0] is True
            for label, (run, way) in runs.items()
        }
    if result.passed["flex"]:
        names = (name for name, _ in tiny_model(model_type, window=4096).named_parameters())
        result.sinks = any(name.endswith("sinks") for name in names)
    return result


def _some_kernel_caps() -> bool:
    return any(kernel.no_softcap() is None for kernel in KERNELS.values())


COLUMNS = {
    "flash": "flash",
    "flex": "flex",
    "ring": "ring",
    "ulysses": "Ulysses",
    "train.py": "`train.py`",
}


def table(results: dict[str, Result]) -> str:
    """The table of integrations/README.md: families that pass, then those that do not, with the reason."""

    def mark(held: bool | str) -> str:
        return held if isinstance(held, str) else "yes" if held else "no"

    def window(result: Result) -> str:
        if result.windows is None:
            return "–"
        honour = [COLUMNS[label] for label, held in result.windows.items() if held]
        return "yes" if len(honour) == len(result.windows) else ", ".join(honour) or "no"

    lines = [
        f"| family | `model_type` | {' | '.join(COLUMNS.values())} | sliding window | sinks | reason |",
        f"|{'---|' * (len(COLUMNS) + 5)}",
    ]
    ordered = sorted(results.items(), key=lambda item: not all(item[1].passed.values()))
    for model_type, result in ordered:
        marks = [mark(result.passed[label]) for label in COLUMNS]
        marks += [window(result), "yes" if result.sinks else "–"]
        reason = short_reason(result.reason, model_type)
        lines.append(f"| {result.name} | `{model_type}` | {' | '.join(marks)} | {reason} |")
    return "\n".join(lines)


def short_reason(reason: str, model_type: str) -> str:
    """What an error says first, without the type and family in front and the remedy after the ";"."""
    said = " ".join(reason.split()).removeprefix("ValueError: ").removeprefix(f"{model_type}: ")
    return said.split(";")[0].replace("|", "/")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="only these")
    chosen = parser.parse_args().families
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    results = {name: cover(name) for name in chosen or FAMILIES}
    print(table(results))
    for name in chosen:
        print(f"\n{name}: {results[name].reason or 'everything holds'}")
    print(f"\nRun with torch {torch.__version__}, transformers {transformers.__version__}.")


if __name__ == "__main__":
    main()
