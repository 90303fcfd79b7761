"""Σ lie in the device's rows as a loop over slices would put them there."""

import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.serving.scaling_buffer import ScalingBuffer, StagingRows

ROWS, WIDTH, SLOTS = 5, 8, 3


def made(diagonal: bool = False, dtype: torch.dtype = torch.float32, by_columns: bool = False) -> ScalingBuffer:
    return ScalingBuffer(SLOTS, ROWS, WIDTH, diagonal=diagonal, dtype=dtype, device="cpu", by_columns=by_columns)


def layout(order: list[int], covered: list[int]) -> SimpleNamespace:
    return SimpleNamespace(order=torch.tensor(order), covered=torch.tensor(covered))


@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize(
    ("rank", "order", "covered"),
    [(rank, *layout) for rank in (6, WIDTH) for layout in (([2, 0, 1], [0, 1, 4]), ([4, 2, 0, 1, 3], [0, 1, 2, 3, 4]))],
)
def test_each_slice_lies_in_the_corner_of_its_row_and_all_else_is_zero(diagonal, by_columns, rank, order, covered):
    buffer = made(diagonal, torch.bfloat16, by_columns)
    buffer.lay_out(layout(order, covered), rank)
    matrix = (rank,) if diagonal else (rank, rank)
    stored = torch.randn(len(order), *matrix).half()
    buffer.write(1, stored, "a")
    expected = torch.zeros_like(buffer.sigma[0])
    for index, row in zip(order, covered, strict=True):
        if diagonal:
            expected[row, :rank] = stored[index]
        else:
            expected[row, :rank, :rank] = stored[index]
    assert torch.equal(buffer.sigma[1], expected)
    assert (buffer.sigma.mT if by_columns and not diagonal else buffer.sigma).is_contiguous()
    assert not buffer.sigma[[0, 2]].any()
    identity = torch.ones(WIDTH) if diagonal else torch.eye(WIDTH)
    assert torch.equal(buffer.sigma[buffer.identity_slot].float(), identity.expand(ROWS, *identity.shape))


def test_nothing_of_an_earlier_layout_is_left():
    buffer = made()
    buffer.lay_out(layout([0, 1], [0, 1]), WIDTH)
    buffer.write(0, torch.ones(2, WIDTH, WIDTH), "a")
    buffer.lay_out(layout([0], [4]), 3)
    buffer.write(0, torch.ones(1, 3, 3), "b")
    assert buffer.sigma[0].sum() == 9 and buffer.sigma[0, 4, :3, :3].sum() == 9
    assert torch.equal(buffer.sigma[SLOTS], torch.eye(WIDTH).expand(ROWS, WIDTH, WIDTH))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_damaged_scalings_are_refused_and_leave_the_slot_as_it_was(bad):
    buffer = made()
    buffer.lay_out(layout([0, 1], [0, 1]), WIDTH)
    good = torch.randn(2, WIDTH, WIDTH)
    buffer.write(0, good, "good")
    damaged = good.clone()
    damaged[1, 3, 3] = bad
    with pytest.raises(JDLoRAError, match=r"'bad' hold NaN or infinity.*validate"):
        buffer.write(0, damaged, "bad")
    with pytest.raises(JDLoRAError, match="rank 8"):
        buffer.write(0, good[:, :4, :4], "small")
    assert torch.equal(buffer.sigma[0, :2], good)


def test_slots_take_no_memory_on_cpu_before_they_are_used():
    """A collection of 20,000 adapters starts as quickly as a small one."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    before = resident()
    buffer = ScalingBuffer(4000, 90, 16, diagonal=False, dtype=torch.float32, device="cpu")
    buffer.lay_out(layout([0], [0]), 16)
    buffer.write(17, torch.ones(1, 16, 16), "a")
    assert buffer.sigma.nbytes > 350 << 20
    assert resident() - before < 40 << 20


def test_large_scalings_whose_sum_overflows_are_served():
    buffer = made()
    buffer.lay_out(layout([0, 1], [0, 1]), WIDTH)
    large = torch.full((2, WIDTH, WIDTH), 3e38)
    buffer.write(0, large, "large")
    assert torch.equal(buffer.sigma[0, :2], large)


class Stream:
    """Stands for a device's stream: copies happen when somebody waits for an event behind them, or at the end."""

    def __init__(self):
        self.queue = []
        self.waits = 0

    def run(self, upto: int | None = None) -> None:
        for copy in self.queue[:upto]:
            copy()
        del self.queue[:upto]

    def target(self, shape) -> SimpleNamespace:
        place = SimpleNamespace(value=torch.zeros(shape))
        place.copy_ = lambda row, non_blocking: self.queue.append(lambda: place.value.copy_(row))
        return place

    def event(self) -> SimpleNamespace:
        event = SimpleNamespace()

        def record():
            event.behind = self.queue[-1]

        def synchronize():
            self.waits += 1
            if event.behind in self.queue:
                self.run(self.queue.index(event.behind) + 1)

        event.record, event.synchronize = record, synchronize
        return event


def test_a_staged_row_is_not_filled_again_before_its_copy_is_done():
    stream = Stream()
    ring = StagingRows(torch.zeros(3, 4), stream.event)
    targets = [stream.target(4) for _ in range(10)]
    for i, target in enumerate(targets):
        ring.send(lambda row, i=i: row.fill_(i), target)
        assert len(stream.queue) <= 3
    assert stream.waits == 7
    stream.run()
    assert [target.value.tolist() for target in targets] == [[i] * 4 for i in range(10)]


def test_staged_rows_become_zero_only_after_their_copies():
    stream = Stream()
    ring = StagingRows(torch.zeros(2, 4), stream.event)
    target = stream.target(4)
    ring.send(lambda row: row.fill_(1), target)
    ring.clear()
    assert target.value.tolist() == [1] * 4
    ring.send(lambda row: row[:2].fill_(2), target)
    stream.run()
    assert target.value.tolist() == [2, 2, 0, 0]
