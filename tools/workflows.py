"""The example workflows, laid out: what is in each, and where. Sockets, widgets and outputs come from the node schemas.

Written to ``example_workflows`` with ComfyUI's own Python by
``UPDATE_WORKFLOWS=1 COMFYUI_PATH=... python -m pytest tests/host/test_workflows.py``;
their pictures by ``UPDATE_PICTURES=1 COMFYUI_PATH=... python -m pytest tests/host/test_browser.py``.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field

TERNARY = "bonsai-image-ternary-4B-mlx-2bit"
BINARY = "bonsai-image-binary-4B-mlx-1bit"
_HUB = "https://huggingface.co/prism-ml"
PROMPT = "A tiny bonsai tree in a blue ceramic pot on a wooden windowsill, soft morning light, photograph"
#: Pixels on the canvas: height of a title bar, of a row of sockets, of a widget; space around nodes and groups.
_TITLE, _ROW, _WIDGET, _MARGIN, _GAP = 30, 20, 28, 20, 22
#: Version of the frontend whose format this is.
_FRONTEND = "1.47.10"


@dataclass
class Node:
    """One node. ``inputs`` maps a socket to (key of the source node, index of its output)."""

    key: str
    type: str
    width: int
    widgets: list = field(default_factory=list)
    inputs: dict[str, tuple[str, int]] = field(default_factory=dict)
    title: str | None = None
    height: int | None = None
    models: list[dict[str, str]] = field(default_factory=list)
    mode: int = 0


@dataclass
class Group:
    """A titled frame; ``columns`` of nodes from left to right, each from top to bottom."""

    title: str
    columns: list[list[Node]]


@dataclass
class Column:
    """Groups below one another, beginning at ``top``: what leaves the loader at the top passes above them."""

    top: int
    groups: list[Group]


#: LiteGraph's mode of a node that passes its inputs on: switched off, Ctrl+B switches it on.
BYPASSED = 4


def note(title: str, text: str, height: int) -> Node:
    return Node(title, "MarkdownNote", 400, [text], title=title, height=height)


def where_the_pack_goes(pack: str) -> str:
    return (f"Download the **whole** repository [prism-ml/{pack}]({_HUB}/{pack}) into the folder below, then press "
            f"**R** and choose it in the loader above.\n\n```\nmodels/diffusers/{pack}\n```\n\n")


_SIZES = ("The model is made for **4 steps** at **1024 x 1024**; other sizes should be multiples of 16. CFG is not "
          "used, so there is no negative prompt to write: just say what you want to see.\n")


def model(text: str, height: int = 300, more: Node | None = None) -> Group:
    loader = Node("pack", "BonsaiPackLoader", 400, [TERNARY, "auto", "auto", "exact"])
    return Group("1. Model", [[loader, note("Before the first run", text, height), *([more] if more else [])]])


def prompt(text: str, clip: tuple[str, int] = ("pack", 1)) -> Group:
    return Group("2. Prompt", [[Node("prompt", "CLIPTextEncode", 300, [text], {"clip": clip}, "Prompt", 160)]])


def size(pixels: int = 1024) -> Group:
    return Group("3. Size", [[Node(name.lower(), "PrimitiveInt", 300, [pixels, "fixed"], title=name)
                              for name in ("Width", "Height")]])


def picture(megapixels: float = 1.0) -> Group:
    """Any picture, brought to the size that the model is made for, in multiples of 16."""
    return Group("3. Your picture", [[
        Node("load", "LoadImage", 400, ["example.png"], height=330),
        Node("scale", "ImageScaleToTotalPixels", 400, ["lanczos", megapixels, 16], {"image": ("load", 0)},
             "Scale to multiples of 16"),
    ]])


def sampling(width: tuple[str, int] = ("width", 0), height: tuple[str, int] = ("height", 0),
             source: tuple[str, int] = ("pack", 0), conditioning: tuple[str, int] = ("prompt", 0), batch: int = 1,
             steps: int = 4, start: tuple[str, int] | None = None, denoise: float | None = None) -> Column:
    """``start`` is the latent to begin with (None: an empty one), ``denoise`` the part of the steps to take."""
    sides = {"width": width, "height": height}
    nodes = [
        Node("guider", "BasicGuider", 280, [], {"model": source, "conditioning": conditioning}, "Guider (no CFG)"),
        Node("seed", "RandomNoise", 280, [20260331, "randomize"], title="Seed"),
        Node("sampler", "KSamplerSelect", 280, ["euler"], title="Sampler"),
        Node("steps", "Flux2Scheduler", 280, [steps, 1024, 1024], sides, "Steps"),
    ]
    sigmas = ("steps", 0)
    if denoise is not None:
        nodes.append(Node("denoise", "SplitSigmasDenoise", 280, [denoise], {"sigmas": sigmas}, "How much to change"))
        sigmas = ("denoise", 1)
    if start is None:
        nodes.append(Node("latent", "EmptyFlux2LatentImage", 280, [1024, 1024, batch], sides, "Empty Latent"))
        start = ("latent", 0)
    inputs = {"noise": ("seed", 0), "guider": ("guider", 0), "sampler": ("sampler", 0), "sigmas": sigmas,
              "latent_image": start}
    return Column(150, [Group("4. Sampling", [nodes, [Node("sample", "SamplerCustomAdvanced", 220, [], inputs,
                                                           "Sample")]])])


def encoded() -> Group:
    return Group("Your picture as a latent", [[
        Node("encode", "VAEEncode", 300, [], {"pixels": ("scale", 0), "vae": ("pack", 2)}, "Encode"),
        Node("measure", "GetImageSize", 300, [], {"image": ("scale", 0)}, "Size of the picture"),
    ]])


def image(vae: tuple[str, int] = ("pack", 2), described: Node | None = None) -> Column:
    below = [Group("Good to know", [[described]])] if described else []
    return Column(0, [Group("5. Image", [
        [Node("decode", "VAEDecode", 225, [], {"samples": ("sample", 0), "vae": vae})],
        [Node("save", "SaveImage", 400, ["bonsai"], {"images": ("decode", 0)}, height=440)]]), *below])


def text_to_image() -> list[Column]:
    smaller = (f"Short of memory? [prism-ml/{BINARY}]({_HUB}/{BINARY}) is its smaller sister; give it a folder of its "
               "own next to the first.\n\n")
    return [Column(0, [model(where_the_pack_goes(TERNARY) + smaller + _SIZES, 200)]),
            Column(230, [prompt(PROMPT), size()]), sampling(), image()]


def text_to_image_fast_and_small() -> list[Column]:
    # The VAE first: what leaves it passes above all else.
    parts = {
        "vae": ("VAELoader", "vae", "bonsai-image-vae.safetensors", "vae/diffusion_pytorch_model.safetensors", []),
        "model": ("BonsaiModelLoader", "diffusion_models", f"{BINARY}.safetensors",
                  "transformer-packed-mflux/diffusion_pytorch_model.safetensors", ["auto", "auto", "exact"]),
        "encoder": ("BonsaiTextEncoderLoader", "text_encoders", "bonsai-image-qwen3-4B-mlx-4bit.safetensors",
                    "text_encoder-mlx-4bit/model.safetensors", []),
    }
    url = f"{_HUB}/{BINARY}/resolve/main"
    loaders = [Node(key, kind, 430, [name, *more], height=None if more else 80,
                    models=[{"name": name, "url": f"{url}/{file}", "directory": folder}])
               for key, (kind, folder, name, file, more) in parts.items()]
    lines = "\n\n".join(f"[{file}]({url}/{file}) as\n```\nmodels/{folder}/{name}\n```"
                        for _, folder, name, file, _ in parts.values())
    text = ("The binary model from three single files. Download each, **rename it** as written below, and press "
            f"**R**.\n\n{lines}\n\nThe whole repository [prism-ml/{BINARY}]({_HUB}/{BINARY}) as a folder works too, "
            "with *Load Bonsai Image Pack*.\n\nOne bit a weight is the smallest there is, and 768 x 768 has just over "
            "half the pixels of 1024 x 1024.\n")
    described = note("Before the first run", text, 350)
    described.width = 430
    return [Column(0, [Group("1. Model", [[*loaders, described]])]),
            Column(330, [prompt(PROMPT, ("encoder", 0)), size(768)]),
            sampling(source=("model", 0)), image(("vae", 0))]


def reference_edit() -> list[Column]:
    weakness = note("Editing: what to expect", (
        "The graph is the one of FLUX.2 Klein, but **editing is the known weak side of weights of 1 to 2 bits**: "
        "who tried it found the results poor. Expect parts of the picture to change that should have stayed."
        "\n\nTry a few seeds and a short, plain instruction. Where the original must be kept, use FLUX.2 Klein 4B "
        "itself: the same graph with ComfyUI's own loaders.\n"), 200)
    reference = Node("reference", "ReferenceLatent", 240, [], {"conditioning": ("prompt", 0), "latent": ("encode", 0)},
                     "Picture as reference")
    text = (where_the_pack_goes(TERNARY)
            + "Your picture is scaled to about one megapixel; the edited one has its size.\n")
    return [Column(0, [model(text, 150), picture()]),
            Column(230, [prompt("Make it winter: snow on the ground and in the air. Keep the rest."), encoded()]),
            Column(290, [Group("Reference", [[reference]])]),
            sampling(("measure", 0), ("measure", 1), conditioning=("reference", 0)), image(described=weakness)]


def image_to_image() -> list[Column]:
    weakness = note("Image to image: what to expect", (
        "The picture is covered with noise and drawn again from there: *How much to change* is the part of the steps "
        "that is drawn. 6 steps at 0.67 draw 4. Only whole steps count, so take more steps for finer choices.\n\n"
        "Lower: closer to your picture. Like editing, this is a **known weak side of weights of 1 to 2 bits**: "
        "expect details to change even at low values.\n"), 200)
    text = where_the_pack_goes(TERNARY) + "Describe the **whole** picture that you want, not the change.\n"
    return [Column(0, [model(text, 150), picture()]),
            Column(230, [prompt("An ink and watercolour drawing of a girl in a meadow, loose lines, warm paper"),
                         encoded()]),
            sampling(("measure", 0), ("measure", 1), start=("encode", 0), steps=6, denoise=0.67),
            image(described=weakness)]


def lora() -> list[Column]:
    text = note("LoRA", (
        "A LoRA made for **FLUX.2 Klein 4B** goes into the folder below; press **R** and choose it.\n\n"
        "```\nmodels/loras\n```\n\nBoth LoRA nodes are **switched off** (purple) until you have one: choose the file, "
        "then select the node and press **Ctrl+B**. Use one or both.\n\nThe LoRA is computed beside the packed "
        "weights, which stay as they are: nothing is merged or rounded. It was made for other weights than these, so "
        "it may need another strength.\n"), 240)
    loras = [Node(key, "LoraLoaderModelOnly", 300, ["flux2_klein_4b_lora.safetensors", strength], {"model": source},
                  title, mode=BYPASSED)
             for key, source, strength, title in (("lora", ("pack", 0), 1.0, "First LoRA"),
                                                  ("second", ("lora", 0), 0.6, "Second LoRA"))]
    return [Column(0, [model(where_the_pack_goes(TERNARY), 120, text)]),
            Column(180, [Group("LoRA", [loras]), prompt(PROMPT), size()]), sampling(source=("second", 0)), image()]


def batch_variations() -> list[Column]:
    text = note("Variations", (
        "*batch_size* in **Empty Latent** pictures are drawn from one seed and one prompt, all at once; each gets "
        "its own part of the noise.\n\nA batch takes more memory than one picture; if it does not fit, lower "
        "batch_size and queue several times.\n\nIn the prompt, `{blue|red|white}` chooses one of the words at random "
        "for each run (not for each picture).\n"), 200)
    return [Column(0, [model(where_the_pack_goes(TERNARY), 120, text)]),
            Column(230, [prompt("A tiny bonsai tree in a {blue|red|white} ceramic pot on a windowsill, "
                                "{morning light|snow outside|evening}, photograph"), size()]),
            sampling(batch=4), image()]


WORKFLOWS = {build.__name__: build for build in (text_to_image, text_to_image_fast_and_small, reference_edit,
                                                 image_to_image, lora, batch_variations)}


def sockets(schema: type | None) -> tuple[list[tuple[str, str, bool]], int]:
    """(name, type, is a widget) of every input of a node in the frontend's order, and how many widgets it has."""
    if schema is None:
        return [], 0
    types = schema.INPUT_TYPES()
    plain, widgets, count = [], [], 0
    for name, spec in (types["required"] | types.get("optional", {})).items():
        kind = "COMBO" if isinstance(spec[0], list) else spec[0]
        if kind in ("COMBO", "INT", "FLOAT", "STRING", "BOOLEAN"):
            widgets.append((name, kind, True))
            more = spec[1] if len(spec) > 1 else {}
            count += 1 + bool(more.get("control_after_generate"))
        else:
            plain.append((name, kind, False))
    return plain + widgets, count


