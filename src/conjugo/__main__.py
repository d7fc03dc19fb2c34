"""``python -m conjugo`` is the command ``conjugo``."""

import sys

from conjugo.cli import main

if __name__ == "__main__":
    sys.exit(main())
