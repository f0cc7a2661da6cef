#!/usr/bin/env python3
"""What par.py and reid.py share: Market-1501 and its drawn stand-in, augmentation, ResNet18, the training loop.

Data flows one way. Every crop is decoded once into one uint8 tensor that stays on the device; an index tensor says what
a step trains on: it gathers those rows, flips and rotates them in one batch, and runs one forward and backward pass.

[report] is "Person Attributes Recognition and Re-Identification" (Caldarella, Pedeni, Trebucchi; University of Trento).
"""
import argparse
import atexit
import contextlib
import copy
import ctypes
import hashlib
import io
import itertools
import json
import math
import os
import platform
import re
import socket
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import ResNet18_Weights, resnet18

# Class names in the order of their codes in the annotations, attributes in the order of [report] tables 2-4. The last
# class of both colours, "multi", is the report's own (section 2): an identity with no single colour flagged.
ATTRIBUTES = {
    "age": ("young", "teenager", "adult", "old"), "gender": ("male", "female"), "hair": ("short", "long"),
    "up": ("long", "short"), "down": ("long", "short"), "clothes": ("dress", "pants"),
    "hat": ("no", "yes"), "backpack": ("no", "yes"), "bag": ("no", "yes"), "handbag": ("no", "yes"),
    "upcolor": ("black", "white", "red", "purple", "yellow", "gray", "blue", "green", "multi"),
    "downcolor": ("black", "white", "pink", "purple", "yellow", "gray", "blue", "green", "brown", "multi"),
}
SIZES = [len(classes) for classes in ATTRIBUTES.values()]  # 41 classes in all
# What annotates each: a column of codes or, for a colour, a column of flags for each class: upblack, upwhite and so on.
COLUMNS = {a: [a[:-5] + name for name in classes[:-1]] if "color" in a else [a] for a, classes in ATTRIBUTES.items()}
PARTS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
IGNORED = ("thumbs.db", "desktop.ini")  # a system's own files


class UserError(ValueError):
    """Something the user can put right. Its text is all that is shown: what is wrong, where, what to do."""


# ---------------------------------------------------------------------------------------------------------- the data

@dataclass
class Market:
    """One part of a data set in Market-1501's layout, sorted by file name; junk (-1) and distractors (0) are kept."""

    images: torch.Tensor  # uint8 [N, 3, H, W], channels last in memory
    person_ids: torch.Tensor  # int64 [N]
    camera_ids: torch.Tensor  # int64 [N]
    labels: torch.Tensor  # int64 [N, 12], class of each attribute; -1 where there is no annotation
    names: list[str]  # N file names

    def fingerprint(self):
        """A hex string of names and labels, for a run to tell whether it resumes on what it began with."""
        return hashlib.sha256(json.dumps([self.names, self.labels.tolist()]).encode()).hexdigest()


def load_market(root, part, size=(128, 64), annotated=True):
    """Read `part` ("train", "query" or "gallery") of the data set in folder `root` into memory. size: (height, width);
    crops of another are resized, with antialiasing. annotated: whether labels are wanted; else, and where there are no
    annotations, they are -1. UserError names the file that is missing or unreadable."""
    folder = Path(root) / PARTS[part]
    names = sorted(n for n in os.listdir(folder) if n[0] != "." and n.lower() not in IGNORED) if folder.is_dir() else []
    if not names:
        raise UserError(f"There are no crops in {folder}: --data takes the folder that holds {PARTS[part]}.")
    parsed = [re.match(r"(-1|\d{1,9})_c(\d{1,9}).*\.jpe?g$", n, re.IGNORECASE) for n in names]
    if None in parsed:
        raise UserError(f"{folder / names[parsed.index(None)]} is not named like a crop of Market-1501 "
                        "(0002_c1s1_000451_03.jpg: identity 2, camera 1): rename it or move it out of the folder.")
    ids, cameras = ([int(m[k]) for m in parsed] for k in (1, 2))
    known = read_annotations(Path(root), "train" if part == "train" else "test") if annotated else {}
    if known and (missing := [i for i in ids if i > 0 and i not in known]):
        raise UserError(f"The annotations in {root} lack identity {missing[0]:04d}, which has crops in {folder.name}.")
    labels = [known.get(i, [-1] * len(ATTRIBUTES)) for i in ids]
    return Market(read_crops([folder / n for n in names], size)[0], *map(torch.tensor, (ids, cameras, labels)), names)


def read_annotations(root, half):
    """Annotations of a half ("train" or "test"): dict of identity -> list of 12 classes; empty where there are none.
    Two formats, both coded from 1: the course's CSV, and the authors' market_attribute.mat, whose two halves hold their
    fields in different orders. Both are read by name."""
    sources = [root / name for name in (f"annotations_{half}.csv", "market_attribute.mat")]
    if not (source := next(filter(Path.is_file, sources), None)):
        return {}
    try:
        if source.suffix == ".csv":
            text = source.read_text("utf-8-sig").replace('"', "").replace(";", ",")
            lines = [line.rstrip(" ,\t") for line in text.splitlines()] or ["nothing"]
            table = np.genfromtxt(lines, delimiter=",", names=True, ndmin=1)
        else:
            from scipy.io import loadmat
            table = loadmat(source, squeeze_me=True)["market_attribute"][half].item()
        columns = {name.replace("image_index", "id"): np.array(table[name].tolist(), float, ndmin=1)
                   for name in table.dtype.names}
        np.stack(list(columns.values()))  # all of one length
    except ImportError:
        raise UserError(f"{source} is a MATLAB file, and reading it takes SciPy: pip install scipy.") from None
    except Exception as error:  # NumPy and SciPy raise a dozen types on a damaged file
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{source} cannot be read as annotations ({reason}).") from None

    def column(name, highest):
        if name not in columns or f"{name}_1" in columns:  # NumPy's name for the second of two
            raise UserError(f"{source} does not have one column '{name}'.")
        for person, value in zip(columns["id"], columns[name]):
            if not 1 <= value <= highest or value % 1:
                raise UserError(f"{source}: '{name}' of identity {person:g} is {value:g}, not one of 1 to {highest}.")
        return columns[name].astype(int)

    ids, codes = column("id", 10**9).tolist(), []
    for names, count in zip(COLUMNS.values(), SIZES):
        values = np.stack([column(name, 2 if names[1:] else count) for name in names]) - 1
        codes.append(np.where(values.sum(0) == 1, values.argmax(0), len(names)) if names[1:] else values[0])
    if len(set(ids)) < len(ids):
        raise UserError(f"{source} names an identity twice.")
    return dict(zip(ids, np.stack(codes, 1).tolist()))


