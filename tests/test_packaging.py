"""What the installed package holds: its packages, its licences, its extras."""

import re

import pytest
from conftest import TESTS

ROOT = TESTS.parent
SOURCE = ROOT / "src"
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
KERNEL_PACKAGE = "transformers_parakeet.losses.transducer_kernel"
DATA_PACKAGES = {
    "transformers_parakeet.demo_model",
    "transformers_parakeet.demo_model.clips",
    "transformers_parakeet.serving.static",
    "transformers_parakeet.verification.clip",
}


def read_list(name):
    """Return the strings of a list in pyproject.toml."""
    found = re.search(rf"^{re.escape(name)} = \[(.*?)\]$", PYPROJECT, re.MULTILINE | re.DOTALL)
    return re.findall(r'"([^"]+)"', found.group(1))


def read_extra(name):
    """Return the names of the packages that an extra installs."""
    return {re.match(r"[\w-]+", requirement).group().lower() for requirement in read_list(name)}


def test_every_package_is_installed():
    folders = {path.parent.relative_to(SOURCE) for path in SOURCE.rglob("__init__.py")}
    packages = {".".join(folder.parts) for folder in folders}
    assert packages | DATA_PACKAGES | {KERNEL_PACKAGE} == set(read_list("packages"))


def test_the_kernel_is_mapped_to_its_only_source():
    mapped = re.search(rf'^"{re.escape(KERNEL_PACKAGE)}" = "(.+)"$', PYPROJECT, re.MULTILINE).group(1)
    assert "from .loss import" in (ROOT / mapped / "__init__.py").read_text(encoding="utf-8")
    copies = [path for path in ROOT.rglob("lattice_programs.py") if not {"dist", ".venv", "build"} & {*path.parts}]
    assert copies == [ROOT / mapped / "lattice_programs.py"]


def test_the_licence_expression_names_the_licences_of_the_data():
    expression = re.search(r'^license = "(.+)"$', PYPROJECT, re.MULTILINE).group(1)
    files = [ROOT / path for path in read_list("license-files")]
    texts = "\n".join(path.read_text(encoding="utf-8") for path in files)
    licences = set(re.findall(r"^(\S+-\S+): \S", texts, re.MULTILINE))
    assert licences == set(expression.split(" AND ")) == {"Apache-2.0", "CC-BY-SA-4.0", "CC-BY-4.0", "BSD-3-Clause"}


@pytest.mark.parametrize("extra", ["cli", "kernels", "train"])
def test_the_development_extra_holds_the_other_extras(extra):
    assert read_extra(extra) <= read_extra("dev")


def test_the_command_and_the_error_rates_are_extras():
    required = read_extra("dependencies")
    assert not required & {"jiwer", "rich", "typer"}
    assert read_extra("cli") == {"jiwer", "rich", "typer"}
    assert "jiwer" in read_extra("train")
