"""The models and items that speed is measured on: two common shapes with random weights.

    model = GPT2_SMALL.build(seed=0)
    items = random_items(GPT2_SMALL, n=2, tokens=128, seed=0)

What a model knows has no bearing on how long it takes. Query and key weights are four times what an untrained model
has, so that attention is not uniform and an edit is felt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from headwise.probes.encoded import EncodedItem
from headwise.probes.encoding import ItemSet
from headwise.probes.item import Item

SHARPER = 4.0
"""What query and key weights are multiplied with."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a decoder; `family` is its architecture. A GPT-2 has as many KV heads as heads."""

    family: Literal["gpt2", "llama"]
    layers: int
    heads: int
    kv_heads: int
    width: int
    feed_forward: int
    vocabulary: int
    positions: int = 1024

    def build(self, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """A model in eval mode on the CPU; the same weights for the same seed. Global random state is left alone."""
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(seed)
            model = GPT2LMHeadModel(self._gpt2()) if self.family == "gpt2" else LlamaForCausalLM(self._llama())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("q_proj.weight", "k_proj.weight")):
                    parameter.mul_(SHARPER)
                elif name.endswith("c_attn.weight"):
                    parameter[:, : 2 * self.width].mul_(SHARPER)  # queries, keys, values side by side
        return model.to(dtype).eval()

    def _gpt2(self) -> GPT2Config:
        return GPT2Config(
            vocab_size=self.vocabulary,
            n_embd=self.width,
            n_layer=self.layers,
            n_head=self.heads,
            n_inner=self.feed_forward,
            n_positions=self.positions,
            bos_token_id=0,
            eos_token_id=0,
        )

    def _llama(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.feed_forward,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=self.positions,
            bos_token_id=0,
            eos_token_id=0,
        )


GPT2_SMALL = Shape("gpt2", 12, 12, 12, 768, 3072, 50257)
LLAMA_GQA = Shape("llama", 12, 12, 4, 768, 2048, 32000)


def random_items(shape: Shape, *, n: int, tokens: int, seed: int = 0) -> ItemSet:
    """Items of random ids, all of one length, each with an answer of one token and one foil; `logit-difference`."""
    draw = torch.Generator().manual_seed(seed)
    prompts = torch.randint(1, shape.vocabulary, (n, tokens), generator=draw).tolist()
    asked = [torch.randperm(shape.vocabulary - 1, generator=draw)[:2].add(1).tolist() for _ in range(n)]
    rows = [
        EncodedItem(
            item=Item(prompt="", answer="", id=f"random-{row}"),
            prompt=tuple(prompt),
            answer=(answer,),
            also=(),
            foils=((foil,),),
            spans={},
            twin=None,
        )
        for row, (prompt, (answer, foil)) in enumerate(zip(prompts, asked, strict=True))
    ]
    return ItemSet("random", tuple(rows), {}, "logit-difference", pad=0)
