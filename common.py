#!/usr/bin/env python3
"""What par.py and reid.py share: Market-1501 and its drawn stand-in, augmentation, ResNet18, the training loop.

Data flows one way. Every crop is decoded once into one uint8 tensor that stays on the device; an index tensor says what
each step trains on (one row per image for attributes, three for a triplet); a step gathers those rows, flips and
rotates them in one batch, and runs one forward and one backward pass. `fit` is the only training loop of the project.

[report] is "Person Attributes Recognition and Re-Identification" (Caldarella, Pedeni, Trebucchi; University of Trento).
"""
import argparse
import contextlib
import csv
import ctypes
import functools
import hashlib
import json
import math
import os
import platform
import re
import shutil
import signal
import socket
import sys
import threading
import time
import urllib.request
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, ImageColor, ImageDraw, ImageFilter, ImageFont, ImageOps
from torch import nn
from torch.nn import functional as F
from torchvision.models import ResNet18_Weights, resnet18
from torchvision.transforms.v2.functional import resize

# Class names in the order of their codes in the annotations, attributes in the order of [report] tables 2-4. The last
# class of both colours, "multi", is the report's own (section 2): an identity with no single colour flagged.
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
    "downcolor": ("black", "white", "pink", "purple", "yellow", "gray", "blue", "green", "brown", "multi"),
}
IGNORED = ("thumbs.db", "desktop.ini")  # a system's own files
PARTS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}


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

    @functools.cached_property
    def fingerprint(self):
        """Of names, labels and pixels, for a run to tell whether it resumes on what it began with: a hex string."""
        digest = hashlib.sha256(json.dumps(self.names).encode())
        for tensor in (self.labels, self.images.permute(0, 2, 3, 1)):
            digest.update(tensor.contiguous().numpy())
        return digest.hexdigest()


def load_market(root, part, size=(128, 64)):
    """Read `part` ("train", "query" or "gallery") of the data set in folder `root` into memory.

    size: (height, width); crops of another size are resized, with antialiasing. Annotations are read by column name
    from annotations_{train,test}.csv or else from market_attribute.mat (SciPy needed); a part without them has labels
    of -1. Raises UserError, naming the file, for whatever is missing, unreadable or out of range.
    """
    root, folder = Path(root), Path(root) / PARTS[part]
    if not folder.is_dir():
        raise UserError(f"{root} has no folder {PARTS[part]}: --data takes the folder that holds "
                        f"{', '.join(PARTS.values())}.")
    names = sorted(n for n in os.listdir(folder) if n[0] != "." and n.lower() not in IGNORED)
    if not names:
        raise UserError(f"{folder} holds no crops.")
    parsed = [re.match(r"(-1|\d{1,9})_c(\d{1,9}).*\.jpe?g$", n, re.IGNORECASE) for n in names]
    if None in parsed:
        raise UserError(f"{folder / names[parsed.index(None)]} is not named like a crop of Market-1501 "
                        "(0002_c1s1_000451_03.jpg: identity 2, camera 1): rename it or move it out of the folder.")
    ids, cameras = ([int(m[k]) for m in parsed] for k in (1, 2))
    known, table = read_annotations(root, "train" if part == "train" else "test")
    row = {i: k for k, i in enumerate(known.tolist())}
    missing = [i for i in ids if i > 0 and i not in row]
    if row and missing:
        raise UserError(f"The annotations in {root} lack identity {missing[0]:04d}, which has crops in {folder.name}.")
    table = torch.cat([table, torch.full((1, len(ATTRIBUTES)), -1)])  # row -1: not annotated
    labels = table[[row.get(i, -1) for i in ids]]
    return Market(read_crops([folder / n for n in names], size), *map(torch.tensor, (ids, cameras)), labels, names)


def read_crops(paths, size):
    """Decode JPEG files in threads, 512 to a call, where torchvision's decoder is fastest: uint8 [N, 3, H, W]."""
    crops = torch.empty(len(paths), 3, *size, dtype=torch.uint8, memory_format=torch.channels_last)

    def read(start):
        batch = paths[start:start + 512]
        try:
            files = [np.fromfile(p, np.uint8) for p in batch]
            if any(len(file) > 2**17 for file in files):
                raise RuntimeError("no crop of a person")  # one at a time then, and Pillow has a limit
            decoded = torchvision.io.decode_jpeg([torch.from_numpy(file) for file in files],
                                                 torchvision.io.ImageReadMode.RGB, apply_exif_orientation=True)
        except (RuntimeError, OSError, AttributeError):
            # Pillow is slower, reads more, and says which file it is. (torchvision 0.29 announces that its decoder
            # will go one day: that is the AttributeError.)
            decoded = [resize(read_image(p), list(size), antialias=True) for p in batch]
        here = crops[start:start + len(batch)]
        if all(crop.shape[1:] == tuple(size) for crop in decoded):
            torch.stack(decoded, out=here)
        else:
            for i, crop in enumerate(decoded):
                here[i] = resize(crop, list(size), antialias=True)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(read, range(0, len(paths), 512)))
    return crops


