"""Who computes attention: hstu_ops by backend, FlashAttention2, padded eager PyTorch, and peers that are installed.

A provider says why it cannot serve a case (`refuses`), or binds tensors to a callable and names the leaves whose
gradients it makes (`bind`). FlashAttention2 has a softmax where HSTU has silu: the same products on the same pairs.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable
from contextlib import contextmanager

import torch
from harness import available_memory, first_line
from problems import Case, Inputs
from torch import Tensor

import hstu_ops
from hstu_ops import reference

HALF_TYPES = (torch.float16, torch.bfloat16)
PADDED_UP_TO = 4 * 2**30  # bytes that it may take on CUDA
OWN_NAMES = ("hstu_ops", "sm80", "sm90", "tf32")  # of Own providers
Bound = tuple[Callable[[], Tensor], list[Tensor]]


class Provider:
    name = ""
    note = ""  # what exactly is run, for the head of the output
    own = False  # hstu_ops itself: gets a line of its own
    same_function = False  # a peer: its output is compared with ours before it is timed

    def refuses(self, case: Case, dtype: torch.dtype, device: str, direction: str) -> str | None:
        return None

    def bind(self, inputs: Inputs, case: Case) -> Bound:
        raise NotImplementedError

    @contextmanager
    def active(self):
        yield


class Own(Provider):
    """hstu_ops. `backend` forces the CUDA kernels through HSTU_OPS_BACKEND, which the library reads at each call."""

    own = True

    def __init__(self, backend: str | None = None) -> None:
        self.backend = backend
        self.name = backend or "hstu_ops"
        self.note = f"hstu_ops {hstu_ops.__version__}" + (f", HSTU_OPS_BACKEND={backend}" if backend else "")

    def bind(self, inputs: Inputs, case: Case) -> Bound:
        return lambda: inputs.call(hstu_ops.hstu_attention), list(inputs.leaves.values())

    @contextmanager
    def active(self):
        before = os.environ.get("HSTU_OPS_BACKEND")
        if self.backend:
            os.environ["HSTU_OPS_BACKEND"] = self.backend
        try:
            used = hstu_ops.build_info().get("cuda_backend", self.backend)
            if self.backend and used != self.backend:
                raise RuntimeError(f"HSTU_OPS_BACKEND={self.backend} is set, but {used} is used")
            yield
        finally:
            if before is None:
                os.environ.pop("HSTU_OPS_BACKEND", None)
            else:
                os.environ["HSTU_OPS_BACKEND"] = before


class OwnTf32(Own):
    """hstu_ops on float32 where torch allows TF32; the roofline stays that of full float32."""

    def __init__(self) -> None:
        super().__init__()
        self.name, self.note = "tf32", f"{self.note}, torch.backends.cuda.matmul.fp32_precision = tf32"

    def refuses(self, case: Case, dtype: torch.dtype, device: str, direction: str) -> str | None:
        return None if dtype == torch.float32 else "float32 only"

    @contextmanager
    def active(self):
        matmul = torch.backends.cuda.matmul
        before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
        try:
            yield
        finally:
            matmul.fp32_precision = before


class Padded(Provider):
    """hstu_ops.reference.padded_hstu_attention: everything padded to the longest, as it is done without a kernel."""

    name = "padded"
    note = "padded eager PyTorch (hstu_ops.reference.padded_hstu_attention)"

    def refuses(self, case: Case, dtype: torch.dtype, device: str, direction: str) -> str | None:
        if case.queries is not None:
            return "as many queries as keys only"
        need, have = padded_bytes(case, dtype, direction), available_memory(device)
        if device == "cuda":  # what takes 60 times as long is not waited for, only to be 60 times as long again
            have = min(have, PADDED_UP_TO)
        return f"needs about {need / 2**30:.0f} GiB of {have / 2**30:.0f}" if need > 0.8 * have else None

    def bind(self, inputs: Inputs, case: Case) -> Bound:
        options = {x: y for x, y in inputs.options.items() if x != "seq_offsets_q"}
        args = (inputs.q, inputs.k, inputs.v, inputs.seq_offsets, inputs.max_seq_len)
        return lambda: reference.padded_hstu_attention(*args, **options), list(inputs.leaves.values())


def padded_bytes(case: Case, dtype: torch.dtype, direction: str) -> int:
    """An estimate of what Padded holds at most: a few copies of the scores, and int64 buckets where there is a bias."""
    batch, size = len(case.lengths), case.max_seq_len or max(case.lengths, default=0)
    scores = batch * case.heads * size**2
    each = torch.finfo(dtype).bits // 8 if case.bias == "none" else max(4, torch.finfo(dtype).bits // 8)
    bias = 0 if case.bias == "none" else 24 * batch * size**2
    return (3 if direction == "fwd" else 4) * scores * each + bias


class FlashAttention(Provider):
    """FlashAttention2 for variable lengths: the flash_attn package, else the copy of it inside torch."""

    name = "FA2"

    def __init__(self) -> None:
        try:
            package = importlib.import_module("flash_attn")
            self.package = package.flash_attn_varlen_func
            self.note = f"FlashAttention2: package flash_attn {package.__version__}"
        except Exception:
            self.package = None
            self.note = f"FlashAttention2: the copy inside torch {torch.__version__} (aten::_flash_attention_forward)"

    def refuses(self, case: Case, dtype: torch.dtype, device: str, direction: str) -> str | None:
        if device != "cuda" or dtype not in HALF_TYPES:
            return "fp16 and bf16 on CUDA only"
        if case.bias != "none":
            return "no such bias"
        if case.num_targets or case.contextual_seq_len or case.min_full_attn_seq_len or case.global_prefix_len:
            return "no such mask"
        if case.dim_qk != case.dim_v or case.dim_qk > 256 or case.dim_qk % 8:
            return "head dimensions equal, a multiple of 8, up to 256"
        return None

    def bind(self, inputs: Inputs, case: Case) -> Bound:
        q, k, v = inputs.q, inputs.k, inputs.v
        keys = inputs.seq_offsets.int()
        offsets_q = inputs.options["seq_offsets_q"]
        queries = keys if offsets_q is None else offsets_q.int()
        longest_q = max(case.lengths if case.queries is None else case.queries)
        args = (q, k, v, queries, keys, longest_q, max(case.lengths))
        window = case.max_attn_len or None
        if self.package:
            sides = (-1, -1) if window is None else (window, 0 if case.causal else window)
            return lambda: self.package(*args, causal=case.causal, softmax_scale=case.alpha, window_size=sides), [
                q,
                k,
                v,
            ]
        sides = (
            {} if window is None else {"window_size_left": window, "window_size_right": 0 if case.causal else window}
        )
        forward = torch.ops.aten._flash_attention_forward
        return lambda: forward(*args, 0.0, case.causal, False, scale=case.alpha, **sides)[0], [q, k, v]


class Peer(Provider):
    """Another implementation of HSTU attention; `make_call(inputs, case)` gives the forward callable."""

    same_function = True

    def __init__(self, name: str, note: str, refuses: Callable[[Case], str | None], make_call: Callable) -> None:
        self.name, self.note, self._refuses, self._make_call = name, note, refuses, make_call

    def refuses(self, case: Case, dtype: torch.dtype, device: str, direction: str) -> str | None:
        if device != "cuda":
            return "CUDA only"
        if case.dim_qk != case.dim_v:
            return "equal head dimensions only"
        if case.queries is not None or case.scale is not None or case.global_prefix_len:
            return "not offered"
        return self._refuses(case)

    def bind(self, inputs: Inputs, case: Case) -> Bound:
        return self._make_call(inputs, case), [inputs.q, inputs.k, inputs.v]


def _alpha(case: Case) -> float:
    return case.dim_qk**-0.5 if case.alpha is None else case.alpha


def _meta_peers() -> list[Provider]:
    """Meta's generative_recommenders, one provider a kernel."""
    kernels = importlib.import_module("generative_recommenders.common").HammerKernel
    hstu_mha = importlib.import_module("generative_recommenders.ops.hstu_attention").hstu_mha

    def refuses(case: Case) -> str | None:
        if case.bias != "none" or case.target_group_size != 1 or isinstance(case.contextual_seq_len, tuple):
            return "no bias, target groups or context per sequence"
        return None

    def maker(kernel: object) -> Callable:
        def make_call(inputs: Inputs, case: Case) -> Callable[[], Tensor]:
            targets = inputs.options["num_targets"]
            options = {
                "max_seq_len": inputs.max_seq_len,
                "alpha": _alpha(case),
                "q": inputs.q,
                "k": inputs.k,
                "v": inputs.v,
                "seq_offsets": inputs.seq_offsets.long(),
                "causal": case.causal,
                "num_targets": None if targets is None else targets.long(),
                "max_attn_len": case.max_attn_len,
                "contextual_seq_len": case.contextual_seq_len,
                "min_full_attn_seq_len": case.min_full_attn_seq_len,
                "kernel": kernel,
            }
            return lambda: hstu_mha(**_accepted(hstu_mha, options))

        return make_call

    names = [x for x in ("TRITON", "CUDA") if hasattr(kernels, x)]
    note = "generative_recommenders.ops.hstu_attention.hstu_mha"
    return [Peer(f"Meta {x.title()}", f"{note}, {x}", refuses, maker(getattr(kernels, x))) for x in names]


