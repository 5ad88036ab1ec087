"""Tests of the parameters of a request: prompts, names of files, choices; without a server."""

import pytest
from starlette.datastructures import FormData, UploadFile

from transformers_parakeet.serving.errors import ApiError
from transformers_parakeet.serving.parameters import clean_file_name, read_parameters, split_prompt


def read(*pairs, file=True):
    """Read the parameters of a form with a file and a model.

    Args:
        *pairs: names and values of other parameters.
        file: whether the form has a file.
    """
    items = [("model", "demo"), *pairs]
    if file:
        items.append(("file", UploadFile(None, filename="folder/clip.flac")))
    return read_parameters(FormData(items), "demo", UploadFile)


def test_the_defaults():
    parameters = read()
    assert parameters.file_name == "clip.flac"
    assert parameters.response_format == "json"
    assert parameters.granularities == parameters.phrases == ()
    assert parameters.language is None
    assert not parameters.is_streamed


def test_all_parameters():
    parameters = read(
        ("response_format", "VERBOSE_JSON"),
        ("timestamp_granularities[]", "word"),
        ("timestamp_granularities[]", "segment"),
        ("language", "en"),
        ("prompt", "Ann, Bob Smith"),
        ("stream", "false"),
        ("temperature", "0.3"),
        ("chunking_strategy", "auto"),
    )
    assert parameters.response_format == "verbose_json"
    assert parameters.granularities == ("word", "segment")
    assert parameters.language == "en"
    assert parameters.phrases == ("Ann", "Bob Smith")


@pytest.mark.parametrize(
    ("pairs", "status", "code", "parameter"),
    [
        ([("user", "x")], 400, "unknown_parameter", "user"),
        ([("model", "other")], 404, "model_not_found", "model"),
        ([("response_format", "xml")], 400, "invalid_value", "response_format"),
        ([("stream", "yes")], 400, "invalid_value", "stream"),
        ([("stream", "true"), ("response_format", "vtt")], 400, "invalid_value", "response_format"),
        ([("timestamp_granularities[]", "word")], 400, "invalid_value", "timestamp_granularities[]"),
        (
            [("response_format", "verbose_json"), ("timestamp_granularities[]", "letter")],
            400,
            "invalid_value",
            "timestamp_granularities[]",
        ),
    ],
)
def test_wrong_parameters_are_named(pairs, status, code, parameter):
    with pytest.raises(ApiError) as caught:
        read(*pairs)
    assert (caught.value.status, caught.value.code, caught.value.param) == (status, code, parameter)


def test_a_form_without_a_file_or_a_model_is_refused():
    with pytest.raises(ApiError, match="must have an audio file") as caught:
        read(file=False)
    assert caught.value.param == "file"
    with pytest.raises(ApiError, match="must have an audio file"):
        read(("file", "clip.flac"), file=False)
    with pytest.raises(ApiError) as caught:
        read_parameters(FormData([("file", UploadFile(None, filename="a"))]), "demo", UploadFile)
    assert caught.value.status == 404


@pytest.mark.parametrize(
    ("prompt", "phrases"),
    [
        ("", ()),
        ("  \n ", ()),
        ("seven", ("seven",)),
        ("Hello Dr. Miller!", ("Hello", "Dr", "Miller")),
        ("Ann Lee, Bob; Carl\nDora", ("Ann Lee", "Bob", "Carl", "Dora")),
        ("a, a,, a;b", ("a", "b")),
        ("O'Neill (CEO)", ("O'Neill", "CEO")),
        ("żółw\tłódź", ("żółw", "łódź")),
    ],
)
def test_a_prompt_is_split_into_phrases(prompt, phrases):
    assert split_prompt(prompt) == phrases


def test_the_number_of_phrases_is_limited():
    assert len(split_prompt(" ".join(map(str, range(1000))))) == 1000
    with pytest.raises(ApiError, match="at most 1000 phrases, got 1001"):
        split_prompt(" ".join(map(str, range(1001))))
    # equal phrases count once
    assert split_prompt("a b " * 5000) == ("a", "b")


@pytest.mark.parametrize(
    ("name", "cleaned"),
    [
        ("clip.flac", "clip.flac"),
        ("../../etc/passwd", "passwd"),
        ("C:\\music\\clip.mp3", "clip.mp3"),
        ("a\x00b\r\nc\x1b[31m", "abc[31m"),
        ("", "the file"),
        (None, "the file"),
        ("folder/", "the file"),
        ("x" * 300, "x" * 100),
        ("日本.wav", "日本.wav"),
    ],
)
def test_names_of_files_have_no_folders_and_no_control_characters(name, cleaned):
    assert clean_file_name(name) == cleaned
