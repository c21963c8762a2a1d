// Puts the page together: header, composer, side panel.

import { Chat } from "./chat.js";
import { byId, element, fitHeight } from "./dom.js";
import { LivePanel } from "./panel.js";
import { Settings } from "./settings.js";
import { getJson } from "./stream.js";

const SUGGESTIONS = {
  "dsengine-demo": ["What is 347 + 285?", "What is 912 - 458?", "Who are you?", "How many seconds are in 7 minutes?"],
};
const ANY_SUGGESTIONS = ["Explain how a mixture of experts works.", "Write a haiku about caches.", "Sort the words pear, apple and fig in Python."];
const RETRY_MS = 3000;

const settings = new Settings();
const chat = new Chat(settings);
const panel = new LivePanel(() => settings.key);
const prompt = byId("prompt");

function setUpComposer() {
  const send = () => {
    if (chat.busy || chat.model === null || !prompt.value.trim()) return;
    chat.ask(prompt.value);
    prompt.value = "";
    fitHeight(prompt);
  };
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  prompt.addEventListener("input", () => fitHeight(prompt));
  prompt.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  byId("stop").addEventListener("click", () => chat.stop());
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    if (chat.busy) chat.stop();
    else showSide(false);
  });
  byId("new-chat").addEventListener("click", () => {
    chat.clear();
    prompt.focus();
  });
}

function showState() {
  const { busy } = chat;
  byId("send").hidden = busy;
  byId("stop").hidden = !busy;
  byId("welcome").hidden = chat.turns.length > 0;
  const last = chat.turns.at(-1)?.answer;
  byId("announce").textContent = busy ? "The answer is being written" : last ? (last.error ? "There is an error" : "The answer is complete") : "";
}

function setUpTabs() {
  const names = ["live", "settings"];
  const choose = (chosen) => {
    for (const name of names) {
      byId(name).hidden = name !== chosen;
      byId(`tab-${name}`).setAttribute("aria-selected", String(name === chosen));
      byId(`tab-${name}`).tabIndex = name === chosen ? 0 : -1;
    }
  };
  for (const [i, name] of names.entries()) {
    byId(`tab-${name}`).addEventListener("click", () => choose(name));
    byId(`tab-${name}`).addEventListener("keydown", (event) => {
      if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
      choose(names[1 - i]);
      byId(`tab-${names[1 - i]}`).focus();
    });
    byId(`open-${name}`).addEventListener("click", () => {
      choose(name);
      showSide(true);
      byId(`tab-${name}`).focus();
    });
  }
  byId("close-side").addEventListener("click", () => showSide(false));
  return choose;
}

/** On narrow screens the panel lies over the page while it is wanted. */
function showSide(open) {
  const wasOpen = document.body.classList.contains("side-open");
  document.body.classList.toggle("side-open", open);
  for (const name of ["live", "settings"]) byId(`open-${name}`).setAttribute("aria-expanded", String(open));
  if (wasOpen && !open) byId("open-settings").focus();
}

function setUpTheme() {
  const root = document.documentElement;
  const saved = localStorage.getItem("dsengine.theme");
  if (saved) root.dataset.theme = saved;
  byId("theme").addEventListener("click", () => {
    const isDark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = isDark ? "light" : "dark";
    localStorage.setItem("dsengine.theme", root.dataset.theme);
  });
}

function suggest(model) {
  const texts = SUGGESTIONS[model] ?? ANY_SUGGESTIONS;
  byId("suggestions").replaceChildren(
    ...texts.map((text) => element("button", { type: "button", class: "suggestion", onclick: () => chat.ask(text) }, text)),
  );
}

/** Asks which model is served, until there is an answer. */
async function connect() {
  try {
    const [card] = (await getJson("v1/models", settings.key)).data;
    chat.model = card.id;
    byId("model").textContent = card.id;
    byId("welcome-model").textContent = card.id;
    document.title = `${card.id} · dsengine`;
    setConnection("");
    suggest(card.id);
  } catch (error) {
    setConnection(error.status === 401 ? "API key needed" : "not connected");
    if (error.status === 401) askForKey();
    else setTimeout(connect, RETRY_MS);
  }
}

function setConnection(problem) {
  byId("state").textContent = problem;
  byId("state").classList.toggle("problem", problem !== "");
  byId("send").disabled = problem !== "";
}

function askForKey() {
  chooseTab("settings");
  settings.keyField.setAttribute("aria-invalid", String(settings.key !== ""));
  byId("key-hint").textContent = settings.key ? "This key is not accepted." : "This server asks for a key. It is kept for this tab only.";
  showSide(true);
  settings.keyField.focus();
}

setUpComposer();
const chooseTab = setUpTabs();
setUpTheme();
chat.onchange = showState;
chat.onerror = (error) => error.status === 401 && askForKey();
settings.onkey = () => {
  settings.keyField.removeAttribute("aria-invalid");
  byId("key-hint").textContent = "Kept for this tab only.";
  connect();
};
connect();
panel.start();
