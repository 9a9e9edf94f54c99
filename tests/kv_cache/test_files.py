"""Files of tensors: what others read of them, and read into them, and what is no such file."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from fastattn.kv_cache import files
from fastattn.kv_cache.files import DTYPES, Tensor


def arrays() -> dict[str, Any]:
    """Return an array of each dtype, of several ranks."""
    rng = np.random.default_rng(0)
    numbers = rng.integers(0, 100, (3, 4, 5))
    found = {name: numbers.astype(dtype) for name, dtype in DTYPES.items() if name != "BF16"}
    return found | {"BF16": numbers.astype(ml_dtypes.bfloat16).view(DTYPES["BF16"]), "none": np.zeros((0, 3), np.int8)}


def written(path: Path, metadata: dict[str, str] | None = None) -> Path:
    """Write a file of these."""
    files.write(path, {name: Tensor(each.dtype, each.shape, each) for name, each in arrays().items()}, metadata or {})
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    tensors, metadata = files.read(written(tmp_path / "file", {"a": "b"}))
    assert metadata == {"a": "b"}
    assert list(tensors) == list(arrays())
    for name, array in arrays().items():
        assert tensors[name].dtype == array.dtype
        np.testing.assert_array_equal(tensors[name], array)


def test_safetensors_reads_it(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    path = written(tmp_path / "file")
    found = safetensors.load_file(path)
    for name, array in arrays().items():
        if name == "BF16":
            array = array.view(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(found[name], array)


def test_what_safetensors_writes_is_read(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "file"
    safetensors.save_file({name: each for name, each in arrays().items() if name != "BF16"}, path, {"a": "b"})
    tensors, metadata = files.read(path)
    assert metadata == {"a": "b"}
    for name, array in tensors.items():
        np.testing.assert_array_equal(array, arrays()[name])


def test_a_failure_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    path = written(tmp_path / "file")

    def fails() -> Any:
        yield np.zeros(3, np.int8)
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        files.write(path, {"a": Tensor(np.dtype(np.int8), (2, 3), fails())}, {})
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    assert list(files.read(path)[0]) == list(arrays())


def with_header(header: Any) -> bytes:
    """Return a file with a header and eight bytes of data."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(content).to_bytes(8, "little") + content + bytes(8)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        b"\xff" * 100,
        with_header(b"{"),
        with_header([]),
        with_header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 12]}}),
        with_header({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}),
        with_header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [8, 4]}}),
        with_header({"a": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}),
        with_header({"a": {"dtype": "F32", "shape": [2]}}),
        with_header({"a": 3}),
    ],
    ids=range(11),
)
def test_what_is_no_such_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="path: .*file' .*; expected a file of the format safetensors"):
        files.read(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        files.read(tmp_path / "none")


def test_no_room_is_made_for_a_header_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"\x00\x00T\x05")  # 85 MiB are said
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="has no header"):
            files.read(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
