"""What a model file says of itself."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from rscli.api import DataSpec

FORMAT: Literal[2] = 2


def _named(section: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(section.get("name"), str) or len(section["name"]) > 500:
        raise ValueError("must have a name, a text of at most 500 characters")
    return section


def _maker(plugin: dict[str, str]) -> dict[str, str]:
    if missing := [key for key in ("kind", "name", "package", "version") if key not in plugin]:
        raise ValueError(f"must have {', '.join(missing)}")
    return plugin


NamedSection = Annotated[dict[str, Any], AfterValidator(_named)]
"""A plugin's name and its fields."""


class ModelCard(BaseModel):
    """What a model file says of itself. Sections hold a plugin's `name` and fields; `plugins` says where each came from.

    `preset` and `overrides` are what a run was started from, and what departs from it, by dotted key; `loss_state` has the
    digests of what the loss kept by itself, such as soft labels. Format 1, of versions before, has none of these.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1, 2] = FORMAT
    rscli: str
    arch: NamedSection
    noise: NamedSection
    data: NamedSection
    spec: DataSpec
    plugins: list[Annotated[dict[str, str], AfterValidator(_maker)]] = Field(max_length=1000)
    config: dict[str, Any] | None = None
    epochs: int | None = Field(None, ge=0, lt=2**63)
    origin: str | None = None
    preset: str | None = None
    overrides: dict[str, Any] | None = None
    loss_state: dict[str, str] = Field(default_factory=dict)
    sha256: str = ""
