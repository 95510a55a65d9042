"""Packaging of rlhf_jax; `pip install -e .` installs what the experiments need on a CPU."""

from pathlib import Path

from setuptools import find_packages, setup

TEST = [
    "beartype>=0.20",
    "hypothesis>=6.100",
    "ipykernel>=6.29",
    "nbclient>=0.10",
    "peft>=0.17",
    "pytest>=8.0",
    "pytest-xdist>=3.5",
    "tensorboardX>=2.6",
    "torch==2.13.0",  # the oracle of the parity tests; this version is a small build for the CPU
]
CHECK = ["import-linter>=2.1", "ruff>=0.9"]

setup(
    name="rlhf_jax",
    version="0.1.0",
    description="How far a reward model can be trusted, and what keeps a policy from exploiting it: RLHF in JAX.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["rlhf_jax", "rlhf_jax.*"]),
    package_data={"rlhf_jax": ["py.typed"]},
    install_requires=[
        "array-record>=0.6",
        "chex>=0.1.90",
        "einops>=0.8",
        "flax>=0.12",
        "grain>=0.2.12",
        "huggingface-hub>=0.30",
        "importlib-resources>=6",  # tensorflow-datasets needs it and does not say so
        "jax>=0.10",
        "jaxtyping>=0.3",
        "jinja2>=3.1",  # chat templates
        "matplotlib>=3.9",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11",
        "psutil>=6",
        "pyarrow>=17",
        "rich>=13",
        "safetensors>=0.5",
        "scikit-learn>=1.5",
        "tensorflow-datasets>=4.9.9",
        "tokenizers>=0.21",
        "transformers>=4.50",
        "tyro>=0.9",
    ],
    extras_require={
        "cuda12": ["jax[cuda12]>=0.10"],
        "tpu": ["jax[tpu]>=0.10"],
        "plan": ["jax[tpu]>=0.10"],  # the compiler for TPUs, which plans use on machines without any
        "tracking": ["tensorboardX>=2.6", "wandb>=0.18"],
        "test": TEST,
        "dev": TEST + CHECK,
    },
)
