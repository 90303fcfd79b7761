"""vLLM's own LoRA layers over the GPU wrapper mean what the fp32 loops mean, in the interpreter or on a GPU.

Not collected by itself: ``test_punica_gpu.py`` runs this file in a process where Triton is interpreted. vLLM's own
kernels, which one test compares with, mean something there only for fp16.
"""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from offline_triton import import_vllm_lora_kernels

    import_vllm_lora_kernels()

from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.lora import LoRAConfig
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.forward_context import set_forward_context
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU
from vllm.lora.utils import from_layer
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear

from vllm_jdlora.collection.io import QuantizedBasis
from vllm_jdlora.collection.quantize import STORED, dequantized, quantized
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.kernels import reference
from vllm_jdlora.serving.base_loading import BaseReader
from vllm_jdlora.serving.punica_gpu import JDPunicaGPU

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# (dtype, its unit roundoff); the interpreter cuts bf16 off instead of rounding it
DTYPES = [(torch.float16, 2.0**-11), (torch.bfloat16, 2.0**-7 if INTERPRETED else 2.0**-8)]

RANK, HIDDEN = 16, 64
CLUSTERS, PLAIN_RANK, STORED_RANK = 3, 5, 12
BASES, PLAIN = CLUSTERS + 1, CLUSTERS  # the last base is a plain adapter's own
ADAPTERS, IDENTITY = 5, 5  # Σ slots; the last row is the identity
MAX_TOKENS = 24
BASE_MODEL, PLAIN_ADAPTER = "base", "plain"

# Compressed adapters (by Σ slot), a plain one and the base model, out of order.
MIXED = [2, 0, BASE_MODEL, PLAIN_ADAPTER, 4, 2, 1, BASE_MODEL, PLAIN_ADAPTER, 3, 0]
CHANGED = [PLAIN_ADAPTER, 1, BASE_MODEL, 4, 4]

LAYERS = {
    "qkv_proj": (lambda: QKVParallelLinear(HIDDEN, 16, 4, 2, bias=False), ["q_proj", "k_proj", "v_proj"]),
    "gate_up_proj": (lambda: MergedColumnParallelLinear(HIDDEN, [48, 48], bias=False), ["gate_proj", "up_proj"]),
    "down_proj": (lambda: RowParallelLinear(48, HIDDEN, bias=False), []),
}

# vLLM caches pointer tables by address: a freed layer's address, reused, would bring another layer's strides.
_alive = []
CONFIG = VllmConfig()


@pytest.fixture(scope="module", autouse=True)
def vllm_environment():
    torch.set_grad_enabled(False)
    with set_current_vllm_config(CONFIG):
        init_distributed_environment(1, 0, "tcp://127.0.0.1:0", 0, backend="gloo")
        ensure_model_parallel_initialized(1, 1)
        with set_forward_context(None, CONFIG):
            yield


