"""Which layer computes the transducer loss, why, and that it is the kernel when the kernel is required.

The kernel runs by Triton's interpreter on the CPU, each time in a new process: Triton reads `TRITON_INTERPRET` on
import.
"""

import os
import subprocess
import sys
import textwrap
import threading
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from conftest import TESTS

from transformers_parakeet.losses import TransducerLoss, backend

ROOT = TESTS.parent
KERNEL_FOLDER = ROOT / "hub_kernels" / "transducer-loss"
CPU_STATES = torch.zeros(1, 1, 6)
# has what `select_loss` reads of a tensor on a device that this machine may lack
CUDA_STATES = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32)
WEIGHT = torch.zeros(9, 6)
CPU_SETTINGS = backend.JointSettings(torch.device("cpu"), torch.float32, 7, 6, (0, 1, 2), "relu")
needs_triton = pytest.mark.skipif(not find_spec("triton"), reason="needs triton: pip install -e '.[kernels]'")
needs_kernels = pytest.mark.skipif(
    not (find_spec("triton") and find_spec("kernels")), reason="needs triton and kernels: pip install -e '.[kernels]'"
)


@pytest.fixture(autouse=True)
def no_choice_from_outside(monkeypatch):
    """Remove the environment variables that choose a kernel, and the results of earlier checks."""
    monkeypatch.delenv("PARAKEET_KERNEL", raising=False)
    monkeypatch.delenv("LOCAL_KERNELS", raising=False)
    monkeypatch.setattr(backend, "_checked_kernels", {})


@pytest.fixture
def warnings(monkeypatch):
    """The warnings that were logged."""
    messages = []
    monkeypatch.setattr(backend.logger, "warning_once", messages.append)
    return messages


@pytest.fixture
def use_kernel(monkeypatch):
    """A function that makes `check_kernel` return a layer or a problem, and the repositories that were asked for."""
    repositories = []

    def use(layer=None, problem=""):
        def check_kernel(repository, settings, pytorch_loss):
            repositories.append(repository)
            return backend.CheckedKernel(layer, problem)

        monkeypatch.setattr(backend, "check_kernel", check_kernel)
        return repositories

    return use


def select(choice, states=CPU_STATES, activation="relu", weight=WEIGHT, durations=(0, 1)):
    """Call `select_loss` for a small joint network."""
    return backend.select_loss(choice, TransducerLoss(), states, weight, durations, activation)


