"""On CPU a layer's adapters are what vLLM writes into its slots, whatever the model's dtype."""

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

from vllm_jdlora.kernels import reference
from vllm_jdlora.kernels.cpu_grouped import PackedLinear
from vllm_jdlora.kernels.cpu_operator import PlanMismatch
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
    sigma = torch.randn(4, 1, RANK, RANK, generator=draw).to(punica.sigma_dtype).mT
    wrapper = punica.for_layer("layer", layer, sigma)
    u = [torch.randn(D_OUT, RANK, generator=draw).to(dtype) / RANK for _ in range(SLOTS)]
    v = [torch.randn(RANK, D_IN, generator=draw).to(dtype) / D_IN**0.5 for _ in range(SLOTS)]
    for slot in range(SLOTS):
        layer.set_lora(slot, v[slot], u[slot])
    y = torch.randn(6, D_OUT, generator=draw).to(dtype)
    x = torch.randn(6, D_IN, generator=draw).to(dtype)
    return punica, layer, wrapper, sigma, u, v, y, x


def through_operator(wrapper, y, x):
    with torch.inference_mode():
        wrapper.add_lora_linear(y, x, (), (), 1.0, ())


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_operator_without_python_does_what_the_one_in_python_does(dtype):
    punica, _, wrapper, *_, y, x = served(dtype)
    other, _, wrapper_of_other, *_ = served(dtype)
    bases, slots = np.array([0, 1, 2, -1, 1, 0]), np.array([0, 3, 1, -1, 2, 0])
    out, wanted, wide = y.clone(), y.clone(), torch.full((6, 2 * D_OUT), 7.0, dtype=dtype)
    through_operator(wrapper, out, x)
    assert torch.equal(out, y)  # no step has been planned
    punica.update_tokens(bases, slots)
    other.update_tokens(np.array([2]), np.array([1]))
    through_operator(wrapper, out, x)
    wrapper.run(wanted, x)
    assert torch.equal(out, wanted) and not torch.equal(out, y)
    through_operator(wrapper, wide[:, D_OUT:].copy_(y), torch.cat([x, x], 1)[:, :D_IN])
    assert torch.equal(wide[:, D_OUT:], wanted) and (wide[:, :D_OUT] == 7).all()
    through_operator(wrapper_of_other, one := y[:1].clone(), x[:1])
    wrapper_of_other.run(wanted := y[:1].clone(), x[:1])
    assert torch.equal(one, wanted)


def test_no_tensor_outlives_the_operator():
    punica, _, wrapper, *_ = served(torch.float32)
    punica.update_tokens(np.zeros(6, dtype=np.int64), np.zeros(6, dtype=np.int64))
    y, x = torch.zeros(6, D_OUT), torch.zeros(6, D_IN)
    kept = [StorageWeakRef(part.untyped_storage()) for part in (y, x)]
    through_operator(wrapper, y, x)
    del y, x
    assert all(one.expired() for one in kept)


def test_compiled_models_call_the_operator_without_python():
    punica, _, wrapper, *_, y, x = served(torch.float32)

    def layer(y, x):
        y = y * 2
        wrapper.add_lora_linear(y, x, (), (), 1.0, ())
        return y + 1

    punica.update_tokens(np.zeros(6, dtype=np.int64), np.array([0, 1, 2, 3, 0, 1]))
    wanted = 2 * y
    wrapper.run(wanted, x)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(y, x), wanted + 1)


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
    before = y.clone()
    with pytest.raises(PlanMismatch):
        through_operator(wrapper, y, x)
    assert torch.equal(y, before)
