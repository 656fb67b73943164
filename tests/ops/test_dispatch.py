"""Which implementation a call uses, and the warnings and errors if it is the reference."""

import threading
import types
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pytbptt import ops
from pytbptt.errors import InputError, RunError
from pytbptt.ops import dispatch
from pytbptt.ops.extension import Extension


def call() -> None:
    ops.lstm(torch.zeros(2, 3, 16), torch.zeros(16, 4), torch.zeros(3, 4), torch.zeros(3, 4))


@pytest.mark.parametrize("isa", ["avx512", "AVX2", "sse"])
def test_unsupported_cpu_isa_raises_on_first_call(monkeypatch: pytest.MonkeyPatch, isa: str) -> None:
    facts = {"cpu_isas": ["baseline", "avx2", "avx512"], "cpu_isa_in_use": "avx2", "why_no_cuda": "not requested"}
    monkeypatch.setattr(dispatch, "EXTENSION", Extension(facts=facts, unavailable_reason=None))
    monkeypatch.setattr(dispatch, "requested_cpu_isa", isa)
    with pytest.raises(InputError, match=f"^PYTBPTT_CPU_ISA: found '{isa}', expected one of baseline, avx2$"):
        call()
    with ops.backend("reference"):
        call()


@pytest.mark.skipif(dispatch.EXTENSION.facts is None, reason="no compiled extension")
def test_current_cpu_isa_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "requested_cpu_isa", dispatch.EXTENSION.facts["cpu_isa_in_use"])
    call()


def test_backend_fused_without_extension_raises_run_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatch, "EXTENSION", Extension(facts=None, unavailable_reason="no compiler"))
    reason = "lstm: the fused op cannot be used: pytbptt has no compiled extension: no compiler"
    with ops.backend("fused"), pytest.raises(RunError, match=f"^{reason}$"):
        call()


CUDA_BUILD = {
    "cpu_isas": ["baseline"],
    "cpu_isa_in_use": "baseline",
    "why_no_cuda": None,
    "cuda_architectures": "8.0+PTX;9.0a",
}
CPU_BUILD = CUDA_BUILD | {"why_no_cuda": "no CUDA toolkit was found"}


@pytest.fixture
def uses_fused(monkeypatch: pytest.MonkeyPatch):
    """dispatch.uses_fused and its warnings for a fake tensor, given the build's facts and a compute capability."""
    monkeypatch.setattr(dispatch, "already_warned", set())

    def call_uses_fused(facts, device="cuda", dtype=torch.float32, op="rel_attention", size=64, capability=(9, 0)):
        monkeypatch.setattr(dispatch, "EXTENSION", Extension(facts=facts, unavailable_reason=None))
        properties = types.SimpleNamespace(major=capability[0], minor=capability[1], name="Some GPU")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        with FakeTensorMode(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fused = dispatch.uses_fused(op, torch.empty(2, 3, 4, size, device=device, dtype=dtype))
        return fused, [str(warning.message) for warning in caught]

    return call_uses_fused


def test_no_second_warning_for_missing_cuda_kernels(uses_fused) -> None:
    assert uses_fused(CPU_BUILD) == (False, [])
    with ops.backend("fused"), pytest.raises(RunError, match="no CUDA kernels were built: no CUDA toolkit was found"):
        uses_fused(CPU_BUILD)


@pytest.mark.parametrize(
    ("architectures", "capabilities"),
    [
        ("8.0+PTX;8.6;9.0a", ["8.0", "8.6", "8.9", "9.0", "10.0", "10.3", "12.0"]),
        ("8.6", ["8.6", "8.9"]),
        ("9.0a", ["9.0"]),
        ("9.0a+PTX 8.0", ["8.0", "8.6", "8.9", "9.0"]),
        ("10.0f", ["10.0", "10.3"]),
        ("Ampere", ["8.0", "8.6", "8.9", "9.0", "10.0", "10.3", "12.0"]),  # a name is not parsed: CUDA decides
    ],
)
def test_supported_compute_capabilities_per_arch_list(uses_fused, architectures, capabilities) -> None:
    facts = CUDA_BUILD | {"cuda_architectures": architectures}
    for capability in ("8.0", "8.6", "8.9", "9.0", "10.0", "10.3", "12.0"):
        major, minor = map(int, capability.split("."))
        fused, messages = uses_fused(facts, capability=(major, minor))
        assert fused == (capability in capabilities), capability
        if messages:
            expected = (
                f"CUDA kernels were built for {architectures}, found Some GPU of {capability}; to build again: pip"
            )
            assert expected in messages[0]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"capability": (7, 5)}, "CUDA kernels need compute capability 8.0 or more, found Some GPU of 7.5"),
        ({"dtype": torch.float64}, "no kernels are written for float64 on cuda, only for float32, bfloat16, float16"),
        ({"size": 129}, "CUDA kernels support head sizes up to 128, found 129"),
        ({"device": "xpu"}, "no kernels are written for device type xpu, only for cpu and cuda"),
    ],
)
def test_fallback_warns_once_per_reason(uses_fused, changes, reason) -> None:
    fused, messages = uses_fused(CUDA_BUILD, **changes)
    assert (fused, len(messages)) == (False, 1)
    assert messages[0].endswith(reason)
    assert uses_fused(CUDA_BUILD, **changes) == (False, [])
    with ops.backend("reference"):
        assert uses_fused(CUDA_BUILD, **changes) == (False, [])
    with ops.backend("fused"), pytest.raises(RunError, match=reason):
        uses_fused(CUDA_BUILD, **changes)


