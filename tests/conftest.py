"""For all tests: one thread for torch.

Their matrices are small. A second thread gains nothing there, and where other processes want the cores too, waiting
for it makes tests up to ten times slower. Servers and engines run in processes of their own and keep their threads.
"""

import torch

torch.set_num_threads(1)
