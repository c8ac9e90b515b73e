"""What nvcc makes of the kernels, on any machine that has it: the oracle is the machine code."""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
import kernel_resources  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=kernel_resources.ARCHS)
def kernels(request) -> list[kernel_resources.Kernel]:
    try:
        return kernel_resources.compile_kernels((request.param,))
    except kernel_resources.Unavailable as reason:
        pytest.skip(str(reason))


def test_no_kernel_spills_or_uses_local_memory(kernels):
    assert len(kernels) > 20
    offenders = [k for k in kernels if k.stack_bytes or k.spill_bytes or k.local_accesses]
    assert not offenders


def test_channels_last_kernels_move_128_bits_at_a_time(kernels):
    # One instantiation for every pair of types handles aligned channels; beside it there may be one for the rest.
    variants = defaultdict(list)
    for kernel in kernels:
        if "channels_last" in kernel.name:
            name, types = kernel.name.split("<")
            variants[(name, *types.split(", ")[:2])].append(kernel)
    assert {name for name, *_ in variants} >= {
        "roi_align_forward_channels_last_kernel",
        "roi_align_backward_channels_last_kernel",
    }
    for key, group in variants.items():
        assert any(set(k.stores) == {128} and 128 in k.loads and 16 not in k.loads for k in group), (key, group)


def test_static_shared_memory_leaves_room_for_two_blocks(kernels):
    # 48 KiB is the limit without opting in to more; two such blocks fit the 100 KiB of the smallest multiprocessor of
    # compute capability 8 and above.
    assert max(k.shared_bytes for k in kernels) <= 48 * 1024


def test_enough_warps_fit_a_multiprocessor(kernels):
    # 65,536 registers. Kernels that compute in float32 must leave room for two blocks of eight warps, or too few loads
    # are in flight to hide the memory; those in float64 are bound by their arithmetic.
    crowded = [k for k in kernels if k.registers > 128 and "double" not in k.name]
    assert not crowded
