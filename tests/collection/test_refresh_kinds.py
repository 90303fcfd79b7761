"""Rebuilds of collections of every kind: what is stored against dense products, in the norm or metric of the fit."""

import pytest
import torch

from tests.collection.measured import best_errors, energy, stored_error
from tests.collection.test_edit_kinds import KINDS, moments_of, new, world  # noqa: F401
from vllm_jdlora.adapter import read_adapter
from vllm_jdlora.collection import Collection
from vllm_jdlora.collection.build import compress
from vllm_jdlora.collection.edit import add
from vllm_jdlora.collection.refresh import expected_drift, refresh
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.jd import slice_fit


def own(world, *names):  # noqa: F811
    return [read_adapter(p) for p in sorted((world / "adapters").iterdir()) if not names or p.name in names]


def source(world, name):  # noqa: F811
    return world / ("adapters" if name[-1].isdigit() else "new") / name


def judged(manifest):
    return [a.relative_error if a.output_error is None else a.output_error for a in manifest.adapters]


def objective(collection, world):  # noqa: F811
    """What a fit minimises: squared errors of all adapters over all slices, losses half-way to absolute ones."""
    squared = [error**2 for error in judged(collection.manifest)]
    if collection.manifest.metric == "fisher":
        names = [entry.name for entry in collection.manifest.adapters]
        squared = [
            s * energy(source(world, n), moments_of(world, "fisher")) ** 0.5
            for s, n in zip(squared, names, strict=True)
        ]
    return sum(squared)


@pytest.mark.parametrize("kind", KINDS)
def test_a_refresh_with_newcomers_states_exact_errors_and_gains_on_adding(world, tmp_path, kind):  # noqa: F811
    moments = moments_of(world, kind)
    everyone = own(world) + new(world, "f1-new", "stranger")
    done = refresh(world / kind, everyone, tmp_path / "n", moments=moments)
    opened = Collection.open(tmp_path / "n", verify=True)
    before = Collection.open(world / kind).manifest
    for field in ("method", "metric", "quantize", "rank", "clusters", "dtype", "calibration"):
        assert getattr(opened.manifest, field) == getattr(before, field)
    by_slice = opened.slice_errors() if moments is None else opened.slice_output_errors()
    for row, entry in enumerate(opened.manifest.adapters):
        # fp32 bases (or their 8 bits, read back) and Σ; the dense reference rounds ΔW to fp32.
        exact = stored_error(opened.path, entry.name, source(world, entry.name))
        assert entry.relative_error == pytest.approx(exact, abs=1e-5)
        if moments is None:
            assert entry.output_error is None
        else:
            exact = stored_error(opened.path, entry.name, source(world, entry.name), moments)
            assert entry.output_error == pytest.approx(exact, abs=1e-5)
        assert by_slice[row].isfinite().all()
        if "int8" not in kind:  # the reference of the best reads plain bases
            best = best_errors(opened.path, source(world, entry.name), moments)
            assert judged(opened.manifest)[row] == pytest.approx(best[entry.cluster], abs=1e-5)
    added = add(world / kind, new(world, "f1-new", "stranger"), moments=moments, output=tmp_path / "a").collection
    assert objective(opened, world) < 0.95 * objective(added, world)
    assert (done.output_after is None) == (moments is None)
    fresh = compress(
        everyone, tmp_path / "fresh", rank=4, clusters=2, dtype="fp32", effort=0, moments=moments, **KINDS[kind]
    )
    # A local optimum may be a little worse than another; the starts differ.
    assert fresh.manifest.plain or objective(opened, world) <= 1.05 * objective(fresh, world)


@pytest.mark.parametrize("kind", ["activation", "fisher", "diag", "int8", "int8 activation"])
def test_a_refresh_with_nothing_new_makes_no_error_worse(world, tmp_path, kind):  # noqa: F811
    done = refresh(world / kind, own(world), tmp_path / "n", moments=moments_of(world, kind))
    assert done.new == () and done.moved == ()
    old = Collection.open(world / kind)
    before, after = objective(old, world), objective(done.collection, world)
    # What the fit minimises never rises but for rounding: of fp32, or of 8 bits, where a rotated basis rounds anew.
    assert after <= before * (1.05 if "int8" in kind else 1 + 1e-5)
    assert (done.collection.manifest.error_floor is None) == ("diag" in kind)
    if "diag" not in kind:
        assert done.collection.manifest.error_floor <= done.collection.manifest.error_reached + 1e-9


@pytest.mark.parametrize("kind", ["fisher", "diag activation"])
def test_without_originals_the_error_in_the_metric_is_a_true_bound(world, tmp_path, kind):  # noqa: F811
    moments = moments_of(world, kind)
    there = own(world, "f0-1", "f1-1") + new(world, "f1-new")
    done = refresh(world / kind, there, tmp_path / "n", moments=moments)
    assert done.surrogates == ("f0-0", "f0-2", "f1-0", "f1-2")
    assert done.collection.manifest.error_floor is None  # stand-ins are not the adapters
    for entry in done.collection.manifest.adapters:
        for stored, given in ((entry.relative_error, None), (entry.output_error, moments)):
            true = stored_error(tmp_path / "n", entry.name, source(world, entry.name), given)
            if entry.name in done.surrogates:
                assert true <= stored + 1e-5 and stored < 3 * true
            else:
                assert stored == pytest.approx(true, abs=1e-5)


