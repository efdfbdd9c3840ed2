"""Bags of words: what is computed from the counts that are not zero, against dense float64 and plain autograd."""
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lib import bags, documents
from lib.train import generator, precision

WORDS, N = 23, 9
EMPTY = [1, 4, 8]
ITEMS = torch.tensor([8, 2, 7, 1, -1, 2, 5, 4])                                # some twice, some empty, one absent
KINDS = pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def counts(empty=EMPTY):
    found = torch.poisson(torch.full((N, WORDS), 0.4), generator=generator(1))
    found[-2] = 0
    found[-2, 3] = 900                                                         # a document of one word
    found[empty] = 0
    return found


def corpus(counts, dense=False):
    """A corpus, and its x = c + s dense in float64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                                        # sparse CSR is in beta
        sparse = counts.to_sparse_csr()
    made = bags.Corpus(sparse, documents.smoothing(sparse), dense=dense)
    return made, counts.double() + made.smoothing.double()


def layer(samples, n=5, batch=8):
    """h [S, B, n], W [V, n] and b [V] that take gradients."""
    shapes = (samples, batch, n), (WORDS, n), (WORDS,)
    return [normal(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]


def direct(h, weight, bias, x, s, scale):
    """The loss and its two parts from the definition."""
    log_p = torch.log_softmax(h @ weight.T + bias, -1)
    counted, smooth = -((x - s) * log_p).sum(-1), -(s * log_p).sum(-1)
    return ((counted + smooth) * scale).sum(), counted, smooth


# ------------------------------------------------------------------------------------------------ documents
@KINDS
def test_a_corpus_knows_its_totals_and_its_entropies(dense):
    made, x = corpus(counts(), dense)
    total = x.sum(1)
    assert len(made) == N and made.words == counts().sum().item() and (made.dense is not None) == dense
    torch.testing.assert_close(made.total.double(), total, rtol=1e-6, atol=0)
    torch.testing.assert_close(made.offset.double(), (x * (x / total[:, None]).log()).sum(1), rtol=1e-6, atol=1e-5)
    assert (made.offset <= 0).all() and made.total[EMPTY].tolist() == pytest.approx([1, 1, 1])


@KINDS
def test_a_batch_is_its_documents_and_an_absent_one_is_the_first(dense):
    (made, x), words = corpus(counts(), dense), torch.eye(WORDS, dtype=torch.float64)
    bag, shown = made.batch(ITEMS), ITEMS.clamp(0)
    assert type(bag) is (bags.DenseBag if dense else bags.SparseBag)
    torch.testing.assert_close(bag.project(words), x[shown], rtol=1e-6, atol=1e-9)
    assert torch.equal(bag.total, made.total[shown]) and torch.equal(bag.offset, made.offset[shown])
    parts = list(made.bags(4))
    assert [len(part.total) for part in parts] == [4, 4, 1]
    torch.testing.assert_close(torch.cat([part.project(words) for part in parts]), x, rtol=1e-6, atol=1e-9)


@KINDS
@pytest.mark.parametrize("columns", [1, 6])
def test_a_projection_and_its_gradient_are_those_of_the_dense_product(dense, columns):
    made, x = corpus(counts(), dense)
    weight, g = normal(WORDS, columns).requires_grad_(), normal(len(ITEMS), columns, seed=1)
    found, expected = made.batch(ITEMS).project(weight), x[ITEMS.clamp(0)] @ weight
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(*(torch.autograd.grad(y, weight, g)[0] for y in (found, expected)), rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------ cross-entropy
@KINDS
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("part", [1, 3, 1000])
def test_the_cross_entropy_and_every_gradient_are_those_of_the_dense_softmax(dense, samples, part, monkeypatch):
    """Whatever part of the rows is done at a time."""
    monkeypatch.setattr(bags, "PART", part)
    (made, x), variables, scale = corpus(counts(), dense), layer(samples), normal(len(ITEMS), seed=9)
    found = bags.cross_entropy(*variables, made.batch(ITEMS), scale)
    expected = direct(*variables, x[ITEMS.clamp(0)], made.smoothing.double(), scale)
    for own, other in zip(found, expected, strict=True):
        assert own.shape == other.shape
        torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-6, check_dtype=True)
    assert [part.requires_grad for part in found] == [True, False, False]
    gradients = [torch.autograd.grad(-3 * loss, variables) for loss in (found[0], expected[0])]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-5)


@KINDS
def test_in_single_precision_it_agrees_to_a_ten_thousandth(dense):
    (made, x), exact = corpus(counts(), dense), layer(2)
    scale = torch.full((len(ITEMS),), 1 / len(ITEMS))
    single = [variable.detach().float().requires_grad_() for variable in exact]
    found = bags.cross_entropy(*single, made.batch(ITEMS), scale)
    expected = direct(*exact, x[ITEMS.clamp(0)], made.smoothing.double(), scale)
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own.double(), other, rtol=1e-5, atol=1e-4)
    for own, other in zip(torch.autograd.grad(found[0], single), torch.autograd.grad(expected[0], exact), strict=True):
        torch.testing.assert_close(own.double(), other, rtol=1e-5, atol=1e-4)


def test_only_what_is_asked_for_is_differentiated():
    """In the first layer of a decoder without hidden ones h are bits: nothing is computed for them."""
    (made, _), (h, weight, bias), scale = corpus(counts()), layer(2), torch.ones(len(ITEMS))
    bag = made.batch(ITEMS)
    every = torch.autograd.grad(bags.cross_entropy(h, weight, bias, bag, scale)[0], (h, weight, bias))
    for kept in ([1, 2], [0], [2]):
        given = [value if i in kept else value.detach() for i, value in enumerate((h, weight, bias))]
        found = torch.autograd.grad(bags.cross_entropy(*given, bag, scale)[0], [given[i] for i in kept])
        torch.testing.assert_close(found, tuple(every[i] for i in kept))
    with torch.no_grad():
        silent = bags.cross_entropy(h, weight, bias, bag, scale)
    assert not silent[0].requires_grad
    torch.testing.assert_close(silent, tuple(part.detach() for part in bags.cross_entropy(h, weight, bias, bag, scale)))


@KINDS
def test_logits_of_any_size_keep_log_z_finite(dense):
    """A thousand nats apart: the other words' exponentials are zero, the largest probability is 1."""
    (made, x), (h, weight, bias) = corpus(counts(), dense), layer(2)
    given = [(1000 * h).detach().float(), weight.detach().float(), (bias - 5000).detach().float()]
    found = bags.cross_entropy(*given, made.batch(ITEMS), torch.ones(len(ITEMS)))
    expected = direct(*(value.double() for value in given), x[ITEMS.clamp(0)], made.smoothing.double(), 1)
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own.double(), other, rtol=1e-5, atol=1e-2)


