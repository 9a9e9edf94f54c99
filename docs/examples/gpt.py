"""A character GPT, trained on Python's own reference manual: ``python docs/examples/gpt.py``.

A Transformer that guesses the next character (Radford et al. 2018), in NumPy on `fastattn.attention` and
`fastattn.attention_backward`. Its parts are in transformer.py. It prints how many bits a character of held-out text
costs it, what it writes itself, and what its heads look at. See gpt.md.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "16")  # BLAS's threads are not to wait on fastattn's cores

import lzma
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pydoc_data.topics import topics
from typing import Any

import numpy as np
from gpt_heads import strongest, weights_of
from numpy.typing import DTypeLike, NDArray
from saving import options, save_figure, save_result
from transformer import (
    Adam,
    Array,
    Block,
    CausalSelfAttention,
    LayerNorm,
    Linear,
    Parameter,
    Part,
    cross_entropy,
    rows,
    warm_then_cosine,
)

from fastattn.terminal import Progress

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Settings:
    """The size of the model and of its training."""

    length: int = 256  # characters that it sees
    embed: int = 128
    heads: int = 4
    layers: int = 4
    batch: int = 8
    steps: int = 900
    rate: float = 4e-3
    seed: int = 0


QUICK = Settings(length=64, embed=48, heads=2, layers=2, batch=8, steps=150, rate=1e-2)

# -- the text ----------------------------------------------------------------------------------------------------------


def corpus() -> tuple[str, str]:
    """Return the text to train on, and the held-out text: every eighth topic, about a tenth of all characters.

    The chapters of the manual stand in it whole and again section by section. A paragraph is kept once, in the
    longest topic that has it: else much of the held-out text would be known.
    """
    seen: set[str] = set()
    texts: dict[str, str] = {}
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        fresh = []
        for paragraph in topics[name].strip("\n").split("\n\n"):
            words = " ".join(paragraph.split())
            if words not in seen:
                seen.add(words)
                fresh.append(paragraph)
        if sum(map(len, fresh)) > 300:  # else only a heading is left
            texts[name] = "\n\n".join(fresh)
    names = sorted(texts)
    held_out = names[3::8]
    return tuple("\n\n\n".join(texts[n] for n in names if (n in held_out) == held) for held in (False, True))


class Alphabet:
    """The characters of a text, and their numbers."""

    def __init__(self, text: str) -> None:
        self.characters = sorted(set(text))
        self.numbers = {character: number for number, character in enumerate(self.characters)}

    def encode(self, text: str) -> Ids:
        return np.array([self.numbers[character] for character in text], np.int64)

    def decode(self, ids: Ids) -> str:
        return "".join(self.characters[number] for number in ids)


# -- the model ---------------------------------------------------------------------------------------------------------


class GPT(Part):
    """Characters to vectors, blocks, and the scores of each next character."""

    def __init__(self, characters: int, settings: Settings, dtype: DTypeLike = np.float32) -> None:
        rng = np.random.default_rng(settings.seed)
        embed, gain = settings.embed, 1 / np.sqrt(2 * settings.layers)  # the sum of all blocks stays of size 1
        self.length = settings.length
        self.characters = Parameter((0.5 * rng.standard_normal((characters, embed))).astype(dtype))
        self.blocks = []
        for _ in range(settings.layers):
            attention = CausalSelfAttention(embed, settings.heads, rng, dtype, gain)
            self.blocks.append(Block(attention, embed, 4 * embed, rng, dtype, gain))
        self.norm = LayerNorm(embed, dtype)
        self.scores = Linear(embed, characters, rng, dtype, gain=0.1)

    def __call__(self, ids: Ids) -> Array:
        """Return the scores of all characters after each of (B, L): (B, L, characters)."""
        self.ids = ids
        x = self.characters.value[ids]
        for block in self.blocks:
            x = block(x)
        return self.scores(self.norm(x))

    def backward(self, grad: Array) -> None:
        grad = self.norm.backward(self.scores.backward(grad))
        for block in reversed(self.blocks):
            grad = block.backward(grad)
        self.characters.grad[...] = 0
        np.add.at(self.characters.grad, self.ids.ravel(), rows(grad))


# -- training ----------------------------------------------------------------------------------------------------------


def windows(ids: Ids, starts: Ids, length: int) -> tuple[Ids, Ids]:
    """Return pieces of a text, (B, L), and for each character the next one."""
    places = starts[:, None] + np.arange(length)
    return ids[places], ids[places + 1]


def train(model: GPT, text: Ids, settings: Settings, watch: Callable[[int, float], None]) -> None:
    """Train on random pieces of a text; `watch` is told each step and its loss in bits."""
    rng = np.random.default_rng(settings.seed + 1)
    adam = Adam(model)
    for step in range(settings.steps):
        starts = rng.integers(0, len(text) - settings.length, settings.batch)
        ids, targets = windows(text, starts, settings.length)
        loss, grad = cross_entropy(model(ids), targets)
        model.backward(grad)
        adam.step(warm_then_cosine(step, settings.steps, settings.rate, warm=50))
        watch(step + 1, loss / np.log(2))


def bits_per_character(model: GPT, text: Ids, most: int | None = None) -> float:
    """Return what a character of a text costs: −log2 of the probability that the model gave it, in the mean.

    Pieces overlap by half: each character but the first few is guessed from at least half a length of others.
    """
    half = model.length // 2
    starts = np.arange(0, len(text) - model.length, half)[:most]
    bits = []
    for first in range(0, len(starts), 16):
        ids, targets = windows(text, starts[first : first + 16], model.length)
        scores = model(ids)
        if first == 0:
            bits.append((cross_entropy(scores[:1, :half], targets[:1, :half])[0], half))
        bits.append((cross_entropy(scores[:, half:], targets[:, half:])[0], len(ids) * half))
    values, weights = zip(*bits, strict=True)
    return float(np.average(values, weights=weights) / np.log(2))


def baselines(train_text: str, held_text: str) -> dict[str, float]:
    """Return what a character of the held-out text costs without a network, in bits.

    Characters and pairs are counted in the training text, each count from 1 up, so that nothing is impossible.
    """
    alphabet = Alphabet(train_text + held_text)
    known, text = alphabet.encode(train_text), alphabet.encode(held_text)
    single = np.ones(len(alphabet.characters))
    pairs = np.ones((len(single), len(single)))
    np.add.at(single, known, 1)
    np.add.at(pairs, (known[:-1], known[1:]), 1)

    def packed(compress: Callable[[bytes], bytes], *texts: str) -> int:
        return 8 * len(compress("".join(texts).encode()))

    def xz(data: bytes) -> bytes:
        return lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)

    return {
        "characters by frequency": -float(np.log2(single / single.sum())[text].mean()),
        "pairs by frequency": -float(np.log2(pairs / pairs.sum(axis=1, keepdims=True))[text[:-1], text[1:]].mean()),
        "gzip": packed(lambda data: zlib.compress(data, 9), held_text) / len(text),
        "xz": packed(xz, held_text) / len(text),
        "xz after the training text": (packed(xz, train_text, held_text) - packed(xz, train_text)) / len(text),
    }


def write(model: GPT, alphabet: Alphabet, prompt: str, count: int, seed: int, temperature: float = 0.7) -> str:
    """Return `count` characters that go on after the prompt, each drawn from what the model expects."""
    rng = np.random.default_rng(seed)
    ids = list(alphabet.encode(prompt))
    for _ in range(count):
        scores = model(np.array([ids[-model.length :]]))[0, -1] / temperature
        ids.append(int((scores + rng.gumbel(size=scores.shape)).argmax()))  # a draw from softmax(scores)
    return alphabet.decode(np.array(ids[len(prompt) :]))


# -- the command -------------------------------------------------------------------------------------------------------


def run(settings: Settings, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Train, and return all that was measured, and the model."""
    train_text, held_text = corpus()
    alphabet = Alphabet(train_text + held_text)
    text, held = alphabet.encode(train_text), alphabet.encode(held_text)
    model = GPT(len(alphabet.characters), settings)
    costs = baselines(train_text, held_text)
    say(f"{len(text)} characters to train on, {len(held)} held out, {sum(p.value.size for _, p in model.parameters())} parameters")
    curve: dict[str, list[float]] = {"step": [], "train": [], "held out": []}
    losses: list[float] = []
    started = time.perf_counter()
    with Progress("training") as progress:

        def watch(step: int, bits: float) -> None:
            losses.append(bits)
            progress(step, settings.steps, f"{np.mean(losses[-20:]):.2f} bits per character")
            if step % max(1, settings.steps // 30) == 0:
                curve["step"].append(step)
                curve["train"].append(float(np.mean(losses[-20:])))
                curve["held out"].append(bits_per_character(model, held, most=16))

        train(model, text, settings, watch)
    seconds = time.perf_counter() - started
    costs["this model"] = bits_per_character(model, held)
    return {"model": model, "alphabet": alphabet, "bits": costs, "curve": curve, "seconds": seconds}
