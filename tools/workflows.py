"""The example workflows and the subgraph blueprint: what is in each, and where. ``layout.py`` writes them down.

Written to ``example_workflows`` and ``subgraphs`` with ComfyUI's own Python by
``UPDATE_WORKFLOWS=1 COMFYUI_PATH=... python -m pytest tests/host/test_workflows.py``;
their pictures by ``UPDATE_PICTURES=1 COMFYUI_PATH=... python -m pytest tests/host/test_browser_pictures.py``.
"""

from bonsai_image.published import SINGLE_FILES
from bonsai_image.tools.layout import BYPASSED, Column, Group, Node

TERNARY = "bonsai-image-ternary-4B-mlx-2bit"
BINARY = "bonsai-image-binary-4B-mlx-1bit"
_HUB = "https://huggingface.co/prism-ml"
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


def note(title: str, text: str, height: int) -> Node:
    return Node(title, "MarkdownNote", 400, [text], title=title, height=height)


def where_it_goes(repository: str) -> str:
    variant = "binary" if repository == BINARY else "ternary"
    return (f"Download the **whole** repository [prism-ml/{repository}]({_HUB}/{repository}), with the Python that "
            "runs ComfyUI:\n\n```\npython ComfyUI/custom_nodes/bonsai-image/__main__.py download --variant "
            f"{variant}\n```\nor by hand, into the folder\n\n```\nmodels/diffusers/{repository}\n```\nThen press **R** "
            "and choose it above. *Run* without it says the whole command.\n\nThe frontend has no button for a folder, "
            "only for single files: the templates *2 Binary, three files* and *9 With Klein files* have it.\n\n")


_SIZES = ("The model is made for **4 steps** at **1024 x 1024**; other sizes should be multiples of 16 "
          "(ComfyUI rounds them down). There is no CFG and so no negative prompt: describe what you want to see.\n")


def model(text: str, height: int = 300, more: Node | None = None) -> Group:
    loader = Node("loader", "BonsaiCheckpointLoader", 400, [TERNARY, "auto", "auto", "auto"])
    return Group("1. Model", [[loader, note("Before the first run", text, height), *([more] if more else [])]])


def prompt(text: str, clip: tuple[str, int] = ("loader", 1), width: int = 300) -> Group:
    return Group("2. Prompt", [[Node("prompt", "CLIPTextEncode", width, [text], {"clip": clip}, "Prompt", 160)]])


def size(pixels: int = 1024) -> Group:
    return Group("3. Size", [[Node(name.lower(), "PrimitiveInt", 300, [pixels, "fixed"], title=name)
                              for name in ("Width", "Height")]])


def source_image(megapixels: float = 1.0) -> Group:
    """Any image, scaled to the size that the model is made for, in multiples of 16."""
    return Group("3. Your image", [
        [Node("load", "LoadImage", _NARROWEST, ["example.png"], height=330)],
        # Below the links from the loader to the nodes on the right.
        [Node("scale", "ImageScaleToTotalPixels", _NARROWEST, ["lanczos", megapixels, 16], {"image": ("load", 0)},
              "Scale to multiples of 16", above=120)],
    ])


