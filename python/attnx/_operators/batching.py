"""vmap: the examples become more heads of one call, or each is a call of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor

from attnx._operators.description import Operator
from attnx._operators.schema import Signature, signature
from attnx._operators.shapes import OF_ROWS
from attnx._operators.terms import BY_HEAD, TENSORS

Rule: TypeAlias = Callable[..., tuple[Any, Any]]


def register(row: Operator, name: str) -> None:
    of = signature(name)
    rule = _refusal(name, of) if of.written else _by_heads(of) if row.vmap == "heads" else _by_looping(of)
    torch.library.register_vmap(f"attnx::{name}", rule)


def _refusal(name: str, of: Signature) -> Rule:
    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> NoReturn:
        raise NotImplementedError(f"{name}: no vmap, as it changes {' and '.join(sorted(of.written))} in place")

    return rule


def _by_heads(of: Signature) -> Rule:
    """Examples are more heads, so what is summed or shared by head stays apart between the examples.

    What dropout draws for a weight depends on the place of its head, so examples of it are calls of their own.
    """
    packed = "cu_seqlens_q" in of.arguments
    by_looping = _by_looping(of)

    # Examples share these, as more heads do.
    shared = {"cu_seqlens_q", "cu_seqlens_k", "seqused_k", "leftpad_k"}

    def heads_at(tensor: str) -> int:
        """The dimension that counts heads, in a tensor of this name."""
        kind = tensor.removeprefix("grad_").removeprefix("tangent_")
        if kind in BY_HEAD:
            return 0 if packed else 1
        return 0 if kind in of.optional or (kind in OF_ROWS and packed) else 1

    def fold(tensor: str, x: Any, dim: int | None, examples: int, heads: int) -> Any:
        if not isinstance(x, Tensor) or (dim is None and (x.dim() == 0 or tensor in shared)):
            return x
        if tensor in shared:
            raise NotImplementedError(f"{tensor}: expected one tensor for all examples of vmap, got a batch of them")
        x = x.expand(examples, *x.shape) if dim is None else x.movedim(dim, 0)
        if x.dim() == 1:  # one number for all heads of an example
            x = x[:, None].expand(-1, heads)
        at = heads_at(tensor)
        x = x.movedim(0, at)
        if x.shape[at + 1] == 1 and tensor in BY_HEAD:  # one for all heads
            x = x.expand(*x.shape[: at + 1], heads, *x.shape[at + 2 :])
        return x.flatten(at, at + 1)

    def unfold(result: str, x: Tensor, examples: int) -> tuple[Tensor, int]:
        """The examples of a result, and the dimension that counts them; a gradient that is not wanted is empty."""
        if x.dim() == 1 and result.removeprefix("grad_") in TENSORS:
            return x.expand(examples, *x.shape), 0
        at = heads_at(result)
        return x.unflatten(at, (examples, -1)), at

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        if of.bind(args).get("dropout_p"):
            return by_looping(info, in_dims, *args)
        query, dim = args[of.arguments.index("query")], in_dims[of.arguments.index("query")]
        heads = (query if dim is None else query.movedim(dim, 0)[0]).shape[1]
        folded = (
            fold(tensor, x, dim, info.batch_size, heads)
            for tensor, x, dim in zip(of.arguments, args, in_dims, strict=True)
        )
        results = of.operator(*folded)
        results = results if isinstance(results, tuple) else (results,)
        unfolded = [unfold(result, x, info.batch_size) for result, x in zip(of.results, results, strict=True)]
        if len(unfolded) == 1:
            return unfolded[0]
        several, dims = zip(*unfolded, strict=True)
        return several, dims

    return rule


def _by_looping(of: Signature) -> Rule:
    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        def example(n: int) -> list[Any]:
            return [x.select(dim, n) if isinstance(dim, int) else x for x, dim in zip(args, in_dims, strict=True)]

        results = [of.operator(*example(n)) for n in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        if isinstance(results[0], int):  # it follows from numbers, which all examples share
            return results[0], None
        stacked = tuple(torch.stack(result) for result in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    return rule
