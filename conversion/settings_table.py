"""Writes the table of settings that are read, ignored and refused into docs/conversion.md.

python conversion/settings_table.py
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from transformers_parakeet.nemo.keys import NEMO_MODEL_CLASSES, SECTIONS, Section

DOCUMENT = Path(__file__).parent.parent / "docs" / "conversion.md"
START, END = "<!-- settings: start -->\n", "<!-- settings: end -->\n"

# setting -> what the table says about its values, if a list of values does not say it
NOTES = {
    "encoder.att_context_size": (
        "one context or a list of them, the first is used; ignored for `chunked_limited_with_rc`, as in NeMo"
    ),
    "encoder.conv_context_size": "`null`, `causal`, or two counts whose sum is `conv_kernel_size` - 1",
    "encoder.subsampling_conv_channels": "-1 means `d_model`",
    "preprocessor.normalize": "`per_feature`; any other text except `all_features` means no normalisation",
    "preprocessor.n_window_size": "samples, instead of `window_size` in seconds",
    "preprocessor.n_window_stride": "samples, instead of `window_stride` in seconds",
    "preprocessor.window_stride": "10 ms",
    "joint.num_extra_outputs": "the number of durations",
    "aux_ctc": "read for the hybrid classes only",
    "target": ", ".join(f"`{name}`" for name in NEMO_MODEL_CLASSES),
    "decoding.durations": "frames that a step of TDT may advance",
    "decoding.big_blank_durations": "none; multi-blank transducers are refused",
    "tokenizer.langs": "the sections of an aggregate tokenizer (`type: agg`)",
}


def settings_table() -> str:
    """Return the table in Markdown: every known key, its values, and whether it is read, ignored or refused."""
    lines = ["| section | key | values | |", "| --- | --- | --- | --- |"]
    for section, names in group_sections():
        title = ", ".join(f"`{name}`" if name else "(root)" for name in names)
        lines += [f"| {title} | {keys} | {values} | {use} |" for keys, values, use in table_rows(names[0], section)]
        lines.append(f"| {title} | any other key | | {use_of_unknown(section)} |")
    return "\n".join(lines) + "\n"


def group_sections() -> list[tuple[Section, list[str]]]:
    """Return each section with its names; neighbours with the same keys are one entry."""
    groups: list[tuple[Section, list[str]]] = []
    for name, section in SECTIONS.items():
        if groups and groups[-1][0] == section:
            groups[-1][1].append(name)
        else:
            groups.append((section, [name]))
    return groups


def use_of_unknown(section: Section) -> str:
    """Return what happens to an unknown key or value of a section."""
    return "refused" if section.is_strict else "ignored, one warning names them"


def table_rows(name: str, section: Section) -> Iterator[tuple[str, str, str]]:
    """Yield the rows of one section: its keys, their values, and what happens to them.

    Args:
        name: dotted path of the section.
        section: its keys.
    """
    keys_with_any_value = []
    for key, values in section.allowed_values.items():
        setting = f"{name}.{key}".removeprefix(".")
        if key == "_target_":
            yield "`_target_`", ", ".join(f"`{value}`" for value in section.allowed_classes), "read; others are refused"
        elif values:
            texts = ("`null`" if value is None else f"`{value}`" for value in values)
            yield f"`{key}`", ", ".join(texts), f"read; others are {use_of_unknown(section)}"
        elif setting in NOTES:
            yield f"`{key}`", NOTES[setting], "read"
        else:
            keys_with_any_value.append(key)
    if keys_with_any_value:
        yield list_keys(sorted(keys_with_any_value)), "any", "read"
    if section.ignored:
        yield list_keys(section.ignored), "any", "ignored: no effect on inference"
    for description in dict.fromkeys(section.refused.values()):
        yield list_keys(key for key, model in section.refused.items() if model == description), description, "refused"


def list_keys(keys: Iterable[str]) -> str:
    """Return keys as code, separated by commas."""
    return ", ".join(f"`{key}`" for key in keys)


def main() -> None:
    """Replace the text between the two marks of the document."""
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(START)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text(f"{before}{START}\n{settings_table()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
