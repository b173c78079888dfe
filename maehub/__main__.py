"""``python -m maehub`` and the ``maehub`` command."""

import sys


def main() -> int:
    """Run the command line; Ctrl-C ends it quietly even while it is being imported."""
    try:
        from maehub import cli

        return cli.main()
    except KeyboardInterrupt:
        if "--debug" in sys.argv:
            raise
        from maehub.errors import EXIT_INTERRUPTED

        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
