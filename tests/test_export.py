"""Programs that leave Python: torch.export, AOTInductor, ONNX. The oracle is the float64 reference, or as named."""

from __future__ import annotations

import io
import re

import oracles
import pytest
import torch
from cases import CASE, VALUES, Case, level_boundaries
from torch import Tensor, nn

import roialign_ext


class Pool(nn.Module):
    """The case's call, with rows and features as inputs, and `levels` where the case has them."""

    def __init__(self, case: Case, mode: str = "avg"):
        super().__init__()
        self.case, self.mode = case, mode

    def forward(self, rows: Tensor, levels: Tensor | None, features: list[Tensor]) -> Tensor:
        case = self.case
        return roialign_ext.multiscale_roi_align(
            features,
            rows,
            case.output_size,
            case.scales,
            case.sampling_ratio,
            case.aligned,
            levels=levels,
            mode=self.mode,
            **case.options,
        )


def inputs_of(case: Case, dtype: torch.dtype = torch.float32) -> tuple:
    return case.rows(oracles.coordinate_dtype(dtype)), case.level_tensor(), case.features(dtype)


def dynamic_shapes(case: Case) -> dict:
    free = torch.export.Dim.AUTO
    return {
        "rows": {0: free},
        "levels": None if case.levels is None else {0: free},
        "features": [{2: free, 3: free} for _ in case.maps],
    }


def exported(case: Case) -> torch.export.ExportedProgram:
    return torch.export.export(Pool(case).eval(), inputs_of(case), dynamic_shapes=dynamic_shapes(case))


