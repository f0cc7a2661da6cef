#!/usr/bin/env python3
"""Stage 2, person re-identification: a Siamese network, triplets from colour clusters.

    python reid.py --init par_best.pt                   train; the best epoch is reid_best.pt
    python reid.py                                      the same without transfer
    python reid.py --init par_best.pt --compare         both: table 1
    python reid.py --eval reid_best.pt                  score: validation and official test
    python reid.py --eval reid_best.pt --embed F.npz    embeddings of the test set
    python reid.py --eval reid_best.pt --search QUERY.jpg --gallery FOLDER    your own crops
    python reid.py --eval reid_best.pt --find upcolor=red hat=yes --gallery FOLDER    by words

[report] is "Person Attributes Recognition and Re-Identification" by Caldarella, Pedeni and
Trebucchi (University of Trento); tables and figures have its numbers.
"""
import argparse
import signal
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the seconds that PyTorch's import takes: no traceback

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import common
import par
from common import UserError

# Of the triplet loss, in squared distance; the report gives none. Of 1, 10 and 40, 10 had the highest validation mAP
# after an epoch on Market-1501 (README). Stage 1 has set most training identities apart: a small margin leaves few
# triplets a loss, a large one goes on pushing what is apart already.
MARGIN = 10.0
MATCH, OTHER = common.COLOURS[:2]  # of frames and texts
VERDICTS = {"yes": MATCH, "unsure": common.GREY, "no": OTHER}


# ---------------------------------------------------------------------------------------------- clusters and triplets


def cluster_histograms(images, clusters, seed=0):
    """Group visually similar crops ([report] section 3.2.2): uint8 [N, 3, H, W] -> int64 [N] in 0..clusters-1.

    k-means, from a k-means++ start, over colour histograms of 8 x 8 x 8 bins. On their square roots, where the squared
    Euclidean distance is Hellinger's: on raw counts a few full bins (the background's) would decide alone.
    """
    if len(images) == 0:
        raise UserError("There are no crops to cluster.")
    histograms = []
    for part in images.split(64):  # 64 crops of 512 bins fill an int16
        red, green, blue = part.transpose(0, 1).flatten(2) >> 5
        row = torch.arange(len(part), dtype=torch.int16, device=part.device)[:, None]
        codes = row << 9 | red.short() << 6 | green << 3 | blue
        histograms.append(torch.bincount(codes.flatten(), minlength=512 * len(part)))
    histograms = torch.cat(histograms).view(-1, 512)
    points = (histograms / histograms.sum(1, keepdim=True)).sqrt()
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(min(clusters, len(points)), generator=generator, dtype=torch.float64).tolist()

    nearest = torch.full((len(points),), 4.0, device=points.device)  # squared distance to the nearest centre so far
    centres = points[:0]
    for draw in draws:  # k-means++ (Arthur and Vassilvitskii 2007): the next centre in proportion to that distance
        mass = nearest.cumsum(0)
        pick = torch.searchsorted(mass, (draw * mass[-1]).view(1)).clamp(max=len(points) - 1)
        centres = torch.cat([centres, points[pick]])
        nearest = torch.minimum(nearest, (2 - 2 * (points @ points[pick][0])).clamp(min=0))
    assigned = None
    for _ in range(50):  # Lloyd's iterations; points have length 1, so the nearest centre needs no |x|^2
        closest = (points @ centres.T - centres.square().sum(1) / 2).argmax(1)
        if assigned is not None and torch.equal(closest, assigned):
            break
        assigned = closest
        counts = torch.bincount(assigned, minlength=len(centres))[:, None]
        sums = torch.zeros_like(centres).index_add_(0, assigned, points)
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    return assigned


def sample_triplets(person_ids, clusters, generator=None):
    """One triplet for each image as anchor, shuffled: int64 [N] twice -> int64 [N, 3]: anchor, positive, negative.

    The positive is another image of the anchor's identity, the negative another identity's image from the anchor's
    cluster; from anywhere where that cluster holds a single identity. Images that are the only one of their identity
    have no positive: they serve as negatives only, and there are as many rows fewer.
    """
    ids, clusters, n = person_ids.cpu().unique(return_inverse=True)[1], clusters.cpu(), len(person_ids)
    draw = torch.rand(2, n, generator=generator, dtype=torch.float64)

    # Images of one identity stand together in `by_id`, from `first`: step on within that block to another image.
    by_id, size = ids.argsort(stable=True), ids.bincount()
    first, place = (size.cumsum(0) - size)[ids], by_id.argsort()
    others = size[ids] - 1
    if n == 0 or size.max() < 2 or len(size) < 2:
        raise UserError("No triplet can be formed: that takes two identities, one of them with two crops or more.")
    step = 1 + (draw[0] * others).long().clamp(max=(others - 1).clamp(min=0))
    positive = by_id[first + (place - first + step) % (others + 1)]

    # In `by_group`, sorted by cluster and then identity, what must not be drawn is again one block: jump over it.
    group = clusters * len(size) + ids
    by_group, group_size = group.argsort(stable=True), group.bincount()
    group_first = (group_size.cumsum(0) - group_size)[group]
    cluster_size = clusters.bincount()
    cluster_first = (cluster_size.cumsum(0) - cluster_size)[clusters]

    def outside(order, start, length, block_start, block_length):
        room = length - block_length
        at = start + (draw[1] * room).long().clamp(max=(room - 1).clamp(min=0))
        return order[(at + block_length * (at >= block_start)).clamp(max=n - 1)], room > 0

    near, exists = outside(by_group, cluster_first, cluster_size[clusters], group_first, group_size[group])
    far, _ = outside(by_id, torch.zeros_like(ids), torch.full_like(ids, n), first, size[ids])
    triplets = torch.stack([torch.arange(n), positive, torch.where(exists, near, far)], 1)[others > 0]
    return triplets[torch.randperm(len(triplets), generator=generator)]


