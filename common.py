#!/usr/bin/env python3
"""What par.py and reid.py share: Market-1501 and its drawn stand-in, ResNet18, the training loop.

Data flows one way. Every crop is decoded once into one uint8 tensor that stays on the device. An
index tensor says what a step trains on: `fit` gathers those rows, augments them in one batch, and
runs one forward and one backward pass.

In this order: the data, augmentation, the network, the loop, files, errors, and last the drawn
people, which a first reading can skip.

[report] is "Person Attributes Recognition and Re-Identification" (Caldarella, Pedeni, Trebucchi;
University of Trento).
"""

import contextlib
import copy
import functools
import hashlib
import io
import json
import math
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageColor, ImageDraw, ImageFilter, ImageOps, UnidentifiedImageError
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torchvision import models

# Class names in the order of their codes in the annotations, attributes in the order of [report]
# tables 2-4. The last class of both colours, "multi", is the report's own (section 2): an identity
# with no single colour flagged.
ATTRIBUTES = {
    "age": ("young", "teenager", "adult", "old"),
    "gender": ("male", "female"),
    "hair": ("short", "long"),
    "up": ("long", "short"),
    "down": ("long", "short"),
    "clothes": ("dress", "pants"),
    "hat": ("no", "yes"),
    "backpack": ("no", "yes"),
    "bag": ("no", "yes"),
    "handbag": ("no", "yes"),
    "upcolor": ("black", "white", "red", "purple", "yellow", "gray", "blue", "green", "multi"),
    "downcolor": (
        "black",
        "white",
        "pink",
        "purple",
        "yellow",
        "gray",
        "blue",
        "green",
        "brown",
        "multi",
    ),
}
CLASS_COUNTS = [len(classes) for classes in ATTRIBUTES.values()]  # 41 classes in all
# An attribute is annotated by a column of codes or, if it stands here, by a column of flags for
# each class but the last, named by this prefix and the class: upblack, upwhite and so on.
FLAG_PREFIXES = {"upcolor": "up", "downcolor": "down"}
PARTS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
# What systems put beside pictures: Windows, macOS, and the disk stations of Synology.
IGNORED_FILES = ("thumbs.db", "desktop.ini", "$recycle.bin", "__macosx", "@eadir", "#recycle")


class UserError(ValueError):
    """Something the user can put right. Its text is all that is shown: what is wrong, where, what
    to do."""


def name_some(things):
    """The first five of a list as a text, and how many more there are."""
    text = ", ".join(map(str, things[:5]))
    if len(things) > 5:
        text += f" and {len(things) - 5} more"
    return text


def printable(text):
    """A text, such as a file's name, on one line, with ? for what the standard output cannot show,
    or a terminal would act on."""
    line = " ".join(text.splitlines())
    line = "".join(letter if letter.isprintable() else "?" for letter in line)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return line.encode(encoding, "replace").decode(encoding)


# ------------------------------------------------------------------------------------------
# The data.


@dataclass
class Market:
    """A part of a data set in Market-1501's layout, sorted by file name; junk (-1) and distractors
    (0) are kept."""

    images: torch.Tensor  # uint8 [N, 3, H, W], channels last in memory
    person_ids: torch.Tensor  # int64 [N]
    camera_ids: torch.Tensor  # int64 [N]
    labels: torch.Tensor  # int64 [N, 12], class of each attribute; -1: not annotated
    names: list[str]  # N file names

    def fingerprint(self):
        """A hex string of names and labels, for a run to know what it began with."""
        known = json.dumps([self.names, self.labels.tolist()]).encode()
        return hashlib.sha256(known).hexdigest()


def load_market(root, part, size=(128, 64), annotated=True):
    """Read a part ("train", "query" or "gallery") of the data set in folder `root`: -> `Market`.

    size: (height, width); crops of another are resized. annotated: whether labels are wanted; else,
    and where there are no annotations, they are -1. UserError names what is missing or unreadable.
    """
    folder = Path(root) / PARTS[part]
    names = list_crops(root, part)
    if not names:
        raise UserError(
            f"There are no crops in {folder}: --data takes the folder that holds {PARTS[part]}."
        )

    parsed = [parse_crop_name(name) for name in names]
    strangers = [name for name, numbers in zip(names, parsed) if numbers is None]
    if strangers:
        raise UserError(
            f"Not named like a crop of Market-1501 (0002_c1s1_000451_03.jpg: identity 2, camera 1) "
            f"in {folder}: {name_some(strangers)}. Rename that or move it out of the folder."
        )
    person_ids = [person_id for person_id, _ in parsed]
    camera_ids = [camera_id for _, camera_id in parsed]

    annotations = {}
    if annotated:
        annotations = read_annotations(Path(root), "train" if part == "train" else "test")
    missing = sorted(set(person_ids) - annotations.keys() - {-1, 0})
    if annotations and missing:
        raise UserError(
            f"The annotations in {root} lack identities that have crops in {folder.name}: "
            f"{name_some(missing)}."
        )
    labels = [annotations.get(person_id, [-1] * len(ATTRIBUTES)) for person_id in person_ids]

    images, _ = read_crops([folder / name for name in names], size)
    return Market(
        images, torch.tensor(person_ids), torch.tensor(camera_ids), torch.tensor(labels), names
    )


def list_crops(root, part):
    """The file names, sorted, of a part of the data set in folder `root`; an empty list where there
    is none."""
    folder = Path(root) / PARTS[part]
    found = os.listdir(folder) if folder.is_dir() else []
    return sorted(name for name in found if not is_ignored(name))


def is_ignored(name):
    """Whether a file or folder of that name is hidden, or a system's own."""
    return name.startswith(".") or name.lower() in IGNORED_FILES


def parse_crop_name(name):
    """0002_c1s1_000451_03.jpg -> (2, 1): identity and camera; None for another kind of name. The
    ending says nothing, as any format is read."""
    match = re.match(r"(-1|\d{1,9})_c(\d{1,9})(?!\d)", name, re.IGNORECASE)
    if match is None:
        return None
    return int(match[1]), int(match[2])


