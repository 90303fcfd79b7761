"""Requests whose adapter cannot be read when a step wants it end with an error; the others go on.

An adapter that was checked at start-up may be damaged, or gone, when its turn comes. vLLM's engine ends with an
exception from a worker, and after a restart the next request for that adapter would end it again. So the worker runs
the step with the base model in that adapter's place and says so with its counts, and the scheduler ends the requests.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FAILED = "failed_adapters"
"""The worker's count that names them: (number of the plan, LoRA ids). The number tells two failures of an id apart."""


class EndsFailedRequests:
    """Mix-in before a vLLM scheduler and behind the one that takes the worker's counts off a step's output."""

    _worker_counts: Mapping[str, Any] = {}

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        _, failed = self._worker_counts.get(FAILED, (0, ()))
        for request_id in scheduler_output.num_scheduled_tokens if failed else ():
            request = self.requests.get(request_id)  # type: ignore[attr-defined]
            if request is None or request.lora_request is None or request.lora_request.lora_int_id not in failed:
                continue
            # What the base model said is nobody's answer.
            index = model_runner_output.req_id_to_index[request_id]
            if model_runner_output.sampled_token_ids:
                model_runner_output.sampled_token_ids[index] = []
            if model_runner_output.pooler_output:
                model_runner_output.pooler_output[index] = None
            model_runner_output.prompt_logprobs_dict.pop(request_id, None)
            model_runner_output.prompt_token_id_logprobs_dict.pop(request_id, None)
            # vLLM's own set of requests that end with an error when this output has been dealt with.
            self.grammar_compile_error_reqs.add(request_id)  # type: ignore[attr-defined]
        return super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
