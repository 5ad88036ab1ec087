// Plays a recording, and draws its waveform with the playing position.

import { formatTime } from "./words.js";

/** Number of peaks per second of a waveform. */
export const PEAKS_PER_S = 50;
/** Sampling rate in Hz to which recordings are decoded for the waveform. */
const WAVEFORM_RATE = 8000;
/** Longest recording in seconds whose waveform is computed: the browser decodes it in memory. */
const MAX_WAVEFORM_S = 30 * 60;
/** Seconds of a live recording that fill the width of the waveform; a longer recording is drawn as a whole. */
const MIN_LIVE_S = 8;
/** Seconds that are played before and after a word, because its times are rounded to frames. */
const WORD_MARGIN_S = 0.06;
/** Seconds of a step with the arrow keys. */
const STEP_S = 5;
/** Peak to which the bars are scaled at least, so that noise does not look loud. */
const QUIET_PEAK = 0.05;
/** Height of a word from 0 to 1 if words are drawn in place of a waveform. */
const WORD_LEVEL = 0.4;
/** Width of a bar and of the space after it in pixels. */
const BAR_WIDTH = 2;
const BAR_SPACE = 2;

/**
 * Return the largest absolute sample of each block.
 * @param {Float32Array | Int16Array} samples
 * @param {number} blockLength
 * @param {number} scale the largest possible sample
 */
export function computePeaks(samples, blockLength, scale) {
  const peaks = [];
  for (let start = 0; start < samples.length; start += blockLength) {
    let peak = 0;
    const stop = Math.min(start + blockLength, samples.length);
    for (let index = start; index < stop; index += 1) {
      peak = Math.max(peak, Math.abs(samples[index]));
    }
    peaks.push(peak / scale);
  }
  return peaks;
}

/**
 * Decode a recording and return its peaks.
 * @param {Blob} blob
 */
async function decodePeaks(blob) {
  const context = new OfflineAudioContext(1, 1, WAVEFORM_RATE);
  const buffer = await context.decodeAudioData(await blob.arrayBuffer());
  const peaks = computePeaks(buffer.getChannelData(0), WAVEFORM_RATE / PEAKS_PER_S, 1);
  return { peaks, duration: buffer.duration };
}

/**
 * The player: a play button, a waveform that is a slider, and the time.
 */
export class Player {
  /**
   * @param {object} elements
   * @param {HTMLAudioElement} elements.audio
   * @param {HTMLButtonElement} elements.button
   * @param {HTMLCanvasElement} elements.canvas
   * @param {HTMLElement} elements.time
   * @param {(seconds: number) => void} onTime called when the playing position changes
   */
  constructor({ audio, button, canvas, time }, onTime) {
    this.audio = audio;
    this.button = button;
    this.canvas = canvas;
    this.time = time;
    this.onTime = onTime;
    this.duration = 0;
    this.isLive = false;
    this.isPlayable = false;
    this.hasWaveform = false;
    /** @type {number[]} largest samples from 0 to 1, `PEAKS_PER_S` per second */
    this.peaks = [];
    /** largest peak, to which the bars are scaled */
    this.loudest = QUIET_PEAK;
    /** position in seconds at which the player stops */
    this.stopAt = Infinity;
    this.frame = 0;
    // increases with each recording, so that a late result of an earlier one is ignored
    this.version = 0;
    this.addListeners();
  }

