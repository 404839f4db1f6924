"""A report as one file that needs nothing else: no script, no remote address, every text escaped."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from isoflat.report.document import Definitions, Grid, Page, Plate, Prose

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
"""Content security policy of a report: a browser may load nothing."""

_KINDS = {Prose: "prose", Definitions: "terms", Grid: "grid", Plate: "plate"}


def render(page: Page) -> str:
    """The whole page as HTML.

    Figures and tables are numbered in the order in which they appear.

    Args:
        page: the page; all of its text is escaped, `Plate.svg` alone is taken over as it is.
    """
    environment = Environment(
        loader=PackageLoader("isoflat.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    count = {"plate": 0, "grid": 0}
    sections = []
    for section in page.sections:
        blocks = []
        for block in section.blocks:
            kind = _KINDS[type(block)]
            if kind in count:
                count[kind] += 1
            svg = Markup(block.svg) if isinstance(block, Plate) else ""
            blocks.append({"kind": kind, "number": count.get(kind, 0), "content": block, "svg": svg})
        sections.append({"title": section.title, "blocks": blocks})
    return environment.get_template("page.html.j2").render(page=page, sections=sections, policy=POLICY)
