"""Finished runs side by side: what is grouped, what is tested, and that nothing missing passes for 0."""

from __future__ import annotations

import doctest
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from examples.unified_sr.cli import main
from examples.unified_sr.compare import (
    _plots,
    _render,
    collect,
    compare,
    escape,
    groups_of,
    latex_table,
    significance,
    tables_of,
)
from examples.unified_sr.compare._collect import Group
from examples.unified_sr.compare._tables import Cell, Table
from examples.unified_sr.config import resolve, to_yaml
from examples.unified_sr.metrics import mean_metrics, query_metrics
from examples.unified_sr.run_folder import CONFIG, DONE, ENVIRONMENT, METRICS, SAMPLED, RunFolder

QUERIES = 30


def write_run(
    folder: Path,
    method: str,
    seed: int = 0,
    *,
    ranks: dict[str, list[int]],
    perplexity: tuple[float, float] | None = (40.0, 42.0),
    general: dict[str, float] | None = None,
    summary: dict[str, Any] | None = None,
    pairs: tuple[str, ...] = (),
    compat: str = "none",
    threads: int = 2,
) -> Path:
    """A finished run in the files that a run writes, of which query n of a task has its target at a given rank."""
    folder.mkdir(parents=True)
    run = RunFolder(folder)
    settings = resolve(pairs=[f"compat={compat}", *pairs], flags={"method": method, "seed": seed})
    run.file(CONFIG).write_text(to_yaml(settings), encoding="utf-8")
    run.write_json(ENVIRONMENT, {"device": "x86_64", "threads": threads})
    final: dict[str, Any] = {}
    for task, places in ranks.items():
        rows = [query_metrics([rank], 1, compat=compat) for rank in places]
        final[task] = mean_metrics(rows)
        lines = [json.dumps({"qid": f"{task}-{number}", **row}) + "\n" for number, row in enumerate(rows)]
        run.file(f"queries.{task}.jsonl").write_text("".join(lines), encoding="utf-8")
    before: dict[str, Any] = {}
    sampled = dict(final)
    if perplexity is not None:
        before = {**final, "general": {"perplexity": perplexity[0], **(general or {})}}
        final = {**final, "general": {"perplexity": perplexity[1], **(general or {})}}
    run.write_json(METRICS, {"zero_shot": before, "final": final})
    run.write_json(SAMPLED, {"zero_shot": {}, "final": sampled})
    trained = {"seconds_per_step": 2.5} if perplexity is not None else {}
    run.write_json(
        "run.json", {"throughput": trained, "peak_memory": {"resident": 2**30, "device": None}, **(summary or {})}
    )
    records = [{"step": step, "diagnostics": {"cosines": {"rec|search": 0.1 * step}}} for step in (1, 2)]
    run.file("steps.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    run.file(DONE).write_text("", encoding="utf-8")
    return folder


GOOD, FAIR, BAD = [1] * 20 + [2] * 10, [2] * 20 + [1] * 10, [30] * 29 + [5]


def grid(folder: Path) -> Path:
    """Five methods: two of GEMS, a strong and a weak baseline, and one that serves one task without a model."""
    for seed in (0, 1):
        better = [rank + seed for rank in GOOD]
        write_run(folder / "gems" / f"seed-{seed}", "gems", seed, ranks={"rec": better, "search": GOOD})
        write_run(folder / "adamw" / f"seed-{seed}", "adamw", seed, ranks={"rec": FAIR, "search": BAD})
        write_run(
            folder / "half_protected" / f"seed-{seed}",
            "gems",
            seed,
            ranks={"rec": BAD, "search": BAD},
            pairs=("energy=0.5",),
        )
    write_run(folder / "lora" / "seed-0", "lora", ranks={"rec": BAD, "search": FAIR}, perplexity=(40.0, 80.0))
    write_run(folder / "bm25" / "seed-0", "bm25", ranks={"search": BAD}, perplexity=None)
    for rate, ranks in ((1e-4, FAIR), (1e-2, GOOD)):
        pairs = ("eval_split=valid", f"lr={rate}")
        write_run(folder / "gems" / f"lr-{rate:g}", "gems", ranks={"rec": ranks, "search": ranks}, pairs=pairs)
    return folder


def on_test(folder: Path) -> list[Any]:
    return groups_of([run for run in collect([folder])[0] if run.settings["eval_split"] == "test"])


def cells(table: Table, label: str) -> dict[str, Cell]:
    row = next(row for row in table.rows if row[0].text == label)
    return dict(zip(table.header, row, strict=True))


def test_runs_that_differ_by_the_seed_are_one_method(tmp_path: Path) -> None:
    groups = {group.label: group for group in on_test(grid(tmp_path))}
    assert {label: len(group.runs) for label, group in groups.items()} == {
        "adamw": 2, "bm25": 1, "gems": 2, "half_protected": 2, "lora": 1,
    }  # fmt: skip
    assert groups["half_protected"].method == "gems"
    assert (groups["gems"].lr, groups["bm25"].lr) == (6e-4, None)


def test_values_of_a_query_are_averaged_over_the_seeds(tmp_path: Path) -> None:
    (group,) = [group for group in on_test(grid(tmp_path)) if group.label == "gems"]
    found = group.per_query("rec", "mrr@10")
    assert found["rec-0"] == pytest.approx((1 + 1 / 2) / 2)
    assert found["rec-29"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert group.per_query("rec", "none") == group.per_query("absent", "mrr@10") == {}


def test_outside_a_grid_settings_tell_runs_apart(tmp_path: Path) -> None:
    for number, rate in enumerate(("lr=1.0e-3", "lr=2.0e-3")):
        write_run(tmp_path / f"run{number}", "gems", ranks={"rec": GOOD}, pairs=(rate,))
    write_run(tmp_path / "other", "adamw", ranks={"rec": GOOD})
    assert {group.label for group in on_test(tmp_path)} == {"gems (lr=0.001)", "gems (lr=0.002)", "adamw"}


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", "gems", ranks={"rec": GOOD})
    write_run(tmp_path / "b", "gems", ranks={"rec": FAIR})
    with pytest.raises(ValueError, match="have the same settings and seed; leave one out"):
        on_test(tmp_path)
    other = write_run(tmp_path / "c", "adamw", ranks={"rec": FAIR}, pairs=("eval_users=3",))
    with pytest.raises(ValueError, match=r"evaluated differently: eval_users=0 in .*, eval_users=3 in"):
        compare([first, other], tmp_path / "out")
    valid = write_run(tmp_path / "d", "adamw", ranks={"rec": FAIR}, pairs=("eval_split=valid",))
    with pytest.raises(ValueError, match="needs the test split"):
        compare([valid], tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="'none' is not there"):
        compare(["none"], tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no run"):
        compare([tmp_path / "empty"], tmp_path / "out")
    with pytest.raises(ValueError, match="there is no method 'ada' to compare with; there are gems"):
        compare([first], tmp_path / "out", baseline="ada")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("comparison*"))


def test_unfinished_runs_are_named(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "gems", ranks={"rec": GOOD})
    (write_run(tmp_path / "b", "gems", 1, ranks={"rec": GOOD}) / DONE).unlink()
    said: list[str] = []
    compare([tmp_path], tmp_path / "out", say=said.append)
    assert said == [f"left out, since it is not finished: {(tmp_path / 'b').resolve()}"]


def baselines(groups: list[Any], task: str) -> list[str]:
    return list(dict.fromkeys(test.baseline for test in significance(groups, task, "ndcg@10")))


def test_each_task_has_the_best_method_that_is_no_gems_as_its_baseline(tmp_path: Path) -> None:
    groups = on_test(grid(tmp_path))
    assert baselines(groups, "rec") == ["adamw"]
    assert baselines(groups, "search") == ["lora"]
    only = [group for group in groups if group.method == "gems"]
    assert baselines(only, "rec") == baselines(groups, "absent") == []


def test_a_baseline_without_a_model_stands_beside_the_best_one_with_a_model(tmp_path: Path) -> None:
    write_run(tmp_path / "ease" / "seed-0", "ease", ranks={"rec": GOOD}, perplexity=None)
    folder = grid(tmp_path)
    groups = on_test(folder)
    assert baselines(groups, "rec") == ["ease", "adamw"]
    numbers = compare([folder], tmp_path / "out").with_suffix(".json").read_text(encoding="utf-8")
    tests = json.loads(numbers)["movielens-100k"]["tests"]["rec"]
    against = {name: {test["label"] for test in tests if test["baseline"] == name} for name in ("ease", "adamw")}
    labels = {group.label for group in groups}
    assert against == {"ease": labels - {"ease"}, "adamw": labels - {"adamw"}}
    text = (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")
    assert "### rec: NDCG@10 against ease" in text
    assert "### rec: NDCG@10 against adamw" in text


def test_files_of_queries_may_be_packed(tmp_path: Path) -> None:
    (plain,) = [group for group in on_test(grid(tmp_path)) if group.label == "lora"]
    values = plain.per_query("rec", "ndcg@10")
    file = plain.runs[0].folder.file("queries.rec.jsonl")
    Path(f"{file}.gz").write_bytes(gzip.compress(file.read_bytes()))
    file.unlink()
    assert plain.per_query("rec", "ndcg@10") == values != {}


def test_all_methods_are_tested_against_the_baseline(tmp_path: Path) -> None:
    groups = on_test(grid(tmp_path))
    rec = {test.label: test for test in significance(groups, "rec", "ndcg@10", "adamw")}
    assert {test.baseline for test in rec.values()} == {"adamw"}
    assert set(rec) == {"gems", "half_protected", "lora", "bm25"}
    assert rec["bm25"].test is None
    assert rec["bm25"].t_test is None
    assert rec["gems"].test is not None
    values = {group.label: group.per_query("rec", "ndcg@10").values() for group in groups}
    assert rec["gems"].test.difference == pytest.approx((sum(values["gems"]) - sum(values["adamw"])) / QUERIES)
    assert rec["gems"].t_test is not None
    assert rec["gems"].test.t_test <= rec["gems"].t_test <= 3 * rec["gems"].test.t_test, "bm25 is no comparison"
    assert {test.baseline for test in significance(groups, "rec", "ndcg@10", "gems")} == {"gems"}


def test_the_axis_of_retention_fits_what_is_drawn(tmp_path: Path) -> None:
    """On the logarithmic axis that a loss by hundreds of per cent needs, too."""
    write_run(tmp_path / "forgets", "adamw", ranks={"rec": GOOD}, perplexity=(40.0, 4000.0))
    write_run(tmp_path / "keeps", "lora", ranks={"rec": FAIR}, perplexity=(40.0, 40.4))
    figure = Figure()
    assert _plots._retention(figure, on_test(tmp_path), "ndcg@10")
    for axes in figure.axes:
        assert axes.get_xscale() == "symlog"
        left, right = axes.get_xlim()
        assert 0 < left < 1
        assert 9900 < right < 99000


def test_what_is_missing_is_never_0(tmp_path: Path) -> None:
    groups = on_test(grid(tmp_path))
    ranking, cost, sampled = tables_of(groups, {}, "ndcg@10")
    row = cells(ranking, "bm25")
    assert row["rec NDCG@10"].missing
    assert not row["search NDCG@10"].missing
    assert all(cells(cost, "bm25")[name].missing for name in ("perplexity", "change, %", "lr", "s/step"))
    assert cells(cost, "lora")["change, %"].mean == pytest.approx(100)
    assert "leak" not in cost.header, "no run has measured it"
    assert cells(sampled, "bm25")["rec Hit@10"].missing
    text = _render.markdown(ranking)
    line = next(line for line in text.splitlines() if line.startswith("| bm25"))
    assert [part.strip() for part in line.split("|")[3:6]] == ["–"] * 3
    assert r" -- & -- & -- & " in latex_table(ranking)


def test_means_and_deviations_stand_in_the_tables(tmp_path: Path) -> None:
    ranking, cost, _ = tables_of(on_test(grid(tmp_path)), {}, "ndcg@10")
    found = cells(ranking, "gems")["rec MRR@10"]
    runs = [(20 * 1 + 10 / 2) / 30, (20 / 2 + 10 / 3) / 30]
    assert found.mean == pytest.approx(sum(runs) / 2)
    assert found.deviation == pytest.approx(abs(runs[0] - runs[1]) / 2**0.5)
    assert cells(ranking, "lora")["rec MRR@10"].deviation is None, "of one run"
    bests = [row[0].text for row in ranking.rows if dict(zip(ranking.header, row, strict=True))["search NDCG@10"].best]
    assert bests == ["gems"]
    assert cells(cost, "gems")["peak GiB"].mean == 1.0
    assert "gems_ndcg@10" not in str(ranking.header)


def test_times_of_different_machines_are_not_averaged(tmp_path: Path) -> None:
    for seed, threads, seconds in ((0, 2, 3.0), (1, 1, 5.0), (2, 1, 7.0)):
        time = {"throughput": {"seconds_per_step": seconds}}
        write_run(tmp_path / f"run{seed}", "gems", seed, ranks={"rec": GOOD}, summary=time, threads=threads)
    write_run(tmp_path / "other", "adamw", ranks={"rec": GOOD}, threads=1)
    write_run(tmp_path / "untrained", "bm25", ranks={"rec": BAD}, perplexity=None, threads=4)
    _, cost, _ = tables_of(on_test(tmp_path), {}, "ndcg@10")
    assert [name for name in cost.header if name.startswith("s/step")] == [
        "s/step (x86_64, threads: 1)", "s/step (x86_64, threads: 2)",
    ]  # fmt: skip
    one, two = (cells(cost, "gems")[f"s/step (x86_64, threads: {threads})"] for threads in (1, 2))
    assert (one.mean, two.mean, two.deviation) == (6.0, 3.0, None)
    assert cells(cost, "adamw")["s/step (x86_64, threads: 2)"].missing


def test_more_columns_where_more_was_measured(tmp_path: Path) -> None:
    leak = {"leak": {"a": 0.1, "b": None, "c": 0.3}}
    write_run(
        tmp_path / "a", "gems", ranks={"rec": GOOD}, compat="gems", general={"multiple_choice": 0.25}, summary=leak
    )
    write_run(tmp_path / "b", "adamw", ranks={"rec": GOOD})
    ranking, cost, _ = tables_of(on_test(tmp_path), {}, "ndcg@10")
    assert cells(cost, "gems")["multiple choice"].mean == 0.25
    assert cells(cost, "adamw")["multiple choice"].missing
    assert cells(cost, "gems")["leak"].mean == pytest.approx(0.2)
    assert cells(ranking, "gems")["rec NDCG gems@10"].mean == pytest.approx(cells(ranking, "gems")["rec NDCG@10"].mean)
    assert cells(ranking, "adamw")["rec NDCG gems@10"].missing


def test_the_released_metrics_count_only_what_was_retrieved() -> None:
    found = query_metrics([1, 12], relevant=5, compat="gems")
    assert (found["gems_ndcg@10"], found["gems_map@10"]) == (1.0, 1.0)
    assert found["ndcg@10"] == query_metrics([1, 12], relevant=5)["ndcg@10"] < 0.4
    assert found["gems_map@20"] == pytest.approx((1 + 2 / 12) / 2)
    assert query_metrics([30], compat="gems")["gems_ndcg@20"] == 0.0
    assert not [name for name in query_metrics([1]) if name.startswith("gems")]
    with pytest.raises(ValueError, match="compat must be 'none' or 'gems', got 'paper'"):
        query_metrics([1], compat="paper")


def test_everything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["compare", str(grid(tmp_path / "runs")), "--out", str(out), "--metric", "mrr@10"]) == 0
    text = (out / "comparison.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.startswith(text)
    plots = sorted(path.name for path in out.glob("*.png"))
    assert plots == [f"movielens-100k-{name}.png" for name in ("cosine", "rates", "retention")]
    assert all(f"]({name})" in text for name in plots)
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in plots)
    assert "`energy`: gems 0.95, half_protected 0.5" in text
    assert "### rec: MRR@10 against adamw" in text
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert rows[1:6] == ["gems", "adamw", "lora", "half_protected", "bm25"], "the best first, then what serves one task"
    numbers = json.loads((out / "comparison.json").read_text(encoding="utf-8"))["movielens-100k"]
    found = numbers["methods"]["gems"]["full"]["rec"]["mrr@10"]
    assert found["runs"] == 2
    assert numbers["methods"]["gems"]["runs"] == [f"../runs/gems/seed-{seed}" for seed in (0, 1)], "they may move"
    assert numbers["tests"]["search"][0]["baseline"] == "lora"
    assert main(["compare", str(tmp_path / "runs"), "--out", str(out), "--baseline", "none"]) == 2
    assert "there is no method 'none'" in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "runs"), "--out", str(out), "--metric", "ndgc@10"]) == 2
    assert "no run has the metric 'ndgc@10'; there are hit@5" in capsys.readouterr().err


def test_latex_is_escaped_and_every_row_has_all_columns(tmp_path: Path) -> None:
    compare([grid(tmp_path / "runs")], tmp_path / "out")
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
    assert doctest.testmod(_render).failed == 0
    table = Table("T", "n_1", ("a|b", "x"), ((Cell("m|1"), Cell("", -0.5, 0.25, "+.1f", best=True)),))
    assert r"| m\|1" in _render.markdown(table)
    assert "**-0.5 ± 0.2**" in _render.markdown(table)
    assert r"\textbf{$-$0.5 $\pm$ 0.2}" in latex_table(table)


def test_no_two_methods_look_the_same_in_a_picture() -> None:
    groups = [Group(str(number), ()) for number in range(66)]
    assert len(set(_plots._looks(groups).values())) == 66
