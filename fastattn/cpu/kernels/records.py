"""What a kernel is told: two records, read by name in the kernels and written by `fastattn.cpu.host.plan`.

`PLAN` holds what depends on shapes, strides and options alone and is shared by all calls that agree in these; behind it
in memory stands the table of leading axes (`AXIS`), outermost first. `CALL` holds what is new in every call.
All strides are in bytes; addresses are integers.
"""

import numpy as np

from fastattn.call.scores import HEAD

i8, f8 = np.int64, np.float64

# What every plan begins with: how its tasks are run, and what its heads have.
_SCHEDULE = [
    ("tasks", i8),
    ("workers", i8),  # that may take part besides the caller
    ("turn", i8),  # tasks that the caller does between two looks at Python's signals
    ("scratch_bytes", i8),  # working memory of one thread
    *(("own_" + name, HEAD[name].type) for name in HEAD.names or ()),  # what a head has that has nothing of its own
]
SCHEDULE = np.dtype(_SCHEDULE)
OWN_AT = SCHEDULE.itemsize - HEAD.itemsize
_PARTS = [
    ("queries", i8),
    ("keys", i8),
    ("head_dim", i8),
    ("value_dim", i8),
    ("query_row", i8),  # strides of a head's matrices: from row to row, from column to column
    ("query_column", i8),
    ("key_row", i8),
    ("key_column", i8),
    ("value_row", i8),
    ("value_column", i8),
    ("bias_row", i8),
    ("bias_column", i8),
    ("keep_row", i8),
    ("keep_column", i8),
    ("out_row", i8),
    ("out_column", i8),
    ("adds", i8),  # 1: something is added to scores
    ("bias_kind", i8),  # one of BIAS_*
    ("bias_itemsize", i8),
    ("keep", i8),  # 1: there is a boolean mask
    ("left_bound", i8),  # 1: a query looks at no key farther before its position than `left`
    ("left", i8),
    ("right_bound", i8),  # 1: and at none farther behind it than `right`
    ("right", i8),
    ("softcap", f8),  # in the base that scores are kept in
    ("softcap_factor", f8),  # 2 log2(e) / softcap
    ("scale", f8),  # of the scores, times log2(e) where they are kept in base 2
    ("to_base_2", f8),  # makes base 2 of a difference of scores: log2(e) where something is added to them, else 1
    ("factor", f8),  # of products of pairs, for which queries are multiplied by a power of two alone
    ("out_itemsize", i8),  # of results in half precision or wider
    ("drop_below", i8),  # an element is dropped if its 32 random bits are below this
    ("keep_scale", f8),  # 1 / (1 - dropout_p), 0 if nothing is kept
    ("first_head", i8),  # the numbers of the first head, query and key in the call that this may be a piece of
    ("first_query", i8),
    ("first_key", i8),
    ("axes", i8),  # rows of the table of leading axes
    ("heads", i8),  # length of their last two, the query heads of one batch row
    ("blocks", i8),  # query blocks per head
    ("key_block", i8),  # keys taken through the softmax at a time
    ("group", i8),  # query blocks taken through the keys together; with few queries, rows
    ("groups", i8),  # tasks per head
    ("key_group", i8),  # of a summary, besides: key blocks whose weights are a task, and how many such tasks a head has
    ("key_groups", i8),
    ("prefetch_distance", i8),  # heads from a task to the next that its thread is likely to do; 0: none is asked for
    ("query_bytes", i8),  # of a block of queries, as the scores want them
    ("key_bytes", i8),  # of a block of keys, the same; 0 where keys are read in place
    ("value_bytes", i8),  # of a block of values; 0 where they are
    ("key_step", i8),  # from row to row as the micro-kernel finds them, in place or copied
    ("value_step", i8),
    ("group_heads", i8),  # with few queries: query heads on one head of keys, whose rows are taken together
    ("shares", i8),  # tasks that the keys of these rows are cut into
    ("pieces", i8),  # pieces of the keys, at most
    ("row_numbers", i8),  # room for a number of each of these rows
    ("score_bytes", i8),  # of a row of scores, and of one of sums
    ("sum_bytes", i8),
    ("partial_bytes", i8),  # of what a piece leaves
    ("page", i8),  # keys in a page, where there are pages: `fastattn.cpu.kernels.pages`
    ("key_page", i8),  # strides: from page to page, and in a page, where rows are gathered
    ("key_page_row", i8),
    ("key_page_column", i8),
    ("value_page", i8),
    ("value_page_row", i8),
    ("value_page_column", i8),
    ("gathered_keys", i8),  # bytes of the rows of a block; 0 where they are read in their page
    ("gathered_values", i8),
    ("table_row", i8),  # strides of the table of pages, of which each row of the batch has a row
    ("table_column", i8),
    ("table_itemsize", i8),
]
PLAN = np.dtype([*_SCHEDULE, *_PARTS])

