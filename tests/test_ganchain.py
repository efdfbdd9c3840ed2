"""The stages of the GAN as ground truth: exact resume, what a stage takes from the one before and what it refuses."""
import dataclasses
import errno
import json
import os
import random
import re
import shutil
import subprocess
import sys

import pytest
import small_gan
import torch
from small_gan import assert_same, faces, job, learn, weights

from lib import BookError, album, checkpoint, data, dcgan, ganchain, runs, train
from lib import __main__ as command
from lib.train import TrainError

STAGES = ("celeba-gan", "celeba-encoder", "celeba-joint")


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Little to look at, so that looks do not take longer than the steps."""
    monkeypatch.setattr(ganchain, "LOOKED_AT", 12)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A GAN of four epochs, an encoder fitted to it and a joint training: {experiment: run folder}."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ganchain, "LOOKED_AT", 12)
        top, before, found = tmp_path_factory.mktemp("chain"), "", {}
        for experiment, changed in zip(STAGES, ({"epochs": 4, "keep_every": 2}, {}, {}), strict=True):
            learn(experiment, top / experiment, before, **changed)
            before = found[experiment] = top / experiment
    return found


def stage(folders, experiment, folder, epoch=0):
    """What a run of the experiment starts from."""
    own = small_gan.run(experiment, folder)
    return ganchain.before(own, folders[ganchain.BEFORE[experiment]], epoch)


# ------------------------------------------------------------------------------------------------ resume
@pytest.mark.parametrize(("experiment", "short", "long"), [
    ("celeba-gan", {"epochs": 2}, {"epochs": 4}), ("celeba-encoder", {"steps": 5}, {"steps": 10}),
    ("celeba-joint", {"steps": 5}, {"steps": 10})])
def test_a_training_that_stops_and_goes_on_is_the_uninterrupted_one(experiment, short, long, folders, tmp_path):
    """In the middle of a log window too; weights, moments, noise, history and pictures to the bit."""
    before = folders.get(ganchain.BEFORE.get(experiment), "")
    whole, _ = learn(experiment, tmp_path / "whole", before, **long)
    first, _ = learn(experiment, tmp_path / "parts", before, **short)
    resumed, state = learn(experiment, tmp_path / "parts", before, resume="auto", **long)
    assert resumed == whole and whole["step"] == ([6, 12, 18, 24] if "epochs" in long else [2, 4, 6, 8, 10])
    assert len(first["step"]) < len(whole["step"]) and int(state["clock"].steps) == whole["step"][-1]
    for extra in (tmp_path / "parts").rglob("00000005.png"):                # the picture of the end that was none
        extra.unlink()
    assert_same(tmp_path / "parts", tmp_path / "whole")
    assert len(list((tmp_path / "whole" / "progress").iterdir())) == len(whole["step"])


def test_trainings_that_are_killed_and_resumed_are_the_uninterrupted_ones(folders, tmp_path):
    """SIGKILL at random steps and while a checkpoint or a picture is written."""
    shutil.copytree(folders["celeba-encoder"], tmp_path / "encoder")
    seed = str(random.SystemRandom().randrange(10 ** 6))
    script = subprocess.run([sys.executable, small_gan.__file__, str(tmp_path / "killed"), seed], capture_output=True,
                            text=True, timeout=900, env={**os.environ, "OMP_NUM_THREADS": "1"})
    told = f"seed {seed}\n{script.stdout}{script.stderr}"
    assert script.stdout.count("killed") == 6 and script.stdout.count("exit 0") == 2, told
    for kind in ("gan", "joint"):
        whole = tmp_path / "whole" / kind
        small_gan.killed_training.fit(kind, whole, stop=small_gan.STEPS)
        for partial in (tmp_path / "killed" / kind).rglob(".*.partial"):      # `lib run` removes them
            partial.unlink()
        assert_same(tmp_path / "killed" / kind / "0", whole / "0", told)


@pytest.mark.parametrize("experiment", STAGES[1:])
def test_a_training_is_not_resumed_with_another_ground_truth(experiment, folders, tmp_path):
    """Another GAN, or of the same GAN another encoder."""
    for folder in folders.values():
        shutil.copytree(folder, tmp_path / folder.name)
    before = ganchain.BEFORE[experiment]
    learn(before, tmp_path / "other", folders.get(ganchain.BEFORE.get(before), ""), seed=2)
    with pytest.raises(TrainError, match="was trained with truth = '[0-9a-f]{64}', this run has '[0-9a-f]{64}'"):
        learn(experiment, tmp_path / experiment, tmp_path / "other", steps=7, resume="auto")
    learn(experiment, tmp_path / experiment, tmp_path / before, steps=7, resume="auto")         # a copy is no other


@pytest.mark.parametrize(("experiment", "name", "value"), [
    ("celeba-gan", "nz", 5), ("celeba-gan", "lr", 0.1), ("celeba-encoder", "sigma", 0.1),
    ("celeba-encoder", "last_layer", "zero"), ("celeba-joint", "batch_size", 5)])
def test_a_training_is_not_resumed_with_other_parameters(experiment, name, value, folders, tmp_path):
    shutil.copytree(folders[experiment], tmp_path / "run")
    before = folders.get(ganchain.BEFORE.get(experiment), "")
    with pytest.raises(TrainError, match=f"was trained with {name} = .*, this run has {value!r}: resume with the same"):
        learn(experiment, tmp_path / "run", before, resume="latest", **{name: value})


# ------------------------------------------------------------------------------------------------ from stage to stage
def test_each_stage_carries_the_networks_of_those_before_unchanged(folders):
    def same(part, experiment, other, earlier):
        own, before = (weights(folders[each], name) for each, name in ((experiment, part), (earlier, other)))
        assert len(own) > 5 and [*map(torch.equal, own.values(), before.values())] == [True] * len(before)

    same("truth", "celeba-encoder", "generator", "celeba-gan")
    same("truth", "celeba-joint", "generator", "celeba-gan")
    same("discriminator", "celeba-encoder", "discriminator", "celeba-gan")
    same("discriminator", "celeba-joint", "discriminator", "celeba-gan")
    same("first_encoder", "celeba-joint", "encoder", "celeba-encoder")
    for part, start in (("encoder", "first_encoder"), ("decoder", "truth")):
        own, before = (weights(folders["celeba-joint"], name) for name in (part, start))
        assert not any(torch.equal(value, before[key.replace(part, start, 1)]) for key, value in own.items()
                       if value.is_floating_point())


def test_the_joint_training_starts_at_the_encoder_and_the_truth(folders, tmp_path):
    made = job(small_gan.run("celeba-joint", tmp_path), stage(folders, "celeba-joint", tmp_path))
    state = made["state"]
    for part, start in (("encoder", "first_encoder"), ("decoder", "truth")):
        assert all(map(torch.equal, state[part].state_dict().values(), state[start].state_dict().values()))
        assert all(p.requires_grad for p in state[part].parameters()) and state[part].training
        assert not any(p.requires_grad for p in state[start].parameters()) and not state[start].training
    assert made["config"]["sigma"] == 0.05 and made["config"]["sizes"] == [small_gan.NZ, small_gan.NGF, small_gan.NDF]


def test_sigma_is_the_one_the_encoder_was_fitted_with(folders, tmp_path):
    learn("celeba-encoder", tmp_path / "encoder", folders["celeba-gan"], sigma=0.3)
    own = small_gan.run("celeba-joint", tmp_path / "joint")
    made = job(own, ganchain.before(own, tmp_path / "encoder"))
    noise = train.generator(own.parameters["seed"])
    _, x = dcgan.draw(made["state"]["truth"], 4, noise, 0.3)
    with torch.no_grad():
        rec = dcgan.elbo_terms(made["state"]["encoder"], made["state"]["decoder"], x, noise, 0.3)[1].mean()
    found = train.fit(**made, steps=1, numerics="fp32")
    assert found["rec"] == [pytest.approx(rec.item(), rel=1e-5)] and made["config"]["sigma"] == 0.3


def test_kept_epochs_hold_the_weights_of_that_epoch(folders, tmp_path):
    gan = folders["celeba-gan"]
    assert sorted(path.name for path in (gan / "epochs").iterdir()) == ["002", "004"]
    learn("celeba-gan", tmp_path / "two", epochs=2, keep_every=2)
    for kept, ended in ((gan / "epochs/002", tmp_path / "two"), (gan / "epochs/004", gan)):
        own, whole = weights(kept), weights(ended, "generator", "discriminator")
        assert own.keys() == whole.keys() and all(torch.equal(own[name], whole[name]) for name in whole)
    early, last = (stage(folders, "celeba-encoder", tmp_path / "e", epoch) for epoch in (2, 0))
    truths = [ganchain.networks(each, "generator")[0].state_dict() for each in (early, last)]
    found = weights(tmp_path / "two", "generator")
    assert all(torch.equal(found[f"generator/{name}"], value) for name, value in truths[0].items())
    assert not all(map(torch.equal, *(truth.values() for truth in truths)))
    with pytest.raises(runs.RunError, match=re.escape(f"{gan} holds no weights of epoch 3; there are [2, 4]")):
        stage(folders, "celeba-encoder", tmp_path / "e", 3)


def test_a_digest_tells_weights_and_running_statistics_apart():
    net, discriminator, encoder = small_gan.networks()
    before = ganchain.digest(net, encoder)
    assert before == ganchain.digest(*small_gan.networks()[::2]) != ganchain.digest(encoder, net)
    assert before != ganchain.digest(net)
    net.net[1].running_mean[0] += 1e-6
    assert before != ganchain.digest(net, encoder)


def test_a_run_says_what_it_comes_from(folders):
    """The runs before with what made them, and the ground truth's own seed and images."""
    first, second, last = (runs.read(folders[experiment] / "results.json") for experiment in STAGES)
    assert [one["experiment"] for one in last["chain"]] == ["celeba-gan", "celeba-encoder"]
    for one, record in zip(last["chain"], (first, second), strict=True):
        assert one["made_by"] and all(record[name] == value for name, value in one.items())
        assert {"parameters", "git", "command", "reduced"} < one.keys()
    assert second["chain"] == last["chain"][:1] and "chain" not in first
    assert (second["started_from"], last["started_from"]) == ("gan", "encoder")
    assert first["dataset"] == second["dataset"] == last["dataset"] == {"name": "shapes", "sha256": "0" * 64}
    assert "nz 4 instead of 100" in first["reduced"] and "celeba-gan: nz 4 instead of 100" in second["reduced"]
    assert "steps 5 instead of 1000000" in second["reduced"] and not any("gan " in what for what in second["reduced"])
    assert {f"{experiment}: batch_size 4 instead of 128" for experiment in STAGES[:2]} <= set(last["reduced"])
    assert last["reduced"].count("batch_size 4 instead of 128") == 1


