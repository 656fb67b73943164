"""When kernels are as exact as plain arithmetic allows: on every CPU, on the emulator and on a GPU alike.

The measure is a baseline: the same computation in plain PyTorch, with every product of matrices and every sum
computed term after term, in float32 (`TermByTerm`), in each of several orders. It is the least exact way that an
implementation would choose, and the same on every machine, which eager PyTorch is not: libraries sum in as many parts
as their instruction set suggests, and are more exact by the square root of that.

A result's error is its difference from the reference in float64. Two statistics of all errors of several draws of the
inputs are compared with the baseline's: the root mean square, and the 0.999 quantile of the sizes, so that a few wrong
elements are seen too. They may be RMS_RATIO and TAIL_RATIO times the baseline's, or one rounding (`unit`) of the
result itself where that is more. (Half of some 100,000 comparisons, of suites with other seeds under three instruction
sets and on the emulator, were below 0.52 and 0.46. The largest were 4.4 and 4.3, where few rows' weights decide; with
as many rows as the tests have now, 2.4 of 44,032.)

To that comes a sum of `terms` terms that the baseline makes in parts: with terms of one size, partial sum k is sqrt(k)
of them and is rounded by 0.42 of 2^-24 of itself, in all 0.3 sqrt(terms) 2^-24 of the result (SUMMED has half as much
again and more). Results that are zero but for rounding, because the gradients of a row's scores cancel, have errors but
no size: those are a few numbers' chance, of sums of D products, some square root of D large, and may be CANCELLED
roundings of the largest result (17 at most were measured, at D 96).
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

from pytbptt.ops import philox
from pytbptt.ops.rel_attention import reference

Results = dict[str, Tensor]

RMS_RATIO, TAIL_RATIO = 5.0, 6.0
TAIL = 0.999
SUMMED = 0.5 * 2.0**-24
CANCELLED = 32
AT_ONCE = 512
DRAWN = 2000  # elements of all draws together, where one has fewer
MOST_DRAWS = 20

aten = torch.ops.aten


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Not pytest's monkeypatch, whose newer versions delete what torch makes up at every access."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def round_to_tf32(tensor: Tensor) -> Tensor:
    return ((tensor.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class TermByTerm(TorchDispatchMode):
    """Products of matrices and sums over dimensions, forward and backward, one term after another: of 16 bits in
    float32. Every `order` but 0 is drawn at random. With `in_tf32`, the operands of products are rounded to TF32
    first, as tensor cores do. Products of more than AT_ONCE terms are the sum of parts of so many, side by side, or
    they would take minutes."""

    def __init__(self, order: int = 0, in_tf32: bool = False) -> None:
        super().__init__()
        self.order = order
        self.rounded = round_to_tf32 if in_tf32 else lambda operand: operand

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
        left, right = self.rounded(_widened(left)), self.rounded(_widened(right))
        terms = left.shape[-1]
        parts = max(1, math.ceil(terms / AT_ONCE))
        each = math.ceil(terms / parts)
        order, missing = self._ordered(terms), parts * each - terms
        left = F.pad(left[..., order], (0, missing)).unflatten(-1, (parts, each)).movedim(-2, -3)
        right = F.pad(right[..., order, :], (0, 0, 0, missing)).unflatten(-2, (parts, each))
        total = left.new_zeros(*left.shape[:-1], right.shape[-1])
        for k in range(each):
            total = self.add(total, left[..., k, None] * right[..., None, k, :])
        return functools.reduce(self.add, total.unbind(-3))

    def add(self, total: Tensor, term: Tensor) -> Tensor:
        return total + term

    def _sum(self, tensor: Tensor, dims: Sequence[int] | None, keepdim: bool = False, dtype: Any = None) -> Tensor:
        places = [dim % tensor.dim() for dim in dims or range(tensor.dim())]
        rest = [dim for dim in range(tensor.dim()) if dim not in places]
        terms = _widened(tensor).permute(*places, *rest).flatten(0, len(places) - 1)
        total = terms.new_zeros(terms.shape[1:])
        for k in self._ordered(len(terms)):
            total = self.add(total, terms[k])
        if keepdim:
            total = total.view([1 if dim in places else size for dim, size in enumerate(tensor.shape)])
        return total.to(dtype or tensor.dtype)

    def _ordered(self, terms: int) -> list[int]:
        drawn = list(range(terms))
        if self.order:
            random.Random(self.order).shuffle(drawn)
        return drawn


def _widened(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def attention_baseline(
    problem: Results, gradient_of: Callable[[Tensor], Tensor], order: int = 0, in_tf32: bool = False, **options: Any
) -> Results:
    """The output and gradients of rel_attention as its kernels compute them, in plain PyTorch, term by term.

    In float32, with what enters a product rounded to the inputs' dtype. Of the softmax the backward has only the rows'
    log-sum-exp, in units of log2: it computes the scores once more, in another order, and takes from the gradients of
    a row's weights one dot product, that of the output with its gradient; of the output it also has what rounding took.
    """
    dtype = problem["query"].dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = {name: tensor.detach().to(wide).requires_grad_() for name, tensor in problem.items()}

    def rounded(tensor: Tensor) -> Tensor:
        return tensor + (tensor.to(dtype).to(wide) - tensor).detach()

    def joined(name: str) -> Tensor:
        return torch.cat([inputs[f"memory_{name}"], inputs[name]], dim=1) if "memory_key" in inputs else inputs[name]

    def sums() -> Tensor:
        query, content_bias, position_bias = (inputs[name] for name in ("query", "content_bias", "position_bias"))
        to_content, to_position = rounded(query + content_bias), rounded(query + position_bias)
        return reference.unscaled_scores(to_content, to_position, joined("key"), inputs["position"])

    B, T, H, D = problem["query"].shape
    value = joined("value").detach()
    visible = reference.visible_keys(T, value.shape[1], options.get("first_key"), options.get("window"), value.device)
    scale, p = options.get("scale", D**-0.5), options.get("dropout_p", 0.0)
    log2_scale = scale * math.log2(math.e)
    kept = torch.ones((), device=value.device)
    if p:
        mask = philox.attention_keep_mask(options["seed"], B, H, T, value.shape[1], p)
        kept = mask.to(wide) / (1.0 - philox.dropout_threshold(p) / 65536)
    with TermByTerm(2 * order, in_tf32), torch.no_grad():
        scores = (log2_scale * sums()).masked_fill(~visible, -math.inf)
        most = scores.amax(dim=-1, keepdim=True)
        log_sum_exp = most + (scores - most).exp2().sum(dim=-1, keepdim=True).log2()
        weights = (scores - log_sum_exp).exp2().masked_fill(~visible, 0.0)
        exact_out = torch.einsum("bhij,bjhd->bihd", rounded(weights * kept), value)
        out = exact_out.to(dtype)
        rounding = (exact_out - out).to(dtype)
        grad = gradient_of(out).to(wide)
        dots = (grad * (out.to(wide) + rounding)).sum(dim=-1).transpose(1, 2).unsqueeze(-1)
    with TermByTerm(2 * order + 1, in_tf32):
        again = sums()
        weights = (log2_scale * again.detach() - log_sum_exp).exp2().masked_fill(~visible, 0.0)
        grad_value = torch.einsum("bhij,bihd->bjhd", rounded(weights * kept), grad)
        grad_weights = torch.einsum("bihd,bjhd->bhij", grad, value) * kept
        grad_scores = rounded(weights * (grad_weights - dots)) * scale
        others = [name for name in inputs if not name.endswith("value")]
        gradients = dict(zip(others, torch.autograd.grad(again, [inputs[n] for n in others], grad_scores), strict=True))
    M = value.shape[1] - T
    gradients |= {"memory_value": grad_value[:, :M], "value": grad_value[:, M:]}
    return {"out": out, **{name: gradients[name].to(dtype) for name in inputs}}


def enough_draws(*sizes: int) -> range:
    """The numbers of so many draws of a result of this many elements that errors have a distribution."""
    return range(min(MOST_DRAWS, 1 + DRAWN // max(1, math.prod(sizes))))


def orders(*sizes: int) -> range:
    """In how many orders to compute the baseline of such a result: where it has few elements, one may be lucky."""
    return range(4 if math.prod(sizes) < DRAWN else 2)


def root_mean_square(tensor: Tensor) -> float:
    return float(tensor.detach().double().square().mean().sqrt())


def tail(tensor: Tensor) -> float:
    """The TAIL quantile of the elements' sizes; of fewer elements than it needs, the largest."""
    sizes = tensor.detach().double().abs().flatten()
    return float(sizes.kthvalue(math.ceil(TAIL * len(sizes)))[0])


