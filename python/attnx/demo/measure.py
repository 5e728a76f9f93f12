"""What the kernels do on their own: time beside scaled_dot_product_attention, and error against float64."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from attnx.demo import DemoError
from attnx.demo.attentions import BASELINE, Attention

TIMED_SHAPE = (1, 8, 4096, 64)
CHECKED_SHAPE = (1, 4, 512, 64)
TRIED_LENGTH = 256  # enough blocks to leave some out
ROUNDS = 7


def kernel_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def require_kernels(attentions: Sequence[Attention], device: torch.device, head_dim: int) -> None:
    """Raises DemoError where an attention cannot be trained on ``device``."""
    for attention in attentions:
        try:
            query, key, value = (x.requires_grad_() for x in _inputs((1, 1, TRIED_LENGTH, head_dim), device))
            total = attention.function(query, key, value).sum()
            total.backward()
            total.item()
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise DemoError(
                f"--device: expected one that {attention.label} runs on, got {device} ({reason}); "
                "--attention NAME chooses others"
            ) from error


def largest_error(attention: Attention, device: torch.device) -> float:
    """The largest difference of any output from the float64 definition, for standard normal inputs."""
    query, key, value = _inputs(CHECKED_SHAPE, device)
    output = attention.function(query, key, value)
    return (output.double() - attention.reference(query, key, value)).abs().max().item()


def forward_seconds(
    attentions: Sequence[Attention], device: torch.device, on_round: Callable[[], None], stop: Callable[[], bool]
) -> dict[str, list[float]]:
    """The times of a forward call, by attention and with the baseline among them.

    Every round calls each of them once, so that what else the machine does falls on all alike. The first round warms
    up and is not counted.
    """
    query, key, value = _inputs(TIMED_SHAPE, device)
    timed = [BASELINE, *(attention for attention in attentions if attention != BASELINE)]
    seconds: dict[str, list[float]] = {attention.name: [] for attention in timed}
    with torch.no_grad():
        for counted in [False] + [True] * ROUNDS:
            if stop():
                break
            for attention in timed:
                _synchronize(device)
                start = time.perf_counter()
                attention.function(query, key, value)
                _synchronize(device)
                if counted:
                    seconds[attention.name].append(time.perf_counter() - start)
            on_round()
    return seconds


def _inputs(shape: tuple[int, ...], device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device, kernel_dtype(device)) for _ in range(3)]


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
