#!/usr/bin/env python3
"""Stage 1, person attribute recognition: ResNet18 with a head for each of 12 attributes.

    python par.py --loss wce --epochs 15                train; the best epoch is par_best.pt
    python par.py --loss all                            the four losses in turn: tables 2 and 3
    python par.py --recipe strong                       what is known since the report; --head conv
    python par.py --eval par_best.pt                    score: validation and test identities
    python par.py --eval par_best.pt --predict PATH...  attributes of your own images, as CSV
    python par.py --stats                               class frequencies: table 4 and figure 4

[report] is the one that common.py names; tables and figures have its numbers.
"""
import argparse
import csv
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.nn import functional as F

import common
from common import ATTRIBUTES, SIZES, UserError


# ------------------------------------------------------------------------------------------------ network and losses

class AttributeNet(nn.Module):
    """[report] figure 1: crops [B, 3, H, W] in 0..255 -> logits of all classes, attribute after attribute, [B, 41].

    head: "linear", Dropout and Linear on the mean over the feature map; or "conv", the report's future work (section
    5): before these, a branch of its own for each attribute, of a convolution and attention over the map's places.

    identities: the strong recipe, of both stages, learns attributes and so many identities jointly (Lin et al. 2019),
    these behind a BNNeck (Luo et al. 2019), here without a scale. Then the output is in training [B, 41 + width +
    identities]: logits, the features before the neck, logits of identities. In evaluation it is [B, 41 + width]:
    logits, and the features behind the neck at length 1, both, with "mirror", means over the crop and its mirror image.
    """

    def __init__(self, dropout=0.5, state=None, head="linear", identities=0, rungs=()):
        super().__init__()
        self.conv, self.identities, self.rungs = head == "conv", identities, rungs
        self.backbone = common.Backbone(state, rungs)
        wide, count, branch = self.backbone.width, len(ATTRIBUTES), 64
        if self.conv:
            self.look = nn.Sequential(nn.Conv2d(wide, count * branch, 3, padding=1, bias=False),
                                      nn.BatchNorm2d(count * branch), nn.ReLU())
            self.place = nn.Conv2d(count * branch, count, 1, groups=count)
        self.heads = nn.ModuleList(nn.Sequential(nn.Dropout(dropout), nn.Linear(branch if self.conv else wide, n))
                                   for n in SIZES)
        if identities:
            self.neck = nn.BatchNorm1d(wide, affine=False) if "neck" in rungs else nn.Identity()
            self.identify = nn.Linear(wide, identities, bias=False)
            nn.init.normal_(self.identify.weight, std=0.001)

    def attend(self, maps):
        """What each branch sees, [B, 12, 64, h * w], and its attention to the places: [B, 12, h * w], adds up to 1."""
        seen = self.look(maps)
        return seen.flatten(2).unflatten(1, (len(ATTRIBUTES), -1)), self.place(seen).flatten(2).softmax(2)

    def forward(self, crops):
        mirror = "mirror" in self.rungs and not self.training
        maps, features = self.backbone(torch.cat([crops, crops.flip(3)]) if mirror else crops)
        inputs = [features] * len(SIZES)
        if self.conv:
            seen, attention = self.attend(maps)
            inputs = (seen @ attention[..., None])[..., 0].unbind(1)
        logits = torch.cat([head(x) for head, x in zip(self.heads, inputs)], 1)
        if not self.identities:
            return logits
        with torch.autocast(crops.device.type, enabled=False):  # from here on in float32: bfloat16 has three digits
            necked = self.neck(features.float())
            if self.training:
                return torch.cat([logits, features.float(), self.identify(necked)], 1)
            logits, necked = (x.float().unflatten(0, (1 + mirror, -1)).mean(0) for x in (logits, necked))
            return torch.cat([logits, F.normalize(necked)], 1)


# What --without can leave out of the strong recipe; "identity": identities beside attributes; "mirror": at test.
RUNGS = ["identity", "neck", "stride", "erasing", "shift", "muon", "mirror"]
# Each loss: its name in [report] table 2, whether it weighs classes, whether it is focal.
LOSSES = {"ce": ("Vanilla CE", False, False), "wce": ("Weighted CE", True, False),
          "focal": ("Focal", False, True), "alpha": ("AlphaFocal", True, True)}


