"""
The tables and figures of record.py, from its log alone.

    python record.py --report [--log=FILE] [--page=FILE]

Beside the log it writes record-tables.md, record.png and, where the pictures of the runs lie there,
samples.png. (Of a log with a name of its own, NAME.jsonl, the first two are NAME-tables.md and
NAME.png.) The tables also go to the page, in the place of all that follows its marker.
"""

import os
import statistics
import sys
import textwrap
from typing import NamedTuple

from files import UserError, written
from study_report import (
    check_log,
    draw_samples,
    draw_scores,
    header,
    is_number,
    over_seeds,
    read_log,
    row,
    safe_name,
    step_title,
)

MARKER = "<!-- From here on: python record.py --report --page=THIS -->\n"


class Group(NamedTuple):
    """The runs of an idea, or of another average of their weights."""

    idea: str
    rate: str | None  # of the average, where it is not ema_eval's
    runs: list  # lines of the log
    failed: int  # runs that diverged

    def name(self):
        return self.idea if self.rate is None else f"{self.idea}, average {self.rate}"

    def values(self, nfe, key="features"):
        return [run["scores"][nfe][key] for run in self.runs]


def groups_of(lines):
    """The groups of the lines of one round, averages after their idea."""
    of_idea = {}
    for line in lines:
        of_idea.setdefault(line["idea"], []).append(line)
    groups = []
    for idea, of_this in of_idea.items():
        runs = [line for line in of_this if "scores" in line]
        groups.append(Group(idea, None, runs, len(of_this) - len(runs)))
        rates = sorted({rate for run in runs for rate in run.get("averages", {})})
        for rate in rates:
            averages = []
            for run in runs:
                if rate in run.get("averages", {}):
                    averages.append(dict(run, scores=run["averages"][rate]))
            groups.append(Group(idea, rate, averages, 0))
    return groups


def flags_of(constants):
    """As train.py's flags, without their dashes."""
    return " ".join(f"{name}={value}" for name, value in constants.items())


def interval(values):
    """(mean - deviation, mean + deviation); of one value there is no deviation."""
    mean = statistics.fmean(values)
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return mean - deviation, mean + deviation


def compared(baseline, values):
    """By what factor values are smaller than the baseline's, and whether the intervals overlap.

    One seed has no interval.
    """
    factor = statistics.fmean(baseline) / statistics.fmean(values)
    if len(values) == 1:
        return f"{factor:.2f}, one seed"
    low, high = interval(values)
    base_low, base_high = interval(baseline)
    overlap = low <= base_high and base_low <= high
    return f"{factor:.2f}, {'overlap' if overlap else 'apart'}"


def table_of_ideas(groups, ideas, nfes):
    """All groups of one round, beside TVM."""
    one = nfes[0]
    baseline = []
    for group in groups:
        if group.idea == "TVM" and group.rate is None:
            baseline = group.values(one)
    heads = ["idea", "change", "lines", "seeds", *map(step_title, nfes)]
    heads += ["TVM's distance / its, 1 step", "step, ms", "steps", "commit"]
    lines = header(heads)
    for group in groups:
        runs = group.runs
        seeds = str(len(runs))
        if group.failed:
            seeds += f", {group.failed} diverged"
        if not runs:
            lines.append(row([group.name(), "", "", seeds, *[""] * (len(heads) - 4)]))
            continue
        beside = ""
        if baseline and group.values(one) != baseline:
            beside = compared(baseline, group.values(one))
        cells = [
            group.name(),
            f"`{flags_of(runs[0]['change'])}`",
            str(ideas[group.idea].lines) if group.idea in ideas else "",
            seeds,
            *[over_seeds(group.values(nfe)) for nfe in nfes],
            beside,
            f"{runs[0]['step_ms']:.1f}",
            str(runs[0]["steps"]),
            ", ".join(sorted({run["commit"][:7] for run in runs})),
        ]
        lines.append(row(cells))
    return lines


def table_of_methods(groups, methods, nfes):
    """The methods alone, with more scores."""
    one = nfes[0]
    more = ["two-sample accuracy, 1 step", "label accuracy, 1 step"]
    lines = header(["method", "seeds", *map(step_title, nfes), *more])
    for group in groups:
        if group.idea in methods and group.rate is None and group.runs:
            cells = [over_seeds(group.values(nfe)) for nfe in nfes]
            cells += [over_seeds(group.values(one, key)) for key in ("two_sample", "label")]
            lines.append(row([group.idea, str(len(group.runs)), *cells]))
    return lines


def best_group(groups, nfes):
    """The one with the smallest distance at one step."""
    with_runs = [group for group in groups if group.runs]
    return min(with_runs, key=lambda group: statistics.fmean(group.values(nfes[0])))


def shared_timings(groups):
    """Which ideas have one timing for all of them, since their steps cost the same."""
    of_step = {}
    for group in groups:
        if group.runs and group.rate is None:
            of_step.setdefault(group.runs[0]["step"], []).append(group.idea)
    lines = []
    for members in of_step.values():
        if len(members) > 1:
            lines.append(wrapped(f"- One timing for: {'; '.join(members)}."))
    return [*lines, ""] if lines else []


