"""Which layer computes the transducer loss, why, and that it is the kernel when the kernel is required.

The kernel runs in processes of their own, by Triton's interpreter on the CPU: Triton reads the choice on import.
"""

import os
import shutil
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from conftest import TESTS

from transformers_parakeet.losses import backend as kernel
from transformers_parakeet.losses.transducer import TransducerLoss

ROOT = TESTS.parent
CPU = torch.zeros(1, 1, 1)
# what `select_loss` looks at, of tensors on a device that is not here
CUDA = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32)
needs_triton = pytest.mark.skipif(
    not (find_spec("triton") and find_spec("kernels")), reason="needs triton and kernels: pip install -e '.[kernels]'"
)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """No choice made outside."""
    monkeypatch.delenv("PARAKEET_KERNEL", raising=False)
    monkeypatch.delenv("LOCAL_KERNELS", raising=False)


@pytest.fixture
def warned(monkeypatch):
    """The warnings that were given."""
    messages = []
    monkeypatch.setattr(kernel.logger, "warning_once", messages.append)
    return messages


def interpreted(code, **variables):
    """Run a program with Triton's interpreter; return the finished process."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, env={**env, **variables}, cwd=ROOT)


@pytest.mark.parametrize("choice", ["auto", "off"])
def test_pytorch_computes_on_the_cpu(choice, warned):
    assert type(kernel.select_loss(choice, CPU, "relu")) is TransducerLoss
    assert warned == []


def test_a_kernel_that_cannot_be_used_is_named_once_and_replaced(monkeypatch, warned):
    monkeypatch.setattr(kernel, "_load", lambda source, device: "no compiler")
    assert type(kernel.select_loss("auto", CUDA, "relu")) is TransducerLoss
    assert warned == ["The transducer loss runs in PyTorch, not in its kernel: no compiler."]
    with pytest.raises(RuntimeError, match="required and cannot be used: no compiler"):
        kernel.select_loss("require", CUDA, "relu")


@pytest.mark.parametrize(
    ("states", "activation", "reason"),
    [
        (CUDA, "silu", "'silu'"),
        (SimpleNamespace(device=CUDA.device, dtype=torch.float64), "relu", "float64"),
    ],
)
def test_what_the_kernel_has_no_code_for(states, activation, reason, monkeypatch, warned):
    monkeypatch.setattr(kernel, "_load", lambda source, device: torch.nn.Identity())
    assert type(kernel.select_loss("auto", states, activation)) is TransducerLoss
    assert reason in warned[0]
    with pytest.raises(RuntimeError, match=reason):
        kernel.select_loss("require", states, activation)
    assert type(kernel.select_loss("auto", CUDA, "relu")) is torch.nn.Identity


def test_the_environment_stands_above_the_argument(monkeypatch, warned):
    loaded = []
    monkeypatch.setattr(kernel, "_load", lambda source, device: loaded.append(source) or torch.nn.Identity())
    monkeypatch.setenv("PARAKEET_KERNEL", "require")
    assert type(kernel.select_loss("off", CPU, "relu")) is torch.nn.Identity
    monkeypatch.setenv("PARAKEET_KERNEL", "off")
    assert type(kernel.select_loss("require", CUDA, "relu")) is TransducerLoss
    monkeypatch.setenv("PARAKEET_KERNEL", "someone/else")
    kernel.select_loss("auto", CPU, "relu")
    monkeypatch.setenv("PARAKEET_KERNEL", "require")
    monkeypatch.setenv("LOCAL_KERNELS", f"other/kernel=/there:{kernel.KERNEL_ID}=/here")
    kernel.select_loss("auto", CPU, "relu")
    # the folder of the package, a kernel on the Hub, and what `LOCAL_KERNELS` gives a folder to
    assert loaded == ["", "someone/else", kernel.KERNEL_ID]
    monkeypatch.setenv("PARAKEET_KERNEL", "on")
    with pytest.raises(ValueError, match="auto, off, require, got 'on'"):
        kernel.select_loss("auto", CPU, "relu")


def test_the_package_holds_the_kernel_for_every_backend():
    for backend in ("cpu", "cuda"):
        build = kernel.FOLDER / "build" / f"torch-{backend}"
        assert (build / "metadata.json").is_file()
        assert "class TransducerLoss" in (build / "layers.py").read_text()


@needs_triton
def test_a_model_trains_with_the_kernel_that_it_requires():
    done = interpreted(
        """
        import kernels, torch
        import transformers_parakeet as tp
        from tests.conftest import encoder_fields

        torch.manual_seed(0)
        config = tp.ParakeetTDTConfig(
            vocab_size=9, blank_token_id=8, pad_token_id=2, decoder_hidden_size=8, joint_hidden_size=8,
            num_decoder_layers=1, durations=[0, 1, 2], loss_sigma=0.05, encoder_config=encoder_fields(),
        )
        model = tp.ParakeetForTDT(config)
        clips, labels = torch.randn(2, 48, 80), torch.tensor([[4, 5, 6], [3, 2, -100]])

        def step(choice):
            model.config.kernel = choice
            model.zero_grad()
            loss = model(clips, labels=labels).loss
            loss.backward()
            return loss.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

        model.eval()
        plain = step("off")
        assert kernels.get_loaded_kernels() == []
        step("require")
        # count from here on: the first use also tries the kernel
        (loaded,) = kernels.get_loaded_kernels()
        calls, compute = [], loaded.module.layers.transducer_loss
        loaded.module.layers.transducer_loss = lambda *given: calls.append(given) or compute(*given)
        fused = step("require")
        assert len(calls) == 1, calls
        step("off")
        assert len(calls) == 1, calls
        assert len(plain[1]) == len(fused[1]) > 20
        # a bias of keys has no gradient, only rounding
        worst = max((a - b).abs().max() / a.abs().max().clamp(min=1e-3) for a, b in zip(plain[1], fused[1]))
        # measured: 1e-7 and 1.2e-5, the latter for a bias of keys
        assert abs(plain[0] - fused[0]) < 1e-6 * plain[0], (plain[0], fused[0])
        assert worst < 4e-5, worst
        print("trained with", loaded.metadata.name)
        """
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "trained with transducer-loss" in done.stdout


class Strict(TransducerLoss):
    """One option is not quite what it should be."""

    def forward(self, *args, sigma=0.0, **kwargs):
        return super().forward(*args, sigma=2 * sigma, **kwargs)


class Slanted(TransducerLoss):
    """The value is right, one gradient is not."""

    def forward(self, encoder_states, *args, **kwargs):
        shifted = encoder_states + 0.05 * (encoder_states - encoder_states.detach())
        return super().forward(shifted, *args, **kwargs)


@pytest.mark.parametrize(("layer", "reason"), [(Strict, "its loss differs"), (Slanted, "its encoder differs")])
def test_a_kernel_that_disagrees_with_pytorch_is_not_used(layer, reason, monkeypatch):
    monkeypatch.setattr(kernel.inspect, "signature", lambda forward: SimpleNamespace(parameters=()))
    assert reason in kernel._disagreement(layer(), CPU.device)
    assert kernel._disagreement(TransducerLoss(), CPU.device) is None


def test_a_kernel_with_other_arguments_is_not_used():
    assert "its arguments are args, sigma, kwargs" in kernel._disagreement(Strict(), CPU.device)


@needs_triton
def test_local_kernels_replaces_the_kernel(tmp_path):
    folder = tmp_path / "kernel"
    shutil.copytree(kernel.FOLDER / "build", folder / "build", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "build" / "torch-cpu" / "layers.py").write_text("raise ImportError('planted')")
    done = interpreted(
        """
        import torch
        from transformers_parakeet.losses import backend as kernel
        kernel.select_loss("require", torch.zeros(1), "relu")
        """,
        LOCAL_KERNELS=f"{kernel.KERNEL_ID}={folder}",
    )
    assert done.returncode == 1
    assert "the kernel of the transducer loss is required and cannot be used: ImportError: planted" in done.stderr


@needs_triton
@pytest.mark.parametrize("some", ["not compile", pytest.param("compile", marks=pytest.mark.slow)])
def test_the_kernel_passes_its_own_tests(some):
    folder = ROOT / "hub_kernels" / "transducer-loss"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
        str(folder / "tests"),
        "-k",
        some,
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
