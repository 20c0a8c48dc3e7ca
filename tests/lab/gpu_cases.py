"""Our models under ComfyUI's memory management on a pretended GPU (``pretended_gpu.py``), against the plain CPU.

    python gpu_cases.py TERNARY BINARY TEXT_ENCODER

prints one line of JSON for each case in each mode, and for each planted fault. Every mode is a fork of this process: it
has imported the host and drawn on the CPU, and none leaves anything behind for the next.
"""

import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path

# First: it starts the host on the CPU.
from gpu_models import BINARY, Files, cpu_results, draw, encode, load, load_clip, saved, with_lora

# isort: split
import comfy.model_management as management
import gpu_kernels_stand_in
import pretended_aimdo
import pretended_gpu
import torch
from comfy_extras.nodes_multigpu import SelectCLIPDeviceNode, SelectModelDeviceNode
from gpu_faults import FAULTS
from pretended_aimdo import MODES, evict, room
from pretended_gpu import record

import bonsai_image

ROOT = Path(bonsai_image.__file__).parent
#: Code that must not wait for the GPU in a step: all of ours but this lab, and what the planted faults put into it.
OURS = (*(str(ROOT / room) + os.sep for room in ("ops", "loaders", "networks", "nodes")),
        str(Path(__file__).with_name("gpu_faults.py")))
PLENTY = 20 << 30


class Lab:
    """One mode: the models on the pretended GPU, and a line for each case."""

    def __init__(self, mode: str, files: Files, expected: dict[str, torch.Tensor]):
        gpu_kernels_stand_in.install()
        pretended_aimdo.install(mode)
        self.mode, self.files, self.expected, self.fault = mode, files, expected, None
        self.model = load()
        # The host keeps room for three of the largest layers, half of this small model.
        self.room = room["bytes"] = self.model.model_size() if mode == "partial" else PLENTY

    def case(self, name: str, want: str, run) -> None:
        """Run, compare and print."""
        record.clear()
        error = None
        try:
            result = run()
        except Exception as failure:
            result, error = None, f"{type(failure).__name__}: {str(failure)[:300]}"
        # What the host does after every node.
        management.reset_cast_buffers()
        print(json.dumps({
            "mode": self.mode, "fault": self.fault, "shows": FAULTS[self.fault][1] if self.fault else None,
            "case": name, "error": error,
            "different": not (result is not None and torch.equal(result, self.expected[want])),
            "races": [f"{a} {b} {stack[:3]}" for a, b, stack in record.races[:3]],
            "waits": [f"{name} {stack[0]}" for name, stack in record.waits if in_our_step(stack)][:3],
            "pageable": [stack[0] for _, pinned, stack in record.uploads if not pinned and by_our_step(stack)][:3],
            "pinned": pretended_aimdo.pinned_pages(), "dynamic": self.model.is_dynamic(),
            "loaded": self.model.loaded_size() / self.model.model_size()}), flush=True)
        pretended_aimdo.unpin_all()


def in_our_step(stack) -> bool:
    """Whether the CPU waited in our own code, while the model ran."""
    names = [function for _, function in stack]
    return stack[0][0].startswith(OURS) and "forward" in names and not checking(stack)


def checking(stack) -> bool:
    """Whether a backend was compared with the reference, once for each kind of weight."""
    return any(file.endswith("selfcheck.py") for file, _ in stack)


def by_our_step(stack) -> bool:
    """Whether our code, and not the host's transfer of a weight, uploaded something while the model ran."""
    names = [function for _, function in stack]
    return "forward" in names and "cast_bias_weight" not in names and not checking(stack) and any(
        file.startswith(OURS) for file, _ in stack[:6])


@contextmanager
def at_product(number: int, action):
    """Call ``action`` before the product ``number`` of the packed weights."""
    calls = [0]

    def hook(*operands):
        calls[0] += 1
        if calls[0] == number:
            action(*operands)

    pretended_gpu.before_operator.append(hook)
    try:
        yield
    finally:
        pretended_gpu.before_operator.remove(hook)


def out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory")


def broken_off(model, action, error):
    """A prompt that ends in ``error``; then the next one."""
    try:
        with at_product(4, action):
            draw(model)
    except error:
        return draw(model)
    raise AssertionError("the prompt was not broken off")


def make_room(lab: Lab):
    """Take away what can be taken from a loaded model between two steps."""
    evict()
    if not lab.model.is_dynamic():
        lab.model.partially_unload(torch.device("cpu"), lab.model.model_size())


