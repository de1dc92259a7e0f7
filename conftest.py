"""Fixtures of all tests: a folder of one's own, train.py in fast processes, images for latents."""

import multiprocessing
import os
import signal
import socket
from datetime import timedelta

import numpy as np
import pytest
import torch
from helpers import HERE, tiny_vae, train_here
from PIL import Image

import device

# A shell starts a job in the background with Ctrl-C ignored. What tests start would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder, in which the test runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def start(folder, monkeypatch):
    """start("--steps=3", ...) runs train.py in a process of its own, and returns the process.

    It is forked from a server that has imported everything already, which saves seconds each time.
    (It is not forked from this process, because a fork of a process with threads can hang.)
    """
    # The server must find conftest.py and helpers.py.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([HERE, os.path.join(HERE, "tests")]))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["helpers", "torch._dynamo", "matplotlib.figure"])
    processes = []

    def start(*arguments, **options):
        process = context.Process(target=train_here, args=(str(folder), arguments), kwargs=options)
        process.start()
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.join()


@pytest.fixture
def two_ranks(start):
    """two_ranks(script, "--steps=3", ...) runs a script on two ranks, and returns their exit codes.

    The environment is that of torchrun, and the processes start faster. torchrun itself is in
    test_ranks_end_together.
    """

    def run(script, *arguments):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = []
        for rank in (0, 1):
            environment = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2")
            environment.update(RANK=str(rank), LOCAL_RANK=str(rank))
            processes.append(start(*arguments, script=str(script), environment=environment))
        for process in processes:
            process.join(100)
        return [process.exitcode for process in processes]

    return run


@pytest.fixture
def group_of_one(monkeypatch):
    """This process is the only rank of a group, as under torchrun --nproc_per_node=1."""
    variables = dict(WORLD_SIZE="1", RANK="0", LOCAL_RANK="0", TORCHELASTIC_RUN_ID="1")
    variables.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    device.join_ranks("gloo", timedelta(seconds=10))
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """200 small JPEGs in four class folders, and a VAE with random weights.

    The JPEG of row 75 is cut off.
    """
    at = tmp_path_factory.mktemp("source")
    rng = np.random.default_rng(0)
    tiny_vae(at / "vae")
    for i in range(200):
        path = at / "src" / f"n0{i // 50}" / f"{i % 50:02}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((50, 40), Image.BICUBIC).save(path, quality=90)
        if i == 75:
            path.write_bytes(path.read_bytes()[:300])
    return at
