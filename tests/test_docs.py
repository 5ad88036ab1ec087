"""Tests of README and docs: the snippets run and print what the pages say; links, messages, names and pictures exist.

The snippets run with small checkpoints under the names of released ones. A Python or shell snippet that cannot run here
starts with the line `NOT_RUN` and the reason, and is only checked. Commands that start another program than `parakeet`
are only checked, too.
"""

import ast
import importlib
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import pytest
import soundfile
import torch
import typer
from conftest import encoder_fields, noise, tiny_tokenizer
from transformers import TrainingArguments
from typer.testing import CliRunner

import transformers_parakeet as tp
from transformers_parakeet import losses, training
from transformers_parakeet_cli.app import app

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "transformers_parakeet"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
REPOSITORY_URL = "https://github.com/transformers-parakeet/transformers-parakeet"
NOT_RUN = "# not run by the tests: "
# packages that the snippets of docs/moving.md import and that are not installed for the tests
OTHER_PACKAGES = {"nemo", "whisper"}
# the error class of typer for wrong options and subcommands, which typer does not export
USAGE_ERROR = typer.BadParameter.__base__
# a picture of a page should not make the repository large
MAX_PICTURE_BYTES = 150_000


@dataclass(frozen=True)
class Snippet:
    """A fenced block of a page: language ("" without one) and text."""

    language: str
    text: str

    @property
    def is_run(self):
        """Whether the snippet runs in the tests."""
        return not self.text.startswith(NOT_RUN)


