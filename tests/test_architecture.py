"""Tests of the layout: allowed imports as in docs/design.md, import depth, lengths of files and functions."""

import ast
import re
import subprocess
import sys
from functools import cache

import pytest
from conftest import TESTS

import transformers_parakeet as tp

ROOT = TESTS.parent
SOURCE = ROOT / "src" / "transformers_parakeet"
# the command is a package beside the library; in the table and in the tests it is named `cli`
CLI_SOURCE = ROOT / "src" / "transformers_parakeet_cli"
FILES = sorted([*SOURCE.rglob("*.py"), *CLI_SOURCE.rglob("*.py")])
PACKAGES = sorted(["cli", *(path.parent.name for path in SOURCE.glob("*/__init__.py"))])
STOCK_PARAKEET = re.compile(r"models\.parakeet|loss_tdt|loss_rnnt")


def read_import_table():
    """Read from docs/design.md which modules and sub-packages each module or sub-package may import."""
    allowed = {}
    rows = re.findall(
        r"^\| `([a-z_]+)/?` \|.*\|([^|]*)\|$", (ROOT / "docs" / "design.md").read_text("utf-8"), re.MULTILINE
    )
    for name, imports in rows:
        names = set(re.findall(r"`([a-z_]+)`", imports))
        # a row can also say "every module above", or "every module above except" some names
        allowed[name] = set(allowed) - names if imports.strip().startswith("every module above") else names
    return allowed


ALLOWED = read_import_table()


def module_name(path):
    """Return the name of a source file relative to the package: `nemo.reader`, and `nemo` for `nemo/__init__.py`."""
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return relative_name(".".join(part for part in parts if part != "__init__"))


def relative_name(name):
    """Return the name of a module relative to the package; the modules of the command get names like `cli.app`."""
    top, _, rest = name.partition(".")
    return ".".join(filter(None, ["cli" if top == CLI_SOURCE.name else "", rest]))


MODULES = {module_name(path): path for path in FILES}


def walk_module_level(tree):
    """Yield the nodes of a syntax tree that run when the module is imported, which the bodies of functions do not."""
    nodes = [tree]
    while nodes:
        node = nodes.pop()
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            nodes += ast.iter_child_nodes(node)


