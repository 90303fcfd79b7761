"""`jdlora push`: a collection with its model card to a Hugging Face hub, in one commit."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_jdlora.commands.terminal import printable


def add_to(commands: Any) -> None:
    parser = commands.add_parser("push", help="upload a collection and its model card to a Hugging Face hub")
    parser.add_argument("collection", type=Path, metavar="COLLECTION")
    parser.add_argument("repo", metavar="REPO_ID", help="as OWNER/NAME; made where it is not there")
    parser.add_argument("--private", action="store_true", help="a repository that is made is private")
    parser.add_argument("--branch", help="default: main")
    parser.add_argument("--message", help="of the commit")
    parser.add_argument("--license", default="other", help="for the model card (default: other)")
    parser.add_argument("--dry-run", action="store_true", help="check and print files and card; upload nothing")
    parser.add_argument("--endpoint", metavar="URL", help="of the hub (default: HF_ENDPOINT, or Hugging Face's)")
    parser.add_argument("--json", action="store_true", help="as JSON on stdout")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from vllm_jdlora.hub.push import push

    names = ("private", "branch", "message", "license", "dry_run", "endpoint")
    options = {name: getattr(args, name) for name in names}
    done = push(args.collection, args.repo, **options)
    if args.json:
        print(json.dumps(asdict(done)))
    elif args.dry_run:
        print("\n".join([*map(printable, done.files), "", done.card or ""]))
    else:
        card = "the repository's own card kept" if done.card is None else "card written"
        print(printable(f"{args.repo}: {len(done.files)} files, {card}, commit {done.commit}"))
    return 0
