"""Training: one learner for each attention, in turn step by step, all on the same batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attnx.demo.attentions import Attention
from attnx.demo.corpus import Corpus, consecutive_windows, random_windows
from attnx.demo.model import ModelConfig, Transformer


@dataclass(frozen=True)
class TrainingConfig:
    steps: int = 80
    batch: int = 4
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    warmup: float = 0.1  # of the steps; then the rate falls to 0 in a straight line
    seed: int = 0


class Learner:
    """A model with one attention, its optimizer, and what its steps gave: bits per byte and seconds."""

    def __init__(self, attention: Attention, model: ModelConfig, config: TrainingConfig, device: torch.device) -> None:
        torch.manual_seed(config.seed)
        self.attention = attention
        self.device = device
        self.model = Transformer(model, attention).to(device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=config.weight_decay,
            fused=True,
        )
        warmup = max(1, round(config.warmup * config.steps))
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min((step + 1) / warmup, (config.steps - step) / (config.steps - warmup + 1))
        )
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, tokens: Tensor) -> None:
        start = time.perf_counter()
        loss = self._loss(tokens)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.losses.append(loss.item())  # waits for the device, too
        self.seconds.append(time.perf_counter() - start)

    @torch.no_grad()
    def validate(self, windows: Tensor, batch: int) -> float:
        """Bits per byte over ``windows``, (windows, context + 1)."""
        self.model.eval()
        bits = sum(self._loss(part).item() * len(part) for part in windows.split(batch)) / len(windows)
        self.model.train()
        return bits

    def _loss(self, tokens: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type != "cpu"):
            return self.model(tokens.to(self.device))


def train(
    learners: Sequence[Learner],
    corpus: Corpus,
    context: int,
    config: TrainingConfig,
    on_step: Callable[[Learner], None],
    stop: Callable[[], bool],
) -> None:
    """Takes ``config.steps`` steps with every learner, or as many as are complete when ``stop()`` turns true."""
    generator = torch.Generator().manual_seed(config.seed)
    for _ in range(config.steps):
        if stop():
            return
        tokens = random_windows(corpus.train, config.batch, context + 1, generator)
        for learner in learners:
            learner.step(tokens)
            on_step(learner)


def validate(learners: Sequence[Learner], corpus: Corpus, context: int) -> list[float]:
    """The bits per byte of every learner on the validation part."""
    windows = consecutive_windows(corpus.validation, context)
    return [learner.validate(windows, batch=8) for learner in learners]
