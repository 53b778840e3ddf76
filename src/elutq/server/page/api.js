// The server's OpenAI-compatible interface, as far as the page uses it.

/** What went wrong, in words for the reader. `kind` says what can be done; "new" is to begin a new conversation. */
export class ServerError extends Error {
  /**
   * @param {"offline" | "key" | "busy" | "new" | "broken" | "other"} kind
   * @param {string} message
   * @param {number} retryAfter seconds, where the server said when to try again
   */
  constructor(kind, message, retryAfter = 0) {
    super(message);
    this.kind = kind;
    this.retryAfter = retryAfter;
  }
}

const KEY = "elutq.key";

/** Keeps the API key until the tab closes. */
export function rememberKey(key) {
  sessionStorage.setItem(KEY, key);
}

async function request(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("offline", "The server does not answer. Is elutq serve still running?");
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

async function errorOf(response) {
  const { error } = await response.json().catch(() => ({}));
  const message = error?.message ?? `The server answered ${response.status} ${response.statusText}.`;
  switch (response.status) {
    case 401:
      return new ServerError("key", sessionStorage.getItem(KEY) ? "The server refused this API key." :
        "This server asks for an API key.");
    case 429:
    case 503:
      return new ServerError("busy", message, Number(response.headers.get("Retry-After")) || 5);
    default:
      return new ServerError(error?.code === "context_length_exceeded" ? "new" : "other", message);
  }
}

/** The model that the server runs: its name, context length in tokens (or null), and whether it can chat. */
export async function fetchModel() {
  const { data } = await (await request("v1/models")).json();
  const { id, elutq } = data[0];
  return { name: id, contextLength: elutq?.context_length ?? null, chat: elutq?.chat ?? true };
}

/**
 * Streams an answer. `body` is a chat request if it has messages, else a completion request.
 * Yields { text, finish, usage }, each null where the event says nothing of it. Ends early if `signal` aborts.
 */
export async function* streamAnswer(body, signal) {
  const response = await request(body.messages ? "v1/chat/completions" : "v1/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const data of serverSentEvents(response.body, signal)) {
    if (data === "[DONE]") return;
    const { choices, usage, error } = JSON.parse(data);
    if (error) throw new ServerError("broken", error.message);
    const choice = choices?.[0];
    yield {
      text: choice?.delta?.content ?? choice?.text ?? null,
      finish: choice?.finish_reason ?? null,
      usage: usage ?? null,
    };
  }
  throw new ServerError("broken", "The connection broke before the answer was complete.");
}

/** The data of each event of a text/event-stream. */
async function* serverSentEvents(stream, signal) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    while (true) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (buffer + value).split("\n");
      buffer = lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  } catch (error) {
    if (signal.aborted) throw error;
    throw new ServerError("broken", "The connection broke before the answer was complete.");
  } finally {
    reader.cancel().catch(() => {});
  }
}
