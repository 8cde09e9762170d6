"""From runs to tables of text: a number with its spread over the seeds, the best in bold, or a dash."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..tables import difference, without
from ._groups import names_of, perplexity_change, score, tasks_of

SHOWN = ("hit@10", "ndcg@10", "mrr@10", "gems_ndcg@10", "gems_map@10")
"""Metrics of the tables, those of ``compat: gems`` where a run has them; the Parquet files hold all."""

NAMES = {"hit": "Hit", "ndcg": "NDCG", "mrr": "MRR", "map": "MAP", "gems_ndcg": "NDCG gems", "gems_map": "MAP gems"}
LAST_STEPS = 5
"""Steps over which a training loss is averaged: one batch's says little."""

BY_RATE = ("seed", "training.lr", "evaluation.split")
"""Settings that differ between a run and the trials that chose its rate, or between these."""

ELSEWHERE = ("method.name", "seed", "training.lr")
"""Settings that stand in other tables."""

DASH = "–"


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        title: what it shows.
        note: what a reader must know.
        cells: texts, of which ``**...**`` is bold.
    """

    title: str
    note: str
    cells: pd.DataFrame


def tables_of(
    runs: pd.DataFrame, steps: pd.DataFrame, trials: pd.DataFrame, tests: Mapping[str, pd.DataFrame], metric: str
) -> list[Table]:
    """Return the tables of one data set.

    Args:
        runs: with a column ``group``.
        steps: rows of ``steps.parquet``.
        trials: rows of ``runs.parquet`` that evaluated the validation split.
        tests: task -> tests of ``against``.
        metric: that was tested.
    """
    spread = f"Mean and standard deviation over the seeds; {DASH} was not measured."
    negatives = ", ".join(map(str, sorted(set(runs["negatives"]))))
    tables = [
        Table("Full ranking", f"All items of the catalogue but those seen before. {spread}", _ranking(runs, "{}_{}")),
        Table("Retention and cost", f"On general text, and of the training. {spread}", _cost(runs, steps)),
        *_tests(tests, metric),
        Table(
            "Sampled ranking",
            f"The target among 1 + {negatives} random items: inflated, only for comparison with literature. {spread}",
            _ranking(runs, "{}_sampled_{}"),
        ),
        Table(
            "Rates",
            f"Mean over the tasks of {title_of(metric)} on the validation split, and the change of perplexity, by peak "
            f"learning rate; bold: the rate of the runs above. {DASH} was not tried, or diverged.",
            _rates(runs, trials, metric),
        ),
        Table("Settings that differ", "Where two methods that have a setting differ in it.", _differences(runs)),
    ]
    return [table for table in tables if len(table.cells) and len(table.cells.columns) > 1]


def title_of(metric: str) -> str:
    """Return how tables call a metric.

    Example:
        >>> title_of("gems_ndcg@10")
        'NDCG gems@10'
    """
    name, at, depth = metric.partition("@")
    return f"{NAMES.get(name, name)}{at}{depth}"


def _ranking(runs: pd.DataFrame, pattern: str) -> pd.DataFrame:
    columns = {f"{task} {title_of(name)}": pattern.format(task, name) for task in tasks_of(runs) for name in SHOWN}
    return _table(runs, {title: _spread(runs, name, best=True) for title, name in columns.items() if name in runs})


def _cost(runs: pd.DataFrame, steps: pd.DataFrame) -> pd.DataFrame:
    ends = steps.groupby("run", observed=True).tail(LAST_STEPS).groupby("run", observed=True).mean(numeric_only=True)
    cosines = [name for name in steps.columns if name.startswith("cosines_")]
    cosine = steps.groupby("run", observed=True)[cosines].mean().mean(axis=1)
    peak = runs["peak_device"].fillna(runs["peak_resident"]) / 2**30
    machine = runs["device"].astype(str) + ", threads: " + runs["threads"].astype(str)
    runs = runs.assign(
        change=perplexity_change(runs),
        cosine=runs["run"].astype(str).map(cosine.rename(str)),
        peak=peak,
        **{f"end_{name}": runs["run"].astype(str).map(ends[name].rename(str)) for name in ends if "loss_" in name},
    )
    columns = {
        "perplexity": _spread(runs, "perplexity", ".2f"),
        "change, %": _spread(runs, "change", "+.1f"),
        "multiple choice": _spread(runs, "multiple_choice"),
        "multiple choice raw": _spread(runs, "multiple_choice_raw"),
        "leak": _spread(runs, "leak", ".1e"),
        **{
            f"{task} loss, last {LAST_STEPS} steps": _spread(runs, f"end_loss_{task}", ".2f")
            for task in tasks_of(runs)
            if f"end_loss_{task}" in runs
        },
        "cosine": _spread(runs, "cosine", "+.2f"),
        "lr": _spread(runs, "lr", "g", deviation=False),
        "steps": _spread(runs[runs["lr"].notna()], "steps", ".0f"),
    }
    # Times of different machines have no common mean.
    machines = sorted(set(machine[runs["seconds_per_step"].notna()]))
    for each in machines:
        name = "s/step" if len(machines) == 1 else f"s/step ({each})"
        columns[name] = _spread(runs[machine == each], "seconds_per_step", ".2f")
    return _table(runs, {**columns, "peak GiB": _spread(runs, "peak", ".2f")})


def _table(runs: pd.DataFrame, columns: Mapping[str, pd.Series]) -> pd.DataFrame:
    """A row a group; columns of dashes alone are left out."""
    seeds = runs.groupby("group", sort=False).size()
    cells = pd.DataFrame(columns).reindex(seeds.index).fillna(DASH)
    cells = cells.loc[:, (cells != DASH).any()]
    cells.insert(0, "seeds", seeds.astype(str))
    return cells.reset_index(names="method")


def _spread(
    runs: pd.DataFrame, name: str, form: str = ".4f", *, best: bool = False, deviation: bool = True
) -> pd.Series:
    """Group -> mean and deviation of a column as text; a group without a value is absent."""
    values = runs.assign(value=runs[name].replace([np.inf, -np.inf], np.nan)).dropna(subset="value")
    found = values.groupby("group", sort=False)["value"].agg(["mean", "std"])
    texts = {}
    for group, mean, std in found.itertuples():
        text = format(mean, form)
        if deviation and not np.isnan(std):
            text += f" ± {format(std, form.lstrip('+'))}"
        texts[group] = f"**{text}**" if best and mean == found["mean"].max() else text
    return pd.Series(texts, dtype=str)


def _tests(tests: Mapping[str, pd.DataFrame], metric: str) -> list[Table]:
    forms = {"queries": "d", "difference": "+.4f", "t_test": ".2g", "t_test_holm": ".2g"}
    forms |= {"permutation": ".2g", "permutation_holm": ".2g"}
    titles = ("queries", "difference", "p (t-test)", "with Holm", "p (permutation)", "with Holm")
    tables = []
    for task, found in tests.items():
        for baseline, family in found.groupby("baseline", sort=False):
            cells = pd.DataFrame(
                {name: family[name].map(lambda x, form=form: _number(x, form)) for name, form in forms.items()}
            )
            cells.columns = pd.Index(titles)
            cells.insert(0, "method", family["group"])
            tables.append(
                Table(
                    f"{task}: {title_of(metric)} against {baseline}",
                    "Two-sided paired tests over queries, whose values are averaged over the seeds first; Holm's "
                    "correction counts all methods of this table.",
                    cells,
                )
            )
    return tables


def _rates(runs: pd.DataFrame, trials: pd.DataFrame, metric: str) -> pd.DataFrame:
    """A row a group of trials, by settings as the runs; trials of several seeds count with their mean."""
    found = trials.assign(score=score(trials, metric), change=perplexity_change(trials)).dropna(subset=["score", "lr"])
    found = found[found["label"].isin(set(runs["label"]))]
    found = found.assign(same=[without(text, BY_RATE) for text in found["settings"]])
    found["group"] = names_of(found["label"], found["same"])
    chosen = {(label, lr) for label, lr in zip(runs["label"], runs["lr"], strict=True)}
    trained = {without(text, BY_RATE) for text in runs["settings"]}
    order = {label: place for place, label in enumerate(runs["label"].drop_duplicates())}
    firsts = found.drop_duplicates("group").sort_values("label", key=lambda labels: labels.map(order), kind="stable")
    cells = pd.DataFrame(DASH, index=pd.Index(firsts["group"]), columns=[f"{lr:g}" for lr in sorted(set(found["lr"]))])
    for (group, lr), members in found.groupby(["group", "lr"]):
        value, change = members["score"].mean(), members["change"].mean()
        text = _number(value, ".4f") + ("" if np.isnan(change) else f" ({_change(change)})")
        first = members.iloc[0]
        # Trials may have settings of their own; where a label has several kinds, the runs' own kind is theirs.
        own = first["same"] in trained or first["label"] == group
        cells.loc[group, f"{lr:g}"] = f"**{text}**" if own and (first["label"], lr) in chosen else text
    return cells.rename_axis(index=None).reset_index(names="method")


def _differences(runs: pd.DataFrame) -> pd.DataFrame:
    """A row a setting, so that a long list of methods stays readable."""
    firsts = runs.drop_duplicates("group")
    rows = []
    for name, values in difference(list(firsts["settings"]), ELSEWHERE).items():
        by_value: dict[str, list[str]] = {}
        for group, settings, value in zip(firsts["group"], firsts["settings"], values, strict=True):
            if name in json.loads(settings):
                by_value.setdefault(json.dumps(value), []).append(group)
        most = max(by_value, key=lambda value: len(by_value[value]))
        others = "; ".join(f"{value}: {', '.join(groups)}" for value, groups in by_value.items() if value != most)
        rows.append((name, most, others))
    return pd.DataFrame(rows, columns=["setting", "most", "others"])


def _change(percent: float) -> str:
    return f"{percent:+.1f} %" if percent < 1000 else f"{1 + percent / 100:,.0f}-fold"


def _number(value: float, form: str) -> str:
    return DASH if pd.isna(value) else format(value, form)
