"""device.py: the device, the ranks of torchrun, what they tell each other, requests to stop."""

import copy
import os
import signal
from datetime import timedelta

import pytest
import torch
from helpers import SAY_WHAT_IS_LEFT, SMALL, run_script, torchrun

import device
from files import UserError

TORCHRUN = dict(
    **dict(WORLD_SIZE="2", RANK="1", LOCAL_RANK="1"),
    **dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500"),
)


def set_environment(monkeypatch, **variables):
    """The variables of torchrun are these, and no other of them is set."""
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


# ---- devices -------------------------------------------------------------------------------------


def test_devices(monkeypatch):
    assert device.find_device("cpu") == torch.device("cpu")
    assert device.abilities(torch.device("cpu")) == (False, False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert device.find_device() == torch.device("cpu")
    for name in ("gpu", "meta", "xpu:0", " "):
        with pytest.raises(UserError, match="there are cpu, cuda and mps"):
            device.find_device(name)
    for name in ("cuda:many", "cpu:", "cuda:99"):
        with pytest.raises(UserError, match=f"no device '{name}' here"):
            device.find_device(name)


def test_train_refuses_devices(folder):
    assert "no device 'gpu'" in run_script("train.py", "--device=gpu")
    assert "no device 'cuda:77' here" in run_script("train.py", "--device=cuda:77")


def test_memory_grows(monkeypatch):
    """A value of the user's stays, and where PyTorch cannot do it nothing is set."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(device.sys, "platform", "linux")
    monkeypatch.setattr(device.platform, "release", lambda: "5.15.0-microsoft-standard-WSL2")
    device.let_memory_grow()
    assert not any(name in os.environ for name in names)
    monkeypatch.setattr(device.platform, "release", lambda: "6.8.0-generic")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    device.let_memory_grow()
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    device.let_memory_grow()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")


# ---- ranks ---------------------------------------------------------------------------------------


def test_ranks_of_torchrun(monkeypatch):
    set_environment(monkeypatch)
    assert device.ranks_of_torchrun() == (0, 1, 0)
    set_environment(monkeypatch, **TORCHRUN)
    assert device.ranks_of_torchrun() == (1, 2, 1)


WRONG_ENVIRONMENTS = [
    (dict(WORLD_SIZE="2"), "WORLD_SIZE=2 but no RANK: start several ranks with torchrun"),
    (dict(RANK="x"), "RANK must be a whole number, not 'x'"),
    (dict(RANK="1"), "RANK 1 and WORLD_SIZE 1, which cannot be"),
    (dict(WORLD_SIZE="0"), "RANK 0 and WORLD_SIZE 0, which cannot be"),
    (dict(WORLD_SIZE="two"), "WORLD_SIZE must be a whole number"),
    (dict(TORCHRUN, RANK="2"), "RANK 2 and WORLD_SIZE 2, which cannot be"),
    (dict(TORCHRUN, LOCAL_RANK="-1"), "LOCAL_RANK must be at least 0"),
    (dict(TORCHRUN, MASTER_PORT="abc"), "MASTER_PORT must be a whole number, not 'abc'"),
    (dict(TORCHRUN, MASTER_PORT="70000"), "MASTER_PORT must be below 65536"),
    (dict(WORLD_SIZE="2", RANK="0", LOCAL_RANK="0"), "WORLD_SIZE=2 but no MASTER_ADDR"),
]


@pytest.mark.parametrize("environment, words", WRONG_ENVIRONMENTS)
def test_train_refuses_half_an_environment(folder, monkeypatch, environment, words):
    """One line and an exit code that is not 0 (run_script checks both)."""
    set_environment(monkeypatch, **environment)
    assert words in run_script("train.py", *SMALL)
    assert not os.listdir()


def test_ranks_that_do_not_find_each_other(monkeypatch):
    set_environment(monkeypatch, **TORCHRUN)
    with pytest.raises(UserError, match="rank 1 cannot join the 2 ranks"):
        device.join_ranks("gloo", timedelta(seconds=1))


def test_restarts_on_several_machines(monkeypatch):
    set_environment(monkeypatch, **TORCHRUN)
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(UserError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        device.join_ranks("gloo", timedelta(seconds=1))


def test_one_rank_talks_to_itself(monkeypatch):
    set_environment(monkeypatch)
    device.join_ranks("gloo", timedelta(seconds=1))
    assert device.from_rank_0("a") == "a"
    assert device.from_all_ranks("a") == ["a"]


TWO_RANKS = """
from datetime import timedelta
import torch
import device

device.join_ranks("gloo", timedelta(seconds=60))
parallel = device.data_parallel(torch.nn.Linear(2, 2))
parallel(torch.ones(1, 2)).sum().backward()
assert device.from_all_ranks("a") == ["a", "a"]
del parallel
"""


def test_ranks_leave_before_they_end(folder):
    """Else gloo's threads now and then abort a process that has done its work."""
    (folder / "two.py").write_text(SAY_WHAT_IS_LEFT + TWO_RANKS)
    said = torchrun(folder / "two.py").stdout.decode()
    assert said.count("at exit: False 0") == 2


class TwoParts(torch.nn.Module):
    """A loss of two parts. It goes backward through the first itself."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(512, 1024)  # 2 MB, and so are DDP's buckets
        self.second = torch.nn.Linear(1024, 512)

    def forward(self, x):
        self.second(self.first(x)).sum().backward()
        return self.second(self.first(2 * x)).sum()


def test_data_parallel_sends_during_the_last_backward(group_of_one):
    """Then alone, and what all parts of the step have added up. The first step sends one bucket;
    later ones send the gradient of a layer before that of the layer below it is there."""
    torch.manual_seed(0)
    plain = TwoParts()
    module = copy.deepcopy(plain)
    parallel = device.data_parallel(module)
    events = []

    def send(state, bucket):
        events.append("sent")
        future = torch.futures.Future()
        future.set_result(bucket.buffer() / 2)  # as if the other rank had nothing to say
        return future

    def has_gradient(weight):
        events.append("first layer")

    parallel.register_comm_hook(None, send)
    module.first.weight.register_post_accumulate_grad_hook(has_gradient)
    for step in range(3):
        batches = torch.randn(3, 5, 512)
        for net in (plain, module):
            net.zero_grad(set_to_none=False)
        for x in batches:
            plain(x).backward()
        for x in batches[:2]:
            with parallel.no_sync():
                parallel(x).backward()
        last = parallel(batches[2])
        assert "sent" not in events
        events.clear()
        last.backward()
        if step == 0:
            assert events == ["first layer", "sent"]
        else:
            assert events == ["sent", "first layer", "sent"]
        events.clear()
        for p, q in zip(plain.parameters(), module.parameters()):
            assert torch.equal(p.grad / 2, q.grad)


def test_ranks_agree(monkeypatch):
    """Of two ranks that are imitated: the other one's weights differ by `difference`."""
    weights = [torch.ones(4, 4), torch.zeros(3), torch.full((2,), -5.0)]
    difference = torch.zeros(3)

    def all_reduce(both, operation):
        other = torch.cat([both[:3] + difference, both[3:] - difference])
        both.copy_(torch.maximum(both, other))

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    assert device.ranks_agree(weights)
    for i, least in ((0, 4e-5), (2, 7e-5)):  # 1e-5 of the norms, 4 and 7.07
        for sign in (-1, 1):
            difference.zero_()
            difference[i] = sign * least / 2
            assert device.ranks_agree(weights)
            difference[i] = sign * least * 2
            assert not device.ranks_agree(weights)


# ---- signals -------------------------------------------------------------------------------------


def test_stop_request(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    request = device.StopRequest()
    assert not request.asked()
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)  # too soon to count
    assert request.asked()
    assert request.exit_code() == 130
    request.restore()
    assert signal.getsignal(signal.SIGTERM) is before

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    request = device.StopRequest()
    assert not request.asked()
    request.parent = -1  # torchrun was killed
    assert request.asked()
    assert request.exit_code() == 143
    request.restore()
