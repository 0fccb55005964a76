"""The page that sets the paper beside the code shows every function and test of PAPER.md's map, as they
stand in the source; its links lead somewhere, and nothing is loaded from elsewhere. A name that is gone is an
error.

The oracles: PAPER.md, `inspect`, and the standard library's HTML parser.
"""
import importlib
import importlib.util
import inspect
import operator
import textwrap
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAPER, WORDS = ((ROOT / file).read_text(encoding="utf-8") for file in ("PAPER.md", "classroom/paper.md"))


spec = importlib.util.spec_from_file_location("reader", ROOT / "classroom" / "reader.py")
reader = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reader)


class Page(HTMLParser):
    """Its ids, links, the text of each <pre>, the headings of sections, and the tags that load something."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.code, self.headings, self.loading, self.open = [], [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes["href"]] if "href" in attributes else []
        self.loading += [tag] if tag in ("script", "link", "img", "iframe") or "src" in attributes else []
        for kind, texts in (("pre", self.code), ("h2", self.headings)):
            texts += [""] if tag == kind else []
        self.open += [tag] if tag not in ("html", "meta") else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        for kind, texts in (("pre", self.code), ("h2", self.headings)):
            if kind in self.open:
                texts[-1] += data


@pytest.fixture(scope="module")
def page():
    return Page(reader.page(PAPER, WORDS))


def test_each_function_and_test_of_the_map_is_shown_as_it_stands(page):
    named = set(reader.NAME.findall(reader.section(PAPER, "The reader's map")))
    assert len(named) > 70
    for name, file in named:
        if file.startswith("tests/"):
            code, = (code for code in set(page.code) if f"def {name}(" in code)
            assert f"{code}\n" in (ROOT / file).read_text(encoding="utf-8")
        elif name.isupper():
            code, = (code for code in set(page.code) if f"\n{name} = " in f"\n{code}" and code in (
                ROOT / file).read_text(encoding="utf-8"))
        else:
            module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
            found = inspect.unwrap(operator.attrgetter(name)(module))
            source = textwrap.dedent(inspect.getsource(found)).rstrip()
            assert any(code.endswith(source) for code in page.code), name


def test_each_row_of_the_map_is_a_section_and_has_words(page):
    titles = [row[0].strip() for row in reader.table(reader.section(PAPER, "The reader's map"))]
    assert page.headings[:len(titles)] == titles
    assert [title for title in titles if not reader.section(WORDS, title).strip()] == []


def test_all_that_the_paper_is_silent_on_is_on_the_page():
    sections = reader.sections(PAPER)
    notes = [title for *_, notes in sections for title, *_ in notes]
    rows = [row[0].strip() for title in ("Where the paper is silent", "Departures")
            for row in reader.table(reader.section(PAPER, title))]
    assert sorted(notes) == sorted(rows) and len(rows) > 30


def test_links_lead_somewhere_and_nothing_is_loaded(page):
    assert len(page.links) > 100 and {link[:1] for link in page.links} == {"#"}
    assert {link[1:] for link in page.links} <= set(page.ids) and len(page.ids) == len(set(page.ids))
    assert page.loading == page.open == []
    assert "http" not in (ROOT / "classroom" / "reader.css").read_text()


def test_a_call_leads_to_the_function_that_it_calls():
    links = reader.addresses([("grow", "grow.py"), ("split", "data.py"), ("SuperNet.sample", "supernet.py")])
    code = 'def grow(x):\n    grow(data.split(x)), "a b".split(), net.sample(1), grow'
    page = Page(reader.highlighted(code, links))
    assert page.links == ["#grow.grow", "#data.split", "#supernet.SuperNet.sample"] and page.code == [code]


@pytest.mark.parametrize("old, new", [
    ("`channel_map`](grow.py)", "`channel_mop`](grow.py)"),
    ("`test_mobilenet_v2`](tests/test_flops.py)", "`test_mobilenet_v9`](tests/test_flops.py)"),
    ("| Eq. 2: the wider layer |", "| Eq. 2: another title |"), ("](distill.py)", "](distil.py)")])
def test_a_name_that_is_gone_is_an_error(old, new):
    assert old in PAPER
    with pytest.raises((KeyError, FileNotFoundError)):
        reader.page(PAPER.replace(old, new), WORDS)


def test_the_command_writes_one_file(tmp_path, capsys):
    reader.main([str(tmp_path / "new" / "paper.html")])
    file, = (tmp_path / "new").iterdir()
    assert file.read_text(encoding="utf-8") == reader.page(PAPER, WORDS)
    assert capsys.readouterr().out == f"the paper beside the code: {file}\n"
