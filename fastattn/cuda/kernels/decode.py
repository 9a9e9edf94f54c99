"""Attention of few queries to many keys: keys are split over blocks of threads, whose results are merged in order.

With one query, or some, there is hardly anything to compute for a key: what counts is how fast keys and values arrive.
So all rows that look at the same keys, the queries of a group of heads, share a block: each key and value is read once,
16 bytes at a time where the layout allows. And blocks of a part of the keys each keep the whole GPU busy [1]_:

    split_keys, a block for each part of the keys of a head of keys:
        s[r][j]   = scale query[r] · key[j] + mask         all of them, in shared memory
        m[r]      = max_j s[r][j]
        w[r][j]   = exp(s[r][j] - m[r])      l[r] = Σ_j w[r][j]
        acc[r][f] = Σ_j w[r][j] · value[j][f]              not divided by l yet
    merge_splits, for each row:
        m = max of the m of its parts, l = Σ l · exp(m of the part - m), out = Σ acc · exp(m of the part - m) / l

The lengths of parts follow from Lk alone: what a row of a batch gives depends neither on the batch, nor on the device.

A block's threads are lanes x keys: thread t has the features from width · (t % lanes) on of every (threads / lanes)-th
key, where `width` elements have 16 bytes. Sums over lanes, and over keys of values, are taken in order, in shared
memory. What is hidden has w = -0.0: where a value is not finite, such weights are left out.

References
----------
.. [1] Dao, Haziza, Massa and Sizov, "Flash-Decoding for long-context inference", 2023,
       https://pytorch.org/blog/flash-decoding.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba import cuda

from fastattn.cuda.kernels.elements import device, keeps, loader, mask_loader, real_of, storer
from fastattn.cuda.kernels.plan import (
    CAUSAL_OFFSET,
    DROP_BELOW,
    HEAD_DIM,
    HEADS,
    KEY,
    KEYS,
    MASK,
    OUT,
    QUERIES,
    QUERY,
    VALUE,
    VALUE_DIM,
)
from fastattn.cuda.kernels.vectors import vector_loader, vector_width

__all__ = ["Decode", "merge_splits", "split_keys"]


class Decode(NamedTuple):
    """What the kernels are compiled for.

    Attributes
    ----------
    storage : str
        What the elements are in memory.
    mask : str
        The same of the mask, or "none".
    dropout : bool
    aligned : bool
        Whether keys and values can be loaded 16 bytes at a time.
    rows : int
        Queries of a block.
    keys : int
        Keys of a part.
    threads : int
        Threads of a block.
    lanes : int
        Threads that share a key: a divisor of `threads`, with at least as many columns as there are features.
    passes : int
        Keys of a thread that are loaded at a time.
    """

    storage: str
    mask: str
    dropout: bool
    aligned: bool
    rows: int
    keys: int
    threads: int
    lanes: int
    passes: int

    @property
    def columns(self) -> int:
        """Features of all lanes together."""
        return self.lanes * vector_width(self.storage)

    @property
    def per_pass(self) -> int:
        """Keys that all threads together load at a time."""
        return self.threads // self.lanes

    @property
    def pass_size(self) -> int:
        """Sums over the features of a lane, of the keys of a pass: rows of lanes, with a place between them."""
        return self.rows * self.per_pass * (self.lanes + 1)

    @property
    def share(self) -> int:
        """Threads that take the maximum, and the sum, of a row."""
        return min(16, self.threads // self.rows)

    @property
    def buffer_size(self) -> int:
        """Numbers that are exchanged between threads at a time: sums over lanes, later over keys."""
        return max(self.passes * self.pass_size, self.threads * vector_width(self.storage))

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: queries, scores and which of them count, the buffer, shares of rows."""
        numbers = self.rows * (self.columns + self.keys + self.share) + self.buffer_size
        return numbers * np.dtype(real_of(self.storage)).itemsize + self.rows * self.keys


# -- a part of the keys ------------------------------------------------------------------------------------------------


def _score_functions(spec: Decode) -> tuple[Any, Any]:
    """Device functions of one row and one key: its score, and what dropout multiplies its weight by."""
    real = real_of(spec.storage)
    masked, mask_is_bool = spec.mask != "none", spec.mask == "bool"
    load_mask = mask_loader("float32" if spec.mask in ("none", "bool") else spec.mask, real, real)
    lowest, zero = real(-math.inf), real(0.0)

    @device
    def biased(score, mask, at):
        """The score under the mask, and whether it counts."""
        seen = True
        if masked:
            if mask_is_bool:
                seen = mask[at] != 0
            else:
                bias = load_mask(mask[at])
                seen = bias != lowest
                score += bias
        return score, seen

    @device
    def dropped(keep_scale, number, heads, i, j, seed_low, seed_high, drop_below):
        """keep_scale, or 0."""
        factor = zero
        if keeps(number, heads, i, j, seed_low, seed_high, drop_below):
            factor = keep_scale
        return factor

    return biased, dropped


