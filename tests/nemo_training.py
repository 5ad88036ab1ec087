"""What NeMo's encoder computes in training, with dropout masks that anyone can repeat; writes `golden/training`.

    python tests/nemo_training.py        # where NeMo 3.0.0 is installed

The weights are those of `golden/ctc`, with its two layers twice. A dropout mask is a hash of the position in the tensor
and of how many tensors of that shape were masked before, so that it depends on neither torch's generator nor the order
of modules with other shapes. Which layers stochastic depth drops follows from torch's generator, with a seed per case.
"""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import torch
import yaml

GOLDEN = Path(__file__).parent / "golden"
# case -> settings of the encoder beside those of `golden/ctc`, and the seed of torch's generator
RATES = {"dropout": 0.3, "dropout_pre_encoder": 0.2, "dropout_emb": 0.25, "dropout_att": 0.15}
NONE = dict.fromkeys(RATES, 0.0)
CASES = {
    "dropout": (RATES, 0),
    "defaults": ({"dropout": 0.3, "dropout_pre_encoder": None, "dropout_emb": None, "dropout_att": None}, 0),
    "linear_depth": ({**NONE, "stochastic_depth_drop_prob": 0.7, "stochastic_depth_mode": "linear"}, 0),
    "uniform_depth": (
        {
            **NONE,
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
FRAMES = (60, 33, 48)


class HashedDropout:
    """A stand-in for `torch.nn.functional.dropout`."""

    def __init__(self):
        self.calls = Counter()

    def __call__(self, hidden, p=0.5, training=True, inplace=False):
        """Mask and scale as dropout does."""
        if not training or p == 0:
            return hidden
        # NeMo has axes of length 1 that we do not have
        shape = tuple(size for size in hidden.shape if size > 1)
        index = torch.arange(hidden.numel(), dtype=torch.int64)
        mixed = (index * 2654435761 + self.calls[shape] * 40503 + 12345) % 2**32
        mixed = ((mixed ^ (mixed >> 15)) * 2246822519) % 2**32
        self.calls[shape] += 1
        keep = (mixed ^ (mixed >> 13)).double() / 2**32 >= p
        return hidden * keep.view(hidden.shape) / (1 - p)


def change_settings(encoder, case):
    """Apply the settings of a case to an encoder section; None removes a setting."""
    for name, value in {"n_layers": 4, **CASES[case][0]}.items():
        if value is None:
            encoder.pop(name, None)
        else:
            encoder[name] = value


def repeat_layers(weights):
    """Give layers 2 and 3 the weights of layers 0 and 1."""
    for index in (0, 1):
        prefix = f"encoder.layers.{index}."
        for name in [name for name in weights if name.startswith(prefix)]:
            weights[f"encoder.layers.{index + 2}.{name.removeprefix(prefix)}"] = weights[name].clone()


def features():
    """(B, T, F) features, the same on any version of torch, and the (B,) lengths."""
    index = torch.arange(len(FRAMES) * max(FRAMES) * 80, dtype=torch.int64)
    values = ((index * 2654435761 + 1) % 2**32).double() / 2**32
    return (3 * values - 1.5).float().view(len(FRAMES), max(FRAMES), 80), torch.tensor(FRAMES)


def probe(output, lengths):
    """Return a number that depends on every valid frame of (B, N, H), for a gradient to begin with."""
    weights = torch.cos(torch.arange(output.numel(), dtype=torch.float32)).view(output.shape)
    valid = torch.arange(output.shape[1]) < lengths[:, None]
    return (output * weights * valid[..., None]).sum()


def main():
    """Run every case in NeMo and write what it computes."""
    import nemo
    from nemo.collections.asr.modules import ConformerEncoder
    from safetensors.torch import save_file

    with tarfile.open(GOLDEN / "ctc" / "model.nemo") as tar:
        content = {Path(info.name).name: tar.extractfile(info).read() for info in tar if info.isfile()}
    arrays, plain = {}, torch.nn.functional.dropout
    for case, (_, seed) in CASES.items():
        settings = yaml.safe_load(content["model_config.yaml"])["encoder"]
        change_settings(settings, case)
        weights = torch.load(io.BytesIO(content["model_weights.ckpt"]), weights_only=True)
        repeat_layers(weights)
        encoder = ConformerEncoder(**{key: value for key, value in settings.items() if key != "_target_"})
        encoder.load_state_dict(
            {key.removeprefix("encoder."): value for key, value in weights.items() if key.startswith("encoder.")}
        )
        inputs, lengths = features()
        torch.manual_seed(seed)
        torch.nn.functional.dropout = HashedDropout()
        output, frames = encoder.train()(audio_signal=inputs.transpose(1, 2), length=lengths)
        torch.nn.functional.dropout = plain
        output = output.transpose(1, 2)
        probe(output, frames).backward()
        arrays[f"{case}.output"] = output.detach().contiguous()
        arrays[f"{case}.lengths"] = frames
        for layer in (0, 3):
            module = encoder.layers[layer]
            arrays[f"{case}.gradient{layer}"] = module.self_attn.linear_v.weight.grad.clone()
            arrays[f"{case}.mean{layer}"] = module.conv.batch_norm.running_mean.clone()
    (GOLDEN / "training").mkdir(exist_ok=True)
    save_file(arrays, GOLDEN / "training" / "encoder.safetensors")
    versions = {"nemo": nemo.__version__, "torch": torch.__version__}
    (GOLDEN / "training" / "versions.json").write_text(json.dumps(versions) + "\n")


if __name__ == "__main__":
    main()
