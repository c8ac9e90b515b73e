"""Data-parallel training, mixed precision, CUDA graphs and streams: the operation where gradients and launches meet.

Parallel runs are two gloo processes; their oracle is one process on the joined batch.
"""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from cases import VALUES, proposals
from torch import Tensor, nn

import roialign_ext

SCALES = (0.25, 0.125)
TESTS = Path(__file__).parent


# What both the tests and the processes that they start build on.


class Detector(nn.Module):
    """Two maps, one branch of weights for each, the pooler, a linear head."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.fine = nn.Conv2d(3, 4, 3, stride=4, padding=1, dtype=dtype)
        self.coarse = nn.Conv2d(3, 4, 3, stride=8, padding=1, dtype=dtype)
        self.pool = roialign_ext.MultiScaleRoIAlign(
            ["0", "1"], 3, 2, canonical_scale=32, canonical_level=3, spatial_scales=SCALES
        )
        self.head = nn.Linear(36, 5, dtype=dtype)

    def forward(self, image: Tensor, boxes: list[Tensor]) -> Tensor:
        pooled = self.pool({"0": self.fine(image), "1": self.coarse(image)}, boxes, [])
        return self.head(pooled.flatten(1))


def batch_of(counts: tuple[int, int], median: float) -> tuple[Tensor, list[Tensor]]:
    """Two images and their boxes; a small median leaves the coarse map without any."""
    torch.manual_seed(3)
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    rows = torch.tensor(proposals(sum(counts), 64, 96, seed=4, median=median), dtype=torch.float64).reshape(-1, 5)[
        :, 1:
    ]
    if median < 10:
        rows[:, 2:] = torch.minimum(rows[:, 2:], rows[:, :2] + 12)
    return images, list(rows.split(counts))


CASES = {
    "both-levels": ((7, 5), 40.0),
    "a-level-without-boxes": ((7, 5), 5.0),
    "a-rank-without-boxes": ((0, 6), 40.0),
    "no-boxes-at-all": ((0, 0), 40.0),
}


def gradients_alone(name: str) -> dict[str, Tensor]:
    """One process, the joined batch; the loss is a sum, of which data-parallel training takes the mean over ranks."""
    torch.manual_seed(0)
    model = Detector(torch.float64)
    images, boxes = batch_of(*CASES[name])
    (model(images, boxes).square().sum() / 2).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def gradients_of_rank(kind: str, name: str) -> dict[str, Tensor]:
    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    model: nn.Module = Detector(torch.float64)
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model)  # find_unused_parameters stays False
    else:
        from torch.distributed.fsdp import fully_shard

        for part in (model.fine, model.coarse, model.head, model):
            fully_shard(part)
    images, boxes = batch_of(*CASES[name])
    model(images[rank : rank + 1], [boxes[rank]]).square().sum().backward()
    gradients = {}
    for parameter_name, parameter in model.named_parameters():
        gradient = parameter.grad
        if hasattr(gradient, "full_tensor"):
            gradient = gradient.full_tensor()
        gradients[parameter_name.removeprefix("module.")] = gradient
    return gradients


def run_rank(kind: str, folder: str) -> None:
    """One of two processes, started by the test below."""
    torch.distributed.init_process_group("gloo")
    found = {name: gradients_of_rank(kind, name) for name in CASES}
    torch.save(found, Path(folder) / f"rank{torch.distributed.get_rank()}.pt")
    torch.distributed.barrier()  # a process that leaves while gloo still talks to it takes its threads down with it
    torch.distributed.destroy_process_group()


@pytest.mark.slow
class TestDataParallel:
    """Oracle: one process on the joined batch."""

    @pytest.mark.parametrize("kind", ["ddp", "fsdp"])
    def test_gradients(self, kind, tmp_path):
        if kind == "fsdp" and not hasattr(importlib.import_module("torch.distributed.fsdp"), "fully_shard"):
            pytest.skip(f"torch {torch.__version__} has no fully_shard")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        code = (
            "import sys; sys.path.insert(0, sys.argv[1]); import test_parallel; test_parallel.run_rank(*sys.argv[2:])"
        )
        environment = dict(
            os.environ, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", OMP_NUM_THREADS="1"
        )
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", code, str(TESTS), kind, str(tmp_path)],
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(2)
        ]
        try:
            logs = [rank.communicate(timeout=240)[0] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        assert [rank.returncode for rank in ranks] == [0, 0], textwrap.indent("\n".join(logs), "    ")
        found = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
        for name in CASES:
            for parameter, expected in gradients_alone(name).items():
                for rank in range(2):
                    torch.testing.assert_close(found[rank][name][parameter], expected, rtol=1e-10, atol=1e-12)


class TestMixedPrecision:
    """Half features beside float32 boxes. Oracle: the float32 result of the rounded features, as SEMANTICS has it."""

    @pytest.mark.parametrize(
        "layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"]
    )
    @pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
    def test_maps_are_neither_copied_nor_kept(self, dtype, autocast, layout, monkeypatch):
        pointers, saved = [], []

        class Watching:
            def roi_align_forward(self, features, boxes, *rest):
                pointers.extend(x.data_ptr() for x in features)
                assert {x.dtype for x in features} == {dtype} and boxes.dtype == torch.float32
                return torch.ops.roialign_ext.roi_align_forward(features, boxes, *rest)

        monkeypatch.setattr("roialign_ext.autograd.operators", Watching())
        features = [
            torch.randn(2, 16, 64 >> level, 96 >> level).to(dtype, memory_format=layout).requires_grad_()
            for level in range(2)
        ]
        rows = torch.tensor(proposals(12, 64, 96, images=2))
        with (
            torch.autocast("cpu", dtype=dtype, enabled=autocast),
            torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x),
        ):
            output = roialign_ext.multiscale_roi_align(features, rows, 7, [1, 0.5], 2)
        assert pointers == [x.data_ptr() for x in features]
        assert sum(x.numel() for x in saved) == rows.numel()
        assert output.dtype == dtype and output.is_contiguous(memory_format=layout)
        monkeypatch.undo()
        wide = roialign_ext.multiscale_roi_align([x.detach().float() for x in features], rows, 7, [1, 0.5], 2)
        assert torch.equal(output, wide.to(dtype))

    def test_channels_last_model_end_to_end(self):
        """Oracle: the same model in the other layout."""
        torch.manual_seed(0)
        model = Detector()
        images, boxes = (x for x in batch_of((7, 5), 40.0))
        images, boxes = images.float(), [x.float() for x in boxes]
        results = []
        for layout in (torch.contiguous_format, torch.channels_last):
            model = model.to(memory_format=layout)
            pooled: list[Tensor] = []
            hook = model.pool.register_forward_hook(lambda *call, pooled=pooled: pooled.append(call[2]))
            loss = model(images.contiguous(memory_format=layout), boxes).square().mean()
            hook.remove()
            assert pooled[0].is_contiguous(memory_format=layout)
            results.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
        for one, other in zip(*results):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
    def test_a_scaled_training_step(self, dtype):
        """Oracle: the step in float32, to the precision of the dtype. An infinite step is left out."""
        results = []
        for enabled in (False, True):
            torch.manual_seed(0)
            model = Detector()
            images, boxes = batch_of((7, 5), 40.0)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=enabled)
            with torch.autocast("cpu", dtype=dtype, enabled=enabled):
                loss = model(images.float(), [x.float() for x in boxes]).float().square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            results.append([p.detach() for p in model.parameters()])
        for one, other in zip(*results):
            torch.testing.assert_close(one, other, rtol=0, atol=0.02 * float(other.abs().max()))
        before = [p.clone() for p in model.parameters()]
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            loss = model(images.float(), [x.float() for x in boxes]).float().mean()
        scaler.scale(loss * torch.inf).backward()
        scaler.step(optimizer)
        assert all(torch.equal(one, other) for one, other in zip(before, model.parameters()))


@pytest.fixture
def cuda() -> torch.device:
    from conftest import require

    require("cuda")
    return torch.device("cuda")


def captured(step: Callable, device_name: str) -> tuple[Sequence[Tensor], Callable[[], None]]:
    """The results of a step captured in a graph, which are there once it is replayed, and the replay."""
    if device_name == "emulated":
        import emulation

        with emulation.capture() as replay:
            return step(), replay
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        return step(), graph.replay


class TestCudaGraphs:
    """Oracle: the call outside of the graph."""

    @pytest.mark.parametrize("mode", ["avg", "max"])
    @pytest.mark.parametrize("by_levels", [False, True], ids=["by-image", "by-level"])
    @pytest.mark.parametrize("device_name", ["emulated", "cuda"], indirect=True)
    def test_replay_with_other_boxes_and_padding(self, by_levels, mode, device, device_name):
        features = [torch.randn(2, 8, 64 >> level, 96 >> level, device=device).requires_grad_() for level in range(2)]
        rows = torch.zeros(32, 5, device=device)
        levels = torch.full((32,), -1, device=device) if by_levels else None
        cotangent = torch.randn(32, 8, 7, 7, device=device)
        moving = rows.detach().requires_grad_()  # shares the memory of rows

        def step():
            output = roialign_ext.multiscale_roi_align(features, moving, 7, [1, 0.5], 2, levels=levels, mode=mode)
            return output, *torch.autograd.grad(output, [moving, *features], cotangent, retain_graph=True)

        def fill(count):
            rows[:, 0] = -1.0
            rows[:count] = torch.tensor(proposals(count, 64, 96, images=2, seed=count), device=device)
            if levels is not None:
                levels.fill_(-1)
                levels[:count] = torch.arange(count, device=device) % 2

        fill(5)
        results, replay = captured(step, device_name)
        for count in (5, 32, 1, 17):
            fill(count)
            replay()
            for one, other in zip(results, step()):
                assert torch.equal(one, other)
            assert results[0][:count].any() and not results[0][count:].any()

    def test_side_stream(self, cuda):
        feature = torch.randn(2, 8, 64, 96, device=cuda)
        rows = torch.tensor(proposals(200, 64, 96, images=2), device=cuda)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            # Long enough that a launch on another stream would read the map before it is there.
            late = feature
            for _ in range(50):
                late = late * 1.0 + 0.0
            output = roialign_ext.roi_align(late, rows, 7, 1.0, 2)
        torch.cuda.current_stream().wait_stream(side)
        assert torch.equal(output, roialign_ext.roi_align(feature, rows, 7, 1.0, 2))

    def test_second_device(self, cuda):
        if torch.cuda.device_count() < 2:
            pytest.skip("no second GPU: torch.cuda.device_count() is below 2")
        feature, rows = torch.randn(2, 8, 64, 96), torch.tensor(proposals(40, 64, 96, images=2))
        first, second = (
            roialign_ext.roi_align(feature.to(device), rows.to(device), 7, 1.0, 2) for device in ("cuda:0", "cuda:1")
        )
        assert second.device == torch.device("cuda:1")
        allowed = VALUES[torch.float32].computed
        torch.testing.assert_close(second.cpu(), first.cpu(), rtol=allowed, atol=allowed)
