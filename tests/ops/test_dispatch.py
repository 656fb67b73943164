"""Which implementation serves a call, as the environment chooses it, and what is said where it is the reference."""

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


@pytest.mark.parametrize("wanted", ["avx512", "AVX2", "sse"])
def test_an_instruction_set_that_cannot_be_had_is_refused_at_the_first_call(
    monkeypatch: pytest.MonkeyPatch, wanted: str
) -> None:
    facts = {"cpu_isas": ["baseline", "avx2", "avx512"], "cpu_isa_in_use": "avx2", "why_no_cuda": "none was asked for"}
    monkeypatch.setattr(dispatch, "EXTENSION", Extension(facts=facts, unavailable_reason=None))
    monkeypatch.setattr(dispatch, "requested_cpu_isa", wanted)
    with pytest.raises(InputError, match=f"^PYTBPTT_CPU_ISA: found '{wanted}', expected one of baseline, avx2$"):
        call()
    with ops.backend("reference"):
        call()


@pytest.mark.skipif(dispatch.EXTENSION.facts is None, reason="no compiled extension, so nothing to choose")
def test_the_instruction_set_in_use_may_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "requested_cpu_isa", dispatch.EXTENSION.facts["cpu_isa_in_use"])
    call()


def test_backend_fused_without_an_extension_is_a_failure_that_programs_say_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatch, "EXTENSION", Extension(facts=None, unavailable_reason="no compiler"))
    reason = "lstm: the fused op cannot be used: pytbptt has no compiled extension: no compiler"
    with ops.backend("fused"), pytest.raises(RunError, match=f"^{reason}$"):
        call()


BUILT = {
    "cpu_isas": ["baseline"],
    "cpu_isa_in_use": "baseline",
    "why_no_cuda": None,
    "cuda_architectures": "8.0+PTX;9.0a",
}
WITHOUT_CUDA = BUILT | {"why_no_cuda": "no CUDA toolkit was found"}


@pytest.fixture
def serves(monkeypatch: pytest.MonkeyPatch):
    """Whether an op is fused, and what warnings that gave, for a tensor that needs no device: of an extension with
    these facts, on a GPU of this compute capability."""
    monkeypatch.setattr(dispatch, "already_warned", set())

    def ask(facts, device="cuda", dtype=torch.float32, op="rel_attention", size=64, capability=(9, 0)):
        monkeypatch.setattr(dispatch, "EXTENSION", Extension(facts=facts, unavailable_reason=None))
        properties = types.SimpleNamespace(major=capability[0], minor=capability[1], name="Some GPU")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        with FakeTensorMode(), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            fused = dispatch.uses_fused(op, torch.empty(2, 3, 4, size, device=device, dtype=dtype))
        return fused, [str(warning.message) for warning in said]

    return ask


def test_a_gpu_without_kernels_has_been_said_on_import(serves) -> None:
    assert serves(WITHOUT_CUDA) == (False, [])
    with ops.backend("fused"), pytest.raises(RunError, match="no CUDA kernels were built: no CUDA toolkit was found"):
        serves(WITHOUT_CUDA)


@pytest.mark.parametrize(
    ("architectures", "capabilities"),
    [
        ("8.0+PTX;8.6;9.0a", ["8.0", "8.6", "8.9", "9.0", "10.0", "10.3", "12.0"]),
        ("8.6", ["8.6", "8.9"]),
        ("9.0a", ["9.0"]),
        ("9.0a+PTX 8.0", ["8.0", "8.6", "8.9", "9.0"]),
        ("10.0f", ["10.0", "10.3"]),
        ("Ampere", ["8.0", "8.6", "8.9", "9.0", "10.0", "10.3", "12.0"]),  # CUDA says
    ],
)
def test_gpus_that_run_what_was_compiled(serves, architectures, capabilities) -> None:
    facts = BUILT | {"cuda_architectures": architectures}
    for capability in ("8.0", "8.6", "8.9", "9.0", "10.0", "10.3", "12.0"):
        major, minor = map(int, capability.split("."))
        fused, said = serves(facts, capability=(major, minor))
        assert fused == (capability in capabilities), capability
        if said:
            found = f"CUDA kernels were built for {architectures}, found Some GPU of {capability}; to build again: pip"
            assert found in said[0]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"capability": (7, 5)}, "CUDA kernels need compute capability 8.0 or more, found Some GPU of 7.5"),
        ({"dtype": torch.float64}, "no kernels are written for float64 on cuda, only for float32, bfloat16, float16"),
        ({"size": 129}, "CUDA kernels support head sizes up to 128, found 129"),
        ({"device": "xpu"}, "no kernels are written for device type xpu, only for cpu and cuda"),
    ],
)
def test_whatever_kernels_do_not_serve_is_said_once(serves, changes, reason) -> None:
    fused, said = serves(BUILT, **changes)
    assert (fused, len(said)) == (False, 1)
    assert said[0].endswith(reason)
    assert serves(BUILT, **changes) == (False, [])
    with ops.backend("reference"):
        assert serves(BUILT, **changes) == (False, [])
    with ops.backend("fused"), pytest.raises(RunError, match=reason):
        serves(BUILT, **changes)