@KINDS
def test_a_corpus_of_empty_documents_is_explained_by_the_smoothing_alone(dense):
    made, x = corpus(torch.zeros(N, WORDS), dense)
    assert made.words == 0 and torch.equal(made.smoothing, torch.full((WORDS,), 1 / WORDS))
    variables, scale = layer(2), torch.ones(len(ITEMS))
    found = bags.cross_entropy(*variables, made.batch(ITEMS), scale)
    expected = direct(*variables, x[ITEMS.clamp(0)], made.smoothing.double(), scale)
    assert found[1].abs().max() < 1e-6
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(*(torch.autograd.grad(loss, variables) for loss in (found[0], expected[0])), rtol=1e-6,
                               atol=1e-6)


# ------------------------------------------------------------------------------------------------ precision, size
@KINDS
def test_bf16_rounds_the_logits_but_not_the_documents(dense):
    """Counts and smoothing do not fit in eight bits: x W stays in the precision of W, its gradient too."""
    made, _ = corpus(counts(), dense)
    bag, (h, weight, bias) = made.batch(ITEMS), [v.detach().float().requires_grad_() for v in layer(2)]
    seen = {}
    for name in ("fp32", "bf16"):
        with precision(name, torch.device("cpu")):
            x_w, loss = bag.project(weight), bags.cross_entropy(h, weight, bias, bag, torch.ones(len(ITEMS)))
            seen[name] = x_w, *torch.autograd.grad(x_w.square().sum(), weight), *loss, *torch.autograd.grad(
                loss[0], (h, weight, bias))
    assert all(torch.equal(seen["fp32"][i], seen["bf16"][i]) for i in (0, 1))
    for own, other in zip(seen["bf16"][2:], seen["fp32"][2:], strict=True):
        assert own.dtype == torch.float32 and not torch.equal(own, other)
        assert (own - other).norm() < 0.01 * other.norm()


class Largest(TorchDispatchMode):
    """Notes how many elements the largest new tensor has."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        result = operation(*arguments, **(named or {}))
        found = [item.numel() for item in tree_leaves(result) if isinstance(item, torch.Tensor)]
        self.elements = max(self.elements, *found, 0)
        return result


def test_the_matrix_of_all_documents_and_words_never_exists(monkeypatch):
    monkeypatch.setattr(bags, "PART", 8)
    items = torch.arange(200) % N
    (made, _), variables = corpus(counts()), layer(2, n=3, batch=len(items))
    with Largest() as largest:
        bag = made.batch(items)
        (bags.cross_entropy(*variables, bag, torch.ones(len(items)))[0] + bag.project(variables[1]).sum()).backward()
    assert 8 * WORDS <= largest.elements < len(items) * WORDS / 2


def test_nothing_warns():
    """Not even where PyTorch warns once a process only."""
    (made, _), variables = corpus(counts()), layer(2)
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            bags.cross_entropy(*variables, made.batch(ITEMS), torch.ones(len(ITEMS)))[0].backward()
    finally:
        torch.set_warn_always(before)
