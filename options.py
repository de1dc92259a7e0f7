"""
Options of every script.
"""
import argparse
import sys


class Parser(argparse.ArgumentParser):
    """Complains in one line, and takes no abbreviated options."""

    def __init__(self, **kwargs):
        super().__init__(**{**kwargs, "allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter})

    def error(self, message):
        sys.exit(f"{self.prog.split()[0]}: {' '.join(message.split())} (--help lists the options)")
