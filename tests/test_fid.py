"""fid.py and imageset.py: the scores, the command, and every file that a person may hand over."""

import contextlib
import errno
import functools
import glob
import io
import os
import pickle
import re
import struct
import subprocess
import sys
import types
import zipfile
import zlib

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
import torch.nn.functional as F
from helpers import (
    HERE,
    SMALL,
    SMALL_FID,
    full_disk,
    randn,
    run_script,
    seeded_inception,
    torchrun,
    write_dataset,
    write_picture,
)
from PIL import Image
from test_prepare import python_members, write_cifar10

import fid
import files
import images
import imageset
import inception
import scores
import statistics_files

OTHER_STATE = "is of other images, options or number of processes: delete it, or give another"

# ---- scores --------------------------------------------------------------------------------------


def test_inception_score():
    sure = 1e3 * F.one_hot(torch.arange(1000) % 20, 1008)
    assert np.allclose(fid.inception_score(sure, splits=1), (20, 0))
    assert np.allclose(fid.inception_score(torch.zeros(50, 1008)), (1, 0))
    logits = randn(95, 1008)
    p = scipy.special.softmax(logits.numpy(), 1)
    scores = []
    for rows in np.array_split(np.random.default_rng(0).permutation(95), 10):
        divergences = [scipy.stats.entropy(p[i], p[rows].mean(0)) for i in rows]
        scores.append(np.exp(np.mean(divergences)))
    assert np.allclose(fid.inception_score(logits), (np.mean(scores), np.std(scores)))


def distances(x, y):
    return np.linalg.norm(x[:, None] - y[None], axis=2)


def share_inside(x, y):
    """The share of x in the ball of any y, which reaches its third nearest."""
    radii = np.sort(distances(y, y), 1)[:, 3]  # the first is the point itself
    return (distances(x, y) <= radii).any(1).mean()


def test_precision_and_recall():
    a = randn(60, 3, seed=1).numpy()
    b = 1.5 * randn(45, 3, seed=2).numpy() + 0.5
    expected = share_inside(a, b), share_inside(b, a)
    assert 0 < share_inside(b, a) < 1
    for size in (2**25, 100):
        got = fid.precision_recall(torch.tensor(a), torch.tensor(b), size=size)
        assert got == pytest.approx(expected)
    a = torch.tensor(a)
    assert fid.precision_recall(a, a) == (1, 1)
    assert fid.precision_recall(a, a + 100) == (0, 0)
    with pytest.raises(fid.FidError, match="more than 3"):
        fid.precision_recall(a, a[:3])


# ---- set-up --------------------------------------------------------------------------------------

load_once = functools.cache(inception.load_inception)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "w.pth"
    torch.save(seeded_inception().state_dict(), path)
    return str(path)


@pytest.fixture
def pixels(folder, monkeypatch, weights):
    """22 images: the first 12 in the folder a and in a.npz, the others in b.npz.

    The network has one layer, and the distance takes no minute at 2048 dimensions.
    """
    owners = {
        "forward": inception.InceptionV3,
        "frechet_distance": fid,
        "load_inception": fid,
    }
    for name, owner in [*owners.items(), ("load_inception", inception)]:
        monkeypatch.setattr(owner, name, getattr(owner, name))  # put back afterwards
    exec(SMALL_FID, {})
    fid.load_inception = load_once
    os.symlink(weights, "w.pth")
    pixels = np.random.default_rng(0).integers(256, size=(22, 20, 24, 3), dtype=np.uint8)
    os.makedirs("a/below")
    for i in range(12):
        place = "a/below" if i > 8 else "a"
        Image.fromarray(pixels[i]).save(f"{place}/{i:02}.png")
    np.savez("a.npz", arr_0=pixels[:12])
    np.savez_compressed("b.npz", arr_0=pixels[12:])
    return pixels


def fid_main(*arguments):
    """What fid.py prints, or its one line of complaint."""
    always = ["--inception", os.path.realpath("w.pth"), "--batch=5"]
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            fid.main([*always, *map(str, arguments)])
        return out.getvalue()
    except (files.UserError, OSError, SystemExit) as error:
        assert "\n" not in str(error)
        return f"refused: {error}"


def numbers(text):
    """FID, Inception Score, precision and recall, as far as they are there."""
    assert not text.startswith("refused"), text
    return [float(x) for x in re.findall(r"(?:FID|Score|precision|recall) ([-\d.e]+)", text)]


def statistics(path="stats.npz"):
    return statistics_files.read_statistics(path)[:2]


