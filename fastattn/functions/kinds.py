"""Blocks of queries and keys, and of which kind they are for a function that says which keys are seen."""

__all__ = ["EMPTY", "FULL", "KIND_KEYS", "KIND_QUERIES", "PARTIAL", "WORTH_LOOKING"]

KIND_QUERIES, KIND_KEYS = 64, 64  # the size of these blocks
EMPTY, PARTIAL, FULL = range(3)  # no query may look at any key, some at some, all at all
WORTH_LOOKING = 2 * KIND_QUERIES  # queries and keys from which on blocks are looked at
