"""The operators over packed sequences, against the reference sequence by sequence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attnx
from attnx import reference
from cases import DTYPES, MASKS, VARLEN_OPERATORS, Shape, pack, random_inputs, random_parameter
from compare import check, forward_backward

# (query lengths, key lengths) of the sequences that are packed.
PACKS = {
    "self": ([5, 64, 1, 33], [5, 64, 1, 33]),
    "one_sequence": ([40], [40]),
    "fewer_queries": ([1, 1, 7], [65, 3, 130]),
    "more_queries_than_keys": ([30, 9], [4, 8]),
    "zero_lengths": ([0, 6, 0, 5, 3, 0], [0, 6, 4, 0, 3, 0]),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", PACKS.values(), ids=PACKS)
@pytest.mark.parametrize("operator", VARLEN_OPERATORS)
def test_against_reference(
    operator: str, lengths: tuple[list[int], list[int]], dtype: torch.dtype, mask: str, device: torch.device
) -> None:
    inputs, grad_output, sizes = pack(lengths, dtype, device)
    inputs["alibi_slopes"] = random_parameter((4,), dtype, device)
    check(operator, inputs, grad_output, **sizes, **MASKS[mask])


@pytest.mark.parametrize("bias", ["row", -2.0, "tensor_per_head"])
@pytest.mark.parametrize("lengths", PACKS.values(), ids=PACKS)
def test_sigmoid_bias(
    lengths: tuple[list[int], list[int]], bias: str | float, dtype: torch.dtype, device: torch.device
) -> None:
    inputs, grad_output, sizes = pack(lengths, dtype, device)
    if bias == "tensor_per_head":
        inputs["bias"] = random_parameter((4,), dtype, device) - 3
    else:
        sizes["bias"] = bias
    check("sigmoid_attention_varlen", inputs, grad_output, is_causal=True, **sizes)


@pytest.mark.parametrize("lengths", PACKS.values(), ids=PACKS)
def test_logsumexp(lengths: tuple[list[int], list[int]], dtype: torch.dtype, device: torch.device) -> None:
    inputs, _, sizes = pack(lengths, dtype, device)
    _, actual = attnx.softmax_attention_varlen(**inputs, **sizes, is_causal=True, return_logsumexp=True)
    _, expected = reference.softmax_attention_varlen(**inputs, **sizes, is_causal=True, return_logsumexp=True)
    torch.testing.assert_close(actual, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("operator", VARLEN_OPERATORS)
def test_equal_lengths_are_a_batch(
    operator: str, dtype: torch.dtype, device: torch.device, deterministic: None
) -> None:
    """Three sequences of one length give, bit for bit, what the dense operator gives for a batch of three."""
    inputs, grad_output = random_inputs(Shape(batch=3, length_q=37, length_k=37), dtype, device)
    batched = forward_backward(getattr(attnx, operator.removesuffix("_varlen")), inputs, grad_output, is_causal=True)

    def packed(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(0, 1)

    cu = torch.arange(4, dtype=torch.int32, device=device) * 37
    sizes = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 37, "max_seqlen_k": 37}
    inputs = {name: packed(x) for name, x in inputs.items()}
    results = forward_backward(getattr(attnx, operator), inputs, packed(grad_output), is_causal=True, **sizes)
    for name, result in results.items():
        assert torch.equal(result, packed(batched[name])), name


@pytest.mark.parametrize("operator", VARLEN_OPERATORS)
def test_generous_max_seqlen_changes_nothing(operator: str, dtype: torch.dtype, device: torch.device) -> None:
    inputs, _, sizes = pack(PACKS["fewer_queries"], dtype, device)
    exact = getattr(attnx, operator)(**inputs, **sizes)
    generous = getattr(attnx, operator)(**inputs, **sizes | {"max_seqlen_q": 500, "max_seqlen_k": 700})
    assert torch.equal(exact, generous)


@pytest.mark.parametrize("operator", VARLEN_OPERATORS)
@pytest.mark.parametrize(
    "lengths", [([], []), ([0, 0], [0, 0]), ([0, 0], [3, 2])], ids=["no_sequences", "empty", "keys_only"]
)
def test_nothing_to_attend(
    operator: str, lengths: tuple[list[int], list[int]], dtype: torch.dtype, device: torch.device
) -> None:
    inputs, grad_output, sizes = pack(lengths, dtype, device)
    results = forward_backward(getattr(attnx, operator), inputs, grad_output, **sizes)
    assert results["output"].shape == (0, 4, 24)
    for name, x in inputs.items():
        assert torch.equal(results[f"grad_{name}"], torch.zeros_like(x)), name
