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
    """Once some test has imported vLLM its loggers (ours among them) keep what they get from the root logger, and with
    its API server comes a package that raises the root logger's level."""
    if "caplog" in request.fixturenames:
        monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
        request.getfixturevalue("caplog").set_level(logging.WARNING, logger="vllm.jdlora")
