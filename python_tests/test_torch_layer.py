"""csrc/torch: who owns the arguments of an op, what its errors become, how its schema reads.

The op is called below hstu_attention here; what it computes is tested through hstu_attention.
"""

import gc
import subprocess
import sys

import pytest
import torch

import hstu_ops  # noqa: F401  (loads the ops)

fwd = torch.ops.hstu_ops.attention_fwd.default
bwd = torch.ops.hstu_ops.attention_bwd.default
bias_bwd = torch.ops.hstu_ops.attention_bias_bwd.default


def arguments(**changes):
    """Arguments of attention_fwd by name, in the schema's order."""
    given = {
        "q": torch.randn(5, 2, 8),
        "k": torch.randn(5, 2, 8),
        "v": torch.randn(5, 2, 4),
        "seq_offsets": torch.tensor([0, 2, 5]),
        "max_seq_len": 3,
        "causal": True,
        "target_group_size": 1,
        "contextual_seq_len": 0,
        "max_attn_len": 0,
        "min_full_attn_seq_len": 0,
        "global_prefix_len": 0,
        "allow_tf32": False,
    }
    given.update(changes)
    names = [a.name for a in fwd._schema.arguments]
    assert given.keys() <= set(names)
    return [given.get(name) for name in names]


def reference_counts(arrays):
    return {name: sys.getrefcount(arrays[name]) for name in arrays}


OPTIONAL = {
    "seq_offsets_q": torch.tensor([0, 2, 5]),
    "scale_values": torch.ones(2),
    "num_targets": torch.tensor([1, 0]),
    "contextual_seq_lens": torch.tensor([1, 0], dtype=torch.int32),
    "position_weight": torch.randn(5),
    "time_weight": torch.randn(2, 4),
    "time_boundaries": torch.tensor([1, 2, 3]),
    "timestamps": torch.arange(5),
    "query_timestamps": torch.arange(5),
}


@pytest.mark.parametrize("change", [{}, {"scale": 0.5}, {"max_attn_len": -1}, {"k": torch.randn(5, 3, 8)}])
def test_arguments_are_released(change):
    """Also where the op throws: scale beside scale_values, an option out of range, a shape that does not fit."""
    plain = dict(zip([a.name for a in fwd._schema.arguments], arguments(), strict=True))
    tensors = {name: x for name, x in {**plain, **OPTIONAL}.items() if isinstance(x, torch.Tensor)}
    arrays = {name: x.numpy().copy() for name, x in tensors.items()}
    free = reference_counts(arrays)
    held = {name: torch.from_numpy(array) for name, array in arrays.items()}  # a tensor's storage holds its array
    assert reference_counts(arrays) == {name: count + 1 for name, count in free.items()}

    def call_all():
        call = arguments(**{**held, **change})
        grad_out = torch.randn(5, 2, 4)
        ops = (lambda: fwd(*call), lambda: bwd(grad_out, *call, False), lambda: bias_bwd(grad_out, *call, False))
        for op in ops:
            if change:
                with pytest.raises(ValueError, match=next(iter(change))):
                    op()
            else:
                op()

    for _ in range(3):
        call_all()
    held.clear()  # the last of the tensors
    gc.collect()
    assert reference_counts(arrays) == free


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.randn(5, 16)}, r"q: expected shape \[total_q, H, Dqk\], got \[5, 16\]"),
        ({"q": torch.ones(5, 2, 8, dtype=torch.int32)}, "q: expected float64, .* or bfloat16, got int32"),
        ({"q": torch.randn(4, 2, 8)}, r"q: expected as many rows as k \(5\)"),
        ({"k": torch.randn(5, 3, 8)}, r"k: expected shape \[total_kv, H, Dqk\] = \[5, 2, 8\], got \[5, 3, 8\]"),
        ({"k": torch.randn(5, 2, 8).double()}, "k: expected float32, got float64"),
        ({"v": torch.randn(5, 2, 8)[..., ::2]}, "v: expected a contiguous last dimension, got stride 2"),
        ({"seq_offsets": torch.zeros(2, 2)}, r"seq_offsets: expected shape \[B \+ 1\], got \[2, 2\]"),
        ({"seq_offsets": torch.tensor([0.0, 5.0])}, "seq_offsets: expected int64 or int32, got float32"),
        ({"num_targets": torch.tensor([1])}, r"num_targets: expected shape \[B\] = \[2\], got \[1\]"),
        ({"scale_values": torch.ones(3)}, r"scale_values: expected shape \[B\] or \[total_q\]"),
        ({"scale_values": torch.ones(2).double()}, "scale_values: expected float32, got float64"),
        ({"target_group_size": 0}, "target_group_size: expected at least 1, got 0"),
        ({"bias": torch.ones(1, 1, 2, 2)}, "bias: expected shape .*max_seq_len = 3, got"),
        ({"position_weight": torch.ones(4)}, r"position_weight: expected an odd number of entries, 2 P - 1, got 4"),
        ({"position_weight": torch.ones(3, 5)}, "position_weight: expected shape .* with H = 2"),
        ({"time_weight": torch.ones(4)}, "time_boundaries: expected a tensor beside time_weight, got None"),
        ({"timestamps": torch.arange(5)}, "timestamps: expected None without time_weight"),
    ],
)
def test_wrong_argument_is_a_value_error_that_names_it(change, message):
    with pytest.raises(ValueError, match=message):
        fwd(*arguments(**change))


def test_failure_inside_torch_says_what_failed():
    rows = torch.empty(1, 1, 1).expand(1 << 46, 1, 1)  # beyond any address space
    with pytest.raises(RuntimeError, match="aoti_torch_empty_strided failed in libtorch"):
        fwd(*arguments(q=rows, k=rows, v=rows))


def test_absent_bias_gradients_are_empty():
    given = arguments(position_weight=torch.randn(5))
    grad_out = torch.randn(5, 2, 4)
    assert [g.shape for g in bias_bwd(grad_out, *given, False)][3:] == [(0,), (5,), (0,)]
    assert len(bwd(grad_out, *given, False)) == 3


def test_threads_follow_torch():
    """torch's own setting rules the kernels' threads, and no other OpenMP comes with the library."""
    program = (
        "import torch, hstu_ops\n"
        "torch.set_num_threads(1)\n"
        "q = torch.randn(512, 2, 32); offsets = torch.tensor([0, 256, 512])\n"
        "a = hstu_ops.hstu_attention(q, q, q, offsets, 256); torch.set_num_threads(2)\n"
        "assert torch.equal(a, hstu_ops.hstu_attention(q, q, q, offsets, 256))\n"
        "runtimes = {l.split('/')[-1].strip() for l in open('/proc/self/maps') if 'omp' in l.split('/')[-1]}\n"
        "assert len({r.split('.so')[0] for r in runtimes}) <= 1, runtimes\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd="/")
