"""Finished runs side by side: what is one row, what is tested, and that nothing missing passes for 0."""

from __future__ import annotations

import doctest
import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from run_files import BAD, FAIR, GOOD, QUERIES, write_grid, write_run

from examples.unified_sr.cli import main
from examples.unified_sr.compare import _render, _tables, compare, group_runs
from examples.unified_sr.compare._groups import tasks_of
from examples.unified_sr.compare._render import escape, latex_table, markdown
from examples.unified_sr.compare._tables import DASH, Table, tables_of
from examples.unified_sr.compare._tests import LANGUAGE_MODEL, against, baselines_of, values_of
from examples.unified_sr.config import read_config
from examples.unified_sr.metrics import query_metrics
from examples.unified_sr.run_folder import CONFIG, DONE
from examples.unified_sr.tables import gather, pack

Frame = pd.DataFrame


class World:
    """The runs of some folders that evaluated the test split, grouped, and what belongs to them."""

    def __init__(self, *folders: Path, metric: str = "ndcg@10") -> None:
        runs, self.steps, self.queries = gather(folders)
        self.trials = runs[runs["split"] == "valid"]
        self.runs = group_runs(runs[runs["split"] == "test"], metric)

    def values(self, task: str, metric: str = "ndcg@10") -> Frame:
        return values_of(self.runs, self.queries, task, metric)

    def baselines(self, task: str) -> list[str]:
        return list(dict.fromkeys(baselines_of(self.runs, self.values(task), tasks_of(self.runs)).values()))

    def tables(self) -> dict[str, Frame]:
        found = tables_of(self.runs, self.steps, self.trials, {}, "ndcg@10")
        return {table.title: table.cells.set_index(table.cells.columns[0]) for table in found}


def test_runs_that_differ_by_the_seed_are_one_row(tmp_path: Path) -> None:
    runs = World(write_grid(tmp_path)).runs
    assert runs.groupby("group").size().to_dict() == {
        "adamw": 2, "bm25": 1, "gems": 2, "half_protected": 2, "lora": 1,
    }  # fmt: skip
    firsts = runs.drop_duplicates("group").set_index("group")
    assert firsts.loc["half_protected", "method"] == "gems"
    assert firsts.loc["gems", "lr"] == 6e-4
    assert pd.isna(firsts.loc["bm25", "lr"])


def test_values_of_a_query_are_averaged_over_the_seeds(tmp_path: Path) -> None:
    world = World(write_grid(tmp_path))
    found = world.values("rec", "mrr@10")["gems"]
    assert found["rec-0"] == pytest.approx((1 + 1 / 2) / 2)
    assert found["rec-29"] == pytest.approx((1 / 2 + 1 / 3) / 2, rel=1e-6)
    assert world.values("rec", "none").empty
    assert world.values("absent", "mrr@10").empty


def test_outside_a_grid_settings_tell_runs_apart(tmp_path: Path) -> None:
    for number, rate in enumerate(("method.energy=0.5", "method.energy=0.6")):
        write_run(tmp_path / f"run{number}", "gems", ranks={"rec": GOOD}, pairs=(rate,))
    write_run(tmp_path / "other", "adamw", ranks={"rec": GOOD})
    assert set(World(tmp_path).runs["group"]) == {"gems (method.energy=0.5)", "gems (method.energy=0.6)", "adamw"}


def without(folder: Path, key: str) -> Path:
    """The run as a revision would have left it that did not know a setting."""
    settings = read_config(folder / CONFIG)
    del settings[key]
    (folder / CONFIG).write_text(yaml.safe_dump(settings), encoding="utf-8")
    return folder


