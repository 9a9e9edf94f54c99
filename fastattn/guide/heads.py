"""Heads: what 72 of them look at

Does a head have a job? We measure all 72 of MiniLM on Aesop's fables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastattn.demo.minilm import HEADS, LAYERS
from fastattn.terminal import Style, heat_map, legend
from fastattn.demo.words import Word, in_words, join_pieces
from fastattn.guide.data import model, sentences
from fastattn.guide.page import Picture, Step, Table, claim
from fastattn.guide.pictures import MAP

Pairs = NDArray[np.bool_]  # [who looks][at what], over the words of a sentence
Floats = NDArray[np.float64]

DETERMINERS = frozenset("a an the some his her its their my your this that those each".split())
PRONOUNS = frozenset("he she him her his it they them their".split())
#: Who acts in the fables.
ACTORS = frozenset("crow fox stork hare tortoise dog mouse grasshopper ants sun wind traveller man".split())
#: Verbs of the fables that a determiner and an object follow somewhere, as in "found a Pitcher".
VERBS = frozenset(
    "saw set gave found reached reach quench throw complete unclasped won wins enjoyed enjoy caught have had show "
    "lapped invited took spent spend collect wrapped hid opened drying stopped".split()
)
FUNCTION_WORDS = DETERMINERS | PRONOUNS | frozenset("of and to in was is as with for but on at i you so".split())


@dataclass(frozen=True)
class Relation:
    """Who might look at what, and what to compare it with.

    Attributes
    ----------
    name : str
    pairs : callable
        From the words of a sentence to the pairs of this relation.
    control : callable
        Likewise, to pairs that are like them but for the relation itself.
    against : str
        What the control is, in words.
    """

    name: str
    pairs: Callable[[Sequence[str]], Pairs]
    control: Callable[[Sequence[str]], Pairs]
    against: str


def distance(words: Sequence[str], steps: int) -> Pairs:
    """Pairs of words of which the second is `steps` further on."""
    return np.eye(len(words), k=steps, dtype=bool)


def among(words: Sequence[str], names: frozenset[str]) -> NDArray[np.bool_]:
    """Which words are of a kind."""
    return np.array([word in names for word in words])


def everything(words: Sequence[str]) -> Pairs:
    """Each word with each: a head that looks everywhere alike gives them 1 / words."""
    return np.ones((len(words), len(words)), bool)


def objects(words: Sequence[str]) -> Pairs:
    """A verb, and the word after the determiner that follows the verb."""
    after = np.append(among(words, DETERMINERS)[1:], False)
    return distance(words, 2) & (among(words, VERBS) & after)[:, None]


def nouns(words: Sequence[str]) -> Pairs:
    """A determiner, and the word after it."""
    return distance(words, 1) & among(words, DETERMINERS)[:, None]


def actors(words: Sequence[str]) -> Pairs:
    """A pronoun, and those who act in the fable."""
    return among(words, PRONOUNS)[:, None] & among(words, ACTORS)


def same_word(words: Sequence[str]) -> Pairs:
    """A word, and the same word elsewhere in the sentence; the, of, she and their like apart."""
    spelled = np.array(words)
    telling = np.array([word.isalpha() and word not in FUNCTION_WORDS for word in words])
    pairs: Pairs = (spelled[:, None] == spelled) & ~distance(words, 0) & telling[:, None]
    return pairs


def to(*names: str) -> Callable[[Sequence[str]], Pairs]:
    """Every word, and each of these."""

    def pairs(words: Sequence[str]) -> Pairs:
        return np.broadcast_to(among(words, frozenset(names)), (len(words), len(words)))

    return pairs


RELATIONS = (
    Relation("the word before", lambda words: distance(words, -1), everything, "any word"),
    Relation("the word after", lambda words: distance(words, 1), everything, "any word"),
    Relation("itself", lambda words: distance(words, 0), everything, "any word"),
    Relation("[CLS], at the start", to("[CLS]"), everything, "any word"),
    Relation("punctuation", to(*",.;:!?\"'"), everything, "any word"),
    Relation("the same word again", same_word, everything, "any word"),
    Relation(
        "determiner to noun", nouns, lambda words: distance(words, 1) & ~nouns(words), "1 word on, elsewhere"
    ),
    Relation("verb to object", objects, lambda words: distance(words, 2) & ~objects(words), "2 words on, elsewhere"),
    Relation(
        "pronoun to an actor",
        actors,
        lambda words: ~among(words, PRONOUNS)[:, None] & among(words, ACTORS) & ~distance(words, 0),
        "same, other words",
    ),
)
#: Those that are drawn.
DRAWN = ("the word before", "the word after", "[CLS], at the start", "the same word again", "verb to object",
         "pronoun to an actor")  # fmt: skip


def mean_weights(relation: Callable[[Sequence[str]], Pairs], texts: Sequence[tuple[list[str], Floats]]) -> tuple[Floats, int]:
    """Mean weight of the pairs in each head, [layer][head], and the number of pairs."""
    total, count = np.zeros((LAYERS, HEADS)), 0
    for words, weights in texts:
        pairs = relation(words).copy()
        pairs[[0, -1]] = False  # [CLS] and [SEP] look, too, but are no words
        total += (weights * pairs).sum(axis=(-2, -1))
        count += int(pairs.sum())
    return total / max(count, 1), count


def steps() -> Iterator[Step]:
    """Measure every head on every relation; choose on one half of the sentences, and test on the other."""
    yield (
        f"MiniLM has {LAYERS} layers of {HEADS} heads. Each head has its own queries, keys and values, and so its own "
        "weights: it may look for something else than its neighbours. The outputs of the heads of a layer are put "
        "side by side. Why have several? A softmax gives one mean. A layer with a single head could look for one kind "
        "of thing at a time."
    )
    yield (
        f"What do they look for? We let the model read the {len(sentences())} sentences of nine fables, and measure "
        "for each head how much weight goes from a word to another one in a given relation: to the word before it, to "
        "the same word elsewhere, from a verb to its object. The relations are found by simple rules, such as *a verb "
        "from a list, a determiner, a word*. The rules err now and then, which makes the figures too small rather than "
        "too large."
    )
    yield (
        "Two precautions. Each figure stands beside a *control*: weights between pairs that are like those of the "
        "relation in all but the relation itself. A head that always looks two words on is then not taken for one "
        "that knows about objects. And the best head of 72 looks good by luck alone. So it is chosen on every second "
        "sentence, and the figures are those of the *other* sentences."
    )
    texts = [_read(sentence) for sentence in sentences()]
    chosen, tested = texts[::2], texts[1::2]
    rows: list[list[str]] = []
    gains: dict[str, Floats] = {}
    means: dict[str, float] = {}
    found: dict[str, tuple[int, int, float, float]] = {}
    for relation in RELATIONS:
        score, control = (mean_weights(pairs, chosen)[0] for pairs in (relation.pairs, relation.control))
        layer, head = divmod(int((score - control).argmax()), HEADS)
        weight, count = mean_weights(relation.pairs, tested)
        other, _ = mean_weights(relation.control, tested)
        every, baseline = (mean_weights(pairs, texts)[0] for pairs in (relation.pairs, relation.control))
        gains[relation.name] = np.maximum(every - baseline, 0)
        means[relation.name] = float(weight.mean())
        found[relation.name] = (layer, head, float(weight[layer, head]), float(other[layer, head]))
        rows.append(
            [
                relation.name,
                f"{layer}, {head}",
                f"{weight[layer, head]:.2f}",
                f"{other[layer, head]:.2f}",
                relation.against,
                str(count),
            ]
        )
    yield Table(["who looks at what", "head", "weight", "control", "control is", "pairs"], rows, left=True)
    yield "(Heads are named by layer and number, both from 0, as in the demo.)"
    yield _picture({name: gains[name] for name in DRAWN})

    layer, head, weight, _ = found["the word before"]
    yield claim(
        weight > 0.9,
        f"*Position.* Layer {layer}, head {head} looks at the word before, and at nothing else: {weight:.0%} of its "
        f"weight. The word after has a head as well ({found['the word after'][2]:.0%}). In the first layers a word "
        "finds out what stands beside it.",
    )
    layer, head, weight, _ = found["[CLS], at the start"]
    average = means["[CLS], at the start"]
    yield claim(
        average > 0.25,
        f"*Rest.* A softmax must put its weight somewhere. {average:.0%} of the weight of all heads goes to the mark "
        f"[CLS], in layer {layer}, head {head} even {weight:.0%}. A head that finds nothing to look at in a sentence "
        "looks there. Such tokens are called attention sinks (Clark et al. 2019, Xiao et al. 2023).",
    )
    layer, head, weight, control = found["the same word again"]
    yield claim(
        weight > 4 * control,
        f"*Likeness.* Layer {layer}, head {head} finds the same word elsewhere in the sentence, with a weight of "
        f"{weight:.2f}, where any word gets {control:.2f}.",
    )
    grammar = [found[relation.name] for relation in RELATIONS[-3:]]
    yield claim(
        all(weight > 1.4 * control for _, _, weight, control in grammar),
        f"*Grammar.* Some heads know more than positions. From a verb to its object, layer {grammar[1][0]}, head "
        f"{grammar[1][1]} gives {grammar[1][2]:.2f}; to what stands two words on elsewhere, {grammar[1][3]:.2f}. "
        f"Pronouns look at animals and persons with a weight of {grammar[2][2]:.2f} in layer {grammar[2][0]}, head "
        f"{grammar[2][1]}; other words do with {grammar[2][3]:.2f}. These are tendencies, and no parser: nothing here "
        "is near 1.",
    )
    yield (
        "Clark et al. (2019) measured the 144 heads of BERT in the same spirit, on annotated text, and found such "
        "heads for many relations. That a head has a job does not mean that the model needs it: what a head passes on "
        "depends on its values too, and on what later layers make of it."
    )


def _read(sentence: str) -> tuple[list[str], Floats]:
    """The words of a sentence in lower case, and the weights between them in all heads."""
    encoding = model().encode(sentence)
    words: list[Word] = join_pieces(sentence, encoding)
    weights = in_words(model().attention_weights(encoding.ids), words)
    return [word.text if word.text in ("[CLS]", "[SEP]") else word.text.casefold() for word in words], weights


def _picture(gains: dict[str, Floats]) -> Picture:
    columns = [str(head) for head in range(HEADS)]

    def lines(style: Style) -> list[str]:
        drawn: list[str] = []
        for name, gain in gains.items():
            rows = [f"layer {layer}" for layer in range(LAYERS)]
            drawn += [style.bold(f"  {name}"), *(heat_map(rows, gain.tolist(), style, columns=columns) or []), ""]
        return [*drawn, *legend(style)]

    def draw(figure: Any) -> None:
        axes = figure.subplots(2, 3, sharex=True, sharey=True)
        for place, (name, gain) in zip(axes.flat, gains.items(), strict=True):
            image = place.imshow(gain, cmap=MAP, vmin=0, vmax=1)
            place.set_title(name, fontsize=9)
            place.set_xticks(range(0, HEADS, 2))
            place.set_yticks(range(LAYERS))
            place.tick_params(length=0, labelsize=8)
            place.spines[:].set_visible(False)
        figure.supxlabel("head", fontsize=9)
        figure.supylabel("layer", fontsize=9)
        figure.colorbar(image, ax=axes, label="weight above the control", shrink=0.8)

    caption = (
        "How much more weight each of the 72 heads gives to the pairs of a relation than to those of its control, on "
        "all sentences. Most heads have nothing to do with most relations; a few stand out."
    )
    return Picture("heads", caption, lines, draw, (9.0, 3.8))
