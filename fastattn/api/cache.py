"""`KVCache`: keys and values of the tokens so far, which the queries of the next ones look at."""

from __future__ import annotations

import json
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from fastattn.api import cached
from fastattn.api.backends import ATTENTION_BACKENDS
from fastattn.call.arrays import as_array, check_operand
from fastattn.call.blocks import Blocks
from fastattn.call.options import check_backend
from fastattn.call.problem import Array
from fastattn.call.score_options import FurtherOptions, MaskMod, RowOptions, ScoreMod, check_window
from fastattn.call.seeds import Rng
from fastattn.call.types import Causal, DeviceBackend, IntegerLike, MaskLike, Number, NumberLike, Operand, Scalar
from fastattn.kv_cache import files
from fastattn.kv_cache.arguments import (
    as_counts,
    as_lengths,
    as_rows,
    as_tokens,
    check_dropped,
    check_query,
    check_size,
    check_truncated,
)
from fastattn.kv_cache.formats import FormatLike, formats_of
from fastattn.kv_cache.pages import LARGEST, Layout
from fastattn.kv_cache.sequences import Sequences
from fastattn.kv_cache.stored import restored, stored

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["KVCache"]


class KVCache:
    """Keys and values of the tokens so far, for a model that writes one token after the other.

    Each row of a batch is a sequence of its own length. Memory grows with the longest of them, in pages of 256 tokens,
    and nothing is copied for it.

    Parameters
    ----------
    batch : int
        How many rows there are.
    kv_heads, head_dim : int
        Hk and D.
    value_dim : int, optional
        Dv, D unless given.
    dtype : {"bfloat16", "float16", "float32", "int8"}, or a pair of these
        What keys and values are kept as, or these (keys, values). "int8" is 32 whole numbers with a scale, see Notes.
    window : (left, right), optional
        As in `fastattn.attention`, and its default for all calls of the cache. What is farther than `left` from all
        queries that may still come is dropped.
    capacity : int, optional
        How many tokens a row may have at most.

    Attributes
    ----------
    batch, kv_heads, head_dim, value_dim, dtype, window, capacity
        As given; the dtype is a name, or a pair of names.

    Raises
    ------
    TypeError, ValueError
        If an argument is of a kind that has no meaning here, or out of range. The message names it.

    Notes
    -----
    The result is that of `fastattn.attention` on the same keys and values: of queries of the cache's dtype it has the
    same bits, whatever the capacity, however the tokens were appended, and whichever rows share memory.

    Rows of "int8" are kept in blocks of 32 numbers, with a scale of float16 for each, as llama.cpp's q8_0 does: 8.5
    bits for a number. A number is off by at most half a scale, which is a 254th of the largest of its block, or up to
    2^-10 of that more. A block with a number that is not finite is NaN.

    Several threads may read a cache at a time. While one writes, `append`, `truncate` or `select`, no other may use it.
    A cache may be pickled and copied; a copy shares nothing with it.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> rng = np.random.default_rng(0)
    >>> query, key, value = rng.standard_normal((3, 1, 8, 16, 64), dtype=np.float32)
    >>> cache = fastattn.KVCache(1, kv_heads=8, head_dim=64, dtype="float32")
    >>> cache.append(key, value)  # a prompt of 16 tokens
    >>> out = cache.attention(query)
    >>> bool((out == fastattn.attention(query, key, value, is_causal=True)).all())
    True
    >>> cache.append(key[:, :, :1], value[:, :, :1])  # and one more
    >>> cache.attention(query[:, :, :1]).shape, cache.lengths.tolist()
    ((1, 8, 1, 64), [17])
    """

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        dtype: FormatLike | tuple[FormatLike, FormatLike] = "bfloat16",
        window: tuple[int | None, int | None] | None = None,
        capacity: int | None = None,
    ) -> None:
        self._layout = Layout(
            check_size("kv_heads", kv_heads, most=LARGEST),
            check_size("head_dim", head_dim, most=LARGEST),
            check_size("value_dim", head_dim if value_dim is None else value_dim, most=LARGEST),
            *formats_of(dtype),
        )
        self._left = check_window(window)[0]
        self.window = None if window is None else check_window(window)
        self.capacity = None if capacity is None else check_size("capacity", capacity, 0)
        self._sequences = Sequences(self._layout, check_size("batch", batch, 0))

    @property
    def batch(self) -> int:
        """How many rows there are."""
        return len(self._sequences.rows)

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values, Hk."""
        return self._layout.kv_heads

    @property
    def head_dim(self) -> int:
        """Features of a key, D."""
        return self._layout.head_dim

    @property
    def value_dim(self) -> int:
        """Features of a value, Dv."""
        return self._layout.value_dim

    @property
    def dtype(self) -> str | tuple[str, str]:
        """What keys and values are kept as: a name, or a pair of names."""
        key, value = self._layout.key_format.name, self._layout.value_format.name
        return key if key == value else (key, value)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """How many tokens each row has had, those that a window has dropped among them; shape (B,)."""
        return np.array(self._sequences.lengths, np.int64)

    @property
    def nbytes(self) -> int:
        """Bytes of memory: of the pages of all rows, those that are to spare among them."""
        return self._sequences.nbytes

    def __repr__(self) -> str:
        sizes = f"{self.batch}, {self.kv_heads}, {self.head_dim}, {self.value_dim}"
        options = {"dtype": self.dtype, "window": self.window, "capacity": self.capacity}
        given = "".join(f", {name}={value!r}" for name, value in options.items() if value is not None)
        return f"KVCache({sizes}{given}, lengths={self._sequences.lengths})"

    def append(self, key: Operand, value: Operand, lengths: IntegerLike | None = None) -> None:
        """Append keys and values of tokens to the rows.

        Parameters
        ----------
        key : array_like, shape (B, Hk, n, D)
            Of any floating dtype; it is converted to the cache's.
        value : array_like, shape (B, Hk, n, Dv)
        lengths : int or array_like of int, shape (B,), optional
            How many of the n tokens belong to each row, the first ones; what lies behind is padding. All, unless given.

        Raises
        ------
        TypeError
            If an argument is of a kind or dtype that has no meaning here.
        ValueError
            If shapes do not go together, or a row would become longer than the capacity. Then nothing is appended.

        Examples
        --------
        >>> import numpy as np
        >>> import fastattn
        >>> cache = fastattn.KVCache(2, kv_heads=8, head_dim=64)
        >>> prompts = np.zeros((2, 8, 12, 64), np.float32)
        >>> cache.append(prompts, prompts, lengths=[12, 7])
        >>> cache.lengths.tolist()
        [12, 7]
        """
        layout, sequences = self._layout, self._sequences
        keys = as_tokens("key", key, layout, self.batch, layout.head_dim)
        values = as_tokens("value", value, layout, self.batch, layout.value_dim)
        tokens = keys.shape[2]
        if values.shape[2] != tokens:
            raise ValueError(f"value: shape {values.shape}; expected {tokens} tokens, as key of shape {keys.shape}")
        counts = as_counts(lengths, tokens, sequences, self.capacity)
        sequences.append(keys, values, counts, self._left)

    # fmt: off
    @overload
    def attention(
        self, query: Operand[Scalar], attn_mask: MaskLike | None = ..., dropout_p: Number = ...,
        is_causal: Causal | None = ..., scale: Number | None = ..., *, query_lengths: IntegerLike | None = ...,
        return_lse: Literal[False] = ..., return_weights: Literal[False] = ..., rng: Rng | None = ...,
        out: NDArray[Scalar] | None = ..., backend: DeviceBackend | None = ..., **further: Unpack[RowOptions],
    ) -> NDArray[Scalar]: ...
    @overload
    def attention(
        self, query: Operand[Scalar], attn_mask: MaskLike | None = ..., dropout_p: Number = ...,
        is_causal: Causal | None = ..., scale: Number | None = ..., *, query_lengths: IntegerLike | None = ...,
        return_lse: Literal[True], return_weights: Literal[False] = ..., rng: Rng | None = ...,
        out: NDArray[Scalar] | None = ..., backend: DeviceBackend | None = ..., **further: Unpack[RowOptions],
    ) -> tuple[NDArray[Scalar], NDArray[Any]]: ...
    @overload
    def attention(
        self, query: Operand[Scalar], attn_mask: MaskLike | None = ..., dropout_p: Number = ...,
        is_causal: Causal | None = ..., scale: Number | None = ..., *, query_lengths: IntegerLike | None = ...,
        return_lse: Literal[False] = ..., return_weights: Literal[True], rng: Rng | None = ...,
        out: NDArray[Scalar] | None = ..., backend: DeviceBackend | None = ..., **further: Unpack[RowOptions],
    ) -> tuple[NDArray[Scalar], NDArray[Scalar]]: ...
    @overload
    def attention(
        self, query: Operand[Scalar], attn_mask: MaskLike | None = ..., dropout_p: Number = ...,
        is_causal: Causal | None = ..., scale: Number | None = ..., *, query_lengths: IntegerLike | None = ...,
        return_lse: Literal[True], return_weights: Literal[True], rng: Rng | None = ...,
        out: NDArray[Scalar] | None = ..., backend: DeviceBackend | None = ..., **further: Unpack[RowOptions],
    ) -> tuple[NDArray[Scalar], NDArray[Any], NDArray[Scalar]]: ...
    @overload
    def attention(
        self, query: Operand[Scalar], attn_mask: MaskLike | None = ..., dropout_p: Number = ...,
        is_causal: Causal | None = ..., scale: Number | None = ..., *, query_lengths: IntegerLike | None = ...,
        return_lse: bool = ..., return_weights: bool = ..., rng: Rng | None = ..., out: NDArray[Scalar] | None = ...,
        backend: DeviceBackend | None = ..., **further: Unpack[RowOptions],
    ) -> NDArray[Scalar] | tuple[NDArray[Any], ...]: ...
    # fmt: on
    def attention(
        self,
        query: Operand,
        attn_mask: MaskLike | None = None,
        dropout_p: Number = 0.0,
        is_causal: Causal | None = None,
        scale: Number | None = None,
        *,
        query_lengths: IntegerLike | None = None,
        window: tuple[int | None, int | None] | None = None,
        query_offset: IntegerLike | None = None,
        softcap: Number | None = None,
        alibi_slopes: NumberLike | None = None,
        sinks: NumberLike | None = None,
        score_mod: ScoreMod | None = None,
        mask_mod: MaskMod | None = None,
        block_mask: Blocks | None = None,
        return_lse: bool = False,
        return_weights: bool = False,
        rng: Rng | None = None,
        out: NDArray[Any] | None = None,
        backend: DeviceBackend | None = None,
    ) -> Any:
        """Attention of queries to the keys of their rows.

        The last query of a row stands at its last token, and each looks at the tokens up to its own.

        Parameters
        ----------
        query : array_like, shape (B, Hq, Lq, D)
            Hq is a multiple of Hk, and query head h reads key head h // (Hq / Hk). The dtype need not be the cache's.
        attn_mask : array_like, broadcasting to (B, Hq, Lq, Lk), optional
            As in `fastattn.attention`; Lk is the length of the longest row.
        is_causal : bool or "bottom-right", optional
            As in `fastattn.attention`, "bottom-right" unless given; or with a query_offset True.
        query_lengths : int or array_like of int, shape (B,), optional
            How many of the Lq queries belong to each row, the first ones, as `lengths` of `append`: the last of these
            stands at the last token. What the result has behind them means nothing. All, unless given.
        window : (left, right), optional
            The cache's, unless given.
        query_offset : int or array_like of int, shape (B,), optional
            The position of query 0 among the tokens, instead.
        dropout_p, scale, softcap, alibi_slopes, sinks, score_mod, mask_mod, block_mask, rng, out, backend : optional
            As in `fastattn.attention`; "cuda" moves everything to the GPU.
        return_lse, return_weights : bool
            As in `fastattn.attention`.

        Returns
        -------
        out : ndarray, shape (B, Hq, Lq, Dv)
            In the dtype of the queries; or a tuple of this and of what else was asked for, as `fastattn.attention`
            returns them.

        Raises
        ------
        TypeError, IndexError, RuntimeError
            As `fastattn.attention`.
        ValueError
            If shapes do not go together, a number is out of range, or a query would look at tokens that have been
            dropped. The message names the argument.

        Examples
        --------
        >>> import numpy as np
        >>> import fastattn
        >>> rng = np.random.default_rng(0)
        >>> cache = fastattn.KVCache(2, kv_heads=2, head_dim=64)
        >>> query, key, value = (rng.standard_normal((2, heads, 12, 64)) for heads in (8, 2, 2))
        >>> cache.append(key, value, lengths=[12, 7])  # prompts of different lengths
        >>> cache.attention(query, query_lengths=[12, 7]).shape
        (2, 8, 12, 64)
        """
        sequences = self._sequences
        reach = self.window if window is None else window
        asked: Hashable = b""
        if (
            attn_mask is query_lengths is query_offset is alibi_slopes is sinks is score_mod is mask_mod is None  # type: ignore[comparison-overlap]
            and block_mask is rng is is_causal is None  # type: ignore[comparison-overlap]
            and return_weights is False
            and isinstance(return_lse, bool)
            and (backend is None or backend == "cpu")
        ):
            asked = cached.asked(sequences, query, reach, dropout_p, scale, softcap, out)
            found = cached.again(asked, sequences, query, reach, return_lse, out)
            if found is not None:
                return found
        queries = as_array("query", query)
        check_operand("query", queries, query)
        check_query(queries, self._layout, self.batch)
        causal, offset = cached.positions(sequences, queries.shape[2], is_causal, query_lengths, query_offset)
        left, _ = check_window(reach)
        check_dropped(sequences, offset, left)
        further: FurtherOptions = {
            "window": reach, "query_offset": offset, "softcap": softcap, "alibi_slopes": alibi_slopes, "sinks": sinks,
            "score_mod": score_mod, "mask_mod": mask_mod, "block_mask": block_mask,
        }  # fmt: skip
        call = attn_mask, dropout_p, causal, scale
        if check_backend(backend, ATTENTION_BACKENDS) in (None, "cpu") and not return_weights:
            return cached.on_pages(asked, sequences, queries, call, further, return_lse, rng, out)
        wanted: Any = {"return_lse": return_lse, "return_weights": return_weights, "rng": rng}
        return cached.on_copies(sequences, queries, call, further, wanted, out, backend)

    def truncate(self, lengths: IntegerLike) -> None:
        """Leave the first tokens of each row, in place: what was appended in advance, and has been refused, goes.

        Parameters
        ----------
        lengths : int or array_like of int, shape (B,)
            How many tokens to leave, no more than there are.

        Raises
        ------
        TypeError
            If they are no integers.
        ValueError
            If a row has not so many, or a window has dropped what the next query would look at. Then nothing is
            truncated.

        Examples
        --------
        >>> import numpy as np
        >>> import fastattn
        >>> cache = fastattn.KVCache(1, kv_heads=8, head_dim=64)
        >>> guessed = np.zeros((1, 8, 4, 64), np.float32)
        >>> cache.append(guessed, guessed)
        >>> cache.truncate(cache.lengths - 2)  # two of which were right
        >>> cache.lengths.tolist()
        [2]
        """
        sequences = self._sequences
        found = as_lengths(lengths, self.batch, sequences.lengths, "its length")
        check_truncated(found, sequences, self._left)
        sequences.truncate(found)

    def select(self, rows: Operand) -> None:
        """Have these rows from now on, in place: beams, rows that are not finished, one prompt for many answers.

        Parameters
        ----------
        rows : array_like of int, shape (new B,)
            Numbers of rows, in their new order. One that is there several times shares its memory, until it is
            appended to.

        Raises
        ------
        TypeError
            If they are no integers.
        ValueError
            If there is no such row.

        Examples
        --------
        >>> import numpy as np
        >>> import fastattn
        >>> cache = fastattn.KVCache(1, kv_heads=8, head_dim=64)
        >>> prompt = np.zeros((1, 8, 12, 64), np.float32)
        >>> cache.append(prompt, prompt)
        >>> cache.select([0, 0, 0])
        >>> cache.lengths.tolist()
        [12, 12, 12]
        """
        self._sequences.select(as_rows(rows, self.batch))

    def save(self, path: files.Path) -> None:
        """Write the cache to a file, in the format of safetensors.

        Parameters
        ----------
        path : str or os.PathLike
            What was there is replaced.

        Notes
        -----
        The file has the pages, "keys" and "values", (pages, Hk, 256, D); of "int8" whole numbers, and the scales of
        their blocks as "key_scales" and "value_scales"; a "page_table", (B, most pages of a row), with -1 where there
        is no page; and "lengths", (B,).
        """
        tensors, said = stored(self._sequences)
        files.write(path, tensors, {"fastattn.KVCache": json.dumps(said | self._options())})

    @classmethod
    def load(cls, path: files.Path) -> KVCache:
        """Return the cache that a file holds.

        Parameters
        ----------
        path : str or os.PathLike

        Raises
        ------
        ValueError
            If the file holds none.
        """
        tensors, metadata = files.read(path)
        try:
            return cls._of(tensors, json.loads(metadata["fastattn.KVCache"]))
        except (KeyError, TypeError, ValueError, IndexError, OverflowError, RecursionError) as error:
            raise ValueError(f"path: {str(path)!r} holds no KVCache that can be read: {error}") from error

    def _options(self) -> dict[str, Any]:
        return {"window": self.window, "capacity": self.capacity}

    @classmethod
    def _of(cls, tensors: dict[str, Array], said: dict[str, Any]) -> KVCache:
        """Return the cache that `stored` has told of."""
        cache = cls(tensors["lengths"].size, **said)
        restored(cache._sequences, tensors)
        return cache

    def __reduce__(self) -> tuple[Any, ...]:
        tensors, said = stored(self._sequences)
        return _restored, ({name: tensor.whole() for name, tensor in tensors.items()}, said | self._options())


def _restored(tensors: dict[str, Array], said: dict[str, Any]) -> KVCache:
    return KVCache._of(tensors, said)
