"""The parts of gpu_report.py that run in a process of their own, with the package built. Each returns what it found.

On `emulated` they only show that they run: sizes are cut down and what takes a clock is left out.
"""

from __future__ import annotations

import functools
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def _load(device: str) -> str:
    """Import what a part needs; the device its tensors live on."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    if device != "emulated":
        return device
    import emulation

    import roialign_ext.autograd

    roialign_ext.autograd.operators = emulation.load()
    return "cpu"


def run_cases(device: str) -> dict[str, Any]:
    """Small cases forward and backward, for compute-sanitizer to watch; their values are tested elsewhere."""
    place = _load(device)
    import oracles
    import torch
    from cases import CASE, DTYPES, LAYOUTS

    from roialign_ext import detection

    names = [
        "levels-3",
        "across-the-border-adaptive-aligned",
        "not-finite-fixed-legacy",
        "huge-adaptive-legacy",
        "padding",
    ]
    names += ["output-14x14", "channels-5", "channels-64", "seventeen-samples", "images-uneven", "map-of-one-cell"]
    count = 0
    for name in names:
        for dtype in DTYPES.values():
            for layout in ("contiguous", "channels_last"):
                features = LAYOUTS[layout]([f.to(place) for f in CASE[name].features(dtype)])
                inputs = [f.detach().requires_grad_() for f in features]
                output = oracles.pool(CASE[name], inputs)
                torch.autograd.grad(output, inputs, oracles.cotangent(CASE[name], dtype).to(place))
                count += 1
    for boxes, scores, groups in (_crowd(300, 7, place), _crowd(100, 1, place)):
        detection.batched_nms(boxes, scores, groups, 0.5)
    if place == "cuda":
        torch.cuda.synchronize()
    return {"forward and backward": count, "suppression": 2}


def _crowd(count: int, classes: int, place: str) -> tuple[Any, Any, Any]:
    """Boxes, scores and classes: many that overlap, as in a second stage; of one class, so small that most stay."""
    import torch

    generator = torch.Generator().manual_seed(0)
    if classes > 1:
        objects = 1000 * torch.rand(20, 2, generator=generator)
        corner = objects[torch.randint(20, (count,), generator=generator)] + 20 * torch.rand(
            count, 2, generator=generator
        )
        boxes = torch.cat([corner, corner + 100], 1)
    else:
        corner = 10_000 * torch.rand(count, 2, generator=generator)
        boxes = torch.cat([corner, corner + 2], 1)
    scores, groups = torch.rand(count, generator=generator), torch.arange(count) % classes
    return boxes.to(place), scores.to(place), groups.to(place)


def _pyramid(place: str) -> tuple[dict[str, Any], list[Any], list[tuple[int, int]]]:
    """A feature pyramid of two images and 200 boxes for each."""
    import torch

    torch.manual_seed(0)
    maps = {
        str(level): torch.randn(2, 16, 128 >> level, 160 >> level, device=place, requires_grad=True)
        for level in range(4)
    }
    corners = torch.rand(2, 200, 4, device=place) * 200
    boxes = [torch.cat([c[:, :2], c[:, :2] + 1 + c[:, 2:]], 1) for c in corners]
    return maps, boxes, [(512, 640)] * 2


KINDS = {
    "launches": r"^cu(da)?LaunchKernel",
    "copies": r"^cu(da)?Mem(cpy|set)",
    "synchronisations": r"^cu(da)?(Device|Stream|Event|Ctx)Synchronize",
}


def _profiled(run: Callable[[], object], place: str) -> tuple[dict[str, int], float]:
    """What a call asks of the driver, by kind, and the seconds that its kernels run on the device."""
    from torch.profiler import ProfilerActivity, profile

    def once(run: Callable[[], object]) -> tuple[dict[str, int], float]:
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if place == "cuda" else [])
        with profile(activities=activities, acc_events=True) as found:
            run()
            if place == "cuda":
                import torch

                torch.cuda.synchronize()
        events = found.key_averages()
        calls = {kind: sum(e.count for e in events if re.search(name, e.key)) for kind, name in KINDS.items()}
        return calls, sum(e.self_device_time_total for e in events) / 1e6

    nothing, _ = once(lambda: None)  # the profiler itself synchronises
    calls, seconds = once(run)
    return {kind: n - nothing[kind] for kind, n in calls.items()}, seconds


def count_launches(device: str) -> dict[str, Any]:
    """Launches, copies and synchronisations of a pooler call, ours and torchvision's, by torch's profiler."""
    place = _load(device)
    import torch
    import torchvision

    import roialign_ext

    maps, boxes, shapes = _pyramid(place)

    def pool(ops: Any) -> Any:
        return ops.MultiScaleRoIAlign(list(maps), 7, 2)(maps, boxes, shapes)

    def backward(output: Any) -> None:
        torch.autograd.grad(output, list(maps.values()), weight)

    weight = torch.ones_like(pool(roialign_ext))
    found: dict[str, Any] = {}
    for provider, ops in (("ours", roialign_ext), ("torchvision", torchvision.ops)):
        backward(pool(ops))  # warm up
        output = pool(ops)
        found[f"{provider} forward"], _ = _profiled(functools.partial(pool, ops), place)
        found[f"{provider} backward"], _ = _profiled(functools.partial(backward, output), place)
    if place == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        backward(pool(roialign_ext))
        torch.cuda.set_sync_debug_mode("default")
        assert found["ours forward"]["synchronisations"] == found["ours backward"]["synchronisations"] == 0, found
    return found


def replay_graphs(device: str) -> dict[str, Any]:
    """Forward and backward captured in a CUDA graph, replayed with other maps and boxes: the bits of an eager call."""
    place = _load(device)
    import torch

    import roialign_ext

    def pool(maps: list[Any], rows: Any) -> Any:
        return roialign_ext.multiscale_roi_align(maps, rows, 7, [0.25, 0.125, 0.0625, 0.03125], 2)

    def both(maps: list[Any], rows: Any, weight: Any) -> list[Any]:
        output = pool(maps, rows)
        return [output, *torch.autograd.grad(output, maps, weight)]

    found = {}
    for dtype in (torch.float32, torch.float16):
        pyramid, boxes, _ = _pyramid(place)
        maps = [m.detach().to(dtype).requires_grad_() for m in pyramid.values()]
        rows = torch.cat([torch.cat([torch.full_like(b[:, :1], i), b], 1) for i, b in enumerate(boxes)])
        weight = torch.randn(len(rows), 16, 7, 7, device=place).to(dtype)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                both(maps, rows, weight)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = both(maps, rows, weight)
        with torch.no_grad():
            for tensor in [*maps, weight]:
                tensor.normal_()
            rows[:, 1:] += 7.5
        graph.replay()
        torch.cuda.synchronize()
        eager = both(maps, rows, weight)
        assert all(torch.equal(a, b) for a, b in zip(captured, eager)), f"a replay in {dtype} gives other values"
        found[str(dtype)] = "replay equals eager"
    return found


def _bench(device: str) -> Any:
    """bench_roi_align with the workload that only a GPU takes."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import bench_roi_align
    from workloads import WORKLOADS, Workload

    WORKLOADS["large"] = Workload("a large batch: 16 images of 512 boxes", num_images=16, rois_per_image=512)
    if device == "emulated":
        for name in WORKLOADS:
            WORKLOADS[name] = Workload(name, rois_per_image=4, image_size=(96, 128), channels=8)
    return bench_roi_align