def read_image(path):
    """Read an image of any format and mode that Pillow knows: uint8 [3, h, w], upright, transparency laid on white."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode[0] in "IF":  # 16 or 32 bits a pixel, which Pillow would cut off at 255
                values = np.nan_to_num(np.asarray(image, np.float64))
                white = 65535 if image.mode.startswith("I;16") else max(255, values.max())
                white = 1 if image.mode == "F" and values.max() <= 1 else white
                image = Image.fromarray((values.clip(0, white) * (255 / white)).astype(np.uint8))
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(f"{path} is too large an image to be a crop of a person.") from None
    except Exception as error:  # Pillow raises a dozen types on a damaged file
        raise UserError(f"{path} is not a readable image ({error}): replace it or move it out of the folder.") from None


def read_user_images(paths, size):
    """Read the user's own images, and all files in folders and their subfolders: -> (paths, uint8 [N, 3, H, W]).

    What cannot be read is named on stderr and left out; UserError if nothing is left.
    """
    files, empty = [], []
    for path in map(Path, paths):
        before, walk = len(empty), os.walk(path, onerror=lambda error: empty.append(
            f"{error.filename} cannot be read ({error.strerror})."))
        inside = (Path(folder, name) for folder, _, names in walk for name in names) if path.is_dir() else [path]
        found = sorted(p for p in inside if p.is_file() and p.name.lower() not in IGNORED
                       and not any(part.startswith(".") for part in p.relative_to(path).parts))
        if not found and len(empty) == before:
            empty.append(f"{path} holds no files." if path.exists() else f"{path} does not exist.")
        files += found
    if not files:
        raise UserError(" ".join(empty))
    for sentence in empty:
        print(f"Skipped: {sentence}", file=sys.stderr)
    read, pixels = [], bytearray()  # that grows in place: a list of crops, to be stacked, would take its memory twice

    def decode(path):
        try:
            return resize(read_image(path), list(size), antialias=True)
        except UserError as error:
            return error
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for k, (path, crop) in enumerate(zip(files, pool.map(decode, files)), 1):
            progress(f"reading {k} of {len(files)}")
            if isinstance(crop, UserError):
                print("Skipped:", *str(crop).splitlines(), file=sys.stderr)
            else:
                read.append(path)
                pixels += crop.numpy().tobytes()
    progress("")
    if 0 < len(read) < len(files):
        print(f"{len(files) - len(read)} of {len(files)} files were skipped.", file=sys.stderr)
    if not read:
        raise UserError(f"No image could be read from {', '.join(map(str, paths))}.")
    return read, torch.frombuffer(pixels, dtype=torch.uint8).view(-1, 3, *size)


def read_annotations(root, half):
    """Annotations of a half ("train" or "test"): identities int64 [M], classes int64 [M, 12]; empty if there are none.

    Two formats, both coded from 1: the course's CSV, a row per identity, and the authors' market_attribute.mat. The
    .mat's two halves hold their fields in different orders, so both formats are read by name.
    """
    source, mat = root / f"annotations_{half}.csv", root / "market_attribute.mat"
    if source.is_file():
        try:
            text = source.read_text("utf-8-sig")
            lines = [line for line in text.splitlines() if line.strip(" ,;\t")] or [""]
            reader = csv.DictReader(lines, delimiter=";" if ";" in lines[0] else ",")
            rows = list(reader)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{source} cannot be read as a table ({error}).") from None
        header = [name for name in reader.fieldnames or () if name]
        if len(header) > len(set(header)):
            raise UserError(f"{source} has two columns '{max(header, key=header.count)[:40]}'.")
        for row in rows:
            if any(value.strip() for value in row.get(None, ())):  # one value too many shifts all that follow it
                raise UserError(f"{source}: the row that begins with '{next(iter(row.values()))[:40]}' has more values "
                                "than the header has columns.")
        columns = {name: [row[name] for row in rows] for name in header}
    elif mat.is_file():
        source = mat
        try:
            from scipy.io import loadmat
        except ImportError:
            raise UserError(f"{mat} is a MATLAB file, and reading it takes SciPy: pip install scipy.") from None
        try:
            struct = loadmat(mat, squeeze_me=True, struct_as_record=False)["market_attribute"]
            columns = dict(vars(getattr(struct, half)))
            columns["id"] = columns.pop("image_index")
        except Exception as error:  # SciPy raises a dozen types on a damaged file
            raise UserError(f"{mat} is not Market-1501's attribute file ({type(error).__name__}: {error}).") from None
    else:
        return torch.empty(0, dtype=torch.int64), torch.empty(0, len(ATTRIBUTES), dtype=torch.int64)

    def column(name, highest):
        if name not in columns:
            raise UserError(f"{source} has no column '{name}'.")
        numbers, values = [], np.atleast_1d(columns[name])
        if len(values) != len(np.atleast_1d(columns["id"])):
            raise UserError(f"{source}: column '{name}' has {len(values)} rows, column 'id' another number.")
        for row, value in enumerate(values):
            try:
                numbers.append(int(float(value)))
                fits = numbers[-1] == float(value) and 1 <= numbers[-1] <= highest
            except (TypeError, ValueError, OverflowError):
                fits = False
            if not fits:
                who = "" if name == "id" else f" of identity {str(np.atleast_1d(columns['id'])[row])[:40]}"
                raise UserError(f"{source}: column '{name}'{who} holds '{str(value)[:40]}', "
                                f"not a whole number from 1 to {highest}.")
        return torch.tensor(numbers, dtype=torch.int64)

    ids, classes = column("id", 10**9), []
    if len(ids.unique()) < len(ids):
        raise UserError(f"{source} names an identity twice.")
    for attribute, names in ATTRIBUTES.items():
        if attribute.endswith("color"):
            flags = torch.stack([column(attribute[:-5] + name, 2) for name in names[:-1]], 1) == 2
            one = flags.sum(1) == 1
            classes.append(torch.where(one, flags.int().argmax(1), len(names) - 1))
        else:
            classes.append(column(attribute, len(names)) - 1)
    return ids, torch.stack(classes, 1)


def split_identities(person_ids, fraction=0.6, seed=0):
    """Split by identity, all crops of one on one side ([report] section 2): (train [N] bool, validation [N] bool)."""
    ids = person_ids.unique()
    count = round(fraction * len(ids))
    if count < 2 or len(ids) - count < 2:
        raise UserError(f"{len(ids)} identities are too few to split: training and validation need two each.")
    chosen = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))[:count]]
    train = torch.isin(person_ids, chosen)
    return train, ~train


# ------------------------------------------------------------------------------------------- the network and its input


def random_affine(count, size, generator, degrees=10.0):
    """Flip (p 0.5) and rotation (uniform in +-degrees), the augmentation of [report] section 2: float32 [count, 2, 3].

    One matrix per image for `affine_grid`, whose coordinates run from -1 to 1 on both axes: hence the aspect ratio.
    """
    angle = (torch.rand(count, generator=generator) * 2 - 1) * math.radians(degrees)
    mirror = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    sin, cos, aspect = angle.sin(), angle.cos(), size[0] / size[1]
    zero = torch.zeros(count)
    return torch.stack([mirror * cos, -mirror * sin * aspect, zero, sin / aspect, cos, zero], 1).view(count, 2, 3)


def augment(crops, affine):
    """Apply one affine matrix per image, [B, 2, 3], to uint8 or float crops [B, 3, H, W]: float32, black outside."""
    grid = F.affine_grid(affine, list(crops.shape), align_corners=False)
    return F.grid_sample(crops.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)


class MatrixConv2d(nn.Conv2d):
    """A 3x3 convolution as one matrix product over gathered neighbourhoods: the same sums, for CPUs and small maps.

    oneDNN is slow on layer4's maps of 4x2 pixels; forward and backward take half to two thirds of its time this way.
    """

    def forward(self, x):
        if x.device.type != "cpu" or x.shape[2] * x.shape[3] > 64:
            return super().forward(x)
        s, (h, w) = self.stride[0], x.shape[2:]
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        near = torch.cat([padded[:, i:i + h:s, j:j + w:s] for i in range(3) for j in range(3)], 3)  # [B, h/s, w/s, 9C]
        return F.linear(near, self.weight.permute(0, 2, 3, 1).flatten(1)).permute(0, 3, 1, 2)


class Backbone(nn.Module):
    """ResNet18 ([report] reference 2) up to its pooled features: crops [B, 3, H, W] in 0..255 -> [B, 512]."""

    def __init__(self, state=None):
        """state: a torchvision ResNet18 state dict to start from; None: random weights."""
        super().__init__()
        self.net = resnet18()
        if state is not None:
            self.net.load_state_dict(state)
        self.net.fc = nn.Identity()
        for module in self.net.layer4.modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
                module.__class__ = MatrixConv2d
        self.net.to(memory_format=torch.channels_last)
        # ImageNet's statistics, on the 0..255 scale. Part of the network, so that nobody can forget them.
        self.register_buffer("mean", 255 * torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), persistent=False)

    def forward(self, crops):
        x = (crops.float() - self.mean) / self.std
        return self.net(x.contiguous(memory_format=torch.channels_last))


def backbone_weights(choice):
    """State dict for `Backbone`: choice "none" -> None; "imagenet" -> downloaded once; else a file of torchvision's."""
    if choice == "none":
        return None
    if choice == "imagenet":
        weights, answer = ResNet18_Weights.IMAGENET1K_V1, []
        cached = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[1]
        try:
            if not cached.is_file():  # a network that swallows packets can hang a look-up for minutes: in a thread then
                probe = threading.Thread(target=lambda: answer.append(_probe(weights.url)), daemon=True)
                probe.start()
                probe.join(15)
                if answer != [None]:
                    raise OSError((answer or ["no answer"])[0])
            socket.setdefaulttimeout(20)  # a transfer that stalls later
            return weights.get_state_dict(progress=sys.stderr.isatty(), check_hash=True, weights_only=True)
        except Exception as error:  # of the network, of the hash, of a damaged file
            raise UserError(f"ImageNet weights could not be had from {weights.url} or {cached} ({error}): delete that "
                            "file if it is there, pass --weights none to start from random weights, or --weights FILE "
                            "with a downloaded copy.") from None
        finally:
            socket.setdefaulttimeout(None)
    state = torch_load(choice)
    expected = resnet18().state_dict()
    # The published file is older than BatchNorm's num_batches_tracked, and its classes are not ours.
    needed = [k for k in expected if not k.startswith("fc.") and not k.endswith("num_batches_tracked")]
    if not isinstance(state, dict) or any(getattr(state.get(k), "shape", None) != expected[k].shape for k in needed):
        raise UserError(f"{choice} is not a state dict of torchvision's ResNet18, which --weights needs.")
    return expected | {k: state[k] for k in needed}


def _probe(url):
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=10).close()
    except Exception as error:
        return error


# -------------------------------------------------------------------------------------------------------- the loop


def learning_rate(step, steps, peak, warmup):
    """Linear from 0 to `peak` over the first `warmup` of all steps, then linear to 0 ([report] section 4.1)."""
    rise = max(1, round(warmup * steps))
    return peak * min((step + 1) / rise, (steps - step) / max(1, steps - rise))


def autocast(device):
    """bfloat16 where the processor computes in it, float32 elsewhere (where emulation would only cost time)."""
    return torch.autocast(device.type, torch.bfloat16) if precision(device) == "bfloat16" else contextlib.nullcontext()


