"""Every variant of truncated BPTT against gradients derived by hand, on a small RNN in float64."""

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


def stream() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    draw = [torch.randn(STEPS, B, width, generator=generator, dtype=torch.float64) for width in (2, 1)]
    return draw[0], draw[1]


def states_by_hand(model: SmallRNN, inputs: Tensor, start: Tensor) -> list[Tensor]:
    """The state before each step and after the last."""
    states = [start]
    for x in inputs:
        states.append(torch.tanh(states[-1] @ model.W.t() + x @ model.U.t()))
    return states


def gradients_by_hand(
    model: SmallRNN, inputs: Tensor, targets: Tensor, states: list[Tensor], scored: slice
) -> dict[str, Tensor]:
    """Of the mean square error at the scored steps, for a window that begins in states[0].

    With e_t the error's derivative for y_t, going back from the window's end:
    d_t = V' e_t + W' z_(t+1),  z_t = d_t (1 - s_t^2),
    dV = sum e_t s_t',  dW = sum z_t s_(t-1)',  dU = sum z_t x_t'.
    """
    gradients = {name: torch.zeros_like(weight) for name, weight in model.named_parameters()}
    count = len(range(len(inputs))[scored]) * B
    behind = torch.zeros(B, H, dtype=torch.float64)
    for t in reversed(range(len(inputs))):
        after, before = states[t + 1], states[t]
        error = torch.zeros(B, 1, dtype=torch.float64)
        if t in range(len(inputs))[scored]:
            error = 2 * (after @ model.V.t() - targets[t]) / count
        z = (error @ model.V + behind @ model.W) * (1 - after.square())
        gradients["V"] += error.t() @ after
        gradients["W"] += z.t() @ before
        gradients["U"] += z.t() @ inputs[t]
        behind = z
    return gradients


@torch.no_grad()
def train_by_hand(k1: int, k2: int) -> list[dict[str, Tensor]]:
    """The weights after every update of k1 new steps and gradients over k2, by gradient descent."""
    model, (inputs, targets) = SmallRNN(), stream()
    start, begin, weights = torch.zeros(B, H, dtype=torch.float64), 0, []
    for end in range(k1, STEPS + 1, k1):
        states = states_by_hand(model, inputs[begin:end], start)
        window = inputs[begin:end], targets[begin:end]
        gradients = gradients_by_hand(model, *window, states, slice(end - k1 - begin, None))
        following = max(0, end - (k2 - k1))
        start, begin = states[following - begin], following
        for name, weight in model.named_parameters():
            weight -= LR * gradients[name]
        weights.append({name: weight.clone() for name, weight in model.named_parameters()})
    return weights


def trainer(lr: float = LR, **options: Any) -> tuple[SmallRNN, pytbptt.TruncatedBPTT]:
    model = SmallRNN()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return model, pytbptt.TruncatedBPTT(model, optimizer, nn.functional.mse_loss, **options)


def chunks_of(length: int) -> list[tuple[Tensor, Tensor]]:
    inputs, targets = stream()
    return list(zip(inputs.split(length), targets.split(length), strict=True))


def assert_weights(model: SmallRNN, expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(dict(model.named_parameters()), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("k1", "k2"), [(3, 3), (1, 1), (12, 12), (2, 6), (3, 5), (4, 6), (1, 4), (2, 3), (4, 12), (3, 100)]
)
def test_k1_new_steps_and_gradients_over_k2(k1: int, k2: int) -> None:
    model, bptt = trainer(context=k2 - k1)
    for chunk, expected in zip(chunks_of(k1), train_by_hand(k1, k2), strict=True):
        bptt.update(chunk)
        assert_weights(model, expected)


class Work(TorchDispatchMode):
    """Counts the operators that give tensors of more than one element."""

    def __init__(self) -> None:
        super().__init__()
        self.done: Counter[str] = Counter()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) and leaf.numel() > 1 for leaf in pytree.tree_leaves(result)):
            self.done[str(operator)] += 1
        return result


