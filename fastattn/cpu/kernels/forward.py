"""The forward pass: FlashAttention's loop order on blocks of queries in the lanes (Dao et al. 2022, arXiv 2205.14135).

A task is a group of query blocks of one head. The group goes through the keys together, one block of keys at a time, so
that K and V are fetched, and packed, once for all of it:

    for each block of keys:                       packed in panels, or where few queries want it, read in place
        for each query block of the group:        its state stays in the second-level cache
            scores[j][i] = key[j] · q[i]          q[p][i]: the queries, transposed, times scale · log2(e)
            scores[j][i] = 2^(scores[j][i] - m[i])
            out[p][i]   += value[j][p] · scores[j][i]

Which blocks share a group changes no bit of a result: every lane runs the same operations on the same keys in the same
order, whatever the others hold. (Only how additive attention computes a score depends on the whole block of queries.)
"""

import math

from fastattn.cpu.kernels import additive
from fastattn.cpu.kernels.dropout import drop
from fastattn.cpu.kernels.pack import (
    copy_rows,
    key_steps,
    pack_keys,
    pack_queries,
    pack_values,
    unpack_rows,
    value_steps,
)
from fastattn.cpu.kernels.prefetch import NOTHING, ask, list_memory, prefetch_rows, want, want_nothing, want_share
from fastattn.cpu.kernels.records import MASK_BOOL, MASK_NONE
from fastattn.cpu.kernels.scores import looks_at, restrict
from fastattn.cpu.kernels.softmax import MINUS_INFINITY, absorb
from fastattn.cpu.kernels.tasks import locate
from fastattn.cpu.kernels.tiles import product, unrolled_product
from fastattn.simd import (
    all_zero,
    jit,
    largest_row,
    load_element,
    load_u8,
    maximum,
    store_element,
    tile_fill,
    tile_load,
    tile_repeat,
    tile_store,
)

LN_2 = 0.6931471805599453


@jit
def load_queries(kernel, call, plan, q, source, present, work):
    """q[p][i] = feature p of query i, times the scale; or what additive attention makes of it."""
    tile = kernel.tile
    if kernel.score == "additive":
        additive.load_queries(tile, call, plan, q, source, present, work)
    else:
        pack_queries(tile, q, source, plan.query_row, plan.query_column, present, plan.head_dim, plan.scale)


@jit
def load_keys(kernel, plan, target, source, count):
    """Pack a block of keys, where they are not read in place; where they are then."""
    tile = kernel.tile
    if kernel.score == "additive":
        return additive.load_keys(tile, plan, target, source, count)
    if kernel.reads == "panels":
        pack_keys(tile, target, source, plan.key_row, plan.key_column, count, plan.head_dim)
        return target
    if kernel.reads == "rows" and plan.key_bytes > 0:
        copy_rows(tile, target, plan.key_step, source, plan.key_row, plan.key_column, count, plan.head_dim)
        return target
    return source


@jit
def load_values(kernel, plan, target, source, count):
    """The same for values."""
    tile = kernel.tile
    if kernel.reads == "panels":
        panel, _, _ = value_steps(kernel, plan)
        pack_values(tile, target, source, plan.value_row, plan.value_column, count, plan.value_dim, panel)
        return target
    if kernel.reads == "rows" and plan.value_bytes > 0:
        copy_rows(tile, target, plan.value_step, source, plan.value_row, plan.value_column, count, plan.value_dim)
        return target
    return source


@jit
def score_block(kernel, plan, q, key, first, count, start, scores, best, wanted):
    """scores[j][i] = start[i] + key[first + j] · q[i] for `count` keys; the maximum of `best` and of them over j.

    Meanwhile what is on the list `wanted` is asked for.
    """
    tile = kernel.tile
    if kernel.score == "additive":
        return additive.score_block(kernel, plan, q, key, first, count, start, scores, best)
    features = plan.head_dim
    panel, row, column = key_steps(kernel, plan)
    key += first // tile.rows * panel
    initial = tile_repeat(tile, start)
    whole = count - count % tile.rows
    for _ in range(0, whole, tile.rows):
        if kernel.reads != "strided":
            acc = unrolled_product(tile, initial, key, row, column, q, features)
        else:
            acc = product(initial, key, row, column, q, tile.row_bytes, features)
        tile_store(acc, scores, tile.row_bytes)
        best = maximum(largest_row(acc), best)
        ask(wanted)
        key += panel
        scores += tile.rows * tile.row_bytes
    for _ in range(whole, count):
        one = product(start, key, row, column, q, tile.row_bytes, features)
        tile_store(one, scores, tile.row_bytes)
        best = maximum(one, best)
        key += row
        scores += tile.row_bytes
    return best


