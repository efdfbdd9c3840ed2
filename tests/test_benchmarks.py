"""The benchmarks: both loops learn the same, what is counted is right, records are whole and of committed code only."""
import json
import math
import subprocess
import sys
import time
from itertools import cycle

import psutil
import pytest
import small_benchmark
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import __main__ as command
from benchmarks import autoencoders, gmm, harness, records, roofs, semhash, symmetric
from lib import data, documents, runs, train
from lib.runs import RunError

CPU = torch.device("cpu")
WORKS = {"symmetric": symmetric, "autoencoders": autoencoders, "gmm": gmm, "semhash": semhash}
TINY = {"symmetric": {"batch": 32, "width": 4, "z0_bits": 8, "z1_bits": 16, "lr": 1e-3, "dataset": "digits"},
        "autoencoders": {"batch": 16, "model": "vae", "dataset": "digits"}, "gmm": {"batch": 64, "lr": 1e-2},
        "semhash": {"batch": 64, "bits": 8, "hidden": 16, "lr": 1e-2, "dataset": "topics"}}
DATA = {name: work.data(work.SETTINGS | TINY[name]) for name, work in WORKS.items()}


def settings_of(name, **changes):
    return WORKS[name].SETTINGS | TINY[name] | changes


def both(name, steps, **changes):
    """What both loops log at each step, from the same weights on the same batches: {metric: [steps]} each."""
    work, own = WORKS[name], settings_of(name, **changes)
    job = work.book(own, DATA[name], CPU)
    loop, model = work.plain(own, DATA[name], batches_of(name, job, steps), CPU)
    harness.same_weights(model, job["state"])
    logged = loop(steps)
    plain = {metric: [point[metric] for point in logged] for metric in logged[0]}
    return plain, train.fit(**job, steps=steps, log_every=1)


def batches_of(name, job, steps):
    """The batches of the book's first steps as the plain loop is given them, again and again."""
    batches = [job["batches"].batch(t) for t in range(steps)]
    return cycle([harness.fed(semhash, DATA[name], CPU)[items] for items in batches] if name == "semhash" else batches)


# ------------------------------------------------------------------------------------------------ the same objective
@pytest.mark.parametrize("name", WORKS)
def test_both_loops_train_models_of_one_size_and_log_the_same_metrics(name):
    work, own = WORKS[name], settings_of(name)
    job = work.book(own, DATA[name], CPU)
    loop, model = work.plain(own, DATA[name], batches_of(name, job, 1), CPU)
    of_the_book = [p for item in job["state"].values() if isinstance(item, nn.Module) for p in item.parameters()]
    assert [sorted(p.shape) for p in model.parameters()] == [sorted(p.shape) for p in of_the_book]
    if name != "autoencoders":                                      # its log sigma is a weight that is not trained
        assert sum(p.requires_grad for p in model.parameters()) == sum(p.requires_grad for p in of_the_book)
    assert set(loop(1)[0]) == set(train.fit(**job, steps=1)) - {"step", "sigma", "nll_per_word"}     # more for nothing


def test_the_plain_model_has_the_works_number_of_parameters():
    full = symmetric.SETTINGS | {"dataset": "digits"}
    model = symmetric.plain(full, DATA["symmetric"], None, CPU)[1]
    assert sum(p.numel() for p in model.parameters()) == 3_020_143


@pytest.mark.parametrize("joint", [False, True])
def test_the_mixture_learns_to_the_digit_what_the_plain_loop_learns(joint):
    plain, fit = both("gmm", 30, joint=joint)
    for metric in plain:
        assert plain[metric] == pytest.approx(fit[metric], abs=2e-5), metric
    assert fit["elbo"][-1] > fit["elbo"][0] + 0.1


def test_the_autoencoder_without_noise_learns_what_the_plain_loop_learns():
    plain, fit = both("autoencoders", 12, model="ae")
    assert plain["loss"] == pytest.approx(fit["loss"], rel=0.01)
    assert fit["loss"][-1] < 0.9 * fit["loss"][0]


@pytest.mark.parametrize("name", ["symmetric", "autoencoders"])
def test_with_noise_the_first_step_agrees_from_the_same_weights(name):
    plain, fit = both(name, 1, batch=512, lr=1e-6)
    for metric in plain:
        assert plain[metric] == pytest.approx(fit[metric], rel=0.1 if metric.startswith("mi_") else 0.01), metric


