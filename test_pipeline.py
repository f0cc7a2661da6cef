"""Every behaviour of par.py and reid.py: values against formulas written here, and the real
commands on drawn people. It needs neither network nor data. Two tests have a long form:
KILLS=20 MUTATIONS=400 pytest -k "killed or mutated".
"""

import copy
import csv
import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

# Before PyTorch is imported: threads that spin take minutes on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import numpy as np
import pytest
import torch
from PIL import Image, ImageColor
from torch import nn
from torch.nn import functional as F
from torchvision import models
from torchvision.models.resnet import BasicBlock, ResNet

import common
import par
import reid
from common import ATTRIBUTES, CLASS_COUNTS, UserError, torch_load

HERE = Path(__file__).parent
SCRIPTS = {"par": par, "reid": reid}
KILLS = int(os.environ.get("KILLS", 1))
MUTATIONS = int(os.environ.get("MUTATIONS", 40))
QUICK = ["--epochs", "1", "--batch", "8", "--size", "32x32", "--device", "cpu"]


# ------------------------------------------------------------------------------------------
# What the tests share.


class NarrowResNet(ResNet):
    """ResNet18 with an eighth of the channels after its first layer: 1 MB instead of 45. Where
    NO_NORM is in the environment, without batch norm."""

    def __init__(self):
        norm_layer = nn.Identity if "NO_NORM" in os.environ else None
        super().__init__(BasicBlock, [2, 2, 2, 2], norm_layer=norm_layer)
        self.fc = nn.Linear(512 // 8, 1000)

    def _make_layer(self, block, planes, *rest, **named):
        return super()._make_layer(block, planes // 8, *rest, **named)


# What makes short runs short, also in the processes that import this file: a small network, no
# kernels of bfloat16 to prepare for each shape of a batch, no threads for steps of milliseconds, no
# waiting for the disk.
USERS_RESNET = common.make_resnet
USERS_PRECISION = common.precision
USERS_THREADS = torch.get_num_threads()
common.make_resnet = NarrowResNet
common.precision = lambda device: "float32"
os.fsync = lambda file: None
torch.set_num_threads(1)
# A shell's background job is started without Python's own handler of Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def as_users_have_it(monkeypatch):
    """Network, precision and threads of a user's run."""
    monkeypatch.setattr(common, "make_resnet", USERS_RESNET)
    monkeypatch.setattr(common, "precision", USERS_PRECISION)
    torch.set_num_threads(USERS_THREADS)
    yield
    torch.set_num_threads(1)


def call(module, *arguments):
    """Run a script as the command line does: -> its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        try:
            common.run(module.make_parser(), module.check_flags, module.main)
        except SystemExit as end:
            return end.code
    return 0


@pytest.fixture(scope="session")
def market(tmp_path_factory):
    """A drawn data set: 10 identities of 6 crops to train with, as many to test with, and a query
    of each of these."""
    root = tmp_path_factory.mktemp("drawn")
    common.draw_market(root, 10, 6, seed=1)
    return root


@pytest.fixture
def run(market, tmp_path, capsys):
    """A function that runs a command on `market`, on the CPU, with --out o.pt, and returns what it
    prints, (out, err). The command must end well or, with `error`, with code 2 and that text in the
    last line of stderr."""

    def run(module, *arguments, error=None, code=2):
        capsys.readouterr()
        out = tmp_path / "o.pt"
        end = call(module, "--data", market, "--device", "cpu", "--out", out, *arguments)
        said, err = capsys.readouterr()
        if error is None:
            assert end == 0, err
        else:
            assert end == code, err
            last = err.splitlines()[-1]
            assert error in last, err
            assert last.startswith(f"{module.__name__}.py: "), err
        return said, err

    return run


@pytest.fixture(scope="session")
def trained(market, tmp_path_factory):
    """A run of each stage: their best checkpoints .par and .reid, in .folder; beside them `lonely`,
    a data set of one crop of one person."""
    folder = tmp_path_factory.mktemp("trained")
    trained = SimpleNamespace(folder=folder, par=folder / "par.pt", reid=folder / "reid.pt")
    common.draw_market(folder / "lonely", 1, 1, seed=0)
    assert call(par, *short_run(par, market, trained), trained.par) == 0
    assert call(reid, *short_run(reid, market, trained), trained.reid) == 0
    return trained


def short_run(module, market, trained):
    """The arguments that `trained` runs with, but for the name after --out: 3 epochs of 4 steps."""
    shared = ["--data", market, "--epochs", 3, "--batch", 8, "--size", "64x32", "--device", "cpu"]
    if module is par:
        return [*shared, "--lr", 1e-3, "--out"]
    return [*shared, "--clusters", 3, "--init", trained.par, "--out"]


def press_ctrl_c():
    signal.raise_signal(signal.SIGINT)


def before_call(patch, owner, name, at, act=press_ctrl_c):
    """From now on do `act` before the at-th call of a function."""
    usual = getattr(owner, name)
    calls = itertools.count(1)

    def watched(*values, **named):
        if next(calls) == at:
            act()
        return usual(*values, **named)

    patch.setattr(owner, name, watched)


def start(*commands, torchrun=False, **environment):
    """Start commands, [script, arguments...] each, in turn in a process of this file, or by
    torchrun in two: -> subprocess.Popen."""
    if os.name == "nt" and (torchrun or environment):
        pytest.skip("takes libuv, which PyTorch lacks on Windows")
    launcher = []
    if torchrun:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = []
    for module, *arguments in commands:
        words += [module.__name__, *map(str, arguments), "then"]
    return subprocess.Popen(
        [sys.executable, "-u", *launcher, __file__, *words],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | environment,
    )


def record_of(path):
    """The record beside a checkpoint."""
    return json.loads(path.with_suffix(".json").read_text())


def files_of(folder):
    """Sizes and times of all files: equal to an earlier answer if nothing was written."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            found[path] = (path.stat().st_size, path.stat().st_mtime_ns)
    return found


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def picture_of(path):
    with Image.open(path) as picture:
        return picture.convert("RGB")


def crops_of(root):
    return sorted((root / "bounding_box_train").iterdir())


def some_classes(count, seed):
    """A class of each attribute, drawn: int64 [count, 12]."""
    generator = seeded(seed)
    columns = [torch.randint(0, n, (count,), generator=generator) for n in CLASS_COUNTS]
    return torch.stack(columns, 1)


def table_of(text, title, rows=None):
    """The rows of the first table whose title holds that, split at spaces, without its header."""
    table = text[text.index(title) :].split("\n\n")[0]
    return [line.split() for line in table.splitlines()[2:]][:rows]


class LossOf(nn.Module):
    """A function of (output, rows) as a loss for `common.fit`."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, output, rows):
        return self.function(output, rows)


def short_fit(model, data, items, out, loss, validate=None, **settings):
    """`common.fit` on given items [n, k], by default for an epoch of the report's recipe in batches
    of 8, with a validation that says 1 each time: -> its record."""
    defaults = {
        "seed": 0,
        "lr": 1e-3,
        "warmup": 0.5,
        "epochs": 1,
        "batch": 8,
        "patience": 5,
        "resume": False,
        "recipe": "report",
        "rungs": [],
        "device": "cpu",
        "out": out,
    }
    record = {"seconds": {}, "fingerprints": {}, "processes": 1}
    return common.fit(
        model,
        data.images,
        lambda generator: items,
        loss,
        validate or (lambda: {"f1": 1.0}),
        SimpleNamespace(**defaults | settings),
        {"kind": "par", "record": record},
    )


def brute_force(
    distances, query_ids, query_cameras, gallery_ids, gallery_cameras, keep, cross_camera
):
    """What `reid.rank_metrics` returns, by a loop over queries and ranks."""
    totals = []
    for q in range(len(distances)):
        ranking = sorted(range(distances.shape[1]), key=lambda g: (distances[q, g].item(), g))
        valid = []
        for g in ranking:
            same = gallery_ids[g] == query_ids[q]
            own_camera = cross_camera and same and gallery_cameras[g] == query_cameras[q]
            takes_part = distances[q, g] < math.inf
            if gallery_ids[g] != -1 and not own_camera and takes_part:
                valid.append(g)
        matches = sum(int(gallery_ids[g] == query_ids[q]) for g in valid)
        if matches == 0:
            continue
        returned = [g for g in valid if keep is None or keep[q, g]]
        ranks = [r for r, g in enumerate(returned, 1) if gallery_ids[g] == query_ids[q]]
        at = sum(k / rank for k, rank in enumerate(ranks, 1))
        just_before = 0
        for k, rank in enumerate(ranks):
            if rank == 1:
                just_before += 1
            else:
                just_before += k / (rank - 1)
        first = min(ranks, default=math.inf)
        all_found = len(ranks) == matches
        totals.append(
            {
                "mAP": at / matches,
                "mAP_trapezoid": (at + just_before) / 2 / matches,
                "rank1": first <= 1,
                "rank5": first <= 5,
                "rank10": first <= 10,
                "mINP": matches / ranks[-1] if all_found else 0,
                "precision": len(ranks) / max(1, len(returned)),
                "recall": len(ranks) / matches,
                "length": len(returned),
            }
        )
    means = {"queries": len(totals)}
    for name in reid.METRICS[:-1]:
        means[name] = np.mean([row[name] for row in totals]) if totals else math.nan
    return means


def in_sevens(queries, columns):
    """Instead of `reid.chunk_rows`: chunks that do not divide what the tests rank."""
    return [slice(i, i + 7) for i in range(0, queries, 7)]


def crops_of_people(count, spread):
    """Nine people, seen by three cameras, each one's centre and noise around it: `reid.Crops`."""
    generator = seeded()
    ids = torch.randint(1, 10, (count,), generator=generator)
    cameras = torch.randint(1, 4, (count,), generator=generator)
    centres = torch.randn(10, 8, generator=generator)
    noise = torch.randn(count, 8, generator=generator)
    return reid.Crops(centres[ids] + spread * noise, ids, cameras)


# ------------------------------------------------------------------------------------------
# The drawn data set.


def contents_of(root):
    """The bytes of all files of a folder, by their path in it."""
    contents = {}
    for path in files_of(root):
        contents[path.relative_to(root).as_posix()] = path.read_bytes()
    return contents


@pytest.fixture(scope="module")
def parts(market):
    """The three parts of the drawn data set: .train, .query, .gallery."""
    return SimpleNamespace(**{part: common.load_market(market, part) for part in common.PARTS})


def test_the_drawn_market_is_the_same_for_a_seed_and_another_for_another(tmp_path):
    for name, seed in (("first", 1), ("second", 1), ("other", 2)):
        common.draw_market(tmp_path / name, 3, 2, seed)
    first = contents_of(tmp_path / "first")
    assert contents_of(tmp_path / "second") == first
    for name, content in contents_of(tmp_path / "other").items():
        assert content != first.get(name)


def test_the_drawn_market_is_laid_out_like_market_1501(market):
    assert {path.name for path in market.iterdir()} == {
        "bounding_box_train",
        "bounding_box_test",
        "query",
        "annotations_train.csv",
        "annotations_test.csv",
        "drawn.txt",
    }
    assert len(crops_of(market)) == 10 * 6


def test_drawn_crops_have_the_labels_of_their_annotations(market, parts):
    for part, half in ((parts.train, "train"), (parts.query, "test")):
        annotations = common.read_annotations(market, half)
        expected = [annotations[person] for person in part.person_ids.tolist()]
        assert part.labels.tolist() == expected


def test_drawn_junk_and_distractors_and_only_these_have_no_labels(parts):
    gallery = parts.gallery
    assert {-1, 0} < set(gallery.person_ids.tolist())
    without = (gallery.labels == -1).all(1)
    assert torch.equal(without, gallery.person_ids < 1)
    assert (gallery.labels[~without] >= 0).all()


def test_each_drawn_identity_is_seen_by_two_cameras_or_more(parts):
    for part in (parts.train, parts.gallery):
        for person in part.person_ids.unique():
            if person > 0:
                assert len(part.camera_ids[part.person_ids == person].unique()) > 1


def test_no_drawn_identity_is_in_both_halves(parts):
    assert not torch.isin(parts.gallery.person_ids, parts.train.person_ids).any()


def test_each_drawn_test_identity_has_a_query_that_another_camera_can_find(parts):
    gallery = parts.gallery
    known = gallery.person_ids[gallery.person_ids > 0]
    assert parts.query.person_ids.tolist() == known.unique().tolist()
    for person, camera in zip(parts.query.person_ids, parts.query.camera_ids):
        matches = (gallery.person_ids == person) & (gallery.camera_ids != camera)
        assert matches.any()


def test_a_query_is_seen_by_another_camera_than_an_only_crop_in_the_gallery(tmp_path):
    common.draw_market(tmp_path, 4, 1, seed=0)
    query = common.load_market(tmp_path, "query")
    gallery = common.load_market(tmp_path, "gallery")
    known = gallery.person_ids > 0
    assert query.person_ids.tolist() == gallery.person_ids[known].tolist()
    assert (query.camera_ids != gallery.camera_ids[known]).all()


# ------------------------------------------------------------------------------------------
# Annotations.

UP_COLOURS = "black white red purple yellow gray blue green".split()
DOWN_COLOURS = "black white pink purple yellow gray blue green brown".split()


def annotation_row(person_id, hat, flags):
    """A person's line of the annotations: a dict of column -> code. Flags are 1, no, or 2, yes."""
    row = {
        "id": person_id,
        "age": 2,
        "backpack": 1,
        "bag": 2,
        "handbag": 1,
        "clothes": 2,
        "down": 1,
        "up": 2,
        "hair": 1,
        "hat": hat,
        "gender": 2,
    }
    for column in [f"up{name}" for name in UP_COLOURS] + [f"down{name}" for name in DOWN_COLOURS]:
        row[column] = 2 if column in flags else 1
    return row


def classes_called(names):
    """The places of an attribute's classes, named in the order of ATTRIBUTES."""
    return [own.index(name) for own, name in zip(ATTRIBUTES.values(), names.split())]


# Two people, and what their lines say.
ROWS = [
    annotation_row(1, hat=1, flags=["upred", "downbrown"]),
    annotation_row(2, hat=2, flags=["downblack"]),
]
LABELS = {
    1: classes_called("teenager female short short long pants no no yes no red brown"),
    2: classes_called("teenager female short short long pants yes no yes no multi black"),
}


def csv_text(rows):
    """Lines of the annotations as the text of a CSV file."""
    lines = [",".join(rows[0])]
    for row in rows:
        lines.append(",".join(str(row[column]) for column in rows[0]))
    return "\n".join(lines)


def with_columns_reversed(rows):
    return [dict(reversed(row.items())) for row in rows]


def read_csv(folder, text):
    """What is read from a file of that text, with the line ends of Windows."""
    data = text.replace("\n", "\r\n").encode()
    (folder / "annotations_train.csv").write_bytes(data)
    return common.read_annotations(folder, "train")


def save_mat(path, halves):
    """Write the authors' .mat: a dict of half -> lines of the annotations."""
    scipy = pytest.importorskip("scipy.io")
    fields = {}
    for half, rows in halves.items():
        columns = {}
        for name in rows[0]:
            if name == "id":
                ids = [f"{row['id']:04d}" for row in rows]
                columns["image_index"] = np.array(ids, object)
            else:
                columns[name] = np.array([row[name] for row in rows], np.uint8)
        fields[half] = columns
    scipy.savemat(path, {"market_attribute": fields}, do_compression=True)


def test_csv_annotations_are_read_by_column_name(tmp_path):
    assert read_csv(tmp_path, csv_text(ROWS)) == LABELS
    assert read_csv(tmp_path, csv_text(with_columns_reversed(ROWS))) == LABELS


def test_a_csv_file_may_begin_with_a_byte_order_mark(tmp_path):
    assert read_csv(tmp_path, "\ufeff" + csv_text(ROWS)) == LABELS


def test_a_csv_file_may_separate_by_semicolons(tmp_path):
    assert read_csv(tmp_path, csv_text(ROWS).replace(",", ";")) == LABELS


def test_a_csv_file_may_write_whole_numbers_with_a_point(tmp_path):
    text = csv_text(with_columns_reversed(ROWS))  # which ends with the identity, 2
    assert read_csv(tmp_path, text + ".0") == LABELS


def test_a_csv_file_may_quote_identities_and_fill_them_up_with_zeros(tmp_path):
    text = csv_text(with_columns_reversed(ROWS))
    assert read_csv(tmp_path, text.removesuffix("2") + '"0002"') == LABELS


def test_a_csv_file_may_have_blank_lines_and_lines_of_commas(tmp_path):
    assert read_csv(tmp_path, "\n \n" + csv_text(ROWS) + "\n,,,,,\n") == LABELS


def test_without_a_file_of_that_half_there_are_no_annotations(tmp_path):
    read_csv(tmp_path, csv_text(ROWS))
    assert common.read_annotations(tmp_path, "test") == {}


def test_two_flagged_colours_are_multi_as_none_is(tmp_path):
    rows = [ROWS[0] | {"upblue": 2}, ROWS[1]]
    labels = read_csv(tmp_path, csv_text(rows))
    multi = len(UP_COLOURS)
    expected = list(LABELS[1])
    expected[10] = multi
    assert labels == {1: expected, 2: LABELS[2]}


def test_whether_flags_annotate_an_attribute_does_not_hang_on_its_name(tmp_path, monkeypatch):
    attributes = {}
    for attribute, classes in ATTRIBUTES.items():
        new_name = {"upcolor": "top", "hair": "haircolor"}.get(attribute, attribute)
        attributes[new_name] = classes
    monkeypatch.setattr(common, "ATTRIBUTES", attributes)
    monkeypatch.setattr(common, "FLAG_PREFIXES", {"top": "up", "downcolor": "down"})
    text = csv_text(ROWS).replace("hair,", "haircolor,")
    assert read_csv(tmp_path, text) == LABELS


def test_mat_annotations_are_read_by_field_name_in_either_order(tmp_path):
    halves = {"train": ROWS, "test": with_columns_reversed(ROWS)}
    save_mat(tmp_path / "market_attribute.mat", halves)
    assert common.read_annotations(tmp_path, "train") == LABELS
    assert common.read_annotations(tmp_path, "test") == LABELS


def test_reading_mat_annotations_takes_scipy(tmp_path, monkeypatch):
    save_mat(tmp_path / "market_attribute.mat", {"train": ROWS})
    monkeypatch.setitem(sys.modules, "scipy.io", None)  # as where it is not installed
    with pytest.raises(UserError, match="reading it takes SciPy: pip install scipy"):
        common.read_annotations(tmp_path, "train")


# ------------------------------------------------------------------------------------------
# Pictures, and the split.


@pytest.fixture
def odd_market(tmp_path):
    """A train set of three crops of one colour each, of odd names, size and kind, beside a file of
    the system's, loaded in another size."""
    folder = tmp_path / "bounding_box_train"
    folder.mkdir()
    Image.new("L", (30, 90), 90).save(folder / "-1_c6s1_1_03.jpg")
    Image.new("RGB", (30, 90), (200, 30, 30)).save(folder / "0002_c1s1_1_03.jpg")
    Image.new("RGB", (30, 90), (30, 30, 200)).save(folder / "0010_c3s1_1_03.jpg.jpg")
    (folder / "Thumbs.db").write_bytes(b"x")
    return common.load_market(tmp_path, "train", (96, 48))


def test_names_of_crops_tell_identity_and_camera(odd_market):
    assert odd_market.person_ids.tolist() == [-1, 2, 10]
    assert odd_market.camera_ids.tolist() == [6, 1, 3]


def test_crops_of_another_size_or_in_gray_are_converted(odd_market):
    assert odd_market.images.shape == (3, 3, 96, 48)
    assert odd_market.images.dtype == torch.uint8
    colours = torch.tensor([[90, 90, 90], [200, 30, 30], [30, 30, 200]])
    difference = odd_market.images.float() - colours[:, :, None, None]
    assert difference.abs().max() < 3


def test_without_annotations_all_labels_are_unknown(odd_market):
    assert odd_market.labels.shape == (3, 12)
    assert (odd_market.labels == -1).all()


def gradient_picture():
    """From black, at the upper left, to white: a Pillow image, 32 wide and 64 high."""
    values = np.linspace(0, 255, 64 * 32).reshape(64, 32)
    return Image.fromarray(values.astype(np.uint8))


# How a camera that was held so stores an upright picture, by EXIF's codes.
LIES = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
# An orientation of 6 as a LONG, where a SHORT is the rule.
LONG_EXIF = b"Exif\0\0II*\0\10\0\0\0\1\0\x12\1\4\0\1\0\0\0\6\0\0\0\0\0\0\0"


def xmp_of(orientation):
    """What an editor of pictures notes beside EXIF."""
    space = "http://ns.adobe.com/tiff/1.0/"
    note = f'<x:xmpmeta xmlns:tiff="{space}" tiff:Orientation="{orientation}"></x:xmpmeta>'
    return b"http://ns.adobe.com/xap/1.0/\0" + note.encode()


def insert_first(jpeg, block):
    """Put a block of metadata before all that a JPEG file has."""
    return jpeg[:2] + b"\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block + jpeg[2:]


@pytest.fixture
def odd_pictures(tmp_path):
    """Forty odd files that all show `gradient_picture`: their paths."""
    gray = gradient_picture()
    coloured = gray.convert("RGB")

    def exif_of(orientation):
        exif = Image.Exif()
        exif[0x112] = orientation
        return exif

    def save(name, picture, **settings):
        picture.save(tmp_path / name, **settings)

    for orientation, method in LIES.items():
        stored = coloured if method is None else coloured.transpose(method)
        save(f"lies{orientation}.jpg", stored, exif=exif_of(orientation), quality=95)
    lying = coloured.transpose(LIES[6])
    for name in ("lying.png", "lying.webp", "lying.tif"):
        save(name, lying, exif=exif_of(6))
    save("long.jpg", lying, exif=LONG_EXIF)
    save("plain.jpg", lying)
    plain = (tmp_path / "plain.jpg").read_bytes()
    by_exif = (tmp_path / "lies6.jpg").read_bytes()
    (tmp_path / "xmp.jpg").write_bytes(insert_first(plain, xmp_of(6)))
    (tmp_path / "xmp_first.jpg").write_bytes(insert_first(by_exif, xmp_of(1)))
    (tmp_path / "xmp_after.jpg").write_bytes(insert_first(plain, LONG_EXIF))
    (tmp_path / "plain.jpg").unlink()

    for mode in ("L", "RGB", "CMYK"):
        for ending in ("jpg", "tif"):
            save(f"mode{mode}.{ending}", gray.convert(mode))
    for mode in ("L", "LA", "P", "RGB", "RGBA"):
        save(f"mode{mode}.png", gray.convert(mode))
    for mode in ("L", "P", "RGB"):
        for ending in ("bmp", "gif", "pcx"):
            if (mode, ending) != ("RGB", "gif"):
                save(f"mode{mode}.{ending}", gray.convert(mode))
    for ending in ("ppm", "tga", "sgi", "dds"):
        save(f"other.{ending}", coloured)
    save("other.pgm", gray)
    save("progressive.jpg", coloured, progressive=True, quality=95)
    save("fine.jpg", coloured, subsampling=0, quality=100)
    save("lossless.webp", coloured, lossless=True)
    save("clear.webp", coloured.convert("RGBA"), lossless=True)
    save("packed.tif", coloured, compression="tiff_lzw")
    black = Image.new("RGB", coloured.size)
    for name in ("pages.tif", "moves.gif", "moves.png", "moves.webp"):
        save(name, coloured, save_all=True, append_images=[black], lossless=True)
    shutil.copy(tmp_path / "modeRGB.png", tmp_path / "wrong.jpg")
    shutil.copy(tmp_path / "modeL.jpg", tmp_path / "l\u00e4ngs")
    return sorted(tmp_path.iterdir())


def test_pictures_of_forty_kinds_are_read_upright(odd_pictures):
    assert len(odd_pictures) > 40
    crops, paths = common.read_crops(odd_pictures, (64, 32))
    assert paths == odd_pictures
    expected = np.asarray(gradient_picture(), dtype=float)
    wrong = [
        path.name for path, crop in zip(paths, crops) if np.abs(crop.numpy() - expected).mean() > 4
    ]
    assert wrong == []


def test_a_pictures_pixels_do_not_depend_on_its_neighbours(odd_pictures):
    together, _ = common.read_crops(odd_pictures, (128, 64))
    for path, crop in zip(odd_pictures, together):
        alone, _ = common.read_crops([path], (128, 64))
        assert torch.equal(alone[0], crop), path.name


def test_transparency_is_laid_on_white(tmp_path):
    path = tmp_path / "clear.png"
    Image.new("RGBA", (10, 20), (255, 0, 0, 0)).save(path)
    assert (np.asarray(common.read_image(path)) == 255).all()


def some_identities():
    """Identities 1 to 100 of 3,000 crops."""
    return torch.randint(1, 101, (3000,), generator=seeded())


def test_the_split_keeps_each_identity_on_one_side():
    ids = some_identities()
    train, validation = common.split_identities(ids, 0.6, 3)
    assert torch.equal(train, ~validation)
    assert not torch.isin(ids[train], ids[validation]).any()
    assert len(ids[train].unique()) == 60


def test_the_split_is_the_same_for_a_seed_and_another_for_another():
    ids = some_identities()
    train, _ = common.split_identities(ids, 0.6, 3)
    again, _ = common.split_identities(ids, 0.6, 3)
    other, _ = common.split_identities(ids, 0.6, 4)
    assert torch.equal(train, again)
    assert not torch.equal(train, other)


# ------------------------------------------------------------------------------------------
# Augmentation.


def unmoved(count):
    """What `random_affine` draws where nothing moves."""
    return torch.eye(2, 3).expand(count, 2, 3)


def no_boxes(count):
    return torch.zeros(count, 4)


def noise_crops(count, height, width):
    size = (count, 3, height, width)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=seeded())


def centroid(pictures):
    """Where the brightness lies, in pixels right of and below the centre: [B, H, W] -> [B, 2]."""
    height, width = pictures.shape[1:]
    x = torch.arange(width) - (width - 1) / 2
    y = torch.arange(height) - (height - 1) / 2
    total = pictures.sum((1, 2))
    across = pictures.sum(1) @ x / total
    down = pictures.sum(2) @ y / total
    return torch.stack([across, down], 1)


def correlation(a, b):
    return torch.corrcoef(torch.stack([a, b]))[0, 1].item()


def test_half_the_crops_are_mirrored_and_the_others_stay():
    crops = noise_crops(200, 16, 8)
    affine = common.random_affine(200, (16, 8), seeded(), degrees=0)
    out = common.augment(crops, affine, no_boxes(200))
    from_mirrored = (out - crops.flip(3)).abs()
    from_same = (out - crops).abs()
    mirrored = from_mirrored.amax((1, 2, 3)) < 1e-2
    same = from_same.amax((1, 2, 3)) < 1e-2
    assert torch.equal(mirrored, ~same)
    assert 70 < mirrored.sum() < 130


def test_a_crop_turns_by_up_to_ten_degrees_as_a_rigid_picture_does():
    affine = common.random_affine(50, (128, 64), seeded(5))
    generator = seeded(5)
    angle = (torch.rand(50, generator=generator) * 2 - 1) * math.radians(10)
    mirror = torch.where(torch.rand(50, generator=generator) < 0.5, -1.0, 1.0)
    crops = torch.zeros(50, 3, 128, 64, dtype=torch.uint8)
    crops[:, :, 30:33, 40:43] = 255  # a spot 9.5 right of the centre and 32.5 above
    found = centroid(common.augment(crops, affine, no_boxes(50))[:, 0])

    # What the output shows at p is the input at M p, so a spot lands at M^-1 of its place.
    x = 9.5 * mirror
    y = -32.5
    turned_x = angle.cos() * x + angle.sin() * y
    turned_y = angle.cos() * y - angle.sin() * x
    assert torch.allclose(found, torch.stack([turned_x, turned_y], 1), atol=0.05)


def test_a_turned_crop_is_black_outside():
    affine = common.random_affine(50, (128, 64), seeded(5))
    angle = (torch.rand(50, generator=seeded(5)) * 2 - 1) * 10
    white = torch.full((50, 3, 128, 64), 255, dtype=torch.uint8)
    out = common.augment(white, affine, no_boxes(50))
    turned = out[angle.abs() > 3]
    for row in (0, -1):
        ends = turned[:, :, row, [0, -1]]
        assert (ends.amin(2) < 1).all()  # one corner of the two, or both
    assert (out[:, :, 64, 32] > 254).all()


def test_shifts_across_and_down_are_drawn_evenly_and_independently():
    affine = common.random_affine(4000, (128, 64), seeded(), degrees=0, shift=0.05)
    for axis in (0, 1):
        move = affine[:, axis, 2]
        assert 0.099 < move.abs().max() <= 0.1  # 5 % of a side that goes from -1 to 1
        assert move.mean().abs() < 0.01
        assert move.std() == pytest.approx(0.1 / 3**0.5, rel=0.03)  # as uniform numbers'
    across, down = affine[:, :, 2].T
    assert abs(correlation(across, down)) < 0.05
    assert abs(correlation(across.abs(), down.abs())) < 0.05


def test_a_crop_moves_by_up_to_5_percent_of_its_width_across_and_of_its_height_down():
    affine = common.random_affine(100, (128, 64), seeded(), degrees=0, shift=0.05)
    crops = torch.zeros(100, 3, 128, 64, dtype=torch.uint8)
    crops[:, :, 62:66, 30:34] = 255  # a spot in the centre
    moved = centroid(common.augment(crops, affine, no_boxes(100))[:, 0])
    farthest = moved.abs().amax(0)
    assert 0.9 * 3.2 < farthest[0] < 3.21
    assert 0.9 * 6.4 < farthest[1] < 6.41


def test_without_a_shift_the_centre_stays():
    affine = common.random_affine(100, (128, 64), seeded())
    assert (affine[:, :, 2] == 0).all()


class DrawnBoxes:
    """Boxes for crops of that size, [count] each: their upper left corners, and widths and heights,
    all as fractions of the crop's."""

    def __init__(self, count, size):
        self.boxes = common.random_boxes(count, size, seeded())
        left, top, right, bottom = ((self.boxes + 1) / 2).T
        self.left = left
        self.top = top
        self.width = right - left
        self.height = bottom - top
        self.area = self.width * self.height
        # A box that would be longer than the crop is cut to its side.
        self.uncut = (self.area > 0) & (self.width < 0.999) & (self.height < 0.999)


@pytest.fixture(scope="module")
def drawn():
    return DrawnBoxes(4000, (128, 64))


def test_a_box_is_drawn_for_half_the_crops_within_their_sides(drawn):
    assert drawn.boxes.abs().max() <= 1 + 1e-6
    share = (drawn.width > 0).float().mean()
    assert share.item() == pytest.approx(0.5, abs=0.03)
    assert torch.equal(drawn.width > 0, drawn.height > 0)


def test_a_box_has_2_to_40_percent_of_the_area(drawn):
    area = drawn.area[drawn.area > 0]
    assert area.mean().item() == pytest.approx(0.21, abs=0.02)
    assert 0.38 < area.max() < 0.401
    assert 0.0199 < drawn.area[drawn.uncut].min() < 0.025


def test_boxes_are_as_often_tall_as_wide_in_pixels_and_at_most_3_3_times(drawn):
    """In pixels of a crop twice as high as wide: a box drawn on the wrong axis, or in fractions of
    the sides, would be up to 13 times as high as wide, or mostly lie down."""
    small = (drawn.area > 0) & (drawn.area < 0.15)  # none of these is cut
    height = 128 * drawn.height[small]
    width = 64 * drawn.width[small]
    ratio = (height / width).log()
    longest = math.log(3.3)
    assert ratio.min() == pytest.approx(-longest, rel=0.05)
    assert ratio.max() == pytest.approx(longest, rel=0.05)
    assert ratio.abs().max() < longest + 1e-4
    assert ratio.mean().abs() < 0.1
    assert ratio.std() == pytest.approx(longest / 3**0.5, rel=0.05)  # as uniform numbers'


def test_boxes_lie_anywhere_across_and_down_independently(drawn):
    across = drawn.left / (1 - drawn.width)  # 0 at the left side, 1 at the right
    down = drawn.top / (1 - drawn.height)
    for place in (across[drawn.uncut], down[drawn.uncut]):
        assert place.mean() == pytest.approx(0.5, abs=0.03)
        assert place.std() == pytest.approx(1 / 12**0.5, rel=0.05)
    assert abs(correlation(across[drawn.uncut], down[drawn.uncut])) < 0.1


def test_a_box_erases_the_pixels_between_its_sides():
    crops = noise_crops(2, 128, 64)
    boxes = torch.tensor([[-0.5, -0.25, 0.25, 0.75], [0.0, 0.0, 0.0, 0.0]])
    out = common.augment(crops, unmoved(2), boxes)
    expected = crops.float()
    mean = expected.mean((0, 2, 3))
    expected[0, :, 48:112, 16:40] = mean[:, None, None]
    assert torch.allclose(out, expected, atol=0.05)


def test_what_is_erased_has_the_mean_colour_and_the_share_of_the_box():
    crops = noise_crops(300, 32, 16)
    drawn = DrawnBoxes(300, (32, 16))
    out = common.augment(crops, unmoved(300), drawn.boxes)
    gone = ((out - crops).abs() > 1e-2).any(1)
    mean = crops.float().mean((0, 2, 3))
    colours = out.movedim(1, 3)[gone]
    assert torch.allclose(colours, mean, atol=0.1)
    share = gone.float().mean((1, 2))
    assert torch.allclose(share, drawn.area, atol=0.08)
    for end in (0, -1):  # some boxes reach each side
        assert gone[:, end].any()
        assert gone[:, :, end].any()


# ------------------------------------------------------------------------------------------
# Rates, and the optimisers.


@pytest.mark.parametrize(
    "script, flags, lr, epochs, batch, patience, muon",
    [
        (par, "--recipe report", 3e-4, 15, 32, 5, None),
        (par, "--recipe report --weights x", 3e-4, 15, 32, 5, None),
        (par, "--recipe strong", 2e-3, 10, 64, 999, 20),
        (par, "--recipe strong --weights x", 2e-3, 10, 64, 999, 5),
        (reid, "--recipe report", 2e-5, 10, 32, 5, None),
        (reid, "--recipe strong", 2e-3, 24, 32, 999, 20),
        (reid, "--recipe strong --weights x", 2e-3, 24, 32, 999, 5),
    ],
)
def test_a_recipe_has_its_own_defaults(script, flags, lr, epochs, batch, patience, muon, market):
    words = ["--data", str(market), "--device", "cpu", *flags.split()]
    args = script.make_parser().parse_args(words)
    par.start(args)
    assert args.lr == lr
    assert args.epochs == epochs
    assert args.batch == batch
    assert args.patience == patience
    assert args.muon == muon
    assert args.warmup == 0.1


@pytest.mark.parametrize("weights, muon", [("none", 20), ("imagenet", 5), ("mine.pt", 5)])
def test_filters_from_stage_1_move_by_what_stage_1_began_from(weights, muon, market):
    words = ["--data", str(market), "--device", "cpu", "--recipe", "strong", "--init", "x.pt"]
    args = reid.make_parser().parse_args(words)
    stage_1 = {"record": {"arguments": {"size": (128, 64), "weights": weights}}}
    par.start(args, "x.pt", stage_1)
    assert args.muon == muon
    assert args.weights == weights  # for --compare


def test_the_rate_rises_to_its_peak_then_falls_to_0():
    rates = [common.learning_rate(step, 100, 3e-4, 0.1) for step in range(101)]
    assert rates[0] == pytest.approx(3e-5)
    assert rates[9] == pytest.approx(3e-4)
    assert rates[55] == pytest.approx(1.5e-4)
    assert rates[100] == 0
    assert max(rates) == pytest.approx(3e-4)


def test_without_warmup_the_rate_begins_at_its_peak():
    assert common.learning_rate(0, 10, 1.0, 0) == pytest.approx(1)


def newton_schulz(matrix):
    """Three iterations with the coefficients of Jordan et al. (2024)."""
    x = matrix / matrix.norm()
    for _ in range(3):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def test_muon_takes_the_steps_of_its_formula_also_along_small_singular_values():
    generator = seeded()
    noise = torch.randn(12, 36, generator=generator).double()
    left, _, right = torch.linalg.svd(noise, full_matrices=False)
    values = torch.logspace(0, -3, 12).double()
    filters = nn.Parameter(torch.randn(12, 4, 3, 3, generator=generator))
    expected = filters.detach().double().flatten(1)
    momentum = torch.zeros_like(expected)
    optimizer = common.Muon([filters], 0.02, factor=5)
    for _ in range(5):
        # The directions grow and shrink from step to step, so that the momentum matters.
        scale = 0.1 + torch.rand(12, generator=generator)
        gradient = left @ torch.diag(values * scale) @ right
        filters.grad = gradient.float().view(12, 4, 3, 3)
        optimizer.step()

        momentum = 0.9 * momentum + 0.1 * gradient
        nesterov = 0.1 * gradient + 0.9 * momentum
        lengths = (expected**2).sum(1, keepdim=True).sqrt()
        expected = expected - 5 * 0.02 * lengths * newton_schulz(lengths * nesterov)
        found = filters.flatten(1).double()
        assert torch.allclose(found, expected, rtol=0, atol=1e-5)


def test_muon_moves_along_the_nearest_orthogonal_matrix():
    start, *gradients = torch.randn(8, 40, 90, generator=seeded())
    matrix = start.view(40, 10, 3, 3).clone().requires_grad_()
    momentum = torch.zeros(40, 90)
    optimizer = common.Muon([matrix], 0.002, factor=20)
    for gradient in gradients:
        before = matrix.detach().flatten(1).clone()
        matrix.grad = gradient.view(matrix.shape).clone()
        optimizer.step()
        moved = (before - matrix.detach().flatten(1)) / 0.04 / before.norm(dim=1, keepdim=True)
        momentum = 0.9 * momentum + 0.1 * gradient
        nesterov = 0.1 * gradient + 0.9 * momentum
        u, _, v = torch.linalg.svd(before.norm(dim=1, keepdim=True) * nesterov, full_matrices=False)
        cosine = (moved * (u @ v)).sum() / moved.norm() / 40**0.5
        assert cosine > 0.97
        values = torch.linalg.svdvals(moved)
        assert 0.5 < values.min()
        assert values.max() < 1.3


def test_training_does_not_depend_on_how_long_the_given_filters_are():
    generator = seeded()
    crops = torch.randn(6, 3, 8, 8, generator=generator)
    goal = torch.randn(6, 5, generator=generator)
    torch.manual_seed(0)
    given = nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5, eps=1e-12))
    longer = copy.deepcopy(given)
    with torch.no_grad():
        longer[0].weight *= torch.tensor([0.1, 0.5, 1.0, 7.0, 40.0]).view(5, 1, 1, 1)

    outputs = []
    for network in (given, longer):
        optimizers = common.make_optimizers(
            network, SimpleNamespace(rungs=["muon"], lr=0.01, muon=5)
        )
        for _ in range(8):
            loss = F.mse_loss(network(crops).mean((2, 3)), goal)
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        outputs.append(network(crops))
    assert torch.allclose(*outputs, rtol=0, atol=1e-3)


