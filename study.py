"""
TVM beside MeanFlow and flow matching: one network, one trainer, one data set, equal training time.

    python study.py [--seconds=50] [--workers=9] [--images=5000]   # one GPU or several
    python study.py --report [--log=FILE]    # tables and figures from the log alone
    python study.py --tiny                   # all of it at toy size, in a minute on a CPU

The same command again goes on where it was stopped. Everything is in out/study/ (out/study-tiny/):
log.jsonl (a line of settings and step times, then one a run that finished or diverged),
study-tables.md, study.png, samples.png, the judge's weights, and of each run its samples (rows:
steps, columns: classes) and what train.py said. Checkpoints: out/study-RUN/.

The protocol, fixed before any run but for what is marked (*):
- Data: `shapes` and its preset (guidance 2, mu_s 0.4), with the network and the evaluation EMA of
  FULL below.
- Training time: each method's step is timed alone on the device (median of 60, by the wall
  clock). Its runs have as many steps as fit into --seconds. So it does not matter that
  --workers runs share the device.
- Rates: each method runs at every learning rate with seed 0, and at twice the largest where that
  was best (*). The best rate has the smallest geometric mean, over the step counts, of the Frechet
  distance in features. It is run with the other seeds.
- Ablations of TVM ("wider gaps" (*)): seed 0, the middle rate, TVM's number of steps. (detach_jvp:
  its own step is timed.) Nothing else is tuned here.
- Scores: --images samples, classes in turn, the same noise for all, against as many fresh images of
  the generator, which nobody trained on. "real" are fresh images, too. A convolutional classifier,
  trained on the training images, judges labels and gives the features (256). Pixels are averaged
  2 x 2 for their Frechet distance. Two-sample accuracy is that of scores.py. It is given for
  samples and fresh images apart, too: blurred samples, which are everyone's nearest neighbours, can
  make it near 1 for the ones and under a half for the others.

In this file: the protocol; which runs there are; timing; the runs. judge.py scores them, and
study_report.py has the tables and figures.
"""

import dataclasses
import functools
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from tqdm import tqdm

import options
from dataset import load_dataset
from device import find_device
from files import HERE, UserError, hold, written
from images import parallel
from judge import Judge
from loss import MEANFLOW_CONSTANTS
from model import DiTConfig
from shapes import draw_shape
from study_report import mean_distance, read_log, report, safe_name
from timing import RandomStep, milliseconds

# ---- the protocol --------------------------------------------------------------------------------

METHODS = {  # what each changes in train.py's constants
    "tvm": {},
    "meanflow": dict(MEANFLOW_CONSTANTS, objective="meanflow", kappa=0.5),
    "flow_matching": dict(objective="flow_matching"),
}
TIMED = {  # the steps that are timed: what each changes in train.py's constants
    "tvm": {},
    "meanflow": dict(objective="meanflow"),
    "flow_matching": dict(objective="flow_matching"),
    "detach_jvp": dict(detach_jvp=True),
}


@dataclasses.dataclass(frozen=True)
class Protocol:
    folder: str
    dataset: str  # data/NAME, drawn by shapes.py
    size: int  # pixels of a side
    count: int  # training images
    seconds: float  # of training a run
    images: int  # of a score
    workers: int  # runs at a time
    network: dict  # constants of train.py
    rates: tuple
    seeds: tuple
    nfes: tuple
    ablations: dict  # what each changes in train.py's constants

    def folder_of(self, run):
        """The name of a run's folder in out/."""
        return f"{os.path.basename(self.folder)}-{safe_name(run)}"

    def settings(self):
        """What the log's first line says, and a resumed study must share."""
        settings = dict(
            self.network,
            dataset=self.dataset,
            seconds=self.seconds,
            images=self.images,
            rates=self.rates,
            seeds=self.seeds,
            nfes=self.nfes,
        )
        return json.loads(json.dumps(settings))  # with lists, as they are read again


FULL = Protocol(
    folder=os.path.join("out", "study"),
    dataset="shapes",
    size=32,
    count=60_000,
    seconds=50.0,
    images=5000,
    workers=9,
    network=dict(
        hidden_size=256, depth=6, num_heads=4, patch_size=4, batch_size=256, ema_eval=0.995
    ),
    rates=(5e-4, 1e-3, 2e-3),
    seeds=(0, 1, 2),
    nfes=(1, 2, 4, 50),
    ablations={
        "unscaled": dict(scaled=False),
        "ema_target 0": dict(ema_target=0.0),
        "ema_target 0.9": dict(ema_target=0.9),
        "ema_target 0.999": dict(ema_target=0.999),
        "wider gaps": dict(mu=0.5),
        "gap": dict(times="gap"),
        "trunc": dict(times="trunc", mu=1.0),
        "clamp": dict(times="clamp", mu=1.0),
        "detach_jvp": dict(detach_jvp=True),
        "no Lipschitz control": dict(semi_lipschitz=False),
    },
)
TINY = dataclasses.replace(
    FULL,
    folder=os.path.join("out", "study-tiny"),
    dataset="tiny-shapes",
    size=8,
    count=300,
    seconds=0.1,
    images=40,
    workers=2,
    network=dict(hidden_size=32, depth=1, num_heads=2, patch_size=2, batch_size=8, ema_eval=0.5),
    rates=(1e-3,),
    seeds=(0, 1),
    ablations={"gap": dict(times="gap")},
)


