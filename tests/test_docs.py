"""Runs every Python snippet of README and docs, each page from top to bottom, on small models."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import encoder_fields, noise, tiny_tokenizer

import transformers_parakeet as tp

ROOT = Path(__file__).parent.parent
PAGES = [
    page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if "```python" in page.read_text()
]


def small_model(kind, folder):
    """Write a random checkpoint with the given head."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(kind)
    extra = {} if kind == "ctc" else {"blank_token_id": len(tokenizer) - 1, "decoder_hidden_size": 16}
    config = getattr(tp, f"Parakeet{kind.upper()}Config")(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, encoder_config=encoder_fields(), **extra
    )
    getattr(tp, f"ParakeetFor{kind.upper()}")(config).save_pretrained(folder)
    tp.ParakeetProcessor(tp.ParakeetFeatureExtractor(), tokenizer, decoder_type=kind).save_pretrained(folder)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, golden):
    """A folder with what the pages name: checkpoints, a `.nemo` file, a recording."""
    folder = tmp_path_factory.mktemp("docs")
    for kind, name in (("ctc", "parakeet-ctc-1.1b"), ("tdt", "parakeet-tdt-0.6b-v3")):
        small_model(kind, folder / "nvidia" / name)
    shutil.copy(golden / "hybrid_tdt_ctc" / "model.nemo", folder / "parakeet-tdt_ctc-110m.nemo")
    soundfile.write(folder / "audio.wav", noise(2.0), 16000)
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_snippets_run(page, workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    # tracing is what the page shows; the compiler behind it takes a minute
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **kwargs: real(model, backend="eager", **kwargs))
    names = {}
    snippets = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    for snippet in snippets:
        exec(compile(snippet, page.name, "exec"), names)
    printed = capsys.readouterr().out
    assert printed.count("\n") >= sum(snippet.count("print(") > 0 for snippet in snippets) > 0


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readmes_tree_is_the_source():
    tree = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "src" / "transformers_parakeet").glob("*.py"):
        assert path.name in tree or path.name == "__init__.py", path.name


def test_no_text_tells_to_install_this_package_from_an_index():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("src/**/*.py"), *ROOT.glob("examples/*")]
    wrong = [str(page) for page in pages if "pip install transformers-parakeet" in page.read_text(encoding="utf-8")
             or "'transformers-parakeet[" in page.read_text(encoding="utf-8")]  # fmt: skip
    assert len(pages) > 30
    assert wrong == []


def test_what_an_example_writes_is_ignored_by_git():
    if not (ROOT / ".git").exists():
        pytest.skip("no git repository")
    done = subprocess.run(["git", "check-ignore", "from-scratch/model.safetensors"], cwd=ROOT, capture_output=True)
    assert done.returncode == 0
