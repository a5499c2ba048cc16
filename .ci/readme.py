"""Write README.md from nbs/index.ipynb: `python .ci/readme.py`, or with --check see that it is up to date.

nbdev_readme does this with Quarto. Here nbdev processes the notebook (hidden cells go, names become links to the docs)
and the Markdown is written without Quarto, so that everybody gets the same bytes.
A picture among the outputs goes to nbs/images/index-N.png; a path in the text is made to start at the top of the repository."""
import base64, posixpath, re, sys
from os import chdir
from pathlib import Path

import yaml
from execnb.nbio import read_nb
from nbdev.config import get_config
from nbdev.processors import FilterDefaults
from smalldocs.notebook import cell_options, fence_for

root = Path(__file__).resolve().parent.parent
_link = re.compile(r'(\]\(|\b(?:src|href)=")([^()\s"]+)')
_code = re.compile(r'(^```.*?^```)', re.M | re.S)


def joined(x): return x if isinstance(x, str) else ''.join(x)


def from_top(text, nbs):
    "Links that are relative to the notebook, made relative to the top of the repository; code is left alone."
    def fix(m):
        href = m[2]
        return m[0] if re.match(r'[a-z]+:|[#/]', href) else m[1] + posixpath.normpath(posixpath.join(nbs, href))
    parts = _code.split(text)
    parts[::2] = [_link.sub(fix, o) for o in parts[::2]]
    return ''.join(parts)


class Readme:
    "The Markdown of one notebook and the pictures it needs."
    def __init__(self, nb, nbs): self.nb, self.nbs, self.pictures = nb, nbs, {}

    def picture(self, data):
        "Keep a picture of the outputs and show it."
        path = f'{self.nbs}/images/index-{len(self.pictures) + 1}.png'
        self.pictures[path] = base64.b64decode(joined(data))
        return f'![]({path})'

    def output(self, out):
        "One stored output."
        if out['output_type'] == 'error': raise SystemExit(f"index holds an error: {out['ename']}: {out['evalue']}")
        data = out.get('data', {'text/plain': out.get('text', '')})
        if 'image/png' in data: return self.picture(data['image/png'])
        for kind in 'text/markdown', 'text/html':
            if kind in data: return joined(data[kind]).strip()
        text = joined(data.get('text/plain', '')).rstrip('\n')
        return f"{(f := fence_for(text))}\n{text}\n{f}" if text else ''

    def cell(self, cell):
        "One cell: its text, or its code and its outputs."
        source = joined(cell.source)
        if cell.cell_type == 'raw': return self.front(source)
        if cell.cell_type == 'markdown': return from_top(source.strip(), self.nbs)
        opts, code = cell_options(source)
        if opts.get('include') is False: return ''
        shown = [] if opts.get('echo') is False or not code.strip() else [f"{(f := fence_for(code))}python\n{code.strip()}\n{f}"]
        if opts.get('output') is not False: shown += [self.output(o) for o in cell.get('outputs', [])]
        return '\n\n'.join(o for o in shown if o)

    def front(self, source):
        "The title and the line under it."
        meta = next(yaml.safe_load_all(source.strip().strip('-')), None) or {}
        return '\n\n'.join([f"# {meta['title']}"] + ([f"> {meta['description']}"] if meta.get('description') else []))

    def __call__(self):
        "The whole text."
        return '\n\n'.join(o for o in map(self.cell, self.nb.cells) if o) + '\n'


def render():
    "README.md and its pictures: {path: bytes}."
    cfg = get_config()
    nb = read_nb(cfg.nbs_path/cfg.readme_nb)
    FilterDefaults()(nb)
    page = Readme(nb, cfg.nbs_path.name)
    text = page()
    return {'README.md': text.encode(), **page.pictures}


def main(check=False):
    chdir(root)
    files = render()
    stale = [o for o in sorted(root.glob('nbs/images/index-*.png')) if o.relative_to(root).as_posix() not in files]
    old = [name for name, data in files.items() if not (root/name).exists() or (root/name).read_bytes() != data]
    if check:
        for o in [*old, *stale]: print(f"{o} does not match nbs/index.ipynb; run: python .ci/readme.py")
        return 1 if old or stale else 0
    for o in stale: o.unlink()
    for name in old:
        (root/name).parent.mkdir(parents=True, exist_ok=True)
        (root/name).write_bytes(files[name])
    return 0


if __name__ == '__main__': sys.exit(main('--check' in sys.argv[1:]))