def through_a_file(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


PYRAMIDS = ("levels-3", "levels-given")


class TestTorchExport:
    @pytest.mark.parametrize("name", PYRAMIDS)
    def test_saved_and_loaded(self, name):
        case = CASE[name]
        output = through_a_file(exported(case)).module()(*inputs_of(case))
        oracles.assert_within(output, *oracles.values(case, torch.float32), VALUES[torch.float32])

    def test_any_number_of_boxes_and_any_size_of_image(self):
        """Oracle: the call in eager mode, bit for bit."""
        case = CASE["levels-3"]
        program = exported(case).module()
        rows, _, _ = inputs_of(case)
        for count, height, width in ((24, 64, 96), (3, 96, 64), (2, 200, 120)):
            features = [torch.randn(1, 3, height >> level, width >> level) for level in range(3)]
            assert torch.equal(program(rows[:count], None, features), Pool(case)(rows[:count], None, features))

    @pytest.mark.parametrize("strict", [False, True], ids=["default", "strict"])
    def test_boxes_as_lists_of_the_module(self, strict):
        """Oracle: the module in eager mode, bit for bit. No size is a multiple of the stride."""

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.convolution = nn.Conv2d(3, 4, 3, stride=4, padding=1)
                self.pool = roialign_ext.MultiScaleRoIAlign(["0"], 3, 2)

            def forward(self, image, boxes):
                return self.pool({"0": self.convolution(image)}, boxes, [tuple(image.shape[2:])] * 2)

        model, free = Model().eval(), torch.export.Dim.AUTO
        boxes = [
            torch.tensor([[1.0, 2, 30, 40], [3, 4, 20, 20]]),
            torch.tensor([[0.0, 0, 9, 9], [8, 3, 40, 40], [0, 1, 9, 9]]),
        ]
        inputs = (torch.randn(2, 3, 63, 97), boxes)
        program = torch.export.export(
            model, inputs, dynamic_shapes=({2: free, 3: free}, [{0: free}, {0: free}]), strict=strict
        )
        program = through_a_file(program).module()
        for image in (inputs[0], torch.randn(2, 3, 128, 128), torch.randn(2, 3, 250, 131)):
            other = [boxes[1], boxes[0][:1].repeat(4, 1)]
            assert torch.equal(program(image, other), model(image, other))

    def test_no_gradient_is_an_error_and_not_zero(self):
        """An exported program holds the bare operator."""
        rows, levels, features = inputs_of(CASE["levels-3"])
        features = [x.requires_grad_() for x in features]
        output = exported(CASE["levels-3"]).module()(rows, levels, features)
        with pytest.raises(RuntimeError, match="derivative for roialign_ext::roi_align_forward is not implemented"):
            output.sum().backward()


@pytest.mark.slow
class TestAOTInductor:
    def test_a_package_is_compiled_saved_and_run(self, tmp_path):
        if not hasattr(torch._inductor, "aoti_load_package"):
            pytest.skip(f"torch {torch.__version__} has no AOTInductor packages")
        case = CASE["levels-3"]
        path = torch._inductor.aoti_compile_and_package(exported(case), package_path=str(tmp_path / "pool.pt2"))
        package = torch._inductor.aoti_load_package(path)
        rows, levels, features = inputs_of(case)
        oracles.assert_within(
            package(rows, levels, features), *oracles.values(case, torch.float32), VALUES[torch.float32]
        )
        features = [torch.randn(1, 3, 128 >> level, 160 >> level) for level in range(3)]
        assert torch.equal(package(rows[:5], levels, features), Pool(case)(rows[:5], levels, features))


class TestOnnx:
    """onnxruntime runs what was exported."""

    @pytest.fixture(autouse=True)
    def needs_onnx(self):
        for name in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(name, reason=f"{name} is not installed")

    @staticmethod
    def session(case: Case, dtype: torch.dtype = torch.float32, mode: str = "avg"):
        import onnxruntime

        from roialign_ext import onnx

        program = onnx.export(
            Pool(case, mode).eval(), inputs_of(case, dtype), dynamic_shapes=dynamic_shapes(case), verbose=False
        )
        domains = {node.domain for node in program.model.graph}
        assert domains <= {""}, "standard operators only"
        file = io.BytesIO()
        program.save(file)
        return onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])

    @staticmethod
    def run(session, rows, levels, features) -> Tensor:
        given = [x.numpy() for x in (rows, levels, *features) if x is not None]
        names = [x.name for x in session.get_inputs()]
        assert len(names) == len(given)
        return torch.from_numpy(session.run(None, dict(zip(names, given)))[0])

    QUICK = ("levels-3",)
    SLOW = (
        "ordinary-fixed-legacy",
        "padding",
        "ordinary-fixed-aligned",
        "ordinary-adaptive-legacy",
        "ordinary-adaptive-aligned",
        "across-the-border-fixed-legacy",
        "across-the-border-adaptive-aligned",
        "outside-fixed-aligned",
        "zero-size-fixed-legacy",
        "zero-size-fixed-aligned",
        "zero-size-adaptive-aligned",
        "inverted-fixed-legacy",
        "inverted-fixed-aligned",
        "inverted-adaptive-legacy",
        "inverted-adaptive-aligned",
        "not-finite-fixed-aligned",
        "not-finite-adaptive-legacy",
        "samples-on-the-edge",
        "samples-on-the-edge-aligned",
        "output-3x5",
        "images-uneven",
        "images-fractional",
        "padding-only",
        "scale-of-a-pair",
        "scale-not-a-power-of-two",
        "levels-1",
        "levels-4",
        "levels-5",
        "levels-8",
        "levels-boundaries",
        "levels-boundaries-canonical",
        "levels-not-finite",
        "levels-given",
        "levels-given-with-pairs",
        "levels-of-which-one-is-empty",
        "many-boxes",
    )

    @pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
    def test_values(self, name):
        case = CASE[name]
        output = self.run(self.session(case), *inputs_of(case))
        oracles.assert_within(output, *oracles.values(case, torch.float32), VALUES[torch.float32])

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=["float16", "float64"])
    def test_other_types(self, dtype):
        case = CASE["levels-3"]
        output = self.run(self.session(case, dtype), *inputs_of(case, dtype))
        assert output.dtype == dtype
        oracles.assert_within(output, *oracles.values(case, dtype), VALUES[dtype])

    def test_any_number_of_boxes_and_any_size_of_image(self):
        """Oracle: the call in eager mode; counts include none."""
        case = CASE["levels-3"]
        session = self.session(case)
        rows, _, _ = inputs_of(case)
        for count, height, width in ((24, 64, 96), (7, 96, 64), (0, 64, 96), (1, 200, 120)):
            features = [torch.randn(1, 3, height >> level, width >> level) for level in range(3)]
            expected = Pool(case)(rows[:count], None, features)
            found = self.run(session, rows[:count], None, features)
            # Sums of few terms in another order.
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)

    def test_levels_change_where_the_kernels_change_them(self):
        """Oracle: assign_levels, whose rule is tested in test_values.py, at each boundary and ulps beside it."""
        import onnxruntime

        from roialign_ext import onnx

        class Rule(nn.Module):
            def forward(self, boxes):
                return roialign_ext.assign_levels(boxes, 5, 2)

        boxes = torch.tensor(level_boundaries([56, 112, 224, 448, 896]) + list(CASE["levels-not-finite"].boxes))[:, 1:]
        program = onnx.export(Rule().eval(), (boxes,), dynamic_shapes=({0: "K"},), verbose=False)
        file = io.BytesIO()
        program.save(file)
        session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {session.get_inputs()[0].name: boxes.numpy()})
        assert found.tolist() == roialign_ext.assign_levels(boxes, 5, 2).tolist()
        assert set(found.tolist()) == {-1, 0, 1, 2, 3, 4}

    def test_max_pooling_is_refused(self):
        with pytest.raises(Exception) as error:
            self.session(CASE["ordinary-fixed-legacy"], mode="max")
        chain, messages = error.value, []
        while chain is not None:
            messages.append(str(chain))
            chain = chain.__cause__
        assert re.search('roi_align: `mode` must be "avg" for ONNX', "\n".join(messages))

    @pytest.mark.slow
    def test_the_users_translations_come_on_top(self):
        """Oracle: which function was called."""
        from roialign_ext import onnx

        operator, called = torch.ops.roialign_ext.roi_align_forward.default, []
        ours = onnx.custom_translation_table()[operator]

        def theirs(*args):
            called.append(operator)
            return ours(*args)

        case = CASE["ordinary-fixed-legacy"]
        onnx.export(Pool(case).eval(), inputs_of(case), custom_translation_table={operator: theirs}, verbose=False)
        assert called == [operator]
