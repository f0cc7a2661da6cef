#!/usr/bin/env python3
"""Stage 1, person attribute recognition: ResNet18 with a head for each of 12 attributes.

    python par.py --loss wce --epochs 15                train; the best epoch is par_best.pt
    python par.py --loss all                            the four losses in turn: tables 2 and 3
    python par.py --recipe strong                       what is known since the report; --head conv
    python par.py --eval par_best.pt                    score: validation and test identities
    python par.py --eval par_best.pt --predict PATH...  attributes of your own images, as CSV
    python par.py --eval par_best.pt --export F.pt2     the network for other programs, or F.onnx
    python par.py --stats                               class frequencies: table 4 and figure 4

[report] is the one that common.py names; tables and figures have its numbers. reid.py builds on
this file: network, attribute loss, scores, tables, pictures and the command line.
"""

import argparse
import contextlib
import copy
import csv
import ctypes
import importlib.util
import io
import math
import os
import platform
import re
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torchvision
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torch.nn import functional as F
from torchvision.transforms.functional import resize

import common
from common import ATTRIBUTES, CLASS_COUNTS, UserError

# ------------------------------------------------------------------------------------------
# The network.


class Output(NamedTuple):
    """What a network says of B crops. None: it has no such part, or not in evaluation."""

    logits: torch.Tensor | None = None  # float32 [B, 41], of all classes, attribute after attribute
    features: torch.Tensor | None = None  # float32 [B, D]
    identities: torch.Tensor | None = None  # float32 [B, identities], logits


class LinearHeads(nn.ModuleList):
    """[report] figure 1: for each attribute Dropout and Linear, on the feature map's mean."""

    def __init__(self, width, dropout):
        super().__init__(
            nn.Sequential(nn.Dropout(dropout), nn.Linear(width, count)) for count in CLASS_COUNTS
        )

    def forward(self, maps, features):
        """Feature map [B, width, h, w] and its mean [B, width] -> logits [B, 41]."""
        return torch.cat([head(features) for head in self], 1).float()

    def locate(self, maps, classes):
        """Where classes come from: feature map, classes int64 [B, 12] -> float32 [B, 12, h, w].

        Class activation maps (Zhou et al. 2016): a head is linear in the mean over the feature map,
        so the same product at each of its places says what that place adds to the logit."""
        weights = [head[1].weight[chosen] for head, chosen in zip(self, classes.T)]  # [B, width]
        return torch.einsum("nac,nchw->nahw", torch.stack(weights, 1), maps)


class ConvHeads(nn.Module):
    """The report's future work (section 5): each attribute looks for itself, by a convolution and
    attention over the map's places, before its Dropout and Linear."""

    def __init__(self, width, dropout, branch=64):
        super().__init__()
        attributes = len(ATTRIBUTES)
        self.look = nn.Sequential(
            nn.Conv2d(width, attributes * branch, 3, padding=1, bias=False),
            nn.BatchNorm2d(attributes * branch),
            nn.ReLU(),
        )
        bound = branch**-0.5  # as PyTorch's layers begin
        self.attention = nn.Parameter(torch.empty(attributes, branch).uniform_(-bound, bound))
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Dropout(dropout), nn.Linear(branch, count)) for count in CLASS_COUNTS
        )

    def attend(self, maps):
        """What each branch sees, [B, 12, branch, h * w], and its attention to the places,
        [B, 12, h * w], which adds up to 1."""
        seen = self.look(maps).flatten(2).unflatten(1, self.attention.shape)
        return seen, torch.einsum("nabp,ab->nap", seen, self.attention).softmax(2)

    def forward(self, maps, features):
        """Feature map [B, width, h, w] and its mean [B, width] -> logits [B, 41]."""
        seen, attention = self.attend(maps)
        pooled = torch.einsum("nabp,nap->anb", seen, attention)
        return torch.cat([head(x) for head, x in zip(self.heads, pooled)], 1).float()

    def locate(self, maps, classes):
        """The attention to each place, [B, 12, h, w], whatever the classes."""
        return self.attend(maps)[1].unflatten(2, maps.shape[2:])


HEADS = {"linear": LinearHeads, "conv": ConvHeads}


class AttributeNet(nn.Module):
    """[report] figure 1: crops [B, 3, H, W] in 0..255 -> `Output` of logits."""

    def __init__(self, backbone, heads):
        super().__init__()
        self.backbone = backbone
        self.heads = heads

    def forward(self, crops):
        maps, features = self.backbone(crops)
        return Output(logits=self.heads(maps, features))


class JointNet(nn.Module):
    """The strong recipe's network, of both stages: attributes and identities learned jointly (Lin
    et al. 2019), identities behind a BNNeck (Luo et al. 2019), here without a scale.

    crops [B, 3, H, W] in 0..255 -> `Output`. In training: logits, the features before the neck,
    logits of identities. In evaluation: logits, and the features behind the neck at length 1, both,
    with "mirror" in rungs, means over the crop and its mirror image. heads: None without
    attributes."""

    def __init__(self, backbone, heads, identities, rungs):
        super().__init__()
        self.backbone = backbone
        self.heads = heads
        self.mirror = "mirror" in rungs
        self.neck = nn.Identity()
        if "neck" in rungs:
            self.neck = nn.BatchNorm1d(backbone.width, affine=False)
        self.identify = None
        if "identity" in rungs:
            self.identify = nn.Linear(backbone.width, identities, bias=False)
            nn.init.normal_(self.identify.weight, std=0.001)

    def forward(self, crops):
        mirror = self.mirror and not self.training
        if mirror:
            crops = torch.cat([crops, crops.flip(3)])
        maps, features = self.backbone(crops)
        logits = None
        if self.heads is not None:
            logits = self.heads(maps, features)

        with common.in_float32(crops.device):
            features = features.float()
            necked = self.neck(features)
            if self.training:
                identities = None
                if self.identify is not None:
                    identities = self.identify(necked)
                return Output(logits, features, identities)
            if mirror:
                necked = necked.unflatten(0, (2, -1)).mean(0)
                if logits is not None:
                    logits = logits.unflatten(0, (2, -1)).mean(0)
            return Output(logits, F.normalize(necked))


def make_backbone(settings, state=None):
    """`common.Backbone` as the arguments of a run, a dict, ask for."""
    return common.Backbone(state, last_stride=1 if "stride" in settings["rungs"] else 2)


def starting_weights(args):
    """What --weights names: -> (state dict for `common.Backbone`, which data sets it was trained
    on, as `describe_split` lists them). The state is None for random weights, or where a run
    resumes. By the strong recipe, features of a network that is not ours are shortened."""
    resumes = args.resume and args.out.with_suffix(".last").exists()
    if args.weights == "none" or resumes:
        return None, []
    network = common.make_resnet()
    seen = []
    is_ours = False
    if args.weights == "imagenet":
        network.load_state_dict(download_imagenet_weights())
    else:
        state = common.torch_load(args.weights)
        is_ours = isinstance(state, dict) and "version" in state
        if is_ours:
            checkpoint = common.load_checkpoint(args.weights, "par", "reid")
            seen = checkpoint["seen"]
            state = name_layers(checkpoint["model"], network)
        load_weights(network, state, args.weights)
    if args.recipe == "strong" and not is_ours:
        shorten_features(network)
    return network.state_dict(), seen


