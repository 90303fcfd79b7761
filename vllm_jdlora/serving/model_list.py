"""``GET /v1/models`` of a hundred thousand adapters: cards as bytes, made once for each adapter and not for each call.

Clients read the whole list in one answer: OpenAI's own has no pages, and its client asks for none. So the list is sent
piece by piece, and between two pieces the server does other things. Those that know can ask for a part with
``?limit=N&after=ID``.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from itertools import groupby, islice
from typing import Any

from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelPermission
from vllm.lora.request import LoRARequest

_BLOCK = 256
_Block = tuple[tuple[int, ...], bytes]


class ModelList:
    """The answers of ``/v1/models`` for vLLM's ``OpenAIServingModels`` with :class:`AdapterNames`.

    Cards lie in blocks that end where an adapter's id is a multiple of 256, so that a name that comes or goes
    makes one block anew.
    """

    def __init__(self, models: Any):
        self._models = models
        self._template = _CardTemplate(models.base_model_paths[0].name)
        self._blocks: list[_Block] = []
        self._version = -1
        self._renewing = asyncio.Lock()

    async def whole(self) -> tuple[int, AsyncIterator[bytes]]:
        """Length in bytes and pieces of the whole list."""
        blocks = [block for _, block in await self._current_blocks()]
        head = b'{"object":"list","data":[' + b",".join(await self._base_cards())
        pieces = [head, *(b"," + block for block in blocks), b"]}"]
        return sum(map(len, pieces)), _each(pieces)

    async def part(self, limit: int | None, after: str | None) -> bytes | None:
        """At most `limit` models behind the one named `after`; None where there is no such model."""
        names = self._models.lora_requests
        bases = await self._base_cards()
        base_names = [path.name for path in self._models.base_model_paths]
        everything: Iterator[str] = iter((*base_names, *names))
        if after is not None and (after not in names and after not in base_names):
            return None
        if after is not None:
            next(name for name in everything if name == after)
        shown = list(everything if limit is None else islice(everything, limit + 1))
        more = limit is not None and len(shown) > limit
        shown = shown[:limit]
        cards = (bases[base_names.index(n)] if n in base_names else self._template.card(names[n]) for n in shown)
        ends = {"first_id": shown[0] if shown else None, "last_id": shown[-1] if shown else None, "has_more": more}
        return b'{"object":"list","data":[' + b",".join(cards) + b"]," + _json(ends)[1:]

    async def one(self, name: str) -> bytes | None:
        """The card of one model."""
        for path, card in zip(self._models.base_model_paths, await self._base_cards(), strict=True):
            if path.name == name:
                return card
        request = self._models.lora_requests.get(name)
        return None if request is None else self._template.card(request)

    async def _base_cards(self) -> list[bytes]:
        listed = await self._models.registry.show_available_models()
        return [_json(card.model_dump()) for card in listed.data]

    async def _current_blocks(self) -> list[_Block]:
        names = self._models.lora_requests
        async with self._renewing:
            if self._version != names.version:
                version, requests = names.version, list(names.values())
                self._blocks = await asyncio.to_thread(_blocks, requests, self._blocks, self._template)
                self._version = version
            return self._blocks


class _CardTemplate:
    """A card as vLLM's own, with the adapter's name, path and parent still to be filled in."""

    def __init__(self, base_model: str):
        self._base_model = base_model
        self._created = int(time.time())
        self._token = secrets.token_hex(8)
        marks = {key: f"{self._token}-{key}" for key in ("id", "root", "parent", "permission")}
        permission = ModelPermission(id=marks["permission"], created=self._created)
        card = ModelCard(
            id=marks["id"],
            root=marks["root"],
            parent=marks["parent"],
            created=self._created,
            permission=[permission],
        )
        text = _json(card.model_dump()).decode().replace("{", "{{").replace("}", "}}")
        for key, mark in marks.items():
            text = text.replace(f'"{mark}"', f"{{{key}}}")
        self._fill = text.format

    def card(self, request: LoRARequest) -> bytes:
        return self._fill(
            id=_text(request.lora_name),
            root=_text(request.lora_path),
            parent=_text(request.base_model_name or self._base_model),
            permission=f'"modelperm-{self._token}{request.lora_int_id:016x}"',
        ).encode()


def _blocks(requests: Sequence[LoRARequest], known: Iterable[_Block], template: _CardTemplate) -> list[_Block]:
    cards = dict(known)
    found = []
    for _, members in groupby(enumerate(requests), key=_BlockNumber()):
        block = [request for _, request in members]
        ids = tuple(request.lora_int_id for request in block)
        found.append((ids, cards.get(ids) or b",".join(map(template.card, block))))
    return found


class _BlockNumber:
    """Counts the requests before whose id is a multiple of the block's size."""

    def __init__(self) -> None:
        self._number = 0

    def __call__(self, item: tuple[int, LoRARequest]) -> int:
        self._number += item[1].lora_int_id % _BLOCK == 0
        return self._number


async def _each(pieces: Iterable[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


def _json(value: Any) -> bytes:
    """As Starlette's JSONResponse writes it."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)
