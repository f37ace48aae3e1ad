"""Looks at the built site as a reader would, in headless Chromium with the network off.

    python docs/_check.py site                        # every page, at 1,400 and 400 pixels
    python docs/_check.py site --screenshots DIR      # and pictures, light and dark

It finds pages wider than the window, code that is cut, broken names, raw TeX, missing pictures,
words that one types into the search in vain and, without a browser, links that lead to no page or
heading.
"""

import argparse
import contextlib
import functools
import html.parser
import http.server
import json
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urlencode, urljoin, urlsplit

WIDTHS = (1400, 400)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
# What is worth a picture: one page of each kind.
SHOWN = ("", "guide/", "methods/", "methods/upgrad/", "concepts/", "faq/", "performance/",
         "notebooks/conflict/", "gallery/", "api/jacobian/", "glossary/")  # fmt: skip
# What people come for, and the heading in the FAQ under which the search finds it.
SOUGHT = {
    "freeze": "How do I freeze a part of the model?",
    "missing labels": "How do I handle missing labels?",
    "clip": "How do I clip gradients?",
    "BatchNorm": "How do I use BatchNorm?",
    "log": "How do I log the weights?",
    "compare": "How do I compare strategies on my own data?",
    "cost": "What does a strategy cost?",
}
# Loads each page at each width in a frame of this page, and sends what it sees.
INSPECT = """
<body><script>
const found = [];
const settle = ms => new Promise(done => setTimeout(done, ms));
function look(page, width, view) {
  const doc = view.document, report = text => found.push(`${page} at ${width}: ${text}`);
  const wide = doc.documentElement.scrollWidth;
  if (wide > width) report(`the page is ${wide} pixels wide`);
  if (width > 1000) for (const code of doc.querySelectorAll("pre > code"))
    if (code.scrollWidth > code.clientWidth + 1) {
      const line = code.textContent.split("\\n").sort((a, b) => b.length - a.length)[0];
      report(`code is cut: ${line}`);
    }
  for (const code of doc.querySelectorAll(":not(pre) > code"))
    if (/^[\\w.]{1,40}$/.test(code.textContent) && code.getClientRects().length > 1)
      report(`a name is broken: ${code.textContent}`);
  for (const image of doc.images)
    if (image.loading !== "lazy" && !image.naturalWidth) report(`no picture ${image.src}`);
  for (const element of doc.querySelectorAll(".arithmatex"))
    if (!element.querySelector(".katex")) report(`raw TeX ${element.textContent}`);
  for (const element of doc.querySelectorAll(".katex-error")) report(`TeX ${element.title}`);
  const walk = doc.createTreeWalker(doc.querySelector("article") || doc.body, NodeFilter.SHOW_TEXT);
  for (let node = walk.nextNode(); node; node = walk.nextNode()) {
    const inside = node.parentElement.closest("pre, code, .katex, script, style");
    if (!inside && /\\$\\$|\\\\[a-z(\\[]{2}|\\.\\. math::|:math:/.test(node.textContent))
      report(`raw markup ${node.textContent.trim().slice(0, 80)}`);
  }
}
async function opened(page) {
  const frame = document.createElement("iframe");
  frame.style.cssText = `width: ${WIDTHS[0]}px; height: 900px; border: 0`;
  const loaded = new Promise(done => (frame.onload = done));
  frame.src = page;
  document.body.append(frame);
  await loaded;
  return frame;
}
async function inspect(page) {
  const frame = await opened(page);
  for (const width of WIDTHS) {
    frame.style.width = `${width}px`;
    await settle(150);
    look(page, width, frame.contentWindow);
  }
  frame.remove();
}
async function search() {
  const index = await (await fetch("/search/search_index.json")).json();
  if (index.docs.length < PAGES.length) found.push("the search index misses pages");
  const frame = await opened("/"), find = name => frame.contentDocument.querySelector(name);
  for (const [words, title] of Object.entries(SOUGHT)) {
    const box = find("[data-md-component=search-query]");
    const seen = () => find("[data-md-component=search-result]")?.textContent.includes(title);
    for (let turn = 0; box && turn < 100 && !seen(); turn++) {
      box.focus();
      box.value = words;
      for (const kind of ["input", "keyup"]) box.dispatchEvent(new Event(kind, { bubbles: true }));
      await settle(100);
    }
    if (!seen()) found.push(`the search for ${words} does not find ${title}`);
  }
  frame.remove();
}
(async () => {
  const waiting = [...PAGES];
  const work = async () => { while (waiting.length) await inspect(waiting.shift()); };
  await Promise.all([work(), work(), work(), search()]);
  await fetch("/look", { method: "POST", body: JSON.stringify(found) });
})();
</script></body>
"""
# Shows one page in four frames: wide and narrow, light and dark.
SHOW = """
<body style="margin: 0; white-space: nowrap; background: #808080"><script>
for (const scheme of ["default", "slate"]) for (const width of WIDTHS) {
  const frame = document.createElement("iframe");
  frame.style.cssText = `width: ${width}px; height: 1600px; border: 0; margin-right: 8px`;
  frame.onload = () => (frame.contentDocument.body.dataset.mdColorScheme = scheme);
  frame.src = new URLSearchParams(location.search).get("page");
  document.body.append(frame);
}
</script></body>
"""


