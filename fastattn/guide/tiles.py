"""The page "tiles" of the guide."""

from __future__ import annotations

import math
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import fastattn
from fastattn.console.terminal import Style
from fastattn.demo.minilm import Floats
from fastattn.guide.page import Listing, Picture, Step, Table, claim, duration
from fastattn.guide.pictures import draw_curves, numbers

LENGTHS = (256, 512, 1024, 2048)
D = 64
BLOCK = 256
MEBIBYTE = 1 << 20


def formula(query: Floats, key: Floats, value: Floats) -> Floats:
    """The formula as it stands: a matrix of Lq × Lk scores."""
    scores = query @ key.T / math.sqrt(query.shape[1])
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    out: Floats = weights @ value
    return out


def two_at_once(m1: float, l1: float, m2: float, l2: float) -> tuple[float, float]:
    """Of two parts of a row, each with its maximum m and its sum l of exp(score − m): those of both together."""
    m = max(m1, m2)
    return m, l1 * math.exp(m1 - m) + l2 * math.exp(m2 - m)


def blocks_of_keys(query: Floats, key: Floats, value: Floats) -> Floats:
    """Online softmax: the keys block by block, each looked at once; a matrix of Lq × BLOCK scores."""
    query = query / np.float32(math.sqrt(query.shape[1]))
    m = np.full((len(query), 1), -np.inf, np.float32)  # greatest score so far, of each query
    l = np.zeros((len(query), 1), np.float32)  # sum of exp(score − m) so far
    out = np.zeros((len(query), value.shape[1]), np.float32)  # sum of exp(score − m) · value so far
    for start in range(0, len(key), BLOCK):
        scores = query @ key[start : start + BLOCK].T
        new_m = np.maximum(m, scores.max(axis=1, keepdims=True))
        correction = np.exp(m - new_m)  # what was summed so far was relative to the old m
        weights = np.exp(scores - new_m)
        l = l * correction + weights.sum(axis=1, keepdims=True)
        out = out * correction + weights @ value[start : start + BLOCK]
        m = new_m
    return out / l


def tiles(query: Floats, key: Floats, value: Floats) -> Floats:
    """The queries in blocks as well: a matrix of BLOCK × BLOCK scores, which stays in the cache."""
    blocks = [blocks_of_keys(query[start : start + BLOCK], key, value) for start in range(0, len(query), BLOCK)]
    return np.concatenate(blocks)


def compiled(query: Floats, key: Floats, value: Floats) -> Floats:
    """The same idea as `tiles`, in compiled code on vector registers and all cores."""
    out: Floats = fastattn.attention(query, key, value)
    return out


FORMS: dict[str, Callable[[Floats, Floats, Floats], Floats]] = {
    "formula": formula,
    "blocks of keys": blocks_of_keys,
    "tiles": tiles,
    "fastattn": compiled,
}


