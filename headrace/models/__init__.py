"""Models on this machine: names, files, the cache, and how they get here.

`resolve` turns what a user writes (`smollm2-135m`, `NAME=PATH`, a path) into
files; `store` is the cache; `pull` fetches.
"""
