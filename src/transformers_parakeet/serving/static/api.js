// Requests to the server: the name of the model, and the transcription of a file.

/**
 * An answer of the server that is an error.
 */
export class ServerError extends Error {
  /**
   * @param {string} message
   * @param {number} status HTTP status; 0 if there is no answer
   */
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/**
 * Return the headers of a request.
 * @param {string} key API key; empty for none
 * @returns {Record<string, string>}
 */
function getHeaders(key) {
  return key === "" ? {} : { Authorization: `Bearer ${key}` };
}

/**
 * Read the error of a response.
 * @param {number} status
 * @param {string} body
 */
function readError(status, body) {
  try {
    return new ServerError(JSON.parse(body).error.message, status);
  } catch {
    return new ServerError(`The server answered with the status ${status}.`, status);
  }
}

/**
 * Return the name of the model of the server.
 * @param {string} key API key; empty for none
 * @returns {Promise<string>}
 */
export async function getModel(key) {
  /** @type {Response} */
  let response;
  try {
    response = await fetch("v1/models", { headers: getHeaders(key) });
  } catch {
    throw new ServerError("The server does not answer. Check that it runs, and reload the page.", 0);
  }
  if (!response.ok) {
    throw readError(response.status, await response.text());
  }
  return (await response.json()).data[0].id;
}

/**
 * Return a function that reads server-sent events from a text that grows.
 * @returns {(text: string) => any[]} returns the events that are new in a text
 */
export function createEventReader() {
  let position = 0;
  return (text) => {
    const events = [];
    for (let end = text.indexOf("\n\n", position); end >= 0; end = text.indexOf("\n\n", position)) {
      events.push(JSON.parse(text.slice(position, end).replace(/^data: /, "")));
      position = end + 2;
    }
    return events;
  };
}

/**
 * Transcribe a file. `XMLHttpRequest` reports the progress of the upload, which `fetch` does not.
 * @param {File} file
 * @param {string} model name of the model
 * @param {string} key API key; empty for none
 * @param {object} callbacks
 * @param {(fraction: number) => void} callbacks.onUpload called with the part of the file that is sent
 * @param {(words: any[], seconds: number) => void} callbacks.onWords called with new words, and with the number of
 *   seconds that are recognised
 * @param {AbortSignal} signal ends the request
 * @returns {Promise<{words: any[], duration: number}>}
 */
export function transcribeFile(file, model, key, { onUpload, onWords }, signal) {
  const form = new FormData();
  form.append("model", model);
  form.append("response_format", "verbose_json");
  form.append("timestamp_granularities[]", "word");
  form.append("stream", "true");
  form.append("file", file);
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    const readEvents = createEventReader();
    const processEvents = () => {
      if (request.status !== 200) {
        return;
      }
      for (const event of readEvents(request.responseText)) {
        if (event.type === "transcript.text.done") {
          resolve(event);
        } else if (event.type === "error") {
          reject(new ServerError(event.error.message, 200));
        } else if (event.words !== undefined) {
          onWords(event.words, event.seconds);
        }
      }
    };
    request.upload.addEventListener("progress", (event) => onUpload(event.loaded / event.total));
    request.addEventListener("progress", processEvents);
    request.addEventListener("load", () => {
      processEvents();
      // without effect if the last event has settled the promise
      reject(
        request.status === 200
          ? new ServerError("The answer of the server ended too early. Try again.", 200)
          : readError(request.status, request.responseText),
      );
    });
    request.addEventListener("error", () => {
      const message = "The connection ended. The file may be larger than the server accepts, or the server stopped.";
      reject(new ServerError(message, 0));
    });
    request.addEventListener("abort", () => reject(new DOMException("stopped", "AbortError")));
    signal.addEventListener("abort", () => request.abort());
    request.open("POST", "v1/audio/transcriptions");
    for (const [name, value] of Object.entries(getHeaders(key))) {
      request.setRequestHeader(name, value);
    }
    request.send(form);
  });
}
