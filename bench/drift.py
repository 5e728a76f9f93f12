"""Whether training drifts from the plain formula over thousands of steps. ``python bench/drift.py --help``

The demo's transformer, once with each attention of attnx and once with its formula in plain PyTorch, in turn on the
same batches. Two runs that round differently part ways, and their losses with them, up and down; how far is what the
formula shows beside itself in float32. Drift would be a difference of means that grows beyond that.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from attnx import reference
from attnx.demo.attentions import ATTENTIONS, SIGMOID_BIAS, Attention, CausalAttention
from attnx.demo.corpus import load_corpus
from attnx.demo.model import ModelConfig
from attnx.demo.training import Learner, TrainingConfig, train
from machine import facts
from suite import Case, Inputs
from suites import dense

WINDOWS = 10  # of the steps, over each of which losses are averaged


def _formula(weights: Callable[[Tensor], Tensor], dtype: torch.dtype | None) -> CausalAttention:
    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, length, head_dim = query.shape
        case = Case("drift", heads, length, length, head_dim, batch, is_causal=True)
        with torch.autocast(query.device.type, enabled=False):
            inputs = Inputs(*(x.to(dtype or value.dtype) for x in (query, key, value)))
            return dense.eager(weights)(case, inputs)(*inputs).to(value.dtype)

    return attention


_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": lambda logits: torch.sigmoid(logits + SIGMOID_BIAS),
    "softmax": lambda logits: torch.softmax(logits, dim=-1),
}


def _attentions(score: str) -> list[Attention]:
    """attnx, the formula in the same dtype, and in float32."""
    plain = [
        Attention(name, name, "", _formula(_WEIGHTS[score], dtype), getattr(reference, f"{score}_attention"))
        for name, dtype in (("formula", None), ("formula, float32", torch.float32))
    ]
    return [ATTENTIONS[score], *plain]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3000, help="(default: %(default)s)")
    parser.add_argument("--score", choices=list(_WEIGHTS), default="sigmoid", help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("results"), metavar="DIR", help="(default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.steps < WINDOWS:
        parser.error(f"--steps: expected at least {WINDOWS}, got {arguments.steps}")
    console = Console(highlight=False)
    device = torch.device(arguments.device)
    model = ModelConfig(layers=2, width=256, heads=4, context=256)
    config = TrainingConfig(steps=arguments.steps)
    learners = [Learner(attention, model, config, device) for attention in _attentions(arguments.score)]
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("training", total=len(learners) * config.steps)
        corpus = load_corpus(None, model.context)
        train(learners, corpus, model.context, config, on_step=lambda _: progress.advance(task), stop=lambda: False)

    losses = np.array([learner.losses for learner in learners])
    means = np.array([window.mean(axis=1) for window in np.array_split(losses, WINDOWS, axis=1)])
    table = Table(title=f"{arguments.score}, {device}: bits per byte, means over {config.steps // WINDOWS} steps")
    for heading in ("formula", "attnx - formula", "formula in float32 - formula"):
        table.add_column(heading, justify="right")
    for ours, formula, exact in means:
        table.add_row(f"{formula:.4f}", f"{ours - formula:+.4f}", f"{exact - formula:+.4f}")
    console.print(table)
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"drift-{arguments.score}-{device.type}.json"
    report = {
        "facts": facts(device),
        "losses": {learner.attention.label: learner.losses for learner in learners},
    }
    path.write_text(json.dumps(report, indent=1))
    console.print(f"wrote {path}")
    return int(not np.isfinite(losses).all())


if __name__ == "__main__":
    sys.exit(main())
