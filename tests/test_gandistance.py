"""Distances of the GAN's images: what differs is seen, what does not is at the floor, each way is its own."""
import matplotlib.pyplot as plt
import pytest
import torch

from lib import data, dcgan, gandistance, plots_gan
from lib.train import generator


@pytest.fixture(scope="module")
def nets():
    """(truth, discriminator, pairs): the joint pair's decoder has other weights, its encoder is the first one's."""
    made = [dcgan.initialise(kind(*size), generator(seed)) for seed, (kind, size) in enumerate((
        (dcgan.Generator, (4, 4)), (dcgan.Generator, (4, 4)), (dcgan.Encoder, (4, 4)), (dcgan.Discriminator, (4,))))]
    with torch.no_grad():
        for net in made[:2]:
            for weight in net.parameters():
                weight.mul_(5)                                           # as drawn, images are nearly grey
    truth, other, encoder, discriminator = map(dcgan.frozen, made)
    return truth, discriminator, {"encoder_only": (encoder, truth), "joint": (encoder, other)}


def test_sets_are_of_the_same_codes_and_noise_comes_on_top(nets):
    truth, _, pairs = nets
    sets = gandistance.image_sets(truth, pairs, 20, generator(1))
    assert set(sets) == {"originals", *(f"{name}{how}" for name in pairs for how in ("", "_noise"))}
    assert all(images.shape == (20, 3, 64, 64) and images.dtype == torch.uint8 for images in sets.values())
    z = torch.randn(20, 4, generator=generator(1))
    assert torch.equal(sets["originals"], dcgan.to_uint8(dcgan.generate(truth, z)))
    apart = (sets["joint_noise"].float() - sets["joint"].float()) / 127.5
    inner = (sets["joint"] > 40) & (sets["joint"] < 215)                 # not clipped
    assert apart[inner].std() == pytest.approx(dcgan.SIGMA, rel=0.05)
    single = gandistance.image_sets(truth, pairs, 20, generator(1), "batch-1")
    assert not torch.equal(single["originals"], sets["originals"])


def test_the_truths_own_images_are_at_the_floor_and_another_decoders_are_not(nets):
    truth, _, pairs = nets
    found = gandistance.compare(truth, pairs, 40, generator(1))
    floor, samples = found["swd_floor"], found["swd_samples"]
    assert samples["value"] - floor["value"] > 5 * (samples["se"] + floor["se"])
    for pair in pairs:
        assert {f"{key}_{pair}{how}" for key in ("swd", "swd_64", "sw_pixels")
                for how in ("", "_noise", "_batch1", "_as_published")} <= set(found)
    assert found["swd_encoder_only_as_published"] == found["swd_encoder_only_batch1"]
    assert found["swd_joint_as_published"] != found["swd_joint_batch1"]
    assert not any(key.startswith("fid") for key in found) or gandistance.judge(torch.device("cpu"))
    again = gandistance.compare(truth, pairs, 40, generator(1))
    assert again == found
    shown = gandistance.headline(found)
    assert "swd_joint_as_published" in shown and len(shown) == len(set(shown))


def test_drift_is_the_root_mean_square_of_what_two_decoders_make_of_the_same_codes(nets):
    truth, _, pairs = nets
    decoder, z = pairs["joint"][1], torch.randn(30, 4, generator=generator(1))
    with torch.no_grad():
        apart = (truth(z) - decoder(z)).double().square().flatten(1).mean(1)
    found = gandistance.drift(truth, decoder, 30, generator(1))
    assert found["value"] == pytest.approx(apart.mean().sqrt().item(), rel=1e-5)
    assert found["se"] == pytest.approx((apart.std() / 30 ** 0.5 / (2 * apart.mean().sqrt())).item(), rel=1e-4)
    assert gandistance.drift(truth, truth, 30, generator(1))["value"] == 0


def test_feature_errors_are_in_units_of_the_originals_variance(nets):
    truth, discriminator, pairs = nets
    sets = gandistance.image_sets(truth, pairs, 40, generator(1))
    sets |= {"same": sets["originals"], "shuffled": sets["originals"].roll(1, 0)}
    found = gandistance.features(discriminator, sets)
    assert found["feature_same"]["value"] == 0
    assert found["feature_shuffled"]["value"] == pytest.approx(2, rel=0.3)          # two independent images
    assert not any(name.endswith("noise") for name in found)


def test_a_gan_that_has_collapsed_has_no_spread(nets):
    truth, images = nets[0], data.load("shapes")
    alive = gandistance.against_real(truth, images, 40, generator(1))
    dead = dcgan.frozen(dcgan.initialise(dcgan.Generator(4, 4), generator(0)))
    torch.nn.init.zeros_(dead.net[0].weight)
    dead = gandistance.against_real(dead, images, 40, generator(1))
    assert dead["spread"]["value"] < 1e-3 < alive["spread"]["value"]
    assert alive["spread"]["n"] == 40 and alive["spread"]["se"] > 0
    assert alive["swd_floor"]["value"] < alive["swd_real"]["value"]


def test_the_finding_has_a_panel_for_each_score_and_a_row_for_each_kind_of_image(nets):
    truth, _, pairs = nets
    metrics = gandistance.likelihoods(truth, pairs, 20, generator(1))
    metrics |= gandistance.compare(truth, pairs, 20, generator(2))
    named = {"encoder only": pairs["encoder_only"], "joint": pairs["joint"]}
    pictures = gandistance.reconstructions(truth, named, 3, generator(3))
    called = {"encoder_only": "encoder only", "joint": "joint"}
    fig = plots_gan.finding(metrics, pictures, called)
    elbo, swd, rows = [ax for part in fig.subfigs for ax in part.axes]
    assert [text.get_text() for text in elbo.get_xticklabels()] == ["encoder only", "joint"]
    assert "ELBO" in elbo.get_ylabel() and "SWD" in swd.get_ylabel()
    assert [text.get_text() for text in rows.get_yticklabels()] == ["G(z)", "x", "encoder only", "joint"]
    with_fid = metrics | {f"fid_{name}": {"value": 1.0, "se": None, "n": 20, "unit": "FID"} for name in called}
    assert len([ax for part in plots_gan.finding(with_fid, pictures, called).subfigs for ax in part.axes]) == 4
    hows = {"": "as it should be", "_as_published": "as in the code"}
    (ax,) = plots_gan.ways(metrics, called, hows).axes
    assert [text.get_text() for text in ax.get_yticklabels()] == list(hows.values())
    plt.close("all")
