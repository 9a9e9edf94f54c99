"""What Whisper hears: the energy of a sound in 80 bands of pitch, a hundred times a second."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from fastattn.demo.listen.sound import RATE
from fastattn.demo.parts import Floats

__all__ = ["BANDS", "FRAMES", "WINDOW", "log_mel"]

BANDS = 80
#: Samples that Whisper hears at once, 30 seconds, and frames that these become.
WINDOW, FRAMES = 30 * RATE, 3000
#: Samples from one frame to the next, 10 ms, and samples in a frame, 25 ms.
HOP, FRAME = 160, 400

# The mel scale after Slaney: linear up to a kilohertz, logarithmic from there on
LINEAR = 200 / 3  # hertz in a mel
KNEE = 1000.0
LOG_STEP = np.log(6.4) / 27


def log_mel(samples: Floats) -> Floats:
    """The spectrogram of up to 30 seconds, which silence completes.

    Parameters
    ----------
    samples : ndarray, shape (n,)
        Of one channel, `RATE` a second.

    Returns
    -------
    ndarray, shape (3000, 80)
        [frame][band]: the logarithm of the energy, at most 80 dB below the loudest, between about -1 and 1.
    """
    whole = np.zeros(WINDOW, np.float64)
    whole[: len(samples)] = samples
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(whole, FRAME // 2, mode="reflect"), FRAME)[::HOP][:FRAMES]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(FRAME) / FRAME)
    spectrum = np.abs(np.fft.rfft(frames * hann)) ** 2
    energy = np.log10(np.maximum(spectrum @ _filters().T, 1e-10))
    scaled: Floats = ((np.maximum(energy, energy.max() - 8) + 4) / 4).astype(np.float32)
    return scaled


@cache
def _filters() -> NDArray[np.float64]:
    """The bands: triangles over the frequencies, evenly spaced in mel, each of area 1; shape (80, 201)."""
    corners = _hertz(np.linspace(0, _mel(RATE / 2), BANDS + 2))
    left, centre, right = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    frequencies = np.arange(FRAME // 2 + 1) * (RATE / FRAME)
    rising, falling = (frequencies - left) / (centre - left), (right - frequencies) / (right - centre)
    triangles: NDArray[np.float64] = np.maximum(0, np.minimum(rising, falling)) * 2 / (right - left)
    return triangles


def _mel(hertz: float) -> float:
    if hertz < KNEE:
        return hertz / LINEAR
    return float(KNEE / LINEAR + np.log(hertz / KNEE) / LOG_STEP)


def _hertz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    knee = KNEE / LINEAR
    return np.where(mel < knee, mel * LINEAR, KNEE * np.exp(LOG_STEP * (mel - knee)))