@pytest.mark.skipif(dispatch.EXTENSION.facts is None, reason="without an extension the import has already warned")
def test_func_transform_fallback_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "already_warned", set())

    def gradient() -> None:
        torch.func.grad(lambda x: ops.lstm(x, torch.zeros(16, 4), *torch.zeros(2, 3, 4))[0].sum())(
            torch.zeros(2, 3, 16)
        )

    with pytest.warns(RuntimeWarning, match=r"lstm: falling back to the reference .* does not support torch.fun"):
        gradient()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradient()


@pytest.mark.skipif(dispatch.EXTENSION.facts is None, reason="no compiled extension")
def test_onnx_export_uses_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with (
        ops.backend("fused"),
        pytest.raises(RunError, match=r"^lstm: the fused op cannot be used: ONNX has no such operator$"),
    ):
        call()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call()


def test_backend_context_is_thread_local() -> None:
    first_entered, second_entered = threading.Event(), threading.Event()
    backends: list[str] = []

    def first() -> None:
        with ops.backend("reference"):
            first_entered.set()
            assert second_entered.wait(60)
            backends.append(dispatch.chosen_backend())

    def second() -> None:
        assert first_entered.wait(60)
        with ops.backend("fused"):
            second_entered.set()
            first_thread.join()
            backends.append(dispatch.chosen_backend())
            with ops.backend("auto"):
                backends.append(dispatch.chosen_backend())

    first_thread, second_thread = threading.Thread(target=first), threading.Thread(target=second)
    before = dispatch.chosen_backend()
    first_thread.start()
    second_thread.start()
    second_thread.join()
    assert backends == ["reference", "fused", "auto"]
    assert dispatch.chosen_backend() == before


def test_new_threads_inherit_backend() -> None:
    """Backward threads do, where checkpointed forward passes run again."""
    backends: list[str] = []
    with ops.backend("reference"):
        thread = threading.Thread(target=lambda: backends.append(dispatch.chosen_backend()))
        thread.start()
        thread.join()
    assert backends == ["reference"]


def test_compiled_function_uses_backend_of_its_thread() -> None:
    compiled = torch.compile(lambda: dispatch.chosen_backend() == "reference", backend="eager", fullgraph=True)
    results = [compiled()]

    def call_with_auto() -> None:
        with ops.backend("auto"):
            results.append(compiled())

    with ops.backend("reference"):
        results.append(compiled())
        thread = threading.Thread(target=call_with_auto)
        thread.start()
        thread.join()
        results.append(compiled())
    results.append(compiled())
    outside = dispatch.chosen_backend() == "reference"
    assert results == [outside, True, False, True, outside]


def test_no_warning_when_fused_or_meta(uses_fused) -> None:
    assert uses_fused(CUDA_BUILD) == (True, [])
    assert uses_fused(CUDA_BUILD, op="lstm", size=129) == (True, [])
    assert uses_fused(CUDA_BUILD, device="meta") == (False, [])


@pytest.mark.skipif(dispatch.EXTENSION.facts is None, reason="without an extension the import has already warned")
def test_torch_compile_warns_during_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "already_warned", set())
    monkeypatch.setitem(dispatch.SUPPORTED_DTYPES, "cpu", ())
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    with pytest.warns(RuntimeWarning, match="lstm: falling back to the reference .* for float32 on cpu"):
        compiled()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled()


def test_cuda_oom_raises_out_of_memory_error() -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("CUDA out of memory. Found no room on cuda:0 for a tensor of shape [8, 8]")

    with pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory\. Found no room on cuda:0"):
        dispatch.call_op(fail, 1, 2)


@pytest.mark.skipif(dispatch.EXTENSION.facts is None, reason="no compiled extension")
def test_cpu_oom_raises() -> None:
    inputs = (
        torch.zeros(1, 1, 1).expand(2**40, 2**10, 4),
        torch.zeros(4, 1),
        *torch.zeros(2, 1, 1).expand(2, 2**10, 1),
    )
    with ops.backend("fused"), torch.no_grad(), pytest.raises(RuntimeError, match="can't allocate memory"):
        ops.lstm(*inputs)


def test_compiled_function_follows_tf32_setting() -> None:
    compiled = torch.compile(lambda: dispatch.cuda_rounds_to_tf32(), backend="eager", fullgraph=True)
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for setting in ("ieee", "tf32", "ieee"):
            matmul.fp32_precision = setting
            assert compiled() == (setting == "tf32")
    finally:
        matmul.fp32_precision = before
