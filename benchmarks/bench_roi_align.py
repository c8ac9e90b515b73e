"""RoI Align, timed: workload x layout x dtype x direction x provider -> table, JSON and plot.

    python benchmarks/bench_roi_align.py --quick
    python benchmarks/bench_roi_align.py --threads 1 2 --dtype float32 bfloat16 --out benchmarks/results
    python benchmarks/bench_roi_align.py --device cuda --workload infer train --out results
    python benchmarks/bench_roi_align.py --redraw results/cpu-2030-01-31.json

A provider is timed only after its values and feature gradients matched `roialign_ext.reference`.
Providers take turns within each round, so that a disturbance of the machine meets all of them;
reported are medians over the rounds. What is timed:

    CPU    wall         seconds per call, torch.utils.benchmark with fixed threads
    CUDA   cold         between two events, after writing over the L2 cache
           warm         between two events, calls back to back
           end_to_end   wall clock from the Python call to the synchronised device

The floor is the memory traffic that no implementation avoids, at the copy bandwidth measured in the
same run. Forward: the distinct map cells that have a weight, read once, and the output, written once.
Backward: the output's gradient, read, and every cell of the maps' gradients, written.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import importlib.util
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from providers import DTYPES, LAYOUTS, PROVIDERS, Pool
from torch import Tensor
from torch.utils.benchmark import Timer
from workloads import SWEEPS, WORKLOADS

import roialign_ext
from roialign_ext import reference
from roialign_ext._library import build_info, release_memory

DIRECTIONS = ("forward", "backward")
KEYS = ("workload", "layout", "dtype", "threads", "direction", "metric")  # of a group of comparable times
# Largest difference over the largest value. float32 is given an ulp of a coordinate of 300 cells,
# which a fused multiply-add may move; the halves one rounding of the result.
TOLERANCE = {"float64": 1e-10, "float32": 3e-5, "float16": 1e-3, "bfloat16": 8e-3}
CHECKED_ROIS = 24  # the reference goes box by box
CALL_SECONDS = 0.02  # short calls are repeated to this length, so that the clock's own cost is lost in it


@dataclass
class Case:
    """One line of the table, up to direction and provider, with its inputs."""

    name: str
    layout: str
    dtype: str
    threads: int
    device: torch.device

    def __post_init__(self) -> None:
        self.workload = WORKLOADS[self.name]
        maps = self.workload.features(dtype=DTYPES[self.dtype], memory_format=LAYOUTS[self.layout])
        self.maps = {name: fmap.to(self.device) for name, fmap in maps.items()}
        self.boxes = [box.to(self.device) for box in self.workload.boxes()]
        self.image_shapes = [self.workload.image_size] * self.workload.num_images

    def leaves(self) -> dict[str, Tensor]:
        return {name: fmap.detach().requires_grad_() for name, fmap in self.maps.items()}

    def __str__(self) -> str:
        return f"{self.name} {self.layout} {self.dtype} {self.threads} thr"


# --- check


class Oracle:
    """The reference's answer to some boxes of a case, small to large."""

    def __init__(self, case: Case) -> None:
        self.case, work = case, case.workload
        image = torch.arange(work.num_images).repeat_interleave(work.rois_per_image)
        boxes = torch.cat(case.boxes).cpu()
        by_area = (boxes[:, 2:] - boxes[:, :2]).prod(1).argsort()
        picks = torch.linspace(0, len(boxes) - 1, min(CHECKED_ROIS, len(boxes))).long()
        self.picked = by_area[picks]
        maps = [fmap.detach().cpu().double().requires_grad_() for fmap in case.maps.values()]
        self.values = reference.multiscale_roi_align(
            maps,
            torch.cat([image[:, None], boxes], 1)[self.picked],
            work.output_size,
            work.spatial_scales,
            work.sampling_ratio,
            work.aligned,
            coordinate_dtype=torch.float64 if case.dtype == "float64" else torch.float32,
        )
        # Only the picked rows have a cotangent: the full call's gradient is then theirs alone.
        generator = torch.Generator().manual_seed(1)
        rows = torch.randn(self.values.shape, generator=generator).to(DTYPES[case.dtype])
        self.cotangent = torch.zeros(len(boxes), *rows.shape[1:], dtype=rows.dtype)
        self.cotangent[self.picked] = rows
        self.gradients = torch.autograd.grad(self.values, maps, rows.double())

    def disagreement(self, pool: Pool) -> float:
        case = self.case
        leaves = case.leaves()
        pooled = pool(leaves, case.boxes)
        gradients: tuple[Tensor, ...] = ()
        if pooled.requires_grad:
            gradients = torch.autograd.grad(pooled, list(leaves.values()), self.cotangent.to(pooled))
        assert pooled.dtype == DTYPES[case.dtype], pooled.dtype
        pairs = [(pooled.detach().cpu()[self.picked], self.values.detach())]
        pairs += [(grad.cpu(), exact) for grad, exact in zip(gradients, self.gradients)]  # none without a backward
        # Gradients are measured against the largest of all levels: one may have got none.
        largest_gradient = max(exact.abs().max().item() for exact in self.gradients)
        largest = [self.values.abs().max().item()] + [largest_gradient] * len(gradients)
        # torch's maximum, unlike Python's, is NaN wherever one is.
        return torch.stack([(a - b).abs().max() / top for (a, b), top in zip(pairs, largest)]).max().item()


