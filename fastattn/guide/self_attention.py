"""The page "self-attention" of the guide."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fastattn
from fastattn.console.terminal import Style
from fastattn.demo.cli import SHOWCASE, TEXT, WORD, picture
from fastattn.demo.minilm import HEADS, Floats, Layer
from fastattn.demo.words import Look, Word, find_word, in_words, join_pieces
from fastattn.guide.data import hidden_after, model, word_weights
from fastattn.guide.page import Listing, Picture, Step, Table, claim

#: Sentences with an "it", two nouns that it could be, and which one it is.
PUZZLES = (
    ("The animal didn't cross the street because it was too tired.", "animal", "street", "animal"),
    ("The animal didn't cross the street because it was too wide.", "animal", "street", "street"),
    ("The trophy didn't fit into the suitcase because it was too big.", "trophy", "suitcase", "trophy"),
    ("The trophy didn't fit into the suitcase because it was too small.", "trophy", "suitcase", "suitcase"),
    ("The dog chased the cat until it was caught.", "dog", "cat", "cat"),
    ("The dog chased the cat until it was hungry.", "dog", "cat", "dog"),
)


def self_attention(x: Floats, layer: Layer, head: int) -> tuple[Floats, Floats]:
    """One head: x is [token][384], and query, key and value are [token][32], all made of it."""
    matrices = layer.qkv.reshape(3, HEADS, -1, x.shape[1])[:, head]  # Wq, Wk, Wv of this head
    biases = layer.qkv_bias.reshape(3, HEADS, -1)[:, head]
    query, key, value = (x @ matrix.T + bias for matrix, bias in zip(matrices, biases, strict=True))
    out, weights = fastattn.attention(query, key, value, return_weights=True)
    return out, weights


def steps() -> Iterator[Step]:
    """Take one head apart, and see where "it" looks, there and in other sentences."""
    yield (
        "In *self-attention* the queries, keys and values all come from the same sentence. Each token's vector x is "
        "multiplied by three learned matrices: Wq makes its query (what it looks for), Wk its key (what it is found "
        "by), Wv its value (what it passes on). So every token asks all others a question, and is answered by a mean "
        "of their values."
    )
    yield Listing.of(self_attention)

    encoding = model().encode(TEXT)
    words = join_pieces(TEXT, encoding)
    pieces = model().attention_weights(encoding.ids)
    weights = in_words(pieces, words)
    (layer, head), _ = SHOWCASE
    x = hidden_after(layer, encoding.ids)
    out, by_hand = self_attention(x, model().layers[layer], head)
    yield claim(
        np.abs(by_hand - pieces[layer, head]).max() < 1e-5,
        f"This is all there is to it. For layer {layer}, head {head} of MiniLM, it gives the weights that the whole "
        "model computes, to five digits.",
    )
    yield f'What does "{WORD}" ask in this sentence? Two of the 72 heads, and all weights of the first:'
    at = find_word(words, WORD)
    looks = [Look(*place, at, int(weights[place][at].argmax()), float(weights[place][at].max())) for place in SHOWCASE]
    yield _picture(words, weights, looks)
    yield claim(
        all(words[look.target].text == "animal" and look.weight > 0.6 for look in looks),
        f'In both, "{WORD}" looks at "animal", with weights of {looks[0].weight:.2f} and {looks[1].weight:.2f}. Nobody '
        "told MiniLM what a pronoun is. It was trained on texts alone, and this is what turned out to be useful.",
    )

    yield "## Does it understand?"
    yield (
        "One sentence proves little. Here are others, in pairs: a single word decides what *it* is. The numbers are "
        'the weights from "it" to the two nouns, in the two heads.'
    )
    rows: list[list[str]] = []
    chosen: list[str] = []
    read = word_weights([text for text, *_ in PUZZLES])
    for (text, one, other, answer), (its_words, its_weights) in zip(PUZZLES, read, strict=True):
        row = _of_it(its_words, its_weights)
        seen = [(row[place, one], row[place, other]) for place in SHOWCASE]
        first, second = np.sum(seen, axis=0)
        chosen.append(one if first > second else other)
        rows.append([text, answer, *(f"{one} {a:.2f}, {other} {b:.2f}" for a, b in seen)])
    heads = [f"layer {place[0]}, head {place[1]}" for place in SHOWCASE]
    yield Table(["sentence", "it is the", *heads], rows, left=True)
    right = sum(name == puzzle[-1] for name, puzzle in zip(chosen, PUZZLES, strict=True))
    yield claim(
        chosen[::2] == chosen[1::2],
        f"In each pair the two heads point at the same noun both times, so they are right in {right} of "
        f"{len(PUZZLES)} sentences. The last word moves the weights, but never far enough. These heads look for what "
        "*can* be meant; they do not reason about it. Attention weights show where information is taken from, not "
        "what is understood.",
    )

    yield "## Words without an order"
    rng = np.random.default_rng(0)
    order = rng.permutation(len(x))
    shuffled, _ = self_attention(x[order], model().layers[layer], head)
    yield claim(
        np.abs(shuffled - out[order]).max() < 1e-5,
        "Attention has no notion of order. If we shuffle the tokens' vectors, the same answers come out, in shuffled "
        "order (to five digits). All that the model knows of order it got at the start, where a vector for the place "
        "is added to each token's.",
    )


def _of_it(words: Sequence[Word], weights: NDArray[np.float64]) -> dict[tuple[tuple[int, int], str], float]:
    """The weights from "it" to each word in the two heads."""
    row = find_word(words, WORD)
    return {
        (place, word.text): float(weights[place][row, column])
        for place in SHOWCASE
        for column, word in enumerate(words)
    }


def _picture(words: Sequence[Word], weights: NDArray[np.float64], looks: Sequence[Look]) -> Picture:
    labels = [word.text for word in words]
    look = looks[0]

    def lines(style: Style) -> list[str]:
        return picture(words, weights, looks, style)

    def draw(figure: Any) -> None:
        from fastattn import plot

        left, right = figure.subplots(1, 2, width_ratios=(0.8, 1.2))
        plot.links(weights[look.layer, look.head], labels, labels, query=look.word, ax=left)
        plot.heatmap(weights[look.layer, look.head], labels, labels, ax=right)

    caption = f"Layer {look.layer}, head {look.head} of MiniLM. The lines are as dark and as thick as the weights."
    return Picture("self-attention", caption, lines, draw, (9.0, 4.2))
