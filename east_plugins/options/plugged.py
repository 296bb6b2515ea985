"""Options of the plugins that a run names: `growth_tau` is option `tau` of the growth rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError
from ..plugins import registry


@dataclass(frozen=True)
class Slot:
    """A setting that names a plugin of some kind; its options are settings too, `prefix` before their names."""

    setting: str
    kind: str

    @property
    def prefix(self) -> str:
        return self.setting.removesuffix("_type") + "_"

    def entry(self, name: str | None) -> registry.Entry | None:
        """The plugin, None for none; raises `UsageError` naming the setting where there is no such plugin."""
        if name is None or (self.setting in ("redistribution", "structure") and name == "none"):
            return None
        if self.kind == "activation":
            name = {kind: f"dyrelu-{kind}" for kind in "abc"}.get(name.lower(), name)
        try:
            return registry.BY_KIND[self.kind].entry(name)
        except UsageError as error:
            raise UsageError(f"`{self.setting}`: {error}") from error

    def values(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Those of `options` that are this plugin's, under the plugin's own names."""
        return {name.removeprefix(self.prefix): v for name, v in options.items() if slot_of(name) is self}


SLOTS = (
    Slot("growth", "growth"),
    Slot("death", "pruning"),
    Slot("redistribution", "redistribution"),
    Slot("structure", "structure"),
    Slot("sparse_init", "allocation"),
    Slot("density_schedule", "density"),
    Slot("decay_schedule", "rate"),
    Slot("transform", "transform"),
    Slot("companion", "companion"),
    Slot("east_dyrelu_type", "activation"),
)
BY_SETTING = {slot.setting: slot for slot in SLOTS}


def slot_of(option: str) -> Slot | None:
    """The slot that an option's name belongs to, by its prefix."""
    return next((slot for slot in SLOTS if option.startswith(slot.prefix)), None)


def fields(chosen: Mapping[str, str | None]) -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Names and fields of all options of the plugins that `chosen` (setting to plugin's name) names."""
    for slot in SLOTS:
        if entry := slot.entry(chosen.get(slot.setting)):
            for field in entry.options:
                yield slot.prefix + field.name, field


def resolved(options: Mapping[str, Any], chosen: Mapping[str, str | None]) -> dict[str, Any]:
    """All options of the chosen plugins, those not in `options` at their defaults; raises `UsageError` for one that no
    chosen plugin has, or a value that a plugin refuses."""
    known = dict(fields(chosen))
    for name in options:
        if name not in known:
            raise UsageError(_unknown(name, chosen))
    found = {name: options.get(name, field.default) for name, field in known.items()}
    for slot in SLOTS:
        entry = slot.entry(chosen.get(slot.setting))
        if entry is not None and (values := slot.values(found)):
            try:
                entry.bound(values)
            except UsageError as error:
                raise UsageError(rename(str(error), values, slot.prefix)) from error
    return found


def rename(message: str, names: Mapping[str, Any], prefix: str) -> str:
    """A message in which parameters carry the name that they have as settings."""
    for name in names:
        message = message.replace(f"`{name}`", f"`{prefix}{name}`")
    return message


def _unknown(name: str, chosen: Mapping[str, str | None]) -> str:
    slot = slot_of(name)
    assert slot is not None
    plugin = chosen.get(slot.setting)
    if plugin is None:
        return f"`{name}` needs `{slot.setting}` with a plugin that has this option"
    mine = [option for option, _ in fields(chosen) if slot_of(option) is slot]
    known = ", ".join(f"`{option}`" for option in mine) or "none"
    return f"`{name}` is no option of `{slot.setting}` {plugin}; its options: {known}"