def precision(device):
    """"bfloat16" or "float32": what `autocast` uses on this device."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # the names are private and newer than some versions: without them, float32
        native = device.type == "cpu" and any(getattr(torch.cpu, f"_is_{unit}_supported", bool)()
                                              for unit in ("avx512_bf16", "amx_tile"))
    return "bfloat16" if native else "float32"


def place(crops, device):
    """Put crops on the device for good; where they would take half of a GPU's free memory, leave them to the host.

    `fit` and `infer` then copy the rows that they need.
    """
    if device.type == "cuda" and crops.numel() > torch.cuda.mem_get_info(device)[0] // 2:
        print(f"The crops, {crops.numel() / 2**30:.1f} GiB, stay in the host's memory: the GPU has too little free.")
        return crops
    return crops.to(device)


def take(crops, rows, device):
    """crops[rows] on the device. From the host by way of pinned memory, so that the copy does not make it wait."""
    if crops.device == device:
        return crops[rows]
    chosen = crops[rows.cpu()]
    return chosen.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else chosen.to(device)


def infer(model, crops, rows=None):
    """Run `model` in evaluation mode over crops[rows]: its output, or list of outputs, float32, [N, ...]."""
    batch = max(1, 512 * 128 * 64 // crops[0, 0].numel())
    device = next(model.parameters()).device
    rows = (torch.arange(len(crops)) if rows is None else rows).to(crops.device)
    model.eval()
    with torch.inference_mode(), autocast(device):
        outputs = [model(take(crops, chunk, device)) for chunk in rows.split(batch)]
        several = isinstance(outputs[0], list)
        merged = [torch.cat(parts).float() for parts in (zip(*outputs) if several else [outputs])]
    if not all(out.isfinite().all() for out in merged):
        raise UserError("The network's output holds NaN or infinity: its training has diverged. "
                        "Train again with a lower --lr.")
    return merged if several else merged[0]


def fit(model, crops, plan, criterion, validate, args, checkpoint, record):
    """Train `model` as both stages of the report do and leave its best state in it; the only training loop here.

    crops       uint8 [N, 3, H, W], as from `place`
    plan        generator -> int64 [n] or [n, k], drawn anew for each epoch: the rows of `crops` that make an item
    criterion   (outputs of the model for k x B crops, int64 rows [B] or [B, k]) -> scalar loss
    validate    () -> dict of figures; the first decides which epoch is best and when to stop early
    checkpoint  what the file args.out says beside the model's weights
    record      dict that stands beside it as JSON; gets a row per epoch

    AdamW; linear warm-up, then linear to 0, per step. Each epoch's last images that fill no batch are left out; they
    are others in each epoch. After each epoch `last_path(out)` holds all that --resume needs. Returns the best epoch's
    row.
    """
    device, out = next(model.parameters()).device, Path(args.out)
    generator = torch.Generator().manual_seed(args.seed)
    parameters = list(model.parameters())
    # One-dimensional views of the same memory: AdamW's fused kernel would first copy a channels-last tensor.
    dense = [flat(p.detach()) for p in parameters]
    cuda = device.type == "cuda"
    rate = torch.zeros((), device=device if cuda else "cpu")  # a tensor, as a graph reads it anew from its memory
    optimizer = torch.optim.AdamW(dense, lr=rate, fused=True)

    def step(pixels, warp, now):
        x = augment(pixels, warp)  # not under autocast: bfloat16 coordinates would shake the pixels
        with autocast(device):
            loss = criterion(model(x), now)
        loss.backward()
        for view, p in zip(dense, parameters):
            view.grad, p.grad = None if p.grad is None else flat(p.grad), None
        for group in optimizer.param_groups:
            group.update(lr=rate, capturable=cuda and torch.cuda.is_current_stream_capturing())
        optimizer.step()
        optimizer.zero_grad()  # before the next forward pass, so that the next gradients get the same memory
        return loss.detach()

    run_step = graphed(step) if cuda else step
    device_rng = None if device.type == "cpu" else getattr(torch, device.type)  # torch.cuda or torch.mps
    best, first, spent = None, 1, {"training": 0.0, "validation": 0.0}
    last = load_last(out, checkpoint) if args.resume else None
    checkpoint["run"] = last["run"] if last else os.urandom(8).hex()
    if last:
        try:
            model.load_state_dict(last["model"])
            moments = last["optimizer"]["state"]
            for k in moments:  # AdamW would not look, and write beyond what is too short
                if not dense[k].shape == moments[k]["exp_avg"].shape == moments[k]["exp_avg_sq"].shape:
                    raise ValueError
            optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
            generator.set_state(last["generator"])
            torch.set_rng_state(last["rng"])
            if device_rng and device.type == last["args"]["device"]:
                device_rng.set_rng_state(last["device_rng"])
        except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
            if memory_is_full(error):
                raise
            raise UserError(f"{last_path(out)} does not hold the state of a run: start without --resume.") from None
        record["epochs"], record["metrics"], best = last["rows"], last["metrics"], last["best"]
        first, spent = last["epoch"] + 1, last["spent"]
        print(f"Going on after epoch {last['epoch']}.")

    def train_epoch(epoch):
        items = plan(generator)
        batch = min(args.batch, len(items))
        steps, width = len(items) // batch, items[0].numel()
        affine = random_affine(items.numel(), crops.shape[2:], generator).view(*items.shape, 2, 3).to(device)
        sources, items = items.to(crops.device), items.to(device)
        losses, begin = torch.zeros(steps, device=device), time.perf_counter()
        shown, watched = begin, device.type == "cpu" or sys.stderr.isatty()
        model.train()
        for k in range(steps):
            now = slice(k * batch, (k + 1) * batch)
            lr = learning_rate((epoch - 1) * steps + k, args.epochs * steps, args.lr, args.warmup)
            rate.fill_(lr)
            # [B, k] -> [k * B]: all anchors, then all positives, then all negatives
            rows, warp = sources[now].transpose(0, -1).flatten(), affine[now].transpose(0, -3).flatten(0, -3)
            losses[k] = run_step(take(crops, rows, device), warp, items[now])
            if interrupted:
                raise KeyboardInterrupt
            # Only here does the host wait for a GPU: at the end of an epoch, and twice a second if someone is watching.
            if k + 1 == steps or watched and time.perf_counter() - shown > 0.5:
                done = losses[:k + 1]
                if not done.isfinite().all():
                    bad = int(done.isfinite().int().argmin())
                    raise UserError(f"The loss became {done[bad].item()} at step {bad + 1} of epoch {epoch}; {kept}. "
                                    "Try a lower --lr.")
                shown = time.perf_counter()
                speed = (k + 1) * batch * width / (shown - begin)
                left = round(((args.epochs - epoch + 1) * steps - k - 1) * batch * width / speed)
                progress(f"epoch {epoch}/{args.epochs}  step {k + 1}/{steps}  loss {done.mean().item():.4f}  "
                         f"{speed:.0f} images/s  {left // 60}:{left % 60:02} left")
        return {"epoch": epoch, "loss": losses.mean().item(), "lr": lr,
                "seconds": round(shown - begin, 3), "images_per_second": round(speed, 1)}

    with interruptible(out, record["epochs"]) as interrupted:
        for epoch in range(first, args.epochs + 1):
            if best and epoch - 1 - best["epoch"] >= args.patience:
                print(f"Stopped early: {record['metrics'][0]} is no better than {args.patience} epochs ago.")
                break
            kept = f"{out} keeps epoch {best['epoch']}" if best else "no checkpoint was written"
            row = train_epoch(epoch)
            progress(f"epoch {epoch}/{args.epochs}  validating")
            try:
                with timed(spent, "validation"):
                    figures = validate()
            except UserError as error:
                raise UserError(f"{error} This was after epoch {epoch}; {kept}.") from None
            row.update(figures)
            record["metrics"] = list(figures)
            better = best is None or row[record["metrics"][0]] > best[record["metrics"][0]]
            first_best, best = best is None, row if better else best
            spent["training"] = round(spent["training"] + row["seconds"], 2)
            checkpoint.update(model=model.state_dict(), epoch=epoch)
            # First the state to resume: what it calls the best epoch can be written from it, if that is cut off.
            save_checkpoint(last_path(out), dict(
                checkpoint, optimizer=optimizer.state_dict(), generator=generator.get_state(),
                rng=torch.get_rng_state(), device_rng=device_rng and device_rng.get_rng_state(),
                rows=[*record["epochs"], row], metrics=record["metrics"], best=best, spent=spent))
            record["epochs"].append(row)
            if better:
                save_checkpoint(out, checkpoint, before=lambda: first_best and set_aside(out))
            write_record(out, record | {"seconds": record["seconds"] | spent})
            progress("")
            print(f"epoch {epoch:2}/{args.epochs}  loss {row['loss']:.4f}  {row['images_per_second']:.0f} images/s  "
                  "validation " + ", ".join(f"{k} {100 * v:.2f}" for k, v in figures.items()) + "  *" * better,
                  flush=True)
            if interrupted:
                raise KeyboardInterrupt
    record["seconds"] |= spent
    model.load_state_dict(load_checkpoint(out, checkpoint["kind"])["model"])
    return best


@contextlib.contextmanager
def interruptible(out, epochs):
    """Within, a first Ctrl-C is noted in the list that this gives, for `fit` to end after the step; a second is not.

    Either way the KeyboardInterrupt that comes out says how to go on. epochs: the rows of the whole ones so far.
    """
    noted, usual = [], signal.getsignal(signal.SIGINT)

    def note(*_):
        if noted:
            raise KeyboardInterrupt
        noted.append(True)

    ours = usual is signal.default_int_handler and threading.current_thread() is threading.main_thread()
    try:
        if ours:
            signal.signal(signal.SIGINT, note)
        yield noted
    except KeyboardInterrupt:
        away = f", once {last_path(out)} of an earlier run is moved away" if last_path(out).exists() else ""
        first = f"stopped in the first epoch of {out}; the same command with --resume begins that anew{away}."
        later = f"stopped; the same command with --resume goes on after epoch {len(epochs)} of {out}."
        raise KeyboardInterrupt(later if epochs else first) from None
    finally:
        if ours:
            signal.signal(signal.SIGINT, usual)


def graphed(step, warmup=3):
    """The same step for CUDA, where a batch of crops takes less time than launching its thousand kernels one by one.

    The first steps run as they are: cuDNN chooses its algorithms, AdamW makes its state. Then one is recorded, without
    being run, as a CUDA graph; it and all later ones replay that, on new values in the same memory.
    """
    stream, calls, graph, inputs, loss = torch.cuda.Stream(), 0, None, None, None

    def run_step(*values):
        nonlocal calls, graph, inputs, loss
        calls += 1
        if calls <= warmup:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                early = step(*values)
            torch.cuda.current_stream().wait_stream(stream)
            return early
        if graph is None:
            inputs, graph = [v.clone() for v in values], torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                loss = step(*inputs)
        for kept, value in zip(inputs, values):
            kept.copy_(value)
        graph.replay()
        return loss

    return run_step


def flat(tensor):
    """All elements in the order they have in memory, [n], without a copy; for dense and channels-last tensors."""
    return (tensor.permute(0, 2, 3, 1) if tensor.dim() == 4 else tensor).view(-1)


def keep_memory():
    """Have glibc keep freed blocks for the next step, instead of mapping and zeroing each of them anew."""
    if sys.platform == "linux":
        try:
            mallopt = ctypes.CDLL("libc.so.6").mallopt
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
            mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, at its upper limit
        except (OSError, AttributeError):
            pass  # another C library: as it is


def last_path(out):
    """Where the state of an unfinished run stands: par_best.pt -> par_last.pt."""
    return out.with_name(out.stem.removesuffix("_best") + "_last.pt")


STATE = ("optimizer", "generator", "rng", "device_rng", "rows", "metrics", "best", "spent")  # beside a checkpoint's own


def load_last(out, checkpoint):
    """The state to resume the run that writes `out`, if there is one; UserError if it is of other data or arguments.

    The best checkpoint is written after that state: where a run was killed between the two, it is written here.
    """
    path = last_path(out)
    if not path.exists():
        return print(f"There is no {path} to resume: starting.")
    last = load_checkpoint(path, checkpoint["kind"])
    try:
        whole = last["best"]["epoch"] <= last["epoch"] == last["rows"][-1]["epoch"] == len(last["rows"]) \
            and {"training", "validation"} <= set(last["spent"]) and {"run", *STATE} <= set(last) \
            and all(set(last["metrics"]) <= set(row) and all(map(math.isfinite, row.values()))
                    for row in (last["best"], *last["rows"])) and all(map(math.isfinite, last["spent"].values()))
    except (KeyError, TypeError, IndexError, AttributeError):
        whole = False
    if not whole:
        raise UserError(f"{path} does not hold the state of a run: start without --resume.")
    changed = [k for k, v in checkpoint["args"].items() if v != last["args"].get(k)]
    changed = [k for k in changed if k not in ("device", "out", "demo")]
    if changed:
        raise UserError(f"{path} is of a run with another --{changed[0]} ({last['args'].get(changed[0])}): resume with "
                        "the arguments it had, start without --resume, or move that file away.")
    ours, theirs = ({"train": c["train_ids"], "validation": c["validation_ids"], **(c.get("attributes") or {})}
                    for c in (checkpoint, last))
    same = ours.keys() == theirs.keys() and all(map(torch.is_tensor, theirs.values())) \
        and all(torch.equal(v, theirs[k]) for k, v in ours.items())
    if not same or last.get("data") != checkpoint.get("data"):
        raise UserError(f"{path} is of a run with other data, or from another checkpoint: start without --resume.")
    saved = load_checkpoint(out, checkpoint["kind"]) if out.exists() else {}
    if (saved.get("run"), saved.get("epoch")) != (last["run"], last["best"]["epoch"]):
        if last["best"]["epoch"] != last["epoch"]:
            raise UserError(f"{out} is not the best checkpoint of the run in {path}: put that back, or start without "
                            "--resume.")
        save_checkpoint(out, {k: v for k, v in last.items() if k not in STATE},
                        before=lambda: saved.get("run") != last["run"] and set_aside(out))
    return last


def set_aside(out):
    """Rename the checkpoint and record of an earlier run to NAME.old.pt, or .old2.pt and so on: none is lost."""
    k = ""
    while out.with_suffix(f".old{k}{out.suffix}").exists():
        k = (k or 1) + 1
    for path in (out.with_suffix(".json"), out):  # in this order: cut off between the two, they still come together
        if path.exists():
            os.replace(path, path.with_suffix(f".old{k}{path.suffix}"))
            print(f"{path} of an earlier run is now {path.with_suffix(f'.old{k}{path.suffix}')}.")


def progress(text):
    """Show one line that the next call overwrites; nothing where the output is a file."""
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns - 1
        print(f"\r{text[:width]:{width}}\r", end="", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------- files, settings, errors


def write_whole(path, write, before=lambda: None):
    """Call write(file) on a temporary file beside `path`, then put it in its place: whole or not at all.

    before: called when the file is whole, just before it takes its place.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        before()
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        while isinstance(error, RuntimeError) and error.__context__:  # torch.save's hides what it came from
            error = error.__context__
        if isinstance(error, KeyboardInterrupt):
            raise error from None
        raise UserError(f"{path} cannot be written ({error}).") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def check_output(path, suffixes=(".pt", ".pth")):
    """Make the folder of `path` and try to write in it: better before the training than after."""
    if path.is_dir() or path.suffix.lower() not in suffixes:
        raise UserError(f"{path} is no name for the file to write: give one that ends in {suffixes[0]}.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = path.with_name(f".{path.name}.probe")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): choose another place.") from None


