"""The page "cross-attention" of the guide."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fastattn
from fastattn.demo.minilm import LAYERS, Floats
from fastattn.demo.words import Word, join_pieces
from fastattn.guide.data import hidden_after, model
from fastattn.guide.page import Listing, Step, Table, claim
from fastattn.guide.pictures import weight_map

#: Pairs of sentences that say the same, and which words are partners.
PAIRS = (
    (
        "The cat chased the mouse through the garden.",
        "In the garden, a mouse was pursued by a kitten.",
        "cat:kitten chased:pursued mouse:mouse garden:garden",
    ),
    (
        "The doctor gave the child a bitter medicine.",
        "A sour drug was handed to the kid by the physician.",
        "doctor:physician gave:handed child:kid bitter:sour medicine:drug",
    ),
    (
        "Yesterday the company sold its old factory.",
        "The firm got rid of an ageing plant a day ago.",
        "Yesterday:ago company:firm sold:rid old:ageing factory:plant",
    ),
    (
        "He bought a big car for his wife.",
        "For his spouse, the man purchased a large automobile.",
        "He:man bought:purchased big:large car:automobile wife:spouse",
    ),
    (
        "The ship sank near the coast at night.",
        "At midnight, close to the shore, the vessel went down.",
        "ship:vessel sank:down near:close coast:shore night:midnight",
    ),
    (
        "Scientists found water on a distant planet.",
        "On a faraway world, researchers discovered ice.",
        "Scientists:researchers found:discovered water:ice distant:faraway planet:world",
    ),
)
SHOWN = 3
SCALE = 12.0


def cross_attention(query: Floats, key: Floats, value: Floats) -> tuple[Floats, Floats]:
    """Queries from one sentence, keys and values from another; the lengths need not be the same."""
    out, weights = fastattn.attention(query, key, value, scale=SCALE, return_weights=True)
    return out, weights


def steps() -> Iterator[Step]:
    """Align six pairs of sentences, by the vectors of each layer; count what is right."""
    yield (
        "In *cross-attention* the queries come from one sequence, the keys and values from another. This is the oldest "
        "kind: the decoder of a translator asks, and the source sentence answers. What makes an alignment hard is "
        "that the order differs, so that position is no guide."
    )
    yield Listing.of(cross_attention)
    yield (
        "MiniLM knows one language only, so we align sentences that say the same in other words. Queries and keys "
        "are the vectors of their words, of length 1, so that a score is a cosine; the scale is "
        f"{SCALE:g}. No matrix is learned for this here: a real decoder has its Wq and Wk, and would do better."
    )
    one, other, _ = PAIRS[SHOWN]
    rows, queries = word_vectors(one, 0)
    columns, keys = word_vectors(other, 0)
    out, weights = cross_attention(queries, keys, keys)
    yield weight_map(
        "cross-attention",
        "Rows look, columns are looked at. The partners are found, though the second sentence has another order and "
        "almost no word of the first.",
        [word.text for word in rows],
        [word.text for word in columns],
        weights,
        size=(6.4, 4.0),
    )
    same = np.abs(out - weights @ keys).max()
    yield claim(
        out.shape == queries.shape and same < 1e-5,
        f"{len(rows)} queries met {len(columns)} keys, so the weights are a matrix of {len(rows)} × {len(columns)}, "
        "and out come as many vectors as there were queries: the first sentence, said with the vectors of the second.",
    )

    yield "## How often is it right?"
    total = sum(len(partners.split()) for _, _, partners in PAIRS)
    yield (
        f"In {len(PAIRS)} pairs of sentences, {total} words have a partner, which we wrote down by hand. A word is "
        "right if its partner gets the greatest weight among the words. The layers give other vectors: at 0 a word's "
        "vector knows nothing of its sentence, after the last layer it does. To compare with: the word at the same "
        "place, and chance."
    )
    hits = {layer: sum(_hits(pair, layer) for pair in PAIRS) for layer in range(LAYERS + 1)}
    place = sum(_hits_by_place(pair) for pair in PAIRS)
    chance = sum(len(partners.split()) / len(_candidates(text)) for _, text, partners in PAIRS)
    yield Table(
        ["keys and queries", f"right, of {total}"],
        [
            *(
                ["word vectors, no layer" if layer == 0 else f"after layer {layer - 1}", str(count)]
                for layer, count in hits.items()
            ),
            ["the word at the same place", str(place)],
            ["chance", f"{chance:.1f}"],
        ],
    )
    yield claim(
        min(hits.values()) > 0.7 * total and place < 0.2 * total,
        f"Attention finds between {min(hits.values())} and {max(hits.values())} of the {total} partners, where the "
        f"place finds {place} and chance about {chance:.0f}. (The pairs were chosen to be out of order.)",
    )
    yield claim(
        hits[LAYERS] <= hits[0],
        f"What we did not expect: the context brings nothing here. The bare word vectors find {hits[0]}, those after "
        f"the last layer {hits[LAYERS]}. For synonyms the word itself is the best guide, and MiniLM's last layer was "
        "trained to make one vector of the sentence, not to keep its words apart.",
    )
    yield (
        "What is done with the answer is the decoder's business: Bahdanau's and Luong's decoders write the next word "
        "from it, see [page 7](bahdanau-luong.md); each layer of the Transformer's decoder (Vaswani et al. 2017) adds "
        "it to its own vectors."
    )


@cache
def word_vectors(text: str, layer: int) -> tuple[list[Word], Floats]:
    """The words of a text, and a vector of length 1 for each, after so many layers; 0 is the bare word."""
    encoding = model().encode(text)
    words = [word for word in join_pieces(text, encoding) if word.text not in ("[CLS]", "[SEP]")]
    pieces = model().words[encoding.ids] if layer == 0 else hidden_after(layer, encoding.ids)
    vectors = np.stack([pieces[word.pieces.start : word.pieces.stop].mean(axis=0) for word in words])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return words, vectors


def _partners(rows: Sequence[Word], columns: Sequence[Word], partners: str) -> list[tuple[int, int]]:
    """The places of partners in the two sentences."""
    mine, theirs = ([word.text for word in words] for words in (rows, columns))
    return [(mine.index(one), theirs.index(other)) for one, other in (each.split(":") for each in partners.split())]


def _candidates(text: str) -> NDArray[np.intp]:
    """The places of words that are no punctuation."""
    return np.flatnonzero([not word.is_mark for word in word_vectors(text, 0)[0]])


def _hits(pair: tuple[str, str, str], layer: int) -> int:
    """How many words give their partner the greatest weight."""
    (rows, queries), (columns, keys) = (word_vectors(text, layer) for text in pair[:2])
    _, weights = cross_attention(queries, keys, keys)
    return aligned(weights, rows, columns, pair[2])


def aligned(weights: NDArray[Any], rows: Sequence[Word], columns: Sequence[Word], partners: str) -> int:
    """How many words give their partner the greatest weight among the words that are no punctuation."""
    candidates = np.flatnonzero([not word.is_mark for word in columns])
    best = candidates[weights[:, candidates].argmax(axis=1)]
    return sum(best[mine] == theirs for mine, theirs in _partners(rows, columns, partners))


def _hits_by_place(pair: tuple[str, str, str]) -> int:
    """How many partners stand at the same place, as a share of the sentence."""
    rows, columns = (word_vectors(text, 0)[0] for text in pair[:2])
    mine, theirs = (_candidates(text) for text in pair[:2])
    stretch = (len(theirs) - 1) / (len(mine) - 1)
    return sum(
        theirs[round(int(np.searchsorted(mine, here)) * stretch)] == there
        for here, there in _partners(rows, columns, pair[2])
    )
