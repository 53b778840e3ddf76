/*
 * Markdown to DOM nodes, for text that nobody vouches for.
 *
 * Nodes are created by name and filled with text; there is no HTML string anywhere, so HTML in the source shows as
 * the characters it is. Links lead to http, https and mailto only. An image becomes a link: the page loads nothing.
 * Work is linear in the length of the text and nesting is capped, so no text can stall the page.
 *
 * The dialect is what models write: CommonMark's fences, ATX headings, rules, quotes, lists and inline marks, GitHub's
 * tables, strikethrough and bare links. A line break in a paragraph stays one. Indented code and HTML are plain text.
 */

import { el, icon } from "./dom.js";

const MAX_BLOCK_DEPTH = 12;
const MAX_OPEN_MARKS = 16;

const FENCE = /^ {0,3}(`{3,}(?=[^`]*$)|~{3,})\s*(\S*)/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*))?$/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(?:([ \t]+)(.*))?$/;
const TABLE_RULE = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;

/** The whole of `text` as a fragment. */
export function renderMarkdown(text) {
  const fragment = new DocumentFragment();
  appendBlocks(fragment, text.split("\n"), 0);
  return fragment;
}

/**
 * Renders a text that grows. A block is final once the next one has begun, so an update costs the length of the last
 * block, not that of the whole text.
 */
export class MarkdownStream {
  #parent;
  #settled = 0; // Characters whose blocks are final.
  #tail = []; // Nodes after them.

  constructor(parent) {
    this.#parent = parent;
  }

