"""What the commands that train have in common: their options, base model, progress and plan.

The options are the parameters of :func:`_asked`; :func:`trains` adds them to a command.
"""

from __future__ import annotations

import importlib.util
import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorafind.cli.output import Sink
from lorafind.cli.watch import Watch, duration
from lorafind.train.settings import MODEL, SPELLINGS, Settings

if TYPE_CHECKING:
    from lorafind.train.captions import Gathered
    from lorafind.train.loop import Output
    from lorafind.train.model import Base
    from lorafind.train.plan import Plan

#: What the extra ``train`` installs.
NEEDED = ("diffusers", "peft", "accelerate", "transformers")
_DEFAULT = Settings()
#: How much of the loss that is shown comes from before.
_SMOOTH = 0.95


def _option(panel: str, *names: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False, **more)


@dataclass(frozen=True)
class Asked:
    """What the options ask for. seeded: the settings' seed is one of them."""

    settings: Settings
    seeded: bool
    spelling: str
    dtype: str
    caption: str
    blip: str
    min_size: int | None
    skip_unreadable: bool
    tokenizer: Path | None
    offline: bool
    device: str

    def output(self, force: bool) -> Output:
        """How files are written."""
        from lorafind.train.loop import Output
        from lorafind.train.model import DTYPES

        return Output(self.spelling, DTYPES[self.dtype], force)

    def base(self) -> Base:
        """The base model."""
        from lorafind.train.model import load_base

        chosen = self.settings
        return load_base(chosen.model, chosen.precision, self.device, self.offline, self.tokenizer)

    @cached_property
    def _captioner(self) -> Any:
        from lorafind.train.blip import Blip

        return Blip(self.blip, self.device, self.offline)

    def gather(self, sources: Sequence[Path], watch: Any = None) -> Gathered:
        """Pictures with captions."""
        from lorafind.train.captions import gather

        return gather(
            sources,
            self.caption,
            resolution=self.settings.resolution,
            min_size=self.min_size,
            skip_unreadable=self.skip_unreadable,
            captioner=self._captioner if self.caption == "blip" else None,
            watch=watch,
        )


_BASE, _LORA, _COURSE = "Base model", "LoRA", "Training"
_PICTURES, _CLASS = "Pictures and captions", "Class images (prior preservation)"