def sampling(width: tuple[str, int] = ("width", 0), height: tuple[str, int] = ("height", 0),
             source: tuple[str, int] = ("loader", 0), conditioning: tuple[str, int] = ("prompt", 0), batch: int = 1,
             steps: int = 4, start: tuple[str, int] | None = None, denoise: float = 1.0) -> Column:
    """``start`` is the latent to begin with (None: an empty one), ``denoise`` the part of the steps to take from it."""
    sides = {"width": width, "height": height}
    guide = {"model": source, "conditioning": conditioning}
    guided = [Node("guider", "BasicGuider", _NARROWEST, [], guide, "Guider (no CFG)"),
              Node("seed", "RandomNoise", _NARROWEST, [20260331, "randomize"], title="Seed"),
              Node("sampler", "KSamplerSelect", _NARROWEST, ["euler"], title="Sampler")]
    scheduler = Node("steps", "Flux2Scheduler", _NARROWEST, [steps, 1024, 1024], sides, "Steps")
    inputs = {"noise": ("seed", 0), "guider": ("guider", 0), "sampler": ("sampler", 0), "sigmas": ("steps", 0),
              "latent_image": ("latent", 0)}
    sample = Node("sample", "SamplerCustomAdvanced", _NARROWEST, [], inputs, "Sample")
    if start is None:
        latent = Node("latent", "EmptyFlux2LatentImage", _NARROWEST, [1024, 1024, batch], sides, "Empty Latent")
        columns = [[*guided, scheduler, latent], [sample]]
    else:
        # The latent comes from the left, straight through the space above the last steps.
        inputs.update(sigmas=("denoise", 1), latent_image=start)
        part = Node("denoise", "SplitSigmasDenoise", _NARROWEST, [denoise], {"sigmas": ("steps", 0)},
                    "How much to change", above=430)
        scheduler.above, sample.above = 68, 274
        columns = [[*guided, scheduler], [part], [sample]]
    return Column(150, [Group("4. Sampling", columns)])


def encoded() -> Group:
    return Group("Your image as a latent", [[
        Node("encode", "VAEEncode", _NARROWEST, [], {"pixels": ("scale", 0), "vae": ("loader", 2)}, "Encode"),
        # It grows when it shows the size.
        Node("measure", "GetImageSize", _NARROWEST, [], {"image": ("scale", 0)}, "Image size", height=150),
    ]])


def image(vae: tuple[str, int] = ("loader", 2), described: Node | None = None, width: int = 400) -> Column:
    below = [Group("Good to know", [[described]])] if described else []
    return Column(0, [Group("5. Image", [
        [Node("decode", "VAEDecode", _NARROWEST, [], {"samples": ("sample", 0), "vae": vae})],
        [Node("save", "SaveImage", width, ["bonsai"], {"images": ("decode", 0)}, height=440)]]), *below])


def text_to_image() -> list[Column]:
    smaller = (f"Short of memory? [prism-ml/{BINARY}]({_HUB}/{BINARY}) is the smaller model; put it into its own "
               "folder beside the first. A smaller decoder comes from *Load VAE*: **full_encoder_small_decoder** of "
               "[FLUX.2-small-decoder](https://huggingface.co/black-forest-labs/FLUX.2-small-decoder) in "
               "**models/vae**, or **taef2** in **models/vae_approx**.\n\n")
    return [Column(0, [model(where_it_goes(TERNARY) + smaller + _SIZES, 410)]),
            Column(230, [prompt(PROMPT), size()]), sampling(), image()]


def part(key: str, kind: str, folder: str, name: str, *more: str) -> Node:
    """A loader of one file. The frontend offers that for download where the list of the loader lacks its name."""
    # As high as in Nodes 2.0, where that is more.
    height = {"VAELoader": 80, "BonsaiTextEncoderLoader": 116}.get(kind)
    return Node(key, kind, 430, [name, *more], height=height,
                models=[{"name": name, "url": FILES[folder][name], "directory": folder}])


def from_files(before: str, after: str, parts: list[Node], pixels: int) -> list[Column]:
    """``parts``: the loaders of the VAE, the MODEL and the CLIP. What leaves the VAE's passes above all else."""
    files = [entry for node in parts for entry in node.models]
    lines = "\n\n".join(f"[{file['url'].split('/main/')[1]}]({file['url']}) as\n```\n"
                        f"models/{file['directory']}/{file['name']}\n```" for file in files)
    described = note("Before the first run", f"{before}\n\n{lines}\n\n{after}", 480)
    described.width = 430
    return [Column(0, [Group("1. Model", [[*parts, described]])]),
            Column(330, [prompt(PROMPT, ("encoder", 0)), size(pixels)]),
            sampling(source=("model", 0)), image(("vae", 0))]


