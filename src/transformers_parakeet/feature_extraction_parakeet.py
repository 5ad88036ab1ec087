"""Computes the log-mel features of a batch of clips, equal to those of NVIDIA NeMo.

Reading files and resampling are in `audio.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature, SequenceFeatureExtractor
from transformers.utils import TensorType, logging

from .audio import MAX_CHANNELS, load_audio

logger = logging.get_logger(__name__)

# added to the standard deviation and to the mel energies: NeMo's parts/preprocessing/features.py
NORMALIZE_EPSILON = 1e-5
LOG_ZERO_GUARD = 2.0**-24

# Slaney's mel scale (Auditory Toolbox, 1998): linear below 1000 Hz, which is 15 mel, and logarithmic above
HERTZ_PER_MEL = 200.0 / 3.0
LOG_START_HERTZ, LOG_START_MEL = 1000.0, 15.0
# natural logarithm of the frequency ratio of one mel
LOG_STEP = np.log(6.4) / 27.0


class ParakeetFeatureExtractor(SequenceFeatureExtractor):
    """Log-mel spectrogram with pre-emphasis, by default normalised per clip and mel bin over the valid frames.

    A clip of S samples has S // hop_length valid frames; the output has one more frame, as in NeMo.

    Args:
        feature_size: number of mel bins F.
        sampling_rate: samples per second.
        hop_length: samples between two frames.
        n_fft: points of the Fourier transform.
        win_length: samples of the symmetric Hann window.
        preemphasis: coefficient a of y[n] = x[n] - a x[n-1]; None or 0 for no pre-emphasis.
        padding_value: value of the samples that pad a batch.
        normalize: `"per_feature"` gives every mel bin of a clip mean 0 and standard deviation 1; None returns the
            log-mel energies unchanged, as streaming models expect them.

    Raises:
        ValueError: `normalize` has another value.
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
        triangles, inverse_areas = mel_triangles(feature_size, n_fft, sampling_rate)
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
            truncation: shorten clips to `max_length`.
            pad_to_multiple_of: round the padded length up to a multiple of this number of samples.
            return_tensors: `"pt"` (also if None) or `"np"`.
            return_attention_mask: False omits the mask.
            padding: `"longest"`, or `"max_length"` to pad to `max_length`.
            max_length: length in samples to pad or shorten to.
            sampling_rate: rate of the clips in Hz; None means the rate of the model, with a warning.
            device: device on which the features are computed.
            **kwargs: arguments of other feature extractors; ignored.

        Returns:
            `input_features` (B, T, F) float32 and `attention_mask` (B, T), true on valid frames.

        Raises:
            ValueError: The sampling rate differs from the model's, samples are not finite, or padding is on the left.
        """
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
        """Compute the features of a padded batch on its device.

        Args:
            waveforms: (B, S) float32 samples.
            lengths: (B,) number of valid samples.

        Returns:
            (B, T, F) features, zero after the end of each clip, and the (B, T) mask, true on valid frames;
            T = 1 + S // hop_length.
        """
        features = self._log_mel(self._preemphasise(waveforms, lengths))
        frame_lengths = lengths // self.hop_length
        mask = torch.arange(features.shape[1], device=waveforms.device) < frame_lengths[:, None]
        if self.normalize is None:
            return features.mul_(mask[..., None]), mask
        return normalize_per_feature(features, mask), mask

    def _check_sampling_rate(self, sampling_rate: int | None) -> None:
        """Check that the audio has the model's sampling rate; warn once if the rate is not given (None).

        Raises:
            ValueError: The rates differ.
        """
        if sampling_rate is None:
            logger.warning_once(
                f"`sampling_rate` was not given, so {self.sampling_rate} Hz is assumed: pass it, because a wrong rate "
                "gives wrong text."
            )
        elif sampling_rate != self.sampling_rate:
            raise ValueError(
                f"`sampling_rate` must be {self.sampling_rate} Hz, the rate of the model, but the audio has "
                f"{sampling_rate} Hz: resample it with "
                f"transformers_parakeet.load_audio(audio, sampling_rate={sampling_rate})"
            )

    def _pad_clips(
        self,
        clips: list[np.ndarray],
        padding: bool | str | None,
        max_length: int | None,
        truncation: bool,
        pad_to_multiple_of: int | None,
    ) -> Tensor:
        """Pad or shorten clips to one length and stack them.

        Args:
            clips: (S,) float32 samples each.
            padding: `"longest"`, or `"max_length"` to pad to `max_length`.
            max_length: length in samples to pad or shorten to.
            truncation: shorten clips to `max_length`.
            pad_to_multiple_of: round the padded length up to a multiple of this number of samples.

        Returns:
            (B, S) float32 samples.

        Raises:
            ValueError: `padding_side` is not "right".
        """
        if self.padding_side != "right":
            raise ValueError(
                f"`padding_side` must be 'right', got {self.padding_side!r}: lengths count from the start of a clip; "
                "set it to 'right'"
            )
        # the base class pads arrays of shape (S, features)
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

    def _preemphasise(self, waveforms: Tensor, lengths: Tensor) -> Tensor:
        """Apply the pre-emphasis filter y[n] = x[n] - a x[n-1], and set the padding to zero.

        Args:
            waveforms: (B, S) samples.
            lengths: (B,) number of valid samples.

        Returns:
            (B, S). The padding is zeroed after the filter, whose first padded value would otherwise be -a x[n-1].
        """
        mask = torch.arange(waveforms.shape[1], device=waveforms.device) < lengths[:, None]
        if self.preemphasis:
            filtered = waveforms[:, 1:] - self.preemphasis * waveforms[:, :-1]
            waveforms = torch.cat([waveforms[:, :1], filtered], dim=1)
        return waveforms * mask

    def _log_mel(self, waveforms: Tensor) -> Tensor:
        """Compute the log-mel energies (B, T, F) of padded waveforms (B, S)."""
        spectrum = torch.stft(
            waveforms,
            self.n_fft,
            hop_length=self.hop_length,
            win_length=self.win_length,
            window=torch.hann_window(self.win_length, periodic=False, device=waveforms.device),
            pad_mode="constant",
            return_complex=True,
        )
        # (B, n_fft / 2 + 1, T) -> (B, T, n_fft / 2 + 1)
        power = torch.view_as_real(spectrum).square().sum(-1).transpose(1, 2)
        return torch.matmul(power, self.mel_filters.to(waveforms.device).T).add_(LOG_ZERO_GUARD).log_()


def mel_triangles(num_bins: int, n_fft: int, sampling_rate: int) -> tuple[np.ndarray, np.ndarray]:
    """Compute triangular filters that are evenly spaced on Slaney's mel scale from 0 Hz to half the sampling rate.

    Args:
        num_bins: number of mel bins F.
        n_fft: points of the Fourier transform.
        sampling_rate: samples per second.

    Returns:
        (F, n_fft / 2 + 1) float64 triangles of height 1, and (F,) factors that give each triangle the area 1 (in Hz).
    """
    max_hertz = sampling_rate / 2
    max_mel = LOG_START_MEL + np.log(max_hertz / LOG_START_HERTZ) / LOG_STEP
    if max_hertz < LOG_START_HERTZ:
        max_mel = max_hertz / HERTZ_PER_MEL
    mels = np.linspace(0.0, max_mel, num_bins + 2)
    # frequencies of the corners: triangle i rises from edge i to edge i + 1 and falls to edge i + 2
    linear_hertz = mels * HERTZ_PER_MEL
    log_hertz = LOG_START_HERTZ * np.exp(LOG_STEP * (mels - LOG_START_MEL))
    edges = np.where(mels < LOG_START_MEL, linear_hertz, log_hertz)
    # (F + 2, n_fft / 2 + 1): distance from each frequency of the spectrum up to each edge
    distances = edges[:, None] - np.linspace(0.0, max_hertz, n_fft // 2 + 1)
    widths = np.diff(edges)[:, None]
    rising, falling = -distances[:-2] / widths[:-1], distances[2:] / widths[1:]
    return np.maximum(0.0, np.minimum(rising, falling)), 2.0 / (edges[2:] - edges[:-2])


def normalize_per_feature(features: Tensor, mask: Tensor) -> Tensor:
    """Give every mel bin mean 0 and unbiased standard deviation 1 over the valid frames; set the other frames to zero.

    Args:
        features: (B, T, F); overwritten.
        mask: (B, T), true on valid frames.

    Returns:
        (B, T, F). A clip of one frame, whose standard deviation is undefined, becomes zeros, as in NeMo.
    """
    # (B, T, 1)
    mask = mask[..., None]
    # (B, 1, 1)
    frame_lengths = mask.sum(1, keepdim=True)
    features = features.mul_(mask)
    mean = features.sum(1, keepdim=True) / frame_lengths.clamp(min=1)
    features = features.sub_(mean).mul_(mask)
    variance = features.square().sum(1, keepdim=True) / (frame_lengths - 1).clamp(min=1)
    return features.div_(variance.sqrt_().add_(NORMALIZE_EPSILON))


def split_batch(raw_speech: Any) -> list[Any]:
    """Split the audio argument of the feature extractor into clips, without converting them.

    Args:
        raw_speech: one clip or a list of clips. A clip is a (S,) array, tensor or list of samples (int or float), or a
            stereo array with the channels on the first or last axis. A two-dimensional array that is not in a list is
            a batch (B, S), unless its last axis has at most `MAX_CHANNELS` entries and its first axis more: then it is
            one clip with channels.

    Returns:
        The clips.

    Raises:
        ValueError: The list is empty.
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
