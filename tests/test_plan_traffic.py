"""`jdlora plan --traffic` packs slices as vLLM does and says that its figures are predictions."""

import argparse

import pytest

from vllm_jdlora.commands import plan_traffic
from vllm_jdlora.kernels import traffic
from vllm_jdlora.kernels.traffic import MISTRAL_7B

LAYER = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
SLICES = [(f"model.layers.{i}.{name}", *size) for i in range(32) for name, size in LAYER.items()]


def facts(**changes) -> dict:
    return plan_traffic.traffic_of(SLICES, **{"rank": 16, "clusters": 16, "adapter_rank": 16} | changes)


def test_a_model_of_32_layers_moves_what_32_times_one_layer_moves():
    assert sorted(plan_traffic._modules(SLICES), key=str) == sorted(list(MISTRAL_7B.values()) * 32, key=str)
    step = facts(tokens=(64,))["steps"][0]
    card = traffic.CARDS["H100"]
    one = traffic.layer(list(MISTRAL_7B.values()), 64, card, 16, 16)
    assert step["compressed"]["bytes"] == pytest.approx(32 * one.weights)
    assert step["plain"]["bytes"] == pytest.approx(64 * 84e6, rel=0.01)  # 84 MB an adapter
    assert step["compressed"]["share_of_base"] == pytest.approx(32 * one.microseconds / step["base"]["microseconds"])


def test_bases_of_8_bits_move_half_of_what_bases_of_16_do():
    """Scalings stay as they are: 64 of 7 · 16² numbers of two bytes in each layer."""
    step = facts(tokens=(64,))["steps"][0]
    scalings = 32 * 64 * 7 * 16**2 * 2
    bases, eight_bit = (step[name]["bytes"] - scalings for name in ("compressed", "compressed_8_bit"))
    assert eight_bit == pytest.approx(bases / 2, rel=2e-3)  # and a scale for each direction


def test_the_same_slice_of_another_layer_is_another_module():
    slices = [("a.0.q_proj", 8, 16), ("a.1.q_proj", 8, 16), ("a.1.v_proj", 4, 16), ("a.1.up_proj", 8, 32)]
    shapes = [(shape.d_in, shape.widths) for shape in plan_traffic._modules(slices)]
    assert shapes == [(16, (8,)), (16, (8, 4)), (32, (8,))]


def test_the_lines_say_that_nothing_was_measured_and_both_sides():
    lines: list[str] = []
    plan_traffic.show_traffic(facts(tokens=(1, 256), card="A100"), lines.append)
    assert "predicted, not measured" in lines[0] and "A100" in lines[0]
    assert "in 16 and in 8 bits" in lines[0]
    assert len(lines) == 3 and "256 sequences" in lines[2] and "MB plain" in lines[2]


def test_the_gpu_may_be_left_out_and_must_be_known(capsys):
    parser = argparse.ArgumentParser()
    plan_traffic.add_argument(parser)
    assert parser.parse_args([]).traffic is None
    assert parser.parse_args(["--traffic"]).traffic == "H100"
    assert parser.parse_args(["--traffic", "A100"]).traffic == "A100"
    assert set(traffic.CARDS) == {"A100", "H100", "H200"}
    with pytest.raises(SystemExit):
        parser.parse_args(["--traffic", "RTX"])
