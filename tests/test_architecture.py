"""The house of DESIGN: imports point down only, wherever in a file they stand."""

import ast
import graphlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.smoke

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "llm_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
PAGE = PACKAGE.parent / "docs" / "architecture.md"

# (modules or folders below llm_jax, floor, what lives there): the first row that matches names the floor. This is the
# only table of the floors: `python tests/test_architecture.py` writes the table of docs/architecture.md.
GROUND = "config|keys|axes|paths|tree|files|log|notebook|recipes|sharding|processes|runtime|chips"
FLOORS = [
    (r"__init__|__main__", 8, "`import llm_jax`, the front door, which starts no JAX by itself; `python -m llm_jax`"),
    (r"cli", 7, "the command line: grammar and errors, what each verb does, what is written to a terminal"),
    (r"compat", 6, "other libraries' models: weights and files of Hugging Face, the PyTorch twin"),
    (r"plan", 5, "what is known before a run: shapes, memory, communication and time; every mesh held to one device"),
    (r"runs", 5, "a run over time and on disk: the loop, checkpoints and their seal, evaluation, the report"),
    (r"train", 4, "a training step without a disk: its config, the loss and its gradient, the optimizer, the program"),
    (r"infer", 3, "generation and classification with a trained model"),
    (r"model", 2, "the transformer, the only folder that imports `flax.linen`"),
    (r"ops", 1, "pure functions on arrays: attention and its kernels, experts, positions, norms, loss, sampling"),
    (r"data", 1, "text to batches, in NumPy: tokenizers, sources, shards, packing; JAX in `loader.py` only"),
    (GROUND, 0, "configs, pytrees by path, two sharding tables, files, how processes start and agree"),
    (r"__version__", 0, ""),
]
# What a reader reads in an evening, in this order: README.md and docs/architecture.md say the same.
EVENING = (
    *(f"model/{name}.py" for name in ("transformer", "attention", "feedforward", "cache", "stack")),
    *(f"ops/{name}.py" for name in ("attention", "mask", "position", "norm", "loss")),
    *("train/step.py", "train/optimizer.py", "data/loader.py", "runs/loop.py"),
)
VAGUE = {"utils", "util", "common", "base", "helpers", "helper", "manager", "misc"}


def module(path: Path) -> str:
    """`llm_jax/model/config.py` -> `llm_jax.model.config`; a folder's `__init__.py` is the folder."""
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    return name if path.parent == PACKAGE else name.removesuffix(".__init__")


def floor(name: str) -> int:
    for pattern, level, _ in FLOORS:
        if re.fullmatch(rf"llm_jax\.({pattern})(\..*)?", name):
            return level
    raise ValueError(f"{name} stands on no floor; give it a row in FLOORS")


def room(name: str) -> str:
    """The folder a module stands in; files at the top of the package share one."""
    first = name.split(".")[1]
    return first if (PACKAGE / first).is_dir() else ""


def table() -> str:
    """The floors as docs/architecture.md shows them."""
    rows = ["| floor | room | what lives there |", "|---|---|---|"]
    for pattern, level, words in FLOORS:
        if words:
            names = [name + ("/" if (PACKAGE / name).is_dir() else ".py") for name in pattern.split("|")]
            rows.append(f"| {level} | {' '.join(f'`{name}`' for name in names)} | {words} |")
    return "\n".join(rows)


def imports(path: Path) -> Iterator[str]:
    """Every name a file imports, those inside functions too; `from a import b` gives both `a` and `a.b`."""
    package = ["llm_jax", *path.parent.relative_to(PACKAGE).parts]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            yield source
            yield from (f"{source}.{alias.name}" for alias in node.names)


def may_import(name: str, other: str) -> bool:
    return floor(other) < floor(name) or (floor(other) == floor(name) and room(other) == room(name))


def on_jax(name: str) -> bool:
    return name.split(".")[0] in {"jax", "flax", "optax", "chex", "orbax"}


