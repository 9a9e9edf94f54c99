"""The page "bahdanau-luong" of the guide."""

from __future__ import annotations

import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fastattn
from fastattn.console.terminal import Style, heat_map, legend
from fastattn.guide.cross_attention import PAIRS, SCALE, SHOWN, aligned, word_vectors
from fastattn.guide.data import fables, hidden_after, model
from fastattn.guide.page import Listing, Picture, Step, Table, claim, duration
from fastattn.guide.pictures import curves

Array = NDArray[Any]

TOKENS = 40  # of each text of the windows
WINDOW = 4
STEPS = (1.6, 0.8, 0.4, 0.2, 0.1, 0.05)
LENGTH = 1.6  # of the vectors: how sharp a text looks at itself


def additive_scores(query: Array, key: Array, weight: Array) -> Array:
    """Bahdanau's score as it stands: makes an array of Lq × Lk × D on the way."""
    scores: Array = (weight * np.tanh(query[:, None, :] + key[None, :, :])).sum(axis=-1)
    return scores


def product_of_tanhs(x: Array, scale: float, step: float) -> tuple[Array, Array]:
    """Features and weights with which additive attention computes dot products of vectors of length 1.

    tanh(b + z) + tanh(b − z) is 2 tanh(b) + tanh''(b) z² for small z. With z = step · (q + k), summed over the
    features, this holds |q|² + |k|² + 2 q·k, in which only q·k varies.
    """
    b = np.arctanh(np.sqrt(1 / 3))  # where the second derivative of tanh is greatest
    curvature = -2 * np.tanh(b) * (1 - np.tanh(b) ** 2)
    features = np.concatenate([step * x + b / 2, b / 2 - step * x], axis=-1)  # those of q and of k are added up
    return features, np.full(features.shape[-1], scale / (2 * curvature * step**2))