def _asked(
    model: Annotated[
        str,
        _option(
            _BASE,
            help="A diffusers folder, a .safetensors checkpoint, or owner/name@revision on the "
            f"Hub. Default: {MODEL}.",
        ),
    ] = MODEL,
    tokenizer: Annotated[
        Path | None,
        _option(_BASE, help="A folder with the tokenizer, for checkpoints that bring none."),
    ] = None,
    offline: Annotated[
        bool, _option(_BASE, "--offline", help="Take from the Hub's cache only.")
    ] = False,
    device: Annotated[str, _option(_BASE, help="auto, cpu, cuda or mps.")] = "auto",
    precision: Annotated[
        str, _option(_BASE, help="Of the frozen model: fp32 (default), bf16 or fp16.")
    ] = _DEFAULT.precision,
    groups: Annotated[
        str, _option(_LORA, help="Layers, with commas: self, cross, ff. Default: all three.")
    ] = "",
    rank: Annotated[int, _option(_LORA, help="Default: 16.")] = _DEFAULT.rank,
    alpha: Annotated[float, _option(_LORA, help="ΔW = alpha/rank · B·A. Default: 8.")] = 8.0,
    spelling: Annotated[
        str, _option(_LORA, "--format", help="Names in the file: kohya (default), diffusers, peft.")
    ] = SPELLINGS[0],
    dtype: Annotated[
        str, _option(_LORA, "--save-precision", help="Of the file: fp16 (default), bf16 or fp32.")
    ] = "fp16",
    steps: Annotated[int, _option(_COURSE, help="Default: 1760.")] = _DEFAULT.steps,
    learning_rate: Annotated[
        float, _option(_COURSE, "--learning-rate", "--lr", help="Default: 5e-4.")
    ] = _DEFAULT.learning_rate,
    optimizer: Annotated[
        str, _option(_COURSE, help="adam (default), or adam8bit (needs bitsandbytes).")
    ] = _DEFAULT.optimizer,
    weight_decay: Annotated[float, _option(_COURSE, help="Default: 0.")] = 0.0,
    schedule: Annotated[
        str, _option(_COURSE, help="Of the learning rate: constant (default) or cosine.")
    ] = _DEFAULT.schedule,
    warmup: Annotated[
        int, _option(_COURSE, help="Steps in which the learning rate rises. Default: 0.")
    ] = 0,
    resolution: Annotated[
        int, _option(_COURSE, help="Side of the square, pixels. Default: 512.")
    ] = _DEFAULT.resolution,
    batch_size: Annotated[int, _option(_COURSE, help="Pictures in a pass. Default: 1.")] = 1,
    accumulate: Annotated[int, _option(_COURSE, help="Passes per step. Default: 1.")] = 1,
    seed: Annotated[
        int | None,
        _option(
            _COURSE,
            help="Of everything random. Default: one that follows from the pictures (train-many: "
            "0, and for each LoRA one that follows from it).",
        ),
    ] = None,
    min_snr: Annotated[
        float | None, _option(_COURSE, help="γ of min-SNR weighting. Default: none.")
    ] = None,
    offset_noise: Annotated[float, _option(_COURSE, help="Strength. Default: 0.")] = 0.0,
    gradient_checkpointing: Annotated[
        bool,
        _option(_COURSE, "--gradient-checkpointing", help="Less memory, more time; same result."),
    ] = False,
    compiled: Annotated[bool, _option(_COURSE, "--compile", help="Through torch.compile.")] = False,
    ema: Annotated[
        float | None,
        _option(
            _COURSE, help="Save a moving average of the weights with this decay, such as 0.99."
        ),
    ] = None,
    caption: Annotated[
        str,
        _option(
            _PICTURES,
            help="files (.txt, .caption or metadata.jsonl beside the pictures; the default), blip "
            "(describe those without), or none.",
        ),
    ] = "files",
    blip: Annotated[
        str, _option(_PICTURES, help="The model for --caption blip: a folder or a Hub id.")
    ] = "Salesforce/blip-image-captioning-base",
    token: Annotated[
        str | None,
        _option(
            _PICTURES,
            help="The word [V] before every caption; '' for none. Default: a rare one.",
        ),
    ] = None,
    min_size: Annotated[
        int | None,
        _option(
            _PICTURES,
            help="Leave out pictures whose shorter side has fewer pixels. Default: enlarge those "
            "below the resolution.",
        ),
    ] = None,
    skip_unreadable: Annotated[
        bool, _option(_PICTURES, "--skip-unreadable", help="Go on without broken pictures.")
    ] = False,
    prior_weight: Annotated[
        float, _option(_CLASS, help="Of their loss; 0 trains without them. Default: 1.")
    ] = _DEFAULT.prior_weight,
    prior_prompt: Annotated[
        str, _option(_CLASS, help=f"What they show. Default: {_DEFAULT.prior_prompt}.")
    ] = _DEFAULT.prior_prompt,
    class_images: Annotated[
        Path | None,
        _option(_CLASS, help="A folder of them. Default: made once with the base model and kept."),
    ] = None,
    class_count: Annotated[
        int, _option(_CLASS, help="How many are made. Default: 100.")
    ] = _DEFAULT.class_count,
) -> Asked:
    from lorafind.features.opening import parse_groups
    from lorafind.signatures.device import choose
    from lorafind.train.captions import HOW
    from lorafind.train.problem import TrainProblem

    for option, value, known in (
        ("--format", spelling, SPELLINGS),
        ("--save-precision", dtype, ("fp16", "bf16", "fp32")),
        ("--caption", caption, HOW),
    ):
        if value not in known:
            raise typer.BadParameter(f"{option} is one of {', '.join(known)}")
    try:
        place = str(choose(device))
        words = [word for word in groups.split(",") if word]
        settings = Settings(
            model=model,
            groups=parse_groups(words) if words else _DEFAULT.groups,
            rank=rank,
            alpha=alpha,
            steps=steps,
            learning_rate=learning_rate,
            optimizer=optimizer,
            weight_decay=weight_decay,
            schedule=schedule,
            warmup=warmup,
            resolution=resolution,
            batch_size=batch_size,
            accumulate=accumulate,
            precision=precision,
            seed=seed or 0,
            token=token,
            prior_weight=prior_weight,
            prior_prompt=prior_prompt,
            class_images=class_images,
            class_count=class_count,
            min_snr=min_snr,
            offset_noise=offset_noise,
            gradient_checkpointing=gradient_checkpointing,
            compile=compiled,
            ema=ema,
        )
    except (TrainProblem, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    return Asked(
        settings,
        seed is not None,
        spelling,
        dtype,
        caption,
        blip,
        min_size,
        skip_unreadable,
        tokenizer,
        offline,
        place,
    )


def trains(function: Callable[..., int | None]) -> Callable[..., int | None]:
    """Add the options to a function of a session, of an :class:`Asked`, and of its own options."""
    own = [
        p
        for p in inspect.signature(function, eval_str=True).parameters.values()
        if p.name != "asked"
    ]
    shared = list(inspect.signature(_asked, eval_str=True).parameters.values())

    @wraps(function)
    def run(session: Any, **values: Any) -> int | None:
        needed()
        chosen = {p.name: values.pop(p.name) for p in shared}
        return function(session, asked=_asked(**chosen), **values)

    keyword = inspect.Parameter.KEYWORD_ONLY
    first, *rest = own
    # ``command`` reads the parameters off the signature.
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [first, *(p.replace(kind=keyword) for p in (*rest, *shared))]
    )
    return run


