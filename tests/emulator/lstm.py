"""Calls the emulated lstm kernels with torch's tensors, as the compiled op calls them on a GPU."""

from ctypes import POINTER, Structure, byref, c_bool, c_char_p, c_int, c_int64, c_void_p
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.emulator.build import library, load_ops
from tests.emulator.rel_attention import SCALARS

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "tf32": torch.float32}
Problem = dict[str, Tensor]


class ChunkRows(Structure):
    _fields_ = [("data", c_void_p), ("step", c_int64), ("stream", c_int64)]


class StateRows(Structure):
    _fields_ = [("data", c_void_p), ("stream", c_int64)]


class Lstm(Structure):
    """csrc/lstm/params.h, as all but the last two."""

    _fields_ = [
        *((size, c_int64) for size in "TBH"),
        ("dtype", c_int),
        ("weight_hh", c_void_p),
        ("weight_stride", c_int64),
        ("h0", StateRows),
        ("c0", StateRows),
        ("reset", c_void_p),
    ]


RESULTS = "output h_n c_n activated cells".split()
GRADIENTS = "grad_gates grad_weight grad_h0 grad_c0".split()


class Forward(Structure):
    _fields_ = [("inputs", Lstm), ("gates", ChunkRows), *((name, c_void_p) for name in RESULTS)]


class Backward(Structure):
    _fields_ = [
        ("inputs", Lstm),
        ("grad_output", ChunkRows),
        ("grad_h_n", StateRows),
        ("grad_c_n", StateRows),
        *((name, c_void_p) for name in ("output", "activated", "cells", *GRADIENTS)),
    ]


class Limits(Structure):
    """csrc/lstm/cuda/plan.h, as the one below."""

    _fields_ = [(name, c_int64) for name in ("multiprocessors", "shared_bytes", "registers")]


class Plan(Structure):
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
class Kernels:
    """The kernels of one kind of arithmetic on a GPU with few multiprocessors, under one schedule.

    Attributes:
        numbers: a key of DTYPES.
        limits: multiprocessors, bytes of shared memory of a block, and registers of a multiprocessor.
        layouts: tiles of rows and groups of streams of the forward and of the backward, instead of what the plan
            finds best.
        edit: what to replace in a file of csrc, for bugs: its name, the text found there, and the new text.
        plans: of the last forward and of the last backward.
    """

    numbers: str
    schedule: int = 0
    limits: tuple[int, int, int] = (6, 227 * 1024, 65536)
    layouts: tuple[tuple[int, int], tuple[int, int]] | None = None
    edit: tuple[str, str, str] | None = None
    plans: dict[str, Plan] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.kernels = library("lstm.cpp", f"NUMBERS={self.numbers}", edit=self.edit)

    def forward(
        self, gates: Tensor, weight_hh: Tensor, h0: Tensor, c0: Tensor, reset: Tensor | None = None, save: bool = True
    ) -> Problem:
        """What csrc/lstm/params.h calls the results of LstmForward, by name; all start as NaN."""
        T, B, H = gates.shape[0], gates.shape[1], gates.shape[2] // 4
        shapes = {"output": (T, B, H), "h_n": (B, H), "c_n": (B, H)}
        if save:
            shapes |= {"activated": (T, B, 4 * H), "cells": (T, B, H)}
        cells = ("c_n", "cells")
        results = {
            name: torch.full(shape, float("nan"), dtype=torch.float32 if name in cells else gates.dtype)
            for name, shape in shapes.items()
        }
        inputs = {"gates": gates, "weight_hh": weight_hh, "h0": h0, "c0": c0}
        inputs = {name: t.detach() for name, t in inputs.items()} | ({} if reset is None else {"reset": reset})
        launch = Forward(self._inputs(T, inputs), chunk_rows(gates), **{n: t.data_ptr() for n, t in results.items()})
        self._run("forward", launch, inputs, results)
        return results

    def backward(
        self,
        grads: tuple[Tensor | None, Tensor | None, Tensor | None],
        weight_hh: Tensor,
        h0: Tensor,
        c0: Tensor,
        reset: Tensor | None,
        saved: Problem,
    ) -> Problem:
        """The gradients of gates, weight_hh, h0 and c0, by these names."""
        output, activated, cells = (saved[name] for name in ("output", "activated", "cells"))
        T, B, H = output.shape
        shapes = {"grad_gates": (T, B, 4 * H), "grad_h0": (B, H), "grad_c0": (B, H)}
        results = {
            name: torch.full(shape, float("nan"), dtype=torch.float32 if name == "grad_c0" else output.dtype)
            for name, shape in shapes.items()
        }
        names = ("grad_output", "grad_h_n", "grad_c_n")
        inputs = {"weight_hh": weight_hh, "h0": h0, "c0": c0, "output": output, "activated": activated, "cells": cells}
        inputs = {name: t.detach() for name, t in inputs.items()} | ({} if reset is None else {"reset": reset})
        inputs |= {name: t for name, t in zip(names, grads, strict=True) if t is not None}
        launch = Backward(
            self._inputs(T, inputs), chunk_rows(grads[0]), state_rows(grads[1]), state_rows(grads[2]),
            output.data_ptr(), activated.data_ptr(), cells.data_ptr(),
            **{name: t.data_ptr() for name, t in results.items()},
        )  # fmt: skip
        self._run("backward", launch, inputs, results)
        load_ops("lstm_grad_weight.cpp")
        grad_weight = torch.ops.pytbptt_emulator.lstm_grad_weight(results["grad_gates"], h0.detach(), output, reset)
        return {
            "gates": results["grad_gates"],
            "weight_hh": grad_weight,
            "h0": results["grad_h0"],
            "c0": results["grad_c0"],
        }

    def plan(self, name: str, inputs: Lstm) -> Plan:
        """How the forward or the backward is laid out."""
        plan, backward = Plan(), name == "backward"
        given = (c_bool(backward), byref(inputs), byref(Limits(*self.limits)))
        if self.layouts is None:
            self.kernels.make_plan(*given, byref(plan))
        else:
            row_tiles, groups = self.layouts[backward]
            self.kernels.make_given_plan(*given, c_int(row_tiles), c_int64(groups), byref(plan))
        self.plans[name] = plan
        return plan

    def _inputs(self, T: int, inputs: Problem) -> Lstm:
        weight_hh, h0, c0 = inputs["weight_hh"], inputs["h0"], inputs["c0"]
        return Lstm(
            T, *h0.shape, SCALARS[weight_hh.dtype], weight_hh.data_ptr(), weight_hh.stride(0), state_rows(h0),
            state_rows(c0), inputs["reset"].data_ptr() if "reset" in inputs else None,
        )  # fmt: skip

    def _run(self, name: str, launch: Structure, inputs: Problem, results: Problem) -> None:
        plan = self.plan(name, launch.inputs)
        workspace = torch.full((plan.workspace_bytes // 4,), float("nan"))
        self.kernels.begin(self.schedule)
        every = [*((t, False) for t in inputs.values()), *((t, True) for t in (*results.values(), workspace))]
        for tensor, writable in every:
            storage = tensor.untyped_storage()
            self.kernels.add_buffer(c_void_p(storage.data_ptr()), c_int64(storage.nbytes()), writable)
        function = getattr(self.kernels, name)
        function.restype = c_char_p
        function.argtypes = [POINTER(type(launch)), POINTER(Plan), c_void_p]
        error = function(byref(launch), byref(plan), workspace.data_ptr())
        assert error is None, error.decode()
