"""TruncatedBPTT with modules of other people's: each learns what only its state, or gradients through it, can carry."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import pytbptt

LAG, B = 2, 16


def echo(length: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """Chunks of a stream of signs (T, B, 1), to be repeated LAG steps later: into the next chunk, for the most part."""
    signs = torch.randint(0, 2, (length * count + LAG, B, 1)) * 2.0 - 1.0
    return list(zip(signs[LAG:].split(length), signs[:-LAG].split(length), strict=True))


class Readout(nn.Module):
    """A recurrent module of torch's and a linear layer on top."""

    def __init__(self, recurrent: nn.Module, width: int) -> None:
        super().__init__()
        self.recurrent, self.linear = recurrent, nn.Linear(width, 1)

    def forward(self, inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
        output, state = self.recurrent(inputs, state)
        return self.linear(output), state


class IdentityRNN(nn.Module):
    """A cell of one's own, whose recurrent weights begin as the identity; tanh, so that no seed makes it explode."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.recurrent, self.input = nn.Parameter(torch.eye(width)), nn.Linear(1, width)

    def forward(self, inputs: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        state = inputs.new_zeros(inputs.shape[1], len(self.recurrent)) if state is None else state
        states = []
        for x in inputs:
            state = torch.tanh(self.input(x) + state @ self.recurrent)
            states.append(state)
        return torch.stack(states), state


@pytest.mark.parametrize(
    "recurrent",
    [lambda: nn.LSTM(1, 16), lambda: nn.GRU(1, 16), lambda: IdentityRNN(16)],
    ids=["lstm", "gru", "own_cell"],
)
def test_a_module_learns_to_echo_across_chunks(recurrent: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = Readout(recurrent(), 16)
    bptt = pytbptt.TruncatedBPTT(
        model,
        torch.optim.Adam(model.parameters(), lr=0.02),
        nn.functional.mse_loss,
        context=LAG,
        clip_norm=1.0,
    )
    losses = [float(bptt.update(chunk)) for chunk in echo(length=2, count=250)]
    # The best without a memory is 1; a hundred seeds begin at 0.69 and more and end below 0.001.
    assert sum(losses[:20]) / 20 > 0.5
    assert sum(losses[-20:]) / 20 < 0.1


def test_without_gradients_from_chunk_to_chunk_the_same_lstm_learns_less() -> None:
    def learned(context: int) -> float:
        torch.manual_seed(0)
        model = Readout(nn.LSTM(1, 16), 16)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        bptt = pytbptt.TruncatedBPTT(model, optimizer, nn.functional.mse_loss, context=context, clip_norm=1.0)
        losses = [float(bptt.update(chunk)) for chunk in echo(length=1, count=250)]
        return sum(losses[-20:]) / 20

    assert learned(context=LAG) < 0.1 * learned(context=0)  # 0.05 at most of a hundred seeds


def test_a_bare_lstm_is_a_module_with_a_state() -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(1, 8)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.mse_loss(output.sum(dim=-1, keepdim=True), target)

    bptt = pytbptt.TruncatedBPTT(lstm, torch.optim.Adam(lstm.parameters(), lr=0.02), loss)
    losses = [float(bptt.update(chunk)) for chunk in echo(length=6, count=60)]
    assert losses[-1] < 0.8 * losses[0]  # 0.66 at most of a hundred seeds
    assert [tuple(tensor.shape) for tensor in bptt.states[0]] == [(1, B, 8), (1, B, 8)]


class Seen(NamedTuple):
    """What an agent observes, and where a new episode begins: (T, B, 3) and (T, B)."""

    observation: Tensor
    begins: Tensor


class Agent(nn.Module):
    """Observations to the logits of two actions; its memory is cleared where an episode begins."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.policy = nn.GRUCell(3, 32), nn.Linear(32, 2)

    def forward(self, seen: Seen, state: Tensor | None) -> tuple[Tensor, Tensor]:
        state = seen.observation.new_zeros(seen.begins.shape[1], 32) if state is None else state
        logits = []
        for observation, begins in zip(seen.observation, seen.begins, strict=True):
            state = self.cell(observation, torch.where(begins.unsqueeze(-1), 0.0, state))
            logits.append(self.policy(state))
        return torch.stack(logits), state


class Corridors:
    """B corridors: a sign at the entrance says which way to turn at the end, `length` steps on, for a reward of 1."""

    def __init__(self, length: int) -> None:
        self.length, self.place = length, torch.arange(B) % length  # so that they do not all end at once
        self.sign = torch.randint(0, 2, (B,))

    def observe(self) -> Seen:
        begins, ends = self.place == 0, self.place == self.length - 1
        observation = torch.stack([begins * (self.sign * 2.0 - 1.0), begins.float(), ends.float()], dim=-1)
        return Seen(observation.unsqueeze(0), begins.unsqueeze(0))

    def act(self, action: Tensor) -> Tensor:
        """Whether each turned where the sign said; NaN where it was not yet at the end."""
        ends = self.place == self.length - 1
        rewards = torch.where(ends, (action == self.sign).float(), torch.nan)
        self.sign = torch.where(ends, torch.randint(0, 2, (B,)), self.sign)
        self.place = torch.where(ends, 0, self.place + 1)
        return rewards


def policy_gradient(logits: Tensor, acted: tuple[Tensor, Tensor]) -> Tensor:
    """REINFORCE with a baseline of one half, what chance earns; only the last step of an episode is rewarded."""
    actions, rewards = acted
    log_prob = torch.distributions.Categorical(logits=logits).log_prob(actions)
    return -(log_prob * torch.nan_to_num(rewards - 0.5)).mean()


def test_an_agent_learns_what_it_saw_in_an_earlier_rollout() -> None:
    """Rollouts of 2 steps, corridors of 4: the sign is always in an earlier rollout than the reward."""
    torch.manual_seed(0)
    agent, corridors = Agent(), Corridors(length=4)
    bptt = pytbptt.TruncatedBPTT(
        agent, torch.optim.Adam(agent.parameters(), lr=0.01), policy_gradient, context=3, clip_norm=1.0
    )
    state, earned = None, []
    for _ in range(300):
        steps = []
        for _ in range(2):
            seen = corridors.observe()
            with torch.no_grad():
                logits, state = agent(seen, state)
                action = torch.distributions.Categorical(logits=logits[0]).sample()
            steps.append((seen, action, corridors.act(action)))
        seens, actions, rewards = zip(*steps, strict=True)
        inputs = Seen(*(torch.cat(parts) for parts in zip(*seens, strict=True)))
        bptt.update((inputs, (torch.stack(actions), torch.stack(rewards))))
        earned.append(float(torch.stack(rewards).nanmean()))
    # Chance earns 0.5. Of a hundred seeds all begin below 0.68 and end above 0.99.
    assert sum(earned[:5]) / 5 < 0.75
    assert sum(earned[-40:]) / 40 > 0.9
