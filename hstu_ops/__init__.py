"""HSTU attention for PyTorch: jagged sequences, SiLU instead of softmax, fused relative bias, on CPU and CUDA.

>>> out = hstu_ops.hstu_attention(q, k, v, seq_offsets, max_seq_len)

`hstu_ops.hstu_attention` is the op, `hstu_ops.RelativeAttentionBias` the module that owns bias tables. On top of them
are `hstu_ops.HSTULayer`, `hstu_ops.HSTU` and `hstu_ops.HSTURecommender`. `hstu_ops.reference` has the same mathematics
in plain PyTorch. `python -m hstu_ops` prints what this build holds and checks it, `python -m hstu_ops train` trains.
"""

from importlib.metadata import PackageNotFoundError, version
from pkgutil import extend_path

# Inside a clone, `python -m hstu_ops` imports the source tree; the libraries are then those of the installed copy.
__path__ = extend_path(__path__, __name__)

from . import reference
from ._library import build_info
from .attention import hstu_attention
from .bias import RelativeAttentionBias, RelativeBias, TimeBuckets
from .histories import Histories
from .jagged import stochastic_length
from .layer import HSTU, HSTULayer
from .pointwise import layer_core, layer_norm, norm_gate, silu_split
from .recommender import HSTURecommender

try:
    __version__ = version("hstu_ops")
except PackageNotFoundError:  # imported from a source tree that was never installed
    __version__ = build_info().get("version", "0") + "+source"

__all__ = [
    "HSTU",
    "HSTULayer",
    "HSTURecommender",
    "Histories",
    "RelativeAttentionBias",
    "RelativeBias",
    "TimeBuckets",
    "__version__",
    "build_info",
    "hstu_attention",
    "layer_core",
    "layer_norm",
    "norm_gate",
    "reference",
    "silu_split",
    "stochastic_length",
]
