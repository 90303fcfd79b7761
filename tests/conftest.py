"""For all tests: one thread for torch, and log records that `caplog` sees.

Their matrices are small. A second thread gains nothing there, and where other processes want the cores too, waiting
for it makes tests up to ten times slower. Servers and engines run in processes of their own and keep their threads.
"""

import logging

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _logged_for_caplog(request, monkeypatch):
    """vLLM, once some test has imported it, keeps what its loggers get (ours among them) from the root logger."""
    if "caplog" in request.fixturenames:
        monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