# ---- which runs there are ------------------------------------------------------------------------


def rates_of(protocol, method, done):
    """The protocol's rates, and twice the largest where that was best. done: {run: its line}."""
    rates = protocol.rates
    lines = [done.get(f"{method}-{rate:g}-0") for rate in rates]
    if None not in lines and min(lines, key=mean_distance) is lines[-1]:
        return (*rates, 2 * rates[-1])
    return rates


def best_rate(protocol, method, done):
    rates = rates_of(protocol, method, done)
    return min(rates, key=lambda rate: mean_distance(done[f"{method}-{rate:g}-0"]))


def plan_runs(protocol, done):
    """{run: its constants} of all runs that are known by now, the most wanted first.

    done: {run: its line}. Which rates and seeds are to be run depends on the scores in them.
    """
    runs = {}
    for rate in (*protocol.rates, 2 * protocol.rates[-1]):
        for method, constants in METHODS.items():
            if rate in rates_of(protocol, method, done):
                runs[f"{method}-{rate:g}-0"] = dict(constants, lr=rate, seed=0)
    if set(runs) <= set(done):
        for seed in protocol.seeds:
            for method, constants in METHODS.items():
                rate = best_rate(protocol, method, done)
                runs[f"{method}-{rate:g}-{seed}"] = dict(constants, lr=rate, seed=seed)
    middle = protocol.rates[len(protocol.rates) // 2]
    for name, constants in protocol.ablations.items():
        runs[f"ablation-{name}"] = dict(constants, lr=middle, seed=0)
    return runs


def steps_of(protocol, constants, step_ms):
    """How many steps fit into a run's time."""
    timed = "detach_jvp" if constants.get("detach_jvp") else constants.get("objective", "tvm")
    return steps_that_fit(protocol.seconds, step_ms[timed])


def steps_that_fit(seconds, ms):
    """How many steps of so many milliseconds, and one at least."""
    return max(1, round(seconds * 1e3 / ms))


def command_of(protocol, run, constants, steps):
    """The command line that trains a run."""
    constants = dict(
        protocol.network,
        dataset=protocol.dataset,
        name=protocol.folder_of(run),
        steps=steps,
        save_every=steps,
        sample_every=steps,
        log_every=min(100, steps),
        keep=1,
        score_images=0,  # the judge scores
        **constants,
    )
    flags = [f"--{key}={value}" for key, value in constants.items()]
    return [sys.executable, os.path.join(HERE, "train.py"), "--preset=shapes", *flags]


# ---- timing --------------------------------------------------------------------------------------


def time_step(protocol, constants):
    """The median milliseconds of a training step. While this runs nothing else may.

    constants: arguments of RandomStep. Others raise TypeError.
    """
    cuda = torch.cuda.is_available()
    names = ("hidden_size", "depth", "num_heads", "patch_size")
    network = {name: protocol.network[name] for name in names}
    step = RandomStep(
        DiTConfig(input_size=protocol.size, in_channels=3, num_classes=10, **network),
        protocol.network["batch_size"],
        device="cuda" if cuda else "cpu",
        **constants,
    )
    for n in range(10):
        step(n)
    return statistics.median(milliseconds(step, 60 if cuda else 5))


def print_step_times(protocol):
    """{what: median milliseconds of a step}, as JSON."""
    print(json.dumps({what: time_step(protocol, TIMED[what]) for what in TIMED}))


def first_line(protocol, log, tiny):
    """The log's first line: settings and step times. It is read, or measured now."""
    first = first_line_of(log, protocol.settings())
    if first:
        return first
    # In a process of its own, whose memory is free again for the runs.
    command = [sys.executable, os.path.abspath(__file__), "--time"]
    if tiny:
        command.append("--tiny")
    timer = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if timer.returncode:
        raise UserError("timing the steps failed")
    step_ms = json.loads(timer.stdout.splitlines()[-1])
    return dict(settings=protocol.settings(), step_ms=step_ms, **here_and_now())


def first_line_of(log, settings):
    """The first line of a log that is there, or None. Raises UserError for other settings."""
    if not os.path.exists(log):
        return None
    first, _ = read_log(log)
    if first["settings"] != settings:
        raise UserError(
            f"{log} has other settings, {first['settings']}, not {settings}; "
            f"move {os.path.dirname(log) or log} away"
        )
    return first


def here_and_now():
    """What the log's first line says of the machine."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return dict(device=device, torch=torch.__version__, date=time.strftime("%Y-%m-%d"))


# ---- the runs ------------------------------------------------------------------------------------


@dataclasses.dataclass
class Job:
    """A run that is being trained, and then scored."""

    steps: int
    gpu: str | None
    trainer: subprocess.Popen
    scores: Future | None = None  # once the trainer has ended


class Runs:
    """Runs that are trained side by side, and then scored one or two at a time.

    record.py has other runs: it overrides plan, steps_of and line_of.
    """

    def __init__(self, protocol, log, make_judge, step_ms, device):
        """make_judge(): a Judge. It is called in another thread, so that the first runs need not
        wait for it.
        """
        self.protocol = protocol
        self.log = log
        self.step_ms = step_ms
        self.done = read_log(log)[1] if os.path.exists(log) else {}  # {run: its line}
        self.active = {}  # {run: Job}
        self.failed = {}  # {run: the last line of what train.py said}
        self.scorer = ThreadPoolExecutor(2)
        self.judge = self.scorer.submit(make_judge)
        self.environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "4"}
        self.gpus = [None]
        if device.type == "cuda":
            self.environment["OMP_NUM_THREADS"] = "1"
            self.gpus = visible_gpus()[::-1]  # last the first one, on which the judge is
        done = len(set(self.done) & set(self.plan()))
        self.bar = tqdm(total=len(self.plan()), initial=done, desc="runs", unit="run")

    def plan(self):
        """{run: its constants} of all runs that are known by now, the most wanted first."""
        return plan_runs(self.protocol, self.done)

    def steps_of(self, constants):
        """How many steps a run has."""
        return steps_of(self.protocol, constants, self.step_ms)

    def line_of(self, run, line):
        """The log's line of a run. line: {run, steps} and what score_run says, or why it failed."""
        return line

    def make_all(self):
        """Make all the runs. However this ends, no trainer is left behind."""
        try:
            while True:
                self.collect()
                self.start()
                if not self.active:
                    return
                time.sleep(0.1)
        finally:
            trainers = [job.trainer for job in self.active.values()]
            for trainer in trainers:
                trainer.terminate()  # train.py saves, and goes on from there
            for trainer in trainers:
                trainer.wait()
            self.scorer.shutdown(cancel_futures=True)
            self.bar.close()

    def output_path(self, run):
        """The file of what train.py says."""
        return os.path.join(self.protocol.folder, self.protocol.folder_of(run) + ".txt")

    def start(self):
        """Start as many runs as there is room for."""
        runs = self.plan()
        self.bar.total = max(self.bar.total, len(runs))
        for run, constants in runs.items():
            training = sum(job.scores is None for job in self.active.values())
            if training >= self.protocol.workers:
                return
            if run in self.done or run in self.active or run in self.failed:
                continue
            steps = self.steps_of(constants)
            command = command_of(self.protocol, run, constants, steps)
            gpu = self.least_busy_gpu()
            environment = self.environment
            if gpu is not None:
                environment = {**environment, "CUDA_VISIBLE_DEVICES": gpu}
            with open(self.output_path(run), "w") as f:
                trainer = subprocess.Popen(command, stdout=f, stderr=f, env=environment)
            self.active[run] = Job(steps, gpu, trainer)

    def least_busy_gpu(self):
        """The GPU with the fewest trainers, or None without a GPU."""
        busy = [job.gpu for job in self.active.values() if job.scores is None]
        return min(self.gpus, key=busy.count)

    def score(self, run, steps):
        return self.judge.result().score_run(run, steps)

    def collect(self):
        """Take note of what has ended since the last time."""
        for run, job in list(self.active.items()):
            if job.scores is not None:
                if job.scores.done():
                    self.finish(run, job.scores.result())
            elif job.trainer.poll() == 0:
                job.scores = self.scorer.submit(self.score, run, job.steps)
            elif job.trainer.poll() is not None:
                self.note_failure(run, job)

    def finish(self, run, line):
        """A run has come to its end: its line goes to the log."""
        del self.active[run]
        line = self.line_of(run, line)
        self.done[run] = line
        self.judge.result()  # whoever makes the judge writes the log's first line
        append_line(self.log, line)
        self.bar.update()
        if "scores" in line:
            distances = [f"{nfe}: {s['features']:.2f}" for nfe, s in line["scores"].items()]
            told = f"{line['steps']} steps; Frechet in features {', '.join(distances)}"
        else:
            told = line["failed"]
        self.bar.write(f"{run}: {told}")

    def note_failure(self, run, job):
        with open(self.output_path(run)) as f:
            said = [line for line in re.split(r"[\r\n]", f.read()) if line]
        last = said[-1] if said else "said nothing"
        if "not finite" in last:  # the training diverged, which is a result, too
            self.finish(run, dict(run=run, steps=job.steps, failed=last))
            return
        del self.active[run]
        self.failed[run] = last
        self.bar.write(f"{run}: {last}")


def visible_gpus():
    """The names of the GPUs, as CUDA_VISIBLE_DEVICES has them."""
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    return visible.split(",")[:count]


def begin_log(log, first):
    """Write a log's first line, whole or not at all. A log that is there stays as it is."""
    if os.path.exists(log):
        return
    with written(log) as f:
        f.write(json.dumps(first, allow_nan=False).encode() + b"\n")


def append_line(log, line):
    """Append a line. A last line that a kill has cut off goes."""
    with open(log, "a+b") as f:
        f.seek(0)
        f.truncate(f.read().rfind(b"\n") + 1)
        f.write(json.dumps(line, allow_nan=False).encode() + b"\n")


def prepare_data(protocol):
    """(header, data, fresh images); the data are drawn where they are missing."""
    path = os.path.join("data", protocol.dataset)
    if not os.path.exists(path):
        command = [sys.executable, os.path.join(HERE, "prepare.py"), "shapes"]
        command += ["--name", protocol.dataset]
        command += ["--size", str(protocol.size), "--n", str(protocol.count)]
        if subprocess.run(command).returncode:
            raise UserError("prepare.py shapes failed")
    header, data = load_dataset(path)
    draw_fresh = functools.partial(draw_shape, size=protocol.size, seed=1)
    fresh = parallel(draw_fresh, range(2 * protocol.images), "fresh shapes")
    return header, data, np.stack(list(fresh))


def study(protocol, log, tiny):
    header, data, fresh = prepare_data(protocol)
    first = first_line(protocol, log, tiny)
    times = [f"{what} {ms:.1f}" for what, ms in first["step_ms"].items()]
    print("milliseconds of a step:", ", ".join(times), flush=True)

    device = prepare_device()

    def make_judge():
        judge = Judge(protocol, fresh, header, data, device)
        begin_log(log, dict(first, real=judge.real))
        return judge

    runs = Runs(protocol, log, make_judge, first["step_ms"], device)
    runs.make_all()
    complain_of(runs.failed)


def prepare_device():
    """The judge's device, as it needs it."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.deterministic = True  # the same judge each time
    torch.set_num_threads(min(4, torch.get_num_threads()))  # the other cores are the runs'
    return find_device()


def complain_of(failed):
    """Raise UserError where runs failed. failed: {run: why}."""
    if failed:
        raise UserError(
            f"{len(failed)} runs failed, which the same command tries again: {', '.join(failed)}"
        )


# ---- the command ---------------------------------------------------------------------------------


def parse():
    parser = options.Parser(description=__doc__)
    add = parser.add_argument
    add("--seconds", type=float, help="training time of a run (default 50)")
    add("--workers", type=int, help="runs at a time (default 9)")
    add("--images", type=int, help="of a score (default 5000)")
    add("--log", help="default: log.jsonl in the study's folder")
    add("--report", action="store_true", help="from the log alone")
    add("--tiny", action="store_true", help="a study of the size of a test")
    add("--time", action="store_true", help="print the step times alone")
    args = parser.parse_args()
    protocol = TINY if args.tiny else FULL
    for name in ("seconds", "workers", "images"):
        value = getattr(args, name)
        if value is not None:
            protocol = dataclasses.replace(protocol, **{name: value})
    if not (0 < protocol.seconds < math.inf and protocol.workers > 0 and protocol.images >= 10):
        raise UserError("seconds and workers must be above 0, images at least 10")
    if not torch.cuda.is_available() and not args.tiny and not args.report:
        raise UserError("no CUDA device here; --tiny needs none")
    return args, protocol


def end_by_signal(number, frame):
    sys.exit(128 + number)


def main():
    args, protocol = parse()
    if args.time:
        print_step_times(protocol)
        return
    log = args.log or os.path.join(protocol.folder, "log.jsonl")
    if not args.report:
        signal.signal(signal.SIGTERM, end_by_signal)  # so that Runs.make_all ends the trainers
        with hold(protocol.folder):  # two at once would make all runs twice
            study(protocol, log, args.tiny)
    report(log, list(METHODS), os.path.basename(protocol.folder))


if __name__ == "__main__":
    options.run(main)
