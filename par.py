#!/usr/bin/env python3
"""Stage 1, person attribute recognition: ResNet18 with a head for each of 12 attributes.

    python par.py --loss wce --epochs 15                train; the best epoch is par_best.pt
    python par.py --loss all                            the four losses in turn: tables 2 and 3
    python par.py --eval par_best.pt                    score: validation and test identities
    python par.py --eval par_best.pt --predict PATH...  attributes of your own images, as CSV;
                                                        --sheet, --maps: as pictures
    python par.py --stats                               class frequencies: table 4 and figure 4

[report] is "Person Attributes Recognition and Re-Identification" by Caldarella, Pedeni and
Trebucchi (University of Trento); tables and figures have its numbers.
"""
import argparse
import csv
import signal
import sys
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the seconds that PyTorch's import takes: no traceback

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import common
from common import ATTRIBUTES, UserError

LOSSES = {"ce": "Vanilla CE", "wce": "Weighted CE", "focal": "Focal", "alpha": "AlphaFocal"}


# ------------------------------------------------------------------------------------------------ network and losses


class AttributeNet(nn.Module):
    """[report] figure 1: crops [B, 3, H, W] in 0..255 -> list of 12 logits, [B, classes] each."""

    def __init__(self, dropout=0.5, state=None):
        super().__init__()
        self.backbone = common.Backbone(state)
        self.heads = nn.ModuleList(nn.Sequential(nn.Dropout(dropout), nn.Linear(512, len(names)))
                                   for names in ATTRIBUTES.values())

    def forward(self, crops):
        features = self.backbone(crops)
        return [head(features) for head in self.heads]


def class_weights(labels):
    """Inverse class frequencies ([report] section 3.1.2): labels int64 [N, 12] -> list of 12 float tensors [classes].

    A class that does not occur weighs 0, and the mean weight over the labelled images is 1, so that a weighted loss
    has the scale of a plain one.
    """
    counts = class_counts(labels)
    return [torch.where(n > 0, n.sum() / (n.clamp(min=1) * (n > 0).sum()), 0) for n in counts]


def class_counts(labels):
    """Images per class: labels int64 [N, 12], -1 unknown -> list of 12 float tensors [classes]."""
    return [torch.bincount(labels[labels[:, k] >= 0, k], minlength=len(names)).float()
            for k, names in enumerate(ATTRIBUTES.values())]


def attribute_loss(logits, labels, kind, weights=None, gamma=2.0):
    """Sum over the attributes of the mean loss over the images that have a label ([report] section 3.1.2).

    logits: list of 12 tensors [B, classes]; labels: int64 [B, 12], -1 unknown; weights: as from `class_weights`.
    kind: "ce" -log(p_t); "wce" w_t times that; "focal" (1 - p_t)^gamma times that (Lin et al. 2018, eq. 4);
    "alpha" both (eq. 5, alpha = the weights). From log-softmax, so that no p_t underflows.
    """
    if kind not in LOSSES or (kind in ("wce", "alpha") and weights is None):
        raise ValueError(f"loss {kind!r} is none of {', '.join(LOSSES)}, or its class weights are missing")
    total = 0
    for k, z in enumerate(logits):
        target, known = labels[:, k].clamp(min=0), labels[:, k] >= 0
        log_p = F.log_softmax(z, 1, dtype=torch.promote_types(z.dtype, torch.float32)).gather(1, target[:, None])[:, 0]
        loss = -log_p
        if kind in ("focal", "alpha"):
            loss = loss * (-torch.expm1(log_p)).clamp(min=1e-12) ** gamma  # a slope at 0 is infinite for gamma < 1
        if kind in ("wce", "alpha"):
            loss = loss * weights[k][target]
        total = total + (loss * known).sum() / known.sum().clamp(min=1)
    return total


