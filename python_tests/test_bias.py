"""Time buckets equal their published expressions bit for bit; tables, their module and their gradients."""

import copy
from dataclasses import replace

import pytest
import torch
from cases import CROWDED, Case, make
from checks import check, forward_backward

from hstu_ops import RelativeAttentionBias, RelativeBias, TimeBuckets, hstu_attention, reference


def _differences(buckets: TimeBuckets) -> torch.Tensor:
    """Integers where a bucketing could go wrong: around every boundary, small, negative and spread over int64."""
    edges = buckets.boundaries
    steps = torch.arange(-300, 301)
    near = (edges[:, None] + steps).flatten()
    close = torch.cat(
        [(edges.double() * (1 + x * 2.0**-24)).long() for x in range(-20, 21)]
    )  # the next float32 numbers
    spread = (torch.rand(200_000, dtype=torch.float64) * 43.6).exp().long()
    return torch.cat([near, close, spread, -spread, torch.arange(-10, 100_000)])


def test_log_is_the_published_expression():
    buckets = TimeBuckets.log()
    d = _differences(buckets)
    assert len(buckets.boundaries) == 128
    assert torch.equal(buckets(d), (torch.log(d.clamp(min=1)) / 0.301).long().clamp(0, 128))


@pytest.mark.parametrize(("num_buckets", "divisor"), [(1, 0.301), (20, 1.0), (64, 0.5), (200, 0.1)])
def test_log_options(num_buckets, divisor):
    buckets = TimeBuckets.log(num_buckets, divisor)
    d = _differences(buckets)
    assert torch.equal(buckets(d), (torch.log(d.clamp(min=1)) / divisor).long().clamp(0, num_buckets))


@pytest.mark.parametrize(
    ("num_buckets", "unit", "divisor"), [(2048, 60.0, 1.0), (2048, 60_000.0, 1.0), (100, 1.0, 0.7)]
)
def test_sqrt_is_the_published_expression(num_buckets, unit, divisor):
    buckets = TimeBuckets.sqrt(num_buckets, unit, divisor)
    d = _differences(buckets)
    assert torch.equal(buckets(d), (torch.sqrt(d.clamp(min=1e-6) / unit) / divisor).long().clamp(0, num_buckets))


def test_sqrt_defaults_are_minutes():
    assert TimeBuckets.sqrt().boundaries[:3].tolist() == [60, 240, 540]


@pytest.mark.parametrize("given", [[5, 5, 7], torch.tensor([5, 5, 7]), torch.tensor([5, 5, 7], dtype=torch.int32)])
def test_from_boundaries(given):
    buckets = TimeBuckets.from_boundaries(given)
    assert buckets(torch.tensor([-9, 4, 5, 6, 7, 8])).tolist() == [0, 0, 2, 2, 3, 3]


def test_no_boundaries():
    assert TimeBuckets.from_boundaries([])(torch.tensor([1, 2])).tolist() == [0, 0]


def test_buckets_are_not_shared():
    """Writing into one TimeBuckets leaves those made later alone."""
    TimeBuckets.log().boundaries.zero_()
    assert TimeBuckets.log().boundaries[-1] > 10**16


@pytest.mark.parametrize(
    ("make_bad", "error", "message"),
    [
        (lambda: TimeBuckets.from_boundaries([3, 1]), ValueError, "boundaries: expected values that never fall"),
        (lambda: TimeBuckets.from_boundaries([[1], [2]]), ValueError, "boundaries: expected one dimension"),
        (lambda: TimeBuckets.from_boundaries([1.5, 2.5]), TypeError, "boundaries: expected integers"),
        (lambda: TimeBuckets.log(0), ValueError, "num_buckets: expected at least 1"),
        (lambda: TimeBuckets.log(divisor=0.0), ValueError, "divisor: expected a positive number"),
        (lambda: TimeBuckets.sqrt(units_per_increment=-1.0), ValueError, "units_per_increment: expected a positive"),
        (lambda: RelativeAttentionBias(0), ValueError, "max_seq_len: expected at least 1"),
        (lambda: RelativeAttentionBias(5, position=False), ValueError, "buckets: expected TimeBuckets"),
        (
            lambda: RelativeAttentionBias(5, torch.tensor([1, 2])),
            TypeError,
            "buckets: expected TimeBuckets, got Tensor",
        ),
        (lambda: RelativeAttentionBias(5.5), TypeError, "max_seq_len: expected an int, got float"),
    ],
)
def test_errors(make_bad, error, message):
    with pytest.raises(error, match=message):
        make_bad()


