"""The weights, in transformers: names are GPT-2's, whose linear layers are stored transposed."""
import torch
from transformers import GPT2Config, GPT2LMHeadModel


def to_transformers(path):
    saved = torch.load(path, weights_only=True)
    g = saved["gpt"]
    hf = GPT2LMHeadModel(GPT2Config(vocab_size=g["vocab_size"], n_positions=g["block_size"],
                                    n_embd=g["n_embd"], n_layer=g["n_layer"], n_head=g["n_head"],
                                    activation_function="gelu", bos_token_id=None,
                                    eos_token_id=127))
    linear = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    hf.load_state_dict({k: v.T if k.endswith(linear) else v for k, v in saved["model"].items()})
    return hf
