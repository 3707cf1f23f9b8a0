"""How is an instruction worded? Templates in YAML files, checked when they are read, and filled in.

A template has a `prompt`, a `response` and optionally `fields`: lines "key: value" that may come in
any order and may be missing. It refuses to know tasks: which placeholders there are is told to it,
and so is what they stand for.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from genrec.config import StrictConfig, load_yaml, parse
from genrec.errors import ConfigError, nearest

SHIPPED = Path(__file__).parent / "templates"
FIELDS = "fields"

Piece = str | int
"""Text, or the row of an item that is written as its semantic ID."""


@dataclass(frozen=True)
class Record:
    """Lines "key: value" about one thing; their order means nothing."""

    pairs: tuple[tuple[str, str], ...]
    between: str = "\n"


@dataclass(frozen=True)
class Several:
    """Things side by side, such as the items of a history.

    Args:
        parts: what each is written as.
        between: text between two of them.
        ordered: whether their order means something; if not, they may be shuffled.
    """

    parts: tuple[Piece | Record | Several, ...]
    between: str = ""
    ordered: bool = True


Value = Piece | Record | Several


class Augmentation(StrictConfig):
    """What may differ between two readings of one example (Wang et al. 2023)."""

    shuffle: Literal["none", "prompt", "response", "both"] = "both"
    """Where the order of fields, of attributes and of candidates is drawn anew: in prompts, in
    responses, in both or nowhere."""
    mask: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Probability that an attribute, or a field that is not in `keep`, is left out of a prompt; one
    attribute always stays. Responses are never cut."""

    def shuffles(self, side: str) -> bool:
        """Return whether the order is drawn anew in "prompt" or "response"."""
        return self.shuffle in (side, "both")


class TemplateConfig(StrictConfig):
    """One wording; {name} stands for what a task puts there, {{ and }} for braces."""

    prompt: str = Field(min_length=1)
    """Text of the prompt; {fields} stands for the lines of `fields`."""
    response: str = Field(min_length=1)
    """Text of the response; only this carries loss."""
    fields: dict[str, str] = Field(default={})
    """Lines "key: text" that may be shuffled and masked."""
    keep: tuple[str, ...] = ()
    """Keys of `fields` that are never masked."""


class TemplateFile(StrictConfig):
    """A file of templates."""

    task: str
    """Task that they are for."""
    templates: tuple[TemplateConfig, ...] = Field(min_length=1)
    """Wordings, of which one is drawn for each example."""


@dataclass(frozen=True)
class Slots:
    """Which placeholders the templates of a task may and must have.

    Args:
        prompt: may stand in a prompt or its fields.
        response: may stand in a response.
        any_of: of these, at least one must stand in the prompt.
        answer: must stand in the response.
    """

    prompt: frozenset[str]
    response: frozenset[str]
    any_of: frozenset[str]
    answer: str


@dataclass(frozen=True)
class Rendered:
    """A filled template.

    Args:
        prompt: pieces before the response.
        response: pieces to answer with.
    """

    prompt: tuple[Piece, ...]
    response: tuple[Piece, ...]


