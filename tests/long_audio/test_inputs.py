"""Checks the memory of long recordings in a separate process, and what the estimate of the planner says about it."""

import numpy as np
import pytest
import soundfile
from conftest import run_program

# measures the peak memory above the model of one call of the pipeline; prints it and the estimate, in MB
PROGRAM = """
    import gc, re, sys
    import torch
    torch.set_num_threads(1)
    import transformers_parakeet as tp
    from transformers_parakeet.long_audio import estimate_peak_memory
    from conftest import ctc_model, noise

    def read_status(name):
        with open("/proc/self/status") as file:
            return int(re.search(name + r":\\s+(\\d+)", file.read())[1]) / 1000

    path, chunk_length_s, minutes = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
    model, processor = ctc_model(hidden_size=256, num_hidden_layers=1, subsampling_conv_channels=64,
                                 attention_context_size=[64, 64])
    pipe = tp.ParakeetASRPipeline(model, processor=processor, task="automatic-speech-recognition")
    pipe(noise(1.0))
    gc.collect()
    before = read_status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    pipe(path, chunk_length_s=chunk_length_s)
    estimate = estimate_peak_memory(model.config, int(minutes * 60 * 16000)) / 1e6
    print(read_status("VmHWM") - before, estimate)
"""


def measure_memory(folder, minutes, chunk_length_s):
    """Return peak memory above the model and the estimate for a whole recording in MB.

    Args:
        folder: folder for the recording.
        minutes: length of the recording, which is white noise.
        chunk_length_s: length of a window; 0 for no windows.
    """
    path = folder / f"{minutes}.wav"
    if not path.exists():
        rng = np.random.default_rng(0)
        with soundfile.SoundFile(path, "w", 16000, 1) as file:
            for _ in range(minutes):
                file.write((0.1 * rng.standard_normal(60 * 16000)).astype(np.float32))
    from conftest import TESTS

    output = run_program(f"import sys; sys.path.insert(0, {str(TESTS)!r})" + PROGRAM.replace("\n    ", "\n"),
                         path, chunk_length_s, minutes)  # fmt: skip
    peak, estimate = map(float, output.split()[-2:])
    return peak, estimate


@pytest.mark.slow
def test_memory_of_windows_does_not_grow_with_the_length(tmp_path):
    half, whole = (measure_memory(tmp_path, minutes, 30)[0] for minutes in (20, 40))
    assert whole <= 1.1 * half


@pytest.mark.slow
@pytest.mark.parametrize("minutes", [5, 20])
def test_the_estimate_of_the_planner_is_an_upper_limit(tmp_path, minutes):
    peak, estimate = measure_memory(tmp_path, minutes, 0)
    assert peak <= estimate <= 4 * peak
