"""Tests of the web page in Chromium: files, the microphone, words, corrections, downloads, keyboard, screen sizes.

Every test also checks that no request leaves 127.0.0.1 and that the console of the browser has no errors. The tests
are skipped where no browser is installed.
"""

import base64
import io
import itertools
import json
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import jsonschema
import numpy as np
import pytest
import soundfile
import soxr
import srt
import webvtt
from conftest import TESTS
from PIL import Image
from playwright.sync_api import expect, sync_playwright
from serving_helpers import start_app

import transformers_parakeet as tp

CLIPS = tp.demo_model_path() / "clips"
RATE = 16000
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
KEY = "a-key-for-tests"
# milliseconds; the model and the browser share few cores with other tests
TIMEOUT_MS = 60_000
LIVE_TIMEOUT_MS = 120_000
# The fake microphone repeats "one two three". A browser on a loaded machine loses samples, and with them words.
LIVE_WORDS = re.compile(r"\b(one two|two three)\b")
# WCAG 2.2, success criterion 1.4.3
MIN_CONTRAST = 4.5
# pixels; WCAG 2.2, success criterion 2.5.8, requires 24
MIN_TARGET = 44

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no browser is installed")


def read_clip(name):
    """Return the samples of a clip of the demo model, (S,) float32 at 16 kHz."""
    return soundfile.read(CLIPS / name, dtype="float32")[0]


def silence(seconds):
    """Return silence, (S,) float32 at 16 kHz."""
    return np.zeros(round(seconds * RATE), dtype=np.float32)


def to_wav(samples, rate=RATE):
    """Return the content of a WAV file with 16-bit samples."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype="PCM_16")
    return file.getvalue()


@pytest.fixture(scope="module")
def url():
    with start_app() as (address, _):
        yield f"{address}/"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Start a browser whose microphone repeats "one two three" with pauses."""
    microphone = tmp_path_factory.mktemp("microphone") / "microphone.wav"
    samples = np.concatenate([silence(2.5), read_clip("one_two_three.flac"), silence(1.5)])
    microphone.write_bytes(to_wav(soxr.resample(samples, RATE, 48000), 48000))
    arguments = [
        "--no-sandbox",
        "--use-fake-ui-for-media-stream",
        "--use-fake-device-for-media-stream",
        f"--use-file-for-fake-audio-capture={microphone}",
        "--autoplay-policy=no-user-gesture-required",
    ]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=arguments)
        yield chromium
        chromium.close()


@dataclass
class Recorder:
    """What the pages of a test did: the addresses that they requested, and their errors.

    Args:
        addresses: addresses of requests and WebSockets.
        errors: errors of the console, except those that the test expects.
        expected_error: regular expression of errors that the test expects.
    """

    addresses: list
    errors: list
    expected_error: str = "(?!)"

    def watch(self, page):
        """Record the requests and errors of a page."""
        page.on("request", lambda request: self.addresses.append(request.url))
        page.on("websocket", lambda websocket: self.addresses.append(websocket.url))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda message: self.add_message(message.type, message.text))

    def add_message(self, kind, text):
        """Record a message of the console if it is an error or a warning."""
        if kind in ("error", "warning") and not re.search(self.expected_error, text):
            self.errors.append(text)


@pytest.fixture
def recorder():
    """Check after a test that all requests went to 127.0.0.1 and that there were no errors."""
    recorder = Recorder([], [])
    yield recorder
    assert recorder.errors == []
    assert recorder.addresses
    assert {urlsplit(address.removeprefix("blob:")).hostname for address in recorder.addresses} == {"127.0.0.1"}


