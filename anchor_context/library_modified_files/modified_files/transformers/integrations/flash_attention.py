"""transformers' `flash_attention`, linked over by softlink_to_library.py: attends by document.

The library's own file stands beside this link as `flash_attention_pristine.py`; everything but
`flash_attention_forward` is taken from it.
"""

import sys
from pathlib import Path

from transformers.integrations import flash_attention_pristine as _pristine

globals().update({k: v for k, v in vars(_pristine).items() if not k.startswith("__")})

# Behind everything else on the path: the checkout that this link points into.
sys.path.append(str(Path(__file__).resolve().parents[5]))
from anchor_context.library_modified_files.document_aware import document_aware  # noqa: E402

flash_attention_forward = document_aware(_pristine.flash_attention_forward, engine="flash")
