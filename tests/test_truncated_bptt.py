"""Every variant of truncated BPTT matches hand-derived gradients of a small RNN in float64."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import pytbptt
from pytbptt.errors import InputError

H, B, STEPS, LR = 3, 2, 12, 0.1


class SmallRNN(nn.Module):
    """s_t = tanh(W s_(t-1) + U x_t), y_t = V s_t."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))

        self.W, self.U, self.V = weight(H, H), weight(H, 2), weight(1, H)

    def forward(self, inputs: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        state = inputs.new_zeros(B, H) if state is None else state
        outputs = []
        for x in inputs:
            state = torch.tanh(state @ self.W.t() + x @ self.U.t())
            outputs.append(state @ self.V.t())
        return torch.stack(outputs), state


def make_stream() -> tuple[Tensor, Tensor]:
    """Inputs and targets."""
    generator = torch.Generator().manual_seed(1)
    inputs, targets = (torch.randn(STEPS, B, width, generator=generator, dtype=torch.float64) for width in (2, 1))
    return inputs, targets


def reference_states(model: SmallRNN, inputs: Tensor, start: Tensor) -> list[Tensor]:
    """The states before each step and after the last."""
    states = [start]
    for x in inputs:
        states.append(torch.tanh(states[-1] @ model.W.t() + x @ model.U.t()))
    return states


def reference_gradients(
    model: SmallRNN, inputs: Tensor, targets: Tensor, states: list[Tensor], scored: slice
) -> dict[str, Tensor]:
    """Gradients of the mean squared error over the scored steps, for a window that starts in states[0].

    With e_t the derivative of the error with respect to y_t, from the end of the window backwards:
    d_t = V' e_t + W' z_(t+1),  z_t = d_t (1 - s_t^2),
    dV = sum e_t s_t',  dW = sum z_t s_(t-1)',  dU = sum z_t x_t'.
    """
    gradients = {name: torch.zeros_like(weight) for name, weight in model.named_parameters()}
    count = len(range(len(inputs))[scored]) * B
    next_z = torch.zeros(B, H, dtype=torch.float64)
    for t in reversed(range(len(inputs))):
        after, before = states[t + 1], states[t]
        error = torch.zeros(B, 1, dtype=torch.float64)
        if t in range(len(inputs))[scored]:
            error = 2 * (after @ model.V.t() - targets[t]) / count
        z = (error @ model.V + next_z @ model.W) * (1 - after.square())
        gradients["V"] += error.t() @ after
        gradients["W"] += z.t() @ before
        gradients["U"] += z.t() @ inputs[t]
        next_z = z
    return gradients


@torch.no_grad()
def reference_training(k1: int, k2: int) -> list[dict[str, Tensor]]:
    """The weights after each update of gradient descent, with k1 new steps and gradients over k2 steps."""
    model, (inputs, targets) = SmallRNN(), make_stream()
    state, start, weights = torch.zeros(B, H, dtype=torch.float64), 0, []
    for end in range(k1, STEPS + 1, k1):
        states = reference_states(model, inputs[start:end], state)
        window = inputs[start:end], targets[start:end]
        gradients = reference_gradients(model, *window, states, slice(end - k1 - start, None))
        next_start = max(0, end - (k2 - k1))
        state, start = states[next_start - start], next_start
        for name, weight in model.named_parameters():
            weight -= LR * gradients[name]
        weights.append({name: weight.clone() for name, weight in model.named_parameters()})
    return weights


def make_bptt(lr: float = LR, **options: Any) -> tuple[SmallRNN, pytbptt.TruncatedBPTT]:
    model = SmallRNN()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return model, pytbptt.TruncatedBPTT(model, optimizer, nn.functional.mse_loss, **options)


def split_chunks(length: int) -> list[tuple[Tensor, Tensor]]:
    inputs, targets = make_stream()
    return list(zip(inputs.split(length), targets.split(length), strict=True))


def assert_weights(model: SmallRNN, expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(dict(model.named_parameters()), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("k1", "k2"), [(3, 3), (1, 1), (12, 12), (2, 6), (3, 5), (4, 6), (1, 4), (2, 3), (4, 12), (3, 100)]
)
def test_weights_match_hand_derived_bptt_k1_k2(k1: int, k2: int) -> None:
    model, bptt = make_bptt(context=k2 - k1)
    for chunk, expected in zip(split_chunks(k1), reference_training(k1, k2), strict=True):
        bptt.update(chunk)
        assert_weights(model, expected)


class OpCounter(TorchDispatchMode):
    """Counts the dispatched ops that return tensors of more than one element."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) and leaf.numel() > 1 for leaf in pytree.tree_leaves(result)):
            self.counts[str(operator)] += 1
        return result


def test_default_has_same_op_counts_as_plain_loop() -> None:
    """With k2 = k1, apart from ops on scalars."""
    inputs, targets = make_stream()
    chunks = list(zip(inputs.split(4), targets.split(4), strict=True))
    model = SmallRNN()
    optimizer = torch.optim.SGD(model.parameters(), LR)
    with OpCounter() as plain_loop:
        state = None
        for x, y in chunks:
            output, state = model(x, state)
            nn.functional.mse_loss(output, y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            state = state.detach()
    bptt = pytbptt.TruncatedBPTT(model, optimizer, nn.functional.mse_loss, clip_norm=1.0)
    with OpCounter() as ours:
        for chunk in chunks:
            bptt.update(chunk)
    assert plain_loop.counts["aten.tanh.default"] == STEPS
    assert ours.counts == plain_loop.counts


@pytest.mark.parametrize(("length", "n"), [(2, 2), (2, 3), (1, 4), (3, 4)])
def test_update_of_n_chunks_equals_update_of_one_long_chunk(length: int, n: int) -> None:
    model, bptt = make_bptt()
    chunks = split_chunks(length)
    for end, expected in zip(range(n, len(chunks) + 1, n), reference_training(n * length, n * length), strict=True):
        bptt.update(*chunks[end - n : end])
        assert_weights(model, expected)


def test_multi_chunk_update_with_context_matches_reference() -> None:
    model, bptt = make_bptt(context=5)
    chunks = split_chunks(2)
    for end, expected in zip(range(2, len(chunks) + 1, 2), reference_training(4, 9), strict=True):
        bptt.update(*chunks[end - 2 : end])
        assert_weights(model, expected)


@pytest.mark.parametrize("k1", [1, 2, 3, 6])
def test_unlimited_context_equals_full_bptt(k1: int) -> None:
    """With constant weights, the accumulated gradients are those through the whole stream."""
    model, bptt = make_bptt(context=STEPS)
    for chunk in split_chunks(k1):
        bptt.accumulate(chunk)
    inputs, targets = make_stream()
    with torch.no_grad():
        states = reference_states(model, inputs, torch.zeros(B, H, dtype=torch.float64))
        full = reference_gradients(model, inputs, targets, states, slice(None))
    for name, weight in model.named_parameters():
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad * k1 / STEPS, full[name], rtol=0, atol=1e-12)


def test_hand_derived_gradients_match_autograd() -> None:
    model, (inputs, targets) = SmallRNN(), make_stream()
    nn.functional.mse_loss(model(inputs, None)[0][4:], targets[4:]).backward()
    with torch.no_grad():
        states = reference_states(model, inputs, torch.zeros(B, H, dtype=torch.float64))
        expected = reference_gradients(model, inputs, targets, states, slice(4, None))
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, expected[name], rtol=0, atol=1e-13)


def test_kept_steps_track_context_changes() -> None:
    _, bptt = make_bptt(context=1)
    chunks, kept = split_chunks(2), []
    for context, chunk in zip((1, 4, 4, 4, 3, 0), chunks, strict=True):
        bptt.context = context
        bptt.update(chunk)
        kept.append(0 if bptt.context_inputs[0] is None else len(bptt.context_inputs[0]))
    assert kept == [1, 3, 4, 4, 3, 0]


def test_groups_average_gradients_and_keep_separate_states() -> None:
    model, bptt = make_bptt(groups=2, context=2)
    model_0, bptt_0 = make_bptt(context=2)
    model_1, bptt_1 = make_bptt(context=2)
    chunks = split_chunks(3)
    for chunk_0, chunk_1 in zip(chunks[:2], chunks[2:], strict=True):
        bptt.accumulate(chunk_0, group=0)
        bptt.accumulate(chunk_1, group=1)
        bptt_0.accumulate(chunk_0)
        bptt_1.accumulate(chunk_1)
        for weight, weight_0, weight_1 in zip(
            model.parameters(), model_0.parameters(), model_1.parameters(), strict=True
        ):
            assert weight_0.grad is not None
            assert weight_1.grad is not None
            torch.testing.assert_close(weight.grad, (weight_0.grad + weight_1.grad) / 2, rtol=0, atol=1e-12)
        bptt.step()
        for single_group_model in (model_0, model_1):
            single_group_model.zero_grad()
            single_group_model.load_state_dict(model.state_dict())
    assert torch.equal(bptt.states[0], bptt_0.states[0])
    assert torch.equal(bptt.states[1], bptt_1.states[0])


def test_non_finite_update_is_skipped_and_state_reset() -> None:
    model, bptt = make_bptt(context=1)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    (inputs, targets), second, *_ = split_chunks(3)
    bptt.update((torch.full_like(inputs, float("nan")), targets))
    assert_weights(model, before)
    assert bptt.states == [None]
    bptt.reset_state()
    bptt.update(second)
    assert not torch.equal(model.W, before["W"])
    assert bptt.states[0].isfinite().all()
    norm = make_bptt()[1].step()
    assert norm == 0.0


@pytest.mark.parametrize("kind", ["sgd", "momentum", "dampened", "adam", "amsgrad", "adamw", "adagrad"])
@pytest.mark.parametrize("fused", [False, True])
def test_skipped_update_leaves_optimizer_state_unchanged(kind: str, fused: bool) -> None:
    """Also if the first update is skipped."""

    def optimizer(model: SmallRNN) -> torch.optim.Optimizer:
        parameters = list(model.parameters())
        if kind in ("adam", "amsgrad"):
            return torch.optim.Adam(parameters, lr=LR, amsgrad=kind == "amsgrad", fused=fused)
        if kind == "adamw":
            return torch.optim.AdamW(parameters, lr=LR, fused=fused)
        if kind == "adagrad":
            return torch.optim.Adagrad(parameters, lr=LR, fused=fused)
        momentum, dampening = {"sgd": (0, 0), "momentum": (0.9, 0), "dampened": (0.9, 0.5)}[kind]
        return torch.optim.SGD(parameters, lr=LR, momentum=momentum, dampening=dampening, fused=fused)

    final_weights = []
    for skipped in ((), (0, 2)):
        model = SmallRNN()
        bptt = pytbptt.TruncatedBPTT(model, optimizer(model), nn.functional.mse_loss)
        for n, (inputs, targets) in enumerate(split_chunks(3)):
            if n in skipped:
                bptt.update((inputs, torch.full_like(targets, float("nan"))))
                bptt.reset_state()
            bptt.update((inputs, targets))
            bptt.reset_state()
        final_weights.append(model.state_dict())
    for name, weight in final_weights[0].items():
        assert torch.equal(weight, final_weights[1][name])


def test_fused_flag_is_reread_after_load_state_dict() -> None:
    """load_state_dict overwrites the groups' "fused", but the optimizer's _step_supports_amp_scaling stays set."""
    model, other = SmallRNN(), SmallRNN()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    optimizer.load_state_dict(torch.optim.Adam(other.parameters()).state_dict())
    bptt = pytbptt.TruncatedBPTT(model, optimizer, nn.functional.mse_loss)
    bptt.update(split_chunks(3)[0])
    assert not torch.equal(model.W, other.W)


@pytest.mark.parametrize("on_device", [False, True])
def test_non_finite_state_resets_to_initial_state(on_device: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever differs between the two. With on_device, the state is chosen without reading it on the host."""
    if on_device:
        monkeypatch.setattr("pytbptt.truncated_bptt.can_read_on_host", lambda tensor: False)
    start, nan = torch.full((B, H), 0.5, dtype=torch.float64, requires_grad=True), float("nan")
    cases = [
        ((start,), (torch.full((B, H), nan),)),  # values and dtype
        (start, (torch.full((B, H), nan), torch.zeros(1))),  # structure
        ([start[:1]], [torch.full((B, H), nan)]),  # shape
        ([start, 0], [torch.full((B, H), nan), 3]),  # leaves that are no tensors
        (None, [torch.full((B, H), nan)]),
        ((), ()),
    ]
    for initial, non_finite in cases:
        model, bptt = make_bptt()
        bptt.reset_state([initial])
        bptt.states = [non_finite]
        model.W.grad = torch.full_like(model.W, nan)
        bptt.step()
        actual, expected = pytree.tree_leaves(bptt.states[0]), pytree.tree_leaves(initial)
        assert pytree.tree_structure(bptt.states[0]) == pytree.tree_structure(initial)
        for leaf, other in zip(actual, expected, strict=True):
            assert torch.equal(leaf.double(), other) if isinstance(other, Tensor) else leaf == other


def test_step_clips_and_returns_gradient_norm() -> None:
    gradients = {}
    for clip_norm in (0.0, 0.01):
        model, bptt = make_bptt(lr=1.0, clip_norm=clip_norm)
        before = torch.cat([weight.detach().flatten().clone() for weight in model.parameters()])
        bptt.accumulate(split_chunks(4)[0])
        norm = bptt.step()
        gradients[clip_norm] = before - torch.cat([weight.detach().flatten() for weight in model.parameters()])
        assert norm == pytest.approx(float(gradients[0.0].norm()))
    assert float(gradients[0.01].norm()) == pytest.approx(0.01, rel=1e-3)


def test_forward_without_optimizer_supports_external_steps() -> None:
    model = SmallRNN()
    bptt = pytbptt.TruncatedBPTT(model, None, nn.functional.mse_loss)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for chunk, expected in zip(split_chunks(3), reference_training(3, 3), strict=True):
        optimizer.zero_grad()
        bptt.forward(chunk).loss.backward()
        optimizer.step()
        assert_weights(model, expected)
    with pytest.raises(InputError, match="step: found no optimizer"):
        bptt.step()


def test_model_that_computes_its_own_loss() -> None:
    @dataclasses.dataclass
    class Scored:
        objective: Tensor

    class Scoring(SmallRNN):
        def forward(self, inputs: Tensor, state: Any, targets: Tensor | None = None) -> tuple[Any, Tensor]:
            output, state = super().forward(inputs, state)
            return output if targets is None else Scored(nn.functional.mse_loss(output, targets)), state

    model = Scoring()
    bptt = pytbptt.TruncatedBPTT(model, torch.optim.SGD(model.parameters(), lr=LR), None, context=3)
    for chunk, expected in zip(split_chunks(2), reference_training(2, 5), strict=True):
        bptt.update(chunk)
        assert_weights(model, expected)


def test_inputs_and_states_are_any_pytree() -> None:
    class Nested(SmallRNN):
        def forward(self, inputs: dict[str, Any], state: Any) -> tuple[Any, Any]:  # type: ignore[override]
            state = {"of": [None]} if state is None else state
            output, inner = super().forward(torch.cat([inputs["left"], *inputs["right"]], dim=-1), state["of"][0])
            return {"y": output}, {"of": [inner]}

    model = Nested()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    bptt = pytbptt.TruncatedBPTT(model, optimizer, lambda output, y: nn.functional.mse_loss(output["y"], y), context=3)
    for (x, y), expected in zip(split_chunks(2), reference_training(2, 5), strict=True):
        bptt.update(({"left": x[..., :1], "right": (x[..., 1:],), "none": None}, y))
        assert_weights(model, expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_bptt(context=-1), "context: found -1, expected at least 0"),
        (lambda: make_bptt(groups=0), "groups: found 0, expected at least 1"),
        (lambda: make_bptt(time_dim=-1), "time_dim: found -1, expected at least 0"),
        (
            lambda: make_bptt()[1].reset_state(torch.zeros(1, B, H)),
            "states: found a tensor, expected a list of 1, one for each",
        ),
        (
            lambda: make_bptt()[1].reset_state((torch.zeros(B, H), torch.zeros(B, H))),
            "states: found 2, expected a list of 1",
        ),
        (lambda: make_bptt(groups=2)[1].update(make_stream()), "update: found 2 groups, expected accumulate and step"),
        (lambda: make_bptt()[1].update(([1.0, 2.0], torch.ones(2))), "inputs: found no tensor in a list"),
        (lambda: make_bptt()[1].update((torch.ones(0, B, 2), torch.ones(0, B, 1))), r"inputs: found shape \(0, 2, 2\)"),
        (lambda: make_bptt()[1].update(), r"found nothing, expected pairs \(inputs, targets\)"),
        (lambda: make_bptt()[1].update(*make_stream()), r"found Tensor, Tensor, expected pairs \(inputs, targets\)"),
    ],
)
def test_invalid_arguments_raise(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize(("context", "groups", "scaled"), [(0, 1, False), (3, 1, True), (3, 2, True), (7, 3, False)])
def test_state_dict_resume_is_bitwise_equal(tmp_path: Path, context: int, groups: int, scaled: bool) -> None:
    """States, kept steps, initial states and the scaler, compared with an uninterrupted run."""
    chunks = [(inputs * (n + 1), targets) for n, (inputs, targets) in enumerate([make_stream()] * 6)]

    def make_parts() -> tuple[SmallRNN, torch.optim.Optimizer, pytbptt.TruncatedBPTT]:
        model = SmallRNN()
        optimizer = torch.optim.Adam(model.parameters(), LR)
        scaler = torch.amp.GradScaler("cpu", growth_interval=2) if scaled else None
        options = {"context": context, "groups": groups, "scaler": scaler}
        return model, optimizer, pytbptt.TruncatedBPTT(model, optimizer, nn.functional.mse_loss, **options)

    def train(bptt: pytbptt.TruncatedBPTT, chunks: list[tuple[Tensor, Tensor]]) -> None:
        for inputs, targets in chunks:
            for group in range(groups):
                bptt.accumulate((inputs + group, targets), group=group)
            bptt.step()

    model, _, bptt = make_parts()
    bptt.reset_state([torch.full((B, H), 0.1 * n, dtype=torch.float64) for n in range(groups)])
    train(bptt, chunks)

    first, optimizer, before_saving = make_parts()
    before_saving.reset_state([torch.full((B, H), 0.1 * n, dtype=torch.float64) for n in range(groups)])
    train(before_saving, chunks[:3])
    torch.save([first.state_dict(), optimizer.state_dict(), before_saving.state_dict()], tmp_path / "saved.pt")
    second, optimizer, resumed = make_parts()
    for part, state in zip((second, optimizer, resumed), torch.load(tmp_path / "saved.pt"), strict=True):
        part.load_state_dict(state)
    train(resumed, chunks[3:])
    actual, expected = (
        pytree.tree_leaves((bptt.states, bptt.context_inputs, list(model.parameters())))
        for bptt, model in ((resumed, second), (bptt, model))
    )
    for leaf, other in zip(actual, expected, strict=True):
        assert torch.equal(leaf, other) if isinstance(other, Tensor) else leaf is other is None
    assert resumed.scaler.state_dict() == bptt.scaler.state_dict()
    before = [weight.clone() for weight in second.parameters()]
    resumed.states = [torch.full_like(state, float("nan")) for state in resumed.states]
    train(resumed, chunks[:1])
    if not context:  # a non-finite state is reset to the initial state, which was saved too
        assert [float(state[0, 0]) for state in resumed.states] == pytest.approx([0.1 * n for n in range(groups)])
    assert all(map(torch.equal, before, second.parameters()))


def test_state_dict_with_another_number_of_groups_raises() -> None:
    def bptt(groups: int) -> pytbptt.TruncatedBPTT:
        return pytbptt.TruncatedBPTT(SmallRNN(), None, nn.functional.mse_loss, groups=groups)

    with pytest.raises(InputError, match="state_dict: found 2 groups, expected 1"):
        bptt(1).load_state_dict(bptt(2).state_dict())
