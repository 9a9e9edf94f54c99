"""The demo: the encoder against the same model in transformers, words and sentences."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fastattn.console.terminal import Style, UserError
from fastattn.demo import cli, minilm, parts, search, words

SENTENCES = [
    cli.TEXT,
    "Yes.",
    "A kitten naps on the sofa, unbelievably quietly.",
    "The trophy didn't fit into the suitcase because it was too big, which nobody had expected on such a day.",
]
PLAIN = Style(colour=False, blocks=True, width=80)


@pytest.fixture(scope="module")
def model() -> minilm.MiniLM:
    """Return the encoder."""
    for name, why in (
        ("safetensors", "reads the demo's weights"),
        ("tokenizers", "cuts the demo's text into word pieces"),
    ):
        pytest.importorskip(name, reason=f"{name}, which {why}, is not installed")
    try:
        return minilm.MiniLM.load()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def theirs() -> Any:
    """Return the same model in transformers, with its own tokenizer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("torch", reason="PyTorch, the oracle of this test, is not installed")
        reason = "transformers, the oracle of this test, is not installed"
        transformers = pytest.importorskip("transformers", reason=reason)
        try:
            folder = minilm.model_folder()
        except UserError as error:
            pytest.skip(str(error))
        model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
        return SimpleNamespace(model=model, tokenizer=transformers.AutoTokenizer.from_pretrained(folder))


def plain_attention(
    query: minilm.Floats, key: minilm.Floats, value: minilm.Floats, attn_mask: Any = None
) -> minilm.Floats:
    """Return attention as one writes it in NumPy."""
    weights: minilm.Floats = query @ key.swapaxes(-1, -2)
    weights *= 1 / math.sqrt(query.shape[-1])
    if attn_mask is not None:
        np.copyto(weights, -np.inf, where=~attn_mask)
    weights -= weights.max(axis=-1, keepdims=True)
    np.exp(weights, out=weights)
    weights /= weights.sum(axis=-1, keepdims=True)
    out: minilm.Floats = np.matmul(weights, value)
    return out


def run_theirs(theirs: Any, sentences: Sequence[str]) -> Any:
    """Run transformers on a padded batch: ids, mask, unit vectors, and weights of shape (layers, B, heads, L, L)."""
    import torch

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        inputs = theirs.tokenizer(list(sentences), padding=True, return_tensors="pt")
        outputs = theirs.model(**inputs, output_attentions=True)
    mask = inputs["attention_mask"].numpy().astype(bool)
    mean = (outputs.last_hidden_state.numpy() * mask[..., None]).sum(axis=1) / mask.sum(axis=1, keepdims=True)
    unit = mean / np.linalg.norm(mean, axis=-1, keepdims=True)
    weights = np.stack([layer.numpy() for layer in outputs.attentions])
    return SimpleNamespace(ids=inputs["input_ids"].numpy(), mask=mask, unit=unit, weights=weights)


