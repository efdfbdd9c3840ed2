"""Pictures of a training under way: what the networks draw now, kept in the run folder and, to a person, shown live."""
import io
import re
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lib import BookError, write_atomic
from lib.plots import canvas
from lib.train import interactive


class Album:
    """One PNG for each look, <folder>/progress/<steps>.png, rows of images; in a notebook that a person runs, live.

    folder None: shown only. Pictures of a run that is resumed stay; a step that is repeated replaces its own.
    """

    def __init__(self, folder: Path | None, name: str):
        self.folder, self.name, self.shown = folder / "progress" if folder else None, name, False

    def add(self, steps: int, images: Tensor) -> None:
        """Images [rows, columns, 3, S, S] in [-1, 1]. BookError: the folder cannot be written."""
        picture = Image.fromarray((255 * canvas(images.add(1).div(2).clamp(0, 1), gap=0)).round().astype(np.uint8))
        if self.folder:
            content = io.BytesIO()
            picture.save(content, "png")
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_atomic(self.folder / f"{steps:08}.png", content.getvalue())
            except OSError as error:
                raise BookError(f"cannot write a picture to {self.folder}: {error.strerror}; free space or choose "
                                "another folder, then resume") from None
        if "ipykernel" in sys.modules and interactive():
            from IPython.display import display, update_display
            (update_display if self.shown else display)(picture, display_id=self.name)
            self.shown = True

    def clear(self) -> None:
        """Remove the pictures of an earlier training."""
        for path in self.folder.glob("*.png") if self.folder else ():
            path.unlink()

    def pages(self, n: int, side: int = 64) -> tuple[list[int], Tensor]:
        """At most n looks, evenly over the training: steps, and the first rows [n, columns, 3, side, side] in [0, 1].

        Raises BookError: no pictures, or one that cannot be read.
        """
        files = [path for path in sorted(self.folder.glob("*.png")) if re.fullmatch(r"\d{8}", path.stem)]
        if not files:
            raise BookError(f"{self.folder} holds no pictures: train for at least one more log interval")
        chosen = [files[i] for i in sorted({round(i) for i in np.linspace(0, len(files) - 1, n)})]
        try:
            rows = [torch.from_numpy(np.asarray(Image.open(path).convert("RGB"))[:side].copy()) for path in chosen]
        except (OSError, SyntaxError) as error:                   # PIL's, for a damaged chunk
            raise BookError(f"a picture in {self.folder} cannot be read ({error}): delete it") from None
        images = torch.stack(rows).permute(0, 3, 1, 2).float() / 255
        return [int(path.stem) for path in chosen], torch.stack(images.split(side, 3), 1)
