"""`python -m smtune`, the same as `smtune`."""

from smtune.cli import main

main()
