"""The MLX transformer under the real ComfyUI, in float32 on the CPU: the same MODEL with torch and with MLX."""

import comfy.model_management
import comfy.sample
import pytest
import torch
from comfy.patcher_extension import WrappersMP

from bonsai_image.nodes import models
from bonsai_image.nodes.models import describe
from bonsai_image.tests.support.reference import relative

pytest.importorskip("mlx.core")
from bonsai_image.nodes import mlx_path
from bonsai_image.ops.backends import Setting
from bonsai_image.ops.backends.mlx import arrays as mlx_arrays

TOLERANCE = 1e-5


def load(path, backend: str):
    return models.load_model(str(path), "fp32", Setting(backend))


def forward(patcher, *inputs, options=None, **kwargs):
    """One call of the diffusion model as the sampler makes it: with the MODEL's own options and wrappers."""
    comfy.model_management.load_models_gpu([patcher])
    patcher.pre_run()
    options = {**patcher.model_options["transformer_options"], "wrappers": patcher.wrappers, **(options or {})}
    try:
        with torch.inference_mode():
            return patcher.model.diffusion_model(*inputs, transformer_options=options, **kwargs)
    finally:
        patcher.cleanup()


def path_of(patcher) -> mlx_path.MlxPath:
    return patcher.get_attachment(models.MLX_ATTACHMENT)


@pytest.fixture
def pair(transformer):
    return load(transformer, "torch"), load(transformer, "mlx")


@pytest.fixture
def reference_latents():
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(2, 128, h, w, generator=generator) for h, w in ((3, 5), (4, 1))]


@pytest.mark.parametrize("size", [(6, 4), (1, 1), (7, 5)])
@pytest.mark.parametrize("batch", [1, 2])
def test_any_size_and_batch(pair, inputs, size, batch):
    _, sigma, context = inputs
    latent = torch.randn(batch, 128, *size, generator=torch.Generator().manual_seed(4))
    torch_out, mlx_out = (forward(patcher, latent, sigma[:batch], context[:batch, :7]) for patcher in pair)
    assert relative(mlx_out, torch_out) < TOLERANCE
    assert path_of(pair[1]).steps == {"MLX": 1}


def test_binary(binary_transformer, inputs):
    torch_out, mlx_out = (forward(load(binary_transformer, backend), *inputs) for backend in ("torch", "mlx"))
    assert relative(mlx_out, torch_out) < TOLERANCE


@pytest.mark.parametrize("method", [None, "index", "offset", "uxo"])
def test_reference_latents(pair, inputs, reference_latents, method):
    kwargs = {"ref_latents": reference_latents, **({} if method is None else {"ref_latents_method": method})}
    torch_out, mlx_out = (forward(patcher, *inputs, **kwargs) for patcher in pair)
    assert relative(mlx_out, torch_out) < TOLERANCE
    assert relative(forward(pair[0], *inputs), torch_out) > 1e-3, "the references change nothing"
    assert path_of(pair[1]).steps == {"MLX": 1}


def test_rope_options(pair, inputs):
    options = {"rope_options": {"scale_x": 1.5, "scale_y": 0.75, "shift_x": 3.0, "shift_y": 1.0, "shift_t": 2.0}}
    torch_out, mlx_out = (forward(patcher, *inputs, options=options) for patcher in pair)
    assert relative(mlx_out, torch_out) < TOLERANCE
    assert relative(forward(pair[0], *inputs), torch_out) > 1e-3, "the options change nothing"
    assert path_of(pair[1]).steps == {"MLX": 1}


def double(q, k, v, **kwargs):
    return {"q": 2 * q}


def zero_block(args, extra):
    return {"img": torch.zeros_like(args["img"]), "txt": args["txt"]}


