"""HSTULayer and HSTU against their twins in plain PyTorch, and against the formula of the paper written out."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES
from checks import Errors
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from hstu_ops import HSTU, HSTULayer, RelativeAttentionBias, TimeBuckets, reference

LENGTHS = (20, 1, 0, 33, 7)
DIM, MAX_SEQ_LEN = 24, 33
PRODUCTION = dict(silu=(True, False, False, False), norm_affine=True, concat=True, uvqk_bias=True, output_bias=False)
VARIANTS = {
    "research": dict(alpha=1.0),
    "production": PRODUCTION,
    "production-per-head": dict(PRODUCTION, norm_per_head=True),
    "per-head": dict(norm_per_head=True),
    "affine": dict(norm_affine=True),
    "concat": dict(concat=True),
    "silu-q-k": dict(silu=(False, False, True, True)),
    "scale": dict(scale=0.3, eps=1e-3),
}
MASKS = {
    "causal": {},
    "targets": dict(num_targets=(5, 0, 0, 3, 7), target_group_size=2),
    "window": dict(max_attn_len=4, contextual_seq_len=3, min_full_attn_seq_len=5, global_prefix_len=2),
    "not-causal": dict(causal=False),
    "scale": dict(scale=0.1),
}


def build(kind, dtype=torch.float32, device="cpu", *, bias=False, dims=(6, 10), heads=3, layers=None, **options):
    """A layer (or a stack) with weights of the size that keeps every step at N(0, 1)."""
    rab = RelativeAttentionBias(MAX_SEQ_LEN, TimeBuckets.log()) if bias else None
    lead = () if layers is None else (layers,)
    module = kind(*lead, DIM, heads, *dims, max_seq_len=MAX_SEQ_LEN, relative_bias=rab, **options)
    gen = torch.Generator().manual_seed(1)
    for name, p in module.named_parameters():
        size = p.shape[1] ** -0.5 if p.dim() == 2 else 0.5
        mean = 1.0 if name.endswith("norm_weight") else 0.0
        p.data = mean + size * torch.randn(p.shape, generator=gen)
    return module.to(device=device, dtype=dtype)


def batch(dtype=torch.float32, device="cpu", *, seed=0, times=False, **masks):
    """Arguments of a layer's forward, by name."""
    gen = torch.Generator().manual_seed(seed)
    total = sum(LENGTHS)
    given = {k: torch.tensor(v, device=device) if isinstance(v, tuple) else v for k, v in masks.items()}
    if times:
        given["timestamps"] = ((torch.randn(total, generator=gen) * 2).exp() * 900).cumsum(0).long().to(device)
    x = torch.randn(total, DIM, generator=gen, dtype=torch.float64).to(device, dtype).requires_grad_()
    return dict(x=x, seq_offsets=torch.tensor((0, *LENGTHS), device=device).cumsum(0), **given)


def results(module, arguments):
    """Output and gradients of the input and of every parameter, by name."""
    gen = torch.Generator().manual_seed(5)
    x = arguments["x"]
    leaves = {"x": x, **dict(module.named_parameters())}
    out = module(**arguments)
    grad_out = torch.randn(out.shape, generator=gen, dtype=torch.float64).to(out)
    return {"out": out.detach(), **dict(zip(leaves, torch.autograd.grad(out, leaves.values(), grad_out), strict=True))}


def compare(options, masks, dtype, device, *, kind="HSTULayer", **more):
    """The rule of checks.check: what breaks it in one draw is measured over 16."""
    twin = getattr(reference, kind)
    ours = build(globals()[kind], dtype, device, **more, **options)
    plain, exact = build(twin, dtype, device, **more, **options), build(twin, torch.float64, **more, **options)
    plain.load_state_dict(ours.state_dict())
    exact.load_state_dict(ours.state_dict())
    errors = {}
    for draw in range(16):
        arguments = batch(dtype, device, seed=draw, times=more.get("bias", False), **masks)
        exactly = {k: v.detach().cpu() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        exactly["x"] = exactly["x"].double().requires_grad_()
        true = results(exact, exactly)
        for (name, got), other in zip(
            results(ours, arguments).items(), results(plain, arguments).values(), strict=True
        ):
            errors.setdefault(name, Errors(name)).add(got, other, true[name])
        if draw == 0 and not any(e.complaint() for e in errors.values()):
            return
    complaints = [e.complaint() for e in errors.values()]
    assert not any(complaints), "\n".join(filter(None, complaints))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda x: str(x).removeprefix("torch."))
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant, dtype, device):
    compare(VARIANTS[variant], MASKS["targets"], dtype, device, bias=True)