def serve(
    name: str,
    dtype: torch.dtype = torch.float16,
    rank: int = RANK,
    fully_sharded: bool = False,
    diagonal: bool = False,
    eight_bit: str | None = None,
):
    """One wrapped layer with its bases, the wrapper, and Σ as a view into a buffer of more module slices.

    ``eight_bit``: how a collection of a rank below the buffers' stores the clusters; vLLM has the plain adapter alone.
    """
    g = torch.Generator().manual_seed(7)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    build, packed = LAYERS[name]
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        base_layer = build().to(DEVICE)
    finally:
        torch.set_default_dtype(previous)
    base_layer.weight.copy_(rand(*base_layer.weight.shape) / 8)
    base_layer.quant_method.process_weights_after_loading(base_layer)
    first = CLUSTERS if eight_bit else 0  # the base in vLLM's first slot
    slots = BASES - first
    config = LoRAConfig(
        max_loras=slots, max_lora_rank=rank, lora_dtype=dtype, fully_sharded_loras=fully_sharded, max_cpu_loras=slots
    )
    layer = from_layer(base_layer, slots, config, packed, None)
    widths = list(layer.output_slices)
    d_in, slices = layer.lora_a_stacked[0].shape[-1], len(widths)
    v = [rand(BASES, rank, d_in) / d_in**0.5 for _ in widths]
    u = [rand(BASES, width, rank) / rank**0.5 for width in widths]
    for a, b in zip(v, u, strict=True):  # a plain adapter of lower rank: vLLM pads with zeros
        a[PLAIN, PLAIN_RANK:], b[PLAIN, :, PLAIN_RANK:] = 0, 0
    for base in range(first, BASES):
        r = min(PLAIN_RANK, rank) if base == PLAIN else rank
        lora_a, lora_b = [a[base, :r] for a in v], [b[base, :, :r] for b in u]
        layer.set_lora(base - first, *((lora_a, lora_b) if slices > 1 else (lora_a[0], lora_b[0])))
    stored = []
    for i in range(slices if eight_bit else 0):
        steps_v, scale_v = quantized(v[i][:CLUSTERS, :STORED_RANK], eight_bit)
        steps_u, scale_u = quantized(u[i][:CLUSTERS, :, :STORED_RANK].mT, eight_bit)
        stored.append(QuantizedBasis(steps_u.mT.contiguous(), steps_v, scale_u, scale_v))
        v[i], u[i] = v[i].float(), u[i].float()
        v[i][:CLUSTERS], u[i][:CLUSTERS] = 0, 0
        v[i][:CLUSTERS, :STORED_RANK] = dequantized(steps_v, scale_v)
        u[i][:CLUSTERS, :, :STORED_RANK] = dequantized(steps_u, scale_u).mT
    identity = torch.ones(rank) if diagonal else torch.eye(rank)
    worker_wide = rand(ADAPTERS + 1, slices + 3, *identity.shape)
    worker_wide[IDENTITY] = identity
    sigma = worker_wide.to(DEVICE)[:, 2 : 2 + slices]
    register = CONFIG.compilation_config.static_forward_context
    wrapper = JDPunicaGPU(
        MAX_TOKENS,
        max_batches=8,
        device=DEVICE,
        bases=BASES,
        forward_context_layers=register,
        eight_bit=(CLUSTERS, STORED[eight_bit]) if eight_bit else None,
    )
    layer.set_mapping(wrapper.for_layer(name, layer, sigma))
    if eight_bit:
        parts = packed or [name]
        slices = SimpleNamespace(targets={part: f"the collection's {part}" for part in parts})
        in_collection = dict(zip(slices.targets.values(), stored, strict=True))
        manifest = SimpleNamespace(quantize=eight_bit)
        of_clusters = lambda name, clusters: QuantizedBasis(*(tensor[clusters] for tensor in in_collection[name]))  # noqa: E731
        reader = BaseReader(SimpleNamespace(manifest=manifest, quantized_basis=of_clusters), slices)

        def put_in_slot(cluster: int, slot: int) -> None:
            reader.into_8_bits(cluster, slot, {name: layer}, {name: packed} if packed else {})

        for cluster in range(CLUSTERS):
            put_in_slot(cluster, cluster)
    x = rand(MAX_TOKENS, d_in).to(DEVICE)
    served = SimpleNamespace(layer=layer, wrapper=wrapper, config=config, u=u, v=v, sigma=sigma, x=x, widths=widths)
    served.put_in_slot = put_in_slot if eight_bit else None
    _alive.append(served)
    return served


def bases_and_slots(batch: list) -> tuple[list[int], list[int]]:
    """Base and Σ slot of each token of a batch; adapter i lies in cluster i mod K."""
    places = {BASE_MODEL: (-1, -1), PLAIN_ADAPTER: (PLAIN, IDENTITY)}
    pairs = [places[who] if who in places else (who % CLUSTERS, who) for who in batch]
    return [base for base, _ in pairs], [slot for _, slot in pairs]


def set_step(wrapper, batch: list) -> None:
    """What the manager does before a forward; in vLLM's own wrapper base k has LoRA id k + 1."""
    bases, slots = bases_and_slots(batch)
    if isinstance(wrapper, JDPunicaGPU):
        wrapper.update_tokens(np.array(bases), np.array(slots))
        return
    ids = tuple(base + 1 for base in bases)
    wrapper.update_metadata(LoRAMapping(ids, ids[:1], True), [k + 1 for k in range(BASES)], BASES + 1, 100)


def base_output(served, x: torch.Tensor) -> torch.Tensor:
    return served.layer.base_layer.quant_method.apply(served.layer.base_layer, x, None)


def assert_equals_reference(served, y: torch.Tensor, y_base: torch.Tensor, x: torch.Tensor, batch: list, unit: float):
    bases, slots = bases_and_slots(batch + [BASE_MODEL] * (len(x) - len(batch)))
    y, y_base, x, sigma = y.cpu(), y_base.cpu(), x.cpu(), served.sigma.cpu()
    expected = reference.jd_linear(y_base, x, served.u, served.v, sigma, bases, slots)
    # Three roundings to the layer's dtype: of Σ V x on its way into U, of U Σ V x, and of the sum with y. The tenth
    # on top is for their products with each other and for fp32 sums.
    delta = (expected - y_base.float()).abs()
    bound = 1.1 * unit * (spread_of_rounding(served, x, sigma, bases, slots) + delta + expected.abs())
    error = (y.float() - expected).abs()
    assert torch.all(error <= bound), f"largest error {error.max()}, allowed there {bound[error == error.max()]}"
    untouched = torch.tensor(slots) < 0
    assert torch.equal(y[untouched], y_base[untouched])
    # The bound must be far below what the adapters add, else the comparison says nothing.
    assert untouched.all() or bound[~untouched].mean() < 50 * unit * delta[~untouched].mean()


