"""What an HSTU layer does between its matrix products; names and arguments are those of hstu_ops. Checks nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bias import accumulation_dtype
from .attention import hstu_attention


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """`(x - mean) / sqrt(variance + eps) * weight + bias` of each row; computed in float32 for float16 and bfloat16."""
    return _norm(x, weight, bias, 1, eps).to(x.dtype)


def silu_split(
    uvqk: Tensor, sizes: Sequence[int], silu: Sequence[bool] = (True, True, True, True)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """u, v, q and k, side by side in uvqk, with `x * sigmoid(x)` applied where `silu` says so."""
    parts = uvqk.split(list(sizes), dim=1)
    return tuple(F.silu(x) if on else x for x, on in zip(parts, silu, strict=True))


def norm_gate(
    a: Tensor,
    u: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    groups: int = 1,
    eps: float = 1e-6,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    training: bool = True,
    concat: bool = False,
) -> Tensor:
    """`dropout(norm(a) * u)`, or with concat `dropout([u, a, norm(a) * u])`."""
    gated = _norm(a, weight, bias, groups, eps) * u
    parts = [u, a, gated] if concat else [gated]
    if dropout > 0 and training:
        seed = torch.randint(2**62, (1,), device=a.device) if seed is None else seed
        keep = [dropout_mask(seed, dropout, *a.shape, section, a.device) for section in range(3)][-len(parts) :]
        parts = [torch.where(m, x / (1 - dropout), 0) for x, m in zip(parts, keep, strict=True)]
    return torch.cat([x.to(a.dtype) for x in parts], dim=1)


def layer_core(
    uvqk: Tensor,
    seq_offsets: Tensor,
    max_seq_len: int,
    *,
    num_heads: int,
    dim_qk: int,
    dim_v: int,
    silu: Sequence[bool] = (True, True, True, True),
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    groups: int = 1,
    eps: float = 1e-6,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    training: bool = True,
    concat: bool = False,
    recompute_silu: bool = False,
    recompute_attention: bool = False,
    **attention: object,
) -> Tensor:
    """silu_split, hstu_attention and norm_gate in a row. Keeps everything, whatever is to be recomputed."""
    hidden_v, hidden_qk = num_heads * dim_v, num_heads * dim_qk
    u, v, q, k = silu_split(uvqk, (hidden_v, hidden_v, hidden_qk, hidden_qk), silu)
    q, k, v = (x.unflatten(1, (num_heads, -1)) for x in (q, k, v))
    a = hstu_attention(q, k, v, seq_offsets, max_seq_len, **attention).flatten(1)
    return norm_gate(
        *(a, u, norm_weight, norm_bias),
        **dict(groups=groups, eps=eps, dropout=dropout, seed=seed, training=training, concat=concat),
    )


def dropout_mask(
    seed: int | Tensor,
    probability: float,
    rows: int,
    columns: int,
    section: int = 2,
    device: torch.device | str | None = None,
) -> Tensor:
    """What `norm_gate` keeps: bool `[rows, columns]` of section 0 (u), 1 (a) or 2 (the product).

    Element (r, c) is kept if its random number is at least `round(probability * 2^15)`: number `c % 8` of the 8, each
    the lower 15 bits of half a word, low half first, in the four words of Philox4x32-7 with the key 0 and the counter
    (r mod 2^32, r >> 32, c // 8, section) xor the words of Philox4x32-7 with the seed as key and the counter 0.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    if not isinstance(seed, Tensor):
        seed = torch.tensor((seed + 2**63) % 2**64 - 2**63, device=device)
    seed = seed.reshape(())
    r = torch.arange(rows, device=device)[:, None]
    c = torch.arange((columns + 7) // 8, device=device)[None, :]
    place = (x.expand(rows, c.shape[1]) for x in (r & _LOW, r >> 32, c, torch.full_like(c, section)))
    state = _philox([torch.zeros_like(seed)] * 4, seed & _LOW, (seed >> 32) & _LOW)
    words = _philox([x ^ y for x, y in zip(place, state, strict=True)], 0, 0)
    numbers = torch.stack([y for x in words for y in (x & 0x7FFF, (x >> 16) & 0x7FFF)], dim=-1)
    return numbers.flatten(1)[:, :columns] >= round(probability * 2**15)


_LOW = 0xFFFFFFFF


def _philox(counter: list[Tensor], k0: Tensor | int, k1: Tensor | int) -> list[Tensor]:
    """The four words of Philox4x32-7, 32 bits each in an int64."""
    x0, x1, x2, x3 = counter
    for _ in range(7):
        p0, p1 = x0 * 0xD2511F53, x2 * 0xCD9E8D57  # 64 bits, of which int64 keeps all
        x0, x1, x2, x3 = ((p1 >> 32) & _LOW) ^ x1 ^ k0, p1 & _LOW, ((p0 >> 32) & _LOW) ^ x3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return [x0, x1, x2, x3]


def _norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float) -> Tensor:
    wide = x.to(accumulation_dtype(x.dtype)).unflatten(1, (groups, x.shape[1] // groups))
    centred = wide - wide.mean(-1, keepdim=True)
    y = (centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)).flatten(1)
    y = y if weight is None else y * _per_column(weight, x.shape[1])
    return y if bias is None else y + _per_column(bias, x.shape[1])


def _per_column(w: Tensor, columns: int) -> Tensor:
    return w if len(w) == columns else w.repeat_interleave(columns // len(w))
