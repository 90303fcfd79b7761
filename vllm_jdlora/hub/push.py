"""A collection to a repository of a Hugging Face hub, with its model card, in one commit."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_jdlora.adapter import WEIGHTS_FILE
from vllm_jdlora.collection import Collection
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.hub.card import CARD_FILE, GENERATED, model_card
from vllm_jdlora.hub.connection import hugging_face_hub, told
from vllm_jdlora.hub.sizes import most_bytes
from vllm_jdlora.peft_config import CONFIG_FILE

_OF_A_COLLECTION = re.compile(
    rf"(bases|errors|scalings-\d{{5}})\.safetensors|plain/[^/]+/({re.escape(CONFIG_FILE)}|{re.escape(WEIGHTS_FILE)})"
)


@dataclass(frozen=True)
class Push:
    """What one commit does: files to upload, files of an earlier revision to delete, and the card (None: kept)."""

    files: tuple[str, ...]
    deleted: tuple[str, ...]
    card: str | None
    commit: str | None


def push(
    path: Path,
    repo: str,
    *,
    private: bool = False,
    branch: str | None = None,
    message: str | None = None,
    license: str = "other",
    dry_run: bool = False,
    endpoint: str | None = None,
) -> Push:
    """Check every byte, then upload in one commit. A dry run asks the hub nothing.

    Args:
        path: the collection.
        repo: OWNER/NAME; made where it is not there.
        private: whether a repository that is made is private; otherwise as its owner's settings say.
        branch: made where it is not there; default: main.
        endpoint: address of the hub; default: HF_ENDPOINT, or Hugging Face's.

    Raises:
        JDLoRAError: the collection is damaged, or replaced before all of it is uploaded, or the hub refuses or cannot
            be reached.
    """
    with _held(path) as check_in_place:
        collection = Collection.open(path, verify=True)
        files = list(most_bytes(collection.manifest))
        card = model_card(collection, repo, license)
        if dry_run:
            return Push(tuple(files), (), card, None)
        hub = hugging_face_hub()
        api = hub.HfApi(endpoint=endpoint)
        with told(repo, api.endpoint):
            api.create_repo(repo, private=private or None, exist_ok=True)
            if branch is not None:
                api.create_branch(repo, branch=branch, exist_ok=True)
            before = api.repo_info(repo, revision=branch)
            there = {sibling.rfilename for sibling in before.siblings or ()}
            keep = CARD_FILE in there and GENERATED not in Path(
                hub.hf_hub_download(repo, CARD_FILE, revision=before.sha, endpoint=api.endpoint)
            ).read_text(encoding="utf-8", errors="replace")
            stale = sorted(name for name in there - set(files) if _OF_A_COLLECTION.fullmatch(name))
            additions = [_addition(hub, collection, name) for name in files]
            if not keep:
                additions.append(hub.CommitOperationAdd(CARD_FILE, card.encode()))
            # Before the commit: files are named by their digests, but read again when they are uploaded.
            api.preupload_lfs_files(repo, additions, revision=branch)
            check_in_place()
            done = api.create_commit(
                repo,
                [*additions, *map(hub.CommitOperationDelete, stale)],
                commit_message=message or f"Collection of {len(collection.manifest.adapters)} adapters",
                revision=branch,
                # Of two pushes at once one is refused, rather than their files being mixed.
                parent_commit=before.sha,
            )
    return Push(tuple(files), tuple(stale), None if keep else card, done.oid)


def _addition(hub: Any, collection: Collection, name: str) -> Any:
    """One file as it was checked. Small ones, which the hub takes with the commit itself, are read here and now."""
    file = collection.path / name
    added = hub.CommitOperationAdd(name, file.read_bytes() if file.suffix == ".json" else str(file))
    if added.upload_info.sha256.hex() != collection.manifest.files.get(name, added.upload_info.sha256.hex()):
        raise JDLoRAError(f"{file}: was changed while it was pushed; push again when it is at rest")
    return added


@contextmanager
def _held(path: Path) -> Iterator[Callable[[], None]]:
    """The folder that is at ``path`` now: what is yielded raises where another has taken its place.

    Raises:
        JDLoRAError: that, also where the block fails for files that are no longer there.
    """
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise JDLoRAError(f"{path}: is not a collection ({error.strerror})") from error

    def check_in_place() -> None:
        # As long as it is open, its number on the disk is given to no other.
        if not (path.exists() and os.path.samestat(os.fstat(folder), os.stat(path))):
            raise JDLoRAError(f"{path}: was replaced while it was pushed; push again")

    try:
        yield check_in_place
    except Exception:
        check_in_place()
        raise
    finally:
        os.close(folder)
