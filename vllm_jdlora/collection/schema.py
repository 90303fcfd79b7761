"""``collection.json``: its fields as frozen dataclasses, and the checks of a manifest that comes from outside."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vllm_jdlora.adapter import SliceShape, check_adapter_name
from vllm_jdlora.collection.json_objects import as_json, object_of, objects_of
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.json_file import parsed_object, short

FORMAT_VERSION = 2
MANIFEST_FILE = "collection.json"
BASES_FILE = "bases.safetensors"
ERRORS_FILE = "errors.safetensors"
METHODS = ("full", "diag")
METRIC_ERRORS = {"frobenius": "relative error", "activation": "output error", "fisher": "loss-weighted error"}
"""Metric of the fit → what the error in it is called."""
DTYPES = ("bf16", "fp16", "fp32")
QUANTIZATIONS = ("none", "int8", "fp8")

_FILE_NAME = re.compile(r"(bases|errors|scalings-\d{5})\.safetensors")
_MOST_NUMBERS = 1 << 48
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class BaseModel:
    """The base model that the adapters were trained on.

    ``name`` is what the adapters say; ``fingerprint`` is the SHA-256 of the model's config.json where the model was
    at hand when the collection was made.
    """

    name: str | None
    fingerprint: str | None = None


@dataclass(frozen=True, slots=True)
class AdapterEntry:
    """One compressed adapter; its place in the list is its row in the scalings.

    ``relative_error`` is ‖ΔW − UΣV‖_F / ‖ΔW‖_F over all slices, not squared, for the values as stored;
    ``output_error`` the same in the metric of the fit, where that is another; ``scale`` is s where it
    is one for all slices.
    """

    name: str
    cluster: int
    relative_error: float
    rank: int
    scale: float | None
    parameters: int
    sha256: str
    output_error: float | None = None


@dataclass(frozen=True)
class Calibration:
    """The text whose activations the metric comes from: SHA-256 of the texts as run, how many, tokens counted."""

    text_sha256: str
    texts: int
    tokens: int


@dataclass(frozen=True)
class PlainEntry:
    """One adapter kept uncompressed in ``plain/NAME``, and why."""

    name: str
    reason: str
    rank: int
    parameters: int
    sha256: str
    relative_error: float | None = None


@dataclass(frozen=True)
class SkippedEntry:
    """One adapter that was left out because it could not be read, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class CollectionManifest:
    """What ``collection.json`` says. ``files`` gives the SHA-256 of every tensor file; ``revision`` digests it all.

    ``dtype`` is that of Σ, and of the bases unless ``quantize`` names another. ``max_error`` is the limit above which
    adapters were kept plain. ``error_floor`` ≤ ``error_reached``: root mean squares over adapters and slices of the
    relative error (in the metric of the fit) that no bases of this rank could go below for these clusters, and that of
    the bases as stored, both over the slices whose floor was computed; None where it was not.
    """

    base_model: BaseModel
    method: str
    rank: int
    clusters: int
    metric: str
    dtype: str
    seed: int
    slices: tuple[SliceShape, ...]
    adapters: tuple[AdapterEntry, ...]
    plain: tuple[PlainEntry, ...]
    skipped: tuple[SkippedEntry, ...]
    files: Mapping[str, str]
    calibration: Calibration | None = None
    quantize: str = "none"
    max_error: float | None = None
    error_floor: float | None = None
    error_reached: float | None = None
    format_version: int = FORMAT_VERSION
    revision: str = ""

    def __post_init__(self) -> None:
        _require_format(self.format_version)
        _require(self.method in METHODS, f"method {short(self.method)} is not one of {METHODS}")
        _require(self.metric in METRIC_ERRORS, f"metric {short(self.metric)} is not one of {tuple(METRIC_ERRORS)}")
        _require(self.dtype in DTYPES, f"dtype {short(self.dtype)} is not one of {DTYPES}")
        _require(self.quantize in QUANTIZATIONS, f"quantize {short(self.quantize)} is not one of {QUANTIZATIONS}")
        _require(self.rank >= 1 and self.clusters >= 1, "rank and clusters must be at least 1")
        _require(bool(self.slices) and bool(self.adapters), "there must be slices and adapters")
        for part in self.slices:
            _require(part.d_out >= 1 and part.d_in >= 1, f"slice {part.name!a} has an empty shape")
            _require(part.name.isprintable() and part.name != "", f"{part.name!a:.80} is not a slice's name")
        _require(len({s.name for s in self.slices}) == len(self.slices), "two slices have one name")
        self._check_adapters()
        floor, reached = self.error_floor, self.error_reached
        _require((floor is None) == (reached is None), "error_floor and error_reached belong together")
        for error in (floor, reached, self.max_error):
            _require(error is None or (math.isfinite(error) and error >= 0), f"an error of {short(error)}")
        for file, digest in self.files.items():
            _require(bool(_FILE_NAME.fullmatch(file)), f"{short(file)} is not a file of a collection")
            _require(bool(_DIGEST.fullmatch(digest)), f"the digest of {file} is not a SHA-256")
        for file in (BASES_FILE, ERRORS_FILE, scalings_file(0)):
            _require(file in self.files, f"{file} is not listed")
        if not self.revision:
            object.__setattr__(self, "revision", self._digest())

    def _check_adapters(self) -> None:
        names = [a.name for a in self.adapters] + [p.name for p in self.plain]
        for name in names:
            check_adapter_name(name)
        _require(len(set(names)) == len(names), "two adapters have one name")
        # Of all at once, and one by one only to say which it is: there may be a hundred thousand.
        clusters = [a.cluster for a in self.adapters]
        if min(clusters) < 0 or max(clusters) >= self.clusters:
            entry = next(a for a in self.adapters if not 0 <= a.cluster < self.clusters)
            raise JDLoRAError(f"adapter {entry.name} is in cluster {entry.cluster}")
        for p in self.plain:
            self._require_sizes(p.name, (p.rank, p.parameters))
        sizes = [number for a in self.adapters for number in (a.rank, a.parameters)]
        if min(sizes) < 0 or max(sizes) >= _MOST_NUMBERS:
            for a in self.adapters:
                self._require_sizes(a.name, (a.rank, a.parameters))
        for errors in ([a.relative_error for a in self.adapters], [a.output_error or 0.0 for a in self.adapters]):
            if not all(map(math.isfinite, errors)) or min(errors) < 0:
                row = next(i for i, error in enumerate(errors) if not math.isfinite(error) or error < 0)
                raise JDLoRAError(f"adapter {self.adapters[row].name} has the error {errors[row]}")

    def _require_sizes(self, name: str, sizes: tuple[int, ...]) -> None:
        for size in sizes:
            _require(0 <= size < _MOST_NUMBERS, f"adapter {name} has the size {short(size)}")

    def _content(self) -> dict[str, Any]:
        """All but the revision, as JSON says it. ``asdict`` would copy every number."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "revision"}
        lists = {name: as_json(kind, fields[name]) for name, kind in _LISTS.items()}
        calibration = None if self.calibration is None else asdict(self.calibration)
        return fields | lists | {"base_model": asdict(self.base_model), "calibration": calibration}

    def shares_bases_with(self, other: CollectionManifest) -> bool:
        """Whether Σ of either collection mean the same on the bases of the other: equal bases in an equal form."""
        form = ("slices", "rank", "clusters", "method", "dtype", "quantize")
        same_form = all(getattr(self, name) == getattr(other, name) for name in form)
        return same_form and self.files[BASES_FILE] == other.files[BASES_FILE]

    def _digest(self) -> str:
        return _digest_of(json.dumps(self._content(), sort_keys=True))

    def to_json(self) -> str:
        """A line for each field and for each item of a list; its digest can be taken without parsing it.

        Raises:
            JDLoRAError: the content was replaced and ``revision`` was not.
        """
        content = self._content() | {"revision": self.revision}
        lines = (f"{json.dumps(key)}: {_as_lines(content[key])}" for key in sorted(content))
        text = "{\n" + ",\n".join(lines) + "\n}\n"
        _require(self._is_digest_of(text), "the revision does not belong to its content")
        return text

    def _is_digest_of(self, text: str) -> bool:
        """Whether the text, without line breaks and the revision, is what the revision is the digest of.

        Strings in JSON hold neither line breaks nor bare quotation marks, so nothing but layout is taken away.
        """
        text = text.replace(",\n", ", ").replace("\n", "")
        return self.revision == _digest_of(text.replace(f'"revision": "{self.revision}", ', "", 1))

    @classmethod
    def from_json(cls, text: str) -> CollectionManifest:
        """Parse and check; unknown and missing fields are errors.

        Raises:
            JDLoRAError: what is wrong, without the folder's name (the caller knows it).
        """
        try:
            raw = parsed_object(text)
        except ValueError as error:
            raise JDLoRAError(f"not readable as JSON ({error})") from error
        # Before anything else: a later format may well have other fields.
        _require_format(raw.get("format_version"))
        _require(isinstance(raw.get("revision"), str) and raw["revision"], "there is no revision")
        for field, kind in _LISTS.items():
            _require(isinstance(raw.get(field), list), f"{field} must be a list")
            raw[field] = objects_of(kind, raw[field], field)
        raw["base_model"] = object_of(BaseModel, raw.get("base_model"), "base_model")
        if raw.get("calibration") is not None:
            raw["calibration"] = object_of(Calibration, raw["calibration"], "calibration")
        _require(isinstance(raw.get("files"), dict), "files must be an object")
        manifest: CollectionManifest = object_of(cls, raw, "the manifest")
        # Other layouts, as those of older versions, say the same and take a little longer to compare.
        sealed = manifest._is_digest_of(text) or manifest.revision == manifest._digest()
        _require(sealed, "the revision does not belong to its content")
        return manifest


_LISTS: Mapping[str, Any] = {
    "slices": SliceShape,
    "adapters": AdapterEntry,
    "plain": PlainEntry,
    "skipped": SkippedEntry,
}


def _require_format(version: object) -> None:
    _require(version == FORMAT_VERSION, f"format_version is {short(version)}, this program reads {FORMAT_VERSION}")


def scalings_file(shard: int) -> str:
    return f"scalings-{shard:05d}.safetensors"


def _as_lines(value: Any) -> str:
    if not isinstance(value, list) or not value:
        return json.dumps(value, sort_keys=True)
    return "[\n" + ",\n".join(json.dumps(item, sort_keys=True) for item in value) + "\n]"


def _digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise JDLoRAError(problem)
