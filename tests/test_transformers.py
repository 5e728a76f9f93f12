"""attnx in transformers: models of random weights compute and generate what they do with its own attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", minversion="5.20")

from attnx.integrations.transformers import StaircaseCache, register  # noqa: E402
from transformers_cases import EVERY, decoder, eager_in_float64, expect_close, others, padded, tokens  # noqa: E402, F401

register()


@EVERY
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.usefixtures("eager_in_float64")
def test_logits_and_gradients(name: str, side: str) -> None:
    given = {"input_ids": tokens()} if side == "none" else padded(side)
    kept = torch.ones(2, 24, dtype=torch.bool) if side == "none" else given["attention_mask"].bool()
    results = []
    for implementation in ("attnx_softmax", others(name)):
        model = decoder(name, implementation).double()
        logits = model(**given).logits[kept]
        logits.square().mean().backward()
        results.append([logits, *(x.grad for x in model.parameters() if x.grad is not None)])
    for got, want in zip(*results, strict=True):
        expect_close(got, want)


@EVERY
@pytest.mark.usefixtures("eager_in_float64")
def test_packed_sequences(name: str) -> None:
    """Positions that start again keep sequences apart."""
    if name == "gpt2":
        pytest.skip("its positions are learned, and start where they are told to")
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None]
    ids = tokens(batch=1)
    got = decoder(name).double()(input_ids=ids, position_ids=positions).logits
    want = decoder(name, others(name)).double()(input_ids=ids, position_ids=positions).logits
    expect_close(got, want)


@EVERY
@pytest.mark.parametrize("form", ["greedy", "beams", "static", "padded"])
def test_generates_the_same(name: str, form: str) -> None:
    given = padded("left") if form == "padded" else {"input_ids": tokens()}
    options = {"greedy": {}, "padded": {}, "beams": {"num_beams": 3}, "static": {"cache_implementation": "static"}}[
        form
    ]
    texts = [
        decoder(name, implementation).generate(**given, max_new_tokens=12, do_sample=False, **options)
        for implementation in ("attnx_softmax", others(name))
    ]
    assert torch.equal(*texts)


def encoder(name: str, implementation: str) -> tuple[Any, dict[str, Tensor]]:
    """Makes a model of random weights in float64 that generates nothing by itself, and what it takes."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    if name == "bert":
        config = transformers.BertConfig(vocab_size=61, **sizes, attn_implementation=implementation)
        return transformers.BertModel(config).eval().double(), padded("right")
    if name == "vit":
        config = transformers.ViTConfig(image_size=32, patch_size=8, **sizes, attn_implementation=implementation)
        images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
        return transformers.ViTModel(config).eval().double(), {"pixel_values": images}
    config = transformers.WhisperConfig(
        vocab_size=61, d_model=64, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=8, max_source_positions=20,
        max_target_positions=40, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        attn_implementation=implementation,
    )  # fmt: skip
    sound = torch.randn(2, 8, 40, dtype=torch.float64)
    model = transformers.WhisperForConditionalGeneration(config).eval().double()
    return model, {"input_features": sound, "decoder_input_ids": tokens(length=9)}


@pytest.mark.parametrize("name", ["bert", "vit", "whisper"])
def test_encoders(name: str) -> None:
    results = []
    for implementation in ("attnx_softmax", "sdpa"):
        model, given = encoder(name, implementation)
        output = model(**given)[0]
        output.square().mean().backward()
        results.append([output, *(x.grad for x in model.parameters() if x.grad is not None)])
    for got, want in zip(*results, strict=True):
        expect_close(got, want)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
def test_whisper_generates_the_same(options: dict[str, Any]) -> None:
    texts = []
    for implementation in ("attnx_softmax", "sdpa"):
        model, given = encoder("whisper", implementation)
        model.generation_config.eos_token_id = None
        texts.append(model.generate(given["input_features"], max_new_tokens=12, do_sample=False, **options))
    assert texts[0].shape[1] > 9
    assert torch.equal(*texts)