def step_without_gradients(rungs):
    """A network, its parameters by name before a step at the rate 0.1 in which all gradients are 0,
    so that weight decay alone moves, and the network after it."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 2, 1),
        nn.Flatten(),
        nn.Linear(2, 5),
    )
    before = copy.deepcopy(module)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in common.make_optimizers(module, SimpleNamespace(rungs=rungs, lr=0.1, muon=20)):
        optimizer.step()
    return dict(before.named_parameters()), dict(module.named_parameters())


def test_without_muon_all_parameters_have_a_weight_decay_of_1_percent():
    before, after = step_without_gradients([])
    for name, values in before.items():
        decayed = values * (1 - 0.1 * 0.01)
        assert torch.allclose(after[name], decayed, rtol=1e-6), name


def test_with_muon_filters_have_no_weight_decay_and_all_others_1_percent():
    before, after = step_without_gradients(["muon"])
    for name, values in before.items():
        decayed = values * (1 - 0.1 * 0.01)
        if name in ("0.weight", "2.weight"):  # of convolutions
            assert torch.equal(after[name], values), name
        else:
            assert torch.allclose(after[name], decayed, rtol=1e-6), name


def test_muon_trains_all_filters_of_the_network_and_adamw_the_rest():
    backbone = common.Backbone()
    args = SimpleNamespace(rungs=["muon"], lr=0.1, muon=20)
    adamw, muon = common.make_optimizers(backbone, args)
    filters = muon.param_groups[0]["params"]
    others = adamw.param_groups[0]["params"]
    assert len(filters) == 1 + 2 * 8 + 4  # two for each block, and where channels change one more
    assert all(parameter.dim() == 4 for parameter in filters)
    assert all(parameter.dim() == 1 for parameter in others)
    assert len(filters) + len(others) == len(list(backbone.parameters()))


# ------------------------------------------------------------------------------------------
# Precision, and the network.


class CropsAsMap(nn.Module):
    """In place of `common.Backbone`: crops are their own map. It keeps what it was given."""

    width = 3

    def forward(self, crops):
        self.given = crops
        maps = crops / 255
        return maps, maps.mean((2, 3))


@pytest.mark.parametrize("rung", ["shift", "erasing"])
def test_training_augments_in_float32(rung, market, tmp_path, monkeypatch):
    """bfloat16 coordinates would be wrong by a third of a pixel."""
    monkeypatch.setattr(common, "precision", lambda device: "bfloat16")
    data = common.load_market(market, "train")
    model = par.AttributeNet(CropsAsMap(), par.LinearHeads(3, 0.0))
    loss = LossOf(lambda output, rows: output.logits.sum())
    items = torch.arange(8)[:, None]
    short_fit(model, data, items, tmp_path / "x.pt", loss, recipe="strong", rungs=[rung])

    generator = seeded()
    shift = 0.05 if rung == "shift" else 0.0
    affine = common.random_affine(8, (128, 64), generator, degrees=0.0, shift=shift)
    boxes = no_boxes(8)
    if rung == "erasing":
        boxes = common.random_boxes(8, (128, 64), generator)
    expected = common.augment(data.images[:8], affine, boxes)
    assert torch.equal(model.backbone.given, expected)


def test_the_loss_computes_in_float32_behind_a_network_in_bfloat16(market, tmp_path, monkeypatch):
    """Distances in bfloat16 would have two digits."""
    monkeypatch.setattr(common, "precision", lambda device: "bfloat16")
    data = common.load_market(market, "train", (32, 32))
    model = par.AttributeNet(CropsAsMap(), par.LinearHeads(3, 0.0))
    of_layer = []
    of_loss = []

    def watch(layer, inputs, output):
        of_layer.append(output.dtype)

    def loss(output, rows):
        product = output.logits @ output.logits.T
        of_loss.extend([output.logits.dtype, product.dtype])
        return output.logits.sum()

    model.heads[0][1].register_forward_hook(watch)
    items = torch.arange(8)[:, None]
    short_fit(model, data, items, tmp_path / "x.pt", LossOf(loss))
    assert of_layer == [torch.bfloat16]
    assert of_loss == [torch.float32, torch.float32]


def scaled_like_imagenet(crops):
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    return (crops / 255 - mean) / std


@pytest.mark.parametrize("published", [False, True])
def test_the_backbone_is_torchvisions_resnet18_with_a_files_weights(
    published, tmp_path, as_users_have_it
):
    """published: a file as older than num_batches_tracked as published ones are."""
    reference = models.resnet18()
    state = reference.state_dict()
    if published:
        state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "resnet18.pth")
    crops = noise_crops(4, 128, 64)
    reference.fc = nn.Identity()
    expected = reference.eval()(scaled_like_imagenet(crops))

    args = SimpleNamespace(weights=str(tmp_path / "resnet18.pth"), resume=False, recipe="report")
    backbone = common.Backbone(par.starting_weights(args)[0]).eval()
    maps, features = backbone(crops)
    assert torch.allclose(features, expected, atol=1e-4)
    assert torch.allclose(maps.mean((2, 3)), expected, atol=1e-4)
    assert backbone.width == 512
    assert maps.shape == (4, 512, 4, 2)


@pytest.mark.parametrize("source", ["a file", "imagenet"])
@pytest.mark.parametrize("recipe", ["report", "strong"])
def test_the_strong_recipe_lets_the_last_batch_norm_of_imagenets_network_begin_anew(
    recipe, source, tmp_path, monkeypatch
):
    network = NarrowResNet()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 1.5, 2)
            nn.init.uniform_(layer.bias, -2, -1)
            nn.init.uniform_(layer.running_mean, 1, 2)
            nn.init.uniform_(layer.running_var, 2, 3)
    published = network.state_dict()
    monkeypatch.setattr(par, "download_imagenet_weights", lambda: published)
    weights = source
    if source == "a file":
        weights = tmp_path / "resnet18.pth"
        torch.save(published, weights)

    args = SimpleNamespace(weights=weights, resume=False, recipe=recipe)
    state, seen = par.starting_weights(args)
    changed = [name for name, value in published.items() if not torch.equal(state[name], value)]
    changed = [name for name in changed if not name.startswith("fc.")]
    assert seen == []
    if recipe == "report":
        assert changed == []
    else:
        assert changed == ["layer4.1.bn2.weight", "layer4.1.bn2.bias"]
        assert (state["layer4.1.bn2.weight"] == 1).all()
        assert (state["layer4.1.bn2.bias"] == 0).all()


def test_the_strong_recipe_goes_on_with_all_weights_of_a_trained_checkpoint(trained):
    args = SimpleNamespace(weights=trained.par, resume=False, recipe="strong")
    state, _ = par.starting_weights(args)
    model = torch_load(trained.par)["model"]
    assert torch.equal(state["layer4.1.bn2.weight"], model["backbone.net.7.1.bn2.weight"])
    assert not (state["layer4.1.bn2.weight"] == 1).all()


def test_a_network_without_batch_norm_keeps_all_its_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_NORM", "yes")
    published = NarrowResNet().state_dict()
    torch.save(published, tmp_path / "resnet18.pth")
    args = SimpleNamespace(weights=tmp_path / "resnet18.pth", resume=False, recipe="strong")
    state, _ = par.starting_weights(args)
    backbone = {name: value for name, value in published.items() if not name.startswith("fc.")}
    assert len(backbone) >= 20
    for name, value in backbone.items():
        assert torch.equal(state[name], value), name


def test_the_last_batch_norm_of_a_resnet50_is_that_of_its_last_block():
    network = models.resnet50()
    nn.init.constant_(network.layer4[-1].bn3.weight, 2)
    par.shorten_features(network)
    assert (network.layer4[-1].bn3.weight == 1).all()


def test_a_last_stride_of_1_makes_the_map_twice_as_high_and_wide():
    reference = NarrowResNet()
    state = reference.state_dict()
    block = reference.layer4[0]
    block.conv1.stride = (1, 1)
    block.downsample[0].stride = (1, 1)
    reference.fc = nn.Identity()
    crops = noise_crops(4, 128, 64)
    maps, features = common.Backbone(state, last_stride=1).eval()(crops)
    assert maps.shape == (4, 64, 8, 4)
    assert torch.allclose(features, reference.eval()(scaled_like_imagenet(crops)), atol=1e-4)


def matrix_convolutions(backbone):
    """The names of those layers of a backbone."""
    layers = backbone.net.named_modules()
    return [name for name, layer in layers if isinstance(layer, common.MatrixConv2d)]


def test_all_3x3_filters_of_the_last_stage_and_no_others_are_matrices():
    expected = ["7.0.conv1", "7.0.conv2", "7.1.conv1", "7.1.conv2"]
    assert matrix_convolutions(common.Backbone()) == expected


def test_resnet50_fits_in(monkeypatch):
    monkeypatch.setattr(common, "make_resnet", models.resnet50)
    reference = models.resnet50()
    state = reference.state_dict()
    reference.fc = nn.Identity()
    crops = noise_crops(2, 64, 32)
    backbone = common.Backbone(state).eval()
    with torch.inference_mode():
        maps, features = backbone(crops)
        expected = reference.eval()(scaled_like_imagenet(crops))
    assert maps.shape == (2, 2048, 2, 1)
    assert torch.allclose(features, expected, rtol=1e-3, atol=1e-3)
    assert matrix_convolutions(backbone) == ["7.0.conv2", "7.1.conv2", "7.2.conv2"]


def test_a_last_stride_of_1_doubles_the_map_of_resnet50_as_well(monkeypatch):
    monkeypatch.setattr(common, "make_resnet", models.resnet50)
    backbone = common.Backbone(last_stride=1).eval()
    with torch.inference_mode():
        maps, _ = backbone(noise_crops(1, 64, 32))
    assert maps.shape == (1, 2048, 4, 2)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(4, 2), (8, 4), (16, 8), (5, 3)])
def test_a_convolution_by_a_matrix_equals_an_ordinary_one(stride, size):
    convolution = nn.Conv2d(6, 10, 3, stride, 1, bias=False).double()
    x = torch.randn(2, 6, *size, dtype=torch.float64, generator=seeded())
    expected = convolution(x)
    assert torch.allclose(common.MatrixConv2d(convolution)(x), expected)


# ------------------------------------------------------------------------------------------
# Stage 1, by formulas.


def class_loss(scores, true, weight, kind, gamma):
    """[report] section 3.1.2, of one attribute of one image."""
    p = math.exp(scores[true]) / sum(math.exp(score) for score in scores)
    loss = -math.log(p)
    if kind in ("focal", "alpha"):
        loss *= (1 - p) ** gamma
    if kind in ("wce", "alpha"):
        loss *= weight
    return loss


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("kind", ["ce", "wce", "focal", "alpha"])
def test_losses_equal_the_reports_formulas(kind, gamma):
    logits = [3 * torch.randn(7, n, generator=seeded(n)).double() for n in CLASS_COUNTS]
    weights = [torch.arange(1, n + 1, dtype=torch.float64) / n for n in CLASS_COUNTS]
    labels = some_classes(7, seed=0)
    labels[2] = -1  # an image without annotation takes no part
    expected = 0.0
    for k, scores in enumerate(logits):
        for i in (0, 1, 3, 4, 5, 6):
            true = labels[i, k].item()
            weight = weights[k][true].item()
            expected += class_loss(scores[i].tolist(), true, weight, kind, gamma) / 6
    found = par.attribute_loss(logits, labels, kind, weights, gamma).item()
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("kind", ["ce", "wce", "focal", "alpha"])
def test_losses_and_their_slopes_stay_finite_where_the_network_is_sure(kind, gamma):
    """Of one image that is surely right, and one that is surely wrong."""
    logits = []
    for n in CLASS_COUNTS:
        scores = torch.full((2, n), -500.0)
        scores[:, 0] = 500.0
        logits.append(scores.requires_grad_())
    labels = torch.tensor([[0] * 12, [1] * 12])
    weights = [torch.ones(n) for n in CLASS_COUNTS]
    loss = par.attribute_loss(logits, labels, kind, weights, gamma)
    loss.backward()
    assert loss.item() == pytest.approx(12 * 1000 / 2)
    for scores in logits:
        assert scores.grad.isfinite().all()


def guesses_and_truths():
    """Predicted and true classes, int64 [50, 12] each. Of age, class 3 occurs nowhere and class 2
    in predictions alone; of gender, five are not annotated."""
    truth = some_classes(50, seed=0)
    guess = torch.where(some_classes(50, seed=1) % 2 == 0, truth, 0)
    truth[:, 0].clamp_(max=1)
    guess[:, 0].clamp_(max=2)
    guess[0, 0] = 2
    truth[:5, 1] = -1
    return guess, truth


def f1_of_class(guess, truth, c):
    """F1 of class c by counting, None where it occurs in neither list."""
    if c not in guess and c not in truth:
        return None
    hits = sum(g == t == c for g, t in zip(guess, truth))
    precision = hits / max(1, guess.count(c))
    recall = hits / max(1, truth.count(c))
    return 2 * precision * recall / max(1e-9, precision + recall)


def test_accuracy_and_macro_f1_equal_counting():
    guess, truth = guesses_and_truths()
    accuracy, f1 = par.score(guess, truth)
    for k, n in enumerate(CLASS_COUNTS):
        known = truth[:, k] >= 0
        guessed = guess[known, k].tolist()
        true = truth[known, k].tolist()
        right = [g == t for g, t in zip(guessed, true)]
        assert accuracy[k].item() == pytest.approx(np.mean(right))
        scores = [f1_of_class(guessed, true, c) for c in range(n)]
        scores = [value for value in scores if value is not None]
        assert f1[k].item() == pytest.approx(np.mean(scores))


def test_an_attribute_without_labels_has_no_score():
    guess, truth = guesses_and_truths()
    truth[:, 4] = -1
    accuracy, f1 = par.score(guess, truth)
    for scores in (accuracy, f1):
        assert scores.isnan().nonzero().tolist() == [[4]]


def test_class_weights_are_inverse_frequencies_whose_mean_over_images_is_1():
    _, truth = guesses_and_truths()
    weights = par.class_weights(truth)
    for k, n in enumerate(CLASS_COUNTS):
        labels = [c for c in truth[:, k].tolist() if c >= 0]
        for c in range(n):
            expected = 0.0
            if c in labels:
                expected = len(labels) / len(set(labels)) / labels.count(c)
            assert weights[k][c].item() == pytest.approx(expected)
        of_images = [weights[k][c].item() for c in labels]
        assert np.mean(of_images) == pytest.approx(1)


# ------------------------------------------------------------------------------------------
# The joint network.


@pytest.fixture
def crops():
    return noise_crops(6, 64, 32).float()


def joint_network(*rungs, head="linear", attributes=True, identities=5):
    """The strong recipe's network, in training and without dropout."""
    settings = {"recipe": "strong", "head": head, "dropout": 0.0, "rungs": rungs}
    torch.manual_seed(0)
    return par.make_network(settings, attributes, identities)


def test_the_reports_network_gives_logits_of_its_heads_and_nothing_else(crops):
    settings = {"recipe": "report", "head": "linear", "dropout": 0.0, "rungs": []}
    model = par.make_network(settings)
    _, features = model.backbone(crops)
    output = model(crops)
    for head, logits in zip(model.heads, output.logits.split(CLASS_COUNTS, 1)):
        linear = head[1]
        expected = features @ linear.weight.T + linear.bias
        assert torch.allclose(logits, expected, atol=1e-4)
    assert output.features is None
    assert output.identities is None


def test_the_rung_stride_doubles_the_map(crops):
    maps, _ = joint_network("neck").backbone(crops)
    assert maps.shape[2:] == (2, 1)
    maps, _ = joint_network("neck", "stride").backbone(crops)
    assert maps.shape[2:] == (4, 2)


@pytest.mark.parametrize("head", ["linear", "conv"])
def test_in_training_the_joint_network_gives_the_features_before_the_neck(head, crops):
    model = joint_network("neck", "mirror", "identity", head=head)
    _, features = model.backbone(crops)
    output = model(crops)
    assert torch.allclose(output.features, features, atol=1e-5)
    assert output.logits.shape == (6, sum(CLASS_COUNTS))
    assert output.identities.shape == (6, 5)


def test_identities_are_linear_in_the_features_normalised_over_the_batch(crops):
    model = joint_network("neck", "identity")
    nn.init.normal_(model.identify.weight)  # large enough for the comparison to say something
    output = model(crops)
    features = output.features
    variance = features.var(0, correction=0)
    normal = (features - features.mean(0)) / (variance + 1e-5).sqrt()
    expected = normal @ model.identify.weight.T
    assert torch.allclose(output.identities, expected, atol=1e-3)


def test_without_the_neck_identities_are_linear_in_the_features(crops):
    model = joint_network("identity")
    output = model(crops)
    expected = output.features @ model.identify.weight.T
    assert torch.allclose(output.identities, expected, atol=1e-5)


