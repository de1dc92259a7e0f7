"""
TVM beside MeanFlow and flow matching: one network, one trainer, one data set, equal training time.

    python study.py [--seconds=50] [--workers=9] [--images=5000]     # one GPU or several; the same command again goes on
    python study.py --report [--log=FILE]                            # tables and figure from the log alone
    python study.py --tiny                                           # all of it in a minute on a CPU, in out/study-tiny/; its numbers mean nothing

Everything is in out/study/: log.jsonl (a line of settings and step times, then one a run that finished or diverged), tables.md,
study.png, samples.png, the judge's weights, and of each run its samples (rows: steps, columns: classes) and what train.py said.
Checkpoints: out/study-RUN/.

The protocol, fixed before any run but for what is marked (*). Data: `shapes`, its preset (guidance 2, mu_s 0.4), with the network and
the evaluation EMA of NETWORK. Training time: each method's step is timed alone on the device (median of 60, compiled, by the wall
clock), and its runs have as many steps as fit into --seconds; so it does not matter that --workers runs share the device. Each method
runs at every rate of RATES with seed 0, and at twice the largest where that was best (*). The best rate has the smallest geometric mean,
over the step counts of NFES, of the Frechet distance in features, and is run with the other SEEDS. Ablations of TVM ("wider gaps" (*)):
seed 0, the middle rate, TVM's number of steps (detach_jvp: its own step is timed). Nothing else is tuned here. Scores: --images samples,
classes in turn, the same noise for all, against as many fresh images of the generator, which nobody trained on; "real" are fresh images
too. A convolutional classifier, trained on the training images, judges labels and gives the features (256); pixels are averaged 2x2 for
their Frechet distance. Two-sample accuracy is that of fid.py, given also for samples and fresh images apart: blurred samples, which are
everyone's nearest neighbours, can make it near 1 for the ones and under a half for the others.
"""
import itertools
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import bench
import fid
from dataset import load_dataset
from device import find_device
from files import HERE
from images import parallel
from model import Block, DiTConfig, load_model
from sample import draw, grid, sample, to_images
from shapes import draw_shape

METHODS = {
    "tvm": {},
    "meanflow": dict(objective="meanflow", times="two", p_equal=0.75, scaled=False, kappa=0.5),
    "flow_matching": dict(objective="flow_matching"),
}
NETWORK = dict(hidden_size=256, depth=6, num_heads=4, patch_size=4, batch_size=256, ema_eval=0.995)
RATES, SEEDS, NFES = (5e-4, 1e-3, 2e-3), (0, 1, 2), (1, 2, 4, 50)
ABLATIONS = {
    "unscaled": dict(scaled=False),
    **{f"ema_target {rate:g}": dict(ema_target=rate) for rate in (0.0, 0.9, 0.999)},
    "wider gaps": dict(mu=0.5), "gap": dict(times="gap"), "trunc": dict(times="trunc", mu=1.0), "clamp": dict(times="clamp", mu=1.0),
    "detach_jvp": dict(detach_jvp=True), "no Lipschitz control": dict(semi_lipschitz=False),
}
SCORES = {"features": "Fréchet, features", "pixels": "Fréchet, pixels", "label": "label accuracy", "two_sample": "two-sample accuracy",
          "of_samples": "of samples", "of_fresh": "of fresh images"}
FOLDER, TIMED = os.path.join("out", "study"), [*METHODS, "detach_jvp"]
options = dict(seconds=50.0, workers=9, images=5000, log="", time="", report=False, tiny=False)
dataset, size, count = "shapes", 32, 60000


def fail(message):
    sys.exit(f"study.py: {' '.join(str(message).split())}")


def read(path):
    """The lines of a log: (the settings, {run: line})."""
    try:
        with open(path) as f:
            lines = [json.loads(text) for text in f if text.endswith("}\n")]        # a kill may have cut the last off
        return lines[0], {line["run"]: line for line in lines[1:]}
    except (OSError, ValueError, IndexError, KeyError, TypeError) as error:
        fail(f"{path} is not the log of a study: {error or 'no line in it'}")


def write(line):
    with open(options["log"], "a") as f:
        f.write(json.dumps(line, allow_nan=False) + "\n")


# ---- what is run ---------------------------------------------------------------------------------

def spread(line):
    """What the rate is chosen by: the geometric mean of the Frechet distance over the step counts."""
    return math.exp(statistics.fmean(math.log(s["features"]) for s in line["scores"].values())) if "scores" in line else math.inf