def write_record(out, record):
    """Write the run's record beside its checkpoint, the same name with .json."""
    record["peak_memory_MB"] = peak_memory()
    text = json.dumps(record, indent=1)
    text = re.sub(r"\n {3,}|\n  (?=[}\]])", " ", text)  # a line per epoch, not per figure
    write_whole(Path(out).with_suffix(".json"), lambda file: file.write(text.encode()))


def peak_memory():
    """Highest memory use so far in MB: {"host": ..., "device": ...}; None where the system does not say."""
    try:
        import resource  # not on Windows
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    except ImportError:
        host = None
    device = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None
    return {"host": host and round(host), "device": device and round(device)}


def torch_load(path):
    """Load a file of tensors and plain values; never runs code from it."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as packed:  # torch.save does not compress: what is far larger inside is a trap
                if sum(item.file_size for item in packed.infolist()) > 2 * os.path.getsize(path):
                    raise ValueError("packed")
                if packed.testzip():  # torch.load itself does not look at the checksums: wrong weights would go by
                    raise ValueError("checksum")
        with warnings.catch_warnings():  # of an old pickle: what matters is whether it loads
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except Exception as error:  # zip, pickle and PyTorch raise a dozen types on a damaged file
        if memory_is_full(error):
            raise
        raise UserError(f"{path} is not a readable checkpoint ({type(error).__name__}).") from None


def save_checkpoint(path, checkpoint, before=lambda: None):
    """Write a checkpoint: a dict of tensors and plain values with "kind", "model", "args", "train_ids", ..."""
    write_whole(path, lambda file: torch.save(dict(checkpoint, version=1, classes=ATTRIBUTES), file), before)


def load_checkpoint(path, kind):
    """Read a checkpoint of `kind` ("par" or "reid") and check that it is one."""
    checkpoint = torch_load(path)
    try:
        known = checkpoint["kind"] in ("par", "reid") and checkpoint["version"] == 1 \
            and checkpoint["classes"] == ATTRIBUTES
    except Exception:  # whatever is missing or of another type
        known = False
    if not known:
        raise UserError(f"{path} is not a checkpoint of this version of the project.")
    if checkpoint["kind"] != kind:
        raise UserError(f"{path} is a checkpoint of {checkpoint['kind']}.py; one of {kind}.py is needed here.")

    try:
        args, ids = checkpoint["args"], [checkpoint["train_ids"], checkpoint["validation_ids"]]
        # Contiguous: a tensor of one value and a stride of 0 fills no file, but all memory.
        whole = len(args["size"]) == 2 and all(type(v) is int and 32 <= v <= 1024 for v in args["size"]) \
            and all(v.dtype == torch.int64 and v.dim() == 1 and v.is_contiguous() and len(v) for v in ids) \
            and isinstance(checkpoint["epoch"], int) and isinstance(checkpoint["model"], dict)
        if kind == "reid":
            edges, *counts = (checkpoint["distances"][k] for k in ("edges", "matches", "others"))
            whole = whole and type(args["dim"]) is int and 1 <= args["dim"] <= 4096 \
                and isinstance(checkpoint["attributes"], (dict, type(None))) \
                and edges.dim() == 1 and edges.is_contiguous() and edges.isfinite().all() and (edges.diff() > 0).all() \
                and all(v.shape == edges[1:].shape and v.is_contiguous() and v.isfinite().all() and (v >= 0).all()
                        and v.sum() > 0 for v in counts)
    except Exception:
        whole = False
    if not whole:
        raise UserError(f"{path} is not a whole checkpoint: parts of it are missing or not what they should be.")
    return checkpoint


def load_weights(model, state, path):
    """Load a state dict into `model`; one that does not fit is the user's error."""
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        if memory_is_full(error):
            raise
        raise UserError(f"The weights in {path} do not fit the network of this version of the project.") from None
    return model


