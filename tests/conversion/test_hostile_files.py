"""Files made to do harm: whatever their opcodes say, reading one ends in data or in one line, and nothing runs.

Pickles are drawn from a corpus of opcodes with hostile arguments, alone and in torch's zip and legacy files; others are
good files with bytes changed, cut and spliced. PYTBPTT_FUZZ gives the number of examples of each kind.
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
from pytbptt.conversion.original import read
from pytbptt.errors import InputError
from tests.conversion.test_awd_lstm import original

EXAMPLES = int(os.environ.get("PYTBPTT_FUZZ", "150"))
FUZZ = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="PYTBPTT_FUZZ" not in os.environ,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

NAMES = [
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
    ("this_module_is_planted", "run"),
    ("argparse", "Namespace"),
]
LARGE = [0, 1, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1]


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    return pickle.dumps(value, protocol=2)[2:-1]


def of_length(opcode: bytes, layout: str) -> st.SearchStrategy[bytes]:
    """An opcode that says how much follows, and does not tell the truth."""
    most = 256 ** struct.calcsize(layout) - 1
    return st.builds(
        lambda length, rest: opcode + struct.pack(layout, length & most) + rest,
        st.sampled_from(LARGE),
        st.binary(max_size=8),
    )


named = st.sampled_from(NAMES)
VALUES = st.one_of(
    st.sampled_from([b"N", b"\x88", b"\x89", b"]", b"}", b")", b"\x8f", b"K\x05", b"G@\x00\x00\x00\x00\x00\x00\x00"]),
    st.sampled_from(LARGE).map(number),
    st.sampled_from(["touch executed", "weight", "encoder.weight", "/etc/passwd", "storage", "cpu", "0"]).map(text),
    named.map(lambda name: f"c{name[0]}\n{name[1]}\n".encode()),
    named.map(lambda name: text(name[0]) + text(name[1]) + b"\x93"),
    st.binary(max_size=6).map(lambda data: b"C" + bytes([len(data)]) + data),
    st.integers(0, 255).map(lambda place: b"h" + bytes([place])),
)
ACTIONS = st.one_of(
    st.sampled_from(
        [b"(", b"R", b"b", b"a", b"e", b"s", b"u", b"t", b"l", b"d", b"o", b"0", b"1", b"2", b"Q", b"\x81"]
    ),
    st.sampled_from([b"\x85", b"\x86", b"\x87", b"\x90", b"\x91", b"\x92", b"\x94", b"\x97", b"\x98", b"."]),
    named.map(lambda name: f"(i{name[0]}\n{name[1]}\n".encode()),
    st.sampled_from(["0", "-1", "99999999999", "x" * 30]).map(lambda line: b"I" + line.encode() + b"\n"),
    st.sampled_from(
        [b"P0\n", b"\x80\x05", b"\x80\xff", b"p99999999999\n", b"g7\n", b"S'x'\n", b"L" + b"9" * 9000 + b"L\n"]
    ),
    st.sampled_from([b"\x82\x01", b"\x83\x01\x00", b"\x84\x01\x00\x00\x00", b"r\xff\xff\xff\x7f", b"q\xff"]),
    of_length(b"\x95", "<Q"),
    of_length(b"B", "<I"),
    of_length(b"\x8e", "<Q"),
    of_length(b"\x8d", "<Q"),
    of_length(b"X", "<I"),
    of_length(b"T", "<I"),
    of_length(b"\x96", "<Q"),
    of_length(b"\x8b", "<I"),
    of_length(b"r", "<I"),
)
CALL = st.builds(  # of something, with arguments: a stream of opcodes rarely gets so far by chance
    lambda name, arguments, action: name + b"(" + b"".join(arguments) + b"t" + action,
    named.map(lambda name: f"c{name[0]}\n{name[1]}\n".encode()),
    st.lists(VALUES, max_size=4),
    st.sampled_from([b"R", b"\x81", b"R}b", b"R(K\x01Nub", b"R]a", b"RQ", b"\x81N\x86b"]),
)
PICKLES = st.builds(
    lambda start, parts, end: start + b"".join(parts) + end,
    st.sampled_from([b"", b"\x80\x02", b"\x80\x04", b"(", b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f"]),
    st.lists(st.one_of(VALUES, ACTIONS, CALL), max_size=14),
    st.sampled_from([b".", b"", b"t.", b"R."]),
)


def in_zip(data: bytes) -> bytes:
    """As the contents of a file of torch.save's, beside a storage of four numbers."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("file/data.pkl", data)
        archive.writestr("file/byteorder", "little")
        archive.writestr("file/data/0", b"\0" * 16)
        archive.writestr("file/version", "3\n")
    return file.getvalue()


