"""The Triton kernels mean what the fp32 loops of ``reference.py`` mean, in the interpreter or on a GPU.

Not collected by itself: ``test_triton_grouped.py`` runs this file in a process where Triton is interpreted. Scratch is
full of NaN before every call: a kernel that reads a row which nothing has written fails everywhere.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.kernels import reference, triton_expand, triton_grouped, triton_shrink, triton_sigma
from vllm_jdlora.kernels.eight_bit_bases import WidenedBases
from vllm_jdlora.kernels.gpu_problem import Problem, make_problem
from vllm_jdlora.kernels.packed_module import PackedModule
from vllm_jdlora.kernels.triton_grouped import fuses_scaling
from vllm_jdlora.kernels.triton_shrink import Launch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
CLUSTERS, SLOTS = 3, 7
FP32_EPS = 2.0**-23
# Unit roundoff. The interpreter cuts bf16 off instead of rounding it: twice the error.
UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7 if INTERPRETED else 2.0**-8}
KINDS = ("identical", "distinct", "uniform", "one cluster", "base")


def popularity(kind: str, tokens: int, seed: int = 0) -> np.ndarray:
    """Scaling slot of each token; −1 is the base model, which ``uniform`` mixes in."""
    rng = np.random.default_rng(seed)
    return {
        "identical": np.full(tokens, 3),
        "distinct": np.arange(tokens) % SLOTS,
        "uniform": rng.integers(-1, SLOTS, tokens),
        "one cluster": rng.integers(0, SLOTS // CLUSTERS, tokens) * CLUSTERS,
        "base": np.full(tokens, -1),
    }[kind]


def problem(
    *,
    widths: tuple[int, ...] = (48, 16),
    rank: int = 16,
    d_in: int = 80,
    dtype: torch.dtype = torch.float16,
    tokens: int = 5,
    padding: int = 2,
    kind: str = "uniform",
    clusters: int = CLUSTERS,
    **options: Any,
) -> Problem:
    """A step of ``tokens`` tokens on ``padding`` more rows."""
    case = make_problem(
        d_in,
        widths,
        rank=rank,
        clusters=clusters,
        slots=SLOTS,
        tokens=tokens + padding,
        dtype=dtype,
        device=DEVICE,
        **options,
    )
    case.step(popularity(kind, tokens))
    return case


def expected(case: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """y of the loops, and by how much a kernel may differ from it."""
    x, y, sigma = case.x.cpu(), case.y.cpu(), case.sigma.cpu()
    clusters, slots = case.cluster, case.slot
    h = reference.jd_shrink(x, case.v, clusters)
    # fp32 sums in another order: far below one rounding, but it passes through Σ, which may enlarge it.
    h_spread = reference.jd_shrink(x.abs(), [v.abs() for v in case.v], clusters)
    g_spread = reference.jd_sigma(h_spread, sigma.abs(), slots)
    unit, u_abs = UNIT[case.module.dtype], [u.abs() for u in case.u]
    zero = torch.zeros_like(y, dtype=torch.float32)
    # Two roundings to the layer's dtype: of Σ V x on its way into U, and of the sum with y.
    rounded = reference.jd_expand(zero, reference.jd_sigma(h, sigma, slots).abs(), u_abs, clusters)
    order = reference.jd_expand(zero, g_spread, u_abs, clusters)
    y = reference.jd_linear(y, x, case.u, case.v, sigma, clusters, slots)
    return y, 1.1 * unit * (rounded + y.abs()) + 8 * FP32_EPS * order


def assert_equals_reference(case: Problem, y: torch.Tensor) -> None:
    truth, bound = expected(case)
    error = (y.cpu().float() - truth).abs()
    base = case.base_rows
    assert torch.all(error[~base] <= bound[~base]), f"{error.max()}, allowed there {bound[error == error.max()]}"
    assert torch.equal(y.cpu()[base], case.y.cpu()[base])
    # The bound must be far below what the adapters add, else the comparison says nothing.
    delta = (truth - case.y.cpu().float()).abs()
    assert base.all() or bound[~base].mean() < 30 * UNIT[case.module.dtype] * delta[~base].mean()


def run(case: Problem, x: torch.Tensor | None = None) -> torch.Tensor:
    y = case.y.clone()
    case.kernels.linear_(y, case.x if x is None else x, case.module, case.sigma)
    return y


@pytest.mark.parametrize("diagonal", [False, True], ids=["full", "diag"])
@pytest.mark.parametrize("rank", [8, 16, 24, 64])
@pytest.mark.parametrize("dense", [False, True], ids=["by cluster", "all clusters"])
def test_every_rank_equals_the_reference(rank, diagonal, dense):
    """At so few tokens Σ is part of the expand; three launches follow below."""
    dtype, kind = (torch.float16, "uniform") if dense else (torch.bfloat16, "distinct")
    case = problem(rank=rank, diagonal=diagonal, dtype=dtype, kind=kind, dense=dense)
    assert case.kernels._launch(len(case.x), case.module).dense == dense
    assert_equals_reference(case, run(case))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("clusters", "tokens"), [(1, 5), (5, 18)])
def test_the_v_of_all_clusters_gives_each_token_its_own(clusters, tokens, kind):
    """With clusters that no token is in, and with more tokens than a tile has, which serving leaves to the other form.

    In one part, as here, the sums are those of the other form; the interpreter's products are numpy's, which may add
    them in another order for another shape, so the last bit of the result can differ.
    """
    cases = [problem(clusters=clusters, tokens=tokens, kind=kind, d_in=48, dense=dense) for dense in (True, False)]
    together, by_cluster = map(run, cases)
    assert_equals_reference(cases[0], together)
    step = torch.finfo(by_cluster.dtype).eps
    torch.testing.assert_close(together, by_cluster, rtol=2 * step, atol=2 * step)


@pytest.mark.parametrize("diagonal", [False, True], ids=["full", "diag"])
@pytest.mark.parametrize("rank", [8, 16, 24, 64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_three_launches_equal_the_reference(rank, diagonal, dtype):
    case = problem(rank=rank, diagonal=diagonal, dtype=dtype, batch_invariant=True)
    assert not fuses_scaling(len(case.x), rank, batch_invariant=True)
    assert_equals_reference(case, run(case))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("widths", [(16,), (32, 32), (144, 16, 16)], ids=str)
def test_every_mix_of_adapters_and_slices_equals_the_reference(widths, kind):
    case = problem(widths=widths, kind=kind, tokens=18, d_in=48)
    assert_equals_reference(case, run(case))


@pytest.mark.parametrize("rank", [1, 128, 320])
def test_the_other_ranks_of_vllm_equal_the_reference(rank):
    """1 and 320 are no powers of two that ``tl.dot`` takes; from 128 on the expand reads U in several blocks."""
    case = problem(rank=rank, tokens=2, padding=1, kind="distinct", widths=(32,))
    assert_equals_reference(case, run(case))


@pytest.mark.parametrize("d_in", [72, 130, 300])
def test_inputs_that_are_no_multiple_of_a_block_equal_the_reference(d_in):
    case = problem(d_in=d_in, widths=(24, 40))
    assert_equals_reference(case, run(case))


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_a_split_input_is_added_up(batch_invariant):
    case = problem(d_in=1100, batch_invariant=batch_invariant)
    launch = case.kernels._launch(len(case.x), case.module)
    assert 1 < launch.parts < 9 or not batch_invariant
    assert launch.parts * launch.iterations * 128 >= 1100
    assert_equals_reference(case, run(case))


def test_tall_tiles_of_prefill_steps_equal_the_reference(monkeypatch):
    """Steps of more than 512 tokens, brought down to a size that can be interpreted."""
    monkeypatch.setattr("vllm_jdlora.kernels.triton_shrink.PREFILL_TOKENS", 16)
    case = problem(tokens=75, kind="one cluster", widths=(32,), d_in=48, rank=32)
    assert case.kernels._launch(len(case.x), case.module).rows == 32
    assert_equals_reference(case, run(case))


def test_scalings_wider_than_the_bases_keep_their_bits():
    case = problem(sigma_dtype=torch.float32)
    assert_equals_reference(case, run(case))


def test_an_identity_scaling_is_plain_lora():
    """What plain adapters rely on: they go through the same launches with an identity Σ."""
    case = problem(kind="identical", batch_invariant=True)
    case.sigma.copy_(torch.eye(16))
    h = reference.jd_shrink(case.x.cpu(), case.v, case.cluster).half().float()
    plain = reference.jd_expand(case.y.cpu(), h, case.u, case.cluster)
    torch.testing.assert_close(run(case).cpu().float(), plain, rtol=2 * UNIT[torch.float16], atol=1e-5)


def test_the_same_addresses_serve_the_next_step():
    """As a graph replay would: padded rows and launches stay, the plan changes."""
    case = problem(tokens=18, padding=4)
    for kind, tokens in (("uniform", 18), ("distinct", 7), ("base", 18), ("one cluster", 22)):
        case.step(popularity(kind, tokens, seed=tokens))
        assert_equals_reference(case, run(case))


def test_a_replayed_graph_of_a_step_without_adapters_changes_nothing():
    """Launches captured with adapters find no tile when there are none."""
    case = problem(kind="distinct")
    live = case.kernels.tiles.live
    case.step(popularity("base", 5))
    case.kernels.tiles.live = live  # what the capture saw
    assert torch.equal(run(case), case.y)


def test_a_token_has_equal_bits_in_any_batch():
    case = problem(tokens=20, kind="uniform", batch_invariant=True, d_in=300)
    together = run(case)
    token = int(np.flatnonzero(np.array(case.slot) >= 0)[-1])
    case.kernels.tiles.plan(np.array(case.cluster[token : token + 1]), np.array(case.slot[token : token + 1]))
    alone = case.y[token : token + 1].clone()
    case.kernels.linear_(alone, case.x[token : token + 1], case.module, case.sigma)
    assert torch.equal(alone[0], together[token])


def test_sizes_depend_on_no_token_count_where_bits_must_not():
    sizes = {
        (launch.rows, launch.parts, launch.iterations)
        for tokens in (1, 7, 64, 512, 513, 8192)
        for launch in [Launch.of(tokens, 16, 48, 4096, 132, batch_invariant=True)]
    }
    assert len(sizes) == 1


@pytest.mark.parametrize("fully_padded", [False, True])
def test_shrink_and_expand_with_a_gather_between_equal_the_reference(fully_padded):
    """``--fully-sharded-loras``: Σ after the gather; rows without an adapter of h stay what they were."""
    case = problem(kind="base" if fully_padded else "uniform", tokens=9)
    h = torch.full((2, len(case.x), 16), 5.0, device=DEVICE)
    case.kernels.shrink_(h, case.x, case.module)
    live = case.kernels.tiles.live
    assert torch.equal(h[:, live:].cpu(), torch.full_like(h[:, live:].cpu(), 5.0))
    order = case.kernels.tiles.sorted_token[:live].long().cpu()
    truth = reference.jd_shrink(case.x.cpu(), case.v, case.cluster)[:, order]
    torch.testing.assert_close(h[:, :live].cpu(), truth, rtol=1e-4, atol=1e-5)  # fp32 sums in another order
    y = case.y.clone()
    case.kernels.expand_(y, h, case.module, case.sigma)
    assert_equals_reference(case, y)


def test_ranks_split_over_two_gpus_equal_the_whole():
    """Each rank shrinks with its half of V; the gather puts the halves side by side."""
    case, halves = problem(kind="distinct"), []
    for part in (slice(0, 8), slice(8, 16)):
        shard = PackedModule.of([v[:, :, part].contiguous() for v in case.module.v], case.module.u)
        h = torch.zeros(2, len(case.x), 8, device=DEVICE)
        case.kernels.shrink_(h, case.x, shard)
        halves.append(h)
    y = case.y.clone()
    case.kernels.expand_(y, torch.cat(halves, dim=2), case.module, case.sigma)
    assert_equals_reference(case, y)


def test_columns_may_start_inside_y_and_be_written_over():
    """Row-parallel sharded layers write their share of columns; dual-stream layers want the adapters' part alone."""
    case = problem(widths=(32,), kind="distinct", padding=0)
    wide = torch.full((len(case.x), 64), 7.0, dtype=torch.float16, device=DEVICE)
    h = torch.zeros(1, len(case.x), 16, device=DEVICE)
    case.kernels.shrink_(h, case.x, case.module)
    case.kernels.expand_(wide, h, case.module, case.sigma, first_column=16, add_inputs=False)
    alone = replace(case, y=torch.zeros_like(case.y))
    assert_equals_reference(alone, wide[:, 16:48])
    assert (wide[:, :16] == 7).all() and (wide[:, 48:] == 7).all()


