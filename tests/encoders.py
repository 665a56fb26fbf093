"""Small encoders as transformers makes them, and texts with labels that they learn in a few seconds."""

import json
import random
from pathlib import Path

import torch
import transformers
from tokenizers import BertWordPieceTokenizer

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
    "pad_token_id": 1,
}


def classifier(family: str, seed: int = 0, **changes) -> torch.nn.Module:
    """Weights wide enough that attention is far from uniform: errors in positions, masks or biases move the logits."""
    config = transformers.AutoConfig.for_model(family, **SIZES, **changes)
    torch.manual_seed(seed)
    model = transformers.AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").eval()
    for weight in model.parameters():
        noise = torch.randn_like(weight)
        weight.data = weight.data + 0.3 * noise if weight.ndim == 1 else 0.3 * noise
    return model


WORDS = {"bad": ("loss", "falls", "weak"), "fair": ("stays", "flat", "even"), "good": ("gain", "rises", "strong")}
FILLING = tuple(f"word{i}" for i in range(24))
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def write_tokenizer(directory: Path) -> None:
    """A WordPiece tokenizer of whole words."""
    words = [*SPECIAL, *(word for words in WORDS.values() for word in words), *FILLING]
    made = BertWordPieceTokenizer(vocab={word: number for number, word in enumerate(words)})
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    inputs = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"], "model_max_length": 64}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made._tokenizer, **inputs, **names)
    tokenizer.save_pretrained(directory)


def write_texts(file: Path, count: int, seed: int, pairs: bool = False) -> None:
    """Sentences whose label is that of one of their words; of pairs the second one's, as a number to predict."""
    draw, lines = random.Random(seed), []
    for number in range(count):
        label = draw.choice(list(WORDS))
        words = [*draw.choices(FILLING, k=draw.randint(3, 7)), draw.choice(WORDS[label])]
        draw.shuffle(words)
        sentence = " ".join(words)
        if pairs:
            first = " ".join(draw.choices(FILLING, k=4))
            line = {"sentence1": first, "sentence2": sentence, "label": list(WORDS).index(label) / 2}
        else:
            line = {"sentence": sentence, "label": label}
        lines.append(json.dumps({"idx": number, **line}) + "\n")
    file.write_text("".join(lines))


def write_base(directory: Path, family: str = "bert") -> None:
    """A model without a head, saved without its prefix, and its tokenizer."""
    sizes = {**SIZES, "num_hidden_layers": 2, "vocab_size": 48, "pad_token_id": 0, "initializer_range": 0.1}
    torch.manual_seed(0)
    transformers.AutoModel.from_config(transformers.AutoConfig.for_model(family, **sizes)).save_pretrained(directory)
    write_tokenizer(directory)