def binary_from_files() -> list[Column]:
    return from_files(
        "The binary model from three single files. Download each, **rename it** as written below, and press **R**.",
        f"The whole repository [prism-ml/{BINARY}]({_HUB}/{BINARY}) as a folder works too, with *Load Bonsai "
        "Checkpoint*.\n\nOne bit per weight is the smallest there is, and 768 x 768 has just over half the pixels of "
        "1024 x 1024.\n",
        [part("vae", "VAELoader", "vae", "bonsai-image-vae.safetensors"),
         part("model", "BonsaiModelLoader", "diffusion_models", f"{BINARY}.safetensors", "auto", "auto", "auto"),
         part("encoder", "BonsaiTextEncoderLoader", "text_encoders", "bonsai-image-qwen3-4B-mlx-4bit.safetensors",
              "default")], 768)


def with_klein_files() -> list[Column]:
    return from_files(
        "You have the text encoder and the VAE of FLUX.2 Klein 4B already? Then you need **one file of 1.4 GB**. "
        "Download what is missing, rename the first as written below, and press **R**.",
        "The text encoder may be any that *Load CLIP* reads as **flux2**: in BF16, 8 GB, or in FP8, half of that. That "
        "of the template *2 Binary, three files* has 2.3 GB.\n",
        [part("vae", "VAELoader", "vae", "flux2-vae.safetensors"),
         part("model", "BonsaiModelLoader", "diffusion_models", f"{TERNARY}.safetensors", "auto", "auto", "auto"),
         part("encoder", "CLIPLoader", "text_encoders", "qwen_3_4b.safetensors", "flux2", "default")], 1024)


def reference_edit() -> list[Column]:
    weakness = note("Editing: what to expect", (
        "This is the graph for FLUX.2 Klein, but **editing is a known weakness of 1-bit and 2-bit weights**: a user "
        "who tried it called the results quite poor. Expect changes where you asked for none.\n\nTry a few seeds "
        "and a short, plain instruction. If the rest of the image must not change, use FLUX.2 Klein 4B itself: the "
        "same graph with ComfyUI's own loaders.\n"), 200)
    reference = Node("reference", "ReferenceLatent", _NARROWEST, [],
                     {"conditioning": ("prompt", 0), "latent": ("encode", 0)},
                     "Image as reference")
    text = (where_it_goes(TERNARY)
            + "Your image is scaled to about one megapixel, and the result has that size.\n")
    return [Column(0, [model(text, 320), source_image()]),
            Column(230, [prompt("Make it winter: snow on the ground and in the air. Keep the rest.",
                                width=_NARROWEST), encoded()]),
            Column(290, [Group("Reference", [[reference]])]),
            sampling(("measure", 0), ("measure", 1), conditioning=("reference", 0)),
            image(described=weakness, width=_NARROWEST)]


def image_to_image() -> list[Column]:
    weakness = note("Image to image: what to expect", (
        "Noise is added to your image, and the model removes it again. *How much to change* is the share of the steps "
        "that runs: 6 steps at 0.67 run 4. Only whole steps count, so more steps give finer control.\n\nLower "
        "values stay closer to your image. How well **1-bit and 2-bit weights** do this has not been measured; "
        "expect details to change even at low values.\n"), 200)
    text = where_it_goes(TERNARY) + "Describe the **whole** image that you want, not the change.\n"
    return [Column(0, [model(text, 320), source_image()]),
            Column(230, [prompt("An ink and watercolour drawing of a girl in a meadow, loose lines, warm paper",
                                width=_NARROWEST),
                         encoded()]),
            sampling(("measure", 0), ("measure", 1), start=("encode", 0), steps=6, denoise=0.67),
            image(described=weakness, width=_NARROWEST)]


