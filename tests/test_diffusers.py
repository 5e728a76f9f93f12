"""attnx in diffusers: backends compute what diffusers' own does, sparse-linear attention trains and is saved, and
rectified sparse attention is put in place of dense."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnx

diffusers = pytest.importorskip("diffusers", minversion="0.42")

from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn  # noqa: E402

from attnx.integrations.diffusers import (  # noqa: E402
    apply_rectified,
    apply_sparse_linear,
    load_sparse_linear,
    register,
)

register()

HEADS = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 2}


def wan() -> tuple[Any, dict[str, Tensor]]:
    model = diffusers.WanTransformer3DModel(
        **HEADS, in_channels=4, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=64, rope_max_seq_len=32
    )
    return model, {
        "hidden_states": torch.randn(2, 4, 3, 20, 20),  # 300 tokens
        "timestep": torch.tensor([3, 7]),
        "encoder_hidden_states": torch.randn(2, 9, 16),
    }


def flux() -> tuple[Any, dict[str, Tensor]]:
    model = diffusers.FluxTransformer2DModel(
        in_channels=8, num_single_layers=1, joint_attention_dim=16, pooled_projection_dim=16,
        axes_dims_rope=(4, 12, 16), **HEADS,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 256, 8),
        "encoder_hidden_states": torch.randn(2, 20, 16),
        "pooled_projections": torch.randn(2, 16),
        "timestep": torch.tensor([0.3, 0.7]),
        "img_ids": torch.randint(0, 16, (256, 3)).float(),
        "txt_ids": torch.zeros(20, 3),
    }


def sd3() -> tuple[Any, dict[str, Tensor]]:
    model = diffusers.SD3Transformer2DModel(
        sample_size=32, patch_size=2, in_channels=4, out_channels=4, joint_attention_dim=16, caption_projection_dim=64,
        pooled_projection_dim=16, pos_embed_max_size=32, dual_attention_layers=(0,), qk_norm="rms_norm", **HEADS,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 4, 32, 32),  # 256 tokens
        "encoder_hidden_states": torch.randn(2, 20, 16),
        "pooled_projections": torch.randn(2, 16),
        "timestep": torch.tensor([3, 7]),
    }


def pixart() -> tuple[Any, dict[str, Tensor]]:
    model = diffusers.PixArtTransformer2DModel(
        sample_size=32, in_channels=4, out_channels=8, cross_attention_dim=64, caption_channels=16,
        use_additional_conditions=False, **HEADS,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 4, 32, 32),  # 256 tokens
        "encoder_hidden_states": torch.randn(2, 20, 16),
        "encoder_attention_mask": torch.arange(20) < torch.tensor([[20], [11]]),
        "timestep": torch.tensor([3, 7]),
    }


MODELS = {"wan": wan, "flux": flux, "sd3": sd3, "pixart": pixart}
SELF_ATTENTIONS = {"wan": 2, "flux": 3, "sd3": 3, "pixart": 2}
# Models compare in float64, which each attention rounds at other places.
expect_close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)
EVERY = pytest.mark.parametrize("name", MODELS)


def tiny(name: str, dtype: torch.dtype = torch.float64) -> tuple[Any, dict[str, Tensor]]:
    """Makes a model of random weights, all of which have an effect, and its inputs."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    with torch.no_grad():
        for key, x in model.named_parameters():
            if not x.any():
                torch.nn.init.normal_(x, std=0.1)
            if "norm_" in key:
                torch.nn.init.uniform_(x, 1, 4)
            elif "to_q" in key:
                x *= 4
    return model.eval().to(dtype), {key: x.to(dtype) if x.is_floating_point() else x for key, x in inputs.items()}


def output(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs, return_dict=False)[0]


def projections(model: Any) -> dict[str, Tensor]:
    return {key: x for key, x in model.named_parameters() if "linear_proj" in key}


# Backends -------------------------------------------------------------------------------------------------------------


def attention_inputs() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(2, n, 2, 16, generator=generator, dtype=torch.float64, requires_grad=True) for n in (70, 90, 90)
    )


