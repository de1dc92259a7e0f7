"""
peer_mean.py: ranks that are threads, with boxes in the CPU's memory, beside float64; and two GPUs.

Functions without "test_" in front run in a process of their own, where Triton interprets kernels.
"""

import threading

import pytest
import torch
from helpers import gpu, interpreted_in, torchrun

import device
import peer_mean
from peer_mean import PeerMean

SMALL_BOX = 4096  # bytes
# Numbers in a gradient: fewer than ranks, less than a part's alignment, and several boxes full.
SIZES = (1, 2, 15, 16, 17, 33, 500, 1024, 5000)


class Host:
    """Boxes that all ranks reach. One rank runs at a time, from barrier to barrier."""

    def __init__(self, ranks):
        self.boxes = [torch.full((SMALL_BOX,), 255, dtype=torch.uint8) for _ in range(ranks)]
        self.barrier = threading.Barrier(ranks)
        self.turn = threading.Lock()


class Peers:
    """What symmetric memory's rendezvous returns, for a rank that is a thread."""

    def __init__(self, host, rank):
        self.host = host
        self.rank = rank
        self.world_size = len(host.boxes)

    def get_buffer(self, rank, sizes, dtype):
        rows, row = sizes
        return self.host.boxes[rank].view(dtype)[: rows * row].view(rows, row)

    def barrier(self, timeout_ms):
        self.host.turn.release()
        self.host.barrier.wait(60)
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
            try:
                for gradient in gradients[rank]:
                    mean.average(gradient)
            except BaseException:
                host.barrier.abort()  # the others need not wait for this rank
                raise

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


@pytest.mark.parametrize("ranks", [2, 3, 5, 6, 7, 8])
def test_rows_are_at_the_same_bytes(ranks, monkeypatch):
    """In every dtype. Else a gradient of the next piece may be written over a mean of this one."""
    rows = {}

    def average_piece(gradient, boxes):
        at = [row.data_ptr() - boxes[0].data_ptr() for row in boxes[0]]
        rows[gradient.dtype] = at
        assert len(gradient) <= boxes[0].numel()
        assert all(place % 128 == 0 for place in at)

    for dtype in (torch.float32, torch.bfloat16):
        mean = PeerMean.__new__(PeerMean)
        mean.peers = Peers(Host(ranks), 0)
        mean.average_piece = average_piece
        monkeypatch.setattr(peer_mean, "BOX_BYTES", SMALL_BOX)
        mean.average(torch.zeros(10_000, dtype=dtype))
    assert rows[torch.float32] == rows[torch.bfloat16]


def test_why_not(monkeypatch):
    """It is for the GPUs of one host that reach each other's memory."""
    devices = [torch.device("cuda", 4), torch.device("cuda", 5)]
    here = devices[1]
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(peer_mean, "triton", peer_mean)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    asked = []

    def reaches(device, peer):
        asked.append((device, peer))
        return True

    monkeypatch.setattr(torch.cuda, "can_device_access_peer", reaches)
    monkeypatch.setattr(peer_mean, "has_nvlink", lambda device, devices: True)
    for name in ("NCCL_P2P_DISABLE", "TORCH_SYMMMEM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert peer_mean.why_not(here, devices) is None
    assert asked == [(5, 4)]
    assert "NVIDIA" in peer_mean.why_not(torch.device("cpu"), devices)
    monkeypatch.setattr(peer_mean, "has_nvlink", lambda device, devices: False)
    assert "no NVLink" in peer_mean.why_not(here, devices)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda device, peer: False)
    assert "cannot reach" in peer_mean.why_not(here, devices)
    assert "see the GPUs of all" in peer_mean.why_not(here, [here, here])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "see the GPUs of all" in peer_mean.why_not(here, devices)
    monkeypatch.setenv("TORCH_SYMMMEM", "NVSHMEM")
    assert "TORCH_SYMMMEM" in peer_mean.why_not(here, devices)
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    assert "NCCL_P2P_DISABLE" in peer_mean.why_not(here, devices)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert "several hosts" in peer_mean.why_not(here, devices)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert "no LOCAL_WORLD_SIZE" in peer_mean.why_not(here, devices)
    monkeypatch.setattr(peer_mean, "PEER_MEAN", False)
    assert "PEER_MEAN" in peer_mean.why_not(here, devices)


def test_ranks_that_cannot(monkeypatch, capsys):
    """If one rank cannot make a PeerMean, no rank uses one, and rank 0 says why."""
    here = torch.device("cuda", 0)
    others = []  # what the other rank says, call by call

    def from_all_ranks(value):
        return [value, others.pop(0)]

    monkeypatch.setattr(device, "from_all_ranks", from_all_ranks)
    monkeypatch.setattr(device.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(peer_mean, "why_not", lambda device, devices: None)
    monkeypatch.setattr(peer_mean, "make_box", lambda device: "a box")
    monkeypatch.setattr(peer_mean, "PeerMean", lambda box: f"a PeerMean of {box}")
    others[:] = [here, None, None, None]
    assert device.peer_mean_of_all(here) == "a PeerMean of a box"
    others[:] = [here, "it has no NVLink"]
    assert device.peer_mean_of_all(here) is None
    assert "copy engines: it has no NVLink\n" in capsys.readouterr().err
    others[:] = [here, None, "no memory"]
    assert device.peer_mean_of_all(here) is None
    assert "no memory" in capsys.readouterr().err

    def fails(*_):
        raise RuntimeError("CUDA driver error\nand more")

    for part, answers in (("PeerMean", 3), ("make_box", 2), ("why_not", 1)):
        monkeypatch.setattr(peer_mean, part, fails)
        others[:] = [here, *[None] * answers]
        assert device.peer_mean_of_all(here) is None
        assert "copy engines: CUDA driver error\n" in capsys.readouterr().err
        assert not others


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
reason = peer_mean.why_not(device, here.from_all_ranks(device))
if reason:
    print("cannot:", reason)
    dist.destroy_process_group()
    raise SystemExit
mean = peer_mean.PeerMean(peer_mean.make_box(device))
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


class Bucket:
    def buffer(self):
        return gradient


for hook in (mean.hook, lambda bucket: here.nccl_mean(None, bucket)):
    gradient = torch.full((1000,), float(rank), device=device)
    assert (hook(Bucket()).wait() == (ranks - 1) / 2).all()
print(f"averaged on {ranks}")  # in one piece, also where Python does not buffer
dist.destroy_process_group()
"""


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs here")
def test_gpu_mean_of_two_gpus(folder):
    """In a CUDA graph and without one: the mean, and the same bits on both."""
    (folder / "two.py").write_text(RANKS)
    said = torchrun(folder / "two.py").stdout.decode()
    if "cannot" in said:
        pytest.skip(said)
    assert said.count("averaged on 2") == 2
