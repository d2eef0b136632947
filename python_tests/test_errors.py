"""Whatever does not fit raises, naming the argument, what was expected and what came."""

import importlib
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import Case, devices, dtypes, make

from hstu_ops import RelativeBias, TimeBuckets, _library, hstu_attention
from hstu_ops import attention as attention_module

_CASE = Case("", (5, 0, 3), heads=2, dim_qk=4, dim_v=6, bias="position+time", num_targets=(2, 0, 3))


def _long(*values):
    return torch.tensor(values)


def _bias(**changes):
    return lambda o: replace(o["bias"], **changes)


# Changes to the arguments of a call that works: (name, value or function of the options, error, message)
_WRONG = [
    ("q", [1.0], TypeError, "q: expected a tensor, got list"),
    (
        "q",
        torch.zeros(8, 2, 4, dtype=torch.int32),
        TypeError,
        "q: expected float64, float32, float16 or bfloat16, got int32",
    ),
    ("q", torch.zeros(8, 8), ValueError, r"q: expected shape \[total_q, H, Dqk\], got float32 \[8, 8\]"),
    ("q", torch.zeros(7, 2, 4), ValueError, r"q: expected 8 rows, those of k \(or seq_offsets_q\), got 7"),
    ("q", torch.zeros(8, 2, 0), ValueError, "q: expected at least one head and one dimension"),
    ("q", torch.zeros(8, 4, 2).transpose(1, 2), ValueError, "q: expected a contiguous last dimension, got strides"),
    ("k", None, TypeError, "k: expected a tensor, got NoneType"),
    ("k", torch.zeros(8, 2, 4).double(), TypeError, "k: expected torch.float32, the type of q, got float64"),
    ("k", torch.zeros(8, 3, 4), ValueError, r"k: expected shape \[total_kv, 2, D\], got float32 \[8, 3, 4\]"),
    ("k", torch.zeros(8, 2, 5), ValueError, "k: expected head dimension 4, that of q"),
    (
        "k",
        torch.zeros(8, 2, 4, device="meta"),
        ValueError,
        "k: expected a tensor on cpu, the device of q, got .* on meta",
    ),
    ("v", torch.zeros(7, 2, 4), ValueError, r"v: expected shape \[8, 2, Dv\], the rows of k, got float32 \[7, 2, 4\]"),
    ("v", torch.zeros(8, 2, 4).half(), TypeError, "v: expected torch.float32, the type of q, got float16"),
    ("seq_offsets", None, TypeError, r"seq_offsets: expected an integer tensor \[B \+ 1\], got NoneType"),
    ("seq_offsets", [0, 8], TypeError, "seq_offsets: expected an integer tensor .* got list"),
    ("seq_offsets", torch.tensor(8), ValueError, "seq_offsets: expected an integer tensor"),
    ("seq_offsets", _long(), ValueError, "seq_offsets: expected an integer tensor"),
    ("seq_offsets", torch.tensor([0.0, 5, 5, 8]), TypeError, "seq_offsets: expected int32 or int64, got float32"),
    ("seq_offsets", torch.arange(8)[::2], ValueError, "seq_offsets: expected a contiguous tensor, got stride 2"),
    ("seq_offsets_q", _long(0, 8), ValueError, r"seq_offsets_q: expected shape \[4\], got int64 \[2\]"),
    ("max_seq_len", None, TypeError, "max_seq_len: expected an int, got NoneType"),
    ("max_seq_len", 2.5, TypeError, "max_seq_len: expected an int, got float"),
    ("max_seq_len", 0, ValueError, "max_seq_len: expected at least 1, got 0"),
    ("alpha", "1", TypeError, "alpha: expected a number"),
    (
        "alpha",
        torch.tensor(1.0, requires_grad=True),
        TypeError,
        r"alpha: expected a number \(it has no gradient\), got",
    ),
    ("scale", "1", TypeError, "scale: expected a number or a tensor, got str"),
    ("scale", _long(1, 1, 1), TypeError, "scale: expected a float tensor, got int64"),
    ("scale", torch.ones(5), ValueError, r"scale: expected shape \[3\], one per sequence, or \[8\], one per query row"),
    ("scale", torch.ones(3, requires_grad=True), ValueError, "scale: expected a tensor that needs no gradient"),
    ("num_targets", 3, TypeError, "num_targets: expected an integer tensor"),
    ("num_targets", _long(1, 2), ValueError, r"num_targets: expected shape \[3\], got int64 \[2\]"),
    ("target_group_size", 0, ValueError, "target_group_size: expected at least 1, got 0"),
    ("contextual_seq_len", -1, ValueError, "contextual_seq_len: expected at least 0, got -1"),
    ("contextual_seq_len", _long(1), ValueError, r"contextual_seq_len: expected shape \[3\]"),
    ("contextual_seq_len", 1.0, TypeError, "contextual_seq_len: expected an int, got float"),
    ("max_attn_len", -1, ValueError, "max_attn_len: expected at least 0, got -1"),
    ("max_attn_len", 2**63, ValueError, r"max_attn_len: expected less than 2\^63, got 9223372036854775808"),
    ("causal", "no", TypeError, "causal: expected a bool, got str"),
    ("causal", None, TypeError, "causal: expected a bool, got NoneType"),
    ("min_full_attn_seq_len", -1, ValueError, "min_full_attn_seq_len: expected at least 0"),
    ("global_prefix_len", "1", TypeError, "global_prefix_len: expected an int, got str"),
    ("bias", 1.0, TypeError, "bias: expected None, a tensor or a RelativeBias, got float"),
    ("bias", torch.zeros(5, 5), ValueError, r"bias: expected shape \[3 or 1, 2 or 1, N, N\], got float32 \[5, 5\]"),
    ("bias", torch.zeros(1, 1, 5, 6), ValueError, "bias: expected shape"),
    ("bias", torch.zeros(2, 1, 5, 5), ValueError, "bias: expected shape"),
    ("bias", torch.zeros(1, 1, 4, 4), ValueError, "bias: expected N >= max_seq_len = 5"),
    ("bias", torch.zeros(1, 1, 5, 5).long(), TypeError, "bias: expected a float tensor, got int64"),
    (
        "bias",
        _bias(position_weight=torch.zeros(8)),
        ValueError,
        "bias.position_weight: expected an odd number of entries",
    ),
    (
        "bias",
        _bias(position_weight=torch.zeros(3, 9)),
        ValueError,
        r"bias.position_weight: expected shape \[entries\] or \[2,",
    ),
    ("bias", _bias(position_weight=[1.0]), TypeError, "bias.position_weight: expected a float tensor, got list"),
    ("bias", _bias(time_weight=torch.zeros(128)), ValueError, "bias.time_weight: expected 129 entries"),
    (
        "bias",
        _bias(time_weight=torch.zeros(129).long()),
        TypeError,
        "bias.time_weight: expected a float tensor, got int64",
    ),
    ("bias", _bias(buckets=None), ValueError, "bias.buckets: expected TimeBuckets"),
    ("bias", _bias(buckets=torch.arange(128)), TypeError, "bias.buckets: expected TimeBuckets, got int64"),
    (
        "bias",
        _bias(buckets=TimeBuckets(torch.zeros(128))),
        TypeError,
        "bias.buckets.boundaries: expected int32 or int64",
    ),
    ("bias", _bias(timestamps=None), ValueError, "bias.timestamps: expected an int64 tensor"),
    ("bias", _bias(timestamps=torch.zeros(8)), TypeError, "bias.timestamps: expected int32 or int64, got float32"),
    ("bias", _bias(timestamps=torch.zeros(8).int()), TypeError, "bias.timestamps: expected int64, got int32"),
    ("bias", _bias(timestamps=_long(1, 2)), ValueError, r"bias.timestamps: expected shape \[8\]"),
    ("bias", _bias(query_timestamps=_long(1, 2)), ValueError, r"bias.query_timestamps: expected shape \[8\]"),
]


