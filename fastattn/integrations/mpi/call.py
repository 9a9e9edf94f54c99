"""A call that ranks compute together: what each says of its share, and what they agree on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from fastattn.call.arrays import as_operands
from fastattn.call.blocks import check_blocks
from fastattn.call.options import check_causal, check_dropout
from fastattn.call.packed import BY_ROW, as_starts, by_row, has_rows
from fastattn.call.positions import Whole
from fastattn.call.problem import Array, Captures, Problem, Shape
from fastattn.call.score_options import FurtherOptions, check_names
from fastattn.call.seeds import seed_from
from fastattn.call.shapes import describe
from fastattn.call.shares import Route, Run, check_layout, needs, runs_of, shares
from fastattn.integrations.mpi.agreement import agree, in_words
from fastattn.integrations.mpi.courier import Courier, Parcel, own_communicator
from fastattn.integrations.mpi.sharding import check_lengths

__all__ = ["Asked", "Call", "Share"]

OPTIONS = tuple(FurtherOptions.__annotations__)


class Asked(NamedTuple):
    """What one rank is given, besides its arrays."""

    attn_mask: Any
    dropout_p: Any
    is_causal: Any
    scale: Any
    enable_gqa: Any
    layout: Any
    cu_seqlens: Any
    rng: Any
    options: Mapping[str, Any]

    @property
    def alike(self) -> dict[str, Any]:
        """What must be the same on all ranks, but for the seed."""
        others = ("dropout_p", "is_causal", "scale", "enable_gqa", "layout", "cu_seqlens")
        named = self._asdict()
        return {name: named[name] for name in others} | {name: self.options.get(name) for name in OPTIONS}


class Share:
    """What one rank has of a call, checked as far as it can tell alone."""

    def __init__(self, query: Any, key: Any, value: Any, asked: Asked) -> None:
        self.query, self.key, self.value, self.mask = as_operands(query, key, value, asked.attn_mask)
        self.asked, self.layout = asked, check_layout(asked.layout)
        check_names(asked.options)
        check_causal(asked.is_causal)
        self.problem, self.captured = self._described()
        self.seed = self._seed()
        self.words = self._in_words()

    def _described(self) -> tuple[Problem, Captures | None]:
        """What this rank computes, as it is without keys: their number, and what goes by it, is for all to say."""
        asked = self.asked
        own: Any = dict.fromkeys(OPTIONS) | dict(asked.options)
        Whole(self.query, None, None, False, own)  # are these positions and lengths?
        own |= {"query_offset": None, "key_lengths": None, "block_mask": None}
        if asked.cu_seqlens is not None:
            self._check_packed()
            own |= {name: own[name][0] for name in BY_ROW if has_rows(name, own[name]) and len(own[name])}
        plain: Any = (asked.dropout_p, False, asked.scale, asked.enable_gqa)
        describe(self.query, self.key, self.value, None, *plain)  # do they go together?
        key, value = (array[..., :0, :] for array in (self.key, self.value))
        problem, operands = describe(self.query, key, value, None, *plain, **own)
        blocks = asked.options.get("block_mask")
        if blocks is not None:
            check_blocks(blocks, problem.batch, problem.heads, *getattr(blocks, "shape", (0, 0, 0, 0))[2:])
        self._check_mask()
        return problem, operands.captured

    def _check_packed(self) -> None:
        for name, array in (("query", self.query), ("key", self.key), ("value", self.value)):
            if array.ndim != 3:
                raise ValueError(f"{name}: shape {array.shape} with cu_seqlens; expected (heads, length, features)")
        given = {"attn_mask": self.mask, **self.asked.options}
        for name in ("attn_mask", "key_lengths", "block_mask"):
            if given.get(name) is not None:
                raise ValueError(
                    f"{name}: given together with cu_seqlens; expected None: each sequence has all its keys"
                )

    def _check_mask(self) -> None:
        """Refuse masks that do not speak of the queries of this rank."""
        queries = self.query.shape[-2]
        for mask in self.mask if isinstance(self.mask, tuple) else (self.mask,):
            if mask is not None and mask.ndim > 1 and mask.shape[-2] not in (1, queries):
                raise ValueError(
                    f"attn_mask: shape {mask.shape}; expected {queries} or 1 on axis -2, for the queries of this rank, "
                    "and all keys of the whole on the last"
                )

    def _seed(self) -> int | None:
        """The seed of dropout; None where the first rank is to draw one for all."""
        drops = check_dropout(self.asked.dropout_p) > 0
        return None if drops and self.asked.rng is None else seed_from(self.asked.rng, drops)

    def _in_words(self) -> dict[str, str]:
        """What must be the same on all ranks, in words."""
        named = {"query": self.query, "key": self.key, "value": self.value}
        shapes = {name: f"shape {_without_length(array.shape)}, {array.dtype}" for name, array in named.items()}
        alike = {name: in_words(name, option) for name, option in self.asked.alike.items()}
        return shapes | alike | {"rng": "None" if self.seed is None else f"seed {self.seed}"}


class Call:
    """A call that all ranks have agreed on, as one of them has it.

    Attributes
    ----------
    share : Share
    comm : mpi4py.MPI.Intracomm
        That of this package.
    seed : int
    sequences : list of Whole
        What is said of each, but for its sinks; it is one where none are packed.
    sinks : list
        Those of each sequence.
    queries : list of Run
        This rank's.
    keys : list of lists of Run
        Each rank's.
    route : Route
    """

    def __init__(self, comm: Any, share: Share | None, failure: Exception | None) -> None:
        """Agree with all other ranks, which call this, too.

        Raises
        ------
        TypeError, ValueError
            On each rank the same, where one of them has failed, or they have been given what does not go together.
        """
        self.comm = comm
        told: Any = None if share is None else (share.query.shape[-2], share.key.shape[-2])
        reports = agree(comm, failure, told, {} if share is None else share.words)
        assert share is not None
        self.share, self.layout = share, share.layout
        lengths = [[report[axis] for report in reports] for axis in (0, 1)]
        cut = [shares(sum(each), comm.size, self.layout) for each in lengths]
        for name, each, spans in zip(("query", "key"), lengths, cut, strict=True):
            check_lengths(name, each, spans, self.layout)
        starts = self._starts(*map(sum, lengths))
        self.sequences = self._sequences(*starts)
        queries, keys = ([runs_of(own, edges) for own in spans] for spans, edges in zip(cut, starts, strict=True))
        self.queries, self.keys, self.key_counts = queries[comm.rank], keys, lengths[1]
        self.route = Route(needs(queries, cut[1], starts[1], self.reach_of), comm.rank)
        self.seed: int = comm.bcast(seed_from(None)) if share.seed is None else share.seed

    def _starts(self, queries: int, keys: int) -> list[Array]:
        """Where sequences begin, of queries and of keys, and the end of the last."""
        given = self.share.asked.cu_seqlens
        if given is None:
            return [np.array([0, length], np.int64) for length in (queries, keys)]
        if queries != keys:
            raise ValueError(f"key: {keys} in all and {queries} of query; expected as many, as cu_seqlens is for both")
        return [as_starts("cu_seqlens", given, "query on all ranks together", queries)] * 2

    def _sequences(self, starts: Array, key_starts: Array) -> list[Whole]:
        """What is said of each sequence: options that have something for each of them give it its own."""
        asked = self.share.asked
        options: Any = dict.fromkeys(OPTIONS) | dict(asked.options)
        count = len(starts) - 1
        own = {}
        if asked.cu_seqlens is not None:
            own = {name: by_row(name, options[name], count) for name in BY_ROW if has_rows(name, options[name])}
        self.sinks: list[Any] = []
        found = []
        for number, (queries, keys) in enumerate(zip(np.diff(starts), np.diff(key_starts), strict=True)):
            those = options | {name: rows[number] for name, rows in own.items()}
            self.sinks.append(those["sinks"])
            those["sinks"] = None  # one score of all pieces with the same queries
            of_length = np.broadcast_to(np.float32(0), (int(queries), 1))
            found.append(Whole(of_length, int(keys), self.share.mask, asked.is_causal, those))
        return found

    def check(self) -> None:
        """Check what may be wrong on one rank alone: the columns of its mask; and block masks, which go by numbers."""
        if self.share.asked.cu_seqlens is None:
            self.sequences[0].check(replace(self.share.problem, queries=self.sequences[0].query.shape[-2]))

    def reach_of(self, run: Run) -> tuple[int, float]:
        """The first key of its sequence that queries of a run may look at, and an end of those."""
        return self.sequences[run.sequence].reach_of(run.first, run.length)

    def seen(self, owner: int) -> Iterator[tuple[int, Run]]:
        """Which of this rank's runs of queries look at which runs of an owner's keys, by the number of the first."""
        for number, queries in enumerate(self.queries):
            begin, end = self.reach_of(queries)
            for keys in self.keys[owner]:
                if keys.sequence == queries.sequence and max(begin, keys.first) < min(end, keys.first + keys.length):
                    yield number, keys

    def key_shapes(self, owner: int) -> list[Shape]:
        """Shapes of the keys and values of an owner."""
        count = self.key_counts[owner]
        return [(*each.shape[:-2], count, each.shape[-1]) for each in (self.share.key, self.share.value)]

    def blocks(self, courier: Courier) -> Iterator[tuple[int, Any]]:
        """Each owner whose keys come to this rank, and its keys and values; the next come meanwhile."""
        dtype = self.share.key.dtype
        parcel = Parcel(self.key_shapes(self.comm.rank), dtype)
        for own, array in zip(parcel.arrays, (self.share.key, self.share.value), strict=True):
            own[...] = array
        for owner, following in zip(self.route.owners, [*self.route.owners[1:], None], strict=True):
            after = self.route.neighbours(owner)[1]
            if after is not None:
                courier.send(parcel, after, 2 * owner)
            if following is not None:
                coming = Parcel(self.key_shapes(following), dtype)
                before: Any = self.route.neighbours(following)[0]  # its own do not follow
                arrival = courier.receive(coming, before, 2 * following)
            yield owner, parcel.arrays
            if following is not None:
                arrival.Wait()
                parcel = coming


def call_of(
    comm: Any, query: Any, key: Any, value: Any, asked: Asked, check: Callable[[Share], dict[str, str]]
) -> Call:
    """Have all ranks agree on a call; `check` checks what else there is, and says what more must be alike, in words.

    Raises
    ------
    TypeError, ValueError
        On each rank the same.
    """
    own = own_communicator(comm)
    share, failure = None, None
    try:
        share = Share(query, key, value, asked)
        share.words = check(share) | share.words
    except Exception as error:
        failure = error
    return Call(own, None if failure else share, failure)


def _without_length(shape: Shape) -> Shape:
    return shape[:-2] + shape[-1:]
