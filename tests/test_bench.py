"""bench.py: what it refuses. Its numbers need a GPU."""

import pytest
from helpers import run_script


@pytest.mark.parametrize(
    "arguments",
    [
        ["what"],
        ["step", "--batch=some"],
        ["sample", "--batch=0"],
        ["trainer", "--input_size=31"],
        ["step", "--modes=compiled,swift"],
        ["sample", "--size=XXL/2"],
        [],
    ],
)
def test_bench_refuses(folder, arguments):
    assert "bench.py attention [--quick]" in run_script("bench.py", *arguments)
