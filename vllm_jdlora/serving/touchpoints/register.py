"""Every vLLM name that this package subclasses, wraps, overrides, calls or reads: all entries together."""

from __future__ import annotations

from vllm_jdlora.serving.touchpoints.api_server import API_SERVER
from vllm_jdlora.serving.touchpoints.frontend import FRONTEND
from vllm_jdlora.serving.touchpoints.lora import LORA
from vllm_jdlora.serving.touchpoints.runner import RUNNER
from vllm_jdlora.serving.touchpoints.scheduler import SCHEDULER
from vllm_jdlora.serving.touchpoints.statistics import STATISTICS
from vllm_jdlora.serving.touchpoints.touchpoint import Touchpoint

REGISTER: tuple[Touchpoint, ...] = (*FRONTEND, *SCHEDULER, *RUNNER, *LORA, *STATISTICS, *API_SERVER)
