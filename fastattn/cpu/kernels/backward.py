"""The backward pass: five products, with the weights computed again (Dao et al. 2022, arXiv 2205.14135, appendix B).

A task is a group of key blocks of one head of keys. The blocks of queries that look at them come by, in order:

    for each block of queries:                        laid out both ways: queries in the lanes, and features
        for each block of keys of the group:
            s[j][i]   = key[j] · q[i]                 queries in the lanes, as in the forward pass, masks and all
            p[j][i]   = 2^(s - lse[i])
            ds[j][i]  = p · (value[j] · do[i] - Σ do · out)
            dq[i][:] += Σ_j ds[j][i] · key[j][:]      from here on features in the lanes
            dv[j][:] += Σ_i p[j][i] · do[i][:]
            dk[j][:] += Σ_i ds[j][i] · q[i][:]

Where the machine multiplies pairs of bfloat16, all products are of pairs: of features in the first two, of keys for dq,
of queries for dv and dk. p and ds are rounded for these three, and whatever acts on them before is as it is elsewhere.

dk and dv stay with the task. dq is in the result and is added to by one group of keys after the other: a counter for
each block of queries says whose turn it is (`fastattn.cpu.kernels.stages`), and with more heads than threads hardly
anybody waits. Long sequences, and heads of queries that share a head of keys, are more than one task for a group; these
take turns with dk and dv in the same way. So every sum has one order of its terms, and no order of tasks changes a bit.

What is masked has p = ds = 0, and 0 times what is not finite must not arise: keys and queries that are not finite are
replaced by 0 in the last three products, since where they may be looked at ds has NaN. Gradients that are not finite
are added one by one, where a query may look.
"""

from collections import namedtuple

from fastattn.cpu.kernels import gradient_matrix
from fastattn.cpu.kernels.dropout import drop
from fastattn.cpu.kernels.gradient_prefetch import list_wanted
from fastattn.cpu.kernels.gradient_rows import (
    copy_numbers,
    find_deltas,
    load_lanes,
    load_panels,
    load_query_sums,
    store_query_sums,
)
from fastattn.cpu.kernels.gradient_scores import (
    add_distances,
    apply_to_block,
    cap_block,
    hide_from_empty,
    keep_bare,
    spoil,
)
from fastattn.cpu.kernels.gradient_sums import (
    WORD,
    add_to_keys,
    add_visible,
    note_span,
    round_weights,
    whole_tiles,
)
from fastattn.cpu.kernels.masks import lowest
from fastattn.cpu.kernels.pack import clear
from fastattn.cpu.kernels.panels import (
    add_across,
    are_finite,
    clean_panels,
    pack_factors,
    pack_finite_pairs,
    pack_panels,
    product_along,
    unpack_panels,
)
from fastattn.cpu.kernels.prefetch import ask_for_all, list_memory
from fastattn.cpu.kernels.records import GRADIENT_AXIS, GRADIENT_CALL, GRADIENT_PLAN
from fastattn.cpu.kernels.scores import keys_of_block, keys_of_queries, queries_of_keys
from fastattn.cpu.kernels.softmax import exp2
from fastattn.cpu.kernels.stages import finish, wait_for
from fastattn.cpu.kernels.sums import any_has_lost, find_sums, hide_keys, load_sums, relate
from fastattn.cpu.kernels.tasks import own_of, own_view
from fastattn.machine.kernel import PLAIN
from fastattn.simd import (
    all_finite,
    inline,
    jit,
    matrix_begin,
    matrix_end,
    minimum,
    record_view,
    tile_fill,
    tile_load,
    tile_store,
    where_greater,
)

axis_view, call_view = record_view(GRADIENT_AXIS), record_view(GRADIENT_CALL)
plan_view = record_view(GRADIENT_PLAN)
AXIS_BYTES, PLAN_BYTES = GRADIENT_AXIS.itemsize, GRADIENT_PLAN.itemsize

# Where the matrices of a head of queries begin, the number of the head, and where all that it has of its own is.
Head = namedtuple(
    "Head",
    "number query key value bias keep grad_out out grad_query grad_key grad_value grad_bias offset keys own functions",
)