def saved_split(checkpoint, person_ids, path):
    """The split kept in a checkpoint, over the crops of `person_ids`: (train [N] bool, validation [N] bool)."""
    train, validation = checkpoint["train_ids"], checkpoint["validation_ids"]
    if not torch.equal(torch.cat([train, validation]).sort()[0], person_ids.unique()):
        raise UserError(f"{path} was trained on other identities than this data set's: "
                        "pass the --data it was trained on.")
    return torch.isin(person_ids, train), torch.isin(person_ids, validation)


class Parser(argparse.ArgumentParser):
    """argparse, with wider help, and errors that end as all others do."""

    def __init__(self, description):
        super().__init__(usage="%(prog)s [options]", description=description, formatter_class=lambda prog:
                         argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=100))

    def error(self, message):
        raise UserError(f"{message[0].upper()}{message[1:]} (--help lists the options).")


def number(kind, low, high=math.inf, above=False):
    """An argparse type: `kind` from `low` (or above it) to `high`."""
    def parse(text):
        value = kind(text)
        if not ((value > low if above else value >= low) and value <= high and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text} is not " + ("above" if above else "at least") + f" {low}"
                                             + (f" and at most {high}" if high < math.inf else ""))
        return value
    parse.__name__ = kind.__name__
    return parse


def image_size(text):
    """An argparse type: "128x64" -> (128, 64), height and width."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    size = tuple(map(int, match.groups())) if match else (0, 0)
    if not all(32 <= side <= 1024 for side in size):
        raise argparse.ArgumentTypeError(f"{text} is not HEIGHTxWIDTH, each from 32 to 1024 (128x64)")
    return size


def shared_flags(parser, epochs, lr, out):
    """Add the flags that both scripts have; defaults are the report's."""
    add = parser.add_argument_group("data, training and output").add_argument
    add("--data", type=Path, metavar="DIR", help="folder of Market-1501 (default: ./Market-1501-v15.09.15; where that "
        "is not, a drawn demo set)")
    add("--size", type=image_size, metavar="HxW", help="crops' height x width (128x64, or the checkpoint's)")
    add("--weights", metavar="W", help="to start from: imagenet, none, or a FILE of torchvision's ResNet18 (imagenet; "
        "none for the demo set)")
    add("--epochs", type=number(int, 1), default=epochs, metavar="N", help=f"to train ({epochs}, report section 4)")
    add("--lr", type=number(float, 0, above=True), default=lr, metavar="R", help="highest learning rate "
        f"({lr}, report section 4)")
    add("--warmup", type=number(float, 0, 1), default=0.1, metavar="F", help="fraction of all steps in which the rate "
        "rises; then it falls to 0 (0.1, report section 4)")
    add("--batch", type=number(int, 2), default=32, metavar="N", help="images, or anchors, a step (32)")
    add("--patience", type=number(int, 1), default=5, metavar="N", help="stop after N epochs without a better one (5)")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, metavar="N", help="of split, weights and sampling (0)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="to compute on (auto: the fastest "
        "there is)")
    add("--out", type=Path, default=Path(out), metavar="FILE", help="best checkpoint; its record and all pictures go "
        f"into the same folder ({out})")
    add("--resume", action="store_true", help="go on with a run that was cut off, after its last whole epoch")


def start(args, path=None, checkpoint=None, data=True):
    """Settle device, size, data and weights, and say so: -> device. Fills args.size, .data, .demo, .weights, .device,
    .seconds.

    A checkpoint, read from `path`, decides the size. Without --data the demo set is drawn, if it has not been.
    """
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if args.device not in ("auto", "cpu", best):
        raise UserError(f"This machine has no {args.device} device that PyTorch {torch.__version__} can use: "
                        f"pass --device {best}.")
    device = torch.device(best if args.device == "auto" else args.device)
    args.device, args.seconds = device.type, {}
    torch.backends.cudnn.benchmark = True  # shapes do not change: the time to choose an algorithm comes back
    keep_memory()
    saved = checkpoint and tuple(checkpoint["args"]["size"])
    if saved and args.size not in (None, saved):
        raise UserError(f"{path} was trained with --size {saved[0]}x{saved[1]}: leave --size out.")
    args.size = saved or args.size or (128, 64)
    if not data:
        source = f"trained on {checkpoint['args'].get('data')}" + " (DEMO SET)" * bool(checkpoint["args"].get("demo"))
        args.about = f"{path}, {source} | {device.type}, {precision(device)} | {args.size[0]}x{args.size[1]}"
        return device
    if args.data is None:
        args.data = Path("Market-1501-v15.09.15")
        if not args.data.is_dir():
            args.data = Path("Market-1501-demo")
            if not args.data.is_dir():
                print(f"Drawing the demo set into ./{args.data} ...", flush=True)
                partial = args.data.with_suffix(".tmp")
                shutil.rmtree(partial, ignore_errors=True)
                try:
                    draw_market(partial, 100, 6, seed=0)
                    os.replace(partial, args.data)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
    elif not args.data.is_dir():
        raise UserError(f"--data {args.data} " + ("is not a folder." if args.data.exists() else "does not exist."))
    args.demo = (args.data / DRAWN).is_file()
    args.weights = args.weights or ("none" if args.demo else "imagenet")
    if args.demo:
        print(f"DEMO SET of drawn people in {args.data}: its figures say nothing about Market-1501.\n"
              "README says how to get that.")
    print(f"data {args.data} | {device.type}, {precision(device)}, {torch.get_num_threads()} threads | "
          f"{args.size[0]}x{args.size[1]} | weights {path or args.weights}"
          + ("" if args.eval else f" | seed {args.seed}"), flush=True)  # a checkpoint has its own
    return device


@contextlib.contextmanager
def timed(seconds, what):
    """Add the seconds that a block takes to seconds[what]."""
    begin = time.perf_counter()
    yield
    seconds[what] = round(seconds.get(what, 0) + time.perf_counter() - begin, 2)


def say_seconds(seconds, file=None):
    """Print where the time went, and the peak memory."""
    memory = " and ".join(f"{mb / 1000:.1f} GB ({where})" for where, mb in peak_memory().items() if mb)
    print("Seconds: " + ", ".join(f"{what} {value:.1f}" for what, value in seconds.items())
          + (f"; peak memory {memory}" if memory else ""), file=file)


def new_record(args):
    """What a record says before the first epoch."""
    versions = {"python": platform.python_version(), "torch": str(torch.__version__),
                "torchvision": str(torchvision.__version__)}
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()
             if k not in ("seconds", "resume")}
    return {"arguments": plain, "data": {"folder": str(args.data), "drawn demo set": args.demo}, "versions": versions,
            "machine": f"{platform.platform()}, {os.cpu_count()} cores",
            "precision": precision(torch.device(args.device)), "threads": torch.get_num_threads(),
            "epochs": [], "final": {}, "seconds": dict(args.seconds)}


