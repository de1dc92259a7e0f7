"""
The record: which cheap ideas make TVM's one-step samples better at equal training time.

    python record.py --round=1 [--workers=12]   # each idea alone, 15 s a run: one GPU or several
    python record.py --round=2 [--workers=12]   # five methods, and what won: 50 s a run
    python record.py --round=3 [--workers=12]   # which times are trained: 50 s a run
    python record.py --report [--log=FILE] [--page=FILE]    # tables and figures from the log alone
    python record.py --tiny --round=1           # all of it at toy size, in a minute on a CPU

The same command again goes on where it was stopped. Everything is in out/record/
(out/record-tiny/): steps.json, the step times; log.jsonl, a line of settings, then one a run that
finished or diverged; record-tables.md, record.png and samples.png; the judge's weights; and of each
run its samples and what train.py said. All rounds must find the same log.jsonl and
judge.safetensors there. Checkpoints: out/record-RUN/.

The protocol. Each round's part was written before its runs (rounds 1 and 2: commit c7cb85c, round
3: 2264ee4). What changed later is marked (*):
- Data, network, judge and scores are those of study.py. So are all constants of train.py that an
  idea does not change: its preset `shapes`, with the network and the ema_eval of study.FULL. TVM
  changes nothing more: its rate, 1e-3, was the best there. MeanFlow and flow matching have their
  best rates of there, 2e-3.
- Training time: as in study.py, each step is timed alone on a GPU, and a run has as many steps as
  fit into its round's seconds. Runs that agree in the constants of COSTS share a timing. What the
  others change is not timed: weights of (B,) losses, how times are drawn, learning rates.
- What counts is the Frechet distance in features of one-step samples; those of 2, 4 and 50 steps
  stand beside it.
- Round 1 (many short): each idea alone, seed 0, and TVM with three seeds. An idea must be better
  than TVM by more than the deviation of these. New methods and Muon have two learning rates.
  Nothing else is tuned.
  (*) Muon had won with seed 0: then it was given two more seeds and a third rate. These runs were
  cut short; assets/record-second.jsonl has the four that ended.
  (*) Four ideas passed this rule, with distances below 31.4 - 2.8 = 28.6, and do not go on to round
  2: the average at rate 0.99 (21.2), the gap weight (24.7), t = s first and detach_jvp (25.0 each).
  They were dropped after the runs, because none came to a factor of 1.5. The rule was too weak:
  later a second run of TVM's seed 0 had 23.8, where the first had 31.7.
- Round 2 (few long): five methods, the new ones at their better rate, and what won in round 1. At
  least three seeds each.
  (*) It was to have 30 s, about the steps that 50 s were in study.py, whose kernels were slower. It
  went back to the study's 50 s. It was also to have two or three combinations of what won. Muon
  alone is left of TVM's ideas. So it is combined with the method that led round 1 at 2 and 4 steps,
  improved MeanFlow. That was decided after round 1 and before round 2.
  (*) The steps of round 2 were timed anew, all on one machine: three of them had no time yet, and
  kernels had changed since round 1.
- Round 3 (after round 2, and written before its runs): which times are trained. One step goes from
  t = 1 to s = 0, and with the paper's times one sample in 734 has a gap t - s above 0.9. So: larger
  gaps, the paper's other sampler, and a share of samples that begin at t = 1. First each with seed
  0, for as many steps as TVM has in round 2: none of these changes what a step costs. An idea that
  is better than all five of TVM's seeds goes on, the best one of each kind: with seeds 1 to 4, and
  with Muon, five seeds.
  (*) mu = 0 was better than all five (0.64), and did not go on for want of a GPU.
- A claim has three seeds, a record five. Intervals are mean +- standard deviation over the seeds;
  the report says of each idea whether its interval overlaps with TVM's of as many seconds.
- TVM's first three runs of round 1 kept two more averages of their weights, at rates 0.99 and
  0.998. Each is a row of its own: picking the best of them would be picking from the scores.
  (*) A rate that round 1 chose was to count in round 2. None does (see above), and other averages
  are no longer kept.

In this file: the ideas; the rounds; timing; the runs. record_report.py has the tables and figures.
"""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import traceback
from typing import NamedTuple

