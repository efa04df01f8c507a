"""The command line: thin, and the only place that prints."""

import sys

__all__ = ["main"]


def main() -> None:
    """Run the `omniconv` command and exit with its code."""
    from omniconv.cli.main import run

    sys.exit(run(sys.argv[1:]))
