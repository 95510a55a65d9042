"""Packaging of rlhf_jax; `pip install -e .` installs what the experiments need on a CPU."""

from pathlib import Path

from setuptools import find_packages, setup

TEST = [
    "beartype>=0.20",
    "hypothesis>=6.100",
    "ipykernel>=6.29",
    "nbclient>=0.10",
    "pytest>=8.0",
    "pytest-xdist>=3.5",
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
        "chex>=0.1.90",
        "einops>=0.8",
        "flax>=0.12",
        "jax>=0.10",
        "jaxtyping>=0.3",
        "matplotlib>=3.9",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11",
        "rich>=13",
        "safetensors>=0.5",
        "scikit-learn>=1.5",
        "tokenizers>=0.21",
        "transformers>=4.50",
        "tyro>=0.9",
    ],
    extras_require={
        "cuda12": ["jax[cuda12]>=0.10"],
        "tpu": ["jax[tpu]>=0.10"],
        "test": TEST,
        "dev": TEST + CHECK,
    },
)
