"""Layer normalisation that is correct under torch.func."""

from torch import Tensor, nn

from pytbptt.runtime.device import autocast_dtype, is_in_func_transform


class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm over the last dimension.

    Under transforms of torch.func it is computed by plain operations: torch 2.13's own layer_norm gives wrong results
    for func.grad of func.jvp.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not is_in_func_transform():
            return super().forward(input)
        wide = input if input.element_size() > 2 else input.float()
        centred = wide - wide.mean(dim=-1, keepdim=True)
        normalised = centred * (centred.square().mean(dim=-1, keepdim=True) + self.eps).rsqrt()
        result = normalised * self.weight + self.bias
        return result.to(input.dtype) if autocast_dtype(input) is None else result
