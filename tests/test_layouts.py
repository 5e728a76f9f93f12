"""Strided, unaligned and expanded memory with NaN around it: read what belongs to the tensor, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import attnx
from cases import DTYPES, OPERATORS, Shape, pack, random_inputs, random_parameter
from compare import check, forward_backward
from memory import LAYOUTS, Layout, surrounded

ODD = Shape(batch=2, heads=6, kv_heads=2, length_q=37, length_k=67, head_dim=19, value_dim=23)


def results_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_layout_of_every_input(
    operator: str, dtype: torch.dtype, layout: Layout, device: torch.device, deterministic: None
) -> None:
    inputs, grad_output = random_inputs(ODD, dtype, device)
    inputs = {name: layout(x) for name, x in inputs.items()}
    inputs["alibi_slopes"] = surrounded(random_parameter((ODD.heads,), dtype, device))
    if operator == "sigmoid_attention":
        inputs["bias"] = surrounded(random_parameter((ODD.heads,), dtype, device)) - 3
    results = check(operator, inputs, layout(grad_output), is_causal=True)

    compact = {name: x.contiguous() for name, x in inputs.items()}
    again = forward_backward(getattr(attnx, operator), compact, layout(grad_output).contiguous(), is_causal=True)
    assert results_equal(results, again), "the layout of the inputs changed the numbers"


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_layout_on_each_instruction_set(
    operator: str, layout: Layout, instruction_set: str | None, device: torch.device
) -> None:
    inputs, grad_output = random_inputs(ODD, torch.bfloat16, device)
    check(operator, {name: layout(x) for name, x in inputs.items()}, layout(grad_output), window=(20, 3))


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2)], ids=["tokens_first", "heads_first"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_packed_layout(operator: str, order: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    inputs, grad_output, sizes = pack(([5, 0, 33], [7, 0, 65]), dtype, device)
    inputs = {name: surrounded(x, order) for name, x in inputs.items()}
    check(f"{operator}_varlen", inputs, surrounded(grad_output, order), is_causal=True, **sizes)


@pytest.mark.parametrize("operator", OPERATORS)
def test_slices_of_one_projection(operator: str, dtype: torch.dtype, device: torch.device) -> None:
    """query, key and value as a model has them: cut out of one (batch, length, 3, heads, head_dim) tensor."""
    qkv = torch.randn(2, 33, 3, 4, 16, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    check(operator, {"query": query, "key": key, "value": value}, torch.ones_like(query))


@pytest.mark.parametrize("operator", OPERATORS)
def test_stride_of_a_single_feature_does_not_matter(operator: str, dtype: torch.dtype, device: torch.device) -> None:
    inputs, grad_output = random_inputs(Shape(head_dim=2), dtype, device)
    check(operator, {name: x[..., ::2] for name, x in inputs.items()}, grad_output[..., ::2])


@pytest.mark.parametrize("operator", OPERATORS)
def test_offsets_beyond_32_bits(operator: str, device: torch.device, tmp_path: Path) -> None:
    """Keys more than 2^31 elements apart."""
    far = 2**31 + 8
    storage = unused_memory(2 * far + 16, device, tmp_path)
    inputs, grad_output = random_inputs(Shape(length_k=3, heads=1), torch.bfloat16, device)
    for name in ("key", "value"):
        inputs[name] = torch.as_strided(storage, (1, 1, 3, 16), (0, 0, far, 1)).copy_(inputs[name])
    check(operator, inputs, grad_output)


def unused_memory(size: int, device: torch.device, folder: Path) -> Tensor:
    """A bfloat16 tensor of which little will be touched: on the host a sparse file, which takes no memory till then."""
    if device.type == "cpu":
        return torch.from_file(str(folder / "sparse"), shared=True, size=size, dtype=torch.bfloat16)
    if torch.cuda.mem_get_info(device)[0] < 2 * size:
        pytest.skip(f"needs {2 * size / 2**30:.0f} GiB of device memory")
    return torch.empty(size, dtype=torch.bfloat16, device=device)


@pytest.mark.parametrize("varlen", [False, True], ids=["dense", "varlen"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_every_element_is_written(
    operator: str, dtype: torch.dtype, varlen: bool, device: torch.device, poisoned_allocations: None
) -> None:
    if varlen:
        inputs, grad_output, sizes = pack(([0, 9, 40, 3], [4, 3, 65, 0]), dtype, device)
        results = forward_backward(getattr(attnx, f"{operator}_varlen"), inputs, grad_output, is_causal=True, **sizes)
    else:
        inputs, grad_output = random_inputs(Shape(length_q=70, length_k=40), dtype, device)
        results = forward_backward(getattr(attnx, operator), inputs, grad_output, window=(7, 0))
    for name, result in results.items():
        assert not result.isnan().any(), name


def test_poisoned_allocations_are_poisoned(poisoned_allocations: None) -> None:
    assert torch.empty(100).isnan().all()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("step", [-1, 1], ids=["before", "after"])
def test_reading_out_of_range_meets_nan(layout: Layout, step: int) -> None:
    """The trap works: one element before the first, or after the last, is NaN, and none inside is."""
    view = layout(torch.ones(2, 3, 5, 7))
    assert not view.isnan().any()
    last = sum((size - 1) * stride for size, stride in zip(view.shape, view.stride(), strict=True))
    first_or_last = view.storage_offset() + (last if step > 0 else 0)
    assert torch.as_strided(view, (1,), (1,), first_or_last + step).isnan()
