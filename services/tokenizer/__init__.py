"""The tokenizer service: chat templates, text → token ids → block ids, in a pool of processes.

`service` does the work and knows no process and no wire; `pool` spreads it over
`pool_process`es; `servicer` speaks gRPC. Families of tokenizers stand in the
table `backends.BACKENDS`.
"""
