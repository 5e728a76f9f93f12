"""Arguments as operators take them, from what users pass; what does not fit is refused by the argument's name.

Numbers stay what they are where torch.compile has symbols for them.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor


def refuse(name: str, expected: str, got: object) -> NoReturn:
    raise RuntimeError(f"{name}: expected {expected}, got {describe(got)}")


def describe(x: object) -> str:
    """Shows numbers and strings as they are, and tells of other things what they are."""
    if isinstance(x, Tensor):
        return f"a tensor of shape {tuple(x.shape)}"
    if x is None or isinstance(x, (bool, int, float, str)):
        return repr(x)
    if isinstance(x, (list, tuple)) and len(x) <= 4 and all(isinstance(y, (bool, int, float, str)) for y in x):
        return repr(x)
    return f"{type(x).__module__}.{type(x).__qualname__}".removeprefix("builtins.")


def tensors(**given: object) -> None:
    """Checks that each is a tensor whose rows lie in memory by strides."""
    for name, x in given.items():
        if not isinstance(x, Tensor):
            refuse(name, "a tensor", x)
        if x.is_nested:
            raise RuntimeError(
                f"{name}: expected a tensor, got a nested one; sigmoid_attention, softmax_attention and "
                "sparse_linear_attention take those of layout torch.jagged"
            )


def optional_tensors(**given: object) -> None:
    tensors(**{name: x for name, x in given.items() if x is not None})


def has_values(x: Tensor) -> bool:
    """Whether looking at the values waits for no device, and whether there are some: tracing has none."""
    untraced = not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() == 0
    return x.device.type == "cpu" and x.numel() > 0 and untraced


def needs_no_gradient(name: str, x: Tensor, why: str) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"{name}: expected a tensor that needs no gradient, as {why}, got one that does")


def integer(name: str, x: Any, low: int | None = None, high: int | None = None, expected: str | None = None) -> int:
    """Takes any integer, those of numpy too, within bounds that are included."""
    bounds = "an int" if low is None else f"an int, {low} or more" if high is None else f"an int from {low} to {high}"
    bounds = expected or bounds
    if isinstance(x, (int, torch.SymInt)) and not isinstance(x, bool):
        number = x
    elif isinstance(x, (bool, Tensor)) or not hasattr(x, "__index__"):
        refuse(name, bounds, x)
    else:
        number = operator.index(x)
    if (low is not None and number < low) or (high is not None and number > high):
        refuse(name, bounds, x)
    return number


def number(name: str, x: Any, expected: str = "a number") -> float:
    """Takes any real number, those of numpy too, but no tensor."""
    if isinstance(x, (int, float, torch.SymInt, torch.SymFloat)) and not isinstance(x, bool):
        return x
    if isinstance(x, (bool, Tensor, str)) or not hasattr(x, "__float__") or getattr(x, "shape", ()) != ():
        refuse(name, expected, x)
    return float(x)


def share(name: str, x: Any, expected: str = "a share of the blocks from 0 to 1") -> float:
    value = number(name, x, expected)
    if not 0 <= value <= 1:
        refuse(name, expected, x)
    return value


def flag(name: str, x: Any) -> bool:
    if not isinstance(x, bool):
        refuse(name, "True or False", x)
    return x


def pair(name: str, x: Any, expected: str) -> tuple[Any, Any]:
    if not isinstance(x, Sequence) or isinstance(x, str) or len(x) != 2:
        refuse(name, expected, x)
    first, second = x
    return first, second


def block_size(x: Any) -> tuple[int, int]:
    block_q, block_k = pair("block_size", x, "a pair (queries, keys)")
    for block in (block_q, block_k):
        if isinstance(block, (bool, float, Tensor)) or not hasattr(block, "__index__") or block not in (64, 128):
            refuse("block_size", "64 or 128 on each side", x)
    return operator.index(block_q), operator.index(block_k)


def with_scale(query: Tensor, scale: Any) -> tuple[Tensor, float | None]:
    """Returns the query and the scale that operators take.

    A tensor as scale is a factor of the query, of which autograd makes its gradient; the operator's own is 1 then.
    """
    if scale is None:
        return query, None
    if not isinstance(scale, Tensor):
        return query, number("scale", scale, "None, a number, or a tensor of shape () or (heads,)")
    heads = query.shape[1] if query.dim() > 1 else 0
    if not scale.is_floating_point() or scale.shape not in ((), (heads,)):
        raise RuntimeError(
            f"scale: expected None, a number, or a floating point tensor of shape () or ({heads},), got {scale.dtype} "
            f"of shape {tuple(scale.shape)}"
        )
    if scale.device != query.device:
        raise RuntimeError(f"scale: expected a tensor on {query.device} like query, got one on {scale.device}")
    factor = scale.to(torch.float64 if query.dtype == torch.float64 else torch.float32)
    if scale.dim():
        factor = factor.view(-1, *(1 for _ in query.shape[2:]))
    return (query * factor).to(query.dtype), 1.0


def window(x: Any) -> tuple[int, int]:
    """Returns (left, right), -1 for no bound, for which users may write None, or None in the place of the pair."""
    if x is None:
        return -1, -1
    left, right = pair("window", x, "None or a pair (left, right)")
    return (
        -1 if left is None else integer("window", left),
        -1 if right is None else integer("window", right),
    )


def key_lengths(seqused_k: Any, leftpad_k: Any, query: Tensor, key: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Operators take both or neither: the one that is not given says that nothing is unused on its side."""
    optional_tensors(seqused_k=seqused_k, leftpad_k=leftpad_k)
    if seqused_k is None and leftpad_k is None:
        return None, None
    if key.dim() != 4:
        return seqused_k, leftpad_k
    if seqused_k is None:
        seqused_k = torch.full(query.shape[:1], key.shape[2], dtype=torch.int32, device=leftpad_k.device)
    elif leftpad_k is None:
        leftpad_k = torch.zeros(query.shape[:1], dtype=torch.int32, device=seqused_k.device)
    return seqused_k, leftpad_k


def packing(
    cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: Any, max_seqlen_k: Any
) -> tuple[Tensor, Tensor, int, int]:
    """Offsets of int64 become int32, in which kernels read them."""
    tensors(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    of_q, of_k = (x.to(torch.int32) if x.dtype == torch.int64 else x for x in (cu_seqlens_q, cu_seqlens_k))
    return (
        of_q,
        of_k,
        integer("max_seqlen_q", max_seqlen_q),
        integer("max_seqlen_k", max_seqlen_k),
    )


def text(name: str, x: Any) -> str:
    """Operators know which strings there are."""
    if not isinstance(x, str):
        refuse(name, "a string", x)
    return x
