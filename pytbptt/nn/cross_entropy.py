"""The cross-entropy of a linear layer with many outputs, without holding its logits."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from pytbptt.nn import aligned
from pytbptt.runtime.device import accumulation_dtype, autocast_dtype, is_transformed

UNSCORED = -100
"""The target that is not scored, as in torch.nn.functional.cross_entropy."""

Rows = tuple[int, int, int]
"""Outputs of a softmax: of which weight, from which of its rows on, and before which."""

LOGITS_AT_ONCE = {"cpu": 1 << 22, "cuda": 1 << 26}
"""How many logits exist at a time. On the CPU 16 MiB, which malloc hands out again and again: what is larger than 32
MiB comes fresh from the system every time, and to touch it first takes longer than to compute it."""
OUTPUTS_AT_ONCE = {"cpu": 1 << 14, "cuda": 1 << 18}
"""The most outputs of a block: it bounds the block's weights and their gradient where there are few inputs."""


def linear_cross_entropy(
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    softmaxes: Sequence[Sequence[Rows]],
) -> tuple[Tensor, ...]:
    """The negative log-likelihoods of several softmaxes: of `inputs[i]` at `targets[i]` for softmax i.

    A block of outputs is computed at a time, for all inputs: once for the sums of exponentials and, in the backward
    pass, once more for the gradients. So the logits are never all there, and each gradient is written once. They are
    where the gradients themselves are differentiated (create_graph=True), and under transforms of torch.func.

    Args:
        inputs: (N, E) each; N may be 0.
        targets: int64 (N,) each, counted within the softmax; UNSCORED is not scored.
        weights, biases: (V, E) and (V,) each.
        softmaxes: the outputs of each, one range after another. Together they have every row of the weights once.

    Returns:
        (N,) each in nats, float32 or wider, 0 where nothing is scored. Under autocast the products are in its dtype,
        but not what is summed up.

    Source: the logits are formed anew in the backward pass as in Wijmans et al., "Cut Your Losses in Large-Vocabulary
    Language Models" (2025), section 4.2.
    """
    dtype = autocast_dtype(inputs[0])
    if dtype is not None:
        inputs = [rows.to(dtype) for rows in inputs]
    tensors = (*inputs, *targets, *weights, *biases)
    if is_transformed():
        return _with_all_logits(softmaxes, tensors)
    apply = cast(Callable[..., tuple[Tensor, ...]], _LinearCrossEntropy.apply)
    return apply(softmaxes, *tensors)