def confusions(predicted, labels):
    """Count crops of each true class that were predicted as each class: int64 [N, 12] twice -> 12 tensors [n, n]."""
    counts = []
    for k, names in enumerate(ATTRIBUTES.values()):
        known, n = labels[:, k] >= 0, len(names)
        counts.append(torch.bincount(labels[known, k] * n + predicted[known, k], minlength=n * n).view(n, n))
    return counts


def score(predicted, labels):
    """Accuracy and macro F1 of each attribute, fractions: int64 [N, 12] twice -> (accuracy [12], f1 [12]).

    Macro F1 is the mean over the classes that occur in truth or prediction, scikit-learn's definition. Labels of -1
    do not count; NaN for an attribute without a label.
    """
    accuracy, f1 = [], []
    for confusion in confusions(predicted, labels):
        confusion = confusion.double()
        hits, either = confusion.diag(), confusion.sum(0) + confusion.sum(1)
        accuracy.append(hits.sum() / confusion.sum())
        f1.append((2 * hits / either)[either > 0].mean())
    return torch.stack(accuracy), torch.stack(f1)


def log_probabilities(model, crops, rows=None):
    """Of all 41 classes, attribute after attribute: uint8 crops [N, 3, H, W] -> float32 [N, 41], on the CPU."""
    return torch.cat([z.log_softmax(1) for z in common.infer(model, crops, rows)], 1).cpu()


def classes(log_p):
    """Of each attribute the most probable class and its probability: [N, 41] -> int64 [N, 12], float32 [N, 12]."""
    best = [part.max(1) for part in log_p.split([len(names) for names in ATTRIBUTES.values()], 1)]
    return torch.stack([b.indices for b in best], 1), torch.stack([b.values for b in best], 1).exp()


def predict(model, crops, rows=None):
    """Most probable classes: uint8 crops [N, 3, H, W] -> int64 [N, 12], on the CPU."""
    return classes(log_probabilities(model, crops, rows))[0]


def activation_maps(model, crops, found):
    """Where classes come from: uint8 crops [N, 3, H, W], classes int64 [N, 12] -> float32 [N, 12, h, w].

    Class activation maps (Zhou et al. 2016): a head is linear in the mean over layer4's map, so the same product at
    each of its places says what that place adds to the logit.
    """
    kept, device = [], next(model.parameters()).device
    handle = model.backbone.net.layer4.register_forward_hook(lambda module, inputs, output: kept.append(output))
    with torch.inference_mode():
        model.eval()(crops.to(device))
        handle.remove()
        weights = torch.stack([head[1].weight[which] for head, which in zip(model.heads, found.T.to(device))], 1)
        return torch.einsum("nac,nchw->nahw", weights, kept[0]).cpu()


# ------------------------------------------------------------------------------------------------------- the commands


def load_train(args, labels=True):
    """The train set; UserError if it holds junk or, where labels are needed, no annotations."""
    market = common.load_market(args.data, "train", args.size)
    if (market.person_ids < 1).any():
        name = market.names[int((market.person_ids < 1).int().argmax())]
        raise UserError(f"{name} in {args.data / common.PARTS['train']} shows no identity (0 or -1): move it away.")
    if labels and (market.labels < 0).any():
        raise UserError(f"{args.data} has no annotations: annotations_train.csv or market_attribute.mat belongs there.")
    return market


