"""Who can pool: a function from a case of the benchmark to its pooler, or to None if it cannot run the case.

A pooler takes maps and boxes as a detector has them and returns (K, C, P, Q) in the layout and dtype of the maps;
conversions that it needs for that are part of its time. Knows no clock. `openvino`, and `onnx` with `onnxruntime`, take
part where they are installed; they have no backward.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import Tensor
from torchvision.ops.poolers import LevelMapper

import roialign_ext

Pool = Callable[[dict[str, Tensor], list[Tensor]], Tensor]

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "float64")}


def ours(case: Any) -> Pool | None:
    work = case.workload
    pool = roialign_ext.MultiScaleRoIAlign(work.map_names, work.output_size, work.sampling_ratio, aligned=work.aligned)
    return lambda maps, boxes: pool(maps, boxes, case.image_shapes)


def torchvision_pooler(case: Any) -> Pool | None:
    """torchvision's MultiScaleRoIAlign. It has no `aligned`; for that, detectron2's loop over levels around the same
    operator. Half types are widened and narrowed as its autocast wrapper does: its own half arithmetic fails the
    check."""
    work = case.workload
    dtype, memory_format = DTYPES[case.dtype], LAYOUTS[case.layout]
    size = (work.output_size, work.output_size)
    per_level = torchvision.ops.MultiScaleRoIAlign(work.map_names, size, work.sampling_ratio)

    def aligned(maps: dict[str, Tensor], boxes: list[Tensor]) -> Tensor:
        def pool(level: int, rows: Tensor) -> Tensor:
            scale = work.spatial_scales[level]
            return torchvision.ops.roi_align(
                maps[work.map_names[level]], rows, size, scale, work.sampling_ratio, aligned=True
            )

        return _level_by_level(case, maps, boxes, pool)

    def run(maps: dict[str, Tensor], boxes: list[Tensor]) -> Tensor:
        if dtype in (torch.float16, torch.bfloat16):
            maps = {name: fmap.float() for name, fmap in maps.items()}
        boxes = [box.to(next(iter(maps.values())).dtype) for box in boxes]
        pooled = aligned(maps, boxes) if work.aligned else per_level(maps, boxes, case.image_shapes)
        return pooled.to(dtype, memory_format=memory_format)

    return run


def openvino_pooler(case: Any) -> Pool | None:
    """OpenVINO's ExperimentalDetectronROIFeatureExtractor, for which its Python interface has no function: one layer in
    its own format. It knows one image, float32 and NCHW."""
    work = case.workload
    if not _installed("openvino") or not _is_plain(case) or work.num_images > 1:
        return None
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": case.threads, "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(core.read_model(_openvino_model(work), b""), "CPU", settings).create_infer_request()

    def run(maps: dict[str, Tensor], boxes: list[Tensor]) -> Tensor:
        for i, tensor in enumerate([*boxes, *maps.values()]):
            request.set_input_tensor(i, openvino.Tensor(tensor.detach().numpy(), shared_memory=True))
        request.infer()
        return torch.from_numpy(request.get_output_tensor(0).data)

    return run


def _openvino_model(work: Any) -> bytes:
    def port(index: int, shape: tuple[int, ...]) -> str:
        dims = "".join(f"<dim>{size}</dim>" for size in shape)
        return f'<port id="{index}" precision="FP32">{dims}</port>'

    aligned = str(work.aligned).lower()
    inputs = [(-1, 4), *((1, work.channels, *size) for size in work.map_sizes)]
    output = (-1, work.channels, work.output_size, work.output_size)
    layers = "".join(
        f'<layer id="{i}" name="input {i}" type="Parameter" version="opset1">'
        f'<data shape="{",".join(map(str, shape))}" element_type="f32"/><output>{port(0, shape)}</output></layer>'
        for i, shape in enumerate(inputs)
    )
    n = len(inputs)
    layers += (
        f'<layer id="{n}" name="pool" type="ExperimentalDetectronROIFeatureExtractor" version="opset6">'
        f'<data output_size="{work.output_size}" sampling_ratio="{work.sampling_ratio}" aligned="{aligned}" '
        f'pyramid_scales="{",".join(map(str, work.strides))}"/>'
        f"<input>{''.join(port(i, shape) for i, shape in enumerate(inputs))}</input>"
        f"<output>{port(n, output)}{port(n + 1, (-1, 4))}</output></layer>"
        f'<layer id="{n + 1}" name="pooled" type="Result" version="opset1"><input>{port(0, output)}</input></layer>'
    )
    edges = "".join(f'<edge from-layer="{i}" from-port="0" to-layer="{n}" to-port="{i}"/>' for i in range(n))
    edges += f'<edge from-layer="{n}" from-port="{n}" to-layer="{n + 1}" to-port="0"/>'
    net = f'<net name="pool" version="11"><layers>{layers}</layers><edges>{edges}</edges></net>'
    return f'<?xml version="1.0"?>{net}'.encode()


def onnxruntime_pooler(case: Any) -> Pool | None:
    """onnxruntime's RoiAlign, which knows one level, under the loop over levels that an exported detector has."""
    work = case.workload
    if not (_installed("onnx") and _installed("onnxruntime")) or not _is_plain(case):
        return None
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = case.threads
    sessions = [
        onnxruntime.InferenceSession(_onnx_model(work, scale), options, providers=["CPUExecutionProvider"])
        for scale in work.spatial_scales
    ]

    def run(maps: dict[str, Tensor], boxes: list[Tensor]) -> Tensor:
        def pool(level: int, rows: Tensor) -> Tensor:
            fmap = maps[work.map_names[level]].detach().numpy()
            inputs = {"map": fmap, "boxes": rows[:, 1:].numpy(), "images": rows[:, 0].long().numpy()}
            return torch.from_numpy(sessions[level].run(None, inputs)[0])

        return _level_by_level(case, maps, boxes, pool)

    return run


