"""The demonstration's answers as a table, and the command to go on with."""

from __future__ import annotations

import json
import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_jdlora.demo.base_model import MODEL_NAME
from vllm_jdlora.demo.requests import ChatRequest

_ASKED_CHARACTERS = 60


@dataclass(frozen=True)
class Answer:
    """What came back for one request, from the server and from the uncompressed adapter (or the base model).

    ``relative_error`` is that of the adapter's compression; ``None`` for the base model and for a plain adapter.
    """

    request: ChatRequest
    served: str
    uncompressed: str
    relative_error: float | None

    @property
    def same(self) -> bool:
        return self.served.strip() == self.uncompressed.strip()


def print_answers(console: Console, answers: Sequence[Answer]) -> None:
    """One row for each answer, and a closing line that counts those that are the same."""
    table = Table(show_lines=True)
    table.add_column("model", overflow="fold", ratio=3)
    table.add_column("asked", overflow="fold", ratio=3)
    table.add_column("compressed (vLLM)", overflow="fold", ratio=3)
    table.add_column("uncompressed (PEFT)", overflow="fold", ratio=3)
    table.add_column("error", justify="right", no_wrap=True)
    for answer in answers:
        asked = answer.request.messages[-1]["content"].splitlines()[-1]
        colour = "green" if answer.same else "yellow"
        error = "-" if answer.relative_error is None else f"{answer.relative_error:.3f}"
        table.add_row(
            escape(answer.request.adapter or f"{MODEL_NAME} (base, no adapter)"),
            escape(textwrap.shorten(asked, _ASKED_CHARACTERS, placeholder=" …")),
            f"[{colour}]{escape(answer.served.strip())}[/{colour}]",
            escape(answer.uncompressed.strip()),
            error,
        )
    console.print(table)
    same = sum(answer.same for answer in answers)
    console.print(
        f"{same} of {len(answers)} answers are the same as without compression. "
        "Error: ‖ΔW − UΣV‖ / ‖ΔW‖ of the adapter (Frobenius)."
    )


def print_curl(console: Console, url: str, request: ChatRequest) -> None:
    """The request as a command for the shell; printed without wrapping, to be copied."""
    body = json.dumps(request.body(MODEL_NAME))
    command = f"curl -s {url}/v1/chat/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}"
    console.print("\nThe server stays up until Ctrl-C. Ask it from another terminal:")
    console.print(command, soft_wrap=True, markup=False, highlight=False)
