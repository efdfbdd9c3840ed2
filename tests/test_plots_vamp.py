"""The figures of the VampPrior chapters say what they are given; the embedding is repeatable and quiet."""
import math
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from lib import embedding, evaluate, plots_vamp

NAN = math.nan


@pytest.fixture(autouse=True)
def quiet():
    """Every warning while a figure is made and drawn is an error; no figure stays."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    plt.close("all")


def draw(fig):
    """The figure's axes, after drawing it whole."""
    fig.canvas.draw()
    return fig.axes


def titles(axes):
    return [ax.get_title(loc="left") for ax in axes]


def legend(fig):
    return [text.get_text() for own in fig.legends for text in own.get_texts()]


def metric(value, se=0.1, n=3, **more):
    return {"value": value, "se": se, "n": n, "unit": "nats per image"} | more


# ------------------------------------------------------------------------------------------------ latents
def test_the_latents_limits_hold_nearly_all_codes_of_every_panel():
    z = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(2000) % 2
    axes = draw(plots_vamp.latents({"drawn": 100 * z, "means": 10 * z}, labels, ("a", "b")))
    assert titles(axes) == ["drawn", "means"]
    low, high = axes[0].get_xlim()
    assert (axes[0].get_ylim(), axes[1].get_xlim(), axes[1].get_ylim()) == ((low, high),) * 3 and low == -high
    assert 0.99 < (100 * z.abs().amax(1) <= high).float().mean() < 1
    assert high < 1.2 * (100 * z.abs().amax(1)).quantile(0.995)
    for ax, scale in zip(axes, (100, 10), strict=True):
        assert ax.get_aspect() == 1 and [text.get_text() for text in ax.texts] == ["a", "b"]
        offsets = np.concatenate([each.get_offsets() for each in ax.collections])
        assert len(ax.collections) == 2 and np.abs(offsets).max() == pytest.approx(scale * z.abs().max().item())
    assert axes[0].get_ylabel() == "$z_2$" and not axes[1].get_ylabel()


def test_the_prior_is_drawn_over_the_latents():
    z, labels, means = 300 * torch.eye(2).repeat(3, 1), torch.arange(6) % 2, torch.tensor([[1.0, 2], [30, 40], [5, 6]])
    fig = plots_vamp.latents({"z": z}, labels, ("a", "b"), ("UMAP 1", "UMAP 2"), components=means, normal=True)
    ax, = draw(fig)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("UMAP 1", "UMAP 2")
    assert np.allclose(ax.collections[-1].get_offsets(), means)
    circle = np.hypot(*ax.lines[0].get_data())
    assert np.allclose(circle, 2.4477, atol=1e-4) and 1 - math.exp(-circle[0] ** 2 / 2) == pytest.approx(0.95)
    assert legend(fig) == ["means of the prior's components, $K$ = 3", "95 % of $N(0, I)$"]
    assert ax.texts[-1].get_text() == "$N(0, I)$"                        # so small that an arrow points to it
    small, = draw(plots_vamp.latents({"z": z / 1000}, labels, ("a", "b"), normal=True))
    assert [text.get_text() for text in small.texts] == ["a", "b"] and small.get_xlim()[1] > 2.4477
    line, = draw(plots_vamp.latents({"z": z}, labels, ("a", "b"), components=means[:, :1]))
    assert line.lines[0].get_xdata().tolist() == [1, 30, 5]


@pytest.mark.parametrize("normal", [False, True])
def test_equal_codes_and_a_single_component_are_drawn(normal):
    z = torch.zeros(3, 2)
    fig = plots_vamp.latents({"a": z, "b": z}, torch.tensor([0, 1, 1]), ("x", "y"), components=z[:1], normal=normal)
    low, high = draw(fig)[0].get_xlim()
    assert low < 0 < high
    assert draw(plots_vamp.latents({"a": z}, torch.zeros(3), ("x",), limit=7.0))[0].get_xlim() == (-7, 7)


# ------------------------------------------------------------------------------------------------ images
def test_the_first_images_of_each_class_are_found():
    labels = torch.tensor([1, 0, 1, 1, 0, 0, 1])
    assert plots_vamp.of_each_class(labels, 2, 2).tolist() == [[1, 4], [0, 2]]
    assert plots_vamp.of_each_class(labels, 2, 9).tolist() == [[1, 4, 5], [0, 2, 3]]      # as many as the fewest have
    with pytest.raises(ValueError, match="no image of class 2"):
        plots_vamp.of_each_class(labels, 3)


def test_grids_by_class_name_their_rows():
    images = torch.linspace(0, 1, 6)[:, None, None, None].expand(6, 1, 8, 8)
    left, right = draw(plots_vamp.grids({"test images": images, "reconstructions": 1 - images}, rows=("cat", "dog")))
    assert titles((left, right)) == ["test images", "reconstructions"]
    assert [tick.get_text() for tick in left.get_yticklabels()] == ["cat", "dog"] and not right.get_yticklabels()
    for ax, values in ((left, images), (right, 1 - images)):
        picture = ax.images[0].get_array()
        assert picture.shape == (18, 28)                                 # 2 rows of 3 images, gaps of 2
        centres = picture[[4, 14]][:, [4, 14, 24]]
        assert np.allclose(centres, values[:, 0, 0, 0].view(2, 3))
    ticks = left.get_yticks()
    assert np.allclose(ticks, [3.5, 13.5])                               # the middles of the rows


