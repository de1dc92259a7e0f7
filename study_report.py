"""
The tables and figures of study.py, from its log alone. record.py uses what it can of this.

    python study.py --report [--log=FILE]

Beside the log it writes study-tables.md, study.png and, where the pictures of the runs lie there,
samples.png.
"""

import json
import math
import os
import re
import statistics
import sys

import numpy as np
from PIL import Image

from files import UserError, written
from pictures import new_figure, save_figure

SCORES = {
    "features": "Fréchet, features",
    "pixels": "Fréchet, pixels averaged 2x2",
    "label": "label accuracy",
    "two_sample": "two-sample accuracy",
    "of_samples": "of samples",
    "of_fresh": "of fresh images",
}
SAMPLES = (  # the rows of samples.png: title, method, which of the step counts
    ("TVM, 1 step", "tvm", 0),
    ("MeanFlow, 1 step", "meanflow", 0),
    ("flow matching, 1 step", "flow_matching", 0),
    ("flow matching, 50 steps", "flow_matching", -1),
)


# ---- the log -------------------------------------------------------------------------------------


def is_number(value):
    """Whether a value of a log is a number above 0, as all are that a report computes with."""
    return type(value) in (int, float) and 0 < value < 1e300


def is_share(value):
    return type(value) in (int, float) and 0 <= value <= 1


# What a report needs of a log: values of these types, or for which a function is true, and dicts
# with at least these keys.
FORM_OF_SCORES = {**dict.fromkeys(SCORES, is_share), "features": is_number, "pixels": is_number}
FORM_OF_FIRST = dict(
    settings=dict(nfes=list, images=int),
    real=FORM_OF_SCORES,
    device=str,
    torch=str,
    date=str,
)


def read_log(path):
    """(the first line, which has the settings; {run: its line}). Raises UserError."""
    try:
        with open(path) as f:
            texts = f.readlines()
        if texts and not texts[-1].endswith("}\n"):
            texts.pop()  # a kill may have cut it off
        lines = [json.loads(text) for text in texts]
        first = lines[0]
        first["settings"]  # or this is the log of something else
        runs = {line["run"]: line for line in lines[1:]}
        if not all(isinstance(run, str) for run in runs):
            raise ValueError("a run whose name is no text")
        if not all(is_number(ms) for ms in first.get("step_ms", {}).values()):
            raise ValueError("a step's time that is not above 0")
        return first, runs
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = str(error) or "no line in it"
        raise UserError(f"{path} is not the log of a study: {reason}") from None


def fits(value, form):
    """Whether a value has a form: a type or several, a function that is true for it, or a dict of
    the forms that keys must have."""
    if callable(form) and not isinstance(form, type):
        return form(value)
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return False
        return all(key in value and fits(value[key], form[key]) for key in form)
    return isinstance(value, form)


def check_log(path, script, first, runs, form_of_first, form_of_run, form_of_scored):
    """Raise UserError where a log lacks what a report needs.

    first, runs: of read_log. form_of_run: of every run's line. form_of_scored: what a line with
    scores has beside these.
    """
    wrong = None
    if not fits(first, {**FORM_OF_FIRST, **form_of_first}):
        wrong = "its first line"
    elif not first["settings"]["nfes"] or not all(map(is_number, first["settings"]["nfes"])):
        wrong = "the nfes of its first line"
    else:
        scores = {str(nfe): FORM_OF_SCORES for nfe in first["settings"]["nfes"]}
        for run, line in runs.items():
            form = form_of_run
            if "scores" in line:
                form = {**form_of_run, **form_of_scored, "scores": scores}
            if not fits(line, form):
                wrong = f"the line of {run}"
                break
    if wrong:
        raise UserError(f"{path} is not a log of {script}: {wrong} lacks something or is damaged")


def mean_distance(line):
    """What a learning rate is chosen by: the Frechet distance in features of a run.

    It is the geometric mean over the step counts, and infinite for a run that diverged.
    """
    if not line.get("scores"):
        return math.inf
    logs = [math.log(scores["features"]) for scores in line["scores"].values()]
    return math.exp(statistics.fmean(logs))


def safe_name(run):
    """The name of a run as a part of a file's name."""
    return re.sub(r"[^\w.-]", "_", run)


