"The built site in a headless Chromium, as a reader meets it: offline, in light and dark, on a desk and on a phone"
import ast
import functools
import html
import inspect
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
from execnb.nbio import read_nb
from playwright.sync_api import sync_playwright

from spectrum_nb.settings import SpectrumConfig

pytestmark = pytest.mark.slow
root = Path(__file__).parents[1]
BROWSERS = 'chromium', 'chromium-browser', 'google-chrome', 'chrome'
CHROMIUM = next((found for name in BROWSERS if (found := shutil.which(name))), None)
PAGES = {re.sub(r'^\d+\w?_', '', p.stem) + '.html': p.name for p in sorted((root/'nbs').iterdir())
         if p.suffix in ('.ipynb', '.md')}
NOTEBOOKS = {page: name for page, name in PAGES.items() if name.endswith('.ipynb')}


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
        if not path and os.environ.get('CI'): pytest.fail('no Chromium in continuous integration')
        if not path: pytest.skip('no Chromium on this machine: install one (apt-get install chromium, or playwright '
                                 'install chromium)')
        browser = p.chromium.launch(executable_path=path, args=['--no-sandbox'])
        yield browser
        browser.close()


def test_every_notebook_is_a_page_of_the_sidebar(site):
    sidebar = (root/'_quarto.yml').read_text(encoding='utf-8').split('sidebar:')[1]
    listed = re.findall(r'[\w/]+\.(?:ipynb|md)', sidebar)
    assert sorted(listed) == sorted(PAGES.values())
    assert sorted(p.name for p in (root/'_docs').glob('*.html')) == sorted(PAGES)


def opened(browser, site, page, **settings):
    "(tab, everything that goes wrong in it) of a page that can reach no network but the site's own"
    context, wrong = browser.new_context(**settings), []
    context.set_default_timeout(10_000)

    def is_elsewhere(url): return not url.startswith((site, 'data:', 'blob:'))

    def refuse(route):
        wrong.append(f'fetches {route.request.url}')
        route.abort()

    context.route(is_elsewhere, refuse)
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
    if not target.exists(): return True
    if not url.fragment: return False
    return f'id="{unquote(url.fragment)}"' not in target.read_text(encoding='utf-8')


# what is asked of a page in the browser: see the comments at the heads of these files
LOOK = Path(__file__).with_name('look.js').read_text(encoding='utf-8')
NOT_RENDERED = Path(__file__).with_name('not_rendered.js').read_text(encoding='utf-8')


