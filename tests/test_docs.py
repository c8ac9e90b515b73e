"""The examples of README.md and docs/ run, and print what the text beside them says.

Blocks of a page share their names, top to bottom. A block `python cuda` needs a GPU.
"""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SLOW = {"compile.md", "export.md"}  # they call a compiler


def blocks_of(page: str) -> list[tuple[str, str]]:
    """Language and code of every fenced block."""
    return re.findall(r"^```(\w[\w ]*)\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)


def pages() -> list:
    found = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    marks = [[pytest.mark.slow] if path.name in SLOW else [] for path in found]
    return [pytest.param(path, id=path.name, marks=mark) for path, mark in zip(found, marks)]


@pytest.fixture
def compiler_options():
    """Options that an example sets are unset after it."""
    with torch._dynamo.config.patch(capture_scalar_outputs=False, capture_dynamic_output_shape_ops=False):
        yield


@pytest.mark.parametrize("path", pages())
def test_examples_run_and_print_what_they_say(path, compiler_options, tmp_path, monkeypatch):
    """Oracle: the asserts in the examples, and the `text` blocks after them."""
    if not path.exists():
        pytest.skip("no documents beside the tests")
    page = path.read_text()
    if path.name == "export.md":
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
        pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "__main__"}
    printed, ran = io.StringIO(), 0
    for language, code in blocks_of(page):
        if language == "python" or (language == "python cuda" and torch.cuda.is_available()):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(code, str(path), "exec"), names)
            ran += 1
        elif language == "text":
            assert printed.getvalue() == code
    assert ran > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="the blocks run above")
def test_examples_for_a_gpu_are_python():
    """Oracle: the compiler."""
    codes = [
        code for path in (ROOT / "docs").glob("*.md") for kind, code in blocks_of(path.read_text()) if "cuda" in kind
    ]
    assert codes
    for code in codes:
        compile(code, "docs", "exec")
