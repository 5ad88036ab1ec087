"""`python -m transformers_parakeet.cli` runs the command `parakeet`."""

from .app import main

main()
