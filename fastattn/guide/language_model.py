"""The page "language-model" of the guide."""

from __future__ import annotations

import importlib.util
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from fastattn.console.terminal import Style, bar_table
from fastattn.demo.chat.conversation import Conversation
from fastattn.demo.chat.model import PACKAGE, SmolLM2
from fastattn.demo.chat.reader import AT_ONCE, Reader
from fastattn.demo.chat.sampling import Sampling
from fastattn.demo.chat.spoken import looks_to_write, sharpest, words_of
from fastattn.demo.parts import Floats
from fastattn.guide.page import Listing, Picture, Step, Table, claim, duration
from fastattn.guide.pictures import BLUE, RED, draw_curves, numbers

QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is"
STORY = "Once upon a time there was a"
LENGTHS = (32, 64, 128, 256)
TEMPERATURES = (0.5, 1.0, 1.5)
#: What was measured last, for where the model is not installed.
KEPT = "language_model.json"
MEBIBYTE = 1 << 20


def next_scores(model: SmolLM2, ids: Sequence[int]) -> Floats:
    """Score every token of the vocabulary as the next one, by reading the whole text."""
    hidden = model.hidden(ids, model.caches())
    scores: Floats = model.logits(hidden[-1:])[0]
    return scores


def write(model: SmolLM2, ids: Sequence[int], count: int) -> list[int]:
    """The likeliest token, again and again; each time the whole text is read anew."""
    text = list(ids)
    for _ in range(count):
        text.append(int(next_scores(model, text).argmax()))
    return text


def write_with_cache(model: SmolLM2, ids: Sequence[int], count: int) -> list[int]:
    """The same, but every token is read once: the caches keep the keys and values of all before it."""
    text, new, caches = list(ids), list(ids), model.caches()
    for _ in range(count):
        hidden = model.hidden(new, caches)
        new = [int(model.logits(hidden[-1:])[0].argmax())]
        text += new
    return text


def steps() -> Iterator[Step]:
    """From one step to the cache, and what both cost."""
    facts = measured(SmolLM2.load()) if importlib.util.find_spec(PACKAGE) is not None else kept()
    yield from told(facts)


def told(facts: dict[str, Any]) -> Iterator[Step]:
    """The page, from what was measured."""
    yield (
        "A language model does one thing: it reads a text and says how likely each token is to come next. A token is a "
        "word or a piece of one. To write, one takes a token, puts it behind the text, and asks again. We watch "
        "SmolLM2-135M-Instruct, the model of `python -m fastattn demo chat`: 30 layers in which 9 query heads share 3 "
        "heads of keys and values, 135 million parameters, all in NumPy, with every attention by fastattn. (Where its "
        "package is not installed, the numbers are those that were measured when this page was made.)"
    )
    yield "## 1. One step"
    yield Listing.of(next_scores)
    best = facts["candidates"]
    yield f'The question is "{QUESTION}", and the answer has begun: "{ANSWER}". What comes next?'
    yield Table(["token", "probability"], [[f'"{token}"', f"{share:.1%}"] for token, share in best])
    yield claim(
        best[0][0] == " Paris" and best[0][1] > 0.5,
        "The scores of all 49,152 tokens, put through a softmax, are probabilities. To take the likeliest token each "
        "time is called greedy; the model always writes the same then.",
    )
    yield "## 2. A loop"
    yield Listing.of(write)
    yield claim(
        facts["same"],
        f'This writes "{facts["written"]}" But it is wasteful. To write the tenth word it reads again what it has '
        "read for the ninth.",
    )
    yield "## 3. What does not change"
    yield (
        "A token looks only at what stands before it: the attention is *causal*. So what the model computes for a "
        "token does not depend on what comes later. In particular its keys and values, in every layer, stay what "
        "they are."
    )
    yield claim(
        facts["changed"] < 1e-5,
        "We read a text of 40 tokens, and the first 20 of them alone, and compare what comes out for these 20: it is "
        "the same, to five digits.",
    )
    yield (
        "So they can be kept, in what is called a *KV cache*: `fastattn.KVCache` here, one for each layer. A step then "
        "reads one new token. It makes one query in each head, which looks at all keys that are kept, and adds one key "
        "and one value:"
    )
    yield Listing.of(write_with_cache)
    yield claim(facts["same"], "It writes the same, token by token.")
    yield from _costs(facts)
    yield from _looks(facts)
    yield from _draws(facts)


