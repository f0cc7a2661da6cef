#!/usr/bin/env python3
"""Stage 2, person re-identification: a Siamese network, triplets from colour clusters.

    python reid.py --init par_best.pt                   train; the best epoch is reid_best.pt
    python reid.py                                      the same without transfer
    python reid.py --init par_best.pt --compare         both: table 1
    python reid.py --recipe strong                      what is known since the report
    python reid.py --eval reid_best.pt                  score, --rerank; --show N: as a picture
    python reid.py --eval reid_best.pt --embed F.npz    embeddings of the test set, or of --gallery
    python reid.py --eval reid_best.pt --search QUERY.jpg --gallery FOLDER|F.npz    who is it?
    python reid.py --eval reid_best.pt --find upcolor=red --gallery FOLDER|F.npz    who looks so?
    python reid.py --eval reid_best.pt --export F.pt2   the network for other programs, or F.onnx

[report] is the one that common.py names; tables and figures have its numbers.
"""

import argparse
import copy
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import common
import par
from common import ATTRIBUTES, CLASS_COUNTS, UserError

MATCH = par.COLOURS[0]  # of frames and texts
OTHER = par.COLOURS[1]

# ------------------------------------------------------------------------------------------
# Clusters, and what to sample.


def cluster_histograms(images, clusters, seed=0):
    """Group visually similar crops ([report] section 3.2.2): uint8 [N, 3, H, W] -> int64 [N] in
    0..clusters-1, by k-means over their colour histograms."""
    if len(images) == 0:
        raise UserError("There are no crops to cluster.")
    return k_means(colour_histograms(images), clusters, seed)


def colour_histograms(images):
    """Square roots of the shares of 8 x 8 x 8 colours: uint8 [N, 3, H, W] -> float32 [N, 512].

    On these the squared Euclidean distance is Hellinger's: on raw counts a few full bins, the
    background's, would decide alone."""
    counts = []
    for part in images.split(64):  # 64 crops of 512 bins fill an int16
        red, green, blue = part.transpose(0, 1).flatten(2) >> 5  # [n, H * W] each, in 0..7
        row = torch.arange(len(part), dtype=torch.int16, device=part.device)[:, None]
        bins = row << 9 | red.short() << 6 | green << 3 | blue
        counts.append(torch.bincount(bins.flatten(), minlength=512 * len(part)))
    histograms = torch.cat(counts).view(-1, 512).float()
    return F.normalize(histograms, p=1).sqrt()


def k_means(points, clusters, seed=0):
    """Cluster points of length 1 by at most 50 of Lloyd's iterations: float32 [N, D] -> int64
    [N]."""
    centres = choose_centres(points, min(clusters, len(points)), seed)
    assigned = None
    for _ in range(50):
        before = assigned
        # As points have length 1, the nearest centre needs no |point|^2.
        assigned = (points @ centres.T - centres.square().sum(1) / 2).argmax(1)
        if before is not None and torch.equal(assigned, before):
            break
        counts = torch.bincount(assigned, minlength=len(centres))[:, None]
        sums = torch.zeros_like(centres).index_add_(0, assigned, points)
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    return assigned


def choose_centres(points, count, seed):
    """Points to begin k-means from, each drawn in proportion to the squared distance to those
    before (k-means++, Arthur and Vassilvitskii 2007): float32 [N, D] -> [count, D]."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(count, generator=generator, dtype=torch.float64)
    nearest = torch.full((len(points),), 4.0, device=points.device)  # squared distance so far
    centres = []
    for draw in draws.tolist():
        mass = nearest.cumsum(0)
        pick = torch.searchsorted(mass, (draw * mass[-1]).view(1)).clamp(max=len(points) - 1)
        centre = points[pick]  # [1, D]
        centres.append(centre)
        nearest = torch.minimum(nearest, (2 - 2 * (points @ centre[0])).clamp(min=0))
    return torch.cat(centres)


def sample_triplets(person_ids, clusters, generator=None):
    """One triplet for each image as anchor, shuffled: int64 [N] twice -> int64 [N, 3]: anchor,
    positive, negative, as places in `person_ids`.

    The positive is another image of the anchor's identity, the negative another identity's image
    from the anchor's cluster; from anywhere where that cluster holds a single identity. Images that
    are the only one of their identity have no positive: they serve as negatives only, and there are
    as many rows fewer."""
    identities = person_ids.cpu().unique(return_inverse=True)[1]
    clusters = clusters.cpu()
    count = len(identities)
    if count == 0 or identities.bincount().max() < 2 or identities.max() == 0:
        raise UserError(
            "No triplet can be formed: that takes two identities, one of them with two crops or "
            "more."
        )
    draw = torch.rand(2, count, generator=generator, dtype=torch.float64)

    # Identities a a b a b: in the order 0 1 3 2 4 those of one stand in a block, from 0 and 3. From
    # its own place there, an image steps on within the block to one of the others.
    order = identities.argsort(stable=True)
    place = order.argsort()
    first, size = find_blocks(identities)
    steps = 1 + (draw[0] * (size - 1)).long()
    positive = order[first + (place - first + steps) % size]

    near, exists = draw_others(identities, clusters, draw[1])
    far, _ = draw_others(identities, torch.zeros_like(identities), draw[1])
    negative = torch.where(exists, near, far)
    triplets = torch.stack([torch.arange(count), positive, negative], 1)[size > 1]
    return triplets[torch.randperm(len(triplets), generator=generator)]


def find_blocks(keys):
    """Where, in the order that sorts int64 keys [N], each one's block of equal keys begins, and how
    long it is: int64 [N] twice."""
    length = keys.bincount()
    first = length.cumsum(0) - length
    return first[keys], length[keys]


def draw_others(identities, clusters, draw):
    """For each image another identity's from its cluster, by a number in 0..1: -> (images int64
    [N], whether there is one, bool [N]).

    Identities a a b a b, all in one cluster: sorted by cluster and then identity, 0 1 3 2 4, what
    an image must not draw is again a block. For image 2, a b, that leaves three places, 0 to 2; for
    image 0 two, and the draws from 0 on jump over its block, to 3 and 4."""
    group = clusters * (identities.max() + 1) + identities
    order = group.argsort(stable=True)
    own, own_size = find_blocks(group)
    start, length = find_blocks(clusters)
    room = length - own_size
    at = start + (draw * room).long()
    at = at + own_size * (at >= own)
    return order[at.clamp(max=len(order) - 1)], room > 0


def sample_groups(person_ids, size=4, generator=None):
    """Groups of crops of one identity, for batches of P identities x K crops: int64 [N] -> int64
    [n, size], shuffled.

    Each identity's crops are cut at random into as many groups as come nearest to each crop once,
    at least one; a group that lacks crops takes some again. Five crops, in groups of 4: one group,
    with four of them; six crops: two groups, and two crops in both. The groups of an identity are
    spread over the whole order."""
    identities = person_ids.cpu().unique(return_inverse=True)[1]
    draw = torch.rand(2, len(identities), generator=generator, dtype=torch.float64)
    shuffled = (identities + draw[0]).argsort()  # by identity, and at random within one
    count = identities.bincount()
    first = count.cumsum(0) - count
    groups = ((count + size // 2) // size).clamp(min=1)  # of each identity

    owner = torch.arange(len(count)).repeat_interleave(groups)  # the identity of each group
    number = torch.arange(len(owner)) - (groups.cumsum(0) - groups)[owner]  # among the owner's
    place = (number[:, None] * size + torch.arange(size)) % count[owner, None]
    rows = shuffled[first[owner, None] + place]  # [n, size]
    order = ((number + draw[1, : len(owner)]) / groups[owner]).argsort()
    return rows[order]


# ------------------------------------------------------------------------------------------
# Network and losses.


class EmbeddingNet(nn.Module):
    """[report] figure 2: stage 1 without its heads, ReLU, a fully connected layer: crops
    [B, 3, H, W] -> `par.Output` of features [B, dim]."""

    def __init__(self, backbone, dim=120):
        super().__init__()
        self.backbone = backbone
        self.embed = nn.Sequential(nn.ReLU(), nn.Linear(backbone.width, dim))

    def forward(self, crops):
        _, features = self.backbone(crops)
        with common.in_float32(features.device):
            return par.Output(features=self.embed(features.float()))


def triplet_loss(anchor, positive, negative, margin):
    """Mean over triplets of [|a - p|^2 - |a - n|^2 + margin]_+ ([report] section 3.2.1): [B, D]
    each -> scalar."""
    to_positive = (anchor - positive).square().sum(1)
    to_negative = (anchor - negative).square().sum(1)
    return F.relu(to_positive - to_negative + margin).mean()


def hard_triplet_loss(features, identities):
    """Mean over anchors of softplus(distance to the farthest crop of their identity - to the
    nearest of another), the batch-hard soft-margin loss of Hermans et al. (2017): [B, D], [B] ->
    scalar."""
    squares = features.square().sum(1)
    distances = torch.addmm(squares, features, features.T, alpha=-2).add(squares[:, None])
    distances = distances.clamp(min=1e-9).sqrt()
    same = identities[:, None] == identities
    farthest = distances.where(same, -torch.inf).amax(1)
    nearest = distances.where(~same, torch.inf).amin(1)
    return F.softplus(farthest - nearest).mean()


class TripletLoss(nn.Module):
    """The loss of the report's recipe: `triplet_loss` of the features of k = 3 crops an item."""

    def __init__(self, margin):
        super().__init__()
        self.margin = margin

    def forward(self, output, rows):
        """`par.Output` for 3 x B crops, and their rows, int64 [3, B], whose shape tells anchors,
        positives and negatives apart -> scalar."""
        anchor, positive, negative = output.features.unflatten(0, rows.shape)
        return triplet_loss(anchor, positive, negative, self.margin)


