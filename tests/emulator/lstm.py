"""Calls the lstm kernels on the emulator with CPU tensors, as the compiled op calls them on a GPU.

The structures mirror those of csrc/lstm/params.h; GpuLimits and LstmPlan those of csrc/lstm/cuda/plan.h.
"""

from ctypes import Structure, byref, c_bool, c_int, c_int64, c_void_p
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.emulator import bindings
from tests.emulator.bindings import SCALARS, Tensors
from tests.emulator.build import SourcePatch, build_library, load_ops

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "tf32": torch.float32}


class ChunkRows(Structure):
    _fields_ = [("data", c_void_p), ("step", c_int64), ("stream", c_int64)]


class StateRows(Structure):
    _fields_ = [("data", c_void_p), ("stream", c_int64)]


class Lstm(Structure):
    _fields_ = [
        *((size, c_int64) for size in "TBH"),
        ("dtype", c_int),
        ("weight_hh", c_void_p),
        ("weight_stride", c_int64),
        ("h0", StateRows),
        ("c0", StateRows),
        ("reset", c_void_p),
    ]


OUTPUTS = "output h_n c_n activated cells".split()
GRADIENTS = "grad_gates grad_weight grad_h0 grad_c0".split()


class LstmForward(Structure):
    _fields_ = [("inputs", Lstm), ("gates", ChunkRows), *((name, c_void_p) for name in OUTPUTS)]


class LstmBackward(Structure):
    _fields_ = [
        ("inputs", Lstm),
        ("grad_output", ChunkRows),
        ("grad_h_n", StateRows),
        ("grad_c_n", StateRows),
        *((name, c_void_p) for name in ("output", "activated", "cells", *GRADIENTS)),
    ]


class GpuLimits(Structure):
    _fields_ = [(name, c_int64) for name in ("multiprocessors", "shared_bytes", "registers")]


class LstmPlan(Structure):
    _fields_ = [
        ("persistent", c_bool),
        ("cells_in_registers", c_bool),
        *(
            (name, c_int64)
            for name in (
                "row_tiles units groups blocks_per_group depth_tiles tiles_per_warp held resident stream_tiles "
                "pass_tiles shared_bytes held_bytes resident_bytes streamed_bytes exchange_bytes workspace_bytes"
            ).split()
        ),
    ]


def chunk_rows(tensor: Tensor | None) -> ChunkRows:
    return ChunkRows() if tensor is None else ChunkRows(tensor.data_ptr(), *tensor.stride()[:2])


def state_rows(tensor: Tensor | None) -> StateRows:
    return StateRows() if tensor is None else StateRows(tensor.data_ptr(), tensor.stride(0))


