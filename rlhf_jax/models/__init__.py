"""Networks as pure functions of a configuration and a parameter tree.

- `config`: `ModelConfig`, the shape of a decoder-only transformer.
- `transformer`: the trunk: tokens in, hidden states and new cache entries out.
- `attention`: rotary embedding, grouped-query attention, the key-value cache.
- `heads`: what is read off hidden states: token logits, values, rewards; and the trees by role.
- `huggingface`: Llama-layout Hugging Face folders in.
"""
