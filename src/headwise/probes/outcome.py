"""One run of a model on a batch of items: its logits at the answers, what it goes on to write, its embedding.

    outcome = observe(model, batch, wants=frozenset({"logits"}))
    outcome.logits                      # [item, token, vocab]: row i, column t predicts token t of answer i

How the rows are laid out hangs on the model, and is the same in every batch size:

- a model that continues text gets prompt and answer in one row, prompts flush right;
- an encoder-decoder gets the prompt in the encoder and start token and answer in the decoder, both flush left;
- an encoder gets the prompt flush left.

Encoders count positions from the left and seldom say from which number, so there the padding is on the right.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwise.errors import InputError, Refusal
from headwise.model.attached import AttachedModel
from headwise.model.edit import Edit
from headwise.model.positions import Columns
from headwise.probes.batch import Batch
from headwise.probes.form import WANTS, Form, Want
from headwise.probes.layout import Ids

MARGIN = 16
"""Tokens that a continuation may have beyond the item's own answer, where no number is given."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one run.

    Attributes:
        batch: the items that ran.
        logits: at the columns from which each answer token is predicted, the tokens before it given; in fp32 (fp64 if
            the model is). Column 0 stands behind the prompt and is there for every item; columns past the end of a
            shorter answer hold no meaning. None where not asked for, as with the rest.
        generated: ids of the greedy continuation, up to and with the end token; -1 behind it.
        text: the continuation as the tokenizer writes it, special tokens left out.
        embedding: mean of the last hidden state over the tokens of the prompt.
        cache: keys and values of all columns of the run for logits, where they were asked for and the model gives them.
    """

    batch: Batch
    logits: Float[Tensor, "item token vocab"] | None = None
    generated: Int[Tensor, "item token"] | None = None
    text: tuple[str, ...] | None = None
    embedding: Float[Tensor, "item width"] | None = None
    cache: Any = None

    @property
    def predicting(self) -> Bool[Tensor, "item token"]:
        """The columns of `logits` that hold a meaning: one per answer token, and the first where there is no answer."""
        mask = torch.zeros(len(self.batch.items), max(self.batch.answers.shape[1], 1), dtype=torch.bool)
        mask[:, : self.batch.answers.shape[1]] = self.batch.answer_mask
        mask[:, 0] = True
        return mask if self.logits is None else mask.to(self.logits.device)


@dataclass(frozen=True, slots=True)
class Past:
    """The columns that stand in a cache before a run: those below `column`."""

    cache: Any
    column: int


@dataclass(frozen=True, slots=True)
class Places:
    """Where the prompts stand in the rows that `observe` runs, in the form that `reading` and `editing` take.

    Attributes:
        spans: columns of each span in each row; spans that not every item has are left out. Of an encoder-decoder
            they are columns of the encoder, and are right for its heads only.
        prompt_length: where the prompt ends and the answer begins; None where they do not share a row.
    """

    spans: Mapping[str, list[list[int]]]
    prompt_length: int | None


def places(model: AttachedModel, batch: Batch) -> Places:
    """Where the items of `batch` stand in the rows of this model; `batch.spans` is that of left-padded prompts."""
    form = Form.of(model)
    if form.kind == "decoder":
        return Places(batch.spans, batch.prompt_length)
    spans = {
        name: [[position for place in each.spans[name] for position in place] for each in batch.items]
        for name in batch.spans
    }
    return Places(spans, None)


def refuse_two_sided(model: AttachedModel, batch: Batch) -> None:
    """Raises `Refusal` if answers of several tokens cannot be put behind their prompts, because the model looks ahead.

    `observe` does so itself unless a plan is open, in which no other run may come between.
    """
    _Run(Form.of(model), batch).refuse_two_sided()


def refuse_spans_in_the_decoder(model: AttachedModel, edits: Iterable[Edit]) -> None:
    """Raises `Refusal` for an edit in a span of an encoder-decoder's decoder: spans are places of the encoder."""
    if Form.of(model).kind != "encoder-decoder":
        return
    for edit in edits:
        words = [edit.scope]
        for chosen in (edit.queries, edit.keys):
            words += chosen.named if isinstance(chosen, Columns) else [chosen] if isinstance(chosen, str) else []
        named = [each for each in words if "span:" in each]
        stacks = {site.stack for site in model.table.select(edit.heads).sites} - {"encoder"}
        if named and stacks:
            raise Refusal(
                f"{edit!r} acts in the decoder of {model.name}, and {named[0]!r} is a place of the encoder's prompt; "
                "edit heads of the encoder, or name columns with your own spans="
            )