def test_the_identity_layer_begins_small_and_has_no_bias():
    layer = joint_network("neck", "identity", identities=500).identify
    assert layer.weight.shape == (500, 64)
    assert layer.weight.std().item() == pytest.approx(0.001, rel=0.02)
    assert layer.weight.mean().abs() < 2e-5
    assert layer.bias is None


def test_the_neck_has_no_scale_and_no_shift():
    assert list(joint_network("neck").neck.parameters()) == []


@pytest.mark.parametrize("training", [True, False])
def test_a_network_without_attributes_or_identities_gives_none(training, crops):
    output = joint_network("neck", attributes=False).train(training)(crops)
    assert output.logits is None
    assert output.identities is None
    assert output.features.shape == (6, 64)


def test_a_branch_of_the_conv_heads_attends_to_places_by_itself(crops):
    model = joint_network("neck", head="conv")
    maps, _ = model.backbone(crops)
    logits = model(crops).logits.split(CLASS_COUNTS, 1)
    heads = model.heads
    seen = heads.look(maps).flatten(2)
    for k in (0, 7, 11):
        branch = seen[:, 64 * k : 64 * (k + 1)]  # [B, 64, places]
        attention = torch.einsum("bcn,c->bn", branch, heads.attention[k]).softmax(1)
        pooled = torch.einsum("bcn,bn->bc", branch, attention)
        assert torch.allclose(heads.heads[k](pooled), logits[k], atol=1e-4)


def test_the_attention_of_the_conv_heads_adds_up_to_1(crops):
    model = joint_network("neck", head="conv")
    classes = torch.zeros(6, 12, dtype=torch.long)
    maps = par.activation_maps(model, crops, classes)
    assert maps.shape == (6, 12, 2, 1)
    assert torch.allclose(maps.sum((2, 3)), torch.ones(6, 12))


def evaluated(model, crops):
    """The network's output in evaluation, after a step of training for the neck's statistics."""
    model.train()(crops)
    with torch.inference_mode():
        return model.eval()(crops)


def test_in_evaluation_features_are_behind_the_neck_and_of_length_1(crops):
    model = joint_network("neck", "identity")
    output = evaluated(model, crops)
    with torch.inference_mode():
        maps, features = model.backbone(crops)
        logits = model.heads(maps, features)
    mean = model.neck.running_mean
    variance = model.neck.running_var
    necked = (features - mean) / (variance + 1e-5).sqrt()
    expected = necked / necked.norm(dim=1, keepdim=True)
    assert torch.allclose(output.features, expected, atol=1e-4)
    assert torch.allclose(output.logits, logits, atol=1e-4)
    assert output.identities is None


@pytest.mark.parametrize("head", ["linear", "conv"])
def test_with_mirror_a_crop_and_its_mirror_image_give_the_same(head, crops):
    model = joint_network("neck", "mirror", head=head)
    output = evaluated(model, crops)
    with torch.inference_mode():
        mirrored = model(crops.flip(3))
    assert output.logits.shape == (6, sum(CLASS_COUNTS))
    assert output.features.shape == (6, 64)
    assert torch.allclose(output.logits, mirrored.logits, atol=1e-4)
    assert torch.allclose(output.features, mirrored.features, atol=1e-4)


def test_with_mirror_both_outputs_are_means_over_crop_and_mirror_image(crops):
    model = joint_network("neck", "mirror")
    output = evaluated(model, crops)
    logits = 0
    necked = 0
    with torch.inference_mode():
        for view in (crops, crops.flip(3)):
            maps, features = model.backbone(view)
            logits = logits + model.heads(maps, features) / 2
            necked = necked + model.neck(features) / 2
    assert torch.allclose(output.logits, logits, atol=1e-4)
    assert torch.allclose(output.features, F.normalize(necked), atol=1e-4)


# ------------------------------------------------------------------------------------------
# Stage 2, by formulas: the losses.


def test_triplet_loss_equals_the_reports_formula():
    anchor, positive, negative = torch.randn(3, 9, 5, dtype=torch.float64, generator=seeded())
    total = 0
    for a, p, n in zip(anchor, positive, negative):
        to_positive = sum((a - p) ** 2).item()
        to_negative = sum((a - n) ** 2).item()
        total += max(0, to_positive - to_negative + 0.7)
    assert total > 0
    found = reid.triplet_loss(anchor, positive, negative, 0.7)
    assert found.item() == pytest.approx(total / 9, rel=1e-12)


def test_hard_triplet_loss_takes_the_farthest_of_its_own_and_the_nearest_of_others():
    features = torch.randn(9, 5, dtype=torch.float64, generator=seeded())
    ids = torch.arange(9) // 3
    total = 0
    for anchor, own_id in zip(features, ids):
        distances = (features - anchor).norm(dim=1)
        farthest = distances[ids == own_id].max().item()
        nearest = distances[ids != own_id].min().item()
        total += math.log(1 + math.exp(farthest - nearest))
    found = reid.hard_triplet_loss(features, ids)
    assert found.item() == pytest.approx(total / 9, rel=1e-6)


def test_hard_triplet_loss_of_equal_crops_has_a_finite_slope():
    features = torch.zeros(4, 5, requires_grad=True)
    ids = torch.tensor([0, 0, 1, 1])
    reid.hard_triplet_loss(features, ids).backward()
    assert features.grad.isfinite().all()


def test_hard_triplet_loss_of_a_single_identity_is_zero():
    features = torch.randn(3, 5, generator=seeded())
    assert reid.hard_triplet_loss(features, torch.zeros(3)) == 0


@pytest.fixture
def given_to_fit(run, monkeypatch):
    """A function that runs a training command as far as `common.fit`, and returns what that is
    given: (sample_epoch, loss)."""

    def given_to_fit(module, *arguments):
        fit = Mock(side_effect=UserError("Caught."))
        monkeypatch.setattr(common, "fit", fit)
        run(module, "--size", "32x32", *arguments, error="Caught.")
        _, _, sample_epoch, loss, *_ = fit.call_args.args
        return sample_epoch, loss

    return given_to_fit


def training_half(market):
    """What a run trains with: (`common.Market`, the rows of the training identities)."""
    data = common.load_market(market, "train", (32, 32))
    chosen, _ = common.split_identities(data.person_ids)
    return data, chosen.nonzero()[:, 0]


def some_output(count):
    """Of a network that has learned six identities, as `market` has to train with."""
    generator = seeded()
    return par.Output(
        logits=torch.randn(count, sum(CLASS_COUNTS), generator=generator),
        features=torch.randn(count, 64, generator=generator),
        identities=torch.randn(count, 6, generator=generator),
    )


@pytest.mark.parametrize("module", [par, reid])
@pytest.mark.parametrize("recipe", ["report", "strong"])
def test_an_epoch_holds_every_crop_of_the_training_identities_and_no_other(
    module, recipe, market, given_to_fit
):
    _, chosen = training_half(market)
    sample_epoch, _ = given_to_fit(module, "--recipe", recipe)
    rows = sample_epoch(seeded()).flatten().tolist()
    assert set(rows) == set(chosen.tolist())


def test_stage_1_by_the_strong_recipe_sums_attributes_and_smoothed_identities(market, given_to_fit):
    data, chosen = training_half(market)
    flags = ["--recipe", "strong", "--loss", "alpha", "--gamma", 3]
    sample_epoch, loss = given_to_fit(par, *flags)
    rows = sample_epoch(seeded())[:8].T  # [1, 8]
    output = some_output(8)

    own = rows[0]
    known = data.person_ids[chosen].unique()
    ids = torch.searchsorted(known, data.person_ids[own])
    weights = par.class_weights(data.labels[chosen])
    logits = output.logits.split(CLASS_COUNTS, 1)
    attributes = par.attribute_loss(logits, data.labels[own], "alpha", weights, gamma=3)
    identities = F.cross_entropy(output.identities, ids, label_smoothing=0.1)
    expected = attributes.item() + identities.item()
    assert loss(output, rows).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kept", ["identity triplets attributes", *reid.RUNGS[:3]])
def test_stage_2_by_the_strong_recipe_sums_the_losses_that_its_flags_leave(
    kept, market, given_to_fit
):
    data, chosen = training_half(market)
    kept = kept.split()
    flags = ["--recipe", "strong"]
    left_out = [name for name in reid.RUNGS[:3] if name not in kept]
    if left_out:
        flags += ["--without", *left_out]
    sample_epoch, loss = given_to_fit(reid, *flags)
    rows = sample_epoch(seeded())[:2].T  # [4, 2]
    output = some_output(8)

    own = rows.flatten()
    known = data.person_ids[chosen].unique()
    ids = torch.searchsorted(known, data.person_ids[own])
    weights = par.class_weights(data.labels[chosen])
    logits = output.logits.split(CLASS_COUNTS, 1)
    attributes = par.attribute_loss(logits, data.labels[own], "wce", weights)
    losses = {
        "identity": F.cross_entropy(output.identities, ids),
        "triplets": reid.hard_triplet_loss(output.features, ids),
        "attributes": attributes / len(ATTRIBUTES),
    }
    expected = sum(losses[name].item() for name in kept)
    assert loss(output, rows).item() == pytest.approx(expected, rel=1e-5)


def test_stage_2_by_the_reports_recipe_draws_negatives_from_colour_clusters(market, given_to_fit):
    data, chosen = training_half(market)
    sample_epoch, _ = given_to_fit(reid, "--clusters", 3)
    clusters = reid.cluster_histograms(data.images[chosen], 3)
    triplets = reid.sample_triplets(data.person_ids[chosen], clusters, seeded())
    assert torch.equal(sample_epoch(seeded()), chosen[triplets])


def test_stage_2_draws_negatives_from_anywhere_if_asked(market, given_to_fit, monkeypatch):
    data, chosen = training_half(market)
    # Of so few crops each would be a cluster, whose negatives come from anywhere as well.
    three = reid.cluster_histograms(data.images[chosen], 3)
    monkeypatch.setattr(reid, "cluster_histograms", Mock(return_value=three))
    sample_epoch, _ = given_to_fit(reid, "--negatives", "random")
    one_cluster = torch.zeros_like(chosen)
    triplets = reid.sample_triplets(data.person_ids[chosen], one_cluster, seeded())
    assert torch.equal(sample_epoch(seeded()), chosen[triplets])


def test_stage_2_by_the_reports_recipe_has_the_triplet_loss_of_its_margin(given_to_fit):
    _, loss = given_to_fit(reid, "--margin", 99)
    anchor, positive, negative = torch.randn(3, 4, 5, generator=seeded())
    output = par.Output(features=torch.cat([anchor, positive, negative]))
    expected = reid.triplet_loss(anchor, positive, negative, 99.0)
    assert expected > 0
    assert loss(output, torch.arange(12).view(3, 4)) == expected


# ------------------------------------------------------------------------------------------
# Stage 2, by formulas: clusters, and what is sampled.


def crops_of_four_colours():
    """80 noisy crops: (which colour, int64 [80], uint8 [80, 3, 32, 16])."""
    colour = torch.randint(0, 4, (80,), generator=seeded())
    palette = [ImageColor.getrgb(name) for name in ("maroon", "green", "navy", "silver")]
    noise = torch.randint(-15, 16, (80, 3, 32, 16), generator=seeded(1))
    plain = 20 + torch.tensor(palette)[colour]
    return colour, (plain[:, :, None, None] + noise).byte()


def test_colour_histograms_are_square_roots_of_the_shares_of_colours():
    # More crops than the 64 that are counted at once, and every edge of a bin.
    images = torch.randint(0, 256, (70, 3, 16, 8), generator=seeded()).byte()
    found = reid.colour_histograms(images)
    for image, histogram in zip(images, found):
        colours = image.flatten(1).T.numpy()  # [H * W, 3]
        edges = np.arange(0, 257, 32)
        counts, _ = np.histogramdd(colours, [edges, edges, edges])
        expected = np.sqrt(counts.flatten() / len(colours))
        assert np.allclose(histogram.numpy(), expected, atol=1e-6)


def points_on_the_sphere():
    """60 points of length 1 in five dimensions, without clear clusters."""
    return F.normalize(torch.rand(60, 5, generator=seeded()))


def test_first_centres_are_drawn_in_proportion_to_the_squared_distance_to_those_before():
    points = points_on_the_sphere()
    found = reid.choose_centres(points, 6, seed=3)

    exact = points.double().numpy()
    draws = torch.rand(6, generator=seeded(3), dtype=torch.float64)
    nearest = np.full(60, np.inf)
    chosen = []
    for draw in draws.tolist():
        mass = np.ones(60)
        if chosen:
            squared = ((exact - exact[chosen[-1]]) ** 2).sum(1)
            nearest = np.minimum(nearest, squared)
            mass = nearest
        below = mass.cumsum() < draw * mass.sum()
        chosen.append(below.sum())
    assert len(set(chosen)) == 6
    assert torch.equal(found, points[chosen])


def test_k_means_moves_centres_to_the_means_until_no_point_changes():
    points = points_on_the_sphere()
    found = reid.k_means(points, 6, seed=3)

    exact = points.double().numpy()
    centres = reid.choose_centres(points, 6, seed=3).double().numpy()
    steps = []
    for _ in range(50):
        squared = ((exact[:, None] - centres) ** 2).sum(2)
        assigned = squared.argmin(1)
        steps.append(assigned)
        for k in range(6):
            centres[k] = exact[assigned == k].mean(0)
    assert not np.array_equal(steps[1], steps[2])  # so that more than one step is seen
    assert np.array_equal(steps[-2], steps[-1])
    assert np.array_equal(found.numpy(), steps[-1])


def test_k_means_begins_as_its_seed_says():
    points = points_on_the_sphere()
    first = reid.k_means(points, 6, seed=0)
    other = reid.k_means(points, 6, seed=1)
    assert not torch.equal(first, other)


def test_clusters_group_crops_by_colour():
    colour, images = crops_of_four_colours()
    clusters = reid.cluster_histograms(images, 4, seed=0)
    assert len(clusters.unique()) == 4
    for c in range(4):
        assert len(clusters[colour == c].unique()) == 1


def test_clusters_are_the_same_for_a_seed():
    _, images = crops_of_four_colours()
    first = reid.cluster_histograms(images, 9, seed=0)
    assert torch.equal(first, reid.cluster_histograms(images, 9, seed=0))


def test_there_are_no_more_clusters_than_crops():
    _, images = crops_of_four_colours()
    clusters = reid.cluster_histograms(images[:3], 100)
    assert clusters.max() < 3


def test_equal_crops_are_one_cluster():
    _, images = crops_of_four_colours()
    equal = images[:1].repeat(9, 1, 1, 1)
    clusters = reid.cluster_histograms(equal, 4)
    assert (clusters == 0).all()


def test_clusters_of_no_crops_are_an_error():
    _, images = crops_of_four_colours()
    with pytest.raises(UserError, match="no crops to cluster"):
        reid.cluster_histograms(images[:0], 4)


def test_blocks_begin_and_last_as_in_the_sorted_order():
    # Sorted, the keys are 0 0 0 1 1.
    keys = torch.tensor([0, 0, 1, 0, 1])
    first, length = reid.find_blocks(keys)
    assert first.tolist() == [0, 0, 3, 0, 3]
    assert length.tolist() == [3, 3, 2, 3, 2]


@pytest.mark.parametrize(
    "draw, expected",
    [
        (0.0, [2, 2, 0, 2, 0]),
        (0.4, [2, 2, 1, 2, 1]),
        (0.5, [4, 4, 1, 4, 1]),
        (0.9, [4, 4, 3, 4, 3]),
    ],
)
def test_others_are_drawn_evenly_from_another_identitys_images(draw, expected):
    identities = torch.tensor([0, 0, 1, 0, 1])
    one_cluster = torch.zeros_like(identities)
    draws = torch.full((5,), draw)
    images, exists = reid.draw_others(identities, one_cluster, draws)
    assert images.tolist() == expected
    assert exists.all()


@pytest.mark.parametrize("draw, expected", [(0.0, [2, 2, 0, 4, 3]), (0.9, [2, 2, 1, 4, 3])])
def test_others_are_drawn_from_the_images_own_cluster(draw, expected):
    identities = torch.tensor([0, 0, 1, 0, 1])
    clusters = torch.tensor([0, 0, 0, 1, 1])
    draws = torch.full((5,), draw)
    images, exists = reid.draw_others(identities, clusters, draws)
    assert images.tolist() == expected
    assert exists.all()


def test_there_is_no_other_to_draw_in_a_cluster_of_one_identity():
    identities = torch.tensor([0, 0, 1, 0, 1])
    clusters = torch.tensor([0, 0, 1, 2, 2])
    _, exists = reid.draw_others(identities, clusters, torch.zeros(5))
    assert exists.tolist() == [False, False, False, True, True]


# Identity 2 has a single crop, and so no positive; cluster 3 has one identity, so any other will
# do.
TRIPLET_IDS = torch.tensor([7, 7, 7, 3, 3, 9, 9, 9, 9, 5, 5, 2, 4, 4])
TRIPLET_CLUSTERS = torch.tensor([0, 0, 1, 0, 1, 1, 2, 2, 2, 0, 2, 1, 3, 3])


def test_every_triplet_that_the_clusters_allow_is_drawn_and_no_other():
    expected = set()
    for a in range(14):
        others = (TRIPLET_IDS != TRIPLET_IDS[a]).nonzero()[:, 0]
        near = others[TRIPLET_CLUSTERS[others] == TRIPLET_CLUSTERS[a]]
        negatives = near if len(near) > 0 else others
        positives = (TRIPLET_IDS == TRIPLET_IDS[a]).nonzero()[:, 0]
        positives = positives[positives != a]
        for p in positives.tolist():
            expected |= {(a, p, n) for n in negatives.tolist()}

    generator = seeded()
    seen = set()
    for _ in range(400):
        triplets = reid.sample_triplets(TRIPLET_IDS, TRIPLET_CLUSTERS, generator)
        seen |= set(map(tuple, triplets.tolist()))
    assert seen == expected


def test_each_crop_with_a_positive_is_once_an_anchor_in_random_order():
    generator = seeded()
    for _ in range(20):
        triplets = reid.sample_triplets(TRIPLET_IDS, TRIPLET_CLUSTERS, generator)
        anchors = triplets[:, 0].tolist()
        assert sorted(anchors) == [*range(11), 12, 13]
        assert anchors != sorted(anchors)


@pytest.mark.parametrize("ids", [range(14), [1] * 14, []])
def test_triplets_take_two_identities_and_two_crops_of_one(ids):
    ids = torch.tensor(ids, dtype=torch.int64)
    with pytest.raises(UserError, match="No triplet can be formed"):
        reid.sample_triplets(ids, torch.zeros_like(ids))


GROUP_COUNTS = (1, 2, 3, 4, 5, 6, 9, 40)  # crops of identities 7, 14, 21, 28, 35, 42, 63, 280


def identities_of_groups():
    """Of 70 crops, shuffled."""
    counts = torch.tensor(GROUP_COUNTS)
    ids = (7 * counts).repeat_interleave(counts)
    return ids[torch.randperm(70, generator=seeded())]


@pytest.mark.parametrize("seed", range(20))
def test_a_group_holds_different_crops_of_one_identity_while_there_are_enough(seed):
    ids = identities_of_groups()
    groups = reid.sample_groups(ids, 4, seeded(seed))
    assert groups.shape[1] == 4
    for group, owners in zip(groups.tolist(), ids[groups].tolist()):
        assert len(set(owners)) == 1
        crops = owners[0] // 7
        assert len(set(group)) == min(4, crops)