@pytest.mark.parametrize(("name", "steps", "within"), [
    ("symmetric", 40, {"loss": 15.0, "p_x": 0.02, "p_z1": 0.15, "q_z0": 0.002, "q_z1": 0.15}),
    ("autoencoders", 20, {"loss": 0.02, "rec": 0.02, "kl": 0.1}),
    ("semhash", 40, {"loss": 1.6, "kl": 0.3})])
def test_the_losses_agree_in_distribution_after_the_same_number_of_steps(name, steps, within):
    """The bounds are about three standard deviations of the difference of two means over three seeds."""
    found = [both(name, steps, seed=seed) for seed in (1, 2, 3)]
    for metric, bound in within.items():
        late = torch.tensor([[side[metric][-10:] for side in pair] for pair in found]).mean((0, 2)).tolist()
        assert abs(late[0] - late[1]) < bound, metric
        if metric == "loss":
            assert max(late) < sum(fit["loss"][0] for _, fit in found) / 3 - 3 * bound


HASHING = [("e1", 0, 1), ("e1", 1, 1), ("e2", 0, 1), ("e3", 2, 3)]


def hashing(steps, encoder, depth, estimates, prepare=lambda model: None):
    """(plain loop, its model, the book's job) from the same weights, which `prepare` may change before."""
    own = settings_of("semhash", encoder=encoder, decoder_depth=depth, estimates=estimates)
    job = semhash.book(own, DATA["semhash"], CPU)
    with torch.no_grad():
        prepare(job["state"]["model"])
    loop, model = semhash.plain(own, DATA["semhash"], batches_of("semhash", job, steps), CPU)
    harness.same_weights(model, job["state"])
    return loop, model, job


@pytest.mark.parametrize(("encoder", "depth", "estimates"), HASHING)
def test_from_the_same_uniforms_semantic_hashing_has_the_plain_loops_gradients(encoder, depth, estimates):
    loop, model, job = hashing(1, encoder, depth, estimates)
    torch.manual_seed(7)
    job["state"]["generator"].manual_seed(7)
    loop(1)
    job["step"](job["batches"].batch(0))
    for mine, its in zip(model.parameters(), job["state"]["model"].parameters(), strict=True):
        its = its.grad if its.shape == mine.shape else its.grad.mT
        assert 0 < (mine.grad - its).norm() < 1e-4 * its.norm()     # two ways of computing, not one twice


@pytest.mark.parametrize(("encoder", "depth", "estimates"), HASHING)
def test_where_the_bits_are_certain_both_log_the_nelbo_of_a_direct_formula(encoder, depth, estimates):
    def prepare(model):
        last = model.code[-1] if encoder == "e2" else model.words_in
        last.weight.zero_()
        last.bias.copy_(torch.tensor([30.0, -30.0]).repeat(4))

    loop, model, job = hashing(1, encoder, depth, estimates, prepare)
    x = semhash.fed(DATA["semhash"])[job["batches"].batch(0)].double()
    z = torch.tensor([1.0, 0.0]).double().repeat(4)
    nelbo = (x * ((x / x.sum(1, keepdim=True)).log() - model.double().decoder(z[None]))).sum(1).mean() + 8 * math.log(2)
    model.float()
    (logged,), found = loop(1), job["step"](job["batches"].batch(0))
    assert [logged["loss"], found["loss"].item()] == pytest.approx([nelbo.item()] * 2, rel=1e-5)
    assert [logged["kl"], found["kl"].item()] == pytest.approx([8 * math.log(2)] * 2, rel=1e-5)