def height(node: Node, schema: type | None) -> int:
    if node.height is not None:
        return node.height
    names, widgets = sockets(schema)
    rows = max(sum(not widget for *_, widget in names), len(schema.RETURN_TYPES))
    return rows * _ROW + widgets * _WIDGET + 14


def place(columns: list[Column], schemas: dict[str, type]) -> tuple[dict[str, tuple[int, int]], list[dict]]:
    """Position of every node by key, and the frames."""
    positions, frames, left = {}, [], 0
    for column in columns:
        top, right = column.top, left
        for group in column.groups:
            x, bottom = left + _MARGIN, top
            for nodes in group.columns:
                y = top + 40 + _TITLE
                for node in nodes:
                    positions[node.key] = (x, y)
                    y += height(node, schemas.get(node.type)) + _TITLE + _GAP
                bottom = max(bottom, y - _TITLE)
                x += max(node.width for node in nodes) + 60
            x -= 60 - _MARGIN
            frames.append({"id": len(frames) + 1, "title": group.title, "bounding": [left, top, x - left, bottom - top],
                           "color": "#3f789e", "font_size": 24, "flags": {}})
            top, right = bottom + _GAP, max(right, x)
        left = right + _GAP
    return positions, frames


def lay_out(name: str, schemas: dict[str, type], version: str) -> dict:
    """The workflow ``name`` in the frontend's format; ``version`` is this pack's."""
    columns = WORKFLOWS[name]()
    nodes = [node for column in columns for group in column.groups for part in group.columns for node in part]
    positions, frames = place(columns, schemas)
    ids = {node.key: number for number, node in enumerate(nodes, 1)}
    kinds = {node.key: schemas[node.type].RETURN_TYPES if node.type in schemas else () for node in nodes}
    links = []
    for node in nodes:
        for slot, (socket, *_) in enumerate(sockets(schemas.get(node.type))[0]):
            if socket in node.inputs:
                key, output = node.inputs[socket]
                links.append([len(links) + 1, ids[key], output, ids[node.key], slot, kinds[key][output]])
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"bonsai-image/{name}")), "revision": 0,
        "last_node_id": len(nodes), "last_link_id": len(links),
        "nodes": [_written(node, ids[node.key], positions[node.key], links, schemas.get(node.type), version)
                  for node in nodes],
        "links": links, "groups": frames, "config": {},
        "extra": {"ds": {"scale": 0.75, "offset": [90, 150]}, "frontendVersion": _FRONTEND,
                  "workflowRendererVersion": "LG"},
        "version": 0.4,
    }