def attribute_loss(logits, labels, kind, weights=None, gamma=2.0):
    """Sum over the attributes of the mean loss over the images that have a label ([report] section 3.1.2).

    logits: list of 12 tensors [B, classes]; labels: int64 [B, 12], -1 unknown; weights: as from `class_weights`.
    kind: "ce" -log(p_t); "wce" w_t times that; "focal" (1 - p_t)^gamma times that (Lin et al. 2018, eq. 4);
    "alpha" both (eq. 5, alpha = the weights). From log-softmax, so that no p_t underflows."""
    total, (_, weighted, focal) = 0, LOSSES[kind]
    for k, z in enumerate(logits):
        target, known = labels[:, k].clamp(min=0), labels[:, k] >= 0
        log_p = F.log_softmax(z, 1, dtype=torch.promote_types(z.dtype, torch.float32)).gather(1, target[:, None])[:, 0]
        loss = -log_p
        if focal:
            loss = loss * (-torch.expm1(log_p)).clamp(min=1e-12) ** gamma  # a slope at 0 is infinite for gamma < 1
        loss = loss * (weights[k][target] if weighted else 1)
        total = total + (loss * known).sum() / known.sum().clamp(min=1)
    return total


def class_weights(labels):
    """Inverse class frequencies ([report] section 3.1.2): labels int64 [N, 12] -> list of 12 float tensors [classes].

    A class that does not occur weighs 0. The mean weight over the labelled images is 1: the scale of a plain loss."""
    return [torch.where(n > 0, n.sum() / (n.clamp(min=1) * (n > 0).sum()), 0) for n in class_counts(labels)]


def class_counts(labels):
    """Images per class: labels int64 [N, 12], -1 unknown -> list of 12 float tensors [classes]."""
    return [torch.bincount(column[column >= 0], minlength=n).float() for column, n in zip(labels.T, SIZES)]


# --------------------------------------------------------------------------------------- scoring, training, results

def log_probabilities(output):
    """Of all classes, from a network's output, which begins with their logits: [N, 41 or more] -> float32 [N, 41]."""
    return torch.cat([z.log_softmax(1) for z in output[:, :sum(SIZES)].split(SIZES, 1)], 1)


def most_probable(log_p):
    """Of each attribute the most probable class and its probability: [N, 41] -> int64 [N, 12], float32 [N, 12]."""
    best = [part.max(1) for part in log_p.split(SIZES, 1)]
    return torch.stack([b.indices for b in best], 1), torch.stack([b.values for b in best], 1).exp()


def predict(model, crops, rows=None):
    """Of uint8 crops [N, 3, H, W]: -> as `most_probable`, on the CPU."""
    return [values.cpu() for values in most_probable(log_probabilities(common.infer(model, crops, rows)))]


def score(predicted, labels):
    """Accuracy and macro F1 of each attribute, fractions: int64 [N, 12] twice -> (accuracy [12], f1 [12]).

    Macro F1 is the mean over the classes in truth or prediction, as scikit-learn's. Labels of -1 do not count: where
    there are no others, NaN."""
    scores = []
    for guess, truth, n in zip(predicted.T, labels.T, SIZES):
        pairs = (truth * n + guess)[truth >= 0]
        confusion = torch.bincount(pairs, minlength=n * n).view(n, n).double()  # a row per true class
        hits, either = confusion.diag(), confusion.sum(0) + confusion.sum(1)
        scores.append(torch.stack([hits.sum() / confusion.sum(), (2 * hits / either)[either > 0].mean()]))
    return torch.stack(scores, 1).unbind()


def activation_maps(model, crops, found):
    """Where classes come from: uint8 crops [N, 3, H, W], classes int64 [N, 12] -> float32 [N, 12, h, w].

    Class activation maps (Zhou et al. 2016): a linear head is linear in the mean over the feature map, so the same
    product at each of its places says what that place adds to the logit. Of a conv head: its attention."""
    device = next(model.parameters()).device
    with torch.inference_mode():
        maps, _ = model.eval().backbone(crops.to(device))
        if model.conv:
            return model.attend(maps)[1].unflatten(2, maps.shape[2:]).cpu()
        weights = torch.stack([head[1].weight[which] for head, which in zip(model.heads, found.T.to(device))], 1)
        return torch.einsum("nac,nchw->nahw", weights, maps).cpu()