# --- clocks


def cpu_clock(run: Callable[[], object], case: Case) -> dict[str, Callable[[], float]]:
    timer = Timer("run()", globals={"run": run}, num_threads=case.threads)
    number = max(1, int(CALL_SECONDS / timer.timeit(1).median))
    return {"wall": lambda: timer.timeit(number).median}


def cuda_clock(run: Callable[[], object], case: Case) -> dict[str, Callable[[], float]]:
    cache = torch.cuda.get_device_properties(case.device).L2_cache_size
    flush = torch.empty(4 * cache, dtype=torch.uint8, device=case.device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def between_events(calls: int) -> float:
        start.record()
        for _ in range(calls):
            run()
        end.record()
        torch.cuda.synchronize(case.device)
        return start.elapsed_time(end) / calls / 1e3

    def cold() -> float:
        flush.zero_()
        return between_events(1)

    def end_to_end() -> float:
        torch.cuda.synchronize(case.device)
        began = time.perf_counter()
        run()
        torch.cuda.synchronize(case.device)
        return time.perf_counter() - began

    for _ in range(5):
        run()
    return {"cold": cold, "warm": lambda: between_events(10), "end_to_end": end_to_end}


def copy_bandwidth(device: torch.device, threads: int) -> float:
    """Bytes read plus bytes written per second, copying 256 MiB."""
    source = torch.ones(64 << 20, device=device)
    target = torch.empty_like(source).fill_(0)
    timer = Timer("target.copy_(source)", globals={"target": target, "source": source}, num_threads=threads)
    return 2 * source.nbytes / min(timer.timeit(5).median for _ in range(5))


def extra_bytes(run: Callable[[], Any], device: torch.device) -> int | None:
    """The most memory held at once beside what a call is given and returns; None where nobody counts.

    Counted during the call, and after its result is freed: ours keeps that memory for the next call.
    """
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def resident(field: str) -> int:
        if device.type == "cuda":
            return torch.cuda.memory_allocated(device) if field == "VmRSS" else torch.cuda.max_memory_allocated(device)
        return next(int(line.split()[1]) << 10 for line in status.read_text().splitlines() if line.startswith(field))

    run()  # what is made once, such as threads and their stacks, is no call's
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif not status.exists():
        return None
    else:
        gc.collect()
        release_memory()
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)  # else the heap of the first call serves the second unseen
        reset.write_text("5")  # the peak starts over
    before = resident("VmRSS")
    result = run()
    returned = sum(x.nbytes for x in (result if isinstance(result, tuple) else [result]))
    during_call = resident("VmHWM") - before - returned
    del result
    return max(during_call, 0 if device.type == "cuda" else release_memory())


