"""collection.json: what is written is read back, its revision digests the content, and older layouts say the same."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace

import pytest

from vllm_jdlora.adapter import SliceShape
from vllm_jdlora.collection.schema import (
    AdapterEntry,
    BaseModel,
    Calibration,
    CollectionManifest,
    PlainEntry,
    SkippedEntry,
)
from vllm_jdlora.errors import JDLoRAError

FILES = {name: "0" * 64 for name in ("bases.safetensors", "errors.safetensors", "scalings-00000.safetensors")}
# What could be taken for layout or for the revision if strings were not told from it.
TRICKY = [
    '", "revision": "',
    ',\n"revision": "0", ',
    "line\nbreak,\n and \\ and \u2028",
    "Größe",
    '{"a": [\n1,\n2]}',
    "",
]


def manifest(**changes) -> CollectionManifest:
    adapters = tuple(
        AdapterEntry(name, i % 2, error, 8, scale, 64, "a" * 64, output)
        for i, (name, error, scale, output) in enumerate(
            [("one", 0.1, 2.0, None), ("zwei", 1e-17, None, 0.25), ("Größe", 0, 1, 1 / 3)]
        )
    )
    values = {
        "base_model": BaseModel("org/model", None),
        "method": "full",
        "rank": 4,
        "clusters": 2,
        "metric": "activation",
        "dtype": "bf16",
        "seed": 0,
        "slices": (SliceShape("layers.0.q_proj", 8, 8),),
        "adapters": adapters,
        "plain": (PlainEntry("alone", "its error is 0.9", 8, 64, "b" * 64, 0.9),),
        "skipped": tuple(SkippedEntry(f"bad-{i}", text) for i, text in enumerate(TRICKY)),
        "files": FILES,
        "calibration": Calibration("c" * 64, 3, 100),
        "max_error": 0.5,
    }
    return CollectionManifest(**{**values, **changes})


def content(made: CollectionManifest) -> dict:
    return {key: value for key, value in asdict(made).items() if key != "revision"}


@pytest.mark.parametrize("changes", [{}, {"calibration": None, "plain": (), "skipped": ()}], ids=["full", "bare"])
def test_what_is_written_is_read_back(changes):
    made = manifest(**changes)
    read = CollectionManifest.from_json(made.to_json())
    assert read == made and read.to_json() == made.to_json()


def test_the_revision_is_the_digest_of_the_content_as_sorted_json():
    made = manifest()
    expected = hashlib.sha256(json.dumps(content(made), sort_keys=True).encode()).hexdigest()[:32]
    assert made.revision == expected == CollectionManifest.from_json(made.to_json()).revision


@pytest.mark.parametrize("indent", [None, 1, 4])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_the_layout_does_not_matter(indent, ascii_only):
    made = manifest()
    # With an indent of one and letters as they are: the layout of version 0.1.
    assert CollectionManifest.from_json(json.dumps(asdict(made), indent=indent, ensure_ascii=ascii_only)) == made


def test_every_adapter_has_a_line_of_its_own():
    lines = manifest().to_json().splitlines()
    assert [json.loads(line.rstrip(","))["name"] for line in lines if '"cluster"' in line] == ["one", "zwei", "Größe"]


@pytest.mark.parametrize("layout", [lambda m: m.to_json(), lambda m: json.dumps(asdict(m), indent=1)])
@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace('"cluster": 1', '"cluster": 0', 1),
        lambda text: text.replace("1e-17", "1e-18"),
        lambda text: text.replace("org/model", "org/other"),
        lambda text: text.replace("its error", "its  error"),
    ],
    ids=["cluster", "error", "base model", "blank"],
)
def test_a_change_is_found_by_the_revision(layout, change):
    text = layout(manifest())
    assert change(text) != text
    with pytest.raises(JDLoRAError, match="revision does not belong"):
        CollectionManifest.from_json(change(text))


def test_the_revision_of_changed_content_must_be_taken_anew():
    other = replace(manifest(), clusters=3)
    with pytest.raises(JDLoRAError, match="revision does not belong"):
        other.to_json()
    assert CollectionManifest.from_json(replace(other, revision="").to_json()).clusters == 3


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda adapters: adapters.append(7), "adapters must hold JSON objects"),
        (lambda adapters: adapters[1].pop("cluster"), "adapters lacks 'cluster'"),
        (lambda adapters: adapters[1].update(extra=1), "does not know 'extra'"),
        (lambda adapters: adapters[2].update(rank=True), "rank is True"),
        (lambda adapters: adapters[2].update(sha256=None), "sha256 is None"),
        (lambda adapters: adapters[1].update(cluster=2), "adapter zwei is in cluster 2"),
        (lambda adapters: adapters[1].update(output_error=-0.5), "adapter zwei has the error -0.5"),
        (lambda adapters: adapters[2].update(relative_error=10**400), "too large"),
    ],
)
def test_one_bad_entry_among_good_ones_is_named(change, told):
    raw = json.loads(manifest().to_json())
    change(raw["adapters"])
    with pytest.raises(JDLoRAError, match=told):
        CollectionManifest.from_json(json.dumps(raw))


def test_a_field_with_a_default_may_be_left_out_but_counts_in_the_revision():
    made = manifest()
    raw = json.loads(made.to_json())
    del raw["adapters"][0]["output_error"]  # it was None
    assert CollectionManifest.from_json(json.dumps(raw)) == made
