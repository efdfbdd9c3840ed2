"""Widgets in a real JupyterLab: Chromium moves the explorer's slider by key, and types into the search box."""
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import psutil
import pytest

from lib import root

pytestmark = pytest.mark.ui
OPTIONS = ["--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", "--ServerApp.port_retries=0",
           "--LabApp.news_url=", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
           "--LabApp.expose_app_in_browser=True", "--ServerApp.terminals_enabled=False"]
OWN = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime",
       "IPYTHONDIR": "ipython", "JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces"}


@pytest.fixture
def lab(tmp_path):
    """JupyterLab on loopback behind a token, with settings of its own, in a folder with copies of the notebooks."""
    work, settings = tmp_path / "work", tmp_path / "settings" / "@jupyterlab" / "apputils-extension"
    work.mkdir()
    settings.mkdir(parents=True)
    for name in ("explore", "semantic-hashing"):
        shutil.copy(root() / "notebooks" / f"{name}.ipynb", work)
    (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
    environment = {**os.environ, **{name: str(tmp_path / folder) for name, folder in OWN.items()}}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token, address = secrets.token_hex(16), f"http://127.0.0.1:{port}"
    with open(tmp_path / "lab.log", "w+") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *OPTIONS, f"--ServerApp.port={port}", f"--ServerApp.root_dir={work}",
             f"--IdentityProvider.token={token}"], env=environment, stdout=log, stderr=log)
        try:
            _wait(server, f"{address}/api?token={token}", tmp_path / "lab.log")
            yield address, token
        finally:
            _stop(server)


def _wait(server, url, log, seconds=60):
    for _ in range(4 * seconds):
        assert server.poll() is None, f"JupyterLab ended: {log.read_text()[-2000:]}"
        try:
            return urllib.request.urlopen(url, timeout=2).close()
        except OSError:
            time.sleep(0.25)
    raise AssertionError(f"JupyterLab did not answer within {seconds} s: {log.read_text()[-2000:]}")


def _stop(server):
    """The server ends its kernels; what is left after 20 s is killed."""
    started = psutil.Process(server.pid).children(recursive=True) if server.poll() is None else []
    server.terminate()
    try:
        server.wait(20)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
    for process in psutil.wait_procs(started, timeout=5)[1]:
        process.kill()


def _run_all(chromium, lab, name):
    """(context, tab, its kernel's idle sign, requests to elsewhere, errors of the page), all cells being run."""
    address, token = lab
    context = chromium.new_context(viewport={"width": 1400, "height": 1000})
    tab, outside, errors = context.new_page(), [], []
    tab.on("request", lambda request: outside.append(request.url)
           if not request.url.startswith((address, address.replace("http", "ws"), "data:", "blob:")) else None)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.goto(f"{address}/lab/tree/{name}.ipynb?token={token}", wait_until="domcontentloaded", timeout=90_000)
    tab.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=90_000)
    # the status bar, not the execution indicator: that one says idle before there is a kernel
    idle = tab.locator("#jp-main-statusbar").get_by_text("Python 3 (ipykernel) | Idle").first
    idle.wait_for(timeout=60_000)
    tab.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells'); }")
    return context, tab, idle, outside, errors


def test_a_key_moves_the_image_and_the_map(lab, chromium, shots):
    context, tab, idle, outside, errors = _run_all(chromium, lab, "explore")
    handles = tab.locator(".jp-OutputArea .widget-slider .noUi-handle")
    handles.first.wait_for(timeout=240_000)                          # the default run may have to be made first
    assert handles.count() == 2
    tab.get_by_text("'map': True").last.wait_for(timeout=60_000)     # the last cell that prints, and one more
    idle.wait_for(timeout=60_000)
    explorer = tab.locator(".jp-OutputArea .widget-hbox", has=tab.locator(".widget-slider")).first
    latent_map, decoded = explorer.locator("img").nth(0), explorer.locator("img").nth(1)
    text = explorer.locator(".widget-label", has_text="nearest test code").last
    handles.first.scroll_into_view_if_needed()
    explorer.screenshot(path=shots / "explorer-before.png")
    before = text.inner_text(), latent_map.screenshot(), decoded.screenshot()

    handles.first.focus()
    start = time.perf_counter()
    tab.keyboard.press("ArrowLeft")
    _changed(tab, text, before[0])
    print(f"one key press: {1000 * (time.perf_counter() - start):.0f} ms")
    for _ in range(19):
        tab.keyboard.press("ArrowLeft")
    _settled(tab, text)
    after = text.inner_text(), latent_map.screenshot(), decoded.screenshot()
    explorer.screenshot(path=shots / "explorer-after.png")
    tab.screenshot(path=shots / "jupyterlab.png")
    assert all(old != new for old, new in zip(before, after, strict=True))
    assert explorer.locator("select").input_value() == "moved by hand"
    readout = explorer.locator(".widget-readout").first.inner_text().replace("\N{MINUS SIGN}", "-")
    assert after[0].startswith(f"z = ({readout}, ")                   # the kernel's z is the slider's

    explorer.locator("select").select_option(index=5)
    _changed(tab, text, after[0])
    _settled(tab, text)
    assert "nearest test code: 1, 0.0" in text.inner_text()
    assert explorer.locator("select").input_value().startswith("1: test image")     # the browser corrected nothing
    explorer.screenshot(path=shots / "explorer-picked.png")
    assert not outside
    assert not errors
    context.close()


def test_the_search_box_answers_words_and_documents(lab, chromium, shots):
    context, tab, _, outside, errors = _run_all(chromium, lab, "semantic-hashing")
    field = tab.get_by_placeholder("type words, then Enter").first
    field.wait_for(timeout=240_000)
    box = tab.locator(".jp-OutputArea .widget-vbox", has=tab.get_by_placeholder("type words, then Enter")).first
    box.scroll_into_view_if_needed()
    box.locator("table").wait_for(timeout=20_000)

    field.fill("telescope galaxy frobnicate")
    field.press("Enter")
    box.get_by_text("words: telescope, galaxy; not in the vocabulary: frobnicate").wait_for(timeout=20_000)
    assert box.locator("tbody tr").count() == 10
    box.screenshot(path=shots / "search-words.png")

    field.fill("frobnicate")
    field.press("Enter")
    box.get_by_role("alert").wait_for(timeout=20_000)
    assert not box.locator("table").count()

    box.locator("select").select_option(index=3)                     # a group: a document of it is drawn
    box.locator("table").wait_for(timeout=20_000)
    assert field.input_value() == ""
    before = box.inner_text()
    box.get_by_role("button", name="draw another").click()
    _changed(tab, box, before)
    number = box.locator("input[type=number]").first
    number.fill("7")
    number.press("Enter")
    box.get_by_text("test document 7, ").wait_for(timeout=20_000)
    box.screenshot(path=shots / "search-document.png")
    assert not outside
    assert not errors
    context.close()


def _changed(tab, locator, old):
    tab.wait_for_function("([element, old]) => element.innerText !== old", arg=[locator.element_handle(), old],
                          timeout=20_000)


def _settled(tab, locator, quiet=0.7):
    """Wait until the text has not changed for a while."""
    while True:
        old = locator.inner_text()
        tab.wait_for_timeout(1000 * quiet)
        if locator.inner_text() == old:
            return
