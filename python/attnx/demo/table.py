"""The table at the end of a run."""

from __future__ import annotations

from rich.table import Table

from attnx.demo.measure import TIMED_SHAPE
from attnx.demo.results import Results

ABSENT = "-"


def results_table(results: Results) -> Table:
    table = Table(
        header_style="bold",
        caption_justify="left",
        caption=f"forward: causal, {TIMED_SHAPE}, median; speed: against PyTorch's scaled_dot_product_attention; "
        "error: the largest, against float64",
    )
    table.add_column("attention", no_wrap=True)
    for header in ("validation\nbits/byte", "ms\na step", "forward\n4096, ms", "forward\nspeed", "largest\nerror"):
        table.add_column(header, justify="right", no_wrap=True)
    for result in results.attentions:
        table.add_row(
            result.label,
            _format(result.validation_bits_per_byte, ".4f"),
            _format(result.ms_per_step, ".1f"),
            _format(result.forward_ms, ".1f"),
            _format(results.forward_speed(result), ".2f", "x"),
            _format(result.largest_error, ".1e"),
        )
    return table


def _format(value: float | None, spec: str, unit: str = "") -> str:
    return ABSENT if value is None else f"{value:{spec}}{unit}"
