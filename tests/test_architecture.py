"""The layout of docs/design.md, read off the source files."""

import ast
import re
from pathlib import Path

import pytest

import transformers_parakeet as tp

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "transformers_parakeet"
MODULES = sorted(path.stem for path in SOURCE.glob("*.py"))

# what each file may import of ours; `__init__` and `cli` may import everything
ALLOWED = {
    "configuration_parakeet": set(),
    "audio": set(),
    "augmentation": set(),
    "timestamps": set(),
    "tokenization_parakeet": {"timestamps"},
    "lattice": set(),
    "fused_loss": {"lattice"},
    "losses": {"fused_loss", "lattice"},
    "decoding": set(),
    "feature_extraction_parakeet": {"audio"},
    "processing_parakeet": {"timestamps", "tokenization_parakeet"},
    "attention": {"configuration_parakeet"},
    "plain_modules": set(),
    "conformer": {"attention", "configuration_parakeet", "plain_modules"},
    "screening": set(),
    "transducer": {"configuration_parakeet", "decoding", "plain_modules", "screening"},
    "generation_parakeet": {"decoding", "plain_modules"},
    "kernel": {"losses"},
    "modeling_parakeet": {
        "attention",
        "augmentation",
        "configuration_parakeet",
        "conformer",
        "transducer",
        "generation_parakeet",
        "kernel",
        "losses",
        "plain_modules",
    },
    "longform": {"timestamps"},
    "pipeline_parakeet": {"audio", "longform", "processing_parakeet", "timestamps"},
    "training_data": {"audio"},
    "update_guard": set(),
    "metrics": set(),
    "training": {
        "audio",
        "augmentation",
        "losses",
        "metrics",
        "processing_parakeet",
        "training_data",
        "update_guard",
    },
    "finetuning": {
        "configuration_parakeet",
        "metrics",
        "modeling_parakeet",
        "nemo",
        "training",
        "training_data",
        "vocabulary",
    },
    "archive": set(),
    "subwords": {"archive", "tokenization_parakeet"},
    "nemo_keys": {"archive", "configuration_parakeet", "feature_extraction_parakeet", "losses"},
    "nemo_settings": {"archive", "configuration_parakeet", "losses", "nemo_keys"},
    "hub": {"archive", "configuration_parakeet", "modeling_parakeet", "processing_parakeet"},
    "nemo": {
        "archive",
        "configuration_parakeet",
        "feature_extraction_parakeet",
        "hub",
        "modeling_parakeet",
        "nemo_keys",
        "nemo_settings",
        "processing_parakeet",
        "subwords",
        "tokenization_parakeet",
    },
    "nemo_export": {
        "archive",
        "configuration_parakeet",
        "feature_extraction_parakeet",
        "nemo",
        "nemo_keys",
        "nemo_settings",
        "subwords",
    },
    "nemo_pipeline": {"hub", "nemo"},
    "conversion": {"archive", "hub", "nemo", "nemo_export"},
    "vocabulary": {"configuration_parakeet", "processing_parakeet", "subwords", "tokenization_parakeet"},
}


def imports(module):
    """Names of the modules that a source file imports, ours as `.name`."""
    found = set()
    for node in ast.walk(ast.parse((SOURCE / f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found


def test_every_module_has_its_place():
    assert set(MODULES) - {"__init__", "cli"} == ALLOWED.keys()


@pytest.mark.parametrize("module", sorted(ALLOWED))
def test_a_module_imports_only_what_the_layout_allows(module):
    ours = {name.removeprefix(".") for name in imports(module) if name.startswith(".")}
    assert ours <= ALLOWED[module]
    assert not [name for name in imports(module) if name.startswith("..")]


@pytest.mark.parametrize("module", MODULES)
def test_no_source_file_is_long_or_leans_on_stock_parakeet(module):
    text = (SOURCE / f"{module}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 600
    stock = {name for name in imports(module) if re.search(r"models\.parakeet|loss_tdt|loss_rnnt", name)}
    assert stock <= ({"transformers.models.parakeet"} if module == "__init__" else set())


def test_no_function_is_over_sixty_lines():
    long = []
    for module in MODULES:
        nodes = ast.walk(ast.parse((SOURCE / f"{module}.py").read_text(encoding="utf-8")))
        functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
        long += [f"{module}.{node.name}" for node in functions if node.end_lineno - node.lineno > 60]
    assert long == []


def test_the_version_stands_in_one_form():
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared.group(1) == tp.__version__