AXIS = np.dtype([(name, i8) for name in ("size", "query", "key", "value", "bias", "keep", "out")])

# Written by `fastattn.cpu.kernels.entry`, in this order; so is what calls of other plans have behind `scratch`.
CALL = np.dtype(
    [
        ("plan", i8),
        ("scratch", i8),  # working memory, one piece per participating thread
        ("query", i8),
        ("key", i8),
        ("value", i8),
        ("bias", i8),
        ("keep", i8),
        ("heads", i8),  # what heads have of their own: `fastattn.call.scores.HEAD` for each; 0: nothing
        ("functions", i8),  # the user's: where `FUNCTIONS` is
        ("out", i8),
        ("lse", i8),  # 0: not wanted; otherwise contiguous, as are the weights
        ("weight", i8),  # of the features, contiguous: additive attention only
        ("weights", i8),
        ("seed", i8),
        ("first_batch", i8),  # the number of the first row of the batch in the call that this may be a piece of
        ("partials", i8),  # with few queries, where keys are shared: counters of what has been done, then partials
        ("pages", i8),  # the table of the pages of the first row of the batch, where there are pages
    ]
)

# The record of several calls that are run as one (their plan is `SCHEDULE` alone), and of some tasks of one of them.
SEVERAL = np.dtype([("plan", i8), ("scratch", i8), ("runs", i8)])
# Of these: the address of the kernel's function, that of the record of the call, the first task, and where they end.
RUN = ("task", "call", "first", "end")

# How what heads have of their own is made of the arrays of a call: for how many heads, what one has that has nothing of
# its own, and how many of `SOURCE` there are, behind it.
OWN = np.dtype([("heads", i8), *((name, HEAD[name].type) for name in HEAD.names or ()), ("sources", i8)])
SOURCE = np.dtype(
    [
        ("argument", i8),  # which of the arrays the numbers of a field are in
        ("kind", i8),  # what its elements are: one of WHOLE, UNSIGNED, REAL, SHORT_REAL
        ("itemsize", i8),
        ("places", i8),  # the address of the places of the elements of all heads, in bytes from the array's first
        ("field", i8),  # where in HEAD the numbers go, in bytes
        ("is_whole", i8),  # 1: they are whole numbers
        ("less", i8),  # what is subtracted from these
        ("low", i8),  # others than from here
        ("high", i8),  # to here are refused
        ("finite", i8),  # 1: of others, those that are not finite are
        ("largest", f8),  # of sinks, in the dtype of the call; 0: they are no sinks
        ("single", i8),  # 1: that is float32, which they are rounded to
    ]
)
WHOLE, UNSIGNED, REAL, SHORT_REAL = range(4)  # SHORT_REAL: bfloat16