def rates_of(method, done):
    """RATES, and twice the largest where that was best."""
    runs = [done.get(f"{method}-{rate:g}-0") for rate in RATES]
    return (*RATES, 2 * RATES[-1]) if None not in runs and min(runs, key=spread) is runs[-1] else RATES


def best_rate(method, done):
    return min(rates_of(method, done), key=lambda rate: spread(done[f"{method}-{rate:g}-0"]))


def plan(done):
    """{run: its constants} of all runs that are known by now, the most wanted first."""
    grid_runs = {f"{method}-{rate:g}-0": dict(flags, lr=rate, seed=0) for rate in (*RATES, 2 * RATES[-1])
                 for method, flags in METHODS.items() if rate in rates_of(method, done)}
    runs = dict(grid_runs)
    if set(grid_runs) <= set(done):
        for seed in SEEDS:
            runs |= {f"{method}-{best_rate(method, done):g}-{seed}": dict(flags, lr=best_rate(method, done), seed=seed)
                     for method, flags in METHODS.items()}
    return runs | {f"ablation-{name}": dict(flags, lr=RATES[len(RATES) // 2], seed=0) for name, flags in ABLATIONS.items()}


def command(run, constants, step_ms):
    timed = constants.get("objective", "tvm") if not constants.get("detach_jvp") else "detach_jvp"
    steps = max(1, round(options["seconds"] * 1e3 / step_ms[timed]))
    constants = dict(NETWORK, dataset=dataset, name=folder_of(run), steps=steps, save_every=steps, sample_every=steps, keep=1,
                     log_every=min(100, steps), score_images=1, **constants)
    return steps, [sys.executable, os.path.join(HERE, "train.py"), "--preset=shapes", *(f"--{key}={value}" for key, value in constants.items())]


def folder_of(run):
    return os.path.basename(FOLDER) + "-" + re.sub(r"[^\w.-]", "_", run)


def step_time(what):
    """Prints the median milliseconds of a step, timed while nothing else is."""
    cuda = torch.cuda.is_available()
    network = {key: NETWORK[key] for key in ("hidden_size", "depth", "num_heads", "patch_size")}
    detach = what == "detach_jvp"
    step = bench.stepper(DiTConfig(input_size=size, in_channels=3, num_classes=10, **network), NETWORK["batch_size"], compiled=cuda,
                         detach=detach, objective="tvm" if detach else what, device="cuda" if cuda else "cpu")
    for n in range(10):
        step(n)
    print(statistics.median(bench.milliseconds(step, 60 if cuda else 5)))


# ---- scores --------------------------------------------------------------------------------------

class Judge:
    """Fresh images, the classifier, and what of both is the same for all runs."""

    def __init__(self, fresh, header, data, device):
        n = len(fresh) // 2
        self.header, self.device, self.y = header, device, torch.arange(n) % 10
        self.held_out, real = fresh[:n], fresh[n:]
        self.noise = draw(0, range(n), header["shape"])[0]
        path = os.path.join(FOLDER, "judge.safetensors")
        if os.path.exists(path):
            self.net = fid.classifier(3, 10).to(device).eval()
            self.net.load_state_dict(load_file(path))
        else:
            self.net = fid.train_classifier(data["train_images"], data["train_labels"], 10, device)
            save_file(self.net.state_dict(), path + ".partial")
            os.replace(path + ".partial", path)
        self.reference = [fid.moments(part) for part in self.parts(self.held_out)]
        self.real = self.scores(real, torch.arange(n, 2 * n) % 10)

    @torch.no_grad()
    def parts(self, images):
        """The features, and the pixels that are compared, of uint8 (N, C, H, W)."""
        batches = torch.from_numpy(np.ascontiguousarray(images)).split(1000)
        features = torch.cat([self.net[:-1](batch.to(self.device).float() / 127.5 - 1).cpu() for batch in batches])
        return features, torch.cat([torch.nn.functional.avg_pool2d(batch / 255, 2) for batch in batches])

    def scores(self, images, y):
        features, pixels = (fid.frechet_distance(*there, *fid.moments(here)) for there, here in zip(self.reference, self.parts(images)))
        of_samples, of_fresh = fid.two_sample_accuracies(images, self.held_out)
        return dict(features=features, pixels=pixels, label=(fid.classify(self.net, images) == y).double().mean().item(),
                    two_sample=(of_samples + of_fresh) / 2, of_samples=of_samples, of_fresh=of_fresh)

    @torch.no_grad()
    def run(self, run, steps):
        """The line of a run that train.py has finished."""
        model, about = load_model(os.path.join("out", folder_of(run), "ckpt.safetensors"), self.device)
        w, euler, rms, scores, rows = about["guidance"]["w"], about["objective"] == "flow_matching", [], {}, []
        for nfe in NFES:
            images = []
            for x1, y in zip(self.noise.split(1000), self.y.split(1000)):
                x1, y = x1.to(self.device), y.to(self.device)
                images.append(to_images(sample(model, x1, y, torch.full((len(y),), w, device=self.device), nfe, euler), self.header))
            images = np.concatenate(images)
            rows.append(images[:10])
            scores[nfe] = self.scores(np.ascontiguousarray(images.transpose(0, 3, 1, 2)), self.y)

        def watched(block, x, c):
            x = Block.forward(block, x, c)
            rms.append(x.square().mean().sqrt().item())
            return x
        model.run_block = watched
        sample(model, x1, y, torch.full((len(y),), w, device=self.device), 1, euler)
        grid(np.concatenate(rows), 10).save(os.path.join(FOLDER, folder_of(run) + ".png"))
        return dict(run=run, steps=steps, commit=about["commit"], config=about["train"], scores=scores, block_rms=rms)


# ---- the study -----------------------------------------------------------------------------------

def start():
    """The settings, with the step times: those of the log, or measured now and written to it."""
    settings = dict(NETWORK, dataset=dataset, seconds=options["seconds"], images=options["images"], rates=RATES, seeds=SEEDS, nfes=NFES)
    settings = json.loads(json.dumps(settings))
    if os.path.exists(options["log"]):
        first = read(options["log"])[0]
        if first.get("settings") != settings:
            fail(f"{options['log']} is of a study with other settings: {first.get('settings')}, not {settings}; move out/study* away")
        return first
    step_ms = {}
    for what in TIMED:                                                              # one after the other: nothing else runs
        timer = subprocess.run([sys.executable, os.path.abspath(__file__), f"--time={what}", *["--tiny"] * options["tiny"]],
                               stdout=subprocess.PIPE, text=True)
        if timer.returncode:
            fail("timing the steps failed")
        step_ms[what] = float(timer.stdout.split()[-1])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return dict(settings=settings, device=device, torch=torch.__version__, step_ms=step_ms, date=time.strftime("%Y-%m-%d"))


def study():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))                         # so that what is below ends the runs
    os.makedirs(FOLDER, exist_ok=True)
    if not os.path.exists(os.path.join("data", dataset)):
        if subprocess.run([sys.executable, os.path.join(HERE, "prepare.py"), "shapes", "--name", dataset, "--size", str(size), "--n", str(count)]).returncode:
            fail("prepare.py shapes failed")
    header, data = load_dataset(os.path.join("data", dataset))
    fresh = np.stack(list(parallel(partial(draw_shape, size=size, seed=1), range(2 * options["images"]), "fresh shapes")))
    first = start()
    print("milliseconds of a step:", ", ".join(f"{what} {ms:.1f}" for what, ms in first["step_ms"].items()), flush=True)
    device = find_device()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.deterministic = True                                       # the same judge each time
    torch.set_num_threads(min(4, torch.get_num_threads()))                          # the other cores are the runs'
    judge = Judge(fresh, header, data, device)
    if not os.path.exists(options["log"]):
        write(dict(first, real=judge.real))
    done, active, failed = read(options["log"])[1], {}, {}
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "4", **({"OMP_NUM_THREADS": "1"} if device.type == "cuda" else {})}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    gpus = itertools.cycle(visible.split(",")[:torch.cuda.device_count()]) if device.type == "cuda" else None
    total = len(plan({})) + (len(SEEDS) - 1) * len(METHODS)
    with ThreadPoolExecutor(2) as scorer, tqdm(total=total, initial=len(done), desc="runs", unit="run") as bar:
        try:
            while True:
                for run, (job, steps) in list(active.items()):
                    said = os.path.join(FOLDER, folder_of(run) + ".txt")
                    if not isinstance(job, subprocess.Popen):
                        if job.done():
                            done[run] = job.result()
                            write(done[run])
                            del active[run]
                            bar.update()
                            bar.write(f"{run}: {steps} steps; Frechet in features " + ", ".join(f"{nfe}: {s['features']:.2f}" for nfe, s in done[run]["scores"].items()))
                    elif job.poll() == 0:
                        active[run] = scorer.submit(judge.run, run, steps), steps
                    elif job.poll() is not None:
                        with open(said) as f:
                            last = ([line for line in re.split(r"[\r\n]", f.read()) if line] or ["said nothing"])[-1]
                        del active[run]
                        if "was not finite" in last:                                # a result, too
                            done[run] = dict(run=run, steps=steps, failed=last)
                            write(done[run])
                            bar.update()
                        else:
                            failed[run] = last
                        bar.write(f"{run}: {last}")
                runs = plan(done)                                                   # after what has just ended
                bar.total = max(bar.total, len(runs))
                for run, constants in runs.items():
                    training = sum(isinstance(job, subprocess.Popen) for job, _ in active.values())
                    if run not in done | active | failed and training < options["workers"]:
                        steps, words = command(run, constants, first["step_ms"])
                        with open(os.path.join(FOLDER, folder_of(run) + ".txt"), "w") as f:
                            devices = {"CUDA_VISIBLE_DEVICES": next(gpus)} if gpus else {}
                            active[run] = subprocess.Popen(words, stdout=f, stderr=f, env=environment | devices), steps
                if not active:
                    break
                time.sleep(0.1)
        finally:
            trainers = [job for job, _ in active.values() if isinstance(job, subprocess.Popen)]
            for trainer in trainers:
                trainer.terminate()                                                 # train.py saves, and goes on from there
            for trainer in trainers:
                trainer.wait()
    if failed:
        fail(f"{len(failed)} runs failed, which the same command tries again: {', '.join(failed)}")


