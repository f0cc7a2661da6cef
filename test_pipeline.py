"""Every behaviour of par.py and reid.py: values against formulas written here, and the real commands on drawn people.

    pytest            needs neither network nor data
"""
import builtins
import contextlib
import csv
import io
import json
import math
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor
from torch.nn import functional as F

import common
import par
import reid

HERE = Path(__file__).parent
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding")  # torchvision 0.29's, said once a batch
CLASSES = [len(names) for names in common.ATTRIBUTES.values()]


def call(module, *arguments):
    """Run a script's main as the command line does: -> exit code. What it prints goes to capsys."""
    before, sys.argv = sys.argv, [f"{module.__name__}.py", *map(str, arguments)]
    try:
        common.run(module.main)
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = before
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return 0


@pytest.fixture(scope="session")
def market(tmp_path_factory):
    """A drawn data set: 10 identities of 6 crops to train with, as many to test with."""
    root = tmp_path_factory.mktemp("drawn")
    common.draw_market(root, 10, 6, seed=1)
    return root


@pytest.fixture(scope="session")
def trained(market, tmp_path_factory):
    """One short run of each stage: a folder with par_best.pt and reid_best.pt."""
    folder = tmp_path_factory.mktemp("trained")
    assert call(par, "--data", market, "--epochs", 2, "--batch", 8, "--out", folder / "par_best.pt") == 0
    assert call(reid, "--data", market, "--epochs", 2, "--batch", 8, "--clusters", 3, "--init", folder / "par_best.pt",
                "--out", folder / "reid_best.pt") == 0
    return folder


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    """oneDNN takes seconds to prepare bfloat16 kernels for each new shape: few of the short runs use them."""
    monkeypatch.setattr(common, "precision", lambda device: "float32")