class JointLoss(nn.Module):
    """The loss of the strong recipe: identities (smoothing their labels cost mAP), hard triplets
    and attributes, by weighted cross-entropy, each if it is in args.rungs."""

    def __init__(self, args, market, rows):
        super().__init__()
        self.rungs = args.rungs
        self.labels = market.labels.to(args.device)
        self.weights = [w.to(args.device) for w in par.class_weights(market.labels[rows])]
        self.identities = par.number_identities(market, rows).to(args.device)

    def forward(self, output, rows):
        """`par.Output` for 4 x B crops, and their rows, int64 [4, B] -> scalar."""
        rows = rows.flatten()
        identities = self.identities[rows]
        loss = 0
        if "identity" in self.rungs:
            loss = loss + F.cross_entropy(output.identities, identities)
        if "triplets" in self.rungs:
            loss = loss + hard_triplet_loss(output.features, identities)
        if "attributes" in self.rungs:
            logits = output.logits.split(CLASS_COUNTS, 1)
            attributes = par.attribute_loss(logits, self.labels[rows], "wce", self.weights)
            loss = loss + attributes / len(CLASS_COUNTS)
        return loss


# ------------------------------------------------------------------------------------------
# Ranking.


@dataclass
class Crops:
    """What ranking needs of N crops."""

    features: torch.Tensor  # float32 [N, D]
    ids: torch.Tensor | None = None  # int64 [N]
    cameras: torch.Tensor | None = None  # int64 [N]
    log_p: torch.Tensor | None = None  # float32 [N, 41], log-probabilities of all classes
    itself: torch.Tensor | None = None  # int64 [N], of queries: their place in the gallery, or -1

    @property
    def attributes(self):
        """The most probable class of each attribute as a 1 in float32 [N, 41], so that a product
        counts those alike; None where none are predicted."""
        if self.log_p is None:
            return None
        classes, _ = par.most_probable(self.log_p)
        columns = [F.one_hot(column, n) for column, n in zip(classes.T, CLASS_COUNTS)]
        return torch.cat(columns, 1).float()


class Selection(NamedTuple):
    """Which crops are returned ([report] section 4.2.1)."""

    below: float = torch.inf  # those at less than this distance
    differing: int = len(ATTRIBUTES)  # of which at most so many predicted attributes differ


EVERY = {"none": Selection()}  # all are returned
METRICS = "mAP mAP_trapezoid rank1 rank5 rank10 mINP precision recall length matches".split()


def rank_metrics(
    distances,
    query_ids,
    query_cameras,
    gallery_ids,
    gallery_cameras,
    keep=None,
    cross_camera=True,
):
    """Score rankings by distance: float [Q, G] -> dict of fractions, and "queries", how many were
    scored.

    Junk (gallery id -1) does not take part, nor, with cross_camera, crops of the query's identity
    from the query's camera, nor any pair whose distance is +inf (a query among its own gallery).
    What is left and has the query's id is a match; ties are broken by index. keep, bool [Q, G],
    marks what a selection returned: a match that was not returned has precision 0. Queries without
    a match are not scored; UserError if that is all of them, or for NaN.

    mAP: the mean over the matches of the precision at each; mAP_trapezoid: of the mean of the
    precisions at and just before each, as Market-1501's MATLAB code does; rank1, rank5, rank10:
    queries with a match that early; mINP (Ye et al. 2021): matches / rank of the last match. Of the
    returned lists: length, precision and recall."""
    scores = [distances.new_empty(len(METRICS), 0, dtype=torch.float64)]
    for rows in chunk_rows(*distances.shape):
        part = None if keep is None else keep[rows]
        queries = (distances[rows], query_ids[rows], query_cameras[rows])
        scores.append(rank_queries(*queries, gallery_ids, gallery_cameras, part, cross_camera))
    return mean_metrics(torch.cat(scores, 1))


