"""The demo family's tokenizer: a token is a word, a digit or a sign."""

import json
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from dppa_jax.demo.text import GENERATORS, stream

SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
PIECE = "▁?[A-Za-z]+|▁?[0-9]|[^A-Za-z0-9▁]|▁"  # as in SentencePiece, ▁ stands for the space before a word
SAMPLES_READ = 2000  # of each task; the rarest word is in about one sample of a hundred


class Encoder:
    """The saved tokenizer as training calls it: like that of transformers, which takes two seconds to import."""

    def __init__(self, directory: Path):
        self._tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.bos_token_id, self.eos_token_id, self.pad_token_id = (
            self._tokenizer.token_to_id(SPECIAL[name]) for name in ("bos_token", "eos_token", "pad_token")
        )

    def __len__(self) -> int:
        """Return the size of the vocabulary."""
        return self._tokenizer.get_vocab_size()

    def __call__(self, texts: Sequence[str], add_special_tokens: bool = True) -> dict[str, list[list[int]]]:
        """Return the tokens of each text as `input_ids`."""
        encoded = self._tokenizer.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        return {"input_ids": [one.ids for one in encoded]}


def save_tokenizer(directory: Path) -> None:
    """Write tokenizer.json, and the settings with which vLLM and every version of transformers load it."""
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(vocabulary())}, SPECIAL["unk_token"]))
    tokenizer.add_special_tokens(list(SPECIAL.values()))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE), "isolated")
    bos = SPECIAL["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **SPECIAL, "clean_up_tokenization_spaces": False}
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def vocabulary() -> list[str]:
    """List all tokens: special ones, digits at the start of a number and inside, words and signs of all tasks."""
    digits = [space + digit for space in ("▁", "") for digit in "0123456789"]
    words = set()
    for task in GENERATORS:
        for sample in islice(stream(task, "train", "vocabulary"), SAMPLES_READ):
            for text in (f"{sample.prompt} {sample.answer}", sample.plain):
                words.update(re.findall(PIECE, "▁" + text.replace(" ", "▁")))
    return [*SPECIAL.values(), *digits, *sorted(words - set(digits))]
