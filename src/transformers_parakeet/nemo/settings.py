"""Parses, resolves and writes the YAML settings of a `.nemo` file.

What a setting means, and which field of our configuration holds it, is defined in `fields.py`.
"""

import re
from collections.abc import Mapping
from typing import Any

import yaml

from .archive import SETTINGS, NemoError

Settings = Mapping[str, Any]

# limits on the settings after interpolations are resolved: nodes of the tree, characters of a string, levels
MAX_NODES, MAX_STRING, MAX_DEPTH = 1_000_000, 100_000, 100

# `${a.b}`, without another interpolation inside
INTERPOLATION = re.compile(r"\$\{([^${}]+)\}")

# floats of YAML 1.2 without a decimal point: https://yaml.org/spec/1.2.2/#10214-floating-point
EXPONENT = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")


class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # chosen at run time
    """Safe YAML loader with the scalars of OmegaConf, which NeMo uses: `1e-5` is a number, a date is text."""


class Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]  # chosen at run time
    """Writes YAML that `Loader` and OmegaConf read back: text that looks like a number is quoted."""

    def ignore_aliases(self, data: Any) -> bool:
        """Return True: equal lists are written in full, as NeMo writes them."""
        return True


def use_omegaconf_scalars(yaml_class: Any) -> None:
    """Make a YAML loader or dumper class read dates as text and numbers such as `1e-5` as floats."""
    yaml_class.yaml_implicit_resolvers = {
        first_character: [(tag, pattern) for tag, pattern in rules if tag != "tag:yaml.org,2002:timestamp"]
        for first_character, rules in yaml_class.yaml_implicit_resolvers.items()
    }
    yaml_class.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+0123456789"))


use_omegaconf_scalars(Loader)
use_omegaconf_scalars(Dumper)
# `y` and `n` are text here, but YAML 1.1 reads them as booleans, so OmegaConf quotes them
Dumper.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("[yYnN]$"), list("yYnN"))