def run_interpreted(code, **variables):
    """Run a program with Triton's interpreter; return the finished process."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, env={**env, **variables}, cwd=ROOT)


@pytest.mark.parametrize("choice", ["auto", "off"])
def test_pytorch_computes_on_the_cpu(choice, warnings):
    assert type(select(choice)) is TransducerLoss
    assert warnings == []


def test_a_kernel_that_cannot_be_used_is_replaced_with_one_warning(use_kernel, warnings):
    use_kernel(problem="no compiler")
    assert type(select("auto", CUDA_STATES)) is TransducerLoss
    assert warnings == ["The transducer loss is computed in PyTorch, not by its kernel: no compiler."]
    with pytest.raises(RuntimeError, match="required and cannot be used: no compiler"):
        select("require", CUDA_STATES)


@pytest.mark.parametrize(
    ("states", "activation", "reason"),
    [
        (CUDA_STATES, "silu", "'silu'"),
        (SimpleNamespace(device=CUDA_STATES.device, dtype=torch.float64), "relu", "float64"),
    ],
)
def test_pytorch_computes_what_the_kernel_has_no_code_for(states, activation, reason, monkeypatch, warnings):
    monkeypatch.setattr(backend, "load_layer", lambda repository: torch.nn.Identity())
    monkeypatch.setattr(backend, "describe_difference", lambda layer, pytorch_loss, settings: None)
    assert type(select("auto", states, activation)) is TransducerLoss
    assert reason in warnings[0]
    with pytest.raises(RuntimeError, match=reason):
        select("require", states, activation)
    assert type(select("auto", CUDA_STATES)) is torch.nn.Identity


def test_the_environment_overrides_the_argument(use_kernel, monkeypatch, warnings):
    repositories = use_kernel(torch.nn.Identity())
    monkeypatch.setenv("PARAKEET_KERNEL", "require")
    assert type(select("off")) is torch.nn.Identity
    monkeypatch.setenv("PARAKEET_KERNEL", "off")
    assert type(select("require", CUDA_STATES)) is TransducerLoss
    monkeypatch.setenv("PARAKEET_KERNEL", "someone/else")
    select("auto")
    monkeypatch.setenv("PARAKEET_KERNEL", "require")
    monkeypatch.setenv("LOCAL_KERNELS", f"other/kernel=/there:{backend.KERNEL_ID}=/here")
    select("auto")
    # the kernel of the package, a kernel on the Hub, and the kernel that `LOCAL_KERNELS` maps to a folder
    assert repositories == ["", "someone/else", backend.KERNEL_ID]
    monkeypatch.setenv("PARAKEET_KERNEL", "on")
    with pytest.raises(ValueError, match="auto, off, require, got 'on'"):
        select("auto")


def test_a_kernel_is_checked_once_for_each_joint_network(use_kernel):
    repositories = use_kernel(torch.nn.Identity())
    for _ in range(2):
        select("require")
        select("require", durations=None)
        select("require", weight=torch.zeros(11, 6))
        select("require", weight=torch.zeros(9, 6, dtype=torch.float16), states=CPU_STATES.half())
        select("require", activation="tanh")
    assert len(repositories) == len(backend._checked_kernels) == 5


def test_the_settings_are_those_of_the_joint_network():
    settings = backend.read_joint_settings(CPU_STATES, WEIGHT, [0, 1], "tanh")
    assert settings == backend.JointSettings(torch.device("cpu"), torch.float32, 7, 6, (0, 1), "tanh")
    with torch.autocast("cpu", torch.bfloat16):
        settings = backend.read_joint_settings(CPU_STATES, WEIGHT, None, "relu")
    assert settings == backend.JointSettings(torch.device("cpu"), torch.bfloat16, 9, 6, None, "relu")


def test_threads_share_one_check(use_kernel, monkeypatch):
    repositories = use_kernel(torch.nn.Identity())
    check_kernel, barrier = backend.check_kernel, threading.Barrier(4)
    layers = []

    def check_slowly(*arguments):
        threading.Event().wait(0.05)
        return check_kernel(*arguments)

    def call():
        barrier.wait()
        layers.append(select("require"))

    monkeypatch.setattr(backend, "check_kernel", check_slowly)
    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert repositories == [""]
    assert len(layers) == 4
    assert len(set(layers)) == 1


def test_the_check_has_several_tiles_of_frames_and_labels():
    frames, labels = zip(*backend.CHECK_LENGTHS, strict=True)
    programs = (KERNEL_FOLDER / "torch-ext" / "transducer_loss").glob("*.py")
    source = "\n".join(path.read_text(encoding="utf-8") for path in programs)
    assert "BLOCK_N = 16\n" in source
    assert "BLOCK_U = 1024\n" in source
    assert max(frames) > 2 * 16
    assert max(labels) > 1024
    assert min(labels) == 0


class DoubledSigma(TransducerLoss):
    """A kernel whose loss is wrong."""

    def forward(self, *args, sigma=0.0, **kwargs):
        return super().forward(*args, sigma=2 * sigma, **kwargs)


class WrongEncoderGradient(TransducerLoss):
    """A kernel whose loss is right, and one of whose gradients is 5 % too large."""

    def forward(self, encoder_states, *args, **kwargs):
        shifted = encoder_states + 0.05 * (encoder_states - encoder_states.detach())
        return super().forward(shifted, *args, **kwargs)


class NanBiasGradient(TransducerLoss):
    """A kernel with NaN in the gradient of the bias."""

    def forward(self, encoder_states, predictor_states, head_weight, head_bias, *args, **kwargs):
        poisoned = head_bias + torch.nan * (head_bias - head_bias.detach()).nan_to_num()
        return super().forward(encoder_states, predictor_states, head_weight, poisoned, *args, **kwargs)


class WrongAfterTheFirstUtterance(TransducerLoss):
    """A kernel that computes a short utterance wrongly."""

    def forward(self, encoder_states, *args, **kwargs):
        losses = super().forward(encoder_states, *args, **kwargs)
        return losses * torch.tensor([1.0] * (len(losses) - 1) + [1.001], device=losses.device)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (DoubledSigma, "loss (relative error"),
        (WrongEncoderGradient, "gradient of `encoder_states` (relative error 0.05)"),
        (NanBiasGradient, "gradient of `head_bias` (relative error nan)"),
        (WrongAfterTheFirstUtterance, "loss (relative error 0.001)"),
    ],
)
def test_a_kernel_that_differs_from_pytorch_is_not_used(layer, reason, monkeypatch):
    monkeypatch.setattr(backend.inspect, "signature", lambda forward: SimpleNamespace(parameters=()))
    difference = backend.describe_difference(layer(), TransducerLoss(), CPU_SETTINGS)
    assert reason in difference
    assert "vocab_size=7" in difference


@pytest.mark.parametrize("durations", [(0, 1, 2), (1, 2), None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [backend.CHECK_LENGTHS, backend.INTERPRETER_CHECK_LENGTHS])
def test_pytorch_passes_its_own_check(durations, dtype, lengths, monkeypatch):
    monkeypatch.setattr(backend, "INTERPRETER_CHECK_LENGTHS", lengths)
    settings = backend.JointSettings(torch.device("cpu"), dtype, 7, 6, durations, "tanh")
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert backend.describe_difference(TransducerLoss(), TransducerLoss(), settings) is None


def test_a_kernel_with_other_arguments_is_not_used():
    difference = backend.describe_difference(DoubledSigma(), TransducerLoss(), CPU_SETTINGS)
    assert difference.startswith("its arguments are args, sigma, kwargs, they must be encoder_states, ")


def test_a_missing_package_is_named_with_its_extra(monkeypatch, warnings):
    def no_triton(repository):
        raise ModuleNotFoundError("No module named 'triton'")

    monkeypatch.setattr(backend, "load_layer", no_triton)
    assert type(select("auto", CUDA_STATES)) is TransducerLoss
    assert len(warnings) == 1
    assert "No module named 'triton'; install the packages of the extra `kernels`" in warnings[0]


@needs_triton
def test_a_model_trains_with_the_kernel_that_it_requires():
    done = run_interpreted(
        """
        import sys, torch
        import transformers_parakeet as tp
        from transformers_parakeet.losses import backend
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
        pytorch = step("off")
        assert backend.KERNEL_MODULE not in sys.modules
        step("require")
        # the library `kernels` is not needed
        assert "kernels" not in sys.modules
        # count from here on: the first use also checks the kernel
        layers = sys.modules[backend.KERNEL_MODULE].layers
        calls, compute = [], layers.transducer_loss
        layers.transducer_loss = lambda *args, **kwargs: calls.append(args) or compute(*args, **kwargs)
        kernel = step("require")
        assert len(calls) == 1, calls
        step("off")
        assert len(calls) == 1, calls
        assert len(pytorch[1]) == len(kernel[1]) > 20
        # a bias of keys has no gradient, only rounding
        worst = max((a - b).abs().max() / a.abs().max().clamp(min=1e-3) for a, b in zip(pytorch[1], kernel[1]))
        # measured: 1e-7 and 1.2e-5, the latter for a bias of keys
        assert abs(pytorch[0] - kernel[0]) < 1e-6 * pytorch[0], (pytorch[0], kernel[0])
        assert worst < 4e-5, worst
        print("trained with", backend.KERNEL_MODULE)
        """
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "trained with transformers_parakeet.losses.transducer_kernel" in done.stdout


@needs_triton
@pytest.mark.slow
def test_the_kernel_passes_the_check_for_gpus_in_the_interpreter():
    done = run_interpreted(
        """
        import torch
        from transformers_parakeet.losses import TransducerLoss, backend

        backend.INTERPRETER_CHECK_LENGTHS = backend.CHECK_LENGTHS
        settings = backend.JointSettings(torch.device("cpu"), torch.float32, 1100, 8, (0, 1, 2, 3, 4), "relu")
        print(backend.check_kernel("", settings, TransducerLoss()))
        """
    )
    assert "CheckedKernel(layer=TransducerLoss(), problem='')" in done.stdout, done.stdout + done.stderr[-3000:]


def build_hub_layout(folder):
    """Build the kernel as it is laid out on the Hub; return the folder."""
    script = KERNEL_FOLDER / "build_layout.py"
    subprocess.run([sys.executable, str(script), str(folder)], check=True, capture_output=True)
    return folder


@needs_kernels
def test_local_kernels_replaces_the_kernel(tmp_path):
    folder = build_hub_layout(tmp_path / "kernel")
    (folder / "build" / "torch-cpu" / "layers.py").write_text("raise ValueError('planted')")
    done = run_interpreted(
        """
        import torch
        from transformers_parakeet.losses import TransducerLoss, select_loss
        select_loss("require", TransducerLoss(), torch.zeros(1, 1, 6), torch.zeros(9, 6), None, "relu")
        """,
        LOCAL_KERNELS=f"{backend.KERNEL_ID}={folder}",
    )
    assert done.returncode == 1
    assert "the kernel of the transducer loss is required and cannot be used: ValueError: planted" in done.stderr


@needs_kernels
def test_a_kernel_in_the_layout_of_the_hub_is_used(tmp_path):
    folder = build_hub_layout(tmp_path / "kernel")
    done = run_interpreted(
        """
        import torch
        from transformers_parakeet.losses import TransducerLoss, select_loss
        loss = select_loss("require", TransducerLoss(), torch.zeros(1, 1, 6), torch.zeros(9, 6), None, "relu")
        import inspect
        print(inspect.getfile(type(loss)))
        """,
        LOCAL_KERNELS=f"{backend.KERNEL_ID}={folder}",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert str(folder) in done.stdout


@needs_triton
@pytest.mark.parametrize("selection", ["not compile", pytest.param("compile", marks=pytest.mark.slow)])
def test_the_kernel_passes_its_own_tests(selection):
    options = ["-q", "-p", "no:cacheprovider", "-c", os.devnull, str(KERNEL_FOLDER / "tests"), "-k", selection]
    command = [sys.executable, "-m", "pytest", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=KERNEL_FOLDER)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
