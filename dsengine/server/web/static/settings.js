// The settings form: what it says of a request, kept for the tab.

import { byId } from "./dom.js";

const SETTINGS = "dsengine.settings";
const KEY = "dsengine.key";
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed", "presence_penalty", "frequency_penalty", "repetition_penalty"];

const EXAMPLE_TOOLS = [
  {
    type: "function",
    function: {
      name: "get_weather",
      description: "Get the current weather of a city",
      parameters: { type: "object", properties: { city: { type: "string", description: "Name of the city" } }, required: ["city"] },
    },
  },
];

export class Settings {
  constructor() {
    this.form = byId("settings-form");
    this.keyField = byId("api-key");
    this.onkey = () => {};
    this.restore();
    this.form.addEventListener("input", () => this.changed());
    this.form.addEventListener("submit", (event) => event.preventDefault());
    this.form.addEventListener("reset", () => this.afterReset(this.key));
    this.keyField.addEventListener("change", () => this.onkey());
    byId("example-tools").addEventListener("click", () => {
      this.form.elements.tools.value = JSON.stringify(EXAMPLE_TOOLS, null, 2);
      this.changed();
    });
  }

  get key() {
    return this.keyField.value.trim();
  }

  afterReset(key) {
    setTimeout(() => {
      this.keyField.value = key;
      this.changed();
    });
  }

  /** Fields of a request beside its messages. Throws if the form does not make sense. */
  requestFields() {
    const fields = {};
    for (const name of NUMBERS) {
      const input = this.form.elements[name];
      if (!input.checkValidity()) throw new Error(`${input.labels[0].textContent.trim()}: ${input.validationMessage}`);
      if (input.value !== "") fields[name] = Number(input.value);
    }
    const thinking = this.form.elements.thinking.value;
    if (thinking) fields.chat_template_kwargs = { thinking: thinking === "on" };
    const tools = this.tools();
    if (tools.length) {
      fields.tools = tools;
      const choice = this.form.elements.tool_choice.value;
      if (choice) fields.tool_choice = choice;
    }
    return fields;
  }

  get system() {
    return this.form.elements.system.value.trim();
  }

  tools() {
    const text = this.form.elements.tools.value.trim();
    if (!text) return [];
    let tools;
    try {
      tools = JSON.parse(text);
    } catch (error) {
      throw new Error(`The tools are not JSON: ${error.message}`);
    }
    if (!Array.isArray(tools)) tools = [tools];
    // A bare function is wrapped, as users paste both.
    return tools.map((tool) => (tool?.function ? tool : { type: "function", function: tool }));
  }

  changed() {
    const complaint = byId("tools-error");
    try {
      this.tools();
      complaint.hidden = true;
    } catch (error) {
      complaint.textContent = error.message;
      complaint.hidden = false;
    }
    const fields = new FormData(this.form);
    sessionStorage.setItem(SETTINGS, JSON.stringify(Object.fromEntries(fields)));
    sessionStorage.setItem(KEY, this.key);
  }

  restore() {
    this.keyField.value = sessionStorage.getItem(KEY) ?? "";
    const fields = JSON.parse(sessionStorage.getItem(SETTINGS) ?? "{}");
    for (const [name, value] of Object.entries(fields)) if (this.form.elements[name]) this.form.elements[name].value = value;
  }
}
