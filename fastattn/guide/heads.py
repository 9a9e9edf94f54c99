"""The page "heads" of the guide."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastattn.console.terminal import Style, heat_map, legend
from fastattn.demo.cli import SHOWCASE
from fastattn.demo.minilm import HEADS, LAYERS
from fastattn.demo.words import Word
from fastattn.guide.data import sentences, word_weights
from fastattn.guide.page import Picture, Step, Table, claim

Pairs = NDArray[np.bool_]  # [who looks][at what], over the words of a sentence
Floats = NDArray[np.float64]
Text = tuple[list[str], Floats]  # words, and weights between them, [layer][head][who looks][at what]


def kind(words: str) -> frozenset[str]:
    """A set of words, from a line of them."""
    return frozenset(words.split())


DETERMINERS = kind("a an the some his her its their my your this that those each")
PRONOUNS = kind("he she him her his it they them their")
#: Who acts in the fables.
ACTORS = kind("crow fox stork hare tortoise dog mouse grasshopper ants sun wind traveller man")
#: Verbs of the fables that a determiner and an object follow somewhere, as in "found a Pitcher".
VERBS = kind(
    "saw set gave did caused get see run let found reached reach quench throw complete unclasped won wins enjoyed "
    "enjoy caught have had show lapped invited took spent spend collect wrapped hid opened drying stopped"
)
FUNCTION_WORDS = DETERMINERS | PRONOUNS | kind("of and to in was is as with for but on at i you so")


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
    pairs: Pairs = distance(words, 2) & (among(words, VERBS) & after)[:, None]
    return pairs


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
    Relation("determiner to noun", nouns, lambda words: distance(words, 1) & ~nouns(words), "1 word on, elsewhere"),
    Relation("verb to object", objects, lambda words: distance(words, 2) & ~objects(words), "2 words on, elsewhere"),
    Relation(
        "pronoun to an actor",
        actors,
        lambda words: ~among(words, PRONOUNS)[:, None] & among(words, ACTORS) & ~distance(words, 0),
        "same, other words",
    ),
)
HEAD_OF_IT = ".".join(map(str, SHOWCASE[0]))  # page 4's
#: Those that are drawn.
DRAWN = ("the word before", "the word after", "[CLS], at the start", "the same word again", "verb to object",
         "pronoun to an actor")  # fmt: skip


def mean_weights(relation: Callable[[Sequence[str]], Pairs], texts: Sequence[Text]) -> tuple[Floats, int]:
    """Mean weight of the pairs in each head, [layer][head], and the number of pairs."""
    total, count = np.zeros((LAYERS, HEADS)), 0
    for words, weights in texts:
        pairs = relation(words).copy()
        pairs[[0, -1]] = False  # [CLS] and [SEP] look, too, but are no words
        total += weights[..., pairs].sum(axis=-1)
        count += int(pairs.sum())
    return total / max(count, 1), count


@dataclass(frozen=True)
class Found:
    """The heads that were chosen for a relation, and their weights on sentences that had no part in the choice."""

    heads: list[str]
    weight: float
    control: float
    against: str
    pairs: int


def cross_checked(relation: Relation, halves: Sequence[Sequence[Text]]) -> Found:
    """Choose the head with the most weight above the control on one half, and measure it on the other; both ways."""
    heads, weight, control, pairs, controls = [], 0.0, 0.0, 0, 0
    for chosen, tested in (halves, halves[::-1]):
        layer, head = divmod(int(gain(relation, chosen).argmax()), HEADS)
        heads.append(f"{layer}.{head}")
        found, count = mean_weights(relation.pairs, tested)
        other, others = mean_weights(relation.control, tested)
        weight, control = weight + count * found[layer, head], control + others * other[layer, head]
        pairs, controls = pairs + count, controls + others
    return Found(list(dict.fromkeys(heads)), weight / pairs, control / controls, relation.against, pairs)


def gain(relation: Relation, texts: Sequence[Text]) -> Floats:
    """How much more weight a pair of the relation has than one of the control, [layer][head]."""
    difference: Floats = mean_weights(relation.pairs, texts)[0] - mean_weights(relation.control, texts)[0]
    return difference


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
        "that knows about objects. And the best head of 72 looks good by luck alone. So it is chosen on one half of "
        "the sentences and measured on the *other*, both ways round. A weight is that of one pair, on average."
    )
    texts = [(_in_lower_case(words), weights) for words, weights in word_weights(sentences())]
    found = {relation.name: cross_checked(relation, (texts[::2], texts[1::2])) for relation in RELATIONS}
    rows = [
        [name, " / ".join(each.heads), f"{each.weight:.2f}", f"{each.control:.2f}", each.against, str(each.pairs)]
        for name, each in found.items()
    ]
    yield Table(["who looks at what", "head", "weight", "control", "control is", "pairs"], rows, left=True)
    yield (
        "A head is named by its layer and its number, both from 0, as in the demo. Two are named where the halves of "
        "the text did not choose the same."
    )
    yield _picture({relation.name: gain(relation, texts) for relation in RELATIONS if relation.name in DRAWN})

    before, after = found["the word before"], found["the word after"]
    yield claim(
        before.weight > 0.9 and after.weight > 0.5,
        f"*Position.* Head {before.heads[0]} looks at the word before, and at nothing else: {before.weight:.0%} of its "
        f"weight goes there. The word after has a head as well ({after.heads[0]}, {after.weight:.0%}). In the first "
        "layers a word finds out what stands beside it.",
    )
    rest = found["[CLS], at the start"]
    average = float(mean_weights(to("[CLS]"), texts)[0].mean())
    yield claim(
        average > 0.25,
        f"*Rest.* A softmax must put its weight somewhere. {average:.0%} of the weight of all heads goes to the mark "
        f"[CLS], which stands before every text; in head {rest.heads[0]} even {rest.weight:.0%}. A head that finds "
        "nothing to look at in a sentence looks there. Such tokens are called attention sinks (Clark et al. 2019, "
        "Xiao et al. 2023).",
    )
    again = found["the same word again"]
    yield claim(
        again.weight > 4 * again.control,
        f"*Likeness.* Head {again.heads[0]} finds the same word elsewhere in the sentence, with a weight of "
        f"{again.weight:.2f}, where any word gets {again.control:.2f}.",
    )
    verb, pronoun = found["verb to object"], found["pronoun to an actor"]
    yield claim(
        min(verb.weight / verb.control, pronoun.weight / pronoun.control) > 1.5 and pronoun.heads == [HEAD_OF_IT],
        f"*Grammar.* Some heads know more than positions. From a verb to its object, head {verb.heads[0]} gives "
        f"{verb.weight:.2f}; to what stands two words on elsewhere, {verb.control:.2f}. Pronouns look at the animals "
        f"and persons of the fable with a weight of {pronoun.weight:.2f} each in head {pronoun.heads[0]}; other words "
        f"with {pronoun.control:.2f}. (It is the head that found the animal on page 4.) These are tendencies, and no "
        "parser: nothing here is near 1.",
    )
    yield (
        "Clark et al. (2019) measured the 144 heads of BERT in the same spirit, on annotated text, and found such "
        "heads for many relations. That a head has a job does not mean that the model needs it: what a head passes on "
        "depends on its values too, and on what later layers make of it."
    )


def _in_lower_case(words: Sequence[Word]) -> list[str]:
    """How words are spelled, but for [CLS] and [SEP] in lower case."""
    return [word.text if word.text in ("[CLS]", "[SEP]") else word.text.casefold() for word in words]


def _picture(gains: dict[str, Floats]) -> Picture:
    gains = {name: np.maximum(gain, 0) for name, gain in gains.items()}
    columns = [str(head) for head in range(HEADS)]

    def lines(style: Style) -> list[str]:
        drawn: list[str] = []
        for name, gain in gains.items():
            rows = [f"layer {layer}" for layer in range(LAYERS)]
            drawn += [style.bold(f"  {name}"), *(heat_map(rows, gain.tolist(), style, columns=columns) or []), ""]
        return [*drawn, *legend(style)]

    def draw(figure: Any) -> None:
        from matplotlib.colors import PowerNorm

        from fastattn.plot.canvas import as_colormap

        colours = as_colormap(None)
        axes = figure.subplots(2, 3, sharex=True, sharey=True)
        for place, (name, gain) in zip(axes.flat, gains.items(), strict=True):
            # small gains are to be seen beside large ones: the scale of colours is that of their roots
            image = place.imshow(gain, cmap=colours, norm=PowerNorm(0.5, vmin=0, vmax=1))
            layer, head = divmod(int(gain.argmax()), HEADS)
            text = {"color": "white" if gain.max() > 0.2 else "black", "fontsize": 6.5, "ha": "center", "va": "center"}
            place.text(head, layer, f"{gain.max():.2f}".lstrip("0"), **text)
            place.set_title(name, fontsize=9)
            place.set_xticks(range(0, HEADS, 2))
            place.set_yticks(range(LAYERS))
            place.tick_params(length=0, labelsize=8)
            place.spines[:].set_color("0.6")
        figure.supxlabel("head", fontsize=9)
        figure.supylabel("layer", fontsize=9)
        figure.colorbar(image, ax=axes, label="weight above the control", shrink=0.8)

    caption = (
        "How much more weight each of the 72 heads gives to a pair of a relation than to one of its control, on "
        "all sentences. Most heads have nothing to do with most relations; a few stand out. The best is numbered."
    )
    return Picture("heads", caption, lines, draw, (9.0, 3.8))
