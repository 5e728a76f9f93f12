"""What torch must know of the staircase cache's operators: shapes, that there is no gradient, refusals."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnx import _capability, _operators

NAME = "staircase_attention"
NAMES = ("staircase_append_", "staircase_crop_", "staircase_dequantize", NAME)


def _arguments(name: str, args: tuple[Any, ...]) -> dict[str, Any]:
    """What the capability table asks for: the cache stands for key and value."""
    arguments = dict(zip(_operators._argument_names(name), args, strict=True))
    rows = arguments["tail"][:, :, 0, 0]
    return {"key": rows, "value": rows, "query": rows} | {k: x for k, x in arguments.items() if k != "state"}


def _refuse(name: str) -> None:
    def refuse(*args: Any) -> Any:
        arguments = _arguments(name, args)
        if name != NAME:
            arguments["query"] = arguments["key"]
        raise NotImplementedError(_capability.refusal(NAME, arguments))

    torch.library.impl(f"attnx::{name}", "CompositeExplicitAutograd", refuse)


def _fake_update(*args: Any) -> None:
    return None


def _fake_attention(query: Tensor, state: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    output = _operators._empty_rows(query, query.shape[-1])
    return output, query.new_empty(query.shape[:3], dtype=torch.float32)


def _fake_dequantize(
    state: Tensor, codes: Tensor, ranges: Tensor, tail: Tensor, first: int, count: int, *args: Any
) -> tuple[Tensor, Tensor]:
    shape = (*tail.shape[:2], count, tail.shape[-1])
    return tail.new_empty(shape), tail.new_empty(shape)


def _no_gradient(ctx: Any, *grads: Tensor) -> Any:
    raise NotImplementedError(f"{NAME}: no derivative; a cache serves inference")


def register() -> None:
    for name in NAMES:
        _refuse(name)
    torch.library.register_fake("attnx::staircase_append_", _fake_update)
    torch.library.register_fake("attnx::staircase_crop_", _fake_update)
    torch.library.register_fake("attnx::staircase_dequantize", _fake_dequantize)
    torch.library.register_fake(f"attnx::{NAME}", _fake_attention)
    torch.library.register_autograd(f"attnx::{NAME}", _no_gradient)
