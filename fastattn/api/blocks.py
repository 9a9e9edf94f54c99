"""`attention_blocks`: attention to keys that come in blocks, and never are in memory together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from fastattn.api.pieces import First, attend
from fastattn.call.advice import said
from fastattn.call.arrays import as_array, as_common, as_masks
from fastattn.call.blocks import Blocks
from fastattn.call.options import check_flag
from fastattn.call.out import check_out
from fastattn.call.pieces import Merged
from fastattn.call.positions import Whole
from fastattn.call.problem import Problem
from fastattn.call.reading import Block, source_of
from fastattn.call.score_options import FurtherOptions, MaskMod, ScoreMod
from fastattn.call.seeds import Rng, seed_from
from fastattn.call.shapes import describe
from fastattn.call.types import Causal, IntegerLike, MaskLike, Number, NumberLike, Operand, Scalar
from fastattn.call.widening import narrowed
from fastattn.cpu.host.builtin import in_default_mode

if TYPE_CHECKING:
    from typing_extensions import Unpack


# fmt: off
@overload
def attention_blocks(
    query: Operand[Scalar], blocks: tuple[Any, Any] | Iterable[tuple[Operand[Scalar], Operand[Scalar]]],
    attn_mask: MaskLike | None = ..., dropout_p: Number = ..., is_causal: Causal = ..., scale: Number | None = ...,
    enable_gqa: bool = ..., *, return_lse: Literal[False] = ..., rng: Rng | None = ...,
    out: NDArray[Scalar] | None = ..., block_size: int | None = ...,
    progress: Callable[[int, int | None], object] | None = ..., **further: Unpack[FurtherOptions],
) -> NDArray[Scalar]: ...
@overload
def attention_blocks(
    query: Operand[Scalar], blocks: tuple[Any, Any] | Iterable[tuple[Operand[Scalar], Operand[Scalar]]],
    attn_mask: MaskLike | None = ..., dropout_p: Number = ..., is_causal: Causal = ..., scale: Number | None = ...,
    enable_gqa: bool = ..., *, return_lse: Literal[True], rng: Rng | None = ..., out: NDArray[Scalar] | None = ...,
    block_size: int | None = ..., progress: Callable[[int, int | None], object] | None = ...,
    **further: Unpack[FurtherOptions],
) -> tuple[NDArray[Scalar], NDArray[Any]]: ...
@overload
def attention_blocks(
    query: Operand[Scalar], blocks: tuple[Any, Any] | Iterable[tuple[Operand[Scalar], Operand[Scalar]]],
    attn_mask: MaskLike | None = ..., dropout_p: Number = ..., is_causal: Causal = ..., scale: Number | None = ...,
    enable_gqa: bool = ..., *, return_lse: bool = ..., rng: Rng | None = ..., out: NDArray[Scalar] | None = ...,
    block_size: int | None = ..., progress: Callable[[int, int | None], object] | None = ...,
    **further: Unpack[FurtherOptions],
) -> NDArray[Scalar] | tuple[NDArray[Scalar], NDArray[Any]]: ...
# fmt: on
def attention_blocks(
    query: Operand,
    blocks: tuple[Any, Any] | Iterable[tuple[Operand, Operand]],
    attn_mask: MaskLike | None = None,
    dropout_p: Number = 0.0,
    is_causal: Causal = False,
    scale: Number | None = None,
    enable_gqa: bool = False,
    *,
    window: tuple[int | None, int | None] | None = None,
    query_offset: IntegerLike | None = None,
    key_lengths: IntegerLike | None = None,
    softcap: Number | None = None,
    alibi_slopes: NumberLike | None = None,
    sinks: NumberLike | None = None,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    block_mask: Blocks | None = None,
    return_lse: bool = False,
    rng: Rng | None = None,
    out: NDArray[Any] | None = None,
    block_size: int | None = None,
    progress: Callable[[int, int | None], object] | None = None,
) -> Any:
    """Attention to keys and values that come in blocks: exact, in memory for two of them.

    The next block is read, in another thread, while one is computed.

    Parameters
    ----------
    query : array_like, shape (..., Hq, Lq, D)
    blocks : tuple of two array-likes, or iterable of (key, value)
        Two objects with a shape that can be sliced, (..., Hk, Lk, D) and (..., Hk, Lk, Dv): `numpy.memmap`, arrays of
        Zarr, data sets of HDF5, slices of safetensors. Or anything that can be iterated, such as a generator, whose
        elements are keys (..., Hk, n, D) and values (..., Hk, n, Dv) of any number n, which may differ: they follow
        each other. A list of two arrays is iterated, too.
    attn_mask, dropout_p, is_causal, scale, enable_gqa
        As those of `fastattn.attention`, of all keys together. is_causal="bottom-right" wants the number of keys, which
        a pair has; with an iterable it is refused: query_offset says the same.
    window, query_offset, key_lengths, softcap, alibi_slopes, sinks, score_mod, mask_mod, block_mask
        The same: positions and numbers are those among all keys. Blocks that no query may look at are not read, or of
        an iterable not computed; it is iterated no further than that.
    return_lse : bool
        Return the natural logarithm of the sum of exp(score) over the keys as well.
    rng : int or numpy.random.Generator, optional
        Decides which weights are dropped: the same as in `fastattn.attention`.
    out : ndarray, shape (..., Hq, Lq, Dv), optional
        Where to write the result.
    block_size : int, optional
        Keys of a block that is cut from a pair; some 32 MB unless given, in whole chunks of arrays that have such.
    progress : callable, optional
        Called after each block as ``progress(done, keys)``: how many keys are behind, and how many there are, None
        where that is not known.

    Returns
    -------
    out : ndarray, shape (..., Hq, Lq, Dv)
    lse : ndarray, shape (..., Hq, Lq)
        If `return_lse`.

    Raises
    ------
    TypeError
        If an argument, or a block, is of a kind or dtype that has no meaning here.
    ValueError
        If shapes do not go together, an iterable has nothing in it, or as `fastattn.attention`. Of a block the message
        says which.

    Notes
    -----
    Each block is attended to alone, with its log-sum-exp, and the results are merged as `fastattn.merge` does it, the
    online softmax [1]_ between blocks, with sums in float64. Results depend on how keys are cut, by roundings.

    An iterable is advanced in another thread, by one element at a time, and never in two at once. It is asked for the
    next while one is computed: it must not write to the arrays of the last one that it gave, as by reading into them
    anew.

    References
    ----------
    .. [1] Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018, arXiv 1805.02867.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> rng = np.random.default_rng(0)
    >>> query = rng.standard_normal((8, 16, 64), dtype=np.float32)
    >>> key, value = rng.standard_normal((2, 8, 1000, 64), dtype=np.float32)
    >>> whole = fastattn.attention(query, key, value)
    >>> np.allclose(fastattn.attention_blocks(query, (key, value), block_size=256), whole, atol=1e-6)
    True
    >>> cut = ((key[:, i : i + 100], value[:, i : i + 100]) for i in range(0, 1000, 100))
    >>> np.allclose(fastattn.attention_blocks(query, cut), whole, atol=1e-6)
    True
    """
    further: FurtherOptions = {
        "window": window, "query_offset": query_offset, "key_lengths": key_lengths, "softcap": softcap,
        "alibi_slopes": alibi_slopes, "sinks": sinks, "score_mod": score_mod, "mask_mod": mask_mod,
        "block_mask": block_mask,
    }  # fmt: skip
    source = source_of(blocks, block_size)
    if progress is not None and not callable(progress):
        raise TypeError(f"progress: {said(progress)}; expected a callable, or None")
    mask = None if attn_mask is None else as_masks(attn_mask)
    whole = Whole(as_array("query", query), source.keys, mask, is_causal, further)
    work = _Work(whole, check_flag("return_lse", return_lse), (dropout_p, scale, enable_gqa), rng, out)
    for block in source.read(*whole.reach):
        if work.problem is None:
            work.begin(block)
        end = block.first + block.key.shape[-2]
        if end > whole.reach[0] and block.first < whole.reach[1]:
            work.attend(block)
        whole.passed(end)
        if progress is not None:
            progress(end, source.keys)
        del block  # before the next is asked for
    if work.problem is None:
        work.begin(source.nothing())
    return work.finish()


class _Work:
    """A call under way: what it computes, and the result over the blocks so far."""

    def __init__(self, whole: Whole, return_lse: bool, options: tuple[Any, ...], rng: Any, out: Any):
        self.whole, self.return_lse, self.options, self.rng, self.out = whole, return_lse, options, rng, out
        self.problem: Problem | None = None
        self.merged = Merged()

    def begin(self, block: Block) -> None:
        """Learn from the first block what there is to compute; one without keys counts as if it were there."""
        dropout_p, scale, enable_gqa = self.options
        empty = [array[..., :0, :] for array in (block.key, block.value)]
        query, key, value = as_common({"query": self.whole.query, "key": empty[0], "value": empty[1]})
        problem, _ = describe(query, key, value, None, dropout_p, False, scale, enable_gqa)
        self.whole.check(problem)
        self.out = check_out(self.out, problem)
        self.seed = seed_from(self.rng, problem.dropout_p > 0)
        self.problem, self.partial = problem, np.empty(problem.out_shape, problem.real)
        self.attend(Block(0, 0, *empty))

    def attend(self, block: Block) -> None:
        """Take all queries through a block."""
        assert self.problem is not None
        dropout_p, scale, enable_gqa = self.options
        mask, causal, options = self.whole.piece(block.first, block.key.shape[-2])
        call = (self.whole.query, block.key, block.value, mask, dropout_p, causal, scale, enable_gqa)
        first = First(key=block.first)
        out, lse = attend(*call, first=first, seed=self.seed, out=self.partial, options=options)
        self._add(out, lse)

    @in_default_mode
    def _add(self, out: Any, lse: Any) -> None:
        self.merged.add(out, lse)

    @in_default_mode
    def finish(self) -> Any:
        """Return the results that are asked for."""
        assert self.problem is not None
        self.whole.check_all()
        result, lse = self.merged.finish(self.problem.real)
        target = self.out
        if target is None:
            target = narrowed(result, self.problem.storage)
        else:
            target[...] = narrowed(result, target.dtype)
        return (target, lse) if self.return_lse else target
