"""The device a test runs on, a fixed seed per test, and the switch that makes a missing GPU fail."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import pytest
import torch

DEVICES = ("cpu", "emulated", "cuda")


def require(device_name: str) -> None:
    """Skip, or fail where the run promised a GPU, if the device is not on this machine."""
    if device_name == "cuda" and not torch.cuda.is_available():
        if os.environ.get("ROIALIGN_EXT_REQUIRE_CUDA") == "1":
            pytest.fail("ROIALIGN_EXT_REQUIRE_CUDA=1, and torch.cuda.is_available() is False")
        pytest.skip("no GPU: torch.cuda.is_available() is False")
    if device_name == "emulated" and not (Path(__file__).parent / "emulation" / "__init__.py").exists():
        pytest.skip("no tests/emulation beside the tests")


@pytest.fixture(params=DEVICES)
def device_name(request, monkeypatch) -> str:
    """cpu; emulated: tensors on the CPU, operators that run the CUDA kernels there; cuda."""
    require(request.param)
    if request.param == "emulated":
        import emulation

        monkeypatch.setattr("roialign_ext.autograd.operators", emulation.load())
    return request.param


@pytest.fixture
def device(device_name) -> torch.device:
    """Where the tensors of the test live."""
    return torch.device("cuda" if device_name == "cuda" else "cpu")


@pytest.fixture(autouse=True)
def fixed_seed(request) -> None:
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def threads():
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def deterministic_algorithms():
    """torch.use_deterministic_algorithms(True) for the test."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
