"""Tests of README and docs: the snippets run and print what the pages say, links work, the tree is complete."""

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


def write_small_checkpoint(kind, folder):
    """Write a small random checkpoint.

    Args:
        kind: "ctc", "rnnt" or "tdt".
        folder: folder to write.
    """
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(kind)
    transducer_fields = {"blank_token_id": len(tokenizer) - 1, "decoder_hidden_size": 16}
    config = getattr(tp, f"Parakeet{kind.upper()}Config")(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        encoder_config=encoder_fields(),
        **({} if kind == "ctc" else transducer_fields),
    )
    getattr(tp, f"ParakeetFor{kind.upper()}")(config).save_pretrained(folder)
    tp.ParakeetProcessor(tp.ParakeetFeatureExtractor(), tokenizer, decoder_type=kind).save_pretrained(folder)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, golden):
    """Create a folder with the files that the pages use: checkpoints, a `.nemo` file and a recording."""
    folder = tmp_path_factory.mktemp("docs")
    for kind, name in (("ctc", "parakeet-ctc-1.1b"), ("tdt", "parakeet-tdt-0.6b-v3")):
        write_small_checkpoint(kind, folder / "nvidia" / name)
    shutil.copy(golden / "hybrid_tdt_ctc" / "model.nemo", folder / "parakeet-tdt_ctc-110m.nemo")
    soundfile.write(folder / "audio.wav", noise(2.0), 16000)
    return folder


def run_snippets(page, folder, monkeypatch, capsys):
    """Run the Python snippets of a page from top to bottom.

    Args:
        page: path of the page.
        folder: folder to run in.
        monkeypatch, capsys: fixtures of pytest.

    Returns:
        (snippet, printed text) for each snippet.
    """
    monkeypatch.chdir(folder)
    # the page shows that the model can be traced to one graph; generating code for the graph takes a minute
    compile_model = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **kwargs: compile_model(model, backend="eager", **kwargs))
    names = {}
    results = []
    for snippet in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        capsys.readouterr()
        exec(compile(snippet, page.name, "exec"), names)
        results.append((snippet, capsys.readouterr().out))
    return results


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_snippets_run_and_print_what_the_page_says(page, workplace, monkeypatch, capsys):
    results = run_snippets(page, workplace, monkeypatch, capsys)
    assert any("print(" in snippet for snippet, _ in results)
    for snippet, printed in results:
        # every `print` prints at least one line with something on it
        lines = [line for line in printed.splitlines() if line.strip()]
        assert len(lines) >= len(re.findall(r"^ *print\(", snippet, re.MULTILINE)), snippet
        claims = re.findall(r"# prints (.*)", snippet)
        if claims:
            assert lines == claims


def test_usage_states_what_its_examples_print():
    claims = re.findall(r"# prints (.*)", (ROOT / "docs" / "usage.md").read_text(encoding="utf-8"))
    assert len(claims) == 9


def test_the_examples_on_the_model_page_agree_with_each_other(workplace, monkeypatch, capsys):
    results = run_snippets(ROOT / "docs" / "parakeet.md", workplace, monkeypatch, capsys)

    def printed_by(text):
        """Return the lines that the snippet with this text prints."""
        (lines,) = [printed.splitlines() for snippet, printed in results if text in snippet]
        return lines

    (pipeline_text,) = printed_by('out["text"]')
    assert len(pipeline_text) > 10
    # the same checkpoint by pipeline, and by model and processor; the latter also prints times
    assert printed_by("durations=output.durations")[0].startswith(pipeline_text)
    (ctc_texts,) = printed_by("outputs = model.generate(**inputs)")
    (compiled_ctc_texts,) = printed_by("torch.compile")
    assert compiled_ctc_texts == ctc_texts
    assert len(ctc_texts) > 10
    # the loss with and without the joint network
    fused_loss, loss = printed_by("transducer_loss(")
    assert fused_loss == loss


def anchors(page):
    """Return the anchors of the headings of a Markdown page: lower case, without punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_point_to_existing_files_and_headings():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
            if target.startswith("http"):
                continue
            linked_page = page.parent / target if target else page
            assert linked_page.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(linked_page), f"{page.name}: {target}#{anchor}"


def test_the_tree_in_the_readme_matches_the_source():
    source = ROOT / "src" / "transformers_parakeet"
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = re.search(r"```\nsrc/transformers_parakeet/\n(.*?)```", text, re.DOTALL).group(1)
    # entries below src/transformers_parakeet are indented by two spaces
    listed = set(re.findall(r"^  (\S+)", tree, re.MULTILINE))
    modules = {path.name for path in source.glob("*.py")} - {"__init__.py"}
    packages = {f"{path.parent.name}/" for path in source.glob("*/__init__.py")}
    assert listed == modules | packages | {"demo_model/"}
    for folder in re.findall(r"^([a-z]\S*/)", tree, re.MULTILINE):
        assert (ROOT / folder).is_dir(), folder


def test_no_text_says_to_install_this_package_from_an_index():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("src/**/*.py"), *ROOT.glob("examples/*")]
    assert len(pages) > 30
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert "pip install transformers-parakeet" not in text, page
        assert "'transformers-parakeet[" not in text, page


def test_git_ignores_the_output_of_the_examples():
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    done = subprocess.run(["git", "check-ignore", "from-scratch/model.safetensors"], cwd=ROOT, capture_output=True)
    assert done.returncode == 0
