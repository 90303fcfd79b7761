"""Which adapters a server can be asked for: from its ``/v1/models``, or from a file of names."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from vllm_jdlora.errors import JDLoRAError


@dataclass(frozen=True)
class ServedModels:
    """Names to ask for.

    Attributes:
        base: the base model's.
        adapters: sorted, so that two servers with the same adapters get the same traffic in whatever order they list.
    """

    base: str
    adapters: tuple[str, ...]


def ask_models(url: str, *, api_key: str | None = None, base: str | None = None) -> ServedModels:
    """What the server at `url` lists; `base` where it does not say which of them is the base model.

    Raises:
        JDLoRAError: no list came, or the base model is not among them.
    """
    request = urllib.request.Request(url.rstrip("/") + "/v1/models")
    if api_key:
        request.add_header("Authorization", f"Bearer {api_key}")
    try:
        # No proxy: load tests go straight to the server.
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as response:
            models = json.load(response)["data"]
        # vLLM and SGLang name an adapter's parent.
        bases = [m["id"] for m in models if m["id"] == base or (base is None and not m.get("parent"))]
        names = [m["id"] for m in models]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise JDLoRAError(
            f"{url}/v1/models does not list models ({error}): is it an OpenAI-compatible server?"
        ) from error
    if not bases:
        raise JDLoRAError(f"{url} does not list the base model{f' {base}' if base else ''}: say which one it is")
    return ServedModels(bases[0], tuple(sorted(set(names) - {bases[0]})))


def read_names(file: Path) -> tuple[str, ...]:
    """A name a line; empty lines and those that begin with # are skipped.

    Raises:
        JDLoRAError: `file` cannot be read or names nothing.
    """
    try:
        lines = [line.strip() for line in file.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise JDLoRAError(f"cannot read the names of adapters from {file}: {error}") from error
    names = tuple(line for line in lines if line and not line.startswith("#"))
    if not names:
        raise JDLoRAError(f"{file} names no adapter: write one name a line")
    return names
