"""Whether what a layer multiplies by is its decomposed weight, and nothing that moves otherwise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradsub.capture import can_fuse
from gradsub.null_space._features import evaluating

# What may move of an answer that must stay, as a share of what moves of others: more than rounding of low precision.
_TOLERANCE = 0.05
_ROWS = 8


def own_weight(module: nn.Module) -> nn.Parameter | None:
    """The weight if it is a parameter; None if it is computed from others: parametrized, normalised or pruned."""
    return module._parameters.get("weight")


def is_bias(name: str) -> bool:
    """Whether a parameter of a linear layer is its bias, or what that is computed from."""
    return name.startswith(("bias", "parametrizations.bias."))


def depends_on_parameters(module: nn.Module) -> bool:
    """Whether a weight that is no parameter of the module was computed from some that train."""
    with torch.enable_grad(), evaluating(module):  # or spectral normalisation would go on in its estimate
        weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.requires_grad


def carries_protection(module: nn.Module, input_side: bool, transposed: bool) -> bool:
    """Whether the module answers protected inputs as before when its weight moves in their null space.

    A linear layer does, and one whose forward pass another library has wrapped; one that computes with something else
    than its weight, as weight standardisation does, does not. It is tried where it cannot be known: with a large change
    D that satisfies D k = 0 for a random input k, or k^T D = 0 for a random direction k of outputs.

    Args:
        input_side: whether inputs are protected, or outputs.
        transposed: whether the weight is ``in_features x out_features``.
    """
    weight = own_weight(module)
    if weight is None or can_fuse(module):
        return weight is not None
    noise = _noise_like(weight)
    W = weight.detach()
    change = noise(*W.shape) * (W.square().mean().sqrt() if bool(W.any()) else 1.0)
    axis = 1 if input_side != transposed else 0
    k = F.normalize(noise(W.shape[axis]), dim=0)
    in_the_way = torch.outer(k, k @ change.movedim(axis, 0))
    obedient = change - (in_the_way.mT if axis == 1 else in_the_way)
    x = k[None] if input_side else noise(_ROWS, W.shape[0 if transposed else 1])
    with torch.no_grad(), evaluating(module):
        before, after, free = (
            torch.func.functional_call(module, {"weight": W + step}, (x,)) for step in (0.0, obedient, change)
        )
    moved, most = ((y - before if input_side else (y - before) @ k).norm() for y in (after, free))
    return bool(moved <= _TOLERANCE * most)


def adapts_as_told(outer: nn.Module, held: Mapping[nn.Module, bool], input_side: bool) -> bool:
    """Whether a module answers protected inputs as before when the layers in it move in the null spaces of theirs.

    LoRA's does: B A x stays if A moves off x and B off A x. DoRA's does not, which divides by the norm of W + B A.

    Args:
        held: its layers that move, and whether their weight is ``in_features x out_features``.
        input_side: whether inputs are protected, or outputs.
    """
    weights = {layer: weight for layer in held if (weight := own_weight(layer)) is not None}
    like = next(iter(weights.values()))
    noise = _noise_like(like)
    inputs: dict[nn.Module, Tensor] = {}
    handles = [layer.register_forward_hook(lambda layer, given, _: inputs.update({layer: given[0]})) for layer in held]
    kept = {layer: weight.detach().clone() for layer, weight in weights.items()}
    devices = [like.device] if like.is_cuda else []
    try:
        with torch.random.fork_rng(devices), torch.no_grad(), evaluating(outer):
            width = next(layer.in_features for layer in outer.modules() if isinstance(layer, nn.Linear))
            x = noise(1 if input_side else _ROWS, width)
            before = outer(x)
            out = F.normalize(noise(before.shape[-1]), dim=0)
            answers = []
            for obeys in (True, False):
                for layer, transposed in held.items():
                    W = kept[layer].mT if transposed else kept[layer]
                    change = noise(*W.shape) * 0.5 / W.shape[1] ** 0.5
                    if obeys and input_side:
                        k = F.normalize(inputs[layer].reshape(-1, W.shape[1])[0], dim=0)
                        change = change - torch.outer(change @ k, k)
                    elif obeys:
                        k = out if W.shape[0] == len(out) else F.normalize(noise(W.shape[0]), dim=0)
                        change = change - torch.outer(k, k @ change)
                    weights[layer].copy_((W + change).mT if transposed else W + change)
                answers.append(outer(x) - before)
                for layer, W in kept.items():
                    weights[layer].copy_(W)
        moved, most = ((y if input_side else y @ out).norm() for y in answers)
        return bool(moved <= _TOLERANCE * most)
    except Exception:
        return False  # it takes or returns something else
    finally:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for layer, W in kept.items():
                weights[layer].copy_(W)


def stands_for(outer: nn.Module, layer: nn.Module, frozen: bool) -> bool:
    """Whether ``outer`` stands in the layer's place, as adapters do: it answers the layer's inputs, and by its means.

    Either it adds something to the layer's own answer; or, where the layer is frozen, it is affine as a linear layer is
    and of the same widths, whatever it makes of the layer's weight. Blocks of a model are neither.
    """
    weight = own_weight(layer)
    if weight is None or weight.ndim != 2:
        return False
    noise = _noise_like(weight)
    first, second = noise(2, _ROWS, weight.shape[1])
    x = torch.cat([first, second, first + second, torch.zeros_like(first)])
    added: Tensor | float = 0.0
    asked: list[Any] = []

    def see(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        asked.append(inputs[0])
        return output + added

    handle = layer.register_forward_hook(see)
    try:
        # A module that draws random numbers itself may not change what the user draws next.
        with torch.random.fork_rng([weight.device] if weight.is_cuda else []), torch.no_grad(), evaluating(outer):
            plain = outer(x)
            added = noise(*plain.shape).to(plain)  # of another shape, the sum fails
            moved = outer(x) - plain
        if torch.equal(asked[0], x) and bool((moved - added).norm() <= _TOLERANCE * added.norm()):
            return True
        one, other, both, none = plain.chunk(4)
        bent = (one + other - both - none).norm()
        return frozen and plain.shape == (len(x), weight.shape[0]) and bool(bent <= _TOLERANCE * (one - none).norm())
    except Exception:
        return False  # it takes or returns something else
    finally:
        handle.remove()


def _noise_like(like: Tensor) -> Callable[..., Tensor]:
    """Draws normal numbers of any shape in a tensor's format and place; torch's own generators are left alone."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu").to(like)
