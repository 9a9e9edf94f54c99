"""Messages between ranks, which go on while their sender and their receiver compute."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from mpi4py import MPI

from fastattn.call.problem import Shape

__all__ = ["Courier", "Parcel", "own_communicator"]

POLL_S = 2e-4  # a large message takes some looks at it, on a machine of one memory as well


class Parcel:
    """Arrays of one dtype that are one message."""

    def __init__(self, shapes: Sequence[Shape], dtype: np.dtype[Any]) -> None:
        ends = np.cumsum([0, *(np.prod(shape, dtype=np.int64) for shape in shapes)])
        self.numbers = np.empty(int(ends[-1]), dtype)
        parts = zip(shapes, ends[:-1], ends[1:], strict=True)
        self.arrays = [self.numbers[begin:end].reshape(shape) for shape, begin, end in parts]

    @property
    def message(self) -> Any:
        """What MPI is given: bytes, of whatever numbers they are."""
        return [self.numbers.view(np.uint8), MPI.BYTE]


class Courier:
    """The messages of a call that are under way on this rank.

    MPI moves large ones only while somebody calls it. Another thread does, while this one computes, where MPI has been
    initialized for threads; else they move while they are waited for.
    """

    def __init__(self, comm: Any) -> None:
        self.comm = comm
        self.under_way: list[Any] = []
        self.sent = self.received = 0  # bytes

    def send(self, parcel: Parcel, to: int, tag: int) -> None:
        """Send a parcel, which must stay as it is."""
        self.under_way.append(self.comm.Isend(parcel.message, dest=to, tag=tag))
        self.sent += parcel.numbers.nbytes

    def receive(self, parcel: Parcel, source: int, tag: int) -> Any:
        """Receive a parcel, which is there when what is returned has been waited for."""
        self.under_way.append(self.comm.Irecv(parcel.message, source=source, tag=tag))
        self.received += parcel.numbers.nbytes
        return self.under_way[-1]

    @contextmanager
    def meanwhile(self) -> Iterator[None]:
        """Keep messages going while something is computed."""
        self.under_way = [request for request in self.under_way if request]  # one that is done is null
        if not self.under_way or MPI.Query_thread() < MPI.THREAD_SERIALIZED:
            yield
            return
        done = threading.Event()
        thread = threading.Thread(target=self._keep_going, args=(done,), name="fastattn-mpi")
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _keep_going(self, done: threading.Event) -> None:
        with suppress(MPI.Exception):  # which whoever waits is told
            while not (MPI.Request.Testall(self.under_way) or done.wait(POLL_S)):
                pass

    def finish(self) -> None:
        """Wait for all that is under way."""
        MPI.Request.Waitall(self.under_way)
        self.under_way = []


def own_communicator(comm: Any) -> Any:
    """Return a communicator of the same ranks whose messages are this package's alone, made once for each."""
    if not isinstance(comm, MPI.Intracomm) or comm == MPI.COMM_NULL:
        raise TypeError(f"comm: {type(comm).__name__}; expected an mpi4py.MPI.Intracomm")
    own = comm.Get_attr(_own_key())
    if own is None:
        own = comm.Dup()
        comm.Set_attr(_own_key(), own)
    return own


_keys: list[int] = []


def _own_key() -> int:
    """The name under which a communicator keeps its own of this package."""
    if not _keys:
        _keys.append(MPI.Comm.Create_keyval(delete_fn=lambda comm, key, own: own.Free()))
    return _keys[0]
