"""What PyTorch's transforms ask of an autograd Function: vmap, forward-mode derivatives, tracing. Knows no operator.

A batch of calls is one call with more rows and more images, so `vmap` costs one launch.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
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
        kinds = (*cls.kinds, *["maps"] * (len(inputs) - len(cls.kinds)))
        return _batched(functools.partial(apply, cls), kinds, cls.returns_maps, info.batch_size, in_dims, inputs)


def register_vmap(operator: str, kinds: tuple[str | None, ...], run: Callable[..., Any]) -> None:
    """Let torch.compile batch an operator, `run`, of whose inputs the first are of these kinds.

    Elsewhere vmap meets the Function that calls the operator.
    """

    def rule(info: Any, in_dims: tuple, *inputs: Any) -> tuple[Any, Any]:
        all_kinds = (*kinds, *[None] * (len(inputs) - len(kinds)))
        return _batched(run, all_kinds, "images" in kinds, info.batch_size, in_dims, inputs)

    torch.library.register_vmap(operator, rule)


def _batched(
    run: Callable[..., Any],
    kinds: Sequence[str | None],
    returns_maps: bool,
    size: int,
    in_dims: Sequence,
    inputs: tuple,
) -> tuple[Any, Any]:
    """Run a batch of calls as one; inputs of kind "maps" may be lists. See torch.autograd.Function.vmap."""
    if size == 0:
        raise ValueError("roi_align: `vmap` must map over one call at least, got a dimension of size 0")
    of_maps = [pair for kind, x, dim in zip(kinds, inputs, in_dims) if kind == "maps" for pair in _pairs(x, dim)]
    # Sets of boxes over one set of maps share it; else every set has images of its own.
    own_images = returns_maps or any(dim is not None for _, dim in of_maps)
    num_images = [x for kind, x in zip(kinds, inputs) if kind == "images"]
    num_images += [_batch_first(x, dim, size).shape[1] for x, dim in of_maps]

    def fold(kind: str | None, x: Any, dim: Any) -> Any:
        if x is None or kind is None or (kind == "maps" and not own_images):
            return x
        if isinstance(x, (list, tuple)):
            return [fold(kind, *pair) for pair in _pairs(x, dim)]
        if kind == "images":
            return size * x
        batch = _batch_first(x, dim, size)
        if kind == "boxes" and own_images:
            batch = _with_own_images(batch, num_images[0])
        return batch.flatten(0, 1)

    outputs = run(*map(fold, kinds, inputs, in_dims))
    if isinstance(outputs, Tensor):
        return outputs.unflatten(0, (size, outputs.shape[0] // size)), 0
    unfolded = [x.unflatten(0, (size, x.shape[0] // size)) for x in outputs]
    return type(outputs)(unfolded), type(outputs)([0] * len(unfolded))


def _pairs(x: Any, dim: Any) -> list[tuple[Any, Any]]:
    """The tensors of a list, or the one tensor, each with its batch dimension."""
    if not isinstance(x, (list, tuple)):
        return [(x, dim)]
    return list(zip(x, dim if isinstance(dim, (list, tuple)) else [dim] * len(x)))


def apply(function: type[Function], *inputs: Any) -> Any:
    """`function.apply(*inputs)`, as far as whoever is tracing can take it."""
    if torch.jit.is_tracing():
        return function.forward(*inputs)  # an operator, which can be saved; an autograd Function cannot
    if torch.compiler.is_compiling():
        return _apply_in_graph(function, *inputs)
    if _wants_gradient(inputs) or _library.is_transformed():
        return function.with_jvp.apply(*inputs)
    return function.forward(*inputs)  # of a small call, torch's book-keeping for a Function is three quarters


def _wants_gradient(inputs: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)


def _apply_in_graph(function: type[Function], *inputs: Any) -> Any:
    # torch.compile refuses a Function with jvp, and mistakes the first input of one without gradient for `ctx` where
    # the number of inputs happens to be that of the parameters.
    if _has_forward_derivatives():
        return forward_mode_derivatives_are_not_captured(function, *inputs)
    if _is_transformed():
        # torch.compile does not see that an input of torch.func.grad wants a gradient; of a view of it it does.
        inputs = tuple(x.view_as(x) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)
    return function.apply(*inputs) if _wants_gradient(inputs) else function.forward(*inputs)


# What these return while torch.compile traces counts as a constant; under other transforms it compiles again.


@torch.compiler.assume_constant_result
def _has_forward_derivatives() -> bool:
    return _library.has_forward_derivatives()


@torch.compiler.assume_constant_result
def _is_transformed() -> bool:
    layers = torch._C._functorch.get_interpreter_stack() or ()  # PyTorch has no public way to ask
    if sum(layer.key().name == "Grad" for layer in layers) > 1:
        # It would take the second derivative for zero.
        raise NotImplementedError("roi_align: torch.compile captures no gradient of a gradient of torch.func")
    return _library.is_transformed()


@torch.compiler.disable
def forward_mode_derivatives_are_not_captured(function: type[Function], *inputs: Any) -> Any:
    """Breaks the graph, or with `fullgraph=True` is an error, which shows this name."""
    return function.with_jvp.apply(*inputs)


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
    if boxes.dtype in (torch.float16, torch.bfloat16):
        boxes = boxes.float()  # a half cannot count many images
    image = boxes[..., :1].trunc()
    first = torch.arange(len(boxes), device=boxes.device, dtype=boxes.dtype)[:, None, None] * num_images
    named = torch.where((image >= 0) & (image < num_images), image + first, num_images * len(boxes))
    named = torch.where((image == -1) | image.isnan(), image, named)
    return torch.cat([named, boxes[..., 1:]], -1)
