"""The steps of gpu_report.sh, each a process with a time limit and a log; what they measure ends in one JSON."""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 570  # for everything; a machine with a GPU is often lent for ten minutes


@dataclass
class Step:
    """One process."""

    name: str
    command: list[str]
    limit: float  # seconds
    environment: dict[str, str] = field(default_factory=dict)
    needs: str = ""  # why it can't run here; empty if it can
    reads: Callable[[Path], Any] = lambda out: None  # what its files and log add to the report


def steps(out: Path, quick: bool, rehearse: bool) -> list[Step]:
    """Everything to do, the most telling first."""
    python, this, jobs = sys.executable, str(Path(__file__).resolve()), str(os.cpu_count() or 1)
    no_gpu = "a GPU" if rehearse else ""
    device = "emulated" if rehearse else "cuda"
    pytest = [python, "-m", "pytest", "tests", "-q", "-p", "no:cacheprovider"]
    build = {"ROIALIGN_EXT_CUDA": "1", "MAX_JOBS": jobs, **({"TORCH_CUDA_ARCH_LIST": "9.0"} if rehearse else {})}
    required = {} if rehearse else {"ROIALIGN_EXT_REQUIRE_CUDA": "1"}

    def part(name: str, on: str = device) -> list[str]:
        return [python, this, "--part", name, "--device", on, "--out", str(out)]

    def json_of(name: str) -> Callable[[Path], Any]:
        return lambda out: json.loads((out / f"{name}.json").read_text(encoding="utf-8"))

    def summary(name: str) -> Callable[[Path], Any]:
        return lambda out: (out / f"{name}.log").read_text(encoding="utf-8").strip().splitlines()[-1].strip("= ")

    # Rehearsed on a few tests: all of them are what `make test` runs.
    chosen = "TestOrderOfThreads or TestLaunches" if rehearse else "cuda and not test_cuda_static and not test_build"
    plan = [
        Step("build", [python, "setup.py", "build_ext", "--inplace"], 300, build),
        Step("info", [python, "-m", "roialign_ext"], 60, reads=summary("info")),
        Step("tests", [*pytest, "-k", chosen], 240, required, reads=summary("tests")),
    ]
    sanitizer = _compute_sanitizer()
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        command = [sanitizer or "compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        # Only our kernels are watched; torch's own cost time and are not ours to mend.
        command += ["--kernel-name", "kns=roialign", *part("cases")]
        # An allocation for every tensor, so that the end of a tensor is the end of what may be read.
        caching = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        missing = no_gpu or ("" if sanitizer else "compute-sanitizer")
        plan.append(Step(tool, command, 90, caching, missing, summary(tool)))
    if rehearse:
        plan.append(Step("cases", part("cases"), 90, reads=summary("cases")))
    plan += [
        Step("launches", part("launches"), 60, reads=json_of("launches")),
        Step("graphs", part("graphs"), 60, {}, no_gpu, json_of("graphs")),
    ]
    bench = [python, "benchmarks/bench_roi_align.py", "--device", "cpu" if rehearse else "cuda", "--out", str(out)]
    bench += ["--quick"] if quick or rehearse else ["--dtype", "float32", "float16"]
    plan.append(Step("benchmarks", bench, 300, reads=lambda out: [path.name for path in sorted(out.glob("c*-*.json"))]))
    if not quick and not rehearse:
        plan.append(
            Step("slow tests", [*pytest, "-m", "slow", "-k", chosen], 240, required, reads=summary("slow tests"))
        )
    return plan


def _compute_sanitizer() -> str | None:
    nvcc = shutil.which("nvcc")
    beside = [Path(nvcc).resolve().parent, Path(nvcc).resolve().parent.parent / "compute-sanitizer"] if nvcc else []
    home = [Path(os.environ["CUDA_HOME"], "bin")] if os.environ.get("CUDA_HOME") else []
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *map(str, home + beside)])
    return shutil.which("compute-sanitizer", path=path)