# What a compiled function that Python calls as a builtin is bound to.
LINK = np.dtype(
    [
        ("none", i8),  # where Python's None is, and NumPy's type of arrays
        ("array_type", i8),
        ("save_thread", i8),  # the addresses of functions of Python's C interface
        ("restore_thread", i8),
        ("to_int", i8),
        ("from_int", i8),
        ("to_bytes", i8),
        ("call", i8),
        ("true", i8),  # and what else a signature tells apart
        ("false", i8),
        ("int_type", i8),
        ("float_type", i8),
        ("to_word", i8),
        ("function", i8),  # of Python's, to be called
        ("task", i8),
    ]
)

# The backward pass: the plan has more in it, and more arrays have axes. (The leading axes that key and value are
# broadcast along stand last in the table: what they are looked at from there is summed in one place. In the plan for
# the gradient of a mask it is those that the mask is broadcast along.)
GRADIENT_ARRAYS = (
    "query",
    "key",
    "value",
    "bias",
    "keep",
    "grad_out",
    "out",
    "grad_query",
    "grad_key",
    "grad_value",
    "grad_bias",
)
# What a task has in its working memory, in this order.
GRADIENT_PARTS = (
    "keys",  # of a group of key blocks, in panels, as are the four that follow
    "values",
    "key_sums",  # their gradients
    "value_sums",
    "queries",  # of a block of queries
    "grads",  # the gradient of its result
    "query_sums",  # its gradient
    "query_lanes",  # queries once more, and the gradient of their result, with queries in the lanes
    "grad_lanes",
    "log_sums",  # a number for each query: what is subtracted from scores
    "shifts",  # where an lse has lost digits, instead: what is subtracted from scores, and then from exponents
    "rests",
    "deltas",  # and what is subtracted from the gradient of a weight
    "slope_sums",  # what slopes of ALiBi get from it, with queries in the lanes
    "bare_grads",  # gradients of scores before the slope of a softcap
    "spans",  # the first key and the end of those of a block that the queries of each tile width look at
    "work",
    "scores",  # of a block of queries and a block of keys: scores, then weights
    "score_grads",  # and their gradients
    "clean_keys",  # a block of keys, with 0 for what is not finite
    "outs",  # results of a block of queries
    "raws",  # scores before the user's function; in the plan for the gradients of what that captures
    # Where pairs of bfloat16 are multiplied:
    "key_rows",  # keys once more, in pairs of rows, with 0 for what is not finite
    "weight_rows",  # weights in pairs of queries, and gradients of scores
    "grad_rows",
    "grad_pairs",  # these in pairs of keys, of one tile width of the queries; room, for a matrix unit
    # Terms of bfloat16, for a matrix unit, which has these four as well, laid out as it wants them:
    "query_lane_terms",
    "grad_lane_terms",
    "query_panel_terms",
    "grad_panel_terms",
)
GRADIENT_PLAN = np.dtype(
    [
        *_SCHEDULE,
        ("grad_out_row", i8),
        ("grad_out_column", i8),
        ("grad_query_row", i8),
        ("grad_key_row", i8),
        ("grad_value_row", i8),
        ("grad_bias_row", i8),
        ("score_scale", f8),  # of the gradients of scores: usually the scale itself, whatever base scores are kept in
        ("score_factor", f8),  # what these lack besides, in products of pairs
        ("precise", f8),  # below this magnitude an lse has not lost digits that matter
        ("slack", f8),  # how far an lse may be from the sum of its row, relative to its size
        ("numbers", i8),  # bytes of one number for each query of all heads
        ("query_block", i8),  # queries taken together, some tile widths
        ("query_blocks", i8),
        ("outer", i8),  # heads of keys, or of a mask
        ("inner", i8),  # heads of queries for each
        ("parts", i8),  # tasks that a head's queries are split into
        ("part", i8),  # blocks of queries in each
        ("bias_queries", i8),  # rows and columns that the mask has of its own: 1 where it is broadcast
        ("bias_keys", i8),
        ("panel", i8),  # from panel to panel, in bytes: of a group of key blocks
        ("query_panel", i8),  # of a block of queries
        ("score_panel", i8),  # of a block of keys
        *((name + "_at", i8) for name in GRADIENT_PARTS),  # where in working memory
        *_PARTS,  # last: Numba takes a longer record for a kind of the shorter one that it begins with
    ]
)
GRADIENT_AXIS = np.dtype([("size", i8), ("head", i8), *((name, i8) for name in GRADIENT_ARRAYS)])
GRADIENT_CALL = np.dtype(
    [
        ("plan", i8),
        ("scratch", i8),
        *((name, i8) for name in GRADIENT_ARRAYS),
        ("lse", i8),  # contiguous, one number for each query of all heads; so is grad_lse, unless 0
        ("grad_lse", i8),
        ("sink_weights", i8),  # the same, of sinks, where an lse has lost digits; 0: not wanted
        ("slope_sums", i8),  # the same, of the gradients of a query's scores times the positions between; 0: not wanted
        ("heads", i8),
        ("functions", i8),
        ("deltas", i8),  # what the first group of keys finds, for those that follow: deltas, and m and log2(l) behind
        # Counters: for each block of queries of each head, the groups of keys that have been there; behind these, for
        # each group of keys of each head of keys, the parts of the queries that have been there.
        ("turns", i8),
        ("seed", i8),
        ("first_batch", i8),
    ]
)

