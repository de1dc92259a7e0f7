"""
Pickles, read without running them.
"""
import mmap
import pickle
import pickletools
from contextlib import contextmanager


class FidError(ValueError):
    """Something about images, statistics or weights, in one line for the user."""


@contextmanager
def reading(path):
    """Whatever goes wrong with a file becomes one line."""
    try:
        yield
    except Exception as error:                  # zipfile, zlib, numpy, Pillow, pickle and torch raise many kinds
        text = str(error) if isinstance(error, FidError) else f"cannot read {path}: {type(error).__name__}: {error}"
        raise FidError("".join(filter(str.isprintable, text.strip().splitlines()[0]))[:500]) from None    # with words of a stranger's


class Held(list):
    """Stands in a pickle for an array, its type or their makers: keeps what it is given, and does nothing."""
    __init__, __setstate__ = lambda self, *args: list.__init__(self, args), list.extend


class Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        known = f"{module}.{name}".replace("._core.", ".core.")
        if known == "numpy.core.numeric._frombuffer":                  # protocol 5's: the same parts in another order
            return lambda raw, dtype, shape, order: Held(shape, dtype, order == "F", raw)
        if known not in ("numpy.ndarray", "numpy.dtype", "numpy.core.multiarray._reconstruct", "numpy.core.multiarray.scalar"):
            raise FidError(f"a pickle that asks for {module}.{name}, which no statistics need, is refused")
        return Held


def check_pickle(file):
    """Raises, in one of many kinds, where a number in a pickle would have its reader ask for much more memory than the file fills:
    a size, which the end of a map cuts, or a place to remember something in, which are counted from 0."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        for n, (opcode, number, _) in enumerate(pickletools.genops(mapped)):
            if "PUT" in opcode.name and number > n or opcode.name == "FRAME" and number > len(mapped):
                raise pickle.UnpicklingError(f"{opcode.name} of {number}, after {n} opcodes in {len(mapped)} bytes")
