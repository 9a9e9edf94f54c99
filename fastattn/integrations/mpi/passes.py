"""The forward and the backward pass of a call, as one rank computes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fastattn.api.pieces import First, attend, differentiate
from fastattn.call.arrays import as_array
from fastattn.call.packed import BY_ROW, has_rows
from fastattn.call.pieces import Merged
from fastattn.call.positions import Whole
from fastattn.call.problem import Array, Mask
from fastattn.call.shares import Run
from fastattn.call.upstream import arrived, captured_sources, check_grads, own_dtype, seed_of_forward, sources_of
from fastattn.call.widening import narrowed
from fastattn.cpu.host.builtin import in_default_mode
from fastattn.integrations.mpi.agreement import agree
from fastattn.integrations.mpi.call import Call, Share
from fastattn.integrations.mpi.courier import Courier, Parcel

__all__ = ["Backward", "Forward"]

OPERANDS = ("query", "key", "value")


class _Pass:
    """What both passes are: pieces that are computed while messages go around, whatever fails."""

    def __init__(self, call: Call) -> None:
        self.call, self.share, self.problem = call, call.share, call.share.problem
        self.courier = Courier(call.comm)
        self.failure: Exception | None = None

    def attempt(self, function: Callable[..., None], *arguments: Any) -> None:
        """Compute something, unless something has failed: others wait for what this rank sends all the same."""
        if self.failure is None:
            try:
                with self.courier.meanwhile():
                    function(*arguments)
            except Exception as error:
                self.failure = error

    def settle(self) -> None:
        """Wait for all messages; raise on each rank what failed on any."""
        self.courier.finish()
        agree(self.call.comm, self.failure, None, {})

    def nothing(self, queries: Run) -> tuple[Any, Any, Any, dict[str, Any]]:
        """Return a piece without keys, which sinks go with: empty keys and values, and as `piece`."""
        key, value = (array[..., :0, :] for array in (self.share.key, self.share.value))
        mask, told = self.piece(queries, 0, 0)
        told["options"]["sinks"] = self.call.sinks[queries.sequence]
        return key, value, mask, told

    def piece(self, queries: Run, first: int, count: int) -> tuple[Mask, dict[str, Any]]:
        """Return the mask of some queries and keys, and what else `attend` and `differentiate` are told of them."""
        whole: Whole = self.call.sequences[queries.sequence]
        mask, causal, options = whole.piece(first, count)
        if isinstance(mask, tuple):
            rows: Mask = (_rows_of(mask[0], queries.rows), _rows_of(mask[1], queries.rows))
        else:
            rows = _rows_of(mask, queries.rows)
        told: dict[str, Any] = {
            "dropout_p": self.problem.dropout_p,
            "causal": causal,
            "scale": self.share.asked.scale,
            "enable_gqa": self.share.asked.enable_gqa,
            "first": First(queries.sequence, 0, queries.first, first),
            "seed": self.call.seed,
            "options": options,
        }
        return rows, told


class Forward(_Pass):
    """The forward pass."""

    def run(self) -> tuple[Array, Array]:
        """Return the result of this rank, in its dtype, and the log-sum-exp."""
        self.sums = [Merged() for _ in self.call.queries]
        self.attempt(self._begin)
        for owner, arrays in self.call.blocks(self.courier):
            self.attempt(self._add_keys, owner, *arrays)
        results: list[Any] = []
        self.attempt(lambda: results.extend(self._results()))
        self.settle()
        out, lse = results
        return out, lse

    def _begin(self) -> None:
        """Count what there is without keys, which sinks go with."""
        self.call.check()
        for sums, queries in zip(self.sums, self.call.queries, strict=True):
            key, value, mask, told = self.nothing(queries)
            self._add(sums, *attend(self.share.query[..., queries.rows, :], key, value, mask, **told))

    def _add_keys(self, owner: int, key: Array, value: Array) -> None:
        for number, keys in self.call.seen(owner):
            queries = self.call.queries[number]
            mask, told = self.piece(queries, keys.first, keys.length)
            arrays = (self.share.query[..., queries.rows, :], key[..., keys.rows, :], value[..., keys.rows, :])
            self._add(self.sums[number], *attend(*arrays, mask, **told))

    @in_default_mode
    def _add(self, sums: Merged, out: Array, lse: Array) -> None:
        sums.add(out, lse)

    @in_default_mode
    def _results(self) -> tuple[Array, Array]:
        problem = self.problem
        out, sums = np.empty(problem.out_shape, problem.storage), np.empty(problem.lse_shape, problem.real)
        for merged, queries in zip(self.sums, self.call.queries, strict=True):
            own, lse = merged.finish(problem.real)
            out[..., queries.rows, :] = narrowed(own, problem.storage)
            sums[..., queries.rows] = lse
        return out, sums


class Backward(_Pass):
    """The backward pass.

    Gradients of keys and values go the way that these go, a rank behind, and from its end to their owner.
    """

    def __init__(self, call: Call, given: tuple[Any, ...], upstream: dict[str, Array], names: tuple[str, ...]) -> None:
        super().__init__(call)
        self.upstream, self.names = upstream, names
        self.moving = tuple(name for name in ("key", "value") if name in names)
        self.sources = _sources(self.share, given)
        real = self.problem.real
        self.grad_query = np.zeros(self.share.query.shape, real)
        common = [name for name in names if name not in OPERANDS]
        self.common = {name: np.zeros(np.shape(self.sources[name])) for name in common}

    @staticmethod
    def check(share: Share, grad_out: Any, out: Any, lse: Any, grad_lse: Any, grads: Any) -> dict[str, Any]:
        """Return what this rank is given further, checked, by the names that a pass is made with."""
        problem = share.problem
        arrived(problem, grad_out, out, lse, grad_lse)
        seed_of_forward(share.asked.rng, problem)
        names = (
            OPERANDS if grads is None else check_grads(grads, _sources(share, (share.query, share.key, share.value)))
        )
        given = {"grad_out": grad_out, "out": out, "lse": lse, "grad_lse": grad_lse}
        arrays = {name: as_array(name, array) for name, array in given.items() if array is not None}
        return {"upstream": arrays, "names": names}

    def run(self) -> tuple[Array, ...]:
        """Return the gradients of this rank."""
        rank, route = self.call.comm.rank, self.call.route
        self.attempt(self._begin)
        home, from_others = self._parcel(rank), self._parcel(rank)
        last = route.way(rank)[-1]
        if self.moving and last != rank:
            self.courier.receive(from_others, last, 2 * rank + 1)
        for owner, arrays in self.call.blocks(self.courier):
            before, after = route.neighbours(owner)
            gradients = home if owner == rank else self._parcel(owner)
            gradients.numbers[...] = 0
            so_far = None
            if self.moving and before is not None and before != owner:  # the first after the owner begins
                so_far = self._parcel(owner)
                arrival = self.courier.receive(so_far, before, 2 * owner + 1)
            self.attempt(self._add_keys, owner, *arrays, dict(zip(self.moving, gradients.arrays, strict=True)))
            if so_far is not None:
                arrival.Wait()
                self._add(gradients.numbers, so_far.numbers)
            if self.moving and owner != rank:
                self.courier.send(gradients, owner if after is None else after, 2 * owner + 1)
        self.settle()
        if self.moving and last != rank:
            self._add(home.numbers, from_others.numbers)
        return self._results(dict(zip(self.moving, home.arrays, strict=True)))

    def _parcel(self, owner: int) -> Parcel:
        """Room for the gradients of the keys and values of an owner, those that are asked for."""
        shapes = dict(zip(("key", "value"), self.call.key_shapes(owner), strict=True))
        return Parcel([shapes[name] for name in self.moving], self.problem.real)

    def _begin(self) -> None:
        self.call.check()
        for queries in self.call.queries if "sinks" in self.names else ():
            (gradient,) = self._differentiate(queries, *self.nothing(queries), ("sinks",))
            self._add_common("sinks", queries, gradient)

    def _add_keys(self, owner: int, key: Array, value: Array, gradients: dict[str, Array]) -> None:
        names = tuple(name for name in self.names if name != "sinks")
        for number, keys in self.call.seen(owner):
            queries = self.call.queries[number]
            mask, told = self.piece(queries, keys.first, keys.length)
            found = self._differentiate(queries, key[..., keys.rows, :], value[..., keys.rows, :], mask, told, names)
            for name, gradient in zip(names, found, strict=True):
                if name == "query":
                    self._add(self.grad_query[..., queries.rows, :], gradient)
                elif name in gradients:
                    self._add(gradients[name][..., keys.rows, :], gradient)
                else:
                    self._add_common(name, queries, gradient)

    def _differentiate(self, queries: Run, key: Array, value: Array, mask: Mask, told: Any, names: Any) -> Any:
        rows = queries.rows
        own: dict[str, Any] = {"query": self.share.query[..., rows, :], "key": key, "value": value, "attn_mask": mask}
        upstream: dict[str, Any] = {
            name: array[..., rows] if name in ("lse", "grad_lse") else array[..., rows, :]
            for name, array in self.upstream.items()
        }
        return differentiate(**own, **upstream, **told, grads=names)

    @in_default_mode
    def _add(self, total: Array, part: Array) -> None:
        with np.errstate(all="ignore"):
            total += part

    def _add_common(self, name: str, queries: Run, gradient: Array) -> None:
        total = self.common[name]
        if self.share.asked.cu_seqlens is not None and name in BY_ROW and has_rows(name, self.sources[name]):
            total = total[min(queries.sequence, len(total) - 1)]  # one for all, or one for each
        self._add(total, gradient)

    @in_default_mode
    def _results(self, gradients: dict[str, Array]) -> tuple[Array, ...]:
        """All gradients in their dtypes; what ranks have in common summed over these, in their order."""
        found = {"query": self.grad_query, **gradients}
        for name, total in zip(
            self.common, zip(*self.call.comm.allgather([*self.common.values()]), strict=True), strict=True
        ):
            with np.errstate(all="ignore"):
                found[name] = np.add.reduce(total)
        return tuple(own_dtype(found[name], self.sources[name], self.problem.real) for name in self.names)


def _sources(share: Share, given: tuple[Any, ...]) -> dict[str, Any]:
    """What gradients may be of, as it was given, by name."""
    query, key, value = given
    sources = sources_of(query, key, value, None, share.asked.options)  # type: ignore[arg-type]
    del sources["attn_mask"]  # each rank has rows of its own
    return sources | captured_sources(share.problem, share.captured)


def _rows_of(mask: Array | None, rows: slice) -> Any:
    """What a mask says of some queries."""
    return mask if mask is None or mask.ndim < 2 or mask.shape[-2] == 1 else mask[..., rows, :]
