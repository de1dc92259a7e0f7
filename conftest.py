"""..."""
import multiprocessing
import os

import numpy as np
import pytest
from helpers import HERE, tiny_vae, train_here
from PIL import Image


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def start(folder, monkeypatch):
    """Starts train.py in a process of its own, forked from a server that has imported everything already, which saves
    seconds each time. (Not from this process: a fork of one with threads can hang.)"""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([HERE, os.path.join(HERE, "tests")]))                                    # where the server finds this file
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["helpers", "torch._dynamo", "matplotlib.figure"])
    processes = []

    def start(*arguments):
        processes.append(context.Process(target=train_here, args=(str(folder), arguments)))
        processes[-1].start()
        return processes[-1]
    yield start
    for process in processes:
        process.kill()
        process.join()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """200 small JPEGs in four class folders, the 75th of them broken, and a VAE with random weights."""
    at, rng = tmp_path_factory.mktemp("source"), np.random.default_rng(0)
    tiny_vae(at / "vae")
    for i in range(200):
        path = at / "src" / f"n0{i // 50}" / f"{i % 50:02}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize((50, 40), Image.BICUBIC).save(path, quality=90)
        if i == 75:
            path.write_bytes(path.read_bytes()[:300])
    return at
