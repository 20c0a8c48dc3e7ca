"""Our layers under ComfyUI's memory management on a pretended CUDA device (``tests/lab/pretended_gpu.py``).

In every mode, whatever happens to the weights: the numbers of the plain CPU, bit for bit; no race between streams; no
wait for the device and no upload from pageable memory in our code during a step; nothing left pinned. And the faults
planted in ``tests/lab/gpu_faults.py`` must show, or these tests would see nothing.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bonsai_image.loaders.qwen3 import Qwen3Config
from bonsai_image.tests.support import random_model

#: As wide as ComfyUI knows it; few rows in its table, so that a LoRA on them is small.
TEXT = Qwen3Config(vocab_size=4096, num_hidden_layers=28, num_attention_heads=1, num_key_value_heads=1,
                   intermediate_size=128)
LAB = Path(__file__).parent.parent / "lab"
#: Mode -> (dynamic VRAM, least and most of the model that is on the device after a prompt).
MODES = {"dynamic": (True, 1, 2), "resident": (False, 1, 1), "partial": (False, 0.2, 0.6), "novram": (False, 0, 0.1),
         "highvram": (False, 1, 1)}
FAULTS = ("a scale left on the CPU", "a LoRA factor left on the CPU", "a missing uncast", "a missing wait for a stream",
          "an evicted page taken for a resident one", "an item() in the forward", "an upload in the forward")

pytestmark = pytest.mark.skipif(not torch.version.cuda, reason="the pretended device needs a PyTorch built for CUDA")


@pytest.fixture(scope="module")
def lines(transformer, binary_transformer, comfyui, tmp_path_factory) -> list[dict]:
    repository = tmp_path_factory.mktemp("gpu") / "repository"
    random_model.write_repository(repository, text=TEXT)
    script = [sys.executable, LAB / "gpu_cases.py", transformer, binary_transformer]
    run = subprocess.run([*script, repository / "text_encoder-mlx-4bit"], capture_output=True, text=True, timeout=900,
                         env={**os.environ, "COMFYUI_PATH": str(comfyui), "PYTHONPATH": os.pathsep.join(sys.path)})
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]


def red(case: dict) -> list[str]:
    return [name for name in ("error", "different", "races", "waits", "pageable", "pinned") if case[name]]


@pytest.mark.parametrize("mode", MODES)
def test_models_draw_the_same_wherever_their_weights_are(lines, mode):
    cases = [line for line in lines if line.get("mode") == mode and not line["fault"]]
    dynamic, least, most = MODES[mode]
    assert len(cases) == (38 if dynamic else 39)
    assert {case["dynamic"] for case in cases} == {dynamic}
    assert least <= cases[0]["loaded"] <= most
    assert not [case for case in cases if red(case)]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_shows(lines, fault):
    (case,) = [line for line in lines if line.get("fault") == fault]
    assert case["shows"] in red(case)


def test_every_planted_fault_is_looked_for(lines):
    assert {line["fault"] for line in lines if line.get("fault")} == set(FAULTS)


def test_the_cases_differ(lines):
    """Every adapter and input changes the result: none of the comparisons compares the plain model with itself."""
    assert lines[0]["same"] == []


def test_the_embedded_host_takes_what_is_stated():
    """At 1024 x 1024, counted on a model of full size, and less than 2.35 GB."""
    run = subprocess.run([sys.executable, LAB / "count_memory.py", "embedded", "1024"], capture_output=True, text=True,
                         timeout=300, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert [line["precision"] for line in lines] == ["exact", "fast"]
    for line in lines:
        assert max(value for name, value in line.items() if name not in ("host", "precision", "size")) < 2350