def run(main):
    """Run a script's main(); the one place where errors become sentences and exit codes."""
    script = Path(sys.argv[0]).name
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as it is while a script imports
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not fit the console's encoding
    warnings.simplefilter("error", Image.DecompressionBombWarning)  # 90 million pixels are no crop of a person
    try:
        return main()
    except BrokenPipeError:  # the reader, `head` for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # as of a program that a closed pipe ends
    except UserError as error:
        code, sentence = 2, " ".join(str(error).splitlines())  # a file's name can hold a newline
    except OSError as error:
        code, sentence = 2, f"{error.filename or 'A file'} cannot be read or written ({error.strerror or error})."
    except (RuntimeError, MemoryError) as error:
        if not memory_is_full(error):
            raise
        code, sentence = 2, "the memory is full: lower --batch or --size, or pass another --device."
    except KeyboardInterrupt as stop:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # what is left takes no time
        goes_on = "." if any(word.startswith(("--eval", "--stats")) for word in sys.argv) else \
            "; the same command with --resume goes on after the last whole epoch."
        code, sentence = 130, str(stop) or "stopped" + goes_on
    progress("")
    print(f"{script}: {sentence}", file=sys.stderr)
    sys.exit(code)


def memory_is_full(error):
    """CUDA, MPS and the CPU's allocator say it in different words."""
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and bool(
        re.search("out of memory|can't allocate|not enough mem", str(error)))


# ------------------------------------------------------------------------------------------------ tables and figures

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # Okabe and Ito's: told apart by the colour-blind
INK, GREY = "#222222", "#8a8a8a"


def table(title, header, rows, best=None):
    """Print rows [name, figures...] under a header; `best` (max or min) marks each row's best figure with a star.

    A figure is a number, shown with two decimals, or a text; columns with letters in them stand to the left.
    """
    def cell(value, row):
        if isinstance(value, str):
            return " ".join(value.splitlines())
        highest = best and best(v for v in row if not isinstance(v, str) and v == v)
        return ("-" if value != value else f"{value:.2f}") + (best and ("  ", " *")[value == highest] or "")

    cells = [header, *([row[0], *(cell(v, row[1:]) for v in row[1:])] for row in rows)]
    if best:
        cells[0] = [header[0], *(h + "  " for h in header[1:])]
    widths = [max(len(row[k]) for row in cells) for k in range(len(header))]
    sides = ["<" if k == 0 or re.search("[a-z]", "".join(row[k] for row in cells[1:])) else ">"
             for k in range(len(header))]
    print(f"\n{title}")
    for row in cells:
        print("  ".join(f"{c:{side}{w}}" for c, side, w in zip(row, sides, widths)).rstrip())
    sys.stdout.flush()


def charts(path, panels, columns=1, size=(560, 330)):
    """Draw panels, `columns` to a row, into a PNG file twice as large as `size` (width, height) says for each.

    A panel is a dict: title; then bars {category: value}; or a matrix of counts [n, n], a row per true class, and its
    classes; or lines {legend: (xs, ys)} with axis labels x and y and, if wanted, marks {legend: x}, dashed verticals.
    """
    scale, (width, height) = 4, size
    picture = Image.new("RGB", (width * columns * scale, height * math.ceil(len(panels) / columns) * scale), "white")
    pen = ImageDraw.Draw(picture)

    def text(x, y, string, anchor, points=13, colour=INK):
        pen.text((x * scale, y * scale), string, colour, ImageFont.load_default(points * scale), anchor)

    def line(points, colour, thick=2.0):
        pen.line([(x * scale, y * scale) for x, y in points], colour, round(thick * scale), joint="curve")

    for i, panel in enumerate(panels):
        left, top = i % columns * width, i // columns * height
        text(left + 16, top + 20, panel["title"], "lm", 15)
        if "bars" in panel:
            for k, (name, value) in enumerate(panel["bars"].items()):
                y, length = top + 54 + 26 * k, (width - 190) * value / 100
                text(left + 114, y, name, "rm")
                pen.rectangle([c * scale for c in (left + 120, y - 9, left + 120 + length, y + 9)], COLOURS[0])
                text(left + 125 + length, y, f"{value:.1f} %", "lm", 12)
            continue
        if "matrix" in panel:
            n, x0, y0 = len(panel["classes"]), left + 96, top + 66
            w, h = (width - 112) / n, min(0.5 * (width - 112) / n, (height - 78) / n)
            for r, (name, counts) in enumerate(zip(panel["classes"], panel["matrix"].tolist())):
                text(x0 + (r + 0.5) * w, y0 - 10, name, "mm", 11)
                text(x0 - 6, y0 + (r + 0.5) * h, f"{name} ({sum(counts)})", "rm", 11)
                for c, count in enumerate(counts):
                    share = count / sum(counts) if sum(counts) else 0
                    shade = tuple(round(255 + (v - 255) * share) for v in ImageColor.getrgb(COLOURS[0]))
                    pen.rectangle([v * scale for v in (x0 + c * w, y0 + r * h, x0 + (c + 1) * w - 1,
                                                       y0 + (r + 1) * h - 1)], shade)
                    if count:
                        text(x0 + (c + 0.5) * w, y0 + (r + 0.5) * h, f"{100 * share:.0f}", "mm", 11,
                             "white" if share > 0.7 else INK)
            continue
        x0, x1, y0, y1 = left + 64, left + width - 20, top + height - 50, top + 62
        (xs, ys), marks = zip(*panel["lines"].values()), panel.get("marks", {})
        x_ticks, y_ticks = ticks(min(map(min, xs)), max(map(max, xs))), ticks(min(map(min, ys)), max(map(max, ys)))
        low, high = min(map(min, xs)), max(max(map(max, xs)), min(map(min, xs)) + 1e-9)

        def at_x(v):
            return x0 + (x1 - x0) * (v - low) / (high - low)

        def at_y(v):
            return y0 + (y1 - y0) * (v - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])

        for v in y_ticks:
            line([(x0, at_y(v)), (x1, at_y(v))], "#e4e4e4", 1)
            text(x0 - 6, at_y(v), f"{v:g}", "rm", 12)
        for v in x_ticks:
            if low <= v <= high:
                line([(at_x(v), y0), (at_x(v), y0 + 4)], GREY, 1)
                text(at_x(v), y0 + 7, f"{v:g}", "mt", 12)
        line([(x0, y1), (x0, y0), (x1, y0)], GREY, 1)
        text((x0 + x1) / 2, y0 + 36, panel["x"], "mm")
        text(left + 16, y1 - 18, panel["y"], "lm", 12, GREY)
        legend = dict(zip([*panel["lines"], *marks], COLOURS))
        for name, (xv, yv) in panel["lines"].items():
            points = [(at_x(a), at_y(b)) for a, b in zip(xv, yv)]
            line(points, legend[name])
            for x, y in points if len(points) < 50 else ():
                pen.ellipse([(x - 2.5) * scale, (y - 2.5) * scale, (x + 2.5) * scale, (y + 2.5) * scale], legend[name])
        for name, v in marks.items():
            for k in range(0, 40, 2) if low <= v <= high else ():
                line([(at_x(v), y0 + (y1 - y0) * k / 40), (at_x(v), y0 + (y1 - y0) * (k + 1) / 40)], legend[name], 1.5)
        for name, colour in reversed(legend.items()):
            text(x1, y1 - 18, name, "rm", 12, colour)
            x1 -= pen.textlength(name, ImageFont.load_default(12 * scale)) / scale + 18
    picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.LANCZOS)
    write_whole(path, lambda file: picture.save(file, "PNG"))


def sheet(path, rows, height=256, beside=False):
    """Draw crops with captions into a PNG file: rows of cells (crop uint8 [3, H, W], lines, colour of a frame or None).

    A line is a text or a (text, colour). They stand below their crop, or beside it; the longest are cut.
    """
    font, room = ImageFont.load_default(14), 8
    crop_width = round(height * rows[0][0][0].shape[2] / rows[0][0][0].shape[1])
    lines = max(len(lines) for row in rows for _, lines, _ in row)
    text_width = 170 if beside else max(150, crop_width)
    wide = (crop_width + room + text_width if beside else text_width) + 2 * room
    tall = (max(height, 18 * lines) if beside else height + 18 * lines) + 3 * room
    picture = Image.new("RGB", (wide * max(map(len, rows)) + room, tall * len(rows) + room), "white")
    pen = ImageDraw.Draw(picture)
    for i, row in enumerate(rows):
        for k, (crop, lines, frame) in enumerate(row):
            x, y = room + k * wide, room + i * tall
            image = Image.fromarray(crop.permute(1, 2, 0).contiguous().numpy())
            picture.paste(image.resize((crop_width, height), Image.Resampling.BICUBIC), (x, y))
            if frame:
                pen.rectangle([x - 4, y - 4, x + crop_width + 3, y + height + 3], outline=frame, width=4)
            left, top = (x + crop_width + room, y) if beside else (x, y + height + room)
            for j, line in enumerate(lines):
                text, colour = (line, INK) if isinstance(line, str) else line
                text = " ".join(text.encode("ascii", "replace").decode().splitlines())  # the font has no other letters
                while pen.textlength(text, font) > text_width:
                    text = text.removesuffix("...")[:-1] + "..."
                pen.text((left, top + 18 * j), text, colour, font)
    write_whole(path, lambda file: picture.save(file, "PNG"))


