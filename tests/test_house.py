"""The rules of the house: lower floors never import upper ones, starting is light, files stay short."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib import resources
from pathlib import Path

import pytest

import perpend

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "perpend"
FILES = sorted(SOURCE.rglob("*.py"))

FLOORS = (
    ("_version", "errors", "launched", "escape", "progress", "units", "whole"),
    ("core",),
    ("complaints", "refs", "config", "options"),
    ("data",),
    ("models",),
    ("judges", "drift"),
    ("fitting", "teaching"),
    ("searching",),
    ("export", "forensics", "serving"),
    ("report",),
    ("tasks",),
    ("cli",),
    ("__main__",),
)
"""From the bottom up; parts on one floor may not import each other, but for those that come earlier in the row."""

HEIGHT = {part: (k, j) for k, floor in enumerate(FLOORS) for j, part in enumerate(floor)}
HEAVY = ("torch", "transformers", "datasets", "accelerate", "peft", "scipy", "pandas", "huggingface_hub")
MODULE_LINES, FUNCTION_LINES = 450, 70
PLACES = re.compile(r"(?<![\w.])/(?:tmp|work|root|home|opt|Users)/\w|[A-Z]:[\\]Users")


def _part(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def _imports(tree: ast.Module) -> list[tuple[int, str]]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "perpend" else []
            found += [(node.lineno, name) for name in names or [str(node.module)]]
    return found


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [p for p in FILES if p != SOURCE / "__init__.py"], ids=_name)
def test_lower_floors_never_import_upper_ones(path):
    own = _part(path)
    assert own in HEIGHT, f"{own} has no floor"
    for line, name in _imports(ast.parse(path.read_text(encoding="utf-8"))):
        parts = name.split(".")
        if parts[0] != "perpend" or (len(parts) > 1 and parts[1] == own):
            continue
        public = len(parts) == 1 or parts[1] in perpend.__all__  # the public functions stand for the tasks
        target = "_version" if parts[-1] == "__version__" else "tasks" if public else parts[1]
        assert target in HEIGHT, f"line {line}: {name} has no floor"
        assert HEIGHT[target] < HEIGHT[own], f"line {line}: {own} imports {name}, which is above it"


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_files_and_functions_stay_short(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MODULE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= FUNCTION_LINES, f"line {node.lineno}: {node.name} has {length} lines"


@pytest.mark.parametrize(
    "program",
    [
        "import perpend",
        "import perpend; dir(perpend); perpend.__version__",
        "from perpend.cli.main import main; main(['--help'])",
        "from perpend.cli.main import main; main(['run', '--help'])",
        "from perpend.cli.main import main; main(['ls', 'methods'])",
        "from perpend.cli.main import main; main(['config', 'init'])",
        "import perpend.config, perpend.refs, perpend.data",
    ],
)
def test_starting_is_light(program):
    check = f"import sys; print(*sorted({set(HEAVY)!r} & set(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", f"{program}\n{check}"], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == ""


def test_help_of_the_program_loads_no_models_of_data():
    program = "from perpend.cli.main import main; main(['--help'])\nimport sys; sys.exit('pydantic' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)


def _documents() -> list[Path]:
    kinds = {".py", ".md", ".toml", ".txt", ".jinja", ".html", ".svg", ".jsonl", ".yml", ".yaml", ".json", ""}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    return [ROOT / name for name in listed if Path(name).suffix in kinds and (ROOT / name).is_file()]


def test_no_file_names_a_place_on_one_machine():
    found = [
        f"{_name(path)}:{number}"
        for path in _documents()
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if PLACES.search(line)
    ]
    assert found == []


def test_public_names_are_complete_and_point_somewhere():
    from perpend import _HOME, _RENAMED

    assert sorted([*_HOME, "__version__"]) == sorted(perpend.__all__)
    assert set(perpend.__all__) <= set(dir(perpend))
    for name, module in _HOME.items():
        path = SOURCE / (module.replace(".", "/") + ".py")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        defined = {getattr(node, "name", None) for node in tree.body}
        defined |= {alias.asname or alias.name for n in tree.body if isinstance(n, ast.ImportFrom) for alias in n.names}
        assert _RENAMED.get(name, name) in defined, f"perpend.{name} is not in {module}"


def test_no_public_name_is_also_a_module():
    modules = {path.stem for path in SOURCE.glob("*.py")} | {path.name for path in SOURCE.iterdir() if path.is_dir()}
    assert not modules & set(perpend.__all__)


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="fitt"):
        _ = perpend.fitt


def test_there_is_no_module_of_odds_and_ends():
    assert not [path for path in FILES if path.stem in {"utils", "util", "helpers", "common", "misc"}]


LANGUAGES = ("ar", "de", "en", "es", "fr", "hi", "it", "ja", "pt", "ru", "sl", "zh")

CARRIED = (
    "py.typed",
    *(f"prompts/{kind}.{split}.jsonl" for kind in ("target", "baseline") for split in ("fit", "select", "report")),
    *(
        f"judges/dictionaries/{code}.toml"
        for code in ["ar", "de", "en", "es", "fr", "hi", "it", "ja", "pt", "ru", "sl", "zh"]
    ),
    "judges/small.safetensors",
    "judges/known_error.json",
    "judges/endpoint.toml",
    "export/templates/card.md.jinja",
    "report/templates/report.html.jinja",
    "report/templates/single.html.jinja",
    "report/templates/report.css",
    "report/templates/report.js",
    *(f"serving/page/page.{kind}" for kind in ("html", "css", "js")),
    "teaching/wordings.toml",
    "teaching/smollm2/adapter_config.json",
    "teaching/smollm2/adapter_model.safetensors",
)
"""Files that are no code and without which an installed package does not work."""


@pytest.mark.parametrize("name", CARRIED)
def test_the_package_carries_its_data(name):
    found = resources.files("perpend").joinpath(name)
    assert found.is_file()
    assert found.read_bytes() or name == "py.typed"
    ignored = subprocess.run(["git", "check-ignore", "-q", SOURCE / name], cwd=ROOT)
    assert ignored.returncode != 0, "left out of the wheel, as git ignores it"


def test_what_is_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = [
        *project["dependencies"],
        *(line for lines in project["optional-dependencies"].values() for line in lines),
    ]
    declared = {re.split(r"[\[<>=~! ]", line)[0].replace("-", "_").lower() for line in listed}
    imported = {
        name.split(".")[0] for path in FILES for _, name in _imports(ast.parse(path.read_text(encoding="utf-8")))
    }
    outside = imported - sys.stdlib_module_names - {"perpend", "yaml"}  # yaml comes with huggingface_hub
    assert outside <= declared | {"PIL"}
