"""Drop-ins against formulas of what they stand in for, written here in plain PyTorch, one sequence at a time."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from checks import Errors

from hstu_ops.compat.generative_recommenders import delta_hstu_mha, hstu_mha
from hstu_ops.compat.hstu_attn import hstu_attn_varlen_func

LENGTHS = (70, 0, 33, 1, 130, 18)
TARGETS = (20, 0, 33, 0, 7, 5)
CONTEXTS = (9, 0, 2, 4, 0, 18)
N = 140


def offsets(lengths, device="cpu", dtype=torch.int64):
    return F.pad(torch.tensor(lengths, device=device, dtype=dtype).cumsum(0, dtype=dtype), (1, 0))


def draw(*shapes, dtype, device):
    gen = torch.Generator().manual_seed(1)
    return [torch.randn(s, generator=gen, dtype=torch.float64).to(device, dtype).requires_grad_() for s in shapes]


def check(function, formula, leaves):
    """The rule of checks.py: output and gradients against the formula in float64, beside the formula at this type."""

    def results(f, tensors):
        out = f(*tensors)
        gen = torch.Generator().manual_seed(2)
        grad_out = torch.randn(out.shape, generator=gen, dtype=torch.float64).to(out)
        return [out.detach(), *torch.autograd.grad(out, tensors, grad_out)]

    wide = [x.detach().double().requires_grad_() for x in leaves]
    plain, true = results(formula, leaves), results(formula, wide)
    for n, (got, same_type, exact) in enumerate(zip(results(function, leaves), plain, true, strict=True)):
        if leaves[0].dtype == torch.float64:
            torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-13)
            continue
        errors = Errors("out" if n == 0 else f"gradient {n}")
        errors.add(got, same_type, exact)
        assert not errors.complaint(), errors.complaint()


def silu_attention(q, k, v, mask, alpha, factor, bias=0.0):
    """One sequence: `[m, H, D]`, `[n, H, D]`, `[n, H, V]`; mask `[m, n]`, bias `[H, m, n]`."""
    scores = alpha * (torch.einsum("mhd,nhd->hmn", q, k) + bias)
    return factor * torch.einsum("hmn,nhv->mhv", (F.silu(scores) * mask).to(v.dtype), v)


# ---- generative_recommenders -----------------------------------------------------------------------------


def meta_mask(n, targets=0, contexts=0, window=0, min_full=0):
    """Rows and columns get ids: 0 for context, the same last one for all targets, and see smaller ids."""
    last = n - targets - (contexts - 1 if contexts else 0)
    ids = [min(max(i - contexts + 1, 0) if contexts else i, last) for i in range(n)]
    mask = torch.zeros(n, n, dtype=torch.bool)
    for i, row in enumerate(ids):
        for j, column in enumerate(ids):
            seen = i == j or row > column
            if window and row - column > window and row < last - min_full:
                seen = False
            if window and not min_full and row - column > window:
                seen = False
            mask[i, j] = seen or (contexts > 0 and row == 0 and column < last)
    return mask


def meta_formula(lengths, targets=None, contexts=0, window=0, min_full=0, scale=None, alpha=0.3, delta=None):
    def formula(q, k, v):
        out, row, row_q = [], 0, 0
        for b, n in enumerate(lengths):
            m = n if delta is None else delta
            mask = meta_mask(n, targets[b] if targets else 0, contexts, window, min_full)[n - m :].to(q.device)
            factor = 1 / N if scale is None else scale[row : row + n, None, None]
            keys = slice(row, row + n)
            out.append(silu_attention(q[row_q : row_q + m], k[keys], v[keys], mask, alpha, factor).to(q.dtype))
            row, row_q = row + n, row_q + m
        return torch.cat(out)

    return formula


META = {
    "plain": {},
    "targets": {"targets": TARGETS},
    "window": {"window": 11},
    "min_full": {"targets": TARGETS, "window": 11, "min_full": 6},
    "contexts": {"contexts": 5, "lengths": (70, 9, 33), "targets": (20, 3, 0)},
    "everything": {"contexts": 5, "lengths": (70, 9, 33), "targets": (20, 3, 0), "window": 7, "min_full": 4},
}


@pytest.mark.parametrize("name", META)
def test_hstu_mha(name, device, dtype):
    options = {"lengths": LENGTHS, **META[name]}
    total = sum(options["lengths"])
    leaves = draw((total, 2, 16), (total, 2, 16), (total, 2, 24), dtype=dtype, device=device)
    targets = options.get("targets")

    def function(q, k, v):
        return hstu_mha(
            N,
            0.3,
            q,
            k,
            v,
            offsets(options["lengths"], device),
            num_targets=torch.tensor(targets, device=device) if targets else None,
            max_attn_len=options.get("window", 0),
            contextual_seq_len=options.get("contexts", 0),
            min_full_attn_seq_len=options.get("min_full", 0),
            sort_by_length=True,
            kernel="TRITON",
            enable_tma=True,
        )

    check(function, meta_formula(**options), leaves)


@pytest.mark.parametrize("lengths", [(40, 50), (0, 40, 50, *(0,) * 87)], ids=["two", "as many as rows"])
def test_attn_scale_is_a_factor_a_row(lengths, device):
    leaves = draw((90, 2, 8), (90, 2, 8), (90, 2, 8), dtype=torch.float32, device=device)
    scale, targets = torch.rand(90, device=device), torch.tensor(lengths, device=device).clamp(max=3)
    check(
        lambda q, k, v: hstu_mha(N, 0.3, q, k, v, offsets(lengths, device), num_targets=targets, attn_scale=scale),
        meta_formula(lengths, targets.tolist(), scale=scale),
        leaves,
    )
    check(
        lambda q, k, v: hstu_mha(N, 0.3, q, k, v, offsets(lengths, device), attn_scale=scale[0]),
        meta_formula(lengths, scale=scale[:1].expand(90)),
        leaves,
    )


@pytest.mark.parametrize("options", [{}, {"targets": (3, 0, 4)}, {"targets": (3, 0, 4), "contexts": 2, "window": 5}])
def test_delta_hstu_mha(options, device, dtype):
    lengths, delta = (31, 8, 90), 4
    total = sum(lengths)
    leaves = draw((len(lengths) * delta, 2, 16), (total, 2, 16), (total, 2, 24), dtype=dtype, device=device)
    targets = options.get("targets")

    def function(delta_q, k, v):
        return delta_hstu_mha(
            N,
            0.3,
            delta_q,
            k,
            v,
            offsets(lengths, device, torch.int32),
            torch.tensor(targets, device=device) if targets else None,
            options.get("window", 0),
            options.get("contexts", 0),
        )

    check(function, meta_formula(lengths, delta=delta, **options), leaves)


def test_hstu_mha_takes_columns_last():
    q, k, v = draw((2, 16, 9), (2, 16, 9), (2, 16, 9), dtype=torch.float64, device="cpu")
    flipped = [x.permute(2, 0, 1) for x in (q, k, v)]
    expected = meta_formula((4, 5))(*flipped)
    torch.testing.assert_close(hstu_mha(N, 0.3, *flipped, offsets((4, 5))), expected)


def test_no_sequences():
    q = torch.zeros(0, 2, 8)
    assert hstu_mha(N, 1.0, q, q, q, torch.zeros(1, dtype=torch.int64)).shape == (0, 2, 8)
    assert delta_hstu_mha(N, 1.0, q, q, q, torch.zeros(1, dtype=torch.int64)).shape == (0, 2, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"causal": False}, "causal: expected True"),
        ({"dropout_pr": 0.1}, "dropout_pr: expected 0 while training"),
        ({"attn_scale": torch.ones(3)}, r"attn_scale: expected shape \[9\]"),
        ({"max_attn_len": -1}, "max_attn_len: expected at least 0"),
    ],
)
def test_hstu_mha_says_what_it_cannot_do(options, message):
    x = torch.zeros(9, 2, 8)
    with pytest.raises(ValueError, match=message):
        hstu_mha(N, 1.0, x, x, x, offsets((4, 5)), **options)
    with pytest.raises(ValueError, match="delta_q: expected as many rows for each of the 2 sequences"):
        delta_hstu_mha(N, 1.0, x, x, x, offsets((4, 5)))
    for call in (lambda: hstu_mha(N, 1.0, x, x, x, [0, 9]), lambda: delta_hstu_mha(N, 1.0, x, x, x, [0, 9])):
        with pytest.raises(TypeError, match="seq_offsets: expected a tensor, got list"):
            call()
    hstu_mha(N, 1.0, x, x, x, offsets((4, 5)), dropout_pr=0.1, training=False, max_attn_len=None)


# ---- hstu_attn -------------------------------------------------------------------------------------------


def nvidia_mask(n, window, contexts=0, targets=0, group=1):
    left, right = (n if x < 0 else x for x in window)
    mask = torch.zeros(n, n, dtype=torch.bool)
    first_target = n - targets
    for i in range(n):
        mask[i, max(0, i - left) : i + right + 1] = True
        if i < contexts:
            mask[i, :first_target] = True
        if i >= first_target:
            mask[i, first_target : i - (i - first_target) % group] = False
    return mask


def nvidia_formula(lengths, *, window=(-1, 0), contexts=None, targets=None, group=1, alpha=0.7, denominator=N, **more):
    """`slots` and `slots_q`: rows each sequence has room for. `queries`: where they are fewer than keys."""
    queries = more.get("queries", lengths)
    slots, slots_q = more.get("slots", lengths), more.get("slots_q", more.get("slots", queries))

    def formula(q, k, v, rab=None):
        out, row, row_q = [], 0, 0
        for b, (n, m) in enumerate(zip(lengths, queries, strict=True)):
            mask = nvidia_mask(n, window, contexts[b] if contexts else 0, targets[b] if targets else 0, group)
            bias = 0.0 if rab is None else rab[b % len(rab), :, n - m : n, :n]
            keys = slice(row, row + n)
            mask = mask[n - m :].to(q.device)
            o = silu_attention(q[row_q : row_q + m], k[keys], v[keys], mask, alpha, 1 / denominator, bias)
            out.append(F.pad(o.to(q.dtype), (0, 0, 0, 0, 0, slots_q[b] - m)))
            row, row_q = row + slots[b], row_q + slots_q[b]
        return torch.cat(out)

    return formula


def nvidia_call(q, k, v, lengths, rab=None, *, device, **options):
    """By position, as the signature has them. In int32, as their models have them."""

    def ints(values):
        return None if values is None else torch.tensor(values, dtype=torch.int32, device=device)

    queries = options.get("queries", lengths)
    slots, slots_q = options.get("slots", lengths), options.get("slots_q", options.get("slots", queries))
    used = "slots" in options or "slots_q" in options
    cu_k = offsets(slots, device, torch.int32)
    cu_q = cu_k if slots_q is slots else offsets(slots_q, device, torch.int32)
    return hstu_attn_varlen_func(
        q,
        k,
        v,
        cu_q,
        cu_k,
        ints(queries) if used else None,
        ints(lengths) if used else None,
        options.get("longest_q", N),
        N,
        options.get("scaling", -1),
        ints(options.get("contexts")),
        ints(options.get("targets")),
        options.get("group", 1),
        options.get("window", (-1, 0)),
        0.7,
        rab,
        options.get("has_drab", rab is not None),
    )


NVIDIA = {
    "causal": {},
    "full": {"window": (-1, -1)},
    "sliding": {"window": (9, 0)},
    "both sides": {"window": (9, 9)},
    "window as long as the sequence": {"window": (N, 0)},
    "targets": {"targets": TARGETS},
    "groups": {"targets": TARGETS, "group": 3},
    "contexts": {"contexts": CONTEXTS},
    "everything": {"contexts": (9, 0, 0, 1, 5, 13), "targets": TARGETS, "group": 4},
    "last rows": {"queries": (5, 0, 33, 1, 64, 2), "targets": TARGETS, "longest_q": 70, "denominator": 70},
    "scaling": {"scaling": 55, "denominator": 55},
    "padding": {"slots": (80, 4, 33, 3, 131, 20), "targets": TARGETS, "contexts": (9, 0, 0, 1, 5, 13), "group": 4},
    "padding, full": {"slots": (80, 4, 33, 3, 131, 20), "window": (-1, -1)},
    "room for keys": {
        "slots": (80, 4, 40, 3, 131, 20),
        "slots_q": (5, 0, 33, 1, 64, 2),
        "queries": (5, 0, 33, 1, 64, 2),
    },
    "room for queries": {"slots_q": (9, 3, 33, 40, 64, 9), "queries": (5, 0, 33, 1, 64, 2)},
    "room for queries and targets": {
        "slots": (80, 4, 40, 3, 131, 20),
        "slots_q": (70, 3, 33, 40, 64, 9),
        "queries": (5, 0, 33, 1, 64, 2),
        "targets": TARGETS,
        "group": 3,
    },
    "both padded": {"slots": (80, 4, 40, 3, 131, 20), "slots_q": (6, 0, 34, 2, 64, 2), "queries": (5, 0, 33, 1, 64, 2)},
}


def nvidia_shapes(options):
    slots = options.get("slots", LENGTHS)
    rows, queries = sum(slots), sum(options.get("slots_q", options.get("slots", options.get("queries", LENGTHS))))
    return (queries, 2, 16), (rows, 2, 16), (rows, 2, 24)


@pytest.mark.parametrize("name", NVIDIA)
def test_hstu_attn(name, device, dtype):
    options = NVIDIA[name]
    leaves = draw(*nvidia_shapes(options), dtype=dtype, device=device)
    formula = nvidia_formula(LENGTHS, **{x: y for x, y in options.items() if x not in ("scaling", "longest_q")})
    check(lambda q, k, v: nvidia_call(q, k, v, LENGTHS, device=device, **options), formula, leaves)


@pytest.mark.parametrize("shape", [(6, 2), (1, 1), (6, 1), (1, 2)])
@pytest.mark.parametrize("name", ["causal", "everything", "last rows", "padding", "room for keys", "room for queries"])
def test_rab_is_scaled_by_alpha_and_has_a_gradient(name, shape, device64):
    options = NVIDIA[name]
    leaves = draw(*nvidia_shapes(options), (*shape, N, N), dtype=torch.float64, device=device64)
    formula = nvidia_formula(LENGTHS, **{x: y for x, y in options.items() if x not in ("scaling", "longest_q")})
    check(lambda q, k, v, rab: nvidia_call(q, k, v, LENGTHS, rab, device=device64, **options), formula, leaves)


def test_rab_of_a_half_type_is_scaled_in_float32(device):
    q, k, v, rab = draw((10, 2, 16), (10, 2, 16), (10, 2, 16), (1, 2, N, N), dtype=torch.bfloat16, device=device)
    check(
        lambda *x: nvidia_call(*x[:3], (4, 6), x[3], device=device),
        nvidia_formula((4, 6)),
        [q, k, v, rab],
    )
    out = nvidia_call(q.detach(), k.detach(), v.detach(), (4, 6), rab, device=device, has_drab=False)
    assert not out.requires_grad


@pytest.mark.parametrize("rab", [False, True])
def test_padding_is_read_by_nobody(rab, device):
    """NaN in padding rows, and in the gradients that arrive there, reaches nothing."""
    slots = (8, 5)
    q, k, v, bias = draw((13, 2, 8), (13, 2, 8), (13, 2, 8), (2, 1, N, N), dtype=torch.float32, device=device)
    padding = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1], dtype=torch.bool, device=device)
    bias = bias if rab else None

    def run(filling):
        x = [t.detach().masked_fill(padding[:, None, None], filling).requires_grad_() for t in (q, k, v)]
        out = nvidia_call(*x, (5, 4), bias, device=device, slots=slots)
        grad_out = torch.ones_like(out).masked_fill(padding[:, None, None], filling)
        return out.detach(), *torch.autograd.grad(out, x, grad_out)

    for clean, dirty in zip(run(0.0), run(float("nan")), strict=True):
        assert torch.equal(clean, dirty)
        assert not clean[padding].any() and clean[~padding].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_cache": torch.zeros(1)}, "kv_cache: expected None: paged caches are not supported"),
        ({"page_ids": torch.zeros(1)}, "page_ids: expected None: paged caches"),
        ({"last_page_lens": torch.zeros(1)}, "last_page_lens: expected None: paged caches"),
        ({"func": torch.zeros(1)}, "func: expected None: masks given as functions"),
        ({"quant_mode": 1}, "quant_mode: expected -1: float8"),
        ({"has_drab": True}, "rab: expected a tensor, as has_drab is set"),
        ({"rab": torch.zeros(2, 3, N, N)}, r"rab: expected shape \[2 or 1, 2 or 1, N, N\] with N >= 140"),
        ({"rab": torch.zeros(2, 1, N - 1, N - 1)}, r"rab: expected shape \[2 or 1, 2 or 1, N, N\] with N >= 140"),
        ({"rab": torch.zeros(2, N, N)}, r"rab: expected shape \[2 or 1, 2 or 1, N, N\] with N >= 140"),
        ({"max_seqlen_q": N + 1}, "max_seqlen_q: expected at most max_seqlen_k = 140"),
        ({"scaling_seqlen": 0}, "scaling_seqlen: expected a positive number, or -1"),
        ({"window_size": (3, 4)}, r"window_size: expected \(left, 0\), or as many rows"),
        ({"window_size": (-1, 4)}, r"window_size: expected \(left, 0\), or as many rows"),
        ({"window_size": (0, 0)}, "window_size: expected a window of at least one row"),
        (
            {"num_targets": torch.ones(2, dtype=torch.int32), "window_size": (3, 0)},
            r"window_size: expected \(-1, 0\), causal without a window, as num_targets is given",
        ),
        (
            {"num_contexts": torch.ones(2, dtype=torch.int32), "window_size": (-1, -1)},
            r"window_size: expected \(-1, 0\), causal without a window, as num_contexts is given",
        ),
    ],
)
def test_hstu_attn_says_what_it_cannot_do(options, message):
    x, cu = torch.zeros(9, 2, 8), offsets((4, 5), dtype=torch.int32)
    arguments = {
        "max_seqlen_q": N,
        "max_seqlen_k": N,
        "scaling_seqlen": -1,
        **dict.fromkeys(("seqused_q", "seqused_k", "num_contexts", "num_targets")),
    }
    hstu_attn_varlen_func(x, x, x, cu, cu, **arguments)
    with pytest.raises(ValueError, match=message):
        hstu_attn_varlen_func(x, x, x, cu, cu, **{**arguments, **options})
    with pytest.raises(TypeError, match="cu_seqlens_q: expected a tensor, got list"):
        hstu_attn_varlen_func(x, x, x, cu.tolist(), cu, **arguments)


# ---- signatures ------------------------------------------------------------------------------------------


def test_names_order_and_defaults():
    """Those of the libraries, as a call by position needs them."""

    def signature(function):
        parameters = inspect.signature(function).parameters.values()
        return " ".join(x.name if x.default is x.empty else f"{x.name}={x.default}" for x in parameters)

    assert signature(hstu_mha) == (
        "max_seq_len alpha q k v seq_offsets causal=True dropout_pr=0.0 training=True num_targets=None attn_scale=None "
        "max_attn_len=0 contextual_seq_len=0 min_full_attn_seq_len=0 sort_by_length=False kernel=None enable_tma=False"
    )
    assert signature(delta_hstu_mha) == (
        "max_seq_len alpha delta_q k v seq_offsets num_targets=None max_attn_len=0 contextual_seq_len=0 kernel=None "
        "enable_tma=False"
    )
    assert signature(hstu_attn_varlen_func) == (
        "q k v cu_seqlens_q cu_seqlens_k seqused_q seqused_k max_seqlen_q max_seqlen_k scaling_seqlen num_contexts "
        "num_targets target_group_size=1 window_size=(-1, -1) alpha=1.0 rab=None has_drab=False kv_cache=None "
        "page_offsets=None page_ids=None last_page_lens=None func=None quant_mode=-1"
    )


def test_they_compile_without_graph_breaks():
    options = NVIDIA["padding"]
    q, k, v = draw(*nvidia_shapes(options), dtype=torch.float32, device="cpu")

    def both(q, k, v):
        padded = nvidia_call(q, k, v, LENGTHS, device="cpu", **options)
        return padded, hstu_mha(N, 1.0, q, k, v, offsets(options["slots"]), attn_scale=torch.ones(len(q)))

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    for got, expected in zip(compiled(q, k, v), both(q, k, v), strict=True):
        torch.testing.assert_close(got, expected)