@pytest.mark.parametrize("mask", ["none", "keys", "bool", "added"])
def test_softmax_backend(mask: str) -> None:
    query, key, value = attention_inputs()
    attn_mask = {
        "none": None,
        "keys": torch.rand(2, 90) < 0.5,
        "bool": torch.rand(2, 1, 70, 90) < 0.5,
        "added": torch.randn(2, 2, 70, 90, dtype=torch.float64),
    }[mask]
    results = []
    for backend in ("attnx_softmax", "native"):
        with attention_backend(backend):
            x = dispatch_attention_fn(query, key, value, attn_mask=attn_mask, scale=0.3)
        results.append([x, *torch.autograd.grad(x.square().sum(), (query, key, value))])
    for got, want in zip(*results, strict=True):
        expect_close(got, want)


def test_sigmoid_backend() -> None:
    """Keys that a mask hides have no part in the bias."""
    query, key, value = attention_inputs()
    keys = torch.arange(90) < torch.tensor([[90], [40]])
    with attention_backend("attnx_sigmoid"):
        got = dispatch_attention_fn(query, key, value, attn_mask=keys)
        without = dispatch_attention_fn(query, key, value)
    for b, n in enumerate((90, 40)):
        q, k, v = (x[b : b + 1].transpose(1, 2) for x in (query, key[:, :n], value[:, :n]))
        want = attnx.sigmoid_attention(q, k, v, bias="row").transpose(1, 2)[0]
        expect_close(got[b], want)
    expect_close(without[0], got[0])


@pytest.mark.parametrize("name", ["wan", "flux"])
def test_models_with_backends(name: str) -> None:
    model, inputs = tiny(name)
    want = output(model, inputs)
    model.set_attention_backend("attnx_softmax")
    try:
        expect_close(output(model, inputs), want)
        model.set_attention_backend("attnx_sigmoid")
        sigmoid = output(model, inputs)
        sigmoid.square().mean().backward()
        assert (sigmoid - want).norm() / want.norm() > 1e-3
        assert all(x.grad is None or x.grad.isfinite().all() for x in model.parameters())
    finally:
        model.set_attention_backend("native")  # for all models
    assert torch.equal(output(model, inputs), want)


def test_what_backends_refuse() -> None:
    query, key, value = attention_inputs()
    register()  # again, which changes nothing
    with attention_backend("attnx_softmax"):
        with pytest.raises(NotImplementedError, match=r"^attnx_softmax: has no return_lse"):
            dispatch_attention_fn(query, key, value, attention_kwargs={"return_lse": True})
        with pytest.raises(NotImplementedError, match=r"^attnx_softmax: has no context parallelism"):
            dispatch_attention_fn(query, key, value, parallel_config=object())
        with pytest.raises(NotImplementedError, match=r"^attnx_softmax: expected as many queries as keys"):
            dispatch_attention_fn(query, key, value, is_causal=True)


# Sparse-linear attention ----------------------------------------------------------------------------------------------


@EVERY
def test_all_blocks_critical_is_the_dense_model(name: str) -> None:
    model, inputs = tiny(name)
    want = output(model, inputs)
    apply_sparse_linear(model, critical=1.0, negligible=0.0)
    assert len(projections(model)) == 2 * SELF_ATTENTIONS[name]
    expect_close(output(model, inputs), want)


