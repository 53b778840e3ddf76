// The page's one state, the conversation on show and the answers being written, and what the reader can do to it.

import { fetchModel, ServerError, streamAnswer } from "./api.js";
import { counted, el, hasKeyboard, isSubmit } from "./dom.js";
import { copied, MessageView, splitThought, TextView } from "./messages.js";
import { clearNotice, showMessage, showNotice } from "./notices.js";
import { openSettings } from "./settings.js";
import { drawConversations, showDrawer } from "./sidebar.js";
import * as store from "./store.js";

const get = (selector) => document.querySelector(selector);
const thread = get("#thread");
const messages = get("#messages");
const input = get("#input");

let model = { name: "", contextLength: null, chat: true };
let conversations = store.loadConversations();
let current = conversations[0] ?? store.newConversation("chat");
const answering = new Map(); // Conversation id -> the AbortController of its answer.
const views = new WeakMap(); // Message (or conversation of text) -> its view.

// ---- Showing.

function viewOf(key, make) {
  if (!views.has(key)) views.set(key, make());
  return views.get(key);
}

function viewsOf(conversation) {
  if (conversation.mode === "text") return [viewOf(conversation, () => new TextView(conversation, actions))];
  return conversation.messages.map((message) => viewOf(message, () => new MessageView(message, actions)));
}

function draw() {
  const busy = answering.has(current.id);
  const empty = current.messages.length === 0;
  const shown = empty ? [] : viewsOf(current);
  shown.forEach((view, index) => view.refresh({ busy, last: index === shown.length - 1 }));
  messages.replaceChildren(...(empty ? [greeting()] : shown.map((view) => view.root)));
  messages.classList.toggle("empty", empty);
  thread.setAttribute("aria-busy", busy);
  get("#send").hidden = busy;
  get("#send").disabled = !model.name;
  get("#stop").hidden = !busy;
  const toText = empty ? "Begin a text" : "Add to the text, or just continue";
  input.placeholder = current.mode === "chat" ? "Message" : toText;
  get("#send").title = current.mode === "chat" ? "Send (Enter)" : "Continue the text (Enter)";
  get("#hint").textContent = current.mode === "chat" ? "Answers can be wrong. Check what matters." :
    "This model has no chat template: it continues your text.";
  drawContext();
}

function drawConversationList() {
  drawConversations(conversations, current, actions);
}

function drawContext() {
  const used = current.messages.findLast((message) => message.used)?.used ?? 0;
  const context = get("#context");
  context.hidden = !model.contextLength || !used;
  if (context.hidden) return;
  context.querySelector("span").textContent =
    `${used.toLocaleString("en")} of ${model.contextLength.toLocaleString("en")} tokens`;
  const meter = context.querySelector("meter");
  meter.max = model.contextLength;
  meter.high = model.contextLength * 0.9;
  meter.value = used;
}

const STARTERS = {
  chat: ["Explain how rainbows form", "Write a short poem about autumn", "Plan a week of simple dinners"],
  text: ["Once upon a time, there was a little", "One day, a girl named Lily found a", "The dog ran to the park and"],
};

function greeting() {
  const heading = current.mode === "chat" ? "What is on your mind?" : "Begin a text, and the model goes on.";
  return el("div", { class: "greeting" },
    el("h2", {}, heading),
    el("div", { class: "starters" }, ...STARTERS[current.mode].map((text) =>
      el("button", { type: "button", class: "quiet", onclick: () => send(text) }, text))));
}

const atEnd = () => thread.scrollHeight - thread.scrollTop - thread.clientHeight < 48;

function scrollToEnd() {
  thread.scrollTop = thread.scrollHeight;
}

function focusInput() {
  if (hasKeyboard) input.focus();
}

function announce(text) {
  get("#status").textContent = text;
}

// ---- Keeping.

function save(conversation) {
  try {
    store.saveConversation(conversation);
  } catch {
    showMessage("The browser's space for this page is full. Export and delete some conversations.");
  }
}

function open(conversation) {
  current = conversation;
  clearNotice();
  draw();
  drawConversationList();
  scrollToEnd();
}

