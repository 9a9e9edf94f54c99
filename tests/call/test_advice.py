"""What most users get wrong first: masks of keys, half precision, None, masked arrays. The message says what to do.

Every function that takes such an argument says the same, on every backend.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import fastattn
from fastattn import plot, reference
from fastattn.call import advice
from fastattn.call.broadcasting import broadcasts, reshaped

ROOT = Path(__file__).parents[2]
Array = NDArray[Any]
Call = Callable[..., Any]

BATCH, HEADS, QUERIES, KEYS, FEATURES = 2, 4, 5, 7, 8
RNG = np.random.default_rng(0)
QUERY = RNG.standard_normal((BATCH, HEADS, QUERIES, FEATURES), dtype=np.float32)
KEY = RNG.standard_normal((BATCH, HEADS, KEYS, FEATURES), dtype=np.float32)
PADDING = np.arange(KEYS) < [[7], [4]]  # (B, Lk), the mask of a tokenizer
WEIGHT = np.ones(FEATURES, np.float32)
OUT, LSE = reference.attention(QUERY, KEY, KEY, return_lse=True)


def raised(call: Call, kind: type[Exception]) -> str:
    """Return the message of the exception that a call raises."""
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


# -- masks -------------------------------------------------------------------------------------------------------------

MASKED: dict[str, Call] = {
    "attention": lambda mask, backend: fastattn.attention(QUERY, KEY, KEY, mask, backend=backend),
    "attention_backward": lambda mask, backend: fastattn.attention_backward(
        OUT, QUERY, KEY, KEY, OUT, LSE, mask, backend=backend
    ),
    "attention_weights": lambda mask, backend: fastattn.attention_weights(QUERY, KEY, mask, backend=backend),
    "attention_summary": lambda mask, backend: fastattn.attention_summary(QUERY, KEY, mask, backend=backend),
    "additive_attention": lambda mask, backend: fastattn.additive_attention(
        QUERY, KEY, KEY, WEIGHT, mask, backend=backend
    ),
    "additive_attention_backward": lambda mask, backend: fastattn.additive_attention_backward(
        OUT, QUERY, KEY, KEY, WEIGHT, OUT, LSE, mask, backend=backend
    ),
}


@pytest.mark.parametrize("function", MASKED)
def test_a_mask_of_keys_for_each_element_of_a_batch(function: str, backend: str) -> None:
    if backend == "cuda" and function not in ("attention", "attention_backward"):
        pytest.skip("CUDA has no kernels for it")
    call = partial(MASKED[function], backend=backend)
    message = raised(lambda: call(PADDING), ValueError)
    assert message == (
        "attn_mask: shape (2, 7); expected one that broadcasts to (2, 4, 5, 7), the shape of the scores, as does "
        "attn_mask.reshape(2, 1, 1, 7)"
    )
    call(eval(message.rpartition("as does ")[2], {"attn_mask": PADDING}))  # and so it does


@pytest.mark.parametrize(
    ("mask", "scores", "meant"),
    [
        ((2, 7), (2, 4, 5, 7), [(2, 1, 1, 7)]),
        ((2, 7), (2, 5, 7), [(2, 1, 7)]),
        ((2, 5, 7), (2, 4, 5, 7), [(2, 1, 5, 7)]),
        ((2, 1, 7), (2, 4, 5, 7), [(2, 1, 1, 7)]),
        ((8, 5, 7), (2, 4, 5, 7), [(2, 4, 5, 7)]),  # torch.nn.MultiheadAttention's
        ((8, 1, 7), (2, 4, 5, 7), [(2, 4, 1, 7)]),
        ((2, 1, 1, 7), (2, 5, 7), [(2, 1, 7)]),
        ((1, 1, 5, 7), (5, 7), [(5, 7)]),
        ((3, 7), (2, 3, 4, 5, 7), [(1, 3, 1, 1, 7)]),
        ((2, 5), (2, 4, 5, 5), [(2, 1, 1, 5)]),  # keys, not queries: the last axis stays the last
        ((4, 7), (4, 4, 5, 7), [(4, 1, 1, 7), (1, 4, 1, 7)]),  # of elements or of heads
        ((2, 5), (2, 4, 5, 7), []),  # it is as long as the queries
        ((7, 2), (2, 4, 5, 7), []),
        ((3, 7), (2, 4, 5, 7), []),
        ((2, 1, 5, 7), (1, 4, 5, 7), []),
        ((2, 7), (1,) * 29 + (2, 5, 7), []),  # the ways to place it are not all tried
    ],
)
def test_which_masks_are_meant(mask: tuple[int, ...], scores: tuple[int, ...], meant: list[tuple[int, ...]]) -> None:
    assert not broadcasts(mask, scores)
    assert reshaped(mask, scores) == meant
    for shape in meant:
        assert broadcasts(np.zeros(mask).reshape(shape).shape, scores)


def test_where_two_masks_can_be_meant_both_are_named() -> None:
    x = np.zeros((4, 4, 5, 8), np.float32)
    message = raised(lambda: fastattn.attention(x, x, x, np.ones((4, 5), bool)), ValueError)
    assert message.endswith("as does attn_mask.reshape(4, 1, 1, 5) or attn_mask.reshape(1, 4, 1, 5)")


def test_masks_of_layers() -> None:
    layer = fastattn.MultiHeadAttention(FEATURES, HEADS, rng=0)
    x, source = QUERY[:, 0], KEY[:, 0]
    assert "as does attn_mask.reshape(2, 1, 1, 7)" in raised(lambda: layer(x, source, attn_mask=PADDING), ValueError)
    message = raised(lambda: layer(x, source, key_mask=PADDING[:, None, None]), ValueError)
    assert message.endswith("; expected one that broadcasts to (2, 7), as does key_mask.reshape(2, 7)")
    for one in (
        fastattn.LuongAttention(FEATURES, FEATURES, rng=0),
        fastattn.BahdanauAttention(FEATURES, FEATURES, 8, rng=0),
    ):
        assert "as does attn_mask.reshape(2, 1, 7)" in raised(lambda one=one: one(x, source, None, PADDING), ValueError)


def test_masks_of_tensors() -> None:
    torch = pytest.importorskip("torch")
    from fastattn.integrations.torch import scaled_dot_product_attention as attend

    query, key, padding = map(torch.from_numpy, (QUERY, KEY, PADDING))
    message = raised(lambda: attend(query, key, key, padding), ValueError)
    assert message.endswith("as does attn_mask.reshape(2, 1, 1, 7)")


def test_arrays_with_heads_behind_lengths() -> None:
    """A hint only where heads and lengths do not go together as they are, and would the other way round."""
    query, key = QUERY.swapaxes(1, 2), KEY.swapaxes(1, 2)
    message = raised(lambda: fastattn.attention(query, key, key), ValueError)
    assert message.startswith("key: shape (2, 7, 4, 8) has 7 heads, and query of shape (2, 5, 4, 8) has 5; expected 5")
    assert message.endswith("or .swapaxes(-3, -2) of all three if their axes are (..., length, heads, features)")
    assert "swapaxes" not in raised(lambda: fastattn.attention(QUERY, KEY[:, :3], KEY[:, :3]), ValueError)


# -- dtypes ------------------------------------------------------------------------------------------------------------

OPERANDS: dict[str, Call] = {
    "query": lambda array: fastattn.attention(array, KEY, KEY),
    "key": lambda array: fastattn.attention_weights(QUERY, array),
    "value": lambda array: reference.attention(QUERY, KEY, array),
    "grad_out": lambda array: fastattn.attention_backward(array, QUERY, KEY, KEY, OUT, LSE),
    "weight": lambda array: fastattn.additive_attention(QUERY, KEY, KEY, array),
    "x": lambda array: fastattn.rotary(array, np.arange(KEYS)),
    "context": lambda array: fastattn.LuongAttention(8, 8, hidden_dim=8, rng=0).attentional(array, KEY),
}


@pytest.mark.parametrize("name", OPERANDS)
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float4_e2m1fn"])
def test_what_is_narrow_says_how_to_get_float32(name: str, dtype: str) -> None:
    kind = getattr(pytest.importorskip("ml_dtypes"), dtype)
    message = raised(lambda: OPERANDS[name](KEY.astype(kind)), TypeError)
    assert message.startswith(f"{name}: dtype ")
    assert message.endswith(f"; expected float16, bfloat16, float32, float64 or integers: {name}.astype(np.float32)")


@pytest.mark.parametrize("dtype", ["float8_e5m2", "float8_e4m3fn"])
def test_narrow_masks_say_how_to_get_float32(dtype: str) -> None:
    mask = np.ones((QUERIES, KEYS), getattr(pytest.importorskip("ml_dtypes"), dtype))
    message = raised(lambda: fastattn.attention(QUERY, KEY, KEY, mask), TypeError)
    assert message.startswith(f"attn_mask: dtype {dtype} is not supported")
    assert message.endswith("; expected one of bool, float16, bfloat16, float32, float64: attn_mask.astype(np.float32)")
    lse = LSE.astype(pytest.importorskip("ml_dtypes").float8_e5m2)
    message = raised(lambda: fastattn.attention_weights(QUERY, KEY, lse=lse), TypeError)
    assert message.endswith("expected an array of floating dtype: lse.astype(np.float32)")


def test_narrow_integer_masks_are_integers() -> None:
    mask = np.ones((QUERIES, KEYS), pytest.importorskip("ml_dtypes").int4)
    message = raised(lambda: fastattn.attention(QUERY, KEY, KEY, mask), TypeError)
    assert message.startswith("attn_mask: dtype int4 could mean two things")


def test_other_dtypes_get_the_advice_that_is_certain() -> None:
    attend = partial(fastattn.attention, key=KEY, value=KEY)
    narrow = pytest.importorskip("ml_dtypes").float8_e5m2(1)
    assert raised(lambda: attend([[narrow] * 8]), TypeError).endswith(": np.asarray(query, np.float32)")
    if np.dtype(np.longdouble) != np.dtype(np.float64):
        message = raised(lambda: attend(QUERY.astype(np.longdouble)), TypeError)
        assert message.endswith(": query.astype(np.float64)")
    for other in (QUERY.astype(complex), QUERY.astype(str), QUERY.astype("m8[s]"), QUERY.astype(object)):
        message = raised(lambda other=other: attend(other), TypeError)
        assert message.endswith("; expected float16, bfloat16, float32, float64 or integers")


def test_narrow_tensors_say_how_to_get_float32() -> None:
    torch = pytest.importorskip("torch")
    from fastattn.integrations.torch import scaled_dot_product_attention as attend

    tensors = [torch.from_numpy(array) for array in (QUERY, KEY, KEY)]
    narrow = [tensor.to(torch.float8_e4m3fn) for tensor in tensors]
    assert raised(lambda: attend(*narrow), TypeError).endswith("torch.float64: query.float()")
    mask = torch.zeros(QUERIES, KEYS).to(torch.float8_e4m3fn)
    assert raised(lambda: attend(*tensors, mask), TypeError).endswith(": attn_mask.float()")
    # given to what takes arrays, a tensor has no astype, and NumPy makes no array of all of them
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        narrow = [tensor.to(dtype) for tensor in tensors]
        assert raised(lambda narrow=narrow: fastattn.attention(*narrow), TypeError).endswith(": query.float()")
    assert "float()" not in raised(lambda: attend(*(tensor.to(torch.complex64) for tensor in tensors)), TypeError)
    assert "float()" not in raised(lambda: attend(*tensors, torch.ones(QUERIES, KEYS).int()), TypeError)


def test_tensors_with_gradients_are_told_where_to_go() -> None:
    torch = pytest.importorskip("torch")
    query = torch.from_numpy(QUERY.copy()).requires_grad_()
    message = raised(lambda: fastattn.attention(query, KEY, KEY), TypeError)
    assert message.endswith("(fastattn.integrations.torch differentiates attention of tensors)")


# -- what is no array --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERANDS)
def test_none_is_no_array(name: str) -> None:
    assert raised(lambda: OPERANDS[name](None), TypeError) == f"{name}: None; expected an array_like"


def test_what_an_array_of_objects_holds_is_named() -> None:
    attend = partial(fastattn.attention, key=KEY, value=KEY)
    assert raised(lambda: attend([[1.0, None]]), TypeError) == (
        "query: holds None of type NoneType; expected an array_like of numbers"
    )
    for odd in ({"a": 1}, {1, 2}, (number for number in (1, 2)), object()):
        message = raised(lambda odd=odd: attend(odd), TypeError)
        assert message.startswith("query: ")
        assert message.endswith(f" of type {type(odd).__name__}; expected an array_like of numbers")
    ragged = np.array([np.ones(3), np.ones(2)], dtype=object)
    assert "holds an array of shape (3,)" in raised(lambda: attend(ragged), TypeError)
    assert "dtype object is not supported" in raised(lambda: attend([[Decimal(1), Decimal(2)]]), TypeError)
    message = raised(lambda: fastattn.attention(QUERY, KEY, KEY, [[True, None] * 3 + [True]]), TypeError)
    assert message == "attn_mask: holds None of type NoneType; expected an array_like of numbers"


class Frame:
    """A table of pandas: an array of objects, where values may be missing."""

    def __init__(self, array: Array) -> None:
        self.array = array

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return np.asarray(self.array, dtype)


def test_tables_are_arrays() -> None:
    out = fastattn.attention(Frame(QUERY[0, 0]), Frame(KEY[0, 0]), KEY[0, 0], Frame(PADDING[0]))
    assert (out == fastattn.attention(QUERY[0, 0], KEY[0, 0], KEY[0, 0], PADDING[0])).all()
    missing = Frame(np.array([[1.0, NotImplemented]], dtype=object))
    assert "query: holds NotImplemented" in raised(lambda: fastattn.attention(missing, KEY, KEY), TypeError)


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_matrices_are_arrays() -> None:
    query, key = np.asmatrix(QUERY[0, 0]), np.asmatrix(KEY[0, 0])
    out = fastattn.attention(query, key, key, np.asmatrix(PADDING[:1]))
    assert type(out) is np.ndarray
    assert (out == fastattn.attention(QUERY[0, 0], KEY[0, 0], KEY[0, 0], PADDING[:1])).all()


MASKED_ARRAY = np.ma.array(KEY, mask=KEY > 0)


@pytest.mark.parametrize("name", OPERANDS)
@pytest.mark.parametrize(
    "given_", [MASKED_ARRAY, list(MASKED_ARRAY), [[list(MASKED_ARRAY[0, 0])]], ([1.0, np.ma.masked],)]
)
def test_masked_arrays_are_refused_wherever_they_are(name: str, given_: Any) -> None:
    message = raised(lambda: OPERANDS[name](given_), TypeError)
    where = " in a list" if isinstance(given_, (list, tuple)) else ""
    assert message.startswith(f"{name}: a numpy.ma.MaskedArray{where}, whose mask would be lost; expected an ndarray")
    assert message.endswith("as attn_mask") is (name in ("query", "key", "value"))


def test_masked_arrays_are_refused_elsewhere() -> None:
    masked = np.ma.array(PADDING, mask=PADDING)
    layer = fastattn.MultiHeadAttention(FEATURES, HEADS, rng=0)
    calls: list[Call] = [
        lambda: fastattn.attention(QUERY, KEY, KEY, list(masked)),
        lambda: fastattn.attention_weights(QUERY, KEY, rows=list(np.ma.array([1, 2], mask=[0, 1]))),
        lambda: fastattn.attention_weights(QUERY, KEY, lse=list(np.ma.array(LSE, mask=LSE > 0))),
        lambda: layer(QUERY[:, 0], KEY[:, 0], key_mask=list(masked)),
        lambda: layer.load_state_dict({**layer.state_dict(), "out_proj.bias": np.ma.zeros(FEATURES)}),
        lambda: setattr(layer, "out_proj_weight", list(np.ma.zeros((FEATURES, FEATURES)))),
        lambda: plot.heatmap(list(np.ma.ones((3, 3)))),
    ]
    for call in calls:
        with pytest.raises(TypeError):
            call()


# -- parameters from elsewhere -----------------------------------------------------------------------------------------


def test_parameters_in_bfloat16() -> None:
    """They are converted as float16 is, without a rounding."""
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    source = fastattn.MultiHeadAttention(FEATURES, HEADS, rng=0).state_dict()
    narrow = {name: array.astype(bfloat16) for name, array in source.items()}
    layer = fastattn.MultiHeadAttention(FEATURES, HEADS, rng=1)
    layer.load_state_dict(narrow)
    for name, array in layer.state_dict().items():
        assert array.dtype == np.float32
        assert (array == narrow[name].astype(np.float32)).all()
    with pytest.raises(TypeError, match="in_proj_weight: dtype float8_e5m2; expected float16, float32 or float64, or"):
        layer.in_proj_weight = source["in_proj_weight"].astype(pytest.importorskip("ml_dtypes").float8_e5m2)


def test_a_state_dict_of_torch_in_bfloat16() -> None:
    torch = pytest.importorskip("torch")
    theirs = torch.nn.MultiheadAttention(FEATURES, HEADS, dtype=torch.bfloat16)
    layer = fastattn.MultiHeadAttention(FEATURES, HEADS, rng=1)
    layer.load_state_dict(theirs.state_dict())
    for name, tensor in theirs.state_dict().items():
        assert (layer.state_dict()[name] == tensor.float().numpy()).all()
    with pytest.raises(TypeError, match=r"(?s)state: .* a mapping of names to arrays, as state_dict\(\) returns"):
        layer.load_state_dict(theirs)


def test_a_state_dict_cannot_tell_of_add_zero_attn() -> None:
    """So docs/layers.md says it: the layer computes something else."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    plain, zero = (
        torch.nn.MultiheadAttention(FEATURES, HEADS, batch_first=True, add_zero_attn=on) for on in (False, True)
    )
    assert plain.state_dict().keys() == zero.state_dict().keys()
    layer = fastattn.MultiHeadAttention(FEATURES, HEADS)
    layer.load_state_dict(zero.state_dict())
    x = torch.from_numpy(QUERY[:, 0])
    assert np.abs(layer(QUERY[:, 0]) - zero(x, x, x)[0].detach().numpy()).max() > 1e-3
    biased = torch.nn.MultiheadAttention(FEATURES, HEADS, add_bias_kv=True)
    with pytest.raises(ValueError, match="state: a mapping with 'bias_k', 'bias_v'"):
        layer.load_state_dict(biased.state_dict())