@pytest.mark.parametrize("seed", range(20))
def test_an_identitys_groups_hold_each_crop_about_once(seed):
    ids = identities_of_groups()
    groups = reid.sample_groups(ids, 4, seeded(seed))
    for count in GROUP_COUNTS:
        own = groups[ids[groups[:, 0]] == 7 * count]
        assert len(own) == max(1, (count + 2) // 4)
        assert len(own.unique()) == min(count, 4 * len(own))


@pytest.mark.parametrize("seed", range(20))
def test_an_identitys_groups_are_spread_over_the_epoch(seed):
    ids = identities_of_groups()
    groups = reid.sample_groups(ids, 4, seeded(seed))
    owner = ids[groups[:, 0]]
    places = (owner == 280).nonzero()[:, 0]
    assert places.min() < 5
    assert places.max() > len(groups) - 6
    assert places.diff().max() <= 8


# ------------------------------------------------------------------------------------------
# Stage 2, by formulas: ranking and re-ranking.


def reciprocal_sets(order, k):
    """Of each crop those of its k nearest, and itself, that have it among theirs."""
    near = [set(row[: k + 1]) for row in order.tolist()]
    sets = []
    for i, own in enumerate(near):
        sets.append({j for j in own if i in near[j]})
    return sets


def dense_reranking(query, gallery, k1, k2, part):
    """k-reciprocal re-ranking as Zhong et al. (2017) write it, with matrices of all pairs and
    Python's sets."""
    x = np.concatenate([query, gallery]).astype(np.float64)
    d = ((x[:, None] - x) ** 2).sum(2)
    d /= d.max(1, keepdims=True)
    order = d.argsort(1)
    whole = reciprocal_sets(order, k1)
    halves = reciprocal_sets(order, round(k1 / 2))
    weights = np.zeros_like(d)
    for i, near in enumerate(whole):
        expanded = set(near)
        for j in near:
            shared = halves[j] & near
            if len(shared) > 2 / 3 * len(halves[j]):
                expanded |= halves[j]
        members = sorted(expanded)
        falling = np.exp(-d[i, members])
        weights[i, members] = falling / falling.sum()

    weights = np.stack([weights[near].mean(0) for near in order[:, :k2]])
    jaccard = []
    for own in weights[: len(query)]:
        shared = np.minimum(own, weights).sum(1)
        jaccard.append(1 - shared / np.maximum(own, weights).sum(1))
    own = d[: len(query)]
    mixed = (1 - part) * np.stack(jaccard) + part * own
    return mixed[:, len(query) :]


RERANKING = [(20, 6, 0.3), (6, 1, 0.5), (7, 3, 0.0), (200, 6, 0.3), (3, 6, 1.0)]


@pytest.mark.parametrize("settings", RERANKING)
def test_reranking_equals_the_dense_formula(settings, monkeypatch):
    monkeypatch.setattr(reid, "chunk_rows", in_sevens)
    features = crops_of_people(90, spread=0.5).features
    query = features[:15]
    gallery = features[15:]
    found = torch.full((15, 75), torch.nan)
    for rows, distances in reid.rerank_chunks(query, gallery, *settings):
        found[rows] = distances
    expected = dense_reranking(query.numpy(), gallery.numpy(), *settings)
    assert np.abs(found.numpy() - expected).max() < 1e-5


def test_reranking_yields_each_query_once_in_float32(monkeypatch):
    monkeypatch.setattr(reid, "chunk_rows", in_sevens)
    features = crops_of_people(90, spread=0.5).features
    seen = []
    for rows, distances in reid.rerank_chunks(features[:15], features[15:]):
        seen += range(15)[rows]
        assert distances.shape == (len(range(15)[rows]), 75)
        assert distances.dtype == torch.float32
    assert seen == list(range(15))


@pytest.mark.parametrize("settings", RERANKING)
def test_reranking_without_a_gallery_is_of_each_crop_against_all_others(settings, monkeypatch):
    monkeypatch.setattr(reid, "chunk_rows", in_sevens)
    features = crops_of_people(90, spread=0.5).features
    chunks = reid.rerank_chunks(features, None, *settings)
    alone = torch.cat([distances for _, distances in chunks])
    chunks = reid.rerank_chunks(features[:15], features[15:], *settings)
    apart = torch.cat([distances for _, distances in chunks])
    assert alone.diagonal().isposinf().all()
    assert (alone[:15, 15:] - apart).abs().max() < 1e-5


def test_reranking_of_nan_is_nan():
    features = crops_of_people(90, spread=0.5).features
    _, distances = next(reid.rerank_chunks(features[:9] * torch.nan, features))
    assert distances.isnan().all()


class RandomRanking:
    """25 queries and a gallery, with junk, distractors, and queries without a match; in a half of
    them most distances are tied."""

    def __init__(self, seed, kind):
        generator = seeded(seed)

        def draw(low, high, count):
            return torch.randint(low, high, (count,), generator=generator)

        columns = 40 if seed % 2 else 4
        distances = torch.rand(25, columns, generator=generator)
        distances[:, 0] = 0
        if seed % 4 > 1:
            distances = (6 * distances).round()
        else:
            distances = distances.log()  # -inf in the first column
        self.distances = distances.to(getattr(torch, kind))
        query_ids = draw(1, 9, 25)
        query_cameras = draw(1, 4, 25)
        gallery_ids = draw(-1, 7, columns)
        gallery_cameras = draw(1, 4, columns)
        self.sides = [query_ids, query_cameras, gallery_ids, gallery_cameras]
        # So few that some lists are empty.
        self.few = torch.rand(25, columns, generator=generator) < 0.3


KINDS = "float32 float64 int64 float32 half bfloat16 float64 half".split()


@pytest.mark.parametrize("cross_camera", [True, False])
@pytest.mark.parametrize("selected", [False, True])
@pytest.mark.parametrize("seed, kind", list(enumerate(KINDS)))
def test_rank_metrics_equal_brute_force(seed, kind, selected, cross_camera, monkeypatch):
    monkeypatch.setattr(reid, "chunk_rows", in_sevens)
    ranking = RandomRanking(seed, kind)
    keep = ranking.few if selected else None
    found = reid.rank_metrics(ranking.distances, *ranking.sides, keep, cross_camera)
    expected = brute_force(ranking.distances, *ranking.sides, keep, cross_camera)
    assert found == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("seed, kind", list(enumerate(KINDS)))
def test_rank_metrics_leave_the_distances_as_they_are(seed, kind):
    ranking = RandomRanking(seed, kind)
    before = ranking.distances.clone()
    reid.rank_metrics(ranking.distances, *ranking.sides, ranking.few)
    assert torch.equal(ranking.distances, before)


def test_rankings_without_any_match_are_an_error():
    one = torch.tensor([1])
    with pytest.raises(UserError, match="No query has a match"):  # but from its own camera
        reid.rank_metrics(torch.zeros(1, 1), one, one, one, one)


def test_rankings_without_a_query_are_an_error():
    one = torch.tensor([1])
    none = one[:0]
    with pytest.raises(UserError, match="No query has a match"):
        reid.rank_metrics(torch.zeros(0, 1), none, none, one, one)


def test_rankings_by_nan_are_an_error():
    one = torch.tensor([1])
    distances = torch.tensor([[torch.nan]])
    with pytest.raises(UserError, match="Distances are NaN"):
        reid.rank_metrics(distances, one, one, one, 2 * one)


def pairs_of(crops):
    """All pairs of crops, [N, N] each: their distances, and whether they show the same person, and
    are from two cameras."""
    differences = crops.features[:, None] - crops.features
    return SimpleNamespace(
        distances=differences.norm(dim=2),
        same=crops.ids[:, None] == crops.ids,
        across=crops.cameras[:, None] != crops.cameras,
    )


@pytest.mark.parametrize("cross_camera", [True, False])
def test_each_crop_is_ranked_among_all_others(cross_camera, monkeypatch):
    monkeypatch.setattr(reid, "chunk_rows", in_sevens)
    crops = crops_of_people(80, spread=1.2)
    ids = crops.ids
    cameras = crops.cameras
    distances = pairs_of(crops).distances
    precisions = []
    for q in range(80):  # one query at a time, taken out of its gallery
        one = slice(q, q + 1)
        rest = torch.arange(80) != q
        sides = (ids[one], cameras[one], ids[rest], cameras[rest])
        alone = brute_force(distances[one, rest], *sides, None, cross_camera)
        precisions.append(alone["mAP"])
    found = reid.score_selections(crops, None, reid.EVERY, cross_camera)["none"]
    assert found["mAP"] == pytest.approx(np.nanmean(precisions), abs=1e-9)
    assert found["queries"] == np.isfinite(precisions).sum()


@pytest.mark.parametrize("cross_camera", [True, False])
def test_a_threshold_can_only_lower_the_map(cross_camera):
    crops = crops_of_people(80, spread=1.2)
    thresholds = [0.1, 2.0, 3.0, 5.0, 99.0]
    tries = {below: reid.Selection(below) for below in thresholds}
    scores = reid.score_selections(crops, None, tries | reid.EVERY, cross_camera)
    precisions = [scores[below]["mAP"] for below in thresholds]
    assert precisions == sorted(precisions)
    assert precisions[0] < precisions[2]
    assert precisions[-1] == scores["none"]["mAP"]


@pytest.mark.parametrize("cross_camera", [True, False])
def test_a_list_is_as_long_as_there_are_crops_below_the_threshold(cross_camera, monkeypatch):
    monkeypatch.setattr(reid, "chunk_rows", in_sevens)
    crops = crops_of_people(80, spread=1.2)
    pairs = pairs_of(crops)
    left_out = torch.eye(80, dtype=torch.bool)
    if cross_camera:
        left_out = pairs.same & ~pairs.across
    for below in (2.0, 3.0, 5.0):
        tries = {"threshold": reid.Selection(below)}
        found = reid.score_selections(crops, None, tries, cross_camera)["threshold"]
        returned = (pairs.distances < below) & ~left_out
        assert found["length"] == pytest.approx(returned.sum().item() / 80)


@pytest.mark.parametrize("below, length", [(4.99, 0), (5.0, 0), (5.01, 1)])
def test_a_crop_at_exactly_the_threshold_is_not_returned(below, length):
    one = torch.tensor([1])
    query = reid.Crops(torch.tensor([[0.0, 0.0]]), one, one)
    gallery = reid.Crops(torch.tensor([[3.0, 4.0]]), one, 2 * one)
    tries = {"threshold": reid.Selection(below)}
    found = reid.score_selections(query, gallery, tries, cross_camera=True)["threshold"]
    assert found["length"] == length
    assert found["recall"] == length


# ------------------------------------------------------------------------------------------
# Stage 2, by formulas: histograms of distances, and the probability of the same person.


def first_nine(crops):
    return reid.Crops(crops.features[:9], crops.ids[:9], crops.cameras[:9])


def test_the_mean_distance_is_of_all_pairs_of_two_crops(monkeypatch):
    monkeypatch.setattr(reid, "chunk_rows", in_sevens)
    crops = crops_of_people(80, spread=1.2)
    expected = pairs_of(crops).distances.sum().item() / (80 * 79)
    curve = reid.distance_histograms(crops)
    assert curve["mean"] == pytest.approx(expected, rel=1e-5)


def test_the_mean_distance_to_a_gallery_is_of_all_pairs(monkeypatch):
    monkeypatch.setattr(reid, "chunk_rows", in_sevens)
    crops = crops_of_people(80, spread=1.2)
    nine = first_nine(crops)
    expected = pairs_of(crops).distances[:9].mean().item()
    curve = reid.distance_histograms(nine, crops)
    assert curve["mean"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["matches", "others"])
def test_histograms_count_pairs_of_two_cameras_up_to_each_distance(name, monkeypatch):
    monkeypatch.setattr(reid, "chunk_rows", in_sevens)
    crops = crops_of_people(80, spread=1.2)
    curve = reid.distance_histograms(crops)
    pairs = pairs_of(crops)
    wanted = pairs.same if name == "matches" else ~pairs.same
    distances = pairs.distances[wanted & pairs.across]
    assert curve[name].sum() == len(distances)
    for k in range(50, 1001, 50):
        below = (distances < curve["edges"][k]).sum().item()
        assert curve[name][:k].sum() == pytest.approx(below, abs=4)  # a pair may lie on an edge


def test_histograms_with_a_gallery_count_its_pairs(monkeypatch):
    monkeypatch.setattr(reid, "chunk_rows", in_sevens)
    crops = crops_of_people(80, spread=1.2)
    nine = first_nine(crops)
    curve = reid.distance_histograms(nine, crops)
    pairs = pairs_of(crops)
    matches = pairs.across & pairs.same
    others = pairs.across & ~pairs.same
    assert curve["matches"].sum() == matches[:9].sum()
    assert curve["others"].sum() == others[:9].sum()


def test_histograms_end_at_the_largest_distance():
    crops = crops_of_people(80, spread=1.2)
    edges = reid.distance_histograms(crops)["edges"]
    largest = pairs_of(crops).distances.max().item()
    assert len(edges) == 1001
    assert edges[0] == 0
    assert edges[-1].item() == pytest.approx(largest, rel=1e-5)


def curve_of(matches, others):
    """As of `reid.distance_histograms`, for distances from 0 to 2."""
    return {
        "edges": torch.linspace(0, 2, len(matches) + 1, dtype=torch.float64),
        "matches": torch.tensor(matches, dtype=torch.float64),
        "others": torch.tensor(others, dtype=torch.float64),
    }


def noisy_curve():
    """40 bins, where the odds of a match fall with the distance, but for noise: (matches,
    others)."""
    random = np.random.RandomState(0)
    bins = np.arange(40)
    near = ((bins - 10) / 8) ** 2
    far = ((bins - 25) / 8) ** 2
    matches = random.poisson(50 * np.exp(-near))
    others = random.poisson(50 * np.exp(-far))
    return matches, others


def falling_shares(matches, pairs):
    """Isotonic regression by its minimax formula: of shares that fall from bin to bin, those
    nearest to matches / pairs."""
    shares = []
    for k in range(len(pairs)):
        highest = []
        for first in range(k + 1):
            sums = matches[first:].cumsum() / pairs[first:].cumsum()
            highest.append(sums[k - first :].max())  # of the blocks from `first` to k or beyond
        shares.append(min(highest))
    return np.array(shares)


def test_probability_of_the_same_person_is_the_share_that_falls_with_the_distance():
    matches, others = noisy_curve()
    calibration = reid.calibrate(curve_of(matches, others))

    # A pair of each kind more, where it is least expected.
    others = others.astype(float)
    others[0] += 1
    matches = matches.astype(float)
    matches[-1] += 1
    pairs = matches + others
    middles = (np.arange(40) + 0.5) / 20
    shares = falling_shares(matches, pairs)
    means = []
    log_odds = []
    for share in np.unique(shares.round(12))[::-1]:
        level = np.isclose(shares, share)
        means.append(np.average(middles[level], weights=pairs[level]))
        odds = matches[level].sum() / others[level].sum()
        log_odds.append(np.log(odds))
    assert 5 < len(means) < 40

    # The log-odds are drawn from one level's mean distance to the next.
    edges = np.linspace(0, 2, 41)
    drawn = np.interp(edges, means, log_odds)
    expected = 1 / (1 + np.exp(-drawn))
    assert np.allclose(calibration.probability(edges), expected)


def test_the_probability_of_the_same_person_is_one_half_at_the_distance_that_is_told():
    calibration = reid.calibrate(curve_of(*noisy_curve()))
    assert 0 < calibration.half < 2
    assert calibration.probability(calibration.half) == pytest.approx(0.5)


def test_without_a_prior_the_share_of_matches_is_the_curves():
    matches, others = noisy_curve()
    calibration = reid.calibrate(curve_of(matches, others))
    share = matches.sum() / (matches.sum() + others.sum())
    assert calibration.share == pytest.approx(share)


def test_where_other_pairs_are_seven_times_as_frequent_the_odds_are_a_seventh():
    matches, others = noisy_curve()
    prior = matches.sum() / (matches.sum() + 7 * others.sum())
    plain = reid.calibrate(curve_of(matches, others))
    shifted = reid.calibrate(curve_of(matches, others), prior)
    edges = np.linspace(0, 2, 41)
    p = plain.probability(edges)
    q = shifted.probability(edges)
    odds = p / (1 - p)
    assert np.allclose(q / (1 - q), odds / 7)
    assert shifted.half < plain.half
    assert shifted.share == prior


@pytest.mark.parametrize("prior", [None, 1e-12, 0.5, 1 - 1e-6])
@pytest.mark.parametrize("few", ["500 009", "005 900", "000 000", "100 000", "000 010", "010 010"])
def test_the_probability_stays_within_its_limits_and_falls_however_few_pairs_there_are(few, prior):
    """few: three bins of matches, three of others."""
    matches, others = few.split()
    curve = curve_of(list(map(int, matches)), list(map(int, others)))
    calibration = reid.calibrate(curve, prior)
    p = calibration.probability(np.linspace(0, 2, 9))
    assert (p > 0).all()
    assert (p < 1).all()
    assert (np.diff(p) <= 1e-15).all()
    assert 0 <= calibration.half <= 2
    assert 0 <= calibration.share <= 1
    if p[-1] > 0.5:  # at all distances: their end is told
        assert calibration.half == 2
    if p[0] < 0.5:  # at none
        assert calibration.half == 0


@pytest.mark.parametrize("half, where", [(0, "at no distance"), (1.5, "up to a distance of 1.500")])
def test_it_is_told_up_to_which_distance_two_crops_are_one_person(half, where):
    calibration = reid.Calibration(edges=None, log_odds=None, half=half, share=0.0207)
    told = reid.describe_half(calibration, {"cross_camera": True})
    assert told == f"50 % or more {where}, if 2.07 % of the pairs across cameras match"


# ------------------------------------------------------------------------------------------
# Stage 2, by formulas: the Hamming parameter.


def certain_of(labels):
    """Log-probabilities [N, 41] of a network that is certain of these classes, int64 [N, 12]."""
    columns = [F.one_hot(column, n) for column, n in zip(labels.T, CLASS_COUNTS)]
    return torch.cat(columns, 1).float().log()


def people_in_changing_clothes():
    """Eight people, once before each of five cameras: (`reid.Crops`, labels). A person differs in
    one attribute from camera to camera, and from others in more."""
    ids = torch.arange(40) % 8
    cameras = torch.arange(40) // 8
    labels = some_classes(8, seed=0).repeat(5, 1)
    labels[:, 0] = cameras % 4
    features = torch.randn(40, 4, generator=seeded(1))
    return reid.Crops(features, ids + 1, cameras, certain_of(labels)), labels


def people_alike_before_one_camera():
    """Five people, twice before each of two cameras: (`reid.Crops`, labels). A person differs
    in three attributes from camera to camera, in none before one; and from others in two more."""
    ids = torch.arange(20) % 5
    cameras = torch.arange(20) // 10
    labels = torch.zeros(20, len(ATTRIBUTES), dtype=torch.int64)
    labels[:, 1:4] = cameras[:, None]
    labels[:, -2] = ids
    labels[:, -1] = ids
    features = torch.arange(20.0)[:, None]  # other people are the nearest
    return reid.Crops(features, ids + 1, cameras, certain_of(labels)), labels


def maps_of_hamming(crops, labels, cameras):
    """The mAP for each Hamming parameter, 0 to 12, by brute force, where matches are from two of
    these cameras."""
    distances = pairs_of(crops).distances
    differing = (labels[:, None] != labels).sum(2)
    sides = (crops.ids, cameras, crops.ids, cameras)
    maps = []
    for k in range(13):
        found = brute_force(distances, *sides, differing <= k, True)
        maps.append(found["mAP"])
    return maps


SCORING = SimpleNamespace(threshold="mean", rerank=False, eval=None, out="o.pt")


def test_a_product_of_predictions_counts_the_attributes_that_differ():
    crops, labels = people_in_changing_clothes()
    differing = (labels[:, None] != labels).sum(2)
    alike = crops.attributes @ crops.attributes.T
    assert torch.equal(12 - alike, differing.float())


def test_the_hamming_parameter_is_that_of_the_highest_map():
    crops, labels = people_in_changing_clothes()
    maps = maps_of_hamming(crops, labels, crops.cameras)
    assert np.argmax(maps) == 1
    assert maps[1] > maps[12] + 0.1

    scored = reid.score_and_show(SCORING, crops, None, None)
    assert scored.hamming == 1
    found = scored.results["across cameras"]["hamming"]
    assert found["mAP"] == pytest.approx(maps[1], abs=1e-9)


def test_the_hamming_parameter_is_tuned_across_cameras():
    crops, labels = people_alike_before_one_camera()
    across = maps_of_hamming(crops, labels, crops.cameras)
    # As if each crop had a camera of its own, only a crop itself is no match.
    everywhere = maps_of_hamming(crops, labels, torch.arange(20))
    assert np.argmax(across) == 3
    assert np.argmax(everywhere) == 0
    assert reid.tune_hamming(crops, None, True) == 3


def test_of_hamming_parameters_of_equal_map_the_smallest_is_taken():
    crops, labels = people_in_changing_clothes()
    crops.log_p = certain_of(torch.zeros_like(labels))
    assert reid.tune_hamming(crops, None, True) == 0


def test_a_hamming_parameter_that_is_given_is_not_tuned():
    crops, _ = people_in_changing_clothes()
    assert reid.score_and_show(SCORING, crops, None, 5).hamming == 5


def test_the_threshold_is_the_mean_of_all_pairs():
    crops = crops_of_people(80, spread=1.2)
    scored = reid.score_and_show(SCORING, crops, None, None)
    expected = pairs_of(crops).distances.sum().item() / (80 * 79)
    assert scored.threshold == pytest.approx(expected, rel=1e-5)
    assert scored.hamming is None  # as no attributes are predicted


def test_a_selection_by_distance_and_attributes_returns_what_both_do():
    crops, labels = people_in_changing_clothes()
    pairs = pairs_of(crops)
    differing = (labels[:, None] != labels).sum(2)
    keep = (pairs.distances < 2.5) & (differing <= 4)
    sides = (crops.ids, crops.cameras, crops.ids, crops.cameras)
    # Across cameras a crop takes no part in its own ranking.
    expected = brute_force(pairs.distances, *sides, keep, True)
    tries = {"both": reid.Selection(2.5, 4)}
    found = reid.score_selections(crops, None, tries, cross_camera=True)["both"]
    assert found == pytest.approx(expected, abs=1e-9)


# ------------------------------------------------------------------------------------------
# The commands.


def embedded(market, part, path):
    """A part of the data set, "query" or "gallery", by the checkpoint of stage 2 in file `path`, as
    `reid.Crops`."""
    data = common.load_market(market, part, (64, 32))
    network = reid.make_embedder(torch_load(path), "cpu").model
    features = common.infer(network, data.images).features
    return reid.Crops(features, data.person_ids, data.camera_ids)


def percent(values):
    return [100 * value for value in values]


def column_of(rows, place):
    """The numbers in a column of a table."""
    return [float(row[place]) for row in rows]


# What training leaves behind.


def test_a_record_tells_what_was_run(trained):
    record = record_of(trained.par)
    assert record["arguments"]["loss"] == "wce"
    assert record["data"]["drawn demo set"]
    assert set(record["versions"]) == {"python", "torch", "torchvision"}
    assert {"training", "validation", "loading", "scoring"} <= set(record["seconds"])
    assert "peak_memory_MB" in record


def test_a_record_has_the_figures_of_each_epoch(trained):
    epochs = record_of(trained.par)["epochs"]
    assert [row["epoch"] for row in epochs] == [1, 2, 3]
    for row in epochs:
        assert {"loss", "lr", "seconds", "images_per_second", "f1", "accuracy"} <= set(row)


def test_an_epochs_rate_is_that_of_its_last_step(trained):
    epochs = record_of(trained.par)["epochs"]
    expected = [common.learning_rate(step, 12, 1e-3, 0.1) for step in (3, 7, 11)]
    assert [row["lr"] for row in epochs] == expected


def test_stage_1_keeps_the_epoch_of_the_highest_f1(trained):
    record = record_of(trained.par)
    best = max(record["epochs"], key=lambda row: row["f1"])
    assert record["best epoch"] == best["epoch"]
    scored = record["final"]["validation"]["f1"]["global"]
    assert scored == pytest.approx(best["f1"], abs=1e-4)


def test_stage_2_keeps_the_epoch_of_the_highest_map(trained):
    record = record_of(trained.reid)
    best = max(row["mAP"] for row in record["epochs"])
    scored = record["final"]["validation"]["across cameras"]["none"]["mAP"]
    assert scored == pytest.approx(best, abs=1e-6)


def test_each_identity_is_in_training_or_in_validation(trained):
    saved = common.load_checkpoint(trained.par, "par")
    identities = torch.cat([saved["train_ids"], saved["validation_ids"]])
    assert sorted(identities.tolist()) == list(range(1, 11))


def test_stage_2_keeps_the_split_and_the_weights_of_stage_1(trained):
    stage_1 = torch_load(trained.par)
    stage_2 = torch_load(trained.reid)
    assert torch.equal(stage_1["train_ids"], stage_2["train_ids"])
    for name, value in stage_1["model"].items():
        assert torch.equal(value, stage_2["stage 1"]["model"][name]), name


def test_selecting_by_both_returns_no_more_than_by_one(trained):
    across = record_of(trained.reid)["final"]["validation"]["across cameras"]
    assert across["both"]["length"] <= across["threshold"]["length"]
    assert across["both"]["length"] <= across["hamming"]["length"]


def test_stage_2_records_and_draws_how_sure_it_is(trained):
    calibration = reid.calibrate(torch_load(trained.reid)["distances"])
    expected = {"distance": calibration.half, "share of matches": calibration.share}
    assert record_of(trained.reid)["final"]["same person"] == expected


def test_a_run_draws_its_loss_and_its_figures_over_the_epochs(trained, monkeypatch):
    charts = []
    monkeypatch.setattr(par, "draw_chart", lambda *values, **named: charts.append(values))
    record = record_of(trained.reid)
    par.draw_training(record)

    ((title, lines, bottom, left, right),) = charts
    assert title == f"Training: epoch {record['best epoch']} of 3 is the best"
    assert list(lines) == ["loss", "mAP", "rank1", "mAP_all_cameras"]
    assert bottom == [(0.0, "1"), (0.5, "2"), (1.0, "3")]
    for name, points in lines.items():
        scale = float(left[-1]) if name == "loss" else 1
        expected = [row[name] / scale for row in record["epochs"]]
        assert points[:, 0].tolist() == [0, 0.5, 1]
        assert points[:, 1].tolist() == pytest.approx(expected, rel=0.05)  # left has two digits
    assert right[-1] == "100 %"


def test_points_of_a_chart_are_where_they_belong():
    points = torch.tensor([[0.0, 1.0], [0.5, 0.25], [1.0, 0.0]])
    chart = par.draw_chart("", {"": points}, [], [], [])
    assert chart.size == (1120, 620)
    for x, y in points.tolist():
        assert chart.getpixel((70 + 970 * x, 570 - 495 * y)) == ImageColor.getrgb(par.COLOURS[0])
    assert chart.getpixel((200, 550)) == (255, 255, 255)


def test_both_stages_leave_a_picture_of_their_training(trained):
    assert picture_of(trained.par.with_suffix(".png")).size == (1120, 620)
    assert picture_of(trained.reid.with_suffix(".png")).size == (1120, 2 * 620)  # below figure 3


def test_runs_leave_no_files_but_their_own(trained):
    expected = {"lonely", "par.png", "reid.png"}
    for name in ("par", "reid"):
        expected |= {f"{name}.pt", f"{name}.last", f"{name}.json"}
    assert set(os.listdir(trained.folder)) == expected


# Stage 1: scores and statistics.


def test_stage_1_is_scored_beside_the_commonest_class_of_training(trained, market, run):
    out, _ = run(par, "--eval", trained.par)

    data = common.load_market(market, "train")
    training, validation = par.saved_split(torch_load(trained.par), data, trained.par)
    commonest = data.labels[training].mode(0).values
    hits = (data.labels[validation] == commonest).float().mean(0)
    accuracy = percent([*hits.tolist(), hits.mean().item()])
    f1 = percent(record_of(trained.par)["final"]["validation"]["f1"].values())

    assert "24 validation crops of 4 identities" in out
    rows = table_of(out, "validation crops")
    assert column_of(rows, 2) == pytest.approx(accuracy, abs=0.01)
    assert column_of(rows, 3) == pytest.approx(f1, abs=0.01)


def test_a_checkpoint_of_stage_2_scores_as_the_stage_1_in_it(trained, run):
    own, _ = run(par, "--eval", trained.par)
    kept, _ = run(par, "--eval", trained.reid)
    title = "60 test crops of 10 identities"
    assert table_of(kept, title, 13) == table_of(own, title, 13)


def test_test_crops_without_annotations_are_not_scored(trained, market, tmp_path, run):
    root = shutil.copytree(market, tmp_path / "copy")
    (root / "annotations_test.csv").unlink()
    out, _ = run(par, "--eval", trained.par, "--data", root)
    assert f"{root} holds no annotated test crops: these are not scored." in out


def test_statistics_count_crops_and_identities(market, run):
    out, _ = run(par, "--stats")
    rows = table_of(out, "Table 4")
    assert len(rows) == sum(CLASS_COUNTS)
    labels = common.load_market(market, "train").labels
    black = (labels[:, 10] == 0).sum().item()
    share = f"{100 * black / 60:.2f}"
    # An identity has six crops, so both shares are the same.
    assert ["upcolor", "black", str(black), share, str(black // 6), share] in rows


def test_all_losses_are_trained_and_compared(tmp_path, run):
    out, _ = run(par, "--loss", "all", *QUICK)
    rows = table_of(out, "Table 3")
    assert [row[0] for row in rows] == [*map(str.capitalize, ATTRIBUTES), "Global"]
    for place, kind in enumerate(par.LOSSES, 1):
        record = record_of(tmp_path / f"o_{kind}.pt")
        assert record["arguments"]["loss"] == kind
        f1 = percent(record["final"]["validation"]["f1"].values())
        assert column_of(rows, place) == pytest.approx(f1, abs=0.01)


# Stage 1: one's own images.


def test_predictions_are_the_classes_and_probabilities_of_the_network(trained, market, run):
    folder = market / "bounding_box_test"
    crop = crops_of(market)[0]
    out, _ = run(par, "--eval", trained.par, "--predict", folder, crop)

    rows = list(csv.DictReader(out.splitlines()))
    paths = [*sorted(folder.iterdir()), crop]
    assert [row["file"] for row in rows] == list(map(str, paths))
    model = par.load_network(torch_load(trained.par), "cpu")
    crops, _ = common.read_crops(paths, (64, 32))
    logits = common.infer(model, crops).logits.split(CLASS_COUNTS, 1)
    for scores, (attribute, names) in zip(logits, ATTRIBUTES.items(), strict=True):
        sure, best = scores.softmax(1).max(1)
        told = [float(row[f"{attribute}_probability"]) for row in rows]
        assert told == pytest.approx(sure.tolist(), abs=0.02)
        # Where two classes are as probable, rounding may choose either.
        agreed = [row[attribute] == names[k] for row, k in zip(rows, best.tolist())]
        assert np.mean(agreed) > 0.9


def test_images_of_all_kinds_and_names_are_read(trained, tmp_path, run):
    folder = tmp_path / "mine"
    (folder / "below").mkdir(parents=True)
    # Windows allows no line break in a name.
    odd = "odd \u00e4.png" if os.name == "nt" else "two\nlines \u00e4.webp"
    paths = [folder / "below" / "large.png", folder / odd]
    for path in (*paths, folder / ".hidden.png"):
        Image.new("RGB", (400, 300), "blue").save(path)
    for name in ("Thumbs.db", "desktop.ini"):
        (folder / name).write_text("no image")

    out, err = run(par, "--eval", trained.par, "--predict", folder)
    rows = csv.DictReader(out.splitlines(keepends=True))
    assert {row["file"] for row in rows} == set(map(str, paths))
    assert "Skipped" not in err


def test_what_cannot_be_read_is_named_and_left_out(trained, tmp_path, run, monkeypatch):
    folder = tmp_path / "mine"
    folder.mkdir()
    large = folder / "large.png"
    Image.new("RGB", (400, 300), "blue").save(large)
    Image.new("L", (500, 500)).save(folder / "bomb.png")
    Image.new("I;16", (40, 30)).save(folder / "deep.png")
    (folder / "empty.png").write_bytes(b"")
    (folder / "cut.png").write_bytes(large.read_bytes()[:300])
    (folder / "text.jpg").write_text("GIF")
    if os.name != "nt":
        os.truncate(folder / "text.jpg", 2**37)  # more than any memory, but no disk
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)

    with pytest.warns(Image.DecompressionBombWarning):  # large.png is over the limit, but not twice
        out, err = run(par, "--eval", trained.par, "--predict", tmp_path / "nowhere", folder)
    rows = list(csv.DictReader(out.splitlines()))
    assert [row["file"] for row in rows] == [str(large)]
    skipped = [line for line in err.splitlines() if line.startswith("Skipped: ")]
    reasons = (
        "nowhere",
        "bomb.png",
        "deep.png is not a readable image (more than 8 bits a channel)",
        "empty.png",
        "cut.png",
        "text.jpg",
    )
    assert len(skipped) == len(reasons)
    for reason in reasons:
        assert sum(reason in line for line in skipped) == 1, reason


@pytest.mark.skipif(os.name == "nt", reason="making links takes rights there")
def test_links_to_folders_are_followed_and_each_real_folder_once(tmp_path, capsys):
    top = tmp_path / "top"
    (top / "b" / "below").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for name in ("b/1.png", "b/below/2.png", "../elsewhere/3.png"):
        (top / name).touch()
    (top / "a").symlink_to(top / "b")  # earlier in the alphabet than what it points to
    (top / "b" / "round").symlink_to(top)
    (top / "c").symlink_to(tmp_path / "elsewhere")
    (top / "d").symlink_to(tmp_path / "elsewhere")
    (top / "4.png").symlink_to(top / "b" / "1.png")
    (top / "5.png").symlink_to(tmp_path / "gone.png")

    expected = ["4.png", "b/1.png", "b/below/2.png", "c/3.png"]
    assert par.list_files([top]) == [top / name for name in expected]
    assert capsys.readouterr().err == f"Skipped: {top / '5.png'} is no file, nor a link to one.\n"


def test_what_a_system_puts_beside_pictures_is_not_looked_at(tmp_path):
    for name in (
        "@eaDir/1.jpg/THUMB_M.jpg",
        "#recycle/2.jpg",
        "__MACOSX/._3.jpg",
        "below/Thumbs.db",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert par.list_files([tmp_path]) == []


@pytest.mark.skipif(os.name == "nt", reason="such names are not allowed there")
def test_what_a_terminal_would_act_on_is_shown_as_a_question_mark(trained, tmp_path, run):
    folder = tmp_path / "mine"
    folder.mkdir()
    red = "\x1b[31mred"
    Image.new("RGB", (40, 80), "blue").save(folder / f"{red}.png")
    Image.new("RGB", (40, 80), "blue").save(
        folder / b"odd\xff.png".decode("utf-8", "surrogateescape")
    )
    (folder / f"{red}.txt").write_text("no image")
    query = tmp_path / "query.png"
    Image.new("RGB", (40, 80), "red").save(query)

    out, err = run(reid, "--eval", trained.reid, "--gallery", folder, "--search", query)
    assert "\x1b" not in out + err
    assert f"Skipped: {folder}/?[31mred.txt is not a readable image" in err
    assert sorted(Path(row[-1]).name for row in table_of(out, "Nearest to", 2)) == [
        "?[31mred.png",
        "odd?.png",
    ]
    _, err = run(par, "--eval", trained.par, "--predict", folder / f"{red}.txt", error="No image")
    assert "?[31mred.txt" in err.splitlines()[-1]


def test_what_a_terminal_cannot_show_is_shown_as_a_question_mark(monkeypatch):
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(encoding="cp1252"))
    assert common.printable("\u00e4\u0142.png") == "\u00e4?.png"


@pytest.mark.skipif(sys.platform != "linux", reason="such names are not allowed there")
def test_a_name_that_is_no_text_is_written_into_the_csv_as_it_is(
    trained, tmp_path, monkeypatch, run
):
    name = os.fsencode(tmp_path) + b"/odd\xff.png"
    Image.new("RGB", (40, 80), "blue").save(os.fsdecode(name), "png")
    with open(tmp_path / "out.csv", "w", encoding="utf-8") as out:
        monkeypatch.setattr(sys, "stdout", out)
        run(par, "--eval", trained.par, "--predict", os.fsdecode(name))
    assert (tmp_path / "out.csv").read_bytes().splitlines()[1].startswith(name + b",")


def test_predictions_are_drawn_sixty_as_a_sheet_and_twenty_as_maps(trained, market, tmp_path, run):
    folder = market / "bounding_box_test"
    assert len(os.listdir(folder)) > 60
    run(par, "--eval", trained.par, "--predict", folder, "--sheet", "--maps")
    sheet = picture_of(tmp_path / "par_sheet.png")
    assert sheet.size == (6 * 166 + 8, 10 * (256 + 13 * 18 + 24) + 8)
    maps = picture_of(tmp_path / "par_maps.png")
    assert maps.size == (13 * 166 + 8, 20 * (192 + 18 + 24) + 8)


def test_predictions_are_written_block_after_block_until_they_are_stopped(
    trained, market, run, monkeypatch
):
    monkeypatch.setattr(common, "BLOCK_PIXELS", 7 * 64 * 32)  # seven crops
    command = ["--eval", trained.par, "--predict", market / "query", market / "bounding_box_test"]
    whole, _ = run(par, *command)
    with monkeypatch.context() as patch:
        before_call(patch, common, "infer", 4)
        stopped, _ = run(par, *command, code=130, error="par.py: stopped.")
    assert stopped.splitlines() == whole.splitlines()[: 1 + 3 * 7]


def test_how_far_a_prediction_is_is_shown_and_cleared_before_lines_that_stay(
    trained, market, run, monkeypatch
):
    shown = []
    monkeypatch.setattr(common, "show_line", shown.append)
    monkeypatch.setattr(common, "BLOCK_PIXELS", 4 * 64 * 32)
    run(par, "--eval", trained.par, "--predict", market / "query")
    told = [text for text in shown if text]
    assert [text.split(",")[0] for text in told] == [
        "4 of 10 images",
        "8 of 10 images",
        "10 of 10 images",
    ]
    assert told[-1] == "10 of 10 images, 0:00 left"
    assert shown[0] == shown[-1] == ""


def test_an_activation_map_averages_to_the_logit_without_its_bias(trained, market):
    model = par.load_network(torch_load(trained.par), "cpu")
    crops = common.load_market(market, "query", (64, 32)).images
    classes, _ = par.predict(model, crops)
    maps = par.activation_maps(model, crops, classes)
    logits = common.infer(model, crops).logits.split(CLASS_COUNTS, 1)
    for k, scores in enumerate(logits):
        best = scores.gather(1, classes[:, k : k + 1])[:, 0]
        bias = model.heads[k][1].bias[classes[:, k]]
        assert torch.allclose(maps[:, k].mean((1, 2)) + bias, best, atol=1e-4)


def test_a_network_that_gives_nan_is_told_to_have_diverged(trained, market):
    model = par.load_network(torch_load(trained.par), "cpu")
    model.heads[3][1].bias.data.fill_(math.nan)
    crops = common.load_market(market, "query", (64, 32)).images
    with pytest.raises(UserError, match="holds NaN or infinity: its training diverged"):
        common.infer(model, crops)


# From Python.


def test_a_recogniser_gives_what_is_predicted(trained, market, run):
    crops = common.load_market(market, "query", (64, 32)).images
    classes, probabilities = par.load_recogniser(trained.par)(crops)
    assert classes.dtype == torch.int64
    assert probabilities.dtype == torch.float32
    out, _ = run(par, "--eval", trained.par, "--predict", market / "query")
    for row, codes, sure in zip(csv.DictReader(out.splitlines()), classes, probabilities):
        for k, (attribute, names) in enumerate(ATTRIBUTES.items()):
            assert row[attribute] == names[codes[k]]
            assert row[f"{attribute}_probability"] == f"{sure[k]:.3f}"


def test_a_recogniser_takes_a_checkpoint_of_stage_2(trained, market):
    crops = common.load_market(market, "query", (64, 32)).images
    classes, _ = par.load_recogniser(trained.reid, "cpu")(crops)
    assert torch.equal(classes, par.load_recogniser(trained.par, "cpu")(crops)[0])


def test_an_embedder_gives_what_is_exported(trained, market, tmp_path, run):
    crops = common.load_market(market, "query", (64, 32)).images
    features = reid.load_embedder(trained.reid)(crops)
    assert features.dtype == torch.float32
    assert features.device.type == "cpu"
    run(reid, "--eval", trained.reid, "--embed", tmp_path / "f.npz")
    with np.load(tmp_path / "f.npz") as arrays:
        assert np.array_equal(features.numpy(), arrays["query_features"])


def test_crops_of_any_size_are_brought_to_the_networks_as_files_are(trained, market):
    crops = common.load_market(market, "query", (128, 64)).images
    small = common.load_market(market, "query", (64, 32)).images
    resized = par.resize_crops(crops, (64, 32))
    assert (resized.int() - small.int()).abs().max() <= 1
    embedder = reid.load_embedder(trained.reid)
    assert torch.equal(embedder(crops), embedder(resized))
    recogniser = par.load_recogniser(trained.par)
    assert torch.equal(recogniser(crops)[1], recogniser(resized)[1])


@pytest.mark.parametrize("size", [(64, 32), (200, 100)])
def test_of_no_crops_there_are_no_features_and_no_attributes(size, trained):
    crops = torch.zeros(0, 3, *size, dtype=torch.uint8)
    assert reid.load_embedder(trained.reid)(crops).shape == (0, 120)
    classes, probabilities = par.load_recogniser(trained.par)(crops)
    assert classes.shape == probabilities.shape == (0, 12)


@pytest.mark.parametrize(
    "crops",
    [
        np.zeros((2, 3, 64, 32), np.uint8),
        torch.zeros(2, 3, 64, 32),
        torch.zeros(3, 64, 32, dtype=torch.uint8),
        torch.zeros(2, 64, 32, 3, dtype=torch.uint8),
        torch.zeros(2, 3, 0, 32, dtype=torch.uint8),
    ],
    ids=["array", "float", "one crop", "channels last", "no pixels"],
)
def test_what_is_no_crops_is_refused_in_a_sentence(crops, trained):
    with pytest.raises(UserError, match="Crops have to be "):
        reid.load_embedder(trained.reid)(crops)
    with pytest.raises(UserError, match="Crops have to be "):
        par.load_recogniser(trained.par)(crops)


def test_the_lines_in_readme_embed_and_recognise(trained, market, tmp_path, monkeypatch):
    shutil.copy(trained.par, tmp_path / "par_best.pt")
    shutil.copy(trained.reid, tmp_path / "reid_best.pt")
    monkeypatch.chdir(tmp_path)
    readme = (HERE / "README.md").read_text("utf-8")
    (lines,) = re.findall(r"```python\n(import par, reid\n.*?)```", readme, re.DOTALL)
    names = {"crops": common.load_market(market, "query", (64, 32)).images}
    exec(lines, names)
    assert names["features"].shape == (10, 120)
    assert names["classes"].shape == names["probabilities"].shape == (10, 12)


def test_a_network_of_the_other_stage_is_no_embedder(trained):
    with pytest.raises(UserError, match="is a checkpoint of par.py; one of reid.py is needed"):
        reid.load_embedder(trained.par)


# Networks for other programs.


@pytest.mark.parametrize("recipe", ["report", "strong"])
def test_an_exported_embedder_gives_the_same_features_to_the_bit(
    recipe, trained, strong, market, tmp_path, run
):
    source = trained.reid if recipe == "report" else strong.reid
    embedder = reid.load_embedder(source)
    crops = common.load_market(market, "query", embedder.size).images
    path = tmp_path / "reid.pt2"
    out, err = run(reid, "--eval", source, "--export", path)
    height, width = embedder.size
    assert out.startswith(f"{path}: crops [N, 3, {height}, {width}], uint8, RGB -> features\n")
    exported = torch.export.load(path).module()
    for count in (1, 2, 5):
        features = exported(crops[:count])
        assert torch.equal(features, embedder(crops[:count]))
        assert not features.requires_grad  # so that .numpy() works


@pytest.mark.parametrize("recipe", ["report", "strong"])
def test_an_exported_recogniser_gives_the_same_attributes_to_the_bit(
    recipe, trained, strong, market, tmp_path, run
):
    source = trained.reid if recipe == "report" else strong.par
    recogniser = par.load_recogniser(source)
    crops = common.load_market(market, "query", recogniser.size).images[:5]
    path = tmp_path / "par.pt2"
    run(par, "--eval", source, "--export", path)
    ours = torch.export.load(path).module()(crops)
    theirs = recogniser(crops)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


def test_an_exported_network_takes_nothing_but_pytorch(strong, tmp_path, run):
    path = tmp_path / "reid.pt2"
    run(reid, "--eval", strong.reid, "--export", path)
    assert str(HERE).encode() not in path.read_bytes()  # nor where it was made
    code = (
        f"import torch; network = torch.export.load({str(path)!r}).module(); "
        "print(network(torch.zeros(3, 3, 32, 32, dtype=torch.uint8)).shape[0])"
    )
    end = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert end.stdout == "3\n", end.stderr


@pytest.fixture
def onnxruntime():
    """That package, where all is there that the tests of ONNX take."""
    if torch.__version__.startswith("2.6."):
        pytest.skip("it cannot write ONNX with the newest onnxscript")
    pytest.importorskip("onnxscript")
    return pytest.importorskip("onnxruntime")


def test_an_onnx_embedder_gives_the_same_features(strong, market, onnxruntime, tmp_path, run):
    path = tmp_path / "reid.onnx"
    run(reid, "--eval", strong.reid, "--export", path)
    assert os.listdir(tmp_path) == ["reid.onnx"]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    embedder = reid.load_embedder(strong.reid)
    for count in (1, 5):
        crops = common.load_market(market, "query", (32, 32)).images[:count]
        (features,) = session.run(["features"], {"crops": crops.float().numpy()})
        assert np.allclose(features, embedder(crops), atol=1e-4)


def test_an_onnx_recogniser_gives_the_same_attributes(trained, market, onnxruntime, tmp_path, run):
    path = tmp_path / "par.onnx"
    run(par, "--eval", trained.par, "--export", path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    crops = common.load_market(market, "query", (64, 32)).images
    names = ["classes", "probabilities"]
    classes, probabilities = session.run(names, {"crops": crops.float().numpy()})
    expected, sure = par.load_recogniser(trained.par)(crops)
    assert np.array_equal(classes, expected)
    assert np.allclose(probabilities, sure, atol=1e-4)


def test_writing_onnx_takes_two_packages(trained, tmp_path, monkeypatch, run):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    error = "x.onnx takes two packages: pip install onnx onnxscript."
    run(reid, "--eval", trained.reid, "--export", tmp_path / "x.onnx", error=error)
    assert os.listdir(tmp_path) == []


def test_an_onnx_that_this_pytorch_cannot_write_is_told(trained, tmp_path, monkeypatch, run):
    error = TypeError("no such operator")
    monkeypatch.setattr(torch.onnx, "export", Mock(side_effect=error))
    monkeypatch.setattr(importlib.util, "find_spec", Mock())
    error = "(TypeError): install newer ones of all three, or write a .pt2."
    run(reid, "--eval", trained.reid, "--export", tmp_path / "x.onnx", error=error)
    assert os.listdir(tmp_path) == []


# Stage 2: the test set.


def test_stage_2_reads_no_annotations(trained, market, tmp_path, run):
    root = shutil.copytree(market, tmp_path / "copy")
    for path in root.glob("*.csv"):
        path.write_bytes(b"\xff\xfe\x00\x81")
    run(reid, "--data", root, *QUICK)
    run(reid, "--data", root, "--eval", trained.reid)
    run(reid, "--data", root, "--eval", trained.reid, "--embed", tmp_path / "f.npz")


@pytest.mark.parametrize("part", ["query", "gallery"])
def test_the_export_holds_embeddings_identities_cameras_and_names(
    part, trained, market, tmp_path, run
):
    run(reid, "--eval", trained.reid, "--embed", tmp_path / "f.npz")
    data = common.load_market(market, part, (64, 32))
    expected = embedded(market, part, trained.reid)
    with np.load(tmp_path / "f.npz") as arrays:
        assert np.allclose(arrays[f"{part}_features"], expected.features)
        assert arrays[f"{part}_ids"].tolist() == data.person_ids.tolist()
        assert arrays[f"{part}_cameras"].tolist() == data.camera_ids.tolist()
        assert arrays[f"{part}_names"].tolist() == data.names


def test_the_test_set_is_scored_as_by_brute_force(trained, market, run):
    out, _ = run(reid, "--eval", trained.reid)
    query = embedded(market, "query", trained.reid)
    gallery = embedded(market, "gallery", trained.reid)
    distances = torch.cdist(query.features, gallery.features)
    expected = brute_force(
        distances, query.ids, query.cameras, gallery.ids, gallery.cameras, None, True
    )
    row = table_of(out, ", test set, ")[0]
    assert row[:2] == ["none", f"{100 * expected['mAP']:.2f}"]


def test_scores_tell_the_checkpoint_and_the_selection_asked_for(trained, run):
    out, _ = run(reid, "--eval", trained.reid, "--hamming", 3, "--threshold", 1.5)
    assert f"| {trained.reid}\n" in out
    assert "distance < 1.500" in out
    assert "at most 3 of 12" in out


@pytest.mark.parametrize("prior", [None, 0.3])
def test_promised_probabilities_are_held_against_the_pairs_of_the_test_set(
    prior, trained, market, run
):
    asked = [] if prior is None else ["--prior", prior]
    out, _ = run(reid, "--eval", trained.reid, *asked)

    query = embedded(market, "query", trained.reid)
    gallery = embedded(market, "gallery", trained.reid)
    distances = torch.cdist(query.features, gallery.features)
    calibration = reid.calibrate(torch_load(trained.reid)["distances"], prior)
    promised = torch.from_numpy(calibration.probability(distances))
    step = (10 * promised).long().clamp(max=9)
    same = (query.ids[:, None] == gallery.ids).double()
    counted = (gallery.ids >= 0) & (query.cameras[:, None] != gallery.cameras)

    rows = table_of(out, "Probability of the same person", 10)
    compared = 0
    for k, row in enumerate(rows):
        found = counted & (step == k)
        assert row[:3] == [f"{10 * k}", "to", f"{10 * k + 10}"]
        assert int(row[3]) == pytest.approx(found.sum().item(), abs=9)
        if found.sum() > 50:  # what lies at a bin's edge changes the means of few pairs much
            means = [promised[found].mean().item(), same[found].mean().item()]
            assert [float(cell) for cell in row[4:]] == pytest.approx(percent(means), abs=3)
            compared += 1
    assert compared > 0


def upper_edges(picture, y):
    """The colours in the upper edge of each of 11 crops of `par.draw_sheet`: a set each."""
    edges = []
    for k in range(11):
        left = 8 + 166 * k
        edges.append({picture.getpixel((left + x, y)) for x in range(128)})
    return edges


def test_ranked_lists_are_drawn_from_the_best_to_the_worst_in_frames(trained, tmp_path, run):
    run(reid, "--eval", trained.reid, "--show", 3)
    picture = picture_of(tmp_path / "show.png")
    assert picture.size == (11 * 166 + 8, 3 * (256 + 2 * 18 + 24) + 8)

    match = {ImageColor.getrgb(reid.MATCH)}
    other = {ImageColor.getrgb(reid.OTHER)}
    lists = [upper_edges(picture, y) for y in (5, 321, 637)]
    for edges in lists:
        assert edges[0] == {(255, 255, 255)}  # the query has no frame
        for edge in edges[1:]:
            assert edge in (match, other)
    assert lists[0][1] == match
    assert lists[0].count(match) >= lists[2].count(match)


# Stage 2: search by an image and by attributes.


def search_queries(run, trained, folder):
    """Search for each image of a folder in that folder: -> their names, the four rows of each."""
    command = ["--eval", trained.reid, "--gallery", folder, "--search", folder, "--top", 4]
    out, _ = run(reid, *command)
    names = sorted(os.listdir(folder))
    return names, [table_of(out, f"Nearest to {folder / name}", 4) for name in names]


def test_search_ranks_by_distance_and_leaves_out_the_image_itself(trained, market, run):
    names, tables = search_queries(run, trained, market / "query")
    features = embedded(market, "query", trained.reid).features
    distances = torch.cdist(features, features)
    for q, rows in enumerate(tables):
        assert [row[0] for row in rows] == ["1", "2", "3", "4"]
        found = [names.index(Path(row[-1]).name) for row in rows]
        assert q not in found
        told = column_of(rows, 1)
        assert told == pytest.approx(distances[q, found].tolist(), abs=0.002)
        nearest = distances[q].sort().values[1:5]  # the first is the image itself
        assert told == pytest.approx(nearest.tolist(), abs=0.002)


def test_search_tells_how_sure_it_is_and_counts_the_same_attributes(trained, market, run):
    names, tables = search_queries(run, trained, market / "query")
    checkpoint = torch_load(trained.reid)
    calibration = reid.calibrate(checkpoint["distances"])
    images = common.load_market(market, "query", (64, 32))
    classes, _ = par.predict(reid.make_embedder(checkpoint, "cpu").predictor, images.images)
    for q, rows in enumerate(tables):
        for row in rows:
            expected = 100 * calibration.probability(float(row[1]))
            assert float(row[2]) == pytest.approx(expected, abs=0.2)
            g = names.index(Path(row[-1]).name)
            assert int(row[4]) == (classes[q] == classes[g]).sum()


def test_search_finds_and_draws_a_copy_of_the_image(trained, market, tmp_path, run):
    folder = shutil.copytree(market / "query", tmp_path / "mine")
    query = crops_of(market)[3]
    shutil.copy(query, folder / "copy.jpg")
    out, _ = run(reid, "--eval", trained.reid, "--gallery", folder, "--search", query, "--top", 3)
    nearest = table_of(out, "Nearest to")[0]
    assert nearest[3:] == ["%", "12", "of", "12", str(folder / "copy.jpg")]
    picture = picture_of(tmp_path / "search.png")
    assert picture.width == 4 * 166 + 8


@pytest.mark.skipif(os.name == "nt", reason="making links takes rights there")
def test_search_leaves_out_all_links_to_the_image_before_it_chooses_the_nearest(
    trained, market, tmp_path, run
):
    folder = shutil.copytree(market / "query", tmp_path / "gallery")
    query = sorted(folder.iterdir())[0]
    for k in range(9):
        (folder / f"link{k}.jpg").symlink_to(query)
    out, _ = run(reid, "--eval", trained.reid, "--search", query, "--gallery", folder, "--top", 3)
    rows = table_of(out, "Nearest to", 3)
    assert [row[0] for row in rows] == ["1", "2", "3"]
    for row in rows:
        assert Path(row[-1]).resolve() != query.resolve()
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "link.jpg").symlink_to(query)
    out, _ = run(reid, "--eval", trained.reid, "--search", query, "--gallery", alone)
    assert "link.jpg" not in out


def test_finding_ranks_by_the_product_of_the_probabilities(trained, market, tmp_path, run):
    folder = market / "query"
    command = ["--eval", trained.reid, "--gallery", folder, "--top", 7]
    out, _ = run(reid, *command, "--find", "gender=female", "upcolor=red")

    images = common.load_market(market, "query", (64, 32))
    network = reid.make_embedder(torch_load(trained.reid), "cpu").predictor
    logits = common.infer(network, images.images).logits.split(CLASS_COUNTS, 1)
    female = logits[1].softmax(1)[:, 1]
    red = logits[10].softmax(1)[:, 2]
    product = (female * red).tolist()

    rows = table_of(out, "gender female, upcolor red, among 10", 7)
    told = column_of(rows, 1)
    assert told == pytest.approx(sorted(product, reverse=True)[:7], rel=0.01)
    own = [product[images.names.index(Path(row[-1]).name)] for row in rows]
    assert told == pytest.approx(own, rel=0.01)
    picture = picture_of(tmp_path / "find.png")
    assert picture.size == (5 * 166 + 8, 2 * (256 + 4 * 18 + 24) + 8)


# Stage 2: an index of one's own images.


@pytest.fixture
def shelf(market, tmp_path, monkeypatch):
    """A folder of 20 crops, .folder, where an index would be, .index, and how many crops are
    embedded at once, .counts: in blocks of 4, saved after each second one. Two blocks hold no
    image."""
    home = tmp_path / "home"
    folder = home / "mine"
    folder.mkdir(parents=True)
    for path in crops_of(market)[:20]:
        shutil.copy(path, folder)
    names = sorted(os.listdir(folder))
    for k in range(8):
        (folder / f"-{k}.txt").write_text("no image")

    describe = reid.Embedder.describe
    counts = []

    def watched(embedder, crops):
        counts.append(len(crops))
        return describe(embedder, crops)

    monkeypatch.setattr(reid.Embedder, "describe", watched)
    monkeypatch.setattr(common, "BLOCK_PIXELS", 4 * 64 * 32)
    return SimpleNamespace(
        home=home, folder=folder, index=home / "i.npz", names=names, counts=counts
    )


def write_index(run, trained, shelf, **expected):
    """Write or update the index: -> (what is said, the names and the features in it)."""
    shelf.counts.clear()
    command = ["--eval", trained.reid, "--embed", shelf.index, "--gallery", shelf.folder]
    out, err = run(reid, *command, **expected)
    with np.load(shelf.index) as arrays:
        return out + err, arrays["gallery_names"].tolist(), arrays["gallery_features"]


def ask(run, trained, gallery, query):
    """Search for an image in a folder or index, and find in it by attributes: -> (the rows of both
    tables, what the search says on stderr)."""
    command = ["--eval", trained.reid, "--gallery", gallery]
    nearest, err = run(reid, *command, "--search", query, "--top", 5)
    found, _ = run(reid, *command, "--find", "hat=no", "upcolor=red", "--top", 50)
    rows = table_of(nearest, "Nearest to", 5) + table_of(found, "hat no", 20)
    return rows, err


def test_an_index_names_its_files_and_skips_what_is_no_image(trained, run, shelf):
    said, names, features = write_index(run, trained, shelf)
    assert f"{shelf.index}: 20 gallery embeddings of 120 dimensions" in said
    assert said.count("Skipped: ") == 8
    assert names == [f"mine/{name}" for name in shelf.names]
    assert features.shape == (20, 120)
    assert shelf.counts == [4] * 5


def run_out_of_memory():
    raise MemoryError


@pytest.mark.parametrize(
    "act, code, sentence, seconds_per_save",
    [
        (press_ctrl_c, 130, "reid.py: stopped.", 99),
        (run_out_of_memory, 2, "the memory is full", 0),  # in place of a kill
    ],
)
def test_an_index_that_was_cut_off_goes_on(
    act, code, sentence, seconds_per_save, trained, run, shelf, monkeypatch
):
    """It is saved when it is stopped and, for a kill, now and then. Two networks embed a block of
    crops; the fourth block of crops is cut off."""
    monkeypatch.setattr(reid, "SECONDS_PER_SAVE", seconds_per_save)
    with monkeypatch.context() as patch:
        before_call(patch, common, "infer", 7, act)
        _, names, _ = write_index(run, trained, shelf, code=code, error=sentence)
    assert len(names) == 12
    assert shelf.counts == [4] * 4
    _, names, _ = write_index(run, trained, shelf)
    assert len(names) == 20
    assert sum(shelf.counts) == 8


def test_an_index_answers_as_its_folder_does(trained, run, shelf):
    write_index(run, trained, shelf)
    query = shelf.folder / shelf.names[0]
    rows, _ = ask(run, trained, shelf.folder, query)
    assert len(rows) == 25
    assert ask(run, trained, shelf.index, query)[0] == rows


def test_an_index_answers_as_it_was_written_but_cannot_draw_what_has_gone(trained, run, shelf):
    write_index(run, trained, shelf)
    query = shelf.folder / shelf.names[0]
    rows, err = ask(run, trained, shelf.index, query)
    assert "does not exist" not in err
    gone = Path(rows[0][-1])
    gone.unlink()
    shutil.copy(query, shelf.folder / "new.jpg")
    rows_after, err = ask(run, trained, shelf.index, query)
    assert rows_after == rows
    assert err.count(f"{gone} does not exist.") == 1


def test_an_index_embeds_what_is_new_and_drops_what_has_gone(trained, run, shelf):
    _, _, before = write_index(run, trained, shelf)
    (shelf.folder / shelf.names[3]).unlink()
    shutil.copy(shelf.folder / shelf.names[5], shelf.folder / shelf.names[4])
    shutil.copy(shelf.folder / shelf.names[6], shelf.folder / "new.jpg")

    said, names, after = write_index(run, trained, shelf)
    assert "; dropped 2 out of date" in said
    assert sum(shelf.counts) == 2
    kept = [*shelf.names[:3], *shelf.names[4:], "new.jpg"]
    assert names == [f"mine/{name}" for name in kept]
    assert np.array_equal(after[:3], before[:3])
    assert np.allclose(after[3], before[5], atol=1e-4)  # it was replaced by a copy of that
    assert np.array_equal(after[4:-1], before[5:])
    assert np.allclose(after[-1], before[6], atol=1e-4)


def test_an_index_can_be_moved_with_its_folder(trained, tmp_path, run, shelf):
    write_index(run, trained, shelf)
    rows, _ = ask(run, trained, shelf.folder, shelf.folder / shelf.names[0])
    moved = shutil.move(shelf.home, tmp_path / "moved")
    rows_after, _ = ask(run, trained, moved / "i.npz", moved / "mine" / shelf.names[0])
    assert str(rows_after).replace(str(moved), str(shelf.home)) == str(rows)


@pytest.mark.skipif(os.name == "nt", reason="Windows asks for rights to make a link")
def test_an_index_can_be_reached_by_a_link(trained, tmp_path, run, shelf):
    write_index(run, trained, shelf)
    link = tmp_path / "link"
    link.symlink_to(shelf.home, target_is_directory=True)
    query = shelf.folder / shelf.names[0]
    direct = ask(run, trained, shelf.index, query)
    assert ask(run, trained, link / "i.npz", query) == direct


@pytest.mark.skipif(os.name == "nt", reason="making links takes rights there")
def test_an_index_is_written_where_a_link_points(trained, tmp_path, run, shelf):
    real = tmp_path / "elsewhere" / "real.npz"
    real.parent.mkdir()
    shelf.index.symlink_to(real)
    write_index(run, trained, shelf)
    assert shelf.index.is_symlink()
    query = shelf.folder / shelf.names[0]
    for index in (shelf.index, real):
        rows, err = ask(run, trained, index, query)
        assert Path(rows[0][-1]).is_file()
        assert "does not exist" not in err


def test_an_index_is_not_replaced_by_other_embeddings(trained, market, run, shelf):
    write_index(run, trained, shelf)
    before = files_of(shelf.home)
    command = ["--eval", trained.reid, "--embed", shelf.index]
    run(reid, *command, "--gallery", market / "query", error="names none of the files")
    run(reid, *command, error="is an index of a --gallery: name that folder too")
    assert files_of(shelf.home) == before


def test_an_index_answers_no_other_checkpoint(trained, tmp_path, run, shelf):
    write_index(run, trained, shelf)
    saved = torch_load(trained.reid)
    saved["record"]["run"] = "another"
    common.save_checkpoint(tmp_path / "other.pt", saved)
    command = ["--eval", tmp_path / "other.pt", "--find", "hat=no", "--gallery", shelf.index]
    run(reid, *command, error="is an index of another checkpoint's embeddings")


# The strong recipe.


@pytest.fixture(scope="session")
def strong(market, tmp_path_factory):
    """A run of each stage by the strong recipe: .par, with --head conv, and from it .reid, at a
    rate too low to move a weight."""
    folder = tmp_path_factory.mktemp("strong")
    strong = SimpleNamespace(par=folder / "par.pt", reid=folder / "reid.pt")
    shared = ["--data", market, *QUICK, "--recipe", "strong"]
    assert call(par, *shared, "--head", "conv", "--out", strong.par) == 0
    stage_2 = ["--init", strong.par, "--lr", "1e-12", "--out", strong.reid]
    assert call(reid, *shared, *stage_2) == 0
    return strong


@pytest.mark.parametrize("without", [[], ["identity"], ["identity", "neck", "mirror"]])
def test_a_strong_stage_1_is_scored_and_predicts(without, strong, market, tmp_path, run):
    path = strong.par
    if without:
        path = tmp_path / "o.pt"
        run(par, *QUICK, "--recipe", "strong", "--without", *without)
    out, _ = run(par, "--eval", path)
    assert "test crops of 10 identities" in out
    out, _ = run(par, "--eval", path, "--predict", market / "query")
    rows = list(csv.DictReader(out.splitlines()))
    images = common.load_market(market, "query", (32, 32)).images
    classes, _ = par.predict(par.load_network(torch_load(path), "cpu"), images)
    for k, (attribute, names) in enumerate(ATTRIBUTES.items()):
        assert [row[attribute] for row in rows] == [names[c] for c in classes[:, k].tolist()]


def test_a_strong_stage_1_learns_identities(strong):
    weight = torch_load(strong.par)["model"]["identify.weight"]
    assert weight.std() > 0.0015  # it began at 0.001


def test_a_strong_stage_2_begins_with_all_weights_of_stage_1(strong):
    stage_1 = torch_load(strong.par)["model"]
    stage_2 = torch_load(strong.reid)["model"]
    assert stage_1.keys() == stage_2.keys()
    for name, value in stage_2.items():
        if value.dim() > 1:  # statistics of batch norm move at any rate
            assert torch.allclose(value, stage_1[name]), name


def test_a_strong_stage_2_predicts_attributes_itself(strong):
    checkpoint = torch_load(strong.reid)
    assert checkpoint["stage 1"] is None
    embedder = reid.make_embedder(checkpoint, "cpu")
    assert embedder.predictor is embedder.model


def test_the_reports_stage_2_keeps_the_stride_of_a_strong_stage_1(strong, tmp_path, run):
    run(reid, *QUICK, "--init", strong.par)
    embedder = reid.make_embedder(torch_load(tmp_path / "o.pt"), "cpu")
    assert embedder.model.backbone.net[-1][0].conv1.stride == 1
    record = record_of(tmp_path / "o.pt")
    # It is scored as it was validated.
    final = record["final"]["validation"]["across cameras"]["none"]
    assert final["mAP"] == record["epochs"][0]["mAP"]


def test_reranking_is_scored_beside_the_selections(strong, market, run):
    out, _ = run(reid, "--eval", strong.reid, "--rerank")
    rows = {row[0]: row[1:] for row in table_of(out, ", test set, ")}

    embedder = reid.make_embedder(torch_load(strong.reid), "cpu")
    query = reid.embed(embedder, common.load_market(market, "query", (32, 32)))
    data = common.load_market(market, "gallery", (32, 32))
    gallery = reid.embed(embedder, data, data.person_ids >= 0)
    chunks = reid.rerank_chunks(query.features, gallery.features, 20, 6, 0.3)
    distances = torch.cat([part for _, part in chunks])
    expected = brute_force(
        distances, query.ids, query.cameras, gallery.ids, gallery.cameras, None, True
    )

    for told, metric in zip(rows["re-ranked"], ("mAP", "mAP_trapezoid", "rank1")):
        assert told == f"{100 * expected[metric]:.2f}"
    assert rows["re-ranked"] != rows["none"]
    assert "hamming" in rows
    assert out.count("re-ranked") == 3


def test_the_hamming_parameter_of_the_test_set_is_tuned_on_validation(strong, run):
    out, _ = run(reid, "--eval", strong.reid)
    told = re.findall(r"at most (\d+) of 12 attributes differ", out)
    assert len(told) == 2
    assert told[0] == told[1]


def test_without_attributes_those_of_stage_1_are_used(strong, tmp_path, run):
    flags = ["--recipe", "strong", "--init", strong.par, "--without", "attributes"]
    run(reid, *QUICK, *flags)
    out, _ = run(reid, "--eval", tmp_path / "o.pt")
    assert "of 12 attributes differ" in out


def parameter_dimensions(path):
    """How many dimensions each parameter of a checkpoint has."""
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    model = torch_load(path)["model"]
    return [value.dim() for name, value in model.items() if not name.endswith(statistics)]


def test_muon_moves_the_filters_and_adamw_all_else(strong):
    last = torch_load(strong.reid.with_suffix(".last"))
    dimensions = parameter_dimensions(strong.reid)
    filters = dimensions.count(4)
    moved = [len(optimizer["state"]) for optimizer in last["training"]["optimizers"]]
    assert moved == [len(dimensions) - filters, filters]
    assert last["record"]["arguments"]["rungs"] == reid.RUNGS


def test_without_muon_adamw_moves_all(strong, tmp_path, run):
    left_out = ["attributes", "neck", "muon", "mirror"]
    run(reid, *QUICK, "--recipe", "strong", "--init", strong.par, "--without", *left_out)
    last = torch_load(tmp_path / "o.last")
    moved = [len(optimizer["state"]) for optimizer in last["training"]["optimizers"]]
    assert moved == [len(parameter_dimensions(tmp_path / "o.pt"))]
    rungs = ["identity", "triplets", "stride", "erasing", "shift"]
    assert last["record"]["arguments"]["rungs"] == rungs


# One camera.


@pytest.fixture
def one_camera(market, tmp_path):
    """A data set whose crops are all of one camera; one of the queries is in the gallery as
    well."""
    root = shutil.copytree(market, tmp_path / "copy")
    for part in common.PARTS.values():
        for path in (root / part).iterdir():
            path.rename(path.with_name(re.sub("_c[0-9]", "_c3", path.name)))
    query = sorted((root / "query").iterdir())[4]
    shutil.copy(query, root / "bounding_box_test")
    return root


def scores_of(distances, query, gallery):
    """By brute force, of all cameras: the percentages of a row of a table."""
    cameras = (torch.ones_like(crops.person_ids) for crops in (query, gallery))
    query_cameras, gallery_cameras = cameras
    scores = brute_force(
        distances,
        query.person_ids,
        query_cameras,
        gallery.person_ids,
        gallery_cameras,
        None,
        cross_camera=False,
    )
    return percent(scores[name] for name in ("mAP", "mAP_trapezoid", "rank1", "rank5"))


def test_crops_of_one_camera_are_validated_within_it(one_camera, tmp_path, run):
    out, _ = run(reid, "--data", one_camera, *QUICK)
    title = "validation crops, all cameras, as no identity is seen by two: 24 queries (%)"
    row = table_of(out, title, 1)[0]
    assert "across" not in out

    data = common.load_market(one_camera, "train", (32, 32), annotated=False)
    checkpoint = torch_load(tmp_path / "o.pt")
    embedder = reid.make_embedder(checkpoint, "cpu")
    rows = torch.isin(data.person_ids, checkpoint["validation_ids"])
    features = embedder(data.images[rows])
    distances = torch.cdist(features, features).fill_diagonal_(math.inf)
    crops = SimpleNamespace(person_ids=data.person_ids[rows])
    assert list(map(float, row[1:5])) == pytest.approx(scores_of(distances, crops, crops), abs=0.01)

    record = record_of(tmp_path / "o.pt")
    assert record["metrics"] == ["mAP", "rank1"]
    assert list(record["final"]["validation"]) == ["all cameras"]
    assert record["epochs"][0]["mAP"] == pytest.approx(float(row[1]) / 100, abs=1e-4)


def test_a_test_set_of_one_camera_is_scored_within_it_without_the_query_itself(
    one_camera, trained, run
):
    out, _ = run(reid, "--data", one_camera, "--eval", trained.reid, "--show", 3, "--rerank")
    title = "gallery crops, all cameras, as no identity is seen by two: 10 queries (%)"
    row = table_of(out, "test set, ", 1)[0]
    assert title in out

    query = common.load_market(one_camera, "query", (64, 32))
    gallery = common.load_market(one_camera, "gallery", (64, 32))
    embedder = reid.load_embedder(trained.reid)
    distances = torch.cdist(embedder(query.images), embedder(gallery.images))
    for q, name in enumerate(query.names):
        if name in gallery.names:
            distances[q, gallery.names.index(name)] = math.inf
    distances[:, gallery.person_ids == -1] = math.inf
    assert distances.isposinf().sum() > (gallery.person_ids == -1).sum() * 10
    expected = scores_of(distances, query, gallery)
    assert list(map(float, row[1:5])) == pytest.approx(expected, abs=0.01)


def test_queries_are_people(one_camera, trained, run):
    query = sorted((one_camera / "query").iterdir())[0]
    query.rename(query.with_stem("0000_c3_1"))
    error = f"{one_camera / 'query'} holds 0000_c3_1.jpg. Move them away or, if 0 is a person,"
    run(reid, "--data", one_camera, "--eval", trained.reid, error=error)


def test_a_query_that_is_all_its_gallery_has_no_match(one_camera, trained, run):
    both = [one_camera / "query", one_camera / "bounding_box_test"]
    kept = sorted(both[0].iterdir())[4].name
    for folder in both:
        for path in folder.iterdir():
            if path.name != kept:
                path.unlink()
    error = "No query has a match in the gallery, so there is nothing to score."
    run(reid, "--data", one_camera, "--eval", trained.reid, error=error)


def test_the_title_tells_how_many_queries_have_a_match(one_camera, trained, run):
    for folder in ("query", "bounding_box_test"):
        for path in (one_camera / folder).glob("0012_*"):
            if folder == "query":
                path.rename(path.with_name(path.name.replace("_c3", "_c4")))
    out, _ = run(reid, "--data", one_camera, "--eval", trained.reid)
    assert "gallery crops, across cameras: 1 of 10 queries (%)" in out
    assert "It is learned from" not in out.split("test set")[0]


def test_a_probability_learned_within_cameras_is_not_promised_across_them(
    one_camera, market, tmp_path, run
):
    run(reid, "--data", one_camera, *QUICK)
    out, _ = run(reid, "--eval", tmp_path / "o.pt")
    assert "It is learned from pairs of all cameras, so it does not hold for these." in out


def test_histograms_of_one_camera_count_all_pairs():
    crops = crops_of_people(50, spread=0.5)
    crops.cameras = torch.ones_like(crops.ids)
    curve = reid.distance_histograms(crops)
    same = crops.ids == crops.ids[:, None]
    assert not curve["cross_camera"]
    assert curve["matches"].sum() == same.sum() - 50
    assert curve["others"].sum() == (~same).sum()


def test_validation_takes_two_crops_of_an_identity(market, tmp_path, run):
    root = shutil.copytree(market, tmp_path / "copy")
    train, _ = common.split_identities(torch.arange(1, 11))
    for path in crops_of(root):
        number = int(path.name.split("_")[0])
        first = path == sorted(path.parent.glob(f"{number:04}_*"))[0]
        if not train[number - 1] and not first:
            path.unlink()
    error = "No validation identity has two crops, so there is no match to score: train on all by"
    run(reid, "--data", root, *QUICK, error=error)


# Other people's data.


@pytest.fixture(scope="session")
def other(tmp_path_factory):
    """Another drawn data set, with the same identities' numbers."""
    root = tmp_path_factory.mktemp("other")
    common.draw_market(root, 8, 4, seed=5)
    return root


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "test set alone"])
def test_another_data_set_is_scored_by_its_test_set(whole, trained, other, tmp_path, run):
    root = shutil.copytree(other, tmp_path / "copy")
    if not whole:
        shutil.rmtree(root / "bounding_box_train")
    out, _ = run(reid, "--data", root, "--eval", trained.reid)
    assert f"{root} does not hold the train set of {trained.reid}: no validation." in out
    assert "validation crops" not in out

    run(reid, "--data", root, "--eval", trained.reid, "--embed", tmp_path / "f.npz")
    with np.load(tmp_path / "f.npz") as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file if "names" not in name}
    distances = torch.cdist(arrays["query_features"], arrays["gallery_features"])
    people = [
        arrays[f"{part}_{what}"] for part in ("query", "gallery") for what in ("ids", "cameras")
    ]
    scores = brute_force(distances, *people, None, cross_camera=True)
    row = table_of(out, "test set, ", 1)[0]
    expected = percent(scores[name] for name in ("mAP", "mAP_trapezoid", "rank1", "rank5"))
    assert list(map(float, row[1:5])) == pytest.approx(expected, abs=0.01)


