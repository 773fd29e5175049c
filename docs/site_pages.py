"""Hooks of MkDocs: pages of the site that lie outside of docs/, and a reference page for each room of the code.

README.md is the first page. Links to other files of the repository lead to copies of them.
"""

import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "LOG.md": "log.md"}
"""Pages beside docs/, and their names in the site."""
SHOWN = {".html", ".svg", ".png", ".json", ".ipynb"}
"""Files that a browser shows, or that are loaded; others are copied as text."""
LINK = re.compile(r'(\]\(|(?:src|srcset|href)=")([^)\s"#]+)')


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Complete the navigation: the reference, and in the guide every page that is not named."""
    assert config.nav is not None
    named = re.findall(r"[\w/]+\.md", repr(config.nav))
    (guide,) = (part["Guide"] for part in config.nav if "Guide" in part)
    pages = sorted(str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md"))
    guide += [page for page in pages if page not in named]
    config.nav.append({"Reference": [{room.replace("_", " "): f"reference/{room}.md"} for room in reference()]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages beside docs/, the reference, and what pages link to."""
    for source, name in PAGES.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text()))
    for room, page in reference().items():
        files.append(File.generated(config, f"reference/{room}.md", content=page))
    names = [file.src_uri for file in files.documentation_pages() if not file.src_uri.startswith("reference/")]
    for name in names:
        for path in filter(None, (_outside(name, target) for _, target in LINK.findall(_text(name)))):
            if files.get_file_from_path(_copy_of(path)) is None:
                files.append(File.generated(config, _copy_of(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links of the repository into links of the site."""
    name = page.file.src_uri
    if name.startswith("reference/"):
        return markdown
    return LINK.sub(lambda found: f"{found[1]}{_link(name, found[2])}", markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Let the search from disk load its shim from the site: the theme would fetch it."""
    return output.replace("https://unpkg.com/iframe-worker/shim", f"{_up(page.file.src_uri)}vendor/iframe-worker.js")


def on_post_template(output: str, template_name: str, config: MkDocsConfig) -> str:
    """Do the same for the page of what is not found."""
    return output.replace("https://unpkg.com/iframe-worker/shim", "vendor/iframe-worker.js")


def reference() -> dict[str, str]:
    """Return a page for each room: all its modules, whose docstrings mkdocstrings reads."""
    rooms: dict[str, list[str]] = {"records and settings": ["neuromas.types", "neuromas.config"]}
    for path in sorted((ROOT / "neuromas").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if len(parts) > 2 and parts[-1] != "__main__" and path.stat().st_size:
            rooms.setdefault(parts[1], []).append(".".join(parts).removesuffix(".__init__"))
    return {
        room.replace(" ", "_"): "\n\n".join([f"# {room}", *(f"::: {module}" for module in modules if ".import" not in module)])
        for room, modules in rooms.items()
    }


def _text(name: str) -> str:
    beside = {site: source for source, site in PAGES.items()}
    return (ROOT / beside.get(name, f"docs/{name}")).read_text()


def _target(name: str, link: str) -> str | None:
    """Return the path in the repository that a page's link leads to; None: it leads out of it, or nowhere."""
    folder = ROOT if name in PAGES.values() else (ROOT / "docs" / name).parent
    path = (folder / link).resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) and path.exists() else None


def _outside(name: str, link: str) -> str | None:
    """Return the path of a file beside docs/ that a link leads to."""
    path = _target(name, link)
    return path if path and path not in PAGES and not _is_in_site(path) and (ROOT / path).is_file() else None


def _is_in_site(path: str) -> bool:
    return path.startswith("docs/") and not path.endswith(".py")


def _copy_of(path: str) -> str:
    return f"repository/{path}" if Path(path).suffix in SHOWN else f"repository/{path}.txt"


def _link(name: str, link: str) -> str:
    path = _target(name, link)
    if path is None:
        return link
    if path in PAGES:
        return _up(name) + PAGES[path]
    return _up(name) + (path.removeprefix("docs/") if _is_in_site(path) else _copy_of(path))


def _up(name: str) -> str:
    return "../" * (len(PurePosixPath(name).parts) - 1)
