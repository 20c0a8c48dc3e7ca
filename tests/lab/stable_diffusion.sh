#!/usr/bin/env bash
# stable_diffusion.sh FOLDER: build stable-diffusion.cpp for the CPU, with a ggml that knows Q1_0 and Q2_0, and
# stable_diffusion.cpp of this folder. Both sources come from the package index, inside the sdists of
# stable-diffusion-cpp-python 0.4.7 and llama-cpp-python 0.3.36. Needs cmake, ninja and a C++ compiler; about five
# minutes on one core. Then: BONSAI_SDCPP=FOLDER BONSAI_GGML=FOLDER/bin/libggml-base.so pytest tests/test_gguf*.py
set -euo pipefail
lab=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1" && cd "$1"
python -m pip install scikit-build-core
for package in stable_diffusion_cpp_python==0.4.7 llama_cpp_python==0.3.36; do
    python -m pip download --no-deps --no-binary :all: --no-build-isolation "$package"
    tar xzf "${package/==/-}.tar.gz"
done
source=stable_diffusion_cpp_python-0.4.7/vendor/stable-diffusion.cpp
rm -rf $source/ggml
mv llama_cpp_python-0.3.36/vendor/llama.cpp/ggml $source/ggml
cmake -G Ninja -S $source -B . -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DSD_BUILD_SHARED_LIBS=ON \
    -DSD_BUILD_SHARED_GGML_LIB=ON -DSD_BUILD_EXAMPLES=OFF -DSD_WEBP=OFF -DSD_WEBM=OFF -DGGML_LLAMAFILE=ON
ninja ${NINJA_JOBS:+-j "$NINJA_JOBS"} stable-diffusion
c++ -O2 -std=c++17 -fPIC -shared -DGGML_MAX_NAME=128 -I$source/src -I$source/include -I$source/thirdparty \
    -I$source/ggml/include "$lab/stable_diffusion.cpp" -o libflux.so -Lbin -lstable-diffusion -lggml -lggml-cpu \
    -lggml-base -Wl,-rpath,"$PWD/bin"
