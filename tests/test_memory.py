"""The memory of CPU outputs that is kept for the next call: it serves again, and nobody can tell by the values.

Oracles: tensors that are still alive, and the same call on memory of its own.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import proposals
from torch import Tensor

from roialign_ext import _library, roi_align

MIB = 1 << 20
BYTES_OF_ROI = 64 * 14 * 14 * 4  # 49 KiB


@pytest.fixture(autouse=True)
def nothing_kept():
    _library.release_memory()
    yield
    _library.release_memory()


def pool(num_rois: int, seed: int = 0, **options) -> Tensor:
    features = torch.randn(1, 64, 16, 16, generator=torch.Generator().manual_seed(seed))
    boxes = torch.tensor(proposals(num_rois, 64, 64, images=1, seed=seed, median=20.0))
    return roi_align(features.contiguous(**options), boxes, 14, 0.25, 2)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_what_is_freed_serves_the_next_call(memory_format):
    output = pool(100, memory_format=memory_format)
    address, values = output.data_ptr(), output.clone()
    del output
    again = pool(100, memory_format=memory_format)
    assert again.data_ptr() == address
    assert again.is_contiguous(memory_format=memory_format)
    assert torch.equal(again, values)


def test_fewer_rois_take_it_too_and_half_as_many_do_not():
    output = pool(200)
    address = output.data_ptr()
    del output
    few, kept = pool(90), pool(150)
    assert few.data_ptr() != address
    assert kept.data_ptr() == address
    assert torch.equal(kept, pool(150))


def test_the_larger_of_two_is_kept():
    small, large = pool(100), pool(150)
    del large, small
    assert _library.release_memory() == 150 * BYTES_OF_ROI


def test_what_is_too_small_makes_way():
    small = pool(100)
    del small
    output = pool(150)
    assert _library.release_memory() == 0
    assert torch.isfinite(output).all()


@pytest.mark.parametrize("num_rois, kept", [(10, False), (1000, True), (1100, False)])
def test_only_outputs_of_2_to_50_mib_are_kept(num_rois, kept):
    output = pool(num_rois)
    size = output.nbytes
    assert kept == (2 * MIB <= size <= 50 * MIB)
    del output
    assert _library.release_memory() == (size if kept else 0)


def test_a_view_keeps_its_memory():
    view = pool(100)[3:5]
    values = view.clone()
    pool(100, seed=1)
    assert torch.equal(view, values)


def test_an_output_can_be_resized_and_shared():
    output = pool(100)
    values = output.clone()
    output.resize_(200, 64, 14, 14)
    assert torch.equal(output[:100], values)
    output = pool(100)
    output.untyped_storage().resize_(0)
    output = pool(100).share_memory_()
    assert output.is_shared() and torch.equal(output, values)
    assert torch.equal(torch.from_numpy(pool(100).numpy().copy()), values)


def test_threads_never_share_it():
    expected = [pool(60 + 10 * i, seed=i) for i in range(8)]

    def work(i: int) -> bool:
        return all(torch.equal(pool(60 + 10 * i, seed=i), expected[i]) for _ in range(20))

    with ThreadPoolExecutor(4) as executor:
        assert all(executor.map(work, range(8)))


def test_a_size_that_overflows_is_refused():
    """Oracle: torch's own message for a tensor of that size."""
    boxes = torch.zeros(1, 5).expand(1 << 20, 5)
    with pytest.raises(RuntimeError, match="overflow|allocate"):
        roi_align(torch.zeros(1, 1, 1, 1).expand(1, 1 << 30, 1, 1), boxes, 1 << 15)
