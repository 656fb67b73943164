"""The cross-entropy of a linear layer with many outputs, without ever storing all logits."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from pytbptt.nn import padded_linear
from pytbptt.runtime.device import accumulation_dtype, autocast_dtype, is_in_func_transform

IGNORE_INDEX = -100
"""Target that is not scored: the default ignore_index of torch.nn.functional.cross_entropy."""

OutputRange = tuple[int, int, int]
"""A range of a softmax's outputs: (number of the weight, first row, end row)."""

LOGITS_BLOCK_SIZE = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Logits computed at a time. On the CPU 16 MiB, which malloc reuses: blocks above 32 MiB come fresh from the system
every time, and the first access to their pages takes longer than computing them."""
OUTPUT_BLOCK_SIZE = {"cpu": 1 << 14, "cuda": 1 << 18}
"""The most outputs of a block, which bounds the block's weights and their gradient where there are few inputs."""


def linear_cross_entropy(
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    output_ranges: Sequence[Sequence[OutputRange]],
) -> tuple[Tensor, ...]:
    """The negative log-likelihoods of several softmaxes: of `inputs[i]` at `targets[i]` for softmax i.

    The logits are computed in blocks of outputs, for all inputs: once for the sums of exponentials and, in the backward
    pass, once more for the gradients. So the whole matrix of logits never exists, and each gradient is written once.
    It does exist with create_graph=True, and under transforms of torch.func.

    Args:
        inputs: (N, E) each; N may be 0.
        targets: int64 (N,) each, an index into the softmax's outputs; IGNORE_INDEX is not scored.
        weights, biases: (V, E) and (V,) each.
        output_ranges: the ranges of each softmax's outputs. Together they cover every row of the weights once.

    Returns:
        (N,) each in nats, float32 or wider, 0 where a target is not scored. Under autocast the products are computed in
        its dtype, the sums are not.

    Source: recomputing the logits in the backward pass as in Wijmans et al., "Cut Your Losses in Large-Vocabulary
    Language Models" (2025), section 4.2.
    """
    dtype = autocast_dtype(inputs[0])
    if dtype is not None:
        inputs = [rows.to(dtype) for rows in inputs]
    tensors = (*inputs, *targets, *weights, *biases)
    if is_in_func_transform():
        return _materialized_cross_entropy(output_ranges, tensors)
    apply = cast(Callable[..., tuple[Tensor, ...]], _LinearCrossEntropy.apply)
    return apply(output_ranges, *tensors)


