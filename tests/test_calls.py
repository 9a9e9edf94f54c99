"""How a call reaches compiled code: where it reads addresses, and what it asks of memory ahead."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastattn
from fastattn.cpu import attention as cpu
from fastattn.cpu import plan


def inputs(*shape: int) -> Any:
    return np.random.default_rng(0).standard_normal((3, *shape), dtype=np.float32)


@pytest.mark.parametrize("shape", [(1, 2, 5, 8), (2, 4, 300, 64)], ids=["one call", "in tasks"])
def test_where_objects_look_different_addresses_are_handed_over(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key, value = inputs(*shape)
    mask = np.random.default_rng(1).random(shape[-2:-1]) < 0.8

    def results() -> list[Any]:
        weighted = fastattn.attention(query, key, value, mask, return_lse=True, return_weights=True)
        return [fastattn.attention(query, key, value), *weighted]

    wanted = results()
    assert cpu._objects_are_as_expected()
    monkeypatch.setattr(cpu, "_objects_are_as_expected", lambda: False)
    for array, other in zip(results(), wanted, strict=True):
        np.testing.assert_array_equal(array, other)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("causal", [False, True])
def test_asking_ahead_changes_nothing(threads: int, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = inputs(3, 5, 70, 40)
    key, value = key[:, ::-1], value[..., ::-1, :]  # the next head is before this one, the next key as well
    with fastattn.num_threads(threads):
        wanted = fastattn.attention(query, key, value, is_causal=causal)
        monkeypatch.setattr(plan, "CACHED_BYTES", 0)  # as for a large call
        monkeypatch.setattr(cpu, "_prepared", {})
        monkeypatch.setattr("fastattn.api._prepared", {})
        np.testing.assert_array_equal(fastattn.attention(query, key, value, is_causal=causal), wanted)
        record = next(iter(cpu._prepared.values())).plan.record
        assert record[: plan.PLAN.itemsize].view(plan.PLAN)["ahead"][0] == threads
