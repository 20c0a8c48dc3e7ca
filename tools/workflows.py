"""The example workflows and the subgraph blueprint: what is in each, and where. ``layout.py`` writes them down,
``notes.py`` has the words.

Written to ``example_workflows`` and ``subgraphs`` with ComfyUI's own Python by
``UPDATE_WORKFLOWS=1 COMFYUI_PATH=... python -m pytest tests/host/test_workflows.py``;
their pictures by ``UPDATE_PICTURES=1 COMFYUI_PATH=... python -m pytest tests/host/test_browser_pictures.py``.
"""

from bonsai_image.published import SINGLE_FILES
from bonsai_image.tools import notes
from bonsai_image.tools.layout import BYPASSED, Column, Group, Node

TERNARY = "bonsai-image-ternary-4B-mlx-2bit"
BINARY = "bonsai-image-binary-4B-mlx-1bit"
#: ComfyUI's own names for what is in FLUX.2 Klein 4B, and where its templates download it.
_COMFY = "https://huggingface.co/Comfy-Org"
KLEIN_FILES = {
    "text_encoders": {
        "qwen_3_4b.safetensors": f"{_COMFY}/flux2-klein/resolve/main/split_files/text_encoders/qwen_3_4b.safetensors"},
    "vae": {"flux2-vae.safetensors": f"{_COMFY}/flux2-dev/resolve/main/split_files/vae/flux2-vae.safetensors"},
}
#: What the loaders of single files load: folder -> name -> address.
FILES = {folder: files | KLEIN_FILES.get(folder, {}) for folder, files in SINGLE_FILES.items()}
PROMPT = "A tiny bonsai tree in a blue ceramic pot on a wooden windowsill, soft morning light, photograph"


#: Pixels that a node is wide at least in Nodes 2.0.
_NARROWEST = 225


def note(title: str, text: str, height: int, width: int = 400) -> Node:
    return Node(title, "MarkdownNote", width, [text], title=title, height=height)


def model(text: str, height: int, *more: Node) -> Group:
    loader = Node("loader", "BonsaiCheckpointLoader", 400, [TERNARY, "auto", "auto", "auto"])
    described = note("Before the first run", notes.where_it_goes(TERNARY) + text, height)
    return Group("1. Model", [[loader, described, *more]])


def prompt(text: str, clip: tuple[str, int] = ("loader", 1), width: int = 300, height: int = 160) -> Group:
    return Group("2. Prompt", [[Node("prompt", "CLIPTextEncode", width, [text], {"clip": clip}, "Prompt", height)]])


def size(pixels: int = 1024, width: int = 300) -> Group:
    return Group("3. Size", [[Node(name.lower(), "PrimitiveInt", width, [pixels, "fixed"], title=name)
                              for name in ("Width", "Height")]])


def source_image() -> Group:
    return Group("3. Your image", [[Node("load", "LoadImage", 400, ["example.png"], height=352)]])


def encoded() -> Group:
    """Any image, scaled to the size that the model is made for, in multiples of 16."""
    return Group("Your image as a latent", [[
        Node("encode", "VAEEncode", _NARROWEST, [], {"pixels": ("scale", 0), "vae": ("loader", 2)}, "Encode"),
        Node("scale", "ImageScaleToTotalPixels", _NARROWEST, ["lanczos", 1.0, 16], {"image": ("load", 0)},
             "Scale to multiples of 16"),
        # It grows when it shows the size.
        Node("measure", "GetImageSize", _NARROWEST, [], {"image": ("scale", 0)}, "Image size", height=150),
    ]])


def sampling(width: tuple[str, int] = ("width", 0), height: tuple[str, int] = ("height", 0),
             source: tuple[str, int] = ("loader", 0), conditioning: tuple[str, int] = ("prompt", 0), batch: int = 1,
             steps: int = 4, start: tuple[str, int] | None = None, denoise: float = 1.0, top: int = 150,
             second: list[Node] = ()) -> Column:
    """``start`` is the latent to begin with (None: an empty one), ``denoise`` the part of the steps to take from it;
    ``second`` stands below the guider."""
    sides = {"width": width, "height": height}
    guide = {"model": source, "conditioning": conditioning}
    guided = [Node("guider", "BasicGuider", _NARROWEST, [], guide, "Guider (no CFG)"), *second,
              Node("seed", "RandomNoise", _NARROWEST, [20260331, "randomize"], title="Seed"),
              Node("sampler", "KSamplerSelect", _NARROWEST, ["euler"], title="Sampler"),
              Node("steps", "Flux2Scheduler", _NARROWEST, [steps, 1024, 1024], sides, "Steps")]
    inputs = {"noise": ("seed", 0), "guider": ("guider", 0), "sampler": ("sampler", 0), "sigmas": ("steps", 0),
              "latent_image": ("latent", 0)}
    sample = Node("sample", "SamplerCustomAdvanced", _NARROWEST, [], inputs, "Sample", above=102 * len(second))
    if start is None:
        guided.append(Node("latent", "EmptyFlux2LatentImage", _NARROWEST, [1024, 1024, batch], sides, "Empty Latent"))
    else:
        # The latent comes from the left, straight through the space above the steps.
        inputs.update(sigmas=("denoise", 1), latent_image=start)
        guided[-1].above, sample.above = 60, 250
        guided.append(Node("denoise", "SplitSigmasDenoise", _NARROWEST, [denoise], {"sigmas": ("steps", 0)},
                           "How much to change"))
    return Column(top, [Group("4. Sampling", [guided, [sample]])])


