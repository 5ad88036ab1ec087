// Runs in the audio thread: collects samples of the microphone into blocks of 16-bit samples.

/** Length of a block in seconds. */
const BLOCK_S = 0.1;

class Recorder extends AudioWorkletProcessor {
  constructor() {
    super();
    this.block = new Int16Array(Math.round(BLOCK_S * sampleRate));
    this.length = 0;
    this.isStopped = false;
    this.port.onmessage = () => {
      this.isStopped = true;
      this.send();
      this.port.postMessage(null);
    };
  }

  send() {
    const block = this.block.slice(0, this.length);
    this.length = 0;
    this.port.postMessage(block, [block.buffer]);
  }

  /**
   * @param {Float32Array[][]} inputs
   * @returns {boolean} whether the processor is still needed
   */
  process(inputs) {
    // the input has no channel while the microphone is silent or closed
    const channels = inputs[0];
    for (let index = 0; index < (channels[0]?.length ?? 0); index += 1) {
      const sample = channels.reduce((sum, channel) => sum + channel[index], 0) / channels.length;
      this.block[this.length] = Math.max(-32768, Math.min(32767, Math.round(32768 * sample)));
      this.length += 1;
      if (this.length === this.block.length) {
        this.send();
      }
    }
    return !this.isStopped;
  }
}

registerProcessor("recorder", Recorder);