@pytest.mark.parametrize("masks", MASKS)
def test_masks(masks, device):
    compare({}, MASKS[masks], torch.float32, device)


def test_stack(device):
    compare({}, MASKS["targets"], torch.float32, device, kind="HSTU", layers=3, bias=True)


@pytest.mark.parametrize("training", (False, True), ids=("inference", "training"))
def test_stack_in_a_cuda_graph(training, device):
    """A step is captured once and replayed on other contents of its tensors."""
    if device == "cpu":
        pytest.skip("graphs are of GPUs")
    stack, given, other = (
        build(HSTU, torch.bfloat16, device, bias=True, dims=(8, 8), layers=2),
        batch(torch.bfloat16, device, times=True),
        batch(torch.bfloat16, device, times=True, seed=1),
    )

    grad_out = torch.ones_like(given["x"])

    def run(arguments):
        with torch.set_grad_enabled(training):
            out = stack(**arguments)
        leaves = [arguments["x"], *stack.parameters()]
        return [out.detach(), *(torch.autograd.grad(out, leaves, grad_out) if training else ())]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(given)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(given)
    want = [x.clone() for x in run(other)]
    with torch.no_grad():
        for name, x in other.items():
            given[name].copy_(x)
    graph.replay()
    for x, y in zip(captured, want, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2)
    assert torch.equal(captured[0], want[0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_formula(variant):
    """One sequence, the formula of the paper with nothing but torch."""
    o = dict(VARIANTS[variant])
    layer = build(HSTULayer, torch.float64, **o)
    p = dict(layer.named_parameters())
    heads, dim_qk, dim_v, n, eps = 3, 6, 10, 9, o.get("eps", 1e-6)
    x = torch.randn(n, DIM, dtype=torch.float64)

    normed = F.layer_norm(x, (DIM,), p.get("input_norm_weight"), p.get("input_norm_bias"), eps)
    projected = F.linear(normed, p["uvqk.weight"], p.get("uvqk.bias"))
    parts = projected.split((heads * dim_v, heads * dim_v, heads * dim_qk, heads * dim_qk), dim=1)
    u, v, q, k = (F.silu(t) if on else t for t, on in zip(parts, o.get("silu", (True,) * 4), strict=True))
    rows = []
    for head in range(heads):
        qk, vs = slice(head * dim_qk, (head + 1) * dim_qk), slice(head * dim_v, (head + 1) * dim_v)
        s = o.get("alpha", dim_qk**-0.5) * q[:, qk] @ k[:, qk].T
        rows.append(torch.tril(F.silu(s)) @ v[:, vs] * o.get("scale", 1 / MAX_SEQ_LEN))
    a = torch.cat(rows, dim=1)
    if o.get("norm_per_head"):
        norm = F.group_norm(a, heads, eps=eps)
        if o.get("norm_affine"):
            norm = norm * p["output_norm_weight"].repeat_interleave(dim_v)
            norm = norm + p["output_norm_bias"].repeat_interleave(dim_v)
    else:
        norm = F.layer_norm(a, (heads * dim_v,), p.get("output_norm_weight"), p.get("output_norm_bias"), eps)
    y = torch.cat([u, a, norm * u], dim=1) if o.get("concat") else norm * u
    want = x + F.linear(y, p["output.weight"], p.get("output.bias"))
    for module in (layer, build(reference.HSTULayer, torch.float64, **o)):
        torch.testing.assert_close(module(x, torch.tensor([0, n])), want, rtol=1e-10, atol=1e-10)


def test_swap_is_one_line(device):
    """A state dict of either fits the other, strictly, and gives the same results."""
    for options in (dict(), dict(bias=True, **PRODUCTION)):
        ours = build(HSTU, device=device, layers=2, **options)
        twin = build(reference.HSTU, device=device, layers=2, **options)
        for p in twin.parameters():
            p.data.zero_()
        twin.load_state_dict(ours.state_dict())
        arguments = batch(device=device, times=options.get("bias", False))
        torch.testing.assert_close(ours(**arguments), twin(**arguments))
        ours.load_state_dict(twin.state_dict())


def test_dropout_is_that_of_the_twin(device):
    ours, twin = (build(x, device=device, dropout=0.5) for x in (HSTULayer, reference.HSTULayer))
    arguments = batch(device=device)
    torch.manual_seed(3)
    got = ours(**arguments)
    torch.manual_seed(3)
    torch.testing.assert_close(got, twin(**arguments))
    assert not torch.equal(got, ours(**arguments))
    torch.testing.assert_close(ours.eval()(**arguments), build(HSTULayer, device=device)(**arguments))


_RECOMPUTE = ("norm", "projection", "silu", "attention")


@pytest.mark.parametrize(
    "recompute", [x for n in (1, 2, 4) for x in itertools.combinations(_RECOMPUTE, n)], ids="+".join
)
def test_recompute_gives_the_same_bits(recompute, device, deterministic):
    for options in (dict(bias=True, dropout=0.3), PRODUCTION):
        found = []
        for chosen in ((), recompute):
            layer = build(HSTULayer, device=device, recompute=chosen, **options)
            torch.manual_seed(0)
            found.append(results(layer, batch(device=device, times=True)))
        for name, want in found[0].items():
            assert torch.equal(want, found[1][name]), name


@pytest.mark.parametrize("recompute", [(), ("norm",), ("norm", "projection"), _RECOMPUTE], ids="+".join)
@pytest.mark.parametrize("changed", ["input", "input_norm_weight", "uvqk.weight"])
def test_changes_in_place_are_noticed(changed, recompute, device):
    layer = HSTULayer(16, 2, max_seq_len=8, norm_affine=True, recompute=recompute).to(device)
    leaf = torch.randn(5, 16, device=device, requires_grad=True)
    x = leaf * 1
    y = layer(x, torch.tensor([0, 5], device=device))
    with torch.no_grad():
        (x if changed == "input" else layer.get_parameter(changed)).mul_(2)
    with pytest.raises(RuntimeError, match=r"changed in place|modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("changed", ["input_norm_bias", "uvqk.bias"])
def test_changed_biases_are_noticed(changed, device):
    """No gradient needs their values, so that autograd does not keep them; what is computed again does."""
    layer = HSTULayer(16, 2, max_seq_len=8, norm_affine=True, uvqk_bias=True, recompute=_RECOMPUTE).to(device)
    y = layer(torch.randn(5, 16, device=device), torch.tensor([0, 5], device=device))
    with torch.no_grad():
        layer.get_parameter(changed).add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("recompute", "kept"),
    [((), 11), (("norm",), 10), (("norm", "silu"), 7), (("projection", "silu"), 3), (_RECOMPUTE, 2)],
    ids=str,
)
def test_memory_kept(recompute, kept, device):
    """Numbers kept a row for the backward pass, in multiples of the width; the input and small tensors included."""
    rows, width = 4096, 64
    layer = HSTULayer(width, 2, max_seq_len=64, recompute=recompute).to(device)
    x = torch.randn(rows, width, device=device, requires_grad=True)
    offsets = torch.arange(0, rows + 1, 64, device=device)
    with _Storages() as made:
        y = layer(x, offsets)
    assert y.grad_fn is not None
    alive = made.alive() - y.numel() * 4 + x.numel() * 4
    assert kept <= alive / (4 * rows * width) <= kept + 0.2


class _Storages(TorchDispatchMode):
    """The storages of all tensors made within it."""

    def __init__(self):
        super().__init__()
        self.made = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(result):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                self.made[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def alive(self):
        return sum(size for storage, size in self.made.values() if not storage.expired())


@pytest.mark.parametrize("recompute", [(), ("norm", "silu"), _RECOMPUTE], ids="+".join)
def test_autocast(recompute, device):
    """In bfloat16 with float32 parameters, as near to float32 as plain PyTorch is."""
    layer, twin = build(HSTULayer, device=device, recompute=recompute), build(reference.HSTULayer, device=device)
    arguments = batch(device=device)
    true = results(twin, arguments)
    with torch.autocast(device, torch.bfloat16):
        out = layer(**arguments), twin(**arguments)
    assert out[0].dtype == out[1].dtype == torch.float32
    leaves = [arguments["x"], *layer.parameters()], [arguments["x"], *twin.parameters()]
    for name, mine, other in zip(
        true, *((y, *torch.autograd.grad(y.sum(), x)) for y, x in zip(out, leaves, strict=True)), strict=True
    ):
        if name == "out":
            assert (mine - true[name]).norm() <= 2 * (other - true[name]).norm()
        else:
            assert mine.dtype == torch.float32
            torch.testing.assert_close(mine, other, rtol=0.05, atol=0.05 * other.abs().max().item())


def test_shared_and_own_bias(device):
    """One set of tables for all layers, or one a layer."""

    def make():
        return RelativeAttentionBias(MAX_SEQ_LEN)

    shared = HSTU(2, DIM, 3, max_seq_len=MAX_SEQ_LEN, relative_bias=make())
    own = HSTU(2, DIM, 3, max_seq_len=MAX_SEQ_LEN, relative_bias=make)
    assert "relative_bias.position_weight" in shared.state_dict()
    assert {f"layers.{i}.relative_bias.position_weight" for i in (0, 1)} <= own.state_dict().keys()
    own.load_state_dict(shared.state_dict(), strict=False)
    for layer in own.layers:
        layer.relative_bias.load_state_dict(shared.relative_bias.state_dict())
    shared, own, arguments = shared.to(device), own.to(device), batch(device=device)
    torch.testing.assert_close(shared(**arguments), own(**arguments))


def test_nested_tensors(device):
    stack = build(HSTU, device=device, layers=2, bias=True)
    given = batch(device=device, times=True, num_targets=(2, 1, 0, 3, 0))
    want = stack(**given)
    x, offsets, times = given.pop("x"), given.pop("seq_offsets"), given.pop("timestamps")
    nested = torch.nested.nested_tensor_from_jagged(x, offsets)
    for module, out in ((stack, want), (stack.layers[0], None)):
        bias = stack.relative_bias(times) if module is not stack else None
        got = module(nested, timestamps=torch.nested.nested_tensor_from_jagged(times, offsets), bias=bias, **given)
        assert torch.equal(got.offsets(), offsets)
        if out is not None:
            assert torch.equal(got.values(), out)
    twin = reference.HSTULayer(DIM, 2, max_seq_len=MAX_SEQ_LEN).to(device)
    assert torch.equal(twin(nested, **given).values(), twin(x, offsets, **given))
    for module in (stack, twin):
        with pytest.raises(ValueError, match="seq_offsets"):
            module(nested, offsets)


def test_empty_batch(device):
    for recompute in ((), _RECOMPUTE):
        layer = build(HSTULayer, device=device, recompute=recompute)
        x = torch.randn(0, DIM, device=device, requires_grad=True)
        layer(x, torch.zeros(3, dtype=torch.int64, device=device)).sum().backward()
        assert x.grad.shape == (0, DIM)


@pytest.mark.parametrize("recompute", [(), _RECOMPUTE], ids="+".join)
def test_no_graph_breaks(recompute):
    stack = build(HSTU, layers=2, bias=True, recompute=recompute)
    arguments = batch(times=True)
    compiled = torch.compile(stack, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(compiled, arguments)["out"], results(stack, arguments)["out"])


def test_one_head_has_one_weight(device):
    layer = HSTULayer(8, 1, max_seq_len=4, norm_per_head=True, norm_affine=True).to(device)
    plain = reference.HSTULayer(8, 1, max_seq_len=4, norm_per_head=True, norm_affine=True).to(device)
    plain.load_state_dict(layer.state_dict())
    x, offsets = torch.randn(4, 8, device=device), torch.tensor([0, 4], device=device)
    torch.testing.assert_close(layer(x, offsets), plain(x, offsets))


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("dim_qk", lambda: HSTULayer(10, 3, max_seq_len=5)),
        ("num_heads", lambda: HSTULayer(10, 0, max_seq_len=5)),
        ("max_seq_len", lambda: HSTULayer(10, 2, max_seq_len=0)),
        ("recompute", lambda: HSTULayer(10, 2, max_seq_len=5, recompute="everything")),
        ("num_layers", lambda: HSTU(0, 10, 2, max_seq_len=5)),
        ("x", lambda: HSTULayer(10, 2, max_seq_len=5)(torch.randn(3, 11), torch.tensor([0, 3]))),
        ("bias", lambda: build(HSTULayer, bias=True)(**batch(times=True), bias=torch.zeros(1, 1, 33, 33))),
        ("bias", lambda: build(HSTU, layers=1, bias=True)(**batch(times=True), bias=torch.zeros(1, 1, 33, 33))),
        ("timestamps", lambda: build(HSTULayer, bias=True)(**batch())),
        ("num_targets", lambda: build(HSTULayer)(**batch(num_targets=(1, 2)))),
        ("seq_offsets", lambda: build(HSTULayer)(torch.randn(3, DIM))),
    ],
)
def test_errors_name_the_argument(name, call):
    with pytest.raises((ValueError, TypeError), match=name):
        call()
