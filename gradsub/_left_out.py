"""What of a model and of a base optimizer is not decomposed although one might think so."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from gradsub.layers import named_layers, named_parameters, other_matrices


class LeftOut(NamedTuple):
    """Parameters by name, and what to say of them; ``{names}`` and ``{share}`` stand for themselves in it.

    What a null space knows is said with the null space, unless it is to be said in any case. ``reason`` is the same in
    a few words, of one of them.
    """

    parameters: Mapping[str, Tensor]
    message: str
    reason: str
    always: bool = False


_ABSENT = (
    "{names} of target_modules require gradients, but are not among the base optimizer's parameters: they are not "
    "decomposed. Give them to it, freeze them, or leave them out of target_modules"
)
_COMPUTED = (
    "the weights of {names} are computed from other parameters (parametrized, normalised or pruned): these take the "
    "plain inner step and are not decomposed. Make the weight permanent, or leave the layer out of target_modules"
)
_MATRICES = (
    "{names} ({share} of the trained weights) are matrices outside of linear layers, such as fused experts: they are "
    "not decomposed, take the plain inner step and are not protected by any null space. Freeze them, or give their "
    "group subspace=False if that is meant"
)
_OUTSIDE = (
    "{names} ({share} of the trained weights) are matrices of the base optimizer that model= does not have: they are "
    "not decomposed, take the plain inner step and are not protected by any null space. Pass a model that has them, or "
    "give their group subspace=False if that is meant"
)
_NOTHING = (
    "none of the layers that target_modules names ({names}) has its weight among the base optimizer's parameters: "
    "nothing is decomposed, and every step is the base optimizer's own"
)


def left_out(
    model: nn.Module,
    target_modules: str | Iterable[str],
    given: Mapping[Tensor, bool],
    targets: Mapping[Tensor, str],
    computed: Collection[str],
    name: Callable[[Tensor], str],
) -> Iterator[LeftOut]:
    """What is left out, by reason.

    Args:
        given: the base optimizer's parameters, and whether their group asks for subspaces.
        targets: the weights to decompose, and their layers' names.
        computed: layers whose weight is no parameter.

    Raises:
        ValueError: the base optimizer trains another copy of the model.
    """
    own = {parameter for _, parameter in named_parameters(model)}
    outside = {name(p): p for p, subspace in given.items() if p not in own and subspace and smaller_side(p) > 1}
    shared = sum(parameter in own for parameter in given)
    decomposed = any(parameter in given for parameter in targets)
    if not shared or (outside and targets and not decomposed):
        raise ValueError(
            f"model= has {shared} of the base optimizer's {len(given)} parameters and no layer to decompose among "
            "them: it is another copy of the model (a deepcopy, or one that was loaded, moved or sharded since). Build "
            "the base optimizer from the parameters of the model= that you pass"
        )
    yield LeftOut(outside, _OUTSIDE, "model= does not have it")
    absent = {layer: p for p, layer in targets.items() if p not in given and p.requires_grad}
    yield LeftOut(
        absent, _ABSENT, "target_modules names it and it requires a gradient, but the base optimizer does not have it"
    )
    if not decomposed and not absent:
        named = {layer: p for p, layer in targets.items()}
        yield LeftOut(named, _NOTHING, "the base optimizer does not have its weight", always=True)
    layers = dict(named_layers(model))
    sources = {layer: [p for p in layers[layer].parameters() if p.ndim > 1] for layer in computed}
    computed_from = {layer: ps[0] for layer, ps in sources.items() if any(map(given.get, ps))}
    yield LeftOut(computed_from, _COMPUTED, "its weight is computed from other parameters")
    matrices = other_matrices(model, target_modules)
    trained = {called: p for called, p in matrices.items() if _trained(p, given) and p not in targets}
    yield LeftOut(trained, _MATRICES, "it is a matrix outside of linear layers")


def _trained(parameter: Tensor, given: Mapping[Tensor, bool]) -> bool:
    return bool(given.get(parameter)) and parameter.requires_grad and smaller_side(parameter) > 1


def smaller_side(parameter: Tensor) -> int:
    """min(m, n) of the weight as a matrix; 0 of a vector."""
    rows = parameter.shape[0] if parameter.ndim > 1 else 0
    return min(rows, parameter.numel() // rows) if rows else 0
