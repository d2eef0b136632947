"""layer_norm, silu_split, norm_gate and layer_core: against plain PyTorch, and what torch asks of ops."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

import pytest
import torch
from cases import SMALL, Case, make
from checks import Errors
from torch import Tensor

import hstu_ops
from hstu_ops import RelativeBias, reference

ops = torch.ops.hstu_ops

SHAPES = [  # rows, columns, groups
    *((100, 64, 1), (33, 512, 1), (70, 512, 8), (20, 96, 3), (9, 1024, 2), (300, 8, 2), (1, 16, 1), (41, 272, 17)),
    *((70, 1024, 1), (33, 2048, 2)),
    *((17, 50, 1), (31, 75, 3), (9, 7, 7), (64, 1, 1), (5, 3000, 1), (3, 4104, 1), (4, 9001, 1), (3, 6000, 2)),
]
AFFINE = ("none", "weight", "bias", "both")
_shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda x: "x".join(map(str, x)))


def normal(*shape: int, seed: int = 0, dtype=torch.float32, device: str = "cpu") -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=gen, dtype=torch.float64).to(device=device, dtype=dtype)


@dataclass
class Call:
    """A function of hstu_ops by name, its tensors by name and its options."""

    name: str
    tensors: dict[str, Tensor]
    options: dict

    def run(self, module, tensors: dict[str, Tensor] | None = None) -> tuple[Tensor, ...]:
        out = getattr(module, self.name)(**(tensors or self.tensors), **self.options)
        return out if isinstance(out, tuple) else (out,)

    def gradients(self, module, wide: bool = False) -> dict[str, Tensor]:
        """Results and the gradients of every tensor; in float64 if `wide`."""
        tensors = {x: (t.double() if wide else t).detach().requires_grad_() for x, t in self.tensors.items()}
        out = self.run(module, tensors)
        grads = [normal(*x.shape, seed=7 + i).to(x) for i, x in enumerate(out)]
        found = torch.autograd.grad(out, list(tensors.values()), grads)
        return {"out": torch.cat([x.flatten() for x in out]).detach(), **dict(zip(tensors, found, strict=True))}


def check(make_call) -> None:
    """The rule of checks.py; what breaks it in one draw is measured over 16."""
    errors: dict[str, Errors] = {}
    for draw in range(16):
        call = make_call(draw)
        got, plain = call.gradients(hstu_ops), call.gradients(reference)
        if got["out"].dtype == torch.float64:  # plain PyTorch is as exact as this gets
            for name in got:
                torch.testing.assert_close(got[name], plain[name], rtol=1e-12, atol=1e-12)
            return
        true = call.gradients(reference, wide=True)
        for name in got:
            errors.setdefault(name, Errors(name)).add(got[name], plain[name], true[name])
        complaints = [x for x in (e.complaint() for e in errors.values()) if x]
        if not complaints:
            return
    raise AssertionError(complaints)


def affine(kind: str, columns: int, dtype, device, seed: int = 0) -> dict[str, Tensor]:
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    names = {"none": (), "weight": ("weight",), "bias": ("bias",), "both": ("weight", "bias")}[kind]
    return {x: normal(columns, seed=seed + i, dtype=dtype, device=device) for i, x in enumerate(names)}


def gate_call(shape, dtype, device, draw=0, kind="both", strided=False, per_group=False, **options) -> Call:
    rows, columns, groups = shape
    if strided:  # slices of one projection
        x = normal(rows, 3 * columns, seed=draw, dtype=dtype, device=device)
        a, u = x[:, columns : 2 * columns], x[:, :columns]
    else:
        a, u = (normal(rows, columns, seed=draw + i, dtype=dtype, device=device) for i in range(2))
    tables = affine(kind, groups if per_group else columns, dtype, device, draw + 5)
    return Call("norm_gate", {"a": a, "u": u, **tables}, {"groups": groups, **options})


# ---- what is computed ----------------------------------------------------------------------------------------


@_shapes
@pytest.mark.parametrize("kind", ("none", "both"))
def test_layer_norm(shape, kind, device, dtype):
    rows, columns, _ = shape

    def call(draw):
        x = normal(rows, columns, seed=draw, dtype=dtype, device=device)
        return Call("layer_norm", {"x": x, **affine(kind, columns, dtype, device, draw + 50)}, {})

    check(call)


GATES = {
    "plain": {"kind": "none"},
    "affine": {},
    "dropout": {"dropout": 0.3, "seed": 1234},
    "concat": {"dropout": 0.1, "seed": 5, "concat": True},
}


@_shapes
@pytest.mark.parametrize("gate", GATES)
def test_norm_gate(shape, gate, device, dtype):
    check(lambda draw: gate_call(shape, dtype, device, draw, **GATES[gate]))


@pytest.mark.parametrize("kind", AFFINE)
@pytest.mark.parametrize("shape", ((70, 512, 8), (31, 75, 3)), ids=str)
def test_norm_gate_of_slices(shape, kind, device, dtype):
    check(lambda draw: gate_call(shape, dtype, device, draw, kind=kind, strided=True, per_group=True))


SPLITS = [
    ((64, 64, 32, 32), 40),
    ((16, 16, 16, 16), 3),
    ((7, 5, 3, 1), 20),
    ((0, 24, 8, 0), 9),
    ((512, 512, 96, 96), 33),
]
SILU = [(True,) * 4, (True, False, False, False), (False, True, False, True), (False,) * 4]


@pytest.mark.parametrize("silu", SILU, ids=lambda x: "".join("01"[y] for y in x))
@pytest.mark.parametrize(("sizes", "rows"), SPLITS, ids=str)
@pytest.mark.parametrize("strided", (False, True), ids=("whole", "strided"))
def test_silu_split(sizes, rows, silu, strided, device, dtype):
    def call(draw):
        x = normal(rows, sum(sizes) + 8 * strided, seed=draw, dtype=dtype, device=device)[:, : sum(sizes)]
        return Call("silu_split", {"uvqk": 3 * x}, {"sizes": sizes, "silu": silu})

    check(call)


def test_silu_split_gives_views_of_one_tensor(device):
    parts = hstu_ops.silu_split(normal(5, 24, device=device).requires_grad_(), (8, 8, 4, 4))
    assert [x.storage_offset() for x in parts] == [0, 8, 16, 20]
    assert len({x.untyped_storage().data_ptr() for x in parts}) == 1


def test_silu_split_takes_any_gradients(device):
    """Slices of one tensor, tensors of their own, expanded ones and none at all give the same."""
    x = normal(6, 24, device=device).requires_grad_()
    whole = normal(6, 24, seed=1, device=device)
    slices = whole.split((8, 8, 4, 4), dim=1)
    want = torch.autograd.grad(hstu_ops.silu_split(x, (8, 8, 4, 4)), x, slices)[0]
    got = torch.autograd.grad(hstu_ops.silu_split(x, (8, 8, 4, 4)), x, [y.clone() for y in slices])[0]
    assert torch.equal(got, want)
    u, _, _, k = hstu_ops.silu_split(x, (8, 8, 4, 4))
    (got,) = torch.autograd.grad(u.sum() + (k * slices[3]).sum(), x)
    assert torch.equal(got[:, 20:], want[:, 20:]) and not got[:, 8:20].any() and got[:, :8].all()


# ---- dropout -------------------------------------------------------------------------------------------------


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-7 in Python's integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(7):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 % 2**32, p0 >> 32 ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def test_known_words_of_the_generator():
    """The counter 0 with the key 0, as its authors publish it, and what dropout makes of the generator."""
    assert philox([0, 0, 0, 0], [0, 0]) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    seed, row, column, section = 0x123456789ABCDEF, 5, 19, 1
    state = philox([0, 0, 0, 0], [seed % 2**32, seed >> 32])
    words = philox([x ^ y for x, y in zip(state, (row, 0, column // 8, section), strict=True)], [0, 0])
    number = words[column % 8 // 2] >> 16 * (column % 2) & 0x7FFF
    kept, dropped = (
        reference.dropout_mask(seed, x / 2**15, row + 1, 24, section)[row, column] for x in (number, number + 1)
    )
    assert kept and not dropped


def test_dropout_masks_are_independent():
    """Of seeds, rows, columns and sections next to each other, and of numbers of a word."""
    draws = [reference.dropout_mask(x, 0.5, 512, 512, section) for x in (0, 1, 2**32) for section in range(3)]
    masks = torch.stack(draws).double() * 2 - 1
    rows, columns = masks, masks.transpose(1, 2)
    bound = 5 * (512 * 512) ** -0.5  # of the mean of so many signs
    assert (masks.mean((1, 2)).abs() < bound).all()
    for distance in (1, 2, 3, 4, 7, 8, 16, 64, 256):
        for lines in (rows, columns):
            assert ((lines[:, :-distance] * lines[:, distance:]).mean((1, 2)).abs() < 1.5 * bound).all()
    flat = masks.flatten(1)
    among = flat @ flat.T / flat.shape[1]
    assert ((among - torch.eye(len(flat), dtype=among.dtype)).abs() < bound).all()
    # Rows against rows, and columns against columns: the largest of many correlations of 512 signs.
    for lines in (masks[0], masks[0].T):
        found = lines @ lines.T / 512
        assert (found - torch.eye(512, dtype=found.dtype)).abs().max() < 6.5 * 512**-0.5


@pytest.mark.parametrize("columns", (8, 50, 513))
@pytest.mark.parametrize("seed", (0, -1, 2**63 + 5, 123456789012345))
def test_dropout_follows_from_the_seed(columns, seed, device):
    """The elements that plain PyTorch drops, in all three sections, and in the gradients."""
    a, u = normal(37, columns, device=device).requires_grad_(), torch.ones(37, columns, device=device)
    out = hstu_ops.norm_gate(a, u, dropout=0.25, seed=seed, concat=True)
    keep = torch.cat([reference.dropout_mask(seed, 0.25, 37, columns, x, device) for x in range(3)], dim=1)
    assert torch.equal(out != 0, keep)
    alone = hstu_ops.norm_gate(a, u, dropout=0.25, seed=seed)
    assert torch.equal(alone, out[:, 2 * columns :])
    as_tensor = torch.tensor([(seed + 2**63) % 2**64 - 2**63], device=device)
    assert torch.equal(hstu_ops.norm_gate(a, u, dropout=0.25, seed=as_tensor), alone)
    assert torch.equal(hstu_ops.norm_gate(a, u, dropout=0.25, seed=seed, training=False), hstu_ops.norm_gate(a, u))


def test_dropout_is_drawn_from_torchs_generator(device):
    a = normal(200, 64, device=device)
    torch.manual_seed(5)
    first, second = (hstu_ops.norm_gate(a, a, dropout=0.5) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(hstu_ops.norm_gate(a, a, dropout=0.5), first)


def test_dropout_rate():
    for p in (0.1, 0.5, 0.9):
        share = 1 - float(reference.dropout_mask(3, p, 2000, 512).float().mean())
        assert abs(share - p) < 4 * (p * (1 - p) / (2000 * 512)) ** 0.5


# ---- the layer's core ----------------------------------------------------------------------------------------


CORE = {x.name: x for x in SMALL}
CORE_CASES = [
    *("causal", "targets", "window-contextual-targets", "semi-local", "contextual-per-sequence", "int32-offsets"),
    *("position-time-per-head", "time", "dense", "dense-full", "dims-differ", "scale-per-row", "scale-float"),
]


def core_call(case: Case, dtype, device, seed=0, kind="both", seed_of_dropout=9, **options) -> Call:
    inputs = make(case, dtype, device, seed=seed, grad=False)
    given = {x: y for x, y in inputs.options.items() if x != "seq_offsets_q"}
    heads, dim_qk, dim_v = case.heads, case.dim_qk, case.dim_v
    u = normal(len(inputs.q), heads * dim_v, seed=seed + 3, dtype=dtype, device=device)
    uvqk = torch.cat([u, inputs.v.flatten(1), inputs.q.flatten(1), inputs.k.flatten(1)], dim=1)
    tables = affine(kind, heads * dim_v, dtype, device, seed + 4)
    tensors = {"uvqk": uvqk, **{f"norm_{x}": y for x, y in tables.items()}}
    bias = given.pop("bias")
    if isinstance(bias, Tensor):
        tensors["bias"] = bias
    elif bias is not None:
        given["relative"] = bias
        tensors |= {x: y for x in ("position_weight", "time_weight") if (y := getattr(bias, x)) is not None}
    given |= {"num_heads": heads, "dim_qk": dim_qk, "dim_v": dim_v, "seed": seed_of_dropout, **options}
    return CoreCall("layer_core", tensors, {"rest": (inputs.seq_offsets, inputs.max_seq_len), **given})


class CoreCall(Call):
    def run(self, module, tensors=None):
        tensors, options = dict(tensors or self.tensors), dict(self.options)
        relative = options.pop("relative", None)
        if relative is not None:
            tables = {x: tensors.pop(x) for x in ("position_weight", "time_weight") if x in tensors}
            others = {x: getattr(relative, x) for x in ("buckets", "timestamps", "query_timestamps")}
            options["bias"] = RelativeBias(**tables, **others)
        if isinstance(options.get("scale"), Tensor):
            options["scale"] = options["scale"].to(
                torch.float64 if tensors["uvqk"].dtype == torch.float64 else torch.float32
            )
        uvqk, rest = tensors.pop("uvqk"), options.pop("rest")
        return (module.layer_core(uvqk, *rest, **tensors, **options),)


@pytest.mark.parametrize("name", CORE_CASES)
def test_layer_core(name, device, dtype):
    check(lambda draw: core_call(CORE[name], dtype, device, draw))


@pytest.mark.parametrize("silu", SILU, ids=lambda x: "".join("01"[y] for y in x))
@pytest.mark.parametrize("recompute", ((False, False), (True, False), (True, True)), ids=("keep", "silu", "both"))
def test_layer_core_options(silu, recompute, device, dtype):
    case = Case("", (20, 0, 33), num_targets=(3, 0, 5), dim_qk=16, dim_v=24)
    options = dict(zip(("recompute_silu", "recompute_attention"), recompute, strict=True))
    options |= {"silu": silu, "groups": 1 + silu[1], "concat": recompute[1], "dropout": 0.2}
    check(lambda draw: core_call(case, dtype, device, draw, **options))


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("name", ("causal", "position-time-per-head"))
def test_layer_core_is_its_three_steps(name, device, dtype):
    """The steps by themselves round u to the type; apart from that they are the same."""
    call = core_call(CORE[name], dtype, device, silu=(False, True, True, True))

    class Steps:
        @staticmethod
        def layer_core(
            uvqk, offsets, longest, *, num_heads, dim_qk, dim_v, silu, norm_weight, norm_bias, seed, **options
        ):
            sizes = (num_heads * dim_v,) * 2 + (num_heads * dim_qk,) * 2
            u, v, q, k = hstu_ops.silu_split(uvqk, sizes, silu)
            q, k, v = (x.unflatten(1, (num_heads, -1)) for x in (q, k, v))
            a = hstu_ops.hstu_attention(q, k, v, offsets, longest, **options).flatten(1)
            return hstu_ops.norm_gate(a, u, norm_weight, norm_bias)

    got, want = call.gradients(hstu_ops), call.gradients(Steps)
    assert all(torch.equal(got[x], want[x]) for x in want)


@pytest.mark.parametrize("recompute_silu", (False, True))
@pytest.mark.parametrize("recompute_attention", (False, True))
def test_what_layer_core_keeps(recompute_silu, recompute_attention, device):
    case = Case("", (50, 30), dim_qk=16, dim_v=32)
    call = core_call(
        case, torch.bfloat16, device, recompute_silu=recompute_silu, recompute_attention=recompute_attention
    )
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if x.dim() == 2:
            kept[x.data_ptr()] = x.shape[1]
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        call.run(hstu_ops, {x: y.detach().requires_grad_() for x, y in call.tensors.items()})
    assert sum(kept.values()) == 192 + (0 if recompute_silu else 128) + (0 if recompute_attention else 64)


def test_layer_core_autocast(device):
    call = core_call(CORE["position-time-per-head"], torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        out = call.run(hstu_ops)[0]
        call.gradients(hstu_ops)
    tensors = {**call.tensors, "uvqk": call.tensors["uvqk"].bfloat16()}
    assert out.dtype == torch.bfloat16 and torch.equal(out, call.run(hstu_ops, tensors)[0])


# ---- edges ---------------------------------------------------------------------------------------------------


CALLS = [
    ("layer_norm", lambda rows, device: Call("layer_norm", {"x": normal(rows, 48, device=device)}, {})),
    (
        "layer_norm-affine",
        lambda rows, device: Call(
            "layer_norm", {"x": normal(rows, 48, device=device), **affine("both", 48, torch.float32, device)}, {}
        ),
    ),
    ("norm_gate", lambda rows, device: gate_call((rows, 48, 3), torch.float32, device, dropout=0.1, seed=3)),
    ("norm_gate-plain", lambda rows, device: gate_call((rows, 48, 1), torch.float32, device)),
    ("norm_gate-odd", lambda rows, device: gate_call((rows, 45, 3), torch.float32, device, concat=True)),
    (
        "silu_split",
        lambda rows, device: Call("silu_split", {"uvqk": normal(rows, 48, device=device)}, {"sizes": (8, 8, 16, 16)}),
    ),
]
_calls = pytest.mark.parametrize("make_call", [x[1] for x in CALLS], ids=[x[0] for x in CALLS])


@_calls
def test_no_rows(make_call, device):
    got, want = make_call(0, device).gradients(hstu_ops), make_call(0, device).gradients(reference)
    assert got.keys() == want.keys() and all(torch.equal(got[x], want[x]) for x in want)


def test_layer_core_without_rows(device):
    call = core_call(Case("", (0, 0), dim_qk=8, dim_v=8), torch.float32, device)
    got, want = call.gradients(hstu_ops), call.gradients(reference)
    assert all(torch.equal(got[x], want[x]) for x in want)
    assert call.run(hstu_ops)[0].shape == (0, 16)


@_calls
@pytest.mark.parametrize("bad", (float("nan"), float("inf")), ids=str)
def test_a_row_keeps_to_itself(make_call, bad, device):
    call = make_call(50, device)
    clean = call.gradients(hstu_ops)
    for name in ("x", "a", "u", "uvqk"):
        if name in call.tensors:
            call.tensors[name] = call.tensors[name].clone()
            call.tensors[name][20] = bad
    got, rows = call.gradients(hstu_ops), [i for i in range(50) if i != 20]
    assert not got["out"].isfinite().all()
    for name, x in got.items():
        if x.shape[0] == 50 and x.dim() == 2:
            assert torch.equal(x[rows], clean[name][rows]), name


@_calls
def test_same_bits_every_time(make_call, device):
    """Also the sums over rows, without torch.use_deterministic_algorithms, and with whatever memory held before."""
    call = make_call(3000, device)
    first = call.gradients(hstu_ops)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    for _ in range(2):
        got = call.gradients(hstu_ops)
        assert all(torch.equal(got[x], first[x]) for x in first)


@_calls
def test_threads_do_not_change_bits(make_call):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        call = make_call(3000, "cpu")
        alone = call.gradients(hstu_ops)
        for threads in (2, 5):
            torch.set_num_threads(threads)
            got = call.gradients(hstu_ops)
            assert all(torch.equal(got[x], alone[x]) for x in alone)
    finally:
        torch.set_num_threads(before)


@_calls
def test_gradients_that_nobody_wants(make_call, device):
    call = make_call(11, device)
    every = call.gradients(hstu_ops)
    for name in call.tensors:
        tensors = {x: t.detach().requires_grad_(x == name) for x, t in call.tensors.items()}
        out = call.run(hstu_ops, tensors)
        grads = [normal(*x.shape, seed=7 + i).to(x) for i, x in enumerate(out)]
        (got,) = torch.autograd.grad(out, tensors[name], grads)
        torch.testing.assert_close(got, every[name])  # another kernel may be chosen


@_calls
def test_gradcheck(make_call):
    call = make_call(4, "cpu")
    names = list(call.tensors)

    def run(*tensors):
        return call.run(hstu_ops, dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradcheck(run, [call.tensors[x].double().requires_grad_() for x in names])


@_calls
def test_second_derivative_is_an_error(make_call, device):
    call = make_call(4, device)
    tensors = {x: t.detach().requires_grad_() for x, t in call.tensors.items()}
    first = torch.autograd.grad(
        sum(x.square().sum() for x in call.run(hstu_ops, tensors)), list(tensors.values()), create_graph=True
    )
    with pytest.raises(RuntimeError, match=r"no second derivative: use hstu_ops\.reference"):
        first[0].sum().backward()


def test_rows_beyond_32_bits(device):
    """Element 2^31 and its neighbours; on CUDA only, where there is memory for it."""
    if device == "cpu":
        pytest.skip("minutes on a CPU")
    rows, columns = 2**22 + 3, 512
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB")
    last = slice(rows - 5, rows)
    x = torch.randn(rows, columns, device=device, dtype=torch.bfloat16).requires_grad_()
    grad = torch.randn_like(x)
    out = hstu_ops.norm_gate(x, x.detach(), dropout=0.5, seed=1)
    out.backward(grad)
    keep = reference.dropout_mask(1, 0.5, rows, 4, device=device)[last]
    assert torch.equal(out[last, :4] != 0, keep)
    z = x.detach()[last].clone().requires_grad_()
    (want,) = torch.autograd.grad(hstu_ops.norm_gate(z, z.detach()), z, grad[last])
    del out
    (got,) = torch.autograd.grad(hstu_ops.norm_gate(x, x.detach()), x, grad)
    assert torch.equal(got[last], want)
    u, _, _, _ = hstu_ops.silu_split(x.detach(), (512, 0, 0, 0))
    assert torch.equal(u[last], hstu_ops.silu_split(x.detach()[last], (512, 0, 0, 0))[0])


@pytest.mark.parametrize("options", ({}, {"dropout": 0.2}, {"dropout": 0.2, "concat": True}), ids=str)
def test_many_rows(options, device):
    """Enough for blocks on CUDA to come in turns."""
    if device == "cpu":
        pytest.skip("minutes on a CPU")
    rows, columns = 100_001, 256
    tensors = {x: torch.randn(rows, columns, device=device, dtype=torch.bfloat16) for x in ("a", "u")}
    call = Call("norm_gate", {**tensors, **affine("both", columns, torch.bfloat16, device)}, {**options, "seed": 3})
    grad = torch.randn(rows, columns * (3 if "concat" in options else 1), device=device, dtype=torch.bfloat16)

    def gradients(module, wide: bool = False) -> dict[str, Tensor]:
        tensors = {x: (t.double() if wide else t).requires_grad_() for x, t in call.tensors.items()}
        (out,) = call.run(module, tensors)
        found = torch.autograd.grad(out, list(tensors.values()), grad.to(out))
        return {"out": out.detach(), **dict(zip(tensors, found, strict=True))}

    got, plain, true = gradients(hstu_ops), gradients(reference), gradients(reference, wide=True)
    for name, x in true.items():
        ours, torchs = (y[name].double() - x for y in (got, plain))
        factor = 2 if name == "out" else 3
        assert ours.norm() <= factor * torchs.norm(), name
        assert ours.abs().max() <= factor * torchs.abs().max(), name


def test_rows_far_apart(device):
    """Whose blocks step over more than 2^32 bytes; on CUDA only, where there is memory for it."""
    if device == "cpu":
        pytest.skip("needs gigabytes")
    rows, stride = 300_000, 16384
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB")
    far = torch.empty(rows, stride, device=device, dtype=torch.bfloat16)[:, :16]
    far.copy_(torch.randn(rows, 16, device=device))
    near = far.contiguous().requires_grad_()
    far = far.detach().requires_grad_()
    for call in (hstu_ops.layer_norm, lambda x: hstu_ops.norm_gate(x, x.detach(), dropout=0.5, seed=1)):
        got, want = call(far), call(near)
        torch.testing.assert_close(got, want)
        grad = torch.ones_like(want)
        torch.testing.assert_close(*(torch.autograd.grad(y, x, grad)[0] for y, x in ((got, far), (want, near))))


# ---- what torch asks -----------------------------------------------------------------------------------------


def _raw(device) -> list[tuple]:
    """(op, arguments) with each optional argument there and not; those of the backward need no gradient."""
    x = [normal(6, 16, seed=i, device=device) for i in range(2)]
    w = [normal(16, seed=i, device=device) for i in range(2)]
    out, seed = {16: x[1], 48: normal(6, 48, device=device)}, torch.tensor([5], device=device)
    silu = (4, 4, 6, 2, True, False, True, True)
    parts = x[1].split(silu[:4], dim=1)

    def leaf(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.clone().requires_grad_()

    found = [
        (ops.silu_split_fwd.default, (leaf(x[0]), *silu)),
        (ops.silu_split_bwd.default, (*parts, x[0], *silu)),
        (ops.silu_split_bwd.default, (None, None, parts[2], None, x[0], *silu)),
    ]
    for weight, bias in ((None, None), (w[0], None), (w[0], w[1])):
        need = weight is not None
        found.append((ops.layer_norm_fwd.default, (leaf(x[0]), leaf(weight), leaf(bias), 1e-6)))
        found.append((ops.layer_norm_bwd.default, (x[1], x[0], weight, 1e-6, need)))
        for values, concat in ((None, False), (seed, True)):
            options = (2, 1e-6, 0.25, values, 7, concat)
            leaves = (leaf(x[0]), leaf(x[1]), True, leaf(weight), leaf(bias))
            grad = out[48 if concat else 16]
            found.append((ops.norm_gate_fwd.default, (*leaves, *options)))
            found.append((ops.norm_gate_bwd.default, (grad, x[0], x[1], True, weight, bias, *options, need)))
    return found


def _raw_core(device) -> list[tuple]:
    found = []
    for name, concat in (("causal", False), ("position-time-per-head", True), ("dense", False)):
        call = core_call(CORE[name], torch.float32, device, concat=concat, dropout=0.1, silu=(True, True, False, True))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hstu_ops._layer_ops, "layer_core", lambda *args: args)
            (args,) = call.run(hstu_ops, {x: y.detach().requires_grad_() for x, y in call.tensors.items()})
        found.append((ops.layer_core_fwd.default, args))
        plain = [y.detach() if isinstance(y, Tensor) else y for y in args]
        out, activated, a = ops.layer_core_fwd(*plain)
        for kept in ((activated, a), (None, None)):
            found.append((ops.layer_core_bwd.default, (out, plain[0], *kept, *plain[1:-2], True, True, True)))
    return found


def test_opcheck(device):
    for op, args in _raw(device):
        torch.library.opcheck(op, args)


def test_opcheck_layer_core(device):
    torch.use_deterministic_algorithms(True)
    for op, args in _raw_core(device):
        torch.library.opcheck(op, args)


def _compiled_equals_eager(call: Call, backend: str = "aot_eager", exact: bool = True) -> None:
    torch._dynamo.reset()

    class Compiled:
        pass

    function = torch.compile(getattr(hstu_ops, call.name), fullgraph=True, backend=backend)
    setattr(Compiled, call.name, staticmethod(function))
    got, want = call.gradients(Compiled), call.gradients(hstu_ops)
    for name in want:
        if exact:
            assert torch.equal(got[name], want[name]), name
        else:
            torch.testing.assert_close(got[name], want[name])


@_calls
def test_compile(make_call, device):
    _compiled_equals_eager(make_call(30, device))


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("recompute", (False, True))
@pytest.mark.parametrize("name", ("causal", "position-time-per-head", "dense", "contextual-per-sequence"))
def test_compile_layer_core(name, recompute, device):
    options = {"recompute_silu": recompute, "recompute_attention": recompute, "dropout": 0.1}
    _compiled_equals_eager(core_call(CORE[name], torch.float32, device, **options))


@pytest.mark.usefixtures("deterministic")
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compile_inductor(device):
    call = core_call(CORE["position-time-per-head"], torch.float32, device, dropout=0.1)
    _compiled_equals_eager(call, "inductor", exact=False)


def test_compile_draws_a_seed(device):
    torch._dynamo.reset()
    a = normal(100, 64, device=device).requires_grad_()
    function = torch.compile(hstu_ops.norm_gate, fullgraph=True, backend="aot_eager")
    out = function(a, a.detach(), dropout=0.5)
    assert 0.3 < float((out == 0).float().mean()) < 0.7
    (grad,) = torch.autograd.grad(out, a, torch.ones_like(out))
    assert grad.isfinite().all()


# ---- errors --------------------------------------------------------------------------------------------------


X = torch.ones(4, 8)
CORE_OPTIONS = {"num_heads": 1, "dim_qk": 2, "dim_v": 2}
OFFSETS = torch.tensor([0, 4])
WRONG = [
    (lambda f: f.layer_norm([1.0]), TypeError, "x: expected a tensor, got list"),
    (lambda f: f.layer_norm(X.int()), TypeError, "x: expected float64, .* got int32"),
    (lambda f: f.layer_norm(X[0]), ValueError, r"x: expected shape \[T, D\]"),
    (lambda f: f.layer_norm(X.t()), ValueError, "x: expected a contiguous last dimension"),
    (lambda f: f.layer_norm(X, torch.ones(7)), ValueError, r"weight: expected shape \[8\], got float32 \[7\]"),
    (lambda f: f.layer_norm(X, X[0].int()), TypeError, "weight: expected None or a float tensor"),
    (lambda f: f.layer_norm(X, None, X[0].to("meta")), ValueError, "bias: expected a tensor on cpu"),
    (lambda f: f.layer_norm(X, eps="1"), TypeError, "eps: expected a number, got str"),
    (lambda f: f.silu_split(X, (4, 4)), ValueError, "sizes: expected four ints"),
    (lambda f: f.silu_split(X, (4, 4, 1, 0)), ValueError, "sizes: expected at least 0 each, 8 together"),
    (lambda f: f.silu_split(X, (4, 4, 0, 0), (True,)), ValueError, "silu: expected four bools"),
    (lambda f: f.norm_gate(X, X[:3]), ValueError, r"u: expected shape \[4, 8\]"),
    (lambda f: f.norm_gate(X, X.half()), TypeError, "u: expected torch.float32, the type of a"),
    (lambda f: f.norm_gate(X, X, groups=3), ValueError, "groups: expected a divisor of 8"),
    (lambda f: f.norm_gate(X, X, torch.ones(3), groups=2), ValueError, r"weight: expected shape \[8\] or \[2\]"),
    (lambda f: f.norm_gate(X, X, dropout=1.0), ValueError, "dropout: expected at least 0 and less than 1"),
    (lambda f: f.norm_gate(X, X, dropout=0.1, seed=0.5), TypeError, "seed: expected None, an int or"),
    (lambda f: f.norm_gate(X, X, dropout=0.1, seed=torch.ones(1)), TypeError, "seed: expected an int or an int64"),
    (lambda f: f.norm_gate(X, X, dropout=0.1, seed=torch.ones(2).long()), ValueError, "seed: expected one element"),
    (lambda f: f.layer_core(None, OFFSETS, 4, **CORE_OPTIONS), TypeError, "uvqk: expected a tensor"),
    (lambda f: f.layer_core(X[:, :7], OFFSETS, 4, **CORE_OPTIONS), ValueError, "uvqk: expected 8 columns"),
    (lambda f: f.layer_core(X, OFFSETS, 0, **CORE_OPTIONS), ValueError, "max_seq_len: expected at least 1"),
    (lambda f: f.layer_core(X, OFFSETS, 4, **{**CORE_OPTIONS, "num_heads": 0}), ValueError, "num_heads: expected"),
    (
        lambda f: f.layer_core(X, OFFSETS, 4, norm_weight=torch.ones(3), **CORE_OPTIONS),
        ValueError,
        r"norm_weight: expected shape \[2\]",
    ),
    (
        lambda f: f.layer_core(X, torch.tensor([0, 3]), 4, **CORE_OPTIONS),
        ValueError,
        "seq_offsets: expected to end at the number of rows, 4",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG, ids=[x[2][:40] for x in WRONG])
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(hstu_ops)


def test_float64_stays_on_the_cpu(device):
    if device == "cpu":
        pytest.skip("CUDA only")
    with pytest.raises(RuntimeError, match="float64 is not supported on CUDA"):
        hstu_ops.layer_norm(normal(4, 8, dtype=torch.float64, device=device))
