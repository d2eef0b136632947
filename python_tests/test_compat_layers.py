"""Weights of the published layers in an HSTULayer, against the published formulas written here in plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from hstu_ops.compat.generative_recommenders import research_layer, stu_layer

LENGTHS, N = (7, 1, 12), 16
E, H, DQK, DV = 24, 3, 4, 6


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


def research_weights(**more):
    """With tables as of a padded length of N; drawn larger than they are initialised, so that each counts."""
    tables = {"_rel_attn_bias._pos_w": normal(2 * N - 1), "_rel_attn_bias._ts_w": normal(129)}
    weights = {"_uvqk": normal(E, 2 * H * (DQK + DV)) / 4, "_o.weight": normal(E, H * DV), "_o.bias": normal(E)}
    return {**weights, **tables, **more}


def stu_weights(per_head):
    size = H if per_head else H * DV
    return {
        "_uvqk_weight": normal(E, 2 * H * (DQK + DV)) / 4,
        "_uvqk_beta": normal(2 * H * (DQK + DV)),
        "_input_norm_weight": normal(E),
        "_input_norm_bias": normal(E),
        "_output_weight": normal(3 * H * DV, E),
        "_output_norm_weight": normal(size),
        "_output_norm_bias": normal(size),
    }


def attention(u, v, q, k, bias, alpha):
    """Causal, of one sequence: rows of `[n, H * D]`."""
    q, k, v = (x.unflatten(1, (H, -1)) for x in (q, k, v))
    scores = F.silu(alpha * torch.einsum("ihd,jhd->hij", q, k) + bias) / N
    return u, torch.einsum("hij,jhd->ihd", scores.tril(), v).flatten(1)


def research_formula(w, x, times, next_times, act=F.silu):
    """One sequence; relative bias from the tables by distance and by the logarithm of the time between."""
    n = len(x)
    u, v, q, k = act(F.layer_norm(x, (E,), eps=1e-6) @ w["_uvqk"]).split([H * DV, H * DV, H * DQK, H * DQK], dim=1)
    bias = torch.zeros(n, n, dtype=torch.float64)
    rows = torch.arange(n)
    position = w.get("_rel_attn_bias._pos_w", w.get("_rel_attn_bias._w"))
    if position is not None:
        bias = bias + position[rows[None, :] - rows[:, None] + N - 1]
    if "_rel_attn_bias._ts_w" in w:
        gaps = (next_times[:, None] - times[None, :]).abs().clamp(min=1)
        bias = bias + w["_rel_attn_bias._ts_w"][(gaps.log() / 0.301).long().clamp(0, 128)]
    u, a = attention(u, v, q, k, bias, 1.0)
    return x + (u * F.layer_norm(a, (H * DV,), eps=1e-6)) @ w["_o.weight"].T + w["_o.bias"]


def stu_formula(w, x, alpha=None, per_head=False):
    normed = F.layer_norm(x, (E,), w["_input_norm_weight"], w["_input_norm_bias"], 1e-6)
    u, v, q, k = (normed @ w["_uvqk_weight"] + w["_uvqk_beta"]).split([H * DV, H * DV, H * DQK, H * DQK], dim=1)
    u, a = attention(F.silu(u), v, q, k, 0.0, DQK**-0.5 if alpha is None else alpha)
    norm = w["_output_norm_weight"], w["_output_norm_bias"], 1e-6
    y = F.group_norm(a.unflatten(1, (H, DV)), H, *norm).flatten(1) if per_head else F.layer_norm(a, (H * DV,), *norm)
    return x + torch.cat([u, a, y * u], dim=1) @ w["_output_weight"]


def batch():
    x, total = normal(sum(LENGTHS), E), sum(LENGTHS)
    times = torch.randint(0, 100_000, (total + 1,)).cumsum(0)
    return x, torch.tensor([0, 7, 8, 20]), times[:-1].clone(), times[1:].clone()


def each(formula, *tensors):
    return torch.cat([formula(*parts) for parts in zip(*(t.split(LENGTHS) for t in tensors), strict=True)])


@pytest.mark.parametrize("tables", [("_pos_w", "_ts_w"), ("_w",), ()], ids=lambda x: "+".join(x) or "none")
@pytest.mark.parametrize("activation", ["silu", "none"])
def test_research_layer(tables, activation):
    weights = research_weights(**{"_rel_attn_bias._w": normal(2 * N - 1)})
    weights = {x: w for x, w in weights.items() if not x.startswith("_rel") or x.split(".")[1] in tables}
    options = {} if tables else {"max_seq_len": N}
    layer = research_layer(weights, H, DQK, linear_activation=activation, **options)
    x, offsets, times, next_times = batch()
    act = F.silu if activation == "silu" else lambda x: x
    expected = each(lambda *a: research_formula(weights, *a, act=act), x, times, next_times)
    times = {"timestamps": times, "query_timestamps": next_times} if "_ts_w" in tables else {}
    torch.testing.assert_close(layer(x, offsets, **times), expected, rtol=1e-10, atol=1e-10)
    assert layer.relative_bias is None or (layer.relative_bias.time_weight is not None) == ("_ts_w" in tables)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("alpha", [None, 0.7])
def test_stu_layer(per_head, alpha):
    weights = stu_weights(per_head)
    layer = stu_layer(weights, H, DQK, max_seq_len=N, attn_alpha=alpha, recompute=("norm", "projection")).eval()
    x, offsets, _, _ = batch()
    expected = each(lambda x: stu_formula(weights, x, alpha, per_head), x)
    torch.testing.assert_close(layer(x, offsets), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer(x, offsets, scale=1 / N), expected, rtol=1e-10, atol=1e-10)
    assert layer.dropout == 0.3 and layer.recompute == ("norm", "projection")


def test_one_layer_of_a_stack():
    stack = {f"_stu_layers.{n}.{x}": w for n in range(2) for x, w in stu_weights(False).items()}
    layer = stu_layer(stack, H, DQK, max_seq_len=N, prefix="_stu_layers.1.")
    assert torch.equal(layer.uvqk.bias, stack["_stu_layers.1._uvqk_beta"])


def test_gradients_reach_the_tables():
    layer = research_layer(research_weights(), H, DQK)
    x, offsets, times, next_times = batch()
    layer(x, offsets, timestamps=times, query_timestamps=next_times).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: research_layer({}, H, DQK), "state_dict: expected the names _uvqk, _o.weight, _o.bias, got none"),
        (lambda: research_layer(research_weights(_q=normal(1)), H, DQK), "state_dict: expected no other names .*_q"),
        (lambda: research_layer(research_weights(), 7, DQK), r"_uvqk: expected 2 \* 7 \* \(4 \+ Dv\) columns"),
        (
            lambda: research_layer(research_weights(**{"_o.weight": normal(E, 3 * H * DV)}), H, DQK),
            "_o.weight: expected a layer without concat_ua",
        ),
        (lambda: research_layer(research_weights(), H, DQK, linear_activation="relu"), "linear_activation: expected"),
        (
            lambda: research_layer({x: w for x, w in research_weights().items() if x[1] != "r"}, H, DQK),
            "max_seq_len: expected the padded length",
        ),
        (
            lambda: stu_layer({**stu_weights(False), "_output_weight": normal(5, E)}, H, DQK, max_seq_len=N),
            r"state_dict: [\s\S]*size mismatch for output.weight",
        ),
        (lambda: stu_layer(research_weights(), H, DQK, max_seq_len=N), "state_dict: expected the names _uvqk_weight"),
    ],
)
def test_what_does_not_fit_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