import torch

import options
import study
from files import UserError, hold, written
from judge import Judge
from loss import MEANFLOW_CONSTANTS
from record_report import flags_of, report

# ---- the ideas -----------------------------------------------------------------------------------


class Idea(NamedTuple):
    change: dict  # constants of train.py
    about: str
    source: str
    lines: int = 0  # of code that it adds, without its option and checks; 0: constants alone


def at_rate(idea, lr):
    return idea._replace(change=dict(idea.change, lr=lr))


IMPROVED_MEANFLOW = Idea(
    dict(MEANFLOW_CONSTANTS, objective="improved_meanflow"),
    "its loss, without its second head",
    "arXiv 2512.02012",
    23,
)
IMPROVED_MEANFLOW_MUON = IMPROVED_MEANFLOW._replace(
    change=dict(IMPROVED_MEANFLOW.change, lr=2e-3, muon_lr=1e-3),
    about="the two together",
    source="arXiv 2512.02012, 2502.16982",
    lines=23 + 54,
)
ALPHA_FLOW = Idea(
    dict(MEANFLOW_CONSTANTS, objective="alpha_flow"),
    "MeanFlow without a derivative",
    "arXiv 2510.20771",
    26,
)
IDEAS = {
    "TVM": Idea({}, "the paper's objective and network", "arXiv 2511.19797"),
    # what an objective says
    "detach_jvp": Idea(
        dict(detach_jvp=True),
        "no gradient through dF/ds: a cheaper step",
        "arXiv 2511.19797",
        2,
    ),
    # training
    "Muon": Idea(
        dict(muon_lr=1e-3),
        "Muon for the blocks' matrices",
        "arXiv 2502.16982",
        54,
    ),
    "Muon, 2e-3": Idea(dict(muon_lr=2e-3), "the same, at twice the rate", "arXiv 2502.16982", 54),
    "Muon, 5e-4": Idea(dict(muon_lr=5e-4), "the same, at half the rate", "arXiv 2502.16982", 54),
    "lr 2e-3": Idea(dict(lr=2e-3), "twice the rate", "a constant"),
    # which times are trained
    "mu 0": Idea(dict(mu=0.0), "larger gaps: their median is 0.5, not 0.31", "a constant"),
    "mu 0.8": Idea(dict(mu=0.8), "larger gaps: their median is 0.69", "a constant"),
    "trunc": Idea(
        dict(times="trunc", mu=1.0),
        "t is drawn first, then s below it",
        "arXiv 2511.19797",
    ),
    "from noise 0.25": Idea(
        dict(p_noise=0.25),
        "a quarter of the samples begin at t = 1",
        "this project",
        6,
    ),
    "from noise 0.5": Idea(
        dict(p_noise=0.5),
        "half of the samples begin at t = 1",
        "this project",
        6,
    ),
    "Muon, from noise 0.5": Idea(
        dict(muon_lr=1e-3, p_noise=0.5),
        "the two together",
        "arXiv 2502.16982, this project",
        54 + 6,
    ),
    # other methods
    "MeanFlow": Idea(
        dict(MEANFLOW_CONSTANTS, objective="meanflow", kappa=0.5, lr=2e-3),
        "as in study.py, at its best rate there",
        "arXiv 2505.13447",
        19,
    ),
    "improved MeanFlow, lr 1e-3": at_rate(IMPROVED_MEANFLOW, 1e-3),
    "improved MeanFlow, lr 2e-3": at_rate(IMPROVED_MEANFLOW, 2e-3),
    "improved MeanFlow, Muon": IMPROVED_MEANFLOW_MUON,
    "alpha-Flow, lr 1e-3": at_rate(ALPHA_FLOW, 1e-3),
    "alpha-Flow, lr 2e-3": at_rate(ALPHA_FLOW, 2e-3),
    "flow matching": Idea(
        dict(objective="flow_matching", lr=2e-3),
        "as in study.py, at its best rate there",
        "arXiv 2210.02747",
        12,
    ),
}

