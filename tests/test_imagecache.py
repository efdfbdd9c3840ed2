"""The cache of decoded images: whole or not there, resumed, checked; a full disk."""
import errno
import hashlib
import itertools
import json
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import small_faces
import torch
from small_faces import FACES, N, complaint, counted, expected, flipped, jpeg, noise, packed, together, unpacked

from lib import celeba, imagecache

place = small_faces.place
cache = small_faces.cache


# ------------------------------------------------------------------------------------------------ the cache
def test_a_second_load_decodes_and_hashes_nothing(place, cache, monkeypatch):
    packed(place / "a.zip")
    first = celeba.load(16)
    files = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    monkeypatch.setattr(celeba, "_digest", None)
    with counted(monkeypatch) as names:
        again = celeba.load(16)
    assert not names and torch.equal(together(again), together(first)) and again.sha256 == first.sha256
    assert files == {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert not list(cache.glob("*.partial"))


def test_the_cache_is_of_the_contents_not_of_the_place(place, tmp_path, monkeypatch):
    first = celeba.load(16) if packed(place / "a.zip") else None
    monkeypatch.setenv("VAEBOOK_DATA", str(tmp_path / "moved"))
    place.parent.rename(tmp_path / "moved")
    with counted(monkeypatch) as names:
        assert torch.equal(together(celeba.load(16)), together(first)) and not names


def test_other_images_sizes_and_crops_have_caches_of_their_own(place, cache, monkeypatch):
    path = unpacked(place)
    found = [celeba.load(16), celeba.load(16, "face-128"), celeba.load(20)]
    (path / "000002.jpg").write_bytes(jpeg(noise(99)))
    found.append(celeba.load(16))
    assert len(list(cache.glob("*.npy"))) == 4
    assert torch.equal(together(found[3])[1:2], expected({"": jpeg(noise(99))}))
    assert torch.equal(together(found[3])[2:], together(found[0])[2:]) and found[3].sha256 != found[0].sha256
    monkeypatch.setattr(celeba, "DECODING", celeba.DECODING + 1)
    with counted(monkeypatch) as names:
        celeba.load(20)
    assert len(names) == N


def test_writing_into_the_images_leaves_the_cache_as_it_was(place):
    packed(place / "a.zip")
    celeba.load(16).train.zero_()
    assert torch.equal(together(celeba.load(16)), expected())


def test_several_threads_give_the_bytes_of_one(place, cache, monkeypatch):
    packed(place / "a.zip")
    kept = []
    for threads in (1, 4):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        celeba.load(16)
        kept.append({path.suffix: path.read_bytes() for path in cache.glob("resize*")})
        for path in cache.iterdir():
            path.unlink()
    assert kept[0] == kept[1] and set(kept[0]) == {".npy", ".json", ".lock"}


HEADER = 128



DAMAGE = {
    "a bit": (lambda npy: flipped(npy, HEADER + 9 * 768), 8), "the last bit": (lambda npy: flipped(npy, -1), 7),
    "the header": (lambda npy: flipped(npy, 60), 0), "short": (lambda npy: os.truncate(npy, HEADER + 100), N),
    "long": (lambda npy: npy.write_bytes(npy.read_bytes() + b"x"), N), "gone": (Path.unlink, N),
    "empty": (lambda npy: npy.write_bytes(b""), N), "no journal": (lambda npy: npy.with_suffix(".json").unlink(), N),
    "odd journal": (lambda npy: npy.with_suffix(".json").write_text("[1]"), N),
    "no json": (lambda npy: npy.with_suffix(".json").write_text("{"), N)}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_not_used_and_only_what_is_damaged_is_decoded_again(place, cache, monkeypatch, damage):
    packed(place / "a.zip")
    celeba.load(16)
    npy = next(cache.glob("*.npy"))
    before = npy.read_bytes()
    spoil, again = DAMAGE[damage]
    spoil(npy)
    with counted(monkeypatch) as names:
        assert torch.equal(together(celeba.load(16)), expected())
    assert len(names) == again and npy.read_bytes() == before and np.load(npy).shape == (N, 3, 16, 16)


def test_a_journal_of_another_setting_does_not_vouch_for_the_array(place, cache, monkeypatch):
    packed(place / "a.zip")
    celeba.load(16)
    journal = next(cache.glob("resize*.json"))
    journal.write_text(journal.read_text().replace('"crop": "resize"', '"crop": "face-128"'))
    with counted(monkeypatch) as names:
        celeba.load(16)
    assert len(names) == N


@pytest.mark.parametrize("content", ["", "[]", '{"PATH": 3}', '{"PATH": []}', '{"PATH": ["other", "0000"]}'])
def test_a_spoilt_memory_of_checksums_is_not_believed(place, cache, content):
    path = packed(place / "a.zip")
    cache.mkdir(parents=True)
    (cache / "sources.json").write_text(content.replace("PATH", str(path)))
    assert celeba.load(16).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert json.loads((cache / "sources.json").read_text())[str(path)][1] == celeba.load(16).sha256


SLOWLY = """
import sys, time
from pathlib import Path
from lib import celeba
celeba.root = lambda: Path(sys.argv[1])
celeba.CHUNK, pixels = 4 * 3 * 16 * 16, celeba._pixels
celeba._pixels = lambda *arguments: time.sleep(0.05) or pixels(*arguments)
celeba.load(16)
"""


def test_killed_while_decoding_it_goes_on_where_it_was(place, cache, tmp_path, monkeypatch):
    packed(place / "a.zip")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", SLOWLY, tmp_path / "checkout"], env=environment,
                               cwd=Path(celeba.__file__).parents[1])
    deadline = time.monotonic() + 60
    while len(journalled(cache)) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    done = journalled(cache)
    assert 2 <= len(done) < 6 and not list(cache.glob("*.npy")) and len(list(cache.glob("*.partial"))) == 1
    monkeypatch.setattr(celeba, "CHUNK", 4 * 3 * 16 * 16)
    with counted(monkeypatch) as names:
        assert torch.equal(together(celeba.load(16)), expected())
    assert sorted(names) == [name for i, name in enumerate(FACES) if str(i // 4 * 4) not in done]
    resumed = {path.suffix: path.read_bytes() for path in cache.glob("resize*")}
    for path in cache.iterdir():
        path.unlink()
    celeba.load(16)
    assert resumed == {path.suffix: path.read_bytes() for path in cache.glob("resize*")}


def journalled(cache):
    """The chunks that the one journal in the cache lists."""
    return next((json.loads(path.read_text())["chunks"] for path in cache.glob("resize*.json")), {})


def test_a_chunk_that_was_journalled_but_is_not_what_it_was_is_decoded_again(place, cache, monkeypatch):
    packed(place / "a.zip")
    interrupted(monkeypatch, after=18)
    partial = next(cache.glob("*.partial"))
    assert list(journalled(cache)) == ["0", "8"]
    flipped(partial, HEADER + 768)
    with counted(monkeypatch) as names:
        assert torch.equal(together(celeba.load(16)), expected())
    assert sorted(names) == [name for i, name in enumerate(FACES) if not 8 <= i < 16]


def interrupted(monkeypatch, after):
    """A load that a person interrupts when so many images have been decoded."""
    count, pixels = itertools.count(1), celeba._pixels

    def stop(*arguments):
        if next(count) > after:
            raise KeyboardInterrupt
        return pixels(*arguments)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(celeba, "_pixels", stop)
        celeba.load(16)


def test_two_that_load_at_once_decode_once(place, monkeypatch):
    packed(place / "a.zip")
    found = []
    with counted(monkeypatch) as names:
        threads = [threading.Thread(target=lambda: found.append(celeba.load(16))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(names) == list(FACES) and len(found) == 3
    assert all(torch.equal(together(one), expected()) for one in found)


# ------------------------------------------------------------------------------------------------ a full disk
def test_a_disk_too_full_for_the_array_is_known_before_anything_is_decoded(place, cache, monkeypatch):
    """The limit of a file's size is the disk's end here: the kernel refuses in the same place."""
    packed(place / "a.zip")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with counted(monkeypatch) as names:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        try:
            text = complaint()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot keep resize-16-" in text and f"in {cache}: File too large; free space" in text and not names
    assert not list(cache.glob("*.partial")) and not list(cache.glob("*.npy"))
    assert torch.equal(together(celeba.load(16)), expected())


@pytest.mark.parametrize("where", ["posix_fallocate", "fsync"])
def test_a_disk_that_fills_up_is_named_and_what_was_decoded_is_kept(place, cache, monkeypatch, where):
    packed(place / "a.zip")
    celeba._sha256(celeba.find(), celeba._fingerprint(celeba.find()))
    count, real = itertools.count(), getattr(os, where)

    def full(*arguments):
        if next(count) == (3 if where == "fsync" else 0):       # of the second chunk: one, file and folder come before
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)
    with monkeypatch.context() as patch:
        patch.setattr(os, where, full)
        assert "(0.0 MB)" in (text := complaint()) and "No space left on device; free space" in text
    assert not list(cache.glob("*.npy")) and list(journalled(cache)) == (["0"] if where == "fsync" else [])
    with counted(monkeypatch) as names:
        assert torch.equal(together(celeba.load(16)), expected())
    assert len(names) == (N - 8 if where == "fsync" else N)


def test_a_file_system_that_cannot_reserve_space_is_written_to_all_the_same(place, monkeypatch):
    packed(place / "a.zip")

    def unsupported(*arguments):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")
    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    assert torch.equal(together(celeba.load(16)), expected())


def test_a_cache_that_cannot_be_written_is_named_and_one_that_is_whole_is_read(place, cache, monkeypatch):
    packed(place / "a.zip")
    cache.parent.parent.mkdir()
    cache.parent.write_text("")
    assert f"in {cache}: " in (text := complaint()) and "Not a directory" in text
    cache.parent.unlink()
    celeba.load(16)
    monkeypatch.setattr(imagecache.fcntl, "flock", None)
    assert torch.equal(together(celeba.load(16)), expected())
