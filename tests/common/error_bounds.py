"""Error bounds for kernels, the same on every CPU, on the emulator and on a GPU.

The baseline is the same computation in plain PyTorch with sequential float32 sums (`SequentialSumMode`), in several
summation orders. It is the least accurate reasonable implementation, and independent of the machine. Eager PyTorch is
neither: libraries sum in as many partial sums as the instruction set suggests, which reduces the error by the square
root of their number.

The error is the difference from the float64 reference. Two statistics of the errors of several random inputs are
compared with the baseline's: the root mean square, and the 0.999 quantile of the absolute values, which a few wrong
elements change. They may be RMS_RATIO and TAIL_RATIO times the baseline's, or one rounding (`eps`) of the result if
that is more. Measured ratios, with several seeds and instruction sets and on the emulator:

                                     root mean square  0.999 quantile
    median of 100,000 comparisons                0.52            0.46
    maximum, of inputs with few rows              4.4             4.3
    maximum of 44,032 comparisons with as many rows as the tests have: 2.4

Two further allowances:

- `terms`: a kernel may sum so many terms in one chain where the baseline sums blocks. With terms of one size, partial
  sum k is sqrt(k) times a term, and rounding adds 0.42 * 2^-24 of it at each step: in total 0.3 * sqrt(terms) * 2^-24
  of the result. EPS_PER_SQRT_TERM is somewhat more than 1.5 times as much.
- Results that are zero except for rounding, because the gradients of a row's scores cancel, have no scale of their own:
  MAX_CANCELLED_ROUNDINGS roundings of the largest result are allowed (measured: 17 at most, at D = 96).
"""

import functools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pytbptt.ops.philox import dropout_threshold
from pytbptt.ops.rel_attention import reference

Tensors = dict[str, Tensor]

RMS_RATIO, TAIL_RATIO = 5.0, 6.0
TAIL_QUANTILE = 0.999
EPS_PER_SQRT_TERM = 0.5 * 2.0**-24
MAX_CANCELLED_ROUNDINGS = 32
SUM_BLOCK = 512
MIN_ELEMENTS = 2000  # of all draws together
MAX_DRAWS = 20

