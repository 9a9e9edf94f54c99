"""Listening without the model's weights: wav files, the spectrogram, the file's format, tokens, rules, pictures."""

from __future__ import annotations

import io
import struct
import tracemalloc
import wave
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fastattn.console.terminal import Style, UserError
from fastattn.demo.listen import attention, cli, ctranslate2, decoding, listener, mel, picture, sound, vocabulary
from fastattn.demo.spelling import SPELLED

PLAIN = Style(colour=False, blocks=True, width=80)
LANGUAGES = ["en", "fr", "ja"]


@pytest.fixture(scope="module")
def tokens() -> vocabulary.Vocabulary:
    """Return a vocabulary like Whisper's, in small: 256 bytes and some words, then marks."""
    pieces = [*(SPELLED[byte] for byte in range(256)), "Ġhello", "Ġworld", "ly", "ĠâĢ", "ľ"]
    marks = ["endoftext", "startoftranscript", *LANGUAGES, "translate", "transcribe", "startoflm", "startofprev"]
    times = [f"{index * 0.02:.2f}" for index in range(1501)]
    names = [f"<|{name}|>" for name in [*marks, "nocaptions", "notimestamps", *times]]
    numbers = {name: len(pieces) + index for index, name in enumerate(names)}
    config = {
        "lang_ids": [numbers[f"<|{code}|>"] for code in LANGUAGES],
        "suppress_ids": [ord("#"), numbers["<|startoftranscript|>"], numbers["<|translate|>"]],
        "alignment_heads": [[3, 1], [5, 6]],
    }
    return vocabulary.Vocabulary([*pieces, *names], config)


def wav(data: bytes, code: int = 1, channels: int = 1, rate: int = sound.RATE, bits: int = 16) -> bytes:
    """Return a wav file with these bytes as its sound."""
    header = struct.pack("<HHIIHH", code, channels, rate, rate * channels * bits // 8, channels * bits // 8, bits)
    chunks = b"".join(
        name + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)
        for name, content in ((b"LIST", b"odd"), (b"fmt ", header), (b"data", data))
    )
    return b"RIFF" + struct.pack("<I", len(chunks) + 4) + b"WAVE" + chunks


