"""Baselines as variants: within their bytes, true to the adapters, and plain about what they cannot do."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.tiny_llama import write_adapter
from vllm_jdlora.adapter import Adapter, read_adapters
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.evaluation import baseline_variants
from vllm_jdlora.evaluation.adapter_slices import AdapterSlices, SliceSize
from vllm_jdlora.evaluation.baseline_variants import BASELINES, baseline
from vllm_jdlora.evaluation.variant import Variant
from vllm_jdlora.jd.baselines import BaselineFit

Q, K = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj"
# bf16 rounds each entry of both factors by up to 2⁻⁹ of itself.
BF16 = 2**-7


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Adapter]:
    folder = tmp_path_factory.mktemp("adapters")
    for seed in range(6):
        write_adapter(folder / f"a{seed}", seed, targets=["q_proj", "k_proj"])
    return read_adapters([folder])[0]


def uncompressed_bytes(adapters: list[Adapter]) -> int:
    return 2 * sum(adapter.parameters for adapter in adapters)


def original(adapter: Adapter, part: str) -> Tensor:
    pair = adapter.factors(part)
    assert pair is not None
    return pair[0] @ pair[1]


def relative_error(variant: Variant, adapter: Adapter) -> float:
    update = variant.update(adapter.name)
    lost = sum(float((original(adapter, p) - update[p][0] @ update[p][1]).square().sum()) for p in adapter.slices)
    return (lost / sum(float(original(adapter, p).square().sum()) for p in adapter.slices)) ** 0.5


def moments(adapters: list[Adapter]) -> dict[str, Tensor]:
    return {part: torch.eye(s.shape.d_in) for part, s in adapters[0].slices.items()}


def known(adapters: list[Adapter]) -> dict[str, dict[str, Tensor]]:
    """All that any baseline weighs by."""
    gradients = {part: torch.eye(s.shape.d_out) for part, s in adapters[0].slices.items()}
    return {"second_moments": moments(adapters), "gradients": gradients}


def needs(name: str) -> None:
    if name in ("vlora", "lorashare") and importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_gives_all_slices_back_within_its_bytes(name: str, adapters: list[Adapter]) -> None:
    needs(name)
    budget = uncompressed_bytes(adapters) // 2
    variant = baseline(name, adapters, budget, **known(adapters), progress=False)
    assert variant.name == name and 0 < variant.bytes <= budget
    for adapter in adapters:
        update = variant.update(adapter.name)
        assert update.keys() == adapter.slices.keys()
        for part, (b, a) in update.items():
            assert b.dtype == a.dtype == torch.float32
            assert (b @ a).shape == original(adapter, part).shape
        # Random adapters share nothing: merging them gives something else of their own size.
        assert relative_error(variant, adapter) < (2 if name == "ties" else 1.1)


@pytest.mark.parametrize("name", BASELINES)
def test_the_largest_rank_that_fits_is_taken(name: str, adapters: list[Adapter]) -> None:
    """With one number less, the bytes it took before no longer fit and it takes less."""
    needs(name)
    options = {**known(adapters), "progress": False}
    first = baseline(name, adapters, uncompressed_bytes(adapters) * 9 // 10, **options)  # type: ignore[arg-type]
    again = baseline(name, adapters, first.bytes, **options)  # type: ignore[arg-type]
    assert again.bytes == first.bytes
    assert baseline(name, adapters, first.bytes - 2, **options).bytes < first.bytes  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "times"),
    [("svd", 1), ("jd-diag", 2), ("jd-published", 4), ("factor-pca", 4), ("vlora", 2)],
)
def test_with_bytes_enough_nothing_but_rounding_is_lost(name: str, times: int, adapters: list[Adapter]) -> None:
    needs(name)
    variant = baseline(name, adapters, times * uncompressed_bytes(adapters), progress=False)
    # vlora's components hold whole factors: rounding adds up over components.
    assert max(relative_error(variant, adapter) for adapter in adapters) < (3 * BF16 if name == "vlora" else BF16)


def test_the_svd_is_that_of_each_adapter_and_its_bytes_are_those_of_its_factors(adapters: list[Adapter]) -> None:
    variant = baseline("svd", adapters, uncompressed_bytes(adapters) // 2, progress=False)
    counted = 0
    for adapter in adapters:
        for part, (b, a) in variant.update(adapter.name).items():
            counted += b.numel() + a.numel()
            u, s, vh = torch.linalg.svd(original(adapter, part))
            best = (u[:, :2] * s[:2]) @ vh[:2]
            assert float((b @ a - best).norm()) < BF16 * float(best.norm())
    assert variant.bytes == 2 * counted


def test_an_svd_in_8_bits_has_more_directions_in_the_same_bytes_and_counts_their_scales(
    adapters: list[Adapter],
) -> None:
    budget = uncompressed_bytes(adapters) // 2
    wide, eight = (baseline(name, adapters, budget, progress=False) for name in ("svd", "svd-int8"))
    values = directions = 0
    for adapter in adapters:
        for part, (b, a) in eight.update(adapter.name).items():
            values += b.numel() + a.numel()
            directions += a.shape[0]
            assert a.shape[0] > wide.update(adapter.name)[part][1].shape[0]
            steps = b / (b.abs().amax(0) / 127)
            assert float((steps - steps.round()).abs().max()) < 0.5  # bf16 moves large steps by up to half of one
    assert values + 8 * directions <= eight.bytes <= budget


def test_bytes_shared_by_adapters_count_once(adapters: list[Adapter]) -> None:
    variant = baseline("average", adapters, 10 * uncompressed_bytes(adapters), progress=False)
    # The mean of six adapters of rank 4 has rank 24, far from where dense is cheaper.
    assert variant.bytes == 2 * sum(24 * size.sides for size in AdapterSlices(adapters).sizes)


def test_lorashare_projects_each_side_on_centred_principal_directions(adapters: list[Adapter]) -> None:
    needs("lorashare")
    variant = baseline("lorashare", adapters, uncompressed_bytes(adapters) * 9 // 10, progress=False)
    sizes = AdapterSlices(adapters).sizes
    components, rest = divmod(variant.bytes // 2, sum(size.sides + 2 * 4 * 6 for size in sizes))
    assert rest == 0
    pairs = [pair for adapter in adapters if (pair := adapter.factors(Q)) is not None]
    projections = []
    for rows in (torch.cat([b for b, _ in pairs], 1).T.double(), torch.cat([a for _, a in pairs]).double()):
        # It centres the stack to find directions, and projects what is not centred.
        basis = torch.linalg.svd(rows - rows.mean(0), full_matrices=False).Vh[:components].T
        projections.append(basis @ basis.T)
    for adapter in adapters:
        expected = projections[0] @ original(adapter, Q).double() @ projections[1]
        b, a = variant.update(adapter.name)[Q]
        assert float((b @ a - expected).norm()) < BF16 * float(original(adapter, Q).norm())


@pytest.mark.parametrize("name", ["jd-published", "jd-published-clusters"])
def test_above_a_hundred_adapters_the_papers_choice_is_clusters(
    name: str, adapters: list[Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baseline_variants, "_UNCLUSTERED", 5)
    monkeypatch.setattr(baseline_variants, "_CLUSTER_RANK", 4)
    variant = baseline(name, adapters, uncompressed_bytes(adapters) * 2 // 3, progress=False)
    bases = {
        id(variant.update(adapter.name)) and tuple(variant.update(adapter.name)[Q][1][0].tolist())
        for adapter in adapters
    }
    assert len(bases) > 1


def test_random_clusters_are_drawn_by_the_seed_and_the_best_number_of_them_is_kept(
    adapters: list[Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int]] = []
    real = baseline_variants.random_assignment

    def watched(factors: list, rank: int, clusters: int, seed: int) -> BaselineFit:
        calls.append((clusters, seed))
        fit = real(factors, rank, clusters, seed)
        if clusters == 2:  # made to look perfect
            return BaselineFit(factors, fit.numbers)
        return fit

    monkeypatch.setattr(baseline_variants, "random_assignment", watched)
    baseline("random-clusters", adapters, uncompressed_bytes(adapters) // 2, seed=7, progress=False)
    assert {seed for _, seed in calls} == {7}
    assert len({clusters for clusters, _ in calls}) > 1
    assert [clusters for clusters, _ in calls[-4:]] == [2] * 4  # four slices, for good


@pytest.mark.parametrize("name", BASELINES)
def test_a_budget_too_small_is_told_with_what_is_needed(name: str, adapters: list[Adapter]) -> None:
    needs(name)
    with pytest.raises(JDLoRAError, match=r"takes \d+ bytes, more than the 100 allowed"):
        baseline(name, adapters, 100, **known(adapters), progress=False)


def test_the_activation_svd_says_which_moment_is_missing(adapters: list[Adapter]) -> None:
    some = moments(adapters)
    del some[Q]
    with pytest.raises(JDLoRAError, match=f"no second moment of the input of {Q}"):
        baseline("svd-activation", adapters, uncompressed_bytes(adapters), second_moments=some, progress=False)
    with pytest.raises(JDLoRAError, match="svd-fisher: no second moment of the gradients of"):
        baseline("svd-fisher", adapters, uncompressed_bytes(adapters), second_moments=moments(adapters))


def test_an_unknown_name_is_told_with_those_that_are_known(adapters: list[Adapter]) -> None:
    with pytest.raises(JDLoRAError, match=r"no baseline named 'best'.*svd"):
        baseline("best", adapters, 1000)


@pytest.mark.parametrize(("name", "package"), [("vlora", "vlora-dev"), ("lorashare", "lorashare")])
def test_a_missing_package_is_told_with_the_extra_that_has_it(
    name: str, package: str, adapters: list[Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(JDLoRAError, match=rf"needs the package {package}: .*vllm-jdlora\[evaluate\]"):
        baseline(name, adapters, uncompressed_bytes(adapters))


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> list[Adapter]:
    """Ranks 2 to 5; the last has no k_proj."""
    folder: Path = tmp_path_factory.mktemp("uneven")
    for rank in (2, 3, 4):
        write_adapter(folder / f"r{rank}", rank, rank=rank, targets=["q_proj", "k_proj"])
    write_adapter(folder / "r5", 5, rank=5, targets=["q_proj"])
    return read_adapters([folder])[0]


@pytest.mark.parametrize("name", [name for name in BASELINES if name not in ("vlora", "lorashare")])
def test_adapters_may_differ_in_rank_and_targets(name: str, uneven: list[Adapter]) -> None:
    variant = baseline(name, uneven, uncompressed_bytes(uneven) // 2, **known(uneven), progress=False)
    assert variant.bytes <= uncompressed_bytes(uneven) // 2
    for adapter in uneven:
        assert variant.update(adapter.name).keys() == adapter.slices.keys()


@pytest.mark.parametrize("name", ["vlora", "lorashare"])
def test_the_packages_refuse_adapters_that_differ(name: str, uneven: list[Adapter]) -> None:
    needs(name)
    with pytest.raises(JDLoRAError, match="one rank and the same target modules"):
        baseline(name, uneven, uncompressed_bytes(uneven))


def test_slices_are_read_when_asked_for_with_none_for_what_is_absent(uneven: list[Adapter]) -> None:
    slices = AdapterSlices(uneven)
    at = slices.names.index(K)
    assert [f is None for f in slices[at]] == [False, False, False, True]
    assert slices.sizes[at] == SliceSize(64, 64, (2, 3, 4))
    factors = slices[at][1]
    assert factors is not None
    torch.testing.assert_close(factors.b @ factors.a, original(uneven[1], K))
