"""Tokens: what a tokenizer gives, as labels and as running text."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from fastattn.console import terminal
from fastattn.plot import tokens

matplotlib = pytest.importorskip("matplotlib", reason="matplotlib, which draws the plots, is not installed")
matplotlib.use("agg")


class TestTokens:
    @pytest.mark.parametrize(
        ("pieces", "text"),
        [
            (["un", "##believ", "##able", ",", "isn", "'", "t", "it", "?"], "unbelievable, isn't it?"),
            (["Hello", "Ġworld", "!", "Ġ(", "ok", ")"], "Hello world! (ok)"),
            (["▁New", "▁York", "er", "s"], "New Yorkers"),
            (["Once", " upon", " a", " time"], "Once upon a time"),
            (["see", "(", "below", ")", "."], "see (below)."),
            (["東", "京", "tower"], "東京 tower"),
            (["a", "\n", "b", "Ċ"], "a \\n b \\n"),
            (["<s>", "Hello", "Ġtoken", "ization", "</s>"], "<s> Hello tokenization </s>"),
            (["▁Hello", "▁world", "</s>"], "Hello world </s>"),
            (["<|im_start|>", "user", "Ċ", "Hi", "Ġthere"], "<|im_start|> user \\n Hi there"),
            (["▁anti", "dis", "establish", "ment"], "antidisestablishment"),
            # a few marks by chance make no tokenizer's list of words
            (["the", "cat", " sat", "on", "it"], "the cat sat on it"),
            (["The", "▁cat", "sat", "on"], "The cat sat on"),
            (["a", "good", "▁", "film"], "a good ␣ film"),
            (["un", "##do", " it", "now"], "undo it now"),
            (["##ing", "##"], "##ing ##"),
            (["", " ", "\x1b[2J"], "∅ ␣ [2J"),
        ],
    )
    def test_running_text(self, pieces: list[str], text: str) -> None:
        words = tokens.running_text(pieces)
        assert len(words) == len(pieces)
        assert "".join(gap + word for gap, word in words) == text

    def test_columns_of_tables_are_sequences(self) -> None:
        column = SimpleNamespace(tolist=lambda: ["a", "b"])
        assert tokens.as_tokens("keys", column, 2, "key") == tokens.as_tokens("keys", np.array(["a", "b"]), 2, "key")

    def test_labels_are_short_and_never_empty(self) -> None:
        assert [tokens.label(each) for each in ("", " ", "\n", "▁the", "Ġ")] == ["∅", "␣", "\\n", "the", "␣"]
        assert terminal.display_width(tokens.label("東" * 40)) <= tokens.LONGEST_LABEL
