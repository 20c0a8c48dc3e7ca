// The diffusion model of stable-diffusion.cpp alone, for ctypes: load a file, and one forward pass on given inputs.
// Built by stable_diffusion.sh, which fixes the version that this is written against.

#include "flux.hpp"

struct Model {
    ModelLoader loader;
    std::shared_ptr<Flux::FluxRunner> flux;
};

static const char* PREFIX = "model.diffusion_model";

// Null where stable-diffusion.cpp does not take the file for FLUX.2 Klein.
extern "C" Model* load(const char* path) {
    auto model = std::make_unique<Model>();
    if (!model->loader.init_from_file_and_convert_name(path, std::string(PREFIX) + ".")) {
        return nullptr;
    }
    const SDVersion version = model->loader.get_sd_version();
    if (version != VERSION_FLUX2_KLEIN) {
        return nullptr;
    }
    model->flux = std::make_shared<Flux::FluxRunner>(ggml_backend_cpu_init(), false,
                                                     model->loader.get_tensor_storage_map(), PREFIX, version, false);
    model->flux->alloc_params_buffer();
    std::map<std::string, ggml_tensor*> tensors;
    model->flux->get_param_tensors(tensors, PREFIX);
    return model->loader.load_tensors(tensors) ? model.release() : nullptr;
}

extern "C" void unload(Model* model) {
    delete model;
}

// x and out: (channels, height, width); context: (tokens, context_width); time: 0 to 1. False where it failed.
extern "C" bool forward(Model* model, int threads, const float* x, int64_t channels, int64_t height, int64_t width,
                        const float* context, int64_t tokens, int64_t context_width, float time, float* out) {
    sd::Tensor<float> latent({width, height, channels, 1});
    sd::Tensor<float> prompt({context_width, tokens, 1});
    std::copy_n(x, channels * height * width, latent.data());
    std::copy_n(context, tokens * context_width, prompt.data());
    const auto result = model->flux->compute(threads, latent, sd::Tensor<float>::from_vector({time}), prompt);
    if (result.empty()) {
        return false;
    }
    std::copy_n(result.data(), channels * height * width, out);
    return true;
}
