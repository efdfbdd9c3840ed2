"""Search by codes: distances, tied precision and statistics against brute force; queries, texts, the search box."""
import itertools
import json
import re
import time

import ipywidgets.embed
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from lib import documents, evaluate, plots_bits, search, search_box, train

VOCABULARY = ("space", "orbit", "launch", "hockey", "goal", "team", "price", "offer")
POST = """From: alice@cs.example.edu (Alice A.)
Subject: Re: <b>Launch</b> & orbit
Organization: nobody@nowhere.org
Lines: 4

In article <1993Apr15.123@cs.example.edu> bob%vax.dnet@gate.example.com (Bob) writes:
> quoted text of carol@example.org
The launch\x08 is <script>alert("1")</script> on $5\tor $6,
ask dave @ mail.example.gov or uunet!host!eve soon. 2 @ $10, a!= b
"""


def bits(n, b, seed=0):
    return search.random_codes(n, b, train.generator(seed))


def csr(rows):
    """Dense rows -> CSR float32, made as the data sets are."""
    rows = np.asarray(rows)
    triples = np.array([(i, j, rows[i, j]) for i, j in zip(*rows.nonzero(), strict=True)], np.int64).reshape(-1, 3)
    return documents._csr(triples, np.arange(rows.shape[1]), len(rows), rows.shape[1])


@pytest.fixture(scope="module")
def corpus():
    """Four training and three test documents on two groups; the last test document is empty."""
    texts = {"train": [POST, "launch", "goal", "team"], "test": ["query", "other", ""]}
    return documents.Documents(
        "tiny", csr([[2, 1, 1, 0, 0, 0, 0, 0], [1, 0, 2, 0, 0, 0, 0, 0], [0, 0, 0, 2, 1, 0, 0, 0],
                     [0, 0, 0, 1, 0, 3, 0, 0]]),
        csr([[1, 1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 0, 0], [0] * 8]), torch.tensor([0, 0, 1, 1]),
        torch.tensor([0, 1, 1]), ("sci.<space>", "rec.hockey"), VOCABULARY, "", texts.get)


def encode(counts):
    """Which of the first six words a document has."""
    return counts.to_dense()[:, :6] > 0


# ---------------------------------------------------------------------------- distances
@pytest.mark.parametrize("b", [1, 8, 64])
def test_distances_are_the_numbers_of_differing_bits(b):
    queries, database = bits(7, b), bits(9, b, seed=1).bool()
    brute = [[sum(x != y for x, y in zip(p, q, strict=True)) for q in database.int().tolist()]
             for p in queries.tolist()]
    assert search.distances(queries, database).tolist() == brute


def test_the_nearest_are_the_nearest_and_ties_come_in_random_order():
    code, database = torch.tensor([[1, 1, 1, 1]]), bits(500, 4)
    found, apart = search.nearest(code, database, 40)
    all_apart = (4 - database.sum(1)).long()
    assert apart.tolist() == all_apart.sort().values[:40].tolist() and (all_apart[found] == apart).all()
    assert torch.equal(found, search.nearest(code, database, 40)[0])
    seen = torch.cat([search.nearest(code, torch.ones(100, 4), 10, seed)[0] for seed in range(200)])
    counts = seen.bincount(minlength=100).double()                      # binomial(200, 1/10): sd 4.2
    assert counts.min() > 2 and counts.max() < 43
    assert len(search.nearest(code, database[:3], 10)[0]) == 3


def test_shells_count_what_is_at_each_distance():
    queries, database, own, labels = bits(300, 5), bits(80, 5, 1), bits(300, 1, 2)[:, 0], bits(80, 1, 3)[:, 0]
    total, relevant = search.shells(queries, own, database, labels)     # more queries than a chunk holds
    apart = search.distances(queries, database)
    for r in range(6):
        assert total[:, r].tolist() == (apart == r).sum(1).tolist()
        assert relevant[:, r].tolist() == ((apart == r) & (own[:, None] == labels)).sum(1).tolist()