def test_grids_wrap_and_pad_with_white():
    images = torch.zeros(5, 1, 4, 4)
    ax, = draw(plots_vamp.grids({"pseudo-inputs": images}, columns=3))
    picture = ax.images[0].get_array()
    assert picture.shape == (10, 16) and picture[8, 8] == 0 and picture[8, 14] == 1
    assert draw(plots_vamp.grids({"one": images[:1]}))[0].images[0].get_array().shape == (4, 4)
    prior, normal = draw(plots_vamp.grids({"prior": images.repeat(5, 1, 1, 1), "normal": images.repeat(5, 1, 1, 1)}))
    assert prior.images[0].get_array().shape == normal.images[0].get_array().shape == (16, 58)        # 10 columns each


# ------------------------------------------------------------------------------------------------ training
def test_the_loss_history_has_a_panel_for_each_term():
    epochs = list(range(1, 41))
    falling = [1000.0 if k < 4 else 140 - 0.1 * k for k in epochs]
    history = {"epoch": epochs} | {name: falling for name in ("loss", "rec", "kl", "val_loss", "val_rec", "val_kl")}
    fig = plots_vamp.loss_history(history, "vae", best=30)
    axes = draw(fig)
    assert titles(axes) == list(plots_vamp.HISTORY.values()) and axes[0].get_ylabel() == "nats per image"
    for ax in axes:
        train, val, best = ax.lines
        assert (train.get_linestyle(), val.get_linestyle()) == ("-", "--") and list(train.get_ydata()) == falling
        assert best.get_xdata()[0] == 30 and ax.get_xlabel() == "epoch" and ax.get_ylim()[1] < 141
    assert legend(fig) == ["training", "validation", "kept: epoch 30"] and fig.get_suptitle() == "vae"


def test_a_short_history_is_drawn_as_far_as_it_goes():
    fig = plots_vamp.loss_history({"step": [10], "loss": [200.0], "rec": []})
    ax, = draw(fig)
    assert ax.get_xlabel() == "step" and legend(fig) == ["training"] and ax.lines[0].get_marker() == "o"


# ------------------------------------------------------------------------------------------------ likelihoods
def test_likelihood_by_components_has_a_line_a_model():
    points = [(500, -82.0, 0.1, "vae"), (1, -85.0, 0.2, "vae"), (10, -84.0, None, "vae"), (10, -82.0, 0.1, "hvae")]
    fig = plots_vamp.by_components(points, "mnist")
    ax, = draw(fig)
    assert ax.get_xscale() == "log" and [text.get_text() for text in ax.get_xticklabels()] == ["1", "10", "500"]
    vae, hvae = ax.containers
    assert vae.lines[0].get_xdata().tolist() == [1, 10, 500] and vae.lines[0].get_ydata().tolist() == [-85, -84, -82]
    heights = [np.ptp(each[:, 1]) for each in vae.lines[2][0].get_segments()]
    assert np.allclose(heights, [0.8, 0, 0.4])                           # ±2 standard errors
    assert vae.lines[0].get_marker() != hvae.lines[0].get_marker() and legend(fig) == ["vae", "hvae"]


def test_improvements_are_paired_by_seed():
    a, b = [-82.0, -83.0, -82.5], [-84.0, -84.1, -84.9]
    fig = plots_vamp.improvement({"VAE": (a, b), "HVAE": ([-50.0], [-51.0])}, {"VAE": 2.12})
    ax, = draw(fig)
    by_marker = {marker: [line for line in ax.lines if line.get_marker() == marker] for marker in "oD*"}
    assert np.allclose(by_marker["o"][0].get_xdata(), [2.0, 1.1, 2.4]) and by_marker["o"][1].get_xdata() == [1]
    expected = evaluate.paired(a, b, "")
    assert len(by_marker["D"]) == len(ax.collections) == 1               # one pair has no interval
    assert np.allclose(ax.collections[0].get_segments()[0][:, 0], [expected["low"], expected["high"]])
    assert by_marker["D"][0].get_xdata() == [expected["value"]] and by_marker["*"][0].get_xdata() == [2.12]
    low, high = ax.get_xlim()
    assert low < 0 < high and [text.get_text() for text in ax.texts] == ["$n$ = 3", "$n$ = 1"]
    assert legend(fig) == ["one seed", "mean, 95 % interval over $n$ seeds", "published"]


