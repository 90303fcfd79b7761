"""Adding and removing in collections of every kind: diagonal scalings, bases in 8 bits, metrics of outputs."""

import shutil
from dataclasses import replace

import pytest
import torch

from tests import reference
from tests.collection.families import write_member
from tests.collection.measured import best_errors, moments_that_shun, stored_error, write_sum, write_turned
from vllm_jdlora.adapter import read_adapter
from vllm_jdlora.collection import Collection
from vllm_jdlora.collection.build import compress
from vllm_jdlora.collection.diff import diff
from vllm_jdlora.collection.edit import add, remove
from vllm_jdlora.errors import JDLoRAError

KINDS = {
    "frobenius": {},
    "activation": {},
    "fisher": {},
    "diag": {"method": "diag"},
    "diag activation": {"method": "diag"},
    "int8": {"quantize": "int8"},
    "int8 activation": {"quantize": "int8"},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two families of three in two clusters, of each kind; inputs hardly reach family 0.

    `mixed` has more of family 0 than of family 1, but what it does to outputs is family 1's.
    """
    root = tmp_path_factory.mktemp("world")
    adapters = [
        read_adapter(write_member(root / "adapters" / f"f{family}-{i}", family, 10 * family + i))
        for family in range(2)
        for i in range(3)
    ]
    write_member(root / "new" / "f1-new", 1, 17)
    write_member(root / "new" / "stranger", 9, 27)
    write_sum(root / "new" / "mixed", root / "adapters" / "f0-0", root / "adapters" / "f1-0", 0.6)
    for kind, options in KINDS.items():
        moments = moments_of(root, kind)
        compress(adapters, root / kind, rank=4, clusters=2, dtype="fp32", effort=0, moments=moments, **options)
    return root


def moments_of(world, kind):
    """Those that a collection of this kind is fitted with."""
    gradients = "fisher" in kind
    known = gradients or "activation" in kind
    return moments_that_shun(world / "adapters" / "f0-0", gradients=gradients) if known else None


@pytest.fixture(scope="module")
def moments(world):
    return moments_of(world, "activation")


def new(world, *names):
    return [read_adapter(world / "new" / name) for name in names]


@pytest.mark.parametrize("kind", KINDS)
def test_newcomers_get_their_best_cluster_and_scalings_with_exact_errors(world, tmp_path, kind):
    known = moments_of(world, kind)
    path = shutil.copytree(world / kind, tmp_path / "c")
    before = Collection.open(path).slice_output_errors()
    done = add(path, new(world, "f1-new", "mixed", "stranger"), moments=known)
    opened = Collection.open(path, verify=True)
    for entry in done.compressed:
        source = world / "new" / entry.name
        # fp32 bases and Σ; the dense reference rounds ΔW to fp32.
        assert entry.relative_error == pytest.approx(stored_error(path, entry.name, source), abs=1e-5)
        judged = entry.relative_error
        if known is not None:
            assert entry.output_error == pytest.approx(stored_error(path, entry.name, source, known), abs=1e-5)
            judged = entry.output_error
        if "int8" not in kind:  # the reference of the best reads plain bases
            errors = best_errors(path, source, known)
            assert entry.cluster == errors.index(min(errors))
            assert judged == pytest.approx(min(errors), abs=1e-5)
    family = {e.name: e.cluster for e in opened.manifest.adapters}
    assert family["mixed"] == family["f1-0" if known is not None else "f0-0"]
    errors = opened.slice_output_errors()
    if known is None:
        assert errors is None
    else:
        assert torch.equal(errors[:6], before) and errors[6:].isfinite().all()


def test_the_cluster_for_diagonal_scalings_is_not_the_one_whose_spans_hold_most(world, tmp_path):
    turned = write_turned(tmp_path / "turned", world / "diag", world / "new" / "stranger", 0.9)
    (entry,) = add(world / "diag", [read_adapter(turned)], output=tmp_path / "n").compressed
    errors = best_errors(world / "diag", turned)
    assert errors[1] < errors[0] - 0.05
    assert entry.cluster == 1 and entry.relative_error == pytest.approx(errors[1], abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_come_and_go(world, tmp_path, kind):
    path = shutil.copytree(world / kind, tmp_path / "c")
    add(path, new(world, "f1-new"), moments=moments_of(world, kind))
    remove(path, ["f0-0"])
    left = Collection.open(path, verify=True)
    assert [entry.name for entry in left.manifest.adapters] == ["f0-1", "f0-2", "f1-0", "f1-1", "f1-2", "f1-new"]
    for entry in left.manifest.adapters:
        source = world / ("new" if entry.name.endswith("new") else "adapters") / entry.name
        assert entry.relative_error == pytest.approx(stored_error(path, entry.name, source), abs=1e-5)


def test_without_moments_the_error_of_outputs_is_not_known(world, tmp_path):
    path = shutil.copytree(world / "activation", tmp_path / "c")
    before = Collection.open(path).slice_output_errors()
    done = add(path, new(world, "stranger"))
    opened = Collection.open(path, verify=True)
    assert done.compressed[0].output_error is None
    assert torch.equal(opened.slice_output_errors()[:6], before) and opened.slice_output_errors()[6].isnan().all()
    assert min(best_errors(path, world / "new" / "stranger")) == pytest.approx(
        done.compressed[0].relative_error, abs=1e-5
    )
    assert done.drift.before_rebuild is None and "cannot be estimated" in done.drift.told()


def test_gradients_that_a_collection_does_not_need_do_not_count(world, moments, tmp_path):
    both = moments_that_shun(world / "adapters" / "f0-0", gradients=True)
    first, second = (
        add(world / "activation", new(world, "mixed"), moments=given, output=tmp_path / str(i)).collection
        for i, given in enumerate((moments, both))
    )
    assert first.manifest.revision == second.manifest.revision


def test_the_limit_is_one_of_outputs_where_they_are_known(world, moments, tmp_path):
    path = shutil.copytree(world / "activation", tmp_path / "c")
    with_moments = add(path, new(world, "mixed"), moments=moments, max_error=0.5, output=tmp_path / "with")
    (entry,) = with_moments.compressed
    assert entry.output_error < 0.5 < entry.relative_error
    (refused,) = add(path, new(world, "stranger"), moments=moments, max_error=0.5, output=tmp_path / "out").plain
    assert refused.reason.startswith("output error 0.9") and "above 0.5" in refused.reason
    assert refused.relative_error != pytest.approx(float(refused.reason.split()[2]), abs=1e-3)
    (refused,) = add(path, new(world, "stranger"), max_error=0.5).plain
    assert refused.reason.startswith("relative error 0.9")


def test_a_limit_that_the_collection_records_counts_where_its_error_is_known(world, moments, tmp_path):
    adapters = [read_adapter(p) for p in sorted((world / "adapters").iterdir())]
    compress(adapters, tmp_path / "c", rank=4, clusters=2, dtype="fp32", effort=0, moments=moments, max_error=0.5)
    assert [e.name for e in add(tmp_path / "c", new(world, "stranger"), output=tmp_path / "blind").compressed]
    assert [p.name for p in add(tmp_path / "c", new(world, "stranger"), moments=moments).plain] == ["stranger"]


def test_moments_of_another_text_or_for_the_frobenius_norm_are_refused(world, moments, tmp_path):
    path = shutil.copytree(world / "activation", tmp_path / "c")
    revision = Collection.open(path).manifest.revision
    other = moments_that_shun(world / "adapters" / "f0-0", text="1")
    few = replace(moments, inputs=dict(list(moments.inputs.items())[:1]))
    for given, told in ((other, "other calibration text"), (few, "no second moment")):
        with pytest.raises(JDLoRAError, match=told):
            add(path, new(world, "f1-new"), moments=given)
    with pytest.raises(JDLoRAError, match="calibrate with gradients"):
        add(world / "fisher", new(world, "f1-new"), moments=moments, output=tmp_path / "n")
    with pytest.raises(JDLoRAError, match="Frobenius norm"):
        add(world / "frobenius", new(world, "f1-new"), moments=moments, output=tmp_path / "n")
    assert Collection.open(path, verify=True).manifest.revision == revision


def test_directions_that_grow_in_the_metric_are_those_that_outputs_lack(world, moments, tmp_path):
    source, errors = world / "new" / "stranger", []
    for extra in (2, 4):
        for name, given in (("with", moments), ("blind", None)):
            path = tmp_path / f"{name}{extra}"
            done = add(world / "activation", new(world, "stranger"), grow=extra, moments=given, output=path)
            errors.append(stored_error(path, "stranger", source, moments))
            if given is not None:
                assert done.compressed[0].output_error == pytest.approx(errors[-1], abs=1e-5)
    assert errors[0] < 0.98 * errors[1]
    assert errors[2] < 1e-5  # as many directions as its rank hold it; fp32 storage
    for entry in Collection.open(world / "activation").manifest.adapters:
        was, now = (reference.compressed_deltas(p, entry.name) for p in (world / "activation", tmp_path / "with2"))
        assert all(torch.allclose(was[s], now[s], rtol=1e-6, atol=1e-9) for s in was)  # fp64 sums in another order


def test_bases_in_8_bits_grow_and_spare_the_others(world, tmp_path):
    path = shutil.copytree(world / "int8", tmp_path / "c")
    names = [a.name for a in Collection.open(path).manifest.adapters]
    old = {name: reference.compressed_deltas(path, name) for name in names}
    done = add(path, new(world, "stranger"), grow=4)
    assert done.compressed[0].relative_error < 0.02  # half a step of 1/127 in 40 to 48 entries of each direction
    assert done.compressed[0].relative_error == pytest.approx(
        stored_error(path, "stranger", world / "new" / "stranger"), abs=1e-5
    )
    Collection.open(path, verify=True)
    for name, deltas in old.items():
        now = reference.compressed_deltas(path, name)
        # Numbers in 8 bits stay; a scale may round to the next fp32.
        assert all(torch.allclose(deltas[s], now[s], rtol=1e-5, atol=1e-6) for s in deltas)


def test_a_certificate_goes_with_the_adapters_it_was_for(world, tmp_path):
    first = Collection.open(world / "frobenius")
    assert first.manifest.error_floor is not None
    for edited in (
        add(first.path, new(world, "f1-new"), output=tmp_path / "a").collection,
        remove(first.path, ["f0-0"], output=tmp_path / "b").collection,
    ):
        assert edited.manifest.error_floor is None and edited.manifest.error_reached is None
        assert diff(first, edited).settings == {}
