"""Random calls drawn from the capability table: whatever it promises must work, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attnx
from attnx._capability import Capability, dtype_name, table
from backends import Backend
from cases import OPERATORS, Shape, random_inputs, random_parameter
from compare import check
from logit_terms import check as check_with_terms
from logit_terms import terms_of


@dataclass(frozen=True)
class Call:
    operator: str
    dtype: torch.dtype
    shape: Shape
    options: dict[str, Any] = field(default_factory=dict)
    bias: tuple[int, ...] | None = None
    alibi_slopes: tuple[int, ...] | None = None
    terms: tuple[str, ...] = ()
    served: str = "each"


@st.composite
def calls(draw: st.DrawFn, backend: Backend) -> Call:
    row = draw(st.sampled_from([row for row in backend.rows() if row.backward]))
    features = set(row.features)
    head_dims = st.integers(*row.head_dim)
    lengths = st.integers(1, 150)
    # A row of softmax with one key has no gradient: all of it is rounding. test_masks has those.
    two_keys_or_more = st.integers(2, 150)
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    shape = Shape(
        length_q=draw(lengths),
        length_k=draw(two_keys_or_more),
        head_dim=draw(head_dims),
        value_dim=draw(head_dims),
        batch=draw(st.integers(1, 2)),
        heads=kv_heads * group,
        kv_heads=kv_heads,
    )
    options: dict[str, Any] = {}
    if draw(st.booleans()):
        # Logits of a few units, as in use: weights lose as many bits as their logits are large.
        options["scale"] = draw(st.floats(-1.0, 1.0)) * shape.head_dim**-0.5
    if "causal" in features:
        options["is_causal"] = draw(st.booleans())
    if "window" in features:
        bound = st.just(-1) | st.integers(1, 160)
        options["window"] = draw(st.tuples(bound, bound))
    if "position_offset" in features:
        options["position_offset"] = draw(st.just(0) | st.integers(-160, 160))
    if "key_lengths" in features and draw(st.booleans()):
        ends = draw(st.tuples(*[st.integers(2, shape.length_k)] * shape.batch))
        options["seqused_k"] = ends
        options["leftpad_k"] = tuple(draw(st.integers(0, end - 2)) for end in ends)
    parameter = st.sampled_from([None, (), (shape.heads,)])
    bias = None
    if row.operator.startswith("sigmoid"):
        bias = draw(parameter)
        if bias is None:
            options["bias"] = draw(st.sampled_from([None, "row", -2.0]))
    slopes = draw(parameter) if "alibi" in features else None
    dtype = getattr(torch, draw(st.sampled_from(row.dtypes)))
    known = _terms_of(features)
    terms = tuple(sorted(draw(st.sets(st.sampled_from(known))))) if known and draw(st.booleans()) else ()
    if not terms:
        return Call(row.operator, dtype, shape, options, bias, slopes)
    if "distance_bias" in terms:  # it stands in the place of a mask
        terms = tuple(x for x in terms if not x.endswith("_mask") or x == "key_mask")
    served = draw(st.sampled_from(["each", "sequences", "heads", "all", "rows"]))
    options.pop("bias", None)
    if set(terms) != {"softcap"}:  # the others are refused beside lengths
        options = {name: x for name, x in options.items() if name not in ("seqused_k", "leftpad_k")}
    slopes = None if slopes is None else (shape.heads,)
    return Call(row.operator, dtype, shape, options, None, slopes, terms, served)


def _terms_of(features: set[str]) -> list[str]:
    """Those that the table has, with their gradients."""
    terms = [x for x in ("softcap", "key_bias", "key_mask", "dropout") if x in features]
    terms = [x for x in terms if not x.startswith("key") or f"{x}_gradient" in features]
    terms += ["bool_mask"] if "attn_mask" in features else []
    terms += ["row_bounds"] if "row_bounds" in features else []
    terms += ["distance_bias"] if "distance_bias_gradient" in features else []
    return terms + (["attn_mask"] if "attn_mask_gradient" in features else [])


@given(data=st.data())
def test_calls_from_the_table(data: st.DataObject, backend: Backend) -> None:
    call = data.draw(calls(backend))
    inputs, grad_output = random_inputs(call.shape, call.dtype, backend.device)
    for name, shape in (("bias", call.bias), ("alibi_slopes", call.alibi_slopes)):
        if shape is not None:
            inputs[name] = random_parameter(shape, call.dtype, backend.device) - (3 if name == "bias" else 0)
    lengths = {
        name: torch.tensor(call.options[name], dtype=torch.int32, device=backend.device)
        for name in ("seqused_k", "leftpad_k")
        if name in call.options
    }
    options = call.options | lengths
    if call.terms:
        terms = terms_of(call.terms, call.shape, call.dtype, backend.device, call.served)
        check_with_terms(call.operator, inputs, grad_output, **options, **terms)
    else:
        check(call.operator, inputs, grad_output, **options)


@pytest.mark.parametrize("row", table(), ids=lambda row: f"{row.operator}-{row.backend}")
def test_rows_name_what_exists(row: Capability) -> None:
    assert hasattr(torch.ops.attnx, row.operator)
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in row.dtypes)
    low, high = row.head_dim
    assert 1 <= low <= high


@pytest.mark.parametrize("operator", OPERATORS)
def test_nothing_beyond_the_table(operator: str, backend: Backend) -> None:
    """One feature more than the largest head dimension is refused, and every other dtype: it does not understate."""
    (row,) = (row for row in backend.rows() if row.operator == operator)
    too_wide, _ = random_inputs(Shape(head_dim=row.head_dim[1] + 1, value_dim=8), backend.dtypes()[0], backend.device)
    with pytest.raises(RuntimeError, match="head_dim"):
        getattr(attnx, operator)(**too_wide)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        if dtype_name(dtype) not in row.dtypes:
            with pytest.raises(RuntimeError, match=f"query: expected one of .* on {row.backend}.*{dtype_name(dtype)}"):
                getattr(attnx, operator)(**random_inputs(Shape(), dtype, backend.device)[0])
