"""Tests take models of transformers with random weights from here, and texts for them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

TEXT: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
DECODERS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**TEXT),
    "qwen3": lambda: transformers.Qwen3Config(**TEXT),
    "mistral": lambda: transformers.MistralConfig(**TEXT, sliding_window=9),
    "gemma2": lambda: transformers.Gemma2Config(**TEXT, sliding_window=9, attn_logit_softcapping=5.0),
    "gpt_oss": lambda: transformers.GptOssConfig(**TEXT, sliding_window=9, num_local_experts=4, num_experts_per_tok=2),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=61, n_embd=64, n_layer=2, n_head=2, eos_token_id=None, pad_token_id=0
    ),
}
# Models compare in float64, which each implementation rounds at other places.
expect_close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)
EVERY = pytest.mark.parametrize("name", DECODERS)


def decoder(name: str, implementation: str = "attnx_softmax", **changes: Any) -> Any:
    """Makes a model of random weights, which are the same for every implementation."""
    torch.manual_seed(0)
    config = DECODERS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    if name == "gpt_oss":
        model.set_experts_implementation("eager")  # the others have no float64
    for key, x in model.named_parameters():
        if "sinks" in key:
            torch.nn.init.normal_(x)
    return model


@pytest.fixture
def eager_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the eager attention of transformers, which asks for a softmax in float32, in the dtype of its model."""
    own = F.softmax

    def softmax(input: Tensor, dim: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
        return own(input, dim, dtype=None if input.dtype == torch.float64 else dtype)

    monkeypatch.setattr(F, "softmax", softmax)


def others(name: str) -> str:
    """Names what transformers has for the model that computes all of it."""
    return "eager" if name in ("gemma2", "gpt_oss") else "sdpa"


def tokens(batch: int = 2, length: int = 24) -> Tensor:
    return torch.randint(3, 61, (batch, length), generator=torch.Generator().manual_seed(1))


def padded(side: str, length: int = 24) -> dict[str, Tensor]:
    """Makes a batch whose second sequence has 5 tokens of padding."""
    ids, mask = tokens(length=length), torch.ones(2, length, dtype=torch.int64)
    mask[1, slice(0, 5) if side == "left" else slice(length - 5, None)] = 0
    return {"input_ids": ids.where(mask.bool(), 0), "attention_mask": mask}
