"""One layer set of an 8B model: four inputs, synthetic features of a decaying spectrum, exactly or with the sketch.

OMP_NUM_THREADS=2 /usr/bin/time -v python -m benchmarks.null_space.shapes --kind exact
"""

from __future__ import annotations

import argparse
import json
import resource
import time

import torch

from gradsub import NullSpace

WIDTHS = {"q_proj": 4096, "o_proj": 4096, "gate_proj": 4096, "down_proj": 14336}


def features(width: int, rows: int, generator: torch.Generator) -> torch.Tensor:
    decay = torch.arange(1, width + 1).pow(-0.4)
    x = torch.randn(rows, width, generator=generator) * decay
    for seed in range(4):  # reflections, so that the spectrum does not lie along the axes
        v = torch.nn.functional.normalize(torch.randn(width, generator=torch.Generator().manual_seed(seed)), dim=0)
        x -= 2 * torch.outer(x @ v, v)
    return x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=["exact", "sketch"], required=True)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--budget", type=int, default=128 * 1024**2)
    parser.add_argument("--file", default=None)
    arguments = parser.parse_args()
    null_space = NullSpace(energy=0.97, layer_memory_budget=arguments.budget if arguments.kind == "sketch" else None)
    generator = torch.Generator().manual_seed(0)
    spent = {"features": 0.0, "collect": 0.0, "decompose": 0.0}
    shares = {}
    for name, width in WIDTHS.items():
        for _ in range(arguments.tokens // 1024):
            start = time.perf_counter()
            x = features(width, 1024, generator)
            made = time.perf_counter()
            null_space.update(name, x)
            spent["features"] += made - start
            spent["collect"] += time.perf_counter() - made
    for name in WIDTHS:
        start = time.perf_counter()
        shares[name] = round(null_space.protected_fraction(name), 4)
        spent[f"decompose {name}"] = time.perf_counter() - start
        spent["decompose"] += spent[f"decompose {name}"]
    if arguments.file:
        null_space.save(arguments.file, statistics=False)
    result = {
        "kind": arguments.kind,
        "threads": torch.get_num_threads(),
        "tokens": arguments.tokens,
        "protected": shares,
        "seconds": {key: round(value, 1) for key, value in spent.items()},
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
