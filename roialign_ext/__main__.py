"""`python -m roialign_ext`: what was built, what runs here, and a self-check against the reference.

Exits with 0 only if the self-check passes. Knows nothing of how anything is computed.
"""

import functools
import sys

import torch

from . import __version__, _library, multiscale_roi_align, reference


def main() -> int:
    info = _library.build_info()
    kernels = "CPU kernels only"
    if info["cuda"]:
        kernels = f"CPU and CUDA kernels (CUDA {info['cuda']}, architectures {' '.join(info['cuda_archs'])})"
    print(f"roialign_ext {__version__}")
    print(f"built       {info['build']} for torch {info['torch']} (compiler: {info['compiler']})")
    print(f"            {kernels}; CPU instruction sets: {info['cpu_capability']}")
    print(f"            {info['path']}")

    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    names = ", ".join(f"{gpu.name} ({gpu.major}.{gpu.minor})" for gpu in gpus) or "none visible"
    print(f"runs        torch {torch.__version__}, {torch.get_num_threads()} CPU threads; GPUs: {names}")

    passed = _check("cpu")
    if gpus and info["cuda"]:
        passed &= _check("cuda")
    elif gpus:
        print("self-check  cuda: left out, this build has no CUDA kernels")
    return 0 if passed else 1


def _check(device: str) -> bool:
    """Pool and differentiate a small pyramid on `device`; compare both with the reference."""
    generator = torch.Generator().manual_seed(0)
    scales = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    features = [torch.randn(2, 5, int(192 * s), int(256 * s), generator=generator) for s in scales]
    corner = torch.rand(40, 2, generator=generator) * torch.tensor([240.0, 180.0])
    size = 4 + torch.rand(40, 2, generator=generator) ** 2 * 600
    image = torch.arange(40.0)[:, None] % 2
    boxes = torch.cat([image, corner, corner + size], dim=1)
    cotangent = torch.randn(40, 5, 7, 7, generator=generator)

    def run(pool, device, dtype):
        maps = [feature.to(device, dtype).requires_grad_() for feature in features]
        pooled = pool(maps, boxes.to(device), 7, scales, 2, True)
        return [pooled, *torch.autograd.grad(pooled, maps, cotangent.to(device, dtype))]

    # float64 sums over the very samples the kernels take, whose coordinates are float32.
    exact = functools.partial(reference.multiscale_roi_align, coordinate_dtype=torch.float32)
    ours = run(multiscale_roi_align, device, torch.float32)
    theirs = run(exact, "cpu", torch.float64)
    errors = [(a.cpu() - b).abs().max().item() for a, b in zip(ours, theirs, strict=True)]
    # Unit features: float32 keeps 1e-7 of each, and a gradient cell sums some dozens of them.
    passed = max(errors) < 1e-4
    print(
        f"self-check  {device}: forward within {errors[0]:.1e} and backward within {max(errors[1:]):.1e} "
        f"of the reference: {'passed' if passed else 'FAILED'}"
    )
    return passed


if __name__ == "__main__":
    sys.exit(main())
