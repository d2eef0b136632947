"""What a layer does between its matrix products, in plain PyTorch."""

from ..pointwise import layer_norm, norm_gate, silu_split

__all__ = ["layer_norm", "norm_gate", "silu_split"]
