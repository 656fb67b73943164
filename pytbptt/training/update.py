"""The update step: forward and backward over chunks with their memory, gradient clipping, optimizer step."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pytbptt.data import Chunk
from pytbptt.errors import OUT_OF_MEMORY, InputError, RunError
from pytbptt.nn import LossResult, padded_linear
from pytbptt.nn.adaptive import TailCapacity
from pytbptt.nn.language_model import LanguageModel
from pytbptt.runtime.cuda_graph import CUDAGraphRunner
from pytbptt.runtime.distributed import DistributedContext, compress_hook, compute_dtype, mixed_precision
from pytbptt.training.averaging import WeightAverage
from pytbptt.training.config import DataSettings, OptimizationSettings, TrainSettings
from pytbptt.training.metrics import MetricsAccumulator
from pytbptt.truncated_bptt import TruncatedBPTT

Capacity = tuple[int, ...] | None
Batch = tuple[Tensor, Tensor | None, Tensor]  # a chunk's tokens, resets and targets
Step = Callable[[list[Any], list[Batch], Capacity], tuple[list[Any], Tensor]]

COMM_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class ModelWithLoss(nn.Module):
    """A language model with the signature that TruncatedBPTT calls; the module that DistributedDataParallel wraps."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, inputs: tuple[Tensor, Tensor | None], memory: Any, targets: tuple[Tensor, Capacity] | None = None
    ) -> tuple[Tensor | LossResult, Any]:
        (tokens, reset), (target_ids, capacity) = inputs, targets or (None, None)
        return self.model(tokens, memory, reset, False, target_ids, capacity)  # type: ignore[no-any-return]


class UpdateStep:
    """One update, and the state that it changes: weights, optimizer, memory, metrics.

    On a GPU it is captured in a CUDA graph, unless `no_graph_reason` gives a reason why it cannot be.

    Args:
        model: on the device.
        settings: of the run, checked.
        distributed: rank, world size and device.

    Raises:
        InputError: --cuda-graph on, but updates cannot be captured.
    """

    def __init__(self, model: LanguageModel, settings: TrainSettings, distributed: DistributedContext) -> None:
        self.model, self.device = model, distributed.device
        data, optimization = settings.data, settings.optimization
        wrapped: nn.Module = ModelWithLoss(model)
        if distributed.uses_ddp:
            # DDP all-reduces gradients in buckets during the backward pass; a tied weight is one parameter, sent once.
            wrapped = DistributedDataParallel(wrapped, gradient_as_bucket_view=True)
            if optimization.ddp_comm_hook != "none":
                wrapped.register_comm_hook(COMM_DTYPES[optimization.ddp_comm_hook], compress_hook)
        self.optimizer = make_optimizer(model, optimization)
        self.average = WeightAverage(model, optimization.nonmono)
        self.dtype = compute_dtype(self.device, fp16=optimization.fp16, bf16=optimization.bf16)
        self.new_tokens = data.tokens_per_sample * settings.truncation.bptt_chunks
        """Tokens of every stream that an update scores."""
        self.bptt = TruncatedBPTT(
            wrapped,
            self.optimizer,
            loss=None,
            context=max(0, settings.truncation.bptt_backward - self.new_tokens),
            groups=data.update_freq,
            time_dim=1,
            clip_norm=optimization.clip_norm,
            autocast=mixed_precision(self.device, self.dtype),
            scaler=torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16),
        )
        # The same tensors for every epoch: a captured update resets memory that became infinite or NaN to them.
        self.initial_memory = [model.init_memory(data.batch_size)] * data.update_freq
        self.reset_streams()
        self.metrics = MetricsAccumulator(distributed)
        self.capacity = None if self.device.type == "cpu" else TailCapacity(model.softmax)
        self.no_graph_reason = graph_unsupported_reason(settings, distributed)
        self.compute_or_replay: Step = (
            self.compute if self.no_graph_reason else CUDAGraphRunner(self.compute, self.device)
        )

    def reset_streams(self) -> None:
        """Reset the memory: the next chunks are the first of their streams."""
        self.bptt.reset_state(self.initial_memory)

    def __call__(self, chunks: list[Chunk]) -> Tensor:
        """Forward and backward over the next chunks (of each chunk index, all groups), and one optimizer step.

        Returns:
            The norm of the gradient before clipping, (); not finite if the update was skipped.
        """
        # Counted on the host, which has the targets, so that it need not wait for the device.
        capacity = None if self.capacity is None else self.capacity.fit([chunk.targets for chunk in chunks])
        batches = [(chunk.tokens, chunk.reset, chunk.targets) for chunk in (chunk.to(self.device) for chunk in chunks)]
        self.bptt.states, norm = self.compute_or_replay(self.bptt.states, batches, capacity)
        self.average.update(norm.isfinite())
        return norm

    def compute(self, states: list[Any], chunks: list[Batch], capacity: Capacity) -> tuple[list[Any], Tensor]:
        """The part of an update that runs on the device without synchronisation: returns the next states and the norm.

        A CUDA graph can capture it: everything that changes is a tensor at a fixed address.
        """
        groups, self.bptt.states = len(states), states
        nll = torch.zeros((), dtype=torch.float64, device=self.device)
        count = torch.zeros_like(nll)
        for group in range(groups):
            pairs = [((tokens, reset), (targets, capacity)) for tokens, reset, targets in chunks[group::groups]]
            with self._maybe_no_sync(group == groups - 1), padded_linear.padded_matmuls(not self.no_graph_reason):
                forward = self.bptt.accumulate(*pairs, group=group)
            for result in forward.outputs:
                nll += result.nll
                count += result.count
        norm = self.bptt.step()
        self.metrics.add(nll, count, norm)
        return self.bptt.states, norm

    def _maybe_no_sync(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """DistributedDataParallel exchanges gradients in the last group's backward pass only."""
        if isinstance(self.bptt.model, DistributedDataParallel) and not last:
            return self.bptt.model.no_sync()
        return contextlib.nullcontext()


def make_optimizer(model: LanguageModel, settings: OptimizationSettings) -> torch.optim.Optimizer:
    """The optimizer of a model, which is already on its device."""
    parameters = list(model.parameters())
    device = parameters[0].device
    # On a GPU it is a tensor, so that a captured update reads the current value.
    lr = torch.tensor(settings.lr, device=device) if device.type == "cuda" else settings.lr
    if settings.optimizer in ("sgd", "asgd"):
        sgd = torch.optim.SGD(
            parameters, lr=lr, momentum=settings.momentum, weight_decay=settings.weight_decay, fused=True
        )
        if settings.momentum:  # the optimizer would create these in its first step, which a CUDA graph cannot repeat
            sgd.state.update({weight: {"momentum_buffer": torch.zeros_like(weight)} for weight in parameters})
        return sgd
    adam = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    return adam(
        parameters,
        lr=lr,
        betas=settings.adam_betas,
        eps=settings.adam_eps,
        weight_decay=settings.weight_decay,
        fused=True,
        capturable=device.type == "cuda",
    )


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """optimizer.load_state_dict, but `lr` and `capturable` keep the form that this device needs.

    Raises:
        ValueError: the state belongs to other parameters.
    """
    current = [
        {name: group[name] for name in ("lr", "capturable") if name in group} for group in optimizer.param_groups
    ]
    groups = [{**group, **options} for group, options in zip(saved["param_groups"], current, strict=True)]
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})


