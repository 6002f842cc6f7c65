"""The house: imports of the package run down, never up, and never in a circle."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "idlora_ext"
FLOORS = (
    "version tested_versions native reference",
    "base ops rows",
    "layer",
    "tuner profiling",
    "lifecycle",
    "tools patches",
    "cli __init__",
    "__main__",
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names.split()}


def imports(path):
    """(the file that is imported, whether inside a function), for each import of the package."""
    place = path.relative_to(PACKAGE).with_suffix("").parts
    tree = ast.parse(path.read_text())
    late = {n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = place[: len(place) - node.level] + tuple((node.module or "").split(".") if node.module else ())
            for alias in node.names:
                named = (*base, alias.name)
                yield (
                    (
                        named
                        if (PACKAGE.joinpath(*named).with_suffix(".py")).exists() or PACKAGE.joinpath(*named).is_dir()
                        else base
                    ),
                    node in late,
                )


def test_imports_run_down():
    graph = {}
    for path in PACKAGE.rglob("*.py"):
        place = path.relative_to(PACKAGE).with_suffix("").parts
        for target, late in imports(path):
            assert not late or place == ("cli",), f"{path}: imports {'.'.join(target)} inside a function"
            if target and target[0] != place[0]:
                assert FLOOR[target[0]] < FLOOR[place[0]], f"{path} imports {'.'.join(target)}, which is not below it"
            if place[-1] != "__init__":
                graph.setdefault(place, set()).add(target)

    def visit(place, above=()):
        assert place not in above, f"a circle: {above}"
        for target in graph.get(place, ()):
            visit(target, (*above, place))

    for place in graph:
        visit(place)


def test_only_a_model_is_walked_above_the_layer():
    for folder in ("base", "ops", "rows", "layer"):
        for path in (PACKAGE / folder).glob("*.py"):
            assert "named_modules(" not in path.read_text(), (
                f"{path}: a layer knows itself; models are walked in tuner/"
            )


def test_every_folder_opens_with_its_sentence():
    for folder in (path.parent for path in PACKAGE.rglob("__init__.py")):
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), f"{folder}: what is it for?"


def test_files_are_short():
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, f"{path}: one reason to exist, in about 400 lines"
