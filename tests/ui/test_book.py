"""The built book in a browser: served on loopback and from disk, light and dark, desktop and phone.

`make report` first, then `make test-ui`; screenshots are left in build/shots.
"""
import functools
import http.server
import re
import threading

import pytest

from lib import root

pytestmark = pytest.mark.ui
HTML = root() / "build" / "book" / "_build" / "html"
NAMES = sorted(str(path.relative_to(HTML)) for folder in (".", "book", "notebooks")
               for path in (HTML / folder).glob("*.html"))
WIDTHS = {"desktop": (1400, 1000), "phone": (390, 844)}
# the theme sets up live code twice and unused; a browser keeps pages on disk from loading icon fonts,
# which the widgets look for in a wrong place
HARMLESS = re.compile(r"THEBE_JS_URL|favicon|origin 'null'|\.(ttf|woff2?)$")
TYPESET = """() => document.querySelectorAll('mjx-container').length >=
                   document.querySelectorAll('span.math, div.math').length"""
WIDGETS = """() => document.querySelectorAll('.jupyter-widgets').length >= document.querySelectorAll(
                   'script[type="application/vnd.jupyter.widget-view+json"]').length"""
BROKEN = "[...document.images].filter(each => !each.complete || !each.naturalWidth).map(each => each.src)"


@pytest.fixture(scope="module")
def address():
    """The book on loopback."""
    if not NAMES:
        pytest.skip("the book is not built: make report")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=HTML)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def look(chromium, url, allowed, picture, size, scheme="light", offline=False):
    """Open a page, check all that holds for every page and keep a picture of it."""
    width, height = WIDTHS[size]
    context = chromium.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, offline=offline)
    tab, outside, errors = context.new_page(), [], []
    tab.on("request", lambda request: outside.append(request.url) if not request.url.startswith(allowed) else None)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("console", lambda message: errors.append(f"{message.text} {message.location['url']}")
           if message.type == "error" else None)
    try:
        tab.goto(url, wait_until="load")
        tab.wait_for_function(TYPESET, timeout=20_000)
        tab.wait_for_function(WIDGETS, timeout=20_000)
        tab.wait_for_timeout(300)
        tab.screenshot(path=picture, full_page=True)
        assert tab.evaluate("document.documentElement.dataset.theme") == scheme
        assert not outside
        assert not [error for error in errors if not HARMLESS.search(error)]
        assert not tab.locator("mjx-merror").count(), "maths with an error"
        assert tab.evaluate(BROKEN) == []
        assert tab.evaluate("document.documentElement.scrollWidth") <= width, "the page is wider than the screen"
        return tab.locator("mjx-container").count()
    finally:
        context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", WIDTHS)
@pytest.mark.parametrize("name", NAMES or ["none"])
def test_a_page_is_whole_and_asks_nobody_else(chromium, address, shots, name, size, scheme):
    picture = shots / f"{name[:-5].replace('/', '-')}-{size}-{scheme}.png"
    look(chromium, f"{address}/{name}", (address, "data:", "blob:"), picture, size, scheme)


@pytest.mark.parametrize("size", WIDTHS)
def test_the_book_opens_from_disk_without_a_network(chromium, address, shots, size):
    page = HTML / "notebooks" / "autoencoders.html"
    picture = shots / f"from-disk-{size}.png"
    maths = look(chromium, page.as_uri(), ("file:", "data:", "blob:"), picture, size, offline=True)
    assert maths > 5
