"""yunchang's `ulysses`, linked over by softlink_to_library.py: with the two layers that it lacks."""

from yunchang.ulysses.__init___pristine import __all__ as _pristine_names
from yunchang.ulysses.attn_layer import (
    UlyssesAttention,
    UlyssesFlexAttention,
    VarLenUlyssesAttention,
)

__all__ = [*_pristine_names, "UlyssesAttention", "UlyssesFlexAttention", "VarLenUlyssesAttention"]
