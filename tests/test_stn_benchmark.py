"""The benchmark of self-tuning steps runs in its --quick setting."""

import json
import subprocess
import sys

import pytest
from script_files import script_path


@pytest.mark.slow
def test_the_benchmark_measures_each_method_beside_the_plain_step(tmp_path):
    command = [sys.executable, str(script_path("benchmark_stn")), "--quick", "--networks=cnn",
               f"--json={tmp_path / 'measured.json'}"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "measured.json").read_text())["results"]
    assert [row["method"] for row in rows] == ["plain", "stn", "delta"]
    assert rows[0]["over_plain"] == 1.0 and all(row["step_s"] > 0 and row["growth_mb"] > 0 for row in rows)
    assert len(run.stdout.strip().splitlines()) == 4
