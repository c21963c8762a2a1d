// The part of Markdown that models write, as DOM nodes: code, headings, lists, tables, quotes, emphasis, links.
// Every scan is linear in the text. Nothing is ever parsed as HTML, and images are not loaded.

import { button, copyText, element } from "./dom.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^(#{1,6}) +(.*)$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)]) +(.*)$/;
const RULE = /^ {0,3}(-{3,}|\*{3,}|_{3,}) *$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const TABLE_RULE = /^[ :|-]+$/;
const MAX_DEPTH = 6;
const MAX_LINK_CHARS = 2048;

/** A place for Markdown that grows: what has not changed keeps its nodes (and the reader's selection in them). */
export class MarkdownView {
  constructor(node) {
    this.node = node;
    this.shown = [];
  }

  update(text) {
    const blocks = splitBlocks(text.split("\n"));
    let same = 0;
    while (same < blocks.length && same < this.shown.length && key(blocks[same]) === this.shown[same]) same++;
    while (this.node.children.length > same) this.node.lastChild.remove();
    for (const block of blocks.slice(same)) this.node.append(render(block, 0));
    this.shown = blocks.map(key);
  }
}

function key(block) {
  return `${block.kind} ${block.language ?? ""} ${block.closed ?? ""}\n${block.lines.join("\n")}`;
}

/** Top-level blocks: {kind, lines, …}. */
function splitBlocks(lines) {
  const blocks = [];
  for (let i = 0; i < lines.length; ) {
    const block = takeBlock(lines, i);
    if (block.kind !== "blank") blocks.push(block);
    i += block.length;
  }
  return blocks;
}

function takeBlock(lines, start) {
  const line = lines[start];
  if (!line.trim()) return { kind: "blank", lines: [], length: 1 };
  const fence = FENCE.exec(line);
  if (fence) return takeFence(lines, start, fence);
  if (HEADING.test(line) || RULE.test(line)) return { kind: RULE.test(line) ? "rule" : "heading", lines: [line], length: 1 };
  if (QUOTE.test(line)) return take(lines, start, "quote", (next) => QUOTE.test(next));
  if (ITEM.test(line)) return take(lines, start, "list", (next, i) => inList(lines, i));
  if (line.includes("|") && isTableRule(lines[start + 1] ?? "")) return take(lines, start, "table", (next) => next.includes("|"));
  return take(lines, start, "paragraph", (next) => next.trim() && !beginsBlock(next));
}

function take(lines, start, kind, belongs) {
  let end = start + 1;
  while (end < lines.length && belongs(lines[end], end)) end++;
  return { kind, lines: lines.slice(start, end), length: end - start };
}

function isTableRule(line) {
  return TABLE_RULE.test(line) && line.includes("|") && line.includes("-");
}

function takeFence(lines, start, [, fence, info]) {
  let end = start + 1;
  const closes = (line) => line.trim().startsWith(fence) && !line.trim().slice(fence.length).replaceAll(fence[0], "");
  while (end < lines.length && !closes(lines[end])) end++;
  const closed = end < lines.length;
  const language = info.trim().split(" ")[0];
  return { kind: "code", language, closed, lines: lines.slice(start + 1, end), length: end - start + closed };
}

function inList(lines, i) {
  const line = lines[i];
  if (ITEM.test(line) || /^ {2,}\S/.test(line)) return true;
  if (!line.trim()) return i + 1 < lines.length && (ITEM.test(lines[i + 1]) || /^ {2,}\S/.test(lines[i + 1]));
  return !beginsBlock(line) && Boolean(lines[i - 1].trim());
}

function beginsBlock(line) {
  return [FENCE, HEADING, RULE, QUOTE, ITEM].some((pattern) => pattern.test(line));
}

function render(block, depth) {
  switch (block.kind) {
    case "code":
      return code(block);
    case "heading": {
      const [, marks, text] = HEADING.exec(block.lines[0]);
      return element(`h${Math.min(marks.length + 1, 6)}`, {}, ...inline(text, 0));
    }
    case "rule":
      return element("hr");
    case "quote":
      return nested("blockquote", block.lines.map((line) => QUOTE.exec(line)[1]), depth);
    case "list":
      return list(block.lines, depth);
    case "table":
      return table(block.lines);
    default:
      return element("p", {}, ...withBreaks(block.lines));
  }
}

