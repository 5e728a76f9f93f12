"""Trains the demo's model at one length with several attentions, and validates it at longer ones.

    python bench/extrapolation.py --steps 150

It prints bits per byte of the corpus of ``python -m attnx``, which every installation of Python carries.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch

import attnx
from attnx.demo.attentions import Attention, CausalAttention
from attnx.demo.corpus import consecutive_windows, load_corpus
from attnx.demo.model import ModelConfig
from attnx.demo.training import Learner, TrainingConfig, train

LENGTHS = (256, 512, 1024, 2048, 4096)
ATTENTIONS: dict[str, CausalAttention] = {
    "softmax": partial(attnx.softmax_attention, is_causal=True),
    "softplus": partial(attnx.softplus_attention, is_causal=True),
    "softplus, sharpen=3": partial(attnx.softplus_attention, is_causal=True, sharpen=3),
    "softplus, sharpen=15": partial(attnx.softplus_attention, is_causal=True, sharpen=15),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--context", type=int, default=256, help="tokens of a window in training")
    options = parser.parse_args()
    corpus = load_corpus(None, max(LENGTHS))
    model, config = ModelConfig(context=max(LENGTHS)), TrainingConfig(steps=options.steps, batch=8)
    learners = [
        Learner(Attention(name, name, "", function, function), model, config, torch.device("cpu"))
        for name, function in ATTENTIONS.items()
    ]
    train(learners, corpus, options.context, config, on_step=lambda _: None, stop=lambda: False)
    print("|", " | ".join(["", *map(str, LENGTHS)]), "|")
    for learner in learners:
        # The same bytes at every length: as many as whole windows of the longest hold.
        data = corpus.validation[: len(corpus.validation) // max(LENGTHS) * max(LENGTHS) + 1]
        bits = [learner.validate(consecutive_windows(data, length), batch=1) for length in LENGTHS]
        print("|", " | ".join([learner.attention.name, *(f"{x:.2f}" for x in bits)]), "|", flush=True)


if __name__ == "__main__":
    main()
