"""``python -m examples.unified_sr``."""

import os
import sys

# OpenMP's threads wait for each other by spinning. On a machine that is busy with other work, most of that is time
# which the scheduler then denies to the thread that is waited for: a training step took five times as long. OpenMP
# reads the variable when it is loaded, so it is set before torch is imported; whoever sets it keeps the choice.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