def parse_settings(content: bytes) -> dict[str, Any]:
    """Parse `model_config.yaml` with a safe loader.

    Args:
        content: the YAML text.

    Returns:
        The settings of the model in NeMo's present layout; interpolations are not resolved. Files with a root `model:`
        and files with `cls` and `params`, which NeMo wrote before version 1.0, are converted.

    Raises:
        NemoError: the content is not valid YAML, or not a mapping.
    """
    try:
        # `Loader` is a subclass of a safe loader
        settings = yaml.load(content, Loader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise NemoError(f"{SETTINGS} is not valid YAML: {error}") from error
    if not isinstance(settings, dict):
        raise NemoError(f"{SETTINGS} must be a mapping of settings, got {type(settings).__name__}")
    root = settings if "encoder" in settings else settings.get("model", settings)
    if not isinstance(root, dict):
        raise NemoError(f"`model` in {SETTINGS} must be a mapping of settings, got {type(root).__name__}")
    return modernise_layout(root)


def modernise_layout(section: dict[str, Any], depth: int = 0) -> dict[str, Any]:
    """Replace `cls` and `params`, which NeMo wrote before version 1.0, by `_target_` and its parameters.

    Args:
        section: a section of the settings.
        depth: number of sections around it.

    Raises:
        NemoError: the sections are nested more than `MAX_DEPTH` deep.
    """
    if depth > MAX_DEPTH:
        raise NemoError(f"{SETTINGS} is nested more than {MAX_DEPTH} levels deep")
    if isinstance(section.get("params"), dict) and "cls" in section:
        other_settings = {key: value for key, value in section.items() if key not in ("cls", "params")}
        section = {"_target_": section["cls"], **section["params"], **other_settings}
    return {
        key: modernise_layout(value, depth + 1) if isinstance(value, dict) else value for key, value in section.items()
    }


def dump_settings(settings: Settings) -> bytes:
    """Return settings as the YAML text that NeMo reads."""
    return bytes(yaml.dump(dict(settings), None, Dumper, allow_unicode=True, sort_keys=False, encoding="utf-8"))


def resolve_interpolations(settings: Settings) -> dict[str, Any]:
    """Return a copy of the settings in which interpolations such as `${model_defaults.enc_hidden}` are replaced.

    An interpolation is replaced by the value that it points to in the same file. One that points outside the file,
    such as `${oc.env:HOME}`, stays as text.

    Args:
        settings: all settings of the file.

    Raises:
        NemoError: an interpolation refers to itself, or the result is too large.
    """
    resolved: dict[str, Any] = Resolver(settings).resolve(settings, (), ())
    return resolved


class Resolver:
    """Replaces interpolations by the values that they point to, and limits the size of the result.

    Args:
        settings: all settings of the file.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.num_nodes = 0

    def resolve(self, value: Any, path: tuple[str, ...], pending: tuple[str, ...]) -> Any:
        """Return a copy of a part of the settings without interpolations.

        Args:
            value: a mapping, a list or a scalar.
            path: the keys that lead to it from the root.
            pending: dotted paths of the interpolations that are being resolved, to detect a cycle.

        Raises:
            NemoError: an interpolation refers to itself, or the result is too large.
        """
        self.num_nodes += 1
        if self.num_nodes > MAX_NODES or len(path) + len(pending) > MAX_DEPTH:
            raise NemoError(f"{SETTINGS} is too large or too deep after its aliases and interpolations are resolved")
        if isinstance(value, dict):
            return {key: self.resolve(item, (*path, str(key)), pending) for key, item in value.items()}
        if isinstance(value, list):
            return [self.resolve(item, (*path, str(index)), pending) for index, item in enumerate(value)]
        if not isinstance(value, str) or "${" not in value:
            return value
        match = INTERPOLATION.fullmatch(value)
        if match:
            return self._resolve_reference(match, path, pending)
        text = INTERPOLATION.sub(lambda match: str(self._resolve_reference(match, path, pending)), value)
        if len(text) > MAX_STRING:
            raise NemoError(f"`{'.'.join(path)}` in {SETTINGS} is too long after its interpolations are resolved")
        return text

    def _resolve_reference(self, match: re.Match[str], path: tuple[str, ...], pending: tuple[str, ...]) -> Any:
        """Return the value that an interpolation points to, or its text if the file has no such setting.

        Args:
            match: a match of `INTERPOLATION`.
            path: keys of the setting that contains the interpolation.
            pending: dotted paths of the interpolations that are being resolved.
        """
        keys = self._absolute_path(match[1].strip(), path)
        name = ".".join(keys)
        if name in pending:
            raise NemoError(f"`{'.'.join(path)}` in {SETTINGS} refers to itself by `{match[0]}`: write its value there")
        value: Any = self.settings
        for depth, key in enumerate(keys):
            if isinstance(value, str):
                # the section is an interpolation itself
                value = self.resolve(value, keys[:depth], (*pending, name))
            if not isinstance(value, dict) or key not in value:
                return match[0]
            value = value[key]
        return self.resolve(value, keys, (*pending, name))

    def _absolute_path(self, reference: str, path: tuple[str, ...]) -> tuple[str, ...]:
        """Return the keys of an interpolation from the root of the settings.

        Args:
            reference: `a.b` from the root, `.b` for a sibling, `..b` for a sibling of the parent, and so on.
            path: keys of the setting that contains the interpolation.
        """
        keys = tuple(reference.lstrip(".").split("."))
        num_dots = len(reference) - len(reference.lstrip("."))
        if num_dots:
            keys = (*path[: max(len(path) - num_dots, 0)], *keys)
        # `parse_settings` has removed the root `model`
        return keys[1:] if keys[0] == "model" and "model" not in self.settings else keys


def find_setting(settings: Settings, path: str, default: Any = None) -> Any:
    """Return a setting by its dotted path, or `default` if the file does not have it. An empty path is the root."""
    value: Any = settings
    for key in path.split(".") if path else ():
        if not isinstance(value, Mapping) or key not in value:
            return default
        value = value[key]
    return value


def find_section(settings: Settings, path: str) -> dict[str, Any]:
    """Return a section by its dotted path, or an empty dict if the file does not have it."""
    section = find_setting(settings, path)
    return section if isinstance(section, dict) else {}


def put_setting(settings: dict[str, Any], path: str, value: Any, *, create: bool = True) -> None:
    """Write a setting in place.

    Args:
        settings: the tree to change.
        path: dotted path of the setting.
        value: its new value.
        create: add the setting and its sections if the file does not have them; otherwise leave the file as it is.
    """
    *section_names, key = path.split(".")
    section = settings
    for name in section_names:
        if not isinstance(section.get(name), dict):
            if not create:
                return
            section[name] = {}
        section = section[name]
    if create or key in section:
        section[key] = value