def _costs(facts: dict[str, Any]) -> Iterator[Step]:
    """Time and memory, with the cache and without it."""
    yield "## 4. What it costs"
    anew, kept_ = facts["anew"], facts["with cache"]
    rows = [[str(length), duration(a), duration(b)] for length, a, b in zip(LENGTHS, anew, kept_, strict=True)]
    yield Table(["tokens before", "a token, read anew", "a token, with the cache"], rows)
    yield _times(facts)
    last = LENGTHS[-1]
    yield claim(
        anew[-1] > 3 * kept_[-1],
        f"Without the cache a token takes longer the more there are before it: {duration(anew[-1])} at {last}. With "
        f"it, {duration(kept_[-1])}. Nearly all of that is reading the weights, {facts['weights'] / MEBIBYTE:.0f} MiB, "
        "of which each is used once for the one token: writing is as fast as memory is. Attention comes second, as "
        "long as there are not many thousands of tokens.",
    )
    one = facts["bytes"]
    yield claim(
        one == 2 * 30 * 3 * 64 * 4,
        "The price is memory. A token keeps a key and a value of 64 numbers in each of 3 heads of 30 layers, "
        f"{one:,} bytes in float32, and a text of 8,192 tokens {8192 * one / MEBIBYTE:.0f} MiB. Here it helps that 9 "
        "query heads share 3 heads of keys and values (Ainslie et al. 2023): with 9 it would be three times as much.",
    )
    yield claim(
        facts["read"] < 0.7 * kept_[-1],
        f"A text that is there already, such as a question, need not be read token by token. {AT_ONCE} at once take "
        f"{duration(facts['read'])} each, because each weight that is read from memory is used {AT_ONCE} times. That "
        "is called *prefill*, and the rest *decoding*; `demo chat --stats` shows how fast both are.",
    )


def _looks(facts: dict[str, Any]) -> Iterator[Step]:
    """Where the model looked to write a word."""
    yield "## 5. Where it looked"
    yield (
        'The token that writes "Paris" is the one before it, "is". Of its 270 heads we draw the one that looks most '
        "sharply at a word, and the one that looks most sharply at another:"
    )
    yield _bars(facts)
    (one, first), (other, second) = ((look["at"], max(look["weights"])) for look in facts["looks"])
    yield claim(
        {one, other} == {"capital", "France"},
        f'They found what the answer needs: "{one}", with a weight of {first:.2f}, and "{other}", with {second:.2f}. '
        "Both keys were made long before anybody asked for them, and waited in the cache.",
    )


def _draws(facts: dict[str, Any]) -> Iterator[Step]:
    """Temperature."""
    yield "## 6. Chance"
    yield (
        "The likeliest word each time is right for facts, and dull in stories. One can draw a token instead, as likely "
        "as it is. A *temperature* divides the scores before the softmax: below 1 the likely become likelier, above 1 "
        f'the unlikely get their chance. After "{STORY}":'
    )
    yield Table(
        ["token", *(f"temperature {each:g}" for each in TEMPERATURES)],
        [[f'"{token}"', *(f"{share:.1%}" for share in shares)] for token, *shares in facts["draws"]],
    )
    first = facts["draws"][0][1:]
    yield claim(
        first[0] > first[1] > first[2] and 100 < facts["likely"] < 1000,
        "At a temperature of 1, some hundreds of tokens make up 90 % of the probability. `--top-p 0.9` draws from "
        "these alone, so that nothing absurd is drawn from the thousands of others, and `--seed` draws the same again.",
    )


# -- what is measured --------------------------------------------------------------------------------------------------


def kept() -> dict[str, Any]:
    """What was measured when the page was made."""
    found: dict[str, Any] = json.loads(resources.files("fastattn.guide").joinpath(KEPT).read_text("utf-8"))
    return found


def keep(facts: dict[str, Any]) -> None:
    """Keep what was measured, in the source tree."""
    text = json.dumps(facts, indent=1, ensure_ascii=False)
    text = re.sub(r"\d+\.\d+(?:e-\d+)?", lambda found: f"{float(found[0]):.4g}", text)
    Path(__file__).with_name(KEPT).write_text(text + "\n", "utf-8")


def measured(model: SmolLM2) -> dict[str, Any]:
    """All that the page says of the model."""
    conversation = Conversation(model)
    ids = [*conversation.ids, *conversation._question(QUESTION)]
    written = write_with_cache(model, ids, 7)
    begun = [*ids, *model.tokenizer.encode(ANSWER)]
    long, short = (model.hidden(written[:length], model.caches()) for length in (40, 20))
    text = b"".join(map(model.tokenizer.bytes_of, written[len(ids) :])).decode()
    story = model.tokenizer.encode(STORY)
    return {
        "candidates": _likeliest(model, begun, (1.0,), 5),
        "written": text,
        "same": written == write(model, ids, 7),
        "changed": float(np.abs(long[:20] - short).max() / np.abs(short).max()),
        "bytes": sum(2 * 4 * model.kv_heads * model.head_dim for _ in model.layers),
        "weights": sum(part.nbytes for layer in model.layers for part in vars(layer).values()) + model.words.nbytes,
        **_seconds(model),
        **_looked(model),
        "draws": _likeliest(model, story, TEMPERATURES, 4),
        "likely": _likely(next_scores(model, story), 0.9),
    }


