"""What the tests of additive attention share: calls to draw, calls by their lengths, a few for one ISA."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import tolerances
from hypothesis import strategies as st
from strategies import (
    DTYPES,
    MASKS,
    ODD,
    SEEDS,
    Call,
    _broadcasting,
    causal,
    each,
    functions,
    laid_out,
    layouts,
    masks_of,
    numbers,
    score_options,
    with_odd,
)

from fastattn import additive_attention
from fastattn.call.shapes import describe_additive

ANY_DTYPE = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def inputs(dtype: Any, batch: int, queries: int, keys: int, features: int, size: float = 1.0) -> list[Any]:
    """Return query, key, value and weight."""
    rng = np.random.default_rng([batch, queries, keys, features])
    lengths = (queries, keys, keys)
    arrays = [numbers(rng, (batch, n, features), dtype, of) for n, of in zip(lengths, (size, size, 1), strict=True)]
    return [*arrays, numbers(rng, (features,), dtype)]


def rows_of_a_batch(dtype: Any, batch: int, queries: int, keys: int, features: int, size: float = 1.0) -> list[Any]:
    """Return query, key and value with an axis behind that of the batch, for lengths of its rows; and weight."""
    *arrays, weight = inputs(dtype, batch, queries, keys, features, size)
    return [*(array[:, None] for array in arrays), weight]


SIZES = {
    "usual": (1, 1, 1),
    "wide": (30, 30, 3),
    "far": (1e3, 1e-3, 1),
    "huge": (1e30, 1e30, 1e-3),
    "tiny": (1e-40,) * 3,
}
some_lengths = st.one_of(st.integers(1, 9), st.integers(1, 40), st.sampled_from((15, 16, 17, 63, 64, 65, 129)))
some_features = st.one_of(st.integers(0, 9), st.integers(1, 40), st.sampled_from((63, 64, 65)))


@st.composite
def additive_calls(draw: st.DrawFn, odd: bool = False, any_layout: bool = True, with_functions: bool = False) -> Call:
    """Draw a call; its options have the weight."""
    batch = draw(st.sampled_from(((), (1,), (2,), (3,), (2, 3))))
    queries, keys, features, value_dim = draw(some_lengths), draw(some_lengths), draw(some_features), draw(some_lengths)
    rng = np.random.default_rng(seed := draw(SEEDS))
    dtype, size = draw(DTYPES), draw(st.sampled_from(("usual", *SIZES)))
    shapes = [
        (*draw(_broadcasting(batch)), rows, columns)
        for rows, columns in ((queries, features), (keys, features), (keys, value_dim))
    ]
    of_query, of_key, of_weight = SIZES[size]
    arrays: list[Any] = [
        numbers(rng, shape, dtype, of) for shape, of in zip(shapes, (of_query, of_key, 1), strict=True)
    ]
    weight = numbers(rng, (features,), dtype, of_weight)
    if odd:
        arrays = [with_odd(rng, array, ODD, draw(st.sampled_from((0, 1 / 32, 1 / 512)))) for array in arrays]
        # some rows far away, others not
        for array in arrays[:2]:
            array[..., rng.random(array.shape[-2]) < 0.2, :] *= dtype(50)
    options: dict[str, Any] = {"is_causal": draw(causal)}
    problem, _ = describe_additive(*arrays, weight, **options)
    kinds = (None, *MASKS)
    mask, described_mask = draw(masks_of(rng, problem.weights_shape, kinds, dtypes=(np.float16, np.float32, dtype)))
    options |= draw(score_options(problem, options["is_causal"]))
    if with_functions:
        options |= draw(functions(problem))
    names = [draw(layouts) if any_layout else "contiguous" for _ in range(5)]
    *arrays, weight, mask = (
        each(partial(laid_out, layout=name), array) for array, name in zip((*arrays, weight, mask), names, strict=True)
    )
    line = f"{' '.join(str(a.shape) for a in arrays)} {np.dtype(dtype)} {size} seed {seed}{described_mask}"
    return Call(*arrays, mask, options | {"weight": weight}, f"{line}, {options}, layouts {names}")


def check_calls(dtypes: tuple[Any, ...]) -> int:
    """Assert that a few calls, which reach every part of the kernels, are right; return how many there were."""
    count = 0
    for dtype in dtypes:
        for queries, keys, features in ((150, 140, 37), (3, 140, 37), (1, 5, 130)):
            for size in (1.0, 30.0):
                *arrays, weight = inputs(dtype, 2, queries, keys, features, size)
                arrays[0][:, ::7] *= 100
                arrays[1][:, ::7] *= 100
                for mask in (None, np.random.default_rng(0).random((queries, keys)) < 0.6):
                    wanted = tolerances.expected(*arrays, mask, weight=weight, is_causal="bottom-right")
                    out, lse = additive_attention(*arrays, weight, mask, "bottom-right", return_lse=True)
                    tolerances.check_out(out, wanted)
                    tolerances.check_lse(lse, wanted)
                    count += 1
    return count
