"""benchmarks.plot: what it draws, and what it says to a file that is not of its kind."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import record
from benchmarks.plot import PlotSettings, plot
from pytbptt.errors import InputError

MACHINE = {"threads": 2, "instruction_set": {"pytbptt": "avx2"}}
SIZES = {"B": 1, "H": 8, "D": 64, "T_where_M_grows": 4, "M_where_T_grows": 8}
POINT = {"name": "fused", "T": 4, "M": 8, "median_seconds": 0.01, "memory": 3.0}
SWEEP: dict[str, Any] = {"kind": "sweep", "machine": {**MACHINE, "sizes": SIZES}, "results": [POINT]}
RATIO = {"case": "training", "ratios": {"eager": {"median": 2.0, "target": None}}}
PEERS: dict[str, Any] = {"kind": "peers", "machine": MACHINE, "results": [RATIO]}


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "ROOT", tmp_path)


def draw(tmp_path: Path, *contents: Any) -> None:
    for number, content in enumerate(contents):
        (tmp_path / f"{number}.json").write_text(json.dumps(content))
    plot(PlotSettings(tuple(f"{number}.json" for number in range(len(contents))), "picture.png"))


def test_draws_both_kinds(tmp_path: Path) -> None:
    draw(tmp_path, SWEEP, PEERS)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({**SWEEP, "machine": MACHINE}, "found no 'sizes', expected what python -m benchmarks.sweep writes"),
        ({"kind": "sweep", "results": [POINT]}, "found no 'machine', expected"),
        ({**SWEEP, "machine": None}, "found a value of another type "),
        ({**SWEEP, "results": [{"name": "fused", "T": 4, "M": 8}]}, "found no 'median_seconds', expected"),
        ({**SWEEP, "results": [{**POINT, "median_seconds": None}]}, "found a value of another type "),
        ({**SWEEP, "results": {}}, "found no list of results, expected what python -m benchmarks.sweep writes"),
        ({**SWEEP, "results": [3]}, "found no list of results, expected"),
        ({**PEERS, "results": [{"case": "training", "ratios": []}]}, "found a value of another type "),
        ({**PEERS, "results": [{"case": "training"}]}, "found no 'ratios', expected what python -m benchmarks.peers"),
        ({"kind": "gpu", "results": []}, "found results of kind gpu, expected sweep or peers"),
        ([], "found results of kind None, expected sweep or peers"),
    ],
)
def test_a_broken_or_foreign_file_is_one_line_and_no_picture(tmp_path: Path, broken: Any, message: str) -> None:
    with pytest.raises(InputError, match=r"^1\.json: ") as refused:
        draw(tmp_path, SWEEP, broken)
    assert message in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1
    assert not (tmp_path / "picture.png").exists()