def test_module_tables():
    rab = RelativeAttentionBias(200, TimeBuckets.log())
    assert {x: tuple(w.shape) for x, w in rab.named_parameters()} == {"position_weight": (399,), "time_weight": (129,)}
    assert 0.015 < rab.position_weight.std() < 0.025
    assert set(rab.state_dict()) == {"position_weight", "time_weight"}
    per_head = RelativeAttentionBias(200, TimeBuckets.log(), num_heads=4)
    assert per_head.position_weight.shape == (4, 399) and per_head.time_weight.shape == (4, 129)
    assert RelativeAttentionBias(7).time_weight is None
    assert RelativeAttentionBias(7, TimeBuckets.log(), position=False).position_weight is None
    assert torch.equal(copy.deepcopy(rab).boundaries, rab.boundaries)


def test_module_on_a_device(device):
    torch.use_deterministic_algorithms(True)  # new memory is then filled with what nobody wants
    made = RelativeAttentionBias(7, TimeBuckets.log(), device=device)
    moved = RelativeAttentionBias(7, TimeBuckets.log()).to(device)
    with torch.device("meta"):  # as large models are made: parameters come from a checkpoint, the buffer from nowhere
        empty = RelativeAttentionBias(7, TimeBuckets.log())
    empty = empty.to_empty(device=device)
    empty.load_state_dict(made.state_dict())
    for rab in (made, moved, empty):
        assert {x.device.type for x in (*rab.parameters(), *rab.buffers())} == {torch.device(device).type}
        assert rab.boundaries.tolist() == TimeBuckets.log().boundaries.tolist()


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("options", [{}, {"num_heads": 2}, {"position": False}])
def test_module_trains(options, device):
    """Tables learn through the op: the module's gradients are those of a RelativeBias given directly."""
    inputs = make(Case("", (30, 50), bias="position+time", query_timestamps=True), device=device)
    times, query_times = inputs.options["bias"].timestamps, inputs.options["bias"].query_timestamps
    rab = RelativeAttentionBias(50, TimeBuckets.log(), device=device, **options)
    inputs.call(hstu_attention, bias=rab(times, query_times)).square().sum().backward()
    tables = {x: w.detach().clone().requires_grad_() for x, w in rab.named_parameters()}
    direct = RelativeBias(
        **tables, timestamps=times, query_timestamps=query_times, buckets=TimeBuckets.log().to(device)
    )
    inputs.call(hstu_attention, bias=direct).square().sum().backward()
    for name, weight in rab.named_parameters():
        assert (weight.grad != 0).any() and torch.equal(weight.grad, tables[name].grad)


@pytest.mark.usefixtures("deterministic")
def test_tables_of_another_type(device):
    """bfloat16 tables are used as float32, and their gradient comes back in their own type."""
    inputs = make(Case("", (30, 50), bias="position+time"), device=device)
    low = inputs.with_leaves({x: t.bfloat16() if "weight" in x else t for x, t in inputs.leaves.items()})
    low = low.with_leaves({x: t.detach().requires_grad_() for x, t in low.leaves.items()})
    same = low.with_leaves({x: t.detach().float().requires_grad_() for x, t in low.leaves.items()})
    assert torch.equal(low.call(hstu_attention), same.call(hstu_attention))
    for x, y in zip(low.leaves.items(), same.leaves.items(), strict=True):
        got, want = (torch.autograd.grad(i.call(hstu_attention).sum(), t)[0] for i, t in ((low, x[1]), (same, y[1])))
        assert got.dtype == x[1].dtype and torch.equal(got, want.to(got.dtype))


