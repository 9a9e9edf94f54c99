"""Keys and values in pages: where the rows of some keys are, of a sequence whose pages lie anywhere.

A table has the number of each page of each row of the batch, in the order of the keys:

    key j of head h of row b:  pages[table[b][j // page]][j % page][h]

Kernels take keys a block at a time, and find its rows at equal distances. Where pages are made of whole blocks, a block
lies in one page, and is read there. Otherwise its rows are gathered, page by page, into working memory: a copy of as
many rows as a block has. What is computed of them is the same either way, and whatever pages they are in.
"""

from fastattn.cpu.kernels.pack import copy_as_they_lie
from fastattn.cpu.kernels.prefetch import prefetch_rows
from fastattn.cpu.kernels.tasks import Head
from fastattn.simd import jit, load_i32, load_i64

LONG = 8  # bytes of a number of a page, which otherwise has half as many
AHEAD = 16  # rows that are asked for before they are gathered


@jit
def page_of(call, plan, number, key):
    """The page that a key of the head of a number is in."""
    at = call.pages + number // plan.heads * plan.table_row + key // plan.page * plan.table_column
    return load_i64(at) if plan.table_itemsize == LONG else load_i32(at)


@jit
def behind_gathered(kernel, plan, scratch):
    """Where a task's other working memory begins."""
    return scratch if kernel.pages == "" else scratch + plan.gathered_keys + plan.gathered_values


@jit
def bring(kernel, target, target_row, source, row, column, count, features, ahead):
    """target[j][p] = source[j][p] for some rows of one page; meanwhile rows from `ahead` on are asked for."""
    for _ in range(count):
        copy_as_they_lie(kernel, target, target_row, source, row, column, 1, features)
        if ahead != 0:
            prefetch_rows(ahead, row, 1, features * kernel.itemsize)
            ahead += row
        source += row
        target += target_row


@jit
def run_of(plan, key, end):
    """How many keys from one on are in one page, and so are the keys that stand `AHEAD` of them; up to an end."""
    return min(end - key, plan.page - key % plan.page, plan.page - (key + AHEAD) % plan.page)


@jit
def gather(kernel, call, plan, head, first, count, keys, values):
    """Bring the rows of `count` keys from `first` on, and of their values, one behind the other."""
    key, end = first, first + count
    while key < end:
        rows, goes_on = run_of(plan, key, end), key + AHEAD < head.keys
        here = beside(call, plan, head, key)
        then = beside(call, plan, head, key + AHEAD) if goes_on else here
        source, row = here.key + key * plan.key_page_row, plan.key_page_row
        ahead = then.key + (key + AHEAD) * row if goes_on else 0
        bring(kernel, keys, plan.key_row, source, row, plan.key_page_column, rows, plan.head_dim, ahead)
        source, row = here.value + key * plan.value_page_row, plan.value_page_row
        ahead = then.value + (key + AHEAD) * row if goes_on else 0
        bring(kernel, values, plan.value_row, source, row, plan.value_page_column, rows, plan.value_dim, ahead)
        keys += rows * plan.key_row
        values += rows * plan.value_row
        key += rows


@jit
def beside(call, plan, head, key):
    """A head whose keys lie as those do that are in one page with this one: as if there were no other pages."""
    page, first = page_of(call, plan, head.number, key), key - key % plan.page
    key, value = first * plan.key_page_row, first * plan.value_page_row
    return moved(head, page * plan.key_page - key, page * plan.value_page - value)


@jit
def moved(head, by, values_by):
    """A head whose keys and values begin elsewhere, so many bytes on."""
    own, number, functions = head.own, head.number, head.functions
    key, value = head.key + by, head.value + values_by
    return Head(head.query, key, value, head.bias, head.keep, head.out, head.offset, head.keys, own, number, functions)


@jit
def with_rows(kernel, call, plan, head, first, count, scratch):
    """A head whose keys, and values, from `first` on, `count` of one block, lie at equal distances.

    `scratch`: the beginning of the task's working memory, where they are gathered if they have to be.
    """
    if kernel.pages == "":
        return head
    if count <= 0:
        return head
    if plan.gathered_keys == 0:
        return beside(call, plan, head, first)
    keys, values = scratch, scratch + plan.gathered_keys
    gather(kernel, call, plan, head, first, count, keys, values)
    return moved(head, keys - first * plan.key_row - head.key, values - first * plan.value_row - head.value)


@jit
def foreseen(kernel, call, plan, head, first, count):
    """A head whose rows from `first` on can be asked for ahead, and how many of them: none that are gathered later."""
    if kernel.pages == "":
        return head, count
    if plan.gathered_keys != 0 or count <= 0 or first >= head.keys:
        return head, 0
    return beside(call, plan, head, first), count
