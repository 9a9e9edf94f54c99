"""Decode over shards of a cache: each rank has a part of the keys, and one merge makes one result of theirs.

mpiexec -n 4 python docs/examples/decoding_mpi.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

import fastattn
from fastattn.integrations.mpi import shard

Floats: TypeAlias = NDArray[np.float32]

HEADS, KEY_HEADS, FEATURES = 32, 8, 64


class Shard:
    """A part of a cache: keys and values of the tokens that this rank keeps.

    Whatever tells positions, such as rotary embeddings, is in the keys when they come here: attention of one query to
    all keys does not depend on their order, so new ones may go to any rank, and go to each in turn.
    """

    def __init__(self, comm: Any, key: Floats, value: Floats, room: int) -> None:
        self.comm = comm
        self.length = key.shape[-2]
        shape = (key.shape[0], key.shape[1], self.length + room, FEATURES)
        self.key, self.value = np.empty(shape, np.float32), np.empty(shape, np.float32)
        self.key[:, :, : self.length], self.value[:, :, : self.length] = key, value

    def append(self, key: Floats, value: Floats) -> None:
        """Keep one token more."""
        self.key[:, :, self.length], self.value[:, :, self.length] = key, value
        self.length += 1

    def attend(self, query: Floats) -> Floats:
        """Return attention of a query, the same on all ranks, to all keys of all ranks."""
        key, value = (array[:, :, : self.length] for array in (self.key, self.value))
        out, lse = fastattn.attention(query, key, value, enable_gqa=True, return_lse=True)
        mine = np.concatenate([out, lse[..., None]], axis=-1)  # one message of each rank
        parts = np.empty((self.comm.size, *mine.shape), np.float32)
        self.comm.Allgather(mine, parts)
        return np.asarray(fastattn.merge(parts[..., :-1], parts[..., -1])[0])


def numbers(seed: int, *shape: int) -> Floats:
    """Stand for what a model computes: the same on all ranks."""
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def main(arguments: Sequence[str] | None = None) -> None:
    """Decode some tokens, and compare with attention to a cache that lies in one place."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--keys", type=int, default=20_000, help="tokens that the cache begins with")
    parser.add_argument("--tokens", type=int, default=8, help="tokens that are decoded")
    given = parser.parse_args(arguments)
    comm = MPI.COMM_WORLD
    whole = [numbers(seed, 1, KEY_HEADS, given.keys, FEATURES) for seed in (0, 1)]
    cache = Shard(comm, *(shard(comm, array, layout="contiguous") for array in whole), room=given.tokens)
    worst = 0.0
    for token in range(given.tokens):
        query = numbers(2 + token, 1, HEADS, 1, FEATURES)
        key, value = numbers(1000 + token, 2, 1, KEY_HEADS, FEATURES)
        if token % comm.size == comm.rank:
            cache.append(key, value)
        out = cache.attend(query)
        whole = [np.concatenate([old, new[:, :, None]], axis=2) for old, new in zip(whole, (key, value), strict=True)]
        worst = max(worst, float(np.abs(out - fastattn.attention(query, *whole, enable_gqa=True)).max()))
    if comm.rank == 0:
        sent, keys = HEADS * (FEATURES + 1) * 4, 2 * KEY_HEADS * FEATURES * 4 * cache.length
        print(f"{comm.size} ranks, {given.keys + given.tokens} keys, {cache.length} of them on the first")
        print(f"each sends {sent} bytes for a token; its keys and values are {keys}")
        print(f"farthest from attention to a cache in one place: {worst:.1e}")


if __name__ == "__main__":
    main()