@pytest.mark.parametrize("per_head", (False, True))
@pytest.mark.parametrize("order", ("shuffled", "falling", "equal", "far"))
def test_times_in_any_order(order, per_head, device64):
    """Rising timestamps are the usual case, not a condition: buckets are right for any."""
    bias = "position/head+time/head" if per_head else "position+time"
    inputs = make(Case("", (150, 7, 90), bias=bias, num_targets=(9, 0, 3)), torch.float64, device64)
    times = inputs.options["bias"].timestamps
    times = {
        "shuffled": times[torch.randperm(len(times)).to(device64)],
        "falling": times.flip(0),
        "equal": torch.full_like(times, 7),
        "far": torch.where(torch.rand(len(times)).to(device64) < 0.1, times + 2**50, times),
    }[order]
    inputs.options["bias"] = replace(inputs.options["bias"], timestamps=times)
    grad_out = torch.randn(len(inputs.q), 2, 32, dtype=torch.float64).to(device64)
    got = forward_backward(hstu_attention, inputs, grad_out)
    want = forward_backward(reference.hstu_attention, inputs, grad_out)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-10, atol=1e-10)


_TIMES = {
    "rising": lambda t: t,
    "milliseconds": lambda t: 1000 * t,
    "microseconds": lambda t: 1_000_000 * t,
    "equal": lambda t: torch.full_like(t, 7),
    "ties": lambda t: t // 20_000 * 20_000,
    "falling": lambda t: t.flip(0),
    "shuffled": lambda t: t[torch.randperm(len(t), generator=torch.Generator().manual_seed(0)).to(t.device)],
    "one astray": lambda t: torch.where(torch.arange(len(t), device=t.device) == 300, t - 10**6, t),
    "far": lambda t: torch.where(torch.arange(len(t), device=t.device) % 100 > 90, t + 2**50, t),
    "at the end": lambda t: torch.where(torch.arange(len(t), device=t.device) > 250, t + 2**62, t),
}


def _change_times(kind):
    def change(inputs):
        given = inputs.options["bias"]
        inputs.options["bias"] = replace(given, timestamps=_TIMES[kind](given.timestamps))

    return change


@pytest.mark.parametrize("kind", _TIMES)
def test_many_tiles(kind, dtype, device):
    """Sequences of many tiles: those of one bucket, of few and of many, which kernels treat differently."""

    if dtype != torch.float64:
        check(Case(kind, (400, 93), bias="position+time/head"), dtype, device, change=_change_times(kind))


_TABLES = {
    "sqrt": TimeBuckets.sqrt(),
    "even": TimeBuckets.from_boundaries(range(-1000, 4_000_000, 2000)),
    "uneven": TimeBuckets.from_boundaries([x + x * 7919 % 61 for x in range(10, 3_000_000, 9000)]),
    "bunches": TimeBuckets.from_boundaries([x + i for x in range(0, 2_000_000, 50_000) for i in range(5)]),
    "repeated": TimeBuckets.from_boundaries([x for x in range(-5, 2_000_000, 40_000) for _ in range(4)]),
    "one for all": TimeBuckets.from_boundaries([86_400] * 200),
    "fine": TimeBuckets.from_boundaries(range(0, 240_000, 300)),  # a thousand cells within one tile
}


def _with_buckets(bias, buckets, *heads):
    """Other buckets and weights for them."""
    gen = torch.Generator().manual_seed(7)
    weight = torch.randn(*heads, len(buckets.boundaries) + 1, generator=gen, dtype=torch.float64)
    weight = weight.to(bias.time_weight).requires_grad_()
    return replace(bias, buckets=buckets.to(weight.device), time_weight=weight)