@jit
def locate(call, plan, head):
    """A head of queries, in the order of the plan's axes."""
    axis = call.plan + PLAN_BYTES + plan.axes * AXIS_BYTES
    number = 0
    query, key, value, bias, keep = call.query, call.key, call.value, call.bias, call.keep
    grad_out, out = call.grad_out, call.out
    grad_query, grad_key, grad_value = call.grad_query, call.grad_key, call.grad_value
    grad_bias = call.grad_bias
    for _ in range(plan.axes):
        axis -= AXIS_BYTES
        strides = axis_view(axis)
        index = head % strides.size
        head //= strides.size
        number += index * strides.head
        query += index * strides.query
        key += index * strides.key
        value += index * strides.value
        bias += index * strides.bias
        keep += index * strides.keep
        grad_out += index * strides.grad_out
        out += index * strides.out
        grad_query += index * strides.grad_query
        grad_key += index * strides.grad_key
        grad_value += index * strides.grad_value
        grad_bias += index * strides.grad_bias
    own = own_of(call, number)
    return Head(
        number, query, key, value, bias, keep, grad_out, out, grad_query, grad_key, grad_value, grad_bias,
        own_view(own).offset, own_view(own).keys, own, call.functions,
    )  # fmt: skip


# -- the weights of a block --------------------------------------------------------------------------------------------


@jit
def differentiate(kernel, plan, scores, grads, count, hidden, related, log_sum, delta):
    """Turn a block of scores into weights p, and one of value · do into ds.

    `hidden`: some may not be looked at. `related`: scores are exponents already.
    """
    tile, to_base_2, keep_scale = kernel.tile, plan.to_base_2, plan.keep_scale
    for _ in range(count):
        score = tile_load(tile.single, scores, 0)
        exponent = score if related else score - log_sum
        if (kernel.steps != PLAIN or kernel.of_bfloat16) and not related:
            exponent = exponent * to_base_2
        weight = exp2(kernel, minimum(0.0, exponent))  # no weight is above 1, whatever the roundings of huge scores
        grad = tile_load(tile.single, grads, 0)
        if "dropout" in kernel.steps and "softcap" not in kernel.steps and plan.drop_below > 0:
            grad = grad * keep_scale - delta
        grad = weight * grad
        if hidden:  # 0, also beside an lse of NaN
            weight = where_greater(lowest(tile), score, 0.0, weight)
            grad = where_greater(lowest(tile), score, 0.0, grad)
        tile_store(weight, scores, 0)
        tile_store(grad, grads, 0)
        scores += tile.row_bytes
        grads += tile.row_bytes


@inline
def multiply_block(kernel, plan, head, s, first_key, offset, part, grad_start, scratch, wanted):
    """The scores of `weigh`, and value · do beside them, from what that starts with for a query."""
    if kernel.reads == "matrix":
        gradient_matrix.multiply_block(kernel, plan, head, s, first_key, offset, part, grad_start, scratch, wanted)
        return
    tile, before, count = kernel.tile, part.begin * kernel.tile.row_bytes, part.end - part.begin
    at = s * plan.score_panel + before
    scores, grads = scratch + plan.scores_at + at, scratch + plan.score_grads_at + at
    keys, values = scratch + plan.keys_at + offset + before, scratch + plan.values_at + offset + before
    queries = scratch + plan.query_lanes_at + s * plan.head_dim * tile.row_bytes
    grad_lanes = scratch + plan.grad_lanes_at + s * plan.value_dim * tile.row_bytes
    zero = tile_fill(tile.single, 0.0)
    product_along(kernel, zero, count, keys, plan.panel, queries, plan.head_dim, plan.factor, scores, wanted)
    product_along(kernel, grad_start, count, values, plan.panel, grad_lanes, plan.value_dim, 1.0, grads, wanted)


