"""The five sampling modes on small untrained networks: what they decode is what they say."""
import pytest
import torch
from PIL import Image
from torch import nn

from lib import autoencoders, sampling
from lib.train import generator

IMAGES = torch.randint(0, 256, (12, 1, 32, 32), dtype=torch.uint8, generator=generator(0))


def network(kind="vae", z_dim=2, channels=1):
    """A small autoencoder whose decoder depends on its code visibly, in evaluation mode."""
    model = autoencoders.Autoencoder(kind, (channels, 32), z_dim, dim=2).initialise(generator(1))
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.normal_(module.weight, 0, 0.3, generator=generator(2))
    return model.eval()


def decoded(model, z):
    with torch.no_grad():
        return (model.decoder(z) + 1) / 2


@pytest.fixture
def codes(monkeypatch):
    """Every code that is decoded, in order: the list fills as the modes run."""
    seen, decode = [], sampling.decode
    monkeypatch.setattr(sampling, "decode", lambda model, z, size=500: seen.append(z) or decode(model, z, size))
    return seen


@pytest.mark.parametrize("channels", [1, 3])
def test_the_modes_have_their_shapes_and_stay_in_range(channels):
    model, images = network(channels=channels), IMAGES.expand(12, channels, 32, 32)
    grids = {"sample": (sampling.sample(model, 5, generator(0)), (5, 1)),
             "interpolate": (sampling.interpolate(model, 4, 7, generator(0)), (4, 7)),
             "traverse": (sampling.traverse(model, 4, 6, 3.0, 1, generator(0)), (4, 6)),
             "reconstruct": (sampling.reconstruct(model, images, 3, generator(0)), (3, 2)),
             "map": (sampling.decoder_map(model, 2.0, 4), (4, 4))}
    for grid, shape in grids.values():
        assert grid.shape == (*shape, channels, 32, 32)
        assert grid.min() >= 0 and grid.max() <= 1 and grid.std() > 0.01 and not grid.requires_grad
    assert set(sampling.MODES) == set(grids) - {"map"} | {"visualize_latent"}


@pytest.mark.parametrize("mode", [
    lambda g, size: sampling.sample(network(), 5, g, size),
    lambda g, size: sampling.interpolate(network(), 3, 4, g, size),
    lambda g, size: sampling.traverse(network(), 3, 4, 2.0, 0, g, size),
    lambda g, size: sampling.reconstruct(network("ae"), IMAGES, 5, g, size),
    lambda g, size: sampling.visualize_latent(network(), IMAGES, 5, g, size)[0]])
def test_the_generator_alone_decides_and_the_batch_size_does_not(mode):
    torch.manual_seed(0)
    first = mode(generator(3), 500)
    torch.manual_seed(1)
    assert torch.equal(first, mode(generator(3), 500)) and not torch.equal(first, mode(generator(4), 500))
    torch.testing.assert_close(first, mode(generator(3), 2), rtol=1e-5, atol=1e-6)


def test_a_mode_leaves_the_network_in_evaluation_and_unchanged():
    model = network().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sampling.sample(model, 5, generator(0))
    sampling.reconstruct(model, IMAGES, 3, generator(0))
    assert not model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_samples_are_decodes_of_standard_normal_codes(codes):
    model = network(z_dim=3)
    grid = sampling.sample(model, 2000, generator(0))
    z = codes[0]
    assert z.shape == (2000, 3) and (z.mean(0).abs() < 4 / 2000 ** 0.5).all()
    assert (z.var(0) - 1).abs().max() < 4 * (2 / 2000) ** 0.5
    torch.testing.assert_close(grid[:20, 0], decoded(model, z[:20]), rtol=1e-5, atol=1e-6)


def test_interpolations_are_straight_and_end_at_the_two_codes(codes):
    model = network()
    grid = sampling.interpolate(model, 4, 5, generator(7))
    noise = generator(7)
    start, end = (torch.randn(4, 2, generator=noise) for _ in range(2))
    torch.testing.assert_close(grid[:, 0], decoded(model, start), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grid[:, -1], decoded(model, end), rtol=1e-5, atol=1e-6)
    z = codes[0].unflatten(0, (4, 5))
    torch.testing.assert_close(z.diff(dim=1), ((end - start) / 4)[:, None].expand(4, 4, 2), rtol=1e-4, atol=1e-6)
    assert torch.equal(z[:, 0], start) and torch.equal(z[:, -1], end)


@pytest.mark.parametrize("dim", [0, 2])
def test_a_traversal_moves_one_dimension_alone(codes, dim):
    model = network(z_dim=3)
    grid = sampling.traverse(model, 4, 5, 2.5, dim, generator(0))
    z = codes[0].unflatten(0, (4, 5))
    torch.testing.assert_close(z[:, :, dim], torch.tensor([-2.5, -1.25, 0.0, 1.25, 2.5]).expand(4, 5))
    others = [i for i in range(3) if i != dim]
    assert torch.equal(z[:, :, others], z[:, :1, others].expand(4, 5, 2)) and z[:, 0, others].unique().numel() == 8
    torch.testing.assert_close(grid.flatten(0, 1), decoded(model, z.flatten(0, 1)), rtol=1e-5, atol=1e-6)


