"""What pytest leaves out: modules for libraries that are not installed, whose doctests it would import."""

from __future__ import annotations

from importlib.util import find_spec

NEEDS = {
    "eager": ["torch"],
    "operators": ["torch"],
    "torch": ["torch"],
    "transformers": ["torch", "transformers"],
    "jax": ["jax"],
}
collect_ignore = [
    f"fastattn/integrations/{module}.py"
    for module, libraries in NEEDS.items()
    if any(find_spec(library) is None for library in libraries)
]
