"""Sound from wav files: one channel of float32 samples, as many a second as Whisper listens to."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastattn.demo.parts import Floats

__all__ = ["RATE", "read_wav", "resample"]

#: Samples a second that Whisper listens to.
RATE = 16000

PCM, FLOAT, EXTENSIBLE = 1, 3, 0xFFFE
#: How samples lie in the file, by (format, bits): a dtype, and the number that becomes 1.0.
LAYOUTS: dict[tuple[int, int], tuple[str, float]] = {
    (PCM, 16): ("<i2", 2.0**15),
    (PCM, 24): ("<i4", 2.0**31),  # once they have a byte more
    (PCM, 32): ("<i4", 2.0**31),
    (FLOAT, 32): ("<f4", 1.0),
    (FLOAT, 64): ("<f8", 1.0),
}
#: Samples a second of a file: what recorders have, and more. Outside, a few bytes could become gigabytes.
LEAST_RATE, MOST_RATE = 1000, 384_000
#: Zero crossings of the sinc at each side, and the shape of the window over them: what is cut off is below -80 dB.
CROSSINGS, KAISER = 24, 8.0
#: Frequencies are kept up to this part of the lower of the two rates' halves.
KEPT = 0.95
#: Samples, and sets of weights, that are made at once, so that memory does not grow with the sound.
BLOCK, PHASES = 8192, 1024


def read_wav(data: bytes) -> Floats:
    """Read the sound in the bytes of a wav file, at `RATE` samples a second.

    Samples may be integers of 8, 16, 24 or 32 bits or floats of 32 or 64, at any rate from 1 to 384 kHz;
    channels become their mean.

    Raises
    ------
    ValueError
        If these bytes are no wav file, or one of another kind: the message says what is wrong with it.
    """
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise ValueError("it does not begin as a wav file does")
    chunks = dict(_chunks(data))
    header = bytes(chunks.get(b"fmt ", b""))
    if len(header) < 16 or b"data" not in chunks:
        raise ValueError("it ends before its sound begins")
    code, channels, rate, _, frame, bits = struct.unpack_from("<HHIIHH", header)
    if code == EXTENSIBLE and len(header) >= 26:
        (code,) = struct.unpack_from("<H", header, 24)
    if (code, bits) not in LAYOUTS and (code, bits) != (PCM, 8):
        raise ValueError(f"its samples are of format {code} with {bits} bits; expected plain integers or floats")
    if not channels or frame != channels * bits // 8:
        raise ValueError(f"it says to have {channels} channels and {rate} samples a second, of {frame} bytes")
    if not LEAST_RATE <= rate <= MOST_RATE:
        raise ValueError(f"it says to have {rate} samples a second; expected {LEAST_RATE} to {MOST_RATE}")
    raw = chunks[b"data"][: len(chunks[b"data"]) // frame * frame]
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and refused
        samples = _as_floats(np.frombuffer(raw, np.uint8), code, bits).reshape(-1, channels).mean(axis=1)
    if not samples.size:
        raise ValueError("it has no sound")
    if not np.isfinite(samples).all():
        raise ValueError("it has samples that are no numbers")
    return resample(samples, rate, RATE)


def _chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """The parts of a wav file; whoever wrote to a pipe has not known their sizes, so they end with the file at last."""
    at = 12
    while at + 8 <= len(data):
        name, (size,) = data[at : at + 4], struct.unpack_from("<I", data, at + 4)
        yield name, memoryview(data)[at + 8 : at + 8 + size]
        at += 8 + size + size % 2


def _as_floats(raw: NDArray[np.uint8], code: int, bits: int) -> Floats:
    """Samples between -1 and 1, from the bytes of the file."""
    if bits == 8:
        return (raw.astype(np.float32) - np.float32(128)) / np.float32(128)
    if bits == 24:  # with a lowest byte of zero they are numbers of 32 bits
        raw = np.pad(raw.reshape(-1, 3), ((0, 0), (1, 0))).reshape(-1)
    dtype, one = LAYOUTS[code, bits]
    samples: NDArray[Any] = raw.view(dtype)
    floats: Floats = (samples / one).astype(np.float32)
    return floats


def resample(samples: Floats, rate: int, wanted: int) -> Floats:
    """The same sound at another number of samples a second.

    A new sample is a sum of those around it, weighted by a sinc under a Kaiser window. Where it falls between two old
    ones repeats after wanted / gcd(rate, wanted) samples: this many sets of weights there are.
    """
    common = math.gcd(rate, wanted)
    up, down = wanted // common, rate // common
    if up == down:
        return samples
    count = -(-len(samples) * up // down)
    # of a short sound few sets are needed, and where rates have little in common there are many
    phases = np.unique(np.arange(min(count, up)) * down % up)
    weights = np.concatenate([_weights(some, up, down) for some in np.array_split(phases, -(-len(phases) // PHASES))])

    taps = weights.shape[1]
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(samples, taps // 2), taps)
    out = np.empty(count, np.float32)
    for start in range(0, count, BLOCK):
        place, phase = np.divmod(np.arange(start, min(start + BLOCK, count)) * down, up)
        out[start : start + BLOCK] = np.einsum("nt,nt->n", windows[place], weights[np.searchsorted(phases, phase)])
    return out


def _weights(phases: NDArray[np.int64], up: int, down: int) -> Floats:
    """The weights of old samples for new ones that stand so many parts of `up` behind an old one, (phases, taps)."""
    cutoff = KEPT * min(1.0, up / down)  # of half the old rate
    reach = math.ceil(CROSSINGS / cutoff)  # old samples at each side
    distance = np.arange(-reach, reach + 1) - phases[:, None] / up
    window = np.i0(KAISER * np.sqrt(np.clip(1 - (distance / (reach + 1)) ** 2, 0, None)))
    weights = np.sinc(cutoff * distance) * window
    weights /= weights.sum(axis=1, keepdims=True)
    return weights.astype(np.float32)
