"""Build the docs site into _docs; exit with 1 if anything about it deserves a warning.

Where Quarto is installed, nbdev_docs does all of it. Elsewhere smalldocs builds the same site
from the notebooks as nbdev processes them, after a few steps that make up for what Quarto does and smalldocs does not."""
import html, json, re, shutil, subprocess, sys, warnings
from os import chdir
from pathlib import Path
from urllib.parse import unquote

import yaml
from latex2mathml.converter import convert
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs
from smalldocs.site import build

root = Path(__file__).resolve().parent.parent
_numbered = re.compile(r'^\d+[a-zA-Z0-9]*_')
_link = re.compile(r'(\]\()([^()\s]+)(\))')
_api = re.compile(r'\[(`[^`\]]+`)\]\([^()\s]+\)')
_fence = re.compile(r'(^```.*?^```)', re.M | re.S)


def plain_name(path): return path.with_name(_numbered.sub('', path.name))


def process(cfg):
    "nbdev's processed notebooks, and the warnings it had."
    refresh_quarto_yml()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always', UserWarning)
        cache = proc_nbs(force=True, n_workers=0)
    return cache, [str(w.message) for w in seen if Path(w.filename).parent.name == 'nbdev']


class Stage:
    "Rewrites the processed notebooks where smalldocs and Quarto differ."
    def __init__(self, cfg, cache):
        self.cache = cache
        self.site = f"{cfg.doc_host}{cfg.doc_baseurl}/"
        self.files = f"{cfg.git_url}/blob/{cfg.branch}/"
        self.shown = {plain_name(o.relative_to(cache)).with_suffix('.html').as_posix(): set(self.headings(o)) for o in cache.rglob('*.ipynb')}

    def headings(self, path):
        "The anchors of the names that a page documents."
        for cell in json.loads(path.read_text())['cells']:
            for out in cell.get('outputs', []):
                yield from (o.lower() for o in re.findall(r'^### (\S+)$', ''.join(out.get('data', {}).get('text/markdown', '')), re.M))

    def api(self, href):
        "A link to a name of the package: to the name, else to the class it belongs to, else to the page."
        page, _, name = href.partition('#')
        shown = [o for o in (name, name.rpartition('.')[0]) if o in self.shown.get(page, ())]
        return f'{page}#{shown[0]}' if shown else page

    def link(self, href, up):
        "A link: to the site itself relative, to a notebook by its page's name, out of nbs/ to the repository."
        if href.startswith(self.site): return up + self.api(href.removeprefix(self.site))
        if re.match(r'[a-z]+:|[#/]', href): return href
        path, mark, anchor = href.partition('#')
        if path.startswith(up + '../'): return self.files + path.removeprefix(up + '../') + mark + anchor
        return str(plain_name(Path(path))) + mark + anchor if path.endswith('.ipynb') else href

    def text(self, s, up):
        "Markdown with its links rewritten; code is left alone, but for links that nbdev put into it."
        parts = _fence.split(s)
        parts[1::2] = [_api.sub(r'\1', o) for o in parts[1::2]]
        parts[::2] = [re.sub(r'^(### \S*)__(\w+)__$', r'\1\_\_\2\_\_', o, flags=re.M) for o in parts[::2]]
        parts[::2] = [_link.sub(lambda m: m[1] + self.link(m[2], up) + m[3], o) for o in parts[::2]]
        return ''.join(parts)

    def output(self, out, up):
        data = out.get('data', {})
        if 'text/markdown' in data: data['text/markdown'] = self.text(''.join(data['text/markdown']), up)

    def notebook(self, path):
        "Rewrite one notebook and take the number off its name, as nbdev's `output-file` asks."
        nb, up = json.loads(path.read_text()), '../'*(len(path.relative_to(self.cache).parts) - 1)
        for cell in nb['cells']:
            source = ''.join(cell['source'])
            if cell['cell_type'] == 'markdown': cell['source'] = self.text(source, up)
            if cell['cell_type'] == 'raw': cell['source'] = re.sub(r'^output-file:.*\n', '', source, flags=re.M)
            for out in cell.get('outputs', []): self.output(out, up)
        path.unlink()
        plain_name(path).write_text(json.dumps(nb))

    def config(self):
        "The names in the sidebar, without their numbers."
        path = self.cache/'_quarto.yml'
        path.write_text(re.sub(r'(?<=[ /])\d+[a-zA-Z0-9]*_(?=\S+\.ipynb)', '', path.read_text()))

    def __call__(self):
        for o in sorted(self.cache.rglob('*.ipynb')): self.notebook(o)
        self.config()


def sidebar(items):
    "Every page that the sidebar names."
    for o in items:
        if isinstance(o, str): yield o
        else: yield from [o['href']] if 'href' in o else sidebar(o['contents'])


def check_sidebar(cfg):
    "The sidebar names every notebook, and nothing else."
    named = set(sidebar(yaml.safe_load((root/'_quarto.yml').read_text())['website']['sidebar']['contents']))
    there = {o.relative_to(cfg.nbs_path).as_posix() for o in nbglob(cfg.nbs_path, as_path=True)}
    return [f"_quarto.yml: {o} is not in the sidebar" for o in sorted(there - named)] + \
           [f"_quarto.yml: {o} is in the sidebar but not in nbs" for o in sorted(named - there)]


_math = re.compile(r'(<span class="math (?:inline|display)">)\\([(\[])(.*?)\\[)\]](?=</span>)', re.S)
_katex = re.compile(r'<(?:link|script)[^>]*/katex@[^>]*>(?:</script>)?')


def formulas(folder):
    "Set the formulas as MathML, so that a page needs no script from elsewhere; the ones that cannot be set are warned of."
    for page in folder.rglob('*.html'):
        bad = []
        def mathml(m):
            formula = convert(html.unescape(m[3]), display='block' if m[2] == '[' else 'inline')
            if '\\' in formula: bad.append(m[3])
            return m[1] + formula
        page.write_text(_katex.sub('', _math.sub(mathml, page.read_text())))
        yield from (f"{page.name}: formula that cannot be set: {o}" for o in bad)


def broken_anchors(folder):
    "Links to a heading that is not there; smalldocs looks at the pages alone."
    pages = {o.resolve(): o.read_text() for o in folder.rglob('*.html')}
    ids = {o: set(re.findall(r'\bid="([^"]+)"', text)) for o, text in pages.items()}
    for page, text in pages.items():
        for href, anchor in re.findall(r'\bhref="([^":#]*)#([^"]+)"', text):
            target = (page.parent/href).resolve() if href else page
            if target in ids and unquote(anchor) not in ids[target]: yield f"{page.name}: broken link {href}#{anchor}"


def main():
    chdir(root)
    cfg = get_config()
    notes = check_sidebar(cfg)
    if shutil.which('quarto'):
        code = subprocess.run(['nbdev_docs']).returncode
        subprocess.run([sys.executable, root/'.ci/readme.py'])  # nbdev_docs may have written a README of its own
    else:
        cache, seen = process(cfg)
        Stage(cfg, cache)()
        site = build(cache, quiet=True)
        notes, code = [*notes, *seen, *site.warnings, *formulas(site.out), *broken_anchors(site.out)], 0
        shutil.rmtree(cfg.doc_path, ignore_errors=True)
        shutil.move(site.out, cfg.doc_path)
        print(f"{len(site.pages)} pages in {cfg.doc_path.name}/")
    for o in dict.fromkeys(notes): print('warning:', o)
    return 1 if notes or code else 0


if __name__ == '__main__': sys.exit(main())
