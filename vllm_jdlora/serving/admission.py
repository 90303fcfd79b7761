"""Which waiting requests may join the running ones: slots for adapters and bases, and no wait for them without end.

A batch needs a Σ slot for each compressed adapter in it, a LoRA slot for each plain one and a base slot for each
cluster. A running request holds what it needs; requests for the same thing share its slot. Nothing is looked at until
more different adapters (clusters) have been asked for than there are slots: before that no limit can bind.

A request that is kept waiting longer than the age cap gets a reservation. The next free slot is then its own, and
where none is free one slot is drained: younger requests for its holder wait, so that it comes free when those that run
now have ended. At most a quarter of the slots drain at once, so the others keep serving what is asked for most.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

from vllm_jdlora.serving.options import AdapterPath, ServingOptions

DRAINING_SHARE = 4
"""One slot in so many may be drained for reservations at once, and one at least."""


class Slots:
    """Slots of one kind.

    Attributes:
        name: of what a request waits for when it waits for one of them.
        limit: how many different keys a batch may hold.
        scarce: more keys than slots have been asked for.
        holders: key → running requests that need it, in the order of their admission.
        reservations: how many there can be at once.
    """

    def __init__(self, name: str, limit: int):
        self.name = name
        self.limit = limit
        self.scarce = False
        self.holders: dict[Hashable, int] = {}
        self.reservations = max(1, limit // DRAINING_SHARE)
        self._met: set[Hashable] = set()
        self._reserved: dict[Hashable, Any] = {}
        self._oldest = 0
        self._draining: set[Hashable] = set()

    @property
    def full(self) -> bool:
        return len(self.holders) >= self.limit

    def meet(self, key: Hashable) -> bool:
        """Whether this key is the one that makes the slots scarce, which they stay."""
        if self.scarce:
            return False
        self._met.add(key)
        self.scarce = len(self._met) > self.limit
        return self.scarce

    def hold(self, key: Hashable) -> None:
        self.holders[key] = self.holders.get(key, 0) + 1
        self._reserved.pop(key, None)

    def admits(self, key: Hashable, number: int) -> bool:
        """number: of the request's arrival."""
        if key in self.holders:
            return key not in self._draining or number < self._oldest
        free = self.limit - len(self.holders)
        if key in self._reserved:
            return free > list(self._reserved).index(key)
        return free > len(self._reserved)

    def reserve(self, key: Hashable, request: Any) -> None:
        """Promise `request` a slot for `key`, unless it holds one or enough are promised."""
        if key in self.holders or key in self._reserved or len(self._reserved) >= self.reservations:
            return
        self._reserved[key] = request
        self.settle()

    def settle(self) -> None:
        """Forget reservations of requests that are gone, and drain as many slots as the others lack."""
        if not self._reserved:
            self._draining.clear()
            return
        self._reserved = {
            key: request
            for key, request in self._reserved.items()
            if key not in self.holders and not request.is_finished()
        }
        self._oldest = min((ticket_of(request).number for request in self._reserved.values()), default=0)
        lacking = max(0, len(self._reserved) - (self.limit - len(self.holders)))
        # One that drains goes on: another choice each step would never let a slot come free.
        kept = [key for key in self.holders if key in self._draining][:lacking]
        others = sorted((key for key in self.holders if key not in kept), key=self.holders.__getitem__)
        self._draining = {*kept, *others[: lacking - len(kept)]}


class Ticket(NamedTuple):
    """What a request gets on its arrival.

    Attributes:
        number: of arrivals before it.
        since: when, by the clock of the admission.
        needs: the slots that it needs, and the key that it needs them for.
    """

    number: int
    since: float
    needs: tuple[tuple[Slots, Hashable], ...]


def ticket_of(request: Any) -> Ticket:
    return request.jd_ticket


