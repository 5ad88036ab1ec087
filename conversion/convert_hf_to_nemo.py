"""Converts a folder in the format of transformers to a `.nemo` file, as the command `parakeet convert` does.

python conversion/convert_hf_to_nemo.py FOLDER OUT.nemo [--dtype bfloat16]
"""

import sys

from transformers_parakeet_cli.app import app

if __name__ == "__main__":
    app(["convert", *sys.argv[1:]])
