"""What both passes take, counted before anything is loaded: disk, memory, operations."""

import math
import shutil
import sys
from typing import NamedTuple

import torch

from ...loaders.description import count
from ...loaders.klein import HEAD_DIM, KleinConfig, comfyui_shapes, is_packable
from ...loaders.opening import tensor_files
from .run import Run

#: Tokens of a prompt.
TEXT = 512
#: Activations of a block while it is computed again and differentiated, and of one without gradients, in widths of the
#: model a token; the dense copies of the largest layer in the backward pass.
_BACKWARD, _FORWARD, _COPIES = 75, 40, 3
#: Bytes of a number in BF16 or FP16; of a factor with its gradient and moments; of what no count knows: the context of
#: CUDA, the workspaces of its libraries, what the allocator cannot fill.
_HALF, _FACTOR, _RESERVE = 2, 16, 1_000_000_000
#: A forward pass, the same again block by block, and the gradients of the activations.
_TRAINING = 3
#: The operations a second that an estimate of hours goes by.
_SPEED = 50e12


class Cost(NamedTuple):
    """Of one forward pass of one image: operations. Of the two passes at their peaks: bytes of memory."""

    operations: int
    drawing: int
    training: int


def counted(config: KleinConfig, tokens: int, at_once: int, rank: int, packed_bytes: int) -> Cost:
    """For images of ``tokens`` and a packed model of so many bytes with factors of a rank."""
    shapes, width = comfyui_shapes(config), config.num_attention_heads * HEAD_DIM
    layers, length = {name: shape for name, shape in shapes.items() if is_packable(name)}, tokens + TEXT
    blocks = config.num_layers + config.num_single_layers
    linears = sum(math.prod(shape) * (length if name.startswith("single") else TEXT if ".txt_" in name else tokens)
                  for name, shape in layers.items())
    activations, factors = at_once * length * width, rank * sum(map(sum, layers.values()))
    others = (blocks + _BACKWARD) * activations + _COPIES * max(map(math.prod, layers.values()))
    return Cost(2 * linears + 4 * length**2 * width * blocks,
                _RESERVE + _HALF * (sum(map(math.prod, shapes.values())) + _FORWARD * activations),
                _RESERVE + packed_bytes + _FACTOR * factors + _HALF * others)


def announce(run: Run) -> None:
    """Say what a run takes. Raises ValueError where that is more than there is."""
    args, config, packed, tokens = run.args, run.packed.config, count(run.packed.tensors), run.sampler.tokens
    cost = counted(config, tokens, args.per_device_batch, args.rank, packed.packed_bytes + packed.dense_bytes)
    prompts, rows = len({row.prompt for row in run.store.rows}), len(run.store.rows)
    texts = 0 if args.encode_again else prompts * TEXT * config.joint_attention_dim
    disk = _HALF * (texts + rows * (args.steps + 1) * tokens * config.in_channels)
    work = run.store.folder.absolute()
    free = shutil.disk_usage(next(folder for folder in (work, *work.parents) if folder.exists())).free
    again = sum(file.stat().st_size for file in tensor_files(run.repository.text_encoder)) if args.encode_again else 0
    hours = [images * cost.operations / _SPEED / 3600
             for images in (rows * args.steps, _TRAINING * args.batch * args.updates)]
    size = f"{prompts} prompts at {args.width} x {args.height}"
    print(f"{size} take {disk / 1e9:.1f} GB in {work}, where {free / 1e9:.1f} GB are free. At {_SPEED / 1e12:.0f} "
          f"TFLOP/s: {hours[0]:.1f} hours for the dense model in {(cost.drawing + again) / 1e9:.1f} GB of memory, then "
          f"{hours[1]:.1f} hours of training in {(cost.training + again) / 1e9:.1f} GB.", file=sys.stderr)
    if run.store.missing("latents") and disk > free:
        raise ValueError(f"{size} take {disk / 1e9:.1f} GB in {work}, where {free / 1e9:.1f} GB are free; give another "
                         "--work, --encode-again, fewer prompts, or a smaller --width and --height")
    memory = torch.cuda.mem_get_info(run.compute.device)[0] if run.compute.device.type == "cuda" else math.inf
    if (needed := max(cost.drawing, cost.training) + again) > memory:
        raise ValueError(f"{size} take {needed / 1e9:.1f} GB of GPU memory, of which {memory / 1e9:.1f} GB are free; "
                         "lower --per-device-batch, then --width and --height, then --rank")
