"""Documents as word counts: `newsgroups` (20 Newsgroups, Matlab version) and `topics`, an embedded generated corpus.

    corpus = documents.load("newsgroups")        # corpus.train and corpus.test are sparse counts [N, V]
    print(corpus.text("test", 0))                # a document as it was written
"""
import hashlib
import io
import tarfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lib import data
from lib import topics as generated

NEWSGROUPS = (
    "alt.atheism", "comp.graphics", "comp.os.ms-windows.misc", "comp.sys.ibm.pc.hardware", "comp.sys.mac.hardware",
    "comp.windows.x", "misc.forsale", "rec.autos", "rec.motorcycles", "rec.sport.baseball", "rec.sport.hockey",
    "sci.crypt", "sci.electronics", "sci.med", "sci.space", "soc.religion.christian", "talk.politics.guns",
    "talk.politics.mideast", "talk.politics.misc", "talk.religion.misc")
WORDS = 10_000
# The documents are the posts in the order of their groups and numbers, without those at these places (from 0), which
# have hardly a word or are files encoded as text, and were not counted.
UNCOUNTED = {
    "train": {494, 506, 551, 1193, 1194, 1195, 1456, 1615, *range(1619, 1632), 1633, 1911, 1918, 2135, 2402, 2421, 2713,
              3057, 3421, 3595, 3753, 4122, 4390, 4714, 5164, 5558, 5587, 5728, 5894, 6321, 6783, 9674, 10577, 11108},
    "test": {225, 1073, 1074, 1079, 1588, 1712, 2073, 2074, 2144, 2193, 2197, 2339, 2452, 2479, 2516, 2534, 2602, 2641,
             2642, 2788, 3337, 4523, 5171, 5433, 5435, 5535, 5552}}


@dataclass(frozen=True)
class Documents:
    """Word counts, sparse CSR float32 [N, V] (columns of a row ascending, no stored zeros), and labels int64 [N].

    `vocabulary`: the V words in the order of the columns, the one in most training documents first. A document
    without any of them would be an empty row, and stay in the set: smoothed counts are well-defined for it, too.
    `sha256`: of the source.
    """
    name: str
    train: Tensor
    test: Tensor
    train_labels: Tensor
    test_labels: Tensor
    label_names: tuple[str, ...]
    vocabulary: tuple[str, ...]
    sha256: str
    texts: Callable[[str], list[str] | None] = field(repr=False)    # of a split; None: the archive is not here

    def text(self, split: str, i: int) -> str:
        """Document i (from 0) of "train" or "test" as it was written; if its text is not here, its words with counts.

        Raises DataError: there is no such document, or the archive of texts is corrupt or has other documents.
        """
        counts = {"train": self.train, "test": self.test}.get(split)
        if counts is None or not 0 <= i < len(counts):
            raise data.DataError(f"{self.name} has no document {i} in {split!r}: it has {len(self.train)} in 'train' "
                                 f"and {len(self.test)} in 'test', counted from 0")
        texts = self.texts(split)
        if texts is None:
            return self._words(counts, int(i))
        if len(texts) != len(counts):
            raise data.DataError(f"{self.name} has {len(counts)} documents in {split!r} but {len(texts)} texts: "
                                 "the archive of texts is that of other documents")
        return texts[i]

    def _words(self, counts: Tensor, i: int) -> str:
        start, end = counts.crow_indices()[i:i + 2].tolist()
        found = zip(counts.col_indices()[start:end].tolist(), counts.values()[start:end].tolist(), strict=True)
        words = [f"{self.vocabulary[w]} {count:g}" for w, count in sorted(found, key=lambda pair: (-pair[1], pair[0]))]
        return (f"{', '.join(words) or 'no word of the vocabulary'}\n\n(Words with their counts; "
                f"`{data.TEXTS['newsgroups-texts'].how}` gets the texts.)")


def load(name: str) -> Documents:
    """The documents `name`: newsgroups or topics.

    Raises DataError: unknown name, a data set of images, or files that are missing and not downloadable, or corrupt.
    """
    if name in data.SOURCES and name not in data.DOCUMENTS:
        raise data.DataError(f"{name} has images, not documents: choose {' or '.join(data.DOCUMENTS)}")
    return data.load(name)


def smoothing(counts: Tensor) -> Tensor:
    """The smoothed distribution of words, float32 [V], sums to 1: (count of w + 1/V) / (all counts + 1), in float64.

    counts: sparse CSR [N, V], those of the training documents; any device.
    """
    words = counts.shape[1]
    total = torch.bincount(counts.col_indices().cpu(), counts.values().double().cpu(), minlength=words)
    return ((total + 1 / words) / (total.sum() + 1)).float().to(counts.device)


