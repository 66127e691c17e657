"""Build the site into _docs: nbdev makes the pages (pages.py), Quarto or smalldocs renders them from _quarto.yml

`python .ci/site.py --quarto` is the published site. Without `--quarto` smalldocs takes Quarto's place, as in the tests:
Quarto's own options are not checked then. Maths becomes MathML, so that pages need no network; citations, which
smalldocs does not know, are resolved from references.bib by pybtex.
Both ways, fonts from elsewhere are left out, links to this site become relative, and links that lead nowhere fail."""
import html
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbdev.serve
import yaml
from latex2mathml.converter import convert
from nbdev.config import get_config
from nbdev.quarto import refresh_quarto_yml
from pybtex.database import parse_file
from pybtex.plugin import find_plugin
from smalldocs.site import build

from pages import Pages

config = get_config(path=Path(__file__).parent)
root = config.config_path
proc, docs = root/'_proc', root/'_docs'
HOME = f'{config.doc_host}{config.doc_baseurl}/'        # where the site is published: nbdev writes its links with it
# the address itself may hold semicolons
WEB_FONT = re.compile(r'''@import\s+(url\(\s*["']?https?:[^)]*\)|"https?:[^"]*"|'https?:[^']*')[^;]*;''')


def without_numbers(text, names):
    "Links to 04_forecast.ipynb become links to forecast.ipynb, the name that nbdev gives the page"
    return re.sub(r'(\]\()([\w.]+\.ipynb)', lambda link: link[1] + names.get(link[2], link[2]), text)


def cited(cells, bibliography):
    """Put links for citations, [@key] or [@key, place], and a list of the works that were cited under the page"""
    def author_year(key):
        entry = bibliography.entries[key]                       # a KeyError names a work that is not in the file
        names = [' '.join(p.prelast_names + p.last_names) or str(p) for p in entry.persons['author']]
        who = ' and '.join(names) if len(names) < 3 else f'{names[0]} et al.'
        return re.sub('[{}]', '', f'{who} {entry.fields["year"]}')

    def link(match):
        key, place = match[1], match[2] or ''
        keys.append(key)
        return f'([{author_year(key)}](#ref-{key}){place})'

    keys = []
    for cell in cells:
        if cell['cell_type'] == 'markdown':
            cell['source'] = re.sub(r'\[@([\w-]+)(,[^\]]*)?\]', link, ''.join(cell['source']))
    if not keys: return cells
    style, backend = find_plugin('pybtex.style.formatting', 'plain')(), find_plugin('pybtex.backends', 'html')()
    works = ''.join(f'<p id="ref-{e.key}">{e.text.render(backend)}</p>\n'
                    for e in style.format_bibliography(bibliography, list(dict.fromkeys(keys))))
    return [*cells, dict(cell_type='markdown', id='references', metadata={}, source=f'## References\n\n{works}')]


def process_notebooks():
    "Make the pages' notebooks in _proc, in this process, where `pages` is at hand"
    refresh_quarto_yml()
    nbdev.serve.FilterDefaults = Pages
    nbdev.serve.proc_nbs(n_workers=0, force=True)


def name_pages():
    "Prepare what is in _proc for smalldocs, under the names that the pages have; {name here: name in nbs/}"
    names = {p.name: re.sub(r'^\d+\w?_', '', p.name) for p in proc.glob('*.ipynb')}
    settings = (root/'_quarto.yml').read_text(encoding='utf-8')
    config = yaml.safe_load(re.sub(r'\w+\.ipynb', lambda m: names.get(m[0], m[0]), settings))
    bibliography = parse_file(proc/config.pop('bibliography'))
    for old, new in names.items():
        # for Quarto alone: here the file has that name
        page = re.sub(r'output-file: [\w.]+\\n', '', (proc/old).read_text(encoding='utf-8'))
        page = json.loads(without_numbers(page, names))
        page['cells'] = cited(page['cells'], bibliography)
        (proc/old).unlink()
        (proc/new).write_text(json.dumps(page), encoding='utf-8')
    ours = yaml.safe_load((root/'nbs/nbdev.yml').read_text(encoding='utf-8'))
    config['website'] = ours['website'] | config['website']
    # for Quarto alone: nothing runs here, citations and maths are done by this file
    quarto_only = config.pop('execute'), config.pop('link-citations'), config['format']['html'].pop('html-math-method')
    assert all(quarto_only)
    (proc/'_quarto.yml').write_text(yaml.safe_dump(config, sort_keys=False), encoding='utf-8')
    return {new: old for old, new in names.items()}


