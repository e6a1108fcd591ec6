"""The runner: holds the open layers of one model, follows its forwards, and starts and ends runs."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from headwise.errors import InputError, NotFired, PlanConflict, Refusal
from headwise.model.attention import seam
from headwise.model.capture import Opened
from headwise.model.finding.denoiser_example import is_denoiser
from headwise.model.running.compiled import hint, leave_graph
from headwise.model.running.decided import run_lacking
from headwise.model.running.engine import Engine, in_backward
from headwise.model.running.plan import Layer, Plan
from headwise.model.running.run import Opening, Run, named_arguments
from headwise.model.running.searches import refuse_search
from headwise.model.site import Site
from headwise.model.table import SiteTable

_INPUTS = ("inputs", "input_ids", "inputs_embeds", "input_features", "pixel_values")


class Runner:
    """What stands between an attached model and its plans.

    A plan belongs to the model, not to a thread: it is set under a lock and seen by every thread that runs the model.
    Hooks are on the model's towers only while a plan is open; the seam itself from construction until `close`.

    Attributes:
        switch: what the seam finds for the model's modules.
        prompts: prompt lengths of caches that plain forwards filled.
    """

    def __init__(self, model: nn.Module, table: SiteTable) -> None:
        self.model = model
        self.table = table
        self.switch = seam.Switch()
        self.prompts: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._sites_by_module: dict[int, tuple[Site, ...]] = {}
        for site in table.sites:
            key = id(model.get_submodule(site.module))
            self._sites_by_module[key] = (*self._sites_by_module.get(key, ()), site)
        self._processors = {site.module: _processor_of(model.get_submodule(site.module)) for site in table.sites}
        self._lock = threading.RLock()
        self._rest()
        self._undo: list[Callable[[], None]] = []
        self._connect()

    def _rest(self) -> None:
        """No plan is open and nothing runs."""
        self._layers: list[Layer] = []
        self._owner: int | None = None
        self._engine: Engine | None = None
        self._run: Run | None = None
        self._replayable: Run | None = None
        self._unanswered = 0
        self._runs = 0
        self.prompt_length: int | None = None
        """Where the prompt of a forward ends, if neither its plan nor `generate` says so."""
        self._dual: Any = None
        self._rescoring: Any = None

    def _connect(self) -> None:
        keys = seam.connect(self.model.modules(), self.switch)
        self._disconnect = weakref.finalize(self, seam.disconnect, keys)

    @contextmanager
    def open(self, layer: Layer) -> Iterator[Opened]:
        """Put what a layer asks for in force inside the block.

        Raises:
            InputError, Refusal: what it asks for does not exist or cannot be served; nothing is put on.
            NotFired: nothing ran inside, or a site that was asked for never did.
            PlanConflict: the model is running, or another thread has a plan open.
        """
        self._push(layer)
        try:
            yield layer.opened
        except BaseException:
            self._pop(layer)
            raise
        self._pop(layer, check=True)

    def _push(self, layer: Layer) -> None:
        with self._lock:
            self._refuse_conflicts()
            if layer.dual is not None and self._dual is not None:
                raise PlanConflict("a dual run is open already; two streams are all there are")
            if layer.dual is not None or layer.rescoring is not None:
                self._refuse_second_contrast(layer)
            if layer.denoising is not None and self._layers and self._engine is not None:
                self._refuse_second_loop()
            if layer.dual is not None and any(open.denoising is not None for open in self._layers):
                raise Refusal(
                    "a dual run doubles the batch, whose rows are branches in a denoising loop; open one of both"
                )
            if not self._disconnect.alive:
                raise PlanConflict("this model was detached; attach it again")
            if layer.edits or layer.reads:
                refuse_dropout(self.model)
            self._put([*self._layers, layer])
            self._owner = threading.get_ident()
            layer.opened_at = self._runs

    def _pop(self, layer: Layer, check: bool = False) -> None:
        with self._lock:
            run, engine = self._run, self._engine
            self._put([other for other in self._layers if other is not layer])
            if not self._layers:
                self._owner = None
            if run is not None and run.outermost is not None:
                self._run = None  # the hook that would have seen this forward end is gone, and Ctrl-C passes it by
            if not check or engine is None:
                return
            if run is not None:
                raise PlanConflict("a run that began inside this block has not ended; join its thread before leaving")
            if self._runs == layer.opened_at:
                raise NotFired(f"nothing ran inside this block, so what it asked for did not happen{hint()}")
            engine.plan.finish_layer(layer)

    def _refuse_second_contrast(self, layer: Layer) -> None:
        if self._rescoring is not None or (layer.rescoring is not None and self._dual is not None):
            raise PlanConflict("logits are contrasted already, with layers or a second stream; leave that block first")

    def _refuse_second_loop(self) -> None:
        if self._plan.denoising is not None:
            raise PlanConflict("a denoising loop is open already; leave its block first")
        if self._dual is not None:
            raise Refusal("a dual run doubles the batch, whose rows are branches in a denoising loop; open one of both")

    def _refuse_conflicts(self) -> None:
        if self._run is not None:
            raise PlanConflict("the model is running; a plan is opened before the run it is for, not during it")
        if self._layers and self._owner != threading.get_ident():
            raise PlanConflict(
                "another thread has a plan open on this model; a plan belongs to the model, not the thread"
            )

    def _put(self, layers: list[Layer]) -> None:
        """Make `layers` the open ones; a refusal leaves everything as it was.

        The hooks are off while the plan is made: looking for blocks runs the model, and that is no run of the user's.
        """
        self._take_off()
        try:
            engine = None
            if layers:
                plan = Plan(self.table, layers)
                engine = Engine(self.model, self.table, self._sites_by_module, plan, self._current)
        except BaseException:
            self._put_on(self._engine)
            raise
        self._layers = layers
        self._dual = next((layer.dual for layer in layers if layer.dual is not None), None)
        self._rescoring = next((layer.rescoring for layer in layers if layer.rescoring is not None), None)
        self._put_on(engine)

    def _take_off(self) -> None:
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        self.switch.handler = None

    def _put_on(self, engine: Engine | None) -> None:
        self._engine = engine
        if engine is not None:
            engine.hook()
            self._undo.append(engine.unhook)
            self._watch_towers()
            self.switch.handler = engine.attend
        elif self._replayable is not None:
            self.switch.handler = self._refuse_replay

    # -- runs -------------------------------------------------------------------------------------------------------

    def _current(self) -> Run:
        """The run that is going on; in backward, the one whose layers are being recomputed."""
        if self._run is not None:
            return self._run
        if in_backward() and self._replayable is not None:
            if self._unanswered > 1:
                raise PlanConflict(
                    "several forwards were made before this backward: with gradient checkpointing call backward after "
                    "each forward (and make forwards without one under torch.no_grad())"
                )
            if self._replayable.plan.layers != self._plan.layers:
                raise PlanConflict(
                    "backward came under another plan than its forward, and gradient checkpointing recomputes the "
                    "layers there: call backward inside the block of the forward"
                )
            return self._replayable
        raise PlanConflict("an attention module was called on its own, outside a forward of the model it belongs to")

    def _refuse_replay(self, base: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        answered = self._replayable is not None and bool(self._replayable.replays)
        if in_backward() and self._unanswered > answered:
            raise PlanConflict(
                "backward came after the plan was closed, and gradient checkpointing recomputes the layers there: "
                "call backward inside the block (and make forwards without one under torch.no_grad())"
            )
        return base(module, *args, **kwargs)

    def _watch_towers(self) -> None:
        """Follow the forwards of every tower, and `generate`, while a plan is open."""
        from transformers import PreTrainedModel

        watched = {site.tower for site in self.table.sites} | {""}
        watched |= {path for path, module in self.model.named_modules() if isinstance(module, PreTrainedModel)}
        for path in sorted(watched):
            module = self.model.get_submodule(path)
            before = module.register_forward_pre_hook(self._entering(path), prepend=True, with_kwargs=True)
            after = module.register_forward_hook(self._leaving, always_call=True, with_kwargs=True)
            self._undo += [before.remove, after.remove]
        generate: Callable[..., Any] | None = getattr(self.model, "generate", None)
        if callable(generate):
            mine = self.model.__dict__.get("generate")
            self.model.__dict__["generate"] = self._generating(generate)
            self._undo.append(lambda: _restore(self.model, "generate", mine))

    def _entering(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            leave_graph()
            if in_backward():
                return None
            run = self._run
            if run is not None and run.thread == threading.get_ident() and any(o.module is module for o in run.open):
                self._end(run, failed=True)  # entered again: the first time was cut short by Ctrl-C, which no hook sees
            if self._run is None:
                self._start_forward(path, module, args, kwargs)
            run = self._run
            assert run is not None
            if run.thread != threading.get_ident():
                raise PlanConflict("this model is running in another thread; a model under a plan runs once at a time")

            if path == "" and run.plan.decided:
                run_lacking(self, run, named_arguments(module, args, kwargs))

            def enter(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                run.enter(path, module, args, kwargs, self.known_prompt)

            if self._dual is not None and path == "":
                return self._dual.enter(run, args, kwargs, enter)
            enter(args, kwargs)
            if self._rescoring is not None and path == "":
                self._rescoring.enter(run.open[-1].arguments)
            return None

        return hook

    def _leaving(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        run = self._run
        if run is None or run.thread != threading.get_ident():
            return None
        opening = run.leave(module)
        failed = output is None  # torch calls this hook on the way of an exception, too
        if opening is None:
            if failed and run.outermost is module:  # refused on its way in
                self._end(run, failed=True)
            return None
        self._remember_prompt(opening, output)
        if (self._dual or self._rescoring) is not None and module is self.model and not failed:
            try:
                if self._dual is not None:
                    output = self._dual.leave(run, output)
                else:
                    output = self._rescoring.leave(opening.arguments, output)
            except BaseException:
                if run.outermost is module:
                    self._end(run, failed=True)
                raise
        if not run.open and run.outermost is module:
            self._end(run, failed=failed)
        return None if failed else output

    def _generating(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        """`generate` as one run: its prompt's length and mask are known from its arguments."""

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            run = self._run
            if run is not None and run.outermost is not None and run.thread == threading.get_ident():
                self._end(run, failed=True)  # no forward generates: this one was cut short by Ctrl-C
            if self._run is not None:
                return generate(*args, **kwargs)
            if self._rescoring is not None or (self._dual is not None and self._dual.combines):
                refuse_search(self.model, args, kwargs)
            inputs = next((v for v in (*args[:1], *map(kwargs.get, _INPUTS)) if isinstance(v, Tensor)), None)
            config = getattr(self.model, "config", None)
            decoder_only = not getattr(config, "is_encoder_decoder", False)
            run = Run(self._plan, generating=True)
            if inputs is not None and inputs.dim() > 1:
                run.rows = len(inputs)
                run.prompt = int(inputs.shape[1]) if decoder_only else None
            mask = kwargs.get("attention_mask")
            run.attended = mask if decoder_only and isinstance(mask, Tensor) and mask.dim() == 2 else None
            self._start(run, None)
            try:
                output = generate(*args, **kwargs)
            except BaseException:
                self._end(run, failed=True)
                raise
            self._end(run, failed=False)
            return output

        return wrapper

    @property
    def _plan(self) -> Plan:
        assert self._engine is not None
        return self._engine.plan

    def _start_forward(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A run that is one forward; in a denoising loop, one call of the loop."""
        run, denoising = Run(self._plan), self._plan.denoising
        if denoising is None:
            self._start(run, module)
            return
        begins = path == "" and denoising.enter(named_arguments(module, args, kwargs))
        run.step = denoising.calls - 1  # its place among the calls, once it is entered
        self._start(run, module, goes_on=not begins)

    def _start(self, run: Run, outermost: nn.Module | None, *, goes_on: bool = False) -> None:
        with self._lock:
            if self._run is not None:
                raise PlanConflict("this model is running in another thread; a model under a plan runs once at a time")
            if self._engine is not None:
                self._engine.require_in_place()
            run.outermost = outermost
            lengths = (run.plan.prompt_length, run.prompt, self.prompt_length)
            run.prompt = next((length for length in lengths if length is not None), None)
            run.checkpointing = (self.model.training or is_denoiser(self.model)) and any(
                getattr(module, "gradient_checkpointing", False) for module in self.model.modules()
            )
            if self._dual is not None:
                run.stream = "unparted"
            refuse_dropout(self.model)
            if goes_on:
                run.plan.go_on()
            else:
                run.plan.start_run()
            self._run = run

    def _end(self, run: Run, *, failed: bool) -> None:
        with self._lock:
            if self._run is run:
                self._run = None
            self._runs += 1
            if run.checkpointing and torch.is_grad_enabled():
                answered = self._replayable is not None and bool(self._replayable.replays)
                self._unanswered = 1 if answered or self._replayable is None else self._unanswered + 1
                self._replayable = run
        if failed:
            run.plan.excuse()
        else:
            below = None if run.outermost is None else {id(module) for module in run.outermost.modules()}
            try:
                run.plan.finish_run(lambda label: below is None or self._module_of(label) in below)
            except NotFired as error:
                if exchanged := self._exchanged_processor():
                    raise NotFired(f"{error}; {exchanged}") from None
                raise
            if run.plan.denoising is not None and run.outermost is self.model:
                run.plan.denoising.leave()

    def _exchanged_processor(self) -> str | None:
        """What was put in the place of an attention processor since attach, which diffusers does for slices, say."""
        for path, before in self._processors.items():
            if (now := _processor_of(self.model.get_submodule(path))) != before:
                return f"the processor of {path} was {before} at attach and is {now}: set it back, or attach again"
        return None

    def _module_of(self, label: Any) -> int:
        for site in self.table.sites:
            if site.id == label:
                return id(self.model.get_submodule(site.module))
        return id(self.model.get_submodule(self.table.block(label.label).module))

    def answering(self, site: Site, entering: Tensor) -> Tensor:
        """See `AttachedModel.answering`."""
        return entering if self._run is None or self._engine is None else self._engine.answering(site, entering)

    def known_prompt(self, cache: Any) -> int | None:
        """Prompt length recorded for a cache, or None."""
        return None if cache is None else self.prompts.get(cache)

    def _remember_prompt(self, opening: Opening, output: Any) -> None:
        """A cache filled by a plain forward: what follows with it is decoding."""
        cache = getattr(output, "past_key_values", None)
        if cache is not None and opening.frame is not None and cache not in self.prompts:
            self.prompts[cache] = opening.frame.prompt

    def named_spans(self, given: Mapping[str, Any]) -> set[str]:
        """The spans that a block may name: those given with it, and those of open plans."""
        return {*given, *self.table.met_spans, *(() if self._engine is None else self._engine.plan.spans)}

    # -- taking off ---

    @property
    def planned(self) -> bool:
        return bool(self._layers)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Inside the block the model runs as if it had never been attached.

        Raises:
            PlanConflict: a plan is open, the model is running, or it was detached.
            InputError: the model is in training mode with dropout.
        """
        with self._lock:
            self._refuse_conflicts()
            if self._layers:
                raise PlanConflict("a plan is open on this model; leave its reading, editing or dual block first")
            if not self._disconnect.alive:
                raise PlanConflict("this model was detached; attach it again")
            refuse_dropout(self.model)
            self._disconnect()
        try:
            yield
        finally:
            self._connect()

    @contextmanager
    def unplanned(self) -> Iterator[None]:
        """Inside the block no plan is open: what runs there is none of the user's runs. Raises PlanConflict mid-run."""
        with self._lock:
            self._refuse_conflicts()
            layers, owner, runs = self._layers, self._owner, self._runs
            self._put([])
            self._layers = []
        try:
            yield
        finally:
            with self._lock:
                self._put(layers)
                self._owner, self._runs = owner, runs

    @contextmanager
    def interrupted(self) -> Iterator[None]:
        """As `unplanned`, at the entry of a forward: inside no run goes on either; behind it this one does."""
        with self._lock:
            held = dict(self.__dict__)
            self._take_off()
            self._rest()
        try:
            yield
        finally:
            with self._lock:
                self._take_off()
                self.__dict__ |= held
                self._put_on(self._engine)

    def close(self) -> None:
        """Take everything off. Raises PlanConflict mid-run."""
        with self._lock:
            if self._run is not None:
                raise PlanConflict("the model is running; detach after the run")
            self._put([])
            self.switch.handler = None
            self._disconnect()


def refuse_dropout(model: nn.Module) -> None:
    """Raises InputError where two runs of one input would differ."""
    if not model.training:
        return
    for path, module in model.named_modules():
        if not module.training:
            continue
        rates = [module.p] if isinstance(module, _DropoutNd) else []
        rates += [value for key, value in vars(module).items() if "drop" in key and isinstance(value, float)]
        settings = vars(getattr(module, "config", None) or module)  # what skips whole layers is often read from there
        rates += [value for key, value in settings.items() if "layerdrop" in key and isinstance(value, float)]
        if any(rate > 0 for rate in rates):
            raise InputError(
                f"the model is in training mode and {path or type(model).__name__} applies dropout, so no two runs "
                "agree; call model.eval(), or set its dropout to 0"
            )


def _processor_of(module: nn.Module) -> str:
    return type(getattr(module, "processor", None)).__name__


def _restore(module: nn.Module, name: str, value: Any) -> None:
    if value is None:
        module.__dict__.pop(name, None)
    else:
        module.__dict__[name] = value
