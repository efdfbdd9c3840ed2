"""Learning of semantic hashing: a step's gradient against all codes enumerated, its metrics, the stages, resuming."""
import math
import warnings

import killed_training
import pytest
import torch
from direct_hashing import (
    PARAMETERS,
    all_codes,
    corpus,
    direct_kl,
    direct_logits,
    direct_rec,
    enumerated,
    network,
    probabilities,
    some_counts,
    sparse,
)

from lib import bags, documents, semhash, stochastic
from lib.train import Items, TrainError, generator

CPU = torch.device("cpu")
MODELS = [("e1", 0), ("e2", 1), ("e3", 2)]
UNBIASED = [name for name in stochastic.ESTIMATORS if name != "zgr"]


# ------------------------------------------------------------------------------------------------ one step
def one_step(model, made, items, seed=5, **options):
    """The gradients and metrics of a step that changes nothing."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = semhash.training(model, made, generator(seed), optimizer, size=len(items), **options)
    metrics = step(items)
    return {name: p.grad.clone() for name, p in model.named_parameters()}, metrics


COUNTS = some_counts(4, 8, mean=1.0)
BLOCKS, COPIES = 40, 1600


def estimates(estimator, kl, encoder="e2", depth=1):
    """Gradients of steps on thousands of copies of four documents: the means of so many draws, [BLOCKS, P]."""
    (made, x), model = corpus(COUNTS.repeat(COPIES, 1)), network(8, 3, encoder, depth, scale=2.0).double()
    found, items = [], torch.arange(4 * COPIES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = semhash.training(model, made, generator(7), optimizer, estimator=estimator, kl=kl, size=len(items))
    for _ in range(BLOCKS):
        step(items)
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    return torch.stack(found).double(), model, x[:4]


def apart(found, exact):
    """Standard errors between the mean of the blocks and the exact gradient, the largest of all parameters."""
    error = found.std(0) / math.sqrt(len(found))
    return ((found.mean(0) - exact).abs() / error.clamp(min=1e-7)).max().item()


def exact_gradient(model, x):
    loss = enumerated(model, x, model.reads).mean()
    return torch.cat([g.flatten().double() for g in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.fixture
def whole_batches(monkeypatch):
    """Eight words only: all rows at a time."""
    monkeypatch.setattr(bags, "PART", 10 ** 6)


@pytest.mark.parametrize("kl", semhash.KL)
@pytest.mark.parametrize("estimator", UNBIASED)
def test_the_mean_of_a_steps_gradient_is_that_of_the_enumerated_nelbo(estimator, kl, whole_batches):
    """Of all parameters, the encoder's and the decoder's, over 256,000 draws."""
    found, model, x = estimates(estimator, kl)
    assert apart(found, exact_gradient(model, x)) < 4.5


def test_the_two_ways_to_take_the_kl_are_two_estimates(whole_batches):
    sampled, analytic = (estimates("disarm", kl)[0] for kl in semhash.KL)
    assert not torch.allclose(sampled, analytic, rtol=1e-4)
    torch.testing.assert_close(sampled.mean(0), analytic.mean(0), atol=0.05, rtol=0.05)


def test_a_gradient_with_a_fault_is_seen_to_be_biased(whole_batches, monkeypatch):
    """The check above refuses a flipped sign and another KL."""
    right = stochastic.disarm
    with monkeypatch.context() as patched:
        patched.setattr(semhash, "disarm", lambda logits, z, other, *f: right(logits, other, z, *f))
        found, model, x = estimates("disarm", "sampled")
    assert apart(found, exact_gradient(model, x)) > 30
    monkeypatch.setattr(semhash, "bernoulli_kl", lambda logits, prior: logits.square().sum(-1))
    assert apart(estimates("disarm", "analytic")[0], exact_gradient(model, x)) > 30


def test_zgrs_gradient_is_the_trapezium_rules_on_average_whatever_kl_is_asked_for(whole_batches):
    """Biased for the encoder, so compared with its own mean; the decoder's gradient is the exact one."""
    found, model, x = estimates("zgr", "sampled")
    assert torch.equal(found, estimates("zgr", "analytic")[0])
    logits = direct_logits(model, x, model.reads)
    q, loss = probabilities(logits.detach()), direct_kl(logits)
    for code, weight in zip(all_codes(model.bits), q.T, strict=True):
        loss = loss + weight * direct_rec(model, x, stochastic.zgr_at(code.expand(len(x), -1), logits))
    own = torch.cat([g.flatten() for g in torch.autograd.grad(loss.mean(), list(model.parameters()))])
    exact = exact_gradient(model, x)
    decoder = sum(p.numel() for p in [*model.hidden.parameters(), *model.words_out.parameters()])
    assert apart(found, own) < 4.5 < 30 < apart(found, exact)
    assert apart(found[:, -decoder:], exact[-decoder:]) < 4.5


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
@pytest.mark.parametrize("kl", semhash.KL)
@pytest.mark.parametrize("estimator", stochastic.ESTIMATORS)
def test_several_estimates_a_step_are_averaged(estimator, kl, dense):
    """As if their gradients were taken one by one with the same noise; one document is absent."""
    made, _ = corpus(some_counts(12, 30), dense)
    items = torch.tensor([3, 0, 7, 11, 5, -1])
    model, (found, metrics) = network(30, 4, "e2", 1), one_step(
        network(30, 4, "e2", 1), made, items, estimator=estimator, kl=kl, estimates=3)
    bag, noise, present = made.batch(items), generator(5), (items >= 0).float()
    logits, seen = model.encode(bag), []
    for _ in range(3):
        code = logits.detach().requires_grad_()
        seen.append(semhash.gradient(model, bag, code, present / 5, estimator, kl, noise))
        logits.backward(code.grad, retain_graph=True)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad / 3, rtol=1e-4, atol=1e-6)
    nll = sum(values[1].mean(0) for values in seen) / 3
    kl_now = direct_kl(logits.detach().double())
    expected = ((nll + bag.offset + kl_now) * present).sum() * 2 / 12                  # two steps an epoch of 12
    assert metrics["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert len(seen[0][0]) == (1 if estimator == "zgr" else 2)


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
@pytest.mark.parametrize("estimator", stochastic.ESTIMATORS)
def test_documents_that_are_absent_have_no_effect(estimator, dense):
    """-1 is computed as the first document: that may be any."""
    counts = some_counts(12, 30)
    counts[0] = 7.0
    changed = counts.clone()
    changed[0, :15], changed[0, 15:] = 13.0, 1.0                               # as many words: the scale is the same
    items, s = torch.tensor([3, -1, 7, 11, -1]), documents.smoothing(sparse(counts))
    (found, metrics), (other, told) = (one_step(network(30, 4, "e1", 1), corpus(each, dense, s)[0], items,
                                                estimator=estimator) for each in (counts, changed))
    assert all(torch.equal(found[name], other[name]) for name in found) and metrics == told
    seen, _ = one_step(network(30, 4, "e1", 1), corpus(changed, dense, s)[0], items.clamp(0), estimator=estimator)
    assert not torch.equal(found["words_in.weight"], seen["words_in.weight"])          # it would be seen


@pytest.mark.parametrize(("encoder", "depth"), MODELS)
def test_the_metrics_of_an_epochs_steps_have_the_mean_over_all_documents(encoder, depth):
    """Although the last batch is smaller. The bits are certain and the weights stay, so each document has one value."""
    (made, _), model = corpus(some_counts(23, 30)), network(30, 4, encoder, depth)
    with torch.no_grad():
        (model.code[-1] if encoder == "e2" else model.words_in).weight.mul_(1e7)
    seen, batches = semhash.evaluate(model, made, generator(1)), Items(23, 5, 1, CPU)
    assert seen["logits"].abs().min() > 50 and batches.per_epoch == 5
    step = semhash.training(model, made, generator(2), torch.optim.SGD(model.parameters(), lr=0.0), size=5)
    told = [step(batches.batch(t)) for t in range(batches.per_epoch)]
    means = {name: torch.stack([each[name] for each in told]).mean().item() for name in told[0]}
    assert means == pytest.approx({"loss": seen["nelbo"].mean().item(), "kl": seen["kl"].mean().item(),
                                   "nll_per_word": seen["nll"].sum().item() / made.words}, rel=1e-5)


def test_a_step_is_one_of_adam_on_its_gradient():
    made, _ = corpus(some_counts(12, 30))
    model, items = network(30, 4, "e2", 1), torch.arange(12)
    gradients, _ = one_step(network(30, 4, "e2", 1), made, items)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    semhash.training(model, made, generator(5), semhash.adam(model.parameters(), 1e-3))(items)
    for name, parameter in model.named_parameters():
        step = 1e-3 * gradients[name] / (gradients[name].abs() + 1e-8)
        torch.testing.assert_close(parameter.detach(), before[name] - step, rtol=0, atol=2e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("encoder", "depth"), MODELS)
@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
def test_learning_lowers_the_nelbo_and_warns_of_nothing(encoder, depth, dense, precision):
    counts = some_counts(60, 30, mean=1.0)
    counts[20:40] *= torch.arange(30) % 3 == 0                                 # there is something to learn
    (made, _), model = corpus(counts, dense), network(30, 4, encoder, depth)
    batches, before = Items(60, 16, 1, CPU), torch.is_warn_always_enabled()
    step = semhash.training(model, made, generator(2), semhash.adam(model.parameters(), 1e-2), size=16)
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings(), semhash.precision(precision, CPU):
            warnings.simplefilter("error")
            losses = torch.stack([step(batches.batch(t))["loss"] for t in range(120)])
    finally:
        torch.set_warn_always(before)
    assert losses[-20:].mean() < losses[:4].mean() - 1


# ------------------------------------------------------------------------------------------------ learning
TOPICS = documents.load("topics")


@pytest.fixture(scope="module")
def corpora():
    return semhash.corpora(TOPICS, CPU)


def learn(corpora, folder=None, resume="", **changed):
    one = semhash.replica(PARAMETERS | changed, *corpora, CPU, folder)
    return semhash.learn([one], resume)[0], one["state"]


def same(a, b):
    """Two results of `learn`: history, weights, moments and noise, to the bit."""
    (history, state), (other, another) = a, b
    moments = [one["optimizer"].state_dict()["state"].values() for one in (state, another)]
    return (history == other and all(map(torch.equal, state["model"].parameters(), another["model"].parameters()))
            and all(torch.equal(m[key], n[key]) for m, n in zip(*moments, strict=True) for key in m)
            and all(torch.equal(state[name].get_state(), another[name].get_state())
                    for name in ("generator", "test_generator")))


def test_corpora_are_smoothed_by_the_training_documents(corpora):
    train, test = corpora
    assert (len(train), len(test)) == (1600, 400) and train.dense is None
    assert torch.equal(train.smoothing, test.smoothing) and train.smoothing.sum().item() == pytest.approx(1, abs=1e-6)
    assert torch.equal(train.smoothing, documents.smoothing(TOPICS.train))


def test_a_history_has_a_point_per_epoch_and_goes_on_through_the_fine_tuning(corpora):
    history, state = learn(corpora, epochs=2, finetune_epochs=3)
    assert history["epoch"] == [1, 2, 3, 4, 5] and {len(values) for values in history.values()} == {5}
    assert set(history) == {"epoch", "loss", "kl", "nll_per_word", "perplexity", "test_nelbo", "test_nelbo_even",
                            "test_nelbo_odd", "test_nelbo_as_published", "test_kl", "test_nll_per_word",
                            "test_perplexity", "bit_entropy", "bit_correlation"}
    assert history["loss"][0] > history["loss"][-1] and history["test_nelbo"][0] > history["test_nelbo"][-1]
    for corpus_, kind in zip(corpora, ("", "test_"), strict=True):
        nats = history[f"{kind}nll_per_word"][2] + history[f"{kind}kl"][2] * len(corpus_) / corpus_.words
        assert history[f"{kind}perplexity"][2] == pytest.approx(math.exp(nats))
    again, _ = learn(corpora, epochs=2)
    assert again["loss"] == history["loss"][:2] and again["test_nelbo"] == history["test_nelbo"][:2]
    assert math.isfinite(semhash.measure(state["model"], *corpora, history, generator(1))["test_nelbo_min"]["value"])


@pytest.mark.parametrize("encoder", semhash.ENCODERS)
def test_a_longer_run_continues_a_shorter_one(corpora, encoder, tmp_path):
    whole = learn(corpora, tmp_path / "whole", epochs=4, encoder=encoder)
    short = learn(corpora, tmp_path / "short", epochs=2, encoder=encoder)
    assert short[0]["loss"] == whole[0]["loss"][:2] and not same(short, whole)
    for resume in ("latest", "auto"):                                # the second has nothing left to do: it only loads
        assert same(learn(corpora, tmp_path / "short", resume, epochs=4, encoder=encoder), whole)


def test_a_run_goes_on_into_the_fine_tuning_and_a_longer_one(corpora, tmp_path):
    whole = learn(corpora, tmp_path / "whole", finetune_epochs=3)
    assert same(learn(corpora, None, finetune_epochs=3), whole)
    learn(corpora, tmp_path / "short", finetune_epochs=0)
    for epochs in (1, 3):
        longer = learn(corpora, tmp_path / "short", "latest", finetune_epochs=epochs)
    assert same(longer, whole)
    learn(corpora, tmp_path / "one", finetune_epochs=1)
    elsewhere = learn(corpora, tmp_path / "other", str(tmp_path / "one"), finetune_epochs=3)     # a run folder's
    assert same(elsewhere, whole) and (tmp_path / "other" / "finetuning" / "latest.safetensors").is_file()
    learn(corpora, tmp_path / "none", finetune_epochs=0)
    assert same(learn(corpora, tmp_path / "another", str(tmp_path / "none"), finetune_epochs=3), whole)


def test_a_run_killed_at_random_and_resumed_is_bit_equal_to_an_uninterrupted_one(tmp_path):
    """In both stages, in the middle of an epoch too: checkpoints are 6 steps apart, epochs 4."""
    told = killed_training.run_killed("semhash", tmp_path / "killed")
    history, = killed_training.fit("semhash", tmp_path / "whole")
    for stage in ("0", "0/finetuning"):
        killed_training.assert_equal(tmp_path / "killed" / stage, tmp_path / "whole" / stage, told)
    assert history["epoch"] == list(range(1, killed_training.STEPS // 4 + 1))
    assert killed_training.meta(tmp_path / "killed" / "0/finetuning")["history"]["loss"] == history["loss"][5:], told


def test_a_fine_tuning_of_another_stage_is_refused(corpora, tmp_path):
    learn(corpora, tmp_path, finetune_epochs=1)
    with pytest.raises(TrainError, match="trained with finetune_estimates = 2, this run has 3"):
        learn(corpora, tmp_path, "latest", finetune_epochs=1, finetune_estimates=3)
    with pytest.raises(TrainError, match="trained with kl = 'sampled', this run has 'analytic'"):
        learn(corpora, tmp_path, "latest", kl="analytic")


@pytest.mark.parametrize("name", ["finetuning", "finetuning/latest.safetensors"])
def test_a_checkpoint_of_a_fine_tuning_is_no_beginning(name, corpora, tmp_path):
    learn(corpora, tmp_path / "one", finetune_epochs=1)
    with pytest.raises(TrainError, match="latest.safetensors is of a fine-tuning: resume from its run's folder, "):
        learn(corpora, tmp_path / "other", str(tmp_path / "one" / name), epochs=4)


def test_a_fine_tuning_that_began_elsewhere_is_refused_before_anything_is_trained(corpora, tmp_path, monkeypatch):
    learn(corpora, tmp_path / "short", finetune_epochs=1)
    monkeypatch.setattr(semhash, "look", None)                                 # an epoch would need it
    for folder, resume in (("short", "auto"), ("short", "latest"), ("other", str(tmp_path / "short"))):
        with pytest.raises(TrainError, match="began after 2 epochs, this run has 3: to fine-tune anew") as told:
            learn(corpora, tmp_path / folder, resume, epochs=3, finetune_epochs=1)
    monkeypatch.undo()
    remedy = str(told.value).rpartition(" ")[2]
    for folder in ("elsewhere", "short"):
        assert same(learn(corpora, tmp_path / folder, remedy, epochs=3, finetune_epochs=1),
                    learn(corpora, epochs=3, finetune_epochs=1))


def test_no_epochs_are_no_history(corpora):
    history, state = learn(corpora, epochs=0)
    assert history == {"epoch": [], "perplexity": [], "test_perplexity": []} == semhash.thinned(history)
    metrics = semhash.measure(state["model"], *corpora, history, generator(1))
    assert "test_nelbo_min" not in metrics and metrics["train_nelbo_final"]["value"] > 0
    history, _ = learn(corpora, epochs=0, finetune_epochs=2)
    assert history["epoch"] == [1, 2] == [int(epoch) for epoch in semhash.thinned(history)["epoch"]]


def test_replicas_learn_as_each_would_alone(corpora):
    jobs = [semhash.replica(PARAMETERS | {"seed": seed, "finetune_epochs": 1}, *corpora, CPU) for seed in (1, 2)]
    histories = semhash.learn(jobs)
    for seed, job, history in zip((1, 2), jobs, histories, strict=True):
        assert same((history, job["state"]), learn(corpora, seed=seed, finetune_epochs=1))
    assert histories[0] != histories[1]


def test_what_the_evaluation_draws_does_not_touch_the_training(corpora, monkeypatch):
    history, state = learn(corpora)
    assert state["generator"].initial_seed() != state["test_generator"].initial_seed()
    monkeypatch.setattr(semhash, "look", lambda *_: {"test_nelbo": torch.zeros(())})
    other, blind = learn(corpora)
    assert other["loss"] == history["loss"]
    assert all(map(torch.equal, state["model"].parameters(), blind["model"].parameters()))


def test_a_perplexity_beyond_all_numbers_stays_a_number(corpora):
    """Logits of thousands, as a learning rate that is much too large gives; a record holds finite numbers only."""
    history, _ = learn(corpora, epochs=1, lr=1e4)
    assert history["perplexity"] == [math.exp(700)] and math.isfinite(history["loss"][0])


def test_a_test_value_that_is_no_number_stops_the_run_where_it_came(corpora, monkeypatch):
    monkeypatch.setattr(semhash, "look", lambda *_: {"test_nelbo": torch.tensor(math.nan)})
    with pytest.raises(TrainError, match="seed 1: test_nelbo became nan at step "):
        learn(corpora)


# ------------------------------------------------------------------------------------------------ complaints
def test_a_step_of_an_unknown_kind_is_refused():
    (made, _), model = corpus(some_counts(12, 30)), network(30, 4)
    for options, says in (({"estimator": "rebar"}, "unknown estimator"), ({"kl": "none"}, "unknown kl 'none'"),
                          ({"estimates": 0}, "at least one estimate, got 0")):
        with pytest.raises(ValueError, match=says):
            semhash.training(model, made, generator(1), None, **options)


def test_documents_that_are_all_empty_are_refused(corpora):
    empty, _ = corpus(torch.zeros(5, len(TOPICS.vocabulary)))
    for given, which in (((empty, corpora[1]), "training"), ((corpora[0], empty), "test")):
        with pytest.raises(ValueError, match=f"no {which} document has a word of the vocabulary"):
            semhash.replica(PARAMETERS, *given, CPU)
