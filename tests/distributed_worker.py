"""One of several processes that share a sequence: what test_distributed starts.

Each check makes the same inputs in every process, computes with all of them together, and compares with one process.
"""

from __future__ import annotations

import itertools
import json
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

import attnx
import attnx.distributed as attnx_distributed
from attnx.distributed import Layout, gather_sequence, shard_sequence
from cases import Shape, parameter_dtype, random_inputs
from compare import check, forward_backward

CPU = torch.device("cpu")
LAYOUTS: tuple[Layout, ...] = ("contiguous", "zigzag")
RINGS: dict[str, Callable[..., Any]] = {
    "softmax_attention": attnx_distributed.ring_softmax_attention,
    "sigmoid_attention": attnx_distributed.ring_sigmoid_attention,
}
SHAPE = Shape(48, 48, head_dim=16, value_dim=24, batch=2, heads=4, kv_heads=2)


class _Everywhere(torch.autograd.Function):
    """A tensor that all processes have; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # Only a few sums exist in 16 bits, and these are to be as one process has them.
        whole = grad.to(torch.float64).contiguous()
        dist.all_reduce(whole)
        return whole.to(grad.dtype)


class _Gathered(torch.autograd.Function):
    """The whole sequence, of which each process differentiates its shard."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        return gather_sequence(x.detach(), layout=layout)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return shard_sequence(grad, layout=ctx.layout), None


SEQUENCES = ("query", "key", "value", "key_bias", "key_mask")


def together(attention: Callable[..., Any], layout: Layout, **more: Any) -> Callable[..., Any]:
    """Makes a function of whole sequences of one that takes shards."""

    def attend(*args: Tensor, **options: Any) -> Any:
        options |= dict(zip(SEQUENCES, args, strict=False))
        for name, x in options.items():
            if isinstance(x, Tensor):
                x = _Everywhere.apply(x) if x.requires_grad else x
                options[name] = shard_sequence(x, layout=layout) if name in SEQUENCES else x
        results = attention(**options, layout=layout, **more)
        if isinstance(results, tuple):
            return tuple(_Gathered.apply(x, layout) for x in results)
        return _Gathered.apply(results, layout)

    return attend


def check_ring(operator: str, dtype: torch.dtype, layout: Layout, parameters: tuple[str, ...], **options: Any) -> None:
    inputs, grad_output = random_inputs(SHAPE, dtype, CPU)
    for name in parameters:
        inputs[name] = torch.linspace(0.1, 0.7, SHAPE.heads).to(parameter_dtype(dtype))
    check(operator, inputs, grad_output, attention=together(RINGS[operator], layout), **options)


def check_terms(operator: str, layout: Layout, **options: Any) -> None:
    """Terms of logits, and lengths that differ, in float64 beside one process."""
    shape = Shape(32, 64, head_dim=8, value_dim=12, batch=2, heads=4, kv_heads=1)
    inputs, grad_output = random_inputs(shape, torch.float64, CPU)
    generator = torch.Generator().manual_seed(1)
    inputs["key_bias"] = torch.randn(1, 4, 64, generator=generator, dtype=torch.float64)
    inputs["key_mask"] = torch.rand(2, 1, 64, generator=generator, dtype=torch.float64)
    inputs["scale"] = torch.tensor(0.3, dtype=torch.float64)
    expect_same(getattr(attnx, operator), together(RINGS[operator], layout), inputs, grad_output, **options)


