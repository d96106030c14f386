"""Every page in a real browser: no error, no request that leaves it, math and figures drawn, links alive, any screen.

These tests exist because a page that looks right on its author's screen may load a font from elsewhere, show raw LaTeX,
or run off the edge of a phone.
"""

import re
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
from browsing import HTML, SHOTS, errors, requests

pytestmark = pytest.mark.site

PAGES = sorted(str(p.relative_to(HTML)) for p in HTML.rglob("*.html") if "_static" not in p.parts)
if not PAGES:
    pytest.skip(f"the site is not built in {HTML}: make -C docs", allow_module_level=True)
every_page = pytest.mark.parametrize("page", PAGES)
WIDE, PHONE = (1280, 900), (390, 844)


def open_page(browser, url, size=WIDE, scheme="light"):
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE,
    })  # fmt: skip
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get("about:blank")
    requests(browser), errors(browser)  # what an earlier page left
    browser.get(url)
    deadline = time.monotonic() + 30
    ready = "return document.readyState == 'complete' && (!window.MathJax || !MathJax.startup || window.drawn === true)"
    browser.execute_script(
        "window.drawn = false;"
        "if (window.MathJax && MathJax.startup) MathJax.startup.promise.then(() => { window.drawn = true; })"
    )
    while not browser.execute_script(ready) and time.monotonic() < deadline:
        time.sleep(0.05)
    # Figures below the fold are loaded lazily: scroll once through the page.
    browser.execute_script("document.querySelectorAll('img').forEach(i => { i.loading = 'eager' })")
    images = "return [...document.images].every(i => i.complete)"
    while not browser.execute_script(images) and time.monotonic() < deadline:
        time.sleep(0.05)


def picture(browser, page, kind):
    if SHOTS:
        height = min(12000, browser.execute_script("return document.documentElement.scrollHeight"))
        width = browser.execute_script("return window.innerWidth")
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": width, "height": height, "deviceScaleFactor": 1, "mobile": False,
        })  # fmt: skip
        Path(SHOTS).mkdir(parents=True, exist_ok=True)
        browser.save_screenshot(f"{SHOTS}/{page.replace('/', '_').removesuffix('.html')}_{kind}.png")


def test_there_are_pages():
    assert {"index.html", "start.html", "reliability.html", "methods/dora.html", "notebooks/00_tour.html"} <= set(PAGES)


@every_page
def test_a_page_draws_its_math_and_figures_with_no_error_and_no_request_that_leaves_it(page, browser, address):
    open_page(browser, address + page)
    outside = [url for url in requests(browser) if not url.startswith((address, "data:", "blob:"))]
    assert not outside
    assert not errors(browser)
    broken = browser.execute_script("return [...document.images].filter(i => !i.naturalWidth).map(i => i.src)")
    assert not broken
    named = "i.alt && !i.alt.endsWith('.png')"  # a file's name is what Sphinx writes where there is none
    unnamed = browser.execute_script(f"return [...document.images].filter(i => !({named})).map(i => i.src)")
    assert not unnamed, "figures without a text for who cannot see them"
    assert not browser.execute_script("return document.querySelectorAll('a[download] img').length")  # to be opened
    math, drawn, wrong = browser.execute_script(
        "const all = [...document.querySelectorAll('.math')];"
        "return [all.length, all.filter(m => m.querySelector('mjx-container')).length,"
        " [...document.querySelectorAll('mjx-merror')].map(m => m.textContent)]"
    )
    assert drawn == math and not wrong
    text = browser.execute_script("return document.querySelector('article, main, body').innerText")
    assert len(text) > 100 or page in ("search.html", "genindex.html")
    assert not re.search(r"\$\$|\\begin\{|\{math\}|\{doc\}|:ref:", re.sub(r"`[^`]*`", "", visible_prose(browser)))
    picture(browser, page, "light")


def visible_prose(browser) -> str:
    """The page's words, code left out: raw LaTeX among them means that math was not understood."""
    return browser.execute_script(
        "const copy = (document.querySelector('article') || document.body).cloneNode(true);"
        "copy.querySelectorAll('pre, code, .highlight, mjx-container, .output').forEach(e => e.remove());"
        "return copy.textContent"
    )


@every_page
def test_a_page_fits_a_phone_and_can_be_read_in_the_dark(page, browser, address):
    open_page(browser, address + page, PHONE, "dark")
    wide = browser.execute_script(
        "return [document.documentElement.scrollWidth, window.innerWidth,"
        " [...document.querySelectorAll('article *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1"
        "   && !e.closest('pre, table, .table-wrapper, mjx-container, .output, .highlight, .math'))"
        "   .slice(0, 5).map(e => e.outerHTML.slice(0, 120))]"
    )
    assert wide[0] <= wide[1] and not wide[2], wide
    assert contrast(browser) >= 4.5  # WCAG 2.2, level AA
    dark = background(browser)
    picture(browser, page, "phone")
    open_page(browser, address + page)
    assert contrast(browser) >= 4.5
    assert sum(background(browser)) > sum(dark) + 300


def colours(browser, name):
    found = browser.execute_script(
        "const seen = e => getComputedStyle(e)[arguments[0]];"
        "let e = document.querySelector('article p, article, main, body');"
        "while (seen(e) == 'rgba(0, 0, 0, 0)' && e.parentElement) e = e.parentElement;"
        "return seen(e)",
        name,
    )
    return [float(n) for n in re.findall(r"[\d.]+", found)[:3]]


def background(browser):
    return colours(browser, "backgroundColor")


def contrast(browser):
    """The ratio of luminances of text and ground, by WCAG."""

    def luminance(rgb):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in rgb)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dim = sorted((luminance(colours(browser, "color")), luminance(background(browser))), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


class Links(HTMLParser):
    """The addresses that a page leads to, and the places in it that can be led to."""

    def __init__(self, path):
        super().__init__()
        self.links, self.places = set(), set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.places |= {found[key] for key in ("id", "name") if found.get(key)}
        self.links |= {found[key] for key in ("href", "src") if found.get(key)}


def test_every_link_within_the_site_leads_somewhere():
    pages = {page: Links(HTML / page) for page in PAGES}
    dead = []
    for page, found in pages.items():
        for link in found.links:
            if re.match(r"[a-z]+:", link) or link.startswith("//"):
                continue
            parts = urlsplit(urljoin(page, link))  # without its ?v=…, which is for caches
            target, place = unquote(parts.path) or page, unquote(parts.fragment)
            known = pages[target].places if target in pages else {place}
            if not (HTML / target).is_file() or (place and place not in known):
                dead.append((page, link))
    assert not dead


def test_links_that_leave_the_site_are_to_known_places():
    hosts = {
        re.match(r"(?:[a-z]+:)?//([^/]+)", link)[1]
        for page in PAGES
        for link in Links(HTML / page).links
        if re.match(r"([a-z]+:)?//", link)
    }
    assert hosts <= {"github.com", "arxiv.org", "colab.research.google.com", "jupyter.org", "doi.org", "pradyunsg.me",
                     "cupy.dev"}, hosts  # fmt: skip


def test_a_search_finds_the_page(browser, address):
    open_page(browser, address + "search.html?q=telescopes")
    deadline = time.monotonic() + 20
    found = []
    while not found and time.monotonic() < deadline:
        found = browser.execute_script("return [...document.querySelectorAll('#search-results li a')].map(a => a.href)")
        time.sleep(0.1)
    assert any("delta_lora" in link for link in found), found
