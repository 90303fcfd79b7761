"""The register of every vLLM name that this package subclasses, wraps or calls, and the start-up check.

vLLM's LoRA internals are not a public interface. What is relied upon is written down here once, with the reason,
and compared with the running vLLM before anything is served: a difference is an error that names it, never a
server that quietly answers with uncompressed or wrong adapters.
"""

from vllm_jdlora.serving.touchpoints.register import REGISTER
from vllm_jdlora.serving.touchpoints.startup_check import ALLOW_UNVERIFIED, VERIFIED_VERSIONS, check
from vllm_jdlora.serving.touchpoints.touchpoint import Touchpoint

__all__ = ["ALLOW_UNVERIFIED", "REGISTER", "VERIFIED_VERSIONS", "Touchpoint", "check"]
