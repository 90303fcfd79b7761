"""The adapters of the soak test: three revisions of a collection and PEFT folders, all of known content.

What an answer must be is computed from these contents alone (`soak_reference.py`), by nothing that the server uses.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from bench_conditions import ROOT

sys.path.append(str(ROOT))  # contents, and the merged reference, are those of the tests against real servers

from tests.serving import churn_adapters
from tests.serving.churn_adapters import CLUSTERS, Content
from tests.serving.name_history import History, Spell

__all__ = ["ARRIVING", "BASE", "CLUSTERS", "Content", "History", "SoakAdapters", "churn_adapters", "write_adapters"]

BASE = "base"
ARRIVING = tuple(f"arrived-{i}" for i in range(6))
"""Names that are loaded, replaced and unloaded while the server runs."""


@dataclass(frozen=True)
class SoakAdapters:
    """What is on disk.

    Attributes:
        revisions: folder and contents by name of three collections. The second has the bases of the first, some other
            adapters, some new ones and lacks a few; the third has other bases under the names of the second.
        folders: PEFT folders of adapters to load: near the bases of the first, of the third, and near none.
    """

    revisions: tuple[tuple[Path, dict[str, Content]], ...]
    folders: dict[Content, Path]

    @property
    def names(self) -> list[str]:
        """Those of the first revision."""
        return list(self.revisions[0][1])

    def history(self) -> History:
        """What the names mean when the server has started with the first revision."""
        spells = {name: [Spell(content, 0.0)] for name, content in self.revisions[0][1].items()}
        return History({**spells, BASE: [Spell(None, 0.0)]})


def write_adapters(root: Path, model: Path, count: int) -> SoakAdapters:
    """`count` adapters in each revision, about 46 KB each for SmolLM2-135M; they adapt q, k and v."""
    first = {f"soak-{i:05d}": Content(1, i) for i in range(count)}
    second = {
        name: Content(1, count + i) if i % 10 == 0 else content
        for i, (name, content) in enumerate(first.items())
        if i % 100 != 77
    }
    second |= {f"new-{i:05d}": Content(1, 2 * count + i) for i in range(max(1, count // 100))}
    third = {name: Content(2, 3 * count + i) for i, name in enumerate(second)}
    revisions = tuple(
        (churn_adapters.write_collection(root / name, model, contents), contents)
        for name, contents in (("first", first), ("second", second), ("third", third))
    )
    arriving = [Content(1, 5 * count + i) for i in range(6)] + [Content(2, 6 * count + i) for i in range(2)]
    arriving += [Content(None, 7 * count + i) for i in range(2)]
    folders = {
        content: churn_adapters.write_folder(root / f"folder-{i}", model, content) for i, content in enumerate(arriving)
    }
    return SoakAdapters(revisions, folders)
