"""The examples in docs/examples/ that are built from transformer.py: gradients, and miniatures that have to learn."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "examples"

if not FOLDER.exists():
    pytest.skip("not in the source tree", allow_module_level=True)

has_digits = pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="scikit-learn is not installed")
has_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed"
)


def load(name: str) -> ModuleType:
    """Return a module of docs/examples/, which import each other as scripts there do."""
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER))


gpt, gpt_heads, digits, training, transformer, saving = (
    load(name) for name in ("gpt", "gpt_heads", "digits", "training", "transformer", "saving")
)

# -- gradients ---------------------------------------------------------------------------------------------------------


def shake(model: Any, rng: np.random.Generator) -> None:
    """Move all parameters off their first values, of which some are 0 and hide what depends on them."""
    for _, parameter in model.parameters():
        parameter.value += 0.3 * rng.standard_normal(parameter.value.shape)


def check_gradients(model: Any, inputs: Any, targets: Any) -> None:
    """Assert that along a random direction the loss changes as the gradient of each parameter says.

    The central difference of step h has an error of h² times the third derivative, and of eps / h times the loss; with
    h = 1e-5 these are some 1e-10 here, against directional derivatives of about 0.1.
    """
    rng = np.random.default_rng(0)
    shake(model, rng)
    _, grad = training.cross_entropy(model(inputs), targets)
    model.backward(grad)
    grads = {name: parameter.grad.copy() for name, parameter in model.parameters()}
    step = 1e-5
    for name, parameter in model.parameters():
        direction = rng.standard_normal(parameter.value.shape)
        value = parameter.value.copy()
        losses = []
        for sign in (1, -1):
            parameter.value[...] = value + sign * step * direction
            losses.append(training.cross_entropy(model(inputs), targets)[0])
        parameter.value[...] = value
        wanted = (losses[0] - losses[1]) / (2 * step)
        assert abs((grads[name] * direction).sum() - wanted) < 1e-7 * max(1, abs(wanted)), name
        assert np.abs(grads[name]).max() > 1e-4, f"{name}: has no gradient, so nothing was checked"


def test_gradients_of_the_gpt() -> None:
    settings = gpt.Settings(length=12, embed=8, heads=2, layers=2)
    rng = np.random.default_rng(1)
    model = gpt.GPT(7, settings, np.float64)
    assert len(dict(model.parameters())) == 5 + 12 * 2
    check_gradients(model, rng.integers(0, 7, (2, 12)), rng.integers(0, 7, (2, 12)))


def test_gradients_of_the_vision_transformer() -> None:
    settings = digits.Settings(embed=8, heads=2, layers=2)
    rng = np.random.default_rng(1)
    model = digits.VisionTransformer(settings, np.float64)
    assert len(dict(model.parameters())) == 8 + 12 * 2
    check_gradients(model, rng.random((3, 8, 8)), rng.integers(0, 10, 3))


# -- training ----------------------------------------------------------------------------------------------------------


class Quadratic(transformer.Part):
    """A matrix and a vector, of which Adam knows gradients only."""

    def __init__(self) -> None:
        self.matrix = transformer.Parameter(np.array([[1.0, -2.0], [3.0, 0.5]]))
        self.vector = transformer.Parameter(np.array([1.0, 4.0]))


def test_adam_is_the_papers() -> None:
    """Algorithm 1 of Kingma and Ba, element by element, with the decay and clipping that are said."""
    model = Quadratic()
    adam = training.Adam([model], betas=(0.9, 0.98), decay=0.1, clip=1.0)
    value = np.concatenate([model.matrix.value.ravel(), model.vector.value])
    mean, square = np.zeros(6), np.zeros(6)
    rng = np.random.default_rng(0)
    for step in range(1, 6):
        grad = rng.standard_normal(6) * 10.0 ** rng.integers(-3, 3)
        model.matrix.grad[...], model.vector.grad[...] = grad[:4].reshape(2, 2), grad[4:]
        adam.step(0.01)
        grad = grad * min(1, 1 / np.linalg.norm(grad))
        mean, square = 0.9 * mean + 0.1 * grad, 0.98 * square + 0.02 * grad**2
        value[:4] *= 1 - 0.01 * 0.1
        value -= 0.01 * (mean / (1 - 0.9**step)) / np.sqrt(square / (1 - 0.98**step))
        found = np.concatenate([model.matrix.value.ravel(), model.vector.value])
        np.testing.assert_allclose(found, value, rtol=1e-5)


def test_two_threads_take_the_step_of_one() -> None:
    """The mean of the gradients of two halves is the gradient of the whole."""
    settings = gpt.Settings(length=8, embed=8, heads=2, layers=1)
    rng = np.random.default_rng(0)
    inputs, targets = rng.integers(0, 5, (2, 4, 8))
    values = []
    for threads in (1, 2):
        model = gpt.GPT(5, settings, np.float64)
        trainer = training.Trainer(model, threads)
        losses = [trainer.step(inputs, targets, 1e-2) for _ in range(3)]
        values.append((trainer.adam.value, losses))
    np.testing.assert_allclose(values[1][0], values[0][0], atol=1e-9)
    np.testing.assert_allclose(values[1][1], values[0][1], atol=1e-9)


def test_the_same_seed_trains_the_same_model() -> None:
    settings = dataclasses.replace(gpt.QUICK, steps=3)
    text = gpt.corpus()[1][:5000]
    first, second, other = (gpt.train(dataclasses.replace(settings, seed=s), text, text[:999]) for s in (4, 4, 5))
    assert first.curve == second.curve
    assert first.curve != other.curve


def test_the_rate_warms_up_and_falls() -> None:
    rates = [training.warm_then_cosine(step, 200, 1.0) for step in range(1, 201)]
    assert rates[:2] == [0.02, 0.04]
    assert max(rates) == rates[49] == 1.0
    assert (np.diff(rates[50:]) < 0).all()
    assert rates[-1] == pytest.approx(0.1)


# -- the character GPT -------------------------------------------------------------------------------------------------


def test_held_out_paragraphs_are_not_in_the_training_text() -> None:
    train_text, held_text = gpt.corpus()
    known = {" ".join(paragraph.split()) for paragraph in train_text.split("\n\n")} - {""}
    held = {" ".join(paragraph.split()) for paragraph in held_text.split("\n\n")} - {""}
    assert not known & held
    assert 0.04 < len(held_text) / len(train_text + held_text) < 0.3


def test_the_gpt_learns_more_than_pairs() -> None:
    """The miniature, on the manual: below what the frequencies of pairs of characters give, of text it never saw."""
    texts = gpt.corpus()
    costs = gpt.baselines(*texts)
    trained = gpt.train(gpt.QUICK, *texts)
    bits = gpt.bits_per_character(trained.model, trained.held, most=200)
    assert bits < costs["pairs by frequency"] < costs["characters by frequency"]
    untrained = gpt.bits_per_character(trained.before, trained.held, most=20)
    assert untrained == pytest.approx(np.log2(len(trained.alphabet.characters)), abs=0.3)
    assert trained.curve["held-out text"][0] > trained.curve["held-out text"][-1]
    text = gpt.write(trained.model, trained.alphabet, "The", 20, seed=1)
    assert len(text) == 20
    assert text == gpt.write(trained.model, trained.alphabet, "The", 20, seed=1)


def test_baselines_are_what_they_say() -> None:
    """In a text of two characters that take turns, a pair tells all and a character nothing."""
    costs = gpt.baselines("ab" * 5000, "ab" * 500)
    assert costs["characters by frequency"] == pytest.approx(1, abs=1e-3)
    assert costs["pairs by frequency"] < 1e-3
    assert costs["xz after the training text"] < costs["xz"] < 1


def test_bits_per_character_looks_at_each_once() -> None:
    """Of a model that gives each character the frequencies of the text, the cost is their entropy."""
    model = gpt.GPT(3, gpt.Settings(length=8, embed=8, heads=2, layers=1))
    text = np.random.default_rng(0).choice(3, 4 * 100 + 1, p=(0.7, 0.2, 0.1))
    model.scores.weight.value[...] = 0
    shares = np.bincount(text[1:], minlength=3) / len(text[1:])
    model.scores.bias.value[...] = np.log(shares)
    assert gpt.bits_per_character(model, text) == pytest.approx(-(shares * np.log2(shares)).sum(), abs=0.01)


def test_a_head_that_is_off_gives_nothing() -> None:
    rng = np.random.default_rng(0)
    model = gpt.GPT(5, gpt.Settings(length=8, embed=8, heads=2, layers=1))
    ids = rng.integers(0, 5, (1, 8))
    attention = model.blocks[0].attention
    attention.combine.weight.value[4:] = 0  # of the second head, nothing is used
    before = model(ids)
    costs = gpt_heads.cost_without_each(model, lambda: float(np.abs(model(ids) - before).max()))
    assert costs[0][0] > 1e-4
    assert costs[0][1] == 0
    np.testing.assert_array_equal(model(ids), before)


def test_kinds_of_places() -> None:
    text = "to be or\nto be"
    kinds = gpt_heads.kinds_of_places(text)
    where = {kind: [np.flatnonzero(row).tolist() for row in places] for kind, places in kinds.items()}
    last = len(text) - 1  # the e of the second "be"
    assert where["the character itself"][last] == [last]
    assert where["the character before"][last] == [last - 1]
    assert where["the two before that"][last] == [last - 3, last - 2]
    assert where["the start of its word"][last] == []  # it is the character before
    assert where["the start of the word before"][last] == [text.rindex("to")]
    assert where["the start of its line"][last] == [text.rindex("to")]
    assert where["the same character, earlier"][last] == [4]
    assert where["what came after the same pair"][last] == [5]
    assert where["the start of its word"][2] == []  # a space is in no word
    assert not any(np.triu(places, 1).any() for places in kinds.values())


def test_habits_of_known_heads() -> None:
    """Heads that are made to look somewhere are found; one that goes by distance alone is not taken for more."""
    texts = ["one two three\nfour", "def f(x): return x"]
    length = len(texts[0])
    before = np.eye(length, k=-1)
    before[0, 0] = 1
    even = np.tril(np.ones((length, length)) / np.arange(1, length + 1)[:, None])
    starts = []  # looks at the start of the word, or at the first character
    for text in texts:
        places = gpt_heads.kinds_of_places(text)["the start of its word"].astype(float)
        places[:, 0] += ~places.any(axis=1)
        starts.append(places)
    weights = np.stack([np.stack([even, before, start]) for start in starts])[None]
    found = {habit.kind: habit for habit in gpt_heads.strongest(weights, weights[:, :, ::-1], texts)}
    assert found["the character before"][1:4] == (0, 1, 1.0)
    assert found["the character before"].otherwise < 0.3
    habit = found["the start of its word"]
    assert habit[1:4] == (0, 2, 1.0)
    assert habit.otherwise < 0.5
    for kind, (given, otherwise) in gpt_heads.habits(weights, texts).items():
        if kind in gpt_heads.DISTANCES:
            assert given[0, 0] == pytest.approx(otherwise[0, 0]), kind  # the even head
        else:
            assert given[0, 1] == pytest.approx(otherwise[0, 1]), kind  # the one that goes by distance


# -- the digits --------------------------------------------------------------------------------------------------------


def test_patches_are_squares_of_the_image() -> None:
    pixels = np.arange(2 * 64.0).reshape(2, 8, 8)
    patches = digits.in_patches(pixels)
    assert patches.shape == (2, 16, 4)
    np.testing.assert_array_equal(patches[1, 4 * 2 + 3], pixels[1, 4:6, 6:8].ravel())


def test_shifts_move_by_a_pixel_at_most() -> None:
    pixels = np.zeros((200, 8, 8))
    pixels[:, 3, 4] = 1
    places = {tuple(map(int, place)) for place in np.argwhere(digits.shifted(pixels, np.random.default_rng(0)))[:, 1:]}
    assert places == {(row, column) for row in (2, 3, 4) for column in (3, 4, 5)}


def test_patches_that_are_left_out_do_nothing() -> None:
    model = digits.VisionTransformer(digits.Settings(embed=8, heads=2, layers=2))
    rng = np.random.default_rng(0)
    shake(model, rng)
    first, second = rng.random((2, 50, 8, 8))
    keep = rng.random((50, 16)) < 0.5
    shown = keep.reshape(50, 4, 4).repeat(2, axis=1).repeat(2, axis=2)
    labels = np.zeros(50, np.int64)
    mixed = np.where(shown, first, second)  # the same but for what is left out
    found = []
    for pixels in (first, mixed):
        for block in model.blocks:
            block.attention.key_mask = np.column_stack([np.ones(50, bool), keep])
        found.append(model(pixels))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5, atol=1e-5)
    digits.accuracy(model, digits.Images(first, labels), keep)
    assert all(block.attention.key_mask is None for block in model.blocks)
    assert np.abs(model(first) - found[0]).max() > 1e-3


@has_digits
def test_the_vision_transformer_learns() -> None:
    """The miniature reads most held-out digits, and looks at them more than chance would."""
    known, held = digits.digits()
    assert len(known.labels) + len(held.labels) == 1797
    train_rows = {image.tobytes() for image in known.pixels}
    assert np.mean([image.tobytes() in train_rows for image in held.pixels]) < 0.02
    trained = digits.train(digits.QUICK, known, held)
    assert digits.accuracy(trained.model, held) > 0.7
    assert trained.accuracy[-1] > trained.accuracy[0]
    weights = digits.looks(trained.model, held.pixels)
    assert weights.shape == (len(held.labels), digits.QUICK.heads, 16)
    left_out = digits.without_patches(trained.model, held, 4, seed=0)
    assert left_out["those looked at most"] < left_out["none"]


# -- what is kept ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt", "digits"])
def test_the_saved_result_is_of_these_settings(name: str) -> None:
    """What the page tells is what the files say."""
    module = {"gpt": gpt, "digits": digits}[name]
    result = json.loads((FOLDER / "results" / f"{name}.json").read_text("utf-8"))
    assert result["settings"] == dataclasses.asdict(module.Settings())
    page = (FOLDER / f"{name}.md").read_text("utf-8")
    if name == "gpt":
        for bits in result["bits per character"].values():
            assert f"| {bits:.2f} |" in page
        assert result["bits per character"]["this model"] < result["bits per character"]["xz"]
    else:
        for share in (*result["accuracy"].values(), result["mean accuracy"]):
            assert f"{100 * share:.1f} %" in page
        assert min(result["accuracy"].values()) >= 0.97
    for figure in (FOLDER / "figures").glob(f"{name}-*.png"):
        assert f"figures/{figure.name})" in page


@has_matplotlib
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gpt", gpt.Settings(length=48, embed=8, heads=2, layers=2, batch=2, steps=2)),
        pytest.param("digits", digits.Settings(embed=8, heads=2, layers=1, batch=4, steps=2), marks=has_digits),
    ],
)
def test_the_command(
    name: str, settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It prints its scores, and keeps the result and the pictures that the page shows."""
    module = {"gpt": gpt, "digits": digits}[name]
    monkeypatch.setattr(module, "QUICK", settings)
    monkeypatch.setattr(sys, "argv", [name, "--quick", "--save", "--seed", "3"])
    for kept in ("save_result", "save_figure"):
        save: Callable[..., Path] = getattr(saving, kept)
        monkeypatch.setattr(module, kept, lambda *args, save=save: save(*args, folder=tmp_path))
    module.main()
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "results" / f"{name}.json").read_text("utf-8"))
    assert result["settings"]["seed"] == 3
    assert ("bits per character" if name == "gpt" else "held-out digits read right") in printed
    committed = sorted(path.name for path in (FOLDER / "figures").glob(f"{name}-*.png"))
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == committed