# ---------------------------------------------------------------------------- precision
def enumerated(apart, relevant, k):
    """Mean precision of the k first over all orders that sort by distance."""
    hits = [sum(relevant[i] for i in order[:k]) / k for order in itertools.permutations(range(len(apart)))
            if all(apart[i] <= apart[j] for i, j in itertools.pairwise(order))]
    return sum(hits) / len(hits)


@pytest.mark.parametrize("k", range(1, 8))
def test_tied_documents_count_by_their_mean_over_all_orders(k):
    queries, database = bits(5, 2), bits(7, 2, seed=3)
    own, labels = torch.tensor([0, 1, 0, 1, 2]), torch.tensor([0, 0, 1, 0, 1, 1, 0])
    apart, same = search.distances(queries, database), own[:, None] == labels
    expected = [enumerated(a, r, k) for a, r in zip(apart.tolist(), same.tolist(), strict=True)]
    torch.testing.assert_close(search.precision_at(*search.shells(queries, own, database, labels), k),
                               torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(search.tied_precision(-apart.float(), same, (k, 7))[0],
                               torch.tensor(expected, dtype=torch.float64))


def test_precision_by_hand():
    database, labels = torch.tensor([[0, 0], [0, 0], [0, 1], [1, 1]]), torch.tensor([0, 1, 0, 0])
    shells = search.shells(torch.tensor([[0, 0]]), torch.tensor([0]), database, labels)
    assert [search.precision_at(*shells, k).item() for k in (1, 2, 3, 4)] == [1 / 2, 1 / 2, 2 / 3, 3 / 4]
    balls = search.within(*shells)
    assert [ball["retrieved"]["value"] for ball in balls] == [2, 3, 4]
    assert [ball["precision"]["value"] for ball in balls] == [1 / 2, 2 / 3, 3 / 4]


def test_an_empty_ball_has_precision_0_and_is_told():
    shells = search.shells(torch.tensor([[0, 0], [1, 1]]), torch.zeros(2), torch.tensor([[0, 0]]), torch.zeros(1))
    first, second, last = search.within(*shells)
    assert (first["precision"]["value"], first["answered"]["value"]) == (1 / 2, 1 / 2)
    assert second == first and (last["precision"]["value"], last["answered"]["value"]) == (1, 1)


def test_the_order_of_the_file_does_not_matter():
    queries, database, labels = bits(20, 3), bits(60, 3, 1), torch.arange(60) // 20     # sorted by group, as the files
    own, order = torch.arange(20) % 3, torch.randperm(60, generator=train.generator(0))
    one, other = (search.precision_at(*search.shells(queries, own, database[i], labels[i]), 10)
                  for i in (torch.arange(60), order))
    assert torch.equal(one, other)


@pytest.mark.parametrize("b", [1, 16])
def test_a_random_code_is_at_chance(b):
    own, labels = torch.arange(2000) % 4, (torch.arange(1500) % 5).clamp(max=3)         # groups of unequal size
    chance = search.chance(own, labels)
    assert chance[:4].tolist() == [0.2, 0.2, 0.2, 0.4]
    shells = search.shells(bits(2000, b), own, bits(1500, b, seed=1), labels)
    found = evaluate.estimate(search.precision_at(*shells, 100) - chance, "precision")
    assert abs(found["value"]) < 0.003                                 # sd over codes: 0.0006
    torch.testing.assert_close(search.precision_at(*shells, 1500), chance)


def test_tf_idf_cosine_equals_its_definition_and_an_empty_document_is_at_chance(corpus):
    train_counts, test_counts = corpus.train.to_dense().double(), corpus.test.to_dense().double()
    idf = ((1 + 4) / (1 + (train_counts > 0).sum(0))).log() + 1
    a, b = ((x * idf) / (x * idf).norm(dim=1, keepdim=True).clamp(min=1e-9) for x in (test_counts, train_counts))
    same = corpus.test_labels[:, None] == corpus.train_labels
    found = search.tfidf_precision(corpus.test, corpus.test_labels, corpus.train, corpus.train_labels, (1, 2, 3))
    torch.testing.assert_close(found, search.tied_precision(a @ b.T, same, (1, 2, 3)))
    assert found[1].tolist() == [1, 1, 0.5] and found[0, 2] == 0.5
    nothing = search.tfidf_precision(corpus.test, corpus.test_labels, csr(np.zeros((4, 8))), corpus.train_labels, (2,))
    assert nothing.tolist() == [[0.5] * 3]


def test_tf_idf_goes_over_all_chunks(monkeypatch):
    counts, labels = csr(bits(30, 12).numpy()), torch.arange(30) % 3
    whole = search.tfidf_precision(counts, labels, counts, labels, (5, 7))
    monkeypatch.setattr(search, "CHUNK", 7)
    torch.testing.assert_close(search.tfidf_precision(counts, labels, counts, labels, (5, 7)), whole)


def test_by_group_averages_each_group_and_all():
    found = search.by_group(torch.tensor([0.0, 1.0, 0.5]), torch.tensor([0, 0, 2]), ("a", "b", "c"))
    assert {name: metric["value"] for name, metric in found.items()} == {"all": 0.5, "a": 0.5, "c": 0.5}
    assert found["a"]["n"] == 2 and found["a"]["se"] == pytest.approx(0.5) and found["a"]["unit"] == "precision"


# ---------------------------------------------------------------------------- statistics
def test_statistics_of_a_code_by_hand():
    code = torch.tensor([[0, 0, 1], [0, 0, 1], [1, 1, 1], [0, 1, 1]])
    found = {name: metric["value"] for name, metric in search.statistics(code).items()}
    quarter = -0.25 * np.log2(0.25) - 0.75 * np.log2(0.75)
    assert search.balance(code).tolist() == [0.25, 0.5, 1]
    assert search.entropies(code).tolist() == pytest.approx([quarter, 1, 0])
    assert found["distinct_codes"] == 3 and found["alone"] == 0.5 and found["largest_bucket"] == 0.5
    assert found["imbalance"] == 0.5 and found["constant_bits"] == 1 and found["least_entropy"] == 0
    assert found["bit_entropy"] == pytest.approx((quarter + 1) / 3)
    assert found["largest_correlation"] == pytest.approx(1 / 3 ** 0.5)
    assert found["correlation"] == pytest.approx(1 / 3 ** 0.5 / 3)


def test_correlations_equal_numpys_and_those_of_a_constant_bit_are_0():
    code = bits(50, 6).clone()
    found = search.correlations(code).numpy()
    np.testing.assert_allclose(found, np.corrcoef(code.numpy().T), atol=1e-12)
    code[:, 2] = 1
    assert (search.correlations(code)[2] == 0).all() and search.correlations(code).isfinite().all()
    assert search.statistics(code[:, :1])["largest_correlation"]["value"] == 0


# ---------------------------------------------------------------------------- errors
@pytest.mark.parametrize("faulty, message", [
    (lambda: search.codes(torch.zeros(3, 0)), r"some of both and at most 255 bits; got \[3, 0\]"),
    (lambda: search.codes(torch.zeros(0, 8)), r"got \[0, 8\]"),
    (lambda: search.codes(torch.zeros(8)), r"must be \[documents, bits\]"),
    (lambda: search.codes(torch.full((2, 2), 0.5)), "codes must be 0 and 1: round"),
    (lambda: search.codes(torch.full((2, 2), torch.nan)), "codes must be 0 and 1: round"),
    (lambda: search.distances(bits(2, 8), bits(2, 16)), "8 bits cannot be compared with codes of 16 bits"),
    (lambda: search.nearest(bits(1, 8), bits(2, 8), 0), "neighbours must be at least 1, got 0"),
    (lambda: search.precision_at(*search.shells(bits(1, 2), bits(1, 1)[0], bits(3, 2), torch.zeros(3)), 4),
     "1 <= k <= 3, the number of documents searched; got k = 4"),
    (lambda: search.tied_precision(torch.zeros(1, 3), torch.ones(1, 3) > 0, (2, 0)), "got k = 0"),
    (lambda: search.query("", VOCABULARY), "the query has no word"),
    (lambda: search.query("2 + 2, I & é", VOCABULARY), "the query has no word: type one or more"),
    (lambda: search.query("spac Orbiit", VOCABULARY),
     r"none of the 8 words of the vocabulary is in the query \(spac, orbiit\): near ones are space, orbit"),
    (lambda: search.query("zzz", VOCABULARY), r"in the query \(zzz\): nor are any like them"),
])
def test_faults_are_one_sentence(faulty, message):
    with pytest.raises(search.SearchError, match=message) as caught:
        faulty()
    assert "\n" not in str(caught.value)


def test_codes_of_other_documents_are_refused(corpus):
    with pytest.raises(search.SearchError, match="3 codes for 4 training documents"):
        search.results(corpus, bits(1, 6), bits(3, 6))


def test_a_long_query_is_quick_and_its_message_short():
    start = time.perf_counter()
    with pytest.raises(search.SearchError) as caught:
        search.query(" ".join("x" * 100_000 + letter for letter in "abcdefghijklmnop"), VOCABULARY)
    assert len(str(caught.value)) < 400 and time.perf_counter() - start < 2
    assert "and 11 more" in str(caught.value)


# ---------------------------------------------------------------------------- queries and texts
def test_words_become_counts_and_unknown_ones_are_told():
    counts, unknown = search.query("Goal! goal-SPACE don't; mp3 a", VOCABULARY)
    assert counts.to_dense().tolist() == [[1, 0, 0, 0, 2, 0, 0, 0]]
    assert counts.layout == torch.sparse_csr and counts.dtype == torch.float32
    assert unknown == ["don", "mp"]
    assert search.query("a b", ("of", "a"))[0].to_dense().tolist() == [[0, 1]]         # a corpus with single letters


def test_a_row_is_that_of_the_matrix(corpus):
    for i in range(3):
        assert search.row(corpus.test, i).to_dense().tolist() == [corpus.test.to_dense()[i].tolist()]


def test_the_words_are_told_apart_as_in_the_newsgroups_counts():
    """Needs the real counts and texts: what a post's body becomes as a query are the post's counts."""
    try:
        groups = documents.load("newsgroups")
    except documents.data.DataError as error:
        pytest.skip(str(error))
    if groups.texts("test") is None:
        pytest.skip("the texts of 20 Newsgroups are not here")
    for i in range(0, 7505, 150):
        body = groups.text("test", i).partition("\n\n")[2]
        assert torch.equal(search.query(body, groups.vocabulary)[0].to_dense(), search.row(groups.test, i).to_dense())


@pytest.mark.parametrize("text", [
    "bob@x.edu", "<1993.12.AA@host>", "write to: j.o-e+l@a.b.c, or", "(bob%vax.dnet@gate.com)", "bob @ cs.x.edu",
    "uunet!mcsun!bob", "mailto:bob@x.edu.", "bob@", "@host.edu", "a@b@c", "'bob'@x.edu"])
def test_addresses_are_masked(text):
    found = search.masked(text)
    assert "…@…" in found
    assert not any(part in found.replace("…@…", "") for part in ("@", "edu", "bob@", "gate", "j.o", "uunet", "1993"))


def test_what_is_no_address_stays():
    for text in ("2 @ $10", "a != b!", "Wow!Great!", "at 5 p.m.; see ftp.cica.indiana.edu", "[a@b]"[:2]):
        assert search.masked(text) == text


def test_masking_a_long_run_is_quick():
    start = time.perf_counter()
    search.masked("x" * 300_000 + " " + "a!" * 100_000 + "a." * 100_000)
    assert time.perf_counter() - start < 2


def test_a_snippet_is_the_subject_and_what_the_author_wrote():
    assert search.snippet(POST, 500) == (
        'Re: <b>Launch</b> & orbit — The launch is <script>alert("1")</script> on $5 or $6, ask …@… or …@… soon. '
        "2 @ $10, a!= b")
    assert search.snippet(POST.replace("\n", "\r\n"), 500) == search.snippet(POST, 500)
    assert search.snippet("From: x\nSubject: only this\n\n") == "only this"
    assert search.snippet("From: x\n\n> quoted\n> lines") == "> quoted > lines"
    assert search.snippet("Note: no headers\n\nhere") == "Note: no headers here"
    assert search.snippet("") == search.snippet("From: a@b.c\n\n  \x00") == "(no text)"
    long = search.snippet("word " * 100)
    assert len(long) <= search.SNIPPET + 2 and long.endswith("word …")


# ---------------------------------------------------------------------------- results
def test_results_are_the_nearest_documents_with_group_and_text(corpus):
    found = search.results(corpus, encode(search.row(corpus.test, 0)), encode(corpus.train), 3)
    assert found.frame["document"].tolist()[:2] == [0, 1]
    assert found.frame["distance"].tolist() == [1, 2, 4]
    assert found.frame["group"].tolist()[:2] == ["sci.<space>"] * 2 and found.frame["text"][1] == "launch"
    assert found.caption == ("3 of 4 training documents by Hamming distance, of 6 bits; at distance 4 there are 2, "
                             "of which 1 are shown, drawn at random")


def test_the_table_is_escaped_and_names_nobody(corpus):
    found = search.results(corpus, encode(search.row(corpus.test, 0)), encode(corpus.train), 4)
    shown = found._repr_html_()
    assert "<script" not in shown and "<b>" not in shown and "sci.&lt;space&gt;" in shown
    assert "&lt;script&gt;" in shown and "Re: &lt;b&gt;Launch" in shown
    assert all(name not in shown + repr(found) for name in ("alice", "bob", "carol", "dave", "eve", "nobody"))
    assert "tex2jax_ignore" in shown                       # $5 or $6 is no formula
    assert found.caption == "4 of 4 training documents by Hamming distance, of 6 bits"


# ---------------------------------------------------------------------------- the search box
@pytest.fixture
def view(corpus):
    return search_box.SearchBox(corpus, encode, neighbours=2)


def test_words_are_searched_for_and_an_empty_box_returns_to_the_document(view):
    document = view.query.value, view.table.value
    view.words.value = "hockey goal frobnicate"
    assert view.query.value.endswith(">words: hockey, goal; not in the vocabulary: frobnicate</p>")
    assert view.table.value == search.results(view.documents, encode(search.query("hockey goal", VOCABULARY)[0]),
                                              view.codes, 2)._repr_html_()
    assert view.message.value == "" and "|0||rec.hockey||2||goal|" in re.sub("<[^>]*>", "|", view.table.value)
    view.words.value = ""
    assert (view.query.value, view.table.value) == document


def test_an_error_is_a_sentence_in_the_box_and_leaves_no_old_table(view):
    for words in ("<img src=x>", "   ", "orbti"):
        view.words.value = words
        assert view.message.value.startswith('<p role="alert">') and view.table.value == view.query.value == ""
        assert "<img" not in view.message.value
    assert "near ones are orbit" in view.message.value
    view.words.value = "orbit"
    assert view.message.value == "" and "<table" in view.table.value


def test_a_broken_encoder_is_told_at_once_or_in_the_box(corpus):
    with pytest.raises(search.SearchError, match="codes must be 0 and 1"):
        search_box.SearchBox(corpus, lambda counts: counts.to_dense())
    view = search_box.SearchBox(corpus, lambda counts: encode(counts)[:, :6 if len(counts) > 1 else 5])
    assert "5 bits cannot be compared with codes of 6 bits" in view.message.value and not view.table.value


def test_a_test_document_is_picked_by_number_or_drawn_from_a_group(view):
    view.words.value = "orbit"
    view.number.value = 1 if view.number.value != 1 else 0
    i = view.number.value
    assert view.words.value == "" and f"test document {i}, " in view.query.value
    view.number.value = 99                                             # the browser's field is bounded, too
    assert view.number.value == 2 and "(no text)" in view.query.value and "<table" in view.table.value
    view.group.value = 0
    assert view.number.value == 0 and "sci.&lt;space&gt;: query" in view.query.value
    view.words.value = "hockey"
    view.another.click()                                               # the only one of its group: drawn again
    assert view.number.value == 0 and view.words.value == "" and "test document 0" in view.query.value
    view.group.value = -1
    drawn = set()
    for _ in range(40):
        view.another.click()
        drawn.add(view.number.value)
    assert drawn == {0, 1, 2}


def test_the_number_of_neighbours_is_that_of_rows(view):
    for n in (1, 3, 50):
        view.neighbours.value = n
        assert view.table.value.count("<tr>") == 1 + min(n, 4)


def test_a_search_among_topics_is_quick_finds_the_topic_and_its_saved_state_is_small():
    corpus = documents.load("topics")
    counts = corpus.train.to_dense()
    typical = torch.stack([counts[corpus.train_labels == i].mean(0) for i in range(8)]) - counts.mean(0)
    view = search_box.SearchBox(corpus, lambda counts: counts @ typical.T > 0)
    for group, words in (("astronomy", "telescope galaxy moon planet"), ("football", "goal striker match referee")):
        start = time.perf_counter()
        view.words.value = words
        assert time.perf_counter() - start < 1
        assert view.table.value.count(group) >= 5 # of 10; chance is 1.25
    assert len(json.dumps(ipywidgets.embed.dependency_state(view.box), default=str)) < 100_000
    assert all(each.description for each in (view.words, view.group, view.number, view.another, view.neighbours))


# ---------------------------------------------------------------------------- figures
def test_figures_show_the_numbers(corpus):
    queries, database, labels = bits(40, 8), bits(200, 8, 1), torch.arange(200) % 2
    shells = search.shells(queries, labels[:40], database, labels)
    at_k = {"random": {k: evaluate.estimate(search.precision_at(*shells, k), "precision") for k in (1, 10)}}
    left, right = plots_bits.retrieval(at_k, {"random": search.within(*shells)}, 0.5).axes
    assert left.lines[0].get_ydata().tolist() == [at_k["random"][k]["value"] for k in (1, 10)]
    assert len(right.lines[0].get_ydata()) == 5
    groups = search.by_group(search.precision_at(*shells, 10), labels[:40], ("a", "b"))
    (ax,) = plots_bits.by_group({"random": groups}, "precision@10").axes
    assert ax.get_yticklabels()[-1].get_text() == "all" and ax.get_xlim()[0] == 0
    ones, _ = plots_bits.code_bits({"random": search.balance(database)}, {"random": search.entropies(database)}).axes
    assert ones.lines[1].get_ydata().tolist() == search.balance(database).sort().values.tolist()
    plt.close("all")


def test_a_question_is_words_or_a_test_document():
    corpus = documents.load("topics")
    word = corpus.vocabulary[3]
    counts, told = search.ask(corpus, f"{word} zzzz", 5)
    assert counts.col_indices().tolist() == [3] and told == f"words: {word}; not in the vocabulary: zzzz"
    counts, told = search.ask(corpus, "", 5)
    assert torch.equal(counts.to_dense()[0], corpus.test.to_dense()[5]) and told.startswith("test document 5, ")
    for number in (-1, 400):
        with pytest.raises(search.SearchError, match=f"there is no test document {number}: choose one from 0 to 399"):
            search.ask(corpus, "", number)


def test_retrieval_compares_codes_with_tf_idf_and_coins():
    """Codes that spell the group find nothing else; the baselines are those of the functions they are made of."""
    corpus = documents.load("topics")
    spelt = [(labels[:, None] >> torch.arange(3)) & 1 for labels in (corpus.test_labels, corpus.train_labels)]
    found = search.retrieval(corpus, *spelt)
    assert found.metrics["precision_at_100"]["value"] == 1 and found.metrics["distinct_codes"]["value"] == 8
    assert found.chance == pytest.approx(search.chance(corpus.test_labels, corpus.train_labels).mean().item())
    coins = found.metrics["precision_at_100_random_code"]
    assert abs(coins["value"] - found.chance) < 5 * coins["se"]
    tfidf = search.tfidf_precision(corpus.test, corpus.test_labels, corpus.train, corpus.train_labels)
    assert found.metrics["precision_at_100_tfidf"]["value"] == pytest.approx(tfidf.mean().item())
    assert set(found.at_k["codes"]) == {1, 3, 10, 30, 100}
    assert set(found.groups["codes"]) == {"all", *corpus.label_names}
    assert found.balls["codes"][0]["precision"]["value"] == 1