@pytest.fixture
def moments(pixels):
    """(mean, covariance) of the features of a, and of b; and all features."""
    net = fid.load_inception(os.path.realpath("w.pth"))
    features = net(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    parts = [x.numpy() for x in features.double().split([12, 10])]
    return [(x.mean(0), np.cov(x.T)) for x in parts], features


# ---- the command ---------------------------------------------------------------------------------


def test_scores_of_images(pixels, moments, capfd):
    (of_a, of_b), features = moments
    of_folder = fid_main("a", "b.npz")
    of_npz = fid_main("a.npz", "b.npz")
    assert len(numbers(of_npz)) == 4
    assert numbers(of_folder) == pytest.approx(numbers(of_npz), rel=1e-5)
    assert "rank deficient" not in capfd.readouterr().err  # it is said beside the FID:
    assert " (too few images: 12 <= 2048) (too few images: 10 <= 2048)\n" in of_npz
    assert "seed 0; too few images: 12 <= 10 x" in of_npz
    assert numbers(of_npz)[0] == pytest.approx(fid.frechet_distance(*of_a, *of_b), rel=1e-4)
    expected = fid.precision_recall(features[:12], features[12:])
    assert numbers(of_npz)[2:] == pytest.approx(expected, abs=1e-4)


def test_saved_statistics(pixels, moments, capfd):
    (_, (mu, sigma)), _ = moments
    of_images = numbers(fid_main("a.npz", "b.npz"))
    assert fid_main("--save-stats", "a.npz", "of_a.npz") == ""
    said = capfd.readouterr().err
    assert "12 images for 2048 dimensions: the covariance is rank deficient" in said
    assert fid_main("--save-stats", "b.npz", "stats.npz") == ""
    saved_mu, saved_sigma = statistics()
    assert np.allclose(saved_mu, mu, atol=1e-5 * abs(mu).max())
    assert np.allclose(saved_sigma, sigma, atol=1e-5 * sigma.max())
    against = fid_main("a", "stats.npz")
    assert numbers(against) == pytest.approx(of_images[:2], rel=1e-5)  # no precision, no recall
    assert "12 <= 2048)\n" in against
    of_two = fid_main("stats.npz", "stats.npz")
    assert numbers(of_two) == [0] and "too few" not in of_two
    with open("stats.pkl", "wb") as f:
        pickle.dump({"fid": {"mu": saved_mu, "sigma": saved_sigma}}, f)
    assert fid_main("a", "stats.pkl") == against
    assert "does not compare with what is made with" in fid_main("a", "stats.npz", "--resize=torch")


def test_a_reference_of_both_kinds(pixels, moments):
    """ADM's batches: FID takes mu and sigma (here those of a), precision and recall the images."""
    (of_a, _), _ = moments
    of_images = numbers(fid_main("a.npz", "b.npz"))
    np.savez("adm.npz", arr_0=pixels[12:], mu=of_a[0], sigma=of_a[1])
    got = numbers(fid_main("a", "adm.npz"))
    assert got == pytest.approx([0, *of_images[1:]], rel=1e-3, abs=2e-3)
    # Where such a file is scored itself, its images are measured.
    assert numbers(fid_main("adm.npz", "b.npz"))[0] == pytest.approx(0, abs=1e-4)


def test_fid_of_live_images(pixels):
    assert fid_main("--save-stats", "b.npz", "stats.npz") == ""
    net = fid.load_inception(os.path.realpath("w.pth"))
    batches = torch.from_numpy(pixels[:12]).permute(0, 3, 1, 2).split(7)
    moments = fid.Moments(fid.FEATURES)
    for batch in batches:
        moments.add(net(batch))
    reference = fid.read_reference("stats.npz", net)
    live = fid.frechet_distance(*moments.mean_and_covariance(), *reference)
    assert live == pytest.approx(numbers(fid_main("a", "stats.npz"))[0], rel=1e-4)
    np.savez("narrow.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(fid.FidError, match="of 3 dimensions, where Inception's features have 2048"):
        fid.read_reference("narrow.npz", net)
    mu, sigma = statistics()
    np.savez("other.npz", mu=mu, sigma=sigma, notes="resize tf1, weights 12345678")
    with pytest.raises(fid.FidError, match="was made with resize tf1, weights 12345678"):
        fid.read_reference("other.npz", net)


def test_few_images(pixels, capfd):
    """What can be computed of 3 images is; what cannot is said. One image has no covariance."""
    np.savez("three.npz", arr_0=pixels[:3])
    np.savez("one.npz", arr_0=pixels[:1])
    text = fid_main("three.npz", "b.npz")
    assert len(numbers(text)) == 2
    assert text.endswith("need more than 3 images of each kind, not 3 and 10\n")
    assert "at least 2" in fid_main("one.npz", "b.npz")
    np.savez("none.npz", arr_0=pixels[:0])
    assert "no images in none.npz" in fid_main("none.npz", "b.npz")


def test_bad_options(pixels):
    os.makedirs("folder.npz")
    assert "folder.npz" in fid_main("--save-stats", "a", "folder.npz")
    assert "writes an .npz, not stats.pkl" in fid_main("--save-stats", "a", "stats.pkl")
    assert "--bach" in fid_main("a", "b.npz", "--bach", 3)
    assert "invalid choice" in fid_main("a", "b.npz", "--resize=tf2")
    assert "--batch is at least 1" in fid_main("a", "b.npz", "--batch=0")
    for wrong in (("a", "m.npz"), ("--save-stats", "a.npz", "m.npz")):
        text = fid_main(*wrong, "--size=16")
        assert "--size is at least 1 and goes with --save-stats of a folder" in text


def test_save_stats_wants_images(pixels, moments):
    (_, (mu, sigma)), _ = moments
    np.savez("b.stats.npz", mu=mu, sigma=sigma)
    text = fid_main("--save-stats", "b.stats.npz", "stats.npz")
    assert text == "refused: --save-stats takes images, and b.stats.npz holds statistics already"
    assert not os.path.exists("stats.npz")
    text = fid_main("b.stats.npz", "b.stats.npz", "--state=x")
    assert text == "refused: --state is for images, and both inputs are statistics"


def test_as_a_process(folder):
    command = [sys.executable, os.path.join(HERE, "fid.py"), "gone", "b.npz"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("fid.py: cannot read gone") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "environment, word",
    [
        ({"WORLD_SIZE": "2"}, "RANK"),
        ({"RANK": "x"}, "RANK must be a whole number"),
        (
            dict(WORLD_SIZE="2", RANK="0", LOCAL_RANK="0", MASTER_ADDR="::1", MASTER_PORT="abc"),
            "MASTER_PORT must be a whole number",
        ),
    ],
)
def test_a_part_of_torchruns_environment(pixels, monkeypatch, environment, word):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    text = fid_main("a", "b.npz")
    assert text.startswith("refused") and word in text


def test_one_writer_of_statistics(pixels):
    """Two at once would have written into one another's file."""
    other = files.open_locked("stats.npz" + files.PARTIAL)
    other.write(b"half")
    other.flush()
    text = fid_main("--save-stats", "a", "stats.npz")
    assert text.startswith("refused") and "another process is writing it" in text
    assert sorted(glob.glob("stats*")) == ["stats.npz" + files.PARTIAL]
    other.close()
    assert fid_main("--save-stats", "a", "stats.npz") == ""
    assert glob.glob("stats*") == ["stats.npz"]


@pytest.mark.parametrize(
    "arguments, file",
    [
        (("--save-stats", "a", "new/stats.npz"), "new/stats.npz"),
        (("a", "b.npz", "--state=new/state"), "new/state-0-0.npz"),
    ],
)
def test_what_cannot_be_written_is_said_before_the_work(pixels, monkeypatch, arguments, file):
    os.makedirs(file + files.PARTIAL)  # so that root cannot write it either
    with monkeypatch.context() as patch:
        patch.setattr(fid, "load_inception", None)  # calling it would be an error
        assert fid_main(*arguments) == f"refused: [Errno 21] Is a directory: '{file}'"
    os.rmdir(file + files.PARTIAL)
    assert not fid_main(*arguments).startswith("refused")
    assert os.path.exists(file)


def test_statistics_on_a_full_disk(pixels, monkeypatch):
    room = types.SimpleNamespace(free=10_000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: room)
    monkeypatch.setattr(fid, "load_inception", None)
    text = fid_main("--save-stats", "a", "stats.npz")
    assert text == "refused: stats.npz takes 33.6 MB, and its disk has 10.0 kB left"


def test_state_on_a_full_disk(pixels, capfd):
    """The score does not need it: it is told, and the work goes on."""
    whole = fid_main("a", "b.npz")
    with full_disk(100_000):  # a state has 33 MB
        assert fid_main("a", "b.npz", "--state=state") == whole
    said = capfd.readouterr().err
    assert "could not save --state: [Errno 27] File too large: 'state-0-0.npz'" in said
    assert not glob.glob("state*")


def test_statistics_behind_a_link(pixels):
    """The link stays, perhaps to a larger disk."""
    os.mkdir("large")
    os.symlink("large/stats.npz", "stats.npz")
    for source in ("a", "b.npz"):
        assert fid_main("--save-stats", source, "stats.npz") == ""
        assert os.path.islink("stats.npz")
        assert os.listdir("large") == ["stats.npz"]
    assert numbers(fid_main("b.npz", "large/stats.npz"))[0] == pytest.approx(0, abs=1e-4)


def test_images_of_two_sizes(pixels, capfd):
    """It is told; statistics note the size. Those without notes are taken as they are."""
    small = np.ascontiguousarray(pixels[:12, :8, :10])  # the others are 24 wide and 20 high
    np.save("small.npy", small)
    np.savez("columns.npz", arr_0=np.asfortranarray(small))
    write_data("small", small)
    os.mkdir("small")
    Image.fromarray(small[0]).save("small/0.png")
    for path in ("small.npy", "columns.npz", "data/small", "small"):
        assert imageset.open_images(path).image_size == "10x8"
    for path in ("a", "a.npz", "b.npz"):
        assert imageset.open_images(path).image_size == "24x20"
    assert imageset.open_images("a", size=9).image_size == "9x9"

    assert fid_main("--save-stats", "small.npy", "stats.npz") == ""
    mu, sigma, notes = statistics_files.read_statistics("stats.npz")
    assert notes.endswith(", images 10x8")
    np.savez("published.npz", mu=mu, sigma=sigma)
    for samples, reference, differs in (
        ("b.npz", "small.npy", True),
        ("b.npz", "stats.npz", True),
        ("small.npy", "stats.npz", False),
        ("b.npz", "published.npz", False),  # it does not say
    ):
        capfd.readouterr()
        assert numbers(fid_main(samples, reference))
        remark = f"{reference}: its images are 10x8 and the samples 24x20"
        assert (remark in capfd.readouterr().err) == differs


def test_save_stats_replaces_statistics_alone(pixels, moments, capfd):
    (of_a, _), _ = moments
    np.savez("keep.npz", arr_0=pixels)
    np.savez("adm.npz", arr_0=pixels, mu=of_a[0], sigma=of_a[1])
    np.savez("published.npz", mu=of_a[0], sigma=of_a[1])
    np.savez("odd.npz", mu=pixels, sigma=pixels, notes="")
    with open("text.npz", "w") as f:
        f.write("hello")
    os.symlink("a.npz", "link.npz")
    for name in ("a.npz", "link.npz"):
        text = fid_main("--save-stats", "a.npz", name)
        assert text == (
            f"refused: --save-stats would replace the images that it is to measure, {name}"
        )
    for name in ("keep.npz", "adm.npz", "published.npz", "odd.npz", "text.npz", "link.npz"):
        with open(name, "rb") as f:
            before = f.read()
        text = fid_main("--save-stats", "b.npz", name)
        assert text.startswith("refused") and text.endswith(f"its own statistics, and not {name}")
        with open(name, "rb") as f:
            assert f.read() == before
    assert "cannot read gone" in fid_main("--save-stats", "gone", "keep.npz")

    assert fid_main("--save-stats", "b.npz", "stats.npz") == ""
    of_b = statistics()
    assert "replaced" not in capfd.readouterr().err
    assert fid_main("--save-stats", "a", "stats.npz") == ""
    assert "fid.py: the statistics in stats.npz will be replaced\n" in capfd.readouterr().err
    assert not np.allclose(statistics()[0], of_b[0])


def test_other_dimensions_are_refused_before_the_work(pixels, monkeypatch):
    for dim in (32, 64):
        np.savez(f"d{dim}.npz", mu=np.zeros(dim), sigma=np.eye(dim))
    np.savez("both.npz", arr_0=pixels, mu=np.zeros(64), sigma=np.eye(64))
    monkeypatch.setattr(fid, "load_inception", None)  # calling it would be an error
    for samples, reference, each in (
        ("a", "d64.npz", "a has 2048 and d64.npz has 64"),
        ("d64.npz", "b.npz", "d64.npz has 64 and b.npz has 2048"),
        ("d64.npz", "d32.npz", "d64.npz has 64 and d32.npz has 32"),
        ("a", "both.npz", "a has 2048 and both.npz has 64"),
    ):
        text = fid_main(samples, reference)
        assert text == f"refused: only statistics of the same dimensions compare: {each}"


# ---- images that are cut -------------------------------------------------------------------------


@pytest.fixture
def mixed(pixels):
    """Images of many sizes and modes, as ImageNet's, and an .npz of the same, cut to 16 pixels."""
    os.makedirs("mixed")
    for i, (mode, *size) in enumerate((("RGB", 30, 20), ("L", 19, 40), ("CMYK", 70, 50))):
        Image.fromarray(pixels[i]).convert(mode).resize(size).save(f"mixed/{i}.JPEG")
    cut = [images.read_square(f"mixed/{i}.JPEG", 16).pixels.transpose(1, 2, 0) for i in range(3)]
    np.savez("cut.npz", arr_0=cut)


def test_size(mixed):
    assert fid_main("--save-stats", "mixed", "m.npz", "--size=16", "--state=m") == ""
    assert fid_main("--save-stats", "cut.npz", "c.npz") == ""
    for got, want in zip(statistics("m.npz"), statistics("c.npz"), strict=True):
        assert (got == want).all()
    text = fid_main("--save-stats", "mixed", "m.npz", "--size=8", "--state=m")
    assert OTHER_STATE in text


def test_size_leaves_out_what_cannot_be_read(mixed, capfd):
    """As prepare.py does. One image lies in a folder, four others behind a link."""
    assert fid_main("--save-stats", "mixed", "m.npz", "--size=16") == ""
    with open("mixed/2.JPEG", "rb") as f:
        start = f.read(300)
    with open("mixed/3.JPEG", "wb") as f:
        f.write(start)
    os.makedirs("linked/b")
    os.symlink("../mixed", "linked/a")
    os.rename("mixed/1.JPEG", "linked/b/1.JPEG")
    for path in ("linked", "linked", "mixed"):  # the second time all is done
        run = ("--save-stats", path, f"new/{path}.npz", "--size=16", f"--state=newer/{path}")
        assert fid_main(*run) == ""
    said = capfd.readouterr().err
    assert "skipped linked/a/3.JPEG: " in said and said.count("skipped") == 2, said
    assert "linked: 3 of 4 images could be read" in said
    got, want = statistics("new/linked.npz"), statistics("m.npz")
    assert np.allclose(got[1], want[1], rtol=1e-10, atol=1e-12)
    with np.load("newer/mixed-0-0.npz") as f:
        assert f["n"] == 2 and f["next"] == 3


def test_size_does_not_leave_out_what_a_disk_fails_to_give(mixed, monkeypatch):
    def fail(self):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("PIL.JpegImagePlugin.JpegImageFile.load", fail)
    text = fid_main("--save-stats", "mixed", "m.npz", "--size=16")
    assert text.startswith(f"refused: [Errno {errno.EIO}] Input/output error: 'mixed/")
    assert not os.path.exists("m.npz")


def test_size_does_not_turn_images(pixels, capfd):
    """EXIF's orientation 6 asks for a quarter turn, which prepare.py imagenet does not make either.

    They are PNGs that are named as JPEGs, which is said, too.
    """
    exif = Image.Exif()
    exif[0x0112] = 6
    os.makedirs("lying")
    for i in range(12):
        Image.fromarray(pixels[i]).save(f"lying/{i:02}.JPEG", format="PNG", exif=exif)
    crops = [images.centre_crop(Image.fromarray(x), 16) for x in pixels[:12]]
    np.savez("crops.npz", arr_0=[np.asarray(crop) for crop in crops])
    turned = images.read_square("lying/00.JPEG", 16).pixels.transpose(1, 2, 0)
    assert not np.array_equal(turned, crops[0])
    assert fid_main("--save-stats", "lying", "lying.npz", "--size=16") == ""
    said = capfd.readouterr().err
    assert "12 of another format than the name says" in said
    assert ": lying/00.JPEG is PNG\n" in said
    assert fid_main("--save-stats", "crops.npz", "upright.npz") == ""
    for got, want in zip(statistics("lying.npz"), statistics("upright.npz"), strict=True):
        assert (got == want).all()


# ---- what a person may hand over -----------------------------------------------------------------


def test_links_are_entered(pixels):
    os.makedirs("links")
    os.symlink("../a", "links/a")
    assert len(imageset.open_images("links")) == 12


def test_what_sample_py_writes_for_gray_models(pixels):
    """An .npz of one channel with labels beside it, and gray PNGs: three times the same channel."""
    gray = pixels[:12, ..., :1]
    np.savez("rgb.npz", arr_0=np.repeat(gray, 3, axis=3))
    np.savez("gray.npz", arr_0=gray, arr_1=np.arange(12))
    os.makedirs("gray")
    for i in range(12):
        Image.fromarray(gray[i, ..., 0]).save(f"gray/{i:02}.png")
    want = fid_main("rgb.npz", "b.npz")
    assert len(numbers(want)) == 4
    assert fid_main("gray.npz", "b.npz") == want
    assert fid_main("gray", "b.npz") == want


def test_arrays_in_other_clothes(pixels, capfd):
    """All are the images of a.npz."""
    np.savez("columns.npz", arr_0=np.asfortranarray(pixels[:12]))
    np.savez("named.npz", samples=pixels[:12], labels=np.arange(12))
    np.save("a.npy", pixels[:12])
    np.save("columns.npy", np.asfortranarray(pixels[:12]))
    with open("format3.npy", "wb") as f:
        np.lib.format.write_array(f, pixels[:12], version=(3, 0))
    with zipfile.ZipFile("format3.npz", "w") as archive:
        archive.write("format3.npy", "arr_0.npy")
    os.rename("a.npz", "no suffix")
    want = fid_main("no suffix", "b.npz")
    assert len(numbers(want)) == 4
    for name in (
        "columns.npz",
        "named.npz",
        "a.npy",
        "columns.npy",
        "format3.npy",
        "format3.npz",
    ):
        assert fid_main(name, "b.npz") == want
    assert "named.npz: its array samples is taken" in capfd.readouterr().err


def write_data(name, pixels):
    """Images (N, H, W, C) as data/NAME, the last of them to test on."""
    images = np.moveaxis(pixels, -1, 1)
    write_dataset(name, images.shape[1:], len(images) - 1, 1, classes=1, images=images)


def test_the_training_images_of_data(pixels):
    """data/NAME has the scores of its training images."""
    write_data("rgb", pixels[:13])
    want = fid_main("a.npz", "b.npz")
    assert len(numbers(want)) == 4
    assert fid_main("data/rgb", "b.npz") == want
    np.savez("gray.npz", arr_0=pixels[:12, ..., :1])
    write_data("gray", pixels[:13, ..., :1])
    assert fid_main("data/gray", "b.npz") == fid_main("gray.npz", "b.npz")
    assert fid_main("--save-stats", "data/rgb", "stats.npz") == ""
    assert fid_main("--save-stats", "a.npz", "stats_of_a.npz") == ""
    for found, expected in zip(statistics(), statistics("stats_of_a.npz"), strict=True):
        assert (found == expected).all()


def test_data_that_are_no_images(pixels):
    write_data("two", pixels[:3, ..., :2])
    assert "uint8 of 1 or 3 channels, not 2 channels" in fid_main("data/two", "b.npz")
    write_data("rgb", pixels[:3])
    options = ("--save-stats", "data/rgb", "stats.npz")
    assert "goes with --save-stats of a folder" in fid_main(*options, "--size=16")
    os.truncate("data/rgb/train_images.npy", 500)
    assert fid_main("data/rgb", "b.npz").startswith("refused: cannot read data/rgb")


def test_from_the_archive_of_cifar10_to_fids(pixels, monkeypatch, capsys):
    """The command of docs/data.md, at toy size."""
    monkeypatch.setattr(scores, "MOST_ELEMENTS", 0)  # no distance in pixels, which takes a minute
    write_cifar10("cifar-10-python.tar.gz", python_members())
    assert run_script("prepare.py", "cifar10", "cifar-10-python.tar.gz") is None
    assert fid_main("--save-stats", "data/cifar10", "cifar10.npz") == ""
    small = (*SMALL, "--patch_size=8", "--classifier=1-nn", "--steps=2")
    assert run_script("train.py", "--preset=cifar10", *small) is None
    options = ("--fid=cifar10.npz", "--inception=w.pth", "--n=20")
    capsys.readouterr()
    for nfe in (1, 2, 4):
        sampling = ("sample.py", "out/cifar10/ckpt.safetensors", f"--nfe={nfe}")
        assert run_script(*sampling, *options) is None
        said = capsys.readouterr().out
        assert "against cifar10.npz: 20 images in " in said
        assert numbers(said)[0] > 0


def test_a_zip_of_images(pixels):
    want = fid_main("a", "b.npz")
    with zipfile.ZipFile("a.zip", "w") as archive:
        for path in sorted(glob.glob("a/**/*.png", recursive=True)):
            archive.write(path)
    assert numbers(fid_main("a.zip", "b.npz")) == numbers(want)


def test_arrays_that_are_no_images(pixels):
    planes = pixels.transpose(0, 3, 1, 2)
    with open("b.npz", "rb") as f:
        start = f.read(2000)
    with open("cut.npz", "wb") as f:
        f.write(start)
    with open("text.npy", "wb") as f:
        f.write(b"\x93NUMPY nothing")
    np.save("float.npy", pixels / 255)
    np.save("object.npy", np.array([None]), allow_pickle=True)
    header = b"\x93NUMPY\x09\x01" + 99 * b" "
    with open("later.npy", "wb") as f:
        f.write(header)
    with zipfile.ZipFile("later.npz", "w") as archive:
        archive.writestr("arr_0.npy", header)
    for name, arrays, word in (
        ("float.npz", {"arr_0": pixels / 255}, "images must be uint8"),
        ("planes.npz", {"arr_0": planes}, "images must be uint8 .* np.moveaxis"),
        ("two.npz", {"x": pixels, "y": pixels}, "which are the images, x or y"),
        ("four.npz", {"arr_0": pixels[..., [0, 1, 2, 0]]}, "it holds arr_0 uint8"),
        ("words.npz", {"x": np.array(["a"]), "n": np.array(3)}, r"it holds x <U1 \(1,\), n int64"),
        ("object.npz", {"arr_0": np.array([None])}, "it holds arr_0 object"),
        ("nothing.npz", {}, "it holds no array"),
        ("cut.npz", None, "cannot read cut.npz"),
        ("text.npy", None, "cannot read text.npy"),
        ("float.npy", None, "images must be uint8"),
        ("object.npy", None, r"images must be uint8 \(N, H, W, 3\), not object \(1,\)"),
        ("later.npy", None, "cannot read later.npy: .* format 1.0, 2.0 or 3.0, not 9.1"),
        ("later.npz", None, "cannot read later.npz: .* format 1.0, 2.0 or 3.0, not 9.1"),
        ("complex.npz", {"arr_0": pixels * 1j}, "images must be uint8 .* arr_0 complex128"),
        ("w.pth", None, "w.pth"),
    ):
        if arrays is not None:
            np.savez(name, **arrays)
        text = fid_main(name, "b.npz")
        assert text.startswith("refused") and re.search(word, text), (name, text)


def test_an_array_that_is_not_whole(pixels):
    """A header may claim more than is there."""
    np.save("short.npy", pixels)
    with open("short.npy", "rb") as f:
        content = f.read()[:-9]
    with zipfile.ZipFile("short.npz", "w") as archive:
        archive.writestr("arr_0.npy", content)
    assert "short.npz: arr_0 is not whole" in fid_main("short.npz", "b.npz")
    with open("short.npy", "wb") as f:
        f.write(content)
    assert "cannot read short.npy" in fid_main("short.npy", "b.npz")


def png_chunk(kind, content):
    length = struct.pack(">I", len(content))
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return length + kind + content + checksum


def write_deep_png(path, values):
    """16-bit RGB, which Pillow does not write. values: (H, W, 3) uint16."""
    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    with open(path, "wb") as f:
        f.write(b"\x89PNG\r\n\x1a\n")
        f.write(png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)))
        f.write(png_chunk(b"IDAT", zlib.compress(rows)))
        f.write(png_chunk(b"IEND", b""))