def observe(
    model: AttachedModel,
    batch: Batch,
    *,
    wants: Collection[Want],
    new_tokens: int | None = None,
    gradients: bool = False,
    cached: bool = False,
    past: Past | None = None,
) -> Outcome:
    """Run the model on a batch, under whatever plan is open on it.

    Each thing wanted is one forward, or one `generate`.

    Args:
        batch: from `ItemSet.batches`.
        wants: any of `logits`, `generation`, `embedding`.
        new_tokens: most tokens of a continuation (default: `MARGIN` more than the item's own answer has).
        gradients: whether logits and embedding keep their graph.
        cached: whether the run for logits leaves its keys and values (`Outcome.cache`).
        past: of a model that continues text, columns that the run for logits finds in a cache; it runs on the others.

    Raises:
        InputError: something unknown is wanted, or the batch holds prompts alone and the answers have several tokens.
        Refusal: the model cannot give what is wanted.
    """
    unknown = [each for each in wants if each not in WANTS]
    if unknown or not wants or isinstance(wants, str):
        raise InputError(f"wants={wants!r} does not say what to observe; give some of {', '.join(WANTS)} in a set")
    if new_tokens is not None and (not isinstance(new_tokens, int) or new_tokens < 1):
        raise InputError(f"new_tokens={new_tokens!r} must be a whole number of tokens, at least 1")
    run = _Run(Form.of(model), batch)
    for want in wants:
        run.form.require(want)
    logits = generated = embedding = cache = None
    text = None
    with torch.set_grad_enabled(gradients):
        if "logits" in wants:
            logits, cache = run.logits(past, cached)
        if "embedding" in wants:
            embedding = run.embedding()
    if "generation" in wants:
        generated = run.generate(new_tokens)
        text = tuple(
            model.tokenizer.decode([id for id in row if id >= 0], skip_special_tokens=True)
            for row in generated.tolist()
        )
    return Outcome(batch, logits, generated, text, embedding, cache)


