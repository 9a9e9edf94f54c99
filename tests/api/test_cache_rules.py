"""`KVCache` as a machine: whatever is done to it, in whatever order, it is what a list of arrays says it is."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import tolerances
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import fastattn
from fastattn import KVCache
from fastattn.call.halves import cast
from fastattn.kv_cache.formats import FORMATS
from fastattn.kv_cache.pages import PAGE

FLOAT32 = np.dtype(np.float32)
HEADS, KV_HEADS, DIM, VALUE_DIM = 4, 2, 8, 5
CAPACITY = 3 * PAGE
tokens = st.one_of(st.integers(0, 3), st.integers(0, 300), st.sampled_from((PAGE - 1, PAGE, PAGE + 1)))


class CacheMachine(RuleBasedStateMachine):
    """A cache, and the keys and values that each row of it should have."""

    @initialize(
        rows=st.integers(0, 3),
        dtype=st.sampled_from(("float32", "bfloat16", "int8")),
        left=st.sampled_from((None, 0, 5, 300)),
        seed=st.integers(0, 2**32 - 1),
    )
    def begin(self, rows: int, dtype: str, left: int | None, seed: int) -> None:
        """Make the cache."""
        window = None if left is None else (left, 0)
        self.cache = KVCache(rows, KV_HEADS, DIM, VALUE_DIM, dtype=dtype, window=window, capacity=CAPACITY)
        self.rows: list[tuple[Any, Any]] = [self.numbers(0) for _ in range(rows)]
        self.last = [0] * rows  # tokens of each row when it was last appended to
        self.dtype, self.left, self.rng = dtype, left, np.random.default_rng(seed)

    def numbers(self, count: int) -> tuple[Any, Any]:
        """Return the keys and values of some tokens."""
        rng = getattr(self, "rng", np.random.default_rng(0))
        shapes = (KV_HEADS, count, DIM), (KV_HEADS, count, VALUE_DIM)
        return tuple(rng.standard_normal(shape, dtype=np.float32) for shape in shapes)  # type: ignore[return-value]

    def kept(self, numbers: Any) -> Any:
        """Return what is left of numbers in the cache."""
        kept = FORMATS[self.dtype]
        return kept.decode(kept.encode(numbers), numbers.shape[-1], FLOAT32)

    @rule(data=st.data(), most=tokens)
    def append(self, data: Any, most: int) -> None:
        """Append as many tokens to each row as there is room for, and some say."""
        room = [min(most, CAPACITY - keys.shape[1]) for keys, _ in self.rows]
        counts = [data.draw(st.integers(0, limit)) for limit in room]
        given = [self.numbers(most) for _ in self.rows]
        stacked = [np.zeros((0, KV_HEADS, most, size), np.float32) for size in (DIM, VALUE_DIM)]
        if given:
            stacked = [np.stack(arrays) for arrays in zip(*given, strict=True)]
        self.cache.append(*stacked, counts)
        for row, (count, arrays) in enumerate(zip(counts, given, strict=True)):
            if count:
                self.last[row] = self.rows[row][0].shape[1]
                pairs = zip(self.rows[row], arrays, strict=True)
                self.rows[row] = tuple(np.concatenate([own, new[:, :count]], 1) for own, new in pairs)  # type: ignore[assignment]

    @rule(data=st.data())
    def take_back(self, data: Any) -> None:
        """Take back some of what was appended last, or all there is."""
        lengths = []
        for row, (keys, values) in enumerate(self.rows):
            least = self.last[row] if self.left is not None else 0
            length = data.draw(st.one_of(st.just(0), st.integers(least, keys.shape[1])))
            lengths.append(length)
            self.rows[row] = keys[:, :length], values[:, :length]
            self.last[row] = min(self.last[row], length)
        self.cache.truncate(lengths)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def choose(self, data: Any) -> None:
        """Go on with some rows, in some order, some of them several times."""
        rows = data.draw(st.lists(st.integers(0, len(self.rows) - 1), max_size=4))
        self.cache.select(rows)
        self.rows = [self.rows[row] for row in rows]
        self.last = [self.last[row] for row in rows]

    @rule(queries=st.sampled_from((1, 2, 20)), dtype=st.sampled_from((np.float32, ml_dtypes.bfloat16)))
    def ask(self, queries: int, dtype: Any) -> None:
        """Ask for attention of as many queries, no more than were appended last."""
        fresh = [keys.shape[1] - last for (keys, _), last in zip(self.rows, self.last, strict=True)]
        if self.left is not None and any(count < queries for count in fresh):
            return
        query = cast(self.rng.standard_normal((len(self.rows), HEADS, queries, DIM)), np.dtype(dtype))
        out = self.cache.attention(query)
        assert out.dtype == dtype
        window = None if self.left is None else (self.left, 0)
        options: Any = {"is_causal": "bottom-right", "window": window, "enable_gqa": True}
        for row, numbers in enumerate(self.rows):
            one, own = query[row : row + 1], [self.kept(each)[None] for each in numbers]
            if (dtype == np.float32) == (self.dtype == "float32") and self.dtype != "int8":
                own = [cast(each, np.dtype(dtype)) for each in own]
                wanted = fastattn.attention(one, *own, **options)
                assert wanted.tobytes() == out[row : row + 1].tobytes()
            else:
                exact = tolerances.expected(cast(one, FLOAT32), *own, **options)
                room = exact.out_bound + 2.0**-8 * np.abs(exact.out) + 2.0**-133
                assert (np.abs(cast(out[row : row + 1], FLOAT32) - exact.out) <= room).all()

    @invariant()
    def lengths_are_right(self) -> None:
        """Check what can be asked without computing."""
        if hasattr(self, "cache"):
            assert self.cache.lengths.tolist() == [keys.shape[1] for keys, _ in self.rows]
            assert self.cache.batch == len(self.rows)
            sequences = self.cache._sequences
            pages = {page for row in sequences.rows for page in row if page is not None}
            assert sum(page.rows for page in pages) == sum(len(row) - row.count(None) for row in sequences.rows)
            assert sequences.memory.count == len(pages) + len(sequences.memory.free)


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=40, stateful_step_count=12)
