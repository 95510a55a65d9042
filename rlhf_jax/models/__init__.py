"""Networks as pure functions of a configuration and a parameter tree.

- `config`: `ModelConfig`, the shape of a decoder-only transformer of any family.
- `transformer`: the trunk: tokens in, hidden states and new cache entries out.
- `layers`, `attention`, `rope`, `experts`: its parts, and the key-value cache.
- `attention_choice`: which attention runs: `ring_attention` for long contexts, `row_attention` for CPUs, or the kernels
  of `cudnn_attention` for GPUs and `splash_attention` for TPUs.
- `partitioning`: the one table from logical axes to mesh axes; `shares`: functions of one device's share of arrays.
- `quantised`: arrays in eight bits; `compressed_moments`: Adam with moments in 2 bytes or 1 byte a parameter.
- `memory`: what the backward pass keeps, and parameters that wait in the memory of the host.
- `chunked_logprobs`: log-probabilities and entropies without logits of a whole sequence.
- `divergence`: the KL of two policies over the whole vocabulary, likewise.
- `heads`: what is read off hidden states: token logits, values, rewards; and the trees by role.
- `adapters`: LoRA and its relatives as trees beside a frozen base; `peft_folders`: their folders in and out.
- `huggingface`: Hugging Face folders in and out.
"""
