"""The folder as a Hub kernel: what `kernels` reads of it, and that its programs compile for GPUs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent
SOURCES = {path.name: path for path in (FOLDER / "torch-ext" / "transducer_loss").glob("*.py")}


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_a_build_is_the_sources_and_their_metadata(backend):
    build = FOLDER / "build" / f"torch-{backend}"
    assert {path.name for path in build.glob("*.*")} == {*SOURCES, "metadata.json"}
    for name, path in SOURCES.items():
        assert (build / name).read_text() == path.read_text(), f"{name}: link it to the sources again"
    metadata = json.loads((build / "metadata.json").read_text())
    general = (FOLDER / "build.toml").read_text()
    for field in ("name", "version", "license"):
        assert f"{field} = {json.dumps(metadata[field])}\n" in general
    assert metadata["backend"]["type"] == backend
    assert f'"{backend}"' in re.search(r"^backends = (.+)$", general, re.MULTILINE).group(1)
    # `kernels` refuses a kernel that names triton here: torch brings it
    assert metadata["python-depends"] == []


def test_kernels_loads_it():
    kernels = pytest.importorskip("kernels")
    pytest.importorskip("triton")
    module = kernels.get_local_kernel(FOLDER)
    assert module.layers.TransducerLoss.has_backward
    assert set(module.__all__) == {"layers", "transducer_loss", "transducer_loss_from_logits"}
    loaded = [kernel for kernel in kernels.get_loaded_kernels() if kernel.module is module]
    assert [str(kernel.metadata.name) for kernel in loaded] == ["transducer-loss"]


def test_sources_import_only_themselves_torch_and_triton():
    allowed = {"__future__", "collections", "contextlib", "dataclasses", "os", "torch", "triton", "typing", ""}
    for path in SOURCES.values():
        found = re.findall(r"^(?:from|import) (\.?\w*)", path.read_text(), re.MULTILINE)
        assert {name for name in found if not name.startswith(".")} <= allowed


def test_programs_compile_for_a_gpu(tmp_path):
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    program = Path(__file__).parent / "compile_programs.py"
    done = subprocess.run([sys.executable, str(program), "--quick", "90"], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("sm_90 ") == 19
