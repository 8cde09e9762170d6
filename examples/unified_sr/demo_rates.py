"""Which rate AdamW has in the demo: chosen from three by the grid's criterion, NDCG@10 on the validation split.

    .venv/bin/python -m examples.unified_sr.demo_rates

Each trial is the demo's own AdamW run, its data, steps and batches, evaluated on the validation split. The result is
written to ``results/demo/adamw-rates.json``; finished trials are reused, interrupted ones go on.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in `__main__`, which says why

from .config import resolve
from .grid import Trial, choose
from .parts import VALIDATION_METRIC
from .run import run
from .run_folder import ENVIRONMENT, METRICS

HERE = Path(__file__).parent
CONFIG, RESULT = HERE / "configs" / "demo.yaml", HERE / "results" / "demo" / "adamw-rates.json"
RATES = (2.5e-5, 5e-5, 1e-4)


def trials(config: Path, out: Path, rates: tuple[float, ...] = RATES, pairs: tuple[str, ...] = ()) -> dict[str, Any]:
    """Run AdamW at each rate and return what is to be kept of it.

    Args:
        config: of the demo.
        out: a folder, in which each trial has its own.
        rates: to choose from.
        pairs: further settings.
    """
    found, ndcg, perplexity, environment = [], {}, {}, {}
    for rate in rates:
        wanted = ["evaluation.split=valid", "training.leak_tokens=0", *pairs, f"training.lr={rate}"]
        folder = run(resolve(file=config, pairs=wanted, flags={"method.name": "adamw"}), out / f"lr-{rate:g}")
        final = folder.read_json(METRICS)["final"]
        perplexity[f"{rate:g}"] = final.pop("general")["perplexity"]
        ndcg[f"{rate:g}"] = {task: values[VALIDATION_METRIC] for task, values in final.items()}
        found.append(Trial(rate, sum(ndcg[f"{rate:g}"].values()) / len(final)))
        environment = folder.read_json(ENVIRONMENT)
    kept = {key: environment[key] for key in ("cores", "device", "precision", "git")}
    best = choose(found).trial.rate
    return {"validation_ndcg@10": ndcg, "perplexity": perplexity, "lr": best, "environment": kept}


if __name__ == "__main__":
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    found = trials(CONFIG, Path("runs/demo-rates"))
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found["validation_ndcg@10"], indent=1))
    print(f"lr {found['lr']:g} is the choice; it belongs into {CONFIG}, section methods.adamw")
