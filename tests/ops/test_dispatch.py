"""Which implementation serves a call, as the environment chooses it."""

import pytest
import torch

from pytbptt import ops
from pytbptt.errors import InputError, RunError
from pytbptt.extension import Extension
from pytbptt.ops import dispatch


def call() -> None:
    ops.lstm(torch.zeros(2, 3, 16), torch.zeros(16, 4), torch.zeros(3, 4), torch.zeros(3, 4))


@pytest.mark.parametrize("wanted", ["avx512", "AVX2", "sse"])
def test_an_instruction_set_that_cannot_be_had_is_refused_at_the_first_call(
    monkeypatch: pytest.MonkeyPatch, wanted: str
) -> None:
    facts = {"cpu_isas": ["baseline", "avx2", "avx512"], "cpu_isa_in_use": "avx2", "why_no_cuda": "none was asked for"}
    monkeypatch.setattr(dispatch, "EXTENSION", Extension(facts=facts, why_absent=None))
    monkeypatch.setattr(dispatch, "_cpu_isa", wanted)
    with pytest.raises(InputError, match=f"^PYTBPTT_CPU_ISA: found '{wanted}', expected one of baseline, avx2$"):
        call()
    with ops.backend("reference"):
        call()


@pytest.mark.skipif(dispatch.EXTENSION.facts is None, reason="no compiled extension, so nothing to choose")
def test_the_instruction_set_in_use_may_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_cpu_isa", dispatch.EXTENSION.facts["cpu_isa_in_use"])
    call()


def test_backend_fused_without_an_extension_is_a_failure_that_programs_say_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatch, "EXTENSION", Extension(facts=None, why_absent="no compiler"))
    reason = "lstm: the fused op cannot serve: pytbptt has no compiled extension: no compiler"
    with ops.backend("fused"), pytest.raises(RunError, match=f"^{reason}$"):
        call()