class Template:
    """A wording whose placeholders are known to be right.

    Args:
        config: the wording.
        slots: what may stand in it.
        path: where it is from, for messages.

    Raises:
        ConfigError: a placeholder that is unknown, missing or not well written.
    """

    def __init__(self, config: TemplateConfig, slots: Slots, *, path: str) -> None:
        self.config = config
        self._prompt = _split(config.prompt, f"{path}.prompt")
        self._response = _split(config.response, f"{path}.response")
        self._fields = {
            key: _split(text, f"{path}.fields.{key}") for key, text in config.fields.items()
        }
        self._check(slots, path)

    @property
    def placeholders(self) -> frozenset[str]:
        """All names that the template asks for, `fields` left out."""
        parts = [self._prompt, self._response, *self._fields.values()]
        return frozenset(name for part in parts for _, name in part if name) - {FIELDS}

    @property
    def asks(self) -> frozenset[str]:
        """The names that its prompt asks for."""
        parts = [self._prompt, *self._fields.values()]
        return frozenset(name for part in parts for _, name in part if name) - {FIELDS}

    def render(
        self, values: Mapping[str, Value], augmentation: Augmentation, rng: np.random.Generator
    ) -> Rendered:
        """Fill the template.

        Args:
            values: what each of `placeholders` stands for.
            augmentation: what may be shuffled and masked.
            rng: draws it.
        """
        shuffled = augmentation.shuffles("prompt")
        keys = self._draw_fields(augmentation.mask, shuffled, rng)
        prompt: list[Piece] = []
        for text, name in self._prompt:
            prompt.append(text)
            if name == FIELDS:
                for number, key in enumerate(keys):
                    prompt.append(f"{chr(10) if number else ''}{key}: ")
                    for inner, placeholder in self._fields[key]:
                        prompt.append(inner)
                        if placeholder:
                            prompt += write(values[placeholder], augmentation.mask, shuffled, rng)
            elif name:
                prompt += write(values[name], augmentation.mask, shuffled, rng)
        response: list[Piece] = []
        for text, name in self._response:
            response.append(text)
            if name:
                response += write(values[name], 0.0, augmentation.shuffles("response"), rng)
        return Rendered(joined(prompt), joined(response))

    def _draw_fields(self, mask: float, shuffled: bool, rng: np.random.Generator) -> list[str]:
        keys = [k for k in self._fields if k in self.config.keep or rng.random() >= mask]
        return [keys[i] for i in rng.permutation(len(keys))] if shuffled else keys

    def _check(self, slots: Slots, path: str) -> None:
        fields = {FIELDS} if self._fields else set()
        asked = [("prompt", self._prompt, slots.prompt | fields)]
        asked += [(f"fields.{key}", part, slots.prompt) for key, part in self._fields.items()]
        asked.append(("response", self._response, slots.response))
        for where, part, allowed in asked:
            for _, name in part:
                if name and name not in allowed:
                    raise ConfigError(
                        f"{path}.{where}: got the placeholder {{{name}}}, expected one of "
                        f"{_listed(allowed)}.{nearest(name, allowed)}"
                    )
        for key in self.config.keep:
            if key not in self._fields:
                raise ConfigError(
                    f"{path}.keep: got {key!r}, expected keys of `fields` "
                    f"({', '.join(self._fields) or 'there are none'})."
                )
        if self._fields and FIELDS not in {name for _, name in self._prompt}:
            raise ConfigError(
                f"{path}.prompt: got `fields` but no {{fields}} to put them at. Write it there."
            )
        certain = [self._prompt, *(self._fields[key] for key in self.config.keep)]
        if not slots.any_of & {name for part in certain for _, name in part}:
            raise ConfigError(
                f"{path}.prompt: got no placeholder that is always there of "
                f"{_listed(slots.any_of)}; without one nothing can be told from the prompt. Add "
                "one, or name its field in `keep`."
            )
        if slots.answer not in {name for _, name in self._response}:
            raise ConfigError(
                f"{path}.response: got {self.config.response!r}, expected {{{slots.answer}}} in it."
            )


def load_templates(path: Path, slots: Mapping[str, Slots]) -> tuple[str, tuple[Template, ...]]:
    """Read a file of templates.

    Args:
        path: a YAML file (see `TemplateFile`).
        slots: by task.

    Returns:
        the task, and its templates.

    Raises:
        ConfigError: no such file, an unknown key or task, a template that cannot be filled.
    """
    try:
        file = parse(TemplateFile, load_yaml(path))
    except ConfigError as error:
        raise ConfigError(f"templates {path.name}: {error}") from None
    if file.task not in slots:
        raise ConfigError(
            f"templates {path.name}: task: got {file.task!r}, expected one of "
            f"{', '.join(slots)}.{nearest(file.task, slots)}"
        )
    made = (
        Template(config, slots[file.task], path=f"templates {path.name}: templates.{number}")
        for number, config in enumerate(file.templates)
    )
    return file.task, tuple(made)


def write(value: Value, mask: float, shuffled: bool, rng: np.random.Generator) -> list[Piece]:
    """Return what a value is written as, with its keys drawn."""
    if isinstance(value, Record):
        pairs = [pair for pair in value.pairs if rng.random() >= mask]
        if value.pairs and not pairs:
            pairs = [value.pairs[int(rng.integers(len(value.pairs)))]]
        if shuffled:
            pairs = [pairs[i] for i in rng.permutation(len(pairs))]
        return [value.between.join(f"{key}: {text}" for key, text in pairs)]
    if isinstance(value, Several):
        order: Sequence[int] = range(len(value.parts))
        if shuffled and not value.ordered:
            order = rng.permutation(len(value.parts)).tolist()
        pieces: list[Piece] = []
        for number, place in enumerate(order):
            pieces += [value.between] if number else []
            pieces += write(value.parts[place], mask, shuffled, rng)
        return pieces
    return [value]


def joined(pieces: Iterable[Piece]) -> tuple[Piece, ...]:
    """Return the pieces with neighbouring texts in one, and no empty ones."""
    whole: list[Piece] = []
    for piece in pieces:
        if isinstance(piece, str) and whole and isinstance(whole[-1], str):
            whole[-1] += piece
        elif piece != "":
            whole.append(piece)
    return tuple(whole)


def _split(text: str, path: str) -> list[tuple[str, str | None]]:
    """Return texts and the placeholder behind each (None: none)."""
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ConfigError(
            f"{path}: got {text!r}, which is no template ({error}). Write {{{{ and }}}} for braces."
        ) from None
    for _, name, spec, conversion in parts:
        if name is not None and (not name.isidentifier() or spec or conversion):
            raise ConfigError(
                f"{path}: got {{{name}{'!' + conversion if conversion else ''}"
                f"{':' + spec if spec else ''}}}, expected a bare name in braces, such as "
                "{history}."
            )
    return [(literal, name) for literal, name, _, _ in parts]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"{{{name}}}" for name in sorted(names))