def run_step(step: Step, out: Path, seconds_left: float) -> dict[str, Any]:
    """Run one step; say how it went."""
    if step.needs:
        return {"step": step.name, "result": "left out", "why": f"needs {step.needs}"}
    limit = min(step.limit, seconds_left)
    if limit < 5:
        return {"step": step.name, "result": "left out", "why": "no time was left"}
    print(f"==> {step.name}", flush=True)
    start = time.monotonic()
    log = out / f"{step.name}.log"
    with open(log, "w", encoding="utf-8") as file:
        try:
            path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
            environment = {**os.environ, "PYTHONPATH": path, **step.environment}
            done = subprocess.run(
                step.command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=limit, env=environment
            )
            result = "passed" if done.returncode == 0 else f"failed, exit status {done.returncode}"
        except subprocess.TimeoutExpired:
            result = f"failed, not done after {limit:.0f} s"
    record: dict[str, Any] = {"step": step.name, "result": result, "seconds": round(time.monotonic() - start, 1)}
    try:
        record["found"] = step.reads(out)
    except (OSError, ValueError, IndexError) as error:
        record["found"] = f"nothing to read: {error}"
    if result != "passed":
        print("\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-25:]), flush=True)
    return record


def commit() -> dict[str, Any]:
    """The commit, or, where the tree came without its history, that it did."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": git("status", "--porcelain", "-uno").splitlines()}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": os.environ.get("ROIALIGN_EXT_COMMIT", "unknown: no git history here"), "changed": None}


def machine() -> dict[str, Any]:
    """What this runs on."""
    import platform

    import torch

    nvcc = shutil.which("nvcc")
    release = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout if nvcc else ""
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    found: dict[str, Any] = {
        "cpu": cpu[1] if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "nvcc": (re.search(r"V([\d.]+)", release) or [None, None])[1],
        "gpu": None,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
        )
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "driver": driver.stdout.strip(),
        }
    return found


def main() -> int:
    """Run the steps, write the JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON and the logs")
    parser.add_argument("--quick", action="store_true", help="fewest cases")
    parser.add_argument("--rehearse", action="store_true", help="no GPU: run what can be run without one")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if options.part:
        found = PARTS[options.part](options.device)
        (out / f"{options.part}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(found))
        return 0

    start = time.monotonic()
    report: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **commit(),
        "machine": machine(),
        "rehearsal": options.rehearse,
        "quick": options.quick,
        "steps": [],
    }
    if report["machine"]["gpu"] is None and not options.rehearse:
        print("gpu_report: torch.cuda.is_available() is False; --rehearse runs what needs no GPU", file=sys.stderr)
        return 1
    for step in steps(out, options.quick, options.rehearse):
        record = run_step(step, out, SECONDS - (time.monotonic() - start))
        report["steps"].append(record)
        # After every step: what is lost with a machine is the rest.
        (out / "gpu_report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        if step.name == "build" and record["result"] != "passed":
            break

    about = report["machine"]
    print(f"\n{about['gpu'] or 'no GPU'} · {about['cpu']} · torch {about['torch']} · commit {report['commit'][:12]}")
    for record in report["steps"]:
        found = record.get("why") or record.get("found") or ""
        text = found if isinstance(found, str) else json.dumps(found)
        print(f"{record['step']:<12} {record['result']:<12} {record.get('seconds', 0):>6.1f} s  {text[:300]}")
    left_out = [record for record in report["steps"] if record["result"] == "left out"]
    return int(
        any(r["result"] not in ("passed", "left out") for r in report["steps"]) or (left_out and not options.rehearse)
    )


# ---- Parts that run in a process of their own, with the package built


def _load(device: str) -> str:
    """Import what a part needs; the device its tensors live on."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    if device != "emulated":
        return device
    import emulation

    import roialign_ext.ops

    roialign_ext.ops._operators = emulation.load()
    return "cpu"


def run_cases(device: str) -> dict[str, Any]:
    """Small cases forward and backward, for compute-sanitizer to watch; their values are tested elsewhere."""
    place = _load(device)
    import oracles
    import torch
    from cases import CASE, DTYPES, LAYOUTS

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
    if place == "cuda":
        torch.cuda.synchronize()
    return {"forward and backward": count}


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


def count_launches(device: str) -> dict[str, Any]:
    """Launches, copies and synchronisations of a pooler call, ours and torchvision's, by torch's profiler."""
    place = _load(device)
    import torch
    import torchvision
    from torch.profiler import ProfilerActivity, profile

    import roialign_ext

    maps, boxes, shapes = _pyramid(place)
    kinds = {
        "launches": r"^cu(da)?LaunchKernel",
        "copies": r"^cu(da)?Mem(cpy|set)",
        "synchronisations": r"^cu(da)?(Device|Stream|Event|Ctx)Synchronize",
    }

    def counts(run: Callable[[], object]) -> dict[str, int]:
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if place == "cuda" else [])
        with profile(activities=activities, acc_events=True) as profiled:
            run()
        events = profiled.key_averages()
        return {kind: sum(e.count for e in events if re.search(name, e.key)) for kind, name in kinds.items()}

    def pool(ops: Any) -> Any:
        return ops.MultiScaleRoIAlign(list(maps), 7, 2)(maps, boxes, shapes)

    def backward(output: Any) -> None:
        torch.autograd.grad(output, list(maps.values()), weight)

    weight = torch.ones_like(pool(roialign_ext))
    found: dict[str, Any] = {}
    for provider, ops in (("ours", roialign_ext), ("torchvision", torchvision.ops)):
        backward(pool(ops))  # warm up
        output = pool(ops)
        nothing = counts(lambda: None)  # the profiler itself synchronises
        found[f"{provider} forward"] = counts(functools.partial(pool, ops))
        found[f"{provider} backward"] = counts(functools.partial(backward, output))
        for direction in ("forward", "backward"):
            measured = found[f"{provider} {direction}"]
            found[f"{provider} {direction}"] = {kind: n - nothing[kind] for kind, n in measured.items()}
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


PARTS = {"cases": run_cases, "launches": count_launches, "graphs": replay_graphs}


if __name__ == "__main__":
    sys.exit(main())