# ---- the report ----------------------------------------------------------------------------------

def over_seeds(values):
    return f"{statistics.fmean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def report():
    first, done = read(options["log"])
    failed = [f"{run}: {line['failed']}" for run, line in done.items() if "failed" in line]
    done = {run: line for run, line in done.items() if "scores" in line}
    rates = {method: sorted({line["config"]["lr"] for run, line in done.items() if run.startswith(method + "-")}) for method in METHODS}
    rates = {method: found for method, found in rates.items() if found}
    best = {method: min(found, key=lambda rate: spread(done[f"{method}-{rate:g}-0"])) for method, found in rates.items()}
    chosen = {method: [line for run, line in done.items() if run.startswith(f"{method}-{rate:g}-")] for method, rate in best.items()}
    nfes = [str(nfe) for nfe in first["settings"]["nfes"]]
    text = [f"{first['device']}, torch {first['torch']}, {first['date']}; {first['settings']['seconds']:g} s of training a run, "
            f"{first['settings']['images']} images a score, settings {json.dumps(first['settings'])}", ""]
    text += ["| method | steps | " + " | ".join(SCORES.values()) + " |", "|" + "---|" * (2 + len(SCORES))]
    for method, lines in chosen.items():
        for nfe in nfes:
            cells = [over_seeds([line["scores"][nfe][key] for line in lines]) for key in SCORES]
            text.append(f"| {method} ({lines[0]['steps']} training steps, {first['step_ms'][method]:.1f} ms, lr {best[method]:g}, {len(lines)} seeds) "
                        f"| {nfe} | " + " | ".join(cells) + " |")
    text += ["| fresh images in their place | | " + " | ".join(f"{first['real'][key]:.3f}" for key in SCORES) + " |", ""]
    text += ["| Fréchet, features, seed 0 | lr | " + " | ".join(f"{nfe} steps" for nfe in nfes) + " | geometric mean |", "|" + "---|" * (3 + len(nfes))]
    for method, found in rates.items():
        for rate in found:
            line = done[f"{method}-{rate:g}-0"]
            text.append(f"| {method} | {rate:g} | " + " | ".join(f"{line['scores'][nfe]['features']:.3f}" for nfe in nfes) + f" | {spread(line):.3f} |")
    ablations = {run: line for run, line in done.items() if run.startswith("ablation-")}
    same = [f"tvm-{line['config']['lr']:g}-0" for line in ablations.values()]
    ablations = {run: done[run] for run in same if run in done} | ablations
    heads = [f"{SCORES[key]}, {nfe} step" for nfe in nfes[:1] for key in SCORES] + [f"Fréchet, features, {nfe} steps" for nfe in nfes[1:]]
    text += ["", "| TVM, seed 0 | training steps | ms | " + " | ".join(heads) + " | RMS of blocks, first to last |", "|" + "---|" * (4 + len(heads))]
    for run, line in ablations.items():
        ms = first["step_ms"]["detach_jvp" if line["config"]["detach_jvp"] else "tvm"]
        cells = [line["scores"][nfes[0]][key] for key in SCORES] + [line["scores"][nfe]["features"] for nfe in nfes[1:]]
        text.append(f"| {run.removeprefix('ablation-')} | {line['steps']} | {ms:.1f} | " + " | ".join(f"{cell:.3f}" for cell in cells)
                    + f" | {' '.join(f'{x:.1f}' for x in line['block_rms'])} |")
    text += ["", *failed]
    print("\n".join(text))
    at = os.path.dirname(options["log"]) or "."
    with open(os.path.join(at, "tables.md"), "w") as f:
        f.write("\n".join(text) + "\n")

    figure = Figure(figsize=(13, 4), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, key in zip(axes, ("features", "two_sample", "label")):
        for i, (method, lines) in enumerate(chosen.items()):
            values = np.array([[line["scores"][nfe][key] for nfe in nfes] for line in lines])
            axis.plot(first["settings"]["nfes"], values.mean(0), f"C{i}o-", label=method)
            axis.fill_between(first["settings"]["nfes"], values.min(0), values.max(0), color=f"C{i}", alpha=0.2)
        axis.axhline(first["real"][key], color="gray", ls=":", label="fresh images")
        axis.set(xscale="log", xlabel="sampling steps", ylabel=SCORES[key], xticks=first["settings"]["nfes"], yscale="log" if key == "features" else "linear")
        axis.set_xticks(first["settings"]["nfes"], nfes), axis.minorticks_off(), axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(f"Equal training time, {first['settings']['seconds']:g} s a run on {first['device']}; mean and range of seeds", fontsize=10)
    figure.savefig(os.path.join(at, "study.png"), dpi=120)

    wanted = [("TVM, 1 step", "tvm", 0), ("MeanFlow, 1 step", "meanflow", 0), ("flow matching, 1 step", "flow_matching", 0), ("flow matching, 50 steps", "flow_matching", -1)]
    sheets = {method: os.path.join(at, folder_of(f"{method}-{rate:g}-0") + ".png") for method, rate in best.items()}
    if all(os.path.exists(sheets.get(method, "")) for _, method, _ in wanted):       # where the study ran: a row of each
        figure = Figure(figsize=(8, 3.6), layout="constrained")
        for axis, (title, method, row) in zip(figure.subplots(len(wanted)), wanted):
            sheet = np.asarray(Image.open(sheets[method]))
            height = (sheet.shape[0] + 2) // len(nfes)                              # rows lie 2 pixels apart
            first_line = row % len(nfes) * height
            axis.imshow(sheet[first_line:first_line + height - 2], interpolation="nearest"), axis.set(xticks=[], yticks=[])
            axis.set_ylabel(title, rotation=0, ha="right", va="center"), [spine.set_visible(False) for spine in axis.spines.values()]
        figure.savefig(os.path.join(at, "samples.png"), dpi=120)
    else:
        print(f"no samples.png: the pictures of the runs do not lie in {at}", file=sys.stderr)


def main():
    global RATES, SEEDS, ABLATIONS, NETWORK, FOLDER, dataset, size, count
    if {"-h", "--help"} & set(sys.argv):
        return print(__doc__)
    for argument in sys.argv[1:]:
        key, equals, value = argument.removeprefix("--").partition("=")
        kind = type(options.get(key))
        try:
            if key not in options or not argument.startswith("--") or bool(equals) == (kind is bool):
                raise ValueError
            options[key] = True if kind is bool else kind(value)
        except ValueError:
            fail(f"no option {argument!r}: {' '.join(__doc__.split(chr(10) * 2)[1].split())}")
    if options["tiny"]:
        RATES, SEEDS, ABLATIONS, NETWORK = (1e-3,), (0, 1), {"gap": dict(times="gap")}, dict(
            hidden_size=32, depth=1, num_heads=2, patch_size=2, batch_size=8, ema_eval=0.5)
        FOLDER, dataset, size, count = os.path.join("out", "study-tiny"), "tiny-shapes", 8, 300
        options.update(seconds=0.1, images=40, workers=2)
    options["log"] = options["log"] or os.path.join(FOLDER, "log.jsonl")
    if not min(options["seconds"], options["workers"], options["images"] - 9) > 0:
        fail("seconds and workers must be above 0, images at least 10")
    if not torch.cuda.is_available() and not options["tiny"] and not options["report"]:
        fail("no CUDA device here; --tiny needs none")
    if options["time"]:
        return step_time(options["time"])
    if not options["report"]:
        study()
    report()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
