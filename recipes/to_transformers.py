"""A checkpoint of this project as a model of transformers.

    model = to_transformers("runs/main/...pt")
    model.save_pretrained("folder")

Parameters are named as in GPT-2, whose linear layers are stored transposed. The model comes in
evaluation mode, and its dropout is 0, as it was in training: a Trainer that puts it into training
mode goes on as here. nanoGPT takes torch.load(path, weights_only=True)["model"] as it is.
Run with transformers 5.24 and 4.52. Costs nothing in training: there is none.
"""
import torch
from transformers import GPT2Config, GPT2LMHeadModel

EOS = 127    # as in data.py


def to_transformers(path):
    saved = torch.load(path, map_location="cpu", weights_only=True)
    gpt = saved["gpt"]
    config = GPT2Config(vocab_size=gpt["vocab_size"], n_positions=gpt["block_size"],
                        n_embd=gpt["n_embd"], n_layer=gpt["n_layer"], n_head=gpt["n_head"],
                        activation_function="gelu", resid_pdrop=0.0, embd_pdrop=0.0,
                        attn_pdrop=0.0, bos_token_id=None, eos_token_id=EOS)
    transposed = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight",
                  "mlp.c_proj.weight")
    weights = {}
    for name, w in saved["model"].items():
        weights[name] = w.T if name.endswith(transposed) else w
    model = GPT2LMHeadModel(config)
    model.load_state_dict(weights)
    return model.eval()
