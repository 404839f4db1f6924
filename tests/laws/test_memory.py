"""What was forecast before the start is what products take."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parents[1] / "cases" / "memory.py"


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's high-water mark")
@pytest.mark.parametrize(
    ("name", "rows", "memory"),
    [
        pytest.param(name, rows, memory, id=f"{name}-{word}", marks=() if word == quick else pytest.mark.slow)
        for name, rows, quick in (("mlp", 20_000, "tight"), ("lenet", 1_000, "roomy"), ("encoder", 1_000, None))
        for memory, word in ((1 << 34, "roomy"), (100 << 20, "tight"))
    ],
)
def test_peak_memory_is_within_a_fifth_of_the_forecast(name, rows, memory):
    """In a process whose allocator gives blocks back at once, so that its mark is what was in use."""
    allocator = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, str(RUN), name, str(rows), str(memory)],
        capture_output=True, text=True, check=True, timeout=300, env={**os.environ, **allocator},
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert found["kept"] is (memory > 1 << 30)
    assert found["forecast"] <= memory
    assert found["peak"] <= 1.2 * found["forecast"]
    assert found["peak"] >= 0.8 * found["forecast"]
