"""Probabilistic attention: its random numbers, its masks, its definition in float64, and what it estimates."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import attnx
from attnx import reference
from attnx._sampling import BlockGrid, solve_blocks_per_row
from attnx.nn import ProbabilisticAttention
from attnx.testing import assert_close
from cases import DTYPES, Shape, random_inputs
from compare import forward_backward

cpu = pytest.mark.backends("cpu")  # for what needs float64, or many rounds

ROUND: dict[str, Any] = {"seed": 1234567890123, "offset": 42}
FAMILIES: list[Any] = ["harmonic", "geometric", "power", "gaussian"]
MODES: list[Any] = ["bernoulli", "topm"]
LENGTHS = [(640, 640), (200, 330), (330, 200), (1, 300), (50, 40), (1000, 130)]


# Random numbers ------------------------------------------------------------------------------------------------------

# From the Random123 library's known answers: counter, key, words.
PHILOX = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([2**32 - 1] * 4, [2**32 - 1] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), PHILOX, ids=["zeros", "ones", "pi"])
def test_philox(counter: list[int], key: list[int], words: list[int]) -> None:
    c0, c1, c2, c3 = (torch.tensor(c) for c in counter)
    assert [int(w) for w in reference.philox((c0, c1, c2, c3), key[0] | key[1] << 32)] == words


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("block_size", [(64, 64), (128, 64), (64, 128)], ids=str)
@pytest.mark.parametrize("lengths", [*LENGTHS, (130, 70000)], ids=str)  # the last has rows of a thousand blocks
def test_mask_is_the_reference_s(
    lengths: tuple[int, int], block_size: tuple[int, int], mode: Any, is_causal: bool, device: torch.device
) -> None:
    for keep in FAMILIES:
        options = {"keep": keep, "mode": mode, "block_size": block_size, "is_causal": is_causal, **ROUND}
        actual = attnx.probabilistic_block_mask(2, 3, *lengths, **options, device=device)
        expected = reference.probabilistic_block_mask(2, 3, *lengths, **options)
        blocks = -(-lengths[1] // block_size[1])
        assert torch.equal(actual.to_dense(blocks).cpu(), expected.to_dense(blocks))
        used = torch.arange(actual.kv_indices.shape[-1], device=device) < actual.kv_num_blocks[..., None]
        steps = actual.kv_indices.diff(dim=-1)[used[..., 1:]]
        assert (steps > 0).all(), "lists ascend"


def test_the_race_s_logarithm() -> None:
    word = torch.cat([torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 1]), torch.randint(2**32, (1000,))])
    exact = -((word.double() + 0.5) * 2.0**-32).log2()
    assert ((reference._negative_log2(word).double() * 2.0**-24 - exact).abs() <= 2.0**-22).all()


@pytest.mark.parametrize("keep", FAMILIES)
def test_keep_rate_by_distance(keep: Any) -> None:
    """1e6 draws and more: each distance within 4 sigma of its probability."""
    blocks, heads = 64, 250
    mask = attnx.probabilistic_block_mask(1, heads, blocks * 64, blocks * 64, keep=keep, **ROUND).to_dense(blocks)
    p = attnx.keep_probabilities(keep, blocks).double()
    for distance in range(blocks):
        on_both_sides = [mask.diagonal(d, -2, -1).flatten() for d in {distance, -distance}]
        draws = torch.cat(on_both_sides).double()
        sigma = (p[distance] * (1 - p[distance]) / len(draws)).sqrt()
        assert (draws.mean() - p[distance]).abs() <= 4 * sigma + 1e-12


def test_topm_draws_by_weight() -> None:
    """Of two blocks besides the diagonal one is taken: by Gumbel-top-m with p / (p + q)."""
    keep = torch.tensor([1.0, 0.6, 0.2])
    options = {"keep": keep, "mode": "topm", "density": 2 / 3, **ROUND}
    mask = attnx.probabilistic_block_mask(1, 20000, 192, 192, **options).to_dense(3)[0]
    assert (mask.sum(-1) == 2).all()
    rate = mask[:, 0, 1].double().mean()  # the first row sees distances 0, 1, 2
    assert abs(rate - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 20000)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("block_size", [(64, 64), (128, 64), (64, 128)], ids=str)
def test_topm_keeps_as_many_in_each_row(block_size: tuple[int, int], is_causal: bool) -> None:
    """The same number, or all candidates where they are fewer; never fewer than the diagonal."""
    for lengths in LENGTHS:
        options = {"mode": "topm", "block_size": block_size, "is_causal": is_causal, **ROUND}
        counts = attnx.probabilistic_block_mask(2, 3, *lengths, **options).kv_num_blocks
        grid = BlockGrid(*lengths, *block_size, is_causal)
        m = solve_blocks_per_row("harmonic", None, grid)
        assert counts[0, 0].tolist() == [min(max(m, end - begin), most) for begin, end, most in grid.rows()]
        assert (counts == counts[0, 0]).all()


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("block_size", [(64, 64), (128, 64), (64, 128)], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_no_row_is_empty(
    lengths: tuple[int, int], block_size: tuple[int, int], is_causal: bool, device: torch.device, dtype: torch.dtype
) -> None:
    """Not even if nothing but the diagonal is kept: every query that sees a key keeps one."""
    inputs, _ = random_inputs(Shape(*lengths, head_dim=4, heads=1), dtype, device)
    keep = torch.zeros(-(-lengths[1] // block_size[1]), device=device)
    keep[0] = 1
    options = {"is_causal": is_causal, "return_logsumexp": True}
    _, dense = attnx.softmax_attention(**inputs, **options)
    _, sampled = attnx.probabilistic_attention(**inputs, keep=keep, block_size=block_size, **options, **ROUND)
    assert torch.equal(sampled.isfinite(), dense.isfinite())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("keep", FAMILIES)
def test_density(keep: Any, is_causal: bool, mode: Any) -> None:
    blocks = 40
    options = {"keep": keep, "density": 0.3, "mode": mode, "is_causal": is_causal}
    mask = attnx.probabilistic_block_mask(1, 200, blocks * 64, blocks * 64, **options, **ROUND).to_dense(blocks)
    candidates = torch.ones(blocks, blocks).tril().sum() if is_causal else blocks * blocks
    assert abs(float(mask.double().sum() / candidates / 200) - 0.3) < (0.005 if mode == "bernoulli" else 0.02)


@pytest.mark.backends("cpu")
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("length", [1, 60, 130])
def test_density_of_short_sequences(length: int, is_causal: bool, mode: Any) -> None:
    """Where the diagonal is more than the share, it is what takes part; training meets the lengths as they come."""
    options = {"density": 0.01, "mode": mode, "is_causal": is_causal, **ROUND}
    mask = attnx.probabilistic_block_mask(1, 2, length, length, **options)
    assert torch.equal(mask.to_dense()[0, 0], torch.eye(-(-length // 64), dtype=torch.bool))
    module = ProbabilisticAttention(24, 4, density=0.05, mode=mode, is_causal=is_causal)
    for length_of_batch in (5, 200, 64):
        module.train()(torch.randn(2, length_of_batch, 24)).sum().backward()


# What the operator computes -------------------------------------------------------------------------------------------


def eager(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """The formula in the dtype of query, every step rounded."""
    score, importance, is_causal = (options.get(name) for name in ("score", "importance", "is_causal"))
    length_q, length_k = query.shape[2], key.shape[2]
    names = ("keep", "density", "mode", "is_causal", "seed", "offset")
    masks = {name: options[name] for name in names if name in options}
    block_q, block_k = options.get("block_size", (64, 64))
    mask = reference.probabilistic_block_mask(
        *query.shape[:2], length_q, length_k, block_size=(block_q, block_k), **masks
    )
    blocks = -(-length_k // block_k)

    def elements(x: Tensor) -> Tensor:
        x = x.repeat_interleave(block_q, -2).repeat_interleave(block_k, -1)[..., :length_q, :length_k]
        return x.to(query.device)

    visible = elements(mask.to_dense(blocks))
    if is_causal:
        visible = visible & torch.ones_like(visible).tril(length_k - length_q)
    p = torch.ones(length_q, length_k, device=query.device)
    if importance:
        draw = reference._draw("harmonic", None, "bernoulli", (length_q, length_k), (block_q, block_k), bool(is_causal))
        distance = draw.distance
        p = elements(attnx.keep_probabilities(options.get("keep", "harmonic"), blocks)[distance])
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    logits = query @ (key / math.sqrt(query.shape[3])).mT
    if score == "sigmoid":
        weights = (logits - math.log(length_k)).sigmoid() / p.to(logits.dtype)
        return weights.masked_fill(~visible, 0.0) @ value
    logits = (logits - p.log().to(logits.dtype)).masked_fill(~visible, torch.finfo(logits.dtype).min)
    return logits.softmax(-1).masked_fill(~visible, 0.0) @ value


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"importance": True},
        {"importance": True, "is_causal": True, "block_size": (128, 64)},
        {"importance": True, "block_size": (128, 128)},
        {"mode": "topm", "block_size": (128, 128)},
    ],
    ids=str,
)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_definition(dtype: torch.dtype, score: str, options: dict[str, Any], device: torch.device) -> None:
    for shape in (
        Shape(length_q=330, length_k=330, head_dim=32),
        Shape(length_q=200, length_k=450, head_dim=20, value_dim=9, batch=2, heads=4, kv_heads=2),
        Shape(length_q=40, length_k=50, head_dim=16),
        Shape(length_q=260, length_k=400, head_dim=128, heads=1),
    ):
        inputs, grad_output = random_inputs(shape, dtype, device)
        options = options | {"score": score, **ROUND}
        actual = forward_backward(attnx.probabilistic_attention, inputs, grad_output, **options)
        exact = {name: x.double() for name, x in inputs.items()}
        expected = forward_backward(reference.probabilistic_attention, exact, grad_output.double(), **options)
        baseline = forward_backward(eager, inputs, grad_output, **options)
        for name, x in actual.items():
            assert_close(x, expected[name], baseline[name], name=name)


@cpu
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_gradcheck(score: Any, device: torch.device) -> None:
    inputs, _ = random_inputs(Shape(length_q=150, length_k=200, head_dim=3, value_dim=2), torch.float64, device)

    def attention(*x: Tensor) -> Any:
        lse = score == "softmax"
        return attnx.probabilistic_attention(*x, score=score, importance=True, return_logsumexp=lse, **ROUND)

    leaves = tuple(x.requires_grad_() for x in inputs.values())
    assert torch.autograd.gradcheck(attention, leaves, fast_mode=True)


@cpu
def test_importance_is_unbiased(device: torch.device) -> None:
    """The means over rounds come to the dense results at the Monte Carlo rate, element by element."""
    # Many heads: the draws are few, and each decides about 64 rows.
    shape = Shape(batch=4, length_q=320, length_k=320, head_dim=4, heads=4)
    inputs, _ = random_inputs(shape, torch.float64, device)
    rounds = 200
    options: dict[str, Any] = {"importance": True, "seed": 5}

    def within(estimates: Tensor, truth: Tensor) -> None:
        error, sigma = estimates.mean(0) - truth, estimates.std(0) / math.sqrt(rounds)
        assert (error.abs() <= 6 * sigma + 1e-12).all()
        # As a whole: the mean square of errors in units of their own sigma is 1.
        assert 0.7 < (error / sigma.clamp(min=1e-15)).square()[sigma > 1e-9].mean() < 1.4

    sigmoid = [attnx.probabilistic_attention(**inputs, score="sigmoid", offset=i, **options) for i in range(rounds)]
    within(torch.stack(sigmoid), attnx.sigmoid_attention(**inputs))
    parts = [attnx.probabilistic_attention(**inputs, offset=i, return_logsumexp=True, **options) for i in range(rounds)]
    output, logsumexp = attnx.softmax_attention(**inputs, return_logsumexp=True)
    within(torch.stack([lse.exp() for _, lse in parts]), logsumexp.exp())
    numerators = torch.stack([o * lse.exp()[..., None] for o, lse in parts])
    within(numerators, output * logsumexp.exp()[..., None])


@cpu
def test_softmax_approaches_dense_as_the_density_grows(device: torch.device) -> None:
    inputs, _ = random_inputs(Shape(length_q=640, length_k=640, head_dim=8), torch.float32, device)
    dense = attnx.softmax_attention(**inputs)
    errors = [
        float((attnx.probabilistic_attention(**inputs, density=p, importance=True, **ROUND) - dense).square().mean())
        for p in (0.2, 0.5, 0.9, 1.0)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-12


# How it lives with torch ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("deterministic")
def test_fits_torch(device: torch.device, dtype: torch.dtype) -> None:
    inputs, _ = random_inputs(Shape(length_q=320, length_k=320, head_dim=8), dtype, device)
    leaves = [x.requires_grad_() for x in inputs.values()]
    keep = attnx.keep_probabilities("harmonic", 5, device=device)
    numbers = [torch.tensor(x, device=device) for x in ROUND.values()]
    arguments = (*leaves, None, None, keep, *numbers, 0, True, 64, 64, "softmax", "none", 0.0, None, True)
    torch.library.opcheck(torch.ops.attnx.probabilistic_attention, arguments)
    results = [x.detach() for x in torch.ops.attnx.probabilistic_attention(*arguments)]
    saved = [torch.ones_like(x) for x in results] + [x.detach() for x in leaves] + results
    torch.library.opcheck(torch.ops.attnx.probabilistic_attention_backward, (*saved, *arguments[3:], False))
    sizes = (2, 3, 320, 320, 64, 64, 0, True)
    torch.library.opcheck(torch.ops.attnx.probabilistic_block_lists, (keep, *numbers, *sizes))

    def attention(*x: Tensor) -> Tensor:
        return attnx.probabilistic_attention(*x, density=0.6, is_causal=True, **ROUND)

    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), attention(*leaves), rtol=0, atol=0)
    grads, expected = (torch.autograd.grad(f(*leaves).sum(), leaves) for f in (compiled, attention))
    for actual, x in zip(grads, expected, strict=True):
        torch.testing.assert_close(actual, x, rtol=0, atol=0)
    drawn = torch.compile(lambda *x: attnx.probabilistic_attention(*x), fullgraph=True, backend="aot_eager")
    assert not torch.equal(drawn(*leaves), drawn(*leaves)), "every call has a round of its own"
    stacked = [torch.stack([x, 2 * x]).detach() for x in leaves]
    each = torch.stack([attention(*x) for x in zip(*stacked, strict=True)])
    torch.testing.assert_close(torch.vmap(attention)(*stacked), each)


@pytest.mark.backends("cuda")  # the emulator captures no graphs
@pytest.mark.parametrize("mode", MODES)
def test_a_captured_graph_draws_new_rounds(mode: Any, device: torch.device, dtype: torch.dtype) -> None:
    inputs, grad_output = random_inputs(Shape(length_q=640, length_k=640, head_dim=64), dtype, device)
    leaves = [x.requires_grad_() for x in inputs.values()]
    seed, offset = (torch.tensor(x, device=device) for x in ROUND.values())

    def step() -> list[Tensor]:
        output = attnx.probabilistic_attention(*leaves, mode=mode, seed=seed, offset=offset)
        return [output.detach(), *torch.autograd.grad(output, leaves, grad_output)]

    step()  # what is made once is made before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for number in (1, 2):
        offset.fill_(number)
        graph.replay()
        for actual, expected in zip(captured, step(), strict=True):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("options", [{}, {"density": 0.6}, {"mode": "topm"}, {"mode": "topm", "density": 0.6}], ids=str)
def test_compiles_for_any_length(options: dict[str, Any], device: torch.device, dtype: torch.dtype) -> None:
    """One graph, also where lengths and density are symbols; torch's seed draws the rounds of eager mode."""
    torch._dynamo.reset()

    def attention(query: Tensor, **options: Any) -> Tensor:
        return attnx.probabilistic_attention(query, query, query, **options)

    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (320, 448):
        query = random_inputs(Shape(length_q=length, head_dim=8), dtype, device)[0]["query"]
        torch.manual_seed(0)
        actual = compiled(query, **options)
        torch.manual_seed(0)
        assert torch.equal(actual, attention(query, **options))


