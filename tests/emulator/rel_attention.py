"""Calls the rel_attention kernels on the emulator with CPU tensors, as the compiled op calls them on a GPU.

The structures mirror those of csrc/rel_attention/params.h.
"""

from ctypes import Structure, byref, c_bool, c_double, c_int, c_int64, c_uint32, c_void_p

import torch
from torch import Tensor

from pytbptt.ops.philox import dropout_threshold
from tests.emulator import bindings
from tests.emulator.bindings import SCALARS, Tensors
from tests.emulator.build import SourcePatch, build_library

DTYPES = {"half": torch.float16, "bfloat16": torch.bfloat16, "float": torch.float32, "Tf32": torch.float32}


class Operand(Structure):
    _fields_ = [("data", c_void_p), ("batch", c_int64), ("row", c_int64), ("head", c_int64)]


class RelAttention(Structure):
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


class RelAttentionForward(Structure):
    _fields_ = [("inputs", RelAttention), ("out", c_void_p), ("log_sum_exp", c_void_p), ("rounding", c_void_p)]


GRADIENTS = "query key value position content_bias position_bias memory_key memory_value".split()


class RelAttentionBackward(Structure):
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


class EmulatedRelAttention:
    """The kernels of one kind and padded head size, under one schedule, on a GPU with or without WGMMA.

    Args:
        kind: a key of DTYPES.
        source_patch: a change of csrc, to inject a fault.
    """

    def __init__(
        self,
        kind: str,
        head_size: int,
        schedule: int = 0,
        source_patch: SourcePatch | None = None,
        wgmma: bool = False,
    ) -> None:
        definitions = (f"KIND={kind}", f"HEAD_SIZE={head_size}")
        self.library = build_library("rel_attention.cpp", *definitions, source_patch=source_patch)
        self.schedule, self.wgmma = schedule, wgmma

    @staticmethod
    def _inputs(
        inputs: Tensors,
        *,
        first_key: Tensor | None = None,
        window: int | None = None,
        scale: float | None = None,
        dropout_p: float = 0.0,
        seed: Tensor | None = None,
    ) -> tuple[RelAttention, Tensors]:
        """The inputs as the kernels take them, and all tensors that these read."""
        B, T, H, D = inputs["query"].shape
        M = inputs["memory_key"].shape[1] if "memory_key" in inputs else 0
        threshold = dropout_threshold(dropout_p)
        options = {name: t for name, t in (("first_key", first_key), ("seed", seed)) if t is not None}
        parameters = RelAttention(
            B, T, M, H, D, inputs["position"].shape[0], SCALARS[inputs["query"].dtype],
            **{name: operand(t) for name, t in inputs.items()},
            **{name: t.data_ptr() for name, t in options.items()},
            window=min(window or M + T, M + T), scale=D**-0.5 if scale is None else scale,
            dropout_threshold=threshold, keep_scale=1 / (1 - threshold / 65536),
        )  # fmt: skip
        return parameters, inputs | options

    def forward(self, inputs: Tensors, **options) -> Tensors:
        """The outputs of RelAttentionForward by name, filled with NaN before the launch."""
        inputs = {name: t.detach() for name, t in inputs.items()}
        parameters, read = self._inputs(inputs, **options)
        out = torch.full(inputs["query"].shape, float("nan"), dtype=inputs["query"].dtype)
        B, T, H, _ = out.shape
        outputs = {"out": out, "log_sum_exp": torch.full((B, H, T), float("nan"))}
        if out.element_size() == 2:
            outputs["rounding"] = out.clone()
        workspace = self._workspace("forward_workspace", parameters)
        bindings.add_buffers(self.library, read.values(), [*outputs.values(), workspace])
        pointers = {name: tensor.data_ptr() for name, tensor in outputs.items()}
        bindings.launch(self.library, "forward", RelAttentionForward(parameters, **pointers), workspace)
        return outputs

    def backward(
        self,
        inputs: Tensors,
        grad_out: Tensor,
        outputs: Tensors,
        *,
        memory_needs_grad: bool,
        **options,
    ) -> Tensors:
        """The gradients by name, from the outputs of `forward`; they and the workspace are filled with NaN before."""
        inputs = {name: t.detach() for name, t in inputs.items()}
        parameters, read = self._inputs(inputs, **options)
        gradients = {
            name: torch.full(t.shape, float("nan"), dtype=t.dtype)
            for name, t in inputs.items()
            if memory_needs_grad or not name.startswith("memory")
        }
        read |= {"grad_out": grad_out, **outputs}
        rounding = operand(outputs["rounding"]) if "rounding" in outputs else Operand()
        backward = RelAttentionBackward(
            parameters, operand(grad_out), operand(outputs["out"]), rounding, outputs["log_sum_exp"].data_ptr(),
            memory_needs_grad, **{name: t.data_ptr() for name, t in gradients.items()},
        )  # fmt: skip
        workspace = self._workspace("backward_workspace", backward)
        bindings.add_buffers(self.library, read.values(), [*gradients.values(), workspace])
        bindings.launch(self.library, "backward", backward, workspace)
        return gradients

    def _workspace(self, size_function: str, parameters: Structure) -> Tensor:
        """Resets the emulator, and allocates what the next launch needs."""
        self.library.reset_emulator(self.schedule, self.wgmma)
        function = getattr(self.library, size_function)
        function.restype = c_int64
        return bindings.nan_workspace(function(byref(parameters)))