def floor_bytes(case: Case) -> dict[str, int]:
    """Traffic of each direction. A cell has a weight where the gradient of one channel is not zero."""
    work = case.workload
    leaves = {n: m.requires_grad_() for n, m in work.features(channels=1).items()}
    pool = roialign_ext.MultiScaleRoIAlign(work.map_names, work.output_size, work.sampling_ratio, aligned=work.aligned)
    pooled = pool(leaves, [box.cpu() for box in case.boxes], case.image_shapes)
    ones = torch.ones_like(pooled)
    cells = sum(g.count_nonzero().item() for g in torch.autograd.grad(pooled, list(leaves.values()), ones))
    per_cell = work.channels * DTYPES[case.dtype].itemsize
    output = pooled.numel() * per_cell
    every_cell = sum(fmap.numel() for fmap in leaves.values())
    return {
        "forward": int(cells) * per_cell + output,
        "backward": every_cell * per_cell + output,
    }


# --- the run


def runs(case: Case, pool: Pool) -> dict[str, Callable[[], object]]:
    """What is timed: direction -> one call of it."""

    def forward() -> Tensor:
        with torch.no_grad():
            return pool(case.maps, case.boxes)

    leaves = case.leaves()
    pooled = pool(leaves, case.boxes)
    if not pooled.requires_grad:
        return {"forward": forward}
    generator = torch.Generator().manual_seed(2)
    cotangent = torch.randn(pooled.shape, generator=generator).to(pooled)
    cotangent = cotangent.contiguous(memory_format=LAYOUTS[case.layout])

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(pooled, list(leaves.values()), cotangent, retain_graph=True)

    return {"forward": forward, "backward": backward}


def measure(case: Case, options: argparse.Namespace, bandwidth: float) -> tuple[list[dict[str, Any]], bool]:
    """Rows of results, and whether every provider matched the reference."""
    torch.set_num_threads(case.threads)
    clock = cuda_clock if case.device.type == "cuda" else cpu_clock
    oracle, all_matched = Oracle(case), True
    differences: dict[str, float] = {}
    extra: dict[tuple[str, str], int | None] = {}
    clocks: dict[tuple[str, str, str], Callable[[], float]] = {}
    for name in options.provider:
        pool = PROVIDERS[name](case)
        if pool is None:
            continue
        differences[name] = oracle.disagreement(pool)
        if not differences[name] <= TOLERANCE[case.dtype]:  # so that NaN fails
            print(f"{case}: {name} is off by {differences[name]:.1e} of the largest value, not timed")
            all_matched = False
            continue
        for direction, run in runs(case, pool).items():
            if direction in options.direction:
                extra[direction, name] = extra_bytes(run, case.device)
                for metric, read in clock(run, case).items():
                    clocks[direction, metric, name] = read

    samples: dict[tuple[str, str, str], list[float]] = {key: [] for key in clocks}
    for round_ in range(options.rounds):
        for key in sorted(clocks, reverse=round_ % 2 == 1):
            samples[key].append(1e3 * clocks[key]())

    floors = floor_bytes(case)
    results = []
    for (direction, metric, name), ms in samples.items():
        what = dict(zip(KEYS, (case.name, case.layout, case.dtype, case.threads, direction, metric)))
        low, median, high = statistics.quantiles(ms, n=4, method="inclusive") if len(ms) > 1 else ms * 3
        times = {"median_ms": median, "quartiles_ms": [low, high], "rounds": len(ms)}
        times |= {"floor_ms": 1e3 * floors[direction] / bandwidth, "floor_bytes": floors[direction]}
        checks = {"off_reference": differences[name], "extra_bytes": extra[direction, name]}
        results.append(what | {"provider": name} | times | checks)
    return results, all_matched


def describe_machine(device: torch.device) -> dict[str, Any]:
    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "date": datetime.date.today().isoformat(),
        "commit": git("rev-parse", "--short", "HEAD"),
        "modified": bool(git("status", "--porcelain", "--untracked-files=no")),
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "roialign_ext": {key: value for key, value in build_info().items() if key != "path"},
    }


# --- table and plot, drawn from the report alone


def machine_line(report: dict[str, Any]) -> str:
    m = report["machine"]
    copies = ", ".join(f"{threads} thr {b / 1e9:.1f} GB/s" for threads, b in report["copy_bandwidth"].items())
    where = f"{m['gpu']} on {m['cpu']}" if m["gpu"] else f"{m['cpu']}, {m['cores']} cores, load {m['load']:.1f}"
    versions = f"torch {m['torch']}, torchvision {m['torchvision']}"
    commit = f"{m['commit']}{' (modified)' if m['modified'] else ''}"
    return f"{where}; copy {copies}; {versions}; {m['date']}, commit {commit}"


