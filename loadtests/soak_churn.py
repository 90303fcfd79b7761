"""The operator of the soak test: loads, replaces and unloads adapters and reloads collections while requests run."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import aiohttp
from soak_adapters import ARRIVING, History, SoakAdapters
from soak_hostile import LOAD, RELOAD, UNLOAD

Kind = Literal["load", "replace", "unload", "reload", "reload, other bases"]


@dataclass(frozen=True)
class Event:
    """A call that was made: kind, when it was sent and answered (``time.perf_counter()``), and what with."""

    kind: Kind
    called: float
    answered: float
    detail: str


@dataclass
class Operator:
    """Makes calls, and writes down in the history what each name means from then on.

    Attributes:
        events: calls that were answered with 200.
        outcomes: ``compressed`` or ``plain`` → adapters that were loaded so.
        failed: what was not answered with 200.
        paused: seconds that each reload held requests of compressed adapters back.
        revision: number of the revision that is served.
    """

    session: aiohttp.ClientSession
    url: str
    adapters: SoakAdapters
    history: History
    seed: int = 0
    events: list[Event] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)
    paused: list[float] = field(default_factory=list)
    revision: int = 0

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        # To the bases of the first and to others, in both directions.
        self._revisions = itertools.cycle([1, 2, 1, 0, 2, 0])

    async def run(
        self, over: Callable[[], bool], *, call_every: float, reload_every: float, last_reload: float = math.inf
    ) -> None:
        """A call on one adapter about every `call_every` seconds, a collection every `reload_every`, until `over`.

        last_reload: no reload begins after this (``time.perf_counter()``). The page of metrics names another revision
        with the engine's next step, so requests should come after the last one.
        """
        next_reload = time.perf_counter() + reload_every / 2
        while not over():
            if next_reload <= time.perf_counter() < last_reload:
                await self.reload()
                next_reload += reload_every
            else:
                await self.change_one()
            await asyncio.sleep(self._random.uniform(0.5, 1.5) * call_every)

    async def change_one(self) -> None:
        """Load, replace or unload one of the arriving adapters; replace one of the collection's now and then."""
        known, draw = self.history.now(), self._random
        there = [name for name in ARRIVING if name in known]
        absent = [name for name in ARRIVING if name not in known]
        place = draw.random()
        if absent and (place < 0.4 or not there):
            await self._load("load", draw.choice(absent))
        elif there and place > 0.8:
            await self.unload(draw.choice(there))
        else:
            collection = [name for name in self.adapters.names[:100] if name in known]
            await self._load("replace", draw.choice(there if there and draw.random() < 0.7 else collection))

    async def _load(self, kind: Literal["load", "replace"], name: str) -> None:
        content, folder = self._random.choice([*self.adapters.folders.items()])
        body = {"lora_name": name, "lora_path": str(folder), "load_inplace": kind == "replace"}
        called, answered, text = await self._call(kind, LOAD, body, name)
        if text is not None:
            self.outcomes["compressed" if "compressed into cluster" in text else "plain"] += 1
            self.history.change(name, content, called, answered)

    async def unload(self, name: str) -> None:
        called, answered, text = await self._call("unload", UNLOAD, {"lora_name": name}, name)
        if text is not None:
            self.history.change(name, None, called, answered)

    async def reload(self) -> None:
        """The next revision of the collection."""
        number = next(self._revisions)
        path, contents = self.adapters.revisions[number]
        kind: Kind = "reload, other bases" if 2 in (number, self.revision) else "reload"
        called, answered, text = await self._call(kind, RELOAD, {"lora_collection": str(path)}, path.name)
        if text is None:
            return
        self.revision = number
        self.paused.append(json.loads(text)["paused_seconds"])
        gone = [n for n in self.history.now() if n not in contents and n not in ARRIVING]
        for name in gone:
            self.history.change(name, None, called, answered)
        for name, content in contents.items():
            self.history.change(name, content, called, answered)

    async def _call(self, kind: Kind, path: str, body: dict[str, Any], detail: str) -> tuple[float, float, str | None]:
        """(when called, when answered, text of the answer; None: it was not 200)"""
        called = time.perf_counter()
        try:
            limits = aiohttp.ClientTimeout(total=400)
            async with self.session.post(self.url + path, json=body, timeout=limits) as response:
                text, status = await response.text(), str(response.status)
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
            text, status = str(error), type(error).__name__
        answered = time.perf_counter()
        if status != "200":
            self.failed.append(f"{kind} {detail}: {status} {text[:300]}")
            return called, answered, None
        self.events.append(Event(kind, called, answered, detail))
        return called, answered, text
