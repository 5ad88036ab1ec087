"""Training on two processes gives the results of one process with the same batches."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import TESTS, noise
from distributed_worker import train
from safetensors.torch import load_file
from training_helpers import create_model, sentence_rows, training_arguments
from transformers import pipeline

from transformers_parakeet import load_nemo
from transformers_parakeet.training import ParakeetTrainer


def run_worker(mode, folder):
    """Run a mode of `distributed_worker.py` on two processes; return the result that it wrote."""
    source = str(TESTS.parent / "src")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([source, str(TESTS)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(TESTS / "distributed_worker.py"), mode, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-9000:]
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def single_process(tmp_path_factory):
    """Result and trainer of one process that accumulates the batches of both processes."""
    return train(tmp_path_factory.mktemp("single"), gradient_accumulation_steps=2)


def check_saved_model(folder):
    """Check that a pipeline loads the saved folder, and decodes with the saved weights."""
    pipe = pipeline("automatic-speech-recognition", model=str(folder / "model"))
    weights = load_file(folder / "model" / "model.safetensors")
    assert all(torch.equal(pipe.model.state_dict()[name], value) for name, value in weights.items())
    samples = noise(1.0)
    model, processor = load_nemo(folder / "model")
    output = model.generate(**processor(samples, sampling_rate=16000))
    sequences = output if torch.is_tensor(output) else output.sequences
    (text,) = processor.batch_decode(sequences, skip_special_tokens=True)
    assert pipe(samples)["text"].strip() == text.strip()


def test_two_processes_equal_one_process_that_accumulates_their_batches(single_process, tmp_path):
    expected, trainer = single_process
    result = run_worker("ddp", tmp_path)
    # measured: 0
    assert np.allclose(result["losses"], expected["losses"], rtol=1e-6)
    assert np.allclose(result["norms"], expected["norms"], rtol=1e-6)
    assert expected["losses"][-1] < expected["losses"][0]
    weights = load_file(tmp_path / "model" / "model.safetensors")
    for name, value in trainer.model.named_parameters():
        # measured: 0
        assert torch.allclose(weights[name], value, atol=1e-6), name
    check_saved_model(tmp_path)


def test_processes_can_drop_different_layers(tmp_path):
    """DDP with gradient checkpointing waits for a gradient of every parameter."""
    result = run_worker("dropped_layers", tmp_path)
    assert len(set(result["losses"])) == 3
    assert np.isfinite([*result["losses"], *result["norms"], result["scores"]["eval_loss"]]).all()
    check_saved_model(tmp_path)


def test_sharded_layers_that_processes_drop_give_the_losses_of_whole_layers(tmp_path):
    """FSDP gathers a layer when it runs: if a process skipped one, it would get the weights of another layer."""
    losses_of_processes = run_worker("sharded_layers", tmp_path)
    for losses in losses_of_processes:
        # measured: 0
        assert np.allclose(losses["sharded"], losses["whole"], rtol=1e-6)
    assert losses_of_processes[0] != losses_of_processes[1]


def test_adapters_on_sharded_weights_get_the_gradients_of_adapters_on_whole_weights(tmp_path):
    """LoRA on convolutions, projections, the joint network and the CTC head; both processes have the same batch."""
    result = run_worker("sharded_adapters", tmp_path)
    whole, sharded = result["whole"], result["sharded"]
    assert sharded["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert len(whole["gradients"]) == len(sharded["gradients"]) > 20
    for name, gradient in whole["gradients"].items():
        assert any(gradient), name
        assert sharded["gradients"][name] == pytest.approx(gradient, rel=1e-4, abs=1e-6), name


def test_two_processes_share_a_stream(tmp_path):
    result = run_worker("stream", tmp_path)
    names = [row["audio_filepath"].rpartition("/")[2] for row in sentence_rows()]
    first, second = result["files"]
    # two updates of five clips per process are one pass over the twenty sentences
    assert first == names[:5] + names[10:15]
    assert second == names[5:10] + names[15:]
    assert np.isfinite(result["scores"]["eval_loss"])
    check_saved_model(tmp_path)


def test_clips_that_one_process_cannot_read_count_as_silence_in_evaluation(tmp_path):
    result = run_worker("broken_clips", tmp_path)
    assert result["rows"] == 12
    rows = sentence_rows()[:12]
    for index in (4, 5):
        rows[index] = {"audio": np.zeros(16000, np.float32), "text": ""}
    model, processor = create_model("ctc")
    settings = training_arguments(tmp_path, 1, per_device_eval_batch_size=3)
    expected = ParakeetTrainer(model, settings, eval_dataset=rows, processing_class=processor).evaluate()
    for name, value in result["scores"].items():
        # measured: 0
        assert value == pytest.approx(expected[name], rel=1e-6), name


@pytest.mark.slow
def test_fsdp_trains_decodes_and_saves_like_one_process(single_process, tmp_path):
    expected, _ = single_process
    result = run_worker("fsdp", tmp_path)
    # measured: 0
    assert np.allclose(result["losses"], expected["losses"][:2], rtol=1e-6)
    assert np.allclose(result["norms"], expected["norms"][:2], rtol=1e-6)
    assert np.isfinite(result["scores"]["eval_loss"])
    assert result["scores"]["eval_cer"] > 0
    check_saved_model(tmp_path)