def test_on_another_data_set_the_probability_is_that_of_the_networks_own_validation(
    trained, other, run
):
    own, _ = run(reid, "--eval", trained.reid)
    out, _ = run(reid, "--eval", trained.reid, "--data", other)
    promised = "Promised for pairs of which"
    assert out[out.index(promised) :].splitlines()[0] == own[own.index(promised) :].splitlines()[0]


def test_attributes_of_another_data_set_are_scored_beside_the_commonest_of_training(
    trained, market, other, run
):
    out, _ = run(par, "--eval", trained.par, "--data", other)
    assert "does not hold the train set of" in out
    rows = table_of(out, "32 test crops of 8 identities", 13)

    train = common.load_market(market, "train")
    training, _ = par.saved_split(torch_load(trained.par), train, trained.par)
    commonest = torch.stack([c.argmax() for c in par.class_counts(train.labels[training])])
    test = common.load_market(other, "gallery", (64, 32))
    labels = test.labels[test.labels[:, 0] >= 0]
    hits = percent((labels == commonest).float().mean(0).tolist())
    assert column_of(rows, 2)[:12] == pytest.approx(hits, abs=0.01)
    classes, _ = par.load_recogniser(trained.par)(test.images[test.labels[:, 0] >= 0])
    hits = percent((labels == classes).float().mean(0).tolist())
    assert column_of(rows, 1)[:12] == pytest.approx(hits, abs=0.01)


