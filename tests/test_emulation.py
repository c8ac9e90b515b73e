"""The emulated device: that it runs CUDA as CUDA is defined, and that it and the tests notice a kernel that is wrong.

The table of cases runs on it in the other files, as on any device.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import oracles
import pytest
import torch
from cases import CASE, GRADIENTS, LAYOUTS, VALUES
from torch import Tensor

import roialign_ext
from roialign_ext import detection

emulation = pytest.importorskip("emulation", reason="no tests/emulation beside the tests")

TESTS = Path(__file__).resolve().parent
EMULATED = pytest.mark.parametrize("device_name", ["emulated"], indirect=True)
CUDA_KERNELS = pytest.mark.parametrize("device_name", ["emulated", "cuda"], indirect=True)
LAYOUT = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


def self_check(sanitize: bool = False) -> Path:
    """The library of small kernels."""
    flags = emulation.SANITIZE if sanitize else []
    source = emulation.EMULATION / "self_check.cu"
    compiled = emulation.compile_object(source, emulation.FLAGS + flags, emulation.EMULATION)
    return emulation.link("self_check", [compiled], [*flags, "-ldl"])


@pytest.fixture(scope="module")
def run() -> Callable[..., tuple[str, Tensor]]:
    """Runs a small kernel by name."""
    check = ctypes.CDLL(str(self_check())).self_check
    check.restype = ctypes.c_char_p

    def run(name: str, values: Tensor | None = None, size: int = 1) -> tuple[str, Tensor]:
        values = torch.zeros(64) if values is None else values
        output = torch.full((size,), -7.0)
        error = check(name.encode(), ctypes.c_void_p(values.data_ptr()), ctypes.c_void_p(output.data_ptr()))
        return (error or b"").decode(), output

    return run


class TestTheEmulator:
    """Kernels of a few lines; oracles by eye."""

    SUMMANDS = torch.arange(64 * 256).remainder(97).float()

    @pytest.mark.parametrize("seed", ["0", "1", "2"])
    def test_barriers_order_shared_memory(self, run, seed, monkeypatch):
        monkeypatch.setenv("ROIALIGN_EXT_EMULATION_SEED", seed)
        error, sums = run("block_sum", self.SUMMANDS, 64)
        assert not error and sums.tolist() == self.SUMMANDS.view(64, 256).sum(1).tolist()

    @pytest.mark.parametrize("seed", ["0", "1", "2"])
    def test_a_missing_barrier_shows(self, run, seed, monkeypatch):
        monkeypatch.setenv("ROIALIGN_EXT_EMULATION_SEED", seed)
        error, sums = run("block_sum_without_barrier", self.SUMMANDS, 64)
        assert not error and (sums != self.SUMMANDS.view(64, 256).sum(1)).sum() > 32

    def test_work_is_counted(self, run):
        before = emulation.work(self_check())
        run("block_sum", self.SUMMANDS, 64)
        counts = {name: count - before[name] for name, count in emulation.work(self_check()).items()}
        assert counts["lane_loads"] == 64 * 256 and counts["loaded_bytes"] == 4 * 64 * 256
        assert counts["warp_loads"] == 64 * 8 and counts["barriers"] == 64 * 8 and counts["blocks"] == 64

    def test_a_missing_warp_barrier_shows(self, run):
        lanes = torch.arange(32.0)
        assert run("neighbour", lanes, 32)[1].tolist() == lanes.roll(-1).tolist()
        assert run("neighbour_without_barrier", lanes, 32)[1].isnan().any()

    def test_collectives(self, run):
        lane = torch.arange(32)
        error, output = run("collectives", lane.float(), 320)
        expected = [
            torch.full((32,), 3),
            lane // 8 * 8 + 3,
            torch.where(lane < 2, lane, lane - 2),
            torch.where(lane % 16 < 14, lane + 2, lane),
            lane ^ 5,
            (lane + 2) // 3,
            torch.ones(32),
            lane % 5,
            torch.where(lane < 16, lane ^ 1, torch.nan),
            torch.full((32,), 10 + 100),
        ]
        assert not error
        torch.testing.assert_close(output.view(10, 32), torch.stack([row.float() for row in expected]), equal_nan=True)

    def test_indices_of_threads_and_blocks(self, run):
        error, output = run("indices", size=12 * 30)
        assert not error and output.tolist() == list(range(12 * 30))

    def test_shared_memory_of_a_new_block_is_nan(self, run):
        error, output = run("uninitialised", size=100)
        assert not error and output.tolist() == [1.0] * 100

    @pytest.mark.parametrize(
        "kernel, complaint",
        [
            (
                "barrier_after_exit",
                r"not all threads reach:\n  threads 0-4 6-63: __sync.*\n  threads 5: exited",
            ),
            ("two_barriers", r"not all threads reach:\n  threads 0-31: __syncthreads at .*\n  threads 32-63: __sync"),
            ("missing_lane", r"not all lanes .*\n  threads 0-8 10-31: __syncwarp at .* with mask 0xffffffff\n"),
            ("foreign_mask", r"lane \d+ calls __ballot_sync at .* with a mask that does not name it"),
        ],
    )
    def test_a_barrier_that_not_all_reach_names_the_kernel(self, run, kernel, complaint):
        error, _ = run(kernel)
        assert f"{kernel}_kernel" in error.splitlines()[0]
        assert re.search(complaint, error)
        # Nothing of it is left for the next launch.
        assert not run("block_sum", self.SUMMANDS, 64)[0]

    def test_a_block_that_no_gpu_takes_is_refused(self, run):
        assert run("too_large_a_block")[0] == "invalid configuration argument"

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "kernel, complaint",
        [
            ("past_the_end", "AddressSanitizer: heap-buffer-overflow"),
            ("past_shared", "out of bounds for type 'float"),
            ("misaligned", "misaligned address"),
            ("cast_of_nan", "outside the range of representable values"),
        ],
    )
    def test_sanitizers_see_into_kernels(self, kernel, complaint):
        code = (
            "import ctypes, math, sys; floats = ctypes.c_float * 32;"
            "ctypes.CDLL(sys.argv[1]).self_check(sys.argv[2].encode(), floats(*[math.nan] * 32), floats())"
        )
        command = [sys.executable, "-c", code, str(self_check(sanitize=True)), kernel]
        environment = {**emulation.sanitizer_environment(), "PYTHONMALLOC": "malloc"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode != 0
        assert complaint in done.stderr and f"{kernel}_kernel" in done.stderr


class TestLaunches:
    """The launcher counts: the whole pyramid is one launch each way."""

    @pytest.fixture
    def launches(self, device_name) -> Callable[[], int]:
        from roialign_ext import _library

        return emulation.launch_count if device_name == "emulated" else _library.launch_count

    @LAYOUT
    @pytest.mark.parametrize("name", ["levels-5", "output-14x14", "channels-257", "bins-far-larger-than-samples"])
    @CUDA_KERNELS
    def test_one_forward_and_one_backward(self, name, layout, device, launches):
        case = CASE[name]
        features = LAYOUTS[layout]([f.to(device) for f in case.features(torch.float32)])
        inputs = [f.detach().requires_grad_() for f in features]
        start = launches()
        output = oracles.pool(case, inputs)
        assert launches() - start == 1
        output.backward(torch.randn_like(output))
        assert launches() - start == 2

    @CUDA_KERNELS
    def test_none_for_empty_work(self, device, launches):
        start = launches()
        for images, channels, boxes in [(1, 3, 0), (0, 3, 0), (1, 0, 2)]:
            features = torch.zeros(images, channels, 8, 8, device=device, requires_grad=True)
            rows = torch.tensor([[0.0, 1, 1, 5, 5]] * boxes).reshape(-1, 5).to(device)
            roialign_ext.roi_align(features, rows, 2).sum().backward()
        assert launches() == start

    @CUDA_KERNELS
    def test_one_for_assign_levels(self, device, launches):
        start = launches()
        roialign_ext.assign_levels(torch.rand(1000, 4).to(device), 4)
        assert launches() - start == 1

    @pytest.mark.parametrize("count", [0, 1, 300])
    @CUDA_KERNELS
    def test_one_for_suppression(self, count, device, launches):
        start = launches()
        detection.batched_nms(
            torch.rand(count, 4).to(device), torch.rand(count).to(device), torch.arange(count).to(device) % 7, 0.5
        )
        assert launches() - start == min(count, 1)

    @LAYOUT
    @EMULATED
    def test_all_go_to_the_current_stream(self, layout, device, launches):
        case, start = CASE["levels-3"], launches()
        rows = case.rows().requires_grad_()
        with emulation.stream(7):
            features = [f.requires_grad_() for f in LAYOUTS[layout](case.features(torch.float32))]
            for mode in ("avg", "max"):
                output = oracles.pool(case, features, rows, mode=mode)
                weight = torch.randn_like(output).requires_grad_()
                gradients = torch.autograd.grad(output, [rows, *features], weight, create_graph=True)
                torch.autograd.grad(gradients[1:], weight, features)
                if mode == "avg":
                    torch.autograd.grad(gradients[0], weight, rows)
            roialign_ext.assign_levels(rows.detach(), 3)
            detection.nms(rows.detach()[:, 1:], torch.rand(len(rows)), 0.5)
        # Forward, both gradients and the two of the maps' gradient, twice; that of the boxes' gradient; the last two.
        assert launches() - start == 2 * 5 + 1 + 2

    @LAYOUT
    @CUDA_KERNELS
    def test_gradients_are_not_filled_with_zeros_first(self, layout, device):
        case = CASE["levels-of-which-one-is-empty"]
        features = LAYOUTS[layout]([f.to(device) for f in case.features(torch.float32)])
        inputs = [f.detach().requires_grad_() for f in features]
        output = oracles.pool(case, inputs)
        weight = torch.ones_like(output)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
            torch.autograd.grad(output, inputs, weight)
        called = {event.name for event in profile.events()}
        assert any("roi_align_backward" in name for name in called)
        assert not called & {"aten::zero_", "aten::zeros", "aten::zeros_like", "aten::fill_", "aten::full"}

    @LAYOUT
    @CUDA_KERNELS
    def test_the_backward_writes_every_cell(self, layout, device, deterministic_algorithms):
        # In this mode torch fills what it allocates with NaN, which only a write can remove.
        case = CASE["levels-of-which-one-is-empty"]
        features = LAYOUTS[layout]([f.to(device) for f in case.features(torch.float32)])
        inputs = [f.detach().requires_grad_() for f in features]
        output = oracles.pool(case, inputs)
        for grad in torch.autograd.grad(output, inputs, torch.ones_like(output)):
            assert grad.isfinite().all()


class TestOrderOfThreads:
    """Other orders of threads, warps and blocks give the same bits, which are right."""

    @pytest.mark.parametrize("seed", ["1", "2", "3"])
    @LAYOUT
    @pytest.mark.parametrize("name", ["levels-3", "output-14x14", "images-interleaved", "bins-far-larger-than-samples"])
    @EMULATED
    def test_any_order(self, name, layout, seed, device, monkeypatch):
        case = CASE[name]

        def run() -> list[Tensor]:
            inputs = [f.detach().requires_grad_() for f in LAYOUTS[layout](case.features(torch.float32))]
            output = oracles.pool(case, inputs)
            return [output, *torch.autograd.grad(output, inputs, oracles.cotangent(case, torch.float32))]

        before = run()
        monkeypatch.setenv("ROIALIGN_EXT_EMULATION_SEED", seed)
        found = run()
        assert all(torch.equal(a, b) for a, b in zip(before, found))
        oracles.assert_within(found[0], *oracles.values(case, torch.float32), VALUES[torch.float32])
        for values in zip(found[1:], *oracles.gradients(case, torch.float32)):
            oracles.assert_within(*values, GRADIENTS[torch.float32])


def pytest_run(selection: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Tests in another process, on this process's installation of the package."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *selection]
    command.append("--capture=sys")  # a sanitizer's last words go past Python
    package = str(Path(roialign_ext.__file__).resolve().parent.parent)
    path = os.pathsep.join([package, *filter(None, [environment.get("PYTHONPATH")])])
    return subprocess.run(
        command, cwd=TESTS, capture_output=True, text=True, env={**environment, "PYTHONPATH": path}, timeout=1500
    )


@pytest.mark.slow
class TestSanitizers:
    """The table of cases under AddressSanitizer, a redzone round every tensor, and UndefinedBehaviorSanitizer."""

    @pytest.mark.parametrize(
        "file",
        [
            "test_values.py",
            "test_gradients.py",
            "test_box_gradients.py",
            "test_max_pooling.py",
            "test_nms.py",
            "test_hostile_input.py",
        ],
    )
    def test_every_emulated_test(self, file):
        emulation.build(sanitize=True)
        # With a thousand boxes the reference takes minutes here; TestRepeatable runs them without it.
        tests = "emulated and not (many-boxes and not TestRepeatable)"
        done = pytest_run([file, "-k", tests], emulation.sanitizer_environment())
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
        assert re.search(r"\d+ passed", done.stdout)


# What a mutant is tested with: a few cases that reach every kernel, and runs that must repeat.
def chosen(file: str, test: str, cases: str) -> list[str]:
    return [file, "-k", f"emulated and {test} and float32 and (contiguous or channels_last) and ({cases})"]


FEW = "levels-3 or images-uneven or output-14x14 or channels-5"
SELECTIONS = {
    "forward.cu": chosen(
        "test_values.py", "test_values", f"{FEW} or channels-64 or seventeen-samples or bins-far-larger"
    ),
    "max.cu": [
        "test_max_pooling.py",
        "-k",
        "emulated and (TestByEye or test_table and float32 and (levels-3 or images-uneven or output-14x14))",
    ],
    "boxes.cu": [
        "test_box_gradients.py",
        "-k",
        "emulated and (TestByEye or test_average and float32 and (levels-3 or images-uneven) or along_tangents)",
    ],
    "far": ["test_hostile_input.py", "-k", "emulated and rows_far_apart"],
    "backward.cu": chosen("test_gradients.py", "test_gradients", f"{FEW} or many-boxes-on-one-map"),
    "nms.cu": ["test_nms.py", "-k", "emulated and (torchvision or groups)"],
    "streams": ["test_emulation.py", "-k", "current_stream"],
    "repeated": chosen("test_gradients.py", "test_from_run_to_run", "many-boxes"),
}

# Name: file, what stands in it, what the mutant has instead.
WRONG = {
    "finest-level-for-all": ("forward.cu", "params.levels[has_map ? tile.level : 0]", "params.levels[0]"),
    "first-image-for-all": ("forward.cu", "tile.image * level.stride_n", "0 * level.stride_n"),
    "next-column": ("forward.cu", "min(first + lane % width, tile", "min(first + lane % width + 1, tile"),
    "weight-of-neighbouring-bin": ("forward.cu", "tile.x.tap[q][j + u].weight", "tile.x.tap[q ^ 1][j + u].weight"),
    "rounds-overlap": ("forward.cu", "round * kRoundSamples", "round * (kRoundSamples - 1)"),
    "windows-overlap": ("forward.cu", "column >= kWidth", "column > kWidth"),
    "one-plane-for-two": ("forward.cu", "? pack * level.stride_c : 0", "? 0 : 0"),
    "one-window": ("forward.cu", "first <= tile.x.last; first += width", "first <= tile.x.first; first += width"),
    "lane-counts-itself": ("backward.cu", "(1u << lane) - 1", "(2u << lane) - 1"),
    "weights-not-zeroed": ("backward.cu", "weight[cell] = acc_t(0);", ";"),
    "tile-misses-a-row": ("backward.cu", "y <= bounds.last_y", "y < bounds.last_y"),
    "any-level": ("backward.cu", "keep = roi.level == share_.level;", "keep = roi.level >= 0;"),
    "weight-of-neighbouring-fold": ("backward.cu", "fold[i][f + u][cell]", "fold[i][f + u][cell ^ 1]"),
    "weight-of-neighbouring-spread": ("backward.cu", "spread[i][bin][s]", "spread[i][bin][s ^ 1]"),
    "last-bin-of-a-cell-left-out": ("backward.cu", "max(end, bin + 1)", "max(end, bin)"),
    "last-group-left-out": ("backward.cu", "other < kGroups - 1", "other < kGroups - 2"),
    "only-the-last-round": ("backward.cu", "is_first ? sums[s][v] : sum + sums[s][v]", "sums[s][v]"),
    "weights-of-another-batch": ("backward.cu", "has_weights_ = is_one_batch;", "has_weights_ = true;"),
    "first-row-of-a-warp-drops-nobody": ("nms.cu", "(1u << lane) - 1", "(1u << lane) - 1 & ~1u"),
    "groups-drop-each-other": ("nms.cu", "rows_from(first - earlier * kWarp)", "kWholeWarp"),
    "groups-of-a-warp-drop-each-other": ("nms.cu", "rows_from(first - start) & ", ""),
    "dropped-rows-drop": ("nms.cu", "static_cast<unsigned int>(settled)", "kWholeWarp"),
    "settled-in-one-step": ("nms.cu", "while (kept != before)", "while (false)"),
    "first-rows-left-out": ("nms.cu", "first, 0) / kWarp", "first, 0) / kWarp + 1"),
    "others-wait-for-nobody": ("nms.cu", "__any_sync(kWholeWarp, keep", "__all_sync(kWholeWarp, keep"),
    "ties-go-to-the-last": ("max.cu", "return sample > greatest", "return sample >= greatest"),
    "samples-far-outside-left-out": ("max.cu", "take(v, acc_t(0), -1);", ";"),
    "nothing-below-zero-wins": ("max.cu", "? -acc_t(INFINITY)", "? acc_t(0)"),
    "winner-in-the-first-row-of-samples": ("max.cu", "samples.y.begin + winner / columns", "samples.y.begin"),
    "one-row-of-the-winner": ("max.cu", "tap(y.low + dy,", "tap(y.low,"),
    "winners-of-all-images": ("max.cu", " && roi.image == tile.image", ""),
    "last-column-of-a-tile-left-out": ("max.cu", "tile_x < kTile)", "tile_x < kTile - 1)"),
    "slopes-of-the-first-image": ("boxes.cu", "level.map + roi.image * level.stride_n", "level.map"),
    "share-of-the-other-axis": (
        "boxes.cu",
        "(grad_y * share, share_of_far_edge(roi.y",
        "(grad_y * share, share_of_far_edge(roi.x",
    ),
    "mean-over-a-row-of-samples": ("boxes.cu", "/ acc_t(roi.x.num_samples);\n  EdgeSums", ";\n  EdgeSums"),
    "tangents-of-the-other-axis": ("boxes.cu", "share_x * acc_t(motion[3])", "share_x * acc_t(motion[4])"),
    "samples-outside-have-slopes": ("boxes.cu", "if (x.low < 0)", "if (x.low < -1)"),
    "a-turn-left-out": ("backward.cu", "turn % gridDim.y == blockIdx.y", "turn % gridDim.y + 1 == blockIdx.y"),
}

# These do no harm to the values; AddressSanitizer must see them.
OUT_OF_BOUNDS = {
    "reads-past-the-boxes": ("nms.cu", "min(row, params.num_boxes - 1)", "row"),
    "reads-past-the-row": ("forward.cu", "min(first + lane % width, tile.x.last)", "first + lane % width"),
    "reads-a-row-without-a-share": ("max.cu", "(dy == 0 || y.fraction != acc_t(0)) && ", ""),
    "reads-below-a-clamped-sample": ("boxes.cu", "(dy == 0 || y.moves) && ", ""),
    "reads-the-next-box": ("backward.cu", "row < params_.num_rois &&", "row <= params_.num_rois &&"),
}

# The list of RoIs is packed in whatever order the threads come.
UNORDERED = [
    ("if (lane == 0) {", "__shared__ int taken; if (threadIdx.x == 0) taken = size; if (lane == 0) {"),
    ("put(position);", "put(atomicAdd(&taken, 1));"),
]

BARRIER = re.compile(r"__syncthreads\(\);|__syncwarp\(.*\);|__syncthreads_(?:or|and|count)\(")


def mutants() -> dict[str, tuple[str, Callable[[str], str], str, bool]]:
    """Name → file, change of its text, selection that must fail, whether under the sanitizers."""

    def replace(*pairs: tuple[str, str]) -> Callable[[str], str]:
        def change(text: str) -> str:
            for old, new in pairs:
                assert old in text, f"the kernels have moved on, this mutant must follow: {old}"
                text = text.replace(old, new)
            return text

        return change

    def drop(barrier: re.Match[str]) -> Callable[[str], str]:
        # One that returns a value leaves the thread's own in its place.
        rest = ";" if barrier[0].endswith(";") else "int("
        return lambda text: text[: barrier.start()] + rest + text[barrier.end() :]

    found = {name: (file, replace((old, new)), file, False) for name, (file, old, new) in WRONG.items()}
    found |= {name: (file, replace((old, new)), file, True) for name, (file, old, new) in OUT_OF_BOUNDS.items()}
    found["32-bit-offsets-for-all"] = ("forward.cu", replace(("/ kWord <= UINT32_MAX", ">= 0")), "far", False)
    found["default-stream"] = (
        "max.cu",
        replace(("dim3(kChannels), stream", "dim3(kChannels), nullptr")),
        "streams",
        False,
    )
    found["unordered-list"] = ("backward.cu", replace(*UNORDERED), "repeated", False)
    for file in ("forward.cu", "backward.cu"):
        text = (CSRC / "cuda" / file).read_text(encoding="utf-8") if CSRC.is_dir() else ""
        for number, barrier in enumerate(BARRIER.finditer(text), 1):
            found[f"{file}-without-barrier-{number}"] = (file, drop(barrier), file, False)
    return found


CSRC = emulation.ROOT / "csrc"
MUTANTS = mutants()


def run_mutant(name: str, folder: Path) -> subprocess.CompletedProcess[str]:
    file, change, selection, sanitize = MUTANTS[name]
    sources = folder / name
    shutil.copytree(CSRC, sources)
    kernels = sources / "cuda" / file
    kernels.write_text(change(kernels.read_text(encoding="utf-8")), encoding="utf-8")
    environment = emulation.sanitizer_environment() if sanitize else dict(os.environ)
    emulation.build(sanitize, sources)
    done = pytest_run(SELECTIONS[selection], {**environment, "ROIALIGN_EXT_EMULATION_SOURCES": str(sources)})
    if done.returncode == 0 and selection == "backward.cu":
        # What only shows with more boxes than a block has threads.
        done = pytest_run(SELECTIONS["repeated"], {**environment, "ROIALIGN_EXT_EMULATION_SOURCES": str(sources)})
    return done


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory):
    """The chosen mutants, several at a time."""
    wanted = {item.callspec.params.get("mutant") for item in request.session.items if hasattr(item, "callspec")}
    folder = tmp_path_factory.mktemp("mutants")
    emulation.build()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {name: pool.submit(run_mutant, name, folder) for name in MUTANTS if name in wanted}


@pytest.mark.slow
class TestMutants:
    """A kernel with one thing wrong fails a short selection of the table; the kernels as they are pass it."""

    @pytest.mark.parametrize("selection", SELECTIONS)
    def test_the_kernels_as_they_are_pass(self, selection):
        done = pytest_run(SELECTIONS[selection], dict(os.environ))
        assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:]

    @pytest.mark.parametrize("mutant", MUTANTS)
    def test_mutant_fails(self, mutant, outcomes):
        done = outcomes[mutant].result()
        report = done.stdout[-4000:] + done.stderr[-4000:]
        if MUTANTS[mutant][-1]:
            assert "ERROR: AddressSanitizer" in done.stderr, report
        else:
            # 1: a test failed. Negative: killed by a signal, as by a wild address.
            assert done.returncode == 1 or done.returncode < 0, report
            assert "error during collection" not in done.stdout and "ERROR at setup" not in done.stdout, report
