"""Faults that are planted one by one, each of which some test must find.

A copy of the sources is built once, with all faults of C++ in it, and which one is made is chosen when a test runs, by
an environment variable. Faults of Python are written into the copy for as long as their tests take. The score, printed
at the end, is how many were found.

    python tests/mutants.py [--only WORD] [--jobs 2] [--folder build/mutants]

The environment has what builds attnx (CONTRIBUTING.md).
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

# What all tests import is imported before they fork.
import hypothesis  # noqa: F401
import pytest
import torch

from planted import MUTANTS, Mutant

ROOT = Path(__file__).parents[1]
COPIED = ("CMakeLists.txt", "README.md", "pyproject.toml", "csrc", "python", "tests", "third_party")
TIMEOUT = 900  # of the tests of one fault, which may have them run for ever
CHOICE = """// The number of the fault that is made, counted from 1.
#pragma once
#include <cstdlib>
inline const int attnx_fault = [] {
  const char* number = std::getenv("ATTNX_FAULT");
  return number ? std::atoi(number) : 0;
}();
"""


def with_faults(source: str, mutants: list[tuple[int, Mutant]]) -> str:
    """C++ in which each of these expressions asks which fault is made."""
    places = []
    for number, mutant in mutants:
        start, end = mutant.place(source)
        places.append((start, end, f"(attnx_fault == {number} ? ({mutant.fault}) : ({source[start:end]}))"))
    places.sort()
    for (_, end, _), (start, _, text) in pairwise(places):
        if start < end:
            raise SystemExit(f"{text}: expected an expression apart from other mutants', got one within")
    for start, end, text in reversed(places):
        source = source[:start] + text + source[end:]
    return source


def copy_sources(folder: Path) -> Path:
    """Plants the faults of C++, leaves out what was built, and writes only what changes, for short second builds."""
    source, by_file = folder / "source", defaultdict(list)
    for number, mutant in enumerate(MUTANTS, 1):
        mutant.place((ROOT / mutant.file).read_text())
        by_file[mutant.file].append((number, mutant))
    for name in COPIED:
        for path in [ROOT / name] if (ROOT / name).is_file() else (ROOT / name).rglob("*"):
            if not path.is_file() or path.suffix in (".so", ".pyc"):
                continue
            content, relative = path.read_bytes(), path.relative_to(ROOT)
            if path.suffix in (".h", ".cpp") and str(relative) in by_file:
                content = with_faults(content.decode(), by_file[str(relative)]).encode()
            to = source / relative
            if not to.exists() or to.read_bytes() != content:
                to.parent.mkdir(parents=True, exist_ok=True)
                to.write_bytes(content)
    (folder / "choice.h").write_text(CHOICE)
    return source


def build(source: Path, folder: Path, jobs: int) -> None:
    """One instruction set, as faults are in code that all share."""
    pybind11 = subprocess.check_output([sys.executable, "-m", "pybind11", "--cmakedir"], text=True).strip()
    options = {
        "SKBUILD_PROJECT_VERSION": "0.0.0",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11,
        "CMAKE_CXX_FLAGS": f"-include {folder / 'choice.h'}",
        "ATTNX_CUDA": "OFF",
        "ATTNX_CPU_ISAS": "baseline",
    }
    commands = (
        ["cmake", "-S", source, "-B", folder / "cmake", "-G", "Ninja", *(f"-D{k}={v}" for k, v in options.items())],
        ["cmake", "--build", folder / "cmake", "--parallel", str(jobs)],
    )
    for command in commands:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    built = folder / "cmake" / "csrc"
    for path in (*built.glob("python/_C*.so"), built / "torch/libattnx.so", built / "attnx/_policies.py"):
        shutil.copyfile(path, source / "python" / "attnx" / path.name)


@contextmanager
def fault_of_python(source: Path, mutant: Mutant) -> Iterator[None]:
    file = source / mutant.file
    right = file.read_text()
    start, end = mutant.place(right)
    try:
        file.write_text(right[:start] + mutant.fault + right[end:])
        yield
    finally:
        file.write_text(right)


def start_tests(source: Path, tests: str, fault: int) -> int:
    """In a process of its own, which has imported nothing of attnx and of its tests before; returns its number."""
    if child := os.fork():
        return child
    signal.alarm(TIMEOUT)  # a signal ends the process, as a crash does
    os.chdir(source)
    os.environ["ATTNX_FAULT"] = str(fault)
    sys.dont_write_bytecode = True
    sys.path[:0] = [str(source / "python"), str(source / "tests")]
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    file, *options = tests.split(maxsplit=2)  # what stands after -k is one expression
    os._exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", f"tests/{file}", *options]))


def failures(source: Path, calls: Iterable[tuple[str, int]], at_once: int) -> Iterator[tuple[str, int, bool]]:
    """Runs tests with faults, each (tests, fault); yields these, and whether a test failed, as they end."""
    running: dict[int, tuple[str, int]] = {}

    def wait() -> tuple[str, int, bool]:
        child, status = os.wait()
        tests, fault = running.pop(child)
        code = os.waitstatus_to_exitcode(status)
        if code > 1:
            raise SystemExit(f"{tests}: expected tests that pass or fail, got exit status {code} of pytest")
        return tests, fault, code != 0

    for tests, fault in calls:
        if len(running) == at_once:
            yield wait()
        running[start_tests(source, tests, fault)] = tests, fault
    while running:
        yield wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="mutants of files, or with tests, whose name has this word")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="tests at once")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "mutants")
    args = parser.parse_args()
    torch.set_num_threads(1)
    jobs = args.jobs
    folder, start = args.folder.resolve(), time.monotonic()
    source = copy_sources(folder)
    build(source, folder, jobs)
    print(f"built in {time.monotonic() - start:.0f} s", flush=True)
    mutants = {number: m for number, m in enumerate(MUTANTS, 1) if args.only in m.file + m.tests}
    for tests, _, failed in failures(
        source, ((tests, 0) for tests in sorted({m.tests for m in mutants.values()})), jobs
    ):
        if failed:
            raise SystemExit(f"{tests}: expected to pass without a fault, got failures")
    survivors = 0

    def report(number: int, found: bool) -> None:
        nonlocal survivors
        survivors += not found
        mutant = mutants[number]
        print(f"{'found' if found else 'SURVIVES'}  {mutant.file}: {mutant.text!r} as {mutant.fault!r}", flush=True)

    compiled = ((m.tests, number) for number, m in mutants.items() if not m.file.endswith(".py"))
    for _, number, found in failures(source, compiled, jobs):
        report(number, found)
    for number, mutant in mutants.items():
        if mutant.file.endswith(".py"):
            with fault_of_python(source, mutant):
                report(number, *(found for _, _, found in failures(source, [(mutant.tests, 0)], 1)))
    seconds = time.monotonic() - start
    print(f"{len(mutants) - survivors} of {len(mutants)} faults were found, in {seconds:.0f} s")
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main())
