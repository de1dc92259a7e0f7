"""
peer_mean.py: ranks that are threads, with boxes in the CPU's memory, beside float64; and two GPUs.

Functions without "test_" in front run in a process of their own, where Triton interprets kernels.
"""

import threading

import pytest
import torch
from helpers import gpu, interpreted_in, torchrun

import peer_mean
from peer_mean import PeerMean

SMALL_BOX = 4096  # bytes
# Numbers in a gradient: fewer than ranks, less than a part's alignment, and several boxes full.
SIZES = (1, 2, 15, 16, 17, 33, 500, 1024, 5000)


class Host:
    """Boxes that all ranks reach. One rank runs at a time, from barrier to barrier."""

    def __init__(self, ranks):
        self.boxes = [torch.full((SMALL_BOX // 4,), torch.nan) for _ in range(ranks)]
        self.barrier = threading.Barrier(ranks)
        self.turn = threading.Lock()


class Peers:
    """What symmetric memory's rendezvous returns, for a rank that is a thread."""

    def __init__(self, host, rank):
        self.host = host
        self.rank = rank
        self.world_size = len(host.boxes)

    def get_buffer(self, rank, sizes, dtype):
        assert dtype == torch.float32
        rows, row = sizes
        return self.host.boxes[rank][: rows * row].view(rows, row)

    def barrier(self, timeout_ms):
        self.host.turn.release()
        self.host.barrier.wait(timeout_ms / 1000)
        self.host.turn.acquire()


def averages(ranks):
    """All ranks get the mean, and the same bits. A rank may be ahead of the others by one piece."""
    peer_mean.BOX_BYTES = SMALL_BOX
    torch.manual_seed(0)
    gradients = [[torch.randn(n) for n in SIZES] for _ in range(ranks)]
    wanted = [torch.stack(each).double().mean(0) for each in zip(*gradients)]
    host = Host(ranks)

    def work(rank):
        mean = PeerMean.__new__(PeerMean)  # without symmetric memory
        mean.peers = Peers(host, rank)
        with host.turn:
            for gradient in gradients[rank]:
                mean.average(gradient)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, exact in enumerate(wanted):
        for rank in range(ranks):
            assert torch.equal(gradients[rank][i], gradients[0][i])
            assert (gradients[rank][i] - exact).abs().max() < 4e-7 * ranks


def averages_of_2():
    averages(2)


def averages_of_3():
    averages(3)


def averages_of_8():
    averages(8)


@pytest.mark.parametrize("name", ["averages_of_2", "averages_of_3", "averages_of_8"])
def test_in_the_interpreter(name):
    interpreted_in("test_peer_mean", name)


def test_why_not(monkeypatch):
    """It is for the GPUs of one host that reach each other's memory."""
    monkeypatch.setattr(peer_mean.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(peer_mean, "triton", peer_mean)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    reached = []

    def reaches(device, peer):
        reached.append((device, peer))
        return True

    monkeypatch.setattr(torch.cuda, "can_device_access_peer", reaches)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    device = torch.device("cuda", 1)
    assert peer_mean.why_not(device) is None
    assert reached == [(1, 0)]
    assert "Nvidia" in peer_mean.why_not(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda device, peer: False)
    assert "cannot reach" in peer_mean.why_not(device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "does not see" in peer_mean.why_not(device)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert "several hosts" in peer_mean.why_not(device)
    monkeypatch.setattr(peer_mean.dist, "get_world_size", lambda: 1)
    assert "one rank" in peer_mean.why_not(device)
    monkeypatch.setattr(peer_mean, "PEER_MEAN", False)
    assert "PEER_MEAN" in peer_mean.why_not(device)


# ---- GPUs ----------------------------------------------------------------------------------------

RANKS = """
from datetime import timedelta

import torch
import torch.distributed as dist

import device as here
import peer_mean

device = here.find_device("cuda")
torch.cuda.set_device(device)
here.join_ranks("nccl", timedelta(minutes=1))
rank, ranks = dist.get_rank(), dist.get_world_size()
assert peer_mean.why_not(device) is None
mean = peer_mean.PeerMean(device)
torch.manual_seed(rank)


def averaged(gradient):
    result = gradient.clone()
    mean.average(result)
    return result


for dtype in (torch.float32, torch.bfloat16):
    for n in (1, 15, 17, 1000, 2**20 + 3, 2**25 + 7):
        graph = here.Graph(averaged, [torch.zeros(n, dtype=dtype, device=device)])
        for scale in (1, 1e4):
            gradient = scale * torch.randn(n, device=device).to(dtype)
            each = [torch.empty_like(gradient) for _ in range(ranks)]
            dist.all_gather(each, gradient)
            exact = torch.stack(each).double().mean(0)
            found = graph(gradient)
            again = averaged(gradient)
            dist.all_gather(each, found)
            assert all(torch.equal(one, found) for one in (*each, again))
            largest = exact.abs().max()
            assert (found - exact).abs().max() <= torch.finfo(dtype).eps * largest, (dtype, n)
    del graph
print("averaged on", ranks)
dist.destroy_process_group()
"""


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs here")
def test_gpu_mean_of_two_gpus(folder):
    """In a CUDA graph and without one: the mean, and the same bits on both."""
    (folder / "two.py").write_text(RANKS)
    assert torchrun(folder / "two.py").stdout.decode().count("averaged on 2") == 2
