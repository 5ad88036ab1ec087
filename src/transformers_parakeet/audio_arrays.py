"""Converts samples in arrays, tensors and lists to mono float32 arrays.

Files and URLs are in `audio.py`.
"""

import sys
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

FloatArray: TypeAlias = npt.NDArray[np.float32]

# maximum number of channels; 7.1 surround has 8
MAX_CHANNELS = 8
# distance from zero to full scale of the integer sample formats; uint8 is centred on 128
FULL_SCALE = {"int8": 128.0, "uint8": 128.0, "int16": 32768.0, "int32": 2147483648.0}


def to_array(source: Any) -> npt.NDArray[Any]:
    """Convert samples to a NumPy array, without scaling the values.

    Args:
        source: an array, a tensor, a list of numbers, or a list of channels.

    Raises:
        TypeError: `source` has an unsupported type.
        ValueError: The channels in a list have different lengths.
    """
    if hasattr(source, "__array__"):
        return to_numpy(source)
    if not isinstance(source, Sequence):
        raise TypeError(
            "audio must be a path, URL, bytes, binary file, array, tensor, list of numbers, dict or torchcodec "
            f"decoder, got {type(source).__name__}"
        )
    items = [to_numpy(item) if hasattr(item, "__array__") else item for item in source]
    try:
        array = np.asarray(items)
    except ValueError as error:
        raise ValueError(f"the channels in a list must have the same length ({error})") from error
    # Python integers in a list, such as [0, 0, 1], are amplitudes, so they become floats, which are not scaled later;
    # NumPy integers are samples of an integer format, which are scaled later
    has_python_numbers = not items or not isinstance(items[0], (np.ndarray, np.generic))
    return array.astype(np.float64) if has_python_numbers and array.dtype.kind in "iu" else array


def to_numpy(array: Any) -> npt.NDArray[Any]:
    """Convert an array, or a tensor on any device, to a NumPy array.

    Args:
        array: the array or tensor.
    """
    # `sys.modules` avoids importing torch: a tensor can exist only if torch has already been imported
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        # NumPy does not support bfloat16
        return np.asarray((array.float() if array.dtype == torch.bfloat16 else array).numpy())
    return np.asarray(array)


def to_mono(array: npt.NDArray[Any]) -> FloatArray:
    """Convert samples to float32 and average the channels.

    Args:
        array: (S,), (S, C) or (C, S) samples of a supported type. In two dimensions, the shorter axis contains the
            channels.

    Returns:
        (S,) float32 samples.

    Raises:
        ValueError: The array has more than two dimensions, or it is unclear which axis contains the channels.
        TypeError: The type of the samples is not supported.
    """
    if array.size == 0:
        return np.zeros(0, dtype=np.float32)
    samples = to_float32(array)
    if samples.ndim == 1:
        return np.ascontiguousarray(samples)
    if samples.ndim != 2:
        raise ValueError(
            f"audio must have the shape (S,), (S, C) or (C, S), got {array.shape}: pass one clip at a time"
        )
    shorter_size, longer_size = sorted(array.shape)
    if shorter_size == 1:
        return np.ascontiguousarray(samples.reshape(-1))
    if shorter_size > MAX_CHANNELS or longer_size <= MAX_CHANNELS:
        raise ValueError(
            f"two-dimensional audio must have one axis of at most {MAX_CHANNELS} channels and a longer axis of more "
            f"than {MAX_CHANNELS} samples, got {array.shape}: average the channels first, or pass one clip at a time"
        )
    channel_axis = 1 if array.shape[1] == shorter_size else 0
    return average_channels(samples, axis=channel_axis)


def to_float32(array: npt.NDArray[Any]) -> FloatArray:
    """Convert samples to float32, and scale integer samples to [-1, 1).

    Args:
        array: samples of any shape, as int8, uint8, int16, int32 or a floating-point type. Floating-point samples are
            not scaled.

    Returns:
        float32 samples with the shape of `array`.

    Raises:
        TypeError: The samples have an unsupported type.
    """
    if array.dtype.kind == "f":
        # float64 values outside the range of float32 become infinite; `audio.load_audio` then raises an error
        with np.errstate(over="ignore"):
            return array.astype(np.float32, copy=False)
    if array.dtype.name not in FULL_SCALE:
        raise TypeError(
            f"samples must be floats, int8, uint8, int16 or int32, got {array.dtype}: convert them to floats in [-1, 1)"
        )
    full_scale = FULL_SCALE[array.dtype.name]
    zero_level = full_scale if array.dtype.kind == "u" else 0.0
    # the division is exact, because every full scale is a power of two
    return (array.astype(np.float32) - np.float32(zero_level)) / np.float32(full_scale)


def average_channels(samples: FloatArray, axis: int) -> FloatArray:
    """Average the channels of two-dimensional samples.

    Args:
        samples: (C, S) samples if `axis` is 0, or (S, C) samples if `axis` is 1.
        axis: axis of the channels.

    Returns:
        (S,) mono samples.
    """
    # suppress warnings about infinite samples here, because `audio.load_audio` raises an error for non-finite samples
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(samples.mean(axis=axis, dtype=np.float32), dtype=np.float32)


__all__ = ["MAX_CHANNELS", "FloatArray", "average_channels", "to_array", "to_float32", "to_mono", "to_numpy"]
