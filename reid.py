#!/usr/bin/env python3
"""Stage 2, person re-identification: a Siamese network, triplets from colour clusters.

    python reid.py --init par_best.pt                   train; the best epoch is reid_best.pt
    python reid.py                                      the same without transfer
    python reid.py --init par_best.pt --compare         both: table 1
    python reid.py --recipe strong                      what is known since the report
    python reid.py --eval reid_best.pt                  score, --rerank; --show N: as a picture
    python reid.py --eval reid_best.pt --embed F.npz    embeddings of the test set; with --gallery FOLDER, of your own
    python reid.py --eval reid_best.pt --search QUERY.jpg --gallery FOLDER|F.npz    who is it?
    python reid.py --eval reid_best.pt --find upcolor=red --gallery FOLDER|F.npz    who looks like that?

[report] is the one that common.py names; tables and figures have its numbers.
"""
import argparse
import copy
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.nn import functional as F

import common
import par
from common import ATTRIBUTES, SIZES, UserError

MATCH, OTHER = common.COLOURS[:2]  # of frames and texts
# What --without can leave out of the strong recipe; "neck" is the BNNeck, "mirror" at test.
RUNGS = ["identity", "triplets", "attributes", "neck", "stride", "erasing", "shift", "muon", "mirror"]


# ---------------------------------------------------------------------------------------------- clusters and triplets