def train(args, market, split, crops, state):
    """Train with args.loss, write checkpoint, record and curves: -> (accuracy [12], f1 [12]) on validation."""
    chosen, held = split
    torch.manual_seed(args.seed)  # the same start for each loss
    model = AttributeNet(args.dropout, state).to(args.device)
    labels = market.labels.to(args.device)
    weights = [w.to(args.device) for w in class_weights(market.labels[chosen])]
    pool, validation = chosen.nonzero()[:, 0], held.nonzero()[:, 0]

    def validate():
        accuracy, f1 = score(predict(model, crops, validation), market.labels[validation])
        return {"f1": f1.mean().item(), "accuracy": accuracy.mean().item()}

    record = common.new_record(args) | {"images": {"train": len(pool), "validation": len(validation)}}
    checkpoint = {"kind": "par", "args": record["arguments"], "versions": record["versions"],
                  "data": market.fingerprint,
                  "train_ids": market.person_ids[chosen].unique(), "validation_ids": market.person_ids[held].unique()}
    print(f"\n{LOSSES[args.loss]}: {len(pool)} training and {len(validation)} validation crops of "
          f"{len(checkpoint['train_ids'])} and {len(checkpoint['validation_ids'])} identities")
    best = common.fit(model, crops, lambda generator: pool[torch.randperm(len(pool), generator=generator)],
                      lambda logits, rows: attribute_loss(logits, labels[rows], args.loss, weights, args.gamma),
                      validate, args, checkpoint, record)
    with common.timed(record["seconds"], "scoring"):
        accuracy, f1 = score(predict(model, crops, validation), market.labels[validation])
    guess = commonest(market.labels[validation], market.labels[chosen])
    record["final"] = {"best epoch": best["epoch"], "validation": figures(accuracy, f1), "commonest": figures(*guess)}
    common.write_record(args.out, record)
    common.curves(args.out.with_suffix(".png"), record, f"Stage 1, {LOSSES[args.loss]}")
    common.say_seconds(record["seconds"])
    return accuracy, f1


def figures(accuracy, f1):
    """What a record says of a score: fractions by attribute, and their mean, Global."""
    return {name: {k: round(v, 4) for k, v in zip([*ATTRIBUTES, "global"], [*values.tolist(), values.mean().item()])}
            for name, values in (("accuracy", accuracy), ("f1", f1))}


def commonest(labels, reference):
    """Score of predicting each attribute's commonest class in `reference` for all of `labels`."""
    return score(torch.stack([n.argmax() for n in class_counts(reference)]).expand_as(labels), labels)


def show(title, columns, commonest=None):
    """Print percentages as [report] tables 2 and 3 do: columns is a dict of name -> [12] fractions.

    commonest: what naming the commonest class scores, [12]; then the best of the columns in each row is marked.
    """
    rows = [[a.capitalize()] + [100 * v[k].item() for v in columns.values()] for k, a in enumerate(ATTRIBUTES)]
    rows.append(["Global"] + [100 * v.mean().item() for v in columns.values()])
    if commonest is not None:
        rows = [[*row, f"{100 * guess:.2f}  "] for row, guess in zip(rows, [*commonest, commonest.mean()])]
        columns = [*columns, "commonest"]
    common.table(title, ["", *columns], rows, None if commonest is None else max)


def evaluate(args, checkpoint):
    """Score a checkpoint on the validation identities and on the test identities' gallery crops."""
    model = load(args, checkpoint)
    with common.timed(args.seconds, "loading"):
        market, test = load_train(args), common.load_market(args.data, "gallery", args.size)
    chosen, held = common.saved_split(checkpoint, market.person_ids, args.eval)
    for name, part, rows in (("validation", market, held), ("test", test, test.labels[:, 0] >= 0)):
        if not rows.any():
            print(f"\nThe {name} crops have no annotations: not scored.")
            continue
        with common.timed(args.seconds, "scoring"):
            predicted = predict(model, part.images, rows.nonzero()[:, 0])
        title = f"{args.eval} on {int(rows.sum())} {name} crops of {len(part.person_ids[rows].unique())} identities (%)"
        show_one(title, *score(predicted, part.labels[rows]), part.labels[rows], market.labels[chosen])
        if args.confusion:
            path = args.out.with_name(f"par_confusion_{name}.png")
            common.charts(path, [
                {"title": f"{a}: % of a true class (row) predicted as", "classes": names, "matrix": counts}
                for (a, names), counts in zip(ATTRIBUTES.items(), confusions(predicted, part.labels[rows]))],
                          columns=2, size=(520, 320))
            print(f"Confusion matrices: {path}")
    common.say_seconds(args.seconds)