def grouped(report: dict[str, Any]) -> dict[tuple[Any, ...], dict[str, dict[str, Any]]]:
    """Values of KEYS -> provider -> row."""
    groups: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in report["results"]:
        groups.setdefault(tuple(row[key] for key in KEYS), {})[row["provider"]] = row
    return groups


def providers_of(report: dict[str, Any]) -> list[str]:
    """Ours first."""
    return sorted({row["provider"] for row in report["results"]}, key=lambda name: (name != "ours", name))


def print_table(report: dict[str, Any]) -> None:
    providers = providers_of(report)
    print(
        f"\n{machine_line(report)}\nmedians in ms; behind each provider its multiple of the first, and the memory\n"
        "that it takes beside inputs and outputs\n"
    )
    print(f"{'case':<62}{'floor':>9}" + "".join(f"{name:>13}{'x':>9}{'MiB':>7}" for name in providers))
    for (*case, threads, direction, metric), rows in grouped(report).items():
        line = f"{' '.join([*case, f'{threads} thr', direction, metric]):<62}"
        line += f"{next(iter(rows.values()))['floor_ms']:9.3f}"
        for name in providers:
            median = rows[name]["median_ms"] if name in rows else float("nan")
            base = rows[providers[0]]["median_ms"] if providers[0] in rows else float("nan")
            extra = rows.get(name, {}).get("extra_bytes")
            line += f"{median:13.3f}{median / base:9.2f}{'' if extra is None else f'{extra / 2**20:.0f}':>7}"
        print(line)


def plot(report: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    if any("=" in row["workload"] for row in report["results"]):
        plot_sweeps(report, path)
    else:
        plot_cases(report, path)


def plot_sweeps(report: dict[str, Any], path: Path) -> None:
    """Time against what is varied, a panel for each sweep and direction."""
    import matplotlib.pyplot as plt

    panels: dict[tuple[str, str], dict[str, dict[float, float]]] = {}
    for row in report["results"]:
        sweep, _, value = row["workload"].partition("=")
        amount = math.prod(int(side) for side in value.split("x"))
        lines = panels.setdefault((sweep, row["direction"]), {})
        lines.setdefault(row["provider"], {})[amount] = row["median_ms"]
        if row["provider"] == "ours":
            lines.setdefault("floor", {})[amount] = row["floor_ms"]
    units = {"rois": "RoIs", "channels": "channels", "map": "image, pixels", "image": "image, pixels"}
    sweeps = list(dict.fromkeys(sweep for sweep, _ in panels))
    figure, axes = plt.subplots(
        len(DIRECTIONS), len(sweeps), figsize=(3.2 * len(sweeps), 6.4), layout="constrained", squeeze=False
    )
    for column, sweep in enumerate(sweeps):
        for row_, direction in enumerate(DIRECTIONS):
            ax = axes[row_, column]
            for name in (*providers_of(report), "floor"):
                line = panels.get((sweep, direction), {}).get(name, {})
                style = {"color": "black", "ls": ":"} if name == "floor" else {"marker": "o", "ms": 4}
                ax.plot(list(line), list(line.values()), label=name, **style)
            ax.set(xscale="log", yscale="log", xlabel=units.get(sweep, "box side, pixels"))
            ax.set_title(f"{direction}, {sweep.replace('_', ' ')}", size=10)
            ax.grid(color="0.92")
            ax.spines[["top", "right"]].set_visible(False)
        axes[0, 0].set_ylabel("ms")
        axes[1, 0].set_ylabel("ms")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=6, frameon=False)
    figure.supxlabel(machine_line(report), size=7)
    figure.savefig(path, dpi=110)


