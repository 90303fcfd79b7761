"""What the demonstration asks: chat requests, each for one adapter or for the base model."""

from __future__ import annotations

import json
from collections.abc import Collection as Container
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm_jdlora.errors import JDLoRAError

SHOWN_ADAPTERS = 3


@dataclass(frozen=True)
class ChatRequest:
    """One request; ``adapter`` is ``None`` for the base model. Decoding is greedy, up to ``max_tokens`` tokens."""

    adapter: str | None
    messages: tuple[dict[str, str], ...]
    max_tokens: int

    def __post_init__(self) -> None:
        if not self.messages or not all({"role", "content"} == set(m) for m in self.messages):
            raise JDLoRAError(f"a request for {self.adapter or 'the base model'} needs messages of role and content")
        if self.max_tokens < 1:
            raise JDLoRAError(f"max_tokens must be at least 1, not {self.max_tokens}")

    def body(self, base_name: str) -> dict[str, Any]:
        """The body for ``/v1/chat/completions``: an adapter is chosen as the model."""
        return {
            "model": self.adapter or base_name,
            "messages": list(self.messages),
            "max_tokens": self.max_tokens,
            "temperature": 0,
        }


def read_requests(path: Path, adapters: Container[str]) -> list[ChatRequest]:
    """The requests in ``path`` for the base model and for ``adapters``.

    Where none is for one of ``adapters`` (a folder of one's own), up to three of them get the base model's.

    Raises:
        JDLoRAError: the file cannot be read, or has no request for the base model.
    """
    try:
        items = json.loads(path.read_text())
        requests = [ChatRequest(i["adapter"], tuple(i["messages"]), i["max_tokens"]) for i in items]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise JDLoRAError(f"{path} cannot be read as a list of requests: {error}") from error
    base = [r for r in requests if r.adapter is None]
    if not base:
        raise JDLoRAError(f"{path} has no request for the base model (`adapter`: null)")
    asked = [r for r in requests if r.adapter in adapters]
    if not asked:
        asked = [replace(base[0], adapter=name) for name in sorted(adapters)[:SHOWN_ADAPTERS]]
    return asked + base
