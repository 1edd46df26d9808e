"""Models on this machine: names, files, the cache, and how they get here.

`store.resolve` turns what a user writes (`smollm2-135m`, `NAME=PATH`, a path) into
files; `catalog` lists the models with short names; `pull` fetches from packages
or, through `hub`, from a Hugging Face-shaped endpoint; `describe` says what a
model is.
"""
