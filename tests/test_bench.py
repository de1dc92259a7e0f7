"""bench.py: what it refuses, in one line that says what is wrong. Its numbers need a GPU."""

import pytest
from helpers import run_script


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["what"], "invalid choice: 'what'"),
        (["step", "--batch=some"], "--batch: invalid int value"),
        (["sample", "--batch=0"], "--batch must be at least 1"),
        (["trainer", "--input_size=31"], "31 is not divisible"),
        (["step", "--modes=compiled,swift"], "no mode 'swift': there are graph, one_stream, eager"),
        (["sample", "--size=XXL/2"], "invalid choice: 'XXL/2'"),
        (["theory"], "attention"),
        ([], "required: what"),
    ],
)
def test_bench_refuses(folder, arguments, word):
    assert word in run_script("bench.py", *arguments)


def test_bench_under_half_of_torchrun(folder, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("RANK", "x")
    assert "RANK must be a whole number" in run_script("bench.py", "step")