def check_logsumexp(layout: Layout) -> None:
    """A loss of the logsumexp alone, with a sink, and rows that see no key."""
    inputs, _ = random_inputs(SHAPE, torch.float64, CPU)
    inputs["sink"] = torch.tensor([-torch.inf, 0.3, 1.0, 2.0], dtype=torch.float64)
    grad = torch.randn(2, 4, 48, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    options = {"is_causal": True, "position_offset": -5}

    def seen(attention: Callable[..., Any]) -> Callable[..., Tensor]:
        def logsumexp(**inputs: Any) -> Tensor:
            return attention(**inputs, return_logsumexp=True)[1].clamp(min=-100)

        return logsumexp

    ring = together(RINGS["softmax_attention"], layout)
    expect_same(seen(attnx.softmax_attention), seen(ring), inputs, grad, **options)


def check_heads(
    layout: Layout, attention: Callable[..., Any], shape: Shape = SHAPE, dtype: Any = torch.float64
) -> None:
    """All-to-all of heads and sequence gives the function what it would get in one process."""
    inputs, grad_output = random_inputs(shape, dtype, CPU)
    shared = together(partial(attnx_distributed.ulysses_attention, attention), layout)
    expect_same(_joined(partial(attention, local=lambda x: x)), _joined(shared), inputs, grad_output)


def _joined(attention: Callable[..., Any]) -> Callable[..., Tensor]:
    """Makes one tensor of several results of one shape."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        results = attention(query, key, value)
        return results if isinstance(results, Tensor) else results[0] + 0.5 * results[1]

    return attend


def _softmax(*inputs: Tensor, local: Callable[[Tensor], Tensor] = attnx_distributed.local_heads) -> Tensor:
    sink = torch.linspace(0.1, 0.7, 4, dtype=torch.float64)
    return attnx.softmax_attention(*inputs, is_causal=True, sink=local(sink))


def _sigmoid(*inputs: Tensor, local: Any = None) -> Tensor:
    return attnx.sigmoid_attention(*inputs, window=(9, 2), bias="row")


def _block_sparse(*inputs: Tensor, local: Any = None) -> Tensor:
    return attnx.block_sparse_attention(*inputs, attnx.BlockMask.window(256, 256, (70, 0)))


def _sparse_linear(*inputs: Tensor, local: Any = None) -> tuple[Tensor, Tensor]:
    return attnx.sparse_linear_attention(*inputs, critical=0.5, negligible=0.2)


def _routing(*inputs: Tensor, local: Callable[[Tensor], Tensor] = attnx_distributed.local_heads) -> Tensor:
    centroids = torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(3))
    return attnx.routing_attention(*inputs, local(centroids).contiguous())


def _probabilistic(*inputs: Tensor, local: Any = None) -> Tensor:
    return attnx.probabilistic_attention(*inputs, training=False, is_causal=True)


def expect_same(
    alone: Callable[..., Tensor],
    shared: Callable[..., Tensor],
    inputs: dict[str, Tensor],
    grad_output: Tensor,
    tolerance: float = 1e-12,
    **options: Any,
) -> None:
    expected = forward_backward(alone, inputs, grad_output, **options)
    for name, x in forward_backward(shared, inputs, grad_output, **options).items():
        assert x.isfinite().all() or name == "output", name
        torch.testing.assert_close(x, expected[name], rtol=tolerance, atol=tolerance, msg=partial(_named, name))


def _named(name: str, message: str) -> str:
    return f"{name}: {message}"


BANDS: dict[str, dict[str, Any]] = {
    "all": {},
    "causal": {"is_causal": True},
    "window": {"window": (7, 4)},
    "causal_window": {"is_causal": True, "window": (9, None)},
    "offset": {"is_causal": True, "position_offset": -6},
    "ahead": {"is_causal": True, "position_offset": 11},
}
PARAMETERS = {"softmax_attention": ("alibi_slopes", "sink"), "sigmoid_attention": ("alibi_slopes", "bias")}


def _checks() -> dict[str, Callable[[], None]]:
    checks: dict[str, Callable[[], None]] = {}
    for operator, layout in itertools.product(RINGS, LAYOUTS):
        for band, options in BANDS.items():
            checks[f"{operator}-{layout}-{band}"] = partial(check_ring, operator, torch.float32, layout, (), **options)
            terms = partial(check_terms, operator, layout, softcap=2.0, **options)
            checks[f"{operator}-{layout}-{band}-terms"] = terms
        for dtype in (torch.bfloat16, torch.float64):
            name = f"{operator}-{layout}-causal-{str(dtype).removeprefix('torch.')}"
            checks[name] = partial(check_ring, operator, dtype, layout, (), is_causal=True)
        for parameter in PARAMETERS[operator]:
            name = f"{operator}-{layout}-{parameter}"
            checks[name] = partial(check_ring, operator, torch.float32, layout, (parameter,), window=(20, 4))
    for layout, band in itertools.product(LAYOUTS, ("all", "causal_window", "offset")):
        row = partial(check_ring, "sigmoid_attention", torch.float32, layout, (), bias="row", **BANDS[band])
        checks[f"sigmoid_attention-{layout}-{band}-row"] = row
    long = Shape(256, 256, head_dim=16, batch=2, heads=4, kv_heads=4)
    for layout in LAYOUTS:
        for attention in (_softmax, _sigmoid, _block_sparse, _sparse_linear, _routing, _probabilistic):
            name = f"heads-{layout}-{attention.__name__[1:]}"
            checks[name] = partial(check_heads, layout, attention, SHAPE if attention in (_softmax, _sigmoid) else long)
        checks[f"logsumexp-{layout}"] = partial(check_logsumexp, layout)
    return checks


CHECKS = _checks()


def main(rank: int, size: int, folder: Path) -> None:
    """Runs all checks as the process of a rank, and writes what failed: the name of a check and its traceback."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=20),
    )
    failures = {}
    for name, run in CHECKS.items():
        try:
            run()
        except Exception:
            failures[name] = traceback.format_exc()
    (folder / f"{rank}.json").write_text(json.dumps(failures))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
