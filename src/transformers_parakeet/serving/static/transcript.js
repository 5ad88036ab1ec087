// Shows the words, with the keyboard and the pointer, and the text field for corrections.

import { formatTime, toText } from "./words.js";

/** @typedef {import("./words.js").Word} Word */

/** Distance in pixels from the end of the page within which the page follows new words. */
const FOLLOW_DISTANCE = 160;

/**
 * The transcript.
 */
export class Transcript {
  /**
   * @param {object} elements
   * @param {HTMLElement} elements.words
   * @param {HTMLTextAreaElement} elements.field
   * @param {HTMLElement} elements.detail
   * @param {object} callbacks
   * @param {(word: Word) => void} callbacks.onWord called if a word is clicked
   * @param {(seconds: number) => void} callbacks.onParagraph called if the time of a paragraph is clicked
   * @param {(index: number) => void} callbacks.onEdit called if a word is to be corrected
   */
  constructor({ words, field, detail }, { onWord, onParagraph, onEdit }) {
    this.element = words;
    this.field = field;
    this.detail = detail;
    this.callbacks = { onWord, onParagraph, onEdit };
    /** @type {Word[]} */
    this.words = [];
    /** @type {HTMLElement[]} the element of each word */
    this.spans = [];
    /** index of the word that the tab key reaches */
    this.current = 0;
    /** index of the word that is played; -1 for none */
    this.playing = -1;
    /** @type {HTMLElement | null} */
    this.tentative = null;
    this.addListeners();
  }

  addListeners() {
    this.element.addEventListener("click", (event) => {
      const index = this.getIndex(event.target);
      if (index >= 0) {
        this.setCurrent(index);
        this.callbacks.onWord(this.words[index]);
      } else if (event.target instanceof HTMLButtonElement) {
        this.callbacks.onParagraph(Number(event.target.dataset.start));
      }
    });
    this.element.addEventListener("dblclick", (event) => {
      const index = this.getIndex(event.target);
      if (index >= 0) {
        this.callbacks.onEdit(index);
      }
    });
    this.element.addEventListener("pointerover", (event) => {
      const index = this.getIndex(event.target);
      if (index >= 0) {
        this.describe(index);
      }
    });
    this.element.addEventListener("focusin", (event) => {
      const index = this.getIndex(event.target);
      if (index >= 0) {
        this.setCurrent(index);
        this.describe(index);
      }
    });
    this.element.addEventListener("keydown", (event) => this.handleKey(event));
    this.field.addEventListener("input", () => this.fitField());
  }

  /**
   * Return the index of the word of an element; -1 if it is no word.
   * @param {EventTarget | null} target
   */
  getIndex(target) {
    return target instanceof HTMLElement && target.dataset.index !== undefined ? Number(target.dataset.index) : -1;
  }

