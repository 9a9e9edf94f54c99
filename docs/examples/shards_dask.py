"""Decoding over shards, with Dask: each worker has a part of a cache's keys, and what is merged is one row for a query.

    python docs/examples/shards_dask.py --workers 2 --keys 65536

starts worker processes on this machine, fills a cache that none of them holds alone, and lets tokens look at all of it.
See shards.md.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import Any

import dask
import dask.array as da
import numpy as np

from fastattn.integrations.dask import attention

#: Work goes where its shard is, however busy that worker is: nobody takes it, nor does moving a shard look cheap.
STAY = {"distributed.scheduler.work-stealing": False, "distributed.scheduler.bandwidth": 1000}


@dataclass
class ShardedCache:
    """Keys and values of the tokens so far: shards, which stay where they are, and the latest tokens, on their way.

    Attributes
    ----------
    size : int
        Keys of a shard.
    keep : callable
        Of an array of one chunk and a number of a shard: returns it with the chunk computed, wherever it belongs.
    keys, values : list of dask.array.Array, shape (heads, size, features)
    latest : list of (key, value)
        Of one token each, shape (heads, 1, features), until there are enough for a shard.
    """

    size: int
    keep: Any
    keys: list[Any] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)
    latest: list[tuple[Any, Any]] = field(default_factory=list)

    def __len__(self) -> int:
        return sum(shard.shape[-2] for shard in self.keys) + len(self.latest)

    def add(self, key: Any, value: Any) -> None:
        """Take the key and the value of a token."""
        self.latest.append((key, value))
        if len(self.latest) == self.size:
            self.add_shard(*self._of_latest())
            self.latest = []

    def add_shard(self, key: Any, value: Any) -> None:
        """Take many tokens at once: arrays of one chunk each."""
        number = len(self.keys)
        self.keys.append(self.keep(key, number))
        self.values.append(self.keep(value, number))

    def _of_latest(self) -> list[Any]:
        return [da.from_array(np.concatenate(each, axis=-2), chunks=-1) for each in zip(*self.latest, strict=True)]

    def attend(self, query: Any) -> Any:
        """Return attention of a token's query, shape (heads, 1, features), to all tokens so far, lazily."""
        latest = self._of_latest() if self.latest else []
        key, value = (
            da.concatenate([*shards, *latest[i : i + 1]], axis=-2) for i, shards in enumerate((self.keys, self.values))
        )
        return attention(query, key, value, enable_gqa=True)


def in_processes(client: Any) -> Any:
    """Return what keeps a shard in the memory of one of Dask's workers, which take turns."""
    workers = list(client.scheduler_info()["workers"])
    return lambda array, number: client.persist(array, workers=[workers[number % len(workers)]])


def decode(cache: ShardedCache, tokens: int, heads: int, kv_heads: int, features: int) -> list[Any]:
    """Return what some tokens see, one after the other; their queries, keys and values are made up."""
    rng = np.random.default_rng(0)
    results = []
    for _ in range(tokens):
        query = rng.standard_normal((heads, 1, features), dtype=np.float32)
        cache.add(*rng.standard_normal((2, kv_heads, 1, features), dtype=np.float32))
        results.append(cache.attend(query).compute())
    return results


def sent(client: Any) -> int:
    """How many bytes workers have sent each other so far."""
    return sum(client.run(lambda dask_worker: dask_worker.transfer_outgoing_bytes_total).values())


def main() -> None:
    """Fill a cache in several processes, and decode."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workers", type=int, default=2, help="processes (2)")
    parser.add_argument("--keys", type=int, default=65536, help="tokens in the cache to begin with (65536)")
    parser.add_argument("--tokens", type=int, default=8, help="tokens to decode (8)")
    asked = parser.parse_args()
    from distributed import Client, LocalCluster

    heads, kv_heads, features, size = 32, 8, 128, 8192
    with (
        dask.config.set(STAY),
        LocalCluster(n_workers=asked.workers, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        cache = ShardedCache(size, in_processes(client))
        shapes = [(kv_heads, min(size, asked.keys - first), features) for first in range(0, asked.keys, size)]
        for number, shape in enumerate(shapes):
            random = da.random.default_rng(number)
            cache.add_shard(*(random.standard_normal(shape, chunks=-1, dtype=np.float32) for _ in range(2)))
        client.compute([array.sum() for array in cache.keys + cache.values], sync=True)  # until all is there
        before = sent(client)
        results = decode(cache, asked.tokens, heads, kv_heads, features)
        print(f"{len(cache)} tokens in {len(cache.keys)} shards, {asked.workers} processes")
        print(f"keys and values: {sum(array.nbytes for array in cache.keys + cache.values) / 1e6:.0f} MB")
        print(f"a result: {results[-1].nbytes} bytes")
        print(f"sent between processes for each token: {(sent(client) - before) / asked.tokens / 1e3:.1f} kB")


if __name__ == "__main__":
    main()