def test_the_default_does_what_a_loop_by_hand_does_and_nothing_besides() -> None:
    """k2 = k1: no tensor is computed, joined or copied for the variants' sake, only a few scalars."""
    inputs, targets = stream()
    chunks = list(zip(inputs.split(4), targets.split(4), strict=True))
    model = SmallRNN()
    optimizer = torch.optim.SGD(model.parameters(), LR)
    with Work() as by_hand:
        state = None
        for x, y in chunks:
            output, state = model(x, state)
            nn.functional.mse_loss(output, y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            state = state.detach()
    bptt = pytbptt.TruncatedBPTT(model, optimizer, nn.functional.mse_loss, clip_norm=1.0)
    with Work() as ours:
        for chunk in chunks:
            bptt.update(chunk)
    assert by_hand.done["aten.tanh.default"] == STEPS
    assert ours.done == by_hand.done


@pytest.mark.parametrize(("length", "n"), [(2, 2), (2, 3), (1, 4), (3, 4)])
def test_one_update_for_n_chunks_is_one_for_a_chunk_as_long(length: int, n: int) -> None:
    model, bptt = trainer()
    chunks = chunks_of(length)
    for end, expected in zip(range(n, len(chunks) + 1, n), train_by_hand(n * length, n * length), strict=True):
        bptt.update(*chunks[end - n : end])
        assert_weights(model, expected)


def test_n_chunks_may_have_a_context_too() -> None:
    model, bptt = trainer(context=5)
    chunks = chunks_of(2)
    for end, expected in zip(range(2, len(chunks) + 1, 2), train_by_hand(4, 9), strict=True):
        bptt.update(*chunks[end - 2 : end])
        assert_weights(model, expected)


@pytest.mark.parametrize("k1", [1, 2, 3, 6])
def test_a_context_of_everything_makes_the_gradient_of_full_bptt(k1: int) -> None:
    """Weights unchanged in between, what the updates add up to is the gradient through the whole stream."""
    model, bptt = trainer(context=STEPS)
    for chunk in chunks_of(k1):
        bptt.accumulate(chunk)
    inputs, targets = stream()
    with torch.no_grad():
        states = states_by_hand(model, inputs, torch.zeros(B, H, dtype=torch.float64))
        full = gradients_by_hand(model, inputs, targets, states, slice(None))
    for name, weight in model.named_parameters():
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad * k1 / STEPS, full[name], rtol=0, atol=1e-12)


def test_the_gradients_by_hand_are_those_of_autograd() -> None:
    model, (inputs, targets) = SmallRNN(), stream()
    nn.functional.mse_loss(model(inputs, None)[0][4:], targets[4:]).backward()
    with torch.no_grad():
        states = states_by_hand(model, inputs, torch.zeros(B, H, dtype=torch.float64))
        by_hand = gradients_by_hand(model, inputs, targets, states, slice(4, None))
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, by_hand[name], rtol=0, atol=1e-13)


def test_the_context_follows_its_length_as_it_changes() -> None:
    _, bptt = trainer(context=1)
    chunks, kept = chunks_of(2), []
    for context, chunk in zip((1, 4, 4, 4, 3, 0), chunks, strict=True):
        bptt.context = context
        bptt.update(chunk)
        kept.append(0 if bptt.kept[0] is None else len(bptt.kept[0]))
    assert kept == [1, 3, 4, 4, 3, 0]


def test_groups_share_a_step_and_nothing_else() -> None:
    model, bptt = trainer(groups=2, context=2)
    alone, single = trainer(context=2)
    other, second = trainer(context=2)
    chunks = chunks_of(3)
    for chunk, later in zip(chunks[:2], chunks[2:], strict=True):
        bptt.accumulate(chunk, group=0)
        bptt.accumulate(later, group=1)
        single.accumulate(chunk)
        second.accumulate(later)
        for weight, one, two in zip(model.parameters(), alone.parameters(), other.parameters(), strict=True):
            assert one.grad is not None
            assert two.grad is not None
            torch.testing.assert_close(weight.grad, (one.grad + two.grad) / 2, rtol=0, atol=1e-12)
        bptt.step()
        for each in (alone, other):
            each.zero_grad()
            each.load_state_dict(model.state_dict())
    assert torch.equal(bptt.states[0], single.states[0])
    assert torch.equal(bptt.states[1], second.states[0])


def test_what_is_not_finite_changes_nothing_and_is_not_carried_on() -> None:
    model, bptt = trainer(context=1)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    (inputs, targets), second, *_ = chunks_of(3)
    bptt.update((torch.full_like(inputs, float("nan")), targets))
    assert_weights(model, before)
    assert bptt.states == [None]
    bptt.reset_state()
    bptt.update(second)
    assert not torch.equal(model.W, before["W"])
    assert bptt.states[0].isfinite().all()
    norm = trainer()[1].step()
    assert norm == 0.0


