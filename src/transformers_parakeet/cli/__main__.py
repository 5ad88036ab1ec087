"""`python -m transformers_parakeet.cli` runs the command `parakeet`."""

from .entry import main

main()
