"""Pages out of templates, with style and script inside, so that a page is one file that needs no network."""

import time
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ra3_megatron import __version__
from ra3_megatron.config.files import atomic_write_text


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Render `template` into `path` and return it. All values are escaped but those that are Markup."""
    loader = PackageLoader("ra3_megatron.report")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )

    def asset(name: str) -> Markup:
        """Style or script as it lies in the package; only for files of our own."""
        return Markup(loader.get_source(environment, name)[0])

    environment.globals.update(asset=asset)
    written = time.strftime("%Y-%m-%d %H:%M %Z")
    atomic_write_text(path, environment.get_template(template).render(written=written, version=__version__, **values))
    return path