def image(vae: tuple[str, int] = ("loader", 2), described: Node | None = None) -> Column:
    below = [Group("Good to know", [[described]])] if described else []
    return Column(0, [Group("5. Image", [[
        Node("decode", "VAEDecode", _NARROWEST, [], {"samples": ("sample", 0), "vae": vae}),
        Node("save", "SaveImage", 400, ["bonsai"], {"images": ("decode", 0)}, height=440)]]), *below])


def text_to_image() -> list[Column]:
    return [Column(0, [model(notes.smaller(BINARY) + notes.SIZES, 350)]), Column(230, [prompt(PROMPT), size()]),
            sampling(), image()]


def part(key: str, kind: str, folder: str, name: str, *more: str) -> Node:
    """A loader of one file. The frontend offers that for download where the list of the loader lacks its name."""
    # As high as in Nodes 2.0, where that is more.
    height = {"VAELoader": 80, "BonsaiTextEncoderLoader": 116}.get(kind)
    return Node(key, kind, 430, [name, *more], height=height,
                models=[{"name": name, "url": FILES[folder][name], "directory": folder}])


def from_files(before: str, after: str, parts: list[Node], pixels: int) -> list[Column]:
    """``parts``: the loaders of the VAE, the MODEL and the CLIP. What leaves the VAE's passes above all else."""
    text = notes.files_go(before, [entry for node in parts for entry in node.models], after)
    return [Column(0, [Group("1. Model", [[*parts, note("Before the first run", text, 390, 430)]])]),
            Column(330, [prompt(PROMPT, ("encoder", 0), 270), size(pixels, 270)]),
            sampling(source=("model", 0)), image(("vae", 0))]


def binary_from_files() -> list[Column]:
    return from_files(
        notes.BINARY_FILES, notes.binary_folder(BINARY),
        [part("vae", "VAELoader", "vae", "bonsai-image-vae.safetensors"),
         part("model", "BonsaiModelLoader", "diffusion_models", f"{BINARY}.safetensors", "auto", "auto", "auto"),
         part("encoder", "BonsaiTextEncoderLoader", "text_encoders", "bonsai-image-qwen3-4B-mlx-4bit.safetensors",
              "default")], 768)


def with_klein_files() -> list[Column]:
    return from_files(
        notes.KLEIN_FILES, notes.KLEIN_ENCODERS,
        [part("vae", "VAELoader", "vae", "flux2-vae.safetensors"),
         part("model", "BonsaiModelLoader", "diffusion_models", f"{TERNARY}.safetensors", "auto", "auto", "auto"),
         part("encoder", "CLIPLoader", "text_encoders", "qwen_3_4b.safetensors", "flux2", "default")], 1024)


def reference_edit() -> list[Column]:
    reference = Node("reference", "ReferenceLatent", _NARROWEST, [],
                     {"conditioning": ("prompt", 0), "latent": ("encode", 0)}, "Image as reference")
    return [Column(0, [model("", 195), source_image()]),
            Column(150, [prompt("Make it winter: snow on the ground and in the air. Keep the rest.",
                                width=_NARROWEST), encoded()]),
            sampling(("measure", 0), ("measure", 1), conditioning=("reference", 0), top=80, second=[reference]),
            image(described=note("Editing: what to expect", notes.EDITING, 200))]


def image_to_image() -> list[Column]:
    return [Column(0, [model("", 195), source_image()]),
            Column(150, [prompt("An ink and watercolour drawing of a girl in a meadow, loose lines, warm paper",
                                width=_NARROWEST), encoded()]),
            sampling(("measure", 0), ("measure", 1), start=("encode", 0), steps=6, denoise=0.67, top=80),
            image(described=note("Image to image: what to expect", notes.IMAGE_TO_IMAGE, 200))]


