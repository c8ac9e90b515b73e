"""The inputs that break other implementations, and errors: who, what was expected, what came.

Rows of the table that crash elsewhere run in one child process per device, which is this file as a script: it says
"begin NAME" and "passed NAME" on stdout, so a row that kills the process is known by name and the rest go on in
another child.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import resource
import subprocess
import sys
import time
import traceback
from pathlib import Path

import oracles
import pytest
import torch
from cases import GRADIENTS, NOT_FINITE, VALUES
from conftest import DEVICES, require
from torch import Tensor

import roialign_ext
from roialign_ext import autograd, reference

NAN, INF = math.nan, math.inf
SECONDS = 240  # for all rows of a child; each takes well under one on any device
ROWS = {}


def row(function):
    """Registers a row of the table, to be run in a child with the device's name and the device."""
    ROWS[function.__name__] = function
    return function


def feature_map(device, dtype=torch.float32, shape=(2, 5, 16, 20), channels_last=False) -> Tensor:
    feature = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device, dtype)
    return feature.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def boxes_of(rows, device) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32, device=device)


def all_ways(device):
    """(map, sampling ratio, aligned): every path through the kernels that a bad box may take."""
    for dtype in (torch.float32, torch.float16, torch.float64):
        for channels_last in (False, True):
            for ratio in (2, -1):
                for aligned in (False, True):
                    yield feature_map(device, dtype, channels_last=channels_last).requires_grad_(), ratio, aligned


def expected(feature: Tensor, rows, ratio: int, aligned: bool, size=3) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if feature.dtype == torch.float64 else torch.float32
    exact = feature.detach().cpu().double()
    return tuple(
        reference.multiscale_roi_align([f], boxes_of(rows, "cpu"), size, [0.25], ratio, aligned, coordinate_dtype=wide)
        for f in (exact, exact.abs())
    )


def assert_raises(kind, pattern: str, call, *arguments, **options) -> None:
    try:
        call(*arguments, **options)
    except kind as error:
        assert re.search(pattern, str(error)), f"{error} does not match {pattern}"
        return
    raise AssertionError(f"{kind.__name__} was not raised")


@row
def not_finite_coordinates_give_zeros_and_no_gradient(name, device):
    bad = boxes_of(NOT_FINITE[:-1], device)
    for feature, ratio, aligned in all_ways(device):
        output = roialign_ext.roi_align(feature, bad, 3, 0.25, ratio, aligned)
        assert not output.any()
        output.backward(torch.full_like(output, NAN))
        assert not feature.grad.any()


@row
def not_finite_coordinates_give_zeros_under_the_level_rule(name, device):
    bad = boxes_of(NOT_FINITE[:-1], device)
    for feature, ratio, aligned in all_ways(device):
        maps = [feature, feature_map(device, feature.dtype, (2, 5, 8, 10)).requires_grad_()]
        output = roialign_ext.multiscale_roi_align(maps, bad, 3, [0.25, 0.125], ratio, aligned)
        assert not output.any()
        output.backward(torch.full_like(output, NAN))
        assert not any(level.grad.any() for level in maps)


@row
def inverted_boxes_count_as_one_cell(name, device):
    """Oracle: the float64 reference of a box one cell wide at the same corner."""
    for feature, ratio, aligned in all_ways(device):
        if not aligned:
            output = roialign_ext.roi_align(feature, boxes_of([[0, 50, 10, 20, 42]], device), 3, 0.25, ratio)
            oracles.assert_within(
                output, *expected(feature, [[0, 50, 10, 54, 42]], ratio, aligned), VALUES[feature.dtype]
            )


@row
def inverted_boxes_are_sampled_mirrored_when_aligned(name, device):
    """Oracle: the float64 reference of the upright box, turned over. Numbers are exact in float32 either way."""
    for feature, ratio, aligned in all_ways(device):
        if aligned and ratio > 0:
            mirrored = boxes_of([[0, 58, 10, 10, 42], [0, 10, 42, 58, 10], [0, 58, 42, 10, 10]], device)
            output = roialign_ext.roi_align(feature, mirrored, (4, 4), 0.25, ratio, aligned)
            upright, magnitude = expected(feature, [[0, 10, 10, 58, 42]], ratio, aligned, (4, 4))
            for index, axes in enumerate([(3,), (2,), (2, 3)]):
                oracles.assert_within(
                    output[index : index + 1], upright.flip(axes), magnitude.flip(axes), VALUES[feature.dtype]
                )


@row
def inverted_boxes_with_adaptive_sampling_give_zeros_when_aligned(name, device):
    inverted = boxes_of([[0, 50, 10, 20, 40], [0, 20, 40, 50, 10], [0, 50, 40, 20, 10], [0, 9, 9, 8.9, 30]], device)
    for feature, ratio, aligned in all_ways(device):
        if aligned and ratio <= 0:
            output = roialign_ext.roi_align(feature, inverted, 3, 0.25, ratio, aligned)
            assert not output.any()
            output.backward(torch.ones_like(output))
            assert not feature.grad.any()


@row
def boxes_of_no_size_give_the_value_at_the_point_or_zeros(name, device):
    """Oracle: the cell itself: pixel (22, 14) at scale 1/4, aligned, is the middle of column 5, row 3."""
    for feature, ratio, aligned in all_ways(device):
        if aligned:
            point = boxes_of([[1, 22, 14, 22, 14]], device)
            output = roialign_ext.roi_align(feature, point, 3, 0.25, ratio, aligned)
            output.backward(torch.ones_like(output))
            if ratio > 0:
                cell = feature.detach()[1, :, 3, 5].cpu().double()[None, :, None, None].expand(1, -1, 3, 3)
                oracles.assert_within(output, cell, cell.abs(), VALUES[feature.dtype])
                assert (feature.grad[1, :, 3, 5] - 9).abs().max() <= 9 * 2.0**-10
            else:
                assert not output.any() and not feature.grad.any()