def train(model: Any, step: Callable[[Any], Tensor]) -> list[Tensor]:
    """Takes three steps, and returns their losses and the parameters after them."""
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    losses = []
    for _ in range(3):
        loss = step(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    assert losses[-1] < losses[0]
    return [torch.stack(losses), *(x.detach() for x in model.parameters())]


@EVERY
@pytest.mark.usefixtures("eager_in_float64")
def test_training_steps(name: str) -> None:
    given = padded("right")
    labels = given["input_ids"].where(given["attention_mask"].bool(), -100)
    results = [
        train(decoder(name, implementation, attn_pdrop=0.0).double(), lambda model: model(**given, labels=labels).loss)
        for implementation in ("attnx_softmax", others(name))
    ]
    for got, want in zip(*results, strict=True):
        expect_close(got, want)


@pytest.mark.parametrize("name", ["bert", "vit", "whisper"])
def test_training_steps_of_encoders(name: str) -> None:
    results = []
    for implementation in ("attnx_softmax", "sdpa"):
        model, given = encoder(name, implementation)
        model.config.attention_probs_dropout_prob = model.config.attention_dropout = 0.0
        results.append(train(model, lambda model, given=given: model(**given)[0].square().mean()))
    for got, want in zip(*results, strict=True):
        expect_close(got, want)


def test_sigmoid_trains() -> None:
    model = decoder("llama", "attnx_sigmoid").train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    ids, losses = tokens(4), []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1


def test_what_a_model_asks_in_vain() -> None:
    with pytest.raises(NotImplementedError, match=r"^attnx_softmax: no output_attentions"):
        decoder("llama")(input_ids=tokens(), output_attentions=True)
    with pytest.raises(NotImplementedError, match=r"^attnx_sigmoid: the model has sinks"):
        decoder("gpt_oss", "attnx_sigmoid")(input_ids=tokens())


# The quantised cache --------------------------------------------------------------------------------------------------

IN_FULL = {"levels": (16, 8), "window": 32, "residual": 224}  # nothing falls: it generates what the full cache does


def staircase(model: Any, **options: Any) -> StaircaseCache:
    return StaircaseCache(model.config, 256, **options)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize("form", ["greedy", "beams", "padded", "prompt_lookup", "assisted"])
def test_cache_generates_the_same(name: str, form: str) -> None:
    model = decoder(name)
    given = (
        padded("left", 40)
        if form == "padded"
        else {"input_ids": tokens(1 if form in ("prompt_lookup", "assisted") else 2, 40)}
    )
    options: dict[str, Any] = {
        "greedy": {},
        "padded": {},
        "beams": {"num_beams": 3},
        "prompt_lookup": {"prompt_lookup_num_tokens": 3},
        "assisted": {"assistant_model": decoder(name)},
    }[form]
    options |= {"max_new_tokens": 20, "do_sample": False}
    want = model.generate(**given, **options)
    got = model.generate(**given, **options, cache=staircase(model, **IN_FULL))
    assert torch.equal(got, want)


def test_cache_keeps_no_padding() -> None:
    model = decoder("llama")
    cache = staircase(model, **IN_FULL)
    model.generate(**padded("left", 40), max_new_tokens=7, do_sample=False, cache=cache)
    assert cache.layers[0].cache.lengths.tolist() == [46, 41]


def test_cache_loses_bits_with_age() -> None:
    """A long text's logits move a little, and the memory shrinks."""
    model = decoder("llama")
    ids = tokens(1, 250)
    cache = StaircaseCache(model.config, 256)
    assert cache.layers[0].options["window"] == 32
    with torch.no_grad():
        model(input_ids=ids[:, :200], cache=cache)
        got = torch.cat([model(input_ids=ids[:, i : i + 1], cache=cache).logits for i in range(200, 250)], 1)
        want = model(input_ids=ids).logits[:, 200:]
    assert 0 < (got - want).norm() / want.norm() < 0.2
    in_full = StaircaseCache(model.config, 256, **IN_FULL)
    with torch.no_grad():
        model(input_ids=ids[:, :200], cache=in_full)
    assert cache.layers[0].cache.nbytes < in_full.layers[0].cache.nbytes / 2


def test_cache_selects_and_resets() -> None:
    model = decoder("llama")
    cache = staircase(model, **IN_FULL)
    with torch.no_grad():
        model(input_ids=tokens(3, 40), cache=cache)
        cache.batch_select_indices(torch.tensor([2, 0]))
        got = model(input_ids=tokens(2, 1), cache=cache).logits
        want = model(input_ids=torch.cat([tokens(3, 40)[[2, 0]], tokens(2, 1)], 1)).logits[:, -1:]
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)  # the cache serves no float64
        cache.reset()
        assert cache.get_seq_length() == 0
        model(input_ids=tokens(2, 40), cache=cache)
    assert cache.get_seq_length() == 40


def test_cache_repeats_and_crops() -> None:
    """Sequences are repeated as for beams, and the last tokens taken back as for candidates that are refused."""
    model = decoder("llama")
    cache, ids = staircase(model, **IN_FULL), tokens(2, 40)
    with torch.no_grad():
        model(input_ids=ids, cache=cache)
        cache.batch_repeat_interleave(3)
        cache.crop(-7)
        assert cache.get_seq_length() == 33
        got = model(input_ids=tokens(6, 2), cache=cache).logits
        whole = torch.cat([ids[:, :33].repeat_interleave(3, 0), tokens(6, 2)], 1)
        torch.testing.assert_close(got, model(input_ids=whole).logits[:, -2:], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"^tokens_to_remove: expected 0, or minus the number of tokens, got 5"):
        cache.crop(5)


SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 9}
LAYERS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "sliding": ("qwen3", SLIDING, ["DynamicSlidingWindowLayer", "StaircaseLayer"]),
    "gemma2": ("gemma2", {"attn_logit_softcapping": None}, ["DynamicSlidingWindowLayer", "StaircaseLayer"]),
    "gpt2": ("gpt2", {}, ["StaircaseLayer"] * 2),
}


@pytest.mark.parametrize(("name", "changes", "kinds"), LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("form", ["greedy", "beams", "padded"])
def test_cache_of_other_layers(name: str, changes: dict[str, Any], kinds: list[str], form: str) -> None:
    """Layers with a sliding window keep transformers' own, and models without a rotary embedding have a cache, too."""
    model = decoder(name, **changes)
    assert [type(layer).__name__ for layer in staircase(model, **IN_FULL).layers] == kinds
    given = padded("left", 40) if form == "padded" else {"input_ids": tokens(2, 40)}
    options = {"max_new_tokens": 20, "do_sample": False} | ({"num_beams": 3} if form == "beams" else {})
    got = model.generate(**given, **options, cache=staircase(model, **IN_FULL))
    assert torch.equal(got, model.generate(**given, **options))


def test_cache_refuses_a_softcap_at_once() -> None:
    model = decoder("gemma2", layer_types=["full_attention"] * 2)
    with pytest.raises(NotImplementedError, match=r"^attnx_softmax: a StaircaseCache does without softcap"):
        model(input_ids=tokens(), cache=staircase(model))


def test_cache_needs_its_attention() -> None:
    model = decoder("llama", "sdpa")
    with pytest.raises(
        ValueError, match=r"^attn_implementation: expected attnx_softmax with a StaircaseCache, got sdpa"
    ):
        model.generate(input_ids=tokens(), max_new_tokens=2, cache=staircase(model))