# ------------------------------------------------------------------------------------------------- network and loss


class EmbeddingNet(nn.Module):
    """[report] figure 2: stage 1 without its heads, ReLU, a fully connected layer: crops [B, 3, H, W] -> [B, dim]."""

    def __init__(self, dim=120, state=None):
        super().__init__()
        self.backbone = common.Backbone(state)
        self.embed = nn.Sequential(nn.ReLU(), nn.Linear(512, dim))

    def forward(self, crops):
        features = self.backbone(crops)
        with torch.autocast(features.device.type, enabled=False):  # distances deserve more than bfloat16's three digits
            return self.embed(features.float())


def triplet_loss(anchor, positive, negative, margin):
    """Mean over triplets of [|a - p|^2 - |a - n|^2 + margin]_+ ([report] section 3.2.1): [B, D] each -> scalar."""
    nearer, farther = (anchor - positive).square().sum(1), (anchor - negative).square().sum(1)
    return F.relu(nearer - farther + margin).mean()


# -------------------------------------------------------------------------------------------------------- the ranking


@dataclass
class Crops:
    """What ranking needs of N crops."""

    features: torch.Tensor  # float32 [N, D]
    ids: torch.Tensor  # int64 [N]
    cameras: torch.Tensor  # int64 [N]
    attributes: torch.Tensor | None  # int64 [N, 12], as predicted by stage 1
    log_p: torch.Tensor | None = None  # float32 [N, 41], its log-probabilities of all classes


def rank_metrics(distances, query_ids, query_cameras, gallery_ids, gallery_cameras, keep=None, cross_camera=True):
    """Score rankings by distance: float [Q, G] -> dict of fractions, and "queries", how many were scored.

    Junk (gallery id -1) does not take part, nor, with cross_camera, crops of the query's identity from the query's
    camera, nor any pair whose distance is +inf (a query among its own gallery). What is left and has the query's id is
    a match; ties are broken by index. keep, bool [Q, G], marks what a selection returned: a match that was not
    returned has precision 0. Queries without a match are not scored; UserError if that is all of them, or for NaN.

    mAP: the mean over the matches of the precision at each; mAP_trapezoid: of the mean of the precisions at and just
    before each, as Market-1501's MATLAB code does; rank1, rank5, rank10: queries with a match that early; mINP
    (Ye et al. 2021): matches / rank of the last match. Of the returned lists: length, precision and recall.
    """
    rows, scores = chunk_rows(distances.shape[1]), new_scores(len(distances), distances.device)
    for i in range(0, len(distances), rows):
        scores[:, i:i + rows] = rank_queries(
            distances[i:i + rows], query_ids[i:i + rows], query_cameras[i:i + rows], gallery_ids, gallery_cameras,
            None if keep is None else keep[i:i + rows], cross_camera)
    return mean_metrics(scores)


METRICS = ("mAP", "mAP_trapezoid", "rank1", "rank5", "rank10", "mINP", "length", "precision", "recall", "matches")


def new_scores(queries, device):
    """Room for what `rank_queries` finds. In one place from the start: small tensors kept from each chunk would lie
    between the large ones that come and go, and memory would grow from chunk to chunk."""
    return torch.zeros(len(METRICS), queries, dtype=torch.float64, device=device)


