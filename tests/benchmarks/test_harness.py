"""The benchmarks' harness: what it compares is equal, it takes turns, and what cannot be timed is told."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import harness, record, test_lstm, test_rel_attention, test_rollouts
from benchmarks.harness import Op, Size
from pytbptt.ops.extension import EXTENSION
from tests.processes import outside_xdist

needs_kernels = pytest.mark.skipif(
    EXTENSION.facts is None, reason=f"no compiled extension: {EXTENSION.unavailable_reason}"
)


@pytest.mark.parametrize(
    ("op", "left_out"),
    [
        (test_rel_attention.REL_ATTENTION, ("compiled_eager", "flex_attention")),  # flex_attention asks for float32
        (test_lstm.LSTM_LAYERS, ("compiled_eager", "flashrnn", "fused_with_resets")),
    ],
    ids=("rel_attention", "lstm"),
)
@needs_kernels
def test_implementations_give_the_same_numbers(op: Op, left_out: tuple[str, ...]) -> None:
    """Outputs, and gradients of what all have."""
    torch.manual_seed(0)
    problem = op.make(device="cpu", dtype=torch.float64, **op.sizes["tiny"].shape)
    found: dict[str, list[Tensor | None]] = {}
    for name, implementation in op.implementations.items():
        if name not in (*op.bounds, *left_out):
            out = implementation(problem)
            gradients = torch.autograd.grad(out, op.wanted(problem), torch.ones_like(out), allow_unused=True)
            found[name] = [out, *(gradient for gradient in gradients if gradient is not None)]
    expected = found.pop("eager")
    assert len(found) >= 2
    for tensors in found.values():
        for tensor, reference in zip(tensors, expected, strict=True):
            torch.testing.assert_close(tensor, reference, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("fused", marks=needs_kernels),
        "per_step_loop",
        "split_at_every_reset",
        "torchrl_pad",
        "torchrl_scan",  # compiles for half a minute
    ],
)
def test_rollouts_give_the_same_numbers(name: str) -> None:
    """Outputs, and gradients of input, weights and biases, with resets at the edges and one after another."""
    if name.startswith("torchrl"):
        pytest.importorskip("torchrl", reason="TorchRL is not installed here; make bench-rollouts brings it")
    op = test_rollouts.ROLLOUTS
    torch.manual_seed(0)
    problem = op.make(device="cpu", dtype=torch.float64, **op.sizes["tiny"].shape)
    for step, row in ((0, 1), (7, 2), (8, 2), (19, 0)):
        problem.reset[step, row] = True
    found: list[list[Tensor]] = []
    for implementation in (op.implementations[name], op.implementations["eager"]):
        out = implementation(problem)
        gradients = torch.autograd.grad(out, op.wanted(problem), torch.ones_like(out), allow_unused=True)
        found.append([out, *(gradient for gradient in gradients if gradient is not None)])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["compiled_eager", "flex_attention"])
def test_compiled_attention_gives_the_same_numbers(name: str) -> None:
    op = test_rel_attention.REL_ATTENTION
    torch.manual_seed(0)
    problem = op.make(device="cpu", dtype=torch.float32, **op.sizes["tiny"].shape)
    with torch.no_grad():
        torch.testing.assert_close(op.implementations[name](problem), op.implementations["eager"](problem))


def test_compiled_lstm_gives_the_same_numbers() -> None:
    op = test_lstm.LSTM_LAYERS
    torch.manual_seed(0)
    problem = op.make(device="cpu", dtype=torch.float32, **op.sizes["tiny"].shape)
    torch.testing.assert_close(op.implementations["compiled_eager"](problem), op.implementations["eager"](problem))


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch) -> tuple[Op, list[str]]:
    """An op of three implementations, the second of which fails at its fourth call, and who was called in turn."""
    called: list[str] = []

    def implementation(name: str) -> harness.Implementation:
        def run(problem: Tensor) -> Tensor:
            called.append(name)
            if name == "failing" and called.count(name) == 4:
                raise RuntimeError("no more\nat all")
            return problem * 2

        return run

    module = ModuleType("of_the_test")
    names = ("fused", "failing", "other")
    made = Op(
        module="of_the_test",
        name="twice",
        sizes={"small": Size({"N": 3})},
        make=lambda N, device, dtype: torch.ones(N, device=device, dtype=dtype, requires_grad=True),
        implementations={name: implementation(name) for name in names},
        wanted=lambda problem: [problem],
    )
    module.OPS = {made.name: made}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "of_the_test", module)
    monkeypatch.setattr(harness, "peak_on_cpu", lambda row: 8)
    return made, called


def test_rows_of_a_group_take_turns_and_a_failure_stops_one_alone(op: tuple[Op, list[str]]) -> None:
    made, called = op
    rows = [row for row in made.rows() if row.group == ("twice", "small", "cpu", "float32", "backward")]
    found = harness.measure(rows, least_rounds=4, seconds=0.0, cuda_graph=False)
    warm = [name for name in ("fused", "failing", "other") for _ in range(harness.WARM_UP["cpu"])]
    assert called == warm + ["fused", "failing", "other"] * 2 + ["fused", "other"] * 2
    assert [len(found[name].seconds) for name in ("fused", "failing", "other")] == [4, 1, 4]
    assert found["failing"].cannot == "RuntimeError: no more at all"
    assert found["fused"].cannot is None
    assert found["fused"].result_bytes == 2 * 3 * 4  # output and gradient
    result = harness.as_result(rows[0], found["fused"])
    assert (result["rounds"], result["peak_bytes"], result["shape"]) == (4, 8, {"N": 3})
    assert "cannot" in harness.as_result(rows[1], found["failing"])


def test_a_problem_that_cannot_be_made_is_told_in_every_row(op: tuple[Op, list[str]]) -> None:
    made, called = op
    rows = [row for row in made.rows() if row.group == ("twice", "small", "cpu", "float32", "forward")]
    object.__setattr__(made, "make", lambda **sizes: [][0])
    found = harness.measure(rows, least_rounds=1, seconds=0.0, cuda_graph=False)
    assert {one.cannot for one in found.values()} == {"IndexError: list index out of range"}
    assert not called


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--device", "cpu", *arguments]
    return subprocess.run(command, cwd=record.ROOT, capture_output=True, text=True, env=outside_xdist())


@needs_kernels
def test_a_session_writes_and_shows_what_was_chosen(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    chosen = ["--size", "tiny", "--mode", "backward", "--only", "fused,eager,flash*", "--benchmark-max-time", "0.01"]
    done = bench(
        "benchmarks/test_rel_attention.py",
        "benchmarks/test_lstm.py",
        "--benchmark-only",
        "--results",
        str(path),
        *chosen,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    contents: dict[str, Any] = json.loads(path.read_text())
    assert contents["command"].endswith(shlex.join(chosen))
    found = [(result["op"], result["name"]) for result in contents["results"]]
    assert found == [
        ("rel_attention", "fused"),
        ("rel_attention", "eager"),
        ("rel_attention", "flash_without_positions"),
        ("lstm", "fused"),
        ("lstm", "eager"),
        ("lstm with weight drop", "fused"),
    ]
    assert all(result["milliseconds"] > 0 and result["rounds"] >= 5 for result in contents["results"])
    assert "benchmark 'rel_attention, tiny (B 2, T 5, M 3, H 2, D 8), cpu, float32, backward': 3 tests" in done.stdout
    assert "| rel_attention |" in done.stdout


@pytest.mark.parametrize("option", ["--size", "--only"])
def test_an_unknown_choice_is_one_line(option: str) -> None:
    done = bench("benchmarks/test_rel_attention.py", option, "fused,nonsense" if option == "--only" else "nonsense")
    assert done.returncode != 0
    assert f"ERROR: {option}: found nonsense, expected some of " in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_without_a_gpu_or_kernels_rows_are_skipped_with_the_reason() -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    done = bench("benchmarks/test_lstm.py", "--device", "cuda", "--size", "zaremba-650", "-rs")
    assert done.returncode == 0, done.stdout
    assert "no GPU that torch can use" in done.stdout