# ------------------------------------------------------------------------------------------------ 20 Newsgroups
def newsgroups() -> Documents:
    """11,269 + 7,505 posts, the 10,000 words that are in most training documents (of equals: the first listed).

    None of the posts is empty for want of these words. Raises DataError.
    """
    folder = data.find("newsgroups") or data.fetch("newsgroups")
    archive, listed = data.SOURCES["newsgroups"].files
    vocabulary = data.read_checked("newsgroups", folder, listed).decode("latin-1").split()
    content = data.read_checked("newsgroups", folder, archive)
    try:
        parts = _read_counts(content, len(vocabulary))
        sha256 = data.digest_of_files("newsgroups")
        return _documents("newsgroups", parts, vocabulary, WORDS, NEWSGROUPS, sha256, _texts)
    except (*data.UNREADABLE, RuntimeError) as error:               # RuntimeError: torch refuses unordered indices
        raise data.DataError(f"{folder / archive} cannot be read as counts of 20 Newsgroups ({_first_line(error)}); "
                             f"{data.instead('newsgroups')}") from None


def _read_counts(content: bytes, words: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{split: (document, word and count in each row [n, 3], label of each document)}, all but the counts from 0."""
    parts = {}
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        for split in ("train", "test"):
            counts, labels = (np.fromstring(tar.extractfile(f"20news-bydate/matlab/{split}.{kind}").read(), np.int64,
                                            sep=" ") for kind in ("data", "label"))
            counts = counts.reshape(-1, 3)
            if min(counts.min(), labels.min()) < 1 or labels.max() > len(NEWSGROUPS) or \
                    (counts.max(0)[:2] > (len(labels), words)).any():
                raise ValueError(f"a number in {split} is out of range")
            parts[split] = counts - (1, 1, 0), labels - 1
    return parts


def _documents(name, parts, vocabulary, words, label_names, sha256, texts) -> Documents:
    """The counts of `parts` (see _read_counts), of the most frequent words only."""
    frequency = np.bincount(parts["train"][0][:, 1], minlength=len(vocabulary))
    kept = np.argsort(-frequency, kind="stable")[:words]
    column = np.full(len(vocabulary), -1)
    column[kept] = np.arange(len(kept))
    train, test = (_csr(counts, column, len(labels), len(kept)) for counts, labels in parts.values())
    labels = (torch.from_numpy(labels) for _, labels in parts.values())
    return Documents(name, train, test, *labels, label_names, tuple(vocabulary[w] for w in kept), sha256, texts)


def _csr(counts: np.ndarray, column: np.ndarray, n: int, words: int) -> Tensor:
    """(document, word, count) in rows -> CSR float32 [n, words], without the words whose column is -1."""
    row, col, value = counts[:, 0], column[counts[:, 1]], counts[:, 2]
    order = np.lexsort((col, row))
    order = order[col[order] >= 0]
    starts = np.concatenate([[0], np.bincount(row[order], minlength=n).cumsum()])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
        return torch.sparse_csr_tensor(torch.from_numpy(starts), torch.from_numpy(col[order]),
                                       torch.from_numpy(value[order]).float(), (n, words), check_invariants=True)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(":")


def _texts(split: str) -> list[str] | None:
    folder = data.find("newsgroups-texts")
    return _posts(folder)[split] if folder else None


@lru_cache(maxsize=1)
def _posts(folder: Path) -> dict[str, list[str]]:
    """{split: texts of the documents in the order of the counts}."""
    file, *_ = data.held("newsgroups-texts", folder)
    content = data.read_checked("newsgroups-texts", folder, file)
    posts = {"train": {}, "test": {}}
    try:
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            for member in filter(tarfile.TarInfo.isfile, tar):
                split, group, number = member.name.removeprefix("20news-bydate-").split("/")
                posts[split][group, int(number)] = tar.extractfile(member).read().decode("latin-1")
    except data.UNREADABLE as error:
        raise data.DataError(f"{folder / file} cannot be read as the posts of 20 Newsgroups ({_first_line(error)}); "
                             f"{data.instead('newsgroups-texts')}") from None
    return {split: [found[name] for place, name in enumerate(sorted(found)) if place not in UNCOUNTED[split]]
            for split, found in posts.items()}


# ------------------------------------------------------------------------------------------------ generated
def topics() -> Documents:
    """1,600 + 400 generated documents on eight topics, about 600 words; the labels are the main topics."""
    texts, parts = {}, {}
    vocabulary = generated.vocabulary()
    index = {word: w for w, word in enumerate(vocabulary)}
    for seed, (split, n) in enumerate((("train", 1600), ("test", 400))):
        drawn, labels = generated.draw(n, seed)
        texts[split] = [" ".join(words) for words in drawn]
        pairs = [(i, index[word]) for i, words in enumerate(drawn) for word in words]
        pairs, count = np.unique(np.array(pairs), axis=0, return_counts=True)
        parts[split] = np.column_stack([pairs, count]), np.array(labels)
    sha256 = hashlib.sha256(" ".join(vocabulary).encode() + b"".join(counts.tobytes() for counts, _ in parts.values()))
    return _documents("topics", parts, vocabulary, len(vocabulary), tuple(generated.TOPICS), sha256.hexdigest(),
                      texts.get)