def graph_unsupported_reason(settings: TrainSettings, distributed: DistributedContext) -> str:
    """Why updates cannot be captured in a CUDA graph; empty if they can.

    Raises:
        InputError: --cuda-graph on, but they cannot.
    """
    data, truncation = settings.data, settings.truncation
    if settings.run.cuda_graph == "off":
        return "--cuda-graph off"
    reason = ""
    if distributed.device.type != "cuda":
        reason = "there is no GPU"
    elif distributed.uses_ddp:
        reason = "processes exchange gradients in the middle of an update"
    elif data.bptt_variation != "none":
        reason = f"--bptt-variation {data.bptt_variation} draws another length for every chunk"
    elif truncation.bptt_backward > data.tokens_per_sample * truncation.bptt_chunks:
        reason = "--bptt-backward reads tokens again, a different number of them in the first updates"
    if reason and settings.run.cuda_graph == "on":
        raise InputError(f"--cuda-graph: found on, but {reason}; expected auto or off")
    return reason


@contextlib.contextmanager
def explain_oom(data: DataSettings) -> Iterator[None]:
    """Turn an out-of-memory error of the block into a RunError that says which settings need less."""
    try:
        yield
    except RuntimeError as error:
        if not OUT_OF_MEMORY.search(str(error)):
            raise
        divisor = next((n for n in range(2, data.batch_size + 1) if data.batch_size % n == 0), 0)
        advice = (
            f"--batch-size {data.batch_size // divisor} --update-freq {data.update_freq * divisor} computes the same "
            f"with 1/{divisor} of the activations"
            if divisor
            else "a smaller --tokens-per-sample or model needs less"
        )
        raise RunError(
            f"out of memory: --batch-size {data.batch_size} x --tokens-per-sample {data.tokens_per_sample} did "
            f"not fit: {advice}; the last checkpoint is intact"
        ) from None
