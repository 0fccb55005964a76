"""The paper beside the code, as one HTML file: on the left what the paper says, what it leaves open and where
we depart from it; on the right the functions as they stand, and below each the tests that prove it.

    python classroom/reader.py [runs/paper.html]

Made from PAPER.md, whose map names the functions and the tests, from classroom/paper.md and from the source.
"""
import argparse
import ast
import functools
import html
import re
import textwrap
from pathlib import Path

from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer
from pygments.token import STANDARD_TYPES

ROOT = Path(__file__).resolve().parents[1]
NAME = re.compile(r"\[`([\w.]+)`\]\(([\w/.]+\.py)\)")                   # [`SuperNet.sample`](supernet.py)
TITLE = "AdaSearch: the paper beside the code"


def section(text, title):
    """The text below a heading of a Markdown text, up to the next one of the same depth."""
    return f"\n{text}".partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def table(text):
    """The rows of a Markdown table, without its head: lists of cells."""
    return [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]


@functools.cache
def definitions(file):
    """{name: its source, with the comment above it} of all that a file defines; methods as `Class.method`."""
    text, found = (ROOT / file).read_text(encoding="utf-8"), {}
    lines, body = text.splitlines(), ast.parse(text).body
    inner = [(f"{node.name}.", x) for node in body if isinstance(node, ast.ClassDef) for x in node.body]
    for prefix, node in [*(("", node) for node in body), *inner]:
        first = min([node.lineno, *(x.lineno for x in getattr(node, "decorator_list", ()))]) - 1
        while first and lines[first - 1].lstrip().startswith("#"):
            first -= 1
        targets = (x for target in getattr(node, "targets", ()) for x in ast.walk(target))
        for name in [getattr(node, "name", ""), *(x.id for x in targets if isinstance(x, ast.Name))]:
            found[prefix + name] = "\n".join(line[node.col_offset:] for line in lines[first:node.end_lineno])
    return found


def anchor(name, file):
    return f"{file.removesuffix('.py').replace('/', '.')}.{name}"


def addresses(names):
    """{how it is called: its anchor}: ("", "grow"), ("grow", "grow"), and of a method (None, "sample")."""
    found = {}
    for name, file in names:
        module, method = Path(file).stem, name.partition(".")[2]
        for call in [(None, method)] if method else [("", name), (module, name)]:
            found[call] = anchor(name, file)
    return found


def highlighted(source, links):
    """Python as HTML, in which calls of what has an address are links."""
    parts, (before, last) = [], ("", "")                    # the two tokens before this one: "data", "."
    tokens = [*PythonLexer(ensurenl=False).get_tokens(source)]
    for (kind, word), (_, after) in zip(tokens, [*tokens[1:], (None, "")]):
        text = f'<span class="{STANDARD_TYPES[kind]}">{html.escape(word)}</span>'
        calls = [(before, word), (None, word)] if last == "." else [("", word)]
        to = next((links[call] for call in calls if call in links), None)
        if to and after.startswith("(") and before not in ("def", "class"):
            text = f'<a href="#{to}">{text}</a>'
        parts, before, last = [*parts, text], last, word
    return f"<pre>{''.join(parts)}</pre>"


def prose(text, links):
    """A little Markdown as HTML: paragraphs, indented formulas, *emphasis*, `code`, names of functions."""
    def link(match):
        to = anchor(*match.groups())
        return f'<a href="#{to}"><code>{match[1]}</code></a>' if to in links.values() else f"`{match[1]}`"
    parts = []
    for part in html.escape(text.strip("\n"), quote=False).split("\n\n"):
        marked = re.sub(r"`([^`]+)`", r"<code>\1</code>", NAME.sub(link, part))
        marked = re.sub(r"(?<!\w)\*([^*]+)\*(?!\w)", r"<em>\1</em>", marked)
        parts.append(f"<pre>{textwrap.dedent(part)}</pre>" if part[:1] == " " else f"<p>{marked}</p>")
    return "".join(parts)


def sections(paper):
    """PAPER.md's text -> [(title, functions, tests, notes)]: a row of the map each, with what else PAPER.md
    says of its functions; then what it says of others. A note is (title, text, functions).
    """
    notes = []
    for heading, form in (("Where the paper is silent", "*The paper is silent:* {}\n\n*We:* {}"),
                          ("Departures", "*The paper says:* {}\n\n*We:* {}\n\n*Why:* {}")):
        notes += [(cells[0].strip(), form.format(*cells), NAME.findall("".join(cells)))
                  for cells in table(section(paper, heading))]
    found = []
    for title, code, tests in table(section(paper, "The reader's map")):
        names = list(dict.fromkeys(NAME.findall(code)))
        here = [note for note in notes if set(names) & set(note[2])]
        notes = [note for note in notes if note not in here]
        found.append((title.strip(), names, NAME.findall(tests), here))
    return found + [(note[0], note[2], [], [note]) for note in notes]


def page(paper, words):
    """The page as text, from those of PAPER.md and paper.md. KeyError if what they name is not there."""
    found, contents, parts, seen = sections(paper), "", "", set()
    if gone := set(re.findall(r"^## (.+)$", words, re.MULTILINE)) - {title for title, *_ in found}:
        raise KeyError(f"not in PAPER.md's map: {gone}")
    links = addresses(name for _, names, *_ in found for name in names)
    for n, (title, names, tests, notes) in enumerate(found):
        heading = prose(title, {}).removeprefix("<p>").removesuffix("</p>")
        left = prose(section(words, title), links) + "".join(
            f"<blockquote>{prose(text, links)}</blockquote>" for _, text, _ in notes)
        right = ""
        for name, file in names:
            to, code = anchor(name, file), highlighted(definitions(file)[name], links)
            right += (f'<h3><a href="#{to}">{name}</a>, as above</h3>' if to in seen else
                      f'<h3 id="{to}">{name} in {file}</h3>{code}')
            seen.add(to)
        right += "".join(f"<details><summary>proved by <b>{name}</b> in {file}</summary>"
                         f"{highlighted(definitions(file)[name], links)}</details>" for name, file in tests)
        contents += f'<a href="#{n}">{heading}</a>'
        parts += f'<section id="{n}"><div><h2>{heading}</h2>{left}</div><div>{right}</div></section>'
    light, dark = (HtmlFormatter(style=style).get_style_defs("pre") for style in ("default", "github-dark"))
    layout = (ROOT / "classroom/reader.css").read_text()
    return (f'<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>{TITLE}</title>'
            f"<style>{light} @media (prefers-color-scheme: dark) {{ {dark} }} {layout}</style>"
            f'<meta name="viewport" content="width=device-width">'
            f"<h1>{TITLE}</h1><nav>{contents}</nav>{parts}\n")


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", nargs="?", type=Path, default=ROOT / "runs/paper.html", help="(runs/paper.html)")
    out = p.parse_args(argv).out
    out.parent.mkdir(parents=True, exist_ok=True)
    texts = (ROOT / file for file in ("PAPER.md", "classroom/paper.md"))
    out.write_text(page(*(text.read_text(encoding="utf-8") for text in texts)), encoding="utf-8")
    print(f"the paper beside the code: {out}")


if __name__ == "__main__":
    main()
