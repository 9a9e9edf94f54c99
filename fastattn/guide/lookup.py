"""The page "lookup" of the guide."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np

import fastattn
from fastattn.demo.minilm import Floats
from fastattn.guide.data import model
from fastattn.guide.page import Listing, Step, Table, claim
from fastattn.guide.pictures import weight_map

LEGS = {"cat": 4, "dog": 4, "sparrow": 2, "salmon": 0, "bee": 6, "spider": 8}
#: What is asked for, with its real number of legs.
ASKED = {"kitten": 4, "goldfish": 0, "wasp": 6, "tarantula": 8, "robin": 2, "wolf": 4}
SCALES = (0, 1, 5, 10, 20, 50)


def soft_lookup(query: Floats, key: Floats, value: Floats, scale: float) -> tuple[Floats, Floats]:
    """Look up each query: a mean of all values, in which like keys count more."""
    score = query @ key.T * scale  # how alike: one number for each query and key
    weight = np.exp(score - score.max(axis=1, keepdims=True))
    weight /= weight.sum(axis=1, keepdims=True)  # now positive, and 1 in sum for each query
    return weight @ value, weight


def steps() -> Iterator[Step]:
    """Ask a dictionary for words that it does not have."""
    yield "A Python dictionary maps keys to values, and is strict: the query must *be* a key."
    yield Listing(
        ">>> legs = " + json.dumps(LEGS) + '\n>>> legs["cat"]\n4\n>>> legs["kitten"]\nKeyError: \'kitten\'', "pycon"
    )
    yield (
        "Attention is a dictionary that never fails. Query and keys are vectors. The query is compared with *every* "
        "key, by a dot product. The softmax turns these scores into weights, which are positive and add up to 1. The "
        "answer is the mean of all values under these weights. In NumPy:"
    )
    yield Listing.of(soft_lookup)
    yield (
        "Let the vectors be MiniLM's, for single words. The six keys are the words of the dictionary, the six queries "
        "are others. The values are numbers of legs. The scale of the scores is 20 here."
    )
    key, query = model().embed(list(LEGS)), model().embed(list(ASKED))
    value = np.array(list(LEGS.values()), np.float32)[:, None]
    answer, weight = soft_lookup(query, key, value, 20.0)
    yield weight_map(
        "lookup",
        "Which key answers which query. Rows are queries, columns are keys, and each row adds up to 1.",
        list(ASKED),
        list(LEGS),
        weight,
        size=(6.0, 3.2),
    )
    best = [list(LEGS)[index] for index in weight.argmax(axis=1)]
    between = [f"the {name}" for name, found in zip(ASKED, answer[:, 0], strict=True) if abs(found - ASKED[name]) > 0.5]
    hits = sum(LEGS[name] == legs for name, legs in zip(best, ASKED.values(), strict=True))
    yield Table(
        ["query", "nearest key", "legs found", "legs it has"],
        [
            [name, near, f"{found:.1f}", str(ASKED[name])]
            for name, near, found in zip(ASKED, best, answer[:, 0].tolist(), strict=True)
        ],
    )
    yield claim(
        hits == len(ASKED),
        f"For {hits} of {len(ASKED)} queries the nearest key has the right number of legs, though none of the words "
        f"is in the dictionary. Where several keys are about as near as one another, the answer lies between their "
        f"values, as for {' and '.join(between)}. That is the price of being soft.",
    )
    yield "## From the mean to the dictionary"
    yield (
        "The scale of the scores decides how soft the lookup is. At 0 all keys count alike, and every answer is the "
        "mean of all values. The larger it is, the more the nearest key takes all:"
    )
    answers = [soft_lookup(query, key, value, float(scale))[0][:, 0] for scale in SCALES]
    yield Table(
        ["scale", *ASKED],
        [
            [str(scale), *(f"{each:.1f}" for each in found.tolist())]
            for scale, found in zip(SCALES, answers, strict=True)
        ],
    )
    ours, ours_weight = fastattn.attention(query, key, value, scale=20.0, return_weights=True)
    hard = value[(query @ key.T).argmax(axis=1), 0]
    yield claim(
        np.abs(answers[0] - value.mean()).max() < 1e-5
        and np.abs(soft_lookup(query, key, value, 1e4)[0][:, 0] - hard).max() < 1e-5,
        "At a scale of 10000, the answers are those of a search for the nearest key. Between the two, the answer "
        "changes smoothly with the query, the keys and the values. So a network can *learn* all three by gradients, "
        "which it could not with a strict dictionary.",
    )
    yield claim(
        max(np.abs(ours - answer).max(), np.abs(ours_weight - weight).max()) < 1e-5,
        "`fastattn.attention(query, key, value, scale=20.0)` gives the same answers, to five digits. It is the same "
        "formula; only, it never makes the matrix of weights unless asked.",
    )