@pytest.mark.parametrize("packed", [False, True])
def test_a_setting_that_one_run_lacks_tells_it_from_those_with_another_value(tmp_path: Path, packed: bool) -> None:
    places = [tmp_path / name / "gems" / "seed-0" for name in ("old", "same", "new")]
    write_run(places[0], "gems", ranks={"rec": BAD})
    write_run(places[1].with_name("seed-1"), "gems", 1, ranks={"rec": BAD})
    write_run(places[2], "gems", ranks={"rec": GOOD}, pairs=("model.format=sequence",))
    without(places[0], "model.format")
    folders = [place.parents[1] for place in places]
    if packed:
        for folder in folders:
            pack([folder], folder)
    runs = World(*folders).runs
    assert runs.groupby("group").size().to_dict() == {
        "gems (model.format=prompt)": 2,
        "gems (model.format=sequence)": 1,
    }


def test_one_run_of_two_revisions_is_refused_and_replaced_in_packing(tmp_path: Path) -> None:
    pack([without(write_run(tmp_path / "old", "gems", ranks={"rec": BAD}), "model.format")], tmp_path / "packed")
    new = write_run(tmp_path / "new", "gems", ranks={"rec": GOOD})
    with pytest.raises(ValueError, match="is given twice, with the same settings and seed; leave one out"):
        World(tmp_path / "packed", new)
    pack([new], tmp_path / "packed")
    assert len(World(tmp_path / "packed").runs) == 1


def test_a_setting_that_is_gone_tells_runs_apart(tmp_path: Path) -> None:
    for name in ("with", "without"):
        write_run(tmp_path / name, "gems", ranks={"rec": GOOD})
    file = tmp_path / "with" / CONFIG
    file.write_text(yaml.safe_dump({**read_config(file), "training.gone": 1}), encoding="utf-8")
    assert World(tmp_path).runs["group"].nunique() == 2


def test_rates_tell_runs_apart_too(tmp_path: Path) -> None:
    for number, rate in enumerate(("training.lr=1.0e-3", "training.lr=2.0e-3")):
        write_run(tmp_path / f"run{number}", "gems", ranks={"rec": GOOD}, pairs=(rate,))
    assert set(World(tmp_path).runs["group"]) == {"gems (training.lr=0.001)", "gems (training.lr=0.002)"}


def test_data_sets_whose_folders_have_one_name_are_two_unless_their_queries_are_the_same(tmp_path: Path) -> None:
    def write(folder: Path, method: str, seed: int, source: str, ranks: list[int]) -> None:
        after = {"gems": 41.0, "adamw": 44.0}[method]  # for the plot
        found = [rank + (method == "adamw") for rank in ranks]
        pairs = (f"data.source={source}/shop",)
        write_run(folder, method, seed, ranks={"rec": found}, pairs=pairs, perplexity=(40.0, after))

    for year, ranks in (("2014", GOOD), ("2018", FAIR[:20])):
        for method in ("gems", "adamw"):
            for seed in (0, 1):
                write(tmp_path / year / f"{method}-{seed}", method, seed, f"data/{year}", ranks)
    compare([tmp_path], tmp_path / "two", say=lambda line: None)
    rows = json.loads((tmp_path / "two" / "summary.json").read_text(encoding="utf-8"))
    assert {(row["data"], row["method"], row["seeds"]) for row in rows} == {
        (f"{year}/shop", method, 2) for year in ("2014", "2018") for method in ("gems", "adamw")
    }
    write(tmp_path / "elsewhere", "gems", 2, "/mnt", FAIR)
    compare([tmp_path / "2014", tmp_path / "elsewhere"], tmp_path / "one", say=lambda line: None)
    rows = json.loads((tmp_path / "one" / "summary.json").read_text(encoding="utf-8"))
    assert [row["data"] for row in rows] == ["shop"] * 3, "the run from elsewhere is a row of its own"


