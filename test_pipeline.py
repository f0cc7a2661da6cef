"""Every behaviour of par.py and reid.py: values against formulas written here, and the real commands on drawn people.
It needs neither network nor data. Two tests have a long form: KILLS=20 MUTATIONS=2000 pytest -k "killed or mutated".
"""
import copy
import csv
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

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before PyTorch: threads that spin take minutes on a busy machine
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageColor
from torch import nn
from torch.nn import functional as F

import common
import par
import reid
from common import ATTRIBUTES, SIZES, UserError, torch_load

HERE, CPU = Path(__file__).parent, SimpleNamespace(device="cpu")
KILLS, MUTATIONS = (int(os.environ.get(name, few)) for name, few in (("KILLS", 1), ("MUTATIONS", 40)))
QUICK = ["--epochs", "1", "--batch", "8", "--size", "32x32", "--device", "cpu"]


class NarrowResNet(torchvision.models.ResNet):
    """ResNet18 with an eighth of the channels after its first layer; where NO_NORM is set, without batch norm."""

    def __init__(self):
        super().__init__(torchvision.models.resnet.BasicBlock, [2, 2, 2, 2],
                         norm_layer=nn.Identity if "NO_NORM" in os.environ else None)
        self.fc = nn.Linear(512 // 8, 1000)

    def _make_layer(self, block, planes, *rest, **named):
        return super()._make_layer(block, planes // 8, *rest, **named)


# What makes short runs short, also in the processes that import this file: a network of 1 MB for 45, no kernels of
# bfloat16 to prepare for each shape of a batch, no threads for steps of milliseconds, no waiting for the disk.
USERS = {"resnet18": common.resnet18, "precision": common.precision}, torch.get_num_threads()
common.resnet18, common.precision, os.fsync = NarrowResNet, lambda device: "float32", lambda file: None
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job is started without


@pytest.fixture
def as_users_have_it(monkeypatch):  # network, precision and threads of a user's run
    for name, value in USERS[0].items():
        monkeypatch.setattr(common, name, value)
    torch.set_num_threads(USERS[1])
    yield
    torch.set_num_threads(1)


def call(module, *arguments):  # run a script's main as the command line does: -> exit code
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        try:
            common.run(module.main, module.parser())
        except SystemExit as end:
            return end.code
    return 0


@pytest.fixture
def run(market, tmp_path, capsys):
    """To run a command on `market`, on the CPU, to o.pt: -> (out, err). It must end well, or in a given error."""
    def run(module, *arguments, error=None, code=2):
        capsys.readouterr()
        end = call(module, "--data", market, "--device", "cpu", "--out", tmp_path / "o.pt", *arguments)
        out, err = capsys.readouterr()
        assert end == (code if error else 0), err
        assert not error or error in err.splitlines()[-1] and (err[-2:] == ".\n" or err.startswith("usage: ")), err
        return out, err
    return run


@pytest.fixture(scope="session")
def market(tmp_path_factory):  # a drawn data set: 10 identities of 6 crops to train with, as many to test with
    root = tmp_path_factory.mktemp("drawn")
    common.draw_market(root, 10, 6, seed=1)
    return root


@pytest.fixture(scope="session")
def trained(market, tmp_path_factory):
    """A run of each stage: their best checkpoints .par and .reid; beside them a data set of one crop of one person."""
    folder = tmp_path_factory.mktemp("trained")
    trained = SimpleNamespace(folder=folder, par=folder / "par.pt", reid=folder / "reid.pt")
    common.draw_market(folder / "lonely", 1, 1, seed=0)
    for module, out in ((par, trained.par), (reid, trained.reid)):
        assert call(module, *short_run(module, market, trained), out) == 0
    return trained


def short_run(module, market, trained):
    """The arguments that `trained` runs with, but for the name of --out: 3 epochs of 4 steps."""
    own = ["--clusters", 3, "--init", trained.par] if module is reid else ["--lr", 1e-3]  # of which epoch 2 is the best
    return ["--data", market, "--epochs", 3, "--batch", 8, "--size", "64x32", "--device", "cpu", *own, "--out"]


def before_call(patch, owner, name, at, act=lambda: signal.raise_signal(signal.SIGINT)):
    """From now on do `act`, which is to press Ctrl-C, before the at-th call of a function."""
    usual, calls = getattr(owner, name), itertools.count(1)
    patch.setattr(owner, name, lambda *values, **named: next(calls) == at and act() or usual(*values, **named))


def short_fit(model, data, rows, out, validate=lambda: {"f1": 1.0}, criterion=None, **settings):
    """`fit` on given rows [n, k], by default with cross-entropy, an epoch, batches of 8: -> its record."""
    defaults = {"seed": 0, "lr": 1e-3, "warmup": 0.5, "epochs": 1, "batch": 8, "patience": 5, "resume": False,
                "recipe": "report", "rungs": []}
    checkpoint = {"kind": "par", "record": {"arguments": {}, "seconds": {}, "fingerprints": {}, "processes": 1}}
    criterion = criterion or (lambda z, r: par.attribute_loss(z[0].split(SIZES, 1), data.labels[r[0]], "ce"))
    return common.fit(model, data.images, lambda generator: rows, criterion, validate,
                      SimpleNamespace(out=out, **defaults | settings), checkpoint)


def start(*commands, torchrun=False, **environment):
    """Start commands, [script, arguments...] each, in turn in a process of this file, or by torchrun in two."""
    if os.name == "nt" and (torchrun or environment):
        pytest.skip("takes libuv, which PyTorch lacks on Windows")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] * torchrun
    words = [str(getattr(word, "__name__", word)) for command in commands for word in (*command, "then")]
    return subprocess.Popen([sys.executable, "-u", *launcher, __file__, *words], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env=os.environ | environment)


def record_of(path):
    return json.loads(path.with_suffix(".json").read_text())


def files_of(folder):  # their sizes and times: equal to an earlier answer if nothing was written
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def crops_of(root):
    return sorted((root / "bounding_box_train").iterdir())


# ----------------------------------------------------------------------------- the data, augmentation, the network

def test_drawn_market_is_the_same_each_time_and_laid_out_like_market_1501(market, tmp_path):
    for root in (roots := [tmp_path / "a", tmp_path / "b"]):
        common.draw_market(root, 3, 2, seed=1)
    files = [{path.relative_to(root): path.read_bytes() for path in files_of(root)} for root in roots]
    assert files[0] == files[1] and len(files[0]) > 12
    train, query, gallery = (common.load_market(market, part) for part in common.PARTS)
    assert train.labels.tolist() == [common.read_annotations(market, "train")[i] for i in train.person_ids.tolist()]
    assert all(len(train.camera_ids[train.person_ids == i].unique()) > 1 for i in train.person_ids.unique())
    for person, camera in zip(query.person_ids, query.camera_ids):  # each query can be found in another camera
        assert ((gallery.person_ids == person) & (gallery.camera_ids != camera)).any()
    assert {-1, 0} < set(gallery.person_ids.tolist()) and not torch.isin(gallery.person_ids, train.person_ids).any()
    assert ((gallery.labels == -1) == (gallery.person_ids < 1)[:, None]).all()


ROW = {"id": 1, "age": 2, "backpack": 1, "bag": 2, "handbag": 1, "clothes": 2, "down": 1, "up": 2, "hair": 1, "hat": 1,
       "gender": 2} | {a[:-5] + colour: 1 for a in ("upcolor", "downcolor") for colour in ATTRIBUTES[a][:-1]}
ROWS = [ROW | {"upred": 2, "downbrown": 2}, ROW | {"id": 2, "downblack": 2, "hat": 2}]
NAMES = "teenager female short short long pants {} no yes no {} {}"  # what ROWS say, in the order of the attributes
LABELS = {k: [*map(tuple.index, ATTRIBUTES.values(), NAMES.format(*own).split())] for k, own in (
    (1, ("no", "red", "brown")), (2, ("yes", "multi", "black")))}


def csv_text(rows):
    return "\n".join(",".join(map(str, line)) for line in [rows[0], *([row[k] for k in rows[0]] for row in rows)])


@pytest.mark.parametrize("edit", [str, lambda text: "\ufeff" + text + ".0", lambda text: text.replace(",", ";"),
                                  lambda text: text[:-1] + '"0002"', lambda text: "\n \n" + text + "\n,,,,,\n"])
def test_csv_annotations_are_read_by_column_name(tmp_path, edit):
    text = edit(csv_text([dict(reversed(row.items())) for row in ROWS]))  # which ends with the identity, 2
    (tmp_path / "annotations_train.csv").write_bytes(text.replace("\n", "\r\n").encode())
    assert common.read_annotations(tmp_path, "train") == LABELS and common.read_annotations(tmp_path, "test") == {}


def save_mat(path, halves):  # a dict of name -> rows
    scipy = pytest.importorskip("scipy.io")
    fields = {half: {k: np.array([row[k] for row in rows], np.uint8) for k in rows[0] if k != "id"} | {
        "image_index": np.array([f"{row['id']:04d}" for row in rows], object)} for half, rows in halves.items()}
    scipy.savemat(path, {"market_attribute": fields}, do_compression=True)


def test_mat_annotations_are_read_by_field_name_in_either_order_and_take_scipy(tmp_path, monkeypatch):
    save_mat(tmp_path / "market_attribute.mat", {"train": ROWS, "test": [dict(reversed(r.items())) for r in ROWS]})
    assert all(common.read_annotations(tmp_path, half) == LABELS for half in ("train", "test"))
    monkeypatch.setitem(sys.modules, "scipy.io", None)  # as where it is not installed
    with pytest.raises(UserError, match="reading it takes SciPy: pip install scipy"):
        common.read_annotations(tmp_path, "train")


def test_odd_files_sizes_and_kinds_are_read(tmp_path):
    folder, values = tmp_path / "bounding_box_train", np.linspace(0, 255, 64 * 32).reshape(64, 32)
    folder.mkdir()
    for mode, colour, name in (("L", 90, "-1_c6s1_1_03.jpg"), ("RGB", (200, 30, 30), "0002_c1s1_1_03.jpg"), (
            "RGB", (30, 30, 200), "0010_c3s1_1_03.jpg.jpg")):
        Image.new(mode, (30, 90), colour).save(folder / name)
    (folder / "Thumbs.db").write_bytes(b"x")
    data = common.load_market(tmp_path, "train", (96, 48))
    assert data.person_ids.tolist() == [-1, 2, 10] and data.camera_ids.tolist() == [6, 1, 3]
    colours = torch.tensor([3 * [90], [200, 30, 30], [30, 30, 200]])[..., None, None]
    assert (data.labels == -1).all() and (data.images.float() - colours).abs().max() < 3
    (exif := Image.Exif())[0x112] = 6  # turned by 90 degrees: a camera held on its side
    turned, gray = tmp_path / "turned.jpg", Image.fromarray(values.astype(np.uint8))
    gray.convert("RGB").rotate(90, expand=True).save(turned, exif=exif)
    for name, mode in (("gray.png", "L"), ("palette.gif", "P"), ("cmyk.jpg", "CMYK"), ("l\u00e4ngs.bmp", "RGB")):
        gray.convert(mode).save(tmp_path / name)
        for read in common.read_crops([tmp_path / name, turned], (64, 32))[0]:
            assert np.abs(read.float().numpy() - values).max() <= 6, name
    Image.new("RGBA", (10, 20), (255, 0, 0, 0)).save(tmp_path / "clear.png")  # transparency is laid on white
    assert (np.asarray(common.read_image(tmp_path / "clear.png")) == 255).all()


def test_split_is_by_identity_and_seeded():
    ids = torch.randint(1, 101, (3000,), generator=seeded())
    (train, validation), (again, _), (other, _) = (common.split_identities(ids, 0.6, seed) for seed in (3, 3, 4))
    assert torch.equal(train, ~validation) and not torch.isin(ids[train], ids[validation]).any()
    assert len(ids[train].unique()) == 60 and torch.equal(train, again) and not torch.equal(train, other)


def test_augmentation_mirrors_turns_shifts_and_erases_as_drawn():
    crops = torch.randint(0, 256, (200, 3, 16, 8), dtype=torch.uint8)
    out = common.augment(crops, common.random_warp(200, (16, 8), seeded(), degrees=0))
    mirrored, same = ((out - other).abs().flatten(1).amax(1) < 1e-2 for other in (crops.flip(3), crops))
    assert (mirrored ^ same).all() and 70 < mirrored.sum() < 130
    warp, generator = common.random_warp(50, (128, 64), seeded(5)), seeded(5)
    angle = (torch.rand(50, generator=generator) * 2 - 1) * math.radians(10)
    flip = torch.where(torch.rand(50, generator=generator) < 0.5, -1.0, 1.0)
    crops = torch.zeros(50, 3, 128, 64, dtype=torch.uint8)
    crops[:, :, 30:33, 40:43] = 255  # a spot 32.5 above and 9.5 right of the centre
    out, place = common.augment(crops, warp)[:, 0], torch.arange(64) - 31.5 + 1j * (torch.arange(128)[:, None] - 63.5)
    found = (out * place).sum((1, 2)) / out.sum((1, 2))
    # The output at p shows the input at M p, so the spot s lands at M^-1 s, in pixels and in a true rotation.
    assert torch.allclose(found, torch.polar(torch.ones(50), -angle) * (9.5 * flip - 32.5j), atol=0.05)
    white = common.augment(torch.full((50, 3, 128, 64), 255, dtype=torch.uint8), warp)
    turned = angle.abs() > math.radians(3)
    assert (white[turned][:, :, [0, 0, -1, -1], [0, -1, 0, -1]].amin(2) < 1).all() and (white[:, :, 64, 32] > 254).all()
    warp = common.random_warp(4000, (128, 64), seeded(), degrees=0, shift=0.05, erase=0.5)
    move, (across, down) = warp[:, :, 2], ((warp[:, k, 4] - warp[:, k, 3]) / 2 for k in (0, 1))
    assert 0.09 < move.abs().max() <= 0.1 and move.mean().abs() < 0.01  # 5 % of a side that goes from -1 to 1
    erased, whole = across > 0, (across < 1) & (down < 1)
    assert erased.float().mean() == pytest.approx(0.5, abs=0.03) and torch.equal(erased, down > 0)
    area, long = (across * down)[erased], (2 * down / across)[erased & whole]
    assert area.max() < 0.401 and area.mean() == pytest.approx(0.21, abs=0.02)
    assert warp[:, :, 3:].abs().max() <= 1 and 0.3 < long.min() and long.max() < 3.34
    crops = torch.randint(0, 256, (300, 3, 32, 16), dtype=torch.uint8, generator=seeded())
    warp[:300, :, :3] = torch.eye(2, 3)
    out, mean = common.augment(crops, warp[:300]), crops.float().mean((0, 2, 3))
    gone = ((out - crops).abs() > 1e-2).any(1)
    assert torch.allclose(out.movedim(1, 3)[gone], mean, atol=0.1)
    assert gone.float().mean((1, 2)) == pytest.approx((across * down)[:300], abs=0.08)
    assert all(gone.select(axis, end).any() for axis in (1, 2) for end in (0, -1))  # up to each side


def test_the_rate_rises_then_falls_and_muon_moves_along_the_nearest_orthogonal_matrix(market):
    for script, flags, *own in ((par, w := "--weights=x ", 3e-4, 15, 32), (par, s := "--recipe=strong ", 2e-3, 10, 64),
                                (par, s + w, 5e-4, 10, 64), (reid, w, 2e-5, 10, 32), (reid, s, 2e-3, 24, 32)):
        common.start(args := script.parser().parse_args(["--data", str(market), *flags.split()]))
        assert [args.lr, args.epochs, args.batch, args.patience, args.warmup] == [*own, 999 if s in flags else 5, 0.1]
    rates = [common.learning_rate(step, 100, 3e-4, 0.1) for step in range(101)]
    assert [rates[k] for k in (0, 9, 55, 100)] == pytest.approx([3e-5, 3e-4, 1.5e-4, 0]) and rates[100] == 0
    assert max(rates) == pytest.approx(3e-4) and common.learning_rate(0, 10, 1.0, 0) == pytest.approx(1)
    start, *gradients = torch.randn(8, 40, 90, generator=seeded())
    matrix, momentum = start.clone().requires_grad_(), torch.zeros(40, 90)
    optimizer = common.Muon([matrix], 0.002)
    for gradient in gradients:
        before, matrix.grad = matrix.detach().clone(), gradient.clone()
        optimizer.step()
        moved, momentum = (before - matrix.detach()) / 0.04, 0.9 * momentum + 0.1 * gradient
        u, _, v = torch.linalg.svd(0.1 * gradient + 0.9 * momentum, full_matrices=False)
        assert ((moved * (u @ v)).sum() / moved.norm() / 40**0.5).item() > 0.97  # one direction
        assert 0.5 < torch.linalg.svdvals(moved).min() and torch.linalg.svdvals(moved).max() < 1.3


@pytest.mark.parametrize("rung, shift, erase", [("shift", 0.05, 0), ("erasing", 0, 0.5)])
def test_augmentation_and_loss_do_not_lose_precision_in_training(rung, shift, erase, market, tmp_path, monkeypatch):
    """bfloat16 coordinates would be wrong by a third of a pixel, and distances in it would have two digits."""
    monkeypatch.setattr(common, "precision", lambda device: "bfloat16")
    given, data, model = [], common.load_market(market, "train"), par.AttributeNet()
    model.backbone.forward = lambda x: given.append(x) or (None, x.new_zeros(8, model.backbone.width).requires_grad_())
    short_fit(model, data, torch.arange(8)[:, None], tmp_path / "x.pt", recipe="strong", rungs=[rung],
              criterion=lambda z, rows: given.extend((z.dtype, (z[0] @ z[0].T).dtype)) or z.sum())
    expected = common.augment(data.images[:8], common.random_warp(8, (128, 64), seeded(), 0, shift, erase))
    assert torch.equal(given[0], expected) and given[1:] == 2 * [torch.float32]


def test_backbone_normalises_loads_torchvisions_weights_and_convolves_by_matrices(tmp_path, as_users_have_it):
    reference = torchvision.models.resnet18()
    torch.save(state := reference.state_dict(), tmp_path / "resnet18.pth")
    torch.save({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, tmp_path / "published.pth")
    reference.fc, crops = nn.Identity(), torch.randint(0, 256, (4, 3, 128, 64), dtype=torch.uint8)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    expected = reference.eval()((crops / 255 - mean) / std)
    for name in ("resnet18.pth", "published.pth"):  # which lacks those
        weights = common.backbone_weights(SimpleNamespace(weights=str(tmp_path / name), resume=False))
        maps, features = (backbone := common.Backbone(weights).eval())(crops)
        assert torch.allclose(features, expected, atol=1e-4) and maps.shape == (4, backbone.width, 4, 2)
    assert torch.allclose(maps.mean((2, 3)), expected, atol=1e-4)
    for stride, *size in ((1, 4, 2), (1, 8, 4), (1, 16, 8), (1, 5, 3), (2, 4, 2), (2, 8, 4), (2, 16, 8), (2, 5, 3)):
        matrix = common.MatrixConv2d(nn.Conv2d(6, 10, 3, stride, 1, bias=False)).double()
        x = torch.randn(2, 6, *size, dtype=torch.float64)
        assert torch.allclose(matrix(x), F.conv2d(x, matrix.weight, stride=stride, padding=1))


# ------------------------------------------------------------------------------------------------ stage 1, by formulas

def some_classes(count, seed):
    return torch.stack([torch.randint(0, n, (count,), generator=g) for g in [seeded(seed)] for n in SIZES], 1)


@pytest.mark.parametrize("kind, gamma", [*itertools.product(("ce", "wce", "focal", "alpha"), (0.0, 0.5, 2.0))])
def test_losses_equal_the_reports_formulas_and_stay_finite(kind, gamma):
    logits = [3 * torch.randn(7, n, generator=seeded(n)).double() for n in SIZES]
    labels, expected = some_classes(7, seed=0), 0.0
    labels[2] = -1  # an image without annotation takes no part
    weights = [torch.arange(1, n + 1, dtype=torch.float64) / n for n in SIZES]
    for k, z in enumerate(logits):
        for scores, c in ((z[i].tolist(), labels[i, k]) for i in (0, 1, 3, 4, 5, 6)):
            p = math.exp(scores[c]) / sum(map(math.exp, scores))
            focus = (1 - p) ** gamma if kind in ("focal", "alpha") else 1
            expected -= focus * math.log(p) * (weights[k][c].item() if kind in ("wce", "alpha") else 1) / 6
    assert par.attribute_loss(logits, labels, kind, weights, gamma).item() == pytest.approx(expected, rel=1e-12)
    sure = [torch.full((2, n), -500.0).index_fill(1, torch.tensor([0]), 500.0).requires_grad_() for n in SIZES]
    loss = par.attribute_loss(sure, torch.tensor([[0] * 12, [1] * 12]), kind, [torch.ones(n) for n in SIZES], gamma)
    loss.backward()  # of one image that is surely right, one that is surely wrong
    assert loss.item() == pytest.approx(12 * 1000 / 2) and all(z.grad.isfinite().all() for z in sure)


def test_class_weights_and_scores_equal_counting():
    truth = some_classes(50, seed=0)
    guess = torch.where(some_classes(50, seed=1) % 2 == 0, truth, 0)
    truth[:, 0].clamp_(max=1), guess[:, 0].clamp_(max=2)  # class 3 occurs nowhere, class 2 in predictions alone
    guess[0, 0], truth[:5, 1] = 2, -1
    (accuracy, f1), weights = par.score(guess, truth), par.class_weights(truth)
    for k, n in enumerate(SIZES):
        pairs, scores = [(t, g) for t, g in zip(truth[:, k].tolist(), guess[:, k].tolist()) if t >= 0], []
        assert accuracy[k].item() == pytest.approx(sum(t == g for t, g in pairs) / len(pairs))
        for c in range(n):
            true, claimed = [g == c for t, g in pairs if t == c], [t == c for t, g in pairs if g == c]
            if true or claimed:
                precision, recall = (sum(x) / max(1, len(x)) for x in (claimed, true))
                scores.append(2 * precision * recall / max(1e-9, precision + recall))
            inverse = len(pairs) / len({t for t, _ in pairs}) / len(true) if true else 0  # so that their mean is 1
            assert weights[k][c].item() == pytest.approx(inverse)
        assert f1[k].item() == pytest.approx(sum(scores) / len(scores))


@pytest.mark.parametrize("head", ["linear", "conv"])
def test_the_joint_network_gives_logits_features_and_identities(head):
    model = par.AttributeNet(0.0, None, head, 5, ["neck", "mirror"] + ["stride"] * (head == "linear"))
    crops = torch.randint(0, 256, (6, 3, 64, 32), generator=seeded()).float()
    maps, features = model.backbone(crops)  # in training: the neck's statistics are the batch's
    logits, given, scores = model(crops).split([sum(SIZES), model.backbone.width, 5], 1)
    assert torch.allclose(given, features, atol=1e-5) and maps.shape[2:] == ((4, 2) if head == "linear" else (2, 1))
    normal = (features - features.mean(0)) / (features.var(0, correction=0) + 1e-5).sqrt()
    assert torch.allclose(scores, normal @ model.identify.weight.T, atol=1e-4)
    if head == "conv":  # the k-th attribute's branch, by itself
        seen = model.look[2](model.look[1](model.look[0](maps)))[:, 64 * 7:64 * 8].flatten(2)
        place = torch.einsum("bcn,c->bn", seen, model.place.weight[7].flatten()) + model.place.bias[7]
        pooled = torch.einsum("bcn,bn->bc", seen, place.softmax(1))
        assert torch.allclose(model.heads[7](pooled), logits[:, sum(SIZES[:7]):sum(SIZES[:8])], atol=1e-4)
        assert torch.allclose(par.activation_maps(model, crops, torch.zeros(6, 12)).sum((2, 3)), torch.ones(6, 12))
    with torch.inference_mode():
        both = [model.eval()(x) for x in (crops, crops.flip(3))]
        assert both[0].shape == (6, sum(SIZES) + model.backbone.width) and torch.allclose(*both, atol=1e-4)
        ours, mirrored = (model.neck(model.backbone(x)[1]) for x in (crops, crops.flip(3)))
        assert torch.allclose(both[0][:, sum(SIZES):], F.normalize(ours + mirrored), atol=1e-4)


# ------------------------------------------------------------------------------------------------ stage 2, by formulas

def test_triplet_losses_equal_the_reports_formula_and_the_batch_hard_one():
    a, p, n = torch.randn(3, 9, 5, dtype=torch.float64, generator=seeded())
    gaps = [sum((a[i] - p[i]) ** 2).item() - sum((a[i] - n[i]) ** 2).item() for i in range(9)]
    expected, ids, total = sum(max(0.0, gap + 0.7) for gap in gaps) / 9, torch.arange(9) // 3, 0
    assert reid.triplet_loss(a, p, n, 0.7).item() == pytest.approx(expected, rel=1e-12) and expected > 0
    for i in range(9):  # the farthest of one's own and the nearest of others
        own, other = ([(a[i] - a[k]).norm().item() for k in range(9) if (ids[k] == ids[i]) == same] for same in (1, 0))
        total += math.log(1 + math.exp(max(own) - min(other)))
    assert reid.hard_triplet_loss(a, ids).item() == pytest.approx(total / 9, rel=1e-6)
    same = torch.zeros(4, 5, requires_grad=True)  # equal crops, and a batch of one identity: no slope is NaN
    reid.hard_triplet_loss(same, torch.tensor([0, 0, 1, 1])).backward()
    assert same.grad.isfinite().all() and reid.hard_triplet_loss(a[:3], ids[:3]) == 0


def test_each_recipe_takes_its_rows_and_sums_the_losses_that_its_flags_name(market, monkeypatch, run):
    monkeypatch.setattr(common, "fit", fit := Mock(side_effect=UserError("Caught.")))
    data, out = common.load_market(market, "train", (32, 32)), torch.randn(4, 2, sum(SIZES) + 70, generator=seeded())
    chosen = common.split_identities(data.person_ids)[0].nonzero()[:, 0]
    known, weights = data.person_ids[chosen], par.class_weights(data.labels[chosen])
    for module, flags, names in (
            (par, "--loss alpha --gamma 3", "identity attributes"), (reid, "", "identity triplets attributes"),
            *((reid, f"--without {' '.join({*reid.RUNGS[:3]} - {name})}", name) for name in reid.RUNGS[:3])):
        run(module, "--recipe", "strong", *flags.split(), "--size", "32x32", error="Caught.")
        _, _, plan, criterion, *_ = fit.call_args.args
        rows = (items := plan(seeded()))[:2].T
        logits, features, scores = (given := out[:len(rows)]).flatten(0, 1).split([sum(SIZES), 64, 6], 1)
        ids, labels = torch.searchsorted(known.unique(), data.person_ids[rows.flatten()]), data.labels[rows.flatten()]
        kind, gamma, share, smooth = ("alpha", 3, 1, 0.1) if module is par else ("wce", 2, 1 / 12, 0)
        losses = {"identity": F.cross_entropy(scores, ids, label_smoothing=smooth),
                  "triplets": reid.hard_triplet_loss(features, ids),
                  "attributes": share * par.attribute_loss(logits.split(SIZES, 1), labels, kind, weights, gamma)}
        assert criterion(given, rows).item() == pytest.approx(sum(map(losses.get, names.split())).item(), rel=1e-5)
        assert {*items.flatten().tolist()} == {*chosen.tolist()}
    run(reid, "--margin", 99, "--clusters", 3, "--size", "32x32", error="Caught.")
    clusters, (_, _, plan, criterion, *_) = reid.cluster_histograms(data.images[chosen], 3), fit.call_args.args
    assert torch.equal(plan(seeded()), chosen[reid.sample_triplets(known, clusters, seeded())])
    assert criterion(out[:3], None) == reid.triplet_loss(*out[:3], 99.0) > 0


def test_clusters_group_crops_by_colour():
    colour = torch.randint(0, 4, (80,), generator=seeded())
    palette = torch.tensor([[200, 20, 20], [20, 200, 20], [20, 20, 200], [200, 200, 200]])
    images = (palette[colour][:, :, None, None] + torch.randint(-15, 16, (80, 3, 32, 16), generator=seeded(1))).byte()
    clusters = reid.cluster_histograms(images, 4, seed=0)
    assert len(clusters.unique()) == 4 and all(len(clusters[colour == c].unique()) == 1 for c in range(4))
    assert torch.equal(clusters, reid.cluster_histograms(images, 4, seed=0))
    assert reid.cluster_histograms(images[:3], 100).max() < 3
    assert (reid.cluster_histograms(images[:1].expand(9, -1, -1, -1), 4) == 0).all()
    with pytest.raises(UserError, match="no crops to cluster"):
        reid.cluster_histograms(images[:0], 4)


def test_every_triplet_is_possible_and_groups_hold_one_identity_and_each_crop_about_once():
    ids = torch.tensor([7, 7, 7, 3, 3, 9, 9, 9, 9, 5, 5, 2, 4, 4])  # identity 2 has a single crop, so no positive
    clusters = torch.tensor([0, 0, 1, 0, 1, 1, 2, 2, 2, 0, 2, 1, 3, 3])  # cluster 3 has one identity: any other will do
    generator, seen, expected = seeded(), set(), set()
    for _ in range(400):
        triplets = reid.sample_triplets(ids, clusters, generator).tolist()
        seen |= set(map(tuple, triplets))
        assert sorted(anchor for anchor, _, _ in triplets) == [*range(11), 12, 13] and sorted(triplets) != triplets
    for a in range(14):
        others = [i for i in range(14) if ids[i] != ids[a]]
        near = [i for i in others if clusters[i] == clusters[a]] or others
        expected |= {(a, p, n) for p in range(14) if ids[p] == ids[a] and p != a for n in near}
    assert seen == expected
    for lonely in (torch.arange(14), torch.ones(14, dtype=torch.int64)):
        with pytest.raises(UserError, match="No triplet can be formed"):
            reid.sample_triplets(lonely, clusters)
    counts = (1, 2, 3, 4, 5, 6, 9, 40)  # crops of identities 7, 14, 21, ...
    ids = torch.cat([torch.full((n,), 7 * n) for n in counts])[torch.randperm(70)]
    for seed in range(20):
        groups = reid.sample_groups(ids, 4, seeded(seed))
        assert groups.shape[1] == 4 and (ids[groups] == ids[groups[:, :1]]).all()
        for n in counts:
            rows = groups[ids[groups[:, 0]] == 7 * n]
            assert len(rows) == max(1, (n + 2) // 4) and len(rows.unique()) == min(n, 4 * len(rows))
            assert all(len(row.unique()) == min(n, 4) for row in rows)
    spread = (ids[groups[:, 0]] == 280).nonzero()[:, 0]
    assert spread.min() < 5 and spread.max() > len(groups) - 6 and spread.diff().max() <= 8


def crops_of_people(count, spread):  # nine people, seen by three cameras: each one's centre and noise around it
    generator = seeded()
    ids, cameras = (torch.randint(1, high, (count,), generator=generator) for high in (10, 4))
    features = torch.randn(10, 8, generator=generator)[ids] + spread * torch.randn(count, 8, generator=generator)
    return reid.Crops(features, ids, cameras, None)


def in_sevens(queries, columns):
    return [slice(i, i + 7) for i in range(0, queries, 7)]


def dense_reranking(query, gallery, k1, k2, part):
    """k-reciprocal re-ranking as Zhong et al. (2017) write it, with matrices of all pairs and Python's sets."""
    x = np.concatenate([query, gallery]).astype(np.float64)
    d = ((x[:, None] - x) ** 2).sum(2)
    d /= d.max(1, keepdims=True)
    order, v = d.argsort(1), np.zeros_like(d)

    def reciprocal(i, k):
        return {j for j in order[i, :k + 1] if i in order[j, :k + 1]}
    whole, halves = ([reciprocal(i, k) for i in range(len(x))] for k in (k1, round(k1 / 2)))
    for i, near in enumerate(whole):
        expanded = near
        for theirs in map(halves.__getitem__, near):
            expanded = expanded | theirs if len(theirs & near) > 2 / 3 * len(theirs) else expanded
        members = sorted(expanded)
        v[i, members] = np.exp(-d[i, members]) / np.exp(-d[i, members]).sum()
    v = np.stack([v[order[i, :k2]].mean(0) for i in range(len(x))])
    jaccard = 1 - np.stack([np.minimum(v[q], v).sum(1) / np.maximum(v[q], v).sum(1) for q in range(len(query))])
    return (1 - part) * jaccard[:, len(query):] + part * d[:len(query), len(query):]


@pytest.mark.parametrize("settings", [(20, 6, 0.3), (6, 1, 0.5), (7, 3, 0.0), (200, 6, 0.3), (3, 6, 1.0)])
def test_reranking_equals_the_dense_formula(settings, monkeypatch):
    monkeypatch.setattr(reid, "chunk_rows", in_sevens)
    features = crops_of_people(90, spread=0.5).features
    chunks = [*reid.rerank_chunks(features[:15], features[15:], *settings)]
    ours = torch.cat([distances for _, distances in chunks]).numpy()
    assert [i for rows, _ in chunks for i in range(15)[rows]] == [*range(15)] and ours.dtype == np.float32
    assert np.abs(ours - dense_reranking(features[:15].numpy(), features[15:].numpy(), *settings)).max() < 1e-5
    alone = torch.cat([d for _, d in reid.rerank_chunks(features, None, *settings)]).numpy()  # each against all others
    assert np.isposinf(alone.diagonal()).all() and np.abs(alone[:15, 15:] - ours).max() < 1e-5
    assert next(reid.rerank_chunks(features[:9] * torch.nan, features))[1].isnan().all()


def brute_force(distances, query_ids, query_cameras, gallery_ids, gallery_cameras, keep, cross_camera):
    totals = []  # of each query, rank by rank
    for q in range(len(distances)):
        ranking = sorted(range(distances.shape[1]), key=lambda g: (distances[q, g].item(), g))
        ranking = [g for g in ranking if gallery_ids[g] != -1 and not (
            cross_camera and gallery_ids[g] == query_ids[q] and gallery_cameras[g] == query_cameras[q])]
        matches = sum(int(gallery_ids[g] == query_ids[q]) for g in ranking)
        returned = [g for g in ranking if keep is None or keep[q, g]]
        ranks = [rank for rank, g in enumerate(returned, 1) if gallery_ids[g] == query_ids[q]]
        at, first = sum(k / rank for k, rank in enumerate(ranks, 1)), min(ranks, default=math.inf)
        just_before = sum(k / (rank - 1) if k else rank == 1 for k, rank in enumerate(ranks))
        if matches:
            totals.append([at / matches, (at + just_before) / 2 / matches, first <= 1, first <= 5, first <= 10,
                           matches / ranks[-1] if len(ranks) == matches else 0, len(ranks) / max(1, len(returned)),
                           len(ranks) / matches, len(returned)])
    return dict(zip(reid.METRICS, np.mean(totals or [[math.nan]], axis=0).tolist())) | {"queries": len(totals)}


@pytest.mark.parametrize("seed, kind", [*enumerate("float32 float64 int64 float32 half bfloat16 float64 half".split())])
def test_rank_metrics_equal_brute_force(seed, kind, monkeypatch):
    """Random rankings with junk, distractors, ties, queries without a match, empty lists; with both switches."""
    generator, queries, gallery = seeded(seed), 25, (4, 40)[seed % 2]
    draw = lambda low, high, n: torch.randint(low, high, (n,), generator=generator)
    distances = torch.rand(queries, gallery, generator=generator)
    distances[:, 0] = 0  # whose logarithm is -inf
    distances = ((6 * distances).round() if seed % 4 > 1 else distances.log()).to(getattr(torch, kind))  # most are tied
    sides = draw(1, 9, queries), draw(1, 4, queries), draw(-1, 7, gallery), draw(1, 4, gallery)
    monkeypatch.setattr(reid, "chunk_rows", in_sevens)
    before, one = distances.clone(), torch.tensor([1])
    for cross_camera in (True, False):
        for keep in (None, torch.rand(queries, gallery, generator=generator) < 0.3):
            assert reid.rank_metrics(distances, *sides, keep, cross_camera) == pytest.approx(
                brute_force(distances, *sides, keep, cross_camera), abs=1e-9)
    assert torch.equal(distances, before)
    for row, camera, said in (([0], 1, no := "No query has a match"), ([], 2, no), ([np.nan], 2, "Distances are NaN")):
        with pytest.raises(UserError, match=said):  # its own camera's alone, or there is no query
            reid.rank_metrics(torch.tensor(row)[:, None], one[:len(row)], one[:len(row)], one, torch.tensor([camera]))


def test_validation_ranks_thresholds_and_counts_all_pairs(monkeypatch):
    monkeypatch.setattr(reid, "chunk_rows", in_sevens)
    crops = crops_of_people(80, spread=1.2)
    features, ids, cameras, curve = crops.features, crops.ids, crops.cameras, reid.distance_histograms(crops)
    nine, everyone = reid.Crops(features[:9], ids[:9], cameras[:9]), torch.arange(80)
    distances, same = (features[:, None] - features).norm(dim=2), ids[:, None] == ids
    own, mean, few = same & (cameras[:, None] == cameras), curve["mean"], reid.distance_histograms(nine, crops)
    assert mean == pytest.approx(distances.sum().item() / 80 / 79, rel=1e-5)
    assert few["mean"] == pytest.approx(distances[:9].mean().item(), rel=1e-5)
    assert few["others"].sum() == (~same & (cameras[:, None] != cameras))[:9].sum() and few["matches"].sum() == (same & ~own)[:9].sum()
    tries = {t: (t, 12) for t in (0.1, 2.0, mean, 5.0, 99.0)} | reid.EVERY
    for cross_camera in (True, False):
        scores, totals = reid.score_selections(crops, None, tries, cross_camera), []
        for q in range(80):  # one query at a time, taken out of its gallery
            rest, one = everyone[everyone != q], slice(q, q + 1)
            totals.append(brute_force(distances[one, rest], ids[one], cameras[one], ids[rest], cameras[rest], None,
                                      cross_camera)["mAP"])
        expected = np.nanmean(totals), np.isfinite(totals).sum()
        assert (scores["none"]["mAP"], scores["none"]["queries"]) == pytest.approx(expected, abs=1e-9)
        maps = [scores[t]["mAP"] for t in sorted(tries.keys() - {"none"})]  # which a threshold can only lower
        assert maps == sorted(maps) and maps[-1] == scores["none"]["mAP"] and maps[0] < maps[2]
        left_out = own if cross_camera else torch.eye(80, dtype=torch.bool)
        assert scores[mean]["length"] == pytest.approx(((distances < mean) & ~left_out).sum().item() / 80)
    assert curve["edges"][-1].item() == pytest.approx(distances.max().item(), rel=1e-5)
    for k in range(50, 1001, 50):  # a pair may lie on an edge
        for name, pairs in (("matches", same & ~own), ("others", ~same & (cameras[:, None] != cameras))):
            assert curve[name][:k].sum() == pytest.approx((distances < curve["edges"][k])[pairs].sum().item(), abs=4)


def curve_of(matches, others):
    matches, others = (torch.tensor(n, dtype=torch.float64) for n in (matches, others))
    return {"edges": torch.linspace(0, 2, len(matches) + 1, dtype=torch.float64), "matches": matches, "others": others}


def test_probability_of_the_same_person_is_the_share_that_falls_with_the_distance():
    random = np.random.RandomState(0)
    matches, others = (random.poisson(50 * np.exp(-((np.arange(40) - m) / 8) ** 2)) for m in (10, 25))
    p, half, share = reid.same_person(curve_of(matches, others))
    assert share == pytest.approx(matches.sum() / (matches.sum() + others.sum())) and p(half) == pytest.approx(0.5)
    # Isotonic regression by its minimax formula, and its log-odds drawn from one level's mean distance to the next.
    m, n = matches + np.eye(40)[39], matches + others + np.eye(40)[0] + np.eye(40)[39]
    fit = [min(max(m[a:b].sum() / n[a:b].sum() for b in range(k + 1, 41)) for a in range(k + 1)) for k in range(40)]
    levels = [np.isclose(fit, level) for level in sorted(set(np.round(fit, 12)))[::-1]]
    means = [(n * (np.arange(40) + 0.5) / 20)[level].sum() / n[level].sum() for level in levels]
    values = [m[level].sum() / n[level].sum() for level in levels]
    edges, odds = np.linspace(0, 2, 41), np.log(values) - np.log1p(np.negative(values))
    assert 5 < len(levels) < 40 and np.allclose(p(edges), 1 / (1 + np.exp(-np.interp(edges, means, odds))))
    # Where other pairs are seven times as frequent, the odds of a match are a seventh.
    prior = matches.sum() / (matches.sum() + 7 * others.sum())
    q, nearer, share = reid.same_person(curve_of(matches, others), prior)
    assert np.allclose(q(edges) / (1 - q(edges)), p(edges) / (1 - p(edges)) / 7) and nearer < half and share == prior
    for few, prior in itertools.product(("500 009", "005 900", "000 000", "100 000", "000 010", "010 010"), (
            None, 1e-12, 0.5, 1 - 1e-6)):  # three bins of matches, three of others
        p, half, share = reid.same_person(curve_of(*([int(n) for n in counts] for counts in few.split())), prior)
        p = p(np.linspace(0, 2, 9))
        assert half == np.clip(half, 2 * (p[-1] > 0.5), 2 * (p[0] >= 0.5))  # where all, or none, are above: an end
        assert ((p > 0) & (p < 1)).all() and (np.diff(p) <= 1e-15).all() and 0 <= half <= 2 and 0 <= share <= 1


def test_hamming_counts_attributes_that_differ_and_is_tuned_for_map():
    ids, cameras, known = torch.arange(40) % 8, torch.arange(40) // 8, some_classes(8, seed=0).repeat(5, 1)
    known[:, 0] = cameras % 4  # identities differ in one attribute between cameras, and from others in more
    log_p = torch.cat([F.one_hot(column, n) for column, n in zip(known.T, SIZES)], 1).float().log()
    crops = reid.Crops(torch.randn(40, 4, generator=seeded(1)), ids + 1, cameras, log_p)
    distances, differ = torch.cdist(crops.features, crops.features), (known[:, None] != known).sum(2)
    assert torch.equal(12 - crops.attributes @ crops.attributes.T, differ.float())
    maps = [brute_force(distances, ids, cameras, ids, cameras, differ <= k, True)["mAP"] for k in range(13)]
    args = SimpleNamespace(threshold="mean", rerank=False, eval=None, out="o.pt")
    assert reid.score_and_show(args, crops, None, None)[2] == int(np.argmax(maps)) == 1 and maps[1] > maps[12] + 0.1


# ---------------------------------------------------------------------------------------------- the commands, the loop

def table_of(text, title="Nearest to", rows=None):  # of the first table whose title holds that, split, no header
    return [line.split() for line in text[text.index(title):].split("\n\n")[0].splitlines()[2:]][:rows]


def test_both_stages_write_checkpoint_and_record_and_stage_2_figure_3(trained):
    record, saved = record_of(trained.par), common.load_checkpoint(trained.par, "par")
    assert [row["epoch"] for row in record["epochs"]] == [1, 2, 3] and record["arguments"]["loss"] == "wce"
    assert {"loss", "lr", "seconds", "images_per_second", "f1", "accuracy"} <= set(record["epochs"][0])
    assert record["data"]["drawn demo set"] and record["versions"] and record["seconds"] and "peak_memory_MB" in record
    assert [r["lr"] for r in record["epochs"]] == [common.learning_rate(k, 12, 1e-3, 0.1) for k in (3, 7, 11)]
    best, f1 = max(record["epochs"], key=lambda row: row["f1"]), record["final"]["validation"]["f1"]
    assert record["best epoch"] == best["epoch"] and f1["global"] == pytest.approx(best["f1"], abs=1e-4)
    assert torch.cat([saved["train_ids"], saved["validation_ids"]]).sort()[0].tolist() == [*range(1, 11)]
    stage_2, record = torch_load(trained.reid), record_of(trained.reid)
    assert torch.equal(saved["train_ids"], stage_2["train_ids"])
    assert all(torch.equal(v, stage_2["stage 1"]["model"][k]) for k, v in saved["model"].items())
    best, across = max(row["mAP"] for row in record["epochs"]), record["final"]["validation"]["across cameras"]
    assert across["none"]["mAP"] == pytest.approx(best, abs=1e-6)
    assert across["both"]["length"] <= min(across[name]["length"] for name in ("threshold", "hamming"))
    figure_3, (_, half, share) = Image.open(trained.reid.with_suffix(".png")), reid.same_person(stage_2["distances"])
    assert figure_3.size == (1120, 620)
    assert record["final"]["same person"] == {"distance": half, "share of matches": share}
    assert {p.name for p in trained.folder.iterdir()} == {"reid.png", "lonely"} | {
        f"{kind}.{end}" for kind in ("par", "reid") for end in ("pt", "last", "json")}


def test_stage_1_scores_counts_and_compares_the_losses(trained, market, tmp_path, run):
    (shutil.copytree(market, tmp_path / "copy") / "annotations_test.csv").unlink()
    out, unscored = (run(par, "--eval", trained.par, "--data", data)[0] for data in (market, tmp_path / "copy"))
    assert "No test crops are annotated, or all were trained on: not" in unscored
    assert table_of(out, "60 test crops", 13) == table_of(run(par, "--eval", trained.reid)[0], "60 test crops", 13)
    assert "validation crops of 4 identities" in out and "60 test crops of 10 identities" in out
    data, rows = common.load_market(market, "train"), table_of(out, "validation crops")
    f1 = [100 * v for v in record_of(trained.par)["final"]["validation"]["f1"].values()]
    training, validation = par.saved_split(torch_load(trained.par), data.person_ids, trained.par)
    commonest = (data.labels[validation] == data.labels[training].mode(0).values).float().mean(0)
    commonest = (100 * torch.cat([commonest, commonest.mean(0, True)])).tolist()
    assert [[float(v) for v in row[2:4]] for row in rows] == [pytest.approx(v, abs=0.01) for v in zip(commonest, f1)]
    black = (data.labels[:, 10] == 0).sum().item()
    rows, share = table_of(run(par, "--stats")[0], "Table 4"), f"{100 * black / 60:.2f}"  # of identities with 6 crops
    assert ["upcolor", "black", str(black), share, str(black // 6), share] in rows and len(rows) == sum(SIZES)
    rows = table_of(run(par, "--loss", "all", *QUICK)[0], "Table 3")
    assert [row[0] for row in rows] == [*map(str.capitalize, ATTRIBUTES), "Global"]
    for k, kind in enumerate(par.LOSSES, 1):
        record = record_of(tmp_path / f"o_{kind}.pt")
        f1 = [100 * v for v in record["final"]["validation"]["f1"].values()]
        assert record["arguments"]["loss"] == kind and [float(row[k]) for row in rows] == pytest.approx(f1, abs=0.01)


def test_stage_1_predicts_and_maps_what_can_be_read_and_names_the_rest(trained, market, tmp_path, run, monkeypatch):
    folder, crop = shutil.copytree(market / "query", tmp_path / "mine"), crops_of(market)[0]
    large, odd = folder / "large.png", folder / ("odd \u00e4.png" if os.name == "nt" else "two\nlines \u00e4.webp")
    for path in (large, odd, folder / ".hidden.png"):
        Image.new("RGB", (400, 300), "blue").save(path)
    Image.new("L", (4100, 3000)).save(folder / "bomb.png"), Image.new("I;16", (40, 30)).save(folder / "deep.png")
    for name, length in (("empty.png", 0), ("text.jpg", 3), ("Thumbs.db", 3), ("cut.png", 300)):
        (folder / name).write_bytes(large.read_bytes()[:length])
    os.truncate(folder / "text.jpg", 3 if os.name == "nt" else 2**37)  # as large as no memory; it takes no disk
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6_000_001)  # an error at twice as many
    out, err = run(par, "--eval", trained.par, "--predict", tmp_path / "nowhere", folder, crop, "--sheet", "--maps")
    skipped = [line for line in err.splitlines() if line.startswith("Skipped: ")]
    for name in ("nowhere", "bomb.png", "cut.png", "empty.png", "text.jpg", "deep.png is not a readable image (more"):
        assert len(skipped) == 6 and sum(name in line for line in skipped) == 1
    rows, model = [*csv.DictReader(out.splitlines(True))], par.load(CPU, torch_load(trained.par))
    paths = [*sorted({*folder.glob("*.jpg"), large, odd} - {folder / "text.jpg"}), crop]
    assert [row["file"] for row in rows] == list(map(str, paths))
    crops, _ = common.read_crops(paths, (64, 32))
    maps, logits = par.activation_maps(model, crops, par.predict(model, crops)[0]), common.infer(model, crops)
    for k, ((a, names), z) in enumerate(zip(ATTRIBUTES.items(), logits.split(SIZES, 1))):
        (best, which), sure = z.max(1), z.softmax(1).amax(1)
        assert [float(row[f"{a}_probability"]) for row in rows] == pytest.approx(sure.tolist(), abs=0.02)
        assert np.mean([row[a] == names[c] for row, c in zip(rows, which.tolist())]) > 0.9
        assert torch.allclose(maps[:, k].mean((1, 2)) + model.heads[k][1].bias[which], best, atol=1e-4)
    assert Image.open(tmp_path / "par_sheet.png").size == (6 * 166 + 8, 4 * (256 + 13 * 18 + 24) + 8)
    assert Image.open(tmp_path / "par_maps.png").size == (13 * 166 + 8, 20 * (192 + 18 + 24) + 8)
    model.heads[3][1].bias.data.fill_(math.nan)
    with pytest.raises(UserError, match="holds NaN or infinity: its training diverged"):
        common.infer(model, crops)


def test_stage_2_exports_scores_and_shows_the_test_set_and_needs_no_annotations(trained, market, tmp_path, run):
    root = shutil.copytree(market, tmp_path / "copy")
    for path in root.glob("*.csv"):
        path.write_bytes(b"\xff\xfe\x00\x81")
    run(reid, "--data", root, *QUICK)
    run(reid, "--data", root, "--eval", trained.reid, "--embed", tmp_path / "f.npz")
    arrays, checkpoint, sides = dict(np.load(tmp_path / "f.npz")), torch_load(trained.reid), []
    for part in ("query", "gallery"):
        data = common.load_market(market, part, (64, 32))
        values = common.infer(reid.load(CPU, checkpoint)[0], data.images), data.person_ids, data.camera_ids, data.names
        for key, value in zip(("features", "ids", "cameras", "names"), values):
            assert (np.allclose if key == "features" else np.array_equal)(arrays[f"{part}_{key}"], value)
        sides += values[:3]
    command = "--data", root, "--eval", trained.reid, "--hamming", 3, "--threshold", 1.5
    out, _ = run(reid, *command, "--show", 3)
    assert "distance < 1.500" in out and "at most 3 of 12" in out and f"| {trained.reid}\n" in out
    q, ids, cameras, g, theirs, seen = sides
    expected = brute_force(torch.cdist(q, g), ids, cameras, theirs, seen, None, True)["mAP"]
    assert table_of(out, ", test set, ")[0][:2] == ["none", f"{100 * expected:.2f}"]
    same = ids[:, None] == theirs  # what is promised of each pair of the test set, and whether it matches
    pairs = (theirs >= 0) & (cameras[:, None] != seen)
    for prior, out in ((None, out), (0.3, run(reid, *command, "--prior", 0.3)[0])):
        promised = reid.same_person(checkpoint["distances"], prior)[0](torch.cdist(q, g))
        for k, row in enumerate(table_of(out, "Probability of the same person", 10)):
            found = pairs & torch.from_numpy((promised * 10).astype(int).clip(max=9) == k)
            assert row[:3] == [f"{10 * k}", "to", f"{10 * k + 10}"] and int(row[3]) == pytest.approx(found.sum(), abs=9)
            if found.sum() > 50:
                means = [100 * promised[found].mean(), 100 * same[found].double().mean().item()]
                assert [float(v) for v in row[4:]] == pytest.approx(means, abs=3)
    picture, right, wrong = Image.open(tmp_path / "show.png").convert("RGB"), *map(ImageColor.getrgb, (
        reid.MATCH, reid.OTHER))
    assert picture.size == (11 * 166 + 8, 3 * (256 + 18 * 2 + 24) + 8)
    frames = [[{picture.getpixel((8 + k * 166 + x, y)) for x in range(128)} for k in range(11)] for y in (5, 321, 637)]
    assert all(row[0] == {(255, 255, 255)} and all(cell in ({right}, {wrong}) for cell in row[1:]) for row in frames)
    assert frames[0][1] == {right} and frames[0].count({right}) >= frames[2].count({right})


def test_search_ranks_by_distance_and_finding_by_the_product_of_probabilities(trained, market, tmp_path, run):
    folder, checkpoint = shutil.copytree(market / "query", tmp_path / "mine"), torch_load(trained.reid)
    arguments = ("--eval", trained.reid, "--gallery", folder, "--out", folder / "r.pt", "--top")
    out, _ = run(reid, *arguments, 4, "--search", folder)
    images, networks = common.load_market(market, "query", (64, 32)), reid.load(CPU, checkpoint)
    crops, names = reid.embed(networks, images), images.names
    distances, alike = torch.cdist(crops.features, crops.features), crops.attributes @ crops.attributes.T
    sure, *_ = reid.same_person(checkpoint["distances"])
    for q, name in enumerate(names):
        for k, row in enumerate(table_of(out, f"Nearest to {folder / name}", 4), 1):
            g, d = names.index(Path(row[-1]).name), float(row[1])
            assert row[0] == str(k) and int(row[4]) == alike[q, g] and g != q  # which comes first
            assert (d, d) == pytest.approx((distances[q, g].item(), distances[q].sort()[0][k].item()), abs=0.002)
            assert float(row[2]) == pytest.approx(100 * sure(d), abs=0.2)
    (folder / "search.png").unlink()
    out, _ = run(reid, *arguments, 3, "--search", market / "query" / names[3])
    assert table_of(out)[0][3:] == ["%", "12", "of", "12", str(folder / names[3])]  # a copy of the query
    (folder / "search.png").unlink()
    out, _ = run(reid, *arguments, 12, "--find", "gender=female", "upcolor=red")
    logits = common.infer(networks[1], images.images).split(SIZES, 1)
    product = (logits[1].softmax(1)[:, 1] * logits[10].softmax(1)[:, 2]).tolist()
    rows = table_of(out, "gender female, upcolor red, among 20", 12)
    assert [float(row[1]) for row in rows] == pytest.approx(sorted(product, reverse=True)[:12], rel=0.01)
    assert all(product[names.index(Path(row[-1]).name)] == pytest.approx(float(row[1]), rel=0.01) for row in rows)
    assert Image.open(folder / "find.png").size == (5 * 166 + 8, 3 * (256 + 4 * 18 + 24) + 8)


def test_an_index_is_written_once_goes_on_and_answers_as_its_folder_does(trained, market, tmp_path, run, monkeypatch):
    home, counts, embed = tmp_path / "home", [], reid.embed
    folder, index = shutil.copytree(market / "query", home / "mine"), home / "i.npz"
    names = sorted(path.name for path in folder.iterdir())
    [(folder / f"-{k}.txt").write_text("no image") for k in range(8)]  # two blocks without one
    monkeypatch.setattr(reid, "BLOCK", 4), monkeypatch.setattr(reid, "SAVED", 2)
    monkeypatch.setattr(reid, "embed", lambda *values: counts.append(len(values[1].names)) or embed(*values))

    def write(**expected):
        counts.clear()
        out, err = run(reid, "--eval", trained.reid, "--embed", index, "--gallery", folder, **expected)
        return out + err, *(np.load(index)[f"gallery_{key}"] for key in ("names", "features"))

    def answers(gallery):
        (out, err), (found, _) = (run(reid, "--eval", trained.reid, "--gallery", gallery, *command) for command in (
            ("--search", folder / names[0], "--top", 5), ("--find", "hat=no", "upcolor=red", "--top", 50)))
        return table_of(out, rows=5) + table_of(found, "hat no", 20), err
    with monkeypatch.context() as patch:  # cut off in the fourth block, after two were saved
        before_call(patch, common, "infer", 7)  # of two networks
        assert len(write(code=130, error="stopped.")[1]) == 8 and counts == [4] * 4
    said, stored, before = write()
    assert sum(counts) == 12 and f"{index}: 20 gallery embeddings of 120 dimensions" in said and "Skipped: " in said
    assert stored.tolist() == [f"mine/{name}" for name in names]
    assert answers(index)[0] == (expected := answers(folder)[0]) and len(expected) == 25
    (folder / names[3]).unlink()
    shutil.copy(folder / names[5], folder / names[4])
    shutil.copy(folder / names[6], folder / "new.jpg")
    rows, err = answers(index)  # as it was: but what has gone cannot be drawn
    assert rows == expected and err.count(f"{folder / names[3]} does not exist.") == (names[3] in str(rows[:5]))
    said, stored, after = write()
    assert "; dropped 2 out of date" in said
    assert sum(counts) == 2 and stored.tolist() == [f"mine/{name}" for name in [*names[:3], *names[4:], "new.jpg"]]
    assert np.array_equal(after[:3], before[:3]) and np.allclose(after[3], after[4], atol=1e-4)
    expected, _ = answers(folder)
    moved = shutil.move(home, tmp_path / "moved")  # folder and index together
    folder, saved, index = moved / "mine", torch_load(trained.reid), moved / "i.npz"
    assert str(answers(index)[0]).replace("moved", "home") == str(expected)
    if os.name != "nt":  # which asks for rights to make a link
        (tmp_path / "link").symlink_to(moved, target_is_directory=True)
        assert answers(tmp_path / "link" / "i.npz") == answers(index)
    run(reid, "--eval", trained.reid, "--embed", index, "--gallery", market / "query", error="names none of the files")
    run(reid, "--eval", trained.reid, "--embed", index, error="is an index of a --gallery: name that folder too")
    common.save_checkpoint(tmp_path / "other.pt", saved | {"record": saved["record"] | {"run": "another"}})
    run(reid, "--eval", tmp_path / "other.pt", "--find", "hat=no", "--gallery", index,
        error="is an index of another checkpoint's embeddings")


def test_the_strong_recipe_trains_both_stages_and_is_known_to_what_follows(market, tmp_path, run):
    strong = [*QUICK, "--recipe", "strong"]
    for flags in (["--without", "identity"], ["--without", "identity", "neck", "mirror"], ["--head", "conv"]):
        run(par, *strong, *flags)
        assert "test crops of 10 identities" in run(par, "--eval", tmp_path / "o.pt")[0]
        out, _ = run(par, "--eval", tmp_path / "o.pt", "--predict", market / "query")
        assert [row["hat"] in ATTRIBUTES["hat"] for row in csv.DictReader(out.splitlines())] == [True] * 20
    for name, *flags in (("r.pt", "--lr", "1e-12"), ("b.pt", "--recipe", "report"),
                         ("w.pt", "--without", "attributes", "neck", "muon", "mirror")):
        run(reid, *strong, "--init", tmp_path / "o.pt", "--out", tmp_path / name, *flags)
    stage_1, stage_2, plain, *runs = (torch_load(tmp_path / n) for n in ("o.pt", "r.pt", "b.pt", "r.last", "w.last"))
    assert reid.load(CPU, plain)[0].backbone.net[-1][0].conv1.stride == 1  # as in stage 1; scored as trained
    assert (tmp_path / "b.json").read_text().count(f'"mAP": {plain["record"]["epochs"][0]["mAP"]}') > 1
    moved = [k for k, v in stage_2["model"].items() if v.dim() > 1 and not torch.allclose(v, stage_1["model"][k])]
    assert not moved and stage_2["stage 1"] is None and stage_1["model"]["identify.weight"].std() > 0.0015  # from 0.001
    out, _ = run(reid, "--eval", tmp_path / "r.pt", "--rerank")
    rows, networks = {row[0]: row for row in table_of(out, ", test set, ")}, reid.load(CPU, stage_2)
    data = [common.load_market(market, part, (32, 32)) for part in ("query", "gallery")]
    q, g = (reid.embed(networks, part, part.person_ids >= 0) for part in data)
    distances = torch.cat([d for _, d in reid.rerank_chunks(q.features, g.features, 20, 6, 0.3)])
    expected = brute_force(distances, q.ids, q.cameras, g.ids, g.cameras, None, True)
    assert rows["re-ranked"][1:4] == [f"{100 * expected[k]:.2f}" for k in ("mAP", "mAP_trapezoid", "rank1")]
    assert out.count(re.search(r"at most \d+ of", out)[0]) == 2  # as tuned on validation
    assert out.count("re-ranked") == 3 and "hamming" in rows and rows["none"][1:] != rows["re-ranked"][1:]
    assert "predicted attributes differ" in run(reid, "--eval", tmp_path / "w.pt")[0]
    assert [([*map(len, last["moments"])], last["record"]["arguments"]["rungs"]) for last in runs] == [
        ([71, 22], reid.RUNGS), ([93], ["identity", "triplets", "stride", "erasing", "shift"])]


def test_training_on_all_identities_needs_no_split_and_keeps_the_last_epoch(market, tmp_path, run):
    root = shutil.copytree(market, tmp_path / "copy")
    [path.rename(path.with_name(path.name.replace(path.name[4:8], "_c3s"))) for path in crops_of(root)]
    run(reid, "--data", root, error="No validation identity is seen by two cameras")
    [path.unlink() for path in crops_of(root)[18:]]  # 3 identities are too few to split
    out, _ = run(reid, "--data", root, *QUICK, "--epochs=3", "--patience=1", "--recipe=strong", "--identities=all")
    saved = torch_load(tmp_path / "o.pt")
    assert len(saved["train_ids"]) == 3 and not len(saved["validation_ids"]) and saved["record"]["best epoch"] == 3
    assert "18 training and 0 validation" in out and "kept, whatever --patience" in out and "  validation" not in out
    out, _ = run(reid, "--data", root, "--eval", tmp_path / "o.pt")
    assert "validation" not in out and "test set" in out and "at most 12 of 12" in out
    out, _ = run(reid, "--eval", tmp_path / "o.pt", "--gallery", market / "query", "--search", crops_of(market)[0])
    assert all(row[2] == "-" for row in table_of(out)) and "was trained on all identities, which leaves no crops" in out


def test_comparison_starts_with_and_without_the_weights_of_stage_1(trained, tmp_path, run):
    out, _ = run(reid, "--init", trained.par, "--compare", *QUICK[:4], "--lr", "1e-12", "--negatives", "random")
    paths = trained.par, tmp_path / "o_without.pt", tmp_path / "o.pt"
    stage_1, without, transferred = (torch_load(path)["model"] for path in paths)
    for k in (k for k, v in transferred.items() if k.startswith("backbone") and v.dim() == 4):
        assert torch.allclose(transferred[k], stage_1[k]) and not torch.allclose(without[k], stage_1[k])
    finals = [record_of(path)["final"]["validation"] for path in paths[1:]]
    assert [row[2:] for row in table_of(out, "Table 1")] == [
        [f"{100 * final[protocol]['none']['mAP']:.2f}" for final in finals] for protocol in finals[0]]
    assert out.index("From weights") < out.index("From stage 1") and "no Hamming" in run(reid, "--eval", paths[1])[0]
    run(par, "--eval", paths[1], error="o_without.pt predicts no attributes: pass a checkpoint of par.py")


@pytest.mark.parametrize("k, device", [(1, "cpu"), (3, "mps")])
def test_a_step_of_the_loop_equals_a_plain_float32_step(k, device, market, tmp_path, monkeypatch):
    """`fit` against ten plain lines: same crops, same augmentation, AdamW on ordinary parameters; k crops an item."""
    monkeypatch.setattr(common, "layout", lambda _, own=common.layout(torch.device(device)): own)
    data = common.load_market(market, "train", (64, 32))
    data.images = torch.randint(0, 256, data.images.shape, dtype=torch.uint8, generator=seeded())
    torch.manual_seed(0)
    model = par.AttributeNet(dropout=0) if k == 1 else reid.EmbeddingNet()
    plain, begun = copy.deepcopy(model).train(), copy.deepcopy(model)
    items = torch.stack([torch.randperm(43, generator=seeded(i)) for i in range(k)], 1)
    triplets = (lambda outputs, rows: reid.triplet_loss(*outputs, 5.0)) if k == 3 else None
    record = short_fit(model, data, items, tmp_path / "x.pt", criterion=triplets, lr=1e-4)
    affine = common.random_warp(43 * k, (64, 32), seeded())[:, :, :3].view(43, k, 2, 3)
    optimizer, losses = torch.optim.AdamW(plain.parameters()), []
    for step in range(5):  # the last 3 items fill no batch
        rows, turned = (torch.cat([v[8 * step:8 * step + 8, i] for i in range(k)]) for v in (items, affine))
        optimizer.param_groups[0]["lr"] = common.learning_rate(step, 5, 1e-4, 0.5)
        x = data.images[rows].float()
        z = plain(F.grid_sample(x, F.affine_grid(turned, x.shape, align_corners=False), align_corners=False))
        loss = F.relu((z[:8] - z[8:16]).square().sum(1) - (z[:8] - z[16:]).square().sum(1) + 5).mean() if k == 3 else \
            sum(F.cross_entropy(part, data.labels[rows, a]) for a, part in enumerate(z.split(SIZES, 1)))
        optimizer.zero_grad(), loss.backward(), optimizer.step(), losses.append(loss.item())
    assert record["epochs"][0]["loss"] == pytest.approx(sum(losses) / 5, rel=1e-4)
    assert model.backbone.net[0].weight.is_contiguous() == (device == "mps")
    for (name, a), b, before in zip(model.named_parameters(), plain.parameters(), begun.parameters()):
        assert name == "embed.1.bias" or (a - b).norm() < 0.1 * (b - before).norm(), name  # its slope is rounding


def test_training_stops_early_and_keeps_the_best_epoch(market, tmp_path, capsys):
    figures, weights, model = iter([0.3, 0.5, 0.4, 0.4, 0.9]), [], par.AttributeNet()
    record = short_fit(model, common.load_market(market, "train", (32, 32)), torch.arange(16)[:, None],
                       tmp_path / "x.pt", lambda: weights.append(model.heads[0][1].weight.detach().clone())
                       or {"f1": next(figures)}, epochs=5, patience=2)
    assert len(record["epochs"]) == 4 and record["best epoch"] == 2 and "Stopped early" in capsys.readouterr().out
    for kept in (model.heads[0][1].weight, torch_load(tmp_path / "x.pt")["model"]["heads.0.1.weight"]):
        assert torch.equal(kept, weights[1]) and not torch.equal(kept, weights[2])


def check_same_run(first, second):  # the same weights, moments, figures and state of the generator, to the bit
    for end in (".pt", ".last"):
        ours, theirs = (torch_load(path.with_suffix(end)) for path in (first, second))
        assert all(torch.equal(v, theirs["model"][k]) for k, v in ours["model"].items())
    assert torch.equal(ours["generator"], theirs["generator"])
    for mine, others in zip(ours["moments"], theirs["moments"], strict=True):
        assert all(torch.equal(v, others[k][m]) for k in mine for m, v in mine[k].items())
    figures = [[{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in (
        *record_of(path)["epochs"], record_of(path)["final"])] for path in (first, second)]
    assert figures[0] == figures[1]


@pytest.mark.parametrize("module, owner, name, at", [(par, par, "attribute_loss", 6), (reid, reid, "triplet_loss", 6),
                                                     *((par, common, "write_whole", at) for at in (4, 5, 6, 7, 8, 9))])
def test_a_stopped_run_resumes_to_the_same_bits(module, owner, name, at, market, trained, tmp_path, monkeypatch, run):
    """Stopped by Ctrl-C in epoch 2, or between the three files that each epoch writes."""
    script, arguments, out = module.__name__, short_run(module, market, trained), tmp_path / "cut.pt"
    with monkeypatch.context() as patch:
        before_call(patch, owner, name, at)
        run(module, *arguments, out, code=130, error=f"{script}.py: stopped; the same command with --resume goes on")
    for flags, name in ((["--seed", 1], "seed"), (["--seed", 1, "--recipe", "strong"], "recipe")):
        run(module, *arguments, out, *flags, "--resume", error=f"cut.last is of a run with another {name}: resume with")
    monkeypatch.chdir(market)
    relative = [os.path.relpath(a) if isinstance(a, Path) else a for a in (*arguments, out)]  # the same, spelled anew
    assert "Going on after epoch " in run(module, *relative, "--resume")[0]
    assert "epoch  3/3" not in run(module, *arguments, out, "--resume")[0]  # it has ended
    check_same_run(getattr(trained, script), out)


def test_two_processes_train_as_one_does(market, tmp_path, monkeypatch, run):
    """Without batch norm, whose statistics are of a process's own crops, to the same weights; both stages."""
    monkeypatch.setenv("NO_NORM", "yes")
    few, one, two = ["--data", market, *QUICK, "--epochs", 2], tmp_path / "1", tmp_path / "2"
    commands = [[[par, *few, "--dropout", 0, "--out", folder / "par.pt"],
                 [reid, *few, "--init", folder / "par.pt", "--out", folder / "reid.pt"]] for folder in (one, two)]
    for command in commands[0]:
        run(*command)
    out, err = start(*commands[1], torchrun=True).communicate(timeout=100)
    assert " 2 x 1 threads " in out and out.count("epoch  2/2") == 2, err
    for name in ("par.pt", "reid.pt"):
        ours, theirs = (torch_load(folder / name)["model"] for folder in (one, two))
        assert all((v - theirs[k]).abs().max() < 1e-6 for k, v in ours.items() if k != "embed.1.bias")  # rounding alone
        for row, other in zip(*(record_of(folder / name)["epochs"] for folder in (one, two)), strict=True):
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-5) and row["lr"] == other["lr"]


def together(count, *command):  # start it as one process, or as more that meet, as torchrun would start them
    with socket.create_server(("127.0.0.1", 0)) as free:
        there = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    return [start(command, **(there | {"RANK": str(rank)} if count > 1 else {})) for rank in range(count)]


@pytest.mark.parametrize("module, count", [(par, 1), (reid, 2), (reid, 1), (par, 2)][:2 if KILLS == 1 else 4])
def test_a_killed_run_resumes_to_the_same_bits(module, count, market, trained, tmp_path, run):
    command = [module, "--recipe", ("report", "strong")[count - 1], *short_run(module, market, trained)]
    whole = tmp_path / "whole.pt" if count > 1 else getattr(trained, module.__name__)
    seconds, random = record_of(getattr(trained, module.__name__))["seconds"], np.random.RandomState(count)
    others = together(count, *command, whole) if count > 1 else []
    for k in range(KILLS):
        cut = together(count, *command, out := tmp_path / str(k) / "cut.pt")
        while ("validation crops", "epoch  1/3")[count - 1] not in cut[0].stdout.readline():
            assert cut[0].poll() is None, cut[0].stderr.read()
        time.sleep(random.uniform(0, 2.4 * (seconds["training"] + seconds["validation"])))  # it writes files too
        [process.kill() for process in cut[-1 - k % 2:]] and cut[0].wait(60)  # the last one's end ends the first
        if count == 1:
            run(*command, out, "--resume")
        others += together(count, *command, out, "--resume") if count > 1 else []
        assert not any(process.wait(60) for process in others), [process.stderr.read() for process in others]
        check_same_run(whole, out)
        again, _ = run(*command, out, "--resume")  # it has ended: only its last figures are made anew
        assert ("but not to the same bits as 2 processes." in again) == (count > 1)


def test_a_process_that_fails_ends_all_with_one_sentence(market):
    cases = (("--data", "nowhere", "--data nowhere is not a folder"), ("--out", "FAILS.pt", "One cannot go on"),
             ("--batch", "7", "--batch 7 cannot be shared by 2 processes: give a multiple of 2, two or more for each"))
    for process, end in [(start([par, "--data", market, *QUICK, *own], torchrun=True), end) for *own, end in cases]:
        _, err = process.communicate(timeout=60)
        assert f"par.py: {end}." in err and 'common.py", line' not in err


def test_runs_of_one_name_do_not_mix_and_no_two_names_share_a_file(market, tmp_path, monkeypatch, run):
    arguments, ends = ["--data", market, *QUICK, "--epochs", 2, "--out", tmp_path / "a.pt", "--seed"], []
    run(par, *arguments, 0)
    with monkeypatch.context() as patch:  # in the second epoch of the next run, another one begins and ends
        before_call(patch, par, "attribute_loss", 6, lambda: ends.append(call(par, *arguments, 2)))
        run(par, *arguments, 1, error="a.json is another run's by now, so this one ends: give each run an --out of")
    before, (out, _) = files_of(tmp_path), run(par, *QUICK, "--seed", 3, "--out", tmp_path / "a_best.pt", "--resume")
    assert f"There is no {tmp_path / 'a_best.last'} to resume: starting." in out and "earlier" not in out
    assert ends == [0] and before.items() < files_of(tmp_path).items() and len(before) == 5
    for seed, name in enumerate(("a.old.pt", "a.pt", "a_best.pt"), 1):
        record, saved = record_of(tmp_path / name), torch_load(tmp_path / name)["record"]
        assert record["arguments"]["seed"] == saved["arguments"]["seed"] == seed and record["run"] == saved["run"]
        assert ("final" in record) == (seed != 1)


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path, seen, new = tmp_path / "x.pt", [], f".x.pt.{os.getpid()}.tmp"
    path.write_text("good")
    monkeypatch.setattr(os, "fsync", lambda _: seen.append({p.name for p in tmp_path.iterdir()}))
    for error, match in ((KeyboardInterrupt, None), (OSError(28, "No space left"), "x.pt cannot be written .No space")):
        monkeypatch.setattr(os, "replace", Mock(side_effect=error))
        with pytest.raises((KeyboardInterrupt, UserError), match=match):
            common.write_whole(path, lambda file: file.write(b"worse"))
    assert seen == 2 * [{"x.pt", new}] and path.read_text() == "good" and os.listdir(tmp_path) == ["x.pt"]


def test_only_the_same_data_and_stage_1_and_the_runs_own_files_are_resumed(market, trained, tmp_path, run):
    root, stage_1, out = shutil.copytree(market, tmp_path / "copy"), torch_load(trained.par), tmp_path / "a.pt"
    common.save_checkpoint(out, stage_1 | {"record": stage_1["record"] | {"run": "another"}})
    run(reid, *short_run(reid, market, trained), trained.reid, "--resume", "--init", out, "--hamming", 3,
        "--prior", 0.2, "--threshold", 1, error="run with another stage 1: resume with that, or start without --resume")
    crops_of(root)[0].rename(crops_of(root)[0].with_stem("0001_c1_renamed"))
    run(par, *short_run(par, root, trained), trained.par, "--resume", error="is of a run with another data set")
    (last := torch_load(trained.par.with_suffix(".last")))["record"]["arguments"]["device"] = "mps"
    common.save_checkpoint(out.with_suffix(".last"), last)
    run(par, *short_run(par, market, trained), out, "--resume", error="is of a run with another device")
    shutil.copy(trained.par.with_suffix(".last"), out.with_suffix(".last"))
    run(par, *short_run(par, market, trained), out, "--resume", error="is not the best checkpoint of the run that")


def test_as_a_user_runs_it_and_one_seed_gives_the_same_bits(market, tmp_path, monkeypatch, as_users_have_it):
    shutil.copytree(market, tmp_path / "Market-1501-demo")
    monkeypatch.chdir(tmp_path)
    pipe, terminal = subprocess.PIPE, getattr(os, "openpty", lambda: 2 * [subprocess.PIPE])()[1]  # of unknown width
    for module, err, *flags in ([par, pipe], [reid, terminal, "--init", "par_best.pt"]):
        name, flags = module.__name__, [*QUICK, *flags]
        process = subprocess.Popen([sys.executable, HERE / f"{name}.py", *flags], stdout=pipe, stderr=err, text=True)
        assert call(module, *flags, "--out", f"{name}.pt") == 0
        out, said = process.communicate()
        assert process.returncode == 0 and out.startswith("DEMO SET") and "\r" not in out + (said or "")
        check_same_run(Path(f"{name}_best.pt"), Path(f"{name}.pt"))


@pytest.mark.parametrize("meanwhile, ends, people", [("-", [0, 0], 4), ("another", [0, 0], 5), ("Ctrl-C", [130], 0)])
def test_without_data_the_demo_set_is_drawn_once_and_whole(meanwhile, ends, people, tmp_path, monkeypatch, capsys):
    draw, asked = common.draw_market, []

    def drawn(root, *arguments, **named):
        asked.append((*arguments, named))
        draw(root, 4, 2)
        if meanwhile == "another":  # another run draws it too, and is ready first
            draw(tmp_path / "Market-1501-demo", 5, 2)
        elif meanwhile == "Ctrl-C":
            raise KeyboardInterrupt
    monkeypatch.chdir(tmp_path), monkeypatch.setattr(common, "draw_market", drawn)
    assert [call(par, "--stats") for _ in ends] == ends and asked == [(100, 6, {"seed": 0})]
    assert {p.name for p in tmp_path.iterdir()} == ({"Market-1501-demo", "par_stats.png"} if people else set())
    out = capsys.readouterr().out
    assert out.startswith("Drawing the demo set") and out.count(f" {people} identities\n") == (2 if people else 0)


@pytest.mark.parametrize("device, recipe", [*itertools.product(("cuda", "mps"), ("report", "strong"))])
def test_both_stages_on_an_accelerator(device, recipe, tmp_path, monkeypatch, run, as_users_have_it):
    if not (torch.cuda.is_available() if device == "cuda" else torch.backends.mps.is_available()):
        pytest.skip(f"needs a {device} device")

    def losses():
        run(par, *QUICK[:4], "--epochs", 3, "--device", device, "--recipe", recipe)
        return [row["loss"] for row in record_of(tmp_path / "o.pt")["epochs"]]
    first = losses()
    run(reid, "--epochs=1", "--batch=2", "--device", device, "--recipe", recipe, "--init", tmp_path / "o.pt", "--out",
        tmp_path / "r.pt")
    tables = [table_of(run(reid, "--device", name, "--eval", tmp_path / "r.pt", "--rerank")[0], "test set")
              for name in (device, "cpu")]
    assert all(float(here[1]) == pytest.approx(float(there[1]), abs=3) for here, there in zip(*tables))
    # Again with the crops on the host; cuDNN's sums differ from run to run.
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    assert losses() == pytest.approx(first, rel=0.02)


# --------------------------------------------------------------------------------------------------------- the errors

@pytest.mark.parametrize("error, code, sentence", [
    (UserError("two\nlines."), 2, "two lines."), (OSError("odd"), 2, "A file cannot be read or written (odd)."),
    (PermissionError(13, "Permission denied", "here"), 2, "here cannot be read or written (Permission denied)."),
    (RuntimeError("CUDA out of memory."), 2, "the memory is full: lower --batch or --size, or pass another --device."),
    (RuntimeError("a bug"), None, None), (BrokenPipeError(), 141, None)], ids=repr)
def test_errors_become_sentences_but_for_the_programs_own(error, code, sentence, tmp_path, capsys, monkeypatch):
    script = SimpleNamespace(__name__="par", main=Mock(side_effect=error), parser=par.parser)
    monkeypatch.setattr(sys, "stdout", open(tmp_path / "out", "w"))
    with pytest.raises(RuntimeError) if code is None else monkeypatch.context():
        assert call(script) == code
    assert capsys.readouterr().err == (f"par.py: {sentence}\n" if sentence else "")


TABLE = csv_text(ROWS)
BROKEN_DATA = [  # what the annotations hold, the first crop's name, or what was done
    (TABLE.replace("hat", "cap"), "does not have one column 'hat'"),
    (TABLE.replace("bag", "age", 1), "does not have one column 'age'"),  # but two
    (TABLE.replace("\n1,", "\n1,1,"), "cannot be read as annotations (ValueError"),
    (csv_text([*ROWS, ROWS[1]]), "names an identity twice"),
    (TABLE, "lack identity 0003, which has crops in bounding_box_train"),
    (csv_text([ROWS[0], ROWS[1] | {"age": 5}]), "'age' of identity 2 is 5, not one of 1 to 4"),
    (csv_text([ROWS[0], ROWS[1] | {"upred": ""}]), "'upred' of identity 2 is nan, not one of 1 to 2"),
    (lambda root: crops_of(root)[0].write_bytes(b""), "is not a readable image"),
    (Path("-1_c1s1_000025_01.jpg"), "shows no identity (0 or -1): move it away"),
    (Path("notes.txt"), "notes.txt is not named like a crop of Market-1501"),
    (lambda root: (root / "annotations_train.csv").unlink(), "mat. Put one there; reid.py needs none, but"),
    (lambda root: (root / "bounding_box_train").rename(root / "elsewhere"), "There are no crops in"),
    (lambda root: [path.unlink() for path in crops_of(root)[18:]], "3 identities are too few to split"),
    (lambda root: root.rename(root.with_name("gone")), "is not a folder")]


@pytest.mark.parametrize("damage, sentence", BROKEN_DATA, ids=[sentence for _, sentence in BROKEN_DATA])
def test_broken_data_is_named_in_a_sentence(damage, sentence, market, tmp_path, run):
    root = shutil.copytree(market, tmp_path / "copy")
    if isinstance(damage, str):
        (root / "annotations_train.csv").write_text(damage)
    else:
        damage(root) if callable(damage) else crops_of(root)[0].rename(root / "bounding_box_train" / damage)
    before = files_of(tmp_path)
    run(par, "--data", root, *QUICK, error=sentence)
    assert files_of(tmp_path) == before


ABSENT = "cuda" if torch.backends.mps.is_available() else "mps"  # no machine has both
# A command: what is said of it. T: the folder of `trained`; N: another, with files that are no checkpoints.
BROKEN_ARGUMENTS = f"""
par --device {ABSENT}: finds no {ABSENT} device here: pass --device
reid --eval T/reid.pt --prior 0: argument --prior: 0 is not a number from 1e-12 to 0.999999
par --lr=-1e-3: -1e-3 is not a number from 1e-12
par --size 0x64: 0x64 is not HEIGHTxWIDTH, each from 32 to 1024
reid --threshold far: argument --threshold: invalid
reid --init T/par.pt --eval T/reid.pt: not allowed with argument --init
par --predict N: --predict PATH... needs --eval FILE, and --sheet and --maps go with --predict
par --eval T/par.pt --predict N: No image could be read from
reid --compare: it needs --init FILE, a checkpoint of par.py
reid --init T/par.pt --compare --identities all: and not --identities all, which leaves none
reid --recipe strong --without nick: invalid choice: 'nick' (choose from
reid --recipe strong --without identity triplets attributes: Nothing to learn: give two identities or more; leave in
par --without neck: --without leaves steps out of training by --recipe strong: pass that too, and no --eval
reid --embed N/x.npz: --embed needs --eval FILE
reid --eval T/reid.pt --search N: goes with --gallery FOLDER, the images to search, and --gallery with one of these or
reid --eval T/reid.pt --gallery N --find a=b: name one of these attributes: age, gender, hair
reid --eval T/reid.pt --gallery N --find gender=male hat=no hat=yes: --find hat=no: name one class of hat: no, yes
reid --eval N/without.pt --gallery N --find hat=no: without.pt predicts no attributes to find by
reid --eval T/reid.pt --gallery N --embed N/cut.npz: is not a readable index (BadZipFile): write one by --embed NEW
reid --eval T/reid.pt --gallery N --embed N/x.npz: No image could be read from
reid --eval T/reid.pt --embed T/reid.pt: give one that ends in .npz
par --stats --out N/text/x.pt: par_stats.png cannot be written
par --stats --out N/results: results is no name for a checkpoint: give one that ends in .pt
par --out N/folder.pt: folder.pt is no name for the file to write: give one that ends in .pt
reid --init T/par.pt --out T/par.pt: would replace the checkpoint of --init
reid --init T/par.pt --size 128x64: was trained with another --size than 128x64
reid --init T/par.pt --data T/lonely: par.pt was trained on other identities than this data set's: pass its --data
reid --data T/lonely --identities all: No triplet can be formed
reid --data T/lonely --identities all --recipe strong: Nothing to learn: give two identities or more
par --eval T/par.pt --data T/lonely: par.pt was trained on other identities than this data set's: pass its --data
reid --init T/reid.pt: is a checkpoint of reid.py; one of par.py is needed here
par --eval N/none.pt: none.pt does not exist
reid --eval T/reid.pt --recipe strong --without mirror: pass that too, and no --eval
par --eval N/older: older is not a checkpoint of this version of the project
par --eval N/swapped: swapped is not a checkpoint of this version of the project
par --eval N/code: code is not a readable checkpoint (UnpicklingError)
par --weights T/par.pt: is not a state dict of torchvision's ResNet18
"""


@pytest.mark.parametrize("case", BROKEN_ARGUMENTS.strip().splitlines())
def test_broken_arguments_are_named_in_a_sentence(case, trained, tmp_path, run):
    pairs, (command, sentence) = list(ATTRIBUTES.items()), case.split(": ", 1)
    for name, version, classes in (("older", 2, pairs), ("swapped", 3, pairs[1::-1] + pairs[2:])):  # age and gender
        torch.save({"version": version, "classes": classes, "kind": "par"}, tmp_path / name)
    for name, text in (("text", b""), ("code", code := b"\x80\x02cbuiltins\nprint\n."), ("cut.npz", b"PK\3\4" + code)):
        (tmp_path / name).write_bytes(text)
    common.save_checkpoint(tmp_path / "without.pt", torch_load(trained.reid) | {"stage 1": None})
    (tmp_path / "folder.pt").mkdir()
    folders = {"T": trained.folder, "N": tmp_path}
    script, *words = [folders[word[0]] / word[2:] if word[0] in folders else word for word in command.split()]
    run({"par": par, "reid": reid}[script], *words, error=sentence)


@pytest.mark.parametrize("kind", ["checkpoint", "csv", "mat", "jpeg"])
def test_mutated_files_end_in_a_sentence_or_in_work(kind, market, trained, tmp_path, capsys):
    root, random, ends = shutil.copytree(market, tmp_path / "copy"), np.random.RandomState(0), []
    command = ["--stats", "--data", root, "--out", tmp_path / "p.pt"]
    path = {"csv": root / "annotations_train.csv", "mat": root / "market_attribute.mat"}.get(kind, crops_of(root)[0])
    if kind == "checkpoint":
        command = ["--eval", path := shutil.copy(trained.par, tmp_path / "mutated.pt"), "--predict", crops_of(root)[0]]
    elif kind == "mat":
        (root / "annotations_train.csv").unlink()
        save_mat(path, {"train": [ROWS[1] | {"id": k} for k in range(1, 11)]})
    good = np.fromfile(path, np.uint8)
    for k in range(MUTATIONS // 4):
        # Anywhere, or near an end, where a zip file keeps its table of contents and a JPEG its header.
        places, bad = random.randint((len(good), min(len(good), 2000))[k % 2], size=random.randint(1, 9)), good.copy()
        bad[places * random.choice([-1, 1])] ^= random.randint(1, 256, len(places), np.uint8) * (k > 0)
        path.write_bytes(bad[:random.randint(len(bad)) if k % 4 == 3 else None].tobytes())
        code, said = call(par, *command), capsys.readouterr()  # another exception than `run` knows would fail here
        assert code == 0 or code == 2 and said.err.startswith("par.py: ")
        ends.append((code, said.out))
    assert {code for code, _ in ends} == {0, 2} and ends[0][0] == 0


@pytest.mark.parametrize("step, epoch", [(2, 1), (7, 2)])
def test_a_loss_that_becomes_nan_stops_and_keeps_the_last_good_checkpoint(step, epoch, tmp_path, monkeypatch, run):
    loss, calls = par.attribute_loss, itertools.count(1)
    monkeypatch.setattr(par, "attribute_loss", lambda *values: loss(*values) * (math.nan if next(calls) == step else 1))
    run(par, *QUICK, "--epochs", 3, error=f"The loss became nan in epoch {epoch}: try a lower --lr")
    assert len(list(tmp_path.iterdir())) == (0 if epoch == 1 else 3)
    assert epoch == 1 or all(v.isfinite().all() for v in torch_load(tmp_path / "o.pt")["model"].values())


def test_weights_that_cannot_be_had_and_processes_that_cannot_meet_are_told(tmp_path, monkeypatch, run):
    def ask(*_, **__):
        raise OSError(f"nobody answers within {socket.getdefaulttimeout()} seconds")
    monkeypatch.setattr(torch.hub, "urlopen", ask), monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    run(par, "--weights", "imagenet", error="within 20.0 seconds): pass --weights none to start from random weights")
    assert socket.getdefaulttimeout() is None
    (tmp_path / "o.last").touch()  # a run that resumes has its own
    assert common.backbone_weights(SimpleNamespace(weights="imagenet", resume=True, out=tmp_path / "o.pt")) is None
    monkeypatch.setenv("RANK", "0")
    run(par, "--stats", error="Several processes only train: run this command without torchrun.")
    run(par, *QUICK, error="start them by torchrun, no more on a machine than it has GPUs, or unset the variable RANK.")


if __name__ == "__main__":  # as `start` starts it
    common.infer.__defaults__, reid.chunk_rows, words = (None, 8 * 32 * 32), in_sevens, sys.argv[1:]
    if "FAILS.pt" in words and os.environ["RANK"] == "1":
        par.attribute_loss = Mock(side_effect=UserError("One cannot go on."))
    while words:
        sys.argv, words = [f"{words[0]}.py", *words[1:words.index("then")]], words[words.index("then") + 1:]
        script = {"par.py": par, "reid.py": reid}[sys.argv[0]]
        common.run(script.main, script.parser())
