"""Every page in a real browser: no error, no request that leaves it, mathematics and figures drawn."""

import time

import pytest
from browsing import HTML, errors, requests, set_size

pytestmark = pytest.mark.site
PAGES = sorted(str(path.relative_to(HTML)) for path in HTML.rglob("*.html") if "_static" not in path.parts)
LOOK = """
const formulas = [...document.querySelectorAll('.math')];
return {
  'undrawn': formulas.filter(m => !m.querySelector('mjx-container')).map(m => m.textContent),
  'wrong': [...document.querySelectorAll('mjx-merror')].map(m => m.textContent),
  'without picture': [...document.images].filter(i => !i.naturalWidth).map(i => i.src),
  'without alt text': [...document.images].filter(i => !i.alt || i.alt.endsWith('.png')).map(i => i.src),
}"""


def open_page(browser, url):
    browser.get("about:blank")
    requests(browser), errors(browser)  # what an earlier page left
    browser.get(url)
    browser.execute_script("""
        window.drawn = !window.MathJax;
        if (window.MathJax) MathJax.startup.promise.then(() => { window.drawn = true; });
        document.querySelectorAll('img').forEach(i => { i.loading = 'eager'; })""")
    deadline = time.monotonic() + 30
    ready = "return window.drawn && document.readyState == 'complete' && [...document.images].every(i => i.complete)"
    while not browser.execute_script(ready) and time.monotonic() < deadline:
        time.sleep(0.05)


def test_there_are_pages(html):
    assert {"index.html", "methods/dora.html", "notebooks/00_tour.html"} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_drawn_with_no_error_and_no_request_that_leaves_it(page, browser, address):
    set_size(browser, 1280, 900)
    open_page(browser, address + page)
    assert not [url for url in requests(browser) if not url.startswith((address, "data:", "blob:"))]
    assert not errors(browser)
    found = browser.execute_script(LOOK)
    assert not any(found.values()), found


@pytest.mark.parametrize("page", ["index.html", "methods.html", "methods/dora.html", "notebooks/00_tour.html"])
def test_a_page_fits_a_phone(page, browser, address):
    set_size(browser, 390, 844)
    open_page(browser, address + page)
    wide, window = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert wide <= window
