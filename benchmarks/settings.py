"""The committed configuration, read once."""

import json
from pathlib import Path
from typing import Any

CONFIG: dict[str, Any] = json.loads((Path(__file__).parent / "config.json").read_text())
RESULTS = Path(__file__).parent / "results"
