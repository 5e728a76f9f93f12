"""What every test may ask for: a device, an instruction set, a number of threads; and how hypothesis behaves."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

import attnx

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=60, print_blob=True)
settings.register_profile("explore", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# The shapes are small: threads would wait for each other most of the time. Tests of threads take `threads`.
torch.set_num_threads(1)


# The one place that lists the backends: a test that takes `device` runs on each of them.
@pytest.fixture(params=["cpu"], scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(params=attnx._C.cpu_instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on each instruction set that this machine has."""
    before = attnx._C.cpu_instruction_set()
    attnx._C.set_cpu_instruction_set(request.param)
    yield request.param
    attnx._C.set_cpu_instruction_set(before)


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Runs the test with one thread, with several, and with a number that divides nothing evenly."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def poisoned_allocations() -> Iterator[None]:
    """Fills every tensor that is allocated uninitialised, the operators' outputs among them, with NaN."""
    torch.use_deterministic_algorithms(True)  # torch.utils.deterministic.fill_uninitialized_memory is on by default
    yield
    torch.use_deterministic_algorithms(False)
