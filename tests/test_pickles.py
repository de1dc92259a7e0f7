"""pickles.py: arrays come out of a pickle, and nothing of it runs."""

import io
import os
import pickle

import numpy as np
import pytest
from helpers import GREEDY, Calling

import pickles

ARRAYS = {
    "gray": np.arange(6, dtype=np.uint8).reshape(2, 3),
    "by columns": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    "big end first": np.arange(3, dtype=">i4"),
    "no dimension": np.array(2.5),
    "empty": np.zeros((0, 3), np.int64),
}


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_of_every_protocol(protocol):
    given = {"list": list(ARRAYS.values()), "tuple": (1, "text", b"", b"bytes"), "n": np.float64(3)}
    found = pickles.load_arrays(pickle.dumps(given, protocol))
    assert found["tuple"] == given["tuple"]
    assert found["n"] == 3 and type(found["n"]) is float
    for got, want in zip(found["list"], given["list"], strict=True):
        assert np.array_equal(got, want) and got.dtype == want.dtype and got.shape == want.shape


def test_a_batch_of_cifar10(folder):
    """A dict of bytes with a uint8 array and lists, which Python 2 has pickled."""
    raw = bytes(range(6))
    batch = (
        b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
        b"K\x00\x85U\x01b\x87R(K\x01K\x02K\x03\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x06" + raw + b"tb"
        b"U\x06labels](K\x03K\x05eU\x09filenames](U\x01aU\x01beu."
    )
    found = pickles.load_arrays(batch, encoding="bytes")
    assert found.keys() == {b"data", b"labels", b"filenames"}
    assert np.array_equal(found[b"data"], np.arange(6, dtype=np.uint8).reshape(2, 3))
    assert found[b"labels"] == [3, 5] and found[b"filenames"] == [b"a", b"b"]
    as_text = pickles.load_arrays(batch)
    assert as_text.keys() == {"data", "labels", "filenames"}
    assert np.array_equal(as_text["data"], found[b"data"])
    with open("batch", "wb") as f:
        f.write(batch)
    with pickles.mapped("batch") as content:
        assert pickles.load_arrays(content)["labels"] == [3, 5]


def test_lists_that_hold_one_another():
    """So often that all ways through them would take years; and one that holds itself."""
    chain = [np.arange(2)]
    for _ in range(60):
        chain = [chain, chain]
    loop = [chain]
    loop.append(loop)
    found = pickles.load_arrays(pickle.dumps(loop))
    assert found[1] is found and found[0][0] is found[0][1]


RAN = "open('ran', 'w').close()"
REFUSED = {
    "posix.system": Calling(os.system, "touch ran"),
    "builtins.eval": Calling(eval, RAN),
    "builtins.exec": b'c__builtin__\nexec\n(S"' + RAN.encode() + b'"\ntR.',
    "builtins.getattr": Calling(getattr, "text", "upper"),
    "io.open": Calling(io.open, "ran", "w"),
    "numpy.fromfile": [np.arange(2), Calling(np.fromfile, "a.npz")],
    "an array of 'O8'": np.array([None]),
    "an array of 'U1'": np.array(["a"]),
    "an array of 'c16'": np.arange(2) * 1j,
    "an array of 'V8'": np.zeros(2, [("a", "f4"), ("b", "i4")]),
    "holds a type": b"cnumpy\ndtype\n.",
    "holds a HeldDtype": np.dtype("f8"),
    "holds a function": b"]c_codecs\nencode\na.",
    "holds a dict": b"}c_codecs\nencode\nK\1s.",
    "holds a set": {1, 2},
    "encoded as 'rot13'": Calling(__import__("codecs").encode, "text", "rot13"),
    "cannot reshape array": pickle.dumps(np.arange(3.0), 4).replace(b"K\x03\x85", b"K\x07\x85"),
    "not a whole pickle": pickle.dumps(ARRAYS)[:-9],
    "pickle exhausted": b"",
    **GREEDY,
}


@pytest.mark.parametrize("word", REFUSED)
def test_refused(folder, word):
    content = REFUSED[word]
    if not isinstance(content, bytes):
        content = pickle.dumps(content)
    with pytest.raises(pickles.RefusedPickle) as error:
        pickles.load_arrays(content)
    assert word in str(error.value) and str(error.value).isprintable()
    assert os.listdir() == []