def test_a_data_set_without_a_test_set_is_scored_on_validation(trained, market, tmp_path, run):
    root = shutil.copytree(market, tmp_path / "copy")
    shutil.rmtree(root / "query")
    out, _ = run(reid, "--data", root, "--eval", trained.reid)
    assert "24 validation crops" in out
    assert f"{root} holds no query and bounding_box_test: no test set is scored." in out
    error = f"There are no crops in {root / 'query'}: --data takes the folder that holds query."
    run(reid, "--data", root, "--eval", trained.reid, "--show", 2, error=error)

    shutil.rmtree(root / "bounding_box_test")
    out, _ = run(par, "--data", root, "--eval", trained.par)
    assert "24 validation crops" in out
    assert f"{root} holds no annotated test crops: these are not scored." in out


def test_another_data_set_without_annotations_cannot_be_scored(trained, other, tmp_path, run):
    root = shutil.copytree(other, tmp_path / "copy")
    for path in root.glob("*.csv"):
        path.unlink()
    error = f"{root} holds no annotated crops to score: put annotations_test.csv or market_att"
    run(par, "--eval", trained.par, "--data", root, error=error)


@pytest.mark.parametrize(
    "names, same",
    [
        (["1_c1_1.jpg", "1_c1_2.jpg", "2_c1_1.jpg"], True),
        (["1_c1_1.png", "1_c1_2.png"], True),  # in another format, and fewer
        (["1_c1_1.jpg", "1_c1_2.jpg", *"abcdefgh"], True),  # and other crops beside
        (["1_c1_1.jpg", "1_c2_2.jpg"], False),  # a name that happens to be the same
        ([], False),
    ],
)
def test_data_sets_are_told_apart_by_the_names_of_their_crops(names, same):
    assert par.is_same_data(["1_c1_1.jpg", "1_c1_2.jpg", "2_c1_1.jpg"], names) == same


@pytest.mark.parametrize("module", [par, reid])
@pytest.mark.parametrize("source", ["par", "reid"])
def test_a_trained_networks_backbone_goes_on_with_other_people(
    module, source, trained, other, tmp_path, run
):
    start = getattr(trained, source)
    run(module, "--data", other, *QUICK, "--lr", "1e-12", "--weights", start)
    ours = torch_load(tmp_path / "o.pt")["model"]
    theirs = torch_load(start)["model"]
    shared = [name for name, value in theirs.items() if "backbone" in name and value.dim() == 4]
    assert len(shared) >= 20
    for name in shared:
        assert torch.allclose(ours[name], theirs[name]), name


def test_a_trained_networks_backbone_goes_on_with_all_people_or_the_same_split(trained, run):
    run(reid, *QUICK, "--weights", trained.par)  # seed 0 of both has one split
    run(reid, *QUICK, "--weights", trained.reid, "--identities", "all", "--seed", 3)


def test_people_of_the_first_of_three_runs_are_not_validated_on_in_the_last(
    trained, other, tmp_path, monkeypatch, run
):
    first = shutil.copy(trained.par, tmp_path / "first.pt")
    command = [par, "--data", other, *QUICK, "--epochs", 2, "--weights", first]
    second = tmp_path / "second.pt"
    with monkeypatch.context() as patch:
        before_call(patch, par, "attribute_loss", 3)  # in epoch 2
        run(*command, "--out", second, code=130, error=STOPPED)
    first.unlink()
    run(*command, "--out", second, "--resume")

    error = ".pt was trained on people of this data set, known by"
    run(par, *QUICK, "--weights", second, "--seed", 3, error=f"second{error}")
    third = tmp_path / "third.pt"
    run(reid, "--data", other, *QUICK, "--init", second, "--out", third)
    run(par, *QUICK, "--weights", third, "--seed", 3, error=f"third{error}")


# Training on all identities, and the comparison of table 1.


@pytest.fixture
def on_all(one_camera, tmp_path, run):
    """A run on all of three identities, too few to split: its .root, checkpoint .path and .out."""
    for path in crops_of(one_camera)[18:]:
        path.unlink()
    flags = ["--identities", "all", "--recipe", "strong", "--epochs", 3]
    out, _ = run(reid, "--data", one_camera, *QUICK, *flags)
    return SimpleNamespace(root=one_camera, path=tmp_path / "o.pt", out=out)


@pytest.mark.parametrize("recipe, crops", [("strong", 1), ("report", 2)])
def test_two_identities_are_trained_on_in_batches_of_all_there_is(recipe, crops, tmp_path, run):
    common.draw_market(tmp_path / "two", 2, crops, seed=0)
    flags = ["--data", tmp_path / "two", "--identities", "all", "--recipe", recipe]
    out, _ = run(reid, *flags, "--epochs", 2, "--size", "32x32")
    assert f"{2 * crops} training and 0 validation crops" in out
    assert "epoch  2/2" in out


def test_four_identities_of_one_crop_teach_attributes(tmp_path, run):
    common.draw_market(tmp_path / "four", 4, 1, seed=0)
    out, _ = run(par, "--data", tmp_path / "four", "--epochs", 2, "--size", "32x32")
    assert "2 training and 2 validation crops of 2 and 2 identities" in out


def test_training_on_all_identities_needs_no_split_and_keeps_the_last_epoch(on_all):
    saved = torch_load(on_all.path)
    assert len(saved["train_ids"]) == 3
    assert len(saved["validation_ids"]) == 0
    assert saved["record"]["best epoch"] == 3
    assert "18 training and 0 validation" in on_all.out
    assert "Without validation the last epoch is kept." in on_all.out
    assert "  validation" not in on_all.out


def test_a_run_on_all_identities_is_scored_on_the_test_set_alone(on_all, run):
    out, _ = run(reid, "--data", on_all.root, "--eval", on_all.path)
    assert f"{on_all.path} was trained on all identities: no validation." in out
    assert "validation crops" not in out
    assert "test set" in out
    assert "at most 12 of 12" in out


def test_a_run_on_all_identities_does_not_say_how_sure_it_is(on_all, market, run):
    command = ["--eval", on_all.path, "--gallery", market / "query"]
    out, _ = run(reid, *command, "--search", crops_of(market)[0])
    rows = table_of(out, "Nearest to")
    assert len(rows) == 10
    for row in rows:
        assert row[2] == "-"
    assert "was trained on all identities, which leaves no crops" in out


def test_comparison_starts_with_and_without_the_weights_of_stage_1(trained, tmp_path, run):
    flags = ["--epochs", 1, "--batch", 8, "--lr", "1e-12", "--negatives", "random"]
    out, _ = run(reid, "--init", trained.par, "--compare", *flags)
    stage_1 = torch_load(trained.par)["model"]
    without = torch_load(tmp_path / "o_without.pt")["model"]
    transferred = torch_load(tmp_path / "o.pt")["model"]
    filters = [name for name, value in stage_1.items() if value.dim() == 4]
    assert len(filters) >= 20
    for name in filters:
        assert torch.allclose(transferred[name], stage_1[name]), name
        assert not torch.allclose(without[name], stage_1[name]), name
    assert out.index("From weights") < out.index("From stage 1")


def test_comparison_never_starts_from_what_this_data_set_has_taught(trained, tmp_path, run):
    stage_1 = tmp_path / "stage_1.pt"
    run(par, *QUICK, "--size", "64x32", "--weights", trained.par, "--out", stage_1)
    error = (
        f"{trained.par}, which --compare would start from without --init, was trained on this data "
        "set itself: pass --weights, those that stage 1 began from."
    )
    run(reid, "--init", stage_1, "--compare", error=error)


def test_comparison_prints_the_map_of_both_runs(trained, tmp_path, run):
    out, _ = run(reid, "--init", trained.par, "--compare", "--epochs", 1, "--batch", 8)
    without = record_of(tmp_path / "o_without.pt")["final"]["validation"]
    transferred = record_of(tmp_path / "o.pt")["final"]["validation"]
    expected = []
    for protocol in ("all cameras", "across cameras"):
        pair = (without[protocol]["none"]["mAP"], transferred[protocol]["none"]["mAP"])
        expected.append([f"{value:.2f}" for value in percent(pair)])
    assert [row[2:] for row in table_of(out, "Table 1")] == expected


def test_a_stage_2_without_stage_1_predicts_no_attributes(tmp_path, run):
    run(reid, *QUICK)
    out, _ = run(reid, "--eval", tmp_path / "o.pt")
    assert "no Hamming filter: it predicts no attributes" in out
    error = "o.pt predicts no attributes: pass a checkpoint of par.py"
    run(par, "--eval", tmp_path / "o.pt", error=error)


# As users run it, and what they need not give.


def start_script(module, *flags, err):
    """Start a script in a process of its own, as from a shell; err: where its stderr goes."""
    command = [sys.executable, HERE / f"{module.__name__}.py", *flags]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=err)