def annotation_columns(attribute):
    """The names of the columns that annotate an attribute: one of codes, or one of flags for each
    class but the last."""
    if attribute not in FLAG_PREFIXES:
        return [attribute]
    return [FLAG_PREFIXES[attribute] + name for name in ATTRIBUTES[attribute][:-1]]


def read_annotations(root, half):
    """Annotations of a half, "train" or "test": dict of identity -> list of 12 classes; empty where
    there are none. All columns are found by name and coded from 1 (flags: 1 no, 2 yes)."""
    source = root / f"annotations_{half}.csv"
    if not source.is_file():
        source = root / "market_attribute.mat"
    if not source.is_file():
        return {}
    columns = read_annotation_table(source, half)
    check_annotations(source, columns)

    codes = []
    for attribute, classes in ATTRIBUTES.items():
        values = np.stack([columns[name] for name in annotation_columns(attribute)]).astype(int) - 1
        if attribute in FLAG_PREFIXES:
            one_flag = values.sum(0) == 1
            codes.append(np.where(one_flag, values.argmax(0), len(classes) - 1))
        else:
            codes.append(values[0])
    return dict(zip(columns["id"].astype(int).tolist(), np.stack(codes, 1).tolist()))


def check_annotations(source, columns):
    """UserError where a column is missing, a value is no code, or an identity stands there
    twice."""
    highest = {"id": 10**9}  # code of each column
    for attribute, classes in ATTRIBUTES.items():
        codes = 2 if attribute in FLAG_PREFIXES else len(classes)
        highest |= dict.fromkeys(annotation_columns(attribute), codes)
    # NumPy names the second of two equal columns with _1.
    missing = [name for name in highest if name not in columns or f"{name}_1" in columns]
    if missing:
        raise UserError(f"{source} lacks columns, or has them twice: {name_some(missing)}.")

    wrong = []
    for name, high in highest.items():
        for person_id, value in zip(columns["id"], columns[name]):
            if not 1 <= value <= high or value % 1 != 0:
                wrong.append(f"'{name}' of identity {person_id:g} is {value:g}, not 1 to {high}")
    if wrong:
        raise UserError(f"{source}: {name_some(wrong)}.")
    person_ids, counts = np.unique(columns["id"], return_counts=True)
    twice = person_ids[counts > 1].astype(int)
    if len(twice) > 0:
        raise UserError(f"{source} names identities twice: {name_some(twice)}.")


def read_annotation_table(source, half):
    """Read a CSV file, or the authors' .mat, whose two halves hold their fields in different
    orders: -> dict of column name -> float array, all of one length; identities are "id"."""
    try:
        if source.suffix == ".csv":
            text = source.read_text("utf-8-sig").replace('"', "").replace(";", ",")
            lines = [line.rstrip(" ,\t") for line in text.splitlines()]
            table = np.genfromtxt(lines or ["nothing"], delimiter=",", names=True, ndmin=1)
        else:
            from scipy.io import loadmat

            table = loadmat(source, squeeze_me=True)["market_attribute"][half].item()
        columns = {}
        for name in table.dtype.names:
            key = "id" if name == "image_index" else name
            columns[key] = np.array(table[name].tolist(), float, ndmin=1)
        np.stack(list(columns.values()))  # an error if they are not of one length
    except ImportError:
        raise UserError(
            f"{source} is a MATLAB file, and reading it takes SciPy: pip install scipy."
        ) from None
    except Exception as error:  # NumPy and SciPy raise a dozen types on a damaged file
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{source} cannot be read as annotations ({reason}).") from None
    return columns


def read_crops(paths, size, skip=False):
    """Decode image files in threads: -> (uint8 [N, 3, H, W], channels last in memory, their paths).

    Those of another size than `size`, (height, width), are resized, with antialiasing. Files that
    cannot be read are a UserError or, with skip, named on stderr and left out."""
    height, width = size
    crops = torch.empty(len(paths), height, width, 3, dtype=torch.uint8)
    pixels = crops.numpy()  # the same memory

    def read(row):
        try:
            image = read_image(paths[row])
        except UserError as error:
            return str(error)
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        pixels[row] = image
        return None

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        failures = list(pool.map(read, range(len(paths))))
    told = [failure for failure in failures if failure is not None]
    if told and not skip:
        raise UserError(
            f"Cannot read {len(told)} of {len(paths)} crops: {name_some(told)}. Replace them or "
            "move them out of their folder."
        )
    show_line("")
    for failure in told:
        print(f"Skipped: {printable(failure)}.", file=sys.stderr)
    good = [row for row, failure in enumerate(failures) if failure is None]
    if len(good) < len(paths):
        crops = crops[good]
    return crops.permute(0, 3, 1, 2), [paths[row] for row in good]


def read_image(path):
    """Read an image of any format that Pillow knows: -> Pillow image, RGB, upright, transparency
    laid on white. UserError, half a sentence, says why one cannot be read."""
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":
                raise ValueError("more than 8 bits a channel")
            image = ImageOps.exif_transpose(image)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except UnidentifiedImageError:  # whose text has the path again
        raise UserError(f"{path} is not a readable image") from None
    except Exception as error:  # Pillow raises a dozen types on a damaged file
        raise UserError(f"{path} is not a readable image ({error})") from None


def split_identities(person_ids, fraction=0.6, seed=0):
    """Split by identity, all crops of one on one side ([report] section 2): int64 [N] ->
    (train [N] bool, validation [N] bool)."""
    identities = person_ids.unique()
    count = round(fraction * len(identities))
    if count < 2 or len(identities) - count < 2:
        raise UserError(
            f"{len(identities)} identities are too few to split: either side needs two. Give more, "
            "or train on all by reid.py --identities all."
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(identities), generator=generator)[:count]
    train = torch.isin(person_ids, identities[chosen])
    return train, ~train


# ------------------------------------------------------------------------------------------
# Augmentation.