def show_one(title, accuracy, f1, labels, reference):
    """Print one model's accuracy and F1, each beside that of naming the commonest class among `reference` labels."""
    guess_accuracy, guess_f1 = commonest(labels, reference)
    show(title, {"accuracy": accuracy, "of the commonest": guess_accuracy, "F1": f1, "F1 of the commonest": guess_f1})


def load(args, checkpoint):
    """The network that the checkpoint of --eval holds."""
    return common.load_weights(AttributeNet(), checkpoint["model"], args.eval).to(args.device)


def predict_files(args, checkpoint):
    """Write the attributes of the user's own images, and of all images in folders, as CSV on standard output.

    With --sheet and --maps also as pictures, of the first of them.
    """
    model = load(args, checkpoint)
    with common.timed(args.seconds, "reading"):
        paths, crops = common.read_user_images(args.predict, args.size)
    with common.timed(args.seconds, "predicting"):
        found, sure = classes(log_probabilities(model, crops))
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(["file", *ATTRIBUTES, *(f"{a}_probability" for a in ATTRIBUTES)])
    named = [[names[c] for names, c in zip(ATTRIBUTES.values(), row)] for row in found.tolist()]
    for path, row, p in zip(paths, named, sure.tolist()):
        table.writerow([path, *row, *(f"{v:.3f}" for v in p)])
    print(f"{len(paths)} images, by {args.about}", file=sys.stderr)
    common.say_seconds(args.seconds, sys.stderr)

    texts = [[(f"{a}: {c}", f"{v:.2f}") for a, c, v in zip(ATTRIBUTES, row, p)] for row, p in zip(named, sure.tolist())]
    if args.sheet:
        cells = [(crop, [path.stem, *map("  ".join, text)], None) for path, crop, text in zip(paths, crops, texts)][:60]
        path = args.out.with_name("par_sheet.png")
        common.sheet(path, [cells[i:i + 4] for i in range(0, len(cells), 4)], beside=True)
        print(f"{path}: the attributes of {len(cells)} of them", file=sys.stderr)
    if args.maps:
        some = crops[:20]
        maps = F.interpolate(activation_maps(model, some, found[:20]), some.shape[2:], mode="bilinear")
        maps = maps - maps.amin((2, 3), keepdim=True)
        share = 0.7 * (maps / maps.amax((2, 3), keepdim=True).clamp(min=1e-9))[:, :, None] ** 2  # [n, 12, 1, H, W]
        orange = torch.tensor([213.0, 94.0, 0.0]).view(3, 1, 1)
        lit = (some[:, None] * (1 - share) + orange * share).byte()
        path = args.out.with_name("par_maps.png")
        common.sheet(path, [[(crop, [path.stem], None), *((c, t, None) for c, t in zip(row, text))]
                            for path, crop, row, text in zip(paths, some, lit, texts)], height=192)
        print(f"{path}: where each attribute of {len(some)} of them comes from, in orange", file=sys.stderr)


def statistics(args):
    """Print how often each class occurs in the train set ([report] table 4) and draw it (figure 4)."""
    market = load_train(args)
    _, first = np.unique(market.person_ids.numpy(), return_index=True)
    crops, people = class_counts(market.labels), class_counts(market.labels[torch.from_numpy(first)])
    rows = [[f"{a} {name}", f"{c:.0f}", 100 * (c / n.sum()).item(), f"{p:.0f}", 100 * (p / m.sum()).item()]
            for (a, names), n, m in zip(ATTRIBUTES.items(), crops, people) for name, c, p in zip(names, n, m)]
    common.table(f"Table 4: classes in {args.data}, {len(market.names)} train crops of {len(first)} identities",
                 ["", "crops", "%", "identities", "%"], rows)
    shares = {a: dict(zip(names, (100 * n / n.sum()).tolist())) for (a, names), n in zip(ATTRIBUTES.items(), crops)}
    pairs = {f"{a}: {list(share)[1]}": list(share.values())[1] for a, share in shares.items() if len(share) == 2}
    path = args.out.with_name("par_stats.png")
    common.charts(path, [{"title": title, "bars": bars} for title, bars in (
        ("Figure 4: age", shares["age"]), ("Two-class attributes", pairs), ("Upper-body colour", shares["upcolor"]),
        ("Lower-body colour", shares["downcolor"]))], columns=2, size=(500, 320))
    print(f"Figure 4: {path}")