@pytest.mark.parametrize("kind", ["sgd", "momentum", "dampened", "adam", "amsgrad", "adamw", "adagrad"])
@pytest.mark.parametrize("fused", [False, True])
def test_an_update_that_is_lost_leaves_no_trace_in_the_optimizer(kind: str, fused: bool) -> None:
    """Were it the first one, too."""

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

    found = []
    for lost in ((), (0, 2)):
        model = SmallRNN()
        bptt = pytbptt.TruncatedBPTT(model, optimizer(model), nn.functional.mse_loss)
        for n, (inputs, targets) in enumerate(chunks_of(3)):
            if n in lost:
                bptt.update((inputs, torch.full_like(targets, float("nan"))))
                bptt.reset_state()
            bptt.update((inputs, targets))
            bptt.reset_state()
        found.append(model.state_dict())
    for name, weight in found[0].items():
        assert torch.equal(weight, found[1][name])


def test_an_optimizer_that_came_back_as_another_kind_is_believed() -> None:
    """load_state_dict brings "fused" from what was saved, and GradScaler's mark stays."""
    model, other = SmallRNN(), SmallRNN()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    optimizer.load_state_dict(torch.optim.Adam(other.parameters()).state_dict())
    bptt = pytbptt.TruncatedBPTT(model, optimizer, nn.functional.mse_loss)
    bptt.update(chunks_of(3)[0])
    assert not torch.equal(model.W, other.W)


