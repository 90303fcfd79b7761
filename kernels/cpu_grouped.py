"""The LoRA linear on CPU: groups of tokens that share a cluster go through V, Σ and U without leaving the cache.

Two steps, as in flashinfer: :meth:`TokenGroups.plan` looks once at who is in the batch; :class:`PackedLinear` runs
for every layer on that plan. One call for a layer, whatever its slices; no buffer of the batch's size; rows of the
base model are not looked at.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from vllm_jdlora.kernels import cpu_body, cpu_pages, cpu_threads
from vllm_jdlora.kernels.cpu_layout import BLOCK, Form, lay_u, lay_v
from vllm_jdlora.kernels.cpu_tiles import PIECE
from vllm_jdlora.kernels.eight_bit_bases import EightBitBases

_MOST = cpu_body.GROUP
# Groups that each thread has at least, where there are tokens for them.
_SHARE = 2
# A cluster's bases come from memory once, for as long as it takes to multiply so many tokens by them.
_READING = 4
# Most clusters that are dealt out to threads one by one, which takes half a microsecond each.
_DEALT = 64
_LINE = 64


@dataclass
class TokenGroups:
    """The tokens of a step in groups that share a cluster and read its bases together; tokens without an adapter are
    left out. The more tokens a step has for each thread the larger the groups.

    Attributes:
        num_tokens: rows of x and y that the plan is for.
        tokens, slots: int64 [L], the rows sorted by cluster and then by scaling slot, and each one's slot.
        group_start, group_count, group_cluster: int64 [groups]; a group is ``tokens[start : start + count]``.
        split: int64 [threads + 1]; thread i has the groups ``split[i] : split[i + 1]``.
        empty: whether no token has an adapter.
        address: of the addresses that the kernel reads; valid while this plan lives.
    """

    num_tokens: int
    tokens: np.ndarray
    slots: np.ndarray
    group_start: np.ndarray
    group_count: np.ndarray
    group_cluster: np.ndarray
    split: np.ndarray
    empty: bool = field(init=False)
    threads: int = field(init=False)
    address: int = field(init=False, repr=False)
    _addresses: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        parts = (self.tokens, self.slots, self.group_start, self.group_count, self.group_cluster, self.split)
        # Read once here and not by every layer.
        self._addresses = np.array([part.ctypes.data for part in parts], dtype=np.int64)
        self.address = self._addresses.ctypes.data
        self.empty, self.threads = not len(self.tokens), len(self.split) - 1

    @classmethod
    def plan(cls, token_cluster: np.ndarray, token_slot: np.ndarray, threads: int | None = None) -> TokenGroups:
        """Plan for tokens with these clusters and scaling slots (integer arrays [T]; −1 means no adapter)."""
        threads = cpu_threads.count() if threads is None else threads
        live = np.flatnonzero((token_cluster >= 0) & (token_slot >= 0))
        # Clusters and slots are far below 2³¹: one key sorts by both.
        key = token_cluster[live].astype(np.int64) << 32 | token_slot[live]
        order = np.argsort(key, kind="stable")
        tokens = live[order]
        cluster = token_cluster[tokens].astype(np.int64)
        changes = np.flatnonzero(cluster[1:] != cluster[:-1]) + 1
        starts = np.concatenate(([0], changes)) if len(tokens) else changes
        lengths = np.diff(np.append(starts, len(tokens)))
        most = min(_MOST, 4 * max(1, -(-len(tokens) // (4 * _SHARE * threads))))
        groups = -(-lengths // most)
        first = np.cumsum(groups) - groups
        within = np.arange(int(groups.sum())) - np.repeat(first, groups)
        group_start = np.repeat(starts, groups) + most * within
        group_count = np.minimum(most, np.repeat(starts + lengths, groups) - group_start)
        threads = max(1, min(threads, len(within)))
        thread = _thread_of_each(group_count + _READING * (within == 0), groups, threads)
        order = np.argsort(thread, kind="stable")
        return cls(
            num_tokens=len(token_cluster),
            tokens=tokens.astype(np.int64),
            slots=token_slot[tokens].astype(np.int64),
            group_start=group_start[order].astype(np.int64),
            group_count=group_count[order].astype(np.int64),
            group_cluster=np.repeat(cluster[starts], groups)[order],
            split=np.searchsorted(thread[order], np.arange(threads + 1)),
        )


def _thread_of_each(work: np.ndarray, groups: np.ndarray, threads: int) -> np.ndarray:
    """Thread of each group, int64 [groups], so that all threads end together.

    Many groups are divided where their work is. Few clusters are dealt out whole, the largest first, each to the thread
    that has least, unless one of them has most of the tokens.

    Args:
        work: of each group.
        groups: how many each cluster has; they lie one after the other.
    """
    if threads == 1:
        return np.zeros(len(work), dtype=np.int64)
    done = np.cumsum(work)
    runs = ((done - work / 2) * threads // done[-1]).astype(np.int64)
    if not threads <= len(groups) <= _DEALT:
        return runs
    of_cluster = np.add.reduceat(work, np.cumsum(groups) - groups)
    loads = [(0, thread) for thread in range(threads)]
    dealt = np.empty(len(groups), dtype=np.int64)
    for cluster in np.argsort(-of_cluster, kind="stable").tolist():
        load, thread = loads[0]
        dealt[cluster] = thread
        heapq.heapreplace(loads, (load + int(of_cluster[cluster]), thread))
    even = max(load for load, _ in loads) <= np.bincount(runs, work).max()
    return np.repeat(dealt, groups) if even else runs


def stream_shapes(
    widths: Sequence[int], d_in: int, rank: int, form: Form
) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """How one cluster's V of all slices lies, and the U of each slice of ``widths`` outputs: see lay_v and lay_u."""
    rows = len(widths) * rank
    each = 2 if form.pairs else 1
    u_shapes: list[tuple[int, ...]] = [(-(-w // form.lanes), rank // each, form.lanes, each) for w in widths]
    return (rows // BLOCK, -(-d_in // form.step), BLOCK, form.step), u_shapes


class PackedLinear:
    """The bases of one linear module (its slices packed: q, k, v) as the kernel reads them.

    The slices' V of a cluster lie one below the other: q, k and v see the same x.

    Attributes:
        form: of the bases.
        sigma: of the form's dtype [slots, slices, R, R], in memory column by column (a transposed view), or, for
            JD-Diag, [slots, slices, R]; read where it is.
        parameters_address: what the kernel is called with.
    """

    def __init__(self, widths: Sequence[int], d_in: int, rank: int, clusters: int, form: Form, sigma: torch.Tensor):
        """Room for C clusters of bases of rank R, a multiple of 8. widths: d_out of each slice."""
        if rank % 8:
            raise ValueError(f"the CPU kernel takes ranks that are multiples of 8, not {rank}: pad with zeros")
        columns = sigma if sigma.ndim == 3 else sigma.mT
        if sigma.dtype != form.stored or not columns[0].is_contiguous():
            raise ValueError(f"the CPU kernel reads Σ in {form.stored}, each slot contiguous and column by column")
        self.form, self.rank, self.widths, self.sigma = form, rank, tuple(widths), sigma
        v_shape, u_shapes = stream_shapes(widths, d_in, rank, form)
        self.d_in, self._rows = d_in, v_shape[0] * BLOCK
        # A cluster's V and U one behind the other: the kernel reads them as one stream.
        sizes = [math.prod(shape) for shape in (v_shape, *u_shapes)]
        stored = form.stored if form.eight_bit is None else torch.int8  # not every operation knows fp8
        bases = cpu_pages.zeros(clusters, sum(sizes), stored)
        parts = [p.unflatten(1, s) for p, s in zip(bases.split(sizes, 1), (v_shape, *u_shapes), strict=True)]
        self._v, self._u = parts[0], parts[1:]
        # Of the rows of V, then of the columns of U.
        self._scales = torch.zeros(0 if form.eight_bit is None else clusters, 2, self._rows)
        self._parameters = np.zeros(cpu_body.FIELDS, dtype=np.int64)
        self._slices = np.array(
            [(u.data_ptr() - bases.data_ptr(), width) for u, width in zip(self._u, widths, strict=True)],
            dtype=np.int64,
        )
        self._fill_in()
        self.parameters_address: int = self._parameters.ctypes.data
        self._compiling = cpu_body.compiling(form, rank)
        self._kernel: cpu_body.Kernel | None = None
        self._take_scratch(cpu_threads.count())

    def write(self, cluster: int, u: Sequence[torch.Tensor], v: Sequence[torch.Tensor]) -> None:
        """Lay one cluster's bases down: for each slice U [d_out, R] and V [R, d_in]."""
        lay_v(self.form, torch.cat([part.to(self.form.stored) for part in v]), self._v[cluster])
        for laid, part in zip(self._u, u, strict=True):
            lay_u(self.form, part, laid[cluster])

    def write_8_bits(self, cluster: int, bases: EightBitBases) -> None:
        """Lay one cluster's bases and scales down, which are the first of ``bases``."""
        v = torch.cat([part[0, 0].view(torch.int8) for part in bases.v])
        lay_v(self.form, v, self._v[cluster])
        for laid, part in zip(self._u, bases.u, strict=True):
            lay_u(self.form, part[0, 0].view(torch.int8), laid[cluster])
        for laid, scale in zip(self._scales[cluster], (bases.v_scale, bases.u_scale), strict=True):
            laid[: scale[0].numel()] = scale[0].flatten()

    def add_(self, y: torch.Tensor, x: torch.Tensor, groups: TokenGroups) -> None:
        """``y[t] += U[c(t)] · (Σ[s(t)] · (V[c(t)] · x[t]))`` in place (meaning: ``reference.jd_linear``).

        y: [T, sum of d_out over slices], x: [T, d_in], both of the form's dtype with contiguous rows. Rows without an
        adapter are not touched. Sums are fp32, y is rounded once.
        """
        if groups.empty:
            return
        stored = self.form.stored
        if y.dtype != stored or x.dtype != stored:
            raise ValueError(f"x and y must be {stored}, as the bases are, not {x.dtype} and {y.dtype}")
        threads = groups.threads
        run = self.prepare(threads).run
        run(self.parameters_address, x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0), groups.address, threads)

    def prepare(self, threads: int) -> cpu_body.Kernel:
        """Have room for so many threads; returns the compiled kernel, once it is there."""
        if threads > self._threads:
            self._take_scratch(threads)
        if self._kernel is None:
            self._kernel = self._compiling.result()
            self._parameters[cpu_body.BODY] = self._kernel.body
        return self._kernel

    def _take_scratch(self, threads: int) -> None:
        self._parameters[cpu_body.SCRATCH] = _scratch(self._scratch_bytes * threads)
        self._threads = threads

    def _fill_in(self) -> None:
        v, sigma, fields = self._v, self.sigma, self._parameters
        width = v.element_size()
        turns = v.shape[2]
        # Addresses of rows (x, y), x in the form that shrink takes, h, g.
        x_bytes = turns * self.form.step * (2 if self.form.pairs else 4)
        parts = (16 * _MOST, _MOST * x_bytes, _MOST * self._rows * 4, _MOST * self._rows * 4)
        starts = list(itertools.accumulate(-(-part // _LINE) * _LINE for part in parts))
        self._scratch_bytes = starts[-1]
        values = {
            cpu_body.SCRATCH_STRIDE: self._scratch_bytes,
            cpu_body.AT_X: starts[0],
            cpu_body.AT_H: starts[1],
            cpu_body.AT_G: starts[2],
            cpu_body.BASES: v.data_ptr(),
            cpu_body.CLUSTER: v.stride(0) * width,
            cpu_body.V_BLOCK: v.stride(1) * width,
            cpu_body.ROWS_OF_V: self._rows,
            cpu_body.D_IN: self.d_in,
            cpu_body.TURNS: turns,
            cpu_body.SIGMA: sigma.data_ptr(),
            cpu_body.SIGMA_SLOT: sigma.stride(0) * sigma.element_size(),
            cpu_body.DIAGONAL: sigma.ndim == 3,
            cpu_body.PIECES: self.rank // (2 if self.form.pairs else 1) // PIECE,
            cpu_body.SLICES: len(self.widths),
            cpu_body.SLICE_TABLE: self._slices.ctypes.data,
            cpu_body.SCALES: self._scales.data_ptr(),
        }
        fields[list(values)] = list(values.values())


_held: list[torch.Tensor] = []


def _scratch(size: int) -> int:
    """Address of so many bytes, which layers share; they run one after the other. Never freed: few sizes occur."""
    if not _held or _held[-1].numel() < size + _LINE:
        _held.append(torch.empty(size + _LINE, dtype=torch.uint8))
    return -(-_held[-1].data_ptr() // _LINE) * _LINE
