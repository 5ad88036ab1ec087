"""Stream an audio file as if it were spoken now, and print the words while they are recognised.

python examples/stream_file.py recording.wav --model nvidia/parakeet-tdt-0.6b-v3
"""

import argparse
import time
from collections.abc import Iterator

import numpy as np

from transformers_parakeet import ParakeetStream, demo_model_path, join_stream_words, load_audio, load_nemo


def read_in_real_time(samples: np.ndarray, sampling_rate: int, block_s: float, speed: float) -> Iterator[np.ndarray]:
    """Yield blocks of samples, each at the time at which a microphone would return it.

    Args:
        samples: (S,) samples.
        sampling_rate: sampling rate in Hz.
        block_s: duration of a block in seconds.
        speed: 1 for real time, 2 for twice as fast.

    Yields:
        Blocks of samples.
    """
    size, start_time = round(block_s * sampling_rate), time.monotonic()
    for start in range(0, len(samples), size):
        block = samples[start : start + size]
        time_received = start_time + (start + len(block)) / sampling_rate / speed
        time.sleep(max(0.0, time_received - time.monotonic()))
        yield block


def main() -> None:
    """Stream the file and print the words."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", default=demo_model_path() / "clips" / "one_two_three.flac")
    parser.add_argument("--model", default=demo_model_path(), help="Hub id, folder or .nemo file")
    parser.add_argument("--decoder", choices=["ctc", "transducer"], help="head of a hybrid model")
    parser.add_argument("--block", type=float, default=0.1, help="seconds per block of samples")
    parser.add_argument("--speed", type=float, default=1.0, help="1 for real time")
    for name in ("chunk", "left", "right"):
        parser.add_argument(f"--{name}", type=float, help=f"{name} in seconds, see docs/streaming.md")
    arguments = parser.parse_args()
    model, processor = load_nemo(arguments.model)
    sampling_rate = processor.feature_extractor.sampling_rate
    stream = ParakeetStream(
        model.eval(),
        processor,
        chunk_s=arguments.chunk,
        left_s=arguments.left,
        right_s=arguments.right,
        decoder=arguments.decoder,
    )
    blocks = read_in_real_time(load_audio(arguments.file), sampling_rate, arguments.block, arguments.speed)
    start_time = time.monotonic()
    for update in stream.updates(blocks):
        elapsed_s = time.monotonic() - start_time
        for word in update.committed:
            print(f"{elapsed_s:7.2f} s  {word.start:7.2f} - {word.end:.2f}  {word.text}  ({word.confidence:.2f})")
        for event in update.events:
            print(f"{elapsed_s:7.2f} s  {event.time:7.2f}  {event.name}")
        if update.tentative:
            print(f"{elapsed_s:7.2f} s  tentative: {join_stream_words(update.tentative)}")


if __name__ == "__main__":
    main()
