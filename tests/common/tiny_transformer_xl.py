"""A Transformer-XL that is small enough to compare its outputs token by token."""

import torch
from torch import Tensor

from pytbptt.nn import TransformerXL, TransformerXLConfig

V = 23


def make_model(seed: int = 0, dtype: torch.dtype = torch.float64, **changes: object) -> TransformerXL:
    """A model in evaluation mode whose weights are large enough for every term to matter."""
    sizes = {"vocab_size": V, "n_layer": 3, "d_model": 16, "n_head": 2, "d_head": 5, "d_inner": 20, "mem_len": 6}
    torch.manual_seed(seed)
    return TransformerXL(TransformerXLConfig(**{**sizes, "init_std": 0.3, "cutoffs": (), **changes})).to(dtype).eval()


def random_tokens(streams: int = 3, length: int = 7, seed: int = 1) -> Tensor:
    return torch.randint(V, (streams, length), generator=torch.Generator().manual_seed(seed))
