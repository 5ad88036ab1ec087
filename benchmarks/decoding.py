"""Times greedy TDT decoding with the full decoder against stock `generate`, on the same encoder output, in one run.

    python benchmarks/decoding.py [--rounds 5]

The weights are random, shifted so that 25 to 45 % of the steps are labels, as in speech. Checks first that both sides
give the same tokens on the same frames.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import rival
import torch

FRAMES, VOCABULARY, WIDTH, DURATIONS = 375, 8193, 640, (0, 1, 2, 3, 4)
BATCHES = (1, 16)

# share of frames on which the blank beats every label for the first predictor state
BLANK_SHARE = 0.72
LABEL_SHARE = (0.25, 0.45)


def random_weights(model: torch.nn.Module) -> None:
    """Fill decoder and joint with numbers that do not depend on the side."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(model.named_parameters()):
        if name.startswith(("decoder.", "joint.")):
            std = 1.0 if "embedding" in name else 0.08
            parameter.normal_(std=std, generator=generator)


@torch.no_grad()
def make_plausible(model: Any, frames: torch.Tensor) -> None:
    """Shift the output biases: blank on most frames, no duration of zero, durations below all tokens."""
    head, blank = model.joint.head, VOCABULARY - 1
    start = model.decoder(torch.full((1, 1), blank))[0, 0]
    scores = head(torch.relu(frames[0] + start))
    labels = scores[:, :blank].amax(-1)
    head.bias[blank] += torch.quantile(labels - scores[:, blank], BLANK_SHARE)
    # stock has no limit on labels that do not move: none here
    head.bias[VOCABULARY] -= 100.0
    # stock takes the token's best score over the durations, too
    head.bias[VOCABULARY:] -= 100.0


def prepare(module: Any, side: str, case: dict[str, Any]) -> tuple[Callable[[], Any], Callable[[Any, str], None]]:
    """Build the model with its encoder replaced by fixed frames."""
    encoder = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8,
               "subsampling_conv_channels": 8, "num_mel_bins": 80}  # fmt: skip
    config = module.ParakeetTDTConfig(
        vocab_size=VOCABULARY, blank_token_id=VOCABULARY - 1, decoder_hidden_size=WIDTH, durations=list(DURATIONS),
        encoder_config=encoder,
    )  # fmt: skip
    model = module.ParakeetForTDT(config).eval()
    frames = torch.randn(max(BATCHES), FRAMES, WIDTH, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        random_weights(model)
    make_plausible(model, frames)
    frames = frames[: case["batch"]]
    output_class = sys.modules[type(model).__module__].ParakeetEncoderModelOutput
    mask = torch.ones(case["batch"], FRAMES, dtype=torch.int)
    model.get_audio_features = lambda *args, **kwargs: output_class(
        last_hidden_state=frames, pooler_output=frames, attention_mask=mask
    )
    model.generation_config.decoder_start_token_id = config.blank_token_id
    features = torch.zeros(case["batch"], FRAMES * 8, 80)

    def run() -> Any:
        return model.generate(input_features=features)

    def save(out: Any, path: str) -> None:
        torch.save({"sequences": out.sequences, "durations": out.durations}, path)

    run()
    return run, save


def labels(out: dict[str, torch.Tensor], row: int) -> list[tuple[int, int]]:
    """Return the labels of a row with their frames."""
    frames = out["durations"][row].cumsum(0) - out["durations"][row]
    steps = zip(out["sequences"][row].tolist(), frames.tolist(), strict=True)
    # stock goes on after the end of a row
    return [(token, frame) for token, frame in steps if token < VOCABULARY - 1 and token != 2 and frame < FRAMES]


def check(rivals: rival.Rivals, case: dict[str, Any]) -> None:
    """Compare the labels of both sides and see that the model behaves like speech."""
    out = rivals.results(case, torch.load)
    for row in range(case["batch"]):
        if labels(out["stock"], row) != labels(out["ours"], row):
            raise SystemExit(f"row {row} of {case} differs between stock and ours")
    sequences = out["ours"]["sequences"][:, 1:]
    steps = (sequences != 2).sum().item()
    share = ((sequences < VOCABULARY - 1) & (sequences != 2)).sum().item() / steps
    print(f"{case}: {steps} steps, {share:.0%} labels", file=sys.stderr)
    if not LABEL_SHARE[0] <= share <= LABEL_SHARE[1]:
        raise SystemExit(f"{share:.0%} of the steps are labels, wanted are {LABEL_SHARE}")


def main() -> None:
    """Run every case and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", choices=rival.SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        rival.serve(prepare)
        return
    rivals = rival.Rivals(__file__)
    rows = []
    for batch in BATCHES:
        check(rivals, {"batch": batch})
        rows.append((f"greedy TDT, batch {batch}, {FRAMES} frames", rivals.compare(args.rounds)))
    rival.report(rows)


if __name__ == "__main__":
    main()
