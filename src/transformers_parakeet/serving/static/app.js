// Connects the parts of the page: its states, the files, the microphone, the player, the transcript and the downloads.

import { getModel, ServerError, transcribeFile } from "./api.js";
import { announce, getElement, watchDrops } from "./dom.js";
import { saveTranscript } from "./downloads.js";
import { LiveSession } from "./live.js";
import { explainMicrophoneError, Microphone } from "./microphone.js";
import { computePeaks, PEAKS_PER_S, Player } from "./player.js";
import { Transcript } from "./transcript.js";
import { appendLiveWords, appendWords, applyCorrection, formatTime, readWord, toText } from "./words.js";

/** @typedef {import("./words.js").Word} Word */
/** @typedef {"locked" | "start" | "sending" | "live" | "finishing" | "done"} State */

/** Milliseconds for which a button shows that it has worked. */
const CONFIRMATION_MS = 1500;

const title = getElement("title", HTMLElement);
const errorText = getElement("error", HTMLElement);
const statusText = getElement("status", HTMLElement);
const progress = getElement("progress", HTMLProgressElement);
const emptyText = getElement("empty", HTMLElement);
const fileInput = getElement("file", HTMLInputElement);
const chooseButton = getElement("choose", HTMLButtonElement);
const speakButton = getElement("speak", HTMLButtonElement);
const stopButton = getElement("stop", HTMLButtonElement);
const editButton = getElement("edit", HTMLButtonElement);
const copyButton = getElement("copy", HTMLButtonElement);
const keyForm = getElement("key-form", HTMLFormElement);
const keyInput = getElement("key", HTMLInputElement);

/** What the page shows. */
const page = {
  /** @type {State} */
  state: "start",
  model: "",
  key: "",
  /** name of the recording */
  name: "",
  duration: 0,
  /** @type {Word[]} */
  words: [],
  /** whether there are corrections that were not downloaded or copied */
  hasUnsavedCorrections: false,
  /** @type {AbortController | null} */
  request: null,
  /** @type {File | null} the file that waits for an API key */
  waitingFile: null,
  /** @type {{microphone: Microphone, session: LiveSession} | null} */
  live: null,
};

const player = new Player(
  {
    audio: getElement("audio", HTMLAudioElement),
    button: getElement("play", HTMLButtonElement),
    canvas: getElement("waveform", HTMLCanvasElement),
    time: getElement("time", HTMLElement),
  },
  (seconds) => transcript.markTime(seconds, !player.audio.paused),
);

const transcript = new Transcript(
  {
    words: getElement("words", HTMLElement),
    field: getElement("field", HTMLTextAreaElement),
    detail: getElement("detail", HTMLElement),
  },
  {
    onWord: (word) => player.playWord(word),
    onParagraph: (seconds) => player.playFrom(seconds),
    onEdit: (index) => startEditing(index),
  },
);

/**
 * Change the state of the page: show the elements that belong to it.
 * @param {State} state
 */
function setState(state) {
  page.state = state;
  document.body.dataset.state = state;
  title.textContent = { locked: "This server needs a key", start: "Turn speech into text" }[String(state)] ?? page.name;
  for (const element of document.querySelectorAll("[data-show]")) {
    if (element instanceof HTMLElement) {
      element.hidden = !element.dataset.show?.split(" ").includes(state);
    }
  }
  emptyText.hidden = state !== "done" || page.words.length > 0;
}

/**
 * Show an error; an empty message hides it.
 * @param {string} message
 */
function showError(message) {
  errorText.hidden = message === "";
  errorText.textContent = message;
}

/**
 * Show an error of the server, or ask for the API key.
 * @param {unknown} error
 */
function showServerError(error) {
  if (error instanceof ServerError && error.status === 401) {
    showError(page.key === "" ? "" : "The server does not accept this API key.");
    page.key = "";
    setState("locked");
    keyInput.focus();
  } else {
    showError(error instanceof Error ? error.message : String(error));
  }
}

/**
 * Announce new words to screen readers.
 * @param {{text?: string, word?: string}[]} words
 */
function announceWords(words) {
  announce(words.map((word) => (word.word ?? word.text ?? "").trim()).join(" "));
}

/**
 * Ask whether corrections may be lost, if there are any.
 */
function mayDiscard() {
  const question = "The corrections of this transcript are not downloaded. Discard them?";
  return !page.hasUnsavedCorrections || confirm(question);
}

/**
 * Start with a new recording.
 * @param {string} name
 * @param {State} state
 */
function startRecording(name, state) {
  page.request?.abort();
  page.name = name;
  page.duration = 0;
  page.words = [];
  page.hasUnsavedCorrections = false;
  showError("");
  stopEditing();
  transcript.setWords([]);
  player.clear();
  setState(state);
}

