"""PyTorch's transforms over the operation: vmap, forward-mode derivatives, checkpointing, tracing.

The oracles are loops over single calls and derivatives whose values tests/test_gradients.py checks.
"""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from cases import CASE, VALUES
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import roialign_ext

SCALES = (0.25, 0.125)
MODES = ("avg", "max")


@pytest.fixture(params=["cpu", "cuda"])
def device(request) -> torch.device:
    """PyTorch's machinery does not care which kernels run."""
    from conftest import require

    require(request.param)
    return torch.device(request.param)


def pool(rows: Tensor, *features: Tensor, mode: str = "avg", ratio: int = 2, levels: Tensor | None = None) -> Tensor:
    return roialign_ext.multiscale_roi_align(
        features, rows, (3, 2), SCALES, ratio, True, mode=mode, canonical_scale=32, canonical_level=3, levels=levels
    )


def pyramid(device, *batch: int) -> list[Tensor]:
    shapes = ((2, 3, 16, 20), (2, 3, 8, 10))
    return [torch.randn(*batch, *shape, dtype=torch.float64, device=device) for shape in shapes]


def boxes(device) -> Tensor:
    """On both levels and images; the last row is padding, the one before has no number for a corner."""
    rows = [
        [0, 8.3, 7.1, 40.2, 36.4],
        [1, 17.2, 3.7, 29.9, 60.6],
        [1, 3.3, 2.1, 71.7, 59.2],
        [0, torch.nan, 1, 9, 9],
        [-1, 1, 1, 9, 9],
    ]
    return torch.tensor(rows, dtype=torch.float64, device=device)


def box_sets(device) -> Tensor:
    """Three sets, with images in another order and a row of padding in another place."""
    sets = torch.stack([boxes(device), boxes(device).flip(0), boxes(device) * 0.75])
    sets[2, :, 0] = torch.tensor([1, 0, -1, 0, 0], dtype=torch.float64)
    return sets


class TestVmap:
    """Oracle: the calls one by one."""

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize(
        "in_dims", [(0, None, None), (None, 0, 0), (0, 0, 0), (0, 1, None), (None, None, 3)], ids=str
    )
    def test_values(self, in_dims, mode, device):
        rows = box_sets(device) if in_dims[0] == 0 else boxes(device)
        features = pyramid(device)
        for level, dim in enumerate(in_dims[1:]):
            if dim is not None:
                features[level] = pyramid(device, 3)[level].movedim(0, dim)
        found = torch.vmap(lambda *inputs: pool(*inputs, mode=mode), in_dims)(rows, *features)
        for i, one in enumerate(found):
            inputs = (x if dim is None else x.select(dim, i) for x, dim in zip((rows, *features), in_dims))
            assert torch.equal(one, pool(*inputs, mode=mode))

    def test_levels_can_be_batched(self, device):
        features, rows = pyramid(device), boxes(device)
        levels = torch.tensor([[0, 1, 1, 0, 0], [1, 0, -1, 1, 1]], device=device)
        found = torch.vmap(lambda levels: pool(rows, *features, levels=levels))(levels)
        for one, given in zip(found, levels):
            assert torch.equal(one, pool(rows, *features, levels=given))

    def test_batches_nest(self, device):
        features = pyramid(device, 2)
        found = torch.vmap(torch.vmap(pool, (0, None, None)), (None, 0, 0))(box_sets(device), *features)
        for i in range(2):
            for j, rows in enumerate(box_sets(device)):
                assert torch.equal(found[i, j], pool(rows, *(x[i] for x in features)))

    def test_a_batch_is_one_call_of_the_operator(self, monkeypatch, device):
        """Oracle: the number of calls, counted."""
        calls = []

        class Counting:
            def __getattr__(self, name):
                calls.append(name)
                return getattr(torch.ops.roialign_ext, name)

        monkeypatch.setattr("roialign_ext.autograd.operators", Counting())
        torch.vmap(pool, (0, 0, 0))(box_sets(device), *pyramid(device, 3))
        assert calls == ["roi_align_forward"]

    def test_maps_are_shared_by_sets_of_boxes(self, monkeypatch, device):
        """Oracle: the pointers that the operator is given."""
        pointers = []

        class Watching:
            def roi_align_forward(self, features, *rest):
                pointers.extend(x.data_ptr() for x in features)
                return torch.ops.roialign_ext.roi_align_forward(features, *rest)

        monkeypatch.setattr("roialign_ext.autograd.operators", Watching())
        features = pyramid(device)
        torch.vmap(pool, (0, None, None))(box_sets(device), *features)
        assert pointers == [x.data_ptr() for x in features]

    @pytest.mark.parametrize("image", [2, 5, -2])
    def test_an_image_that_is_not_there_is_not_one_of_the_next_set(self, image):
        """Oracle: the single call, an IndexError on the CPU."""
        rows, features = box_sets("cpu"), pyramid("cpu", 3)
        rows[0, 1, 0] = image
        with pytest.raises(IndexError):
            pool(rows[0], *(x[0] for x in features))
        with pytest.raises(IndexError):
            torch.vmap(pool)(rows, *features)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_more_sets_than_a_half_can_count(self, dtype, device):
        feature = torch.randn(2100, 1, 1, 4, 4, device=device)
        rows = torch.tensor([[0, 0.5, 0.5, 3, 3]], device=device, dtype=dtype)
        found = torch.vmap(lambda x: roialign_ext.roi_align(x, rows, 1, 1.0, 1))(feature)
        assert torch.equal(
            found.flatten(), roialign_ext.roi_align(feature[:, 0], [rows[:, 1:]] * 2100, 1, 1.0, 1).flatten()
        )

    def test_no_set_at_all_is_an_error(self, device):
        with pytest.raises(ValueError, match="`vmap` must map over one call at least"):
            torch.vmap(pool, (0, None, None))(box_sets(device)[:0], *pyramid(device))

    @pytest.mark.parametrize("mode", MODES)
    def test_gradients(self, mode, device):
        rows, features = box_sets(device)[:, :3].nan_to_num(1), pyramid(device, 3)

        def loss(*inputs):
            return pool(*inputs, mode=mode).square().sum()

        gradient = torch.func.grad(loss, argnums=(0, 1, 2))
        found = torch.vmap(gradient)(rows, *features)
        for i in range(3):
            for one, expected in zip(found, gradient(rows[i], *(x[i] for x in features))):
                torch.testing.assert_close(one[i], expected, rtol=1e-12, atol=1e-12)

    def test_gradients_of_many_cotangents_in_one_call(self, device):
        features, rows = [x.requires_grad_() for x in pyramid(device)], boxes(device)
        output = pool(rows, *features)
        cotangents = torch.randn(4, *output.shape, dtype=torch.float64, device=device)

        def passed_back(cotangent):
            return torch.autograd.grad(output, features, cotangent, retain_graph=True)

        for level, found in enumerate(torch.vmap(passed_back)(cotangents)):
            for i, cotangent in enumerate(cotangents):
                assert torch.equal(found[i], passed_back(cotangent)[level])


