"""The fifty types that are shown with every capability.

There is no network where the table is made, so no hub was asked: the list is our judgement of what model hubs serve
most, by family and by kind. Of each family the generations that people still run were taken, and of each kind at
least what its best known checkpoints are made of. It is written down here so that it can be argued with.
"""

from __future__ import annotations

MOST_USED: dict[str, tuple[str, ...]] = {
    "causal": (
        "llama",
        "mistral",
        "mixtral",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "qwen3_next",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gemma4_text",
        "phi",
        "phi3",
        "gpt2",
        "gpt_neo",
        "gpt_neox",
        "gptj",
        "gpt_oss",
        "opt",
        "bloom",
        "falcon",
        "deepseek_v3",
        "glm4",
        "olmo2",
        "granite",
        "cohere2",
        "starcoder2",
        "smollm3",
        "glm4_moe",
    ),
    "image-text": ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "gemma3", "paligemma", "smolvlm", "internvl"),
    "masked": ("bert", "roberta", "distilbert", "xlm-roberta", "deberta-v2", "modernbert", "mpnet"),
    "text-to-text": ("t5", "bart"),
    "speech": ("whisper",),
    "base": ("wav2vec2", "hubert"),
}
"""Task -> types."""


def is_most_used(model_type: str, task: str) -> bool:
    return model_type in MOST_USED.get(task, ())