def _with_all_logits(softmaxes: Sequence[Sequence[Rows]], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The same in operations that torch can differentiate in every way."""
    nlls = []
    for inputs, targets, blocks in _blocks(softmaxes, tensors):
        logits = torch.cat([_logits(inputs, weight, bias) for _, weight, bias, _ in blocks], dim=1)
        scored = targets != UNSCORED
        place = targets.masked_fill(~scored, 0).unsqueeze(1)
        nlls.append(-logits.log_softmax(dim=1).gather(1, place).squeeze(1).masked_fill(~scored, 0.0))
    return tuple(nlls)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, softmaxes: Sequence[Sequence[Rows]], *tensors: Tensor) -> tuple[Tensor, ...]:
        sums, nlls = [], []
        for inputs, targets, blocks in _blocks(softmaxes, tensors):
            of_blocks, of_targets = [], inputs.new_zeros(len(inputs), dtype=accumulation_dtype(inputs.dtype))
            for first, weight, bias, _ in blocks:
                logits = _logits(inputs, weight, bias)
                inside, place = _find(targets, first, len(weight))
                of_targets = torch.where(inside, logits.gather(1, place).squeeze(1), of_targets)
                largest = logits.amax(dim=1, keepdim=True)
                of_blocks.append(logits.sub_(largest).exp_().sum(dim=1).log() + largest.squeeze(1))
            sums.append(torch.stack(of_blocks).logsumexp(dim=0))
            nlls.append((sums[-1] - of_targets).masked_fill(targets == UNSCORED, 0.0))
        ctx.softmaxes = softmaxes
        ctx.save_for_backward(*tensors, *sums)
        return tuple(nlls)

    @staticmethod
    def backward(ctx: Any, *grads_of_nlls: Tensor) -> tuple[Tensor | None, ...]:
        count, saved = len(ctx.softmaxes), ctx.saved_tensors  # once: checkpointing unpacks them no second time
        tensors, sums = saved[:-count], saved[-count:]
        if torch.is_grad_enabled():  # create_graph=True
            return None, *_differentiable_gradients(ctx.softmaxes, tensors, grads_of_nlls)
        parameters = tensors[2 * count :]
        grads = [torch.empty_like(parameter) for parameter in parameters]
        of_inputs = []
        for (inputs, targets, blocks), log_sum, grad in zip(
            _blocks(ctx.softmaxes, tensors), sums, grads_of_nlls, strict=True
        ):
            scale = grad * (targets != UNSCORED)
            of_input = torch.zeros_like(inputs, dtype=log_sum.dtype)
            for first, weight, bias, (n, begin, end) in blocks:
                of_logits = _logits(inputs, weight, bias).sub_(log_sum.unsqueeze(1)).exp_().mul_(scale.unsqueeze(1))
                inside, place = _find(targets, first, len(weight))
                of_logits.scatter_add_(1, place, -(scale * inside).unsqueeze(1))
                grads[n + len(parameters) // 2][begin:end] = of_logits.sum(dim=0)
                of_logits, rows, weight = _aligned(of_logits.to(inputs.dtype), inputs, weight.to(inputs.dtype))
                of_input += (of_logits @ weight)[:, : inputs.shape[1]]
                _product_into(grads[n][begin:end], of_logits.t(), rows)
            of_inputs.append(of_input.to(inputs.dtype))
        return None, *of_inputs, *[None] * count, *grads


def _differentiable_gradients(
    softmaxes: Sequence[Sequence[Rows]], tensors: Sequence[Tensor], grads_of_nlls: Sequence[Tensor]
) -> list[Tensor | None]:
    """The gradients of all tensors, with the graph that leads to them."""
    # Views, for the inputs' own history may lead to the weights: that is another gradient, which autograd adds.
    tensors = [tensor.view_as(tensor) for tensor in tensors]
    needed = [tensor for tensor in tensors if tensor.requires_grad]
    nlls = _with_all_logits(softmaxes, tensors)
    grads = iter(torch.autograd.grad(nlls, needed, grads_of_nlls, create_graph=True, materialize_grads=True))
    return [next(grads) if tensor.requires_grad else None for tensor in tensors]


Block = tuple[int, Tensor, Tensor, Rows]


def _blocks(
    softmaxes: Sequence[Sequence[Rows]], tensors: Sequence[Tensor]
) -> Iterator[tuple[Tensor, Tensor, Iterator[Block]]]:
    """Every softmax's inputs, targets and blocks of outputs."""
    count = len(softmaxes)
    parameters = tensors[2 * count :]
    weights, biases = parameters[: len(parameters) // 2], parameters[len(parameters) // 2 :]
    for inputs, targets, ranges in zip(tensors[:count], tensors[count : 2 * count], softmaxes, strict=True):
        yield inputs, targets, _blocks_of_one(ranges, len(inputs), weights, biases)


def _blocks_of_one(
    ranges: Sequence[Rows], inputs: int, weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> Iterator[Block]:
    """The number of a block's first output, its weight and bias, and where they are from."""
    kind = "cuda" if weights[0].device.type == "cuda" else "cpu"
    size = min(OUTPUTS_AT_ONCE[kind], max(256, LOGITS_AT_ONCE[kind] // max(1, inputs)))
    first = 0
    for n, begin, end in ranges:
        for start in range(begin, end, size):
            stop = min(start + size, end)
            yield first, weights[n][start:stop], biases[n][start:stop], (n, start, stop)
            first += stop - start


def _logits(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(N, outputs), float32 or wider, and no one else's."""
    return linear(inputs, weight.to(inputs.dtype), bias.to(inputs.dtype)).to(accumulation_dtype(inputs.dtype))


def _aligned(of_logits: Tensor, inputs: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three as their products are best made: as they are, or padded."""
    if not aligned.needs_padding(inputs.dtype, inputs.device, *weight.shape):
        return of_logits, inputs, weight
    return aligned.pad(of_logits), aligned.pad(inputs), aligned.pad(weight, rows=True)


def _product_into(result: Tensor, left: Tensor, right: Tensor) -> None:
    """left @ right, less what they were padded by, without a copy of a large result where that is all of it."""
    if result.dtype == left.dtype and result.shape == (left.shape[0], right.shape[1]):
        torch.mm(left, right, out=result)
    else:
        result.copy_((left @ right)[: result.shape[0], : result.shape[1]])


def _find(targets: Tensor, first: int, outputs: int) -> tuple[Tensor, Tensor]:
    """Which targets lie in a block, (N,), and their place in it, (N, 1); some place for the others."""
    inside = (targets >= first) & (targets < first + outputs)
    return inside, (targets - first).clamp(0, outputs - 1).unsqueeze(1)


def linear(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """F.linear, in the order that MKL prefers: a tail's table meets few rows, and with 4 to 15 the other order doubles
    the time."""
    if inputs.device.type == "cpu" and 4 <= len(inputs) < 16 and not torch.compiler.is_compiling():
        return torch.addmm(bias.unsqueeze(1), weight, inputs.t()).t()
    return F.linear(inputs, weight, bias)
