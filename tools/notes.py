"""What the notes on the example workflows say, in Markdown.

Commands and paths are quotations: the frontend breaks their lines in both of its ways to draw nodes, where code blocks
scroll sideways in one and inline code is blue on blue.
"""

HUB = "https://huggingface.co/prism-ml"


def quoted(line: str) -> str:
    """A command or a path, in a paragraph of its own."""
    return f"\n\n> {line}\n\n"


def where_it_goes(repository: str) -> str:
    """How to get the whole ``repository``, whose name says the variant."""
    variant = "binary" if "binary" in repository else "ternary"
    command = quoted(f"python ComfyUI/custom_nodes/bonsai-image download --variant {variant}")
    return (f"Download the **whole** repository [prism-ml/{repository}]({HUB}/{repository}), with the Python that "
            f"runs ComfyUI:{command}or by hand, into the folder{quoted(f'models/diffusers/{repository}')}"
            "Then press **R** and choose it above. *Run* without it says the whole command.\n\nThe frontend has no "
            "button for a folder, only for single files: the templates *2 Binary, three files* and *9 With Klein "
            "files* have it, and their loaders can be copied here.\n\n")


def files_go(before: str, files: list[dict[str, str]], after: str) -> str:
    """``files``: what the frontend offers for download, with its name, address and folder."""
    lines = "".join(f"[{file['url'].split('/main/')[1]}]({file['url']}) as"
                    + quoted(f"models/{file['directory']}/{file['name']}") for file in files)
    return f"{before}\n\n{lines}{after}"


SIZES = ("The model is made for **4 steps** at **1024 x 1024**; other sizes should be multiples of 16 "
         "(ComfyUI rounds them down). There is no CFG and so no negative prompt: describe what you want to see.\n")


def smaller(repository: str) -> str:
    return (f"Short of memory? [prism-ml/{repository}]({HUB}/{repository}) is the smaller model; put it into its own "
            "folder beside the first. A smaller decoder comes from *Load VAE*: **full_encoder_small_decoder** of "
            "[FLUX.2-small-decoder](https://huggingface.co/black-forest-labs/FLUX.2-small-decoder) in "
            "**models/vae**, or **taef2** in **models/vae_approx**.\n\n")


BINARY_FILES = ("The binary model from three single files. Download each, **rename it** as written below, and press "
                "**R**.")


def binary_folder(repository: str) -> str:
    return (f"The whole repository [prism-ml/{repository}]({HUB}/{repository}) as a folder works too, with *Load "
            "Bonsai Checkpoint*.\n\nOne bit per weight is the smallest there is, and 768 x 768 has just over half the "
            "pixels of 1024 x 1024.\n")


KLEIN_FILES = ("You have the text encoder and the VAE of FLUX.2 Klein 4B already? Then you need **one file of "
               "1.4 GB**. Download what is missing, rename the first as written below, and press **R**.")

KLEIN_ENCODERS = ("The text encoder may be any that *Load CLIP* reads as **flux2**: in BF16, 8 GB, or in FP8, half of "
                  "that. That of the template *2 Binary, three files* has 2.3 GB.\n")

EDITING = ("This is the graph for FLUX.2 Klein, but **editing is a known weakness of 1-bit and 2-bit weights**: a user "
           "who tried it called the results quite poor. Expect changes where you asked for none.\n\nTry a few seeds "
           "and a short, plain instruction. If the rest of the image must not change, use FLUX.2 Klein 4B itself: the "
           "same graph with ComfyUI's own loaders.\n")

EDITED_SIZE = "Your image is scaled to about one megapixel, and the result has that size.\n"

IMAGE_TO_IMAGE = ("Noise is added to your image, and the model removes it again. *How much to change* is the share of "
                  "the steps that runs: 6 steps at 0.67 run 4. Only whole steps count, so more steps give finer "
                  "control.\n\nLower values stay closer to your image. How well **1-bit and 2-bit weights** do this "
                  "has not been measured; expect details to change even at low values.\n")

WHOLE_IMAGE = "Describe the **whole** image that you want, not the change.\n"

LORA = ("Put a LoRA made for **FLUX.2 Klein 4B** into the folder below, then press **R** and choose it."
        f"{quoted('models/loras')}Both LoRA nodes are **bypassed** until you have one: choose the file, then select "
        "the node and press **Ctrl+B**. Use one or both.\n\nThe LoRA is computed beside the packed weights, which stay "
        "as they are: nothing is merged or rounded. It was trained on the dense weights, so it may need a different "
        "strength here.\n")

FEW_STEPS = ("Bonsai is made for 4 steps. Fewer need a LoRA that was trained for them: put it into the folder below, "
             "press **R**, choose it, select the node and press **Ctrl+B** (it is bypassed until then)."
             f"{quoted('models/loras')}Made for the dense FLUX.2 Klein 4B, and **not tried by us**: "
             "radames/FLUX.2-klein-Sana-Sprint (1 and 2 steps, rank 256, 735 MB) and "
             "epfl-vita/flux2-klein-1step-rdm. One of your own comes from *bonsai-image recover*; it is for the number "
             "of steps that it was trained with.\n")

NOISE_LEVELS = (
    "A LoRA for few steps knows only the levels that it was trained at. **Flux2Scheduler** gives, at 512 x 512: "
    "1 step **1**; 2 steps **1, 0.8854**; 4 steps **1, 0.9581, 0.8840, 0.7175**. At 1024 x 1024: **1**; "
    "**1, 0.9091**; **1, 0.9674, 0.9081, 0.7672**.\n\nIf the maker of a LoRA states others, put *ManualSigmas* in "
    "the place of *Steps* and write them there with a **0** at the end: **1, 0.8854, 0**.\n")

VARIATIONS = ("*batch_size* in **Empty Latent** is the number of images made at once from one prompt and one seed; "
              "each gets its own noise.\n\nA batch takes more memory than one image; if it does not fit, lower "
              "batch_size and queue several runs.\n\nIn the prompt, **{blue|red|white}** picks one of the words at "
              "random for each run (not for each image).\n")

CAPTIONS = (
    "Make a folder in ComfyUI's *input* folder and put 10 to 50 images there, each with a text file of the same "
    "name that says what is in it (**1.jpg**, **1.txt**). Press **R** and choose the folder above.\n\nA caption "
    "names what may change from image to image. What all images share and no caption mentions is what the LoRA "
    "learns.\n")

TRAINING = (
    "The packed weights stay as they are; the LoRA is trained beside them, with **bypass_mode** on. Without it, "
    "every layer is expanded to a dense weight: the same LoRA for more time and memory. The weights themselves "
    "cannot be trained.\n\nLeave **batch_size** at 1: ComfyUI mixes the captions of a larger batch. "
    "*grad_accumulation_steps* does what a batch is for. Leave **gradient_checkpointing** on, which ComfyUI's "
    "FLUX.2 needs; *checkpoint_depth* 2 keeps the activations of one block at a time.\n\nA falling loss curve is a "
    "good sign, a good image a better one: open the template *3 LoRA*, press **R** and choose the file that "
    "*Save LoRA* wrote. 300 steps are a start; *existing_lora* goes on from one.\n")