function startNew() {
  const unused = conversations.find(({ messages }) => messages.length === 0);
  if (unused) conversations.splice(conversations.indexOf(unused), 1);
  open(store.newConversation(model.chat ? "chat" : "text"));
  showDrawer(false);
  focusInput();
}

// ---- Asking.

/** Sends what the reader wrote; in a text, nothing means "go on". */
function send(text) {
  if (answering.has(current.id) || !model.name) return;
  const last = current.messages.at(-1);
  if (current.mode === "text") {
    // Words that follow the model's words need a space between.
    if (last && /\S$/.test(last.content) && /^[\p{L}\p{N}]/u.test(text)) text = ` ${text}`;
    if (text) current.messages.push({ role: "user", content: text });
  } else if (text.trim()) current.messages.push({ role: "user", content: text.trim() });
  else return;
  if (current.messages.length === 0) return;
  input.value = "";
  input.dispatchEvent(new Event("input"));
  current.title ||= titleOf(text);
  answer(current);
}

const titleOf = (text) => text.trim().split("\n")[0].slice(0, 80);

const PIECE = 128; // Tokens added to a text at a time, unless the settings say otherwise.

/** The request for the next message, or the next piece of text. */
function requestFor(conversation) {
  const { system, ...sampling } = store.loadSettings();
  const common = { model: model.name, ...sampling };
  if (conversation.mode === "text") {
    return { max_tokens: PIECE, ...common, prompt: conversation.messages.map(({ content }) => content).join("") };
  }
  const asked = conversation.messages.map(({ role, content }) => ({ role, content: splitThought(content).answer }));
  return { ...common, messages: system ? [{ role: "system", content: system }, ...asked] : asked };
}

async function answer(conversation) {
  clearNotice();
  if (conversation.mode === "chat" && !model.chat) {
    draw();
    const error = new ServerError("new", `${model.name} has no chat template: it can only continue a text.`);
    showNotice(error, { startNew });
    return;
  }
  const body = requestFor(conversation);
  const message = { role: "assistant", content: "", tokens: 0, seconds: 0 };
  const controller = new AbortController();
  conversation.messages.push(message);
  conversation.updated = Date.now();
  conversations = [conversation, ...conversations.filter(({ id }) => id !== conversation.id)];
  answering.set(conversation.id, controller);
  save(conversation);
  draw();
  drawConversationList();
  scrollToEnd();
  announce("Answering");

  const grow = throttledByFrame(() => {
    if (current.id !== conversation.id || !answering.has(conversation.id)) return;
    const follow = atEnd();
    viewsOf(conversation).at(-1).grow();
    if (follow) scrollToEnd();
  });
  let failure = null;
  let first = 0;
  let saved = Date.now();
  try {
    for await (const { text, finish, usage } of streamAnswer(body, controller.signal)) {
      if (text) {
        first ||= performance.now();
        message.content += text;
        message.tokens++;
        message.seconds = (performance.now() - first) / 1000;
        grow();
      }
      if (finish) message.finish = finish;
      if (usage) {
        message.tokens = usage.completion_tokens;
        message.used = usage.total_tokens;
      }
      if (Date.now() - saved > 1000) {
        save(conversation);
        saved = Date.now();
      }
    }
  } catch (error) {
    if (controller.signal.aborted) message.finish = "stopped";
    else failure = error instanceof ServerError ? error : new ServerError("other", `${error}`);
  }
  answering.delete(conversation.id);
  if (!message.content) conversation.messages.splice(conversation.messages.indexOf(message), 1);
  if (conversations.includes(conversation)) save(conversation);
  announce(failure ? "" : `Answer finished, ${counted(message.tokens, "token")}`);
  if (current.id !== conversation.id) return;
  const follow = atEnd();
  if (message.content) viewsOf(conversation).at(-1).grow();
  draw();
  if (failure) showNotice(failure, { retry: () => retry(conversation), startNew });
  else if (!message.content && message.finish !== "stopped") showMessage("The model had nothing to add.");
  if (follow) scrollToEnd();
}

