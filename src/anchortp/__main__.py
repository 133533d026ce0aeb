"""`python -m anchortp`."""

from anchortp.cli import main

main()
