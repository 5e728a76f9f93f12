"""Keys that queries point to, the likeliest and drawn ones, against the whole matrix of logits."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

import attnx
from attnx import reference
from attnx._capability import table
from backends import Backend
from cases import DTYPES, Shape, parameter_dtype, random_inputs

FULL_DTYPES = [*DTYPES, torch.float64]
MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"is_causal": True},
    "window": {"window": (40, 25)},
    "left": {"window": (30, None)},
}
SHAPES = [
    Shape(length_q=150, length_k=200, head_dim=64, batch=2, heads=4, kv_heads=2),
    Shape(length_q=130, length_k=70, head_dim=40, heads=2),
    Shape(length_q=70, length_k=131, head_dim=35, heads=2, kv_heads=1),
    Shape(length_q=1, length_k=90, head_dim=64, heads=2),
    Shape(length_q=3, length_k=1, head_dim=1),
]
TERMS = ("softcap", "bool_mask", "attn_mask", "key_bias", "key_mask")


def operands(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    inputs, _ = random_inputs(shape, dtype, device)
    return inputs["query"], inputs["key"]


def terms_of(names: tuple[str, ...], shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    generator, numbers = torch.Generator().manual_seed(4), parameter_dtype(dtype)

    def uniform(*sizes: int) -> Tensor:
        return torch.rand(sizes, generator=generator, dtype=torch.float64).to(device, numbers)

    pairs = uniform(shape.batch, 1, shape.length_q, shape.length_k)
    every = {
        "softcap": 1.5,
        "bool_mask": pairs < 0.7,
        "attn_mask": (3 * pairs).masked_fill(pairs > 0.7, -math.inf),
        "key_bias": 4 * uniform(1, shape.heads, shape.length_k),
        "key_mask": (uniform(shape.batch, 1, shape.length_k) - 0.3).clamp(min=0),
    }
    return {name.replace("bool", "attn"): every[name] for name in names}


def check(query: Tensor, key: Tensor, **options: Any) -> Tensor:
    """The key must be that of the reference, or one that lies below it by no more than rounding."""
    draws = "seed" in options
    function = "pointer_sample" if draws else "pointer_argmax"
    got = getattr(attnx, function)(query, key, **options)
    want = getattr(reference, function)(query, key, **options)
    assert (got.dtype, got.shape) == (torch.int64, want.shape)
    assert torch.equal(got < 0, want < 0)
    assert got.min() >= -1
    # The reference of the log-probability says how far the two are apart.
    differ = got != want
    assert differ.double().mean() <= (0.02 if query.dtype != torch.float64 else 0.002)
    if differ.any():
        own = {name: x for name, x in options.items() if name not in ("seed", "offset", "temperature")}
        logit = [reference.pointer_log_prob(query, key, x.clamp(min=0), **own) for x in (got, want)]
        if draws:
            noise = reference.gumbel_noise((*got.shape, key.shape[2]), options["seed"], options["offset"])
            noise = options.get("temperature", 1.0) * noise.to(got.device)
            logit = [
                x + noise.gather(-1, y.clamp(min=0)[..., None])[..., 0] for x, y in zip(logit, (got, want), strict=True)
            ]
        bound = 2e-5 if query.dtype in (torch.float32, torch.float64) else ROUNDING * (1 + options.get("softcap", 0))
        assert ((logit[1] - logit[0])[differ] <= bound).all()
    return got


ROUNDING = 2e-3  # of tanh on CUDA, in units of the softcap, and of sums of products


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FULL_DTYPES, ids=str)
def test_shapes_and_masks(dtype: torch.dtype, shape: Shape, mask: str, device: torch.device) -> None:
    query, key = operands(shape, dtype, device)
    check(query, key, **MASKS[mask])
    check(query, key, **MASKS[mask], seed=5, offset=3, temperature=0.7)


@pytest.mark.parametrize(
    "names", [*((name,) for name in TERMS), ("softcap", "attn_mask", "key_bias", "key_mask")], ids=str
)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_terms(names: tuple[str, ...], shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    tried = {"grouped_queries", "causal", "window", "softcap", "attn_mask", "key_bias", "key_mask"}
    assert all(set(row.features) == tried for row in table() if row.operator == "pointer_sample")
    query, key = operands(shape, dtype, device)
    terms = terms_of(names, shape, dtype, device)
    check(query, key, is_causal=True, **terms)
    check(query, key, window=(60, 9), seed=2**63 - 1, offset=2**32 - 1, **terms)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_head_dims(head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    query, key = operands(Shape(length_q=150, length_k=140, head_dim=head_dim, heads=2), dtype, device)
    check(query, key, seed=-1, offset=0)


def test_every_instruction_set(instruction_set: str, device: torch.device) -> None:
    query, key = operands(Shape(length_q=130, length_k=500, head_dim=64, heads=2), torch.bfloat16, device)
    check(query, key, is_causal=True)
    check(query, key, window=(100, 7), seed=1, offset=1)


def test_frequencies(dtype: torch.dtype, device: torch.device) -> None:
    """Keys are drawn as often as their probabilities say, independently of each other."""
    rows = 4096
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -2.0, 1.5, -math.inf], device=device).to(parameter_dtype(dtype))
    query = torch.ones(2, 2, rows, 8, dtype=dtype, device=device)
    key = torch.zeros(2, 2, 8, 8, dtype=dtype, device=device)
    for temperature in (1.0, 0.5, 3.0):
        drawn = attnx.pointer_sample(
            query, key, key_bias=logits.expand(1, 1, 8).contiguous(), temperature=temperature, seed=11, offset=7
        )
        p = (logits.double() / temperature).softmax(0)
        n = drawn.numel()
        share = torch.bincount(drawn.flatten(), minlength=8).double() / n
        assert ((share - p).abs() <= 4 * (p * (1 - p) / n).sqrt()).all(), temperature
        assert share[7] == 0
        # Rows, heads and sequences draw apart: two of them agree as often as independent draws do.
        by_head, agree = drawn.flatten(0, 1), (p**2).sum()
        bound = 4 * float((agree * (1 - agree) / rows).sqrt())
        for i, j in ((0, 1), (0, 2), (1, 3)):
            assert abs(float((by_head[i] == by_head[j]).double().mean() - agree)) < bound
        assert abs(float((by_head[0, 1:] == by_head[0, :-1]).double().mean() - agree)) < bound


# The first key's u is 1.2e-8, and above 1 - 2^-24, in the first row of these rounds of seed 1.
@pytest.mark.parametrize("offset", [0, 16375533, 21465742])
def test_draws_are_exact(offset: int, dtype: torch.dtype, device: torch.device) -> None:
    """A key wins over another as soon as its logit makes up for what was drawn less, within a few roundings."""
    noise = reference.gumbel_noise((1, 1, 256, 2), 1, offset)
    assert noise.isfinite().all()
    assert offset == 0 or noise[0, 0, 0, 0] == pytest.approx({16375533: 18.25, 21465742: -2.81}[offset], abs=0.01)
    query, key = torch.zeros(1, 1, 256, 8, dtype=dtype), torch.zeros(1, 1, 2, 8, dtype=dtype)
    for margin, chosen in ((3e-5, 1), (-3e-5, 0)):
        logits = torch.zeros(1, 1, 256, 2, dtype=torch.float64)
        logits[..., 1] = noise[..., 0] - noise[..., 1] + margin
        mask = logits.to(device, parameter_dtype(dtype))
        got = attnx.pointer_sample(query.to(device), key.to(device), attn_mask=mask, seed=1, offset=offset)
        assert (got == chosen).all()


def test_rare_keys(dtype: torch.dtype, device: torch.device) -> None:
    """The tail of the draws is there: of many keys each may be the one, whatever its place in a group of Philox."""
    query = torch.zeros(1, 1, 2048, 8, dtype=dtype, device=device)
    key = torch.zeros(1, 1, 1000, 8, dtype=dtype, device=device)
    drawn = attnx.pointer_sample(query, key, seed=3, offset=0).flatten()
    for groups in (2, 4, 16, 50):
        share = torch.bincount(drawn * groups // 1000, minlength=groups).double() / 2048
        assert ((share - 1 / groups).abs() < 4 * (1 / groups / 2048) ** 0.5).all()
    assert len(drawn.unique()) > 800  # of 1000 (1 - e^-2.048) = 871


def test_rounds(dtype: torch.dtype, device: torch.device) -> None:
    query, key = operands(SHAPES[0], dtype, device)

    def draw(seed: Any, offset: Any) -> Tensor:
        return attnx.pointer_sample(query, key, seed=seed, offset=offset)

    first = draw(1, 2)
    assert torch.equal(first, draw(1, 2))
    assert torch.equal(first, draw(torch.tensor(1, device=device), torch.tensor(2, device=device)))
    assert not torch.equal(first, draw(1, 3))
    assert not torch.equal(first, draw(2, 2))
    generator = torch.Generator(device).manual_seed(9)
    one = attnx.pointer_sample(query, key, generator=generator)
    assert not torch.equal(one, attnx.pointer_sample(query, key, generator=generator))
    assert torch.equal(one, attnx.pointer_sample(query, key, generator=generator.manual_seed(9)))
    assert torch.equal(attnx.pointer_sample(query, key, temperature=0.0), attnx.pointer_argmax(query, key))


def test_ties_and_rows_without_keys(dtype: torch.dtype, device: torch.device) -> None:
    query, key = operands(Shape(length_q=130, length_k=70, head_dim=64, heads=2), dtype, device)
    assert not attnx.pointer_argmax(query * 0, key).any()
    assert (attnx.pointer_argmax(query * 0, key, window=(9, 0))[..., 80:] == torch.arange(11, 61, device=device)).all()
    for function in (attnx.pointer_argmax, attnx.pointer_sample):
        assert (function(query, key, is_causal=True)[..., :60] == -1).all()
        assert (function(query, key[:, :, :0]) == -1).all()
        assert function(query[:, :, :0], key).shape == (1, 2, 0)
        assert function(query[:0], key[:0]).shape == (0, 2, 130)
        hidden = torch.zeros(130, 70, dtype=torch.bool, device=device)
        assert (function(query, key, attn_mask=hidden) == -1).all()
    repeated = key[:, :, :35].repeat(1, 1, 2, 1)
    assert (attnx.pointer_argmax(query, repeated) < 35).all()


@pytest.mark.backends("cpu")
def test_not_a_number(backend: object) -> None:
    """What a hidden key holds has no effect, and a NaN that is seen is never the largest."""
    query, key = operands(Shape(length_q=20, length_k=70, head_dim=16, heads=2), torch.float32, torch.device("cpu"))
    plain = attnx.pointer_argmax(query, key[:, :, :50])
    key[:, :, 50:] = math.nan
    assert torch.equal(attnx.pointer_argmax(query, key), plain)
    assert (attnx.pointer_argmax(query * math.nan, key) == -1).all()


def test_same_as_any_number_of_threads(threads: int, device: torch.device) -> None:
    query, key = operands(Shape(length_q=300, length_k=900, head_dim=16, heads=2), torch.bfloat16, device)
    several = attnx.pointer_sample(query, key, seed=1, offset=1)
    torch.set_num_threads(1)
    assert torch.equal(several, attnx.pointer_sample(query, key, seed=1, offset=1))


def test_strides(dtype: torch.dtype, device: torch.device) -> None:
    query, key = operands(SHAPES[0], dtype, device)
    moved = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key)]
    assert torch.equal(attnx.pointer_argmax(*moved), attnx.pointer_argmax(query, key))


def test_learned_scale(dtype: torch.dtype, device: torch.device) -> None:
    query, key = operands(SHAPES[0], dtype, device)
    scale = torch.tensor([0.5, -0.5, 0.25, -1.0], device=device, dtype=parameter_dtype(dtype))
    assert torch.equal(attnx.pointer_argmax(query, key, scale=scale), check(query, key, scale=scale))


def test_opcheck(dtype: torch.dtype, device: torch.device) -> None:
    shape = Shape(length_q=20, length_k=30, head_dim=64, heads=4, kv_heads=2)
    query, key = operands(shape, dtype, device)
    terms = terms_of(("attn_mask", "key_bias", "key_mask"), shape, dtype, device)
    of_round = torch.tensor(3, device=device), torch.tensor(1, device=device)
    band = (None, True, -1, -1, 0)
    sample = torch.ops.attnx.pointer_sample.default
    torch.library.opcheck(sample, (query, key, 2.0, *terms.values(), 1.0, *of_round, *band))
    torch.library.opcheck(sample, (query, key, None, None, None, None, 0.0, None, None, *band))


def test_it_has_no_gradient(dtype: torch.dtype, device: torch.device) -> None:
    query, key = operands(SHAPES[0], dtype, device)
    assert not attnx.pointer_argmax(query.requires_grad_(), key).requires_grad


@pytest.mark.backends("cpu")
def test_compiled(backend: object) -> None:
    query, key = operands(SHAPES[0], torch.float32, torch.device("cpu"))
    compiled = torch.compile(attnx.pointer_sample, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(
        compiled(query, key, seed=1, offset=2, softcap=2.0),
        attnx.pointer_sample(query, key, seed=1, offset=2, softcap=2.0),
    )


def test_autocast(device: torch.device) -> None:
    query, key = operands(SHAPES[0], torch.float32, device)
    with torch.autocast(device.type, torch.bfloat16):
        cast = attnx.pointer_argmax(query, key)
    assert torch.equal(cast, attnx.pointer_argmax(query.bfloat16(), key.bfloat16()))


def test_explain(dtype: torch.dtype, device: torch.device) -> None:
    query, key = operands(SHAPES[0], dtype, device)
    assert attnx.explain(attnx.pointer_sample, query, key).supported
    assert not attnx.explain(attnx.pointer_sample, query.int(), key.int()).supported


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "key": ({"key": None}, "key: expected a tensor, got None"),
    "temperature": ({"temperature": -1.0}, "temperature: expected a finite number from 0 on, got -1"),
    "temperature_infinite": ({"temperature": math.inf}, "temperature: expected a finite number from 0 on, got inf"),
    "temperature_type": ({"temperature": "high"}, "temperature: expected a finite number from 0 on, got 'high'"),
    "seed_alone": ({"seed": 3}, "offset: expected one with seed, got None"),
    "offset": ({"seed": 3, "offset": -1}, "offset: expected"),
    "softcap": ({"softcap": -2.0}, "softcap: expected None or a number above 0, got -2"),
    "attn_mask": ({"attn_mask": torch.zeros(3, 200)}, "attn_mask: expected shape (2 or 1, 4 or 1, 150 or 1, 200)"),
    "key_bias": ({"key_bias": torch.zeros(2, 3, 200)}, "key_bias: expected shape (2 or 1, 4 or 1, 200)"),
    "key_mask": ({"key_mask": torch.full((2, 1, 200), 2.0)}, "key_mask: expected numbers from 0 to 1, got 2"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, backend: Backend, dtype: torch.dtype, device: torch.device) -> None:
    options, message = BAD[case]
    query, key = operands(SHAPES[0], dtype, device)
    options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    if case == "key_mask" and device.type == "cuda":
        pytest.skip("nothing looks at values there")
    with pytest.raises(RuntimeError, match=re.escape(message)):
        attnx.pointer_sample(query, **{"key": key} | options)


def test_bad_calls_of_the_operator(dtype: torch.dtype, device: torch.device) -> None:
    query, key = operands(SHAPES[0], dtype, device)
    rest = (None, False, -1, -1, 0)
    with pytest.raises(RuntimeError, match="seed: expected a tensor with a temperature above 0, got None"):
        torch.ops.attnx.pointer_sample(query, key, None, None, None, None, 1.0, None, None, *rest)
    with pytest.raises(RuntimeError, match="temperature: expected a finite number from 0 on, got nan"):
        torch.ops.attnx.pointer_sample(query, key, None, None, None, None, math.nan, None, None, *rest)