def steps() -> Iterator[Step]:
    """Go from one form to the next; check each against the formula, and measure its memory and its time."""
    yield "## 1. The formula"
    yield Listing.of(formula)
    yield (
        "This is right, and for short sequences all one needs. But the matrix of scores grows with the square of the "
        "length, and it is written and read several times: for its maximum, the exponential, the sum, the division, "
        "the product. At length 32768 it takes 4 GiB, for one head. The processor waits for memory most of the time."
    )
    yield "## 2. A softmax in parts"
    yield (
        "Each row needs only two numbers: its maximum m, and the sum l of exp(score − m). The exponentials themselves "
        "are large without the maximum, which is known only at the end of the row, or so it seems. But parts of a row "
        "can be combined later, because exp(s − m) = exp(s − m₁) · exp(m₁ − m):"
    )
    yield Listing.of(two_at_once)
    rng = np.random.default_rng(0)
    row = rng.standard_normal(1000) * 50
    parts = [(float(part.max()), float(np.exp(part - part.max()).sum())) for part in (row[:300], row[300:])]
    m, l = two_at_once(*parts[0], *parts[1])
    exact = float(np.exp(row - row.max()).sum())
    yield claim(
        m == row.max() and abs(l - exact) < 1e-12 * exact,
        "For a row of 1000 scores, cut after 300, this gives the maximum and the sum of the whole row, to twelve "
        "digits. (Milakov and Gimelshein 2018 call it the online normalizer.)",
    )
    yield "## 3. Keys in blocks"
    yield (
        "The same correction works for the weighted sum of the values. So we go through the keys once, block by block, "
        "and never see more than a block of scores. Where a later block has a greater score, what was summed before "
        "is scaled down:"
    )
    yield Listing.of(blocks_of_keys)
    yield "## 4. Queries in blocks"
    yield (
        "Queries have nothing to do with each other. If they are taken in blocks, too, the scores at hand are a small "
        "square, a *tile*, which stays in the processor's cache however long the sequences are. The blocks can run on "
        "several cores. This is the idea of FlashAttention (Dao et al. 2022):"
    )
    yield Listing.of(tiles)
    yield "## 5. Compiled"
    yield (
        "NumPy still makes an array for every step. In compiled code a tile's scores need not even leave the registers "
        "between the product and the maximum. fastattn puts a different *query* into every lane of a vector "
        "register, so that the softmax, too, works lane by lane: see [How it works](../how-it-works.md)."
    )

    yield "## Right, small, fast?"
    yield (
        f"All forms on the same random numbers, float32, D = {D}. The error is the greatest difference from the "
        "formula in float64. Memory is what NumPy allocates at the peak, the result included. fastattn's own "
        "buffers are allocated once and kept, and do not count here; they do not grow with the length. Times are "
        "medians, taken in turn."
    )
    error, memory, seconds = _measure(rng)
    last = LENGTHS[-1]
    yield Table(
        [f"length {last}", "error", "memory", "time"],
        [[name, f"{error[name]:.0e}", f"{memory[name][-1]:.1f} MiB", duration(seconds[name][-1])] for name in FORMS],
    )
    yield _picture(memory, seconds)
    yield claim(
        max(error.values()) < 5e-6,
        "All of them are exact: no form leaves anything out, and their errors are those of float32's rounding.",
    )
    growth = {name: memory[name][-1] / memory[name][0] for name in FORMS}
    times = LENGTHS[-1] // LENGTHS[0]
    yield claim(
        growth["formula"] > 0.6 * times**2 and growth["tiles"] < times,
        f"From length {LENGTHS[0]} to {last}, which is {times} times as long, the formula's memory becomes "
        f"{growth['formula']:.0f} times as large. With blocks of keys it becomes {growth['blocks of keys']:.0f} times "
        f"as large, with tiles {growth['tiles']:.0f} times. What fastattn leaves, {memory['fastattn'][-1]:.1f} MiB, is "
        "the result itself.",
    )


def _measure(rng: np.random.Generator) -> tuple[dict[str, float], dict[str, list[float]], dict[str, list[float]]]:
    """Error at the greatest length, memory in MiB and seconds at each length, of every form."""
    error: dict[str, float] = {}
    memory: dict[str, list[float]] = {name: [] for name in FORMS}
    seconds: dict[str, list[float]] = {name: [] for name in FORMS}
    for length in LENGTHS:
        operands = rng.standard_normal((3, length, D), dtype=np.float32)
        exact = formula(*operands.astype(np.float64))
        times: dict[str, list[float]] = {name: [] for name in FORMS}
        for name, form in FORMS.items():
            error[name] = float(np.abs(form(*operands) - exact).max())
            memory[name].append(_peak(form, operands) / MEBIBYTE)
        for _ in range(7):
            for name, form in FORMS.items():
                start = time.perf_counter()
                form(*operands)
                times[name].append(time.perf_counter() - start)
        for name in FORMS:
            seconds[name].append(statistics.median(times[name]))
    return error, memory, seconds


def _peak(form: Callable[..., Floats], operands: Floats) -> float:
    """The bytes that NumPy has allocated at the peak of a call."""
    started = not tracemalloc.is_tracing()
    if started:
        tracemalloc.start()
    try:
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        form(*operands)
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        if started:
            tracemalloc.stop()


def _picture(memory: dict[str, list[float]], seconds: dict[str, list[float]]) -> Picture:
    milliseconds = {name: [1e3 * each for each in times] for name, times in seconds.items()}

    def lines(style: Style) -> list[str]:
        first = numbers("memory in MiB, by length", LENGTHS, memory, style)
        return [*first, "", *numbers("time in ms, by length", LENGTHS, milliseconds, style)]

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        draw_curves(left, LENGTHS, memory, labels=("length", "memory, MiB"), log="xy")
        draw_curves(right, LENGTHS, milliseconds, labels=("length", "time, ms"), log="xy")
        left.legend(frameon=False, fontsize=8)

    caption = (
        "Memory and time of the four forms. Only the formula's memory grows with the square of the length; the time "
        "of all four does, since all compute every score."
    )
    return Picture("tiles", caption, lines, draw, (9.0, 3.2), timed=True)
