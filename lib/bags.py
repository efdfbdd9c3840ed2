"""Bags of words, and the cross-entropy of a softmax over all words with them, without a dense copy of the corpus.

A document is x = c + s: its counts c [V], of which about a hundred of 10,000 are not zero, plus the smoothing vector
s [V], which sums to 1. With logits l = W h + b the cross-entropy is

    -x . log softmax(l) = |x| log Z(l) - (x W) . h - x . b,    |x| = sum_w x_w.

All that meets x is a sparse product with few columns. Only log Z and its gradient, the softmax, are dense: on the CPU
they are computed for a few documents at a time, so that they stay in the cache and the [documents, V] matrix never
exists as a whole.

On CUDA training takes dense counts: the shapes are static, as a CUDA graph needs, and the products cost little.
"""
import torch
import torch.nn.functional as F
from scipy.sparse import csc_array
from torch import Tensor

PART = 128            # rows of logits at a time on the CPU: 5 MB for 10,000 words (measured: benchmarks/semhash.py)


class Corpus:
    """Documents as the steps take them: counts sparse CSR [N, V], smoothing [V].

    total [N] = |x|, the words of a document plus 1; offset [N] = sum_w x_w log(x_w / |x|), what the objective adds to
    the cross-entropy (nats, at most 0); `words`: all words of all documents. Computed in float64.
    dense: also keep the counts as one matrix int16 [N, V] on the device, which batches are then rows of.
    """

    def __init__(self, counts: Tensor, smoothing: Tensor, device: torch.device | str = "cpu", dense: bool = False):
        self.crow, self.col = counts.crow_indices().long().cpu(), counts.col_indices().long().cpu()
        c, s = counts.values().double().cpu(), smoothing.double().cpu()
        row = torch.repeat_interleave(torch.arange(len(counts)), self.crow.diff())
        per_document = torch.zeros(len(counts), dtype=torch.float64)
        total = per_document.index_add(0, row, c) + s.sum()
        seen, all_s = s[self.col], torch.special.xlogy(s, s).sum()
        x_log_x = all_s + per_document.index_add(0, row, torch.special.xlogy(c + seen, c + seen)
                                                 - torch.special.xlogy(seen, seen))
        self.total, self.offset = total.float().to(device), (x_log_x - total * total.log()).float().to(device)
        self.words, self.smoothing, self.device = c.sum().item(), smoothing.float().to(device), torch.device(device)
        self.crow, self.col, self.val = self.crow.to(device), self.col.to(device), c.float().to(device)
        self.dense = _dense(counts).to(device) if dense else None

    def __len__(self) -> int:
        return len(self.total)

    def batch(self, items: Tensor) -> "SparseBag | DenseBag":
        """The documents of these numbers [B]; -1 is taken as 0 (give it no weight)."""
        items = items.clamp(min=0)
        known = self.smoothing, self.total[items], self.offset[items]
        if self.dense is not None:
            return DenseBag(self.dense[items] + self.smoothing, *known)
        first, length = self.crow[items], self.crow[items + 1] - self.crow[items]
        start = F.pad(length.cumsum(0), (1, 0))
        shift = torch.repeat_interleave(first - start[:-1], length)
        at = torch.arange(len(shift), device=items.device) + shift
        return SparseBag(self.col[at], self.val[at], start, *known)

    def bags(self, size: int = 512):
        """All documents in order, in batches of `size`."""
        for items in torch.arange(len(self), device=self.device).split(size):
            yield self.batch(items)


def _dense(counts: Tensor) -> Tensor:
    """int16 [N, V] of sparse CSR counts. Raises ValueError if one does not fit."""
    if len(counts.values()) and counts.values().max() > torch.iinfo(torch.int16).max:
        raise ValueError(f"a word is counted {counts.values().max():.0f} times in a document: at most "
                         f"{torch.iinfo(torch.int16).max} are foreseen")
    row = torch.repeat_interleave(torch.arange(len(counts)), counts.crow_indices().diff().cpu())
    dense = torch.zeros(counts.shape, dtype=torch.int16)
    dense[row, counts.col_indices().cpu()] = counts.values().to("cpu", torch.int16)
    return dense


class DenseBag:
    """B documents by all their smoothed counts x [B, V]."""

    def __init__(self, x: Tensor, smoothing: Tensor, total: Tensor, offset: Tensor):
        self.x, self.smoothing, self.total, self.offset = x, smoothing, total, offset

    def project(self, weight: Tensor) -> Tensor:
        """x @ weight: [V, n] -> [B, n], in the precision of the weight, autocast or not."""
        return _Project.apply(weight, self)

    def times(self, weight: Tensor) -> Tensor:
        """x @ weight, for `project`."""
        return self.x.to(weight.dtype) @ weight

    def back_times(self, g: Tensor, words: int) -> Tensor:
        """x^T @ g: [B, n] -> [V, n], for the gradient of `project`."""
        return self.x.to(g.dtype).T @ g