@jit
def weigh(kernel, call, plan, head, s, first_query, first_key, offset, lost, scratch, wanted):
    """The weights p of one tile width of queries, number `s` of its block, and a block of keys, and their ds.

    `offset` is where in a panel the block of keys begins; `lost`, whether the lse of a query has lost digits. Returns
    the part of the block that is looked at; p and ds of other keys are 0 in the same tile, and not written elsewhere.
    Meanwhile what is on the list `wanted` is asked for.
    """
    tile = kernel.tile
    part = keys_of_block(kernel, plan, head, first_query, first_key)
    count = part.end - part.begin
    if count <= 0:
        ask_for_all(kernel, wanted)
        return part
    before = part.begin * tile.row_bytes
    weights = scratch + plan.scores_at + s * plan.score_panel + before
    grads = scratch + plan.score_grads_at + s * plan.score_panel + before
    log_sum = tile_load(tile.single, scratch + plan.log_sums_at + s * tile.row_bytes, 0)
    delta = tile_load(tile.single, scratch + plan.deltas_at + s * tile.row_bytes, 0)
    zero = tile_fill(tile.single, 0.0)
    grad_begin = zero - delta
    if kernel.steps != PLAIN and plan.drop_below > 0:
        grad_begin = zero
    multiply_block(kernel, plan, head, s, first_key, offset, part, grad_begin, scratch, wanted)
    finite = all_finite(log_sum)
    if not finite:
        spoil(kernel, weights, count, log_sum)
    dropping = "dropout" in kernel.steps and plan.drop_below > 0
    if dropping:
        drop(tile, plan, call, grads, count, head.number, first_query, first_key + part.begin)
    with_slopes = "mask" in kernel.steps and kernel.work == "backward" and call.slope_sums != 0
    bare = grads
    if "softcap" in kernel.steps:
        if with_slopes:
            bare = keep_bare(kernel, plan, grads, count, delta, scratch)
        cap_block(kernel, plan, weights, grads, count, delta)
    if "function" in kernel.steps:
        apply_to_block(kernel, plan, head, weights, grads, bare, part, first_query, first_key, scratch)
    else:
        hide_keys(kernel, plan, head, weights - before, 0, part, first_query, first_key, scratch)
    full, full_end = part.full - part.begin, part.full_end - part.begin
    if not finite:
        hide_from_empty(kernel, weights, count, log_sum)
        full = full_end = 0
    if lost:
        relate(tile, plan, weights, count, s, scratch)
    if full > 0:
        differentiate(kernel, plan, weights, grads, full, True, lost, log_sum, delta)
    if full_end < count:
        rest = full_end * tile.row_bytes
        differentiate(kernel, plan, weights + rest, grads + rest, count - full_end, True, lost, log_sum, delta)
    at = full * tile.row_bytes
    differentiate(kernel, plan, weights + at, grads + at, full_end - full, False, lost, log_sum, delta)
    if with_slopes:
        add_distances(kernel, plan, head, weights, grads, bare, count, first_query, first_key + part.begin, s, scratch)
    if dropping:
        drop(tile, plan, call, weights, count, head.number, first_query, first_key + part.begin)
    behind = whole_tiles(kernel, count) - count
    clear(tile, weights + count * tile.row_bytes, behind)
    clear(tile, grads + count * tile.row_bytes, behind)
    return part


# -- a task ------------------------------------------------------------------------------------------------------------

# What a task is: keys from `first_key` to `end`, group number `group` of them, and blocks of queries; which of them.
Work = namedtuple("Work", "group first_key end first_block last_block")


@jit
def load_keys(kernel, plan, key, value, first, count, scratch):
    """Lay out `count` keys and values in panels, from the first on."""
    keys, values = scratch + plan.keys_at, scratch + plan.values_at
    key += first * plan.key_row
    value += first * plan.value_row
    if kernel.reads == "matrix":
        gradient_matrix.load_keys(kernel, plan, key, value, count, keys, values)
        return
    pack_factors(kernel, keys, plan.panel, key, plan.key_row, plan.key_column, count, plan.head_dim)
    pack_factors(kernel, values, plan.panel, value, plan.value_row, plan.value_column, count, plan.value_dim)


