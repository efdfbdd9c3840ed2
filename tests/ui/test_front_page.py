"""The scoreboard in Chromium, from disk without a network: filtered, sorted, downloaded; and a run it links to.

`make report` first: the built page is compared with the runs that are recorded now.
"""
import pytest
from test_book import HTML

from lib import front, runs, scoreboard

pytestmark = pytest.mark.ui
PAGE = HTML / "notebooks" / "scoreboard.html"
ROWS = ".board tbody tr"
OBTAINED = f"[...document.querySelectorAll('{ROWS}')].map(row => row.cells[3].dataset.v)"


@pytest.fixture
def open_page(chromium):
    """Opens a page of the book from disk; everything that it asks of the network fails."""
    if not PAGE.exists():
        pytest.skip("the book is not built: make report")
    contexts = []

    def opened(path=PAGE, fragment="", **options):
        contexts.append(chromium.new_context(offline=True, accept_downloads=True, **options))
        tab = contexts[-1].new_page()
        tab.goto(path.as_uri() + fragment, wait_until="load")
        return tab
    yield opened
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def frame():
    return scoreboard.score(scoreboard.flatten(scoreboard.load()), runs.records())


def shown(tab):
    return tab.locator(f"{ROWS}:visible").count()


def test_words_work_and_verdict_filter_together(open_page, frame):
    tab = open_page()
    told, words = tab.locator(".board output"), tab.get_by_label("filter")
    assert shown(tab) == len(frame) and told.inner_text() == f"{len(frame)} of {len(frame)} numbers"
    tab.get_by_label("verdict").select_option("not run")
    n = int((frame["verdict"] == "not run").sum())
    assert shown(tab) == n and told.inner_text() == f"{n} of {len(frame)} numbers"
    tab.get_by_label("work").select_option("vampprior")
    n = int(((frame["verdict"] == "not run") & (frame["work"] == "vampprior")).sum())
    assert 0 < shown(tab) == n
    words.fill("CONVHVAE static")
    both = frame["key"].str.contains("convhvae") & frame["key"].str.contains("static")
    n = int((both & (frame["verdict"] == "not run") & (frame["work"] == "vampprior")).sum())
    assert 0 < shown(tab) == n
    words.fill("no such words <b>")
    assert shown(tab) == 0
    words.fill("")
    tab.get_by_label("verdict").select_option("")
    tab.get_by_label("work").select_option("")
    assert shown(tab) == len(frame)


def test_a_header_sorts_numbers_as_numbers_by_click_and_by_key(open_page, frame, shots):
    tab = open_page()
    before, head = tab.evaluate(OBTAINED), tab.locator(".board thead th").nth(3)
    numbers = sorted(frame["obtained"].dropna())
    head.get_by_role("button").click()
    up = tab.evaluate(OBTAINED)
    assert head.get_attribute("aria-sort") == "ascending"
    assert [float(value) for value in up if value] == numbers and set(up[len(numbers):]) == {""}
    tab.keyboard.press("Enter")                                          # the button has the focus
    down = tab.evaluate(OBTAINED)
    assert head.get_attribute("aria-sort") == "descending"
    assert [float(value) for value in down if value] == numbers[::-1] and set(down[len(numbers):]) == {""}
    tab.screenshot(path=shots / "scoreboard-sorted.png")
    tab.keyboard.press("Space")
    assert tab.evaluate(OBTAINED) == before and head.get_attribute("aria-sort") is None
    tab.locator(".board thead button", has_text="number").click()
    names = [text.partition("\n")[0] for text in tab.locator(f"{ROWS} th").all_inner_texts()]
    bits = [name.rpartition(" ")[2] for name in names if name.startswith("train nelbo final / d0 / e1")]
    assert bits == ["8", "16", "32", "64"] and names[0].startswith("dynamic mnist")
    assert tab.locator(".board [aria-sort]").count() == 1


@pytest.mark.parametrize("name", ["csv", "json"])
def test_a_click_downloads_the_rows(open_page, frame, name):
    tab = open_page()
    with tab.expect_download() as download:
        tab.get_by_role("link", name=name.upper(), exact=True).click()
    assert download.value.suggested_filename == f"scoreboard.{name}"
    assert download.value.path().read_text() == front.FORMATS[name](frame)


def test_a_link_opens_the_run_it_names(open_page, shots):
    tab = open_page()
    tab.get_by_role("link", name="paper-seed=2", exact=True).first.click()
    run = tab.locator("[id='gmm--paper-seed=2']")
    run.get_by_text("python -m lib run gmm --preset paper --seed 2").wait_for(state="visible")
    tab.wait_for_function("""() => {
        const top = document.querySelector("details.run[open]").getBoundingClientRect().top;
        return top >= 0 && top < innerHeight; }""")
    tab.screenshot(path=shots / "recorded-run.png")
    assert tab.locator("details.run[open]").count() == 1
    tab.evaluate("location.hash = '#gmm--paper'")
    tab.locator("[id='gmm--paper'] table").wait_for(state="visible")


def test_without_its_script_the_table_stands_there_whole(open_page, frame):
    tab = open_page(java_script_enabled=False)
    assert shown(tab) == len(frame)
    assert not tab.locator(".board .needs:visible").count() and not tab.locator(".board thead button").count()
    assert tab.get_by_role("link", name="CSV", exact=True).is_visible()
