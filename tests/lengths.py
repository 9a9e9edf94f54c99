"""How long the package's files and functions are: `python tests/lengths.py` names those that are too long.

Pages of the guide are read from top to bottom, and may be longer.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "fastattn"
FILE, FUNCTION = 500, 60  # lines


def span(node: ast.AST) -> set[int]:
    """Return the numbers of the lines of a node."""
    return set(range(node.lineno, node.end_lineno + 1))  # type: ignore[attr-defined]


def lengths_of_functions(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield each function's name and number of lines, without its docstring and what is defined inside of it.

    >>> code = '''
    ... def outer():
    ...     "A docstring."
    ...     def inner():
    ...         pass
    ...     return inner
    ... '''
    >>> list(lengths_of_functions(ast.parse(code)))
    [('outer', 2), ('inner', 2)]
    """
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            inside = [node for node in ast.walk(function) if isinstance(node, definitions) and node is not function]
            docstring = function.body[:1] if ast.get_docstring(function) else []
            yield function.name, len(span(function).difference(*map(span, [*inside, *docstring])))


def too_long() -> Iterator[tuple[str, int]]:
    """Yield each file and each function of the package that is too long, with its number of lines."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name, text = path.relative_to(PACKAGE).as_posix(), path.read_text("utf-8")
        if (lines := text.count("\n")) > FILE:
            yield name, lines
        if not name.startswith("guide/"):
            for function, lines in lengths_of_functions(ast.parse(text)):
                if lines > FUNCTION:
                    yield f"{name} {function}", lines


if __name__ == "__main__":
    found = dict(too_long())
    for name in found:
        print(f"{name}: {found[name]} lines; at most {FUNCTION if ' ' in name else FILE} in the package")
    sys.exit(bool(found))
