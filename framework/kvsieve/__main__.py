"""`python -m kvsieve`, the same as the command `kvsieve`."""

from .cli import main

main()
