"""What every module with a state keeps: pieces and single tokens give what the whole sequence gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attnx.nn.stateful import StatefulAttention


def check_results(output: Tensor, expected: Tensor, inputs: Sequence[Tensor]) -> None:
    """Two ways to the same output have the same gradients."""
    torch.testing.assert_close(output, expected)
    grads = [torch.autograd.grad(y.square().sum(), inputs) for y in (output, expected)]
    torch.testing.assert_close(*grads)


def by_pieces(layer: StatefulAttention, x: Tensor, sizes: list[int]) -> Tensor:
    state, outputs = None, []
    for piece in x.split(sizes, 1):
        output, state = layer.prefill(piece, state)
        outputs.append(output)
    return torch.cat(outputs, 1)


def trained(layer: nn.Module) -> list[nn.Parameter]:
    return [p for p in layer.parameters() if p.requires_grad]


def check_steps(layer: StatefulAttention, x: Tensor, prompt: int, **close: Any) -> None:
    """A prompt is followed by single tokens; a state that was gone on from is as it was, and gives the same again."""
    with torch.no_grad():
        expected = layer(x)
        outputs, state = layer.prefill(x[:, :prompt])
        kept = tuple(y.clone() for y in state)
        first = layer.step(x[:, prompt], state)
        assert all(torch.equal(y, z) for y, z in zip(state, kept, strict=True))
        assert torch.equal(first[0], layer.step(x[:, prompt], state)[0])
        steps = []
        for token in x[:, prompt:].unbind(1):
            output, state = layer.step(token, state)
            steps.append(output)
    torch.testing.assert_close(torch.cat((outputs, torch.stack(steps, 1)), 1), expected, **close)
