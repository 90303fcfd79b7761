"""From serving options to vLLM's engine arguments: LoRA sizes, wrapped modules, worker and scheduler."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch

from vllm_jdlora.adapter import Adapter, file_digest, read_adapter
from vllm_jdlora.collection import Collection
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.serving import touchpoints
from vllm_jdlora.serving.event_log import event
from vllm_jdlora.serving.options import (
    ServingOptions,
    absolute,
    buffer_rank,
    resolve_scaling_slots,
)
from vllm_jdlora.serving.starting_collection import check_meanwhile, open_once

logger = logging.getLogger("vllm.jdlora")

WORKER = "vllm_jdlora.serving.worker.JDWorker"
SCHEDULER = "vllm_jdlora.serving.scheduler.jd_scheduler"

_REFUSED = {
    "enable_sleep_mode": "sleep level 2 keeps registered weights only, and bases and scalings are not among them",
    "specialize_active_lora": "graphs are keyed by bases, which are always all there",
    "enable_tower_connector_lora": "compressed adapters change the language model only",
    "enable_mixed_moe_lora_format": "expert layers cannot be compressed yet",
    "enable_moe_shared_loras": "expert layers cannot be compressed yet",
    "default_mm_loras": "adapters by modality are not compressed yet",
    "max_lora_cls_labels": "classification heads are not compressed",
}


def apply_to_engine_args(engine_args: Any, *, names_follow: bool = False) -> None:
    """Set what compressed serving needs on vLLM's ``EngineArgs``; applying twice changes nothing more.

    Args:
        engine_args: vLLM's.
        names_follow: this process is an API server, which enters the collection's names once its engine is there, and
            waits then for the check of the content that is only begun here.

    Raises:
        JDLoRAError: the options do not fit together or the collection does not fit them.
    """
    options = ServingOptions.from_additional_config(engine_args.additional_config)
    if options is None:
        return
    touchpoints.check("frontend")
    _refuse_conflicts(engine_args)
    first_time = options.plain_slots is None
    collection = _opened(engine_args, options, names_follow)
    manifest = collection.manifest
    _refuse_errors_above_limit(collection, options.max_error)
    _refuse_8_bits_where_there_are_none(collection, options.base_bits)
    _warn_of_another_base_model(collection, engine_args.model)
    plain_slots = options.plain_slots or engine_args.max_loras
    needed = buffer_rank(max([manifest.rank, *(p.rank for p in manifest.plain)]))
    rank = max(needed, buffer_rank(engine_args.max_lora_rank))
    numbers = rank if manifest.method == "diag" else rank**2
    scaling_bytes = len(manifest.slices) * numbers * torch.finfo(torch.float32).bits // 8
    if first_time:
        _log(collection)
        if needed < rank:
            logger.info(
                "the bases, of rank %d, lie in buffers of rank %d: --max-lora-rank %d makes them smaller and faster, "
                "unless adapters of a higher rank will be loaded",
                manifest.rank,
                rank,
                needed,
            )
    options = dataclasses.replace(
        options,
        collection=absolute(options.collection),
        revision=manifest.revision,
        plain_slots=plain_slots,
        scaling_slots=resolve_scaling_slots(options.scaling_slots, len(manifest.adapters), scaling_bytes),
        base_slots=options.base_slots or manifest.clusters,
        base_bits=options.base_bits or (8 if manifest.quantize != "none" and _on_cpu() else 16),
    )
    engine_args.enable_lora = True
    engine_args.max_lora_rank = rank
    engine_args.lora_target_modules = _target_modules(collection, engine_args.lora_target_modules)
    engine_args.worker_cls = WORKER
    engine_args.scheduler_cls = SCHEDULER
    engine_args.additional_config = options.put_into(engine_args.additional_config)


def lift_adapter_limit(config: Any) -> None:
    """Let vLLM's own limit of adapters in a batch, which counts all kinds alike, never bind: ours do.

    It is a part of vLLM's key of compiled code, so it must not follow the collection either.
    """
    lora = config.lora_config
    lora.max_loras = config.scheduler_config.max_num_seqs
    lora.max_cpu_loras = max(lora.max_cpu_loras or 0, lora.max_loras)


def restore_compilation(config: Any) -> None:
    """Compile the model on CPU as vLLM does without LoRA.

    vLLM's CPU platform prepares compilation and then turns it off because its LoRA layers cannot be traced. Ours
    reach their kernel through one opaque operator, and all else of the preparation is still in place.
    """
    from vllm.config import CompilationMode
    from vllm.platforms import current_platform

    compilation = config.compilation_config
    prepared = "cpp.dynamic_threads" in compilation.inductor_compile_config
    if current_platform.is_cpu() and prepared and compilation.mode == CompilationMode.NONE:
        compilation.mode = CompilationMode.DYNAMO_TRACE_ONCE


def _opened(engine_args: Any, options: ServingOptions, names_follow: bool) -> Collection:
    """The collection, its content checked where nobody else does."""
    path = absolute(options.collection)
    one_of_many = engine_args._api_process_count > 1 and engine_args._api_process_rank >= 0
    if options.plain_slots is not None or one_of_many:  # checked before, by this process or by that which started it
        return open_once(path)
    if not names_follow:
        return Collection.open(path, verify=True)
    check_meanwhile(path)
    return open_once(path)


def _log(collection: Collection) -> None:
    manifest = collection.manifest
    fields = {name: getattr(manifest, name) for name in ("revision", "method", "rank", "clusters", "quantize")}
    event(
        "collection",
        path=collection.path,
        **fields,
        adapters=len(manifest.adapters),
        plain=len(manifest.plain),
    )


def _refuse_conflicts(engine_args: Any) -> None:
    for field, reason in _REFUSED.items():
        if getattr(engine_args, field, None):
            raise JDLoRAError(f"--{field.replace('_', '-')} cannot be used with --lora-compression jd: {reason}")
    if engine_args.pipeline_parallel_size > 1:
        raise JDLoRAError(
            "--pipeline-parallel-size above 1 cannot be used with --lora-compression jd yet: use tensor parallelism"
        )
    if engine_args.worker_cls not in ("auto", WORKER):
        raise JDLoRAError(
            f"--worker-cls {engine_args.worker_cls} cannot be used with --lora-compression jd, which needs its own"
        )
    if engine_args.scheduler_cls not in (None, SCHEDULER):
        raise JDLoRAError(
            f"--scheduler-cls {engine_args.scheduler_cls} cannot be used with --lora-compression jd, "
            "which needs its own"
        )
    if engine_args.fully_sharded_loras:
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            raise JDLoRAError("--fully-sharded-loras cannot be used with --lora-compression jd on CPU")


def _warn_of_another_base_model(collection: Collection, model: str) -> None:
    """Sizes are compared when the model is loaded; another config of the same sizes may be a mistake or a rename."""
    made_for = collection.manifest.base_model
    config = Path(model) / "config.json"
    if made_for.fingerprint and config.is_file() and file_digest(config) != made_for.fingerprint:
        logger.warning(
            "%s was made for base model %s, whose config.json differs from %s: check that the adapters belong to it",
            collection.path,
            made_for.name,
            config,
        )


def _refuse_errors_above_limit(collection: Collection, max_error: float | None) -> None:
    if max_error is None:
        return
    above = [a for a in collection.manifest.adapters if a.relative_error > max_error]
    if above:
        worst = max(above, key=lambda a: a.relative_error)
        raise JDLoRAError(
            f"{len(above)} adapters of {collection.path} have a relative error above --jd-max-error {max_error:g}, the "
            f"worst {worst.name} with {worst.relative_error:.3f}, and the collection holds no uncompressed copy of "
            f"them: build it with `jdlora compress --max-error {max_error:g}`, which keeps such adapters plain"
        )


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _refuse_8_bits_where_there_are_none(collection: Collection, base_bits: int | None) -> None:
    if base_bits == 8 and collection.manifest.quantize == "none":
        raise JDLoRAError(
            f"--jd-base-bits 8 needs a collection with bases of 8 bits, and those of {collection.path} are "
            f"{collection.manifest.dtype}: compress with --quantize int8 or fp8"
        )


def _target_modules(collection: Collection, asked: list[str] | None) -> list[str]:
    """Suffixes of all modules to wrap: the collection's, its plain adapters' and those that the user asked for.

    Every wrapped module costs a call in every step, so nothing else is wrapped, nor are the logits.
    """
    targets = {s.name.rpartition(".")[2] for s in collection.manifest.slices} | set(asked or ())
    for plain in collection.manifest.plain:
        targets |= targets_of_plain(read_adapter(collection.plain_path(plain.name), plain.name))
    return sorted(targets)


def targets_of_plain(adapter: Adapter) -> set[str]:
    """Suffixes of the modules that an uncompressed adapter changes.

    Raises:
        JDLoRAError: it changes experts, embeddings or heads, whose layers are not served.
    """
    if adapter.plain_only:
        raise JDLoRAError(
            f"adapter {adapter.name!r} cannot be served: it has {adapter.plain_only}, and beside compressed adapters "
            "only linear layers carry LoRA. Leave it out (`jdlora remove` takes it out of a collection), or train it "
            "on attention and dense layers alone"
        )
    return {name.rpartition(".")[2] for name in adapter.slices}