def test_the_seed_is_that_of_the_ground_truth(folders, tmp_path):
    learn("celeba-gan", tmp_path / "gan", seed=7, epochs=1)
    learn("celeba-encoder", tmp_path / "encoder", tmp_path / "gan", seed=3, steps=1)
    record = runs.read(tmp_path / "encoder" / "results.json")
    assert (record["seed"], record["parameters"]["seed"], record["chain"][0]["seed"]) == (7, 3, 7)


def test_the_album_and_the_looks_show_what_they_say(folders, tmp_path):
    """spread, val_loss, val_elbo and drift of fixed codes and images, from the trained networks."""
    state = learn("celeba-gan", tmp_path / "gan", epochs=1)[1]
    made = job(small_gan.run("celeba-gan", tmp_path / "look"))
    made["state"]["generator"].load_state_dict(state["generator"].state_dict())
    z = torch.randn(20, small_gan.NZ, generator=train.generator(1, use="look"))
    images = dcgan.generate(state["generator"], z)
    assert made["look"]()["spread"].item() == pytest.approx(images.std(0, correction=0).square().mean().sqrt().item())
    steps, pages = album.Album(tmp_path / "gan", "GAN").pages(3)
    assert steps == [6] and torch.allclose(pages[0], (images[:10] + 1) / 2, atol=0.003)

    made = job(small_gan.run("celeba-joint", tmp_path / "joint"), stage(folders, "celeba-joint", tmp_path / "joint"))
    first = {name: value.item() for name, value in made["look"]().items()}
    assert first["drift"] == 0 and first == {name: value.item() for name, value in made["look"]().items()}
    with torch.no_grad():
        made["state"]["decoder"].net[-2].weight.mul_(-1)                    # the negative images
    z, _ = dcgan.draw(made["state"]["truth"], 12, train.generator(1, use="look"))
    expected = 2 * made["state"]["truth"](z).square().mean().sqrt().item()
    assert made["look"]()["drift"].item() == pytest.approx(expected, rel=1e-4) and made["state"]["decoder"].training


