"""The Triton Σ kernel means what the fp32 loops of ``reference.py`` mean, in the interpreter or on a GPU.

Not collected by itself: ``test_triton_sigma.py`` runs this file in a process where Triton is interpreted.
"""

import os

import pytest
import torch

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.kernels import reference, triton_sigma

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
SLOTS, OTHER_SLICES = 9, 2
RANKS, TOKENS = (8, 16, 32, 64), (1, 2, 3, 7, 16, 33, 133)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
KINDS = ("identical", "distinct", "uniform", "base")
HAS_LORA, NO_LORA = torch.tensor([False]), torch.tensor([True])
FP32_EPS = 2.0**-23


def popularity(kind: str, tokens: int, g: torch.Generator) -> torch.Tensor:
    """int32 [T], the scaling slot of each token; −1 for the base model."""
    slots = {
        "identical": torch.full((tokens,), 3),
        "distinct": torch.arange(tokens) % SLOTS,
        "uniform": torch.randint(-1, SLOTS, (tokens,), generator=g),
        "base": torch.full((tokens,), -1),
    }[kind]
    return slots.to(torch.int32)


def problem(slices: int, tokens: int, rank: int, dtype: torch.dtype, diagonal: bool, kind: str):
    """h [slices, T, R], Σ as a view into a buffer of more slices, slots [T + padding]; −1 rows of h hold NaN."""
    g = torch.Generator().manual_seed(1000 * tokens + rank)
    matrix = (rank,) if diagonal else (rank, rank)
    worker_wide = torch.randn(SLOTS, slices + OTHER_SLICES, *matrix, generator=g).to(dtype).to(DEVICE)
    slots = popularity(kind, tokens, g)
    h = torch.randn(slices, tokens, rank, generator=g)
    h[:, slots < 0] = torch.nan
    padded = torch.cat([slots, torch.full((5,), -1, dtype=torch.int32)])
    return h.to(DEVICE), worker_wide[:, 1 : 1 + slices], padded.to(DEVICE)


def assert_equals_reference(h, sigma, token_slot, call=triton_sigma.jd_sigma_):
    tokens, rank = h.shape[1:]
    slots = token_slot[:tokens].tolist()
    h_cpu, sigma_cpu = h.cpu(), sigma.cpu()
    expected = reference.jd_sigma(h_cpu, sigma_cpu, slots)
    # Two fp32 sums of the same R products in different orders differ by at most 2 R eps Σ|products|.
    magnitude = reference.jd_sigma(h_cpu.abs(), sigma_cpu.abs(), slots)
    call(h, sigma, token_slot, HAS_LORA)
    error = (h.cpu() - expected).abs()
    assert torch.all(error <= 2 * rank * FP32_EPS * magnitude), f"largest error {error.max()}"
    base = torch.tensor(slots) < 0
    assert torch.equal(h.cpu()[:, base], torch.zeros_like(expected[:, base]))


@pytest.mark.parametrize("diagonal", [False, True], ids=["full", "diag"])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("rank", RANKS)
def test_every_rank_and_batch_size_equals_the_reference(rank, tokens, diagonal):
    # The other axes take turns here; their full product follows on one size.
    turn = RANKS.index(rank) + TOKENS.index(tokens)
    case = problem(1 + turn % 3, tokens, rank, DTYPES[turn % 3], diagonal, ("uniform", "distinct")[turn % 2])
    assert_equals_reference(*case)


