from __future__ import annotations

from collections.abc import Iterable

from gradsub.layers import some
from gradsub.null_space._content import Content


def normalization(content: Content, names: Iterable[str], normalize: bool | None) -> bool:
    """Whether features of these layers are divided by their norm: as before, or as asked for.

    Args:
        content: what is known of layers so far; none of them may mix features of both kinds.
        names: the layers to collect.
        normalize: what was asked for; None: as before, else yes unless the threshold, an absolute eigenvalue, decides.

    Raises:
        ValueError: it was otherwise before, or None cannot be resolved.
    """
    shared = content.shared
    before = {name: shared.normalized.get(name) for name in names if name in shared.by_name}
    untold = [name for name, was in before.items() if was is None]
    if normalize is None:
        if untold:
            raise ValueError(
                f"normalize=None, and the file of an older version does not tell how {some(untold)} were collected:"
                " pass normalize=False or normalize=True, as then (False, unless it was given)"
            )
        found = set(before.values())
        if len(found) > 1:
            even = [name for name, was in before.items() if was]
            raise ValueError(
                f"normalize=None, but of the targeted layers only {some(even)} were collected with normalize=True: "
                "collect the others in a call of their own, by target_modules"
            )
        return bool(found.pop()) if found else content.criterion.threshold is None
    different = [name for name, was in before.items() if was is not None and was is not bool(normalize)]
    if different:
        raise ValueError(
            f"normalize={normalize}, but {some(different)} have features that came with normalize={not normalize}: "
            "leave it out to go on as before, or collect into a fresh NullSpace"
        )
    return bool(normalize)


def check_told(content: Content, other: Content) -> None:
    """Raise a ValueError if of one of the two alone it is known how the features of a layer in both came."""
    mine, theirs = content.shared, other.shared
    both = [name for name in theirs.by_name if name in mine.by_name]
    untold = [name for name in both if (name in mine.normalized) is not (name in theirs.normalized)]
    if untold:
        whose = "other" if untold[0] in mine.normalized else "this null space"
        raise ValueError(
            f"the file of an older version that {whose} comes from does not tell how {some(untold)} were collected, "
            "and features that were divided by their norms do not add up with others: collect anew, or add a batch to "
            "it with the normalize= of then, collect(model, batches, normalize=False) unless it was given, first"
        )