def wrapped(item):
    """An item of a list, as lines of 100 columns."""
    return textwrap.fill(item, 100, subsequent_indent="  ", break_on_hyphens=False)


def text_of_tables(first, of_round, ideas, methods, nfes):
    """of_round: {seconds: its groups}."""
    real = first["real"]["features"]
    lines = [
        f"{first['device']}, torch {first['torch']}, {first['date']}; "
        f"{first['settings']['images']} images a score.",
        "Fréchet distance in features, mean ± standard deviation over seeds.",
        f"Fresh images in the samples' place have {real:.3f}.",
        "",
    ]
    for seconds, groups in of_round.items():
        best = best_group(groups, nfes)
        lines += [f"### {seconds:g} s a run", "", *table_of_ideas(groups, ideas, nfes), ""]
        lines += [
            f"The smallest distance at one step: {best.name()}, "
            f"{over_seeds(best.values(nfes[0]))}, seeds: {len(best.runs)}.",
            "",
            *shared_timings(groups),
        ]
    seconds = max(of_round)
    lines += [f"### Methods, {seconds:g} s a run", ""]
    lines += [*table_of_methods(of_round[seconds], methods, nfes), ""]
    lines += ["### Ideas and their sources", ""]
    tried = {group.idea for groups in of_round.values() for group in groups}
    for name, idea in ideas.items():
        if name in tried:
            lines.append(wrapped(f"- **{name}**: {idea.about} ({idea.source})"))
    return "\n".join(lines) + "\n"


# ---- figures -------------------------------------------------------------------------------------


def draw_figures(first, groups, methods, seconds, path, prefix):
    """The figure `path`, and samples.png beside it: the methods, and the best of all `groups`."""
    folder = os.path.dirname(path)
    nfes = [str(nfe) for nfe in first["settings"]["nfes"]]
    groups = [group for group in groups if group.runs]
    best = best_group(groups, nfes)
    shown = {}
    for group in groups:
        is_method = group.idea in methods and group.rate is None
        if is_method or group is best:
            shown[group.name()] = group.runs
    title = f"Equal training time, {seconds:g} s a run"
    draw_scores(shown, first, title, path)

    rows = []
    for group in groups:
        sheet = os.path.join(folder, f"{prefix}-{safe_name(group.runs[0]['run'])}.png")
        if group.name() in shown and group.rate is None and os.path.exists(sheet):
            rows.append((f"{group.idea}, 1 step", sheet, 0))
            if group.idea == "flow matching":
                rows.append((f"{group.idea}, {nfes[-1]} steps", sheet, -1))
    if rows:
        draw_samples(rows, nfes, os.path.join(folder, "samples.png"))
    else:
        print(f"no samples.png: the pictures of the runs do not lie in {folder}", file=sys.stderr)


# ---- all of it -----------------------------------------------------------------------------------


def report(log, ideas, methods, prefix, page=None):
    """Print the tables, and write tables and figures beside the log.

    ideas: {name: Idea}, of record.py. methods: names of ideas, for the table of methods. prefix: of
    the names of the runs' pictures. page: a file that the tables go to as well. Raises UserError.
    """
    first, runs = read_log(log)
    of_run = dict(idea=str, change=dict, seed=int, seconds=is_number)
    of_scored = dict(step=str, step_ms=is_number, steps=int, commit=str)
    check_log(log, "record.py", first, runs, {}, of_run, of_scored)
    nfes = [str(nfe) for nfe in first["settings"]["nfes"]]
    if not any("scores" in line for line in runs.values()):
        raise UserError(f"{log} has no run with scores yet")

    order = {idea: i for i, idea in enumerate(ideas)}
    lines = list(runs.values())
    lines.sort(key=lambda line: (order.get(line["idea"], len(order)), line["seed"]))
    of_round = {}  # {seconds: its groups}
    for seconds in sorted({line["seconds"] for line in lines if "scores" in line}):
        of_round[seconds] = groups_of([line for line in lines if line["seconds"] == seconds])

    text = text_of_tables(first, of_round, ideas, methods, nfes)
    print(text, end="")
    folder = os.path.dirname(log) or "."
    name = os.path.splitext(os.path.basename(log))[0]
    if name == "log":
        name = "record"
    with written(os.path.join(folder, f"{name}-tables.md")) as f:
        f.write(text.encode())
    if page:
        put_into_page(text, page)
    seconds = max(of_round)
    draw_figures(
        first, of_round[seconds], methods, seconds, os.path.join(folder, f"{name}.png"), prefix
    )


def put_into_page(text, page):
    """Put the tables in the place of all that follows the page's marker."""
    with open(page) as f:
        prose, marker, _ = f.read().partition(MARKER)
    if not marker:
        raise UserError(f"{page} has no line {MARKER.strip()}")
    with written(page) as f:
        f.write(f"{prose}{marker}\n{text}".encode())