def read_crops(paths, size, skip=False):
    """Decode image files in threads: -> (uint8 [N, 3, H, W], channels last in memory, the paths of these).

    Crops of another size than `size`, (height, width), are resized, with antialiasing. What cannot be read is a
    UserError or, with skip, named on stderr and left out."""
    crops = torch.empty(len(paths), *size, 3, dtype=torch.uint8)
    pixels = crops.numpy()  # the same memory
    height, width = size

    def read(row):
        try:
            image = read_image(paths[row])
        except UserError as error:
            if not skip:
                raise
            return str(error)
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        pixels[row] = image
        return None

    good = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for row, failure in enumerate(pool.map(read, range(len(paths)))):
            if failure is None:
                good.append(row)
            else:
                print(f"Skipped: {' '.join(failure.splitlines())}", file=sys.stderr)
            if row % 1000 == 999:
                progress(f"reading {row + 1} of {len(paths)}")
    progress("")
    if len(good) < len(paths):
        crops = crops[good]
    return crops.permute(0, 3, 1, 2), [paths[row] for row in good]


def read_image(path):
    """Read an image of any format that Pillow knows: -> Pillow image, RGB, upright, transparency laid on white."""
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":
                raise ValueError("more than 8 bits a channel")
            image = ImageOps.exif_transpose(image)
            if image.has_transparency_data:
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image.convert("RGBA"))
            return image.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except Exception as error:  # Pillow raises a dozen types on a damaged file
        raise UserError(f"{path} is not a readable image ({error}): replace it or move it out of the folder.") from None


def user_files(paths):
    """The user's own files, and all in folders and below, but for hidden ones: -> list of Path."""
    files = []
    for path in map(Path, paths):
        walk = [] if path.is_file() else os.walk(path, onerror=lambda error: print(
            f"Skipped: {error.filename} cannot be read ({error.strerror}).", file=sys.stderr))
        inside = sorted(Path(folder, name) for folder, _, found in walk for name in found)
        files += [path] if path.is_file() else [p for p in inside if p.is_file() and p.name.lower() not in IGNORED
                                                and not any(part[0] == "." for part in p.relative_to(path).parts)]
    return files


def split_identities(person_ids, fraction=0.6, seed=0):
    """Split by identity, all crops of one on one side ([report] section 2): (train [N] bool, validation [N] bool)."""
    ids = person_ids.unique()
    count = round(fraction * len(ids))
    if count < 2 or len(ids) - count < 2:
        raise UserError(f"{len(ids)} identities are too few to split: training and validation need two each.")
    train = torch.isin(person_ids, ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))[:count]])
    return train, ~train


# ------------------------------------------------------------------------------------------- the network and its input

def random_warp(count, size, generator, degrees=10.0, shift=0.0, erase=0.0):
    """Augmentation of [report] section 2, flip (p 0.5) and rotation (uniform in +-degrees): float32 [count, 2, 5].
    A matrix per image for `affine_grid`, whose coordinates run from -1 to 1 on both axes (hence the aspect ratio), and
    from where to where, across and down, it is erased. Beyond the report, for strong, which does not turn: a shift by
    a part of each side, and with probability `erase` a rectangle, 2 to 40 % of the image and at most 3.3 times as long
    as wide (Zhong et al. 2020), cut to the image's sides."""
    angle = (torch.rand(count, generator=generator) * 2 - 1) * math.radians(degrees)
    mirror = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    sin, cos, aspect = angle.sin(), angle.cos(), size[0] / size[1]
    move, begin, end = torch.zeros(3, count, 2)
    if shift:
        move = 2 * shift * (torch.rand(count, 2, generator=generator) * 2 - 1)
    if erase:
        area, tall, chance = torch.rand(3, count, generator=generator)
        tall, area = 3.3 ** (2 * tall - 1) / aspect, (0.02 + 0.38 * area) * (chance < erase)
        sides = 2 * torch.stack([(area / tall).sqrt(), (area * tall).sqrt()], 1).clamp(max=1)
        begin = torch.rand(count, 2, generator=generator) * (2 - sides) - 1
        end = begin + sides
    turn = torch.stack([mirror * cos, -mirror * sin * aspect, sin / aspect, cos], 1).view(count, 2, 2)
    return torch.cat([turn, torch.stack([move, begin, end], 2)], 2)


def augment(crops, warp):
    """Apply `random_warp`, [B, 2, 5], to crops [B, 3, H, W]: float32, black outside, the mean colour where erased."""
    grid = F.affine_grid(warp[:, :, :3], list(crops.shape), align_corners=False)
    x = F.grid_sample(crops.float().contiguous(memory_format=layout(crops.device)), grid, align_corners=False)
    centres = ((2 * torch.arange(side, device=x.device) + 1) / side - 1 for side in (x.shape[3], x.shape[2]))
    inside = [(at >= warp[:, k, 3:4]) & (at < warp[:, k, 4:]) for k, at in enumerate(centres)]  # [B, W], [B, H]
    return torch.where((inside[0][:, None] & inside[1][:, :, None])[:, None], x.mean((0, 2, 3), keepdim=True), x)


class MatrixConv2d(nn.Module):
    """A 3x3 convolution, padded by 1, as one matrix product over gathered neighbourhoods: the same sums.

    On a CPU and the small maps of the last stage, of 4x2 pixels, forward and backward take half to two thirds of
    oneDNN's time this way, which is a tenth of a training step. Elsewhere it is an ordinary convolution."""

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
    """How filters and crops lie in memory: channels last is fastest; on MPS wrong (PyTorch issues 174339, 175189)."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


class Backbone(nn.Module):
    """ResNet18 ([report] reference 2) without its classifier: crops [B, 3, H, W] in 0..255 -> (the last feature map
    [B, width, h, w], its mean over the places [B, width]). state: as of `backbone_weights`; None: random. With "stride"
    in rungs, the last stage's is 1. Another network fits in if it has a `width` and gives such a pair."""

    def __init__(self, state=None, rungs=()):
        super().__init__()
        net = resnet18()
        net.load_state_dict(state or net.state_dict())
        net.layer4[0].conv1.stride = net.layer4[0].downsample[0].stride = (1, 1) if "stride" in rungs else (2, 2)
        for block in net.layer4:
            for name, layer in list(block.named_children()):
                if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
                    setattr(block, name, MatrixConv2d(layer))
        self.width = net.fc.in_features
        self.net = nn.Sequential(*[*net.children()][:-2])  # no avgpool, no fc
        # ImageNet's statistics, on the 0..255 scale. Part of the network, so that nobody can forget them.
        self.register_buffer("mean", 255 * torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), persistent=False)

    def forward(self, crops):
        x = (crops.float() - self.mean) / self.std
        maps = self.net(x.contiguous(memory_format=layout(x.device)))
        return maps, F.adaptive_avg_pool2d(maps, 1).flatten(1)


