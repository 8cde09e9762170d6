from __future__ import annotations

from gradsub.layers import some
from gradsub.null_space._content import Content
from gradsub.null_space._statistics import Statistics


def residual_shares(content: Content, held_out: Content) -> dict[str, float]:
    """The share of each layer's energy in ``held_out`` that ``content`` leaves unprotected, for layers that both know.

    Raises:
        ValueError: no layer is in both, or a layer's features have another width or another ``normalize``.
    """
    known, others = content.shared.by_name, held_out.shared.by_name
    names = [name for name in known if name in others]
    if not names:
        raise ValueError(f"held_out knows {sorted(others)}, none of the layers here: {sorted(known)}")
    if uneven := held_out.shared.uneven(content.shared):
        here = content.shared.normalized[uneven[0]]
        raise ValueError(
            f"held_out has features of {some(uneven)} with normalize={not here}, here they are with normalize={here}: "
            f"collect it with normalize={here}"
        )
    shares: dict[tuple[int, int], float] = {}  # layers that share their statistics are looked at once
    keys = {name: (id(known[name]), id(others[name])) for name in names}
    for name, key in keys.items():
        if key not in shares:
            shares[key] = _share(content, name, others[name])
    return {name: shares[key] for name, key in keys.items()}


def _share(content: Content, name: str, held_out: Statistics) -> float:
    protection = content.protection(name)
    if held_out.dimension != protection.dimension:
        raise ValueError(
            f"held_out has {held_out.dimension} features for {name!r}, here there are {protection.dimension}: "
            "collect it from the same model"
        )
    whole = held_out.energy()
    if not whole:
        return 0.0
    # A sketch's energy in a subspace is a lower bound: only K's gives an upper bound of what is left.
    if protection.complementary and not held_out.error:
        return min(1.0, max(0.0, held_out.energy(protection.held) / whole))
    return min(1.0, max(0.0, 1.0 - held_out.energy(content.basis(name, protection.held.dtype)) / whole))
