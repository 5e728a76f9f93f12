"""The forward mainloop for Hopper, sm_90a: every path of it against float64, and when it is chosen.

On a GPU of compute capability 9.0, or on the emulator under CUDAEMU_CC=90.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import attnx
from attnx import reference
from attnx.testing import assert_close
from cases import DTYPES, MASKS, OPERATORS, VARLEN_OPERATORS, Shape, pack, random_inputs, random_parameter
from compare import EAGER

pytestmark = [pytest.mark.backends("cuda", "emulated"), pytest.mark.needs("sm90"), pytest.mark.usefixtures("backend")]

# Those that have tiles of their own, one that is padded, and one whose values are narrower.
HEAD_DIMS = [(64, 64), (128, 128), (256, 256), (96, 96), (128, 40)]


@pytest.fixture
def sm90() -> Iterator[None]:
    """Calls that another mainloop would serve are errors."""
    with attnx.cuda_mainloop("sm90"):
        yield


def check_forward(operator: str, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    """Holds the output against float64; returns it."""
    output = getattr(attnx, operator)(**inputs, **options)
    expected = getattr(reference, operator)(**{name: x.double() for name, x in inputs.items()}, **options)
    assert_close(output, expected, EAGER[operator](**inputs, **options))
    return output


@pytest.mark.usefixtures("sm90")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("head_dim", "value_dim"), HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_masks(
    operator: str, dtype: torch.dtype, head_dim: int, value_dim: int, mask: str, device: torch.device
) -> None:
    """Several tiles of rows and of keys, the last ones ragged."""
    shape = Shape(200, 300, head_dim, value_dim, heads=2)
    check_forward(operator, random_inputs(shape, dtype, device)[0], **MASKS[mask])


@pytest.mark.usefixtures("sm90")
@pytest.mark.parametrize("group", [2, 3, 4, 5, 16, 64])
@pytest.mark.parametrize("operator", OPERATORS)
def test_groups(operator: str, group: int, dtype: torch.dtype, device: torch.device) -> None:
    """Query heads in one tile where they divide its rows, and in tiles of their own where they do not."""
    shape = Shape(70, 150, 64, batch=2, heads=2 * group, kv_heads=2)
    inputs, _ = random_inputs(shape, dtype, device)
    inputs["alibi_slopes"] = random_parameter((2 * group,), dtype, device)
    check_forward(operator, inputs, is_causal=True)


@pytest.mark.usefixtures("sm90")
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("operator", VARLEN_OPERATORS)
def test_values_of_the_next_sequence(operator: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    """A tile reads on into the next sequence, whose numbers may be none: they leave no trace."""
    lengths = ([70, 3, 0, 130], [70, 33, 5, 200])
    inputs, _, sizes = pack(lengths, dtype, device, heads=4, kv_heads=1, head_dim=head_dim, value_dim=head_dim)
    clean = check_forward(operator, inputs, is_causal=True, **sizes)
    for name in ("query", "key", "value"):
        first = sum(lengths[name != "query"][:1])
        inputs[name][first:] = torch.nan
    poisoned = getattr(attnx, operator)(**inputs, is_causal=True, **sizes)
    assert torch.equal(poisoned[:70], clean[:70])


@pytest.mark.usefixtures("sm90")
@pytest.mark.parametrize("operator", OPERATORS)
def test_more_tiles_than_blocks(operator: str, dtype: torch.dtype, device: torch.device) -> None:
    """Blocks take several tiles of rows, of several sections of heads, the longest first."""
    inputs, _ = random_inputs(Shape(70, 140, 128, batch=3, heads=70, kv_heads=35), dtype, device)
    output = check_forward(operator, inputs, is_causal=True)
    assert torch.equal(getattr(attnx, operator)(**inputs, is_causal=True), output)


@pytest.mark.usefixtures("sm90")
@pytest.mark.parametrize("operator", OPERATORS)
def test_keys_in_shares(operator: str, dtype: torch.dtype, device: torch.device) -> None:
    inputs, _ = random_inputs(Shape(80, 2000, 64, heads=1), dtype, device)
    assert "shares" in str(attnx.explain(getattr(attnx, operator), **inputs))
    check_forward(operator, inputs)


@pytest.mark.usefixtures("sm90")
@pytest.mark.parametrize("operator", OPERATORS)
def test_large_logits(operator: str, dtype: torch.dtype, device: torch.device) -> None:
    """Logits up to the ends of float32's exponents, where the sigmoid's formula could run out of them."""
    inputs, _ = random_inputs(Shape(70, 140, 64), dtype, device)
    steps = torch.linspace(-1, 1, 140, device=device, dtype=torch.float64)[:, None]
    inputs["key"] = (steps * inputs["query"][:, :, :1].double().sign() * 4).to(dtype)
    inputs["query"] = inputs["query"].sign()
    output = getattr(attnx, operator)(**inputs, scale=0.4)  # logits of +-102
    assert output.isfinite().all()
    check_forward(operator, inputs, scale=0.4)


def test_the_kernel_is_named(dtype: torch.dtype, device: torch.device) -> None:
    inputs, _ = random_inputs(Shape(100, 100, 96), dtype, device)
    explanation = attnx.explain(attnx.softmax_attention, **inputs)
    assert explanation.kernel == "softmax_attention [sm90]"
    assert any("attnx_forward_sm90, 128 rows x 128 keys, head_dim padded to 128" in r for r in explanation.reasons)
    with attnx.cuda_mainloop("sm80"):
        explanation = attnx.explain(attnx.softmax_attention, **inputs)
    assert explanation.kernel == "softmax_attention [sm80]"
    assert any("sm80 was asked for" in reason for reason in explanation.reasons)


def test_lists_are_served(dtype: torch.dtype, device: torch.device) -> None:
    """Few rows as well; what they compute is in test_block_sparse."""
    inputs, _ = random_inputs(Shape(33, 100, 128), dtype, device)
    mask = attnx.BlockMask.from_dense(torch.ones(1, 2, 1, 2, dtype=torch.bool, device=device))
    explanation = attnx.explain(attnx.block_sparse_attention, **inputs, block_mask=mask)
    assert explanation.kernel == "block_sparse_attention [sm90]"
    assert any("64 rows x 64 keys" in reason for reason in explanation.reasons)


@pytest.mark.parametrize(
    ("block_size", "forward", "backward"),
    [((64, 64), (64, 64), (64, 64)), ((128, 64), (128, 64), (64, 64)), ((128, 128), (128, 128), (64, 128))],
    ids=str,
)
def test_tiles_follow_the_blocks_of_lists(
    block_size: tuple[int, int],
    forward: tuple[int, int],
    backward: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    inputs, _ = random_inputs(Shape(256, 256, 128), dtype, device)
    reasons = attnx.explain(attnx.probabilistic_attention, **inputs, block_size=block_size).reasons
    for direction, (rows, keys) in (("forward", forward), ("backward", backward)):
        assert any(f"the {direction} is" in reason and f"{rows} rows x {keys} keys" in reason for reason in reasons)


def _few_rows(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return inputs | {"query": inputs["query"][:, :, :16]}


def _odd_strides(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return inputs | {"key": torch.nn.functional.pad(inputs["key"], (0, 3))[..., :64]}


def _expanded(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return inputs | {"value": inputs["value"][:1].expand(inputs["value"].shape)}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_few_rows, "at most 64 rows of query share their keys, got 32"),
        (_odd_strides, "key does not start, or has strides that are not positive, on multiples of 16 bytes"),
        (_expanded, "value does not start, or has strides that are not positive, on multiples of 16 bytes"),
    ],
)
def test_what_sm80_serves(change: Any, reason: str, dtype: torch.dtype, device: torch.device) -> None:
    """And says so; to ask for sm90 is an error there."""
    inputs = change(random_inputs(Shape(100, 100, 64, batch=2, heads=4, kv_heads=2), dtype, device)[0])
    explanation = attnx.explain(attnx.sigmoid_attention, **inputs)
    assert explanation.kernel == "sigmoid_attention [sm80]"
    assert f"the forward is not sm90's: {reason}" in explanation.reasons
    check_forward("sigmoid_attention", inputs)
    with attnx.cuda_mainloop("sm90"), pytest.raises(RuntimeError, match=reason):
        attnx.sigmoid_attention(**inputs)


def test_the_mainloop_is_as_before_afterwards() -> None:
    before = attnx._C.cuda_mainloop()
    with pytest.raises(ZeroDivisionError), attnx.cuda_mainloop("sm80"):
        raise ZeroDivisionError
    assert attnx._C.cuda_mainloop() == before
    with (
        pytest.raises(ValueError, match="cuda_mainloop: expected auto, sm80, sm90 or decode, got sm70"),
        attnx.cuda_mainloop("sm70"),
    ):  # type: ignore[arg-type]
        pass


def test_the_mainloop_is_that_of_all_threads() -> None:
    """Autograd runs backwards on a GPU in threads of its own."""
    with attnx.cuda_mainloop("sm80"), ThreadPoolExecutor(1) as pool:
        assert pool.submit(attnx._C.cuda_mainloop).result() == "sm80"
