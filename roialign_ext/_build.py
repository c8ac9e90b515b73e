"""How the extension is built: its sources, its flags, and whether CUDA is part of it.

Knows neither the package nor the compiled module: setup.py loads this file by its path, before anything is built.
"""

import glob
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent
# A wheel that compiles at import carries the sources in the package, a checkout has them beside it.
CSRC = PACKAGE / "csrc" if (PACKAGE / "csrc").is_dir() else PACKAGE.parent / "csrc"

# Name of the module that is compiled just in time; the one compiled ahead of time is roialign_ext._C.
JIT_MODULE = "roialign_ext_C"

# Without isolation, because the module fits only the torch it was compiled against.
INSTALL_COMMAND = "pip install --no-build-isolation ."
JIT_INSTALL_COMMAND = "ROIALIGN_EXT_BUILD=jit pip install ."


class BuildError(RuntimeError):
    """The extension cannot be built as asked; the message says why."""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: the folder with bin/nvcc, and nvcc's version."""

    home: Path
    version: tuple[int, int]


@dataclass(frozen=True)
class Description:
    """All that decides what the compiler is told, for both ways of building."""

    version: str
    torch: str
    sources: list[str]  # relative to CSRC
    cxx_flags: list[str]
    nvcc_flags: list[str]
    toolkit: Toolkit | None
    cuda_archs: str  # as in TORCH_CUDA_ARCH_LIST; empty without CUDA
    no_cuda_because: str  # empty with CUDA

    def summary(self) -> str:
        """Say in one line what is built, and why no more."""
        if self.toolkit is None:
            return f"CPU kernels only for torch {self.torch}: {self.no_cuda_because}"
        nvcc = ".".join(map(str, self.toolkit.version))
        return (
            f"CPU and CUDA kernels for torch {self.torch}: nvcc {nvcc} in {self.toolkit.home}, "
            f"architectures {self.cuda_archs}"
        )

    def key(self) -> str:
        """Hash of everything the compiled module depends on."""
        digest = hashlib.sha256(f"{self} {sys.implementation.cache_tag} {os.environ.get('CXX')}".encode())
        for name in _files("*.*") + _files("*/*.*"):
            digest.update(name.encode() + b"\0" + (CSRC / name).read_bytes())
        return digest.hexdigest()[:16]


def version() -> str:
    """Version of the package, read without importing it."""
    text = (PACKAGE / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    if match is None:
        raise BuildError(f"{PACKAGE / '__init__.py'} holds no __version__")
    return match[1]


def describe() -> Description:
    """Describe the build for the torch of this process and the compilers of this machine."""
    import torch

    wish = os.environ.get("ROIALIGN_EXT_CUDA", "")
    if wish not in ("", "0", "1"):
        raise BuildError(f"ROIALIGN_EXT_CUDA must be 0 or 1, got {wish!r}")
    found: Toolkit | str = "ROIALIGN_EXT_CUDA=0" if wish == "0" else find_toolkit(torch.version.cuda)
    if wish == "1" and isinstance(found, str):
        raise BuildError(f"ROIALIGN_EXT_CUDA=1 asks for CUDA kernels, but {found}")
    toolkit = found if isinstance(found, Toolkit) else None

    sources = _files("*.cpp") + _files("cpu/*.cpp")
    cxx_flags = ["-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden"]
    # No OpenMP library is named to the linker: the symbols resolve to the one libtorch_cpu.so has brought, so that
    # there is one pool of threads and torch.set_num_threads rules it.
    if torch.backends.openmp.is_available():
        cxx_flags.append("-fopenmp")
    cxx_flags.append(f'-DROIALIGN_EXT_VERSION="{version()}"')
    cuda_archs = ""
    if toolkit is not None:
        cuda_archs = _cuda_archs(str(torch.version.cuda), toolkit)
        sources += _files("cuda/*.cu")
        cxx_flags += ["-DROIALIGN_EXT_WITH_CUDA", f'-DROIALIGN_EXT_CUDA_ARCHS="{cuda_archs}"']
        # Searched after all others, so that these headers complete the toolkit's and never mix with them.
        cxx_flags += [f"-idirafter{folder}" for folder in _extra_cuda_include_dirs(toolkit)]
    return Description(
        version=version(),
        torch=str(torch.__version__),
        sources=sources,
        cxx_flags=cxx_flags,
        nvcc_flags=["-O3", "-Xcompiler", "-fvisibility=hidden"],
        toolkit=toolkit,
        cuda_archs=cuda_archs,
        no_cuda_because=found if isinstance(found, str) else "",
    )


def _files(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(CSRC)) for path in CSRC.glob(pattern))


