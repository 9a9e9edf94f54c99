"""Dask's schedulers: threads, processes, a worker that dies, and xarray on top."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastattn

dask = pytest.importorskip("dask", reason="Dask is not installed")
da = pytest.importorskip("dask.array", reason="Dask is not installed")

from fastattn.api import pieces  # noqa: E402
from fastattn.integrations import tasks  # noqa: E402
from fastattn.integrations.dask import attention, attention_backward  # noqa: E402

OPTIONS: dict[str, Any] = {"is_causal": True, "dropout_p": 0.2, "rng": 1}


def arrays() -> list[Any]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((2, 60, 8)).astype(np.float32) for _ in range(4)]


def in_chunks() -> list[Any]:
    return [da.from_array(array, chunks=(1, 17, 8)) for array in arrays()]


def everything(query: Any, key: Any, value: Any, grad_out: Any) -> list[Any]:
    """Return the result, the log-sum-exp and the gradients, lazily."""
    out, lse = attention(query, key, value, **OPTIONS, return_lse=True)
    return [out, lse, *attention_backward(grad_out, query, key, value, out, lse, **OPTIONS)]


@pytest.fixture(scope="module")
def wanted() -> list[Any]:
    """The same of a scheduler that runs one task after the other."""
    found = dask.compute(*everything(*in_chunks()), scheduler="synchronous")
    query, key, value, grad_out = arrays()
    out, lse = fastattn.attention(query, key, value, **OPTIONS, return_lse=True)
    whole = [out, lse, *fastattn.attention_backward(grad_out, query, key, value, out, lse, **OPTIONS)]
    for each, want in zip(found, whole, strict=True):
        np.testing.assert_allclose(each, want, atol=1e-5)
    return list(found)


def check(found: Any, wanted: list[Any]) -> None:
    """Assert that results have the same bits: those of a task do not depend on who runs it."""
    for each, want in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(each, want)


def test_threads(wanted: list[Any]) -> None:
    check(dask.compute(*everything(*in_chunks()), scheduler="threads", num_workers=4), wanted)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_task_uses_one_thread_or_as_many_as_it_is_told(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def noted(*arguments: Any, **options: Any) -> Any:
        seen.append(fastattn.get_num_threads())
        return pieces.attend(*arguments, **options)

    monkeypatch.setattr(tasks, "attend", noted)
    told = {} if threads == 1 else {"num_threads": threads}
    with fastattn.num_threads(3):
        attention(*in_chunks()[:3], **told).compute(scheduler="threads")
        assert fastattn.get_num_threads() == 3
    assert seen == [threads] * 32


# -- processes ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    """Two processes of one thread each."""
    distributed = pytest.importorskip("distributed", reason="distributed is not installed")
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


def test_processes(client: Any, wanted: list[Any]) -> None:
    check(client.gather(client.compute(everything(*in_chunks()))), wanted)


def test_functions_go_to_the_processes(client: Any) -> None:
    query, key, value, _ = arrays()
    table = np.linspace(-1, 1, 60)

    def relative(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return score + table[abs(query - key)]

    mask = fastattn.BlockMask.from_function(lambda batch, head, query, key: query // 20 >= key // 20, 60, 60)
    options: dict[str, Any] = {"score_mod": relative, "block_mask": mask}
    found = client.compute(attention(*in_chunks()[:3], **options)).result()
    np.testing.assert_allclose(found, fastattn.attention(query, key, value, **options), atol=1e-6)


def dying(chunk: Any, died: Path) -> Any:
    """Kill the process that comes here first."""
    try:
        died.touch(exist_ok=False)
    except FileExistsError:
        return chunk
    os._exit(1)


def test_a_worker_that_is_killed_changes_nothing(client: Any, wanted: list[Any], tmp_path: Path) -> None:
    query, key, value, grad_out = in_chunks()
    died = tmp_path / "died"
    key = da.concatenate([key[:, :-17], key[:, -17:].map_blocks(dying, died, meta=key._meta)], axis=1)
    processes = set(client.run(os.getpid).values())
    check(client.gather(client.compute(everything(query, key.rechunk((1, 17, 8)), value, grad_out))), wanted)
    assert died.exists()
    client.wait_for_workers(2)
    assert set(client.run(os.getpid).values()) != processes


# -- xarray ------------------------------------------------------------------------------------------------------------


def test_xarray() -> None:
    xarray = pytest.importorskip("xarray", reason="xarray is not installed")
    query, key, value, _ = arrays()
    named = [
        xarray.DataArray(array.T, dims=("feature", axis, "head")).chunk({axis: 17})
        for array, axis in ((query, "query"), (key, "key"), (value, "key"))
    ]
    dims = [["head", axis, "feature"] for axis in ("query", "key", "key")]
    told: dict[str, Any] = {"output_core_dims": [dims[0]], "dask": "allowed", "kwargs": {"is_causal": True}}
    out = xarray.apply_ufunc(attention, *named, input_core_dims=dims, **told)
    assert out.dims == ("head", "query", "feature")
    assert out.chunksizes["query"] == (17, 17, 17, 9)
    np.testing.assert_allclose(out.to_numpy(), fastattn.attention(query, key, value, is_causal=True), atol=1e-6)