def _materialized_cross_entropy(
    output_ranges: Sequence[Sequence[OutputRange]], tensors: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The same in plain operations, which every transform of torch can differentiate."""
    nlls = []
    for inputs, targets, blocks in _iter_softmaxes(output_ranges, tensors):
        logits = torch.cat([_logits(inputs, weight, bias) for _, weight, bias, _ in blocks], dim=1)
        scored = targets != IGNORE_INDEX
        index = targets.masked_fill(~scored, 0).unsqueeze(1)
        nlls.append(-logits.log_softmax(dim=1).gather(1, index).squeeze(1).masked_fill(~scored, 0.0))
    return tuple(nlls)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output_ranges: Sequence[Sequence[OutputRange]], *tensors: Tensor) -> tuple[Tensor, ...]:
        sums, nlls = [], []
        for inputs, targets, blocks in _iter_softmaxes(output_ranges, tensors):
            block_log_sums, target_logits = [], inputs.new_zeros(len(inputs), dtype=accumulation_dtype(inputs.dtype))
            for first, weight, bias, _ in blocks:
                logits = _logits(inputs, weight, bias)
                inside, index = _local_targets(targets, first, len(weight))
                target_logits = torch.where(inside, logits.gather(1, index).squeeze(1), target_logits)
                largest = logits.amax(dim=1, keepdim=True)
                block_log_sums.append(logits.sub_(largest).exp_().sum(dim=1).log() + largest.squeeze(1))
            sums.append(torch.stack(block_log_sums).logsumexp(dim=0))
            nlls.append((sums[-1] - target_logits).masked_fill(targets == IGNORE_INDEX, 0.0))
        ctx.output_ranges = output_ranges
        ctx.save_for_backward(*tensors, *sums)
        return tuple(nlls)

    @staticmethod
    def backward(ctx: Any, *grad_nlls: Tensor) -> tuple[Tensor | None, ...]:
        count, saved = len(ctx.output_ranges), ctx.saved_tensors  # read once: checkpointing does not unpack them twice
        tensors, sums = saved[:-count], saved[-count:]
        if torch.is_grad_enabled():  # create_graph=True
            return None, *_differentiable_gradients(ctx.output_ranges, tensors, grad_nlls)
        parameters = tensors[2 * count :]
        grads = [torch.empty_like(parameter) for parameter in parameters]
        grad_inputs = []
        for (inputs, targets, blocks), log_sum, grad in zip(
            _iter_softmaxes(ctx.output_ranges, tensors), sums, grad_nlls, strict=True
        ):
            scale = grad * (targets != IGNORE_INDEX)
            grad_input = torch.zeros_like(inputs, dtype=log_sum.dtype)
            for first, weight, bias, (n, begin, end) in blocks:
                grad_logits = _logits(inputs, weight, bias).sub_(log_sum.unsqueeze(1)).exp_().mul_(scale.unsqueeze(1))
                inside, index = _local_targets(targets, first, len(weight))
                grad_logits.scatter_add_(1, index, -(scale * inside).unsqueeze(1))
                grads[n + len(parameters) // 2][begin:end] = grad_logits.sum(dim=0)
                grad_logits, rows, weight = _pad_operands(grad_logits.to(inputs.dtype), inputs, weight.to(inputs.dtype))
                grad_input += (grad_logits @ weight)[:, : inputs.shape[1]]
                _mm_out(grads[n][begin:end], grad_logits.t(), rows)
            grad_inputs.append(grad_input.to(inputs.dtype))
        return None, *grad_inputs, *[None] * count, *grads


def _differentiable_gradients(
    output_ranges: Sequence[Sequence[OutputRange]], tensors: Sequence[Tensor], grad_nlls: Sequence[Tensor]
) -> list[Tensor | None]:
    """The gradients of all tensors, with the graph to differentiate them."""
    # Views, so that the gradient does not follow the inputs' own history, which may lead to the same weights.
    tensors = [tensor.view_as(tensor) for tensor in tensors]
    needed = [tensor for tensor in tensors if tensor.requires_grad]
    nlls = _materialized_cross_entropy(output_ranges, tensors)
    grads = iter(torch.autograd.grad(nlls, needed, grad_nlls, create_graph=True, materialize_grads=True))
    return [next(grads) if tensor.requires_grad else None for tensor in tensors]


Block = tuple[int, Tensor, Tensor, OutputRange]


def _iter_softmaxes(
    output_ranges: Sequence[Sequence[OutputRange]], tensors: Sequence[Tensor]
) -> Iterator[tuple[Tensor, Tensor, Iterator[Block]]]:
    """Every softmax's inputs, targets and blocks of outputs."""
    count = len(output_ranges)
    parameters = tensors[2 * count :]
    weights, biases = parameters[: len(parameters) // 2], parameters[len(parameters) // 2 :]
    for inputs, targets, ranges in zip(tensors[:count], tensors[count : 2 * count], output_ranges, strict=True):
        yield inputs, targets, _iter_blocks(ranges, len(inputs), weights, biases)


def _iter_blocks(
    ranges: Sequence[OutputRange], inputs: int, weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> Iterator[Block]:
    """Each block's first output, its weight and bias, and their range."""
    device_type = "cuda" if weights[0].device.type == "cuda" else "cpu"
    size = min(OUTPUT_BLOCK_SIZE[device_type], max(256, LOGITS_BLOCK_SIZE[device_type] // max(1, inputs)))
    first = 0
    for n, begin, end in ranges:
        for start in range(begin, end, size):
            stop = min(start + size, end)
            yield first, weights[n][start:stop], biases[n][start:stop], (n, start, stop)
            first += stop - start


def _logits(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """New logits (N, outputs), float32 or wider, which the caller may overwrite."""
    return linear(inputs, weight.to(inputs.dtype), bias.to(inputs.dtype)).to(accumulation_dtype(inputs.dtype))


def _pad_operands(grad_logits: Tensor, inputs: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The operands of the gradients' products, padded where tensor cores need it."""
    if not padded_linear.needs_padding(inputs.dtype, inputs.device, *weight.shape):
        return grad_logits, inputs, weight
    return padded_linear.pad(grad_logits), padded_linear.pad(inputs), padded_linear.pad(weight, rows=True)


def _mm_out(result: Tensor, left: Tensor, right: Tensor) -> None:
    """Write left @ right, without its padding, to `result`; directly, if there is no padding and no conversion."""
    if result.dtype == left.dtype and result.shape == (left.shape[0], right.shape[1]):
        torch.mm(left, right, out=result)
    else:
        result.copy_((left @ right)[: result.shape[0], : result.shape[1]])


def _local_targets(targets: Tensor, first: int, outputs: int) -> tuple[Tensor, Tensor]:
    """Which targets are in a block, (N,), and their index within it, (N, 1); any valid index for the others."""
    inside = (targets >= first) & (targets < first + outputs)
    return inside, (targets - first).clamp(0, outputs - 1).unsqueeze(1)


def linear(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """F.linear; with 4 to 15 inputs on the CPU computed as its transpose, for which MKL takes half the time."""
    if inputs.device.type == "cpu" and 4 <= len(inputs) < 16 and not torch.compiler.is_compiling():
        return torch.addmm(bias.unsqueeze(1), weight, inputs.t()).t()
    return F.linear(inputs, weight, bias)
