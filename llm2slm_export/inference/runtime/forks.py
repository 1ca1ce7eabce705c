"""What was loaded before a fork, in the child: not used, and never destroyed.

A forked child has none of its parent's threads. ONNX Runtime's and OpenVINO's destructors wait for theirs, for ever, and
what is on a GPU belongs to the parent. So that a child can end, what it inherited stays where it is.
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
    """The process that loaded something; in a child that is forked from it, what was loaded is never destroyed.

    Args:
        owner: holds sessions, or memory of a device. Where `inherited`, it must not let go of them.
    """

    def __init__(self, owner: object) -> None:
        self._pid = os.getpid()
        keep_in_children(owner)

    @property
    def inherited(self) -> bool:
        """Whether this is another process than the one that loaded it."""
        return os.getpid() != self._pid

    def require(self, *, single_thread: bool = False) -> None:
        """Refuse to use what another process loaded.

        Args:
            single_thread: whether it could have been loaded so that a child can use it.

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
    """A lock that is free in a forked child, whichever of the parent's threads held it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        _locks.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def renew(self) -> None:
        """Be free, in a child that has none of the threads that could have held it."""
        self._lock = threading.Lock()


def keep_in_children(owner: object) -> None:
    """Never destroy an object in children that are forked while it is alive."""
    _owners.add(owner)


def never_destroy(owner: object) -> None:
    """Keep an object alive until the process ends, its last moments included, when modules let go of what they hold."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(owner))


def _keep_what_was_inherited() -> None:
    for owner in tuple(_owners):
        never_destroy(owner)
    for lock in tuple(_locks):
        lock.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_what_was_inherited)
