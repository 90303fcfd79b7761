"""The entry point of vLLM's plugin system: flags of ``vllm serve`` and the engine settings they stand for.

Loaded in every vLLM process, so importing it must be cheap: vLLM's heavier modules are imported only once
compression was asked for. Three class attributes of ``EngineArgs`` are wrapped (see ``touchpoints``), and in API
servers two of its serving classes; where compression was not asked for, the wraps change nothing.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from vllm_jdlora.errors import JDLoRAError

_MARK = "_jdlora_wrapped"
_SERVERS = ("OPENAI_API_SERVER", "OPENAI_BATCH_RUNNER")
"""Values of vLLM's ``UsageContext`` for what answers by adapters' names."""


def register() -> None:
    """Wrap ``EngineArgs`` once for each process."""
    from vllm.engine.arg_utils import EngineArgs

    if getattr(EngineArgs, _MARK, False):
        return
    setattr(EngineArgs, _MARK, True)
    _wrap_add_cli_args(EngineArgs)
    _wrap_from_cli_args(EngineArgs)
    _wrap_create_engine_config(EngineArgs)


def _wrap_add_cli_args(engine_args: Any) -> None:
    original = engine_args.add_cli_args

    @functools.wraps(original)
    def add_cli_args(parser: Any) -> Any:
        from vllm_jdlora.serving.flags import add_flags

        return add_flags(original(parser))

    engine_args.add_cli_args = staticmethod(add_cli_args)


def _wrap_from_cli_args(engine_args: Any) -> None:
    original = engine_args.__dict__["from_cli_args"].__func__

    @functools.wraps(original)
    def from_cli_args(cls: Any, args: Any) -> Any:
        from vllm_jdlora.serving.flags import apply_flags

        # The namespace is changed, not the result: API servers that vLLM spawns get the pickled namespace, and
        # the frontend reads lora_modules and middleware from it.
        _or_exit(apply_flags, args)
        return original(cls, args)

    engine_args.from_cli_args = classmethod(from_cli_args)


def _wrap_create_engine_config(engine_args: Any) -> None:
    original = engine_args.create_engine_config

    @functools.wraps(original)
    def create_engine_config(self: Any, usage_context: Any = None, headless: bool = False, **kwargs: Any) -> Any:
        from vllm_jdlora.serving.options import ServingOptions

        if ServingOptions.from_additional_config(self.additional_config) is None:
            return original(self, usage_context, headless, **kwargs)
        from vllm_jdlora.serving.compile_key import CompileKey
        from vllm_jdlora.serving.engine_settings import apply_to_engine_args, lift_adapter_limit, restore_compilation

        is_server = usage_context in _SERVERS
        apply_to_engine_args(self, names_follow=is_server and not headless and self._api_process_rank >= 0)
        if is_server:
            from vllm_jdlora.serving.api_server import wrap_api_server

            wrap_api_server()
        config = original(self, usage_context, headless, **kwargs)
        lift_adapter_limit(config)
        restore_compilation(config)
        config.additional_config = CompileKey(config.additional_config)
        return config

    engine_args.create_engine_config = create_engine_config


def _or_exit(function: Any, *args: Any) -> None:
    """On the command line a wrong flag is one line and exit code 2, not a traceback."""
    try:
        function(*args)
    except JDLoRAError as error:
        print(f"vllm: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