def load_weights(network, state, file):
    """Put the weights that were read from a file into torchvision's network, all but those of its
    classes; UserError, where some are missing or of another shape."""
    if not isinstance(state, dict):
        state = {}
    expected = network.state_dict()
    needed = {}
    for name, tensor in expected.items():
        # A file's classes are not ours, and published files are older than num_batches_tracked.
        if name.startswith("fc.") or name.endswith("num_batches_tracked"):
            continue
        needed[name] = state.get(name)
        if getattr(needed[name], "shape", None) != tensor.shape:
            raise UserError(
                f"{file} is neither a checkpoint of par.py or reid.py nor a state dict of "
                f"torchvision's {common.make_resnet.__name__}."
            )
    network.load_state_dict(expected | needed)


def shorten_features(network):
    """Set weight and bias of the last batch norm to 1 and 0, as in a new network; its statistics
    stay.

    ImageNet's weight makes features so long that the strong recipe's triplet loss, which grows with
    the distances between them, outweighs the other losses at first. Stage 1, which has no triplets,
    begins the same, for one rule."""
    norms = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    for norm in norms[-1:]:  # none, where the network has no batch norm
        nn.init.ones_(norm.weight)
        nn.init.zeros_(norm.bias)


def name_layers(model, network):
    """The backbone's weights in a model's state dict, by the names that torchvision's network has
    for its layers: `common.Backbone` counts them."""
    layers = [name for name, _ in network.named_children()]
    state = {}
    for name, tensor in model.items():
        match = re.fullmatch(r"backbone\.net\.(\d+)\.(.+)", name)
        if match is not None:
            state[f"{layers[int(match[1])]}.{match[2]}"] = tensor
    return state


def download_imagenet_weights():
    """ImageNet's weights from torchvision, kept in its cache; UserError says what else will do."""
    socket.setdefaulttimeout(20)  # else a network that swallows packets hangs this for minutes
    try:
        return common.IMAGENET_WEIGHTS.get_state_dict(check_hash=True, weights_only=True)
    except Exception as error:  # of the network, of the hash, of a damaged file
        raise UserError(
            f"ImageNet weights could not be had ({error}): pass --weights none to start from "
            f"random weights, or --weights FILE, a copy of {common.IMAGENET_WEIGHTS.url}."
        ) from None
    finally:
        socket.setdefaulttimeout(None)


def make_network(settings, attributes=True, identities=0, state=None):
    """The network that the arguments of a run, a dict, ask for: `AttributeNet` or `JointNet`.

    attributes: whether it predicts them; identities: how many it learns; state: as of
    `common.Backbone`."""
    backbone = make_backbone(settings, state)
    heads = None
    if attributes:
        heads = HEADS[settings["head"]](backbone.width, settings.get("dropout", 0.5))
    if settings["recipe"] == "report":
        return AttributeNet(backbone, heads)
    return JointNet(backbone, heads, identities, settings["rungs"])


# ------------------------------------------------------------------------------------------
# Losses.

# Each loss: its name in [report] table 2, whether it weighs classes, whether it is focal.
LOSSES = {
    "ce": ("Vanilla CE", False, False),
    "wce": ("Weighted CE", True, False),
    "focal": ("Focal", False, True),
    "alpha": ("AlphaFocal", True, True),
}


def attribute_loss(logits, labels, kind, weights=None, gamma=2.0):
    """Sum over the attributes of the mean loss over the images that have a label ([report] section
    3.1.2): -> scalar.

    logits: list of 12 tensors [B, classes]; labels: int64 [B, 12], -1 unknown; weights: as from
    `class_weights`. kind: "ce" -log(p_t); "wce" w_t times that; "focal" (1 - p_t)^gamma times that
    (Lin et al. 2018, eq. 4); "alpha" both (eq. 5, alpha = the weights). From log-softmax, so that
    no p_t underflows."""
    _, weighted, focal = LOSSES[kind]
    total = 0
    for k, scores in enumerate(logits):
        target = labels[:, k].clamp(min=0)
        known = labels[:, k] >= 0
        log_p = F.log_softmax(scores, 1, dtype=torch.promote_types(scores.dtype, torch.float32))
        log_p = log_p.gather(1, target[:, None])[:, 0]  # of the true class
        loss = -log_p
        if focal:
            wrong = -torch.expm1(log_p)  # 1 - p_t
            # For gamma < 1 the slope at 0 is infinite.
            loss = loss * wrong.clamp(min=1e-12) ** gamma
        if weighted:
            loss = loss * weights[k][target]
        total = total + (loss * known).sum() / known.sum().clamp(min=1)
    return total


def class_counts(labels):
    """Images per class: labels int64 [N, 12], -1 unknown -> list of 12 float tensors [classes]."""
    counts = []
    for column, count in zip(labels.T, CLASS_COUNTS):
        counts.append(torch.bincount(column[column >= 0], minlength=count).float())
    return counts


def class_weights(labels):
    """Inverse class frequencies ([report] section 3.1.2): labels int64 [N, 12] -> list of 12 float
    tensors [classes].

    A class that does not occur weighs 0. The mean weight over the labelled images is 1, so that the
    loss keeps the scale of a plain one."""
    weights = []
    for counts in class_counts(labels):
        present = (counts > 0).sum()
        inverse = counts.sum() / (counts.clamp(min=1) * present)
        weights.append(torch.where(counts > 0, inverse, 0))
    return weights


class RecognitionLoss(nn.Module):
    """The loss of stage 1: `attribute_loss` and, if the network learns identities, their
    cross-entropy with smooth labels. Parameters that are added here are trained as well."""

    def __init__(self, args, market, rows):
        super().__init__()
        self.kind = args.loss
        self.gamma = args.gamma
        self.labels = market.labels.to(args.device)
        self.weights = [w.to(args.device) for w in class_weights(market.labels[rows])]
        self.identities = number_identities(market, rows).to(args.device)

    def forward(self, output, rows):
        """`Output` for B crops, and their rows, int64 [1, B] -> scalar."""
        rows = rows[0]
        logits = output.logits.split(CLASS_COUNTS, 1)
        loss = attribute_loss(logits, self.labels[rows], self.kind, self.weights, self.gamma)
        if output.identities is not None:
            true = self.identities[rows]
            loss = loss + F.cross_entropy(output.identities, true, label_smoothing=0.1)
        return loss


def number_identities(market, rows):
    """0, 1, 2, ... for the identities in `rows` of a `Market`, and no meaning for others: int64
    [N]."""
    return torch.searchsorted(market.person_ids[rows].unique(), market.person_ids)


# ------------------------------------------------------------------------------------------
# Predictions and scores.


def log_probabilities(logits):
    """Of all classes: logits float32 [N, 41] -> float32 [N, 41]."""
    return torch.cat([part.log_softmax(1) for part in logits.split(CLASS_COUNTS, 1)], 1)


def most_probable(log_p):
    """Each attribute's most probable class and its probability: log-probabilities [N, 41] ->
    (int64 [N, 12], float32 [N, 12])."""
    best = [part.max(1) for part in log_p.split(CLASS_COUNTS, 1)]
    classes = torch.stack([b.indices for b in best], 1)
    return classes, torch.stack([b.values for b in best], 1).exp()


def resize_crops(crops, size):
    """Bring uint8 crops [N, 3, H, W], RGB, to `size`, (height, width), with antialiasing; UserError
    for anything but such crops."""
    is_uint8 = torch.is_tensor(crops) and crops.dtype == torch.uint8
    if not is_uint8 or crops.dim() != 4 or crops.shape[1] != 3:
        raise UserError("Crops have to be a uint8 tensor [N, 3, H, W], RGB.")
    if len(crops) == 0:
        return crops.new_empty(0, 3, *size)
    if min(crops.shape[2:]) < 1:
        raise UserError("Crops have to be one pixel high and wide, or more.")
    if crops.shape[2:] == tuple(size):
        return crops
    return resize(crops, size, antialias=True)


