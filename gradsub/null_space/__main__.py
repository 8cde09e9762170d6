"""``python -m gradsub.null_space collect --model NAME_OR_PATH --text FILE --out FILE``."""

import sys

from gradsub.null_space._command import main

if __name__ == "__main__":
    sys.exit(main())
