"""What every test may ask for: a backend, an instruction set, a number of threads; and how hypothesis behaves."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

import attnx
from attnx._capability import dtype_name
from backends import BACKENDS, Backend

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=60, print_blob=True)
settings.register_profile("explore", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# The shapes are small: threads would wait for each other most of the time. Tests of threads take `threads`.
# ThreadSanitizer wants several for all (.ci/run threads).
torch.set_num_threads(int(os.environ.get("ATTNX_TEST_THREADS", "1")))

# Asked for by a test, these run it several times on the CPU's kernels, and once on others, which have none of them.
CPU_CHOICES = {
    "instruction_set": attnx._C.cpu_instruction_sets(),
    "threads": [1, 2, 5],  # one, several, and a number that divides nothing evenly
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes ``backend``, ``device`` or ``dtype`` runs on each backend, or on those its marker names."""
    if "backend" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker("backends")
    backends = [b for b in BACKENDS if marker is None or b.name in marker.args]
    choice = next((name for name in CPU_CHOICES if name in metafunc.fixturenames), None)
    if choice is None:
        metafunc.parametrize("backend", backends, ids=str, indirect=True)
        return
    pairs = [(b, x) for b in backends for x in (CPU_CHOICES[choice] if b.kernels == "cpu" else [None])]
    ids = [f"{b}-{x}" if x else str(b) for b, x in pairs]
    metafunc.parametrize(["backend", choice], pairs, ids=ids, indirect=True)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """The one place that skips: what the capability table does not promise for the backend."""
    parameters = getattr(item, "callspec", None)
    if parameters is None or "backend" not in parameters.params:
        return
    needs = [need for marker in item.iter_markers("needs") for need in marker.args]
    if "dtype" in parameters.params:
        needs.append(dtype_name(parameters.params["dtype"]))
    for need in needs:
        if reason := parameters.params["backend"].missing(need):
            pytest.skip(reason)


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest) -> Backend:
    return request.param


@pytest.fixture(scope="session")
def device(backend: Backend) -> torch.device:
    return backend.device


@pytest.fixture(scope="session")
def dtype(backend: Backend) -> torch.dtype:
    """For tests that need but one; others parametrize ``dtype`` themselves."""
    return backend.dtypes()[0]


@pytest.fixture(autouse=True)
def _compiled_anew() -> Iterator[None]:
    """What one test compiled does not count for the next: torch limits how often a function is compiled."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.utils.counters.clear()
        torch._dynamo.reset()


@pytest.fixture
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str | None]:
    """Runs the test on each instruction set that this machine has."""
    before = attnx._C.cpu_instruction_set()
    attnx._C.set_cpu_instruction_set(request.param or before)
    yield request.param
    attnx._C.set_cpu_instruction_set(before)


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Runs the test with several numbers of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param or before)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Asks for the same bits from the same call, which the kernels of the CPU give anyway and CUDA's on request."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def poisoned_allocations(deterministic: None) -> None:
    """Fills every tensor that is allocated uninitialised, the operators' outputs among them, with NaN.

    Among deterministic algorithms torch.utils.deterministic.fill_uninitialized_memory, on by default, does that.
    """
