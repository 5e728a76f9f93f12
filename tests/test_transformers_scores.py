"""attnx's attentions in transformers' models are its functions, called on each sequence by itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnx

transformers = pytest.importorskip("transformers", minversion="5.20")

from safetensors.torch import load_file  # noqa: E402

from attnx.integrations.transformers import StaircaseCache, register, switch  # noqa: E402
from attnx.integrations.transformers.packing import Packing  # noqa: E402
from transformers_cases import EVERY, decoder, eager_in_float64, expect_close, others, tokens  # noqa: E402, F401

register()

LENGTHS = 150, 109
SPARSE_LINEAR: dict[str, Any] = {"critical": 0.4, "negligible": 0.1}


def window(length_q: int, length_k: int, device: torch.device) -> attnx.BlockMask:
    return attnx.BlockMask.window(length_q, length_k, (40, 40), device=device)


OPTIONS: dict[str, dict[str, Any]] = {
    "attnx_sigmoid": {},
    "attnx_sparse_linear": SPARSE_LINEAR,
    "attnx_routing": {"num_clusters": 5},
    "attnx_probabilistic": {},
    "attnx_block_sparse": {"block_mask": window},
}
SCORES = pytest.mark.parametrize("score", OPTIONS)
PLACES = pytest.mark.parametrize("place", ["left", "right", "packed"])


def own_function(score: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """Calls the function of attnx, as a user does on one sequence."""
    if score == "attnx_sigmoid":
        return attnx.sigmoid_attention(query, key, value, bias="row", **options)
    if score == "attnx_sparse_linear":
        sparse, linear = attnx.sparse_linear_attention(query, key, value, **SPARSE_LINEAR, **options)
        return sparse + linear @ module.attnx.linear_proj.weight.mT + module.attnx.linear_proj.bias
    if score == "attnx_routing":
        centroids = module.attnx.centroids
        return attnx.routing_attention(query, key, value, centroids, routing="argmax", shared_qk=False, **options)
    if score == "attnx_probabilistic":
        return attnx.probabilistic_attention(query, key, value, training=False, **options)
    mask = window(query.shape[2], key.shape[2], query.device)
    return attnx.block_sparse_attention(query, key, value, mask, **options)


def each_sequence(score: str, sequences: list[tuple[int, slice]]) -> Callable[..., Any]:
    """Makes an implementation that calls the function on each of these sequences of self-attention."""

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **asked: Any
    ) -> tuple[Tensor, None]:
        is_causal = asked.get("is_causal")
        options = {"scale": asked["scaling"], "is_causal": module.is_causal if is_causal is None else is_causal}
        output = torch.zeros_like(query)
        for b, part in sequences:
            q, k, v = (x[b : b + 1, :, part] for x in (query, key, value))
            output[b, :, part] = own_function(score, module, q, k, v, **options)[0]
        return output.transpose(1, 2), None

    return attend


def expect(model: Any, score: str, sequences: list[tuple[int, slice]]) -> None:
    """Switches a model to the functions themselves."""
    transformers.AttentionInterface.register("each_sequence", each_sequence(score, sequences))
    transformers.AttentionMaskInterface.register("each_sequence", lambda **_: None)
    model.set_attn_implementation("each_sequence")


def text(place: str) -> tuple[dict[str, Tensor], list[tuple[int, slice]]]:
    """Returns two sequences in a batch, one of them padded, or end to end, and where they are."""
    length = max(LENGTHS)
    if place == "packed":
        positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
        parts = [(0, slice(0, LENGTHS[0])), (0, slice(LENGTHS[0], sum(LENGTHS)))]
        return {"input_ids": tokens(1, sum(LENGTHS)), "position_ids": positions, "use_cache": False}, parts
    parts = [(b, slice(length - n, length) if place == "left" else slice(0, n)) for b, n in enumerate(LENGTHS)]
    mask = torch.zeros(2, length, dtype=torch.int64)
    for b, part in parts:
        mask[b, part] = 1
    return {"input_ids": tokens(2, length).where(mask.bool(), 0), "attention_mask": mask}, parts


def switched(name: str, score: str, **changes: Any) -> Any:
    """Makes a model with the score, whose parameters are no longer what they are at the start."""
    changes = {"sliding_window": None} | changes if name == "mistral" else changes
    model = decoder(name, "sdpa", **changes)
    switch(model, score, **OPTIONS[score])
    stir(model)
    return model


def stir(model: Any) -> None:
    for key, x in model.named_parameters():
        if "linear_proj" in key:
            nn.init.normal_(x, std=0.3)


PLAIN = pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gpt2"])


@PLAIN
@SCORES
@PLACES
def test_logits_and_gradients(name: str, score: str, place: str) -> None:
    if name == "gpt2" and place == "packed":
        pytest.skip("its positions are learned, and start where they are told to")
    given, parts = text(place)
    model = switched(name, score).double()
    results = []
    for implementation in ("attnx", "each_sequence"):
        if implementation == "each_sequence":
            given = {"position_ids": positions(given)} | given
            given.pop("attention_mask", None)
            expect(model, score, parts)
        model.zero_grad()
        output = model(**given).logits
        kept = torch.cat([output[b, part] for b, part in parts])
        kept.square().mean().backward()
        results.append([kept, *(x.grad.clone() for x in model.parameters())])
    for got, want in zip(*results, strict=True):
        expect_close(got, want)


def positions(given: dict[str, Tensor]) -> Tensor:
    """Positions count padding, too."""
    ids = given["input_ids"]
    return torch.arange(ids.shape[1]).expand(ids.shape)


@PLAIN
@SCORES
def test_a_training_step(name: str, score: str) -> None:
    """Every parameter gets a finite gradient, and every centroid that tokens are near to moves."""
    model = switched(name, score, attn_pdrop=0.0).train()
    before = [x.clone() for key, x in model.named_buffers() if "centroids" in key]
    ids = tokens(2, 150)
    model(input_ids=ids, labels=ids).loss.backward()
    for key, x in model.named_parameters():
        assert x.grad is not None, key
        assert x.grad.isfinite().all(), key
        assert x.grad.any(), key
    after = [x for key, x in model.named_buffers() if "centroids" in key]
    assert len(after) == (2 if score == "attnx_routing" else 0)
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("score", ["attnx_sigmoid", "attnx_routing", "attnx_probabilistic", "attnx_block_sparse"])
@PLAIN
@pytest.mark.parametrize("form", ["greedy", "static", "padded", "beams"])
def test_generates_from_a_cache_what_it_does_without(name: str, score: str, form: str) -> None:
    model = switched(name, score)
    given = text("left")[0] if form == "padded" else {"input_ids": tokens(2, 150)}
    kinds: dict[str, dict[str, Any]] = {"static": {"cache_implementation": "static"}, "beams": {"num_beams": 3}}
    options = {"max_new_tokens": 8, "do_sample": False}
    got = model.generate(**given, **options, **kinds.get(form, {}))
    want = model.generate(**given, **options, **({"num_beams": 3} if form == "beams" else {}), use_cache=False)
    assert torch.equal(got, want)


@PLAIN
@pytest.mark.parametrize("form", ["greedy", "static", "padded", "beams"])
def test_sparse_linear_generates(name: str, form: str) -> None:
    """With every block critical it generates what softmax does; with a share of them it runs."""
    given = text("left")[0] if form == "padded" else {"input_ids": tokens(2, 150)}
    kinds: dict[str, dict[str, Any]] = {"static": {"cache_implementation": "static"}, "beams": {"num_beams": 3}}
    options = {"max_new_tokens": 8, "do_sample": False} | kinds.get(form, {})
    changes = {"sliding_window": None} if name == "mistral" else {}
    model = decoder(name, "sdpa", **changes)
    want = model.generate(**given, **options)
    switch(model, "attnx_sparse_linear", critical=1.0, negligible=0.0)
    assert torch.equal(model.generate(**given, **options), want)
    few = switched(name, "attnx_sparse_linear").generate(**given, **options)
    assert few.shape == want.shape


def test_sigmoid_counts_what_a_window_shows() -> None:
    model = decoder("mistral", "attnx_sigmoid").double()
    ids = tokens(1, 24)
    got = model(input_ids=ids).logits
    transformers.AttentionMaskInterface.register("each_sequence", lambda **_: None)
    transformers.AttentionInterface.register(
        "each_sequence",
        lambda module, query, key, value, mask, **asked: (
            attnx.sigmoid_attention(
                query, key, value, bias="row", window=(8, 0), is_causal=True, scale=asked["scaling"]
            ).transpose(1, 2),
            None,
        ),
    )
    model.set_attn_implementation("each_sequence")
    expect_close(got, model(input_ids=ids).logits)


def test_probabilistic_draws_blocks_in_training() -> None:
    """Rounds differ in training, with a mask and without; a density of 1 is the dense attention."""
    given, parts = text("left")
    for inputs in ({"input_ids": tokens(1, 300)}, given):
        model = decoder("llama", "sdpa").double()
        switch(model, "attnx_probabilistic", density=0.75)
        model.train()
        a, b = (model(**inputs).logits for _ in range(2))
        assert not torch.equal(a, b)
        switch(model, "attnx_probabilistic", density=1.0)
        dense = model(**inputs).logits, decoder("llama", "sdpa").double()(**inputs).logits
        for b, part in parts[: len(dense[0])]:
            expect_close(*(x[b, part] for x in dense))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_probabilistic_draws_the_same_blocks_under_a_mask(score: str) -> None:
    model = decoder("llama", "sdpa").double()
    switch(
        model, "attnx_probabilistic", density=0.5, mode="topm", score=score, bias=-4.0 if score == "sigmoid" else None
    )
    model.train()
    ids, results = tokens(2, 300), []
    for mask in (None, torch.ones(300, 300, dtype=torch.bool).tril().expand(2, 1, -1, -1)):
        torch.manual_seed(3)
        results.append(model(input_ids=ids, attention_mask=mask).logits)
    expect_close(*results)


@pytest.mark.parametrize("score", ["attnx_probabilistic", "attnx_block_sparse"])
@EVERY
def test_blocks_take_all_that_a_model_asks(name: str, score: str) -> None:
    """All blocks with windows, sinks and softcaps are what softmax computes."""
    want = decoder(name, "attnx_softmax").double()(input_ids=tokens()).logits
    model = decoder(name, others(name), attn_pdrop=0.0, resid_pdrop=0.0).double()
    options = (
        {"density": 1.0}
        if score == "attnx_probabilistic"
        else {"block_mask": lambda q, k, device: attnx.BlockMask.window(q, k, device=device)}
    )
    switch(model, score, **options)
    for module in model.modules():
        if hasattr(module, "attnx"):
            module.train(score == "attnx_probabilistic")
    expect_close(model(input_ids=tokens()).logits, want)


SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}


@SCORES
def test_bert(score: str) -> None:
    config = transformers.BertConfig(vocab_size=61, attention_probs_dropout_prob=0.0, **SIZES)
    model = transformers.BertModel(config).eval().double()
    switch(model, score, **OPTIONS[score])
    stir(model)
    given, parts = text("right")
    got = model(**given).last_hidden_state
    got.square().mean().backward()
    assert all(x.grad is None or x.grad.isfinite().all() for x in model.parameters())
    expect(model, score, parts)
    want = model(input_ids=given["input_ids"]).last_hidden_state
    for b, part in parts:
        expect_close(got[b, part], want[b, part])


@SCORES
def test_vit(score: str) -> None:
    config = transformers.ViTConfig(image_size=48, patch_size=4, attention_probs_dropout_prob=0.0, **SIZES)
    model = transformers.ViTModel(config).eval().double()
    switch(model, score, **OPTIONS[score])
    stir(model)
    images = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    got = model(pixel_values=images).last_hidden_state
    got.square().mean().backward()
    assert all(x.grad is None or x.grad.isfinite().all() for x in model.parameters())
    expect(model, score, [(0, slice(None)), (1, slice(None))])
    expect_close(got, model(pixel_values=images).last_hidden_state)


def whisper() -> Any:
    torch.manual_seed(0)
    return transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            vocab_size=61, d_model=64, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=8,
            max_source_positions=100, max_target_positions=90, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=1,
        )
    ).eval().double()  # fmt: skip


@SCORES
def test_whisper(score: str) -> None:
    """Cross-attention of 80 tokens to 100 places of the encoder is the function, too."""
    model = whisper()
    switch(model, score, **OPTIONS[score])
    stir(model)
    given = {"input_features": torch.randn(2, 8, 200, dtype=torch.float64), "decoder_input_ids": tokens(2, 80)}
    got = model(**given).logits
    got.square().mean().backward()
    assert all(x.grad is None or x.grad.isfinite().all() for x in model.parameters())
    generated = model.generate(input_features=given["input_features"], max_new_tokens=6)
    assert len(generated) == 2

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _: Any, **asked: Any) -> Any:
        options = {"scale": asked["scaling"], "is_causal": module.is_causal}
        return own_function(score, module, query, key, value, **options).transpose(1, 2), None

    transformers.AttentionInterface.register("each_sequence", attend)
    transformers.AttentionMaskInterface.register("each_sequence", lambda **_: None)
    model.set_attn_implementation("each_sequence")
    expect_close(got, model(**given).logits)


@pytest.mark.parametrize("score", ["attnx_sparse_linear", "attnx_routing"])
def test_saves_and_loads(score: str, tmp_path: Path) -> None:
    model = switched("llama", score)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    switch(loaded, score, **OPTIONS[score])
    loaded.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert torch.equal(loaded(input_ids=tokens()).logits, model(input_ids=tokens()).logits)


@SCORES
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_compiles(score: str, padded: bool) -> None:
    """There is one graph, but where the mask is read."""
    model = switched("llama", score, num_hidden_layers=1, layer_types=["full_attention"]).double()
    given, parts = text("left")
    if not padded:
        given.pop("attention_mask")
    torch._dynamo.reset()
    fullgraph = not padded or score not in ("attnx_sparse_linear", "attnx_routing")
    got = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)(**given).logits
    want = model(**given).logits
    for b, part in parts:
        expect_close(got[b, part], want[b, part])


def test_centroids_stay_float32() -> None:
    model = switched("llama", "attnx_routing").bfloat16()
    assert model.model.layers[0].self_attn.attnx.centroids.dtype == torch.float32
    assert model(input_ids=tokens()).logits.dtype == torch.bfloat16


Part = tuple[int, slice, slice]  # sequence of the batch, queries and keys


def mask_of(shape: tuple[int, int, int], parts: list[Part], is_causal: bool) -> Tensor:
    mask = torch.zeros(shape, dtype=torch.bool)
    for b, queries, keys in parts:
        block = mask[b, queries, keys]
        block[:] = torch.ones_like(block).tril(block.shape[1] - block.shape[0]) if is_causal else True
    return mask


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    ("shape", "parts", "is_cross"),
    [
        ((2, 9, 9), [(0, slice(0, 9), slice(0, 9)), (1, slice(4, 9), slice(4, 9))], False),
        ((2, 9, 9), [(0, slice(0, 9), slice(0, 9)), (1, slice(0, 6), slice(0, 6))], False),
        (
            (1, 9, 9),
            [(0, slice(0, 3), slice(0, 3)), (0, slice(3, 4), slice(3, 4)), (0, slice(4, 9), slice(4, 9))],
            False,
        ),
        ((2, 3, 9), [(0, slice(0, 3), slice(0, 7)), (1, slice(0, 3), slice(2, 7))], False),
        ((2, 5, 5), [(0, slice(0, 5), slice(0, 5)), (1, slice(0, 5), slice(0, 3))], True),
        ((2, 3, 3), [], False),
    ],
    ids=["left", "right", "packed", "cached", "cross", "nothing"],
)
@pytest.mark.parametrize("padding_sees", [False, True], ids=["blind", "seeing"])
def test_packing(
    shape: tuple[int, int, int], parts: list[Part], is_cross: bool, is_causal: bool, padding_sees: bool
) -> None:
    if is_cross and is_causal:
        pytest.skip("the first queries see no key")
    mask = mask_of(shape, parts, is_causal)
    if padding_sees:  # as it does behind a sequence
        for b, queries, keys in parts:
            padding = mask[b, queries.stop :]
            padding[:, keys] |= ~mask[b, queries.stop :].any(-1, keepdim=True)
    packing = Packing.of(mask, is_cross)
    assert packing is not None
    _, queries, keys = shape
    assert packing.index_q.tolist() == [b * queries + i for b, q, _ in parts for i in range(*q.indices(queries))]
    assert packing.index_k.tolist() == [b * keys + i for b, _, k in parts for i in range(*k.indices(keys))]
    assert packing.lengths_q == packing.cu_seqlens_q.diff().tolist() == [q.stop - q.start for _, q, _ in parts]
    assert packing.lengths_k == packing.cu_seqlens_k.diff().tolist() == [k.stop - k.start for _, _, k in parts]
    assert packing.is_causal == (is_causal and bool(parts))
    x = torch.randn(shape[0], 2, queries, 4)
    packed = packing.pack(x)[0]
    kept = torch.zeros(shape[0] * queries, dtype=torch.bool).index_fill(0, packing.index_q, True)
    assert torch.equal(packing.unpack(packed), x * kept.view(shape[0], 1, queries, 1))


def test_what_is_no_packing() -> None:
    rows = torch.arange(9)
    window = (rows[:, None] >= rows) & (rows[:, None] < rows + 4)
    holes = torch.ones(9, 9, dtype=torch.bool).tril()
    holes[5, 2] = False
    prefix = torch.ones(9, 9, dtype=torch.bool).tril()
    prefix[:, :3] = True
    for mask in (window, holes, prefix):
        assert Packing.of(mask[None], False) is None


def test_a_float_mask_of_a_sequence_is_no_packing() -> None:
    """A mask of one's own that is no interval is refused, as is one of numbers."""
    model = switched("llama", "attnx_routing")
    holes = torch.rand(1, 1, 24, 24) < 0.5
    for mask in (holes, torch.zeros(1, 1, 24, 24)):
        with pytest.raises(NotImplementedError, match=r"^attnx_routing: expected a mask that is causal, hides padding"):
            model(input_ids=tokens(1), attention_mask=mask)


