"""The two operations that pytbptt exists for: each is one public function over a reference in plain PyTorch."""

from pytbptt.ops.dispatch import backend
from pytbptt.ops.lstm.op import lstm
from pytbptt.ops.rel_attention.op import rel_attention

__all__ = ["backend", "lstm", "rel_attention"]