@pytest.mark.parametrize("eight_bit", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize(
    ("rank", "options"),
    [
        (16, {}),
        (8, {"dtype": torch.bfloat16, "dense": False}),
        (24, {"diagonal": True}),
        (16, {"batch_invariant": True, "dtype": torch.bfloat16}),
        (128, {"diagonal": True, "widths": (32,), "tokens": 4}),
    ],
    ids=str,
)
def test_bases_of_8_bits_equal_the_reference_on_what_a_collection_gives_back(eight_bit, rank, options):
    """Their scales are as far apart as 1 and 8; the last two clusters are of 16 bits, plain adapters'."""
    case = problem(rank=rank, eight_bit=eight_bit, clusters=2, kind="distinct", **options)
    assert {tensor.element_size() for tensor in case.module.eight_bit.v + case.module.eight_bit.u} == {1}
    assert set(case.cluster) >= {0, 1, 2, 3} and case.module.clusters == 4
    assert_equals_reference(case, run(case))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("eight_bit", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_every_number_of_8_bits_is_widened_exactly(eight_bit, dtype):
    """One-hot inputs bring each of the 256 (fp8: 254, without NaN) to y, once from V and once from U."""
    numbers = torch.arange(256, dtype=torch.uint8).view(eight_bit).float().nan_to_num(0).view(16, 16)
    case = problem(eight_bit=eight_bit, clusters=1, d_in=16, widths=(16,), dtype=dtype, tokens=16, padding=0)
    bases, one = case.module.eight_bit, torch.eye(16)
    # Powers of two: nothing is rounded.
    bases.set_scales(0, 0, torch.full((16,), 2.0**-4), torch.full((16,), 2.0**-3))
    case.sigma.copy_(one)
    case.x.copy_(one)
    case.step(np.zeros(16, dtype=np.int64), clusters=1)
    for v, u in ((numbers, one), (one, numbers)):
        bases.v[0].copy_(v)
        bases.u[0].copy_(u)
        case.y.zero_()
        assert torch.equal(run(case).cpu().float(), (u @ v).T * 2.0**-7)


def test_8_bits_after_a_gather_equal_the_reference():
    """``--fully-sharded-loras``: the scales of V belong to the shrink, those of U to the expand."""
    case = problem(eight_bit=torch.int8, clusters=2, tokens=9)
    h = torch.full((2, len(case.x), 16), torch.nan, device=DEVICE)
    case.kernels.shrink_(h, case.x, case.module)
    y = case.y.clone()
    case.kernels.expand_(y, h, case.module, case.sigma)
    assert_equals_reference(case, y)


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_a_replayed_cuda_graph_follows_the_plan():
    case = problem(tokens=40, padding=8, kind="distinct", dtype=torch.bfloat16)
    y = case.y.clone()
    case.kernels.linear_(y, case.x, case.module, case.sigma)  # compile before capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.kernels.linear_(y, case.x, case.module, case.sigma)
    for kind, tokens in (("uniform", 40), ("one cluster", 48), ("base", 3), ("distinct", 11)):
        case.step(popularity(kind, tokens, seed=tokens))
        y.copy_(case.y)
        graph.replay()
        assert_equals_reference(case, y)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v, u: ([v[0].float()], [u[0].float()]), "fp16 or bf16"),
        (lambda v, u: ([v[0].transpose(2, 3)], u), "dense and aligned"),
        (lambda v, u: (v, [u[0].bfloat16()]), "dense and aligned"),
        (lambda v, u: (v, [u[0][:2]]), "other clusters"),
        (lambda v, u: (v * 2, [u[0], u[0][:, :, :, :8].contiguous()]), "one rank"),
    ],
)
def test_bases_of_another_layout_are_refused(change, message):
    v, u = torch.zeros(3, 1, 16, 32).half(), torch.zeros(3, 1, 48, 16).half()
    with pytest.raises(JDLoRAError, match=message):
        PackedModule.of(*change([v], [u]))


