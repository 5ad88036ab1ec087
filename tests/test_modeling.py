"""Checks the encoder and the models: attention functions, masks, precision, losses, gradients and compilation."""

import copy

import pytest
import torch
from conftest import ctc_model, encoder_fields, noise
from torch.nn import functional as F

import transformers_parakeet as tp
from transformers_parakeet.losses.transducer import rnnt_loss, tdt_loss
from transformers_parakeet.networks.attention_layout import relative_shift
from transformers_parakeet.networks.fast_linear import apply_pointwise_conv
from transformers_parakeet.networks.subsampling import compute_subsampled_lengths

# two orders of float32 sums in a two-layer encoder of width 32, measured: 4e-6
TOLERANCE = 2e-5


def encoder(seed=0, **changes):
    """Return a small random encoder."""
    torch.manual_seed(seed)
    return tp.ParakeetEncoder(tp.ParakeetEncoderConfig(**encoder_fields(**changes))).eval()


def features(batch=3, frames=200, valid=(200, 117, 40)):
    """Return (batch, frames, 80) random features and their mask."""
    torch.manual_seed(1)
    mask = torch.arange(frames) < torch.tensor(valid)[:, None]
    return torch.randn(batch, frames, 80), mask


@pytest.mark.parametrize("backend", ["sdpa", "flex_attention"])
def test_attention_functions_agree(backend):
    model, (inputs, mask) = encoder(), features()
    with torch.no_grad():
        model.set_attn_implementation("eager")
        wanted = model(inputs, attention_mask=mask)
        model.set_attn_implementation(backend)
        got = model(inputs, attention_mask=mask)
    valid = wanted.attention_mask.bool()[..., None]
    torch.testing.assert_close(got.last_hidden_state * valid, wanted.last_hidden_state * valid, atol=TOLERANCE, rtol=0)


def test_the_padding_does_not_change_the_output():
    model, (inputs, mask) = encoder(), features()
    changed = torch.where(mask[..., None], inputs, 1e3)
    with torch.no_grad():
        expected = model(inputs, attention_mask=mask)
        with_changed_padding = model(changed, attention_mask=mask)
        for row, frames in enumerate((200, 117, 40)):
            alone = model(inputs[row : row + 1, :frames], attention_mask=mask[row : row + 1, :frames])
            count = alone.last_hidden_state.shape[1]
            for batch in (expected, with_changed_padding):
                got = batch.last_hidden_state[row, :count]
                torch.testing.assert_close(got, alone.last_hidden_state[0], atol=TOLERANCE, rtol=0)


def test_a_mask_of_ones_equals_no_mask():
    model, (inputs, _) = encoder(), features()
    with torch.no_grad():
        masked = model(inputs, attention_mask=torch.ones(3, 200, dtype=torch.long))
        torch.testing.assert_close(masked.last_hidden_state, model(inputs).last_hidden_state, atol=TOLERANCE, rtol=0)
    assert masked.attention_mask.tolist() == [[1] * 25] * 3


def test_a_clip_without_frames_gives_finite_states():
    model, (inputs, mask) = encoder(), features(valid=(200, 117, 0))
    with torch.no_grad():
        out = model(inputs, attention_mask=mask)
    assert torch.isfinite(out.last_hidden_state).all()
    assert out.attention_mask.sum(1).tolist() == [25, 15, 0]


def test_lengths_follow_the_convolutions():
    config = tp.ParakeetEncoderConfig(**encoder_fields())
    conv = torch.nn.Conv1d(1, 1, 3, stride=2, padding=1)
    for frames in range(1, 70):
        signal = torch.zeros(1, 1, frames)
        assert compute_subsampled_lengths(frames, config) == conv(conv(conv(signal))).shape[-1]
    assert compute_subsampled_lengths(torch.tensor([0, 1, 8, 9]), config).tolist() == [0, 1, 1, 2]


