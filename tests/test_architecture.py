"""The layout in docs/design.md, compared with the imports in the source."""

import ast
import re
import subprocess
from functools import cache

import pytest
from conftest import TESTS

import transformers_parakeet as tp

ROOT = TESTS.parent
SOURCE = ROOT / "src" / "transformers_parakeet"
FILES = sorted(path for path in SOURCE.rglob("*.py"))
PACKAGES = sorted(path.parent.name for path in SOURCE.glob("*/__init__.py"))
STOCK = re.compile(r"models\.parakeet|loss_tdt|loss_rnnt")


def table():
    """Allowed imports of every module and sub-package, read from docs/design.md."""
    allowed = {}
    rows = re.findall(
        r"^\| `([a-z_]+)/?` \|.*\|([^|]*)\|$", (ROOT / "docs" / "design.md").read_text("utf-8"), re.MULTILINE
    )
    for name, imports in rows:
        every = set(allowed) if imports.strip().startswith("every module above") else set()
        named = set(re.findall(r"`([a-z_]+)`", imports))
        allowed[name] = every - named if every else named
    return allowed


ALLOWED = table()


def name_of(path):
    """Module name relative to the package, such as `nemo.reader`; a sub-package is named after its folder."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {name_of(path): path for path in FILES}


@cache
def imports(module):
    """(module, names) of each import statement of a source file; modules of this package are relative to it."""
    path = MODULES[module]
    package = list(path.relative_to(SOURCE).parts[:-1])
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.append((node.module, ()))
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1]
            target = ".".join([*base, *([node.module] if node.module else [])])
            found.append((f".{target}", tuple(alias.name for alias in node.names)))
    return found


def defining_module(package, name):
    """The file that defines a name which the `__init__` of a sub-package re-exports."""
    for target, names in imports(package):
        if name in names:
            return target.strip(".")
    return package


def own_imports(module):
    """Modules of this package that a module imports; a name from a sub-package counts as an import of its file."""
    targets = set()
    for target, names in imports(module):
        if not target.startswith("."):
            continue
        base = target.strip(".")
        for name in names:
            inside = f"{base}.{name}".strip(".")
            if base in PACKAGES:
                targets.add(defining_module(base, name))
            else:
                targets.add(inside if inside in MODULES else base)
    return targets


def part_of(module):
    """The row of the table to which a module belongs."""
    return module.partition(".")[0]


def test_every_module_has_a_row_in_the_table():
    assert {part_of(module) for module in MODULES} - {""} == ALLOWED.keys()


@pytest.mark.parametrize("module", sorted(set(MODULES) - {""}))
def test_a_module_imports_only_what_the_table_allows(module):
    own = part_of(module)
    others = {target.strip(".") for target, _ in imports(module) if target.startswith(".")}
    others = {target for target in others if part_of(target) != own}
    # the command may use the public names of the package
    assert {part_of(target) for target in others} - ({""} if own == "cli" else set()) <= ALLOWED[own]
    # another sub-package is imported by its `__init__`, not by its files
    assert not {target for target in others if "." in target}


@pytest.mark.parametrize("package", PACKAGES)
def test_the_init_of_a_sub_package_only_re_exports(package):
    body = ast.parse((SOURCE / package / "__init__.py").read_text(encoding="utf-8")).body
    assert isinstance(body[0], ast.Expr)
    assert isinstance(body[-1], ast.Assign)
    assert body[-1].targets[0].id == "__all__"
    assert all(isinstance(node, ast.ImportFrom) and node.level == 1 for node in body[1:-1])


def longest_chain(module, importers=()):
    """The longest chain of imports that ends at a module."""
    assert module not in importers, f"a circle of imports: {' -> '.join([*importers, module])}"
    chains = [longest_chain(target, (*importers, module)) for target in own_imports(module) if target]
    return [*max(chains, default=[], key=len), module]


def test_imports_have_no_circle_and_at_most_seven_levels():
    chains = [longest_chain(module) for module in MODULES if module and module not in PACKAGES]
    longest = max(chains, key=len)
    assert len(longest) <= 7, longest


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_source_file_is_long_or_imports_stock_parakeet(module):
    assert len(MODULES[module].read_text(encoding="utf-8").splitlines()) <= 500
    stock = {target for target, _ in imports(module) if STOCK.search(target)}
    assert stock <= ({"transformers.models.parakeet"} if module == "registration" else set())


def test_no_function_is_over_fifty_lines():
    long = []
    for module, path in MODULES.items():
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        functions = [node for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
        long += [f"{module}.{node.name}" for node in functions if node.end_lineno - node.lineno + 1 > 50]
    assert long == []


def test_the_tests_have_the_layout_of_the_source():
    folders = {path.parent.name for path in TESTS.glob("*/test_*.py")} - {"neighbours"}
    assert folders == set(PACKAGES)


def test_git_holds_no_link_and_no_build_output():
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    listing = subprocess.run(["git", "ls-files", "-s"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    rows = [line.split(maxsplit=3) for line in listing.splitlines()]
    assert [path for mode, _, _, path in rows if mode == "120000"] == []
    outputs = re.compile(r"(^|/)(build|dist|__pycache__|[^/]+\.egg-info)/|\.(pyc|so|whl)$")
    assert [path for *_, path in rows if outputs.search(path)] == []


def test_the_version_is_the_same_everywhere():
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared.group(1) == tp.__version__
