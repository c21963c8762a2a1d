// Messages on the page: a question that can be edited, an answer that grows.

import { button, copyText, element, fitHeight } from "./dom.js";
import { MarkdownView } from "./markdown.js";

/** A question. `actions.edit(text)` replaces it, and everything behind it. */
export function questionView(text, actions) {
  const body = element("p.question-text", {}, text);
  const edit = button("Edit", () => node.replaceChildren(editor()));
  const node = element("li.message.question", { "aria-label": "You" }, body, element("div.actions", {}, edit));

  function editor() {
    const area = element("textarea", { "aria-label": "Edit the message", rows: "2" });
    area.value = text;
    area.addEventListener("input", () => fitHeight(area));
    const cancel = () => node.replaceChildren(body, element("div.actions", {}, edit));
    const save = () => area.value.trim() && actions.edit(area.value);
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") cancel();
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        save();
      }
    });
    setTimeout(() => {
      area.focus();
      fitHeight(area);
    });
    return element("div.editor", {}, area, element("div.actions", {}, button("Cancel", cancel), button("Send again", save, "primary small")));
  }
  return node;
}

/** An answer; `update()` shows what it has become. */
export class AnswerView {
  /** @param actions regenerate(), sendResults(list of texts) */
  constructor(answer, actions) {
    this.answer = answer;
    this.actions = actions;
    this.summary = element("summary");
    this.thoughts = element("div.thoughts");
    this.thinking = element("details.thinking", { hidden: true }, this.summary, this.thoughts);
    this.body = element("div.markdown");
    this.markdown = new MarkdownView(this.body);
    this.calls = element("div.calls");
    this.error = element("p.error", { role: "alert", hidden: true });
    this.facts = element("span.facts");
    this.buttons = element("span.actions");
    this.footer = element("footer", {}, this.facts, this.buttons);
    this.node = element("li.message.answer", { "aria-label": "Answer" }, this.thinking, this.body, this.calls, this.error, this.footer);
    this.update();
  }

  update() {
    const { answer } = this;
    this.node.classList.toggle("busy", !answer.ended);
    this.showThoughts();
    this.markdown.update(answer.content);
    this.showCalls();
    this.error.hidden = answer.error === null;
    this.error.textContent = answer.error ?? "";
    this.facts.textContent = answer.facts().join(" · ");
    if (answer.ended && !this.buttons.childElementCount) this.addButtons();
  }

  showThoughts() {
    const { answer } = this;
    if (!answer.reasoning) return;
    this.thinking.hidden = false;
    this.thinking.classList.toggle("busy", answer.isThinking);
    this.summary.textContent = answer.isThinking ? "Thinking…" : `Thought for ${answer.thinkingSeconds.toFixed(1)} s`;
    // Only what is new is added, so that a reader's selection stays.
    const shown = this.thoughts.textContent.length;
    if (answer.reasoning.length > shown) this.thoughts.append(answer.reasoning.slice(shown));
  }

  showCalls() {
    const calls = this.answer.calls;
    while (this.calls.childElementCount < calls.length) this.calls.append(callView(this.calls.childElementCount));
    calls.forEach((call, i) => {
      const node = this.calls.children[i];
      node.querySelector(".call-name").textContent = call.name;
      node.querySelector(".call-arguments").textContent = this.answer.ended ? pretty(call.arguments) : call.arguments;
      node.querySelector(".call-result").hidden = !this.answer.ended;
    });
    if (calls.length && this.answer.ended && !this.sendButton) {
      this.sendButton = button("Send the results", () => this.sendResults(), "primary small");
      this.calls.after(this.sendButton);
    }
  }

  sendResults() {
    const areas = [...this.calls.querySelectorAll("textarea")];
    const empty = areas.find((area) => !area.value.trim());
    if (empty) {
      empty.focus();
      return;
    }
    this.actions.sendResults(areas.map((area) => area.value));
  }

  /** The results can no longer be changed. */
  close() {
    this.sendButton?.remove();
    for (const area of this.calls.querySelectorAll("textarea")) area.readOnly = true;
  }

  addButtons() {
    const copy = button("Copy", () => copyText(this.answer.content, copy));
    this.buttons.append(copy, button("Regenerate", () => this.actions.regenerate()));
  }
}

function callView(index) {
  const id = `result-${crypto.getRandomValues(new Uint32Array(1))[0]}-${index}`;
  const name = element("p", {}, "Calls ", element("b.call-name"));
  const area = element("textarea", { id, rows: "2", spellcheck: "false", placeholder: "What the function returns" });
  area.addEventListener("input", () => fitHeight(area));
  const result = element("div.call-result", { hidden: true }, element("label", { for: id }, "Result"), area);
  return element("section.call", {}, name, element("pre.call-arguments", { tabindex: "0" }), result);
}

function pretty(json) {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json;
  }
}
