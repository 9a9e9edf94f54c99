"""GGUF files for tests: a writer, and a language model of two layers that has learned nothing."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

#: The number of each kind of value, and how `struct` spells it.
KINDS = {
    "u1": (0, "B"),
    "u4": (4, "I"),
    "i4": (5, "i"),
    "f4": (6, "f"),
    "bool": (7, "?"),
    "u8": (10, "Q"),
    "f8": (12, "d"),
}
BLOCK = 32
ALIGNMENT = 32


def string(text: str) -> bytes:
    """Return a string as the file has it."""
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def value(given: Any) -> bytes:
    """Return a value with its kind: a string, a list of values of one kind, or a pair of kind and number."""
    if isinstance(given, str):
        return struct.pack("<I", 8) + string(given)
    if isinstance(given, list):
        items = [value(item) for item in given]
        return (
            struct.pack("<I", 9) + items[0][:4] + struct.pack("<Q", len(items)) + b"".join(item[4:] for item in items)
        )
    kind, number = given
    return struct.pack("<I", KINDS[kind][0]) + struct.pack("<" + KINDS[kind][1], number)


def quantised(array: Any, kind: str) -> tuple[int, bytes]:
    """Return the number of a format, and the data of an array in it."""
    if kind == "f4":
        return 0, array.astype("<f4").tobytes()
    blocks = array.reshape(-1, BLOCK).astype(np.float64)
    if kind == "q8_0":
        scale = (np.abs(blocks).max(axis=1) / 127).astype("<f2")
        numbers = np.rint(blocks / np.maximum(scale, 1e-6)[:, None]).clip(-127, 127).astype("i1")
        return 8, b"".join(s.tobytes() + n.tobytes() for s, n in zip(scale, numbers, strict=True))
    least = blocks.min(axis=1).astype("<f2")
    scale = ((blocks.max(axis=1) - least) / 15).astype("<f2")
    numbers = np.rint((blocks - least[:, None]) / np.maximum(scale, 1e-6)[:, None]).clip(0, 15).astype("u1")
    pairs = numbers[:, : BLOCK // 2] | numbers[:, BLOCK // 2 :] << 4
    return 3, b"".join(s.tobytes() + m.tobytes() + p.tobytes() for s, m, p in zip(scale, least, pairs, strict=True))


def written(path: Path, facts: Mapping[str, Any], tensors: Mapping[str, tuple[Any, str]]) -> Path:
    """Write a file of version 3, and return its path."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(facts))
    head += b"".join(string(name) + value(given) for name, given in facts.items())
    body = b""
    for name, (array, kind) in tensors.items():
        number, data = quantised(array, kind)
        axes = struct.pack(f"<I{array.ndim}Q", array.ndim, *reversed(array.shape))
        head += string(name) + axes + struct.pack("<IQ", number, len(body))
        body += data + bytes(-len(data) % ALIGNMENT)
    path.write_bytes(head + bytes(-len(head) % ALIGNMENT) + body)
    return path


#: The first letters in the vocabulary's spelling of bytes, which begins with those that are printable.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LETTERS = [*map(chr, PRINTABLE), *(chr(256 + n) for n in range(256 - len(PRINTABLE)))]
MERGES = ["Ġ a", "t h", "th e", "Ġ the"]


def small_model(path: Path, layers: int = 2, context: int = 256, changes: Mapping[str, Any] | None = None) -> Path:
    """Write a model of 32 dimensions, of random weights: 4 query heads share 2 heads of keys and values.

    It says of itself what `changes` has, instead.
    """
    rng = np.random.default_rng(0)
    tokens = [*MARKS, *LETTERS, *(merge.replace(" ", "") for merge in MERGES)]

    def weights(*shape: int) -> Any:
        return rng.standard_normal(shape) / np.sqrt(shape[-1])

    tensors = {"token_embd.weight": (weights(len(tokens), 32), "q8_0"), "output_norm.weight": (np.ones(32), "f4")}
    shapes = {
        "attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32),
        "ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64),
    }  # fmt: skip
    for layer in range(layers):
        tensors |= {f"blk.{layer}.{name}.weight": (3 * weights(*shape), "q4_1") for name, shape in shapes.items()}
        tensors |= {f"blk.{layer}.{name}.weight": (np.ones(32), "f4") for name in ("attn_norm", "ffn_norm")}
    facts = {
        "general.architecture": "llama",
        "llama.block_count": ("u4", layers),
        "llama.context_length": ("u4", context),
        "llama.attention.head_count": ("u4", 4),
        "llama.attention.head_count_kv": ("u4", 2),
        "llama.rope.dimension_count": ("u4", 8),
        "llama.rope.freq_base": ("f4", 1e5),
        "llama.attention.layer_norm_rms_epsilon": ("f4", 1e-5),
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [("i4", 3 if token in MARKS else 1) for token in tokens],
        "tokenizer.ggml.merges": MERGES,
    }
    return written(path, facts | dict(changes or {}), tensors)