def lora() -> list[Column]:
    text = note("LoRA", (
        "Put a LoRA made for **FLUX.2 Klein 4B** into the folder below, then press **R** and choose it.\n\n"
        "```\nmodels/loras\n```\n\nBoth LoRA nodes are **bypassed** until you have one: choose the file, "
        "then select the node and press **Ctrl+B**. Use one or both.\n\nThe LoRA is computed beside the packed "
        "weights, which stay as they are: nothing is merged or rounded. It was trained on the dense weights, so it "
        "may need a different strength here.\n"), 240)
    loras = [Node(key, "LoraLoaderModelOnly", 240, ["flux2_klein_4b_lora.safetensors", strength], {"model": source},
                  title, mode=BYPASSED)
             for key, source, strength, title in (("lora", ("loader", 0), 1.0, "First LoRA"),
                                                  ("second", ("lora", 0), 0.6, "Second LoRA"))]
    return [Column(0, [model(where_it_goes(TERNARY), 290, text)]),
            Column(180, [Group("LoRA", [[node] for node in loras]), prompt(PROMPT, width=520), size()]),
            sampling(source=("second", 0)), image(width=300)]


def few_steps() -> list[Column]:
    text = note("One or two steps", (
        "Bonsai is made for 4 steps. Fewer need a LoRA that was trained for them: put it into the folder below, press "
        "**R**, choose it, select the node and press **Ctrl+B** (it is bypassed until then).\n\n```\n"
        "models/loras\n```\n\n"
        "Made for the dense FLUX.2 Klein 4B, and **not tried by us**: radames/FLUX.2-klein-Sana-Sprint (1 and 2 steps, "
        "rank 256, 735 MB) and epfl-vita/flux2-klein-1step-rdm. One of your own comes from *bonsai-image recover*; it "
        "is for the number of steps that it was trained with.\n"), 240)
    sigmas = note("Which noise levels", (
        "A LoRA for few steps knows only the levels that it was trained at. **Flux2Scheduler** gives, at 512 x 512: "
        "1 step **1**; 2 steps **1, 0.8854**; 4 steps **1, 0.9581, 0.8840, 0.7175**. At 1024 x 1024: **1**; "
        "**1, 0.9091**; **1, 0.9674, 0.9081, 0.7672**.\n\nIf the maker of a LoRA states others, put *ManualSigmas* in "
        "the place of *Steps* and write them there with a **0** at the end: **1, 0.8854, 0**.\n"), 200)
    lora = Node("lora", "LoraLoaderModelOnly", 300, ["flux2_klein_4b_lora.safetensors", 1.0], {"model": ("loader", 0)},
                "LoRA for few steps", mode=BYPASSED)
    return [Column(0, [model(where_it_goes(TERNARY), 290, text)]),
            Column(180, [Group("LoRA", [[lora]]), prompt(PROMPT), size(512)]),
            sampling(source=("lora", 0), steps=2), image(described=sigmas)]


def batch_variations() -> list[Column]:
    text = note("Variations", (
        "*batch_size* in **Empty Latent** is the number of images made at once from one prompt and one seed; each "
        "gets its own noise.\n\nA batch takes more memory than one image; if it does not fit, lower batch_size and "
        "queue several runs.\n\nIn the prompt, **{blue|red|white}** picks one of the words at random for each run "
        "(not for each image).\n"), 200)
    return [Column(0, [model(where_it_goes(TERNARY), 290, text)]),
            Column(230, [prompt("A tiny bonsai tree in a {blue|red|white} ceramic pot on a windowsill, "
                                "{morning light|snow outside|evening}, photograph"), size()]),
            sampling(batch=4), image()]