def test_relative_shift_against_its_definition():
    for frames in (1, 2, 5, 63):
        scores = torch.randn(2, 3, frames, 2 * frames - 1)
        shifted = relative_shift(scores, frames)
        for query in range(frames):
            for key in range(frames):
                torch.testing.assert_close(shifted[..., query, key], scores[..., query, key - query + frames - 1])


@pytest.mark.parametrize("norm_type", ["batch_norm", "layer_norm"])
@pytest.mark.parametrize("context", [[8, 0], [6, 2], [0, 8]])
def test_an_uneven_convolution_reads_its_context(context, norm_type):
    module = encoder(conv_context_size=context, conv_norm_type=norm_type).layers[0].conv
    hidden = torch.randn(2, 30, 32)
    with torch.no_grad():
        gated = F.glu(module.pointwise_conv1(hidden.transpose(1, 2)), dim=1)
        filtered = F.conv1d(
            F.pad(gated, context), module.depthwise_conv.weight, module.depthwise_conv.bias, groups=gated.shape[1]
        )
        if norm_type == "layer_norm":
            normed = module.norm(filtered.transpose(1, 2)).transpose(1, 2)
        else:
            normed = module.norm(filtered)
        plain = module.pointwise_conv2(F.silu(normed)).transpose(1, 2)
        torch.testing.assert_close(module(hidden), plain, atol=TOLERANCE, rtol=0)


