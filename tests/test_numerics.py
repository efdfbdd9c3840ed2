"""Precision of the steps: matrix products of the CPU by oneDNN are those of float32, and the switch is put back."""
import types

import pytest
import torch

from lib import numerics
from lib.train import TrainError, generator

CPU = torch.device("cpu")
MATMUL = getattr(torch.backends.mkldnn, "matmul", None)
AS_EXACT = numerics._onednn_is_exact()
ONEDNN = pytest.mark.skipif(not AS_EXACT, reason="oneDNN is not there, or rounds to bf16 on this CPU")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


@pytest.fixture
def afresh():
    """What is known of this machine is asked anew, and forgotten afterwards."""
    numerics._onednn_is_exact.cache_clear()
    yield
    numerics._onednn_is_exact.cache_clear()


def switch():
    return getattr(MATMUL, "fp32_precision", None)


# ------------------------------------------------------------------------------------------------ products
@pytest.mark.parametrize(("m", "k", "n"), [(128, 64, 10_000), (10_000, 128, 64), (128, 10_000, 64), (96, 512, 512),
                                           (1, 300, 300), (300, 300, 1), (7, 5, 3), (0, 4, 4)])
@pytest.mark.parametrize("name", ["fp32", "tf32"])
def test_products_are_exact_to_float32_whatever_their_shape(m, k, n, name):
    """A product in bf16 is wrong by a hundred times as much."""
    a, b, c = normal(m, k), normal(k, n, seed=1), normal(m, n, seed=2)
    exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    with numerics.precision(name, CPU):
        found = [a @ b, torch.addmm(c, a, b) - c, torch.nn.functional.linear(a, b.T.contiguous()),
                 a.clone().T.contiguous().T @ b.T.contiguous().T, c.clone().addmm_(a, b) - c]
    for product in found:
        assert product.dtype == torch.float32
        assert ((product - exact).abs() <= 2e-6 * size + 2e-6 * c.abs()).all()


def test_gradients_of_products_are_exact_to_float32():
    a, b, g = normal(128, 64).requires_grad_(), normal(64, 1000, seed=1).requires_grad_(), normal(128, 1000, seed=2)
    with numerics.precision("tf32", CPU):
        found = torch.autograd.grad(a @ b, (a, b), g)
    expected = torch.autograd.grad(a.double() @ b.double(), (a, b), g.double())
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------ the switch
@ONEDNN
def test_onednn_is_used_within_and_the_setting_before_comes_back():
    before = switch()
    for name in numerics.PRECISIONS:
        with numerics.precision(name, CPU):
            assert switch() == "bf16"
            with numerics.precision("fp32", CPU):                            # an evaluation between two steps
                assert switch() == "bf16"
            assert switch() == "bf16"
        assert switch() == before


@ONEDNN
def test_the_setting_comes_back_after_an_error():
    before = switch()
    with pytest.raises(KeyError, match="in the middle"), numerics.precision("tf32", CPU):
        raise KeyError("in the middle")
    assert switch() == before
    with pytest.raises(TrainError, match="unknown precision 'fp8': use one of fp32, tf32, bf16"), \
            numerics.precision("fp8", CPU):
        pass
    assert switch() == before


@ONEDNN
def test_a_setting_of_the_users_own_comes_back_too():
    before = switch()
    MATMUL.fp32_precision = "ieee"
    try:
        with numerics.precision("tf32", CPU):
            assert switch() == "bf16"
        assert switch() == "ieee"
    finally:
        MATMUL.fp32_precision = before


def test_autocast_is_on_for_bf16_alone_and_keeps_no_weights():
    for name in numerics.PRECISIONS:
        with numerics.precision(name, CPU):
            assert torch.is_autocast_enabled("cpu") == (name == "bf16") and not torch.is_autocast_cache_enabled()
            with numerics.precision("fp32", CPU):
                assert (normal(4, 4) @ normal(4, 4)).dtype == torch.float32


# ------------------------------------------------------------------------------------------------ where it is absent
@pytest.mark.parametrize("absent", ["an older torch", "a build without oneDNN", "no precision to choose"])
def test_without_onednn_products_are_what_they_are(absent, afresh, monkeypatch):
    before = switch()
    if absent == "an older torch":
        monkeypatch.setattr(torch.backends, "mkldnn", types.SimpleNamespace(is_available=lambda: True))
    elif absent == "a build without oneDNN":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    else:
        monkeypatch.setattr(torch.backends.mkldnn, "matmul", types.SimpleNamespace())
    a, b = normal(64, 64), normal(64, 64, seed=1)
    with numerics.precision("tf32", CPU):
        assert switch() == before
        found = a @ b
    assert not numerics._onednn_is_exact() and torch.equal(found, a @ b)
    if absent == "no precision to choose":
        assert vars(torch.backends.mkldnn.matmul) == {}


def test_where_onednn_rounds_to_bf16_it_is_not_used(afresh, monkeypatch):
    """As on CPUs that have AMX: played by products that are rounded while the switch is on."""
    matmul, product = types.SimpleNamespace(fp32_precision="none"), torch.Tensor.__matmul__

    def rounded(a, b):
        low = matmul.fp32_precision == "bf16" and a.dtype == torch.float32
        return product(a.bfloat16(), b.bfloat16()).float() if low else product(a, b)
    monkeypatch.setattr(torch.backends.mkldnn, "matmul", matmul)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    assert not numerics._onednn_is_exact() and matmul.fp32_precision == "none"
    with numerics.precision("tf32", CPU):
        assert matmul.fp32_precision == "none"
    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    numerics._onednn_is_exact.cache_clear()
    assert numerics._onednn_is_exact() and matmul.fp32_precision == "none"           # the same, but exact
    with numerics.precision("tf32", CPU):
        assert matmul.fp32_precision == "bf16"
    assert matmul.fp32_precision == "none"


def test_the_machine_is_asked_once(afresh, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: asked.append(1) or False)
    for _ in range(3):
        with numerics.precision("tf32", CPU):
            pass
    assert asked == ([1] if hasattr(MATMUL, "fp32_precision") else [])
