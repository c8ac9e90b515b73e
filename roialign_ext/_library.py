"""Finds the compiled module, else compiles it, else explains. Importing this registers the operators.

Knows nothing of what the operators compute.
"""

from __future__ import annotations

import fcntl
import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from . import _build


def build_info() -> dict[str, Any]:
    """Say what was built and how.

    Returns `version`, `torch` and `cuda` (versions compiled against; `cuda` is None in a CPU build), `cuda_archs`,
    `compiler`, `cpu_capability`, `build` ("ahead of time" or "just in time") and `path` of the compiled module.
    """
    build = "just in time" if _module.__name__ == _build.JIT_MODULE else "ahead of time"
    return {**_module.build_info(), "build": build, "path": _module.__file__}


def launch_count() -> int:
    """Number of CUDA kernels this process has launched so far."""
    return int(_module.launch_count())


def is_transformed() -> bool:
    """Whether transforms of torch.func or forward-mode derivatives are at work."""
    return bool(_module.is_transformed())


def has_forward_derivatives() -> bool:
    """Whether forward-mode derivatives are at work, of torch.func or not."""
    return bool(_module.has_forward_derivatives())


def set_cpu_capability(name: str) -> bool:
    """Run the CPU kernels with the instruction set "baseline", "avx2" or "avx512"; False if it cannot be had."""
    return bool(_module.set_cpu_capability(name))


def release_memory() -> int:
    """Free the memory of a CPU output that is kept for the next call, of 50 MiB at most; returns its bytes."""
    return int(_module.release_memory())


def _load() -> ModuleType:
    if importlib.util.find_spec("roialign_ext._C") is not None:
        return _load_ahead_of_time()
    if not _build.CSRC.is_dir():
        raise ImportError(
            f"roialign_ext: {_build.PACKAGE} holds neither a compiled module for this Python nor the sources to "
            f"compile one. In a checkout of roialign_ext run `{_build.INSTALL_COMMAND}`"
        )
    return _load_just_in_time()


def _load_ahead_of_time() -> ModuleType:
    mend = f"In a checkout of roialign_ext run `{_build.INSTALL_COMMAND}`"
    try:
        module = importlib.import_module("roialign_ext._C")
    except (ImportError, OSError) as error:
        raise ImportError(
            f"roialign_ext: the compiled module does not load, most likely because it was built for another torch "
            f"than {torch.__version__}: {error}. {mend}"
        ) from error
    info = module.build_info()
    # torch keeps its binary interface within a minor version only, and a mismatch may load and then crash.
    if info["torch"].split(".")[:2] != torch.__version__.split(".")[:2]:
        raise ImportError(
            f"roialign_ext: the compiled module was built for torch {info['torch']}, this is {torch.__version__}. "
            f"{mend}"
        )
    if info["version"] != _build.version():
        raise ImportError(
            f"roialign_ext: the compiled module is of version {info['version']}, the package of {_build.version()}. "
            f"{mend}"
        )
    return module


def _load_just_in_time() -> ModuleType:
    try:
        description = _build.describe()
        directory = _cache() / f"roialign_ext-{description.version}-{description.key()}"
        complete = directory / "complete"
        if not complete.exists():
            directory.mkdir(parents=True, exist_ok=True)
            with open(directory / "lock.roialign_ext", "w") as lock:
                _wait_for(lock)
                if not complete.exists():
                    _compile(description, directory)
                    complete.touch()
        return _import_file(directory / f"{_build.JIT_MODULE}.so")
    except (_build.BuildError, OSError) as error:
        raise ImportError(f"roialign_ext: cannot compile at import: {error}") from error


def _cache() -> Path:
    # Where torch keeps compiled extensions, and movable by the same variable.
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if root:
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"


def _wait_for(lock: Any) -> None:
    # A lock on the open file ends with its process, however that ends; torch's own is a file that may stay behind.
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _say("waiting for another process that is compiling the same kernels")
        fcntl.flock(lock, fcntl.LOCK_EX)


def _compile(description: _build.Description, directory: Path) -> None:
    path = _build.path_with_ninja()
    if path is None:
        raise _build.BuildError(
            f"ninja is missing. Run `pip install ninja`, or build ahead: `{_build.INSTALL_COMMAND}`"
        )
    minutes = "a minute" if description.toolkit is None else "3 minutes"
    _say(f"compiling {description.summary()} (once, about {minutes}; cached in {directory})")
    (directory / "lock").unlink(missing_ok=True)  # torch's, of a process that was killed

    # In a process of its own: what torch's builder reads from the environment at import is then still to be set,
    # and nothing of it is left here.
    code = (
        "import sys; from importlib import util; spec = util.spec_from_file_location('_build', sys.argv[1]);"
        "build = util.module_from_spec(spec); spec.loader.exec_module(build); build.compile_into(sys.argv[2])"
    )
    command = [sys.executable, "-c", code, str(_build.__file__), str(directory)]
    environment = {**os.environ, "PATH": path, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    log = directory / "build.log"
    with open(log, "w") as output:
        status = subprocess.run(command, cwd=directory, env=environment, stdout=output, stderr=output).returncode
    if status != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
        raise _build.BuildError(
            f"the build failed (it needs a C++ compiler and Python headers). All of it is in {log}; its end:\n{tail}"
        )


def _import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(_build.JIT_MODULE, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _say(line: str) -> None:
    print(f"roialign_ext: {line}", file=sys.stderr, flush=True)


_module = _load()
