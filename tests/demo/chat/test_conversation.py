"""Turns, what is read when, what happens to an answer that is broken off, and how a token is chosen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastattn.demo.chat.caches import FastCache, Floats
from fastattn.demo.chat.conversation import SYSTEM, ContextFull, Conversation
from fastattn.demo.chat.model import SmolLM2
from fastattn.demo.chat.reader import AT_ONCE, Reader
from fastattn.demo.chat.sampling import Sampling
from fastattn.demo.chat.stats import Comparison


def spoken(conversation: Conversation) -> str:
    """Return all that has been said, as the model reads it."""
    names = {number: mark for mark, number in conversation.tokenizer.marks.items()}
    return b"".join(
        names[each].encode() if each in names else conversation.tokenizer.bytes_of(each) for each in conversation.ids
    ).decode("utf-8", "replace")


class Scripted(Sampling):
    """Chooses what a test says, whatever the scores are; "." ends an answer."""

    def __init__(self, model: SmolLM2, text: str) -> None:
        super().__init__()
        end = model.tokenizer.marks["<|im_end|>"]
        self.left = [end if char == "." else model.tokenizer.encode(char)[0] for char in text]

    def choose(self, logits: Floats) -> int:
        return self.left.pop(0)


def test_turns_are_one_text_that_is_read_once(small: SmolLM2) -> None:
    conversation = Conversation(small, "Be brief", Scripted(small, "hello.bye."))
    for question in ("hi", "go"):
        for _ in conversation.answer(question, 20):
            pass
    expected = (
        "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>"
        "\n<|im_start|>user\ngo<|im_end|>\n<|im_start|>assistant\nbye<|im_end|>"
    )
    assert spoken(conversation) == expected
    reader = conversation.reader
    assert reader.length == len(conversation.ids) - 1  # the last token has not been read yet
    assert reader.prefill.tokens + reader.decode.tokens == reader.length
    assert reader.decode.tokens == len("hellobye")


def test_the_second_answer_is_that_of_the_whole_text(small: SmolLM2) -> None:
    conversation = Conversation(small)
    for question in ("the bat", "and then"):
        last = list(conversation.answer(question, 12))[-1]
    whole = Reader(small).read(conversation.ids[:-1])
    assert int(whole.argmax()) == last


@pytest.mark.parametrize("layer", [0, 1])
def test_an_answer_that_is_interrupted_goes_on_as_if_it_had_not_been(
    small: SmolLM2, monkeypatch: pytest.MonkeyPatch, layer: int
) -> None:
    expected = list(Conversation(small).answer("the bat", 12))
    conversation = Conversation(small)
    answer = conversation.answer("the bat", 12)
    found = [next(answer) for _ in range(5)]
    caches = conversation.reader.caches

    def interrupted(self: Any, query: Floats) -> Floats:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(caches[layer], "_attend", interrupted.__get__(caches[layer]))
        with pytest.raises(KeyboardInterrupt):
            next(answer)
    assert conversation.ids[conversation.answered_from :] == found == expected[:5]
    assert {cache.length for cache in caches} == {conversation.reader.length} == {len(conversation.ids) - 1}
    logits = conversation.reader.read(conversation.ids[-1:])
    assert int(logits.argmax()) == expected[5]


def test_a_turn_after_one_that_was_broken_off_begins_with_its_end(small: SmolLM2) -> None:
    conversation = Conversation(small, "", Scripted(small, "ab."))
    next(conversation.answer("hi", 20))
    assert spoken(conversation).endswith("assistant\na")
    list(conversation.answer("go", 20))
    assert spoken(conversation).endswith(
        "assistant\na<|im_end|>\n<|im_start|>user\ngo<|im_end|>\n<|im_start|>assistant\nb<|im_end|>"
    )


def test_an_answer_ends_at_its_limit_or_where_there_is_no_more_room(small: SmolLM2) -> None:
    conversation = Conversation(small, "", Scripted(small, "a" * 1000))
    seen: list[tuple[int, int]] = []
    assert len(list(conversation.answer("hi", 7, lambda done, total: seen.append((done, total))))) == 7
    asked = conversation.reader.prefill.tokens
    assert seen == [(asked, asked)]  # of the question alone
    assert len(list(conversation.answer("hi", 1000))) < 256
    assert len(conversation.ids) == small.context
    before = list(conversation.ids)
    with pytest.raises(ContextFull):
        next(conversation.answer("hi", 1))
    assert conversation.ids == before
    conversation.restart()
    assert conversation.reader.length == len(conversation.ids) < 256
    assert len(list(conversation.answer("hi", 7))) == 7


def test_what_leaves_no_room_is_refused(small: SmolLM2) -> None:
    with pytest.raises(ContextFull):
        Conversation(small, "a" * 300).read_opening()


def test_a_long_text_is_read_in_pieces(small: SmolLM2, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small, "context", 4 * AT_ONCE)
    conversation = Conversation(small, "the " * (AT_ONCE + 90))
    seen: list[tuple[int, int]] = []
    conversation.read_opening(lambda done, total: seen.append((done, total)))
    total = conversation.reader.length
    assert seen == [(AT_ONCE, total), (total, total)]
    whole = small.hidden(conversation.ids, small.caches(FastCache))[-1:]
    conversation.reader.forget(total - 1)
    np.testing.assert_allclose(conversation.reader.read(conversation.ids[-1:]), small.logits(whole)[0], atol=1e-4)


def test_the_model_is_told_who_it_is(small: SmolLM2) -> None:
    assert spoken(Conversation(small)) == f"<|im_start|>system\n{SYSTEM}<|im_end|>"


class TestComparison:
    def test_reads_the_same_with_plain_attention(self, small: SmolLM2) -> None:
        conversation = Conversation(small)
        comparison = Comparison(conversation)
        for question in ("the bat", "and then"):
            conversation.reader.restart_clock()
            list(conversation.answer(question, 9))
            comparison.catch_up()
            fast, plain = conversation.reader, comparison.plain
            assert plain.length == fast.length
            for ours, theirs in ((fast.prefill, plain.prefill), (fast.decode, plain.decode)):
                assert (ours.tokens, ours.tokens > 0) == (theirs.tokens, True)
                assert 0 < theirs.attention < theirs.seconds
                assert 0 < theirs.share < 1
        fast.forget(len(conversation.ids) - 2)
        plain.forget(len(conversation.ids) - 2)
        token = conversation.ids[-2:-1]
        np.testing.assert_allclose(fast.read(token), plain.read(token), rtol=0, atol=1e-4)

    def test_follows_a_conversation_that_begins_anew(self, small: SmolLM2) -> None:
        conversation = Conversation(small)
        comparison = Comparison(conversation)
        list(conversation.answer("the bat", 9))
        comparison.catch_up()
        conversation.restart()
        list(conversation.answer("and then", 9))
        comparison.catch_up()
        fast, plain = conversation.reader, comparison.plain
        assert plain.length == fast.length
        np.testing.assert_allclose(fast.read([5]), plain.read([5]), rtol=0, atol=1e-4)


class TestSampling:
    LOGITS = np.log(np.array([0.1, 0.05, 0.5, 0.0, 0.35], np.float32).clip(1e-30))

    def drawn(self, temperature: float, top_p: float, count: int = 4000) -> list[float]:
        sampling = Sampling(temperature, top_p, np.random.default_rng(0))
        return (np.bincount([sampling.choose(self.LOGITS) for _ in range(count)], minlength=5) / count).tolist()

    def test_greedy_is_the_greatest(self) -> None:
        assert Sampling().choose(self.LOGITS) == 2
        assert Sampling(1e-300).choose(self.LOGITS) == 2
        assert Sampling(1e-320).choose(self.LOGITS) == 2  # differences overflow, and nothing is said of it

    def test_words_are_drawn_as_likely_as_they_are(self) -> None:
        np.testing.assert_allclose(self.drawn(1.0, 1.0), [0.1, 0.05, 0.5, 0.0, 0.35], atol=0.03)

    def test_temperature_is_the_power(self) -> None:
        weights = np.array([0.1, 0.05, 0.5, 0.0, 0.35]) ** 2
        np.testing.assert_allclose(self.drawn(0.5, 1.0), weights / weights.sum(), atol=0.03)

    @pytest.mark.parametrize(
        ("top_p", "drawn_from"),
        [(0.0, {2}), (0.4, {2}), (0.51, {2, 4}), (0.84, {2, 4}), (0.9, {0, 2, 4}), (1.0, {0, 1, 2, 4})],
    )
    def test_top_p_leaves_the_likeliest(self, top_p: float, drawn_from: set[int]) -> None:
        assert {token for token, share in enumerate(self.drawn(1.0, top_p)) if share} == drawn_from

    def test_a_seed_says_what_is_drawn(self, small: SmolLM2) -> None:
        answers = [
            list(Conversation(small, sampling=Sampling(1.0, 0.9, np.random.default_rng(seed))).answer("the", 12))
            for seed in (1, 1, 2)
        ]
        assert answers[0] == answers[1] != answers[2]
