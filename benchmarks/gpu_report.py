"""The steps of gpu_report.sh, each a process with a time limit and a log; what they measure ends in one JSON."""

from __future__ import annotations

import argparse
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

import gpu_parts

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
        plan.append(Step("work", part("work"), 120, reads=json_of("work")))
    plan += [
        Step("launches", part("launches"), 60, reads=json_of("launches")),
        Step("graphs", part("graphs"), 60, {}, no_gpu, json_of("graphs")),
        Step("workloads", part("workloads"), 150, reads=json_of("workloads")),
        Step("sweeps", part("sweeps"), 60, reads=json_of("sweeps")),
        Step("suppression", part("suppression"), 60, reads=json_of("suppression")),
        Step("second stage", part("second_stage"), 60, {}, no_gpu, json_of("second_stage")),
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
    parser.add_argument("--part", choices=gpu_parts.PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if options.part:
        found = gpu_parts.PARTS[options.part](options.device)
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


if __name__ == "__main__":
    sys.exit(main())
