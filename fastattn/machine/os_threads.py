"""The operating system's threads and locks, whatever stands in their place by now.

gevent and eventlet put green threads in the place of what `threading`, `_thread` and `time` offer: pieces of Python
that take turns in one thread of the system's. Compiled code takes no turns. So Python's own functions are wanted, and a
copy of a built-in module that is made here has them, before a patch and after it, whoever patches.
"""

from importlib import import_module
from importlib.machinery import BuiltinImporter
from importlib.util import module_from_spec
from typing import TYPE_CHECKING, Any

__all__ = ["Lock", "RLock", "allocate_lock", "get_native_id", "local", "start_new_thread"]


def _copy_of(name: str) -> Any:
    """Another module made of the same compiled code, or the module itself if it is none that Python has built in."""
    spec = BuiltinImporter.find_spec(name)
    if spec is None:
        return import_module(name)
    module = module_from_spec(spec)
    BuiltinImporter.exec_module(module)
    return module


if TYPE_CHECKING:
    from _thread import LockType as Lock
    from _thread import allocate_lock, get_native_id, start_new_thread
    from threading import RLock, local
else:
    _thread = _copy_of("_thread")
    Lock, RLock, local = _thread.LockType, _thread.RLock, _thread._local
    allocate_lock, start_new_thread = _thread.allocate_lock, _thread.start_new_thread
    get_native_id = getattr(_thread, "get_native_id", lambda: None)  # not every system has such numbers