aten = torch.ops.aten


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    # Not monkeypatch: it fails on attributes that torch makes dynamically at every access.
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def round_to_tf32(tensor: Tensor) -> Tensor:
    return ((tensor.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class SequentialSumMode(TorchDispatchMode):
    """Computes matrix products and sums, forward and backward, as sequential sums; 16-bit inputs in float32.

    Products of more than SUM_BLOCK terms are sums of blocks of at most so many terms, which are computed in parallel to
    save time.

    Args:
        order: 0 sums in the order of the indices; any other number seeds a random order.
        in_tf32: round the operands of products to TF32 first, as tensor cores do.
    """

    def __init__(self, order: int = 0, in_tf32: bool = False) -> None:
        super().__init__()
        self.order = order
        self.round_operand = round_to_tf32 if in_tf32 else lambda operand: operand

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (aten.mm.default, aten.bmm.default):
            return self._product(*args).to(args[0].dtype)
        if function is aten.addmm.default:
            added, left, right = args
            return (added + self._product(left, right)).to(added.dtype)
        if function is aten.sum.dim_IntList and args[0].is_floating_point():
            return self._sum(*args, **kwargs)
        return function(*args, **kwargs)

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        left, right = self.round_operand(_widen(left)), self.round_operand(_widen(right))
        terms = left.shape[-1]
        blocks = max(1, math.ceil(terms / SUM_BLOCK))
        block_size = math.ceil(terms / blocks)
        order, padding = self._term_order(terms), blocks * block_size - terms
        left = F.pad(left[..., order], (0, padding)).unflatten(-1, (blocks, block_size)).movedim(-2, -3)
        right = F.pad(right[..., order, :], (0, 0, 0, padding)).unflatten(-2, (blocks, block_size))
        total = left.new_zeros(*left.shape[:-1], right.shape[-1])
        for k in range(block_size):
            total = self.add(total, left[..., k, None] * right[..., None, k, :])
        return functools.reduce(self.add, total.unbind(-3))

    def add(self, total: Tensor, term: Tensor) -> Tensor:
        return total + term

    def _sum(self, tensor: Tensor, dims: Sequence[int] | None, keepdim: bool = False, dtype: Any = None) -> Tensor:
        summed = [dim % tensor.dim() for dim in dims or range(tensor.dim())]
        kept = [dim for dim in range(tensor.dim()) if dim not in summed]
        terms = _widen(tensor).permute(*summed, *kept).flatten(0, len(summed) - 1)
        total = terms.new_zeros(terms.shape[1:])
        for k in self._term_order(len(terms)):
            total = self.add(total, terms[k])
        if keepdim:
            total = total.view([1 if dim in summed else size for dim, size in enumerate(tensor.shape)])
        return total.to(dtype or tensor.dtype)

    def _term_order(self, terms: int) -> list[int]:
        indices = list(range(terms))
        if self.order:
            random.Random(self.order).shuffle(indices)
        return indices


def _widen(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def attention_baseline(
    problem: Tensors, gradient_of: Callable[[Tensor], Tensor], order: int = 0, in_tf32: bool = False, **options: Any
) -> Tensors:
    """Output and gradients of rel_attention by the kernels' algorithm, in plain PyTorch with sequential sums.

    In float32, with the operands of products rounded to the inputs' dtype. The backward pass recomputes the scores, in
    another summation order, and the probabilities from the rows' log-sum-exp (base 2). delta is the dot product of the
    output's gradient with the output, to which the forward pass's rounding residual is added.
    """
    dtype = problem["query"].dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = {name: tensor.detach().to(wide).requires_grad_() for name, tensor in problem.items()}

    def rounded(tensor: Tensor) -> Tensor:
        """Rounds to the inputs' dtype; the gradient passes unchanged."""
        return tensor + (tensor.to(dtype).to(wide) - tensor).detach()

    def with_memory(name: str) -> Tensor:
        return torch.cat([inputs[f"memory_{name}"], inputs[name]], dim=1) if "memory_key" in inputs else inputs[name]

    def unscaled_scores() -> Tensor:
        query, content_bias, position_bias = (inputs[name] for name in ("query", "content_bias", "position_bias"))
        to_content, to_position = rounded(query + content_bias), rounded(query + position_bias)
        return reference.unscaled_scores(to_content, to_position, with_memory("key"), inputs["position"])

    B, T, H, D = problem["query"].shape
    value = with_memory("value").detach()
    visible = reference.visible_keys(T, value.shape[1], options.get("first_key"), options.get("window"), value.device)
    scale, p = options.get("scale", D**-0.5), options.get("dropout_p", 0.0)
    log2_scale = scale * math.log2(math.e)
    keep = torch.ones((), device=value.device)
    if p:
        mask = reference.attention_keep_mask(options["seed"], B, H, T, value.shape[1], p)
        keep = mask.to(wide) / (1.0 - dropout_threshold(p) / 65536)
    with SequentialSumMode(2 * order, in_tf32), torch.no_grad():
        scores = (log2_scale * unscaled_scores()).masked_fill(~visible, -math.inf)
        row_max = scores.amax(dim=-1, keepdim=True)
        log_sum_exp = row_max + (scores - row_max).exp2().sum(dim=-1, keepdim=True).log2()
        weights = (scores - log_sum_exp).exp2().masked_fill(~visible, 0.0)
        wide_out = torch.einsum("bhij,bjhd->bihd", rounded(weights * keep), value)
        out = wide_out.to(dtype)
        rounding_residual = (wide_out - out).to(dtype)
        grad = gradient_of(out).to(wide)
        delta = (grad * (out.to(wide) + rounding_residual)).sum(dim=-1).transpose(1, 2).unsqueeze(-1)
    with SequentialSumMode(2 * order + 1, in_tf32):
        recomputed = unscaled_scores()
        weights = (log2_scale * recomputed.detach() - log_sum_exp).exp2().masked_fill(~visible, 0.0)
        grad_value = torch.einsum("bhij,bihd->bjhd", rounded(weights * keep), grad)
        grad_weights = torch.einsum("bihd,bjhd->bhij", grad, value) * keep
        grad_scores = rounded(weights * (grad_weights - delta)) * scale
        names = [name for name in inputs if not name.endswith("value")]
        score_gradients = torch.autograd.grad(recomputed, [inputs[name] for name in names], grad_scores)
        gradients = dict(zip(names, score_gradients, strict=True))
    M = value.shape[1] - T
    gradients |= {"memory_value": grad_value[:, :M], "value": grad_value[:, M:]}
    return {"out": out, **{name: gradients[name].to(dtype) for name in inputs}}


def input_draws(*sizes: int) -> range:
    """Seeds of the random inputs for a result of these sizes: so many that MIN_ELEMENTS are compared, if possible."""
    return range(min(MAX_DRAWS, 1 + MIN_ELEMENTS // max(1, math.prod(sizes))))


def summation_orders(*sizes: int) -> range:
    """Orders in which to compute the baseline of a result of these sizes: more if it has few elements."""
    return range(4 if math.prod(sizes) < MIN_ELEMENTS else 2)


def root_mean_square(tensor: Tensor) -> float:
    return float(tensor.detach().double().square().mean().sqrt())


def tail_quantile(tensor: Tensor) -> float:
    """The TAIL_QUANTILE quantile of the absolute values: for few elements the largest."""
    absolute = tensor.detach().double().abs().flatten()
    return float(absolute.kthvalue(math.ceil(TAIL_QUANTILE * len(absolute)))[0])


def assert_error_within_baseline(
    actual: Sequence[Tensors],
    reference: Sequence[Tensors],
    baselines: Sequence[Sequence[Tensors]],
    eps: float,
    terms: Mapping[str, int] | None = None,
) -> None:
    """
    Args:
        actual: the kernels' results for each random input.
        reference: the same in float64.
        baselines: the results under SequentialSumMode in the kernels' dtype, for each of `summation_orders` and input.
        eps: the relative size of one rounding in the kernels' arithmetic.
        terms: by result, how many terms the kernels may sum in one chain where the baseline sums blocks; default: 0.
    """
    references = {name: _concatenate(reference, name) for name in actual[0]}
    for name, exact in references.items():
        assert actual[0][name].shape == reference[0][name].shape, name
        if exact.numel() == 0:
            continue
        error = _concatenate(actual, name) - exact
        baseline_error = torch.cat([_concatenate(baseline, name) - exact for baseline in baselines])
        for statistic, ratio in ((root_mean_square, RMS_RATIO), (tail_quantile, TAIL_RATIO)):
            scale = statistic(exact)
            largest = max(statistic(other) for other in references.values() if other.numel())
            chain = EPS_PER_SQRT_TERM * math.sqrt((terms or {}).get(name, 0)) * scale
            rounding = MAX_CANCELLED_ROUNDINGS * eps * largest if scale < 1e-9 * largest else eps * scale
            tolerance = max(ratio * statistic(baseline_error), rounding) + chain
            assert statistic(error) <= tolerance, (
                f"{name}: {statistic.__name__} of the error {statistic(error):.2e}, expected at most {tolerance:.2e}"
            )


def _concatenate(draws: Sequence[Tensors], name: str) -> Tensor:
    return torch.cat([draw[name].double().flatten() for draw in draws])
