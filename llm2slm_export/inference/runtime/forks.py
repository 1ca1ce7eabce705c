"""Protection of forked children: objects loaded before a fork are neither used nor destroyed in the child.

A forked child has none of its parent's threads. The destructors of ONNX Runtime and OpenVINO would wait for theirs forever,
and memory on a GPU belongs to the parent. Inherited objects are therefore kept alive until the child ends.
"""

import ctypes
import os
import threading
import weakref
from typing import Any

from llm2slm_export.errors import UsageError

_owners: "weakref.WeakSet[Any]" = weakref.WeakSet()
_locks: "weakref.WeakSet[ForkSafeLock]" = weakref.WeakSet()


class HomeProcess:
    """The process that loaded an object. In forked children the object is never destroyed.

    Args:
        owner: the object that holds sessions or device memory. It must not release them if `inherited`.
    """

    def __init__(self, owner: object) -> None:
        self._pid = os.getpid()
        keep_in_children(owner)

    @property
    def inherited(self) -> bool:
        """Whether this process is a forked child of the one that loaded the object."""
        return os.getpid() != self._pid

    def require(self, *, single_thread: bool = False) -> None:
        """Refuse use in a forked child.

        Args:
            single_thread: whether loading with threads=1 would allow use in a child; the remedy then mentions it.

        Raises:
            UsageError: this process was forked after the bundle was loaded.
        """
        if not self.inherited:
            return
        other = ", or with threads=1" if single_thread else ""
        raise UsageError(
            "This pair was loaded before the process was forked, and cannot be used in the child.",
            f"loaded in process {self._pid}; this is process {os.getpid()}",
            "a forked child has neither the runtime's threads nor its GPU",
            remedy=f"load the bundle after the fork{other}: without gunicorn's --preload, in the worker function of "
            "multiprocessing, or with its start method 'spawn'",
        )


class ForkSafeLock:
    """A lock that is always free in a forked child, even if a thread of the parent held it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        _locks.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def renew(self) -> None:
        """Replace the lock by a free one, in a forked child."""
        self._lock = threading.Lock()


def keep_in_children(owner: object) -> None:
    """Keep an object alive in children that are forked during its lifetime."""
    _owners.add(owner)


def never_destroy(owner: object) -> None:
    """Keep an object alive until the process ends, including interpreter shutdown, when modules are cleared."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(owner))


def _keep_what_was_inherited() -> None:
    for owner in tuple(_owners):
        never_destroy(owner)
    for lock in tuple(_locks):
        lock.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_what_was_inherited)
