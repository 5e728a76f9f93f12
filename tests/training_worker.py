"""Trains a module for a few steps and prints the losses as JSON: what test_training runs in processes of their own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import torch
from torch import nn

from attnx.nn import ProbabilisticAttention, SparseLinearAttention

EMBED_DIM, HEADS, LENGTH, STEPS = 64, 2, 300, 20

MODULES: dict[str, Callable[[], nn.Module]] = {
    "probabilistic": lambda: ProbabilisticAttention(EMBED_DIM, HEADS, density=0.6, is_causal=True),
    "probabilistic_topm": lambda: ProbabilisticAttention(EMBED_DIM, HEADS, mode="topm", block_size=(128, 128)),
    "probabilistic_sigmoid": lambda: ProbabilisticAttention(EMBED_DIM, HEADS, score="sigmoid", importance=True),
    "sparse_linear": lambda: SparseLinearAttention(EMBED_DIM, HEADS, critical=0.3, is_causal=True),
    "sparse_linear_sla2": lambda: SparseLinearAttention(
        EMBED_DIM, HEADS, critical=0.3, mix="sla2", linear_scope="noncritical", num_kv_heads=1, is_causal=True
    ),
}


def train(module: nn.Module) -> list[float]:
    """The losses of each step: the module learns the mean of the tokens so far, by bfloat16 attention."""
    x = torch.randn(2, LENGTH, EMBED_DIM)
    optimiser = torch.optim.AdamW(module.parameters(), lr=2e-2)
    count = torch.arange(1, LENGTH + 1)[:, None]
    losses = []
    for step in range(STEPS):
        torch.manual_seed(step)  # of the round
        with torch.autocast("cpu", torch.bfloat16):
            output = module(x)
        loss = (output.float() - x.cumsum(1) / count).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    print(json.dumps(train(MODULES[sys.argv[1]]())))
