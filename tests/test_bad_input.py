"""Wrong arguments are refused before any work: the message names the argument, what was expected and what came."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import attnx
from attnx._capability import dtype_name
from backends import Backend
from cases import DTYPES, OPERATORS, VARLEN_OPERATORS, Shape, pack, random_inputs
from compare import forward_backward

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Bad:
    """Arguments that replace the good ones, and what the message must say of them.

    Of query, key and value float32 stands for the dtype of the backend at hand, and of all tensors "cpu" for its
    device; "{dtype}" and "{device}" in the message stand for their names.
    """

    name: str
    arguments: Arguments
    argument: str
    expected: str
    got: str

    def __str__(self) -> str:
        return self.name

    def arguments_on(self, backend: Backend) -> Arguments:
        return {name: self._place(name, x, backend) for name, x in self.arguments.items()}

    @staticmethod
    def _place(name: str, x: Any, backend: Backend) -> Any:
        if not isinstance(x, Tensor):
            return x
        stands_for_dtype = name in ("query", "key", "value") and x.dtype == torch.float32
        dtype = backend.dtypes()[0] if stands_for_dtype else x.dtype
        device = backend.device if x.device.type == "cpu" else x.device
        memory = torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())
        return memory.to(device, dtype).as_strided(x.shape, x.stride(), x.storage_offset())

    def pattern(self, backend: Backend) -> str:
        names = {"dtype": dtype_name(backend.dtypes()[0]), "device": backend.device.type}
        expected, got = (re.sub(r"\{(\w+)\}", lambda m: names[m[1]], text) for text in (self.expected, self.got))
        return rf"^{self.argument}: expected .*{re.escape(expected)}.*, got .*{re.escape(got)}"


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


# The good call: batch 2, 4 query heads on 2 key heads, 5 queries, 6 keys, head_dim 8, value_dim 3.
GOOD = Shape(batch=2, heads=4, kv_heads=2, length_q=5, length_k=6, head_dim=8, value_dim=3)

DENSE = [
    Bad("query_rank", {"query": zeros(4, 5, 8)}, "query", "4 dimensions", "(4, 5, 8)"),
    Bad("key_rank", {"key": zeros(1, 2, 2, 6, 8)}, "key", "4 dimensions", "(1, 2, 2, 6, 8)"),
    Bad("value_rank", {"value": zeros(6, 3)}, "value", "4 dimensions", "(6, 3)"),
    Bad("key_batch", {"key": zeros(3, 2, 6, 8)}, "key", "(2, 2, 6, 8)", "(3, 2, 6, 8)"),
    Bad("key_head_dim", {"key": zeros(2, 2, 6, 9)}, "key", "(2, 2, 6, 8)", "(2, 2, 6, 9)"),
    Bad("value_batch", {"value": zeros(3, 2, 6, 3)}, "value", "(2, 2, 6, 3)", "(3, 2, 6, 3)"),
    Bad("value_heads", {"value": zeros(2, 4, 6, 3)}, "value", "(2, 2, 6, 3)", "(2, 4, 6, 3)"),
    Bad("value_length", {"value": zeros(2, 2, 7, 3)}, "value", "(2, 2, 6, 3)", "(2, 2, 7, 3)"),
    Bad("heads_no_multiple", {"query": zeros(2, 3, 5, 8)}, "query", "multiple of the 2 heads of key", "3"),
    Bad(
        "fewer_query_heads",
        {"query": zeros(2, 3, 5, 8), "key": zeros(2, 4, 6, 8), "value": zeros(2, 4, 6, 3)},
        "query",
        "multiple of the 4",
        "3",
    ),
    Bad("no_key_heads", {"key": zeros(2, 0, 6, 8), "value": zeros(2, 0, 6, 3)}, "query", "multiple of the 0", "4"),
    Bad("no_query_heads", {"query": zeros(2, 0, 5, 8)}, "query", "multiple", "0"),
    Bad("key_dtype", {"key": zeros(2, 2, 6, 8, dtype=torch.float64)}, "key", "{dtype}", "float64"),
    Bad("value_dtype", {"value": zeros(2, 2, 6, 3, dtype=torch.int8)}, "value", "{dtype}", "int8"),
    Bad("key_device", {"key": zeros(2, 2, 6, 8, device="meta")}, "key", "{device}", "meta"),
    Bad("value_device", {"value": zeros(2, 2, 6, 3, device="meta")}, "value", "{device}", "meta"),
    Bad("query_device", {"query": zeros(2, 4, 5, 8, device="meta")}, "key", "meta", "{device}"),
    Bad("query_stride", {"query": zeros(2, 4, 8, 5).mT}, "query", "contiguous last dimension", "stride 5"),
    Bad("key_stride", {"key": zeros(2, 2, 6, 16)[..., ::2]}, "key", "contiguous last dimension", "stride 2"),
    Bad("value_stride", {"value": zeros(2, 2, 6, 1).expand(2, 2, 6, 3)}, "value", "contiguous", "stride 0"),
    Bad("head_dim_0", {"query": zeros(2, 4, 5, 0), "key": zeros(2, 2, 6, 0)}, "query", "head_dim from 1 to 256", "0"),
    Bad("head_dim_257", {"query": zeros(2, 4, 5, 257), "key": zeros(2, 2, 6, 257)}, "query", "head_dim from 1", "257"),
    Bad("value_dim_0", {"value": zeros(2, 2, 6, 0)}, "value", "value_dim from 1 to 256", "0"),
    Bad("value_dim_257", {"value": zeros(2, 2, 6, 257)}, "value", "value_dim from 1 to 256", "257"),
    Bad("window_left", {"window": (-2, 3)}, "window", "-1", "(-2, 3)"),
    Bad("window_right", {"window": (3, -7)}, "window", "-1", "(3, -7)"),
    Bad("window_right_if_causal", {"window": (3, -7), "is_causal": True}, "window", "-1", "(3, -7)"),
    Bad("scale_nan", {"scale": float("nan")}, "scale", "finite", "nan"),
    Bad("scale_beyond_float32", {"scale": 1e39}, "scale", "range of float32", "1e+39"),
    Bad("scale_far_below_float32", {"scale": -1e300}, "scale", "range of float32", "-1e+300"),
    Bad("slopes_length", {"alibi_slopes": zeros(3)}, "alibi_slopes", "(4,)", "(3,)"),
    Bad("slopes_rank", {"alibi_slopes": zeros(1, 4)}, "alibi_slopes", "(4,)", "(1, 4)"),
    Bad("slopes_dtype", {"alibi_slopes": zeros(4, dtype=torch.float16)}, "alibi_slopes", "float32", "float16"),
    Bad("slopes_device", {"alibi_slopes": zeros(4, device="meta")}, "alibi_slopes", "{device}", "meta"),
]

SIGMOID = [
    Bad("bias_length", {"bias": zeros(2)}, "bias", "(4,)", "(2,)"),
    Bad("bias_matrix", {"bias": zeros(5, 6)}, "bias", "(4,)", "(5, 6)"),
    Bad("bias_dtype", {"bias": zeros(4, dtype=torch.bfloat16)}, "bias", "float32", "bfloat16"),
    Bad("bias_integer", {"bias": zeros(4, dtype=torch.int64)}, "bias", "float32", "int64"),
    Bad("bias_device", {"bias": zeros(4, device="meta")}, "bias", "{device}", "meta"),
    Bad("bias_rule", {"bias": "column"}, "bias", '"row"', "'column'"),
    Bad("bias_bool", {"bias": True}, "bias", "float", "True"),
    Bad("bias_nan", {"bias": float("nan")}, "bias", "number", "nan"),
]


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


# The good call: sequences of 2 and 3 queries, and of 4 and 2 keys.
VARLEN = [
    Bad("query_rank", {"query": zeros(1, 5, 4, 16)}, "query", "3 dimensions", "(1, 5, 4, 16)"),
    Bad("value_tokens", {"value": zeros(5, 2, 24)}, "value", "(6, 2, 24)", "(5, 2, 24)"),
    Bad("key_heads", {"key": zeros(6, 3, 16)}, "query", "multiple of the 3 heads of key", "4"),
    Bad("cu_q_falls", {"cu_seqlens_q": int32(0, 6, 5)}, "cu_seqlens_q", "rising", "5 after 6 at index 2"),
    Bad("cu_k_falls", {"cu_seqlens_k": int32(0, 8, 6)}, "cu_seqlens_k", "rising", "6 after 8 at index 2"),
    Bad("cu_q_start", {"cu_seqlens_q": int32(1, 2, 5)}, "cu_seqlens_q", "start at 0", "1"),
    Bad("cu_k_start", {"cu_seqlens_k": int32(-1, 4, 6)}, "cu_seqlens_k", "start at 0", "-1"),
    Bad("cu_q_end", {"cu_seqlens_q": int32(0, 2, 4)}, "cu_seqlens_q", "end at", "4"),
    Bad("cu_k_end", {"cu_seqlens_k": int32(0, 4, 7)}, "cu_seqlens_k", "end at", "7"),
    Bad("cu_q_int16", {"cu_seqlens_q": int32(0, 2, 5).short()}, "cu_seqlens_q", "int32", "int16"),
    Bad("cu_k_float", {"cu_seqlens_k": int32(0, 4, 6).float()}, "cu_seqlens_k", "int32", "float32"),
    Bad("cu_q_device", {"cu_seqlens_q": int32(0, 2, 5).to("meta")}, "cu_seqlens_q", "{device}", "meta"),
    Bad("cu_q_rank", {"cu_seqlens_q": int32(0, 2, 5)[None]}, "cu_seqlens_q", "(batch + 1,)", "(1, 3)"),
    Bad("cu_k_empty", {"cu_seqlens_k": int32()}, "cu_seqlens_k", "(batch + 1,)", "(0,)"),
    Bad("cu_k_stride", {"cu_seqlens_k": int32(0, 9, 4, 9, 6)[::2]}, "cu_seqlens_k", "contiguous", "stride 2"),
    Bad("batches_differ", {"cu_seqlens_k": int32(0, 4, 5, 6)}, "cu_seqlens_k", "(3,)", "(4,)"),
    Bad("max_q_small", {"max_seqlen_q": 2}, "max_seqlen_q", "at least the longest sequence, 3", "2"),
    Bad("max_k_small", {"max_seqlen_k": 3}, "max_seqlen_k", "at least the longest sequence, 4", "3"),
    Bad("max_q_negative", {"max_seqlen_q": -1}, "max_seqlen_q", "at least the longest sequence, 3", "-1"),
    Bad("window", {"window": (-3, -1)}, "window", "-1", "(-3, -1)"),
]


def dense_arguments(backend: Backend) -> Arguments:
    return dict(random_inputs(GOOD, backend.dtypes()[0], backend.device)[0])


def varlen_arguments(backend: Backend) -> Arguments:
    inputs, _, sizes = pack(([2, 3], [4, 2]), backend.dtypes()[0], backend.device)
    return inputs | sizes


@pytest.mark.parametrize("bad", DENSE, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_dense(operator: str, bad: Bad, backend: Backend) -> None:
    with pytest.raises(RuntimeError, match=bad.pattern(backend)):
        getattr(attnx, operator)(**dense_arguments(backend) | bad.arguments_on(backend))


@pytest.mark.parametrize("bad", SIGMOID, ids=str)
def test_sigmoid_bias(bad: Bad, backend: Backend) -> None:
    with pytest.raises(RuntimeError, match=bad.pattern(backend)):
        attnx.sigmoid_attention(**dense_arguments(backend) | bad.arguments_on(backend))
    with pytest.raises(RuntimeError, match=bad.pattern(backend)):
        attnx.sigmoid_attention_varlen(**varlen_arguments(backend) | bad.arguments_on(backend))


@pytest.mark.parametrize("bad", VARLEN, ids=str)
@pytest.mark.parametrize("operator", VARLEN_OPERATORS)
def test_varlen(operator: str, bad: Bad, backend: Backend) -> None:
    with pytest.raises(RuntimeError, match=bad.pattern(backend)):
        getattr(attnx, operator)(**varlen_arguments(backend) | bad.arguments_on(backend))


NUMBERS = [
    Bad("slopes_nan", {"alibi_slopes": torch.tensor([0.0, math.nan, 0, 0])}, "alibi_slopes", "finite", "nan at 1"),
    Bad("slopes_inf", {"alibi_slopes": torch.tensor(math.inf)}, "alibi_slopes", "finite", "inf at 0"),
    Bad(
        "slopes_strided",
        {"alibi_slopes": torch.tensor([0, 9, 0, 9, 0, 9, -math.inf, 9])[::2]},
        "alibi_slopes",
        "",
        "-inf",
    ),
    Bad("bias_nan", {"bias": torch.tensor([0.0, 0, 0, math.nan])}, "bias", "number for each head", "nan at 3"),
    Bad("bias_inf", {"bias": torch.tensor([math.inf, 0.0, 0, 0])}, "bias", "number for each head", "inf at 0"),
    Bad("sink_nan", {"sink": torch.tensor([0.0, 0, math.nan, 0])}, "sink", "number for each head", "nan at 2"),
]


@pytest.mark.backends("cpu", "emulated")  # what lies on a GPU is read under ATTNX_DEBUG=1 alone
@pytest.mark.parametrize("bad", NUMBERS, ids=str)
def test_numbers_of_heads(bad: Bad, backend: Backend) -> None:
    attention = attnx.sigmoid_attention if "bias" in bad.arguments else attnx.softmax_attention
    with pytest.raises(RuntimeError, match=bad.pattern(backend)):
        attention(**dense_arguments(backend) | bad.arguments_on(backend))


@pytest.mark.backends("cpu")
def test_scale_has_the_range_of_its_dtype(backend: Backend) -> None:
    x = torch.full((1, 1, 4, 8), 1e-200, dtype=torch.float64)
    assert attnx.softmax_attention(x, x, x, scale=1e300).isfinite().all()


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("operator", OPERATORS)
def test_checks_hold_under_autograd(operator: str, requires_grad: bool, backend: Backend) -> None:
    arguments = dense_arguments(backend)
    arguments["query"].requires_grad_(requires_grad)
    with pytest.raises(RuntimeError, match=r"^key: expected"):
        getattr(attnx, operator)(**arguments | {"key": arguments["key"][..., :1]})


@pytest.mark.parametrize("other", [torch.int64, torch.int8, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_dtype_without_a_kernel(operator: str, other: torch.dtype, backend: Backend) -> None:
    arguments = {name: x.to(other) for name, x in dense_arguments(backend).items()}
    expected = ", ".join(map(dtype_name, backend.dtypes()))
    with pytest.raises(RuntimeError, match=rf"^query: expected one of {expected} .*, got {dtype_name(other)}"):
        getattr(attnx, operator)(**arguments)


@pytest.mark.parametrize("operator", OPERATORS)
def test_unsupported_keywords(operator: str, backend: Backend) -> None:
    with pytest.raises(TypeError, match="need_weights"):
        getattr(attnx, operator)(**dense_arguments(backend), need_weights=True)


def redispatch(operator: str, key: str, query: Tensor, other: Tensor) -> Any:
    """What awaits the tensors of a dispatch key, reached with any tensors."""
    options = (None, None, "length", 0.0) if operator == "sigmoid_attention" else (None, None)
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    kernel = getattr(torch.ops.attnx, operator).default
    terms = (None, None, None, None, None, None, 0.0, None, None)
    return kernel.redispatch(keys, query, other, other, None, None, *options, *terms, None, False, -1, -1, 0)


@pytest.mark.parametrize("operator", OPERATORS)
def test_device_without_a_kernel(operator: str) -> None:
    x = zeros(1, 2, 4, 8, device="meta")
    with pytest.raises(
        NotImplementedError, match=r"(?s)required: .*backend meta.*supported: .*cpu.*missing: .*backend meta"
    ):
        redispatch(operator, "XPU", x, x)


@pytest.mark.parametrize("operator", OPERATORS)
def test_kernels_check_devices_themselves(operator: str, backend: Backend) -> None:
    """Where no Python function stands before them."""
    query = dense_arguments(backend)["query"]
    with pytest.raises(
        RuntimeError, match=rf"^key: expected a tensor on {query.device} like query, got one on a device"
    ):
        redispatch(operator, backend.device.type.upper(), query, query.to("meta"))


@pytest.mark.parametrize("window", [(2**62, 2**62), (2**63 - 1, 2**63 - 1), (-1, 2**63 - 1)], ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_enormous_window_is_no_bound(operator: str, window: tuple[int, int], backend: Backend) -> None:
    arguments = dense_arguments(backend)
    assert torch.equal(getattr(attnx, operator)(**arguments, window=window), getattr(attnx, operator)(**arguments))


@pytest.mark.parametrize(("arguments", "good"), [(dense_arguments, DENSE + SIGMOID), (varlen_arguments, VARLEN)])
def test_the_good_call_is_good(arguments: Callable[[Backend], Arguments], good: list[Bad], backend: Backend) -> None:
    """Else the tests above would pass for the wrong reason."""
    name = "sigmoid_attention" + ("_varlen" if good is VARLEN else "")
    assert getattr(attnx, name)(**arguments(backend)).isfinite().all()


EMPTY = {
    "batch_0": Shape(batch=0),
    "no_queries": Shape(length_q=0),
    "no_keys": Shape(length_k=0),
    "nothing": Shape(length_q=0, length_k=0),
}


@pytest.mark.parametrize("shape", EMPTY.values(), ids=EMPTY)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_empty_gives_zeros(operator: str, dtype: torch.dtype, shape: Shape, device: torch.device) -> None:
    inputs, grad_output = random_inputs(shape, dtype, device)
    results = forward_backward(getattr(attnx, operator), inputs, grad_output, is_causal=True)
    expected = {"output": grad_output} | {f"grad_{name}": x for name, x in inputs.items()}
    for name, result in results.items():
        assert torch.equal(result, torch.zeros_like(expected[name])), name


def test_logsumexp_of_no_keys(dtype: torch.dtype, device: torch.device) -> None:
    inputs, _ = random_inputs(Shape(length_k=0), dtype, device)
    _, logsumexp = attnx.softmax_attention(**inputs, return_logsumexp=True)
    assert torch.equal(logsumexp, torch.full((1, 2, 33), -math.inf, device=device))


def test_pattern_is_strict(backend: Backend) -> None:
    """A message that leaves out what came does not pass."""
    pattern = DENSE[0].pattern(backend)
    assert re.search(pattern, "query: expected 4 dimensions, got shape (4, 5, 8)")
    assert not re.search(pattern, "query: expected 4 dimensions")
    assert not re.search(pattern, "expected query to have 4 dimensions, got shape (4, 5, 8)")