@pytest.fixture(scope="session", params=[par, reid], ids=["par", "reid"])
def whole(request, market, tmp_path_factory):
    """A stage, the arguments of a short run, and the checkpoint of one that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "whole_best.pt"
    arguments = ["--data", market, "--epochs", 3, "--batch", 8, "--size", "64x32", "--device", "cpu", "--out"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "precision", lambda device: "float32")
        assert call(request.param, *arguments, out) == 0
    return request.param, arguments, out


def short_fit(model, data, rows, out, validate=lambda: {"f1": 1.0}, **settings):
    """`fit` on given rows with cross-entropy, an epoch in batches of 8 unless settings say otherwise: -> its record."""
    defaults = {"seed": 0, "lr": 1e-3, "warmup": 0.5, "epochs": 1, "batch": 8, "patience": 5, "resume": False}
    checkpoint = {"kind": "par", "args": {"size": (128, 64)}, "train_ids": rows[:1], "validation_ids": rows[:1]}
    record = {"epochs": [], "seconds": {}}
    common.fit(model, data.images, lambda generator: rows, lambda z, r: par.attribute_loss(z, data.labels[r], "ce"),
               validate, common.argparse.Namespace(out=out, **defaults | settings), checkpoint, record)
    return record


# --------------------------------------------------------------------------------------------------------- the data


def test_drawn_market_is_the_same_each_time_and_laid_out_like_market_1501(market, tmp_path):
    common.draw_market(tmp_path, 10, 6, seed=1)
    files = sorted(p.relative_to(market) for p in market.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    assert all((market / f).read_bytes() == (tmp_path / f).read_bytes() for f in files)

    train, query, gallery = (common.load_market(market, part) for part in ("train", "query", "gallery"))
    assert train.images.shape == (60, 3, 128, 64) and train.images.dtype == torch.uint8
    assert train.names == sorted(train.names) and len(train.person_ids.unique()) == 10
    assert {-1, 0} < set(gallery.person_ids.tolist())
    assert not set(train.person_ids.tolist()) & set(gallery.person_ids.tolist())
    for person, camera in zip(query.person_ids, query.camera_ids):  # each query can be found in another camera
        assert ((gallery.person_ids == person) & (gallery.camera_ids != camera)).any()
    for person in train.person_ids.unique():  # cameras and attributes of an identity
        assert len(train.camera_ids[train.person_ids == person].unique()) > 1
        assert len(train.labels[train.person_ids == person].unique(dim=0)) == 1
    assert (gallery.labels[gallery.person_ids < 1] == -1).all() and (gallery.labels[gallery.person_ids > 0] >= 0).all()


def annotation_rows(**changes):
    """Two identities in the annotation coding; `changes` sets columns of the second."""
    row = {"id": 1, "age": 2, "backpack": 1, "bag": 2, "handbag": 1, "clothes": 2, "down": 1, "up": 2, "hair": 1,
           "hat": 1, "gender": 2}
    for side in ("up", "down"):
        row |= {side + colour: 1 for colour in common.ATTRIBUTES[f"{side}color"][:-1]}
    return [row | {"upred": 2, "downbrown": 2}, row | {"id": 2} | changes]


def write_csv(path, rows, order=None, **format):
    with open(path, "w", newline="", encoding=format.pop("encoding", "utf-8")) as file:
        writer = csv.DictWriter(file, order or list(rows[0]), **format)
        writer.writeheader()
        writer.writerows(rows)


def expected_labels():
    """What `annotation_rows(downblack=2, hat=2)` says, spelled out by name."""
    first = dict(age="teenager", gender="female", hair="short", up="short", down="long", clothes="pants", hat="no",
                 backpack="no", bag="yes", handbag="no", upcolor="red", downcolor="brown")
    second = first | dict(hat="yes", upcolor="multi", downcolor="black")
    return torch.tensor([[common.ATTRIBUTES[a].index(who[a]) for a in common.ATTRIBUTES] for who in (first, second)])


@pytest.mark.parametrize("format", [{}, {"encoding": "utf-8-sig"}, {"delimiter": ";"}, {"blank": True}])
def test_csv_annotations_are_read_by_column_name(tmp_path, format):
    rows, path = annotation_rows(downblack=2, hat=2), tmp_path / "annotations_train.csv"
    rows[1]["id"] = {"encoding": "0002", "delimiter": "2.0"}.get(next(iter(format), ""), 2)
    write_csv(path, rows, order=sorted(rows[0]), **{k: v for k, v in format.items() if k != "blank"})
    if format == {"blank": True}:  # and what a spreadsheet leaves
        path.write_text("\r\n \r\n" + path.read_text() + "\r\n,,,,,\r\n")
    ids, labels = common.read_annotations(tmp_path, "train")
    assert ids.tolist() == [1, 2] and torch.equal(labels, expected_labels())
    assert len(common.read_annotations(tmp_path, "test")[0]) == 0


def test_mat_annotations_are_read_by_field_name_in_either_order(tmp_path):
    savemat = pytest.importorskip("scipy.io").savemat
    rows = annotation_rows(downblack=2, hat=2)
    columns = {k: np.array([r[k] for r in rows], np.uint8) for k in rows[0] if k != "id"}
    index = {"image_index": np.array(["0001", "0002"], object)}
    halves = {"train": columns | index, "test": dict(sorted(columns.items(), reverse=True)) | index}
    savemat(tmp_path / "market_attribute.mat", {"market_attribute": halves})
    for half in halves:
        ids, labels = common.read_annotations(tmp_path, half)
        assert ids.tolist() == [1, 2] and torch.equal(labels, expected_labels())


def test_odd_files_and_sizes_are_handled(tmp_path):
    folder = tmp_path / "bounding_box_train"
    folder.mkdir()
    Image.new("RGB", (64, 128), (200, 30, 30)).save(folder / "0002_c1s1_000451_03.jpg")
    Image.new("RGB", (30, 90), (200, 30, 30)).save(folder / "0010_c3s1_000451_03.jpg.jpg", "JPEG")
    Image.new("L", (64, 128), 90).save(folder / "-1_c6s1_000451_03.jpg")
    (folder / "Thumbs.db").write_bytes(b"x")
    (folder / ".DS_Store").write_bytes(b"x")
    data = common.load_market(tmp_path, "train", (96, 48))
    assert data.person_ids.tolist() == [-1, 2, 10] and data.camera_ids.tolist() == [6, 1, 3]
    assert data.images.shape == (3, 3, 96, 48) and (data.labels == -1).all()
    assert (data.images[1:].float().mean((0, 2, 3)) - torch.tensor([200.0, 30, 30])).abs().max() < 3
    assert (data.images[0].float() - 90).abs().max() < 3


def test_split_is_by_identity_and_seeded():
    ids = torch.randint(1, 101, (3000,), generator=torch.Generator().manual_seed(0))
    train, validation = common.split_identities(ids, 0.6, seed=3)
    assert torch.equal(train, ~validation)
    assert not set(ids[train].tolist()) & set(ids[validation].tolist())
    assert len(ids[train].unique()) == 60
    assert torch.equal(train, common.split_identities(ids, 0.6, seed=3)[0])
    assert not torch.equal(train, common.split_identities(ids, 0.6, seed=4)[0])


# ------------------------------------------------------------------------------------- augmentation, network, schedule


def test_flip_mirrors_pixels_exactly_and_half_of_the_time():
    crops = torch.randint(0, 256, (200, 3, 16, 8), dtype=torch.uint8)
    affine = common.random_affine(200, (16, 8), torch.Generator().manual_seed(0), degrees=0)
    out = common.augment(crops, affine)
    mirrored = (out - crops.flip(3)).abs().flatten(1).amax(1) < 1e-2
    same = (out - crops).abs().flatten(1).amax(1) < 1e-2
    assert (mirrored ^ same).all() and 70 < mirrored.sum() < 130


def test_rotation_moves_pixels_by_the_drawn_angle_and_leaves_black():
    generator = torch.Generator().manual_seed(5)
    affine = common.random_affine(50, (128, 64), generator)
    generator.manual_seed(5)
    angle = (torch.rand(50, generator=generator) * 2 - 1) * math.radians(10)
    flip = torch.where(torch.rand(50, generator=generator) < 0.5, -1.0, 1.0)
    crops = torch.zeros(50, 3, 128, 64, dtype=torch.uint8)
    crops[:, :, 30:33, 40:43] = 255  # a spot 32.5 above and 9.5 right of the centre
    out = common.augment(crops, affine)[:, 0]
    weight = out / out.sum((1, 2), keepdim=True)
    y = (weight * (torch.arange(128.0) - 63.5)[:, None]).sum((1, 2))
    x = (weight * (torch.arange(64.0) - 31.5)).sum((1, 2))
    # The output at p shows the input at M p, so the spot s lands at M^-1 s, in pixels and in a true rotation.
    sx, sy = flip * 9.5, torch.full((50,), -32.5)
    assert torch.allclose(x, angle.cos() * sx + angle.sin() * sy, atol=0.05)
    assert torch.allclose(y, -angle.sin() * sx + angle.cos() * sy, atol=0.05)
    white = common.augment(torch.full((50, 3, 128, 64), 255, dtype=torch.uint8), affine)
    turned = angle.abs() > math.radians(3)
    assert (white[turned][:, :, [0, 0, -1, -1], [0, -1, 0, -1]].amin(2) < 1).all() and (white[:, :, 64, 32] > 254).all()


def test_augmentation_does_not_lose_precision_in_training(market, tmp_path, monkeypatch):
    """bfloat16 coordinates would be wrong by a third of a pixel: the network must be given what `augment` says."""
    monkeypatch.setattr(common, "precision", lambda device: "bfloat16")
    given, data, model = [], common.load_market(market, "train"), par.AttributeNet()

    def look(x):
        given.append(x)
        return x.new_zeros(len(x), 512, requires_grad=True)
    monkeypatch.setattr(model.backbone, "forward", look)
    short_fit(model, data, torch.arange(8), tmp_path / "x.pt", seed=3)
    affine = common.random_affine(8, (128, 64), torch.Generator().manual_seed(3))
    assert torch.equal(given[0], common.augment(data.images[:8], affine))


def test_learning_rate_rises_then_falls_to_zero():
    rates = [common.learning_rate(step, 100, 3e-4, 0.1) for step in range(101)]
    assert rates[0] == pytest.approx(3e-5) and rates[9] == pytest.approx(3e-4) and max(rates) == pytest.approx(3e-4)
    assert rates[55] == pytest.approx(3e-4 * 45 / 90) and rates[100] == 0
    assert common.learning_rate(0, 10, 1.0, 0) == pytest.approx(1)


@pytest.mark.parametrize("stride", [1, 2])
def test_matrix_convolution_equals_convolution(stride):
    plain = torch.nn.Conv2d(6, 10, 3, stride, 1, bias=False).double()
    matrix = common.MatrixConv2d(6, 10, 3, stride, 1, bias=False).double()
    matrix.load_state_dict(plain.state_dict())
    for height, width in ((4, 2), (8, 4), (16, 8), (5, 3)):
        x = torch.randn(2, 6, height, width, dtype=torch.float64)
        assert torch.allclose(plain(x), matrix(x))


def test_backbone_normalises_and_loads_torchvisions_weights(tmp_path):
    reference = common.resnet18()
    torch.save(reference.state_dict(), tmp_path / "resnet18.pth")
    backbone = common.Backbone(common.backbone_weights(str(tmp_path / "resnet18.pth"))).eval()
    reference.fc = torch.nn.Identity()
    crops = torch.randint(0, 256, (4, 3, 128, 64), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (crops / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    assert torch.allclose(backbone(crops), reference.eval()(x), atol=1e-4)
    old = {k: v for k, v in torch.load(tmp_path / "resnet18.pth").items() if not k.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "old.pth")  # the published file is of that kind
    backbone = common.Backbone(common.backbone_weights(str(tmp_path / "old.pth"))).eval()
    assert torch.allclose(backbone(crops), reference(x), atol=1e-4)


# ------------------------------------------------------------------------------------------------ stage 1, by formulas


def some_logits_and_labels(images=7):
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(images, n, generator=generator, dtype=torch.float64) * 3 for n in CLASSES]
    labels = torch.stack([torch.randint(0, n, (images,), generator=generator) for n in CLASSES], 1)
    return logits, labels


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("kind", ["ce", "wce", "focal", "alpha"])
def test_losses_equal_the_reports_formulas(kind, gamma):
    logits, labels = some_logits_and_labels()
    labels[2] = -1  # an image without annotation takes no part
    weights = [torch.arange(1, n + 1, dtype=torch.float64) / n for n in CLASSES]
    expected = 0.0
    for k in range(12):
        terms = []
        for i in (0, 1, 3, 4, 5, 6):
            scores = logits[k][i].tolist()
            p = math.exp(scores[labels[i, k]]) / sum(map(math.exp, scores))
            term = -math.log(p)
            term *= (1 - p) ** gamma if kind in ("focal", "alpha") else 1
            term *= weights[k][labels[i, k]].item() if kind in ("wce", "alpha") else 1
            terms.append(term)
        expected += sum(terms) / len(terms)
    loss = par.attribute_loss(logits, labels, kind, weights, gamma)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_losses_stay_finite_for_sure_and_for_wrong_predictions():
    logits = [torch.full((2, n), -500.0).index_fill(1, torch.tensor([0]), 500.0).requires_grad_() for n in CLASSES]
    labels = torch.tensor([[0] * 12, [1] * 12])
    for gamma in (0.5, 2.0):
        loss = par.attribute_loss(logits, labels, "focal", None, gamma)
        loss.backward()
        assert loss.item() == pytest.approx(12 * 1000 / 2) and all(z.grad.isfinite().all() for z in logits)


def test_class_weights_are_inverse_frequencies_with_mean_one():
    labels = torch.zeros(8, 12, dtype=torch.int64)
    labels[:, 0] = torch.tensor([1, 1, 1, 1, 1, 2, 2, -1])  # "young" and "old" do not occur
    weights = par.class_weights(labels)
    assert weights[0].tolist() == pytest.approx([0, 7 / (2 * 5), 7 / (2 * 2), 0])
    assert (5 * weights[0][1] + 2 * weights[0][2]) / 7 == pytest.approx(1)
    assert weights[1].tolist() == [1, 0]


def test_score_equals_counting():
    generator = torch.Generator().manual_seed(0)
    truth = torch.stack([torch.randint(0, n, (50,), generator=generator) for n in CLASSES], 1)
    guess = torch.where(torch.rand(50, 12, generator=generator) < 0.5, truth, 0)
    truth[:, 0] = truth[:, 0].clamp(max=1)
    guess[:, 0] = guess[:, 0].clamp(max=2)  # class 3 occurs nowhere, class 2 in predictions alone
    guess[0, 0] = 2
    truth[:5, 1] = -1
    accuracy, f1 = par.score(guess, truth)
    for k, n in enumerate(CLASSES):
        pairs = [(t, g) for t, g in zip(truth[:, k].tolist(), guess[:, k].tolist()) if t >= 0]
        assert accuracy[k].item() == pytest.approx(sum(t == g for t, g in pairs) / len(pairs))
        scores = []
        for c in range(n):
            true, claimed = [g == c for t, g in pairs if t == c], [t == c for t, g in pairs if g == c]
            if true or claimed:
                precision, recall = (sum(x) / len(x) if x else 0 for x in (claimed, true))
                scores.append(2 * precision * recall / (precision + recall) if precision + recall else 0)
        assert f1[k].item() == pytest.approx(sum(scores) / len(scores))


# ------------------------------------------------------------------------------------------------ stage 2, by formulas


def test_triplet_loss_equals_the_reports_formula():
    a, p, n = torch.randn(3, 9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gaps = [sum((a[i] - p[i]) ** 2).item() - sum((a[i] - n[i]) ** 2).item() for i in range(9)]
    expected = sum(max(0.0, gap + 0.7) for gap in gaps) / 9
    assert reid.triplet_loss(a, p, n, 0.7).item() == pytest.approx(expected, rel=1e-12) and expected > 0


def test_clusters_group_crops_by_colour():
    generator = torch.Generator().manual_seed(0)
    colour = torch.randint(0, 4, (80,), generator=generator)
    palette = torch.tensor([[200, 20, 20], [20, 200, 20], [20, 20, 200], [200, 200, 200]])
    images = (palette[colour][:, :, None, None] + torch.randint(-15, 16, (80, 3, 32, 16), generator=generator)).byte()
    clusters = reid.cluster_histograms(images, 4, seed=0)
    assert clusters.dtype == torch.int64 and clusters.shape == (80,)
    assert all(len(clusters[colour == c].unique()) == 1 for c in range(4)) and len(clusters.unique()) == 4
    assert torch.equal(clusters, reid.cluster_histograms(images, 4, seed=0))
    assert reid.cluster_histograms(images[:3], 100).max() < 3
    assert (reid.cluster_histograms(images[:1].expand(9, -1, -1, -1), 4) == 0).all()


def test_every_triplet_is_valid_and_every_choice_is_possible():
    ids = torch.tensor([7, 7, 7, 3, 3, 9, 9, 9, 9, 5, 5])
    clusters = torch.tensor([0, 0, 1, 0, 1, 1, 2, 2, 2, 0, 2])
    generator, seen = torch.Generator().manual_seed(0), set()
    for _ in range(400):
        triplets = reid.sample_triplets(ids, clusters, generator)
        assert triplets.shape == (11, 3) and sorted(triplets[:, 0].tolist()) == list(range(11))
        seen |= set(map(tuple, triplets.tolist()))
    expected = set()
    for a in range(11):
        positives = [i for i in range(11) if ids[i] == ids[a] and i != a]
        near = [i for i in range(11) if ids[i] != ids[a] and clusters[i] == clusters[a]]
        expected |= {(a, p, n) for p in positives for n in near}
    assert seen == expected
    order = reid.sample_triplets(ids, clusters, generator)[:, 0]
    assert order.tolist() != list(range(11))


def test_triplets_fall_back_and_skip_what_has_no_positive():
    ids, clusters = torch.tensor([1, 1, 2, 3, 3]), torch.tensor([0, 0, 0, 1, 1])
    seen = {tuple(t) for _ in range(200) for t in reid.sample_triplets(ids, clusters).tolist()}
    assert {t[0] for t in seen} == {0, 1, 3, 4}  # identity 2 has a single crop
    assert {t[2] for t in seen if t[0] == 0} == {2}
    assert {t[2] for t in seen if t[0] == 3} == {0, 1, 2}  # cluster 1 holds one identity: any other will do
    for lonely in (torch.arange(5), torch.ones(5, dtype=torch.int64)):
        with pytest.raises(common.UserError, match="No triplet"):
            reid.sample_triplets(lonely, clusters)


def brute_force(distances, query_ids, query_cameras, gallery_ids, gallery_cameras, keep, cross_camera):
    """The ranking metrics as a loop over queries and ranks."""
    totals = []
    for q in range(len(distances)):
        ranking = sorted(range(distances.shape[1]), key=lambda g: (distances[q, g].item(), g))
        ranking = [g for g in ranking if gallery_ids[g] != -1 and not (
            cross_camera and gallery_ids[g] == query_ids[q] and gallery_cameras[g] == query_cameras[q])]
        matches = sum(gallery_ids[g] == query_ids[q] for g in ranking).item() if ranking else 0
        if not matches:
            continue
        returned = [g for g in ranking if keep is None or keep[q, g]]
        hits, rectangle, trapezoid, last, first = 0, 0.0, 0.0, 0, math.inf
        for rank, g in enumerate(returned, 1):
            if gallery_ids[g] == query_ids[q]:
                before = hits / (rank - 1) if rank > 1 else 1.0
                hits, last, first = hits + 1, rank, min(first, rank)
                rectangle += hits / rank / matches
                trapezoid += (before + hits / rank) / 2 / matches
        totals.append([rectangle, trapezoid, first <= 1, first <= 5, first <= 10,
                       matches / last if hits == matches else 0, len(returned),
                       hits / len(returned) if returned else 0, hits / matches])
    if not totals:
        return {"mAP": math.nan, "queries": 0}
    names = ["mAP", "mAP_trapezoid", "rank1", "rank5", "rank10", "mINP", "length", "precision", "recall"]
    return dict(zip(names, np.mean(totals, axis=0).tolist())) | {"queries": len(totals)}


@pytest.mark.parametrize("seed", range(8))
def test_rank_metrics_equal_brute_force(seed, monkeypatch):
    """Random rankings with junk, distractors, ties, queries without a match, empty lists; with both switches."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda low, high, n: torch.randint(low, high, (n,), generator=generator)
    queries, gallery = 25, (4, 40)[seed % 2]
    distances = torch.rand(queries, gallery, generator=generator, dtype=(torch.float32, torch.float64)[seed // 2 % 2])
    if seed % 4 > 1:
        distances = (distances * 6).round()  # nearly all tied
    sides = draw(1, 9, queries), draw(1, 4, queries), draw(-1, 7, gallery), draw(1, 4, gallery)
    monkeypatch.setattr(reid, "chunk_rows", lambda columns: 7)
    for cross_camera in (True, False):
        for keep in (None, torch.rand(queries, gallery, generator=generator) < 0.3):
            assert reid.rank_metrics(distances, *sides, keep, cross_camera) == pytest.approx(
                brute_force(distances, *sides, keep, cross_camera), abs=1e-9)


def test_rank_metrics_edge_cases():
    one = torch.tensor([1])
    result = reid.rank_metrics(torch.tensor([[0.5]]), one, one, one, one + 1)
    assert result["mAP"] == result["mAP_trapezoid"] == result["rank1"] == result["mINP"] == 1 and result["queries"] == 1
    nothing = reid.rank_metrics(torch.tensor([[0.5]]), one, one, one, one + 1, keep=torch.tensor([[False]]))
    assert nothing["mAP"] == nothing["rank10"] == nothing["precision"] == nothing["length"] == 0
    with pytest.raises(common.UserError, match="No query has a match"):
        reid.rank_metrics(torch.tensor([[0.5]]), one, one, one, one)  # its own camera only
    for kind in (torch.float16, torch.bfloat16, torch.int64):
        ranked = reid.rank_metrics(torch.tensor([[1, 3, 2]], dtype=kind), one, one, torch.tensor([5, 1, 1]),
                                   torch.tensor([2, 2, 2]), keep=torch.tensor([[1, 1, 0]], dtype=torch.uint8))
        assert ranked["mAP"] == 0.25 and ranked["mINP"] == 0
    with pytest.raises(common.UserError, match="NaN"):
        reid.rank_metrics(torch.tensor([[float("nan")]]), one, one, one, one + 1)
    minus = torch.tensor([[-torch.inf, 1.0]])  # of log-scores, say
    assert reid.rank_metrics(minus, one, one, torch.tensor([1, 5]), torch.tensor([2, 2]))["mAP"] == 1


def test_the_reports_protocol_ranks_all_others(monkeypatch):
    """Each crop against every other, its own camera too, itself not; across several chunks of queries."""
    generator = torch.Generator().manual_seed(0)
    ids, cameras = torch.randint(1, 10, (60,), generator=generator), torch.randint(1, 4, (60,), generator=generator)
    crops = reid.Crops(torch.randn(60, 8, generator=generator), ids, cameras, None)
    monkeypatch.setattr(reid, "chunk_rows", lambda columns: 7)
    for cross_camera in (False, True):
        scores = reid.score_selections(crops, crops, {"none": lambda distances, differ: None}, cross_camera)["none"]
        totals = []
        for q in range(60):  # one query at a time, taken out of its gallery
            others = torch.arange(60) != q
            distances = (crops.features[q] - crops.features[others]).norm(dim=1)[None]
            totals.append(brute_force(distances, ids[q:q + 1], cameras[q:q + 1], ids[others], cameras[others], None,
                                      cross_camera)["mAP"])
        totals = [t for t in totals if t == t]
        assert scores["mAP"] == pytest.approx(np.mean(totals), abs=1e-9) and scores["queries"] == len(totals)


def crops_of_people(count, spread):
    """Embeddings of nine people seen by three cameras: each person's centre and noise of `spread` around it."""
    generator = torch.Generator().manual_seed(0)
    ids, cameras = (torch.randint(1, high, (count,), generator=generator) for high in (10, 4))
    features = torch.randn(10, 8, generator=generator)[ids] + spread * torch.randn(count, 8, generator=generator)
    return reid.Crops(features, ids, cameras, None)


def test_a_threshold_never_raises_map_and_returns_what_it_says():
    crops = crops_of_people(60, spread=1.2)
    features, ids, cameras = crops.features, crops.ids, crops.cameras
    mean = reid.mean_distance(crops, crops)
    brute = (features[:, None] - features).norm(dim=2)
    off = ~torch.eye(60, dtype=torch.bool)
    assert mean == pytest.approx(brute[off].mean().item(), rel=1e-5)
    tries = {t: (lambda distances, differ, t=t: distances < t) for t in (0.1, 2.0, mean, 5.0, 99.0)}
    scores = reid.score_selections(crops, crops, tries | {"all": lambda distances, differ: None}, cross_camera=True)
    maps = [scores[t]["mAP"] for t in sorted(tries)]
    assert maps == sorted(maps) and maps[-1] == scores["all"]["mAP"] and maps[0] < maps[2]
    same = (ids[:, None] == ids) & (cameras[:, None] == cameras)  # each crop itself, and its own camera's
    assert scores[mean]["length"] == pytest.approx(((brute < mean) & ~same).sum().item() / 60)


def test_same_person_has_the_precision_and_recall_that_counting_gives():
    crops = crops_of_people(80, spread=0.5)
    features, ids, cameras = crops.features, crops.ids, crops.cameras
    curve = reid.distance_histograms(crops, crops)
    distances, same = (features[:, None] - features).norm(dim=2), ids[:, None] == ids
    match = same & (cameras[:, None] != cameras)
    assert curve["edges"][-1].item() == pytest.approx(distances.max().item(), rel=1e-5)
    precision, recall = reid.rates(curve)
    f1 = []
    for k, edge in enumerate(curve["edges"][1:]):
        near = distances < edge
        hits, wrong = (near & match).sum().item(), (near & ~same).sum().item()
        if k % 50 == 0 and hits + wrong:
            assert precision[k].item() == pytest.approx(hits / (hits + wrong), abs=0.005)  # a pair may lie on an edge
            assert recall[k].item() == pytest.approx(hits / match.sum().item(), abs=0.005)
        f1.append(2 * hits / (hits + wrong + match.sum().item()))
    assert f1[reid.same_person(curve)] == pytest.approx(max(f1), abs=0.005)
    held = reid.same_person(curve, 0.8)
    assert precision[held] >= 0.8 and (precision[held + 1:] < 0.8).all()
    # A prevalence of p is what is left when of the other pairs just enough are drawn, or counted more than once.
    rarer = {**curve, "others": 7 * curve["others"]}
    share = (curve["matches"].sum() / (curve["matches"].sum() + 7 * curve["others"].sum())).item()
    assert torch.allclose(reid.rates(curve, share)[0], reid.rates(rarer)[0])


def test_hamming_counts_attributes_that_differ_and_is_tuned_for_map():
    generator = torch.Generator().manual_seed(0)
    labels = torch.stack([torch.randint(0, n, (40,), generator=generator) for n in CLASSES], 1)
    agree = reid.one_hot(labels[:15]) @ reid.one_hot(labels).T
    assert torch.equal(agree.long(), (labels[:15, None] == labels).sum(2))
    ids, cameras = torch.arange(40) % 8, torch.arange(40) // 8
    known = labels[ids].clone()
    known[:, 0] = cameras % 4  # identities differ in one attribute between cameras, and from others in more
    crops = reid.Crops(torch.randn(40, 4, generator=generator), ids + 1, cameras, known)
    distances = torch.cdist(crops.features, crops.features)
    differ = (known[:, None] != known).sum(2)
    maps = [brute_force(distances, ids, cameras, ids, cameras, differ <= k, True)["mAP"] for k in range(13)]
    assert reid.tune_hamming(crops, crops) == int(np.argmax(maps)) == 1 and maps[1] > maps[12] + 0.1


# ------------------------------------------------------------------------------------------------------- the commands


def test_stage_1_trains_and_writes_checkpoint_record_and_curves(trained, market):
    record = json.loads((trained / "par_best.json").read_text())
    assert [row["epoch"] for row in record["epochs"]] == [1, 2] and record["arguments"]["loss"] == "wce"
    assert {"loss", "lr", "seconds", "images_per_second", "f1", "accuracy"} <= set(record["epochs"][0])
    assert record["data"]["drawn demo set"] and record["versions"]["torch"] == torch.__version__
    assert set(record["final"]["validation"]["f1"]) == {*common.ATTRIBUTES, "global"} and record["peak_memory_MB"]
    best = max(record["epochs"], key=lambda row: row["f1"])
    assert record["final"]["validation"]["f1"]["global"] == pytest.approx(best["f1"], abs=1e-4)
    assert Image.open(trained / "par_best.png").size == (2 * 2 * 560, 2 * 330)
    checkpoint = common.load_checkpoint(trained / "par_best.pt", "par")
    ids = set(common.load_market(market, "train").person_ids.tolist())
    assert set(checkpoint["train_ids"].tolist()) | set(checkpoint["validation_ids"].tolist()) == ids
    assert not [p for p in trained.iterdir() if p.suffix == ".tmp"]


def test_stage_1_scores_predicts_and_counts(trained, market, tmp_path, capsys):
    assert call(par, "--data", market, "--eval", trained / "par_best.pt") == 0
    out = capsys.readouterr().out
    assert "validation crops of 4 identities" in out and "60 test crops of 10 identities" in out and "Global" in out

    (tmp_path / "sub").mkdir()
    Image.new("RGBA", (50, 70), (255, 0, 0, 0)).save(tmp_path / "sub" / "transparent.png")
    Image.new("CMYK", (300, 500)).save(tmp_path / "cmyk.jpg")
    (tmp_path / "text.jpg").write_text("no image")
    assert call(par, "--eval", trained / "par_best.pt", "--predict", tmp_path) == 0
    out, err = capsys.readouterr()
    rows = list(csv.DictReader(out.splitlines()))
    assert [Path(r["file"]).name for r in rows] == ["cmyk.jpg", "transparent.png"] and "text.jpg" in err
    for row in rows:
        for a, names in common.ATTRIBUTES.items():
            assert row[a] in names and 1 / len(names) - 1e-3 <= float(row[f"{a}_probability"]) <= 1

    assert call(par, "--data", market, "--stats", "--out", tmp_path / "par_best.pt") == 0
    out = capsys.readouterr().out
    labels = common.load_market(market, "train").labels
    black = (labels[:, 10] == 0).sum().item()
    row = next(line for line in out.splitlines() if line.startswith("upcolor black"))
    assert row.split()[2:4] == [str(black), f"{100 * black / 60:.2f}"]
    assert Image.open(tmp_path / "par_stats.png").size == (2 * 2 * 500, 2 * 2 * 320)


def test_sheets_maps_and_confusions_of_stage_1(trained, market, tmp_path, capsys):
    out = tmp_path / "par_best.pt"
    (tmp_path / "empty").mkdir()
    assert call(par, "--eval", trained / "par_best.pt", "--predict", market / "query", tmp_path / "empty", "--sheet",
                "--maps", "--out", out) == 0
    shown, told = capsys.readouterr()
    count = len(list(csv.DictReader(shown.splitlines())))
    assert "empty holds no files" in told and count == len(list((market / "query").iterdir()))
    size = 4 * (128 + 8 + 170 + 16) + 8, math.ceil(count / 4) * (256 + 24) + 8
    assert Image.open(tmp_path / "par_sheet.png").size == size
    assert Image.open(tmp_path / "par_maps.png").size == (13 * 166 + 8, min(20, count) * (192 + 36 + 24) + 8)
    assert call(par, "--data", market, "--eval", trained / "par_best.pt", "--confusion", "--out", out) == 0
    assert Image.open(tmp_path / "par_confusion_test.png").size == (2 * 2 * 520, 6 * 2 * 320)


def test_activation_maps_add_up_to_the_logits(trained, market):
    model = common.load_weights(par.AttributeNet(), common.load_checkpoint(trained / "par_best.pt", "par")["model"], "")
    crops = common.load_market(market, "query").images[:5]
    maps, logits = par.activation_maps(model, crops, par.predict(model, crops)), common.infer(model, crops)
    assert maps.shape == (5, 12, 4, 2)
    for k, z in enumerate(logits):
        best, which = z.max(1)
        assert torch.allclose(maps[:, k].mean((1, 2)) + model.heads[k][1].bias[which], best, atol=1e-4)


def test_confusions_count_pairs_of_classes():
    generator = torch.Generator().manual_seed(0)
    truth, guess = (torch.stack([torch.randint(0, n, (50,), generator=generator) for n in CLASSES], 1)
                    for _ in range(2))
    truth[::9] = -1
    for k, counts in enumerate(par.confusions(guess, truth)):
        pairs = list(zip(truth[:, k].tolist(), guess[:, k].tolist()))
        assert counts.tolist() == [[pairs.count((t, g)) for g in range(CLASSES[k])] for t in range(CLASSES[k])]


def test_transparency_is_laid_on_white_and_photographs_turned_upright(tmp_path):
    Image.new("RGBA", (10, 20), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (common.read_image(tmp_path / "clear.png") == 255).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # a camera held on its side
    Image.new("RGB", (20, 10), "red").save(tmp_path / "side.jpg", exif=exif)
    assert common.read_image(tmp_path / "side.jpg").shape == (3, 20, 10)


def test_images_of_every_mode_are_read_alike(tmp_path):
    values = np.linspace(0, 255, 64 * 32).reshape(64, 32)
    images = {"gray.png": Image.fromarray(values.astype(np.uint8)),
              "16 bits.png": Image.fromarray((values * 257).astype(np.uint16)),
              "float.tif": Image.fromarray(values.astype(np.float32)),
              "palette.gif": Image.fromarray(values.astype(np.uint8)).convert("P"),
              "cmyk.jpg": Image.fromarray(values.astype(np.uint8)).convert("CMYK"),
              "l\u00e4ngs 'und' \"quer\".bmp": Image.fromarray(values.astype(np.uint8)).convert("RGB")}
    for name, image in images.items():
        if os.name != "nt" or '"' not in name:
            image.save(tmp_path / name)
            read = common.read_image(tmp_path / name)
            assert read.shape == (3, 64, 32) and np.abs(read.numpy() - values).max() <= 6, name


def test_what_cannot_be_read_is_named_once_and_the_rest_is_done(trained, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "mine"
    (folder / "sub").mkdir(parents=True)
    Image.new("RGB", (40, 90), "red").save(folder / "sub" / "fine.webp")
    Image.new("RGB", (4000, 3000), "blue").save(folder / "large.png")
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("no image")
    (folder / "cut.png").write_bytes((folder / "large.png").read_bytes()[:3000])
    readable = ["large.png", "fine.webp"]
    (folder / "closed").mkdir()
    scan = os.scandir

    def closed(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)
    monkeypatch.setattr(os, "scandir", closed)
    if os.name != "nt":
        (folder / "loop").symlink_to(folder, target_is_directory=True)
        (folder / "itself.jpg").symlink_to(folder / "itself.jpg")
        Image.new("RGB", (20, 40)).save(folder / "two\nlines \u00e4.png")
        readable.append("two\nlines \u00e4.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 12_000_001)
    Image.new("L", (4100, 3000)).save(folder / "bomb.png")
    (folder / ".hidden").mkdir()
    Image.new("RGB", (20, 40)).save(folder / ".hidden" / "x.png")
    (folder / "Thumbs.db").write_text("no image")
    assert call(par, "--eval", trained / "par_best.pt", "--predict", tmp_path / "nowhere", folder, "--sheet",
                "--out", tmp_path / "p.pt") == 0
    out, err = capsys.readouterr()
    assert [Path(row["file"]).name for row in csv.DictReader(io.StringIO(out))] == readable
    assert err.count("Skipped: ") == 6 and "nowhere does not exist" in err and "bomb.png is too large an image" in err
    assert f"Skipped: {folder / 'closed'} cannot be read (Permission denied)." in err
    assert f"4 of {4 + len(readable)} files were skipped." in err and f"{len(readable)} images, by " in err
    assert err.count("\n") == 6 + 4 and "Seconds: reading" in err
    assert call(par, "--eval", trained / "par_best.pt", "--predict", folder / "text.jpg") == 2
    assert "No image could be read from" in capsys.readouterr().err


def test_training_crops_are_turned_upright_and_none_is_enormous(tmp_path, monkeypatch):
    noise = Image.fromarray(np.random.RandomState(0).randint(0, 255, (600, 500, 3), np.uint8))
    exif = Image.Exif()
    exif[0x112] = 6  # turned by 90 degrees
    Image.linear_gradient("L").resize((128, 64)).convert("RGB").save(tmp_path / "turned.jpg", exif=exif)
    read = common.read_crops([tmp_path / "turned.jpg"] * 2, (128, 64))
    assert torch.equal(read[0], common.read_image(tmp_path / "turned.jpg")) and torch.equal(read[0], read[1])
    noise.save(tmp_path / "large.jpg", quality=95)
    assert common.read_crops([tmp_path / "large.jpg", tmp_path / "turned.jpg"], (128, 64)).shape == (2, 3, 128, 64)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    with pytest.raises(common.UserError, match="large.jpg is too large"):
        common.read_crops([tmp_path / "turned.jpg", tmp_path / "large.jpg"], (128, 64))


def test_the_four_losses_side_by_side(market, tmp_path, capsys):
    assert call(par, "--data", market, "--loss", "all", "--epochs", 1, "--batch", 8, "--size", "64x32",
                "--out", tmp_path / "par_best.pt") == 0
    out = capsys.readouterr().out
    table = out[out.index("Table 3"):].splitlines()
    assert all(name in table[1] for name in par.LOSSES.values())
    assert [row.split()[0] for row in table[2:15]] == [*map(str.capitalize, common.ATTRIBUTES), "Global"]
    for row in table[2:15]:
        figures = [float(v) for v in row.replace("*", "").split()[1:]]
        assert len(figures) == 5 and f"{max(figures[:4]):.2f} *" in row and not row.endswith("*")
    for kind in par.LOSSES:
        assert json.loads((tmp_path / f"par_best_{kind}.json").read_text())["arguments"]["loss"] == kind
        assert common.load_checkpoint(tmp_path / f"par_best_{kind}.pt", "par")["args"]["loss"] == kind


def test_stage_2_starts_from_stage_1_and_writes_everything(trained, market, tmp_path):
    stage_1, stage_2 = (common.load_checkpoint(trained / f"{kind}_best.pt", kind) for kind in ("par", "reid"))
    assert torch.equal(stage_1["train_ids"], stage_2["train_ids"])
    assert all(torch.equal(v, stage_2["attributes"][k]) for k, v in stage_1["model"].items())
    record = json.loads((trained / "reid_best.json").read_text())
    assert record["transfer"] and set(record["final"]["validation"]) == {"all cameras", "across cameras"}
    for scores in record["final"]["validation"].values():
        assert set(scores) == {"none", "threshold", "hamming", "both"}
        assert scores["threshold"]["mAP"] <= scores["none"]["mAP"]
        assert scores["both"]["length"] <= scores["hamming"]["length"]
    assert {p.name for p in trained.iterdir()} >= {"reid_best.png", "reid_best_distances.png"}


def test_stage_2_takes_its_first_weights_from_stage_1(trained, market, tmp_path, monkeypatch):
    kept = {}

    def stop(model, *rest):
        kept.update({k: v.clone() for k, v in model.backbone.state_dict().items()})
        raise common.UserError("enough")
    monkeypatch.setattr(common, "fit", stop)
    assert call(reid, "--data", market, "--init", trained / "par_best.pt", "--out", tmp_path / "r.pt") == 2
    stage_1 = common.load_checkpoint(trained / "par_best.pt", "par")["model"]
    assert kept and all(torch.equal(v, stage_1[f"backbone.{k}"]) for k, v in kept.items())


def test_stage_2_scores_and_exports_the_test_set(trained, market, tmp_path, capsys):
    assert call(reid, "--data", market, "--eval", trained / "reid_best.pt", "--hamming", 3, "--threshold", 1.5) == 0
    out = capsys.readouterr().out
    assert ", test set, " in out and "distance < 1.500" in out and "at most 3 of 12" in out
    assert f"weights {trained / 'reid_best.pt'}\n" in out  # and no seed: the checkpoint's need not be this command's
    assert call(reid, "--data", market, "--eval", trained / "reid_best.pt", "--embed", tmp_path / "f.npz") == 0
    assert "Seconds: loading" in capsys.readouterr().out
    arrays = np.load(tmp_path / "f.npz")
    for part in ("query", "gallery"):
        data = common.load_market(market, part)
        assert arrays[f"{part}_features"].shape == (len(data.names), 120)
        assert arrays[f"{part}_names"].tolist() == data.names
        assert np.array_equal(arrays[f"{part}_ids"], data.person_ids)
        assert np.array_equal(arrays[f"{part}_cameras"], data.camera_ids)
    q, g = torch.from_numpy(arrays["query_features"]), torch.from_numpy(arrays["gallery_features"])
    sides = [torch.from_numpy(arrays[k]) for k in ("query_ids", "query_cameras", "gallery_ids", "gallery_cameras")]
    expected = brute_force(torch.cdist(q, g), *sides, None, True)
    test = out[out.index(", test set, "):].splitlines()
    assert test[2].split()[:2] == ["none", f"{100 * expected['mAP']:.2f}"]


def test_search_finds_the_query_itself_first(trained, market, tmp_path, capsys):
    query = sorted((market / "query").iterdir())[3]
    folder = tmp_path / "gallery"
    folder.mkdir()
    for path in [*sorted((market / "bounding_box_test").iterdir())[:9], query]:
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "text.jpg").write_text("no image")
    assert call(reid, "--eval", trained / "reid_best.pt", "--search", query, "--gallery", folder, "--top", 3,
                "--out", tmp_path / "r.pt") == 0
    out, err = capsys.readouterr()
    rows = [line.split() for line in out.splitlines()[4:7]]
    assert [row[0] for row in rows] == ["1", "2", "3"] and rows[0][-1] == str(folder / query.name)
    assert float(rows[0][1]) < 0.1 * float(rows[1][1])
    assert rows[0][2:6] == ["yes", "12", "of", "12"] and float(rows[1][1]) <= float(rows[2][1]) and "text.jpg" in err
    assert Image.open(tmp_path / "search.png").width == 4 * 166 + 8


def colours_along(picture, x, y, width):
    """The colours of a row of pixels."""
    return {picture.getpixel((x + k, y)) for k in range(width)}


def test_search_says_what_agrees_and_whether_it_is_the_same_person(trained, market, tmp_path, capsys):
    folder, out = market / "query", tmp_path / "r.pt"
    arguments = ("--eval", trained / "reid_best.pt", "--search", folder, "--gallery", folder, "--top", 4, "--out", out)
    assert call(reid, *arguments) == 0
    shown = capsys.readouterr().out
    checkpoint = common.load_checkpoint(trained / "reid_best.pt", "reid")
    model, attribute_net = reid.load(SimpleNamespace(device="cpu", eval=""), checkpoint)
    crops = common.load_market(market, "query").images
    features, predicted = common.infer(model, crops), par.predict(attribute_net, crops)
    distances, alike = torch.cdist(features, features), (predicted[:, None] == predicted).sum(2)
    near, far, _ = reid.verdicts(SimpleNamespace(precision=None), checkpoint)
    rows = [line.split() for line in shown.splitlines() if line[:4].strip().isdigit()]
    assert len(rows) == 4 * len(crops) and "Seconds: reading" in shown
    for k, row in enumerate(rows):
        q, g = k // 4, sorted(folder.iterdir()).index(Path(row[-1]))
        assert float(row[1]) == pytest.approx(distances[q, g].item(), abs=0.002) and int(row[3]) == alike[q, g]
        assert g != q  # a query is not its own answer
        assert row[2] == ("yes" if float(row[1]) < near else "unsure" if float(row[1]) < far else "no")
    picture = Image.open(tmp_path / "search.png").convert("RGB")
    assert picture.width == 5 * (150 + 16) + 8
    assert ImageColor.getrgb(reid.VERDICTS[rows[1][2]]) in colours_along(picture, 8 + 2 * 166, 5, 128)

    call(reid, *arguments, "--precision", 0)
    verdicts = {line.split()[2] for line in capsys.readouterr().out.splitlines() if line[:4].strip().isdigit()}
    assert verdicts == {"yes"}  # each pair has a precision of 0 or more


def test_finding_by_words_ranks_by_the_product_of_probabilities(trained, market, tmp_path, capsys):
    folder = market / "query"
    assert call(reid, "--eval", trained / "reid_best.pt", "--find", "gender=female", "upcolor=red", "--gallery", folder,
                "--top", 12, "--out", tmp_path / "r.pt") == 0
    out = capsys.readouterr().out
    assert "Seconds: reading" in out
    rows = [line.split() for line in out.splitlines() if line[:4].strip().isdigit()]
    _, attribute_net = reid.load(SimpleNamespace(device="cpu", eval=""), common.load_checkpoint(
        trained / "reid_best.pt", "reid"))
    logits = common.infer(attribute_net, common.load_market(market, "query").images)
    female, red = (logits[k].double().softmax(1)[:, which] for k, which in ((1, 1), (10, 2)))
    brute = (female * red).tolist()
    assert [float(row[1]) for row in rows] == pytest.approx(sorted(brute, reverse=True)[:12], abs=6e-4)
    assert Image.open(tmp_path / "find.png").size == (5 * 166 + 8, 3 * (256 + 4 * 18 + 24) + 8)


def test_words_are_scored_as_brute_force_does():
    generator = torch.Generator().manual_seed(0)
    people = torch.stack([torch.randint(0, n, (6,), generator=generator) for n in CLASSES], 1)
    labels = people[torch.randint(0, 6, (40,), generator=generator)]
    log_p = torch.cat([torch.randn(40, n, generator=generator).log_softmax(1) for n in CLASSES], 1) \
        + 0.6 * reid.one_hot(labels)
    labels[::7] = -1  # distractors
    totals = []
    for asked in labels[labels[:, 0] >= 0].unique(dim=0):
        found = [sum(log_p[i, sum(CLASSES[:k]) + c].item() for k, c in enumerate(asked)) for i in range(40)]
        order = sorted(range(40), key=lambda i: -found[i])
        hits = [rank for rank, i in enumerate(order, 1) if torch.equal(labels[i], asked)]
        totals.append(np.mean([(k + 1) / rank for k, rank in enumerate(hits)]))
    scores = reid.score_words(log_p, labels)
    assert scores["mAP"] == pytest.approx(np.mean(totals), abs=1e-6) and scores["queries"] == len(totals)


def test_show_draws_queries_from_best_to_worst_with_matches_framed(trained, market, tmp_path, capsys):
    assert call(reid, "--data", market, "--eval", trained / "reid_best.pt", "--show", 3,
                "--out", tmp_path / "r.pt") == 0
    assert "Found by words" in capsys.readouterr().out
    picture = Image.open(tmp_path / "show.png").convert("RGB")
    rows = [8 + k * (256 + 18 * 2 + 24) for k in range(3)]
    assert picture.size == (11 * 166 + 8, rows[2] + 256 + 18 * 2 + 24)
    frames = [[colours_along(picture, 8 + k * 166, y - 3, 128) for k in range(11)] for y in rows]
    match, other = map(ImageColor.getrgb, (reid.MATCH, reid.OTHER))
    assert all(row[0] == {(255, 255, 255)} and all(cell in ({match}, {other}) for cell in row[1:]) for row in frames)
    assert frames[0][1] == {match}  # the best query's first hit


def test_comparison_with_and_without_transfer(trained, market, tmp_path, capsys):
    assert call(reid, "--data", market, "--init", trained / "par_best.pt", "--compare", "--epochs", 1,
                "--negatives", "random", "--batch", 8, "--out", tmp_path / "r.pt") == 0
    out = capsys.readouterr().out
    assert "Table 1" in out and "no Hamming filter" in out
    assert common.load_checkpoint(tmp_path / "r_without.pt", "reid")["attributes"] is None
    assert call(reid, "--data", market, "--eval", tmp_path / "r_without.pt") == 0


def test_one_seed_gives_the_same_weights_to_the_bit(market, tmp_path, monkeypatch):
    monkeypatch.undo()  # in the precision that users get
    for name in ("a", "b"):
        short = ["--data", market, "--epochs", 1, "--batch", 8, "--device", "cpu", "--out"]
        assert call(par, *short, tmp_path / f"{name}.pt") == 0
        assert call(reid, *short, tmp_path / f"{name}r.pt", "--init", tmp_path / f"{name}.pt") == 0
    for suffix, kind in (("", "par"), ("r", "reid")):
        first, second = (common.load_checkpoint(tmp_path / f"{name}{suffix}.pt", kind)["model"] for name in ("a", "b"))
        assert all(torch.equal(v, second[k]) for k, v in first.items())


def test_a_step_of_the_loop_equals_a_plain_float32_step(market, tmp_path):
    """`fit` against ten plain lines: same crops, same augmentation, AdamW on ordinary parameters."""
    data, models = common.load_market(market, "train"), []
    for _ in range(3):
        torch.manual_seed(0)
        models.append(par.AttributeNet(dropout=0))
    rows = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    record = short_fit(models[0], data, rows, tmp_path / "x.pt")
    affine = common.random_affine(40, (128, 64), torch.Generator().manual_seed(0))
    optimizer, losses = torch.optim.AdamW(models[1].parameters()), []
    models[1].train()
    for step in range(5):
        now = slice(8 * step, 8 * step + 8)
        optimizer.param_groups[0]["lr"] = common.learning_rate(step, 5, 1e-3, 0.5)
        x = data.images[rows[now]].float()
        x = F.grid_sample(x, F.affine_grid(affine[now], x.shape, align_corners=False), align_corners=False)
        loss = sum(F.cross_entropy(z, data.labels[rows[now], k]) for k, z in enumerate(models[1](x)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert record["epochs"][0]["loss"] == pytest.approx(sum(losses) / 5, rel=1e-4)
    for (name, a), b, start in zip(models[0].named_parameters(), models[1].parameters(), models[2].parameters()):
        assert (a - b).norm() < 0.1 * (b - start).norm(), name


def test_training_stops_early_and_keeps_the_best_epoch(market, tmp_path, capsys):
    figures = iter([0.3, 0.5, 0.4, 0.4, 0.9])
    data, weights, model = common.load_market(market, "train", (32, 32)), [], par.AttributeNet()

    def validate():
        weights.append(model.heads[0][1].weight.detach().clone())
        return {"f1": next(figures)}
    record = short_fit(model, data, torch.arange(16), tmp_path / "x.pt", validate, epochs=5, patience=2)
    assert len(record["epochs"]) == 4 and "Stopped early" in capsys.readouterr().out
    assert torch.equal(model.heads[0][1].weight, weights[1])
    assert common.load_checkpoint(tmp_path / "x.pt", "par")["epoch"] == 2


def test_ctrl_c_ends_a_run_after_its_step_and_resume_ends_it_with_the_same_weights(whole, market, tmp_path, capsys):
    (module, arguments, uncut), out = whole, tmp_path / "cut_best.pt"

    def interrupted(owner, name, at, *more, presses=1):
        """Run until Ctrl-C comes in the at-th call of `name`: -> how many steps were taken in all, what stderr says."""
        usual, steps, take_step, calls = getattr(owner, name), [], torch.optim.AdamW.step, []

        def called(*values, **named):
            calls.append(1)
            for _ in range(presses if len(calls) == at else 0):
                signal.raise_signal(signal.SIGINT)
            return usual(*values, **named)

        def stepped(*values, **named):
            steps.append(1)
            return take_step(*values, **named)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, called)
            patch.setattr(torch.optim.AdamW, "step", stepped)
            assert call(module, *arguments, out, *more) == 130
        return len(steps), capsys.readouterr().err

    steps_an_epoch = 36 // 8
    capsys.readouterr()
    script, loss = f"{module.__name__}.py", (module, "attribute_loss" if module is par else "triplet_loss")
    assert interrupted(*loss, 2) == (
        2, f"{script}: stopped in the first epoch of {out}; the same command with --resume begins that anew.\n")
    assert not list(tmp_path.glob("cut*"))
    if module is par:
        (tmp_path / "cut_last.pt").write_text("an earlier run's")
        assert f"begins that anew, once {tmp_path / 'cut_last.pt'} of an earlier run is" in interrupted(*loss, 2)[1]
        (tmp_path / "cut_last.pt").unlink()
    goes_on = f"{script}: stopped; the same command with --resume goes on after epoch 2 of {out}.\n"
    # While epoch 2 is written: it is kept. In epoch 3: the step is finished; at the second Ctrl-C it is not.
    assert interrupted(common, "write_record", 2, "--resume") == (2 * steps_an_epoch, goes_on)
    assert interrupted(*loss, 3, "--resume") == (3, goes_on)
    if module is par:
        assert interrupted(*loss, 3, "--resume", presses=2) == (2, goes_on)
    capsys.readouterr()
    assert call(module, *arguments, out, "--seed", 1, "--resume") == 2
    check_sentence(capsys, "is of a run with another --seed")
    assert call(module, *arguments, out, "--resume") == 0
    assert "Going on after epoch 2" in capsys.readouterr().out
    first, second = (common.load_checkpoint(path, module.__name__) for path in (uncut, out))
    assert first["epoch"] == second["epoch"]
    assert all(torch.equal(v, second["model"][k]) for k, v in first["model"].items())
    rows = [json.loads(path.with_suffix(".json").read_text())["epochs"] for path in (uncut, out)]
    for row in rows[0] + rows[1]:
        del row["seconds"], row["images_per_second"]
    assert rows[0] == rows[1] and len(rows[0]) == 3
    before = out.read_bytes()
    assert call(module, *arguments, out, "--resume") == 0  # it has ended: nothing is trained again
    assert "epoch  3/3" not in capsys.readouterr().out and out.read_bytes() == before
    with pytest.MonkeyPatch.context() as patch:  # when all is trained, and where nothing is
        patch.setattr(common, "curves", lambda *_: signal.raise_signal(signal.SIGINT))
        assert call(module, *arguments, out, "--resume") == 130
        assert "; the same command with --resume goes on after the last whole epoch." in capsys.readouterr().err
        patch.setattr(common, "load_market", lambda *_: signal.raise_signal(signal.SIGINT))
        assert call(module, "--data", market, "--eval", out) == 130
        assert capsys.readouterr().err == f"{script}: stopped.\n"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals to send")
def test_ctrl_c_while_pytorch_is_imported_leaves_no_traceback():
    """-X importtime says when: the scripts' first import is argparse."""
    with subprocess.Popen([sys.executable, "-X", "importtime", HERE / "reid.py", "--stop"], stderr=subprocess.PIPE,
                          text=True) as process:
        while "numpy" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert "Traceback" not in process.stderr.read() and process.wait() == -signal.SIGINT


def test_output_that_nobody_reads_ends_a_run_as_it_ends_any_program(tmp_path, monkeypatch, capsys):
    def main():
        raise BrokenPipeError
    with open(tmp_path / "out", "w") as out, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        assert call(SimpleNamespace(main=main, __name__="x")) == 141
        patch.setattr(sys, "stdout", None)  # closed from the start: python par.py --stats >&-
        assert call(SimpleNamespace(main=lambda: print("to nobody"), __name__="x")) == 0
    assert capsys.readouterr().err == ""


KILLS = int(os.environ.get("KILLS", "1"))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_killed_run_resumes_to_the_same_bits(whole, tmp_path):
    """SIGKILL at a random moment of a real run; the long form is KILLS=20 pytest -k killed."""
    module, arguments, uncut = whole
    record = json.loads(uncut.with_suffix(".json").read_text())
    lasts, random = record["seconds"]["training"] + record["seconds"]["validation"], np.random.RandomState(0)
    code = f"import common, {module.__name__}; common.precision = lambda device: 'float32'; " \
           f"common.run({module.__name__}.main)"
    for k in range(KILLS):
        out = tmp_path / str(k) / "cut_best.pt"
        with subprocess.Popen([sys.executable, "-uc", code, *map(str, arguments), str(out)], stdout=subprocess.PIPE,
                              text=True, env=os.environ | {"PYTHONPATH": str(HERE)}) as process:
            while "validation crops" not in process.stdout.readline():
                assert process.poll() is None
            time.sleep(random.uniform(0, 1.2 * lasts))
            process.kill()
        assert call(module, *arguments, out, "--resume") == 0
        first, second = (common.load_checkpoint(path, module.__name__) for path in (uncut, out))
        assert first["epoch"] == second["epoch"]
        assert all(torch.equal(v, second["model"][name]) for name, v in first["model"].items())
        ours = json.loads(out.with_suffix(".json").read_text())
        rows = [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")}
                for row in record["epochs"] + ours["epochs"]]
        assert rows[:3] == rows[3:] and record["final"] == ours["final"]
        first, second = (common.load_checkpoint(common.last_path(path), module.__name__)["optimizer"]["state"]
                         for path in (uncut, out))
        assert all(torch.equal(v, second[k][name]) for k in first for name, v in first[k].items())


def test_a_run_killed_between_its_two_checkpoints_goes_on(market, tmp_path, capsys):
    """The best checkpoint is newer than the state to resume: that is still one run. That of another run is not."""
    data, out = common.load_market(market, "train", (32, 32)), tmp_path / "x_best.pt"

    def run(figures, **settings):
        figures, model = iter(figures), par.AttributeNet()
        record = short_fit(model, data, torch.arange(16), out, lambda: {"f1": next(figures)}, epochs=4, **settings)
        return [row["f1"] for row in record["epochs"]]

    class Kill(BaseException):
        pass

    assert run([0.1, 0.2, 0.3, 0.4]) == [0.1, 0.2, 0.3, 0.4]
    saved, save = [], common.save_checkpoint

    def dies(path, checkpoint, before):
        if len(saved) == 3:
            raise Kill
        saved.append(path)
        save(path, checkpoint, before)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "save_checkpoint", lambda path, checkpoint, before=lambda: None:
                      dies(path, checkpoint, before))  # dies after last 1, best 1, last 2
        with pytest.raises(Kill):
            run([0.5, 0.6])
    assert common.load_checkpoint(out, "par")["epoch"] == 1
    assert run([0.1, 0.2], resume=True) == [0.5, 0.6, 0.1, 0.2]
    assert "Going on after epoch 2" in capsys.readouterr().out
    best = common.load_checkpoint(out, "par")
    assert best["epoch"] == 2 and "optimizer" not in best
    out.write_bytes((tmp_path / "x_best.old.pt").read_bytes())
    with pytest.raises(common.UserError, match="is not the best checkpoint of the run"):
        run([], resume=True)


def test_earlier_runs_are_set_aside_and_none_is_lost(market, tmp_path, capsys):
    arguments = ["--data", market, "--epochs", 1, "--batch", 8, "--size", "32x32", "--out", tmp_path / "p_best.pt"]
    kept = []
    for seed in range(3):
        assert call(par, *arguments, "--seed", seed) == 0
        kept.append([(tmp_path / f"p_best.{end}").read_bytes() for end in ("pt", "json")])
    assert "of an earlier run is now" in capsys.readouterr().out
    for old, name in zip(kept, ("p_best.old", "p_best.old2", "p_best")):
        assert old == [(tmp_path / f"{name}.{end}").read_bytes() for end in ("pt", "json")]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit on a file's size")
def test_a_full_disk_is_a_sentence_and_leaves_what_was_there(market, tmp_path, capsys):
    import resource
    arguments = ["--data", market, "--epochs", 1, "--batch", 8, "--size", "32x32", "--out", tmp_path / "p_best.pt"]
    assert call(par, *arguments) == 0
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    capsys.readouterr()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, limits[1]))
    try:
        assert call(par, *arguments) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    check_sentence(capsys, "p_last.pt cannot be written ([Errno 27] File too large)")
    assert before == {p: p.read_bytes() for p in tmp_path.iterdir()}


def test_ctrl_c_while_a_checkpoint_is_written_stays_ctrl_c(tmp_path):
    class Interrupted:
        def __init__(self, file):
            self.file, self.flush = file, file.flush

        def write(self, data):
            if self.file.tell():
                raise KeyboardInterrupt
            return self.file.write(data)
    (tmp_path / "x.pt").write_text("good")
    with pytest.raises(KeyboardInterrupt):
        common.write_whole(tmp_path / "x.pt", lambda file: torch.save({"x": torch.zeros(10**6)}, Interrupted(file)))
    assert [p.read_text() for p in tmp_path.iterdir()] == ["good"]


@pytest.mark.parametrize("part, value", [
    ("model", {}), ("optimizer", {}), ("generator", 3), ("rng", "x"), ("best", None), ("rows", None), ("spent", {}),
    ("epoch", 10**9), ("run", None), ("train_ids", torch.arange(3)), ("version", torch.zeros(2)), ("data", "another"),
    ("best", {"epoch": 1, "f1": math.nan, "accuracy": 1}), ("spent", {"training": "x", "validation": 1}),
    ("optimizer", {"state": {0: {"exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3), "step": torch.ones(())}}})])
def test_a_state_that_is_not_whole_is_refused(part, value, market, trained, tmp_path, capsys):
    for name in ("par_best.pt", "par_last.pt"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    last = common.load_checkpoint(tmp_path / "par_last.pt", "par") | {part: value}
    if part in ("run", "version"):
        torch.save(last, tmp_path / "par_last.pt")
        if part == "run":
            del last["run"]
            torch.save(last, tmp_path / "par_last.pt")
    else:
        common.save_checkpoint(tmp_path / "par_last.pt", last)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    assert call(par, "--data", market, "--epochs", 2, "--batch", 8, "--out", tmp_path / "par_best.pt", "--resume") == 2
    check_sentence(capsys, "par_last.pt")
    assert before == {p: p.read_bytes() for p in tmp_path.iterdir()}


def test_resuming_needs_neither_the_weights_it_began_with_nor_blames_the_state_for_full_memory(
        market, tmp_path, capsys, monkeypatch):
    torch.save(common.resnet18().state_dict(), tmp_path / "w.pth")
    arguments = ["--data", market, "--epochs", 2, "--batch", 8, "--size", "32x32", "--out", tmp_path / "p_best.pt",
                 "--weights", tmp_path / "w.pth"]
    for module in (par, reid):
        with monkeypatch.context() as patch:
            patch.setattr(common, "write_record", lambda *_: signal.raise_signal(signal.SIGINT))
            assert call(module, *arguments) == 130
        (tmp_path / "w.pth").rename(tmp_path / "away.pth")
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "load_state_dict", lambda *_: (_ for _ in ()).throw(
                RuntimeError("CUDA out of memory.")))
            assert call(module, *arguments, "--resume") == 2
            check_sentence(capsys, "the memory is full")
        assert call(module, *arguments, "--resume") == 0 and "Going on after epoch 1" in capsys.readouterr().out
        (tmp_path / "away.pth").rename(tmp_path / "w.pth")
        (tmp_path / "p_last.pt").unlink()


def test_data_that_changed_are_not_resumed_on(market, tmp_path, capsys):
    root = copy_of(market, tmp_path)
    arguments = ["--data", root, "--epochs", 1, "--batch", 8, "--size", "32x32", "--out", tmp_path / "p_best.pt"]
    assert call(par, *arguments) == 0
    a_crop(root).unlink()
    capsys.readouterr()
    assert call(par, *arguments, "--resume") == 2
    check_sentence(capsys, "p_last.pt is of a run with other data")


def test_a_checkpoint_and_its_record_are_set_aside_together_though_cut_off_between_them(tmp_path, monkeypatch):
    for end in ("pt", "json"):
        (tmp_path / f"x.{end}").write_text(end)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(builtins, "print", lambda *_: signal.raise_signal(signal.SIGINT))
        common.set_aside(tmp_path / "x.pt")
    assert len(list(tmp_path.glob("x.old*"))) == 1
    common.set_aside(tmp_path / "x.pt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.old.json", "x.old.pt"]


def test_a_demo_set_that_is_cut_off_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "draw_crop", lambda *_: signal.raise_signal(signal.SIGINT))
    assert call(par, "--stats") == 130 and not list(tmp_path.iterdir())


def test_stage_1_learns_drawn_people(tmp_path, capsys):
    """Clothes' lengths and colours are plain to see: a few steps must beat always naming the commonest class."""
    common.draw_market(tmp_path, 60, 4, seed=3)
    assert call(par, "--data", tmp_path, "--epochs", 7, "--batch", 16, "--lr", "1e-3", "--size", "64x32",
                "--out", tmp_path / "p.pt") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(("Upcolor", "Global"))]
    rows = {line[0]: [float(v) for v in line[1:]] for line in lines}
    assert rows["Global"][2] > rows["Global"][3] + 5 and rows["Upcolor"][2] > rows["Upcolor"][3] + 20


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_both_stages_on_an_accelerator(device, market, tmp_path, monkeypatch):
    if not (torch.cuda.is_available() if device == "cuda" else torch.backends.mps.is_available()):
        pytest.skip(f"needs a {device} device")
    monkeypatch.undo()  # in the precision of that device
    assert call(par, "--data", market, "--epochs", 1, "--batch", 8, "--device", device, "--out", tmp_path / "p.pt") == 0
    assert call(reid, "--data", market, "--epochs", 1, "--batch", 8, "--device", device, "--init", tmp_path / "p.pt",
                "--out", tmp_path / "r.pt") == 0
    assert call(reid, "--data", market, "--device", device, "--eval", tmp_path / "r.pt") == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a cuda device")
def test_graph_plain_steps_and_crops_on_the_host_train_alike_on_cuda(market, tmp_path, monkeypatch):
    monkeypatch.undo()  # in the precision of that device

    def losses(out):
        assert call(par, "--data", market, "--epochs", 3, "--batch", 8, "--device", "cuda", "--out", out) == 0
        return [row["loss"] for row in json.loads(out.with_suffix(".json").read_text())["epochs"]]

    graph = losses(tmp_path / "graph.pt")
    monkeypatch.setattr(common, "place", lambda crops, device: crops)
    assert losses(tmp_path / "host.pt") == pytest.approx(graph, rel=0.02)  # cuDNN's sums differ from run to run
    monkeypatch.setattr(common, "graphed", lambda step: step)
    assert losses(tmp_path / "plain.pt") == pytest.approx(graph, rel=0.02)


def test_a_graph_replays_one_recorded_step_on_new_values(monkeypatch):
    """The book-keeping around a CUDA graph, with a stand-in whose replay repeats what was recorded, where it lies."""
    calls = []

    def step(x, y):
        calls.append((x, y, x + 2 * y))
        return calls[-1][2]

    class Graph:
        def replay(self):
            x, y, out = calls[3]
            out.copy_(x + 2 * y)

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, stand_in in {"Stream": lambda: stream, "current_stream": lambda: stream, "CUDAGraph": Graph,
                           "stream": lambda s: contextlib.nullcontext(),
                           "graph": lambda graph, stream: contextlib.nullcontext()}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    run_step, values = common.graphed(step), torch.arange(12.0).view(6, 2)
    results = [run_step(v, v + 1).clone() for v in values]
    assert torch.equal(torch.stack(results), values + 2 * (values + 1))
    assert len(calls) == 4  # three as they are, one to record


def test_crops_that_do_not_fit_a_gpu_stay_on_the_host(monkeypatch, capsys):
    crops, cuda = torch.zeros(10, 3, 8, 4, dtype=torch.uint8), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * 960 - 1, 10**6))
    assert common.place(crops, cuda) is crops and "stay in the host's memory" in capsys.readouterr().out
    assert torch.equal(common.take(crops + 1, torch.tensor([1, 2]), crops.device), torch.ones_like(crops[:2]))
    there = common.take(crops, torch.tensor([1, 2]), torch.device("meta"))
    assert there.device.type == "meta" and there.shape == (2, 3, 8, 4)


def test_as_a_user_runs_it_without_data(tmp_path, trained):
    """The demo set is drawn once, said loudly, and an error is a sentence: in a process of its own."""
    small = "import sys, common, par; draw = common.draw_market; sys.argv[0] = 'par.py'; " \
            "common.draw_market = lambda root, *a, **k: draw(root, 10, 4, 0); common.run(par.main)"
    environment = os.environ | {"PYTHONPATH": str(HERE), "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-c", small, "--epochs", "1", "--batch", "8", "--size", "64x32"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[0].startswith("Drawing the demo set") and "DEMO SET" in run.stdout.splitlines()[1]
    assert {p.name for p in tmp_path.iterdir()} == {"Market-1501-demo", "par_best.pt", "par_last.pt", "par_best.json",
                                                    "par_best.png"}
    assert "\r" not in run.stdout + run.stderr
    assert len([r for r in run.stdout.splitlines() if r.startswith("epoch")]) == 1
    command = [sys.executable, HERE / "reid.py", "--init", "nowhere.pt"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr == "reid.py: nowhere.pt does not exist.\n"


# --------------------------------------------------------------------------------------------------------- the errors


def copy_of(market, tmp_path):
    """A data set of our own to break."""
    root = tmp_path / "broken"
    root.mkdir()
    for path in market.rglob("*"):
        if path.is_file():
            (root / path.relative_to(market)).parent.mkdir(exist_ok=True)
            (root / path.relative_to(market)).write_bytes(path.read_bytes())
    return root


def edit_csv(root, change):
    path = root / "annotations_train.csv"
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    rows = change(rows) or rows
    write_csv(path, rows)


def a_crop(root):
    return sorted((root / "bounding_box_train").iterdir())[0]


BROKEN_DATA = {
    "no such folder": (lambda r: [p.rename(r.parent / "gone") for p in [r]], "does not exist"),
    "junk to train with": (lambda r: a_crop(r).rename(a_crop(r).with_name("-1_c1s1_000025_01.jpg")),
        "shows no identity"),
    "no train folder": (lambda r: (r / "bounding_box_train").rename(r / "elsewhere"),
        "has no folder bounding_box_train"),
    "no crops": (lambda r: [p.unlink() for p in (r / "bounding_box_train").iterdir()], "holds no crops"),
    "no annotations": (lambda r: [p.unlink() for p in r.glob("*.csv")], "has no annotations"),
    "a column missing": (lambda r: edit_csv(r, lambda rows: [row.pop("hat") for row in rows] and None),
        "has no column 'hat'"),
    "a colour column missing": (lambda r: edit_csv(r, lambda rows: [row.pop("downpink") for row in rows] and None),
        "has no column 'downpink'"),
    "an identity missing": (lambda r: edit_csv(r, lambda rows: rows[1:]), "lack identity 0001"),
    "an identity twice": (lambda r: edit_csv(r, lambda rows: rows + rows[:1]), "names an identity twice"),
    "a value out of range": (lambda r: edit_csv(r, lambda rows: rows[2].update(age=5)),
        "column 'age' of identity 3 holds '5', not a whole number from 1 to 4"),
    "a value of zero": (lambda r: edit_csv(r, lambda rows: rows[0].update(upred=0)),
        "column 'upred' of identity 1 holds '0'"),
    "a value that is no number": (lambda r: edit_csv(r, lambda rows: rows[0].update(age="old")),
        "column 'age' of identity 1 holds 'old'"),
    "an empty table": (lambda r: (r / "annotations_train.csv").write_text(""), "has no column 'id'"),
    "a table that is no text": (lambda r: (r / "annotations_train.csv").write_bytes(b"\xff\xfe\x00\x81"),
        "cannot be read as a table"),
    "a row cut short": (lambda r: edit_csv(r, lambda rows: rows[9].update(downbrown="", downgreen="")),
        "of identity 10 holds"),
    "a truncated JPEG": (lambda r: a_crop(r).write_bytes(a_crop(r).read_bytes()[:900]), "is not a readable image"),
    "an empty JPEG": (lambda r: a_crop(r).write_bytes(b""), "is not a readable image"),
    "a text as JPEG": (lambda r: a_crop(r).write_text("hello"), "is not a readable image"),
    "a foreign file": (lambda r: (r / "bounding_box_train" / "notes.txt").write_text("hello"),
        "notes.txt is not named like a crop"),
    "a name that does not parse": (lambda r: a_crop(r).rename(a_crop(r).with_name("person.jpg")),
        "person.jpg is not named like a crop"),
    "annotations that are a folder": (lambda r: [(r / "annotations_train.csv").unlink(),
                                                 (r / "annotations_train.csv").mkdir()] and (r / "x.csv").touch(),
        "has no annotations"),
    "a value too many": (lambda r: (r / "annotations_train.csv").write_text(
        (r / "annotations_train.csv").read_text().replace("\n1,", "\n1,1,")), "the row that begins with '1' has more"),
    "two columns of a name": (lambda r: (r / "annotations_train.csv").write_text(
        (r / "annotations_train.csv").read_text().replace("\n", ",1\n").replace(",1\n", ",age\n", 1)),
        "has two columns 'age'"),
    "a quote that does not end": (lambda r: (r / "annotations_train.csv").write_text(
        (r / "annotations_train.csv").read_text().replace("\n2,", '\n"2,')), "holds '2,"),
    "a table without rows": (lambda r: (r / "annotations_train.csv").write_text("id,age\n"), "has no column 'gender'"),
    "a table that ends early": (lambda r: edit_csv(r, lambda rows: rows[:5]), "lack identity 0006"),
    "identities that are none": (lambda r: edit_csv(r, lambda rows: rows[3].update(id="x4")), "column 'id' holds 'x4'"),
    "an identity of a fraction": (lambda r: edit_csv(r, lambda rows: rows[3].update(id="4.5")), "holds '4.5'"),
    "a value that is infinite": (lambda r: edit_csv(r, lambda rows: rows[3].update(hat="inf")), "holds 'inf'"),
    "two flags in one cell": (lambda r: edit_csv(r, lambda rows: rows[3].update(hat="1 2")), "holds '1 2'"),
    "a crop that is a folder": (lambda r: [a_crop(r).with_name("0001_c9s1_000001_01.jpg").mkdir()],
        "is not a readable image"),
    "a camera that is missing": (lambda r: a_crop(r).rename(a_crop(r).with_name("0001_s1_000025_01.jpg")),
        "is not named like a crop"),
    "a picture of another format": (lambda r: a_crop(r).rename(a_crop(r).with_name("0001_c1s1_000025_01.png")),
        "is not named like a crop"),
    "a train folder that is a file": (lambda r: [(r / "bounding_box_train").rename(r / "elsewhere"),
                                                 (r / "bounding_box_train").write_text("")], "has no folder"),
    "an identity beyond all numbers": (lambda r: a_crop(r).rename(a_crop(r).with_name(f"{10**20}_c1s1_000025_01.jpg")),
        "is not named like a crop"),
    "too few identities": (lambda r: [p.unlink() for p in (r / "bounding_box_train").iterdir() if p.name > "0004"],
        "too few to split"),
}


@pytest.mark.parametrize("case", BROKEN_DATA)
def test_broken_data_is_named_in_a_sentence(case, market, tmp_path, capsys):
    root = copy_of(market, tmp_path)
    damage, sentence = BROKEN_DATA[case]
    damage(root)
    before = {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")}
    assert call(par, "--data", root, "--epochs", 1, "--out", tmp_path / "out" / "p.pt") == 2
    check_sentence(capsys, sentence)
    after = {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*") if p != tmp_path / "out"}
    assert before == after


def check_sentence(capsys, sentence):
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1 and "Traceback" not in err and err.rstrip().endswith(".")


def save_broken(path, kind, **changes):
    torch.save({"version": 1, "classes": common.ATTRIBUTES, "kind": kind} | changes, path)
    return path


def changed(trained, folder, kind, **changes):
    """A good checkpoint but for some parts."""
    good = common.load_checkpoint(trained / f"{kind}_best.pt", kind)
    common.save_checkpoint(folder / "changed.pt", good | changes)
    return folder / "changed.pt"


def cut(path, folder, length=9000):
    (folder / "cut.pt").write_bytes(path.read_bytes()[:length])
    return folder / "cut.pt"


def with_code(folder):
    (folder / "code.pt").write_bytes(pickle.dumps(print))
    return folder / "code.pt"


def zip_bomb(folder):
    with zipfile.ZipFile(folder / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("archive/data.pkl", pickle.dumps({}))
        packed.writestr("archive/data/0", bytes(10**8))
    return folder / "bomb.pt"


def as_last(trained, folder):
    (folder / "x_last.pt").write_bytes((trained / "par_best.pt").read_bytes())
    return ["--out", folder / "x_best.pt"]


BROKEN_ARGUMENTS = {
    "a size of zero": (par, lambda t, f: ["--size", "0x64"], "0x64 is not HEIGHTxWIDTH"),
    "a size that is none": (par, lambda t, f: ["--size", "big"], "big is not HEIGHTxWIDTH"),
    "no epochs": (par, lambda t, f: ["--epochs", 0], "0 is not at least 1"),
    "a negative rate": (par, lambda t, f: ["--lr=-1e-3"], "-1e-3 is not above 0"),
    "a rate that is no number": (reid, lambda t, f: ["--lr", "nan"], "nan is not above 0"),
    "a warm-up over 1": (reid, lambda t, f: ["--warmup", 1.5], "1.5 is not at least 0 and at most 1"),
    "a negative margin": (reid, lambda t, f: ["--margin=-1"], "-1 is not at least 0"),
    "a Hamming distance of 13": (reid, lambda t, f: ["--hamming", 13], "13 is not at least 0 and at most 12"),
    "a threshold that is none": (reid, lambda t, f: ["--threshold", "far"], "far is neither"),
    "an unknown loss": (par, lambda t, f: ["--loss", "hinge"], "hinge"),
    "an unknown flag": (par, lambda t, f: ["--color"], "--color"),
    "prediction without a checkpoint": (par, lambda t, f: ["--predict", t], "--predict needs --eval"),
    "comparison without a checkpoint": (reid, lambda t, f: ["--compare"], "needs --init"),
    "embedding without a checkpoint": (reid, lambda t, f: ["--embed", t / "x.npz"], "--embed needs --eval"),
    "search without a gallery": (reid, lambda t, f: ["--eval", f / "reid_best.pt", "--search", t],
        "goes with --gallery FOLDER"),
    "a gallery without a search": (reid, lambda t, f: ["--eval", f / "reid_best.pt", "--gallery", t],
        "goes with --gallery FOLDER"),
    "a gallery without a checkpoint": (reid, lambda t, f: ["--gallery", t], "--gallery needs --eval"),
    "a search with a threshold": (reid, lambda t, f: ["--eval", f / "reid_best.pt", "--search", t, "--gallery", t,
                                                      "--threshold", 3], "--precision says how strict"),
    "showing and embedding at once": (reid, lambda t, f: ["--eval", f / "reid_best.pt", "--show", 3, "--embed", "x"],
        "not allowed with argument"),
    "an attribute that is none": (reid, lambda t, f: ["--eval", f / "reid_best.pt", "--gallery", t, "--find",
                                                      "shoe=red"], "there is no attribute 'shoe', only age, gender, "),
    "a class that is none": (reid, lambda t, f: ["--eval", f / "reid_best.pt", "--gallery", t, "--find", "hat=red"],
        "name one class of hat: no, yes."),
    "two classes of one attribute": (reid, lambda t, f: ["--eval", f / "reid_best.pt", "--gallery", t, "--find",
                                                         "hat=no", "hat=yes"], "name one class of hat"),
    "words without stage 1": (reid, lambda t, f: ["--eval", changed(f, t, "reid", attributes=None),
                                                "--gallery", t, "--find", "hat=no"],
        "was trained without --init"),
    "a precision that is not reached": (reid, lambda t, f: ["--eval", f / "reid_best.pt", "--precision", 1,
                                                            "--search", t, "--gallery", t],
        "No distance has a precision of 1 on validation"),
    "queries to show without a checkpoint": (reid, lambda t, f: ["--show", 3], "--show needs --eval"),
    "a sheet without predictions": (par, lambda t, f: ["--eval", f / "par_best.pt", "--sheet"], "go with --predict"),
    "embeddings over the checkpoint": (reid, lambda t, f: ["--eval", f / "reid_best.pt", "--embed", f / "reid_best.pt"],
        "ends in .npz"),
    "nothing to predict": (par, lambda t, f: ["--eval", f / "par_best.pt", "--predict", t / "none"], "does not exist"),
    "no image to predict": (par, lambda t, f: ["--eval", f / "par_best.pt", "--predict", t], "holds no files"),
    "no checkpoint": (par, lambda t, f: ["--eval", t / "none.pt"], "does not exist"),
    "stage 2 where stage 1 belongs": (reid, lambda t, f: ["--init", f / "reid_best.pt"],
        "is a checkpoint of reid.py; one of par.py"),
    "stage 1 where stage 2 belongs": (reid, lambda t, f: ["--eval", f / "par_best.pt"],
        "is a checkpoint of par.py; one of reid.py"),
    "no checkpoint but a text": (reid, lambda t, f: ["--init", HERE / "requirements.txt"],
        "is not a readable checkpoint"),
    "another project's checkpoint": (reid, lambda t, f: ["--init", save_broken(t / "x.pt", "theirs")],
        "is not a checkpoint of this version"),
    "a future version": (reid, lambda t, f: ["--init", save_broken(t / "x.pt", "par", version=2)],
        "is not a checkpoint of this version"),
    "a checkpoint that lacks its split": (reid, lambda t, f: ["--init", save_broken(t / "x.pt", "par", model={})],
        "is not a whole checkpoint"),
    "a checkpoint cut short": (reid, lambda t, f: ["--init", cut(f / "par_best.pt", t)],
        "is not a readable checkpoint"),
    "an empty checkpoint": (par, lambda t, f: ["--eval", cut(f / "par_best.pt", t, 0)], "is not a readable checkpoint"),
    "a pickle with code": (par, lambda t, f: ["--eval", with_code(t)],
        "is not a readable checkpoint (UnpicklingError)"),
    "a zip bomb": (par, lambda t, f: ["--eval", zip_bomb(t)], "is not a readable checkpoint"),
    "a checkpoint without an epoch": (par, lambda t, f: ["--eval", changed(f, t, "par", epoch=None)],
        "is not a whole checkpoint"),
    "a checkpoint without arguments": (par, lambda t, f: ["--eval", changed(f, t, "par", args=None)],
        "is not a whole checkpoint"),
    "a checkpoint of an absurd size": (par, lambda t, f: ["--eval", changed(f, t, "par", args={"size": (10**6, 64)})],
        "is not a whole checkpoint"),
    "a checkpoint whose split is text": (par, lambda t, f: ["--eval", changed(f, t, "par", train_ids="all")],
        "is not a whole checkpoint"),
    "a checkpoint of absurd dimensions": (reid, lambda t, f: ["--eval", changed(
        f, t, "reid", args={"size": (128, 64), "dim": 10**9})], "is not a whole checkpoint"),
    "a checkpoint of dimensions that are no number": (reid, lambda t, f: ["--eval", changed(
        f, t, "reid", args={"size": (128, 64), "dim": True})], "is not a whole checkpoint"),
    "a checkpoint whose size is no whole number": (par, lambda t, f: ["--eval", changed(
        f, t, "par", args={"size": (128, 64.0)})], "is not a whole checkpoint"),
    "a checkpoint of nobody": (par, lambda t, f: ["--eval", changed(
        f, t, "par", validation_ids=torch.zeros(0, dtype=torch.int64))], "is not a whole checkpoint"),
    "a checkpoint that fills all memory": (par, lambda t, f: ["--eval", changed(
        f, t, "par", train_ids=torch.zeros(1, dtype=torch.int64).expand(10**10))], "is not a whole checkpoint"),
    "a checkpoint whose distances are NaN": (reid, lambda t, f: ["--eval", changed(f, t, "reid", distances={
        "edges": torch.tensor([0, math.nan]), "matches": torch.ones(1), "others": torch.ones(1)})],
        "is not a whole checkpoint"),
    "a checkpoint whose distances are none": (reid, lambda t, f: ["--eval", changed(f, t, "reid", distances={
        "edges": torch.arange(3), "matches": torch.zeros(2), "others": torch.ones(2)})], "is not a whole checkpoint"),
    "a checkpoint whose stage 1 is a tensor": (reid, lambda t, f: ["--eval", changed(
        f, t, "reid", attributes=torch.zeros(3))], "is not a whole checkpoint"),
    "an output over the checkpoint it starts from": (reid, lambda t, f: [
        "--init", f / "par_best.pt", "--out", f / "par_best.pt"], "would replace the checkpoint of --init"),
    "a checkpoint without distances": (reid, lambda t, f: ["--eval", changed(f, t, "reid", distances=None)],
        "is not a whole checkpoint"),
    "weights of another network": (par, lambda t, f: ["--eval", changed(f, t, "par", model={"x": torch.zeros(3)})],
        "do not fit the network"),
    "weights that are no tensors": (par, lambda t, f: ["--eval", changed(f, t, "par", model=dict.fromkeys("ab", 1))],
        "do not fit the network"),
    "a best checkpoint as the last": (par, lambda t, f: ["--resume", *as_last(f, t)],
        "does not hold the state of a run"),
    "another size than the checkpoint's": (reid, lambda t, f: ["--init", f / "par_best.pt", "--size", "64x32"],
        "was trained with --size 128x64"),
    "training and scoring at once": (reid, lambda t, f: ["--init", f / "par_best.pt", "--eval", f / "reid_best.pt"],
        "not allowed with argument --init"),
    "an output that is a folder": (par, lambda t, f: ["--out", t], "is no name for the file"),
    "an output over its own record": (par, lambda t, f: ["--out", t / "p.json"], "is no name for the file"),
    "a batch of one": (par, lambda t, f: ["--batch", 1], "1 is not at least 2"),
    "weights that are none": (par, lambda t, f: ["--weights", f / "par_best.pt"], "is not a state dict"),
    "weights that do not exist": (par, lambda t, f: ["--weights", t / "none.pth"], "does not exist"),
    "an output folder that is a file": (par, lambda t, f: ["--out", f / "par_best.pt" / "p.pt"], "cannot be written"),
    "no such device": (par, lambda t, f: ["--device", "cuda" if not torch.cuda.is_available() else "mps"],
        "This machine has no"),
}


@pytest.mark.parametrize("case", BROKEN_ARGUMENTS)
def test_broken_arguments_are_named_in_a_sentence(case, market, trained, tmp_path, capsys):
    module, arguments, sentence = BROKEN_ARGUMENTS[case]
    before = {p: p.read_bytes() for p in trained.iterdir()}
    assert call(module, "--data", market, "--out", tmp_path / "out" / "o.pt", *arguments(tmp_path, trained)) == 2
    check_sentence(capsys, sentence)
    assert before == {p: p.read_bytes() for p in trained.iterdir()}


MUTATIONS = int(os.environ.get("MUTATIONS", "40"))


@pytest.mark.parametrize("kind", ["checkpoint", "csv", "mat", "jpeg"])
def test_mutated_files_end_in_a_sentence_or_in_work(kind, market, trained, tmp_path, capsys):
    """Flip bytes of a good file, or cut it; the long form is MUTATIONS=2000 pytest -k mutated."""
    root = copy_of(market, tmp_path)
    if kind == "mat":
        scipy = pytest.importorskip("scipy.io")
        for half in ("train", "test"):
            (root / f"annotations_{half}.csv").unlink()
        people = [row | {"id": k} for k in range(1, 11) for row in annotation_rows(downblack=2)[1:]]
        half = {k: np.array([row[k] for row in people], np.uint8) for row in people[:1] for k in row if k != "id"}
        half["image_index"] = np.array([f"{row['id']:04d}" for row in people], object)
        scipy.savemat(root / "market_attribute.mat", {"market_attribute": {"train": half, "test": half}},
                      do_compression=True)
    path, command = {
        "checkpoint": (trained / "par_best.pt", ["--predict", a_crop(root)]),
        "csv": (root / "annotations_train.csv", ["--stats", "--data", root, "--out", tmp_path / "p.pt"]),
        "mat": (root / "market_attribute.mat", ["--stats", "--data", root, "--out", tmp_path / "p.pt"]),
        "jpeg": (a_crop(root), ["--stats", "--data", root, "--out", tmp_path / "p.pt"])}[kind]
    if kind == "checkpoint":
        path, command = tmp_path / "mutated.pt", ["--eval", tmp_path / "mutated.pt", *command]
        path.write_bytes((trained / "par_best.pt").read_bytes())
    good, random, ends = path.read_bytes(), np.random.RandomState(0), []
    assert call(par, *command) == 0
    expected = capsys.readouterr().out
    for k in range(MUTATIONS // 4):
        bad = np.frombuffer(good, np.uint8).copy()
        if k % 4 == 3:
            bad = bad[:random.randint(len(bad))]
        else:  # anywhere, or near an end, where a zip file keeps its table of contents and a JPEG its header
            reach = (len(bad), min(len(bad), 2000))[k % 2]
            places = random.randint(reach, size=random.randint(1, 9))
            places = len(bad) - 1 - places if random.rand() < 0.5 else places
            bad[places] ^= random.randint(1, 256, len(places), np.uint8)
        path.write_bytes(bad.tobytes())
        begin = time.perf_counter()
        ends.append(call(par, *command))  # another exception than the ones that `run` knows would fail here
        out, err = capsys.readouterr()
        assert time.perf_counter() - begin < 20 and ends[-1] in (0, 2) and (ends[-1] == 0 or err.count("\n") == 1)
        if kind == "checkpoint" and ends[-1] == 0:
            assert out == expected
    assert 2 in ends


def test_a_checkpoint_of_other_identities_is_refused(trained, tmp_path, capsys):
    common.draw_market(tmp_path, 12, 2, seed=0)
    for module, flag, name in ((reid, "--init", "par_best.pt"), (par, "--eval", "par_best.pt"),
                               (reid, "--eval", "reid_best.pt")):
        assert call(module, "--data", tmp_path, flag, trained / name, "--out", tmp_path / "r.pt") == 2
        check_sentence(capsys, "was trained on other identities")


def test_identities_of_a_single_crop_give_no_triplet(tmp_path, capsys):
    common.draw_market(tmp_path, 6, 1, seed=0)
    assert call(reid, "--data", tmp_path, "--out", tmp_path / "r.pt") == 2
    check_sentence(capsys, "No triplet can be formed")


def test_validation_seen_by_one_camera_is_told_before_training(market, tmp_path, capsys):
    root = copy_of(market, tmp_path)
    for path in (root / "bounding_box_train").iterdir():
        path.rename(path.with_name(path.name.replace(path.name[4:8], "_c3s")))
    assert call(reid, "--data", root, "--out", tmp_path / "r.pt") == 2
    check_sentence(capsys, "No validation identity is seen by two cameras")


def test_a_loss_that_becomes_nan_stops_and_keeps_the_last_good_checkpoint(market, tmp_path, capsys, monkeypatch):
    loss, calls = par.attribute_loss, []

    def failing(*arguments):
        calls.append(1)
        return loss(*arguments) * (float("nan") if len(calls) == 7 else 1)
    monkeypatch.setattr(par, "attribute_loss", failing)
    assert call(par, "--data", market, "--epochs", 3, "--batch", 8, "--out", tmp_path / "p.pt") == 2
    check_sentence(capsys, "The loss became nan at step 3 of epoch 2; " + str(tmp_path / "p.pt") + " keeps epoch 1")
    model = common.load_checkpoint(tmp_path / "p.pt", "par")
    assert model["epoch"] == 1 and all(v.isfinite().all() for v in model["model"].values())


@pytest.mark.parametrize("network", ["refuses", "swallows everything"])
def test_imagenet_weights_that_cannot_be_had(network, market, tmp_path, capsys, monkeypatch):
    """Told soon what to pass instead, also when the network never answers: a proxy that stays silent."""
    ask, patience = urllib.request.urlopen, []

    def hurry(request, timeout):
        patience.append(timeout)
        return ask(request, timeout=1)
    monkeypatch.setattr(urllib.request, "urlopen", hurry)
    with socket.socket() as proxy:
        proxy.bind(("127.0.0.1", 0))
        if network != "refuses":
            proxy.listen()
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        monkeypatch.setattr(urllib.request, "_opener", None)  # it remembers the proxy
        assert call(par, "--data", market, "--weights", "imagenet", "--out", tmp_path / "p.pt") == 2
    assert patience == [10]
    check_sentence(capsys, "pass --weights none to start from random weights, or --weights FILE")


def test_crops_are_read_without_torchvisions_decoder_too(market, monkeypatch):
    expected = common.load_market(market, "train").images
    monkeypatch.delattr(common.torchvision.io, "decode_jpeg")
    assert (common.load_market(market, "train").images.int() - expected.int()).abs().float().mean() < 1


def test_charts_of_a_constant_and_of_one_epoch(tmp_path):
    for value in (0.0, 1.0, 0.5, 1e12):
        record = {"epochs": [{"epoch": 1, "loss": value, "f1": value}], "metrics": ["f1"]}
        common.curves(tmp_path / "c.png", record, "constant")
    for low, high in ((0, 0), (100, 100), (0, 1e14), (0.0012, 0.0031), (-3, 8)):
        marks = common.ticks(low, high)
        assert marks[0] <= low and marks[-1] >= high and marks == sorted(set(marks)) and 2 <= len(marks) <= 9


def test_every_help_fits_a_screen(capsys):
    for module in (par, reid):
        assert call(module, "--help") == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) < 67 and max(map(len, lines)) <= 100
