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
    HEAD_DIM,
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


class Part(NamedTuple):
    """What a block of threads has to do.

    Attributes
    ----------
    slice, row, key
        The first slice of a group of heads, the first of the group's rows and the first key. Row r of a group is query
        r % Lq of its slice r // Lq.
    rows, keys
        How many rows and keys there are.
    number, of
        Which part of the keys this is, and how many there are.
    queries, head_dim, value_dim
        Lq, D and Dv.
    """

    slice: int
    row: int
    key: int
    rows: int
    keys: int
    number: int
    of: int
    queries: int
    head_dim: int
    value_dim: int


# -- a part of the keys ------------------------------------------------------------------------------------------------


def split_keys(spec: Decode) -> Any:
    """The kernel that goes through a part of the keys.

    Blocks stand along x: first the parts of the keys, then the tiles of rows of a group, then the heads of keys. The
    results of row q = slice · Lq + i and part p are numbers[2 (q · parts + p)] = m, the next one l, and
    sums[(q · parts + p) · Dv + f] = acc.
    """
    rows, part, lanes, passes, width = spec.rows, spec.keys, spec.lanes, spec.passes, vector_width(spec.storage)
    real, per_pass, buffer_size = real_of(spec.storage), spec.per_pass, spec.buffer_size
    query_size, score_size, share_size = rows * spec.columns, rows * part, rows * spec.share
    part_of, load_queries, multiply_keys, share_dots = _make_products(spec)
    find_scores = _make_find_scores(spec)
    share_maxima, weigh, write_numbers = _make_softmax(spec)
    sum_values, write_sums = _make_values(spec)

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
        here, reach = part_of(cuda.blockIdx.x, group, sizes), sizes[CAUSAL_OFFSET]
        key_at = offsets[KEY, here.slice] + here.key * steps[KEY, 0]
        value_at = offsets[VALUE, here.slice] + here.key * steps[VALUE, 0]

        load_queries(queries_here, query, offsets, steps, here, scale, thread)
        cuda.syncthreads()
        for begin in range(0, part, passes * per_pass):
            multiply_keys(dots, keys_here, queries_here, key, key_at, steps, here, begin, lane, own)
            share_dots(buffer, dots, lane, own)
            cuda.syncthreads()
            find_scores(scores, seen, buffer, mask, offsets, steps, reach, here, begin, thread)
            cuda.syncthreads()

        share_maxima(shares, scores, thread)
        cuda.syncthreads()
        highest, total = weigh(scores, seen, shares, sizes, here, keep_scale, seed_low, seed_high, thread)
        cuda.syncthreads()
        if thread < share_size:
            shares[thread] = total
        cuda.syncthreads()
        write_numbers(numbers, shares, highest, here, thread)

        sum_values(sums_here, value_here, scores, value, value_at, steps, here, lane, own)
        write_sums(sums, sums_here, buffer, here, lane, own, thread)

    return kernel