@dataclass(frozen=True, slots=True)
class _Run:
    form: Form
    batch: Batch

    def logits(self, past: Past | None, cached: bool) -> tuple[Float[Tensor, "item token vocab"], Any]:
        tokens = max(self.batch.answers.shape[1], 1)
        if self.form.kind == "decoder":
            if self.batch.input_ids.shape[1] != self.batch.prompt_length + tokens - 1:
                raise InputError(
                    f"this batch holds prompts alone, and its answers have up to {tokens} tokens; "
                    "make it with items.batches(size), without answers=False"
                )
            self.refuse_two_sided()
            inputs: dict[str, Any] = self._seeing(self._left_padded(self.batch.input_ids.shape[1]))
            if past is not None:
                for name in inputs.keys() & {"input_ids", "position_ids"}:
                    inputs[name] = inputs[name][:, past.column :]
                inputs["past_key_values"] = past.cache
            with self.form.attached.prompted(self.batch.prompt_length):
                keep = self.form.taken(logits_to_keep=tokens)
                output = self._forward(inputs, keep, use_cache=cached or past is not None)
        else:
            answers = [self.form.start() + each.answer[:-1] for each in self.batch.items]
            ids, mask = self._right_padded(answers)
            decoder = self.form.taken(decoder_input_ids=ids, decoder_attention_mask=mask, logits_to_keep=tokens)
            output = self._forward(self._encoded(), decoder)
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor):
            raise Refusal(
                f"{self.form.attached.name} returns no logits; load it with its language-model head, "
                "or use a metric of the embedding"
            )
        return _wide(logits[:, -tokens:]), getattr(output, "past_key_values", None) if cached else None

    def refuse_two_sided(self) -> None:
        """Raises Refusal if the answers have several tokens, and the model would see those it has yet to say."""
        width = self.batch.input_ids.shape[1]
        if self.form.kind == "decoder" and width > self.batch.prompt_length:
            row = replace(self, batch=replace(self.batch, items=self.batch.items[:1] * 2))
            self.form.require_causal(self._left_padded(width), row._seeing)

    def embedding(self) -> Float[Tensor, "item width"]:
        keep = self.form.taken(logits_to_keep=1)
        if self.form.kind == "decoder":
            inputs = self._seeing(self._left_padded(self.batch.prompt_length))
            states = _last_hidden_state(self._forward(inputs, {"output_hidden_states": True} | keep))
        elif self.form.kind == "encoder":
            inputs = self._encoded()
            states = _last_hidden_state(self._forward(inputs, {"output_hidden_states": True}))
        else:
            inputs = self._encoded()
            start, _ = self._right_padded([self.form.start()] * len(self.batch.items))
            output = self._forward(inputs, {"decoder_input_ids": start} | keep)
            states = getattr(output, "encoder_last_hidden_state", None)
        attended: Tensor = inputs["attention_mask"]
        if not isinstance(states, Tensor) or states.shape[:2] != attended.shape:
            raise Refusal(
                f"{self.form.attached.name} returns no hidden state for every token, so it has no embedding; "
                "use a metric of the logits"
            )
        # What stands on padding may be no number at all, and 0 times that is not 0.
        kept = _wide(states).masked_fill(~attended.bool()[:, :, None], 0.0)
        return kept.sum(dim=1) / attended.sum(dim=1, keepdim=True)

    def generate(self, new_tokens: int | None) -> Int[Tensor, "item token"]:
        limits = [new_tokens or len(each.answer) + MARGIN for each in self.batch.items]
        if self.form.kind == "decoder":
            room = self._room(self.batch.prompt_length)
            limits = [min(limit, max(room, 1)) for limit in limits]
        if self.form.kind == "decoder":
            inputs = self._seeing(self._left_padded(self.batch.prompt_length))
            inputs.pop("position_ids", None)  # generate counts them itself, from the mask
            start = self.batch.prompt_length
        else:
            ids, _ = self._right_padded([self.form.start()] * len(self.batch.items))
            inputs = self._encoded() | {"decoder_input_ids": ids}
            start = ids.shape[1]
        with torch.no_grad(), _greedy(self.form.network, max(limits)) as ends:
            rows = self.form.attached.generate(**inputs)[:, start:].tolist()
        # A row is cut at its own limit, not at that of the longest answer it shares a batch with.
        written = [_until(row[:limit], ends) for row, limit in zip(rows, limits, strict=True)]
        generated = torch.full((len(written), max(len(row) for row in written)), -1)
        for index, row in enumerate(written):
            generated[index, : len(row)] = torch.tensor(row)
        return generated

    def _forward(self, inputs: dict[str, Any], more: dict[str, Any], *, use_cache: bool = False) -> Any:
        return self.form.attached(**inputs, **more, **self.form.taken(use_cache=use_cache), return_dict=True)

    def _left_padded(self, width: int) -> dict[str, Tensor]:
        self._room(width)
        device = self.form.attached.device
        mask = self.batch.attention_mask[:, :width]
        # What pads in the tokenizer may lie outside the model's embedding.
        ids = self.batch.input_ids[:, :width].masked_fill(mask == 0, self.form.fill)
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        positions = self.batch.position_ids[:, :width].to(device)
        return self._maskable(inputs) | self.form.taken(position_ids=positions)

    def _seeing(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """With the pictures of all rows."""
        pixels, reader = self.batch.pixels, self.batch.reader
        if not pixels or reader is None:
            return inputs
        unknown = sorted(pixels.keys() - self.form.accepted)
        if unknown:
            raise Refusal(
                f"{self.form.attached.name} does not take {unknown[0]}, which its processor "
                f"{type(reader.processor).__name__} makes of pictures; load the processor that belongs to it"
            )
        device, dtype = self.form.attached.device, self.form.attached.dtype
        seen = {name: x.to(device, dtype if x.is_floating_point() else None) for name, x in pixels.items()}
        if reader.types in self.form.accepted:
            seen[reader.types] = (inputs["input_ids"] == reader.token).long()
        # Models that place pictures in two dimensions count all positions themselves.
        own = inputs if "image_grid_thw" not in pixels else _without(inputs, "position_ids")
        return own | seen

    def _encoded(self) -> dict[str, Tensor]:
        if self.batch.pixels:
            raise Refusal(
                f"{self.form.attached.name} does not continue its prompt, and pictures stand in prompts that are "
                "continued; use a decoder that sees"
            )
        ids, mask = self._right_padded([each.prompt + self.batch.suffix for each in self.batch.items])
        return self._maskable({"input_ids": ids, "attention_mask": mask})

    def _room(self, width: int) -> int:
        """Columns that the model has beyond `width`. Raises InputError if it has not as many as that."""
        config = self.form.network.config
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        most = getattr(config, "max_position_embeddings", None)
        if not isinstance(most, int) or most < 1:
            return 10**9  # no limit is known
        if width > most:
            raise InputError(
                f"rows of {width} tokens are longer than the {most} that {self.form.attached.name} takes; "
                f"encode with max_tokens={most}, or shorter settings of the probe"
            )
        return most - width

    def _maskable(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        if "attention_mask" not in self.form.accepted and not bool(inputs["attention_mask"].all()):
            raise Refusal(
                f"{self.form.attached.name} takes no attention_mask, so items of different length cannot share a "
                "batch; use batch_size=1 and answers of one token"
            )
        return inputs

    def _right_padded(self, rows: Sequence[Ids]) -> tuple[Int[Tensor, "item column"], Int[Tensor, "item column"]]:
        ids = torch.full((len(rows), max(len(row) for row in rows)), self.form.fill)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row)
            mask[index, : len(row)] = 1
        device = self.form.attached.device
        return ids.to(device), mask.to(device)


@contextmanager
def _greedy(network: Any, new_tokens: int) -> Iterator[frozenset[int]]:
    """Inside, the model generates greedily and with nothing else; gives the ids that end a text.

    What a checkpoint asks for besides (sampling, penalties, forbidden words) would come through any argument of
    `generate` that is left out, so its settings are put aside as a whole.
    """
    from transformers import GenerationConfig

    own = network.generation_config
    ends = [own.eos_token_id] if isinstance(own.eos_token_id, int) else list(own.eos_token_id or ())
    pad = own.pad_token_id if own.pad_token_id is not None else (ends or [0])[0]
    network.generation_config = GenerationConfig(
        max_new_tokens=new_tokens,
        eos_token_id=ends or None,
        pad_token_id=pad,
        bos_token_id=own.bos_token_id,
        decoder_start_token_id=own.decoder_start_token_id,
    )
    try:
        yield frozenset(ends)
    finally:
        network.generation_config = own


def _until(row: list[int], ends: frozenset[int]) -> list[int]:
    stop = next((index + 1 for index, id in enumerate(row) if id in ends), len(row))
    return row[:stop]


def _without(inputs: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in inputs.items() if key != name}


def _last_hidden_state(output: Any) -> Any:
    """What the last block gave, after the final norm; None if the model does not return it."""
    states = getattr(output, "last_hidden_state", None)
    if states is None:
        states = (getattr(output, "hidden_states", None) or (None,))[-1]
    return states


def _wide(x: Tensor) -> Tensor:
    """In fp32, or fp64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