# Of round 1 as well. None was better than TVM by a factor of 1.5, so their code is gone: commit
# c7cb85c has it.
LOST = {
    "gap weight": Idea(
        dict(terminal_weight="gap"),
        "the terminal term times 1 / ((1 + gap/2) sqrt(1 + gap^2))",
        "TEMF, as reported",
        4,
    ),
    "adaptive 0.5": Idea(
        dict(adaptive_p=0.5),
        "both terms over their stopped size to the 0.5",
        "arXiv 2505.13447",
        5,
    ),
    "adaptive 1": Idea(
        dict(adaptive_p=1.0),
        "both terms over their stopped size",
        "arXiv 2505.13447",
        5,
    ),
    "t = s first": Idea(
        dict(p_equal=0.5, p_equal_end=0.0),
        "half of the samples have t = s at first, none at the end",
        "arXiv 2510.20771 has the order",
        8,
    ),
    "SwiGLU": Idea(
        dict(mlp="swiglu"),
        "a gated MLP, as large",
        "arXiv 2002.05202",
        11,
    ),
    "rotary": Idea(
        dict(positions="rotary"),
        "positions turn queries and keys, none are added",
        "arXiv 2104.09864",
        28,
    ),
    "tokens": Idea(
        dict(conditioning="tokens"),
        "class, times and guidance as tokens, no modulation",
        "arXiv 2512.02012",
        26,
    ),
    "smooth": Idea(
        dict(smooth=True),
        "a 3x3 convolution of F's pixels, across patches",
        "this project",
        4,
    ),
    "skip": Idea(
        dict(skip=True),
        "a multiple of x, chosen by the condition, is added to F",
        "this project",
        5,
    ),
    "decay": Idea(
        dict(decay=0.3),
        "the rate falls to 0 over the last 30% of the steps",
        "arXiv 2405.18392",
        3,
    ),
    "decay, lr 2e-3": Idea(
        dict(decay=1.0, lr=2e-3),
        "twice the rate, which falls to 0 over all steps",
        "arXiv 2405.18392",
        3,
    ),
}

# ---- the rounds ----------------------------------------------------------------------------------


class Round(NamedTuple):
    seconds: float  # of training a run
    seeds: dict  # {idea: its seeds}


METHODS = (  # of the second table: names of ideas
    "TVM",
    "MeanFlow",
    "improved MeanFlow, lr 2e-3",
    "alpha-Flow, lr 2e-3",
    "flow matching",
)
ROUNDS = {
    1: Round(
        15.0,
        {
            "TVM": (0, 1, 2),
            "Muon": (0, 1, 2),
            "Muon, 5e-4": (0,),
            "Muon, 2e-3": (0,),
            "lr 2e-3": (0,),
            "detach_jvp": (0,),
            "improved MeanFlow, lr 1e-3": (0,),
            "improved MeanFlow, lr 2e-3": (0,),
            "alpha-Flow, lr 1e-3": (0,),
            "alpha-Flow, lr 2e-3": (0,),
        },
    ),
    2: Round(
        50.0,
        {
            "TVM": (0, 1, 2, 3, 4),
            "MeanFlow": (0, 1, 2),
            "improved MeanFlow, lr 2e-3": (0, 1, 2),
            "alpha-Flow, lr 2e-3": (0, 1, 2),
            "flow matching": (0, 1, 2),
            "Muon": (0, 1, 2, 3, 4),
            "improved MeanFlow, Muon": (0, 1, 2),
        },
    ),
    3: Round(
        50.0,
        {
            "from noise 0.5": (0, 1, 2, 3, 4),
            "Muon, from noise 0.5": (0, 1, 2, 3, 4),
            "from noise 0.25": (0,),
            "mu 0.8": (0,),
            "mu 0": (0,),
            "trunc": (0,),
        },
    ),
}
TINY_ROUNDS = {
    1: Round(0.1, {"TVM": (0,), "detach_jvp": (0,)}),
    2: Round(0.2, {"TVM": (0, 1)}),
    3: Round(0.2, {"from noise 0.5": (0,)}),
}

