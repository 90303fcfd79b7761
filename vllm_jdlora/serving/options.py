"""The serving options, their checks, and how they travel: ``additional_config["jdlora"]`` of vLLM's config.

The flags of ``vllm serve`` and the dictionary of ``LLM(additional_config={"jdlora": {...}})`` carry the same
settings; both become one :class:`ServingOptions`, checked once, here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_jdlora.errors import JDLoRAError

if TYPE_CHECKING:
    from vllm_jdlora.collection import Collection

CONFIG_KEY = "jdlora"
"""Where the options live in vLLM's ``additional_config``."""

IN_PYTHON = "JDLORA_PYTHON_OPERATOR"
"""Variable of the environment that has Python call each layer's kernel on CPU, where a profiler can look at it."""

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The widths that vLLM's LoRA buffers can have (``vllm.config.lora.MaxLoRARanks``)."""

SCALING_BYTES = 2 << 30
"""Device memory that Σ slots take at most, in fp32, when ``--jd-scaling-slots`` is not given."""

AGE_CAP = 2.0
"""Seconds that a request waits for a slot at most while younger ones take it."""

PATH_SCHEME = "jd://"


@dataclass(frozen=True)
class ServingOptions:
    """What a worker needs to know.

    Attributes:
        collection: absolute path of the compressed collection.
        revision: the collection's digest; empty until resolved. A worker that finds another one refuses to start.
        scaling_slots: Σ resident on the device, at least 1; ``None`` until resolved, then all that fit.
        plain_slots: slots for uncompressed adapters in one batch; ``None`` until resolved from ``--max-loras``.
        max_error: an adapter whose relative error is above it must not be served compressed.
        base_bits: of a number of the bases on the device: 16 (32 for a model in fp32), or 8 as a quantised collection
            stores them; ``None`` until resolved, then 8 on CPU where they are stored so, else 16.
        base_slots: clusters whose bases are resident on the device, which bounds the clusters of one batch; more than
            there are is room for other bases to come; ``None`` until resolved, then all.
        arrivals: absolute folder of adapters that came while the server ran, see :mod:`.arrivals`; empty until
            resolved.
        age_cap: seconds after which a request that waits for a slot gets the next one, see :mod:`.admission`.
        cluster_order: where base slots are scarce, requests whose cluster's bases are on the device go first, see
            :mod:`.cluster_order`.
    """

    collection: str
    revision: str = ""
    scaling_slots: int | None = None
    plain_slots: int | None = None
    max_error: float | None = None
    base_bits: int | None = None
    base_slots: int | None = None
    arrivals: str = ""
    age_cap: float = AGE_CAP
    cluster_order: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.collection, str) or not self.collection:
            raise JDLoRAError(f"additional_config.{CONFIG_KEY}.collection must be the path of a collection folder")
        for name in ("scaling_slots", "plain_slots", "base_slots"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise JDLoRAError(f"{name} must be a whole number of at least 1, not {value!r}")
        if self.max_error is not None and not 0 <= float(self.max_error) <= 1:
            raise JDLoRAError(f"max_error is a relative error between 0 and 1, not {self.max_error!r}")
        if self.base_bits not in (None, 8, 16):
            raise JDLoRAError(f"base_bits is 8 or 16, not {self.base_bits!r}")
        if not isinstance(self.age_cap, (int, float)) or isinstance(self.age_cap, bool) or not self.age_cap >= 0:
            raise JDLoRAError(f"age_cap is a number of seconds from 0, not {self.age_cap!r}")
        if not isinstance(self.cluster_order, bool):
            raise JDLoRAError(f"cluster_order is true or false, not {self.cluster_order!r}")

    @classmethod
    def from_additional_config(cls, additional_config: Any) -> ServingOptions | None:
        """The options inside vLLM's ``additional_config``, or ``None`` where compression was not asked for."""
        if not isinstance(additional_config, Mapping) or CONFIG_KEY not in additional_config:
            return None
        values = additional_config[CONFIG_KEY]
        if not isinstance(values, Mapping):
            raise JDLoRAError(f"additional_config.{CONFIG_KEY} must be a dictionary, not {type(values).__name__}")
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise JDLoRAError(
                f"additional_config.{CONFIG_KEY} does not know {', '.join(unknown)}; "
                f"it takes {', '.join(sorted(known))}"
            )
        if "collection" not in values:
            raise JDLoRAError(f"additional_config.{CONFIG_KEY} needs `collection`, the path of a collection folder")
        return cls(**values)

    def put_into(self, additional_config: Any) -> dict[str, Any]:
        """A copy of ``additional_config`` that carries these options; JSON values only, as vLLM hashes them."""
        return {**(additional_config or {}), CONFIG_KEY: asdict(self)}


@dataclass(frozen=True)
class AdapterPath:
    """The ``lora_path`` of a compressed adapter: ``jd://REVISION:CLUSTER#NAME`` or ``jd://REVISION+DIGEST:CLUSTER#NAME``.

    vLLM keys its prefix cache by name and path, so the path names the adapter's content: blocks computed with one
    revision, or with one arrival, are never reused for another. It also says all that a scheduler must know.

    Attributes:
        revision: of the collection whose bases serve the adapter.
        cluster: whose bases those are.
        name: of the adapter.
        arrival: digest of the file with its Σ in the arrivals folder; empty for an adapter of the collection itself.
    """

    revision: str
    cluster: int
    name: str
    arrival: str = ""

    def __str__(self) -> str:
        arrival = f"+{self.arrival}" if self.arrival else ""
        return f"{PATH_SCHEME}{self.revision}{arrival}:{self.cluster}#{self.name}"

    @classmethod
    def parse(cls, path: str) -> AdapterPath | None:
        """``None`` for the path of a plain adapter.

        Raises:
            JDLoRAError: the path has the scheme and not the form.
        """
        if not path.startswith(PATH_SCHEME):
            return None
        found = _ADAPTER_PATH.fullmatch(path, len(PATH_SCHEME))
        if found is None:
            raise JDLoRAError(f"{path!r} is not the path of a compressed adapter: it is made by this package only")
        return cls(found["revision"], int(found["cluster"]), found["name"], found["arrival"] or "")


_ADAPTER_PATH = re.compile(
    r"(?P<revision>[0-9a-z]+)(?:\+(?P<arrival>[0-9a-f]+))?:(?P<cluster>[0-9]+)#(?P<name>.*)", re.DOTALL
)


def adapter_paths(collection: Collection) -> list[tuple[str, str]]:
    """(name, ``lora_path``) of every adapter of a collection, the compressed ones first."""
    manifest = collection.manifest
    compressed = [(a.name, str(AdapterPath(manifest.revision, a.cluster, a.name))) for a in manifest.adapters]
    return compressed + [(p.name, str(collection.plain_path(p.name))) for p in manifest.plain]


def buffer_rank(rank: int) -> int:
    """The smallest LoRA buffer width of vLLM that holds ``rank``."""
    for width in LORA_RANKS:
        if width >= rank:
            return width
    raise JDLoRAError(f"rank {rank} is above {LORA_RANKS[-1]}, the widest LoRA buffer that vLLM has")


def resolve_scaling_slots(asked: int | None, adapters: int, bytes_per_adapter: int) -> int:
    """How many Σ are resident: what was asked for (more than there are adapters leaves room for others to come), else
    all that fit."""
    if asked is not None:
        return asked
    return max(1, min(adapters, SCALING_BYTES // max(1, bytes_per_adapter)))


def absolute(path: str) -> str:
    """The path without links and ``~``.

    Raises:
        JDLoRAError: it can be no path, or names a home that is none.
    """
    try:
        return str(Path(path).expanduser().resolve())
    except (OSError, ValueError, RuntimeError) as error:
        raise JDLoRAError(f"{path[:200]!a} is not a path that can be used: {error}") from error
