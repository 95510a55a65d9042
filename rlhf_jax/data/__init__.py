"""Where prompts, demonstrations, comparisons and gold rewards come from.

- `rows`, `columns`, `formats`, `converters`: JSONL and Parquet files as rows of a known format.
- `tokenization`, `chats`: rows as token ids, with a mask of what is trained on; dropped rows are counted by reason.
- `unpaired`: single completions that are marked good or bad.
- `batches`, `packing`, `pipeline`: padding to a few lengths, several demonstrations a row, and the order of batches.
- `builders`: published data sets, read from files that the user has downloaded.
- `prompts`: prompts as one batch, and sampled tokens as text; `sentiment`: a gold reward of text.
- `synthetic`, `world`: a language of our own whose gold reward is known exactly; what a study needs.

All of it runs on the host and hands on the records of `rlhf_jax.types`.
"""
