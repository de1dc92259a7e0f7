"""
Pickles, read without running them.

A pickle is a program: it names functions and calls them. Here none of those functions is imported.
A name is answered with one of the stand-ins below, or the pickle is refused.

    with mapped(path) as content:
        found = load_arrays(content)          # dicts, lists, text, numbers and numpy arrays
    batch = load_arrays(raw, encoding="bytes")    # of bytes in memory; text of Python 2 stays bytes

convert.py reads larger things, with stand-ins of its own: a RestrictedUnpickler. Every reader calls
check_pickle first, because a pickle of a few bytes can also ask for terabytes of memory.
"""

import contextlib
import io
import mmap
import pickle
import pickletools

import numpy as np

from files import UserError, first_line

# What modules were called in Python 2.
OLD_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}

# The arrays that are made: of plain numbers, in the names of numpy's dtypes.
DTYPES = {"b1", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8"}
BYTE_ORDERS = {"<", ">", "=", "|"}

PLAIN = (str, bytes, int, float, type(None))  # what comes out of a pickle as it is


class RefusedPickle(UserError):
    """A pickle that is not read, with the reason in one line."""


@contextlib.contextmanager
def mapped(path):
    """A file's content as an mmap, which takes no memory. Raises OSError; ValueError if empty."""
    with (
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        yield content


def check_pickle(content):
    """Raise an error where a pickle asks for much more memory than it fills itself.

    content: bytes or an mmap. Three kinds of numbers in a pickle ask for memory. The length of a
    text is checked by genops, which reads it. PUT n stores into memo slot n. Slots are numbered
    from 0 in order of use, so an honest n is below the number of opcodes so far; a huge n only
    allocates memory. A frame is no longer than the file.
    """
    for count, (opcode, number, _) in enumerate(pickletools.genops(content)):
        far_slot = "PUT" in opcode.name and number > count
        long_frame = opcode.name == "FRAME" and number > len(content)
        if far_slot or long_frame:
            raise pickle.UnpicklingError(
                f"{opcode.name} of {number}, after {count} opcodes in {len(content)} bytes"
            )


class RestrictedUnpickler(pickle.Unpickler):
    """An unpickler that imports nothing. Subclasses define `stand_in`."""

    def find_class(self, module, name):
        module = OLD_MODULES.get(module, module)
        found = self.stand_in(module, name)
        if found is None:
            raise RefusedPickle(f"it calls for {module}.{name}, which is not on the list of names")
        return found

    def stand_in(self, module, name):
        """What the pickle gets when it asks for module.name; None refuses the pickle."""
        raise NotImplementedError


# ---- numpy arrays --------------------------------------------------------------------------------


def load_arrays(content, encoding="latin1"):
    """What a pickle holds: dicts, lists, tuples, text, bytes, numbers and numpy arrays.

    content: bytes or an mmap. encoding: of text that Python 2 has written; "bytes" leaves it as
    bytes. Arrays are of the DTYPES above; some are read-only. Everything else raises RefusedPickle.
    """
    file = io.BytesIO(content) if isinstance(content, bytes) else content
    try:
        check_pickle(content)
        file.seek(0)
        return with_arrays(ArrayUnpickler(file, encoding=encoding).load(), {})
    except RefusedPickle as error:
        raise RefusedPickle(first_line(error)) from None
    except Exception as error:  # pickle, pickletools and numpy raise many kinds
        kind = type(error).__name__
        raise RefusedPickle(f"not a whole pickle of arrays: {kind}: {first_line(error)}") from None


class HeldDtype:
    """A dtype as a pickle describes it: numpy.dtype("f8", False, True), then a state."""

    def __init__(self, name, *_):
        self.name = as_text(name)
        self.byte_order = "="

    def __setstate__(self, state):
        self.byte_order = as_text(state[1])  # (version, byte order, ...)

    def dtype(self):
        if self.name not in DTYPES or self.byte_order not in BYTE_ORDERS:
            raise RefusedPickle(f"an array of {self.name!r}, which is not one of plain numbers")
        return np.dtype(self.byte_order + self.name)


class HeldArray:
    """An array as a pickle describes it: made empty, then a state with all that it is."""

    def __init__(self, *_):
        self.state = None

    def __setstate__(self, state):
        self.state = state

    def array(self):
        _, shape, held_dtype, by_columns, raw = self.state
        flat = np.frombuffer(as_bytes(raw), held_dtype.dtype())
        return flat.reshape(shape, order="F" if by_columns else "C")


def array_from_buffer(raw, dtype, shape, order):
    """How protocol 5 makes an array: the same parts in another order."""
    held = HeldArray()
    held.state = (1, shape, dtype, order == "F", raw)
    return held


def number_from_bytes(held_dtype, raw):
    """A numpy number, as one of Python."""
    return np.frombuffer(as_bytes(raw), held_dtype.dtype()).reshape(()).item()


def bytes_from_text(text, encoding):
    """How protocols 0 to 2 of Python 3 write bytes."""
    if encoding != "latin1":
        raise RefusedPickle(f"bytes that are encoded as {encoding!r}")
    return text.encode("latin1")


def empty_bytes():
    """How they write no bytes at all. (The real `bytes` takes a size, which asks for memory.)"""
    return b""


class ArrayUnpickler(RestrictedUnpickler):
    STAND_INS = {
        "numpy.ndarray": HeldArray,
        "numpy.dtype": HeldDtype,
        "numpy.core.multiarray._reconstruct": HeldArray,
        "numpy.core.multiarray.scalar": number_from_bytes,
        "numpy.core.numeric._frombuffer": array_from_buffer,
        "_codecs.encode": bytes_from_text,
        "builtins.bytes": empty_bytes,
    }

    def stand_in(self, module, name):
        full_name = f"{module}.{name}"
        full_name = full_name.replace("numpy._core.", "numpy.core.")  # numpy 2's name, numpy 1's
        return self.STAND_INS.get(full_name)


def with_arrays(thing, done):
    """The thing with numpy arrays where HeldArrays were. Dicts and lists are changed in place.

    done: what was returned for each thing, by its id. A pickle may hold one list in many places,
    and even in itself.
    """
    if isinstance(thing, PLAIN):
        return thing
    if id(thing) in done:
        return done[id(thing)]
    if isinstance(thing, HeldArray):
        done[id(thing)] = thing.array()
    elif isinstance(thing, tuple):
        done[id(thing)] = tuple([with_arrays(part, done) for part in thing])
    elif isinstance(thing, list):
        done[id(thing)] = thing
        for i, part in enumerate(thing):
            thing[i] = with_arrays(part, done)
    elif isinstance(thing, dict) and all(isinstance(key, PLAIN) for key in thing):
        done[id(thing)] = thing
        for key, part in thing.items():
            thing[key] = with_arrays(part, done)
    else:
        raise RefusedPickle(f"it holds a {type(thing).__name__}, which is not plain data")
    return done[id(thing)]


def as_text(text):
    return text.decode("latin1") if isinstance(text, bytes) else text


def as_bytes(text):
    return text.encode("latin1") if isinstance(text, str) else text