def chunk_rows(queries, columns):
    """Which queries to rank at once against `columns` gallery crops: slices, each for about 50 MB
    of memory."""
    count = max(1, 2**22 // max(1, columns))
    return [slice(i, i + count) for i in range(0, queries, count)]


def rank_queries(
    distances, query_ids, query_cameras, gallery_ids, gallery_cameras, keep, cross_camera
):
    """`rank_metrics` for C queries, each by itself: float64 [metrics, C] in the order of METRICS. A
    query without matches has 0 matches, and NaN."""
    distances = distances.detach().to(torch.promote_types(distances.dtype, torch.float32))
    ranked = torch.where(gallery_ids == -1, torch.inf, distances)  # +inf: takes no part
    rows, columns = (gallery_ids == query_ids[:, None]).nonzero(as_tuple=True)  # of one identity
    if cross_camera:
        own = gallery_cameras[columns] == query_cameras[rows]
        ranked[rows[own], columns[own]] = torch.inf
    valid = ~ranked[rows, columns].isposinf()
    rows = rows[valid]  # the query and the gallery crop of each match
    columns = columns[valid]
    matches = rows.bincount(minlength=len(ranked))
    if keep is not None:
        keep = keep.bool()
        ranked.masked_fill_(~keep, torch.inf)
        returned = keep[rows, columns]
        rows = rows[returned]
        columns = columns[returned]

    ranks = match_ranks(ranked, rows, columns)
    found = rows.bincount(minlength=len(ranked))
    length = (~ranked.isposinf()).sum(1)
    metrics = describe_ranks(ranks, found, matches.double(), length.double())
    return torch.stack([metrics[name] for name in METRICS])


def match_ranks(ranked, rows, columns):
    """The ranks of matches among all that is returned: distances [C, G], +inf where not returned,
    and where the matches are -> float64 [C, M], each query's from the first on, then +inf."""
    device = ranked.device
    found = rows.bincount(minlength=len(ranked))
    first = found.cumsum(0) - found
    slot = torch.arange(len(rows), device=device) - first[rows]  # among the query's matches
    most = max(1, int(found.max()))
    values = ranked.new_full((len(ranked), most), torch.inf)
    values[rows, slot] = ranked[rows, columns]

    # A match's rank is where its distance stands among its query's sorted distances.
    ordered = sort_rows(ranked)
    if ordered[:, -1:].isnan().any():  # where NaN is sorted to
        raise UserError(
            "Distances are NaN: the network that made the embeddings diverged. Train with a lower "
            "--lr."
        )
    nearer = torch.searchsorted(ordered, values)
    as_near = torch.searchsorted(ordered, values, right=True)
    tied = (as_near - nearer)[rows, slot] > 1
    rows = rows[tied]
    slot = slot[tied]
    nearer[rows, slot] += count_ties(ranked, rows, columns[tied])

    number = torch.arange(1, most + 1, device=device)
    ranks = (nearer + 1).double()
    return ranks.where(number <= found[:, None], torch.inf).sort(1)[0]


def sort_rows(distances):
    """Each row's values in order. On a CPU by NumPy, which sorts values with vector instructions,
    many times as fast as indices can be sorted."""
    if not distances.is_cpu:
        return distances.sort(1)[0]
    ordered = distances.clone()
    parts = np.array_split(ordered.numpy(), torch.get_num_threads())
    with ThreadPoolExecutor() as pool:
        list(pool.map(np.ndarray.sort, parts))
    return ordered


def count_ties(ranked, rows, columns):
    """How many crops of a smaller index are exactly as near as each match: int64 [matches]."""
    index = torch.arange(ranked.shape[1], device=ranked.device)
    counts = [rows[:0]]
    for part in chunk_rows(len(rows), ranked.shape[1]):
        distances = ranked[rows[part]]
        as_near = distances == ranked[rows[part], columns[part]][:, None]
        counts.append((as_near & (index < columns[part][:, None])).sum(1))
    return torch.cat(counts)


def describe_ranks(ranks, found, matches, length):
    """The metrics of C queries: ranks float64 [C, M] as of `match_ranks`; how many matches were
    found, there are, and how long the returned list is, [C] each -> dict of name -> float64 [C]."""
    hits = torch.arange(1, ranks.shape[1] + 1, device=ranks.device).double()
    at = hits / ranks  # precision at each match
    just_before = ((hits - 1) / (ranks - 1)).nan_to_num(1)  # 0 / 0 is before the first of all
    last = ranks.gather(1, (found - 1).clamp(min=0)[:, None])[:, 0]
    return {
        "mAP": at.sum(1) / matches,
        "mAP_trapezoid": (at + just_before).sum(1) / 2 / matches,
        "rank1": (ranks[:, 0] <= 1).double(),
        "rank5": (ranks[:, 0] <= 5).double(),
        "rank10": (ranks[:, 0] <= 10).double(),
        "mINP": torch.where(found == matches, matches / last, 0),
        "precision": found / length.clamp(min=1),
        "recall": found / matches,
        "length": length,
        "matches": matches,
    }


def mean_metrics(scores):
    """Mean over the queries that have a match: [metrics, Q] -> dict of metrics, and "queries", how
    many these are."""
    scored = scores[:, scores[-1] > 0]
    if scored.shape[1] == 0:
        raise UserError("No query has a match in the gallery, so there is nothing to score.")
    metrics = dict(zip(METRICS[:-1], scored.mean(1).tolist()))
    metrics["queries"] = scored.shape[1]
    return metrics


def distance_chunks(query, gallery=None):
    """Yield (slice of queries, Euclidean distances [C, G]) in bounded memory. Here and below,
    gallery None stands for each query against all the others; its distance to itself is +inf."""
    others = gallery is None
    if others:
        gallery = query
    # In parts, as the squares of a million crops would take 2 GB at once.
    squares = torch.cat([part.square().sum(1) for part in gallery.features.split(2**16)])
    for rows in chunk_rows(len(query.features), len(squares)):
        part = query.features[rows]
        # torch.cdist would copy the gallery for each chunk.
        distances = torch.addmm(squares, part, gallery.features.T, alpha=-2)
        distances.add_(part.square().sum(1, keepdim=True)).clamp_(min=0).sqrt_()
        if others:
            distances.diagonal(rows.start).fill_(torch.inf)
        leave_out_itself(distances, query, rows)
        yield rows, distances


def leave_out_itself(distances, query, rows):
    """Set the distances [C, G] of queries to themselves, where the gallery holds them, to +inf."""
    if query.itself is not None:
        place = query.itself[rows]
        held = (place >= 0).nonzero()[:, 0]
        distances[held, place[held]] = torch.inf


def score_queries(query, gallery, selections, cross_camera, chunks=None):
    """Rank under several selections, in one pass over the distances: dict of name -> float64
    [metrics, Q]. selections: dict of name -> `Selection`; chunks: of other distances, as
    `distance_chunks` yields them."""
    shown = query if gallery is None else gallery
    # Room in one place, as small tensors between the chunks' large ones would make memory grow from
    # chunk to chunk.
    scores = {}
    for name in selections:
        scores[name] = query.features.new_zeros(len(METRICS), len(query.ids), dtype=torch.float64)
    ours = query.attributes
    theirs = shown.attributes
    if chunks is None:
        chunks = distance_chunks(query, gallery)
    for rows, distances in chunks:
        leave_out_itself(distances, query, rows)  # as other distances' chunks may hold it
        if ours is not None:
            differing = len(ATTRIBUTES) - ours[rows] @ theirs.T  # [C, G]
        for name, selection in selections.items():
            keep = None
            if selection.below < torch.inf:
                keep = distances < selection.below
            if selection.differing < len(ATTRIBUTES):
                alike = differing <= selection.differing
                keep = alike if keep is None else keep & alike
            queries = (distances, query.ids[rows], query.cameras[rows])
            scores[name][:, rows] = rank_queries(
                *queries, shown.ids, shown.cameras, keep, cross_camera
            )
    return scores


def score_selections(query, gallery, selections, cross_camera, chunks=None):
    """As `score_queries`, the means: dict of name -> as `rank_metrics`."""
    scores = score_queries(query, gallery, selections, cross_camera, chunks)
    return {name: mean_metrics(found) for name, found in scores.items()}


# ------------------------------------------------------------------------------------------
# Re-ranking.


def rerank_chunks(query_features, gallery_features=None, k1=20, k2=6, lambda_value=0.3):
    """k-reciprocal re-ranking (Zhong et al. 2017): float32 [Q, D], [G, D] -> yields (slice of
    queries, float32 [C, G] distances).

    A crop's set: those of its k1 nearest that have it among theirs, and the like sets, of half the
    size, of those of which more than two thirds are in it; each with a weight that falls with the
    squared distance. The sets of the k2 nearest are averaged. What comes out is the Jaccard
    distance of two sets and, in the part lambda_value, the squared distance over the largest one.
    As the authors' code, but never with a matrix of all pairs: sets are sparse."""
    alone = gallery_features is None
    query = Crops(query_features)
    every = query if alone else Crops(torch.cat([query_features, gallery_features]))
    count = len(every.features)

    near, largest = find_neighbours(every, max(k1 + 1, k2))
    members = expand_neighbours(near, k1)
    weights = weigh_members(members, every.features, largest)
    of_nearest = [weights.index_select(0, kth) for kth in near[:, :k2].T]
    weights = torch.sparse.sum(torch.stack(of_nearest), 0) / min(k2, count)
    weights = weights.coalesce()  # [N, N]
    by_member = weights.t().coalesce()

    numbers = torch.arange(count, device=near.device)[: len(query_features)]
    for rows, distances in distance_chunks(query, None if alone else every):
        crops = numbers[rows]
        jaccard = jaccard_distances(weights.index_select(0, crops).coalesce(), by_member)
        mixed = jaccard.lerp_(distances.square() / largest[crops, None], lambda_value)
        mixed.masked_fill_(distances.isposinf(), torch.inf)
        yield rows, mixed[:, 0 if alone else len(query_features) :]


def find_neighbours(crops, count):
    """The nearest of N crops to each, itself included, and its largest squared distance: (int64
    [N, count], float32 [N])."""
    features = crops.features
    total = len(features)
    near = torch.zeros(total, min(count, total), dtype=torch.int64, device=features.device)
    largest = torch.zeros_like(features[:, 0])
    for rows, distances in distance_chunks(crops, crops):
        near[rows] = distances.topk(near.shape[1], largest=False).indices
        largest[rows] = distances.amax(1).square().clamp(min=1e-30)
    return near, largest


def reciprocal_neighbours(near, k):
    """Which of a crop's k nearest have it among theirs: int64 [N, K] -> bool [N, k]."""
    parts = []
    for crops in torch.arange(len(near), device=near.device).split(512):
        theirs = near[near[crops, :k], :k]  # [C, k, k]
        parts.append((theirs == crops[:, None, None]).any(2))
    return torch.cat(parts)


def expand_neighbours(near, k1):
    """The sets of all crops: int64 [N, K] -> pairs of a crop and a member of its set, int64
    [2, pairs], sorted."""
    count = len(near)  # stands for no crop as well
    half = round(k1 / 2) + 1
    k1 = k1 + 1  # with the crop itself
    whole = reciprocal_neighbours(near, k1)
    halves = reciprocal_neighbours(near, half)
    sets = []
    for crops in torch.arange(count, device=near.device).split(512):
        own = torch.where(whole[crops], near[crops, :k1], count)  # [C, k1]
        theirs = near[near[crops, :k1], :half]  # [C, k1, half]
        counted = halves[near[crops, :k1]] & whole[crops][:, :, None]
        theirs = torch.where(counted, theirs, count)
        member = torch.zeros(len(crops), count + 1, dtype=torch.bool, device=near.device)
        member.scatter_(1, own, True)
        shared = member.gather(1, theirs.flatten(1)).view_as(theirs) & (theirs < count)
        theirs[shared.sum(2) <= 2 / 3 * (theirs < count).sum(2)] = count
        member.scatter_(1, theirs.flatten(1), True)
        sets.append(member[:, :count].to_sparse())
    return torch.cat(sets).coalesce().indices()


def weigh_members(pairs, features, largest):
    """The weights of the members of each crop's set, which fall with the squared distance over the
    largest one, and add up to 1: int64 [2, pairs] -> sparse float32 [N, N]."""
    count = len(features)
    falls = []
    for crops, members in pairs.split(2**14, 1):
        squared = (features[crops] - features[members]).square().sum(1)
        falls.append(squared / -largest[crops])
    falls = torch.cat(falls)
    weights = torch.sparse_coo_tensor(
        pairs, falls, (count, count), is_coalesced=True, check_invariants=False
    )
    return torch.sparse.softmax(weights, 1)


def jaccard_distances(own, by_member):
    """Of C crops to all: their weights, sparse [C, N], and all weights by member, sparse [N, N] ->
    float32 [C, N]. As all sets add up to 1, the union of two is 2 less what they share."""
    rows, count = own.shape
    shared = torch.zeros(rows, count, device=own.device)
    parts = zip(own.indices().split(2**14, 1), own.values().split(2**14))
    for (row, member), weight in parts:
        found = by_member.index_select(0, member).coalesce()
        which, crop = found.indices()
        least = weight[which].minimum(found.values())
        shared.view(-1).index_add_(0, row[which] * count + crop, least)
    return 1 - shared / (2 - shared)


# ------------------------------------------------------------------------------------------
# How sure it is.


def distance_histograms(query, gallery=None, bins=1000):
    """How distances lie: a dict of edges [bins + 1]; how many pairs are in each bin, [bins],
    matches (of one identity) and others (of two); and the mean of all pairs, the threshold of
    [report] section 4.2.1.

    Counted are pairs of two cameras. Where these hold no match, as with one camera, all pairs are
    counted, and "cross_camera" is False."""
    shown = query if gallery is None else gallery
    top = 1e-6
    cross_camera = False
    for rows, distances in distance_chunks(query, gallery):
        finite = distances[distances.isfinite()]
        if len(finite) > 0:
            top = max(top, finite.max().item())
        if not cross_camera:  # the first chunk mostly tells
            same = shown.ids == query.ids[rows, None]
            across = shown.cameras != query.cameras[rows, None]
            cross_camera = bool((same & across).any())

    matches = torch.zeros(bins, dtype=torch.float64)
    others = torch.zeros(bins, dtype=torch.float64)
    total = 0
    pairs = 0
    for rows, distances in distance_chunks(query, gallery):
        finite = distances.isfinite()
        same = shown.ids == query.ids[rows, None]
        counted = finite
        if cross_camera:
            counted = shown.cameras != query.cameras[rows, None]
        matches += torch.histc(distances[same & counted], bins, 0, top).cpu()
        others += torch.histc(distances[~same & counted], bins, 0, top).cpu()
        total += distances.masked_fill_(~finite, 0).sum(dtype=torch.float64).item()
        pairs += finite.sum().item()
    return {
        "edges": torch.linspace(0, top, bins + 1, dtype=torch.float64),
        "matches": matches,
        "others": others,
        "mean": total / max(1, pairs),
        "cross_camera": cross_camera,
    }


def describe_pairs(curve):
    """Which pairs a curve, as of `distance_histograms`, counts."""
    return "pairs across cameras" if curve["cross_camera"] else "pairs of all cameras"


class Calibration(NamedTuple):
    """How probably two crops show the same person, by their distance."""

    edges: np.ndarray  # distances [n]
    log_odds: np.ndarray  # of the same person, at these [n]
    half: float  # up to this distance it is 50 % or more; 0: at none
    share: float  # the share of matches among pairs across cameras that this holds for

    def probability(self, distances):
        """Of distances, a float array: -> float64 array."""
        return 1 / (1 + np.exp(-np.interp(distances, self.edges, self.log_odds)))


def calibrate(curve, prior=None):
    """Learn `Calibration` from a curve, as of `distance_histograms`. prior: another share of
    matches among pairs across cameras than the curve's, which shifts the log-odds.

    The odds of the bins must fall with the distance: bins where they do not are joined (pool
    adjacent violators, Ayer et al. 1955), and the log-odds interpolated between the means of those.
    A pair of each kind more, where it is least expected, keeps all finite."""
    edges = curve["edges"].numpy()
    matches = curve["matches"].numpy().copy()
    others = curve["others"].numpy().copy()
    odds = max(1, matches.sum()) / max(1, others.sum())
    share = odds / (1 + odds) if prior is None else prior
    others[0] += 1
    matches[-1] += 1

    middles = (edges[1:] + edges[:-1]) / 2
    joined = []  # of each level: matches, others, sum of the distances
    for block in np.stack([matches, others, (matches + others) * middles], 1):
        joined.append(block)
        while len(joined) > 1 and not odds_fall(joined[-2], joined[-1]):
            last = joined.pop()
            joined[-1] = joined[-1] + last

    matches, others, total = np.transpose(joined)
    log_odds = np.log(matches / others * share / (1 - share) / odds)
    log_odds = np.interp(edges, total / (matches + others), log_odds)
    half = float(np.interp(0, log_odds[::-1], edges[::-1]))
    return Calibration(edges, log_odds, half, float(share))


def describe_half(calibration, curve):
    """Up to which distance two crops are more probably of one person, and of which pairs that is
    true. curve: what the calibration was learned from."""
    where = f"up to a distance of {calibration.half:.3f}"
    if calibration.half == 0:
        where = "at no distance"
    share = f"{100 * calibration.share:.3g} % of the {describe_pairs(curve)}"
    return f"50 % or more {where}, if {share} match"


def odds_fall(nearer, farther):
    """Whether the odds of matches fall from one level to the next."""
    return nearer[0] * farther[1] > farther[0] * nearer[1]


def show_calibration(title, calibration, found, prior):
    """Print, in ten steps of the promised probability, how many of the pairs in `found`, as of
    `distance_histograms`, match."""
    middles = (found["edges"][1:] + found["edges"][:-1]) / 2
    promised = torch.from_numpy(calibration.probability(middles))
    step = (10 * promised).long().clamp(max=9)
    pairs = found["matches"] + found["others"]
    columns = []
    for counts in (pairs, pairs * promised, found["matches"]):
        sums = torch.bincount(step, counts, 10).tolist()
        columns.append([*sums, sum(sums)])

    names = [f"{10 * k} to {10 * k + 10}" for k in range(10)] + ["all"]
    rows = []
    for name, count, mean, match in zip(names, *columns):
        percent = 100 / count if count > 0 else np.nan
        rows.append([name, f"{count:.0f}", percent * mean, percent * match])
    par.print_table(
        f"Probability of the same person: {title}, {describe_pairs(found)} (%)",
        ["promised", "pairs", "mean", "match"],
        rows,
    )
    source = "as on validation; --prior P is for another share."
    if prior is not None:
        source = "as --prior says."
    print(f"Promised for pairs of which {100 * calibration.share:.3g} % match, {source}")


# ------------------------------------------------------------------------------------------
# Training.


class Embedder:
    """A trained network, to be called with uint8 crops [N, 3, H, W] (RGB, of any size): -> their
    features, float32 [N, D], on the CPU; of length 1 by the strong recipe."""

    def __init__(self, model, predictor, size):
        self.model = model
        self.predictor = predictor  # of attributes: the same network, another, or None
        self.size = size

    def __call__(self, crops):
        return common.infer(self.model, par.resize_crops(crops, self.size)).features.cpu()

    def describe(self, crops):
        """Features and attributes: -> (float32 [N, D], log-probabilities of all classes, float32
        [N, 41], or None), on a GPU if the network is, else on the CPU, as ranking takes float64,
        which MPS has not."""
        crops = par.resize_crops(crops, self.size)
        output = common.infer(self.model, crops)
        logits = None
        if self.predictor is self.model:
            logits = output.logits
        elif self.predictor is not None:
            logits = common.infer(self.predictor, crops).logits
        device = output.features.device if output.features.is_cuda else "cpu"
        log_p = None if logits is None else par.log_probabilities(logits).to(device)
        return output.features.to(device), log_p


def make_embedder(checkpoint, device):
    """The networks of a checkpoint of reid.py: -> `Embedder`."""
    settings = checkpoint["record"]["arguments"]
    if settings["recipe"] == "report":
        model = EmbeddingNet(par.make_backbone(settings), settings["dim"])
        model.load_state_dict(checkpoint["model"])
        model.to(device)
    else:
        model = par.load_network(checkpoint, device)
    predictor = None
    if "attributes" in settings["rungs"]:
        predictor = model
    elif checkpoint["stage 1"] is not None:
        predictor = par.load_network(checkpoint["stage 1"], device)
    return Embedder(model, predictor, settings["size"])


def load_embedder(path, device="auto"):
    """Load a checkpoint of reid.py: -> `Embedder`. UserError, a ValueError, says why it cannot be
    used."""
    return make_embedder(common.load_checkpoint(path, "reid"), par.choose_device(device))


def embed(embedder, market, rows=slice(None)):
    """Embed crops of a `common.Market`, and predict their attributes: -> `Crops`."""
    features, log_p = embedder.describe(market.images[rows])
    return Crops(
        features,
        market.person_ids[rows].to(features.device),
        market.camera_ids[rows].to(features.device),
        log_p,
    )


def report_recipe(args, market, rows, state):
    """What [report] section 3.2 trains, with triplets from colour clusters: -> (network, sampler of
    an epoch, loss) for `common.fit`."""
    ids = market.person_ids[rows]
    clusters = torch.zeros_like(rows)
    sample_triplets(ids, clusters, torch.Generator())  # that none can be formed is told at once
    if args.negatives == "cluster":
        clusters = cluster_histograms(market.images[rows], args.clusters, args.seed)

    def sample_epoch(generator):
        return rows[sample_triplets(ids, clusters, generator)]

    backbone = par.make_backbone(vars(args), state)
    return EmbeddingNet(backbone, args.dim), sample_epoch, TripletLoss(args.margin)


def strong_recipe(args, market, rows, state):
    """Beyond the report, identities, hard triplets and attributes are learned jointly, from groups
    of four crops of one identity: -> (network, sampler of an epoch, loss) for `common.fit`."""
    ids = market.person_ids[rows]
    count = len(ids.unique())
    if count < 2 or not {"identity", "triplets", "attributes"} & set(args.rungs):
        raise UserError(
            "Nothing to learn: give two identities or more; leave in identity, triplets or "
            "attributes."
        )

    def sample_epoch(generator):
        return rows[sample_groups(ids, generator=generator)]

    model = par.make_network(vars(args), "attributes" in args.rungs, count, state)
    return model, sample_epoch, JointLoss(args, market, rows)


def transfer(model, stage_1):
    """Take from a checkpoint of stage 1 all weights that fit."""
    weights = model.state_dict()
    for name, given in stage_1["model"].items():
        if name in weights and weights[name].shape == given.shape:
            weights[name] = given
    model.load_state_dict(weights)


def unseen_weights(args, market, validation):
    """`par.starting_weights`. UserError where they were trained on people to validate on or, with
    --compare, whose other run is to learn from this data set alone, on any of it."""
    state, seen = par.starting_weights(args)
    par.check_unseen(seen, market, validation, args.weights)
    for data in seen:
        if args.compare and par.is_same_data(data["names"], market.names):
            raise UserError(
                f"{args.weights}, which --compare would start from without --init, was trained on "
                "this data set itself: pass --weights, those that stage 1 began from."
            )
    return state, seen


def train(args, record, stage_1, market, split):
    """Train from a checkpoint of stage 1, or else from --weights; write checkpoint, record and
    figure 3: -> metrics on validation, dict of protocol ("all cameras", the report's, and "across
    cameras") -> of selection; None without validation."""
    rows, validation = [which.nonzero()[:, 0] for which in split]
    record = copy.deepcopy(record)
    check_matches(market, validation)
    state = None
    if stage_1 is None:
        state, seen = unseen_weights(args, market, validation)
    else:
        seen = stage_1["seen"]
    torch.manual_seed(args.seed)
    recipe = strong_recipe if args.recipe == "strong" else report_recipe
    with common.timed(record["seconds"], "preparing"):
        model, sample_epoch, loss = recipe(args, market, rows, state)
    if stage_1 is not None:
        transfer(model, stage_1)
    model.to(args.device)
    checkpoint = {
        "kind": "reid",
        "record": record,
        "stage 1": None if "attributes" in args.rungs else stage_1,
        **par.describe_split(market, rows, validation, seen),
    }

    def validate():
        crops = embed(Embedder(model, None, args.size), market, validation)
        curve = checkpoint["distances"] = distance_histograms(crops)
        everywhere = score_selections(crops, None, EVERY, cross_camera=False)["none"]
        if not curve["cross_camera"]:
            return {"mAP": everywhere["mAP"], "rank1": everywhere["rank1"]}
        across = score_selections(crops, None, EVERY, cross_camera=True)["none"]
        return {
            "mAP": across["mAP"],
            "rank1": across["rank1"],
            "mAP_all_cameras": everywhere["mAP"],
        }

    begin = f"weights {args.weights}" if stage_1 is None else "stage 1"
    print(f"\nFrom {begin}: {len(rows)} training and {len(validation)} validation crops")
    scored = len(validation) > 0
    if not scored:
        print("Without validation the last epoch is kept.")
    record = common.fit(
        model, market.images, sample_epoch, loss, validate if scored else None, args, checkpoint
    )
    record["final"] = {"best epoch": record["best epoch"]}
    pictures = [par.draw_training(record)]
    if scored:
        with common.timed(record["seconds"], "scoring"):
            final, figure_3 = finish(args, checkpoint, market, validation)
        record["final"] |= final
        pictures.insert(0, figure_3)
    par.write_picture(args.out.with_suffix(".png"), par.stack_pictures(pictures))
    common.write_record(args.out, record)
    par.say_seconds(record["seconds"])
    return record["final"].get("validation")


def check_matches(market, validation):
    """UserError where there are validation crops, and no two of one identity."""
    counts = market.person_ids[validation].unique(return_counts=True)[1]
    if len(counts) > 0 and counts.max() < 2:
        raise UserError(
            "No validation identity has two crops, so there is no match to score: train on all by "
            "--identities all, or give more crops of each."
        )


def finish(args, checkpoint, market, validation):
    """Score the best epoch on validation: -> (what the record says of it, figure 3)."""
    crops = embed(make_embedder(checkpoint, args.device), market, validation)
    scored = score_and_show(args, crops, None, args.hamming)
    calibration = calibrate(scored.curve, args.prior)
    print(f"same person: {describe_half(calibration, scored.curve)}")
    final = {
        "validation": scored.results,
        "threshold": scored.threshold,
        "hamming": scored.hamming,
        "same person": {
            "distance": calibration.half,
            "share of matches": calibration.share,
        },
    }
    return final, draw_distances(scored.curve, calibration)


# ------------------------------------------------------------------------------------------
# Scoring.


class Scored(NamedTuple):
    """What `score_and_show` finds."""

    results: dict  # protocol -> selection -> metrics
    threshold: float  # the distance below which crops are returned
    hamming: int | None  # how many attributes may differ; None where none are predicted
    curve: dict  # as of `distance_histograms`


def score_and_show(args, query, gallery, hamming):
    """Print a table of every selection: -> `Scored`.

    [report] section 4.2.1 selects by distance, by how many of the 12 predicted attributes differ,
    or by both. Its protocol, all cameras, is scored where each query ranks all others, gallery
    None, or where no identity is seen by two cameras. A Hamming parameter of None is tuned on these
    crops, if attributes are predicted. With --rerank, a row for that."""
    curve = distance_histograms(query, gallery)
    threshold = curve["mean"] if args.threshold == "mean" else args.threshold
    selections = EVERY | {"threshold": Selection(below=threshold)}
    if query.log_p is not None:
        if hamming is None:
            hamming = tune_hamming(query, gallery, curve["cross_camera"])
        selections["hamming"] = Selection(differing=hamming)
        selections["both"] = Selection(threshold, hamming)

    crops = f"{len(query.ids)} validation"
    protocols = {"all cameras": False, "across cameras": True}
    if gallery is not None:
        crops = f"test set, {len(gallery.ids)} gallery"
        protocols = {"across cameras": True}
    if not curve["cross_camera"]:
        protocols = {"all cameras": False}
    results = {}
    for protocol, cross_camera in protocols.items():
        scores = score_selections(query, gallery, selections, cross_camera)
        if args.rerank:
            features = None if gallery is None else gallery.features
            chunks = rerank_chunks(query.features, features)
            reranked = score_selections(query, gallery, EVERY, cross_camera, chunks)
            scores["re-ranked"] = reranked["none"]
        results[protocol] = scores
        title = f"{args.eval or args.out}, {crops} crops, {protocol}"
        if not curve["cross_camera"]:
            title += ", as no identity is seen by two"
        queries = str(scores["none"]["queries"])
        if scores["none"]["queries"] < len(query.ids):
            queries += f" of {len(query.ids)}"  # the others have no match
        show_scores(f"{title}: {queries} queries (%)", scores)

    said = f"threshold: distance < {threshold:.3f}"
    if args.threshold == "mean":
        said += " (the mean of all pairs)"
    if query.log_p is None:
        print(f"{said}; no Hamming filter: it predicts no attributes")
    else:
        count = len(ATTRIBUTES)
        print(f"{said}; hamming: at most {hamming} of {count} attributes differ")
    return Scored(results, threshold, hamming, curve)


def tune_hamming(query, gallery, cross_camera):
    """The Hamming parameter of the highest mAP; of equal ones the smallest."""
    tries = {k: Selection(differing=k) for k in range(len(ATTRIBUTES) + 1)}
    scores = score_selections(query, gallery, tries, cross_camera)
    return max(scores, key=lambda k: scores[k]["mAP"])


def show_scores(title, scores):
    """Print a dict of selection -> metrics as a table, in per cent but for the lists' length."""
    rows = []
    for name, metrics in scores.items():
        percent = [100 * metrics[metric] for metric in METRICS[:-2]]
        rows.append([name, *percent, metrics["length"]])
    par.print_table(title, ["selection", *METRICS[:-1]], rows)


def draw_distances(curve, calibration):
    """[report] figure 3: how the distances of matches lie within those of all pairs that the curve
    counts, in % of each; and the probability of the same person, from 0 to 100 % over the height:
    -> as `par.draw_chart`."""
    middles = curve["edges"][5::10]
    end = curve["edges"][-1].item()
    counts = {"all pairs": curve["matches"] + curve["others"], "matches": curve["matches"]}
    shares = {}
    for name, count in counts.items():
        shares[name] = 100 * count.view(-1, 10).sum(1) / count.sum()
    high = max(share.max().item() for share in shares.values())
    lines = {}
    for name, share in shares.items():
        lines[name] = torch.stack([middles / end, share / high], 1)
    probability = torch.from_numpy(calibration.probability(middles))
    half = f"same person (50 % at {calibration.half:.2f})"
    lines[half] = torch.stack([middles / end, probability], 1)

    bottom = [(k / 4, f"{end * k / 4:.3g}") for k in range(5)]
    left = [f"{high * k / 4:.1f} %" for k in range(5)]
    right = [f"{25 * k} %" for k in range(5)]
    title = f"Figure 3: validation {describe_pairs(curve)}"
    return par.draw_chart(title, lines, bottom, left, right, right_colour=par.COLOURS[2])


def evaluate(args, embedder, checkpoint, seconds):
    """Score a checkpoint on validation, by both protocols, and on the test set of --data, with the
    Hamming parameter tuned on validation."""
    with common.timed(seconds, "loading"):
        market, validation = par.load_validation(args, checkpoint, annotated=False)
        test = None
        folders = [common.list_crops(args.data, part) for part in ("query", "gallery")]
        if all(folders) or len(validation) == 0 or args.show:
            query = common.load_market(args.data, "query", args.size, annotated=False)
            gallery = common.load_market(args.data, "gallery", args.size, annotated=False)
            test = (query, gallery)
    hamming = args.hamming
    curve = checkpoint.get("distances")  # of its own validation, where there is none here
    if len(validation) > 0:
        with common.timed(seconds, "embedding"):
            crops = embed(embedder, market, validation)
        with common.timed(seconds, "ranking"):
            scored = score_and_show(args, crops, None, hamming)
        hamming = scored.hamming
        curve = scored.curve
    elif hamming is None:
        hamming = len(ATTRIBUTES)  # nothing to tune it on: nothing is rejected
    if test is None:
        print(f"\n{args.data} holds no query and bounding_box_test: no test set is scored.")
    else:
        score_test_set(args, embedder, *test, hamming, curve, seconds)


def score_test_set(args, embedder, test_query, test_gallery, hamming, curve, seconds):
    """Score a test set, two of `common.Market`, and draw --show of its ranked lists.

    curve: of validation, as of `distance_histograms`, for the probability of the same person; or
    None."""
    par.refuse_nobody(test_query, args.data, "query")
    # Junk takes no part in anything, nor in the mean distance.
    real = (test_gallery.person_ids != -1).nonzero()[:, 0]
    if len(real) == 0:
        raise UserError(f"{args.data / common.PARTS['gallery']} holds nothing but junk to rank.")
    with common.timed(seconds, "embedding"):
        query = embed(embedder, test_query)
        gallery = embed(embedder, test_gallery, real)
    places = {test_gallery.names[row]: place for place, row in enumerate(real.tolist())}
    itself = torch.tensor([places.get(name, -1) for name in test_query.names])
    query.itself = itself.to(query.ids.device)

    with common.timed(seconds, "ranking"):
        scored = score_and_show(args, query, gallery, hamming)
    print(
        "A match not returned counts as precision 0, so a threshold can only lower mAP; precision "
        "is of the lists."
    )
    if curve is not None:
        show_calibration("test set", calibrate(curve, args.prior), scored.curve, args.prior)
        if curve["cross_camera"] != scored.curve["cross_camera"]:
            print(f"It is learned from {describe_pairs(curve)}, so it does not hold for these.")
    if args.show:
        path = args.out.with_name("show.png")
        cross_camera = scored.curve["cross_camera"]
        ranked = [query, gallery, test_query, test_gallery, real]
        draw_rankings(path, *ranked, cross_camera, args.show)


def draw_rankings(path, query, gallery, test_query, test_gallery, real, cross_camera, count):
    """Draw `count` queries of the test set, spread from the highest AP to the lowest, and what is
    nearest to each. real: the rows of the test gallery that `gallery` holds."""
    scores = score_queries(query, gallery, EVERY, cross_camera)["none"]
    precision = scores[METRICS.index("mAP")]
    scored = int((scores[METRICS.index("matches")] > 0).sum())
    best_first = precision.nan_to_num(-1).argsort(descending=True)[:scored]
    spread = torch.linspace(0, scored - 1, min(count, scored)).round().long()
    picked = best_first[spread.to(best_first.device)]
    distances = torch.cdist(query.features[picked], gallery.features)
    match = gallery.ids == query.ids[picked, None]
    if cross_camera:
        own_camera = gallery.cameras == query.cameras[picked, None]
        distances[match & own_camera] = torch.inf
    leave_out_itself(distances, query, picked)
    nearest = distances.topk(min(10, len(real)), largest=False)

    rows = []
    for k, q in enumerate(picked.tolist()):
        lines = [f"query, AP {100 * precision[q]:.1f}", Path(test_query.names[q]).stem]
        row = [(test_query.images[q], lines, None)]
        found = zip(nearest.values[k].tolist(), nearest.indices[k].tolist())
        for rank, (distance, g) in enumerate(found, 1):
            if distance == torch.inf:
                continue
            verdict = "match" if match[k, g] else "other"
            colour = MATCH if match[k, g] else OTHER
            lines = [(f"{rank}: {distance:.2f}, {verdict}", colour)]
            lines.append(Path(test_gallery.names[real[g]]).stem)
            row.append((test_gallery.images[real[g]], lines, colour))
        rows.append(row)
    par.draw_sheet(path, rows)


def embed_test_set(args, embedder, checkpoint, seconds):
    """Write the test set's embeddings to --embed as NumPy arrays."""
    if args.embed.exists() and is_index(args.embed):
        raise UserError(
            f"{args.embed} is an index of a --gallery: name that folder too, or give another file."
        )
    arrays = {}
    for name in ("query", "gallery"):
        with common.timed(seconds, "loading and embedding"):
            part = common.load_market(args.data, name, args.size, annotated=False)
            arrays[f"{name}_features"] = embedder(part.images).numpy()
        arrays[f"{name}_ids"] = part.person_ids.numpy()
        arrays[f"{name}_cameras"] = part.camera_ids.numpy()
        arrays[f"{name}_names"] = np.array(part.names)
    common.write_whole(args.embed, lambda file: np.savez(file, **arrays))
    print(
        f"{args.embed}: {len(arrays['query_ids'])} query and {len(arrays['gallery_ids'])} gallery "
        "embeddings"
    )


class FeatureExport(nn.Module):
    """What --export writes: crops [N, 3, H, W] in 0..255 -> features [N, D]."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, crops):
        return self.model(crops).features


def export_features(args, embedder, checkpoint, seconds):
    """Write the network that embeds crops to --export, by `par.write_network`."""
    with common.timed(seconds, "exporting"):
        model = FeatureExport(embedder.model.to("cpu"))
        par.write_network(args.export, model, ["features"], embedder.size)


# ------------------------------------------------------------------------------------------
# The user's images.

SECONDS_PER_SAVE = 60  # of an index that is being written


class Entry(NamedTuple):
    """A file of an index, as it was when it was embedded."""

    name: str  # relative to the index, so that both can be moved, but for one on another drive
    size: int  # in bytes
    time: int  # of its last change, in ns


def describe_file(path, home):
    """The `Entry` of a file in an index in folder `home`."""
    own = path.parent.resolve() / path.name
    stat = path.stat()
    name = str(own)
    if own.drive == home.drive:
        name = Path(os.path.relpath(own, home)).as_posix()
    return Entry(name, stat.st_size, stat.st_mtime_ns)


def identify(checkpoint):
    """What tells a checkpoint from others: its run, and how far that had come."""
    return [checkpoint["record"]["run"], str(checkpoint["record"]["best epoch"])]


def is_index(path):
    """Whether a file begins as an index of one's own crops does."""
    return b"checkpoint.npy" in np.fromfile(path, np.uint8, 99).tobytes()


class Index:
    """Embeddings of one's own crops, kept in a file: NAME.npz, of --embed.

    arrays, each with a row for an `Entry`: names, sizes, times; features, float32 [N, D]; and
    log_p, float32 [N, 41], or [N, 0] where no attributes are predicted."""

    KEYS = ("names", "sizes", "times", "features", "log_p")

    def __init__(self, path, checkpoint):
        self.path = path
        self.origin = identify(checkpoint)
        self.arrays = {}

    def load(self):
        """Read the file; UserError if it is of another checkpoint, or damaged."""
        try:
            with open(self.path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
                origin = [str(part) for part in arrays["checkpoint"].tolist()]
                self.arrays = {key: arrays[f"gallery_{key}"] for key in self.KEYS}
        except FileNotFoundError:
            raise UserError(
                f"{self.path} does not exist: write one by --embed NEW.npz --gallery FOLDER."
            ) from None
        except Exception as error:  # NumPy and zip raise a dozen types on a damaged file
            raise UserError(
                f"{self.path} is not a readable index ({type(error).__name__}): write one by "
                "--embed NEW.npz --gallery FOLDER."
            ) from None
        if origin != self.origin:
            raise UserError(
                f"{self.path} is an index of another checkpoint's embeddings: write one of this, "
                "to a new name."
            )

    def rows(self):
        """A dict of `Entry` -> (features [D], log_p [41])."""
        columns = [self.arrays[key].tolist() for key in ("names", "sizes", "times")]
        values = zip(self.arrays["features"], self.arrays["log_p"])
        return dict(zip(map(Entry, *columns), values))

    def save(self, rows, wanted):
        """Write the rows of a dict, as `rows` returns it, whose entries are among the wanted ones,
        and in their order."""
        rows = {entry: rows[entry] for entry in wanted if entry in rows}
        if not rows:
            raise UserError(f"No image could be read, so {self.path} is not written.")
        for key, column in zip(self.KEYS, zip(*rows)):
            self.arrays[key] = np.array(column)
        for key, column in zip(("features", "log_p"), zip(*rows.values())):
            self.arrays[key] = np.stack(column)
        arrays = {"checkpoint": np.array(self.origin)}  # the first, for `is_index`
        arrays |= {f"gallery_{key}": array for key, array in self.arrays.items()}
        common.write_whole(self.path, lambda file: np.savez(file, **arrays))

    def file(self, row):
        """The path of a row's crop, as seen from the working directory."""
        base = self.path.parent
        if self.path.resolve() != self.path.absolute():  # a link
            base = self.path.resolve().parent
        return Path(os.path.normpath(base / self.arrays["names"][row]))


class Found(NamedTuple):
    """The user's crops, and what ranking needs of them, on the CPU."""

    file: Callable  # row -> path of the crop
    crops: Crops


def read_gallery(args, embedder, checkpoint, seconds, path):
    """Embed an image, or those in a folder, or read an index: -> `Found`."""
    if path.suffix == ".npz":
        index = Index(path, checkpoint)
        with common.timed(seconds, "reading"):
            index.load()
        file = index.file
        features = index.arrays["features"]
        log_p = index.arrays["log_p"]
    else:
        blocks = list(embed_blocks(args, embedder, list_images(path), seconds))
        if not blocks:
            raise UserError(f"No image could be read from {path}.")
        files = []
        for read, _, _ in blocks:
            files += read
        file = files.__getitem__
        features = np.concatenate([block[1] for block in blocks])
        log_p = np.concatenate([block[2] for block in blocks])
    log_p = torch.from_numpy(log_p) if log_p.size > 0 else None
    return Found(file, Crops(torch.from_numpy(features), log_p=log_p))


def list_images(path):
    """An image, or all files of a folder but for indices: -> list of Path."""
    return [file for file in par.list_files([path]) if file.suffix != ".npz"]


def embed_blocks(args, embedder, files, seconds):
    """Embed files in blocks, in bounded memory: yields (the n files that could be read, features
    float32 [n, D], log-probabilities float32 [n, 41], or [n, 0] where no attributes are
    predicted), arrays on the CPU."""
    for crops, read in par.read_blocks(files, args.size, seconds):
        with common.timed(seconds, "embedding"):
            features, log_p = embedder.describe(crops)
        if log_p is None:
            log_p = features[:, :0]
        yield read, features.cpu().numpy(), log_p.cpu().numpy()


def update_index(args, embedder, checkpoint, seconds):
    """Embed the crops in --gallery into the index --embed: what is new in the folder is embedded,
    what is known is kept, and what is not there any more is dropped."""
    home = Path(os.path.realpath(args.embed)).parent
    files = {describe_file(file, home): file for file in list_images(args.gallery)}
    index = Index(args.embed, checkpoint)
    rows = {}
    if args.embed.exists():
        with common.timed(seconds, "reading"):
            index.load()
        rows = index.rows()
        known = {entry.name for entry in rows}
        here = {entry.name for entry in files}
        if here and known.isdisjoint(here):
            raise UserError(
                f"{args.embed} names none of the files in {args.gallery}: give another name."
            )

    new = {file: entry for entry, file in files.items() if entry not in rows}
    dropped = len(rows.keys() - files.keys())
    saved = time.monotonic()
    try:
        for read, features, log_p in embed_blocks(args, embedder, list(new), seconds):
            entries = [new[file] for file in read]
            rows.update(zip(entries, zip(features, log_p)))
            # Now and then, so that a run that is killed can go on.
            if time.monotonic() - saved > SECONDS_PER_SAVE:
                index.save(rows, files)
                saved = time.monotonic()
    except KeyboardInterrupt:
        if not rows.keys().isdisjoint(files):
            index.save(rows, files)
        raise
    index.save(rows, files)

    count, dimensions = index.arrays["features"].shape
    said = f"{args.embed}: {count} gallery embeddings of {dimensions} dimensions"
    if dropped > 0:
        said += f"; dropped {dropped} out of date"
    print(said)


def draw_hits(path, rows, size):
    """As `par.draw_sheet`, of cells (file, lines, colour), whose crops are read only now; what has
    gone is left out."""
    files = {}
    for row in rows:
        files |= {file: None for file, _, _ in row}  # each once
    images, read = common.read_crops(list(files), size, skip=True)
    crops = dict(zip(read, images))
    drawn = []
    for row in rows:
        cells = [(crops[file], lines, colour) for file, lines, colour in row if file in crops]
        if cells:
            drawn.append(cells)
    if drawn:
        par.draw_sheet(path, drawn)


def describe_attributes(crops, row):
    """The predicted classes of a crop, as "hat yes"; an empty list where none are predicted."""
    if crops.log_p is None:
        return []
    classes, _ = par.most_probable(crops.log_p[row : row + 1])
    return [f"{a} {names[c]}" for (a, names), c in zip(ATTRIBUTES.items(), classes[0].tolist())]


def search(args, embedder, checkpoint, seconds):
    """List the --gallery crops that are nearest to each --search image, but for itself, and draw
    them: search.png."""
    queries = read_gallery(args, embedder, checkpoint, seconds, args.search)
    gallery = read_gallery(args, embedder, checkpoint, seconds, args.gallery)
    curve = checkpoint.get("distances")
    calibration = None if curve is None else calibrate(curve, args.prior)
    rows = []
    for chunk, distances in distance_chunks(queries.crops, gallery.crops):
        for q, row in enumerate(distances, chunk.start):
            rows.append(show_nearest(args, queries, q, gallery, row, calibration))
    if calibration is None:
        print(
            f"\nSame person: cannot be said, as {args.eval} was trained on all identities, which "
            "leaves no crops to learn it from."
        )
    else:
        source = "as on validation" if args.prior is None else "as --prior says"
        print(f"\nSame person: {describe_half(calibration, curve)}, {source}.")
    draw_hits(args.out.with_name("search.png"), [row[:11] for row in rows[:20]], args.size)


def show_nearest(args, queries, q, gallery, distances, calibration):
    """Print what is nearest to query q, by its distances [G]: -> a row of cells for `draw_hits`."""
    query = queries.file(q)
    described = describe_attributes(queries.crops, q)
    cells = [(query, ["query", query.stem, *described], None)]
    lines = []
    for rank, (distance, g) in enumerate(choose_nearest(distances, query, gallery, args.top), 1):
        file = gallery.file(g)
        told = "-"
        colour = par.GREY
        if calibration is not None:
            probability = float(calibration.probability(distance))
            told = f"{100 * probability:.1f} %"
            colour = MATCH if probability >= 0.5 else par.GREY
        theirs = describe_attributes(gallery.crops, g)
        differing = [own for asked, own in zip(described, theirs) if asked != own]
        alike = "-"
        if described:
            alike = f"{len(described) - len(differing)} of {len(described)}"
        lines.append([str(rank), f"{distance:.3f}", told, alike, str(file)])
        caption = [(f"{rank}: {distance:.2f}, {told}", colour), file.stem, f"shares {alike}"]
        caption += [(text, OTHER) for text in differing]
        cells.append((file, caption, colour))
    header = ["rank", "distance", "same person", "same attributes", "file"]
    par.print_table(f"Nearest to {query} of {len(distances)} images", header, lines)
    return cells


def choose_nearest(distances, query, gallery, count):
    """The `count` crops of the gallery that are nearest to a query, but for the file of the query
    itself, which can be there by several names: distances [G] -> list of (distance, row)."""
    tried = count + 1
    while True:
        nearest = distances.topk(min(tried, len(distances)), largest=False)
        chosen = []
        for distance, row in zip(nearest.values.tolist(), nearest.indices.tolist()):
            if gallery.file(row).resolve() != query.resolve():
                chosen.append((distance, row))
        if len(chosen) >= count or tried >= len(distances):
            return chosen[:count]
        tried *= 2


def parse_words(words):
    """What --find asks for: ["hat=no", ...] -> list of (attribute, class)."""
    asked = {}
    for word in words:
        attribute, _, name = word.lower().partition("=")
        if attribute not in ATTRIBUTES:
            known = ", ".join(ATTRIBUTES)
            raise UserError(f"--find {word}: name one of these attributes: {known}.")
        if name not in ATTRIBUTES[attribute] or attribute in asked:
            known = ", ".join(ATTRIBUTES[attribute])
            raise UserError(f"--find {word}: name one class of {attribute}: {known}.")
        asked[attribute] = name
    return list(asked.items())


def find(args, embedder, checkpoint, seconds):
    """List the crops in --gallery by the probability of the classes that --find names, and draw
    them: find.png."""
    asked = parse_words(args.find)
    if embedder.predictor is None:
        raise UserError(
            f"{args.eval} predicts no attributes to find by: train with --init, or with --recipe "
            "strong."
        )
    gallery = read_gallery(args, embedder, checkpoint, seconds, args.gallery)
    columns = []
    for attribute, name in asked:
        before = list(ATTRIBUTES).index(attribute)
        columns.append(sum(CLASS_COUNTS[:before]) + ATTRIBUTES[attribute].index(name))
    log_p = gallery.crops.log_p[:, columns]
    best = log_p.sum(1).topk(min(args.top, len(log_p)))

    words = [f"{attribute} {name}" for attribute, name in asked]
    lines = []
    cells = []
    for rank, g in enumerate(best.indices.tolist(), 1):
        file = gallery.file(g)
        together = f"{best.values[rank - 1].exp().item():.3g}"
        each = log_p[g].exp().tolist()
        probable = sum(p > 0.5 for p in each)
        lines.append([str(rank), together, f"{probable} of {len(each)}", str(file)])
        caption = [f"{rank}: {together}", file.stem]
        for word, p in zip(words, each):
            caption.append((f"{word} {p:.2f}", par.INK if p > 0.5 else OTHER))
        cells.append((file, caption, None))
    header = ["rank", "probability", "probable", "file"]
    par.print_table(f"{', '.join(words)}, among {len(log_p)} images", header, lines)
    rows = [cells[i : i + 5] for i in range(0, min(50, len(cells)), 5)]
    draw_hits(args.out.with_name("find.png"), rows, args.size)


# ------------------------------------------------------------------------------------------
# The command line.

# What --without can leave out of the strong recipe; "neck" is the BNNeck, "mirror" the mirror image
# at test.
RUNGS = "identity triplets attributes neck stride erasing shift muon mirror".split()
DEFAULTS = {
    "report": {"epochs": 10, "lr": 2e-5, "batch": 32, "patience": 5},
    "strong": {"epochs": 24, "lr": 2e-3, "batch": 32, "patience": 999, "muon": 20},
    "pretrained": {"muon": 5},
}


def make_parser():
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]",
        description=__doc__.split("[report]")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    group = parser.add_argument_group("start from stage 1, or score").add_mutually_exclusive_group()
    group.add_argument(
        "--init",
        type=Path,
        metavar="FILE",
        help="train from this checkpoint of par.py, with its split and size",
    )
    group.add_argument(
        "--eval",
        type=Path,
        metavar="FILE",
        help="score this checkpoint of reid.py instead of training",
    )
    training_flags(parser.add_argument_group("to train (the last four by the report's recipe)"))
    ranking_flags(parser.add_argument_group("to rank"))
    using_flags(parser.add_argument_group("with --eval"))
    par.shared_flags(parser, DEFAULTS, "reid_best.pt", RUNGS)
    return parser


def training_flags(group):
    group.add_argument(
        "--identities",
        choices=("train", "all"),
        default="train",
        help="all: train on all identities, validate on none, and keep the last epoch (train)",
    )
    group.add_argument(
        "--compare",
        action="store_true",
        help="train also without --init, from the weights that stage 1 began from or --weights: "
        "table 1",
    )
    # The report gives no margin, of squared distances. Of 1, 10 and 40, 10 had the highest
    # validation mAP (RESULTS.md): a small one leaves few triplets a loss, a large one pushes on
    # what is apart already.
    group.add_argument(
        "--margin",
        type=par.number(float, 0),
        default=10.0,
        metavar="M",
        help="margin of the triplet loss, of squared distances (10)",
    )
    group.add_argument(
        "--dim",
        type=par.number(int, 1, 4096),
        default=120,
        metavar="N",
        help="dimensions of the embedding (120)",
    )
    group.add_argument(
        "--clusters",
        type=par.number(int, 1),
        default=100,
        metavar="N",
        help="clusters by colour, from which negatives come (100)",
    )
    group.add_argument(
        "--negatives",
        choices=("cluster", "random"),
        default="cluster",
        help="draw negatives from the anchor's cluster, or from anywhere (cluster)",
    )


def ranking_flags(group):
    group.add_argument(
        "--rerank",
        action="store_true",
        help="add a row for k-reciprocal re-ranking to the tables; --search has none",
    )
    group.add_argument(
        "--hamming",
        type=par.number(int, 0, len(ATTRIBUTES)),
        metavar="K",
        help="return crops of which at most K predicted attributes differ (validation's best)",
    )
    group.add_argument(
        "--threshold",
        type=par.number(float, 0, word="mean"),
        default="mean",
        metavar="T",
        help="return crops at less than this distance (mean: of all pairs, report section 4.2.1)",
    )
    group.add_argument(
        "--prior",
        type=par.number(float, 1e-12, 1 - 1e-6),
        metavar="P",
        help="share of matches among pairs across cameras, for the probability of the same person: "
        "10 among 10,000 are 0.001 (that of the validation crops)",
    )


def using_flags(group):
    only = group.add_mutually_exclusive_group()
    only.add_argument(
        "--embed",
        type=Path,
        metavar="F.npz",
        help="write embeddings of the test set, or of --gallery: an index",
    )
    only.add_argument(
        "--show",
        type=par.number(int, 1, 100),
        metavar="N",
        help="draw N of the test set's ranked lists: show.png",
    )
    only.add_argument(
        "--search",
        type=Path,
        metavar="QUERY",
        help="find who is nearest to this image, or to each in this folder; search.png shows the "
        "first 20",
    )
    only.add_argument(
        "--find",
        nargs="+",
        metavar="WORD",
        help="find by attributes, hat=no upcolor=red: find.png",
    )
    par.export_flag(only)
    group.add_argument(
        "--gallery",
        type=Path,
        metavar="FOLDER",
        help="images to --embed, or to --search or --find in; or, to search in, an index F.npz",
    )
    group.add_argument(
        "--top",
        type=par.number(int, 1),
        default=10,
        metavar="K",
        help="list K images; 10 a query are drawn, 50 by --find (10)",
    )


def check_flags(parser, args):
    """End with a sentence where flags do not go together."""
    for name in ("embed", "show", "search", "find", "gallery"):
        if getattr(args, name) is not None and not args.eval:
            parser.error(f"--{name} needs --eval FILE, the checkpoint to do it with.")
    par.check_export(parser, args)
    looking = args.search or args.find
    if looking and not args.gallery:
        parser.error("--search QUERY, or --find, goes with --gallery FOLDER, the images to search.")
    if args.gallery and not looking and not args.embed:
        parser.error("--gallery goes with --search QUERY, --find or --embed.")
    if args.compare and (not args.init or args.identities == "all"):
        parser.error(
            "--compare trains with and without transfer and compares on validation identities: it "
            "needs --init FILE, a checkpoint of par.py, and not --identities all, which leaves "
            "none."
        )
    par.refuse_idle_flags(parser, args, flag_rules(args))
    written = [os.path.realpath(out) for out in (args.out, without_transfer(args.out))]
    if args.init and os.path.realpath(args.init) in written:
        parser.error(f"--out {args.out} would replace the checkpoint of --init: give another name.")


def without_transfer(out):
    """Where --compare writes the checkpoint that it trains without transfer."""
    return out.with_stem(out.stem + "_without")


def flag_rules(args):
    """For `par.refuse_idle_flags`: names, whether they have an effect here, what they go with."""
    training = not args.eval
    scored = training and args.identities == "train"  # on validation
    if args.eval:
        scored = not (args.embed or args.search or args.find or args.export)
    from_weights = training and (args.compare or not args.init)
    by_report = training and args.recipe == "report"
    by_clusters = by_report and args.negatives == "cluster"
    to_look = args.search or args.find
    return [
        ("weights", from_weights, "without --init, or to --compare"),
        (par.TRAINING_FLAGS, training, "in training"),
        ("muon", par.uses_muon(args), "in training by --recipe strong with its step muon"),
        ("identities", training, "in training"),
        ("margin dim negatives", by_report, "in training by --recipe report"),
        ("clusters", by_clusters, "with negatives from clusters, by --recipe report"),
        ("patience rerank hamming threshold", scored, "where validation or test crops are ranked"),
        ("prior", scored or args.search, "where a probability of the same person is shown"),
        ("top", to_look, "with --search or --find"),
    ]


def main(args):
    source = args.eval or args.init
    checkpoint = None
    if source:
        checkpoint = common.load_checkpoint(source, "reid" if args.eval else "par")
    record = par.start(args, source, checkpoint, data=not (args.gallery or args.export))
    if args.eval:
        use(args, checkpoint, record["seconds"])
    else:
        inherit(args, checkpoint)
        train_all(args, record, checkpoint)


def choose_use(args):
    """What --eval and the flags beside it ask for: (function, the file that it writes or None)."""
    if args.search:
        return search, args.out.with_name("search.png")
    if args.find:
        return find, args.out.with_name("find.png")
    if args.show:
        return evaluate, args.out.with_name("show.png")
    if args.embed and args.gallery:
        return update_index, args.embed
    if args.embed:
        return embed_test_set, args.embed
    if args.export:
        return export_features, args.export
    return evaluate, None


def use(args, checkpoint, seconds):
    """Do with a checkpoint what the command line asks for."""
    function, written = choose_use(args)
    if written is not None:
        par.check_output(written, ".npz" if args.embed else written.suffix)
    embedder = make_embedder(checkpoint, args.device)
    if args.prior is not None and "distances" not in checkpoint:
        raise UserError(
            f"--prior has no effect here, as {args.eval} was trained on all identities, which "
            "leaves no crops to learn a probability from: leave it out."
        )
    if args.hamming is not None and embedder.predictor is None:
        raise UserError(
            f"--hamming has no effect here, as {args.eval} predicts no attributes: leave it out."
        )
    function(args, embedder, checkpoint, seconds)
    par.say_seconds(seconds)


def inherit(args, stage_1):
    """Take over what a network that starts from stage 1 has to have in common with it."""
    args.head = "linear"
    if stage_1 is not None:
        settings = stage_1["record"]["arguments"]
        args.head = settings["head"]
        if args.compare and (args.weights == "none") != (settings["weights"] == "none"):
            raise UserError(
                f"--weights {args.weights} would not be compared with its like, as {args.init} "
                f"began with --weights {settings['weights']}: leave --weights out."
            )
        if args.recipe == "report" and "stride" in settings["rungs"]:
            args.rungs = ["stride"]


def train_all(args, record, stage_1):
    """Train, or with --compare twice, and print [report] table 1."""
    par.check_output(args.out, ".pt")
    if args.compare:
        par.check_output(without_transfer(args.out), ".pt")
    with common.timed(record["seconds"], "loading"):
        market = par.load_train(args, "attributes" in args.rungs)
    ids = market.person_ids
    if args.hamming is not None and stage_1 is None and "attributes" not in args.rungs:
        raise UserError(
            "--hamming has no effect here, as no attributes are predicted: leave it out, or pass "
            "--init FILE."
        )
    if args.identities == "all":
        split = (ids > 0, ids < 1)
    elif stage_1 is not None:
        split = par.saved_split(stage_1, market, args.init)
    else:
        split = common.split_identities(ids, seed=args.seed)

    record["fingerprints"] = {"data set": market.fingerprint(), "stage 1": None}
    if args.compare:  # first, as only this one reads --weights: what is wrong with them is told
        out = without_transfer(args.out)
        plain_args = argparse.Namespace(**vars(args) | {"init": None, "out": out})
        plain = train(plain_args, record, None, market, split)
    if stage_1 is not None:
        record["fingerprints"]["stage 1"] = identify(stage_1)
    results = train(args, record, stage_1, market, split)
    if args.compare:
        rows = []
        for protocol in results:
            pair = [run[protocol]["none"]["mAP"] for run in (plain, results)]
            rows.append([protocol, *(100 * value for value in pair)])
        header = ["protocol", "without transfer", "with transfer"]
        par.print_table("Table 1: mAP (%)", header, rows)


if __name__ == "__main__":
    common.run(make_parser(), check_flags, main)
