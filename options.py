"""
Options: the table of constants at the top of train.py, and the parser of the other scripts.
How every script ends is here, too: run and fail.

    steps  = Option(1600, "optimizer steps", least=1, later=True)      # one line a constant
    config = configure(options_of(globals()), PRESETS, __doc__, __file__)   # {name: value}

A value is the default, as edited in the file, unless the preset has another; a flag --name=value
beats both. A constant whose default is a whole number takes whole numbers only. One whose default
has a point or an exponent (0.0, 1e-8) takes any number.
"""

import argparse
import ast
import contextlib
import difflib
import math
import os
import sys
from concurrent.futures import BrokenExecutor
from typing import NamedTuple

from files import UserError

# What torch says in a RuntimeError that is no mistake in the code: a GPU or the host has no memory
# left, or another rank has ended.
OUTER_FAULTS = (
    "out of memory",
    "can't allocate memory",
    "by peer",
    "remote process exit",
    "DataLoader worker",
)


class Option(NamedTuple):
    """One constant of train.py. The type of its default is its type."""

    default: str | int | float | bool
    about: str  # what it is, for --help
    least: float = -math.inf  # the smallest value
    above: float = -math.inf  # values are larger than this
    most: float = math.inf  # the largest value
    below: float = math.inf  # values are smaller than this
    choices: tuple = ()  # the only values; empty: any
    later: bool = False  # a resumed run may have another value


def options_of(names):
    """The options among a module's names."""
    return {name: value for name, value in names.items() if isinstance(value, Option)}


def configure(options, presets, doc, file=None, arguments=None):
    """{name: value} of all options. Exits with one line where a flag or a value is wrong.

    presets: {name: {option: value}}; the option "preset" chooses one. doc: what --help says first.
    file: the path of the table, whose headings --help shows. arguments: the flags, by default
    those of the command line.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    wants_help = "-h" in arguments or "--help" in arguments
    flags = {}
    for argument in arguments:
        if argument not in ("-h", "--help"):
            name, value = parse_flag(argument, options)
            flags[name] = value
    config = {name: o.default for name, o in options.items()}
    preset = flags.get("preset", config["preset"])
    if preset:
        if preset not in presets:
            there_are = f"there are {', '.join(presets)}"
            fail(f"there is no preset {preset!r}; {did_you_mean(preset, presets, there_are)}")
        config.update(checked_preset(preset, presets[preset], options))
    config.update(flags)
    if wants_help:
        print(doc)
        print_options(options, config, presets, headings_of(file) if file else {})
        sys.exit()
    for name, value in config.items():
        complaint = out_of_range(name, value, options[name])
        if complaint:
            fail(complaint)
    return config


def checked_preset(preset, values, options):
    """The values of a preset, each of the type of its option."""
    checked = {}
    for name, value in values.items():
        if name not in options:
            fail(f"preset {preset}: there is no option {name!r}; {did_you_mean(name, options)}")
        kind = type(options[name].default)
        text = value if isinstance(value, str) else repr(value)
        checked[name] = parse_value(f"preset {preset}: {name}", text, kind)
    return checked


def parse_flag(argument, options):
    """The text "--lr=0.1" -> ("lr", 0.1)."""
    name, equals, text = argument.removeprefix("--").partition("=")
    if name not in options:
        fail(f"there is no option {name!r}; {did_you_mean(name, options)}")
    if not argument.startswith("--") or not equals:
        fail(f"write --{name}=VALUE, not {argument!r}")
    return name, parse_value(f"--{name}", text, type(options[name].default))


def parse_value(what, text, kind):
    """Text -> a value of a type: str, int, float or bool. `what` stands in the complaint."""
    if kind is str:
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = None
    if kind is float and type(value) is int and abs(value) < 1e300:
        value = float(value)
    is_finite = kind is not float or (type(value) is float and math.isfinite(value))
    if type(value) is not kind or not is_finite:
        takes = {
            int: "a whole number, as its default is",
            float: "a number",
            bool: "True or False",
        }
        fail(f"{what} takes {takes[kind]}, not {text!r}")
    return value


def did_you_mean(name, names, otherwise="--help lists them"):
    """The end of a complaint about a name: the names that are like it, or else `otherwise`."""
    near = difflib.get_close_matches(name, names)
    return f"did you mean {' or '.join(near)}?" if near else otherwise


def out_of_range(name, value, o):
    """What is wrong with a value, or None."""
    if o.choices and value not in o.choices:
        return f"{name} must be one of {', '.join(map(str, o.choices))}, not {value!r}"
    if isinstance(value, str):
        return None
    if not (o.least <= value <= o.most and o.above < value < o.below):
        return f"{name} must be {range_of(o)}, not {value}"
    return None


def range_of(o):
    """The range of an option in words, "at least 0 and below 1". Empty where it has none."""
    limits = []
    if o.least > -math.inf:
        limits.append(f"at least {o.least}")
    if o.above > -math.inf:
        limits.append(f"above {o.above}")
    if o.most < math.inf:
        limits.append(f"at most {o.most}")
    if o.below < math.inf:
        limits.append(f"below {o.below}")
    return " and ".join(limits)


def differences(old, config, options, changed=""):
    """Compare the constants `old` of an earlier run with `config`, with which it is to go on.

    changed: names, with commas between them, of constants that are to change. Returns three lists
    of text: "lr 0.002 -> 0.1" for what differs and must not, "warmup=10" for constants that the old
    run did not know, which have today's value, and "mlp='swiglu'" for what only the old one knew.
    """
    on_purpose = names_in(changed)
    wrong, new = [], []
    for name, value in config.items():
        if name not in old:
            new.append(f"{name}={value!r}")
        elif old[name] != value and not options[name].later and name not in on_purpose:
            wrong.append(f"{name} {old[name]!r} -> {value!r}")
    gone = [f"{name}={value!r}" for name, value in old.items() if name not in config]
    return wrong, new, gone


def refuse_idle_flags(arguments=None, **has_effect):
    """Exit for a flag of the command line that has no effect beside the other constants.

    has_effect: for each option, whether it has one. arguments: the flags, by default those given.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    for name, matters in has_effect.items():
        if not matters and any(flag.startswith(f"--{name}=") for flag in arguments):
            fail(f"--{name} has no effect with these constants: leave it out")


