"""``jdlora demo``: the arguments of the command line, the exit code, and what is shown when it fails."""

from __future__ import annotations

import argparse
import signal
from types import FrameType

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel

from vllm_jdlora.demo.run import run_demo
from vllm_jdlora.demo.server import ServerFailed


def run(args: argparse.Namespace) -> int:
    """Run the demonstration with ``adapters``, ``cache_dir``, ``port`` and ``stay`` of ``args``; 0, or 130 on Ctrl-C.

    Raises:
        JDLoRAError: the command line prints it.
    """
    console = Console()
    # A plain `kill` must end the server too, as Ctrl-C does.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        run_demo(console, adapters_dir=args.adapters, cache_dir=args.cache_dir, port=args.port, stay=args.stay)
    except ServerFailed as error:
        console.print(Panel(escape(error.log_tail), title="the end of the server's log", border_style="red"))
        raise
    except KeyboardInterrupt:
        console.print("stopped")
        return 130
    return 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