@pytest.mark.parametrize(
    ("kind", "heads", "dim"),
    [
        ("rising", (2,), 64),
        ("rising", (), 64),
        ("rising", (), 128),
        ("rising", (), 256),
        ("rising", (2,), 256),
        ("milliseconds", (), 64),
        ("shuffled", (), 64),
        ("ties", (2,), 64),
    ],
)
@pytest.mark.parametrize("table", _TABLES)
def test_many_buckets(table, kind, heads, dim, dtype, device):
    """More boundaries than a logarithm has, as dense and as uneven as they like; a table a head, or one for all."""

    def change(inputs):
        bias = _with_buckets(inputs.options["bias"], _TABLES[table], *heads)
        inputs.options["bias"] = replace(bias, timestamps=_TIMES[kind](bias.timestamps))

    if dtype != torch.float64:
        check(Case(table, (400, 93), bias="position+time", dim_qk=dim, dim_v=dim), dtype, device, change=change)


@pytest.mark.parametrize("heads", ((), (2,)), ids=("shared", "a table a head, frozen"))
@pytest.mark.parametrize("dim", (64, 128, 256))
def test_decades(dim, heads, dtype, device):
    """Long histories reach far back: where buckets are looked up depends on both."""

    def change(inputs):
        bias = inputs.options["bias"]
        bias = replace(_with_buckets(bias, _TABLES["sqrt"], *heads), timestamps=16 * bias.timestamps)
        inputs.options["bias"] = replace(bias, time_weight=bias.time_weight.detach().requires_grad_(not heads))

    if dtype != torch.float64:
        case = Case("long", (4100,), queries=(70,), bias="position+time", dim_qk=dim, dim_v=dim)
        check(case, dtype, device, change=change)


@pytest.mark.parametrize(
    ("kind", "case"),
    [("rising", x) for x in CROWDED] + [("shuffled", x) for x in CROWDED if x.name in ("causal", "many")],
    ids=lambda x: x.name if isinstance(x, Case) else x,
)
def test_many_sequences(kind, case, dtype, device):
    """Enough of them that kernels may take several heads that share tables together."""

    def change(inputs):
        given = inputs.options["bias"]
        if getattr(given, "timestamps", None) is not None:
            inputs.options["bias"] = replace(given, timestamps=_TIMES[kind](given.timestamps))

    if dtype != torch.float64:
        check(case, dtype, device, change=change)


@pytest.mark.parametrize("bias", ("position+time", "position+time/sqrt"))
@pytest.mark.parametrize("dim", (64, 128, 256))
def test_heads_one_by_one(dim, bias, dtype, device):
    """Heads give what each gives by itself, at a size that keeps a GPU busy and lets it take heads together: only there
    it shows if a kernel reads what is prepared of a bias before it is there."""
    lengths = (1024,) * 72 if device.startswith("cuda") else (70, 33)
    inputs = make(Case("busy", lengths, heads=4, bias=bias, dim_qk=dim, dim_v=dim), dtype, device, grad=False)
    together = inputs.call(hstu_attention).double()
    heads = [[t[:, h : h + 1] for t in (inputs.q, inputs.k, inputs.v)] for h in range(4)]
    apart = torch.cat([replace(inputs, q=q, k=k, v=v).call(hstu_attention) for q, k, v in heads], 1).double()
    assert (together - apart).norm() <= 0.25 * torch.finfo(dtype).eps * apart.norm()


_LONG = {
    "plain": {},
    "targets": {"num_targets": (30, 0), "target_group_size": 3, "contextual_seq_len": 9},
    "window": {"max_attn_len": 300, "global_prefix_len": 40},
    "not causal": {"causal": False, "scale": "row"},
    "times of queries": {"query_timestamps": True, "scale": "sequence"},
    "few positions": {"positions": 100},
    "longer than said": {"max_seq_len": 1000},
}