@pytest.mark.parametrize("on_device", [False, True])
def test_a_lost_state_begins_anew_from_what_begin_was_given(on_device: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever differs between the two; the device itself chooses between values."""
    if on_device:
        monkeypatch.setattr("pytbptt.truncated_bptt.can_read_on_host", lambda tensor: False)
    start, nan = torch.full((B, H), 0.5, dtype=torch.float64, requires_grad=True), float("nan")
    cases = [
        ((start,), (torch.full((B, H), nan),)),  # values and dtype
        (start, (torch.full((B, H), nan), torch.zeros(1))),  # structure
        ([start[:1]], [torch.full((B, H), nan)]),  # shape
        ([start, 0], [torch.full((B, H), nan), 3]),  # what is no tensor
        (None, [torch.full((B, H), nan)]),
        ((), ()),
    ]
    for initial, lost in cases:
        model, bptt = trainer()
        bptt.reset_state([initial])
        bptt.states = [lost]
        model.W.grad = torch.full_like(model.W, nan)
        bptt.step()
        found, expected = pytree.tree_leaves(bptt.states[0]), pytree.tree_leaves(initial)
        assert pytree.tree_structure(bptt.states[0]) == pytree.tree_structure(initial)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one.double(), other) if isinstance(other, Tensor) else one == other


def test_the_norm_is_clipped_and_told() -> None:
    gradients = {}
    for clip_norm in (0.0, 0.01):
        model, bptt = trainer(lr=1.0, clip_norm=clip_norm)
        before = torch.cat([weight.detach().flatten().clone() for weight in model.parameters()])
        bptt.accumulate(chunks_of(4)[0])
        norm = bptt.step()
        gradients[clip_norm] = before - torch.cat([weight.detach().flatten() for weight in model.parameters()])
        assert norm == pytest.approx(float(gradients[0.0].norm()))
    assert float(gradients[0.01].norm()) == pytest.approx(0.01, rel=1e-3)


def test_a_loss_without_steps_is_for_frameworks_that_make_their_own() -> None:
    model = SmallRNN()
    bptt = pytbptt.TruncatedBPTT(model, None, nn.functional.mse_loss)
    theirs = torch.optim.SGD(model.parameters(), lr=LR)
    for chunk, expected in zip(chunks_of(3), train_by_hand(3, 3), strict=True):
        theirs.zero_grad()
        bptt.forward(chunk).loss.backward()
        theirs.step()
        assert_weights(model, expected)
    with pytest.raises(InputError, match="step: found no optimizer"):
        bptt.step()


def test_a_model_may_score_itself() -> None:
    @dataclasses.dataclass
    class Scored:
        objective: Tensor

    class Scoring(SmallRNN):
        def forward(self, inputs: Tensor, state: Any, targets: Tensor | None = None) -> tuple[Any, Tensor]:
            output, state = super().forward(inputs, state)
            return output if targets is None else Scored(nn.functional.mse_loss(output, targets)), state

    model = Scoring()
    bptt = pytbptt.TruncatedBPTT(model, torch.optim.SGD(model.parameters(), lr=LR), None, context=3)
    for chunk, expected in zip(chunks_of(2), train_by_hand(2, 5), strict=True):
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
    for (x, y), expected in zip(chunks_of(2), train_by_hand(2, 5), strict=True):
        bptt.update(({"left": x[..., :1], "right": (x[..., 1:],), "none": None}, y))
        assert_weights(model, expected)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda: trainer(context=-1), "context: found -1, expected at least 0"),
        (lambda: trainer(groups=0), "groups: found 0, expected at least 1"),
        (lambda: trainer(time_dim=-1), "time_dim: found -1, expected at least 0"),
        (
            lambda: trainer()[1].reset_state(torch.zeros(1, B, H)),
            "states: found a tensor, expected a list of 1, one for each",
        ),
        (
            lambda: trainer()[1].reset_state((torch.zeros(B, H), torch.zeros(B, H))),
            "states: found 2, expected a list of 1",
        ),
        (lambda: trainer(groups=2)[1].update(stream()), "update: found 2 groups, expected accumulate and step"),
        (lambda: trainer()[1].update(([1.0, 2.0], torch.ones(2))), "inputs: found no tensor in a list"),
        (lambda: trainer()[1].update((torch.ones(0, B, 2), torch.ones(0, B, 1))), r"inputs: found shape \(0, 2, 2\)"),
        (lambda: trainer()[1].update(), r"found nothing, expected pairs \(inputs, targets\)"),
        (lambda: trainer()[1].update(*stream()), r"found Tensor, Tensor, expected pairs \(inputs, targets\)"),
    ],
)
def test_mistakes_are_named(mistake: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        mistake()


@pytest.mark.parametrize(("context", "groups", "scaled"), [(0, 1, False), (3, 1, True), (3, 2, True), (7, 3, False)])
def test_a_loop_of_ones_own_goes_on_from_its_state_dict(
    tmp_path: Path, context: int, groups: int, scaled: bool
) -> None:
    """With the bits of one that was not interrupted: states, kept steps, initial states, the scaler."""
    chunks = [(inputs * (n + 1), targets) for n, (inputs, targets) in enumerate([stream()] * 6)]

    def parts() -> tuple[SmallRNN, torch.optim.Optimizer, pytbptt.TruncatedBPTT]:
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

    model, _, bptt = parts()
    bptt.reset_state([torch.full((B, H), 0.1 * n, dtype=torch.float64) for n in range(groups)])
    train(bptt, chunks)

    first, optimizer, half = parts()
    half.reset_state([torch.full((B, H), 0.1 * n, dtype=torch.float64) for n in range(groups)])
    train(half, chunks[:3])
    torch.save([first.state_dict(), optimizer.state_dict(), half.state_dict()], tmp_path / "saved.pt")
    second, optimizer, rest = parts()
    for part, state in zip((second, optimizer, rest), torch.load(tmp_path / "saved.pt"), strict=True):
        part.load_state_dict(state)
    train(rest, chunks[3:])
    found, expected = ((bptt.states, bptt.kept, list(m.parameters())) for bptt, m in ((rest, second), (bptt, model)))
    for mine, other in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        assert torch.equal(mine, other) if isinstance(other, Tensor) else mine is other is None
    assert rest.scaler.state_dict() == bptt.scaler.state_dict()
    before = [weight.clone() for weight in second.parameters()]
    rest.states = [torch.full_like(state, float("nan")) for state in rest.states]
    train(rest, chunks[:1])
    if not context:  # a lost state begins anew from what the first half was given
        assert [float(state[0, 0]) for state in rest.states] == pytest.approx([0.1 * n for n in range(groups)])
    assert all(map(torch.equal, before, second.parameters()))


def test_a_state_dict_of_other_groups_is_refused() -> None:
    def bptt(groups: int) -> pytbptt.TruncatedBPTT:
        return pytbptt.TruncatedBPTT(SmallRNN(), None, nn.functional.mse_loss, groups=groups)

    with pytest.raises(InputError, match="state_dict: found 2 groups, expected 1"):
        bptt(1).load_state_dict(bptt(2).state_dict())
