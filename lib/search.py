"""Searching documents by their binary codes: distances, precision by group, what a code is like, what is found.

    result = search.results(corpus, encode(counts), encode(corpus.train))      # a notebook shows it as a table

Codes are bits [N, b] (bool, or 0 and 1 of any type), groups are labels int64 [N], counts sparse CSR [N, V].

In Hamming space ties are massive: with 8 bits, 11,269 documents have at most 256 codes. Wherever the k nearest end
among documents of one distance, precision is the *expected* one under a random order of those, computed exactly; the
order of the file must not decide, for it sorts the documents by group.
"""
import difflib
import re
import warnings
from dataclasses import dataclass
from html import escape

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from torch import Tensor

from lib import BookError
from lib.documents import Documents
from lib.evaluate import estimate, exact

CHUNK = 256                                     # queries at a time
K = 100
SNIPPET, SHOWN, WORD = 200, 5, 30               # characters of a text, words of a list, characters of a word


class SearchError(BookError):
    """A query or a code that cannot be searched with; the message says what to do."""


# ------------------------------------------------------------------------------------------------ Hamming space
def codes(bits: Tensor) -> Tensor:
    """Bits [N, b] as uint8 on the CPU. Raises SearchError: no documents, no bits or over 255, values but 0 and 1."""
    if bits.ndim != 2 or not 1 <= bits.shape[1] <= 255 or not len(bits):
        raise SearchError(f"codes must be [documents, bits], some of both and at most 255 bits; got {list(bits.shape)}")
    if not ((bits == 0) | (bits == 1)).all():
        raise SearchError("codes must be 0 and 1: round the probabilities, or compare the logits with 0")
    return bits.detach().to("cpu", torch.uint8)


def distances(queries: Tensor, database: Tensor) -> Tensor:
    """Hamming distances, uint8 [Q, N], of codes [Q, b] and [N, b]: (b - <s, t>) / 2 for their signs s, t = ±1.

    Raises SearchError: codes of other numbers of bits, or as `codes` does.
    """
    s, t = (2 * codes(bits).float() - 1 for bits in (queries, database))
    if s.shape[1] != t.shape[1]:
        raise SearchError(f"codes of {s.shape[1]} bits cannot be compared with codes of {t.shape[1]} bits")
    return ((s.shape[1] - s @ t.T) / 2).to(torch.uint8)


