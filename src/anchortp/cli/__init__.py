"""The command line. Each command imports what it needs when it runs, so that `--help` and `status` are quick."""

from anchortp.cli.main import main

__all__ = ["main"]