def browser() -> str | None:
    """The path of a Chromium, if one is installed."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def pages(site: Path) -> list[str]:
    """The addresses of the pages of a site."""
    return ["/" + _address(site, path) for path in sorted(site.glob("**/index.html"))]


def inspect(site: Path, some: list[str] | None = None, timeout: float = 300) -> list[str]:
    """What is wrong on the pages of a site, or on some of them, one line each."""
    found: queue.Queue[list[str]] = queue.Queue()
    some = pages(site) if some is None else some
    script = _script(PAGES=some, WIDTHS=WIDTHS, SOUGHT=SOUGHT) + INSPECT
    with _serving(site, script, found.put) as address, _chromium(address):
        try:
            return found.get(timeout=timeout)
        except queue.Empty:
            return [f"the browser did not finish within {timeout} seconds"]


def screenshots(site: Path, folder: Path) -> None:
    """A picture of each kind of page: at each width, light and dark, side by side."""
    folder.mkdir(parents=True, exist_ok=True)
    size = f"--window-size={2 * (sum(WIDTHS) + 16)},1600"
    with _serving(site, _script(WIDTHS=WIDTHS) + SHOW) as address:
        for page in SHOWN:
            file = folder / f"{page.strip('/').replace('/', '-') or 'index'}.png"
            options = f"--screenshot={file}", size, "--virtual-time-budget=4000"
            with _chromium(f"{address}?{urlencode({'page': '/' + page})}", *options) as run:
                run.wait(120)


def dead_links(site: Path) -> list[str]:
    """Links within the site that lead to no page, no file or no heading."""
    pages = {path: _Links(path) for path in sorted(site.glob("**/*.html"))}
    dead = []
    for path, links in pages.items():
        if path.name == "404.html":  # is served at any address
            continue
        here = f"https://site/{_address(site, path)}"
        for link in sorted(links.links):
            target, fragment = urldefrag(urljoin(here, link))
            if urlsplit(target).hostname != "site":
                continue
            file = site / unquote(urlsplit(target).path).lstrip("/")
            file = file / "index.html" if file.is_dir() else file
            if not file.exists():
                dead.append(f"{_address(site, path)}: no {link}")
            elif fragment and file in pages and unquote(fragment) not in pages[file].ids:
                dead.append(f"{_address(site, path)}: no heading {link}")
    return dead


class _Links(html.parser.HTMLParser):
    """The links and ids of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.ids: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.ids.add(value)
            elif name in ("href", "src") and value and not value.startswith("data:"):
                self.links.add(value)


def _script(**constants: object) -> str:
    """Constants for a page of ours."""
    lines = [f"const {name} = {json.dumps(value)};" for name, value in constants.items()]
    return f"<script>{' '.join(lines)}</script>"


@contextlib.contextmanager
def _serving(site: Path, page: str, posted: Callable[[Any], None] = print) -> Iterator[str]:
    """Serves a site on this machine, and a page that looks at it, whose address it gives."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if urlsplit(self.path).path != "/look":
                super().do_GET()
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(page.encode())

        def do_POST(self) -> None:
            posted(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    handler = functools.partial(Handler, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/look"
        server.shutdown()


@contextlib.contextmanager
def _chromium(url: str, *options: str) -> Iterator[subprocess.Popen]:
    """A headless Chromium on one page, without a network."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [
            str(browser()),
            "--headless",
            "--no-sandbox",  # it sees our own pages only, and may be run by root
            "--disable-gpu",
            "--hide-scrollbars",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            f"--user-data-dir={profile}",
            *options,
            url,
        ]
        quiet = subprocess.DEVNULL
        process = subprocess.Popen(command, stdout=quiet, stderr=quiet)
        try:
            yield process
        finally:
            process.terminate()
            process.wait()


def _address(site: Path, page: Path) -> str:
    return page.relative_to(site).as_posix().removesuffix("index.html")


def main() -> None:
    """Prints what is wrong, and ends with 1 if anything is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("site", type=Path)
    parser.add_argument("--screenshots", type=Path, metavar="DIR")
    options = parser.parse_args()
    found = dead_links(options.site)
    if browser() is None:
        print(f"no browser ({', '.join(BROWSERS)}): only links were looked at")
    else:
        found += inspect(options.site)
        if options.screenshots:
            screenshots(options.site, options.screenshots)
    print("\n".join(found) or "nothing is wrong")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
