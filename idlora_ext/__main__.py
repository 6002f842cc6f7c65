"""``python -m idlora_ext`` is the command ``idlora``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