def predict(model, crops, rows=None):
    """Of uint8 crops [N, 3, H, W], or of some rows of them: -> what `most_probable` returns, on the
    CPU."""
    logits = common.infer(model, crops, rows).logits
    classes, probabilities = most_probable(log_probabilities(logits))
    return classes.cpu(), probabilities.cpu()


def score(predicted, labels):
    """Accuracy and macro F1 of each attribute, fractions: int64 [N, 12] twice -> (accuracy [12],
    f1 [12]).

    Macro F1 is the mean over the classes in truth or prediction, as scikit-learn's. Labels of -1 do
    not count: where there are no others, NaN."""
    accuracy = []
    f1 = []
    for guess, truth, count in zip(predicted.T, labels.T, CLASS_COUNTS):
        pairs = (truth * count + guess)[truth >= 0]
        confusion = torch.bincount(pairs, minlength=count * count)
        confusion = confusion.view(count, count).double()  # a row per true class
        hits = confusion.diag()
        occurring = confusion.sum(0) + confusion.sum(1)
        accuracy.append(hits.sum() / confusion.sum())
        f1.append((2 * hits / occurring)[occurring > 0].mean())
    return torch.stack(accuracy), torch.stack(f1)


def activation_maps(model, crops, classes):
    """Where classes come from, as of the heads' `locate`: uint8 crops [N, 3, H, W], int64 [N, 12]
    -> float32 [N, 12, h, w]."""
    device = next(model.parameters()).device
    model.eval()
    with torch.inference_mode():
        maps, _ = model.backbone(crops.to(device))
        return model.heads.locate(maps, classes.to(device)).cpu()


def score_and_show(title, model, market, rows, commonest):
    """Score `rows` of a `Market` and print that, beside naming each attribute's commonest class in
    training, int64 [12]: -> dict of name -> dict of attribute, or "global" for their mean ->
    fraction."""
    labels = market.labels[rows]
    predicted, _ = predict(model, market.images, rows)
    accuracy, f1 = score(predicted, labels)
    common_accuracy, common_f1 = score(commonest.expand_as(labels), labels)
    columns = {
        "accuracy": accuracy,
        "commonest accuracy": common_accuracy,
        "f1": f1,
        "commonest f1": common_f1,
    }
    scores = {}
    for name, values in columns.items():
        scores[name] = dict(zip(ATTRIBUTES, values.tolist())) | {"global": values.mean().item()}
    show_scores(title, scores)
    return scores


def show_scores(title, scores):
    """Print percentages as [report] tables 2 and 3 do, from a dict of name -> dict of attribute ->
    fraction."""
    header = [""] + [name.replace("f1", "F1") for name in scores]
    rows = []
    for attribute in (*ATTRIBUTES, "global"):
        fractions = [values[attribute] for values in scores.values()]
        rows.append([attribute.capitalize()] + [100 * fraction for fraction in fractions])
    print_table(title, header, rows)


# ------------------------------------------------------------------------------------------
# Tables and pictures of both scripts.

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # Okabe and Ito's, for the colour-blind too
INK = "#222222"
GREY = "#8a8a8a"


def print_table(title, header, rows):
    """Print rows [name, cells...] under a header; a cell is a number, shown with two decimals, or a
    text."""

    def as_text(cell):
        if isinstance(cell, str):
            return common.printable(cell)
        return "-" if math.isnan(cell) else f"{cell:.2f}"

    lines = [header]
    for row in rows:
        lines.append([as_text(cell) for cell in row])
    columns = []
    for k, column in enumerate(zip(*lines)):
        width = max(map(len, column))
        if k == 0 or re.search("[a-z]{2}", " ".join(column[1:])):  # words, and not numbers
            columns.append([text.ljust(width) for text in column])
        else:
            columns.append([text.rjust(width) for text in column])
    print(f"\n{common.printable(title)}")
    for line in zip(*columns):
        print("  ".join(line).rstrip(), flush=True)


def write_picture(path, picture):
    """Write a Pillow image as PNG, and say where it is; only the first process does."""
    common.write_whole(path, lambda file: picture.save(file, "PNG"))
    if common.processes()[0] == 0:
        print(f"As a picture: {path}", file=sys.stderr)


def draw_sheet(path, rows, height=256):
    """Draw crops with captions into a PNG file: rows of cells (crop uint8 [3, H, W], lines, colour
    of a frame or None). A line is a text or a (text, colour); what is too long is cut."""
    font = ImageFont.load_default(14)
    margin = 8
    line_height = 18
    crop = rows[0][0][0]
    width = round(height * crop.shape[2] / crop.shape[1])
    lines = max(max(len(lines) for _, lines, _ in row) for row in rows)
    cell_width = max(150, width) + 2 * margin
    cell_height = height + line_height * lines + 3 * margin
    columns = max(len(row) for row in rows)
    size = (cell_width * columns + margin, cell_height * len(rows) + margin)
    picture = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(picture)

    for i, row in enumerate(rows):
        for k, (crop, lines, frame) in enumerate(row):
            x = margin + k * cell_width
            y = margin + i * cell_height
            image = Image.fromarray(crop.permute(1, 2, 0).numpy())
            image = image.resize((width, height), Image.Resampling.BICUBIC)
            picture.paste(ImageOps.expand(image, 4, frame or "white"), (x - 4, y - 4))
            for j, line in enumerate(lines):
                if isinstance(line, str):
                    line = (line, INK)
                text, colour = line
                text = fit_text(text, pen, font, cell_width - 2 * margin)
                pen.text((x, y + height + margin + line_height * j), text, colour, font)
    write_picture(path, picture)


def draw_chart(title, lines, bottom, left, right, left_colour=INK, right_colour=INK):
    """Draw lines, with a legend of their names: -> Pillow image of 1120 x 620 pixels.

    lines: dict of name -> points, float [n, 2], from 0 to 1 across and upwards. bottom: list of
    (place from 0 to 1, text); left, right: five texts each, from the bottom to the top."""
    font = ImageFont.load_default(40)
    picture = Image.new("RGB", (2240, 1240), "white")  # twice as large, to be reduced
    pen = ImageDraw.Draw(picture)
    pen.text((40, 60), title, INK, font, "lm")
    for place, text in bottom:
        pen.text((140 + 1940 * place, 1160), text, INK, font, "ma")
    for k, text in enumerate(left):
        pen.text((118, 1140 - 990 * k / 4), text, left_colour, font, "rm")
    for k, text in enumerate(right):
        pen.text((2102, 1140 - 990 * k / 4), text, right_colour, font, "lm")

    legend = 2200
    for (name, points), colour in zip(lines.items(), COLOURS):
        pixels = [(140 + 1940 * x, 1140 - 990 * y) for x, y in points.tolist()]
        pen.line(pixels, colour, 8, joint="curve")
        if len(pixels) < 100:  # few enough to be seen each
            for pixel in pixels:
                pen.circle(pixel, 10, colour)
        pen.text((legend, 60), name, colour, font, "rm")
        legend -= pen.textlength(name, font) + 60
    return picture.reduce(2)


def draw_training(record):
    """Draw the loss, and the figures on validation in per cent, over the epochs of a record: -> as
    `draw_chart`."""
    epochs = record["epochs"]
    count = len(epochs)
    places = torch.linspace(0, 1, count)
    highest = max([1e-9] + [row["loss"] for row in epochs])
    values = {"loss": [row["loss"] / highest for row in epochs]}
    for name in record["metrics"]:
        if name != "epoch":  # which stands for none
            values[name] = [row[name] for row in epochs]
    lines = {}
    for name, heights in values.items():
        lines[name] = torch.stack([places, torch.tensor(heights)], 1)

    shown = torch.linspace(1, count, min(count, 5)).round().int().tolist()
    bottom = [((epoch - 1) / max(1, count - 1), str(epoch)) for epoch in shown]
    left = [f"{highest * k / 4:.2g}" for k in range(5)]
    right = [f"{25 * k} %" for k in range(5)]
    title = f"Training: epoch {record['best epoch']} of {count} is the best"
    if len(lines) == 1:
        title = f"Training: {count} epochs"
        right = []
    return draw_chart(title, lines, bottom, left, right, left_colour=COLOURS[0])


