"""The folder as a Hub kernel: its layout, and that its programs compile for GPUs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent
SOURCES = {path.name: path for path in (FOLDER / "torch-ext" / "transducer_loss").glob("*.py")}


@pytest.fixture(scope="module")
def hub_layout(tmp_path_factory):
    """The kernel as `build_layout.py` writes it."""
    folder = tmp_path_factory.mktemp("transducer-loss")
    subprocess.run([sys.executable, str(FOLDER / "build_layout.py"), str(folder)], check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_a_variant_is_the_source_and_its_metadata(backend, hub_layout):
    variant = hub_layout / "build" / f"torch-{backend}"
    assert {path.name for path in variant.iterdir()} == {*SOURCES, "metadata.json"}
    for name, path in SOURCES.items():
        assert (variant / name).read_text() == path.read_text()
    metadata = json.loads((variant / "metadata.json").read_text())
    assert metadata == {
        "name": "transducer-loss",
        "id": f"_transducer_loss_{backend}_1",
        "version": 1,
        "license": "Apache-2.0",
        # `kernels` refuses a kernel that lists triton: it is installed with torch
        "python-depends": [],
        "backend": {"type": backend},
    }


def test_kernels_loads_the_layout_of_the_hub(hub_layout):
    kernels = pytest.importorskip("kernels")
    pytest.importorskip("triton")
    module = kernels.get_local_kernel(hub_layout)
    assert module.layers.TransducerLoss.has_backward
    assert set(module.__all__) == {"layers", "transducer_loss", "transducer_loss_from_logits"}
    loaded = [kernel for kernel in kernels.get_loaded_kernels() if kernel.module is module]
    assert [str(kernel.metadata.name) for kernel in loaded] == ["transducer-loss"]


def test_the_build_files_name_the_kernel():
    build = (FOLDER / "build.toml").read_text()
    assert re.search(r'^\[general\.hub\]\nrepo-id = "transformers-parakeet/transducer-loss"$', build, re.MULTILINE)
    assert "genKernelFlakeOutputs" in (FOLDER / "flake.nix").read_text()
    assert (FOLDER / "CARD.md").read_text().startswith("---\nlibrary_name: kernels\n")


def test_the_folder_has_no_links_and_no_build():
    assert not (FOLDER / "build").exists()
    assert [path for path in FOLDER.rglob("*") if path.is_symlink()] == []


def test_sources_import_only_themselves_torch_triton_and_the_standard_library():
    allowed = {"__future__", "collections", "contextlib", "dataclasses", "inspect", "os", "torch", "triton", "typing"}
    for path in SOURCES.values():
        imported = re.findall(r"^(?:from|import) (\.?\w*)", path.read_text(), re.MULTILINE)
        assert {name for name in imported if not name.startswith(".")} <= allowed


def test_programs_compile_for_a_gpu(tmp_path):
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    program = Path(__file__).parent / "compile_programs.py"
    done = subprocess.run([sys.executable, str(program), "--quick", "90"], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("sm_90 ") == 19