@pytest.mark.parametrize(("extra", "reason"), [
    ({"options": {"patches": {"attn1_patch": [double]}}}, "patches (attn1_patch)"),
    ({"options": {"patches_replace": {"dit": {("double_block", 0): zero_block}}}}, "patches_replace (dit)"),
    ({"control": {"input": [torch.randn(2, 24, 256)], "output": []}}, "control"),
    ({"ref_latents_method": "index_timestep_zero"}, "timestep_zero_index"),
    ({"attention_mask": torch.zeros(1, 1, 44, 44).index_fill(3, torch.arange(30), -1.0)}, "attention_mask"),
    ({"options": {"optimized_attention_override": lambda attention, *args, **kw: attention(*args, **kw) * 2}},
     "optimized_attention_override"),
    ({"options": {"unheard of": 1}}, "unheard of"),
])
def test_what_it_does_not_know_goes_to_the_host(pair, inputs, reference_latents, extra, reason):
    extra = dict(extra)
    if "ref_latents_method" in extra:
        extra["ref_latents"] = reference_latents
    torch_out, mlx_out = (forward(patcher, *inputs, **extra) for patcher in pair)
    assert relative(mlx_out, torch_out) < TOLERANCE
    assert path_of(pair[1]).steps == {"ComfyUI": 1}
    assert reason in path_of(pair[1]).declined and reason in describe(pair[1])
    if "unheard of" not in reason:
        assert relative(forward(pair[0], *inputs), torch_out) > 1e-3, "the extra changes nothing"
    # The next step is taken again.
    assert relative(forward(pair[1], *inputs), forward(pair[0], *inputs)) < TOLERANCE
    assert path_of(pair[1]).steps == {"ComfyUI": 1, "MLX": 1} and path_of(pair[1]).declined is None


def test_a_patched_clone_goes_to_the_host_and_the_original_does_not(pair, inputs):
    clone = pair[1].clone()
    generator = torch.Generator().manual_seed(6)
    patch = {"diffusion_model.img_in.weight": (torch.randn(256, 128, generator=generator) / 100,),
             "diffusion_model.single_blocks.0.linear1.weight": (torch.randn(2304, 256, generator=generator) / 100,)}
    clone.add_patches(patch, 1.0)
    assert "because of patches on 2 weights" in describe(clone)
    patched, plain = forward(clone, *inputs), forward(pair[1], *inputs)
    assert path_of(clone).steps == {"ComfyUI": 1, "MLX": 1}
    assert relative(plain, forward(pair[0], *inputs)) < TOLERANCE
    assert relative(patched, plain) > 1e-3
    reference = pair[0].clone()
    reference.add_patches(patch, 1.0)
    assert relative(patched, forward(reference, *inputs)) < TOLERANCE


def half_in(module, args, output):
    return output / 2


def change_forward(flux):
    layer = flux.img_in
    original = layer.forward
    layer.forward = lambda x: original(x) / 2