def assert_as_exact_as_baseline(
    found: Sequence[Results],
    exact: Sequence[Results],
    baselines: Sequence[Sequence[Results]],
    unit: float,
    terms: Mapping[str, int] | None = None,
) -> None:
    """
    Args:
        found: what the kernels computed, of every draw.
        exact: the reference's in float64.
        baselines: plain PyTorch's in the kernels' dtype, under TermByTerm, of every draw, for each of `orders`.
        unit: one rounding, relative, of the arithmetic in question.
        terms: how many terms the kernels may sum where the baseline sums parts; for all results that are not named, 0.
    """
    sizes = {name: _joined(exact, name) for name in found[0]}
    for name, size in sizes.items():
        assert found[0][name].shape == exact[0][name].shape, name
        if size.numel() == 0:
            continue
        error = _joined(found, name) - size
        of_baseline = torch.cat([_joined(baseline, name) - size for baseline in baselines])
        for measure, ratio in ((root_mean_square, RMS_RATIO), (tail, TAIL_RATIO)):
            scale, largest = measure(size), max(measure(other) for other in sizes.values() if other.numel())
            summed = SUMMED * math.sqrt((terms or {}).get(name, 0)) * scale
            rounded = CANCELLED * unit * largest if scale < 1e-9 * largest else unit * scale
            tolerance = max(ratio * measure(of_baseline), rounded) + summed
            assert measure(error) <= tolerance, (
                f"{name}: {measure.__name__} of the error {measure(error):.2e}, expected at most {tolerance:.2e}"
            )


def _joined(draws: Sequence[Results], name: str) -> Tensor:
    return torch.cat([draw[name].double().flatten() for draw in draws])
