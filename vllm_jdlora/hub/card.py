"""The model card of a collection, filled in from its manifest (template: ``model_card.md`` beside this file)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from string import Template

from vllm_jdlora.collection import Collection

CARD_FILE = "README.md"
GENERATED = "<!-- Written by `jdlora push`. Without this line the card is yours and is kept. -->"
_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


def model_card(collection: Collection, repo: str, license: str) -> str:
    """The card as Markdown with YAML front matter. What the manifest says is quoted: it may come from outside."""
    manifest = collection.manifest
    errors = [entry.relative_error for entry in manifest.adapters]
    base = manifest.base_model.name
    # Front matter and commands take a repository's name only: a path of this machine means nothing elsewhere.
    named = base if base and _REPOSITORY.fullmatch(base) else None
    targets = sorted({re.sub(r"\W", "?", part.name.split(".")[-1], flags=re.ASCII) for part in manifest.slices})
    return Template((Path(__file__).parent / "model_card.md").read_text(encoding="utf-8")).substitute(
        license=json.dumps(license),
        base_model_line=f"\nbase_model: {json.dumps(named)}\nbase_model_relation: adapter" if named else "",
        marker=GENERATED,
        base_model=f"`{named}`" if named else "not named",
        served_model=named or "BASE_MODEL",
        adapters=len(manifest.adapters),
        plain=len(manifest.plain),
        method=manifest.method.capitalize(),
        rank=manifest.rank,
        clusters=manifest.clusters,
        dtype=manifest.dtype if manifest.quantize == "none" else f"{manifest.dtype}, bases {manifest.quantize}",
        targets=", ".join(f"`{name}`" for name in targets),
        mean_error=f"{sum(errors) / len(errors):.3f}",
        max_error=f"{max(errors):.3f}",
        size=f"{collection.size_in_bytes() / 1e6:.1f} MB",
        revision=re.sub(r"[^0-9a-z]", "?", manifest.revision),
        repo=repo,
    )