/**
 * Show the words of the finished recording.
 */
function finishRecording() {
  const hadFocus = document.activeElement === stopButton || document.activeElement === document.body;
  player.setWords(page.words);
  setState("done");
  announce(`Finished. Number of words: ${page.words.length}`);
  // the button to stop is hidden now
  if (hadFocus) {
    player.button.focus();
  }
}

/**
 * Transcribe a file.
 * @param {File} file
 */
async function transcribe(file) {
  startRecording(file.name, "sending");
  const request = new AbortController();
  page.request = request;
  stopButton.focus();
  statusText.textContent = "Sending";
  progress.removeAttribute("value");
  const isPlayable = player.load(file);
  try {
    const result = await transcribeFile(file, page.model, page.key, createFileCallbacks(), request.signal);
    /** @type {Word[]} */
    const words = [];
    appendWords(words, result.words.map(readWord));
    const isContinued = page.words.every(
      ({ text, start }, index) => text === words[index]?.text && start === words[index].start,
    );
    const announced = isContinued ? page.words.length : 0;
    page.words = words;
    page.duration = result.duration;
    player.setDuration(result.duration);
    if (isContinued) {
      transcript.showNewWords(words);
    } else {
      transcript.setWords(words);
    }
    announceWords(words.slice(announced));
    finishRecording();
    if (!(await isPlayable) && page.request === request) {
      showError("This browser cannot play the file. The transcript is complete.");
    }
  } catch (error) {
    if (request.signal.aborted) {
      return;
    }
    page.waitingFile = error instanceof ServerError && error.status === 401 ? file : null;
    page.duration = player.duration;
    setState(page.words.length > 0 ? "done" : "start");
    showServerError(error);
  }
}

/**
 * Create the functions that show the progress of a file.
 */
function createFileCallbacks() {
  return {
    /** @param {number} fraction */
    onUpload: (fraction) => {
      if (fraction < 1) {
        progress.value = fraction;
        statusText.textContent = `Sending, ${Math.round(100 * fraction)} %`;
      } else {
        progress.removeAttribute("value");
        statusText.textContent = "Recognising";
      }
    },
    /** @type {(words: any[], seconds: number) => void} */
    onWords: (words, seconds) => {
      appendWords(page.words, words.map(readWord));
      transcript.showNewWords(page.words);
      announceWords(words);
      if (player.duration > 0) {
        progress.value = seconds / player.duration;
        statusText.textContent = `Recognised ${formatTime(seconds)} of ${formatTime(player.duration)}`;
      }
    },
  };
}

/**
 * Use a file that was chosen or dropped.
 * @param {FileList | null | undefined} files
 */
function useFiles(files) {
  if (files === null || files === undefined || files.length === 0) {
    return;
  }
  if (page.state === "locked" || page.state === "live" || page.state === "finishing") {
    return;
  }
  if (files.length > 1) {
    showError(`The page takes one recording at a time, but got ${files.length}. Drop one file.`);
    return;
  }
  if (mayDiscard()) {
    void transcribe(files[0]);
  }
}

/**
 * Start a live recording.
 */
async function startLive() {
  if (!mayDiscard()) {
    return;
  }
  const request = new AbortController();
  const time = new Date().toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
  startRecording(`Recording of ${time}`, "live");
  page.request = request;
  stopButton.focus();
  statusText.textContent = "Opening the microphone";
  player.startLive();
  try {
    const microphone = await Microphone.open();
    if (request.signal.aborted) {
      await microphone.stop();
    } else {
      await connectMicrophone(microphone);
    }
  } catch (error) {
    if (!request.signal.aborted) {
      setState("start");
      showError(explainMicrophoneError(error));
      speakButton.focus();
    }
  }
}

/**
 * Send what the microphone records to the server.
 * @param {Microphone} microphone
 */
async function connectMicrophone(microphone) {
  const session = createLiveSession();
  page.live = { microphone, session };
  microphone.stream.getAudioTracks()[0].addEventListener("ended", () => void stopLive());
  try {
    await session.connect(microphone.rate, page.key);
  } catch (error) {
    // without an error if the recording was stopped in the meantime
    if (page.live?.session === session) {
      showServerError(error);
      await stopLive();
    }
    return;
  }
  if (page.live?.session !== session) {
    return;
  }
  /** @param {Int16Array<ArrayBuffer>} block */
  const addBlock = (block) => {
    session.append(block);
    player.addPeaks(computePeaks(block, Math.round(microphone.rate / PEAKS_PER_S), 32768));
    const status = session.isLate ? "Listening; the words come late" : "Listening";
    // a screen reader announces each change
    if (statusText.textContent !== status) {
      statusText.textContent = status;
    }
  };
  // the blocks that were recorded while the connection was opened
  microphone.blocks.forEach(addBlock);
  microphone.onBlock = addBlock;
}