def test_8_bits_of_another_shape_or_number_are_refused():
    v, u = [torch.zeros(1, 1, 16, 32).half()], [torch.zeros(1, 1, 48, 16).half()]
    with pytest.raises(JDLoRAError, match="int8 or float8_e4m3fn"):
        WidenedBases.beside(v, u, 3, torch.float8_e5m2)
    with pytest.raises(JDLoRAError, match="shapes of the 16-bit ones"):
        PackedModule.of(v, u, WidenedBases.beside(v, [u[0][:, :, :16]], 3, torch.int8))


def test_rows_of_another_layout_and_a_plan_for_more_tokens_are_refused():
    case = problem(kind="distinct")
    with pytest.raises(JDLoRAError, match="dense rows"):
        run(case, x=case.x.float())
    with pytest.raises(JDLoRAError, match="dense rows"):
        run(case, x=case.x.t().contiguous().t())
    with pytest.raises(JDLoRAError, match="plan is for 5 tokens"):
        run(case, x=case.x[:4])


class OnlyViews(TorchDispatchMode):
    """Refuses whatever allocates, copies or waits."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        assert operator.is_view, f"a step calls {operator}"
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("tokens", "options"),
    [(5, {}), (5, {"eight_bit": torch.int8}), (40, {"rank": 64}), (40, {"rank": 64, "eight_bit": torch.int8})],
    ids=str,
)
def test_a_step_only_launches_and_the_same_whatever_is_in_it(monkeypatch, tokens, options):
    """What a CUDA graph demands: no allocation, no wait, and grids and sizes of padded tokens and shapes alone."""
    launches: list[tuple] = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: launches.append((grid, [a for a in args if isinstance(a, int)], kwargs))

    for module, kernel in ((triton_shrink, "shrink"), (triton_sigma, "sigma"), (triton_expand, "expand")):
        monkeypatch.setattr(module, f"{kernel}_kernel", Recorder())
    case = problem(tokens=tokens, padding=2, **options)
    h = torch.zeros(2, len(case.x), case.module.rank, device=DEVICE)
    steps = []
    for kind, count in (("distinct", tokens), ("one cluster", 1), ("uniform", tokens + 2)):
        case.step(popularity(kind, count))
        launches.clear()
        with OnlyViews():
            case.run_(case.y)
            case.kernels.shrink_(h, case.x, case.module)
            case.kernels.expand_(case.y, h, case.module, case.sigma)
        steps.append(list(launches))
    assert len(steps[0]) == 4 + (2 if tokens < 10 else 3)
    assert steps[1] == steps[0] and steps[2] == steps[0]


def test_nothing_is_launched_for_a_step_without_adapters(monkeypatch):
    case = problem(kind="base")
    monkeypatch.setattr(triton_grouped, "jd_shrink_", None)
    assert torch.equal(run(case), case.y)
