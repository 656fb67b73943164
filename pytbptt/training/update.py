"""The update step: forward and backward over chunks with their memory, clip, step."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pytbptt.data import Chunk
from pytbptt.errors import OUT_OF_MEMORY, InputError, RunError
from pytbptt.nn import LossResult, aligned
from pytbptt.nn.adaptive import TailCapacity
from pytbptt.nn.language_model import LanguageModel
from pytbptt.runtime.cuda_graph import Graphed
from pytbptt.runtime.distributed import Processes, mean_rounded_to, mixed_precision, products_dtype
from pytbptt.training.averaging import WeightAverage
from pytbptt.training.config import DataSettings, OptimizationSettings, TrainSettings
from pytbptt.training.metrics import Tally
from pytbptt.truncated_bptt import TruncatedBPTT

Capacity = tuple[int, ...] | None
Text = tuple[Tensor, Tensor | None, Tensor]  # tokens, resets and targets of a chunk
Step = Callable[[list[Any], list[Text], Capacity], tuple[list[Any], Tensor]]

SENT_AS = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Objective(nn.Module):
    """A language model as TruncatedBPTT calls it, which is what DistributedDataParallel wraps."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, text: tuple[Tensor, Tensor | None], memory: Any, wanted: tuple[Tensor, Capacity] | None = None
    ) -> tuple[Tensor | LossResult, Any]:
        targets, capacity = wanted or (None, None)
        return self.model(text[0], memory, text[1], False, targets, capacity)  # type: ignore[no-any-return]


class UpdateStep:
    """What an update does, and what it changes: weights, optimizer, memory, sums.

    On a GPU, and where nothing speaks against it (`no_graph` says what), a CUDA graph repeats it without Python.

    Args:
        model: on the device.
        settings: of the run, checked.
        processes: this process among those that share the work.

    Raises:
        InputError: --cuda-graph on where updates cannot be captured.
    """

    def __init__(self, model: LanguageModel, settings: TrainSettings, processes: Processes) -> None:
        self.model, self.device = model, processes.device
        data, optimization = settings.data, settings.optimization
        objective: nn.Module = Objective(model)
        if processes.exchanges_gradients:
            # Gradients travel in buckets while the backward pass goes on; a tied weight is one parameter, sent once.
            objective = DistributedDataParallel(objective, gradient_as_bucket_view=True)
            if optimization.ddp_comm_hook != "none":
                objective.register_comm_hook(SENT_AS[optimization.ddp_comm_hook], mean_rounded_to)
        self.optimizer = make_optimizer(model, optimization)
        self.average = WeightAverage(model, optimization.nonmono)
        self.dtype = products_dtype(self.device, fp16=optimization.fp16, bf16=optimization.bf16)
        self.new_tokens = data.tokens_per_sample * settings.truncation.bptt_chunks
        """Of every stream, that an update scores."""
        self.bptt = TruncatedBPTT(
            objective,
            self.optimizer,
            loss=None,
            context=max(0, settings.truncation.bptt_backward - self.new_tokens),
            groups=data.update_freq,
            time_dim=1,
            clip_norm=optimization.clip_norm,
            autocast=mixed_precision(self.device, self.dtype),
            scaler=torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16),
        )
        # Every epoch begins from these very tensors, as a captured update does after one that was skipped.
        self.initial_memory = [model.init_memory(data.batch_size)] * data.update_freq
        self.begin_streams()
        self.tally = Tally(processes)
        self.capacity = None if self.device.type == "cpu" else TailCapacity(model.softmax)
        self.no_graph = why_no_graph(settings, processes)
        self.on_device: Step = self.compute if self.no_graph else Graphed(self.compute, self.device)

    def begin_streams(self) -> None:
        """Forget the memory: the next chunks are the first of their streams."""
        self.bptt.begin(self.initial_memory)

    def __call__(self, chunks: list[Chunk]) -> Tensor:
        """Read the next chunks of every group, the groups of one after another, and make one step of the optimizer.

        Returns:
            The norm of the gradient before it was clipped, (); where it is not finite, no weight was changed.
        """
        # The host has the targets, and need not ask the device how many of them are rare.
        capacity = None if self.capacity is None else self.capacity.of([chunk.targets for chunk in chunks])
        read = [(chunk.tokens, chunk.reset, chunk.targets) for chunk in (chunk.to(self.device) for chunk in chunks)]
        self.bptt.states, norm = self.on_device(self.bptt.states, read, capacity)
        self.average.update(norm.isfinite())
        return norm

    def compute(self, states: list[Any], chunks: list[Text], capacity: Capacity) -> tuple[list[Any], Tensor]:
        """What an update does on the device, where nobody waits for it: the states after it, and the gradient's norm.

        A CUDA graph repeats it without Python: whatever changes is a tensor that stays where it is.
        """
        groups, self.bptt.states = len(states), states
        nll = torch.zeros((), dtype=torch.float64, device=self.device)
        count = torch.zeros_like(nll)
        for group in range(groups):
            pairs = [((tokens, reset), (targets, capacity)) for tokens, reset, targets in chunks[group::groups]]
            with self._synchronised(group == groups - 1), aligned.padded_products(not self.no_graph):
                forward = self.bptt.accumulate(*pairs, group=group)
            for result in forward.outputs:
                nll += result.nll
                count += result.count
        norm = self.bptt.step()
        self.tally.add(nll, count, norm)
        return self.bptt.states, norm

    def _synchronised(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Processes exchange gradients in the last group's backward pass alone."""
        if isinstance(self.bptt.model, DistributedDataParallel) and not last:
            return self.bptt.model.no_sync()
        return contextlib.nullcontext()


def make_optimizer(model: LanguageModel, settings: OptimizationSettings) -> torch.optim.Optimizer:
    """The optimizer of a model's weights, which are on their device."""
    parameters = list(model.parameters())
    device = parameters[0].device
    # On a GPU the rate is a tensor there, so that a captured update finds the present one.
    rate = torch.tensor(settings.lr, device=device) if device.type == "cuda" else settings.lr
    if settings.optimizer in ("sgd", "asgd"):
        sgd = torch.optim.SGD(
            parameters, lr=rate, momentum=settings.momentum, weight_decay=settings.weight_decay, fused=True
        )
        if settings.momentum:  # there from the beginning: a captured update, unlike a first step, makes no state
            sgd.state.update({weight: {"momentum_buffer": torch.zeros_like(weight)} for weight in parameters})
        return sgd
    kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    return kind(
        parameters,
        lr=rate,
        betas=settings.adam_betas,
        eps=settings.adam_eps,
        weight_decay=settings.weight_decay,
        fused=True,
        capturable=device.type == "cuda",
    )


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """As its load_state_dict, but the learning rate stays where this device needs it.

    Raises:
        ValueError: the state is of other parameters.
    """
    own = [{name: group[name] for name in ("lr", "capturable") if name in group} for group in optimizer.param_groups]
    groups = [{**group, **kept} for group, kept in zip(saved["param_groups"], own, strict=True)]
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})