@pytest.mark.parametrize("mode", MODES)
def test_vmap_over_rounds(mode: Any, device: torch.device, dtype: torch.dtype) -> None:
    query = random_inputs(Shape(length_q=320, head_dim=8), dtype, device)[0]["query"]
    seed = torch.tensor(3, device=device)

    def attention(offset: Tensor) -> Tensor:
        # The seed belongs to the example, too.
        options = {"density": 0.6, "mode": mode, "seed": seed + 0 * offset, "offset": offset}
        return attnx.probabilistic_attention(query, query, query, **options)

    offsets = torch.arange(3, device=device)
    assert torch.equal(torch.vmap(attention)(offsets), torch.stack([attention(x) for x in offsets]))


def test_no_second_derivative(device: torch.device, dtype: torch.dtype) -> None:
    inputs, _ = random_inputs(Shape(), dtype, device)
    leaves = [x.requires_grad_() for x in inputs.values()]
    (gradient,) = torch.autograd.grad(attnx.probabilistic_attention(*leaves).sum(), leaves[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.sum().backward()


def test_autocast(device: torch.device) -> None:
    inputs, _ = random_inputs(Shape(length_q=320, length_k=320), torch.float32, device)
    with torch.autocast(device.type, torch.bfloat16):
        output = attnx.probabilistic_attention(**inputs, **ROUND)
    cast = {name: x.bfloat16() for name, x in inputs.items()}
    assert torch.equal(output, attnx.probabilistic_attention(**cast, **ROUND))


def test_rounds() -> None:
    """From torch's seed, from a generator's, and the same in a new process."""

    def mask(**options: Any) -> Tensor:
        return attnx.probabilistic_block_mask(1, 2, 1280, 1280, **options).to_dense(20)

    torch.manual_seed(0)
    first, second = mask(), mask()
    torch.manual_seed(0)
    assert torch.equal(mask(), first)
    assert not torch.equal(first, second)
    of_generator = [mask(generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*of_generator)
    fixed = mask(**ROUND)
    assert torch.equal(mask(seed=torch.tensor(ROUND["seed"]), offset=torch.tensor(ROUND["offset"])), fixed)
    assert not torch.equal(mask(**(ROUND | {"offset": 43})), fixed)
    code = (
        "import attnx; mask = attnx.probabilistic_block_mask(1, 2, 1280, 1280, "
        f"seed={ROUND['seed']}, offset={ROUND['offset']}); print(mask.to_dense(20).int().flatten().tolist())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert run.stdout.strip() == str(fixed.int().flatten().tolist())


def test_evaluation(device: torch.device, dtype: torch.dtype) -> None:
    inputs, _ = random_inputs(Shape(length_q=320, length_k=320), dtype, device)
    dense = attnx.softmax_attention(**inputs)
    torch.testing.assert_close(attnx.probabilistic_attention(**inputs, training=False), dense)
    in_round = attnx.probabilistic_attention(**inputs, **ROUND)
    torch.testing.assert_close(attnx.probabilistic_attention(**inputs, training=False, **ROUND), in_round)


def test_module(device: torch.device, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = ProbabilisticAttention(24, 4, num_kv_heads=2, density=0.6, is_causal=True, qk_norm=True).to(device, dtype)
    x = torch.randn(2, 320, 24).to(device, dtype)
    torch.manual_seed(1)
    first = module(x)
    torch.manual_seed(1)
    torch.testing.assert_close(module(x), first, rtol=0, atol=0)
    assert not torch.equal(module(x), first)
    first.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())
    module.eval()
    query = module.q_norm(module.q_proj(x).unflatten(2, (4, 6))).transpose(1, 2)
    key = module.k_norm(module.k_proj(x).unflatten(2, (2, 6))).transpose(1, 2)
    value = module.v_proj(x).unflatten(2, (2, 6)).transpose(1, 2)
    dense = attnx.softmax_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(module(x), module.out_proj(dense.transpose(1, 2).flatten(2)))
    fixed = ProbabilisticAttention(24, 4, keep=torch.tensor([1.0, 0.5, 0.2, 0.1, 0.1]), eval_seed=3).eval()
    fixed = fixed.to(device, dtype)
    torch.testing.assert_close(fixed(x), fixed(x), rtol=0, atol=0)
    assert "keep_table" in fixed.state_dict()
    assert fixed.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "family": ({"keep": "uniform"}, "keep: expected one of harmonic, geometric, power, gaussian or a tensor, got"),
    "keep_above_1": ({"keep": torch.tensor([1.0, 1.5, 0.1])}, "keep: expected probabilities from 0 to 1, got 1.5"),
    "keep_below_0": ({"keep": torch.tensor([1.0, 0.5, -0.1])}, "keep: expected probabilities from 0 to 1, got -0.1"),
    "keep_stride": (
        {"keep": torch.ones(6)[::2]},
        "keep: expected a contiguous last dimension (stride 1), got stride 2",
    ),
    "keep_rank": ({"keep": torch.ones(3, 3)}, "keep: expected a probability for each distance, shape (3,) or longer"),
    "keep_gradient": ({"keep": torch.ones(3, requires_grad=True)}, "keep: expected a tensor that needs no gradient"),
    "keep_device": ({"keep": torch.ones(3, device="meta")}, "keep: expected a tensor on cpu like query, got one on me"),
    "keep_nan": ({"keep": torch.tensor([1.0, math.nan, 0.1])}, "keep: expected probabilities from 0 to 1, got nan"),
    "keep_0_below_1": ({"keep": torch.tensor([0.5, 0.5, 0.5])}, "keep: expected 1 at distance 0"),
    "keep_too_short": ({"keep": torch.ones(2)}, "keep: expected a probability for each distance, shape (3,) or longer"),
    "keep_float64": ({"keep": torch.ones(3).double()}, "keep: expected float32, got float64"),
    "density_above_1": ({"density": 1.5}, "density: expected None or a share of the blocks from 0 to 1, got 1.5"),
    "density_nan": ({"density": math.nan}, "density: expected None or a share of the blocks from 0 to 1, got nan"),
    "topm_of_a_tensor": ({"keep": torch.ones(3), "mode": "topm"}, "density: expected a number with mode="),
    "density_of_a_tensor": ({"keep": torch.ones(3), "density": 0.5}, "density: expected a number with mode="),
    "mode": ({"mode": "random"}, 'mode: expected "bernoulli" or "topm", got \'random\''),
    "topm_importance": ({"mode": "topm", "importance": True}, "importance: expected False with mode="),
    "score": ({"score": "relu"}, 'score: expected "sigmoid" or "softmax", got \'relu\''),
    "bias": ({"score": "sigmoid", "bias": torch.ones(2)}, 'bias: expected None, "row" or a float, got a tensor'),
    "bias_of_softmax": ({"bias": -1.0}, 'bias: expected None with score="softmax", got -1.0'),
    "block_size_number": ({"block_size": 64}, "block_size: expected a pair (queries, keys), got 64"),
    "block_size": ({"block_size": (32, 64)}, "block_size: expected 64 or 128 on each side, got (32, 64)"),
    "seed_alone": ({"seed": 3}, "offset: expected one with seed, got None"),
    "offset_alone": ({"offset": 3}, "seed: expected one with offset, got None"),
    "offset_too_large": ({"seed": 1, "offset": 2**32}, "offset: expected an int from 0 to 4294967295"),
    "offset_negative": (
        {"seed": 1, "offset": torch.tensor(-1)},
        "offset: expected a round from 0 to 4294967295, got -1",
    ),
    "seed_bool": ({"seed": True, "offset": 0}, "seed: expected an int from"),
    "seed_int32": ({"seed": torch.tensor(1).int(), "offset": 0}, "seed: expected int64, got int32"),
    "seed_shape": ({"seed": torch.tensor([1]), "offset": 0}, "seed: expected a tensor of shape (), got (1,)"),
    "generator_and_seed": ({"generator": torch.Generator(), **ROUND}, "generator: expected None where seed and offset"),
    "logsumexp_of_sigmoid": (
        {"score": "sigmoid", "return_logsumexp": True},
        'return_logsumexp: expected False, or True with score="softmax"',
    ),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_input(options: dict[str, Any], message: str, device: torch.device, dtype: torch.dtype) -> None:
    inputs, _ = random_inputs(Shape(length_q=192, length_k=192), dtype, device)
    with pytest.raises(RuntimeError) as error:
        attnx.probabilistic_attention(**inputs, **options)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((-1, 1, 64, 64), "batch: expected an int, 0 or more, got -1"),
        ((1, 1, 64, -64), "length_k: expected an int, 0 or more, got -64"),
        ((2**31, 3, 64, 64), "batch: expected at most 4294967296 heads in the batch, got 2147483648 times 3"),
    ],
)
def test_bad_sizes_of_a_mask(sizes: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(RuntimeError) as error:
        attnx.probabilistic_block_mask(*sizes, **ROUND)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(("family", "parameter"), [("harmonic", -1.0), ("geometric", 1.5), ("power", math.nan)])
def test_bad_parameter(family: Any, parameter: float) -> None:
    with pytest.raises(RuntimeError, match=r"^parameter: expected 0 or more, .*, got"):
        attnx.keep_probabilities(family, 4, parameter)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [Shape(batch=0), Shape(length_q=0), Shape(length_k=0)], ids=str)
def test_empty_gives_zeros(shape: Shape, mode: Any, device: torch.device, dtype: torch.dtype) -> None:
    inputs, grad_output = random_inputs(shape, dtype, device)
    results = forward_backward(attnx.probabilistic_attention, inputs, grad_output, mode=mode, is_causal=True)
    assert not any(x.any() for x in results.values())


def test_lists_have_no_kernel_elsewhere() -> None:
    arguments = (1, 1, 64, 64, 64, 64, 0, False)
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.XPU)
    lists = torch.ops.attnx.probabilistic_block_lists.default
    numbers = [torch.ones(1), torch.tensor(1), torch.tensor(1)]
    with pytest.raises(NotImplementedError, match=r"(?s)^probabilistic_block_lists: .*missing:"):
        lists.redispatch(keys, *numbers, *arguments)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_reference_differentiates_where_a_probability_is_0(score: Any) -> None:
    """Hidden weights over 0 are left out before they are divided."""
    query, key = torch.randn(2, 1, 1, 300, 8, generator=torch.Generator().manual_seed(0)).requires_grad_().unbind(0)
    keep = torch.tensor([1, 1e-46, 0, 0, 0])  # of which the second is 0 in float32
    output = attnx.reference.probabilistic_attention(query, key, key, keep=keep, importance=True, score=score, **ROUND)
    assert isinstance(output, Tensor)
    assert all(x.isfinite().all() for x in torch.autograd.grad(output.sum(), (query, key)))