def needed() -> None:
    """Raises ModuleNotFoundError where the extra ``train`` is not installed."""
    for name in NEEDED:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(name=name)


class TrainWatch(Watch):
    """Progress that shows the loss, and how fast the steps are."""

    def __init__(self, sink: Sink) -> None:
        super().__init__(sink)
        self._loss: float | None = None

    def stage(self, title: str, files: int, size: int) -> None:
        """See :class:`lorafind.index.progress.Progress`."""
        self._loss = None
        super().stage(title, files, size)

    def loss(self, value: float) -> None:
        """The mean loss of the last steps; what is shown is smoothed."""
        self._loss = value if self._loss is None else _SMOOTH * self._loss + (1 - _SMOOTH) * value

    def warn(self, sentence: str) -> None:
        """Said at once, also with ``--quiet``."""
        self._sink.warn(sentence)

    def _rate(self) -> str:
        if self._loss is None:
            return super()._rate()
        seconds = (time.monotonic() - self._began) / max(self._done, 1)
        rate = f"{1 / max(seconds, 1e-6):.2f} it/s" if seconds < 1 else f"{seconds:.2f} s/it"
        left = duration((self._files - self._done) * seconds)
        return f"loss {self._loss:.4f}, {rate}, {left} left"


def tell(sink: Sink, plan: Plan) -> None:
    """What is going to happen, on stderr."""
    what = {"file": "from files", "blip": "by BLIP", "none": "none"}
    captions = ", ".join(f"{count:,} {what[origin]}" for origin, count in plan.captions.items())
    sink.note(f"Pictures: {plan.pictures:,}; captions: {captions}.")
    found = plan.estimate
    what_of = "LoRA" if plan.loras == 1 else f"{plan.loras:,} LoRAs, {plan.parallel:,} at once"
    sink.note(
        f"Training: {what_of}; {found.layers} layers, {found.parameters:,} parameters, "
        f"{plan.steps:,} steps{' each' if plan.loras > 1 else ''}."
    )
    there = f" of {_size(plan.available)}" if plan.available else ""
    sink.note(f"Memory: about {_size(plan.memory)}{there}.")
    if plan.available and plan.memory > plan.available:
        sink.warn(
            "that is more memory than there is: --gradient-checkpointing, --precision bf16 and a "
            "lower --resolution need less."
        )
    sink.note(f"Time: about {duration(plan.seconds)} ({plan.step:.2f} s a step, measured).")
    if plan.class_images:
        sink.note(
            f"Before, unless they are in the cache, {plan.class_images:,} class images are made: "
            f"up to {duration(plan.class_seconds)}."
        )


def planned(plan: Plan) -> dict[str, Any]:
    """The fields of a plan for ``--dry-run``."""
    return {
        "pictures": plan.pictures,
        "captions": sum(count for origin, count in plan.captions.items() if origin != "none"),
        "loras": plan.loras,
        "parallel": plan.parallel,
        "steps": plan.steps,
        "layers": plan.estimate.layers,
        "parameters": plan.estimate.parameters,
        "memory": plan.memory,
        "seconds": round(plan.seconds, 1),
        "class_images": plan.class_images,
        "class_seconds": round(plan.class_seconds, 1),
    }


def _size(number: int) -> str:
    return f"{number / 1e9:.1f} GB"
