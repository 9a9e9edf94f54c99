"""Whisper base in NumPy, with every attention through fastattn.

An encoder of 6 layers turns 30 seconds of sound into 1500 vectors, one for each 20 ms. A decoder of 6 layers writes
text, token by token: each token looks at what has been written, and at the sound.

Shapes in the comments: L tokens, M = 1500 moments, H = 8 heads, D = 64 dimensions of a head, E = H · D = 512.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastattn.demo.listen.attention import Attention, RecordingAttention
from fastattn.demo.parts import Floats, gelu, layer_norm, linear

__all__ = ["HEADS", "LAYERS", "MAX_TOKENS", "Whisper"]

LAYERS = 6
HEADS = 8
#: Tokens that the decoder has positions for.
MAX_TOKENS = 448
EPSILON = 1e-5

#: A matrix [out][in] or the gain of a norm, and its bias.
Pair = tuple[Floats, Floats]


class SelfAttention(NamedTuple):
    """The parameters of attention of a sequence to itself, with the norm before it."""

    norm: Pair
    query_key_value: Pair
    output: Pair


class CrossAttention(NamedTuple):
    """Those of attention to the sound."""

    norm: Pair
    query: Pair
    key_value: Pair
    output: Pair


class FeedForward(NamedTuple):
    """Those of what is done with each vector alone."""

    norm: Pair
    up: Pair
    down: Pair


class Whisper:
    """The model.

    Parameters
    ----------
    variables : mapping of str to ndarray
        The parameters, under the names of CTranslate2's file, in any floating dtype.
    """

    def __init__(self, variables: Mapping[str, NDArray[Any]]) -> None:
        def array(name: str) -> Floats:
            return np.ascontiguousarray(variables[name], np.float32)

        def pair(name: str, one: str = "weight", other: str = "bias") -> Pair:
            return array(f"{name}/{one}"), array(f"{name}/{other}")

        def norm(name: str) -> Pair:
            return pair(f"{name}/layer_norm", "gamma", "beta")

        def maps(name: str, count: int) -> list[Pair]:
            return [norm(name), *(pair(f"{name}/linear_{index}") for index in range(count))]

        self.convolutions = [pair("encoder/conv1"), pair("encoder/conv2")]
        self.moments = array("encoder/position_encodings/encodings")
        self.encoder_norm = norm("encoder")
        self.encoder = [
            (SelfAttention(*maps(f"{at}/self_attention", 2)), FeedForward(*maps(f"{at}/ffn", 2)))
            for at in (f"encoder/layer_{index}" for index in range(LAYERS))
        ]
        self.tokens = array("decoder/embeddings/weight")
        self.positions = array("decoder/position_encodings/encodings")
        self.decoder_norm = norm("decoder")
        self.decoder = [
            (
                SelfAttention(*maps(f"{at}/self_attention", 2)),
                CrossAttention(*maps(f"{at}/attention", 3)),
                FeedForward(*maps(f"{at}/ffn", 2)),
            )
            for at in (f"decoder/layer_{index}" for index in range(LAYERS))
        ]

    def hear(self, spectrogram: Floats, attention: Attention) -> Floats:
        """Run the encoder: 30 seconds of sound, (3000, 80), become vectors of 1500 moments, (M, E)."""
        x = gelu(_convolve(spectrogram, *self.convolutions[0]))
        x = gelu(_convolve(x, *self.convolutions[1], stride=2))
        x += self.moments
        for among, forward in self.encoder:
            query, key, value = _heads(linear(_norm(x, among.norm), *among.query_key_value), 3)
            x += linear(_joined(attention.of_sound(query, key, value)), *among.output)
            x += _feed_forward(x, forward)
        return _norm(x, self.encoder_norm)

    def keys_and_values(self, heard: Floats) -> list[Pair]:
        """What each layer of the decoder looks at in a sound, (H, M, D) each: computed once, used by every token."""
        pairs = []
        for _, cross, _ in self.decoder:
            key, value = np.ascontiguousarray(_heads(linear(heard, *cross.key_value), 2))
            pairs.append((key, value))
        return pairs

    def caches(self, attention: Attention, capacity: int = MAX_TOKENS) -> list[Any]:
        """Make what a text is kept in, of each layer, while it is written: empty."""
        return [attention.cache(HEADS, self.tokens.shape[1] // HEADS, capacity) for _ in self.decoder]

    def read(self, tokens: Sequence[int], sound: list[Pair], caches: list[Any], attention: Attention) -> Floats:
        """Run the decoder on L more tokens, which the caches then have.

        Returns
        -------
        ndarray, shape (L, E)
            Of each token a vector, which says what may follow: see `logits`.
        """
        start = int(caches[0].lengths[0])
        x = self.tokens[np.asarray(tokens)] + self.positions[start : start + len(tokens)]
        for (among, cross, forward), (sound_key, sound_value), cache in zip(self.decoder, sound, caches, strict=True):
            query, key, value = _heads(linear(_norm(x, among.norm), *among.query_key_value), 3)
            x += linear(_joined(attention.of_text(query, key, value, cache)), *among.output)
            (query,) = _heads(linear(_norm(x, cross.norm), *cross.query), 1)
            x += linear(_joined(attention.to_sound(query, sound_key, sound_value)), *cross.output)
            x += _feed_forward(x, forward)
        return _norm(x, self.decoder_norm)

    def logits(self, vectors: Floats) -> Floats:
        """How likely each token of the vocabulary is to follow, as logarithms, up to a constant; (..., tokens)."""
        scores: Floats = vectors @ self.tokens.T
        return scores

    def looks(self, tokens: Sequence[int], sound: list[Pair]) -> Floats:
        """Where each of L tokens looks in the sound, in each head of the decoder, (layers, H, L, M)."""
        recording = RecordingAttention()
        self.read(tokens, sound, self.caches(recording, len(tokens)), recording)
        return np.stack(recording.weights)


def _norm(x: Floats, norm: Pair) -> Floats:
    return layer_norm(x.copy(), *norm, epsilon=EPSILON)


def _feed_forward(x: Floats, parameters: FeedForward) -> Floats:
    return linear(gelu(linear(_norm(x, parameters.norm), *parameters.up)), *parameters.down)


def _heads(x: Floats, count: int) -> Floats:
    """Cut (L, count · E) into `count` views (H, L, D), which fastattn reads where they lie."""
    return x.reshape(len(x), count, HEADS, -1).transpose(1, 2, 0, 3)


def _joined(x: Floats) -> Floats:
    """Put the heads of (H, L, D) side by side: (L, E)."""
    return x.swapaxes(0, 1).reshape(x.shape[1], -1)


def _convolve(x: Floats, kernel: Floats, bias: Floats, stride: int = 1) -> Floats:
    """A convolution over time, (length, in) to (length / stride, out), as one product for each of the kernel's steps.

    The kernel is [out][in][step], of 3 steps; there is one row of zeros at each end.
    """
    padded = np.pad(x, ((1, 1), (0, 0)))
    return sum(
        (padded[step : step + len(x) : stride] @ kernel[:, :, step].T for step in range(kernel.shape[2])), start=bias
    )
