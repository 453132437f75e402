"""What several test files need: one thread, and model folders small enough to prune in a fraction of a second."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

hypothesis.settings.register_profile("tests", deadline=None, max_examples=40, print_blob=True)
hypothesis.settings.load_profile("tests")

VOCABULARY = 32
TINY = {  # a decoder that prunes in a fraction of a second
    "vocab_size": VOCABULARY,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
WORDS = ("root", "stem", "leaf", "bud", "twig", "bark", "sap", "thorn", "branch", "fruit", "seed", "graft")


@pytest.fixture(autouse=True, scope="session")
def one_quiet_thread() -> None:
    torch.set_num_threads(1)
    disable_progress_bar()


def save_llama(folder: Path, *, layers: int = 2, tied: bool = True, shards: bool = True, seed: int = 0) -> Path:
    """A random LLaMA in a folder, in two shards or one."""
    torch.manual_seed(seed)
    more = {"num_hidden_layers": layers, "max_position_embeddings": 64, "tie_word_embeddings": tied}
    config = LlamaConfig(**TINY | more, initializer_range=0.3)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size=f"{layers + 1}KB" if shards else "1GB")
    return folder


def save_tokenizer(folder: Path) -> None:
    """A tokenizer that takes a dozen words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(("<unk>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


def batches(count: int = 2, length: int = 8, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(VOCABULARY, (1, length), generator=generator)} for _ in range(count)]


def text(words: int = 200, seed: int = 2) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[int(index)] for index in torch.randint(len(WORDS), (words,), generator=generator))


def contents(folder: Path) -> dict[str, Any]:
    """File name -> bytes; of secateur.json the part that does not depend on the clock and the machine."""
    from secateur.card import VOLATILE

    found: dict[str, Any] = {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }
    if "secateur.json" in found:
        details = json.loads(found["secateur.json"])
        found["secateur.json"] = {key: value for key, value in details.items() if key not in VOLATILE}
    return found


def fingerprint(folder: Path) -> str:
    """Of everything in a folder: names, bytes and modification times."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(f"{path.relative_to(folder)} {path.lstat().st_mtime_ns} {path.is_symlink()}".encode())
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks, two shards, tied embeddings, a tokenizer. Not to be changed: copy it first."""
    folder = save_llama(tmp_path_factory.mktemp("models") / "llama")
    save_tokenizer(folder)
    return folder


@pytest.fixture
def unchanged() -> Any:
    """Folders given to it have to be the same after the test."""
    seen: dict[Path, str] = {}

    def watch(folder: Path) -> Path:
        seen[folder] = fingerprint(folder)
        return folder

    yield watch
    for folder, before in seen.items():
        assert fingerprint(folder) == before, f"{folder} was changed"


Watch = Callable[[Path], Path]
