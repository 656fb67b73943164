"""benchmarks.report: the documentation's tables match the results, and malformed files give one-line errors."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import pictures, record, report
from pytbptt.errors import InputError

MACHINE = {"cpu": "a CPU", "threads": 2, "instruction_set": {"torch": "AVX2", "pytbptt": "avx2"}}
MACHINE |= {"torch": "2.13.0", "python": "3.11", "commit": "0123456789"}
GROUP = {"op": "rel_attention", "size": "enwik8", "shape": {"B": 1, "T": 4, "M": 8, "H": 2, "D": 4}}
GROUP |= {"device": "cuda", "dtype": "bfloat16", "mode": "backward"}


def make_row(name: str, milliseconds: float, **others: Any) -> dict[str, Any]:
    return GROUP | {"name": name, "milliseconds": milliseconds, "peak_bytes": 6 * 2**20, "result_bytes": 2**20} | others


RESULTS = [
    make_row("fused", 2.0, floor_milliseconds=0.5, launched_milliseconds=3.0),
    make_row("fused_with_resets", 1.0),
    make_row("eager", 10.0),
    make_row("sdpa", 3.0),
    make_row("flash_without_positions", 0.6, bound=True),
    GROUP | {"name": "flex_attention", "cannot": "Error: so"},
]


def contents(results: Any, kind: str = "benchmarks") -> dict[str, Any]:
    return {"kind": kind, "command": "pytest", "date": "2026-01-01", "machine": MACHINE, "results": results}


@pytest.mark.parametrize("page", report.PAGES)
def test_documentation_tables_are_up_to_date(page: str) -> None:
    text = (record.ROOT / page).read_text()
    assert report.MARKER.search(text)
    assert report.update_tables(text) == text, "python -m benchmarks.report updates the tables"


def test_table_compares_with_the_fastest_other_implementation() -> None:
    (table,) = report.tables(RESULTS)
    head, _, cells, _, reason = table.splitlines()
    columns = dict(zip(head.split(" | "), cells.split(" | "), strict=True))
    assert columns["fused, ms"] == "2"
    assert columns["launched"] == "3"
    assert columns["floor"] == "0.5"
    assert columns["eager"] == "5.00"
    assert columns["best other"] == "1.50"  # excludes fused_with_resets and bounds
    assert columns["memory, MiB"] == "6 (6.0)"
    goals = "eager ≥ 5: passed (5.00); flash without positions ≥ 0.55: missed (0.30); resets ≤ 1.05: passed (0.50)"
    assert columns["goals |"] == f"{goals} |"
    assert "FlexAttention" not in head
    assert reason == "- FlexAttention, with backward (enwik8): Error: so"


def test_absolute_times_without_fused_result() -> None:
    (table,) = report.tables([GROUP | {"name": "fused", "cannot": "Error: no"}, make_row("eager", 10.0)])
    assert "| 10 ms |" in table
    assert "- fused, with backward (enwik8): Error: no" in table


def test_goals_of_lstm_depend_on_cudnn_persists() -> None:
    group = GROUP | {"op": "lstm", "size": "wide-1024", "shape": {"T": 150, "B": 64, "I": 1024, "H": 1024, "layers": 1}}
    for persists, verdict in ((True, "≥ 0.9: passed (1.00)"), (False, "≥ 1.5: missed (1.00)")):
        rows = [group | {"name": name, "milliseconds": 1.0} for name in ("fused", "torch_lstm")]
        (table,) = report.tables([rows[0], rows[1] | {"cudnn_persists": persists}])
        assert verdict in table


def test_report_markers_filter_and_are_idempotent(tmp_path: Path) -> None:
    path = tmp_path / "new.json"
    path.write_text(json.dumps(contents(RESULTS + [result | {"mode": "forward"} for result in RESULTS])))
    page = f"before\n<!-- report: {path} mode=backward -->\nold\n<!-- end of report -->\nafter\n"
    updated = report.update_tables(page)
    assert updated.startswith("before\n<!-- report: ")
    assert updated.endswith("<!-- end of report -->\nafter\n")
    assert "old" not in updated
    assert updated.count("| enwik8 (") == 1
    assert "2026-01-01, a CPU, 2 threads, AVX2" in updated
    assert report.update_tables(updated) == updated


@pytest.mark.parametrize(
    ("malformed", "message"),
    [
        (contents([{"op": "rel_attention"}]), "found no 'size'"),
        (contents([3]), "found no list of results"),
        (contents({}), "found no list of results"),
        (contents([]), "found no list of results"),
        ({**contents(RESULTS), "machine": None}, "found a value of another type"),
        (contents([make_row("fused", 1.0) | {"shape": 3}]), "found a value of another type"),
        (contents([{"case": "training"}], "peers"), "found no 'tokens_per_second'"),
        (contents([{"case": "training"}], "end_to_end"), "found no 'implementations'"),
        (contents(RESULTS, "gpu"), "found results of kind gpu, expected benchmarks or peers or end_to_end"),
        ([], "found results of kind None"),
    ],
)
def test_invalid_results_file_raises_one_line(tmp_path: Path, malformed: Any, message: str) -> None:
    path = tmp_path / "malformed.json"
    path.write_text(json.dumps(malformed))
    with pytest.raises(InputError, match=message) as error:
        report.render(str(path), {})
    assert str(error.value).startswith(str(path))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("picture", report.PICTURES)
def test_plots_are_drawn_from_the_results(tmp_path: Path, picture: str) -> None:
    draw, paths = report.PICTURES[picture]
    pictures.draw(draw, paths, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_plot_of_a_malformed_file_raises_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "malformed.json").write_text(json.dumps(contents([{"case": "training"}], "peers")))
    with pytest.raises(InputError, match="found no") as error:
        pictures.draw(pictures.draw_end_to_end, (str(tmp_path / "malformed.json"),), tmp_path / "picture.png")
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "picture.png").exists()
