"""Work on a GPU that is launched at once, instead of kernel by kernel."""

from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pytbptt.errors import OUT_OF_MEMORY, RunError

Arguments = ParamSpec("Arguments")
Results = TypeVar("Results")


class Graphed(Generic[Arguments, Results]):
    """A function of pytrees, captured in a CUDA graph where arguments of the same shapes come twice in a row.

    From then on such arguments are copied to where the capture found them, and the graph is replayed; others go
    through the function itself. One graph is kept, the latest. What the function returns is good until the next call.

    The function may only do what a replay repeats: it reads nothing from the GPU, changes other tensors in place, and
    what it does in Python alone does not matter the second time. The tensors that it finds elsewhere, such as weights,
    stay where they are for as long as the graph is replayed.

    Args:
        function: takes and gives pytrees of tensors; other leaves, such as numbers, count as part of the shape.
        device: the GPU.
    """

    def __init__(self, function: Callable[Arguments, Results], device: torch.device) -> None:
        self._function = function
        # A capture cannot happen on the default stream, and what it captures should have run where it is captured.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._captured: _Captured | None = None
        self._captured_shapes: Any = None
        self._latest_shapes: Any = None

    def __call__(self, *arguments: Arguments.args, **keywords: Arguments.kwargs) -> Results:
        """The function's results, on the current stream."""
        outside = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(outside)
        with torch.cuda.stream(self._stream):
            results = self._call((arguments, keywords))
        outside.wait_stream(self._stream)
        return results

    def _call(self, arguments: Any) -> Results:
        leaves, structure = pytree.tree_flatten(arguments)
        shapes = structure, [(leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        again, self._latest_shapes = shapes == self._latest_shapes, shapes
        if again and shapes != self._captured_shapes:
            self._captured = self._captured_shapes = None  # what it held is free before the next one takes as much
            self._captured = _Captured(self._function, leaves, structure, self._stream)
            self._captured_shapes = shapes
        if self._captured is not None and shapes == self._captured_shapes:
            return cast(Results, self._captured(leaves))
        positional, keywords = arguments
        return self._function(*positional, **keywords)


class _Captured:
    """One capture, and the tensors that it reads and writes."""

    def __init__(
        self, function: Callable[..., Any], leaves: list[Any], structure: pytree.TreeSpec, stream: torch.cuda.Stream
    ) -> None:
        self._leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._graph = torch.cuda.CUDAGraph()
        positional, keywords = pytree.tree_unflatten(self._leaves, structure)
        torch.clear_autocast_cache()  # a caller's copies of weights are gone sooner than the graph
        try:
            # Other threads, which copy the next chunks to the GPU, are none of the capture's business.
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                self._results = pytree.tree_flatten(function(*positional, **keywords))
        except RuntimeError as error:
            cause: BaseException = error
            while isinstance(cause.__context__, RuntimeError):  # a capture that failed cannot be ended either
                cause = cause.__context__
            if OUT_OF_MEMORY.search(str(cause)):
                raise cause from None
            why = str(cause).partition("\n")[0]
            raise RunError(f"no CUDA graph could be captured: {why}; --cuda-graph off does without") from error

    def __call__(self, leaves: list[Any]) -> Any:
        for own, given in zip(self._leaves, leaves, strict=True):
            if isinstance(own, Tensor):
                own.copy_(given)
        self._graph.replay()
        return pytree.tree_unflatten(*self._results)  # lists of the caller's own, who may change them
