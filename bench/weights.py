"""The relative error of each sigmoid weight, for logits in [-15, 15]. ``python bench/weights.py --help``

With head_dim 1, scale 1, bias 0 and a query of 1, the key is the logit, exactly; with the identity as value, the
output is the weights, one a column. The identity times 2^10 keeps the smallest of them normal numbers in float16.
"""

from __future__ import annotations

import argparse
import math
import sys

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import attnx
from device import open_device
from suite import DTYPES

LARGEST_LOGIT = 15.0
GOALS = {"float32": 2.0**-20, "bfloat16": 2.0**-7, "float16": 2.0**-7}
_KEYS = 64
_VALUE = 2.0**10


def logits(points: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """At least ``points`` evenly spaced logits in [-15, 15], rounded to the dtype, as (batch, 64)."""
    batch = math.ceil(points / _KEYS)
    grid = torch.linspace(-LARGEST_LOGIT, LARGEST_LOGIT, batch * _KEYS, dtype=torch.float64)
    return grid.to(device, dtype).view(batch, _KEYS)


def weights(logits: Tensor) -> Tensor:
    """The weights attnx gives the logits, float64, in every row of 64 queries: (batch, 64, 64)."""
    batch, keys = logits.shape
    query = logits.new_ones(batch, 1, _KEYS, 1)
    value = (torch.eye(keys, dtype=logits.dtype, device=logits.device) * _VALUE).expand(batch, 1, keys, keys)
    output = attnx.sigmoid_attention(query, logits.view(batch, 1, keys, 1), value, bias=0.0, scale=1.0)
    return output.squeeze(1).double() / _VALUE


def power_of_two(x: float) -> str:
    return f"2^{math.log2(x):.2f}" if x > 0 else str(x)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument("--dtype", action="append", choices=list(GOALS), help="repeatable (default: all)")
    parser.add_argument("--points", type=int, default=2**18, help="logits tried (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.points < 1:
        parser.error(f"--points: expected at least 1, got {arguments.points}")
    try:
        device = open_device(arguments.device).torch_device
    except ValueError as error:
        parser.error(str(error))

    table = Table(title=f"Largest relative error of a weight, logits in [-{LARGEST_LOGIT:g}, {LARGEST_LOGIT:g}]")
    for column in ("dtype", "attnx", "at logit", "goal", "torch.sigmoid in that dtype"):
        table.add_column(column, justify="left" if column == "dtype" else "right")
    missed = False
    for name in arguments.dtype or GOALS:
        x = logits(arguments.points, DTYPES[name], device)
        exact = x.double().sigmoid()
        try:
            errors = ((weights(x) - exact[:, None]).abs() / exact[:, None]).amax(1)
        except NotImplementedError as refusal:
            table.add_row(name, f"not run: {refusal}")
            continue
        # In the order of the logits; NaN counts as the largest.
        worst = errors.flatten().nan_to_num(nan=math.inf).argmax()
        largest, goal = errors.flatten()[worst].item(), GOALS[name]
        plain = ((x.sigmoid().double() - exact).abs() / exact).max().item()
        met = largest < goal
        missed |= not met
        table.add_row(
            name,
            power_of_two(largest) if met else f"[bold red]{power_of_two(largest)}[/]",
            f"{x.flatten()[worst].item():.4f}",
            f"< 2^{math.log2(goal):g}",
            power_of_two(plain),
        )
    Console(highlight=False).print(table)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