def test_trials_of_one_label_and_rate_that_differ_are_two_rows(tmp_path: Path) -> None:
    write_run(tmp_path / "x/gems/seed-0", "gems", ranks={"rec": GOOD}, pairs=("training.lr=6e-4", "training.steps=9"))
    for folder, steps, ranks in (("x", 9, GOOD), ("y", 5, BAD)):
        pairs = ("evaluation.split=valid", "training.lr=6e-4", f"training.steps={steps}")
        write_run(tmp_path / folder / "gems/lr-0.0006", "gems", ranks={"rec": ranks}, pairs=pairs)
    pairs = ("evaluation.split=valid", "training.lr=6e-4", "training.steps=5")
    write_run(tmp_path / "z/gems/lr-0.0006", "gems", 1, ranks={"rec": GOOD}, pairs=pairs)
    rates = World(tmp_path).tables()["Rates"]["0.0006"]
    values = {name: float(cell.strip("*").split()[0]) for name, cell in rates.items()}
    (good, bad) = (sum(query_metrics([rank], 1)["ndcg@10"] for rank in ranks) / QUERIES for ranks in (GOOD, BAD))
    assert values == {
        "gems (training.steps=9)": pytest.approx(good, abs=1e-4),
        "gems (training.steps=5)": pytest.approx((good + bad) / 2, abs=1e-4),
    }
    assert [name for name, cell in rates.items() if cell.startswith("**")] == ["gems (training.steps=9)"]


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", "gems", ranks={"rec": GOOD})
    other = write_run(tmp_path / "c", "adamw", ranks={"rec": FAIR}, pairs=("evaluation.users=3",))
    with pytest.raises(ValueError, match=r"evaluated differently: evaluation.users=.* in .*, evaluation.users=.* in"):
        compare([first, other], tmp_path / "out")
    pack([first, other], tmp_path / "packed")
    with pytest.raises(ValueError, match=r"evaluated differently: evaluation\.users="):
        compare([tmp_path / "packed"], tmp_path / "out")
    valid = write_run(tmp_path / "d", "adamw", ranks={"rec": FAIR}, pairs=("evaluation.split=valid",))
    with pytest.raises(ValueError, match="needs the test split"):
        compare([valid], tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="'none' is not there"):
        compare(["none"], tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no run"):
        compare([tmp_path / "empty"], tmp_path / "out")
    with pytest.raises(ValueError, match="there is no method 'ada' to compare with; there are gems"):
        compare([first], tmp_path / "out", baseline="ada")
    (first / DONE).unlink()
    with pytest.raises(ValueError, match=r"none of the runs in .* is finished"):
        compare([first], tmp_path / "out")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.md"))


def test_each_task_has_the_best_method_that_is_no_gems_as_its_baseline(tmp_path: Path) -> None:
    world = World(write_grid(tmp_path))
    assert world.baselines("rec") == ["adamw"]
    assert world.baselines("search") == ["lora"]
    assert world.baselines("absent") == []
    world.runs = world.runs[world.runs["method"] == "gems"]
    assert world.baselines("rec") == []


def test_baselines_of_three_kinds_stand_beside_each_other(tmp_path: Path) -> None:
    """The best of all, the best that trains a model, and the best language model that is trained on both tasks."""
    folder = write_grid(tmp_path / "runs")
    both = {"rec": GOOD, "search": GOOD}
    write_run(folder / "ease" / "seed-0", "ease", ranks={"rec": [1] * QUERIES}, perplexity=None)
    write_run(folder / "adamw-rec" / "seed-0", "adamw-rec", ranks=both)
    write_run(folder / "zero-shot" / "seed-0", "zero-shot", ranks=both)
    world = World(folder)
    assert world.baselines("rec") == ["ease", "adamw-rec", "adamw"]
    assert baselines_of(world.runs, world.values("rec"), tasks_of(world.runs))[LANGUAGE_MODEL] == "adamw"
    text = compare([folder], tmp_path / "out").read_text(encoding="utf-8")
    for name in ("ease", "adamw-rec", "adamw"):
        assert f"### rec: NDCG@10 against {name}\n" in text
    rows = {row["method"]: row for row in json.loads((tmp_path / "out/summary.json").read_text(encoding="utf-8"))}
    assert rows["adamw"]["p_rec"] is None
    assert rows["ease"]["p_rec"] < 0.05
    assert rows["adamw-rec"]["p_rec"] is not None


def test_all_methods_are_tested_against_the_baseline(tmp_path: Path) -> None:
    world = World(write_grid(tmp_path))
    values = world.values("rec")
    rec = against(values, ["adamw"]).set_index("group")
    assert set(rec.index) == {"gems", "half_protected", "lora", "bm25"}
    assert rec.loc["bm25", "queries"] == 0
    assert rec.loc["bm25"].drop(["queries", "baseline"]).isna().all()
    assert rec.loc["gems", "difference"] == pytest.approx((values["gems"].sum() - values["adamw"].sum()) / QUERIES)
    assert rec.loc["gems", "t_test"] <= rec.loc["gems", "t_test_holm"] <= 3 * rec.loc["gems", "t_test"]
    assert set(against(values, ["gems"])["baseline"]) == {"gems"}
    assert against(values, []).empty


def test_what_is_missing_is_never_0(tmp_path: Path) -> None:
    world = World(write_grid(tmp_path))
    tables = world.tables()
    row = tables["Full ranking"].loc["bm25"]
    assert row["rec NDCG@10"] == DASH
    assert row["search NDCG@10"] != DASH
    cost = tables["Retention and cost"]
    unknown = ("perplexity", "change, %", "lr", "s/step", "steps", "rec loss, last 5 steps")
    assert all(cost.loc["bm25", name] == DASH for name in unknown)
    assert cost.loc["lora", "change, %"] == "+100.0"
    assert "leak" not in cost, "no run has measured it"
    assert tables["Sampled ranking"].loc["bm25", "rec Hit@10"] == DASH
    shown = Table("T", "", tables["Full ranking"].reset_index())
    line = next(line for line in markdown(shown).splitlines() if line.startswith("| bm25"))
    assert [part.strip() for part in line.split("|")[3:6]] == [DASH] * 3
    assert r" -- & -- & -- & " in latex_table(shown)


def test_means_and_deviations_stand_in_the_tables(tmp_path: Path) -> None:
    tables = World(write_grid(tmp_path)).tables()
    ranking, cost = tables["Full ranking"], tables["Retention and cost"]
    runs = [(20 * 1 + 10 / 2) / 30, (20 / 2 + 10 / 3) / 30]
    deviation = abs(runs[0] - runs[1]) / 2**0.5
    assert ranking.loc["gems", "rec MRR@10"] == f"{sum(runs) / 2:.4f} ± {deviation:.4f}"
    assert "±" not in ranking.loc["lora", "rec MRR@10"], "one run has no deviation"
    assert list(ranking.index[ranking["search NDCG@10"].str.startswith("**")]) == ["gems"]
    assert cost.loc["gems", "peak GiB"] == "1.00 ± 0.00"
    assert cost.loc["gems", "rec loss, last 5 steps"] == "6.00 ± 0.00"
    assert cost.loc["gems", "cosine"] == "+0.15 ± 0.00"
    assert cost.loc["gems", "lr"] == "0.0006"
    assert not [name for name in ranking if "gems" in name]


def test_times_of_different_machines_are_not_averaged(tmp_path: Path) -> None:
    for seed, threads, seconds in ((0, 2, 3.0), (1, 1, 5.0), (2, 1, 7.0)):
        time = {"throughput": {"seconds_per_step": seconds}}
        write_run(tmp_path / f"run{seed}", "gems", seed, ranks={"rec": GOOD}, summary=time, threads=threads)
    write_run(tmp_path / "other", "adamw", ranks={"rec": GOOD}, threads=1)
    write_run(tmp_path / "untrained", "bm25", ranks={"rec": BAD}, perplexity=None, threads=4)
    cost = World(tmp_path).tables()["Retention and cost"]
    one, two = (f"s/step (x86_64, threads: {threads})" for threads in (1, 2))
    assert [name for name in cost if name.startswith("s/step")] == [one, two]
    assert list(cost.loc["gems", [one, two]]) == ["6.00 ± 1.41", "3.00"]
    assert cost.loc["adamw", two] == DASH


def test_more_columns_where_more_was_measured(tmp_path: Path) -> None:
    leak = {"leak": {"a": 0.1, "b": None, "c": 0.3}}
    more: dict[str, Any] = {"compat": "gems", "general": {"multiple_choice": 0.25}, "summary": leak}
    write_run(tmp_path / "a", "gems", ranks={"rec": GOOD}, **more)
    write_run(tmp_path / "b", "adamw", ranks={"search": GOOD}, compat="gems")
    tables = World(tmp_path).tables()
    ranking, cost = tables["Full ranking"], tables["Retention and cost"]
    assert list(cost.loc[["gems", "adamw"], "multiple choice"]) == ["0.2500", DASH]
    assert cost.loc["gems", "leak"] == "2.0e-01"
    assert ranking.loc["gems", "rec NDCG gems@10"] == ranking.loc["gems", "rec NDCG@10"]
    assert ranking.loc["adamw", "rec NDCG gems@10"] == DASH


def test_trials_and_the_chosen_rate(tmp_path: Path) -> None:
    rates = World(write_grid(tmp_path)).tables()["Rates"]
    assert list(rates.index) == ["gems"]
    assert list(rates) == ["0.0001", "0.0006"]
    assert not rates.loc["gems", "0.0001"].startswith("**")
    assert re.fullmatch(r"\*\*0\.\d{4} \(\+5\.0 %\)\*\*", rates.loc["gems", "0.0006"])


def test_settings_that_differ_are_named_with_who_differs(tmp_path: Path) -> None:
    found = World(write_grid(tmp_path)).tables()["Settings that differ"]
    assert found.loc["method.energy", "most"] == "0.95"
    assert found.loc["method.energy", "others"] == "0.5: half_protected"
    assert not {"method.name", "seed", "training.lr"} & set(found.index)


def test_the_released_metrics_count_only_what_was_retrieved() -> None:
    found = query_metrics([1, 12], relevant=5, compat="gems")
    assert (found["gems_ndcg@10"], found["gems_map@10"]) == (1.0, 1.0)
    assert found["ndcg@10"] == query_metrics([1, 12], relevant=5)["ndcg@10"] < 0.4
    assert found["gems_map@20"] == pytest.approx((1 + 2 / 12) / 2)
    assert query_metrics([30], compat="gems")["gems_ndcg@20"] == 0.0
    assert not [name for name in query_metrics([1]) if name.startswith("gems")]
    with pytest.raises(ValueError, match="compat must be 'none' or 'gems', got 'paper'"):
        query_metrics([1], compat="paper")


def read(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_folders_and_packed_runs_compare_alike(tmp_path: Path) -> None:
    grid = write_grid(tmp_path / "runs")
    pack([grid], tmp_path / "packed")
    compare([grid], tmp_path / "a")
    compare([tmp_path / "packed"], tmp_path / "b")
    pack([grid / "gems"], tmp_path / "part")
    compare([tmp_path / "part", *(grid / name for name in ("adamw", "bm25", "lora", "half_protected"))], tmp_path / "c")
    assert read(tmp_path / "a") == read(tmp_path / "b") == read(tmp_path / "c")
    assert set(read(tmp_path / "a")) == {"comparison.md", "comparison.tex", "summary.json", "movielens-100k.png"}


def test_everything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["compare", str(write_grid(tmp_path / "runs")), "--out", str(out), "--metric", "mrr@10"]) == 0
    text = (out / "comparison.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.startswith(text)
    assert "](movielens-100k.png)" in text
    assert (out / "movielens-100k.png").read_bytes().startswith(b"\x89PNG")
    assert "### rec: MRR@10 against adamw" in text
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert rows[1:6] == ["gems", "adamw", "lora", "half_protected", "bm25"], "the best first, then what serves one task"
    assert main(["compare", str(tmp_path / "runs"), "--out", str(out), "--baseline", "none"]) == 2
    assert "there is no method 'none'" in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "runs"), "--out", str(out), "--metric", "ndgc@10"]) == 2
    assert "no run has the metric 'ndgc@10'; there are hit@10" in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "runs"), "--out", str(out), "--draw", "gems", "gsm"]) == 2
    assert "there is no method 'gsm' to draw; there are adamw" in capsys.readouterr().err