def _call(name=None, value=None):
    inputs = make(_CASE, grad=False)
    arguments = {"q": inputs.q, "k": inputs.k, "v": inputs.v, "seq_offsets": inputs.seq_offsets, "max_seq_len": 5}
    arguments.update(inputs.options)
    if name is not None:
        assert name in arguments
        arguments[name] = value(arguments) if callable(value) else value
    return hstu_attention(**arguments)


def test_the_unchanged_call_works():
    assert _call().shape == (8, 2, 6)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"), _WRONG, ids=[f"{i}-{x[0]}" for i, x in enumerate(_WRONG)]
)
def test_wrong_argument(name, value, error, message):
    with pytest.raises(error, match="hstu_ops: " + message):
        _call(name, value)


# Content that a CPU kernel sees for free.
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seq_offsets", _long(1, 5, 5, 8)),
        ("seq_offsets", _long(0, 5, 4, 8)),
        ("seq_offsets", _long(0, 5, 5, 7)),
        ("seq_offsets", _long(0, 5, 5, 9)),
        ("seq_offsets", _long(0, -(2**40), 2**40, 8)),
        ("seq_offsets_q", _long(1, 5, 5, 8)),
        ("seq_offsets_q", _long(0, 6, 6, 8)),
        ("num_targets", _long(6, 0, 0)),
        ("num_targets", _long(0, -1, 0)),
    ],
    ids=str,
)
def test_wrong_content(name, value):
    with pytest.raises(ValueError, match=f"hstu_ops: {name}: expected"):
        _call(name, value)