# ------------------------------------------------------------------------------------------------ refused
def refused(own, folder, said, epoch=0):
    with pytest.raises(runs.RunError) as error:
        ganchain.before(own, folder, epoch)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_stage_before_that_cannot_be_taken_is_refused_in_a_sentence(folders, tmp_path):
    own, gan = small_gan.run("celeba-joint", tmp_path / "joint"), folders["celeba-gan"]
    encoder = shutil.copytree(folders["celeba-encoder"], tmp_path / "encoder")
    then = "end `python -m lib run celeba-encoder` first, and give its folder as encoder"
    refused(own, tmp_path / "nowhere", f"the run folder {tmp_path}/nowhere does not exist: {then}")
    refused(own, gan, f"{gan} holds a run of celeba-gan, celeba-joint starts from one of celeba-encoder")
    refused(own, folders["celeba-joint"], "holds a run of celeba-joint, celeba-joint starts from one of celeba-encoder")
    (encoder / "latest.safetensors").rename(encoder / "lost")
    refused(own, encoder, f"{encoder} holds no weights: make them again with `python -m lib run celeba-encoder")
    for content in (b"", b"no checkpoint", (encoder / "lost").read_bytes()[:-100]):
        (encoder / "latest.safetensors").write_bytes(content)
        refused(own, encoder, f"checkpoint {encoder}/latest.safetensors cannot be read (")
    (encoder / "results.json").rename(encoder / "results.json.pending")
    refused(own, encoder, f"the run folder {encoder} is not complete: {then}")
    (encoder / "results.json").write_text("{")
    refused(own, encoder, f"{encoder}/results.json cannot be read")
    (encoder / "results.json").write_text("{}")
    refused(own, encoder, f"{encoder}/results.json is not a results.json of schema 1")