/**
 * Create the live session, which shows its words and errors.
 */
function createLiveSession() {
  return new LiveSession({
    onWords: (words, tentative) => {
      appendLiveWords(page.words, words);
      transcript.followNewWords(page.words);
      transcript.setTentative(tentative);
      announceWords(words);
    },
    onError: (message) => {
      showError(message);
      void stopLive();
    },
  });
}

/**
 * Stop the live recording, and wait for the last words.
 */
async function stopLive() {
  if (page.live === null) {
    return;
  }
  const { microphone, session } = page.live;
  page.live = null;
  setState("finishing");
  statusText.textContent = "Waiting for the last words";
  progress.removeAttribute("value");
  await microphone.stop();
  await session.finish();
  transcript.setTentative([]);
  const file = microphone.toFile();
  page.duration = microphone.duration;
  await player.load(file);
  player.setDuration(page.duration);
  finishRecording();
}

/** Stop what is running. */
function stop() {
  if (page.live !== null) {
    void stopLive();
  } else if (page.state === "live") {
    page.request?.abort();
    setState("start");
    speakButton.focus();
  } else if (page.state === "sending") {
    page.request?.abort();
    page.duration = player.duration;
    setState(page.words.length > 0 ? "done" : "start");
    player.setWords(page.words);
    chooseButton.focus();
  }
}

/**
 * Open the text field for corrections.
 * @param {number} index index of the word to select; -1 for none
 */
function startEditing(index) {
  if (page.state === "done") {
    player.audio.pause();
    editButton.setAttribute("aria-pressed", "true");
    editButton.textContent = "Done";
    emptyText.hidden = true;
    transcript.startEditing(index);
  }
}

/** Use the corrections, and close the text field. */
function stopEditing() {
  if (!transcript.isEditing) {
    return;
  }
  const { field } = transcript;
  if (field.value !== toText(page.words)) {
    page.words = applyCorrection(page.words, field.value, page.duration);
    page.hasUnsavedCorrections = true;
    player.setWords(page.words);
    const { current } = transcript;
    transcript.setWords(page.words);
    transcript.setCurrent(Math.min(current, Math.max(0, page.words.length - 1)));
  }
  editButton.setAttribute("aria-pressed", "false");
  editButton.textContent = "Edit";
  transcript.stopEditing();
  emptyText.hidden = page.words.length > 0;
}

/**
 * Save the transcript as a file.
 * @param {string} format `txt`, `srt`, `vtt` or `json`
 */
function download(format) {
  stopEditing();
  saveTranscript(format, page);
  page.hasUnsavedCorrections = false;
}

/** Copy the text. */
async function copy() {
  stopEditing();
  await navigator.clipboard.writeText(toText(page.words));
  page.hasUnsavedCorrections = false;
  copyButton.textContent = "Copied";
  setTimeout(() => (copyButton.textContent = "Copy"), CONFIRMATION_MS);
}

/** Ask the server for its model, and show the start of the page. */
async function connect() {
  try {
    page.model = await getModel(page.key);
  } catch (error) {
    showServerError(error);
    return;
  }
  showError("");
  keyInput.value = "";
  getElement("model", HTMLElement).textContent = page.model;
  setState("start");
  if (page.waitingFile !== null) {
    const file = page.waitingFile;
    page.waitingFile = null;
    void transcribe(file);
  }
}

function addListeners() {
  fileInput.addEventListener("change", () => {
    const { files } = fileInput;
    useFiles(files);
    // the same file can be chosen again
    fileInput.value = "";
  });
  chooseButton.addEventListener("click", () => fileInput.click());
  speakButton.addEventListener("click", () => void startLive());
  stopButton.addEventListener("click", stop);
  editButton.addEventListener("click", () => (transcript.isEditing ? stopEditing() : startEditing(-1)));
  copyButton.addEventListener("click", () => void copy());
  // only pages from https:// addresses or from this computer may write to the clipboard
  copyButton.hidden = navigator.clipboard === undefined;
  for (const button of document.querySelectorAll("[data-format]")) {
    button.addEventListener("click", () => download(/** @type {HTMLElement} */ (button).dataset.format ?? ""));
  }
  transcript.field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      stopEditing();
      transcript.focusWord(transcript.current);
    }
  });
  keyForm.addEventListener("submit", (event) => {
    event.preventDefault();
    page.key = keyInput.value.trim();
    void connect();
  });
  addEventListener("beforeunload", (event) => {
    if (page.hasUnsavedCorrections) {
      event.preventDefault();
    }
  });
  watchDrops(useFiles);
}

addListeners();
void connect();
