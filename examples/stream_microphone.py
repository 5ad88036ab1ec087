"""Recognise speech from the microphone until Ctrl-C. Needs `pip install sounddevice`.

python examples/stream_microphone.py --model nvidia/parakeet-tdt-0.6b-v3 --chunk 1 --right 0.5
"""

import argparse
import contextlib
import queue
import signal
import sys
import threading
from collections.abc import Iterator

import numpy as np

from transformers_parakeet import ParakeetStream, demo_model_path, join_stream_words, load_nemo


def record(sampling_rate: int, block_s: float) -> Iterator[np.ndarray]:
    """Yield blocks of samples from the default microphone until Ctrl-C.

    Args:
        sampling_rate: sampling rate in Hz.
        block_s: duration of a block in seconds.

    Yields:
        (S,) float32 samples.
    """
    try:
        import sounddevice
    except ImportError:
        sys.exit("recording needs the package `sounddevice`, which is not installed: run `pip install sounddevice`")
    blocks: queue.Queue[np.ndarray] = queue.Queue()
    is_stopped = threading.Event()

    def stop(_signal: int, _frame: object) -> None:
        """End the recording, but not the recognition of what was recorded; a second Ctrl-C ends the program."""
        is_stopped.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, stop)

    def receive(samples: np.ndarray, _num_frames: int, _time: object, status: object) -> None:
        """Store a block; `sounddevice` calls this function in another thread."""
        if status:
            print(status, file=sys.stderr)
        if not is_stopped.is_set():
            # `sounddevice` reuses its buffer
            blocks.put(samples[:, 0].copy())

    size = round(block_s * sampling_rate)
    with sounddevice.InputStream(sampling_rate, size, channels=1, dtype="float32", callback=receive):
        while not is_stopped.is_set() or not blocks.empty():
            # with a time limit, so that Ctrl-C also ends the loop if no block arrives
            with contextlib.suppress(queue.Empty):
                yield blocks.get(timeout=block_s)


def main() -> None:
    """Record and print the words."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=demo_model_path(), help="Hub id, folder or .nemo file")
    for name in ("chunk", "left", "right"):
        parser.add_argument(f"--{name}", type=float, help=f"{name} in seconds, see docs/streaming.md")
    arguments = parser.parse_args()
    model, processor = load_nemo(arguments.model)
    stream = ParakeetStream(
        model.eval(), processor, chunk_s=arguments.chunk, left_s=arguments.left, right_s=arguments.right
    )
    words = []
    for update in stream.updates(record(processor.feature_extractor.sampling_rate, 0.1)):
        words += update.committed
        # the last words, then the tentative one in brackets, on one line
        text = join_stream_words(words[-12:])
        tentative = join_stream_words(update.tentative)
        print(f"\r\033[K{text} [{tentative}]" if tentative else f"\r\033[K{text}", end="", flush=True)
    print(f"\n{join_stream_words(words)}")


if __name__ == "__main__":
    main()
