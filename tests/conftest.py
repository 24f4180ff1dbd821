"""What holds for every test: one thread per process where several processes share the machine, and compiled code that is there from the first test on."""

from __future__ import annotations

import os

import torch

from glassformer.core import native

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
native.wait()  # else the roundings of a test would depend on when the background is done with compiling
