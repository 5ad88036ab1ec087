// Saves a transcript as a file.

import { toJson, toSrt, toTxt, toVtt } from "./subtitles.js";

/** @typedef {import("./words.js").Word} Word */
/**
 * @typedef {object} Result
 * @property {string} name name of the recording
 * @property {string} model name of the model
 * @property {number} duration length of the recording in seconds
 * @property {Word[]} words
 */

/**
 * Formats by the ending of the file name: media type, and a function that writes a result.
 * @type {Record<string, [string, (result: Result) => string]>}
 */
const FORMATS = {
  txt: ["text/plain", ({ words }) => toTxt(words)],
  srt: ["application/x-subrip", ({ words, duration }) => toSrt(words, duration)],
  vtt: ["text/vtt", ({ words, duration }) => toVtt(words, duration)],
  json: ["application/json", ({ words, duration, name, model }) => toJson(words, duration, name, model)],
};

/**
 * Return the name of a file without characters that file names cannot contain on all systems.
 * @param {string} name name of the recording
 * @param {string} format
 */
function buildFileName(name, format) {
  return `${name.replace(/\.[^.]{1,5}$/, "").replaceAll(/[\\/:*?"<>|]+/g, "-")}.${format}`;
}

/**
 * Save a transcript as a file.
 * @param {string} format a key of `FORMATS`
 * @param {Result} result
 */
export function saveTranscript(format, result) {
  const [type, write] = FORMATS[format];
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([write(result)], { type: `${type};charset=utf-8` }));
  link.download = buildFileName(result.name, format);
  link.click();
  URL.revokeObjectURL(link.href);
}
