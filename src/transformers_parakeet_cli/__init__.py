"""The command `parakeet`.

It is a package beside `transformers_parakeet`, because importing a module of `transformers_parakeet` imports torch and
transformers. The modules here import `transformers_parakeet` inside functions, so `parakeet --help` needs neither.
"""

from .entry import main

__all__ = ["main"]
