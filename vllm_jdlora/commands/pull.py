"""`jdlora pull`: a collection from a Hugging Face hub, checked before it appears."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vllm_jdlora.commands.terminal import printable


def add_to(commands: Any) -> None:
    parser = commands.add_parser("pull", help="download a collection from a Hugging Face hub and check every byte")
    parser.add_argument("repo", metavar="REPO_ID[@REVISION]")
    parser.add_argument("target", type=Path, metavar="TARGET")
    parser.add_argument("--force", action="store_true", help="replace a collection that is at TARGET")
    parser.add_argument("--endpoint", metavar="URL", help="of the hub (default: HF_ENDPOINT, or Hugging Face's)")
    parser.add_argument("--json", action="store_true", help="as JSON on stdout")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from vllm_jdlora.hub.pull import pull

    repo, _, revision = args.repo.partition("@")
    collection, commit = pull(repo, args.target, revision=revision or None, force=args.force, endpoint=args.endpoint)
    manifest = collection.manifest
    if args.json:
        print(json.dumps({"adapters": len(manifest.adapters), "revision": manifest.revision, "commit": commit}))
    else:
        print(printable(f"{args.target}: {len(manifest.adapters)} adapters, revision {manifest.revision}"))
    return 0
