// Records the microphone as 16-bit samples, and writes them as a WAV file.

/** Sampling rate in Hz that the browser is asked for: the rate of OpenAI's format pcm16. */
const PREFERRED_RATE = 24000;
/** Highest sampling rate in Hz that the server accepts. */
const MAX_RATE = 48000;

/**
 * Open an audio context and connect a stream to it. Firefox connects a microphone only to a context with the rate of
 * the microphone.
 * @param {MediaStream} stream
 * @returns {{context: AudioContext, source: MediaStreamAudioSourceNode}}
 */
function connectStream(stream) {
  const context = new AudioContext({ sampleRate: PREFERRED_RATE });
  try {
    return { context, source: context.createMediaStreamSource(stream) };
  } catch (error) {
    void context.close();
    if (!(error instanceof DOMException) || error.name !== "NotSupportedError") {
      throw error;
    }
    const ownRate = stream.getAudioTracks()[0]?.getSettings().sampleRate;
    const ownContext = new AudioContext(ownRate === undefined ? {} : { sampleRate: Math.min(ownRate, MAX_RATE) });
    return { context: ownContext, source: ownContext.createMediaStreamSource(stream) };
  }
}

/**
 * Explain why the microphone cannot be used.
 * @param {unknown} error
 */
export function explainMicrophoneError(error) {
  if (navigator.mediaDevices === undefined) {
    return "The browser gives the microphone only to pages from https:// addresses or from this computer.";
  }
  const name = error instanceof DOMException ? error.name : "";
  if (name === "NotAllowedError") {
    return "The browser does not allow the microphone for this page. Allow it in the settings of the page.";
  }
  if (name === "NotFoundError") {
    return "There is no microphone. Connect one, and try again.";
  }
  return `The microphone cannot be opened (${error instanceof Error ? error.message : error}).`;
}

/**
 * A recording of the microphone.
 */
export class Microphone {
  /**
   * @param {MediaStream} stream
   * @param {AudioContext} context
   * @param {AudioWorkletNode} node
   */
  constructor(stream, context, node) {
    this.stream = stream;
    this.context = context;
    this.node = node;
    this.rate = context.sampleRate;
    /** @type {Int16Array<ArrayBuffer>[]} */
    this.blocks = [];
    this.numSamples = 0;
    /** @type {(block: Int16Array<ArrayBuffer>) => void} */
    this.onBlock = () => {};
    /** @type {() => void} */
    this.onStopped = () => {};
    node.port.onmessage = ({ data }) => {
      if (data === null) {
        this.onStopped();
        return;
      }
      this.blocks.push(data);
      this.numSamples += data.length;
      this.onBlock(data);
    };
  }

  /**
   * Ask for the microphone and open it. Recording starts at once.
   */
  static async open() {
    const stream = await navigator.mediaDevices.getUserMedia({
      audio: { channelCount: 1, echoCancellation: false, noiseSuppression: false, autoGainControl: true },
    });
    try {
      const { context, source } = connectStream(stream);
      await context.audioWorklet.addModule("recorder_worklet.js");
      const node = new AudioWorkletNode(context, "recorder", { numberOfOutputs: 0 });
      source.connect(node);
      await context.resume();
      return new Microphone(stream, context, node);
    } catch (error) {
      stream.getTracks().forEach((track) => track.stop());
      throw error;
    }
  }

  /** Length of the recording in seconds. */
  get duration() {
    return this.numSamples / this.rate;
  }

  /**
   * Stop recording, after the last block.
   */
  async stop() {
    await new Promise((resolve) => {
      this.onStopped = () => resolve(undefined);
      this.node.port.postMessage(null);
    });
    this.stream.getTracks().forEach((track) => track.stop());
    await this.context.close();
  }

  /**
   * Return the recording as a WAV file.
   */
  toFile() {
    const header = new DataView(new ArrayBuffer(44));
    const numBytes = 2 * this.numSamples;
    /** @type {(offset: number, text: string) => void} */
    const writeText = (offset, text) => {
      [...text].forEach((character, index) => header.setUint8(offset + index, character.charCodeAt(0)));
    };
    writeText(0, "RIFF");
    header.setUint32(4, 36 + numBytes, true);
    writeText(8, "WAVEfmt ");
    header.setUint32(16, 16, true);
    // PCM, one channel
    header.setUint16(20, 1, true);
    header.setUint16(22, 1, true);
    header.setUint32(24, this.rate, true);
    header.setUint32(28, 2 * this.rate, true);
    header.setUint16(32, 2, true);
    header.setUint16(34, 16, true);
    writeText(36, "data");
    header.setUint32(40, numBytes, true);
    return new File([header, ...this.blocks], "recording.wav", { type: "audio/wav" });
  }
}
