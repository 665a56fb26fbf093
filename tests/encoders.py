"""Small random encoders with a classification head, as transformers makes them."""

import torch
import transformers

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