@pytest.mark.parametrize(
    ("name", "score", "asked"),
    [
        ("mistral", "attnx_sparse_linear", "sliding_window"),
        ("mistral", "attnx_routing", "sliding_window"),
        ("gemma2", "attnx_sparse_linear", "softcap"),
        ("gpt_oss", "attnx_routing", "s_aux"),
    ],
)
def test_what_a_model_asks_in_vain(name: str, score: str, asked: str) -> None:
    model = decoder(name, "eager")
    switch(model, score, **OPTIONS[score])
    with pytest.raises(NotImplementedError, match=rf"^{score}: has no .*{asked}.*, which the model asks for"):
        model(input_ids=tokens())


def test_dropout_in_training_is_refused() -> None:
    model = decoder("llama", "sdpa", attention_dropout=0.1)
    switch(model, "attnx_sparse_linear")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    model(input_ids=tokens())
    with pytest.raises(NotImplementedError, match=r"^attnx_sparse_linear: has no dropout, which the model asks for"):
        model.train()(input_ids=tokens())


def test_output_attentions_are_refused() -> None:
    for name in ("llama", "gpt2"):
        with pytest.raises(NotImplementedError, match=r"^attnx_sigmoid: no output_attentions"):
            decoder(name, "attnx_sigmoid")(input_ids=tokens(), output_attentions=True)


