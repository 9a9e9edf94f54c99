"""Attention by many processes that talk by MPI, each with a share of the queries and of the keys."""

from __future__ import annotations

from fastattn.call.advice import to_install

try:
    import mpi4py  # noqa: F401
except ImportError as error:
    raise ImportError(f"fastattn.integrations.mpi needs mpi4py, and MPI: {to_install('mpi')} mpich") from error

from fastattn.integrations.mpi.ring import ring_attention, ring_attention_backward
from fastattn.integrations.mpi.sharding import shard, unshard

__all__ = ["ring_attention", "ring_attention_backward", "shard", "unshard"]