def cluster_histograms(images, clusters, seed=0):
    """Group visually similar crops ([report] section 3.2.2): uint8 [N, 3, H, W] -> int64 [N] in 0..clusters-1.

    k-means, from a k-means++ start, over colour histograms of 8 x 8 x 8 bins. On their square roots, where the squared
    Euclidean distance is Hellinger's: on raw counts a few full bins (the background's) would decide alone."""
    if len(images) == 0:
        raise UserError("There are no crops to cluster.")
    histograms = []
    for part in images.split(64):  # 64 crops of 512 bins fill an int16
        red, green, blue = part.transpose(0, 1).flatten(2) >> 5
        row = torch.arange(len(part), dtype=torch.int16, device=part.device)[:, None]
        codes = row << 9 | red.short() << 6 | green << 3 | blue
        histograms.append(torch.bincount(codes.flatten(), minlength=512 * len(part)))
    points = F.normalize(torch.cat(histograms).view(-1, 512).float(), p=1).sqrt()
    draws = torch.rand(min(clusters, len(points)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    nearest = torch.full((len(points),), 4.0, device=points.device)  # squared distance to the nearest centre so far
    centres = points[:0]
    for draw in draws.tolist():  # k-means++ (Arthur and Vassilvitskii 2007): the next in proportion to that
        mass = nearest.cumsum(0)
        pick = torch.searchsorted(mass, (draw * mass[-1]).view(1)).clamp(max=len(points) - 1)
        centres = torch.cat([centres, points[pick]])
        nearest = torch.minimum(nearest, (2 - 2 * (points @ points[pick][0])).clamp(min=0))
    assigned = torch.full_like(nearest, -1).long()
    for _ in range(50):  # Lloyd's iterations; points have length 1, so the nearest centre needs no |x|^2
        before, assigned = assigned, (points @ centres.T - centres.square().sum(1) / 2).argmax(1)
        if torch.equal(assigned, before):
            break
        counts = torch.bincount(assigned, minlength=len(centres))[:, None]
        sums = torch.zeros_like(centres).index_add_(0, assigned, points)
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    return assigned


def sample_triplets(person_ids, clusters, generator=None):
    """One triplet for each image as anchor, shuffled: int64 [N] twice -> int64 [N, 3]: anchor, positive, negative.

    The positive is another image of the anchor's identity, the negative another identity's image from the anchor's
    cluster; from anywhere where that cluster holds a single identity. Images that are the only one of their identity
    have no positive: they serve as negatives only, and there are as many rows fewer."""
    ids, clusters, n = person_ids.cpu().unique(return_inverse=True)[1], clusters.cpu(), len(person_ids)
    draw = torch.rand(2, n, generator=generator, dtype=torch.float64)

    def blocks(keys):  # where, in the order that sorts them, each one's block of equal keys begins, and its length
        length = keys.bincount()
        return (length.cumsum(0) - length)[keys], length[keys]

    # Images of one identity stand together in `by_id`, from `first`: step on within that block to another image.
    by_id, (first, size) = ids.argsort(stable=True), blocks(ids)
    if n == 0 or size.max() < 2 or ids.max() == 0:
        raise UserError("No triplet can be formed: that takes two identities, one of them with two crops or more.")
    positive = by_id[first + (by_id.argsort() - first + 1 + (draw[0] * (size - 1)).long()) % size]

    def outside(clusters):  # sorted by cluster and then identity, what must not be drawn is again a block: jump over it
        group = clusters * (ids.max() + 1) + ids
        order, (own, own_size), (start, length) = group.argsort(stable=True), blocks(group), blocks(clusters)
        room = length - own_size
        at = start + (draw[1] * room).long()
        return order[(at + own_size * (at >= own)).clamp(max=n - 1)], room > 0

    (near, exists), (far, _) = outside(clusters), outside(torch.zeros_like(ids))
    triplets = torch.stack([torch.arange(n), positive, torch.where(exists, near, far)], 1)[size > 1]
    return triplets[torch.randperm(len(triplets), generator=generator)]


def sample_groups(person_ids, size=4, generator=None):
    """Groups of crops of one identity, for batches of P identities x K crops: int64 [N] -> int64 [n, size], shuffled.

    Each identity's crops are cut at random into as many groups as come nearest to each crop once, at least one; a group
    that lacks crops takes some again. The groups of an identity are spread over the whole order."""
    ids = person_ids.cpu().unique(return_inverse=True)[1]
    draw = torch.rand(2, len(ids), generator=generator, dtype=torch.float64)
    by_id, count = (ids + draw[0]).argsort(), ids.bincount()
    first, groups = count.cumsum(0) - count, ((count + size // 2) // size).clamp(min=1)
    owner = torch.arange(len(count)).repeat_interleave(groups)  # of each group
    which = torch.arange(len(owner)) - (groups.cumsum(0) - groups)[owner]  # of the owner's groups
    place = (which[:, None] * size + torch.arange(size)) % count[owner, None]
    order = ((which + draw[1, :len(owner)]) / groups[owner]).argsort()
    return by_id[first[owner, None] + place][order]


# ------------------------------------------------------------------------------------------------- network and loss

class EmbeddingNet(nn.Module):
    """[report] figure 2: stage 1 without its heads, ReLU, a fully connected layer: crops [B, 3, H, W] -> [B, dim].
    rungs: as of `common.Backbone`, for a stage 1 that was trained so."""

    def __init__(self, dim=120, state=None, rungs=()):
        super().__init__()
        self.backbone = common.Backbone(state, rungs)
        self.embed = nn.Sequential(nn.ReLU(), nn.Linear(self.backbone.width, dim))

    def forward(self, crops):
        _, features = self.backbone(crops)
        with torch.autocast(features.device.type, enabled=False):  # from here on in float32: bfloat16 has three digits
            return self.embed(features.float())


def triplet_loss(anchor, positive, negative, margin):
    """Mean over triplets of [|a - p|^2 - |a - n|^2 + margin]_+ ([report] section 3.2.1): [B, D] each -> scalar."""
    nearer, farther = (anchor - positive).square().sum(1), (anchor - negative).square().sum(1)
    return F.relu(nearer - farther + margin).mean()


def hard_triplet_loss(features, ids):
    """Mean over anchors of softplus(distance to the farthest crop of their identity - to the nearest of another), the
    batch-hard soft-margin loss of Hermans et al. (2017): features [B, D], ids [B] -> scalar."""
    squares = features.square().sum(1)
    distances = torch.addmm(squares, features, features.T, alpha=-2).add(squares[:, None]).clamp(min=1e-9).sqrt()
    same = ids[:, None] == ids
    farthest, nearest = distances.where(same, -torch.inf).amax(1), distances.where(~same, torch.inf).amin(1)
    return F.softplus(farthest - nearest).mean()


# -------------------------------------------------------------------------------------- the ranking, and how sure it is

@dataclass
class Crops:
    """What ranking needs of N crops."""

    features: torch.Tensor  # float32 [N, D]
    ids: torch.Tensor | None = None  # int64 [N]
    cameras: torch.Tensor | None = None  # int64 [N]
    log_p: torch.Tensor | None = None  # float32 [N, 41], log-probabilities of all classes, if predicted

    @property
    def attributes(self):
        """The most probable class of each attribute as a 1 in float32 [N, 41], so that a product counts those alike."""
        classes = [] if self.log_p is None else zip(par.most_probable(self.log_p)[0].T, SIZES)
        return torch.cat([F.one_hot(column, n) for column, n in classes], 1).float() if classes else None


EVERY = {"none": (torch.inf, len(ATTRIBUTES))}  # the selections of `score_selections` where all are returned
METRICS = ("mAP", "mAP_trapezoid", "rank1", "rank5", "rank10", "mINP", "precision", "recall", "length", "matches")


def rank_metrics(distances, query_ids, query_cameras, gallery_ids, gallery_cameras, keep=None, cross_camera=True):
    """Score rankings by distance: float [Q, G] -> dict of fractions, and "queries", how many were scored.

    Junk (gallery id -1) does not take part, nor, with cross_camera, crops of the query's identity from the query's
    camera, nor any pair whose distance is +inf (a query among its own gallery). What is left and has the query's id is
    a match; ties are broken by index. keep, bool [Q, G], marks what a selection returned: a match that was not
    returned has precision 0. Queries without a match are not scored; UserError if that is all of them, or for NaN.

    mAP: the mean over the matches of the precision at each; mAP_trapezoid: of the mean of the precisions at and just
    before each, as Market-1501's MATLAB code does; rank1, rank5, rank10: queries with a match that early; mINP
    (Ye et al. 2021): matches / rank of the last match. Of the returned lists: length, precision and recall."""
    scores = [rank_queries(distances[rows], query_ids[rows], query_cameras[rows], gallery_ids, gallery_cameras,
                           None if keep is None else keep[rows], cross_camera) for rows in chunk_rows(*distances.shape)]
    return mean_metrics(torch.cat(scores or [distances.new_empty(len(METRICS), 0)], 1))


def chunk_rows(queries, columns):
    """Which queries to rank at once against `columns` gallery crops: slices, each for about 50 MB of memory."""
    count = max(1, 2**22 // max(1, columns))
    return [slice(i, i + count) for i in range(0, queries, count)]


def rank_queries(distances, query_ids, query_cameras, gallery_ids, gallery_cameras, keep, cross_camera):
    """`rank_metrics` for a few queries: float64 [metrics, C] in the order of METRICS; one without matches is NaN."""
    distances = distances.detach().to(torch.promote_types(distances.dtype, torch.float32))
    ranked = torch.where(gallery_ids == -1, torch.inf, distances)
    rows, columns = (gallery_ids == query_ids[:, None]).nonzero(as_tuple=True)  # a pair of one identity each
    if cross_camera:
        own = gallery_cameras[columns] == query_cameras[rows]
        ranked[rows[own], columns[own]] = torch.inf
    valid = ~ranked[rows, columns].isposinf()
    rows, columns = rows[valid], columns[valid]
    matches = rows.bincount(minlength=len(ranked))
    if keep is not None:
        ranked.masked_fill_(~keep.bool(), torch.inf)
        returned = keep[rows, columns].bool()
        rows, columns = rows[returned], columns[returned]
    found = rows.bincount(minlength=len(ranked))
    slot = torch.arange(len(rows), device=rows.device) - (found.cumsum(0) - found)[rows]  # among its query's matches
    values = ranked.new_full((len(ranked), max(1, int(found.max()))), torch.inf)  # [C, M], their distances
    values[rows, slot] = ranked[rows, columns]
    ordered = ranked.clone() if ranked.is_cpu else ranked.sort(1)[0]  # a match's rank: where its distance stands in it
    if ranked.is_cpu:  # NumPy sorts values with vector instructions, many times as fast as indices can be sorted
        with ThreadPoolExecutor() as pool:
            list(pool.map(np.ndarray.sort, np.array_split(ordered.numpy(), torch.get_num_threads())))
    if ordered[:, -1:].isnan().any():  # where NaN is sorted to
        raise UserError("Distances are NaN: the network that made the embeddings diverged. Train with a lower --lr.")
    nearer = torch.searchsorted(ordered, values)
    tied = (torch.searchsorted(ordered, values, right=True) - nearer)[rows, slot] > 1
    index = torch.arange(ranked.shape[1], device=rows.device)
    rows, slot, columns = rows[tied], slot[tied], columns[tied]
    for part in chunk_rows(len(rows), ranked.shape[1]):
        r, c = rows[part], columns[part]
        nearer[r, slot[part]] += ((ranked[r] == ranked[r, c][:, None]) & (index < c[:, None])).sum(1)
    hits = torch.arange(1, values.shape[1] + 1, device=rows.device).double()
    rank = (nearer + 1).double().where(hits <= found[:, None], torch.inf).sort(1)[0]  # [C, M], nearest first
    at, just_before = hits / rank, ((hits - 1) / (rank - 1)).nan_to_num(1)  # 0 / 0 is before the first of all
    last = rank.gather(1, (found - 1).clamp(min=0)[:, None])[:, 0]
    length = torch.searchsorted(ordered, ordered.new_full((len(ordered), 1), torch.inf))[:, 0].double()
    matches, early = matches.double(), [rank[:, 0] <= k for k in (1, 5, 10)]
    return torch.stack([at.sum(1) / matches, (at + just_before).sum(1) / 2 / matches, *early,
                        torch.where(found == matches, matches / last, 0), found / length.clamp(min=1),
                        found / matches, length, matches])


def mean_metrics(scores):
    """Mean over the queries that have a match: [metrics, Q] -> dict of metrics, and "queries", how many these are."""
    scored = scores[:, scores[-1] > 0]
    if not scored.shape[1]:
        raise UserError("No query has a match in the gallery, so there is nothing to score.")
    return dict(zip(METRICS[:-1], scored.mean(1).tolist())) | {"queries": scored.shape[1]}


def distance_chunks(query, gallery=None):
    """Yield (slice of queries, Euclidean distances [C, G]) in bounded memory. Here and below, gallery None stands for
    each query against all the others; its distance to itself is +inf."""
    others, gallery = gallery is None, gallery or query
    squares = torch.cat([part.square().sum(1) for part in gallery.features.split(2**16)])  # of a million, at once: 2 GB
    for rows in chunk_rows(len(query.features), len(squares)):
        part = query.features[rows]
        distances = torch.addmm(squares, part, gallery.features.T, alpha=-2).add_(part.square().sum(1, keepdim=True))
        distances.clamp_(min=0).sqrt_()  # torch.cdist would copy the gallery for each chunk
        if others:
            distances.diagonal(rows.start).fill_(torch.inf)
        yield rows, distances


def rerank_chunks(query_features, gallery_features=None, k1=20, k2=6, lambda_value=0.3):
    """k-reciprocal re-ranking (Zhong et al. 2017): float32 [Q, D], [G, D] -> yields (slice of queries, [C, G]).

    A crop's set: those of its k1 nearest that have it among theirs, and the like sets, of half the size, of those of
    which more than two thirds are in it; each with a weight that falls with the squared distance. The sets of the k2
    nearest are averaged. What comes out is the Jaccard distance of two sets and, in the part lambda_value, the squared
    distance over the largest one. As the authors' code, but never with a matrix of all pairs: sets are sparse."""
    query = Crops(query_features)
    every = query if gallery_features is None else Crops(torch.cat([query_features, gallery_features]))
    features, n, half, k1 = every.features, len(every.features), round(k1 / 2) + 1, k1 + 1
    numbers, sets = torch.arange(n, device=features.device), []
    near, largest = numbers.new_zeros(n, min(max(k1, k2), n)), torch.zeros_like(features[:, 0])
    for rows, distances in distance_chunks(every, every):
        near[rows] = distances.topk(near.shape[1], largest=False).indices
        largest[rows] = distances.amax(1).square().clamp(min=1e-30)
    whole, halves = (torch.cat([(near[near[i, :k], :k] == i[:, None, None]).any(2) for i in numbers.split(512)])
                     for k in (k1, half))  # [N, k]: which of a crop's k nearest have it among their own
    for i in numbers.split(512):
        own, theirs = torch.where(whole[i], near[i, :k1], n), near[near[i, :k1], :half]  # [C, k1], [C, k1, half]
        theirs = torch.where(halves[near[i, :k1]] & whole[i][:, :, None], theirs, n)  # n: no crop
        member = torch.zeros(len(i), n + 1, dtype=torch.bool, device=i.device).scatter_(1, own, True)
        shared = member.gather(1, theirs.flatten(1)).view_as(theirs) & (theirs < n)
        theirs[shared.sum(2) <= 2 / 3 * (theirs < n).sum(2)] = n
        sets.append(member.scatter_(1, theirs.flatten(1), True)[:, :n].to_sparse())
    pairs = torch.cat(sets).coalesce().indices()  # crops and the members of their sets
    fall = torch.cat([(features[a] - features[b]).square().sum(1) / -largest[a] for a, b in pairs.split(2**14, 1)])
    sets = torch.sparse_coo_tensor(pairs, fall, (n, n), is_coalesced=True, check_invariants=False)
    sets = torch.sparse.softmax(sets, 1)  # [N, N]: the weights of the members of each crop's set, 1 together
    sets = torch.stack([sets.index_select(0, kth) for kth in near[:, :k2].T])
    sets = (torch.sparse.sum(sets, 0) / min(k2, n)).coalesce()
    by_member = sets.t().coalesce()
    for rows, distances in distance_chunks(query, None if every is query else every):
        i = numbers[:len(query_features)][rows]
        own, shared = sets.index_select(0, i).coalesce(), torch.zeros_like(distances)
        for (row, b), weight in zip(own.indices().split(2**14, 1), own.values().split(2**14)):
            found = by_member.index_select(0, b).coalesce()
            which, a = found.indices()
            shared.view(-1).index_add_(0, row[which] * n + a, weight[which].minimum(found.values()))
        mixed = (1 - shared / (2 - shared)).lerp_(distances.square() / largest[i, None], lambda_value)
        mixed.masked_fill_(distances.isposinf(), torch.inf)
        yield rows, mixed[:, 0 if every is query else len(query_features):]


def score_selections(query, gallery, selections, cross_camera, chunks=None, summary=mean_metrics):
    """Rank under several selections, in one pass over the distances: dict of name -> `summary` of [metrics, Q].
    selections: dict of name -> the distance below which a crop is returned, and how many of its predicted attributes
    may differ from the query's. chunks: of other distances, as `distance_chunks` yields them."""
    shown = gallery or query
    # Room in one place, as small tensors between the chunks' large ones would make memory grow from chunk to chunk.
    scores = {k: query.features.new_zeros(len(METRICS), len(query.ids), dtype=torch.float64) for k in selections}
    ours, theirs = query.attributes, shown.attributes
    for rows, distances in chunks or distance_chunks(query, gallery):
        alike = None if ours is None else ours[rows] @ theirs.T  # [C, G], of the attributes
        for name, (below, most) in selections.items():
            keep = None if below == torch.inf else distances < below
            if most < len(ATTRIBUTES):
                keep = (alike >= len(ATTRIBUTES) - most) & (True if keep is None else keep)
            scores[name][:, rows] = rank_queries(distances, query.ids[rows], query.cameras[rows], shown.ids,
                                                 shown.cameras, keep, cross_camera)
    return {name: summary(found) for name, found in scores.items()}


def distance_histograms(query, gallery=None, bins=1000):
    """How distances lie: a dict of edges [bins + 1]; how many pairs are in each bin, [bins]: of two cameras, matches
    (of one identity) and others (of two identities); and the mean of all, the threshold of [report] section 4.2.1."""
    top = max(1e-6, *(d[d.isfinite()].max().item() for _, d in distance_chunks(query, gallery)))
    counts, shown, total = torch.zeros(2, bins, dtype=torch.float64), gallery or query, 0
    for rows, distances in distance_chunks(query, gallery):
        same = shown.ids == query.ids[rows, None]
        across = shown.cameras != query.cameras[rows, None]
        counts += torch.stack([torch.histc(distances[which & across], bins, 0, top).cpu() for which in (same, ~same)])
        total += distances.masked_fill_(distances.isposinf(), 0).sum(dtype=torch.float64).item()
    return {"edges": torch.linspace(0, top, bins + 1, dtype=torch.float64), "matches": counts[0], "others": counts[1],
            "mean": total / (len(query.ids) * (len(shown.ids) - (gallery is None)))}


def same_person(curve, prior=None):
    """P(same person) of distances: -> (function of float arrays, up to where it is 50 % or more, the share of matches
    among all pairs that it holds for: the curve's own, or `prior`, which shifts the log-odds).

    curve: as from `distance_histograms`. The odds of its bins must fall with the distance: bins where they do not are
    joined (pool adjacent violators, Ayer et al. 1955), and the log-odds interpolated between the means of those. A pair
    of each kind more, where it is least expected, keeps all finite."""
    counts, edges, joined = np.stack([curve["matches"], curve["others"]]), curve["edges"].numpy(), []
    odds = np.divide(*counts.sum(1).clip(min=1))
    counts[[1, 0], [0, -1]] += 1
    for block in np.stack([*counts, counts.sum(0) * (edges[1:] + edges[:-1]) / 2], 1):
        joined.append(block)
        while len(joined) > 1 and joined[-2][0] * joined[-1][1] <= joined[-1][0] * joined[-2][1]:
            joined[-2:] = [joined[-2] + joined[-1]]
    matches, others, total = np.transpose(joined)
    share = odds / (1 + odds) if prior is None else prior
    log_odds = np.log(matches / others * share / (1 - share) / odds)
    falling = np.interp(edges, total / (matches + others), log_odds)
    return (lambda distances: 1 / (1 + np.exp(-np.interp(distances, edges, falling))),
            float(np.interp(0, falling[::-1], edges[::-1])), float(share))


def show_calibration(title, curve, found, prior):
    """Print, in ten steps of the probability that `curve` promises, how many of the pairs in `found` match."""
    promised, _, share = same_person(curve, prior)
    p = torch.from_numpy(promised((found["edges"][1:] + found["edges"][:-1]) / 2))
    step, pairs = (10 * p).long().clamp(max=9), found["matches"] + found["others"]
    sums = torch.stack([torch.bincount(step, n, 10) for n in (pairs, pairs * p, found["matches"])])
    names, sums = [*(f"{10 * k} to {10 * k + 10}" for k in range(10)), "all"], torch.cat([sums, sums.sum(1, True)], 1)
    common.table(f"Probability of the same person: {title}, across cameras (%)", ["promised", "pairs", "mean", "match"],
                 [[name, f"{n:.0f}", 100 * mean / n, 100 * m / n] for name, (n, mean, m) in zip(names, sums.T)])
    print(f"Promised for pairs of which {100 * share:.3g} % match, as "
          + ("--prior says." if prior else "on validation; --prior P is for another share."))


# ----------------------------------------------------------------------------------------------- training and results

def embed(networks, market, rows=slice(None)):
    """Embed crops of a `Market` with the first network and predict their attributes with the second, if any: Crops."""
    (model, predictor), images = networks, market.images[rows]
    output = common.infer(model, images)
    features = output[:, sum(SIZES):] if isinstance(model, par.AttributeNet) else output
    log_p = predictor and par.log_probabilities(output if predictor is model else common.infer(predictor, images))
    values = features, market.person_ids[rows], market.camera_ids[rows], log_p
    device = features.device if features.is_cuda else "cpu"  # ranking takes float64, which MPS has not
    return Crops(*(v if v is None else v.to(device) for v in values))


def report_recipe(args, market, rows, state):
    """What [report] section 3.2 trains, with triplets from colour clusters: -> (network, plan, criterion) for `fit`."""
    ids, clusters = market.person_ids[rows], torch.zeros_like(rows)
    sample_triplets(ids, clusters, torch.Generator())  # that none can be formed is told at once
    if args.negatives == "cluster":
        clusters = cluster_histograms(market.images[rows], args.clusters, args.seed)
    return (EmbeddingNet(args.dim, state, args.rungs), lambda random: rows[sample_triplets(ids, clusters, random)],
            lambda embeddings, _: triplet_loss(*embeddings, args.margin))


def strong_recipe(args, market, rows, state):
    """Beyond the report: identities (smoothing their labels cost mAP), hard triplets and attributes (by weighted cross-
    entropy) learned jointly, from groups of four crops of one identity: -> (network, plan, criterion) for `fit`."""
    ids, labels = market.person_ids[rows], market.labels.to(args.device)
    identities = torch.searchsorted(ids.unique(), market.person_ids).to(args.device)  # 0, 1, ... of those to train on
    weights, count = [w.to(args.device) for w in par.class_weights(market.labels[rows])], len(ids.unique())
    if count < 2 or not {"identity", "triplets", "attributes"} & set(args.rungs):
        raise UserError("Nothing to learn: give two identities or more; leave in identity, triplets or attributes.")
    model = par.AttributeNet(state=state, head=args.head, identities=count, rungs=args.rungs)

    def criterion(outputs, rows):
        logits, features, scores = outputs.flatten(0, 1).split([sum(SIZES), model.backbone.width, count], 1)
        who = identities[rows := rows.flatten()]
        losses = {"identity": lambda: F.cross_entropy(scores, who),
                  "triplets": lambda: hard_triplet_loss(features, who),
                  "attributes": lambda: par.attribute_loss(
                      logits.split(SIZES, 1), labels[rows], "wce", weights) / len(SIZES)}
        return sum(loss() for name, loss in losses.items() if name in args.rungs)

    return model, lambda generator: rows[sample_groups(ids, generator=generator)], criterion


def train(args, record, stage_1, market, split):
    """Train from a checkpoint of stage 1, or else from --weights; write checkpoint, record and figure 3: -> metrics on
    validation, dict of protocol ("all cameras", the report's, and "across cameras") -> of selection."""
    rows, validation = (which.nonzero()[:, 0] for which in split)
    record, recipe = copy.deepcopy(record), strong_recipe if args.recipe == "strong" else report_recipe
    state = None if stage_1 else common.backbone_weights(args)
    torch.manual_seed(args.seed)
    with common.timed(record["seconds"], "preparing"):
        model, plan, criterion = recipe(args, market, rows, state)
    seen = torch.stack([market.person_ids, market.camera_ids], 1)[validation].unique(dim=0)[:, 0]  # once a camera
    if len(validation) and len(seen) == len(seen.unique()):
        raise UserError("No validation identity is seen by two cameras, so there is no match across cameras to score.")
    if stage_1:
        own, given = model.state_dict(), stage_1["model"]
        model.load_state_dict({k: given[k] if k in given and given[k].shape == v.shape else v for k, v in own.items()})
    model.to(args.device)
    sides = {f"{name}_ids": market.person_ids[which].unique() for name, which in zip(("train", "validation"), split)}
    checkpoint = {"kind": "reid", "record": record, "stage 1": None if "attributes" in args.rungs else stage_1, **sides}

    def validate():
        embedded = embed((model, None), market, validation)
        across, everywhere = (score_selections(embedded, None, EVERY, cross)["none"] for cross in (True, False))
        checkpoint["distances"] = distance_histograms(embedded)
        return {"mAP": across["mAP"], "rank1": across["rank1"], "mAP_all_cameras": everywhere["mAP"]}

    print(f"\nFrom {'stage 1' if stage_1 else f'weights {args.weights}'}: {len(rows)} training and {len(validation)} "
          "validation crops" + ", so that the last epoch is kept, whatever --patience" * (not len(validation)))
    record = common.fit(model, market.images, plan, criterion, validate if len(validation) else dict, args, checkpoint)
    record["final"] = {"best epoch": record["best epoch"]}
    if len(validation):
        with common.timed(record["seconds"], "scoring"):
            embedded = embed(load(args, checkpoint | {"model": model.state_dict()}), market, validation)
            results, threshold, hamming, curve = score_and_show(args, embedded, None, args.hamming)
            _, half, share = same_person(curve, args.prior)
            draw_distances(args.out.with_suffix(".png"), curve, args.prior)
        record["final"] |= {"validation": results, "threshold": threshold, "hamming": hamming,
                            "same person": {"distance": half, "share of matches": share}}
        print(f"same person: 50 % or more up to {half:.3f} (0: at none), if {100 * share:.3g} % of all pairs match")
    common.write_record(args.out, record)
    common.say_seconds(record["seconds"])
    return record["final"].get("validation")


def score_and_show(args, query, gallery, hamming):
    """Print a table of every selection: -> (protocol -> selection -> metrics, threshold, Hamming parameter, and as
    `distance_histograms`). [report] section 4.2.1 selects by distance, by how many of the 12 predicted attributes
    differ, or by both. Its protocol, all cameras, is scored only where each query ranks all others, gallery None. A
    Hamming parameter of None is tuned on these crops, if attributes are predicted. With --rerank, a row for that."""
    curve, results = distance_histograms(query, gallery), {}
    threshold = curve["mean"] if args.threshold == "mean" else args.threshold
    chosen = EVERY | {"threshold": (threshold, len(ATTRIBUTES))}
    if query.log_p is not None:
        tries = {k: (torch.inf, k) for k in range(len(ATTRIBUTES) + 1)}
        scores = score_selections(query, gallery, tries, cross_camera=True) if hamming is None else {}
        hamming = max(scores, key=lambda k: scores[k]["mAP"], default=hamming)  # ties go to the smallest
        chosen |= {"hamming": (torch.inf, hamming), "both": (threshold, hamming)}
    crops = f"test set, {len(gallery.ids)} gallery" if gallery else f"{len(query.ids)} validation"
    for protocol in ("across cameras",) if gallery else ("all cameras", "across cameras"):
        cross = protocol == "across cameras"
        results[protocol] = scores = score_selections(query, gallery, chosen, cross)
        if args.rerank:
            chunks = rerank_chunks(query.features, gallery and gallery.features)
            scores["re-ranked"] = score_selections(query, gallery, EVERY, cross, chunks)["none"]
        common.table(f"{args.eval or args.out}, {crops} crops, {protocol}: {scores['none']['queries']} queries (%)",
                     ["selection", *METRICS[:-1]],
                     [[name, *(100 * m[k] for k in METRICS[:-2]), m["length"]] for name, m in scores.items()])
    print(f"threshold: distance < {threshold:.3f}" + " (the mean of all pairs)" * (args.threshold == "mean")
          + (f"; hamming: at most {hamming} of {len(ATTRIBUTES)} predicted attributes differ" if "both" in chosen else
             "; no Hamming filter: it predicts no attributes"))
    return results, threshold, hamming, curve


def draw_distances(path, curve, prior):
    """[report] figure 3: how the distances of matches lie within those of all pairs, in % of each; and what probability
    of the same person follows from that, from 0 to 100 % over the height."""
    (p, half, _), x, font = same_person(curve, prior), curve["edges"][5::10], ImageFont.load_default(40)
    counts = {"all pairs": curve["matches"] + curve["others"], "matches": curve["matches"]}
    lines = {name: 100 * n.view(-1, 10).sum(1) / n.sum() for name, n in counts.items()}
    end, high = curve["edges"][-1].item(), max(line.max().item() for line in lines.values())
    lines[f"same person (50 % at {half:.2f})"] = high * torch.from_numpy(p(x))
    picture, legend = Image.new("RGB", (2240, 1240), "white"), 2200
    pen = ImageDraw.Draw(picture)
    pen.text((40, 60), "Figure 3: validation pairs by distance", common.INK, font, "lm")
    for k in (0, 0.25, 0.5, 0.75, 1):
        pen.text((140 + 1940 * k, 1140), f"\n{k * end:.3g}", common.INK, font, "ma")
        pen.text((140, 1140 - 990 * k), f"{k * high:.1f} % ", common.INK, font, "rm")
        pen.text((2080, 1140 - 990 * k), f" {100 * k:.0f} %", common.COLOURS[2], font, "lm")
    for (name, line), colour in zip(lines.items(), common.COLOURS):
        points = torch.stack([140 + 1940 * x / end, 1140 - 990 * line / high], 1)
        pen.line([*map(tuple, points.tolist())], colour, 8, joint="curve")
        pen.text((legend, 60), name, colour, font, "rm")
        legend -= pen.textlength(name, font) + 60
    common.write_picture(path, picture.reduce(2))


def load(args, checkpoint):
    """The networks of a checkpoint: (the one that embeds, the one that predicts attributes, or None)."""
    own, stage_1 = checkpoint["record"]["arguments"], checkpoint["stage 1"]
    model = par.load(args, checkpoint, own["recipe"] == "report" and EmbeddingNet(own["dim"], rungs=own["rungs"]))
    return model, model if "attributes" in own["rungs"] else stage_1 and par.load(args, stage_1)


def evaluate(args, networks, checkpoint, seconds):
    """Score a checkpoint on validation, by both protocols, and the official test set (Hamming tuned on validation)."""
    with common.timed(seconds, "loading"):
        train, *test = (common.load_market(args.data, part, args.size, annotated=False) for part in common.PARTS)
    rows = par.saved_split(checkpoint, train.person_ids, args.eval)[1].nonzero()[:, 0]
    real = (test[1].person_ids != -1).nonzero()[:, 0]  # junk takes no part in anything, nor in the mean distance
    if not len(real):
        raise UserError(f"{args.data / common.PARTS['gallery']} holds nothing but junk to rank.")
    with common.timed(seconds, "embedding"):
        query, gallery = embed(networks, test[0]), embed(networks, test[1], real)
        validation = embed(networks, train, rows) if len(rows) else None
    with common.timed(seconds, "ranking"):
        hamming = len(ATTRIBUTES) if args.hamming is None else args.hamming  # of 12: nothing is rejected
        if validation:
            *_, hamming, curve = score_and_show(args, validation, None, args.hamming)
        *_, found = score_and_show(args, query, gallery, hamming)
    print("A match not returned counts as precision 0, so a threshold can only lower mAP; precision is of the lists.")
    if validation:
        show_calibration("test set", curve, found, args.prior)
    if args.show:
        show(args.out.with_name("show.png"), query, gallery, test, real, args.show)


def show(path, query, gallery, test, real, count):
    """Draw `count` queries of the test set, spread from the highest AP to the lowest, and what is nearest to each."""
    precision, *_, matches = score_selections(query, gallery, EVERY, cross_camera=True, summary=list)["none"]
    picked = precision.nan_to_num(-1).argsort(descending=True)[:(matches > 0).sum()]
    picked = picked[torch.linspace(0, len(picked) - 1, min(count, len(picked))).round().long().to(picked.device)]
    distances = torch.cdist(query.features[picked], gallery.features)
    match = gallery.ids == query.ids[picked, None]
    distances[match & (gallery.cameras == query.cameras[picked, None])] = torch.inf
    nearest, rows = distances.topk(min(10, len(real)), largest=False), []
    for q, right, near, found in zip(picked.tolist(), match, nearest.values.tolist(), nearest.indices.tolist()):
        rows.append([(test[0].images[q], [f"query, AP {100 * precision[q]:.1f}", Path(test[0].names[q]).stem], None)])
        for rank, (d, g) in enumerate(zip(near, found), 1):
            verdict, colour = ("match", MATCH) if right[g] else ("other", OTHER)
            caption = [(f"{rank}: {d:.2f}, {verdict}", colour), Path(test[1].names[real[g]]).stem]
            if d < torch.inf:
                rows[-1].append((test[1].images[real[g]], caption, colour))
    common.sheet(path, rows)


def export(args, networks, checkpoint, seconds):
    """Write the test set's embeddings to --embed as NumPy arrays."""
    arrays, keys = {}, ("features", "ids", "cameras", "names")
    if args.embed.exists() and b"checkpoint.npy" in np.fromfile(args.embed, np.uint8, 99).tobytes():
        raise UserError(f"{args.embed} is an index of a --gallery: name that folder too, or give another file.")
    for name in ("query", "gallery"):
        with common.timed(seconds, "loading and embedding"):
            part = common.load_market(args.data, name, args.size, annotated=False)
            values = embed((networks[0], None), part).features.cpu(), part.person_ids, part.camera_ids, part.names
        arrays |= {f"{name}_{key}": np.asarray(value) for key, value in zip(keys, values)}
    common.write_whole(args.embed, lambda file: np.savez(file, **arrays))
    print(f"{args.embed}: {len(arrays['query_ids'])} query and {len(arrays['gallery_ids'])} gallery embeddings")


# ------------------------------------------------------------------------------------------------- the user's images

BLOCK, SAVED = 2048, 8  # crops read and embedded at once, and after how many such blocks an index is saved
INDEX = ("names", "sizes", "times", "features", "log_p")  # its arrays, a row per crop: sizes in bytes, times in ns


def embed_files(args, networks, checkpoint, seconds, path=None):
    """Embed an image, or all in a folder (--gallery), in blocks, in bounded memory: -> dict of the INDEX arrays.

    log_p is [N, 0] where no attributes are predicted. With --embed all is saved there, an index: names relative to its
    folder, unless on another drive, so that both can be moved; rows of one name, size and time are not made anew."""
    facts, known, home = {}, {}, args.embed and args.embed.parent.resolve()
    for file in (f for f in common.user_files([path or args.gallery]) if f.suffix != ".npz"):  # other indices
        own, stat = file.parent.resolve() / file.name if home else file, file.stat()
        name = Path(os.path.relpath(own, home)).as_posix() if home and own.drive == home.drive else str(own)
        facts[file] = name, stat.st_size, stat.st_mtime_ns
    if args.embed and args.embed.exists():
        known = {row[:3]: row[3:] for row in zip(*load_index(args.embed, checkpoint, seconds).values())}
        if facts and {name for name, *_ in facts.values()}.isdisjoint(name for name, *_ in known):
            raise UserError(f"{args.embed} names none of the files in {args.gallery}: give another name.")
    new = [file for file, fact in facts.items() if fact not in known]
    for done in range(0, max(1, len(new)), BLOCK):
        with common.timed(seconds, "reading"):
            images, read = common.read_crops(new[done:done + BLOCK], args.size, skip=True)
        with common.timed(seconds, "embedding"):
            if read:
                crops = embed(networks, common.Market(images, *[torch.zeros(len(read))] * 3, read))
                log_p = crops.features[:, :0] if crops.log_p is None else crops.log_p
                known.update(zip(map(facts.get, read), zip(crops.features.cpu().numpy(), log_p.cpu().numpy())))
        left = (seconds["reading"] + seconds["embedding"]) * (len(new) / (done + BLOCK) - 1)
        common.progress(f"embedded {done + BLOCK} of {len(new)}, {left / 60:.1f} minutes left" * (left > 0))
        if done + BLOCK < len(new) and not (args.embed and read and done // BLOCK % SAVED == SAVED - 1):
            continue
        if not (rows := [(*fact, *known[fact]) for fact in facts.values() if fact in known]):
            raise UserError(f"No image could be read from {path or args.gallery}.")
        index = dict(zip(INDEX, map(np.array, zip(*rows))))
        if args.embed:
            arrays = {"checkpoint": fingerprint(checkpoint)} | {f"gallery_{k}": v for k, v in index.items()}
            common.write_whole(args.embed, lambda file: np.savez(file, **arrays))
            print("{}: {} gallery embeddings of {} dimensions".format(args.embed, *index["features"].shape)
                  + f"; dropped {len(known) - len(rows)} out of date" * (len(known) > len(rows)), flush=True)
    return index


def load_index(path, checkpoint, seconds):
    """Read what --embed wrote of a --gallery: dict of the INDEX arrays; UserError if it is of another checkpoint."""
    try:
        with common.timed(seconds, "reading"), np.load(path, allow_pickle=False) as file:
            index, origin = {k: file[f"gallery_{k}"] for k in INDEX}, file["checkpoint"].tolist()
    except Exception as error:  # NumPy and zip raise a dozen types on a damaged file, and on another's
        reason = f"is not a readable index ({type(error).__name__})" if path.exists() else "does not exist"
        raise UserError(f"{path} {reason}: write one by --embed NEW.npz --gallery FOLDER.") from None
    if origin != [*map(str, fingerprint(checkpoint))]:
        raise UserError(f"{path} is an index of another checkpoint's embeddings: write one of this, to a new name.")
    return index


def read_user_crops(args, networks, checkpoint, seconds, path):
    """Embed an image or those in a folder, or read an index: -> (row -> path, Crops on the CPU)."""
    stored = path.suffix == ".npz"
    index = load_index(path, checkpoint, seconds) if stored else embed_files(args, networks, checkpoint, seconds, path)
    features, log_p = (torch.from_numpy(index[k]) for k in ("features", "log_p"))
    base = path.parent if path.resolve() == path.absolute() else path.resolve().parent  # of a link
    return (lambda row: Path(os.path.normpath(os.path.join(base if stored else "", index["names"][row]))),
            Crops(features, log_p=log_p if log_p.numel() else None))


def draw_hits(path, rows, size):
    """As `common.sheet`, of cells (file, lines, colour), whose crops are read only now; what has gone is left out."""
    crops, read = common.read_crops([*{file: None for row in rows for file, *_ in row}], size, skip=True)
    crops = dict(zip(read, crops))
    rows = [[(crops[file], *rest) for file, *rest in row if file in crops] for row in rows]
    if any(rows):
        common.sheet(path, [row for row in rows if row])


def search(args, networks, checkpoint, seconds):
    """List the --gallery crops that are nearest to each --search image, but for itself, and draw them: search.png."""
    (query_path, asked), (path, crops) = (read_user_crops(args, networks, checkpoint, seconds, folder)
                                          for folder in (args.search, args.gallery))
    curve, rows = checkpoint.get("distances"), []

    def describe(crops, i):  # the predicted classes of a crop, as "hat yes"
        found = [] if crops.log_p is None else par.most_probable(crops.log_p[i:i + 1])[0][0].tolist()
        return [f"{attribute} {classes[c]}" for (attribute, classes), c in zip(ATTRIBUTES.items(), found)]

    probability, half, share = same_person(curve, args.prior) if curve else (np.zeros_like, None, None)
    for i, distances in enumerate(row for _, chunk in distance_chunks(asked, crops) for row in chunk):
        query, described, lines = query_path(i), describe(asked, i), []
        rows.append([(query, ["query", query.stem, *described], None)])
        values, near = map(torch.Tensor.tolist, distances.topk(min(args.top + 1, len(distances)), largest=False))
        hits = [hit for hit in zip(map(path, near), near, values) if hit[0].resolve() != query.resolve()]
        for rank, (file, g, d) in enumerate(hits[:args.top], 1):
            sure = float(probability(d))
            told, colour = f"{100 * sure:.1f} %" if curve else "-", MATCH if sure >= 0.5 else common.GREY
            differ = [theirs for ours, theirs in zip(described, describe(crops, g)) if ours != theirs]
            alike = f"{len(described) - len(differ)} of {len(described)}" if described else "-"
            lines.append([str(rank), f"{d:.3f}", told, alike, str(file)])
            rows[-1].append((file, [(f"{rank}: {d:.2f}, {told}", colour), file.stem, f"shares {alike}",
                                    *((text, OTHER) for text in differ)], colour))
        header = ["rank", "distance", "same person", "same attributes", "file"]
        common.table(f"Nearest to {query} of {len(distances)} images", header, lines)
    print(f"\nSame person: 50 % or more up to {half:.3f} (0: at none), if {100 * share:.3g} % of all pairs match, "
          f"as {'--prior says' if args.prior else 'on validation'}." if curve else "\nSame person: cannot be said, as "
          f"{args.eval} was trained on all identities, which leaves no crops to learn it from.")
    draw_hits(args.out.with_name("search.png"), [row[:11] for row in rows[:20]], args.size)


def find(args, networks, checkpoint, seconds):
    """List the crops in --gallery by the probability of the classes that --find names, and draw them, find.png."""
    every = [(attribute, name) for attribute, classes in ATTRIBUTES.items() for name in classes]
    asked = [tuple(word.lower().partition("=")[::2]) for word in args.find]
    for word, (attribute, name) in zip(args.find, asked):
        if name not in (classes := ATTRIBUTES.get(attribute, ())) or [a for a, _ in asked].count(attribute) > 1:
            raise UserError(f"--find {word}: name " + (f"one class of {attribute}: {', '.join(classes)}."
                            if classes else f"one of these attributes: {', '.join(ATTRIBUTES)}."))
    if networks[1] is None:
        raise UserError(f"{args.eval} predicts no attributes to find by: train with --init, or with --recipe strong.")
    path, crops = read_user_crops(args, networks, checkpoint, seconds, args.gallery)
    log_p, words = crops.log_p[:, [*map(every.index, asked)]], [*map(" ".join, asked)]
    best, lines, cells = log_p.sum(1).topk(min(args.top, len(log_p))), [], []
    for rank, (g, value) in enumerate(zip(best.indices.tolist(), best.values.exp().tolist()), 1):
        file, each = path(g), log_p[g].exp().tolist()
        lines.append([str(rank), f"{value:.3g}", f"{sum(p > 0.5 for p in each)} of {len(each)}", str(file)])
        cells.append((file, [f"{rank}: {value:.3g}", file.stem, *(
            (f"{word} {p:.2f}", common.INK if p > 0.5 else OTHER) for word, p in zip(words, each))], None))
    common.table(f"{', '.join(words)}, among {len(log_p)} images", ["rank", "probability", "probable", "file"], lines)
    draw_hits(args.out.with_name("find.png"), [cells[i:i + 5] for i in range(0, min(50, len(cells)), 5)], args.size)


# ------------------------------------------------------------------------------------------------- the command line

def fingerprint(checkpoint):
    """What tells a checkpoint from others: its run, and how far that had come."""
    return [checkpoint["record"]["run"], checkpoint["record"]["best epoch"]]


def parser():
    parser = argparse.ArgumentParser(usage="%(prog)s [options]", description=__doc__.split("[report]")[0],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    either = parser.add_argument_group("start from stage 1, or score").add_mutually_exclusive_group().add_argument
    either("--init", type=Path, metavar="FILE", help="train from this checkpoint of par.py's, its split and size")
    either("--eval", type=Path, metavar="FILE", help="score this checkpoint of reid.py instead of training")
    add = parser.add_argument_group("to train (--margin and below: by the report's recipe)").add_argument
    add("--identities", choices=("train", "all"), default="train", help="all: validates on none, keeps the last epoch")
    add("--compare", action="store_true", help="train with and without --init: table 1")
    # The report gives no margin, of squared distances. Of 1, 10 and 40, 10 had the highest validation mAP (README): a
    # small one leaves few triplets a loss, a large one pushes on what is apart already.
    add("--margin", type=common.number(float, 0), default=10.0, metavar="M", help="of the triplet loss (10)")
    add("--dim", type=common.number(int, 1, 4096), default=120, metavar="N", help="dimensions of the embedding (120)")
    add("--clusters", type=common.number(int, 1), default=100, metavar="N", help="by colour, for negatives (100)")
    add("--negatives", choices=("cluster", "random"), default="cluster", help="of the anchor's cluster, or any")
    add = parser.add_argument_group("to rank").add_argument
    add("--rerank", action="store_true", help="a row for k-reciprocal re-ranking in the tables; --search has none")
    add("--hamming", type=common.number(int, 0, 12), metavar="K", help="attributes that may differ (validation's best)")
    add("--threshold", type=common.number(float, 0, word="mean"), default="mean", metavar="T",
        help="distance below which crops are returned (mean: of all pairs, report section 4.2.1)")
    add("--prior", type=common.number(float, 1e-12, 1 - 1e-6), metavar="P", help="share of matches among all pairs, "
        "for the probability of the same person: 10 among 10,000 are 0.001 (that of the validation crops)")
    group = parser.add_argument_group("with --eval")
    add, only = group.add_argument, group.add_mutually_exclusive_group().add_argument
    only("--embed", type=Path, metavar="F.npz", help="write embeddings of the test set, or of --gallery: an index")
    only("--show", type=common.number(int, 1, 100), metavar="N", help="draw N of the test set's ranked lists, show.png")
    only("--search", type=Path, metavar="QUERY", help="find who is nearest to this image, or to each in this folder")
    only("--find", nargs="+", metavar="WORD", help="find by attributes: hat=no upcolor=red")
    add("--gallery", type=Path, metavar="FOLDER", help="of images to --embed or to search; or F.npz, to search")
    add("--top", type=common.number(int, 1), default=10, metavar="K", help="list K (10); draw 10 a query, 50 by --find")
    common.shared_flags(parser, (10, 24), (2e-5, 2e-3, 2e-3), (32, 32), "reid_best.pt", RUNGS)
    return parser


def main(args):
    asked = [flag for flag in ("embed", "show", "search", "find", "gallery") if getattr(args, flag) is not None]
    if args.compare and (not args.init or args.identities == "all"):
        raise UserError("--compare trains with and without transfer and compares on validation identities: it needs "
                        "--init FILE, a checkpoint of par.py, and not --identities all, which leaves none.")
    if asked and not args.eval:
        raise UserError(f"--{asked[0]} needs --eval FILE, the checkpoint to do it with.")
    if asked in (["search"], ["find"], ["gallery"], ["show", "gallery"]):
        raise UserError("--search QUERY, or --find, goes with --gallery FOLDER, the images to search, and --gallery "
                        "with one of these or --embed.")
    if args.init and args.init.resolve() == args.out.resolve():
        raise UserError(f"--out {args.out} would replace the checkpoint of --init: give it another name.")
    source, kind = (args.eval, "reid") if args.eval else (args.init, "par")
    checkpoint = source and common.load_checkpoint(source, kind)
    record = common.start(args, source, checkpoint, data=not args.gallery)
    own = checkpoint["record"]["arguments"] if args.init else {"head": "linear", "rungs": []}
    args.head, args.rungs = own["head"], args.rungs or [rung for rung in own["rungs"] if rung == "stride"]
    if args.eval:
        command, picture = (search, "search.png") if args.search else (find, "find.png") if args.find else \
            (embed_files if args.gallery else export, None) if args.embed else (evaluate, args.show and "show.png")
        if args.embed or picture:
            common.check_output(args.embed or args.out.with_name(picture), ".npz" if args.embed else ".png")
        command(args, load(args, checkpoint), checkpoint, record["seconds"])
        return common.say_seconds(record["seconds"])

    common.check_output(args.out, ".pt")
    with common.timed(record["seconds"], "loading"):
        market = par.load_train(args, "attributes" in args.rungs)
    record["fingerprints"] = {"data set": market.fingerprint(), "stage 1": checkpoint and fingerprint(checkpoint)}
    split = (market.person_ids > 0, market.person_ids < 1) if args.identities == "all" else \
        par.saved_split(checkpoint, market.person_ids, source) if checkpoint else \
        common.split_identities(market.person_ids, seed=args.seed)
    if args.compare:  # first, as only this one reads --weights: what is wrong with them is told before the work
        own = argparse.Namespace(**vars(args) | {"init": None, "out": args.out.with_stem(args.out.stem + "_without")})
        plain = train(own, record | {"fingerprints": record["fingerprints"] | {"stage 1": None}}, None, market, split)
    results = train(args, record, checkpoint, market, split)
    if args.compare:
        common.table("Table 1: mAP (%)", ["protocol", "without transfer", "with transfer"], [
            [protocol, *(100 * run[protocol]["none"]["mAP"] for run in (plain, results))] for protocol in results])


if __name__ == "__main__":
    common.run(main, parser())