def _check_long(bias, dim, dtype, device, *, change=lambda inputs: None, fewer=True, **options):
    """Sequences that on a GPU are long enough for kernels of their own. With fewer queries, or plain PyTorch, which
    adds one element after the other to an entry of a table, would take long."""
    if dtype == torch.float64:
        return
    long = device.startswith("cuda")
    if fewer:
        options["queries"] = (300, 70) if long else (60, 30)
    case = Case("long", (2300, 1900) if long else (170, 90), bias=bias, dim_qk=dim, dim_v=dim, **options)
    check(case, dtype, device, change=change)


@pytest.mark.parametrize(
    ("options", "dim", "bias"),
    [(x, *y) for x in _LONG for y in ((64, "position"), (128, "position+time"))]
    + [("plain", 64, "position/head"), ("plain", 128, "position"), ("plain", 128, "position/head+time/head")],
)
def test_long_sequences(options, dim, bias, dtype, device):
    """Where gradients of the tables may be summed beside the others: positions at any dimension, times at 128."""
    options = {x: y for x, y in _LONG[options].items() if x != "query_timestamps" or "time" in bias}
    _check_long(bias, dim, dtype, device, **options)


def test_whole_long_sequences(dtype, device):
    _check_long("position+time", 128, dtype, device, fewer=False)


@pytest.mark.parametrize("kind", _TIMES)
def test_times_of_long_sequences(kind, dtype, device):
    """Times that rise, fall or stand still, near and far, where a key's buckets are followed from query to query."""
    _check_long("time", 120, dtype, device, change=_change_times(kind))


_FEW_BOUNDARIES = {
    "bunches": TimeBuckets(_TABLES["bunches"].boundaries[:128]),
    "repeated": TimeBuckets(_TABLES["repeated"].boundaries[:128]),
    "one": TimeBuckets.from_boundaries([86_400]),
    "hours": TimeBuckets.from_boundaries([3600 * i for i in range(1, 129)]),
    "none": TimeBuckets.from_boundaries([]),
}