class SparseBag:
    """B documents by the counts that are not zero: word and value, document i's from start[i] to start[i + 1]."""

    def __init__(self, word: Tensor, value: Tensor, start: Tensor, smoothing: Tensor, total: Tensor, offset: Tensor):
        self.word, self.value, self.start = word, value, start
        self.smoothing, self.total, self.offset = smoothing, total, offset

    def project(self, weight: Tensor) -> Tensor:
        """x @ weight: [V, n] -> [B, n], in the precision of the weight, autocast or not."""
        return _Project.apply(weight, self)

    def times(self, weight: Tensor) -> Tensor:
        """x @ weight, for `project`."""
        counted = F.embedding_bag(self.word, weight, self.start, mode="sum", include_last_offset=True,
                                  per_sample_weights=self.value.to(weight.dtype))
        return counted + self.smoothing.to(weight.dtype) @ weight

    def back_times(self, g: Tensor, words: int) -> Tensor:
        """x^T @ g: [B, n] -> [V, n], for the gradient of `project`."""
        if g.is_cuda:
            row = torch.repeat_interleave(torch.arange(len(g), device=g.device), self.start.diff())
            counted = g.new_zeros(words, g.shape[1]).index_add_(0, self.word, g[row] * self.value.to(g.dtype)[:, None])
        else:                                    # on the CPU adding row by row takes longer than all the rest of a step
            counts = csc_array((self.value.numpy(), self.word.numpy(), self.start.numpy()), (words, len(g))).tocsr()
            row, value, start = map(torch.from_numpy, (counts.indices, counts.data, counts.indptr))
            counted = F.embedding_bag(row, g, start, mode="sum", include_last_offset=True,
                                      per_sample_weights=value.to(g.dtype))
        return counted.addr_(self.smoothing.to(g.dtype), g.sum(0))


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, bag):
        ctx.bag, ctx.words = bag, len(weight)
        with torch.autocast(weight.device.type, enabled=False):
            return bag.times(weight)

    @staticmethod
    def backward(ctx, g):
        with torch.autocast(g.device.type, enabled=False):
            return ctx.bag.back_times(g, ctx.words), None


def cross_entropy(h: Tensor, weight: Tensor, bias: Tensor, bag: SparseBag | DenseBag,
                  scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, -c . log p, -s . log p) of log p = log softmax(W h + b), for S hidden vectors of each document.

    h [S, B, n], weight [V, n], bias [V], bag of B documents, scale [B]; the last two results are nats [S, B] without
    gradient, their sum is the cross-entropy. loss = sum over S and B of scale times it, a 0-d tensor; its gradients for
    h, weight and bias are computed on the way, where gradients are enabled.
    """
    if not torch.is_grad_enabled():
        h, weight, bias = h.detach(), weight.detach(), bias.detach()
    return _CrossEntropy.apply(h, weight, bias, bag, scale)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, bias, bag, scale):
        with torch.autocast(weight.device.type, enabled=False):
            x_w, s, column = bag.times(weight), bag.smoothing.to(weight.dtype), scale.to(weight.dtype)[:, None]
            x_l = (h * x_w).sum(-1) + bag.times(bias[:, None]).T
            s_l = (h * (s @ weight)).sum(-1) + s @ bias
            need, words = ctx.needs_input_grad, len(weight)               # of -x . l first, those of log Z are added
            grads = [(-column * x_w).repeat(len(h), 1, 1) if need[0] else None,
                     bag.back_times(-(h * column).sum(0), words) if need[1] else None,
                     bag.back_times(-len(h) * column, words)[:, 0] if need[2] else None]
        flat, scales = h.flatten(0, 1), (bag.total * scale).to(weight.dtype).repeat(len(h))
        size = PART if flat.device.type == "cpu" else len(flat)
        log_z = torch.cat([_log_z(flat[i:i + size], weight, bias, scales[i:i + size], grads, i)
                           for i in range(0, len(flat), size)]).view(x_l.shape)
        counted, smooth = (bag.total - 1) * log_z - (x_l - s_l), log_z - s_l
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(counted, smooth)
        return ((counted + smooth) * scale).sum(), counted, smooth

    @staticmethod
    def backward(ctx, g, *_):
        return *(None if grad is None else g * grad for grad in ctx.saved_tensors), None, None


def _log_z(h: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, grads: list, first: int) -> Tensor:
    """log Z of rows h [R, n], h[0] the `first` of all; the gradients of scale . log Z join those of all rows."""
    logits = F.linear(h, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    p = torch.softmax(logits, -1)
    if grads[0] is not None:
        grads[0].flatten(0, 1)[first:first + len(h)] += (p @ weight) * scale[:, None]
    if grads[1] is not None:
        grads[1] += p.T @ (h * scale[:, None])
    if grads[2] is not None:
        grads[2].addmv_(p.T, scale)
    return logits.amax(-1) - p.amax(-1).log()                                   # the largest p is at least 1/V
