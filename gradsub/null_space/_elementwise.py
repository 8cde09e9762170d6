from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_PROBED = 8  # positions; few, so that sums over them round little


class Unsuitable(ValueError):
    """Why a vector's gradient cannot be told apart by position."""


def derivative(
    module: nn.Module, key: str, parameter: nn.Parameter, inputs: tuple[Any, ...], named: Mapping[str, Any]
) -> Tensor | None:
    """a_t[i] = dy_t[i] / dv[i] of a module's output y, for a vector v on whose entry i only y_t[i] depends.

    u -> u^T dy/dv is linear in u, and its derivative along v = (1, ..., 1) is a. Whether v acts entry by entry is seen
    from a u that is zero but for some positions: then u^T dy/dv has to be sum_t u_t * a_t.

    Args:
        module: is run once more.
        key: the vector's name in it.
        parameter: v (d).

    Returns:
        a (..., d), or None if y does not depend on v.

    Raises:
        Unsuitable: entries are mixed, features are not on the last axis, or the module cannot be differentiated twice.
    """
    vector = parameter.detach().requires_grad_()
    arguments = tuple(map(_detached, inputs))
    options = {name: _detached(value) for name, value in named.items()}
    # Activation checkpointing around the module counts the tensors that are saved in it, and these are not its.
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        output = torch.func.functional_call(module, {key: vector}, arguments, options)
        if not isinstance(output, Tensor):
            raise Unsuitable("its module returns no single tensor")
        if not output.requires_grad:
            return None
        if output.shape[-1:] != parameter.shape:
            raise Unsuitable("its module's features are not on the last axis")
        direction = torch.zeros_like(output, requires_grad=True)
        (pulled,) = torch.autograd.grad(output, vector, direction, create_graph=True, allow_unused=True)
        if pulled is None:
            return None
        if not pulled.requires_grad:
            raise Unsuitable("its module cannot be differentiated twice")
        (found,) = torch.autograd.grad(pulled, direction, torch.ones_like(pulled), retain_graph=True)
        probe = _probe(output)
        (expected,) = torch.autograd.grad(output, vector, probe)
    wide = torch.promote_types(output.dtype, torch.float32)
    terms = (probe.to(wide) * found.to(wide)).reshape(-1, parameter.numel())
    resolution = max(torch.finfo(kind).eps for kind in dtypes_of(output, inputs, parameter))
    if bool((terms.sum(0) - expected).norm() > 16 * resolution * terms.abs().sum(0).norm()):
        raise Unsuitable("its module mixes its entries")
    return found


def dtypes_of(output: Tensor, inputs: tuple[Any, ...], parameter: Tensor) -> set[torch.dtype]:
    """The floating dtypes that a module's forward pass has met."""
    met = (output, parameter, *(value for value in inputs if isinstance(value, Tensor)))
    return {tensor.dtype for tensor in met if tensor.is_floating_point()}


def _probe(output: Tensor) -> Tensor:
    """Numbers without a pattern at a few positions, zeros elsewhere; torch's generator is left alone."""
    rows = torch.zeros_like(output).reshape(-1, output.shape[-1])
    count = min(_PROBED, len(rows))
    angles = torch.arange(1, count * rows.shape[1] + 1, device=output.device, dtype=torch.float32)
    rows[:count] = (angles.square() * 0.7).cos().to(rows.dtype).view(count, -1)
    return rows.view(output.shape)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
