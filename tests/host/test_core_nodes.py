"""ComfyUI's own nodes that people combine with a MODEL, on packed weights against dense ones, in FP32.

Each gives the same latent from both, and another than the plain MODEL, or it would prove nothing.
"""

import comfy.sd
import comfy.utils
import folder_paths
import pytest
import torch
from comfy_extras.nodes_apg import APG
from comfy_extras.nodes_cfg import CFGZeroStar
from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from comfy_extras.nodes_eps import EpsilonScaling
from comfy_extras.nodes_fresca import FreSca
from comfy_extras.nodes_lora_debug import LoraLoaderBypassModelOnly
from comfy_extras.nodes_model_advanced import RescaleCFG
from comfy_extras.nodes_model_merging import ModelMergeSimple, ModelSave, ModelSubtract
from comfy_extras.nodes_multigpu import SelectModelDeviceNode
from comfy_extras.nodes_nag import NAGuidance
from comfy_extras.nodes_rope import ScaleROPE
from comfy_extras.nodes_slg import SkipLayerGuidanceDiT
from comfy_extras.nodes_tcfg import TCFG
from comfy_extras.nodes_torch_compile import TorchCompileModel
from safetensors.torch import load_file, save_file

from bonsai_image.tests.support.reference import relative
from bonsai_image.tests.support.sampling import HEIGHT, WIDTH, random, sample

CFG = 4.0


def guided(model):
    return sample(model, cfg=CFG)


def easy_cache(model):
    """Five steps, of which some are skipped: with a threshold of 3 as many as may be."""
    return sample(EasyCacheNode.execute(model, 3.0, 0.0, 1.0, False).args[0], steps=5)


def lazy_cache(model):
    return sample(LazyCacheNode.execute(model, 3.0, 0.0, 1.0, False).args[0], steps=5)


def nag(model):
    return sample(NAGuidance.execute(model, 5.0, 0.5, 1.5).args[0])


def apg(model):
    return guided(APG.execute(model, 0.5, 5.0, -0.5).args[0])


def cfg_zero_star(model):
    return guided(CFGZeroStar.execute(model).args[0])


def rescale_cfg(model):
    return guided(RescaleCFG().patch(model, 0.7)[0])


def skip_layer_guidance(model):
    return guided(SkipLayerGuidanceDiT.execute(model, 3.0, 0.0, 1.0, "0", "0,1").args[0])


def scale_rope(model):
    return sample(ScaleROPE.execute(model, 1.5, 2.0, 0.7, 0.0, 1.0, 0.0).args[0])


def tcfg(model):
    return guided(TCFG.execute(model).args[0])


def fresca(model):
    return guided(FreSca.execute(model, 0.5, 2.0, 1).args[0])


def epsilon_scaling(model):
    return sample(EpsilonScaling.execute(model, 1.1).args[0])


def differential_diffusion(model):
    mask = torch.linspace(0, 1, WIDTH).expand(1, 1, HEIGHT, WIDTH)
    return sample(DifferentialDiffusion.execute(model, 1.0).args[0], latent=random(1, 128, HEIGHT, WIDTH, seed=8),
                  mask=mask)


PATCHES = [easy_cache, lazy_cache, nag, apg, cfg_zero_star, rescale_cfg, skip_layer_guidance, scale_rope, tcfg, fresca,
           epsilon_scaling, differential_diffusion]
#: Those that change how two predictions are combined: held against plain guidance.
GUIDED = {apg, cfg_zero_star, rescale_cfg, skip_layer_guidance, tcfg, fresca}
CACHES = {easy_cache, lazy_cache}


@pytest.mark.parametrize("node", PATCHES, ids=lambda node: node.__name__)
def test_a_node_does_the_same_to_packed_and_dense_weights(pair, node):
    packed, dense = (node(model) for model in pair)
    plain = guided(pair[1]) if node in GUIDED else sample(pair[1], steps=5 if node in CACHES else 3)
    assert relative(dense, plain) > 1e-3
    assert relative(packed, dense) < 1e-4
    assert relative(sample(pair[0]), sample(pair[1])) < 1e-4, "the node changed the MODEL itself"


