"""Run the kernel on the CPU, by Triton's interpreter, where there is no GPU."""

import os
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    # read when triton is imported
    os.environ["TRITON_INTERPRET"] = "1"
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "torch-ext")]