class Results:
    """What the log has to say."""

    def __init__(self, log, methods):
        self.first, lines = read_log(log)
        of_first = dict(settings=dict(nfes=list, images=int, seconds=is_number), step_ms=dict)
        config = dict(lr=is_number, detach_jvp=bool)
        of_scored = dict(config=config, steps=int, block_rms=list)
        check_log(log, "study.py", self.first, lines, of_first, {}, of_scored)
        self.settings = self.first["settings"]
        self.nfes = [str(nfe) for nfe in self.settings["nfes"]]
        self.failed = [
            f"{run}: {line['failed']}" for run, line in lines.items() if "failed" in line
        ]
        self.done = {run: line for run, line in lines.items() if "scores" in line}
        self.rates = {}  # {method: the rates that were run, sorted}
        for method in methods:
            found = {line["config"]["lr"] for run, line in self.of(method)}
            if found:
                self.rates[method] = sorted(found)
        self.best = {}  # {method: the best rate}
        for method, rates in self.rates.items():
            self.best[method] = min(
                rates, key=lambda rate: mean_distance(self.seed_0(method, rate))
            )

    def of(self, method):
        return [(run, line) for run, line in self.done.items() if run.startswith(f"{method}-")]

    def seed_0(self, method, rate):
        return self.done[f"{method}-{rate:g}-0"]

    def all_seeds(self, method):
        """The runs of a method at its best rate."""
        start = f"{method}-{self.best[method]:g}-"
        return [line for run, line in self.done.items() if run.startswith(start)]

    def ablations(self):
        """{run: line}: first the runs of TVM that they are to be compared with."""
        ablations = {run: line for run, line in self.done.items() if run.startswith("ablation-")}
        runs = {}
        for line in ablations.values():
            same = f"tvm-{line['config']['lr']:g}-0"
            if same in self.done:
                runs[same] = self.done[same]
        runs.update(ablations)
        return runs


# ---- tables --------------------------------------------------------------------------------------


def row(cells):
    return f"| {' | '.join(cells)} |"


def header(cells):
    return [row(cells), "|" + "---|" * len(cells)]


def step_title(nfe):
    """nfe: text, as in a log."""
    return "1 step" if nfe == "1" else f"{nfe} steps"


def over_seeds(values):
    text = f"{statistics.fmean(values):.3f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.3f}"
    return text


def tables(results):
    """The lines of study-tables.md."""
    first = results.first
    settings = results.settings
    about = (
        f"{first['device']}, torch {first['torch']}, {first['date']}; "
        f"{settings['seconds']:g} s of training a run, {settings['images']} images a score, "
        f"settings {json.dumps(settings)}"
    )
    parts = [[about], table_of_methods(results), table_of_rates(results)]
    return [*joined(parts), *table_of_ablations(results), "", *results.failed]


def joined(parts):
    """Each part with an empty line after it."""
    lines = []
    for part in parts:
        lines += [*part, ""]
    return lines


def table_of_methods(results):
    """At the best rate: mean and deviation over the seeds."""
    lines = header(["method", "steps", *SCORES.values()])
    for method, rate in results.best.items():
        runs = results.all_seeds(method)
        about = (
            f"{method} ({runs[0]['steps']} training steps, "
            f"{results.first['step_ms'][method]:.1f} ms, lr {rate:g}, {len(runs)} seeds)"
        )
        for nfe in results.nfes:
            cells = [over_seeds([run["scores"][nfe][key] for run in runs]) for key in SCORES]
            lines.append(row([about, nfe, *cells]))
    real = [f"{results.first['real'][key]:.3f}" for key in SCORES]
    lines.append(f"| fresh images in their place | | {' | '.join(real)} |")
    return lines


def table_of_rates(results):
    steps = map(step_title, results.nfes)
    lines = header(["Fréchet, features, seed 0", "lr", *steps, "geometric mean"])
    for method, rates in results.rates.items():
        for rate in rates:
            line = results.seed_0(method, rate)
            cells = [f"{line['scores'][nfe]['features']:.3f}" for nfe in results.nfes]
            lines.append(row([method, f"{rate:g}", *cells, f"{mean_distance(line):.3f}"]))
    return lines


