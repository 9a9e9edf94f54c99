"""What the backward pass asks for ahead: rows of the next block of queries, and what masks have for whom comes next.

Every register tile of its first two products asks for its share of a list (`fastattn.cpu.kernels.prefetch`).
"""

from fastattn.cpu.kernels.prefetch import rows_of_step, want_nothing, want_share
from fastattn.cpu.kernels.scores import keys_of_block, want_masks
from fastattn.simd import jit


@jit
def want_queries(kernel, plan, head, wanted, first_query, share, shares, with_out):
    """Append one of `shares` parts of the rows that belong to a block of queries."""
    tile, count = kernel.tile, min(plan.query_block, plan.queries - first_query)
    features, value_features = plan.head_dim * tile.itemsize, plan.value_dim * tile.itemsize
    rows = head.query + first_query * plan.query_row
    want_share(wanted, rows, plan.query_row, plan.head_dim * kernel.itemsize, count, share, shares)
    rows = head.grad_out + first_query * plan.grad_out_row
    want_share(wanted, rows, plan.grad_out_row, value_features, count, share, shares)
    rows = head.grad_query + first_query * plan.grad_query_row
    want_share(wanted, rows, plan.grad_query_row, features, count, share, shares)
    if with_out:
        rows = head.out + first_query * plan.out_row
        want_share(wanted, rows, plan.out_row, value_features, count, share, shares)


@jit
def list_wanted(kernel, plan, head, work, wanted, block, subs, s, first_key, with_out):
    """Write down what tile width `s` of a block of queries asks for while it is with a block of keys.

    `with_out`: results are wanted as well as their gradients.
    """
    tile, first_query = kernel.tile, block * plan.query_block
    want_nothing(wanted, 2 * plan.key_block // rows_of_step(kernel))
    goes_on, following = block + 1 < work.last_block, first_query + plan.query_block
    if goes_on:
        widths = plan.query_block // tile.width  # each asks for a share, with each block of keys
        shares = (work.end - work.first_key + plan.key_block - 1) // plan.key_block * widths
        share = (first_key - work.first_key) // plan.key_block * widths + s
        want_queries(kernel, plan, head, wanted, following, share, shares, with_out)
    if "mask" in kernel.steps:
        query, key = first_query + (s + 1) * tile.width, first_key
        if s + 1 == subs:
            query, key = first_query, first_key + plan.key_block
        if key >= work.end:
            query, key = following, work.first_key
        if query < following or goes_on:
            part = keys_of_block(kernel, plan, head, query, key)
            want_masks(kernel, plan, head, wanted, query, key, part)