@pytest.mark.parametrize(
    ("name", "value", "blamed"),
    [
        ("seq_offsets", _long(1, 5, 5, 8), "seq_offsets"),
        ("seq_offsets", _long(0, 5, 4, 8), "seq_offsets"),
        ("seq_offsets", _long(0, 5, 5, 9), "seq_offsets"),
        ("seq_offsets_q", _long(0, 6, 6, 8), "seq_offsets_q"),
        ("num_targets", _long(6, 0, 0), "num_targets"),
        ("num_targets", _long(0, -1, 0), "num_targets"),
        ("contextual_seq_len", _long(0, -1, 0), "contextual_seq_len"),
    ],
    ids=str,
)
def test_content_checks_on_request(name, value, blamed, device, monkeypatch):
    """HSTU_OPS_CHECK=1, on any device, before a kernel runs."""
    monkeypatch.setattr(attention_module, "_CHECK_CONTENT", True)
    monkeypatch.setattr(attention_module._library, "attention", lambda *args: pytest.fail("a kernel was called"))
    inputs = make(replace(_CASE, bias="none"), device=device, grad=False)
    arguments = {**inputs.options, "seq_offsets": inputs.seq_offsets, "max_seq_len": 5}
    arguments[name] = value.to(device) if isinstance(value, torch.Tensor) else value
    with pytest.raises(ValueError, match=f"hstu_ops: {blamed}: expected"):
        hstu_attention(inputs.q, inputs.k, inputs.v, **arguments)


def test_content_checks_accept_good_content(device, monkeypatch):
    monkeypatch.setattr(attention_module, "_CHECK_CONTENT", True)
    inputs = make(replace(_CASE, queries=(3, 0, 3), contextual_seq_len=(1, 2, 3)), device=device, grad=False)
    assert inputs.call(hstu_attention).shape == (6, 2, 6)
    assert replace(inputs, max_seq_len=2, options={**inputs.options, "bias": None}).call(hstu_attention).shape == (
        6,
        2,
        6,
    )


def test_a_raw_call_is_checked_too():
    """The op protects its memory without the Python in front of it."""
    inputs = make(Case("", (5, 3)), grad=False)
    rest = (None, None, None, True, None, 1, 0, None, 0, 0, 0, *(None,) * 6, False)
    fwd = torch.ops.hstu_ops.attention_fwd
    for offsets in (_long(0, 5, 9), _long(0, 9, 8), _long(-1, 5, 8)):
        with pytest.raises(ValueError, match="seq_offsets"):
            fwd(inputs.q, inputs.k, inputs.v, offsets, None, 5, *rest)
    with pytest.raises(ValueError, match="v"):
        fwd(inputs.q, inputs.k, inputs.v[:4], inputs.seq_offsets, None, 5, *rest)
    with pytest.raises(ValueError, match="k"):
        fwd(inputs.q, inputs.k.double(), inputs.v, inputs.seq_offsets, None, 5, *rest)


def test_device_without_kernels(monkeypatch):
    def refuse(*args):
        raise RuntimeError("no kernels")

    monkeypatch.setattr(attention_module._library, "DEVICE_TYPES", ("cuda",))
    monkeypatch.setattr(attention_module._library, "attention", refuse)
    with pytest.raises(ValueError, match=r"q: expected a device this build has kernels for \(cuda\), got .* on cpu"):
        _call()


