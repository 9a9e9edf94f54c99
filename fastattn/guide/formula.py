"""The page "formula" of the guide."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fastattn
from fastattn.console.terminal import Style, bar_table
from fastattn.demo.minilm import HEADS, LAYERS, Attend
from fastattn.guide.data import model, sentences
from fastattn.guide.page import Listing, Picture, Step, Table, claim
from fastattn.guide.pictures import draw_curves

Array = NDArray[Any]

DIMENSIONS = (1, 4, 16, 64, 256, 1024)
KEYS, QUERIES = 512, 512


def attention(query: Array, key: Array, value: Array) -> Array:
    """Scaled dot-product attention, as in Vaswani et al. (2017), equation 1."""
    score = query @ key.T / math.sqrt(query.shape[-1])
    out: Array = softmax(score) @ value
    return out


def softmax(score: Array) -> Array:
    """exp(score), divided by its sum over the keys; subtracting the maximum changes nothing but avoids overflow."""
    weight = np.exp(score - score.max(axis=-1, keepdims=True))
    normed: Array = weight / weight.sum(axis=-1, keepdims=True)
    return normed


def entropy(weight: Array) -> float:
    """How spread out weights are: log(keys) if all are equal, 0 if one key has all. In nats, a mean over queries."""
    return float(-(weight * np.log(np.maximum(weight, 1e-30))).sum(axis=-1).mean())


def gradient(weight: Array) -> float:
    """How much the weights still move with the scores: Σ w (1 − w), the trace of softmax's Jacobian."""
    return float((weight * (1 - weight)).sum(axis=-1).mean())


def steps() -> Iterator[Step]:
    """Vary the dimension, with and without the root; then take it away from a trained model."""
    yield "Attention with L queries, L keys and L values, of d dimensions each, is one line of mathematics:"
    yield Listing("Attention(Q, K, V) = softmax(Q Kᵀ / √d) V")
    yield (
        "Q Kᵀ holds a score for each query and key, the softmax makes weights of each row, and the product with V is "
        "a mean of values for each query. The same in NumPy:"
    )
    yield Listing.of(attention, softmax)
    rng = np.random.default_rng(0)
    query, key, value = rng.standard_normal((3, 64, 32), dtype=np.float32)
    difference = np.abs(attention(query, key, value) - fastattn.attention(query, key, value)).max()
    yield claim(difference < 1e-6, "On random numbers it differs from `fastattn.attention` by less than 0.000001.")

    yield "## What the scores look like without the root"
    yield (
        "A score q·k is a sum of d products. If the elements of q and k are independent, with mean 0 and variance 1, "
        "each product has variance 1, and their sum has variance d: the more dimensions, the larger the scores. So "
        f"dividing by √d brings the variance back to 1. Measured, on {QUERIES} random queries and {KEYS} keys:"
    )
    measured = {"variance": [], "entropy": [], "gradient": [], "entropy scaled": [], "gradient scaled": []}  # type: dict[str, list[float]]
    for d in DIMENSIONS:
        score = rng.standard_normal((QUERIES, d)) @ rng.standard_normal((KEYS, d)).T
        raw, scaled = softmax(score), softmax(score / math.sqrt(d))
        measured["variance"].append(float(score.var()))
        measured["entropy"].append(entropy(raw))
        measured["gradient"].append(gradient(raw))
        measured["entropy scaled"].append(entropy(scaled))
        measured["gradient scaled"].append(gradient(scaled))
    yield Table(
        ["d", "variance of q·k", "entropy", "with 1/√d", "gradient", "with 1/√d"],
        [
            [
                str(d),
                *(f"{measured[name][at]:.3g}" for name in ("variance",)),
                *(f"{measured[name][at]:.2f}" for name in ("entropy", "entropy scaled", "gradient", "gradient scaled")),
            ]
            for at, d in enumerate(DIMENSIONS)
        ],
    )
    yield _picture(measured)
    ratios = np.array(measured["variance"]) / np.array(DIMENSIONS)
    yield claim(
        np.abs(ratios - 1).max() < 0.2,
        f"The variance is d: their ratio is between {ratios.min():.2f} and {ratios.max():.2f}.",
    )
    yield claim(
        measured["gradient"][-1] < 0.15 < 0.9 < min(measured["gradient scaled"]),
        f"Without the root the softmax *saturates*: at d = {DIMENSIONS[-1]} the entropy falls from log {KEYS} = "
        f"{math.log(KEYS):.2f}, which is all keys alike, to {measured['entropy'][-1]:.2f}: one key takes nearly "
        f"everything. The derivatives of its weights go the same way: their sum w(1 − w) is "
        f"{measured['gradient'][-1]:.2f} instead of {measured['gradient scaled'][-1]:.2f}. A network that starts "
        "there learns slowly, whatever it should attend to. With the root neither depends on d.",
    )

    yield "## In a trained model"
    yield (
        "Trained queries and keys are not random, and training finds the sizes that it needs. But it finds them with "
        "the root in its place. We take it away, and have MiniLM, whose heads have d = 32, read Aesop's fables again:"
    )
    spread: dict[str, float] = {}
    vectors: list[Array] = []
    for name, scale in (("with 1/√d", None), ("without", 1.0)):
        seen: list[float] = []
        vectors.append(model().embed(sentences(), _recording(seen, scale)))
        spread[name] = float(np.mean(seen))
    alike = float((vectors[0] * vectors[1]).sum(axis=1).mean())
    yield claim(
        spread["without"] < 0.5 * spread["with 1/√d"] and alike < 0.9,
        f"The entropy of the weights of its {LAYERS * HEADS} heads falls from {spread['with 1/√d']:.2f} to "
        f"{spread['without']:.2f}, and its sentence vectors turn away from what they were: the cosine between old and "
        f"new is {alike:.2f} on average. The root is a part of the model like any weight: one that has been trained "
        "with it must be run with it.",
    )


def _recording(seen: list[float], scale: float | None) -> Attend:
    """Attention that notes the entropy of its weights."""

    def attend(query: Array, key: Array, value: Array, attn_mask: Any) -> Array:
        out, weights = fastattn.attention(query, key, value, attn_mask, scale=scale, return_weights=True)
        seen.append(entropy(weights))
        result: Array = out
        return result

    return attend


def _picture(measured: dict[str, list[float]]) -> Picture:
    panels = [
        ("variance of q·k", {"measured": measured["variance"]}, "xy"),
        ("entropy of the weights", {"without": measured["entropy"], "with 1/√d": measured["entropy scaled"]}, "x"),
        ("sum of w(1 − w)", {"without": measured["gradient"], "with 1/√d": measured["gradient scaled"]}, "x"),
    ]

    def lines(style: Style) -> list[str]:
        labels = [f"{d:4}" for d in DIMENSIONS]
        columns = [(f"w(1 − w), {name}", heights) for name, heights in panels[2][1].items()]
        return bar_table(labels, columns, style, top=1.0)

    def draw(figure: Any) -> None:
        for axes, (title, series, log) in zip(figure.subplots(1, 3), panels, strict=True):
            draw_curves(axes, DIMENSIONS, series, labels=("d", title), log=log)
            axes.set_xticks(DIMENSIONS[::1], [str(d) for d in DIMENSIONS], fontsize=8)
            if len(series) > 1:
                axes.legend(frameon=False, fontsize=8)

    caption = (
        "Without the root, scores grow with the dimension d, the softmax saturates, and its gradients vanish. "
        "With 1/√d nothing changes with d."
    )
    return Picture("formula", caption, lines, draw, (9.0, 2.9))
