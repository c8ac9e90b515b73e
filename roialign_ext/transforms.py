"""What PyTorch's transforms ask of an autograd Function: vmap, forward-mode derivatives, tracing. Knows no operator.

A batch of calls is one call with more rows and more images, so `vmap` costs one launch.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import _library


class _AsGiven(inspect.Signature):
    """The signature of a function that is only called with all of its arguments, by position."""

    def __init__(self) -> None:
        super().__init__([inspect.Parameter("inputs", inspect.Parameter.VAR_POSITIONAL)])

    def bind(self, *args: Any, **kwargs: Any) -> inspect.BoundArguments:
        return inspect.BoundArguments(self, {"inputs": args})


class Function(torch.autograd.Function):
    """A Function whose tensors all begin with a dimension of rows (boxes and what is pooled) or of images (maps).

    A subclass names the `kinds` of its inputs: "rows", "boxes" (rows whose first column is an image), "maps", "images"
    (a number of them) or None for what is the same in every call. Further inputs are maps. `returns_maps` says that
    outputs are maps, or some of them; all begin with rows or images.

    A subclass that has forward-mode derivatives defines `tangent(inputs, output, *tangents)`, where a tangent is None
    for an input without one.
    """

    kinds: ClassVar[tuple[str | None, ...]] = ()
    returns_maps: ClassVar[bool] = False
    with_jvp: ClassVar[type[torch.autograd.Function]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Function.apply binds its arguments to this at every call, which took as long as all else that a call costs.
        cls.forward.__signature__ = _AsGiven()  # type: ignore[attr-defined]
        if "jvp" not in cls.__dict__:
            cls.with_jvp = _with_jvp(cls) if hasattr(cls, "tangent") else cls

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple, *inputs: Any) -> tuple[Any, Any]:
        """See torch.autograd.Function.vmap."""
        size = info.batch_size
        kinds = (*cls.kinds, *["maps"] * (len(inputs) - len(cls.kinds)))
        of_maps = [(x, dim) for kind, x, dim in zip(kinds, inputs, in_dims) if kind == "maps"]
        # Sets of boxes over one set of maps share it; else every set has images of its own.
        own_images = cls.returns_maps or any(dim is not None for _, dim in of_maps)
        num_images = [x for kind, x in zip(kinds, inputs) if kind == "images"]
        num_images += [_batch_first(x, dim, size).shape[1] for x, dim in of_maps]

        def fold(kind: str | None, x: Any, dim: int | None) -> Any:
            if x is None or kind is None or (kind == "maps" and not own_images):
                return x
            if kind == "images":
                return size * x
            batch = _batch_first(x, dim, size)
            if kind == "boxes" and own_images:
                batch = _with_own_images(batch, num_images[0])
            return batch.flatten(0, 1)

        outputs = apply(cls, *map(fold, kinds, inputs, in_dims))
        if isinstance(outputs, Tensor):
            return outputs.unflatten(0, (size, outputs.shape[0] // size)), 0
        return tuple(x.unflatten(0, (size, x.shape[0] // size)) for x in outputs), (0,) * len(outputs)


def apply(function: type[Function], *inputs: Any) -> Any:
    """`function.apply(*inputs)`, as far as whoever is tracing can take it."""
    if torch.jit.is_tracing():
        return function.forward(*inputs)  # an operator, which can be saved; an autograd Function cannot
    wants_gradient = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
    if torch.compiler.is_compiling():
        # torch.compile refuses a Function with jvp, and mistakes the first input of one without gradient for `ctx`
        # where the number of inputs happens to be that of the parameters.
        return function.apply(*inputs) if wants_gradient else function.forward(*inputs)
    if wants_gradient or _library.is_transformed():
        return function.with_jvp.apply(*inputs)
    return function.forward(*inputs)  # of a small call, torch's book-keeping for a Function is three quarters


def _with_jvp(function: Any) -> type[torch.autograd.Function]:
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        function.setup_context(ctx, inputs, output)
        outputs = output if isinstance(output, tuple) else (output,)
        ctx.save_for_forward(*(x for x in (*inputs, *outputs) if isinstance(x, Tensor)))
        ctx.others = [None if isinstance(x, Tensor) else (x,) for x in inputs]
        ctx.shapes = [x.shape for x in outputs]
        # Else what has no tangent would get one of zeros, and boxes that stay where they are would cost a launch.
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        known = next((grad for grad in grads if grad is not None), None)
        if known is None:
            return (None,) * len(ctx.needs_input_grad)
        filled = (known.new_zeros(shape) if grad is None else grad for grad, shape in zip(grads, ctx.shapes))
        return function.backward(ctx, *filled)

    def jvp(ctx: Any, *tangents: Any) -> Any:
        tensors = iter(ctx.saved_tensors)
        inputs = [next(tensors) if other is None else other[0] for other in ctx.others]
        return function.tangent(inputs, tuple(tensors), *tangents)

    overrides = {f.__name__: staticmethod(f) for f in (setup_context, backward, jvp)}
    return type(function.__name__, (function,), overrides)


def _batch_first(x: Tensor, dim: int | None, size: int) -> Tensor:
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def _with_own_images(boxes: Tensor, num_images: int) -> Tensor:
    """Boxes `(B, K, 5)` of B sets of images, numbered through. What names no image goes on to name none."""
    image = boxes[..., :1].trunc()
    first = torch.arange(len(boxes), device=boxes.device, dtype=boxes.dtype)[:, None, None] * num_images
    named = torch.where((image >= 0) & (image < num_images), image + first, num_images * len(boxes))
    named = torch.where((image == -1) | image.isnan(), image, named)
    return torch.cat([named, boxes[..., 1:]], -1)
