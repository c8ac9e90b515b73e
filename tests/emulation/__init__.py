"""Builds csrc/ with g++ and cuda_emulation.h in nvcc's place, and loads it: CUDA kernels on CPU tensors.

Every object is cached under build/emulation by the hash of all that goes into it, so a changed kernel costs seconds
and an unchanged tree nothing. Two variables choose another build for a whole run of pytest:
ROIALIGN_EXT_EMULATION_SANITIZE=1 one under AddressSanitizer and UndefinedBehaviorSanitizer (start it in the
environment that `sanitizer_environment` returns), ROIALIGN_EXT_EMULATION_SOURCES one of another copy of csrc/.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import re
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import torch

EMULATION = Path(__file__).resolve().parent
ROOT = EMULATION.parent.parent
TORCH = Path(torch.__file__).resolve().parent
NAME = "roialign_ext_emulated"  # of the module, and of the operators' namespace

CXX = os.environ.get("CXX", "g++")
FLAGS = [
    *("-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique"),
    # Kernels load 16 bytes of halves at once, which nvcc allows. No fused multiply-adds: see geometry.h.
    *("-fno-strict-aliasing", "-ffp-contract=off"),
    *("-Wall", "-Wno-unknown-pragmas", "-Wno-sign-compare"),
    # As nvcc includes cuda_runtime.h, asked or not.
    *("-DROIALIGN_EXT_EMULATED", "-include", "cuda_emulation.h"),
]
# A cast of a number that the integer can't hold is not in `undefined`; it is how NaN becomes an address.
SANITIZE = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


def load(sanitize: bool | None = None, sources_dir: str | Path | None = None):
    """The operators of the emulated build, torch.ops.roialign_ext_emulated; a process can hold one build of them."""
    module(sanitize, sources_dir)
    return getattr(torch.ops, NAME)


def launch_count(sanitize: bool | None = None, sources_dir: str | Path | None = None) -> int:
    """Kernels that the emulated build has launched so far."""
    return module(sanitize, sources_dir).launch_count()


def work(library: str | Path | None = None) -> dict[str, int]:
    """What the kernels of a library, by default the emulated build, have done so far."""
    names = ("lane_loads", "warp_loads", "loaded_bytes", "barriers", "blocks")
    counts = (ctypes.c_uint64 * len(names))()
    ctypes.CDLL(str(library or module().__file__)).emulation_work(counts)
    return dict(zip(names, counts))


@contextlib.contextmanager
def stream(number: int) -> Iterator[None]:
    """Stands for torch.cuda.stream, a stream being a number: a launch on another one fails."""
    library = ctypes.CDLL(str(module().__file__))
    library.emulation_set_stream(ctypes.c_void_p(number))
    try:
        yield
    finally:
        library.emulation_set_stream(None)


@contextlib.contextmanager
def capture() -> Iterator[Callable[[], None]]:
    """Stands for torch.cuda.graph: kernels launched inside run when what it yields is called, each time it is.

    Tensors that they read or write must be kept, which on a GPU the graph's memory pool does.
    """
    library = ctypes.CDLL(str(module().__file__))
    library.emulation_begin_capture()
    try:
        yield library.emulation_replay
    finally:
        library.emulation_end_capture()


@functools.cache
def module(sanitize: bool | None = None, sources_dir: str | Path | None = None) -> ModuleType:
    """The emulated build's Python module."""
    path = build(sanitize, sources_dir)
    loader = importlib.machinery.ExtensionFileLoader(NAME, str(path))
    loaded = importlib.util.module_from_spec(importlib.util.spec_from_loader(NAME, loader))
    loader.exec_module(loaded)
    return loaded


def build(sanitize: bool | None = None, sources_dir: str | Path | None = None) -> Path:
    """Compile what has changed; return the module's path."""
    if sanitize is None:
        sanitize = os.environ.get("ROIALIGN_EXT_EMULATION_SANITIZE") == "1"
    csrc = Path(sources_dir or os.environ.get("ROIALIGN_EXT_EMULATION_SOURCES") or ROOT / "csrc").resolve()
    kernel_flags = FLAGS + (SANITIZE if sanitize else [])
    ops_flags = [*FLAGS, f"-DTORCH_EXTENSION_NAME={NAME}", '-DROIALIGN_EXT_VERSION="emulated"']
    # Sanitizers watch the kernels; ops.cpp, the slowest to compile, serves both builds.
    jobs = [(csrc / "ops.cpp", ops_flags)]
    jobs += [(source, kernel_flags) for source in sorted(csrc.glob("cuda/*.cu"))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda job: compile_object(*job, csrc), jobs))
    libraries = [f"-L{TORCH / 'lib'}", "-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python", "-ldl"]
    return link(NAME, objects, [*(SANITIZE if sanitize else []), *libraries])


def compile_object(source: Path, flags: list[str], csrc: Path) -> Path:
    """Compile one source; its object is named after the hash of the command and of every local file it includes."""
    includes = [EMULATION, csrc, csrc / "cuda"]
    headers = TORCH / "include"
    system = [sysconfig.get_paths()["include"], str(headers), str(headers / "torch" / "csrc" / "api" / "include")]
    digest = hashlib.sha256(repr((_compiler(), torch.__version__, flags, system)).encode())
    for file in _with_includes([EMULATION / "cuda_emulation.h", source], includes):
        digest.update(file.read_bytes())
    command = [CXX, *flags, *(f"-I{path}" for path in includes), *(f"-isystem{path}" for path in system)]
    return _cached(
        f"{source.stem}-{digest.hexdigest()[:16]}.o", [*command, "-x", "c++", "-c", str(source), "-o"], source.name
    )


def link(name: str, objects: list[Path], flags: list[str]) -> Path:
    """Link a shared library of objects and flags."""
    key = hashlib.sha256(repr(([path.name for path in objects], flags)).encode()).hexdigest()[:16]
    return _cached(f"{name}-{key}.so", [CXX, "-shared", *map(str, objects), *flags, "-o"], name)


def sanitizer_environment() -> dict[str, str]:
    """The environment in which python can load a sanitized build: the sanitizer must be there before python is."""
    # libstdc++ beside it, or the sanitizer finds nobody to hand C++ exceptions on to.
    preload = [subprocess.check_output([CXX, f"-print-file-name={lib}"], text=True).strip() for lib in _PRELOADED]
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(preload),
        # Python never frees what lives until its end.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "ROIALIGN_EXT_EMULATION_SANITIZE": "1",
    }


_PRELOADED = ("libasan.so", "libstdc++.so")


@functools.cache
def _compiler() -> str:
    return subprocess.check_output([CXX, "--version"], text=True)


def _with_includes(files: list[Path], folders: list[Path]) -> list[Path]:
    found, pending = [], [*files]
    while pending:
        file = pending.pop()
        if file in found:
            continue
        found.append(file)
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', file.read_text(encoding="utf-8"), re.MULTILINE):
            pending += [path for folder in [file.parent, *folders] if (path := folder / name).is_file()][:1]
    return found


def _cached(name: str, command: list[str], what: str) -> Path:
    path = ROOT / "build" / "emulation" / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{os.getpid()}-{name}")
        # A preloaded sanitizer is for this process, not for the compiler.
        environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        done = subprocess.run([*command, str(partial)], capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError(f"{what} does not build for emulation:\n{done.stderr}")
        partial.replace(path)  # Whole or not at all, whoever else is building.
    return path
