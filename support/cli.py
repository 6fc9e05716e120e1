"""The command line: a flag for each field of a dataclass, and the one way in which a program ends.

    @dataclass
    class Config:
        data: str = arg(REQUIRED, "JSON or JSON lines of records", positional=True)
        mode: str = arg("pad", "how a picture becomes tiles", choices=("pad", "crop"))
        lr: float = arg(1e-3, "peak learning rate", above=0)
        benchmark: tuple = arg((), "names of benchmarks")               # a tuple takes any number of words

    def main(argv=None):
        cfg = parse(Config, argv, description=__doc__)

    if __name__ == "__main__":
        sys.exit(run_program(main))

Type, default, help, choices and range of a flag stand on its field and nowhere else. Flags take _ for -, too.
"""

import argparse
import difflib
import inspect
import io
import os
import re
import sys
from dataclasses import field, fields
from math import inf
from operator import ge, gt, le, lt

from tqdm import tqdm

REQUIRED = object()                  # the default of a flag that must be given


class UserError(ValueError):
    """What the user gave is wrong: what was found, where, what to do. Programs print it and exit with 1."""


def arg(default, help, choices=(), positional=False, **limits):
    """A field that becomes a flag.

    choices: the words allowed beside the default; of a text with commas each part is looked up.
    limits: at_least, above, at_most, below. A number is at_least=0 and below infinity, if not said otherwise.
    """
    limits.setdefault("at_least", 0)
    if "at_most" not in limits:
        limits.setdefault("below", inf)
    metadata = {"help": help, "choices": choices, "positional": positional, "limits": limits}
    return field(default=default, metadata=metadata)


def parse(Config, argv=None, description="", defaults=None):
    """argv, else sys.argv[1:], -> a Config. `defaults` replace those of the fields, the command line both."""
    argv = sys.argv[1:] if argv is None else map(str, argv)
    argv = [re.sub("^--[^=]+", lambda flag: flag[0].replace("_", "-"), word) for word in argv]
    defaults = defaults or {}
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        description=description, formatter_class=raw, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for f in flag_fields(Config):
        add_flag(parser, f, defaults.get(f.name, f.default))
    found, unknown = parser.parse_known_args(argv)
    if unknown:
        known = {flag: action.help for action in parser._actions for flag in action.option_strings}
        flag = unknown[0].split("=")[0]
        words = flag.strip("-").replace("-", " ")
        alike = [flag for flag, text in known.items() if words in text]   # learning rate: --lr
        hint = nearest(flag, known) or nearest(flag, alike, cutoff=0)
        raise UserError(f"unknown argument {unknown[0]}{hint}; see --help")
    cfg = Config(**(defaults | vars(found)))
    check_values(cfg)
    return cfg


class Parser(argparse.ArgumentParser):
    def error(self, message):        # argparse's own way: forty lines of usage and exit code 2
        raise UserError(f"{message}; see --help")


def flag_of(name):
    return "--" + name.replace("_", "-")


def flag_fields(Config):
    """A class's own before those that it inherits; an empty help hides a field."""
    own = [name for cls in Config.__mro__ for name in inspect.get_annotations(cls)]
    return sorted((f for f in fields(Config) if f.metadata.get("help")), key=lambda f: own.index(f.name))


def add_flag(parser, f, default):
    text = f.metadata["help"].replace("%", "%%")
    if f.metadata["choices"]:
        text += f" ({', '.join(f.metadata['choices'])})"
    if default not in (REQUIRED, "", ()):
        shown = {True: "yes", False: "no", None: "auto"}[default] if f.type is bool else default
        text += f" (default {shown})"
    if f.metadata["positional"]:
        nargs = None if default is REQUIRED else "?"
        parser.add_argument(f.name, metavar=f.name.upper(), nargs=nargs, help=text)
        return
    if f.type is bool:
        kind = {"action": argparse.BooleanOptionalAction}
    elif f.type is tuple:
        kind = {"nargs": "+", "metavar": "TEXT", "action": "extend"}    # given again, it adds to its words
    else:
        kind = {"type": f.type, "metavar": {int: "N", float: "X", str: "TEXT"}[f.type]}
    parser.add_argument(flag_of(f.name), help=text, required=default is REQUIRED, **kind)