def test_what_a_kernel_refuses_for_its_own_reasons(monkeypatch):
    def refuse(*args):
        raise RuntimeError("no kernels")

    monkeypatch.setattr(attention_module._library, "attention", refuse)
    with pytest.raises(RuntimeError, match="no kernels"):
        _call()


@pytest.mark.parametrize(
    ("name", "value", "error", "message"), [x for x in _WRONG if x[0] in ("q", "k", "v", "seq_offsets", "max_seq_len")]
)
def test_wrong_argument_of_a_plain_call(name, value, error, message):
    """Without options another op is called; and where kernels are not, in a graph, nothing else checks."""
    inputs = make(replace(_CASE, bias="none", num_targets=None), grad=False)
    arguments = {"q": inputs.q, "k": inputs.k, "v": inputs.v, "seq_offsets": inputs.seq_offsets, "max_seq_len": 5}
    arguments[name] = value
    with pytest.raises(error, match="hstu_ops: " + message):
        hstu_attention(**arguments)
    if "device" not in message and "contiguous" not in message:  # these do not survive the journey
        meta = {x: t.to("meta") if isinstance(t, torch.Tensor) else t for x, t in arguments.items()}
        with pytest.raises(error, match="hstu_ops: " + message):
            hstu_attention(**meta)


@pytest.mark.parametrize("name", ("k", "v", "seq_offsets", "num_targets"))
def test_one_meta_tensor_among_real_ones(name):
    """It takes the call to the fake kernel, whose result nobody computes."""
    inputs = make(replace(_CASE, bias="none"), grad=False)
    arguments = {"q": inputs.q, "k": inputs.k, "v": inputs.v, "seq_offsets": inputs.seq_offsets, "max_seq_len": 5}
    arguments["num_targets"] = inputs.options["num_targets"]
    arguments[name] = arguments[name].to("meta")
    with pytest.raises(ValueError, match=f"{name}: expected a tensor on cpu, the device of q, got .* on meta"):
        hstu_attention(**arguments)
    with pytest.raises(ValueError, match="expected all tensors on cpu"):
        _library._plain_fwd(*arguments.values(), False)


@pytest.mark.parametrize("device", [x for x in devices() if torch.float64 not in dtypes(x)])
def test_type_without_kernels(device):
    inputs = make(_CASE, torch.float64, device, grad=False)
    with pytest.raises((TypeError, ValueError, RuntimeError), match="float64"):
        inputs.call(hstu_attention)


def _import(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


def test_check_variable_is_read_at_import():
    code = "import hstu_ops.attention as a; print(a._CHECK_CONTENT)"
    assert [_import(code, HSTU_OPS_CHECK=x).stdout.strip() for x in ("1", "0", "")] == ["True", "False", "False"]


def test_import_says_what_to_do():
    """An old torch, no library, and a library of another machine: one sentence each."""
    library = importlib.import_module("hstu_ops._library")
    code = "import torch; torch.__version__ = '2.9.1'; import hstu_ops"
    assert "ImportError: hstu_ops needs torch >= 2.10, found 2.9.1: run `pip install" in _import(code).stderr
    assert Path(library.__file__).exists()


@pytest.mark.parametrize("content", (None, b"", b"not a library"), ids=("missing", "empty", "foreign"))
def test_import_without_a_working_library(content, tmp_path):
    package, sources = tmp_path / "hstu_ops", Path(attention_module.__file__).parent
    for source in sources.rglob("*.py"):
        copy = package / source.relative_to(sources)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(source.read_text())
    # Only this copy: an installed hstu_ops would otherwise lend its library.
    init = (package / "__init__.py").read_text()
    (package / "__init__.py").write_text(init.replace("extend_path(__path__, __name__)", "__path__"))
    if content is not None:
        (package / "libhstu_ops.so").write_bytes(content)
    result = _import(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import hstu_ops")
    last = result.stderr.strip().splitlines()[-1]
    expected = (
        "is not built .* run `pip install .`" if content is None else "does not load .* rebuild it on this machine"
    )
    assert last.startswith("ImportError: ") and re.search(expected, last), last


def test_bias_without_terms_is_no_bias():
    inputs = make(_CASE, grad=False)
    assert torch.equal(inputs.call(hstu_attention, bias=RelativeBias()), inputs.call(hstu_attention, bias=None))
