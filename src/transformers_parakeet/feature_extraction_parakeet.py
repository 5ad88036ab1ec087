"""Computes the log-mel features of a batch of clips, as NVIDIA NeMo does.

Audio files are read and resampled in `audio.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BatchFeature, SequenceFeatureExtractor
from transformers.utils import TensorType, logging

from .audio_arrays import MAX_CHANNELS

logger = logging.get_logger(__name__)

# added to the standard deviation, and to the mel energies before the logarithm (NeMo: parts/preprocessing/features.py)
NORMALIZE_EPSILON = 1e-5
LOG_ZERO_GUARD = 2.0**-24

# number of frames, of all clips of a batch together, whose spectra are computed at once: 6000 complex spectra of 257
# bins are 12 MB
FRAMES_PER_BLOCK = 6000

# Slaney's mel scale (Auditory Toolbox, 1998): linear below 1000 Hz (15 mel), and logarithmic above
HERTZ_PER_MEL = 200.0 / 3.0
LOG_START_HERTZ, LOG_START_MEL = 1000.0, 15.0
# in the logarithmic range, natural logarithm of the ratio of two frequencies that are one mel apart
LOG_HERTZ_PER_MEL = np.log(6.4) / 27.0


class ParakeetFeatureExtractor(SequenceFeatureExtractor):
    """Computes log-mel features, by default with mean and variance normalisation per clip and mel bin.

    A clip of S samples has S // hop_length valid frames. As in NeMo, the output has one more frame, which is padding.

    Args:
        feature_size: number of mel bins F.
        sampling_rate: sampling rate of the model in Hz.
        hop_length: number of samples between the starts of neighbouring frames.
        n_fft: size of the Fourier transform in samples.
        win_length: length of the symmetric Hann window in samples.
        preemphasis: coefficient a of y[n] = x[n] - a x[n-1]; None or 0 for no pre-emphasis.
        padding_value: value with which the waveforms of a batch are padded.
        normalize: `"per_feature"` to normalise every mel bin of a clip to mean 0 and standard deviation 1 over the
            valid frames; None for no normalisation, which streaming models expect.

    Raises:
        ValueError: `normalize` is neither `"per_feature"` nor None.
    """

    model_input_names = ["input_features", "attention_mask"]  # noqa: RUF012  # the base class declares an instance field

    def __init__(
        self,
        feature_size: int = 80,
        sampling_rate: int = 16000,
        hop_length: int = 160,
        n_fft: int = 512,
        win_length: int = 400,
        preemphasis: float | None = 0.97,
        padding_value: float = 0.0,
        normalize: str | None = "per_feature",
        **kwargs: Any,
    ) -> None:
        if normalize not in ("per_feature", None):
            raise ValueError(f"`normalize` must be 'per_feature' or None, got {normalize!r}: correct it")
        super().__init__(feature_size=feature_size, sampling_rate=sampling_rate, padding_value=padding_value, **kwargs)
        self.hop_length = hop_length
        self.n_fft = n_fft
        self.win_length = win_length
        self.preemphasis = preemphasis
        self.normalize = normalize
        triangles, inverse_areas = compute_mel_triangles(feature_size, n_fft, sampling_rate)
        # (F, n_fft / 2 + 1)
        self.mel_filters = torch.from_numpy(triangles * inverse_areas[:, None]).float()

    def __call__(
        self,
        raw_speech: Any,
        truncation: bool = False,
        pad_to_multiple_of: int | None = None,
        return_tensors: str | TensorType | None = None,
        return_attention_mask: bool | None = None,
        padding: bool | str | None = "longest",
        max_length: int | None = None,
        sampling_rate: int | None = None,
        device: str | torch.device | None = "cpu",
        **kwargs: Any,
    ) -> BatchFeature:
        """Compute the features of one clip or of a list of clips.

        Args:
            raw_speech: one clip (S,), a list of clips, or an array (B, S); see `split_batch`.
            truncation: whether to cut clips to `max_length`.
            pad_to_multiple_of: the padded length is rounded up to a multiple of this number of samples; None for no
                rounding.
            return_tensors: `"pt"` or `"np"`; None means `"pt"`.
            return_attention_mask: whether to return the mask; None means True.
            padding: `"longest"` to pad to the longest clip, or `"max_length"` to pad to `max_length`.
            max_length: length in samples for `padding="max_length"` and for `truncation`; None for no limit.
            sampling_rate: sampling rate of the clips in Hz; None for the sampling rate of the model, with a warning.
            device: device on which the features are computed.
            **kwargs: ignored; accepted because other feature extractors have more arguments.

        Returns:
            `input_features` (B, T, F) float32, and `attention_mask` (B, T), True for valid frames.

        Raises:
            ValueError: `sampling_rate` is not the sampling rate of the model, a sample is not finite, or
                `padding_side` is not "right".
        """
        # imported where files are read, because the rest of this module needs no audio files
        from .audio import load_audio

        self._check_sampling_rate(sampling_rate)
        clips = [
            load_audio(clip, self.sampling_rate, target_rate=self.sampling_rate) for clip in split_batch(raw_speech)
        ]
        waveforms = self._pad_clips(clips, padding, max_length, truncation, pad_to_multiple_of).to(device)
        lengths = torch.tensor([len(clip) for clip in clips], device=waveforms.device).clamp(max=waveforms.shape[1])
        features, mask = self.extract(waveforms, lengths)
        data = {"input_features": features}
        if return_attention_mask is not False:
            data["attention_mask"] = mask
        return BatchFeature(data, tensor_type=return_tensors)

    def extract(self, waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the features of a padded batch of waveforms, on the device of the waveforms.

        Args:
            waveforms: (B, S) float32 samples.
            lengths: (B,) number of valid samples.

        Returns:
            (B, T, F) features, in which padding frames are zero, and a (B, T) mask, True for valid frames. T is
            1 + S // hop_length.
        """
        features = self._compute_log_mel(waveforms, lengths)
        frame_lengths = lengths // self.hop_length
        mask = torch.arange(features.shape[1], device=waveforms.device) < frame_lengths[:, None]
        if self.normalize is None:
            return features.mul_(mask[..., None]), mask
        return normalize_per_feature(features, mask), mask

    @property
    def left_margin(self) -> int:
        """Number of samples before the centre of a frame that the frame depends on, with one for the pre-emphasis."""
        return self.n_fft // 2 + 1

    @property
    def right_margin(self) -> int:
        """Number of samples that a frame depends on from its centre on, with the sample at the centre."""
        return self.n_fft - self.n_fft // 2

    def log_mel_of_block(self, samples: Tensor, lengths: Tensor) -> Tensor:
        """Compute the log-mel energies of consecutive frames of a recording, without normalisation.

        Frame t of a recording has its centre at the sample t * hop_length. To compute the frames t to t + K - 1, pass
        the samples from t * hop_length - `left_margin` up to, but not including,
        (t + K - 1) * hop_length + `right_margin`. Samples before the start and after the end of the recording are
        zeros. The result equals the frames t to t + K - 1 of the whole recording.

        Args:
            samples: (B, 1 + n_fft + (K - 1) * hop_length) samples without pre-emphasis: a block of each of B
                recordings.
            lengths: (B,) number of samples from the start of the block to the end of the recording. It can be larger
                than the block. Samples after the end of the recording are not used.

        Returns:
            (B, K, F) natural logarithms of the mel energies, in the dtype of `samples`.
        """
        # the first sample is only needed for the pre-emphasis y[n] = x[n] - a x[n-1] of the second one
        current, previous = samples[:, 1:], samples[:, :-1]
        filtered = current - self.preemphasis * previous if self.preemphasis else current
        # zero the padding after the filter, because the first padded value would otherwise be -a x[n-1]
        filtered = filtered * (torch.arange(1, samples.shape[1], device=samples.device) < lengths[:, None])
        spectrum = torch.stft(
            filtered,
            self.n_fft,
            hop_length=self.hop_length,
            win_length=self.win_length,
            window=torch.hann_window(self.win_length, periodic=False, dtype=samples.dtype, device=samples.device),
            center=False,
            return_complex=True,
        )
        squares = torch.view_as_real(spectrum).square_()
        # a sum over the last axis, which has only two elements, takes five times as long
        power = (squares[..., 0] + squares[..., 1]).transpose(1, 2)
        return torch.matmul(power, self.mel_filters.to(samples).T).add_(LOG_ZERO_GUARD).log_()

    def _compute_log_mel(self, waveforms: Tensor, lengths: Tensor) -> Tensor:
        """Compute the log-mel energies of a padded batch, block by block, so that the memory for spectra is limited.

        Args:
            waveforms: (B, S) samples.
            lengths: (B,) number of valid samples.

        Returns:
            (B, 1 + S // hop_length, F) log-mel energies without normalisation.
        """
        batch_size, num_samples = waveforms.shape
        num_frames = 1 + num_samples // self.hop_length
        frames_per_block = max(1, FRAMES_PER_BLOCK // batch_size)
        log_mel = waveforms.new_empty(batch_size, num_frames, len(self.mel_filters))
        for first_frame in range(0, num_frames, frames_per_block):
            frames = log_mel[:, first_frame : first_frame + frames_per_block]
            start = first_frame * self.hop_length - self.left_margin
            end = (first_frame + frames.shape[1] - 1) * self.hop_length + self.right_margin
            block = F.pad(waveforms[:, max(start, 0) : end], (max(-start, 0), max(end - num_samples, 0)))
            frames.copy_(self.log_mel_of_block(block, lengths - start))
        return log_mel

    def _check_sampling_rate(self, sampling_rate: int | None) -> None:
        """Check that audio has the sampling rate of the model; warn once if the sampling rate of the audio is unknown.

        Args:
            sampling_rate: sampling rate of the audio in Hz; None if unknown.

        Raises:
            ValueError: The audio has a different sampling rate.
        """
        if sampling_rate is None:
            logger.warning_once(
                f"`sampling_rate` was not given, so {self.sampling_rate} Hz is assumed: pass `sampling_rate`, because "
                "audio at a wrong rate gives wrong text."
            )
        elif sampling_rate != self.sampling_rate:
            raise ValueError(
                f"`sampling_rate` must be {self.sampling_rate} Hz, the rate of the model, but the audio has "
                f"{sampling_rate} Hz: resample it with "
                f"transformers_parakeet.load_audio(audio, sampling_rate={sampling_rate}), in which "
                "`sampling_rate` is the rate of `audio`"
            )

    def _pad_clips(
        self,
        clips: list[np.ndarray],
        padding: bool | str | None,
        max_length: int | None,
        truncation: bool,
        pad_to_multiple_of: int | None,
    ) -> Tensor:
        """Pad or cut clips to one length, and stack them to a batch.

        Args:
            clips: (S,) float32 samples of each clip.
            padding: `"longest"` to pad to the longest clip, or `"max_length"` to pad to `max_length`.
            max_length: length in samples for `padding="max_length"` and for `truncation`; None for no limit.
            truncation: whether to cut clips to `max_length`.
            pad_to_multiple_of: the padded length is rounded up to a multiple of this number of samples; None for no
                rounding.

        Returns:
            (B, S) float32 samples.

        Raises:
            ValueError: `padding_side` is not "right".
        """
        if self.padding_side != "right":
            raise ValueError(
                f"`padding_side` must be 'right', got {self.padding_side!r}: set it to 'right', because clip lengths "
                "count from the first sample"
            )
        # `pad` of the base class expects a feature axis: (S,) -> (S, 1)
        padded = self.pad(
            BatchFeature({"input_features": [clip[:, None] for clip in clips]}),
            padding=padding,
            max_length=max_length,
            truncation=truncation,
            pad_to_multiple_of=pad_to_multiple_of,
            return_attention_mask=False,
            return_tensors="pt",
        )
        return padded["input_features"][..., 0]


def compute_mel_triangles(num_bins: int, n_fft: int, sampling_rate: int) -> tuple[np.ndarray, np.ndarray]:
    """Compute triangular mel filters, evenly spaced on Slaney's mel scale from 0 Hz to half the sampling rate.

    Args:
        num_bins: number of mel bins F.
        n_fft: size of the Fourier transform in samples.
        sampling_rate: sampling rate in Hz.

    Returns:
        (F, n_fft / 2 + 1) float64 triangles of height 1, and (F,) factors that scale each triangle to area 1 (in Hz).
    """
    max_hertz = sampling_rate / 2
    max_mel = LOG_START_MEL + np.log(max_hertz / LOG_START_HERTZ) / LOG_HERTZ_PER_MEL
    if max_hertz < LOG_START_HERTZ:
        max_mel = max_hertz / HERTZ_PER_MEL
    mels = np.linspace(0.0, max_mel, num_bins + 2)
    linear_hertz = mels * HERTZ_PER_MEL
    log_hertz = LOG_START_HERTZ * np.exp(LOG_HERTZ_PER_MEL * (mels - LOG_START_MEL))
    # (F + 2,) frequencies in Hz: triangle i rises from edge i to edge i + 1, and falls to edge i + 2
    edges = np.where(mels < LOG_START_MEL, linear_hertz, log_hertz)
    # (F + 2, n_fft / 2 + 1): edge frequency minus the frequency of each spectrum bin
    distances = edges[:, None] - np.linspace(0.0, max_hertz, n_fft // 2 + 1)
    widths = np.diff(edges)[:, None]
    rising_slopes, falling_slopes = -distances[:-2] / widths[:-1], distances[2:] / widths[1:]
    triangles = np.maximum(0.0, np.minimum(rising_slopes, falling_slopes))
    # the area of a triangle of height 1 is half its width
    inverse_areas = 2.0 / (edges[2:] - edges[:-2])
    return triangles, inverse_areas


def normalize_per_feature(features: Tensor, mask: Tensor) -> Tensor:
    """Normalise every mel bin of a clip to mean 0 and unbiased standard deviation 1 over the valid frames.

    Args:
        features: (B, T, F) log-mel energies; overwritten.
        mask: (B, T) mask, True for valid frames.

    Returns:
        (B, T, F) normalised features, in which padding frames are zero. As in NeMo, a clip with a single frame becomes
        zero, because the standard deviation of a single value is undefined.
    """
    mean, std = compute_feature_statistics(features, mask)
    return normalize_with_statistics(features, mask, mean, std)


def compute_feature_statistics(features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Compute mean and unbiased standard deviation of every mel bin of a clip over the valid frames.

    Args:
        features: (B, T, F) log-mel energies; padding frames are set to zero.
        mask: (B, T) mask, True for valid frames.

    Returns:
        (B, 1, F) means and (B, 1, F) standard deviations. As in NeMo, the standard deviation of a single frame is zero.
    """
    # (B, T, 1) and (B, 1, 1)
    mask = mask[..., None]
    frame_lengths = mask.sum(1, keepdim=True)
    mean = features.mul_(mask).sum(1, keepdim=True) / frame_lengths.clamp(min=1)
    squares = torch.zeros_like(mean)
    # the deviations of all frames together would be a second tensor of the size of the features
    for block, block_mask in zip(features.split(FRAMES_PER_BLOCK, 1), mask.split(FRAMES_PER_BLOCK, 1), strict=True):
        squares += (block - mean).mul_(block_mask).square_().sum(1, keepdim=True)
    return mean, (squares / (frame_lengths - 1).clamp(min=1)).sqrt_()


def normalize_with_statistics(features: Tensor, mask: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Normalise every mel bin with a given mean and standard deviation.

    Args:
        features: (B, T, F) log-mel energies; overwritten.
        mask: (B, T) mask, True for valid frames.
        mean: (B, 1, F) mean of every bin, or a tensor that broadcasts to this shape.
        std: (B, 1, F) standard deviation of every bin, or a tensor that broadcasts to this shape.

    Returns:
        (B, T, F) normalised features, in which padding frames are zero.
    """
    return features.sub_(mean).mul_(mask[..., None]).div_(std + NORMALIZE_EPSILON)


def split_batch(raw_speech: Any) -> list[Any]:
    """Split the audio argument of the feature extractor into a list of clips, without converting the clips.

    Args:
        raw_speech: one clip or a list of clips. A clip is a (S,) array, tensor or list of numbers, or an array or
            tensor with several channels, (C, S) or (S, C). A two-dimensional array that is not in a list is one clip
            (S, C) if the last axis has at most `MAX_CHANNELS` entries and the first axis has more; otherwise it is a
            batch (B, S).

    Returns:
        The clips.

    Raises:
        ValueError: `raw_speech` is an empty list.
        TypeError: `raw_speech` is not an array, a tensor or a list.
    """
    if isinstance(raw_speech, (np.ndarray, Tensor)):
        has_channels = raw_speech.ndim == 2 and raw_speech.shape[1] <= MAX_CHANNELS < raw_speech.shape[0]
        return [raw_speech] if raw_speech.ndim < 2 or has_channels else list(raw_speech)
    if not isinstance(raw_speech, Sequence) or isinstance(raw_speech, (str, bytes)):
        raise TypeError(
            f"audio must be an array, a tensor or a list, got {type(raw_speech).__name__}: use load_audio(...) first"
        )
    if len(raw_speech) == 0:
        raise ValueError(
            "audio must contain at least one clip, got an empty list: use np.zeros(0) for a clip without samples"
        )
    if isinstance(raw_speech[0], (int, float, np.number)):
        return [raw_speech]
    return list(raw_speech)


__all__ = ["ParakeetFeatureExtractor"]