def check_values(cfg):
    """Every value is one of its choices and within its range."""
    for f in flag_fields(type(cfg)):
        name = f.name if f.metadata["positional"] else flag_of(f.name)
        value = getattr(cfg, f.name)
        if f.metadata["choices"] and value != f.default:
            for word in value if f.type is tuple else value.split(","):
                one_of(name, word or "''", f.metadata["choices"])
        for rule, limit in f.metadata["limits"].items():
            if f.type in (int, float) and not RULES[rule](value, limit):
                raise UserError(f"{name} {value}: must be {rule.replace('_', ' ')} {limit:g}")


RULES = {"at_least": ge, "above": gt, "at_most": le, "below": lt}       # NaN keeps none of them


def one_of(name, value, known):
    """UserError where `value` is none of the `known` words; an empty one passes."""
    if value and value not in known:
        raise UserError(f"{name} {value}: unknown{nearest(value, known)}. Known are {', '.join(known)}")


def nearest(word, known, cutoff=0.65):
    close = difflib.get_close_matches(word, known, n=1, cutoff=cutoff)
    return f"; did you mean {close[0]}?" if close else ""


class Bar(tqdm):
    """A bar on a terminal; elsewhere, as in a log file, a line a minute."""

    SECONDS = 60

    def __init__(self, *args, **options):
        self.on_terminal = sys.stderr.isatty()
        if not self.on_terminal:
            line = "{desc}: {n:,} of {total:,}, {remaining} left"
            waits = {"mininterval": self.SECONDS, "delay": self.SECONDS}
            options |= {"file": io.StringIO(), "bar_format": line, **waits}
        super().__init__(*args, dynamic_ncols=True, miniters=1, **options)

    def display(self, *args, **options):
        if self.on_terminal:
            return super().display(*args, **options)
        print(self, file=sys.stderr)


def pick_device(name):
    """cpu, cuda, cuda:N, mps or auto -> torch.device, one that is there."""
    import torch

    here = ["cpu"]                   # what there is, the fastest first
    if torch.backends.mps.is_available():                               # Apple's; nobody has tried it yet
        here.insert(0, "mps")
    if torch.cuda.is_available():
        here = ["cuda", *(f"cuda:{k}" for k in range(torch.cuda.device_count())), *here]
    if name not in ("auto", *here):
        raise UserError(f"--device {name}: PyTorch sees {', '.join(here)} here; choose one, or auto")
    return torch.device(here[0] if name == "auto" else name)


def run_program(program):
    """Call a program and return its exit code: 0 done, 1 an error in a line on stderr, 130 interrupted."""
    harden_output("stdout")
    harden_output("stderr")
    try:
        return program()
    except UserError as error:
        text = str(error)
        if text.startswith("Caught UserError in DataLoader worker"):    # torch wraps it in a traceback
            text = text.rpartition("UserError: ")[2].strip()
        print(f"error: {text}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def harden_output(name):
    """Writing there never fails: not of a character that it cannot encode, not because nobody reads on."""
    stream = getattr(sys, name)
    if stream is None:               # it was closed when the program began
        setattr(sys, name, open(os.devnull, "w", errors="backslashreplace"))
    elif stream is getattr(sys, f"__{name}__"):                         # not what a test put in its place
        file = io.BufferedWriter(PatientFile(stream.fileno(), "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(file, stream.encoding, "backslashreplace", line_buffering=True))


class PatientFile(io.FileIO):
    def write(self, data):
        try:
            return super().write(data)
        except OSError:              # of `| head`, or of a full disk
            return len(data)
