"""Tensor operations of the serving path; installed as ``vllm_jdlora.kernels``. They know tensors only."""
