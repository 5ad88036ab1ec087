// Finds elements of the page, announces texts to screen readers, and receives files that are dropped on the page.

/** Number of texts that the log for screen readers keeps. */
const MAX_LOG = 20;

/**
 * Return an element of the page.
 * @template {HTMLElement} T
 * @param {string} id
 * @param {new (...args: any[]) => T} type
 * @returns {T}
 */
export function getElement(id, type) {
  const element = document.getElementById(id);
  if (!(element instanceof type)) {
    throw new TypeError(`the page must have an element ${id} of the type ${type.name}`);
  }
  return element;
}

/**
 * Announce a text to screen readers.
 * @param {string} text
 */
export function announce(text) {
  const log = getElement("log", HTMLElement);
  if (text !== "") {
    const line = document.createElement("p");
    line.textContent = text;
    log.append(line);
    while (log.childElementCount > MAX_LOG) {
      log.firstElementChild?.remove();
    }
  }
}

/**
 * Receive the files that are dropped anywhere on the page.
 * @param {(files: FileList | undefined) => void} onFiles
 */
export function watchDrops(onFiles) {
  /** @param {boolean} isDragging */
  const show = (isDragging) => document.body.classList.toggle("is-dragging", isDragging);
  addEventListener("dragover", (event) => {
    event.preventDefault();
    show(true);
  });
  addEventListener("dragleave", (event) => show(event.relatedTarget !== null));
  addEventListener("drop", (event) => {
    event.preventDefault();
    show(false);
    onFiles(event.dataTransfer?.files);
  });
}
