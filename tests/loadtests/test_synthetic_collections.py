"""Synthetic collections and adapters are what the readers of the real ones accept, with the shapes of the model."""

import json

import pytest
import torch

from vllm_jdlora.adapter import read_adapters
from vllm_jdlora.collection import Collection

HIDDEN, KEYS, INNER, LAYERS = 24, 8, 40, 2


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    config = {
        "hidden_size": HIDDEN,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_collection_opens_verified_and_its_bases_are_orthonormal(tmp_path, model):
    from synthetic_collections import LINEAR, write_collection

    write_collection(tmp_path / "c", model, LINEAR, adapters=11, clusters=3, rank=4)
    collection = Collection.open(tmp_path / "c", verify=True)
    manifest = collection.manifest
    assert (len(manifest.adapters), manifest.clusters, manifest.rank) == (11, 3, 4)
    sizes = {s.name.rpartition(".")[2]: (s.d_out, s.d_in) for s in manifest.slices}
    assert sizes == {
        "q_proj": (HIDDEN, HIDDEN),
        "k_proj": (KEYS, HIDDEN),
        "v_proj": (KEYS, HIDDEN),
        "o_proj": (HIDDEN, HIDDEN),
        "gate_proj": (INNER, HIDDEN),
        "up_proj": (INNER, HIDDEN),
        "down_proj": (HIDDEN, INNER),
    }
    assert len(manifest.slices) == 7 * LAYERS
    for part in manifest.slices:
        u, v = (side.float() for side in collection.basis(part.name))
        # Columns of unit length rounded to bf16's 8 bits: each entry of the product is off by at most about 2⁻⁸.
        torch.testing.assert_close(u.mT @ u, torch.eye(4).expand(3, 4, 4), atol=8e-3, rtol=0)
        torch.testing.assert_close(v @ v.mT, torch.eye(4).expand(3, 4, 4), atol=8e-3, rtol=0)


def test_the_same_seed_writes_the_same_collection(tmp_path, model):
    from synthetic_collections import ATTENTION, write_collection

    one, two = (
        write_collection(tmp_path / name, model, ATTENTION, adapters=5, clusters=2, rank=4, seed=3) for name in "ab"
    )
    other = write_collection(tmp_path / "c", model, ATTENTION, adapters=5, clusters=2, rank=4, seed=4)
    assert one.manifest.revision == two.manifest.revision != other.manifest.revision


def test_many_adapters_are_written_in_pieces_and_shards_and_no_two_are_equal(tmp_path, model, monkeypatch):
    import synthetic_collections
    from synthetic_collections import ATTENTION, write_collection

    row = 3 * LAYERS * 4 * 4 * 2
    whole = write_collection(tmp_path / "whole", model, ATTENTION, adapters=11, clusters=2, rank=4)
    monkeypatch.setattr(synthetic_collections, "_SHARD_BYTES", 4 * row)
    monkeypatch.setattr(synthetic_collections, "_PIECE_BYTES", 3 * row)
    write_collection(tmp_path / "c", model, ATTENTION, adapters=11, clusters=2, rank=4)
    cut = Collection.open(tmp_path / "c", verify=True)
    assert len([name for name in cut.manifest.files if name.startswith("scalings")]) == 3
    sigma = torch.stack([cut.sigma(i) for i in range(11)])
    assert torch.equal(sigma, torch.stack([whole.sigma(i) for i in range(11)]))
    assert len(torch.unique(sigma.float().flatten(1), dim=0)) == 11 and sigma.float().std() < 1e-3


def test_adapters_are_read_as_peft_folders_of_the_model(tmp_path, model):
    from synthetic_collections import ATTENTION, write_adapters

    folders = write_adapters(tmp_path / "plain", model, ATTENTION, adapters=3, rank=4)
    adapters, _ = read_adapters([tmp_path / "plain"])
    assert [a.path for a in adapters] == folders
    for adapter in adapters:
        assert adapter.rank == 4 and adapter.plain_only is None and len(adapter.slices) == 3 * LAYERS
        assert adapter.base_model == model.name
