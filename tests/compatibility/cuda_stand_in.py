"""A worker on CPU takes what one on CUDA takes for adapters: vLLM's buffers, and kernels that Triton interprets.

vLLM imports this in each worker as its extension, before the model is loaded.
"""

from vllm_jdlora.serving import bases_manager


class Cuda:
    """The platform, as far as the manager asks."""

    def is_cpu(self) -> bool:
        return False


bases_manager.current_platform = Cuda()


class Extension:
    """Adds nothing to the worker."""
