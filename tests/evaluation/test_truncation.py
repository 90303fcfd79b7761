"""Truncated adapters against the dense SVD."""

from __future__ import annotations

import json

import pytest
import torch

from tests import tiny_llama
from vllm_jdlora.adapter import read_adapter, read_adapters
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.evaluation.truncation import truncate_all, truncated


@pytest.mark.parametrize("rank", [1, 3, 4, 9])
def test_each_slice_is_the_best_of_its_rank(tmp_path, rank):
    source = read_adapter(tiny_llama.write_adapter(tmp_path / "a", 0, rank=4))
    found = read_adapter(truncated(source, rank, tmp_path / "cut"))
    assert found.rank == min(rank, 4)
    for name in source.slices:
        b, a = (side.double() for side in source.factors(name))
        u, s, v = torch.linalg.svd(b @ a, full_matrices=False)
        best = u[:, :rank] * s[:rank] @ v[:rank]
        b, a = (side.double() for side in found.factors(name))
        assert torch.linalg.norm(b @ a - best) < 1e-6 * torch.linalg.norm(best)  # stored in fp32


def test_slices_of_lower_rank_keep_it_and_other_settings_stay(tmp_path):
    path = tiny_llama.write_adapter(tmp_path / "a", 0, rank=4, targets=["q_proj"])
    config = json.loads((path / "adapter_config.json").read_text())
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "adapter_model.safetensors")
    low = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors[f"{low}.lora_A.weight"] = tensors[f"{low}.lora_A.weight"][:2].contiguous()
    tensors[f"{low}.lora_B.weight"] = tensors[f"{low}.lora_B.weight"][:, :2].contiguous()
    save_file(tensors, path / "adapter_model.safetensors")
    config |= {"rank_pattern": {"layers.0.self_attn.q_proj": 2}, "use_rslora": True, "task_type": "CAUSAL_LM"}
    (path / "adapter_config.json").write_text(json.dumps(config))
    source = read_adapter(path)
    found = read_adapter(truncated(source, 3, tmp_path / "cut"))
    assert {name.split(".")[2]: part.rank for name, part in found.slices.items()} == {"0": 2, "1": 3}
    b, a = found.factors("model.layers.0.self_attn.q_proj")
    expected_b, expected_a = source.factors("model.layers.0.self_attn.q_proj")
    # Nothing to cut, only other factors: fp32 storage.
    assert torch.allclose(b @ a, expected_b @ expected_a, atol=1e-6)
    assert json.loads((tmp_path / "cut" / "adapter_config.json").read_text())["target_modules"] == ["q_proj"]


def test_a_folder_of_truncated_adapters_is_what_compress_takes(tmp_path):
    for i in range(2):
        tiny_llama.write_adapter(tmp_path / "in" / f"a{i}", i)
    adapters, _ = read_adapters([tmp_path / "in"])
    truncate_all(adapters, 2, tmp_path / "out")
    cut, _ = read_adapters([tmp_path / "out"])
    assert [a.name for a in cut] == ["a0", "a1"] and {a.rank for a in cut} == {2}
    with pytest.raises(JDLoRAError, match="exists already"):
        truncate_all(adapters, 2, tmp_path / "out")
