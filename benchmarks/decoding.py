"""Compares the time of greedy TDT decoding with stock `generate`, on the same encoder output, in one run.

    python benchmarks/decoding.py [--rounds 5]

The weights are random. The output biases are shifted until 20 to 45 % of the decoding steps emit labels, as in speech.
In float32, the benchmark first checks that both sides emit the same tokens on the same frames. In bfloat16 the order of
sums changes tokens, so the benchmark checks only the share of labels.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import rival
import torch

NUM_FRAMES, VOCAB_SIZE, WIDTH, DURATIONS = 375, 8193, 640, (0, 1, 2, 3, 4)
BATCH_SIZES = (1, 16)
DTYPES = ("float32", "bfloat16")

# share of frames on which the blank has the highest score, for the first predictor state
BLANK_SHARE = 0.72
# range of the share of decoding steps that emit a label
LABEL_SHARE_RANGE = (0.2, 0.45)


def randomise_weights(model: torch.nn.Module) -> None:
    """Fill the prediction and joint networks with random numbers that are identical on both sides."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(model.named_parameters()):
        if name.startswith(("decoder.", "joint.")):
            std = 1.0 if "embedding" in name else 0.08
            parameter.normal_(std=std, generator=generator)


@torch.no_grad()
def shift_output_biases(model: Any, encoder_states: torch.Tensor) -> None:
    """Shift the output biases: blanks on most frames, no duration of zero, and durations scored below all tokens.

    Args:
        model: TDT model; changed in place.
        encoder_states: (B, T, H) projected encoder states.
    """
    output_layer, blank_id = model.joint.head, VOCAB_SIZE - 1
    first_predictor_state = model.decoder(torch.full((1, 1), blank_id))[0, 0]
    scores = output_layer(torch.relu(encoder_states[0] + first_predictor_state))
    label_scores = scores[:, :blank_id].amax(-1)
    output_layer.bias[blank_id] += torch.quantile(label_scores - scores[:, blank_id], BLANK_SHARE)
    # stock transformers has no limit on labels with duration 0, so that duration must not win
    output_layer.bias[VOCAB_SIZE] -= 100.0
    # stock transformers searches for the best token among the durations as well, so durations must score below tokens
    output_layer.bias[VOCAB_SIZE:] -= 100.0


def build_model(module: Any, batch_size: int, dtype: str = "float32") -> tuple[Any, torch.Tensor]:
    """Build a TDT model with random weights, and with fixed encoder states in place of the encoder.

    Args:
        module: `transformers` or `transformers_parakeet`.
        batch_size: number of clips, at most the largest of `BATCH_SIZES`.
        dtype: dtype of the model and of the encoder states; one of `DTYPES`.

    Returns:
        The model, and (B, T, F) features for `generate`; their values have no effect.
    """
    encoder = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8,
               "subsampling_conv_channels": 8, "num_mel_bins": 80}  # fmt: skip
    config = module.ParakeetTDTConfig(
        vocab_size=VOCAB_SIZE, blank_token_id=VOCAB_SIZE - 1, decoder_hidden_size=WIDTH, durations=list(DURATIONS),
        encoder_config=encoder,
    )  # fmt: skip
    model = module.ParakeetForTDT(config).eval()
    encoder_states = torch.randn(max(BATCH_SIZES), NUM_FRAMES, WIDTH, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        randomise_weights(model)
    shift_output_biases(model, encoder_states)
    model.to(getattr(torch, dtype))
    encoder_states = encoder_states[:batch_size].to(model.dtype)
    output_class = sys.modules[type(model).__module__].ParakeetEncoderModelOutput
    mask = torch.ones(batch_size, NUM_FRAMES, dtype=torch.int)
    model.get_audio_features = lambda *args, **kwargs: output_class(
        last_hidden_state=encoder_states, pooler_output=encoder_states, attention_mask=mask
    )
    model.generation_config.decoder_start_token_id = config.blank_token_id
    return model, torch.zeros(batch_size, NUM_FRAMES * 8, 80)


def prepare(module: Any, side: str, case: dict[str, Any]) -> tuple[Callable[[], Any], Callable[[Any, str], None]]:
    """Build the model of one case, with fixed encoder states in place of the encoder.

    Args:
        module: `transformers` or `transformers_parakeet`.
        side: `stock` or `ours`.
        case: contains the batch size as `batch` and the dtype as `dtype`.

    Returns:
        A function that decodes the batch, and a function that saves the tokens and durations to a path.
    """
    model, features = build_model(module, case["batch"], case["dtype"])

    def run() -> Any:
        """Decode the batch."""
        return model.generate(input_features=features)

    def save(output: Any, path: str) -> None:
        """Save the tokens and durations."""
        torch.save({"sequences": output.sequences, "durations": output.durations}, path)

    run()
    return run, save


def get_labels(output: dict[str, torch.Tensor], row: int) -> list[tuple[int, int]]:
    """Return a pair (token id, frame) for each label that was emitted in one row of a decoded batch."""
    # the frame of a step is the sum of the durations before it
    frames = output["durations"][row].cumsum(0) - output["durations"][row]
    steps = zip(output["sequences"][row].tolist(), frames.tolist(), strict=True)
    # the id 2 is the pad token; stock transformers continues to decode after the last frame of a row
    return [(token, frame) for token, frame in steps if token < VOCAB_SIZE - 1 and token != 2 and frame < NUM_FRAMES]


def check(rivals: rival.Rivals, case: dict[str, Any]) -> dict[str, int]:
    """Check that both sides emit the same labels in float32, and that the share of labels is as in speech.

    Returns:
        The number of labels that each side emits.
    """
    outputs = rivals.results(case, torch.load)
    num_labels = dict.fromkeys(rival.SIDES, 0)
    for row in range(case["batch"]):
        labels = {side: get_labels(outputs[side], row) for side in rival.SIDES}
        for side in rival.SIDES:
            num_labels[side] += len(labels[side])
        if case["dtype"] == "float32" and labels["stock"] != labels["ours"]:
            raise SystemExit(f"row {row} of {case} differs between stock and ours")
    num_steps = (outputs["ours"]["sequences"][:, 1:] != 2).sum().item()
    label_share = num_labels["ours"] / num_steps
    print(f"{case}: {num_steps} steps, {label_share:.0%} labels", file=sys.stderr)
    if not LABEL_SHARE_RANGE[0] <= label_share <= LABEL_SHARE_RANGE[1]:
        raise SystemExit(f"the share of labels must be in {LABEL_SHARE_RANGE}, got {label_share:.0%}")
    return num_labels


def main() -> None:
    """Run every case, and print the table and the time per label."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", choices=rival.SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        rival.serve(prepare)
        return
    rivals = rival.Rivals(__file__)
    rows, label_counts = [], []
    for dtype in DTYPES:
        for batch_size in BATCH_SIZES:
            label_counts.append(check(rivals, {"batch": batch_size, "dtype": dtype}))
            name = f"greedy TDT, {dtype}, batch {batch_size}, {NUM_FRAMES} frames"
            rows.append((name, rivals.compare(args.rounds)))
    rival.report(rows)
    print("\n| case | stock ms per label | ours ms per label | labels of stock | labels of ours |")
    print("| --- | --- | --- | --- | --- |")
    for (name, timing), labels in zip(rows, label_counts, strict=True):
        stock, ours = (1000 * timing[side].seconds / labels[side] for side in rival.SIDES)
        print(f"| {name} | {stock:.2f} | {ours:.2f} | {labels['stock']} | {labels['ours']} |")


if __name__ == "__main__":
    main()