@jit
def work_of(plan, head, group, part):
    """The keys of a group, and the blocks of queries in a part of them that look at some of these keys."""
    first_key = group * plan.group * plan.key_block
    end = min(plan.keys, first_key + plan.group * plan.key_block)
    first_block = part * plan.part
    last_block = min(plan.query_blocks, first_block + plan.part)
    first_query, last_query = queries_of_keys(plan, head, first_key, min(end, head.keys))
    first_block = max(first_block, first_query // plan.query_block)
    last_block = min(last_block, (last_query + plan.query_block - 1) // plan.query_block)
    if first_key >= head.keys:
        last_block = first_block
    return Work(group, first_key, end, first_block, last_block)


@jit
def turn_of(plan, head, work, first_query):
    """How many groups of keys add to the gradient of a block of queries before this one."""
    first, _ = keys_of_queries(plan, head, first_query, first_query)
    return work.group - first // (plan.group * plan.key_block)


@jit
def begin_queries(kernel, call, plan, head, first_query, present, is_first, scratch):
    """Lay out a block of queries. Whether the gradients of their results are finite, and whether an lse is lost."""
    tile = kernel.tile
    queries, grads = head.query + first_query * plan.query_row, head.grad_out + first_query * plan.grad_out_row
    numbers = (head.number * plan.queries + first_query) * tile.itemsize
    lse, deltas = call.lse + numbers, call.deltas + numbers
    if is_first:
        grad_lse = call.grad_lse + numbers if call.grad_lse != 0 else 0
        outs = head.out + first_query * plan.out_row
        find_deltas(tile, plan, grads, outs, lse, grad_lse, present, deltas, scratch)
    full = load_lanes(kernel, plan, queries, grads, lse, present, plan.score_scale, scratch)
    finite = load_panels(kernel, plan, queries, grads, lse, present, full, scratch)
    lost = any_has_lost(tile, plan, lse, present)
    if lost and is_first:
        sink_weights = call.sink_weights + numbers if call.sink_weights != 0 else 0
        find_sums(kernel, plan, head, lse, first_query, present, deltas, sink_weights, scratch)
    return finite, lost


@jit
def meet(kernel, call, plan, head, work, block, finite, finite_keys, lost, is_first, scratch):
    """Take a block of queries through the keys of a group."""
    tile = kernel.tile
    first_query = block * plan.query_block
    present = min(plan.query_block, plan.queries - first_query)
    subs = (present + tile.width - 1) // tile.width
    query_sums = scratch + plan.query_sums_at
    wanted = list_memory()
    for first_key in range(work.first_key, work.end, plan.key_block):
        offset = (first_key - work.first_key) * tile.row_bytes
        keys, keys_panel = scratch + plan.keys_at + offset, plan.panel
        if kernel.reads == "pairs":
            keys = scratch + plan.key_rows_at + offset // 2
        elif not finite_keys:
            keys, keys_panel = scratch + plan.clean_keys_at, plan.score_panel
            there, source = min(plan.key_block, work.end - first_key), scratch + plan.keys_at + offset
            clean_panels(tile, keys, keys_panel, source, plan.panel, there, plan.head_dim, 1.0)
        end = 0
        for s in range(subs):
            first = first_query + s * tile.width
            list_wanted(kernel, plan, head, work, wanted, block, subs, s, first_key, is_first)
            part = weigh(kernel, call, plan, head, s, first, first_key, offset, lost, scratch, wanted)
            note_span(plan, part, s, end, scratch)
            end = max(end, part.end)
            if part.end > part.begin:
                rows = part.begin * tile.row_bytes
                a = scratch + plan.score_grads_at + s * plan.score_panel + rows
                c = query_sums + s * tile.width * tile.row_bytes
                count = part.end - part.begin
                if kernel.reads == "matrix":
                    gradient_matrix.round_weights(kernel, plan, part.begin, whole_tiles(kernel, count), s, scratch)
                    gradient_matrix.add_to_queries(kernel, plan, s, offset, part, scratch)
                    continue
                if kernel.reads == "pairs":
                    round_weights(kernel, plan, part, s, scratch)
                    a, rows = scratch + plan.grad_pairs_at, rows // 2
                add_across(kernel, c, plan.query_panel, plan.head_dim, a, keys + rows, keys_panel, count)
        if end > 0:
            add_to_keys(kernel, plan, offset, subs, present, scratch)
            if not finite:
                add_visible(kernel, call, plan, head, first_query, present, first_key, offset, scratch)


@jit
def begin_keys(kernel, plan, head, work, grad_key, grad_value, scratch):
    """Lay out the keys of a group, and their gradients so far. Whether the keys are finite."""
    tile = kernel.tile
    count, element = work.end - work.first_key, tile.itemsize
    load_keys(kernel, plan, head.key, head.value, work.first_key, count, scratch)
    key_sums, value_sums = scratch + plan.key_sums_at, scratch + plan.value_sums_at
    pack_panels(tile, tile, key_sums, plan.panel, grad_key, plan.grad_key_row, element, count, plan.head_dim)
    pack_panels(tile, tile, value_sums, plan.panel, grad_value, plan.grad_value_row, element, count, plan.value_dim)
    key, rows = head.key + work.first_key * plan.key_row, scratch + plan.key_rows_at
    if kernel.reads == "matrix":
        gradient_matrix.load_key_columns(kernel, plan, key, count, rows)
        return True
    if kernel.reads != "pairs":
        return are_finite(tile, scratch + plan.keys_at, plan.panel, count, plan.head_dim)
    pack_finite_pairs(kernel, rows, plan.panel, key, plan.key_row, plan.key_column, count, plan.head_dim)
    return True


@jit
def differentiate_group(kernel, call, plan, kv_head, group, turn, scratch):
    """One task: a group of key blocks, and the queries of one head, or a part of them: those of turn `turn`."""
    tile = kernel.tile
    number = kv_head * plan.inner + turn // plan.parts
    head = locate(call, plan, number)
    work = work_of(plan, head, group, turn % plan.parts)
    query_turns = call.turns + number * plan.query_blocks * WORD
    key_turns = call.turns + plan.outer * plan.inner * plan.query_blocks * WORD
    key_turns += (kv_head * plan.groups + group) * WORD
    element = tile.itemsize
    grad_key = head.grad_key + work.first_key * plan.grad_key_row
    grad_value = head.grad_value + work.first_key * plan.grad_value_row
    some, finite_keys = work.first_block < work.last_block, True
    if kernel.reads == "matrix":
        matrix_begin()

    wait_for(key_turns, turn)
    if some:
        finite_keys = begin_keys(kernel, plan, head, work, grad_key, grad_value, scratch)
    for block in range(work.first_block, work.last_block):
        first_query = block * plan.query_block
        present = min(plan.query_block, plan.queries - first_query)
        own_turn = turn_of(plan, head, work, first_query)
        is_first = own_turn == 0
        finite, lost = begin_queries(kernel, call, plan, head, first_query, present, is_first, scratch)
        wait_for(query_turns + block * WORD, own_turn)
        numbers = (head.number * plan.queries + first_query) * element
        deltas = call.deltas + numbers
        if lost:
            load_sums(kernel, plan, call.lse + numbers, present, deltas, scratch)
        copy_numbers(tile, scratch + plan.deltas_at, deltas, present, plan.query_block, plan.score_scale)
        sums = head.grad_query + first_query * plan.grad_query_row
        load_query_sums(kernel, plan, sums, present, scratch)
        with_slopes = "mask" in kernel.steps and call.slope_sums != 0
        if with_slopes:
            slope_sums = call.slope_sums + numbers
            copy_numbers(tile, scratch + plan.slope_sums_at, slope_sums, present, plan.query_block, 1.0)
        meet(kernel, call, plan, head, work, block, finite, finite_keys, lost, is_first, scratch)
        if with_slopes:
            copy_numbers(tile, call.slope_sums + numbers, scratch + plan.slope_sums_at, present, present, 1.0)
        store_query_sums(kernel, plan, sums, present, scratch)
        finish(query_turns + block * WORD)
    if some:
        count = work.end - work.first_key
        key_sums, value_sums = scratch + plan.key_sums_at, scratch + plan.value_sums_at
        unpack_panels(tile, key_sums, plan.panel, grad_key, plan.grad_key_row, element, count, plan.head_dim)
        unpack_panels(tile, value_sums, plan.panel, grad_value, plan.grad_value_row, element, count, plan.value_dim)
    finish(key_turns)
    if kernel.reads == "matrix":
        matrix_end()


def task_function(kernel):
    """The task function of the backward pass.

    Tasks are numbered so that those which one waits for have lower numbers, and stand as far before it as can be.
    """

    @jit
    def task(call_at, slot, number):
        call = call_view(call_at)
        plan = plan_view(call.plan)
        kv_head, number = number % plan.outer, number // plan.outer
        group, turn = number % plan.groups, number // plan.groups
        differentiate_group(kernel, call, plan, kv_head, group, turn, call.scratch + slot * plan.scratch_bytes)

    return task