def table_of_ablations(results):
    one, *more = results.nfes
    heads = [f"{title}, {step_title(one)}" for title in SCORES.values()]
    heads += [f"Fréchet, features, {step_title(nfe)}" for nfe in more]
    rms = "RMS of blocks, first to last"
    lines = header(["TVM, seed 0", "training steps", "ms", *heads, rms])
    for run, line in results.ablations().items():
        timed = "detach_jvp" if line["config"]["detach_jvp"] else "tvm"
        cells = [line["scores"][one][key] for key in SCORES]
        cells += [line["scores"][nfe]["features"] for nfe in more]
        lines.append(
            row(
                [
                    run.removeprefix("ablation-"),
                    str(line["steps"]),
                    f"{results.first['step_ms'][timed]:.1f}",
                    *[f"{cell:.3f}" for cell in cells],
                    " ".join(f"{x:.1f}" for x in line["block_rms"]),
                ]
            )
        )
    return lines


# ---- figures -------------------------------------------------------------------------------------


def draw_scores(runs_of, first, title, path):
    """Scores over sampling steps: the mean and the range of the seeds.

    runs_of: {label: the lines of its runs}, which become curves. first: the log's first line.
    """
    nfes = first["settings"]["nfes"]
    names = [str(nfe) for nfe in nfes]
    figure = new_figure(figsize=(13, 4), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, key in zip(axes, ("features", "two_sample", "label"), strict=True):
        for i, (label, runs) in enumerate(runs_of.items()):
            values = [[run["scores"][nfe][key] for nfe in names] for run in runs]
            values = np.array(values)  # (seeds, nfes)
            axis.plot(nfes, values.mean(0), f"C{i}o-", label=label)
            axis.fill_between(nfes, values.min(0), values.max(0), color=f"C{i}", alpha=0.2)
        axis.axhline(first["real"][key], color="gray", ls=":", label="fresh images")
        yscale = "log" if key == "features" else "linear"
        axis.set(xscale="log", yscale=yscale, xlabel="sampling steps", ylabel=SCORES[key])
        axis.set_xticks(nfes, names)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[2].legend(loc="lower right")  # where no curve is
    figure.suptitle(f"{title} on {first['device']}; mean and range of seeds", fontsize=10)
    save_figure(figure, path)


def draw_samples(rows, nfes, path):
    """A row of samples for each of `rows`: (its title, the picture of a run, which of the nfes)."""
    figure = new_figure(figsize=(8, 0.9 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), squeeze=False)[:, 0]
    for axis, (title, file, which) in zip(axes, rows, strict=True):
        sheet = np.asarray(Image.open(file))
        gap = 2  # pixels between the rows of a sheet
        height = (sheet.shape[0] + gap) // len(nfes)
        top = range(len(nfes))[which] * height
        axis.imshow(sheet[top : top + height - gap], interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(title, rotation=0, ha="right", va="center")
        for spine in axis.spines.values():
            spine.set_visible(False)
    save_figure(figure, path)


# ---- all of it -----------------------------------------------------------------------------------


def report(log, methods, prefix):
    """Print the tables, and write tables and figures beside the log.

    methods: names, in the order of the tables. prefix: of the names of the runs' pictures.
    """
    results = Results(log, methods)
    folder = os.path.dirname(log) or "."
    text = "\n".join(tables(results))
    print(text)
    with written(os.path.join(folder, "study-tables.md")) as f:
        f.write(f"{text}\n".encode())
    runs_of = {method: results.all_seeds(method) for method in results.best}
    title = f"Equal training time, {results.settings['seconds']:g} s a run"
    draw_scores(runs_of, results.first, title, os.path.join(folder, "study.png"))

    rows = []
    for title, method, which in SAMPLES:
        if method in results.best:
            run = f"{method}-{results.best[method]:g}-0"
            sheet = os.path.join(folder, f"{prefix}-{safe_name(run)}.png")
            if os.path.exists(sheet):
                rows.append((title, sheet, which))
    if len(rows) == len(SAMPLES):
        draw_samples(rows, results.nfes, os.path.join(folder, "samples.png"))
    else:
        print(f"no samples.png: the pictures of the runs do not lie in {folder}", file=sys.stderr)
