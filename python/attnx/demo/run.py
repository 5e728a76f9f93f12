"""A whole run: check, train, validate, time, report."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console

from attnx import info
from attnx.demo import DemoError, generation
from attnx.demo.attentions import ATTENTIONS, BASELINE
from attnx.demo.caches import compare_caches, steps
from attnx.demo.corpus import load_corpus
from attnx.demo.interrupt import stop_on_interrupt
from attnx.demo.measure import ROUNDS, forward_seconds, largest_error, require_kernels
from attnx.demo.model import ModelConfig
from attnx.demo.plot import save_plot
from attnx.demo.progress import DemoProgress
from attnx.demo.results import AttentionResult, CacheResult, GenerationResult, Results
from attnx.demo.table import caches_table, results_table
from attnx.demo.training import Learner, TrainingConfig, train, validate


@dataclass(frozen=True)
class DemoConfig:
    attentions: tuple[str, ...] = tuple(ATTENTIONS)
    device: str = "cpu"
    text: Path | None = None
    output: Path = Path("attnx-report")
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)


def run(config: DemoConfig, console: Console) -> Results:
    """Runs the comparison, prints its table, and writes report.json and report.png to ``config.output``.

    Raises:
        DemoError: an option cannot be met; raised before any training.
        KeyboardInterrupt: Ctrl-C before the first step, or twice.
    """
    started = time.perf_counter()
    model, context = config.model, config.model.context
    attentions = [ATTENTIONS[name] for name in config.attentions]
    corpus = load_corpus(config.text, context)
    device = _device(config.device)
    require_kernels(attentions, device, model.width // model.heads)
    _make_folder(config.output)

    console.print(
        f"{corpus.name}: {len(corpus.train):,} bytes to learn from, {len(corpus.validation):,} to validate on"
    )
    with stop_on_interrupt() as stop, DemoProgress(console) as progress:
        errors = [largest_error(attention, device) for attention in attentions]
        learners = [Learner(attention, model, config.training, device) for attention in attentions]
        bars = {
            learner: progress.add(f"[{learner.attention.colour}]{learner.attention.label}", config.training.steps)
            for learner in learners
        }
        train(
            learners,
            corpus,
            context,
            config.training,
            on_step=lambda learner: progress.show_step(bars[learner], learner, config.training.batch * context),
            stop=stop,
        )
        if not learners[-1].losses:
            raise KeyboardInterrupt
        validation = validate(learners, corpus, context)
        timing = progress.add("forward, 4096 tokens", ROUNDS + 1)
        forward = forward_seconds(attentions, device, on_round=lambda: progress.advance(timing), stop=stop)
        caches: list[CacheResult] = []
        softmax = next((learner for learner in learners if learner.attention.name in ("softmax", "sdpa")), None)
        if softmax and device.type in ("cpu", "cuda") and not stop():  # where the staircase has kernels
            decoding = progress.add("decoding with caches", steps(model))
            caches = compare_caches(
                softmax.model, model, corpus, config.training.seed, on_step=lambda: progress.advance(decoding)
            )
        generated: list[GenerationResult] = []
        if caches and generation.is_installed() and not stop():
            steps_of_llama = min(generation.STEPS, config.training.steps)
            generating = progress.add("model.generate", steps_of_llama + 2)
            generated = generation.generate(
                corpus, model, config.training.seed, device, lambda: progress.advance(generating), steps_of_llama
            )
        interrupted = stop()

    results = Results(
        config={**asdict(config), "text": corpus.name, "output": str(config.output)},
        environment=info.collect(),
        attentions=[
            AttentionResult(
                name=learner.attention.name,
                label=learner.attention.label,
                largest_error=error,
                training_bits_per_byte=learner.losses,
                step_seconds=learner.seconds,
                validation_bits_per_byte=bits,
                forward_seconds=forward[learner.attention.name],
            )
            for learner, error, bits in zip(learners, errors, validation, strict=True)
        ],
        baseline_forward_seconds=forward[BASELINE.name],
        caches=caches,
        generation=generated,
        interrupted=interrupted,
        seconds=time.perf_counter() - started,
    )
    console.print(results_table(results))
    if caches:
        console.print(caches_table(results))
        for cache in caches:
            _print_text(console, f"{cache.label} writes", cache.text)
        for result in generated:
            _print_text(console, f"model.generate, {result.label}, in {result.seconds:.1f} s", result.text)
        if not generation.is_installed():
            console.print(generation.MISSING, markup=False, highlight=False)
    json_path, plot_path = config.output / "report.json", config.output / "report.png"
    results.save(json_path)
    save_plot(results, plot_path)
    console.print(
        f"{'interrupted after' if interrupted else 'took'} {results.seconds:.0f} s; see {plot_path}, {json_path}"
    )
    return results


def _print_text(console: Console, what: str, text: str) -> None:
    console.print(f"{what}: {text.encode('unicode_escape').decode()}", markup=False, highlight=False)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise DemoError(f"--device: expected one that torch can use here, got {name!r} ({reason})") from error
    return device


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"--output: expected a folder that can be written, got {path} ({error.strerror})") from error
