"""The vLLM side: flags, worker, LoRA manager, kernels' wrapper. Only this package imports vLLM."""