def to_mathml(page):
    "The page with its formulas as MathML and without the script that would fetch a renderer"
    def formula(match):
        tex = html.unescape(match[3])
        return convert(tex, display='block' if match[2] == '[' else 'inline')
    page = re.sub(r'<span class="math (inline|display)">\\([(\[])(.*?)\\[)\]]</span>', formula, page, flags=re.S)
    return re.sub(r'<link[^>]*katex[^>]*>|<script[^>]*katex[^>]*>.*?</script>', '', page, flags=re.S)


def to_source(page, names):
    "The page with its `View source` link leading to the notebook under its name in the repository"
    return re.sub(r'(/blob/main/nbs/)([\w.]+ipynb)', lambda m: m[1] + names[m[2]], page)


class Links(HTMLParser):
    "The ids of a page, where its links lead, and what it loads"
    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.loads = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if attrs.get('id'): self.ids.add(attrs['id'])
        if tag == 'a' and attrs.get('href'): self.links.append(attrs['href'])
        if tag in ('img', 'script', 'source', 'video') and attrs.get('src'): self.loads.append(attrs['src'])
        if tag == 'link' and 'stylesheet' in attrs.get('rel', ''): self.loads.append(attrs['href'])


def relative(page, path):
    "The page with its absolute links to this site as relative ones, so that they hold wherever it is served"
    up = os.path.relpath(docs, path.parent)
    return re.sub(rf'(href|src)="{re.escape(HOME)}([^"]*)"', rf'\1="{up}/\2"', page)


def broken_links():
    "Every link of the built site that leads nowhere, and everything that a page would have to fetch from elsewhere"
    found, pages = [], {p: Links(p.read_text(encoding='utf-8')) for p in docs.rglob('*.html')}
    for page, seen in pages.items():
        found += [f'{page.name} fetches {t}' for t in seen.loads if urlsplit(t).scheme in ('http', 'https')]
        for target in seen.links + seen.loads:
            url = urlsplit(target)
            if url.scheme or url.netloc: continue
            to = (page.parent/unquote(url.path)).resolve() if url.path else page
            if to.is_dir(): to = to/'index.html'
            if not to.exists(): found.append(f'{page.name} -> {target}')
            elif url.fragment and to in pages and unquote(url.fragment) not in pages[to].ids:
                found.append(f'{page.name} -> {target} (no such place)')
    for sheet in docs.rglob('*.css'):
        fetched = re.findall(r'@import[^;]*https?:[^;]*', sheet.read_text(encoding='utf-8'))
        found += [f'{sheet.name} imports {address}' for address in fetched]
    return sorted(set(found))


def with_smalldocs():
    "Render _proc without Quarto; what smalldocs warns of"
    names = name_pages()
    site = build(proc, quiet=True)
    shutil.rmtree(docs, ignore_errors=True)
    shutil.move(site.out, docs)
    for page in docs.rglob('*.html'):
        page.write_text(to_source(to_mathml(page.read_text(encoding='utf-8')), names), encoding='utf-8')
    return [str(w) for w in site.warnings]


def with_quarto():
    "Render _proc as `nbdev_docs` does; Quarto fails by itself where something is wrong"
    subprocess.run(['quarto', 'render', '--no-cache'], cwd=proc, check=True)
    shutil.rmtree(docs, ignore_errors=True)
    shutil.move(proc/docs.name, docs)
    return []


if __name__ == '__main__':
    process_notebooks()
    problems = with_quarto() if '--quarto' in sys.argv else with_smalldocs()
    for sheet in docs.rglob('*.css'):
        sheet.write_text(WEB_FONT.sub('', sheet.read_text(encoding='utf-8')), encoding='utf-8')
    pages = list(docs.rglob('*.html'))
    for page in pages: page.write_text(relative(page.read_text(encoding='utf-8'), page), encoding='utf-8')
    problems += broken_links()
    print(f'{len(pages)} pages in {docs.name}/, {len(problems)} problems')
    if problems: sys.exit('\n'.join(problems))