class TestSound:
    @pytest.mark.parametrize(
        ("code", "bits", "encode"),
        [
            (1, 8, lambda x: np.round(x * 127 + 128).astype(np.uint8).tobytes()),
            (1, 16, lambda x: np.round(x * 32767).astype("<i2").tobytes()),
            (1, 24, lambda x: np.round(x * (2**23 - 1)).astype("<i4").view(np.uint8).reshape(-1, 4)[:, :3].tobytes()),
            (1, 32, lambda x: np.round(x * (2**31 - 1)).astype("<i4").tobytes()),
            (3, 32, lambda x: x.astype("<f4").tobytes()),
            (3, 64, lambda x: x.astype("<f8").tobytes()),
        ],
    )
    def test_every_kind_of_sample_is_read(self, code: int, bits: int, encode: Any) -> None:
        samples = np.random.default_rng(1).uniform(-1, 1, 1001)
        read = sound.read_wav(wav(encode(samples), code, bits=bits))
        assert read.dtype == np.float32
        np.testing.assert_allclose(read, samples, rtol=0, atol=2.0 ** (2 - min(bits, 24)))

    def test_a_file_of_the_standard_library_is_read_and_channels_become_their_mean(self) -> None:
        left, right = np.random.default_rng(2).integers(-(2**15), 2**15, (2, 100))
        file = io.BytesIO()
        with wave.open(file, "wb") as writer:
            writer.setnchannels(2)
            writer.setsampwidth(2)
            writer.setframerate(sound.RATE)
            writer.writeframes(np.stack([left, right], axis=1).astype("<i2").tobytes())
        expected = (left + right) / 2 / 2**15
        np.testing.assert_allclose(sound.read_wav(file.getvalue()), expected, rtol=0, atol=1e-6)

    def test_extensible_headers_and_sizes_that_nobody_knew_are_understood(self) -> None:
        data = np.arange(-50, 50, dtype="<i2").tobytes()
        header = struct.pack("<HHIIHH", 0xFFFE, 1, sound.RATE, 2 * sound.RATE, 2, 16) + struct.pack(
            "<HHIH", 22, 16, 4, 1
        )
        header += bytes(14)
        file = (
            b"RIFF\xff\xff\xff\xffWAVEfmt " + struct.pack("<I", len(header)) + header + b"data\xff\xff\xff\xff" + data
        )
        np.testing.assert_array_equal(sound.read_wav(file), np.arange(-50, 50) / 2**15)

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (b"", "does not begin"),
            (b"ID3 and so on", "does not begin"),
            (b"RIFF\0\0\0\0WAVE", "ends before"),
            (wav(b"")[:40], "ends before"),
            (wav(b""), "no sound"),
            (wav(b"1"), "no sound"),
            (wav(b"12", code=7, bits=8), "format 7 with 8 bits"),
            (wav(b"1234", bits=12), "format 1 with 12 bits"),
            (wav(b"12", channels=0), "0 channels"),
            (wav(b"12", rate=0), "0 samples a second"),
            (wav(b"12", rate=999), "999 samples a second; expected 1000 to 384000"),
            (wav(b"12", rate=2**31 - 1), "2147483647 samples a second; expected 1000 to 384000"),
            (wav(np.array([1e300], "<f8").tobytes(), 3, bits=64), "no numbers"),
            (wav(np.array([np.nan], "<f4").tobytes(), 3, bits=32), "no numbers"),
        ],
    )
    def test_what_is_no_wav_file_is_refused(self, data: bytes, message: str) -> None:
        with pytest.raises(ValueError, match=message) as caught:
            sound.read_wav(data)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("rate", [8000, 11025, 22050, 22255, 44100, 48000, 96000])
    def test_a_tone_is_the_same_tone_at_another_rate(self, rate: int) -> None:
        tone = np.sin(2 * np.pi * 1000 * np.arange(rate // 2) / rate).astype(np.float32)
        found = sound.resample(tone, rate, sound.RATE)
        assert found.dtype == np.float32
        assert len(found) == -(-len(tone) * sound.RATE // rate)
        inner = slice(200, -200)  # at its ends there is silence around it
        expected = np.sin(2 * np.pi * 1000 * np.arange(len(found)) / sound.RATE)
        np.testing.assert_allclose(found[inner], expected[inner], rtol=0, atol=1e-3)  # -60 dB

    def test_a_tone_that_the_lower_rate_cannot_have_is_gone(self) -> None:
        tone = np.sin(2 * np.pi * 9000 * np.arange(24000) / 48000).astype(np.float32)
        assert np.abs(sound.resample(tone, 48000, sound.RATE)[200:-200]).max() < 1e-3  # -60 dB

    def test_a_level_stays_what_it_is(self) -> None:
        found = sound.resample(np.ones(4410, np.float32), 44100, sound.RATE)
        np.testing.assert_allclose(found[100:-100], 1, rtol=0, atol=1e-5)

    def test_a_few_samples_at_a_rate_with_nothing_in_common_take_little_memory(self) -> None:
        tracemalloc.start()
        found = sound.resample(np.ones(10, np.float32), 383_999, sound.RATE)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(found) == 1
        assert most < 1 << 20

    def test_the_same_rate_changes_nothing(self) -> None:
        samples = np.arange(5, dtype=np.float32)
        assert sound.resample(samples, 16000, 16000) is samples


class TestFile:
    def test_standard_input_is_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        file = io.BytesIO(wav(np.arange(5, dtype="<i2").tobytes()))
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=file))
        np.testing.assert_array_equal(cli.read_sound("-"), np.arange(5) / 2**15)

    def test_a_file_that_is_no_sound_is_one_line(self, tmp_path: Path) -> None:
        file = tmp_path / "text\x1b.wav"
        file.write_text("no sound")
        with pytest.raises(
            UserError, match="text .wav is not a wav file that can be read: it does not begin"
        ) as caught:
            cli.read_sound(str(file))
        assert str(caught.value).isprintable()


class TestSpectrogram:
    def test_it_is_that_of_transformers(self) -> None:
        reason = "transformers, the oracle of this test, is not installed"
        transformers = pytest.importorskip("transformers", reason=reason)
        rng = np.random.default_rng(3)
        samples = (rng.standard_normal(5 * sound.RATE) * np.linspace(0, 0.3, 5 * sound.RATE)).astype(np.float32)
        samples += np.sin(np.arange(len(samples)) * 0.1).astype(np.float32) * np.float32(0.2)
        extractor = transformers.WhisperFeatureExtractor()
        expected = extractor(samples, sampling_rate=sound.RATE, return_tensors="np").input_features[0]
        # Theirs is computed in float32: an amplitude 80 dB below the loudest, 1e-4 of it, is off by a rounding of the
        # loudest in each of the transform's nine steps, its energy by twice as much; a quarter of its logarithm counts
        tolerance = 2 * 9 * 2.0**-24 * 1e4 / np.log(10) / 4
        np.testing.assert_allclose(mel.log_mel(samples), expected.T, rtol=0, atol=tolerance)

    def test_each_band_is_a_triangle_of_area_one(self) -> None:
        filters = mel._filters()
        assert filters.shape == (mel.BANDS, 201)
        assert (filters >= 0).all()
        centres = filters.argmax(axis=1)
        assert (np.diff(centres) >= 0).all()
        step = sound.RATE / mel.FRAME
        wide = centres > 60  # of enough frequencies for a sum to be an integral
        np.testing.assert_allclose(filters[wide].sum(axis=1) * step, 1, rtol=0.02)

    def test_silence_is_even_and_sound_of_less_than_a_window_is_completed(self) -> None:
        assert np.ptp(mel.log_mel(np.zeros(0, np.float32))) == 0
        assert mel.log_mel(np.ones(17, np.float32)).shape == (mel.FRAMES, mel.BANDS)


def model_file() -> bytes:
    """Return the bytes of a small file of CTranslate2's."""

    def text(name: str) -> bytes:
        return struct.pack("<H", len(name) + 1) + name.encode() + b"\0"

    matrix = np.arange(6, dtype="<f2")
    variables = text("a/weight") + struct.pack("<BIIBI", 2, 2, 3, 4, 12) + matrix.tobytes()
    variables += text("b") + struct.pack("<BBI", 0, 1, 1) + b"\x07"
    head = struct.pack("<I", 6) + text("Spec") + struct.pack("<II", 3, 2)
    return head + variables + struct.pack("<I", 1) + text("again") + text("a/weight")


class TestFormat:
    def test_variables_and_aliases_are_read(self) -> None:
        kind, variables = ctranslate2.read_variables(model_file())
        assert kind == "Spec"
        assert sorted(variables) == ["a/weight", "again", "b"]
        np.testing.assert_array_equal(variables["a/weight"], np.arange(6, dtype=np.float16).reshape(2, 3))
        assert variables["again"] is variables["a/weight"]
        assert variables["b"].shape == ()
        assert variables["b"].dtype == np.int8
        assert variables["b"] == 7

    def test_a_file_that_ends_anywhere_is_refused(self) -> None:
        for end in range(len(model_file())):
            with pytest.raises(ValueError, match="."):
                ctranslate2.read_variables(model_file()[:end])

    def test_another_version_is_refused(self) -> None:
        with pytest.raises(ValueError, match="version 5 of the format; expected 6"):
            ctranslate2.read_variables(b"\x05" + model_file()[1:])


def number(tokens: vocabulary.Vocabulary, seconds: float) -> int:
    """Return the mark of a moment."""
    return tokens.first_time + round(seconds / vocabulary.TICK)


class TestTokens:
    def test_text_is_what_the_bytes_say(self, tokens: vocabulary.Vocabulary) -> None:
        text = " hello — 東京 é\n\0~"
        assert tokens.text([*text.encode(), number(tokens, 1.0), tokens.end]) == text
        assert tokens.text([256, 257, 258]) == " hello worldly"
        assert tokens.text("é".encode()[:1]) == "�"

    def test_words_keep_their_punctuation_but_not_its_tokens(self, tokens: vocabulary.Vocabulary) -> None:
        written = [256, *b",", 257, 258, *b"'s", *b".", 259, 260, *b"hello"]
        assert tokens.words(written, "en") == [
            ("hello,", range(1)),
            ("worldly's.", range(2, 6)),
            ("“hello", range(7, 14)),
        ]

    def test_without_spaces_a_word_is_a_character(self, tokens: vocabulary.Vocabulary) -> None:
        assert tokens.words(list("東京。".encode()), "ja") == [("東", range(3)), ("京。", range(3, 6))]
        assert tokens.words(list("東京。".encode()), "en") == [("東京。", range(6))]

    def test_marks(self, tokens: vocabulary.Vocabulary) -> None:
        prompt = tokens.prompt("fr", translate=True)
        assert prompt == [tokens.start, tokens.languages["fr"], tokens.translate]
        assert not any(map(tokens.is_time, prompt))
        assert tokens.seconds(number(tokens, 29.98)) == pytest.approx(29.98)


class TestRules:
    def allowed(self, tokens: vocabulary.Vocabulary, written: list[int]) -> set[str]:
        """Return which kinds of tokens may follow, where a text and the end are far likelier than a mark."""
        logits = np.zeros(tokens.first_time + 1501, np.float32)
        logits[[256, tokens.end]] = 50.0
        decoding.restrict(logits, written, tokens)
        found = np.flatnonzero(np.isfinite(logits))
        kinds = {"text": found < tokens.end, "end": found == tokens.end, "time": found >= tokens.first_time}
        return {kind for kind, are in kinds.items() if are.any()}

    def test_what_may_follow(self, tokens: vocabulary.Vocabulary) -> None:
        begin, later = number(tokens, 0.0), number(tokens, 2.0)
        assert self.allowed(tokens, []) == {"time"}
        assert self.allowed(tokens, [begin]) == {"text", "end"}
        assert self.allowed(tokens, [begin, 256]) == {"text", "end", "time"}
        assert self.allowed(tokens, [begin, 256, later]) == {"end", "time"}
        assert self.allowed(tokens, [begin, 256, later, later]) == {"text", "end"}

    def test_times_do_not_go_back(self, tokens: vocabulary.Vocabulary) -> None:
        for written, first in (
            ([number(tokens, 1.0), 256], 1.02),
            ([number(tokens, 1.0), 256, number(tokens, 3.0)], 3.0),
            ([number(tokens, 1.0), 256, number(tokens, 3.0), number(tokens, 3.0), 256], 3.02),
        ):
            logits = np.zeros(tokens.first_time + 1501, np.float32)
            decoding.restrict(logits, written, tokens)
            marks = np.flatnonzero(np.isfinite(logits[tokens.first_time :])) * vocabulary.TICK
            assert marks[0] == pytest.approx(first)

    def test_a_mark_comes_where_all_marks_together_are_likelier(self, tokens: vocabulary.Vocabulary) -> None:
        for text, finite in ((7.0, False), (8.0, True)):  # log(1500) is between them
            logits = np.zeros(tokens.first_time + 1501, np.float32)
            logits[256] = text
            decoding.restrict(logits, [number(tokens, 0.0), 256], tokens)
            assert np.isfinite(logits[256]) == finite

    def test_they_are_those_of_transformers(self, tokens: vocabulary.Vocabulary) -> None:
        torch = pytest.importorskip("torch", reason="PyTorch, which transformers needs, is not installed")
        reason = "transformers, the oracle of this test, is not installed"
        process = pytest.importorskip("transformers.generation.logits_process", reason=reason)
        from transformers import GenerationConfig

        prompt = tokens.prompt("en", translate=False)
        config = GenerationConfig(
            eos_token_id=tokens.end,
            no_timestamps_token_id=tokens.first_time - 1,
            max_initial_timestamp_index=decoding.LATEST_START,
        )
        rules = [
            process.SuppressTokensLogitsProcessor(tokens.never),
            process.WhisperTimeStampLogitsProcessor(config, begin_index=len(prompt)),
        ]
        rng = np.random.default_rng(4)
        for _ in range(100):
            written: list[int] = []
            for _ in range(12):
                logits = rng.normal(scale=3, size=tokens.first_time + 1501).astype(np.float32)
                logits[: tokens.end] += np.float32(rng.uniform(0, 8))
                expected = torch.from_numpy(logits.copy())[None]
                for rule in rules:
                    expected = rule(torch.tensor([[*prompt, *written]]), expected)
                decoding.restrict(logits, written, tokens)
                np.testing.assert_array_equal(logits, expected[0].numpy())
                written.append(int(logits.argmax()))
                if written[-1] == tokens.end:
                    break


class Scripted:
    """A model that writes one prepared text after another, whatever it hears."""

    def __init__(self, size: int, *texts: list[int], sure: float = 30.0) -> None:
        self.size, self.sure = size, sure
        self.texts = list(texts)
        self.rest: list[int] = []

    def caches(self, attention: Any, capacity: int) -> list[Any]:
        """Return nothing: it needs none."""
        return []

    def read(self, tokens: list[int], sound: Any, caches: Any, attention: Any) -> list[Any]:
        """Return what comes next, after a prompt the first token of the next text."""
        if len(tokens) > 1:
            self.rest = self.texts.pop(0)
        token, self.rest = self.rest[0], self.rest[1:] or self.rest
        return [token]

    def logits(self, token: int) -> np.ndarray[Any, Any]:
        """Return how sure it is of this token, and that all others are alike."""
        logits = np.zeros(self.size, np.float32)
        logits[token] = self.sure
        return logits


class TestTries:
    def tried(self, tokens: vocabulary.Vocabulary, *texts: list[int], sure: float = 30.0) -> tuple[str, int]:
        """Return the text that is taken of some prepared ones, and how many are left."""
        model: Any = Scripted(tokens.first_time + 1501, *texts, sure=sure)
        told: list[int] = []
        prompt = tokens.prompt("en", translate=False)
        text = decoding.best_text(model, tokens, [], prompt, attention.Attention(), lambda all: told.append(len(all)))
        assert told[-1] == len(text.tokens)
        return tokens.text(text.tokens), len(model.texts)

    def test_a_text_that_repeats_itself_is_tried_again(self, tokens: vocabulary.Vocabulary) -> None:
        begin, end = number(tokens, 0.0), number(tokens, 2.0)
        loop = [begin, *([256, 257] * 120)]
        good = [begin, 256, 257, end, tokens.end]
        assert self.tried(tokens, loop, good, good) == (" hello world", 1)
        assert self.tried(tokens, good, loop) == (" hello world", 1)
        text, left = self.tried(tokens, *[loop] * len(decoding.TEMPERATURES))
        assert (text.count("hello"), left) == (decoding.LONGEST // 2, 0)  # the last try is taken, whatever it is

    def test_a_guess_is_tried_again(self, tokens: vocabulary.Vocabulary) -> None:
        good = [number(tokens, 0.0), 256, 257, number(tokens, 2.0), tokens.end]
        tries = len(decoding.TEMPERATURES)
        assert self.tried(tokens, *[good] * tries, sure=5.0)[1] == 0
        assert self.tried(tokens, *[good] * tries, sure=20.0)[1] == tries - 1


def test_a_guess_where_probably_nobody_speaks_is_silence() -> None:
    for likely, silence, expected in ((-1.5, 0.9, True), (-0.5, 0.9, False), (-1.5, 0.3, False)):
        assert decoding.Text([1], likely, silence).is_silence == expected


class TestWindows:
    def cut(self, tokens: vocabulary.Vocabulary, *written: float | int) -> Any:
        """Return segments as (start, end, number of tokens), and the end, of a window of 20 s; floats are moments."""
        numbers = [number(tokens, each) if isinstance(each, float) else each for each in written]
        segments, end = listener.cut(numbers, tokens, 20.0)
        return [(round(start, 2), round(stop, 2), len(places)) for start, stop, places in segments], round(end, 2)

    def test_windows_are_cut_at_pairs_of_marks(self, tokens: vocabulary.Vocabulary) -> None:
        # complete to its end: the next begins after the window
        assert self.cut(tokens, 0.0, 256, 3.0, 3.0, 257, 258, 9.0) == ([(0, 3, 3), (3, 9, 4)], 20)
        # what has begun and is not complete is heard again
        assert self.cut(tokens, 0.0, 256, 3.0, 3.0, 257) == ([(0, 3, 3)], 3)
        assert self.cut(tokens, 0.0, 256, 3.0, 3.5) == ([(0, 3, 3)], 3)

    def test_windows_without_pairs_are_one_segment(self, tokens: vocabulary.Vocabulary) -> None:
        assert self.cut(tokens, 1.0, 256, 8.0) == ([(1, 8, 3)], 20)
        assert self.cut(tokens, 1.0, 256) == ([(1, 20, 2)], 20)
        assert self.cut(tokens, 256) == ([(0, 20, 1)], 20)
        assert self.cut(tokens, 1.0, 256, 29.0) == ([(1, 20, 3)], 20)
        assert self.cut(tokens) == ([], 20)


@pytest.mark.parametrize("count", [1, 4])
def test_plain_attention_is_fastattns(count: int) -> None:
    rng = np.random.default_rng(5)
    query, key, value = (rng.standard_normal((8, size, 64)).astype(np.float32) for size in (count, 9, 9))
    fast, plain = attention.Attention(), attention.PlainAttention()
    of_text = []
    for kind in (fast, plain):
        cache = kind.cache(8, 64, 12)
        for part in (slice(0, 9 - count), slice(9 - count, 9)):
            out = kind.of_text(np.resize(query, (8, part.stop - part.start, 64)), key[:, part], value[:, part], cache)
        of_text.append(out)
        assert cache.lengths.tolist() == [9]
    np.testing.assert_allclose(*of_text, rtol=0, atol=1e-5)
    for name in ("of_sound", "to_sound"):
        np.testing.assert_allclose(
            getattr(fast, name)(query, key, value), getattr(plain, name)(query, key, value), rtol=0, atol=1e-5
        )
    recording = attention.RecordingAttention()
    recording.to_sound(query, key, value)
    assert recording.weights[0].shape == (8, count, 9)


def segment(start: float, end: float, window: listener.Window, words: dict[str, float]) -> listener.Segment:
    """Return a segment whose words look at one moment each, with all their weight."""
    looks = np.zeros((len(words), window.moments))
    for row, moment in enumerate(words.values()):
        looks[row, round((moment - window.start) / vocabulary.TICK)] = 1.0
    return listener.Segment(start, end, " ".join(words), list(words), window, looks)


class TestPicture:
    first = listener.Window(0.0, 30.0, [], [])
    second = listener.Window(28.0, 12.0, [], [1])

    def test_a_word_is_drawn_at_its_moment(self) -> None:
        page = [
            segment(28.5, 32.5, self.second, {"one": 28.6, "two": 31.0}),
            segment(32.5, 34, self.second, {"x": 33.9}),
        ]
        start, step, weights = picture.in_steps(page)
        assert (start, step) == pytest.approx((28.4, 0.2))
        assert weights.shape == (3, 28)
        assert weights.argmax(axis=1).tolist() == [1, 13, 27]
        np.testing.assert_allclose(weights.sum(axis=1), 1)
        lines = picture.picture(page, PLAIN)
        assert [line.split()[0] for line in lines if "█" in line][:3] == ["one", "two", "x"]
        assert all(len(line) <= PLAIN.width for line in lines)

    def test_pages_hold_what_is_near_and_of_one_window(self) -> None:
        one, two, three = (segment(at, at + 6.0, self.first, {"a": at}) for at in (0.0, 4.0, 11.0))
        other = segment(29.0, 31.0, self.second, {"a": 30.0})
        assert list(picture.pages([one, two, three, other])) == [[one, two], [three], [other]]
        assert list(picture.pages([])) == []

    def test_a_narrow_terminal_gets_the_moments(self) -> None:
        lines = picture.picture([segment(0, 9, self.first, {"one": 2.5})], Style(False, True, 24))
        assert lines[-1] == "  0:02.5 one"

    def test_a_file_shows_the_first_window(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib", reason="matplotlib, which draws, is not installed")
        file = tmp_path / "words.svg"
        picture.draw([segment(0, 9, self.first, {"one": 2.5}), segment(29, 31, self.second, {"two": 30.0})], file)
        text = file.read_text()
        assert ">one<" in text
        assert ">two<" not in text

    @pytest.mark.parametrize(("seconds", "text"), [(0.0, "0:00.0"), (59.96, "1:00.0"), (3599.9, "59:59.9")])
    def test_clock(self, seconds: float, text: str) -> None:
        assert picture.clock(seconds) == text
