"""The collection of a process that starts: opened once, and in API servers read whole while the engine starts.

The manifest of 100,000 adapters takes half a second to open, and flags, engine settings, names and run-time adapters
all want it. Their Σ take three seconds of a core to check, in which an API server would only wait for its engine.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from vllm_jdlora.collection import Collection
from vllm_jdlora.serving.collection_revisions import manifest_identity

logger = logging.getLogger("vllm.jdlora")


@dataclass
class _Opened:
    """identity: of the manifest when it was opened. check: of the content, where one was begun."""

    collection: Collection
    identity: tuple[int, int] | None
    check: Future[None] | None = None


_opened: _Opened | None = None


def open_once(path: str) -> Collection:
    """The collection at an absolute path, the same object as long as its folder is not replaced.

    Raises:
        JDLoRAError: it cannot be opened. Its content is not looked at.
    """
    return _entry(path).collection


def check_meanwhile(path: str) -> None:
    """Begin to compare every byte with its digest; :func:`checked` says what came of it, and a failure is logged."""
    entry = _entry(path)
    if entry.check is None:
        thread = ThreadPoolExecutor(1, thread_name_prefix="jdlora-check")
        entry.check = thread.submit(entry.collection.check_content)
        thread.shutdown(wait=False)
        entry.check.add_done_callback(_log_failure)


def checked(path: str) -> Collection:
    """The collection, after its check has ended, if one was begun.

    Raises:
        JDLoRAError: it cannot be opened, or a file differs from its digest or holds a number that is not finite.
    """
    entry = _entry(path)
    if entry.check is not None:
        entry.check.result()
    return entry.collection


def forget() -> None:
    """The process has started: what still wants the collection holds it."""
    global _opened
    _opened = None


def _entry(path: str) -> _Opened:
    global _opened
    identity = manifest_identity(path)
    if _opened is None or _opened.collection.path != Path(path) or _opened.identity != identity or identity is None:
        _opened = _Opened(Collection.open(path, verify=False), identity)
    return _opened


def _log_failure(check: Future[None]) -> None:
    if (error := check.exception()) is not None:
        logger.error("The collection cannot be served: %s", error)
