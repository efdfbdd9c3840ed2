"""Pictures of a training under way, and the figures of the GAN's notebooks."""
import errno
import os
import sys

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from PIL import Image

from lib import BookError, album, plots_gan
from lib.album import Album
from lib.train import generator


def images(*shape, seed=1):
    """Random images in [-1, 1]."""
    return 2 * torch.rand(*shape, 3, 64, 64, generator=generator(seed)) - 1


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


# ------------------------------------------------------------------------------------------------ the album
def test_a_page_is_the_images_side_by_side_pixel_by_pixel(tmp_path):
    levels = torch.randint(256, (2, 5, 3, 64, 64), generator=generator(1))
    Album(tmp_path, "GAN").add(1200, levels / 127.5 - 1)
    found = np.asarray(Image.open(tmp_path / "progress" / "00001200.png"))
    assert found.shape == (128, 320, 3) and [path.name for path in tmp_path.rglob("*.*")] == ["00001200.png"]
    for i in range(2):
        for j in range(5):
            own = found[64 * i:64 * i + 64, 64 * j:64 * j + 64].transpose(2, 0, 1)
            np.testing.assert_array_equal(own, levels[i, j].numpy())


def test_values_out_of_range_are_clipped_and_bounds_are_black_and_white(tmp_path):
    x = torch.tensor([-7.0, -1, 1, 7])[None, :, None, None, None].expand(1, 4, 3, 64, 64)
    Album(tmp_path, "GAN").add(0, x)
    found = np.asarray(Image.open(tmp_path / "progress" / "00000000.png"))
    assert (found[:, :128] == 0).all() and (found[:, 128:] == 255).all()


def test_a_step_that_is_repeated_replaces_its_own_picture_and_no_other(tmp_path):
    for steps, seed in ((10, 1), (20, 2), (10, 3)):
        Album(tmp_path, "GAN").add(steps, images(1, 2, seed=seed))
    steps, pages = Album(tmp_path, "GAN").pages(9)
    assert steps == [10, 20] and len(list((tmp_path / "progress").iterdir())) == 2
    expected = torch.stack([images(1, 2, seed=seed)[0] for seed in (3, 2)])
    torch.testing.assert_close(pages, (expected + 1) / 2, rtol=0, atol=0.5 / 255 + 1e-6)


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Album(None, "GAN").add(1, images(1, 1))
    assert not list(tmp_path.iterdir())


def test_the_pages_are_spread_over_the_training_by_number_of_steps(tmp_path):
    own = Album(tmp_path, "GAN")
    for steps in (50, 100, 1500, 9_000_000, 2000, 12_345_678, 700):
        own.add(steps, torch.full((2, 3, 3, 64, 64), steps / 2e7))
    (tmp_path / "progress" / "notes.png").write_text("a person's own")
    for n, expected in ((1, [50]), (2, [50, 12_345_678]), (4, [50, 700, 2000, 12_345_678]),
                        (7, [50, 100, 700, 1500, 2000, 9_000_000, 12_345_678]),
                        (99, [50, 100, 700, 1500, 2000, 9_000_000, 12_345_678])):
        steps, pages = own.pages(n)
        assert steps == expected and pages.shape == (len(expected), 3, 3, 64, 64)      # the first row of each
        values = torch.tensor(steps) / 2e7
        torch.testing.assert_close(pages.mean((1, 2, 3, 4)), (values + 1) / 2, rtol=0, atol=0.003)


def test_no_pictures_or_a_damaged_one_are_a_sentence(tmp_path):
    own = Album(tmp_path, "GAN")
    with pytest.raises(BookError, match="progress holds no pictures: train for at least one more log interval"):
        own.pages(3)
    own.add(1, images(1, 2))
    path = tmp_path / "progress" / "00000001.png"
    whole = path.read_bytes()
    for content in (b"", b"no picture", whole[:-1000]):
        path.write_bytes(content)
        with pytest.raises(BookError, match="a picture in .* cannot be read .*: delete it") as error:
            own.pages(3)
        assert "\n" not in str(error.value)


def test_a_full_disk_is_a_sentence_and_leaves_the_picture_before(tmp_path, monkeypatch):
    own = Album(tmp_path, "GAN")
    own.add(1, images(1, 2))
    before = (tmp_path / "progress" / "00000001.png").read_bytes()

    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BookError, match="cannot write a picture to .*progress: No space left on device; free space or"):
        own.add(1, images(1, 2, seed=2))
    assert [path.read_bytes() for path in (tmp_path / "progress").iterdir()] == [before]


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path):
    (tmp_path / "progress").write_text("a file")
    with pytest.raises(BookError, match="cannot write a picture to .*progress: File exists"):
        Album(tmp_path, "GAN").add(1, images(1, 1))


@pytest.mark.parametrize("person", [True, False])
def test_a_person_sees_one_picture_that_changes_and_papermill_none(person, monkeypatch):
    import IPython.display
    shown = []
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    monkeypatch.setattr(album, "interactive", lambda: person)
    for name in ("display", "update_display"):
        monkeypatch.setattr(IPython.display, name, lambda picture, display_id, name=name: shown.append(
            (name, picture.size, np.asarray(picture).mean().round(), display_id)))
    own = Album(None, "GAN")
    for value in (-1.0, 0.2, 1.0):
        own.add(1, torch.full((2, 3, 3, 64, 64), value))
    size = (192, 128)
    assert shown == ([("display", size, 0, "GAN"), ("update_display", size, 153, "GAN"),
                      ("update_display", size, 255, "GAN")] if person else [])


# ------------------------------------------------------------------------------------------------ the figures
def assert_labelled(fig, labels, expected):
    """One picture whose rows of images [rows, columns, 3, 64, 64] are as expected, each label beside its own row."""
    (ax,) = fig.axes
    picture = np.asarray(ax.images[0].get_array())
    assert picture.shape == (66 * expected.shape[0] - 2, 66 * expected.shape[1] - 2, 3)
    ticks = dict(zip([text.get_text() for text in ax.get_yticklabels()], ax.get_yticks(), strict=True))
    assert list(ticks) == labels
    low, high = ax.get_ylim()
    assert low > high                                                     # the first row at the top
    for row, label in zip(expected, labels, strict=True):
        top = 66 * labels.index(label)
        assert top + 30 <= ticks[label] <= top + 34
        for j, image in enumerate(row):
            own = picture[top:top + 64, 66 * j:66 * j + 64]
            np.testing.assert_allclose(own, image.permute(1, 2, 0).numpy(), atol=1e-6)


def test_rows_are_named_and_column_by_column_the_same_image():
    found = {name: (images(3, seed=seed) + 1) / 2 for seed, name in enumerate(("x", "encoder only", "joint"))}
    fig = plots_gan.rows(found, "reconstructions")
    assert_labelled(fig, list(found), torch.stack(list(found.values())))
    assert fig.axes[0].get_title("left") == "reconstructions"


def test_a_damaged_picture_is_named_and_a_new_training_begins_an_empty_album(tmp_path):
    own = Album(tmp_path, "GAN")
    own.add(10, images(2, 3))
    path = tmp_path / "progress" / "00000010.png"
    content = bytearray(path.read_bytes())
    content[12:16] = b"IHDX"                                             # not a chunk that there is
    path.write_bytes(content)
    with pytest.raises(BookError, match="00000010.png|cannot be read"):
        own.pages(3)
    own.clear()
    with pytest.raises(BookError, match="holds no pictures"):
        own.pages(3)