def stack_pictures(pictures):
    """One picture above the other: Pillow images of one width -> Pillow image."""
    height = sum(picture.height for picture in pictures)
    whole = Image.new("RGB", (pictures[0].width, height))
    top = 0
    for picture in pictures:
        whole.paste(picture, (0, top))
        top += picture.height
    return whole


def fit_text(text, pen, font, width):
    """Cut a text to a width in pixels; the font has no other letters than ASCII's."""
    text = common.printable(text).encode("ascii", "replace").decode()
    while pen.textlength(text, font) > width:
        text = text.removesuffix("...")[:-1] + "..."
    return text


# ------------------------------------------------------------------------------------------
# Training and scoring.


def load_train(args, annotated=True):
    """The train set; UserError if it holds junk or, where annotations are needed, none."""
    market = common.load_market(args.data, "train", args.size, annotated)
    refuse_nobody(market, args.data, "train")
    if annotated and (market.labels < 0).any():
        raise UserError(
            f"{args.data}: no annotations in annotations_train.csv or market_attribute.mat. Put "
            "one there; reid.py needs none, but with --recipe strong add --without attributes."
        )
    return market


def refuse_nobody(market, root, part):
    """UserError where a part of the data set in folder `root` that has to show people holds
    distractors or junk."""
    nobody = (market.person_ids < 1).nonzero()[:, 0].tolist()
    if not nobody:
        return
    names = common.name_some([market.names[row] for row in nobody])
    taken = [0]
    for other in common.PARTS:
        numbers = [common.parse_crop_name(name) for name in common.list_crops(root, other)]
        taken += [person_id for person_id, _ in filter(None, numbers)]
    raise UserError(
        "Identity 0 stands for distractors and -1 for junk, which are only looked at in the "
        f"gallery, but {root / common.PARTS[part]} holds {names}. Move them away or, if 0 is a "
        f"person, give it a free number in all their names: {max(taken) + 1:04d} for 0."
    )


def describe_split(market, rows, validation, seen):
    """What a checkpoint says of the data that it is trained on, `rows` of a `Market`, and validated
    on, other rows.

    seen: which data sets the weights that it starts from were trained on, a list of dicts: "names",
    of the whole train set's crops, and "train_ids"; this one is added."""
    train_ids = market.person_ids[rows].unique()
    counts = class_counts(market.labels[rows])
    return {
        "train_ids": train_ids,
        "validation_ids": market.person_ids[validation].unique(),
        "commonest": torch.stack([count.argmax() for count in counts]),
        "seen": [*seen, {"names": market.names, "train_ids": train_ids}],
    }


def is_same_data(names, others):
    """Whether two lists of crops' names are of one data set: by more than half of the shorter list.
    Identities tell nothing, as everyone's have the same numbers, and formats can be changed."""
    ours = {Path(name).stem for name in names}
    theirs = {Path(name).stem for name in others}
    return 2 * len(ours & theirs) > min(len(ours), len(theirs))


def check_unseen(seen, market, validation, source):
    """UserError if weights, from the file `source`, were trained on people to validate on; seen: as
    of `describe_split`."""
    people = market.person_ids[validation]
    for data in seen:
        trained_on = torch.isin(people, data["train_ids"]).any()
        if trained_on and is_same_data(data["names"], market.names):
            raise UserError(
                f"{source} was trained on people of this data set, known by the names of their "
                "crops, that would be validated on. If these are others, give their crops other "
                "names; else keep the split, by the same --seed, or by reid.py --init FILE, a "
                "checkpoint of par.py."
            )


def saved_split(checkpoint, market, path):
    """The split kept in a checkpoint, over a `Market`: (train [N] bool, validation [N] bool)."""
    train = checkpoint["train_ids"]
    validation = checkpoint["validation_ids"]
    known = torch.cat([train, validation]).sort()[0]
    same_data = is_same_data(checkpoint["seen"][-1]["names"], market.names)
    if not same_data or not torch.equal(known, market.person_ids.unique()):
        raise UserError(
            f"{path} was trained on another data set: pass its --data or, to go on with other "
            f"people, --weights {path} instead."
        )
    return torch.isin(market.person_ids, train), torch.isin(market.person_ids, validation)


def load_validation(args, checkpoint, annotated=True):
    """What a checkpoint was validated on: -> (the train set of --data, int64 [n] rows of it), or
    (None, no rows), which is said."""
    names = common.list_crops(args.data, "train")
    if len(checkpoint["validation_ids"]) == 0:
        reason = f"{args.eval} was trained on all identities"
    elif not is_same_data(checkpoint["seen"][-1]["names"], names):
        reason = f"{args.data} does not hold the train set of {args.eval}"
    else:
        market = load_train(args, annotated)
        validation = torch.isin(market.person_ids, checkpoint["validation_ids"])
        return market, validation.nonzero()[:, 0]
    print(f"\n{reason}: no validation.")
    return None, torch.zeros(0, dtype=torch.int64)


def train(args, record, market, split):
    """Train with args.loss, write checkpoint and record: -> as `score_and_show`, on validation."""
    rows, validation = [which.nonzero()[:, 0] for which in split]
    state, seen = starting_weights(args)
    check_unseen(seen, market, validation, args.weights)
    known = describe_split(market, rows, validation, seen)
    people = len(known["train_ids"])
    torch.manual_seed(args.seed)  # the same start for each loss
    model = make_network(vars(args), identities=people, state=state).to(args.device)
    loss = RecognitionLoss(args, market, rows)

    def sample_epoch(generator):  # each crop once
        return rows[torch.randperm(len(rows), generator=generator)][:, None]

    def validate():
        predicted, _ = predict(model, market.images, validation)
        accuracy, f1 = score(predicted, market.labels[validation])
        return {"f1": f1.mean().item(), "accuracy": accuracy.mean().item()}

    print(
        f"\n{LOSSES[args.loss][0]}: {len(rows)} training and {len(validation)} validation crops of "
        f"{people} and {len(known['validation_ids'])} identities"
    )
    checkpoint = {"kind": "par", "record": copy.deepcopy(record), **known}
    record = common.fit(model, market.images, sample_epoch, loss, validate, args, checkpoint)
    with common.timed(record["seconds"], "scoring"):
        title = f"{args.out} on validation (%)"
        scores = score_and_show(title, model, market, validation, known["commonest"])
    rounded = {}
    for name, values in scores.items():
        rounded[name] = {attribute: round(value, 4) for attribute, value in values.items()}
    record["final"] = {"best epoch": record["best epoch"], "validation": rounded}
    write_picture(args.out.with_suffix(".png"), draw_training(record))
    common.write_record(args.out, record)
    say_seconds(record["seconds"])
    return scores


def output_of_loss(out, kind):
    """Where --loss all writes the checkpoint of one loss."""
    return out.with_stem(f"{out.stem}_{kind}")


def train_all_losses(args, record, market, split):
    """Train with each of the four losses, and print [report] tables 2 and 3."""
    scores = {}
    for kind in LOSSES:
        out = output_of_loss(args.out, kind)
        loss_args = argparse.Namespace(**vars(args) | {"loss": kind, "out": out})
        scores[kind] = train(loss_args, record, market, split)
    for title, name in (("Table 2: accuracy", "accuracy"), ("Table 3: macro F1", "f1")):
        columns = {LOSSES[kind][0]: found[name] for kind, found in scores.items()}
        columns["commonest"] = scores["ce"][f"commonest {name}"]
        show_scores(f"{title} (%) on validation", columns)


