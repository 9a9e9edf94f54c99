"""`BlockMask`: what it is made of, masks of masks, and calls with one, which are those with the same booleans."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastattn
from fastattn import BlockMask
from fastattn.cpu.host import functions

Array = Any
QUERIES, KEYS = 140, 150


def operands(dtype: Any = np.float32) -> tuple[Array, Array, Array, Array]:
    rng = np.random.default_rng(0)
    query, key = rng.standard_normal((2, 3, QUERIES, 8)), rng.standard_normal((2, 3, KEYS, 8))
    value, grad = rng.standard_normal((2, 3, KEYS, 5)), rng.standard_normal((2, 3, QUERIES, 5))
    query, key, value, grad = (array.astype(dtype) for array in (query, key, value, grad))
    return query, key, value, grad


def booleans(*lead: int) -> Array:
    """Return a mask that has blocks of all kinds."""
    keep = np.random.default_rng(1).random((*lead, QUERIES, KEYS)) < 0.3
    keep[..., :64, :64], keep[..., 64:128, :64], keep[..., 64:128, 64:128] = True, False, False
    return keep


def near(window: int) -> Callable[..., Any]:
    def mask(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return abs(query - key) <= window

    return mask


def kinds_of(keep: Array) -> Array:
    """Return of which kind blocks are, by looking at each."""
    kinds = np.empty((*keep.shape[:2], -(-QUERIES // 64), -(-KEYS // 64)), np.uint8)
    for row, head, i, j in np.ndindex(kinds.shape):
        block = keep[row, head, 64 * i : 64 * i + 64, 64 * j : 64 * j + 64]
        kinds[row, head, i, j] = 2 if block.all() else int(block.any())
    return kinds


# -- what a mask is ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1), (1, 3)])
def test_of_booleans(lead: tuple[int, ...]) -> None:
    keep = booleans(*lead)
    mask = BlockMask.from_array(keep)
    whole = keep.reshape((1,) * (2 - len(lead)) + keep.shape)
    assert mask.shape == whole.shape
    assert (mask.dense() == whole).all()
    assert (mask.kinds == kinds_of(whole)).all()
    assert set(mask.kinds.ravel()) == {0, 1, 2}
    assert mask.density == (mask.kinds > 0).mean()
    assert repr(mask) == f"BlockMask(shape={whole.shape}, density={mask.density:.3g})"


def test_of_booleans_with_more_axes() -> None:
    keep = booleans(2, 2, 3)
    assert (BlockMask.from_array(keep).dense() == keep.reshape(4, 3, QUERIES, KEYS)).all()


def test_of_intervals() -> None:
    rng = np.random.default_rng(0)
    begin, end = rng.integers(-5, 100, (3, QUERIES)), rng.integers(50, 300, (2, 1, QUERIES))
    mask = BlockMask.from_intervals(begin, end, KEYS)
    key = np.arange(KEYS)
    assert (mask.dense() == ((key >= begin[..., None]) & (key < end[..., None]))).all()
    assert mask.shape == (2, 3, QUERIES, KEYS)


def test_of_a_function_that_asks_for_rows_and_heads() -> None:
    lengths, window = np.array([90, 20]), [3, 30, 300]

    def padded(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (key < lengths[batch]) & (query - key < window[head])

    mask = BlockMask.from_function(padded, QUERIES, KEYS, 2, 3)
    query, key = np.arange(QUERIES)[:, None], np.arange(KEYS)
    wanted = (key < lengths[:, None, None, None]) & (query - key < np.array(window)[:, None, None])
    assert (mask.dense() == wanted).all()
    first = BlockMask.from_function(padded, QUERIES, KEYS)  # the same for all, so asked for the first
    assert first.shape == (1, 1, QUERIES, KEYS)
    assert (first.dense() == wanted[:1, :1]).all()
    rows = BlockMask.from_function(padded, QUERIES, KEYS, batch=2)
    assert (rows.dense() == wanted[:, :1]).all()
    heads = BlockMask.from_function(padded, QUERIES, KEYS, heads=3)
    assert (heads.dense() == wanted[:1]).all()


def test_of_a_function_of_positions() -> None:
    mask = BlockMask.from_function(lambda batch, head, query, key: query >= key, QUERIES, KEYS, query_offset=10)
    assert (mask.dense()[0, 0] == np.tri(QUERIES, KEYS, 10, bool)).all()


def test_what_it_captures_is_copied() -> None:
    document = np.arange(150) // 40
    keep, begin = booleans(), np.zeros(QUERIES, int)

    def same(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return document[query] == document[key]

    masks = [
        BlockMask.from_function(same, QUERIES, KEYS),
        BlockMask.from_array(keep),
        BlockMask.from_intervals(begin, begin + 7, KEYS),
    ]
    masks += [masks[0] & masks[1]]
    before = [mask.dense() for mask in masks]
    document[:], keep[:], begin[:] = 0, False, 99
    for mask, dense in zip(masks, before, strict=True):
        assert (mask.dense() == dense).all()


def test_without_queries_or_keys() -> None:
    for shape in ((0, 5), (5, 0), (0, 0)):
        mask = BlockMask.from_array(np.ones(shape, bool))
        assert mask.density == 0
        assert mask.dense().shape == (1, 1, *shape)
    value = np.ones((5, 2))
    assert (
        fastattn.attention(value, value[:0], value[:0], block_mask=BlockMask.from_array(np.ones((5, 0), bool))) == 0
    ).all()


# -- masks of masks ----------------------------------------------------------------------------------------------------


def test_and_or_not() -> None:
    keep, other = booleans(3), booleans(2, 1)[..., ::-1, :]
    one, two = BlockMask.from_array(keep), BlockMask.from_array(other)
    three = BlockMask.from_function(near(20), QUERIES, KEYS)
    band = three.dense()
    for mask, wanted in (
        (one & two, keep & other),
        (one | two, keep | other),
        (~one, ~keep[None]),
        (one & ~two | three, keep & ~other | band),
        (~(one & three), ~(keep & band)),
    ):
        assert (mask.dense() == wanted).all()
        assert (mask.kinds == kinds_of(wanted)).all()


def test_functions_with_variables_of_one_name() -> None:
    one, two, three = (BlockMask.from_function(near(width), QUERIES, KEYS) for width in (60, 10, 2))
    assert ((one & two).dense() == two.dense()).all()
    assert ((two & one).dense() == two.dense()).all()
    assert ((one & two & ~three).dense() == two.dense() & ~three.dense()).all()


def test_masks_that_do_not_go_together() -> None:
    one = BlockMask.from_array(booleans(3))
    with pytest.raises(ValueError, match=r"\(1, 3, 140, 150\), with another of \(1, 2, 140, 150\)"):
        one & BlockMask.from_array(booleans(2))
    with pytest.raises(ValueError, match=r"with another of \(1, 1, 140, 140\)"):
        one | BlockMask.from_function(near(3), QUERIES, QUERIES)
    with pytest.raises(TypeError):
        one & booleans()  # type: ignore[operator]


# -- calls -------------------------------------------------------------------------------------------------------------

CALLS: list[dict[str, Any]] = [
    {},
    {"is_causal": True},
    {"is_causal": "bottom-right"},
    {"query_offset": 5, "window": (70, 20)},
    {"query_offset": [3, -9], "window": (70, None)},
    {"key_lengths": [100, 150]},
    {"softcap": 2.0, "alibi_slopes": [0.1, 0.2, 0.3]},
    {"mask_mod": near(50)},
    {"mask_mod": near(50), "query_offset": [3, -9]},
]


@pytest.mark.parametrize("options", CALLS, ids=lambda options: " ".join(options) or "alone")
@pytest.mark.parametrize("lead", [(), (2, 3)], ids=["for all", "for each"])
def test_a_call_is_that_with_the_booleans(lead: tuple[int, ...], options: dict[str, Any]) -> None:
    query, key, value, grad = operands(np.float64)
    keep = booleans(*lead)
    mask = BlockMask.from_array(keep)
    out, lse, weights = fastattn.attention(query, key, value, keep, return_lse=True, return_weights=True, **options)
    found = fastattn.attention(query, key, value, block_mask=mask, return_lse=True, return_weights=True, **options)
    for one, other in zip(found, (out, lse, weights), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-13)
    forward = (grad, query, key, value, out, lse)
    gradients = fastattn.attention_backward(*forward, block_mask=mask, **options)
    for one, other in zip(gradients, fastattn.attention_backward(*forward, keep, **options), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-11, atol=1e-12)
    summary = fastattn.attention_summary(query, key, block_mask=mask, **options)
    for one, other in zip(summary, fastattn.attention_summary(query, key, keep, **options), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-11, atol=1e-12)


def test_additive_attention() -> None:
    query, key, value, _ = operands()
    weight = np.random.default_rng(2).standard_normal(8).astype(np.float32)
    keep = booleans(3)
    found = fastattn.additive_attention(query, key, value, weight, block_mask=BlockMask.from_array(keep))
    np.testing.assert_allclose(
        found, fastattn.additive_attention(query, key, value, weight, keep), rtol=1e-5, atol=1e-6
    )


def test_what_is_in_an_empty_block_does_not_leak() -> None:
    query, key, value, _ = operands()
    keep = booleans()
    keep[:, 64:128] = False
    mask = BlockMask.from_array(keep)
    wanted = fastattn.attention(query, key, value, block_mask=mask)
    key[..., 64:128, :], value[..., 64:128, :] = np.nan, np.inf
    assert (fastattn.attention(query, key, value, block_mask=mask) == wanted).all()


@pytest.mark.parametrize("rows", [(0, 3), (2, 0)])
def test_no_rows_of_a_batch_and_no_heads_have_no_blocks(rows: tuple[int, int]) -> None:
    """Nobody is asked where nobody looks, also where each row has an offset."""
    query, key, value = (np.zeros((*rows, 140, 4), np.float32) for _ in range(3))
    out = fastattn.attention(
        query, key, value, mask_mod=lambda batch, head, query, key: query >= key + batch, query_offset=[1] * rows[0]
    )
    assert out.shape == (*rows, 140, 4)


def test_a_mask_that_is_kept_is_not_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value, _ = operands()
    mask = BlockMask.from_array(booleans(2, 3))
    wanted = fastattn.attention(query, key, value, block_mask=mask)
    for name in ("contents", "kinds_found"):
        monkeypatch.setattr(functions, name, lambda *_: pytest.fail("looked at again"))
    assert (fastattn.attention(query, key, value, block_mask=mask) == wanted).all()
    assert (fastattn.attention(query, key, value, block_mask=mask, query_offset=4) == wanted).all()


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_mask_of_other_lengths() -> None:
    query, key, value, _ = operands()
    message = r"block_mask: made for \(1, 1, 140, 150\).*expected \(2, 3, 139, 150\)"
    with pytest.raises(ValueError, match=message):
        fastattn.attention(query[..., 1:, :], key, value, block_mask=BlockMask.from_array(booleans()))
    with pytest.raises(ValueError, match=r"made for \(1, 2, 140, 150\).*expected \(2, 3, 140, 150\)"):
        fastattn.attention(query, key, value, block_mask=BlockMask.from_array(booleans(2)))
    with pytest.raises(ValueError, match=r"made for \(3, 1, 140, 150\).*expected \(2, 3, 140, 150\)"):
        fastattn.attention_summary(query, key, block_mask=BlockMask.from_array(booleans(3, 1)))


REFUSED: list[tuple[Any, str, Callable[[], Any]]] = [
    (TypeError, "mask_mod: int; expected a Python function", lambda: BlockMask.from_function(3, 4, 4)),  # type: ignore[arg-type]
    (TypeError, "mask_mod: .* expected 4 arguments", lambda: BlockMask.from_function(lambda query, key: True, 4, 4)),
    (TypeError, "queries: 4.0 .*expected a non-negative int$", lambda: BlockMask.from_function(near(1), 4.0, 4)),  # type: ignore[arg-type]
    (ValueError, "keys: -1; expected a non-negative int", lambda: BlockMask.from_function(near(1), 4, -1)),
    (TypeError, "heads: '3'.*, or None", lambda: BlockMask.from_function(near(1), 4, 4, heads="3")),  # type: ignore[arg-type]
    (TypeError, "query_offset: None", lambda: BlockMask.from_function(near(1), 4, 4, query_offset=None)),  # type: ignore[arg-type]
    (TypeError, "keep: dtype float64; expected bool", lambda: BlockMask.from_array(np.ones((3, 3)))),
    (ValueError, r"keep: shape \(3,\)", lambda: BlockMask.from_array(np.ones(3, bool))),
    (TypeError, "end: dtype float64; expected integers", lambda: BlockMask.from_intervals([1, 2], [1.0, 2.0], 3)),
    (ValueError, r"end: shape \(3,\); expected one", lambda: BlockMask.from_intervals([1, 2], [1, 2, 3], 3)),
    (ValueError, "begin: a single number", lambda: BlockMask.from_intervals(1, 2, 3)),
]  # fmt: skip


def test_what_is_no_mask() -> None:
    for given in (True, booleans(), near(3)):
        with pytest.raises(TypeError, match=r"block_mask: .*; expected a fastattn.BlockMask, or None"):
            fastattn.attention(*operands()[:3], block_mask=given)  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "message", "call"), REFUSED, ids=[message[:25] for _, message, _ in REFUSED])
def test_refused(kind: Any, message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=message):
        call()


# -- parts of calls ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [None, slice(60, 130), [3, 139, 70]], ids=str)
@pytest.mark.parametrize("columns", [None, slice(10, 100), [149, 0]], ids=str)
def test_weights_of_chosen_rows_and_columns(rows: Any, columns: Any) -> None:
    query, key, _, _ = operands(np.float64)
    keep = booleans(3)
    chosen: dict[str, Any] = {"rows": rows, "columns": columns}
    found = fastattn.attention_weights(query, key, block_mask=BlockMask.from_array(keep), **chosen)
    np.testing.assert_allclose(found, fastattn.attention_weights(query, key, keep, **chosen), rtol=1e-12, atol=1e-14)


def test_the_reference_knows_masks() -> None:
    query, key, value, _ = operands(np.float64)
    query, key, value = (array[:1, :, :20] for array in (query, key, value))
    mask = BlockMask.from_function(near(4), 20, 20) & ~BlockMask.from_function(near(1), 20, 20)
    found = fastattn.attention(query, key, value, block_mask=mask, backend="reference")
    np.testing.assert_allclose(found, fastattn.attention(query, key, value, mask.dense()), rtol=1e-12, atol=1e-13)
