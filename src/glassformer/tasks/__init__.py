"""What is learnt: a task turns a batch and a model into a loss."""

from __future__ import annotations

from .next_token import NextToken
from .task import Batch, Loss, Task

__all__ = ["Batch", "Loss", "NextToken", "Task"]