def ticks(low, high):
    """Round numbers, from at or below `low` to at or above `high`, about five."""
    span = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span))
    step = next(f * power for f in (0.2, 0.5, 1, 2) if span / (f * power) <= 6)
    if isinstance(low, int) and isinstance(high, int):  # of epochs there are no halves
        step = max(1, step)
    first = math.floor(low / step)
    return [float(f"{k * step:.10g}") for k in range(first, max(math.ceil(high / step), first + 1) + 1)]


def curves(path, record, title):
    """Draw a record's training curves: the loss, and the validation figures in percent."""
    rows = record["epochs"]
    x = [row["epoch"] for row in rows]
    figures = {k: (x, [100 * row[k] for row in rows]) for k in record["metrics"]}
    loss = {"training": (x, [row["loss"] for row in rows])}
    charts(path, [{"title": f"{title}: training loss", "x": "epoch", "y": "loss", "lines": loss},
                  {"title": f"{title}: validation", "x": "epoch", "y": "%", "lines": figures}], columns=2)


# ---------------------------------------------------------------------------------------------------- the drawn demo

DRAWN = "drawn.txt"  # marks a drawn data set; written last, so it also says that the set is whole
# How often each class is drawn, as unbalanced as in Market-1501 ([report] table 4).
FREQUENCIES = {
    "age": (0.05, 0.66, 0.24, 0.05), "up": (0.15, 0.85), "down": (0.40, 0.60), "hat": (0.93, 0.07),
    "backpack": (0.73, 0.27), "bag": (0.75, 0.25), "handbag": (0.88, 0.12),
    "upcolor": (0.16, 0.26, 0.11, 0.05, 0.06, 0.12, 0.08, 0.08, 0.08),
    "downcolor": (0.36, 0.08, 0.05, 0.02, 0.03, 0.16, 0.18, 0.03, 0.06, 0.03),
}
RGB = {"black": (38, 36, 40), "white": (232, 230, 224), "red": (196, 40, 44), "purple": (126, 62, 150),
       "yellow": (228, 196, 62), "gray": (134, 136, 140), "blue": (52, 88, 172), "green": (64, 138, 76),
       "pink": (232, 142, 170), "brown": (122, 82, 50)}
SCALE = 3  # people are drawn three times as large and then reduced
# Six places: wall, ground, horizon, light (gain per channel), blur in pixels, size of the people.
CAMERAS = (
    ((176, 182, 188), (150, 148, 142), 58, (1.00, 1.00, 1.00), 0.3, 1.00),
    ((150, 124, 104), (128, 122, 120), 50, (1.08, 0.98, 0.86), 0.5, 0.94),
    ((116, 140, 104), (164, 158, 140), 66, (0.94, 1.04, 0.94), 0.4, 1.02),
    ((196, 200, 206), (110, 112, 118), 40, (0.84, 0.92, 1.08), 0.7, 0.90),
    ((120, 112, 130), (176, 168, 160), 72, (0.78, 0.76, 0.80), 0.5, 0.97),
    ((206, 192, 164), (188, 176, 152), 54, (1.16, 1.10, 1.00), 0.9, 0.92),
)


