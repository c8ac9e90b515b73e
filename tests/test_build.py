"""How the extension is built and found: the search for nvcc, clear refusals, and real installs (slow).

Oracle: the messages and outcomes that README.md and `_build.py` promise. The installs go into throw-away environments
that borrow torch from the running one, and the package is imported from outside the checkout.
"""

import os
import shutil
import site
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

from roialign_ext import _build

ROOT = Path(__file__).resolve().parent.parent


# The search for nvcc.


@pytest.fixture
def no_cuda_on_machine(monkeypatch, tmp_path):
    """Nothing of CUDA in the environment, on PATH (an empty folder) or in site-packages."""
    for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "ROIALIGN_EXT_CUDA", "ROIALIGN_EXT_BUILD"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}")
    monkeypatch.setattr(_build, "_pip_nvidia_dirs", lambda: [])
    monkeypatch.setattr(torch.version, "cuda", "13.0")


def write_command(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def fake_toolkit(home: Path, version: str = "13.0") -> Path:
    """A toolkit whose nvcc answers a dry run as nvcc 13.0 does."""
    major, minor = version.split(".")
    answer = f"""PATH=/usr/bin:/bin
here=$(cd "$(dirname "$0")" && pwd)
echo "#\\$ _HERE_=$here" >&2
echo "#\\$ gcc -D__CUDACC_VER_MAJOR__={major} -D__CUDACC_VER_MINOR__={minor}" >&2"""
    write_command(home / "bin" / "nvcc", answer)
    return home


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_toolkit_named_in_the_environment_comes_first(no_cuda_on_machine, monkeypatch, tmp_path, variable):
    home = fake_toolkit(tmp_path / "cuda", "13.1")
    monkeypatch.setenv("PATH", str(fake_toolkit(tmp_path / "other") / "bin"))
    monkeypatch.setenv(variable, str(home))
    assert _build.find_toolkit("13.0") == _build.Toolkit(home, (13, 1))


def test_wrapper_script_on_path_leads_to_its_toolkit(no_cuda_on_machine, tmp_path):
    home = fake_toolkit(tmp_path / "cuda")
    write_command(tmp_path / "bin" / "nvcc", f'exec {home}/bin/nvcc "$@"')
    assert _build.find_toolkit("13.0") == _build.Toolkit(home, (13, 0))


def test_link_on_path_leads_to_its_toolkit(no_cuda_on_machine, tmp_path):
    home = fake_toolkit(tmp_path / "cuda")
    (tmp_path / "bin" / "nvcc").symlink_to(home / "bin" / "nvcc")
    assert _build.find_toolkit("13.0") == _build.Toolkit(home, (13, 0))


def test_pip_toolkit_is_found_last(no_cuda_on_machine, monkeypatch, tmp_path):
    home = fake_toolkit(tmp_path / "site" / "nvidia" / "cu13")
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert home in _build._pip_nvidia_dirs()
    monkeypatch.setattr(_build, "_nvcc_candidates", lambda: [home / "bin" / "nvcc"])
    assert _build.find_toolkit("13.0") == _build.Toolkit(home, (13, 0))


def test_nvcc_of_another_major_version_is_passed_over(no_cuda_on_machine, monkeypatch, tmp_path):
    old = fake_toolkit(tmp_path / "old", "12.8")
    monkeypatch.setenv("CUDA_HOME", str(old))
    assert _build.find_toolkit("13.0") == f"torch needs nvcc 13.x and {old}/bin/nvcc is of CUDA 12.8"
    new = fake_toolkit(tmp_path / "new")
    monkeypatch.setenv("PATH", str(new / "bin"))
    assert _build.find_toolkit("13.0") == _build.Toolkit(new, (13, 0))


def test_nvcc_that_does_not_run_is_passed_over(no_cuda_on_machine, tmp_path):
    broken = write_command(tmp_path / "bin" / "nvcc", "exit 1")
    assert _build.find_toolkit("13.0") == f"torch needs nvcc 13.x and {broken} does not run"


def test_torch_without_cuda_needs_no_search():
    assert _build.find_toolkit(None) == "this torch was built without CUDA"


# What the variables ask for.


def test_without_nvcc_the_build_is_cpu_only_and_says_why(no_cuda_on_machine):
    description = _build.describe()
    assert description.toolkit is None
    assert not any("cuda" in source for source in description.sources)
    assert f"CPU kernels only for torch {torch.__version__}: no nvcc was found" in description.summary()


def test_cuda_1_without_nvcc_is_refused(no_cuda_on_machine, monkeypatch):
    monkeypatch.setenv("ROIALIGN_EXT_CUDA", "1")
    with pytest.raises(SystemExit, match="ROIALIGN_EXT_CUDA=1 asks for CUDA kernels, but no nvcc was found"):
        _build.setup_options()


def test_cuda_0_leaves_nvcc_alone(no_cuda_on_machine, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(fake_toolkit(tmp_path / "cuda")))
    assert _build.describe().toolkit is not None
    monkeypatch.setenv("ROIALIGN_EXT_CUDA", "0")
    assert _build.describe().summary().endswith(": ROIALIGN_EXT_CUDA=0")


@pytest.mark.parametrize(("variable", "value"), [("ROIALIGN_EXT_CUDA", "yes"), ("ROIALIGN_EXT_BUILD", "later")])
def test_unknown_values_are_refused(no_cuda_on_machine, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(SystemExit, match=f"{variable} must be .*, got '{value}'"):
        _build.setup_options()


@pytest.mark.parametrize(
    ("asked", "visible", "nvcc", "archs"),
    [
        pytest.param("8.6 9.0+PTX", "9.0", "13.0", "8.6;9.0+PTX", id="asked"),
        pytest.param("", "8.6\n8.6\n9.0", "13.0", "8.6;9.0+PTX", id="visible"),
        pytest.param("native", "12.1", "13.0", "12.0+PTX", id="newer minor"),
        pytest.param("", "", "13.0", "8.0;9.0;10.0+PTX", id="default"),
        pytest.param("", "", "12.4", "8.0;9.0+PTX", id="default before Blackwell"),
    ],
)
def test_architectures(no_cuda_on_machine, monkeypatch, tmp_path, asked, visible, nvcc, archs):
    monkeypatch.setattr(torch.version, "cuda", nvcc)
    monkeypatch.setenv("CUDA_HOME", str(fake_toolkit(tmp_path / "cuda", nvcc)))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    write_command(tmp_path / "bin" / "nvidia-smi", f"printf '{visible}\\n'")
    description = _build.describe()
    assert description.cuda_archs == archs
    assert f'-DROIALIGN_EXT_CUDA_ARCHS="{archs}"' in description.cxx_flags


def test_linker_finds_a_runtime_that_has_no_plain_name(no_cuda_on_machine, monkeypatch, tmp_path):
    home = fake_toolkit(tmp_path / "cuda")
    monkeypatch.setenv("CUDA_HOME", str(home))
    for name in ("CUDA_HOME", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # put back after the test
    cpp_extension = pytest.importorskip("torch.utils.cpp_extension")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    with pytest.raises(_build.BuildError, match=r"no libcudart\.so was found"):
        _build._use_toolkit(_build.describe())
    (home / "lib").mkdir()
    (home / "lib" / "libcudart.so.13").touch()
    (folder,) = _build._use_toolkit(_build.describe())
    assert Path(folder, "libcudart.so").resolve() == home / "lib" / "libcudart.so.13"
    assert cpp_extension.CUDA_HOME == str(home)


def test_ninja_is_found_beside_a_python_that_is_not_activated(no_cuda_on_machine, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ninja", None)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / "bin" / "python"))
    assert _build.path_with_ninja() is None
    write_command(tmp_path / "venv" / "bin" / "ninja", "exit 0")
    assert _build.path_with_ninja() == f"{tmp_path}/venv/bin:{os.environ['PATH']}"


# Import works, or says why not and what mends it.


def run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=clean_environment(**environment), capture_output=True, text=True
    )


def clean_environment(**environment: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("ROIALIGN_EXT_")}
    return {**kept, "PYTHONPATH": "", **environment}


def copy_package(folder: Path) -> Path:
    """The package's Python files alone."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "csrc")
    return shutil.copytree(_build.PACKAGE, folder / "roialign_ext", ignore=ignore)


def import_error(folder: Path, **environment: str) -> str:
    """The last line of what a failed import says, without ninja and the hook of an editable install."""
    code = (
        "import sys; sys.modules['ninja'] = None; sys.executable = '/nowhere/python';"
        "sys.meta_path = [finder for finder in sys.meta_path if 'editable' not in str(finder)]; import roialign_ext"
    )
    result = run(sys.executable, "-c", code, cwd=Path("/"), **{"PYTHONPATH": str(folder), **environment})
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: roialign_ext: ")
    return last


def test_broken_compiled_module_is_explained(tmp_path):
    package = copy_package(tmp_path)
    (package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"no library")
    message = import_error(tmp_path)
    assert f"built for another torch than {torch.__version__}" in message
    assert "run `pip install --no-build-isolation .`" in message


@pytest.mark.parametrize(
    ("built", "message"),
    [
        ({"torch": "1.0.0", "version": _build.version()}, "was built for torch 1.0.0, this is"),
        ({"torch": torch.__version__, "version": "0.0.1"}, "is of version 0.0.1, the package of"),
    ],
    ids=["torch", "package"],
)
def test_compiled_module_of_another_version_is_explained(tmp_path, built, message):
    (copy_package(tmp_path) / "_C.py").write_text(f"def build_info(): return {built!r}")
    said = import_error(tmp_path)
    assert message in said
    assert "run `pip install --no-build-isolation .`" in said


def test_neither_module_nor_sources_is_explained(tmp_path):
    copy_package(tmp_path)
    assert "neither a compiled module for this Python nor the sources" in import_error(tmp_path)


def test_missing_ninja_is_explained(tmp_path):
    package = copy_package(tmp_path)
    shutil.copytree(ROOT / "csrc", package / "csrc")
    said = import_error(tmp_path, ROIALIGN_EXT_CUDA="0", PATH="/nowhere", TORCH_EXTENSIONS_DIR=str(tmp_path / "cache"))
    assert "ninja is missing. Run `pip install ninja`" in said


# Real installs.


@pytest.fixture(scope="session")
def cuda(request) -> dict[str, str]:
    """Variables of a build with CUDA where this machine can make one, for one architecture to save time."""
    if isinstance(_build.find_toolkit(torch.version.cuda), str):
        return {"ROIALIGN_EXT_CUDA": "0"}
    return {"ROIALIGN_EXT_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0"}


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of what is built and shipped, so that nothing is written into the real checkout."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    copy_package(folder)
    return folder


@pytest.fixture
def python(tmp_path) -> Path:
    """The interpreter of an empty environment that sees torch, pip and the rest of the running one."""
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    borrowed = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    assert set(site.getsitepackages()) & set(borrowed)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "borrowed.pth").write_text("\n".join(borrowed))
    return environment / "bin" / "python"


def pip(python: Path, *arguments: object, **environment: str) -> str:
    install = [python, "-m", "pip", *arguments, "--no-deps", "--no-build-isolation", "-v"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    result = run(*install, cwd=python.parent, PATH=path, **environment)
    said = result.stdout + result.stderr
    assert result.returncode == 0, said[-10000:]
    return said


def self_check(python: Path, **environment: str) -> subprocess.CompletedProcess:
    """`python -m roialign_ext` where no checkout is near."""
    result = run(python, "-m", "roialign_ext", cwd=python.parent, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "passed" in result.stdout
    return result


def kernels(variables: dict[str, str]) -> str:
    return "CPU and CUDA kernels" if variables["ROIALIGN_EXT_CUDA"] == "1" else "CPU kernels only"


def test_source_archive_carries_the_kernels(checkout, tmp_path):
    result = run(sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path, cwd=checkout, ROIALIGN_EXT_BUILD="jit")
    assert result.returncode == 0, result.stderr
    shutil.unpack_archive(next(tmp_path.glob("*.tar.gz")), tmp_path / "archive")
    (archive,) = (tmp_path / "archive").iterdir()
    for source in (ROOT / "csrc").rglob("*.*"):
        assert (archive / source.relative_to(ROOT)).exists()


@pytest.mark.slow
def test_wheel_is_compiled_ahead_of_time(checkout, python, cuda, tmp_path):
    said = pip(python, "wheel", "-w", tmp_path, checkout, **cuda)
    assert f"roialign_ext: compiling {kernels(cuda)}" in said
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "any" not in wheel.name
    assert f"roialign_ext/_C{sysconfig.get_config_var('EXT_SUFFIX')}" in names
    pip(python, "install", "--ignore-installed", wheel)
    said = self_check(python).stdout
    assert "ahead of time" in said
    assert kernels(cuda) in said
    assert str(python.parent.parent) in said


@pytest.mark.slow
def test_editable_install_reads_the_checkout(checkout, python):
    pip(python, "install", "--ignore-installed", "-e", checkout, ROIALIGN_EXT_CUDA="0")
    said = self_check(python).stdout
    assert "ahead of time" in said
    assert "CPU kernels only" in said
    assert str(checkout) in said


@pytest.mark.slow
def test_pure_wheel_compiles_at_first_import_once(checkout, python, cuda, tmp_path):
    pip(python, "wheel", "-w", tmp_path, checkout, ROIALIGN_EXT_BUILD="jit")
    (wheel,) = tmp_path.glob("*-py3-none-any.whl")
    pip(python, "install", "--ignore-installed", wheel)

    variables = {**cuda, "TORCH_EXTENSIONS_DIR": str(tmp_path / "cache")}
    command = [python, "-m", "roialign_ext"]
    # Two processes import at once: one compiles, the other waits for it, and both work.
    pair = [
        subprocess.Popen(
            command,
            cwd=python.parent,
            env=clean_environment(**variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [process.communicate() for process in pair]
    assert [process.returncode for process in pair] == [0, 0], said
    assert all("just in time" in out and kernels(cuda) in out for out, _ in said)
    assert sum("once, about" in err for _, err in said) == 1
    assert sum("waiting for another process" in err for _, err in said) == 1

    # The next import finds the module compiled and says nothing; so does one from a plain checkout.
    assert self_check(python, **variables).stderr == ""
    assert self_check(python, **variables, PYTHONPATH=str(checkout)).stderr == ""