def backbone_weights(args):
    """State dict for `Backbone`: ImageNet's, downloaded once, or a file's; None: random, or of a run that resumes."""
    if (choice := args.weights) == "none" or args.resume and args.out.with_suffix(".last").exists():
        return None
    if choice == "imagenet":
        socket.setdefaulttimeout(20)  # else a network that swallows packets hangs this for minutes
        try:
            return ResNet18_Weights.IMAGENET1K_V1.get_state_dict(check_hash=True, weights_only=True)
        except Exception as error:  # of the network, of the hash, of a damaged file
            raise UserError(f"ImageNet weights could not be had ({error}): pass --weights none to start from random "
                            f"weights, or --weights FILE, a copy of {ResNet18_Weights.IMAGENET1K_V1.url}.") from None
        finally:
            socket.setdefaulttimeout(None)
    state, expected = torch_load(choice), resnet18().state_dict()
    # Published files are older than num_batches_tracked, and their classes are not ours.
    needed = [k for k in expected if not k.startswith("fc.") and not k.endswith("num_batches_tracked")]
    if not isinstance(state, dict) or any(getattr(state.get(k), "shape", None) != expected[k].shape for k in needed):
        raise UserError(f"{choice} is not a state dict of torchvision's ResNet18, which --weights needs.")
    return expected | {k: state[k] for k in needed}


# -------------------------------------------------------------------------------------------------------- the loop

def learning_rate(step, steps, peak, warmup):
    """Linear from 0 to `peak` over the first `warmup` of all steps, then linear to 0 ([report] section 4.1)."""
    rise = max(1, round(warmup * steps))
    return peak * min((step + 1) / rise, (steps - step) / max(1, steps - rise))


def precision(device):
    """What autocast computes in: "bfloat16" where the device has it, else "float32": emulation would only cost time."""
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else device.type == "cpu" \
        and any(getattr(torch.cpu, f"_is_{unit}_supported", bool)() for unit in ("avx512_bf16", "amx_tile"))
    return "bfloat16" if fast else "float32"


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for convolution filters (Jordan et al. 2024); PyTorch has it for matrices from 2.9 on.

    A filter bank [out, in, 3, 3] counts as a matrix [out, in * 9]. It moves, by twenty times the learning rate, along
    its Nesterov momentum with all large singular values brought near 1, so that they learn at one pace. Three
    iterations do that for singular values from 0.02 of the norm on, which 28 to 54 % of the directions of the last
    stage have; smaller ones stay smaller. There is no weight decay."""

    def __init__(self, filters, lr):
        super().__init__(filters, {"lr": lr})

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        for filters in group["params"]:
            if filters.grad is None:
                continue
            state = self.state[filters]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(filters)
            momentum = state["momentum"].lerp_(filters.grad, 0.1)
            update = filters.grad.lerp(momentum, 0.9)
            update = orthogonalise(update.flatten(1))
            filters.sub_(update.view(filters.shape), alpha=20 * group["lr"])


def orthogonalise(matrix):
    """Bring the large singular values of a matrix near 1 by three Newton-Schulz iterations (Jordan et al. 2024)."""
    x = matrix / (matrix.norm() + 1e-9)
    x = x.to(getattr(torch, precision(x.device)))
    for _ in range(3):
        a = x @ x.T
        b = torch.addmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.addmm(x, b, x, beta=3.4445)
    return x.to(matrix.dtype)


def infer(model, crops, rows=None, pixels=512 * 128 * 64):
    """Run `model` in evaluation mode over crops[rows], so many pixels at once: -> float32 [N, D] on its device."""
    batch, device = max(1, pixels // crops[0, 0].numel()), next(model.parameters()).device
    rows = torch.arange(len(crops)) if rows is None else rows
    parts = rows.split(batch)
    model.to(memory_format=layout(device)).eval()
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, precision(device) == "bfloat16"):
        output = torch.cat([model(crops[part].to(device)) for part in parts]).float()
    if not output.isfinite().all():
        raise UserError("The network's output holds NaN or infinity: its training diverged. Train with a lower --lr.")
    return output


class TrainingStep(nn.Module):
    """A model's forward pass and its loss in one module, so that DistributedDataParallel sees all that is trained."""

    def __init__(self, model, loss):
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, crops, rows):
        device = crops.device
        with torch.autocast(device.type, torch.bfloat16, precision(device) == "bfloat16"):
            outputs = self.model(crops)
        return self.loss(outputs.float().unflatten(0, rows.shape), rows)