# Workload, layout, dtype: the rows that the CUDA kernels have targets for.
TABLE = [
    ("train", "nchw", "float32"),
    ("train", "channels_last", "float16"),
    ("train", "channels_last", "bfloat16"),
    ("adaptive", "nchw", "float32"),
    ("adaptive", "channels_last", "float16"),
    ("mask", "nchw", "float32"),
    ("large", "channels_last", "float16"),
]


def _times(clock: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    return {f"{metric}_ms": 1e3 * statistics.median(read() for _ in range(rounds)) for metric, read in clock.items()}


def measure_workloads(device: str) -> list[dict[str, Any]]:
    """Every row of TABLE by ours and torchvision: end to end, between events with a cold and a warm cache, kernels
    alone, launches, synchronisations, peak memory beyond what was there, and the ratio to the floor."""
    place = _load(device)
    import torch

    bench = _bench(device)
    where = torch.device(place)
    bandwidth = bench.copy_bandwidth(where, 1)
    found: list[dict[str, Any]] = [{"copy_gb_per_s": bandwidth / 1e9 if place == "cuda" else None}]
    for workload, layout, dtype in TABLE:
        case = bench.Case(workload, layout, dtype, 1, where)
        floors = bench.floor_bytes(case)
        oracle = bench.Oracle(case)
        for provider, make in (("ours", bench.ours), ("torchvision", bench.torchvision_pooler)):
            pool = make(case)
            off = oracle.disagreement(pool)
            for direction, run in bench.runs(case, pool).items():
                run()
                row = {"workload": workload, "layout": layout, "dtype": dtype, "provider": provider}
                row |= {"direction": direction, "off_reference": off, "floor_bytes": floors[direction]}
                row |= {"as_exact_as_claimed": off <= bench.TOLERANCE[dtype]}
                calls, kernels = _profiled(run, place)
                row |= calls
                if place == "cuda":
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                    run()
                    torch.cuda.synchronize()
                    row |= {"peak_mib": (torch.cuda.max_memory_allocated() - before) / 2**20}
                    row |= _times(bench.cuda_clock(run, case), 20)
                    row |= {"kernels_ms": 1e3 * kernels, "floor_ms": 1e3 * floors[direction] / bandwidth}
                    row |= {"of_floor_speed": row["floor_ms"] / row["cold_ms"]}
                found.append(row)
            torch.cuda.empty_cache()
    return found


def sweep(device: str) -> list[dict[str, Any]]:
    """Time against the number of boxes, and 1000 boxes spread out against as many on one object or two."""
    place = _load(device)
    import torch

    bench = _bench(device)
    from workloads import WORKLOADS, proposals

    image = WORKLOADS["infer"].image_size
    counts = (10, 30, 100, 300, 1000, 3000, 10_000, 20_000) if place == "cuda" else (3, 40)
    many = 1000 if place == "cuda" else 40

    def around(objects: int) -> Any:
        """Boxes of the sizes of one object of 96 pixels each, moved by a tenth of that."""
        generator = torch.Generator().manual_seed(0)
        corner = torch.randint(0, 2, (many, 1), generator=generator) % objects * 0.4 * image[0] + 8
        noise = 9.6 * torch.randn(many, 4, generator=generator)
        boxes = torch.cat([corner, corner, corner + 96, corner + 96], 1) + noise
        return boxes.clamp(min=0, max=min(image))

    sets = {f"{count} boxes": proposals(count, image, seed=0) for count in counts}
    sets |= {"on one object": around(1), "on two objects": around(2)}
    found = []
    for layout, dtype in (("nchw", "float32"), ("channels_last", "float16")):
        case = bench.Case("infer", layout, dtype, 1, torch.device(place))
        for name, boxes in sets.items():
            case.boxes = [boxes.to(case.device)]
            for direction, run in bench.runs(case, bench.ours(case)).items():
                run()
                row = {"boxes": name, "layout": layout, "dtype": dtype, "direction": direction}
                if place == "cuda":
                    row |= _times(bench.cuda_clock(run, case), 10)
                found.append(row)
    return found


def measure_suppression(device: str) -> list[dict[str, Any]]:
    """Suppression by ours and torchvision: second stages, and one group whose rows settle turn after turn."""
    place = _load(device)
    import torch
    import torchvision

    from roialign_ext import detection

    bench = _bench(device)
    case = bench.Case("infer", "nchw", "float32", 1, torch.device(place))
    found = []
    for count, classes in ((300, 90), (3000, 90), (4000, 1), (100_000, 1)) if place == "cuda" else ((70, 3), (40, 1)):
        inputs = (*_crowd(count, classes, place), 0.5)
        kept = {}
        for name, suppress in (("ours", detection.batched_nms), ("torchvision", torchvision.ops.batched_nms)):
            run = functools.partial(suppress, *inputs)
            kept[name] = run()
            row = {"boxes": count, "classes": classes, "provider": name, "kept": len(kept[name])}
            calls, kernels = _profiled(run, place)
            row |= calls
            if place == "cuda":
                row |= {"kernels_ms": 1e3 * kernels} | _times(bench.cuda_clock(run, case), 20)
            found.append(row)
        found[-1]["kept_by_ours_too"] = torch.equal(kept["ours"], kept["torchvision"])
    return found


def count_second_stage(device: str) -> dict[str, Any]:
    """Launches and synchronisations of RoIHeads, ours and torchvision's: two images, boxes and masks."""
    place = _load(device)
    import torch

    sys.path.insert(0, str(ROOT / "benchmarks"))
    import bench_second_stage as stage

    problem = stage.Problem(2, torch.device(place))
    found = {}
    for name, library in stage.LIBRARIES.items():
        parts = stage.parts_of(library, stage.second_stage(library).to(place), problem)
        for part in ("training", "inference", "sampling", "postprocessing"):
            parts[part]()
            found[f"{name} {part}"], _ = _profiled(parts[part], place)
    return found


def count_work(device: str) -> list[dict[str, Any]]:
    """What the kernels load and wait for, counted by the emulator on real map sizes with few channels: per RoI and 256
    channels the loads of a warp and their bytes, the share of lanes that idle in them, barriers of a block."""
    _load("emulated")
    import emulation
    import torch

    bench = _bench("")
    from dataclasses import replace

    from workloads import WORKLOADS

    found = []
    for name, layout, dtype in TABLE[:6]:
        work = WORKLOADS[name] = replace(
            WORKLOADS[name], rois_per_image=64, num_images=1, channels=256 if layout == "channels_last" else 64
        )
        case = bench.Case(name, layout, dtype, 1, torch.device("cpu"))
        for direction, run in bench.runs(case, bench.ours(case)).items():
            before = emulation.work()
            run()
            did = {key: count - before[key] for key, count in emulation.work().items()}
            scale = 256 / work.channels / work.rois_per_image
            row = {"workload": name, "layout": layout, "dtype": dtype, "direction": direction}
            row |= {"warp_loads": did["warp_loads"] * scale, "loaded_kb": did["loaded_bytes"] * scale / 1e3}
            row |= {"idle": 1 - did["lane_loads"] / (32 * did["warp_loads"])}
            row |= {"barriers_per_block": did["barriers"] / did["blocks"], "blocks": did["blocks"]}
            found.append(row)
    return found


PARTS = {
    "work": count_work,
    "cases": run_cases,
    "launches": count_launches,
    "graphs": replay_graphs,
    "workloads": measure_workloads,
    "sweeps": sweep,
    "suppression": measure_suppression,
    "second_stage": count_second_stage,
}
