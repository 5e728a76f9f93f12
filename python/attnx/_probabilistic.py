"""What torch must know of the probabilistic operators: shapes, gradients, batching, autocast, refusals."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnx import _operators

NAME = "probabilistic_attention"
LISTS = "probabilistic_block_lists"


def _fake_lists(
    keep: Tensor,
    seed: Tensor,
    offset: Tensor,
    batch: int,
    heads: int,
    length_q: int,
    length_k: int,
    block_q: int,
    block_k: int,
    blocks_per_row: int,
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    rows, width = -(-length_q // block_q), -(-length_k // block_k)
    counts = keep.new_empty((batch, heads, rows), dtype=torch.int32)
    return counts, keep.new_empty((batch, heads, rows, width), dtype=torch.int32)


def _refuse_lists(keep: Tensor, *args: Any) -> Any:
    raise NotImplementedError(
        f"{LISTS}: no kernel for this call.\n"
        f"  required:  backend {keep.device.type}\n"
        "  supported: backend cpu\n"
        f"  missing:   backend {keep.device.type}; draw the lists on the CPU and move them"
    )


def register() -> None:
    for name in (NAME, f"{NAME}_backward"):
        _operators.register_refusal(name)
        _operators.register_fake(name)
        # A block's draw depends on the place of its head in the batch: more heads for the examples would draw others.
        _operators.register_looping_vmap(name)
    _operators.register_autograd(NAME)
    _operators.refuse_double_backward(f"{NAME}_backward")
    for device_type in ("cpu", "cuda"):
        _operators.register_autocast(NAME, device_type)
    torch.library.register_fake(f"attnx::{LISTS}", _fake_lists)
    torch.library.impl(f"attnx::{LISTS}", "CompositeExplicitAutograd", _refuse_lists)