def fit(model, crops, plan, criterion, validate, args, checkpoint):
    """Train `model` as both stages of the report do and leave its best state in it; the only training loop here.

    crops       uint8 [N, 3, H, W], copied to the device if that has twice the room
    plan        generator -> int64 [n, k], drawn anew for each epoch: n items, each of k rows of `crops` (1 for
                attributes, 3 for a triplet). A step takes B of them, their k x B crops in one forward pass
    criterion   (the model's outputs [k, B, ...], the rows of `crops` they belong to [k, B]) -> scalar loss
    validate    () -> dict of figures; the first decides which epoch is best (without any, the last) and when to stop
    checkpoint  what the file args.out says beside the model's weights; its "record" stands beside that file as JSON too

    AdamW; in the strong recipe Muon for all filters but grouped ones, which are many matrices. Items that fill no batch
    are left out. Of several processes each takes its slice of every batch, and DistributedDataParallel averages their
    gradients: all hold the same weights. All validate, and the first one's figures count. After each epoch args.out, with the ending .last, holds all that --resume needs. Returns the record."""
    device, out, (rank, world) = next(model.parameters()).device, args.out, processes()
    arguments = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "resume"}
    record = checkpoint["record"] = copy.deepcopy(checkpoint["record"]) | {
        "arguments": arguments, "run": os.urandom(8).hex(), "metrics": [], "epochs": [], "best epoch": 0}
    generator, cuda = torch.Generator().manual_seed(args.seed), device.type == "cuda"
    random = torch if device.type == "cpu" else getattr(torch, device.type)  # where dropout draws
    if not cuda or crops.numel() < torch.cuda.mem_get_info(device)[0] // 2:
        crops = crops.to(device)

    model.to(memory_format=layout(device))
    filters = []
    if "muon" in args.rungs:
        filters = [p for p in model.parameters() if p.dim() == 4]
    with_muon = set(filters)
    others = [p for p in model.parameters() if p not in with_muon]
    optimizers = [torch.optim.AdamW(others, lr=args.lr, fused=True)]
    if filters:
        optimizers.append(Muon(filters, args.lr))
    warps = {"degrees": 0, "shift": 0.05 * ("shift" in args.rungs), "erase": 0.5 * ("erasing" in args.rungs)}

    training_step = TrainingStep(model, criterion)
    if world > 1:
        training_step = DistributedDataParallel(training_step)

    def step(pixels, warp, rows, lr):
        x = augment(pixels, warp)  # not under autocast: bfloat16 coordinates would shake the pixels
        loss = training_step(x, rows)
        loss.backward()
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    best = None  # the weights of the best epoch
    if args.resume and (last := load_last(out, checkpoint)):
        model.load_state_dict(last["model"])
        for optimizer, moments in zip(optimizers, last["moments"], strict=True):
            optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
        generator.set_state(last["generator"])
        if device.type in last["random"]:
            random.set_rng_state(last["random"][device.type])
        best = torch_load(out)["model"]
    for epoch in range(len(record["epochs"]) + 1, args.epochs + 1):
        if epoch - 1 - record["best epoch"] >= args.patience:
            print(f"Stopped early: {record['metrics'][0]} is no better than {args.patience} epochs ago.")
            break
        rows = plan(generator)
        width = rows.shape[1]
        batch = min(args.batch, len(rows)) // world * world
        if batch < 2 * world:
            raise UserError(f"An epoch has {len(rows)} items, too few for {world} processes with two or more each: "
                            "take more crops.")
        steps = len(rows) // batch
        warp = random_warp(rows.numel(), crops.shape[2:], generator, **warps if args.recipe == "strong" else {})
        rows, warp = (part[:steps * batch].unflatten(0, (steps, batch)).tensor_split(world, 1)[rank].transpose(1, 2)
                      .to(device) for part in (rows, warp.view(*rows.shape, 2, 5)))  # [steps, k, B], [..., 2, 5]
        losses = torch.zeros(steps, device=device)
        if world > 1:  # so that dropout differs from process to process, and is known to --resume
            torch.manual_seed(args.seed + epoch * world + rank)
        model.train()
        begin = shown = time.perf_counter()
        for k, items, warped in zip(range(steps), rows, warp):
            lr = learning_rate((epoch - 1) * steps + k, args.epochs * steps, args.lr, args.warmup)
            losses[k] = step(crops[items.flatten().to(crops.device)].to(device), warped.flatten(0, 1), items, lr)
            # Only here does the host wait for a GPU that holds the crops: after an epoch, or twice a second if watched.
            if k + 1 == steps or time.perf_counter() - shown > 0.5 and (not cuda or sys.stderr.isatty()):
                done, shown = losses[:k + 1].cpu(), time.perf_counter()
                if not done.isfinite().all():
                    raise UserError(f"The loss became {done[-1].item()} in epoch {epoch}: try a lower --lr. "
                                    + (f"{out} keeps epoch {record['best epoch']}." if best else "Nothing is written."))
                speed = (k + 1) * batch * width / (shown - begin)
                left = round(((args.epochs - epoch + 1) * steps - k - 1) * batch * width / speed)
                progress(f"epoch {epoch}/{args.epochs}  step {k + 1}/{steps}  loss {done.mean().item():.4f}  "
                         f"{speed:.0f} images/s  {left // 60}:{left % 60:02} left")
        record["seconds"]["training"] = round(record["seconds"].get("training", 0) + shown - begin, 2)
        if world > 1:
            dist.all_reduce(losses)
            losses /= world
        with timed(record["seconds"], "validation"):
            figures = validate()
        if world > 1:  # the first process's, so that all stop alike, as no two GPUs need compute the same
            shared = [figures]
            dist.broadcast_object_list(shared, src=0)
            figures = shared[0]
        if epoch == 1:
            set_aside(out)
        record["epochs"].append({"epoch": epoch, "loss": losses.mean().item(), "lr": lr, **figures,
                                 "seconds": round(shown - begin, 3), "images_per_second": round(speed, 1)})
        record["metrics"] = list(figures) or ["epoch"]
        record["best epoch"] = max(record["epochs"], key=lambda row: row[record["metrics"][0]])["epoch"]
        # A kill may come between any two of these. The record claims the name, and no other run may have since. The
        # best checkpoint comes before the state to resume: if only the state were older, its epoch is trained again to
        # the same bits; were it newer, the weights of its best epoch would be lost.
        write_record(out, record)
        checkpoint["model"] = model.state_dict()
        if record["best epoch"] == epoch:
            best = copy.deepcopy(checkpoint["model"])
            save_checkpoint(out, checkpoint)
        save_checkpoint(out.with_suffix(".last"), checkpoint | {
            "moments": [optimizer.state_dict()["state"] for optimizer in optimizers],
            "generator": generator.get_state(), "random": {device.type: random.get_rng_state()}})
        told = "  validation " * bool(figures) + ", ".join(f"{k} {100 * v:.2f}" for k, v in figures.items())
        progress("")
        print(f"epoch {epoch:2}/{args.epochs}  loss {losses.mean().item():.4f}  {speed:.0f} images/s" + told
              + "  *" * (record["best epoch"] == epoch and bool(figures)), flush=True)
    model.load_state_dict(best)
    return record