@jit
def add_values(kernel, plan, weights, count, value, out, wanted):
    """out[p][i] += Σ_j value[j][p] · weights[j][i]; meanwhile what is on the list is asked for."""
    tile = kernel.tile
    features = plan.value_dim
    panel, row, column = value_steps(kernel, plan)
    if (
        kernel.score == "additive" and tile.vectors == 1 and column == tile.itemsize
    ):  # few queries: most lanes would be empty
        done = features - features % (tile.quad.rows * tile.lanes)
        additive.add_values(tile, plan, weights, count, value, row, out, done)
        value += done * column
        out += done * tile.row_bytes
        features -= done
    whole = features - features % tile.rows
    for _ in range(0, whole, tile.rows):
        acc = tile_load(tile, out, tile.row_bytes)
        if kernel.reads != "strided":
            acc = unrolled_product(tile, acc, value, column, row, weights, count)
        else:
            acc = product(acc, value, column, row, weights, tile.row_bytes, count)
        tile_store(acc, out, tile.row_bytes)
        ask(wanted)
        value += panel
        out += tile.rows * tile.row_bytes
    for _ in range(whole, features):
        one = tile_load(tile.single, out, tile.row_bytes)
        one = product(one, value, column, row, weights, tile.row_bytes, count)
        tile_store(one, out, tile.row_bytes)
        value += column
        out += tile.row_bytes


@jit
def are_finite(tile, plan, value, count):
    """Whether `count` rows of values hold neither NaN nor infinity (x · 0 = 0 only for a finite x)."""
    sums = tile_fill(tile.vector, 0.0)
    vectors = plan.value_dim // tile.lanes if plan.value_column == tile.itemsize else 0
    for j in range(count):
        row = value + j * plan.value_row
        for v in range(vectors):
            sums = sums + tile_load(tile.vector, row + v * tile.vector_bytes, 0) * 0.0
        for p in range(vectors * tile.lanes, plan.value_dim):
            if load_element(tile, row + p * plan.value_column) * 0.0 != 0.0:
                return False
    return all_zero(sums)


@jit
def add_visible_values(kernel, plan, weights, count, source, value, mask, present, ahead, out):
    """`add_values` for a block with values that are not finite and queries that may not look at some key.

    There 0 · NaN must not reach a query. `source` is the block's first row of values in the user's array, `value` the
    same for the micro-kernel.
    """
    tile = kernel.tile
    # Rows of values that are finite throughout take the fast way; in the others a query is added where it may look.
    _, row, _ = value_steps(kernel, plan)
    start = 0
    for j in range(count + 1):
        at = source + j * plan.value_row
        if j < count and are_finite(tile, plan, at, 1):
            continue
        rows = value + start * row
        add_values(kernel, plan, weights + start * tile.row_bytes, j - start, rows, out, NOTHING)
        start = j + 1
        if j == count:
            break
        for i in range(present):
            if looks_at(kernel, plan, mask, i, j, ahead):
                weight = load_element(tile, weights + j * tile.row_bytes + i * tile.itemsize)
                for p in range(plan.value_dim):
                    place = out + p * tile.row_bytes + i * tile.itemsize
                    element = load_element(tile, at + p * plan.value_column)
                    store_element(tile, place, load_element(tile, place) + element * weight)


@jit
def visible_keys(kernel, plan, first_query, first_key, mask):
    """How many keys of a block the queries of a block look at, and how many of these, from the first, all look at.

    The second is a multiple of what `restrict` takes at a time, unless it is all.
    """
    tile = kernel.tile
    count = min(plan.key_block, plan.keys - first_key)
    safe = count
    if plan.causal:
        position = plan.first_position + first_query
        present = min(tile.width, plan.queries - first_query)
        count = max(0, min(count, position + present - first_key))
        safe = max(0, min(count, position + 1 - first_key))
    if "mask" in kernel.steps and plan.mask_kind != MASK_NONE:
        safe = 0
        if plan.mask_kind == MASK_BOOL and plan.mask_row == 0:
            while count > 0 and load_u8(mask + (count - 1) * plan.mask_column) == 0:
                count -= 1  # padding, usually
    if safe < count:
        step = max(tile.lanes, tile.rows)
        safe -= safe % step
    return count, safe