def test_a_file_imports_lower_floors_or_its_own_folder_only():
    wrong = [
        f"{module(path)} (floor {floor(module(path))}) imports {other} (floor {floor(other)})"
        for path in FILES
        for other in imports(path)
        if other.startswith("llm_jax.") and not may_import(module(path), other)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_file_imports_itself_by_way_of_others():
    modules = {module(path).removesuffix(".__init__") for path in FILES} - {"llm_jax"}
    graph = {}
    for path in FILES:
        found = set(imports(path)) & modules
        # `from a import b` gives both: the package `a` is meant only where `b` is a name in it.
        packages = {name for name in found if any(other.startswith(f"{name}.") for other in found)}
        graph[module(path).removesuffix(".__init__")] = found - packages
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_every_file_stands_on_a_floor():
    assert all(floor(module(path)) >= 0 for path in FILES)


def test_the_page_on_the_house_has_the_floors_as_they_are():
    assert f"\n\n{table()}\n\n" in PAGE.read_text(), "python tests/test_architecture.py writes them there"


def test_only_the_model_knows_flax_linen():
    knowing = {room(module(path)) for path in FILES if "flax.linen" in imports(path)}
    assert knowing <= {"model"}


def test_only_the_loader_of_the_data_folder_imports_jax():
    knowing = {path.name for path in PACKAGE.glob("data/*.py") for name in imports(path) if on_jax(name)}
    assert knowing <= {"loader.py"}


def test_text_becomes_token_shards_without_starting_jax():
    modules = [module(path) for path in PACKAGE.glob("data/*.py") if path.name != "loader.py"]
    program = f"import sys, {', '.join(modules)}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=PACKAGE.parent).returncode == 0


# What is answered before JAX starts; with the exit status.
WITHOUT_JAX = {
    "show llama2_7b --config --json": 0,
    "configs quickstart --json": 0,
    "train quickstart model.d_model=7": 2,
    "train quickstart model.n_heds=2": 2,
    "train nowhere": 2,
    "plan llama2_7b --topology v5e:4x4 mesh.fsdp=0": 2,
    "resume nowhere": 2,
    "generate nowhere --prompt x": 2,
    "evaluate nowhere": 2,
}


def test_refusals_and_counts_start_no_jax():
    program = f"""
import sys
from llm_jax.cli.main import main
for words, status in {WITHOUT_JAX!r}.items():
    assert main(words.split()) == status, words
    assert 'jax' not in sys.modules, words
from llm_jax.plan.describe import describe
from llm_jax.recipes import recipes
from llm_jax.runs.start import load_recipe
traced = {{"shakespeare_fast"}}  # a mixer is a class, whose parameters only JAX knows
assert all(sum(describe(load_recipe(name)).parameters.values()) for name in recipes() if name not in traced)
assert 'jax' not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_file_or_folder_has_a_name_that_says_nothing():
    vague = [path for path in PACKAGE.rglob("*") if path.stem.strip("_") in VAGUE]
    assert not vague


# Source files without a test file of their own -> the one that tests them, and why.
TESTED_IN = {
    "__init__.py": ("test_front_door.py", "it is the front door"),
    "__main__.py": ("test_main.py", "it calls cli/main.py"),
    "compat/families_gpt.py": ("test_families.py", "a table of families, of which each is tested there as all others"),
    "compat/families_moe.py": ("test_families.py", "the same"),
    "model/attention.py": ("test_transformer.py", "a sublayer: who gets a gradient from whom is seen in a whole model"),
    **{
        f"ops/native/{name}.py": ("test_native.py", "one test holds all native operations to the plain ones")
        for name in ("activation", "adamw", "attention", "build", "few_rows", "norm", "product", "softmax")
    },
    "model/linear_attention.py": ("test_cache.py", "a sublayer: its state is seen where a model decodes with it"),
}


def code(path: Path) -> bool:
    """Whether a file has more than a docstring."""
    return any(not isinstance(node, ast.Expr) for node in ast.parse(path.read_text()).body)


def test_each_source_file_with_code_has_a_test_file_of_its_own():
    """`test_NAME.py`, or `test_ROOM_NAME.py` where files of several rooms have a name."""
    owners: dict[str, str] = {}
    for path in filter(code, FILES):
        source = str(path.relative_to(PACKAGE))
        if source in TESTED_IN:
            assert (TESTS / TESTED_IN[source][0]).is_file(), source
            continue
        name = path.parent.name if path.stem == "__init__" else path.stem
        found = [test for test in (f"test_{path.parent.name}_{name}.py", f"test_{name}.py") if (TESTS / test).is_file()]
        assert found, f"{source} has no tests/test_{name}.py"
        assert owners.setdefault(found[0], source) == source, f"{found[0]} tests {owners[found[0]]} and {source}"
    assert all(reason and (PACKAGE / source).is_file() for source, (_, reason) in TESTED_IN.items())


def test_the_name_of_a_test_has_at_most_seventy_characters():
    for path in TESTS.glob("test_*.py"):
        names = [node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
        assert [name for name in names if name.startswith("test_") and len(name) > 70] == [], path.name


def test_the_rooms_with_strict_types_have_the_same_rules():
    tables = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"]["pyright"]["executionEnvironments"]
    roots = [table.pop("root") for table in tables]
    assert roots == ["llm_jax/model", "llm_jax/ops", "llm_jax/train/step.py", "llm_jax/config.py"]
    assert all(table == tables[0] for table in tables)


# What Python has on Linux and macOS only.
POSIX = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "posix", "syslog", "readline", "curses", "crypt"}
LACKING = {
    "os": r"EX_\w+|fork\w*|kill|killpg|[gs]ete?[ug]id|getpg\w+|setsid|sched_\w+|sysconf|uname|wait\w*|mkfifo|l?chown"
    r"|statvfs|nice|posix_\w+|openpty|sync|getloadavg|pread|pwrite|sendfile",
    "signal": r"SIG(KILL|HUP|USR[12]|CHLD|ALRM|QUIT|STOP|CONT|PIPE|TSTP)|pause|alarm|setitimer|pthread_\w+"
    r"|sig\w*wait\w*",
}


def hidden_on_windows(path: Path) -> Iterator[str]:
    """Names that a file needs as soon as it is imported or run, and that Windows does not have."""
    tree = ast.parse(path.read_text())
    caught = {inner for node in ast.walk(tree) if isinstance(node, ast.Try) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) and node not in caught:
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from (name for name in names if name.partition(".")[0] in POSIX)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            lacking = LACKING.get(node.value.id)
            if lacking and re.fullmatch(lacking, node.attr):
                yield f"{node.value.id}.{node.attr}"


def test_no_file_needs_what_windows_does_not_have():
    assert {str(path): list(hidden_on_windows(path)) for path in FILES if [*hidden_on_windows(path)]} == {}


HIDING = f"""
import builtins, importlib, sys
found = builtins.__import__

def hide(name, globals=None, *more):
    if name.partition(".")[0] in {POSIX} and (globals or {{}}).get("__name__", "").startswith("llm_jax"):
        raise ModuleNotFoundError(name)
    return found(name, globals, *more)

builtins.__import__ = hide
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


@pytest.mark.slow
def test_every_module_is_imported_where_posix_modules_are_missing():
    torch = {module(path) for path in FILES if any(name.startswith("torch") for name in imports(path))}
    names = [module(path).removesuffix(".__init__") for path in FILES if module(path) not in torch]
    plain = [name for name in names if not name.endswith("__main__") and ".torch_" not in name]
    done = subprocess.run([sys.executable, "-c", HIDING, *plain], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_evening_has_as_many_lines_as_the_pages_say():
    lines = sum(len((PACKAGE / file).read_text().splitlines()) for file in EVENING)
    for page, heading in ((PACKAGE.parent / "README.md", "**The evening**"), (PAGE, "## An evening")):
        text = page.read_text()
        assert f"{round(lines, -2):,} lines" in text, lines
        assert [file for file in EVENING if Path(file).name not in text[text.index(heading) :]] == []


if __name__ == "__main__":
    PAGE.write_text(re.sub(r"^\| floor .*?\n(?!\|)", lambda _: f"{table()}\n", PAGE.read_text(), flags=re.M | re.S))
