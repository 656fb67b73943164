"""The benchmarked implementations agree, are timed in turn, and report errors in the results."""

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

from benchmarks import harness, record
from benchmarks.harness import Op, Size
from benchmarks.ops.lstm import LSTM_LAYERS
from benchmarks.ops.rel_attention import REL_ATTENTION
from benchmarks.ops.rollouts import ROLLOUTS
from pytbptt.ops.extension import EXTENSION
from tests.common.subprocesses import env_without_xdist

needs_kernels = pytest.mark.skipif(
    EXTENSION.facts is None, reason=f"no compiled extension: {EXTENSION.unavailable_reason}"
)


@pytest.mark.parametrize(
    ("op", "excluded"),
    [
        (REL_ATTENTION, ("compiled_eager", "flex_attention")),  # flex_attention has no float64
        (LSTM_LAYERS, ("compiled_eager", "flashrnn", "fused_with_resets")),
    ],
    ids=("rel_attention", "lstm"),
)
@needs_kernels
def test_benchmarked_implementations_agree(op: Op, excluded: tuple[str, ...]) -> None:
    """In outputs, and in the gradients that all of them have."""
    torch.manual_seed(0)
    problem = op.make(device="cpu", dtype=torch.float64, **op.sizes["tiny"].shape)
    results: dict[str, list[Tensor]] = {}
    for name, implementation in op.implementations.items():
        if name not in (*op.bounds, *excluded):
            out = implementation(problem)
            gradients = torch.autograd.grad(out, op.leaves(problem), torch.ones_like(out), allow_unused=True)
            results[name] = [out, *(gradient for gradient in gradients if gradient is not None)]
    expected = results.pop("eager")
    assert len(results) >= 2
    for tensors in results.values():
        for tensor, reference in zip(tensors, expected, strict=True):
            torch.testing.assert_close(tensor, reference, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("fused", marks=needs_kernels),
        "per_step_loop",
        "split_at_every_reset",
        "torchrl_pad",
        "torchrl_scan",  # compiling takes half a minute
    ],
)
def test_rollout_implementations_agree(name: str) -> None:
    """With resets at the first and last step and in consecutive steps."""
    if name.startswith("torchrl"):
        pytest.importorskip("torchrl", reason="TorchRL is not installed; make bench-rollouts installs it")
    op = ROLLOUTS
    torch.manual_seed(0)
    problem = op.make(device="cpu", dtype=torch.float64, **op.sizes["tiny"].shape)
    for step, row in ((0, 1), (7, 2), (8, 2), (19, 0)):
        problem.reset[step, row] = True
    results: list[list[Tensor]] = []
    for implementation in (op.implementations[name], op.implementations["eager"]):
        out = implementation(problem)
        gradients = torch.autograd.grad(out, op.leaves(problem), torch.ones_like(out), allow_unused=True)
        results.append([out, *(gradient for gradient in gradients if gradient is not None)])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["compiled_eager", "flex_attention"])
def test_compiled_attention_matches_eager(name: str) -> None:
    op = REL_ATTENTION
    torch.manual_seed(0)
    problem = op.make(device="cpu", dtype=torch.float32, **op.sizes["tiny"].shape)
    with torch.no_grad():
        torch.testing.assert_close(op.implementations[name](problem), op.implementations["eager"](problem))


def test_compiled_lstm_matches_eager() -> None:
    op = LSTM_LAYERS
    torch.manual_seed(0)
    problem = op.make(device="cpu", dtype=torch.float32, **op.sizes["tiny"].shape)
    torch.testing.assert_close(op.implementations["compiled_eager"](problem), op.implementations["eager"](problem))


@pytest.fixture
def fake_op(monkeypatch: pytest.MonkeyPatch) -> tuple[Op, list[str]]:
    """An op with three implementations, of which the second fails at its fourth call, and a log of the calls."""
    calls: list[str] = []

    def implementation(name: str) -> harness.Implementation:
        def run(problem: Tensor) -> Tensor:
            calls.append(name)
            if name == "failing" and calls.count(name) == 4:
                raise RuntimeError("no more\nat all")
            return problem * 2

        return run

    module = ModuleType("fake_module")
    names = ("fused", "failing", "other")
    op = Op(
        module="fake_module",
        name="twice",
        sizes={"small": Size({"N": 3})},
        make=lambda N, device, dtype: torch.ones(N, device=device, dtype=dtype, requires_grad=True),
        implementations={name: implementation(name) for name in names},
        leaves=lambda problem: [problem],
    )
    module.OPS = {op.name: op}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_module", module)
    monkeypatch.setattr(harness, "peak_on_cpu", lambda row: 8)
    return op, calls


def test_round_robin_order_and_failure_isolation(fake_op: tuple[Op, list[str]]) -> None:
    op, calls = fake_op
    rows = [row for row in op.rows() if row.group == ("twice", "small", "cpu", "float32", "backward")]
    measurements = harness.measure(rows, min_rounds=4, seconds=0.0, cuda_graph=False)
    warm_up = [name for name in ("fused", "failing", "other") for _ in range(harness.WARM_UP["cpu"])]
    assert calls == warm_up + ["fused", "failing", "other"] * 2 + ["fused", "other"] * 2
    assert [len(measurements[name].seconds) for name in ("fused", "failing", "other")] == [4, 1, 4]
    assert measurements["failing"].error == "RuntimeError: no more at all"
    assert measurements["fused"].error is None
    assert measurements["fused"].result_bytes == 2 * 3 * 4  # output and gradient
    result = harness.as_result(rows[0], measurements["fused"])
    assert (result["rounds"], result["peak_bytes"], result["shape"]) == (4, 8, {"N": 3})
    assert "cannot" in harness.as_result(rows[1], measurements["failing"])


def test_input_construction_error_is_reported_per_row(fake_op: tuple[Op, list[str]]) -> None:
    op, calls = fake_op
    rows = [row for row in op.rows() if row.group == ("twice", "small", "cpu", "float32", "forward")]
    object.__setattr__(op, "make", lambda **sizes: [][0])
    measurements = harness.measure(rows, min_rounds=1, seconds=0.0, cuda_graph=False)
    assert {measurement.error for measurement in measurements.values()} == {"IndexError: list index out of range"}
    assert not calls


def run_benchmarks(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--device", "cpu", *arguments]
    return subprocess.run(command, cwd=record.ROOT, capture_output=True, text=True, env=env_without_xdist())


@needs_kernels
def test_selected_benchmarks_are_written_and_printed(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    chosen = ["--size", "tiny", "--mode", "backward", "--only", "fused,eager,flash*", "--benchmark-max-time", "0.01"]
    done = run_benchmarks(
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
    assert [(result["op"], result["name"]) for result in contents["results"]] == [
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
def test_unknown_size_or_implementation_is_an_error(option: str) -> None:
    done = run_benchmarks(
        "benchmarks/test_rel_attention.py", option, "fused,nonsense" if option == "--only" else "nonsense"
    )
    assert done.returncode != 0
    assert f"ERROR: {option}: found nonsense, expected some of " in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_without_a_gpu_or_kernels_rows_are_skipped_with_the_reason() -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    done = run_benchmarks("benchmarks/test_lstm.py", "--device", "cuda", "--size", "zaremba-650", "-rs")
    assert done.returncode == 0, done.stdout
    assert "no GPU that torch can use" in done.stdout