def test_a_checkpoint_of_other_networks_is_refused(folders, tmp_path):
    found = stage(folders, "celeba-encoder", tmp_path)
    wider = dataclasses.replace(found, config=found.config | {"sizes": [small_gan.NZ, 7, small_gan.NDF]})
    with pytest.raises(TrainError, match="does not fit this model"):
        ganchain.networks(wider, "generator")
    with pytest.raises(TrainError, match="does not fit this model"):
        ganchain.networks(found, "first_encoder")


def test_without_a_folder_the_stages_before_are_made_but_not_for_a_preset(tmp_path, monkeypatch):
    for experiment, short in (("celeba-encoder", "gan"), ("celeba-joint", "encoder"), ("celeba-fid", "joint")):
        own = runs.Run(experiment, "cpu", "cpu", {}, tmp_path, {})
        refused(own, "", f"{experiment} starts from a run of celeba-{short}: give its folder, --set {short}=runs/")
    small = {**small_gan.SMALL, "celeba-gan": small_gan.SMALL["celeba-gan"] | {"epochs": 1}}
    check = runs.check
    monkeypatch.setattr(runs, "check", lambda name, values: check(name, small[name] | {"device": "cpu"} | values))
    monkeypatch.setattr(ganchain, "images", lambda parameters: faces())
    found = ganchain.before(small_gan.run("celeba-joint", tmp_path / "joint"), "")
    assert found.folder == tmp_path / "joint" / "celeba-encoder"
    assert (found.folder / "celeba-gan" / "results.json").is_file()
    assert [one["experiment"] for one in ganchain.chain(found)] == ["celeba-gan", "celeba-encoder"]
    assert checkpoint.read_meta(found.path)["step"] == 5 and found.record["parameters"]["batch_size"] == 4
    monkeypatch.setattr(ganchain, "fit", lambda **named: pytest.fail("trained again"))
    again = ganchain.before(small_gan.run("celeba-joint", tmp_path / "joint", resume="auto"), "")
    assert again == found                                                   # it is what the run began with


