"""A quantised collection's numbers reach a worker's 8-bit buffers as they are stored, and only its share of them."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm_jdlora.collection import quantize
from vllm_jdlora.collection.io import QuantizedBasis
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.kernels.eight_bit_bases import EightBitBases, WidenedBases
from vllm_jdlora.kernels.triton_widen import UNIT
from vllm_jdlora.serving import engine_settings
from vllm_jdlora.serving.eight_bit_loading import load_cluster
from vllm_jdlora.serving.options import ServingOptions

CLUSTERS, RANK, BUFFER_RANK, D_IN, D_OUT = 2, 6, 8, 16, 12


class ShardedLayer:
    """Stands for vLLM's fully sharded column-parallel layer of two slices on the second of two workers."""

    n_slices, tp_size, tp_rank = 2, 2, 1

    def __init__(self):
        half = BUFFER_RANK // 2
        self.lora_a_stacked = tuple(torch.zeros(1, 1, half, D_IN).half() for _ in range(2))
        self.lora_b_stacked = tuple(torch.zeros(1, 1, D_OUT // 2, BUFFER_RANK).half() for _ in range(2))

    def set_lora(self, index, lora_a, lora_b):
        for i in range(2):
            if lora_a[i] is not None:
                rows, half = lora_a[i][4:8], lora_b[i][D_OUT // 2 :]
                self.lora_a_stacked[i][index, 0, : len(rows)].copy_(rows)
                self.lora_b_stacked[i][index, 0, :, : half.shape[1]].copy_(half)


def stored(kind: str, seed: int) -> tuple[QuantizedBasis, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    v, v_scale = quantize.quantized(torch.randn(CLUSTERS, RANK, D_IN, generator=g), kind)
    u, u_scale = quantize.quantized(torch.randn(CLUSTERS, RANK, D_OUT, generator=g), kind)
    read = quantize.dequantized(u, u_scale).mT, quantize.dequantized(v, v_scale)
    return QuantizedBasis(u.mT.contiguous(), v, u_scale, v_scale), *read


@pytest.mark.parametrize(
    ("buffers", "kind", "unit"),
    [
        (EightBitBases, "int8", 1),
        (EightBitBases, "fp8", 1),
        (WidenedBases, "int8", UNIT[torch.int8]),
        (WidenedBases, "fp8", UNIT[torch.float8_e4m3fn]),
    ],
)
def test_each_worker_gets_its_rows_and_their_scales(buffers, kind, unit):
    """Where kernels widen a number to its ``UNIT``-th part, the scale is as many times larger."""
    layer = ShardedLayer()
    wide = layer.lora_a_stacked, layer.lora_b_stacked
    bases = buffers.beside(*wide, CLUSTERS, quantize.STORED[kind])
    basis, u, v = stored(kind, 0)
    for cluster in range(CLUSTERS):  # the collection has nothing for the first slice; slots hold clusters in any order
        load_cluster(layer, bases, [None, basis.at(cluster)], CLUSTERS - 1 - cluster)
    assert (layer.lora_a_stacked, layer.lora_b_stacked) == wide
    assert not bases.v[0].float().any() and not bases.v_scale[:, 0].any()
    seen_v = bases.v[1][:, 0].float() / unit * bases.v_scale[:, 1, :, None]
    seen_u = bases.u[1][:, 0].float() / unit * bases.u_scale[:, 1, None, :]
    # A power of two takes no bit. The buffers are wider than the collection.
    v, u = v.flip(0), u.flip(0)
    assert torch.equal(seen_v[:, :2], v[:, 4:]) and not seen_v[:, 2:].any()
    assert torch.equal(seen_u[..., :RANK], u[:, D_OUT // 2 :]) and not seen_u[..., RANK:].any()


def test_layers_that_the_collection_does_not_change_are_left_alone():
    layer = SimpleNamespace(n_slices=1)
    load_cluster(layer, SimpleNamespace(clusters=3), [None], 0)


def test_8_bits_are_refused_where_there_are_none():
    collection = SimpleNamespace(path="c", manifest=SimpleNamespace(quantize="none", dtype="bf16"))
    engine_settings._refuse_8_bits_where_there_are_none(collection, 16)
    with pytest.raises(JDLoRAError, match="compress with --quantize"):
        engine_settings._refuse_8_bits_where_there_are_none(collection, 8)


def test_other_widths_of_bases_are_refused():
    with pytest.raises(JDLoRAError, match="8 or 16, not 4"):
        ServingOptions("c", base_bits=4)
