"""Ways to break the kernels, each with the tests that must notice."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """One edit: in `file` of the package, `old`, which stands there exactly once, becomes `new`.

    `tests` is what pytest is given, a file of tests and an expression for its -k.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, str]


MUTATIONS = (
    Mutation(
        "the causal limit is off by one",
        "cpu/masks.py",
        "distance + (ahead + 0.5)",
        "distance + (ahead - 0.5)",
        ("test_semantics.py", "test_causal_keeps_keys_up_to_the_query and cpu"),
    ),
    Mutation(
        "a square of scores that are not finite is added to its mask without a second look",
        "cpu/masks.py",
        "    if not all_finite(biased):",
        "    if all_finite(biased):",
        ("test_semantics.py", "test_what_is_masked_never_leaks and cpu and float and both"),
    ),
    Mutation(
        "the causal limit cuts a key off the last block",
        "cpu/forward.py",
        "end = min(end, plan.first_position + last + 1)",
        "end = min(end, plan.first_position + last)",
        ("test_semantics.py", "test_causal_keeps_keys_up_to_the_query and cpu"),
    ),
    Mutation(
        "the output is not rescaled when the maximum rises",
        "cpu/softmax.py",
        "rescale(tile, out, features, factor)",
        "rescale(tile, out, 0, factor)",
        ("test_properties.py", "test_a_maximum_that_keeps_rising_or_never_does"),
    ),
    Mutation(
        "the sum is not rescaled when the maximum rises",
        "cpu/softmax.py",
        "shift, unit, total * factor)",
        "shift, unit, total)",
        ("test_properties.py", "test_a_maximum_that_keeps_rising_or_never_does"),
    ),
    Mutation(
        "the last queries of a vector are not written",
        "cpu/pack.py",
        "for i in range(min(tile.lanes, present - first)):",
        "for i in range(min(tile.lanes, present - first - 1)):",
        ("test_semantics.py", "test_out_is_the_weights_times_the_values and cpu"),
    ),
    Mutation(
        "the lanes behind the last query are written",
        "cpu/pack.py",
        "        if first + tile.lanes <= present and column == tile.itemsize:\n"
        "            while done + tile.lanes <= features:\n"
        "                square = tile_load(tile.square, lanes_at",
        "        if column == tile.itemsize:\n"
        "            while done + tile.lanes <= features:\n"
        "                square = tile_load(tile.square, lanes_at",
        ("test_memory.py", "test_nothing_but_out_is_written and float32"),
    ),
    Mutation(
        "keys behind the last one take part",
        "cpu/masks.py",
        "square = where_greater(columns - 0.5, index, square, MINUS_INFINITY)",
        "square = where_greater(columns + 0.5, index, square, MINUS_INFINITY)",
        ("test_semantics.py", "test_a_floating_mask_is_added_after_the_scale and cpu"),
    ),
    Mutation(
        "the tail of the features of the values is left out",
        "cpu/forward.py",
        "for _ in range(whole, features):",
        "for _ in range(whole, features - 1):",
        ("test_isa.py", "test_sixteen_lanes_on_any_machine"),
    ),
    Mutation(
        "sums with a mask overflow",
        "cpu/masks.py",
        "where_greater(INFINITY, largest, saturate(tile, biased), biased)",
        "biased",
        ("test_semantics.py", "test_a_row_of_the_lowest_number_gives_the_mean and cpu"),
    ),
    Mutation(
        "NaN in a masked value leaks",
        "cpu/forward.py",
        "if not finite and safe < count:",
        "if not finite and safe < 0:",
        ("test_semantics.py", "test_what_is_masked_never_leaks and cpu"),
    ),
    Mutation(
        "the log-sum-exp is in base 2",
        "cpu/forward.py",
        "LN_2 = 0.6931471805599453",
        "LN_2 = 1.0",
        ("test_semantics.py", "test_lse_is_the_natural_logarithm_of_the_denominator and cpu"),
    ),
    Mutation(
        "dropout does not enlarge what it keeps",
        "cpu/forward.py",
        "plan.keep_scale / total",
        "1.0 / total",
        ("test_isa.py", "test_every_row_that_runs_here_is_right and generic"),
    ),
    Mutation(
        "a constant of Philox is wrong",
        "cpu/dropout.py",
        "MULTIPLIERS = 0xD2511F53, 0xCD9E8D57",
        "MULTIPLIERS = 0xD2511F53, 0xCD9E8D59",
        ("test_semantics.py", "test_dropout_zeroes_weights_and_enlarges_those_it_keeps and cpu"),
    ),
    Mutation(
        "a query head reads the next key head",
        "cpu/tasks.py",
        "key += index * strides.key",
        "key += (index + 1) % strides.size * strides.key",
        ("test_semantics.py", "test_query_head_h_reads_key_head_h_over_group and cpu"),
    ),
    Mutation(
        "the rows of a mask are taken for its columns",
        "cpu/masks.py",
        "at = mask + v * lanes * row + j * column",
        "at = mask + v * lanes * column + j * column",
        ("test_semantics.py", "test_a_floating_mask_is_added_after_the_scale and cpu"),
    ),
    Mutation(
        "2^x is off in its seventh digit",
        "cpu/softmax.py",
        "0.6931469775828203",
        "0.6931459775828203",
        ("test_simd.py", "test_exp2_is_right_to_some_units and float32x4"),
    ),
    Mutation(
        "two threads may claim the same task",
        "cpu/claim.py",
        "if atomic_replace(pool + OFFER, offer, offer - 1):",
        "if atomic_exchange(pool + OFFER, offer - 1) != 0:",
        ("test_threads.py", "test_every_task_runs_once"),
    ),
    Mutation(
        "tasks are counted from one",
        "cpu/claim.py",
        "number = load_i64(pool + TASKS) - (offer & TASKS_MASK)",
        "number = load_i64(pool + TASKS) - (offer & TASKS_MASK) + 1",
        ("test_threads.py", "test_every_task_runs_once"),
    ),
    Mutation(
        "the caller does not wait for the others",
        "cpu/claim.py",
        "if atomic_load(pool + PENDING) == 0:\n            atomic_store(pool + OWNER, 0)",
        "if atomic_load(pool + PENDING) >= 0:\n            atomic_store(pool + OWNER, 0)",
        ("test_threads.py", "test_every_task_runs_once"),
    ),
    Mutation(
        "the entropy is not moved along when m rises",
        "cpu/summary.py",
        "factor * fma(total, change, moment)",
        "factor * moment",
        ("test_summary.py", "test_summary_of_scores_that_keep_rising and float32"),
    ),
    Mutation(
        "of equal scores the later key stays",
        "cpu/top.py",
        "((a == b) & (a_key > b_key))",
        "((a == b) & (a_key < b_key))",
        ("test_summary.py", "test_ties_go_to_the_lower_index and cpu and float32"),
    ),
    Mutation(
        "a score that enters a heap does not raise what is to be exceeded",
        "cpu/top.py",
        "store_element(tile, least_at + i * tile.itemsize, load_element(tile, scores))",
        "store_element(tile, least_at + i * tile.itemsize, load_element(tile, least_at + i * tile.itemsize))",
        ("test_summary.py", "test_ties_go_to_the_lower_index and cpu and float32"),
    ),
    Mutation(
        "keys receive weight from lanes without a query",
        "cpu/received.py",
        "if present < tile.width:",
        "if present < 0:",
        ("test_summary.py", "test_what_is_masked_never_shows and cpu and float32"),
    ),
    Mutation(
        "the first queries that look at a key are passed over",
        "cpu/received.py",
        "// tile.width * tile.width",
        "// tile.width * tile.width + tile.width",
        ("test_summary.py", "test_summary_of_many_blocks and float32 and True"),
    ),
    Mutation(
        "NaN of a query reaches keys that it may not look at",
        "cpu/received.py",
        "weight = where_greater(lowest(tile), score, 0.0, weight)",
        "weight = where_greater(score, score, 0.0, weight)",
        ("test_summary.py", "test_nan_reaches_what_it_may_look_at_and_nothing_else and cpu"),
    ),
    Mutation(
        "weights are chosen with the sums of other queries",
        "cpu/summary.py",
        "total = load_rows(tile, out.l, head * plan.queries + first_query, present, factors)",
        "total = load_rows(tile, out.l, head * plan.queries, present, factors)",
        ("test_summary.py", "test_the_greatest_weights_are_those_of_attention_weights"),
    ),
    Mutation(
        "denominators are used beyond their reach",
        "cpu/additive.py",
        "REACH_32, REACH_64 = 21.0, 170.0",
        "REACH_32, REACH_64 = 43.0, 340.0",
        ("test_additive.py", "test_sums_at_and_beyond_the_reach_of_denominators"),
    ),
    Mutation(
        "one key out of reach takes its panel with it",
        "cpu/additive.py",
        "if load_element(tile, largest + r * tile.itemsize) <= reach:\n                    at = ",
        "if all_near(tile, largest, height, reach):\n                    at = ",
        ("test_additive.py", "test_nothing_masked_leaks"),
    ),
    Mutation(
        "an exponential loses the digits of a large argument",
        "cpu/additive.py",
        "rest = x - n * HALF_LN2_HIGH_32 - n * HALF_LN2_LOW_32",
        "rest = x - n * HALF_LN2_HIGH_32",
        ("test_additive.py", "test_sums_at_and_beyond_the_reach_of_denominators"),
    ),
    Mutation(
        "the second of two features has the factor of the first",
        "simd/memory.py",
        "factor, next_factor = scalar(values[6]), scalar(values[7])",
        "factor, next_factor = scalar(values[6]), scalar(values[6])",
        ("test_additive.py", "test_errors_in_float64"),
    ),
    Mutation(
        "infinite weights go into denominators",
        "cpu/additive.py",
        "allowed = largest_of(tile, place, tile.lanes) <= reach",
        "allowed = largest_of(tile, place, tile.lanes) >= 0.0",
        ("test_additive.py", "test_what_is_not_finite"),
    ),
    Mutation(
        "the gradient of a masked score is not 0",
        "cpu/backward.py",
        "grad = where_greater(lowest(tile), score, 0.0, grad)",
        "grad = where_greater(lowest(tile), score, grad, grad)",
        ("test_backward.py", "test_what_is_masked_leaks_nothing and value"),
    ),
    Mutation(
        "keys behind the last that a query may look at have its weights",
        "cpu/backward.py",
        "clear(tile, weights + count * tile.row_bytes, behind)",
        "clear(tile, weights + count * tile.row_bytes, 0)",
        ("test_backward.py", "test_many_blocks"),
    ),
    Mutation(
        "keys that are not finite are not replaced",
        "cpu/backward.py",
        "if not finite_keys:",
        "if finite_keys and not finite_keys:",
        ("test_backward.py", "test_what_is_masked_leaks_nothing and key"),
    ),
    Mutation(
        "the gradient of the log-sum-exp has the other sign",
        "cpu/backward.py",
        "delta -= load_element(tile, grad_lse + offset)",
        "delta += load_element(tile, grad_lse + offset)",
        ("test_backward.py", "test_finite_differences and cpu"),
    ),
    Mutation(
        "dropout does not scale the gradients of weights",
        "cpu/backward.py",
        "grad = grad * plan.keep_scale - delta",
        "grad = grad - delta",
        ("test_backward.py", "test_dropout"),
    ),
    Mutation(
        "weights exceed 1",
        "cpu/backward.py",
        "minimum(0.0, exponent)",
        "minimum(100.0, exponent)",
        ("test_backward.py", "test_scores_of_any_size"),
    ),
    Mutation(
        "the first rows that a tile width of queries adds to are left out",
        "cpu/backward.py",
        "        done = count\n",
        "        done = count + tile.rows\n",
        ("test_backward.py", "test_many_blocks"),
    ),
    Mutation(
        "the last element of a panel's row is taken twice",
        "cpu/panels.py",
        "return tile_rank1(acc, a + 3 * element, row, b + 3 * row)",
        "return tile_rank1(acc, a + 2 * element, row, b + 3 * row)",
        ("test_backward.py", "test_pytorch_differentiates_the_same or test_many_blocks"),
    ),
    Mutation(
        "the gradient of a mask forgets the heads but one",
        "cpu/mask_gradient.py",
        "range(mask_head * plan.inner, (mask_head + 1) * plan.inner)",
        "range(mask_head * plan.inner, mask_head * plan.inner + 1)",
        ("test_backward.py", "test_the_sums_of_broadcast_arguments"),
    ),
    Mutation(
        "additive: chunks of keys meet those of queries twice, and others never",
        "cpu/additive_backward.py",
        "(given.round + plan.groups - chunk) % plan.groups",
        "(given.round + plan.groups - chunk // 2) % plan.groups",
        ("test_additive_backward.py", "test_many_rounds"),
    ),
    Mutation(
        "additive: what a masked key holds is multiplied by 0",
        "cpu/additive_terms.py",
        "if not all_finite(score):",
        "if all_finite(score) and not all_finite(score):",
        ("test_additive_backward.py", "test_nothing_masked_leaks"),
    ),
    Mutation(
        "additive: a gradient of the result that is not finite reaches keys nobody looked at",
        "cpu/additive_backward.py",
        "0.0 if all_zero(odd) else 1.0",
        "0.0",
        ("test_additive_backward.py", "test_nothing_masked_leaks or test_a_gradient_that_is_not_finite"),
    ),
    Mutation(
        "additive: denominators beyond their reach in the backward pass",
        "cpu/additive_terms.py",
        "reach = REACH_32 if tile.itemsize == 4 else REACH_64",
        "reach = REACH_32 * 3 if tile.itemsize == 4 else REACH_64 * 3",
        ("test_additive_backward.py", "test_sums_at_and_beyond_the_reach_of_denominators"),
    ),
    Mutation(
        "additive: a query that looks at nothing has weights",
        "cpu/additive_backward.py",
        "fill(tile, hidden, filled * tile.itemsize, MINUS_INFINITY)",
        "fill(tile, hidden, filled * tile.itemsize, 0.0)",
        ("test_additive_backward.py", "test_many_rounds or test_nothing_masked_leaks"),
    ),
    Mutation(
        "additive: the first round adds to what was in memory",
        "cpu/additive_backward.py",
        "fresh = first_round and first == query_start",
        "fresh = first_round and first == query_start and plan.causal == 1",
        ("test_additive_backward.py", "test_many_rounds"),
    ),
    Mutation(
        "additive: the gradient of weight forgets that tanh is 1 - 2 r",
        "cpu/additive_backward.py",
        "total - load_element(tile, places.grad_weight + offset) * 2.0",
        "total - load_element(tile, places.grad_weight + offset)",
        ("test_additive_backward.py", "test_gradients_by_hand"),
    ),
)