@cache
def find_imports(module, walk=ast.walk):
    """Return (imported module, imported names) for each import statement of a source file.

    The name of a module of this package starts with a dot and is relative to the package, such as `.nemo.reader`.
    """
    path = MODULES[module]
    package = list(path.relative_to(SOURCE.parent).parts[:-1])
    statements = []
    for node in walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            statements += [(alias.name, ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # `package` without the folders that the dots of a relative import leave; empty for an absolute import
            base = package[: len(package) - node.level + 1] if node.level else []
            target = ".".join([*base, *([node.module] if node.module else [])])
            if target.partition(".")[0] in (SOURCE.name, CLI_SOURCE.name):
                target = f".{relative_name(target)}"
            statements.append((target, tuple(alias.name for alias in node.names)))
    return statements


def defining_module(package, name):
    """Return the module from which the `__init__` of a sub-package re-exports a name."""
    for target, names in find_imports(package):
        if name in names:
            return target.strip(".")
    return package


def imported_modules(module):
    """Return the modules of this package that are imported together with a module.

    A name that a sub-package re-exports counts for its defining module.
    """
    targets = set()
    for target, names in find_imports(module, walk_module_level):
        if not target.startswith("."):
            continue
        base = target.strip(".")
        for name in names:
            submodule = f"{base}.{name}".strip(".")
            if base in PACKAGES:
                targets.add(defining_module(base, name))
            else:
                targets.add(submodule if submodule in MODULES else base)
    return targets


def table_row(module):
    """Return the name of the row of the import table that applies to a module: the first part of its name."""
    return module.partition(".")[0]


def test_every_module_has_a_row_in_the_table():
    assert {table_row(module) for module in MODULES} - {""} == ALLOWED.keys()


@pytest.mark.parametrize("module", sorted(set(MODULES) - {""}))
def test_a_module_imports_only_what_the_table_allows(module):
    row = table_row(module)
    targets = {target.strip(".") for target, _ in find_imports(module) if target.startswith(".")}
    targets = {target for target in targets if table_row(target) != row}
    # only the command may import the public names of the package itself, whose name is empty here
    public_package = {""} if row == "cli" else set()
    assert {table_row(target) for target in targets} - public_package <= ALLOWED[row]
    # names of another sub-package are imported from its `__init__`, not from its files
    assert not {target for target in targets if "." in target}


@pytest.mark.parametrize("package", PACKAGES)
def test_the_init_of_a_sub_package_only_re_exports(package):
    body = ast.parse(MODULES[package].read_text(encoding="utf-8")).body
    assert isinstance(body[0], ast.Expr)
    assert isinstance(body[-1], ast.Assign)
    assert body[-1].targets[0].id == "__all__"
    assert all(isinstance(node, ast.ImportFrom) and node.level == 1 for node in body[1:-1])


# sub-packages that `import transformers_parakeet` does not import, because they are programs on top of the library
PROGRAMS = ("bulk", "serving")


def longest_chain(module, importers=()):
    """Return the longest chain of imports that ends at a module, as a list that starts with the imported module.

    Args:
        module: the module.
        importers: the modules that lead to it, to detect a circle.
    """
    assert module not in importers, f"circular import: {' -> '.join([*importers, module])}"
    chains = [longest_chain(target, (*importers, module)) for target in imported_modules(module) if target]
    return [*max(chains, default=[], key=len), module]


def test_imports_are_not_circular_and_at_most_seven_modules_deep():
    for module in MODULES:
        if module and module not in PACKAGES:
            chain = longest_chain(module)
            # a program on top of the library has layers of its own
            own = [link for link in chain if table_row(link) in PROGRAMS]
            assert len(own) <= 4, chain
            assert len(chain) - len(own) <= 7, chain


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_source_file_is_too_long_or_imports_stock_parakeet(module):
    assert len(MODULES[module].read_text(encoding="utf-8").splitlines()) <= 500
    stock = {target for target, _ in find_imports(module) if STOCK_PARAKEET.search(target)}
    assert stock <= ({"transformers.models.parakeet"} if module == "registration" else set())


@pytest.mark.parametrize("module", [module for module in sorted(MODULES) if module.startswith("cli.")])
def test_the_command_imports_the_library_only_inside_functions(module):
    libraries = {target.partition(".")[0] for target, _ in find_imports(module, walk_module_level)}
    assert libraries <= {"", "rich", "typer", *sys.stdlib_module_names}
    # a name that starts with a dot is a module of this project
    targets = {target for target, _ in find_imports(module, walk_module_level) if target.startswith(".")}
    assert all(target.startswith(".cli") for target in targets)


def test_no_function_is_longer_than_fifty_lines():
    too_long = []
    for module, path in MODULES.items():
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        functions = [node for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
        too_long += [f"{module}.{node.name}" for node in functions if node.end_lineno - node.lineno + 1 > 50]
    assert too_long == []


def test_every_sub_package_has_a_folder_of_tests():
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


def is_subcommand(module, name):
    """Return whether a function is a subcommand of `parakeet`, whose options have help texts instead of `Args`."""
    return module == f"cli.{name}"


def find_public_functions(tree):
    """Yield the functions of a module and the methods of its classes whose names have no underscore at the start."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield from find_public_functions(node)
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node


@pytest.mark.parametrize("module", sorted(MODULES))
def test_every_public_function_documents_its_arguments(module):
    undocumented = []
    for function in find_public_functions(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        has_arguments = bool({argument.arg for argument in arguments} - {"self", "cls"})
        has_documentation = "Args:" in (ast.get_docstring(function) or "") or is_subcommand(module, function.name)
        if has_arguments and not has_documentation:
            undocumented.append(function.name)
    assert undocumented == []


def test_the_version_is_the_same_everywhere():
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared.group(1) == tp.__version__
