"""What a model reads in its context: draws of tasks, prompts and sufficient statistics; JAX, float32 unless told."""