@jit
def scores_of(kernel, plan, q, m, relative, count, safe, first_query, first_key, key, mask, work, wanted):
    """The block of scores of some queries with `count` keys: their place; their maximum over the keys at `work`.

    `relative`: less m, from which the sums of products then start.
    """
    tile = kernel.tile
    scores = work + tile.row_bytes + tile.buffer_bytes
    start = tile_fill(tile.single, 0.0)
    if relative:
        start = start - tile_load(tile.single, m, 0)
    best = tile_fill(tile.single, MINUS_INFINITY)
    best = score_block(kernel, plan, q, key, 0, safe, start, scores, best, wanted)
    if safe < count:
        tile_store(best, work, 0)
        rest = scores + safe * tile.row_bytes
        score_block(kernel, plan, q, key, safe, count - safe, start, rest, best, wanted)
        present = min(tile.width, plan.queries - first_query)
        position = plan.first_position + first_query
        mask += safe * plan.mask_column
        buffer = work + tile.row_bytes
        restrict(kernel, plan, rest, count - safe, mask, present, position, first_key + safe, work, buffer)
    else:
        tile_store(best, work, 0)
    return scores


@jit
def finish(tile, plan, m, l, block, out, lse, present):
    """Divide by the sum of the weights, write the rows of the output, and the log-sum-exp where it is wanted."""
    for i in range(tile.width):
        total = load_element(tile, l + i * tile.itemsize)
        if lse != 0 and i < present:
            reference = load_element(tile, m + i * tile.itemsize)
            value = reference * (LN_2 * plan.unit) + math.log(total) if total != 0.0 else MINUS_INFINITY
            store_element(tile, lse + i * tile.itemsize, value)
        store_element(tile, l + i * tile.itemsize, plan.keep_scale / total if total != 0.0 else 0.0)
        if total == 0.0:  # no key, or none with a score above -inf: 0 even where a value it has looked at is NaN
            for p in range(plan.value_dim):
                store_element(tile, block + p * tile.row_bytes + i * tile.itemsize, 0.0)
    unpack_rows(tile, block, l, out, plan.out_row, plan.out_column, present, plan.value_dim)


@jit
def clear(tile, at, rows):
    """Fill rows with 0."""
    for _ in range(rows):
        tile_store(tile_fill(tile.single, 0.0), at, tile.row_bytes)
        at += tile.row_bytes