def check_output_of(process):
    """It ends well, says that its data is drawn, and overwrites no line."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0
    assert out.startswith("DEMO SET")
    assert "\r" not in out
    if err is not None:
        assert "\r" not in err


def test_as_a_user_runs_it_and_one_seed_gives_the_same_bits(
    market, tmp_path, monkeypatch, as_users_have_it
):
    shutil.copytree(market, tmp_path / "Market-1501-demo")
    monkeypatch.chdir(tmp_path)
    terminal = subprocess.PIPE
    if hasattr(os, "openpty"):
        terminal = os.openpty()[1]  # of unknown width

    process = start_script(par, *QUICK, err=subprocess.PIPE)
    assert call(par, *QUICK, "--out", "par.pt") == 0
    check_output_of(process)
    check_same_run(Path("par_best.pt"), Path("par.pt"))

    stage_2 = [*QUICK, "--init", "par_best.pt"]
    process = start_script(reid, *stage_2, err=terminal)
    assert call(reid, *stage_2, "--out", "reid.pt") == 0
    check_output_of(process)
    check_same_run(Path("reid_best.pt"), Path("reid.pt"))


def draw_few(patch):
    """From now on draw four identities, however many are asked for: -> what is, a list."""
    draw = common.draw_market
    asked = []

    def draw_market(root, **named):
        asked.append((root.name, named))
        draw(root, 4, 2)

    patch.setattr(common, "draw_market", draw_market)
    return asked


def test_without_data_the_demo_set_is_drawn_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    asked = draw_few(monkeypatch)
    assert call(par, "--stats") == 0
    assert call(par, "--stats") == 0
    assert asked == [("demo", {"identities": 100, "images_per_identity": 6})]
    assert set(os.listdir(tmp_path)) == {"Market-1501-demo", "par_stats.png"}
    out, _ = capsys.readouterr()
    assert out.startswith("Drawing the demo set")
    assert out.count("Drawing the demo set") == 1
    assert out.count("of 4 identities\n") == 2


def test_a_demo_set_that_was_cut_off_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw_few(monkeypatch)
    with monkeypatch.context() as patch:
        before_call(patch, np, "savetxt", 2)  # all crops and half of the annotations are there
        assert call(par, "--stats") == 130
    assert os.listdir(tmp_path) == []


def test_a_demo_set_that_another_run_has_drawn_meanwhile_will_do(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draw = common.draw_market

    def draw_market(root, **named):
        draw(root, 4, 2)
        draw(tmp_path / "Market-1501-demo", 5, 2)  # the other run's

    monkeypatch.setattr(common, "draw_market", draw_market)
    assert call(par, "--stats") == 0
    assert "of 5 identities\n" in capsys.readouterr().out
    assert set(os.listdir(tmp_path)) == {"Market-1501-demo", "par_stats.png"}


def test_the_line_that_updates_is_cleared_before_the_one_that_stays(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", Mock(wraps=sys.stderr, isatty=lambda: True))
    lines = []
    monkeypatch.setattr(common, "show_line", lines.append)
    common.draw_market(tmp_path / "few", 24, 6)  # 84 crops to train with: 42 steps
    arguments = ["--data", tmp_path / "few", *QUICK, "--batch", 2, "--out", tmp_path / "o.pt"]
    assert call(par, *arguments) == 0
    shown = [line for line in lines if line]
    assert len(shown) == 4
    for line in shown:
        assert re.match(r"epoch 1/1  step \d0/42  loss \d+\.\d{4}  \d+ images/s  0:\d\d left", line)
    assert lines[lines.index(shown[-1]) + 1] == ""


def test_a_checkpoint_is_scored_on_the_data_that_it_names(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(reid, "--eval", trained.reid, "--device", "cpu") == 0
    assert "24 validation crops" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_where_the_data_of_a_checkpoint_is_not_nothing_is_drawn(
    trained, tmp_path, monkeypatch, capsys
):
    checkpoint = torch_load(trained.par)
    checkpoint["record"]["data"]["folder"] = str(tmp_path / "gone")
    common.save_checkpoint(tmp_path / "moved.pt", checkpoint)
    monkeypatch.chdir(tmp_path)
    for command in ([par, "--eval", "moved.pt"], [reid, "--init", "moved.pt"]):
        assert call(*command) == 2
        error = (
            f"moved.pt was trained on {tmp_path / 'gone'}, which is not here: pass --data DIR.\n"
        )
        assert capsys.readouterr().err.endswith(error)
    assert os.listdir(tmp_path) == ["moved.pt"]


def test_without_data_market_1501_comes_before_the_demo_set(market, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(market, "Market-1501-v15.09.15")
    (tmp_path / "Market-1501-demo").mkdir()
    assert call(par, "--stats") == 0
    out, _ = capsys.readouterr()
    assert "data Market-1501-v15.09.15 |" in out


# A command: what it has no effect without. T: the folder of `trained`.
IDLE_FLAGS = """
par --eval T/par.pt --dropout 0.3: --dropout has no effect here, but only in training
par --eval T/par.pt --lr 0.1: --lr has no effect here, but only in training
par --muon 5: --muon has no effect here, but only in training by --recipe strong with its step muon
reid --recipe strong --without muon --muon 5: --muon has no effect here, but only in training by
par --stats --warmup 0.2: --warmup has no effect here, but only in training
par --loss wce --gamma 1: --gamma has no effect here, but only with --loss focal, alpha or all
par --eval T/par.pt --sheet: --sheet has no effect here, but only with --predict PATH...
reid --init T/par.pt --weights none: --weights has no effect here, but only without --init, or to
reid --recipe strong --margin 1: --margin has no effect here, but only in training by --recipe
reid --init T/par.pt --compare --clusters 9 --negatives random: --clusters has no effect here, but
par --eval T/par.pt --seed 1: --seed has no effect here, but only in training
par --stats --size 64x32: --size has no effect here, but only where crops are given to a network
reid --identities all --patience 3: --patience has no effect here, but only where validation or test
reid --eval T/reid.pt --embed T/x.npz --prior 0.1: --prior has no effect here, but only where a prob
reid --eval T/reid.pt --top 3: --top has no effect here, but only with --search or --find
reid --eval T/reid.pt --search T/a --gallery T/b --rerank: --rerank has no effect here, but only
"""


@pytest.mark.parametrize("case", IDLE_FLAGS.strip().splitlines())
def test_a_flag_without_effect_is_refused(case, trained, tmp_path, run):
    command, sentence = case.split(": ", 1)
    script, *words = command.replace("T/", f"{trained.folder}/").split()
    before = files_of(trained.folder)
    _, err = run(SCRIPTS[script], *words, error=sentence)
    assert err.endswith(": leave it out.\n")
    assert files_of(trained.folder) == before
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------
# The loop.


class ColourBackbone(nn.Module):
    """In place of `common.Backbone`, for steps that take no time: its features are mean colours."""

    width = 3

    def __init__(self, state=None, last_stride=2):
        super().__init__()

    def forward(self, crops):
        maps = crops / 255
        return maps, maps.mean((2, 3))


def make_colour_network():
    """The same `par.AttributeNet` of mean colours each time."""
    torch.manual_seed(0)
    return par.AttributeNet(ColourBackbone(), par.LinearHeads(ColourBackbone.width, 0))


def plain_cross_entropy(data):
    """The sum over the attributes, as a loss for `short_fit`."""

    def loss(output, rows):
        total = 0
        for attribute, scores in enumerate(output.logits.split(CLASS_COUNTS, 1)):
            total = total + F.cross_entropy(scores, data.labels[rows[0], attribute])
        return total

    return LossOf(loss)


def load_noise(market):
    """The training crops as noise, of which each pixel counts."""
    data = common.load_market(market, "train", (64, 32))
    shape = data.images.shape
    data.images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=seeded())
    return data


def train_plainly(model, data, items, loss):
    """What `short_fit` does with 43 items [43, k] at a rate of 1e-4, in plain float32 steps: -> the
    losses. The last 3 items fill no batch."""
    affine = common.random_affine(items.numel(), (64, 32), seeded()).view(*items.shape, 2, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    losses = []
    for step in range(5):
        batch = slice(8 * step, 8 * step + 8)
        rows = items[batch].T  # [k, 8]
        x = data.images[rows.flatten()].float()
        turned = affine[batch].transpose(0, 1).flatten(0, 1)
        grid = F.affine_grid(turned, x.shape, align_corners=False)
        step_loss = loss(model(F.grid_sample(x, grid, align_corners=False)), rows)
        optimizer.zero_grad()
        step_loss.backward()
        optimizer.param_groups[0]["lr"] = common.learning_rate(step, 5, 1e-4, 0.5)
        optimizer.step()
        losses.append(step_loss.item())
    return losses


def assert_moved_alike(model, plain, begun):
    """Assert that two copies of a network moved from where they began to the same place."""
    before = dict(begun.named_parameters())
    wanted = dict(plain.named_parameters())
    for name, value in model.named_parameters():
        if name == "embed.1.bias":  # whose slope is rounding alone
            continue
        moved = (wanted[name] - before[name]).norm()
        assert (value - wanted[name]).norm() < 0.1 * moved, name


def test_training_on_crops_equals_plain_float32_steps(market, tmp_path):
    data = load_noise(market)
    torch.manual_seed(0)
    backbone = common.Backbone()
    model = par.AttributeNet(backbone, par.LinearHeads(backbone.width, 0))
    begun = copy.deepcopy(model)
    plain = copy.deepcopy(model).train()
    items = torch.randperm(43, generator=seeded())[:, None]
    loss = plain_cross_entropy(data)

    record = short_fit(model, data, items, tmp_path / "x.pt", loss, lr=1e-4)

    losses = train_plainly(plain, data, items, loss)
    assert record["epochs"][0]["loss"] == pytest.approx(sum(losses) / 5, rel=1e-4)
    assert_moved_alike(model, plain, begun)
    assert not model.backbone.net[0].weight.is_contiguous()  # channels last


def test_training_on_triplets_equals_plain_float32_steps(market, tmp_path, monkeypatch):
    """Three crops an item; in the layout of MPS, which a CPU computes in as well."""
    layout = common.layout(torch.device("mps"))
    monkeypatch.setattr(common, "layout", lambda device: layout)
    data = load_noise(market)
    torch.manual_seed(0)
    model = reid.EmbeddingNet(common.Backbone())
    begun = copy.deepcopy(model)
    plain = copy.deepcopy(model).train()
    items = torch.stack([torch.randperm(43, generator=seeded(k)) for k in range(3)], 1)

    def plain_triplets(output, rows):
        anchor, positive, negative = output.features.split(8)
        to_positive = (anchor - positive).square().sum(1)
        to_negative = (anchor - negative).square().sum(1)
        return F.relu(to_positive - to_negative + 5).mean()

    loss = reid.TripletLoss(5.0)
    record = short_fit(model, data, items, tmp_path / "x.pt", loss, lr=1e-4)

    losses = train_plainly(plain, data, items, plain_triplets)
    assert record["epochs"][0]["loss"] == pytest.approx(sum(losses) / 5, rel=1e-4)
    assert_moved_alike(model, plain, begun)
    assert model.backbone.net[0].weight.is_contiguous()


def test_schedule_and_warmup_reach_both_optimisers_in_each_step(tmp_path, monkeypatch, run):
    rates = {"AdamW": [], "Muon": []}
    usual = common.make_optimizers

    def note_rate(optimizer, *_):
        for group in optimizer.param_groups:
            rates[type(optimizer).__name__].append(group["lr"])

    def make_optimizers(*given):
        optimizers = usual(*given)
        for optimizer in optimizers:
            optimizer.register_step_pre_hook(note_rate)
        return optimizers

    monkeypatch.setattr(common, "make_optimizers", make_optimizers)
    schedule = ["--epochs", 2, "--lr", 1e-3, "--warmup", 0.5]
    run(par, *QUICK, "--recipe", "strong", *schedule)

    expected = [1 / 4, 2 / 4, 3 / 4, 1, 1, 3 / 4, 2 / 4, 1 / 4]  # of eight steps
    expected = [share * 1e-3 for share in expected]
    assert rates["AdamW"] == pytest.approx(expected)
    assert rates["Muon"] == pytest.approx(expected)
    last_of_epoch = [row["lr"] for row in record_of(tmp_path / "o.pt")["epochs"]]
    assert last_of_epoch == pytest.approx(expected[3::4])


def fit_to_figures(figures, market, out, **settings):
    """Train a small network whose validation says these figures in turn: -> its record, itself, and
    its weights after each epoch."""
    data = common.load_market(market, "train", (32, 32))
    model = make_colour_network()
    said = iter(figures)
    weights = []

    def validate():
        weights.append(model.heads[0][1].weight.detach().clone())
        return {"f1": next(said)}

    items = torch.arange(16)[:, None]
    loss = plain_cross_entropy(data)
    record = short_fit(model, data, items, out, loss, validate, epochs=len(figures), **settings)
    return SimpleNamespace(record=record, model=model, weights=weights)


def test_training_stops_after_so_many_epochs_without_a_better_one(market, tmp_path, capsys):
    fitted = fit_to_figures([0.3, 0.5, 0.4, 0.4, 0.9], market, tmp_path / "x.pt", patience=2)

    assert len(fitted.record["epochs"]) == 4
    assert "Stopped early: no epoch was better in the last 2." in capsys.readouterr().out


def test_training_goes_on_while_it_gets_better(market, tmp_path, capsys):
    fitted = fit_to_figures([0.3, 0.2, 0.5, 0.4, 0.9], market, tmp_path / "x.pt", patience=2)

    assert len(fitted.record["epochs"]) == 5
    assert "Stopped early" not in capsys.readouterr().out


@pytest.mark.parametrize("figures", [[0.3, 0.5, 0.4], [0.3, 0.5, 0.5]], ids=["best", "tied"])
def test_the_best_epoch_is_kept_and_of_equal_ones_the_earlier(figures, market, tmp_path):
    fitted = fit_to_figures(figures, market, tmp_path / "x.pt")

    saved = torch_load(tmp_path / "x.pt")
    assert fitted.record["best epoch"] == 2
    assert saved["record"]["best epoch"] == 2
    assert not torch.equal(fitted.weights[1], fitted.weights[2])
    assert torch.equal(fitted.model.heads[0][1].weight, fitted.weights[1])
    assert torch.equal(saved["model"]["heads.0.1.weight"], fitted.weights[1])


class LearnedScale(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, output, rows):
        return (self.scale * output.logits - 1).square().mean()


def test_parameters_of_a_loss_are_trained(market, tmp_path):
    data = common.load_market(market, "train", (32, 32))
    loss = LearnedScale()

    short_fit(
        make_colour_network(), data, torch.arange(8)[:, None], tmp_path / "x.pt", loss, lr=0.1
    )

    assert loss.scale.item() == pytest.approx(1, abs=0.11)  # AdamW's first step is the rate
    assert abs(loss.scale.item() - 1) > 0.08


# ------------------------------------------------------------------------------------------
# Files and resuming.


def leaves(value, place=()):
    """All that is in dicts and lists, one in the other: -> dict of place -> tensor or number."""
    if isinstance(value, dict):
        inside = value.items()
    elif isinstance(value, (list, tuple)):
        inside = enumerate(value)
    else:
        return {place: value}
    found = {}
    for key, inner in inside:
        found |= leaves(inner, (*place, key))
    return found


def assert_same_bits(first, second):
    ours = leaves(first)
    theirs = leaves(second)
    assert ours.keys() == theirs.keys()
    for place, value in ours.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, theirs[place]), place
        else:
            assert value == theirs[place], place


def figures_of(path):
    """The figures in a run's record, without its times."""
    record = record_of(path)
    for row in record["epochs"]:
        del row["seconds"]
        del row["images_per_second"]
    return record["epochs"], record["final"]


def check_same_run(first, second):
    """Assert that two runs have the same weights, state to resume and figures, to the bit."""
    assert_same_bits(torch_load(first)["model"], torch_load(second)["model"])
    ours = torch_load(first.with_suffix(".last"))
    theirs = torch_load(second.with_suffix(".last"))
    assert_same_bits(ours["model"], theirs["model"])
    for part in ("loss", "optimizers", "generator", "random"):
        assert_same_bits(ours["training"][part], theirs["training"][part])
    assert figures_of(first) == figures_of(second)


STOPPED = "stopped; --resume goes on with a training after its last whole epoch."


@pytest.mark.parametrize("module, loss", [(par, "attribute_loss"), (reid, "triplet_loss")])
def test_a_run_stopped_by_ctrl_c_resumes_to_the_same_bits(
    module, loss, market, trained, tmp_path, monkeypatch, run
):
    command = [module, *short_run(module, market, trained), tmp_path / "cut.pt"]
    with monkeypatch.context() as patch:
        before_call(patch, module, loss, 6)  # in epoch 2
        run(*command, code=130, error=f"{module.__name__}.py: {STOPPED}")

    said, _ = run(*command, "--resume")

    assert "Going on after epoch 1.\n" in said
    check_same_run(getattr(trained, module.__name__), tmp_path / "cut.pt")


@pytest.mark.parametrize("write", range(2, 12))
def test_a_kill_between_two_files_of_an_epoch_is_harmless(
    write, market, trained, tmp_path, monkeypatch, run
):
    """An epoch writes its record, the checkpoint if it is the best, and the state to resume. The
    picture and the record with the final scores come last."""
    monkeypatch.setattr(common, "Backbone", ColourBackbone)
    command = [par, *short_run(par, market, trained)]
    run(*command, tmp_path / "whole.pt")
    with monkeypatch.context() as patch:
        before_call(patch, common, "write_whole", write)
        run(*command, tmp_path / "cut.pt", code=130, error=STOPPED)

    run(*command, tmp_path / "cut.pt", "--resume")

    check_same_run(tmp_path / "whole.pt", tmp_path / "cut.pt")


def test_an_epoch_writes_its_record_then_its_checkpoint_then_its_state(
    market, tmp_path, monkeypatch
):
    written = []
    usual = common.write_whole

    def write_whole(path, write):
        written.append(path.suffix)
        usual(path, write)

    monkeypatch.setattr(common, "write_whole", write_whole)
    fit_to_figures([0.3, 0.5, 0.4], market, tmp_path / "x.pt")

    # The state comes once more before an earlier run of that name is set aside.
    assert written == [".last"] + [".json", ".pt", ".last"] * 2 + [".json", ".last"]


@pytest.mark.skipif(os.name == "nt", reason="making links takes rights there")
def test_a_run_writes_where_a_link_points(tmp_path, run):
    disk = tmp_path / "disk"
    disk.mkdir()
    link = tmp_path / "link.pt"
    link.symlink_to(disk / "real.pt")
    run(par, *QUICK, "--out", link)
    run(par, *QUICK, "--out", link)  # sets the first aside
    assert link.is_symlink()
    names = {"real.json", "real.last", "real.png", "real.pt"}
    names |= {"real.old.json", "real.old.png", "real.old.pt"}
    assert set(os.listdir(disk)) == names
    assert os.listdir(tmp_path) in (["disk", "link.pt"], ["link.pt", "disk"])
    run(par, "--eval", link)


@pytest.mark.skipif(os.name == "nt", reason="making links takes rights there")
@pytest.mark.parametrize("module", [par, reid])
def test_a_link_that_leads_round_in_a_circle_is_replaced(module, tmp_path, run):
    link = tmp_path / "link.pt"
    link.symlink_to(link)
    run(module, *QUICK, "--out", link)
    assert not link.is_symlink()
    assert "model" in torch_load(link)


@pytest.mark.skipif(os.name == "nt", reason="making links takes rights there")
def test_a_file_is_written_where_a_link_points(tmp_path):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real")
    common.write_whole(link, lambda file: file.write(b"text"))
    assert link.is_symlink()
    assert (tmp_path / "real").read_bytes() == b"text"


@pytest.mark.skipif(sys.platform != "linux", reason="the longest name is another there")
@pytest.mark.parametrize("command", [[par], [par, "--loss", "all"], [reid]], ids=str)
def test_a_name_that_will_be_too_long_is_told_before_the_work(command, tmp_path, run):
    longest = 255 - len(f"..old.json.{os.getpid()}.tmp")
    short = tmp_path / f"{'x' * (longest - len('_focal'))}.pt"
    long = tmp_path / f"{'x' * (longest + 1)}.pt"
    run(*command, *QUICK, "--out", long, error="cannot be written (File name too long): choose")
    assert os.listdir(tmp_path) == []
    run(*command, *QUICK, "--out", short)
    run(*command, *QUICK, "--out", short)


@pytest.mark.parametrize("module", [par, reid])
def test_a_run_that_has_ended_trains_no_more(module, market, trained, tmp_path, run):
    shutil.copytree(trained.folder, tmp_path / "copy")
    out = tmp_path / "copy" / f"{module.__name__}.pt"

    said, _ = run(module, *short_run(module, market, trained), out, "--resume")

    assert "Going on after epoch 3.\n" in said
    assert "epoch  3/3" not in said
    check_same_run(getattr(trained, module.__name__), out)


def test_a_run_is_resumed_by_other_names_of_the_same_files(
    market, trained, tmp_path, monkeypatch, run
):
    folder = shutil.copytree(trained.folder, tmp_path / "copy")
    monkeypatch.chdir(market)
    relative = []
    for word in (*short_run(reid, market, trained), folder / "reid.pt"):
        relative.append(os.path.relpath(word) if isinstance(word, Path) else word)

    said, _ = run(reid, *relative, "--resume")

    assert "Going on after epoch 3.\n" in said


def test_parameters_of_a_loss_survive_a_resume(market, tmp_path):
    data = common.load_market(market, "train", (32, 32))
    items = torch.arange(16)[:, None]
    settings = {"epochs": 3, "lr": 0.1}
    whole = LearnedScale()
    short_fit(make_colour_network(), data, items, tmp_path / "whole.pt", whole, **settings)
    calls = itertools.count(1)

    def stop_in_epoch_2():
        if next(calls) == 2:
            raise KeyboardInterrupt
        return {"f1": 1.0}

    cut = tmp_path / "cut.pt"
    with pytest.raises(KeyboardInterrupt):
        loss = LearnedScale()
        short_fit(make_colour_network(), data, items, cut, loss, stop_in_epoch_2, **settings)
    resumed = LearnedScale()
    short_fit(make_colour_network(), data, items, cut, resumed, resume=True, **settings)

    assert abs(whole.scale.item() - 1) > 0.1
    assert torch.equal(resumed.scale, whole.scale)


def test_without_a_state_a_run_that_resumes_starts(market, tmp_path, capsys):
    data = common.load_market(market, "train", (32, 32))
    items = torch.arange(8)[:, None]
    loss = plain_cross_entropy(data)

    record = short_fit(make_colour_network(), data, items, tmp_path / "x.pt", loss, resume=True)

    said = capsys.readouterr().out
    assert said.startswith(f"There is no {tmp_path / 'x.last'} to resume: starting.\n")
    assert "earlier" not in said
    assert len(record["epochs"]) == 1


@pytest.mark.parametrize(
    "module, flags, names",
    [
        (par, ["--seed", 1], "seed"),
        (par, ["--seed", 1, "--recipe", "strong"], "recipe, muon, seed"),
        (reid, ["--seed", 1], "seed"),
        (reid, ["--seed", 1, "--margin", 5], "margin, seed"),
    ],
)
def test_all_arguments_are_named_that_differ_from_the_run_to_resume(
    module, flags, names, market, trained, run
):
    out = getattr(trained, module.__name__)
    before = files_of(trained.folder)
    error = f"{module.__name__}.last is of a run with another {names}: resume with that, or start"
    run(module, *short_run(module, market, trained), out, *flags, "--resume", error=error)
    assert files_of(trained.folder) == before


def test_a_run_resumes_only_with_its_own_stage_1(market, trained, tmp_path, run):
    """The other flags may differ: they say how to score."""
    stage_1 = torch_load(trained.par)
    stage_1["record"]["run"] = "another"
    common.save_checkpoint(tmp_path / "a.pt", stage_1)
    flags = ["--init", tmp_path / "a.pt", "--hamming", 3, "--prior", 0.2, "--threshold", 1]
    error = (
        "reid.last is of a run with another stage 1: resume with that, or start without --resume"
    )
    run(reid, *short_run(reid, market, trained), trained.reid, *flags, "--resume", error=error)


def test_a_run_resumes_only_with_its_own_data(market, trained, tmp_path, run):
    root = shutil.copytree(market, tmp_path / "copy")
    crop = crops_of(root)[0]
    crop.rename(crop.with_stem("0001_c1_renamed"))
    error = "par.last is of a run with another data set: resume with that"
    run(par, *short_run(par, root, trained), trained.par, "--resume", error=error)


def test_a_run_resumes_only_on_its_own_device(market, trained, tmp_path, run):
    last = torch_load(trained.par.with_suffix(".last"))
    last["record"]["arguments"]["device"] = "mps"
    common.save_checkpoint(tmp_path / "a.last", last)
    error = "a.last is of a run with another device: resume with that"
    run(par, *short_run(par, market, trained), tmp_path / "a.pt", "--resume", error=error)


@pytest.mark.parametrize("beside", ["", "{", "[]", "[1]", '{"run": "another"}'])
def test_a_run_resumes_only_beside_its_own_record(beside, market, trained, tmp_path, run):
    shutil.copy(trained.par.with_suffix(".last"), tmp_path / "a.last")
    shutil.copy(trained.par, tmp_path / "a.pt")
    if beside:
        (tmp_path / "a.json").write_text(beside)
    before = files_of(tmp_path)
    error = "a.pt is not the best checkpoint of the run that"
    run(par, *short_run(par, market, trained), tmp_path / "a.pt", "--resume", error=error)
    assert files_of(tmp_path) == before


def test_a_run_that_resumes_asks_for_no_weights(tmp_path):
    (tmp_path / "o.last").touch()
    args = SimpleNamespace(weights="imagenet", resume=True, out=tmp_path / "o.pt")
    assert par.starting_weights(args)[0] is None


@pytest.fixture
def earlier(tmp_path):
    """The folder of a run x.pt, of texts in place of its files, and of one before it."""
    for ending in ("pt", "json", "png", "last"):
        (tmp_path / f"x.{ending}").write_text("earlier")
        (tmp_path / f"x.old.{ending}").write_text("older")
    return tmp_path


def test_a_new_run_sets_an_earlier_one_aside(earlier, market, capsys):
    fit_to_figures([0.3, 0.5], market, earlier / "x.pt")

    said = capsys.readouterr().out
    for ending in ("pt", "json", "png"):
        old = earlier / f"x.old.{ending}"
        assert old.read_text() == "earlier"
        assert f"{earlier / f'x.{ending}'} of an earlier run is now {old}.\n" in said
    assert len(record_of(earlier / "x.pt")["epochs"]) == 2
    assert len(torch_load(earlier / "x.last")["record"]["epochs"]) == 2
    assert torch_load(earlier / "x.pt")["record"]["best epoch"] == 2
    assert not (earlier / "x.png").exists()