def expected(path):
    "What the page of a notebook must show: its pictures, its displayed formulas, and a share of its words"
    if path.endswith('.md'):
        text = (root/'nbs'/path).read_text(encoding='utf-8')
        return text.count('!['), text.count('$$')//2, len(text)
    nb = read_nb(root/'nbs'/path)
    said = [''.join(c.source) for c in nb.cells if c.cell_type == 'markdown']
    outputs = [o.get('data', {}) for c in nb.cells if c.cell_type == 'code' for o in c.outputs]
    texts = said + [''.join(data.get('text/markdown', '')) for data in outputs]
    pictures = sum('image/png' in data for data in outputs) + sum(text.count('![') for text in texts)
    return pictures, sum(s.count('$$')//2 for s in said), sum(map(len, said))


BROKEN_PICTURES = '[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src)'
SILENT_PICTURES = '[...document.images].filter(i => i.alt.trim().length < 8).map(i => i.src)'
COUNT = """[document.querySelectorAll('main img').length,
            document.querySelectorAll('main math[display=block] *').length
            && document.querySelectorAll('main math[display=block]').length]"""
LINKS = '[...document.links].map(a => a.href)'
ACTIONS = 'Object.fromEntries([...document.querySelectorAll("a.toc-action")].map(a => [a.textContent.trim(), a.href]))'
WIDTH = 'document.documentElement.scrollWidth'
OUR_FILES = r'https://github.com/spectrum-nb/spectrum_nb/blob/main/([^#]+)'


def wrong_in_content(tab, name):
    "What of a notebook its page does not show, or shows as it should not"
    pictures, formulas, words = expected(PAGES[name])
    wrong = [f'missing image: {src[:80]}' for src in tab.evaluate(BROKEN_PICTURES)]
    wrong += [f'a picture without words: {src[:80]}' for src in tab.evaluate(SILENT_PICTURES)]
    wrong += [f'not rendered: {text}' for text in tab.evaluate(NOT_RENDERED)]
    shown, drawn = tab.evaluate(COUNT)
    if (shown, drawn) != (pictures, formulas):
        wrong.append(f'{shown} pictures and {drawn} displayed formulas, the notebook has {pictures} and {formulas}')
    if 'Traceback (most recent call last)' in tab.inner_text('main'): wrong.append('shows a traceback')
    seen = tab.evaluate(LOOK)['characters']
    if seen < .5*words: wrong.append(f'only {seen} characters of text can be seen, the notebook has {words}')
    return wrong


def wrong_links(tab, site):
    "Links that lead nowhere, on the site or in the repository"
    links = set(tab.evaluate(LINKS))
    here = {href for href in links if href.startswith(site)}
    assert len(here) >= len(PAGES)                              # the sidebar at least
    ours = {m[1] for href in links if (m := re.match(OUR_FILES, href))}
    wrong = [f'dead link: {href}' for href in sorted(here) if dead(site, href)]
    return wrong + [f'no such file: {path}' for path in ours if not (root/path).exists()]


def wrong_in_layout(tab):
    "What does not fit the page, on a desk and on a phone"
    outside = tab.evaluate(LOOK)['outside']
    tab.set_viewport_size(dict(width=390, height=844))           # a phone
    width = tab.evaluate(WIDTH)
    wrong = [f'{width} pixels wide on a phone of 390'] if width > 390 else []
    return wrong + [f'sticks out: {e}' for e in [*outside, *tab.evaluate(LOOK)['outside']]]


@pytest.mark.parametrize('name', PAGES)
def test_page_shows_its_notebook_without_an_error_and_leads_somewhere(site, browser, name):
    tab, wrong = opened(browser, site, name)
    actions = tab.evaluate(ACTIONS)
    wrong += wrong_in_content(tab, name) + wrong_links(tab, site) + wrong_in_layout(tab)
    tab.context.close()

    path = urlsplit(actions['View source']).path
    assert path == f'/spectrum-nb/spectrum_nb/blob/main/nbs/{PAGES[name]}'
    if name in NOTEBOOKS: assert actions['Run in Colab'] == f'https://colab.research.google.com/github{path}'
    assert not wrong, '\n'.join(wrong)


@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('name', PAGES)
def test_text_can_be_read_in_light_and_dark(site, browser, name, scheme):
    tab, wrong = opened(browser, site, name, color_scheme=scheme)
    look = tab.evaluate(LOOK)
    tab.context.close()
    assert not wrong
    assert look['dark'] == (scheme == 'dark')
    assert 'sans-serif' in look['font']
    assert not look['small'], look
    assert look['prose'][0] >= 4.5, look
    assert look['code'][0] >= 3, look


def definitions_of(notebook):
    "The public functions and classes of a notebook's exported cells, in their order, but for those it documents itself"
    cells = [''.join(c.source) for c in read_nb(root/'nbs'/notebook).cells if c.cell_type == 'code']
    trees = [ast.parse(source) for source in cells if re.match(r'#\| *exports?\b', source) and '#| hide' not in source]
    named = {node.name: None for tree in trees for node in tree.body
             if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith('_')
             and not any('patch' in ast.unparse(d) for d in node.decorator_list)}
    elsewhere = {m for source in cells for m in re.findall(r'^show_doc\((\w+)', source, re.M)}
    return [name for name in named if name not in elsewhere]


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_definitions_stand_in_the_order_of_their_source(site, name):
    page = (root/'_docs'/name).read_text(encoding='utf-8')
    headings = re.findall(r'<h3[^>]*>(?:<[^>]*>)*(\w+)(?:<[^>]*>)*</h3>', page)
    defined = definitions_of(NOTEBOOKS[name])
    assert [heading for heading in headings if heading in defined] == defined


def test_the_settings_are_explained_where_they_are_documented(site):
    page = html.unescape(re.sub('<[^>]*>', '', (root/'_docs/settings.html').read_text(encoding='utf-8')))
    entry = page.split('class SpectrumConfig(')[1].split('\n)')[0]
    settings = list(inspect.signature(SpectrumConfig).parameters)
    lines = {setting: line for setting in settings for line in entry.splitlines()
             if re.match(rf'\s*{setting}[:=]', line)}
    assert list(lines) == settings and all('# ' in line for line in lines.values()), entry


def test_sources_are_folded_and_follow_what_they_define(site, browser):
    tab, wrong = opened(browser, site, 'settings.html')
    assert tab.evaluate('document.querySelectorAll("details.code-fold[open]").length') == 0
    folded, heading = tab.evaluate("""() => {
        const top = e => e.getBoundingClientRect().top
        const sources = [...document.querySelectorAll('details')]
        return [sources.filter(d => d.textContent.includes('class SpectrumConfig:')).map(top),
                top(document.getElementById('spectrumconfig'))]
    }""")
    assert len(folded) == 1 and folded[0] > heading and not wrong
    tab.context.close()


def test_on_a_phone_small_pictures_stay_small_and_printed_tables_keep_their_columns(site, browser):
    tab, wrong = opened(browser, site, 'index.html', viewport=dict(width=390, height=844))
    pictures = '[...document.querySelectorAll(".cell-output-display img")]'
    widths = tab.evaluate(pictures + '.map(i => [i.naturalWidth, i.getBoundingClientRect().width])')
    assert widths and all(shown <= natural for natural, shown in widths), widths
    outputs = '[...document.querySelectorAll(".cell-output > pre code")]'
    printed = tab.evaluate(outputs + '.map(e => getComputedStyle(e).whiteSpace)')
    assert printed and set(printed) == {'pre'} and not wrong
    assert tab.evaluate('document.querySelectorAll("#quarto-search").length') == 1
    tab.context.close()


def test_the_first_page_says_how_to_install_and_what_to_import(site, browser):
    tab, wrong = opened(browser, site, 'index.html')
    said = tab.inner_text('main')
    tab.context.close()
    assert 'pip install git+https' in said and 'from spectrum_nb import apply_spectrum' in said
    assert 'test_eq' not in said and not wrong


def test_a_reader_can_change_from_light_to_dark(site, browser):
    tab, wrong = opened(browser, site, 'index.html', color_scheme='light')
    tab.locator('.quarto-color-scheme-toggle:visible').first.click()
    tab.wait_for_timeout(500)
    assert tab.evaluate(LOOK)['dark'] and not wrong
    tab.context.close()


def test_search_finds_a_page_by_what_it_says(site, browser):
    tab, wrong = opened(browser, site, 'index.html')
    box = tab.locator('#quarto-search input, .aa-Input, input[type=search]').first
    if not box.is_visible(): tab.locator('#quarto-search button, .aa-DetachedSearchButton').first.click()
    box.press_sequentially('Bernstein ellipse')
    # a place on the page, not the sidebar's link to it
    tab.locator('a[href*="chebyshev.html#"]:visible').first.wait_for()
    assert not wrong