@pytest.mark.parametrize("diagonal", [False, True], ids=["full", "diag"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slices", [1, 2, 3])
def test_every_mix_of_adapters_equals_the_reference(slices, dtype, kind, diagonal):
    assert_equals_reference(*problem(slices, 7, 16, dtype, diagonal, kind))


@pytest.mark.parametrize("diagonal", [False, True], ids=["full", "diag"])
@pytest.mark.parametrize("rank", [1, 128, 256, 320, 512])
def test_the_other_ranks_of_vllm_equal_the_reference(rank, diagonal):
    """1 and 320 are padded inside the kernel, 128 and more are read in several groups of rows."""
    assert_equals_reference(*problem(2, 3, rank, torch.bfloat16, diagonal, "distinct"))


def test_an_identity_scaling_changes_no_bit():
    """What plain adapters rely on: they go through the same op with an identity Σ."""
    h, _, _ = problem(2, 7, 16, torch.bfloat16, False, "identical")
    sigma = torch.eye(16, dtype=torch.bfloat16, device=DEVICE).expand(4, 2, 16, 16).contiguous()
    before = h.clone()
    triton_sigma.jd_sigma_(h, sigma, torch.full((7,), 3, dtype=torch.int32, device=DEVICE), HAS_LORA)
    assert torch.equal(h, before)


def test_a_row_does_not_depend_on_its_batch():
    h, sigma, slots = problem(1, 33, 32, torch.bfloat16, False, "uniform")
    token = int((slots >= 0).nonzero()[-1])
    alone, slot_alone = h[:, token : token + 1].clone(), slots[token : token + 1].clone()
    triton_sigma.jd_sigma_(h, sigma, slots, HAS_LORA)
    triton_sigma.jd_sigma_(alone, sigma, slot_alone, HAS_LORA)
    assert torch.equal(alone[0, 0], h[0, token])


def test_a_batch_without_adapters_is_not_touched():
    h, sigma, slots = problem(1, 7, 16, torch.float16, False, "identical")
    before = h.clone()
    triton_sigma.jd_sigma_(h, sigma, slots, NO_LORA)
    assert torch.equal(h, before)


def test_a_batch_of_no_tokens_is_accepted():
    h, sigma, slots = problem(2, 0, 16, torch.float16, False, "identical")
    triton_sigma.jd_sigma_(h, sigma, slots, HAS_LORA)


def test_the_torch_op_is_the_same_function():
    assert_equals_reference(
        *problem(3, 7, 16, torch.bfloat16, False, "uniform"), call=torch.ops.vllm_jdlora.sigma_.default
    )


def test_torch_accepts_schema_and_fake_of_the_op():
    arguments = (*problem(2, 3, 16, torch.float32, False, "distinct"), HAS_LORA)
    torch.library.opcheck(
        torch.ops.vllm_jdlora.sigma_.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


def test_a_compiled_graph_follows_the_flag_and_the_slots_without_recompiling():
    compilations = []

    def count(graph, _):
        compilations.append(graph)
        return graph

    @torch.compile(backend=count, fullgraph=True, dynamic=True)
    def run(h, sigma, token_slot, no_lora):
        torch.ops.vllm_jdlora.sigma_(h, sigma, token_slot[: h.shape[1]], no_lora)

    for kind in ("uniform", "distinct", "base"):
        assert_equals_reference(*problem(2, 7, 16, torch.float16, False, kind), call=run)
    h, sigma, slots = problem(2, 7, 16, torch.float16, False, "identical")
    before = h.clone()
    run(h, sigma, slots, NO_LORA)
    assert torch.equal(h, before)
    assert len(compilations) == 1


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_a_replayed_cuda_graph_follows_changed_slots():
    h, sigma, slots = problem(3, 33, 16, torch.bfloat16, False, "distinct")
    source = h.clone()
    triton_sigma.jd_sigma_(h, sigma, slots, HAS_LORA)  # compile before capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        triton_sigma.jd_sigma_(h, sigma, slots, HAS_LORA)
    for kind in ("uniform", "identical", "base"):
        slots[:33] = popularity(kind, 33, torch.Generator().manual_seed(1)).to(DEVICE)
        h.copy_(source)
        assert_equals_reference(h, sigma, slots, call=lambda *_: graph.replay())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, sigma, slots: (h.half(), sigma, slots), "h must be contiguous fp32"),
        (lambda h, sigma, slots: (h.transpose(0, 1), sigma, slots), "h must be contiguous fp32"),
        (lambda h, sigma, slots: (h, sigma[:, :1], slots), "does not fit"),
        (lambda h, sigma, slots: (h, sigma.transpose(2, 3), slots), "dense row by row"),
        (lambda h, sigma, slots: (h, sigma.double(), slots), "bf16, fp16 or fp32"),
        (lambda h, sigma, slots: (h, sigma, slots.long()), "token_slot must be int32"),
        (lambda h, sigma, slots: (h, sigma, slots[:6]), "token_slot must be int32"),
    ],
)
def test_tensors_of_another_layout_are_refused(change, message):
    case = problem(2, 7, 16, torch.float32, False, "uniform")
    with pytest.raises(JDLoRAError, match=message):
        triton_sigma.jd_sigma_(*change(*case), HAS_LORA)