def _nvidia_peers() -> list[Provider]:
    """NVIDIA's CUTLASS kernels, from FBGEMM or from recsys-examples."""
    try:
        module = importlib.import_module("fbgemm_gpu.experimental.hstu")
    except ImportError:
        module = importlib.import_module("hstu_attn")
    function = module.hstu_attn_varlen_func

    def refuses(case: Case) -> str | None:
        if case.dim_qk not in (32, 64, 128, 256):
            return "head dimensions 32, 64, 128, 256"
        if case.bias != "none" or case.min_full_attn_seq_len:
            return "not offered"
        if case.max_attn_len and (case.num_targets or case.contextual_seq_len):
            return "no window with targets or context"
        return None

    def make_call(inputs: Inputs, case: Case) -> Callable[[], Tensor]:
        offsets = inputs.seq_offsets.int()
        targets, context, size = inputs.options["num_targets"], case.contextual_seq_len, inputs.max_seq_len
        per_sequence = context if isinstance(context, tuple) else (context,) * len(case.lengths)
        contexts = torch.tensor(per_sequence, dtype=torch.int32, device=offsets.device) if context else None
        left = case.max_attn_len or -1
        options = {
            **dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k", "seq_offsets_q", "seq_offsets_k"), offsets),
            **dict.fromkeys(("seqused_q", "seqused_k")),
            **dict.fromkeys(("max_seqlen_q", "max_seqlen_k", "scaling_seqlen"), size),
            "num_contexts": contexts,
            "num_targets": None if targets is None else targets.int(),
            "target_group_size": case.target_group_size,
            "window_size": (left, 0 if case.causal else left),
            "alpha": _alpha(case),
        }
        accepted = _accepted(function, options)
        return lambda: function(inputs.q, inputs.k, inputs.v, **accepted)

    return [Peer("NVIDIA", f"{module.__name__}.hstu_attn_varlen_func", refuses, make_call)]


