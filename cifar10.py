"""
The archives of CIFAR-10 from its authors' page, for `prepare.py cifar10`.

    names, batches = read_cifar10("cifar-10-python.tar.gz")     # or cifar-10-binary.tar.gz

They are read where they lie: nothing is unpacked. The first one holds pickles, which are read
without running anything in them.
"""

import os
import tarfile

import numpy as np

from files import ERRORS_OF_TAR
from header import DataError
from pickles import RefusedPickle, load_arrays


def read_cifar10(file):
    """The class names, and six batches (images (n, 3, 32, 32) uint8, labels (n,)): five to train
    on, then the test batch. Raises DataError."""
    try:
        with tarfile.open(file) as tar:
            members = {}
            for member in tar:
                if member.isfile() and member.size < 2**28:
                    members[os.path.basename(member.name)] = member
            # tarfile stops at a damaged header. Only at the file's end does gzip compare its
            # checksum.
            while tar.fileobj.read(2**20):
                pass
            is_python = "batches.meta" in members
            suffix = "" if is_python else ".bin"
            batch_names = [f"data_batch_{number}{suffix}" for number in range(1, 6)]
            batch_names.append(f"test_batch{suffix}")

            def content(name):
                return tar.extractfile(members[name]).read()

            if is_python:
                names = parse_python_names(content("batches.meta"))
                batches = [parse_python_batch(name, content(name)) for name in batch_names]
            else:
                names = content("batches.meta.txt").decode().split()
                batches = [parse_binary_batch(name, content(name)) for name in batch_names]
    except KeyError as error:
        raise DataError(
            f"{file}: no {error.args[0]} in it; is it cifar-10-python.tar.gz or "
            "cifar-10-binary.tar.gz?"
        ) from None
    except (DataError, RefusedPickle) as error:
        raise DataError(f"{file}: {error}") from None
    except ERRORS_OF_TAR as error:
        raise DataError(f"cannot read {file}: {error}") from None
    for batch_name, (_, labels) in zip(batch_names, batches):
        if labels.max() >= len(names):
            raise DataError(f"{file}: {batch_name} has a label {labels.max()} of {len(names)}")
    return names, batches


def parse_binary_batch(name, content):
    """Each image is one byte of label, then 3,072 bytes of pixels."""
    raw = np.frombuffer(content, np.uint8)
    if not len(raw) or len(raw) % 3073:
        raise DataError(f"{name} holds {len(raw)} bytes, not a multiple of 3,073")
    raw = raw.reshape(-1, 3073)
    return raw[:, 1:].reshape(-1, 3, 32, 32), raw[:, 0].astype(np.int64)


def parse_python_batch(name, content):
    """A pickle of Python 2, read without running it: a dict of pixels (n, 3072) and labels."""
    batch = load_arrays(content, encoding="bytes")
    is_batch = isinstance(batch, dict) and isinstance(batch.get(b"labels"), list)
    images = batch.get(b"data") if is_batch else None
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 2:
        raise DataError(f"{name} is not a batch of CIFAR-10")
    labels = batch[b"labels"]
    if images.shape[1] != 3072 or len(labels) != len(images) or not labels:
        raise DataError(f"{name} holds pixels {images.shape} and {len(labels)} labels")
    if not all(type(label) is int and 0 <= label < 256 for label in labels):
        raise DataError(f"{name} holds labels that are not whole numbers from 0")
    return images.reshape(-1, 3, 32, 32), np.array(labels, np.int64)


def parse_python_names(content):
    meta = load_arrays(content, encoding="bytes")
    names = meta.get(b"label_names") if isinstance(meta, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, bytes) for name in names):
        raise DataError("batches.meta holds no label_names")
    return [name.decode(errors="replace") for name in names]
