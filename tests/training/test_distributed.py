"""Two processes on one machine: the same training as one process with the same batches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TESTS, noise
from distributed_worker import train
from safetensors.torch import load_file
from training_helpers import arguments, sentence_rows, small
from transformers import pipeline

from transformers_parakeet.training import ParakeetTrainer


def launch(mode, folder):
    """Run the worker on two processes; return what it wrote."""
    source = str(TESTS.parent / "src")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([source, str(TESTS)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(TESTS / "distributed_worker.py"), mode, str(folder)],
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-9000:]
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process that accumulates the two batches."""
    return train(tmp_path_factory.mktemp("alone"), gradient_accumulation_steps=2)


def check_saved_model(folder):
    """The saved folder is one that a pipeline loads."""
    pipe = pipeline("automatic-speech-recognition", model=str(folder / "model"))
    assert isinstance(pipe(noise(1.0))["text"], str)


def test_two_processes_are_one_that_accumulates_as_many_batches(alone, tmp_path):
    result, trainer = alone
    shared = launch("ddp", tmp_path)
    # measured: 0
    assert np.allclose(shared["losses"], result["losses"], rtol=1e-6)
    assert np.allclose(shared["norms"], result["norms"], rtol=1e-6)
    assert result["losses"][-1] < result["losses"][0]
    weights = load_file(tmp_path / "model" / "model.safetensors")
    for name, value in trainer.model.named_parameters():
        # measured: 0
        assert torch.allclose(weights[name], value, atol=1e-6), name
    check_saved_model(tmp_path)


def test_each_process_may_drop_other_layers(tmp_path):
    """DDP with gradient checkpointing waits for a gradient of every parameter."""
    result = launch("ddp_dropping", tmp_path)
    assert len(set(result["losses"])) == 3
    assert np.isfinite([*result["losses"], *result["norms"], result["scores"]["eval_loss"]]).all()
    check_saved_model(tmp_path)


def test_sharded_blocks_are_gathered_in_step(tmp_path):
    """Sharding gathers a block when it runs: were one skipped, a process would get the weights of another block."""
    processes = launch("sharded_blocks", tmp_path)
    for losses in processes:
        # measured: 0
        assert np.allclose(losses["sharded True"], losses["sharded False"], rtol=1e-6)
    assert processes[0] != processes[1]


def test_adapters_on_sharded_weights_get_the_gradients_of_whole_ones(tmp_path):
    """LoRA on convolutions, projections, the joint network and the CTC head; both processes have the same batch."""
    result = launch("sharded_adapters", tmp_path)
    whole, sharded = result["sharded False"], result["sharded True"]
    assert sharded["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert len(whole["gradients"]) == len(sharded["gradients"]) > 20
    for name, gradient in whole["gradients"].items():
        assert any(gradient), name
        assert sharded["gradients"][name] == pytest.approx(gradient, rel=1e-4, abs=1e-6), name


def test_two_processes_share_a_stream(tmp_path):
    shared = launch("stream", tmp_path)
    names = [Path(row["audio"]).name for row in sentence_rows()]
    first, second = shared["clips"]
    # two updates of five clips per process are one pass over the twenty sentences
    assert first == names[:5] + names[10:15]
    assert second == names[5:10] + names[15:]
    assert np.isfinite(shared["scores"]["eval_loss"])
    check_saved_model(tmp_path)


def test_clips_that_one_process_cannot_read_keep_their_place_in_evaluation(tmp_path):
    shared = launch("broken", tmp_path)
    assert shared["rows"] == 12
    rows = sentence_rows()[:12]
    for index in (4, 5):
        rows[index] = {"audio": np.zeros(16000, np.float32), "text": ""}
    model, processor = small("ctc")
    settings = arguments(tmp_path, 1, per_device_eval_batch_size=3)
    alone = ParakeetTrainer(model, settings, eval_dataset=rows, processing_class=processor).evaluate()
    for name, value in shared["scores"].items():
        # measured: 0
        assert value == pytest.approx(alone[name], rel=1e-6), name


@pytest.mark.slow
def test_sharded_weights_train_decode_and_are_saved(alone, tmp_path):
    result, _ = alone
    sharded = launch("fsdp", tmp_path)
    # measured: 0
    assert np.allclose(sharded["losses"], result["losses"][:2], rtol=1e-6)
    assert np.allclose(sharded["norms"], result["norms"][:2], rtol=1e-6)
    assert np.isfinite(sharded["scores"]["eval_loss"])
    assert sharded["scores"]["eval_cer"] > 0
    check_saved_model(tmp_path)
