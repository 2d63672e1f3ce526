"""Pages: one HTML file that works offline, in the reader's light or dark scheme, and runs no foreign script.

    write_page(path, folder / "page.html.jinja", {"fit": fit}, {"plane": figure}, {})

Names, prompts, answers and model ids come from others: templates escape them, figures carry them as JSON
without markup, and the page's content security policy runs no script but those written here and loads
nothing.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import plotly.graph_objects as go
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from personatlas.analysis.html import PALETTE
from personatlas.persona.artifacts import atomic

HERE = Path(__file__).parent


def write_page(
    path: Path,
    template: Path,
    content: Mapping[str, object],
    figures: Mapping[str, go.Figure],
    filters: Mapping[str, Callable[..., object]],
    scripts: Sequence[Path] = (),
) -> None:
    """Writes a Jinja template's page with its figures; without any, plotly is left out. `scripts` are its
    own.
    """
    own_scripts = [path.read_text(encoding="utf-8") for path in (HERE / "page.js", *scripts)]
    all_scripts = [get_plotlyjs(), *own_scripts] if figures else own_scripts
    data = "{" + ",".join(f"{json.dumps(name)}:{figure.to_json()}" for name, figure in figures.items()) + "}"
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in all_scripts]
    allowed = " ".join(f"'sha256-{value}'" for value in digests)
    shared = {
        "policy": f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'",
        "css": Markup("".join(path.read_text(encoding="utf-8") for path in (PALETTE, HERE / "page.css"))),
        "scripts": [Markup(text) for text in all_scripts],
        "data": escape_json(data),
        "drawn": figures.keys(),
    }
    environment = _environment(template.parent)
    own: dict[str, Callable[..., object]] = {
        "short_path": short_path,
        "minus": lambda text: text.replace("-", "−"),
    }
    environment.filters |= own | dict(filters)
    page = environment.get_template(template.name).render(shared | dict(content))
    with atomic(path) as temporary:
        temporary.write_bytes(page.encode("utf-8", "replace"))  # an answer may hold half a surrogate pair


def short_path(name: object) -> str:
    """Returns the end of an absolute path that says what it is ("books", "books/model"); other names as they
    are."""
    if not isinstance(name, str) or not Path(name).is_absolute():
        return str(name)
    parts = [part for part in Path(name).parts if part != "checkpoints"]
    is_part = parts[-1] == "model" or parts[-1].startswith("step-")  # of a training run
    return "/".join(parts[-1 - is_part :])


def escape_json(data: str) -> Markup:
    """JSON for a script element: without what could end it or begin markup."""
    return Markup(data.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


@cache
def _environment(folder: Path) -> Environment:
    loader = FileSystemLoader([folder, HERE])
    return Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
