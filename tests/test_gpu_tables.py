import json
import re
from pathlib import Path

from benchmarks import gpu_tables, record


def test_tables_take_the_place_of_what_stood_there(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(record, "ROOT", tmp_path)
    (tmp_path / "benchmarks").mkdir()
    for page in ("README.md", "benchmarks/README.md"):
        (tmp_path / page).write_text((Path(__file__).resolve().parents[1] / page).read_text())
    before = (tmp_path / "README.md").read_text()
    ours = {"milliseconds": 2.0, "peak_bytes": 3 * 2**20}
    times = {"eager": {"milliseconds": 10.0}, "sdpa": {"milliseconds": 5.0}, gpu_tables.BOUND: {"milliseconds": 1.0}}
    results = [
        {"size": "seed", "dtype": "bfloat16", "mode": "forward", "measured": {"fused": ours, **times}},
        {"size": "seed", "dtype": "bfloat16", "mode": "forward+backward", "measured": {"fused": ours, **times}},
        {
            "size": "seed",
            "dtype": "float16",
            "mode": "forward+backward",
            "measured": {"fused": {"cannot": "Error: so"}},
        },
    ]
    machine = {"gpu": "NVIDIA H200", "torch": "2.13.0", "cuda": "13.0", "commit": "0123456789"}
    contents = {"kind": "gpu", "command": "python -m benchmarks.gpu", "date": "2026-01-01", "machine": machine}
    (tmp_path / "new.json").write_text(json.dumps(contents | {"results": results}))
    for _ in range(2):  # the second time in the place of the first
        gpu_tables.write("new.json", tmp_path)
        short, whole = ((tmp_path / page).read_text() for page in ("README.md", "benchmarks/README.md"))
        assert "| seed | forward+backward | bfloat16 | 2.000 | 5.00 | 2.50 | 0.50 | 3 |" in short
        assert len(re.findall(r"^\| seed \|", short, re.MULTILINE)) == 1
        assert len(re.findall(r"^\| seed \|", whole, re.MULTILINE)) == 3
        assert "Error: so" in whole
        outside = [text.partition(gpu_tables.BEGIN)[::2] for text in (before, short)]
        assert outside[0][0] == outside[1][0]
        assert outside[0][1].partition(gpu_tables.END)[2] == outside[1][1].partition(gpu_tables.END)[2]
