"""Sinks: a score of each query that has no key, and meets the others where the sums of the softmax are finished.

Until then m and l are those of the keys. `term` is what the sink adds to l, in its unit: exp(sink - m), which may be
infinite. Then nothing is left for the keys.
"""

import math

from fastattn.cpu.kernels.softmax import MINUS_INFINITY
from fastattn.cpu.kernels.tasks import own_view
from fastattn.simd import jit, load_element, store_element

INFINITY = float("inf")
LN_2 = 0.6931471805599453


@jit
def sink_of(head):
    """The sink of a head, -inf if there is none."""
    return own_view(head.own).sink


@jit
def reference_of(plan, m):
    """What exponents of a row refer to, m, in base e."""
    return m * (LN_2 * plan.to_base_2)


@jit
def term_of(plan, sink, m, total):
    """What a sink adds to the sum of a row's weights: nothing where no key has any, NaN to a sum that is NaN."""
    if sink == MINUS_INFINITY or total == 0.0:
        return 0.0
    return math.exp(sink - reference_of(plan, m)) + total * 0.0


@jit
def log_sum(plan, sink, m, total, term):
    """The logarithm of a row's sum of exponentials, the sink's among them."""
    if total == 0.0 or term == INFINITY:
        return sink
    if term > total:  # far from m, from where digits would be lost on the way back
        return sink + math.log(1.0 + total / term)
    return reference_of(plan, m) + math.log(total + term)


@jit
def log_beside(plan, sink, m, total, term):
    """The same less what m stands for, of which nothing is lost where both are large."""
    return log_of_both(sink - reference_of(plan, m), total, term)


@jit
def log_of_both(above, total, term):
    """The logarithm of a sum of weights and what a sink adds to it, which is by so much above what weights refer to."""
    if total == 0.0 or term == INFINITY:
        return above
    return above + math.log(1.0 + total / term) if term > total else math.log(total + term)


@jit
def share_of_sink(total, term):
    """The weight of a sink beside the keys that have a sum."""
    return 1.0 if total == 0.0 or term == INFINITY else term / (total + term)


@jit
def add_sinks(tile, plan, head, m, l):
    """l[i] += what the sink adds to it, for a row of lanes."""
    sink = sink_of(head)
    if sink != MINUS_INFINITY:
        for offset in range(0, tile.row_bytes, tile.itemsize):
            total = load_element(tile, l + offset) * 1.0
            store_element(tile, l + offset, total + term_of(plan, sink, load_element(tile, m + offset), total))
