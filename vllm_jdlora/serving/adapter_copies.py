"""What a running server keeps on disk of the adapters that came to it: their folders, and their Σ, while they are used.

An adapter is copied before it is served. The folder that it came from may change or vanish, and a worker that then
looks for it would take the whole engine down; and the copy's path names its content, as prefix caching needs. So
adapters of equal content share a copy, whose last user may leave while another comes: see :meth:`AdapterCopies.kept`.
"""

from __future__ import annotations

import dataclasses
import os
import secrets
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vllm_jdlora.adapter import WEIGHTS_FILE, Adapter, copy_files
from vllm_jdlora.collection.arrival_file import arrival_path
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.peft_config import CONFIG_FILE
from vllm_jdlora.tensor_file import identity_of


class AdapterCopies:
    """Files in the arrivals folder, each there as long as it has users.

    Args:
        folder: the arrivals folder; ``DIGEST.safetensors`` are Σ, ``adapters/SHA256`` are PEFT folders.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        # Adapters are taken in by threads, and released by the event loop.
        self._lock = threading.Lock()
        self._users: Counter[Path] = Counter()
        self._keepers = 0
        self._discarded: set[Path] = set()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Nothing is deleted inside the block, so that what is found in the folder can get a user before it is left.

        What loses its last user meanwhile, and gets no other one, is deleted at the end.
        """
        with self._lock:
            self._keepers += 1
        try:
            yield
        finally:
            with self._lock:
                self._keepers -= 1
                if not self._keepers:
                    discarded, self._discarded = self._discarded, set()
                    self._delete(*discarded)

    def copy(self, adapter: Adapter) -> Adapter:
        """The same adapter, its files copied. The copy has no user yet: for use inside :meth:`kept`.

        Raises:
            JDLoRAError: the adapter changed since it was read, or the disk refuses.
        """
        target = self.folder / "adapters" / adapter.sha256
        if not target.is_dir():
            temporary = target.with_name(f".{secrets.token_hex(8)}.new")
            try:
                copy_files(adapter, temporary)
                os.rename(temporary, target)
            except OSError as error:
                raise JDLoRAError(f"{adapter.path}: cannot be copied to {target} ({error.strerror})") from error
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        return dataclasses.replace(adapter, path=target, weights=identity_of(target / WEIGHTS_FILE))

    def link(self, folder: Path, sha256: str) -> Path:
        """A second way to the files of a collection's plain adapter that outlives the collection's folder.

        Links cost no bytes. On another file system than the collection's there are none: the folder itself then. For
        use inside :meth:`kept`, as long as adapters come and go.
        """
        target = self.folder / "adapters" / sha256
        if target.is_dir():
            return target
        try:
            target.mkdir(parents=True)
            for file in (CONFIG_FILE, WEIGHTS_FILE):
                os.link(folder / file, target / file)
        except OSError:
            shutil.rmtree(target, ignore_errors=True)
            return folder
        return target

    def use(self, *paths: Path) -> None:
        with self._lock:
            self._users.update(paths)

    def release(self, *paths: Path) -> None:
        """One user less of each; what nobody uses is deleted. Paths that are not in the folder are left alone."""
        with self._lock:
            for path in paths:
                if self._users[path] > 1:
                    self._users[path] -= 1
                else:
                    del self._users[path]
                    self._delete(path)

    def discard(self, *paths: Path) -> None:
        """Delete what has no user."""
        with self._lock:
            self._delete(*paths)

    def _delete(self, *paths: Path) -> None:
        unused = [path for path in paths if path not in self._users and self.folder in path.parents]
        if self._keepers:
            self._discarded.update(unused)
            return
        for path in unused:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def sigma_path(self, digest: str) -> Path:
        return arrival_path(self.folder, digest)