def main():
    parser = common.Parser(__doc__.split("[report]")[0])
    add = parser.add_argument_group("stage 1").add_argument
    add("--loss", choices=[*LOSSES, "all"], default="wce", help="cross-entropy; weighted by inverse class frequency; "
        "focal; alpha-focal (both); or all in turn (wce, the report's best by F1)")
    add("--gamma", type=common.number(float, 0), default=2.0, metavar="G", help="of focal losses (2, Lin et al. 2018)")
    add("--dropout", type=common.number(float, 0, 0.99), default=0.5, metavar="P", help="before each head (0.5)")
    instead = parser.add_argument_group("instead of training").add_mutually_exclusive_group().add_argument
    instead("--eval", type=Path, metavar="FILE", help="score this checkpoint of par.py")
    instead("--stats", action="store_true", help="class frequencies of the train set: table 4 and figure 4")
    add = parser.add_argument_group("with --eval").add_argument
    add("--confusion", action="store_true", help="draw a confusion matrix for each attribute, par_confusion_*.png")
    add("--predict", type=Path, nargs="+", metavar="PATH", help="attributes of images and folders, as CSV")
    add("--sheet", action="store_true", help="with --predict: draw the images with their attributes, par_sheet.png")
    add("--maps", action="store_true", help="with --predict: draw where each attribute comes from, par_maps.png")
    common.shared_flags(parser, 15, 3e-4, "par_best.pt")
    args = parser.parse_args()
    if args.predict and not args.eval:
        raise UserError("--predict needs --eval FILE, the checkpoint to predict with.")
    if (args.sheet or args.maps) and not args.predict or args.confusion and (args.predict or not args.eval):
        raise UserError("--sheet and --maps go with --predict PATH..., --confusion with --eval FILE alone.")
    checkpoint = args.eval and common.load_checkpoint(args.eval, "par")
    device = common.start(args, args.eval, checkpoint, data=not args.predict)
    if not args.eval or args.confusion or args.sheet or args.maps:
        common.check_output(args.out)
    if args.predict:
        return predict_files(args, checkpoint)
    if args.eval:
        return evaluate(args, checkpoint)
    if args.stats:
        return statistics(args)

    resumes = args.resume and args.loss != "all" and common.last_path(args.out).exists()
    state = None if resumes else common.backbone_weights(args.weights)
    with common.timed(args.seconds, "loading"):
        market = load_train(args)
        crops = common.place(market.images, device)
    split = common.split_identities(market.person_ids, seed=args.seed)
    truth, reference = market.labels[split[1]], market.labels[split[0]]
    if args.loss != "all":
        return show_one(f"{args.out} on validation (%)", *train(args, market, split, crops, state), truth, reference)
    scores = {}
    for kind, name in LOSSES.items():
        out = args.out.with_stem(f"{args.out.stem}_{kind}")
        settings = argparse.Namespace(**vars(args) | {"loss": kind, "out": out})
        scores[name] = train(settings, market, split, crops, state)
    guess = commonest(truth, reference)
    for k, title in enumerate(("Table 2: accuracy", "Table 3: macro F1")):
        columns = {name: score[k] for name, score in scores.items()}
        show(f"{title} (%) on validation", columns, guess[k])


if __name__ == "__main__":
    common.run(main)
