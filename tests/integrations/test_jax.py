"""JAX: the callback against JAX's own formula, under its transforms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tolerances

import fastattn

jax = pytest.importorskip("jax", reason="JAX is not installed")

from fastattn.integrations.jax import attention  # noqa: E402

GRADIENT = {np.dtype(np.float32): 2e-5, np.dtype(np.float64): 1e-12}


def arrays(*shapes: tuple[int, ...], dtype: Any = np.float32) -> list[Any]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def formula(query: Any, key: Any, value: Any, mask: Any = None, causal: bool = False, groups: int = 1) -> Any:
    """Attention as JAX computes it, of no empty row."""
    key, value = (jax.numpy.repeat(array, groups, axis=-3) for array in (key, value))
    scores = query @ key.swapaxes(-1, -2) / np.sqrt(query.shape[-1])
    if mask is not None:
        scores = jax.numpy.where(mask, scores, -np.inf) if mask.dtype == bool else scores + mask
    if causal:
        scores = jax.numpy.where(np.tri(*scores.shape[-2:], dtype=bool), scores, -np.inf)
    return jax.nn.softmax(scores, axis=-1) @ value


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize("causal", [False, True])
def test_output_and_gradients_under_jit(dtype: Any, mask: str | None, causal: bool) -> None:
    given: list[Any] = arrays((2, 4, 9, 8), (2, 2, 9, 8), (2, 2, 9, 5), dtype=dtype)
    if mask == "bool":
        given.append(np.random.default_rng(1).random((2, 1, 1, 9)) < 0.7)
        given[-1][..., 0] = True
    elif mask == "float":
        given += arrays((1, 4, 9, 9), dtype=dtype)
    with jax.enable_x64(True):
        out = jax.jit(lambda *args: attention(*args, is_causal=causal, enable_gqa=True))(*given)
        wanted = tolerances.expected(*given, is_causal=causal, enable_gqa=True)
        tolerances.check_out(np.asarray(out), wanted)

        argnums = (0, 1, 2, 3) if mask == "float" else (0, 1, 2)
        padded = [*given, None][:4]

        def ours(*args: Any) -> Any:
            return jax.numpy.sin(attention(*args, causal, None, True)).sum()

        def theirs(*args: Any) -> Any:
            return jax.numpy.sin(formula(*args, causal, 2)).sum()

        exact = [a.astype(np.float64) if a is not None and a.dtype.kind == "f" else a for a in padded]
        found = jax.jit(jax.grad(ours, argnums))(*padded)
        for mine, their in zip(found, jax.grad(theirs, argnums)(*exact), strict=True):
            bound = GRADIENT[np.dtype(dtype)] * max(1.0, float(abs(their).max()))
            assert mine.dtype == dtype
            assert float(abs(np.asarray(mine, np.float64) - their).max()) <= bound


def test_gradients_of_each_sample_by_vmap() -> None:
    query, key, value = arrays((3, 2, 5, 8), (2, 6, 8), (3, 2, 6, 8))

    def loss(attend: Any) -> Any:
        return jax.vmap(jax.grad(lambda *args: jax.numpy.sin(attend(*args)).sum(), (0, 1, 2)), (0, None, 0))

    for mine, their in zip(loss(attention)(query, key, value), loss(formula)(query, key, value), strict=True):
        assert mine.shape == their.shape
        np.testing.assert_allclose(mine, their, rtol=0, atol=1e-5)


def test_large_arrays_arrive() -> None:
    """Some JAX versions wait for themselves where a callback asks for a large array."""
    query, key, value = arrays((1, 4, 1024, 64), (1, 4, 1024, 64), (1, 4, 1024, 64))
    out = jax.jit(attention)(query * 2, key + 0, value)
    np.testing.assert_array_equal(out, fastattn.attention(query * 2, key, value))


def test_what_is_refused_is_refused_while_tracing() -> None:
    query, key, value = arrays((2, 5, 8), (2, 6, 8), (2, 6, 8))
    with pytest.raises(TypeError, match="query: dtype bfloat16; expected float32 or float64"):
        attention(*(jax.numpy.asarray(array, jax.numpy.bfloat16) for array in (query, key, value)))
    with pytest.raises(TypeError, match="value: dtype int32; expected float32 or float64, the same"):
        attention(query, key, np.ones((2, 6, 8), np.int32))
    with pytest.raises(ValueError, match="key: shape"):
        jax.jit(attention)(query, key[..., 1:], value)
    with pytest.raises(ValueError, match="is_causal: 'top'"):
        attention(query, key, value, None, "top")


@pytest.mark.parametrize("place", range(4))
def test_what_is_no_array_is_refused_by_name(place: int) -> None:
    """JAX takes a sparse array, or a list, for a tree of arrays."""
    from jax.experimental import sparse

    given: list[Any] = [*arrays((2, 5, 8), (2, 6, 8), (2, 6, 8)), None]
    name = ("query", "key", "value", "attn_mask")[place]
    for other, kind in ((sparse.BCOO.fromdense(given[0]), "BCOO"), (given[0].tolist(), "list")):
        given[place] = other
        for attend in (attention, jax.jit(attention)):
            with pytest.raises(TypeError, match=f"{name}: {kind}; expected a jax.Array"):
                attend(*given)


RANKS: dict[str, tuple[tuple[int, ...], ...]] = {
    "key and value of rank 5": ((2, 3, 5, 8), (4, 1, 3, 7, 8), (4, 1, 3, 7, 8)),
    "query of rank 2": ((5, 8), (2, 3, 7, 8), (3, 7, 6)),
    "mask of rank 0": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), ()),
    "mask of rank 1": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), (7,)),
}


@pytest.mark.parametrize("name", RANKS)
def test_arrays_of_any_ranks_broadcast(name: str) -> None:
    given = [np.asarray(array) for array in arrays(*RANKS[name])]
    for attend in (attention, jax.jit(attention)):
        np.testing.assert_array_equal(attend(*given), fastattn.attention(*given))
    gradients = jax.grad(lambda *args: attention(*args).sum(), tuple(range(len(given))))(*given)
    assert [gradient.shape for gradient in gradients] == [*RANKS[name]]
