"""Hooks that MkDocs calls while it builds the site, for two things that Markdown can't express.

Links out of docs/ become links to pages of the site. On disk a page links to `../llm_jax/sharding.py` and to
`../CONTRIBUTING.md`, which works in an editor and on any host of repositories. The site has no `..`: a few Markdown
files of the root become pages of it (`ROOT_PAGES`), and each other file that a page links to becomes a page under
`source/` that shows it.

The names of `import llm_jax` are listed from the package, each with a link to its documentation.
"""

import ast
import itertools
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
ROOT_PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "findings/README.md": "findings.md"}
SHOWN = {".py": "python", ".sh": "sh", ".toml": "toml", ".yaml": "yaml", ".yml": "yaml", ".json": "json"}
FRONT_DOOR = "<!-- the front door -->"
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the root, and one for each file that a page links to."""
    for path, page in ROOT_PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / path).read_text()))
    for page in files.documentation_pages():
        for target in LINK.findall(page.content_string):
            path = repository_path(page.src_uri, target)
            if site_path(path).startswith("source/") and site_path(path) not in files.src_uris:
                files.append(File.generated(config, site_path(path), content=source_page(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return the page with each link of the repository as one of the site, and the front door where it is asked for."""
    here = page.file.src_uri

    def one(link: re.Match) -> str:
        target = site_path(repository_path(here, link[1]))
        return f"]({posixpath.relpath(target, posixpath.dirname(here))}"

    if here.startswith("source/"):
        return markdown
    return LINK.sub(one, markdown.replace(FRONT_DOOR, front_door()) if FRONT_DOOR in markdown else markdown)


def front_door() -> str:
    """Return a table of the names of `import llm_jax`, each with a link and the first line of its docstring."""
    assigned = [node for node in parsed("llm_jax/__init__.py").body if isinstance(node, ast.Assign)]
    (homes,) = [ast.literal_eval(node.value) for node in assigned if ast.unparse(node.targets[0]) == "_HOMES"]
    rows = ["| name | what it is |", "|---|---|"]
    for name, home in homes.items():
        module, attribute = home.split(":")
        body = parsed(f"llm_jax/{module.replace('.', '/')}.py").body
        found = {
            node.name: ast.get_docstring(node) or ""
            for node in body
            if isinstance(node, ast.ClassDef | ast.FunctionDef)
        }
        for node, text in itertools.pairwise(body):  # a constant, and the string below it
            if isinstance(node, ast.Assign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                found[ast.unparse(node.targets[0])] = str(text.value.value)
        if attribute not in found:
            raise ValueError(f"llm_jax/__init__.py says {home} of {name}; name the module that defines it")
        first = found[attribute].partition("\n")[0]
        rows.append(f"| [`{name}`][llm_jax.{module}.{attribute}] | {first} |")
    return "\n".join(rows)


def parsed(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text())


def repository_path(page: str, target: str) -> str:
    """Return where a link of a page of the site leads in the repository: `llm_jax/sharding.py`."""
    on_disk = {name: path for path, name in ROOT_PAGES.items()}.get(page, f"docs/{page}")
    return posixpath.normpath(posixpath.join(posixpath.dirname(on_disk), target))


def site_path(path: str) -> str:
    """Return the page of the site that shows a file of the repository."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return ROOT_PAGES.get(path, f"source/{path}.md")


def source_page(path: str) -> str:
    """Return a page with the text of a file, which the search of the site leaves out."""
    text = (ROOT / path).read_text()
    fence = "`" * max([3, *(1 + len(run) for run in re.findall("`+", text))])
    language = SHOWN.get(Path(path).suffix, "sh" if text.startswith("#!") else "text")
    title = f"---\nsearch: {{exclude: true}}\n---\n# {path}\n"
    return f"{title}\n{fence}{language}\n{text.rstrip()}\n{fence}\n"