def in_legacy(data: bytes) -> bytes:
    """As the contents of a file of torch.save's before it wrote zip files."""
    header = [
        safe_unpickle.LEGACY_MAGIC,
        1001,
        {"protocol_version": 1001, "little_endian": True, "type_sizes": {"long": 4}},
    ]
    return b"".join(pickle.dumps(part, protocol=2) for part in header) + data + pickle.dumps([], protocol=2)


def good(zipped: bool) -> bytes:
    file = io.BytesIO()
    torch.save({"state_dict": original().state_dict(), "epoch": 3}, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


GOOD = [good(True), good(False), pickle.dumps({"idx2sym": ["<eos>", "a"], "counter": {"a": 1}})]


@st.composite
def damaged(draw: Any) -> bytes:
    """A good file with some bytes changed, a piece cut out or put in elsewhere, or its end missing."""
    data = bytearray(draw(st.sampled_from(GOOD)))
    place = st.one_of(st.integers(0, min(600, len(data) - 1)), st.integers(0, len(data) - 1))
    for _ in range(draw(st.integers(1, 4))):
        here, there = draw(place), draw(place)
        match draw(st.sampled_from(["byte", "cut", "splice", "end", "opcode"])):
            case "byte":
                data[min(here, len(data) - 1)] = draw(st.integers(0, 255))
            case "cut":
                del data[here : here + draw(st.integers(1, 40))]
            case "splice":
                data[here:here] = data[there : there + 20]
            case "end":
                del data[max(1, there) :]
            case "opcode":
                data[here:here] = draw(st.one_of(ACTIONS, CALL))
        data = data or bytearray(b".")
    return bytes(data)


watching: list[str] | None = None
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


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if watching is None:
        return
    if event.startswith(FORBIDDEN) or (event == "open" and str(arguments[1] or "r").strip("rb")):
        watching.append(f"{event} {arguments!r:.80}")


sys.addaudithook(_watch)


@contextmanager
def watched() -> Iterator[None]:
    """Nothing in the block may run a program, import, compile, connect, or open a file to write."""
    global watching
    watching = []
    try:
        yield
    finally:
        seen, watching = watching, None
    assert not seen


@pytest.fixture(autouse=True, scope="module")
def _warm() -> None:
    """What reading itself imports is imported, the codecs of pickles' strings among it."""
    assert b"\\u0041".decode("raw-unicode-escape") == b"A".decode("latin-1") == b"A".decode("utf-8", "surrogatepass")
    for data in GOOD:
        file = Path(os.environ.get("TMPDIR", "/tmp")) / f"pytbptt-warm-{os.getpid()}"
        file.write_bytes(data)
        for _ in range(2):
            with suppress(InputError):
                read(file, {})
        file.unlink()


MOST_MEMORY = 1 << 20
"""In KiB, how much the process may have grown after all examples: a file of some kilobytes has no claim to more."""


def assert_harmless(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    said = []
    with watched():
        for way in (safe_unpickle.read, lambda path: read(path, {})):
            try:
                way(path)
            except InputError as blocked_globals:
                said.append(str(blocked_globals))
    assert not any("\n" in line for line in said)
    assert not (path.parent / "executed").exists()


def check(path: Path, data: bytes) -> None:
    assert_harmless(path, data)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - BEFORE
    assert grown < MOST_MEMORY * (1024 if sys.platform == "darwin" else 1)


BEFORE = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.parametrize("form", ["pickle", "zip", "legacy"])
def test_no_pickle_does_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    monkeypatch.chdir(tmp_path)
    wrap = {"pickle": lambda data: data, "zip": in_zip, "legacy": in_legacy}[form]

    @FUZZ
    @given(PICKLES)
    def fuzz(data: bytes) -> None:
        check(tmp_path / "file", wrap(data))

    fuzz()


def test_no_damage_does_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    @FUZZ
    @given(damaged())
    def fuzz(data: bytes) -> None:
        check(tmp_path / "file", data)

    fuzz()


def test_the_watch_sees_what_it_forbids(tmp_path: Path) -> None:
    for act in (
        lambda: os.system("true"),
        lambda: eval("1"),
        lambda: (tmp_path / "written").write_text(""),
        lambda: __import__("antigravity_that_is_not"),
    ):
        with pytest.raises((AssertionError, ImportError)), watched():
            act()


def test_a_memo_of_gigabytes_is_not_made(tmp_path: Path) -> None:
    """C's unpickler makes room for twice as many places as the highest number that a file of 8 bytes names."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for data in (b"K\x01r\xff\xff\xff\x1f.", b"K\x01p999999999\n."):
        (tmp_path / "file").write_bytes(data)
        assert safe_unpickle.read(tmp_path / "file").value == 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_MEMORY