# The user's functions: addresses of compiled ones (`fastattn.cpu.kernels.lanes`), 0 where there is none, and of what
# tells them of the values that they capture; what is known of blocks of keys.
FUNCTIONS = np.dtype(
    [
        ("heads", i8),  # query heads of one row of the batch
        ("first_row", i8),  # the number of the first row of the batch
        ("first_head", i8),
        ("first_key", i8),  # that of the first key, which positions of queries count from as well
        ("value", i8),  # of a score
        ("slope", i8),
        ("along", i8),
        ("score_captured", i8),
        ("hide", i8),  # what may not be seen
        ("seen_captured", i8),
        ("marks", i8),
        ("add", i8),  # to the gradients of captured arrays
        ("targets", i8),  # their addresses: for each part of the work one of each array
        ("arrays", i8),  # how many there are
        (
            "kinds",
            i8,
        ),  # a byte for each block of queries and keys, for all rows of the batch and heads or some: EMPTY, ...
        ("kinds_batch", i8),  # strides; 0: the same for all
        ("kinds_head", i8),
        ("kinds_row", i8),
        ("out_of_range", i8),  # set to 1 where a query may look at a key for which an index was out of range
    ]
)

# Where the summary of a call is kept (`call.out` is the address of this record): contiguous arrays with one element, or
# `top_k` elements, for each query, and of `key_weights` one for each key, of all heads. 0: not wanted.
SUMMARY = np.dtype(
    [
        ("top_k", i8),
        ("m", i8),  # of the online softmax, so that a weight is 2^((score - m) · to_base_2) / l
        ("l", i8),
        ("lse", i8),
        ("entropy", i8),
        ("top_weights", i8),
        ("top_indices", i8),
        ("key_weights", i8),
        ("finished", i8),  # counters: for each head the tasks on its queries that are done
    ]
)

