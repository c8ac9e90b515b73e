"""What nvcc makes of every kernel: registers, shared and local memory, widths of global accesses. Needs no GPU.

python benchmarks/kernel_resources.py            writes benchmarks/results/kernel_resources.{json,md}
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHS = ("sm_80", "sm_90", "sm_100")


class Unavailable(RuntimeError):
    """A tool that this needs is not on this machine."""


@dataclass
class Kernel:
    """One instantiation of a kernel for one architecture."""

    name: str  # as in the source, with its template arguments: roi_align_forward_kernel<float, float>
    arch: str
    registers: int = 0
    shared_bytes: int = 0
    stack_bytes: int = 0
    spill_bytes: int = 0
    loads: dict[int, int] = field(default_factory=dict)  # bits → instructions that load them from global memory
    stores: dict[int, int] = field(default_factory=dict)
    local_accesses: int = 0


def compile_kernels(archs: tuple[str, ...] = ARCHS) -> list[Kernel]:
    """Compile csrc/cuda for every architecture with the build's own flags and read off what came out."""
    nvcc, flags = _nvcc()
    cuobjdump = _cuobjdump(Path(nvcc).parent)
    jobs = [(source, arch) for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")) for arch in archs]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda job: _inspect(nvcc, cuobjdump, flags, *job), jobs)
    return [kernel for kernels in found for kernel in kernels]


@functools.cache
def _nvcc() -> tuple[str, list[str]]:
    """The build's nvcc and flags."""
    # Loaded by its path: importing the package would compile the extension.
    spec = importlib.util.spec_from_file_location("_build", ROOT / "roialign_ext" / "_build.py")
    build = sys.modules["_build"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    from torch.utils import cpp_extension

    description = build.describe()
    if description.toolkit is None:
        raise Unavailable(description.no_cuda_because)
    folders = [ROOT / "csrc", *cpp_extension.include_paths()]
    flags = ["-std=c++17", *description.nvcc_flags, *(f"-I{folder}" for folder in folders)]
    return str(description.toolkit.home / "bin" / "nvcc"), flags


def _cuobjdump(toolkit: Path) -> str:
    # triton, which torch brings on Linux, has one; a small toolkit may not.
    triton = importlib.util.find_spec("triton")
    folders = [toolkit, Path(triton.origin).parent / "backends" / "nvidia" / "bin" if triton else toolkit]
    found = shutil.which("cuobjdump", path=os.pathsep.join(map(str, folders))) or shutil.which("cuobjdump")
    if found is None:
        raise Unavailable("no cuobjdump in the CUDA toolkit or in triton")
    return found


def _inspect(nvcc: str, cuobjdump: str, flags: list[str], source: Path, arch: str) -> list[Kernel]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = str(Path(folder, "kernels.cubin"))
        command = [nvcc, *flags, f"-arch={arch}", "-Xptxas=-v", "-cubin", str(source), "-o", cubin]
        said = subprocess.run(command, capture_output=True, text=True)
        if said.returncode:
            raise RuntimeError(f"{source.name} does not compile for {arch}:\n{said.stderr}")
        # It looks for nvdisasm on PATH, and that lies beside it.
        path = os.pathsep.join([str(Path(cuobjdump).parent), os.environ.get("PATH", os.defpath)])
        sass = subprocess.run(
            [cuobjdump, "-sass", cubin], capture_output=True, text=True, check=True, env={**os.environ, "PATH": path}
        ).stdout

    kernels: dict[str, Kernel] = {}
    for part in said.stderr.split("Compiling entry function ")[1:]:
        symbol = part.split("'")[1]
        kernel = kernels[symbol] = Kernel(_short_name(symbol), arch)
        kernel.registers = int(re.search(r"Used (\d+) registers", part)[1])
        shared = re.search(r"(\d+) bytes smem", part)
        kernel.shared_bytes = int(shared[1]) if shared else 0
        own = part.split("Function properties for " + symbol)[1]
        stack, stores, loads = re.search(r"(\d+) bytes stack frame, (\d+) \D+, (\d+) ", own).groups()
        kernel.stack_bytes, kernel.spill_bytes = int(stack), int(stores) + int(loads)

    for part in sass.split("Function : ")[1:]:
        if (kernel := kernels.get(part.split()[0])) is None:
            continue
        kernel.loads = _widths(part, "LDG")
        kernel.stores = _widths(part, "STG")
        kernel.local_accesses = len(re.findall(r"\b(?:LDL|STL)\b", part))
    return list(kernels.values())


def _widths(sass: str, instruction: str) -> dict[int, int]:
    # LDG.E.128.CONSTANT R4, ... moves 128 bits; LDG.E.U16 16; LDG.E 32.
    counts: Counter[int] = Counter()
    for suffixes in re.findall(rf"\b{instruction}((?:\.[A-Z0-9_]+)*)\b", sass):
        width = re.search(r"\.[US]?(8|16|64|128|256)(?![0-9])", suffixes)
        counts[int(width[1]) if width else 32] += 1
    return dict(sorted(counts.items()))


@functools.cache
def _short_name(symbol: str) -> str:
    name = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"^void |roialign::(cuda::)?|\(anonymous namespace\)::|c10::", "", name)
    name = re.sub(r"\w+Params<([\w ]+(?:, [\w ]+)?) ?>", r"\1", name)  # what the params are of says it all
    return name.rsplit("(", 1)[0].replace(" >", ">")


def table(kernels: list[Kernel]) -> str:
    """Markdown, one row per kernel, one column group per architecture."""
    archs = sorted({kernel.arch for kernel in kernels}, key=lambda arch: int(arch[3:]))
    by_name: dict[str, dict[str, Kernel]] = {}
    for kernel in kernels:
        by_name.setdefault(kernel.name, {})[kernel.arch] = kernel
    lines = [
        "| kernel | "
        + " | ".join(f"registers, {arch}" for arch in archs)
        + " | shared bytes | load bits | store bits |"
    ]
    lines.append("|---" * (len(archs) + 4) + "|")
    for name, of in sorted(by_name.items()):
        last = of[archs[-1]]
        registers = " | ".join(str(of[arch].registers) for arch in archs)
        widths = " | ".join(" ".join(f"{bits}×{n}" for bits, n in w.items()) for w in (last.loads, last.stores))
        lines.append(f"| `{name}` | {registers} | {last.shared_bytes} | {widths} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Compile, write both files, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the two files")
    out = parser.parse_args().out
    try:
        kernels = compile_kernels()
    except Unavailable as reason:
        raise SystemExit(f"kernel_resources: {reason}") from None
    out.mkdir(parents=True, exist_ok=True)
    release = subprocess.check_output([_nvcc()[0], "--version"], text=True)
    record = {"nvcc": re.search(r"release ([\d.]+), V([\d.]+)", release)[2], "kernels": [asdict(k) for k in kernels]}
    (out / "kernel_resources.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    text = (
        f"Kernels as nvcc {record['nvcc']} compiles them; written by benchmarks/kernel_resources.py. No kernel has a\n"
    )
    text += (
        "stack frame or spills unless it says so below. Loads and stores: bits × instructions on global memory for\n"
    )
    text += f"{ARCHS[-1]}.\n\n{table(kernels)}"
    for k in kernels:
        if k.stack_bytes or k.spill_bytes:
            text += f"\n`{k.name}` on {k.arch}: {k.stack_bytes} bytes of stack, {k.spill_bytes} spilled\n"
    (out / "kernel_resources.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
