"""Faults that are planted one by one, each of which some test must find.

A copy of the sources is built and tested with each fault, which is kept out of the sources at hand. The score, printed
at the end, is how many were found.

    python tests/mutants.py [--only WORD] [--folder build/mutants]

The environment has what builds attnx (CONTRIBUTING.md).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
COPIED = ("CMakeLists.txt", "README.md", "pyproject.toml", "csrc", "python", "tests", "third_party")


@dataclass(frozen=True)
class Mutant:
    """A text of a file that another replaces, and the tests that should mind, as arguments of pytest."""

    file: str
    text: str
    fault: str
    tests: str


LABELS, SHARES = "csrc/cpu/labels.cpp", "csrc/attnx/block_labels.h"
ARGUMENTS, LISTS, CACHE = "csrc/torch/arguments.cpp", "csrc/torch/block_sparse.cpp", "csrc/torch/staircase_cache.cpp"
MAP, CLUSTERS, ROUTES = "python/attnx/_operators/sparse_linear.py", "csrc/cpu/clusters.cpp", "csrc/torch/routes.cpp"
SOFTMAX, LISTED = "csrc/cpu/kernel/score/softmax.h", "csrc/cpu/kernel/tiles/listed.h"
TERMS, TERM_SUMS = "csrc/torch/terms.cpp", "csrc/cpu/kernel/logits/sums.h"
TERM_TILE, DROPOUT = "csrc/cpu/kernel/logits/tile.h", "csrc/cpu/kernel/random.h"
SIGMOID, BAND = "csrc/cpu/kernel/score/sigmoid.h", "csrc/cpu/kernel/tiles/band.h"

MUTANTS = (
    Mutant(TERMS, "share >= 0 && share <= 1", "true", "test_logit_terms.py -k share"),
    Mutant(TERMS, "softcap > 0", "softcap >= 0", "test_logit_terms.py -k no_softcap"),
    Mutant(TERM_TILE, "ds * (1 - t * t)", "ds", "test_logit_terms.py -k definition"),
    Mutant(TERM_TILE, "(!shares || shares[at] != 0)", "true", "test_logit_terms.py -k leak"),
    Mutant(TERM_SUMS, "grad.head_stride == 0 && p.heads_q > 1", "false", "test_logit_terms.py -k threads"),
    Mutant(DROPOUT, "pair * 2 + n % 2 - key0", "pair * 2 + (n + 1) % 2 - key0", "test_logit_terms.py -k definition"),
    Mutant(ARGUMENTS, "share >= 0 && share <= 1", "true", "test_fuzz.py -k shares"),
    Mutant(ARGUMENTS, "critical + negligible <= 1", "true", "test_fuzz.py -k shares"),
    Mutant(ARGUMENTS, "offsets[0] == 0", "true", "test_bad_input.py -k varlen"),
    Mutant(ARGUMENTS, "length >= 0, name", "length >= -9, name", "test_bad_input.py -k varlen"),
    Mutant(ARGUMENTS, "offsets[last] == rows", "offsets[last] >= rows", "test_bad_input.py -k varlen"),
    Mutant(ARGUMENTS, "max_seqlen >= longest", "max_seqlen >= longest - 1", "test_bad_input.py -k varlen"),
    Mutant(ARGUMENTS, "dim <= row.head_dim_max", "dim <= row.head_dim_max + 1", "test_bad_input.py -k dense"),
    Mutant(ARGUMENTS, "window.is_causal ? 0 :", "window.is_causal ? 1 :", "test_softmax_attention.py -k causal"),
    Mutant(ARGUMENTS, "? !std::isnan(x) : x", "? true : x", "test_bad_input.py -k sink_nan"),
    Mutant(LISTS, "*count <= width", "*count <= width + 1", "test_block_sparse.py -k bad"),
    Mutant(LISTS, "row[n] < blocks", "row[n] <= blocks", "test_block_sparse.py -k bad"),
    Mutant(CACHE, "l.window % l.group == 0", "true", "test_staircase.py"),
    Mutant(ROUTES, "count >= 0 && std::isfinite(count)", "true", "test_routing.py -k count"),
    Mutant(LABELS, "rank > other.rank : index", "rank >= other.rank : index", "test_sparse_linear.py -k map"),
    Mutant(LABELS, "index < other.index", "index > other.index", "test_sparse_linear.py -k map"),
    Mutant(SHARES, "end = grid.is_causal ?", "end = false ?", "test_sparse_linear.py -k map"),
    Mutant(SHARES, "larger(1, larger(most, unranked))", "larger(most, unranked)", "test_sparse_linear.py -k map"),
    Mutant(CLUSTERS, "(1 - p.decay) * p.members[c]", "p.members[c]", "test_routing.py -k centroid"),
    Mutant(MAP, "(scale > 0) - (scale < 0)", "1", "test_sparse_linear.py -k sign"),
    Mutant(
        MAP, "mean(2, keepdim=True, dtype=torch.float64)", "mean(2, keepdim=True)", "test_sparse_linear.py -k equal"
    ),
    Mutant(SOFTMAX, "0 * sum_[lane] :", "1 / sum_[lane] :", "test_hidden_rows.py"),
    Mutant(SOFTMAX, "? kInfinity : logsumexp", "? 0 : logsumexp", "test_hidden_rows.py"),
    Mutant(SIGMOID, "return e * complement", "return e * complement + 1e-38f", "test_hidden_rows.py"),
    Mutant(LISTED, "if (is_hidden(i)) continue;", "", "test_hidden_rows.py"),
    Mutant(BAND, "position + right_ + 1", "position + right_", "test_softmax_attention.py"),
)


def copy_sources(folder: Path) -> Path:
    """Leaves out what was built, and writes only what changes, so that a second run compiles little."""
    source = folder / "source"
    for name in COPIED:
        for path in [ROOT / name] if (ROOT / name).is_file() else (ROOT / name).rglob("*"):
            if not path.is_file() or path.suffix in (".so", ".pyc"):
                continue
            to = source / path.relative_to(ROOT)
            if not to.exists() or to.read_bytes() != path.read_bytes():
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, to)
    return source


def build(source: Path, folder: Path) -> None:
    """One instruction set, as faults are in code that all share."""
    pybind11 = subprocess.check_output([sys.executable, "-m", "pybind11", "--cmakedir"], text=True).strip()
    options = {
        "SKBUILD_PROJECT_VERSION": "0.0.0",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11,
        "ATTNX_CUDA": "OFF",
        "ATTNX_CPU_ISAS": "baseline",
    }
    commands = (
        ["cmake", "-S", source, "-B", folder / "cmake", "-G", "Ninja", *(f"-D{k}={v}" for k, v in options.items())],
        ["cmake", "--build", folder / "cmake"],
    )
    for command in commands:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    built = folder / "cmake" / "csrc"
    for path in (*built.glob("python/_C*.so"), built / "torch/libattnx.so", built / "attnx/_policies.py"):
        shutil.copyfile(path, source / "python" / "attnx" / path.name)


def is_found(source: Path, tests: str) -> bool:
    file, *options = tests.split()
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/{file}", *options]
    environment = os.environ | {"PYTHONPATH": str(source / "python")}
    code = subprocess.run(command, cwd=source, env=environment, stdout=subprocess.DEVNULL, timeout=1800).returncode
    if code == 5:
        raise SystemExit(f"{tests}: expected some tests, got none")
    return code != 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="mutants of files, or with tests, whose name has this word")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "mutants")
    args = parser.parse_args()
    folder = args.folder.resolve()
    source = copy_sources(folder)
    build(source, folder)
    mutants = [m for m in MUTANTS if args.only in m.file + m.tests]
    for tests in sorted({m.tests for m in mutants}):
        if is_found(source, tests):
            raise SystemExit(f"{tests}: expected to pass without a fault, got failures")
    survivors = []
    for mutant in mutants:
        start, file = time.monotonic(), source / mutant.file
        right = file.read_text()
        if right.count(mutant.text) != 1:
            raise SystemExit(f"{mutant.file}: expected {mutant.text!r} once, got it {right.count(mutant.text)} times")
        try:
            file.write_text(right.replace(mutant.text, mutant.fault))
            build(source, folder)
            found = is_found(source, mutant.tests)
        finally:
            file.write_text(right)
        survivors += [] if found else [mutant]
        what = f"{mutant.file}: {mutant.text!r} as {mutant.fault!r}"
        print(f"{'found' if found else 'SURVIVES'} after {time.monotonic() - start:.0f} s  {what}", flush=True)
    print(f"{len(mutants) - len(survivors)} of {len(mutants)} faults were found")
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main())
