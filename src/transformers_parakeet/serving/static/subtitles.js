// Writes words as the files that can be downloaded: text, SRT, WebVTT and JSON.

import { endsSentence, splitParagraphs, toText } from "./words.js";

/** @typedef {import("./words.js").Word} Word */
/** @typedef {{lines: string[], start: number, end: number}} Cue times in milliseconds */

// limits of a cue, as in the subtitles of the server
const LINE_WIDTH = 42;
const MAX_CUE_MS = 7000;
const MIN_CUE_MS = 1000;
const PAUSE_MS = 1000;

const WIDE = /[\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe6f\uff00-\uff60\uffe0-\uffe6]/u;

/**
 * Return the width of a text in characters, where wide characters (for example Chinese) count twice.
 * @param {string} text
 */
function getWidth(text) {
  let width = 0;
  for (const character of text) {
    width += WIDE.test(character) ? 2 : 1;
  }
  return width;
}

/**
 * Break words into one line, or into two lines of similar width.
 * @param {string[]} texts
 * @returns {string[] | null} the lines; null if two lines are not enough
 */
function breakLines(texts) {
  const whole = texts.join(" ");
  if (getWidth(whole) <= LINE_WIDTH || texts.length === 1) {
    return [whole];
  }
  /** @type {string[] | null} */
  let best = null;
  let bestWidth = LINE_WIDTH + 1;
  for (let index = 1; index < texts.length; index += 1) {
    const lines = [texts.slice(0, index).join(" "), texts.slice(index).join(" ")];
    const width = Math.max(...lines.map(getWidth));
    if (width < bestWidth) {
      [best, bestWidth] = [lines, width];
    }
  }
  return best;
}

/**
 * Group words into cues. A cue ends with a sentence, a pause or a paragraph, or if it is full.
 * @param {Word[]} words
 * @param {number} duration length of the recording in seconds
 * @returns {Cue[]}
 */
export function buildCues(words, duration) {
  /** @type {Word[][]} */
  const groups = [];
  for (const word of words) {
    const group = groups.at(-1);
    const last = group?.at(-1);
    const isFull =
      group !== undefined &&
      (breakLines([...group, word].map((item) => item.text)) === null ||
        1000 * (word.end - group[0].start) > MAX_CUE_MS);
    if (
      group === undefined ||
      last === undefined ||
      isFull ||
      word.startsParagraph ||
      endsSentence(last.text) ||
      1000 * (word.start - last.end) >= PAUSE_MS
    ) {
      groups.push([word]);
    } else {
      group.push(word);
    }
  }
  return setCueTimes(groups, duration);
}

/**
 * Set the times of cues: in order, without overlap, and at least `MIN_CUE_MS` long where there is room.
 * @param {Word[][]} groups the words of each cue
 * @param {number} duration length of the recording in seconds
 * @returns {Cue[]}
 */
function setCueTimes(groups, duration) {
  /** @type {Cue[]} */
  const cues = [];
  for (const group of groups) {
    const texts = group.map((word) => word.text);
    const previous = cues.at(-1);
    const start = Math.max(Math.round(1000 * group[0].start), previous === undefined ? 0 : previous.start + 1);
    const end = Math.max(...group.map((word) => Math.round(1000 * word.end)), start + 1);
    if (previous !== undefined && previous.end > start) {
      previous.end = start;
    }
    cues.push({ lines: breakLines(texts) ?? [texts.join(" ")], start, end });
  }
  cues.forEach((cue, index) => {
    const limit = index + 1 < cues.length ? cues[index + 1].start : Math.round(1000 * duration);
    cue.end = Math.max(cue.end, Math.min(cue.start + MIN_CUE_MS, limit));
  });
  return cues;
}

/**
 * Format a time as hours, minutes, seconds and milliseconds.
 * @param {number} milliseconds
 * @param {string} separator character before the milliseconds
 */
function formatCueTime(milliseconds, separator) {
  const seconds = Math.floor(milliseconds / 1000);
  const fields = [Math.floor(seconds / 3600), Math.floor(seconds / 60) % 60, seconds % 60];
  const rest = String(milliseconds % 1000).padStart(3, "0");
  return `${fields.map((field) => String(field).padStart(2, "0")).join(":")}${separator}${rest}`;
}

/**
 * Write words as SubRip subtitles.
 * @param {Word[]} words
 * @param {number} duration
 */
export function toSrt(words, duration) {
  return buildCues(words, duration)
    .map((cue, index) => {
      const times = `${formatCueTime(cue.start, ",")} --> ${formatCueTime(cue.end, ",")}`;
      return `${index + 1}\n${times}\n${cue.lines.join("\n")}\n`;
    })
    .join("\n");
}

/**
 * Write words as WebVTT subtitles.
 * @param {Word[]} words
 * @param {number} duration
 */
export function toVtt(words, duration) {
  const blocks = buildCues(words, duration).map((cue) => {
    const times = `${formatCueTime(cue.start, ".")} --> ${formatCueTime(cue.end, ".")}`;
    const text = cue.lines.join("\n").replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
    return `${times}\n${text}\n`;
  });
  return ["WEBVTT\n", ...blocks].join("\n");
}

/**
 * Write words as plain text with an empty line between paragraphs.
 * @param {Word[]} words
 */
export function toTxt(words) {
  return words.length > 0 ? `${toText(words)}\n` : "";
}

/**
 * Return the lowest confidence; null if no word has a confidence.
 * @param {Word[]} words
 */
function getLowestConfidence(words) {
  const values = words.map((word) => word.confidence).filter((value) => value !== null);
  return values.length > 0 ? values.reduce((lowest, value) => Math.min(lowest, value), 1) : null;
}

/**
 * Write words as the JSON that `parakeet transcribe` writes; the segments are the paragraphs.
 * @param {Word[]} words
 * @param {number} duration
 * @param {string} file name of the recording
 * @param {string} model name of the model
 */
export function toJson(words, duration, file, model) {
  /** @param {Word[]} items */
  const describe = (items) => ({
    text: items.map((word) => word.text).join(" "),
    start: items[0].start,
    end: items[items.length - 1].end,
    confidence: getLowestConfidence(items),
  });
  const fields = {
    file,
    duration,
    text: words.map((word) => word.text).join(" "),
    confidence: getLowestConfidence(words),
    segments: splitParagraphs(words).map(describe),
    words: words.map((word) => describe([word])),
    tokens: [],
    model,
    settings: {},
    version: null,
  };
  return `${JSON.stringify(fields, null, 2)}\n`;
}