FULL = dataclasses.replace(
    study.FULL,
    folder=os.path.join("out", "record"),
    workers=12,
)
TINY = dataclasses.replace(
    study.TINY,
    folder=os.path.join("out", "record-tiny"),
)


def settings_of(protocol):
    """What the log's first line says, and both rounds share."""
    settings = protocol.settings()
    for name in ("seconds", "rates", "seeds"):
        del settings[name]
    return settings


def members_of(a_round):
    """{run: (idea, seed)}, in the order in which they start: seed 0 of all ideas first."""
    members = {}
    for seed in sorted({seed for seeds in a_round.seeds.values() for seed in seeds}):
        for idea, seeds in a_round.seeds.items():
            if seed in seeds:
                members[f"{idea}, {a_round.seconds:g} s, seed {seed}"] = (idea, seed)
    return members


# ---- timing --------------------------------------------------------------------------------------

# The constants that a step's time depends on; and it depends on whether there is a muon_lr.
COSTS = ("objective", "detach_jvp")


def costs_of(constants):
    """What study.time_step needs of a run's constants."""
    costs = {name: constants[name] for name in COSTS if name in constants}
    if constants.get("muon_lr"):
        costs["muon"] = True
    return costs


def step_of(constants):
    """The name of a step in steps.json."""
    return flags_of(costs_of(constants)) or "TVM"


def read_steps(path):
    """{step: milliseconds}. Raises UserError."""
    try:
        with open(path) as f:
            step_ms = {step: float(ms) for step, ms in json.load(f).items()}
        if not all(0 < ms < math.inf for ms in step_ms.values()):
            raise ValueError
        return step_ms
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged: delete it, and the steps are timed again") from None


def time_steps(protocol, a_round, tiny):
    """{step: milliseconds} of a round, from steps.json or measured now, by all GPUs.

    A step that cannot be made is left out; what went wrong is printed.
    """
    path = os.path.join(protocol.folder, "steps.json")
    step_ms = {}
    if os.path.exists(path):
        step_ms = read_steps(path)
    needed = {}
    for idea in a_round.seeds:
        change = IDEAS[idea].change
        needed[step_of(change)] = costs_of(change)
    missing = [(step, costs) for step, costs in needed.items() if step not in step_ms]
    gpus = study.visible_gpus() or [""]
    timers = []
    for i, gpu in enumerate(gpus):
        part = missing[i :: len(gpus)]
        if not part:
            continue
        command = [sys.executable, os.path.abspath(__file__), "--time", json.dumps(part)]
        if tiny:
            command.append("--tiny")
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
        timer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        timers.append(timer)
    try:
        for timer in timers:
            said, _ = timer.communicate()
            for line in said.splitlines():
                step_ms.update(json.loads(line))
    finally:
        for timer in timers:
            timer.kill()  # does nothing to one that has ended
    with written(path) as f:
        f.write(json.dumps(step_ms, indent=1).encode())
    return step_ms


def print_step_times(protocol, steps):
    """{step: milliseconds} of each of `steps`, (name, constants): a line of JSON each."""
    for step, constants in steps:
        try:
            print(json.dumps({step: study.time_step(protocol, constants)}), flush=True)
        except Exception:  # the other steps can be timed all the same
            print(f"{step} cannot be timed:", file=sys.stderr)
            traceback.print_exc()


# ---- the runs ------------------------------------------------------------------------------------


