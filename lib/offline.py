"""What lets the built pages work from disk without a network: MathJax, widget scripts, a check.

    python -m lib.offline           # put MathJax where the builder looks for it (`make setup` does)
"""
import hashlib
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from lib import BookError, root

# npm package -> sha256 of its archive, and its files to take: pattern -> folder under assets/offline
WIDGETS = {
    "requirejs@2.3.8": (
        "777158e89275e16bd51aec3ef714fbcb5dc45789e7078659933bc814916d7dec",
        {r"package/(require\.js)": ""}),
    "@jupyter-widgets/html-manager@1.0.15": (
        "2b9d65cb7913e1c7d671757a10008b32c9c2448d4429513371e55c07d6107638",
        {r"package/dist/(embed-amd\.js)": "",
         r"package/dist/(\w+\.woff2)": "@jupyter-widgets/html-manager/dist/"}),
}
# the builder's setting (nb_ipywidgets_js) that makes pages load these, and whom they ask without it
WIDGET_SCRIPTS = {
    "offline/require.js": {},
    "offline/embed-amd.js": {"data-jupyter-widgets-cdn": "../_static/offline/"},
}
WIDGET_CDN = ("cdnjs.cloudflare.com/ajax/libs/require.js/",
              "cdn.jsdelivr.net/npm/@jupyter-widgets/html-manager@")


class OfflineError(BookError):
    """A file that the pages need is not there; the message says how to get it in one line."""


def mathjax() -> Path:
    """Copy MathJax from its package to assets/offline, where _config.yml expects it; return that folder.

    Of the package `sphinx-mathjax-offline` nothing else is used. Raises OfflineError when it is absent.
    """
    folder = root() / "assets" / "offline"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        files = importlib.metadata.files("sphinx-mathjax-offline") or []
        (source,) = (file.locate() for file in files if file.name == "tex-svg-full.js")
        shutil.copy(source, folder / "tex-svg-full.js")
    except (importlib.metadata.PackageNotFoundError, ValueError, FileNotFoundError):
        raise OfflineError("MathJax is missing: install sphinx-mathjax-offline (`make setup` does)") from None
    return folder


def widgets(folder: Path) -> bool:
    """Have the scripts that show widgets in `folder`, fetched once with npm; False where that fails.

    The pages then ask the public CDN; without a network the picture beside each widget remains.
    """
    if (folder / "require.js").exists() and (folder / "embed-amd.js").exists():
        return True
    npm = shutil.which("npm")
    if not npm:
        return False
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        command = [npm, "pack", "--silent", "--fetch-retries=0", "--fetch-timeout=20000", *WIDGETS]
        try:
            subprocess.run(command, cwd=scratch, timeout=60, check=True, capture_output=True)
        except (OSError, subprocess.SubprocessError):
            return False
        archives = {hashlib.sha256(path.read_bytes()).hexdigest(): path
                    for path in Path(scratch).glob("*.tgz")}
        for package, (sha256, members) in WIDGETS.items():
            if sha256 not in archives:
                print(f"widget scripts left out: {package} has an unexpected checksum", file=sys.stderr)
                return False
            found |= _members(archives[sha256], members)
    for name, content in found.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return True


def _members(archive: Path, wanted: dict[str, str]) -> dict[str, bytes]:
    """Contents of the members whose names match, by place: read one by one, never unpacked into a folder."""
    with tarfile.open(archive) as file:
        return {place + match[1]: file.extractfile(member).read() for member in file.getmembers()
                for pattern, place in wanted.items() if (match := re.fullmatch(pattern, member.name))}


def check(html: Path) -> list[str]:
    """What the pages under `html` load and lack, one line each: a file that is missing or on another host.

    Scripts, styles, pictures and frames count; links do not, nor do the widget scripts where npm had none.
    """
    problems = []
    templates = set(html.glob("_static/**/*.html"))
    for page in sorted(set(html.rglob("*.html")) - templates):
        text = page.read_text()
        addresses = re.findall(r'<(?:script|img|iframe)\b[^>]*?\ssrc="([^"]+)"', text)
        addresses += re.findall(r'<link\b(?=[^>]*rel="stylesheet")[^>]*?\shref="([^"]+)"', text)
        for address in addresses:
            where = f"{page.relative_to(html)}: {address[:200]}"
            if re.match(r"(?:https?:)?//", address):
                if not any(cdn in address for cdn in WIDGET_CDN):
                    problems.append(f"{where} is on another host")
            elif address.startswith("data:"):
                continue
            elif not (page.parent / re.split(r"[?#]", address)[0]).exists():
                problems.append(f"{where} is missing")
    return problems


if __name__ == "__main__":
    try:
        mathjax()
    except (OfflineError, OSError) as error:
        sys.exit(f"error: {error}")
