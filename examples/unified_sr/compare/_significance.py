"""Every method of a task against the best baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ._collect import Group
from ._statistics import Paired, holm, paired

OWN = "gems"
"""Methods whose name starts with this are what is compared with baselines; all others are baselines."""


@dataclass(frozen=True)
class Significance:
    """A method against the baseline of a task.

    Args:
        label: of the method.
        baseline: label of the baseline.
        test: the paired tests; ``None`` where the two share fewer than two queries.
        t_test: Holm's adjusted p-value of the t-test, over all methods of the task.
        permutation: likewise of the permutation test.
    """

    label: str
    baseline: str
    test: Paired | None
    t_test: float | None
    permutation: float | None


def significance(groups: Sequence[Group], task: str, metric: str, baseline: str | None = None) -> list[Significance]:
    """Test all methods against one, or against the best ones.

    Values of a query are averaged over the seeds first, so what is paired are queries and not runs.

    Args:
        groups: the methods.
        task: whose queries are compared.
        metric: of a query.
        baseline: label of the method that the others are compared with; without it, the best one that is no variant of
            GEMS, and then the best of these that trains a model, if that is another one. They are found on the same
            queries that they are tested on, so they are rather too good than too weak.

    Raises:
        ValueError: if there is no such method.
    """
    values = {group.label: group.per_query(task, metric) for group in groups}
    if baseline is not None and baseline not in values:
        raise ValueError(f"there is no method {baseline!r} to compare with; there are {', '.join(values)}")
    baselines = _best(groups, values) if baseline is None else [baseline]
    return [test for label in baselines for test in _against(label, values)]


def _best(groups: Sequence[Group], values: Mapping[str, Mapping[str, float]]) -> list[str]:
    others = [group for group in groups if values[group.label] and not group.method.startswith(OWN)]
    means = {group.label: sum(values[group.label].values()) / len(values[group.label]) for group in others}
    trained = [group.label for group in others if group.lr is not None]
    return list(dict.fromkeys(max(found, key=means.__getitem__) for found in (list(means), trained) if found))


def _against(baseline: str, values: Mapping[str, Mapping[str, float]]) -> list[Significance]:
    others = [label for label in values if label != baseline]
    tests = {label: paired(values[label], values[baseline]) for label in others}
    done = {label: test for label, test in tests.items() if test is not None}
    t_tests = dict(zip(done, holm([test.t_test for test in done.values()]), strict=True))
    permutations = dict(zip(done, holm([test.permutation for test in done.values()]), strict=True))
    return [
        Significance(label, baseline, tests[label], t_tests.get(label), permutations.get(label)) for label in others
    ]
