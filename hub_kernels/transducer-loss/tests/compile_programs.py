"""Compiles every Triton program for NVIDIA GPUs; needs no GPU: `python compile_programs.py [--quick] [80 90 ...]`.

Prints one line per program with the sizes of its binaries for float32, float16, bfloat16, and for integer arguments of
1; with `--quick` for bfloat16 only. `TRITON_INTERPRET` must not be set.
"""

import inspect
import sys
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parent.parent / "torch-ext"))

from transducer_loss import gradient_programs, joint_programs, lattice_programs

# pointer arguments by the type that they point to; arguments that are not listed are integers
FLOAT32_POINTERS = (
    "log_normalizer blank_log_prob label_log_prob duration_log_prob node_posterior blank_posterior label_posterior "
    "duration_gradient loss_gradient encoder_gradient predictor_gradient"
)
INT32_POINTERS = (
    "frame_lengths label_lengths labels encoder_row predictor_row next_label row_node nodes row_start list_index "
    "durations"
)
# pointers to tensors of the dtype of the inputs
INPUT_POINTERS = "encoder predictor hidden gradient token_logits duration_logits token_gradient duration_gradient_rows"
TYPES = {
    **dict.fromkeys(FLOAT32_POINTERS.split(), "*fp32"),
    **dict.fromkeys(INT32_POINTERS.split(), "*i32"),
    **dict.fromkeys(("log_alpha", "log_beta"), "*fp64"),
    **dict.fromkeys(("sigma", "label_scale", "negligible", "dropout"), "fp32"),
    "first_node": "*i64",
    "is_relevant": "*i8",
}
TDT, RNNT = {"NUM_DURATIONS": 5, "HAS_DURATIONS": True}, {"NUM_DURATIONS": 2, "HAS_DURATIONS": False}
JOINT_BLOCKS = {"BLOCK_N": 16, "BLOCK_J": 128}
LOGIT_BLOCKS = {"BLOCK_V": 1024, "BLOCK_D": 8}
ACTIVATIONS = [
    {"ACTIVATION": "relu", "DROPOUT": False, **JOINT_BLOCKS},
    {"ACTIVATION": "tanh", "DROPOUT": True, **JOINT_BLOCKS},
    {"ACTIVATION": "sigmoid", "DROPOUT": True, **JOINT_BLOCKS},
]
CASES = [
    *((lattice_programs.index_nodes, {"HAS_ROWS": has_rows, "BLOCK": 128}) for has_rows in (False, True)),
    *((joint_programs.compute_hidden, constants) for constants in ACTIVATIONS),
    *((joint_programs.differentiate_hidden, constants) for constants in ACTIVATIONS),
    (joint_programs.sum_over_labels, JOINT_BLOCKS),
    (joint_programs.sum_over_frames, JOINT_BLOCKS),
    (lattice_programs.score_nodes, {"VOCAB_SIZE": 1025, **TDT, **LOGIT_BLOCKS}),
    (lattice_programs.score_nodes, {"VOCAB_SIZE": 8193, **RNNT, **LOGIT_BLOCKS}),
    (lattice_programs.sum_paths, {**TDT, "ZERO_INDEX": 0, "BLOCK": 128}),
    (lattice_programs.sum_paths, {**RNNT, "ZERO_INDEX": 0, "BLOCK": 16}),
    (lattice_programs.sum_paths, {**TDT, "ZERO_INDEX": -1, "BLOCK": 1024}),
    (gradient_programs.compute_posteriors, {**TDT, "BLOCK": 128}),
    (gradient_programs.compute_posteriors, {**RNNT, "BLOCK": 128}),
    (gradient_programs.differentiate_logits, {"VOCAB_SIZE": 1025, **TDT, **LOGIT_BLOCKS}),
    (gradient_programs.differentiate_logits, {"VOCAB_SIZE": 8193, **RNNT, **LOGIT_BLOCKS}),
]


def compile_program(program, constants, dtype, capability, integers_are_one):
    """Compile one program.

    Args:
        program: the Triton function.
        constants: values of its compile-time constants.
        dtype: Triton's name of the dtype of the inputs, such as `bf16`.
        capability: compute capability of the GPU, such as 90.
        integers_are_one: whether integer arguments are 1, which Triton compiles to constants.

    Returns:
        The compiled program.
    """
    signature = {}
    for name in inspect.signature(program.fn).parameters:
        kind = TYPES.get(name, f"*{dtype}" if name in INPUT_POINTERS.split() else "i32")
        is_constant = name.isupper() or (integers_are_one and kind == "i32")
        signature[name] = "constexpr" if is_constant else kind
    values = {
        (index,): constants.get(name, 1) for index, (name, kind) in enumerate(signature.items()) if kind == "constexpr"
    }
    options = {}
    if program is lattice_programs.sum_paths:
        options = {"num_warps": max(1, constants["BLOCK"] // 128), "num_stages": 1}
    source = ASTSource(program, signature, values)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def main(capabilities, variants):
    """Compile all cases for GPUs of some compute capabilities, in variants (dtype, integers_are_one)."""
    for capability in capabilities:
        for program, constants in CASES:
            sizes = [
                len(compile_program(program, constants, dtype, capability, integers_are_one).asm["cubin"])
                for dtype, integers_are_one in variants
            ]
            print(f"sm_{capability} {program.fn.__name__} {constants}: {sizes} bytes")


if __name__ == "__main__":
    arguments = set(sys.argv[1:])
    is_quick = "--quick" in arguments
    all_variants = [("fp32", False), ("fp16", False), ("bf16", False), ("bf16", True)]
    main(
        sorted(int(word) for word in arguments - {"--quick"}) or [80, 90],
        all_variants[2:3] if is_quick else all_variants,
    )