def lora_training() -> list[Column]:
    images = note("Images and captions", (
        "Make a folder in ComfyUI's *input* folder and put 10 to 50 images there, each with a text file of the same "
        "name that says what is in it (**1.jpg**, **1.txt**). Press **R** and choose the folder above.\n\nA caption "
        "names what may change from image to image. What all images share and no caption mentions is what the LoRA "
        "learns.\n"), 240)
    why = note("Training", (
        "The packed weights stay as they are; the LoRA is trained beside them, with **bypass_mode** on. Without it, "
        "every layer is expanded to a dense weight: the same LoRA for more time and memory. The weights themselves "
        "cannot be trained.\n\nLeave **batch_size** at 1: ComfyUI mixes the captions of a larger batch. "
        "*grad_accumulation_steps* does what a batch is for. Leave **gradient_checkpointing** on, which ComfyUI's "
        "FLUX.2 needs; *checkpoint_depth* 2 keeps the activations of one block at a time.\n\nA falling loss curve is a "
        "good sign, a good image a better one: open the template *3 LoRA*, press **R** and choose the file that "
        "*Save LoRA* wrote. 300 steps are a start; *existing_lora* goes on from one.\n"), 240)
    dataset = Node("dataset", "LoadImageTextDataSetFromFolder", 400, ["training"], title="Images with captions",
                   height=110)
    data = [[dataset, images],
            # Below the links from the loader to the nodes on the right.
            [Node("scale", "ImageScaleToTotalPixels", 300, ["lanczos", 0.25, 16], {"image": ("dataset", 0)},
                  "Scale to multiples of 16", above=140)]]
    encoded = [Node("encode", "VAEEncode", 300, [], {"pixels": ("scale", 0), "vae": ("loader", 2)}, "Encode"),
               Node("captions", "CLIPTextEncode", 300, [""], {"clip": ("loader", 1), "text": ("dataset", 1)},
                    "Captions", 160)]
    settings = [1, 4, 300, 0.0005, 8, "AdamW", "MSE", 0, "fixed", "bf16", "fp32", False, "LoRA", True, 2, False,
                "[None]", False, True]
    train = Node("train", "TrainLoraNode", 340, settings,
                 {"model": ("loader", 0), "latents": ("encode", 0), "positive": ("captions", 0)}, "Train LoRA", 590)
    results = [Node("store", "SaveLoRA", 300, ["loras/bonsai_lora", 0], {"lora": ("train", 0), "steps": ("train", 2)},
                    height=140),
               Node("curve", "LossGraphNode", 300, ["loss_graph"], {"loss": ("train", 1)}, "Loss", 330)]
    return [Column(0, [model(where_it_goes(TERNARY), 290), Group("2. Your images", data)]),
            Column(330, [Group("As the model sees them", [encoded])]), Column(150, [Group("3. Training", [[train]])]),
            Column(0, [Group("4. The LoRA", [results]), Group("Good to know", [[why]])])]


#: By the names of their files, which the gallery of templates shows and most systems sort.
WORKFLOWS = {"1 Text to image": text_to_image, "2 Binary, three files": binary_from_files, "3 LoRA": lora,
             "4 Few steps": few_steps, "5 Image to image": image_to_image, "6 Batch variations": batch_variations,
             "7 LoRA training": lora_training, "8 Reference edit": reference_edit,
             "9 With Klein files": with_klein_files}

#: The subgraph that stands for all of text to image, and what of it shows on the one node.
BLUEPRINT = "Bonsai Text to Image"
BLUEPRINT_DESCRIPTION = ("An image from a prompt with Bonsai Image 4B: ternary or binary weights, 4 steps, no CFG. "
                         "Download a repository into models/diffusers first.")
BLUEPRINT_INPUTS = {"prompt": ("prompt", "text"), "width": ("width", "value"), "height": ("height", "value"),
                    "seed": ("seed", "noise_seed"), "checkpoint": ("loader", "checkpoint")}
BLUEPRINT_OUTPUT = ("decode", 0)


def blueprint_columns() -> list[Column]:
    loader = Node("loader", "BonsaiCheckpointLoader", 400, [TERNARY, "auto", "auto", "auto"])
    decode = Node("decode", "VAEDecode", _NARROWEST, [], {"samples": ("sample", 0), "vae": ("loader", 2)})
    return [Column(0, [Group("1. Model", [[loader]])]), Column(230, [prompt(PROMPT), size()]), sampling(),
            Column(0, [Group("5. Image", [[decode]])])]