def test_a_relative_folder_starts_at_the_top_of_the_checkout(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(ganchain, "root", lambda: folders["celeba-gan"].parent)
    monkeypatch.chdir(tmp_path)
    found = ganchain.before(small_gan.run("celeba-encoder", tmp_path / "run"), "celeba-gan", 2)
    assert found.path == folders["celeba-gan"] / "epochs/002/latest.safetensors"


@pytest.mark.parametrize(("name", "value", "least"), [
    *((name, 0, 1) for name in ("epochs", "steps", "nz", "ngf", "ndf", "keep_every", "log_every", "checkpoint_every")),
    ("batch_size", 1, 2), ("n_images", 1, 2), ("epoch", -1, 0)])
def test_values_that_would_mean_nothing_are_refused(name, value, least):
    with pytest.raises(ValueError, match=f"^{name} must be at least {least}, got {value}$"):
        ganchain.check({name: value})
    ganchain.check({name: least, "seed": -3, "device": "cpu", "lr": 1e-9, "sigma": 1e-9})


@pytest.mark.parametrize("name", ["lr", "sigma"])
@pytest.mark.parametrize("value", [0.0, -0.1])
def test_values_that_must_be_positive_are_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be positive, got {value}$"):
        ganchain.check({name: value})


def test_images_are_the_two_of_64_pixels_in_colour(monkeypatch):
    with pytest.raises(data.DataError, match="64x64 images in colour, got 'mnist': choose celeba, or shapes"):
        ganchain.images({"dataset": "mnist", "crop": "resize"})
    asked = []
    monkeypatch.setattr(data, "load", lambda *words: asked.append(words))
    for name in ("celeba", "shapes"):
        ganchain.images({"dataset": name, "crop": "face-128"})
    assert asked == [("celeba", 64, "face-128"), ("shapes", 64, "")]


def test_too_few_images_for_a_batch_are_refused(tmp_path):
    with pytest.raises(TrainError, match="batch size must be between 1 and the 24 training items, got 25"):
        job(small_gan.run("celeba-gan", tmp_path, batch_size=25))


@pytest.mark.parametrize(("experiment", "module", "said"), [
    ("celeba-gan", album, "cannot write a picture to {}/progress: No space left"),
    ("celeba-gan", checkpoint, "cannot write the checkpoint of step 6 to {}/epochs/001: No space left"),
    ("celeba-encoder", album, "cannot write a picture to {}/progress: No space left"),
    ("celeba-joint", checkpoint, "cannot write the checkpoint of step 3 to {}: No space left")])
def test_a_full_disk_is_a_sentence_and_the_training_goes_on_from_there(experiment, module, said, folders, tmp_path,
                                                                       monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = folders.get(ganchain.BEFORE.get(experiment), "")
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_atomic", full)
        with pytest.raises(BookError) as error:
            learn(experiment, tmp_path / "full", before)
    assert said.format(tmp_path / "full") in str(error.value) and "free space" in str(error.value)
    assert "\n" not in str(error.value)
    for folder, resume in (("full", "auto"), ("whole", "")):
        learn(experiment, tmp_path / folder, before, resume=resume)
    assert_same(tmp_path / "full", tmp_path / "whole")


# ------------------------------------------------------------------------------------------------ end to end
CHANGES = {"celeba-gan": {"epochs": 1, "batch_size": 32, "n_images": 64},
           "celeba-encoder": {"batch_size": 32, "log_every": 75, "n_images": 64},
           "celeba-joint": {"batch_size": 32, "steps": 20, "n_images": 64}, "celeba-fid": {"n_images": 64}}


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """The notebooks of the chain, executed one after the other: {experiment: run folder}."""
    top, before, found = tmp_path_factory.mktemp("notebooks"), {}, {}
    for experiment in ("celeba-gan", *(name for name in ganchain.BEFORE if name in runs.notebooks())):
        changes = CHANGES[experiment] | before
        words = [word for name, value in changes.items() for word in ("--set", f"{name}={value}")]
        found[experiment] = top / experiment
        assert command.main(["run", experiment, "--out", str(found[experiment]), "--threads", "1", *words]) == 0
        before = {experiment.removeprefix("celeba-"): found[experiment]}
    return found


def test_the_notebooks_run_one_after_the_other_each_from_the_folder_before(chain):
    assert list(chain)[:3] == list(STAGES)
    records = {name: runs.read(folder / "results.json") for name, folder in chain.items()}
    for name, folder in chain.items():
        record = records[name]
        assert record["experiment"] == name and all((folder / picture).is_file() for picture in record["figures"])
        assert record["figures"] and record["metrics"]
        assert [one["experiment"] for one in record.get("chain", [])] == list(chain)[:list(chain).index(name)]
        assert not (folder / "celeba-gan").exists()                         # none was made on the way
        cells = json.loads((folder / "notebook.ipynb").read_text())["cells"]
        assert not any(output["output_type"] == "error" for cell in cells for output in cell.get("outputs", []))
    elbo = {name: record["metrics"].get("elbo_encoder_only", {}).get("value") for name, record in records.items()}
    joint = records["celeba-joint"]["metrics"]["elbo_joint"]["value"]
    assert elbo["celeba-encoder"] == elbo["celeba-joint"] < joint           # the same pair on the same images


def test_a_notebook_given_the_folder_of_another_stage_says_so_in_one_line(chain, tmp_path, capfd):
    gan = chain["celeba-gan"]
    assert command.main(["run", "celeba-joint", "--set", f"encoder={gan}", "--out", str(tmp_path / "joint")]) == 1
    assert capfd.readouterr().err == (f"error: celeba-joint: {gan} holds a run of celeba-gan, celeba-joint starts from "
                                      "one of celeba-encoder\n")
    assert not (tmp_path / "joint" / "results.json").exists()