def read_snippets(page):
    """Return the fenced blocks of a page from top to bottom."""
    blocks = re.findall(r"^```([^\n`]*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [Snippet(language, text) for language, text in blocks]


SNIPPET_PAGES = [page for page in PAGES if any(snippet.language for snippet in read_snippets(page))]


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
def template(tmp_path_factory, golden):
    """Create a folder with the files that the pages use: checkpoints, `.nemo` files, recordings and manifests."""
    folder = tmp_path_factory.mktemp("docs")
    for kind, name in (("ctc", "parakeet-ctc-1.1b"), ("tdt", "parakeet-tdt-0.6b-v3")):
        write_small_checkpoint(kind, folder / "nvidia" / name)
    hybrid = golden / "hybrid_tdt_ctc" / "model.nemo"
    (folder / "nvidia" / "parakeet-tdt_ctc-110m").mkdir()
    for name in ("nvidia/parakeet-tdt_ctc-110m/parakeet-tdt_ctc-110m.nemo", "parakeet-tdt_ctc-110m.nemo", "model.nemo"):
        shutil.copy(hybrid, folder / name)
    for name in ("audio.wav", "talk.wav", "meeting.mp3", "digits.mp3"):
        soundfile.write(folder / name, noise(2.0), 16000)
    (folder / "text.txt").write_text("five two three zero\n")
    # the content decides how a file is read, not its name
    (folder / "talks" / "monday").mkdir(parents=True)
    shutil.copy(folder / "talk.wav", folder / "talks" / "monday" / "talk.mp4")
    line = json.dumps({"audio_filepath": "audio.wav", "text": "the quick brown fox", "duration": 2.0})
    for name in ("train.jsonl", "dev.jsonl", "test.jsonl"):
        (folder / name).write_text(f"{line}\n{line}\n")
    return folder


@pytest.fixture
def workplace(template, tmp_path, monkeypatch):
    """Copy the files that the pages use to the folder of one test, and change to it."""
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_snippets(page, monkeypatch, capsys):
    """Run the snippets of a page from top to bottom in this process, and check those that do not run.

    Args:
        page: path of the page.
        monkeypatch, capsys: fixtures of pytest.

    Returns:
        (snippet, printed text) for each Python snippet that ran.
    """
    # the page shows that the model can be traced to one graph; generating code for the graph takes a minute
    compile_model = torch.compile
    # the export to ONNX calls `torch.compile` itself, with a backend
    monkeypatch.setattr(
        torch, "compile", lambda *args, **kwargs: compile_model(*args, **{"backend": "eager", **kwargs})
    )
    names = {}
    results = []
    for snippet in read_snippets(page):
        if snippet.language == "python" and snippet.is_run:
            capsys.readouterr()
            exec(compile(snippet.text, page.name, "exec"), names)
            results.append((snippet.text, capsys.readouterr().out))
        elif snippet.language == "python":
            check_imports(snippet.text)
        elif snippet.language == "sh":
            for words in split_commands(snippet.text):
                run_command(words) if snippet.is_run and words[0] == "parakeet" else check_command(words)
        elif snippet.language == "json":
            json.loads(snippet.text)
        else:
            assert snippet.language in ("", "text"), f"{page.name}: no test runs a snippet of type {snippet.language!r}"
    return results


def check_imports(program):
    """Check the syntax of a Python program, and that the names that it imports exist."""
    for node in ast.walk(ast.parse(program)):
        modules = [name.name for name in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module] if isinstance(node, ast.ImportFrom) else []
        for module in modules:
            if module.partition(".")[0] in OTHER_PACKAGES:
                continue
            imported = importlib.import_module(module)
            for name in node.names if isinstance(node, ast.ImportFrom) else []:
                assert hasattr(imported, name.name), f"{module} has no {name.name}"


def split_commands(text):
    """Return the commands of a shell snippet, each as a list of words, without comments."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def run_command(words):
    """Run a command `parakeet …` in this process; it must succeed and print something."""
    if ">" in words:
        # the output is not written to a file
        words = words[: words.index(">")]
    # transformers refuses --bf16 on a machine without a GPU unless the CPU is requested
    cpu_option = ["--use_cpu"] if words[1] == "finetune" else []
    result = CliRunner().invoke(app, [*words[1:], *cpu_option], env={"COLUMNS": "200"})
    assert result.exit_code == 0, f"{shlex.join(words)}: {result.output} {result.exception!r}"
    assert result.output.strip()


def check_command(words):
    """Check that the subcommands, options, targets, extras and scripts of a command exist."""
    program, *arguments = words
    if program == "parakeet":
        check_parakeet_arguments(arguments)
    elif program == "make":
        targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE).group(1).split()
        assert set(arguments) <= set(targets), arguments
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for requested in re.findall(r"\[(.*?)\]", " ".join(arguments)):
            assert set(requested.split(",")) <= set(extras), requested
    elif program in ("python", "torchrun", "accelerate"):
        (position,) = [index for index, word in enumerate(arguments) if word.endswith(".py")]
        check_script_options(arguments[position], arguments[position + 1 :])
    elif "|" in arguments:
        check_command(arguments[arguments.index("|") + 1 :])
    else:
        # a new program needs a check of its own, or the mark `NOT_RUN`
        assert program in ("git", "cd", ".", "python3"), shlex.join(words)


def check_parakeet_arguments(arguments):
    """Parse the arguments of `parakeet` without running the command; unknown subcommands and options raise an error."""
    group = typer.main.get_command(app)
    name, command, rest = group.resolve_command(typer.Context(group), list(arguments))
    context = command.make_context(name, rest)
    check_script_options("examples/finetune.py", context.args)


def check_script_options(script, arguments):
    """Check that a script exists, and that it has the options among its arguments."""
    text = (ROOT / script).read_text(encoding="utf-8")
    finetune_options = {field.name for field in (*fields(training.FinetuneArguments), *fields(TrainingArguments))}
    for option in (argument for argument in arguments if argument.startswith("--")):
        if "finetune_main" in text:
            assert option[2:] in finetune_options, f"{script} {option}"
        else:
            assert f'"{option}"' in text, f"{script} {option}"


@pytest.mark.parametrize("page", SNIPPET_PAGES, ids=lambda page: page.name)
def test_snippets_run_and_print_what_the_page_says(page, workplace, monkeypatch, capsys):
    results = run_snippets(page, monkeypatch, capsys)
    assert not results or any("print(" in snippet for snippet, _ in results)
    for snippet, printed in results:
        # every `print` prints at least one line with something on it
        lines = [line for line in printed.splitlines() if line.strip()]
        assert len(lines) >= len(re.findall(r"^ *print\(", snippet, re.MULTILINE)), snippet
        claims = re.findall(r"# prints (.*)", snippet)
        if claims:
            assert lines == claims
    if page.name == "training.md":
        # `parakeet evaluate` scored the two clips of the manifest with the model that `parakeet finetune` wrote
        assert len((workplace / "clips.jsonl").read_text().splitlines()) == 2


def test_the_snippets_that_do_not_run_are_few_and_give_a_reason():
    marked = [(page.name, snippet) for page in PAGES for snippet in read_snippets(page) if not snippet.is_run]
    pages = {"command_line.md", "conversion.md", "moving.md", "performance.md", "scale.md", "serving.md"}
    assert {name for name, _ in marked} == pages
    for name, snippet in marked:
        assert len(snippet.text.splitlines()[0]) > len(NOT_RUN), name
    # a program that names a function or option that does not exist is refused
    with pytest.raises(AssertionError, match="has no load_nemmo"):
        check_imports("from transformers_parakeet import load_nemmo")
    with pytest.raises(SyntaxError):
        check_imports("print(")
    for command in ("parakeet convert a b --pushh", "parakeet convertt a b", "parakeet finetune --modell x"):
        with pytest.raises((USAGE_ERROR, AssertionError)):
            check_command(shlex.split(command))
    for command in ("make tests", "pip install '.[clii]'", "python examples/finetune.py --modell x", "curl x"):
        with pytest.raises(AssertionError):
            check_command(shlex.split(command))
    with pytest.raises(FileNotFoundError):
        check_command(["python", "examples/finetunee.py"])


def test_usage_states_what_its_examples_print():
    claims = re.findall(r"# prints (.*)", (ROOT / "docs" / "usage.md").read_text(encoding="utf-8"))
    assert len(claims) == 13


def test_the_examples_on_the_model_page_agree_with_each_other(workplace, monkeypatch, capsys):
    results = run_snippets(ROOT / "docs" / "parakeet.md", monkeypatch, capsys)

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
    num_links = 0
    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", page.read_text(encoding="utf-8")):
            if target.startswith(f"{REPOSITORY_URL}/blob/main/"):
                linked_page = ROOT / target.removeprefix(f"{REPOSITORY_URL}/blob/main/")
            elif target.startswith("http"):
                continue
            else:
                linked_page = page.parent / target if target else page
            num_links += 1
            assert linked_page.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(linked_page), f"{page.name}: {target}#{anchor}"
    assert num_links > 40


@cache
def read_messages():
    """Return the string literals of the source without docstrings, with `…` in place of inserted values."""
    messages = []
    for path in sorted((ROOT / "src").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                messages.append("".join(getattr(part, "value", "…") if is_text(part) else "…" for part in node.values))
            elif is_text(node) and id(node) not in docstrings:
                # the place of a value in the messages of `logger`
                messages.append(node.value.replace("%s", "…"))
    return messages


def is_text(node):
    """Return whether a node of a syntax tree is a string literal."""
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def test_the_messages_that_the_docs_quote_exist_in_the_source():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = []
    for table in re.findall(r"^\| message \|.*?(?=^$|\Z)", page, re.MULTILINE | re.DOTALL):
        cells = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[2:]]
        quoted += [re.fullmatch(r"(`+)(.*)\1", cell).group(2).strip() for cell in cells]
    assert len(quoted) > 40
    missing = [quotation for quotation in quoted if not any(quotation in message for message in read_messages())]
    assert not missing


def test_the_functions_that_replace_those_of_other_packages_exist():
    names = set(tp.__all__) | set(dir(tp.ParakeetForTDT)) | {"pipeline", "pipe", "model"}
    rows = re.findall(r"^\| .* \| (.*) \|$", (ROOT / "docs" / "moving.md").read_text(encoding="utf-8"), re.MULTILINE)
    called = [name for row in rows for name in re.findall(r"(\w+)\(", row)]
    assert len(called) >= 9
    assert set(called) <= names


def test_the_reference_describes_every_public_name():
    pages = "".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("parakeet.md", "functions.md"))
    described = []
    for path in re.findall(r"^::: transformers_parakeet\.(.*)$", pages, re.MULTILINE):
        *modules, name = path.split(".")
        described.append(getattr(importlib.import_module(".".join(["transformers_parakeet", *modules])), name))
    public = [(module, name) for module in (tp, training) for name in module.__all__]
    public += [(losses, name) for name in losses.__all__ if name.endswith("loss")]
    for module, name in public:
        assert described.count(getattr(module, name)) == 1, name


def test_the_site_builds_and_loads_nothing_from_other_servers(tmp_path):
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("mkdocstrings_handlers") is None:
        pytest.skip("needs mkdocs-material and mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = sorted(tmp_path.glob("*.html"))
    assert len(pages) > len(list((ROOT / "docs").glob("*.md")))  # and the page for a wrong address
    for page in pages:
        html = page.read_text(encoding="utf-8")
        assert not re.findall(r'<(?:script|img|iframe)[^>]*\bsrc="?(?:https?:)?//[^>]*>', html), page.name
        assert not re.findall(r'<link\b(?![^>]*canonical)[^>]*\bhref="?(?:https?:)?//[^>]*>', html), page.name


def import_program(path):
    """Import a program that is not part of the package.

    Args:
        path: path of the file in the repository.
    """
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    program = importlib.util.module_from_spec(spec)
    # dataclasses look up the module of a class by its name
    sys.modules[spec.name] = program
    spec.loader.exec_module(program)
    return program


def test_the_picture_of_the_speed_shows_the_tables():
    program = import_program("benchmarks/plot_performance.py")
    cases = program.read_cases(program.DOCS.joinpath("performance.md").read_text(encoding="utf-8"))
    speedups = {case.name: case.speedup for case in cases}
    # the fastest case of each table, as the README states it
    assert len(cases) == 14
    assert speedups["encoder, batch 8, 10 s, bfloat16"] == 2.39
    assert speedups["greedy TDT, float32, batch 16, 375 frames"] == 2.69
    assert speedups["loss with joint network, B=2, T=250, U=80, V=1025"] == 3.80
    assert program.PICTURE.read_text(encoding="utf-8") == program.draw(cases), "run benchmarks/plot_performance.py"
    # the longest bar is 7.50 / 1.25 times as long as the shortest one, within half a pixel each
    widths = [int(width) for width in re.findall(r'width="(\d+)" height="16"', program.draw(cases))]
    assert max(widths) / min(widths) == pytest.approx(7.50 / 1.25, rel=0.02)


def test_the_picture_of_the_words_shows_what_the_pipeline_returns(tmp_path):
    example = import_program("examples/plot_alignment.py")
    clip = tp.demo_model_path() / "clips" / "one_two_three.flac"
    features, frame_s, words = example.recognise(str(clip), str(tp.demo_model_path()))
    assert [word["text"].strip() for word in words] == ["one", "two", "three"]
    # times as in tests/cli/test_app.py
    assert [word["timestamp"] for word in words] == [(0.08, 0.48), (1.04, 1.52), (2.16, 2.56)]
    # one column of the spectrogram per 10 ms of the recording
    assert features.shape[1] == 80
    assert len(features) * frame_s == pytest.approx(soundfile.info(clip).duration, abs=0.02)
    pytest.importorskip("matplotlib")
    example.draw(features, frame_s, words, str(tmp_path / "picture.png"))
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_pictures_are_small_and_need_no_other_file():
    pictures = sorted((ROOT / "docs" / "images").iterdir())
    assert {picture.suffix for picture in pictures} <= {".png", ".svg"}
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for picture in pictures:
        assert picture.stat().st_size < MAX_PICTURE_BYTES
        assert f"images/{picture.name})" in pages, f"no page shows {picture.name}"
        if picture.suffix == ".svg":
            names = [name for element in ElementTree.parse(picture).iter() for name in element.attrib]
            assert not [name for name in names if name.endswith("href")]


def test_the_tree_in_the_readme_matches_the_source():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = re.search(r"```\nsrc/transformers_parakeet/\n(.*?)```", text, re.DOTALL).group(1)
    # entries below src/transformers_parakeet are indented by two spaces
    listed = set(re.findall(r"^  (\S+)", tree, re.MULTILINE))
    modules = {path.name for path in SOURCE.glob("*.py")} - {"__init__.py"}
    packages = {f"{path.parent.name}/" for path in SOURCE.glob("*/__init__.py")}
    assert listed == modules | packages | {"demo_model/"}
    for folder in re.findall(r"^([a-z]\S*/)", tree, re.MULTILINE):
        assert (ROOT / folder).is_dir(), folder


def test_no_text_says_to_install_this_package_from_an_index():
    patterns = ("*.md", "docs/*.md", "src/**/*.py", "examples/*.py", "examples/*.md")
    pages = [page for pattern in patterns for page in ROOT.glob(pattern)]
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
