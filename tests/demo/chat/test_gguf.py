"""GGUF files: values and tensors as they were written, and files that are none."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf_files
import numpy as np
import pytest

from fastattn.console.terminal import UserError
from fastattn.demo.chat.gguf import GGUF
from fastattn.demo.chat.model import SmolLM2, model_file

FACTS = {
    "text": "schön",
    "flag": ("bool", True),
    "byte": ("u1", 200),
    "number": ("i4", -5),
    "large": ("u8", 1 << 40),
    "half": ("f4", 0.5),
    "third": ("f8", 1 / 3),
    "words": ["", "a", "b c"],
    "numbers": [("u4", 1), ("u4", 2)],
}


def test_values_of_every_kind(tmp_path: Path) -> None:
    found = GGUF(gguf_files.written(tmp_path / "file", FACTS, {})).facts
    assert found == {name: given[1] if isinstance(given, tuple) else given for name, given in FACTS.items()} | {
        "numbers": [1, 2]
    }


@pytest.mark.parametrize("kind", ["f4", "q4_1", "q8_0"])
def test_tensors_are_what_was_written(tmp_path: Path, kind: str) -> None:
    arrays = {f"of {rows}": np.random.default_rng(rows).standard_normal((rows, 64)) for rows in (1, 3, 50)}
    file = GGUF(gguf_files.written(tmp_path / "file", FACTS, {name: (each, kind) for name, each in arrays.items()}))
    for name, array in arrays.items():
        found = file.tensor(name)
        assert (found.dtype, found.shape) == (np.float32, array.shape)
        # the largest step between numbers of 4 or of 8 bits, of a block whose numbers are up to `span` apart
        span = 2 * np.abs(array).max()
        step = {"f4": 1e-6, "q4_1": span / 15, "q8_0": span / 254}[kind]
        np.testing.assert_allclose(found, array, rtol=0, atol=0.52 * step)


def test_blocks_of_four_bits_by_the_formula(tmp_path: Path) -> None:
    array = np.random.default_rng(0).standard_normal((1, 64))
    _, data = gguf_files.quantised(array, "q4_1")
    expected = []
    for start in (0, 20):
        scale, least = np.frombuffer(data, "<f2", 2, start).astype(np.float32)
        numbers = [byte & 15 for byte in data[start + 4 : start + 20]] + [
            byte >> 4 for byte in data[start + 4 : start + 20]
        ]
        expected += [scale * np.float32(number) + least for number in numbers]
    found = GGUF(gguf_files.written(tmp_path / "file", {}, {"it": (array, "q4_1")})).tensor("it")
    assert found[0].tolist() == expected


@pytest.mark.parametrize(
    "name", ["token_embd.weight", "blk.7.attn_k.weight", "blk.29.ffn_down.weight", "output_norm.weight"]
)
def test_tensors_of_the_model_are_those_of_the_package_gguf(name: str) -> None:
    theirs = pytest.importorskip("gguf", reason="gguf, the oracle of this test, is not installed")
    try:
        path = model_file()
    except UserError as error:
        pytest.skip(str(error))
    (tensor,) = (each for each in theirs.GGUFReader(path).tensors if each.name == name)
    expected = theirs.dequantize(tensor.data, tensor.tensor_type)
    np.testing.assert_array_equal(GGUF(path).tensor(name), expected)


def broken(data: bytes) -> dict[str, bytes]:
    """Return files that are not whole, by what is said of them."""
    return {
        "not a GGUF file": b"",
        "not a GGUF file of": b"PK\3\4" + data[4:],
        "of version 2 or 3": b"GGUF\1\0\0\0" + data[8:],
        "ends in the middle": data[:900],
        "it ends before": data[:-100],
    }


@pytest.mark.parametrize("message", broken(b""))
def test_a_broken_file_is_refused_in_one_line(tmp_path: Path, message: str) -> None:
    whole = gguf_files.small_model(tmp_path / "whole").read_bytes()
    path = tmp_path / "broken"
    path.write_bytes(broken(whole)[message])
    with pytest.raises(UserError, match=message) as caught:
        SmolLM2.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def other(**changes: Any) -> dict[str, Any]:
    """Return facts of a model that is another one."""
    return {"general.architecture": "llama", "tokenizer.ggml.pre": "smollm"} | changes


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({}, "it has no 'general.architecture'"),
        (other(), "it has no 'tokenizer.ggml.tokens'"),
        (other(**{"general.architecture": "gpt2"}), "it holds another model, gpt2"),
    ],
)
def test_another_model_is_refused(tmp_path: Path, facts: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SmolLM2.load(gguf_files.written(tmp_path / "file", facts, {}))


def nested(depth: int) -> bytes:
    """Return a file with one fact, lists in lists."""
    fact = gguf_files.string("deep") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * depth
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + fact


def test_lists_in_lists_without_end_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(nested(100_000))
    with pytest.raises(UserError, match="it holds lists of lists") as caught:
        SmolLM2.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("alignment", [("u4", 0), ("i4", -8), ("f4", 32.0), "32", [("u4", 32)]], ids=str)
def test_an_alignment_that_is_none_is_refused(tmp_path: Path, alignment: Any) -> None:
    path = gguf_files.written(tmp_path / "file", {"general.alignment": alignment}, {})
    with pytest.raises(ValueError, match="its tensors begin at multiples of"):
        GGUF(path)


@pytest.mark.parametrize("shape", [(0, 1 << 63), (1 << 63, 2), (3, 5), (1, 1, 1, 1, 32), (1 << 32, 1 << 32)], ids=str)
def test_a_shape_that_is_none_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + gguf_files.string("it")
    path = tmp_path / "file"
    path.write_bytes(head + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 8, 0) + bytes(2000))
    with pytest.raises(ValueError, match="it has shape|ends before it does"):
        GGUF(path).tensor("it")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("llama.attention.head_count", "four", "its llama.attention.head_count is 'four'"),
        ("llama.attention.head_count", ("u4", 0), "its llama.attention.head_count is 0"),
        ("llama.attention.head_count_kv", ("u4", 3), "it has 4 heads over 3"),
        ("llama.rope.dimension_count", ("u4", 16), r"token_embd.weight has shape \(.*, 32\); expected \(.*, 64\)"),
        ("llama.rope.freq_base", ("f4", float("nan")), "its llama.rope.freq_base is nan"),
        ("llama.block_count", ("u4", 2**32 - 1), "it has no 'blk.1"),
        ("tokenizer.ggml.tokens", [("u4", 3)], "its tokenizer.ggml.tokens is no list of str"),
        ("tokenizer.ggml.merges", ["Ġ a", "no where"], r"its pieces \('no', 'where'\) become no token"),
        ("tokenizer.ggml.token_type", [("i4", 1)], "shorter"),
        ("tokenizer.ggml.tokens", [f"{n} of them" for n in range(263)], "its token 3, '3 of them', is spelled in"),
    ],
)  # fmt: skip
def test_a_model_that_says_nonsense_is_refused(tmp_path: Path, name: str, value: Any, message: str) -> None:
    path = gguf_files.small_model(tmp_path / "file", layers=1, changes={name: value})
    with pytest.raises(UserError, match=message) as caught:
        SmolLM2.load(path)
    assert str(path) in str(caught.value)


def test_a_folder_or_nothing_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match="cannot read the model"):
            SmolLM2.load(path)


def test_a_format_that_is_not_read_is_named(tmp_path: Path) -> None:
    path = gguf_files.written(tmp_path / "file", {}, {"it": (np.ones((1, 32)), "f4")})
    data = bytearray(path.read_bytes())
    at = data.index(b"it") + 2 + 4 + 16  # the name, the number of axes, and two axes
    data[at] = 2
    path.write_bytes(data)
    with pytest.raises(ValueError, match="it is in format 2, which is not read here"):
        GGUF(path).tensor("it")