def load_network(checkpoint, device):
    """The network of a checkpoint of stage 1, or of the strong stage 2."""
    settings = checkpoint["record"]["arguments"]
    attributes = checkpoint["kind"] == "par" or "attributes" in settings["rungs"]
    model = make_network(settings, attributes, len(checkpoint["train_ids"]))
    model.load_state_dict(checkpoint["model"])
    return model.to(device)


class Recogniser:
    """A trained network that predicts attributes, to be called with uint8 crops [N, 3, H, W] (RGB,
    of any size): -> (classes int64 [N, 12], their probabilities float32 [N, 12]), on the CPU."""

    def __init__(self, checkpoint, device):
        self.model = load_network(checkpoint, device)
        self.size = checkpoint["record"]["arguments"]["size"]

    def __call__(self, crops):
        return predict(self.model, resize_crops(crops, self.size))


def load_recogniser(path, device="auto"):
    """Load a checkpoint of par.py, or one of reid.py that predicts attributes: -> `Recogniser`.
    UserError, a ValueError, says why it cannot be used."""
    return Recogniser(load_predictor(path), choose_device(device))


def load_predictor(path):
    """The checkpoint that predicts attributes: that of par.py in file `path` or, of one of reid.py,
    itself or the stage 1 kept in it."""
    checkpoint = common.load_checkpoint(path, "par", "reid")
    rungs = checkpoint["record"]["arguments"]["rungs"]
    if checkpoint["kind"] == "reid" and "attributes" not in rungs:
        checkpoint = checkpoint["stage 1"]
        if checkpoint is None:
            raise UserError(f"{path} predicts no attributes: pass a checkpoint of par.py.")
    return checkpoint


def evaluate(args, record, checkpoint):
    """Score a checkpoint on the validation identities and on the test identities' gallery crops, if
    they are annotated."""
    model = load_network(checkpoint, args.device)
    seconds = record["seconds"]
    with common.timed(seconds, "loading"):
        market, validation = load_validation(args, checkpoint)
        parts = [("validation", market, validation)]
        if common.list_crops(args.data, "gallery"):
            test = common.load_market(args.data, "gallery", args.size)
            parts.append(("test", test, (test.labels >= 0).all(1).nonzero()[:, 0]))
    scored = [part for part in parts if len(part[2]) > 0]
    if not scored:
        raise UserError(
            f"{args.data} holds no annotated crops to score: put annotations_test.csv or "
            "market_attribute.mat there."
        )

    for name, part, rows in scored:
        people = len(part.person_ids[rows].unique())
        title = f"{args.eval} on {len(rows)} {name} crops of {people} identities (%)"
        with common.timed(seconds, "scoring"):
            score_and_show(title, model, part, rows, checkpoint["commonest"])
    if scored[-1][0] != "test":
        print(f"\n{args.data} holds no annotated test crops: these are not scored.")
    say_seconds(seconds)


# ------------------------------------------------------------------------------------------
# The user's own images, and statistics.


def list_files(paths):
    """The user's own files, and those in folders and below, but for hidden ones: -> list of Path.
    Links to folders are followed, each real folder once. What cannot be read is named on stderr."""
    files = []
    for path in map(Path, paths):
        if path.is_file():
            files.append(path)
            continue
        inside = []
        visited = set()
        folders = [path]
        while folders:  # links come last, so that a file has its own name where it has one
            links, found = walk(folders.pop(0), visited)
            folders += links
            inside += found
        for file in sorted(inside):
            if file.is_file():
                files.append(file)
            else:
                name = common.printable(str(file))
                print(f"Skipped: {name} is no file, nor a link to one.", file=sys.stderr)
    return files


def walk(top, visited):
    """What is in a folder and below, but for hidden things: -> (links to folders, files), lists of
    Path. visited: a set of the real folders that are done with; the new ones are added."""

    def name_skipped(error):
        name = common.printable(str(error.filename))
        print(f"Skipped: {name} cannot be read ({error.strerror}).", file=sys.stderr)

    links = []
    files = []
    for folder, folders, names in os.walk(top, onerror=name_skipped):
        real = Path(os.path.realpath(folder))
        shown = [name for name in folders if not common.is_ignored(name)]
        folders.clear()  # what is in it from here on is walked on in
        if real in visited:
            continue
        visited.add(real)
        for name in sorted(shown):
            if os.path.realpath(real / name) == str(real / name):
                folders.append(name)
            else:
                links.append(Path(folder, name))
        files += [Path(folder, name) for name in names if not common.is_ignored(name)]
    return links, files


