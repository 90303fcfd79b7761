"""A collection from a repository of a Hugging Face hub; every file name and bound comes from a checked manifest."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_jdlora.collection import Collection
from vllm_jdlora.collection.atomic_folder import written_atomically
from vllm_jdlora.collection.io import MANIFEST_BYTES
from vllm_jdlora.collection.schema import MANIFEST_FILE, CollectionManifest
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.hub.connection import hugging_face_hub, told
from vllm_jdlora.hub.sizes import most_bytes
from vllm_jdlora.json_file import read_text

_COMMIT = re.compile(r"[0-9a-f]{40,64}")
_ASKED_AT_ONCE = 100


def pull(
    repo: str, target: Path, *, revision: str | None = None, force: bool = False, endpoint: str | None = None
) -> tuple[Collection, str]:
    """Download, check every byte, then put the collection at ``target``; the collection and the hub's commit.

    A download that was cut leaves ``.NAME.pull`` beside the target, and the next one asks only for the files that are
    not in it. A target that holds the same revision unharmed is left as it is.

    Args:
        repo: OWNER/NAME.
        target: folder of the collection.
        revision: branch, tag or commit; default: main.
        force: replace a collection that is at ``target``.
        endpoint: address of the hub; default: HF_ENDPOINT, or Hugging Face's.

    Raises:
        JDLoRAError: ``target`` exists with other content (without ``force``), another process pulls to it, the
            content is not what its digests say or larger than its manifest allows, or the hub refuses or cannot be
            reached.
    """
    api = hugging_face_hub().HfApi(endpoint=endpoint)
    target = target.absolute()
    with _staging(target) as staging:
        with told(repo, api.endpoint):
            commit = str(api.repo_info(repo, revision=revision).sha)
        if not _COMMIT.fullmatch(commit):
            raise JDLoRAError(f"{repo}: {api.endpoint} gives no commit; is it a Hugging Face hub?")
        # Where the hub does not answer, huggingface_hub takes the file that is there, of whichever commit.
        source = staging / commit
        _download(api, repo, commit, source, {MANIFEST_FILE: MANIFEST_BYTES})
        try:
            manifest = CollectionManifest.from_json(read_text(source / MANIFEST_FILE, MANIFEST_BYTES))
        except (JDLoRAError, ValueError) as error:
            shutil.rmtree(staging, ignore_errors=True)
            raise JDLoRAError(f"{repo}: {MANIFEST_FILE}: {error}") from error
        if target.exists():
            there = _same(target, manifest.revision)
            if there is not None:
                shutil.rmtree(staging, ignore_errors=True)
                return there, commit
            if not force:
                raise JDLoRAError(f"{target}: exists already with other content; give --force to replace it")
        bounds = most_bytes(manifest)
        # Before the download: it says at once whether the target may be replaced.
        with written_atomically(target, MANIFEST_FILE, force=force) as new:
            _download(api, repo, commit, source, bounds)
            try:
                Collection.open(source, verify=True)
            except JDLoRAError as error:
                shutil.rmtree(staging, ignore_errors=True)
                raise JDLoRAError(f"{repo}: is damaged, nothing was changed here ({error})") from error
            for name in bounds:
                (new / name).parent.mkdir(parents=True, exist_ok=True)
                (source / name).rename(new / name)
        shutil.rmtree(staging, ignore_errors=True)
    return Collection.open(target, verify=False), commit


def _download(api: Any, repo: str, commit: str, source: Path, bounds: Mapping[str, int]) -> None:
    """The files, none of which the hub says to be larger than its bound."""
    names = list(bounds)
    with told(repo, api.endpoint):
        sizes: dict[str, int] = {}
        for first in range(0, len(names), _ASKED_AT_ONCE):
            found = api.get_paths_info(repo, names[first : first + _ASKED_AT_ONCE], revision=commit)
            sizes |= {file.path: file.size for file in found if hasattr(file, "size")}
    for name, bound in bounds.items():
        if name not in sizes:
            raise JDLoRAError(f"{repo}: has no {name}; not a whole collection: `jdlora push` makes one")
        if not 0 <= sizes[name] <= bound:
            raise JDLoRAError(f"{repo}: {name} is {sizes[name]} bytes, more than its manifest can mean; not downloaded")
    source.mkdir(parents=True, exist_ok=True)
    missing = sum(sizes[name] for name in names if not (source / name).exists())
    free = shutil.disk_usage(source).free
    if missing > free:
        raise JDLoRAError(f"{source.parent}: {missing} bytes are to come and {free} are free; make room")
    for name in names:
        with told(repo, api.endpoint):
            hugging_face_hub().hf_hub_download(repo, name, revision=commit, local_dir=source, endpoint=api.endpoint)


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """The folder beside the target that downloads go to, for this process alone."""
    folder = target.with_name(f".{target.name}.pull")
    if folder.is_symlink():
        raise JDLoRAError(f"{folder}: is a link; remove it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise JDLoRAError(f"{folder}: cannot be made ({error.strerror})") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The process that held it until now may have removed it.
        alone = folder.exists() and os.path.samestat(os.fstat(lock), os.stat(folder))
    except BlockingIOError:
        alone = False
    try:
        if not alone:
            raise JDLoRAError(f"{target}: another process is pulling to it; wait for it")
        yield folder
    except KeyboardInterrupt as stop:
        stop.__notes__ = [f"stopped; {folder} holds what has come, and the same command goes on from there"]
        raise
    finally:
        if alone and folder.exists() and not any(folder.iterdir()):
            folder.rmdir()
        os.close(lock)


def _same(target: Path, revision: str) -> Collection | None:
    try:
        collection = Collection.open(target, verify=True)
    except JDLoRAError:
        return None
    return collection if collection.manifest.revision == revision else None
