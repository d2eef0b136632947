"""What hstu_ops computes, in plain PyTorch: short, slow, any float type, any device, differentiable twice.

Names and arguments are those of `hstu_ops`. `attention.py` defines the attention, `modules.py` the layer and the stack,
which have the constructor and the state dict of their namesakes: one import is all that swaps one for the other.
"""

from .attention import attention_mask, hstu_attention, logical_position, padded_hstu_attention, relative_bias
from .modules import HSTU, HSTULayer
from .pointwise import dropout_mask, layer_core, layer_norm, norm_gate, silu_split

__all__ = [
    "HSTU",
    "HSTULayer",
    "attention_mask",
    "dropout_mask",
    "hstu_attention",
    "layer_core",
    "layer_norm",
    "logical_position",
    "norm_gate",
    "padded_hstu_attention",
    "relative_bias",
    "silu_split",
]
