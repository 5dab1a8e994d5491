"""benchmarks/bench.py llama, in its short form."""

import json
import math

import bench


def test_losses_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("RESULTS", str(tmp_path))
    assert bench.main(["llama", "--quick", "--device=cpu", "--threads=1"]) == 0
    found = json.loads((tmp_path / "quick-llama.json").read_text())
    assert found["same"]
    for rows in found["results"].values():
        assert set(rows) == {"flash_attention_2", "sdpa", "eager"}
        assert all(row["seconds"] > 0 and abs(row["loss"] - math.log(2048)) < 1 for row in rows.values())
    assert "Losses: the same." in (tmp_path / "quick-llama.md").read_text()
