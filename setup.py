"""Packages: `step_megatron` (the trainer) and `step_kernels` (ops usable without Megatron, in `kernels/`)."""

from setuptools import find_packages, setup

setup(
    name="step-megatron",
    version="0.1.0",
    description="Train audio language models on Megatron-Core: the system of the Step-Audio-R1.5 report",
    license="Apache-2.0",
    python_requires=">=3.11,<3.12",
    packages=find_packages(include=["step_megatron", "step_megatron.*"]) + ["step_kernels"],
    package_dir={"step_kernels": "kernels/step_kernels"},
    package_data={"step_megatron": ["config/presets/*.yaml", "data/fetch/sources.yaml"]},
    install_requires=[
        "torch>=2.13,<2.15",
        "megatron-core==0.16.1",
        "nvidia-dali-cuda130>=2.4,<2.5",
        "numpy>=2,<3",
        "soundfile>=0.13,<0.15",
        "av>=16,<19",
        "pyyaml>=6,<7",
        "tiktoken>=0.9,<0.15",
        "safetensors>=0.5,<0.9",
        "tensorboard>=2.18,<2.22",
        "einops>=0.8,<0.10",
        "psutil>=6,<8",
        "tqdm>=4.66,<5",
    ],
    extras_require={
        # A GPU machine: Transformer Engine layers (FP8). Never beside Megatron on a CPU: without its torch extension it breaks
        # `import megatron.core.optimizer`.
        "cuda": ["transformer-engine[pytorch]>=2.9,<2.12", "triton>=3.6,<3.9"],
        "nemo": ["nemo-toolkit[asr]>=2.5,<4"],
        "wandb": ["wandb>=0.19,<1"],
        "dev": [
            "pytest>=8,<10",
            "pytest-timeout>=2.3,<3",
            "hypothesis>=6.100,<7",
            "transformers>=5.20,<6",
            "scikit-learn>=1.5,<2",
            "ruff>=0.9,<0.18",
        ],
    },
    entry_points={"console_scripts": ["step-megatron=step_megatron.cli:main"]},
)
