"""yunchang's `ulysses.attn_layer`, linked over by softlink_to_library.py: two layers more.

The library's own file stands beside this link as `attn_layer_pristine.py`; `UlyssesAttention` is its.
"""

import sys
from pathlib import Path

from yunchang.ulysses import attn_layer_pristine as _pristine

globals().update({k: v for k, v in vars(_pristine).items() if not k.startswith("__")})

# Behind everything else on the path: the checkout that this link points into.
sys.path.append(str(Path(__file__).resolve().parents[5]))
from anchor_context.library_modified_files.ulysses_layers import (  # noqa: E402
    UlyssesFlexAttention as UlyssesFlexAttention,
)
from anchor_context.library_modified_files.ulysses_layers import (  # noqa: E402
    VarLenUlyssesAttention as VarLenUlyssesAttention,
)
