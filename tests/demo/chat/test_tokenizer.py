"""Text to tokens and back, against the library `tokenizers` and the model's own vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf_files
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastattn.console.terminal import UserError
from fastattn.demo.chat.gguf import GGUF
from fastattn.demo.chat.model import model_file
from fastattn.demo.chat.tokenizer import Tokenizer

TEXTS = [
    "It's 12 o'clock, don't you think?  I'll say: they've 3.5 x_1 we're\t\n\n  end ",
    "caf\u00e9 \u6771\u4eac 一二 \u0663\u00bd\u2167 \U0001f642\u200d\ufe0f e\u0301 \u00a0 \u2003\u0085y\x1c\x1d z\x1c1",
    "def f(x):\n    return x ** 2  # squared\n\n\n",
    "'s 'S '  ''ll a'b",
]


def of_file(path: Path) -> Tokenizer:
    """Return the tokenizer of a file."""
    facts = GGUF(path).facts
    return Tokenizer(*(facts[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type", "merges")))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Return a tokenizer of single bytes, and of what `MERGES` joins."""
    return of_file(gguf_files.small_model(tmp_path_factory.mktemp("small") / "model"))


@pytest.fixture(scope="module")
def real() -> Tokenizer:
    """Return that of SmolLM2."""
    try:
        return of_file(model_file())
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def theirs(real: Tokenizer) -> Any:
    """Return the same in the library tokenizers."""
    library = pytest.importorskip("tokenizers", reason="tokenizers, the oracle of this test, is not installed")
    facts = GGUF(model_file()).facts
    vocabulary = {token: number for number, token in enumerate(facts["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    found = library.Tokenizer(library.models.BPE(vocabulary, merges))
    found.pre_tokenizer = library.pre_tokenizers.Sequence(
        [
            library.pre_tokenizers.Digits(individual_digits=True),
            library.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return found


# characters that Python's tables of Unicode have, as those of the library do
_TEXT = st.text(st.characters(exclude_categories=("Cs", "Cn", "Co")), max_size=40) | st.text(
    "ab 1'_\ns.t\u00a0", max_size=40
)


@given(_TEXT)
@example(TEXTS[0])
@example(TEXTS[1])
@example(TEXTS[2])
@example(TEXTS[3])
def test_tokens_are_those_of_the_library(real: Tokenizer, theirs: Any, text: str) -> None:
    assert real.encode(text) == theirs.encode(text).ids


@given(_TEXT)
def test_bytes_of_tokens_are_those_of_the_text(small: Tokenizer, text: str) -> None:
    assert b"".join(map(small.bytes_of, small.encode(text))) == text.encode()


def test_pairs_are_joined_in_their_order(small: Tokenizer) -> None:
    pieces = [small.bytes_of(number) for number in small.encode("then the bat and 12")]
    joined = [b"the", b"n", b" the", b" ", b"b", b"a", b"t", b" a", b"n", b"d", b" ", b"1", b"2"]
    assert pieces == joined


def test_marks_that_are_spelled_out_are_text(small: Tokenizer) -> None:
    assert list(small.marks) == gguf_files.MARKS
    for mark, number in small.marks.items():
        assert number not in small.encode(f"a {mark} b")
        assert small.bytes_of(number) == b""


def test_half_a_character_is_read_as_a_question_mark(small: Tokenizer) -> None:
    """A terminal that is not in UTF-8 may send one."""
    assert small.encode("a\udcffb") == small.encode("a?b")


def test_a_long_word_takes_no_time_to_speak_of(small: Tokenizer) -> None:
    assert len(small.encode("the" * 20_000)) == 20_000
