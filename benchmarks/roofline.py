"""The time of a denoising step that a GPU's bandwidth and rates allow: dense, expanded, and with int8 digits.

    python benchmarks/roofline.py            # the table of RESULTS.md

A model, not a measurement: every operation takes the longer of its arithmetic and its memory traffic. ``benchmarks/
gpu.py`` prints it beside what it measures. Rates and bandwidths are the vendors' (dense, without sparsity; consumer
GPUs with FP32 accumulation). The shares are assumptions: of the BF16 peak, what cuBLAS usually reaches; of the int8
peak, what the instructions of our compiled kernel leave for the matrix units, of which converting the sums of groups to
float takes most on data-centre GPUs.
"""

from typing import NamedTuple

#: Packed layers as ComfyUI names them, (N, K): in a double block for image and text each, and in a single block.
DOUBLE = ((9216, 3072), (3072, 3072), (18432, 3072), (3072, 9216))
SINGLE = ((27648, 3072), (3072, 12288))
DOUBLE_BLOCKS, SINGLE_BLOCKS, HIDDEN, TEXT = 5, 20, 3072, 512
#: Share of the bandwidth that a kernel reaches, seconds between two kernels, share of the BF16 peak in attention.
BANDWIDTH_SHARE, GAP, ATTENTION_SHARE = 0.85, 2e-6, 0.75
GROUP = 128


class Gpu(NamedTuple):
    """``bf16`` and ``int8``: 10**12 operations a second. ``bandwidth``: GB/s. ``*_share``: see the module."""

    bf16: float
    int8: float
    bandwidth: float
    bf16_share: float
    int8_share: float

    def move(self, size: float) -> float:
        """Seconds to read and write ``size`` bytes, and to start the kernel that does it."""
        return size / (self.bandwidth * 1e9 * BANDWIDTH_SHARE) + GAP

    def multiply(self, m: int, n: int, k: int) -> float:
        """Seconds of a dense BF16 product."""
        return max(2 * m * n * k / (self.bf16 * 1e12 * self.bf16_share) + GAP, self.move(2 * (m * k + n * k + m * n)))

    def multiply_int8(self, m: int, n: int, k: int, digits: int) -> float:
        return max(digits * 2 * m * n * k / (self.int8 * 1e12 * self.int8_share) + GAP,
                   self.move(digits * m * k + n * k + 2 * m * n))

    def expand(self, n: int, k: int, bits: int, itemsize: int) -> float:
        return self.move((bits / 8 + 2 / GROUP + itemsize) * n * k)


GPUS = {
    "NVIDIA GeForce RTX 3060": Gpu(25.5, 102, 360, 0.92, 0.72),
    "NVIDIA GeForce RTX 3090": Gpu(71, 284, 936, 0.95, 0.72),
    "NVIDIA GeForce RTX 4090": Gpu(165, 660, 1008, 0.90, 0.70),
    "NVIDIA GeForce RTX 5090": Gpu(209.5, 838, 1792, 0.92, 0.70),
    "NVIDIA A100-SXM4-40GB": Gpu(312, 624, 1555, 0.85, 0.42),
    "NVIDIA H100 80GB HBM3": Gpu(989, 1979, 3350, 0.70, 0.42),
}


#: A dense weight; the packed one expanded; activations in two int8 digits, and in one: ``fast`` without outliers.
WAYS = ("dense", "expanded", "two digits", "one digit")


def linear(gpu: Gpu, way: str, m: int, n: int, k: int, bits: int = 2) -> float:
    """Seconds of one packed product of ``m`` rows."""
    if way == "dense":
        return gpu.multiply(m, n, k)
    if way == "expanded":
        return gpu.expand(n, k, bits, 2) + gpu.multiply(m, n, k)
    digits = 2 if way == "two digits" else 1
    return gpu.move((2 + digits) * m * k) + gpu.expand(n, k, bits, 1) + gpu.multiply_int8(m, n, k, digits)


def step(gpu: Gpu, way: str, size: int, bits: int = 2) -> float:
    """Seconds of a step at ``size`` x ``size``: the packed products, attention and the element-wise passes."""
    image = (size // 16) ** 2
    rows = image + TEXT
    products = DOUBLE_BLOCKS * sum(linear(gpu, way, m, n, k, bits) for m in (image, TEXT) for n, k in DOUBLE)
    products += SINGLE_BLOCKS * sum(linear(gpu, way, rows, n, k, bits) for n, k in SINGLE)
    attention = (DOUBLE_BLOCKS + SINGLE_BLOCKS) * 4 * rows**2 * HIDDEN / (gpu.bf16 * 1e12 * ATTENTION_SHARE)
    # Bytes a row of norms, modulation, rotary embedding, gates and activations, in a block of either kind.
    double, single = 2 * 24 * HIDDEN, 2 * (HIDDEN * 12 + 9216 * 4 + 12288 * 2)
    passes = gpu.move(rows * (DOUBLE_BLOCKS * double + SINGLE_BLOCKS * single))
    return products + attention + passes


def expected(name: str, size: int, bits: int = 2) -> dict[str, float] | None:
    """Seconds of a step by way on the GPU that torch calls ``name``, or None where its rates are not listed."""
    gpu = GPUS.get(name)
    return None if gpu is None else {way: step(gpu, way, size, bits) for way in WAYS}


def table() -> list[str]:
    """Milliseconds of a step, and its speed relative to dense in brackets."""
    lines = [f"| GPU | size | {' ms | '.join(WAYS)} ms |", "|---" * (2 + len(WAYS)) + "|"]
    for name in GPUS:
        for size in (512, 1024):
            dense, *packed = expected(name, size).values()
            cells = " | ".join(f"{seconds * 1e3:.0f} ({dense / seconds:.2f})" for seconds in packed)
            lines.append(f"| {name.removeprefix('NVIDIA ')} | {size}² | {dense * 1e3:.0f} | {cells} |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
