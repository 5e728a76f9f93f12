"""Trains a module for a few steps and prints the losses as JSON: what test_training runs in processes of their own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attnx.nn import ProbabilisticAttention, RoutingAttention, SparseLinearAttention

EMBED_DIM, HEADS, LENGTH, STEPS = 64, 2, 300, 10


class Routed(nn.Module):
    """RoutingAttention with memory, and with what its commitment costs: plain, checkpointed or compiled."""

    def __init__(self, form: str = "plain", **options: Any) -> None:
        super().__init__()
        sizes: dict[str, Any] = {"num_memory": 3, "decay": 0.9, "commitment": 0.1, "is_causal": True, "window": 64}
        self.inner = RoutingAttention(EMBED_DIM, HEADS, 6, **(sizes | options))
        self.form = form
        self.call: Any = self.inner
        if form == "compiled":
            self.call = torch.compile(self.inner, fullgraph=True, backend="aot_eager")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.form == "checkpointed":
            return checkpoint(self.inner, x, return_loss=True, use_reentrant=False)
        return self.call(x, return_loss=True)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "probabilistic": lambda: ProbabilisticAttention(EMBED_DIM, HEADS, density=0.6, is_causal=True),
    "probabilistic_topm": lambda: ProbabilisticAttention(EMBED_DIM, HEADS, mode="topm", block_size=(128, 128)),
    "probabilistic_sigmoid": lambda: ProbabilisticAttention(EMBED_DIM, HEADS, score="sigmoid", importance=True),
    "sparse_linear": lambda: SparseLinearAttention(EMBED_DIM, HEADS, critical=0.3, is_causal=True),
    "sparse_linear_sla2": lambda: SparseLinearAttention(
        EMBED_DIM, HEADS, critical=0.3, mix="sla2", linear_scope="noncritical", num_kv_heads=1, is_causal=True
    ),
    "routing": Routed,
    "routing_compiled": lambda: Routed("compiled", num_kv_heads=1, num_local_heads=0),
    "routing_argmax": lambda: Routed(routing="argmax", normalize_qk=True),
    "routing_argmax_checkpointed": lambda: Routed("checkpointed", routing="argmax"),
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
            output, other = output if isinstance(output, tuple) else (output, 0.0)
        loss = (output.float() - x.cumsum(1) / count).square().mean() + other
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