def spread_of_rounding(served, x: torch.Tensor, sigma: torch.Tensor, bases: list, slots: list) -> torch.Tensor:
    """|U| |Σ V x| of each token: what one relative error in every component of Σ V x can do."""
    live = [max(base, 0) for base in bases]
    h = torch.stack([(v[live].float() @ x.float()[:, :, None])[:, :, 0] for v in served.v])
    scaled = reference.jd_sigma(h, sigma, slots).abs()
    spread = [(u[live].float().abs() @ part[:, :, None])[:, :, 0] for u, part in zip(served.u, scaled, strict=True)]
    return torch.cat(spread, dim=1)


def run_layer(served, x: torch.Tensor) -> torch.Tensor:
    return served.layer(x)[0]


@pytest.mark.parametrize(("dtype", "unit"), DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_a_mixed_batch_and_the_next_one_equal_the_reference(name, dtype, unit):
    """Both on the same padded rows, as a graph replay would: the second step must not see the first one's slots."""
    served = serve(name, dtype)
    x = served.x[:13]
    y_base = base_output(served, x)
    for batch in (MIXED, CHANGED):
        set_step(served.wrapper, batch)
        assert_equals_reference(served, run_layer(served, x), y_base, x, batch, unit)


@pytest.mark.parametrize("rank", [8, 32])
def test_other_ranks_equal_the_reference(rank):
    served = serve("gate_up_proj", rank=rank)
    x = served.x[: len(CHANGED)]
    set_step(served.wrapper, CHANGED)
    assert_equals_reference(served, run_layer(served, x), base_output(served, x), x, CHANGED, 2.0**-11)


@pytest.mark.parametrize("fully_sharded", [False, True])
def test_diagonal_scalings_equal_the_reference(fully_sharded):
    served = serve("qkv_proj", diagonal=True, fully_sharded=fully_sharded)
    x = served.x[:13]
    set_step(served.wrapper, MIXED)
    assert_equals_reference(served, run_layer(served, x), base_output(served, x), x, MIXED, 2.0**-11)


@pytest.mark.parametrize(
    ("name", "eight_bit", "options"),
    [
        ("qkv_proj", "int8", {}),
        ("down_proj", "fp8", {}),
        ("qkv_proj", "fp8", {"fully_sharded": True}),
        ("gate_up_proj", "int8", {"diagonal": True}),
    ],
)
def test_clusters_of_8_bits_beside_a_plain_adapter_equal_the_reference(name, eight_bit, options):
    served = serve(name, eight_bit=eight_bit, **options)
    layer = served.layer
    assert [stack.shape[0] for stack in layer.lora_a_stacked] == [1] * len(served.widths)  # 16 bits for the plain one
    x = served.x[:13]
    set_step(served.wrapper, MIXED)
    assert_equals_reference(served, run_layer(served, x), base_output(served, x), x, MIXED, 2.0**-11)


@pytest.mark.parametrize("eight_bit", [None, "int8"])
@pytest.mark.parametrize("name", LAYERS)
def test_bases_that_change_places_count_in_the_next_step(name, eight_bit):
    """As base slots are refilled: in buffers that stay where they are, below tables and plans that know addresses."""
    served = serve(name, eight_bit=eight_bit)
    x = served.x[:13]
    y_base = base_output(served, x)
    set_step(served.wrapper, MIXED)
    assert_equals_reference(served, run_layer(served, x), y_base, x, MIXED, 2.0**-11)
    for slot, cluster in ((0, 2), (2, 0)):
        if eight_bit:
            served.put_in_slot(cluster, slot)
        else:
            v, u = [part[cluster] for part in served.v], [part[cluster] for part in served.u]
            served.layer.set_lora(slot, *((v, u) if len(v) > 1 else (v[0], u[0])))
    order = [2, 1, 0, PLAIN]
    served.u, served.v = [part[order] for part in served.u], [part[order] for part in served.v]
    set_step(served.wrapper, MIXED)
    assert_equals_reference(served, run_layer(served, x), y_base, x, MIXED, 2.0**-11)


@pytest.mark.parametrize("name", ["qkv_proj", "down_proj"])  # vLLM shards gate_up_proj only from TP 2 on
def test_fully_sharded_layers_apply_scalings_after_the_gather(name):
    served = serve(name, fully_sharded=True)
    assert "Sharded" in type(served.layer).__name__
    x = served.x[:7]
    set_step(served.wrapper, CHANGED)
    assert_equals_reference(served, run_layer(served, x), base_output(served, x), x, CHANGED, 2.0**-11)


def test_a_step_without_adapters_between_two_with_some_keeps_every_bit_of_the_base_model():
    served = serve("down_proj")
    x = served.x[:7]
    y_base = base_output(served, x)
    for batch in (CHANGED, [BASE_MODEL] * 7, CHANGED):
        set_step(served.wrapper, batch)
        assert_equals_reference(served, run_layer(served, x), y_base, x, batch, 2.0**-11)


@pytest.fixture(scope="module")
def short_interpreted_shrink():
    """vLLM splits K into 64 parts of 256; of the 64 programs that the interpreter would run here, 63 are idle."""
    if not INTERPRETED:
        yield
        return
    from vllm.lora.ops.triton_ops import lora_shrink_op

    stock = lora_shrink_op.get_lora_op_configs
    with mock.patch.object(lora_shrink_op, "get_lora_op_configs", lambda *a, **k: stock(*a, **k) | {"split_k": 2}):
        yield


def test_a_plain_adapter_gets_what_vllm_alone_would_give(short_interpreted_shrink):
    served = serve("gate_up_proj")
    batch = [PLAIN_ADAPTER, BASE_MODEL, PLAIN_ADAPTER]
    x = served.x[: len(batch)]
    set_step(served.wrapper, batch)
    ours = run_layer(served, x)
    stock = PunicaWrapperGPU(MAX_TOKENS, max_batches=8, device=DEVICE, lora_config=served.config)
    set_step(stock, batch)
    served.layer.set_mapping(stock)
    theirs = run_layer(served, x)
    assert not torch.equal(ours, base_output(served, x))
    # The two split the input dimension differently, and round V x to fp16 from sums of another order.
    torch.testing.assert_close(ours, theirs, rtol=2.0**-9, atol=2.0**-9)


def test_dual_stream_layers_get_the_adapters_part_alone():
    """With add_inputs=False rows are overwritten, and those of the base model left alone."""
    served = serve("gate_up_proj")
    x = served.x[: len(CHANGED)]
    set_step(served.wrapper, CHANGED)
    layer = served.layer
    alone = torch.full_like(base_output(served, x), 7)
    overwritten = torch.zeros_like(alone)
    overwritten[CHANGED.index(BASE_MODEL)] = 7
    layer.punica_wrapper.add_lora_linear(
        alone, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0, layer.output_slices, add_inputs=False
    )
    assert_equals_reference(served, alone, overwritten, x, CHANGED, 2.0**-11)


def test_a_compiled_layer_follows_the_step_without_recompiling():
    served = serve("down_proj")
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    layer = served.layer

    @torch.compile(backend=count, fullgraph=True, dynamic=True)
    def lora_part(y, x):
        layer.punica_wrapper.add_lora_linear(y, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0, layer.output_slices)

    for batch in (MIXED, CHANGED, [BASE_MODEL] * 4, CHANGED):
        x = served.x[: len(batch)]
        y_base = base_output(served, x)
        y = y_base.clone()
        set_step(served.wrapper, batch)
        lora_part(y, x)
        assert_equals_reference(served, y, y_base, x, batch, 2.0**-11)
    assert len(graphs) == 1


def test_functionalised_graphs_keep_the_order_of_shrink_scaling_and_expand():
    """vLLM compiles through AOTAutograd, which turns in-place ops into values."""
    served = serve("down_proj")
    layer, x = served.layer, served.x[: len(CHANGED)]
    y_base = base_output(served, x)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def forward(y, x):
        y = y.clone()
        layer.punica_wrapper.add_lora_linear(y, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0, layer.output_slices)
        return y

    set_step(served.wrapper, CHANGED)
    assert_equals_reference(served, forward(y_base, x), y_base, x, CHANGED, 2.0**-11)


def test_more_tokens_than_the_buffers_hold_are_refused():
    wrapper = serve("down_proj").wrapper
    with pytest.raises(JDLoRAError, match="max-num-batched-tokens"):
        set_step(wrapper, [BASE_MODEL] * (MAX_TOKENS + 1))


def test_batch_invariant_servers_give_a_request_the_same_bits_beside_any_other():
    with mock.patch("vllm.envs.VLLM_BATCH_INVARIANT", True, create=True):
        served = serve("qkv_proj")
    x = served.x[: len(MIXED)]
    set_step(served.wrapper, MIXED)
    together = run_layer(served, x)
    set_step(served.wrapper, MIXED[4:5])
    base = base_output(served, x)[4:5]  # a base GEMM of another height may round otherwise; ours is what is tested
    alone = base.clone()
    served.layer.punica_wrapper.add_lora_linear(alone, x[4:5], (), (), 1.0, ())
    assert torch.equal(alone[0], together[4])


def test_a_layer_without_scalings_is_refused():
    served = serve("down_proj")
    set_step(served.wrapper, CHANGED)
    served.layer.set_mapping(served.wrapper)
    with pytest.raises(RuntimeError, match="should have been refused"):
        run_layer(served, served.x[: len(CHANGED)])
