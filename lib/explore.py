"""Moving through the latent space of a trained autoencoder by hand, in JupyterLab: see notebooks/explore.ipynb."""
import io
from pathlib import Path

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import Tensor

from lib import autoencoders, data, launch, plots, root, runs, train

EXPERIMENT = "autoencoders"
WEIGHTS = "latest.safetensors"
SIDE = 32                                      # that notebook's images
MAP, CONTROLS, THUMB = 400, 360, 168           # widths on the screen, in pixels: side by side in the book
STEP = 0.02                                    # of a slider
SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


# ---------------------------------------------------------------------------- runs
def available():
    """The runs under runs/autoencoders that have results and weights, as a DataFrame with their `source` as index."""
    import pandas as pd
    columns = ("model", "dataset", "z_dim", "steps", "seed")
    found = {f"runs/{record['path']}": [record["parameters"][name] for name in columns]
             for record in runs.records(EXPERIMENT, root() / "runs")
             if (root() / "runs" / record["path"] / WEIGHTS).is_file()}
    return pd.DataFrame.from_dict(found, orient="index", columns=list(columns))


def load(source: str = "", device: str = "cpu") -> tuple[autoencoders.Autoencoder, data.Dataset, dict]:
    """(model in evaluation mode, its data set, its results.json) of a run of the `autoencoders` notebook.

    source: the run's folder, absolute or from the checkout's top. "" is the notebook's default run, which is made now
    (20 s) unless it is there and still what today's defaults and networks give.
    Raises RunError: no such run, weights missing, corrupt or of other parameters, or its data set has changed;
    DataError: the data set is not here.
    """
    if source:
        if not (root() / source).is_dir():
            known = ", ".join(available().index) or "none yet"
            raise runs.RunError(f"there is no run folder {source}; those with weights: {known}")
        return _read(root() / source, device)
    folder = root() / "runs" / EXPERIMENT / "default"
    try:
        model, images, record = _read(folder, device)
        if set(record["parameters"]) == set(runs.parameters(EXPERIMENT)) and \
                runs.name_of(EXPERIMENT, "", record["parameters"]) == "default":
            return model, images, record
    except runs.RunError:
        pass                                   # not there yet, or left by an older version
    launch.run(EXPERIMENT, "", {}, again=(folder / "results.json").is_file())
    return _read(folder, device)


def _read(folder: Path, device: str) -> tuple[autoencoders.Autoencoder, data.Dataset, dict]:
    record = runs.read(folder / "results.json")
    if record["experiment"] != EXPERIMENT:
        raise runs.RunError(f"{folder} is a run of {record['experiment']}, not of {EXPERIMENT}")
    if not (folder / WEIGHTS).is_file():
        raise runs.RunError(f"{folder} has results but no {WEIGHTS}: make them with `{record['command']} --again`")
    values = runs.check(EXPERIMENT, record["parameters"])
    images = data.load(values["dataset"], size=SIDE)
    if images.sha256 != record["dataset"]["sha256"]:
        raise runs.RunError(f"{folder} was trained on another version of {images.name}: repeat the run")
    try:
        model = autoencoders.Autoencoder(values["model"], (images.test.shape[1], SIDE), values["z_dim"],
                                         sigma=values["sigma"])
        told = {name: values[name] for name in ("model", "dataset", "z_dim", "seed")}
        train.load_checkpoint(folder / WEIGHTS, {"model": model}, told)
        return model.to(train.device(device)).eval(), images, record
    except (ValueError, train.TrainError) as error:
        raise runs.RunError(f"{error}; `{record['command']} --again` repeats the run") from None