function nested(tag, lines, depth) {
  if (depth >= MAX_DEPTH) return element(tag, {}, lines.join("\n"));
  return element(tag, {}, ...splitBlocks(lines).map((block) => render(block, depth + 1)));
}

function withBreaks(lines) {
  return lines.flatMap((line, i) => (i ? [element("br"), ...inline(line, 0)] : inline(line, 0)));
}

function code(block) {
  const text = block.lines.join("\n");
  const copy = button("Copy", () => copyText(text, copy));
  const bar = element("div.code-bar", {}, element("span", {}, block.language || "text"), copy);
  return element("div.code-block", {}, bar, element("pre", { tabindex: "0" }, element("code", {}, text)));
}

function list(lines, depth) {
  const first = ITEM.exec(lines[0]);
  const indent = first[1].length;
  const items = [];
  for (const line of lines) {
    const match = ITEM.exec(line);
    if (match && (match[1].length <= indent + 1 || !items.length)) items.push([match[3]]);
    else items.at(-1).push(line.slice(Math.min(indent + 2, line.length - line.trimStart().length)));
  }
  const ordered = /\d/.test(first[2]);
  const start = ordered ? { start: String(parseInt(first[2], 10)) } : {};
  return element(ordered ? "ol" : "ul", start, ...items.map((item) => listItem(item, depth)));
}

function listItem(lines, depth) {
  const node = nested("li", lines, depth);
  // A lone paragraph is the item itself: no space around it.
  if (node.firstElementChild?.tagName === "P") node.firstElementChild.replaceWith(...node.firstElementChild.childNodes);
  return node;
}

function table(lines) {
  const cells = (line) => line.trim().replace(/^\|/, "").replace(/\|$/, "").split("|").map((cell) => cell.trim());
  const row = (tag, line) => element("tr", {}, ...cells(line).map((cell) => element(tag, {}, ...inline(cell, 0))));
  const head = element("thead", {}, row("th", lines[0]));
  const body = element("tbody", {}, ...lines.slice(2).map((line) => row("td", line)));
  return element("div.table", { tabindex: "0" }, element("table", {}, head, body));
}

const MARKS = [
  ["`", "code"],
  ["**", "strong"],
  ["__", "strong"],
  ["~~", "s"],
  ["*", "em"],
  ["_", "em"],
];

/** Nodes of one line. A mark that is not closed is text, and is looked for only once. */
function inline(text, depth) {
  const nodes = [];
  const hopeless = new Set();
  let plain = 0;
  for (let i = 0; i < text.length; ) {
    const found = depth < MAX_DEPTH ? link(text, i) ?? marked(text, i, hopeless) : null;
    if (!found) {
      i++;
      continue;
    }
    if (i > plain) nodes.push(text.slice(plain, i));
    nodes.push(element(found.tag, found.attributes ?? {}, ...(found.tag === "code" ? [found.inner] : inline(found.inner, depth + 1))));
    i = plain = found.end;
  }
  if (plain < text.length) nodes.push(text.slice(plain));
  return nodes;
}

function marked(text, i, hopeless) {
  for (const [mark, tag] of MARKS) {
    if (hopeless.has(mark) || !text.startsWith(mark, i)) continue;
    const start = i + mark.length;
    if (tag !== "code" && !/\S/.test(text[start] ?? " ")) continue;
    if (mark[0] === "_" && /\w/.test(text[i - 1] ?? " ")) continue; // inside of a name
    const end = text.indexOf(mark, start + 1);
    if (end < 0) hopeless.add(mark);
    else if (tag === "code" || /\S/.test(text[end - 1])) return { tag, inner: text.slice(start, end), end: end + mark.length };
  }
  return null;
}

function link(text, i) {
  if (text[i] !== "[") return null;
  const near = text.slice(i, i + MAX_LINK_CHARS);
  const middle = near.indexOf("](");
  const end = middle < 0 ? -1 : near.indexOf(")", middle);
  if (end < 0) return null;
  const target = near.slice(middle + 2, end).trim();
  if (!/^https?:\/\/[^\s<>"]+$/i.test(target)) return null;
  const attributes = { href: target, title: target, target: "_blank", rel: "noopener noreferrer nofollow" };
  return { tag: "a", attributes, inner: near.slice(1, middle), end: i + end + 1 };
}