def test_outside_training_the_norm_is_folded_into_the_convolution():
    module = encoder().layers[0].conv
    torch.nn.init.normal_(module.norm.running_mean)
    torch.nn.init.uniform_(module.norm.running_var, 0.5, 2.0)
    hidden = torch.randn(2, 30, 32)
    with torch.no_grad():
        folded = module(hidden)
        gated = F.glu(module.pointwise_conv1(hidden.transpose(1, 2)), dim=1)
        plain = module.pointwise_conv2(F.silu(module.norm(module.depthwise_conv(gated)))).transpose(1, 2)
    torch.testing.assert_close(folded, plain, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_features_are_cast_to_the_models_dtype(dtype):
    model, (inputs, mask) = encoder(), features()
    with torch.no_grad():
        wanted = model(inputs, attention_mask=mask).last_hidden_state
        got = model.to(dtype)(inputs, attention_mask=mask).last_hidden_state
    assert got.dtype == dtype
    # bfloat16 has 8 bits of precision; measured: mean error 0.03 of values of size 0.8
    assert (got.float() - wanted).abs().mean().item() < 0.06


def test_gradient_checkpointing_does_not_change_gradients():
    model, _ = ctc_model()
    inputs, mask = features()
    labels = torch.randint(1, 50, (3, 4))
    gradients = []
    for checkpointing in (False, True):
        twin = copy.deepcopy(model).train()
        for module in twin.modules():
            if isinstance(module, torch.nn.Dropout) or hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
            if hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.0
        twin.config.encoder_config.dropout = 0.0
        if checkpointing:
            twin.gradient_checkpointing_enable()
        twin(inputs, attention_mask=mask, labels=labels).loss.backward()
        gradients.append([p.grad for p in twin.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, atol=1e-5, rtol=1e-4)


def test_layerdrop_skips_layers_in_training_only():
    model, (inputs, mask) = encoder(layerdrop=1.0), features()
    without = model(inputs, attention_mask=mask).last_hidden_state
    model.train()
    model.config.dropout = 0.0
    skipped = model(inputs, attention_mask=mask).last_hidden_state
    expected = model.subsampling(inputs, mask.sum(-1)) * model.input_scale
    torch.testing.assert_close(skipped, expected)
    assert (skipped - without).abs().max().item() > 0.1


def test_hidden_states_and_attentions():
    model, (inputs, mask) = encoder(), features()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(inputs, attention_mask=mask, output_hidden_states=True, output_attentions=True)
    assert [tuple(h.shape) for h in out.hidden_states] == [(3, 25, 32)] * 3
    assert [tuple(a.shape) for a in out.attentions] == [(3, 4, 25, 25)] * 2
    torch.testing.assert_close(out.attentions[0].sum(-1), torch.ones(3, 4, 25))
    # no frame attends to the padding
    assert out.attentions[0][2, :, :, 5:].max().item() == 0.0


def test_position_keys_are_computed_once_per_batch():
    model, (inputs, mask) = encoder(), features()
    shapes = []
    for layer in model.layers:
        layer.self_attn.relative_k_proj.register_forward_hook(lambda m, args, out: shapes.append(tuple(out.shape)))
    with torch.no_grad():
        model(inputs, attention_mask=mask)
    assert shapes == [(49, 32)] * 2


def test_ctc_loss_ignores_padding_of_both_kinds():
    model, _ = ctc_model()
    inputs, mask = features()
    blank = model.config.pad_token_id
    rows = [[5, 6, 7], [8], []]
    losses = []
    for fill in (-100, blank):
        labels = torch.tensor([row + [fill] * (4 - len(row)) for row in rows])
        losses.append(model(inputs, attention_mask=mask, labels=labels).loss)
    with torch.no_grad():
        scores = model(inputs, attention_mask=mask).logits.double().log_softmax(-1).transpose(0, 1)
    truth = F.ctc_loss(
        scores, torch.tensor([5, 6, 7, 8]), torch.tensor([25, 15, 5]), torch.tensor([3, 1, 0]), blank=blank
    )
    for loss in losses:
        torch.testing.assert_close(loss.double(), truth, atol=1e-4, rtol=1e-5)


def test_generate_returns_the_best_token_of_each_frame_and_blanks_after_the_clip():
    model, _ = ctc_model()
    inputs, mask = features()
    with torch.no_grad():
        best = model(inputs, attention_mask=mask).logits.argmax(-1)
    sequences = model.generate(input_features=inputs, attention_mask=mask)
    for row, frames in enumerate((25, 15, 5)):
        assert sequences[row, :frames].tolist() == best[row, :frames].tolist()
        assert set(sequences[row, frames:].tolist()) <= {model.config.pad_token_id}
    out = model.generate(
        input_features=inputs, attention_mask=mask, return_dict_in_generate=True, output_confidence=True
    )
    assert out.sequences.tolist() == sequences.tolist()
    assert tuple(out.token_confidence.shape) == tuple(sequences.shape)
    assert tuple(out.logits.shape) == (3, 25, model.config.vocab_size)


def test_generate_compiles_as_one_graph():
    model, processor = ctc_model()
    batch = processor([noise(1.0)], sampling_rate=16000, padding="max_length", max_length=32000)
    wanted = model.generate(**batch)
    torch._dynamo.reset()
    # only tracing is tested: compiling takes a minute and is done by PyTorch
    compiled = torch.compile(model.generate, fullgraph=True, backend="eager")
    assert compiled(**batch).tolist() == wanted.tolist()


@pytest.mark.parametrize("compiled_part", ["encoder", "generate"])
def test_each_padded_length_is_compiled_only_once(compiled_part):
    model, processor = ctc_model()
    graphs = []

    def count_graphs(graph, _):
        graphs.append(graph)
        return graph.forward

    def compute(function, batch):
        if compiled_part == "generate":
            return function(**batch)
        with torch.no_grad():
            return function(batch["input_features"], attention_mask=batch["attention_mask"]).last_hidden_state

    eager = model.generate if compiled_part == "generate" else model.encoder
    torch._dynamo.reset()
    compiled = torch.compile(eager, fullgraph=True, dynamic=False, backend=count_graphs)
    lengths = {16000: (0.4, 0.7, 1.0), 24000: (1.2, 1.5), 32000: (1.6, 1.9)}
    for repeat in range(2):
        for max_length, seconds in lengths.items():
            for duration in seconds:
                batch = processor([noise(duration)], sampling_rate=16000, padding="max_length", max_length=max_length)
                # the eager backend runs the same operations
                torch.testing.assert_close(compute(compiled, batch), compute(eager, batch), rtol=0, atol=TOLERANCE)
        assert len(graphs) == len(lengths), f"repeat {repeat}"


def test_training_step_as_documented():
    model, processor = ctc_model()
    inputs = processor(audio=[noise(1.0), noise(0.5)], text=["the fox", "a dog"], sampling_rate=16000)
    loss = model.train()(**inputs).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert model.ctc_head.weight.grad.abs().sum().item() > 0


def transducer(kind="tdt", seed=0, **changes):
    """Return a random transducer of 30 tokens whose joint network is wider than its prediction network."""
    torch.manual_seed(seed)
    fields = {"vocab_size": 30, "pad_token_id": 28, "blank_token_id": 29, "decoder_hidden_size": 16}
    fields |= {"joint_hidden_size": 24, "num_decoder_layers": 1, "encoder_config": encoder_fields(), **changes}
    if kind == "rnnt":
        return tp.ParakeetForRNNT(tp.ParakeetRNNTConfig(**fields)).eval()
    return tp.ParakeetForTDT(tp.ParakeetTDTConfig(**fields)).eval()


# labels with padding of both kinds, -100 and the pad token, at any position
PADDED = torch.tensor([[3, 7, -100, 1, 28], [28, 28, -100, -100, -100], [5, 5, 5, 5, 5]])
LABELS, COUNTS = torch.tensor([[3, 7, 1, 0, 0], [0, 0, 0, 0, 0], [5, 5, 5, 5, 5]]), torch.tensor([3, 0, 5])


def loss_from_logits(model, out, **options):
    """Compute the loss from the returned logits, without the fused loss."""
    lengths = out.attention_mask.sum(-1), COUNTS
    config, reduction = model.config, model.config.loss_reduction
    if isinstance(model, tp.ParakeetForTDT):
        parts = out.logits[..., : config.vocab_size], out.logits[..., config.vocab_size :]
        options = {"sigma": config.loss_sigma, "reduction": reduction, **options}
        return tdt_loss(*parts, LABELS, *lengths, config.blank_token_id, config.durations, **options)
    return rnnt_loss(out.logits, LABELS, *lengths, config.blank_token_id, reduction, **options)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("rnnt", {}),
        ("rnnt", {"hidden_act": "tanh", "loss_reduction": "mean_batch", "fastemit_lambda": 0.1}),
        ("tdt", {"loss_sigma": 0.05, "durations": [0, 1, 4]}),
        ("tdt", {"hidden_act": "sigmoid", "fastemit_lambda": 0.2}),
    ],
)
def test_the_fused_loss_of_a_transducer_equals_the_loss_of_its_logits(kind, changes):
    model, (inputs, mask) = transducer(kind, **changes), features()
    out = model(inputs, attention_mask=mask, labels=PADDED)
    assert out.logits is None
    with_logits = model(inputs, attention_mask=mask, labels=PADDED, output_logits=True)
    truth = loss_from_logits(model, with_logits, fastemit_lambda=model.config.fastemit_lambda)
    assert torch.equal(out.loss, with_logits.loss)
    torch.testing.assert_close(out.loss, truth, rtol=1e-6, atol=0)
    prefix = torch.nn.functional.pad(LABELS, (1, 0), value=29)
    plain = model(inputs, attention_mask=mask, decoder_input_ids=prefix)
    assert plain.loss is None
    assert torch.equal(plain.logits, with_logits.logits)
    parameters = [p for p in model.parameters() if p.requires_grad]
    ours = torch.autograd.grad(out.loss, parameters, allow_unused=True)
    wanted = torch.autograd.grad(truth, parameters, allow_unused=True)
    for gradient, expected in zip(ours, wanted, strict=True):
        assert (gradient is None) == (expected is None)
        if gradient is not None:
            # float32 sums in another order, measured: 4e-6 of the largest entry
            assert (gradient - expected).abs().max() <= 2e-5 * expected.abs().max() + 1e-7


