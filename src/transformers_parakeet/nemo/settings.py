"""Parses, resolves and writes the YAML settings of a `.nemo` file.

`fields.py` maps the settings to the fields of our configuration.
"""

import re
from collections.abc import Mapping
from typing import Any

import yaml

from .archive import SETTINGS_FILE, NemoError

Settings = Mapping[str, Any]

# limits on the settings after interpolations are resolved: number of values, length of a string, nesting depth
MAX_NODES, MAX_STRING_CHARS, MAX_DEPTH = 1_000_000, 100_000, 100

# an interpolation such as `${a.b}` that contains no other interpolation
INTERPOLATION_PATTERN = re.compile(r"\$\{([^${}]+)\}")

# floats with an exponent as in YAML 1.2, such as `1e-5`: https://yaml.org/spec/1.2.2/#10214-floating-point
EXPONENT_FLOAT_PATTERN = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")


class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # chosen at run time
    """Safe YAML loader that reads scalars as OmegaConf does, which NeMo uses: `1e-5` is a number, a date is text."""


class Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]  # chosen at run time
    """YAML dumper whose output `Loader` and OmegaConf read back; it quotes text that looks like a number."""

    def ignore_aliases(self, data: Any) -> bool:
        """Return True, so a list that occurs twice is written twice instead of as a YAML alias, as in NeMo.

        Args:
            data: the value that is written; not used.
        """
        return True


def use_omegaconf_scalar_rules(yaml_class: Any) -> None:
    """Make a YAML loader or dumper class treat dates as text and numbers such as `1e-5` as floats, as in OmegaConf.

    Args:
        yaml_class: subclass of a PyYAML loader or dumper, changed in place.
    """
    # copy the rules, because PyYAML shares them with the base class
    yaml_class.yaml_implicit_resolvers = {
        first_character: [(tag, pattern) for tag, pattern in rules if tag != "tag:yaml.org,2002:timestamp"]
        for first_character, rules in yaml_class.yaml_implicit_resolvers.items()
    }
    yaml_class.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT_FLOAT_PATTERN, list("-+0123456789"))


use_omegaconf_scalar_rules(Loader)
use_omegaconf_scalar_rules(Dumper)
# write the text `y` or `n` in quotes as OmegaConf does, because YAML 1.1 reads them as booleans
Dumper.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("[yYnN]$"), list("yYnN"))


