"""TruncatedBPTT trains recurrent modules on tasks that need their state or gradients through it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import pytbptt

LAG, B = 2, 16


def echo_task_chunks(length: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """Chunks of random signs (T, B, 1), whose targets are the signs LAG steps before, often in the chunk before."""
    signs = torch.randint(0, 2, (length * count + LAG, B, 1)) * 2.0 - 1.0
    return list(zip(signs[LAG:].split(length), signs[:-LAG].split(length), strict=True))


class Readout(nn.Module):
    """A recurrent module with a linear layer on top."""

    def __init__(self, recurrent: nn.Module, width: int) -> None:
        super().__init__()
        self.recurrent, self.linear = recurrent, nn.Linear(width, 1)

    def forward(self, inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
        output, state = self.recurrent(inputs, state)
        return self.linear(output), state


class IdentityRNN(nn.Module):
    """A custom cell, whose recurrent weights are initialised to the identity."""

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
    ids=["lstm", "gru", "custom_cell"],
)
def test_module_learns_to_echo_across_chunks(recurrent: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = Readout(recurrent(), 16)
    bptt = pytbptt.TruncatedBPTT(
        model,
        torch.optim.Adam(model.parameters(), lr=0.02),
        nn.functional.mse_loss,
        context=LAG,
        clip_norm=1.0,
    )
    losses = [float(bptt.update(chunk)) for chunk in echo_task_chunks(length=2, count=250)]
    # Without a state the loss stays at 1. Over 100 seeds: at least 0.69 at the start, below 0.001 at the end.
    assert sum(losses[:20]) / 20 > 0.5
    assert sum(losses[-20:]) / 20 < 0.1


def test_context_lets_an_lstm_learn_across_chunks_of_one_step() -> None:
    def final_loss(context: int) -> float:
        torch.manual_seed(0)
        model = Readout(nn.LSTM(1, 16), 16)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        bptt = pytbptt.TruncatedBPTT(model, optimizer, nn.functional.mse_loss, context=context, clip_norm=1.0)
        losses = [float(bptt.update(chunk)) for chunk in echo_task_chunks(length=1, count=250)]
        return sum(losses[-20:]) / 20

    assert final_loss(context=LAG) < 0.1 * final_loss(context=0)  # at most 0.05 over 100 seeds


def test_nn_lstm_trains_without_wrapper() -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(1, 8)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.mse_loss(output.sum(dim=-1, keepdim=True), target)

    bptt = pytbptt.TruncatedBPTT(lstm, torch.optim.Adam(lstm.parameters(), lr=0.02), loss)
    losses = [float(bptt.update(chunk)) for chunk in echo_task_chunks(length=6, count=60)]
    assert losses[-1] < 0.8 * losses[0]  # at most 0.66 over 100 seeds
    assert [tuple(tensor.shape) for tensor in bptt.states[0]] == [(1, B, 8), (1, B, 8)]


class Observation(NamedTuple):
    """Features (T, B, 3), and whether a step is the first of an episode (T, B)."""

    features: Tensor
    is_first: Tensor


class Agent(nn.Module):
    """Returns the logits of two actions; its state is reset at the start of an episode."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.policy = nn.GRUCell(3, 32), nn.Linear(32, 2)

    def forward(self, observation: Observation, state: Tensor | None) -> tuple[Tensor, Tensor]:
        state = observation.features.new_zeros(observation.is_first.shape[1], 32) if state is None else state
        logits = []
        for features, is_first in zip(observation.features, observation.is_first, strict=True):
            state = self.cell(features, torch.where(is_first.unsqueeze(-1), 0.0, state))
            logits.append(self.policy(state))
        return torch.stack(logits), state


class TMaze:
    """B T-mazes: a sign at the start says which way to turn after `length` steps, for a reward of 1."""

    def __init__(self, length: int) -> None:
        self.length, self.position = length, torch.arange(B) % length  # episodes end at different steps
        self.sign = torch.randint(0, 2, (B,))

    def observe(self) -> Observation:
        is_first, is_last = self.position == 0, self.position == self.length - 1
        features = torch.stack([is_first * (self.sign * 2.0 - 1.0), is_first.float(), is_last.float()], dim=-1)
        return Observation(features.unsqueeze(0), is_first.unsqueeze(0))

    def act(self, action: Tensor) -> Tensor:
        """The rewards; NaN except at the end of an episode."""
        is_last = self.position == self.length - 1
        rewards = torch.where(is_last, (action == self.sign).float(), torch.nan)
        self.sign = torch.where(is_last, torch.randint(0, 2, (B,)), self.sign)
        self.position = torch.where(is_last, 0, self.position + 1)
        return rewards


def policy_gradient(logits: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
    """REINFORCE with the expected reward of random actions, 0.5, as its baseline."""
    actions, rewards = targets
    log_prob = torch.distributions.Categorical(logits=logits).log_prob(actions)
    return -(log_prob * torch.nan_to_num(rewards - 0.5)).mean()


def test_agent_learns_to_remember_across_rollouts() -> None:
    """With rollouts of 2 steps and episodes of 4, the sign is always in an earlier rollout than the reward."""
    torch.manual_seed(0)
    agent, maze = Agent(), TMaze(length=4)
    bptt = pytbptt.TruncatedBPTT(
        agent, torch.optim.Adam(agent.parameters(), lr=0.01), policy_gradient, context=3, clip_norm=1.0
    )
    state, mean_rewards = None, []
    for _ in range(300):
        steps = []
        for _ in range(2):
            observation = maze.observe()
            with torch.no_grad():
                logits, state = agent(observation, state)
                action = torch.distributions.Categorical(logits=logits[0]).sample()
            steps.append((observation, action, maze.act(action)))
        observations, actions, rewards = zip(*steps, strict=True)
        inputs = Observation(*(torch.cat(parts) for parts in zip(*observations, strict=True)))
        bptt.update((inputs, (torch.stack(actions), torch.stack(rewards))))
        mean_rewards.append(float(torch.stack(rewards).nanmean()))
    # Random actions earn 0.5. Over 100 seeds: below 0.68 at the start, above 0.99 at the end.
    assert sum(mean_rewards[:5]) / 5 < 0.75
    assert sum(mean_rewards[-40:]) / 40 > 0.9