def _accepted(function: Callable, options: dict) -> dict:
    """Those options that this version of a peer knows by name."""
    parameters = inspect.signature(function).parameters
    if any(x.kind is x.VAR_KEYWORD for x in parameters.values()):
        return options
    return {x: y for x, y in options.items() if x in parameters}


PEERS = {"meta": _meta_peers, "nvidia": _nvidia_peers}


def own_backends() -> list[str | None]:
    """None is the library's own choice; the portable kernels are listed too where that choice is another."""
    info = hstu_ops.build_info()
    built = info.get("cuda_backends", "").split()
    built = built or ["sm80"] + (["sm90"] if "90a" in info.get("cuda_archs", "").split() else [])
    hopper = torch.cuda.get_device_capability()[0] == 9
    return [None, "sm80"] if "sm90" in built and hopper else [None]


def find(device: str, wanted: list[str] | None, backends: list[str] | None) -> tuple[list[Provider], list[str]]:
    """The providers for a device, and a line about each peer that is not there. `wanted` picks by name."""
    if device == "cpu":  # the instruction set is the process's, by HSTU_OPS_ISA
        choices = [None]
    else:
        choices = own_backends() if backends is None else [None if x == "default" else x for x in backends]
    found: list[Provider] = [OwnTf32() if x == "tf32" else Own(x) for x in choices]
    missing = []
    if device == "cuda":
        found.append(FlashAttention())
        for name, peers in PEERS.items():
            try:
                found += peers()
            except ImportError:
                missing.append(f"{name}: not installed")
            except Exception as error:
                missing.append(f"{name}: {first_line(error)}")
    found.append(Padded())
    if wanted is not None:
        names = {p: p.name.lower().split()[0] for p in found}
        unknown = {x.lower() for x in wanted} - set(names.values()) - set(PEERS)
        if unknown:
            raise ValueError(f"providers: expected some of {sorted(set(names.values()))}, got {sorted(unknown)}")
        found = [p for p in found if p.own or names[p] in {x.lower() for x in wanted}]
    return found, missing
