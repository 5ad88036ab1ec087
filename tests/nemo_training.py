"""Computes with NeMo's encoder in training mode, with reproducible dropout masks, and writes `golden/training`.

    python tests/nemo_training.py        # in an environment with NeMo 3.0.0

The weights are those of `golden/ctc`, with its two layers twice. A dropout mask is a hash of the position in the tensor
and of the number of tensors of the same shape that were masked before. So it depends neither on torch's generator nor
on the order of modules with other shapes. Torch's generator, with a seed per case, selects the layers that stochastic
depth drops.
"""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import torch
import yaml

GOLDEN = Path(__file__).parent / "golden"
RATES = {"dropout": 0.3, "dropout_pre_encoder": 0.2, "dropout_emb": 0.25, "dropout_att": 0.15}
NO_DROPOUT = dict.fromkeys(RATES, 0.0)
# case -> encoder settings that differ from those of `golden/ctc` (None removes one), and the seed of torch's generator
CASES = {
    "dropout": (RATES, 0),
    "defaults": ({"dropout": 0.3, "dropout_pre_encoder": None, "dropout_emb": None, "dropout_att": None}, 0),
    "linear_depth": ({**NO_DROPOUT, "stochastic_depth_drop_prob": 0.7, "stochastic_depth_mode": "linear"}, 0),
    "uniform_depth": (
        {
            **NO_DROPOUT,
            "stochastic_depth_drop_prob": 0.5,
            "stochastic_depth_mode": "uniform",
            "stochastic_depth_start_layer": 2,
        },
        1,
    ),
    "default_depth": (
        {
            **RATES,
            "stochastic_depth_drop_prob": 0.6,
            "stochastic_depth_mode": None,
            "stochastic_depth_start_layer": None,
        },
        2,
    ),
}
# mel frames of the clips of the batch
FRAME_LENGTHS = (60, 33, 48)
NUM_MEL_BINS = 80
NUM_LAYERS = 4


class HashedDropout:
    """A replacement of `torch.nn.functional.dropout` whose masks are hashes."""

    def __init__(self):
        self.num_calls = Counter()

    def __call__(self, hidden, p=0.5, training=True, inplace=False):
        """Set a share `p` of the values to 0 and scale the others by 1 / (1 - p)."""
        if not training or p == 0:
            return hidden
        # NeMo's tensors have axes of length 1 that ours lack
        shape = tuple(size for size in hidden.shape if size > 1)
        index = torch.arange(hidden.numel(), dtype=torch.int64)
        mixed = (index * 2654435761 + self.num_calls[shape] * 40503 + 12345) % 2**32
        mixed = ((mixed ^ (mixed >> 15)) * 2246822519) % 2**32
        self.num_calls[shape] += 1
        is_kept = (mixed ^ (mixed >> 13)).double() / 2**32 >= p
        return hidden * is_kept.view(hidden.shape) / (1 - p)


def change_settings(encoder_settings, case):
    """Apply the settings of a case to the encoder section of NeMo's YAML, in place."""
    for name, value in {"n_layers": NUM_LAYERS, **CASES[case][0]}.items():
        if value is None:
            encoder_settings.pop(name, None)
        else:
            encoder_settings[name] = value


def repeat_layers(weights):
    """Give layers 2 and 3 of a NeMo state dict the weights of layers 0 and 1, in place."""
    for index in (0, 1):
        prefix = f"encoder.layers.{index}."
        for name in [name for name in weights if name.startswith(prefix)]:
            weights[f"encoder.layers.{index + 2}.{name.removeprefix(prefix)}"] = weights[name].clone()


def create_features():
    """Return (B, T, F) features that are the same on any version of torch, and the (B,) frame lengths."""
    batch_size, num_frames = len(FRAME_LENGTHS), max(FRAME_LENGTHS)
    index = torch.arange(batch_size * num_frames * NUM_MEL_BINS, dtype=torch.int64)
    values = ((index * 2654435761 + 1) % 2**32).double() / 2**32
    features = (3 * values - 1.5).float().view(batch_size, num_frames, NUM_MEL_BINS)
    return features, torch.tensor(FRAME_LENGTHS)


def weighted_sum(output, lengths):
    """Return a fixed weighted sum of the valid frames of (B, N, H), as a loss for the backward pass."""
    weights = torch.cos(torch.arange(output.numel(), dtype=torch.float32)).view(output.shape)
    is_valid = torch.arange(output.shape[1]) < lengths[:, None]
    return (output * weights * is_valid[..., None]).sum()


def read_archive(path):
    """Return the settings and the state dict of a `.nemo` file."""
    with tarfile.open(path) as tar:
        members = {Path(info.name).name: tar.extractfile(info).read() for info in tar if info.isfile()}
    weights = torch.load(io.BytesIO(members["model_weights.ckpt"]), weights_only=True)
    return yaml.safe_load(members["model_config.yaml"]), weights


def run_case(case):
    """Run forward and backward pass of a case in NeMo; return arrays by name."""
    from nemo.collections.asr.modules import ConformerEncoder

    settings, weights = read_archive(GOLDEN / "ctc" / "model.nemo")
    encoder_settings = settings["encoder"]
    change_settings(encoder_settings, case)
    repeat_layers(weights)
    encoder = ConformerEncoder(**{name: value for name, value in encoder_settings.items() if name != "_target_"})
    prefix = "encoder."
    encoder.load_state_dict(
        {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    )
    features, lengths = create_features()
    torch.manual_seed(CASES[case][1])
    original_dropout, torch.nn.functional.dropout = torch.nn.functional.dropout, HashedDropout()
    output, frame_lengths = encoder.train()(audio_signal=features.transpose(1, 2), length=lengths)
    torch.nn.functional.dropout = original_dropout
    output = output.transpose(1, 2)
    weighted_sum(output, frame_lengths).backward()
    arrays = {f"{case}.output": output.detach().contiguous(), f"{case}.lengths": frame_lengths}
    for index in (0, NUM_LAYERS - 1):
        layer = encoder.layers[index]
        arrays[f"{case}.gradient{index}"] = layer.self_attn.linear_v.weight.grad.clone()
        arrays[f"{case}.mean{index}"] = layer.conv.batch_norm.running_mean.clone()
    return arrays


def main():
    """Run all cases in NeMo and write the arrays and the versions used."""
    import nemo
    from safetensors.torch import save_file

    arrays = {}
    for case in CASES:
        arrays.update(run_case(case))
    folder = GOLDEN / "training"
    folder.mkdir(exist_ok=True)
    save_file(arrays, folder / "encoder.safetensors")
    versions = {"nemo": nemo.__version__, "torch": torch.__version__}
    (folder / "versions.json").write_text(json.dumps(versions) + "\n")


if __name__ == "__main__":
    main()