def why_no_graph(settings: TrainSettings, processes: Processes) -> str:
    """Why updates are not captured in a CUDA graph, or nothing if they are.

    Raises:
        InputError: --cuda-graph on where they cannot be.
    """
    data, truncation = settings.data, settings.truncation
    if settings.run.cuda_graph == "off":
        return "--cuda-graph off"
    reason = ""
    if processes.device.type != "cuda":
        reason = "there is no GPU"
    elif processes.exchanges_gradients:
        reason = "processes exchange gradients in the middle of an update"
    elif data.bptt_variation != "none":
        reason = f"--bptt-variation {data.bptt_variation} draws another length for every chunk"
    elif truncation.bptt_backward > data.tokens_per_sample * truncation.bptt_chunks:
        reason = "--bptt-backward reads tokens again, first fewer and then more"
    if reason and settings.run.cuda_graph == "on":
        raise InputError(f"--cuda-graph: found on, but {reason}; expected auto or off")
    return reason


@contextlib.contextmanager
def out_of_memory_explained(data: DataSettings) -> Iterator[None]:
    """Where there is too little memory, a RunError that says which settings take less."""
    try:
        yield
    except RuntimeError as error:
        if not OUT_OF_MEMORY.search(str(error)):
            raise
        parts = next((n for n in range(2, data.batch_size + 1) if data.batch_size % n == 0), 0)
        advice = (
            f"--batch-size {data.batch_size // parts} --update-freq {data.update_freq * parts} computes the same "
            f"with 1/{parts} of the activations"
            if parts
            else "a smaller --tokens-per-sample or model takes less"
        )
        raise RunError(
            f"out of memory: --batch-size {data.batch_size} x --tokens-per-sample {data.tokens_per_sample} did "
            f"not fit: {advice}; the last checkpoint is intact"
        ) from None