def _make_products(spec: Decode) -> tuple[Any, Any, Any, Any]:
    """Device functions that say what a block has to do, load its queries, and multiply them by keys."""
    storage, rows, part, lanes, passes = spec.storage, spec.rows, spec.keys, spec.lanes, spec.passes
    columns, width, per_pass, pass_size = spec.columns, vector_width(storage), spec.per_pass, spec.pass_size
    threads, real, zero = spec.threads, real_of(storage), real_of(storage)(0.0)
    load, load_columns = loader(storage, real), vector_loader(storage, real, spec.aligned)
    query_size, pitch = rows * columns, lanes + 1

    @device
    def part_of(block, group, sizes):
        """What a block has to do."""
        queries, keys, head_dim, value_dim = sizes[QUERIES], sizes[KEYS], sizes[HEAD_DIM], sizes[VALUE_DIM]
        parts = (keys + part - 1) // part
        tiles = (group * queries + rows - 1) // rows
        number = block % parts
        first_row = block // parts % tiles * rows
        first_slice = block // parts // tiles * group
        present, count = min(rows, group * queries - first_row), min(part, keys - number * part)
        return Part(first_slice, first_row, number * part, present, count, number, parts, queries, head_dim, value_dim)

    @device
    def load_queries(queries_here, query, offsets, steps, here, scale, thread):
        """The queries times the scale; 0 behind the last one, and behind the last feature."""
        queries, head_dim = here.queries, here.head_dim
        for e in range(thread, query_size, threads):
            r, f = e // columns, e % columns
            x = zero
            if r < here.rows and f < head_dim:
                at = offsets[QUERY, here.slice + (here.row + r) // queries]
                x = scale * load(query[at + (here.row + r) % queries * steps[QUERY, 0] + f * steps[QUERY, 1]])
            queries_here[e] = x

    @device
    def multiply_keys(dots, keys_here, queries_here, key, at, steps, here, begin, lane, own):
        """The products of the keys of a thread, of a pass from key `begin` on, with all rows, over its own features."""
        for p in range(passes):
            j = begin + p * per_pass + own
            # a key behind the last has no features
            features = here.head_dim if j < here.keys else 0
            load_columns(keys_here, p, key, at + j * steps[KEY, 0], steps[KEY, 1], lane * width, features)
        for r in range(rows):
            for p in range(passes):
                total = zero
                for c in range(width):
                    total += queries_here[r * columns + lane * width + c] * keys_here[p, c]
                dots[p, r] = total

    @device
    def share_dots(buffer, dots, lane, own):
        """Show the other lanes the sums over one's own features."""
        for p in range(passes):
            for r in range(rows):
                buffer[p * pass_size + (r * per_pass + own) * pitch + lane] = dots[p, r]

    return part_of, load_queries, multiply_keys, share_dots


def _make_find_scores(spec: Decode) -> Any:
    """A device function of the sums over the features of lanes."""
    rows, part, lanes, passes, threads = spec.rows, spec.keys, spec.lanes, spec.passes, spec.threads
    per_pass, pass_size, pitch = spec.per_pass, spec.pass_size, spec.lanes + 1
    masked, mask_is_bool, real = spec.mask != "none", spec.mask == "bool", real_of(spec.storage)
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
    def find_scores(scores, seen, buffer, mask, offsets, steps, reach, here, begin, thread):
        """The scores of a pass from key `begin` on, and which of them count; `reach` is the causal offset."""
        queries = here.queries
        for e in range(thread, passes * rows * per_pass, threads):
            p, r, k = e // (rows * per_pass), e // per_pass % rows, e % per_pass
            j = begin + p * per_pass + k
            total = zero
            for other in range(lanes):
                total += buffer[p * pass_size + (r * per_pass + k) * pitch + other]
            number, i = here.slice + (here.row + r) // queries, (here.row + r) % queries
            visible = r < here.rows and j < here.keys and here.key + j <= i + reach
            score = lowest
            if visible:
                at = offsets[MASK, number] + i * steps[MASK, 0] + (here.key + j) * steps[MASK, 1]
                score, visible = biased(total, mask, at)
                if not visible:
                    score = lowest
            if j < part:
                scores[r * part + j] = score
                seen[r * part + j] = np.uint8(visible)

    return find_scores


def _make_softmax(spec: Decode) -> tuple[Any, Any, Any]:
    """Device functions of the scores of a part; `share` threads have a row each."""
    rows, part, share, dropout, real = spec.rows, spec.keys, spec.share, spec.dropout, real_of(spec.storage)
    zero, hidden, lowest = real(0.0), real(-0.0), real(-math.inf)

    @device
    def share_maxima(shares, scores, thread):
        """Show the other threads of a row the greatest of one's own scores."""
        r, s = thread // share, thread % share
        if r < rows:
            highest = lowest
            for j in range(s, part, share):
                if scores[r * part + j] > highest:
                    highest = scores[r * part + j]
            shares[thread] = highest

    @device
    def dropped(weight, keep_scale, number, sizes, i, j, seed_low, seed_high):
        """The weight times what dropout leaves of it."""
        factor = zero
        if keeps(number, sizes, i, j, seed_low, seed_high):
            factor = keep_scale
        return weight * factor

    @device
    def weigh(scores, seen, shares, sizes, here, keep_scale, seed_low, seed_high, thread):
        """Turn scores into weights; the greatest score of the row, and the sum of one's own weights before dropout."""
        r, s, queries = thread // share, thread % share, here.queries
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
                        number, i = here.slice + (here.row + r) // queries, (here.row + r) % queries
                        weight = dropped(weight, keep_scale, number, sizes, i, here.key + j, seed_low, seed_high)
                scores[r * part + j] = weight
        return highest, total

    @device
    def write_numbers(numbers, shares, highest, here, thread):
        """Write m and l of each row to memory."""
        r, s = thread // share, thread % share
        if s == 0 and r < here.rows:
            total = zero
            for other in range(share):
                total += shares[r * share + other]
            row = here.slice * here.queries + here.row + r
            numbers[2 * (row * here.of + here.number)] = highest
            numbers[2 * (row * here.of + here.number) + 1] = total

    return share_maxima, weigh, write_numbers


def _make_values(spec: Decode) -> tuple[Any, Any]:
    """Device functions of the weights of a part, and its values."""
    storage, rows, part, threads, per_pass = spec.storage, spec.rows, spec.keys, spec.threads, spec.per_pass
    columns, width, real = spec.columns, vector_width(storage), real_of(storage)
    load_columns = vector_loader(storage, real, spec.aligned)
    zero, one = real(0.0), real(1.0)
    chunk = min(rows, 4)  # rows whose sums are written by one unrolled loop: of more, Numba leaves the loop as it is

    @device
    def add_value(sums_here, weights, value_here, j):
        """sums[r] += weight · value of a key; what is hidden is left out where the value is not finite."""
        check = zero
        for c in range(width):
            check += value_here[0, c] * zero
        if check == zero:
            for r in range(rows):
                weight = weights[r * part + j]
                for c in range(width):
                    sums_here[r, c] += weight * value_here[0, c]
        else:
            for r in range(rows):
                weight = weights[r * part + j]
                if weight != zero or math.copysign(one, weight) > zero:
                    for c in range(width):
                        sums_here[r, c] += weight * value_here[0, c]

    @device
    def sum_values(sums_here, value_here, weights, value, at, steps, here, lane, own):
        """The sums of a thread's own keys and features."""
        for r in range(rows):
            for c in range(width):
                sums_here[r, c] = zero
        for j in range(own, here.keys, per_pass):
            row = at + j * steps[VALUE, 0]
            load_columns(value_here, 0, value, row, steps[VALUE, 1], lane * width, here.value_dim)
            add_value(sums_here, weights, value_here, j)

    @device
    def write_rows(sums, sums_here, buffer, first, here, lane, own, thread):
        """Add up the sums that threads have of `chunk` rows, in the order of the keys, and write them to memory."""
        value_dim, row = here.value_dim, here.slice * here.queries + here.row
        for r in range(chunk):
            cuda.syncthreads()
            for c in range(width):
                buffer[own * columns + lane * width + c] = sums_here[first + r, c]
            cuda.syncthreads()
            if first + r < here.rows:
                for f in range(thread, value_dim, threads):
                    total = buffer[f]
                    for other in range(1, per_pass):
                        total += buffer[other * columns + f]
                    sums[((row + first + r) * here.of + here.number) * value_dim + f] = total

    @device
    def write_sums(sums, sums_here, buffer, here, lane, own, thread):
        """Write acc of each row to memory."""
        write_rows(sums, sums_here, buffer, 0, here, lane, own, thread)
        if rows > 4:
            write_rows(sums, sums_here, buffer, 4, here, lane, own, thread)
        if rows > 8:
            write_rows(sums, sums_here, buffer, 8, here, lane, own, thread)
            write_rows(sums, sums_here, buffer, 12, here, lane, own, thread)

    return sum_values, write_sums


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
