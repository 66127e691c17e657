"The built site as a reader meets it: every page opened in a headless Chromium, offline, in light and dark, on a desk and on a phone"
import functools
import re
import shutil
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
from playwright.sync_api import sync_playwright

root = Path(__file__).parents[1]
CHROMIUM = next((found for name in ('chromium', 'chromium-browser', 'google-chrome', 'chrome') if (found := shutil.which(name))), None)
PAGES = {re.sub(r'^\d+\w?_', '', p.stem) + '.html': p.name for p in sorted((root/'nbs').glob('*.ipynb'))}


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


@pytest.fixture(scope='module')
def site():
    "Build the site and serve it; its address"
    done = subprocess.run([sys.executable, root/'.ci/site.py'], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr[-3000:]
    server = ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=root/'_docs'))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/'
    server.shutdown()


@pytest.fixture(scope='module')
def browser(site):
    with sync_playwright() as p:
        path = CHROMIUM or (p.chromium.executable_path if Path(p.chromium.executable_path).exists() else None)
        if not path: pytest.skip('no Chromium on this machine: install one (apt-get install chromium, or playwright install chromium)')
        browser = p.chromium.launch(executable_path=path, args=['--no-sandbox'])
        yield browser
        browser.close()


def test_every_notebook_is_a_page_of_the_sidebar(site):
    listed = re.findall(r'[\w/]+\.ipynb', (root/'_quarto.yml').read_text(encoding='utf-8'))
    assert sorted(listed) == sorted(p.name for p in (root/'nbs').glob('*.ipynb'))
    assert sorted(p.name for p in (root/'_docs').glob('*.html')) == sorted(PAGES)


def opened(browser, site, page, **settings):
    "(tab, everything that goes wrong in it) of a page that can reach no network but the site's own"
    context, wrong = browser.new_context(**settings), []
    context.set_default_timeout(10_000)
    context.route(lambda url: not url.startswith((site, 'data:', 'blob:')), lambda route: (wrong.append(f'fetches {route.request.url}'), route.abort()))
    tab = context.new_page()
    tab.on('console', lambda m: wrong.append(f'console: {m.text}') if m.type in ('error', 'warning') else None)
    tab.on('pageerror', lambda e: wrong.append(f'exception: {e}'))
    tab.on('response', lambda r: wrong.append(f'{r.status}: {r.url}') if r.status >= 400 else None)
    tab.goto(urljoin(site, page))
    return tab, wrong


def dead(site, href):
    "Whether a link leads to nothing on this site"
    url = urlsplit(href)
    target = root/'_docs'/unquote(url.path).lstrip('/')
    target = target/'index.html' if target.is_dir() else target
    return not target.exists() or bool(url.fragment) and f'id="{unquote(url.fragment)}"' not in target.read_text(encoding='utf-8')


@pytest.mark.parametrize('name', PAGES)
def test_page_opens_without_an_error_and_leads_somewhere(site, browser, name):
    tab, wrong = opened(browser, site, name)
    wrong += [f'missing image: {src[:80]}' for src in tab.evaluate('[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src)')]
    wrong += [f'not rendered: {text}' for text in tab.evaluate(r"""[...document.querySelectorAll('main p, main li, main td, merror')].filter(e =>
        e.tagName == 'MERROR' || /\$[^$]+\$|\\\(|\\\[|\[@\w|\]\(/.test([...e.childNodes].filter(n => n.nodeType == 3).map(n => n.textContent).join(''))).map(e => e.textContent.slice(0, 80))""")]
    links = {href for href in tab.evaluate('[...document.links].map(a => a.href)') if href.startswith(site)}
    wrong += [f'dead link: {href}' for href in sorted(links) if dead(site, href)]
    assert len(links) >= len(PAGES)                              # the sidebar at least
    actions = tab.evaluate('Object.fromEntries([...document.querySelectorAll("a.toc-action")].map(a => [a.textContent.trim(), a.href]))')
    path = urlsplit(actions['View source']).path
    assert path == f'/spectrum-nb/spectrum_nb/blob/main/nbs/{PAGES[name]}' and actions['Run in Colab'] == f'https://colab.research.google.com/github{path}'
    tab.set_viewport_size(dict(width=390, height=844))           # a phone
    if (width := tab.evaluate('document.documentElement.scrollWidth')) > 390: wrong.append(f'{width} pixels wide on a phone of 390')
    tab.context.close()
    assert not wrong, '\n'.join(wrong)


# contrast of every run of text with what is behind it (WCAG 2); the page's background; the font
LOOK = """() => {
    const numbers = c => c.match(/[\\d.]+/g).map(Number)
    const light = c => numbers(c).slice(0, 3).map(x => x/255).map(x => x <= .03928 ? x/12.92 : ((x + .055)/1.055)**2.4).reduce((s, x, i) => s + x*[.2126, .7152, .0722][i], 0)
    const behind = e => { for (; e; e = e.parentElement) { const b = getComputedStyle(e).backgroundColor; if ((numbers(b)[3] ?? 1) > .9) return b } return 'rgb(255, 255, 255)' }
    const ratio = e => { const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x); return (a + .05)/(b + .05) }
    const texts = selector => [...document.querySelectorAll(selector)].filter(e => e.checkVisibility() && [...e.childNodes].some(n => n.nodeType == 3 && n.textContent.trim()))
        .map(e => [ratio(e), e.tagName + ': ' + e.textContent.trim().slice(0, 40)]).sort((a, b) => a[0] - b[0])
    return {prose: texts('main p, main td, main li, main h1, main h2, main h3, main mi, main mn, main a, .sidebar a')[0], code: texts('main pre *')[0],
            dark: light(behind(document.body)) < .2, font: getComputedStyle(document.body).fontFamily}
}"""


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_text_can_be_read_in_light_and_dark(site, browser, scheme):
    tab, wrong = opened(browser, site, 'error_bounds.html', color_scheme=scheme)
    look = tab.evaluate(LOOK)
    tab.context.close()
    assert not wrong and look['dark'] == (scheme == 'dark') and 'sans-serif' in look['font'], look
    assert look['prose'][0] >= 4.5 and look['code'][0] >= 3, look


def test_search_finds_a_page_by_what_it_says(site, browser):
    tab, wrong = opened(browser, site, 'index.html')
    box = tab.locator('#quarto-search input, .aa-Input, input[type=search]').first
    if not box.is_visible(): tab.locator('#quarto-search button, .aa-DetachedSearchButton').first.click()
    box.press_sequentially('Bernstein ellipse')
    tab.locator('a[href*="chebyshev.html#"]:visible').first.wait_for()       # a place on the page, not the sidebar's link to it
    assert not wrong