def loras(*names: str) -> Group:
    """LoRA nodes, switched off, the first of which takes the loader's MODEL and each other that of the one before."""
    nodes, source = [], ("loader", 0)
    for key, title, strength in zip(("lora", "second"), names, (1.0, 0.6), strict=False):
        nodes.append(Node(key, "LoraLoaderModelOnly", 300, ["flux2_klein_4b_lora.safetensors", strength],
                          {"model": source}, title, mode=BYPASSED))
        source = (key, 0)
    return Group("LoRA", [nodes])


def lora() -> list[Column]:
    return [Column(0, [model("", 230, note("LoRA", notes.LORA, 240))]),
            Column(90, [loras("First LoRA", "Second LoRA"), prompt(PROMPT, height=130), size()]),
            sampling(source=("second", 0)), image()]


def few_steps() -> list[Column]:
    return [Column(0, [model("", 230, note("One or two steps", notes.FEW_STEPS, 240))]),
            Column(180, [loras("LoRA for few steps"), prompt(PROMPT), size(512)]),
            sampling(source=("lora", 0), steps=2),
            image(described=note("Which noise levels", notes.NOISE_LEVELS, 200))]


def batch_variations() -> list[Column]:
    return [Column(0, [model("", 230, note("Variations", notes.VARIATIONS, 200))]),
            Column(230, [prompt("A tiny bonsai tree in a {blue|red|white} ceramic pot on a windowsill, "
                                "{morning light|snow outside|evening}, photograph"), size()]),
            sampling(batch=4), image()]


def lora_training() -> list[Column]:
    dataset = Node("dataset", "LoadImageTextDataSetFromFolder", 400, ["training"], title="Images with captions",
                   height=110)
    seen = [Node("encode", "VAEEncode", 300, [], {"pixels": ("scale", 0), "vae": ("loader", 2)}, "Encode"),
            Node("scale", "ImageScaleToTotalPixels", 300, ["lanczos", 0.25, 16], {"image": ("dataset", 0)},
                 "Scale to multiples of 16"),
            Node("captions", "CLIPTextEncode", 300, [""], {"clip": ("loader", 1), "text": ("dataset", 1)},
                 "Captions", 160)]
    settings = [1, 4, 300, 0.0005, 8, "AdamW", "MSE", 0, "fixed", "bf16", "fp32", False, "LoRA", True, 2, False,
                "[None]", False, True]
    train = Node("train", "TrainLoraNode", 340, settings,
                 {"model": ("loader", 0), "latents": ("encode", 0), "positive": ("captions", 0)}, "Train LoRA", 590)
    results = [Node("store", "SaveLoRA", 400, ["loras/bonsai_lora", 0], {"lora": ("train", 0), "steps": ("train", 2)},
                    height=140),
               Node("curve", "LossGraphNode", 400, ["loss_graph"], {"loss": ("train", 1)}, "Loss", 330)]
    return [Column(0, [model("", 195), Group("2. Your images", [[
                dataset, note("Images and captions", notes.CAPTIONS, 170)]])]),
            Column(330, [Group("As the model sees them", [seen])]), Column(150, [Group("3. Training", [[train]])]),
            Column(0, [Group("4. The LoRA", [results]),
                       Group("Good to know", [[note("Training", notes.TRAINING, 240)]])])]


#: By the names of their files, which the gallery of templates shows and most systems sort.
WORKFLOWS = {"1 Text to image": text_to_image, "2 Binary, three files": binary_from_files, "3 LoRA": lora,
             "4 Few steps": few_steps, "5 Image to image": image_to_image, "6 Batch variations": batch_variations,
             "7 LoRA training": lora_training, "8 Reference edit": reference_edit,
             "9 With Klein files": with_klein_files}

#: The subgraph that stands for all of text to image, and what of it shows on the one node.
BLUEPRINT = "Bonsai Text to Image"
BLUEPRINT_DESCRIPTION = ("An image from a prompt with Bonsai Image 4B: ternary or binary weights, 4 steps, no CFG. "
                         "Download a repository into models/diffusers first. For the same seed again, open the node "
                         "and set Seed to fixed.")
BLUEPRINT_INPUTS = {"prompt": ("prompt", "text"), "width": ("width", "value"), "height": ("height", "value"),
                    "seed": ("seed", "noise_seed"), "checkpoint": ("loader", "checkpoint")}
BLUEPRINT_OUTPUT = ("decode", 0)


def blueprint_columns() -> list[Column]:
    loader = Node("loader", "BonsaiCheckpointLoader", 400, [TERNARY, "auto", "auto", "auto"])
    decode = Node("decode", "VAEDecode", _NARROWEST, [], {"samples": ("sample", 0), "vae": ("loader", 2)})
    return [Column(0, [Group("1. Model", [[loader]])]), Column(230, [prompt(PROMPT), size()]), sampling(),
            Column(0, [Group("5. Image", [[decode]])])]
