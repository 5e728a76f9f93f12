"""The command line: ``python -m attnx`` and ``python -m attnx info``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from attnx import info
from attnx.demo import DemoError
from attnx.demo.attentions import ATTENTIONS
from attnx.demo.training import TrainingConfig


def main() -> int:
    parser = _parser()
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.command == "info":
        facts = info.collect()
        print(json.dumps(facts, indent=1) if options.json else info.as_text(facts))
        return 0
    try:
        return _demo(options)
    except DemoError as error:
        sys.exit(f"{parser.prog}: {error}")
    except KeyboardInterrupt:
        return 130


def _demo(options: argparse.Namespace) -> int:
    try:
        from rich.console import Console

        from attnx.demo.run import DemoConfig, run
    except ModuleNotFoundError as error:
        missing = str(error.name).partition(".")[0]
        if missing not in ("matplotlib", "numpy", "rich"):
            raise
        raise DemoError(f"needs {missing}, which is not installed: pip install 'attnx[demo]'") from error
    config = DemoConfig(
        attentions=tuple(dict.fromkeys(options.attention or ATTENTIONS)),
        device=options.device,
        text=options.text,
        output=options.output,
        training=TrainingConfig(steps=options.steps, seed=options.seed),
    )
    return 130 if run(config, Console()).interrupted else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m attnx",
        description="Trains a small byte-level transformer with PyTorch's softmax attention and with every attention "
        "of attnx, on the same batches, and compares them: a table here, a plot and all figures in a folder.",
    )
    parser.add_argument(
        "--attention",
        action="append",
        choices=ATTENTIONS,
        metavar="NAME",
        help=f"compare only these; repeatable ({', '.join(ATTENTIONS)})",
    )
    parser.add_argument("--device", default="cpu", help="where to train and measure (default: cpu)")
    parser.add_argument("--steps", type=_positive_int, default=TrainingConfig.steps, help="(default: %(default)s)")
    parser.add_argument("--text", type=Path, metavar="FILE", help="learn this file, not Python's help topics")
    parser.add_argument("--seed", type=int, default=TrainingConfig.seed, help="(default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("attnx-report"), metavar="DIR", help="(default: %(default)s)"
    )
    parser.add_argument("--threads", type=_positive_int, help="CPU threads (default: torch's own choice)")
    commands = parser.add_subparsers(dest="command", metavar="")
    info_parser = commands.add_parser(
        "info", help="say what was built, what this machine has and which kernels it will use"
    )
    info_parser.add_argument("--json", action="store_true", help="as JSON")
    return parser


def _positive_int(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return number


if __name__ == "__main__":
    sys.exit(main())