# -- what is not installed ---------------------------------------------------------------------------------------------


def test_an_extra_is_named_as_pip_knows_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Installed, in a clone that is not installed, and in a copy without the clone around it."""
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: name)
    assert advice.to_install("plot") == 'pip install "fastattn[plot]"'

    def missing(name: str) -> object:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    clone = tmp_path / "a clone"
    monkeypatch.setattr(advice, "__file__", str(clone / "fastattn" / "call" / "advice.py"))
    assert advice.to_install("plot") == 'pip install "fastattn[plot]"'
    clone.mkdir()
    (clone / "pyproject.toml").touch()
    assert advice.to_install("plot") == f'pip install --editable "{clone}[plot]"'


@pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="not in the source tree")
def test_messages_name_extras_that_there_are() -> None:
    """And none writes by itself what is said in one place."""
    package = (ROOT / "pyproject.toml").read_text("utf-8")
    table = package.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = set(re.findall(r"^([a-z-]+) = ", table, re.MULTILINE))
    sources = {path: path.read_text("utf-8") for path in [ROOT / "conftest.py", *ROOT.glob("fastattn/**/*.py")]}
    named = {name for text in sources.values() for name in re.findall(r"to_install\([\"'](.+?)[\"']\)", text)}
    assert {"bench", "cuda", "dask", "jax", "mpi", "onnx", "plot", "torch", "transformers"} <= named <= extras
    assert not [path for path, text in sources.items() if re.search(r"pip install .*fastattn\[", text)]