def _written(node: Node, number: int, position: tuple[int, int], links: list[list], schema: type | None,
             version: str) -> dict:
    arriving = {slot: link for link, _, _, target, slot, _ in links if target == number}
    inputs = []
    for slot, (name, kind, widget) in enumerate(sockets(schema)[0]):
        inputs.append({"name": name, "type": kind, **({"widget": {"name": name}} if widget else {}),
                       "link": arriving.get(slot)})
    names = () if schema is None else getattr(schema, "RETURN_NAMES", None) or schema.RETURN_TYPES
    outputs = [{"name": name, "type": kind, "links": [link[0] for link in links if link[1:3] == [number, slot]]}
               for slot, (name, kind) in enumerate(zip(names, schema.RETURN_TYPES if schema else (), strict=True))]
    owner = {"cnr_id": "bonsai-image", "ver": version} if node.type.startswith("Bonsai") else {
        "cnr_id": "comfy-core", "ver": "0.29.0"}
    properties = {} if schema is None else {**owner, "Node name for S&R": node.type}
    return {
        "id": number, "type": node.type, "pos": list(position), "size": [node.width, height(node, schema)], "flags": {},
        "order": number - 1, "mode": node.mode, "inputs": inputs, "outputs": outputs,
        **({"title": node.title} if node.title else {}),
        "properties": {**properties, **({"models": node.models} if node.models else {})},
        "widgets_values": node.widgets,
        **({"color": "#432", "bgcolor": "#653"} if schema is None else {}),
    }