class TestModel:
    def test_embeddings_are_those_of_transformers(self, model: minilm.MiniLM, theirs: Any) -> None:
        expected = run_theirs(theirs, SENTENCES).unit
        np.testing.assert_allclose(model.embed(SENTENCES), expected, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("sentence", SENTENCES)
    def test_weights_of_all_72_heads_are_those_of_transformers(
        self, model: minilm.MiniLM, theirs: Any, sentence: str
    ) -> None:
        expected = run_theirs(theirs, [sentence])
        ids = model.encode(sentence).ids
        assert ids == expected.ids[0].tolist()
        weights = model.attention_weights(ids)
        assert weights.shape[:2] == (minilm.LAYERS, minilm.HEADS)
        np.testing.assert_allclose(weights, expected.weights[:, 0], rtol=0, atol=1e-5)

    def test_weights_in_a_padded_batch_are_those_of_transformers(self, model: minilm.MiniLM, theirs: Any) -> None:
        expected = run_theirs(theirs, SENTENCES)
        weights: list[minilm.Floats] = []
        model.hidden(expected.ids, expected.mask, minilm.recording_attention(weights))
        for ours, others in zip(weights, expected.weights, strict=True):
            real = np.broadcast_to(
                expected.mask[:, None, :, None], others.shape
            )  # padding looks too, but nobody reads it
            np.testing.assert_allclose(ours[real], others[real], rtol=0, atol=1e-5)
            assert not ours[np.broadcast_to(~expected.mask[:, None, None, :], ours.shape)].any()

    @pytest.mark.parametrize(("layer", "head", "weight"), [(3, 1, 0.68), (5, 11, 0.67)])
    def test_it_is_the_animal(self, model: minilm.MiniLM, layer: int, head: int, weight: float) -> None:
        encoding = model.encode(cli.TEXT)
        row = model.attention_weights(encoding.ids)[layer, head, encoding.tokens.index("it")]
        assert encoding.tokens[int(row.argmax())] == "animal"
        assert round(float(row.max()), 2) == weight

    def test_padding_changes_nothing(self, model: minilm.MiniLM) -> None:
        together = model.embed(SENTENCES)
        for sentence, vector in zip(SENTENCES, together, strict=True):
            np.testing.assert_allclose(model.embed([sentence])[0], vector, rtol=0, atol=1e-6)

    def test_plain_attention_gives_the_same(self, model: minilm.MiniLM) -> None:
        plain = model.embed(SENTENCES, plain_attention)
        np.testing.assert_allclose(model.embed(SENTENCES), plain, rtol=0, atol=1e-6)

    def test_vectors_are_of_length_one(self, model: minilm.MiniLM) -> None:
        np.testing.assert_allclose(np.linalg.norm(model.embed(SENTENCES), axis=1), 1, rtol=1e-6)

    def test_meaning_decides(self, model: minilm.MiniLM) -> None:
        cat, kitten, tax = model.embed(["A cat sleeps.", "The kitten is taking a nap.", "Taxes are due in May."])
        assert cat @ kitten > 0.5 > 0.2 > cat @ tax

    def test_long_text_is_cut(self, model: minilm.MiniLM) -> None:
        encoding = model.encode("word " * 1000)
        assert len(encoding.ids) == minilm.MAX_TOKENS
        assert encoding.overflowing

    def test_progress_ends_with_all(self, model: minilm.MiniLM) -> None:
        seen: list[tuple[int, int]] = []
        model.embed(["Yes."] * 70, progress=lambda done, total: seen.append((done, total)))
        assert seen == [(32, 70), (64, 70), (70, 70)]


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot read the model"), (b"no tensors", "cannot read the model")]
)
def test_load_refuses_a_broken_folder(tmp_path: Path, content: bytes | None, message: str) -> None:
    pytest.importorskip("safetensors", reason="safetensors, which reads the demo's weights, is not installed")
    pytest.importorskip("tokenizers", reason="tokenizers, which the demo needs, is not installed")
    if content is not None:
        (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=message):
        minilm.MiniLM.load(tmp_path)


def test_gelu_is_exact_to_float32() -> None:
    x = np.linspace(-12, 12, 100_001, dtype=np.float32)
    phi = np.array([(1 + math.erf(value / math.sqrt(2))) / 2 for value in x.tolist()])
    result = parts.gelu(x.copy())
    assert np.abs(result - x * phi).max() < 5e-7 * 6
    nonzero = np.abs(x) > 1e-3
    assert np.abs((result / np.where(nonzero, x, 1) - phi)[nonzero]).max() < 5e-7


def test_layer_norm_is_the_formula() -> None:
    rng = np.random.default_rng(1)
    x, gain, bias = (rng.standard_normal(shape).astype(np.float32) for shape in ((3, 5, 384), 384, 384))
    mean, variance = x.mean(axis=-1, keepdims=True), x.var(axis=-1, keepdims=True)
    expected = (x - mean) / np.sqrt(variance + 1e-12) * gain + bias
    np.testing.assert_allclose(parts.layer_norm(x.copy(), gain, bias), expected, rtol=1e-4, atol=1e-5)