def load_train(args, annotated=True):
    """The train set; UserError if it holds junk or, where annotations are needed, none."""
    market = common.load_market(args.data, "train", args.size, annotated)
    if junk := [name for name, i in zip(market.names, market.person_ids.tolist()) if i < 1]:
        raise UserError(f"{junk[0]} in {args.data / common.PARTS['train']} shows no identity (0 or -1): move it away.")
    if annotated and (market.labels < 0).any():
        raise UserError(f"{args.data}: no annotations_train.csv or market_attribute.mat. Put one there; reid.py needs "
                        "none, but with --recipe strong add --without attributes.")
    return market


def saved_split(checkpoint, person_ids, path):
    """The split kept in a checkpoint, over the crops of `person_ids`: (train [N] bool, validation [N] bool)."""
    train, validation = checkpoint["train_ids"], checkpoint["validation_ids"]
    if not torch.equal(torch.cat([train, validation]).sort()[0], person_ids.unique()):
        raise UserError(f"{path} was trained on other identities than this data set's: pass its --data.")
    return torch.isin(person_ids, train), torch.isin(person_ids, validation)


def train(args, record, market, split):
    """Train with args.loss, write checkpoint and record: -> as `score_and_show`, on validation."""
    rows, validation = (which.nonzero()[:, 0] for which in split)
    labels = market.labels.to(args.device)
    weights = [w.to(args.device) for w in class_weights(market.labels[rows])]
    state = common.backbone_weights(args)
    torch.manual_seed(args.seed)  # the same start for each loss
    train_ids, validation_ids = (market.person_ids[part].unique() for part in split)
    identities = torch.searchsorted(train_ids, market.person_ids).to(args.device)  # 0, 1, ... of those to train on
    count = len(train_ids) if args.recipe == "strong" else 0
    model = AttributeNet(args.dropout, state, args.head, count, args.rungs).to(args.device)

    def plan(generator):
        return rows[torch.randperm(len(rows), generator=generator)][:, None]

    def criterion(outputs, rows):
        logits = outputs[0, :, :sum(SIZES)].split(SIZES, 1)
        loss = attribute_loss(logits, labels[rows[0]], args.loss, weights, args.gamma)
        if "identity" in args.rungs:
            loss = loss + F.cross_entropy(outputs[0, :, -count:], identities[rows[0]], label_smoothing=0.1)
        return loss

    def validate():
        accuracy, f1 = score(predict(model, market.images, validation)[0], market.labels[validation])
        return {"f1": f1.mean().item(), "accuracy": accuracy.mean().item()}

    print(f"\n{LOSSES[args.loss][0]}: {len(rows)} training and {len(validation)} validation crops of {len(train_ids)} "
          f"and {len(validation_ids)} identities")
    checkpoint = {"kind": "par", "record": record, "train_ids": train_ids, "validation_ids": validation_ids}
    record = common.fit(model, market.images, plan, criterion, validate, args, checkpoint)
    with common.timed(record["seconds"], "scoring"):
        scores = score_and_show(f"{args.out} on validation (%)", model, market, validation, rows)
    record["final"] = {"best epoch": record["best epoch"], "validation": {
        name: {k: round(v, 4) for k, v in values.items()} for name, values in scores.items()}}
    common.write_record(args.out, record)
    common.say_seconds(record["seconds"])
    return scores


def score_and_show(title, model, market, rows, training, reference=None):
    """Score `rows` of a `Market`, beside naming each attribute's commonest class among the rows `training` (of another
    one, `reference`), and print that: -> dict of name -> dict of attribute, or "global" for their mean -> fraction."""
    labels, counts = market.labels[rows], class_counts((reference or market).labels[training])
    accuracy, f1 = score(predict(model, market.images, rows)[0], labels)
    commonest = score(torch.stack([n.argmax() for n in counts]).expand_as(labels), labels)
    scores = {"accuracy": accuracy, "commonest accuracy": commonest[0], "f1": f1, "commonest f1": commonest[1]}
    scores = {k: dict(zip([*ATTRIBUTES, "global"], [*v.tolist(), v.mean().item()])) for k, v in scores.items()}
    show(title, scores)
    return scores


def show(title, scores):
    """Print percentages as [report] tables 2 and 3 do, from a dict of name -> dict of attribute -> fraction."""
    rows = [[a.capitalize(), *(100 * v[a] for v in scores.values())] for a in (*ATTRIBUTES, "global")]
    common.table(title, ["", *(name.replace("f1", "F1") for name in scores)], rows)


