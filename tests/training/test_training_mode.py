"""The encoder in training mode: dropout and stochastic depth as in NeMo, batch norms, and gradient checkpointing."""

import pytest
import torch
from conftest import TESTS, ctc_model, encoder_fields
from nemo_files import edited_archive
from nemo_training import CASES, HashedDropout, change_settings, create_features, repeat_layers, weighted_sum
from safetensors.torch import load_file

import transformers_parakeet as tp
from transformers_parakeet import load_nemo
from transformers_parakeet.networks import conformer

GOLDEN = TESTS / "golden"
NO_DROPOUT = {"activation_dropout": 0.0, "attention_dropout": 0.0, "dropout": 0.0}


def load_encoder(case, folder):
    """Return the encoder of a case of `nemo_training.py`."""
    path = edited_archive(
        GOLDEN / "ctc" / "model.nemo",
        folder,
        settings=lambda settings: change_settings(settings["encoder"], case),
        weights=repeat_layers,
    )
    encoder = load_nemo(path)[0].encoder
    encoder.set_attn_implementation("eager")
    return encoder


def features_and_mask():
    """Return (B, T, F) features and the (B, T) mask of valid frames."""
    features, lengths = create_features()
    return features, torch.arange(features.shape[1]) < lengths[:, None]


# masks count their calls, so a pass that checkpointing repeats would get other masks: only cases without dropout
@pytest.mark.parametrize(
    ("case", "checkpointing"),
    [*((case, False) for case in CASES), ("linear_depth", True), ("uniform_depth", True)],
)
def test_a_training_pass_equals_nemos(case, checkpointing, tmp_path, monkeypatch):
    encoder, expected = load_encoder(case, tmp_path).train(), load_file(GOLDEN / "training" / "encoder.safetensors")
    if checkpointing:
        encoder.gradient_checkpointing_enable()
    features, mask = features_and_mask()
    monkeypatch.setattr(torch.nn.functional, "dropout", HashedDropout())
    torch.manual_seed(CASES[case][1])
    output = encoder(features, attention_mask=mask)
    frame_lengths = expected[f"{case}.lengths"]
    assert output.attention_mask.sum(-1).tolist() == frame_lengths.tolist()
    weighted_sum(output.last_hidden_state, frame_lengths).backward()
    is_valid = output.attention_mask.bool()
    # measured: 4e-6 on values of up to 4
    torch.testing.assert_close(
        output.last_hidden_state[is_valid], expected[f"{case}.output"][is_valid], atol=4e-5, rtol=0
    )
    for index in (0, 3):
        layer = encoder.layers[index]
        # measured: 2e-6 of the largest gradient; a dropped layer has gradients of 0
        gradient = expected[f"{case}.gradient{index}"]
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(layer.self_attn.v_proj.weight.grad / scale, gradient / scale, atol=2e-5, rtol=0)
        # a dropped layer runs as well, and updates its statistics
        # measured: 6e-8
        torch.testing.assert_close(layer.conv.norm.running_mean, expected[f"{case}.mean{index}"], atol=6e-7, rtol=0)


@pytest.mark.parametrize(
    ("mode", "start", "expected"),
    [
        (None, 1, [0.6] * 4),
        ("uniform", 1, [0.0, 0.6, 0.6, 0.6]),
        ("uniform", 3, [0.0, 0.0, 0.0, 0.6]),
        ("linear", 1, [0.0, 0.2, 0.4, 0.6]),
        ("linear", 2, [0.0, 0.0, 0.3, 0.6]),
        ("linear", 4, [0.0] * 4),
    ],
)
def test_probabilities_of_dropping_a_layer(mode, start, expected):
    fields = encoder_fields(
        num_hidden_layers=4, layerdrop=0.6, stochastic_depth_mode=mode, stochastic_depth_start_layer=start
    )
    assert conformer.compute_drop_probabilities(tp.ParakeetEncoderConfig(**fields)) == pytest.approx(expected)


def test_the_fields_of_a_stock_configuration_keep_their_meaning():
    """There is no dropout after residual branches, and the output of remaining layers is not rescaled."""
    fields = encoder_fields(layerdrop=0.5, activation_dropout=0.5, dropout=0.0, attention_dropout=0.0)
    model = tp.ParakeetEncoder(tp.ParakeetEncoderConfig(**fields)).train()
    assert (model.config.residual_dropout, model.config.stochastic_depth_mode) == (0.0, None)
    for layer in model.layers:
        layer.feed_forward1.dropout = layer.feed_forward2.dropout = 0.0
    features, _ = create_features()

    def drops_only_the_first_layer(seed):
        """Return whether the draws that follow a seed drop the first of two layers and keep the second."""
        torch.manual_seed(seed)
        return torch.rand(2).lt(0.5).tolist() == [True, False]

    seed = next(seed for seed in range(99) if drops_only_the_first_layer(seed))
    torch.manual_seed(seed)
    output = model(features).last_hidden_state
    hidden = model.subsampling(features) * model.input_scale
    expected = model.layers[1](hidden, position_embeddings=model.encode_positions(hidden))
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_updates_batch_norms_once(reentrant):
    statistics, gradients = [], []
    for checkpointing in (False, True):
        model, _ = ctc_model(**NO_DROPOUT)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        features, mask = features_and_mask()
        labels = torch.tensor([[1, 2]] * 3)
        # reentrant checkpointing repeats the first layer only if its input requires a gradient
        model(features.requires_grad_(), attention_mask=mask, labels=labels).loss.backward()
        statistics.append({name: value for name, value in model.named_buffers() if ".conv.norm." in name})
        gradients.append([parameter.grad for parameter in model.parameters()])
    plain, checkpointed = statistics
    assert {int(value) for name, value in checkpointed.items() if "num_batches" in name} == {1}
    for name, value in plain.items():
        # measured: 6e-8, because the first reentrant pass runs without gradients and overwrites activations
        torch.testing.assert_close(value, checkpointed[name], atol=6e-7, rtol=0)
    assert any(value.abs().max() > 0 for name, value in checkpointed.items() if "running_mean" in name)
    for plain_gradient, checkpointed_gradient in zip(*gradients, strict=True):
        torch.testing.assert_close(plain_gradient, checkpointed_gradient, atol=1e-5, rtol=1e-4)


def test_a_batch_of_one_frame_is_normalised_by_the_running_statistics():
    """The standard deviation of a single frame is undefined."""
    model, _ = ctc_model(**NO_DROPOUT)
    for layer in model.encoder.layers:
        layer.conv.norm.running_mean.normal_()
    # eight mel frames are one encoder frame
    features = create_features()[0][:1, :8]
    expected = model(features).logits
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    output = model.train()(features, labels=torch.tensor([[3]]))
    assert output.logits.shape[1] == 1
    torch.testing.assert_close(output.logits, expected, atol=1e-5, rtol=1e-5)
    output.loss.backward()
    assert output.loss.isfinite()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    first_norm = model.encoder.layers[0].conv.norm
    assert first_norm.weight.grad.abs().sum() > 0
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    # two clips of one frame have a standard deviation
    model(features.repeat(2, 1, 1))
    assert not torch.equal(first_norm.running_mean, buffers["encoder.layers.0.conv.norm.running_mean"])