/** Asks again after a failure; a piece of an answer is dropped, a piece of a text is kept. */
function retry(conversation) {
  const last = conversation.messages.at(-1);
  if (conversation.mode === "chat" && last.role === "assistant") conversation.messages.pop();
  answer(conversation);
}

/** Runs `work` at most once a frame; in a hidden tab, where no frame comes, once the tab is back. */
function throttledByFrame(work) {
  let waiting = false;
  return () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      work();
    });
  };
}

/** What the views and the list can ask for. */
const actions = {
  edit(message, text) {
    current.messages.splice(current.messages.indexOf(message));
    send(text);
  },
  rewrite(text) {
    current.messages = [{ role: "user", content: text }];
    answer(current);
  },
  regenerate(message) {
    current.messages.splice(current.messages.indexOf(message));
    answer(current);
    focusInput();
  },
  open(conversation) {
    showDrawer(false);
    open(conversation);
  },
  rename(conversation, title) {
    conversation.title = title;
    if (conversation.messages.length) save(conversation);
    drawConversationList();
  },
  remove(conversation) {
    answering.get(conversation.id)?.abort();
    conversations = conversations.filter((other) => other !== conversation);
    store.deleteConversation(conversation);
    if (conversation === current) startNew();
    drawConversationList();
  },
};

// ---- Wiring.

get("#composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send(input.value);
});
input.addEventListener("keydown", (event) => {
  if (isSubmit(event)) get("#composer").requestSubmit();
});
if (!CSS.supports("field-sizing", "content")) {
  input.addEventListener("input", () => {
    input.style.height = "auto";
    input.style.height = `${input.scrollHeight}px`;
  });
}
get("#stop").addEventListener("click", () => {
  answering.get(current.id)?.abort();
  focusInput();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !get("#settings-dialog").open) answering.get(current.id)?.abort();
});
get("#new").addEventListener("click", startNew);
get("#settings-button").addEventListener("click", openSettings);
get("#theme-button").addEventListener("click", () => {
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  const root = document.documentElement;
  const theme = (root.dataset.theme ?? system) === "dark" ? "light" : "dark";
  if (theme === system) {
    delete root.dataset.theme;
    localStorage.removeItem("elutq.theme");
  } else {
    root.dataset.theme = theme;
    localStorage.setItem("elutq.theme", theme);
  }
});
get("#export").addEventListener("click", () => {
  const href = URL.createObjectURL(new Blob([store.exportConversations()], { type: "application/json" }));
  el("a", { href, download: "elutq-conversations.json" }).click();
  URL.revokeObjectURL(href);
});
get("#import").addEventListener("click", () => get("#import-file").click());
get("#import-file").addEventListener("change", async ({ target }) => {
  try {
    const count = store.importConversations(await target.files[0].text());
    conversations = store.loadConversations();
    open(conversations[0]);
    showMessage(`Imported ${counted(count, "conversation")}.`);
  } catch (error) {
    showMessage(error.message);
  }
  target.value = "";
});
messages.addEventListener("click", (event) => {
  const button = event.target.closest("[data-copy]");
  if (button) copied(button, button.closest("figure").querySelector("code").textContent);
});
thread.addEventListener("scroll", () => {
  get("#to-end").hidden = atEnd();
});
get("#to-end").addEventListener("click", scrollToEnd);
addEventListener("storage", ({ key }) => {
  if (!store.isConversationKey(key) || answering.size > 0) return;
  conversations = store.loadConversations();
  current = conversations.find(({ id }) => id === current.id) ?? current;
  draw();
  drawConversationList();
});
addEventListener("pagehide", () => {
  for (const conversation of conversations) if (answering.has(conversation.id)) save(conversation);
});

async function connect() {
  clearNotice();
  try {
    model = await fetchModel();
  } catch (error) {
    showNotice(error, { retry: connect, startNew });
    return;
  }
  get("#model").textContent = model.name;
  document.title = `${model.name} · elutq`;
  if (current.messages.length === 0) current.mode = model.chat ? "chat" : "text";
  draw();
}

draw();
drawConversationList();
scrollToEnd();
connect();