def random_affine(count, size, generator, degrees=10.0, shift=0.0):
    """Draw the augmentation of [report] section 2: float32 [count, 2, 3], for `augment`.

    A matrix each for `affine_grid`, whose coordinates run from -1 to 1 on both axes, hence the
    aspect ratio: a flip (p 0.5) and a rotation (uniform in +-degrees). Beyond the report, a shift,
    uniform in +-shift of each side. size: (height, width)."""
    angle = (torch.rand(count, generator=generator) * 2 - 1) * math.radians(degrees)
    mirror = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    move = torch.zeros(count, 2)
    if shift > 0:
        move = 2 * shift * (torch.rand(count, 2, generator=generator) * 2 - 1)
    aspect = size[0] / size[1]
    sin = angle.sin()
    cos = angle.cos()
    right = torch.stack([mirror * cos, -mirror * sin * aspect, move[:, 0]], 1)
    down = torch.stack([sin / aspect, cos, move[:, 1]], 1)
    return torch.stack([right, down], 1)


def random_boxes(count, size, generator, probability=0.5):
    """Draw what random erasing covers (Zhong et al. 2020): float32 [count, 4], for `augment`.

    left, top, right, bottom, from -1 to 1; with the probability a rectangle of 2 to 40 % of the
    image, at most 3.3 times as long as wide, cut to the image's sides; else an empty one.
    size: (height, width)."""
    area, ratio, chance = torch.rand(3, count, generator=generator)
    aspect = size[0] / size[1]
    ratio = 3.3 ** (2 * ratio - 1) / aspect  # height / width, in the coordinates
    area = (0.02 + 0.38 * area) * (chance < probability)
    sides = 2 * torch.stack([(area / ratio).sqrt(), (area * ratio).sqrt()], 1).clamp(max=1)
    corner = torch.rand(count, 2, generator=generator) * (2 - sides) - 1
    return torch.cat([corner, corner + sides], 1)


def augment(crops, affine, boxes):
    """Turn, flip and shift crops [B, 3, H, W] by `random_affine`, and erase `random_boxes`, which
    are all empty if they are 0: float32, black outside, the mean colour where erased.

    Not under autocast: bfloat16 coordinates would shake the pixels."""
    grid = F.affine_grid(affine, list(crops.shape), align_corners=False)
    crops = crops.float().contiguous(memory_format=layout(crops.device))
    crops = F.grid_sample(crops, grid, align_corners=False)

    height, width = crops.shape[2:]
    x = (2 * torch.arange(width, device=crops.device) + 1) / width - 1  # of the pixels' centres
    y = (2 * torch.arange(height, device=crops.device) + 1) / height - 1
    left, top, right, bottom = boxes[:, :, None].unbind(1)  # [B, 1] each
    columns = (x >= left) & (x < right)  # [B, W]
    rows = (y >= top) & (y < bottom)  # [B, H]
    erased = columns[:, None, None, :] & rows[:, None, :, None]
    return torch.where(erased, crops.mean((0, 2, 3), keepdim=True), crops)


# ------------------------------------------------------------------------------------------
# The network.


# Another ResNet fits in: models.resnet50, and models.ResNet50_Weights.IMAGENET1K_V2.
make_resnet = models.resnet18
IMAGENET_WEIGHTS = models.ResNet18_Weights.IMAGENET1K_V1


class MatrixConv2d(nn.Module):
    """A 3x3 convolution, padded by 1, as one matrix product over gathered neighbourhoods: the same
    sums.

    On a CPU and maps of at most 16 pixels, as the last stage's of 4x2, forward and backward take
    half to two thirds of oneDNN's time this way, which is a tenth of a training step. Elsewhere,
    also on the larger maps of last_stride=1, it is an ordinary convolution."""

    def __init__(self, conv):
        super().__init__()
        self.weight = conv.weight  # [out, in, 3, 3]
        self.stride = conv.stride[0]

    def forward(self, x):
        height, width = x.shape[2:]
        if x.device.type != "cpu" or height * width > 16 * self.stride**2:
            return F.conv2d(x, self.weight, stride=self.stride, padding=1)
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))  # [B, h + 2, w + 2, in]
        shifted = []
        for i in range(3):
            for j in range(3):
                shifted.append(padded[:, i : i + height : self.stride, j : j + width : self.stride])
        neighbourhoods = torch.cat(shifted, 3)  # [B, h / stride, w / stride, 9 * in]
        filters = self.weight.permute(0, 2, 3, 1).flatten(1)  # [out, 9 * in]
        return F.linear(neighbourhoods, filters).permute(0, 3, 1, 2)


def layout(device):
    """How filters and crops lie in memory: channels last is fastest, but on MPS wrong (PyTorch
    issues 174339, 175189)."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def precision(device):
    """What autocast computes in: "bfloat16" where the device has it, else "float32", as emulation
    would only cost time."""
    fast = False
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if fast else "float32"


def autocast(device):
    """A context in which a network computes in the device's `precision`."""
    return torch.autocast(device.type, torch.bfloat16, precision(device) == "bfloat16")