def _probabilities(scores: Floats, temperature: float = 1.0) -> Any:
    weights = np.exp((scores.astype(np.float64) - scores.max()) / temperature)
    return weights / weights.sum()


def _likeliest(model: SmolLM2, ids: Sequence[int], temperatures: Sequence[float], count: int) -> list[list[Any]]:
    """The likeliest tokens, as they are written, with their probability at each temperature."""
    scores = next_scores(model, ids)
    shares = [_probabilities(scores, each) for each in temperatures]
    best = np.argsort(-scores, kind="stable")[:count].tolist()
    return [[model.tokenizer.bytes_of(token).decode(), *(float(share[token]) for share in shares)] for token in best]


def _likely(scores: Floats, share: float) -> int:
    """Of how many tokens the likeliest ones have this share of the probability together."""
    return int(np.searchsorted(np.cumsum(np.sort(_probabilities(scores))[::-1]), share)) + 1


def _seconds(model: SmolLM2) -> dict[str, Any]:
    """Seconds of a token behind texts of some lengths, with the cache and without, and of each of a text at once."""
    ids = np.random.default_rng(0).integers(100, 40_000, AT_ONCE + 1).tolist()
    anew, cached = [], []
    for length in LENGTHS:
        reader = Reader(model)
        reader.read(ids[:length])

        def one(length: int = length, reader: Reader = reader) -> None:
            reader.forget(length)
            reader.read([ids[length]])

        anew.append(_time(lambda length=length: next_scores(model, ids[: length + 1]), 2))  # type: ignore[misc]
        cached.append(_time(one, 7))
    return {"anew": anew, "with cache": cached, "read": _time(lambda: Reader(model).read(ids[:AT_ONCE]), 2) / AT_ONCE}


def _time(function: Callable[[], Any], runs: int) -> float:
    """The least of some runs, in seconds: what it takes where nothing else wants the machine."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def _looked(model: SmolLM2) -> dict[str, Any]:
    """The two heads that look most sharply to write "Paris", and their weights of the words most looked at."""
    conversation = Conversation(model, sampling=Sampling())
    for _ in conversation.answer(QUESTION, 20):
        pass
    words = words_of(conversation.ids, model.tokenizer)
    (paris,) = (at for at, word in enumerate(words) if word.text == "Paris")
    weights = looks_to_write(conversation, words, paris)
    looks = sharpest(weights, words)
    rows = np.stack([weights[look.layer, look.head] for look in looks])
    shown = [at for at in np.argsort(-rows.max(axis=0), kind="stable")[:12].tolist() if words[at].text]
    shown = sorted(at for at in shown if not words[at].is_mark)[-8:]
    return {
        "words": [words[at].text for at in shown],
        "looks": [
            {
                "head": f"layer {look.layer}, head {look.head}",
                "at": words[look.target].text,
                "weights": row[shown].tolist(),
            }
            for look, row in zip(looks, rows, strict=True)
        ],
    }


# -- pictures ----------------------------------------------------------------------------------------------------------


def _times(facts: dict[str, Any]) -> Picture:
    milliseconds = {name: [1e3 * each for each in facts[name]] for name in ("anew", "with cache")}

    def lines(style: Style) -> list[str]:
        return numbers("ms for a token, by how many there are before it", LENGTHS, milliseconds, style)

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        draw_curves(axes, LENGTHS, milliseconds, labels=("tokens before", "a token, ms"), log="x")
        axes.legend(frameon=False)

    caption = "What a token costs: with a cache it hardly matters how many there are before it."
    return Picture("kv-cache", caption, lines, draw, (6.0, 3.0), timed=True)


def _bars(facts: dict[str, Any]) -> Picture:
    words, looks = facts["words"], facts["looks"]

    def lines(style: Style) -> list[str]:
        return bar_table(words, [(look["head"], look["weights"]) for look in looks], style)

    def draw(figure: Any) -> None:
        places = np.arange(len(words))
        for axes, look, colour in zip(figure.subplots(1, 2, sharey=True), looks, (BLUE, RED), strict=True):
            axes.barh(places, look["weights"], color=colour)
            axes.set_yticks(places, words)
            axes.set(xlim=(0, 1), xlabel="weight")
            axes.set_title(look["head"], fontsize=10)
            axes.spines[["top", "right"]].set_visible(False)
        axes.invert_yaxis()

    caption = 'Where two heads looked from "is", to write "Paris": the words most looked at, from top to bottom.'
    return Picture("language-model", caption, lines, draw, (7.0, 3.0))
