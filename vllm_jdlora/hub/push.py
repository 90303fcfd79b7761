"""A collection to a repository of a Hugging Face hub, with its model card, in one commit."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from vllm_jdlora.adapter import WEIGHTS_FILE
from vllm_jdlora.collection import Collection
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
        JDLoRAError: the collection is damaged, or the hub refuses or cannot be reached.
    """
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
        operations = [hub.CommitOperationAdd(name, str(path / name)) for name in files]
        operations += [hub.CommitOperationDelete(name) for name in stale]
        if not keep:
            operations.append(hub.CommitOperationAdd(CARD_FILE, card.encode()))
        message = message or f"Collection of {len(collection.manifest.adapters)} adapters"
        # The parent: of two pushes at once one is refused, rather than their files being mixed.
        done = api.create_commit(repo, operations, commit_message=message, revision=branch, parent_commit=before.sha)
    return Push(tuple(files), tuple(stale), None if keep else card, done.oid)
