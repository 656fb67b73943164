"""Fuzzing: reading any file returns data or raises a one-line InputError, and runs no code.

Pickles are generated from opcodes with hostile arguments, bare and in torch's zip and legacy files. Others are valid
files with bytes changed, cut and spliced. PYTBPTT_FUZZ is the number of examples of each kind.
"""

import io
import os
import pickle
import resource
import struct
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings, strategies as st

from pytbptt.conversion import safe_unpickle
from pytbptt.conversion.source_checkpoint import read
from pytbptt.errors import InputError
from tests.common.conversion_cases import make_awd_lstm

EXAMPLES = int(os.environ.get("PYTBPTT_FUZZ", "150"))
FUZZ = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="PYTBPTT_FUZZ" not in os.environ,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

GLOBALS = [
    ("os", "system"),
    ("posix", "system"),
    ("builtins", "eval"),
    ("builtins", "exec"),
    ("builtins", "getattr"),
    ("builtins", "__import__"),
    ("builtins", "open"),
    ("builtins", "bytearray"),
    ("subprocess", "Popen"),
    ("runpy", "run_path"),
    ("importlib", "import_module"),
    ("torch", "load"),
    ("torch.storage", "_load_from_bytes"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch._utils", "_rebuild_parameter.__globals__"),
    ("torch._utils", "torch.load"),
    ("collections", "OrderedDict"),
    ("collections", "OrderedDict.fromkeys"),
    ("builtins", "set"),
    ("torch", "FloatStorage"),
    ("antigravity", "x"),
    ("nonexistent_module", "run"),
    ("argparse", "Namespace"),
]
LENGTHS = [0, 1, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1]


def string_opcode(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def int_opcode(value: int) -> bytes:
    return pickle.dumps(value, protocol=2)[2:-1]


def with_wrong_length(opcode: bytes, layout: str) -> st.SearchStrategy[bytes]:
    """An opcode with a length that its data do not have."""
    max_length = 256 ** struct.calcsize(layout) - 1
    return st.builds(
        lambda length, data: opcode + struct.pack(layout, length & max_length) + data,
        st.sampled_from(LENGTHS),
        st.binary(max_size=8),
    )


global_names = st.sampled_from(GLOBALS)
VALUES = st.one_of(
    st.sampled_from([b"N", b"\x88", b"\x89", b"]", b"}", b")", b"\x8f", b"K\x05", b"G@\x00\x00\x00\x00\x00\x00\x00"]),
    st.sampled_from(LENGTHS).map(int_opcode),
    st.sampled_from(["touch executed", "weight", "encoder.weight", "/etc/passwd", "storage", "cpu", "0"]).map(
        string_opcode
    ),
    global_names.map(lambda name: f"c{name[0]}\n{name[1]}\n".encode()),
    global_names.map(lambda name: string_opcode(name[0]) + string_opcode(name[1]) + b"\x93"),
    st.binary(max_size=6).map(lambda data: b"C" + bytes([len(data)]) + data),
    st.integers(0, 255).map(lambda index: b"h" + bytes([index])),
)
OPCODES = st.one_of(
    st.sampled_from(
        [b"(", b"R", b"b", b"a", b"e", b"s", b"u", b"t", b"l", b"d", b"o", b"0", b"1", b"2", b"Q", b"\x81"]
    ),
    st.sampled_from([b"\x85", b"\x86", b"\x87", b"\x90", b"\x91", b"\x92", b"\x94", b"\x97", b"\x98", b"."]),
    global_names.map(lambda name: f"(i{name[0]}\n{name[1]}\n".encode()),
    st.sampled_from(["0", "-1", "99999999999", "x" * 30]).map(lambda line: b"I" + line.encode() + b"\n"),
    st.sampled_from(
        [b"P0\n", b"\x80\x05", b"\x80\xff", b"p99999999999\n", b"g7\n", b"S'x'\n", b"L" + b"9" * 9000 + b"L\n"]
    ),
    st.sampled_from([b"\x82\x01", b"\x83\x01\x00", b"\x84\x01\x00\x00\x00", b"r\xff\xff\xff\x7f", b"q\xff"]),
    with_wrong_length(b"\x95", "<Q"),
    with_wrong_length(b"B", "<I"),
    with_wrong_length(b"\x8e", "<Q"),
    with_wrong_length(b"\x8d", "<Q"),
    with_wrong_length(b"X", "<I"),
    with_wrong_length(b"T", "<I"),
    with_wrong_length(b"\x96", "<Q"),
    with_wrong_length(b"\x8b", "<I"),
    with_wrong_length(b"r", "<I"),
)
CALL = st.builds(  # random opcodes rarely form a call with arguments
    lambda name, arguments, opcodes: name + b"(" + b"".join(arguments) + b"t" + opcodes,
    global_names.map(lambda name: f"c{name[0]}\n{name[1]}\n".encode()),
    st.lists(VALUES, max_size=4),
    st.sampled_from([b"R", b"\x81", b"R}b", b"R(K\x01Nub", b"R]a", b"RQ", b"\x81N\x86b"]),
)
PICKLES = st.builds(
    lambda start, parts, end: start + b"".join(parts) + end,
    st.sampled_from([b"", b"\x80\x02", b"\x80\x04", b"(", b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f"]),
    st.lists(st.one_of(VALUES, OPCODES, CALL), max_size=14),
    st.sampled_from([b".", b"", b"t.", b"R."]),
)


def as_zip(data: bytes) -> bytes:
    """A torch.save file with this pickle and a storage of four floats."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("file/data.pkl", data)
        archive.writestr("file/byteorder", "little")
        archive.writestr("file/data/0", b"\0" * 16)
        archive.writestr("file/version", "3\n")
    return file.getvalue()


def as_legacy(data: bytes) -> bytes:
    """A torch.save file with this pickle, in the format before zip files."""
    header = [
        safe_unpickle.LEGACY_MAGIC,
        1001,
        {"protocol_version": 1001, "little_endian": True, "type_sizes": {"long": 4}},
    ]
    return b"".join(pickle.dumps(part, protocol=2) for part in header) + data + pickle.dumps([], protocol=2)


def valid_file(zipped: bool) -> bytes:
    file = io.BytesIO()
    torch.save({"state_dict": make_awd_lstm().state_dict(), "epoch": 3}, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


VALID_FILES = [valid_file(True), valid_file(False), pickle.dumps({"idx2sym": ["<eos>", "a"], "counter": {"a": 1}})]


@st.composite
def corrupted(draw: Any) -> bytes:
    """A valid file with bytes changed, removed, duplicated elsewhere or inserted, or its end missing."""
    data = bytearray(draw(st.sampled_from(VALID_FILES)))
    offsets = st.one_of(st.integers(0, min(600, len(data) - 1)), st.integers(0, len(data) - 1))
    for _ in range(draw(st.integers(1, 4))):
        offset, other_offset = draw(offsets), draw(offsets)
        match draw(st.sampled_from(["byte", "cut", "splice", "end", "opcode"])):
            case "byte":
                data[min(offset, len(data) - 1)] = draw(st.integers(0, 255))
            case "cut":
                del data[offset : offset + draw(st.integers(1, 40))]
            case "splice":
                data[offset:offset] = data[other_offset : other_offset + 20]
            case "end":
                del data[max(1, other_offset) :]
            case "opcode":
                data[offset:offset] = draw(st.one_of(OPCODES, CALL))
        data = data or bytearray(b".")
    return bytes(data)


audit_log: list[str] | None = None
"""The forbidden events so far, while they are recorded."""
FORBIDDEN = (
    "os.",
    "subprocess.",
    "socket.",
    "shutil.",
    "ctypes.",
    "import",
    "exec",
    "compile",
    "marshal.",
    "webbrowser.",
)


def _audit_hook(event: str, arguments: tuple[Any, ...]) -> None:
    if audit_log is None:
        return
    if event.startswith(FORBIDDEN) or (event == "open" and str(arguments[1] or "r").strip("rb")):
        audit_log.append(f"{event} {arguments!r:.80}")


sys.addaudithook(_audit_hook)


@contextmanager
def forbid_side_effects() -> Iterator[None]:
    """Fails if the block runs a program, imports, compiles, connects or opens a file for writing."""
    global audit_log
    audit_log = []
    try:
        yield
    finally:
        events, audit_log = audit_log, None
    assert not events


@pytest.fixture(autouse=True, scope="module")
def _preload_imports() -> None:
    """Imports what reading itself imports, such as the codecs of pickled strings."""
    assert b"\\u0041".decode("raw-unicode-escape") == b"A".decode("latin-1") == b"A".decode("utf-8", "surrogatepass")
    for data in VALID_FILES:
        file = Path(os.environ.get("TMPDIR", "/tmp")) / f"pytbptt-preload-{os.getpid()}"
        file.write_bytes(data)
        for _ in range(2):
            with suppress(InputError):
                read(file, {})
        file.unlink()


MAX_RSS_GROWTH = 1 << 20
"""In KiB, over all examples."""


def assert_harmless(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    errors = []
    with forbid_side_effects():
        for read_file in (safe_unpickle.read, lambda path: read(path, {})):
            try:
                read_file(path)
            except InputError as error:
                errors.append(str(error))
    assert not any("\n" in error for error in errors)
    assert not (path.parent / "executed").exists()


def check(path: Path, data: bytes) -> None:
    assert_harmless(path, data)
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - INITIAL_RSS
    assert growth < MAX_RSS_GROWTH * (1024 if sys.platform == "darwin" else 1)


INITIAL_RSS = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.parametrize("file_format", ["pickle", "zip", "legacy"])
def test_fuzzed_pickles_have_no_side_effects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_format: str) -> None:
    monkeypatch.chdir(tmp_path)
    wrap = {"pickle": lambda data: data, "zip": as_zip, "legacy": as_legacy}[file_format]

    @FUZZ
    @given(PICKLES)
    def fuzz(data: bytes) -> None:
        check(tmp_path / "file", wrap(data))

    fuzz()


def test_corrupted_files_have_no_side_effects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    @FUZZ
    @given(corrupted())
    def fuzz(data: bytes) -> None:
        check(tmp_path / "file", data)

    fuzz()


def test_audit_hook_detects_side_effects(tmp_path: Path) -> None:
    for side_effect in (
        lambda: os.system("true"),
        lambda: eval("1"),
        lambda: (tmp_path / "written").write_text(""),
        lambda: __import__("nonexistent_module"),
    ):
        with pytest.raises((AssertionError, ImportError)), forbid_side_effects():
            side_effect()


def test_huge_memo_index_allocates_little(tmp_path: Path) -> None:
    """The unpickler in C allocates twice as many entries as the highest index, here in files of a few bytes."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for data in (b"K\x01r\xff\xff\xff\x1f.", b"K\x01p999999999\n."):
        (tmp_path / "file").write_bytes(data)
        assert safe_unpickle.read(tmp_path / "file").value == 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MAX_RSS_GROWTH
