"""All Σ of a collection distilled, adapter by adapter, into a new collection with the same bases."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vllm_jdlora.adapter import Adapter, read_adapters
from vllm_jdlora.atomic_file import replacing
from vllm_jdlora.calibration import adapter_moments
from vllm_jdlora.calibration_text import of_task
from vllm_jdlora.collection.arrivals import project
from vllm_jdlora.collection.io import TORCH_DTYPES, Collection
from vllm_jdlora.collection.own_metric import MetricOfSlice, own_metric
from vllm_jdlora.collection.rewrite import rewritten
from vllm_jdlora.collection.schema import BASES_FILE
from vllm_jdlora.collection.second_moments import SecondMoments
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.evaluation.distillation import DistillationSettings, Distiller
from vllm_jdlora.evaluation.tasks import read_task
from vllm_jdlora.evaluation.train import load_for_training
from vllm_jdlora.evaluation.training_data import read_examples
from vllm_jdlora.evaluation.variant import Update, uncompressed
from vllm_jdlora.jd.metric import SliceMetric
from vllm_jdlora.jd.problem import Factors, SliceProblem
from vllm_jdlora.jd.slice_fit import METHODS

# Examples of an adapter whose activations Σ is refitted on.
_TEXTS = 48
_Bases = Mapping[str, tuple[Tensor, Tensor]]
_DIVERGENCES = ("before", "after", "refitted")


def distil_collection(
    path: Path,
    output: Path,
    *,
    base_model: Path,
    adapters: Sequence[Path],
    data: Path,
    moments: SecondMoments | None = None,
    settings: DistillationSettings | None = None,
    dtype: str = "bf16",
    force: bool = False,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> list[dict[str, Any]]:
    """Write the collection with distilled Σ; of each adapter its name and divergences: before, of Σ refitted in
    closed form on its own activations, after.

    Finished adapters are kept beside ``output`` (``NAME.distilling.safetensors``): a run that was stopped goes on.

    Raises:
        JDLoRAError: an adapter of the collection is not among ``adapters`` or was changed, data are missing, or the
            collection was fitted in a metric of moments and ``moments`` (its calibration) is not given.
    """
    settings = settings or DistillationSettings()
    collection = Collection.open(path)
    manifest = collection.manifest
    found = {adapter.name: adapter for adapter in read_adapters(adapters)[0]}
    originals = [_original(found, entry.name, entry.sha256) for entry in manifest.adapters]
    metrics = _metric(collection, moments)
    model, tokenizer = load_for_training(base_model, dtype)
    distiller = Distiller(model)
    bases = {part.name: collection.basis(part.name) for part in manifest.slices}
    plain = uncompressed(originals)
    kept = output.absolute().with_name(f"{output.name}.distilling.safetensors")
    done = _kept(kept, manifest.revision, settings)
    stored = TORCH_DTYPES[manifest.dtype]
    asked: list[Adapter] = []
    activations = adapter_moments(base_model, _last_asked(asked, data), dtype=dtype)
    results, rows = [], []
    for row, entry in enumerate(manifest.adapters):
        progress("distil", row, len(manifest.adapters))
        sigma = collection.sigma(row).float()
        if entry.name not in done:
            update = plain.update(entry.name)
            own = {s.name: tuple(side[entry.cluster].float() for side in bases[s.name]) for s in manifest.slices}
            present = {s.name: sigma[i] for i, s in enumerate(manifest.slices) if bool(sigma[i].any())}
            examples = read_examples(read_task(data, entry.name, split="train"), tokenizer, settings.max_tokens)
            used = {n: (u, v) for n, (u, v) in own.items() if n in present}

            def refitted_on_own(row: int = row, update: Update = update, used: _Bases = used) -> dict[str, Tensor]:
                asked[:] = [originals[row]]
                return on_own_activations(update, used, next(activations)[1], manifest.method)

            distilled = distiller.distil(update, used, present, examples, settings, refitted_on_own)
            after = torch.stack([distilled.sigma.get(s.name, sigma[i]) for i, s in enumerate(manifest.slices)])
            refitted = distilled.before if distilled.refitted is None else distilled.refitted
            done[entry.name] = after, distilled.before, distilled.after, refitted
            _keep(kept, manifest.revision, settings, done)
        after, before_kl, after_kl, refitted_kl = done[entry.name]
        rows.append(after.to(stored))
        results.append({"name": entry.name, "before": before_kl, "refitted": refitted_kl, "after": after_kl})
    progress("distil", len(results), len(results))
    activations = iter(())  # the model that it held goes
    sigma = torch.stack(rows)
    cluster = torch.tensor([entry.cluster for entry in manifest.adapters])
    measured = project(collection, originals, cluster=cluster, metrics=metrics, given=sigma)
    entries = [
        replace(
            entry,
            relative_error=float(measured.relative_error[row]),
            output_error=None if measured.output_error is None else float(measured.output_error[row]),
        )
        for row, entry in enumerate(manifest.adapters)
    ]
    with rewritten(collection, output, force=force) as draft:
        draft.keep(BASES_FILE)
        draft.all_scalings(sigma)
        draft.errors(measured.slice_errors, measured.slice_output_errors)
        for plain_entry in manifest.plain:
            draft.keep_plain(plain_entry.name)
        # What these Σ reach is another error than that of the fit.
        uncertified = replace(manifest, error_floor=None, error_reached=None, revision="")
        draft.seal(replace(uncertified, adapters=tuple(entries), files=draft.files, revision=""))
    kept.unlink(missing_ok=True)
    return results


def on_own_activations(update: Update, bases: _Bases, moments: SecondMoments, method: str) -> dict[str, Tensor]:
    """Σ of least output error on the adapter's own activations: (UᵀU)⁻¹Uᵀ ΔW C_i Vᵀ (V C_i Vᵀ)⁻¹ for each slice.

    The bases were fitted to all adapters' inputs (or none); Σ costs nothing to fit to one adapter's own.
    """
    refit = METHODS[method].refit
    found = {}
    for name, (u, v) in bases.items():
        metric = SliceMetric.of(moments.of(name), name)
        problem = metric.applied_to(SliceProblem.from_factors([Factors(*update[name])], name))
        found[name] = refit(problem, u, metric.whitened(v.double()))[0][0].float()
    return found


def _last_asked(asked: Sequence[Adapter], data: Path) -> Iterator[tuple[Adapter, list[str]]]:
    """For `adapter_moments`, which loads the model once: whoever is asked for when it takes the next one."""
    while True:
        yield asked[-1], _own_texts(data, asked[-1].name)


def _own_texts(data: Path, name: str) -> list[str]:
    items = read_task(data, name, split="train", limit=_TEXTS).items
    return [of_task(item.instruction, item.input, item.output, chat=True) for item in items]


def _original(found: dict[str, Adapter], name: str, sha256: str) -> Adapter:
    if name not in found or found[name].sha256 != sha256:
        problem = "was changed since it was compressed" if name in found else "is not among the adapters given"
        raise JDLoRAError(f"adapter {name} {problem}: distillation needs the uncompressed adapters")
    return found[name]


def _metric(collection: Collection, moments: SecondMoments | None) -> MetricOfSlice | None:
    manifest = collection.manifest
    if manifest.metric == "frobenius":
        return None
    if moments is None:
        raise JDLoRAError(f"{collection.path}: states output errors; give its calibration as --moments to renew them")
    return own_metric(collection, moments, manifest.slices)


_Done = dict[str, tuple[Tensor, float, float, float]]
"""Adapter → Σ, divergences before and after, and of Σ refitted on own activations."""


def _keep(file: Path, revision: str, settings: DistillationSettings, done: _Done) -> None:
    tensors = {name: after.contiguous() for name, (after, *_) in done.items()}
    facts = {"recipe": f"{revision} {settings}"}
    facts |= {f"{key} {name}": str(done[name][i]) for name in done for i, key in enumerate(_DIVERGENCES, 1)}
    with replacing(file) as new:
        save_file(tensors, new, metadata=facts)


def _kept(file: Path, revision: str, settings: DistillationSettings) -> _Done:
    """Adapters that an earlier run with the same collection and settings has finished."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors:
            facts = tensors.metadata() or {}
        if facts.get("recipe") != f"{revision} {settings}":
            return {}
        found = load_file(file)
    except (OSError, SafetensorError):
        return {}
    before, after, refitted = ({n: float(facts[f"{key} {n}"]) for n in found} for key in _DIVERGENCES)
    return {n: (t, before[n], after[n], refitted[n]) for n, t in found.items()}
