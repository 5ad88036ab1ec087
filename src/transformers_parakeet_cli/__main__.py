"""`python -m transformers_parakeet_cli` runs the command `parakeet`."""

from .entry import main

main()
