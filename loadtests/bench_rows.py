"""The rows of the throughput table: what each engine is, and what it needs to be started."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from bench_engine import EngineSpec
from synthetic_collections import ATTENTION, LINEAR, write_adapters, write_collection

from vllm_jdlora.adapter import read_adapters
from vllm_jdlora.collection import Collection
from vllm_jdlora.collection.build import compress
from vllm_jdlora.serving.options import adapter_paths

RANK = 16
MAX_TOKENS = 2048
TARGETS = {"attention": ATTENTION, "linear": LINEAR}


@dataclass(frozen=True)
class Row:
    """One engine.

    Attributes:
        key: its name in ratios.
        title: what it is.
        kind: ``base``; ``stock`` (vLLM's own multi-LoRA); ``plain`` (uncompressed adapters through this package's
            kernels); ``compressed``.
        targets: the linear modules that adapters change, ``attention`` (q, k, v) or ``linear`` (all seven); the base
            has none and belongs to both.
        adapters: how many its requests choose from.
        clusters: of the collection.
        slots: LoRA slots of a stock server: distinct adapters in one batch.
        synthetic: random adapters instead of the demo's.
        told: a stock server is told which modules its adapters change. By default it is not, and computes zeros for
            every linear module and the logits.
        eager: the base, not compiled. (vLLM does not compile on CPU when LoRA is on; this package turns it on again.)
        quantize: how a synthetic collection stores its bases.
    """

    key: str
    title: str
    kind: str
    targets: str | None = None
    adapters: int = 0
    clusters: int | None = None
    slots: int | None = None
    synthetic: bool = True
    told: bool = True
    eager: bool = False
    quantize: str = "none"

    @property
    def slow(self) -> bool:
        """So slow that it takes part in few rounds."""
        return self.kind == "stock"


ROWS = (
    Row("a", "base without LoRA", "base", synthetic=False),
    Row("a-eager", "base without LoRA, not compiled", "base", synthetic=False, eager=True),
    Row("c8", "stock vLLM told its targets, 8 adapters", "stock", "attention", 8, slots=8, synthetic=False),
    Row("c8-default", "stock vLLM, 8 adapters", "stock", "attention", 8, slots=8, synthetic=False, told=False),
    Row("c64", "stock vLLM told, 64 adapters, 8 slots", "stock", "attention", 64, slots=8),
    Row("p32", "uncompressed, our kernel, 32 adapters", "plain", "attention", 32),
    Row("d8", "compressed, 8 adapters, 8 clusters", "compressed", "attention", 8, clusters=8, synthetic=False),
    Row("d1000", "compressed, 1,000 adapters, 8 clusters", "compressed", "attention", 1000, clusters=8),
    Row(
        "d1000-k128",
        "compressed, 1,000 adapters, 128 clusters",
        "compressed",
        "attention",
        1000,
        clusters=128,
    ),
    Row("s-c8", "stock vLLM, 8 adapters", "stock", "linear", 8, slots=8),
    Row("s-p32", "uncompressed, our kernel, 32 adapters", "plain", "linear", 32),
    Row("s-d1000", "compressed, 1,000 adapters, 8 clusters", "compressed", "linear", 1000, clusters=8),
    Row(
        "s-d1000-8bit",
        "compressed, 1,000 adapters, 8 clusters in int8",
        "compressed",
        "linear",
        1000,
        clusters=8,
        quantize="int8",
    ),
)


def groups_of(rows: list[Row], ratios: Iterable[str]) -> list[list[Row]]:
    """The rows that are measured at once, so that each of `ratios` is within a group and few engines share the memory.

    Rows of equal targets run beside the base; the slow ones, and the base that is not compiled, run apart from them,
    with the rows that a ratio compares them with.
    """
    pairs = [set(ratio.split("/")) for ratio in ratios]
    base = [row for row in rows if row.kind == "base" and not row.eager]
    groups = []
    for targets in TARGETS:
        fast = [row for row in rows if row.targets == targets and not row.slow]
        slow = [row for row in rows if row.targets == targets and row.slow]
        partners = {key for row in slow for pair in pairs if row.key in pair for key in pair}
        groups += [fast, [*slow, *(row for row in fast if row.key in partners)] if slow else []]
    groups = [[*base, *group] for group in groups if group] or [base]
    # Compared with the other base alone.
    groups[-1] = [*groups[-1], *(row for row in rows if row.eager)]
    return groups


def engine_options(dtype: str, batch: int, *, eager: bool = False) -> dict[str, Any]:
    """Arguments of ``vllm.LLM`` that all engines share."""
    return {
        "dtype": dtype,
        "max_model_len": MAX_TOKENS,
        "max_num_seqs": batch,
        "max_num_batched_tokens": MAX_TOKENS,
        "kv_cache_memory_bytes": 256 << 20,
        "enforce_eager": eager,
    }


def jd_options(collection: Collection, options: dict[str, Any]) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """Adapters and arguments of an engine that serves `collection`."""
    return adapter_paths(collection), {**options, "additional_config": {"jdlora": {"collection": str(collection.path)}}}


@dataclass(frozen=True)
class Workplace:
    """Where the adapters of the rows come from, and a scratch folder for those that are made.

    Attributes:
        scratch: an empty folder.
        model: the base model's.
        demo_adapters: PEFT folders of it for the rows that are not synthetic.
    """

    scratch: Path
    model: Path
    demo_adapters: Path
    dtype: str
    batch: int

    def engine(self, row: Row) -> tuple[EngineSpec, Row]:
        """The row's engine, and the row as it turned out: clusters can be fewer than asked for."""
        options = engine_options(self.dtype, self.batch, eager=row.eager)
        adapters: list[tuple[str, str]] = []
        if row.kind == "stock":
            adapters = self._plain(row)
            options |= {
                "enable_lora": True,
                "max_loras": row.slots,
                "max_cpu_loras": row.adapters,
                "max_lora_rank": RANK,
            }
            if row.told:
                options["lora_target_modules"] = list(TARGETS[row.targets or ""])
        elif row.kind == "plain":
            # A collection of one adapter that no request names: what is measured has nothing compressed in it.
            collection = self._collection(replace(row, key=f"{row.key}-unused", adapters=1, clusters=1))
            adapters, options = self._plain(row), jd_options(collection, options)[1] | {"max_loras": row.adapters}
        elif row.kind == "compressed":
            collection = self._collection(row)
            row = replace(row, adapters=len(collection.manifest.adapters), clusters=collection.manifest.clusters)
            adapters, options = jd_options(collection, options)
        return EngineSpec(row.key, str(self.model), adapters, options), row

    def _plain(self, row: Row) -> list[tuple[str, str]]:
        if not row.synthetic:
            folders = [adapter.path for adapter in self._demo[: row.adapters]]
        else:
            targets = TARGETS[row.targets or ""]
            folders = write_adapters(self.scratch / row.key, self.model, targets, adapters=row.adapters, rank=RANK)
        return [(folder.name, str(folder)) for folder in folders]

    def _collection(self, row: Row) -> Collection:
        assert row.clusters is not None and row.targets is not None
        output = self.scratch / f"collection-{row.key}"
        if row.synthetic:
            targets = TARGETS[row.targets]
            return write_collection(
                output,
                self.model,
                targets,
                adapters=row.adapters,
                clusters=row.clusters,
                rank=RANK,
                quantize=row.quantize,
            )
        return compress(self._demo[: row.adapters], output, rank=RANK, clusters=row.clusters)

    @cached_property
    def _demo(self) -> list[Any]:
        return read_adapters([self.demo_adapters])[0]
