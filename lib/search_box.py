"""A box to search documents by their bits with, in JupyterLab: type words, or pick a document."""
import random
from collections.abc import Callable
from html import escape

import ipywidgets
from torch import Tensor

from lib import BookError
from lib.documents import Documents
from lib.search import ask, codes, results


class SearchBox:
    """Words to type or a test document to pick, and below them the training documents nearest by their codes.

    encode: counts CSR [N, V] -> bits [N, b]. `box` is what a notebook shows; `words`, `group`, `number`, `another`,
    `neighbours`, `query`, `message` and `table` are its parts. Where `words` is empty, test document `number` is the
    query. Raises SearchError if encode gives no codes; what goes wrong later is a sentence in `message`.
    """

    def __init__(self, documents: Documents, encode: Callable[[Tensor], Tensor], neighbours: int = 10, seed: int = 0):
        self.documents, self.encode, self.seed = documents, encode, seed
        self.codes = codes(encode(documents.train))
        self._random = random.Random(seed)
        self._build(neighbours)
        self._draw()

    def _build(self, neighbours: int) -> None:
        style, n = {"description_width": "7.5em"}, len(self.documents.test_labels)
        line = {"style": style, "layout": {"width": "30em", "max_width": "98%"}}
        short = {"style": style, "layout": {"width": "15em", "max_width": "98%"}}
        groups = [(self.documents.label_names[i], i) for i in self.documents.test_labels.unique().tolist()]
        self.words = ipywidgets.Text(description="words", placeholder="type words, then Enter", continuous_update=False,
                                     tooltip="words to search for", **line)
        self.group = ipywidgets.Dropdown(options=[("any group", -1), *groups], description="document of", **line)
        self.number = ipywidgets.BoundedIntText(min=0, max=n - 1, description="number", **short,
                                                tooltip=f"test document, 0 to {n - 1}")
        self.another = ipywidgets.Button(description="draw another", tooltip="a test document of that group, at random")
        self.neighbours = ipywidgets.IntSlider(neighbours, 1, max(50, neighbours), description="neighbours", **line,
                                               continuous_update=False, tooltip="number of documents to show")
        self.query, self.message, self.table = (ipywidgets.HTML(layout={"max_width": "98%"}) for _ in range(3))
        self.words.observe(self.show, "value")
        self.number.observe(self._numbered, "value")
        self.neighbours.observe(self.show, "value")
        self.group.observe(self._draw, "value")
        self.another.on_click(self._draw)
        pick = ipywidgets.HBox([self.number, self.another], layout={"flex_flow": "row wrap"})
        shown = [self.query, self.message, self.table]
        self.box = ipywidgets.VBox([self.words, self.group, pick, self.neighbours, *shown])

    def show(self, _=None) -> None:
        """Search for what the controls say."""
        asked = message = table = ""
        try:
            counts, told = ask(self.documents, self.words.value, self.number.value)
            asked = f'<p style="line-height:1.4">{escape(told)}</p>'
            found = results(self.documents, self.encode(counts), self.codes, self.neighbours.value, self.seed)
            table = found._repr_html_()
        except BookError as error:
            message = f'<p role="alert">{escape(str(error))}</p>'
        self.query.value, self.message.value, self.table.value = asked, message, table

    def _numbered(self, _) -> None:
        self._pick(self.number.value)

    def _draw(self, _=None) -> None:
        labels, group = self.documents.test_labels, self.group.value
        self._pick(self._random.choice(((labels == group) | (group < 0)).nonzero()[:, 0].tolist()))

    def _pick(self, i: int) -> None:
        """Make test document i the query; shown once."""
        self.words.unobserve(self.show, "value")
        self.number.unobserve(self._numbered, "value")
        self.words.value, self.number.value = "", i
        self.words.observe(self.show, "value")
        self.number.observe(self._numbered, "value")
        self.show()
