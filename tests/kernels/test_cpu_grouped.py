"""The CPU kernel means what the fp32 loops of ``reference.py`` mean, whoever is in the batch, in each of its forms."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import llvmlite.binding
import numpy as np
import pytest
import torch

from vllm_jdlora.collection.quantize import STORED, dequantized, quantized
from vllm_jdlora.kernels import cpu_threads, reference
from vllm_jdlora.kernels.cpu_grouped import PackedLinear, TokenGroups
from vllm_jdlora.kernels.cpu_layout import Form
from vllm_jdlora.kernels.eight_bit_bases import EightBitBases

WIDTHS, D_IN, CLUSTERS, SLOTS = (72, 16, 24), 40, 5, 7

FEATURES = llvmlite.binding.get_host_cpu_features()
FORMS = {
    "bf16 pairs": Form(torch.bfloat16, True, 16),
    "bf16 widened, 16 lanes": Form(torch.bfloat16, False, 16),
    "bf16 widened, 8 lanes": Form(torch.bfloat16, False, 8),
    "fp32, 16 lanes": Form(torch.float32, False, 16),
    "fp32, 8 lanes": Form(torch.float32, False, 8),
}
if not FEATURES.get("avx512bf16"):
    del FORMS["bf16 pairs"]
EIGHT_BIT_FORMS = {
    f"{kind}, {name}": replace(form, eight_bit=dtype)
    for kind, dtype in STORED.items()
    for name, form in FORMS.items()
    if not form.pairs or FEATURES.get("avx512vbmi")
}
ALL_FORMS = FORMS | EIGHT_BIT_FORMS
FP32 = FORMS["fp32, 8 lanes"]


def popularity(kind: str, tokens: int, rng: np.random.Generator) -> np.ndarray:
    """Scaling slot of each token, −1 for the base model."""
    if kind == "identical":
        return np.full(tokens, 3)
    if kind == "distinct":
        return np.arange(tokens) % SLOTS
    if kind == "uniform":
        return rng.integers(-1, SLOTS, tokens)
    if kind == "skewed":
        return np.minimum(rng.geometric(0.5, tokens) - 1, SLOTS - 1)
    return np.full(tokens, -1)


class Problem:
    """A linear module with bases and Σ as stored in a form, and its reference."""

    def __init__(self, tokens: int, rank: int, form: Form, diagonal: bool = False, widths=WIDTHS, d_in=D_IN):
        g = torch.Generator().manual_seed(tokens * 1000 + rank)

        def rand(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=g)

        stored = form.stored
        self.u = [(rand(CLUSTERS, w, rank) / rank).to(stored) for w in widths]
        self.v = [(rand(CLUSTERS, rank, d_in) / d_in**0.5).to(stored) for _ in widths]
        if form.eight_bit is not None:
            kind = next(name for name, dtype in STORED.items() if dtype == form.eight_bit)
            self.u_stored = [quantized(u.mT, kind) for u in self.u]
            self.v_stored = [quantized(v, kind) for v in self.v]
            self.u = [dequantized(*u).mT for u in self.u_stored]
            self.v = [dequantized(*v) for v in self.v_stored]
        scalings = rand(SLOTS, len(widths), rank) if diagonal else rand(SLOTS, len(widths), rank, rank)
        self.sigma = scalings.to(stored) if diagonal else scalings.to(stored).mT
        self.y, self.x = rand(tokens, sum(widths)).to(stored), rand(tokens, d_in).to(stored)
        self.linear = PackedLinear(widths, d_in, rank, CLUSTERS, form, self.sigma)
        for cluster in range(CLUSTERS):
            self.write(cluster)
        self.form = form

    def write(self, cluster: int) -> None:
        if self.linear.form.eight_bit is None:
            self.linear.write(cluster, [u[cluster] for u in self.u], [v[cluster] for v in self.v])
            return
        v, u = [v[:1, None] for v in self.v], [u[:1, None] for u in self.u]
        one = EightBitBases.beside(v, u, 1, self.linear.form.eight_bit)
        for i, ((u_numbers, u_scale), (v_numbers, v_scale)) in enumerate(
            zip(self.u_stored, self.v_stored, strict=True)
        ):
            one.u[i].view(torch.int8).copy_(u_numbers[cluster].view(torch.int8).mT)
            one.v[i].view(torch.int8).copy_(v_numbers[cluster].view(torch.int8))
            one.set_scales(0, i, v_scale[cluster], u_scale[cluster])
        self.linear.write_8_bits(cluster, one)

    def check(self, clusters: np.ndarray, slots: np.ndarray, threads: int | None = None) -> torch.Tensor:
        who = clusters.tolist(), slots.tolist()
        expected = reference.jd_linear(self.y, self.x, self.u, self.v, self.sigma, *who)
        out = self.run(clusters, slots, threads)
        # Sums of up to 64 products in another order.
        rtol, atol = 1e-4, 1e-4
        if self.form.stored == torch.bfloat16:
            rtol = 2**-8  # y is rounded to 8 bits
        if self.form.pairs:
            atol += 2**-9 * self.largest_sum(*who)  # so is Σ h, before U
        torch.testing.assert_close(out.float(), expected, rtol=rtol, atol=atol)
        base = torch.from_numpy((clusters < 0) | (slots < 0))
        assert torch.equal(out[base], self.y[base])
        return out

    def largest_sum(self, clusters: list[int], slots: list[int]) -> float:
        """Of the absolute values of the products of U and Σ h that an output is the sum of."""
        largest = 0.0
        for x, c, s in zip(self.x.float(), clusters, slots, strict=True):
            for i in range(len(self.u)) if c >= 0 and s >= 0 else ():
                h = self.v[i][c].float() @ x
                sigma = self.sigma[s, i].float()
                g = sigma @ h if sigma.ndim == 2 else sigma * h
                largest = max(largest, float((self.u[i][c].float().abs() @ g.abs()).max()))
        return largest

    def run(self, clusters: np.ndarray, slots: np.ndarray, threads: int | None = None) -> torch.Tensor:
        out = self.y.clone()
        self.linear.add_(out, self.x, TokenGroups.plan(clusters, slots, threads))
        return out


def of_slots(slots: np.ndarray) -> np.ndarray:
    return np.where(slots < 0, -1, slots % CLUSTERS)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("kind", ["identical", "distinct", "uniform", "skewed", "base"])
@pytest.mark.parametrize("rank", [8, 16, 32, 64])
@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 16, 33, 133])
def test_mixed_batches_equal_the_reference(tokens, rank, kind, form):
    slots = popularity(kind, tokens, np.random.default_rng(tokens))
    Problem(tokens, rank, form).check(of_slots(slots), slots)


@pytest.mark.parametrize("form", EIGHT_BIT_FORMS.values(), ids=EIGHT_BIT_FORMS)
@pytest.mark.parametrize("rank", [8, 64])
@pytest.mark.parametrize("tokens", [1, 2, 3, 16, 133])
def test_bases_of_8_bits_equal_the_reference_on_what_a_collection_gives_back(tokens, rank, form):
    slots = popularity("uniform", tokens, np.random.default_rng(tokens))
    Problem(tokens, rank, form).check(of_slots(slots), slots)


@pytest.mark.parametrize("form", EIGHT_BIT_FORMS.values(), ids=EIGHT_BIT_FORMS)
def test_every_number_of_8_bits_is_widened_exactly(form):
    stored = torch.arange(256, dtype=torch.uint8).view(form.eight_bit)
    numbers = stored.float().nan_to_num(0)
    numbers[numbers == -128] = 0  # which the quantiser does not make
    sigma = torch.eye(8, dtype=form.stored).expand(1, 1, 8, 8).mT
    one = EightBitBases.beside([torch.zeros(1, 1, 8, 256)], [torch.zeros(1, 1, 263, 8)], 1, form.eight_bit)
    one.v[0][0, 0, 5].copy_(numbers)
    one.u[0][0, 0, :256, 3].copy_(numbers)
    one.u[0][0, 0, 262, 5] = 1  # behind the last whole vector
    one.set_scales(0, 0, torch.ones(8), torch.ones(8))
    one.v[0][0, 0, 3, 0] = 1
    linear = PackedLinear([263], 256, 8, 1, form, sigma)
    linear.write_8_bits(0, one)
    x, y = torch.eye(256).to(form.stored), torch.zeros(256, 263).to(form.stored)
    zeros = np.zeros(256, dtype=np.int64)
    linear.add_(y, x, TokenGroups.plan(zeros, zeros))
    assert torch.equal(y[:, 262].float(), numbers)
    assert torch.equal(y[0, :256].float(), numbers)


@pytest.mark.parametrize("form", ALL_FORMS.values(), ids=ALL_FORMS)
def test_a_long_prompt_beside_others_equals_the_reference(form):
    slots = np.concatenate([np.full(400, 2), np.full(57, -1), np.full(55, 6)])
    Problem(512, 16, form).check(of_slots(slots), slots)


@pytest.mark.parametrize("form", ALL_FORMS.values(), ids=ALL_FORMS)
@pytest.mark.parametrize("kind", ["distinct", "uniform"])
def test_diagonal_scalings_equal_the_reference(kind, form):
    slots = popularity(kind, 33, np.random.default_rng(1))
    Problem(33, 16, form, diagonal=True).check(of_slots(slots), slots)


@pytest.mark.parametrize("form", ALL_FORMS.values(), ids=ALL_FORMS)
@pytest.mark.parametrize(("widths", "d_in"), [((1,), 1), ((7, 133), 33), ((64,), 32), ((129, 15, 64), 100)])
def test_odd_sizes_equal_the_reference(widths, d_in, form):
    slots = popularity("uniform", 21, np.random.default_rng(5))
    Problem(21, 8, form, widths=widths, d_in=d_in).check(of_slots(slots), slots)


@pytest.mark.parametrize("form", ALL_FORMS.values(), ids=ALL_FORMS)
def test_rows_may_lie_apart_in_memory(form):
    problem = Problem(9, 16, form)
    slots = np.arange(9) % SLOTS
    expected = problem.run(of_slots(slots), slots)
    wide_y, wide_x = torch.zeros(9, 200, dtype=form.stored), torch.zeros(9, 300, dtype=form.stored)
    y, x = wide_y[:, 20 : 20 + sum(WIDTHS)], wide_x[:, 11 : 11 + D_IN]
    y.copy_(problem.y), x.copy_(problem.x)
    problem.linear.add_(y, x, TokenGroups.plan(of_slots(slots), slots))
    assert torch.equal(y, expected)
    assert not wide_y[:, :20].any() and not wide_y[:, 20 + sum(WIDTHS) :].any()


@pytest.mark.parametrize("form", ALL_FORMS.values(), ids=ALL_FORMS)
def test_a_token_alone_and_in_a_crowd_gets_the_same_bits(form):
    problem = Problem(16, 16, form)
    slots = np.arange(16) % SLOTS
    crowd = problem.run(of_slots(slots), slots)
    for t in range(16):
        alone = np.full(16, -1)
        alone[t] = slots[t]
        assert torch.equal(problem.run(of_slots(alone), alone)[t], crowd[t])


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_threads_share_the_tokens_without_changing_a_bit(threads):
    problem = Problem(133, 16, FP32)
    slots = popularity("uniform", 133, np.random.default_rng(0))
    one = problem.check(of_slots(slots), slots, threads=1)
    assert torch.equal(problem.check(of_slots(slots), slots, threads=threads), one)


def test_a_plan_gives_every_token_of_an_adapter_to_one_group_and_thread():
    rng = np.random.default_rng(2)
    slots = rng.integers(-1, SLOTS, 200)
    clusters = of_slots(slots)
    plan = TokenGroups.plan(clusters, slots, threads=3)
    seen = []
    for start, count, cluster in zip(plan.group_start, plan.group_count, plan.group_cluster, strict=True):
        members = plan.tokens[start : start + count]
        assert 1 <= count <= 16 and set(clusters[members]) == {cluster}
        assert plan.slots[start : start + count].tolist() == slots[members].tolist()
        seen += members.tolist()
    assert sorted(seen) == np.flatnonzero(slots >= 0).tolist()
    assert plan.split[0] == 0 and plan.split[-1] == len(plan.group_start) and (np.diff(plan.split) > 0).all()
    tokens_of = [plan.group_count[a:b].sum() for a, b in zip(plan.split, plan.split[1:], strict=False)]
    assert max(tokens_of) < 1.5 * min(tokens_of)


@pytest.mark.parametrize("clusters", [8, 30])
def test_threads_of_a_decode_step_end_together(clusters):
    rng = np.random.default_rng(3)
    waits = []
    for _ in range(50):
        plan = TokenGroups.plan(rng.integers(0, clusters, 32), np.arange(32), threads=2)
        parts = [slice(a, b) for a, b in zip(plan.split, plan.split[1:], strict=False)]
        own = [set(plan.group_cluster[part].tolist()) for part in parts]
        assert not own[0] & own[1], "no thread reads the bases of another"
        # Reading a cluster's bases takes as long as a few tokens' products.
        work = [plan.group_count[part].sum() + 4 * len(set(plan.group_cluster[part].tolist())) for part in parts]
        waits.append(max(work) / np.mean(work))
    assert np.mean(waits) < 1.03


@pytest.mark.parametrize(("tokens", "threads", "most"), [(32, 2, 8), (32, 32, 4), (512, 2, 16), (1, 1, 4)])
def test_groups_are_larger_where_every_thread_has_enough_of_them(tokens, threads, most):
    zeros = np.zeros(tokens, dtype=np.int64)
    plan = TokenGroups.plan(zeros, zeros, threads)
    assert plan.group_count.max() == min(most, tokens) and len(plan.split) - 1 == min(threads, -(-tokens // most))


def test_a_plan_of_base_tokens_does_no_work():
    plan = TokenGroups.plan(np.full(4, -1), np.full(4, -1))
    assert plan.empty and plan.num_tokens == 4


def test_an_overwritten_scaling_slot_and_basis_count_at_the_next_call():
    problem = Problem(3, 16, FP32)
    slots = np.array([0, 1, 2])
    problem.check(of_slots(slots), slots)
    problem.sigma[1] *= -2
    problem.u[0][2] += 1
    problem.v[1][2] *= 3
    problem.write(2)
    problem.check(of_slots(slots), slots)


def test_a_thread_made_by_a_bound_one_may_leave_its_core():
    everywhere = os.sched_getaffinity(0)
    other = threading.Event()
    waiting = threading.Thread(target=other.wait)
    waiting.start()  # as OpenMP's threads: one of them is elsewhere
    try:
        os.sched_setaffinity(0, {min(everywhere)})
        with ThreadPoolExecutor(1, initializer=cpu_threads.leave_core) as pool:
            assert pool.submit(os.sched_getaffinity, 0).result() == everywhere
    finally:
        os.sched_setaffinity(0, everywhere)
        other.set()
        waiting.join()


def test_torchs_own_threads_are_used():
    assert cpu_threads.count() == torch.get_num_threads()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rank": 12}, "multiples of 8"),
        ({"sigma": torch.zeros(2, 1, 8, 8).double()}, "float32"),
        ({"sigma": torch.zeros(2, 1, 8, 8)}, "column by column"),
    ],
)
def test_what_the_kernel_cannot_read_is_refused(change, words):
    arguments = {"widths": [8], "d_in": 8, "rank": 8, "clusters": 1, "form": FP32}
    arguments["sigma"] = torch.zeros(2, 1, 8, 8).mT
    with pytest.raises(ValueError, match=words):
        PackedLinear(**{**arguments, **change})


def test_another_dtype_than_that_of_the_bases_is_refused():
    problem = Problem(3, 8, FP32)
    with pytest.raises(ValueError, match="bfloat16"):
        problem.linear.add_(problem.y.bfloat16(), problem.x, TokenGroups.plan(*np.zeros((2, 3), dtype=np.int64)))