def test_batches_hold_every_sentence_once_and_like_lengths_together() -> None:
    lengths = np.random.default_rng(2).integers(1, 100, 70).tolist()
    found = list(minilm.batches(lengths))
    assert sorted(index for batch in found for index in batch) == list(range(70))
    assert [lengths[index] for batch in found for index in batch] == sorted(lengths)


class TestWords:
    def test_pieces_join_to_words_as_written(self, model: minilm.MiniLM) -> None:
        text = "Unbelievable: isn't the well-known 'caf\u00e9' re-opened, e.g. by 東京?"
        joined = words.join_pieces(text, model.encode(text))
        expected = "[CLS] Unbelievable : isn't the well-known ' caf\u00e9 ' re-opened , e . g . by 東 京 ? [SEP]"
        assert " ".join(word.text for word in joined) == expected
        pieces = [piece for word in joined for piece in word.pieces]
        assert pieces == list(range(len(model.encode(text).ids)))
        inner = joined[1:-1]
        assert "".join(word.gap + word.text for word in inner).strip() == text

    def test_weights_between_words_add_up(self) -> None:
        rng = np.random.default_rng(3)
        pieces = rng.random((2, 3, 5, 5))
        pieces /= pieces.sum(axis=-1, keepdims=True)
        joined = [words.Word("a", range(1)), words.Word("b", range(1, 4)), words.Word("c", range(4, 5))]
        merged = words.in_words(pieces, joined)
        assert merged.shape == (2, 3, 3, 3)
        np.testing.assert_allclose(merged.sum(axis=-1), 1)
        np.testing.assert_allclose(merged[0, 0, 0, 1], pieces[0, 0, 0, 1:4].sum())
        np.testing.assert_allclose(merged[0, 0, 1, 2], pieces[0, 0, 1:4, 4].mean())

    @pytest.mark.parametrize(("wanted", "index"), [("the", 2), ("The", 0), ("THE:2", 2), ("end:1", 3), (" cat ", 1)])
    def test_find_word(self, wanted: str, index: int) -> None:
        assert words.find_word(sentence("The cat the end"), wanted) == index

    @pytest.mark.parametrize("wanted", ["dog", "the:3", "the:0", "", "\x1b[31m"])
    def test_unknown_word_lists_the_known(self, wanted: str) -> None:
        with pytest.raises(UserError, match="its words are: The, cat, the, end$") as caught:
            words.find_word(sentence("The cat the end ."), wanted)
        assert str(caught.value).isprintable()

    def test_sharpest_leaves_out_neighbours_marks_and_the_same_word(self) -> None:
        text = sentence("[CLS] the cat saw the dog . [SEP]")
        weights = np.zeros((2, 2, 8, 8))
        weights[0, 0, 1, 4] = weights[0, 0, 2, 0] = weights[0, 1, 2, 3] = weights[1, 1, 5, 6] = 1.0
        weights[1, 0, 2, 5] = 0.6
        weights[1, 1, 2, 4] = 0.4
        weights[0, 1, 5, 2] = 0.5
        assert words.sharpest(weights, text) == [words.Look(1, 0, 2, 5, 0.6), words.Look(1, 1, 2, 4, 0.4)]
        assert words.sharpest(weights, text, word=5, count=1) == [words.Look(0, 1, 5, 2, 0.5)]
        assert words.sharpest(weights, text, layers=[1], heads=[1]) == [words.Look(1, 1, 2, 4, 0.4)]

    @pytest.mark.parametrize("text", ["[CLS] one [SEP]", "[CLS] one two [SEP]", "[CLS] . [SEP]"])
    def test_sharpest_finds_something_in_short_texts(self, text: str) -> None:
        size = len(text.split())
        looks = words.sharpest(np.full((6, 12, size, size), 1 / size), sentence(text))
        assert len(looks) == 2

    def test_the_heads_of_the_demo_are_among_the_sharpest(self, model: minilm.MiniLM) -> None:
        encoding = model.encode(cli.TEXT)
        joined = words.join_pieces(cli.TEXT, encoding)
        weights = words.in_words(model.attention_weights(encoding.ids), joined)
        looks = words.sharpest(weights, joined, words.find_word(joined, "it"), count=3)
        assert set(cli.SHOWCASE) < {(look.layer, look.head) for look in looks}