def evaluate(args, record, checkpoint):
    """Score a checkpoint on the validation identities and on the test identities' gallery crops."""
    model, seconds = load(args, checkpoint), record["seconds"]
    with common.timed(seconds, "loading"):
        market, test = load_train(args), common.load_market(args.data, "gallery", args.size)
    training, validation = saved_split(checkpoint, market.person_ids, args.eval)
    for name, part, chosen in (("validation", market, validation), ("test", test, (test.labels >= 0).all(1))):
        rows, people = chosen.nonzero()[:, 0], part.person_ids[chosen].unique()
        title = f"{args.eval} on {len(rows)} {name} crops of {len(people)} identities (%)"
        with common.timed(seconds, "scoring"):
            if len(rows):
                score_and_show(title, model, part, rows, training, market)
            else:
                print(f"\nNo {name} crops are annotated, or all were trained on: not scored.")
    common.say_seconds(seconds)


def load(args, checkpoint, model=None):
    """A checkpoint's weights in `model` or, without one, in the `AttributeNet` it tells of; on args.device."""
    own, count = checkpoint["record"]["arguments"], len(checkpoint["train_ids"])
    model = model or AttributeNet(head=own["head"], identities=count * (own["recipe"] == "strong"), rungs=own["rungs"])
    model.load_state_dict(checkpoint["model"])
    return model.to(args.device)


def predict_files(args, record, checkpoint):
    """Write the attributes of the user's own images, as CSV on standard output; with --sheet and --maps also drawn."""
    model, seconds = load(args, checkpoint), record["seconds"]
    with common.timed(seconds, "reading"):
        crops, files = common.read_crops(common.user_files(args.predict), args.size, skip=True)
    if not files:
        raise UserError(f"No image could be read from {', '.join(map(str, args.predict))}.")
    with common.timed(seconds, "predicting"):
        found, sure = predict(model, crops)
    named = [[classes[c] for classes, c in zip(ATTRIBUTES.values(), row)] for row in found.tolist()]
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(["file", *ATTRIBUTES, *(f"{a}_probability" for a in ATTRIBUTES)])
    table.writerows([name, *row, *(f"{v:.3f}" for v in p)] for name, row, p in zip(files, named, sure.tolist()))
    common.say_seconds(seconds, sys.stderr)
    captions = [[f"{a}: {c}  {v:.2f}" for a, c, v in zip(ATTRIBUTES, row, p)] for row, p in zip(named, sure.tolist())]
    shown = [*zip(crops, (file.stem for file in files), captions)][:60]
    if args.sheet:
        cells = [(crop, [name, *lines], None) for crop, name, lines in shown]
        common.sheet(args.out.with_name("par_sheet.png"), [cells[i:i + 6] for i in range(0, len(cells), 6)])
    if args.maps:
        maps = activation_maps(model, crops[:20], found[:20])
        maps = F.interpolate(maps - maps.amin((2, 3), keepdim=True), crops.shape[2:], mode="bilinear")[:, :, None]
        share = 0.7 * (maps / maps.amax((3, 4), keepdim=True).clamp(min=1e-9)) ** 2  # [n, 12, 1, H, W]
        lit = (crops[:20, None] * (1 - share) + torch.tensor([213.0, 94.0, 0.0]).view(3, 1, 1) * share).byte()  # orange
        common.sheet(args.out.with_name("par_maps.png"), height=192, rows=[
            [(crop, [name], None), *((mapped, [line], None) for mapped, line in zip(row, lines))]
            for (crop, name, lines), row in zip(shown, lit)])