def test_the_loss_of_a_hybrid_is_the_weighted_sum_of_both_losses():
    model, (inputs, mask) = transducer(ctc_head=True, ctc_loss_weight=0.3), features()
    out = model(inputs, attention_mask=mask, labels=PADDED, output_logits=True)
    scores = apply_pointwise_conv(model.ctc_head, out.last_hidden_state).double().log_softmax(-1).transpose(0, 1)
    lengths = out.attention_mask.sum(-1)
    ctc = F.ctc_loss(scores, LABELS, lengths, COUNTS, blank=29, zero_infinity=True)
    truth = 0.7 * loss_from_logits(model, out).double() + 0.3 * ctc
    torch.testing.assert_close(out.loss.double(), truth, rtol=1e-6, atol=0)
    out.loss.backward()
    assert model.ctc_head.weight.grad.abs().sum().item() > 0


def test_dropout_of_the_joint_is_applied_in_training_only():
    model, (inputs, mask) = transducer(joint_dropout=0.5), features()
    model.encoder.eval()
    expected = model(inputs, attention_mask=mask, labels=PADDED).loss
    assert torch.equal(expected, model(inputs, attention_mask=mask, labels=PADDED).loss)
    model.train()
    for module in model.encoder.modules():
        module.training = False
    first, second = (model(inputs, attention_mask=mask, labels=PADDED).loss for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(4)
    third = model(inputs, attention_mask=mask, labels=PADDED).loss
    torch.manual_seed(4)
    assert torch.equal(third, model(inputs, attention_mask=mask, labels=PADDED).loss)


def test_with_omega_1_the_loss_is_the_rnnt_loss_of_the_tokens():
    model, (inputs, mask) = transducer(loss_omega=1.0), features()
    out = model(inputs, attention_mask=mask, labels=PADDED, output_logits=True)
    lengths = out.attention_mask.sum(-1), COUNTS
    torch.testing.assert_close(out.loss, rnnt_loss(out.logits[..., :30], LABELS, *lengths, 29, "mean"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_on_the_output_layer(dtype):
    peft = pytest.importorskip("peft")
    model, (inputs, mask) = transducer(), features()
    model = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=["joint.head"], init_lora_weights=False))
    model = model.to(dtype)
    inputs = inputs.to(dtype)
    out = model(input_features=inputs, attention_mask=mask, labels=PADDED, output_logits=True)
    truth = loss_from_logits(model.base_model.model, out)
    # bfloat16 rounds every score to 8 bits in both computations; measured: 2e-4
    torch.testing.assert_close(out.loss, truth, rtol=1e-5 if dtype == torch.float32 else 2e-3, atol=0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert len(parameters) == 2
    ours, wanted = (torch.autograd.grad(loss, parameters, retain_graph=True) for loss in (out.loss, truth))
    for gradient, expected in zip(ours, wanted, strict=True):
        assert (gradient - expected).abs().max() <= (1e-5 if dtype == torch.float32 else 0.03) * expected.abs().max()
    base = model.base_model.model.joint.head.base_layer
    assert base.weight.grad is None
    with model.disable_adapter():
        assert (model(input_features=inputs, attention_mask=mask, labels=PADDED).loss - out.loss).abs() > 1e-3


def test_an_offloaded_output_layer_gives_the_same_loss_and_tokens():
    model, (inputs, mask) = transducer(), features()
    wanted = model(inputs, attention_mask=mask, labels=PADDED).loss
    expected = model.generate(inputs, attention_mask=mask)
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(model.joint.head, torch.device("cpu"))
    assert model.joint.head.weight.device.type == "meta"
    torch.testing.assert_close(model(inputs, attention_mask=mask, labels=PADDED).loss, wanted, rtol=1e-6, atol=0)
    again = model.generate(inputs, attention_mask=mask)
    assert torch.equal(again.sequences, expected.sequences)
    assert torch.equal(again.durations, expected.durations)
