"""Log-mel features as NVIDIA NeMo computes them, vectorised over the batch.

Turns samples into features and lengths; reading files and resampling is for `audio.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature, SequenceFeatureExtractor
from transformers.utils import TensorType, logging

from .audio import load_audio

logger = logging.get_logger(__name__)

# added to the standard deviation and to the mel energies: NeMo's parts/preprocessing/features.py
NORMALIZE_EPSILON = 1e-5
LOG_ZERO_GUARD = 2.0**-24
# an axis this short holds channels, not samples
MAX_CHANNELS = 8

# Slaney's mel scale (Auditory Toolbox, 1998): linear below 1000 Hz, which is mel 15, and logarithmic above it
HERTZ_PER_MEL = 200.0 / 3.0
LOG_START_HERTZ, LOG_START_MEL = 1000.0, 15.0
LOG_STEP = np.log(6.4) / 27.0


class ParakeetFeatureExtractor(SequenceFeatureExtractor):
    """Log-mel spectrogram with pre-emphasis, by default normalised per clip and mel bin over its valid frames.

    A clip of S samples has S // hop_length valid frames; the output is one frame wider, as in NeMo.

    Args:
        feature_size: mel bins F.
        sampling_rate: samples per second.
        hop_length: samples between frames.
        n_fft: points of the Fourier transform.
        win_length: samples of the symmetric Hann window.
        preemphasis: coefficient a of y[n] = x[n] - a x[n-1]; `None` or 0 for none.
        padding_value: value of the samples that pad a batch.
        normalize: `"per_feature"` gives every mel bin of a clip mean 0 and standard deviation 1; `None` leaves the
            log-mel energies as they are, which models for streaming expect.

    Raises:
        ValueError: another `normalize`.
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
        # (F, n_fft / 2 + 1)
        triangles, norm = mel_triangles(feature_size, n_fft, sampling_rate)
        self.mel_filters = torch.from_numpy(triangles * norm[:, None]).float()

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
        """Compute the features of one or several clips.

        Args:
            raw_speech: one clip or a list of clips. A clip is a (S,) array, tensor or list of samples, int or float, or
                a stereo array with channels first or last. A 2-D array on its own is a batch (B, S), unless its last
                axis is too short for samples and holds channels.
            truncation: cut clips longer than `max_length`.
            pad_to_multiple_of: samples that the padded length is a multiple of.
            return_tensors: `"pt"` (also the default) or `"np"`.
            return_attention_mask: also give the mask; default yes.
            padding: `"longest"`, or `"max_length"` to pad to `max_length`.
            max_length: samples of the padded clips.
            sampling_rate: rate of the clips in Hz.
            device: where the features are computed; the samples move there.
            **kwargs: arguments of other extractors; not used.

        Returns:
            `input_features` (B, T, F) float32 and `attention_mask` (B, T), true on valid frames.

        Raises:
            ValueError: another sampling rate than the model's, samples that are not finite, or padding on the left.
        """
        self._check_sampling_rate(sampling_rate)
        if self.padding_side != "right":
            raise ValueError(
                f"`padding_side` must be 'right', got {self.padding_side!r}: lengths count from the start of a clip; "
                "set it to 'right'"
            )
        clips = [self._samples(clip) for clip in split_batch(raw_speech)]
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
        waves = padded["input_features"][..., 0].to(device)
        lengths = torch.tensor([len(clip) for clip in clips], device=waves.device).clamp(max=waves.shape[1])
        features, valid = self.extract(waves, lengths)
        data = {"input_features": features}
        if return_attention_mask is not False:
            data["attention_mask"] = valid
        return BatchFeature(data, tensor_type=return_tensors)

    def extract(self, waves: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the features of a padded batch on its device.

        Args:
            waves: (B, S) float32 samples.
            lengths: (B,) valid samples.

        Returns:
            (B, T, F) features, zero past each clip's end, and the (B, T) boolean mask; T = 1 + S // hop_length.
        """
        features = self._log_mel(self._preemphasise(waves, lengths))
        frames = lengths // self.hop_length
        valid = torch.arange(features.shape[1], device=waves.device) < frames[:, None]
        if self.normalize is None:
            return features.mul_(valid[..., None]), valid
        return normalize_per_feature(features, valid), valid

    def _check_sampling_rate(self, sampling_rate: int | None) -> None:
        if sampling_rate is None:
            logger.warning_once(
                f"`sampling_rate` was not given and is taken as {self.sampling_rate} Hz: pass it, a wrong rate gives "
                "wrong text."
            )
        elif sampling_rate != self.sampling_rate:
            raise ValueError(
                f"`sampling_rate` must be {self.sampling_rate} Hz, the model's rate; the audio has {sampling_rate} "
                f"Hz. Resample it: transformers_parakeet.load_audio(audio, sampling_rate={sampling_rate})."
            )

    def _samples(self, clip: Any) -> np.ndarray:
        """Return one clip as (S,) float32 samples."""
        return load_audio(clip, self.sampling_rate, target_rate=self.sampling_rate)

    def _preemphasise(self, waves: Tensor, lengths: Tensor) -> Tensor:
        """Filter (B, S) samples and silence what lies past each length, so that padding changes nothing."""
        inside = torch.arange(waves.shape[1], device=waves.device) < lengths[:, None]
        if self.preemphasis:
            waves = torch.cat([waves[:, :1], waves[:, 1:] - self.preemphasis * waves[:, :-1]], dim=1)
        return waves * inside

    def _log_mel(self, waves: Tensor) -> Tensor:
        """(B, S) samples -> (B, T, F) log-mel energies."""
        spectrum = torch.stft(
            waves,
            self.n_fft,
            hop_length=self.hop_length,
            win_length=self.win_length,
            window=torch.hann_window(self.win_length, periodic=False, device=waves.device),
            pad_mode="constant",
            return_complex=True,
        )
        # (B, n_fft / 2 + 1, T) -> (B, T, F)
        power = torch.view_as_real(spectrum).square().sum(-1).transpose(1, 2)
        return torch.matmul(power, self.mel_filters.to(waves.device).T).add_(LOG_ZERO_GUARD).log_()


def mel_triangles(bins: int, n_fft: int, sampling_rate: int) -> tuple[np.ndarray, np.ndarray]:
    """Return triangular filters between 0 Hz and half the sampling rate, evenly spaced on Slaney's mel scale.

    Args:
        bins: mel bins F.
        n_fft: points of the Fourier transform.
        sampling_rate: samples per second.

    Returns:
        (F, n_fft / 2 + 1) float64 triangles of height 1, and the (F,) factors that give each an area of 1.
    """
    top_hertz = sampling_rate / 2
    top_mel = LOG_START_MEL + np.log(top_hertz / LOG_START_HERTZ) / LOG_STEP
    if top_hertz < LOG_START_HERTZ:
        top_mel = top_hertz / HERTZ_PER_MEL
    mels = np.linspace(0.0, top_mel, bins + 2)
    edges = np.where(
        mels < LOG_START_MEL, mels * HERTZ_PER_MEL, LOG_START_HERTZ * np.exp(LOG_STEP * (mels - LOG_START_MEL))
    )
    slopes = edges[:, None] - np.linspace(0.0, top_hertz, n_fft // 2 + 1)
    widths = np.diff(edges)[:, None]
    rising, falling = -slopes[:-2] / widths[:-1], slopes[2:] / widths[1:]
    return np.maximum(0.0, np.minimum(rising, falling)), 2.0 / (edges[2:] - edges[:-2])


def normalize_per_feature(features: Tensor, valid: Tensor) -> Tensor:
    """Give every mel bin mean 0 and unbiased standard deviation 1 over the valid frames; zero the others.

    Args:
        features: (B, T, F); overwritten.
        valid: (B, T) boolean mask.

    Returns:
        (B, T, F). A clip of one frame, whose deviation is undefined, becomes zeros, as in NeMo.
    """
    mask = valid[..., None]
    frames = valid.sum(1)[:, None, None]
    features = features.mul_(mask)
    mean = features.sum(1, keepdim=True) / frames.clamp(min=1)
    features = features.sub_(mean).mul_(mask)
    variance = features.square().sum(1, keepdim=True) / (frames - 1).clamp(min=1)
    return features.div_(variance.sqrt_().add_(NORMALIZE_EPSILON))


def split_batch(raw_speech: Any) -> list[Any]:
    """Return the clips of one clip or a batch, each as it was given.

    Args:
        raw_speech: see `ParakeetFeatureExtractor.__call__`.

    Raises:
        ValueError: there is no clip.
    """
    if isinstance(raw_speech, (np.ndarray, Tensor)):
        is_stereo = raw_speech.ndim == 2 and raw_speech.shape[1] <= MAX_CHANNELS < raw_speech.shape[0]
        return [raw_speech] if raw_speech.ndim < 2 or is_stereo else list(raw_speech)
    if not isinstance(raw_speech, Sequence) or isinstance(raw_speech, (str, bytes)):
        raise TypeError(
            f"audio must be an array, a tensor or a list, got {type(raw_speech).__name__}: use load_audio(...) first"
        )
    if len(raw_speech) == 0:
        raise ValueError("audio must hold at least one clip, got an empty list; a clip without samples is np.zeros(0)")
    if isinstance(raw_speech[0], (int, float, np.number)):
        return [raw_speech]
    return list(raw_speech)


__all__ = ["ParakeetFeatureExtractor"]