def plot_cases(report: dict[str, Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    groups = {key: rows for key, rows in grouped(report).items() if key[-1] in ("wall", "cold")}
    providers = providers_of(report)
    figure, axes = plt.subplots(figsize=(10, 1.2 + 0.4 * len(groups)), layout="constrained")
    lines = range(len(groups))
    floors = [next(iter(rows.values()))["floor_ms"] for rows in groups.values()]
    axes.scatter(floors, lines, marker="|", s=160, color="black", label="floor: memory traffic at copy speed")
    nothing = {"median_ms": float("nan")}
    medians = {name: [rows.get(name, nothing)["median_ms"] for rows in groups.values()] for name in providers}
    label_heights = {providers[0]: -13, "torchvision": 6, "openvino": -13}  # points; more would lie on each other
    for i, name in enumerate(providers):
        axes.scatter(medians[name], lines, s=60, color=f"C{i}", label=name, zorder=3)
        if name not in label_heights:
            continue
        for line, ms in enumerate(medians[name]):
            text = f"{ms:.3g} ms" if i == 0 else f"{ms / medians[providers[0]][line]:.1f}×"
            place = (0, label_heights[name])
            axes.annotate(text, (ms, line), place, textcoords="offset points", ha="center", size=7.5)
    axes.set_yticks(lines, [" ".join(map(str, [*key[:3], f"{key[3]} thr", key[4]])) for key in groups], size=9)
    axes.set(xscale="log", xlabel="median, ms", ylim=(len(groups) - 0.5, -0.7))
    axes.grid(axis="both", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(providers) + 1, frameon=False)
    figure.supxlabel(machine_line(report), size=6.5)
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    swept = {name for sweep in SWEEPS.values() for name in sweep}
    usual = [name for name in WORKLOADS if name != "many" and name not in swept]
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--workload", nargs="+", choices=WORKLOADS, default=usual, metavar="NAME", help=", ".join(usual)
    )
    parser.add_argument("--sweep", nargs="+", choices=SWEEPS, help="vary one thing instead, nchw unless told")
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=None)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--direction", nargs="+", choices=DIRECTIONS, default=DIRECTIONS)
    parser.add_argument("--provider", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--threads", nargs="+", type=int, default=[torch.get_num_threads()])
    parser.add_argument("--rounds", type=int, help="default: 9 on a CPU, 50 on CUDA")
    parser.add_argument("--quick", action="store_true", help="workload infer, nchw, few rounds")
    parser.add_argument("--out", type=Path, help="folder for the JSON and the plot")
    parser.add_argument("--redraw", type=Path, help="table and plot of this JSON; measures nothing")
    options = parser.parse_args()

    if options.redraw:
        report = json.loads(options.redraw.read_text())
        print_table(report)
        plot(report, options.redraw.with_suffix(".png"))
        return 0

    device = torch.device(options.device)
    if options.sweep:
        options.workload = [name for sweep in options.sweep for name in SWEEPS[sweep]]
    if options.quick:
        options.workload, options.layout = ["infer"], ["nchw"]
    options.layout = options.layout or (["nchw"] if options.sweep else list(LAYOUTS))
    if options.rounds is None:
        options.rounds = 50 if device.type == "cuda" else 9
        options.rounds = 3 if options.quick else options.rounds
    if device.type == "cuda":
        options.threads = options.threads[:1]

    bandwidth = {threads: copy_bandwidth(device, threads) for threads in options.threads}
    report = {"machine": describe_machine(device), "copy_bandwidth": bandwidth, "results": []}
    all_matched = True
    # Dtypes are measured next to each other, because they are compared.
    for name, layout, threads, dtype in itertools.product(
        options.workload, options.layout, options.threads, options.dtype
    ):
        case = Case(name, layout, dtype, threads, device)
        print(case, file=sys.stderr)
        results, matched = measure(case, options, bandwidth[case.threads])
        report["results"] += results
        all_matched &= matched
    print_table(report)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        what = "-sweeps" if options.sweep else ""
        path = options.out / f"{device.type}-{report['machine']['date']}{what}.json"
        path.write_text(json.dumps(report, indent=1) + "\n")
        print(f"\nWritten: {path}")
        if importlib.util.find_spec("matplotlib"):
            plot(report, path.with_suffix(".png"))
            print(f"Drawn: {path.with_suffix('.png')}")
        else:
            print(f"No matplotlib here: draw it with `bench_roi_align.py --redraw {path}`")
    return 0 if all_matched else 1


if __name__ == "__main__":
    sys.exit(main())
