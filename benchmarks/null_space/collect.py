"""How long `NullSpace.collect` takes beside plain forward passes, and what it comes to.

OMP_NUM_THREADS=1 python -m benchmarks.null_space.collect --model smollm2-135m --text FILE --tokens 4096
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import statistics
import time
from pathlib import Path

import psutil
import torch

from examples.unified_sr.general_domain import general_batches, token_windows
from examples.unified_sr.general_text import load_general_text
from examples.unified_sr.model import load_language_model
from gradsub import NullSpace


def seconds(action):
    """By the clock, and of the processor, which others who use the machine lengthen less."""
    start, used = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - start, time.process_time() - used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", default=None)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--energy", type=float, default=0.97)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    loaded = load_language_model(arguments.model)
    model = loaded.model.eval()
    fit, fresh = load_general_text(arguments.text)
    windows = token_windows(loaded.tokenizer, fit, tokens=arguments.tokens, window=256)
    batches = list(general_batches(loaded, windows, torch.device("cpu")))
    held_out = list(general_batches(loaded, token_windows(loaded.tokenizer, fresh, tokens=1024, window=256), "cpu"))

    @torch.no_grad()
    def forward() -> None:
        for batch in batches:
            model(**batch)

    ratios, collected = [], []
    forward()
    before = psutil.Process().memory_info().rss
    peaks = {}

    def above(phase: str) -> None:
        peaks[phase] = round((peak() - before) / 1e9, 2)
        forget_peak()

    forget_peak()
    forward()
    above("forward")
    null_space = NullSpace(energy=arguments.energy)
    for _ in range(arguments.rounds):
        before_it = seconds(forward)
        null_space = NullSpace(energy=arguments.energy)
        took = seconds(lambda: null_space.collect(model, batches, normalize=True))  # noqa: B023
        after_it = seconds(forward)  # before and after: others share the cores
        ratios.append([2 * took[i] / (before_it[i] + after_it[i]) for i in range(2)])
        collected.append(took)
    above("collect")
    decomposed = seconds(lambda: [null_space.protected_fraction(name) for name in null_space])
    above("decompose")
    others = NullSpace().collect(model, held_out, normalize=True)
    residual = null_space.residual_energy(others)
    above("held-out text")
    protected = {}
    for name in null_space:
        protected.setdefault(name.rsplit(".", 1)[-1], []).append(null_space.protected_fraction(name))
    result = {
        "tokens": sum(batch["input_ids"].numel() for batch in batches),
        "threads": torch.get_num_threads(),
        "collect_over_forward": [round(clock, 2) for clock, _ in ratios],
        "of_the_processor": [round(used, 2) for _, used in ratios],
        "medians": [round(statistics.median(each), 2) for each in zip(*ratios, strict=True)],
        "collect_seconds": [round(statistics.median(each), 1) for each in zip(*collected, strict=True)],
        "decompose_seconds": [round(each, 1) for each in decomposed],
        "peaks_above_model_gb": peaks,
        "protected": {kind: round(statistics.mean(each), 4) for kind, each in protected.items()},
        "protected_in_all": sum(round(null_space.protected_fraction(n) * 10**6) for n in null_space),
        "residual": round(statistics.mean(residual.values()), 5),
    }
    print(json.dumps(result))


def forget_peak() -> None:
    """Linux alone can; elsewhere a phase has the peak of those before it, and loading the model counts too."""
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Bytes, since `forget_peak`."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status.read_text()).group(1))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # of macOS, in bytes


if __name__ == "__main__":
    main()