def read_blocks(files, size, seconds):
    """Read files in blocks, in bounded memory: yields (uint8 crops [n, 3, H, W] of `size`, their n
    files). What cannot be read is named on stderr, and so is, on a terminal, how far it is."""
    count = max(1, common.BLOCK_PIXELS // (size[0] * size[1]))
    begin = time.perf_counter()
    for start in range(0, len(files), count):
        with common.timed(seconds, "reading"):
            crops, read = common.read_crops(files[start : start + count], size, skip=True)
        if read:
            yield crops, read
        done = min(start + count, len(files))
        left = round((time.perf_counter() - begin) * (len(files) / done - 1))
        common.show_line(f"{done} of {len(files)} images, {left // 60}:{left % 60:02} left")
    common.show_line("")


class Predicted(NamedTuple):
    """What the pictures of --predict show of an image."""

    file: Path
    crop: torch.Tensor  # uint8 [3, H, W]
    classes: torch.Tensor  # int64 [12]
    lines: list[str]  # each attribute's class and its probability


def predict_files(args, record, checkpoint):
    """Write the attributes of the user's own images as CSV on standard output, block after block;
    with --sheet and --maps also draw the first of them."""
    recogniser = Recogniser(checkpoint, args.device)
    seconds = record["seconds"]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # names that are no text, as they are
    writer = csv.writer(sys.stdout, lineterminator="\n")
    header = ["file", *ATTRIBUTES] + [f"{attribute}_probability" for attribute in ATTRIBUTES]
    first = []
    for crops, files in read_blocks(list_files(args.predict), args.size, seconds):
        with common.timed(seconds, "predicting"):
            classes, probabilities = recogniser(crops)
        if not first:
            writer.writerow(header)
        rows = zip(files, classes.tolist(), probabilities.tolist())
        for k, (file, codes, sure) in enumerate(rows):
            names = [own[code] for own, code in zip(ATTRIBUTES.values(), codes)]
            writer.writerow([file, *names, *[f"{p:.3f}" for p in sure]])
            if len(first) < 60:
                columns = zip(ATTRIBUTES, names, sure)
                lines = [f"{attribute}: {name}  {p:.2f}" for attribute, name, p in columns]
                first.append(Predicted(file, crops[k].clone(), classes[k], lines))
        sys.stdout.flush()
    if not first:
        raise UserError(f"No image could be read from {', '.join(map(str, args.predict))}.")
    say_seconds(seconds, sys.stderr)
    if args.sheet:
        draw_predictions(args.out.with_name("par_sheet.png"), first)
    if args.maps:
        draw_maps(args.out.with_name("par_maps.png"), first[:20], recogniser.model)


def draw_predictions(path, predicted):
    """Draw `Predicted` crops with their attributes, six in a row."""
    cells = [(one.crop, [one.file.stem, *one.lines], None) for one in predicted]
    draw_sheet(path, [cells[i : i + 6] for i in range(0, len(cells), 6)])


def draw_maps(path, predicted, model):
    """Draw `Predicted` crops, a row each, and in orange where each attribute comes from."""
    crops = torch.stack([one.crop for one in predicted])
    classes = torch.stack([one.classes for one in predicted])
    maps = activation_maps(model, crops, classes)
    maps = maps - maps.amin((2, 3), keepdim=True)
    maps = F.interpolate(maps, crops.shape[2:], mode="bilinear")[:, :, None]  # [n, 12, 1, H, W]
    share = 0.7 * (maps / maps.amax((3, 4), keepdim=True).clamp(min=1e-9)) ** 2
    orange = torch.tensor([213.0, 94.0, 0.0]).view(3, 1, 1)
    lit = (crops[:, None] * (1 - share) + orange * share).byte()  # [n, 12, 3, H, W]
    rows = []
    for one, pictures in zip(predicted, lit):
        row = [(one.crop, [one.file.stem], None)]
        row += [(picture, [line], None) for picture, line in zip(pictures, one.lines)]
        rows.append(row)
    draw_sheet(path, rows, height=192)


def statistics(args):
    """Print how often each class occurs in the train set ([report] table 4) and draw it (figure
    4)."""
    market = load_train(args)
    # A row for each identity.
    identities = torch.cat([market.person_ids[:, None], market.labels], 1).unique(dim=0)
    crop_counts = class_counts(market.labels)
    identity_counts = class_counts(identities[:, 1:])
    rows = []
    for k, (attribute, classes) in enumerate(ATTRIBUTES.items()):
        for name, crops, people in zip(classes, crop_counts[k], identity_counts[k]):
            share = 100 * (crops / crop_counts[k].sum()).item()
            people_share = 100 * (people / identity_counts[k].sum()).item()
            row = [f"{attribute} {name}", f"{crops:.0f}", share, f"{people:.0f}", people_share]
            rows.append(row)
    print_table(
        f"Table 4: classes in {args.data}, {len(market.names)} train crops of {len(identities)} "
        "identities",
        ["", "crops", "%", "identities", "%"],
        rows,
    )
    draw_statistics(args.out.with_name("par_stats.png"), rows)


def draw_statistics(path, rows):
    """[report] figure 4: a bar for each row of `statistics`."""
    font = ImageFont.load_default(26)
    tall = 40
    picture = Image.new("RGB", (1240, tall * (len(rows) + 2)), "white")
    pen = ImageDraw.Draw(picture)
    pen.text((350, tall), "Figure 4: % of the train crops", INK, font, "lm")
    for k, (name, _, percent, *_) in enumerate(rows):
        y = tall * (k + 2)
        end = 350 + 7 * percent
        attribute = list(ATTRIBUTES).index(name.split()[0])
        pen.text((335, y), name, INK, font, "rm")
        pen.rectangle((350, y - 15, end, y + 15), COLOURS[attribute % 2])
        pen.text((end + 12, y), f"{percent:.1f} %", INK, font, "lm")
    write_picture(path, picture)


# ------------------------------------------------------------------------------------------
# Networks for other programs.


class AttributeExport(nn.Module):
    """What --export writes: crops [N, 3, H, W] in 0..255 -> what `most_probable` returns."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, crops):
        return most_probable(log_probabilities(self.model(crops).logits))


def write_network(path, network, outputs, size):
    """Write a network of N crops [N, 3, H, W], with its normalisation and its mirror image, for
    programs without this code: as PyTorch's .pt2, which takes uint8, or as .onnx, which takes
    float32 in 0..255, as not all that read it take uint8. It computes in float32.

    outputs: the names of what it returns; size: (height, width). UserError where packages lack."""
    network = network.to(memory_format=torch.contiguous_format)  # what a .pt2 can store
    network.eval().requires_grad_(False)
    crops = torch.zeros(2, 3, *size, dtype=torch.uint8)
    if path.suffix == ".onnx":
        crops = crops.float()
    any_number = ({0: torch.export.Dim("crops", max=2**31)},)
    # Not strict: PyTorch 2.6 cannot read its own file of a strict one.
    program = torch.export.export(network, (crops,), dynamic_shapes=any_number, strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # which has the folders of this machine
    if path.suffix == ".pt2":
        common.write_whole(path, lambda file: torch.export.save(program, file))
    else:
        model = convert_to_onnx(path, program, outputs)
        common.write_whole(path, lambda file: file.write(model))
    kind = "uint8" if path.suffix == ".pt2" else "float32, 0 to 255"
    print(f"{path}: crops [N, 3, {size[0]}, {size[1]}], {kind}, RGB -> {' and '.join(outputs)}")


def convert_to_onnx(path, program, outputs):
    """The bytes of an exported program as .onnx, for file `path`."""
    if not (importlib.util.find_spec("onnx") and importlib.util.find_spec("onnxscript")):
        raise UserError(f"Writing {path} takes two packages: pip install onnx onnxscript.")
    try:
        converted = torch.onnx.export(
            program,
            input_names=["crops"],
            output_names=outputs,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        return converted.model_proto.SerializeToString()
    except Exception as error:  # of three packages, which may not fit together
        raise UserError(
            f"PyTorch {torch.__version__} cannot write ONNX with these onnx and onnxscript "
            f"({type(error).__name__}): install newer ones of all three, or write a .pt2."
        ) from None


# ------------------------------------------------------------------------------------------
# The command line of both scripts.

TRAINING_FLAGS = "recipe weights epochs lr warmup batch patience seed resume"


def uses_muon(args):
    """Whether the command line asks for training with the optimiser Muon."""
    return not args.eval and args.recipe == "strong" and "muon" not in args.without


def number(kind, low, high=10**9, word=None):
    """An argparse type: `kind`, int or float, from `low` to `high`; or `word`."""

    def number(text):  # argparse says this name if `kind` cannot read the text
        if text == word:
            return text
        if not low <= kind(text) <= high:
            wanted = f"a number from {low} to {high}"
            if word is not None:
                wanted = f"{word} or {wanted}"
            raise argparse.ArgumentTypeError(f"{text} is not {wanted}")
        return kind(text)

    return number


def image_size(text):
    """An argparse type: "128x64" -> (128, 64), height and width."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    size = (int(match[1]), int(match[2])) if match else (0, 0)
    if min(size) < 32 or max(size) > 1024:
        raise argparse.ArgumentTypeError(f"{text} is not HEIGHTxWIDTH, each from 32 to 1024")
    return size


def shared_flags(parser, defaults, out, rungs):
    """Add the flags of both scripts.

    defaults: dict of "report", "strong" and "pretrained" (what else strong has where --weights, or
    those of --init's stage 1, are not none) -> dict of flag -> value. `start` puts in those that
    the command line leaves open."""
    parser.set_defaults(rungs=rungs, defaults=defaults)
    recipe_flags(parser.add_argument_group("recipe (defaults in brackets)"), defaults, rungs)
    group = parser.add_argument_group("data, device and output (defaults in brackets)")
    group.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder of Market-1501 (./Market-1501-v15.09.15, else a drawn demo set)",
    )
    group.add_argument(
        "--size",
        type=image_size,
        metavar="HxW",
        help="height x width that crops are resized to (128x64, or as --init or --eval was "
        "trained)",
    )
    group.add_argument(
        "--seed",
        type=number(int, 0, 2**32 - 1),
        default=0,
        metavar="N",
        help="seed of split, weights and sampling (0)",
    )
    group.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda", "mps"),
        default="auto",
        help="compute on this device (auto: the fastest there is)",
    )
    group.add_argument(
        "--out",
        type=Path,
        default=Path(out),
        metavar="FILE",
        help="write the best checkpoint here, and pictures beside it (%(default)s)",
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on with a run that was cut off, after its last whole epoch",
    )