  addListeners() {
    this.button.addEventListener("click", () => this.toggle());
    this.audio.addEventListener("play", () => this.update());
    this.audio.addEventListener("pause", () => this.update());
    this.audio.addEventListener("seeked", () => this.update());
    this.audio.addEventListener("timeupdate", () => this.update());
    this.canvas.addEventListener("keydown", (event) => this.handleKey(event));
    this.canvas.addEventListener("pointerdown", (event) => {
      this.canvas.setPointerCapture(event.pointerId);
      this.seekToPointer(event);
    });
    this.canvas.addEventListener("pointermove", (event) => {
      if (this.canvas.hasPointerCapture(event.pointerId)) {
        this.seekToPointer(event);
      }
    });
    new ResizeObserver(() => this.draw()).observe(this.canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  /** Forget the recording, for example before a new one. */
  clear() {
    this.version += 1;
    this.audio.pause();
    if (this.audio.src !== "") {
      URL.revokeObjectURL(this.audio.src);
      this.audio.removeAttribute("src");
    }
    this.duration = 0;
    this.isLive = false;
    this.isPlayable = false;
    this.hasWaveform = false;
    this.peaks = [];
    this.loudest = QUIET_PEAK;
    this.stopAt = Infinity;
    this.update();
  }

  /**
   * Load a recording.
   * @param {Blob} blob
   * @returns {Promise<boolean>} whether the browser can play it
   */
  async load(blob) {
    this.clear();
    const version = this.version;
    this.isPlayable = await new Promise((resolve) => {
      this.audio.addEventListener("loadedmetadata", () => resolve(true), { once: true });
      this.audio.addEventListener("error", () => resolve(false), { once: true });
      this.audio.src = URL.createObjectURL(blob);
    });
    if (version !== this.version) {
      return true;
    }
    if (Number.isFinite(this.audio.duration)) {
      this.duration = this.audio.duration;
    }
    this.update();
    if (this.duration <= MAX_WAVEFORM_S) {
      void this.loadWaveform(blob, version);
    }
    return this.isPlayable;
  }

  /**
   * Compute the waveform.
   * @param {Blob} blob
   * @param {number} version
   */
  async loadWaveform(blob, version) {
    try {
      const { peaks, duration } = await decodePeaks(blob);
      if (version === this.version) {
        this.peaks = [];
        this.loudest = QUIET_PEAK;
        this.hasWaveform = true;
        this.appendPeaks(peaks);
        this.setDuration(duration);
      }
    } catch (error) {
      if (!(error instanceof DOMException)) {
        throw error;
      }
    }
  }

  /**
   * Set the length of the recording.
   * @param {number} seconds
   */
  setDuration(seconds) {
    this.duration = seconds;
    this.update();
  }

  /**
   * Draw the words if there is no waveform, because the recording is long or the browser cannot decode it.
   * @param {{start: number, end: number}[]} words
   */
  setWords(words) {
    if (!this.hasWaveform) {
      this.peaks = new Array(Math.ceil(this.duration * PEAKS_PER_S)).fill(0);
      for (const { start, end } of words) {
        this.peaks.fill(WORD_LEVEL, Math.floor(start * PEAKS_PER_S), Math.ceil(end * PEAKS_PER_S));
      }
      this.loudest = 1;
      this.draw();
    }
  }

  /** @param {number[]} peaks */
  appendPeaks(peaks) {
    for (const peak of peaks) {
      this.peaks.push(peak);
      this.loudest = Math.max(this.loudest, peak);
    }
  }

  /** Start a live recording, whose peaks follow. */
  startLive() {
    this.clear();
    this.isLive = true;
    this.hasWaveform = true;
    this.update();
  }

  /**
   * Add peaks of a live recording.
   * @param {number[]} peaks
   */
  addPeaks(peaks) {
    this.appendPeaks(peaks);
    this.duration = this.peaks.length / PEAKS_PER_S;
    this.update();
  }

  toggle() {
    if (this.audio.paused) {
      this.stopAt = Infinity;
      void this.play();
    } else {
      this.audio.pause();
    }
  }

  async play() {
    if (this.isPlayable) {
      // `play` is rejected if another call of `pause` or `load` comes before it has started
      await this.audio.play().catch(() => {});
    }
  }

  /**
   * Play from a position on.
   * @param {number} seconds
   */
  playFrom(seconds) {
    this.stopAt = Infinity;
    this.audio.currentTime = seconds;
    void this.play();
  }

  /**
   * Play one word.
   * @param {{start: number, end: number}} word
   */
  playWord(word) {
    this.stopAt = word.end + WORD_MARGIN_S;
    this.audio.currentTime = Math.max(0, word.start - WORD_MARGIN_S);
    void this.play();
  }

  /** @param {number} seconds */
  seek(seconds) {
    if (this.isPlayable) {
      this.stopAt = Infinity;
      this.audio.currentTime = Math.max(0, Math.min(this.duration, seconds));
    }
  }

  /** @param {PointerEvent} event */
  seekToPointer(event) {
    const { left, width } = this.canvas.getBoundingClientRect();
    this.seek(((event.clientX - left) / width) * this.duration);
  }

  /** @param {KeyboardEvent} event */
  handleKey(event) {
    const position = this.audio.currentTime;
    /** @type {Record<string, number>} */
    const targets = {
      ArrowRight: position + STEP_S,
      ArrowUp: position + STEP_S,
      ArrowLeft: position - STEP_S,
      ArrowDown: position - STEP_S,
      Home: 0,
      End: this.duration,
    };
    if (event.key in targets) {
      event.preventDefault();
      this.seek(targets[event.key]);
    } else if (event.key === " " || event.key === "Enter") {
      event.preventDefault();
      this.toggle();
    }
  }

  /** Show the present state, and do so again in the next frame while the recording plays. */
  update() {
    const { audio } = this;
    if (audio.currentTime >= this.stopAt) {
      this.stopAt = Infinity;
      audio.pause();
    }
    const position = this.isLive ? this.duration : audio.currentTime;
    const text = `${formatTime(position)} / ${formatTime(this.duration)}`;
    this.time.textContent = this.isLive ? formatTime(position) : text;
    // a disabled button would lose the focus
    this.button.setAttribute("aria-disabled", String(!this.isPlayable));
    this.button.setAttribute("aria-label", audio.paused ? "Play" : "Pause");
    this.button.classList.toggle("is-playing", !audio.paused);
    this.canvas.setAttribute("aria-valuemax", String(Math.round(this.duration)));
    this.canvas.setAttribute("aria-valuenow", String(Math.round(position)));
    this.canvas.setAttribute("aria-valuetext", `${formatTime(position)} of ${formatTime(this.duration)}`);
    this.canvas.setAttribute("aria-disabled", String(!this.isPlayable));
    this.onTime(position);
    this.draw();
    cancelAnimationFrame(this.frame);
    if (!audio.paused) {
      this.frame = requestAnimationFrame(() => this.update());
    }
  }

  /**
   * Return the height of a bar from 0 to 1.
   * @param {number} start start of the bar in seconds
   * @param {number} end end of the bar in seconds
   */
  getHeight(start, end) {
    let peak = 0;
    const first = Math.floor(start * PEAKS_PER_S);
    const stop = Math.min(this.peaks.length, Math.max(Math.ceil(end * PEAKS_PER_S), first + 1));
    for (let index = first; index < stop; index += 1) {
      peak = Math.max(peak, this.peaks[index]);
    }
    return peak / this.loudest;
  }

  /** Draw the waveform. */
  draw() {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    const context = this.canvas.getContext("2d");
    if (context === null || width === 0) {
      return;
    }
    const ratio = devicePixelRatio;
    if (this.canvas.width !== Math.round(width * ratio) || this.canvas.height !== Math.round(height * ratio)) {
      this.canvas.width = Math.round(width * ratio);
      this.canvas.height = Math.round(height * ratio);
    }
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    const style = getComputedStyle(this.canvas);
    const played = style.getPropertyValue("--accent");
    const waiting = style.getPropertyValue("--wave");
    const shown = this.isLive ? Math.max(MIN_LIVE_S, this.duration) : this.duration;
    const position = this.isLive ? this.duration : this.audio.currentTime;
    const secondsPerPixel = shown / width;
    for (let x = 0; x < width; x += BAR_WIDTH + BAR_SPACE) {
      const start = x * secondsPerPixel;
      const level = this.getHeight(start, start + (BAR_WIDTH + BAR_SPACE) * secondsPerPixel);
      const barHeight = Math.max(BAR_WIDTH, level * (height - 4));
      context.fillStyle = start < position ? played : waiting;
      context.beginPath();
      context.roundRect(x, (height - barHeight) / 2, BAR_WIDTH, barHeight, BAR_WIDTH / 2);
      context.fill();
    }
    if (!this.isLive && shown > 0 && position > 0) {
      context.fillStyle = played;
      context.fillRect(Math.min(width - 1.5, position / secondsPerPixel), 0, 1.5, height);
    }
  }
}