def in_float32(device):
    """A context in which autocast is off, as bfloat16 has three digits. Where it is off already, as
    in an exported network, this leaves no trace."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


class Backbone(nn.Module):
    """ResNet18 ([report] reference 2) without its classifier: crops [B, 3, H, W] in 0..255 -> (the
    last feature map [B, width, h, w], its mean over the places [B, width]).

    state: of torchvision's network; None: random. last_stride: of the last stage; the strong recipe
    has 1, for a map twice as high and wide. Another network fits in if it has a `width` and gives
    such a pair."""

    def __init__(self, state=None, last_stride=2):
        super().__init__()
        network = make_resnet()
        if state is not None:
            network.load_state_dict(state)
        self.width = network.fc.in_features
        self.net = nn.Sequential(*list(network.children())[:-2])  # no avgpool, no fc
        for block in network.layer4:
            for name, layer in list(block.named_modules()):
                if not isinstance(layer, nn.Conv2d):
                    continue
                if layer.stride == (2, 2):
                    layer.stride = (last_stride, last_stride)
                if layer.kernel_size == (3, 3) and layer.groups == 1:
                    setattr(block, name, MatrixConv2d(layer))
        # ImageNet's statistics, on the 0..255 scale. Part of the network, so that nobody can
        # forget them.
        mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
        std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
        self.register_buffer("mean", 255 * mean, persistent=False)
        self.register_buffer("std", 255 * std, persistent=False)

    def forward(self, crops):
        x = (crops.float() - self.mean) / self.std
        maps = self.net(x.contiguous(memory_format=layout(x.device)))
        return maps, F.adaptive_avg_pool2d(maps, 1).flatten(1)


# ------------------------------------------------------------------------------------------
# The loop.


def learning_rate(step, steps, peak, warmup):
    """Linear from 0 to `peak` over the first `warmup` of all steps, then linear to 0 ([report]
    section 4.1)."""
    rise = max(1, round(warmup * steps))
    return peak * min((step + 1) / rise, (steps - step) / max(1, steps - rise))


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for convolution filters (Jordan et al. 2024).

    Filters [out, in, h, w] count as a matrix [out, in * h * w]. It moves along its Nesterov
    momentum (0.9) with all large singular values brought near 1, so that those directions learn at
    one pace. Three iterations do that for singular values from 0.02 of the norm on, which 28 to
    54 % of the directions of the last stage have; smaller ones stay smaller. There is no weight
    decay. PyTorch has a Muon for matrices from 2.9 on.

    How long a filter is means nothing before batch norm, and pretrained filters are of any length.
    So filters learn as if they had length 1, at `factor` times the learning rate."""

    def __init__(self, filters, lr, factor):
        super().__init__(filters, {"lr": lr, "factor": factor})
        for parameter in filters:
            self.state[parameter]["momentum"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        for filters in group["params"]:
            if filters.grad is None:
                continue
            momentum = self.state[filters]["momentum"].lerp_(filters.grad, 0.1)
            lengths = torch.linalg.vector_norm(filters, dim=(1, 2, 3), keepdim=True)
            update = lengths * filters.grad.lerp(momentum, 0.9)
            update = orthogonalise(update.flatten(1)).view_as(filters)
            filters.sub_(lengths * update, alpha=group["factor"] * group["lr"])


def orthogonalise(matrix):
    """Bring the large singular values of a matrix near 1, by three Newton-Schulz iterations."""
    x = matrix / (matrix.norm() + 1e-9)
    x = x.to(getattr(torch, precision(x.device)))
    for _ in range(3):
        a = x @ x.T
        b = torch.addmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.addmm(x, b, x, beta=3.4445)
    return x.to(matrix.dtype)


def make_optimizers(module, args):
    """AdamW, with PyTorch's weight decay of 0.01, for all parameters of a module; in the strong
    recipe Muon for its convolution filters instead."""
    filters = []
    others = list(module.parameters())
    if "muon" in args.rungs:
        filters = [parameter for parameter in others if parameter.dim() == 4]
        others = [parameter for parameter in others if parameter.dim() != 4]
    optimizers = [torch.optim.AdamW(others, lr=args.lr, fused=True)]
    if filters:
        optimizers.append(Muon(filters, args.lr, args.muon))
    return optimizers


class TrainingStep(nn.Module):
    """A model's forward pass and its loss as one module, so that DistributedDataParallel and the
    optimisers see all parameters that are trained, the loss's own too."""

    def __init__(self, model, loss):
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, crops, rows):
        with autocast(crops.device):
            output = self.model(crops)
        return self.loss(output, rows)


BLOCK_PIXELS = 512 * 128 * 64  # of the crops that a network takes at once


