"""What the code of a model of transformers does about attention, read from its classes before they compute.

transformers lets any model be made with the name of any attention that is registered, also one whose layers never ask
for it. Here the functions of a model's class are followed to the classes and functions of the same model that they
name. No source is read: the names that a function uses are in its code.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import create_recurrent_attention_mask

__all__ = ["refusal"]

#: What a function names that computes weights.
SOFTMAX = frozenset(("softmax", "Softmax", "scaled_dot_product_attention"))


def refusal(model: type[Any], implementation: str) -> str | None:
    """Return why a class of models cannot be made with an attention that is registered, or None.

    Parameters
    ----------
    model : type
        A subclass of PreTrainedModel. Models within it are classes of their own, and are left to themselves.
    implementation : str

    Returns
    -------
    str or None
        A sentence with the name of the class.
    """
    functions, tables = _reached(model)
    instead = 'expected another attn_implementation, such as "eager"'
    for table in tables:
        if implementation not in table:
            names = ", ".join(f'"{name}"' for name in table)
            return f'{model.__name__}: "{implementation}", and its attention is one of {names}; {instead}'
    asks = any(_asks_for_a_mask(function) for function, _ in functions)
    reaches = any(_asks_for_attention(function) for function, _ in functions)
    if asks and not reaches and any(_attends(owner) for _, owner in functions if owner is not None):
        return (
            f"{model.__name__}: its layers compute attention themselves, and do not ask transformers' "
            f'AttentionInterface for "{implementation}"; {instead}'
        )
    return None


def _reached(model: type[Any]) -> tuple[list[tuple[Any, type[Any] | None]], list[dict[str, Any]]]:
    """Return the functions of a model, each with its class, and the tables that a class of attention is chosen from."""
    functions: list[tuple[Any, type[Any] | None]] = []
    tables: list[dict[str, Any]] = []
    seen: set[int] = set()
    waiting: list[tuple[Any, type[Any] | None]] = [(model, None)]
    while waiting:
        found, owner = waiting.pop()
        if id(found) in seen:
            continue
        seen.add(id(found))
        if isinstance(found, type):
            waiting += [(function, found) for function in _functions(found)]
            continue
        functions.append((found, owner))
        for entry in _named(found):
            if isinstance(entry, dict):
                if id(entry) not in seen:
                    seen.add(id(entry))
                    tables.append(entry)
            elif isinstance(entry, types.FunctionType) or _is_part(entry, model):
                waiting.append((entry, None))
    return functions, tables


def _is_part(module: type[Any], model: type[Any]) -> bool:
    """Whether a class of modules is asked about with a model: models with a configuration of their own are not."""
    return not issubclass(module, PreTrainedModel) or module.config_class is model.config_class


def _functions(owner: type[Any]) -> Iterator[Any]:
    """Yield the functions of a class and of its bases, those of PyTorch and of every model left out."""
    for base in owner.__mro__:
        if _of_a_model(base):
            for name, entry in vars(base).items():
                if name == "_init_weights":  # which names all classes of a file
                    continue
                entry = inspect.unwrap(getattr(entry, "__func__", getattr(entry, "fget", entry)) or entry)
                if isinstance(entry, types.FunctionType):
                    yield entry


def _of_a_model(owner: type[Any]) -> bool:
    """Whether a class is a model's own, and not what PyTorch and transformers have for every model."""
    library, _, rest = owner.__module__.partition(".")
    return library not in ("torch", "builtins") and (library != "transformers" or rest.startswith("models."))


def _names(function: Any) -> set[str]:
    """Return the names that a function uses, and functions within it."""
    names: set[str] = set()
    waiting = [function.__code__]
    while waiting:
        code = waiting.pop()
        names.update(code.co_names)
        waiting += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return names


def _named(function: Any) -> Iterator[Any]:
    """Yield the modules' classes, tables of such, and functions of the same file that a function names."""
    for name in _names(function):
        entry = function.__globals__.get(name)
        if isinstance(entry, type) and issubclass(entry, torch.nn.Module):
            if _of_a_model(entry):
                yield entry
        elif isinstance(entry, types.FunctionType) and entry.__module__ == function.__module__:
            yield inspect.unwrap(entry)
        elif isinstance(entry, dict) and {"eager", "sdpa"} & entry.keys() and type(entry) is dict:
            yield entry


def _asks_for_attention(function: Any) -> bool:
    """Whether a function looks up the attention that its model was made with."""
    return any(isinstance(function.__globals__.get(name), AttentionInterface) for name in _names(function))


def _asks_for_a_mask(function: Any) -> bool:
    """Whether a function calls one of those that make a mask for attention."""
    named = (function.__globals__.get(name) for name in _names(function))
    return any(
        isinstance(entry, types.FunctionType)
        and entry.__module__ == create_recurrent_attention_mask.__module__
        and entry is not create_recurrent_attention_mask
        for entry in named
    )


def _parameters(function: Any) -> tuple[str, ...]:
    code = function.__code__
    parameters: tuple[str, ...] = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return parameters


def _attends(owner: type[Any]) -> bool:
    """Whether a class computes weights, and is given a mask."""
    functions = list(_functions(owner))
    masked = any("mask" in name for function in functions for name in _parameters(function))
    return masked and any(SOFTMAX & _names(function) for function in functions)
