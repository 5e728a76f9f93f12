"""Sparse-linear attention against its definition in float64, closed forms and the dense operators."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import attnx
from attnx import SparseLinearMap
from attnx._capability import dtype_name
from attnx._operators.sparse_linear import labels_by_sorting
from attnx.testing import assert_close
from backends import Backend
from cases import DTYPES, Shape, pack, random_inputs

cpu = pytest.mark.backends("cpu")  # for what needs float64, or an instruction set or threads of its own

SCOPES = ["marginal", "noncritical", "all"]
FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: x.softmax(-1),
    "elu": lambda x: torch.nn.functional.elu(x) + 1,
    "relu": torch.relu,
}
SHAPES = [
    Shape(length_q=200, length_k=330, head_dim=32, heads=2),
    Shape(length_q=330, length_k=200, head_dim=20, value_dim=9, batch=2, heads=4, kv_heads=2),
    Shape(length_q=10, length_k=70, head_dim=64, value_dim=130, heads=2, kv_heads=1),
    # More blocks than the sums of prefixes are apart.
    Shape(length_q=1300, length_k=1300, head_dim=8, heads=1),
]


def random_map(
    shape: Shape, block_size: tuple[int, int], device: torch.device, shares: tuple[float, ...] = (0.3, 0.4, 0.3)
) -> SparseLinearMap:
    """Negligible, marginal and critical blocks in these shares, a row of each left without."""
    blocks = -(-shape.length_q // block_size[0]), -(-shape.length_k // block_size[1])
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(shape.batch, shape.heads, *blocks, generator=generator)
    labels = torch.bucketize(draws, torch.tensor(shares).cumsum(0)[:-1]) - 1
    labels[:, 0, 0] = 1
    labels[:, -1, -1] = -1
    return SparseLinearMap(labels.to(device, torch.int8), block_size)


def both(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
    """The two parts side by side, as one output."""
    return lambda *args, **options: torch.cat(function(*args, **options), -1)


def eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block_map: SparseLinearMap,
    feature_map: str = "softmax",
    linear_scope: str = "marginal",
    is_causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch, every step rounded to the dtype of query."""
    groups, (block_q, block_k) = query.shape[1] // key.shape[1], block_map.block_size
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    length_q, length_k = query.shape[2], key.shape[2]
    labels = block_map.labels.repeat_interleave(block_q, 2).repeat_interleave(block_k, 3)[:, :, :length_q, :length_k]
    seen = torch.ones_like(labels, dtype=torch.bool)
    if is_causal:
        seen = seen.tril(length_k - length_q)
    critical = (labels == 1) & seen
    logits = (query @ (key / math.sqrt(query.shape[3])).mT).masked_fill(~critical, torch.finfo(query.dtype).min)
    sparse = logits.softmax(-1).masked_fill(~critical, 0.0) @ value
    scope = seen & {"marginal": labels == 0, "noncritical": labels != 1, "all": labels < 2}[linear_scope]
    phi = FEATURE_MAPS[feature_map]
    weights = (phi(query) @ phi(key).mT).masked_fill(~scope, 0.0)
    total = weights.sum(-1, keepdim=True)
    return sparse, weights @ value / total.masked_fill(total == 0, 1.0)