@jit
def forward_group(kernel, call, plan, head, first_block, blocks, scratch):
    """One task: `blocks` query blocks of one head, from `first_block` on, through all keys they look at."""
    tile = kernel.tile
    first_query = first_block * tile.width
    query, key, value, mask, out = locate(call, plan, head)
    query += call.query
    key += call.key
    value += call.value
    mask += call.mask
    out += call.out
    lse = call.lse
    if lse != 0:
        lse += head * plan.queries * tile.itemsize
    # The state of a block: queries, output, m, l. Behind the states: packed keys, packed values, scores.
    q_bytes, out_bytes = plan.query_bytes, plan.value_dim * tile.row_bytes
    state_bytes = q_bytes + out_bytes + 2 * tile.row_bytes
    packed_keys = scratch + blocks * state_bytes
    packed_values = packed_keys + plan.key_bytes
    work = packed_values + plan.value_bytes

    # Under a float mask m may stem from the mask, and be far from the scores.
    relative = "mask" not in kernel.steps or plan.mask_kind <= MASK_BOOL
    unit = plan.unit if "mask" in kernel.steps else 1.0
    end = plan.keys
    if plan.causal:
        last = min(first_query + blocks * tile.width, plan.queries) - 1
        end = min(end, plan.first_position + last + 1)
    wanted = list_memory()
    # What this thread will want next, if all goes as it should: the same part of another head.
    then_query = then_key = then_value = 0
    if plan.ahead > 0 and head + plan.ahead < plan.tasks // plan.groups:
        then_query, then_key, then_value, _, _ = locate(call, plan, head + plan.ahead)
        then_query += call.query + first_query * plan.query_row
        then_key += call.key
        then_value += call.value
    key_bytes, value_bytes = plan.head_dim * tile.itemsize, plan.value_dim * tile.itemsize
    prefetch_rows(key, plan.key_row, min(plan.key_block, end), key_bytes)
    prefetch_rows(value, plan.value_row, min(plan.key_block, end), value_bytes)
    if kernel.score == "additive":  # in working memory that packed keys need later
        for b in range(blocks):
            first = first_query + b * tile.width
            present = min(tile.width, plan.queries - first)
            source = query + first * plan.query_row
            load_queries(kernel, call, plan, scratch + b * state_bytes, source, present, packed_keys)
    for first_key in range(0, max(end, 1), plan.key_block):
        keys, values = key + first_key * plan.key_row, value + first_key * plan.value_row
        count = max(0, min(plan.key_block, end - first_key))
        keys_at = load_keys(kernel, plan, packed_keys, keys, count)
        values_at = load_values(kernel, plan, packed_values, values, count)
        next_count = min(plan.key_block, end - first_key - plan.key_block)
        next_key, next_value = keys + plan.key_block * plan.key_row, values + plan.key_block * plan.value_row
        if next_count <= 0 and then_query != 0:
            next_count, next_key, next_value = min(plan.key_block, plan.keys), then_key, then_value
        finite = True
        if plan.causal or ("mask" in kernel.steps and plan.mask_kind != MASK_NONE):
            finite = are_finite(tile, plan, values, count)
        skipped = 0
        for b in range(blocks):
            first = first_query + b * tile.width
            present = min(tile.width, plan.queries - first)
            q = scratch + b * state_bytes
            block = q + q_bytes
            m = block + out_bytes
            source = query + first * plan.query_row
            if first_key == 0:
                if kernel.score != "additive":
                    load_queries(kernel, call, plan, q, source, present, 0)
                clear(tile, block, plan.value_dim + 2)
            own_end = min(end, plan.first_position + first + present) if plan.causal else end
            is_last = first_key + plan.key_block >= own_end and (first_key == 0 or first_key < own_end)
            masks = mask + first * plan.mask_row + first_key * plan.mask_column
            count, safe = visible_keys(kernel, plan, first, first_key, masks)
            if count > 0:
                # What comes next, what is wanted first before the rest.
                want_nothing(wanted, (count + plan.value_dim) // tile.rows)
                if plan.ahead > 0:
                    if is_last:
                        want(wanted, out + first * plan.out_row, plan.out_row, value_bytes, present)
                        if b + 1 == blocks and then_query != 0:
                            want(wanted, then_query, plan.query_row, key_bytes, tile.width)
                    if first_key == 0 and b + 1 < blocks:
                        rows = min(tile.width, plan.queries - first - tile.width)
                        want(wanted, source + tile.width * plan.query_row, plan.query_row, key_bytes, rows)
                if next_count > 0:
                    share, shares = b - skipped, blocks - skipped
                    want_share(wanted, next_key, plan.key_row, key_bytes, next_count, share, shares)
                    want_share(wanted, next_value, plan.value_row, value_bytes, next_count, share, shares)
                if "mask" in kernel.steps and plan.mask_row != 0:
                    below = masks + tile.width * plan.mask_row
                    want(wanted, below, plan.mask_row, plan.key_block * plan.mask_itemsize, tile.width)
                scores = scores_of(
                    kernel, plan, q, m, relative, count, safe, first, first_key, keys_at, masks, work, wanted
                )
                top = tile_load(tile.single, work, 0)
                absorb(kernel, scores, count, top, relative, unit, m, m + tile.row_bytes, block, plan.value_dim)
                if "dropout" in kernel.steps and plan.drop_below > 0:
                    drop(tile, plan, call.seed, scores, count, head, first, first_key)
                if not finite and safe < count:
                    offset = plan.first_position + first - first_key
                    add_visible_values(kernel, plan, scores, count, values, values_at, masks, present, offset, block)
                else:
                    add_values(kernel, plan, scores, count, values_at, block, wanted)
            else:
                skipped += 1
            if is_last:
                rows, logs = out + first * plan.out_row, lse + first * tile.itemsize if lse != 0 else 0
                finish(tile, plan, m, m + tile.row_bytes, block, rows, logs, present)
