"""One compression: its options, what is fitted at which size, which adapters stay plain, and the manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version

import torch

from vllm_jdlora.adapter import Adapter, SliceShape
from vllm_jdlora.collection.activation import calibration_of, metric_of
from vllm_jdlora.collection.io import TORCH_DTYPES
from vllm_jdlora.collection.quantize import cast_of
from vllm_jdlora.collection.schema import (
    METRIC_ERRORS,
    AdapterEntry,
    BaseModel,
    CollectionManifest,
    PlainEntry,
    SkippedEntry,
)
from vllm_jdlora.collection.second_moments import SecondMoments
from vllm_jdlora.collection.source import AdapterSource, common_slices, sizes_of
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.jd.budget import Choice, Sizes, choose_for_error
from vllm_jdlora.jd.byte_choice import cheapest_loss
from vllm_jdlora.jd.certificate import certify_clusters
from vllm_jdlora.jd.clustering import CollectionFit, check_settings, fit_collection, probe_positions, weighted_slices
from vllm_jdlora.jd.error_curves import curves_of
from vllm_jdlora.jd.paper_preset import paper_rule
from vllm_jdlora.jd.passes import FitStore, MetricOf, Slices
from vllm_jdlora.jd.search import single_member_clusters
from vllm_jdlora.jd.slice_fit import ScalingOverflow, SliceRecipe

Progress = Callable[[str, int, int], None]
ByteLimit = Callable[[int], int]
"""Bytes of all adapters uncompressed → bytes that the collection may take."""
_RECIPE = 5
"""Raised when the same adapters and options would be fitted in another way: half-done work of before is not used."""


@dataclass(frozen=True)
class Options:
    """As the arguments of `compress`; of a `Job`, with the method that was chosen."""

    rank: int | None
    clusters: int | None
    method: str
    moments: SecondMoments | None
    max_error: float | None
    max_bytes: ByteLimit | None
    dtype: str
    quantize: str
    seed: int
    effort: float

    @property
    def methods(self) -> Sequence[str]:
        """To choose from; the first is taken where there is no choice by measured errors."""
        return ("full", "diag") if self.method == "auto" else (self.method,)

    @property
    def metric(self) -> str:
        """Of the fit, by the moments."""
        return "frobenius" if self.moments is None else self.moments.metric


@dataclass(frozen=True)
class KeptPlain:
    """An adapter that is stored uncompressed, and why; with the relative error it would have had, if fitted."""

    adapter: Adapter
    reason: str
    error: float | None = None


@dataclass(frozen=True)
class Job:
    """What is fitted: adapters, slices, rank R and K clusters; and the adapters that are plain before any fit."""

    adapters: Sequence[Adapter]
    slices: Sequence[SliceShape]
    rank: int
    clusters: int
    plain: Sequence[KeptPlain]
    base: BaseModel
    options: Options
    known: Slices | None = None  # `weighted_slices` of these adapters, where the choice has read them

    @cached_property
    def weighted(self) -> Slices:
        """The slices as the fit weighs them, read once for all that ask."""
        return self.known or weighted_slices(self.source, self.metrics, self.options.seed)

    @property
    def source(self) -> AdapterSource:
        return AdapterSource(self.adapters, self.slices)

    @property
    def metrics(self) -> MetricOf | None:
        moments = self.options.moments
        return None if moments is None else metric_of(moments, self.slices)

    def digest(self) -> str:
        """What the fit depends on: work under another digest is not gone on with. (Not `max_error`, nor the plain.)"""
        options = self.options
        recipe = {
            "recipe": _RECIPE,
            "versions": [version("vllm-jdlora"), torch.__version__],
            "adapters": [(a.name, a.sha256) for a in self.adapters],
            "slices": [asdict(part) for part in self.slices],
            "size": [self.rank, self.clusters],
            "options": [options.method, options.dtype, options.quantize, options.seed, options.effort],
            "metric": options.metric,
            "calibration": None if options.moments is None else asdict(options.moments.origin),
        }
        return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()

    def fit(self, store: FitStore, report: Progress) -> CollectionFit:
        options = self.options
        storage = TORCH_DTYPES[options.dtype]
        recipe = SliceRecipe(
            rank=self.rank, method=options.method, cast=cast_of(options.quantize, storage), sigma_dtype=storage
        )
        try:
            return fit_collection(
                self.source,
                recipe,
                clusters=self.clusters,
                seed=options.seed,
                effort=options.effort,
                metric_of=self.metrics,
                store=store,
                slices=self.weighted,
                progress=report,
            )
        except ScalingOverflow as error:
            path = self.adapters[error.adapter].path
            raise JDLoRAError(
                f"{path}: its scaling matrices do not fit into {options.dtype}: give --dtype bf16"
            ) from error

    def sorted_out(self, fit: CollectionFit) -> tuple[list[int], list[KeptPlain]]:
        """Positions of the adapters that stay compressed, and those that are better kept plain."""
        limit = self.options.max_error
        relative, output = _errors(fit)
        judged, kind = relative if output is None else output, METRIC_ERRORS[self.options.metric]
        sizes = _sizes(self.adapters, self.slices, self.options)
        alone = _alone(fit.cluster, self.clusters, self.adapters, sizes.total(1, self.rank) - sizes.total(0, self.rank))
        kept, plain = [], []
        for i, adapter in enumerate(self.adapters):
            if limit is not None and judged[i] > limit:
                plain.append(KeptPlain(adapter, f"{kind} {judged[i]:.3f} is above {limit:g}", float(relative[i])))
            elif i in alone:
                reason = f"alone in its cluster: bases of rank {self.rank} take as many bytes as the adapter itself"
                plain.append(KeptPlain(adapter, reason, float(relative[i])))
            else:
                kept.append(i)
        if not kept:
            raise JDLoRAError(
                f"every adapter has {'an' if kind[0] == 'o' else 'a'} {kind} above {limit or 0:g} (the best "
                f"{judged.min():.3f}): give more rank or clusters, or allow more error"
            )
        return kept, plain

    def manifest(
        self,
        fit: CollectionFit,
        kept: Sequence[int],
        used: torch.Tensor,
        plain: Sequence[KeptPlain],
        files: dict[str, str],
        skipped: Sequence[tuple[str, str]],
    ) -> CollectionManifest:
        options = self.options
        relative, output = _errors(fit)
        floor, reached = self._certified(fit)
        entries = [
            adapter_entry(
                self.adapters[i],
                int(torch.searchsorted(used, fit.cluster[i])),
                float(relative[i]),
                None if output is None else float(output[i]),
            )
            for i in kept
        ]
        return CollectionManifest(
            base_model=self.base,
            method=options.method,
            rank=self.rank,
            clusters=len(used),
            metric=options.metric,
            dtype=options.dtype,
            seed=options.seed,
            slices=tuple(self.slices),
            adapters=tuple(entries),
            plain=tuple(
                PlainEntry(p.adapter.name, p.reason, p.adapter.rank, p.adapter.parameters, p.adapter.sha256, p.error)
                for p in plain
            ),
            skipped=tuple(SkippedEntry(name, reason) for name, reason in skipped),
            files=files,
            calibration=None if options.moments is None else calibration_of(options.moments),
            quantize=options.quantize,
            max_error=options.max_error,
            error_floor=floor,
            error_reached=reached,
        )

    def _certified(self, fit: CollectionFit) -> tuple[float | None, float | None]:
        """(floor, reached) root mean squares on the probe slices; None where these are too large for a certificate."""
        if self.options.method != "full":
            return None, None
        slices = self.weighted
        positions = probe_positions(len(slices), self.options.seed)
        bounds = certify_clusters((slices[index] for index in positions), fit.cluster, self.rank)
        if bounds is None:
            return None, None
        parts = [fit.slice(index) for index in positions]
        reached = sum(float((part.importance(slices.energies) * part.relative()).sum()) for part in parts)
        return bounds.relative[0], (reached / max(bounds.weight, 1.0)) ** 0.5


def job_for(fitted: list[Adapter], plain: list[KeptPlain], base: BaseModel, options: Options, report: Progress) -> Job:
    """Rank and clusters as they were given, by a budget, or by the paper's rule."""
    slices = common_slices(fitted)
    if options.moments is not None:
        options.moments.check_fit(slices, base.fingerprint)
    rank, clusters = options.rank, options.clusters
    known: Slices | None = None
    budget = options.max_error is not None or options.max_bytes is not None
    if rank is None and clusters is None and budget:
        uncompressed = sum(2 * p.adapter.parameters for p in plain)
        metrics = None if options.moments is None else metric_of(options.moments, slices)
        known = weighted_slices(AdapterSource(fitted, slices), metrics, options.seed)
        choice = _within_budget(known, _sizes(fitted, slices, options, uncompressed), options, report)
        rank, clusters, options = choice.rank, choice.clusters, replace(options, method=choice.method)
        reason = f"predicted to be above the error of {options.max_error or 0:g}"
        known = None if choice.plain else known
        plain = [*plain, *(KeptPlain(fitted[i], reason) for i in choice.plain)]
        fitted = [a for i, a in enumerate(fitted) if i not in choice.plain]
        slices = common_slices(fitted)
    auto_rank, auto_clusters = paper_rule(len(fitted))
    job = Job(
        adapters=fitted,
        slices=slices,
        rank=auto_rank if rank is None else rank,
        clusters=min(auto_clusters, len(fitted)) if clusters is None else clusters,
        plain=plain,
        base=base,
        options=replace(options, method=options.methods[0]),
        known=known,
    )
    check_settings(job.source, job.clusters)
    return job