@row
def boxes_of_any_size_cost_no_more_than_the_map(name, device):
    """Oracle: the float64 reference at 1e6; beyond, by eye: a map's share of so large a mean is nothing."""
    for feature, ratio, aligned in all_ways(device):
        sizes = [[0, -500000, -500000, 500000, 500000], [0, 8, 8, 1000000, 36], [1, 5e8, 5e8, 6e8, 6e8]]
        output = roialign_ext.roi_align(feature, boxes_of(sizes, device), 3, 0.25, ratio, aligned)
        oracles.assert_within(output, *expected(feature, sizes, ratio, aligned), VALUES[feature.dtype])
        output.backward(torch.ones_like(output))
        assert feature.grad.isfinite().all()
        for size in (1e9, 1e12, 1e30, 3e38):
            boxes = boxes_of([[0, 0, 0, size, size], [0, -size, -size, size, size], [0, -size, 3, size, 40]], device)
            output = roialign_ext.roi_align(feature, boxes, 3, 0.25, ratio, aligned)
            assert output.isfinite().all()
            if ratio <= 0:
                assert output[:2].abs().max().item() < 1e-9
            roialign_ext.multiscale_roi_align([feature, feature], boxes, 3, [0.25, 0.125], ratio, aligned)


@row
def bins_beside_the_map(name, device):
    """Zero whatever the map holds, because their samples read nothing: here 1 on the left and NaN on the right."""
    for width in (24, 40):
        for left in (-128.0, 12.0):
            box = [[0, left, 8, left + 210, 100]]
            spoilt = torch.ones(1, 9, 40, width, device=device)
            spoilt[..., width // 2 :] = NAN
            for memory_format in (torch.contiguous_format, torch.channels_last):
                fmap = spoilt.contiguous(memory_format=memory_format)
                output = roialign_ext.roi_align(fmap, boxes_of(box, device), 7, 0.25, 0)
                # Bins are 7.5 cells wide: those wholly left of -1 or right of the width read nothing.
                start = left / 4
                for q in range(7):
                    begin, end = start + q * 7.5, start + (q + 1) * 7.5
                    if end <= -1 or begin >= width:
                        assert not output[..., q].any(), (width, left, q)
                    elif 0 <= begin and end < width // 2 - 1:
                        assert torch.allclose(output[..., q], torch.ones_like(output[..., q])), (width, left, q)


@row
def images_that_do_not_exist(name, device):
    """IndexError with row and index where rows can be looked at; else NaN in that row alone, and no gradient."""
    for index in (2, 7, -2, -5, 1e9, -1e9, INF, -INF):
        for feature, ratio, aligned in all_ways(device):
            good = [[1, 8, 8, 40, 36], [0, 3, 3, 30, 30]]
            boxes = boxes_of([good[0], [index, 8, 8, 40, 36], good[1]], device)
            if name == "cpu":
                assert_raises(
                    IndexError,
                    r"^roi_align: .*row 1 .*2 images.*got .*" + re.escape(f"{index:g}".replace("+09", "")[:4]),
                    roialign_ext.roi_align,
                    feature,
                    boxes,
                    3,
                    0.25,
                    ratio,
                    aligned,
                )
                continue
            output = roialign_ext.roi_align(feature, boxes, 3, 0.25, ratio, aligned)
            assert output[1].isnan().all()
            oracles.assert_within(output[[0, 2]], *expected(feature, good, ratio, aligned), VALUES[feature.dtype])
            weight = torch.zeros_like(output)
            weight[1] = NAN
            output.backward(weight)
            assert not feature.grad.any()


@row
def levels_that_do_not_exist(name, device):
    """As images that do not exist."""
    for level in (2, 100, -2, -(2**31), 2**40):
        for feature, ratio, aligned in all_ways(device):
            maps = [feature, feature_map(device, feature.dtype, (2, 5, 8, 10)).requires_grad_()]
            boxes = boxes_of([[1, 8, 8, 40, 36]] * 3, device)
            levels = torch.tensor([0, level, -1], device=device)
            call = functools.partial(
                roialign_ext.multiscale_roi_align, maps, boxes, 3, [0.25, 0.125], ratio, aligned, levels=levels
            )

            if name == "cpu":
                assert_raises(IndexError, rf"^multiscale_roi_align: .*row 1 .*2 levels.*got .*{level}", call)
                continue
            output = call()
            assert output[1].isnan().all() and not output[2].any()
            oracles.assert_within(
                output[:1], *expected(feature, [[1, 8, 8, 40, 36]], ratio, aligned), VALUES[feature.dtype]
            )
            weight = torch.zeros_like(output)
            weight[1] = NAN
            output.backward(weight)
            assert not any(level.grad.any() for level in maps)


@row
def padding_gives_zeros_and_no_gradient(name, device):
    for feature, ratio, aligned in all_ways(device):
        boxes = boxes_of([[-1, 8, 8, 40, 36], [-1, NAN, INF, 0, 0], [NAN, 8, 8, 40, 36]], device)
        output = roialign_ext.roi_align(feature, boxes, 3, 0.25, ratio, aligned)
        assert not output.any()
        output.backward(torch.full_like(output, NAN))
        assert not feature.grad.any()


@row
def padding_in_a_batch_of_no_images(name, device):
    feature = feature_map(device, shape=(0, 5, 16, 20)).requires_grad_()
    output = roialign_ext.roi_align(feature, boxes_of([[-1, 8, 8, 40, 36]], device), 3, 0.25, 2)
    assert output.shape == (1, 5, 3, 3) and not output.any()
    output.backward(torch.ones_like(output))
    assert feature.grad.shape == feature.shape


@row
def more_box_tensors_than_images(name, device):
    boxes = [torch.rand(2, 4, device=device) * 30 for _ in range(3)]
    for given in (boxes, boxes[:1], []):
        assert_raises(
            ValueError,
            rf"^roi_align: .*boxes.* 2.* got {len(given)}",
            roialign_ext.roi_align,
            feature_map(device),
            given,
            3,
        )


@row
def levels_that_differ(name, device):
    first, boxes = feature_map(device), boxes_of([[0, 8, 8, 40, 36]], device)
    others = {
        "images": feature_map(device, shape=(3, 5, 8, 10)),
        "fewer images": feature_map(device, shape=(1, 5, 8, 10)),
        "channels": feature_map(device, shape=(2, 6, 8, 10)),
        "dtype": feature_map(device, torch.float64, (2, 5, 8, 10)),
        "dims": feature_map(device, shape=(2, 5, 8)),
    }
    for what, other in others.items():
        for maps in ([first, other], [other, first]):
            (
                assert_raises(
                    ValueError,
                    r"^multiscale_roi_align: .* must .*, got ",
                    roialign_ext.multiscale_roi_align,
                    maps,
                    boxes,
                    3,
                    [0.25, 0.125],
                ),
                what,
            )


@row
def maps_without_cells(name, device):
    for shape in ((2, 5, 0, 20), (2, 5, 16, 0), (2, 5, 0, 0)):
        feature, boxes = feature_map(device, shape=shape), boxes_of([[0, 8, 8, 40, 36]], device)
        assert_raises(ValueError, r"^roi_align: .* must .*, got ", roialign_ext.roi_align, feature, boxes, 3)
        output = roialign_ext.roi_align(feature, boxes[:0], 3)
        assert output.shape == (0, 5, 3, 3)


@row
def empty_calls(name, device):
    for dtype in (torch.float32, torch.float16):
        for shape, count in (((2, 5, 16, 20), 0), ((0, 5, 16, 20), 0), ((2, 0, 16, 20), 3), ((0, 0, 0, 0), 0)):
            feature = feature_map(device, dtype, shape).requires_grad_()
            output = roialign_ext.roi_align(feature, boxes_of([[0, 8, 8, 40, 36]], device).repeat(count, 1), 7)
            assert output.shape == (count, shape[1], 7, 7) and output.dtype == dtype
            output.backward(torch.ones_like(output))
            assert feature.grad.shape == shape and not feature.grad.any()


@row
def no_images_and_no_lists_of_boxes(name, device):
    output = roialign_ext.roi_align(feature_map(device, shape=(0, 5, 16, 20)), [], (2, 3))
    assert output.shape == (0, 5, 2, 3)


@row
def raw_operators_check_what_they_are_given(name, device):
    """Called directly, past the Python layer, with what would read out of bounds."""
    feature, boxes = feature_map(device), boxes_of([[0, 8, 8, 40, 36]], device)
    weight = torch.ones(1, 5, 3, 3, device=device)
    options = ([0.25, 0.25], 2, False, 4, 224.0)

    def forward(features=(feature,), boxes=boxes, levels=None, size=(3, 3), options=options):
        return autograd.operators.roi_align_forward(list(features), boxes, levels, size, *options)

    def backward(weight=weight, boxes=boxes, levels=None, images=2, sizes=(16, 20), options=options, last=False):
        return autograd.operators.roi_align_backward(weight, boxes, levels, images, sizes, *options, last)

    def assign(boxes=boxes[:, 1:], num_levels=4, k_min=2, level=4, scale=224.0):
        return autograd.operators.assign_levels(boxes, num_levels, k_min, level, scale, 1e-6)

    forward(), backward(), assign()
    four, long = boxes[:, 1:], torch.zeros(2, dtype=torch.int64, device=device)
    wrong = [
        (ValueError, lambda: forward(features=[])),
        (ValueError, lambda: forward(features=[feature] * 9, options=([0.25] * 18, *options[1:]))),
        (ValueError, lambda: forward(features=[feature[0]])),
        (TypeError, lambda: forward(features=[feature.long()])),
        (ValueError, lambda: forward(features=[feature, feature[:1]], options=([0.25] * 4, *options[1:]))),
        (ValueError, lambda: forward(boxes=four)),
        (ValueError, lambda: forward(boxes=boxes[0])),
        (TypeError, lambda: forward(boxes=boxes.long())),
        (ValueError, lambda: forward(levels=long)),
        (TypeError, lambda: forward(levels=long[:1].float())),
        (ValueError, lambda: forward(size=(0, 3))),
        (ValueError, lambda: forward(size=(3, -1))),
        (ValueError, lambda: forward(size=(2**31, 2**31))),
        (ValueError, lambda: forward(options=([0.25], *options[1:]))),
        (ValueError, lambda: forward(options=([], *options[1:]))),
        (ValueError, lambda: forward(options=([NAN, 0.25], *options[1:]))),
        (ValueError, lambda: forward(options=([-0.25, 0.25], *options[1:]))),
        (ValueError, lambda: forward(options=(options[0], 2**40, *options[2:]))),
        (ValueError, lambda: forward(options=(*options[:4], 0.0))),
        (ValueError, lambda: backward(weight=weight[0])),
        (ValueError, lambda: backward(weight=weight.expand(2, 5, 3, 3))),
        (TypeError, lambda: backward(weight=weight.long())),
        (ValueError, lambda: backward(boxes=four)),
        (TypeError, lambda: backward(boxes=boxes.int())),
        (ValueError, lambda: backward(levels=long)),
        (ValueError, lambda: backward(sizes=())),
        (ValueError, lambda: backward(sizes=(16,))),
        (ValueError, lambda: backward(sizes=(16, 20, 8))),
        (ValueError, lambda: backward(sizes=(16, 20, 8, 10))),  # two levels, scales of one
        (ValueError, lambda: backward(sizes=(16, 20) * 9, options=([0.25] * 18, *options[1:]))),
        (ValueError, lambda: backward(sizes=(0, 20))),
        (ValueError, lambda: backward(sizes=(-16, 20))),
        (ValueError, lambda: backward(images=-1)),
        (ValueError, lambda: backward(options=([0.25], *options[1:]))),
        (ValueError, lambda: assign(boxes=boxes)),
        (ValueError, lambda: assign(boxes=boxes[0])),
        (TypeError, lambda: assign(boxes=four.long())),
        (ValueError, lambda: assign(num_levels=0)),
        (ValueError, lambda: assign(scale=0.0)),
    ]
    if name == "cpu":
        wrong += [
            (IndexError, lambda: forward(boxes=boxes + torch.tensor([2.0, 0, 0, 0, 0]))),
            (IndexError, lambda: forward(levels=long[:1] + 1)),
            (IndexError, lambda: backward(boxes=boxes + torch.tensor([2.0, 0, 0, 0, 0]))),
            (IndexError, lambda: backward(levels=long[:1] + 1)),
            (IndexError, lambda: backward(images=0)),
        ]
    failed = []
    for index, (kind, call) in enumerate(wrong):
        try:
            assert_raises(kind, r"^(multiscale_)?(roi_align|assign_levels): .*, got ", call)
        except Exception as error:
            failed.append(f"call {index} of {call.__code__.co_firstlineno}: {type(error).__name__}: {error}")
    assert not failed, "\n".join(failed)


@row
def boxes_of_any_kind_give_their_rows_a_gradient_or_none(name, device):
    """Through both modes and both derivatives of each; oracle: by eye, only boxes on the map get a gradient."""
    bad = [*NOT_FINITE[:-1], (-1, 8, 8, 40, 36), (0, 300, 300, 340, 340), (1, -500, 8, -400, 40)]
    large = [(0, -size, -size, size, size) for size in (1e6, 1e9, 1e30, 3e38)]
    if name != "cpu":
        bad += [(2, 8, 8, 40, 36), (-5, 8, 8, 40, 36), (INF, 8, 8, 40, 36), (1e9, 8, 8, 40, 36)]
    good = [(0, 8.5, 9.5, 41, 37), (1, 60, 50, 90, 70)]
    for feature, ratio, aligned in all_ways(device):
        for mode in ("avg", "max"):
            boxes = boxes_of([*bad, *large, *good], device).requires_grad_()
            output = roialign_ext.roi_align(feature, boxes, 3, 0.25, ratio, aligned, mode=mode)
            weight = torch.ones_like(output)
            weight[: len(bad)] = NAN
            grad_boxes, grad_feature = torch.autograd.grad(output, [boxes, feature], weight, create_graph=True)
            assert not grad_boxes[: len(bad)].any() and grad_boxes.isfinite().all() and not grad_boxes[:, 0].any()
            assert grad_boxes[-len(good) :, 1:].any(1).all() and grad_feature.isfinite().all()
            (again,) = torch.autograd.grad(grad_feature, boxes, torch.ones_like(grad_feature))
            assert not again[: len(bad)].any()


@row
def winners_that_no_forward_wrote_read_nothing(name, device):
    """Raw operators with any numbers for winners; oracle: by eye, those out of range count for nothing."""
    for feature, ratio, aligned in all_ways(device):
        feature, boxes = (
            feature.detach(),
            boxes_of([[0, 8, 8, 40, 36], [1, -1e6, 8, 1e6, 30], [-1, 0, 0, 0, 0]], device),
        )
        options = ([0.25, 0.25], ratio, aligned, 4, 224.0)
        layout = torch.channels_last if feature.stride(1) == 1 else torch.contiguous_format
        weight = torch.ones(3, 5, 3, 3, dtype=feature.dtype, device=device).contiguous(memory_format=layout)
        for winner in (-1, -2, 10**6, 2**31 - 1, -(2**31)):
            argmax = torch.full(weight.shape, winner, dtype=torch.int32, device=device)
            gathered = autograd.operators.roi_max_gather([feature], argmax, boxes, None, *options)
            (grad,) = autograd.operators.roi_max_backward(
                weight, argmax, boxes, None, 2, (16, 20), *options, layout == torch.channels_last
            )
            grad_boxes = autograd.operators.roi_max_backward_boxes(weight, argmax, [feature], boxes, None, *options)
            assert not gathered.any() and not grad.any() and not grad_boxes.any()


@row
def raw_operators_of_boxes_and_of_max_check_what_they_are_given(name, device):
    """As the raw operators above."""
    feature, boxes = feature_map(device), boxes_of([[0, 8, 8, 40, 36]], device)
    weight = torch.ones(1, 5, 3, 3, device=device)
    argmax = torch.zeros(1, 5, 3, 3, dtype=torch.int32, device=device)
    options, long = ([0.25, 0.25], 2, False, 4, 224.0), torch.zeros(2, dtype=torch.int64, device=device)
    many = (options[0], 2**16, *options[2:])
    raw = autograd.operators

    def of_boxes(weight=weight, features=(feature,), boxes=boxes, levels=None, options=options):
        return raw.roi_align_backward_boxes(weight, list(features), boxes, levels, *options)

    def tangent(tangents=boxes, boxes=boxes, size=(3, 3)):
        return raw.roi_align_tangent([feature], boxes, tangents, None, size, *options)

    def forward(boxes=boxes, size=(3, 3), options=options, features=(feature,)):
        return raw.roi_max_forward(list(features), boxes, None, size, *options)

    def gather(argmax=argmax, boxes=boxes, features=(feature,), options=options):
        return raw.roi_max_gather(list(features), argmax, boxes, None, *options)

    def backward(weight=weight, argmax=argmax, boxes=boxes, images=2, sizes=(16, 20), options=options):
        return raw.roi_max_backward(weight, argmax, boxes, None, images, sizes, *options, False)

    def max_of_boxes(weight=weight, argmax=argmax, features=(feature,), boxes=boxes, options=options):
        return raw.roi_max_backward_boxes(weight, argmax, list(features), boxes, None, *options)

    wrong = []
    for call in (of_boxes, tangent, forward, gather, backward, max_of_boxes):
        call()
        wrong += [
            (ValueError, functools.partial(call, boxes=boxes[:, 1:])),
            (ValueError, functools.partial(call, boxes=boxes[0])),
            (ValueError, functools.partial(call, boxes=boxes[0, 0])),
            (TypeError, functools.partial(call, boxes=boxes.long())),
        ]
        if name == "cpu":
            wrong.append((IndexError, functools.partial(call, boxes=boxes + boxes_of([2, 0, 0, 0, 0], device))))
    for call in (of_boxes, backward, max_of_boxes):
        wrong += [
            (ValueError, functools.partial(call, weight=weight[0])),
            (ValueError, functools.partial(call, weight=weight.expand(2, 5, 3, 3))),
            (ValueError, functools.partial(call, weight=weight[:, :4])),
            (TypeError, functools.partial(call, weight=weight.long())),
        ]
    for call in (gather, backward, max_of_boxes):
        wrong += [
            (ValueError, functools.partial(call, argmax=argmax[0])),
            (ValueError, functools.partial(call, argmax=argmax[:, :4])),
            (ValueError, functools.partial(call, argmax=argmax.expand(2, 5, 3, 3))),
            (TypeError, functools.partial(call, argmax=argmax.long())),
            (ValueError, functools.partial(call, options=many)),
        ]
    for call in (of_boxes, forward, gather, max_of_boxes):
        wrong += [
            (ValueError, functools.partial(call, features=[])),
            (ValueError, functools.partial(call, features=[feature[0]])),
            (ValueError, functools.partial(call, options=([0.25], *options[1:]))),
        ]
    wrong += [
        (ValueError, functools.partial(of_boxes, levels=long)),
        (TypeError, functools.partial(of_boxes, weight=weight.double())),
        (TypeError, functools.partial(max_of_boxes, weight=weight.double())),
        (ValueError, functools.partial(backward, argmax=argmax[:, :, :2])),
        (ValueError, functools.partial(max_of_boxes, argmax=argmax[:, :, :2])),
        (ValueError, functools.partial(backward, sizes=(16,))),
        (ValueError, functools.partial(backward, images=-1)),
        (ValueError, functools.partial(tangent, tangents=boxes[:, 1:])),
        (TypeError, functools.partial(tangent, tangents=boxes.long())),
        (ValueError, functools.partial(tangent, size=(0, 3))),
        (ValueError, functools.partial(forward, size=(0, 3))),
        (ValueError, functools.partial(forward, options=many)),
    ]
    failed = []
    for index, (kind, call) in enumerate(wrong):
        try:
            assert_raises(kind, r"^(multiscale_)?roi_align: .*, got ", call)
        except Exception as error:
            failed.append(f"{index}: {call.func.__name__}({[*call.keywords]}): {type(error).__name__}: {error}")
    assert not failed, "\n".join(failed)


def run_rows(device_name: str, names: list[str]) -> None:
    """The child."""
    if device_name == "emulated":
        import emulation

        autograd.operators = emulation.load()
    device = torch.device("cuda" if device_name == "cuda" else "cpu")
    for name in names:
        print("begin", name, flush=True)
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        try:
            ROWS[name](device_name, device)
            if device_name == "cuda":
                torch.cuda.synchronize()
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
            assert device_name == "cuda" or grown < 500, f"took {grown:.0f} MiB"
        except Exception:
            print("failed", name, json.dumps(traceback.format_exc()), flush=True)
        else:
            print("passed", name, f"in {time.monotonic() - start:.1f} s", flush=True)


@functools.cache
def outcomes(device_name: str) -> dict[str, str]:
    """What became of each row on a device: "passed", or why not."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result: dict[str, str] = {}
    while remaining := [name for name in ROWS if name not in result]:
        command = [sys.executable, str(Path(__file__).resolve()), device_name, *remaining]
        try:
            child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
            output, end = child.stdout, f"the process ended with status {child.returncode}: {child.stderr[-3000:]}"
        except subprocess.TimeoutExpired as error:
            output, end = (error.stdout or b"").decode(), f"the rows took more than {SECONDS} s"
        begun = None
        for line in output.splitlines():
            word, _, rest = line.partition(" ")
            name, _, detail = rest.partition(" ")
            if word == "begin":
                begun = name
            elif word in ("passed", "failed"):
                result[name] = word if word == "passed" else json.loads(detail)
                begun = None
        if begun is not None:
            result[begun] = end
        elif set(remaining) - set(result):  # ended before the first row, or between two
            return {name: result.get(name, end) for name in ROWS}
    return result


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("device_name", DEVICES)
def test_row_of_the_table(name, device_name):
    """Oracles: SEMANTICS and, for values, the float64 reference; see the functions marked @row."""
    require(device_name)
    if device_name == "emulated":
        import emulation

        emulation.load()  # compiled here, if it must be, and not in the child's time
    outcome = outcomes(device_name)[name]
    if outcome != "passed":
        pytest.fail(outcome, pytrace=False)


class TestErrors:
    """Wrong arguments raise before any work; oracle: the form who, what was expected, what came."""

    GOOD = {
        "features": [torch.zeros(2, 3, 16, 20), torch.zeros(2, 3, 8, 10)],
        "boxes": torch.tensor([[0.0, 8, 8, 40, 36]]),
        "output_size": 7,
        "spatial_scales": [0.25, 0.125],
    }
    WRONG = {
        "boxes-of-four-columns": ({"boxes": torch.zeros(12, 4)}, ValueError, r"`boxes` must .*\(K, 5\), got \(12, 4\)"),
        "boxes-of-one-dimension": ({"boxes": torch.zeros(5)}, ValueError, r"`boxes` must .*\(K, 5\), got \(5,?\)"),
        "boxes-of-integers": ({"boxes": torch.zeros(2, 5, dtype=torch.int64)}, TypeError, r"`boxes` .*got .*int64"),
        "boxes-of-booleans": ({"boxes": torch.zeros(2, 5, dtype=torch.bool)}, TypeError, r"`boxes` .*got .*bool"),
        "boxes-of-complex": ({"boxes": torch.zeros(2, 5, dtype=torch.cfloat)}, TypeError, r"`boxes` .*got .*complex"),
        "boxes-none": ({"boxes": None}, TypeError, r"`boxes` must .*, got NoneType"),
        "boxes-of-numbers": ({"boxes": [[0, 1, 2, 3, 4]]}, TypeError, r"`boxes` must .*, got "),
        "list-too-short": ({"boxes": [torch.zeros(1, 4)]}, ValueError, r"`boxes` must .*2.*, got 1"),
        "list-too-long": ({"boxes": [torch.zeros(1, 4)] * 3}, ValueError, r"`boxes` must .*2.*, got 3"),
        "list-of-five-columns": ({"boxes": [torch.zeros(1, 5)] * 2}, ValueError, r"boxes.* must .*4\), got \(1, 5\)"),
        "list-of-integers": ({"boxes": [torch.zeros(1, 4).int()] * 2}, TypeError, r"`boxes.* must .*, got .*int32"),
        "features-none": ({"features": None}, TypeError, r"`features` must .*, got NoneType"),
        "features-a-tensor": ({"features": torch.zeros(2, 3, 16, 20)}, TypeError, r"`features` must .*, got Tensor"),
        "features-empty": ({"features": [], "spatial_scales": []}, ValueError, r"`features` must .*, got "),
        "features-nine": (
            {"features": [torch.zeros(2, 3, 8, 8)] * 9, "spatial_scales": [0.5**i for i in range(9)]},
            ValueError,
            r"`features` must .*8.*, got 9",
        ),
        "features-of-integers": (
            {"features": [torch.zeros(2, 3, 8, 8).int()] * 2},
            TypeError,
            r"features.* must .*, got .*int",
        ),
        "features-of-two-dtypes": (
            {"features": [torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8).half()]},
            ValueError,
            r"features.* must .*float32.*, got .*(float16|half)",
        ),
        "features-of-three-dimensions": (
            {"features": [torch.zeros(3, 8, 8)] * 2},
            ValueError,
            r"features.* must .*\(N, C, H, W\), got \(3, 8, 8\)",
        ),
        "features-on-two-devices": (
            {"features": [torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8, device="meta")]},
            ValueError,
            r"features.* must .*, got meta",
        ),
        "boxes-on-another-device": (
            {"boxes": torch.zeros(1, 5, device="meta")},
            ValueError,
            r"`boxes` must .*, got meta",
        ),
        "scales-too-few": ({"spatial_scales": [0.25]}, ValueError, r"`spatial_scales` must .*2.*, got 1"),
        "scales-too-many": ({"spatial_scales": [0.25] * 3}, ValueError, r"`spatial_scales` must .*2.*, got 3"),
        "scales-zero": ({"spatial_scales": [0.25, 0.0]}, ValueError, r"`spatial_scales` must .*, got 0"),
        "scales-negative": ({"spatial_scales": [-0.25, 0.125]}, ValueError, r"`spatial_scales` must .*, got -0.25"),
        "scales-nan": ({"spatial_scales": [0.25, NAN]}, ValueError, r"`spatial_scales` must .*, got nan"),
        "scales-not-powers-of-two": ({"spatial_scales": [0.3, 0.15]}, ValueError, r"`spatial_scales` .*`levels=`"),
        "scales-not-consecutive": ({"spatial_scales": [0.25, 0.0625]}, ValueError, r"`spatial_scales` .*`levels=`"),
        "scales-coarsest-first": ({"spatial_scales": [0.125, 0.25]}, ValueError, r"`spatial_scales` .*`levels=`"),
        "scales-of-three": ({"spatial_scales": [(0.25, 0.25, 0.25), 0.125]}, ValueError, r"must|expected .*, got 3"),
        "output-zero": ({"output_size": 0}, ValueError, r"`output_size` must .*, got .*0"),
        "output-negative": ({"output_size": (7, -1)}, ValueError, r"`output_size` must .*, got .*-1"),
        "output-of-three": ({"output_size": (7, 7, 7)}, ValueError, r"(must|expected) .*, got "),
        "output-a-fraction": ({"output_size": 7.0}, TypeError, r"`output_size` .*must .*, got 7.0"),
        "output-a-tensor": ({"output_size": (torch.tensor(7), 7)}, TypeError, r"`output_size` .*must .*, got "),
        "ratio-a-fraction": ({"sampling_ratio": 2.0}, TypeError, r"`sampling_ratio` must .*, got .*2.0"),
        "aligned-a-word": ({"aligned": "yes"}, TypeError, r"`aligned` must .*, got 'yes'"),
        "scales-one-number": ({"spatial_scales": 0.25}, TypeError, r"`spatial_scales` must .*, got 0.25"),
        "scales-none": ({"spatial_scales": [None, 0.125]}, TypeError, r"`spatial_scales` must .*, got \[None"),
        "mode-unknown": ({"mode": "median"}, ValueError, r"`mode` must .*, got 'median'"),
        "levels-too-few": ({"levels": torch.zeros(0).long()}, ValueError, r"`levels` must .*\(1,?\).*, got \(0,?\)"),
        "levels-of-floats": ({"levels": torch.zeros(1)}, TypeError, r"`levels` must .*, got .*float"),
        "levels-a-list": ({"levels": [0]}, TypeError, r"`levels` must .*, got list"),
        "canonical-scale-zero": ({"canonical_scale": 0}, ValueError, r"`canonical_scale` must .*, got 0"),
    }

    @pytest.mark.parametrize("wrong", WRONG)
    def test_multiscale_roi_align(self, wrong, device_name, device):
        change, kind, pattern = self.WRONG[wrong]
        if device_name == "emulated" and "device" in wrong:
            pytest.skip("the emulated operators are registered for no other device")

        def on_device(value):
            if isinstance(value, Tensor):
                return value if value.device.type == "meta" else value.to(device)
            return [on_device(x) for x in value] if isinstance(value, list) else value

        arguments = {name: on_device(value) for name, value in {**self.GOOD, **change}.items()}
        with pytest.raises(kind, match="^multiscale_roi_align: .*" + pattern):
            roialign_ext.multiscale_roi_align(**arguments)

    @pytest.mark.parametrize(
        "change, kind, pattern",
        [
            ({"boxes": torch.zeros(12, 4)}, ValueError, r"`boxes` must have shape \(K, 5\), got \(12, 4\)"),
            ({"boxes": torch.zeros(1, 5).int()}, TypeError, r"`boxes` must .*, got .*int32"),
            ({"input": torch.zeros(3, 8, 8)}, ValueError, r"`input` must .*\(N, C, H, W\), got \(3, 8, 8\)"),
            ({"input": torch.zeros(1, 3, 8, 8).int()}, TypeError, r"`input` must .*, got .*int32"),
            ({"mode": "min"}, ValueError, r"`mode` must .*, got 'min'"),
            ({"output_size": 0}, ValueError, r"`output_size` must .*, got .*0"),
            ({"spatial_scale": INF}, ValueError, r"`spatial_scales?` must .*, got inf"),
        ],
        ids=["box-columns", "box-dtype", "input-dims", "input-dtype", "mode", "output-size", "scale"],
    )
    def test_roi_align(self, change, kind, pattern, device):
        good = {"input": torch.zeros(1, 3, 8, 8), "boxes": torch.zeros(1, 5), "output_size": 2}
        arguments = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in {**good, **change}.items()}
        with pytest.raises(kind, match="^roi_align: " + pattern):
            roialign_ext.roi_align(**arguments)

    @pytest.mark.parametrize(
        "boxes, options, kind",
        [
            (torch.zeros(2, 3), {}, ValueError),
            (torch.zeros(4), {}, ValueError),
            (torch.zeros(2, 4).long(), {}, TypeError),
            (torch.zeros(2, 4), {"num_levels": 0}, ValueError),
            (torch.zeros(2, 4), {"canonical_scale": -1}, ValueError),
            ([torch.zeros(2, 5)], {}, ValueError),
            (None, {}, TypeError),
        ],
        ids=["columns", "dims", "dtype", "levels", "scale", "list-columns", "none"],
    )
    def test_assign_levels(self, boxes, options, kind, device):
        arguments = {"num_levels": 4, **options}
        with pytest.raises(kind, match=r"^assign_levels: .* must .*, got "):
            roialign_ext.assign_levels(boxes.to(device) if isinstance(boxes, Tensor) else boxes, **arguments)

    @pytest.mark.parametrize("wrong", ["boxes-of-four-columns", "boxes-of-integers", "features-of-three-dimensions"])
    def test_without_data(self, wrong):
        """The fake kernels find what is wrong most often."""
        change, kind, pattern = self.WRONG[wrong]
        arguments = {
            name: value.to("meta") if isinstance(value, Tensor) else value
            for name, value in {**self.GOOD, **change}.items()
        }
        arguments["features"] = [x.to("meta") for x in arguments["features"]]
        with pytest.raises(kind, match="^multiscale_roi_align: .*" + pattern.replace("got .*int64", "got")):
            roialign_ext.multiscale_roi_align(**arguments)

    def test_a_failed_call_leaves_the_next_one_sound(self, device):
        """Oracle: by eye."""
        with pytest.raises(ValueError):
            roialign_ext.roi_align(torch.ones(1, 1, 8, 8).to(device), torch.zeros(3, 4).to(device), 2)
        output = roialign_ext.roi_align(
            torch.ones(1, 1, 8, 8).to(device), torch.tensor([[0.0, 1, 1, 5, 5]]).to(device), 2
        )
        assert output.tolist() == [[[[1.0, 1.0], [1.0, 1.0]]]]


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_rows_far_apart(channels_last, device, tmp_path):
    """Rows of a map may lie more than 32 bits of words apart, 64 GiB at most: a file with a hole. Oracle: by eye."""
    if device.type == "cuda":
        pytest.skip("the map lies in a file")
    row = 2**35 + 8 if channels_last else 2**32 + 8
    file = torch.from_file(str(tmp_path / "map"), shared=True, size=row + 64, dtype=torch.float16)
    strides = (2 * row, 1, row, 8) if channels_last else (2 * row, 4, row, 1)
    feature = file.as_strided((1, 8, 2, 4), strides)
    feature[:, :, 1] = torch.arange(1.0, 9.0).half()[:, None]
    output = roialign_ext.roi_align(feature, torch.tensor([[0.0, 0, 0, 2, 2]]), 1, 1.0, 1)  # the sample is (1, 1)
    assert output.flatten().tolist() == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.slow
class TestBeyondTwoToThe31:
    """Offsets of 64 bits; oracle: the float64 reference on the part that lies there. Takes about 9 GiB."""

    @pytest.fixture(autouse=True)
    def real_device(self, device_name):
        if device_name == "emulated":
            pytest.skip("an emulated kernel takes hours for 2^31 elements")

    @pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
    def test_output(self, channels_last, device):
        patterns = [[i % 2, 3.0 * i, 2.0 * i, 40.0 + i, 44.0 + 2 * i] for i in range(8)]
        feature = feature_map(device, torch.float16, (2, 32, 16, 20), channels_last).requires_grad_()
        boxes = boxes_of(patterns, device).repeat(8193, 1)  # 65544 boxes of 32 x 32 x 32 elements
        output = roialign_ext.roi_align(feature, boxes, 32, 0.25, 1)
        assert output.numel() > 2**31
        exact, magnitude = expected(feature, patterns, 1, False, 32)
        for begin in (0, 65528, 65536):
            oracles.assert_within(output[begin : begin + 8], exact, magnitude, VALUES[torch.float16])

        # A cotangent that is zero but for the last boxes, which only 64-bit offsets reach.
        weight = torch.zeros_like(output)
        weight[-8:] = torch.randn(8, 32, 32, 32).to(device)
        tail = weight[-8:].cpu().double()
        (found,) = torch.autograd.grad(output, feature, weight)
        leaf = feature.detach().cpu().double().requires_grad_()
        pooled = reference.multiscale_roi_align(
            [leaf], boxes_of(patterns, "cpu"), 32, [0.25], 1, coordinate_dtype=torch.float32
        )
        (gradient,) = torch.autograd.grad(pooled, leaf, tail, retain_graph=True)
        (bound,) = torch.autograd.grad(pooled, leaf, tail.abs())
        oracles.assert_within(found, gradient, bound, GRADIENTS[torch.float16])

    @pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
    def test_map(self, channels_last, device):
        side, channels, corner = 8192, 40 if channels_last else 33, 64  # 40: whole words of channels
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        feature = torch.empty(
            (1, channels, side, side), dtype=torch.float16, device=device, memory_format=memory_format
        )
        feature = feature.zero_()
        assert feature.numel() > 2**31
        values = torch.randn(1, channels, corner, corner).half()
        feature[:, :, -corner:, -corner:] = values.to(device)
        feature.requires_grad_()
        # Positions are multiples of 1/4, exact in float32 at 8192 as in the corner.
        boxes = torch.tensor([[0.0, 10, 8, 26, 40], [0, 30, 30, 62, 62], [0, 40, 50, 72, 66]])
        output = roialign_ext.roi_align(
            feature, (boxes + (side - corner) * torch.tensor([0.0, 1, 1, 1, 1])).to(device), 4, 1.0, 2
        )
        leaf = values.double().requires_grad_()
        shared = (boxes, 4, [1.0], 2)
        exact = reference.multiscale_roi_align([leaf], *shared, coordinate_dtype=torch.float32)
        magnitude = reference.multiscale_roi_align([leaf.abs()], *shared, coordinate_dtype=torch.float32)
        oracles.assert_within(output, exact.detach(), magnitude.detach(), VALUES[torch.float16])

        weight = torch.randn(output.shape).half()
        (found,) = torch.autograd.grad(output, feature, weight.to(device))
        (gradient,) = torch.autograd.grad(exact, leaf, weight.double(), retain_graph=True)
        (bound,) = torch.autograd.grad(exact, leaf, weight.double().abs())
        oracles.assert_within(found[:, :, -corner:, -corner:], gradient, bound, GRADIENTS[torch.float16])
        assert not found[:, :, : side - corner].any() and not found[:, :, :, : side - corner].any()


if __name__ == "__main__":
    run_rows(sys.argv[1], sys.argv[2:])