def test_the_summary_has_the_answer_and_null_where_there_is_none(tmp_path: Path) -> None:
    compare([write_grid(tmp_path / "runs")], tmp_path / "out", metric="mrr@10")
    text = (tmp_path / "out" / "summary.json").read_text(encoding="utf-8")
    rows = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    keys = ["data", "method", "seeds", "rec_ndcg@10", "search_ndcg@10", "perplexity_ratio", "p_rec", "p_search"]
    assert all(list(row) == keys for row in rows)
    found = {row["method"]: row for row in rows}
    world = World(tmp_path / "runs")
    for task, baseline in (("rec", "adamw"), ("search", "lora")):
        tests = against(world.values(task), [baseline]).set_index("group")["t_test_holm"]
        assert found[baseline][f"p_{task}"] is None
        for method in set(found) - {baseline, "bm25"}:
            assert found[method][f"p_{task}"] == pytest.approx(tests[method], rel=1e-5)
        mean = world.values(task).mean()
        assert found["gems"][f"{task}_ndcg@10"] == pytest.approx(mean["gems"], rel=1e-5)
    assert found["bm25"] == {
        "data": "movielens-100k",
        "method": "bm25",
        "seeds": 1,
        "rec_ndcg@10": None,
        "search_ndcg@10": found["bm25"]["search_ndcg@10"],
        "perplexity_ratio": None,
        "p_rec": None,
        "p_search": found["bm25"]["p_search"],
    }
    assert found["bm25"]["p_search"] is not None
    assert (found["gems"]["seeds"], found["gems"]["perplexity_ratio"]) == (2, 1.05)