def test_files_of_every_kind(pixels, capfd):
    """Each is read as RGB or left out by name: read + left out = all."""
    rgb = pixels[0]
    alpha = np.full(rgb.shape[:2], 255, np.uint8)
    alpha[:9] = 0
    upright = Image.fromarray(rgb)
    os.makedirs("odd/below/folder.jpg")
    upright.save("odd/00.png")
    upright.save("odd/01.jfif", format="JPEG")
    upright.save("odd/02.WEBP", format="WEBP", lossless=True)
    upright.save("odd/03.jpg", format="WEBP", lossless=True)
    upright.save("odd/04.bmp")
    upright.save("odd/05.tif")
    upright.convert("P").save("odd/06.png")
    upright.convert("L").save("odd/07.png")
    upright.convert("CMYK").save("odd/08.jpe", format="JPEG")
    Image.fromarray(np.dstack([rgb, alpha])).save("odd/09.png")
    Image.fromarray(rgb[..., 0].astype(np.uint16) * 257).save("odd/10.png")
    write_deep_png("odd/11.png", rgb.astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    lying = upright.transpose(Image.Transpose.ROTATE_90)
    lying.save("odd/12.jpg", exif=exif, quality=100, subsampling=0)
    upright.save(b"odd/13 \xe9.png".decode(errors="surrogateescape"))
    upright.save("odd/below/folder.jpg/14.png")
    upright.save("odd/._00.png")
    os.symlink("nowhere", "odd/nothing.png")
    for name in ("notes.txt", "Thumbs.db", ".hidden.png"):
        with open(f"odd/{name}", "w") as f:
            f.write("no image")

    found = imageset.open_images("odd")
    assert len(found) == 15
    for exact in (0, 2, 3, 4, 5, 11, 13, 14):
        assert np.array_equal(found[exact], rgb), found.files[exact]
    assert np.abs(found[12].astype(int) - rgb).mean() < 3  # a JPEG; of another turn it would be 85
    assert (found[7][..., 0] == found[7][..., 2]).all()
    assert (found[9][:9] == 255).all() and np.array_equal(found[9][9:], rgb[9:])
    assert np.array_equal(found[10], np.repeat(rgb[..., :1], 3, axis=2))
    said = capfd.readouterr().err
    assert "left out: 5" in said
    for name in ("._00.png", "nothing.png", "notes.txt", "Thumbs.db", ".hidden.png"):
        assert name in said
    assert len(numbers(fid_main("odd", "b.npz"))) == 4
    said = capfd.readouterr().err
    assert "1 of another format than the name says, read as what they are: " in said
    assert "odd/03.jpg is WEBP" in said


def test_folders_that_are_refused(pixels):
    """Names what is in the way. (A score of fewer images than given would be wrong.)"""
    for name in ("empty", "one", "sizes", "broken", "zero", "postscript", "gif"):
        os.makedirs(name)
        if name != "empty":
            Image.fromarray(pixels[0]).save(f"{name}/1.png")
    with open("empty/notes.txt", "w") as f:
        f.write("no image")
    Image.fromarray(pixels[0, :9]).save("sizes/2.png")
    with open("one/1.png", "rb") as f:
        whole = f.read()
    for path, content in (
        ("broken/2.png", whole[:500]),
        ("zero/2.png", b""),
        ("postscript/2.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n%%EOF\n"),
    ):
        with open(path, "wb") as f:
            f.write(content)
    Image.fromarray(pixels[0]).save("gif/2.png", format="GIF")
    for path, word in (
        ("empty", "no images in empty"),
        ("one", "at least 2"),
        ("sizes", "sizes/2.png is 24x9: all must be of one size, that of sizes/1.png, 24x20"),
        ("broken", "cannot read broken/2.png"),
        ("zero", "cannot read zero/2.png: the file is empty"),
        ("postscript", "cannot read postscript/2.png"),
        ("gif", "cannot read gif/2.png: it is none of JPEG, PNG, WebP, BMP and TIFF"),
        ("gone", "cannot read gone"),
    ):
        text = fid_main(path, "b.npz")
        assert text.startswith("refused") and word in text, text


def test_only_pictures_are_opened(folder, monkeypatch):
    """PostScript, say, is a program, which Pillow would have run."""
    write_picture(folder / "src" / "0.png")
    with open("src/1.png", "wb") as f:
        f.write(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n")
        f.write(b"showpage\n%%EOF\n")
    monkeypatch.setattr("PIL.EpsImagePlugin.EpsImageFile._open", lambda self: 1 / 0)
    assert "none of JPEG, PNG, WebP" in images.try_square("src/1.png", 8).reason
    assert images.read_square("src/0.png", 8).pixels.shape == (3, 8, 8)
    with pytest.raises(fid.FidError, match="1.png"):
        imageset.open_images("src")[1]
    Image.new("RGB", (1, 4000)).save("long.png")
    with pytest.raises(images.ImageError, match="^1x4000 is too long and thin$"):
        images.read_square("long.png", 256)


# ---- continuing, and several ranks ---------------------------------------------------------------


def test_fid_continues(pixels, monkeypatch):
    state = "state-0-0.npz"
    whole = fid_main("a", "b.npz")
    monkeypatch.setattr(fid, "SAVE_SECONDS", -1)
    broken = "a/below/11.png"
    with open(broken, "rb") as f:
        good = f.read()
    with open(broken, "r+b") as f:
        f.seek(900)
        f.write(b"\0" * 300)
    assert f"cannot read {broken}" in fid_main("a", "b.npz", "--state=state")
    assert os.path.exists(state)
    before = os.stat(broken).st_mtime_ns
    with open(broken, "wb") as f:
        f.write(good)
    # As many bytes, but others.
    assert OTHER_STATE in fid_main("a", "b.npz", "--state=state")
    os.utime(broken, ns=(before, before))  # as if only reading had failed

    counted = []
    read = imageset.FolderImages.__getitem__

    def counting(self, i):
        counted.append(i)
        return read(self, i)

    monkeypatch.setattr(imageset.FolderImages, "__getitem__", counting)
    assert fid_main("a", "b.npz", "--state=state") == whole
    assert sorted(counted) == [0, 10, 11]  # 0: its size is that of all
    counted.clear()
    assert fid_main("a", "b.npz", "--state=state") == whole
    assert counted == [0]  # all was done
    assert OTHER_STATE in fid_main("a", "b.npz", "--state=state", "--resize=torch")
    with open(state, "r+b") as f:
        f.truncate(1000)
    assert f"cannot read {state}" in fid_main("a", "b.npz", "--state=state")


TWO_RANKS = """
import os
from datetime import timedelta
import numpy as np
import torch.distributed as dist

rank = int(os.environ["RANK"])
meeting = "file://" + os.path.abspath("meeting")
dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)

# Moments of two shares are those of the whole.
x = torch.from_numpy(np.random.default_rng(0).normal(1e3, 1, (101, 4)))
moments = fid.Moments(4)
moments.add(x[:30] if rank == 0 else x[30:])
moments.all_reduce()
np.savez(f"moments{rank}.npz", **moments.state())

# A download that fails ends both ranks; one that works is rank 0's.
download = torch.hub.download_url_to_file

def recorded(*arguments):
    open(f"downloaded{rank}", "w").close()
    download(*arguments)

torch.hub.get_dir = lambda: "hub"
inception.URL = "file:///nowhere/w.pth"
try:
    inception.load_inception()
except fid.FidError as error:
    with open(f"error{rank}", "w") as f:
        f.write(str(error))
torch.hub.download_url_to_file = recorded
inception.URL = "file://" + os.path.abspath("w.pth")
with open("w.pth", "rb") as f:
    inception.SHA256 = inception.hashlib.sha256(f.read()).hexdigest()
assert inception.load_inception().digest == inception.SHA256
dist.destroy_process_group()

# The command. A rank may be slow, so the others wait for a day or more.
init = dist.init_process_group

def patient(*arguments, timeout, **options):
    assert timeout >= timedelta(days=1)
    init(*arguments, timeout=timedelta(seconds=60), **options)

dist.init_process_group = patient
sys.stdout = open(f"out{rank}", "w")
fid.main(["a", "b.npz", "--inception=w.pth", "--batch=5", "--state=two"])
"""


def test_fid_on_two_ranks(pixels):
    for file in glob.glob("a/**/*.png", recursive=True):
        os.rename(file, file[:-4] + ".jpg")  # which is said, once for both ranks
    whole = fid_main("a", "b.npz")
    with open("two.py", "w") as f:
        f.write(f"import sys\nsys.path.insert(0, {HERE!r})\n{SMALL_FID}\n{TWO_RANKS}")
    try:
        said = torchrun(os.path.abspath("two.py")).stderr.decode()
    except subprocess.CalledProcessError as error:
        pytest.fail(error.stderr.decode()[-3000:])
    x = np.random.default_rng(0).normal(1e3, 1, (101, 4))
    for rank in range(2):
        with np.load(f"moments{rank}.npz") as f:
            assert f["n"] == 101
            assert np.allclose(f["mean"], x.mean(0), rtol=1e-14)
            assert np.allclose(f["scatter"] / 100, np.cov(x.T), atol=1e-11)
        with open(f"error{rank}") as f:
            assert f.read().startswith("cannot read file:///nowhere/w.pth")
    assert said.count("of another format than the name says") == 1
    assert "12 of another format" in said
    assert glob.glob("downloaded*") == ["downloaded0"]
    with open("out0") as f:
        assert numbers(f.read()) == pytest.approx(numbers(whole), rel=1e-4, abs=2e-4)
    with open("out1") as f:
        assert f.read() == ""
    assert os.path.exists("two-0-1.npz")