@dataclass
class EmulatedLstm:
    """The kernels of one compute type on a GPU with few multiprocessors, under one schedule.

    Attributes:
        compute_type: a key of DTYPES.
        limits: multiprocessors, bytes of shared memory per block, and registers per multiprocessor.
        layouts: (row tiles, groups of streams) of the forward and of the backward, instead of the planner's choice.
        source_patch: a change of csrc, to inject a fault.
        plans: those of the last forward and the last backward.
    """

    compute_type: str
    schedule: int = 0
    limits: tuple[int, int, int] = (6, 227 * 1024, 65536)
    layouts: tuple[tuple[int, int], tuple[int, int]] | None = None
    source_patch: SourcePatch | None = None
    plans: dict[str, LstmPlan] = field(default_factory=dict)

    def __post_init__(self) -> None:
        definition = f"LSTM_COMPUTE_TYPE={self.compute_type}"
        self.library = build_library("lstm.cpp", definition, source_patch=self.source_patch)

    def forward(
        self, gates: Tensor, weight_hh: Tensor, h0: Tensor, c0: Tensor, reset: Tensor | None = None, save: bool = True
    ) -> Tensors:
        """The outputs of LstmForward by name, filled with NaN before the launch."""
        T, B, H = gates.shape[0], gates.shape[1], gates.shape[2] // 4
        shapes = {"output": (T, B, H), "h_n": (B, H), "c_n": (B, H)}
        if save:
            shapes |= {"activated": (T, B, 4 * H), "cells": (T, B, H)}
        cells = ("c_n", "cells")
        outputs = {
            name: torch.full(shape, float("nan"), dtype=torch.float32 if name in cells else gates.dtype)
            for name, shape in shapes.items()
        }
        inputs = {"gates": gates, "weight_hh": weight_hh, "h0": h0, "c0": c0}
        inputs = {name: t.detach() for name, t in inputs.items()} | ({} if reset is None else {"reset": reset})
        pointers = {name: t.data_ptr() for name, t in outputs.items()}
        self._launch("forward", LstmForward(self._inputs(T, inputs), chunk_rows(gates), **pointers), inputs, outputs)
        return outputs

    def backward(
        self,
        grads: tuple[Tensor | None, Tensor | None, Tensor | None],
        weight_hh: Tensor,
        h0: Tensor,
        c0: Tensor,
        reset: Tensor | None,
        saved: Tensors,
    ) -> Tensors:
        """The gradients of gates, weight_hh, h0 and c0 by name, for gradients of output, h_n and c_n."""
        output, activated, cells = (saved[name] for name in ("output", "activated", "cells"))
        T, B, H = output.shape
        shapes = {"grad_gates": (T, B, 4 * H), "grad_h0": (B, H), "grad_c0": (B, H)}
        gradients = {
            name: torch.full(shape, float("nan"), dtype=torch.float32 if name == "grad_c0" else output.dtype)
            for name, shape in shapes.items()
        }
        names = ("grad_output", "grad_h_n", "grad_c_n")
        inputs = {"weight_hh": weight_hh, "h0": h0, "c0": c0, "output": output, "activated": activated, "cells": cells}
        inputs = {name: t.detach() for name, t in inputs.items()} | ({} if reset is None else {"reset": reset})
        inputs |= {name: t for name, t in zip(names, grads, strict=True) if t is not None}
        parameters = LstmBackward(
            self._inputs(T, inputs), chunk_rows(grads[0]), state_rows(grads[1]), state_rows(grads[2]),
            output.data_ptr(), activated.data_ptr(), cells.data_ptr(),
            **{name: t.data_ptr() for name, t in gradients.items()},
        )  # fmt: skip
        self._launch("backward", parameters, inputs, gradients)
        load_ops("lstm_grad_weight.cpp")
        grad_weight = torch.ops.pytbptt_emulator.lstm_grad_weight(gradients["grad_gates"], h0.detach(), output, reset)
        return {
            "gates": gradients["grad_gates"],
            "weight_hh": grad_weight,
            "h0": gradients["grad_h0"],
            "c0": gradients["grad_c0"],
        }

    def plan(self, name: str, inputs: Lstm) -> LstmPlan:
        """The layout of the forward or of the backward."""
        plan, backward = LstmPlan(), name == "backward"
        arguments = (c_bool(backward), byref(inputs), byref(GpuLimits(*self.limits)))
        if self.layouts is None:
            self.library.make_plan(*arguments, byref(plan))
        else:
            row_tiles, groups = self.layouts[backward]
            self.library.make_plan_with_layout(*arguments, c_int(row_tiles), c_int64(groups), byref(plan))
        self.plans[name] = plan
        return plan

    def _inputs(self, T: int, inputs: Tensors) -> Lstm:
        weight_hh, h0, c0 = inputs["weight_hh"], inputs["h0"], inputs["c0"]
        return Lstm(
            T, *h0.shape, SCALARS[weight_hh.dtype], weight_hh.data_ptr(), weight_hh.stride(0), state_rows(h0),
            state_rows(c0), inputs["reset"].data_ptr() if "reset" in inputs else None,
        )  # fmt: skip

    def _launch(self, name: str, parameters: LstmForward | LstmBackward, inputs: Tensors, outputs: Tensors) -> None:
        plan = self.plan(name, parameters.inputs)
        workspace = bindings.nan_workspace(plan.workspace_bytes)
        self.library.reset_emulator(self.schedule)
        bindings.add_buffers(self.library, inputs.values(), [*outputs.values(), workspace])
        bindings.launch(self.library, name, parameters, plan, workspace)