def recipe_flags(group, defaults, rungs):
    """Add what says how to train."""
    group.add_argument(
        "--recipe",
        choices=("report", "strong"),
        default="report",
        help="train as the report does, or with all that is known since (report)",
    )
    group.add_argument(
        "--without",
        nargs="+",
        default=[],
        choices=rungs,
        metavar="STEP",
        help="leave these steps out of the strong recipe: " + ", ".join(rungs),
    )
    group.add_argument(
        "--weights",
        metavar="W",
        help="start from imagenet, none or a FILE: of torchvision's ResNet18, or a checkpoint of "
        "these scripts, to go on with other people (imagenet; for the demo set: none)",
    )
    group.add_argument(
        "--warmup",
        type=number(float, 0, 1),
        default=0.1,
        metavar="F",
        help="fraction of all steps in which the rate rises, before it falls to 0 (0.1)",
    )
    whole = number(int, 1)
    by_recipe = {
        "epochs": (whole, "train for N epochs"),
        "lr": (number(float, 1e-12), "peak learning rate"),
        "batch": (
            number(int, 2),
            "images, triplets or, by stage 2's strong recipe, groups of four crops of an identity "
            "in a step",
        ),
        "patience": (whole, "stop after N epochs without a better one"),
        "muon": (
            number(float, 1e-12),
            "by the strong recipe, move a filter by N times the rate, as a share of its length",
        ),
    }
    for name, (kind, text) in by_recipe.items():
        values = ", ".join(
            f"{recipe}: {own[name]}" for recipe, own in defaults.items() if name in own
        )
        group.add_argument(f"--{name}", type=kind, metavar="N", help=f"{text} ({values})")


def export_flag(group):
    """Add the flag of both scripts that writes a network for other programs."""
    group.add_argument(
        "--export",
        type=Path,
        metavar="F.pt2",
        help="write the network for programs without this code: .pt2 for PyTorch, or .onnx",
    )


def start(args, source=None, checkpoint=None, data=True):
    """Settle what the command line leaves open, say so, and begin the run's record: -> that dict.

    A checkpoint, read from the file `source`, decides the size. data: whether the command reads the
    data set."""
    args.device = choose_device(args.device)
    if "RANK" in os.environ:  # torchrun has started this process
        join_processes(args)
    torch.backends.cudnn.benchmark = True  # shapes do not change, so choosing an algorithm pays
    keep_freed_memory()

    if args.out.is_symlink():  # then the files beside what it points to are the run's
        args.out = Path(os.path.realpath(args.out))
    size = args.size or (128, 64)
    if checkpoint is not None:
        size = checkpoint["record"]["arguments"]["size"]
    if args.size not in (None, size):
        raise UserError(f"{source} was trained with another --size: leave that out.")
    args.size = size
    if data:
        args.data = find_data(args.data, source, checkpoint)
        demo = (args.data / common.DRAWN).is_file()
    else:
        args.data = Path(checkpoint["record"]["data"]["folder"])
        demo = checkpoint["record"]["data"]["drawn demo set"]
    if args.weights is None:
        args.weights = "none" if demo else "imagenet"
        if checkpoint is not None:
            args.weights = checkpoint["record"]["arguments"]["weights"]
    settle_recipe(args)
    world = common.processes()[1]
    if args.batch % world != 0 or args.batch < 2 * world:
        raise UserError(
            f"--batch {args.batch} cannot be shared by {world} processes: give a multiple of "
            f"{world}, two or more for each."
        )

    record = {
        "data": {"folder": str(args.data.absolute()), "drawn demo set": demo},
        "seconds": {},
        "precision": common.precision(torch.device(args.device)),
        "threads": torch.get_num_threads(),
        "processes": world,
        "machine": platform.platform(),
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "torchvision": torchvision.__version__,
        },
    }
    describe_start(args, record, source, data)
    return record


def choose_device(asked):
    """The name of the device to compute on, which is asked for as "auto", "cuda", "cuda:1" or a
    torch.device; UserError where PyTorch finds none of that name, or one that cannot compute, as an
    old GPU or a virtual Mac."""
    asked = str(asked)
    best = "cpu"
    if torch.cuda.is_available():
        best = "cuda"
    elif torch.backends.mps.is_available() and "RANK" not in os.environ:
        best = "mps"  # which cannot send to other processes
    if asked.partition(":")[0] not in ("auto", "cpu", best):
        raise UserError(
            f"PyTorch {torch.__version__} finds no {asked} device here: pass --device {best}."
        )
    device = best if asked == "auto" else asked
    try:
        if device == "cuda" and "RANK" in os.environ:  # one for each process of this machine
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.ones(1, device=device).item()
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"The {device} device is there but cannot compute ({reason}): pass --device cpu."
        ) from None
    return device


def join_processes(args):
    """Meet the other processes that torchrun has started, to train."""
    if args.eval or vars(args).get("stats"):
        raise UserError("Several processes only train: run this command without torchrun.")
    backend = "gloo"
    try:
        if args.device == "cuda" and dist.is_nccl_available():
            backend = "nccl"
        dist.init_process_group(backend)
    except (KeyError, ValueError, RuntimeError) as error:
        raise UserError(
            f"The processes of this run cannot meet ({error}): start them by "
            "torchrun, no more on a machine than it has GPUs, or unset the variable RANK."
        ) from None


