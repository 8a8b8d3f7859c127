"""A small random LLaDA in the published layout, with a byte-level tokenizer and a chat template."""

import json
import shutil

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from diffpo_jax.models.pretrained import tensor_table
from diffpo_jax.models.transformer import ModelConfig

EOS, MASK, USER, ASSISTANT = range(256, 260)  # after the 256 bytes
SPECIAL = ("<|eos|>", "<|mask|>", "<|user|>", "<|assistant|>")
VOCAB = 264
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_model(folder, *, eos_id=EOS, mask_id=MASK, vocab_size=VOCAB, tokenizer=None):
    """Writes it to `folder`; `tokenizer`: a folder to take the tokenizer's files from instead, which have those ids."""
    folder.mkdir(exist_ok=True)
    if tokenizer is None:
        write_tokenizer(folder)
    else:
        for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"):
            shutil.copy(tokenizer / name, folder / name)
    config = {
        "model_type": "llada", "mask_token_id": mask_id, "eos_token_id": eos_id, "pad_token_id": eos_id, "rope_theta": 1e4,
        "rms_norm_eps": 1e-5, "block_type": "llama", "activation_type": "silu", "layer_norm_type": "rms", "rope": True, "alibi": False,
        "weight_tying": False, "include_bias": False, "include_qkv_bias": False, "d_model": 16, "n_layers": 2, "n_heads": 2,
        "n_kv_heads": 2, "mlp_hidden_size": 16, "embedding_size": vocab_size, "vocab_size": vocab_size,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    sizes = ModelConfig(vocab_size=vocab_size, mask_id=mask_id, width=16, layers=2, heads=2, kv_heads=2, mlp_width=16)
    rng = np.random.default_rng(0)
    tensors = {name: 0.3 * rng.normal(size=slot.shape).astype(np.float32) for name, slot in tensor_table("llada", sizes).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_tokenizer(folder):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "eos_token": "<|eos|>"}))
