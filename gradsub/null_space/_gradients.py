from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradsub.layers import unwrap
from gradsub.null_space._collect import Observe, call, evaluating
from gradsub.subspace import is_distributed

Loss = Callable[[nn.Module, Any], Tensor]
Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Tensor | None]


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss that the model computes itself, as those of transformers do where the batch has labels."""
    loss = getattr(call(model, batch), "loss", None)
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"loss=None takes the model's own output.loss, but {type(model).__name__} returned none: put labels into "
            "the batches, or pass loss=, a function of the model and a batch"
        )
    return loss


def observe_gradients(model: nn.Module, batches: Iterable[Any], loss: Loss, observe: Observe) -> int:
    """Hand every vector's gradient, position by position, to ``observe(name, (N, d))``; how many batches ran.

    A module that scales or shifts its features has y_t[i] depend on v[i] alone, for every position t. So the gradient
    of v is a sum of a_t * dL/dy_t over the positions, with a_t = dy_t/dv entry by entry, and these rows are handed on.
    Vectors of which that does not hold, which the sum gives away, are left out with one warning.
    """
    model = unwrap(model)
    vectors = _vectors(model)
    watch = _Watch(vectors)
    count = 0
    with ExitStack() as stack:
        for module in model.modules():
            own = {key: p for key, p in module.named_parameters(recurse=False) if p in vectors}
            if own:
                hook = module.register_forward_hook(watch.hook(own), with_kwargs=True)
                stack.callback(hook.remove)
        stack.enter_context(evaluating(model))
        stack.enter_context(_only_these_train(model, vectors))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for batch in batches:
            value = loss(model, batch)
            if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
                found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"loss must return a scalar that depends on the model's norm weights or biases, found {found}"
                )
            gradients = torch.autograd.grad(value.sum(), list(vectors), allow_unused=True)
            for name, rows in watch.finish(dict(zip(vectors, gradients, strict=True))):
                observe(name, rows)
            count += 1
    if watch.left_out:
        warnings.warn(
            f"no gradients were collected for {sorted(watch.left_out)}: they are used outside of the modules that hold "
            "them, or these mix their entries. Nothing protects them; freeze them if they are to stay",
            stacklevel=6,
        )
    return count


class _Watch:
    """Sees a forward and a backward pass, and makes rows of what it saw."""

    def __init__(self, vectors: Mapping[nn.Parameter, str]) -> None:
        self._vectors = vectors
        self._rows: dict[nn.Parameter, list[Tensor]] = defaultdict(list)
        self._looking = True
        self.left_out: set[str] = set()

    def hook(self, own: Mapping[str, nn.Parameter]) -> Hook:
        """A forward hook for a module with these vectors, by their names there."""

        def hook(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> Tensor | None:
            if not self._looking or not isinstance(output, Tensor) or not output.requires_grad:
                return None
            self._looking = False  # the module is run again, and that calls this hook
            try:
                derivatives = {
                    parameter: _derivative(module, key, parameter, inputs, named) for key, parameter in own.items()
                }
            finally:
                self._looking = True

            def take(gradient: Tensor) -> None:
                for parameter, derivative in derivatives.items():
                    if derivative.shape[-1:] == parameter.shape:
                        rows = (gradient.detach() * derivative).reshape(-1, parameter.numel())
                        self._rows[parameter].append(rows)

            output.register_hook(take)  # type: ignore[no-untyped-call]
            # An activation in place would take the place of the output, and the hook would be gone.
            return output.clone()

        return hook

    def finish(self, gradients: Mapping[nn.Parameter, Tensor | None]) -> Iterator[tuple[str, Tensor]]:
        """The rows of every vector that add up to its gradient."""
        for parameter, gradient in gradients.items():
            found, name = self._rows.pop(parameter, []), self._vectors[parameter]
            if gradient is None:
                continue  # the loss does not depend on it
            if not found:
                self.left_out.add(name)
                continue
            rows = torch.cat(found)
            wide = torch.promote_types(rows.dtype, torch.float32)
            missing = rows.sum(0, dtype=wide) - gradient
            tolerance = max(1e-3, 8 * torch.finfo(gradient.dtype).eps)
            if bool(missing.norm() > tolerance * rows.abs().sum(0, dtype=wide).norm()):
                self.left_out.add(name)
                continue
            yield name, rows


def _derivative(
    module: nn.Module, key: str, parameter: nn.Parameter, inputs: tuple[Any, ...], named: Mapping[str, Any]
) -> Tensor:
    """dy_t[i] / dv[i] of a module's output y, by differentiating u -> u^T dy/dv, which is linear in u."""
    vector = parameter.detach().requires_grad_()
    arguments = tuple(map(_detached, inputs))
    options = {name: _detached(value) for name, value in named.items()}
    output: Tensor = torch.func.functional_call(module, {key: vector}, arguments, options)
    direction = torch.zeros_like(output, requires_grad=True)
    (pulled,) = torch.autograd.grad(output, vector, direction, create_graph=True)
    (found,) = torch.autograd.grad(pulled, direction, torch.ones_like(pulled))
    return found


def _vectors(model: nn.Module) -> dict[nn.Parameter, str]:
    """What the model has of them, by the names under which an optimizer asks for what is protected."""
    found = {
        parameter: name.removesuffix(".weight")
        for name, parameter in model.named_parameters()
        if parameter.ndim == 1 and parameter.is_floating_point()
    }
    if not found:
        raise ValueError("the model has no norm weights and no biases: there is nothing to collect gradients of")
    sharded = [name for parameter, name in found.items() if is_distributed(parameter)]
    if sharded:
        raise ValueError(f"{sharded[0]} is sharded: collect gradients before fully_shard, or load what was saved")
    return found


@contextmanager
def _only_these_train(model: nn.Module, vectors: Mapping[nn.Parameter, str]) -> Iterator[None]:
    training = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for parameter in training:
        parameter.requires_grad_(parameter in vectors)
    try:
        yield
    finally:
        for parameter, before in training.items():
            parameter.requires_grad_(before)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