class Admission:
    """The slots of a server, and who holds them in the step that is being scheduled.

    Attributes:
        scarce: slots of some kind are.
        now: when the step began, by the clock.
        age_cap: seconds.
        turned_away: requests that were looked at in this step and not admitted, by what they lack.
        scaling, plain, bases: the kinds of slots; ``None`` where there are as many as requests that run at once.
    """

    def __init__(self, options: ServingOptions, batch: int, clock: Callable[[], float]):
        """batch: most requests that run at once; as many slots as that never limit them. clock: seconds."""
        assert options.scaling_slots is not None and options.plain_slots is not None
        self.scarce = False
        self.now = 0.0
        self.age_cap = options.age_cap
        self.turned_away: dict[str, int] = {}
        self.scaling, self.plain, self.bases = (
            Slots(name, limit) if limit is not None and limit < batch else None
            for name, limit in (
                ("scaling_slot", options.scaling_slots),
                ("plain_slot", options.plain_slots),
                ("base_slot", options.base_slots),
            )
        )
        self._cluster_order = options.cluster_order
        self._kinds = [slots for slots in (self.scaling, self.plain, self.bases) if slots is not None]
        self._clock = clock
        self._arrivals = 0
        self._running: list[Any] = []
        self._counted = 0

    @property
    def orders_clusters(self) -> bool:
        """Whether it matters which clusters are admitted together."""
        return self._cluster_order and self.bases is not None and self.bases.scarce

    def arrive(self, request: Any) -> bool:
        """Give a request its ticket; whether it makes slots scarce that were not."""
        needs = self._needs(request.lora_request)
        request.jd_ticket = Ticket(self._arrivals, self._clock(), needs)
        self._arrivals += 1
        changed = [slots.meet(key) for slots, key in needs]
        self.scarce |= any(changed)
        return any(changed)

    def begin_step(self, running: list[Any]) -> None:
        """running: the scheduler's own list, to which it only appends while it admits."""
        self.now = self._clock()
        self._running, self._counted = running, 0
        self.turned_away.clear()
        for slots in self._kinds:
            slots.holders.clear()
        self._count()
        for slots in self._kinds:
            slots.settle()

    def admits(self, request: Any) -> bool:
        """In O(1): whether there is a slot for all that a request needs."""
        if self._counted < len(self._running):
            self._count()
        ticket = ticket_of(request)
        return all(not slots.scarce or slots.admits(key, ticket.number) for slots, key in ticket.needs)

    def overdue(self, request: Any) -> bool:
        return self.now - ticket_of(request).since > self.age_cap

    def turn_away(self, request: Any) -> None:
        """Count a request that is not admitted with what it lacks."""
        reason = self._lacks(request)[0][0].name
        self.turned_away[reason] = self.turned_away.get(reason, 0) + 1

    def claim(self, request: Any) -> None:
        """Reserve what a request lacks if it has waited too long."""
        if self.overdue(request):
            for slots, key in self._lacks(request):
                slots.reserve(key, request)

    def _lacks(self, request: Any) -> list[tuple[Slots, Hashable]]:
        number, _, needs = ticket_of(request)
        return [(slots, key) for slots, key in needs if slots.scarce and not slots.admits(key, number)]

    def _count(self) -> None:
        for request in self._running[self._counted :]:
            for slots, key in ticket_of(request).needs:
                if slots.scarce:
                    slots.hold(key)
        self._counted = len(self._running)

    def _needs(self, lora_request: Any) -> tuple[tuple[Slots, Hashable], ...]:
        if lora_request is None:
            return ()
        path = AdapterPath.parse(lora_request.lora_path)
        if path is None:
            wanted: list[tuple[Slots | None, Hashable]] = [(self.plain, lora_request.lora_int_id)]
        else:
            # Revisions that are served at once share their bases, or all bases have slots.
            wanted = [(self.scaling, lora_request.lora_int_id), (self.bases, path.cluster)]
        return tuple((slots, key) for slots, key in wanted if slots is not None)