def progress(text):
    """Show one line that the next call overwrites; nothing where the output is a file or the process not the first."""
    if processes()[0] > 0:
        return
    with contextlib.suppress(OSError, ValueError):  # of a file, and of a terminal that does not say how wide it is
        width = os.get_terminal_size(sys.stderr.fileno()).columns - 1
        print(f"\r{text[:width]:{width}}\r", end="", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------- files, settings, errors

def processes():
    """Which of the processes that torchrun started this one is, and how many they are; (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def load_last(out, checkpoint):
    """The state to go on from with the run that writes `out`, its record put into `checkpoint`; None: there is none.
    UserError if it is of other arguments or data, or if `out` is another run's."""
    path, record = out.with_suffix(".last"), checkpoint["record"]
    if not path.exists():
        return print(f"There is no {path} to resume: starting.")
    last = load_checkpoint(path, checkpoint["kind"])
    differ = [name for kind in ("fingerprints", "arguments") for name, value in record[kind].items()
              if name not in "data init out without prior hamming threshold rerank patience".split()
              and value != (had := last["record"][kind].get(name)) and (name != "device" or "mps" in (value, had))]
    if differ:
        name = ([n for n in ("recipe", "stage 1", "rungs") if n in differ] + differ)[0].replace("rungs", "--without")
        raise UserError(f"{path} is of a run with another {name}: resume with that, or start without --resume.")
    done, count = last["record"], last["record"]["processes"]  # what else a record says is of the part that begins
    record.update({k: done[k] for k in ("run", "metrics", "epochs", "best epoch", "seconds")})
    if not out.exists() or read_record(out).get("run") != record["run"]:
        raise UserError(f"{out} is not the best checkpoint of the run that {path} goes on with: start without --resume.")
    print(f"Going on after epoch {len(record['epochs'])}" + (
        f", but not to the same bits as {count} processes." if count != record["processes"] else "."))
    return last


def set_aside(out):
    """Rename an earlier run's checkpoint, record and figure 3 to NAME.old.pt and so on; its state to resume goes.

    That goes first: a kill in between leaves files that the next run sets aside, and no state without its best."""
    if processes()[0] > 0:
        return
    out.with_suffix(".last").unlink(missing_ok=True)
    for path in (out.with_suffix(".json"), out.with_suffix(".png"), out):
        if path.exists():
            old = path.with_suffix(f".old{path.suffix}")
            path.replace(old)
            print(f"{path} of an earlier run is now {old}.")


def read_record(out):
    """The record beside a checkpoint; an empty dict where there is none that can be read."""
    try:
        return json.loads(out.with_suffix(".json").read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return {}


def write_record(out, record):
    """Write the run's record beside its checkpoint, as JSON; UserError where another run has begun to write there."""
    path = out.with_suffix(".json")
    if processes()[0] == 0 and path.exists() and read_record(out).get("run") != record["run"]:
        raise UserError(f"{path} is another run's by now, so this one ends: give each run an --out of its own.")
    record["peak_memory_MB"] = peak_memory()
    text = json.dumps(record, indent=1)
    write_whole(path, lambda file: file.write(text.encode()))


def peak_memory():
    """Highest memory use so far in MB: {"host": ..., "device": ...}, what the system says of it."""
    peak = {"device": torch.cuda.max_memory_allocated() >> 20} if torch.cuda.is_available() else {}
    with contextlib.suppress(ImportError):
        import resource  # not on Windows
        peak["host"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)
    return peak


def write_whole(path, write):
    """Call write(file), and put what it wrote in the place of `path`, whole or not at all; the first process does."""
    if processes()[0]:
        return
    temporary, buffer = path.with_name(f".{path.name}.{os.getpid()}.tmp"), io.BytesIO()
    write(buffer)  # to memory, as torch.save hides a full disk, and Ctrl-C, behind errors of its own
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


def check_output(path, suffix):
    """Make the folder of `path` and try to write in it: better before the work than after."""
    if path.is_dir() or path.suffix != suffix:
        raise UserError(f"{path} is no name for the file to write: give one that ends in {suffix}.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): choose another place.") from None


def save_checkpoint(path, checkpoint):
    """Write a checkpoint: a dict of "kind" ("par" or "reid"), "record", "model", "train_ids", "validation_ids", ..."""
    write_whole(path, lambda file: torch.save(checkpoint | {"version": 3, "classes": list(ATTRIBUTES.items())}, file))


def load_checkpoint(path, *kinds):
    """Read a checkpoint and check that it is one of `kinds` ("par", "reid")."""
    checkpoint = torch_load(path)
    marks = [checkpoint.get(k) for k in ("version", "classes")] if isinstance(checkpoint, dict) else None
    if marks != [3, list(ATTRIBUTES.items())]:
        raise UserError(f"{path} is not a checkpoint of this version of the project.")
    if checkpoint["kind"] not in kinds:
        raise UserError(f"{path} is a checkpoint of {checkpoint['kind']}.py; one of {kinds[0]}.py is needed here.")
    return checkpoint


def torch_load(path):
    """Load a file of tensors and plain values; never runs code from it."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except Exception as error:  # zip, pickle and PyTorch raise a dozen types on a damaged file
        raise UserError(f"{path} is not a readable checkpoint ({type(error).__name__}).") from None


def number(kind, low, high=10**9, word=None):
    """An argparse type: `kind`, int or float, from `low` to `high`; or `word`."""
    def number(text):
        if text != word and not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not {f'{word} or ' * bool(word)}a number from {low} to {high}")
        return text if text == word else kind(text)
    return number


def image_size(text):
    """An argparse type: "128x64" -> (128, 64), height and width."""
    if not re.fullmatch(r"\d+x\d+", text) or not all(32 <= int(side) <= 1024 for side in text.split("x")):
        raise argparse.ArgumentTypeError(f"{text} is not HEIGHTxWIDTH, each from 32 to 1024")
    return tuple(map(int, text.split("x")))


def shared_flags(parser, epochs, lr, batch, out, rungs):
    """Add the flags of both scripts; tuples: defaults of the report, of strong, of strong from pretrained weights."""
    parser.set_defaults(rungs=rungs)
    add = parser.add_argument_group("data, training and output (defaults in brackets)").add_argument
    add("--recipe", choices=("report", "strong"), default="report", help="the report's, or all known since (report)")
    add("--without", nargs="+", default=[], choices=rungs, metavar="RUNG", help="strong without: " + ", ".join(rungs))
    add("--data", type=Path, metavar="DIR", help="of Market-1501 (./Market-1501-v15.09.15, else a drawn demo set)")
    add("--size", type=image_size, metavar="HxW", help="crops' height x width (128x64, or the checkpoint's)")
    add("--weights", metavar="W", help="imagenet, none or a FILE of torchvision's ResNet18 (imagenet; demo set: none)")
    add("--epochs", type=number(int, 1), default=epochs, metavar="N", help="how many (report: %s; strong: %s)" % epochs)
    add("--lr", type=number(float, 1e-12), default=lr, metavar="R", help="peak (%s; strong: %s, or pretrained %s)" % lr)
    add("--warmup", type=number(float, 0, 1), default=0.1, metavar="F", help="part of all steps before it falls (0.1)")
    add("--batch", type=number(int, 2), default=batch, metavar="N", help="a step: images, triplets or, stage 2 strong, "
        "fours of an identity (%s; strong: %s)" % batch)
    add("--patience", type=number(int, 1), default=(5, 999), metavar="N", help="stop after N epochs without a better "
        "one (report: 5; strong: 999, as figures jump while its rate is high)")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, metavar="N", help="of split, weights and sampling (0)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="to compute on (auto: the fastest)")
    add("--out", type=Path, default=Path(out), metavar="FILE", help="best checkpoint, pictures beside it (%(default)s)")
    add("--resume", action="store_true", help="go on with a run that was cut off, after its last whole epoch")


def start(args, source=None, checkpoint=None, data=True):
    """Settle what --recipe, --device, --size, --data and --weights leave open, say so, begin the run's record: -> that
    dict. A checkpoint, read from `source`, decides the size. data: whether the command reads the data set."""
    if args.out.suffix != ".pt":
        raise UserError(f"--out {args.out} is no name for a checkpoint: give one that ends in .pt.")
    if args.without and (args.recipe == "report" or args.eval):
        raise UserError("--without leaves steps out of training by --recipe strong: pass that too, and no --eval.")
    args.rungs = [rung for rung in args.rungs if args.recipe == "strong" and rung not in args.without]
    alone = "RANK" not in os.environ  # else torchrun has started this process; MPS cannot send what it computes
    if not alone and (args.eval or vars(args).get("stats")):
        raise UserError("Several processes only train: run this command without torchrun.")
    best = "cuda" if torch.cuda.is_available() else "mps" if alone and torch.backends.mps.is_available() else "cpu"
    if args.device not in ("auto", "cpu", best):
        raise UserError(f"PyTorch {torch.__version__} finds no {args.device} device here: pass --device {best}.")
    args.device = best if args.device == "auto" else args.device
    if not alone and not dist.is_initialized():
        try:
            if args.device == "cuda":  # one for each process of this machine
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("nccl" if args.device == "cuda" and dist.is_nccl_available() else "gloo")
            atexit.register(dist.destroy_process_group)  # else its threads may abort the process at its end
        except (KeyError, ValueError, RuntimeError) as error:
            raise UserError(f"The processes of this run cannot meet ({str(error).splitlines()[0]}): start them by "
                            "torchrun, no more on a machine than it has GPUs, or unset the variable RANK.") from None
    torch.backends.cudnn.benchmark = True  # shapes do not change: the time to choose an algorithm comes back
    keep_freed_memory()
    saved = checkpoint["record"] if checkpoint else {"arguments": {"size": args.size or (128, 64)}}
    if args.size not in (None, saved["arguments"]["size"]):
        raise UserError(f"{source} was trained with another --size than {args.size[0]}x{args.size[1]}: leave that out.")
    args.size = saved["arguments"]["size"]
    args.data = find_data(args.data) if data else Path(saved["data"]["folder"])
    demo = (args.data / DRAWN).is_file() if data else saved["data"]["drawn demo set"]
    args.weights = args.weights or ("none" if demo else "imagenet")
    k = 1 + (args.recipe == "strong") * (1 + (args.weights != "none"))  # of the defaults in `shared_flags`
    vars(args).update({name: v[:k][-1] for name, v in vars(args).items() if isinstance(v, tuple) and name != "size"})
    world = processes()[1]
    if args.batch % world or args.batch < 2 * world:
        raise UserError(f"--batch {args.batch} cannot be shared by {world} processes: give a multiple of {world}, two "
                        "or more for each.")
    record = {"data": {"folder": str(args.data), "drawn demo set": demo}, "seconds": {},
              "precision": precision(torch.device(args.device)), "threads": torch.get_num_threads(),
              "processes": world, "machine": platform.platform(), "versions": {
                  "python": platform.python_version(), "torch": torch.__version__[:],
                  "torchvision": torchvision.__version__}}
    print("DEMO SET of drawn people: its figures say nothing about Market-1501. README says how to get that.\n" * demo
          + f"{'data' if data else 'trained on'} {args.data} | {args.device}, {record['precision']}, "
          f"{record['processes']} x {record['threads']} threads | {args.size[0]}x{args.size[1]} | "
          + (f"{source}" if args.eval else f"{source or f'weights {args.weights}'} | seed {args.seed}"),
          file=sys.stdout if data else sys.stderr, flush=True)  # stderr, as results on stdout may go into a file
    return record


def keep_freed_memory():
    """On Linux with glibc, keep freed blocks for the next training step, which would else have each mapped and zeroed
    anew: a tenth of the training speed on a CPU. Elsewhere this does nothing."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        m_trim_threshold = -1
        m_mmap_threshold = -3
        libc.mallopt(m_trim_threshold, 2**31 - 1)
        libc.mallopt(m_mmap_threshold, 2**25)  # its upper limit


def find_data(folder):
    """--data or, without it, Market-1501 in the working directory or else the demo set, drawn if it has not been."""
    if folder is not None and not folder.is_dir():
        raise UserError(f"--data {folder} is not a folder.")
    real, demo = Path("Market-1501-v15.09.15"), Path("Market-1501-demo")
    if not folder and not real.is_dir() and not demo.is_dir():
        print(f"Drawing the demo set into ./{demo} ...", flush=True)
        with tempfile.TemporaryDirectory(prefix=".demo-", dir=".") as own:
            draw_market(Path(own, "demo"), 100, 6, seed=0)
            with contextlib.suppress(OSError):  # another run's is there by now: that will do
                Path(own, "demo").rename(demo)
    return folder or (real if real.is_dir() else demo)


@contextlib.contextmanager
def timed(seconds, what):
    """Add the seconds that a block takes to seconds[what]."""
    begin = time.perf_counter()
    yield
    seconds[what] = round(seconds.get(what, 0) + time.perf_counter() - begin, 2)


def say_seconds(seconds, file=None):
    """Print where the time went, and the peak memory."""
    peak = " and ".join(f"{mb / 1000:.1f} GB ({where})" for where, mb in peak_memory().items())
    print("Seconds: " + ", ".join(f"{what} {value:.1f}" for what, value in seconds.items())
          + f"; peak memory {peak}" * bool(peak), file=file)


def run(main, parser):
    """Run a script's main(args); the one place where errors become sentences and exit codes."""
    other, args, code = os.environ.get("RANK", "0") != "0", None, 2
    try:
        quiet = open(os.devnull, "w", errors="replace") if other else None  # the first process speaks for all
        with contextlib.redirect_stdout(quiet or sys.stdout):
            args = parser.parse_args()
            return main(args)
    except BrokenPipeError:  # the reader, `head` for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # as of a program that a closed pipe ends
    except UserError as error:
        sentence = " ".join(str(error).splitlines())
    except OSError as error:
        sentence = f"{error.filename or 'A file'} cannot be read or written ({error.strerror or error})."
    except (RuntimeError, MemoryError) as error:
        sentence = "the memory is full: lower --batch or --size, or pass another --device."
        if processes()[1] > 1 and re.search("gloo|NCCL|onnection (closed|reset)|Broken pipe", str(error)):
            sentence = "another process of this run has ended, so this one does."
        elif isinstance(error, RuntimeError) and not re.search("of memory|can't allocate|not enough mem", str(error)):
            raise
    except KeyboardInterrupt:
        code, sentence = 130, "stopped." if args is None or args.eval or vars(args).get("stats") else \
            "stopped; the same command with --resume goes on after the last whole epoch."
    progress("")
    print(f"{parser.prog}: {sentence}", file=sys.stderr)
    sys.exit(code)


# ------------------------------------------------------------------------------------------------ tables and figures

COLOURS = ("#0072b2", "#d55e00", "#009e73")  # Okabe and Ito's: told apart by the colour-blind
INK, GREY = "#222222", "#8a8a8a"


def table(title, header, rows):
    """Print rows [name, cells...] under a header; a cell is a number, shown with two decimals, or a text."""
    texts = [[" ".join(v.splitlines()) if isinstance(v, str) else "-" if v != v else f"{v:.2f}" for v in row]
             for row in rows]
    sides = ["<" if k == 0 or any(re.search("[a-z]{2}", row[k]) for row in texts) else ">" for k in range(len(header))]
    widths = [max(map(len, column)) for column in zip(header, *texts)]
    print(f"\n{title}")
    for row in (header, *texts):
        print("  ".join(f"{v:{side}{width}}" for v, side, width in zip(row, sides, widths)).rstrip(), flush=True)


def write_picture(path, picture):
    """Write a Pillow image as PNG, and say where it is."""
    write_whole(path, lambda file: picture.save(file, "PNG"))
    print(f"As a picture: {path}", file=sys.stderr)


def sheet(path, rows, height=256):
    """Draw crops with captions into a PNG file: rows of cells (crop uint8 [3, H, W], lines, colour of a frame or None).
    A line is a text or a (text, colour); the longest are cut."""
    font, room, lines = ImageFont.load_default(14), 8, max(len(lines) for row in rows for _, lines, _ in row)
    width = round(height * rows[0][0][0].shape[2] / rows[0][0][0].shape[1])
    wide, tall = max(150, width) + 2 * room, height + 18 * lines + 3 * room
    picture = Image.new("RGB", (wide * max(map(len, rows)) + room, tall * len(rows) + room), "white")
    pen = ImageDraw.Draw(picture)
    for i, row in enumerate(rows):
        for k, (crop, lines, frame) in enumerate(row):
            x, y = room + k * wide, room + i * tall
            image = Image.fromarray(crop.permute(1, 2, 0).numpy()).resize((width, height), Image.Resampling.BICUBIC)
            picture.paste(ImageOps.expand(image, 4, frame or "white"), (x - 4, y - 4))
            for j, line in enumerate(lines):
                text, colour = (line, INK) if isinstance(line, str) else line
                text = " ".join(text.encode("ascii", "replace").decode().splitlines())  # the font has no other letters
                while pen.textlength(text, font) > wide - 2 * room:
                    text = text.removesuffix("...")[:-1] + "..."
                pen.text((x, y + height + room + 18 * j), text, colour, font)
    write_picture(path, picture)


# ------------------------------------------------------------------------------------------
# The drawn people of the demo set. A first reading can end here.

DRAWN = "drawn.txt"  # marks a drawn data set; written last, so it also says that the set is whole

# How often each class is drawn, as unbalanced as in Market-1501 ([report] table 4).
FREQUENCIES = {
    "age": (0.05, 0.66, 0.24, 0.05),
    "up": (0.15, 0.85),
    "down": (0.40, 0.60),
    "hat": (0.93, 0.07),
    "backpack": (0.73, 0.27),
    "bag": (0.75, 0.25),
    "handbag": (0.88, 0.12),
    "upcolor": (0.16, 0.26, 0.11, 0.05, 0.06, 0.12, 0.08, 0.08, 0.08),
    "downcolor": (0.36, 0.08, 0.05, 0.02, 0.03, 0.16, 0.18, 0.03, 0.06, 0.03),
}
RGB = {
    "black": (38, 36, 40),
    "white": (232, 230, 224),
    "red": (196, 40, 44),
    "purple": (126, 62, 150),
    "yellow": (228, 196, 62),
    "gray": (134, 136, 140),
    "blue": (52, 88, 172),
    "green": (64, 138, 76),
    "pink": (232, 142, 170),
    "brown": (122, 82, 50),
}


@dataclass
class Person:
    """Who is drawn: the class of each attribute, and what tells two people of the same classes apart."""

    classes: dict[str, str]  # attribute -> name of its class
    top: list  # colours from the neck down: one, or three if its class is "multi"
    bottom: list  # the same from the hip down
    skin: tuple
    hair: tuple
    shoes: tuple
    luggage: tuple  # of hat, backpack, bag and handbag
    width: float
    height: float


class Pose(NamedTuple):
    """Where and how a person stands in a picture."""

    x: float  # of the middle, in pixels
    y: float  # of the feet, in pixels
    unit: float  # pixels a unit; a grown-up is 112 units tall
    side: int  # 1, or -1 to mirror
    stride: float  # of the feet, in units
    from_behind: bool


def draw_market(root, identities, images_per_identity, seed=0):
    """Draw a data set of people in Market-1501's layout into folder `root`: so many identities in the training half,
    as many others in the test half, each with so many crops, from two cameras or more, to train with or in the
    gallery; queries, distractors, junk and annotations come with them. The same for a seed."""
    root = Path(root)
    random = np.random.RandomState(seed)  # whose stream is frozen across NumPy's versions
    numbers = itertools.count(25, 25)
    for folder in PARTS.values():
        (root / folder).mkdir(parents=True, exist_ok=True)

    def shoot(part, person_id, person, camera):
        path = root / PARTS[part] / f"{person_id}_c{camera}s1_{next(numbers):06d}_01.jpg"
        draw_crop(person, camera, random).save(path, quality=80)

    for half, part, first in (("train", "train", 1), ("test", "gallery", identities + 1)):
        people = {}
        for person_id in range(first, first + identities):
            people[person_id] = person = draw_identity(random)
            cameras = 1 + random.permutation(6)[: random.randint(2, 7)]
            for camera in np.resize(cameras, images_per_identity):
                shoot(part, f"{person_id:04d}", person, camera)
            if part == "gallery":  # each query is to be found in another camera
                query_cameras = cameras[1:2] if images_per_identity == 1 else cameras[:2]
                for camera in query_cameras:
                    shoot("query", f"{person_id:04d}", person, camera)
        write_annotations(root / f"annotations_{half}.csv", people)

    for k in range(max(2, identities * images_per_identity // 5)):
        stranger = "-1" if k % 8 == 0 else "0000"  # junk or a distractor
        shoot("gallery", stranger, draw_identity(random), random.randint(1, 7))
    arguments = f"{identities}, {images_per_identity}, {seed}"
    (root / DRAWN).write_text(f"Drawn people: draw_market({arguments})\n")


def write_annotations(path, people):
    """Write the attributes of a dict of identity -> `Person` as the course's CSV; `read_annotations` reads it."""
    lines = []
    for person_id, person in people.items():
        line = {"id": person_id}
        for attribute, columns in COLUMNS.items():
            code = ATTRIBUTES[attribute].index(person.classes[attribute])
            if len(columns) == 1:
                line[attribute] = code + 1
            else:
                line.update({column: 1 + (k == code) for k, column in enumerate(columns)})
        lines.append(line)
    rows = [list(lines[0])] + [list(line.values()) for line in lines]
    np.savetxt(path, rows, "%s", ",")


def draw_identity(random):
    """Choose a person by a NumPy RandomState: -> `Person`."""
    classes = {}
    for attribute, frequencies in FREQUENCIES.items():
        classes[attribute] = ATTRIBUTES[attribute][random.choice(len(frequencies), p=frequencies)]
    female = random.rand() < 0.45
    long_hair = random.rand() < (0.72 if female else 0.06)
    dress = female and random.rand() < 0.32
    classes["gender"] = "female" if female else "male"
    classes["hair"] = "long" if long_hair else "short"
    classes["clothes"] = "dress" if dress else "pants"

    def choose_colours(attribute):
        names = [classes[attribute]]
        if names == ["multi"]:
            names = random.permutation(ATTRIBUTES[attribute][:-1])[:3]
        shade = random.uniform(-20, 20, 3)
        return [tinted(RGB[name] + shade) for name in names]

    top = choose_colours("upcolor")
    bottom = choose_colours("downcolor")
    hair = tinted((158, 118, 72), random.uniform(0.3, 1))
    if classes["age"] == "old":
        hair = (214, 214, 212)
    widths = {"young": 0.8, "teenager": 0.92, "adult": 1.12, "old": 1.04}
    heights = {"young": 0.68, "teenager": 0.98, "adult": 1.0, "old": 0.93}
    shoes, luggage = random.choice(list(RGB), 2)
    return Person(
        classes,
        top,
        bottom,
        skin=tinted((238, 198, 168), random.uniform(0.6, 1)),
        hair=hair,
        shoes=tinted(RGB[shoes], 0.85),
        luggage=tinted(RGB[luggage], 0.85),
        width=widths[classes["age"]] * random.uniform(0.92, 1.08),
        height=heights[classes["age"]] * random.uniform(0.95, 1.02),
    )


def draw_crop(person, camera, random):
    """Draw a person as one camera sees them, at its place and in its light: a Pillow image of 64x128 pixels."""
    place = np.random.RandomState(camera + 47)
    wall = place.uniform(110, 200) + place.normal(0, 9, 3)
    ground = place.uniform(110, 200) + place.normal(0, 9, 3)
    light = place.uniform(0.8, 1.15) + place.normal(0, 0.06, 3)
    blur = ImageFilter.GaussianBlur(0.3 + 0.6 * place.rand())

    picture = Image.new("RGB", (192, 384), tinted(ground))  # three times as large, to be reduced
    pen = ImageDraw.Draw(picture)
    pen.rectangle((0, 0, 192, place.randint(160, 270)), tinted(wall))
    pose = Pose(
        x=random.uniform(87, 105),
        y=random.uniform(358, 372),
        unit=random.uniform(2.75, 3.1) * person.height,
        side=random.choice([-1, 1]),
        stride=random.uniform(0, 6),
        from_behind=random.rand() < 0.45,
    )
    draw_part(pen, pose, tinted(ground, 0.8), [(-12, 0), (12, 0)], 5)  # the shadow
    draw_person(pen, pose, person)

    picture = picture.reduce(3).filter(blur)
    exposure = light * random.uniform(0.88, 1.12)
    noise = random.normal(0, 4, (128, 64, 3))
    return Image.fromarray(np.clip(picture * exposure + noise, 0, 255).astype(np.uint8))


def draw_part(pen, pose, colour, points, thickness=0):
    """Draw a polygon with a round border so thick; two points make a line. x is counted from the middle of the
    person, y from the feet up: the neck is at 90, the crown at 112."""
    points = [(pose.x + pose.side * pose.unit * x, pose.y - pose.unit * y) for x, y in points]
    pen.polygon(points, colour)
    if thickness > 0:
        pen.line(points, colour, round(pose.unit * thickness))
        for point in points:
            pen.circle(point, pose.unit * thickness / 2, colour)


def draw_person(pen, pose, person):
    """Draw the parts of a person from the farthest to the nearest."""
    worn = [attribute for attribute in ("hat", "backpack", "bag", "handbag") if person.classes[attribute] == "yes"]
    shoulder = (10.4 if person.classes["gender"] == "female" else 12.8) * person.width
    hip = 9.4 * person.width
    backpack = [(0, 80), (0, 68)]
    long_hair = [(0, 103), (0, 83)]

    if not pose.from_behind:
        if "backpack" in worn:
            draw_part(pen, pose, person.luggage, backpack, 25 * person.width)
        if person.classes["hair"] == "long":
            draw_part(pen, pose, person.hair, long_hair, 16)
    draw_clothes(pen, pose, person, shoulder, hip)

    draw_part(pen, pose, person.skin, [(0, 90), (0, 96)], 5.5)  # the neck
    draw_part(pen, pose, person.hair, [(0, 101), (0, 104)], 16)
    if pose.from_behind:
        if person.classes["hair"] == "long":
            draw_part(pen, pose, person.hair, long_hair, 16)
        if "backpack" in worn:
            draw_part(pen, pose, person.luggage, backpack, 18 * person.width)
    else:
        draw_part(pen, pose, person.skin, [(0, 98.5), (0, 101)], 12.6)  # the face
        for x in (-1.6, 3.4):
            draw_part(pen, pose, RGB["black"], [(x, 100.7), (x, 101.3)], 1.9)
            if "backpack" in worn:  # its straps
                strap = (x - 0.9) * 2.6 * person.width
                draw_part(pen, pose, person.luggage, [(strap, 89), (strap, 66)], 2.6)

    if "hat" in worn:
        draw_part(pen, pose, person.luggage, [(-2, 107), (2, 107)], 13)
        draw_part(pen, pose, person.luggage, [(-9, 105), (9, 105)], 2.6)
    if "bag" in worn:
        draw_part(pen, pose, person.luggage, [(0.6 * shoulder, 89), (-hip, 57)], 1.8)
        draw_part(pen, pose, person.luggage, [(-hip - 4, 56), (-hip, 50)], 9)
    if "handbag" in worn:
        hand = shoulder + 2
        draw_part(pen, pose, person.luggage, [(hand, 55), (hand - 5, 38), (hand + 5, 38)], 6)


def draw_clothes(pen, pose, person, shoulder, hip):
    """Draw legs, arms and what is worn over them."""
    hem = 32 if person.classes["down"] == "short" else 7
    foot = 4.6 * person.width + pose.stride
    cuff = foot - pose.stride * hem / 54
    sleeve = 74 if person.classes["up"] == "short" else 58
    for side in (-1, 1):
        draw_part(pen, pose, person.skin, [(side * 4.6 * person.width, 54), (side * foot, 4)], 6 * person.width)
        draw_part(pen, pose, person.shoes, [(side * (foot - 0.5), 2.5), (side * (foot + 2), 2)], 5)
        if person.classes["clothes"] == "pants":
            inner, outer = side * (cuff - 4.2 * person.width), side * (cuff + 4.6 * person.width)
            draw_garment(pen, pose, person.bottom, (0, side * hip, 56), (inner, outer, hem))
    if person.classes["clothes"] == "dress":
        draw_garment(pen, pose, person.bottom, (-hip, hip, 56), (-hip - 6, hip + 6, hem))

    draw_garment(pen, pose, person.top, (1.5 - shoulder, shoulder - 1.5, 88), (-hip, hip, 52))
    for side in (-1, 1):
        joint = (side * (shoulder - 2), 84.5)
        draw_part(pen, pose, person.skin, [joint, (side * (shoulder + 2), 54)], 4.6 * person.width)
        draw_part(pen, pose, person.top[0], [joint, (side * (shoulder + 1), sleeve)], 6.2 * person.width)


def draw_garment(pen, pose, colours, top, bottom):
    """Draw a garment in bands of equal height, a colour each; top and bottom: (left, right, y) of its edges."""
    edges = np.linspace(top, bottom, len(colours) + 1)
    for colour, (left, right, y), (lower_left, lower_right, lower_y) in zip(colours, edges, edges[1:]):
        corners = [(left, y), (right, y), (lower_right, lower_y), (lower_left, lower_y)]
        draw_part(pen, pose, colour, corners)


def tinted(colour, factor=1.0):
    """A colour with each channel times `factor`, as Pillow takes it."""
    return tuple(int(channel) for channel in np.clip(np.multiply(colour, factor), 0, 255))