def test_an_adapter_added_without_moments_and_gone_since_has_an_unknown_output_error(world, tmp_path):  # noqa: F811
    add(world / "activation", new(world, "f1-new"), output=tmp_path / "a")
    done = refresh(tmp_path / "a", own(world), tmp_path / "n", moments=moments_of(world, "activation"))
    assert done.surrogates == ("f1-new",)
    row = done.collection.index_of("f1-new")
    assert done.collection.manifest.adapters[row].output_error is None
    assert done.collection.slice_output_errors()[row].isnan().all()
    assert done.collection.slice_errors()[row].isfinite().all()
    there = own(world) + new(world, "f1-new")
    known = refresh(tmp_path / "a", there, tmp_path / "k", moments=moments_of(world, "activation")).collection
    assert known.manifest.adapters[row].output_error == pytest.approx(
        stored_error(tmp_path / "k", "f1-new", world / "new" / "f1-new", moments_of(world, "activation")), abs=1e-5
    )


def test_the_fit_in_a_metric_starts_from_the_old_bases_as_the_metric_sees_them(world, tmp_path, monkeypatch):  # noqa: F811
    fit, starts = slice_fit.fit_full, []

    def once(problem, rank, *, start, max_sweeps):
        starts.append(start)
        assert torch.allclose(start[0].T @ start[0], torch.eye(rank), atol=1e-5)  # fp32
        cold, warm = (fit(problem, rank, start=s, max_sweeps=1).captured[-1] for s in (None, start))
        assert warm >= cold
        return fit(problem, rank, start=start, max_sweeps=1)

    monkeypatch.setattr(slice_fit, "fit_full", once)
    done = refresh(world / "activation", own(world), tmp_path / "n", moments=moments_of(world, "activation"))
    old = Collection.open(world / "activation")
    assert len(starts) == 2 * len(old.manifest.slices)
    assert objective(done.collection, world) <= objective(old, world) * (1 + 1e-5)  # fp32 bases


def test_in_a_metric_moments_are_needed(world, tmp_path):  # noqa: F811
    for work in (
        lambda: refresh(world / "activation", own(world), tmp_path / "n"),
        lambda: expected_drift(world / "fisher", own(world)),
    ):
        with pytest.raises(JDLoRAError, match=r"is refreshed in it: give its second moments \(--calibration\)"):
            work()
    with pytest.raises(JDLoRAError, match="Frobenius norm"):
        refresh(world / "diag", own(world), tmp_path / "n", moments=moments_of(world, "activation"))
    assert not (tmp_path / "n").exists()


def test_the_limit_of_a_refresh_is_one_of_outputs(world, tmp_path):  # noqa: F811
    moments = moments_of(world, "activation")
    there = own(world) + new(world, "mixed", "stranger")
    everyone = refresh(world / "activation", there, tmp_path / "all", moments=moments).collection.manifest.adapters
    kept = refresh(world / "activation", there, tmp_path / "n", moments=moments, max_error=0.5).collection.manifest
    assert {p.name for p in kept.plain} == {e.name for e in everyone if e.output_error > 0.5} != set()
    assert any(e.output_error < 0.5 < e.relative_error for e in kept.adapters)
    assert all(p.reason.startswith("output error ") and p.reason.endswith("is above 0.5") for p in kept.plain)
    with pytest.raises(JDLoRAError, match="every adapter has an output error above 0"):
        refresh(world / "activation", there, tmp_path / "none", moments=moments, max_error=0.0)


@pytest.mark.parametrize("kind", ["frobenius", "activation", "fisher", "diag activation"])
def test_a_dry_run_foretells_what_a_refresh_gives(world, tmp_path, kind):  # noqa: F811
    moments = moments_of(world, kind)
    there = own(world) + new(world, "mixed", "stranger")
    found = expected_drift(world / kind, there, moments=moments)
    done = refresh(world / kind, there, tmp_path / "n", moments=moments)
    names = {"activation": "output error", "fisher": "loss-weighted error", "frobenius": "relative error"}
    assert found.kind == names[done.collection.manifest.metric] and found.kind in found.told()
    before = [*judged(Collection.open(world / kind).manifest)]
    assert found.stored_error == pytest.approx(sum(before) / len(before))
    after = done.error_after if moments is None else done.output_after
    # It keeps the old clusters, where the refresh may find better ones, and sees four of four slices.
    assert 0.95 * after < found.after_rebuild < 1.25 * after
    blind = expected_drift(world / kind, new(world, "mixed", "stranger"), moments=moments)
    assert 0.95 * after < blind.after_rebuild < 1.25 * after