def statistics(args):
    """Print how often each class occurs in the train set ([report] table 4) and draw it (figure 4)."""
    market = load_train(args)
    identities = torch.cat([market.person_ids[:, None], market.labels], 1).unique(dim=0)  # a row each
    crops, people = class_counts(market.labels), class_counts(identities[:, 1:])
    rows = [[f"{a} {name}", f"{c:.0f}", 100 * (c / n.sum()).item(), f"{p:.0f}", 100 * (p / m.sum()).item()]
            for (a, classes), n, m in zip(ATTRIBUTES.items(), crops, people) for name, c, p in zip(classes, n, m)]
    common.table(f"Table 4: classes in {args.data}, {len(market.names)} train crops of {len(identities)} identities",
                 ["", "crops", "%", "identities", "%"], rows)
    font, tall = ImageFont.load_default(26), 40
    picture = Image.new("RGB", (1240, tall * (len(rows) + 2)), "white")
    pen = ImageDraw.Draw(picture)
    pen.text((350, tall), "Figure 4: % of the train crops", common.INK, font, "lm")
    for k, (name, _, percent, *_) in enumerate(rows):
        y, end, attribute = tall * (k + 2), 350 + 7 * percent, name.split()[0]
        pen.text((335, y), name, common.INK, font, "rm")
        pen.rectangle((350, y - 15, end, y + 15), common.COLOURS[list(ATTRIBUTES).index(attribute) % 2])
        pen.text((end + 12, y), f"{percent:.1f} %", common.INK, font, "lm")
    common.write_picture(args.out.with_name("par_stats.png"), picture)


# ------------------------------------------------------------------------------------------------- the command line

def parser():
    parser = argparse.ArgumentParser(usage="%(prog)s [options]", description=__doc__.split("[report]")[0],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("stage 1").add_argument
    add("--loss", choices=[*LOSSES, "all"], default="wce", help="cross-entropy; weighted by inverse class frequency; "
        "focal; alpha-focal (both); or all in turn (wce, the report's best by F1)")
    add("--gamma", type=common.number(float, 0), default=2.0, metavar="G", help="of focal losses (2, Lin et al. 2018)")
    add("--head", choices=("linear", "conv"), default="linear", help="conv: each attribute looks for itself (linear)")
    add("--dropout", type=common.number(float, 0, 0.99), default=0.5, metavar="P", help="before each head (0.5)")
    instead = parser.add_argument_group("instead of training").add_mutually_exclusive_group().add_argument
    instead("--eval", type=Path, metavar="FILE", help="score this checkpoint, also one of reid.py")
    instead("--stats", action="store_true", help="class frequencies of the train set: table 4 and figure 4")
    add = parser.add_argument_group("with --eval").add_argument
    add("--predict", type=Path, nargs="+", metavar="PATH", help="attributes of images and folders, as CSV")
    add("--sheet", action="store_true", help="with --predict: draw the first 60 with their attributes, par_sheet.png")
    add("--maps", action="store_true", help="with --predict: draw where those of the first 20 come from, par_maps.png")
    common.shared_flags(parser, (15, 10), (3e-4, 2e-3, 5e-4), (32, 64), "par_best.pt", RUNGS)
    return parser


def main(args):
    if args.predict and not args.eval or (args.sheet or args.maps) and not args.predict:
        raise UserError("--predict PATH... needs --eval FILE, and --sheet and --maps go with --predict PATH...")
    checkpoint = args.eval and common.load_checkpoint(args.eval, "par", "reid")
    if checkpoint and checkpoint["kind"] == "reid":  # whose attributes are its own network's, or of the stage 1 in it
        own = "attributes" in checkpoint["record"]["arguments"]["rungs"]
        if not (checkpoint := checkpoint if own else checkpoint["stage 1"]):
            raise UserError(f"{args.eval} predicts no attributes: pass a checkpoint of par.py.")
    record = common.start(args, args.eval, checkpoint, data=not args.predict)
    if args.stats or args.sheet or args.maps:
        common.check_output(args.out.with_name("par_stats.png" if args.stats else "par_sheet.png"), ".png")
    if args.eval:
        return (predict_files if args.predict else evaluate)(args, record, checkpoint)
    if args.stats:
        return statistics(args)

    common.check_output(args.out, ".pt")
    with common.timed(record["seconds"], "loading"):
        market = load_train(args)
    record["fingerprints"] = {"data set": market.fingerprint()}
    split = common.split_identities(market.person_ids, seed=args.seed)
    if args.loss != "all":
        return train(args, record, market, split)
    scores = {}
    for kind in LOSSES:
        own = vars(args) | {"loss": kind, "out": args.out.with_stem(f"{args.out.stem}_{kind}")}
        scores[kind] = train(argparse.Namespace(**own), record, market, split)
    for title, name in (("Table 2: accuracy", "accuracy"), ("Table 3: macro F1", "f1")):
        columns = {LOSSES[kind][0]: found[name] for kind, found in scores.items()}
        show(f"{title} (%) on validation", columns | {"commonest": scores["ce"][f"commonest {name}"]})


if __name__ == "__main__":
    common.run(main, parser())
