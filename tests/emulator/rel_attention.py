"""Calls the emulated kernels with torch's tensors, as the compiled op calls them on a GPU."""

from ctypes import POINTER, Structure, byref, c_bool, c_char_p, c_double, c_int, c_int64, c_uint32, c_void_p

import torch
from torch import Tensor

from pytbptt.ops.philox import dropout_threshold
from tests.emulator.build import library

DTYPES = {"half": torch.float16, "bfloat16": torch.bfloat16, "float": torch.float32, "Tf32": torch.float32}
SCALARS = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}  # csrc/common/scalar.h
Problem = dict[str, Tensor]


class Operand(Structure):
    _fields_ = [("data", c_void_p), ("batch", c_int64), ("row", c_int64), ("head", c_int64)]


class RelAttention(Structure):
    """csrc/rel_attention/params.h, as the two below."""

    _fields_ = [
        *((size, c_int64) for size in "BTMHDR"),
        ("dtype", c_int),
        *(
            (name, Operand)
            for name in ("query key value memory_key memory_value position content_bias position_bias".split())
        ),
        ("first_key", c_void_p),
        ("window", c_int64),
        ("scale", c_double),
        ("dropout_threshold", c_uint32),
        ("keep_scale", c_double),
        ("seed", c_void_p),
    ]


class Forward(Structure):
    _fields_ = [("inputs", RelAttention), ("out", c_void_p), ("log_sum_exp", c_void_p), ("rounding", c_void_p)]


GRADIENTS = "query key value position content_bias position_bias memory_key memory_value".split()


class Backward(Structure):
    _fields_ = [
        ("inputs", RelAttention),
        ("grad_out", Operand),
        ("out", Operand),
        ("rounding", Operand),
        ("log_sum_exp", c_void_p),
        ("memory_needs_grad", c_bool),
        *((name, c_void_p) for name in GRADIENTS),
    ]


def operand(tensor: Tensor) -> Operand:
    strides = [0, 0, *tensor.stride()[:-1]][-3:]
    if tensor.dim() == 3:
        strides = [0, *tensor.stride()[:-1]]
    return Operand(tensor.data_ptr(), *strides)


class Kernels:
    """The kernels of one kind of arithmetic and one padded head size, under one schedule, on a machine with or without
    warpgroups; `edit` as for `library`."""

    def __init__(
        self,
        kind: str,
        padded: int,
        schedule: int = 0,
        edit: tuple[str, str, str] | None = None,
        warpgroups: bool = False,
    ) -> None:
        self.kernels = library("rel_attention.cpp", f"KIND={kind}", f"HEAD_SIZE={padded}", edit=edit)
        self.schedule, self.warpgroups = schedule, warpgroups

    def _add_buffers(self, inputs: Problem, results: list[Tensor]) -> None:
        for tensor, writable in [*((t, False) for t in inputs.values()), *((t, True) for t in results)]:
            storage = tensor.untyped_storage()
            self.kernels.add_buffer(c_void_p(storage.data_ptr()), c_int64(storage.nbytes()), writable)

    @staticmethod
    def _inputs(
        problem: Problem,
        *,
        first_key: Tensor | None = None,
        window: int | None = None,
        scale: float | None = None,
        dropout_p: float = 0.0,
        seed: Tensor | None = None,
    ) -> tuple[RelAttention, Problem]:
        B, T, H, D = problem["query"].shape
        M = problem["memory_key"].shape[1] if "memory_key" in problem else 0
        threshold = dropout_threshold(dropout_p)
        extra = {name: t for name, t in (("first_key", first_key), ("seed", seed)) if t is not None}
        launch = RelAttention(
            B, T, M, H, D, problem["position"].shape[0], SCALARS[problem["query"].dtype],
            **{name: operand(t) for name, t in problem.items()},
            **{name: t.data_ptr() for name, t in extra.items()},
            window=min(window or M + T, M + T), scale=D**-0.5 if scale is None else scale,
            dropout_threshold=threshold, keep_scale=1 / (1 - threshold / 65536),
        )  # fmt: skip
        return launch, problem | extra

    def forward(self, problem: Problem, **options) -> dict[str, Tensor]:
        """What csrc/rel_attention/params.h calls the results of RelAttentionForward, by name; all start as NaN."""
        problem = {name: t.detach() for name, t in problem.items()}
        launch, inputs = self._inputs(problem, **options)
        out = torch.full(problem["query"].shape, float("nan"), dtype=problem["query"].dtype)
        B, T, H, _ = out.shape
        log_sum_exp = torch.full((B, H, T), float("nan"))
        results = {"out": out, "log_sum_exp": log_sum_exp}
        if out.element_size() == 2:
            results["rounding"] = out.clone()
        workspace = self._workspace("forward_workspace", launch)
        self._add_buffers(inputs, [*results.values(), workspace])
        addresses = {name: tensor.data_ptr() for name, tensor in results.items()}
        self._check("forward", Forward(launch, **addresses), workspace.data_ptr())
        return results

    def backward(
        self,
        problem: Problem,
        grad_out: Tensor,
        results: Problem,
        *,
        memory_needs_grad: bool,
        **options,
    ) -> Problem:
        """The gradients by name, after a forward with these results; all start as NaN, and so does the workspace."""
        problem = {name: t.detach() for name, t in problem.items()}
        launch, inputs = self._inputs(problem, **options)
        wanted = {name: t for name, t in problem.items() if memory_needs_grad or not name.startswith("memory")}
        gradients = {name: torch.full(t.shape, float("nan"), dtype=t.dtype) for name, t in wanted.items()}
        given = {"grad_out": grad_out, **results}
        rounding = operand(results["rounding"]) if "rounding" in results else Operand()
        parameters = Backward(
            launch, operand(grad_out), operand(results["out"]), rounding, results["log_sum_exp"].data_ptr(),
            memory_needs_grad, **{name: t.data_ptr() for name, t in gradients.items()},
        )  # fmt: skip
        workspace = self._workspace("backward_workspace", parameters)
        self._add_buffers(inputs | given, [*gradients.values(), workspace])
        self._check("backward", parameters, workspace.data_ptr())
        return gradients

    def _workspace(self, name: str, launch: Structure) -> Tensor:
        """What the launch that follows wants of memory."""
        self.kernels.begin(self.schedule, self.warpgroups)
        function = getattr(self.kernels, name)
        function.restype = c_int64
        return torch.full((function(byref(launch)) // 4,), float("nan"))

    def _check(self, name: str, launch: Structure, *rest: int) -> None:
        function = getattr(self.kernels, name)
        function.restype = c_char_p
        function.argtypes = [POINTER(type(launch)), *([c_void_p] * len(rest))]
        error = function(byref(launch), *rest)
        assert error is None, error.decode()
