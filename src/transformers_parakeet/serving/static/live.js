// A live stream: sends samples over a WebSocket, and receives words.

/** Number of bytes that are converted to text at a time. */
const BYTES_PER_CALL = 8192;
/** Seconds of audio that may wait in the browser before the page reports it. */
const LATE_S = 3;
/** Milliseconds for which the page waits for the last words. */
const LAST_WORDS_MS = 60_000;

/**
 * Convert bytes to base64 text.
 * @param {Uint8Array} bytes
 */
function toBase64(bytes) {
  let text = "";
  for (let start = 0; start < bytes.length; start += BYTES_PER_CALL) {
    text += String.fromCharCode(...bytes.subarray(start, start + BYTES_PER_CALL));
  }
  return btoa(text);
}

/**
 * A live transcription.
 */
export class LiveSession {
  /**
   * @param {object} callbacks
   * @param {(words: any[], tentative: any[]) => void} callbacks.onWords called with new words, and with words that can
   *   still change
   * @param {(message: string) => void} callbacks.onError called if the stream fails
   */
  constructor({ onWords, onError }) {
    this.onWords = onWords;
    this.onError = onError;
    /** @type {WebSocket | null} */
    this.socket = null;
    this.isFinished = false;
    this.rate = 0;
    /** id of the last item of the recording; empty until the server has sent it */
    this.lastItem = "";
    /** @type {() => void} */
    this.onEnd = () => {};
  }

  /**
   * Connect to the server.
   * @param {number} rate sampling rate in Hz
   * @param {string} key API key; empty for none
   */
  async connect(rate, key) {
    this.rate = rate;
    const url = new URL("v1/realtime", location.href);
    url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
    // a browser cannot set headers of a WebSocket; the server reads the key from a subprotocol
    const protocols = key === "" ? ["realtime"] : ["realtime", `openai-insecure-api-key.${key}`];
    const socket = new WebSocket(url, protocols);
    this.socket = socket;
    socket.addEventListener("message", (message) => this.processEvent(JSON.parse(message.data)));
    await new Promise((resolve, reject) => {
      socket.addEventListener("open", () => resolve(undefined));
      socket.addEventListener("close", () => reject(new Error("The server refused the live stream.")));
    });
    socket.addEventListener("close", () => this.fail("The connection to the server ended."));
    const format = { type: "audio/pcm", rate };
    this.send({ type: "session.update", session: { type: "transcription", audio: { input: { format } } } });
  }

  /** @param {object} event */
  send(event) {
    this.socket?.send(JSON.stringify(event));
  }

  /**
   * Send samples.
   * @param {Int16Array<ArrayBuffer>} samples
   */
  append(samples) {
    if (this.socket?.readyState === WebSocket.OPEN) {
      this.send({ type: "input_audio_buffer.append", audio: toBase64(new Uint8Array(samples.buffer)) });
    }
  }

  /** Whether the server receives the audio later than it is recorded. */
  get isLate() {
    // base64 needs 4 bytes for 3
    return (this.socket?.bufferedAmount ?? 0) > LATE_S * this.rate * 2 * (4 / 3);
  }

  /**
   * End the recording, and wait for the last words.
   */
  async finish() {
    if (this.socket?.readyState === WebSocket.OPEN) {
      await new Promise((resolve) => {
        this.onEnd = () => resolve(undefined);
        setTimeout(() => {
          this.fail("The server did not send the last words in time.");
          resolve(undefined);
        }, LAST_WORDS_MS);
        this.send({ type: "input_audio_buffer.commit" });
      });
    }
    this.close();
  }

  /** Close the connection. */
  close() {
    this.isFinished = true;
    this.socket?.close();
  }

  /**
   * Report an error once, and end the stream.
   * @param {string} message
   */
  fail(message) {
    if (!this.isFinished) {
      this.close();
      this.onError(message);
      this.onEnd();
    }
  }

  /** @param {any} event event of the server */
  processEvent(event) {
    if (event.type === "conversation.item.input_audio_transcription.delta") {
      this.onWords(event.words, event.tentative);
    } else if (event.type === "conversation.item.input_audio_transcription.completed") {
      this.onWords([], []);
      // an utterance of a recording also ends with this event, but without the one below
      if (event.item_id === this.lastItem) {
        this.onEnd();
      }
    } else if (event.type === "input_audio_buffer.committed") {
      this.lastItem = event.item_id;
    } else if (event.type === "error") {
      this.fail(event.error.message);
    }
  }
}