def diffusion_cases(lab: Lab) -> None:
    model, files = lab.model, lab.files
    lab.case("plain", "plain", lambda: draw(model))
    lab.case("LoRA", "lora", lambda: draw(with_lora(model, files.lora)))
    lab.case("LoRA, strength changed", "half", lambda: draw(with_lora(model, files.lora, 0.5)))
    lab.case("DoRA", "dora", lambda: draw(with_lora(model, files.dora)))
    lab.case("LoKr", "lokr", lambda: draw(with_lora(model, files.lokr)))
    lab.case("LoRA and LoKr stacked", "stacked",
             lambda: draw(with_lora(with_lora(model, files.lora, 0.8), files.lokr, -0.4)))
    lab.case("LoRA removed", "plain", lambda: draw(model))
    lab.case("LoRA as a hook", "lora", lambda: draw(model, hook=files.lora))
    lab.case("LoRA clone made between steps", "plain",
             lambda: draw(model, between=lambda *_: with_lora(model, files.lora)))
    lab.case("batch of 2", "batch", lambda: draw(model, batch=2))
    lab.case("reference latent", "reference", lambda: draw(model, reference=files.reference))
    lab.case("saved", "saved", lambda: saved(model))


def memory_cases(lab: Lab) -> None:
    model, files, binary = lab.model, lab.files, load(BINARY)
    lab.case("evicted between steps", "plain", lambda: draw(model, between=lambda *_: make_room(lab)))

    def evicted_in_step():
        with at_product(4, evict):
            return draw(model)

    lab.case("evicted in mid-step", "plain", evicted_in_step)
    lab.case("out of memory in a layer, then again", "plain",
             lambda: broken_off(model, out_of_memory, torch.OutOfMemoryError))
    lab.case("cancelled in mid-step, then again", "plain",
             lambda: broken_off(model, lambda *_: management.interrupt_current_processing(True),
                                management.InterruptProcessingException))

    def reloaded():
        management.unload_all_models()
        return draw(model)

    lab.case("unloaded and loaded", "plain", reloaded)
    # Room for one model, then for most of it, then for none.
    for share in (1.0, 0.7, 0.0):
        management.unload_all_models()
        room["bytes"] = int(model.model_size() * share)
        lab.case(f"room for {share:.0%}", "plain", lambda: draw(model))
        lab.case(f"LoRA, room for {share:.0%}", "lora", lambda: draw(with_lora(model, files.lora)))
        lab.case(f"memory-mapped binary model, room for {share:.0%}", "binary", lambda: draw(binary))
    room["bytes"] = lab.room
    lab.case("two variants in turn", "plain", lambda: draw(model))


def device_cases(lab: Lab) -> None:
    def chosen(model, device):
        with torch.inference_mode():
            return SelectModelDeviceNode.execute(model, device)[0]

    second = chosen(lab.model, "gpu:1")
    lab.case("second GPU", "plain", lambda: draw(second))
    lab.case("LoRA on the second GPU", "lora", lambda: draw(with_lora(second, lab.files.lora)))
    lab.case("first GPU after the second", "plain", lambda: draw(chosen(second, "default")))
    lab.case("diffusion model on the CPU", "plain", lambda: draw(chosen(lab.model, "cpu")))
    lab.case("GPU after the CPU", "plain", lambda: draw(lab.model))


def text_cases(lab: Lab) -> None:
    clip, files = load_clip(), lab.files
    lab.case("text encoder", "clip", lambda: encode(clip))
    lab.case("LoRA on the text encoder", "clip lora", lambda: encode(clip, files.text))
    lab.case("LoRA on the packed embedding", "clip table", lambda: encode(clip, files.table))
    lab.case("text encoder after its LoRAs", "clip", lambda: encode(clip))
    with torch.inference_mode():
        on_cpu = SelectCLIPDeviceNode.execute(clip, "cpu")[0]
    lab.case("text encoder on the CPU", "clip", lambda: encode(on_cpu))
    if not clip.patcher.is_dynamic():
        # Under dynamic VRAM, the host gives the LoRA to a copy of the encoder, and encodes with another.
        lab.case("LoRA on the text encoder on the CPU", "clip lora", lambda: encode(on_cpu, files.text))
    lab.case("text encoder on the GPU again", "clip", lambda: encode(clip))


def run_mode(mode: str, *cpu) -> None:
    lab = Lab(mode, *cpu)
    for part in (diffusion_cases, memory_cases, device_cases, text_cases):
        part(lab)


def run_fault(name: str, *cpu) -> None:
    lab = Lab("dynamic", *cpu)
    patched = with_lora(lab.model, lab.files.lora)
    draw(patched)
    evict()
    FAULTS[name][0](patched)
    lab.fault = name
    lab.case("LoRA", "lora", lambda: draw(patched))


def main() -> None:
    torch.set_num_threads(1)
    *cpu, same = cpu_results()
    print(json.dumps({"same": same}), flush=True)
    for mode in MODES:
        in_fork(lambda mode=mode: run_mode(mode, *cpu))
    for fault in FAULTS:
        in_fork(lambda fault=fault: run_fault(fault, *cpu))


def in_fork(call) -> None:
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            call()
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    if os.waitpid(child, 0)[1]:
        raise SystemExit("a mode ended early")


if __name__ == "__main__":
    main()
