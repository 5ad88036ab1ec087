"""Compile every program for NVIDIA GPUs, which needs none: `python compile_programs.py [--quick] [80 90 ...]`.

Prints one line per program: the sizes of its binaries for float32, float16, bfloat16 and for arguments of 1, or with
`--quick` for bfloat16 alone. Run without TRITON_INTERPRET.
"""

import inspect
import sys
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parent.parent / "torch-ext"))

from transducer_loss import joint_programs, lattice_programs

# pointers by what they point to; what is not named here is an integer
FLOAT32 = (
    "normaliser blank_score label_score duration_score occupancy blank_weight label_weight duration_gradient "
    "loss_gradient encoder_gradient predictor_gradient"
)
INT32 = (
    "frame_lengths label_lengths labels encoder_row predictor_row next_label row_cell cells row_first position "
    "durations"
)
INPUTS = "encoder predictor hidden gradient token_logits duration_logits token_gradient duration_gradient_out"
TYPES = {
    **dict.fromkeys(FLOAT32.split(), "*fp32"),
    **dict.fromkeys(INT32.split(), "*i32"),
    **dict.fromkeys(("alpha", "beta"), "*fp64"),
    **dict.fromkeys(("sigma", "label_scale", "negligible", "dropout"), "fp32"),
    "starts": "*i64",
    "kept": "*i8",
}
TIMED, PLAIN = {"D": 5, "TIMED": True}, {"D": 2, "TIMED": False}
TILE = {"BLOCK_N": 16, "BLOCK_J": 128}
WIDE = {"BLOCK_V": 1024, "BLOCK_D": 8}
ACTIVATIONS = [
    {"ACTIVATION": "relu", "DROPOUT": False, **TILE},
    {"ACTIVATION": "tanh", "DROPOUT": True, **TILE},
    {"ACTIVATION": "sigmoid", "DROPOUT": True, **TILE},
]
CASES = [
    *((lattice_programs.describe_cells, {"DENSE": dense, "BLOCK": 128}) for dense in (False, True)),
    *((joint_programs.join_states, options) for options in ACTIVATIONS),
    *((joint_programs.unjoin_gradient, options) for options in ACTIVATIONS),
    (joint_programs.sum_over_labels, TILE),
    (joint_programs.sum_over_frames, TILE),
    (lattice_programs.score_cells, {"V": 1025, **TIMED, **WIDE}),
    (lattice_programs.score_cells, {"V": 8193, **PLAIN, **WIDE}),
    (lattice_programs.sum_paths, {**TIMED, "ZERO": 0, "BLOCK": 128}),
    (lattice_programs.sum_paths, {**PLAIN, "ZERO": 0, "BLOCK": 16}),
    (lattice_programs.sum_paths, {**TIMED, "ZERO": -1, "BLOCK": 1024}),
    (lattice_programs.weigh_arcs, {**TIMED, "BLOCK": 128}),
    (lattice_programs.weigh_arcs, {**PLAIN, "BLOCK": 128}),
    (lattice_programs.differentiate_logits, {"V": 1025, **TIMED, **WIDE}),
    (lattice_programs.differentiate_logits, {"V": 8193, **PLAIN, **WIDE}),
]


def compile_program(program, constants, dtype, capability, ones):
    """Compile one program; with `ones` every integer argument is 1, which Triton turns into a constant."""
    signature = {}
    for name in inspect.signature(program.fn).parameters:
        kind = TYPES.get(name, f"*{dtype}" if name in INPUTS.split() else "i32")
        signature[name] = "constexpr" if name.isupper() or (ones and kind == "i32") else kind
    values = {
        (place,): constants.get(name, 1) for place, (name, kind) in enumerate(signature.items()) if kind == "constexpr"
    }
    options = {}
    if program is lattice_programs.sum_paths:
        options = {"num_warps": max(1, constants["BLOCK"] // 128), "num_stages": 1}
    source = ASTSource(program, signature, values)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def main(capabilities, variants):
    """Compile all cases in some variants: dtype, and whether integers are 1."""
    for capability in capabilities:
        for program, constants in CASES:
            binaries = [
                compile_program(program, constants, dtype, capability, ones).asm["cubin"] for dtype, ones in variants
            ]
            print(f"sm_{capability} {program.fn.__name__} {constants}: {[len(binary) for binary in binaries]} bytes")


if __name__ == "__main__":
    arguments = set(sys.argv[1:])
    quick = "--quick" in arguments
    every = [("fp32", False), ("fp16", False), ("bf16", False), ("bf16", True)]
    main(sorted(int(given) for given in arguments - {"--quick"}) or [80, 90], every[2:3] if quick else every)