# ---------------------------------------------------------------------------- widgets
class Explorer:
    """A slider for each latent dimension, the image it decodes to, and the point on the map of the test codes.

    `box` is what a notebook shows; `sliders`, `picker` (goes to a test image's code, rounded to the sliders' steps),
    `image`, `original`, `map` and `text` are its parts. Only z₁ and z₂ are on the map.
    Raises RunError if the model has one dimension only.
    """

    def __init__(self, model: autoencoders.Autoencoder, images: data.Dataset):
        if model.z_dim < 2:
            raise runs.RunError(f"the map needs at least two latent dimensions, this model has {model.z_dim}")
        self.model, self.images = model, images
        self.device = next(model.parameters()).device
        self.codes = autoencoders.encode(model, images.test.to(self.device))[0].cpu()
        self.choices = [(f"{name}: test image {i}", i) for label, name in enumerate(images.label_names)
                        for i in (images.test_labels == label).nonzero()[:3, 0].tolist()]
        chosen = self.codes[[i for _, i in self.choices]].abs().max()
        self.limit = float(max(3, chosen.ceil(), self.codes.abs().quantile(0.99, dim=0).max().ceil()))
        self._background, self._pixel = self._draw_background()
        self._build()
        self.picker.value = self.choices[0][1]

    def _build(self) -> None:
        self.map, self.image, self.original = (
            ipywidgets.Image(format="png", width=width, layout={"max_width": "100%"}) for width in (MAP, THUMB, THUMB))
        self.text, self.caption = ipywidgets.Label(), ipywidgets.Label()
        self.sliders = [ipywidgets.FloatSlider(
            min=-self.limit, max=self.limit, step=STEP, description=_name(i), readout_format=".2f",
            tooltip=f"latent coordinate {i + 1}", style={"description_width": "2.5em"}, layout={"width": "98%"})
            for i in range(self.model.z_dim)]
        self.picker = ipywidgets.Dropdown(
            options=[("moved by hand", -1), *self.choices], description="at the code of",
            style={"description_width": "7em"}, layout={"width": "98%"})
        for slider in self.sliders:
            slider.observe(self._moved, "value")
        self.picker.observe(self._picked, "value")
        pictures = ipywidgets.HBox([ipywidgets.VBox([ipywidgets.Label("decoded"), self.image]),
                                    ipywidgets.VBox([self.caption, self.original])],
                                   layout={"justify_content": "space-around", "flex_flow": "row wrap"})
        controls = ipywidgets.VBox(self.sliders, layout={"max_height": "18em", "overflow": "hidden auto"})
        side = ipywidgets.VBox([pictures, self.picker, controls, self.text],
                               layout={"width": f"{CONTROLS}px", "max_width": "100%"})
        self.box = ipywidgets.HBox([self.map, side], layout={"flex_flow": "row wrap"})

    @property
    def z(self) -> Tensor:
        """Where the sliders are: [z_dim]."""
        return torch.tensor([slider.value for slider in self.sliders])

    def show(self) -> None:
        """Decode where the sliders are, mark it on the map, say what is near."""
        z = self.z
        self.image.value = _png(_thumbnail(self.decode(z[None])[0]))
        self.map.value = _png(self._marked(z))
        distance, nearest = (self.codes - z).norm(dim=1).min(0)
        label = self.images.label_names[self.images.test_labels[nearest]]
        at = f"z = ({_numbers(z)})" if len(z) <= 4 else f"|z| = {z.norm():.2f}"
        self.text.value = f"{at}; nearest test code: {label}, {distance:.2f} away"

    def decode(self, z: Tensor) -> Tensor:
        """z [N, z_dim] -> images [N, C, S, S] in [0, 1], on the CPU."""
        return autoencoders.decode(self.model, z.to(self.device)).cpu()

    def _moved(self, change) -> None:
        if abs(change["new"] - change["old"]) < STEP / 2:      # the browser's rounding, not a hand
            return
        self.picker.unobserve(self._picked, "value")
        self.picker.value = -1
        self.picker.observe(self._picked, "value")
        self.show()

    def _picked(self, change) -> None:
        i = change["new"]
        if i < 0:
            return
        self.original.value = _png(_thumbnail(self.images.test[i] / 255))
        self.caption.value = f"test image {i}"
        for slider, value in zip(self.sliders, self.codes[i].tolist(), strict=True):
            slider.unobserve(self._moved, "value")             # all at once, so shown once
            slider.value = round(value / STEP) * STEP          # between its steps the browser would correct it
            slider.observe(self._moved, "value")
        self.show()

    def _draw_background(self):
        """The map without the point, drawn once, and z -> its pixel."""
        figure = Figure(figsize=(4.6, 4.6), dpi=130, layout="constrained")
        ax = self._latent_map(figure.add_subplot())
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        picture = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())

        def pixel(z: Tensor) -> tuple[float, float]:
            x, y = ax.transData.transform(z[:2].tolist())
            return x, picture.height - y
        return picture, pixel

    def _latent_map(self, ax, point=None):
        plots.latent_map(self.codes[:, :2], self.images.test_labels, self.images.label_names,
                         "means of q(z|x), test images", self.limit, point, ax)
        return ax

    def _marked(self, z: Tensor) -> Image.Image:
        picture, (x, y) = self._background.copy(), self._pixel(z)
        draw = ImageDraw.Draw(picture)
        for colour, width in (("white", 9), ("black", 4)):                # a cross with a halo
            arm = 16 + width / 4
            draw.line((x - arm, y, x + arm, y), colour, width)
            draw.line((x, y - arm, x, y + arm), colour, width)
        return picture

    def figure(self, n: int = 9) -> plt.Figure:
        """The same for paper: the map with the point, its image, and n images along each of z₁ and z₂ through it."""
        z = self.z
        figure = plt.figure(figsize=(plots.WIDTH, 4.2))
        grid = figure.add_gridspec(3, 2, width_ratios=(4.2, 2.8), height_ratios=(4, 1, 1))
        ax = self._latent_map(figure.add_subplot(grid[:, 0]), z[:2])
        ax.axhline(z[1], color="black", lw=0.8, ls=":")
        ax.axvline(z[0], color="black", lw=0.8, ls=":")
        lines = [z.repeat(n, 1) for _ in range(2)]
        for i, line in enumerate(lines):
            line[:, i] = torch.linspace(-self.limit, self.limit, n)
        titles = [f"decoded at ({_numbers(z[:2])}{', …' if len(z) > 2 else ''})",
                  *(f"$z_{i + 1}$ from {-self.limit:g} to {self.limit:g}" for i in range(2))]
        for row, (points, title) in enumerate(zip([z[None], *lines], titles, strict=True)):
            ax = figure.add_subplot(grid[row, 1])
            ax.imshow(torch.cat(list(self.decode(points)), -1).permute(1, 2, 0).numpy(), vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[], title=title)
            ax.spines[:].set_visible(False)
        return figure


def _name(i: int) -> str:
    return f"z{i + 1}".translate(SUBSCRIPTS)


def _numbers(z: Tensor) -> str:
    return ", ".join(f"{round(value, 2) + 0.0:.2f}" for value in z.tolist())      # + 0.0: no minus zero


def _thumbnail(image: Tensor) -> Image.Image:
    """[C, S, S] in [0, 1] -> a picture with visible pixels."""
    pixels = (255 * image).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).resize(
        (THUMB, THUMB), Image.Resampling.NEAREST)


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "png", compress_level=3)
    return buffer.getvalue()
