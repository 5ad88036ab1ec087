"""The YAML of the settings, and interpolations in it."""

from transformers_parakeet.nemo.settings import dump_settings, parse_settings, resolve_interpolations


def test_interpolations_are_replaced_by_their_values():
    settings = {
        "a": {"b": 3, "c": "${.b}", "d": "${..e}", "f": ["${a.b}", "x${a.c}y"], "i": "${a.d.h}"},
        "e": {"b": "${a.c}", "h": 1.5},
    }
    assert resolve_interpolations(settings) == {
        "a": {"b": 3, "c": 3, "d": {"b": 3, "h": 1.5}, "f": [3, "x3y"], "i": 1.5},
        "e": {"b": 3, "h": 1.5},
    }


def test_an_interpolation_that_points_outside_the_file_stays_as_it_is():
    settings = {"x": "${now:%Y}", "y": "${no.where}"}
    assert resolve_interpolations(settings) == settings


def test_yaml_is_read_and_written_as_in_nemo():
    text = "lr: 1e-5\nday: 2024-01-02\npiece: '1e5'\nother: 'y'\n'no': 'no'\nn: 12\nnone: null\n"
    settings = parse_settings(text.encode())
    assert settings == {
        "lr": 1e-5,
        "day": "2024-01-02",
        "piece": "1e5",
        "other": "y",
        "no": "no",
        "n": 12,
        "none": None,
    }
    written = dump_settings(settings).decode()
    assert parse_settings(written.encode()) == settings
    assert "piece: '1e5'" in written
    assert "other: 'y'" in written