def test_reconstructions_stand_beside_their_own_originals():
    model = network("ae")
    grid = sampling.reconstruct(model, IMAGES, 12, generator(0))
    originals = (255 * grid[:, 0]).round().to(torch.uint8)
    assert sorted(image.numpy().tobytes() for image in originals) == sorted(image.numpy().tobytes() for image in IMAGES)
    torch.testing.assert_close(grid[:, 0], originals / 255, rtol=0, atol=1e-6)
    with torch.no_grad():
        expected = decoded(model, model.encoder(originals / 127.5 - 1)[0])
    torch.testing.assert_close(grid[:, 1], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", autoencoders.KINDS)
def test_only_variational_models_draw_their_code(codes, kind):
    model = network(kind)
    nn.init.constant_(model.encoder.log_var[-1].bias, 2.0)
    grid = sampling.reconstruct(model, IMAGES, 6, generator(0))
    with torch.no_grad():
        mean, _ = model.encoder(2 * grid[:, 0] - 1)
    drawn = (codes[0] - mean).abs().mean()
    assert drawn > 0.5 if kind in ("vae", "beta-vae", "mmd-vae") else drawn < 1e-5


def test_the_latent_map_holds_means_and_whose_they_are():
    model = network()
    mean, order = sampling.visualize_latent(model, IMAGES, 8, generator(0))
    assert mean.shape == (8, 2) and len(set(order.tolist())) == 8 and not mean.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(mean, model.encoder(IMAGES[order] / 127.5 - 1)[0], rtol=1e-5, atol=1e-5)


def test_the_decoder_map_has_z1_to_the_right_and_z2_upwards(codes):
    sampling.decoder_map(network(), 2.0, 3)
    rows = [[-2, 2], [0, 2], [2, 2], [-2, 0], [0, 0], [2, 0], [-2, -2], [0, -2], [2, -2]]
    assert codes[0].tolist() == [[float(a), float(b)] for a, b in rows]


@pytest.mark.parametrize(("call", "complaint"), [
    (lambda g: sampling.sample(network(), 0, g), "n_samples must be at least 1, got 0"),
    (lambda g: sampling.interpolate(network(), -1, 5, g), "n_samples must be at least 1, got -1"),
    (lambda g: sampling.interpolate(network(), 2, 1, g), "n_interpolate must be at least 2, got 1"),
    (lambda g: sampling.traverse(network(), 0, 5, 3.0, 0, g), "n_samples must be at least 1, got 0"),
    (lambda g: sampling.traverse(network(), 2, 5, 3.0, 2, g), "traverse_dim must be between 0 and 1, got 2"),
    (lambda g: sampling.traverse(network(), 2, 5, 3.0, -1, g), "traverse_dim must be between 0 and 1, got -1"),
    (lambda g: sampling.traverse(network(), 2, 1, 3.0, 0, g), "n_traverse >= 2 and traverse_range > 0"),
    (lambda g: sampling.traverse(network(), 2, 5, 0.0, 0, g), "n_traverse >= 2 and traverse_range > 0"),
    (lambda g: sampling.reconstruct(network(), IMAGES, 13, g), "between 1 and the 12 images, got 13"),
    (lambda g: sampling.reconstruct(network(), IMAGES, 0, g), "between 1 and the 12 images, got 0"),
    (lambda g: sampling.visualize_latent(network(z_dim=3), IMAGES, 5, g), "needs z_dim = 2, this model has 3")])
def test_what_makes_no_sense_is_refused(call, complaint):
    with pytest.raises(ValueError, match=complaint):
        call(generator(0))


@pytest.mark.parametrize("channels", [1, 3])
def test_saved_images_read_back_equal(tmp_path, channels):
    grid = torch.rand(4, 3, channels, 8, 8, generator=generator(0))
    assert sampling.save_images(grid, tmp_path / "deep" / "sample") == 4
    assert sorted(p.name for p in (tmp_path / "deep" / "sample").iterdir()) == ["0.png", "1.png", "2.png", "3.png"]
    for i, row in enumerate(grid):
        image = Image.open(tmp_path / "deep" / "sample" / f"{i}.png")
        assert image.size == (24, 8) and image.mode == ("L" if channels == 1 else "RGB")
        pixels = torch.tensor(list(image.tobytes()), dtype=torch.uint8).view(8, 3, 8, channels)
        assert torch.equal(pixels.permute(1, 3, 0, 2), (255 * row).round().to(torch.uint8))


def test_images_are_not_saved_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Not a directory"):
        sampling.save_images(torch.zeros(1, 1, 1, 4, 4), tmp_path / "file" / "sample")
