"""Converts a `.nemo` file to a folder in the format of transformers, as the command `parakeet convert` does.

python conversion/convert_nemo_to_hf.py MODEL.nemo OUT [--dtype bfloat16]
"""

import sys

from transformers_parakeet_cli.app import app

if __name__ == "__main__":
    app(["convert", *sys.argv[1:]])