def test_a_run_cut_off_in_its_first_epoch_leaves_an_earlier_one_as_it_is(earlier, market):
    data = common.load_market(market, "train", (32, 32))
    before = files_of(earlier)
    loss = LossOf(Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        short_fit(make_colour_network(), data, torch.arange(8)[:, None], earlier / "x.pt", loss)
    assert files_of(earlier) == before


@pytest.mark.parametrize("renaming", [1, 2, 3])
def test_a_kill_while_a_run_is_set_aside_loses_nothing_of_it(renaming, earlier, monkeypatch):
    before_call(monkeypatch, Path, "replace", renaming)
    with pytest.raises(KeyboardInterrupt):
        common.set_aside(earlier / "x.pt")
    common.set_aside(earlier / "x.pt")  # by the next run
    for ending in ("pt", "json", "png"):
        assert (earlier / f"x.old.{ending}").read_text() == "earlier"


@pytest.mark.parametrize("write", [1, 2, 3])
def test_the_stump_of_a_run_takes_no_earlier_ones_place(write, earlier, market, monkeypatch):
    """A run is cut off while it saves its first epoch, and the next begins from the start."""
    with monkeypatch.context() as patch:
        before_call(patch, common, "write_whole", write)
        with pytest.raises(KeyboardInterrupt):
            fit_to_figures([0.3], market, earlier / "x.pt")
    fit_to_figures([0.3], market, earlier / "x.pt")
    for ending in ("pt", "json", "png"):
        assert (earlier / f"x.old.{ending}").read_text() == "earlier"


@pytest.fixture
def overtaken(market, tmp_path, monkeypatch, run):
    """The folder of a.pt, to which a run of seed 0 wrote, then one of seed 1, in whose second epoch
    one of seed 2 began and ended."""
    arguments = ["--data", market, *QUICK, "--epochs", 2, "--out", tmp_path / "a.pt"]
    ends = []

    def run_another():
        ends.append(call(par, *arguments, "--seed", 2))

    run(par, *arguments, "--seed", 0)
    with monkeypatch.context() as patch:
        before_call(patch, par, "attribute_loss", 6, run_another)
        error = "a.json is another run's by now, so this one ends: give each run an --out of"
        run(par, *arguments, "--seed", 1, error=error)
    assert ends == [0]
    return tmp_path


def test_runs_of_one_name_do_not_mix(overtaken):
    """Nor is the last word of the one that was overtaken."""
    for name, seed in (("a.pt", 2), ("a.old.pt", 1)):
        record = record_of(overtaken / name)
        saved = torch_load(overtaken / name)["record"]
        assert record["arguments"]["seed"] == seed
        assert saved["arguments"]["seed"] == seed
        assert record["run"] == saved["run"]
    assert torch_load(overtaken / "a.last")["record"]["arguments"]["seed"] == 2
    assert "final" in record_of(overtaken / "a.pt")
    assert "final" not in record_of(overtaken / "a.old.pt")
    assert len(files_of(overtaken)) == 7


def test_no_two_names_share_a_file(market, tmp_path):
    fit_to_figures([0.3], market, tmp_path / "a.pt")
    before = files_of(tmp_path)
    fit_to_figures([0.3], market, tmp_path / "a_best.pt")
    assert before.items() < files_of(tmp_path).items()
    assert len(files_of(tmp_path)) == 6


@pytest.mark.parametrize(
    "error, caught, sentence",
    [
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (OSError(28, "No space left"), UserError, "x.pt cannot be written .No space left.[.]$"),
    ],
    ids=["stop", "full"],
)
def test_a_file_is_written_whole_or_not_at_all(error, caught, sentence, tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    path.write_text("good")
    seen = []

    def fsync(file):
        seen.append(sorted(os.listdir(tmp_path)))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", Mock(side_effect=error))

    with pytest.raises(caught, match=sentence):
        common.write_whole(path, lambda file: file.write(b"worse"))

    assert seen == [[f".x.pt.{os.getpid()}.tmp", "x.pt"]]
    assert path.read_text() == "good"
    assert os.listdir(tmp_path) == ["x.pt"]


@pytest.fixture(params=["cuda", "mps"])
def accelerator(request):
    if request.param == "cuda":
        there = torch.cuda.is_available()
    else:
        there = torch.backends.mps.is_available()
    if not there:
        pytest.skip(f"needs a {request.param} device")
    return request.param


def train_by(run, device, recipe, out):
    """Train stage 1 on an accelerator: -> the losses of three epochs."""
    run(par, "--epochs", 3, "--batch", 8, "--device", device, "--recipe", recipe, "--out", out)
    return [row["loss"] for row in record_of(out)["epochs"]]


@pytest.mark.parametrize("recipe", ["report", "strong"])
def test_both_stages_train_on_an_accelerator_and_score_as_on_the_cpu(
    recipe, accelerator, tmp_path, run, as_users_have_it
):
    train_by(run, accelerator, recipe, tmp_path / "p.pt")
    stage_2 = ["--epochs", 1, "--batch", 2, "--recipe", recipe, "--init", tmp_path / "p.pt"]
    run(reid, *stage_2, "--device", accelerator)

    tables = []
    for device in (accelerator, "cpu"):
        said, _ = run(reid, "--eval", tmp_path / "o.pt", "--rerank", "--device", device)
        tables.append(table_of(said, "test set"))
    for here, there in zip(*tables, strict=True):
        assert float(here[1]) == pytest.approx(float(there[1]), abs=3)


@pytest.mark.parametrize("recipe", ["report", "strong"])
def test_crops_without_room_on_an_accelerator_stay_on_the_host_and_train_alike(
    recipe, accelerator, tmp_path, monkeypatch, run, as_users_have_it
):
    there = train_by(run, accelerator, recipe, tmp_path / "there.pt")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    here = train_by(run, accelerator, recipe, tmp_path / "here.pt")
    assert here == pytest.approx(there, rel=0.02)  # as cuDNN's sums differ from run to run


# ------------------------------------------------------------------------------------------
# Several processes.


def together(count, *command, **environment):
    """Start a command in so many processes that meet, as torchrun would start them."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment |= {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [start(command, **environment, RANK=str(rank)) for rank in range(count)]


def finish(processes):
    """Wait until processes of `start` have ended: -> [(exit code, stdout, stderr)]."""
    ends = []
    for process in processes:
        out, err = process.communicate(timeout=300)
        ends.append((process.returncode, out, err))
    return ends


# What `plain_runs` writes.
PLAIN = ["par.pt", "reid.pt", "strong_par.pt", "strong_reid.pt"]


def plain_runs(market, folder, init):
    """The commands that train both stages for two epochs, by both recipes, without what each
    process does for itself: it draws dropout, erases to the mean colour of its own crops, and looks
    for hard triplets among these."""
    shared = ["--data", market, *QUICK, "--epochs", 2]
    strong = ["--recipe", "strong", "--without", "neck", "erasing"]
    return [
        [par, *shared, "--dropout", 0, "--out", folder / "par.pt"],
        [reid, *shared, "--init", init, "--out", folder / "reid.pt"],
        [par, *shared, "--dropout", 0, "--out", folder / "strong_par.pt", *strong],
        [reid, *shared, "--out", folder / "strong_reid.pt", *strong, "triplets", "attributes"],
    ]


def strong_run(module, market, trained):
    """As `short_run`, by the strong recipe, whose Muon has a state to resume too."""
    shared = ["--data", market, *QUICK, "--epochs", 3, "--recipe", "strong"]
    if module is par:
        return [*shared, "--out"]
    return [*shared, "--size", "64x32", "--init", trained.par, "--out"]


@pytest.fixture(scope="session")
def pairs(market, trained, tmp_path_factory):
    """What runs in two processes leave behind, which are started side by side.

    `one` and `two`: folders of `plain_runs`, trained in one process and in two, without batch norm,
    whose statistics are of a process's own crops. In `folder`: norm.pt, stage 1 with batch norm, at
    a rate that moves no weight; reid.pt, of `strong_run`. `torchrun`, `failed`: what `finish` says
    of stage 1 by torchrun, then with an odd --out, and of two of which the second fails."""
    folder = tmp_path_factory.mktemp("pairs")
    one = plain_runs(market, folder / "one", init=folder / "one" / "par.pt")
    two = plain_runs(market, folder / "two", init=folder / "one" / "par.pt")
    quick = [par, "--data", market, *QUICK]
    torchrun = start(two[0], [*quick, "--out", "odd"], torchrun=True, NO_NORM="yes")
    failing = together(2, *quick, "--out", "FAILS.pt")
    good = together(2, *quick, "--lr", 1e-12, "--out", folder / "norm.pt")
    good += together(2, reid, *strong_run(reid, market, trained), folder / "reid.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_NORM", "yes")
        assert call(*one[0]) == 0
        for command in two[1:]:
            good += together(2, *command)
        for command in one[1:]:
            assert call(*command) == 0
    for code, _, err in finish(good):
        assert code == 0, err
    return SimpleNamespace(
        folder=folder,
        one=folder / "one",
        two=folder / "two",
        torchrun=finish([torchrun])[0],
        failed=finish(failing),
    )


def test_of_two_processes_only_the_first_speaks(pairs):
    _, out, _ = pairs.torchrun
    assert out.count(" | 2 x 1 threads | ") == 1
    assert out.count("epoch  2/2") == 1


def test_of_two_processes_only_the_first_tells_of_a_picture(pairs):
    _, _, err = pairs.torchrun
    assert err.count("As a picture: ") == 1


def test_torchrun_ends_with_the_sentence_of_a_process_that_fails(pairs):
    code, _, err = pairs.torchrun
    assert code != 0
    sentence = "--out odd is no name for a checkpoint: give one that ends in .pt."
    assert f"par.py: error: {sentence}\n" in err


@pytest.mark.parametrize("name", PLAIN)
def test_two_processes_train_to_the_weights_of_one(name, pairs):
    ours = torch_load(pairs.one / name)["model"]
    theirs = torch_load(pairs.two / name)["model"]
    assert ours.keys() == theirs.keys()
    for place, value in ours.items():
        if place == "embed.1.bias":  # whose slope is rounding alone
            continue
        assert (value - theirs[place]).abs().max() < 1e-6, place


@pytest.mark.parametrize("name", PLAIN)
def test_two_processes_tell_the_losses_of_one(name, pairs):
    ours = record_of(pairs.one / name)
    theirs = record_of(pairs.two / name)
    assert [ours["processes"], theirs["processes"]] == [1, 2]
    for row, other in zip(ours["epochs"], theirs["epochs"], strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert row["lr"] == other["lr"]


def test_running_statistics_are_of_the_first_processs_crops(pairs, market):
    data = common.load_market(market, "train", (32, 32))
    train, _ = common.split_identities(data.person_ids)
    rows = train.nonzero()[:, 0]
    generator = seeded()
    items = rows[torch.randperm(len(rows), generator=generator)]
    affine = common.random_affine(len(rows), (32, 32), generator)
    saved = torch_load(pairs.folder / "norm.pt")["model"]
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]

    expected = torch.zeros(64)
    for step in range(4):
        first_half = slice(8 * step, 8 * step + 4)
        crops = data.images[items[first_half]]
        crops = common.augment(crops, affine[first_half], torch.zeros(4, 4))
        normalised = (crops / 255 - mean) / std
        maps = F.conv2d(normalised, saved["backbone.net.0.weight"], stride=2, padding=3)
        expected = 0.9 * expected + 0.1 * maps.mean((0, 2, 3))

    assert torch.allclose(saved["backbone.net.1.running_mean"], expected, atol=1e-5)
    assert expected.abs().max() > 0.01


def test_a_run_of_two_processes_goes_on_in_one(pairs, market, tmp_path, run):
    for ending in (".pt", ".json", ".last"):
        shutil.copy((pairs.folder / "norm").with_suffix(ending), tmp_path)
    said, _ = run(par, *QUICK, "--lr", 1e-12, "--out", tmp_path / "norm.pt", "--resume")
    assert "Going on after epoch 1.\n" in said


def wait_for_line(process, text):
    """Read what a process prints up to the line that holds a text."""
    while text not in process.stdout.readline():
        assert process.poll() is None, process.stderr.read()


def longest_sleep(run):
    """Most of the seconds in which a run like that trains, validates, and writes its files."""
    seconds = record_of(run)["seconds"]
    return 2.4 * (seconds["training"] + seconds["validation"])


@pytest.mark.parametrize("module", [par] if KILLS == 1 else [par, reid])
def test_a_killed_run_resumes_to_the_same_bits(module, market, trained, tmp_path, run):
    whole = getattr(trained, module.__name__)
    command = [module, *short_run(module, market, trained)]
    random = np.random.RandomState(1)
    for k in range(KILLS):
        out = tmp_path / str(k) / "cut.pt"
        cut = start([*command, out])
        wait_for_line(cut, "validation crops")
        time.sleep(random.uniform(0, longest_sleep(whole)))
        cut.kill()
        cut.communicate(timeout=60)

        run(*command, out, "--resume")
        check_same_run(whole, out)


@pytest.mark.parametrize("module", [reid] if KILLS == 1 else [reid, par])
def test_two_killed_processes_resume_to_the_same_bits(module, market, trained, pairs, tmp_path):
    """Killed is the second one, whose end ends the first, or both."""
    command = [module, *strong_run(module, market, trained)]
    whole = pairs.folder / "reid.pt"
    if module is par:
        whole = tmp_path / "par.pt"
        finish(together(2, *command, whole))
    random = np.random.RandomState(2)
    for k in range(KILLS):
        out = tmp_path / str(k) / "cut.pt"
        cut = together(2, *command, out)
        wait_for_line(cut[0], "epoch  1/3")
        time.sleep(random.uniform(0, longest_sleep(whole)))
        killed = cut[1:] if k % 2 == 0 else cut
        for process in killed:
            process.kill()
        finish(cut)
        for code, _, err in finish(together(2, *command, out, "--resume")):
            assert code == 0, err
        check_same_run(whole, out)


@pytest.mark.parametrize("batch", [7, 2])
def test_a_batch_that_two_processes_cannot_share_is_refused(batch, monkeypatch, run):
    monkeypatch.setattr(common, "processes", lambda: (0, 2))
    sentence = "cannot be shared by 2 processes: give a multiple of 2, two or more for each."
    run(par, *QUICK, "--batch", batch, error=f"--batch {batch} {sentence}")


def test_a_process_that_fails_ends_the_other_and_each_says_why(pairs):
    first, second = pairs.failed
    assert second[0] == 2
    assert second[2] == "par.py: One cannot go on.\n"
    assert first[0] == 2
    sentence = "par.py: another process of this run has ended, or cannot be reached ("
    assert first[2].splitlines()[-1].startswith(sentence)


@pytest.mark.parametrize("command", ["stats", "par", "reid"])
def test_several_processes_only_train(command, trained, monkeypatch, run):
    commands = {
        "stats": [par, "--stats"],
        "par": [par, "--eval", trained.par],
        "reid": [reid, "--eval", trained.reid],
    }
    monkeypatch.setenv("RANK", "0")
    error = "Several processes only train: run this command without torchrun."
    run(*commands[command], error=error)


def test_processes_that_cannot_meet_are_told(monkeypatch, run):
    monkeypatch.setenv("RANK", "0")
    error = (
        "start them by torchrun, no more on a machine than it has GPUs, or unset the variable RANK."
    )
    run(par, *QUICK, error=error)


# ------------------------------------------------------------------------------------------
# The errors.


def raising(error):
    """A script that ends in an error."""
    return SimpleNamespace(
        __name__="par",
        make_parser=par.make_parser,
        check_flags=par.check_flags,
        main=Mock(side_effect=error),
    )


FULL = "the memory is full: lower --batch or --size, or pass another --device."


@pytest.mark.parametrize(
    "error, code, sentence",
    [
        (UserError("two\nlines."), 2, "two lines."),
        (OSError("odd"), 2, "A file cannot be read or written (odd)."),
        (
            PermissionError(13, "Permission denied", "here"),
            2,
            "here cannot be read or written (Permission denied).",
        ),
        (
            UnicodeEncodeError("ascii", "x", 0, 1, "no letter"),
            2,
            "a file's name cannot be printed here: set PYTHONIOENCODING=utf-8.",
        ),
        (RuntimeError("CUDA out of memory."), 2, FULL),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, FULL),
        (MemoryError(), 2, FULL),
        (KeyboardInterrupt(), 130, STOPPED),
    ],
    ids=repr,
)
def test_an_error_becomes_a_sentence(error, code, sentence, capsys):
    assert call(raising(error)) == code
    assert capsys.readouterr().err == f"par.py: {sentence}\n"


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ValueError("a bug")], ids=repr)
def test_the_programs_own_error_is_not_hidden(error, capsys):
    with pytest.raises(type(error), match="a bug"):
        call(raising(error))
    assert capsys.readouterr().err == ""


# What it says goes nowhere: to a shell's >&- and 2>&-, a window without a console, a notebook.


class Notebook:
    """What a notebook or a service may put in the place of a stream."""

    encoding = None

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_scripts_work_without_a_stream(stream, trained, market, tmp_path, monkeypatch, capsys):
    command = ["--eval", trained.par, "--predict", market / "query"]
    assert call(par, *command) == 0
    csv_alone = capsys.readouterr().out
    monkeypatch.setattr(sys, stream, None)
    assert call(par, *command) == 0
    assert call(par, "--data", market, *QUICK, "--out", tmp_path / "o.pt") == 0
    assert call(par, "--eval", tmp_path / "gone.pt") == 2
    said, err = capsys.readouterr()
    if stream == "stderr":
        assert said.startswith(csv_alone)
        assert "Seconds" not in said[: len(csv_alone) + 1]
    else:
        assert said == ""
        assert err.endswith("gone.pt does not exist.\n")


def test_scripts_work_in_a_notebook(trained, market, tmp_path, monkeypatch):
    out = Notebook()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", Notebook())
    assert call(par, "--eval", trained.par, "--predict", market / "query") == 0
    assert len(out.text.splitlines()) == 11
    assert call(reid, "--data", market, *QUICK, "--out", tmp_path / "o.pt") == 0
    assert "epoch  1/1" in out.text


def test_a_reader_that_has_seen_enough_ends_a_program_silently(tmp_path, monkeypatch, capsys):
    with open(tmp_path / "out", "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert call(raising(BrokenPipeError())) == 141
    assert capsys.readouterr().err == ""


def test_the_end_of_another_process_is_told_where_there_are_several(monkeypatch, capsys):
    error = RuntimeError(
        "[gloo/transport/tcp/pair.cc:547] Connection closed by peer\nException raised from x"
    )
    with pytest.raises(RuntimeError, match="gloo"):
        call(raising(error))
    monkeypatch.setenv("RANK", "0")
    assert call(raising(error)) == 2
    said = capsys.readouterr().err
    assert said == (
        "par.py: another process of this run has ended, or cannot be reached "
        "([gloo/transport/tcp/pair.cc:547] Connection closed by peer).\n"
    )


TABLE = csv_text(ROWS)
BROKEN_TABLES = [
    (TABLE.replace("hat", "cap"), "lacks columns, or has them twice: hat."),
    (TABLE.replace("bag", "age", 1), "lacks columns, or has them twice: age, bag."),
    (TABLE.replace("\n1,", "\n1,1,"), "cannot be read as annotations (ValueError"),
    (csv_text([*ROWS, ROWS[1]]), "names identities twice: 2."),
    (TABLE, "that have crops in bounding_box_train: 3, 4, 5, 6, 7 and 3 more."),
    (
        csv_text([ROWS[0], ROWS[1] | {"age": 5, "hat": 3}]),
        "'age' of identity 2 is 5, not 1 to 4, 'hat' of identity 2 is 3, not 1 to 2.",
    ),
    (csv_text([ROWS[0], ROWS[1] | {"upred": ""}]), "'upred' of identity 2 is nan, not 1 to 2."),
]


@pytest.fixture
def root(market, tmp_path):
    """A copy of `market` to damage."""
    return shutil.copytree(market, tmp_path / "copy")


def check_training_is_refused(run, root, sentence):
    """Assert that it ends in a sentence and writes nothing."""
    before = files_of(root.parent)
    run(par, "--data", root, *QUICK, error=sentence)
    assert files_of(root.parent) == before


@pytest.mark.parametrize("table, sentence", BROKEN_TABLES, ids=[end for _, end in BROKEN_TABLES])
def test_broken_annotations_are_named_in_a_sentence(table, sentence, root, run):
    (root / "annotations_train.csv").write_text(table)
    check_training_is_refused(run, root, sentence)


@pytest.mark.parametrize(
    "names, sentence",
    [
        (
            ["-1_c1.jpg", "0000_c1.jpg"],
            "bounding_box_train holds -1_c1.jpg, 0000_c1.jpg. Move them",
        ),
        (
            ["0000_c1.jpg"],
            "if 0 is a person, give it a free number in all their names: 0021 for 0.",
        ),
        (["notes.txt", "2_c.png"], "bounding_box_train: 2_c.png, notes.txt. Rename that or move"),
        (["2_c1234567890.png"], "Not named like a crop of Market-1501 (0002_c1s1_000451_03.jpg:"),
    ],
)
def test_all_files_are_named_that_are_no_training_crops(names, sentence, root, run):
    for crop, name in zip(crops_of(root), names):
        crop.rename(root / "bounding_box_train" / name)
    check_training_is_refused(run, root, sentence)


def test_crops_that_cannot_be_read_are_named_five_and_how_many_more(root, run):
    crops = crops_of(root)[:12]
    for crop in crops:
        crop.write_bytes(b"")
    run(
        par,
        "--data",
        root,
        *QUICK,
        error=f"Cannot read 12 of 60 crops: {crops[0]} is not a readable",
    )
    check_training_is_refused(
        run, root, "and 7 more. Replace them or move them out of their folder."
    )


def test_crops_may_be_of_any_format_that_is_read_elsewhere(root, run):
    formats = [".png", ".bmp", ".webp", ".PNG", ".tif", ".jpeg", ""]
    for crop, ending in zip(crops_of(root), formats):
        kind = None if ending else "png"
        with Image.open(crop) as image:
            image.save(crop.with_suffix(ending), kind)
        if crop.suffix != ending:
            crop.unlink()
    data = common.load_market(root, "train", (64, 32))
    assert len(data.names) == 60
    run(par, "--data", root, *QUICK)


def test_what_a_system_puts_beside_crops_is_not_looked_at(root, run):
    folder = root / "bounding_box_train"
    for name in ("Thumbs.db", ".DS_Store", "desktop.ini"):
        (folder / name).touch()
    (folder / "@eaDir" / crops_of(root)[0].name).mkdir(parents=True)
    assert len(common.load_market(root, "train").names) == 60


def test_annotations_that_are_missing_are_asked_for(root, run):
    (root / "annotations_train.csv").unlink()
    check_training_is_refused(run, root, "mat. Put one there; reid.py needs none, but")


def test_crops_that_are_missing_are_asked_for(root, run):
    (root / "bounding_box_train").rename(root / "elsewhere")
    sentence = f"There are no crops in {root / 'bounding_box_train'}: --data takes the folder"
    check_training_is_refused(run, root, sentence)


def test_too_few_identities_to_split_are_told(root, run):
    for path in crops_of(root)[18:]:
        path.unlink()
    check_training_is_refused(run, root, "3 identities are too few to split")


def test_a_data_folder_that_is_not_there_is_named(root, run):
    gone = root.with_name("gone")
    root.rename(gone)
    check_training_is_refused(run, root, f"--data {root} is not a folder")


ABSENT = "cuda" if torch.backends.mps.is_available() else "mps"  # no machine has both

# A command: what is said of it. T: the folder of `trained`; N: that of `no_checkpoints`.
BROKEN_ARGUMENTS = f"""
par --device {ABSENT}: finds no {ABSENT} device here: pass --device
reid --eval T/reid.pt --prior 0: argument --prior: 0 is not a number from 1e-12 to 0.999999
par --lr=-1e-3: -1e-3 is not a number from 1e-12
par --size 0x64: 0x64 is not HEIGHTxWIDTH, each from 32 to 1024
reid --threshold far: argument --threshold: invalid
reid --threshold=-1: -1 is not mean or a number from 0 to
reid --init T/par.pt --eval T/reid.pt: not allowed with argument --init
par --predict N: --predict PATH... needs --eval FILE, the checkpoint to predict with.
par --eval T/par.pt --predict N: No image could be read from
reid --compare: it needs --init FILE, a checkpoint of par.py
reid --init T/par.pt --compare --identities all: and not --identities all, which leaves none
reid --recipe strong --without nick: invalid choice: 'nick' (choose from
reid --recipe strong --without identity triplets attributes: Nothing to learn: give two identities
par --without neck: --without leaves steps out of training by --recipe strong: pass that too
reid --eval T/reid.pt --without mirror: pass that too, and no --eval.
reid --eval T/reid.pt --recipe strong --without mirror: --without leaves steps out of training by
reid --embed N/x.npz: --embed needs --eval FILE
reid --export N/x.pt2: --export FILE needs --eval FILE, the checkpoint to export.
par --export N/x.pt2: --export FILE needs --eval FILE, the checkpoint to export.
par --eval T/par.pt --export N/x.pt: give a name that ends in .pt2 or .onnx.
par --eval T/par.pt --export N/x.pt2 --predict N: do two things: run the script for each.
reid --eval T/reid.pt --export N/x.pt2 --show 2: not allowed with argument --export
reid --eval T/reid.pt --export N/gone/text/x.pt2 --threshold 3: --threshold has no effect here
reid --show 3: --show needs --eval FILE
reid --eval T/reid.pt --search N: goes with --gallery FOLDER, the images to search.
reid --eval T/reid.pt --find hat=no: goes with --gallery FOLDER, the images to search.
reid --eval T/reid.pt --gallery N: --gallery goes with --search QUERY, --find or --embed.
reid --eval T/reid.pt --gallery N --find a=b: name one of these attributes: age, gender, hair
reid --eval T/reid.pt --gallery N --find gender=male hat=no hat=yes: name one class of hat: no, yes
reid --eval N/without.pt --gallery N --find hat=no: without.pt predicts no attributes to find by
reid --eval T/reid.pt --gallery N --embed N/cut.npz: is not a readable index (BadZipFile)
reid --eval T/reid.pt --gallery N --embed N/x.npz: No image could be read, so
reid --eval T/reid.pt --embed T/reid.pt: give one that ends in .npz
par --stats --out N/text/x.pt: par_stats.png cannot be written
par --stats --out N/results: results is no name for a checkpoint: give one that ends in .pt
reid --out .: is no name for a checkpoint: give one that ends in .pt
par --out N/folder.pt: folder.pt is no name for the file to write: give one that ends in .pt
reid --init T/par.pt --out T/par.pt: would replace the checkpoint of --init
reid --init T/par.pt --compare --weights imagenet: would not be compared with its like, as
reid --init T/par.pt --size 128x64: was trained with another --size: leave that out.
reid --init T/par.pt --data T/lonely: par.pt was trained on another data set: pass its --data or, to
reid --data T/lonely --identities all: No triplet can be formed
reid --data T/lonely --identities all --recipe strong: Nothing to learn: give two identities or more
reid --init T/reid.pt: is a checkpoint of reid.py; one of par.py is needed here
par --eval N/none.pt: none.pt does not exist
par --eval N/older: older is of another version of this code, or another backbone or data
par --eval N/backbone: backbone is of another version of this code, or another backbone or data
par --eval N/swapped: swapped is of another version of this code, or another backbone or data
par --eval N/code: code is not a readable checkpoint (UnpicklingError)
par --weights N/state: is neither a checkpoint of par.py or reid.py nor a state dict of
par --weights N/older: older is of another version of this code, or another backbone or data
par --weights T/par.pt --seed 3: par.pt was trained on people of this data set, known by the names
reid --weights T/reid.pt --seed 3: by the same --seed, or by reid.py --init FILE, a checkpoint of
"""


@pytest.fixture(scope="session")
def no_checkpoints(trained, tmp_path_factory):
    """A folder of files that are no checkpoints of this version, and none of attributes."""
    folder = tmp_path_factory.mktemp("no_checkpoints")
    good = torch_load(trained.par)
    version, backbone, classes = good["version"]
    swapped = [classes[1], classes[0], *classes[2:]]  # age and gender
    torch.save(good | {"version": [version - 1, backbone, classes]}, folder / "older")
    torch.save(good | {"version": [version, "resnet50", classes]}, folder / "backbone")
    torch.save(good | {"version": [version, backbone, swapped]}, folder / "swapped")
    code = b"\x80\x02cbuiltins\nprint\n."
    (folder / "code").write_bytes(code)
    torch.save({"conv1.weight": torch.zeros(1)}, folder / "state")
    (folder / "cut.npz").write_bytes(b"PK\3\4" + code)
    (folder / "text").touch()
    (folder / "folder.pt").mkdir()
    without = torch_load(trained.reid) | {"stage 1": None}
    common.save_checkpoint(folder / "without.pt", without)
    return folder


@pytest.mark.parametrize("case", BROKEN_ARGUMENTS.strip().splitlines())
def test_broken_arguments_are_named_in_a_sentence(case, trained, no_checkpoints, run):
    command, sentence = case.split(": ", 1)
    folders = {"T": trained.folder, "N": no_checkpoints}
    before = files_of(trained.folder)
    script, *words = command.split()
    for k, word in enumerate(words):
        if word[0] in folders:
            words[k] = folders[word[0]] / word[2:]
    run(SCRIPTS[script], *words, error=sentence)
    assert files_of(trained.folder) == before


def check_mutations(capsys, path, *command):
    """Assert that par.py takes a file as it is, and ends well or in a sentence where some bytes are
    changed and every fourth time the end is missing. Another error than `common.run` knows would be
    raised here."""
    good = np.fromfile(path, np.uint8)
    random = np.random.RandomState(0)
    codes = []
    for k in range(MUTATIONS // 4):
        bad = good.copy()
        if k > 0:
            # Anywhere, or near an end, where a zip file has its contents and a JPEG its header.
            reach = len(good) if k % 2 == 0 else min(len(good), 2000)
            places = random.randint(reach, size=random.randint(1, 9))
            if random.rand() < 0.5:
                places = -1 - places
            bad[places] ^= random.randint(1, 256, len(places), np.uint8)
        if k % 4 == 3:
            bad = bad[: random.randint(len(bad))]
        path.write_bytes(bad.tobytes())
        codes.append(call(par, *command))
        err = capsys.readouterr().err
        if codes[-1] == 2:
            assert err.splitlines()[-1].startswith("par.py: ")
    assert codes[0] == 0
    assert set(codes) == {0, 2}


def test_a_mutated_checkpoint_ends_in_a_sentence_or_in_work(market, trained, tmp_path, capsys):
    path = shutil.copy(trained.par, tmp_path / "mutated.pt")
    check_mutations(capsys, path, "--eval", path, "--predict", crops_of(market)[0])


def test_mutated_annotations_end_in_a_sentence_or_in_work(root, tmp_path, capsys):
    command = ["--stats", "--data", root, "--out", tmp_path / "p.pt"]
    check_mutations(capsys, root / "annotations_train.csv", *command)


def test_mutated_matlab_annotations_end_in_a_sentence_or_in_work(root, tmp_path, capsys):
    (root / "annotations_train.csv").unlink()
    path = root / "market_attribute.mat"
    save_mat(path, {"train": [ROWS[1] | {"id": person_id} for person_id in range(1, 11)]})
    check_mutations(capsys, path, "--stats", "--data", root, "--out", tmp_path / "p.pt")


def test_a_mutated_crop_ends_in_a_sentence_or_in_work(root, tmp_path, capsys):
    command = ["--stats", "--data", root, "--out", tmp_path / "p.pt"]
    check_mutations(capsys, crops_of(root)[0], *command)


def make_nan(patch, step):
    """From now on stage 1's loss of that step is NaN; an epoch of QUICK has four steps."""
    usual = par.attribute_loss
    calls = itertools.count(1)

    def attribute_loss(*values):
        loss = usual(*values)
        return loss * math.nan if next(calls) == step else loss

    patch.setattr(par, "attribute_loss", attribute_loss)


def test_a_loss_that_becomes_nan_at_once_writes_nothing(tmp_path, monkeypatch, run):
    make_nan(monkeypatch, 2)
    error = "The loss became nan in epoch 1: try a lower --lr."
    run(par, *QUICK, "--epochs", 3, error=error)
    assert os.listdir(tmp_path) == []


def test_a_loss_that_becomes_nan_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, run):
    make_nan(monkeypatch, 7)
    error = f"in epoch 2: try a lower --lr. {tmp_path / 'o.pt'} keeps the best"
    run(par, *QUICK, "--epochs", 3, error=error)
    assert sorted(os.listdir(tmp_path)) == ["o.json", "o.last", "o.pt"]
    assert len(record_of(tmp_path / "o.pt")["epochs"]) == 1
    for value in torch_load(tmp_path / "o.pt")["model"].values():
        assert value.isfinite().all()


def test_weights_that_cannot_be_downloaded_are_told(tmp_path, monkeypatch, run):
    def ask(*_, **__):
        raise OSError(f"nobody answers within {socket.getdefaulttimeout()} seconds")

    monkeypatch.setattr(torch.hub, "urlopen", ask)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    error = "within 20.0 seconds): pass --weights none to start from random weights"
    run(par, "--weights", "imagenet", error=error)
    assert socket.getdefaulttimeout() is None


def test_a_device_that_cannot_compute_is_told(monkeypatch):
    error = RuntimeError("no kernel image is available\nfor this device")
    monkeypatch.setattr(torch, "ones", Mock(side_effect=error))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError) as told:
        par.choose_device("cuda")
    assert str(told.value) == (
        "The cuda device is there but cannot compute (no kernel image is available): pass --device "
        "cpu."
    )


def test_a_process_that_torchrun_did_not_start_computes_on_the_first_gpu(monkeypatch):
    chosen = Mock()
    monkeypatch.setenv("RANK", "0")  # as a cluster's scheduler may set it
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch, "ones", Mock())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen)
    assert par.choose_device("cuda") == "cuda"
    chosen.assert_called_once_with(0)


@pytest.mark.parametrize(
    "cuda, mps, rank, best",
    [
        (True, False, None, "cuda"),
        (True, True, None, "cuda"),
        (False, True, None, "mps"),
        (False, True, "0", "cpu"),  # as MPS cannot send to other processes
        (False, False, None, "cpu"),
    ],
)
def test_the_fastest_device_there_is_chosen(cuda, mps, rank, best, monkeypatch):
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch, "ones", Mock())
    assert par.choose_device("auto") == best
    assert par.choose_device(best) == best
    assert par.choose_device("cpu") == "cpu"
    assert par.choose_device(torch.device("cpu")) == "cpu"
    assert par.choose_device(f"{best}:0") == f"{best}:0"


if __name__ == "__main__":  # as `start` starts it
    common.infer.__defaults__ = (None, 8 * 32 * 32)  # batches of eight small crops
    reid.chunk_rows = in_sevens
    words = sys.argv[1:]
    if "FAILS.pt" in words and os.environ["RANK"] == "1":
        par.attribute_loss = Mock(side_effect=UserError("One cannot go on."))
    while words:
        end = words.index("then")
        sys.argv = [f"{words[0]}.py", *words[1:end]]
        script = SCRIPTS[words[0]]
        common.run(script.make_parser(), script.check_flags, script.main)
        words = words[end + 1 :]