@pytest.fixture(scope="module")
def others(pair, binary_transformer):
    """A second packed MODEL and its dense twin, to merge with."""
    from bonsai_image.loaders import load_transformer
    from bonsai_image.loaders.names import to_comfyui
    from bonsai_image.nodes import models

    tensors = to_comfyui(load_transformer(binary_transformer).tensors)
    dense = {name: tensor.dequantize().float() if hasattr(tensor, "dequantize") else tensor.float()
             for name, tensor in tensors.items()}
    return models.load_model(str(binary_transformer), "fp32"), comfy.sd.load_diffusion_model_state_dict(dense)


def merge_simple(one, other):
    return ModelMergeSimple().merge(one, other, 0.3)[0]


def subtract(one, other):
    return ModelSubtract().merge(one, other, 0.5)[0]


@pytest.mark.parametrize("merge", [merge_simple, subtract], ids=lambda merge: merge.__name__)
def test_a_merge_of_two_models(pair, others, merge):
    packed, dense = (sample(merge(one, other)) for one, other in zip(pair, others, strict=True))
    assert relative(packed, dense) < 1e-4 and relative(dense, sample(pair[1])) > 1e-3


def test_model_save_writes_what_loads_again(pair, transformer, tmp_path, monkeypatch):
    """Save Model keeps the packed layers packed, in the format of Save Bonsai Model."""
    from bonsai_image.nodes import models

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    saving = ModelSave()
    saving.output_dir = str(tmp_path)
    saving.save(pair[0], "saved")
    path = next(tmp_path.glob("saved_*.safetensors"))
    assert torch.equal(sample(models.load_model(str(path), "fp32")), sample(pair[0]))


def test_the_bypass_lora_loader(pair, tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(12)
    down, up = (torch.randn(*shape, generator=generator) * 0.1 for shape in ((4, 256), (256, 4)))
    name = "diffusion_model.double_blocks.0.img_attn.proj"
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, tmp_path / "lora.safetensors")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    bypassed, dense = (LoraLoaderBypassModelOnly().load_lora_model_only(model, "lora.safetensors", 1.0)[0]
                       for model in pair)
    packed, expected = sample(bypassed), sample(dense)
    assert relative(packed, expected) < 1e-3 and relative(expected, sample(pair[1])) > 1e-3


def test_select_model_device_cpu(pair):
    chosen = SelectModelDeviceNode.execute(pair[0], "cpu").args[0]
    assert torch.equal(sample(chosen), sample(pair[0]))


@pytest.mark.parametrize("backend", ["inductor"])
def test_torch_compile(pair, backend):
    assert relative(sample(TorchCompileModel.execute(pair[0], backend).args[0]), sample(pair[1])) < 1e-4


@torch.inference_mode()
def test_tiled_vae(repository):
    """The tiled nodes give with our loader's VAE what they give with ComfyUI's own."""
    import nodes as host_nodes
    from bonsai_image.nodes import models

    ours = models.load_vae_model(str(repository / "vae"))
    stock = comfy.sd.VAE(sd=load_file(repository / "vae" / "diffusion_pytorch_model.safetensors"))
    image = random(1, 192, 160, 3, seed=6).mul(0.2).add(0.5).clamp(0, 1)
    latents = [host_nodes.VAEEncodeTiled().encode(vae, image, 128, 32)[0] for vae in (ours, stock)]
    images = [host_nodes.VAEDecodeTiled().decode(vae, latents[0], 128, 32)[0] for vae in (ours, stock)]
    assert torch.equal(latents[0]["samples"], latents[1]["samples"]) and torch.equal(*images)
    assert images[0].shape == image.shape