def test_without_a_baseline_the_summary_has_no_p(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "a", "gems", ranks={"rec": GOOD})
    write_run(tmp_path / "runs" / "b", "popularity", ranks={"rec": BAD}, perplexity=None)
    compare([tmp_path / "runs"], tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert [(row["method"], row["p_rec"], row["search_ndcg@10"], row["p_search"]) for row in rows] == [
        ("gems", None, None, None),
        ("popularity", None, None, None),
    ]


def test_latex_is_escaped_and_every_row_has_all_columns(tmp_path: Path) -> None:
    compare([write_grid(tmp_path / "runs")], tmp_path / "out")
    tex = (tmp_path / "out" / "comparison.tex").read_text(encoding="utf-8")
    assert r"half\_protected" in tex
    assert r"change, \%" in tex
    for table in tex.split(r"\begin{table}")[1:]:
        (columns,) = re.findall(r"\\begin\{tabular\}\{(l+r+)\}", table)
        rows = [line for line in table.splitlines() if line.endswith(r"\\")]
        assert len(rows) > 1
        assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {len(columns) - 1}
        assert table.count("{") - table.count(r"\{") == table.count("}") - table.count(r"\}")
        assert not re.search(r"(?<!\\)[%#_]", table)
        assert table.count("$") % 2 == 0


def test_escapes() -> None:
    assert escape(r"a_b & 5 % {x} #1 $2 ~ ^ \ <z>") == (
        r"a\_b \& 5 \% \{x\} \#1 \$2 \textasciitilde{} \textasciicircum{} \textbackslash{} \textless{}z\textgreater{}"
    )
    assert doctest.testmod(_render).failed == doctest.testmod(_tables).failed == 0
    table = Table("T", "n_1", Frame([["m|1", "**-0.5 ± 0.2**"]], columns=["a|b", "x"]))
    assert r"| m\|1" in markdown(table)
    assert "**-0.5 ± 0.2**" in markdown(table)
    assert r"\textbf{$-$0.5 $\pm$ 0.2}" in latex_table(table)