  /** Shows `text`, which must begin with the text of the last update. */
  update(text) {
    const lines = text.slice(this.#settled).split("\n");
    const blocks = [...readBlocks(lines, 0)];
    const nodes = graft(this.#parent, this.#tail, blocks.map((block) => block.node));

    // A block's first two lines decide its kind. The last line is still being written.
    const last = Math.max(blocks.findLastIndex((block) => block.start + 2 < lines.length), 0);
    for (let i = 0; i < (blocks[last]?.start ?? 0); i++) this.#settled += lines[i].length + 1;
    this.#tail = nodes.slice(last);
  }
}

/**
 * Turns the last children of `parent`, `olds`, into `news` and gives what is there then. What is equal stays as it is:
 * a selection, a scrolled code block and the browser's layout live on.
 */
function graft(parent, olds, news) {
  for (const old of olds.slice(news.length)) old.remove();
  return news.map((node, index) => {
    const old = olds[index];
    if (!old) return parent.appendChild(node);
    if (old.isEqualNode(node)) return old;
    if (old.nodeType === Node.TEXT_NODE && node.nodeType === Node.TEXT_NODE) old.data = node.data;
    else if (old.cloneNode().isEqualNode(node.cloneNode())) graft(old, [...old.childNodes], [...node.childNodes]);
    else {
      old.replaceWith(node);
      return node;
    }
    return old;
  });
}

// ---- Blocks. A reader takes the lines and a position, and gives { end, node } or null.

function appendBlocks(parent, lines, depth) {
  for (const block of readBlocks(lines, depth)) parent.append(block.node);
}

function* readBlocks(lines, depth) {
  let at = 0;
  while (at < lines.length) {
    if (isBlank(lines[at])) {
      at++;
      continue;
    }
    const block =
      readFence(lines, at) ??
      readHeading(lines, at) ??
      readRule(lines, at) ??
      readQuote(lines, at, depth) ??
      readList(lines, at, depth) ??
      readTable(lines, at) ??
      readParagraph(lines, at);
    yield { start: at, node: block.node };
    at = block.end;
  }
}

const isBlank = (line) => line.trim() === "";

/** Whether the line at `at` ends a paragraph before it. */
function startsBlock(lines, at) {
  const line = lines[at];
  if (FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line)) return true;
  const item = ITEM.exec(line);
  if (item && item[4] && (!/\d/.test(item[2]) || parseInt(item[2]) === 1)) return true;
  return isTable(lines, at);
}

function readFence(lines, at) {
  const open = FENCE.exec(lines[at]);
  if (!open) return null;
  const [, fence, language] = open;
  const indent = indentOf(lines[at]);
  const close = new RegExp(`^ {0,3}\\${fence[0]}{${fence.length},}[ \\t]*$`);
  const code = [];
  let end = at + 1;
  while (end < lines.length && !close.test(lines[end])) code.push(dedent(lines[end++], indent));
  return { end: end + 1, node: codeBlock(code.join("\n"), language) };
}

function codeBlock(code, language) {
  return el("figure", { class: "code" },
    el("figcaption", {},
      el("span", {}, language || "text"),
      el("button", { type: "button", class: "quiet", "data-copy": "code" }, icon("copy"), el("span", {}, "Copy"))),
    el("pre", { tabindex: 0, "aria-label": "Code" }, el("code", {}, code)));
}

function readHeading(lines, at) {
  const match = HEADING.exec(lines[at]);
  if (!match) return null;
  // The page's own heading is h1, so a message starts at h2.
  const node = el(`h${Math.min(match[1].length + 1, 6)}`);
  appendInline(node, (match[2] ?? "").trim().replace(/(^|\s)#+$/, ""));
  return { end: at + 1, node };
}

function readRule(lines, at) {
  return RULE.test(lines[at]) ? { end: at + 1, node: el("hr") } : null;
}

function readQuote(lines, at, depth) {
  if (depth >= MAX_BLOCK_DEPTH || !QUOTE.test(lines[at])) return null;
  const inner = [];
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) inner.push(lines[end++].replace(QUOTE, ""));
  const node = el("blockquote");
  appendBlocks(node, inner, depth + 1);
  return { end, node };
}

/** The list item that begins on a line: { ordered, number, indent, width, text }, or null. */
function itemOf(line) {
  const match = line === undefined || RULE.test(line) ? null : ITEM.exec(line);
  if (!match) return null;
  const [, indent, mark, space = " ", text = ""] = match;
  return {
    ordered: /\d/.test(mark),
    number: parseInt(mark),
    indent: indent.length,
    width: indent.length + mark.length + (space.length > 4 ? 1 : space.length),
    text,
  };
}

function readList(lines, at, depth) {
  const first = itemOf(lines[at]);
  if (depth >= MAX_BLOCK_DEPTH || !first) return null;
  const numbered = first.ordered && first.number !== 1;
  const node = el(first.ordered ? "ol" : "ul", { start: numbered ? first.number : null });
  let loose = false;
  let end = at;
  for (let item = first; item?.ordered === first.ordered; item = itemOf(lines[end])) {
    const inner = [item.text];
    let fenced = FENCE.test(item.text); // Blank lines inside code do not space the list.
    let next = ++end;
    while (next < lines.length) {
      const line = lines[next];
      if (isBlank(line)) {
        next++;
        continue;
      }
      // Models indent what belongs to an item by two columns or more, whatever the marker's width.
      const belongs = indentOf(line) >= item.indent + 2;
      const continues = next === end && !isBlank(lines[next - 1]) && !startsBlock(lines, next) && !itemOf(line);
      if (!belongs && !continues) break;
      loose ||= next > end && !fenced;
      for (; end < next; end++) inner.push("");
      inner.push(dedent(line, item.width));
      if (FENCE.test(inner.at(-1))) fenced = !fenced;
      next = ++end;
    }
    if (next > end && itemOf(lines[next])?.ordered === first.ordered) {
      loose = true;
      end = next;
    }
    node.append(listItem(inner, depth));
  }
  if (!loose) node.className = "tight";
  return { end, node };
}

function listItem(lines, depth) {
  const task = /^\[([ xX])\][ \t]+/.exec(lines[0]);
  const node = el("li", { class: task ? "task" : null });
  if (task) {
    lines[0] = `${task[1] === " " ? "☐" : "☑"} ${lines[0].slice(task[0].length)}`;
  }
  appendBlocks(node, lines, depth + 1);
  return node;
}

function isTable(lines, at) {
  const rule = lines[at + 1];
  return lines[at].includes("|") && rule !== undefined && rule.includes("-") && TABLE_RULE.test(rule) &&
    cellsOf(lines[at]).length === cellsOf(rule).length;
}

function readTable(lines, at) {
  if (!isTable(lines, at)) return null;
  const align = cellsOf(lines[at + 1]).map((cell) =>
    cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : null);
  const row = (line, tag) => {
    const cells = cellsOf(line);
    return el("tr", {}, ...align.map((side, column) => {
      const cell = el(tag, { class: side });
      appendInline(cell, cells[column] ?? "");
      return cell;
    }));
  };
  const body = el("tbody");
  let end = at + 2;
  for (; end < lines.length && lines[end].includes("|") && !startsBlock(lines, end); end++) {
    body.append(row(lines[end], "td"));
  }
  const table = el("table", {}, el("thead", {}, row(lines[at], "th")), body);
  return { end, node: el("div", { class: "table", tabindex: 0, role: "region", "aria-label": "Table" }, table) };
}

function cellsOf(line) {
  let row = line.trim();
  if (row.startsWith("|")) row = row.slice(1);
  if (row.endsWith("|") && !row.endsWith("\\|")) row = row.slice(0, -1);
  return row.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function readParagraph(lines, at) {
  let end = at + 1;
  while (end < lines.length && !isBlank(lines[end]) && !startsBlock(lines, end)) end++;
  const node = el("p");
  appendInline(node, lines.slice(at, end).map((line) => line.trim()).join("\n"));
  return { end, node };
}

/** Columns of white space that a line begins with; a tab counts four. */
function indentOf(line) {
  let columns = 0;
  for (const char of line) {
    if (char === " ") columns++;
    else if (char === "\t") columns += 4;
    else break;
  }
  return columns;
}

/** The line without its first `columns` columns of white space. */
function dedent(line, columns) {
  let at = 0;
  while (columns > 0 && (line[at] === " " || line[at] === "\t")) columns -= line[at++] === "\t" ? 4 : 1;
  return line.slice(at);
}

// ---- Inline marks.

const TOKEN = new RegExp(
  [
    /\\[!-/:-@[-`{-~]/, // an escaped sign
    /(?<!`)(?<ticks>`+)(?!`)(?<code>[^]*?[^`])\k<ticks>(?!`)/,
    /<(?<address>(?:https?:\/\/|mailto:)[^\s<>]+)>/,
    /(?<bare>https?:\/\/[^\s<>"`*|[\]]+)/,
    /(?<marks>\*+|_+|~~)/,
    /!?\[/,
    /\]/,
    /\n/,
  ].map((part) => part.source).join("|"), "g");
const DESTINATION = /\([ \t]*<?([^\s<>()]*(?:\([^\s<>()]*\)[^\s<>()]*)*)>?(?:[ \t]+"[^"\n]*")?[ \t]*\)/y;
const ELEMENTS = { "*": ["em", "strong"], _: ["em", "strong"], "~": [null, "del"] };

/** Appends `text` to `parent`, with its emphasis, code, links and line breaks. */
function appendInline(parent, text) {
  const nodes = [];
  const open = []; // Marks that may yet be closed: { mark, size, at }, `at` their place in `nodes`.

  const literal = (string) => nodes.push(document.createTextNode(string));
  const openMark = (mark, size, source) => {
    if (open.length === MAX_OPEN_MARKS) open.shift();
    open.push({ mark, size, at: nodes.length });
    literal(source);
  };
  /** Wraps what follows the open mark at `index` in `element`. Marks opened since stay text. */
  const closeMark = (index, element) => {
    const inner = nodes.splice(open[index].at);
    for (const node of inner.slice(1)) element.append(node);
    open.length = index;
    nodes.push(element);
  };

  const emphasis = (run, start) => {
    const mark = run[0];
    const before = text[start - 1] ?? " ";
    const after = text[start + run.length] ?? " ";
    const inWord = mark === "_" && /[\p{L}\p{N}]/u.test(before) && /[\p{L}\p{N}]/u.test(after);
    let left = run.length;
    while (left > 0 && left <= 3 && !inWord && !/\s/.test(before)) {
      const index = open.findLastIndex((other) => other.mark === mark && other.size <= left);
      if (index < 0) break;
      const { size } = open[index];
      closeMark(index, el(ELEMENTS[mark][size - 1]));
      left -= size;
    }
    if (left > 3 || inWord || /\s/.test(after)) literal(mark.repeat(left));
    else if (left === 3) {
      openMark(mark, 2, mark.repeat(2));
      openMark(mark, 1, mark);
    } else if (left > 0) openMark(mark, left, mark.repeat(left));
  };

  let at = 0;
  TOKEN.lastIndex = 0;
  for (let token; (token = TOKEN.exec(text)); at = TOKEN.lastIndex) {
    if (token.index > at) literal(text.slice(at, token.index));
    const [source] = token;
    const { code, address, bare, marks } = token.groups;
    if (source[0] === "\\") literal(source[1]);
    else if (code !== undefined) nodes.push(el("code", {}, codeText(code)));
    else if (marks) emphasis(marks, token.index);
    else if (source === "\n") nodes.push(el("br"));
    else if (source.endsWith("[")) openMark("[", 1, source);
    else if (source === "]") TOKEN.lastIndex = closeLink(token.index + 1);
    else {
      const url = address ?? trimmedUrl(bare);
      const link = open.some(({ mark }) => mark === "[") ? null : linkTo(url);
      if (link) {
        link.append(url);
        nodes.push(link);
        if (bare) TOKEN.lastIndex = token.index + url.length;
      } else literal(source);
    }
  }
  literal(text.slice(at));
  for (const node of nodes) parent.append(node);
  parent.normalize();

  /** Ends a link whose text ends before `after`; gives the place to go on from. */
  function closeLink(after) {
    const index = open.findLastIndex(({ mark }) => mark === "[");
    DESTINATION.lastIndex = after;
    const destination = index < 0 ? null : DESTINATION.exec(text);
    const link = destination && linkTo(destination[1]);
    if (!link) {
      if (index >= 0) open.splice(index, 1);
      literal("]");
      return after;
    }
    closeMark(index, link);
    if (!link.hasChildNodes()) link.append(destination[1]);
    // A link holds no link.
    for (let i = open.length - 1; i >= 0; i--) if (open[i].mark === "[") open.splice(i, 1);
    return DESTINATION.lastIndex;
  }
}

/** A code span's text: line breaks are spaces, and one space inside each end is padding. */
function codeText(code) {
  const text = code.replaceAll("\n", " ");
  return text.length > 2 && text.startsWith(" ") && text.endsWith(" ") ? text.slice(1, -1) : text;
}

/** A bare link without the punctuation of the sentence around it. */
function trimmedUrl(url) {
  let unmatched = 0;
  for (const char of url) unmatched += char === ")" ? 1 : char === "(" ? -1 : 0;
  let end = url.length;
  while (end > 0 && (".,;:!?'_~".includes(url[end - 1]) || (url[end - 1] === ")" && unmatched > 0))) {
    if (url[--end] === ")") unmatched--;
  }
  return url.slice(0, end);
}

/** An empty link to `destination`, or null unless that is an absolute address that is safe to offer. */
function linkTo(destination) {
  if (!URL.canParse(destination)) return null;
  const { protocol, href } = new URL(destination);
  if (!["http:", "https:", "mailto:"].includes(protocol)) return null;
  return el("a", { href, title: href, target: "_blank", rel: "noopener noreferrer" });
}
