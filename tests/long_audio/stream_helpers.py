"""Helpers for the tests of streams: golden files, models, and a record of the steps of a stream."""

import copy
import json
from functools import cache

import numpy as np
import soundfile
from conftest import TESTS
from safetensors.torch import load_file

import transformers_parakeet as tp
from transformers_parakeet.long_audio import StreamOptions
from transformers_parakeet.long_audio.stream_engine import StreamEngine
from transformers_parakeet.long_audio.stream_input import convert_samples

GOLDEN = TESTS / "golden" / "streaming"
CACHE_AWARE_MODELS = ("eou", "nemotron", "streaming_ctc", "streaming_hybrid", "streaming_transducer")
CONTEXT_MODELS = ("tdt_v3", "transducer", "unified")


@cache
def load_golden(name):
    """Return the JSON file and the arrays of a golden file."""
    return json.loads((GOLDEN / f"{name}.json").read_text()), load_file(GOLDEN / f"{name}.safetensors")


@cache
def load_clip(name):
    """Return the (S,) samples of a golden clip, `long` (5.2 s) or `second` (3.4 s)."""
    return soundfile.read(GOLDEN / "clips" / f"{name}.wav", dtype="float32")[0]


@cache
def load_shared_model(name):
    """Return a golden model and its processor, which tests must not change."""
    model, processor = tp.load_nemo(TESTS / "golden" / "real_configs" / name / "model.nemo")
    return model.eval(), processor


def load_model(name):
    """Return a copy of a golden model, which a test may change, and its processor."""
    model, processor = load_shared_model(name)
    return copy.deepcopy(model), processor


@cache
def load_demo():
    """Return the demo model and its processor. The result is shared: tests must not change it."""
    model, processor = tp.load_nemo(tp.demo_model_path())
    return model.eval(), processor


class Recorder:
    """Runs streams and records the encoder frames and the tokens of every step.

    Args:
        model: the model.
        processor: its processor.
        num_streams: number of streams.
        **options: fields of `StreamOptions`.
    """

    def __init__(self, model, processor, num_streams=1, **options):
        self.engine = StreamEngine(model, processor, StreamOptions(**options))
        self.streams = [self.engine.start() for _ in range(num_streams)]
        # one entry per step and stream
        self.frames, self.tokens = [], []
        encode, decode = self.engine.encoder.encode, self.engine.decoder.decode

        def record_frames(inputs):
            results = encode(inputs)
            self.frames += [frames for frames, _ in results]
            return results

        def record_tokens(frames, states):
            tokens, new_states = decode(frames, states)
            self.tokens += tokens
            return tokens, new_states

        self.engine.encoder.encode, self.engine.decoder.decode = record_frames, record_tokens

    def run(self, samples, block_size):
        """Feed samples to the first stream in blocks of a size, finish it, and return all its tokens."""
        stream = self.streams[0]
        for start in range(0, len(samples), block_size):
            stream.samples.append(convert_samples(samples[start : start + block_size]))
            self.engine.advance([stream])
        self.engine.advance([stream], is_last=True)
        return [token for tokens in self.tokens for token in tokens] + self.engine.decoder.get_last_tokens(
            stream.decoder_state
        )


def tone(seconds, hertz=440.0):
    """Return a sine tone at 16 kHz, (S,) float32."""
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(int(16000 * seconds)) / 16000)).astype(np.float32)