def find_toolkit(torch_cuda: str | None) -> Toolkit | str:
    """Find an nvcc whose major version is that of `torch_cuda`, else say why there is none.

    Looks in CUDA_HOME and CUDA_PATH, on PATH, then in the packages that pip installs under nvidia/.
    """
    if torch_cuda is None:
        return "this torch was built without CUDA"
    major = torch_cuda.split(".")[0]
    misses = []
    for nvcc in _nvcc_candidates():
        toolkit = _inspect_nvcc(nvcc)
        if toolkit is None:
            misses.append(f"{nvcc} does not run")
        elif str(toolkit.version[0]) != major:
            misses.append(f"{nvcc} is of CUDA {toolkit.version[0]}.{toolkit.version[1]}")
        else:
            return toolkit
    if misses:
        return f"torch needs nvcc {major}.x and {', '.join(misses)}"
    return f"no nvcc was found in CUDA_HOME, on PATH or in pip's nvidia-cuda-nvcc (torch has CUDA {torch_cuda})"


def _nvcc_candidates() -> list[Path]:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    found = [Path(home, "bin", "nvcc") for home in homes]
    on_path = shutil.which("nvcc")
    if on_path is not None:
        found.append(Path(on_path).absolute())
    found += [folder / "bin" / "nvcc" for folder in _pip_nvidia_dirs()]
    return [nvcc for nvcc in dict.fromkeys(found) if nvcc.is_file()]


def _inspect_nvcc(nvcc: Path) -> Toolkit | None:
    # The nvcc on PATH may be a link or a script far from its toolkit, so the compiler itself is asked where it
    # lives. A dry run prints that, and the version, without compiling.
    command = [str(nvcc), "--dryrun", "-x", "cu", os.devnull]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tempfile.gettempdir()).stderr
    except (OSError, subprocess.TimeoutExpired):
        return None
    here = re.search(r"^#\$ _HERE_=(.+)$", said, re.MULTILINE)
    numbers = [re.search(rf"__CUDACC_VER_{part}__=(\d+)", said) for part in ("MAJOR", "MINOR")]
    if here is None or numbers[0] is None or numbers[1] is None:
        return None
    real = Path(here[1].strip(), "nvcc").resolve()
    return Toolkit(real.parent.parent, (int(numbers[0][1]), int(numbers[1][1]))) if real.is_file() else None


def _pip_nvidia_dirs() -> list[Path]:
    # nvidia/cu13 for CUDA 13, one folder per library (nvidia/cuda_nvcc, nvidia/cusparse, ...) for CUDA 12.
    spec = importlib.util.find_spec("nvidia")
    roots = spec.submodule_search_locations if spec and spec.submodule_search_locations else []
    return sorted(Path(folder) for root in roots for folder in glob.glob(f"{glob.escape(root)}/*/"))


def _extra_cuda_include_dirs(toolkit: Toolkit) -> list[Path]:
    # torch adds home/include. A toolkit laid out otherwise (conda's) keeps its headers under targets/, and a minimal
    # one lacks those of the libraries, which torch's own dependencies have brought.
    own = sorted(toolkit.home.glob("targets/*/include"))
    if any((folder / "cusparse.h").exists() for folder in [toolkit.home / "include", *own]):
        return own
    return own + [folder / "include" for folder in _pip_nvidia_dirs() if (folder / "include").is_dir()]


def _cuda_archs(torch_cuda: str, toolkit: Toolkit) -> str:
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip().replace(" ", ";")
    if asked and asked != "native":
        return asked
    # Code for X.0 runs on every X.y; naming X.0 spares asking whether this nvcc has heard of the newest y. Before 10
    # the minors differ enough to be named.
    archs = {(major, minor if major < 10 else 0) for major, minor in _visible_gpus()}
    if not archs:
        # One data-centre GPU per major version, whose code the others of that major run too: 8.0 serves 8.6 and 8.9.
        # PTX of the last serves what comes later. Each further entry adds its share to the compile time of the
        # kernels; 7.5 and older are for TORCH_CUDA_ARCH_LIST to ask for.
        knows_blackwell = min(_pair(torch_cuda), toolkit.version) >= (12, 8)
        archs = {(8, 0), (9, 0)} | ({(10, 0)} if knows_blackwell else set())
    return ";".join(f"{major}.{minor}" for major, minor in sorted(archs)) + "+PTX"


