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
    times = {"eager": {"milliseconds": 10.0}, "sdpa": {"milliseconds": 3.0}, gpu_tables.BOUND: {"milliseconds": 0.6}}
    times |= {"flex_attention": {"milliseconds": 5.0}, "fused, padded": {"milliseconds": 1.0}}
    results = [
        {"size": "enwik8", "dtype": "bfloat16", "mode": "forward", "measured": {"fused": ours, **times}},
        {
            "size": "enwik8",
            "dtype": "bfloat16",
            "mode": "forward+backward",
            "floor_milliseconds": 0.5,
            "measured": {"fused": ours, **times},
        },
        {
            "size": "enwik8",
            "dtype": "float16",
            "mode": "forward+backward",
            "measured": {"fused": {"cannot": "Error: so"}},
        },
    ]
    machine = {"gpu": "NVIDIA H200", "torch": "2.13.0", "cuda": "13.0", "driver": "580", "commit": "0123456789"}
    contents = {"kind": "gpu", "command": "python -m benchmarks.gpu", "date": "2026-01-01", "machine": machine}
    (tmp_path / "new.json").write_text(json.dumps(contents | {"results": results}))
    layer = {"T,B,H": (35, 20, 650), "layers": 1, "mode": "forward+backward", "floor_milliseconds": 0.1}
    measured = {"measured": {"fused": ours, "cudnn": {"milliseconds": 2.8}, "fused, 3% resets": {"milliseconds": 2.06}}}
    lstm = [
        layer | measured | {"dtype": "bfloat16", "cudnn_persists": False},
        layer | measured | {"dtype": "float16", "cudnn_persists": True},
        measured | {"recipe": "awd-lstm-ptb", "dtype": "bfloat16", "mode": "update"},
    ]
    (tmp_path / "lstm.json").write_text(json.dumps(contents | {"kind": "gpu_lstm", "results": lstm}))
    for _ in range(2):  # the second time in the place of the first
        gpu_tables.write(["new.json", "lstm.json"], tmp_path)
        pages = [(tmp_path / page).read_text() for page in ("README.md", "benchmarks/README.md")]
        short, whole = (page.partition(gpu_tables.BEGIN)[2].partition(gpu_tables.END)[0] for page in pages)
        assert (
            "| enwik8 | forward+backward | bfloat16 | 2.000 | 0.500 | 5.00 (goal 5: passed) | 2.50 (goal 2: passed) "
            "| 1.50 |" in short
        )
        assert len(re.findall(r"^\| enwik8 \|", short, re.MULTILINE)) == 1
        assert len(re.findall(r"^\| enwik8 \|", whole, re.MULTILINE)) == 3
        assert "0.30 (goal 0.55: missed) | 3 |" in short
        assert (
            "| 35, 20, 650 | 1 | forward+backward | bfloat16 | 2.000 | 0.100 | 1.40 (goal 1.5: missed) | no | 1.03 |"
            in short
        )
        assert "| 1 | forward+backward | float16 | 2.000 | 0.100 | 1.40 (goal 0.9: passed) | yes |" in whole
        assert "| awd-lstm-ptb |  | update | bfloat16 | 2.000 |  | 1.40 |" in short
        assert "Error: so" in whole
        outside = [text.partition(gpu_tables.BEGIN)[::2] for text in (before, pages[0])]
        assert outside[0][0] == outside[1][0]
        assert outside[0][1].partition(gpu_tables.END)[2] == outside[1][1].partition(gpu_tables.END)[2]
