"""What kind of model runs on a batch, and what it can give: that says how its rows are laid out (`outcome.py`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from headwise.errors import Refusal
from headwise.model.attached import AttachedModel
from headwise.model.finding.example import can_generate
from headwise.model.running.run import parameter_names, picture_token
from headwise.probes.layout import Ids

Want = Literal["logits", "generation", "embedding"]
WANTS: tuple[Want, ...] = get_args(Want)

_CAUSAL: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class Form:
    """What kind of model this is, for the layout of its rows."""

    attached: AttachedModel
    network: Any  # the transformers model; a PEFT wrapper's forward does not name what its inner model takes
    kind: Literal["decoder", "encoder-decoder", "encoder"]
    accepted: frozenset[str]

    @staticmethod
    def of(attached: AttachedModel) -> Form:
        inner = getattr(attached.model, "get_base_model", None)
        network: Any = inner() if callable(inner) else attached.model
        accepted = frozenset(parameter_names(type(network).forward))
        if "input_ids" not in accepted:
            raise Refusal(f"{attached.name} takes no tokens, so it cannot run on items; use a model that reads text")
        if "pixel_values" in accepted and not can_generate(network):
            raise Refusal(f"{attached.name} needs pictures beside the text; attach its text tower, or another model")
        if getattr(network.config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
            return Form(attached, network, "encoder-decoder", accepted)
        return Form(attached, network, "decoder" if can_generate(network) else "encoder", accepted)

    def require(self, want: Want) -> None:
        """Raises Refusal if the model cannot give this, as far as it can be told before a run."""
        if want == "embedding":
            return
        if self.kind == "encoder":
            raise Refusal(
                f"{self.attached.name} does not predict what comes next, so it gives no {want}; "
                "use a metric of the embedding, or a model with a language-model head that can generate"
            )
        if want == "generation":
            if not can_generate(self.network):
                raise Refusal(f"{self.attached.name} has no generate(); use a metric that needs no generation")
            if self.attached.tokenizer is None:
                raise Refusal(
                    f"{self.attached.name} has no tokenizer to write its continuation as text; "
                    "attach it with one: hw.attach(model, tokenizer)"
                )

    def require_causal(
        self, inputs: dict[str, Tensor], seeing: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    ) -> None:
        """Raises Refusal if a token changes the logits before it: an answer behind its prompt would show itself; or if
        logits are NaN, which says neither.

        Tried once per model, on two rows that differ in their last token, when no plan is open: a run of the user's own
        plan must not be another one.
        """
        known = _CAUSAL.get(self.network)
        if known is None and self.attached.planned:
            return
        if known is None:
            row = {name: tensor[:1].repeat(2, 1) for name, tensor in inputs.items()}
            last = row["input_ids"][1, -1]
            row["attention_mask"] = torch.ones_like(row["attention_mask"])
            if "position_ids" in row:
                row["position_ids"] = torch.arange(row["position_ids"].shape[1], device=last.device).repeat(2, 1)
            others = [
                id for id in (last - 1, last + 1, last - 2, last + 2) if id >= 0 and id != picture_token(self.network)
            ]
            row["input_ids"][1, -1] = others[0]
            with torch.no_grad():
                logits = self.network(**seeing(row), **self.taken(use_cache=False)).logits
            if bool(logits.isnan().any()):
                raise Refusal(
                    f"the logits of {self.attached.name} are not numbers (NaN), so nothing can be told from them; "
                    "check its weights, or load it with dtype='float32'"
                )
            # What is alike may be infinite: some models rule tokens out with -inf.
            apart = (logits[0, :-1] - logits[1, :-1]).masked_fill(logits[0, :-1] == logits[1, :-1], 0.0)
            known = bool(apart.abs().max() <= 1e-4 * logits[logits.isfinite()].abs().max())
            _CAUSAL[self.network] = known
        if not known:
            raise Refusal(
                f"{self.attached.name} looks at tokens behind the one it predicts from, so an answer given behind its "
                "prompt would show itself; use exact-match-generated, or answers of one token"
            )

    def start(self) -> Ids:
        """What stands in the decoder of an encoder-decoder before the answer. Raises Refusal if that is not known."""
        settings = [getattr(self.network, "generation_config", None), self.network.config]
        names = ("decoder_start_token_id", "bos_token_id")
        found = [getattr(each, name, None) for name in names for each in settings]
        first = next((id for id in found if isinstance(id, int)), None)
        if first is None:
            raise Refusal(
                f"{self.attached.name} does not say what its decoder starts with; "
                "set generation_config.decoder_start_token_id of the model"
            )
        forced = getattr(settings[0], "forced_bos_token_id", None)
        return (first,) if forced is None else (first, forced)

    def taken(self, **arguments: Any) -> dict[str, Any]:
        """Those of `arguments` that the model's forward names."""
        return {name: value for name, value in arguments.items() if name in self.accepted}

    @property
    def fill(self) -> int:
        """An id for padding that is never attended."""
        pad = getattr(self.network.config, "pad_token_id", None)
        return pad if isinstance(pad, int) and pad >= 0 else 0