def sentence(text: str) -> list[words.Word]:
    """Return words of one piece each."""
    return [words.Word(word, range(index, index + 1)) for index, word in enumerate(text.split())]


class TestSentences:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("One. Two! Three?", ["One.", "Two!", "Three?"]),
            ('He said "Stop." Then he left.', ['He said "Stop."', "Then he left."]),
            ("Mr. J. Smith, e.g. at 3.5 euros. Nobody knew.", ["Mr. J. Smith, e.g. at 3.5 euros.", "Nobody knew."]),
            ("Broken\nover lines. And\non.", ["Broken over lines.", "And on."]),
            ("# Title\ntext\n- item one\n- item two\n\nlast", ["Title", "text", "- item one", "- item two", "last"]),
            ("...\n\n***\n\n", []),
            ("Über alles. Élan vital. 7 dwarfs.", ["Über alles.", "Élan vital.", "7 dwarfs."]),
            ("吾輩は猫である。名前はまだ無い。", ["吾輩は猫である。", "名前はまだ無い。"]),
            ("a\x1b[31mb\x07 c", ["a [31mb c"]),
        ],
    )  # fmt: skip
    def test_split(self, text: str, expected: list[str]) -> None:
        assert [found for _, found in search.split_sentences(text)] == expected

    def test_lines_are_where_sentences_begin(self) -> None:
        text = "\n\nOne. Two\nhas more. \nThree\n\n# Four\nFive"
        assert [line for line, _ in search.split_sentences(text)] == [3, 3, 5, 7, 8]

    def test_read_skips_the_byte_order_mark_and_takes_any_line_end(self, tmp_path: Path) -> None:
        file = tmp_path / "text"
        file.write_bytes(b"\xef\xbb\xbfOne.\r\n\r\nTwo.")
        assert [(found.text, found.line) for found in search.read_sentences([str(file)])] == [("One.", 1), ("Two.", 3)]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "no sentence"),
            (b"\n...\n", "no sentence"),
            (b"\xff\xfe", "UTF-8"),
            (b"PK\0\1", "zero bytes"),
            (None, "No such file"),
        ],
    )
    def test_read_refuses(self, tmp_path: Path, content: bytes | None, message: str) -> None:
        file = tmp_path / "text"
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(UserError, match=message) as caught:
            search.read_sentences([str(file)])
        assert "\n" not in str(caught.value)

    def test_read_refuses_folders_and_strange_names(self, tmp_path: Path) -> None:
        for name in (str(tmp_path), "a\0b", "\udcff"):
            with pytest.raises(UserError, match="cannot read"):
                search.read_sentences([name])

    def test_rank(self) -> None:
        vectors = np.eye(3, dtype=np.float32)
        ranked = search.rank(vectors, np.array([0.6, 0.8, 0.0], np.float32), 2)
        assert [index for index, _ in ranked] == [1, 0]
        assert [round(cosine, 3) for _, cosine in ranked] == [0.8, 0.6]

    def test_all_files_are_looked_at_before_one_is_read(self, tmp_path: Path) -> None:
        good = tmp_path / "good"
        good.write_text("One.")
        search.check_readable([str(good), "-"])
        for bad in (str(tmp_path / "missing"), str(tmp_path), "a\0b"):
            with pytest.raises(UserError, match="cannot read"):
                search.check_readable(["-", str(good), bad])


def test_picture_of_a_long_text_shows_the_row_alone_and_the_best_bars() -> None:
    text = sentence(" ".join(f"w{index}" for index in range(100)))
    weights = np.full((6, 12, 100, 100), 0.001)
    weights[..., 7] = 0.9
    lines = cli.picture(text, weights, [words.Look(0, 0, 50, 7, 0.9)], PLAIN)
    assert sum(line.lstrip("▸ ").startswith("w") and "0." in line for line in lines) == cli.MAX_BARS
    assert any("76 words less looked at" in line for line in lines)
    assert any("w7(.90)" in line for line in lines)
