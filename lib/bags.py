"""Bags of words, and the cross-entropy of a softmax over all words with them, without a dense copy of the corpus.

A document is x = c + s: its counts c [V], of which about a hundred of 10,000 are not zero, plus the smoothing vector
s [V], which sums to 1. With logits l = W h + b the cross-entropy is -x . log softmax(l) = |x| log Z(l) - c.l - s.l.
Only log Z and its gradient, the softmax, are dense. They are computed for a few documents at a time, and the gradient
while these are in the cache, so that the [documents, V] matrix never exists as a whole.

On CUDA training takes dense counts: the shapes are static, as a CUDA graph needs, and the products cost little.
"""
import warnings

import torch
import torch.nn.functional as F
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
        self.dense = counts.to_dense().to(torch.int16).to(device) if dense else None

    def __len__(self) -> int:
        return len(self.total)

    def batch(self, items: Tensor) -> "SparseBag | DenseBag":
        """The documents of these numbers [B]; -1 is taken as 0 (give it no weight)."""
        items = items.clamp(min=0)
        known = self.smoothing, self.total[items], self.offset[items]
        if self.dense is not None:
            return DenseBag(self.dense[items].float(), *known)
        first, length = self.crow[items], self.crow[items + 1] - self.crow[items]
        end = length.cumsum(0)
        row = torch.repeat_interleave(torch.arange(len(items), device=items.device), length)
        at = torch.arange(len(row), device=items.device) + (first - end + length)[row]
        return SparseBag(row, self.col[at], self.val[at], end, *known)

    def bags(self, size: int = 512):
        """All documents in order, in batches of `size`."""
        for items in torch.arange(len(self), device=self.device).split(size):
            yield self.batch(items)


class DenseBag:
    """B documents by all their counts [B, V]."""

    def __init__(self, counts: Tensor, smoothing: Tensor, total: Tensor, offset: Tensor):
        self.counts, self.smoothing, self.total, self.offset = counts, smoothing, total, offset

    def project(self, weight: Tensor) -> Tensor:
        """x @ weight: [V, n] -> [B, n]."""
        return (self.counts + self.smoothing).to(weight.dtype) @ weight

    def parts(self, samples: int):
        """(slice of the documents, their bag), so small that `samples` logits of each are a good size: here all."""
        yield slice(None), self

    def dot(self, logits: Tensor) -> Tensor:
        """c . l of each sample and document: [S, B, V] -> [S, B]."""
        return (logits * self.counts).sum(-1)

    def subtract_from(self, gradient: Tensor, scale: Tensor) -> None:
        """gradient [S, B, V] -= scale [B] times the counts."""
        gradient.sub_(self.counts * scale[:, None])


class SparseBag:
    """B documents by the counts that are not zero: their rows, words and values, document by document; end [B]."""

    def __init__(self, row: Tensor, word: Tensor, value: Tensor, end: Tensor, smoothing: Tensor, total: Tensor,
                 offset: Tensor):
        self.row, self.word, self.value, self.end = row, word, value, end
        self.smoothing, self.total, self.offset = smoothing, total, offset

    def project(self, weight: Tensor) -> Tensor:
        """x @ weight: [V, n] -> [B, n]."""
        return _Project.apply(weight, self)

    def parts(self, samples: int):
        """(slice of the documents, their bag), so small that `samples` logits of each are a good size."""
        size, n = max(1, PART // samples), len(self.total)
        ends = [0, *self.end[size - 1::size].tolist(), len(self.row)]
        for i, begin, end in zip(range(0, n, size), ends, ends[1:], strict=False):
            documents = slice(i, min(i + size, n))
            yield documents, SparseBag(self.row[begin:end] - i, self.word[begin:end], self.value[begin:end],
                                       self.end[documents] - begin, self.smoothing, self.total[documents],
                                       self.offset[documents])

    def dot(self, logits: Tensor) -> Tensor:
        """c . l of each sample and document: [S, B, V] -> [S, B]."""
        values = logits.flatten(1)[:, self._at(logits)] * self.value
        return values.new_zeros(len(logits), len(self.total)).index_add_(1, self.row, values)

    def subtract_from(self, gradient: Tensor, scale: Tensor) -> None:
        """gradient [S, B, V] -= scale [B] times the counts."""
        gradient.view(len(gradient), -1)[:, self._at(gradient)] -= self.value * scale[self.row]

    def _at(self, logits: Tensor) -> Tensor:
        return self.row * logits.shape[-1] + self.word


class _Project(torch.autograd.Function):
    """x @ weight of a SparseBag; the gradient of the weight is a product with a sparse matrix as well."""

    @staticmethod
    def forward(ctx, weight: Tensor, bag: SparseBag) -> Tensor:
        ctx.bag, ctx.words = bag, len(weight)
        counted = F.embedding_bag(bag.word, weight, F.pad(bag.end[:-1], (1, 0)), mode="sum",
                                  per_sample_weights=bag.value.to(weight.dtype))
        return counted + (bag.smoothing.to(weight.dtype) @ weight).to(weight.dtype)

    @staticmethod
    def backward(ctx, g: Tensor):
        bag = ctx.bag
        with warnings.catch_warnings(), torch.autocast(g.device.type, enabled=False):    # no sparse product in bf16
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            counts = torch.sparse_coo_tensor(torch.stack([bag.word, bag.row]), bag.value.to(g.dtype),
                                             (ctx.words, len(g))).to_sparse_csr()
            return torch.addr(counts @ g, bag.smoothing.to(g.dtype), g.sum(0)), None


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
        counted, smooth = (h.new_empty(h.shape[:2], dtype=torch.promote_types(h.dtype, torch.float32)) for _ in "12")
        grads = [torch.zeros_like(t, dtype=counted.dtype) if need else None
                 for t, need in zip((h, weight, bias), ctx.needs_input_grad, strict=False)]
        for at, part in bag.parts(len(h)):
            flat, s = h[:, at].flatten(0, 1), part.smoothing.to(counted.dtype)
            logits = F.linear(flat, weight, bias).to(counted.dtype).unflatten(0, (len(h), -1))
            p = torch.softmax(logits, -1)
            log_z = logits.amax(-1) - p.amax(-1).log()               # the largest p is at least 1/V
            counted[:, at] = (part.total - 1) * log_z - part.dot(logits)
            smooth[:, at] = log_z - logits @ s
            if any(grad is not None for grad in grads):
                _accumulate(grads, p, flat, weight, part, scale[at], at)
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(counted, smooth)
        return ((counted + smooth) * scale).sum(), counted, smooth

    @staticmethod
    def backward(ctx, g, *_):
        return *(None if grad is None else g * grad for grad in ctx.saved_tensors), None, None


def _accumulate(grads: list, p: Tensor, flat: Tensor, weight: Tensor, part, scale: Tensor, at: slice) -> None:
    """Add the gradients of `part` to those for h, weight and bias; overwrites p [S, B, V] with that for the logits."""
    samples = len(p)
    p.mul_((part.total * scale)[:, None])
    p.view(-1, p.shape[-1]).addr_(scale.repeat(samples), part.smoothing.to(p.dtype), alpha=-1)
    part.subtract_from(p, scale)
    rows = p.flatten(0, 1)
    if grads[0] is not None:
        grads[0][:, at] = (rows.to(flat.dtype) @ weight.to(flat.dtype)).unflatten(0, (samples, -1))
    if grads[1] is not None:
        grads[1] += rows.to(flat.dtype).T @ flat
    if grads[2] is not None:
        grads[2] += rows.sum(0)