def nearest(code: Tensor, database: Tensor, neighbours: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(indices, distances), int64 [k], of the documents nearest to a code [1, b]; ties in random order, by the seed.

    Raises SearchError: fewer than one neighbour, or as `distances` does. There may be fewer documents than neighbours.
    """
    if neighbours < 1:
        raise SearchError(f"the number of neighbours must be at least 1, got {neighbours}")
    shuffled = torch.randperm(len(database), generator=torch.Generator().manual_seed(seed))
    apart = distances(code, database)[0].long()
    found = shuffled[apart[shuffled].argsort(stable=True)[:neighbours]]
    return found, apart[found]


def shells(queries: Tensor, query_labels: Tensor, database: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """How many documents are at each distance 0..b of each query, and how many of its group: two int64 [Q, b + 1]."""
    queries, labels = codes(queries), labels.cpu()
    cells = queries.shape[1] + 1
    counts = torch.empty(len(queries), 2, cells, dtype=torch.int64)
    for i, code in enumerate(queries.split(CHUNK)):
        group = query_labels[CHUNK * i:CHUNK * i + len(code), None].cpu()
        cell = (2 * torch.arange(len(code))[:, None] + (group == labels)) * cells + distances(code, database)
        part = np.bincount(cell.numpy().ravel(), minlength=2 * cells * len(code))
        counts[CHUNK * i:CHUNK * i + len(code)] = torch.from_numpy(part).view(-1, 2, cells)
    other, relevant = counts.unbind(1)
    return other + relevant, relevant


# ------------------------------------------------------------------------------------------------ precision
def precision_at(total: Tensor, relevant: Tensor, k: int = K) -> Tensor:
    """Expected precision, float64 [Q], of the k nearest, the documents of each shell [Q, b + 1] in random order.

    Of a shell with n documents, m of them relevant, that fills the last j places, j m / n are relevant on average.
    Raises SearchError unless 1 <= k <= N.
    """
    _check_k(k, int(total[0].sum()))
    taken = (k - (total.cumsum(1) - total)).clamp(min=0).minimum(total)
    return (taken * relevant.double() / total.clamp(min=1)).sum(1) / k


def _check_k(k: int, n: int) -> None:
    if not 1 <= k <= n:
        raise SearchError(f"precision@k needs 1 <= k <= {n}, the number of documents searched; got k = {k}")


def within(total: Tensor, relevant: Tensor) -> list[dict[str, dict]]:
    """Hamming balls of radius 0, 1, ... b around the queries: means "retrieved", "precision", "answered" as metrics.

    A query whose ball is empty has precision 0, as is usual; precision / answered is the mean over the answered ones.
    """
    total, relevant = total.cumsum(1), relevant.cumsum(1)
    share = relevant / total.clamp(min=1).double()
    return [{"retrieved": estimate(total[:, r], "documents"), "precision": estimate(share[:, r], "precision"),
             "answered": estimate(total[:, r] > 0, "share of queries")} for r in range(total.shape[1])]


def tied_precision(scores: Tensor, relevant: Tensor, ks: tuple[int, ...] = (K,)) -> Tensor:
    """Expected precision, float64 [len(ks), Q], of the k highest scores [Q, N], equal ones in random order.

    relevant: bool [Q, N]. Raises SearchError unless all 1 <= k <= N.
    """
    for k in ks:
        _check_k(k, scores.shape[1])
    top, order = scores.topk(max(ks))
    hit, found = relevant.gather(1, order), []
    for k in ks:
        last = top[:, k - 1:k]
        above, tied = top > last, scores == last
        share = (tied & relevant).sum(1, dtype=torch.int32).double() / tied.sum(1, dtype=torch.int32)
        found.append(((above & hit).sum(1) + (k - above.sum(1)) * share) / k)
    return torch.stack(found)


def tfidf_precision(queries: Tensor, query_labels: Tensor, database: Tensor, labels: Tensor,
                    ks: tuple[int, ...] = (K,)) -> Tensor:
    """The baseline, precision@k [len(ks), Q]: cosine of scikit-learn's tf-idf, fitted on the database; counts CSR.

    An empty document has cosine 0 with all, so that its precision is at chance. Raises SearchError as tied_precision.
    """
    from sklearn.feature_extraction.text import TfidfTransformer
    a, b, labels = _scipy(queries), _scipy(database), labels.cpu()
    tfidf = TfidfTransformer().fit(b)
    a, b = tfidf.transform(a), tfidf.transform(b).T.tocsr()
    found = torch.empty(len(ks), a.shape[0], dtype=torch.float64)
    for i in range(0, a.shape[0], CHUNK):
        scores = torch.from_numpy((a[i:i + CHUNK] @ b).toarray())
        relevant = query_labels[i:i + CHUNK, None].cpu() == labels
        found[:, i:i + CHUNK] = tied_precision(scores, relevant, ks)
    return found


def _scipy(counts: Tensor) -> sparse.csr_matrix:
    parts = (part.cpu().numpy() for part in (counts.values(), counts.col_indices(), counts.crow_indices()))
    return sparse.csr_matrix(tuple(parts), shape=tuple(counts.shape))


def random_codes(n: int, bits: int, generator: torch.Generator) -> Tensor:
    """The baseline that knows nothing: fair coins, uint8 [n, bits]."""
    return torch.randint(2, (n, bits), generator=generator, dtype=torch.uint8)


def chance(query_labels: Tensor, labels: Tensor) -> Tensor:
    """Precision [Q] of a random order, exactly and at any k: the share of the documents in the query's group."""
    groups, sizes = labels.unique(return_counts=True)
    return (query_labels[:, None] == groups).double() @ sizes.double() / len(labels)


def by_group(values: Tensor, labels: Tensor, names: tuple[str, ...], unit: str = "precision") -> dict[str, dict]:
    """{"all" and each group with a query: the mean over its queries as a metric}, of values and labels [Q]."""
    groups = {name: values[labels == i] for i, name in enumerate(names)}
    return {name: estimate(own, unit) for name, own in ({"all": values} | groups).items() if len(own)}


@dataclass(frozen=True)
class Retrieval:
    """How well test documents find training documents of their group; names: "codes", "tf-idf", "random code".

    metrics: precision_at_<k>, of tf-idf and of a random code too, and `statistics` of the training documents' codes;
    at_k: name -> {k: precision}; balls: name -> `within`; groups: name -> `by_group`; chance: of any order.
    """
    metrics: dict[str, dict]
    at_k: dict[str, dict[int, dict]]
    balls: dict[str, list[dict]]
    groups: dict[str, dict[str, dict]]
    chance: float


def retrieval(documents: Documents, queries: Tensor, database: Tensor, seed: int = 0) -> Retrieval:
    """Of the codes of the test documents, queries [Q, b], among those of the training documents, database [N, b].

    k = 100, or all documents if there are fewer, and 1, 3, 10, 30. Raises SearchError as `codes`.
    """
    labels, of_query, n = documents.train_labels, documents.test_labels, len(database)
    last = min(K, n)
    ks = (*(k for k in (1, 3, 10, 30) if k < last), last)
    noise = torch.Generator().manual_seed(seed)
    coin = random_codes(len(queries), queries.shape[1], noise), random_codes(n, queries.shape[1], noise)
    found = {"codes": shells(queries, of_query, database, labels),
             "random code": shells(coin[0], of_query, coin[1], labels)}
    values = {name: {k: precision_at(*counts, k) for k in ks} for name, counts in found.items()}
    tfidf = tfidf_precision(documents.test, of_query, documents.train, labels, ks)
    values = {"codes": values["codes"], "tf-idf": dict(zip(ks, tfidf, strict=True)),
              "random code": values["random code"]}
    at_k = {name: {k: estimate(own[k], "precision") for k in ks} for name, own in values.items()}
    metrics = {f"precision_at_{last}{'' if name == 'codes' else '_' + name.replace('-', '').replace(' ', '_')}":
               own[last] for name, own in at_k.items()}
    return Retrieval(metrics | statistics(database), at_k, {name: within(*counts) for name, counts in found.items()},
                     {name: by_group(own[last], of_query, documents.label_names) for name, own in values.items()},
                     chance(of_query, labels).mean().item())


# ------------------------------------------------------------------------------------------------ what a code is like
def balance(bits: Tensor) -> Tensor:
    """Share of ones of each bit, float64 [b]; 1/2 is best."""
    return codes(bits).double().mean(0)


def entropies(bits: Tensor) -> Tensor:
    """Entropy of each bit over the documents, float64 [b], in bits; 1 is best, a constant bit has 0."""
    p = balance(bits)
    return (torch.special.entr(p) + torch.special.entr(1 - p)) / np.log(2)


def correlations(bits: Tensor) -> Tensor:
    """Pearson correlations of the bits, float64 [b, b]; those of a constant bit count as 0, with itself too."""
    centred = codes(bits).double() - balance(bits)
    norm = centred.norm(dim=0)
    unit = centred / norm.where(norm > 0, 1)
    return unit.T @ unit


def statistics(bits: Tensor) -> dict[str, dict]:
    """Metrics of codes [N, b]: how many differ, how they share buckets, how much each bit says, how alike bits are.

    Correlations are absolute, over pairs of different bits. All are exact for these documents.
    """
    n, b = bits.shape
    sizes = torch.unique(codes(bits), dim=0, return_counts=True)[1]
    entropy, alike = entropies(bits), correlations(bits).abs().fill_diagonal_(0)
    return {"distinct_codes": exact(len(sizes), "codes"), "alone": exact((sizes == 1).sum() / n, "share of documents"),
            "largest_bucket": exact(sizes.max() / n, "share of documents"),
            "imbalance": exact((balance(bits) - 0.5).abs().max(), "largest |share of ones - 1/2|"),
            "constant_bits": exact((entropy == 0).sum(), "bits"),
            "bit_entropy": exact(entropy.mean(), "bits per bit"), "least_entropy": exact(entropy.min(), "bits"),
            "correlation": exact(alike.sum() / max(b * (b - 1), 1), "mean absolute correlation"),
            "largest_correlation": exact(alike.max(), "absolute correlation")}


# ------------------------------------------------------------------------------------------------ queries
def row(counts: Tensor, i: int) -> Tensor:
    """Row i of sparse CSR counts [N, V] as CSR [1, V]."""
    own = slice(*counts.crow_indices()[i:i + 2].tolist())
    return _csr_row(counts.col_indices()[own], counts.values()[own], counts.shape[1])


def _csr_row(columns: Tensor, values: Tensor, words: int) -> Tensor:
    start = torch.tensor([0, len(columns)], device=columns.device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
        return torch.sparse_csr_tensor(start, columns, values, (1, words), check_invariants=True)


def query(words: str, vocabulary: tuple[str, ...]) -> tuple[Tensor, list[str]]:
    """(counts as CSR float32 [1, V], the words that are not in the vocabulary) of what somebody typed.

    Words are told apart as in the 20 Newsgroups counts: lower case, runs of a to z, single letters left out.
    Raises SearchError: no word at all, or none of the vocabulary; it names the vocabulary's nearest words.
    """
    column = {word: i for i, word in enumerate(vocabulary)}
    asked = [word for word in re.findall("[a-z]+", words.lower()) if len(word) > 1 or word in column]
    if not asked:
        raise SearchError("the query has no word: type one or more words of at least two letters from a to z")
    known = torch.tensor([column[word] for word in asked if word in column], dtype=torch.int64)
    unknown = list(dict.fromkeys(word for word in asked if word not in column))
    if not len(known):
        near = {match: None for word in unknown[:SHOWN] for match in difflib.get_close_matches(word[:WORD], vocabulary)}
        hint = f"near ones are {_listed(list(near))}" if near else "nor are any like them"
        raise SearchError(f"none of the {len(vocabulary):,} words of the vocabulary is in the query "
                          f"({_listed(unknown)}): {hint}")
    columns, counts = known.unique(return_counts=True)
    return _csr_row(columns, counts.float(), len(vocabulary)), unknown


def ask(documents: Documents, words: str, number: int) -> tuple[Tensor, str]:
    """(counts as CSR [1, V], in words what is asked): the words or, if there are none, test document `number`.

    Raises SearchError as `query` does, or if there is no such test document.
    """
    if words:
        counts, unknown = query(words, documents.vocabulary)
        known = _listed([documents.vocabulary[i] for i in counts.col_indices().tolist()])
        return counts, f"words: {known}" + (f"; not in the vocabulary: {_listed(unknown)}" if unknown else "")
    if not 0 <= number < len(documents.test_labels):
        raise SearchError(f"there is no test document {number}: choose one from 0 to {len(documents.test_labels) - 1}")
    group = documents.label_names[documents.test_labels[number]]
    return row(documents.test, number), f"test document {number}, {group}: {snippet(documents.text('test', number))}"


def _listed(words: list[str]) -> str:
    shown = ", ".join(word if len(word) <= WORD else f"{word[:WORD]}…" for word in words[:SHOWN])
    return shown + (f" and {len(words) - SHOWN} more" if len(words) > SHOWN else "")


# ------------------------------------------------------------------------------------------------ texts
_PART = r"[^\s<>()\[\]{}\"',;:|]"               # of an address
_ADDRESSES = re.compile(rf"(?<!{_PART}){_PART}+\s@\s[A-Za-z][\w-]*(?:\.[A-Za-z][\w-]*)+"       # name @ host.edu
                        rf"|(?<!{_PART})(?:{_PART}+@{_PART}*|@{_PART}+)"                        # name@host.edu
                        r"|(?<![\w.-])[a-z0-9.-]+(?:![a-z0-9._%-]+)+")                          # host!host!name


def masked(text: str) -> str:
    """The text with e-mail addresses, message identifiers and UUCP paths as …@…; names and numbers stay."""
    return _ADDRESSES.sub("…@…", text)


def snippet(text: str, length: int = SNIPPET) -> str:
    """A post's subject and the beginning of what its author wrote, on one line of about `length` characters, `masked`.

    Left out are the other headers, quoted lines (unless there is nothing else), whom they quote, control characters.
    """
    text, subject = text.replace("\r\n", "\n"), ""
    headers, _, rest = text.partition("\n\n")
    if re.search("^From: ", headers, re.MULTILINE):
        text = rest
        subject = "".join(re.findall(r"^Subject:[ \t]*(.*)", headers, re.MULTILINE | re.IGNORECASE)[:1])
    lines = text.split("\n")
    own = [line for line in lines if not re.match(r"\s*[>|:}]", line)]
    body = "\n".join(own) if any(line.strip() for line in own) else text
    body = re.sub(r"^[^@]{0,160}@.{0,160}? (?:writes|wrote|says|said) ?[:.]+ ?", "", _one_line(body)) or _one_line(text)
    whole = masked(" — ".join(part for part in (_one_line(subject), body) if part)) or "(no text)"
    return whole if len(whole) <= length else f"{whole[:length].rsplit(' ', 1)[0]} …"


def _one_line(text: str) -> str:
    return " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", text).split())