class TestForwardMode:
    """Oracle: the operation is linear in the features; in the boxes, reverse mode."""

    @pytest.mark.parametrize("mode", MODES)
    def test_features(self, mode, device):
        rows, features, tangents = boxes(device), pyramid(device), pyramid(device)
        output, found = torch.func.jvp(lambda *x: pool(rows, *x, mode=mode), tuple(features), tuple(tangents))
        assert torch.equal(output, pool(rows, *features, mode=mode))
        # A step so small that no other sample wins, on numbers of order one in float64.
        step = 1e-6
        ahead, behind = (pool(rows, *(f + s * t for f, t in zip(features, tangents)), mode=mode) for s in (step, -step))
        torch.testing.assert_close(found, (ahead - behind) / (2 * step), rtol=1e-7, atol=1e-8)

    def test_dual_tensors_of_one_level(self, device):
        rows, features, tangents = boxes(device), pyramid(device), pyramid(device)
        with forward_ad.dual_level():
            dual = pool(rows, features[0], forward_ad.make_dual(features[1], tangents[1]))
            primal, tangent = forward_ad.unpack_dual(dual)
        assert torch.equal(primal, pool(rows, *features))
        assert torch.equal(tangent, pool(rows, torch.zeros_like(features[0]), tangents[1]))

    @pytest.mark.parametrize("ratio", [2, -1], ids=["fixed", "adaptive"])
    def test_boxes_and_features_together(self, ratio, device):
        rows, features = boxes(device)[:3], pyramid(device)
        directions = (torch.randn_like(rows), *pyramid(device))

        def call(*inputs):
            return pool(*inputs, ratio=ratio)

        output, found = torch.func.jvp(call, (rows, *features), directions)
        cotangent = torch.randn_like(output)
        _, back = torch.func.vjp(call, rows, *features)
        by_reverse = sum((gradient * d).sum() for gradient, d in zip(back(cotangent), directions))
        torch.testing.assert_close((found * cotangent).sum(), by_reverse, rtol=1e-10, atol=1e-10)

    def test_what_does_not_move_costs_nothing(self, monkeypatch, device):
        """Oracle: the names of the operators, recorded."""
        calls = []

        class Recording:
            def __getattr__(self, name):
                calls.append(name)
                return getattr(torch.ops.roialign_ext, name)

        monkeypatch.setattr("roialign_ext.autograd.operators", Recording())
        rows, features, tangents = boxes(device), pyramid(device), pyramid(device)
        torch.func.jvp(lambda *x: pool(rows, *x), tuple(features), tuple(tangents))
        assert calls == ["roi_align_forward"] * 2

    def test_boxes_of_max_pooling_say_that_they_have_none(self, device):
        rows, features = boxes(device), pyramid(device)
        with pytest.raises(NotImplementedError, match='mode="max"'):
            torch.func.jvp(lambda r: pool(r, *features, mode="max"), (rows,), (torch.ones_like(rows),))

    def test_jacobians_of_both_modes_are_equal(self, device):
        rows, features = boxes(device)[:2], [x[:, :1, :8, :10] for x in pyramid(device)]
        forward = torch.func.jacfwd(pool, argnums=(0, 1))(rows, *features)
        reverse = torch.func.jacrev(pool, argnums=(0, 1))(rows, *features)
        for one, other in zip(forward, reverse):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)

    def test_second_derivatives_mixed_with_boxes(self, device):
        """Forward over reverse against reverse over reverse."""
        rows, features = boxes(device)[:2], pyramid(device)
        directions = (torch.randn_like(rows), *pyramid(device))

        def loss(*inputs):
            return pool(*inputs).pow(3).sum()

        gradient = torch.func.grad(loss, argnums=(0, 1, 2))
        _, forward = torch.func.jvp(gradient, (rows, *features), directions)
        _, back = torch.func.vjp(gradient, rows, *features)
        for one, other in zip(forward, back(directions)):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)

    @pytest.mark.parametrize("mode", MODES)
    def test_second_derivatives_in_features(self, mode, device):
        """Forward over reverse against reverse over reverse."""
        rows, features, directions = boxes(device), tuple(pyramid(device)), tuple(pyramid(device))

        def loss(*inputs):
            return pool(rows, *inputs, mode=mode).pow(3).sum()

        gradient = torch.func.grad(loss, argnums=(0, 1))
        _, forward = torch.func.jvp(gradient, features, directions)
        _, back = torch.func.vjp(gradient, *features)
        for one, other in zip(forward, back(directions)):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)

    def test_second_derivatives_by_differences(self):
        """Oracle: gradgradcheck, of features and of the features with the boxes."""
        rows = boxes("cpu")[:2].requires_grad_()
        features = [x[:, :1, :4, :4].contiguous().requires_grad_() for x in pyramid("cpu")]

        def call(*inputs):
            return roialign_ext.multiscale_roi_align(
                inputs[1:], inputs[0] * mask, 2, (0.125, 0.0625), 2, True, levels=levels
            )

        mask, levels = torch.tensor([0.0, 1, 1, 1, 1], dtype=torch.float64), torch.tensor([0, 1])
        assert torch.autograd.gradcheck(call, (rows, *features), check_forward_ad=True)
        assert torch.autograd.gradgradcheck(call, (rows, *features), check_fwd_over_rev=True)


