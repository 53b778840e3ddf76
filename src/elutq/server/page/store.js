/*
 * What the browser keeps: conversations and settings, in localStorage.
 *
 * A conversation is { id, title, mode, updated, messages }. Its mode is "chat", or "text" for a model that only
 * continues text; there the messages' contents, joined, are the text. A message is { role, content } with role "user"
 * or "assistant"; an answer also has
 *   finish   "stop" or "length" as the server says, "stopped" by the reader; absent in a piece of an answer
 *   tokens, seconds   what was written, and in which time after the first token
 *   used     tokens of the context in use after it, where the server told
 */

const CONVERSATION = "elutq.conversation.";
const SETTINGS = "elutq.settings";

/** All conversations, the last used first. */
export function loadConversations() {
  return Object.keys(localStorage)
    .filter((key) => key.startsWith(CONVERSATION))
    .map((key) => JSON.parse(localStorage.getItem(key)))
    .sort((a, b) => b.updated - a.updated);
}

export function newConversation(mode) {
  const id = crypto.getRandomValues(new Uint32Array(2)).join("");
  return { id, title: "", mode, updated: Date.now(), messages: [] };
}

/** Throws a QuotaExceededError when the browser's space is full. */
export function saveConversation(conversation) {
  localStorage.setItem(CONVERSATION + conversation.id, JSON.stringify(conversation));
}

export function deleteConversation({ id }) {
  localStorage.removeItem(CONVERSATION + id);
}

/** Whether a storage event's key tells of a conversation, changed in another tab. */
export const isConversationKey = (key) => key === null || key.startsWith(CONVERSATION);

export function exportConversations() {
  return JSON.stringify({ version: 1, conversations: loadConversations() }, null, 2);
}

/** Adds the conversations of an export; one that is here already is replaced. Gives their number. */
export function importConversations(json) {
  let conversations;
  try {
    conversations = JSON.parse(json).conversations.map(checkedConversation);
  } catch {
    throw new Error("This file is not an export of conversations.");
  }
  conversations.forEach(saveConversation);
  return conversations.length;
}

function checkedConversation({ id, title, mode, updated, messages }) {
  const isNumber = (value) => value === undefined || Number.isFinite(value);
  const sound = /^\d{1,20}$/.test(id) && typeof title === "string" && ["chat", "text"].includes(mode) &&
    Number.isFinite(updated) &&
    messages.every(({ role, content, tokens, seconds, used }) => ["user", "assistant"].includes(role) &&
      typeof content === "string" && [tokens, seconds, used].every(isNumber));
  if (!sound) throw new TypeError("not a conversation");
  return { id, title, mode, updated, messages };
}

/** The settings that differ from the server's defaults, named as in its interface, and `system`. */
export function loadSettings() {
  return JSON.parse(localStorage.getItem(SETTINGS)) ?? {};
}

export function saveSettings(settings) {
  localStorage.setItem(SETTINGS, JSON.stringify(settings));
}
