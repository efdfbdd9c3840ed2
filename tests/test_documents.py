"""Documents: counts are those of the files, words the most widespread ones, texts theirs, and each fault one line."""
import collections
import dataclasses
import hashlib
import io
import os
import re
import tarfile
import urllib.error

import pytest
import torch

from lib import data, documents
from lib import topics as generated

NEWS, TEXTS = data.SOURCES["newsgroups"], data.TEXTS["newsgroups-texts"]
ARCHIVE, LISTED = NEWS.files
FOLDER = "20news-bydate/matlab/"
COUNTS = {                                                        # five words, three documents and two; 1-based
    "train.data": "1 1 7\n1 2 1\n2 2 1\n2 5 2\n3 3 100\n", "train.label": "1\n1\n20\n",
    "test.data": "1 4 2\n1 2 3\n2 1 1\n", "test.label": "2\n20\n"}
POSTS = {"train/alt.atheism/9": b"nine", "train/alt.atheism/10": b"ten \xe9", "train/alt.atheism/11": b"uncounted",
         "train/talk.religion.misc/5": b"five", "test/comp.graphics/1": b"one", "test/talk.religion.misc/2": b"two"}


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """No test downloads, reads a person's data folder (this gives its name) or leaves data of its own in the caches."""
    real = os.environ.get("VAEBOOK_DATA")
    monkeypatch.setenv("VAEBOOK_DATA", str(tmp_path / "named"))
    monkeypatch.setattr(data, "root", lambda: tmp_path / "checkout")
    monkeypatch.setattr(data, "_download", offline)
    yield real
    data._load.cache_clear()
    documents._posts.cache_clear()


def offline(mirrors, target, sha256):
    raise urllib.error.URLError("no network")


