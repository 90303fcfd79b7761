"""On CPU a layer's adapters are what vLLM writes into its slots, whatever the model's dtype."""

import numpy as np
import pytest
import torch
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

from vllm_jdlora.kernels import reference
from vllm_jdlora.kernels.cpu_grouped import PackedLinear
from vllm_jdlora.serving.punica_cpu import JDPunicaCPU

D_OUT, D_IN, RANK, SLOTS = 48, 40, 16, 3


class Linear(BaseLinearLayerWithLoRA):
    """vLLM's LoRA layer with its buffers, without a base layer."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        self.n_slices, self.tp_size = 1, 1
        self.lora_a_stacked = (torch.zeros(SLOTS, 1, RANK, D_IN),)
        self.lora_b_stacked = (torch.zeros(SLOTS, 1, D_OUT, RANK),)


def served(dtype: torch.dtype):
    draw = torch.Generator().manual_seed(0)
    punica = JDPunicaCPU(16, 4, "cpu", {}, dtype)
    layer = Linear()
    sigma = torch.randn(4, 1, RANK, RANK, generator=draw).mT
    wrapper = punica.for_layer("layer", layer, sigma)
    u = [torch.randn(D_OUT, RANK, generator=draw).to(dtype) / RANK for _ in range(SLOTS)]
    v = [torch.randn(RANK, D_IN, generator=draw).to(dtype) / D_IN**0.5 for _ in range(SLOTS)]
    for slot in range(SLOTS):
        layer.set_lora(slot, v[slot], u[slot])
    y = torch.randn(6, D_OUT, generator=draw).to(dtype)
    x = torch.randn(6, D_IN, generator=draw).to(dtype)
    return punica, layer, wrapper, sigma, u, v, y, x


def expected(y, x, u, v, sigma, bases, slots):
    return reference.jd_linear(y, x, [torch.stack(u)], [torch.stack(v)], sigma, bases.tolist(), slots.tolist())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_a_step_adds_each_tokens_adapter(dtype):
    punica, _, wrapper, sigma, u, v, y, x = served(dtype)
    bases, slots = np.array([0, 1, 2, -1, 1, 0]), np.array([0, 3, 1, -1, 2, 0])
    punica.update_tokens(bases, slots)
    out = y.clone()
    wrapper.run(out, x)
    # y is rounded to the dtype, and in bf16 Σ h before U as well
    rounding = {torch.bfloat16: 2**-6, torch.float32: 1e-5, torch.float16: 2**-9}[dtype]
    torch.testing.assert_close(out.float(), expected(y, x, u, v, sigma, bases, slots), rtol=rounding, atol=rounding)
    assert torch.equal(out[3], y[3])


def test_another_adapter_in_a_slot_and_a_cleared_slot_count_at_once():
    punica, layer, wrapper, sigma, u, v, y, x = served(torch.float32)
    bases, slots = np.array([1, 1, 2, 2, 0, 0]), np.zeros(6, dtype=np.int64)
    punica.update_tokens(bases, slots)
    u[1], v[1] = u[0] * 2, v[2] * 3
    layer.set_lora(1, v[1], u[1][:, :8])  # of lower rank than the buffers
    u[1] = torch.cat([u[1][:, :8], torch.zeros(D_OUT, 8)], 1)
    layer.reset_lora(2)
    u[2], v[2] = torch.zeros(D_OUT, RANK), torch.zeros(RANK, D_IN)
    out = y.clone()
    wrapper.run(out, x)
    torch.testing.assert_close(out, expected(y, x, u, v, sigma, bases, slots), rtol=1e-5, atol=1e-5)
    assert torch.equal(out[2:4], y[2:4])


def test_a_slot_is_laid_down_once_for_each_write(monkeypatch):
    _, layer, _, _, u, v, *_ = served(torch.float32)
    written = []
    monkeypatch.setattr(PackedLinear, "write", lambda self, cluster, *bases: written.append(cluster))
    layer.set_lora(1, v[1], u[1])
    layer.reset_lora(2)
    layer.set_lora(0, v[0], u[0])
    assert written == [1, 2, 0]


def test_a_plan_for_another_number_of_tokens_is_refused():
    punica, _, wrapper, *_, y, x = served(torch.float32)
    punica.update_tokens(np.zeros(5, dtype=np.int64), np.zeros(5, dtype=np.int64))
    with pytest.raises(RuntimeError, match="plan is for 5 tokens and the layer got 6"):
        wrapper.run(y, x)
