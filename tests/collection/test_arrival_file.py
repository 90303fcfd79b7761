"""The file of an adapter that came while a server ran: there and back, and what is refused."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.collection.families import write_member
from vllm_jdlora.adapter import read_adapter
from vllm_jdlora.collection.arrival_file import arrival_path, read_arrival, write_arrival
from vllm_jdlora.collection.build import compress
from vllm_jdlora.errors import JDLoRAError


@pytest.fixture(scope="module", params=["full", "diag"])
def manifest(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("arrivals")
    adapters = [read_adapter(write_member(root / f"m{i}", 0, i)) for i in range(3)]
    return compress(adapters, root / "c", method=request.param, rank=4, clusters=1, dtype="bf16").manifest


@pytest.fixture
def sigma(manifest):
    shape = (len(manifest.slices), *(manifest.rank,) * (1 if manifest.method == "diag" else 2))
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()


def write(folder, sigma, manifest, **changed):
    facts = {"cluster": 0, "name": "new", "relative_error": 0.1, "source_sha256": "0" * 64} | changed
    return write_arrival(folder, sigma, manifest=manifest, **facts)


def test_what_is_read_is_what_was_written(tmp_path, sigma, manifest):
    digest = write(tmp_path, sigma, manifest)
    assert torch.equal(read_arrival(tmp_path, digest, manifest), sigma)
    assert [p.name for p in tmp_path.iterdir()] == [f"{digest}.safetensors"]


def test_the_digest_is_that_of_the_content(tmp_path, sigma, manifest):
    digest = write(tmp_path, sigma, manifest)
    assert write(tmp_path, sigma.clone(), manifest) == digest
    assert len({digest, write(tmp_path, sigma * 2, manifest), write(tmp_path, sigma, manifest, cluster=1)}) == 3


def test_a_collection_with_the_same_bases_and_other_adapters_reads_it(tmp_path, sigma, manifest):
    digest = write(tmp_path, sigma, manifest)
    fewer = replace(manifest, adapters=manifest.adapters[:1], revision="")
    assert torch.equal(read_arrival(tmp_path, digest, fewer), sigma)


def test_other_bases_are_refused(tmp_path, sigma, manifest):
    digest = write(tmp_path, sigma, manifest)
    other = replace(manifest, files={**manifest.files, "bases.safetensors": "f" * 64}, revision="")
    with pytest.raises(JDLoRAError, match="other bases"):
        read_arrival(tmp_path, digest, other)


@pytest.mark.parametrize("spoil", [lambda s: s[:-1], lambda s: s.float(), lambda s: s / 0])
def test_values_that_do_not_fit_are_not_written(tmp_path, sigma, manifest, spoil):
    with pytest.raises(JDLoRAError, match="'new' cannot be stored"):
        write(tmp_path, spoil(sigma), manifest)
    assert not list(tmp_path.iterdir())


def test_a_changed_file_is_refused(tmp_path, sigma, manifest):
    digest = write(tmp_path, sigma, manifest)
    file = arrival_path(tmp_path, digest)
    save_file({"sigma": load_file(file)["sigma"] * 2}, file)
    with pytest.raises(JDLoRAError, match="was changed"):
        read_arrival(tmp_path, digest, manifest)


@pytest.mark.parametrize("digest", ["", "../" + "a" * 61, "A" * 64, "a" * 63, "a" * 64 + "/b", "a" * 64 + "\n"])
def test_a_digest_is_never_a_path(tmp_path, manifest, digest):
    with pytest.raises(JDLoRAError, match="not the digest"):
        read_arrival(tmp_path, digest, manifest)


def test_a_missing_file_and_a_link_are_refused(tmp_path, sigma, manifest):
    inside = tmp_path / "arrivals"
    inside.mkdir()
    digest = write(tmp_path, sigma, manifest)
    for _ in range(2):
        with pytest.raises(JDLoRAError, match="link or missing"):
            read_arrival(inside, digest, manifest)
        if not (inside / f"{digest}.safetensors").is_symlink():
            (inside / f"{digest}.safetensors").symlink_to(arrival_path(tmp_path, digest))