def _onnx_model(work: Any, scale: float) -> bytes:
    from onnx import TensorProto, helper

    node = helper.make_node(
        "RoiAlign",
        ["map", "boxes", "images"],
        ["pooled"],
        coordinate_transformation_mode="half_pixel" if work.aligned else "output_half_pixel",
        output_height=work.output_size,
        output_width=work.output_size,
        sampling_ratio=work.sampling_ratio,
        spatial_scale=scale,
    )
    inputs = [
        helper.make_tensor_value_info("map", TensorProto.FLOAT, [None] * 4),
        helper.make_tensor_value_info("boxes", TensorProto.FLOAT, [None, 4]),
        helper.make_tensor_value_info("images", TensorProto.INT64, [None]),
    ]
    graph = helper.make_graph(
        [node], "pool", inputs, [helper.make_tensor_value_info("pooled", TensorProto.FLOAT, [None] * 4)]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 16)], ir_version=8)
    return bytes(model.SerializeToString())


def _level_by_level(
    case: Any, maps: dict[str, Tensor], boxes: list[Tensor], pool: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """What detectron2 does with an operator that knows one level: pool the boxes of each, put the crops in place."""
    work = case.workload
    size = (work.output_size, work.output_size)
    mapper = LevelMapper(2, 1 + len(work.strides))
    levels, rows = mapper(boxes), torchvision.ops._utils.convert_boxes_to_roi_format(boxes)
    pooled = next(iter(maps.values())).new_zeros(len(rows), work.channels, *size)
    for level in range(len(maps)):
        index = torch.where(levels == level)[0]
        pooled.index_put_((index,), pool(level, rows[index]))
    return pooled


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _is_plain(case: Any) -> bool:
    return case.device.type == "cpu" and case.dtype == "float32" and case.layout == "nchw"


PROVIDERS: dict[str, Callable[[Any], Pool | None]] = {
    "ours": ours,
    "torchvision": torchvision_pooler,
    "openvino": openvino_pooler,
    "onnxruntime": onnxruntime_pooler,
}
