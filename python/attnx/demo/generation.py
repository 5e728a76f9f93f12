"""A small Llama of transformers learns the same text with attnx's softmax attention, and generates from two caches."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable

import torch

from attnx.demo.caches import GENERATED, PROMPT, TEMPERATURE, held_out, plain_text
from attnx.demo.corpus import Corpus, random_windows
from attnx.demo.model import VOCABULARY, ModelConfig
from attnx.demo.results import GenerationResult

STEPS = 40  # of training: what is shown is the decoding
BATCH, LENGTH, LEARNING_RATE = 4, 256, 3e-3
MISSING = "model.generate was left out, as transformers is not installed: pip install 'attnx[transformers]'"


def is_installed() -> bool:
    return importlib.util.find_spec("transformers") is not None


def generate(
    corpus: Corpus, model: ModelConfig, seed: int, device: torch.device, on_step: Callable[[], object], steps: int
) -> list[GenerationResult]:
    """What ``model.generate`` draws with the same random numbers from transformers' own cache and from a staircase.
    ``on_step`` is called ``steps + 2`` times."""
    import transformers

    from attnx.integrations.transformers import StaircaseCache, switch

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=model.width,
        intermediate_size=2 * model.width,
        num_hidden_layers=model.layers // 2,
        num_attention_heads=model.heads,
        max_position_embeddings=model.context,
        bos_token_id=None,
        eos_token_id=None,
    )
    llama = transformers.LlamaForCausalLM(config).to(device)
    switch(llama, "attnx_softmax")
    optimizer = torch.optim.AdamW(llama.parameters(), LEARNING_RATE)
    generator = torch.Generator().manual_seed(seed)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu"):
        for _ in range(steps):
            tokens = random_windows(corpus.train, BATCH, LENGTH, generator).to(device)
            llama(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            on_step()

    llama = llama.to(torch.bfloat16).eval()
    prompt = plain_text(held_out(corpus, model)).to(device)
    results = []
    for label, cache in (
        ("in full", transformers.DynamicCache(config=llama.config)),
        ("staircase", StaircaseCache(llama.config, max_length=PROMPT + GENERATED)),
    ):
        torch.manual_seed(seed)
        start = time.perf_counter()
        tokens = llama.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            cache=cache,
            max_new_tokens=GENERATED,
            do_sample=True,
            temperature=TEMPERATURE,
        )
        text = bytes(tokens[0, PROMPT:].tolist()).decode(errors="replace")
        results.append(GenerationResult(label, time.perf_counter() - start, text))
        on_step()
    return results
