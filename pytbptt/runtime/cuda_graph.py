"""CUDA graphs: a function's kernels captured once, then launched together instead of one by one."""

from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pytbptt.errors import OUT_OF_MEMORY, RunError

Arguments = ParamSpec("Arguments")
Results = TypeVar("Results")


class CUDAGraphRunner(Generic[Arguments, Results]):
    """A function of pytrees, captured in a CUDA graph once it is called twice in a row with the same shapes.

    Later calls with those shapes copy their arguments into the captured tensors and replay the graph; calls with other
    shapes run the function. Only the latest graph is kept. The results are valid until the next call.

    The function must do only what a replay repeats: it reads nothing from the GPU, changes other tensors in place, and
    needs nothing of its Python code the second time. Tensors that it uses besides its arguments, such as weights, must
    stay at their addresses for as long as the graph is replayed.

    Args:
        function: takes and returns pytrees of tensors; non-tensor leaves are compared by value, like shapes.
        device: the GPU.
    """

    def __init__(self, function: Callable[Arguments, Results], device: torch.device) -> None:
        self._function = function
        # The default stream cannot be captured; uncaptured calls use this stream too, so that the warm-up run that a
        # capture needs has happened on it.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._captured: _Capture | None = None
        self._captured_shapes: Any = None
        self._latest_shapes: Any = None

    def __call__(self, *arguments: Arguments.args, **keywords: Arguments.kwargs) -> Results:
        """The function's results, on the current stream."""
        caller_stream = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(caller_stream)
        with torch.cuda.stream(self._stream):
            results = self._call((arguments, keywords))
        caller_stream.wait_stream(self._stream)
        return results

    def _call(self, arguments: Any) -> Results:
        leaves, structure = pytree.tree_flatten(arguments)
        shapes = structure, [(leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        same_shapes, self._latest_shapes = shapes == self._latest_shapes, shapes
        if same_shapes and shapes != self._captured_shapes:
            self._captured = self._captured_shapes = None  # free its memory before the next capture allocates
            self._captured = _Capture(self._function, leaves, structure, self._stream)
            self._captured_shapes = shapes
        if self._captured is not None and shapes == self._captured_shapes:
            return cast(Results, self._captured(leaves))
        positional, keywords = arguments
        return self._function(*positional, **keywords)


class _Capture:
    """One capture, and the tensors that it reads and writes."""

    def __init__(
        self, function: Callable[..., Any], leaves: list[Any], structure: pytree.TreeSpec, stream: torch.cuda.Stream
    ) -> None:
        self._leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._graph = torch.cuda.CUDAGraph()
        positional, keywords = pytree.tree_unflatten(self._leaves, structure)
        torch.clear_autocast_cache()  # a caller's cached 16-bit weights do not live as long as the graph
        try:
            # Other threads copy the next chunks to the GPU meanwhile: their calls must not fail the capture.
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                self._results = pytree.tree_flatten(function(*positional, **keywords))
        except RuntimeError as error:
            cause: BaseException = error
            while isinstance(cause.__context__, RuntimeError):  # ending a failed capture raises once more
                cause = cause.__context__
            if OUT_OF_MEMORY.search(str(cause)):
                raise cause from None
            reason = str(cause).partition("\n")[0]
            raise RunError(f"CUDA graph capture failed: {reason}; --cuda-graph off avoids it") from error

    def __call__(self, leaves: list[Any]) -> Any:
        for captured, new in zip(self._leaves, leaves, strict=True):
            if isinstance(captured, Tensor):
                captured.copy_(new)
        self._graph.replay()
        return pytree.tree_unflatten(*self._results)  # new containers each time: the caller may change them
