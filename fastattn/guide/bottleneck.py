"""The page "bottleneck" of the guide."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

import fastattn
from fastattn.demo.minilm import Floats
from fastattn.guide.data import fables, model, sentences
from fastattn.guide.page import Listing, Step, Table, claim
from fastattn.guide.pictures import curves

LENGTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
WORDS = 128  # that are read back at each length, or at least two texts


def in_one_vector(places: Floats, words: Floats) -> Floats:
    """Write L words, each marked with its place, into one vector of D numbers; then read each back at its place."""
    summary: Floats = (places * words).sum(axis=0)
    return places * summary


def by_attention(places: Floats, words: Floats) -> Floats:
    """Keep the L vectors, and read each back by asking for its place."""
    read: Floats = fastattn.attention(query=places, key=places, value=words)
    return read


def steps() -> Iterator[Step]:
    """Measure both ways of reading; then the same with a summary that was trained."""
    yield (
        "The first neural translators (Cho et al. 2014, Sutskever et al. 2014) read a sentence word by word and kept "
        "what they had read in *one vector*. From this vector, of a fixed size, another network wrote the "
        "translation. The longer the sentence, the more had to go into the same few numbers. How soon is it too much?"
    )
    yield "## Everything in one vector"
    yield (
        "Nothing needs to be trained to see it. Here is a simple way of writing words into one vector. Each word has "
        "a vector of 384 numbers; these are MiniLM's own. Each place in the text has a random pattern of +1 and −1. "
        "A word is multiplied by the pattern of its place, and all are added up. Multiplying the sum by a pattern "
        "again brings out the word of that place, under the noise of all the others. The second function keeps all "
        "the vectors instead, and asks for a place by attention:"
    )
    yield Listing.of(in_one_vector, by_attention)

    vectors = model().words - model().words.mean(axis=0)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    ids = np.concatenate([model().encode(sentence).ids[1:-1] for sentence in sentences()])
    rng = np.random.default_rng(0)
    right: dict[str, list[float]] = {"one vector": [], "attention": []}
    for length in LENGTHS:
        texts = ids[: max(2, WORDS // length) * length].reshape(-1, length)
        places = rng.choice(np.array([-1, 1], np.float32), size=(*texts.shape, vectors.shape[1]))
        for name, read in zip(right, (in_one_vector, by_attention), strict=True):
            found = np.concatenate([read(*operands) for operands in zip(places, vectors[texts], strict=True)])
            nearest = (found @ vectors.T).argmax(axis=1)
            right[name].append(float(np.mean(nearest == texts.ravel())))

    yield (
        f"How many words come back right? For each place we take the nearest of all {len(vectors)} word pieces that "
        "the model knows. The texts are pieces of Aesop's fables."
    )
    yield curves(
        "bottleneck",
        "Words that come back right, by the length of the text. One vector of 384 numbers holds a handful of words; "
        "attention, which keeps a vector for every word, loses none.",
        LENGTHS,
        {"one vector of 384 numbers": right["one vector"], "attention over all vectors": right["attention"]},
        labels=("words in the text", "share of words read back right"),
        log="x",
    )
    half = next(length for length, share in zip(LENGTHS, right["one vector"], strict=True) if share < 0.5)
    yield claim(
        min(right["one vector"][:3]) > 0.95 and min(right["attention"]) == 1 and right["one vector"][-1] < 0.05,
        f"Up to 4 words hardly any is lost. At {half} words more than half are wrong, and at {LENGTHS[-1]} words only "
        f"{right['one vector'][-1]:.0%} are right. Attention reads all of them at every length.",
    )
    yield (
        "This is no magic: attention did not compress better, it did not compress. It keeps L vectors where the "
        "summary keeps one, and pays for that in memory and time, which [page 8](tiles.md) is about. What it brings "
        "is a way of *choosing* from many vectors, one that a network can learn, because the choice is soft: see "
        "[page 2](lookup.md)."
    )
    yield "## A summary that was trained"
    yield (
        "Is a random pattern unfair, when a trained network would keep what matters? MiniLM's sentence vectors were "
        "trained to hold the meaning of a text in one vector. We have it read the first sentences of each fable as "
        "one text, and ask its vector which sentences were in it: the nearest ones, of all "
        f"{len(sentences())} in the nine fables."
    )
    kept, rows = [], []
    known = model().embed(sentences())
    for count in (1, 2, 3, 4):
        kept.append(_sentences_found(count, known))
        rows.append([str(count), f"{kept[-1]:.0%}"])
    yield Table(["sentences in the text", "of them among the nearest"], rows)
    yield claim(
        kept[0] == 1 and kept[-1] < 0.8,
        f"One sentence is always found again. Of {len(kept)}, {kept[-1]:.0%} are. Training decides what is lost, but a "
        "vector of a fixed size has to lose something: this is the bottleneck. Bahdanau, Cho and Bengio (2014) "
        "removed it for translation, by letting the decoder look back at all the words: see "
        "[page 7](bahdanau-luong.md).",
    )
    yield "## A network that learns with it, and without"
    yield (
        "The claim of 2014 was about networks that are trained. One of the [examples](../examples/README.md) is one: "
        "it learns to say the sounds of English words from their letters, with one vector between reader and speaker, "
        "and with Bahdanau's attention. A saved result, of three minutes of training: of words of up to six letters, "
        "one vector gets 62 % right and attention 68 %; of words of eleven letters and more 3 % and 22 %. The two "
        "curves, and where the network looked, are in [Letters to sounds](../examples/pronunciation.md)."
    )


def _sentences_found(count: int, known: Floats) -> float:
    """The share of sentences, with vectors `known`, that the vector of a text of `count` sentences is nearest to."""
    every = sentences()
    texts = [fable[:count] for fable in fables() if len(fable) >= count]
    shares = []
    for text, summary in zip(texts, model().embed([" ".join(text) for text in texts]), strict=True):
        nearest = np.argsort(-(known @ summary), kind="stable")[:count]
        shares.append(np.mean([every[index] in text for index in nearest]))
    return float(np.mean(shares))