class RoundRuns(study.Runs):
    """The runs of a round. A run whose step could not be timed has failed."""

    def __init__(self, protocol, log, make_judge, step_ms, device, a_round):
        self.members = members_of(a_round)
        super().__init__(protocol, log, make_judge, step_ms, device)
        for run, constants in self.plan().items():
            if run not in self.done and step_of(constants) not in step_ms:
                self.failed[run] = "its step could not be timed"

    def plan(self):
        runs = {}
        for run, (idea, seed) in self.members.items():
            runs[run] = dict(IDEAS[idea].change, seed=seed)
        return runs

    def steps_of(self, constants):
        return study.steps_that_fit(self.protocol.seconds, self.step_ms[step_of(constants)])

    def line_of(self, run, line):
        idea, seed = self.members[run]
        change = IDEAS[idea].change
        of_run = dict(
            run=run,
            idea=idea,
            change=change,
            seed=seed,
            seconds=self.protocol.seconds,
            step=step_of(change),
            step_ms=rounded(self.step_ms[step_of(change)]),
        )
        for key, value in line.items():
            # Not the whole config: `change` and the log's settings say the same.
            if key in ("scores", "block_rms"):
                of_run[key] = rounded(value)
            elif key != "config":
                of_run[key] = value
        return of_run


def rounded(values):
    """Numbers with five digits, in dicts and lists of any depth."""
    if isinstance(values, dict):
        return {key: rounded(value) for key, value in values.items()}
    if isinstance(values, list):
        return [rounded(value) for value in values]
    return float(f"{values:.5g}")


def make_round(protocol, a_round, log, tiny):
    settings = settings_of(protocol)
    study.first_line_of(log, settings)  # complains of other settings now
    data_header, data, fresh = study.prepare_data(protocol)
    step_ms = time_steps(protocol, a_round, tiny)
    print("milliseconds of a step:", rounded(step_ms), flush=True)
    device = study.prepare_device()

    def make_judge():
        judge = Judge(protocol, fresh, data_header, data, device)
        first = dict(settings=settings, **study.here_and_now(), real=rounded(judge.real))
        study.begin_log(log, first)
        return judge

    runs = RoundRuns(protocol, log, make_judge, step_ms, device, a_round)
    runs.make_all()
    study.complain_of(runs.failed)


# ---- the command ---------------------------------------------------------------------------------


def parse():
    parser = options.Parser(description=__doc__)
    add = parser.add_argument
    add("--round", type=int, choices=list(ROUNDS), help="make its runs")
    add("--workers", type=int, help="runs at a time (default 12)")
    add("--log", help="default: log.jsonl in the record's folder")
    add("--report", action="store_true", help="from the log alone")
    add("--page", help="a page that the report's tables go to, after its marker")
    add("--tiny", action="store_true", help="a record of the size of a test")
    add("--time", metavar="STEPS", help="print the times of these steps, as JSON, alone")
    args = parser.parse_args()
    if args.round is None and not args.report and args.time is None:
        raise UserError("give --round=1, 2 or 3, or --report")
    if args.workers is not None and args.workers < 1:
        raise UserError("workers must be above 0")
    if args.round is not None and not args.tiny and not torch.cuda.is_available():
        raise UserError("no CUDA device here; --tiny needs none")
    return args


def main():
    args = parse()
    protocol = TINY if args.tiny else FULL
    if args.time is not None:
        print_step_times(protocol, json.loads(args.time))
        return
    log = args.log or os.path.join(protocol.folder, "log.jsonl")
    if args.round is not None:
        signal.signal(signal.SIGTERM, study.end_by_signal)  # so that the trainers are ended
        a_round = (TINY_ROUNDS if args.tiny else ROUNDS)[args.round]
        workers = args.workers or protocol.workers
        protocol = dataclasses.replace(protocol, seconds=a_round.seconds, workers=workers)
        with hold(protocol.folder):  # two at once would make all runs twice
            make_round(protocol, a_round, log, args.tiny)
    report(log, {**IDEAS, **LOST}, METHODS, os.path.basename(protocol.folder), args.page)


if __name__ == "__main__":
    options.run(main)