def parse_settings(content: bytes) -> dict[str, Any]:
    """Parse the YAML text of `model_config.yaml`, and convert old layouts to the current layout.

    Old layouts have a root key `model`, or `cls` and `params` instead of `_target_` (NeMo before version 1.0).

    Args:
        content: YAML text, UTF-8.

    Returns:
        Settings of the model with unresolved interpolations.

    Raises:
        NemoError: the text is not valid YAML, or not a mapping.
    """
    try:
        # safe, because `Loader` is a subclass of PyYAML's safe loader
        settings = yaml.load(content, Loader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise NemoError(f"{SETTINGS_FILE} is not valid YAML: {error}") from error
    if not isinstance(settings, dict):
        raise NemoError(f"{SETTINGS_FILE} must be a mapping of settings, got {type(settings).__name__}")
    root = settings if "encoder" in settings else settings.get("model", settings)
    if not isinstance(root, dict):
        raise NemoError(f"`model` in {SETTINGS_FILE} must be a mapping of settings, got {type(root).__name__}")
    return modernise_layout(root)


def modernise_layout(section: dict[str, Any], depth: int = 0) -> dict[str, Any]:
    """Convert the layout of NeMo before version 1.0 to the current layout.

    `{cls: NAME, params: {key: value}}` becomes `{_target_: NAME, key: value}`, in the section and all its sub-sections.

    Args:
        section: section of the settings.
        depth: nesting depth of the section; 0 for the root.

    Returns:
        A converted copy of the section.

    Raises:
        NemoError: sections are nested more than `MAX_DEPTH` levels deep.
    """
    if depth > MAX_DEPTH:
        raise NemoError(f"{SETTINGS_FILE} is nested more than {MAX_DEPTH} levels deep")
    if isinstance(section.get("params"), dict) and "cls" in section:
        other_settings = {key: value for key, value in section.items() if key not in ("cls", "params")}
        section = {"_target_": section["cls"], **section["params"], **other_settings}
    return {
        key: modernise_layout(value, depth + 1) if isinstance(value, dict) else value for key, value in section.items()
    }


def dump_settings(settings: Settings) -> bytes:
    """Convert settings to YAML text, UTF-8, with the keys in their original order.

    Args:
        settings: settings of a `.nemo` file.
    """
    return bytes(yaml.dump(dict(settings), None, Dumper, allow_unicode=True, sort_keys=False, encoding="utf-8"))


def resolve_interpolations(settings: Settings) -> dict[str, Any]:
    """Return a copy of the settings in which each interpolation is replaced by the value that it points to.

    For example, `${model_defaults.enc_hidden}` becomes the value of the setting `model_defaults.enc_hidden`. An
    interpolation that points outside the file, such as `${oc.env:HOME}`, remains as text.

    Args:
        settings: all settings of the `.nemo` file.

    Raises:
        NemoError: an interpolation refers to itself, or the resolved settings are too large.
    """
    resolved: dict[str, Any] = Resolver(settings).resolve(settings, (), ())
    return resolved


class Resolver:
    """Replaces interpolations by the values that they point to, and limits the total number of values.

    Args:
        settings: all settings of the `.nemo` file.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.num_nodes = 0

    def resolve(self, value: Any, setting_keys: tuple[str, ...], pending_paths: tuple[str, ...]) -> Any:
        """Return a copy of a value in which all interpolations are replaced, including those in nested sections.

        `self.num_nodes` counts the values of all calls, because nested interpolations can grow exponentially.

        Args:
            value: mapping, list or scalar.
            setting_keys: keys from the root of the settings to the value.
            pending_paths: dotted paths of the interpolations that are being resolved, to detect cycles.

        Raises:
            NemoError: an interpolation refers to itself, or the resolved settings are too large.
        """
        self.num_nodes += 1
        if self.num_nodes > MAX_NODES or len(setting_keys) + len(pending_paths) > MAX_DEPTH:
            raise NemoError(
                f"{SETTINGS_FILE} is too large or too deep after its aliases and interpolations are resolved"
            )
        if isinstance(value, dict):
            return {key: self.resolve(item, (*setting_keys, str(key)), pending_paths) for key, item in value.items()}
        if isinstance(value, list):
            return [self.resolve(item, (*setting_keys, str(index)), pending_paths) for index, item in enumerate(value)]
        if not isinstance(value, str) or "${" not in value:
            return value
        match = INTERPOLATION_PATTERN.fullmatch(value)
        if match:
            # the whole string is one interpolation, so the result keeps its type, such as a number or a section
            return self._resolve_reference(match, setting_keys, pending_paths)
        text = INTERPOLATION_PATTERN.sub(
            lambda match: str(self._resolve_reference(match, setting_keys, pending_paths)), value
        )
        if len(text) > MAX_STRING_CHARS:
            raise NemoError(
                f"`{'.'.join(setting_keys)}` in {SETTINGS_FILE} is too long after its interpolations are resolved"
            )
        return text

    def _resolve_reference(
        self, match: re.Match[str], setting_keys: tuple[str, ...], pending_paths: tuple[str, ...]
    ) -> Any:
        """Return the resolved value that an interpolation points to, or the original text if the key does not exist.

        Args:
            match: match of `INTERPOLATION_PATTERN`; group 1 is the path between the braces.
            setting_keys: keys from the root of the settings to the setting that contains the interpolation.
            pending_paths: dotted paths of the interpolations that are being resolved, to detect cycles.

        Raises:
            NemoError: the interpolation refers to itself.
        """
        target_keys = self._to_absolute_keys(match[1].strip(), setting_keys)
        target_path = ".".join(target_keys)
        if target_path in pending_paths:
            raise NemoError(
                f"`{'.'.join(setting_keys)}` in {SETTINGS_FILE} refers to itself by `{match[0]}`: replace it by a value"
            )
        value: Any = self.settings
        for depth, key in enumerate(target_keys):
            if isinstance(value, str):
                # a section on the way to the target can be an interpolation
                value = self.resolve(value, target_keys[:depth], (*pending_paths, target_path))
            if not isinstance(value, dict) or key not in value:
                return match[0]
            value = value[key]
        return self.resolve(value, target_keys, (*pending_paths, target_path))

    def _to_absolute_keys(self, reference: str, setting_keys: tuple[str, ...]) -> tuple[str, ...]:
        """Convert the path in an interpolation to keys from the root of the settings.

        Args:
            reference: `a.b` is relative to the root, `.b` to the section that contains the interpolation, and `..b` to
                the parent of that section.
            setting_keys: keys from the root of the settings to the setting that contains the interpolation.
        """
        keys = tuple(reference.lstrip(".").split("."))
        num_dots = len(reference) - len(reference.lstrip("."))
        if num_dots:
            # one dot removes the key of the setting, two dots also remove the key of the section, and so on
            keys = (*setting_keys[: max(len(setting_keys) - num_dots, 0)], *keys)
        # `parse_settings` has removed the root key `model`, but interpolations may still start with it
        return keys[1:] if keys[0] == "model" and "model" not in self.settings else keys


def find_setting(settings: Settings, path: str, default: Any = None) -> Any:
    """Look up a setting by its dotted path; return `default` if it does not exist, and the root for an empty path.

    Args:
        settings: settings of a `.nemo` file.
        path: dotted path, such as `encoder.d_model`.
        default: value for a missing setting.
    """
    value: Any = settings
    for key in path.split(".") if path else ():
        if not isinstance(value, Mapping) or key not in value:
            return default
        value = value[key]
    return value


def find_section(settings: Settings, path: str) -> dict[str, Any]:
    """Look up a section by its dotted path; return an empty dict if it does not exist.

    Args:
        settings: settings of a `.nemo` file.
        path: dotted path, such as `decoder.prednet`.
    """
    section = find_setting(settings, path)
    return section if isinstance(section, dict) else {}


def put_setting(settings: dict[str, Any], path: str, value: Any, *, create: bool = True) -> None:
    """Change the value of a setting.

    Args:
        settings: nested settings, changed in place.
        path: dotted path of the setting.
        value: new value of the setting.
        create: whether to add a missing setting and its sections. If False, a missing setting is ignored.
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