CHANGES = {
    "weight function": lambda flux: flux.img_in.weight_function.append(lambda weight: weight / 2),
    "hook": lambda flux: flux.img_in.register_forward_hook(half_in),
    "forward": change_forward,
    "bias": lambda flux: flux.img_in.register_parameter("bias", torch.nn.Parameter(torch.arange(256.0), False)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_layer_goes_to_the_host(pair, inputs, change):
    _, plain = (forward(patcher, *inputs) for patcher in pair)
    for patcher in pair:
        CHANGES[change](patcher.model.diffusion_model)
    torch_out, mlx_out = (forward(patcher, *inputs) for patcher in pair)
    assert "img_in" in path_of(pair[1]).declined
    assert relative(mlx_out, torch_out) < TOLERANCE < relative(mlx_out, plain)


def test_a_replaced_method_goes_to_the_host(pair, inputs):
    flux = pair[1].model.diffusion_model
    flux.forward_orig = lambda img, *args, **kwargs: torch.zeros_like(img)
    assert not forward(pair[1], *inputs).any()
    assert "forward_orig" in path_of(pair[1]).declined


def test_other_wrappers_run_around_it(pair, inputs):
    seen = []

    def doubled(executor, *args, **kwargs):
        seen.append(None)
        return 2 * executor(*args, **kwargs)

    for patcher in pair:
        patcher.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "other", doubled)
    torch_out, mlx_out = (forward(patcher, *inputs) for patcher in pair)
    assert len(seen) == 2 and path_of(pair[1]).steps == {"MLX": 1}
    assert relative(mlx_out, torch_out) < TOLERANCE


def test_a_replaced_weight_is_read_again(pair, inputs):
    outs = []
    for patcher in pair:
        outs.append(forward(patcher, *inputs))
        layer = patcher.model.diffusion_model.final_layer.linear
        layer.weight = torch.nn.Parameter(layer.weight * 2, requires_grad=False)
        outs.append(forward(patcher, *inputs))
    _, torch_out, plain, mlx_out = outs
    assert relative(mlx_out, torch_out) < TOLERANCE < relative(mlx_out, plain)
    assert path_of(pair[1]).steps == {"MLX": 2}


def test_sampling_with_the_hosts_own_sampler(pair, inputs, reference_latents, monkeypatch):
    """Four steps through the sampler with a reference; two crossings a step once the weights are there."""
    latent, _, context = inputs
    crossings = []
    for name in ("to_mlx", "to_torch"):
        original = getattr(mlx_arrays, name)
        monkeypatch.setattr(mlx_arrays, name,
                            lambda *args, name=name, original=original: crossings.append(name) or original(*args))
    condition = [[context[:1], {"reference_latents": [reference_latents[0][:1]]}]]

    def sample(patcher):
        return comfy.sample.sample(patcher, latent[:1], 4, 1.0, "euler", "simple", condition, condition,
                                   torch.zeros_like(latent[:1]), seed=1)

    torch_out, mlx_out = (sample(patcher) for patcher in pair)
    assert relative(mlx_out, torch_out) < TOLERANCE
    assert path_of(pair[1]).steps == {"MLX": 4} and "4 in MLX so far" in describe(pair[1])
    assert crossings == ["to_mlx", *["to_mlx", "to_torch"] * 4]


def test_cancelling(pair, inputs):
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        forward(pair[1], *inputs)
    assert relative(forward(pair[1], *inputs), forward(pair[0], *inputs)) < TOLERANCE


@pytest.mark.parametrize("part", ["step", "load"])
def test_where_mlx_fails_comfyui_computes(pair, inputs, monkeypatch, caplog, part):
    def fail(*args, **kwargs):
        calls.append(part)
        raise AttributeError("module 'mlx.core' has no attribute 'fast'")

    calls = []
    monkeypatch.setattr(mlx_path.mlx_klein, part, fail)
    for _ in range(2):
        assert relative(forward(pair[1], *inputs), forward(pair[0], *inputs)) < TOLERANCE
    assert calls == [part] and path_of(pair[1]).steps == {"ComfyUI": 2}
    assert "because of a failure of MLX (see the log)" in describe(pair[1])
    assert caplog.text.count("fails in a step of the whole transformer (AttributeError: ") == 1


def test_unloading_drops_the_weights(pair, inputs):
    forward(pair[1], *inputs)
    assert path_of(pair[1])._weights
    comfy.model_management.unload_all_models()
    assert not path_of(pair[1])._weights and not path_of(pair[1])._tensors
    assert relative(forward(pair[1], *inputs), forward(pair[0], *inputs)) < TOLERANCE


def test_a_clone_takes_the_weights_over(pair, inputs):
    """The host hands a model from clone to clone at every run; MLX does not make the weights again."""
    forward(pair[1], *inputs)
    weights = path_of(pair[1])._weights
    forward(pair[1].clone(), *inputs)
    assert path_of(pair[1])._weights is weights


def test_without_mlx_nothing_is_installed(pair):
    assert path_of(pair[0]) is None and "path:" not in describe(pair[0])
    assert "bonsai_image_mlx" not in pair[0].wrappers[WrappersMP.DIFFUSION_MODEL]
    assert "bonsai_image_mlx" in pair[1].wrappers[WrappersMP.DIFFUSION_MODEL]
