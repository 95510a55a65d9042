"""Where prompts, comparisons and gold rewards come from.

`prompts` reads JSONL files, tokenises prompts and turns sampled tokens back into text; `sentiment` learns a gold
reward for text from labelled reviews; `synthetic` is a language of our own, whose gold reward is known exactly; `world`
makes either into what a study needs. All of it runs on the host and hands on the records of `rlhf_jax.types`.
"""