@pytest.mark.parametrize("table", _FEW_BOUNDARIES)
def test_tables_of_long_sequences(table, dtype, device):
    """Equal boundaries, boundaries close together, one, none at all, and gaps that are on them."""

    def change(inputs):
        bias = _with_buckets(inputs.options["bias"], _FEW_BOUNDARIES[table])
        if table in ("one", "hours"):
            bias = replace(bias, timestamps=bias.timestamps // 3600 * 3600)
        inputs.options["bias"] = bias

    _check_long("position+time", 128, dtype, device, change=change)


_ORDERED = ("targets-contextual", "queries", "wide", "many", "widest")


@pytest.mark.parametrize("case", [x for x in CROWDED if x.name in _ORDERED], ids=str)
def test_deterministic_mode(case, dtype, device):
    """Other kernels may run in deterministic mode; their results obey the rule as well."""
    torch.use_deterministic_algorithms(True)
    if dtype != torch.float64:
        check(case, dtype, device)


@pytest.mark.parametrize(("table", "dim", "longest"), [("log", 64, 400), ("sqrt", 64, 400), ("log", 128, 4100)])
def test_nan_reaches_the_tables(table, dim, longest, dtype, device):
    """The gradients of all entries that a NaN row reads are NaN: none of it is lost on the way."""
    inputs = make(Case("nan", (longest, 93), bias="position+time", dim_qk=dim, dim_v=dim), dtype, device)
    if table == "sqrt":
        inputs.options["bias"] = _with_buckets(inputs.options["bias"], _TABLES["sqrt"])
    row, bias = 201, inputs.options["bias"]
    with torch.no_grad():
        inputs.q[row, 1, 3] = float("nan")
    grads = forward_backward(hstu_attention, inputs, torch.randn(inputs.v.shape).to(inputs.v))
    keys = torch.arange(row + 1, device=device)
    assert grads["position_weight"][keys - row + inputs.max_seq_len - 1].isnan().all()
    assert grads["time_weight"][bias.buckets(bias.timestamps[row] - bias.timestamps[keys])].isnan().all()


@pytest.mark.parametrize("wanted", ([], ["position_weight"], ["time_weight"]), ids=("neither", "position", "time"))
@pytest.mark.parametrize("dim", (64, 128, 256))
@pytest.mark.parametrize("table", ("log", "sqrt"))
def test_frozen_tables(table, dim, wanted, dtype, device):
    """Which kernels run depends on whose gradients are wanted; those that are obey the rule all the same."""

    def change(inputs):
        bias = inputs.options["bias"]
        if table == "sqrt":
            bias = _with_buckets(bias, _TABLES["sqrt"])
        bias = replace(
            bias,
            **{x: getattr(bias, x).detach().requires_grad_(x in wanted) for x in ("position_weight", "time_weight")},
        )
        inputs.options["bias"] = bias

    if dtype != torch.float64:
        case = Case("frozen", (400, 93), bias="position+time", dim_qk=dim, dim_v=dim, num_targets=(30, 0))
        check(case, dtype, device, change=change)


@pytest.mark.parametrize("dim", (64, 128, 256))
@pytest.mark.parametrize("deterministic", (False, True))
def test_least_number_as_a_mask(deterministic, dim, dtype, device):
    """A dense bias of the most negative number takes an element away, as any large negative one does."""
    torch.use_deterministic_algorithms(deterministic)

    def run(least):
        inputs = make(Case("mask", (150, 37), bias="dense", dim_qk=dim, dim_v=dim), dtype, device)
        bias = inputs.options["bias"]
        with torch.no_grad():
            bias[..., ::3] = torch.finfo(bias.dtype).min if least else -1e4
        return forward_backward(hstu_attention, inputs, torch.ones_like(inputs.v))

    got, want = run(True), run(False)
    for name in want:
        assert want[name].isfinite().all(), name
        # The gradient of q may be added up in any order outside deterministic mode.
        exact = {} if name == "q" and not deterministic else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(got[name], want[name], **exact)


def test_extreme_times(device):
    """Gaps of any size and sign choose the end buckets; reading outside the table is impossible."""
    times = torch.tensor([0, 2**62, -(2**62), 5, 2**40], device=device)
    weight = torch.zeros(4, device=device)
    bias = RelativeBias(None, weight, times, None, TimeBuckets.from_boundaries([0, 10, 2**50]).to(device))
    x = torch.ones(5, 1, 4, device=device)
    offsets = torch.tensor([0, 5], device=device)
    assert torch.equal(hstu_attention(x, x, x, offsets, 5, bias=bias), hstu_attention(x, x, x, offsets, 5))


@pytest.mark.parametrize("name", ["position_weight", "time_weight", "bias"])
def test_expanded_entries_share_a_gradient(name, device64):
    """The same memory for all heads and sequences: its gradient is the sum of theirs."""
    case = Case("expanded", (5, 9), heads=3, bias="dense" if name == "bias" else "position+time")
    inputs = make(case, torch.float64, device64)
    size = inputs.leaves[name].shape[-2:] if name == "bias" else inputs.leaves[name].shape[-1:]
    shape = (2, 3, *size) if name == "bias" else (3, *size)
    shared = torch.randn(size, dtype=torch.float64, device=device64)

    def grad(attention):
        leaf = shared.clone().requires_grad_()
        with_expanded = inputs.with_leaves({**inputs.leaves, name: leaf.expand(shape)})
        return torch.autograd.grad(with_expanded.call(attention).square().sum(), leaf)[0]

    torch.testing.assert_close(grad(hstu_attention), grad(reference.hstu_attention), rtol=1e-12, atol=1e-12)
