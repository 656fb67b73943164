"""The two ops, each with a compiled implementation and a reference in plain PyTorch."""

from pytbptt.ops.dispatch import backend
from pytbptt.ops.lstm.op import lstm
from pytbptt.ops.rel_attention.op import rel_attention

__all__ = ["backend", "lstm", "rel_attention"]
