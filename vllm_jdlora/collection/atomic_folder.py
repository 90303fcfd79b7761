"""A folder that appears whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from vllm_jdlora.errors import JDLoRAError

# Of Linux's renameat2: paths from the working folder; two names for each other.
_HERE, _RENAME_EXCHANGE = -100, 2


@contextmanager
def written_atomically(target: Path, marker: str, *, force: bool = False) -> Iterator[Path]:
    """A temporary folder beside ``target`` that takes its place when the block ends well, and vanishes otherwise.

    With ``force`` an existing folder and the new one change places, at once where the system can, and the old one is
    removed. Only an
    empty folder, or one with the file ``marker`` in it, is ever replaced: ``-o ~ --force`` must not cost a home.

    Raises:
        JDLoRAError: ``target`` exists (without ``force``), is not such a folder, or the disk refuses.
    """
    target = Path(target).absolute()
    if target.exists() or target.is_symlink():
        if not force:
            raise JDLoRAError(f"{target}: exists already; choose another name or give --force to replace it")
        if not target.is_dir() or target.is_symlink():
            raise JDLoRAError(f"{target}: is not a folder; it is not replaced")
        if not (target / marker).is_file() and any(target.iterdir()):
            raise JDLoRAError(f"{target}: has other things than {marker} in it; it is not replaced")
    token = secrets.token_hex(4)
    temporary = target.with_name(f".{target.name}.{token}.new")
    old = target.with_name(f".{target.name}.{token}.old")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        readable = temporary.stat().st_mode & 0o666
        for file in sorted(temporary.rglob("*")):
            if file.is_file():
                # safetensors writes files that only their owner can read; the server may be another user.
                file.chmod(readable)
            _sync(file)
        _sync(temporary)
        if not (force and target.exists() and _exchanged(temporary, target)):
            # Without --force one that came meanwhile is kept: the rename does not replace it.
            if force and target.exists():
                os.replace(target, old)
            try:
                os.rename(temporary, target)
            except BaseException:
                if old.exists():
                    os.replace(old, target)
                raise
        _sync(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        problem = getattr(error, "strerror", None) or error
        raise JDLoRAError(f"{target}: cannot be written ({problem}); nothing was changed") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _exchanged(one: Path, other: Path) -> bool:
    """Let two folders change places at once, so that nobody finds neither; False where the system cannot."""
    exchange = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if exchange is None:
        return False
    if exchange(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
