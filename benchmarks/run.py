"""Run all micro-benchmarks and print the ratios.

    python -m benchmarks.run                     all of them (`make bench`)
    python -m benchmarks.run -k step             those whose name contains "step"
    python -m benchmarks.run --benchmark-max-time=5

Every argument but --help goes to pytest; `python -m pytest --help` lists what it and pytest-benchmark take. The other
benchmarks are commands of their own, each with a --help: benchmarks.training, benchmarks.host, benchmarks.gpu,
benchmarks.refresh and benchmarks.communication.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from . import ratios


def main(arguments: list[str]) -> int:
    """Benchmark in a fresh process, so that nothing this one has imported is in the way."""
    if {"-h", "--help"} & set(arguments):
        print((__doc__ or "").strip())
        return 0
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pytest", str(Path(__file__).parent), "-q", "--benchmark-disable-gc"]
        command += [f"--benchmark-json={report}", "--benchmark-columns=median,iqr,rounds", *arguments]
        status = subprocess.run(command, check=False).returncode
        return status or ratios.main([str(report)])


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