# ------------------------------------------------------------------------------------------------ results
@dataclass(frozen=True, eq=False)
class Result:
    """The documents found: a DataFrame of distance, group, document and text (one row each), and a caption.

    A notebook shows it as a table of escaped HTML that needs no script.
    """
    frame: pd.DataFrame
    caption: str

    def _repr_html_(self) -> str:
        cell = 'style="text-align:left;padding:0.2em 0.6em"'
        head = "".join(f'<th scope="col" {cell}>{escape(name)}</th>' for name in self.frame)
        body = "".join(f"<tr>{''.join(f'<td {cell}>{escape(str(value))}</td>' for value in line)}</tr>"
                       for line in self.frame.itertuples(index=False))
        return (f'<div style="overflow-x:auto;line-height:1.4"><small>{escape(self.caption)}</small>'
                f'<table class="dataframe table tex2jax_ignore mathjax_ignore" style="min-width:40em">'
                f'<thead><tr>{head}</tr></thead><tbody style="vertical-align:top">{body}</tbody></table></div>')


def results(documents: Documents, code: Tensor, database: Tensor, neighbours: int = 10, seed: int = 0) -> Result:
    """The training documents nearest to a code [1, b] among their codes, database [N, b]; ties in random order.

    Raises SearchError as `nearest` does, and if the codes are not of the training documents.
    """
    if len(database) != len(documents.train_labels):
        raise SearchError(f"there are {len(database)} codes for {len(documents.train_labels)} training documents")
    found, apart = nearest(code, database, neighbours, seed)
    groups = [documents.label_names[label] for label in documents.train_labels[found].tolist()]
    frame = pd.DataFrame({"distance": apart.tolist(), "group": groups, "document": found.tolist(),
                          "text": [snippet(documents.text("train", i)) for i in found.tolist()]})
    last = int(apart[-1])
    tied, shown = int((distances(code, database) == last).sum()), int((apart == last).sum())
    caption = f"{len(found)} of {len(database):,} training documents by Hamming distance, of {code.shape[1]} bits"
    if tied > shown:
        caption += f"; at distance {last} there are {tied:,}, of which {shown} are shown, drawn at random"
    return Result(frame, caption)
