// How messages look: a chat's bubbles and answers, and the one running text of a model that only continues.

import { copyText, counted, el, icon, iconButton, isSubmit } from "./dom.js";
import { MarkdownStream } from "./markdown.js";

const NOTES = {
  length: "Cut off at the token limit.",
  stopped: "Stopped.",
  interrupted: "Interrupted.",
};

/** One message of a chat. `actions` has edit(message, text) and regenerate(message). */
export class MessageView {
  #message;
  #actions;
  #body;
  #thought = null;
  #writing = false;
  #markdown;
  #footer = el("footer");

  constructor(message, actions) {
    this.#message = message;
    this.#actions = actions;
    const user = message.role === "user";
    this.#body = el("div", { class: user ? "bubble" : "prose" });
    this.root = el("article", { class: `message ${message.role}`, "aria-label": user ? "You" : "Answer" },
      this.#body, this.#footer);
    if (user) this.#body.textContent = message.content;
    else {
      this.#markdown = new MarkdownStream(this.#body);
      this.grow();
    }
  }

  /** Shows what has been added to the answer. */
  grow() {
    const { thought, answer } = splitThought(this.#message.content);
    if (thought && !this.#thought) {
      this.#thought = el("div");
      this.root.prepend(el("details", { class: "thought" }, el("summary", {}, "Reasoning"), this.#thought));
    }
    if (thought) this.#thought.textContent = thought;
    this.#markdown.update(answer);
    if (this.#writing) this.#footer.replaceChildren(progressOf(this.#message));
  }

  /** Brings the line under the message up to date. */
  refresh({ busy, last }) {
    const message = this.#message;
    const copy = iconButton("copy", "Copy", (event) => copied(event.currentTarget, message.content));
    if (message.role === "user") {
      this.#footer.replaceChildren(copy, iconButton("edit", "Edit", () => this.#edit(), { disabled: busy }));
      return;
    }
    this.#writing = busy && last;
    this.root.classList.toggle("writing", this.#writing);
    const again = iconButton("again", "Regenerate", () => this.#actions.regenerate(message));
    if (this.#writing) this.#footer.replaceChildren(progressOf(message));
    else this.#footer.replaceChildren(copy, ...(last ? [again] : []), ...factsOf(message));
  }

  #edit() {
    const editor = editorOf(this.#message.content, "Send", (text) => {
      this.#body.hidden = this.#footer.hidden = false;
      editor.remove();
      if (text?.trim()) this.#actions.edit(this.#message, text.trim());
      else this.#footer.querySelector("[aria-label=Edit]").focus();
    });
    this.#body.hidden = this.#footer.hidden = true;
    this.root.append(editor);
    editor.querySelector("textarea").focus();
  }
}

/** A text written in turns by the reader and the model. `actions` has rewrite(text) and regenerate(message). */
export class TextView {
  #conversation;
  #actions;
  #text = el("div", { class: "text" });
  #footer = el("footer");

  constructor(conversation, actions) {
    this.#conversation = conversation;
    this.#actions = actions;
    this.root = el("article", { class: "message assistant document", "aria-label": "Text" }, this.#text, this.#footer);
  }

  grow() {
    const last = this.#conversation.messages.at(-1);
    this.#text.lastChild.textContent = last.content;
    this.#footer.replaceChildren(progressOf(last));
  }

  refresh({ busy }) {
    const { messages } = this.#conversation;
    const last = messages.at(-1);
    this.#text.replaceChildren(...messages.map(({ role, content }) => el("span", { class: role }, content)));
    this.root.classList.toggle("writing", busy);
    if (busy) this.#footer.replaceChildren(progressOf(last));
    else {
      const answered = last.role === "assistant";
      this.#footer.replaceChildren(
        iconButton("copy", "Copy", (event) => copied(event.currentTarget, this.#text.textContent)),
        iconButton("edit", "Edit", () => this.#edit()),
        ...(answered ? [iconButton("again", "Regenerate", () => this.#actions.regenerate(last))] : []),
        // A text goes on in pieces, so that a piece ends at its limit is nothing to tell.
        ...(answered ? factsOf({ ...last, finish: last.finish === "length" ? "stop" : last.finish }) : []));
    }
  }

  #edit() {
    const editor = editorOf(this.#text.textContent, "Continue", (text) => {
      this.#text.hidden = this.#footer.hidden = false;
      editor.remove();
      if (text?.trim()) this.#actions.rewrite(text);
    });
    this.#text.hidden = this.#footer.hidden = true;
    this.root.append(editor);
    editor.querySelector("textarea").focus();
  }
}

/** A text area in place of a message; `done` gets the new text, or null when the reader cancels. */
function editorOf(content, verb, done) {
  const area = el("textarea", { "aria-label": "Edit", rows: Math.min(16, content.split("\n").length + 1) });
  area.value = content;
  const form = el("form", { class: "editor", onsubmit: (event) => { event.preventDefault(); done(area.value); } }, area,
    el("div", {},
      el("button", { type: "button", class: "quiet", onclick: () => done(null) }, "Cancel"),
      el("button", { class: "primary" }, verb)));
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") done(null);
    if (isSubmit(event)) form.requestSubmit();
  });
  return form;
}

/** A reasoning model's answer, apart from the thought before it. */
export function splitThought(content) {
  const match = /^\s*<think>([^]*?)(?:<\/think>([^]*)|$)/.exec(content);
  return match ? { thought: match[1].trim(), answer: match[2] ?? "" } : { thought: "", answer: content };
}

/** Tokens per second, or null where there are too few to say. */
const rateOf = ({ tokens, seconds }) => (tokens > 1 && seconds > 0 ? (tokens - 1) / seconds : null);

function speedText(message) {
  const rate = rateOf(message);
  return rate === null ? null : `${rate.toFixed(rate < 100 ? 1 : 0)} tokens/s`;
}

function progressOf(message) {
  return el("span", { class: "facts" }, message.tokens ? speedText(message) ?? "" : "Reading the prompt…");
}

function factsOf(message) {
  const finish = message.finish ?? "interrupted";
  const facts = [message.tokens ? counted(message.tokens, "token") : null, speedText(message)].filter(Boolean);
  return [
    NOTES[finish] ? el("span", { class: "note" }, NOTES[finish]) : null,
    facts.length ? el("span", { class: "facts" }, facts.join(" · ")) : null,
  ].filter(Boolean);
}

/** Copies and lets the button say so for a moment. */
export async function copied(button, text) {
  await copyText(text);
  const before = [...button.childNodes];
  button.replaceChildren(icon("check"), ...(button.textContent.trim() ? ["Copied"] : []));
  setTimeout(() => button.replaceChildren(...before), 1500);
}