@pytest.fixture
def open_page(browser, recorder, url):
    """Return a function that opens the page in a context of its own."""
    contexts = []

    def open_in_context(address=url, init_script=None, **options):
        context = browser.new_context(permissions=["microphone", "clipboard-read", "clipboard-write"], **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(TIMEOUT_MS)
        recorder.watch(page)
        if init_script:
            page.add_init_script(init_script)
        page.goto(address)
        return page

    expect.set_options(timeout=TIMEOUT_MS)
    yield open_in_context
    for context in contexts:
        context.close()


@pytest.fixture
def page(open_page):
    opened = open_page()
    expect(opened.locator("body")).to_have_attribute("data-state", "start")
    return opened


def drop_files(page, **contents):
    """Drop files on the page; `contents` are the contents by name, with `__` for the dot."""
    files = [[name.replace("__", "."), base64.b64encode(content).decode()] for name, content in contents.items()]
    code = """files => {
        const transfer = new DataTransfer();
        for (const [name, content] of files) {
            transfer.items.add(new File([Uint8Array.from(atob(content), (c) => c.charCodeAt(0))], name));
        }
        document.body.dispatchEvent(new DragEvent("dragover", { dataTransfer: transfer, bubbles: true }));
        document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, bubbles: true }));
    }"""
    page.evaluate(code, files)


def transcribe_clip(page, name="one_two_three.flac"):
    """Choose a clip of the demo model, and wait for its words."""
    page.set_input_files("#file", CLIPS / name)
    wait_until_done(page)


def wait_until_done(page):
    """Wait until the recording is transcribed."""
    expect(page.locator("body")).to_have_attribute("data-state", "done")


def get_words(page):
    """Return the words on the page."""
    return page.locator(".word").all_text_contents()


def download(page, kind):
    """Download the transcript; return the name of the file and its text."""
    with page.expect_download() as waiting:
        page.get_by_role("button", name=f"Download {kind.upper()}").click()
    return waiting.value.suggested_filename, Path(waiting.value.path()).read_text(encoding="utf-8")


def correct_word(page, index, text):
    """Replace a word: double-click it, which selects it in the text field, and type."""
    page.locator(".word").nth(index).dblclick()
    page.keyboard.type(text)
    page.get_by_role("button", name="Done").click()


def test_a_dropped_clip_shows_its_words_with_confidence(page, url):
    content = (CLIPS / "fsdd_dev_0_yweweler.flac").read_bytes()
    drop_files(page, five_two_three_zero__flac=content)
    wait_until_done(page)
    assert get_words(page) == ["five", "two", "three", "zero"]
    expect(page.locator("h1")).to_have_text("five_two_three_zero.flac")
    form = {"model": "demo", "response_format": "verbose_json", "timestamp_granularities[]": "word"}
    answer = httpx.post(f"{url}v1/audio/transcriptions", data=form, files={"file": ("a.flac", content)}, timeout=60)
    expected = [round(1 - word["confidence"], 3) for word in answer.json()["words"]]
    shades = page.eval_on_selector_all(".word", "all => all.map((e) => Number(e.style.getPropertyValue('--doubt')))")
    assert shades == pytest.approx(expected, abs=2e-3)
    assert max(shades) > 0.02
    # a screen reader announces the words and the end
    assert page.locator("#log p").all_text_contents() == ["five two three zero", "Finished. Number of words: 4"]


def test_a_click_on_a_word_plays_it(page):
    # the pause at the end is longer than the delays of a loaded machine
    drop_files(page, clip__wav=to_wav(np.concatenate([read_clip("one_two_three.flac"), silence(25.0)])))
    wait_until_done(page)
    page.evaluate(
        "() => { window.played = []; const audio = document.querySelector('audio');"
        "audio.addEventListener('play', () => played.push(['play', audio.currentTime]));"
        "audio.addEventListener('pause', () => played.push(['pause', audio.currentTime])); }"
    )
    # "two" is from 1.04 s to 1.52 s
    page.locator(".word").nth(1).click()
    page.wait_for_function("() => played.length === 2")
    (first, start), (second, end) = page.evaluate("played")
    assert (first, second) == ("play", "pause")
    assert start == pytest.approx(1.04, abs=0.15)
    assert 1.52 <= end < 20
    expect(page.locator("#detail")).to_contain_text("two · 0:01.0 · confidence 99 %")
    # the time of a paragraph plays the recording from there to its end
    page.get_by_role("button", name="Play from 0:00").click()
    page.wait_for_function("() => played.length === 3 && document.querySelector('audio').currentTime > 3")


def measure_bars(page, seconds, duration):
    """Return the height of the waveform at a time, as a part of the height of the canvas, with an accuracy of a bar."""
    with Image.open(io.BytesIO(page.locator("#waveform").screenshot())) as image:
        pixels = np.asarray(image.convert("L")).astype(int)
    center = round(pixels.shape[1] * seconds / duration)
    columns = pixels[:, max(0, center - 3) : center + 4]
    return (abs(columns - pixels[0, -1]) > 20).any(axis=1).mean()


def test_the_waveform_shows_the_recording_and_seeks(page):
    transcribe_clip(page)
    # "one" is from 0.08 s to 0.48 s of 2.745 s, and then comes a pause; the waveform appears after the words
    deadline = time.monotonic() + TIMEOUT_MS / 1000
    while max(measure_bars(page, seconds, 2.745) for seconds in (0.2, 0.3, 1.2, 1.3, 2.3)) < 0.8:
        assert time.monotonic() < deadline
    assert max(measure_bars(page, seconds, 2.745) for seconds in (0.15, 0.2, 0.25, 0.3, 0.35, 0.4)) > 0.3
    assert measure_bars(page, 0.8, 2.745) < 0.15
    box = page.locator("#waveform").bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    position = page.evaluate("() => document.querySelector('audio').currentTime")
    assert position == pytest.approx(2.745 / 2, abs=0.05)
    expect(page.locator("#waveform")).to_have_attribute("aria-valuetext", "0:01 of 0:02")


def test_downloads_contain_the_correction(page):
    transcribe_clip(page)
    correct_word(page, 1, "twenty-two <&>")
    assert get_words(page) == ["one", "twenty-two", "<&>", "three"]

    name, text = download(page, "srt")
    assert name == "one_two_three.srt"
    cues = list(srt.parse(text))
    assert " ".join(cue.content.replace("\n", " ") for cue in cues) == "one twenty-two <&> three"
    assert cues[0].start.total_seconds() == pytest.approx(0.08)
    assert cues[-1].end.total_seconds() == pytest.approx(2.56, abs=0.2)

    name, text = download(page, "vtt")
    assert name == "one_two_three.vtt"
    captions = list(webvtt.from_string(text))
    assert " ".join(caption.text.replace("\n", " ") for caption in captions) == "one twenty-two &lt;&amp;&gt; three"
    assert captions[0].start == "00:00:00.080"

    assert download(page, "txt") == ("one_two_three.txt", "one twenty-two <&> three\n")

    name, text = download(page, "json")
    result = json.loads(text)
    schema = json.loads((TESTS.parent / "docs" / "results.schema.json").read_text(encoding="utf-8"))
    jsonschema.validate(result, schema)
    assert (name, result["file"], result["model"]) == ("one_two_three.json", "one_two_three.flac", "demo")
    assert result["text"] == "one twenty-two <&> three"
    words = {word["text"]: (word["start"], word["end"], word["confidence"]) for word in result["words"]}
    # words that were not corrected keep their values; the correction has the time of the word that it replaces
    assert words["one"][:2] == (0.08, 0.48)
    assert words["one"][2] > 0.9
    assert (words["twenty-two"][0], words["<&>"][1]) == (1.04, 1.52)
    assert words["twenty-two"][2] is None


def test_a_correction_is_not_lost_without_a_question(page):
    transcribe_clip(page)
    correct_word(page, 0, "won")
    questions = []

    def dismiss(dialog):
        questions.append(dialog.message)
        dialog.dismiss()

    page.once("dialog", dismiss)
    page.set_input_files("#file", CLIPS / "fsdd_test_1_theo.flac")
    assert questions == ["The corrections of this transcript are not downloaded. Discard them?"]
    assert get_words(page) == ["won", "two", "three"]
    download(page, "txt")
    page.set_input_files("#file", CLIPS / "fsdd_test_1_theo.flac")
    expect(page.locator(".word")).to_have_text(["five", "six", "four"])


def test_the_microphone_gives_live_words_and_a_recording(page):
    page.get_by_role("button", name="Speak").click()
    expect(page.locator("#status")).to_have_text("Listening")
    expect(page.locator("#words")).to_contain_text(LIVE_WORDS, timeout=LIVE_TIMEOUT_MS)
    assert page.locator("body").get_attribute("data-state") == "live"
    page.get_by_role("button", name="Stop").click()
    wait_until_done(page)
    assert LIVE_WORDS.search(" ".join(get_words(page)))
    # the recording can be played, and the times of the words fit it
    duration = page.evaluate("() => document.querySelector('audio').duration")
    result = json.loads(download(page, "json")[1])
    assert result["duration"] == pytest.approx(duration, abs=0.1)
    assert 0 < result["words"][0]["start"] < result["words"][-1]["end"] <= duration + 0.1
    assert list(srt.parse(download(page, "srt")[1]))
    page.locator(".word").first.click()
    page.wait_for_function("() => document.querySelector('audio').currentTime > 0")


def test_the_microphone_works_at_its_own_rate(open_page, recorder):
    # Firefox refuses to connect a microphone to a context with another rate
    page = open_page(
        init_script="""
        const connect = AudioContext.prototype.createMediaStreamSource;
        AudioContext.prototype.createMediaStreamSource = function (stream) {
            if (this.sampleRate === 24000) {
                throw new DOMException("different rates", "NotSupportedError");
            }
            return connect.call(this, stream);
        };"""
    )
    sent = []
    page.on("websocket", lambda websocket: websocket.on("framesent", lambda frame: sent.append(frame)))
    page.get_by_role("button", name="Speak").click()
    expect(page.locator("#words")).to_contain_text(LIVE_WORDS, timeout=LIVE_TIMEOUT_MS)
    page.get_by_role("button", name="Stop").click()
    wait_until_done(page)
    assert json.loads(sent[0])["session"]["audio"]["input"]["format"]["rate"] in (44100, 48000)


def test_a_refused_microphone_is_explained(open_page):
    page = open_page(
        init_script="navigator.mediaDevices.getUserMedia = async () => {"
        "throw new DOMException('refused', 'NotAllowedError'); }"
    )
    page.get_by_role("button", name="Speak").click()
    expect(page.get_by_role("alert")).to_contain_text("does not allow the microphone")
    assert page.locator("body").get_attribute("data-state") == "start"


def test_a_long_recording_shows_words_and_progress_before_its_end(open_page, url):
    clips = [read_clip("fsdd_dev_0_yweweler.flac"), silence(2.5), read_clip("one_two_three.flac"), silence(0.5)] * 10
    content = to_wav(np.concatenate(clips))
    page = open_page(
        init_script="""
        window.statuses = [];
        addEventListener("DOMContentLoaded", () => {
            const status = document.getElementById("status");
            new MutationObserver(() => {
                statuses.push([status.textContent, document.querySelectorAll(".word").length]);
            }).observe(status, { childList: true });
        });"""
    )
    expect(page.locator("body")).to_have_attribute("data-state", "start")
    drop_files(page, long__wav=content)
    wait_until_done(page)
    assert get_words(page) == ["five", "two", "three", "zero", "one", "two", "three"] * 10
    # a pause of 2 s starts a paragraph
    expect(page.locator(".paragraph")).to_have_count(11)
    early = [count for text, count in page.evaluate("statuses") if text.startswith("Recognised 0:")]
    assert early
    assert 0 < early[0] < 70
    form = {"model": "demo", "response_format": "verbose_json", "timestamp_granularities[]": "word", "stream": "true"}
    answer = httpx.post(f"{url}v1/audio/transcriptions", data=form, files={"file": ("a.wav", content)}, timeout=60)
    events = [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n") if line]
    done = events[-1]
    assert done["type"] == "transcript.text.done"
    assert "".join(event["delta"] for event in events[:-1]) == done["text"]
    new_words = [word for event in events[:-1] for word in event.get("words", ())]
    assert len(new_words) > 20
    assert [word["word"] for word in new_words] == [word["word"] for word in done["words"][: len(new_words)]]
    assert [word["start"] for word in new_words] == pytest.approx(
        [word["start"] for word in done["words"][: len(new_words)]]
    )
    seconds = [event["seconds"] for event in events[:-1] if "seconds" in event]
    assert seconds == sorted(seconds)
    assert 0 < seconds[0] <= seconds[-1] < done["duration"]


def test_the_page_works_with_the_keyboard_alone(page):
    # the browser reports dialogs only some time after the registration, so it comes first
    page.on("filechooser", lambda chooser: chooser.set_files(CLIPS / "one_two_three.flac"))
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Choose a file")).to_be_focused()
    page.keyboard.press("Enter")
    wait_until_done(page)
    # the focus is on the play button; its ring is visible
    play = page.get_by_role("button", name="Play", exact=True)
    expect(play).to_be_focused()
    assert page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Tab")
    expect(page.get_by_role("slider", name="Position")).to_be_focused()
    page.keyboard.press("End")
    expect(page.get_by_role("slider")).to_have_attribute("aria-valuenow", "3")
    page.keyboard.press("Home")
    expect(page.get_by_role("slider")).to_have_attribute("aria-valuenow", "0")
    # to the words: edit, copy, four formats, the time of the paragraph, the first word
    for _ in range(8):
        page.keyboard.press("Tab")
    expect(page.locator(".word").first).to_be_focused()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    expect(page.locator(".word").nth(1)).to_be_focused()
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.querySelector('audio').currentTime > 1")
    page.keyboard.press("F2")
    page.keyboard.type("too")
    page.keyboard.press("Escape")
    assert get_words(page) == ["one", "too", "three"]
    expect(page.locator(".word").nth(1)).to_be_focused()
    # back over the time of the paragraph, JSON and VTT to SRT
    for _ in range(4):
        page.keyboard.press("Shift+Tab")
    with page.expect_download() as waiting:
        page.keyboard.press("Enter")
    assert waiting.value.suggested_filename == "one_two_three.srt"
    assert "one too three" in Path(waiting.value.path()).read_text(encoding="utf-8")


def test_the_text_can_be_copied(page):
    transcribe_clip(page)
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("() => navigator.clipboard.readText()") == "one two three"


def test_errors_are_shown(page, recorder):
    recorder.expected_error = "status of 400"
    drop_files(page, notes__txt=b"this is no audio file")
    expect(page.get_by_role("alert")).to_contain_text("notes.txt")
    expect(page.locator("body")).to_have_attribute("data-state", "start")
    drop_files(page, first__flac=b"1", second__flac=b"2")
    expect(page.get_by_role("alert")).to_contain_text("one recording at a time, but got 2")
    # the next recording works and removes the message
    transcribe_clip(page)
    expect(page.get_by_role("alert")).to_be_hidden()


def test_a_silent_recording_has_no_words(page):
    drop_files(page, silence__wav=to_wav(silence(0.05)))
    wait_until_done(page)
    expect(page.get_by_text("No words were recognised.")).to_be_visible()
    assert download(page, "srt") == ("silence.srt", "")
    assert download(page, "vtt") == ("silence.vtt", "WEBVTT\n")


def test_stop_ends_the_request(page, url):
    page.route("**/v1/audio/transcriptions", lambda route: None)
    page.set_input_files("#file", CLIPS / "one_two_three.flac")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("body")).to_have_attribute("data-state", "start")
    expect(page.get_by_role("alert")).to_be_hidden()
    page.unroute("**/v1/audio/transcriptions")
    transcribe_clip(page)
    assert get_words(page) == ["one", "two", "three"]


def test_a_server_with_keys_asks_for_one(open_page, recorder):
    recorder.expected_error = "status of 401"
    with start_app(api_keys=(KEY,)) as (address, _):
        page = open_page(address)
        field = page.get_by_label("API key of this server")
        expect(field).to_be_focused()
        field.fill("wrong")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_have_text("The server does not accept this API key.")
        field.fill(KEY)
        page.keyboard.press("Enter")
        expect(page.locator("body")).to_have_attribute("data-state", "start")
        transcribe_clip(page)
        assert get_words(page) == ["one", "two", "three"]
        # the live stream sends the key, too
        page.get_by_role("button", name="Speak").click()
        expect(page.locator("#words")).to_contain_text(LIVE_WORDS, timeout=LIVE_TIMEOUT_MS)
        page.get_by_role("button", name="Stop").click()
        wait_until_done(page)
        # the key is only in the memory of the page
        stored = page.evaluate("() => [document.cookie, localStorage.length, sessionStorage.length]")
        assert stored == ["", 0, 0]
        page.close()


def test_the_page_may_load_nothing_from_other_servers(url):
    answer = httpx.get(url)
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert {policy[name] for name in ("script-src", "style-src", "img-src", "connect-src")} == {"'self'"}
    assert policy["media-src"] == "'self' blob:"
    assert answer.headers["x-content-type-options"] == "nosniff"
    # the pages of FastAPI load files from other servers
    assert {httpx.get(f"{url}{path}").status_code for path in ("docs", "redoc", "openapi.json")} == {404}


def measure_contrast(page, text, ground, strength=1.0):
    """Return the contrast of two colours of the style sheet by WCAG 2.2.

    Args:
        page: the page.
        text: name of the property of the text colour.
        ground: name of the property of the ground, or of the shade on the surface.
        strength: opacity of the ground on the surface.
    """
    code = """([text, ground, strength]) => {
        const style = getComputedStyle(document.documentElement);
        const read = (name) => {
            const value = style.getPropertyValue(name).trim();
            const channels = value.startsWith("#") ? value.match(/[0-9a-f]{2}/gi).map((pair) => parseInt(pair, 16))
                : value.split(" ").map(Number);
            return channels;
        };
        const surface = read("--surface");
        const mixed = read(ground).map((value, index) => strength * value + (1 - strength) * surface[index]);
        const luminance = (channels) => {
            const [r, g, b] = channels.map((value) => {
                const part = value / 255;
                return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
            });
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const [low, high] = [luminance(read(text)), luminance(mixed)].sort((a, b) => a - b);
        return (high + 0.05) / (low + 0.05);
    }"""
    return page.evaluate(code, [text, ground, strength])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_have_enough_contrast(open_page, scheme):
    page = open_page(color_scheme=scheme)
    ground = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    is_dark = sum(map(int, re.findall(r"\d+", ground))) < 200
    assert is_dark == (scheme == "dark")
    pairs = [
        *(("--text", "--page"), ("--text", "--surface"), ("--text", "--spoken"), ("--muted", "--page")),
        *(("--muted", "--surface"), ("--on-accent", "--accent"), ("--error", "--error-page")),
    ]
    assert min(measure_contrast(page, *pair) for pair in pairs) >= MIN_CONTRAST
    strength = page.evaluate(
        "() => Number(getComputedStyle(document.documentElement).getPropertyValue('--doubt-strength'))"
    )
    # the least certain word
    assert measure_contrast(page, "--text", "--doubt-color", strength) >= MIN_CONTRAST


@pytest.mark.parametrize("width", [320, 390])
def test_the_page_fits_a_phone(open_page, width):
    page = open_page(viewport={"width": width, "height": 844}, is_mobile=True, has_touch=True)
    expect(page.locator("body")).to_have_attribute("data-state", "start")

    def check_layout():
        assert page.evaluate("() => document.documentElement.scrollWidth") == width
        buttons = page.locator("button:visible:not(.time)").all()
        boxes = [button.bounding_box() for button in buttons]
        assert boxes
        assert min(box["height"] for box in boxes) >= MIN_TARGET

    check_layout()
    transcribe_clip(page)
    check_layout()
    page.locator(".word").nth(1).tap()
    page.wait_for_function("() => document.querySelector('audio').currentTime > 1")
    page.get_by_role("button", name="Edit").tap()
    page.locator("#field").fill("one two four")
    page.get_by_role("button", name="Done").tap()
    assert get_words(page) == ["one", "two", "four"]
    check_layout()


def test_corrections_keep_the_times_of_other_words(page):
    code = """async ([texts, text]) => {
        const { applyCorrection } = await import("/words.js");
        const words = texts.map((text, index) => (
            { text, start: index, end: index + 0.5, confidence: 0.9, startsParagraph: index === 0 }
        ));
        return applyCorrection(words, text, texts.length).map((word) => [word.text, word.start, word.end]);
    }"""

    def correct(before, after):
        return page.evaluate(code, [before.split(), after])

    assert correct("a b c", "a b c") == [["a", 0, 0.5], ["b", 1, 1.5], ["c", 2, 2.5]]
    assert correct("a b c", "a c") == [["a", 0, 0.5], ["c", 2, 2.5]]
    assert correct("a b c", "a x c") == [["a", 0, 0.5], ["x", 1, 1.5], ["c", 2, 2.5]]
    # two words share the time of one by their lengths
    assert correct("a b c", "a xxx y c") == [["a", 0, 0.5], ["xxx", 1, 1.375], ["y", 1.375, 1.5], ["c", 2, 2.5]]
    # an inserted word has the pause between its neighbours
    assert correct("a b", "a x b") == [["a", 0, 0.5], ["x", 0.5, 1], ["b", 1, 1.5]]
    assert correct("a b", "x a b") == [["x", 0, 0], ["a", 0, 0.5], ["b", 1, 1.5]]
    assert correct("a b", "") == []
    assert correct("", "x") == [["x", 0, 0]]
    # more changes than are compared word by word
    before = " ".join(f"w{index}" for index in range(900))
    after = " ".join(f"v{index}" for index in range(700))
    words = correct(before, after)
    assert [word[0] for word in words] == after.split()
    assert (words[0][1], words[-1][2]) == (0, 899.5)
    assert all(first[2] <= second[1] + 1e-6 for first, second in itertools.pairwise(words))


def test_cues_are_in_order_and_fit(page):
    code = """async (words) => {
        const { toSrt, toVtt } = await import("/subtitles.js");
        return [toSrt(words, 1000), toVtt(words, 1000)];
    }"""
    random = np.random.default_rng(0)
    words, end = [], 0.0
    for index in range(500):
        start = end + float(random.exponential(0.2))
        # some words have no length, and some overlap the next word
        end = start + float(random.choice([0.0, 0.2, 0.6]))
        text = "w" * int(random.integers(1, 12)) + ("." if index % 17 == 16 else "")
        words.append({"text": text, "start": start, "end": end + 0.3 * (index % 5 == 0), "startsParagraph": index == 0})
        words[-1]["confidence"] = None
    words.append({**words[-1], "text": "w" * 60})
    subtitles, captions = page.evaluate(code, words)
    cues = list(srt.parse(subtitles))
    assert " ".join(cue.content.replace("\n", " ") for cue in cues) == " ".join(word["text"] for word in words)
    assert [cue.index for cue in cues] == list(range(1, len(cues) + 1))
    assert all(cue.start < cue.end for cue in cues)
    assert all(first.end <= second.start for first, second in itertools.pairwise(cues))
    lines = [line for cue in cues[:-1] for line in cue.content.split("\n")]
    assert max(len(line) for line in lines) <= 42
    assert max(len(cue.content.split("\n")) for cue in cues) == 2
    assert max((cue.end - cue.start).total_seconds() for cue in cues) <= 7
    parsed = list(webvtt.from_string(captions))
    assert [caption.text for caption in parsed] == [cue.content for cue in cues]
    assert [caption.start_in_seconds for caption in parsed] == [int(cue.start.total_seconds()) for cue in cues]