class Largest(TorchDispatchMode):
    """The most elements that a tensor has which an operator returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        dense = [t.numel() for t in tree_leaves(out) if isinstance(t, Tensor) and t.layout == torch.strided]
        self.elements = max([self.elements, *dense])
        return out


def test_the_book_makes_no_dense_matrix_of_all_documents_on_the_cpu():
    counts = DATA["semhash"]
    with Largest() as seen:
        job = semhash.book(settings_of("semhash"), counts, CPU)
        job["step"](job["batches"].batch(0))
    assert 2 * 64 * counts.shape[1] <= seen.elements < counts.numel() / 10
    with Largest() as seen:
        assert torch.equal(semhash.fed(counts), counts.to_dense() + documents.smoothing(counts))
    assert seen.elements == counts.numel()


def test_only_whole_batches_of_documents_take_part():
    whole = documents.load("topics").train
    counts = semhash.data(settings_of("semhash", batch=300))
    assert len(whole) == 1600 and torch.equal(counts.to_dense(), whole.to_dense()[:1500])
    job = semhash.book(settings_of("semhash", batch=300), counts, CPU)
    assert all((job["batches"].batch(t) >= 0).all() for t in range(5))
    with pytest.raises(ValueError, match="1600 training documents, too few for a batch of 1601"):
        semhash.data(settings_of("semhash", batch=1601))


# ------------------------------------------------------------------------------------------------ turns
def test_turns_alternate_and_the_ratio_is_that_of_the_times():
    played = []

    def turn(name, seconds):
        return lambda steps: played.append((name, steps)) or seconds

    steps, times = harness.in_turns({"plain": turn("plain", 0.3), "fit": turn("fit", 0.1)}, 12.0, 3, multiple=2)
    assert steps == 10                                              # 12 s / 3 turns / 0.4 s a step of both
    assert played[2:] == [("plain", 10), ("fit", 10)] * 3
    ratios = harness.interval([a / b for a, b in zip(times["plain"], times["fit"], strict=True)])
    assert ratios == pytest.approx({"median": 3, "low": 3, "high": 3, "coverage": 0.75})


def test_intervals_of_the_median_come_from_order_statistics():
    assert harness.interval([5, 1, 3]) == {"median": 3, "low": 1, "high": 5, "coverage": 0.75}
    assert harness.interval([*range(6)]) == {"median": 2.5, "low": 0, "high": 5, "coverage": 1 - 2 / 2 ** 6}
    assert harness.interval([*range(10)]) == {"median": 4.5, "low": 1, "high": 8, "coverage": 1 - 22 / 2 ** 10}
    assert harness.quantiles([4, 1, 2, 3, 0]) == {"median": 2, "q1": 1, "q3": 3}


def test_a_turn_of_fit_times_its_steps_and_goes_on_with_new_batches(monkeypatch):
    asked, clock = [], iter(range(0, 1000, 3))
    fit = harness.Fit(gmm, settings_of("gmm"), DATA["gmm"], CPU)
    indices = fit.jobs[0]["batches"].batches.indices
    fit.jobs[0]["batches"].batches.indices = lambda first, count: asked.append((first, count)) or indices(first, count)
    monkeypatch.setattr(harness.time, "perf_counter", lambda: next(clock))
    assert fit.turn(4) == 3 / 4                                     # the clock was read twice, 3 s apart
    assert asked == [(0, 1), *((t, 1) for t in range(5))]           # an untimed step, then four
    fit.turn(2)
    assert asked[6:] == [(5, 1), *((t, 1) for t in range(5, 8))]


def test_feeds_give_every_item_once_an_epoch():
    data = torch.arange(12)[:, None]
    for feed in harness.FEEDS.values():
        batches = feed(data, 4)
        seen = torch.cat([next(batches) for _ in range(3)]).flatten()
        assert sorted(seen.tolist()) == list(range(12)) and next(batches).shape == (4, 1)
    assert set(harness.feeding(data, 4, repeats=1)) == set(harness.FEEDS)


def test_windows_are_weighted_by_their_steps():
    assert harness.windowed_mean({"step": [4, 6], "loss": [1.0, 4.0]}, "loss") == 2.0


def test_the_contiguous_variant_undoes_channels_last():
    job, batch = symmetric.book(settings_of("symmetric"), DATA["symmetric"], CPU), DATA["symmetric"][:4]
    layout, layers = [], [part for part in job["state"]["model"].decoder if isinstance(part, harness.CONVOLUTIONS)]
    layers[2].register_forward_hook(lambda _, given, out: layout.append(out.is_contiguous()))
    job["step"](batch)
    assert layout and not any(layout)
    layout.clear()
    harness.make_contiguous(job["state"])
    job["step"](batch)
    assert layout and all(layout)
    with pytest.raises(harness.BenchmarkError, match="no convolution"):
        harness.make_contiguous(gmm.book(settings_of("gmm"), DATA["gmm"], CPU)["state"])


# ------------------------------------------------------------------------------------------------ roofs
def test_operations_and_bytes_of_known_operators():
    a, b = torch.rand(30, 20), torch.rand(20, 10)
    assert roofs.needs(lambda: a @ b) == {"flop": 2 * 30 * 20 * 10, "bytes": 4 * (600 + 200 + 300)}
    assert roofs.needs(lambda: a.add(a.mT.mT)) == {"flop": 0, "bytes": 3 * 4 * 600}     # reads two, writes one
    assert roofs.needs(lambda: a.mul_(2.0)) == {"flop": 0, "bytes": 2 * 4 * 600}
    assert roofs.needs(lambda: a.t().view(-1) if False else torch.empty_like(a).t()) == {"flop": 0, "bytes": 0}
    assert roofs.needs(lambda: a.add(torch.ones(1).expand(30, 20)))["bytes"] == 4 * (600 + 600 + 1 + 1)


def test_a_linear_layer_takes_three_products_and_the_optimizers_traffic_is_counted():
    layer, x = nn.Linear(20, 10, bias=False), torch.rand(30, 20, requires_grad=True)
    optimizer = torch.optim.Adam(layer.parameters(), fused=True)
    layer(x).sum().backward()
    optimizer.step()
    assert roofs.needs(lambda: layer(x).sum().backward())["flop"] == 3 * 2 * 30 * 20 * 10
    bytes_ = roofs.needs(optimizer.step)["bytes"]                   # weight, gradient, two moments read; three written
    assert 7 * 4 * 200 <= bytes_ <= 8 * 4 * 200 + 100


def test_a_look_up_reads_no_more_than_it_finds():
    a = torch.rand(30, 20)
    assert roofs.needs(lambda: a[torch.arange(4)]) == {"flop": 0, "bytes": 2 * 8 * 4 + 2 * 4 * 80}      # indices: twice
    assert roofs.needs(lambda: a.index_select(0, torch.zeros(90, dtype=torch.long)))["bytes"] == \
        2 * 8 * 90 + 4 * (600 + 1800)


def test_the_operations_of_semantic_hashing_are_those_of_its_dense_products():
    loop, _, job = hashing(1, "e1", 0, 1)
    one, items = 2 * 64 * DATA["semhash"].shape[1] * 8, job["batches"].batch(0)
    assert roofs.needs(lambda: loop(1))["flop"] == (2 + 2 * 2 + 1) * one         # encoder, pair, logged
    assert 4 * one <= roofs.needs(lambda: job["step"](items))["flop"] < 4.5 * one     # the pair; sparse: hardly any


def test_the_share_is_that_of_the_roof_that_binds():
    ceiling = {"fp32": 100.0, "bf16": 200.0, "bytes": 10.0}
    found = roofs.share({"flop": 120, "bytes": 2}, 2.0, ceiling, "tf32")      # on the CPU tf32 is fp32
    assert (found["roof"], found["share"], found["flop_per_s"], found["bytes_share"]) == ("compute", 0.6, 60.0, 0.1)
    assert roofs.share({"flop": 120, "bytes": 18}, 2.0, ceiling, "bf16") | {"roof": "memory", "share": 0.9} == \
        roofs.share({"flop": 120, "bytes": 18}, 2.0, ceiling, "bf16")


def test_peak_memory_is_what_was_allocated_inside():
    with roofs.Peak(CPU) as peak:
        torch.ones(50_000_000)
    assert peak.mb is None or 190 < peak.mb < 260


def test_the_company_of_this_process_is_not_its_own_work():
    with roofs.Company() as company:
        torch.rand(300, 300).matrix_power(200)
    assert set(company.found) == {"cores", "load_before", "load_after", "others"}
    assert 0 <= company.found["others"] <= company.found["cores"]


def test_the_work_of_a_loaders_worker_is_this_processes_own():
    before = roofs.Company._now()[2]
    work = "import time; [i * i for i in range(2 * 10 ** 7)]; time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", work]) as worker:
        while (spent := sum(psutil.Process(worker.pid).cpu_times()[:2])) < 0.5:
            time.sleep(0.05)
        assert roofs.Company._now()[2] - before > spent - 0.02                # both are counted in hundredths
        worker.kill()


# ------------------------------------------------------------------------------------------------ a whole benchmark
house = small_benchmark.house


def run(*words):
    return command.main(["gmm", "--batch", "64", "--seconds", "0.05", "--repeats", "6", "--device", "cpu", *words])


def test_a_benchmark_prints_a_table_and_records_what_it_found(house, capsys):
    assert run("--record", "--variants", "bf16,contiguous", "--set", "joint=false") == 0
    printed = capsys.readouterr().out
    (record,) = records.recorded()
    assert record == records.read(next((house / "runs" / "benchmarks").glob("*-gmm.json")))
    assert records.NEEDED <= set(record)
    assert record["settings"]["joint"] is False and record["settings"]["batch"] == 64
    assert set(record["rows"]) == {"plain", "fit", "bf16"}
    assert record["failed"] == {"contiguous": "the model has no convolution, so nothing is channels_last"}
    fit, plain = record["rows"]["fit"], record["rows"]["plain"]
    assert len(fit["seconds_per_step"]) == 6 == record["turns"]
    ratios = sorted(a / b for a, b in zip(plain["seconds_per_step"], fit["seconds_per_step"], strict=True))
    assert (fit["ratio"]["low"], fit["ratio"]["high"]) == (ratios[0], ratios[-1]) and fit["ratio"]["coverage"] > 0.95
    assert record["needed"]["tf32"]["flop"] == 3 * 2 * 64 * (2 * 64 + 64 * 64 + 64 * 2) - 2 * 64 * 2 * 64
    assert fit["achieved"]["flop_share"] == fit["achieved"]["flop_per_s"] / 1e12
    assert record["feed"] == "all of the data"
    assert record["command"].startswith("python -m benchmarks gmm --set=batch=64 --set=joint=False --seconds=0.05")
    for word in ("gmm", "plain", "fit", "bf16", "GFLOP", "contiguous cannot run here", "written: book/results/"):
        assert word in printed
    assert runs.records(folder=house / "book" / "results") == []    # no run of an experiment


def test_semantic_hashing_is_measured_with_what_its_plain_loop_is_fed(house):
    words = ["--set=dataset=topics", "--set=batch=64", "--set=bits=8", "--set=estimates=2", "--variants=bf16,compiled"]
    assert command.main(["semhash", *words, "--device", "cpu", "--seconds", "0.05", "--repeats", "2"]) == 0
    record = records.read(next((house / "runs" / "benchmarks").glob("*-semhash.json")))
    assert set(record["rows"]) == {"plain", "fit", "bf16"} and "no network to compile" in record["failed"]["compiled"]
    assert set(record["feed_ms"]) == set(harness.FEEDS) and record["aims"] == []
    assert record["needed"]["plain"]["flop"] == (2 + 2 * 4 + 1) * 2 * 64 * DATA["semhash"].shape[1] * 8


def test_without_the_newsgroups_the_message_names_the_corpus_that_needs_no_file(house, monkeypatch, capsys):
    def fetch(name):
        raise data.DataError(f"{name} is not here; {data.instead(name)}")

    monkeypatch.setattr(data, "find", lambda name: None)
    monkeypatch.setattr(data, "fetch", fetch)
    assert command.main(["semhash", "--device", "cpu"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: newsgroups is not here; the embedded data set 'topics' needs no file")


def test_nothing_is_measured_or_recorded_from_a_dirty_tree(house, monkeypatch, capsys):
    monkeypatch.setattr(harness, "measure", lambda *_, **__: pytest.fail("measured"))
    for git in ({"commit": "c0ffee", "dirty": True}, {"commit": "unknown", "dirty": False}):
        monkeypatch.setattr(runs, "git_state", lambda git=git: git)
        assert run("--record") == 1
        assert "changes that are not committed" in capsys.readouterr().err
    assert not list(house.rglob("*.json"))


@pytest.mark.parametrize(("words", "said"), [
    (["nothing"], "there is no benchmark 'nothing'"), (["gmm", "--seconds", "0"], "must be positive"),
    (["gmm", "--set", "lr"], "NAME=VALUE"), (["gmm", "--set", "width=3"], "gmm has no setting 'width'"),
    (["gmm", "--set", "joint=maybe"], "joint must be bool"), (["gmm", "--set", "item_every=0"], "at least 1"),
    (["gmm", "--batch", "63"], "four components"), (["gmm", "--variants", "faster"], "no variant 'faster' on cpu"),
    (["autoencoders", "--set", "model=aae", "--set", "dataset=digits"], "vae and ae, not 'aae'"),
    (["symmetric", "--set", "dataset=fashionmnist"], "binarised"),
    (["semhash", "--set", "dataset=topics", "--set", "encoder=e4"], "unknown encoder 'e4'"),
    (["semhash", "--set", "dataset=topics", "--set", "bits=0"], "bits must be at least 1"),
    (["semhash", "--set", "dataset=digits"], "has images, not documents"),
    (["gmm", "--device", "tpu"], "unknown device")])
def test_what_cannot_be_measured_is_said_in_one_line(house, capsys, words, said):
    assert command.main([*words, "--device", "cpu"] if "--device" not in words else words) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and said in error


def test_a_missed_aim_names_the_operators_that_hold_it(house, monkeypatch, capsys):
    monkeypatch.setattr(gmm, "AIMS", [{"device": "cpu", "settings": {"batch": 64}, "ratio": 1e9, "share": 0.0},
                                      {"device": "cuda", "settings": {"batch": 64}, "ratio": 5.0},
                                      {"device": "cpu", "settings": {"batch": 128}, "ratio": 5.0}])
    assert run() == 0
    printed = capsys.readouterr().out
    record = records.read(next((house / "runs" / "benchmarks").glob("*.json")))
    assert [(aim["what"], aim["met"]) for aim in record["aims"]] == [("ratio", False), ("share", True)]
    assert "1e+09 times the plain loop: missed" in printed and "what holds it" in printed
    assert record["held_by"][0]["share"] >= record["held_by"][-1]["share"] > 0
    assert any("mm" in one["operator"] for one in record["held_by"])
    assert run("--threads", "1") == 0                               # the aims are for all threads
    assert records.read(next((house / "runs" / "benchmarks").glob("*.json")))["aims"] == []


# ------------------------------------------------------------------------------------------------ records
def test_a_record_that_is_not_whole_is_refused(house, tmp_path):
    assert run() == 0
    path = next((house / "runs" / "benchmarks").glob("*.json"))
    record = json.loads(path.read_text())
    with pytest.raises(harness.BenchmarkError, match="no plain, finite number"):
        records.write(tmp_path, record | {"feed_ms": {"resident slices": math.inf}})
    path.write_text(json.dumps({key: value for key, value in record.items() if key != "rows"}))
    with pytest.raises(RunError, match="missing: rows"):
        records.read(path)
    path.write_text("{")
    with pytest.raises(RunError, match="cannot be read"):
        records.read(path)
    other = record | {"device": {"kind": "cuda", "name": "Some GPU (80 GB)", "threads": 1}}
    assert records.write(tmp_path / "all", other).name == "some-gpu-80-gb-gmm.json"
    records.write(tmp_path / "all", record)
    assert [one["device"]["kind"] for one in records.recorded(tmp_path / "all")] == ["cuda", "cpu"]


def test_the_pages_tables_are_drawn_from_records(house, tmp_path):
    assert run("--variants", "bf16") == 0
    found = records.recorded(house / "runs" / "benchmarks")
    (row,), (variant,) = records.table(found).reset_index().to_dict("records"), \
        records.variants(found).reset_index().to_dict("records")
    fit = found[0]["rows"]["fit"]
    assert row["work"] == "gmm" and row["fit / plain"].startswith(f"{fit['ratio']['median']:.2f} [")
    assert row["fit [steps/s]"].startswith(records.three(fit["steps_per_second"]["median"]))
    assert float(variant["variant / fit"]) > 0
    assert len(records.table([])) == len(records.variants([])) == 0
    assert [records.three(x) for x in (1234.5, 12.345, 0.98765, 0)] == ["1234", "12.3", "0.988", "0"]
