"""rlhf_jax: reward models, the policies that exploit them, and what keeps them from it, in JAX."""

__version__ = "0.1.0"