class TestCheckpointing:
    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_gradients_are_equal(self, use_reentrant, device):
        """Oracle: the same without checkpointing, bit for bit."""
        gradients = []
        for call in (pool, lambda *inputs: checkpoint(pool, *inputs, use_reentrant=use_reentrant)):
            torch.manual_seed(0)
            leaves = [x.requires_grad_() for x in (boxes(device)[:3], *pyramid(device))]
            call(*leaves).pow(2).sum().backward()
            gradients.append([leaf.grad for leaf in leaves])
        for one, other in zip(*gradients):
            assert torch.equal(one, other)


class TestTracing:
    """torch.jit.trace of the modules; oracle: the module."""

    def test_traced_module_takes_other_boxes_and_is_saved(self):
        case = CASE["output-7x7"]
        (feature,), rows = case.features(torch.float32), case.rows()
        module = roialign_ext.RoIAlign(7, 0.25, 2, True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch 2.11 calls all of TorchScript deprecated
            traced = torch.jit.trace(module, (feature, rows))
            file = io.BytesIO()
            torch.jit.save(traced, file)
            file.seek(0)
            traced = torch.jit.load(file)
        for count in (2, 5, 0):
            assert torch.equal(traced(feature, rows[:count]), module(feature, rows[:count]))
        larger = torch.randn(3, 8, 33, 31)
        assert torch.equal(traced(larger, rows), module(larger, rows))

    def test_traced_pyramid(self):
        rows, features = boxes("cpu").float(), [x.float() for x in pyramid("cpu")]

        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.pool = roialign_ext.MultiScaleRoIAlign(["a", "b"], 3, 2, spatial_scales=SCALES)

            def forward(self, a, b, first, second):
                return self.pool({"a": a, "b": b}, [first, second], [])

        model = copy.deepcopy(Model())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(model, (*features, rows[:2, 1:], rows[:1, 1:]), check_trace=False)
        inputs = (*features, rows[1:2, 1:], rows[:3, 1:])
        allowed = VALUES[torch.float32].computed * 10
        torch.testing.assert_close(traced(*inputs), model(*inputs), rtol=allowed, atol=allowed)