# The backward pass of additive attention (`call.out` is the address of this record; `call.lse` is what was returned).
# All arrays are contiguous but grad_out, whose strides are the plan's of `out`.
ADDITIVE_BACKWARD = np.dtype(
    [
        ("query_block", i8),  # rows of a block; the plan has those of a block of keys
        ("query_blocks", i8),  # in a chunk
        ("key_blocks", i8),
        ("term_queries", i8),  # queries that meet a vector of keys at a time
        ("grad_out", i8),
        ("out", i8),
        ("grad_lse", i8),  # 0: there is none
        ("grad_query", i8),
        ("grad_key", i8),
        ("grad_value", i8),
        ("grad_weight", i8),  # a row for each chunk of each head, which takes its part of the sum
        ("sums", i8),  # m and log2(l) of each query whose lse has lost digits, for all rounds
        ("turns", i8),  # counters: for each chunk of each head, the rounds in which its queries have had their turn
        ("cuts", i8),  # of each row of the batch: chunks, and blocks of queries and of keys in one; 0: the plan's
        ("sink_weights", i8),  # as in GRADIENT_CALL
        ("slope_sums", i8),
        ("precise", f8),  # as in GRADIENT_PLAN
        ("slack", f8),
        # of `fastattn.cpu.kernels.additive_score_gradients`
        ("head_blocks", i8),  # blocks of queries of a head
        ("outer", i8),  # heads of a mask, and how many heads share each; where there is none, all heads and 1
        ("inner", i8),
        ("shared_by", i8),  # the numbers of these, for each head of a mask
        ("grad_bias", i8),  # of float64
        ("grad_bias_head", i8),  # strides; 0 where the mask is broadcast
        ("grad_bias_row", i8),
        ("grad_bias_column", i8),
    ]
)

# Where a task of it keeps what it works on: rows [query][...] of a block of queries, [key][...] of a block of keys.
ADDITIVE_PLACES = np.dtype(
    [
        ("factors", i8),  # 2 weight
        ("grad_weight", i8),
        ("sums", i8),  # of the weights, in lanes
        ("slope_sums", i8),  # of all dS, in lanes
        ("distances", i8),  # of dS times the positions between query and key, in lanes, for each query; 0: not wanted
        # lse, Σ dO · out less the gradient of lse, whether dO is not finite, 0; or m and log2(l) for the first and last
        ("numbers", i8),
        ("q_largest", i8),  # the largest |query|, |key|; raws and exponentials as in `fastattn.cpu.kernels.additive`
        ("q_raws", i8),
        ("q_exps", i8),
        ("grad_queries", i8),
        ("rows", i8),  # dO
        ("largest", i8),
        ("raws", i8),
        ("exps", i8),
        ("grad_keys", i8),
        ("values", i8),  # [key / width][feature][key % width]; for few queries [key][feature]
        ("grad_values", i8),
        ("term_queries", i8),
        ("weights", i8),  # [query][key]: dO · value, then P
        ("hidden", i8),  # [query][key]: what is added to scores
        ("lanes", i8),  # [query][key][lane]: scores, then -dS
        ("terms", i8),  # [query][key][feature]: -1 / (1 + exp(2 query) exp(2 key))
        ("work", i8),
    ]
)

KEYS_AT_ONCE = 32  # whose values few queries multiply in turn, no fewer than any tile has lanes
QUERY_NUMBERS = 4  # of a query: `numbers`

# What a mask is made of: of the dtype of the call, or not.
BIAS_NONE, BIAS_SAME, BIAS_OTHER, BIAS_HALF, BIAS_BFLOAT16, KEEP = range(6)
ALIGNMENT = 64
# In front of a call's working memory.
RECORD_BYTES = -(-max(CALL.itemsize, GRADIENT_CALL.itemsize) // ALIGNMENT) * ALIGNMENT

# The scheduler's shared memory, offsets in bytes: words that different threads write often have lines of their own.
OFFER = 0  # tasks nobody has claimed, and above LIMIT_SHIFT the number of workers that may take part
PENDING = 64  # tasks nobody has finished
TASK, CALL_AT, TASKS = 128, 136, 144  # of the current call
OWNER = 152  # the address of the call that has the pool, 0 if none has
START, WOKEN = 160, 168  # the addresses of the compiled `start`, and of the list of workers that a call has to wake
STAFF, SPINS_AT = 176, 184  # how many workers there are, and rounds of waiting before one sleeps
WORKERS = 192  # one line a worker: 1 while it sleeps, or is about to
WORKER_BYTES = 64
LIMIT_SHIFT = 48
TASKS_MASK = (1 << LIMIT_SHIFT) - 1

DONE, MORE, WAITING, ASLEEP = range(4)  # what the caller is told; above ASLEEP, how many
TAKEN = -1  # another call has the pool