def draw_market(root, identities, images_per_identity, seed=0):
    """Draw a data set of people in Market-1501's layout and names into folder `root`; the same for a seed.

    identities: how many in the training half, and as many others in the test half; images_per_identity: crops of each
    in bounding_box_train or bounding_box_test, from two cameras or more. Queries, distractors, junk and both CSV files
    of annotations come with them.
    """
    root, frame = Path(root), 0
    for folder in PARTS.values():
        (root / folder).mkdir(parents=True, exist_ok=True)
    random = np.random.RandomState(seed)  # its stream is frozen across NumPy's versions
    plain = ["age", "backpack", "bag", "handbag", "clothes", "down", "up", "hair", "hat", "gender"]
    flags = [(a, k) for a in ("upcolor", "downcolor") for k in range(len(ATTRIBUTES[a]) - 1)]

    def save(part, person_id, person, camera, number, poor=False):
        nonlocal frame
        frame += 25
        shown = f"{person_id:04d}" if person_id >= 0 else "-1"
        path = root / PARTS[part] / f"{shown}_c{camera}s1_{frame:06d}_{number:02d}.jpg"
        draw_crop(person, camera, random, poor).save(path, quality=int(random.randint(70, 92)))

    for half, start in (("train", 1), ("test", identities + 1)):
        lines = [["id", *plain, *(a.removesuffix("color") + ATTRIBUTES[a][k] for a, k in flags)]]
        for person_id in range(start, start + identities):
            person = draw_identity(random)
            lines.append([person_id, *(1 + person[a] for a in plain), *(1 + (person[a] == k) for a, k in flags)])
            cameras = 1 + random.permutation(6)[:random.randint(2, 7)]
            for k in range(images_per_identity):
                save("train" if half == "train" else "gallery", person_id, person, cameras[k % len(cameras)], 1 + k)
            if half == "test":
                for camera in cameras[:2] if images_per_identity > 1 else cameras[1:2]:
                    save("query", person_id, person, camera, 0)
                if (person_id - start) % 6 == 0:
                    save("gallery", -1, person, cameras[0], 98, poor=True)
        text = "".join(",".join(map(str, line)) + "\n" for line in lines)
        (root / f"annotations_{half}.csv").write_text(text, newline="\n")
    for k in range(max(2, identities * images_per_identity // 5)):
        save("gallery", 0, draw_identity(random), random.randint(1, 7), 1 + k % 90, poor=k % 3 == 0)
    (root / DRAWN).write_text("Drawn people, not photographs: "
                              f"draw_market({identities}, {images_per_identity}, {seed}).\n", newline="\n")


def draw_identity(random):
    """Choose a person: the 12 classes by attribute, and what tells two people of the same classes apart."""
    person = {a: int((random.rand() > np.cumsum(p)).sum().clip(max=len(p) - 1)) for a, p in FREQUENCIES.items()}
    person["gender"] = female = int(random.rand() < 0.45)
    person["hair"] = int(random.rand() < (0.72 if female else 0.06))
    person["clothes"] = int(random.rand() > (0.32 if female else 0.0))

    def cloth(names, which):
        """Three shades of the named colour, or three colours for "multi", and a pattern."""
        if names[which] == "multi":
            return [RGB[names[k]] for k in random.permutation(len(names) - 1)[:3]], "blocks"
        shade = np.clip(np.array(RGB[names[which]]) * random.uniform(0.85, 1.12) + random.uniform(-14, 14, 3), 0, 255)
        accent = np.clip(shade + random.choice([-1, 1]) * random.uniform(35, 60), 0, 255)
        pattern = random.choice(["plain", "plain", "bands", "columns", "print"])
        return [tuple(map(int, c)) for c in (shade, accent, shade)], pattern

    person["top"] = cloth(ATTRIBUTES["upcolor"], person["upcolor"])
    person["bottom"] = cloth(ATTRIBUTES["downcolor"], person["downcolor"])
    person["skin"] = darker((238, 198, 168), random.uniform(0.62, 1.0))
    hair = [(32, 26, 24), (64, 44, 32), (112, 76, 44), (148, 110, 64)][random.choice(4, p=[0.5, 0.25, 0.15, 0.1])]
    person["hair_colour"] = (214, 214, 212) if person["age"] == 3 else hair
    for item in ("shoes", "hat_colour", "bag_colour", "pack_colour", "handbag_colour"):
        person[item] = darker(list(RGB.values())[random.randint(10)], 0.85)
    person["build"] = random.uniform(0.90, 1.10) * (0.92, 0.92, 1.14, 1.04)[person["age"]]
    person["height"] = random.uniform(0.97, 1.03) * (0.70, 0.97, 1.0, 0.92)[person["age"]]
    return person


class Brush:
    """Pillow's pen in a person's coordinates: x from the middle to the right, y from the feet up, 110 to the head."""

    def __init__(self, image, middle=0.0, feet=0.0, unit=1.0):
        self.pen, self.middle, self.feet, self.unit = ImageDraw.Draw(image), middle, feet, unit

    def at(self, *points):
        return [(SCALE * (self.middle + x * self.unit), SCALE * (self.feet - y * self.unit)) for x, y in points]

    def box(self, x0, y0, x1, y1, colour, corner=0.0):
        (left, top), (right, bottom) = self.at((min(x0, x1), y1), (max(x0, x1), y0))
        radius = max(0, min(corner * self.unit * SCALE, (right - left) / 2 - 1, (bottom - top) / 2 - 1))
        self.pen.rounded_rectangle([left, top, right, bottom], radius, colour)

    def dot(self, x, y, rx, ry, colour):
        self.pen.ellipse(self.at((x - rx, y + ry), (x + rx, y - ry)), colour)

    def cap(self, x, y, rx, ry, start, colour):
        self.pen.chord(self.at((x - rx, y + ry), (x + rx, y - ry)), start, 540 - start, colour)

    def shape(self, points, colour):
        self.pen.polygon(self.at(*points), colour)

    def limb(self, points, thick, colour):
        self.pen.line(self.at(*points), colour, round(thick * self.unit * SCALE), joint="curve")
        for x, y in points:
            self.dot(x, y, thick / 2, thick / 2, colour)


def draw_crop(person, camera, random, poor=False):
    """Draw a person as one camera sees them: a 64x128 image; poor: as a bad detection would cut it out."""
    wall, ground, horizon, light, blur, zoom = CAMERAS[camera - 1]
    picture = Image.new("RGB", (64 * SCALE, 128 * SCALE), wall)
    place = Brush(picture, 0, 128)  # y from the lower edge up
    horizon = 128 - horizon
    place.box(0, 0, 64, horizon, ground)
    shift = random.randint(0, 24)
    for x in range(-24, 80, 24 if camera % 2 else 16):  # windows, trunks or pillars, and joints in the ground
        top = 129 if camera % 3 else horizon + 26
        place.box(x + shift, horizon, x + shift + (5 if camera % 2 else 9), top, darker(wall, 0.86))
        place.pen.line(place.at((x + shift, horizon), (x * 1.8 + shift - 20, 0)), darker(ground, 0.92), SCALE)

    unit = person["height"] * zoom * random.uniform(0.96, 1.03)
    middle, feet = 32 + random.uniform(-3, 3), 121 + random.uniform(-2, 3)
    if poor:
        unit *= random.uniform(1.1, 1.5)
        middle += random.choice([-1, 1]) * random.uniform(16, 30)
        feet += random.uniform(-40, 50)
    brush = Brush(picture, middle, feet, unit)
    back, side = random.rand() < 0.45, random.choice([-1, 1])
    stride, swing = random.uniform(1, 7), random.uniform(-4, 4)
    old, female, wide = person["age"] == 3, person["gender"] == 1, person["build"]
    shoulder, waist, hip = (v * wide for v in ((10.0, 7.4, 9.6) if female else (12.6, 9.6, 9.2)))
    lean, hair, skin = 4 * old, person["hair_colour"], person["skin"]

    def garment(cloth, cut):
        """Lay a cloth, its colours in its pattern, over what cut(brush) draws."""
        (first, second, third), pattern = cloth
        mask, fabric = Image.new("L", picture.size, 0), Image.new("RGB", picture.size, first)
        cut(Brush(mask, middle, feet, unit))
        weave = Brush(fabric, middle, feet, unit)
        for k in range(0, 136, 8):
            if pattern == "bands":
                weave.box(-64, k, 64, k + 3, second)
            elif pattern == "columns":
                weave.box(k - 64, -20, k - 61, 140, second)
            elif pattern == "blocks":
                weave.box(-64, k, 64, k + 8, (first, second, third)[k // 8 % 3])
        if pattern == "print":
            weave.dot(0, 76, 5 * wide, 6, second)
            weave.box(-64, 34, 64, 38, second)
        picture.paste(fabric, mask=mask)

    brush.dot(0, -1, 15 * wide, 2.4, darker(ground, 0.72))  # shadow
    if person["hair"] and not back:
        brush.box(lean - 8.4, 80, lean + 8.4, 108, hair, 6)
    if person["backpack"] and not back:
        brush.box(-shoulder - 1.5, 60, shoulder + 1.5, 88, person["pack_colour"], 4)

    legs = [[(k * 4.6 * wide, 54), (k * (5 * wide + stride * bend), 28), (k * (5 * wide + stride * reach), 4)]
            for k, bend, reach in ((-1, 0.5, 1.0), (1, 0.4, 0.8))]
    for leg in legs:
        brush.limb(leg, 6.4 * wide, skin)
        brush.dot(leg[2][0] + 1.2 * side, 2.2, 5, 2.9, person["shoes"])

    def below(cut):
        if person["clothes"] == 0:
            hem = 8 if person["down"] == 0 else 34
            return cut.shape([(-waist, 62), (waist, 62), (hip + 7, hem), (-hip - 7, hem)], 255)
        for leg in legs:
            trouser = [leg[0], leg[1], (leg[2][0], 7)] if person["down"] == 0 else [leg[0], (leg[1][0], 33)]
            cut.limb(trouser, 8.6 * wide, 255)
        cut.box(-hip, 48, hip, 60, 255, 3)
    garment(person["bottom"], below)

    arms = [[(k * (shoulder - 1.5), 85), (k * (shoulder + 3), 70), (k * (shoulder + 2 + swing), 55)] for k in (-1, 1)]
    for arm in arms:
        brush.limb(arm, 4.8, skin)
    brush.dot(lean * 0.6, 91, 3.4, 5, skin)

    def above(cut):
        for arm in arms:
            cut.limb(arm if person["up"] == 0 else [arm[0], (arm[1][0], 75)], 6.2, 255)
        half = [(shoulder * 0.6, 91), (shoulder, 86), (waist, 66), (hip, 53)]
        cut.shape(half + [(-x, y) for x, y in reversed(half)], 255)
    garment(person["top"], above)

    brush.dot(lean, 101, 6.6, 8.2, skin)
    if back:
        brush.dot(lean, 101.8, 7.2, 8.2, hair)
        if person["hair"]:
            brush.box(lean - 7.6, 78, lean + 7.6, 104, hair, 5)
    else:
        brush.cap(lean, 103, 7.2, 8, 175, hair)
        for k in (-1, 1):
            brush.dot(lean + k * 2.5 + side * 0.8, 101, 0.9, 1.1, (30, 26, 26))
            if person["hair"]:
                brush.box(lean + k * 8, 84, lean + k * 5.2, 104, hair, 1.2)
    if person["hat"]:
        brush.cap(lean, 105.5, 8, 9.5, 180, person["hat_colour"])
        brush.box(lean - 10, 104, lean + 10, 106.5, person["hat_colour"], 1)
    if person["backpack"] and back:
        brush.box(-8.5 * wide, 60, 8.5 * wide, 89, person["pack_colour"], 4)
        brush.box(-5.5 * wide, 63, 5.5 * wide, 72, darker(person["pack_colour"], 0.7), 2)
    elif person["backpack"]:
        for k in (-1, 1):
            brush.limb([(k * 7 * wide, 90), (k * 7.4 * wide, 66)], 2.6, person["pack_colour"])
    if person["bag"]:
        brush.limb([(-side * shoulder * 0.7, 90), (side * hip, 56)], 1.8, person["bag_colour"])
        brush.box(side * (hip - 3), 46, side * (hip + 8), 58, person["bag_colour"], 1.5)
    if person["handbag"]:
        x, y = arms[int(side < 0)][2]
        brush.pen.arc(brush.at((x - 4, y + 1), (x + 4, y - 9)), 180, 360, person["handbag_colour"], 4)
        brush.shape([(x - 4.5, y - 4), (x + 4.5, y - 4), (x + 6, y - 14), (x - 6, y - 14)], person["handbag_colour"])
    if old:
        brush.limb([(arms[1][2][0] + 2, 56), (arms[1][2][0] + 4, 2)], 1.6, (92, 66, 44))
    if random.rand() < 0.14:  # something in the way: a post, or a passer-by
        colour = tuple(random.randint(50, 200, 3).tolist())
        if random.rand() < 0.5:
            place.box((at := random.uniform(4, 60)), 0, at + random.uniform(3, 6), 128, colour)
        else:
            place.dot(random.choice([-6, 70]), random.uniform(18, 58), 17, 46, colour)

    picture = picture.resize((64, 128), Image.Resampling.BOX)
    picture = picture.filter(ImageFilter.GaussianBlur(blur * random.uniform(0.5, 1.3)))
    pixels = np.asarray(picture, np.float64) * np.array(light) * random.uniform(0.88, 1.12)
    pixels += random.normal(0, 4, pixels.shape)
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def darker(colour, factor):
    """A colour with each channel times `factor`."""
    return tuple(int(v * factor) for v in colour)
