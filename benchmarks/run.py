"""Run all benchmarks and print the ratios: ``python -m benchmarks.run``; further arguments go to pytest."""

import subprocess
import sys
import tempfile
from pathlib import Path

from . import ratios


def main(arguments: list[str]) -> int:
    """Benchmark in a fresh process, so that nothing this one has imported is in the way."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pytest", str(Path(__file__).parent), "-q", "--benchmark-disable-gc"]
        command += [f"--benchmark-json={report}", "--benchmark-columns=median,iqr,rounds", *arguments]
        status = subprocess.run(command, check=False).returncode
        return status or ratios.main([str(report)])


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