def keep_freed_memory():
    """On Linux with glibc, keep freed blocks for the next training step, which would else have each
    mapped and zeroed anew: a tenth of the training speed on a CPU. Elsewhere this does nothing."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        m_trim_threshold = -1
        m_mmap_threshold = -3
        libc.mallopt(m_trim_threshold, 2**31 - 1)
        libc.mallopt(m_mmap_threshold, 2**25)  # its upper limit


def find_data(folder, source, checkpoint):
    """--data or, without it, what a checkpoint, read from the file `source`, was trained on, if it
    is there; else Market-1501 in the working directory; else the demo set there, which is drawn if
    there is no checkpoint that it would not fit."""
    if folder is not None:
        if not folder.is_dir():
            raise UserError(f"--data {folder} is not a folder.")
        return folder
    places = [Path("Market-1501-v15.09.15"), Path("Market-1501-demo")]
    if checkpoint is not None:
        places.insert(0, Path(checkpoint["record"]["data"]["folder"]))
    for place in places:
        if place.is_dir():
            return place
    if checkpoint is not None:
        raise UserError(f"{source} was trained on {places[0]}, which is not here: pass --data DIR.")
    draw_demo(places[-1])
    return places[-1]


def draw_demo(demo):
    """Draw the demo set, elsewhere, and put it into its place when it is whole."""
    print(f"Drawing the demo set into ./{demo} ...", flush=True)
    with tempfile.TemporaryDirectory(prefix=".demo-", dir=".") as folder:
        drawn = Path(folder, "demo")
        common.draw_market(drawn, identities=100, images_per_identity=6)
        with contextlib.suppress(OSError):  # another run's is there by now: that will do
            drawn.rename(demo)


def settle_recipe(args):
    """Put into the arguments which steps of the strong recipe to take, and the defaults that the
    command line leaves open. The filters of a stage 1 count as pretrained only if it began from
    such weights, args.weights: what it learned from random ones still has far to go."""
    args.without.sort()
    if args.recipe == "report":
        args.rungs = []
    args.rungs = [rung for rung in args.rungs if rung not in args.without]
    values = args.defaults[args.recipe]
    if args.recipe == "strong" and args.weights != "none":
        values = values | args.defaults["pretrained"]
    for name, value in values.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    del args.defaults


def describe_start(args, record, source, data):
    """Say what the command runs on and with; on stderr if it reads no data set, as results on
    stdout may go into a file."""
    lines = []
    if record["data"]["drawn demo set"]:
        lines.append(
            "DEMO SET of drawn people: its figures say nothing about Market-1501. README says how "
            "to get that."
        )
    height, width = args.size
    parts = [
        f"data {args.data}" if data else f"trained on {args.data}",
        f"{args.device}, {record['precision']}",
        f"{record['processes']} x {record['threads']} threads",
        f"{height}x{width}",
        f"weights {args.weights}" if source is None else str(source),
    ]
    if not args.eval:
        parts.append(f"seed {args.seed}")
    lines.append(" | ".join(parts))
    for line in lines:
        print(common.printable(line), file=sys.stdout if data else sys.stderr, flush=True)


def check_output(path, suffix):
    """Make the folder of `path`, and try to write a file there with the longest name that the work
    will give to one: better before it than after."""
    if path.is_dir() or path.suffix != suffix:
        raise UserError(f"{path} is no name for the file to write: give one that ends in {suffix}.")
    target = Path(os.path.realpath(path))  # where it points, if it is a link
    if suffix == ".pt":
        target = target.with_suffix(".old.json")
    probe = target.with_name(f".{target.name}.{os.getpid()}.tmp")  # as `common.write_whole` has it
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}): choose another place."
        ) from None


def refuse_idle_flags(parser, args, rules):
    """End with a sentence if a flag has another value than its default, and no effect, or if --out
    is no name for a checkpoint.

    rules: tuples of names, whether they have an effect here, and what they go with."""
    if args.out.suffix != ".pt":
        parser.error(f"--out {args.out} is no name for a checkpoint: give one that ends in .pt.")
    if args.without and (args.recipe == "report" or args.eval):
        parser.error(
            "--without leaves steps out of training by --recipe strong: pass that too, and no "
            "--eval."
        )
    for names, effective, companion in rules:
        for name in names.split():
            given = getattr(args, name) != parser.get_default(name)
            if given and not effective:
                flag = "--" + name.replace("_", "-")
                parser.error(f"{flag} has no effect here, but only {companion}: leave it out.")


def check_export(parser, args):
    """End with a sentence where --export names no checkpoint or no file to write."""
    if args.export and not args.eval:
        parser.error("--export FILE needs --eval FILE, the checkpoint to export.")
    if args.export and args.export.suffix not in (".pt2", ".onnx"):
        parser.error(f"--export {args.export}: give a name that ends in .pt2 or .onnx.")


def say_seconds(seconds, file=None):
    """Print where the time went, and the peak memory."""
    parts = [f"{what} {value:.1f}" for what, value in seconds.items()]
    print("Seconds: " + ", ".join(parts), file=file)
    peak = [
        f"{megabytes / 1000:.1f} GB ({where})" for where, megabytes in common.peak_memory().items()
    ]
    if peak:
        print("Peak memory: " + " and ".join(peak), file=file)


# ------------------------------------------------------------------------------------------
# The command line of par.py.

# What --without can leave out of the strong recipe; "identity": identities beside attributes;
# "neck": the BNNeck; "mirror": the mirror image at test.
RUNGS = ["identity", "neck", "stride", "erasing", "shift", "muon", "mirror"]
DEFAULTS = {
    "report": {"epochs": 15, "lr": 3e-4, "batch": 32, "patience": 5},
    "strong": {"epochs": 10, "lr": 2e-3, "batch": 64, "patience": 999, "muon": 20},
    "pretrained": {"muon": 5},
}


def make_parser():
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]",
        description=__doc__.split("[report]")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    loss_flags(parser.add_argument_group("stage 1"))
    group = parser.add_argument_group("instead of training").add_mutually_exclusive_group()
    group.add_argument(
        "--eval", type=Path, metavar="FILE", help="score this checkpoint, also one of reid.py"
    )
    group.add_argument(
        "--stats",
        action="store_true",
        help="print the class frequencies of the train set: table 4 and figure 4",
    )
    group = parser.add_argument_group("with --eval")
    group.add_argument(
        "--predict",
        type=Path,
        nargs="+",
        metavar="PATH",
        help="predict the attributes of images and folders, as CSV",
    )
    group.add_argument(
        "--sheet",
        action="store_true",
        help="draw the first 60 of --predict with their attributes: par_sheet.png",
    )
    group.add_argument(
        "--maps",
        action="store_true",
        help="draw where the attributes of the first 20 of --predict come from: par_maps.png",
    )
    export_flag(group)
    shared_flags(parser, DEFAULTS, "par_best.pt", RUNGS)
    return parser


def loss_flags(group):
    group.add_argument(
        "--loss",
        choices=[*LOSSES, "all"],
        default="wce",
        help="cross-entropy; weighted by inverse class frequency; focal; alpha-focal, which is "
        "both; or all in turn (wce, the report's best by F1)",
    )
    group.add_argument(
        "--gamma",
        type=number(float, 0),
        default=2.0,
        metavar="G",
        help="exponent of the focal losses (2, Lin et al. 2018)",
    )
    group.add_argument(
        "--head",
        choices=list(HEADS),
        default="linear",
        help="conv: each attribute looks for itself, by a branch of its own (linear)",
    )
    group.add_argument(
        "--dropout",
        type=number(float, 0, 0.99),
        default=0.5,
        metavar="P",
        help="probability of dropout before each head (0.5)",
    )


def check_flags(parser, args):
    """End with a sentence where flags do not go together."""
    if args.predict and not args.eval:
        parser.error("--predict PATH... needs --eval FILE, the checkpoint to predict with.")
    if args.export and args.predict:
        parser.error("--export and --predict PATH... do two things: run the script for each.")
    check_export(parser, args)
    training = not args.eval and not args.stats
    focal = training and (args.loss == "all" or LOSSES[args.loss][2])
    rules = [
        ("gamma", focal, "with --loss focal, alpha or all"),
        ("loss head dropout", training, "in training"),
        (TRAINING_FLAGS, training, "in training"),
        ("muon", uses_muon(args), "in training by --recipe strong with its step muon"),
        ("sheet maps", args.predict, "with --predict PATH..."),
        ("size", not args.stats, "where crops are given to a network"),
    ]
    refuse_idle_flags(parser, args, rules)


def train_all(args, record):
    """Train with one loss or with all."""
    outs = [args.out]
    if args.loss == "all":
        outs = [output_of_loss(args.out, kind) for kind in LOSSES]
    for out in outs:
        check_output(out, ".pt")
    with common.timed(record["seconds"], "loading"):
        market = load_train(args)
    record["fingerprints"] = {"data set": market.fingerprint()}
    split = common.split_identities(market.person_ids, seed=args.seed)
    if args.loss == "all":
        train_all_losses(args, record, market, split)
    else:
        train(args, record, market, split)


def main(args):
    checkpoint = None
    if args.eval:
        checkpoint = load_predictor(args.eval)
    record = start(args, args.eval, checkpoint, data=not (args.predict or args.export))
    if args.export:
        check_output(args.export, args.export.suffix)
        recogniser = Recogniser(checkpoint, "cpu")
        network = AttributeExport(recogniser.model)
        write_network(args.export, network, ["classes", "probabilities"], recogniser.size)
    elif args.predict:
        if args.sheet or args.maps:
            check_output(args.out.with_name("par_sheet.png"), ".png")
        predict_files(args, record, checkpoint)
    elif args.eval:
        evaluate(args, record, checkpoint)
    elif args.stats:
        check_output(args.out.with_name("par_stats.png"), ".png")
        statistics(args)
    else:
        train_all(args, record)


if __name__ == "__main__":
    common.run(make_parser(), check_flags, main)