def results(attention: Callable[..., Tensor], inputs: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    output = attention(**leaves, **options)
    generator = torch.Generator().manual_seed(7)
    grad = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
    gradients = torch.autograd.grad(output, list(leaves.values()), grad)
    return {"output": output.detach()} | {f"grad_{name}": g for name, g in zip(leaves, gradients, strict=True)}


def check(inputs: dict[str, Tensor], block_map: SparseLinearMap, **options: Any) -> None:
    options["block_map"] = block_map
    actual = results(both(attnx.sparse_linear_attention), inputs, **options)
    exact = {name: x.double() for name, x in inputs.items()}
    expected = results(both(attnx.reference.sparse_linear_attention), exact, **options)
    baseline = results(both(eager), inputs, **options)
    for name, x in actual.items():
        assert x.dtype == inputs["query"].dtype
        assert_close(x, expected[name], baseline[name], name=name)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_definition(
    feature_map: str, scope: str, shape: Shape, is_causal: bool, device: torch.device, dtype: torch.dtype
) -> None:
    inputs, _ = random_inputs(shape, dtype, device)
    block_map = random_map(shape, (64, 64), device)
    check(inputs, block_map, feature_map=feature_map, linear_scope=scope, is_causal=is_causal)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("block_size", [(64, 64), (128, 64), (64, 128), (128, 128)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_blocks(
    dtype: torch.dtype, block_size: tuple[int, int], is_causal: bool, device: torch.device
) -> None:
    inputs, _ = random_inputs(SHAPES[1], dtype, device)
    check(inputs, random_map(SHAPES[1], block_size, device), linear_scope="all", is_causal=is_causal)


@pytest.mark.parametrize("shares", [(0.0, 0.95, 0.05), (0.95, 0.05, 0.0), (0.5, 0.0, 0.5)], ids=str)
def test_scopes_of_most_few_and_no_blocks(shares: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> None:
    inputs, _ = random_inputs(SHAPES[3], dtype, device)
    for is_causal in (False, True):
        check(inputs, random_map(SHAPES[3], (64, 64), device, shares), is_causal=is_causal, feature_map="elu")


@cpu
def test_every_instruction_set(instruction_set: str, device: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        inputs, _ = random_inputs(SHAPES[1], dtype, device)
        check(inputs, random_map(SHAPES[1], (64, 64), device), linear_scope="all", is_causal=True)


@cpu
def test_threads(threads: int, device: torch.device) -> None:
    inputs, _ = random_inputs(SHAPES[3], torch.float32, device)
    check(inputs, random_map(SHAPES[3], (64, 64), device), is_causal=True)


@cpu
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_gradcheck(is_causal: bool, scope: str, device: torch.device) -> None:
    shape = Shape(length_q=130, length_k=130, head_dim=3, value_dim=2, heads=2, kv_heads=1)
    inputs, _ = random_inputs(shape, torch.float64, device)
    block_map = random_map(shape, (64, 64), device)

    def attention(*x: Tensor) -> Any:
        options: dict[str, Any] = {"feature_map": "elu", "linear_scope": scope, "is_causal": is_causal}
        return attnx.sparse_linear_attention(*x, block_map=block_map, **options)

    leaves = tuple(x.requires_grad_() for x in inputs.values())
    assert torch.autograd.gradcheck(attention, leaves, fast_mode=True)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_everything_critical_is_softmax_attention(is_causal: bool, device: torch.device, dtype: torch.dtype) -> None:
    inputs, _ = random_inputs(SHAPES[1], dtype, device)
    options: dict[str, Any] = {"critical": 1.0, "negligible": 0.0, "is_causal": is_causal}
    sparse, linear = attnx.sparse_linear_attention(**inputs, **options)
    torch.testing.assert_close(sparse, attnx.softmax_attention(**inputs, is_causal=is_causal))
    assert not linear.any(), "an empty scope gives 0"


@cpu
def test_closed_forms(device: torch.device) -> None:
    """Linear attention over all keys is one product; without the critical blocks it is that less theirs."""
    shape = Shape(length_q=150, length_k=200, head_dim=8)
    inputs, _ = random_inputs(shape, torch.float64, device)
    query, key, value = inputs.values()
    block_map = random_map(shape, (64, 64), device)
    phi_q, phi_k = query.softmax(-1), key.softmax(-1)
    numerator, denominator = phi_q @ (phi_k.mT @ value), phi_q @ phi_k.sum(2)[..., None]
    _, linear = attnx.sparse_linear_attention(query, key, value, block_map=block_map, linear_scope="all")
    torch.testing.assert_close(linear, numerator / denominator)

    critical = (block_map.labels == 1).repeat_interleave(64, 2).repeat_interleave(64, 3)[:, :, :150, :200]
    of_critical = (phi_q @ phi_k.mT) * critical
    rest = denominator - of_critical.sum(-1, keepdim=True)
    some = ~critical.all(-1)
    _, linear = attnx.sparse_linear_attention(query, key, value, block_map=block_map, linear_scope="noncritical")
    torch.testing.assert_close(linear[some], ((numerator - of_critical @ value) / rest)[some])


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("lengths", [([70, 1, 200], [70, 1, 200]), ([5, 0, 130], [140, 30, 64])], ids=str)
def test_varlen(
    lengths: tuple[list[int], list[int]], is_causal: bool, device: torch.device, dtype: torch.dtype
) -> None:
    inputs, _, sizes = pack(lengths, dtype, device)
    options: dict[str, Any] = {"critical": 0.3, "negligible": 0.3, "is_causal": is_causal, "linear_scope": "all"}
    cu_seqlens = sizes["cu_seqlens_q"], sizes["cu_seqlens_k"]
    actual = results(both(attnx.sparse_linear_attention_varlen), inputs, **sizes, **options)

    def each(**leaves: Tensor) -> Tensor:
        outputs = []
        for q, k, v in zip(
            leaves["query"].split(lengths[0]),
            leaves["key"].split(lengths[1]),
            leaves["value"].split(lengths[1]),
            strict=True,
        ):
            output = both(attnx.sparse_linear_attention)(*(x.transpose(0, 1)[None] for x in (q, k, v)), **options)
            outputs.append(output[0].transpose(0, 1))
        return torch.cat(outputs)

    expected = results(each, inputs)
    for name, x in actual.items():
        torch.testing.assert_close(x, expected[name], msg=name)
    block_map = attnx.sparse_linear_block_map_varlen(
        inputs["query"], inputs["key"], *cu_seqlens, critical=0.3, negligible=0.3, is_causal=is_causal
    )
    options = {"block_map": block_map, "is_causal": is_causal, "linear_scope": "all"}
    reference = both(attnx.reference.sparse_linear_attention_varlen)(**inputs, **sizes, **options)
    tolerance = max(1e-4, 4 * torch.finfo(dtype).eps)
    torch.testing.assert_close(actual["output"].double(), reference, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("head_dims", [(1, 1), (33, 129), (40, 128)], ids=str)
@pytest.mark.parametrize("layout", ["heads_inside", "slice"])
def test_layouts(
    layout: str, head_dims: tuple[int, int], is_causal: bool, dtype: torch.dtype, device: torch.device
) -> None:
    """Rows that lie apart, on 16 bytes or not, with NaN between them."""
    shape = Shape(150, 170, *head_dims, batch=2, heads=4, kv_heads=2)
    inputs, _ = random_inputs(shape, dtype, device)
    block_map = random_map(shape, (64, 64), device)
    inputs = {name: in_layout(x, layout) for name, x in inputs.items()}
    check(inputs, block_map, linear_scope="noncritical", feature_map="elu", is_causal=is_causal)


@pytest.mark.parametrize("lengths", [(0, 100), (100, 0), (0, 0)], ids=str)
def test_empty_sequences(lengths: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    shape = Shape(*lengths, head_dim=16, heads=2, kv_heads=1)
    inputs, _ = random_inputs(shape, dtype, device)
    blocks = [-(-n // 64) for n in lengths]
    block_map = SparseLinearMap(torch.zeros(1, 2, *blocks, dtype=torch.int8, device=device), (64, 64))
    for x in results(both(attnx.sparse_linear_attention), inputs, block_map=block_map).values():
        assert not x.any()


def test_more_heads_than_run_at_once(dtype: torch.dtype, device: torch.device) -> None:
    """The states of three of these heads fill what the CUDA kernels keep in the L2 cache."""
    shape = Shape(length_q=40, length_k=4096, head_dim=256, heads=5)
    inputs, _ = random_inputs(shape, dtype, device)
    check(inputs, random_map(shape, (64, 64), device), feature_map="relu")


def test_repeats_bitwise(dtype: torch.dtype, device: torch.device, deterministic: None) -> None:
    inputs, _ = random_inputs(SHAPES[1], dtype, device)
    options: dict[str, Any] = {"block_map": random_map(SHAPES[1], (64, 64), device), "is_causal": True}
    first = results(both(attnx.sparse_linear_attention), inputs, **options)
    for _ in range(3):
        again = results(both(attnx.sparse_linear_attention), inputs, **options)
        assert all(torch.equal(x, again[name]) for name, x in first.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_both_branches_are_rounded_once(dtype: torch.dtype, device: torch.device) -> None:
    """Weights are equal and exact. The sparse branch gives 1 + 2**-12, which is 1 in 16 bits; the other gives -1."""
    query, key = (torch.zeros(1, 1, 64, 16, dtype=dtype, device=device) for _ in range(2))
    value = torch.randn(1, 1, 64, 16, generator=torch.Generator().manual_seed(0)).to(device, dtype).requires_grad_()
    block_map = SparseLinearMap(torch.ones(1, 1, 1, 1, dtype=torch.int8, device=device), (64, 64))
    parts = attnx.sparse_linear_attention(query, key, value, block_map=block_map, linear_scope="all")
    grads = [torch.ones_like(parts[0]), -torch.ones_like(parts[1])]
    grads[0][:, :, :2] += 2.0**-7
    (gradient,) = torch.autograd.grad(parts, value, grads)
    assert (gradient == 2.0**-12).all()


MAPS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "shares": {"critical": 0.3, "negligible": 0.4},
    "floor": {"critical": 0.3, "negligible": 0.4, "rounding": "floor"},
    "exact_shares": {"critical": 0.07, "negligible": 0.07},
    "none_negligible": {"critical": 0.0, "negligible": 0.0},
    "none_critical": {"critical": 0.0, "negligible": 1.0},
    "smooth": {"critical": 0.3, "smooth_k": True},
    "protected": {"critical": 0.2, "protect": 70},
    "all_protected": {"protect": 10_000},
}


@pytest.mark.parametrize("options", MAPS.values(), ids=MAPS)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("block_size", [(64, 64), (128, 64), (64, 128)], ids=str)
@pytest.mark.parametrize("lengths", [(200, 330), (1000, 1000), (64, 700), (700, 64), (1, 300)], ids=str)
def test_block_map(
    lengths: tuple[int, int],
    block_size: tuple[int, int],
    is_causal: bool,
    options: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    shape = Shape(*lengths, head_dim=8, heads=4, kv_heads=2)
    inputs, _ = random_inputs(shape, dtype, device)
    query, key = inputs["query"], inputs["key"]
    options = options | {"block_size": block_size, "is_causal": is_causal}
    actual = attnx.sparse_linear_block_map(query, key, **options)
    expected = attnx.reference.sparse_linear_block_map(query, key, **options)
    assert torch.equal(actual.labels, expected.labels)
    assert actual.labels.is_contiguous()
    assert not actual.labels.requires_grad


@pytest.mark.parametrize("scale", [0.0, -0.0, -1.0, None], ids=str)
def test_sign_of_the_scale_ranks(scale: float | None, dtype: torch.dtype, device: torch.device) -> None:
    """A scale of 0 makes equals of all blocks, of which the lower index comes first."""
    inputs, _ = random_inputs(Shape(length_q=130, length_k=640, head_dim=8), dtype, device)
    query, key = inputs["query"], inputs["key"]
    options = {"critical": 0.3, "negligible": 0.3, "scale": scale}
    actual = attnx.sparse_linear_block_map(query, key, **options).labels
    assert torch.equal(actual, attnx.reference.sparse_linear_block_map(query, key, **options).labels)
    if scale == 0:
        assert actual.eq(torch.tensor([1] * 3 + [0] * 4 + [-1] * 3, device=device)).all()


@pytest.mark.parametrize("length_k", [70, 131, 191, 1000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_tokens_are_equal_blocks(dtype: torch.dtype, length_k: int, device: torch.device) -> None:
    """The ragged last block, too, ranks by its index."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 8, 130, 32, generator=generator).to(device, dtype)
    key = torch.randn(1, 8, 1, 32, generator=generator).to(device, dtype).expand(-1, -1, length_k, -1)
    actual = attnx.sparse_linear_block_map(query, key, critical=0.2, negligible=0.3)
    expected = attnx.reference.sparse_linear_block_map(query, key, critical=0.2, negligible=0.3)
    assert torch.equal(actual.labels, expected.labels)


def check_selection(products: Tensor, backend: Backend, *arguments: Any) -> None:
    """The kernel beside torch's own operators, which serve other devices."""
    products = products.to(backend.device)
    selected = torch.ops.attnx.sparse_linear_labels(products, *arguments)
    assert torch.equal(selected, labels_by_sorting(products, *arguments))
    if torch.float64 in backend.dtypes():
        assert torch.equal(torch.ops.attnx.sparse_linear_labels(products.double(), *arguments), selected)


@pytest.mark.parametrize("options", MAPS.values(), ids=MAPS)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_selection_is_what_sorting_gives(is_causal: bool, options: dict[str, Any], backend: Backend) -> None:
    """Ties and NaN included, of either sign: what 0 / 0 gives on x86 has one."""
    for lengths, block_size in (((700, 1000), (64, 64)), ((1000, 700), (64, 128)), ((300, 300), (128, 64))):
        sizes = [-(-n // b) for n, b in zip(lengths, block_size, strict=True)]
        products = torch.randn(2, 3, *sizes, generator=torch.Generator().manual_seed(0)).round(decimals=1)
        products[0, 0, :, 0] = torch.nan
        products[0, 2, :, 1] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)
        products[0, 1] = -0.0
        products[0, 1, :, ::2] = 0.0
        shares = options.get("critical", 0.05), options.get("negligible", 0.1)
        how = options.get("rounding", "ceil"), is_causal, options.get("protect", 0)
        check_selection(products, backend, *lengths, *block_size, *shares, *how)


@pytest.mark.parametrize("kind", ["normal", "ties", "wide", "infinite", "nan", "tiny"])
@pytest.mark.parametrize("blocks", [33, 500, 4099, 60_001])
def test_selection_of_long_rows(blocks: int, kind: str, backend: Backend) -> None:
    """Rows of any numbers, and longer ones than shared memory holds."""
    generator = torch.Generator().manual_seed(0)
    products = torch.randn(1, 1 if blocks > 500 else 7, 1, blocks, generator=generator)
    match kind:
        case "ties":
            products = products.round(decimals=1)
        case "wide":
            products = products * (20 * torch.randn(products.shape, generator=generator)).exp()
        case "infinite":
            products[..., ::3], products[..., 1::3] = torch.inf, -torch.inf
        case "nan":
            products[..., ::2] = torch.nan
        case "tiny":
            products = products * 1e-42
    for shares in ((0.05, 0.1), (0.4, 0.6), (0.0, 0.0)):
        check_selection(products, backend, 64, blocks * 64 - 5, 64, 64, *shares, "ceil", False, 130)


def in_layout(x: Tensor, layout: str) -> Tensor:
    """The same numbers in other places of a larger tensor, which is NaN elsewhere."""
    batch, heads, length, dim = x.shape
    if layout == "heads_inside":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    whole = x.new_full((batch, heads + 1, length + 2, dim + 5), math.nan)
    part = whole[:, 1:, 1:-1, 3:-2]
    return part.copy_(x)


@pytest.mark.parametrize("layout", ["contiguous", "heads_inside", "slice", "expanded"])
@pytest.mark.parametrize("head_dim", [1, 7, 16, 41, 96, 129, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_block_map_of_any_layout(dtype: torch.dtype, head_dim: int, layout: str, device: torch.device) -> None:
    shape = Shape(length_q=150, length_k=1000, head_dim=head_dim, batch=2, heads=6, kv_heads=2)
    inputs, _ = random_inputs(shape, dtype, device)
    query, key = inputs["query"], inputs["key"]
    if layout == "expanded":
        query, key = query[:1].expand_as(query), key[:, :1].expand_as(key)
    elif layout != "contiguous":
        query, key = in_layout(query, layout), in_layout(key, layout)
    options: dict[str, Any] = {"critical": 0.3, "negligible": 0.3, "smooth_k": True, "scale": -1.0}
    actual = attnx.sparse_linear_block_map(query, key, **options)
    expected = attnx.reference.sparse_linear_block_map(query, key, **options)
    assert torch.equal(actual.labels, expected.labels)


@pytest.mark.parametrize("options", MAPS.values(), ids=MAPS)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("beyond", [None, 0, 100])
@pytest.mark.parametrize(
    "lengths", [([70, 1, 500], [70, 1, 500]), ([5, 0, 130], [140, 300, 64]), ([5, 200], [0, 70])], ids=str
)
def test_block_map_varlen(
    lengths: tuple[list[int], list[int]],
    beyond: int | None,
    is_causal: bool,
    options: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Each sequence by itself, negligible beyond it; the longest may be told, and may be less than what is told."""
    inputs, _, sizes = pack(lengths, dtype, device)
    query, key = inputs["query"], inputs["key"]
    options = options | {"is_causal": is_causal}
    longest = [max(n) if beyond is None else min(max(n) + beyond, sum(n)) for n in lengths]
    told = {} if beyond is None else {f"max_seqlen_{x}": max(n) + beyond for x, n in zip("qk", lengths, strict=True)}
    cu_seqlens = sizes["cu_seqlens_q"], sizes["cu_seqlens_k"]
    labels = attnx.sparse_linear_block_map_varlen(query, key, *cu_seqlens, **told, **options).labels
    assert labels.shape == (len(lengths[0]), query.shape[1], *(-(-n // 64) for n in longest))
    expected = torch.full_like(labels, -1)
    for b, (q, k) in enumerate(zip(query.split(lengths[0]), key.split(lengths[1]), strict=True)):
        if q.shape[0] and k.shape[0]:
            own = attnx.reference.sparse_linear_block_map(
                *(x.transpose(0, 1)[None].contiguous() for x in (q, k)), **options
            ).labels
            expected[b, :, : own.shape[2], : own.shape[3]] = own[0]
    assert torch.equal(labels, expected)


def test_block_map_refuses_a_maximum_below_the_longest(dtype: torch.dtype, device: torch.device) -> None:
    inputs, _, sizes = pack(([70, 3], [70, 3]), dtype, device)
    cu_seqlens = sizes["cu_seqlens_q"], sizes["cu_seqlens_k"]
    with pytest.raises(RuntimeError, match="max_seqlen_q: expected at least the longest sequence, 70, got 69"):
        attnx.sparse_linear_block_map_varlen(inputs["query"], inputs["key"], *cu_seqlens, 69, 70)


def test_block_map_fits_torch(dtype: torch.dtype, device: torch.device) -> None:
    shape = Shape(length_q=300, length_k=200, head_dim=8)
    inputs, _ = random_inputs(shape, dtype, device)
    query, key = inputs["query"], inputs["key"]
    options = (64, 64, 0.3, 0.3, "ceil", True, 70, None, True)
    torch.library.opcheck(torch.ops.attnx.sparse_linear_block_map, (query, key, None, None, *options))
    packed, _, sizes = pack(([70, 3, 200], [70, 130, 5]), dtype, device)
    arguments = (packed["query"], packed["key"], *sizes.values())
    torch.library.opcheck(torch.ops.attnx.sparse_linear_block_map_varlen, (*arguments, *options))

    def block_map(*x: Any) -> Tensor:
        return attnx.sparse_linear_block_map_varlen(*x, critical=0.3, smooth_k=True).labels

    compiled = torch.compile(block_map, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), block_map(*arguments))
    stacked = [torch.stack([x, -2 * x]) for x in (query, key)]
    mapped = torch.vmap(lambda *x: attnx.sparse_linear_block_map(*x, critical=0.3).labels)(*stacked)
    each = [attnx.sparse_linear_block_map(*x, critical=0.3).labels for x in zip(*stacked, strict=True)]
    assert torch.equal(mapped, torch.stack(each))
    with torch.autocast(device.type, torch.bfloat16):
        labels = attnx.sparse_linear_block_map(query.float(), key.float()).labels
    assert torch.equal(labels, attnx.sparse_linear_block_map(query.bfloat16(), key.bfloat16()).labels)


@pytest.mark.backends("cuda", "emulated")
def test_map_of_more_products_than_are_made_at_once(dtype: torch.dtype, device: torch.device) -> None:
    """The means of small integers, and their products, are exact: so are the ties between them."""
    generator = torch.Generator().manual_seed(0)
    lengths = [131_072, 100_000]
    query, key = (torch.randint(-1, 2, (sum(lengths), 1, 2), generator=generator).to(device, dtype) for _ in range(2))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    labels = attnx.sparse_linear_block_map_varlen(query, key, cu_seqlens, cu_seqlens, max(lengths), max(lengths)).labels
    for own, q, k in zip(labels, query.split(lengths), key.split(lengths), strict=True):
        q, k = (torch.stack([part.float().mean(0) for part in x[:, 0].split(64)]) for x in (q, k))
        rows, blocks, length = len(q), len(k), len(k) * 64
        expected = labels_by_sorting((q @ k.mT)[None, None], length, length, 64, 64, 0.05, 0.1, "ceil", False, 0)
        assert torch.equal(own[:, :rows, :blocks], expected[0])


@pytest.mark.backends("cuda", "emulated")
@pytest.mark.parametrize("offset", [0.0, 30.0], ids=["centred", "far"])
@pytest.mark.parametrize("smooth_k", [False, True], ids=["plain", "smooth"])
@pytest.mark.parametrize("head_dim", [3, 64, 256])
@pytest.mark.parametrize("block_size", [(64, 64), (128, 64), (64, 128)], ids=str)
def test_products_are_as_accurate_as_float32(
    block_size: tuple[int, int], head_dim: int, smooth_k: bool, offset: float, dtype: torch.dtype, device: torch.device
) -> None:
    """The error is at most some roundings of the products of magnitudes."""
    shape = Shape(length_q=300, length_k=470, head_dim=head_dim, batch=2, heads=4, kv_heads=2)
    inputs, _ = random_inputs(shape, dtype, device)
    query, key = inputs["query"], inputs["key"] + offset
    blocks = [-(-n // b) for n, b in zip((shape.length_q, shape.length_k), block_size, strict=True)]
    padded = (blocks[1] + 3) // 4 * 4
    products = torch.full((*query.shape[:2], blocks[0], padded), math.nan, device=device)
    arguments = (
        *((x.data_ptr(), *x.stride()[:3]) for x in (query, key)),
        dtype_name(dtype),
        *(shape.batch, shape.heads, 2, shape.length_q, shape.length_k, head_dim, block_size, smooth_k, -2.0),
        products.data_ptr(),
    )
    workspace = torch.empty(attnx._C.cuda_block_products(*arguments, 0) + 256, dtype=torch.uint8, device=device)
    attnx._C.cuda_block_products(*arguments, (workspace.data_ptr() + 255) // 256 * 256)
    if device.type == "cuda":
        torch.cuda.synchronize()

    def means(x: Tensor, block: int) -> Tensor:
        return torch.stack([part.double().mean(2) for part in x.split(block, 2)], 2)

    mean_q, mean_k = means(query, block_size[0]), means(key, block_size[1])
    magnitudes = mean_k.abs() + key.double().mean(2, keepdim=True).abs() * smooth_k
    if smooth_k:
        mean_k = mean_k - key.double().mean(2, keepdim=True)
    mean_k, magnitudes = (x.repeat_interleave(2, 1) for x in (mean_k, magnitudes))
    error = (products[..., : blocks[1]].double() + mean_q @ mean_k.mT).abs()
    assert (error <= 4 * 2.0**-24 * (means(query.abs(), block_size[0]) @ magnitudes.mT)).all()


def test_block_map_ties_go_to_the_lower_index(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.ones(1, 1, 640, 4, dtype=dtype, device=device)
    labels = attnx.sparse_linear_block_map(x, x, critical=0.2, negligible=0.3).labels
    assert labels[0, 0, 0].tolist() == [1] * 2 + [0] * 5 + [-1] * 3


def test_shares_count_whole_blocks(dtype: torch.dtype, device: torch.device) -> None:
    """0.07 * 100 is a little more than 7 in floating point."""
    query, key = (torch.randn(1, 1, n, 4, dtype=dtype, device=device) for n in (64, 6400))
    labels = attnx.sparse_linear_block_map(query, key, critical=0.07, negligible=0.29).labels
    assert (labels == 1).sum() == 7
    assert (labels == -1).sum() == 29


def test_the_number_of_critical_blocks_is_rounded_as_told(dtype: torch.dtype, device: torch.device) -> None:
    """0.07 of 10 blocks is one either way, as a row has at least one; 0.07 of 100 is 7 either way."""
    for blocks, critical, counts in ((10, 0.25, (3, 2)), (10, 0.07, (1, 1)), (100, 0.07, (7, 7)), (7, 1.0, (7, 7))):
        query, key = (torch.randn(1, 1, n, 4, dtype=dtype, device=device) for n in (64, blocks * 64))
        for rounding, count in zip(("ceil", "floor"), counts, strict=True):
            shares = {"critical": critical, "negligible": 0, "rounding": rounding}
            labels = attnx.sparse_linear_block_map(query, key, **shares).labels
            assert (labels == 1).sum() == count, (blocks, critical, rounding)


def test_fits_torch(device: torch.device, dtype: torch.dtype) -> None:
    shape = Shape(length_q=130, length_k=130, head_dim=8)
    inputs, _ = random_inputs(shape, dtype, device)
    block_map = random_map(shape, (64, 64), device)
    leaves = [x.requires_grad_() for x in inputs.values()]
    options = (block_map.labels, 64, 64, "elu", "marginal", None, True)
    # A map drawn anew would be no int8 map: opcheck's own inputs are used as they are.
    torch.library.opcheck(torch.ops.attnx.sparse_linear_attention, (*leaves, None, None, *options))

    def attention(*x: Tensor) -> Tensor:
        return both(attnx.sparse_linear_attention)(*x, critical=0.3, is_causal=True)

    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), attention(*leaves))
    mapped = torch.vmap(lambda *x: both(attnx.sparse_linear_attention)(*x, block_map=block_map))
    stacked = [torch.stack([x, 2 * x]).detach() for x in leaves]
    each = (both(attnx.sparse_linear_attention)(*x, block_map=block_map) for x in zip(*stacked, strict=True))
    expected = torch.stack(list(each))
    torch.testing.assert_close(mapped(*stacked), expected)
    unmapped = torch.stack([attention(*x) for x in zip(*stacked, strict=True)])
    torch.testing.assert_close(torch.vmap(attention)(*stacked), unmapped)
    with torch.autocast("cpu", torch.bfloat16):
        assert attnx.sparse_linear_attention(*leaves)[1].dtype == torch.bfloat16


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "critical_above_1": ({"critical": 1.5}, "critical: expected a share of the blocks from 0 to 1, got 1.5"),
    "negligible_below_0": ({"negligible": -0.1}, "negligible: expected a share of the blocks from 0 to 1, got -0.1"),
    "shares_above_1": ({"critical": 0.6, "negligible": 0.5}, "critical, negligible: expected shares of at most 1"),
    "block_size": ({"block_size": (32, 64)}, "block_size: expected 64 or 128 on each side, got (32, 64)"),
    "no_pair": ({"block_size": 64}, "block_size: expected a pair (queries, keys), got 64"),
    "protect": ({"protect": -1}, "protect: expected a number of keys, 0 or more, got -1"),
    "feature_map": ({"feature_map": "gelu"}, "feature_map: expected softmax, elu or relu, got gelu"),
    "linear_scope": ({"linear_scope": "some"}, "linear_scope: expected marginal, noncritical or all, got some"),
    "map_and_share": (
        {"block_map": SparseLinearMap(torch.zeros(1, 2, 2, 3, dtype=torch.int8)), "critical": 0.5},
        "critical: expected its default with block_map, which has it settled, got 0.5",
    ),
    "map_of_another_length": (
        {"block_map": SparseLinearMap(torch.zeros(1, 2, 2, 2, dtype=torch.int8))},
        "block_map: expected shape (1 or 1, 2 or 1, 2, 3), got (1, 2, 2, 2)",
    ),
    "map_of_other_heads": (
        {"block_map": SparseLinearMap(torch.zeros(1, 3, 2, 3, dtype=torch.int8))},
        "block_map: expected shape (1 or 1, 2 or 1, 2, 3), got (1, 3, 2, 3)",
    ),
    "map_of_another_device": (
        {"block_map": SparseLinearMap(torch.zeros(1, 2, 2, 3, dtype=torch.int8, device="meta"))},
        "block_map: expected a tensor on cpu",
    ),
    "map_of_another_dtype": (
        {"block_map": SparseLinearMap(torch.zeros(1, 2, 2, 3))},
        "block_map: expected int8, got float32",
    ),
    "unknown_label": (
        {"block_map": SparseLinearMap(torch.full((1, 2, 2, 3), 2, dtype=torch.int8))},
        "block_map: expected 1 (critical), 0 (marginal) or -1 (negligible), got 2",
    ),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_input(options: dict[str, Any], message: str, device: torch.device, dtype: torch.dtype) -> None:
    inputs, _ = random_inputs(Shape(length_q=128, length_k=192), dtype, device)
    with pytest.raises(RuntimeError) as error:
        attnx.sparse_linear_attention(**inputs, **options)
    assert str(error.value).startswith(message)


@pytest.mark.backends("cuda", "emulated")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("blocks", [(1, 1), (3, 33), (40, 70), (300, 31), (513, 200), (0, 5), (5, 0)], ids=str)
def test_lists_of_critical_blocks(blocks: tuple[int, int], transposed: bool, device: torch.device) -> None:
    """Of maps larger than those that tests attend by; a label out of range is no critical one."""
    shape = (3, *blocks)
    labels = torch.randint(-1, 4, shape, generator=torch.Generator().manual_seed(0), dtype=torch.int8).to(device)
    labels[0, : blocks[0] // 2] = 1
    critical = (labels.mT if transposed else labels) == 1
    counts = torch.full(critical.shape[:2], -1, dtype=torch.int32, device=device)
    indices = torch.full(critical.shape, -1, dtype=torch.int32, device=device)
    attnx._C.cuda_critical_blocks(labels.data_ptr(), *shape, transposed, counts.data_ptr(), indices.data_ptr())
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert torch.equal(counts.long(), critical.sum(-1))
    each = torch.arange(critical.shape[2], device=device).expand(critical.shape)
    in_use = each < counts[..., None]
    assert torch.equal(indices[in_use].long(), each[critical])
    assert (indices[~in_use] == -1).all(), "entries that are not in use are not written"