def _within_budget(slices: Slices, sizes: Sizes, options: Options, report: Progress) -> Choice:
    limit = None if options.max_bytes is None else options.max_bytes(sizes.uncompressed)
    if options.max_error is None:
        both = {method: replace(sizes, diagonal=method == "diag") for method in options.methods}
        return cheapest_loss(slices, both, limit or 0, seed=options.seed, progress=report)
    curves = curves_of(slices, method=options.methods[0], seed=options.seed, progress=report)
    choice = choose_for_error(curves, sizes, options.max_error)
    if limit is not None and choice.bytes > limit:
        raise JDLoRAError(
            f"the error that is asked for takes {choice.bytes} bytes, more than the {limit} allowed: give up one of "
            "--max-error and --max-bytes"
        )
    return choice


def _sizes(adapters: Sequence[Adapter], slices: Sequence[SliceShape], options: Options, always_plain: int = 0) -> Sizes:
    return sizes_of(
        adapters,
        slices,
        dtype_width=TORCH_DTYPES[options.dtype].itemsize,
        quantize=options.quantize,
        diagonal=options.method == "diag",
        always_plain=always_plain,
    )


def _errors(fit: CollectionFit) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[n] relative errors (not squared) over all slices, and output errors where there is a metric."""
    relative = _relative(fit.squared_error, fit.squared_norm)
    if fit.output_error is None or fit.output_norm is None:
        return relative, None
    return relative, _relative(fit.output_error, fit.output_norm)


def _alone(cluster: torch.Tensor, clusters: int, adapters: Sequence[Adapter], basis_bytes: int) -> set[int]:
    """Positions of adapters that are the only one of their cluster and take no more bytes than its bases and Σ."""
    positions = (cluster == torch.tensor(single_member_clusters(cluster, clusters))[:, None]).any(0).nonzero()[:, 0]
    found = {i for i in positions.tolist() if 2 * adapters[i].parameters <= basis_bytes}
    return found if len(found) < len(adapters) else set()


def _relative(squared_error: torch.Tensor, squared_norm: torch.Tensor) -> torch.Tensor:
    """[n] relative error (not squared) over all slices, from both squares [n, S]."""
    return (squared_error.sum(1) / squared_norm.sum(1).clamp_min(torch.finfo(torch.float64).tiny)).sqrt()


def adapter_entry(adapter: Adapter, cluster: int, error: float, output_error: float | None = None) -> AdapterEntry:
    """What the manifest says of a compressed adapter."""
    scales = {part.scale for part in adapter.slices.values()}
    return AdapterEntry(
        name=adapter.name,
        cluster=cluster,
        relative_error=error,
        rank=adapter.rank,
        scale=scales.pop() if len(scales) == 1 else None,
        parameters=adapter.parameters,
        sha256=adapter.sha256,
        output_error=output_error,
    )
