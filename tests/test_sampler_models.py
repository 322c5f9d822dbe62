"""Which families of models the sampler works with: sampled log-probs against the model's own forward, or a clear refusal.

Random small models in fp32. `python tests/test_sampler_models.py` prints the table of benchmarks/README.md.
"""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))
from sampler import Sampler, SamplingParams, output_scaling  # noqa: E402

SIZES = dict(
    vocab_size=97, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=64)
MOE = dict(num_local_experts=4, num_experts_per_tok=2)
WIDE = dict(sliding_window=4096)
PLAIN = dict(num_key_value_heads=4, head_dim=12)  # these have neither in their configuration
OPT = PLAIN | dict(ffn_dim=96, word_embed_proj_dim=48)
FAMILIES = {  # name: (model type, what differs from SIZES)
    "Llama": ("llama", {}),
    "Llama, yarn": ("llama", dict(rope_parameters=YARN)),
    "Qwen2": ("qwen2", {}),
    "Qwen3": ("qwen3", {}),
    "Qwen3-MoE": ("qwen3_moe", dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)),
    "Mistral": ("mistral", dict(sliding_window=None)),
    "Mistral, window": ("mistral", WIDE),
    "Mixtral": ("mixtral", MOE),
    "Gemma": ("gemma", {}),
    "Gemma 2": ("gemma2", WIDE),
    "Gemma 3, text": ("gemma3_text", WIDE),
    "Phi-3": ("phi3", {}),
    "OLMo 2": ("olmo2", {}),
    "SmolLM3": ("smollm3", {}),
    "GLM-4": ("glm4", {}),
    "GPT-2": ("gpt2", PLAIN),
    "OPT": ("opt", OPT),
    "LFM2": ("lfm2", dict(layer_types=["conv", "full_attention"])),
    "Granite": ("granite", dict(logits_scaling=8.0)),
    "Cohere": ("cohere", dict(logit_scale=0.25)),
    "Cohere 2": ("cohere2", WIDE),
    "StableLM": ("stablelm", dict(hidden_size=64, num_key_value_heads=4)),
    "GPT-NeoX": ("gpt_neox", PLAIN),
}
REFUSED = {"Gemma 2", "LFM2", "StableLM"}
FAST = ("Llama", "Granite", "Cohere", "StableLM", "LFM2")


def make(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    kind, special = FAMILIES[name]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | special)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.15 + (parameter == 1))
    return model


def largest_difference(name: str) -> float:
    """Over the log-probs of 2 x 3 sampled rows of a shared prompt, sampled at temperature 0.7."""
    model, worst = make(name), 0.0
    sampler = Sampler(model, stop_ids=[])
    prompts = [[1, 5, 9, 40, 3, 3], [7, *range(50)]]
    rows = sampler.fork(sampler.prefill(prompts), 3)
    params = SamplingParams(temperature=0.7, max_new_tokens=20)
    for i, completion in enumerate(sampler.sample(rows, params, seeds=range(6))):
        prompt = prompts[i // 3]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion.ids])).logits[0, len(prompt) - 1 : -1]
        logps = (logits.double() / 0.7).log_softmax(-1).gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
        worst = max(worst, (logps - torch.tensor(completion.logps).double()).abs().max().item())
    return worst


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES])
def test_sampled_log_probs_are_the_models_own_or_it_is_refused(name):
    if name not in REFUSED:
        assert largest_difference(name) < 1e-5
        return
    with pytest.raises(ValueError) as error:
        largest_difference(name)
    assert "\n" not in str(error.value) and len(str(error.value)) > 20


def test_the_scale_of_the_head_is_read_from_the_config():
    assert output_scaling(make("Llama").config) == (1.0, 0.0)
    assert output_scaling(make("Granite").config) == (0.125, 0.0)
    assert output_scaling(make("Cohere").config) == (0.25, 0.0)
    assert output_scaling(AutoConfig.for_model("gemma2")) == (1.0, 30.0)


if __name__ == "__main__":
    print("| family | works | largest difference of a log-prob |\n|---|---|---|")
    for family in sys.argv[1:] or FAMILIES:
        try:
            print(f"| {family} | yes | {largest_difference(family):.1e} |")
        except Exception as error:  # the table shows what a user would see
            print(f"| {family} | no | {type(error).__name__}: {error} |")