# ------------------------------------------------------------------------------------------------ units
def test_units_are_sorted_and_counted():
    kl = {"vae": {"$z_2$": 25.0}, "hvae": {"$z_2$": 7.1, "$z_1$": 18.9}}
    fig = plots_vamp.units({"vae": torch.tensor([0.5, 0.0, 2.0]), "hvae": torch.zeros(2)}, kl)
    bars, ax = draw(fig)
    assert legend(fig) == ["vae: 2 of 3 active", "hvae: 0 of 2 active"] and ax.get_yscale() == "log"
    threshold, vae, hvae = ax.lines
    assert threshold.get_ydata()[0] == 0.01 and np.allclose(vae.get_ydata(), [2, 0.5, 1e-5])
    assert (hvae.get_ydata() > 0).all()                                  # a logarithm has no 0
    assert [(bar.get_x(), bar.get_width()) for bar in bars.patches] == [(0, 25.0), (0, 7.1), (7.1, 18.9)]
    assert bars.patches[1].get_hatch() != bars.patches[2].get_hatch()
    assert [text.get_text().strip() for text in bars.texts] == ["25.0", "7.1 + 18.9"]
    assert [tick.get_text() for tick in bars.get_yticklabels()] == ["vae", "hvae"]
    assert len(draw(plots_vamp.units({"vae": torch.ones(1)}))) == 1


# ------------------------------------------------------------------------------------------------ refusals
ZERO, IMAGE = torch.zeros(3, 2), torch.zeros(2, 1, 4, 4)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: plots_vamp.latents({"z": ZERO / 0}, torch.zeros(3), ("a",)), "z: codes must be finite"),
    (lambda: plots_vamp.latents({"z": ZERO}, torch.zeros(3), ("a",), components=ZERO / 0), "means must be finite"),
    (lambda: plots_vamp.latents({"z": torch.zeros(3, 4)}, torch.zeros(3), ("a",)), r"\[n, 2\] with a label each"),
    (lambda: plots_vamp.latents({"z": ZERO}, torch.zeros(2), ("a",)), "got .3, 2. and 2 labels"),
    (lambda: plots_vamp.grids({"a": IMAGE / 0}), "a: pixels must be finite"),
    (lambda: plots_vamp.grids({"a": IMAGE.byte()}), "divide uint8 images by 255"),
    (lambda: plots_vamp.grids({"a": IMAGE + 2}), r"a: pixels must be floats in \[0, 1\]"),
    (lambda: plots_vamp.grids({"a": IMAGE, "b": IMAGE[:1]}), "images .* of one shape"),
    (lambda: plots_vamp.grids({"a": IMAGE[:0]}), "images .* of one shape"),
    (lambda: plots_vamp.grids({"a": IMAGE}, rows=("x", "y", "z")), "3 rows cannot share 2 images"),
    (lambda: plots_vamp.loss_history({"epoch": [1, 2], "loss": [1.0, 2.0], "val_kl": [1.0, NAN]}), "val_kl must be"),
    (lambda: plots_vamp.loss_history({"epoch": []}), "there is no loss, rec, kl in the history"),
    (lambda: plots_vamp.by_components([(1, NAN, 0.1, "vae")]), "must be finite"),
    (lambda: plots_vamp.by_components([(0, -80.0, 0.1, "vae")]), "K must be at least 1"),
    (lambda: plots_vamp.improvement({"VAE": ([NAN], [1.0])}), "VAE: differences must be finite"),
    (lambda: plots_vamp.improvement({"VAE": ([1.0], [1.0, 2.0])}), "VAE: pairs need as many numbers .* got 1 and 2"),
    (lambda: plots_vamp.units({"vae": torch.tensor([NAN])}), "vae: activities must be finite"),
    (lambda: plots_vamp.units({"vae": torch.ones(1)}, {"vae": {"z": NAN}}), "vae: KL of the layers must be finite"),
    (lambda: embedding.umap(torch.zeros(30, 4)), "needs more than 30 codes, got 30: embed more codes or ask for fewer"),
    (lambda: embedding.umap(torch.full((40, 4), NAN)), "codes to embed.* are not finite"),
    (lambda: embedding.umap(torch.full((40, 4), 1e30)), "codes to embed.* are not finite"),
    (lambda: embedding.umap(torch.zeros(40)), r"must be \[N, d\], got \[40\]"),
    (lambda: embedding.umap(torch.zeros(40, 4), neighbours=1), "at least 2 neighbours, got 1"),
])
def test_what_cannot_be_drawn_is_refused_in_one_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_nothing_recorded_gives_an_empty_figure():
    for fig in (plots_vamp.by_components([]), plots_vamp.improvement({})):
        assert not draw(fig)[0].texts


# ------------------------------------------------------------------------------------------------ embedding
def test_umap_is_repeatable_quiet_and_keeps_groups_together():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    z = torch.randn(60, 5, generator=generator) + 200 * torch.eye(5)[labels]       # apart: a graph in three parts
    points = embedding.umap(z, neighbours=5, seed=1)
    assert points.shape == (60, 2) and points.dtype == torch.float32 and points.isfinite().all()
    assert torch.equal(points, embedding.umap(z.double(), neighbours=5, seed=1))
    assert not torch.equal(points, embedding.umap(z, neighbours=5, seed=2))
    assert torch.allclose(points.amin(0), -points.amax(0), atol=1e-5)
    apart = torch.cdist(points, points).fill_diagonal_(math.inf)
    assert (labels[apart.argmin(1)] == labels).all()
