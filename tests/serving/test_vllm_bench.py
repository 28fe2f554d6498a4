"""The bench of examples/serving runs and reports what it says it does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from vllm_server import environment

pytestmark = pytest.mark.vllm
SCRIPT = Path(__file__).parents[2] / "examples" / "serving" / "bench.py"


def test_the_bench_compares_budgets_with_stock_vllm(tmp_path):
    options = ["--shape", "pocket", "--requests", "4", "--concurrent", "2", "--rounds", "1", "--budgets", "0.25"]
    command = [sys.executable, str(SCRIPT), *options, "--eager", "--json", str(tmp_path / "figures.json")]
    subprocess.run(command, check=True, env={**os.environ, **environment()}, timeout=900, cwd=tmp_path)
    stock, quarter = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert (stock["kept"], stock["prompt_tokens"]) == ("vLLM", 144 + 8)
    assert (quarter["kept"], quarter["prompt_tokens"]) == ("25%", 36 + 8)
    for row in (stock, quarter):
        assert row["requests_per_s"] > 0 and row["ttft_p99_ms"] >= row["ttft_p50_ms"] > 0 and row["kv_blocks"] >= 1
