"""Finished runs as their files, without a training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from examples.unified_sr.config import resolve, to_yaml
from examples.unified_sr.metrics import mean_metrics, query_metrics
from examples.unified_sr.run_folder import CONFIG, DONE, ENVIRONMENT, METRICS, SAMPLED, RunFolder

QUERIES = 30
GOOD, FAIR, BAD = [1] * 20 + [2] * 10, [2] * 20 + [1] * 10, [30] * 29 + [5]
"""Ranks of the targets of 30 queries."""


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
    settings = resolve(pairs=[f"evaluation.compat={compat}", *pairs], flags={"method.name": method, "seed": seed})
    run.file(CONFIG).write_text(to_yaml(settings), encoding="utf-8")
    run.write_json(ENVIRONMENT, {"device": "x86_64", "threads": threads, "platform": "a-name-of-a-machine"})
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
    trained = perplexity is not None and method != "zero-shot"
    found = {
        "evaluated": {task: len(places) for task, places in ranks.items()},
        "trained_parameters": 1000 if trained else 0,
        "throughput": {"seconds_per_step": 2.5} if trained else {},
        "seconds": {"loading": 1.0, "training": 5.0},
        "peak_memory": {"resident": 2**30, "device": None},
    }
    run.write_json("run.json", {**found, **(summary or {})})
    tasks = [settings.training.tasks] if settings.training.tasks else list(ranks)
    records = [
        {
            "step": step,
            "loss": dict.fromkeys(tasks, 8.0 / step),
            "lr": {"matrices": 1e-3 / step},
            "seconds": 2.5,
            "diagnostics": {"cosines": {"rec|search": 0.1 * step}},
        }
        for step in (1, 2)
    ]
    lines = [json.dumps(record) + "\n" for record in records if trained]
    run.file("steps.jsonl").write_text("".join(lines), encoding="utf-8")
    run.file(DONE).write_text("", encoding="utf-8")
    return folder


def write_grid(folder: Path) -> Path:
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
            pairs=("method.energy=0.5",),
        )
    write_run(folder / "lora" / "seed-0", "lora", ranks={"rec": BAD, "search": FAIR}, perplexity=(40.0, 80.0))
    write_run(folder / "bm25" / "seed-0", "bm25", ranks={"search": BAD}, perplexity=None)
    for rate, ranks in ((1e-4, FAIR), (6e-4, GOOD)):
        pairs = ("evaluation.split=valid", f"training.lr={rate}")
        write_run(folder / "gems" / f"lr-{rate:g}", "gems", ranks={"rec": ranks, "search": ranks}, pairs=pairs)
    return folder
