"""The encoder in training: dropout and stochastic depth as NeMo has them, batch norms, and gradient checkpointing."""

import pytest
import torch
from conftest import TESTS, ctc_model, encoder_fields
from nemo_files import edited_archive
from nemo_training import CASES, HashedDropout, change_settings, features, probe, repeat_layers
from safetensors.torch import load_file

import transformers_parakeet as tp
from transformers_parakeet import load_nemo
from transformers_parakeet.networks import conformer

GOLDEN = TESTS / "golden"


def nemo_encoder(case, folder):
    """The encoder of a case of `nemo_training.py`."""
    path = edited_archive(
        GOLDEN / "ctc" / "model.nemo", folder, settings=lambda tree: change_settings(tree["encoder"], case),
        weights=repeat_layers,
    )  # fmt: skip
    encoder = load_nemo(path)[0].encoder
    encoder.set_attn_implementation("eager")
    return encoder


# a repeated pass would have other masks, because they count their calls
@pytest.mark.parametrize(
    ("case", "checkpointing"),
    [*((case, False) for case in CASES), ("linear_depth", True), ("uniform_depth", True)],
)
def test_training_is_nemos(case, checkpointing, tmp_path, monkeypatch):
    encoder, truth = nemo_encoder(case, tmp_path).train(), load_file(GOLDEN / "training" / "encoder.safetensors")
    if checkpointing:
        encoder.gradient_checkpointing_enable()
    inputs, lengths = features()
    mask = torch.arange(inputs.shape[1]) < lengths[:, None]
    monkeypatch.setattr(torch.nn.functional, "dropout", HashedDropout())
    torch.manual_seed(CASES[case][1])
    output = encoder(inputs, attention_mask=mask)
    frames = truth[f"{case}.lengths"]
    assert output.attention_mask.sum(-1).tolist() == frames.tolist()
    probe(output.last_hidden_state, frames).backward()
    valid = output.attention_mask.bool()
    # measured: 4e-6 on values of up to 4
    torch.testing.assert_close(output.last_hidden_state[valid], truth[f"{case}.output"][valid], atol=4e-5, rtol=0)
    for layer in (0, 3):
        module = encoder.layers[layer]
        # measured: 2e-6 of the largest gradient; a dropped layer has gradients of 0
        gradient = truth[f"{case}.gradient{layer}"]
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(module.self_attn.v_proj.weight.grad / scale, gradient / scale, atol=2e-5, rtol=0)
        # a dropped layer is run, too, and moves its statistics
        # measured: 6e-8
        torch.testing.assert_close(module.conv.norm.running_mean, truth[f"{case}.mean{layer}"], atol=6e-7, rtol=0)


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
    assert conformer.drop_probabilities(tp.ParakeetEncoderConfig(**fields)) == pytest.approx(expected)


def test_a_stock_configuration_keeps_the_meaning_of_its_fields():
    """No dropout after the residual branches, and layers that stay are not rescaled."""
    fields = encoder_fields(layerdrop=0.5, activation_dropout=0.5, dropout=0.0, attention_dropout=0.0)
    model = tp.ParakeetEncoder(tp.ParakeetEncoderConfig(**fields)).train()
    config = model.config
    assert (config.residual_dropout, config.stochastic_depth_mode) == (0.0, None)
    for layer in model.layers:
        layer.feed_forward1.dropout = layer.feed_forward2.dropout = 0.0
    inputs, _ = features()
    # the first layer is dropped, the second is not
    seed = next(s for s in range(99) if (torch.manual_seed(s), torch.rand(2))[1].lt(0.5).tolist() == [True, False])
    torch.manual_seed(seed)
    output = model(inputs).last_hidden_state
    hidden = model.subsampling(inputs) * model.input_scale
    expected = model.layers[1](hidden, position_embeddings=model.encode_positions(hidden))
    torch.testing.assert_close(output, expected)


# batch norms


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_updates_batch_norms_once(reentrant):
    statistics, gradients = [], []
    for checkpointing in (False, True):
        model, _ = ctc_model(activation_dropout=0.0, attention_dropout=0.0, dropout=0.0)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        inputs, lengths = features()
        mask = torch.arange(inputs.shape[1]) < lengths[:, None]
        # a first layer without a gradient would not be repeated by the reentrant kind
        model(inputs.requires_grad_(), attention_mask=mask, labels=torch.tensor([[1, 2]] * 3)).loss.backward()
        statistics.append({name: value for name, value in model.named_buffers() if ".conv.norm." in name})
        gradients.append([p.grad for p in model.parameters()])
    assert {int(v) for k, v in statistics[1].items() if "num_batches" in k} == {1}
    for name, value in statistics[0].items():
        # measured: 6e-8, because the first pass of the reentrant kind runs without gradients and overwrites
        torch.testing.assert_close(value, statistics[1][name], atol=6e-7, rtol=0)
    assert any(value.abs().max() > 0 for name, value in statistics[1].items() if "running_mean" in name)
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, atol=1e-5, rtol=1e-4)


def test_one_frame_has_no_deviation_and_is_normalised_by_the_running_statistics():
    model, _ = ctc_model(activation_dropout=0.0, attention_dropout=0.0, dropout=0.0)
    for layer in model.encoder.layers:
        layer.conv.norm.running_mean.normal_()
    inputs = features()[0][:1, :8]
    expected = model(inputs).logits
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    out = model.train()(inputs, labels=torch.tensor([[3]]))
    assert out.logits.shape[1] == 1
    torch.testing.assert_close(out.logits, expected, atol=1e-5, rtol=1e-5)
    out.loss.backward()
    assert out.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert model.encoder.layers[0].conv.norm.weight.grad.abs().sum() > 0
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    # two clips of one frame have a deviation
    model(inputs.repeat(2, 1, 1))
    assert not torch.equal(
        model.encoder.layers[0].conv.norm.running_mean, buffers["encoder.layers.0.conv.norm.running_mean"]
    )
