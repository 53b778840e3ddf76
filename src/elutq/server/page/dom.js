// Small helpers to build nodes. Strings only ever become text nodes.

/**
 * An element with attributes, listeners (`onclick`) and children (nodes or strings).
 * An attribute that is null or false is left out; true makes it empty.
 */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child != null));
  return node;
}

/** One of the icons defined at the top of index.html. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

/** A button that shows only an icon; `label` names it for screen readers and on hover. */
export function iconButton(name, label, onclick, attributes = {}) {
  const basics = { type: "button", class: "icon-button", "aria-label": label, title: label, onclick };
  return el("button", { ...basics, ...attributes }, icon(name));
}

/** "1 token", "2 tokens". */
export const counted = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

/** Whether there is a keyboard to write with, as far as can be told: not on a touch screen alone. */
export const hasKeyboard = matchMedia("(hover: hover)").matches;

/** Whether a key sends the text: Enter, without Shift and not while an input method composes. */
export function isSubmit(event) {
  const submits = hasKeyboard && event.key === "Enter" && !event.shiftKey && !event.isComposing;
  if (submits) event.preventDefault();
  return submits;
}

/** Puts `text` on the clipboard, also where the page has no HTTPS and so no clipboard interface. */
export async function copyText(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = el("textarea", { class: "visually-hidden" });
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}
