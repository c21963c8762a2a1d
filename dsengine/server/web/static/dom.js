// Elements without HTML: every text becomes a text node, so that nothing a model writes can be markup.

/**
 * An element.
 * @param {string} name tag, with classes behind dots: "div.answer.markdown"
 * @param {object} attributes "on…" are listeners, `true` and `false` switch, the rest are set as they are
 * @param {...(Node|string|null)} children
 */
export function element(name, attributes = {}, ...children) {
  const [tag, ...classes] = name.split(".");
  const node = document.createElement(tag);
  if (classes.length) node.classList.add(...classes);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (typeof value === "boolean") node.toggleAttribute(key, value);
    else node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

export function byId(id) {
  return document.getElementById(id);
}

/** A button with a text. */
export function button(text, onclick, classes = "ghost small") {
  return element("button", { type: "button", class: classes, onclick }, text);
}

/** Copies a text, and says on the button that it has. */
export async function copyText(text, from) {
  const before = from.textContent;
  try {
    await navigator.clipboard.writeText(text);
    from.textContent = "Copied";
  } catch {
    from.textContent = "Not allowed";
  }
  setTimeout(() => (from.textContent = before), 1200);
}

/** Makes a text field as high as its text, up to what its style allows. */
export function fitHeight(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + area.offsetHeight - area.clientHeight}px`;
}
