"""Which rate AdamW has in the demo: by the loss on validation examples; of level rates, the one that forgets least.

    .venv/bin/python -m examples.unified_sr.demo_rates

Each trial is the demo's own AdamW run, its data, steps and batches, evaluated on the validation split. The result is
written to ``results/demo/adamw-rates.json``; finished trials are reused, interrupted ones go on.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in `__main__`, which says why

from .config import resolve
from .run import run
from .run_folder import ENVIRONMENT

HERE = Path(__file__).parent
CONFIG, RESULT = HERE / "configs" / "demo.yaml", HERE / "results" / "demo" / "adamw-rates.json"
RATES = (1e-4, 2e-4)
# Losses within this share of the best are level: one more seed would change their order.
LEVEL = 1e-3


def trials(config: Path, out: Path, rates: tuple[float, ...] = RATES, pairs: tuple[str, ...] = ()) -> dict[str, Any]:
    """Run AdamW at each rate and return what is to be kept of it.

    Args:
        config: of the demo.
        out: a folder, in which each trial has its own.
        rates: to choose from.
        pairs: further settings.
    """
    losses, perplexity, environment = {}, {}, {}
    for rate in rates:
        wanted = ["evaluation.split=valid", "training.leak_tokens=0", *pairs, f"training.lr={rate}"]
        folder = run(resolve(file=config, pairs=wanted, flags={"method.name": "adamw"}), out / f"lr-{rate:g}")
        losses[f"{rate:g}"] = folder.read_json("run.json")["evaluated_loss"]
        perplexity[f"{rate:g}"] = folder.read_json("metrics.json")["final"]["general"]["perplexity"]
        environment = folder.read_json(ENVIRONMENT)
    kept = {key: environment[key] for key in ("cores", "device", "precision", "git")}
    best = choose(losses, perplexity)
    return {"validation_loss": losses, "perplexity": perplexity, "lr": float(best), "environment": kept}


def choose(losses: Mapping[str, Mapping[str, float]], perplexity: Mapping[str, float]) -> str:
    """The rate with the least loss over all tasks; of those that are level with it, the one that forgets least.

    Args:
        losses: rate -> task -> loss.
        perplexity: rate -> that of general text.
    """
    totals = {rate: math.fsum(loss.values()) for rate, loss in losses.items()}
    level = [rate for rate, total in totals.items() if total <= (1 + LEVEL) * min(totals.values())]
    return min(level, key=perplexity.__getitem__)


if __name__ == "__main__":
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    found = trials(CONFIG, Path("runs/demo-rates"))
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found["validation_loss"], indent=1))
    print(f"lr {found['lr']:g} is the choice; it belongs into {CONFIG}, section methods.adamw")
