"""What results are compared with, and how.

The yardstick is the specification's: measured against exact arithmetic, an error is at most twice (for gradients three
times) that of the same formula in plain PyTorch at the same type, in norm and at the worst element. There are no other
tolerances.
"""

from __future__ import annotations

import numpy as np
import torch
from cases import Case, Inputs, make
from torch import Tensor

from hstu_ops import RelativeBias, hstu_attention, reference


def keep(i: int, j: int, n: int, t: int, c: int, *, causal=True, group=1, window=0, min_full=0, prefix=0) -> bool:
    """Whether row i keeps column j, word by word from the table of the specification."""
    h = n - t
    c = min(c, h)

    def pos(x: int) -> int:
        return max(min(x, h) - (c - 1 if c > 0 else 0), 0)

    if j >= h:  # a target is seen by later targets of its own group, and by itself
        return i >= h and j <= i and (i - h) // group == (j - h) // group
    if i < c:
        return True
    ignores_window = window == 0 or (min_full > 0 and i >= h - min_full) or j < prefix
    if i >= h:
        return ignores_window or pos(i) - pos(j) <= window
    if causal:
        return j <= i and (ignores_window or pos(i) - pos(j) <= window)
    return ignores_window or abs(pos(i) - pos(j)) <= window


def forward_backward(attention, inputs: Inputs, grad_out: Tensor) -> dict[str, Tensor]:
    """The output and the gradients of every leaf that wants one, by name."""
    leaves = {x: t for x, t in inputs.leaves.items() if t.requires_grad}
    out = inputs.call(attention)
    grads = torch.autograd.grad(out, list(leaves.values()), grad_out, allow_unused=True, materialize_grads=True)
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def exact(inputs: Inputs, grad_out: Tensor) -> dict[str, np.ndarray]:
    """The specification in extended precision, with loops and hand-written derivatives; shares no code with the
    package.
    """
    real = np.longdouble
    o = inputs.options
    q, k, v, g = (x.detach().double().cpu().numpy().astype(real) for x in (inputs.q, inputs.k, inputs.v, grad_out))
    heads, dim = q.shape[1:]
    bias = o["bias"]
    leaves = {x: t.detach().double().cpu().numpy().astype(real) for x, t in inputs.leaves.items()}
    grads = {x: np.zeros(t.shape, real) for x, t in leaves.items()}
    out = np.zeros(g.shape, real)
    offsets = inputs.seq_offsets.tolist()
    offsets_q = offsets if o["seq_offsets_q"] is None else o["seq_offsets_q"].tolist()
    alpha = 1 / np.sqrt(real(dim)) if o["alpha"] is None else real(o["alpha"])
    every_head = np.arange(heads)

    for b in range(len(offsets) - 1):
        first, n = offsets[b], offsets[b + 1] - offsets[b]
        first_q, m = offsets_q[b], offsets_q[b + 1] - offsets_q[b]
        t = 0 if o["num_targets"] is None else int(o["num_targets"][b])
        c = o["contextual_seq_len"]
        c = int(c[b]) if isinstance(c, Tensor) else c
        h = n - t
        shift = max(min(c, h) - 1, 0)
        for r in range(m):
            i = n - m + r
            if not isinstance(o["scale"], Tensor):
                scale = 1 / real(inputs.max_seq_len) if o["scale"] is None else real(o["scale"])
            else:
                scale = real(o["scale"][b if len(o["scale"]) == len(offsets) - 1 else first_q + r].item())
            for j in range(n):
                if not keep(
                    i,
                    j,
                    n,
                    t,
                    c,
                    causal=o["causal"],
                    group=o["target_group_size"],
                    window=o["max_attn_len"],
                    min_full=o["min_full_attn_seq_len"],
                    prefix=o["global_prefix_len"],
                ):
                    continue
                cells = []  # (table, index) of the entries added to this score
                if isinstance(bias, Tensor):
                    if max(i, j) < bias.shape[-1]:
                        cells.append(("bias", (b % bias.shape[0], every_head % bias.shape[1], i, j)))
                elif isinstance(bias, RelativeBias):
                    if bias.position_weight is not None:
                        last = bias.position_weight.shape[-1] - 1
                        pos_i, pos_j = (max(min(x, h) - shift, 0) for x in (i, j))
                        entry = min(max(pos_j - pos_i + last // 2, 0), last)
                        cells.append(
                            ("position_weight", (every_head, entry) if bias.position_weight.dim() == 2 else (entry,))
                        )
                    if bias.time_weight is not None:
                        asked = (
                            bias.timestamps[first + i]
                            if bias.query_timestamps is None
                            else bias.query_timestamps[first_q + r]
                        )
                        gap = int(asked) - int(bias.timestamps[first + j])
                        entry = sum(x <= gap for x in bias.buckets.boundaries.tolist())
                        cells.append(("time_weight", (every_head, entry) if bias.time_weight.dim() == 2 else (entry,)))
                s = alpha * (q[first_q + r] * k[first + j]).sum(-1) + sum(leaves[x][index] for x, index in cells)
                sig = 1 / (1 + np.exp(-s))
                out[first_q + r] += scale * (s * sig)[:, None] * v[first + j]
                gi = scale * g[first_q + r]
                ds = (gi * v[first + j]).sum(-1) * (sig + s * sig * (1 - sig))
                grads["v"][first + j] += (s * sig)[:, None] * gi
                grads["q"][first_q + r] += alpha * ds[:, None] * k[first + j]
                grads["k"][first + j] += alpha * ds[:, None] * q[first_q + r]
                for x, index in cells:
                    np.add.at(grads[x], index, ds if any(np.ndim(y) for y in index) else ds.sum())
    return {"out": out, **grads}


class Errors:
    """Errors of one result, and those of plain PyTorch, over any number of draws of its inputs."""

    def __init__(self, name: str) -> None:
        self.name, self.got, self.plain = name, [], []

    def add(self, got: Tensor, plain: Tensor, true: Tensor | np.ndarray) -> None:
        assert got.shape == plain.shape, f"{self.name}: shape {tuple(got.shape)} instead of {tuple(plain.shape)}"
        assert got.dtype == plain.dtype, f"{self.name}: {got.dtype} instead of {plain.dtype}"
        got, plain, true = (_extended(x) for x in (got, plain, true))
        assert np.isfinite(got).all(), f"{self.name}: not finite"
        self.got.append((got - true).ravel())
        self.plain.append((plain - true).ravel())

    def complaint(self) -> str:
        """What breaks the rule; empty if nothing does."""
        factor = 2 if self.name == "out" else 3
        got, plain = np.concatenate(self.got), np.concatenate(self.plain)
        for measure, size in (
            ("norm", lambda x: np.sqrt((x * x).sum())),
            ("maximum", lambda x: np.abs(x).max(initial=0)),
        ):
            if size(got) > factor * size(plain):
                return f"{self.name}: {measure} of the error {size(got):.2e} > {factor} * {size(plain):.2e} in torch"
        return ""


def _extended(x: Tensor | np.ndarray) -> np.ndarray:
    return x.detach().double().cpu().numpy().astype(np.longdouble) if isinstance(x, Tensor) else x


def check(
    case: Case, dtype: torch.dtype, device: str, *, attention=hstu_attention, seed: int = 0, change=lambda inputs: None
) -> None:
    """Compares `attention`, forward and backward, with plain PyTorch under the rule above. `change(inputs)` may alter
    the inputs that the case makes.

    Some results are a single number (the only entry in use of a table), and one rounding error says nothing about the
    next: plain PyTorch may be exact by luck. So what breaks the rule in one draw is measured over 16.
    """
    errors: dict[str, Errors] = {}
    for draw in range(16):
        inputs = make(case, dtype, device, seed=seed + 1000 * draw)
        change(inputs)
        shape = (inputs.q.shape[0], inputs.q.shape[1], inputs.v.shape[2])
        gen = torch.Generator().manual_seed(draw)
        grad_out = torch.randn(shape, generator=gen, dtype=torch.float64).to(inputs.q)
        got = forward_backward(attention, inputs, grad_out)
        plain = forward_backward(reference.hstu_attention, inputs, grad_out)
        if dtype == torch.float64:
            true = exact(inputs, grad_out)
        else:
            true = forward_backward(reference.hstu_attention, inputs.double(), grad_out.double())
        for name in got:
            errors.setdefault(name, Errors(name)).add(got[name], plain[name], true[name])
        if draw == 0 and not any(x.complaint() for x in errors.values()):
            return
    complaints = [x.complaint() for x in errors.values()]
    assert not any(complaints), "\n".join([*filter(None, complaints), str(vars(case))])
