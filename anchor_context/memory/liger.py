"""Liger's kernels for one model, where they can run: RMSNorm, RoPE and SwiGLU.

Its fused loss has its place in `loss.py`.
"""

from __future__ import annotations

import inspect
import sys

import torch
from transformers import PreTrainedModel

from anchor_context.loss import LIGER_AT_LEAST, liger_available
from anchor_context.rope.float32 import rotary_tables, wrap_rotation

NOT_INSTALLED = f"not installed, or older than {LIGER_AT_LEAST}: pip install liger-kernel==0.8.5"


def why_no_liger(model: PreTrainedModel, device: torch.device) -> str | None:
    """What keeps Liger's kernels from this model here; None if nothing does."""
    if device.type != "cuda":
        return f"its kernels are Triton's, for CUDA, and this is {device.type}"
    if not liger_available(device):
        return NOT_INSTALLED
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    kind = model.config.model_type
    return None if kind in MODEL_TYPE_TO_APPLY_LIGER_FN else f"it has no kernels for {kind}"


def apply_liger(model: PreTrainedModel) -> None:
    """Give this one `model` Liger's RMSNorm, RoPE and SwiGLU; not its loss, whose place is `loss.py`.

    Its RoPE only where it is Liger's own default: where not, the family rotates otherwise (GLM-4 and
    DeepSeek turn neighbouring entries together). Gemma 3 and OLMo 3, which have a table for each kind of
    layer, keep their own too. `rotate_in_float32` (--rope_precision) may come afterwards, and then rotates
    in its place.
    """
    from liger_kernel.transformers import _apply_liger_kernel_to_instance, liger_rotary_pos_emb
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    apply_to_family = MODEL_TYPE_TO_APPLY_LIGER_FN[model.config.model_type]
    # Besides the instance, Liger exchanges the classes in the model's module: those are put back.
    modeling = vars(sys.modules[type(model).__module__])
    before = dict(modeling)
    # transformers' own Trainer calls this; Liger drops the keywords that a model has no use for.
    _apply_liger_kernel_to_instance(
        model,
        rms_norm=True,
        swiglu=True,
        rope=False,
        cross_entropy=False,
        fused_linear_cross_entropy=False,
    )
    modeling.update(before)
    rope = inspect.signature(apply_to_family).parameters.get("rope")
    one_table = all(hasattr(table, "inv_freq") for table in rotary_tables(model))
    if rope is not None and rope.default and rotary_tables(model) and one_table:
        wrap_rotation(model, lambda rotate: liger_rotary_pos_emb)
