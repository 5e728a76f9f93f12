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


def caches_table(results: Results) -> Table:
    table = Table(
        header_style="bold",
        caption_justify="left",
        caption="the trained softmax model, decoding the second halves of held-out windows byte by byte; bits of a "
        "number, and bytes with ranges over all layers, on average over the tokens that the queries read",
    )
    table.add_column("cache", no_wrap=True)
    for header in ("held-out\nbits/byte", "over\nfull", "bits of\na number", "bytes\na token"):
        table.add_column(header, justify="right", no_wrap=True)
    for result in results.caches:
        table.add_row(
            result.label,
            f"{result.bits_per_byte:.4f}",
            f"{result.bits_per_byte / results.caches[0].bits_per_byte - 1:+.2%}",
            f"{result.bits:.2f}",
            f"{result.bytes_per_token:.0f}",
        )
    return table


def _format(value: float | None, spec: str, unit: str = "") -> str:
    return ABSENT if value is None else f"{value:{spec}}{unit}"
