"""``python -m maehub`` and the ``maehub`` command."""

import sys

from maehub.cli import main

if __name__ == "__main__":
    sys.exit(main())
