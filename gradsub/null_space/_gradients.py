from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradsub.layers import named_parameters
from gradsub.null_space._elementwise import Unsuitable, derivative, dtypes_of
from gradsub.null_space._features import Observe, call, eager, evaluating
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


def observe_gradients(
    model: nn.Module, batches: Iterable[Any], loss: Loss, observe: Observe
) -> tuple[int, Mapping[str, str]]:
    """Hand every vector's gradient, position by position, to ``observe(name, (N, d))``.

    A module that scales or shifts its features has y_t[i] depend on v[i] alone, for every position t. So the gradient
    of v is the sum of a_t * dL/dy_t over the positions, with a_t = dy_t/dv entry by entry, and these rows are handed
    on.

    Returns:
        how many batches ran; and by name, why a vector is to be left out, of which rows may have been handed on before
        that was seen.
    """
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
        stack.enter_context(eager())
        stack.enter_context(_only_these_train(model, vectors))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for batch in batches:
            value = _checked(loss(model, batch))
            gradients = torch.autograd.grad(value.sum(), list(vectors), allow_unused=True)
            for name, rows in watch.finish(dict(zip(vectors, gradients, strict=True))):
                observe(name, rows)
            count += 1
    return count, {vectors[parameter]: reason for parameter, reason in watch.left_out.items()}


def _checked(value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"loss must return a scalar tensor, found {found}: reduce it over positions, best by a sum")
    if not value.requires_grad:
        raise ValueError(
            "loss returned a tensor without a graph: it does not depend on the model's norm weights and biases, or was "
            "computed under no_grad, detached, or by reentrant activation checkpointing; compute it with a graph"
        )
    return value


class _Watch:
    """Sees a forward and a backward pass, and makes rows of what it saw."""

    def __init__(self, vectors: Mapping[nn.Parameter, str]) -> None:
        self._vectors = vectors
        self._rows: dict[nn.Parameter, list[Tensor]] = defaultdict(list)
        self._dtypes: dict[nn.Parameter, set[torch.dtype]] = defaultdict(set)
        self._looking = True
        self.left_out: dict[nn.Parameter, str] = {}

    def hook(self, own: Mapping[str, nn.Parameter]) -> Hook:
        """A forward hook for a module with these vectors, by their names there."""

        def hook(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> Tensor | None:
            if not self._looking or not torch.is_grad_enabled():
                return None
            self._looking = False  # the module is run again, and that calls this hook
            try:
                derivatives = self._derivatives(module, own, inputs, named)
            finally:
                self._looking = True
            if not derivatives or not isinstance(output, Tensor) or not output.requires_grad:
                return None
            for parameter in derivatives:
                self._dtypes[parameter] |= dtypes_of(output, inputs, parameter)

            def see(gradient: Tensor) -> None:
                wide = torch.promote_types(gradient.dtype, torch.float32)
                for parameter, along in derivatives.items():
                    self._dtypes[parameter].add(gradient.dtype)
                    rows = gradient.detach().to(wide) * along.to(wide)
                    self._rows[parameter].append(rows.reshape(-1, parameter.numel()))

            output.register_hook(see)  # type: ignore[no-untyped-call]
            # An activation in place would take the place of the output, and the hook would be gone.
            return output.clone()

        return hook

    def _derivatives(
        self, module: nn.Module, own: Mapping[str, nn.Parameter], inputs: tuple[Any, ...], named: Mapping[str, Any]
    ) -> dict[nn.Parameter, Tensor]:
        derivatives = {}
        for key, parameter in own.items():
            if parameter in self.left_out:
                continue
            try:
                found = derivative(module, key, parameter, inputs, named)
            except Unsuitable as reason:
                self.left_out[parameter] = str(reason)
                continue
            if found is not None:
                derivatives[parameter] = found
        return derivatives

    def finish(self, gradients: Mapping[nn.Parameter, Tensor | None]) -> Iterator[tuple[str, Tensor]]:
        """The rows of every vector that add up to its gradient."""
        for parameter, gradient in gradients.items():
            found = self._rows.pop(parameter, [])
            if gradient is None or parameter in self.left_out:
                continue  # the loss does not depend on it, or it is known to be unsuitable
            rows = torch.cat(found) if found else gradient.new_zeros(1, parameter.numel())
            missing = rows.sum(0) - gradient
            # Gradients below float32 are sums that autograd has rounded; a use elsewhere stands out all the same.
            tolerance = 1e-3 if all(torch.finfo(kind).bits >= 32 for kind in self._dtypes[parameter]) else 0.25
            if bool(missing.norm() > tolerance * rows.abs().sum(0).norm()):
                self.left_out[parameter] = "it is used outside of its module"
                continue
            yield self._vectors[parameter], rows


def _vectors(model: nn.Module) -> dict[nn.Parameter, str]:
    """What the model has of them, by the names under which an optimizer asks for what is protected."""
    found: dict[nn.Parameter, str] = {}
    for name, parameter in named_parameters(model):
        if parameter.ndim == 1 and parameter.is_floating_point():
            found.setdefault(parameter, name.removesuffix(".weight"))
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
