"""What a kernel is told about a call: where each slice of each operand begins, its steps, and the sizes.

A kernel sees an operand as a one-dimensional array of elements, and reads row i, column c of slice s at

    array[offsets[OPERAND, s] + i * steps[OPERAND, 0] + c * steps[OPERAND, 1]]

A slice is one query head of one row of the batch: s counts (*batch, Hk, G) in C order, so s = batch * heads + head.
Broadcasting, groups of heads, strides that are zero or negative and any number of axes are in the table of offsets,
which is made once for calls of the same shapes and strides, and stays on the device.
"""

from __future__ import annotations

from fastattn.call.scores import HEAD

#: Rows of the tables. Kernels of the backward pass use further ones.
QUERY, KEY, VALUE, MASK, OUT = range(5)
GRAD_OUT, LSE, GRAD_LSE = range(5, 8)
KEEP = 8  # the boolean mask beside a floating one
OPERANDS = 9

#: Three numbers of each query, one query after the other: its weights are exp(score - SHIFT - REST), and DELTA is for
#: the backward pass. SHIFT is the log-sum-exp, and REST 0. But where rounding has taken from the log-sum-exp what
#: matters, SHIFT is the greatest score, and REST the logarithm of the sum of exp(score - SHIFT).
SHIFT, REST, DELTA = range(3)
NUMBERS = 3

#: Places in the vector of sizes.
QUERIES, KEYS, HEAD_DIM, VALUE_DIM, HEADS, SLICES, CAUSAL_OFFSET, DROP_BELOW, FIRST_BATCH = range(9)
SIZES = 9

#: Behind the sizes, four numbers for each slice: query i looks at the keys from i + BOUND_FIRST to i + BOUND_LAST,
#: both included, of the first BOUND_KEYS, and stands at i + BOUND_OFFSET. Kernels that know CAUSAL_OFFSET alone do not
#: look at these.
BOUND_FIRST, BOUND_LAST, BOUND_KEYS, BOUND_OFFSET = range(4)
BOUNDS = 4
#: What heads have of their own that says no more than these numbers.
BOUNDING = ("offset", "keys")

#: Columns of one more table, with a row for each slice, of numbers of the type of the arithmetic; only the portable
#: kernels have it. The softcap is in the base that scores are in, and what heads have of their own is as it was given.
OWN = ("softcap", *(HEAD.names or ()))

#: Words that tell of a user's functions: whether an index was out of range, which kernels set to 1; from CAPTURED on
#: what score_mod captures, as `fastattn.functions.function.record_of` says it; then of what kind blocks of keys are for
#: mask_mod, in so many words, and what it captures; and last whether an element of which a gradient is wanted was read
#: more than once at one place.
OUT_OF_RANGE, CAPTURED = range(2)
REPEATED = -1
#: The address of a byte for each block of `fastattn.functions.kinds`, or 0 if nobody has looked; and the steps from row
#: to row of the batch, from head to head, and from block to block of queries.
KINDS, KINDS_BATCH, KINDS_HEAD, KINDS_QUERY = range(4)
KIND_WORDS = 4
