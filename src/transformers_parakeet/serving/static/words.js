// Words with times: from the answers of the server, as text, and after corrections.

/**
 * @typedef {object} Word
 * @property {string} text text without spaces
 * @property {number} start start in seconds
 * @property {number} end end in seconds
 * @property {number | null} confidence confidence from 0 to 1; null if unknown, or if a person wrote the word
 * @property {boolean} startsParagraph whether a paragraph starts with the word
 */

/** Silence in seconds before a new paragraph. */
const PARAGRAPH_PAUSE_S = 2;
/** Number of words after which a paragraph ends with the next sentence. */
const LONG_PARAGRAPH = 60;
/** Number of changed words up to which a correction is compared word by word. */
const MAX_CHANGES = 1000;

const SENTENCE_END = /[.?!\u2026\u3002\uff1f\uff01]["')\]\u201d\u2019]*$/;

/**
 * Return whether a text ends a sentence.
 * @param {string} text
 */
export function endsSentence(text) {
  return SENTENCE_END.test(text);
}

/**
 * Convert a word of an answer of the server.
 * @param {{word?: string, text?: string, start: number, end: number, confidence?: number | null}} word
 * @returns {Word}
 */
export function readWord(word) {
  const text = (word.word ?? word.text ?? "").trim();
  return { text, start: word.start, end: word.end, confidence: word.confidence ?? null, startsParagraph: false };
}

/**
 * Append words, and decide where paragraphs start.
 * @param {Word[]} words changed in place
 * @param {Word[]} added
 */
export function appendWords(words, added) {
  const paragraphStart = words.findLastIndex((word) => word.startsParagraph);
  let paragraphLength = words.length - Math.max(0, paragraphStart);
  for (const word of added) {
    if (word.text === "") {
      continue;
    }
    const last = words.at(-1);
    const isLong = paragraphLength >= LONG_PARAGRAPH && last !== undefined && endsSentence(last.text);
    const startsParagraph = last === undefined || word.start - last.end >= PARAGRAPH_PAUSE_S || isLong;
    paragraphLength = startsParagraph ? 1 : paragraphLength + 1;
    words.push({ ...word, startsParagraph: startsParagraph || word.startsParagraph });
  }
}

/**
 * Append the words of a live stream. A word that continues the word before it is joined to that word.
 * @param {Word[]} words changed in place
 * @param {{text: string, start: number, end: number, confidence?: number | null, is_continuation?: boolean}[]} added
 */
export function appendLiveWords(words, added) {
  for (const part of added) {
    const last = words.at(-1);
    const word = readWord(part);
    if (part.is_continuation && last !== undefined) {
      const confidences = [last.confidence, word.confidence].filter((value) => value !== null);
      const confidence = confidences.length > 0 ? Math.min(...confidences) : null;
      words[words.length - 1] = { ...last, text: last.text + word.text, end: word.end, confidence };
    } else {
      appendWords(words, [word]);
    }
  }
}

/**
 * Split words into paragraphs.
 * @param {Word[]} words
 * @returns {Word[][]}
 */
export function splitParagraphs(words) {
  /** @type {Word[][]} */
  const paragraphs = [];
  for (const word of words) {
    if (word.startsParagraph || paragraphs.length === 0) {
      paragraphs.push([]);
    }
    paragraphs[paragraphs.length - 1].push(word);
  }
  return paragraphs;
}

/**
 * Return the text of words, with an empty line between paragraphs.
 * @param {Word[]} words
 */
export function toText(words) {
  return splitParagraphs(words)
    .map((paragraph) => paragraph.map((word) => word.text).join(" "))
    .join("\n\n");
}

/**
 * Split a text into words without times.
 * @param {string} text
 * @returns {{text: string, startsParagraph: boolean}[]}
 */
function splitText(text) {
  return text
    .split(/\n\s*/)
    .flatMap((line) =>
      line
        .split(/\s+/)
        .filter((part) => part !== "")
        .map((part, index) => ({ text: part, startsParagraph: index === 0 })),
    );
}

/**
 * Find the words that two lists have in common, with the algorithm of Myers (1986), "An O(ND) difference algorithm".
 * @param {string[]} before
 * @param {string[]} after
 * @returns {[number, number][]} index in both lists for each common word; empty if more than `MAX_CHANGES` words differ
 */
export function findCommonWords(before, after) {
  const limit = Math.min(before.length + after.length, MAX_CHANGES);
  const center = limit + 1;
  // for each diagonal k = x - y: the largest x that the changes so far reach
  const reached = new Int32Array(2 * limit + 3);
  /** @type {Int32Array[]} */
  const history = [];
  for (let changes = 0; changes <= limit; changes += 1) {
    history.push(reached.slice(center - changes - 1, center + changes + 2));
    for (let k = -changes; k <= changes; k += 2) {
      const isInsertion = k === -changes || (k !== changes && reached[center + k - 1] < reached[center + k + 1]);
      let x = isInsertion ? reached[center + k + 1] : reached[center + k - 1] + 1;
      while (x < before.length && x - k < after.length && before[x] === after[x - k]) {
        x += 1;
      }
      reached[center + k] = x;
      if (x >= before.length && x - k >= after.length) {
        return traceBack(history, before.length, after.length);
      }
    }
  }
  return [];
}

/**
 * Follow the changes back to the start of both lists.
 * @param {Int32Array[]} history for each number of changes: the largest x of each diagonal before the last change
 * @param {number} x length of the first list
 * @param {number} y length of the second list
 * @returns {[number, number][]}
 */
function traceBack(history, x, y) {
  /** @type {[number, number][]} */
  const pairs = [];
  for (let changes = history.length - 1; changes >= 0; changes -= 1) {
    const center = changes + 1;
    const k = x - y;
    const reached = history[changes];
    const isInsertion = k === -changes || (k !== changes && reached[center + k - 1] < reached[center + k + 1]);
    const previousK = isInsertion ? k + 1 : k - 1;
    const previousX = changes > 0 ? reached[center + previousK] : 0;
    const previousY = changes > 0 ? previousX - previousK : 0;
    while (x > previousX && y > previousY) {
      x -= 1;
      y -= 1;
      pairs.push([x, y]);
    }
    x = previousX;
    y = previousY;
  }
  return pairs.reverse();
}

/**
 * Give times to a corrected text. A word that did not change keeps its times and its confidence. Changed words share
 * the time of the words that they replace.
 * @param {Word[]} words the words before the correction
 * @param {string} text the corrected text
 * @param {number} duration length of the recording in seconds
 * @returns {Word[]}
 */
export function applyCorrection(words, text, duration) {
  const parts = splitText(text);
  const pairs = findCommonWords(
    words.map((word) => word.text),
    parts.map((part) => part.text),
  );
  /** @type {Word[]} */
  const corrected = [];
  let [nextOld, nextNew] = [0, 0];
  for (const [oldIndex, newIndex] of [...pairs, /** @type {[number, number]} */ ([words.length, parts.length])]) {
    const start = words[nextOld - 1]?.end ?? 0;
    const end = words[oldIndex]?.start ?? duration;
    corrected.push(...shareTime(words.slice(nextOld, oldIndex), parts.slice(nextNew, newIndex), start, end));
    if (oldIndex < words.length) {
      corrected.push({ ...words[oldIndex], startsParagraph: parts[newIndex].startsParagraph });
    }
    [nextOld, nextNew] = [oldIndex + 1, newIndex + 1];
  }
  return corrected;
}

/**
 * Give times to new words.
 * @param {Word[]} replaced the words that they replace; empty for an insertion
 * @param {{text: string, startsParagraph: boolean}[]} parts the new words
 * @param {number} start start of an insertion in seconds
 * @param {number} end end of an insertion in seconds
 * @returns {Word[]}
 */
function shareTime(replaced, parts, start, end) {
  if (replaced.length === parts.length) {
    return parts.map((part, index) => ({ ...replaced[index], ...part, confidence: null }));
  }
  const first = replaced[0]?.start ?? start;
  const last = Math.max(first, replaced.at(-1)?.end ?? end);
  const length = parts.reduce((sum, part) => sum + part.text.length, 0);
  let position = 0;
  return parts.map((part) => {
    const from = first + ((last - first) * position) / length;
    position += part.text.length;
    return { ...part, start: from, end: first + ((last - first) * position) / length, confidence: null };
  });
}

/**
 * Format a time as minutes and seconds, with hours if there are any.
 * @param {number} seconds
 */
export function formatTime(seconds) {
  const whole = Math.max(0, Math.floor(seconds));
  const minutes = Math.floor(whole / 60) % 60;
  const hours = Math.floor(whole / 3600);
  const tail = String(whole % 60).padStart(2, "0");
  return hours > 0 ? `${hours}:${String(minutes).padStart(2, "0")}:${tail}` : `${minutes}:${tail}`;
}