def chunk_rows(columns):
    """How many queries to rank at once against `columns` gallery crops: about 100 MB of memory."""
    return max(1, 2**22 // max(1, columns))


def rank_queries(distances, query_ids, query_cameras, gallery_ids, gallery_cameras, keep, cross_camera):
    """`rank_metrics` for a few queries: float64 [metrics, Q] in the order of METRICS; one without matches is NaN."""
    distances = distances.detach() if distances.dtype in (torch.float32, torch.float64) else distances.detach().float()
    if distances.isnan().any():
        raise UserError("Distances are NaN: the network that made the embeddings diverged. Train with a lower --lr.")
    match = gallery_ids == query_ids[:, None]
    part = (gallery_ids != -1) & ~distances.isposinf()
    if cross_camera:
        part &= ~(match & (gallery_cameras == query_cameras[:, None]))
    match &= part
    total = match.sum(1)
    if keep is not None:
        part &= keep.bool()
        match &= part
    ranked = distances.masked_fill(~part, torch.inf)
    rows, columns = match.nonzero(as_tuple=True)
    found = match.sum(1)
    place = torch.arange(len(rows), device=rows.device) - (found.cumsum(0) - found)[rows]
    values = torch.full((len(total), max(1, int(found.max()))), torch.inf, dtype=ranked.dtype, device=rows.device)
    values[rows, place] = ranked[rows, columns]
    # Counting beats sorting: a histogram of the row, whose bins end at each match's distance and at the float just
    # below it, says how many crops are nearer than that match, and how many are no farther.
    below = torch.nextafter(values, torch.full_like(values, -torch.inf))
    ends = torch.cat([below, values], 1).sort(1)[0]
    bins = ends.shape[1] + 1
    cells = torch.searchsorted(ends, ranked, out_int32=True)
    cells += torch.arange(0, bins * len(ends), bins, dtype=torch.int32, device=rows.device)[:, None]
    counts = torch.bincount(cells.flatten(), minlength=bins * len(ends)).view(-1, bins).cumsum(1)
    before, up_to = (counts.gather(1, torch.searchsorted(ends, v)) for v in (below, values))
    before = before.masked_fill(values == -torch.inf, 0)  # there is no float below it
    tied = ((up_to - before)[rows, place] > 1).nonzero()[:, 0]
    index = torch.arange(ranked.shape[1], device=rows.device)
    for t in tied.split(chunk_rows(ranked.shape[1])):
        r, c = rows[t], columns[t]
        before[r, place[t]] += ((ranked[r] == ranked[r, c][:, None]) & (index < c[:, None])).sum(1)

    exists = torch.arange(values.shape[1], device=rows.device) < found[:, None]
    rank = torch.where(exists, before + 1, torch.iinfo(torch.int64).max).sort(1)[0].double()  # [C, M], nearest first
    hits = torch.arange(1, values.shape[1] + 1, device=rows.device).double()
    at = torch.where(exists, hits / rank, 0)
    just_before = torch.where(exists, torch.where(rank > 1, (hits - 1) / (rank - 1).clamp(min=1), 1), 0)
    last = rank.gather(1, (found - 1).clamp(min=0)[:, None])[:, 0]
    total, length = total.double(), part.sum(1).double()
    precise = at.sum(1), (at + just_before).sum(1) / 2
    early = [rank[:, 0] <= k for k in (1, 5, 10)]
    return torch.stack([*(v / total for v in precise), *early, torch.where(found == total, total / last, 0), length,
                        found / length.clamp(min=1), found / total, total])


def mean_metrics(scores):
    """Mean over the queries that have a match: [metrics, Q] -> dict of metrics, and "queries", how many these are."""
    scored = scores[:, scores[-1] > 0]
    if not scored.shape[1]:
        raise UserError("No query has a match in the gallery, so there is nothing to score.")
    return dict(zip(METRICS[:-1], scored.mean(1).tolist())) | {"queries": scored.shape[1]}


def distance_chunks(query, gallery):
    """Yield (slice of queries, Euclidean distances [C, G]) in bounded memory; a crop's distance to itself is +inf."""
    rows, squares = chunk_rows(len(gallery.ids)), gallery.features.square().sum(1)
    for i in range(0, len(query.ids), rows):
        part = query.features[i:i + rows]
        distances = torch.addmm(squares, part, gallery.features.T, alpha=-2).add_(part.square().sum(1, keepdim=True))
        distances.clamp_(min=0).sqrt_()  # torch.cdist would copy the gallery for each chunk
        if query is gallery:
            distances.diagonal(i).fill_(torch.inf)
        yield slice(i, i + rows), distances


def mean_distance(query, gallery):
    """Mean distance over all pairs of a query and a gallery crop, the threshold of [report] section 4.2.1."""
    total = sum(distances.masked_fill_(distances.isposinf(), 0).sum(dtype=torch.float64)
                for _, distances in distance_chunks(query, gallery))
    return (total / (len(query.ids) * len(gallery.ids) - (len(query.ids) if query is gallery else 0))).item()


def distance_histograms(query, gallery, top=None, bins=1000):
    """How distances lie: a dict of edges [bins + 1], and how many pairs are in each bin, [bins]: matches (of one
    identity, from two cameras) and others (of two identities). The last edge is `top`, or the largest distance."""
    if top is None:
        top = max(1e-6, *(d[d.isfinite()].max().item() for _, d in distance_chunks(query, gallery)))
    counts = torch.zeros(2, bins, dtype=torch.float64)
    for rows, distances in distance_chunks(query, gallery):
        same = gallery.ids == query.ids[rows, None]
        match = same & (gallery.cameras != query.cameras[rows, None])
        counts += torch.stack([torch.histc(distances[which].clamp(max=top), bins, 0, top).cpu()
                               for which in (match, ~same)])
    return {"edges": torch.linspace(0, top, bins + 1, dtype=torch.float64), "matches": counts[0], "others": counts[1]}


def prevalence(curve):
    """The share of matches among the pairs of `distance_histograms`."""
    return (curve["matches"].sum() / (curve["matches"].sum() + curve["others"].sum())).item()


def rates(curve, share=None):
    """Of calling pairs nearer than each of edges[1:] one person: (precision [bins], recall [bins]).

    share: of matches among the pairs to be judged, from which precision follows; by default the curve's own.
    """
    recall, wrong = (curve[which].cumsum(0) / curve[which].sum() for which in ("matches", "others"))
    share = prevalence(curve) if share is None else share
    return share * recall / (share * recall + (1 - share) * wrong).clamp(min=1e-300), recall


def same_person(curve, hold=None):
    """Which distance means "same person": the bin after whose end nothing is called so.

    That of the highest F1 or, to `hold` a precision, the farthest that reaches it.
    """
    precision, recall = rates(curve)
    if hold is None:
        return int((precision * recall / (precision + recall).clamp(min=1e-300)).argmax())
    pairs = (curve["matches"] + curve["others"]).cumsum(0)
    counted = pairs >= pairs[-1].clamp(max=100)  # fewer pairs promise nothing
    enough = (counted & (precision >= hold)).nonzero()
    if not len(enough):
        raise UserError(f"No distance has a precision of {hold:g} on validation; the highest is "
                        f"{precision[counted].max():.3f}: pass a lower --precision.")
    return int(enough[-1])


def score_selections(query, gallery, selections, cross_camera):
    """Metrics under several selections: dict of name -> as `rank_metrics`; arguments as of `score_queries`."""
    scores = score_queries(query, gallery, selections, cross_camera)
    return {name: mean_metrics(found) for name, found in scores.items()}


def score_queries(query, gallery, selections, cross_camera):
    """Rank under several selections, in one pass over the distances: dict of name -> as `rank_queries`.

    selections: dict of name -> function of distances [C, G] and of the number of predicted attributes that differ
    [C, G] (None without stage 1) to bool [C, G], what is returned; or to None, all.
    """
    scores, hot = {name: new_scores(len(query.ids), query.ids.device) for name in selections}, None
    if gallery.attributes is not None:
        hot = one_hot(query.attributes), one_hot(gallery.attributes)
    for rows, distances in distance_chunks(query, gallery):
        differ = hot and len(common.ATTRIBUTES) - hot[0][rows] @ hot[1].T
        for name, select in selections.items():
            scores[name][:, rows] = rank_queries(distances, query.ids[rows], query.cameras[rows], gallery.ids,
                                                 gallery.cameras, select(distances, differ), cross_camera)
    return scores


def one_hot(attributes):
    """Classes int64 [N, 12] -> float32 [N, 41]; a product of two such matrices counts the attributes that agree."""
    return torch.cat([F.one_hot(attributes[:, k], len(names)) for k, names in enumerate(common.ATTRIBUTES.values())],
                     1).float()


EVERY = {"none": lambda distances, differ: None}  # no selection: all are returned


def score_words(log_p, labels):
    """How well crops are found by their annotated attributes: as `rank_metrics`.

    log_p: float32 [N, 41], from stage 1; labels: int64 [N, 12], -1 for distractors, which only can be wrong. Each
    combination of the twelve classes that occurs is a query, as for --find; its matches are the crops annotated so.
    """
    known = labels[:, 0] >= 0
    asked, which = labels[known].unique(dim=0, return_inverse=True)
    ids = torch.zeros(len(labels), dtype=torch.int64)
    ids[known] = which + 1
    scores = one_hot(asked) @ log_p.cpu().T
    nowhere = torch.zeros(len(labels), dtype=torch.int64)
    return rank_metrics(-scores, torch.arange(len(asked)) + 1, nowhere[:len(asked)], ids, nowhere, cross_camera=False)


def tune_hamming(query, gallery):
    """The Hamming parameter, 0 to 12, with the highest mAP across cameras (12 returns all); ties go to the smallest."""
    tries = {k: lambda distances, differ, k=k: differ <= k for k in range(len(common.ATTRIBUTES) + 1)}
    scores = score_selections(query, gallery, tries, cross_camera=True)
    return max(scores, key=lambda k: scores[k]["mAP"])


# ----------------------------------------------------------------------------------------------- training and results


def embed(model, attribute_net, crops, ids, cameras, rows=None):
    """Embed crops[rows], and predict their attributes if there is a stage-1 network: -> Crops, on the CPU or CUDA."""
    features = common.infer(model, crops, rows)
    device = features.device if features.is_cuda else torch.device("cpu")  # ranking takes float64, which MPS has not
    features = features.to(device)
    chosen = slice(None) if rows is None else rows
    log_p = None if attribute_net is None else par.log_probabilities(attribute_net, crops, rows).to(device)
    attributes = None if attribute_net is None else par.classes(log_p)[0]
    return Crops(features, ids[chosen].to(device), cameras[chosen].to(device), attributes, log_p)


def train(args, initial, market, split, crops, state):
    """Train from a stage-1 checkpoint `initial`, or from a state dict; write checkpoint, record, curves, figure 3.

    -> metrics on validation: dict of protocol ("all cameras", the report's, and "across cameras") -> of selection.
    """
    chosen, held = split
    torch.manual_seed(args.seed)
    model = EmbeddingNet(args.dim, None if initial else state)
    attribute_net = None
    if initial:
        attribute_net = common.load_weights(par.AttributeNet(), initial["model"], args.init).to(args.device)
        model.backbone.load_state_dict(attribute_net.backbone.state_dict())
    model.to(args.device)
    pool, validation = chosen.nonzero()[:, 0], held.nonzero()[:, 0]
    sample_triplets(market.person_ids[pool], torch.zeros_like(pool))  # what cannot be trained or scored is told at once
    seen = torch.stack([market.person_ids, market.camera_ids], 1)[validation].unique(dim=0)[:, 0]  # once a camera
    if len(seen) == len(seen.unique()):
        raise UserError("No validation identity is seen by two cameras, so there is no match across cameras to score.")
    record = common.new_record(args) | {"transfer": bool(initial),
                                        "images": {"train": len(pool), "validation": len(validation)}}
    with common.timed(record["seconds"], "clustering"):
        clusters = torch.zeros(len(pool), dtype=torch.int64) if args.negatives == "random" else \
            cluster_histograms((crops if crops.is_cuda else market.images)[chosen], args.clusters, args.seed).cpu()

    def plan(generator):
        return pool[sample_triplets(market.person_ids[pool], clusters, generator)]

    def validate():
        here = embed(model, None, crops, market.person_ids, market.camera_ids, validation)
        across, report = (score_selections(here, here, EVERY, cross)["none"] for cross in (True, False))
        checkpoint["distances"] = distance_histograms(here, here)
        return {"mAP": across["mAP"], "rank1": across["rank1"], "mAP_all_cameras": report["mAP"]}

    checkpoint = {"kind": "reid", "args": record["arguments"], "versions": record["versions"],
                  "data": market.fingerprint,
                  "train_ids": market.person_ids[chosen].unique(), "validation_ids": market.person_ids[held].unique(),
                  "attributes": initial and initial["model"]}
    start = "stage 1" if initial else f"weights {args.weights}"
    print(f"\nFrom {start}: {len(pool)} anchors, negatives from "
          + ("anywhere" if args.negatives == "random" else f"{int(clusters.max()) + 1} clusters")
          + f"; {len(validation)} validation crops, each a query")
    best = common.fit(model, crops, plan, lambda features, rows: triplet_loss(*features.float().chunk(3), args.margin),
                      validate, args, checkpoint, record)

    with common.timed(record["seconds"], "scoring"):
        here = embed(model, attribute_net, crops, market.person_ids, market.camera_ids, validation)
        results, threshold, hamming = report(args, here, here, f"{args.out}, {len(validation)} validation crops")
        curve = distance_histograms(here, here)
    same = judge(same_person(curve), {"validation": (curve, None)})
    record["final"] = {"best epoch": best["epoch"], "threshold": threshold, "hamming": hamming, "validation": results,
                       "same person": same}
    common.write_record(args.out, record)
    common.curves(args.out.with_suffix(".png"), record, "Stage 2, with transfer" if initial else "Stage 2")
    figure_3(args.out.with_name(args.out.stem + "_distances.png"), curve,
             {f"threshold {threshold:.2f}": threshold, f"same person < {same['distance']:.2f}": same["distance"]})
    common.say_seconds(record["seconds"])
    return results


def report(args, query, gallery, title, hamming=None, protocols=("all cameras", "across cameras")):
    """Print a table of every selection for each protocol: -> (protocol -> selection -> metrics, threshold, parameter).

    [report] section 4.2.1 selects by distance, by how many of the 12 predicted attributes differ, or by both.
    The parameter is --hamming, else the given one, else tuned on these crops; None without predicted attributes.
    """
    threshold = mean_distance(query, gallery) if args.threshold == "mean" else args.threshold
    if gallery.attributes is None:
        hamming = None
    elif args.hamming is not None:
        hamming = args.hamming
    elif hamming is None:
        hamming = tune_hamming(query, gallery)
    results, chosen = {}, EVERY | {"threshold": lambda distances, differ: distances < threshold}
    if hamming is not None:
        chosen["hamming"] = lambda distances, differ: differ <= hamming
        chosen["both"] = lambda distances, differ: (differ <= hamming) & (distances < threshold)
    columns = {"mAP": "mAP", "mAP_trapezoid": "trapez.", "rank1": "rank-1", "rank5": "rank-5", "rank10": "rank-10",
             "mINP": "mINP", "precision": "precision", "recall": "recall"}
    for protocol in protocols:
        results[protocol] = scores = score_selections(query, gallery, chosen, protocol == "across cameras")
        rows = [[name] + [100 * m[k] for k in columns] + [f"{m['length']:.1f}"] for name, m in scores.items()]
        common.table(f"{title}, {protocol}: {scores['none']['queries']} queries (%)",
                     ["selection", *columns.values(), "length"], rows)
    print(f"threshold: distance < {threshold:.3f}" + (" (the mean of all pairs)" if args.threshold == "mean" else "")
          + (f"; hamming: at most {hamming} of 12 predicted attributes differ" if hamming is not None else
             "\nno Hamming filter: trained without --init, there is no stage 1 to predict attributes"))
    if "all cameras" in protocols:
        print("A match that is not returned counts as precision 0, so that a threshold can only lower mAP; what it\n"
              "buys is the precision of the returned lists, to the right with their recall and mean length.")
    return results, threshold, hamming


def judge(at, curves):
    """Print what to expect of calling pairs nearer than edges[at + 1] one person: -> dict of the first row, fractions.

    curves: dict of a name -> (curve, share of matches to expect, or None for the curve's own).
    """
    found = {}
    for name, (curve, share) in curves.items():
        precision, recall = (v[at].item() for v in rates(curve, share))
        found[name] = {"precision": precision, "recall": recall, "share of matches": share or prevalence(curve)}
    distance = curve["edges"][at + 1].item()
    common.table(f"Same person: distance < {distance:.3f} (%, matches across cameras)",
                 ["", "precision", "recall", "share of matches"],
                 [[name, *(100 * v for v in row.values())] for name, row in found.items()])
    return {"distance": distance, **next(iter(found.values()))}


def figure_3(path, curve, marks):
    """Draw [report] figure 3: how the distances of matches lie within those of all pairs; marks: legend -> distance."""
    edges = curve["edges"][::10]
    centres, width = ((edges[1:] + edges[:-1]) / 2).tolist(), (edges[1] - edges[0]).item()
    lines = {name: (centres, (counts.view(-1, 10).sum(1) / counts.sum() / width).tolist())
             for name, counts in (("all pairs", curve["matches"] + curve["others"]), ("matches", curve["matches"]))}
    common.charts(path, [{
        "title": "Figure 3: distances between validation crops, matches across cameras",
        "x": "Euclidean distance between embeddings", "y": "density", "lines": lines, "marks": marks}])


def load(args, checkpoint):
    """What the checkpoint of --eval holds: (embedding network, stage-1 network or None)."""
    model = common.load_weights(EmbeddingNet(checkpoint["args"]["dim"]), checkpoint["model"], args.eval).to(args.device)
    attributes = checkpoint["attributes"]
    return model, attributes and common.load_weights(par.AttributeNet(), attributes, args.eval).to(args.device)


def evaluate(args, checkpoint):
    """Score a checkpoint: validation under both protocols, the official test set under the standard one.

    The Hamming parameter is tuned on validation and then used on test.
    """
    model, attribute_net = load(args, checkpoint)
    curve = checkpoint["distances"]
    at = same_person(curve, args.precision)
    with common.timed(args.seconds, "loading"):
        market, *test = (common.load_market(args.data, part, args.size) for part in ("train", "query", "gallery"))
    held = common.saved_split(checkpoint, market.person_ids, args.eval)[1].nonzero()[:, 0]
    with common.timed(args.seconds, "embedding"):
        here = embed(model, attribute_net, market.images, market.person_ids, market.camera_ids, held)
        real = (test[1].person_ids != -1).nonzero()[:, 0]  # junk takes no part in anything, nor in the mean distance
        query, gallery = (embed(model, attribute_net, part.images, part.person_ids, part.camera_ids, rows)
                          for part, rows in zip(test, (None, real)))
    with common.timed(args.seconds, "ranking"):
        *_, hamming = report(args, here, here, f"{args.eval}, {len(held)} validation crops")
        report(args, query, gallery, f"{args.eval}, test set, {len(real)} gallery crops", hamming, ("across cameras",))
        found = distance_histograms(query, gallery, curve["edges"][-1].item())
    judge(at, {"validation": (curve, None), "promised for test": (curve, prevalence(found)), "test": (found, None)})
    labels = test[1].labels[real]
    if gallery.log_p is not None and (labels >= 0).any():
        words = score_words(gallery.log_p, labels)
        print(f"\nFound by words, all twelve, on test: {100 * words['mAP']:.2f} mAP, {100 * words['rank1']:.2f} rank-1 "
              f"over {words['queries']} combinations")
    if args.show:
        show(args.out.with_name("show.png"), query, gallery, test, real, args.show)
    common.say_seconds(args.seconds)


def show(path, query, gallery, test, real, count):
    """Draw `count` queries of the test set, spread from the highest AP to the lowest, and what is nearest to each."""
    scores = score_queries(query, gallery, EVERY, cross_camera=True)["none"]
    precision, matches = scores[METRICS.index("mAP")], scores[-1]
    order = precision.argsort(descending=True)
    order = order[matches[order] > 0]
    picked = order[torch.linspace(0, len(order) - 1, min(count, len(order))).round().long().to(order.device)]
    distances = torch.cdist(query.features[picked], gallery.features)
    match = gallery.ids == query.ids[picked, None]
    distances[match & (gallery.cameras == query.cameras[picked, None])] = torch.inf
    nearest, sheet = distances.topk(min(10, len(real)), largest=False), []
    for i, q in enumerate(picked.tolist()):
        row = [(test[0].images[q], [f"query, AP {100 * precision[q]:.1f}", Path(test[0].names[q]).stem], None)]
        for rank, (g, d) in enumerate(zip(nearest.indices[i].tolist(), nearest.values[i].tolist()), 1):
            verdict, colour = ("match", MATCH) if match[i, g] else ("other", OTHER)
            if d < torch.inf:
                name = Path(test[1].names[real[g]]).stem
                row.append((test[1].images[real[g]], [(f"{rank}: {d:.2f}, {verdict}", colour), name], colour))
        sheet.append(row)
    common.sheet(path, sheet)
    print(f"{path}: {len(sheet)} queries, from the highest AP to the lowest; blue: a match, orange: another person")


def export(args, checkpoint):
    """Write the test set's embeddings to --embed as NumPy arrays."""
    model, _ = load(args, checkpoint)
    common.check_output(args.embed, (".npz",))
    arrays = {}
    for name in ("query", "gallery"):
        with common.timed(args.seconds, "loading"):
            part = common.load_market(args.data, name, args.size)
        with common.timed(args.seconds, "embedding"):
            features = common.infer(model, part.images).cpu()
        values = features, part.person_ids, part.camera_ids, part.names
        arrays |= {f"{name}_{k}": np.asarray(v) for k, v in zip(("features", "ids", "cameras", "names"), values)}
    common.write_whole(args.embed, lambda file: np.savez(file, **arrays))
    print(f"{args.embed}: {len(arrays['query_ids'])} query and {len(arrays['gallery_ids'])} gallery embeddings of "
          f"{arrays['query_features'].shape[1]} dimensions")
    common.say_seconds(args.seconds)


def search(args, checkpoint):
    """List the crops in --gallery that are nearest to each --search image, and draw them as a sheet, search.png."""
    print(args.about)
    model, attribute_net = load(args, checkpoint)
    near, far, meaning = verdicts(args, checkpoint)
    with common.timed(args.seconds, "reading"):
        (asked, queries), (paths, crops) = (common.read_user_images([path], args.size)
                                            for path in (args.search, args.gallery))
    unknown = torch.zeros(max(len(queries), len(crops)), dtype=torch.int64)
    with common.timed(args.seconds, "embedding"):
        query, gallery = (embed(model, attribute_net, images, unknown, unknown) for images in (queries, crops))
    places, rows = {path.resolve(): g for g, path in enumerate(paths)}, []
    for i, found in enumerate(row for _, distances in distance_chunks(query, gallery) for row in distances):
        if (itself := places.get(asked[i].resolve())) is not None:
            found[itself] = torch.inf
        nearest = found.topk(min(args.top, len(crops)), largest=False)
        lines, cells = [], [(queries[i], ["query", asked[i].stem, *names(query, i)], None)]
        for rank, (g, d) in enumerate(zip(nearest.indices.tolist(), nearest.values.tolist()), 1):
            if d == torch.inf:
                continue
            verdict = "yes" if d < near else "unsure" if d < far else "no"
            differ = [theirs for ours, theirs in zip(names(query, i), names(gallery, g)) if ours != theirs]
            alike = f"{12 - len(differ)} of 12" if attribute_net else "-"
            lines.append([str(rank), f"{d:.3f}", verdict, alike, str(paths[g])])
            cells.append((crops[g], [(f"{rank}: {d:.2f}, {verdict}", colour := VERDICTS[verdict]), paths[g].stem,
                                     f"shares {alike}" * (alike != "-"), *((t, OTHER) for t in differ)], colour))
        common.table(f"Nearest to {asked[i]} of {len(crops)} images",
                     ["rank", "distance", "same person", "same attributes", "file"], lines)
        rows.append(cells[:11])
    print(f"\n{meaning}")
    path = args.out.with_name("search.png")
    common.sheet(path, rows[:20])
    print(f"{path}: the same as a picture (of 20 queries and 10 crops each, at most)")
    common.say_seconds(args.seconds)


def verdicts(args, checkpoint):
    """For --search: the distance up to which crops are one person, that from which they are not, a sentence on both."""
    curve = checkpoint["distances"]
    precision, recall = rates(curve)
    at = same_person(curve, args.precision)
    most = max(at, int((recall >= 0.95).int().argmax()))
    near, far = (curve["edges"][k + 1].item() for k in (at, most))
    return near, far, (
        f"Same person: yes below {near:.3f}, no from {far:.3f} on. On validation, where {100 * prevalence(curve):.2f} "
        f"% of all pairs match,\n{100 * precision[at]:.1f} % of the pairs below {near:.3f} did, and they were "
        f"{100 * recall[at]:.1f} % of all that match; {100 * recall[most]:.1f} % are below {far:.3f}.\n"
        "Pass --precision P to be stricter with yes.")


def names(crops, i):
    """The predicted classes of one of `Crops`, as "hat yes"; nothing without a stage-1 network."""
    return [] if crops.attributes is None else [f"{attribute} {classes[c]}" for (attribute, classes), c in zip(
        common.ATTRIBUTES.items(), crops.attributes[i].tolist())]


def find(args, checkpoint):
    """List the crops in --gallery by the probability of the classes that --find names, and draw them, find.png."""
    print(args.about)
    words, asked = [(attribute, name) for attribute, classes in common.ATTRIBUTES.items() for name in classes], {}
    for word in args.find:
        attribute, _, name = word.lower().partition("=")
        if attribute not in common.ATTRIBUTES:
            raise UserError(f"--find {word}: there is no attribute '{attribute}', only {', '.join(common.ATTRIBUTES)}.")
        if (attribute, name) not in words or attribute in asked:
            raise UserError(f"--find {word}: name one class of {attribute}: {', '.join(common.ATTRIBUTES[attribute])}.")
        asked[attribute] = name
    _, attribute_net = load(args, checkpoint)
    if attribute_net is None:
        raise UserError(f"{args.eval} was trained without --init, so that it predicts no attributes to find by.")
    with common.timed(args.seconds, "reading"):
        paths, crops = common.read_user_images([args.gallery], args.size)
    with common.timed(args.seconds, "predicting"):
        log_p = par.log_probabilities(attribute_net, crops)[:, [words.index(pair) for pair in asked.items()]]
    best = log_p.sum(1).topk(min(args.top, len(crops)))
    lines, cells = [], []
    for rank, (g, value) in enumerate(zip(best.indices.tolist(), best.values.exp().tolist()), 1):
        each = log_p[g].exp().tolist()
        lines.append([str(rank), f"{value:.3g}", f"{sum(p > 0.5 for p in each)} of {len(each)}", str(paths[g])])
        cells.append((crops[g], [f"{rank}: {value:.3g}", paths[g].stem, *(
            (f"{attribute} {name} {p:.2f}", common.INK if p > 0.5 else OTHER)
            for (attribute, name), p in zip(asked.items(), each))], None))
    common.table(f"{', '.join(f'{k} {v}' for k, v in asked.items())}, among {len(crops)} images",
                 ["rank", "probability", "probable", "file"], lines)
    path = args.out.with_name("find.png")
    common.sheet(path, [cells[i:i + 5] for i in range(0, min(50, len(cells)), 5)])
    print(f"{path}: the same as a picture (of 50 crops, at most)")
    common.say_seconds(args.seconds)


def main():
    parser = common.Parser(__doc__.split("[report]")[0])
    either = parser.add_argument_group("start from stage 1, or score").add_mutually_exclusive_group().add_argument
    either("--init", type=Path, metavar="FILE", help="train from this checkpoint of par.py, with its split and size")
    either("--eval", type=Path, metavar="FILE", help="score this checkpoint of reid.py instead of training")
    add = parser.add_argument_group("to train").add_argument
    add("--compare", action="store_true", help="train with and without --init: table 1")
    add("--margin", type=common.number(float, 0), default=MARGIN, metavar="M", help="of the loss, squared distance "
        f"({MARGIN:g})")
    add("--dim", type=common.number(int, 1, 4096), default=120, metavar="N", help="embedding dimensions (120)")
    add("--clusters", type=common.number(int, 1), default=100, metavar="N", help="of colour histograms (100)")
    add("--negatives", choices=("cluster", "random"), default="cluster", help="from the anchor's cluster, as in report "
        "section 3.2.2, or from anywhere (cluster)")
    add = parser.add_argument_group("to rank").add_argument
    add("--hamming", type=common.number(int, 0, 12), metavar="K", help="predicted attributes that may differ (default: "
        "what gives the highest validation mAP)")
    add("--threshold", type=threshold_value, default="mean", metavar="T", help="distance below which a crop is "
        "returned: mean, of all pairs (report section 4.2.1), or a number (mean)")
    group = parser.add_argument_group("with --eval")
    add, only = group.add_argument, group.add_mutually_exclusive_group().add_argument
    only("--embed", type=Path, metavar="FILE", help="write the test set's embeddings to this .npz file")
    only("--show", type=common.number(int, 1, 100), metavar="N", help="draw N queries of the test set, from the best "
         "found to the worst, with what was found, show.png")
    only("--search", type=Path, metavar="QUERY", help="find what is nearest to this image, or to each in this folder: "
         "search.png")
    only("--find", nargs="+", metavar="A=C", help="find by words, such as gender=female upcolor=red: find.png")
    add("--gallery", type=Path, metavar="FOLDER", help="the images to --search or --find in")
    add("--top", type=common.number(int, 1), default=10, metavar="K", help="list the first K (10)")
    add("--precision", type=common.number(float, 0, 1), metavar="P", help="call two crops the same person up to the "
        "farthest distance with this precision, 0 to 1, on validation (default: that of the highest F1)")
    common.shared_flags(parser, 10, 2e-5, "reid_best.pt")
    args = parser.parse_args()
    if args.compare and not args.init:
        raise UserError("--compare trains with and without transfer, so it needs --init FILE, a checkpoint of par.py.")
    for flag in ("embed", "show", "search", "find", "gallery", "precision"):
        if getattr(args, flag) is not None and not args.eval:
            raise UserError(f"--{flag} needs --eval FILE, the checkpoint to do it with.")
    if bool(args.search or args.find) != bool(args.gallery):
        raise UserError("--search QUERY, or --find, goes with --gallery FOLDER, the images to search.")
    if args.gallery and (args.threshold != "mean" or args.hamming is not None):
        raise UserError("--threshold and --hamming are for scoring; for --search, --precision says how strict to be.")
    if args.init and args.init.resolve() in (args.out.resolve(), common.last_path(args.out).resolve()):
        raise UserError(f"--out {args.out} would replace the checkpoint of --init: give it another name.")
    path, kind = (args.eval, "reid") if args.eval else (args.init, "par")
    checkpoint = path and common.load_checkpoint(path, kind)
    device = common.start(args, path, checkpoint, data=not args.gallery)
    if args.gallery or args.show or not args.eval:
        common.check_output(args.out)
    if args.gallery:
        return (search if args.search else find)(args, checkpoint)
    if args.eval:
        return export(args, checkpoint) if args.embed else evaluate(args, checkpoint)

    resumes = args.resume and not args.compare and common.last_path(args.out).exists()
    state = None if resumes or checkpoint and not args.compare else common.backbone_weights(args.weights)
    with common.timed(args.seconds, "loading"):
        market = par.load_train(args, labels=False)
        crops = common.place(market.images, device)
    split = common.saved_split(checkpoint, market.person_ids, path) if checkpoint else \
        common.split_identities(market.person_ids, seed=args.seed)
    results = train(args, checkpoint, market, split, crops, state)
    if args.compare:
        out = args.out.with_stem(args.out.stem + "_without")
        settings = argparse.Namespace(**vars(args) | {"init": None, "out": out})
        plain = train(settings, None, market, split, crops, state)
        common.table("Table 1: mAP (%)", ["protocol", "without transfer", "with transfer"],
                     [[protocol, 100 * plain[protocol]["none"]["mAP"], 100 * results[protocol]["none"]["mAP"]]
                      for protocol in results], best=max)


def threshold_value(text):
    """An argparse type: "mean" or a distance."""
    try:
        return text if text == "mean" else common.number(float, 0)(text)
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(f"{text} is neither mean nor a distance of at least 0") from None


if __name__ == "__main__":
    common.run(main)
