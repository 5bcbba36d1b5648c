"""AnchorAttention for long-context training (arXiv 2411.13476). Start reading at `train.py`.

For somebody else's training script: `patch_model` and `AnchorDataCollator` (see `integrations/trainers.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anchor_context.integrations.trainers import AnchorDataCollator, patch_model

__all__ = ["AnchorDataCollator", "patch_model"]


def __getattr__(name: str):
    """Import on first use: `import anchor_context` alone loads neither torch nor transformers."""
    if name in __all__:
        from anchor_context.integrations import trainers

        return getattr(trainers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