@pytest.mark.skipif(dispatch.EXTENSION.facts is None, reason="importing pytbptt without an extension has warned")
def test_transforms_are_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.skipif(dispatch.EXTENSION.facts is None, reason="no compiled extension, so ONNX meets no op of its own")
def test_the_reference_is_what_is_exported_to_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with (
        ops.backend("fused"),
        pytest.raises(RunError, match=r"^lstm: the fused op cannot be used: ONNX has no such operator$"),
    ):
        call()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call()


def test_overlapping_threads_choose_for_themselves_and_take_back_their_own() -> None:
    entered, left = threading.Event(), threading.Event()
    found: list[str] = []

    def first() -> None:
        with ops.backend("reference"):
            entered.set()
            assert left.wait(60)
            found.append(dispatch.chosen_backend())

    def second() -> None:
        assert entered.wait(60)
        with ops.backend("fused"):
            left.set()
            one.join()
            found.append(dispatch.chosen_backend())
            with ops.backend("auto"):
                found.append(dispatch.chosen_backend())

    one, other = threading.Thread(target=first), threading.Thread(target=second)
    before = dispatch.chosen_backend()
    one.start()
    other.start()
    other.join()
    assert found == ["reference", "fused", "auto"]
    assert dispatch.chosen_backend() == before


def test_a_thread_that_chose_nothing_goes_by_who_started_it() -> None:
    """Autograd's threads, in which a checkpointed forward pass runs again."""
    found: list[str] = []
    with ops.backend("reference"):
        thread = threading.Thread(target=lambda: found.append(dispatch.chosen_backend()))
        thread.start()
        thread.join()
    assert found == ["reference"]


def test_a_compiled_call_follows_the_choice_of_its_thread() -> None:
    compiled = torch.compile(lambda: dispatch.chosen_backend() == "reference", backend="eager", fullgraph=True)
    found = [compiled()]

    def other() -> None:
        with ops.backend("auto"):
            found.append(compiled())

    with ops.backend("reference"):
        found.append(compiled())
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        found.append(compiled())
    found.append(compiled())
    outside = dispatch.chosen_backend() == "reference"
    assert found == [outside, True, False, True, outside]


def test_where_kernels_serve_or_nothing_is_computed_nothing_is_said(serves) -> None:
    assert serves(BUILT) == (True, [])
    assert serves(BUILT, op="lstm", size=129) == (True, [])
    assert serves(BUILT, device="meta") == (False, [])


@pytest.mark.skipif(dispatch.EXTENSION.facts is None, reason="importing pytbptt without an extension has warned")
def test_torch_compile_warns_while_it_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "already_warned", set())
    monkeypatch.setitem(dispatch._DTYPES, "cpu", ())
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    with pytest.warns(RuntimeWarning, match="lstm: falling back to the reference .* for float32 on cpu"):
        compiled()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled()


def test_no_memory_on_a_gpu_is_torchs_own_error() -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("CUDA out of memory. Found no room on cuda:0 for a tensor of shape [8, 8]")

    with pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory\. Found no room on cuda:0"):
        dispatch.call_op(fail, 1, 2)


@pytest.mark.skipif(dispatch.EXTENSION.facts is None, reason="no compiled extension, so nothing that allocates")
def test_no_memory_on_a_cpu_is_said() -> None:
    inputs = (
        torch.zeros(1, 1, 1).expand(2**40, 2**10, 4),
        torch.zeros(4, 1),
        *torch.zeros(2, 1, 1).expand(2, 2**10, 1),
    )
    with ops.backend("fused"), torch.no_grad(), pytest.raises(RuntimeError, match="can't allocate memory"):
        ops.lstm(*inputs)


def test_a_compiled_call_follows_the_setting_of_tf32() -> None:
    compiled = torch.compile(lambda: dispatch.cuda_rounds_to_tf32(), backend="eager", fullgraph=True)
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for setting in ("ieee", "tf32", "ieee"):
            matmul.fp32_precision = setting
            assert compiled() == (setting == "tf32")
    finally:
        matmul.fp32_precision = before
