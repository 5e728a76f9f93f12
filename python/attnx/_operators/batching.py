"""vmap: the examples become more heads of one call, or each is a call of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor

from attnx._operators.description import Operator
from attnx._operators.schema import Signature, signature

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
    """Examples are more heads, so what is summed or shared by head stays apart between the examples."""
    packed = "cu_seqlens_q" in of.arguments

    # Examples share these, as more heads do.
    shared = {"cu_seqlens_q", "cu_seqlens_k", "seqused_k", "leftpad_k"}

    def heads_at(tensor: str) -> int:
        """The dimension that counts heads, in a tensor of this name."""
        kind = tensor.removeprefix("grad_")
        return 0 if kind in of.optional or (kind == "logsumexp" and packed) else 1

    def fold(tensor: str, x: Any, dim: int | None, examples: int, heads: int) -> Any:
        if not isinstance(x, Tensor) or (dim is None and (x.dim() == 0 or tensor in shared)):
            return x
        if tensor in shared:
            raise NotImplementedError(f"{tensor}: expected one tensor for all examples of vmap, got a batch of them")
        x = x.expand(examples, *x.shape) if dim is None else x.movedim(dim, 0)
        if x.dim() == 1:  # one number for all heads of an example
            x = x[:, None].expand(-1, heads)
        at = heads_at(tensor)
        return x.movedim(0, at).flatten(at, at + 1)

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        query, dim = args[of.arguments.index("query")], in_dims[of.arguments.index("query")]
        heads = (query if dim is None else query.movedim(dim, 0)[0]).shape[1]
        folded = (
            fold(tensor, x, dim, info.batch_size, heads)
            for tensor, x, dim in zip(of.arguments, args, in_dims, strict=True)
        )
        results = of.operator(*folded)
        results = results if isinstance(results, tuple) else (results,)
        dims = tuple(heads_at(result) for result in of.results)
        results = tuple(x.unflatten(dim, (info.batch_size, -1)) for x, dim in zip(results, dims, strict=True))
        return (results, dims) if len(results) > 1 else (results[0], dims[0])

    return rule


def _by_looping(of: Signature) -> Rule:
    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        def example(n: int) -> list[Any]:
            return [x.select(dim, n) if isinstance(dim, int) else x for x, dim in zip(args, in_dims, strict=True)]

        results = [of.operator(*example(n)) for n in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = tuple(torch.stack(result) for result in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    return rule