@EVERY
def test_every_self_attention_is_the_operator(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each makes one call with the options, and what comes of it is what the model goes on with."""
    model, inputs = tiny(name)
    dense = output(model, inputs)
    apply_sparse_linear(model, critical=0.4, negligible=0.2, linear_scope="all", smooth_k=True, rounding="floor")
    seen = []
    own = attnx.integrations.sparse_linear.sparse_linear_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        seen.append(tuple(options[name] for name in ("critical", "linear_scope", "smooth_k", "rounding")))
        return own(query, key, value, **options)

    monkeypatch.setattr(attnx.integrations.sparse_linear, "sparse_linear_attention", attend)
    few = output(model, inputs)
    assert len(seen) == SELF_ATTENTIONS[name]
    assert set(seen) == {(0.4, "all", True, "floor")}
    assert (few - dense).norm() / dense.norm() > 1e-4
    for x in projections(model).values():
        torch.nn.init.normal_(x, std=0.5)
    mixed = output(model, inputs)
    assert (mixed - few).norm() / few.norm() > 1e-4


@EVERY
def test_gradients_reach_the_projections(name: str) -> None:
    model, inputs = tiny(name)
    apply_sparse_linear(model, critical=0.4, negligible=0.0)
    model.train()
    output(model, inputs).square().mean().backward()
    for key, x in projections(model).items():
        assert x.grad is not None, key
        assert x.grad.isfinite().all(), key
        assert x.grad.any(), key


@EVERY
def test_fine_tuning_of_projections_alone_nears_the_dense_model(name: str) -> None:
    model, inputs = tiny(name)
    with torch.no_grad():
        want = output(model, inputs)
    apply_sparse_linear(model, critical=0.2, negligible=0.0)
    trained = list(projections(model).values())
    optimizer = torch.optim.Adam(trained, 5e-3)
    losses = []
    for _ in range(20):
        loss = (output(model, inputs) - want).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


@EVERY
def test_saves_and_loads(name: str, tmp_path: Path) -> None:
    model, inputs = tiny(name, torch.float32)  # models load in that
    apply_sparse_linear(model, critical=0.4, negligible=0.2, block_size=(128, 64), protect=10, rounding="floor")
    for x in projections(model).values():
        torch.nn.init.normal_(x, std=0.5)
    model.save_pretrained(tmp_path)
    loaded = load_sparse_linear(type(model), str(tmp_path)).eval()
    assert type(loaded) is type(model)
    assert torch.equal(output(loaded, inputs), output(model, inputs))
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    torch.testing.assert_close(
        output(load_sparse_linear(type(model), str(again)).eval(), inputs),
        output(model, inputs),
    )
    half = load_sparse_linear(type(model), str(tmp_path), torch_dtype=torch.bfloat16)
    assert {x.dtype for x in projections(half).values()} == {torch.bfloat16}


@EVERY
def test_copies_and_checkpointing(name: str) -> None:
    """A copy is the same model, and what activation checkpointing repeats is the same computation."""
    model, inputs = tiny(name)
    apply_sparse_linear(model, critical=0.4, negligible=0.0)
    gradients = []
    for other in (model, copy.deepcopy(model)):
        other.train()
        if other is not model:
            other.enable_gradient_checkpointing()
        output(other, inputs).square().mean().backward()
        gradients.append([x.grad for x in projections(other).values()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@EVERY
def test_compiles_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(HEADS, "num_layers", 1)
    model, inputs = tiny(name)
    apply_sparse_linear(model, critical=0.4)
    want = output(model, inputs)
    got = output(torch.compile(model, backend="aot_eager", fullgraph=True), inputs)
    expect_close(got, want)


@pytest.mark.parametrize("name", ["wan", "flux"])
def test_fused_projections(name: str) -> None:
    model, inputs = tiny(name)
    apply_sparse_linear(model, critical=0.4)
    want = output(model, inputs)
    model.fuse_qkv_projections()
    expect_close(output(model, inputs), want)


def test_the_example_of_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parent.parent / "docs/diffusers.md").read_text()
    example = text.split("```python\n")[1].split("```")[0].replace("range(101)", "range(2)")
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "docs/diffusers.md", "exec"), {})


def test_a_backend_that_is_set_later_has_no_part_in_it() -> None:
    model, inputs = tiny("wan")
    apply_sparse_linear(model, critical=0.4)
    want = output(model, inputs)
    model.set_attention_backend("attnx_softmax")
    try:
        expect_close(output(model, inputs), want)
    finally:
        model.set_attention_backend("native")  # for all models


def test_what_sparse_linear_refuses(tmp_path: Path) -> None:
    model, inputs = tiny("pixart")
    with pytest.raises(RuntimeError, match=r"^critical: "):
        apply_sparse_linear(model, critical=2.0)
    with pytest.raises(ValueError, match=r"^model: expected a transformer of diffusers with .*, got Linear"):
        apply_sparse_linear(torch.nn.Linear(2, 2))
    other = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=1, attention_head_dim=16, num_layers=1, text_embed_dim=16, sample_height=4, sample_width=4
    )
    with pytest.raises(ValueError, match=r"^model: expected processors of Wan.*, got CogVideoXAttnProcessor2_0 of "):
        apply_sparse_linear(other)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^path: expected a model with sparse-linear attention, got "):
        load_sparse_linear(type(model), str(tmp_path))
    apply_sparse_linear(model)
    with pytest.raises(ValueError, match=r"^model: expected processors of .*, got JointProcessor of "):
        apply_sparse_linear(model)
    with pytest.raises(NotImplementedError, match=r"^sparse-linear attention: has no attention_mask"):
        model(**inputs, attention_mask=torch.ones(2, 256))
    for module in model.modules():
        if hasattr(module, "_parallel_config"):
            module._parallel_config = object()
    with pytest.raises(NotImplementedError, match=r"^sparse-linear attention: has no context parallelism"):
        model(**inputs)
    autoencoder = diffusers.AutoencoderKL(block_out_channels=(32,), latent_channels=4)
    with pytest.raises(ValueError, match=r"^model: expected attention without group_norm, residual_connection"):
        apply_sparse_linear(autoencoder)


# Rectified sparse attention -------------------------------------------------------------------------------------------


def hunyuan_video(text: int = 20) -> tuple[Any, dict[str, Tensor]]:
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_single_layers=2, num_refiner_layers=1, patch_size=1, text_embed_dim=16,
        pooled_projection_dim=8, rope_axes_dim=(8, 12, 12), guidance_embeds=False, **HEADS,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 4, 3, 10, 10),  # 300 tokens
        "timestep": torch.tensor([3, 7]),
        "encoder_hidden_states": torch.randn(2, text, 16),
        "encoder_attention_mask": torch.arange(text) < torch.tensor([[text], [11]]),
        "pooled_projections": torch.randn(2, 8),
    }


RECTIFIED = {"wan": (wan, 2), "hunyuan_video": (hunyuan_video, 4)}


def rectified_model(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, dict[str, Tensor]]:
    monkeypatch.setitem(MODELS, name, RECTIFIED[name][0])
    return tiny(name)


@pytest.mark.parametrize("name", RECTIFIED)
def test_nothing_dropped_is_the_dense_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = rectified_model(name, monkeypatch)
    want = output(model, inputs)
    apply_rectified(model, drop=0.0)
    expect_close(output(model, inputs), want)


@pytest.mark.parametrize("name", RECTIFIED)
def test_every_attention_to_a_video_is_rectified(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = rectified_model(name, monkeypatch)
    dense = output(model, inputs)
    beside = torch.eye(3, dtype=torch.bool)
    apply_rectified(model, top_p=0.0, drop=1.0, neighbours=beside)
    seen = []
    own = attnx.integrations.diffusers.rectified.rectified_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        seen.append((query.shape[2], options["top_p"], options["drop"], options.get("text_length")))
        assert options["neighbours"] is not None
        if name == "hunyuan_video":
            assert options["seqused_k"].tolist() == [320, 311]
        return own(query, key, value, **options)

    monkeypatch.setattr(attnx.integrations.diffusers.rectified, "rectified_attention", attend)
    few = output(model, inputs)
    assert seen == [(300, 0.0, 1.0, None) if name == "wan" else (320, 0.0, 1.0, 20)] * RECTIFIED[name][1]
    assert (few - dense).norm() / dense.norm() > 1e-4
    few.square().mean().backward()
    assert all(x.grad is None or x.grad.isfinite().all() for x in model.parameters())


def test_what_rectified_refuses() -> None:
    model, _ = tiny("pixart")
    with pytest.raises(ValueError, match=r"^model: expected a transformer with processors of Wan.*, got PixArt"):
        apply_rectified(model)
    with pytest.raises(RuntimeError, match=r"^drop: expected a share"):
        apply_rectified(tiny("wan")[0], drop=2.0)