def test_a_bias_that_counts_keys_has_no_mask() -> None:
    model = decoder("llama", "sdpa")
    switch(model, "attnx_block_sparse", block_mask=window, score="sigmoid")
    model(input_ids=tokens())
    with pytest.raises(NotImplementedError, match=r"^attnx_block_sparse: expected a float as bias where the model has"):
        model(**text("left")[0])
    switch(model, "attnx_probabilistic", importance=True)
    with pytest.raises(NotImplementedError, match=r"^attnx_probabilistic: importance=True has no mask"):
        model.train()(**text("left")[0])


def test_bad_switches() -> None:
    model = decoder("llama", "sdpa")
    with pytest.raises(ValueError, match=r"^implementation: expected one of attnx_softmax, .*, got 'flash'"):
        switch(model, "flash")
    with pytest.raises(ValueError, match=r"^model: expected one with transformers' AttentionInterface, got Linear"):
        switch(nn.Linear(2, 2), "attnx_softmax")
    with pytest.raises(TypeError, match="density"):
        switch(model, "attnx_sparse_linear", density=1)
    with pytest.raises(TypeError, match=r"^attnx_sigmoid: expected no options, got bias"):
        switch(model, "attnx_sigmoid", bias=1)
    with pytest.raises(RuntimeError, match=r"^critical: "):
        switch(model, "attnx_sparse_linear", critical=2.0)
    with pytest.raises(RuntimeError, match=r"^routing: "):
        switch(model, "attnx_routing", num_clusters=4, routing="nearest")
    with pytest.raises(RuntimeError, match=r"^density: "):
        switch(model, "attnx_probabilistic", density=2.0)
    with pytest.raises(RuntimeError, match=r"^block_mask: "):
        switch(model, "attnx_block_sparse", block_mask=0.5)
    assert model.config._attn_implementation == "sdpa"
    assert not any(hasattr(module, "attnx") for module in model.modules())
    for score in ("attnx_sparse_linear", "attnx_routing", "attnx_block_sparse"):
        with pytest.raises(ValueError, match=rf"^{score}: expected a model that .*switch has given"):
            decoder("llama", score)(input_ids=tokens())


def test_a_staircase_needs_softmax() -> None:
    model = switched("llama", "attnx_routing")
    with pytest.raises(ValueError, match=r"^attn_implementation: expected attnx_softmax with a StaircaseCache"):
        model.generate(input_ids=tokens(), max_new_tokens=2, cache=StaircaseCache(model.config, 256))