def packed(members, kind="gz", date=0):
    """A tar archive of {name: content}."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{kind}") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), date
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def counts(**changes):
    """The members of an archive of counts, some of them changed (None: left out); train_data stands for train.data."""
    parts = COUNTS | {name.replace("_", "."): value for name, value in changes.items()}
    return {FOLDER + name: text.encode() for name, text in parts.items() if text is not None}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """A function that puts an archive of counts and a list of words in place of the real ones; returns its path."""
    def put(content, words="alpha beta gamma delta epsilon"):
        data._load.cache_clear()
        files = {ARCHIVE: content, LISTED: words.replace(" ", "\n").encode()}
        digests = {file: hashlib.sha256(written).hexdigest() for file, written in files.items()}
        monkeypatch.setitem(data.SOURCES, "newsgroups", dataclasses.replace(NEWS, files=digests))
        monkeypatch.setattr(documents, "WORDS", 3)
        monkeypatch.setattr(documents, "UNCOUNTED", {"train": {2}, "test": {}})
        for file, written in files.items():
            (tmp_path / "named" / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "named" / file).write_bytes(written)
        return tmp_path / "named" / ARCHIVE
    return put


@pytest.fixture
def posts(tmp_path, monkeypatch):
    """A function that puts an archive of texts in place of one of the real ones; returns its path."""
    def put(content, kind="gz"):
        path = tmp_path / "named" / f"20news/20news-bydate.tar.{kind}"
        digest = {f"20news/{path.name}": hashlib.sha256(content).hexdigest()}
        other = {file: "0" * 64 for file in (TEXTS.files | TEXTS.instead) if file not in digest}
        files, instead = (digest, other) if kind == "gz" else (other, digest)
        monkeypatch.setitem(data.TEXTS, "newsgroups-texts", dataclasses.replace(TEXTS, files=files, instead=instead))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path
    return put


def archive_of_posts(kind="gz"):
    return packed({f"20news-bydate-{name}": content for name, content in POSTS.items()}, kind)


def complaint(act, *arguments):
    """The one line that the failure of an action is told in."""
    with pytest.raises(data.DataError) as error:
        act(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------------------ counts
def test_the_counts_of_the_most_widespread_words_are_kept(write):
    """By documents, not by occurrences (gamma: 100 in one), training only (delta); of equals those listed first."""
    write(packed(counts()))
    found = documents.load("newsgroups")
    assert found.vocabulary == ("beta", "alpha", "gamma")
    assert found.train.to_dense().tolist() == [[1, 7, 0], [1, 0, 0], [0, 0, 100]]
    assert found.test.to_dense().tolist() == [[3, 0, 0], [0, 1, 0]]
    assert found.train_labels.tolist() == [0, 0, 19] and found.test_labels.tolist() == [1, 19]
    assert found.train.layout == torch.sparse_csr and found.train.dtype == torch.float32
    assert found.train_labels.dtype == torch.int64 and found.label_names[19] == "talk.religion.misc"
    assert found is data.load("newsgroups") and len(found.sha256) == 64


def test_a_document_without_any_word_of_the_vocabulary_stays_and_says_so(write):
    write(packed(counts(test_data="1 4 2\n2 1 1\n")))
    found = documents.load("newsgroups")
    assert found.test.shape == (2, 3) and found.test.to_dense()[0].tolist() == [0, 0, 0]
    assert found.text("test", 0).startswith("no word of the vocabulary\n")


def test_smoothing_is_the_distribution_of_words_with_one_more_word_shared_by_all(write):
    write(packed(counts()))
    found = documents.smoothing(documents.load("newsgroups").train)
    torch.testing.assert_close(found, torch.tensor([2 + 1 / 3, 7 + 1 / 3, 100 + 1 / 3]) / 110, rtol=1e-6, atol=0)


def test_smoothing_is_added_up_in_double_precision():
    """One count more is lost 1,000 times next to 2^24 otherwise."""
    many = torch.cat([torch.tensor([[2.0 ** 24, 1000.0]]), torch.tensor([[1.0, 0.0]]).expand(1000, 2)]).to_sparse_csr()
    found = documents.smoothing(many)
    assert found.dtype == torch.float32
    assert found[1].item() == pytest.approx(1000.5 / (2 ** 24 + 2001), rel=1e-7)
    assert found[0].item() == pytest.approx((2 ** 24 + 1000.5) / (2 ** 24 + 2001), abs=6e-8)


# ------------------------------------------------------------------------------------------------ faults of the counts
@pytest.mark.parametrize("damage", [lambda content: content[:-20], lambda content: b"", lambda content: b"<html>no",
                                    lambda content: packed(counts(train_label="1\n2\n20\n"))],
                         ids=["cut", "empty", "page", "other"])
def test_another_archive_is_corrupt(write, damage):
    path = write(packed(counts()))
    path.write_bytes(damage(path.read_bytes()))
    text = complaint(documents.load, "newsgroups")
    assert f"{path} is corrupt" in text and "`python -m lib data --fetch newsgroups`" in text and "'topics'" in text


def test_the_same_members_in_another_packing_are_sound_and_other_members_are_not(write, monkeypatch):
    path = write(packed(counts()))
    members = [FOLDER + name for name in COUNTS]
    digest = hashlib.sha256("".join(COUNTS.values()).encode()).hexdigest()
    monkeypatch.setitem(data.PACKED, data.SOURCES["newsgroups"].files[ARCHIVE], (members, digest))
    before = documents.load("newsgroups")
    again = packed({f"{FOLDER}train.map": b"alt.atheism 1\n"} | dict(reversed(counts().items())), "bz2", date=99)
    for content, sound in ((again, True), (packed(counts(test_label="2\n19\n")), False), (again[:-20], False)):
        path.write_bytes(content)
        data._load.cache_clear()
        if not sound:
            assert "is corrupt" in complaint(documents.load, "newsgroups")
            continue
        after = documents.load("newsgroups")
        assert after is not before and torch.equal(after.train.to_dense(), before.train.to_dense())
        assert after.sha256 == before.sha256


@pytest.mark.parametrize(("content", "why"), [
    (packed(counts())[:-20], "end-of-stream"), (b"", "not be opened"), (packed(counts(test_data=None)), "test.data"),
    (packed(counts(train_data="1 1 x\n")), "unmatched"), (packed(counts(train_data="1 1\n")), "reshape"),
    (packed(counts(train_data="")), "zero-size"), (packed(counts(train_data="0 1 1\n")), "train is out of range"),
    (packed(counts(train_data="4 1 1\n")), "train is out of range"),
    (packed(counts(test_data="1 6 1\n")), "test is out of range"),
    (packed(counts(test_data="1 0 1\n")), "test is out of range"),
    (packed(counts(test_data="1 1 0\n")), "test is out of range"),
    (packed(counts(test_label="21\n1\n")), "test is out of range"),
    (packed(counts(test_label="0\n1\n")), "test is out of range"),
    (packed(counts(test_data="1 1 1\n1 1 1\n")), "distinct")],
    ids=["cut", "nothing", "no member", "letters", "two columns", "no counts", "document 0", "document beyond",
         "word beyond", "word 0", "count 0", "label beyond", "label 0", "twice"])
def test_an_archive_that_holds_no_counts_is_named(write, content, why):
    """Even if its checksum were the expected one."""
    path = write(content)
    text = complaint(documents.load, "newsgroups")
    assert f"{path} cannot be read as counts of 20 Newsgroups" in text and why in text and "'topics'" in text


def test_missing_files_without_a_network_are_named_with_the_corpus_that_needs_none(tmp_path):
    text = complaint(documents.load, "newsgroups")
    assert f"looked for {tmp_path}/named/{ARCHIVE}, {tmp_path}/checkout/data/{ARCHIVE})" in text
    assert "`python -m lib data --fetch newsgroups`" in text and "the embedded data set 'topics' needs no file" in text


def test_missing_files_are_downloaded_from_the_home_page_or_its_mirror(write, tmp_path, monkeypatch):
    path = write(packed(counts()))
    shelf = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    for name in shelf:
        (path.parent / name).unlink()
    asked = []

    def download(mirrors, target, sha256):
        asked.append(mirrors)
        target.write_bytes(shelf[target.name])
    monkeypatch.setattr(data, "_download", download)
    assert documents.load("newsgroups").train.shape == (3, 3)
    assert len(asked) == 2 and asked[0] == data._mirrors("newsgroups-texts") and "qwone.com" in asked[0][0]


# ------------------------------------------------------------------------------------------------ texts
def test_without_the_archive_of_texts_a_document_is_its_words(write):
    write(packed(counts()))
    text = documents.load("newsgroups").text("train", 0)
    assert text.startswith("alpha 7, beta 1\n") and "`python -m lib data --fetch newsgroups-texts`" in text


@pytest.mark.parametrize("kind", ["gz", "xz"])
def test_texts_are_in_the_order_of_the_counts_without_those_that_are_not_counted(write, posts, kind):
    write(packed(counts()))
    found = documents.load("newsgroups")
    assert "alpha" in found.text("train", 0)
    posts(archive_of_posts(kind), kind)                             # from now on they are here
    assert [found.text("train", i) for i in range(3)] == ["nine", "ten é", "five"]
    assert [found.text("test", i) for i in torch.arange(2)] == ["one", "two"]


@pytest.mark.parametrize(("split", "i"), [("train", 3), ("test", 2), ("train", -1), ("valid", 0)])
def test_a_document_that_there_is_not_is_refused(write, split, i):
    write(packed(counts()))
    text = complaint(documents.load("newsgroups").text, split, i)
    assert f"newsgroups has no document {i} in '{split}': it has 3 in 'train' and 2 in 'test'" in text


def test_a_corrupt_archive_of_texts_is_named(write, posts):
    write(packed(counts()))
    path = posts(archive_of_posts())
    path.write_bytes(path.read_bytes()[:-20])
    text = complaint(documents.load("newsgroups").text, "train", 0)
    assert f"{path} is corrupt" in text and "`python -m lib data --fetch newsgroups-texts`" in text


@pytest.mark.parametrize(("content", "why"), [
    (archive_of_posts()[:-20], "end-of-stream"), (packed({"readme": b"posts"}), "unpack"),
    (packed({"20news-bydate-dev/alt.atheism/1": b""}), "dev"), (packed({"train/alt.atheism/x": b""}), "invalid")],
    ids=["cut", "other names", "other split", "no number"])
def test_an_archive_that_holds_no_texts_is_named(write, posts, content, why):
    """Even if its checksum were the expected one."""
    write(packed(counts()))
    path = posts(content)
    text = complaint(documents.load("newsgroups").text, "train", 0)
    assert f"{path} cannot be read as the posts of 20 Newsgroups" in text and why in text and "as their words" in text


def test_texts_of_other_documents_are_refused(write, posts):
    write(packed(counts()))
    posts(packed({"20news-bydate-train/alt.atheism/1": b""}))
    text = complaint(documents.load("newsgroups").text, "train", 0)
    assert "newsgroups has 3 documents in 'train' but 1 texts" in text


def test_fetching_texts_takes_either_archive_and_listing_tells_of_it(posts, tmp_path):
    assert "texts of newsgroups' documents are not here" in complaint(data.fetch, "newsgroups-texts")
    posts(archive_of_posts("xz"), "xz")
    assert data.fetch("newsgroups-texts") == tmp_path / "named"
    rows = {row["name"]: row["state"] for row in data.listing()}
    assert rows["newsgroups-texts"] == f"present in {tmp_path / 'named'}"
    assert (rows["newsgroups"], rows["topics"]) == ("missing", "embedded")


# ------------------------------------------------------------------------------------------------ images or documents
@pytest.mark.parametrize("name", data.DOCUMENTS)
def test_documents_given_to_a_notebook_of_images_are_refused(name):
    assert complaint(data.load, name, 32) == \
        f"{name} has documents, not images: choose one of mnist, fashionmnist, digits, shapes, celeba"


def test_images_given_to_a_notebook_of_documents_are_refused():
    assert complaint(documents.load, "mnist") == "mnist has images, not documents: choose newsgroups or topics"
    assert "unknown data set 'newsgroup': known are" in complaint(documents.load, "newsgroup")


# ------------------------------------------------------------------------------------------------ generated
def test_topics_have_their_sizes_and_every_word_is_met_in_training():
    found = documents.load("topics")
    words = len(found.vocabulary)
    assert found.train.shape == (1600, words) and found.test.shape == (400, words) and words == 612
    assert found.train_labels.bincount().tolist() == [200] * 8 and found.test_labels.bincount().tolist() == [50] * 8
    assert found.label_names == tuple(generated.TOPICS)
    dense = found.train.to_dense()
    assert ((dense > 0).sum(0).diff() <= 0).all() and (dense > 0).any(0).all()
    lengths = dense.sum(1)
    assert lengths.min() == 25 and 220 < lengths.max() < 250 and 40 < lengths.median() < 50


def test_topics_are_the_same_every_time_and_on_every_machine():
    before = documents.load("topics")
    data._load.cache_clear()
    after = documents.load("topics")
    assert after is not before and torch.equal(after.train.to_dense(), before.train.to_dense())
    assert before.sha256 == after.sha256 == "2a4bbb0591d994c74f925804d92b7476c3fc3773650f1fe44db8f28a4e4cb136"


def words_of(corpus, split, i):
    """{word: count} of a document, for the words that it has."""
    row = getattr(corpus, split)[i].to_dense()
    return {corpus.vocabulary[w]: row[w].item() for w in row.nonzero().flatten()}


@pytest.mark.parametrize(("split", "i"), [("train", 0), ("train", 1599), ("test", 7)])
def test_the_text_of_a_topic_document_has_its_counts(split, i):
    found = documents.load("topics")
    assert collections.Counter(found.text(split, i).split()) == words_of(found, split, i)


def test_topics_are_told_apart_by_their_words_clearly_but_not_always():
    found = documents.load("topics")
    member = torch.tensor([[float(word in words.split()) for words in generated.TOPICS.values()]
                           for word in found.vocabulary])
    guess = (found.train @ member).argmax(1)
    assert 0.8 < (guess == found.train_labels).float().mean() < 0.98
    common = (found.train @ member.eq(0).all(1).float()[:, None]).sum() / found.train.values().sum()
    assert common.item() == pytest.approx(0.5, abs=0.02)


def test_training_and_test_documents_differ():
    found = documents.load("topics")
    train, test = ({found.text(split, i) for i in range(n)} for split, n in (("train", 1600), ("test", 400)))
    assert len(train) == 1600 and len(test) == 400 and not train & test


# ------------------------------------------------------------------------------------------------ real files
@pytest.fixture
def real(fresh, monkeypatch):
    """The folder of the real files."""
    monkeypatch.setenv("VAEBOOK_DATA", fresh or "")
    folder = data.find("newsgroups")
    if not folder:
        pytest.skip("20 Newsgroups is not on this machine")
    return folder


def lines_of(folder, member):
    with tarfile.open(folder / ARCHIVE) as tar:
        return tar.extractfile(FOLDER + member).read().decode().splitlines()


def test_the_real_counts_are_those_of_the_file(real):
    found = documents.load("newsgroups")
    assert found.train.shape == (11_269, 10_000) and found.test.shape == (7_505, 10_000)
    vocabulary = (real / LISTED).read_text().split()
    kept, total, frequency = set(found.vocabulary), collections.Counter(), collections.Counter()
    for split in ("train", "test"):
        for line in lines_of(real, f"{split}.data"):
            _, word, count = line.split()
            total[split] += int(count) * (vocabulary[int(word) - 1] in kept)
            frequency[vocabulary[int(word) - 1]] += split == "train"
        rows = getattr(found, split)
        assert rows.values().double().sum() == total[split] and (rows.crow_indices().diff() > 0).all()
        assert (getattr(found, f"{split}_labels") + 1).tolist() == [*map(int, lines_of(real, f"{split}.label"))]
    order = {word: place for place, word in enumerate(vocabulary)}
    assert found.vocabulary == tuple(sorted(vocabulary, key=lambda word: (-frequency[word], order[word])))[:10_000]
    last = [line.split()[1:] for line in lines_of(real, "test.data") if line.startswith("7505 ")]
    expected = {vocabulary[int(word) - 1]: float(count) for word, count in last}
    assert words_of(found, "test", 7504) == {word: count for word, count in expected.items() if word in kept}


def test_the_real_smoothing_sums_to_one(real):
    found = documents.smoothing(documents.load("newsgroups").train)
    assert found.shape == (10_000,) and found.double().sum().item() == pytest.approx(1, abs=1e-6) and found.min() > 0


def test_the_real_texts_have_the_words_that_were_counted(real):
    if not data.find("newsgroups-texts"):
        pytest.skip("the texts are not on this machine")
    found = documents.load("newsgroups")
    for split, n in (("train", 11_269), ("test", 7_505)):
        for i in [*range(0, n, 100), n - 1]:
            written = collections.Counter(re.findall("[a-z]+", found.text(split, i).lower()))
            short = {w: count for w, count in words_of(found, split, i).items() if written[w] < count}
            assert not short, (split, i, short)


def test_the_real_texts_are_of_the_groups_that_the_labels_say(real):
    """By the names of all documents, where the archive of counts has them (the home page's has those of the groups)."""
    names = {split: [line.split()[0] for line in lines_of(real, f"{split}.map")] for split in ("train", "test")}
    if not data.find("newsgroups-texts") or len(names["train"]) == 20:
        pytest.skip("the texts or the names are not on this machine")
    found = documents.load("newsgroups")
    file = next(iter(data.held("newsgroups-texts", data.find("newsgroups-texts"))))
    with tarfile.open(real / file) as tar:
        posts = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}
    for split in ("train", "test"):
        groups = [found.label_names[label] for label in getattr(found, f"{split}_labels")]
        assert groups == [name.partition("/")[0] for name in names[split]]
        for i, name in enumerate(names[split]):
            assert found.text(split, i).encode("latin-1") == posts[f"20news-bydate-{split}/{name}"]
