"""Semantic hashing: the model, its evaluation and what is followed, against direct float64 formulas."""
import math

import pytest
import torch
from direct_hashing import (
    PARAMETERS,
    corpus,
    direct_kl,
    direct_log_p,
    direct_logits,
    direct_rec,
    enumerated,
    network,
    some_counts,
    sparse,
)
from torch import nn

from lib import runs, semhash
from lib.train import generator

MODELS = [("e1", 0), ("e2", 1), ("e3", 2)]


# ------------------------------------------------------------------------------------------------ the model
@pytest.mark.parametrize(("encoder", "depth", "count"), [
    ("e1", 0, 1_290_064), ("e3", 0, 1_290_064), ("e1", 1, 5_803_344), ("e3", 1, 5_803_344), ("e1", 2, 6_066_000),
    ("e3", 2, 6_066_000), ("e2", 0, 5_803_344), ("e2", 1, 10_316_624), ("e2", 2, 10_579_280)])
def test_parameter_counts_are_the_works(encoder, depth, count):
    assert sum(p.numel() for p in semhash.SemanticHashing(10_000, 64, encoder, depth).parameters()) == count


@pytest.mark.parametrize("encoder", semhash.ENCODERS)
def test_initial_weights_are_pytorchs_and_depend_on_the_generator_only(encoder):
    first, again = (network(300, 64, encoder, 1, 100) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    torch.manual_seed(0)
    for layer in first.modules():
        if isinstance(layer, nn.Linear | semhash.WordLinear):
            weight = layer.weight.T if isinstance(layer, semhash.WordLinear) else layer.weight
            usual = nn.Linear(weight.shape[1], weight.shape[0])
            assert weight.std().item() == pytest.approx(usual.weight.std().item(), rel=0.1)
            bound = 1 / math.sqrt(weight.shape[1])
            assert max(weight.abs().max(), layer.bias.abs().max()) <= bound and layer.bias.abs().max() > bound / 2


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
@pytest.mark.parametrize(("encoder", "depth"), MODELS)
def test_logits_of_the_code_read_what_their_encoder_reads(encoder, depth, dense):
    (made, x), model = corpus(some_counts(12, 30), dense), network(30, 5, encoder, depth)
    items = torch.arange(12)
    for reads in ("", *semhash.INPUTS):
        expected = direct_logits(model, x, reads or {"e1": "counts"}.get(encoder, "frequencies"))
        torch.testing.assert_close(model.encode(made.batch(items), reads).double(), expected, rtol=1e-4, atol=1e-4)
    learnt = network(30, 5, encoder, depth, reads="counts")
    assert torch.equal(learnt.encode(made.batch(items)), model.encode(made.batch(items), "counts"))


# ------------------------------------------------------------------------------------------------ evaluation
@pytest.mark.parametrize(("encoder", "depth"), MODELS)
def test_an_evaluation_is_the_formula_where_the_bits_are_certain(encoder, depth):
    """Every document's NELBO, NLL and KL, an empty document's too."""
    (made, x), model = corpus(some_counts(40, 30)), network(30, 5, encoder, depth)
    last = model.code[-1] if encoder == "e2" else model.words_in
    with torch.no_grad():                                                      # the bits half on, half off, for sure
        last.bias -= direct_logits(model, x, model.reads).median(0)[0].float() + 1e-3
        surely = (60 / direct_logits(model, x, model.reads).abs().min()).float()
        last.weight.mul_(surely), last.bias.mul_(surely)
    z = (direct_logits(model, x, model.reads) > 0).double()
    assert len(z.unique(dim=0)) > 3
    seen = semhash.evaluate(model, made, generator(1))
    assert torch.equal(seen["logits"] > 0, z == 1) and seen["logits"].abs().min() > 50
    nll = -((x - made.smoothing.double()) * direct_log_p(model, z)).sum(1)
    expected = {"nelbo": direct_rec(model, x, z) + 5 * math.log(2), "nll": nll,
                "kl": torch.full((40,), 5 * math.log(2))}
    for name, value in expected.items():
        assert seen[name].shape == value.shape
        torch.testing.assert_close(seen[name].double(), value.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reads", ["", "counts"])
def test_an_evaluation_is_the_enumerated_nelbo_on_average(reads):
    """Known fault 1 as well: an encoder of frequencies that is given counts."""
    counts, copies = some_counts(4, 8, mean=1.0), 4000
    (made, _), model = corpus(counts.repeat(copies, 1)), network(8, 3, "e3", 1, scale=3.0)
    x = counts.double() + made.smoothing.double()
    seen = semhash.evaluate(model, made, generator(1), reads)
    nelbo = seen["nelbo"].double().view(copies, 4)
    expected = enumerated(model, x, reads or "frequencies")
    assert ((nelbo.mean(0) - expected).abs() < 4 * nelbo.std(0) / math.sqrt(copies) + 1e-5).all()
    assert (nelbo.std(0) > 0.01).all()
    torch.testing.assert_close(seen["kl"].double()[:4], direct_kl(direct_logits(model, x, reads or "frequencies")),
                               rtol=1e-4, atol=1e-5)
    other = enumerated(model, x, "counts" if not reads else "frequencies")
    assert ((nelbo.mean(0) - other).abs() > 10 * nelbo.std(0) / math.sqrt(copies)).any()     # it would be seen


def test_an_evaluation_is_in_float32_and_leaves_no_gradient():
    (made, _), model = corpus(some_counts(12, 30)), network(30, 5)
    plain = semhash.evaluate(model, made, generator(1))
    with torch.autocast("cpu", torch.bfloat16):
        within = semhash.evaluate(model, made, generator(1))
    assert all(torch.equal(plain[name], within[name]) for name in plain)
    assert not any(value.requires_grad for value in plain.values())


def test_codes_are_the_most_probable_bits():
    counts = some_counts(600, 30)                                              # more than one batch
    (made, x), model = corpus(counts), network(30, 5, "e2", 1)
    found = semhash.codes(model, made.smoothing, sparse(counts))
    assert found.dtype == torch.bool and torch.equal(found, direct_logits(model, x, "frequencies") > 0)


# ------------------------------------------------------------------------------------------------ what is followed
def evaluations(monkeypatch, nelbos, logits):
    """`evaluate` gives these values, by what the encoder reads."""
    def evaluate(model, corpus, generator, reads=""):
        nelbo = nelbos[reads]
        return {"nelbo": nelbo, "nll": 2 * nelbo, "kl": nelbo / 4, "logits": logits}
    monkeypatch.setattr(semhash, "evaluate", evaluate)


def test_what_is_followed_is_counted_over_documents_and_as_published_over_batches(monkeypatch):
    """600 documents: the work's code averages 256, 256 and 88 of them and then the three means."""
    (made, _), model = corpus(some_counts(600, 8)), network(8, 3, "e3")
    own, counts = 100 * torch.rand(600, generator=generator(1)), 200 * torch.rand(600, generator=generator(2)).sort()[0]
    bits = torch.stack([torch.arange(600) < 150, torch.arange(600) >= 150, torch.ones(600)], 1)
    evaluations(monkeypatch, {"": own, "counts": counts}, 2 * bits - 1.0)
    seen = {name: value.item() for name, value in semhash.look(model, made, generator(1)).items()}
    by_batch = (counts[:256].mean() + counts[256:512].mean() + counts[512:].mean()) / 3
    assert seen == pytest.approx({
        "test_nelbo": own.mean().item(), "test_nelbo_even": own[0::2].mean().item(),
        "test_nelbo_odd": own[1::2].mean().item(), "test_nelbo_as_published": by_batch.item(),
        "test_kl": own.mean().item() / 4, "test_nll_per_word": 2 * own.sum().item() / made.words,
        "bit_entropy": 2 / 3 * (-0.25 * math.log2(0.25) - 0.75 * math.log2(0.75)), "bit_correlation": 1 / 3}, rel=1e-5)
    assert abs(by_batch - counts.mean()) > 10                                   # it would be seen


def test_an_encoder_of_counts_is_evaluated_once(monkeypatch):
    (made, _), own = corpus(some_counts(300, 8)), torch.rand(300)
    evaluations(monkeypatch, {"": own}, torch.ones(300, 1))
    seen = semhash.look(network(8, 1, "e1"), made, generator(1))
    assert seen["test_nelbo_as_published"].item() == pytest.approx((own[:256].mean() + own[256:].mean()).item() / 2)
    assert seen["bit_entropy"] < 1e-6 and seen["bit_correlation"] == 0           # a single bit, and constant
    semhash.look(network(8, 1, "e2", reads="counts"), made, generator(1))
    with pytest.raises(KeyError, match="counts"):
        semhash.look(network(8, 1, "e1", reads="frequencies"), made, generator(1))


HISTORY = {"epoch": [1, 2, 3, 4], "test_nelbo": [9.0, 5.0, 4.0, 6.0], "test_nelbo_even": [9.5, 3.0, 5.0, 7.0],
           "test_nelbo_odd": [8.5, 7.0, 3.0, 5.0], "test_nelbo_as_published": [4.5, 5.5, 6.5, 7.5]}


def test_the_epochs_that_the_tables_are_of_are_chosen_as_they_say(monkeypatch):
    """The even half is best at epoch 2, where the odd has 7; the odd at epoch 3, where the even has 5."""
    (train, _), (test, _), model = corpus(some_counts(300, 8)), corpus(some_counts(200, 8, seed=2)), network(8, 3)
    metrics = semhash.measure(model, train, test, HISTORY, generator(1))
    assert {name: metrics[f"test_nelbo_{name}"]["value"] for name in ("min", "min_as_published", "validated", "last")} \
        == {"min": 4.0, "min_as_published": 4.5, "validated": 6.0, "last": 6.0}
    assert metrics["best_epoch"]["value"] == 3
    assert not [name for name in semhash.measure(model, train, test, {"epoch": []}, generator(1))
                if "min" in name or "epoch" in name]


def test_what_is_measured_at_the_end_is_over_all_documents_and_its_error_that_of_the_draws():
    (train, x), (test, y) = (corpus(some_counts(n, 8, 2.0, seed=n)) for n in (3000, 2000))
    model = network(8, 3, "e1", 1, scale=3.0)
    seen = [semhash.measure(model, train, test, HISTORY, generator(i)) for i in range(30)]
    exact = enumerated(model, x, "counts").mean().item()
    found = torch.tensor([run["train_nelbo_final"]["value"] for run in seen], dtype=torch.float64)
    assert abs(found.mean().item() - exact) < 4 * found.std().item() / math.sqrt(30)
    assert seen[0]["train_nelbo_final"]["se"] == pytest.approx(found.std().item(), rel=0.35)
    single = [semhash.evaluate(model, test, generator(i))["nelbo"].mean() for i in range(30)]
    assert seen[0]["test_nelbo_last"]["se"] == pytest.approx(torch.stack(single).std().item(), rel=0.35)
    for name, corpus_, dense in (("train", train, x), ("test", test, y)):
        kl = direct_kl(direct_logits(model, dense, "counts")).sum().item()
        assert seen[0][f"{name}_kl"]["value"] == pytest.approx(kl / len(corpus_), rel=1e-5)
        perplexity = math.exp(seen[0][f"{name}_nll_per_word"]["value"] + kl / corpus_.words)
        assert seen[0][f"{name}_perplexity"]["value"] == pytest.approx(perplexity, rel=1e-5)
        assert 1 < seen[0][f"{name}_nll_per_word"]["value"] < 2 * math.log(8)


def test_a_thinned_history_keeps_its_last_point():
    assert semhash.thinned({}) == {} and semhash.thinned({"epoch": [], "loss": []}) == {"epoch": [], "loss": []}
    short = {"epoch": [1, 2], "loss": [1 / 3, 2.0]}
    assert semhash.thinned(short) == {"epoch": [1.0, 2.0], "loss": [0.333333, 2.0]}
    for n in (300, 301, 899, 1500):
        long = semhash.thinned({"epoch": list(range(1, n + 1)), "loss": [0.5] * n})
        assert long["epoch"][0] == 1 and long["epoch"][-1] == n and n ** 0.5 < len(long["epoch"]) <= 301
        assert len(long["loss"]) == len(long["epoch"])


# ------------------------------------------------------------------------------------------------ run records
def test_a_grid_is_of_the_works_setting_with_the_mean_over_seeds():
    def record(seed, value, **changed):
        own = PARAMETERS | runs.presets("semantic-hashing")["paper"] | {
            "seed": seed, "epochs": 20, "finetune_epochs": 0} | changed
        return {"parameters": own, "metrics": {"nelbo": {"value": value, "se": 0.1, "n": 9, "unit": "nats"}}}
    records = [record(1, 10.0), record(2, 12.0), record(1, 7.0, epochs=10, finetune_epochs=5),
               record(1, 5.0, encoder="e2", decoder_depth=1, bits=8)]
    others = [record(1, 0.0, **changed) for changed in (
        {"dataset": "topics"}, {"input": "counts"}, {"estimator": "zgr"}, {"kl": "analytic"}, {"precision": "bf16"},
        {"lr": 0.1}, {"batch_size": 9}, {"hidden": 3})]
    found = semhash.grid(records + others, "nelbo")
    assert found == {0: {"e1": {5: {20: {"value": 11.0, "se": 1.0, "n": 2, "unit": "nats"},
                                    15: records[2]["metrics"]["nelbo"]}}},
                     1: {"e2": {8: {20: records[3]["metrics"]["nelbo"]}}}}


# ------------------------------------------------------------------------------------------------ complaints
@pytest.mark.parametrize(("change", "says"), [
    ({"bits": 0}, "bits must be at least 1, got 0"), ({"encoder": "e4"}, "unknown encoder 'e4': use e1, e2, e3"),
    ({"input": "tf-idf"}, "unknown input 'tf-idf': use counts, frequencies"),
    ({"estimator": "rebar"}, "unknown estimator 'rebar': use disarm, arm, reinforce-loo, zgr"),
    ({"kl": "exact"}, "unknown kl 'exact': use sampled, analytic"),
    ({"precision": "fp16"}, "unknown precision 'fp16': use fp32, tf32, bf16"),
    ({"decoder_depth": -1}, "decoder_depth must be at least 0"), ({"hidden": 0}, "hidden must be at least 1"),
    ({"epochs": -1}, "epochs must be at least 0"), ({"finetune_epochs": -1}, "finetune_epochs must be at least 0"),
    ({"finetune_estimates": 0}, "finetune_estimates must be at least 1"),
    ({"batch_size": 0}, "batch_size must be at least 1"), ({"replicas": 0}, "replicas must be at least 1"),
    ({"bits": 256}, "bits must be at most 255, which is what the search holds, got 256"),
    ({"epochs": 0, "finetune_epochs": 0}, "there is nothing to train: epochs and finetune_epochs are both 0"),
    ({"lr": 0.0}, "the learning rate must be positive, got 0.0")])
def test_bad_parameters_are_refused_before_anything_is_trained(change, says):
    semhash.check(PARAMETERS)
    with pytest.raises(ValueError, match=says) as error:
        semhash.check(PARAMETERS | change)
    assert "\n" not in str(error.value)