def names_in(text):
    return [name.strip() for name in text.split(",") if name.strip()]


def check_change(changed, options):
    """Exit where `changed`, names with commas between them, has one that is no option."""
    for name in names_in(changed):
        if name not in options:
            fail(f"change names {name!r}, which is no option; {did_you_mean(name, options)}")


def headings_of(file):
    """{name of an option: the comment on the line above it} of a file with a table of options."""
    headings = {}
    above = ""
    with open(file, encoding="utf-8") as f:
        for line in f:
            if " = Option(" in line and above.startswith("# "):
                headings[line.split()[0]] = above.removeprefix("# ").strip()
            above = line
    return headings


def print_options(options, config, presets, headings):
    """Print the options with the values that they would have, what each is, and its range.

    headings: {name: what stands above that option}.
    """
    flags = {name: f"--{name}={config[name]!r}" for name in options}
    width = max(len(flag) for flag in flags.values())
    width = min(width, 32)
    print("[later]: a resumed run may have another value.")
    for name, o in options.items():
        if name in headings:
            print(f"\n{headings[name]}")
        limits = f" ({range_of(o)})" if range_of(o) else ""
        later = " [later]" if o.later else ""
        print(f"    {flags[name]:<{width}}  {o.about}{limits}{later}")
        choices = presets if name == "preset" else o.choices
        if choices:
            print(f"    {'':<{width}}  one of {', '.join(map(str, choices))}")


def run(main):
    """Run the main() of a script. What goes wrong ends it with one line and an exit code above 0.

    A mistake of the user's, a disk that is full, a GPU without memory, another rank or process that
    has ended: one line. Ctrl-C: 130, as shells have it. A reader that goes away (| head) is no
    mistake: nothing is said. Any other error is a mistake in the code, and keeps its traceback.
    """
    set_up_streams()
    try:
        main()
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        end_for(error)
        raise


def end_for(error):
    """End the script as `run` says for this error. Returns where it is a mistake in the code."""
    if isinstance(error, KeyboardInterrupt):
        sys.exit(130)
    if isinstance(error, BrokenPipeError):
        # Python writes the rest of its output as it ends, which would fail once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    if isinstance(error, (UserError, OSError, MemoryError, BrokenExecutor)):
        fail(str(error) or "out of memory")
    if isinstance(error, RuntimeError) and any(words in str(error) for words in OUTER_FAULTS):
        fail(error)


def set_up_streams(errors_in_one_line=False):
    """Let names of files that are not UTF-8 be printed, and print to nowhere where >&- is given.

    errors_in_one_line: for train.py, which has no main(). It ends as `run` says, but never because
    a line or a progress bar cannot be printed: what it makes lies in files.
    """
    if sys.stdout is None:  # closed, by >&-
        sys.stdout = open(os.devnull, "w")
    if sys.stderr is None:  # closed, by 2>&-
        sys.stderr = open(os.devnull, "w", errors="backslashreplace")  # as Python's own
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    if errors_in_one_line:
        sys.stdout = LenientStream(sys.stdout)
        sys.stderr = LenientStream(sys.stderr)

        def hook(kind, error, trace):
            end_for(error)  # which raises SystemExit, and Python then exits with its code
            sys.__excepthook__(kind, error, trace)

        sys.excepthook = hook


class LenientStream:
    """A stream to print to. Text that cannot be written is lost, and raises nothing.

    The terminal may be closed, the reader of a pipe gone (| head), the disk with the log full.
    """

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        with contextlib.suppress(OSError):
            self.stream.write(text)

    def flush(self):
        with contextlib.suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


def fail(message):
    """End the script with one line."""
    sys.exit(f"{os.path.basename(sys.argv[0])}: {one_line(message)}")


def one_line(message):
    return " ".join(str(message).split())


class Parser(argparse.ArgumentParser):
    """argparse that complains in one line and takes no abbreviated options."""

    def __init__(self, **kwargs):
        kwargs.update(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
        super().__init__(**kwargs)

    def error(self, message):
        sys.exit(f"{self.prog.split()[0]}: {one_line(message)} (--help lists the options)")