def _visible_gpus() -> list[tuple[int, int]]:
    # Asked of the driver's tool: asking torch would start CUDA in a process that only imports, and it could not fork.
    try:
        said = subprocess.run(
            ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=60,
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [_pair(line) for line in said.splitlines() if re.fullmatch(r"\d+\.\d+", line.strip())]


def _pair(text: str) -> tuple[int, int]:
    major, minor = text.strip().split(".")[:2]
    return int(major), int(minor)


def _use_toolkit(description: Description) -> list[str]:
    """Tell torch's build of the toolkit; return the library folders the linker needs beside torch's own."""
    toolkit = description.toolkit
    if toolkit is None:
        return []
    os.environ["CUDA_HOME"] = str(toolkit.home)
    os.environ["TORCH_CUDA_ARCH_LIST"] = description.cuda_archs
    from torch.utils import cpp_extension

    # Read from the environment once, when cpp_extension was imported, which someone may have done before.
    cpp_extension.CUDA_HOME = str(toolkit.home)

    # torch links with -lcudart. pip's toolkit has libcudart.so.13 alone, without the link that the linker looks for.
    folders = [toolkit.home / "lib64", toolkit.home / "lib", *toolkit.home.glob("targets/*/lib")]
    for folder in folders:
        if (folder / "libcudart.so").exists():
            return [str(folder)]
    for folder in [*folders, *(nvidia / "lib" for nvidia in _pip_nvidia_dirs())]:
        runtimes = sorted(folder.glob(f"libcudart.so.{toolkit.version[0]}*"))
        if runtimes:
            links = tempfile.TemporaryDirectory(prefix="roialign_ext-")
            _kept_until_exit.append(links)
            Path(links.name, "libcudart.so").symlink_to(runtimes[0])
            return [links.name]
    raise BuildError(f"no libcudart.so was found in {toolkit.home} or in pip's nvidia-cuda-runtime")


_kept_until_exit: list[tempfile.TemporaryDirectory[str]] = []


def setup_options() -> dict[str, Any]:
    """Arguments for setuptools.setup, by ROIALIGN_EXT_BUILD: `aot` (the default) or `jit`."""
    way = os.environ.get("ROIALIGN_EXT_BUILD", "") or "aot"
    if way not in ("aot", "jit"):
        raise SystemExit(f"roialign_ext: ROIALIGN_EXT_BUILD must be aot or jit, got {way!r}")
    if way == "jit":
        return _jit_options()
    if importlib.util.find_spec("torch") is None:
        return _no_torch_options()
    try:
        return _aot_options(describe())
    except BuildError as error:
        raise SystemExit(f"roialign_ext: {error}") from None


def _aot_options(description: Description) -> dict[str, Any]:
    os.environ["PATH"] = path_with_ninja() or os.environ.get("PATH", os.defpath)
    library_dirs = _use_toolkit(description)
    from torch.utils import cpp_extension

    class BuildExtension(cpp_extension.BuildExtension):
        def build_extensions(self) -> None:
            print(f"roialign_ext: compiling {description.summary()}", file=sys.stderr, flush=True)
            super().build_extensions()

    extension_type = cpp_extension.CppExtension if description.toolkit is None else cpp_extension.CUDAExtension
    extension = extension_type(
        "roialign_ext._C",
        [os.path.relpath(CSRC / source, PACKAGE.parent) for source in description.sources],
        include_dirs=[str(CSRC)],
        library_dirs=library_dirs,
        extra_compile_args={"cxx": description.cxx_flags, "nvcc": description.nvcc_flags},
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


def _jit_options() -> dict[str, Any]:
    from setuptools.command.build_py import build_py

    class BuildWithSources(build_py):
        def run(self) -> None:
            super().run()
            if not self.editable_mode:
                shutil.copytree(CSRC, Path(self.build_lib, "roialign_ext", "csrc"), dirs_exist_ok=True)

    return {"cmdclass": {"build_py": BuildWithSources}}


def _no_torch_options() -> dict[str, Any]:
    # Metadata and source archives need no torch; only compiling does, and says so.
    from setuptools import Extension
    from setuptools.command.build_ext import build_ext

    class NeedsTorch(build_ext):
        def run(self) -> None:
            raise SystemExit(
                "roialign_ext: compiling needs torch, which is not in this environment. Install it first, then "
                f"`pip install --no-build-isolation .`; or compile at first import: `{JIT_INSTALL_COMMAND}`"
            )

    return {"ext_modules": [Extension("roialign_ext._C", [])], "cmdclass": {"build_ext": NeedsTorch}}


def compile_into(directory: str) -> None:
    """Compile JIT_MODULE into `directory`. Changes os.environ: call it in a process of its own."""
    description = describe()
    library_dirs = _use_toolkit(description)
    from torch.utils import cpp_extension

    cpp_extension.load(
        JIT_MODULE,
        [str(CSRC / source) for source in description.sources],
        # These pass through a shell, those of the ahead-of-time build do not.
        extra_cflags=[shlex.quote(flag) for flag in description.cxx_flags],
        extra_cuda_cflags=description.nvcc_flags,
        extra_ldflags=[shlex.quote(f"-L{folder}") for folder in library_dirs],
        extra_include_paths=[str(CSRC)],
        build_directory=directory,
        with_cuda=description.toolkit is not None,
    )


def path_with_ninja() -> str | None:
    """PATH with a folder on it that has `ninja`, or None where it is not installed."""
    path = os.environ.get("PATH", os.defpath)
    # An environment that is not activated keeps its commands beside its python.
    folders = [os.path.dirname(sys.executable)]
    if importlib.util.find_spec("ninja") is not None:
        import ninja

        folders.append(ninja.BIN_DIR)
    for candidate in [path, *(os.pathsep.join([folder, path]) for folder in folders)]:
        if shutil.which("ninja", path=candidate) is not None:
            return candidate
    return None