def infer(model, crops, rows=None, pixels=BLOCK_PIXELS):
    """Run `model` in evaluation mode over crops[rows], so many pixels at once: -> what it returns,
    a NamedTuple of float32 tensors or None, of all rows, on its device."""
    if rows is None:
        rows = torch.arange(len(crops))
    height, width = crops.shape[2:]
    batch = max(1, pixels // (height * width))
    device = next(model.parameters()).device
    model.to(memory_format=layout(device)).eval()
    with torch.inference_mode(), autocast(device):
        outputs = [model(crops[part].to(device)) for part in rows.split(batch)]

    def join(parts):
        if parts[0] is None:
            return None
        joined = torch.cat(parts)
        if not joined.isfinite().all():
            raise UserError(
                "The network's output holds NaN or infinity: its training diverged. Train with a "
                "lower --lr."
            )
        return joined

    return type(outputs[0])(*map(join, zip(*outputs)))


def fit(model, crops, sample_epoch, loss, validate, args, checkpoint):
    """Train `model` as both stages do, to the weights of its best epoch: the only training loop.

    crops         uint8 [N, 3, H, W], copied to the device if that has twice the room
    sample_epoch  generator -> int64 [n, k], an epoch's n items, each of k rows of `crops`: 1 for
                  attributes, 3 for a triplet. A step takes the k x B crops of B items
    loss          nn.Module: (the model's output for k x B crops, their rows [k, B]) -> scalar; its
                  parameters, if any, are trained as well
    validate      () -> dict of figures, the first of which says which epoch is best; None: the last
    args          the command line's, after `par.start`
    checkpoint    what the file args.out says beside weights; its "record" is completed here

    Of several processes each trains on its slice of every batch. All validate, and the first one's
    figures count. Returns the record."""
    device = next(model.parameters()).device
    rank, world = processes()
    record = checkpoint["record"] = begin_record(checkpoint["record"], args)
    generator = torch.Generator().manual_seed(args.seed)
    if device.type != "cuda" or crops.numel() < torch.cuda.mem_get_info(device)[0] // 2:
        crops = crops.to(device)
    training_step = TrainingStep(model, loss).to(device, memory_format=layout(device))
    optimizers = make_optimizers(training_step, args)
    best_weights = None
    if args.resume:
        best_weights = load_training_state(checkpoint, args, training_step, optimizers, generator)
    run_step = DistributedDataParallel(training_step) if world > 1 else training_step

    for epoch in range(len(record["epochs"]) + 1, args.epochs + 1):
        if epoch - 1 - record["best epoch"] >= args.patience:
            print(f"Stopped early: no epoch was better in the last {args.patience}.")
            break

        # 1. Draw the epoch's items and their augmentation, and cut them into whole batches.
        drawn = draw_epoch(sample_epoch, crops.shape[2:], generator, args, device)
        steps = len(drawn.batches)
        if world > 1:  # so that dropout differs from process to process, and is known to --resume
            torch.manual_seed(args.seed + epoch * world + rank)

        # 2. Train: rate, gather, augment, forward, loss, backward, step.
        training_step.train()
        losses = torch.zeros(steps, device=device)
        images_per_step = drawn.batches[0].numel() * world
        begin = time.perf_counter()
        for step, batch in enumerate(drawn.batches):  # [k, B]
            done = (epoch - 1) * steps + step
            rate = learning_rate(done, args.epochs * steps, args.lr, args.warmup)
            places = batch.flatten()  # [k * B]
            images = crops[drawn.rows[places].to(crops.device)].to(device)
            images = augment(images, drawn.affine[places], drawn.boxes[places])
            step_loss = run_step(images, drawn.rows[batch])
            step_loss.backward()
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = rate
                optimizer.step()
                optimizer.zero_grad()
            losses[step] = step_loss.detach()
            if step % 10 == 9 and has_terminal():  # seldom, as this waits for a GPU
                show_progress(epoch, args.epochs, step + 1, steps, losses, begin, images_per_step)

        # 3. Look for NaN, validate, and see whether this epoch is the best.
        row = {"epoch": epoch, "loss": mean_loss(losses), "lr": rate}
        seconds = time.perf_counter() - begin
        check_loss(row, args.out)
        figures = run_validation(validate, record["seconds"])
        row |= figures
        row["seconds"] = round(seconds, 3)
        row["images_per_second"] = round(steps * images_per_step / seconds, 1)
        is_best = add_epoch(record, row, list(figures))
        checkpoint["model"] = model.state_dict()

        # 4. Save. A kill may come between any two of these writes. The record says whose the files
        # are. The best checkpoint comes before the state to resume: an older state trains its next
        # epoch again, to the same checkpoint, while a newer one would have lost the weights of its
        # best epoch. In the first epoch, whose weights it holds itself, the state comes before an
        # earlier run is set aside: so a run that was cut off does not take that one's place.
        if epoch == 1:
            save_training_state(checkpoint, args, training_step, optimizers, generator)
            set_aside(args.out)
        write_record(args.out, record)
        if is_best:
            best_weights = copy.deepcopy(checkpoint["model"])
            save_checkpoint(args.out, checkpoint)
        save_training_state(checkpoint, args, training_step, optimizers, generator)
        show_line("")
        print(describe_epoch(row, args.epochs, figures, is_best), flush=True)

    # 5. End with the best epoch's weights.
    model.load_state_dict(best_weights)
    checkpoint["model"] = model.state_dict()
    return record


def begin_record(record, args):
    """A record with what `fit` keeps there; no figures yet."""
    arguments = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    del arguments["resume"]
    return record | {
        "metrics": [],
        "epochs": [],
        "best epoch": 0,
        "arguments": arguments,
        "run": os.urandom(8).hex(),  # tells this run's files from another's
    }


class Epoch(NamedTuple):
    """What an epoch trains on, on the device: n items of k rows each, in batches of B items."""

    rows: torch.Tensor  # int64 [n * k], of the crops
    affine: torch.Tensor  # float32 [n * k, 2, 3]
    boxes: torch.Tensor  # float32 [n * k, 4]
    batches: torch.Tensor  # int64 [steps, k, B], places in the other three


def draw_epoch(sample_epoch, size, generator, args, device):
    """Draw an epoch's items and, by the recipe, their augmentation, and cut them into batches, of
    which each process gets its slice: -> `Epoch`. size: (height, width) of the crops."""
    items = sample_epoch(generator)  # [n, k]
    count = items.numel()
    boxes = torch.zeros(count, 4)
    if args.recipe == "report":
        affine = random_affine(count, size, generator)
    else:
        shift = 0.05 if "shift" in args.rungs else 0.0
        affine = random_affine(count, size, generator, degrees=0.0, shift=shift)
        if "erasing" in args.rungs:
            boxes = random_boxes(count, size, generator)

    rank, world = processes()
    batch = min(args.batch, len(items)) // world * world
    if batch < 2 * world:
        raise UserError(
            f"An epoch has {len(items)} items, too few for a batch, which has two or more for each "
            "process: take more crops."
        )
    whole = len(items) // batch * batch
    places = torch.arange(count).view(items.shape)[:whole]
    places = places.unflatten(0, (-1, batch))  # [steps, batch, k]
    share = batch // world
    batches = places[:, rank * share : (rank + 1) * share].transpose(1, 2)
    return Epoch(
        items.flatten().to(device), affine.to(device), boxes.to(device), batches.to(device)
    )


def mean_loss(losses):
    """Mean over the steps of all processes: float32 [steps] -> number. Here the host waits for a
    GPU."""
    world = processes()[1]
    if world > 1:
        dist.all_reduce(losses)
    return losses.mean().item() / world


def check_loss(row, out):
    """UserError where the loss of an epoch, in its row of the record, is NaN or infinite."""
    if not math.isfinite(row["loss"]):
        raise UserError(
            f"The loss became {row['loss']} in epoch {row['epoch']}: try a lower --lr. {out} keeps "
            "the best epoch before that, if there is one."
        )


def add_epoch(record, row, metrics):
    """Add an epoch's row to a record: -> whether it is the best, by the first of the metrics, and
    of equal ones the first; without metrics the last is."""
    record["metrics"] = metrics or ["epoch"]
    record["epochs"].append(row)
    record["seconds"]["training"] = round(sum(epoch["seconds"] for epoch in record["epochs"]), 2)
    best = max(record["epochs"], key=lambda epoch: epoch[record["metrics"][0]])
    record["best epoch"] = best["epoch"]
    return best is row


def describe_epoch(row, epochs, figures, best):
    """The line that stays for an epoch; a star marks the best so far."""
    line = f"epoch {row['epoch']:2}/{epochs}  loss {row['loss']:.4f}  "
    line += f"{row['images_per_second']:.0f} images/s"
    if figures:
        line += "  validation " + ", ".join(f"{k} {100 * v:.2f}" for k, v in figures.items())
        if best:
            line += "  *"
    return line


def show_progress(epoch, epochs, step, steps, losses, begin, images):
    """Show the line that updates while an epoch trains, which began at time `begin`, on a terminal;
    images: how many in a step."""
    speed = step / (time.perf_counter() - begin)  # steps a second
    left = round(((epochs - epoch + 1) * steps - step) / speed)
    show_line(
        f"epoch {epoch}/{epochs}  step {step}/{steps}  loss {losses[:step].mean():.4f}  "
        f"{speed * images:.0f} images/s  {left // 60}:{left % 60:02} left"
    )


def has_terminal():
    """Whether stderr is the first process's terminal; what a notebook or a service puts there need
    not know what that is."""
    return processes()[0] == 0 and hasattr(sys.stderr, "isatty") and sys.stderr.isatty()


def show_line(text):
    """Show one line on the terminal, if there is one, which the next call overwrites."""
    if has_terminal():
        print(f"\r{text[:79]:79}\r", end="", file=sys.stderr, flush=True)


def processes():
    """Which of the processes that torchrun started this one is, and how many they are; (0, 1)
    without torchrun."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@contextlib.contextmanager
def timed(seconds, what):
    """Add the seconds that a block takes to seconds[what]."""
    begin = time.perf_counter()
    yield
    seconds[what] = round(seconds.get(what, 0) + time.perf_counter() - begin, 2)


def run_validation(validate, seconds):
    """The figures of a validation, of the first process, as no two GPUs need compute the same; an
    empty dict without one."""
    if validate is None:
        return {}
    with timed(seconds, "validation"):
        figures = [validate()]
    if processes()[1] > 1:
        dist.broadcast_object_list(figures, src=0)
    return figures[0]


# ------------------------------------------------------------------------------------------
# Files.


def device_random(device):
    """Where a device's random state is read and set: that is what dropout draws from."""
    return torch if device == "cpu" else getattr(torch, device)


def save_training_state(checkpoint, args, training_step, optimizers, generator):
    """Write all that `load_training_state` needs, beside args.out with the ending .last."""
    training = {
        "loss": training_step.loss.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "generator": generator.get_state(),
        "random": device_random(args.device).get_rng_state(),
    }
    save_checkpoint(args.out.with_suffix(".last"), checkpoint | {"training": training})


# Arguments that a run may resume with another value of. The learning rate depends on the number of
# epochs, so that is not among them; --without says what rungs are left.
FREE_TO_CHANGE = "data init out rungs patience rerank prior hamming threshold".split()


def load_training_state(checkpoint, args, training_step, optimizers, generator):
    """Put the state of the run that writes args.out into all of these: -> the weights of its best
    epoch; None: there is nothing to resume. UserError if it is of other arguments or data."""
    path = args.out.with_suffix(".last")
    record = checkpoint["record"]
    if not path.exists():
        print(f"There is no {path} to resume: starting.")
        return None
    state = load_checkpoint(path, checkpoint["kind"])
    training = state.pop("training")
    earlier = state["record"]

    ours = record["fingerprints"] | record["arguments"]
    theirs = earlier["fingerprints"] | earlier["arguments"]
    others = [k for k, v in ours.items() if k not in FREE_TO_CHANGE and v != theirs.get(k)]
    if others:
        raise UserError(
            f"{path} is of a run with another {', '.join(others)}: resume with that, or start "
            "without --resume."
        )
    best_weights = state["model"]
    if args.out.exists() and read_record(args.out).get("run") == earlier["run"]:
        best_weights = torch_load(args.out)["model"]
    elif len(earlier["epochs"]) > 1:
        raise UserError(
            f"{args.out} is not the best checkpoint of the run that {path} goes on with: start "
            "without --resume."
        )
    else:  # it was cut off while it saved its first epoch, which is done now
        set_aside(args.out)
        write_record(args.out, earlier)
        save_checkpoint(args.out, state)

    checkpoint["seen"] = state.get("seen", [])  # as the file of --weights may have gone since
    record |= {k: earlier[k] for k in ("run", "metrics", "epochs", "best epoch", "seconds")}
    training_step.model.load_state_dict(state["model"])
    training_step.loss.load_state_dict(training["loss"])
    for optimizer, saved in zip(optimizers, training["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    generator.set_state(training["generator"])
    device_random(args.device).set_rng_state(training["random"])

    print(f"Going on after epoch {len(record['epochs'])}.")
    return best_weights


def set_aside(out):
    """Rename an earlier run's record, picture and checkpoint, if it has come so far as to have
    one, to NAME.old.json and so on. The checkpoint is the last: after a kill in between the next
    run goes on with that."""
    if processes()[0] > 0 or not out.exists():
        return
    for suffix in (".json", ".png", ".pt"):
        path = out.with_suffix(suffix).resolve()  # so that a link stays
        if path.exists():
            old = path.with_suffix(f".old{path.suffix}")
            path.replace(old)
            print(f"{path} of an earlier run is now {old}.")


def read_record(out):
    """The record beside a checkpoint; an empty dict where there is none that can be read."""
    try:
        return dict(json.loads(out.with_suffix(".json").read_text("utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return {}


def write_record(out, record):
    """Write a run's record beside its checkpoint, as JSON; UserError where another run has begun to
    write there."""
    path = out.with_suffix(".json")
    if processes()[0] == 0 and out.exists() and read_record(out).get("run") != record["run"]:
        raise UserError(
            f"{path} is another run's by now, so this one ends: give each run an --out of its own."
        )
    record["peak_memory_MB"] = peak_memory()
    write_whole(path, lambda file: file.write(json.dumps(record, indent=1).encode()))


def peak_memory():
    """Highest memory use so far in MB: {"host": ..., "device": ...}, what the system says of it."""
    peak = {}
    if torch.cuda.is_available():
        peak["device"] = torch.cuda.max_memory_allocated() >> 20
    if os.name != "nt":
        import resource  # not on Windows

        unit = 20 if sys.platform == "darwin" else 10  # bytes there, else KB
        peak["host"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> unit
    return peak


def write_whole(path, write):
    """Call write(file), and put what it wrote in the place of `path` or, if that is a link, of what
    it points to, whole or not at all; only the first process does."""
    if processes()[0] > 0:
        return
    path = Path(os.path.realpath(path))
    # To memory first, as torch.save hides a full disk, and Ctrl-C, behind errors of its own.
    buffer = io.BytesIO()
    write(buffer)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}).") from None
    finally:
        temporary.unlink(missing_ok=True)


# Of checkpoints: the number goes up when they change, and weights and classes must mean the same.
VERSION = [5, make_resnet.__name__, list(ATTRIBUTES.items())]


def save_checkpoint(path, checkpoint):
    """Write a dict of "kind" ("par" or "reid"), "record", "model", "train_ids" and so on."""
    marked = checkpoint | {"version": VERSION}
    write_whole(path, lambda file: torch.save(marked, file))


def load_checkpoint(path, *kinds):
    """Read a checkpoint and check that it is one of `kinds` ("par", "reid")."""
    checkpoint = torch_load(path)
    if not isinstance(checkpoint, dict) or checkpoint.get("version") != VERSION:
        raise UserError(f"{path} is of another version of this code, or another backbone or data.")
    if checkpoint["kind"] not in kinds:
        raise UserError(
            f"{path} is a checkpoint of {checkpoint['kind']}.py; one of {kinds[0]}.py is needed "
            "here."
        )
    return checkpoint


def torch_load(path):
    """Load a file of tensors and plain values; it never runs code from it."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except Exception as error:  # zip, pickle and PyTorch raise a dozen types on a damaged file
        raise UserError(f"{path} is not a readable checkpoint ({type(error).__name__}).") from None


# ------------------------------------------------------------------------------------------
# Errors.


def run(parser, check_flags, main):
    """Run a script: main(args). What it says goes nowhere where there is nothing to say it on, as
    in a service or after a shell's >&-. Of several processes only the first prints to stdout."""
    first = os.environ.get("RANK", "0") == "0"
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        out = sys.stdout if first and sys.stdout is not None else nowhere
        err = nowhere if sys.stderr is None else sys.stderr
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run_main(parser, check_flags, main, first)


def run_main(parser, check_flags, main, first):
    """Run main(args). The one place where errors become sentences and exit codes."""
    args = None
    try:
        args = parser.parse_args()
        check_flags(parser, args)
        main(args)
        return
    except BrokenPipeError:  # the reader, `head` for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # as of a program that a closed pipe ends
    except KeyboardInterrupt:
        code = 130
        sentence = "stopped."
        if args is not None and not args.eval:
            sentence = "stopped; --resume goes on with a training after its last whole epoch."
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        code = 2
        sentence = explain(error)
        if sentence is None:
            raise
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()  # else its threads may abort the process at its end
    show_line("")
    if first or code == 2:
        print(f"{parser.prog}: {printable(sentence)}", file=sys.stderr)
    sys.exit(code)


def explain(error):
    """The sentence for an error that a user can cause; None for any other."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, UnicodeError):
        return "a file's name cannot be printed here: set PYTHONIOENCODING=utf-8."
    if isinstance(error, OSError):
        name = error.filename or "A file"
        return f"{name} cannot be read or written ({error.strerror or error})."
    message = str(error)
    if "RANK" in os.environ and re.search(
        "gloo|NCCL|onnection (closed|reset)|Broken pipe", message
    ):
        reason = message.partition("\nException raised")[0]
        return f"another process of this run has ended, or cannot be reached ({reason})."
    full = re.search("of memory|can't allocate|not enough mem", message)
    if isinstance(error, MemoryError) or full:
        return "the memory is full: lower --batch or --size, or pass another --device."
    return None


# ------------------------------------------------------------------------------------------
# The drawn people of the demo set, which a first reading can skip.

DRAWN = "drawn.txt"  # marks a drawn data set; written last, so it also says that the set is whole

# How often each class is drawn, as unbalanced as in Market-1501 ([report] table 4). All classes
# of an attribute that is not named here are as frequent, and only `draw_person` shows them.
FREQUENCIES = {
    "age": (0.05, 0.66, 0.24, 0.05),
    "hair": (0.64, 0.36),
    "up": (0.15, 0.85),
    "down": (0.40, 0.60),
    "clothes": (0.15, 0.85),
    "hat": (0.93, 0.07),
    "backpack": (0.73, 0.27),
    "bag": (0.75, 0.25),
    "handbag": (0.88, 0.12),
    "upcolor": (0.16, 0.26, 0.11, 0.05, 0.06, 0.12, 0.08, 0.08, 0.08),
    "downcolor": (0.36, 0.08, 0.05, 0.02, 0.03, 0.16, 0.18, 0.03, 0.06, 0.03),
}


class Person(NamedTuple):
    """Who is drawn: the code of each attribute's class, and what tells two people of the same
    classes apart."""

    codes: dict[str, int]
    top: list  # colours from the neck down: one, or three of the class "multi"
    bottom: list  # the same from the hip down
    skin: tuple
    hair: tuple
    luggage: tuple  # of shoes, hat, backpack, bag and handbag
    width: float
    height: float


def draw_market(root, identities, images_per_identity, seed=0):
    """Draw a data set of people in Market-1501's layout into an empty folder `root`.

    So many identities in the training half, as many others in the test half, each with so many
    crops, from two cameras or more, to train with or in the gallery; queries, distractors, junk and
    annotations come with them. The same for a seed."""
    root = Path(root)
    random = np.random.RandomState(seed)  # whose stream is frozen across NumPy's versions
    lines = []  # of the annotations
    shots = []  # (part, identity, person, camera)
    for person_id in range(1, 2 * identities + 1):
        person = draw_identity(random)
        lines.append(annotate(person_id, person))
        cameras = 1 + random.permutation(6)[: random.randint(2, 7)]
        part = "train" if person_id <= identities else "gallery"
        for camera in np.resize(cameras, images_per_identity):
            shots.append((part, f"{person_id:04d}", person, camera))
        if part == "gallery":  # an only crop is not of the query's camera
            shots.append(("query", f"{person_id:04d}", person, cameras[-1]))
    for k in range(max(2, identities * images_per_identity // 5)):
        shown_id = "0000" if k % 8 else "-1"  # a distractor, or junk
        shots.append(("gallery", shown_id, draw_identity(random), random.randint(1, 7)))

    for k, (part, shown_id, person, camera) in enumerate(shots, 1):
        path = root / PARTS[part] / f"{shown_id}_c{camera}s1_{25 * k:06d}_01.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_crop(person, camera, random).save(path, quality=80)
    for half, own in (("train", lines[:identities]), ("test", lines[identities:])):
        rows = [list(own[0])] + [list(line.values()) for line in own]
        np.savetxt(root / f"annotations_{half}.csv", rows, "%s", ",")
    (root / DRAWN).write_text(f"draw_market({identities}, {images_per_identity}, {seed})\n")


def annotate(person_id, person):
    """A person's line of the annotations: a dict of column -> code, as `read_annotations` reads."""
    line = {"id": person_id}
    for attribute, code in person.codes.items():
        for k, column in enumerate(annotation_columns(attribute)):
            line[column] = code + 1
            if attribute in FLAG_PREFIXES:
                line[column] = 2 if k == code else 1
    return line


def draw_identity(random):
    """Choose a person by a NumPy RandomState: -> `Person`."""
    codes = {}
    for attribute, classes in ATTRIBUTES.items():
        codes[attribute] = random.choice(len(classes), p=FREQUENCIES.get(attribute))

    def choose_colours(attribute):
        names = ATTRIBUTES[attribute][:-1]
        chosen = names[codes[attribute] :][:1]
        if not chosen:  # multi
            chosen = random.permutation(names)[:3]
        return [paint(name, random) for name in chosen]

    size = (0.75, 0.92, 1.1, 1.0)[codes["age"]]
    return Person(
        codes,
        top=choose_colours("upcolor"),
        bottom=choose_colours("downcolor"),
        skin=paint("tan", random),
        hair=paint("silver" if codes["age"] == 3 else "saddlebrown", random),
        luggage=paint(random.choice(ATTRIBUTES["downcolor"][:-1]), random),
        width=size * random.uniform(0.92, 1.08),
        height=min(size, 0.95) * random.uniform(0.95, 1.05),
    )


def paint(name, random):
    """A soft shade of a colour, by its CSS name, as Pillow takes it."""
    soft = 35 + 0.7 * np.array(ImageColor.getrgb(name))
    shade = soft * random.uniform(0.75, 1.1) + random.uniform(-10, 10, 3)
    return tuple(shade.clip(0, 255).astype(int).tolist())


def draw_crop(person, camera, random):
    """Draw a person as one camera sees them, at its place and in its light: a Pillow image of
    64x128 pixels."""
    place = np.random.RandomState(camera + 47)
    picture = Image.new("RGB", (192, 384), paint("gray", place))  # three times as large
    pen = ImageDraw.Draw(picture)
    pen.rectangle((0, place.randint(160, 270), 192, 384), paint("darkgray", place))
    light = random.uniform(0.88, 1.12) * (place.uniform(0.8, 1.15) + place.normal(0, 0.06, 3))

    middle = random.uniform(87, 105)
    feet = random.uniform(358, 372)
    unit = random.uniform(2.9, 3.2) * person.height
    draw_person(person, functools.partial(draw_part, pen, middle, feet, unit))
    blurred = picture.reduce(3).filter(ImageFilter.GaussianBlur(0.3 + 0.6 * place.rand()))
    pixels = blurred * light + random.normal(0, 4, (128, 64, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def draw_part(pen, middle, feet, unit, colour, points, thickness=0, sides=(-1, 1)):
    """Draw a polygon with a round border so thick, on both sides of the person; two points make a
    line. x is counted from the middle of the person, y from the feet up; a grown-up's neck is at
    90, the crown at 112."""
    for side in sides:
        pixels = [(middle + side * unit * x, feet - unit * y) for x, y in points]
        pen.polygon(pixels, colour)
        if thickness > 0:
            pen.line(pixels, colour, round(unit * thickness))
            for pixel in pixels:
                pen.circle(pixel, unit * thickness / 2, colour)


def draw_person(person, draw):
    """Draw the parts of a person from the farthest to the nearest, by draw(colour, points,
    thickness, sides). Codes are the places of the classes in ATTRIBUTES."""
    codes = person.codes
    wide = person.width
    leg = 5 * wide
    hip = 9.4 * wide
    shoulder = (12.8 - 2.4 * codes["gender"]) * wide
    hem = (7, 32)[codes["down"]]
    cuff = (58, 74)[codes["up"]]
    skirt = (0, hip + 6, hem)
    trouser = (leg - 4.3 * wide, leg + 4.3 * wide, hem)

    if codes["backpack"]:
        draw(person.luggage, [(0, 82), (0, 68)], 28 * wide)
    if codes["hair"]:
        draw(person.hair, [(0, 103), (0, 80)], 16)
    draw(person.skin, [(leg, 54), (leg, 4)], 6 * wide)
    draw(person.luggage, [(leg, 2.5), (leg + 2, 2)], 5)  # a shoe
    draw_garment(person.bottom, (0, hip, 56), (skirt, trouser)[codes["clothes"]], draw)
    draw_garment(person.top, (0, shoulder - 1.5, 88), (0, hip, 52), draw)
    draw(person.skin, [(shoulder - 2, 84.5), (shoulder + 2, 54)], 4.6 * wide)
    draw(person.top[0], [(shoulder - 2, 84.5), (shoulder + 1, cuff)], 6.2 * wide)

    draw(person.hair, [(0, 101), (0, 104)], 16)
    draw(person.skin, [(0, 90), (0, 97)], 6)
    draw(person.skin, [(0, 98.5), (0, 101)], 12.6)
    draw("black", [(2.5, 100.7), (2.5, 101.3)], 1.9)  # an eye
    if codes["hat"]:
        draw(person.luggage, [(3, 107), (9, 105)], 7)
    if codes["bag"]:
        draw(person.luggage, [(-0.6 * shoulder, 88), (hip, 57)], 2, sides=[1])
        draw(person.luggage, [(hip + 2, 56), (hip, 50)], 9, sides=[1])
    if codes["handbag"]:
        draw(
            person.luggage, [(shoulder + 2, 55), (shoulder, 38), (shoulder + 6, 38)], 6, sides=[-1]
        )


def draw_garment(colours, top, bottom, draw):
    """Draw a garment in bands of equal height, a colour each; top and bottom: (left, right, y) of
    its edges."""
    edges = np.linspace(top, bottom, len(colours) + 1)
    for colour, above, below in zip(colours, edges, edges[1:]):
        corners = [above[[0, 2]], above[[1, 2]], below[[1, 2]], below[[0, 2]]]
        draw(colour, corners)