def steps() -> Iterator[Step]:
    """Compare the scores on real word vectors; then look at windows."""
    yield (
        "A decoder that looks back needs a score: how well does the source word j fit what it is about to write, i? "
        "Bahdanau, Cho and Bengio (2014) let a small network decide. Luong, Pham and Manning (2015) put simpler scores "
        "beside it. For a query q and a key k:"
    )
    yield Listing(
        "additive (Bahdanau)   w · tanh(Wq q + Wk k + b)\n"
        "dot      (Luong)      q · k\n"
        "general  (Luong)      q · W k\n"
        "concat   (Luong)      w · tanh(W [q; k])               the additive score, without b"
    )
    yield "The scores go through a softmax, and the weights make a mean of the values, as in all attention."

    yield "## Why the tanh?"
    one, other, partners = PAIRS[SHOWN]
    rows, query = word_vectors(one, 0)
    columns, key = word_vectors(other, 0)
    query, key = query.astype(np.float64), key.astype(np.float64)
    weight = np.random.default_rng(0).standard_normal(query.shape[1])
    linear = (query @ weight)[:, None] + (key @ weight)[None]
    _, flat = softmax_rows(linear)
    yield claim(
        np.abs(flat - flat[0]).max() < 1e-12,
        "Without it the score would be w · (q + k) = w · q + w · k. The softmax runs over the keys, and there w · q is "
        f"the same for all, so that it drops out: every query gets the *same* weights. Measured on the {len(query)} "
        f"and {len(key)} words of two sentences, with a random w: the rows of weights differ by less than 1e-12. It is "
        "the bend of the tanh that lets query and key meet.",
    )

    yield "## The additive score can do what the dot product does"
    yield (
        "A network with one hidden layer is very general. We can even write down weights with which it computes a dot "
        "product, with two hidden units for each feature:"
    )
    yield Listing.of(product_of_tanhs)
    _, dot = fastattn.attention(query, key, key, scale=SCALE, return_weights=True)
    differences = []
    for step in STEPS:
        (q_features, w), (k_features, _) = (product_of_tanhs(x, SCALE, step) for x in (query, key))
        _, weights = fastattn.additive_attention(q_features, k_features, key, w, return_weights=True)
        differences.append(float(np.abs(weights - dot).max()))
    yield (
        "The query's features are added to the key's inside the tanh, and w is the same for all. On the word vectors "
        "of [page 6](cross-attention.md), how far are the weights from those of dot-product attention?"
    )
    yield curves(
        "additive",
        "The smaller the step, the more exactly the additive score is a dot product.",
        STEPS,
        {"of any weight": differences},
        labels=("step", "greatest difference"),
        log="xy",
    )
    hits = aligned(weights, rows, columns, partners)
    yield claim(
        differences[-1] < 0.001 and differences == sorted(differences, reverse=True),
        f"At a step of {STEPS[-1]:g} they differ by {differences[-1]:.4f} at most, and {hits} of "
        f"{len(partners.split())} words find their partner. So the additive score can do what the dot product does, if "
        "it has hidden units enough, and other things besides. What speaks for the dot product is its price.",
    )

    yield "## The price"
    yield (
        "A dot product is one multiplication and one addition for each feature; a matrix product does it at the "
        "processor's full speed. The additive score needs a tanh for each query, key and feature. Written with NumPy "
        "or PyTorch as it stands, it also makes an array of Lq × Lk × D:"
    )
    yield Listing.of(additive_scores)
    yield _price()

    yield "## Windows"
    yield (
        "Luong's second idea: a word's partner is often near the same place, so why look at the whole source? "
        f"*local-m* (monotonic) takes the keys at most D places from the query's own place; here D = {WINDOW}. "
        "*local-p* (predictive) has a small network say for each query where to look, p, and multiplies the weights "
        "by a bell curve around p, exp(−(j − p)² / (2σ²)) with σ = D/2."
    )
    yield (
        "We let texts look at themselves: queries and keys are the vectors that go into MiniLM's first layer, which "
        f"contain the place of a token. Texts are cut to {TOKENS} tokens. The network for p is not trained here, but "
        "fitted by least squares on eight of the nine fables; the ninth is shown."
    )
    layers = {
        align: fastattn.LuongAttention(384, 384, "dot", align, window=WINDOW, rng=0)
        for align in ("global", "local-m", "local-p")
    }
    *others, last = fables()
    _fit_positions(layers["local-p"], [text for fable in others for text in _texts(fable)])
    shown = _texts(last)[0]
    maps = {align: layer(shown[None], shown[None], return_weights=True)[1][0] for align, layer in layers.items()}
    yield _picture(maps)
    own = np.arange(TOKENS)
    distance = np.abs(own[:, None] - own)
    predicted = _predicted(layers["local-p"], shown)
    error = float(np.abs(predicted - own).mean())
    sums = maps["local-p"].sum(axis=1)
    yield claim(
        not maps["local-m"][distance > WINDOW].any() and np.allclose(maps["local-m"].sum(axis=1), 1, atol=1e-5),
        "In *local-m* nothing outside the window has weight, and the weights inside add up to 1.",
    )
    yield claim(
        error < WINDOW and not maps["local-p"][np.abs(own - predicted[:, None]) > WINDOW + 1e-3].any(),
        f"In *local-p* the predicted places are {error:.1f} tokens from the true ones on average: MiniLM's vectors say "
        "where a token stands, and a linear map is enough to read it. The weights do not add up to 1 but to between "
        f"{sums.min():.2f} and {sums.max():.2f}, because the bell curve comes after the softmax. The paper has it so, "
        "and so have we.",
    )
    broken = shown.copy()
    broken[TOKENS // 2 :] = np.nan
    early = slice(0, TOKENS // 2 - WINDOW)
    whole, part = (layers["local-m"](shown[None, early], keys[None]) for keys in (shown, broken))
    yield claim(
        np.array_equal(whole, part),
        "What is outside a window is not computed at all: if we write NaN there, no bit of the result changes. So a "
        "query costs the same in a source of any length:",
    )
    yield _cost_of_windows()
    yield "Windows have come back in today's models of long texts, as *sliding windows*."


def softmax_rows(scores: Array) -> tuple[Array, Array]:
    """The maxima of rows, and their softmax."""
    greatest = scores.max(axis=1, keepdims=True)
    weights = np.exp(scores - greatest)
    return greatest, weights / weights.sum(axis=1, keepdims=True)


def _price() -> Table:
    """Time and memory of both scores, with NumPy as they stand and with fastattn."""
    length, features = 128, 256
    query, key, value = np.random.default_rng(0).standard_normal((3, length, features), dtype=np.float32)
    weight = query[0].copy()
    ways: dict[str, Callable[[], Any]] = {
        "additive, NumPy as it stands": lambda: softmax_rows(additive_scores(query, key, weight))[1] @ value,
        "additive, fastattn": lambda: fastattn.additive_attention(query, key, value, weight),
        "dot, fastattn": lambda: fastattn.attention(query, key, value),
    }
    rows = []
    for name, way in ways.items():
        way()
        tracemalloc.start()
        way()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        rows.append([name, f"{peak / (1 << 20):.1f} MiB", duration(_median_time(way))])
    return Table([f"{length} queries and keys, {features} features", "memory", "time"], rows)


def _cost_of_windows() -> Table:
    """Time of local-m and of global attention in sources of several lengths."""
    rng = np.random.default_rng(0)
    query = rng.standard_normal((1, 256, 64), dtype=np.float32)
    rows = []
    for length in (1024, 4096, 16384):
        key = rng.standard_normal((1, length, 64), dtype=np.float32)
        times = []
        for align in ("global", "local-m"):
            layer = fastattn.LuongAttention(64, 64, "dot", align, rng=0)
            times.append(_median_time(partial(layer, query, key)))
        rows.append([str(length), *map(duration, times)])
    return Table(["256 queries, keys", "global", "local-m, D = 10"], rows)


def _median_time(call: Callable[[], Any]) -> float:
    """The median of some runs, after one that does not count."""
    times = []
    for _ in range(6):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _texts(fable: tuple[str, ...]) -> list[Array]:
    """The tokens from each sentence of a fable on, where there are enough: what goes into the first layer."""
    texts = []
    for start in range(len(fable)):
        ids = model().encode(" ".join(fable[start:])).ids[:-1]
        if len(ids) >= TOKENS:
            vectors = hidden_after(0, ids[:TOKENS])
            texts.append(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True) * np.float32(LENGTH))
    return texts


def _fit_positions(layer: Any, texts: list[Array]) -> None:
    """Set local-p's network so that it predicts the place of a token from its vector, by ridge regression."""
    small = 1e-2  # tanh(x) is x for small x, so that the network is linear
    places = (np.arange(TOKENS) + 0.5) / TOKENS
    wanted = np.tile(np.log(places / (1 - places)), len(texts))  # what the sigmoid makes the place of
    x = np.concatenate(texts).astype(np.float64)
    coefficients = np.linalg.solve(x.T @ x + 0.1 * np.eye(x.shape[1]), x.T @ wanted)
    layer.position_weight = np.eye(x.shape[1], dtype=np.float32) * np.float32(small)
    layer.position_vector = (coefficients / small).astype(np.float32)


def _predicted(layer: Any, text: Array) -> Array:
    """Luong's p = S · sigmoid(v · tanh(W q)) for each query."""
    inner = np.tanh(text @ layer.position_weight.T) @ layer.position_vector
    places: Array = len(text) / (1 + np.exp(-inner))
    return places


def _picture(maps: dict[str, Array]) -> Picture:
    def lines(style: Style) -> list[str]:
        drawn: list[str] = []
        shown = 24  # as many as fit a terminal
        for align, weights in maps.items():
            names = [str(place) for place in range(shown)]
            drawn += [style.bold(f"  {align}, the first {shown} tokens")]
            drawn += heat_map(names, weights[:shown, :shown].tolist(), style, columns=names) or []
            drawn.append("")
        return [*drawn, *legend(style)]

    def draw(figure: Any) -> None:
        from fastattn import plot

        top = max(float(weights.max()) for weights in maps.values())
        for axes, (align, weights) in zip(figure.subplots(1, 3), maps.items(), strict=True):
            plot.heatmap(weights, vmax=top, colorbar=align == "local-p", ax=axes)
            axes.set_title(align, fontsize=11)

    caption = (
        "Luong's alignments on one fable that looks at itself. Global: every token may look everywhere. local-m: at a "
        "window around its own place. local-p: around the place that it predicts, with a bell curve."
    )
    return Picture("windows", caption, lines, draw, (10.0, 3.4))