def split_keys(spec: Decode) -> Any:
    """The kernel that goes through a part of the keys.

    Blocks stand along x: first the parts of the keys, then the tiles of rows of a group, then the heads of keys. The
    results of row q = slice · Lq + i and part p are numbers[2 (q · parts + p)] = m, the next one l, and
    sums[(q · parts + p) · Dv + f] = acc.
    """
    storage, dropout, rows, part, threads = spec.storage, spec.dropout, spec.rows, spec.keys, spec.threads
    lanes, passes, columns, width = spec.lanes, spec.passes, spec.columns, vector_width(storage)
    real = real_of(storage)
    load, load_columns = loader(storage, real), vector_loader(storage, real, spec.aligned)
    biased, dropped = _score_functions(spec)
    zero, one, hidden, lowest = real(0.0), real(1.0), real(-0.0), real(-math.inf)
    per_pass, pass_size, buffer_size, share = spec.per_pass, spec.pass_size, spec.buffer_size, spec.share
    pitch = lanes + 1
    chunk = min(rows, 4)  # rows whose sums are written by one unrolled loop: of more, Numba leaves the loop as it is
    row_columns, score_size, query_size, share_size = columns, rows * part, rows * columns, rows * share

    @device
    def multiply(dots, keys_here, queries_here, lane):
        """The products of the keys of a thread with all rows, over its own features."""
        for r in range(rows):
            for p in range(passes):
                total = zero
                for c in range(width):
                    total += queries_here[r * row_columns + lane * width + c] * keys_here[p, c]
                dots[p, r] = total

    @device
    def add_values(sums, weights, value_here, j):
        """sums[r] += weight · value, a key at a time; what is hidden is left out where the value is not finite."""
        check = zero
        for c in range(width):
            check += value_here[0, c] * zero
        if check == zero:
            for r in range(rows):
                weight = weights[r * part + j]
                for c in range(width):
                    sums[r, c] += weight * value_here[0, c]
        else:
            for r in range(rows):
                weight = weights[r * part + j]
                if weight != zero or math.copysign(one, weight) > zero:
                    for c in range(width):
                        sums[r, c] += weight * value_here[0, c]

    @device
    def write_rows(sums, sums_here, buffer, first, present, row, parts, number, value_dim, lane, own, thread):
        """Add up the sums that threads have of `chunk` rows, in the order of the keys, and write them to memory."""
        for r in range(chunk):
            cuda.syncthreads()
            for c in range(width):
                buffer[own * row_columns + lane * width + c] = sums_here[first + r, c]
            cuda.syncthreads()
            if first + r < present:
                for f in range(thread, value_dim, threads):
                    total = buffer[f]
                    for other in range(1, per_pass):
                        total += buffer[other * row_columns + f]
                    sums[((row + first + r) * parts + number) * value_dim + f] = total

    def kernel(
        query, key, value, mask, numbers, sums, offsets, steps, sizes, group, scale, keep_scale, seed_low, seed_high
    ):
        queries_here = cuda.shared.array(query_size, real)  # [row][feature]
        scores = cuda.shared.array(score_size, real)  # [row][key], later the weights
        seen = cuda.shared.array(score_size, np.uint8)
        buffer = cuda.shared.array(buffer_size, real)  # [pass][row][key][lane], later [key][column]
        shares = cuda.shared.array(share_size, real)
        keys_here = cuda.local.array((passes, width), real)
        value_here = cuda.local.array((1, width), real)
        dots = cuda.local.array((passes, rows), real)
        sums_here = cuda.local.array((rows, width), real)
        thread = cuda.threadIdx.x
        lane, own = thread % lanes, thread // lanes

        queries, keys, head_dim, value_dim = sizes[QUERIES], sizes[KEYS], sizes[HEAD_DIM], sizes[VALUE_DIM]
        heads, reach = sizes[HEADS], sizes[CAUSAL_OFFSET]
        parts = (keys + part - 1) // part
        tiles = (group * queries + rows - 1) // rows
        number = cuda.blockIdx.x % parts
        first_row = cuda.blockIdx.x // parts % tiles * rows
        first_slice = cuda.blockIdx.x // parts // tiles * group
        first_key = number * part
        present = min(rows, group * queries - first_row)
        count = min(part, keys - first_key)
        key_at = offsets[KEY, first_slice] + first_key * steps[KEY, 0]
        value_at = offsets[VALUE, first_slice] + first_key * steps[VALUE, 0]

        for e in range(thread, query_size, threads):
            r, f = e // row_columns, e % row_columns
            x = zero
            if r < present and f < head_dim:
                at = offsets[QUERY, first_slice + (first_row + r) // queries]
                x = scale * load(query[at + (first_row + r) % queries * steps[QUERY, 0] + f * steps[QUERY, 1]])
            queries_here[e] = x
        cuda.syncthreads()

        for begin in range(0, part, passes * per_pass):
            for p in range(passes):
                j = begin + p * per_pass + own
                # a key behind the last has no features
                features = head_dim if j < count else 0
                load_columns(keys_here, p, key, key_at + j * steps[KEY, 0], steps[KEY, 1], lane * width, features)
            multiply(dots, keys_here, queries_here, lane)
            for p in range(passes):
                for r in range(rows):
                    buffer[p * pass_size + (r * per_pass + own) * pitch + lane] = dots[p, r]
            cuda.syncthreads()
            for e in range(thread, passes * rows * per_pass, threads):
                p, r, k = e // (rows * per_pass), e // per_pass % rows, e % per_pass
                j = begin + p * per_pass + k
                total = zero
                for other in range(lanes):
                    total += buffer[p * pass_size + (r * per_pass + k) * pitch + other]
                slice_ = first_slice + (first_row + r) // queries
                i = (first_row + r) % queries
                visible = r < present and j < count and first_key + j <= i + reach
                score = lowest
                if visible:
                    at = offsets[MASK, slice_] + i * steps[MASK, 0] + (first_key + j) * steps[MASK, 1]
                    score, visible = biased(total, mask, at)
                    if not visible:
                        score = lowest
                if j < part:
                    scores[r * part + j] = score
                    seen[r * part + j] = np.uint8(visible)
            cuda.syncthreads()

        r, s = thread // share, thread % share
        if r < rows:
            highest = lowest
            for j in range(s, part, share):
                if scores[r * part + j] > highest:
                    highest = scores[r * part + j]
            shares[thread] = highest
        cuda.syncthreads()
        highest, total = lowest, zero
        if r < rows:
            for other in range(share):
                if shares[r * share + other] > highest:
                    highest = shares[r * share + other]
            shift = highest
            if highest == lowest:
                shift = zero  # -inf - -inf would be NaN
            for j in range(s, part, share):
                weight = hidden
                if seen[r * part + j] != 0:
                    weight = real(math.exp(scores[r * part + j] - shift))
                    total += weight
                    if dropout:
                        slice_, i = first_slice + (first_row + r) // queries, (first_row + r) % queries
                        weight *= dropped(
                            keep_scale, slice_, heads, i, first_key + j, seed_low, seed_high, sizes[DROP_BELOW]
                        )
                scores[r * part + j] = weight
        cuda.syncthreads()
        if r < rows:
            shares[thread] = total
        cuda.syncthreads()
        if s == 0 and r < present:
            total = zero
            for other in range(share):
                total += shares[r * share + other]
            row = first_slice * queries + first_row + r
            numbers[2 * (row * parts + number)] = highest
            numbers[2 * (row * parts + number) + 1] = total

        for r in range(rows):
            for c in range(width):
                sums_here[r, c] = zero
        for j in range(own, count, per_pass):
            load_columns(value_here, 0, value, value_at + j * steps[VALUE, 0], steps[VALUE, 1], lane * width, value_dim)
            add_values(sums_here, scores, value_here, j)
        row = first_slice * queries + first_row
        write_rows(sums, sums_here, buffer, 0, present, row, parts, number, value_dim, lane, own, thread)
        if rows > 4:
            write_rows(sums, sums_here, buffer, 4, present, row, parts, number, value_dim, lane, own, thread)
        if rows > 8:
            write_rows(sums, sums_here, buffer, 8, present, row, parts, number, value_dim, lane, own, thread)
            write_rows(sums, sums_here, buffer, 12, present, row, parts, number, value_dim, lane, own, thread)

    return kernel


# -- all parts together ------------------------------------------------------------------------------------------------


def merge_splits(spec: Decode) -> Any:
    """The kernel that merges the parts: a block for each row, which goes through the parts in order."""
    part, threads = spec.keys, spec.threads
    real, store = real_of(spec.storage), storer(spec.storage)
    zero, lowest = real(0.0), real(-math.inf)

    def kernel(numbers, sums, out, lse, offsets, steps, sizes):
        queries, value_dim = sizes[QUERIES], sizes[VALUE_DIM]
        parts = (sizes[KEYS] + part - 1) // part
        row = cuda.blockIdx.x
        highest = lowest
        for p in range(parts):
            if numbers[2 * (row * parts + p)] > highest:
                highest = numbers[2 * (row * parts + p)]
        shift = highest
        if highest == lowest:
            shift = zero
        total = zero
        for p in range(parts):
            total += numbers[2 * (row * parts + p) + 1] * real(math.exp(numbers[2 * (row * parts + p)] - shift))
        target = offsets[OUT, row // queries] + row % queries * steps[OUT, 0]
        for f in range(cuda.threadIdx.x, value_dim, threads):
            result = zero
            if total != zero:
                for p in range(parts):
                    factor = real(math.exp(numbers[2 * (row * parts + p)] - shift))
                    result += sums[(row * parts + p) * value_dim + f] * factor
                result /= total
            out[target + f * steps[OUT, 1]] = store(result)
        if cuda.threadIdx.x == 0:
            logarithm = lowest
            if total != zero:
                logarithm = highest + real(math.log(total))
            lse[row] = logarithm

    return kernel
