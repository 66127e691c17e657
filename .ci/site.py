"""Build the site into _docs without Quarto: nbdev makes the pages, smalldocs renders them from the real _quarto.yml.

Quarto's own options are not checked here. Maths becomes MathML, so that pages need no network."""
import html
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml
from latex2mathml.converter import convert
from nbdev.config import get_config
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs
from smalldocs.site import build

root = get_config(path=Path(__file__).parent).config_path
proc, docs = root/'_proc', root/'_docs'


def without_numbers(text, names):
    "Links to 03_forecast.ipynb become links to forecast.ipynb, the name that nbdev gives the page"
    for old, new in names.items(): text = text.replace(old, new)
    return text


def make_pages():
    "Process the notebooks as nbdev does for Quarto, under the names that their pages have"
    refresh_quarto_yml()
    proc_nbs(n_workers=0, force=True)
    names = {p.name: re.sub(r'^\d+\w?_', '', p.name) for p in proc.glob('*.ipynb')}
    for old, new in names.items():
        page = re.sub(r'output-file: [\w.]+\\n', '', (proc/old).read_text(encoding='utf-8'))    # for Quarto alone: here the file has that name
        (proc/new).write_text(without_numbers(page, names), encoding='utf-8')
        if new != old: (proc/old).unlink()
    shutil.copytree(root/'nbs/results', proc/'results', dirs_exist_ok=True)
    shutil.copy(root/'nbs/styles.css', proc)
    config = yaml.safe_load(without_numbers((root/'_quarto.yml').read_text(encoding='utf-8'), names))
    ours = yaml.safe_load((root/'nbs/nbdev.yml').read_text(encoding='utf-8'))
    config['website'] = ours['website'] | config['website']
    for quarto_only in (config.pop('execute'), config['format']['html'].pop('html-math-method')): assert quarto_only     # nothing runs, maths is done below
    (proc/'_quarto.yml').write_text(yaml.safe_dump(config, sort_keys=False), encoding='utf-8')
    return len(names)


def to_mathml(page):
    "The page with its formulas as MathML and without the script that would fetch a renderer"
    def formula(match):
        tex = html.unescape(match[3])
        return convert(tex, display='block' if match[2] == '[' else 'inline')
    page = re.sub(r'<span class="math (inline|display)">\\([(\[])(.*?)\\[)\]]</span>', formula, page, flags=re.S)
    return re.sub(r'<link[^>]*katex[^>]*>|<script[^>]*katex[^>]*>.*?</script>', '', page, flags=re.S)


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
            elif url.fragment and to in pages and unquote(url.fragment) not in pages[to].ids: found.append(f'{page.name} -> {target} (no such place)')
    found += [f'{sheet.name} imports {u}' for sheet in docs.rglob('*.css') for u in re.findall(r'@import[^;]*https?:[^;]*', sheet.read_text(encoding='utf-8'))]
    return sorted(set(found))


if __name__ == '__main__':
    n = make_pages()
    site = build(proc, quiet=True)
    shutil.rmtree(docs, ignore_errors=True)
    shutil.move(site.out, docs)
    for sheet in docs.rglob('*.css'): sheet.write_text(re.sub(r'@import\s*(url\()?["\']?https?:[^;]*;', '', sheet.read_text(encoding='utf-8')), encoding='utf-8')  # web fonts
    for page in docs.rglob('*.html'): page.write_text(to_mathml(page.read_text(encoding='utf-8')), encoding='utf-8')
    problems = [str(w) for w in site.warnings] + broken_links()
    print(f'{n} pages in {docs.name}/, {len(problems)} problems')
    if problems: sys.exit('\n'.join(problems))