  /** @param {KeyboardEvent} event */
  handleKey(event) {
    const index = this.getIndex(event.target);
    if (index < 0 || event.ctrlKey || event.metaKey || event.altKey) {
      return;
    }
    /** @type {Record<string, number>} */
    const targets = {
      ArrowRight: index + 1,
      ArrowLeft: index - 1,
      ArrowDown: this.findParagraph(index, 1),
      ArrowUp: this.findParagraph(index, -1),
      Home: 0,
      End: this.words.length - 1,
    };
    if (event.key in targets) {
      event.preventDefault();
      this.focusWord(targets[event.key]);
    } else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      this.callbacks.onWord(this.words[index]);
    } else if (event.key === "F2") {
      event.preventDefault();
      this.callbacks.onEdit(index);
    }
  }

  /**
   * Return the index of the first word of a neighbouring paragraph.
   * @param {number} index index of a word
   * @param {1 | -1} direction
   */
  findParagraph(index, direction) {
    let target = index + direction;
    while (target > 0 && target < this.words.length && !this.words[target].startsParagraph) {
      target += direction;
    }
    return target;
  }

  /** @param {number} index */
  focusWord(index) {
    const last = this.words.length - 1;
    this.spans[Math.max(0, Math.min(last, index))]?.focus();
  }

  /**
   * Make a word the one that the tab key reaches.
   * @param {number} index
   */
  setCurrent(index) {
    const before = this.spans[this.current];
    if (before !== undefined) {
      before.tabIndex = -1;
      before.removeAttribute("aria-describedby");
    }
    this.current = index;
    const span = this.spans[index];
    if (span !== undefined) {
      span.tabIndex = 0;
      span.setAttribute("aria-describedby", this.detail.id);
    }
  }

  /**
   * Show the time and the confidence of a word.
   * @param {number} index
   */
  describe(index) {
    const { text, start, confidence } = this.words[index];
    const time = `${formatTime(start)}.${Math.floor((start % 1) * 10)}`;
    const percentage = confidence === null ? "" : ` · confidence ${Math.floor(100 * confidence)} %`;
    this.detail.textContent = `${text} · ${time}${percentage}`;
  }

  /**
   * Show other words.
   * @param {Word[]} words
   */
  setWords(words) {
    this.words = [];
    this.spans = [];
    this.current = 0;
    this.playing = -1;
    this.tentative = null;
    this.detail.textContent = "";
    this.element.replaceChildren();
    this.showNewWords(words);
  }

  /**
   * Show words that were appended to the words shown.
   * @param {Word[]} words all words
   */
  showNewWords(words) {
    this.setTentative([]);
    // the last word can have become longer
    const last = this.spans.length - 1;
    if (last >= 0 && last < words.length && this.words[last] !== words[last]) {
      this.spans[last].textContent = words[last].text;
      this.shade(this.spans[last], words[last]);
    }
    for (let index = this.spans.length; index < words.length; index += 1) {
      this.addWord(words[index], index);
    }
    this.words = [...words];
    if (this.spans.length > 0 && this.spans[this.current]?.tabIndex !== 0) {
      this.setCurrent(this.current);
    }
  }

  /**
   * Show words that are new, and scroll to them if the end of the page was visible.
   * @param {Word[]} words all words
   */
  followNewWords(words) {
    const isAtEnd = innerHeight + scrollY >= document.documentElement.scrollHeight - FOLLOW_DISTANCE;
    this.showNewWords(words);
    if (isAtEnd) {
      scrollTo({ top: document.documentElement.scrollHeight });
    }
  }

  /**
   * Add the element of a word.
   * @param {Word} word
   * @param {number} index
   */
  addWord(word, index) {
    const span = document.createElement("span");
    span.className = "word";
    span.textContent = word.text;
    span.setAttribute("role", "button");
    span.tabIndex = -1;
    span.dataset.index = String(index);
    this.shade(span, word);
    const paragraph = word.startsParagraph || index === 0 ? this.addParagraph(word.start) : this.getLastParagraph();
    if (paragraph.childNodes.length > 0) {
      paragraph.append(" ");
    }
    paragraph.append(span);
    this.spans.push(span);
  }

  /**
   * Shade a word: the less certain, the stronger.
   * @param {HTMLElement} span
   * @param {Word} word
   */
  shade(span, word) {
    span.style.setProperty("--doubt", (1 - (word.confidence ?? 1)).toFixed(3));
  }

  /**
   * Add a paragraph with the button of its time.
   * @param {number} start start in seconds
   */
  addParagraph(start) {
    const row = document.createElement("div");
    row.className = "paragraph";
    const time = document.createElement("button");
    time.type = "button";
    time.className = "time";
    time.textContent = formatTime(start);
    time.setAttribute("aria-label", `Play from ${formatTime(start)}`);
    time.dataset.start = String(start);
    const text = document.createElement("p");
    row.append(time, text);
    this.element.append(row);
    return text;
  }

  /** @returns {HTMLElement} the text of the last paragraph; a new one if there is none */
  getLastParagraph() {
    const paragraph = this.element.lastElementChild?.lastElementChild;
    return paragraph instanceof HTMLElement ? paragraph : this.addParagraph(0);
  }

  /**
   * Show words that can still change, after the other words.
   * @param {{text: string, is_continuation?: boolean}[]} words
   */
  setTentative(words) {
    if (this.tentative !== null) {
      const paragraph = this.tentative.parentElement;
      this.tentative.remove();
      this.tentative = null;
      if (paragraph?.childNodes.length === 0) {
        paragraph.parentElement?.remove();
      }
    }
    if (words.length > 0) {
      const text = words.map((word, index) => (word.is_continuation || index === 0 ? "" : " ") + word.text).join("");
      this.tentative = document.createElement("span");
      this.tentative.className = "tentative";
      this.tentative.textContent = this.spans.length > 0 && !words[0].is_continuation ? ` ${text}` : text;
      this.getLastParagraph().append(this.tentative);
    }
  }

  /**
   * Mark the word that is played.
   * @param {number} seconds playing position
   * @param {boolean} isPlaying
   */
  markTime(seconds, isPlaying) {
    const playing = isPlaying ? this.findWord(seconds) : -1;
    if (playing !== this.playing) {
      this.spans[this.playing]?.classList.remove("is-playing");
      this.spans[playing]?.classList.add("is-playing");
      this.playing = playing;
    }
  }

  /**
   * Return the index of the word at a time; -1 if there is none.
   * @param {number} seconds
   */
  findWord(seconds) {
    let [low, high] = [0, this.words.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.words[middle].start <= seconds) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    const word = this.words[low - 1];
    return word !== undefined && seconds <= Math.max(word.end, word.start + 0.1) ? low - 1 : -1;
  }

  /** Whether the text field is open. */
  get isEditing() {
    return !this.field.hidden;
  }

  /**
   * Open the text field.
   * @param {number} index index of the word to select; -1 for none
   */
  startEditing(index) {
    this.field.value = toText(this.words);
    this.field.hidden = false;
    this.element.hidden = true;
    this.fitField();
    const before = toText(this.words.slice(0, Math.max(0, index))).length;
    const separator = index <= 0 ? 0 : this.words[index].startsParagraph ? 2 : 1;
    const start = before + separator;
    this.field.focus();
    this.field.setSelectionRange(start, start + (this.words[index]?.text.length ?? 0));
  }

  /** Close the text field. */
  stopEditing() {
    this.field.hidden = true;
    this.element.hidden = false;
  }

  /** Make the text field as high as its text. */
  fitField() {
    this.field.style.height = "auto";
    this.field.style.height = `${this.field.scrollHeight}px`;
  }
}
