"""What is special to the operator that draws blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnx._operators.schema import Arguments


def lists(
    keep: Tensor,
    batch: int,
    heads: int,
    length_q: int,
    length_k: int,
    block_q: int,
    block_k: int,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    rows, width = -(-length_q // block_q), -(-length_k // block_k)
    counts = keep.new_empty((batch, heads, rows), dtype=torch.int32)
    return counts, keep.new_empty((batch, heads, rows, width), dtype=torch.int32)


def refusal(name: str, arguments: Arguments) -> str:
    device = arguments["keep"].device.type
    return (
        f"{name}: no kernel for this call.\n"
        f"  required:  backend {device}\n"
        "  supported: backends cpu, cuda\n"
        f"  missing:   backend {device}; draw the lists on the CPU and move them"
    )
