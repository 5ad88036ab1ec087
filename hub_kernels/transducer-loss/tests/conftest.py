"""Puts the kernel on the path, and runs it by Triton's interpreter on the CPU where there is no GPU."""

import os
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    # Triton reads this variable on import
    os.environ["TRITON_INTERPRET"] = "1"
TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS), str(TESTS.parent / "torch-ext")]
